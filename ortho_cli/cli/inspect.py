"""The command `ortho inspect`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ortho_cli.cli.options import (
    DeviceOption,
    IdentityOption,
    JsonOption,
    QuietOption,
    RecipeOption,
    SchemaOption,
    SetOption,
    StatsOption,
    VerboseOption,
    WorkersOption,
)
from ortho_cli.cli.shared import located, plan_of, settled, show, show_plan
from ortho_cli.errors import UsageError
from ortho_cli.formats.open_artifact import open_artifact


def inspect(
    path: Annotated[Path, typer.Argument(help="A checkpoint, an artifact or statistics.")],
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Read every byte of an artifact and check every digest."),
    ] = False,
    identity: IdentityOption = None,
    expect_source: Annotated[
        Path | None,
        typer.Option(
            help="Check that an artifact was made from this checkpoint, byte for byte; with "
            "--verify, too, that every weight it holds is that checkpoint's or its own code."
        ),
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
    from ortho_cli.cli.show import tables
    from ortho_cli.cli.show.progress import ProgressSink
    from ortho_cli.formats import artifact
    from ortho_cli.formats import verify as reading
    from ortho_cli.formats.statistics import is_statistics
    from ortho_cli.storage.sealing import read_keys

    _check_device(device)
    path = located(path, quiet=quiet)
    expect_source = located(expect_source, quiet=quiet) if expect_source else None
    measured = is_statistics(path)
    ours = not measured and artifact.is_artifact(path, damaged=True)
    if expect_source and not ours and path.exists():
        raise UsageError(
            f"`{path}` is no artifact, and --expect-source checks where one comes from",
            hint="leave --expect-source out",
        )
    if measured:
        if recipe or sets or stats:
            raise UsageError(
                f"`{path}` is a statistics file, made by the recipe that it holds",
                hint="leave --stats, --recipe and --set out",
            )
        _show_statistics(path, verify=verify, as_json=as_json, quiet=quiet, verbose=verbose)
        return
    if not ours:
        if verify and path.exists():
            raise UsageError(
                f"`{path}` is no artifact, and --verify checks artifacts and statistics",
                hint="leave --verify out",
            )
        checkpoint, plan = plan_of(path, stats, recipe, sets, workers)
        plan = settled(plan, checkpoint, quiet=quiet, verbose=verbose)
        show_plan(plan, path, as_json=as_json, quiet=quiet)
        return
    if recipe or sets or stats:
        raise UsageError(
            f"`{path}` is an artifact, made by the recipe that it holds",
            hint="leave --stats, --recipe and --set out",
        )
    found = open_artifact(path if path.is_dir() else path.parent, read_keys(identity))
    document = reading.describe(found)
    source = None
    if expect_source:
        from ortho_cli.formats.provenance import check_source
        from ortho_cli.storage.checkpoint import open_checkpoint

        with ProgressSink("source", quiet=quiet, verbose=verbose) as sink:
            source = open_checkpoint(expect_source)
            read = check_source(document, source, on_event=sink)
        document["source_checked"] = {"source": str(expect_source), "tensors": read}
    if verify:
        with ProgressSink("verify", quiet=quiet, verbose=verbose) as sink:
            document["verified"] = asdict(reading.verify(found, on_event=sink))
    if verify and source is not None:
        from ortho_cli.decompose.recheck import check_values

        with ProgressSink("values", quiet=quiet, verbose=verbose) as sink:
            said = check_values(found, source, document["recipe"], on_event=sink)
            document["values_checked"] = said
    show(document, tables.print_artifact, as_json, quiet, folder=str(path))


def _show_statistics(
    path: Path, *, verify: bool, as_json: bool, quiet: bool, verbose: bool
) -> None:
    from ortho_cli.cli.show import tables
    from ortho_cli.cli.show.progress import ProgressSink
    from ortho_cli.formats import statistics

    found = statistics.open_statistics(path)
    document = statistics.describe(found)
    if verify:
        with ProgressSink("verify", quiet=quiet, verbose=verbose) as sink:
            document["verified"] = statistics.verify(found, on_event=sink)
    show(document, tables.print_statistics, as_json, quiet, path=str(path))


def _check_device(device: str) -> None:
    if device not in ("auto", "cpu"):
        raise UsageError(
            f"--device {device} is not there; this version computes on the CPU",
            hint="leave --device out",
        )
