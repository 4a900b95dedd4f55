"""The command line: open, call one function, print; here errors become exit codes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from ortho_cli import __version__
from ortho_cli.errors import Interrupted, OrthoError, ResourceError, UsageError

if TYPE_CHECKING:
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


def _print_schema(wanted: bool) -> None:
    if wanted:
        from ortho_cli.recipe import json_schema

        typer.echo(json.dumps(json_schema(), indent=2))
        raise typer.Exit


def _complete_recipe(incomplete: str) -> Iterator[str]:
    folder = Path(__file__).parent / "recipes"
    folder = folder if folder.is_dir() else Path(__file__).parent.parent / "recipes"
    return (path.stem for path in sorted(folder.glob("*.yaml")) if path.stem.startswith(incomplete))


RecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="FILE-or-NAME",
        help="YAML recipe, or one that comes with ortho.",
        autocompletion=_complete_recipe,
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY.PATH=VALUE", help="Change one setting of the recipe; repeatable."
    ),
]
SchemaOption = Annotated[
    bool,
    typer.Option(
        "--recipe-schema",
        help="Print the JSON schema of recipes.",
        callback=_print_schema,
        is_eager=True,
    ),
]
WorkersOption = Annotated[
    int | None,
    typer.Option(
        "--workers",
        min=1,
        max=256,
        help="Threads; the output does not depend on it.  [default: cores, <= 8]",
    ),
]
DeviceOption = Annotated[
    str, typer.Option("--device", help="auto or cpu; this version computes on the CPU.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
VerboseOption = Annotated[
    bool, typer.Option("--verbose", "-v", help="Name every tensor as it is finished.")
]


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
    recipe: RecipeOption = None,
    sets: SetOption = None,
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
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    schema: SchemaOption = False,
) -> None:
    """Split every Linear of MODEL and write OUT; needs no GPU and a few tiles of memory.

    A killed or interrupted run goes on where it stopped when the same command is given again.
    """
    from ortho_cli.artifact import is_artifact
    from ortho_cli.output import check_output, check_space, files_of
    from ortho_cli.plan import check_memory

    checkpoint, plan = _plan(model, recipe, sets, workers, device)
    target = out or _default_out(model)
    check_output(target, files_of(checkpoint), force=force, is_ours=is_artifact)
    check_space(plan.bytes_on_disk, target)
    check_memory(plan)
    if dry_run:
        _show_plan(plan, model, as_json=as_json, quiet=quiet)
        return
    from ortho_cli import report
    from ortho_cli.decompose import decompose as run

    began = time.perf_counter()
    with report.ProgressSink("decompose", quiet=quiet, verbose=verbose) as sink:
        document = run(plan, checkpoint, target, force=force, on_event=sink)
    document["run"] = _run_facts(target, began)
    if as_json:
        report.print_json(document)
    elif not quiet:
        report.print_done(document)


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

    size = parse_size(shard_size)
    with contextlib.closing(work.open_source(source, alpha=alpha)) as opened:
        plan = make_plan(opened, dtype=dtype, shard_size=size)
        folder = opened.folder if opened.kind == "artifact" else source
        target = out or _default_out(folder, "converted" if alpha is None else "dense")
        work.check_target(plan, opened, target, force=force)
        if dry_run:
            if as_json:
                report.print_json(plan.to_json())
            elif not quiet:
                report.print_convert_plan(plan.to_json(), source=str(source))
            return
        began = time.perf_counter()
        with report.ProgressSink("convert", quiet=quiet, verbose=verbose) as sink:
            document = work.convert(plan, opened, target, force=force, on_event=sink)
    document["run"] = _run_facts(target, began)
    if as_json:
        report.print_json(document)
    elif not quiet:
        report.print_converted(document)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A checkpoint or an artifact.")],
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Read every byte of an artifact and check every digest."),
    ] = False,
    recipe: RecipeOption = None,
    sets: SetOption = None,
    workers: WorkersOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    schema: SchemaOption = False,
) -> None:
    """Show what would be split of a checkpoint, or what an artifact holds."""
    from ortho_cli import artifact, report
    from ortho_cli import verify as reading

    _check_device(device)
    if not artifact.is_artifact(path, damaged=True):
        if verify and path.exists():
            raise UsageError(
                f"`{path}` is no artifact, and --verify checks artifacts", hint="leave --verify out"
            )
        _, plan = _plan(path, recipe, sets, workers, "auto")
        _show_plan(plan, path, as_json=as_json, quiet=quiet)
        return
    if recipe or sets:
        raise UsageError(
            f"`{path}` is an artifact, made by the recipe that it holds",
            hint="leave --recipe and --set out",
        )
    found = artifact.open_artifact(path if path.is_dir() else path.parent)
    document = reading.describe(found)
    if verify:
        with report.ProgressSink("verify", quiet=quiet, verbose=verbose) as sink:
            document["verified"] = asdict(reading.verify(found, on_event=sink))
    if as_json:
        report.print_json(document)
    elif not quiet:
        report.print_artifact(document, folder=str(path))


def _plan(
    model: Path, recipe: str | None, sets: list[str] | None, workers: int | None, device: str
) -> tuple[Any, Plan]:
    from ortho_cli.checkpoint import open_checkpoint
    from ortho_cli.plan import make_plan
    from ortho_cli.recipe import load_recipe

    _check_device(device)
    settings = load_recipe(recipe, sets or ())
    checkpoint = open_checkpoint(model)
    return checkpoint, make_plan(checkpoint, settings, workers=workers or _cores())


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

    if as_json:
        report.print_json(plan.to_json())
    elif not quiet:
        report.print_plan(plan.to_json(), source=str(model))


def _peak_rss() -> int:
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the parent held before exec
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def run(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    try:
        code = app(args=arguments, prog_name="ortho", standalone_mode=False)
        if code == Interrupted.exit_code:  # typer turns Ctrl-C outside of the work into this
            raise Interrupted("interrupted before any work", hint="nothing was written")
        return code if isinstance(code, int) else 0
    except BaseException as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            typer.echo(str(error), err=True)
            return UsageError.exit_code
        failure = _as_ortho_error(error)
        if failure is None:
            raise
        from ortho_cli import report

        report.print_error(failure)
        return failure.exit_code


def _as_ortho_error(error: BaseException) -> OrthoError | None:
    """Give every expected failure its sentence; None is a bug of ours, and shows its traceback."""
    if isinstance(error, OrthoError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return Interrupted("interrupted before any work", hint="nothing was written")
    starved = ("can't allocate memory", "can't start new thread")  # torch's and Python's words
    if isinstance(error, MemoryError) or any(text in str(error) for text in starved):
        return ResourceError("out of memory", hint="use fewer --workers or a lower density")
    if isinstance(error, OSError):
        reason = (error.strerror or str(error)).lower()
        return ResourceError(
            f"`{error.filename}`: {reason}" if error.filename else reason,
            hint="check the file and its rights",
        )
    shown = getattr(error, "format_message", None)
    if shown is not None:
        message = str(shown()).rstrip(".")
        return UsageError(message[:1].lower() + message[1:], hint="see `ortho --help`")
    return None


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Stop in good order on the first Ctrl-C, and at once on the second: work survives both."""
    signal.signal(number, lambda *_: os._exit(Interrupted.exit_code))
    raise KeyboardInterrupt


def main() -> NoReturn:
    """Entry point of the `ortho` command."""
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `ortho inspect X | head` ends like any filter
    sys.exit(run())
