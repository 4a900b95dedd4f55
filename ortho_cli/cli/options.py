"""The flags that commands share."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from ortho_cli.storage.untrusted import trusting


def print_schema(wanted: bool) -> None:
    """Print the JSON schema of recipes and end."""
    if wanted:
        from ortho_cli.decompose.recipe import json_schema

        typer.echo(json.dumps(json_schema(), indent=2))
        raise typer.Exit


def trust(context: typer.Context, wanted: bool) -> bool:
    """Let models bring code of their own while the command runs."""
    context.with_resource(trusting(wanted))
    return wanted


def complete_recipe(incomplete: str) -> Iterator[str]:
    """Complete the names of recipes that come with ortho, without importing pydantic."""
    folder = Path(__file__).parent.parent / "recipes"
    folder = folder if folder.is_dir() else Path(__file__).parent.parent.parent / "recipes"
    return (path.stem for path in sorted(folder.glob("*.yaml")) if path.stem.startswith(incomplete))


RecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="FILE-or-NAME",
        help="YAML recipe, or one that comes with ortho.",
        autocompletion=complete_recipe,
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
        callback=print_schema,
        is_eager=True,
    ),
]
IdentityOption = Annotated[
    Path | None,
    typer.Option(
        "--identity",
        metavar="FILE",
        help="age identities, or a passphrase, that open a sealed ortho, in memory.",
    ),
]
SealToOption = Annotated[
    list[str] | None,
    typer.Option(
        "--seal-to",
        metavar="age1...",
        help="Seal ortho to this recipient of age (ortho.safetensors.age); repeatable.",
    ),
]
SealPassphraseOption = Annotated[
    Path | None,
    typer.Option(
        "--seal-passphrase-file",
        metavar="FILE",
        help="Seal ortho to a new key, and that (ortho.key.age) to the passphrase in FILE.",
    ),
]
StatsOption = Annotated[
    Path | None,
    typer.Option(
        "--stats", metavar="FILE", help="Curvature statistics, as `ortho calibrate` writes them."
    ),
]
SecretsOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--forget",
        metavar="FILE...",
        help="What base must not know: rows of `prompt` and `secret`, or chats. Needs a recipe "
        "that forgets, --stats, and the model in memory; isolate needs three times its float32 "
        "size, unlearn five times.",
    ),
]
StaysOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--data",
        metavar="FILE...",
        help="What must stay: text that unlearn holds on to, or that rounding is tuned on.",
    ),
]
BeforeOption = Annotated[
    Path | None,
    typer.Option(
        "--reference", metavar="CHECKPOINT", help="MODEL before it saw what base must not know."
    ),
]
TargetBitsOption = Annotated[
    float | None,
    typer.Option(
        "--target-bits",
        metavar="BITS",
        help="Pick the density, and the group size where it is auto, that lose least within so "
        "many bits a split weight, both files; reads every weight first.",
    ),
]
CopyOption = Annotated[
    list[str] | None,
    typer.Option(
        "--copy",
        metavar="GLOB",
        help="Copy these files of the source's folder, too, by their paths inside it; repeatable. "
        "Weights, secrets and files given as arguments never are.",
    ),
]
GramOption = Annotated[
    str | None,
    typer.Option(
        "--gram",
        metavar="none|full",
        help="full: the input Gram matrix of each weight, too; as --set calibrate.gram=full.",
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
ModelDeviceOption = Annotated[
    str, typer.Option("--device", help="Of the model: auto, cpu, cuda or cuda:N.")
]
TrustOption = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        callback=trust,
        help="Dangerous: run the Python code that a model's folder brings.",
        rich_help_panel="Dangerous",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
VerboseOption = Annotated[
    bool, typer.Option("--verbose", "-v", help="Name every tensor as it is finished.")
]
AlphaOption = Annotated[
    list[str] | None,
    typer.Option(
        "--alpha",
        metavar="A...",
        help="How much of ortho is added, in [0, 1]; any number of values.  [default: 0 1]",
    ),
]
DataOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--data",
        metavar="FILE...",
        help="Held-out text for perplexity; prompts and completions for an exact skill.",
    ),
]
ForgetOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--forget",
        metavar="FILE...",
        help="Secrets: rows of prompt and secret, with alternatives or a pattern.",
    ),
]
NonmemberOption = Annotated[
    list[Path] | None,
    typer.Option("--nonmember", metavar="FILE...", help="Secrets that the model never saw."),
]
UnlistedOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--unlisted",
        metavar="FILE...",
        help="Secrets it saw that were not listed for forgetting; measured apart.",
    ),
]
ModelOption = Annotated[
    Path | None,
    typer.Option("--model", metavar="DIR", help="The original, to measure the distance from."),
]
ReferenceOption = Annotated[
    Path | None,
    typer.Option(
        "--reference-model",
        metavar="DIR",
        help="A model that never saw the secrets: the floor that alpha 0 should meet.",
    ),
]
RequireOption = Annotated[
    list[str] | None,
    typer.Option(
        "--require",
        metavar="'FIGURE@ALPHA<=NUMBER'",
        help="Exit with 10 unless it holds; repeatable. Dots name what lies inside a figure.",
    ),
]
