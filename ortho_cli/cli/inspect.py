"""The command `ortho inspect`: show a plan, an artifact or statistics, or compare two of them."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ortho_cli.cli import options
from ortho_cli.cli.shared import Output, located, plan_of, settled
from ortho_cli.errors import UsageError

if TYPE_CHECKING:
    from ortho_cli.formats.artifact import Artifact
    from ortho_cli.storage.checkpoint import Checkpoint
SHORT = "Show a plan of a checkpoint, an artifact, or statistics."
EXAMPLES = """
    ortho inspect SmolLM2 --recipe int4-mse
    ortho inspect SmolLM2-ortho SmolLM2
    ortho inspect SmolLM2-ortho --verify --expect-source SmolLM2
"""


# Longer than 60 lines: half of it is the signature, which says all of each option.
def inspect(
    path: Annotated[Path, typer.Argument(help="A checkpoint, an artifact or statistics.")],
    other: Annotated[
        Path | None,
        typer.Argument(help="Another artifact, or the source: which weights differ, by how much."),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Read every byte of an artifact and check every digest."),
    ] = False,
    top: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Show only N weights, the worst first."),
    ] = None,
    as_csv: Annotated[
        bool, typer.Option("--csv", help="Print a table as CSV: whole names, all digits.")
    ] = False,
    html: options.Html = None,
    force: options.ForcePage = False,
    identity: options.Identity = None,
    expect_source: Annotated[
        Path | None,
        typer.Option(
            help="Check that an artifact was made from this checkpoint, byte for byte; with "
            "--verify, too, that every weight it holds is that checkpoint's or its own code."
        ),
    ] = None,
    stats: options.Stats = None,
    recipe: options.Recipe = None,
    sets: options.Set = None,
    workers: options.Workers = None,
    device: Annotated[
        str, typer.Option(hidden=True, help="auto or cpu: inspect computes on the CPU.")
    ] = "auto",
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = 0,
    schema: options.Schema = False,
) -> None:
    """Show what would be split of a checkpoint, or what an artifact or statistics file holds.

    With OTHER: compare an artifact with another one, or with its source, weight by weight.
    """
    from ortho_cli.formats.artifact import is_artifact
    from ortho_cli.formats.statistics import is_statistics

    if device not in ("auto", "cpu"):
        raise UsageError(
            f"--device {device} is not there; this version computes on the CPU",
            hint="leave --device out",
        )
    output = Output(as_json=as_json, quiet=quiet, verbose=verbose, as_csv=as_csv)
    _check_forms(top, output)
    path = located(path, quiet=quiet)
    expect_source = located(expect_source, quiet=quiet) if expect_source else None
    measured = is_statistics(path)
    ours = not measured and is_artifact(path, damaged=True)
    kind = "a statistics file" if measured else "an artifact" if ours else "a checkpoint"
    if html and (not ours or other):
        raise UsageError(
            f"--html is for one artifact, and `{path}` is {kind}"
            if not ours
            else "--html is for one artifact, not for two",
            hint="leave --html out",
        )
    if other is not None:
        unused = (verify, expect_source, recipe, sets, stats)
        if any(unused):
            raise UsageError(
                "--verify, --expect-source, --stats, --recipe and --set are for one path, not two",
                hint="leave them out",
            )
        _show_comparison(path, located(other, quiet=quiet), identity, output, top)
        return
    if expect_source and not ours and path.exists():
        raise UsageError(
            f"`{path}` is no artifact, and --expect-source checks where one comes from",
            hint="leave --expect-source out",
        )
    if (measured or ours) and (recipe or sets or stats):
        raise UsageError(
            f"`{path}` is {kind}, made by the recipe that it holds",
            hint="leave --stats, --recipe and --set out",
        )
    if measured:
        _show_statistics(path, output, top, verify=verify)
    elif ours:
        from ortho_cli.cli.show.page import check_page

        check_page(html, force=force)
        _show_artifact(path, identity, expect_source, output, top, html, verify=verify)
    elif verify and path.exists():
        raise UsageError(
            f"`{path}` is no artifact, and --verify checks artifacts and statistics",
            hint="leave --verify out",
        )
    else:
        _show_plan(path, stats, recipe, sets, workers, output, top)


def _check_forms(top: int | None, output: Output) -> None:
    if output.as_csv and output.as_json:
        raise UsageError("--csv and --json both print on stdout", hint="leave one of them out")
    if top is not None and output.as_json:
        raise UsageError(
            "--top is for tables; a JSON document has every tensor",
            hint="leave --top out, or take --csv",
        )


def _show_plan(
    path: Path,
    stats: Path | None,
    recipe: str | None,
    sets: list[str] | None,
    workers: int | None,
    output: Output,
    top: int | None,
) -> None:
    """Show what would be split of a checkpoint."""
    from ortho_cli.cli.show.inspect import print_plan_csv
    from ortho_cli.decompose.plan import check_statistics
    from ortho_cli.storage.hints import said

    if top is not None and path.exists():
        raise UsageError(
            f"`{path}` is a checkpoint, and --top ranks what was measured",
            hint="`ortho decompose` first, or leave --top out",
        )
    checkpoint, plan = plan_of(path, stats, recipe, sets, workers)
    check_statistics(plan, checkpoint)
    settled_plan = settled(plan, checkpoint, output=output)
    if output.as_csv:
        print_plan_csv(settled_plan.to_json())
    else:
        asked = [f"--stats {said(stats)}"] if stats else []
        asked += [f"--recipe {shlex.quote(recipe)}"] if recipe else []
        asked += [f"--set {shlex.quote(one)}" for one in sets or ()]
        output.show_plan(settled_plan, path, then=" ".join(["ortho decompose", said(path), *asked]))


def _show_artifact(
    path: Path,
    identity: Path | None,
    expect_source: Path | None,
    output: Output,
    top: int | None,
    html: Path | None,
    *,
    verify: bool,
) -> None:
    """Describe an artifact; hold it against its source and its digests where that is asked for."""
    from ortho_cli.cli.show.inspect import print_artifact, print_artifact_csv
    from ortho_cli.formats import verify as reading
    from ortho_cli.formats.open_artifact import open_artifact
    from ortho_cli.storage.sealing import read_keys

    artifact = open_artifact(path if path.is_dir() else path.parent, read_keys(identity))
    document = reading.describe(artifact)
    source = None
    if expect_source:
        from ortho_cli.formats.provenance import check_source, open_source, recipe_of

        with output.progress("source") as sink:
            source = open_source(artifact, expect_source)
            tensors = check_source(artifact, source, on_event=sink)
        document["source_checked"] = {"source": str(expect_source), "tensors": tensors}
    if verify:
        with output.progress("verify") as sink:
            document["verified"] = asdict(reading.verify(artifact, on_event=sink))
    if verify and source is not None:
        from ortho_cli.decompose.recheck import check_values

        with output.progress("values") as sink:
            checked = check_values(artifact, source, recipe_of(artifact.base), on_event=sink)
            document["values_checked"] = checked
    if html:
        from ortho_cli.cli.show.page_inspect import make_page
        from ortho_cli.formats.row_blocks import count_row_blocks

        blocks = count_row_blocks(artifact)
        output.write_page(html, make_page(document, blocks, name=artifact.folder.resolve().name))
    if output.as_csv:
        print_artifact_csv(document, top=top)
    else:
        output.show(document, partial(print_artifact, top=top), folder=str(path))


def _show_statistics(path: Path, output: Output, top: int | None, *, verify: bool) -> None:
    from ortho_cli.cli.show.inspect import print_statistics, print_statistics_csv
    from ortho_cli.formats import statistics

    opened = statistics.open_statistics(path)
    document = statistics.describe(opened)
    if verify:
        with output.progress("verify") as sink:
            document["verified"] = statistics.verify(opened, on_event=sink)
    if output.as_csv:
        print_statistics_csv(document, top=top)
    else:
        output.show(document, partial(print_statistics, top=top), path=str(path))


def _show_comparison(
    path: Path, other: Path, identity: Path | None, output: Output, top: int | None
) -> None:
    """Compare two artifacts, or an artifact and a checkpoint."""
    from ortho_cli.cli.show.compare import print_comparison, print_comparison_csv
    from ortho_cli.formats.artifact import Artifact
    from ortho_cli.formats.compare import compare
    from ortho_cli.formats.provenance import open_source

    opened = [_open_either(one, identity) for one in (path, other)]
    artifact = next((one for one in opened if isinstance(one, Artifact)), None)
    if artifact is None:
        raise UsageError(
            f"`{path}` and `{other}` are checkpoints, and one of both has to be an artifact",
            hint=f"`ortho decompose {path}` makes one",
        )
    first, second = (
        one if isinstance(one, Artifact) else open_source(artifact, one.path) for one in opened
    )
    with output.progress("compare") as sink:
        document = compare(first, second, on_event=sink)
    if output.as_csv:
        print_comparison_csv(document, top=top)
    else:
        printer = partial(print_comparison, top=top)
        output.show(document, printer, first=str(path), second=str(other))


def _open_either(path: Path, identity: Path | None) -> Artifact | Checkpoint:
    from ortho_cli.formats.artifact import is_artifact
    from ortho_cli.formats.open_artifact import open_artifact
    from ortho_cli.formats.statistics import is_statistics
    from ortho_cli.storage.checkpoint import open_checkpoint
    from ortho_cli.storage.sealing import read_keys

    if is_statistics(path):
        raise UsageError(
            f"`{path}` is a statistics file, and artifacts and checkpoints are compared",
            hint="leave one of both out",
        )
    if is_artifact(path, damaged=True):
        return open_artifact(path if path.is_dir() else path.parent, read_keys(identity))
    return open_checkpoint(path)
