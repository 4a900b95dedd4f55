"""The command `ortho bench`: measure what an artifact knows, and how well it works, per alpha."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ortho_cli.cli.options import (
    IdentityOption,
    JsonOption,
    ModelDeviceOption,
    QuietOption,
    TrustOption,
    VerboseOption,
)
from ortho_cli.cli.shared import Output, located
from ortho_cli.errors import UsageError

if TYPE_CHECKING:
    from ortho_cli.bench.plan import Settings
    from ortho_cli.bench.records import Report

ArtifactArgument = Annotated[
    Path | None,
    typer.Argument(help="What `ortho decompose` made.  [default: a model of our own]"),
]
ControlsOption = Annotated[
    bool, typer.Option("--controls", help="Also edits of the same size that know no secrets.")
]
AttackOption = Annotated[
    bool,
    typer.Option("--attack", help="Try to bring secrets back at alpha 0; takes minutes."),
]
SamplesOption = Annotated[
    int | None,
    typer.Option("--samples", help="Also extraction by the best of N samples."),
]
TokensOption = Annotated[int, typer.Option("--tokens", help="Most tokens of text.")]
ContextOption = Annotated[
    int | None, typer.Option("--context", help="Tokens of a window.  [default: 512]")
]
CsvOption = Annotated[
    Path | None,
    typer.Option("--csv", metavar="FILE", help="Also write a table with a line an alpha."),
]
KeepFilesOption = Annotated[
    Path | None,
    typer.Option("--keep-files", metavar="DIR", help="Without ARTIFACT: leave all files there."),
]
SeedOption = Annotated[int, typer.Option("--seed", help="Of every draw.")]
AutocastOption = Annotated[
    bool,
    typer.Option(
        "--autocast",
        help="Compute in bfloat16, as models are served; two to four times as fast.",
    ),
]
ShowSecretsOption = Annotated[
    bool, typer.Option("--show-secrets", help="Print secrets beside their figures.")
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
        metavar="[NAME=]FILE...",
        help="Held-out text for perplexity, NAME=FILE for a kind that is measured apart; prompts "
        "and completions for an exact skill.",
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
KeepOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--keep",
        metavar="FILE...",
        help="Rows like those of --forget that must stay known; measured apart.",
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
        help="Exit with 10 unless it holds; repeatable. Dots lead to a field of a figure.",
    ),
]


# Longer than 60 lines: each option is named in the signature and again in the settings.
def bench(
    artifact: ArtifactArgument = None,
    alpha: AlphaOption = None,
    data: DataOption = None,
    forget: ForgetOption = None,
    nonmember: NonmemberOption = None,
    unlisted: UnlistedOption = None,
    keep: KeepOption = None,
    model: ModelOption = None,
    reference_model: ReferenceOption = None,
    controls: ControlsOption = False,
    attack: AttackOption = False,
    samples: SamplesOption = None,
    tokens: TokensOption = 16384,
    context: ContextOption = None,
    require: RequireOption = None,
    csv: CsvOption = None,
    keep_files: KeepFilesOption = None,
    identity: IdentityOption = None,
    seed: SeedOption = 0,
    autocast: AutocastOption = False,
    show_secrets: ShowSecretsOption = False,
    device: ModelDeviceOption = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = 0,
    trust_remote_code: TrustOption = False,
) -> None:
    """Measure what each alpha gives: memory of secrets, quality, speed, beside controls.

    Without ARTIFACT a small model of our own memorises secrets and goes through the whole chain.
    """
    from ortho_cli.bench.figures import check_csv, enforce, to_csv
    from ortho_cli.bench.plan import Settings, parse_alphas, parse_data
    from ortho_cli.bench.records import to_json
    from ortho_cli.cli.show.bench import print_bench

    output = Output(as_json=as_json, quiet=quiet, verbose=verbose)
    artifact, model, reference_model = (
        path and located(path, quiet=quiet) for path in (artifact, model, reference_model)
    )
    files, kinds = parse_data(data or ())
    settings = Settings(
        artifact=artifact or Path(),
        alphas=parse_alphas(alpha or ["0", "1"]),
        data=files,
        kinds=kinds,
        forget=tuple(forget or ()),
        nonmember=tuple(nonmember or ()),
        unlisted=tuple(unlisted or ()),
        keep=tuple(keep or ()),
        model=model,
        reference_model=reference_model,
        controls=controls,
        attack=attack,
        samples=samples,
        tokens=tokens,
        context=context,
        require=tuple(require or ()),
        identity=identity,
        seed=seed,
        autocast=autocast,
        device=device,
        show_secrets=show_secrets,
    )
    if keep_files and artifact:
        raise UsageError(
            "--keep-files is for a bench without ARTIFACT", hint="leave one of them out"
        )
    check_csv(csv)
    began = time.perf_counter()
    report = _measure(settings, keep_files, output, has_artifact=artifact is not None)
    document = to_json(report)
    if artifact is None:
        document["kept"] = None if keep_files is None else str(keep_files)
    document["run"] = {"seconds": round(time.perf_counter() - began, 3)}
    if csv:
        csv.write_text(to_csv(report.rows), encoding="utf-8", errors="backslashreplace")
    output.show(document, print_bench)
    enforce(report.gates, report.verdict)


def _measure(
    settings: Settings, keep: Path | None, output: Output, *, has_artifact: bool
) -> Report:
    """Bench the artifact, or without one the chain on a small model of our own."""
    from ortho_cli.bench import run
    from ortho_cli.bench.demo import chain

    with output.progress("bench") as sink:
        if has_artifact:
            return run.bench(settings, on_event=sink)
        return chain.run(settings, keep=keep, on_event=sink)
