"""The command line: open, call one function, print."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from ortho_cli import __version__, boundary
from ortho_cli.cli_bench import bench
from ortho_cli.errors import UsageError
from ortho_cli.options import (
    BeforeOption,
    DeviceOption,
    GramOption,
    IdentityOption,
    JsonOption,
    ModelDeviceOption,
    QuietOption,
    RecipeOption,
    SchemaOption,
    SealPassphraseOption,
    SealToOption,
    SecretsOption,
    SetOption,
    StatsOption,
    StaysOption,
    TargetBitsOption,
    TrustOption,
    VerboseOption,
    WorkersOption,
)

if TYPE_CHECKING:
    from ortho_cli.events import Event, EventSink
    from ortho_cli.plan import Plan

# rich help would cost as much again as everything else that `--help` imports.
app = typer.Typer(
    name="ortho",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ortho {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Split a checkpoint into two: W(alpha) = base (dense INT4) + alpha * ortho (sparse)."""


@app.command()
def decompose(
    model: Annotated[Path, typer.Argument(help="A .safetensors file, or a model folder.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="The folder to make.  [default: MODEL-ortho, beside MODEL]"
        ),
    ] = None,
    stats: StatsOption = None,
    forget: SecretsOption = None,
    data: StaysOption = None,
    reference: BeforeOption = None,
    target_bits: TargetBitsOption = None,
    recipe: RecipeOption = None,
    sets: SetOption = None,
    seal_to: SealToOption = None,
    seal_passphrase_file: SealPassphraseOption = None,
    identity: Annotated[
        Path | None,
        typer.Option(
            "--identity",
            metavar="FILE",
            help="age identities that open what an earlier, unfinished run sealed with --seal-to.",
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
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and write nothing.")
    ] = False,
    workers: WorkersOption = None,
    device: Annotated[
        str,
        typer.Option(
            "--device",
            help="auto, cpu, cuda or cuda:N: of the model that a recipe forgets or tunes in, and "
            "where cuda is asked for by name, of a split that one pass does.",
        ),
    ] = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    schema: SchemaOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Split every Linear of MODEL and write OUT; needs no GPU and a few tiles of memory.

    A killed or interrupted run goes on where it stopped when the same command is given again.
    """
    from ortho_cli.artifact import is_artifact
    from ortho_cli.output import check_output, check_space, files_of
    from ortho_cli.plan import check_memory
    from ortho_cli.seal import make_seal, read_keys

    splits_on = _split_device(device)
    seal = make_seal(seal_to or (), seal_passphrase_file)
    keys = read_keys(identity) if identity else None
    if keys and seal is None:
        raise UsageError(
            "--identity opens what was sealed, and nothing is: there is no --seal-to",
            hint="leave --identity out, or give the recipients of the run to go on with",
        )
    checkpoint, plan = _plan(model, stats, recipe, sets, workers, reference)
    plan = _meet(plan, checkpoint, target_bits, quiet=quiet)
    target = out or _default_out(model)
    read = files_of(checkpoint, *plan.inputs, *(forget or []), *(data or []))
    check_output(target, read, force=force, is_ours=is_artifact)
    check_space(plan.bytes_on_disk, target)
    check_memory(plan)
    notes: list[Event] = []
    more = _model_work(plan, checkpoint, forget or [], data or [], device, notes.append)
    if dry_run:
        _show_plan(plan, model, as_json=as_json, quiet=quiet)
        return
    from ortho_cli import report
    from ortho_cli.decompose import decompose as run
    from ortho_cli.report_progress import ProgressSink

    began = time.perf_counter()
    with ProgressSink("decompose", quiet=quiet, verbose=verbose) as sink:
        for note in notes:
            sink(note)
        more |= {"device": splits_on, "force": force, "seal": seal, "keys": keys}
        document = run(plan, checkpoint, target, on_event=sink, **more)
    document["run"] = _run_facts(target, began)
    _show(document, report.print_done, as_json, quiet)


@app.command()
def calibrate(
    model: Annotated[Path, typer.Argument(help="A transformers folder, with its tokenizer.")],
    data: Annotated[
        list[Path],
        typer.Option(
            "--data",
            metavar="FILE...",
            help="What must keep working: .txt, .jsonl (`text`, or `prompt` and `completion`, "
            "which alone counts) or .parquet files; read whole.",
        ),
    ],
    forget: Annotated[
        list[Path] | None,
        typer.Option("--forget", metavar="FILE...", help="What must go; measured apart."),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The file to make.", show_default=True)
    ] = Path("stats.safetensors"),
    gram: GramOption = None,
    recipe: RecipeOption = None,
    sets: SetOption = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace statistics at OUT once the new are complete.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be measured and write nothing.")
    ] = False,
    device: ModelDeviceOption = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    schema: SchemaOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Measure how much each weight of MODEL matters to the data; write curvature statistics.

    Holds the model in memory, and on disk two float32 a weight of each set while it works, and
    with --gram full two for each pair of a weight's inputs. With --forget the file is as sensitive
    as the private data: only its owner may read it. A killed or interrupted run goes on when the
    same command is given again.
    """
    from ortho_cli import report
    from ortho_cli.calibrate import calibrate as run
    from ortho_cli.calibrate_plan import make_plan, read_sets
    from ortho_cli.checkpoint import open_checkpoint
    from ortho_cli.output import check_output, check_space, files_of
    from ortho_cli.recipe import load_recipe
    from ortho_cli.report_progress import ProgressSink
    from ortho_cli.statistics import is_statistics

    asked = () if gram is None else (f"calibrate.gram={gram}",)
    settings = load_recipe(recipe, [*(sets or ()), *asked])
    checkpoint = open_checkpoint(model)
    check_output(
        out,
        [*files_of(checkpoint), *data, *(forget or [])],
        force=force,
        is_ours=is_statistics,
        kind="statistics file",
        is_file=True,
    )
    plan = make_plan(checkpoint, settings, read_sets(model, data, forget or [], settings.calibrate))
    check_space(plan.bytes_written + plan.bytes_scratch, out, kind="statistics with their sums")
    if dry_run:
        _show(plan.to_json(), report.print_calibration_plan, as_json, quiet, source=str(model))
        return
    began = time.perf_counter()
    with ProgressSink("calibrate", quiet=quiet, verbose=verbose) as sink:
        document = run(plan, checkpoint, out, device=device, force=force, on_event=sink)
    document["run"] = _run_facts(out, began)
    _show(document, report.print_calibrated, as_json, quiet)


@app.command()
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SRC",
            help="A .safetensors, .bin, .pt, .pth or .gguf file, a model folder, or an artifact.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="The folder to make.  [default: SRC-converted, or SRC-dense for an artifact, "
            "beside SRC]",
        ),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option("--alpha", help="For an artifact, and required there: 0 is base, 1 is all."),
    ] = None,
    identity: IdentityOption = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            help="bfloat16, float16 or float32, for floating tensors.  [default: each one's own]",
        ),
    ] = None,
    shard_size: Annotated[
        str, typer.Option("--shard-size", help="Most bytes of tensors in a file.")
    ] = "5GB",
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Replace what convert made at OUT once the new one is complete; discard other "
            "half-done work.",
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and write nothing.")
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Write any checkpoint, or an artifact at one alpha, as plain safetensors.

    Reads tile by tile and needs little memory; only a .bin of before torch 1.6 is held whole, and
    of a GGUF one tensor at a time. Nothing in a .bin, .pt or .pth is ever run. A killed run goes on
    where it stopped.
    """
    from ortho_cli import convert as work
    from ortho_cli import report
    from ortho_cli.convert_plan import make_plan, parse_size
    from ortho_cli.report_progress import ProgressSink
    from ortho_cli.seal import read_keys

    size = parse_size(shard_size)
    keys = read_keys(identity) if identity else None
    with contextlib.closing(work.open_source(source, alpha=alpha, keys=keys)) as opened:
        plan = make_plan(opened, dtype=dtype, shard_size=size)
        folder = opened.folder if opened.kind == "artifact" else source
        target = out or _default_out(folder, "converted" if alpha is None else "dense")
        work.check_target(plan, opened, target, force=force)
        if dry_run:
            _show(plan.to_json(), report.print_convert_plan, as_json, quiet, source=str(source))
            return
        began = time.perf_counter()
        with ProgressSink("convert", quiet=quiet, verbose=verbose) as sink:
            document = work.convert(plan, opened, target, force=force, on_event=sink)
    document["run"] = _run_facts(target, began)
    _show(document, report.print_converted, as_json, quiet)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A checkpoint, an artifact or statistics.")],
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Read every byte of an artifact and check every digest."),
    ] = False,
    identity: IdentityOption = None,
    expect_source: Annotated[
        Path | None,
        typer.Option(help="Check that an artifact was made from this checkpoint, byte for byte."),
    ] = None,
    stats: StatsOption = None,
    recipe: RecipeOption = None,
    sets: SetOption = None,
    workers: WorkersOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    schema: SchemaOption = False,
) -> None:
    """Show what would be split of a checkpoint, or what an artifact or statistics file holds."""
    from ortho_cli import artifact, report
    from ortho_cli import verify as reading
    from ortho_cli.report_progress import ProgressSink
    from ortho_cli.seal import read_keys
    from ortho_cli.statistics import is_statistics

    _check_device(device)
    if expect_source and not artifact.is_artifact(path, damaged=True):
        raise UsageError(
            f"`{path}` is no artifact, and --expect-source checks where one comes from",
            hint="leave --expect-source out",
        )
    if is_statistics(path):
        if recipe or sets or stats:
            raise UsageError(
                f"`{path}` is a statistics file, made by the recipe that it holds",
                hint="leave --stats, --recipe and --set out",
            )
        _show_statistics(path, verify=verify, as_json=as_json, quiet=quiet, verbose=verbose)
        return
    if not artifact.is_artifact(path, damaged=True):
        if verify and path.exists():
            raise UsageError(
                f"`{path}` is no artifact, and --verify checks artifacts and statistics",
                hint="leave --verify out",
            )
        _, plan = _plan(path, stats, recipe, sets, workers)
        _show_plan(plan, path, as_json=as_json, quiet=quiet)
        return
    if recipe or sets or stats:
        raise UsageError(
            f"`{path}` is an artifact, made by the recipe that it holds",
            hint="leave --stats, --recipe and --set out",
        )
    keys = read_keys(identity) if identity else None
    found = artifact.open_artifact(path if path.is_dir() else path.parent, keys)
    document = reading.describe(found)
    if expect_source:
        from ortho_cli.checkpoint import open_checkpoint
        from ortho_cli.provenance import check_source

        with ProgressSink("source", quiet=quiet, verbose=verbose) as sink:
            read = check_source(document, open_checkpoint(expect_source), on_event=sink)
        document["source_checked"] = {"source": str(expect_source), "tensors": read}
    if verify:
        with ProgressSink("verify", quiet=quiet, verbose=verbose) as sink:
            document["verified"] = asdict(reading.verify(found, on_event=sink))
    _show(document, report.print_artifact, as_json, quiet, folder=str(path))


app.command()(bench)


def _show_statistics(
    path: Path, *, verify: bool, as_json: bool, quiet: bool, verbose: bool
) -> None:
    from ortho_cli import report, statistics
    from ortho_cli.report_progress import ProgressSink

    found = statistics.open_statistics(path)
    document = statistics.describe(found)
    if verify:
        with ProgressSink("verify", quiet=quiet, verbose=verbose) as sink:
            document["verified"] = statistics.verify(found, on_event=sink)
    _show(document, report.print_statistics, as_json, quiet, path=str(path))


def _plan(
    model: Path,
    stats: Path | None,
    recipe: str | None,
    sets: list[str] | None,
    workers: int | None,
    reference: Path | None = None,
) -> tuple[Any, Plan]:
    from ortho_cli.checkpoint import open_checkpoint
    from ortho_cli.plan import make_plan
    from ortho_cli.recipe import load_recipe
    from ortho_cli.statistics import check_model, open_statistics

    settings = load_recipe(recipe, sets or ())
    checkpoint = open_checkpoint(model)
    found = open_statistics(stats) if stats else None
    plan = make_plan(
        checkpoint,
        settings,
        statistics=found,
        reference=open_checkpoint(reference) if reference else None,
        workers=workers or _cores(),
    )
    if found is not None:
        check_model(found, checkpoint, [tensor.source for tensor in plan.split])
    return checkpoint, plan


def _meet(plan: Plan, checkpoint: Any, target_bits: float | None, *, quiet: bool) -> Plan:
    """Pick what a size can buy, where one is asked for."""
    if target_bits is None:
        return plan
    from ortho_cli.budget import meet
    from ortho_cli.report_progress import ProgressSink

    with ProgressSink("score", quiet=quiet, verbose=False) as sink:
        return meet(plan, checkpoint, target_bits, on_event=sink)


def _model_work(
    plan: Plan,
    checkpoint: Any,
    forget: list[Path],
    data: list[Path],
    device: str,
    on_event: EventSink,
) -> dict[str, Any]:
    """Import what forgets or tunes, and with it transformers, only where it is asked for."""
    if plan.recipe.base.rounding == "tuned" and not forget:
        from ortho_cli.tune import open_tuner

        return {"tuner": open_tuner(plan, checkpoint, data=data, device=device)}
    if not (plan.recipe.forgets or forget or data):
        return {}
    from ortho_cli.forget import open_editor

    editor = open_editor(
        plan, checkpoint, forget=forget, data=data, device=device, on_event=on_event
    )
    return {"editor": editor}


def _split_device(device: str) -> str:
    """Name what splits: the processor, unless a card is asked for by name."""
    if device in ("auto", "cpu"):
        return "cpu"
    from ortho_cli.models import resolve_device

    found = resolve_device(device)
    return "cpu" if found.type == "cpu" else str(found)


def _check_device(device: str) -> None:
    if device not in ("auto", "cpu"):
        raise UsageError(
            f"--device {device} is not there; this version computes on the CPU",
            hint="leave --device out",
        )


def _cores() -> int:
    """Cores given to this process, at most eight: past that the disk is the limit."""
    given = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return min(8, given)


def _show(
    document: dict[str, Any],
    printer: Callable[..., None],
    as_json: bool,
    quiet: bool,
    **names: str,
) -> None:
    """Give one document to scripts, or its gist to eyes."""
    from ortho_cli import report

    if as_json:
        report.print_json(document)
    elif not quiet:
        printer(document, **names)


def _run_facts(target: Path, began: float) -> dict[str, Any]:
    return {
        "output": str(target),
        "seconds": round(time.perf_counter() - began, 3),
        "peak_rss_bytes": _peak_rss(),
    }


def _default_out(model: Path, what: str = "ortho") -> Path:
    from ortho_cli.checkpoint import model_name

    whole = Path(os.path.abspath(model))  # noqa: PTH100 - resolve() would leave the user's folder
    beside = (
        whole if model.name in ("", "..") else model
    )  # as the user wrote it, where it names one
    return beside.parent / f"{model_name(whole)}-{what}"


def _show_plan(plan: Plan, model: Path, *, as_json: bool, quiet: bool) -> None:
    from ortho_cli import report

    _show(plan.to_json(), report.print_plan, as_json, quiet, source=str(model))


def _peak_rss() -> int:
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the parent held before exec
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# Options that take every word up to the next option: `--data a.txt b.txt`.
MANY = {
    "calibrate": ("--data", "--forget"),
    "decompose": ("--data", "--forget"),
    "bench": ("--alpha", "--data", "--forget", "--nonmember", "--unlisted"),
}


def run(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    return boundary.run(app, sys.argv[1:] if arguments is None else arguments, many=MANY)


def main() -> NoReturn:
    """Entry point of the `ortho` command."""
    boundary.enter(run)
