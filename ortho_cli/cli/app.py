"""The command line `ortho`: puts the commands together and starts the process."""

from __future__ import annotations

import sys
from typing import Annotated, NoReturn

import typer

from ortho_cli.cli import bench, boundary, calibrate, convert, decompose, inspect
from ortho_cli.cli.help import Command, Root
from ortho_cli.cli.log import logged
from ortho_cli.version import __version__

# rich help would cost as much again as everything else that `--help` imports.
app = typer.Typer(
    name="ortho",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    cls=Root,
    epilog="""
        ortho inspect SmolLM2                   what would be split, and why
        ortho decompose SmolLM2                 writes SmolLM2-ortho
        ortho bench SmolLM2-ortho --data heldout.txt --model SmolLM2
    """,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _room in (decompose, calibrate, convert, inspect, bench):
    _run = logged(getattr(_room, _room.__name__.rpartition(".")[2]))
    app.command(cls=Command, short_help=_room.SHORT, epilog=_room.EXAMPLES)(_run)

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
            "--version", "-V", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Split a checkpoint into two: W(alpha) = base (dense INT4) + alpha * ortho (sparse).

    Results go to stdout, progress and notes to stderr. `ortho COMMAND --help` says more.
    ORTHO_LOG=FILE keeps a log without secrets, ORTHO_LOG=debug sends it to stderr.
    """


def run(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    words = _as_options(sys.argv[1:] if arguments is None else arguments)
    return boundary.run(app, words, many=MANY)


def _as_options(words: list[str]) -> list[str]:
    """Read `help COMMAND` and `version`, which many tools have, as the options that we have."""
    if words[:1] == ["help"]:
        return [*words[1:2], "--help"]
    return ["--version"] if words == ["version"] else words


def main() -> NoReturn:
    """Start the process of the `ortho` command."""
    boundary.enter(run)
