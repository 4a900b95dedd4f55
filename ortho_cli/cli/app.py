"""The command line: open, call one function, print."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from ortho_cli.cli import boundary
from ortho_cli.cli.bench import bench
from ortho_cli.cli.inspect import inspect
from ortho_cli.cli.options import (
    BeforeOption,
    CopyOption,
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
from ortho_cli.cli.shared import (
    located,
    place_output,
    plan_of,
    run_facts,
    settled,
    show,
    show_plan,
)
from ortho_cli.errors import UsageError
from ortho_cli.version import __version__

if TYPE_CHECKING:
    from ortho_cli.decompose.plan import Plan
    from ortho_cli.events import Event, EventSink

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
            "--out",
            "-o",
            help="The folder to make.  [default: MODEL-ortho, beside MODEL; in the working "
            "directory for a model in the Hub's cache, or where that cannot be written]",
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
    copy: CopyOption = None,
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
    from ortho_cli.decompose.plan import check_memory
    from ortho_cli.formats.artifact import is_artifact
    from ortho_cli.storage.output import check_output, check_space, files_of
    from ortho_cli.storage.sealing import make_seal, read_keys, scratch_bytes

    splits_on = _split_device(device)
    seal = make_seal(seal_to or (), seal_passphrase_file)
    keys = read_keys(identity)
    if keys and seal is None:
        raise UsageError(
            "--identity opens what was sealed, and nothing is: there is no --seal-to",
            hint="leave --identity out, or give the recipients of the run to go on with",
        )
    model = located(model, quiet=quiet)
    before = located(reference, quiet=quiet) if reference else None
    given = [*(forget or []), *(data or []), seal_passphrase_file, identity]
    checkpoint, plan = plan_of(model, stats, recipe, sets, workers, before, copy, given)
    target, said = place_output(out, model)
    plan = _meet(plan, checkpoint, target_bits, target, quiet=quiet)
    read = files_of(checkpoint, *plan.inputs, *(forget or []), *(data or []))
    check_output(target, read, force=force, is_ours=is_artifact)
    check_space(plan.bytes_on_disk + scratch_bytes(plan.ortho, seal), target)
    check_memory(plan)
    notes: list[Event] = []
    more = _model_work(plan, checkpoint, forget or [], data or [], device, notes.append)
    if dry_run:
        plan = settled(plan, checkpoint, target, quiet=quiet, verbose=verbose)
        show_plan(plan, model, as_json=as_json, quiet=quiet, notes=said)
        return
    from ortho_cli.cli.show import tables
    from ortho_cli.cli.show.progress import ProgressSink
    from ortho_cli.decompose.job import decompose as run

    began = time.perf_counter()
    with ProgressSink("decompose", quiet=quiet, verbose=verbose) as sink:
        for note in (*map(_note, said), *notes):
            sink(note)
        more |= {"device": splits_on, "force": force, "seal": seal, "keys": keys}
        document = run(plan, checkpoint, target, on_event=sink, **more)
    document["left_out"] = plan.side.to_json()  # of no concern to whoever gets report.json
    document["run"] = run_facts(target, began)
    show(document, tables.print_done, as_json, quiet)


@app.command()
def calibrate(
    model: Annotated[Path, typer.Argument(help="A transformers folder, with its tokenizer.")],
    data: Annotated[
        list[Path],
        typer.Option(
            "--data",
            metavar="FILE...",
            help="What must keep working: files of text, JSON, JSON lines, CSV or parquet, gzip or "
            "not (`text`; `prompt` and `completion`, which alone counts; or chats); read whole.",
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
    from ortho_cli.calibrate.job import calibrate as run
    from ortho_cli.calibrate.plan import make_plan, read_sets
    from ortho_cli.cli.show import tables
    from ortho_cli.cli.show.progress import ProgressSink
    from ortho_cli.convert.sources.adapters import refuse_adapter
    from ortho_cli.decompose.recipe import load_recipe
    from ortho_cli.decompose.refusals import refuse_quantized
    from ortho_cli.formats.statistics import is_statistics
    from ortho_cli.storage.checkpoint import open_checkpoint
    from ortho_cli.storage.output import check_output, check_space, files_of

    asked = () if gram is None else (f"calibrate.gram={gram}",)
    settings = load_recipe(recipe, [*(sets or ()), *asked])
    model = located(model, quiet=quiet)
    refuse_adapter(model)
    checkpoint = open_checkpoint(model)
    refuse_quantized(checkpoint)  # before data and tokenizer are read
    check_output(
        out,
        [*files_of(checkpoint), *data, *(forget or [])],
        force=force,
        is_ours=is_statistics,
        kind="statistics file",
        is_file=True,
    )
    notes: list[Event] = []
    sets_read = read_sets(model, data, forget or [], settings.calibrate, notes.append)
    plan = make_plan(checkpoint, settings, sets_read)
    check_space(plan.bytes_written + plan.bytes_scratch, out, kind="statistics with their sums")
    if dry_run:
        document = plan.to_json() | {"notes": list(checkpoint.notes)}
        show(document, tables.print_calibration_plan, as_json, quiet, source=str(model))
        return
    began = time.perf_counter()
    with ProgressSink("calibrate", quiet=quiet, verbose=verbose) as sink:
        for note in notes:
            sink(note)
        document = run(plan, checkpoint, out, device=device, force=force, on_event=sink)
    document["run"] = run_facts(out, began)
    show(document, tables.print_calibrated, as_json, quiet)


@app.command()
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SRC",
            help="A .safetensors or .gguf file, one of torch.save (.bin, .pt, .pth, .ckpt, "
            ".pth.tar), a model folder, or an artifact.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="The folder to make.  [default: SRC-converted, or SRC-dense for an artifact, "
            "beside SRC; in the working directory for a model in the Hub's cache, or where that "
            "cannot be written]",
        ),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option("--alpha", help="For an artifact, and required there: 0 is base, 1 is all."),
    ] = None,
    identity: IdentityOption = None,
    key: Annotated[
        str | None,
        typer.Option(
            "--key",
            metavar="KEY",
            help="Where a file of torch.save keeps its weights: `ema`, nested `model.ema`, `.` for "
            "all.  [default: the largest state dict, if no other is about as large]",
        ),
    ] = None,
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
    copy: CopyOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Write any checkpoint, or an artifact at one alpha, as plain safetensors.

    Reads tile by tile and needs little memory; only a .bin of before torch 1.6 is held whole, and
    of a GGUF one tensor at a time. Nothing in a file of torch.save is ever run. Prefixes of
    wrappers, as DDP's `module.`, are stripped from names. A killed run goes on where it stopped.
    """
    from ortho_cli.cli.show import tables
    from ortho_cli.cli.show.progress import ProgressSink
    from ortho_cli.convert import job as work
    from ortho_cli.convert.plan import make_plan, parse_size
    from ortho_cli.storage.sealing import read_keys

    size = parse_size(shard_size)
    source = located(source, quiet=quiet)
    keys = read_keys(identity)
    opening = work.open_source(source, alpha=alpha, keys=keys, key=key)
    with contextlib.closing(opening) as opened:
        given = [identity] if identity else []
        plan = make_plan(opened, dtype=dtype, shard_size=size, copy=copy or (), arguments=given)
        folder = opened.folder if opened.kind == "artifact" else source
        target, said = place_output(out, folder, "converted" if alpha is None else "dense")
        work.check_target(plan, opened, target, force=force)
        if dry_run:
            told = plan.to_json()
            told["notes"] += said
            show(told, tables.print_convert_plan, as_json, quiet, source=str(source))
            return
        began = time.perf_counter()
        with ProgressSink("convert", quiet=quiet, verbose=verbose) as sink:
            for note in said:
                sink(_note(note))
            document = work.convert(plan, opened, target, force=force, on_event=sink)
    document["run"] = run_facts(target, began)
    show(document, tables.print_converted, as_json, quiet)


app.command()(inspect)
app.command()(bench)


def _note(message: str) -> Event:
    from ortho_cli.events import Noted

    return Noted(message=message)


def _meet(
    plan: Plan, checkpoint: Any, target_bits: float | None, out: Path, *, quiet: bool
) -> Plan:
    """Pick what a size can buy, where one is asked for."""
    if target_bits is None:
        return plan
    from ortho_cli.cli.show.progress import ProgressSink
    from ortho_cli.decompose.budget import meet
    from ortho_cli.decompose.survey import load_surveys
    from ortho_cli.storage.output import resolve_output

    known = load_surveys(resolve_output(out))
    with ProgressSink("score", quiet=quiet, verbose=False) as sink:
        return meet(plan, checkpoint, target_bits, known=known, on_event=sink)


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
        from ortho_cli.decompose.tune import open_tuner

        return {"tuner": open_tuner(plan, checkpoint, data=data, device=device, on_event=on_event)}
    if not (plan.recipe.forgets or forget or data):
        return {}
    from ortho_cli.forget.editor import open_editor

    editor = open_editor(
        plan, checkpoint, forget=forget, data=data, device=device, on_event=on_event
    )
    return {"editor": editor}


def _split_device(device: str) -> str:
    """Name what splits: the processor, unless a card is asked for by name."""
    if device in ("auto", "cpu"):
        return "cpu"
    from ortho_cli.model.load import resolve_device

    found = resolve_device(device)
    return "cpu" if found.type == "cpu" else str(found)


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
