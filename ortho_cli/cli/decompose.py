"""The command `ortho decompose`: split a checkpoint into base and ortho."""

from __future__ import annotations

import logging
import time
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ortho_cli.cli import options
from ortho_cli.cli.shared import (
    Output,
    computes_here,
    located,
    place_output,
    plan_of,
    run_facts,
    settled,
    without_curvature,
)
from ortho_cli.errors import (
    CalibrationError,
    CheckpointError,
    NumericalError,
    RecipeError,
    ResourceError,
    UsageError,
)

if TYPE_CHECKING:
    from ortho_cli.decompose.plan import Plan
    from ortho_cli.decompose.settings import Recipe
    from ortho_cli.decompose.tune import Tuner
    from ortho_cli.events import Event, EventSink
    from ortho_cli.forget.editor import ForgetEditor
    from ortho_cli.model.cost import Part
    from ortho_cli.storage.checkpoint import Checkpoint
    from ortho_cli.storage.job import Target
    from ortho_cli.storage.sealing import Keys, Seal

log = logging.getLogger(__name__)

# What keeps the default recipe from measuring a model, which is then split without it. Resources:
# activations of one batch may not fit beside a block that does.
_UNMEASURED = (CalibrationError, CheckpointError, NumericalError, RecipeError, ResourceError)

SHORT = "Split a checkpoint into base and ortho."
EXAMPLES = """
    ortho decompose SmolLM2
    ortho decompose SmolLM2 --target-bits 4.4 -o small
    ortho decompose SmolLM2 --recipe capability --stats stats.safetensors
"""


# Longer than 60 lines: the signature and the call of the job name every option.
def decompose(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL",
            help="A model folder, a .safetensors file, or ORG/NAME in the Hub's local cache.",
        ),
    ],
    out: Annotated[
        Path | None,
        options.out(
            help="The folder to make.  [default: MODEL-ortho, beside MODEL; in the working "
            "directory for a model in the Hub's cache, or where that cannot be written]"
        ),
    ] = None,
    stats: options.Stats = None,
    forget: Annotated[
        list[Path] | None,
        options.files(
            help="What base must not know: rows of `prompt` and `secret`, or chats. Needs a recipe "
            "that forgets, --stats, and the model in memory; isolate needs four times its float32 "
            "size, unlearn five times."
        ),
    ] = None,
    data: Annotated[
        list[Path] | None,
        options.files(
            help="What must stay: text that forgetting holds on to, or that rounding is tuned on."
        ),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(metavar="MODEL", help="The model before it saw what base must not know."),
    ] = None,
    target_bits: Annotated[
        float | None,
        typer.Option(
            metavar="BITS",
            help="Pick the density, and the group size where it is auto, that lose least within so "
            "many bits per split weight, both files; reads every weight first.",
        ),
    ] = None,
    recipe: options.Recipe = None,
    sets: options.Set = None,
    seal_to: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RECIPIENT",
            help="Seal ortho to age1..., a recipient of age (ortho.safetensors.age); repeatable.",
        ),
    ] = None,
    seal_passphrase_file: Annotated[
        Path | None,
        options.file(
            help="Seal ortho to a new key, and that (ortho.key.age) to the passphrase in FILE."
        ),
    ] = None,
    identity: Annotated[
        Path | None,
        options.file(
            help="age identities that open what an earlier, unfinished run sealed with --seal-to."
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Replace an artifact at OUT once the new one is complete; discard other "
            "half-done work.",
        ),
    ] = False,
    accept_damage: Annotated[
        bool,
        typer.Option(
            "--accept-damage",
            help="Finish although forgetting costs the rest more than the recipe's forget.damage.",
        ),
    ] = False,
    dry_run: options.DryRun = False,
    copy: options.Copy = None,
    workers: options.Workers = None,
    device: Annotated[
        str,
        typer.Option(
            metavar="DEVICE",
            autocompletion=options.complete_device,
            help="auto, cpu, cuda or cuda:N: of the model that writes text, or that a recipe "
            "forgets or tunes in, and where cuda is asked for by name, of a split that one pass "
            "does.",
        ),
    ] = "auto",
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = 0,
    schema: options.Schema = False,
    trust_remote_code: options.Trust = False,
) -> None:
    """Split every Linear of MODEL and write OUT; needs no GPU.

    Without --recipe, --stats, --data and --forget the model first writes 2,048 tokens, on which it
    is measured which weights matter: that takes seconds, and five bytes of memory per weight. A
    model that is larger than memory reads random tokens instead, block by block. Where it cannot (a
    bare file, no causal language model), a note says so, and the recipe is int4, which needs about
    70 MB beside the runtime for a model of any size. With --stats and no recipe it is curvature. A
    killed or interrupted run resumes when the same command is given again.
    """
    from ortho_cli.cli.show.decompose import print_done
    from ortho_cli.decompose.job import check_target
    from ortho_cli.decompose.job import decompose as run
    from ortho_cli.decompose.recipe import load_recipe
    from ortho_cli.events import Noted, messages

    output = Output(as_json=as_json, quiet=quiet, verbose=verbose)
    splits_on = _split_device(device)
    seal, keys = _seal_and_keys(seal_to, seal_passphrase_file, identity)
    model = located(model, quiet=quiet)
    before = located(reference, quiet=quiet) if reference else None
    rows = [*(forget or []), *(data or [])]
    private = [*rows, seal_passphrase_file, identity]
    fits = target_bits is not None
    sets, given_way = _without_density(recipe, sets or [], target_bits)
    checkpoint, plan = plan_of(
        model, stats, recipe, sets, workers, before, copy, private, has_rows=bool(rows)
    )
    out, unusual = place_output(out, model)
    began = time.perf_counter()
    with ExitStack() as until_done:
        measures = plan.measures
        if measures and (fits or not dry_run):
            target = check_target(plan, checkpoint, out, force=force, seal=seal)
            file = until_done.enter_context(_statistics_file(target, dry_run))
            otherwise = None if recipe else load_recipe(None, sets)
            plan = _measured(plan, checkpoint, file, otherwise, device, output)
        if target_bits is not None:
            plan = _fit(plan, checkpoint, target_bits, out, output)
        target = check_target(plan, checkpoint, out, force=force, seal=seal, reads=rows)
        notes: list[Event] = [Noted(message=note) for note in (*unusual, *given_way)]
        log.info("device of the split: %s; ortho is %ssealed", splits_on, "" if seal else "not ")
        editor, tuner = _model_work(
            plan, checkpoint, forget or [], data or [], device, accept_damage, notes.append
        )
        if dry_run:
            plan = settled(plan, checkpoint, out, output=output)
            parts = _estimate(plan, checkpoint, editor, device, measures=measures)
            output.show_plan(plan, model, notes=messages(notes), out=out, estimate=parts)
            return
        with output.progress("decompose") as sink:
            for note in notes:
                sink(note)
            report = run(
                plan,
                checkpoint,
                target,
                editor=editor,
                tuner=tuner,
                seal=seal,
                keys=keys,
                device=splits_on,
                on_event=sink,
            )
    # Not in report.json: what was left out of the source's folder concerns this user alone.
    done = {"left_out": plan.side.to_json(), "run": run_facts(out, began)}
    output.show(report | done, print_done)


def _split_device(device: str) -> str:
    """Name the device of the split: the CPU, unless a GPU is asked for by name."""
    if device in ("auto", "cpu"):
        return "cpu"
    from ortho_cli.model.load import resolve_device

    resolved = resolve_device(device)
    return "cpu" if resolved.type == "cpu" else str(resolved)


def _estimate(
    plan: Plan,
    checkpoint: Checkpoint,
    editor: ForgetEditor | None,
    device: str,
    *,
    measures: bool,
) -> list[Part]:
    """Estimate the time of a plan on this machine; nothing where a GPU would do the work.

    Args:
        plan: as it is shown.
        checkpoint: the source.
        editor: of a recipe that forgets.
        device: as it was given.
        measures: statistics are measured first, although a plan for --target-bits has some already.
    """
    from ortho_cli.decompose import estimate
    from ortho_cli.storage.speeds import open_speeds

    if not computes_here("cpu" if estimate.is_plain(plan) and not measures else device):
        return []
    speeds = open_speeds()
    plan = replace(plan, measures=measures)
    parts = estimate.of_plan(plan, checkpoint.tensors, speeds)
    if measures:
        from ortho_cli.calibrate.estimate import of_own_text

        sources = [tensor.source for tensor in plan.split]
        parts[1:1] = of_own_text(plan.recipe.calibrate, sources, checkpoint, speeds)
    if editor is not None:
        parts.insert(1, editor.estimate(speeds))
    return parts


def _seal_and_keys(
    seal_to: list[str] | None, passphrase_file: Path | None, identity: Path | None
) -> tuple[Seal | None, Keys | None]:
    from ortho_cli.storage.sealing import make_seal, read_keys

    seal = make_seal(seal_to or (), passphrase_file)
    keys = read_keys(identity)
    if keys and seal is None:
        raise UsageError(
            "--identity opens what was sealed, and there is no --seal-to",
            hint="leave --identity out, or give the recipients of the run to resume",
        )
    return seal, keys


def _without_density(
    recipe: str | None, sets: list[str], target_bits: float | None
) -> tuple[list[str], list[str]]:
    """Let --target-bits win over the density of a recipe, with a note; --set still contradicts."""
    if target_bits is None:
        return sets, []
    if recipe is None:
        return ["ortho.density=null", *sets], []
    from ortho_cli.decompose.recipe import load_recipe

    ortho = load_recipe(recipe).ortho
    if "density" not in ortho.model_fields_set or ortho.split != "residual":
        return sets, []
    note = f"--target-bits {target_bits:g} picks the density, not the recipe's {ortho.density:g}"
    return ["ortho.density=null", *sets], [note]


def _statistics_file(target: Target, dry_run: bool) -> AbstractContextManager[Path]:
    """Name the file of what is measured: beside the output, unless nothing is to be written."""
    from ortho_cli.calibrate.own_text import beside, nowhere

    return nowhere() if dry_run else beside(target)


def _measured(
    plan: Plan,
    checkpoint: Checkpoint,
    file: Path,
    otherwise: Recipe | None,
    device: str,
    output: Output,
) -> Plan:
    """Measure what a plan uses, and make it again; by another recipe where that is impossible."""
    from ortho_cli.calibrate.own_text import measure
    from ortho_cli.decompose.plan import make_plan

    recipe, notes, statistics = plan.recipe, plan.notes, None
    try:
        with output.progress("calibrate") as sink:
            statistics = measure(checkpoint, recipe, file, device=device, on_event=sink)
    except _UNMEASURED as error:
        if otherwise is None:  # the recipe was asked for
            raise
        recipe, notes = otherwise, (*notes, without_curvature(error.message))
    made = make_plan(
        checkpoint, recipe, statistics=statistics, workers=plan.workers, side=plan.side
    )
    return replace(made, notes=notes)


def _fit(plan: Plan, checkpoint: Checkpoint, target_bits: float, out: Path, output: Output) -> Plan:
    """Choose the density and group size that lose least within --target-bits."""
    from ortho_cli.decompose.budget import meet
    from ortho_cli.decompose.survey import load_surveys

    known = load_surveys(out)
    with output.progress("score") as sink:
        met = meet(plan, checkpoint, target_bits, known=known, on_event=sink)
    return replace(met, notes=plan.notes)


def _model_work(
    plan: Plan,
    checkpoint: Checkpoint,
    forget: list[Path],
    data: list[Path],
    device: str,
    accept_damage: bool,
    on_event: EventSink,
) -> tuple[ForgetEditor | None, Tuner | None]:
    """Open what forgets or tunes; only then is transformers imported."""
    if plan.recipe.base.rounding == "tuned" and not forget:
        from ortho_cli.decompose.tune import open_tuner

        return None, open_tuner(plan, checkpoint, data=data, device=device, on_event=on_event)
    if not (plan.recipe.forgets or forget or data):
        return None, None
    from ortho_cli.forget.editor import open_editor

    editor = open_editor(
        plan,
        checkpoint,
        forget=forget,
        data=data,
        device=device,
        accept_damage=accept_damage,
        on_event=on_event,
    )
    return editor, None
