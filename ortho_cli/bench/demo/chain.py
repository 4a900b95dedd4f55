"""The self-contained bench: build the sandbox, then calibrate, decompose and bench its model.

The functions are those of the commands, called one after the other.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ortho_cli.bench import figures
from ortho_cli.bench import plan as bench_plan
from ortho_cli.bench import run as bench
from ortho_cli.bench.demo import sandbox
from ortho_cli.bench.demo.sandbox import Sandbox
from ortho_cli.bench.plan import Settings
from ortho_cli.bench.records import Report
from ortho_cli.calibrate import job as calibrate
from ortho_cli.calibrate import plan as calibrate_plan
from ortho_cli.decompose import job as decompose
from ortho_cli.decompose import plan
from ortho_cli.decompose.recipe import load_recipe
from ortho_cli.errors import Interrupted, OutputExistsError, UsageError
from ortho_cli.events import EventSink, Finishing, null_sink
from ortho_cli.forget import editor as forget
from ortho_cli.formats.statistics import open_statistics
from ortho_cli.storage.checkpoint import open_checkpoint
from ortho_cli.storage.job import resolve_output

# Of attacks: the rate at which this small model knows the taught half again in 40 steps.
LEARNING_RATE = 1e-3
RECIPE = "forget-unlearn"
# Documents are short: 64 tokens hold the longest. The model is small and its secrets fill it, so
# more of its codes have to move, in more steps, than those of a language model. In whole columns
# they cost the rest of its text less than anywhere (forget/README.md), and ortho is an adapter.
SETS = (
    "calibrate.samples=256",
    "calibrate.length=64",
    "ortho.density=0.1",
    "ortho.structure=columns",
    "forget.support=columns",
    "forget.steps=100",
    "forget.attack_steps=0",
    "forget.step_damage=0.0005",
    "forget.share=0.02",
    "forget.rounds=80",
)


def run(settings: Settings, *, keep: Path | None = None, on_event: EventSink = null_sink) -> Report:
    """Build the sandbox or take it from the cache, split its model and measure everything.

    Args:
        settings: alphas, seed, attack and gates count; files and models are the sandbox's own.
        keep: a new folder for `sandbox/`, `stats.safetensors` and `artifact/`; without it they go
            to a temporary folder that is removed.
        on_event: receives progress.
    Returns:
        As `bench.bench`; the artifact's folder is None where it was temporary.
    Raises:
        OutputExistsError: something is at `keep`.
        UsageError: a gate or alpha that does not fit; before any work.
    """
    _check(settings, keep)
    box = sandbox.cached(settings.seed, on_event)
    target = None if keep is None else resolve_output(keep)
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
    beside = None if target is None else target.parent
    with tempfile.TemporaryDirectory(prefix=".ortho-bench-", dir=beside) as scratch:
        place = Path(scratch) / "all"
        shutil.copytree(box.folder, place / "sandbox")
        with _told("the same command splits its model again"):
            _split(sandbox.sandbox_at(place / "sandbox"), place, on_event)
        if target is not None:  # whole or not at all
            place = place.replace(target)
        box = sandbox.sandbox_at(place / "sandbox")
        again = f"remove `{keep}`, then repeat the same command to go on from there"
        with _told(again if keep else None):
            report = bench.bench(_filled(settings, box, place / "artifact"), on_event=on_event)
    return report if keep else replace(report, artifact=replace(report.artifact, folder=None))


@contextmanager
def _told(hint: str | None) -> Iterator[None]:
    """Say of an interrupt how this bench goes on, where a part of it does not know."""
    try:
        yield
    except Interrupted as error:
        if hint is None:
            raise
        raise Interrupted(error.message, hint=hint) from None


def _filled(settings: Settings, box: Sandbox, artifact: Path) -> Settings:
    """Give the settings the sandbox's files: there is data for every figure."""
    return replace(
        settings,
        artifact=artifact,
        data=(box.heldout, box.skill),
        forget=(box.forget,),
        nonmember=(box.nonmember,),
        unlisted=(box.unlisted,),
        model=box.model,
        reference_model=box.twin,
        controls=True,
        learning_rate=LEARNING_RATE,
    )


def _check(settings: Settings, keep: Path | None) -> None:
    """Refuse settings that would fail only after minutes of training."""
    given = (settings.data, settings.forget, settings.nonmember, settings.unlisted)
    if any((*given, settings.suites)):
        raise UsageError(
            "without an artifact the bench brings its own data",
            hint="name the artifact first: ortho bench ARTIFACT --data FILE",
        )
    if settings.model or settings.reference_model or settings.public:
        raise UsageError(
            "without an artifact the bench brings its own models",
            hint="name the artifact first: ortho bench ARTIFACT --model DIR",
        )
    box = sandbox.sandbox_at(Path("sandbox"))
    planned = bench_plan.checked(_filled(settings, box, Path("artifact")))
    gates = [figures.parse_gate(text) for text in settings.require]
    bench_plan.check_gates(gates, planned, bench_plan.not_measured(planned, ortho=True))
    if keep is not None and keep.exists() and not (keep.is_dir() and not any(keep.iterdir())):
        raise OutputExistsError(f"`{keep}` exists", hint="--keep-files takes a new folder")


def _split(box: Sandbox, place: Path, on_event: EventSink) -> None:
    """Calibrate, and decompose so that base forgets."""
    stats, artifact = place / "stats.safetensors", place / "artifact"
    settings = load_recipe(RECIPE, SETS)
    checkpoint = open_checkpoint(box.model)
    on_event(Finishing(step="calibrate"))
    sets = calibrate_plan.read_sets(box.model, [box.retain], [], settings.calibrate)
    measured = calibrate_plan.make_plan(checkpoint, settings, sets)
    beside = calibrate.check_target(checkpoint, stats)
    calibrate.calibrate(measured, checkpoint, beside, device="cpu", on_event=on_event)
    on_event(Finishing(step="decompose"))
    planned = plan.make_plan(checkpoint, settings, statistics=open_statistics(stats), workers=1)
    editor = forget.open_editor(
        planned,
        checkpoint,
        forget=[box.forget],
        data=[box.retain],
        device="cpu",
        on_event=on_event,
    )
    target = decompose.check_target(planned, checkpoint, artifact)
    decompose.decompose(planned, checkpoint, target, editor=editor, on_event=on_event)
