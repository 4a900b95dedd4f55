"""The command `ortho inspect`: show a checkpoint's plan, an artifact, or statistics."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ortho_cli.cli import options
from ortho_cli.cli.shared import Output, located, plan_of, settled
from ortho_cli.errors import UsageError

SHORT = "Show a plan of a checkpoint, an artifact, or statistics."
EXAMPLES = """
    ortho inspect SmolLM2 --recipe int4-mse
    ortho inspect SmolLM2-ortho
    ortho inspect SmolLM2-ortho --verify --expect-source SmolLM2
"""


# Longer than 60 lines: half of it is the signature, which says all of each option.
def inspect(
    path: Annotated[Path, typer.Argument(help="A checkpoint, an artifact or statistics.")],
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Read every byte of an artifact and check every digest."),
    ] = False,
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
    """Show what would be split of a checkpoint, or what an artifact or statistics file holds."""
    from ortho_cli.formats.artifact import is_artifact
    from ortho_cli.formats.statistics import is_statistics

    output = Output(as_json=as_json, quiet=quiet, verbose=verbose)
    if device not in ("auto", "cpu"):
        raise UsageError(
            f"--device {device} is not there; this version computes on the CPU",
            hint="leave --device out",
        )
    path = located(path, quiet=quiet)
    expect_source = located(expect_source, quiet=quiet) if expect_source else None
    measured = is_statistics(path)
    ours = not measured and is_artifact(path, damaged=True)
    if expect_source and not ours and path.exists():
        raise UsageError(
            f"`{path}` is no artifact, and --expect-source checks where one comes from",
            hint="leave --expect-source out",
        )
    if (measured or ours) and (recipe or sets or stats):
        raise UsageError(
            f"`{path}` is {'a statistics file' if measured else 'an artifact'}, made by the recipe "
            "that it holds",
            hint="leave --stats, --recipe and --set out",
        )
    if measured:
        _show_statistics(path, output, verify=verify)
    elif ours:
        _show_artifact(path, identity, expect_source, output, verify=verify)
    elif verify and path.exists():
        raise UsageError(
            f"`{path}` is no artifact, and --verify checks artifacts and statistics",
            hint="leave --verify out",
        )
    else:
        from ortho_cli.decompose.plan import check_statistics

        checkpoint, plan = plan_of(path, stats, recipe, sets, workers)
        check_statistics(plan, checkpoint)
        output.show_plan(settled(plan, checkpoint, output=output), path)


def _show_artifact(
    path: Path, identity: Path | None, expect_source: Path | None, output: Output, *, verify: bool
) -> None:
    """Describe an artifact; hold it against its source and its digests where that is asked for."""
    from ortho_cli.cli.show.inspect import print_artifact
    from ortho_cli.formats import verify as reading
    from ortho_cli.formats.open_artifact import open_artifact
    from ortho_cli.storage.sealing import read_keys

    artifact = open_artifact(path if path.is_dir() else path.parent, read_keys(identity))
    document = reading.describe(artifact)
    source = None
    if expect_source:
        from ortho_cli.formats.provenance import check_source, recipe_of
        from ortho_cli.storage.checkpoint import open_checkpoint

        with output.progress("source") as sink:
            source = open_checkpoint(expect_source)
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
    output.show(document, print_artifact, folder=str(path))


def _show_statistics(path: Path, output: Output, *, verify: bool) -> None:
    from ortho_cli.cli.show.inspect import print_statistics
    from ortho_cli.formats import statistics

    opened = statistics.open_statistics(path)
    document = statistics.describe(opened)
    if verify:
        with output.progress("verify") as sink:
            document["verified"] = statistics.verify(opened, on_event=sink)
    output.show(document, print_statistics, path=str(path))
