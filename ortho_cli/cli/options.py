"""Options that several commands share; an option of one command is in that command's file."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ortho_cli.errors import UsageError
from ortho_cli.storage.untrusted import trusting

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
LEAST_PLAIN = 10**6  # bytes: a smaller number without a unit is one that lost it

out = partial(typer.Option, "--out", "--output", "-o")
folder = partial(typer.Option, metavar="DIR")
file = partial(typer.Option, metavar="FILE")
files = partial(typer.Option, metavar="FILE...")  # each name is in `MANY` of app.py, too


def print_schema(wanted: bool) -> None:
    """Print the JSON schema of recipes and end."""
    if wanted:
        import json

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


def complete_setting(incomplete: str) -> Iterator[str]:
    """Complete the keys of `--set`, read from the source of the settings: pydantic takes longer."""
    module = ast.parse((Path(__file__).parent.parent / "decompose" / "settings.py").read_text())
    classes = {node.name: node for node in module.body if isinstance(node, ast.ClassDef)}

    def keys(name: str, before: str = "") -> Iterator[str]:
        for line in classes[name].body:
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                kind = ast.unparse(line.annotation)
                part = before + line.target.id
                yield from keys(kind, f"{part}.") if kind in classes else (f"{part}=",)

    return (key for key in keys("Recipe") if key.startswith(incomplete))


def completing(*values: str) -> Callable[[str], list[str]]:
    """Complete one of a few values."""
    return lambda incomplete: [value for value in values if value.startswith(incomplete)]


complete_dtype = completing("bfloat16", "float16", "float32", "bf16", "fp16", "fp32")
complete_device = completing("auto", "cpu", "cuda", "cuda:0")

Recipe = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|FILE",
        help="YAML recipe, or one that comes with ortho.",
        autocompletion=complete_recipe,
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change one setting of the recipe, such as ortho.density=0.01; repeatable.",
        autocompletion=complete_setting,
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
SealTo = Annotated[
    list[str] | None,
    typer.Option(
        metavar="RECIPIENT",
        help="Seal the output to age1..., a recipient of age; repeatable.",
    ),
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
ModelDevice = Annotated[
    str,
    typer.Option(
        metavar="DEVICE",
        help="Of the model: auto, cpu, cuda or cuda:N.",
        autocompletion=complete_device,
    ),
]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        callback=trust,
        help="Dangerous: run the Python code that a model's folder brings.",
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


def parse_size(text: str, *, option: str) -> int:
    """Read a size as transformers writes it: `5GB` is 5 * 10^9 bytes, `5GiB` is 5 * 2^30.

    Raises:
        UsageError: no size, or a small number without a unit.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = UNITS.get(found[2].upper()) if found else None
    nbytes = round(float(found[1]) * unit) if found and unit else 0
    if nbytes < 1:
        raise UsageError(
            f"{option} {text} is no size of at least one byte", hint="write 5GB, 500MB or 2GiB"
        )
    if found and not found[2] and nbytes < LEAST_PLAIN:
        raise UsageError(
            f"{option} {text} has no unit, and is {nbytes} bytes",
            hint=f"{option} {text}GB; {text}B for bytes",
        )
    return nbytes
