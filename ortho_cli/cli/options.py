"""Options that several commands share; an option of one command is in that command's file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ortho_cli.storage.untrusted import trusting

out = partial(typer.Option, "--out", "-o")
folder = partial(typer.Option, metavar="DIR")
file = partial(typer.Option, metavar="FILE")
files = partial(typer.Option, metavar="FILE...")  # each name is in `MANY` of app.py, too


def print_schema(wanted: bool) -> None:
    """Print the JSON schema of recipes and end."""
    if wanted:
        from ortho_cli.decompose.settings import Recipe

        typer.echo(json.dumps(Recipe.model_json_schema(), indent=2))
        raise typer.Exit


def trust(context: typer.Context, wanted: bool) -> bool:
    """Allow the Python code of a model's folder while the command runs."""
    context.with_resource(trusting(wanted))
    return wanted


def complete_recipe(incomplete: str) -> Iterator[str]:
    """Complete the names of recipes that come with ortho, without importing pydantic."""
    folder = Path(__file__).parent.parent / "recipes"
    folder = folder if folder.is_dir() else Path(__file__).parent.parent.parent / "recipes"
    return (path.stem for path in sorted(folder.glob("*.yaml")) if path.stem.startswith(incomplete))


Recipe = Annotated[
    str | None,
    typer.Option(
        metavar="FILE-or-NAME",
        help="YAML recipe, or one that comes with ortho.",
        autocompletion=complete_recipe,
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY.PATH=VALUE", help="Change one setting of the recipe; repeatable."
    ),
]
Schema = Annotated[
    bool,
    typer.Option(
        "--recipe-schema",
        help="Print the JSON schema of recipes.",
        callback=print_schema,
        is_eager=True,
    ),
]
Identity = Annotated[
    Path | None, file(help="age identities, or a passphrase, that open a sealed ortho, in memory.")
]
Stats = Annotated[Path | None, file(help="Curvature statistics, as `ortho calibrate` writes them.")]
Copy = Annotated[
    list[str] | None,
    typer.Option(
        metavar="GLOB",
        help="Copy these files of the source's folder, too, by their paths inside it; repeatable. "
        "Weights, secrets and files given as arguments never are.",
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        min=1, max=256, help="Threads; the output does not depend on it.  [default: cores, <= 8]"
    ),
]
ModelDevice = Annotated[str, typer.Option(help="Of the model: auto, cpu, cuda or cuda:N.")]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        callback=trust,
        help="Dangerous: run the Python code that a model's folder brings.",
        rich_help_panel="Dangerous",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")]
Html = Annotated[
    Path | None, file(help="Also write a page with plots there: one file, without scripts.")
]
ForcePage = Annotated[bool, typer.Option("--force", help="Replace a page at FILE of --html.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Verbose = Annotated[
    int,
    typer.Option(
        "--verbose",
        "-v",
        count=True,
        show_default=False,
        help="Name every tensor as it is finished, and log decisions; -vv logs more.",
    ),
]
