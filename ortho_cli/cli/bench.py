"""The command `ortho bench`; cli.py has the others."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from ortho_cli.cli.options import (
    AlphaOption,
    DataOption,
    ForgetOption,
    IdentityOption,
    JsonOption,
    ModelDeviceOption,
    ModelOption,
    NonmemberOption,
    QuietOption,
    ReferenceOption,
    RequireOption,
    TrustOption,
    UnlistedOption,
    VerboseOption,
)
from ortho_cli.cli.shared import located
from ortho_cli.errors import UsageError


def bench(
    artifact: Annotated[
        Path | None,
        typer.Argument(help="What `ortho decompose` made.  [default: a model of our own]"),
    ] = None,
    alpha: AlphaOption = None,
    data: DataOption = None,
    forget: ForgetOption = None,
    nonmember: NonmemberOption = None,
    unlisted: UnlistedOption = None,
    model: ModelOption = None,
    reference_model: ReferenceOption = None,
    controls: Annotated[
        bool, typer.Option("--controls", help="Also edits of the same size that know no secrets.")
    ] = False,
    attack: Annotated[
        bool,
        typer.Option("--attack", help="Try to bring secrets back at alpha 0; takes minutes."),
    ] = False,
    samples: Annotated[
        int | None,
        typer.Option("--samples", help="Also extraction by the best of N samples."),
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", help="Most tokens of text.")] = 16384,
    context: Annotated[
        int | None, typer.Option("--context", help="Tokens of a window.  [default: 512]")
    ] = None,
    require: RequireOption = None,
    csv: Annotated[
        Path | None,
        typer.Option("--csv", metavar="FILE", help="Also write a table with a line an alpha."),
    ] = None,
    keep: Annotated[
        Path | None,
        typer.Option("--keep", metavar="DIR", help="Without ARTIFACT: leave all files there."),
    ] = None,
    identity: IdentityOption = None,
    seed: Annotated[int, typer.Option("--seed", help="Of every draw.")] = 0,
    autocast: Annotated[
        bool,
        typer.Option(
            "--autocast",
            help="Compute in bfloat16, as models are served; two to four times as fast.",
        ),
    ] = False,
    show_secrets: Annotated[
        bool, typer.Option("--show-secrets", help="Print secrets beside their figures.")
    ] = False,
    device: ModelDeviceOption = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Measure what each alpha gives: memory of secrets, quality, speed, beside controls.

    Without ARTIFACT a small model of our own memorises secrets and goes through the whole chain.
    """
    from ortho_cli.bench import figures
    from ortho_cli.bench import run as work
    from ortho_cli.bench.demo import chain
    from ortho_cli.bench.plan import Settings, parse_alphas
    from ortho_cli.bench.records import to_json
    from ortho_cli.cli.show import bench as report_bench
    from ortho_cli.cli.show import tables
    from ortho_cli.cli.show.progress import ProgressSink

    artifact, model, reference_model = (
        path and located(path, quiet=quiet) for path in (artifact, model, reference_model)
    )
    settings = Settings(
        artifact=artifact or Path(),
        alphas=parse_alphas(alpha or ["0", "1"]),
        data=tuple(data or ()),
        forget=tuple(forget or ()),
        nonmember=tuple(nonmember or ()),
        unlisted=tuple(unlisted or ()),
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
    if keep and artifact:
        raise UsageError("--keep is for a bench without ARTIFACT", hint="leave one of them out")
    figures.check_csv(csv)
    began = time.perf_counter()
    with ProgressSink("bench", quiet=quiet, verbose=verbose) as sink:
        report = (
            work.bench(settings, on_event=sink)
            if artifact
            else chain.run(settings, keep=keep, on_event=sink)
        )
    document = to_json(report)
    if not artifact:
        document["kept"] = None if keep is None else str(keep)
    document["run"] = {"seconds": round(time.perf_counter() - began, 3)}
    if csv:
        csv.write_text(figures.to_csv(report.rows), encoding="utf-8", errors="backslashreplace")
    if as_json:
        tables.print_json(document)
    elif not quiet:
        report_bench.print_bench(document)
    figures.enforce(report.gates, report.verdict)
