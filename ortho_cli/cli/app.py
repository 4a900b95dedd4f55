"""The command line `ortho`: puts the commands together and starts the process."""

from __future__ import annotations

import sys
from typing import Annotated, NoReturn

import typer

from ortho_cli.cli import boundary
from ortho_cli.cli.bench import bench
from ortho_cli.cli.calibrate import calibrate
from ortho_cli.cli.convert import convert
from ortho_cli.cli.decompose import decompose
from ortho_cli.cli.inspect import inspect
from ortho_cli.cli.log import logged
from ortho_cli.version import __version__

# rich help would cost as much again as everything else that `--help` imports.
app = typer.Typer(
    name="ortho",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    epilog="ORTHO_LOG=FILE logs what a command decides and how long it takes, without secrets; "
    "ORTHO_LOG=debug logs to stderr.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (decompose, calibrate, convert, inspect, bench):
    app.command()(logged(_command))

# Options that take every word up to the next option: `--data a.txt b.txt`.
MANY = {
    "calibrate": ("--data", "--forget"),
    "decompose": ("--data", "--forget"),
    "bench": ("--alpha", "--data", "--forget", "--nonmember", "--unlisted", "--keep", "--suite"),
}


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


def run(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    return boundary.run(app, sys.argv[1:] if arguments is None else arguments, many=MANY)


def main() -> NoReturn:
    """Start the process of the `ortho` command."""
    boundary.enter(run)
