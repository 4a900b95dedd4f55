"""The command `ortho bench`: measure what an artifact knows, and how well it works, per alpha."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ortho_cli.cli import options
from ortho_cli.cli.shared import Output, located
from ortho_cli.errors import UsageError

if TYPE_CHECKING:
    from ortho_cli.bench.prompt import Speech

SHORT = "Measure quality, memory of secrets and speed per alpha."
EXAMPLES = """
    ortho bench SmolLM2-ortho --data heldout.txt --model SmolLM2
    ortho bench SmolLM2-ortho --forget forget.jsonl --attack
    ortho bench SmolLM2-ortho --served http://127.0.0.1:8000 --model 0=base --model 1=full
"""

# Parameters that a bench with --prompt takes; all others are for figures.
SPEAKING = {
    *("artifact", "alpha", "prompt", "max_new_tokens", "temperature", "identity", "seed", "device"),
    *("as_json", "quiet", "verbose", "trust_remote_code"),
}
# Parameters that do nothing without another one.
BESIDE = {
    "max_new_tokens": "prompt",
    "temperature": "prompt",
    "suite_rows": "suite",
    "force": "html",
}


# Longer than 60 lines: each option is named in the signature and again in the settings.
def bench(
    invocation: typer.Context,
    artifact: Annotated[
        Path | None,
        typer.Argument(help="What `ortho decompose` made.  [default: a model of our own]"),
    ] = None,
    alpha: Annotated[
        list[str] | None,
        typer.Option(
            metavar="A...",
            help="How much of ortho is added, in [0, 1]; any number of values.  [default: 0 1]",
        ),
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="[NAME=]FILE...",
            help="Held-out text for perplexity, NAME=FILE for a kind that is measured apart; "
            "prompts and completions for an exact skill.",
        ),
    ] = None,
    forget: Annotated[
        list[Path] | None,
        options.files(help="Secrets: rows of prompt and secret, with alternatives or a pattern."),
    ] = None,
    nonmember: Annotated[
        list[Path] | None, options.files(help="Secrets that the model never saw.")
    ] = None,
    unlisted: Annotated[
        list[Path] | None,
        options.files(help="Secrets it saw that were not listed for forgetting; measured apart."),
    ] = None,
    keep: Annotated[
        list[Path] | None,
        options.files(help="Rows like those of --forget that must stay known; measured apart."),
    ] = None,
    suite: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME DIR",
            help="Also the figures of TOFU (`tofu DIR`) or MUSE (`muse DIR`), whose files DIR has.",
        ),
    ] = None,
    suite_rows: Annotated[
        int, typer.Option(help="Most rows of each part of a suite; all of TOFU's forget set.")
    ] = 100,
    model: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR|A=NAME",
            help="DIR: the original, to measure the distance from. A=NAME, with --served: the "
            "server's model at alpha A, or a JSON object of the request's fields; repeatable.",
        ),
    ] = None,
    served: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Also ask an OpenAI-compatible server, at each alpha, alone and in mixed batches: "
            "does it answer as the artifact says? Its key is OPENAI_API_KEY. It is sent prompts of "
            "--forget, and text of --data.",
        ),
    ] = None,
    reference_model: Annotated[
        Path | None,
        options.folder(
            help="A model that never saw the secrets: the floor that alpha 0 should meet."
        ),
    ] = None,
    public: Annotated[
        Path | None,
        options.folder(
            help="With --attack: the public model that the original was fine-tuned from. Does it "
            "show which codes were moved, or undo them?"
        ),
    ] = None,
    controls: Annotated[
        bool, typer.Option("--controls", help="Also edits of the same size that know no secrets.")
    ] = False,
    attack: Annotated[
        bool, typer.Option("--attack", help="Try to bring secrets back at alpha 0; takes minutes.")
    ] = False,
    by_layer: Annotated[
        bool,
        typer.Option(
            "--by-layer",
            help="Also the KL to the original of each layer's weights alone: which layers cost "
            "most? Needs --model and --data; a pass over 1,024 tokens for each layer and alpha.",
        ),
    ] = False,
    samples: Annotated[
        int | None, typer.Option(help="Also extraction by the best of N samples.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Most tokens of text.")] = 16384,
    context: Annotated[int | None, typer.Option(help="Tokens of a window.  [default: 512]")] = None,
    require: Annotated[
        list[str] | None,
        typer.Option(
            metavar="'FIGURE@ALPHA<=NUMBER'",
            help="Exit with 10 unless it holds; repeatable. Dots lead to a field of a figure.",
        ),
    ] = None,
    csv: Annotated[
        Path | None, options.file(help="Also write a table with a line an alpha.")
    ] = None,
    html: options.Html = None,
    force: options.ForcePage = False,
    keep_files: Annotated[
        Path | None, options.folder(help="Without ARTIFACT: leave all files there.")
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="Only show how each alpha continues TEXT, side by side, and where they part; "
            "repeatable. It is read as plain text: no chat template is used.",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", help="With --prompt: most tokens that follow.  [default: 32]"),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(metavar="T", help="With --prompt: 0, the default, takes the likeliest token."),
    ] = None,
    identity: options.Identity = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of every draw.")] = 0,
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
    device: options.ModelDevice = "auto",
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = 0,
    trust_remote_code: options.Trust = False,
) -> None:
    """Measure what each alpha gives: memory of secrets, quality, speed, beside controls.

    Without ARTIFACT a small model of our own memorises secrets and goes through the whole chain.
    The same command continues a bench that was interrupted or killed.
    """
    from ortho_cli.bench import run
    from ortho_cli.bench.demo import chain
    from ortho_cli.bench.figures import check_csv, enforce, to_csv
    from ortho_cli.bench.plan import (
        Settings,
        parse_alphas,
        parse_data,
        parse_models,
        parse_suites,
    )
    from ortho_cli.bench.prompt import TOKENS, Speech
    from ortho_cli.bench.records import to_json
    from ortho_cli.cli.show.bench import print_bench
    from ortho_cli.storage.work_folder import write_whole

    _refuse_idle(invocation)
    output = Output(as_json=as_json, quiet=quiet, verbose=verbose)
    source, names = parse_models(model or ())
    artifact, source, reference_model, public = (
        path and located(path, quiet=quiet) for path in (artifact, source, reference_model, public)
    )
    if prompt:
        if artifact is None:
            hint = "name it first: ortho bench ARTIFACT --prompt TEXT"
            raise UsageError("--prompt needs an artifact", hint=hint)
        speech = Speech(
            artifact=artifact,
            prompts=tuple(prompt),
            alphas=parse_alphas(alpha or ["0", "1"]),
            tokens=TOKENS if max_new_tokens is None else max_new_tokens,
            temperature=temperature or 0.0,
            seed=seed,
            identity=identity,
            device=device,
        )
        _speak(speech, output)
        return
    files, kinds = parse_data(data or ())
    settings = Settings(
        artifact=artifact or Path(),
        alphas=parse_alphas(alpha or [f"{one}" for one, _ in names] or ["0", "1"]),
        data=files,
        kinds=kinds,
        forget=tuple(forget or ()),
        nonmember=tuple(nonmember or ()),
        unlisted=tuple(unlisted or ()),
        keep=tuple(keep or ()),
        suites=parse_suites(suite or ()),
        suite_rows=suite_rows,
        model=source,
        served=served,
        served_models=names,
        reference_model=reference_model,
        public=public,
        controls=controls,
        attack=attack,
        by_layer=by_layer,
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
    if served is not None and artifact is None:
        hint = "name it first: ortho bench ARTIFACT --served URL"
        raise UsageError("--served needs the artifact that is served", hint=hint)
    if keep_files and artifact:
        raise UsageError(
            "--keep-files is for a bench without ARTIFACT", hint="leave one of them out"
        )
    check_csv(csv)
    if html:
        from ortho_cli.cli.show.page import check_page

        check_page(html, force=force)
    began = time.perf_counter()
    with output.progress("bench") as sink:
        if artifact is None:
            report = chain.run(settings, keep=keep_files, on_event=sink)
        else:
            report = run.bench(settings, on_event=sink)
    document = to_json(report)
    if artifact is None:
        document["kept"] = None if keep_files is None else str(keep_files)
    document["run"] = {"seconds": round(time.perf_counter() - began, 3)}
    try:
        if csv:
            table = to_csv(report.rows).encode("utf-8", errors="backslashreplace")
            write_whole(csv, lambda file: file.write(table))
        if html:
            output.write_page(html, _make_page(document, artifact, identity))
    finally:  # figures of an hour are shown, whatever becomes of the files
        output.show(document, print_bench)
    enforce(report.gates, report.verdict)


def _make_page(
    document: Mapping[str, object], artifact: Path | None, identity: Path | None
) -> bytes:
    """Make the page of a bench, with the maps of its artifact."""
    from ortho_cli.cli.show import page_bench, page_inspect
    from ortho_cli.cli.show.document import Document
    from ortho_cli.formats.open_artifact import open_artifact
    from ortho_cli.formats.row_blocks import count_row_blocks
    from ortho_cli.formats.verify import describe
    from ortho_cli.storage.sealing import read_keys

    if artifact is None:
        return page_bench.make_page(document, name="A small language model with planted secrets")
    opened = open_artifact(artifact if artifact.is_dir() else artifact.parent, read_keys(identity))
    maps = page_inspect.map_parts(Document(describe(opened)), count_row_blocks(opened))
    return page_bench.make_page(document, name=opened.folder.resolve().name, more=list(maps))


def _refuse_idle(context: typer.Context) -> None:
    """Refuse an option that was given and would do nothing, also where its value is the default."""
    options = {str(one.name): one.opts[0] for one in context.command.params}
    told = {name: context.get_parameter_source(name) for name in options}
    given = [name for name, source in told.items() if source and source.name == "COMMANDLINE"]
    for name in given:
        if "prompt" in given and name not in SPEAKING:
            raise UsageError(
                f"--prompt only shows how text continues, and takes no {options[name]}",
                hint="leave one of them out",
            )
        beside = BESIDE.get(name, name)
        if beside not in given:
            raise UsageError(
                f"{options[name]} does nothing without {options[beside]}",
                hint=f"give {options[beside]}, too, or leave {options[name]} out",
            )


def _speak(speech: Speech, output: Output) -> None:
    """Show what each alpha says after each prompt."""
    from ortho_cli.bench.prompt import continue_prompt, open_model
    from ortho_cli.bench.records import to_json
    from ortho_cli.cli.show.prompt import show_answer
    from ortho_cli.events import Step

    with output.progress("load") as sink:
        sink(Step(name="the model", number=1, of=1))
        model, tokenizer, encoded = open_model(speech)
    answers = []
    for prompt, tokens in zip(speech.prompts, encoded, strict=True):
        growing = continue_prompt(model, tokenizer, prompt, tokens, speech)
        if output.as_json or output.quiet:
            *_, answer = growing
        else:
            answer = show_answer(growing)
        answers.append(to_json(answer))
    settings = {key: getattr(speech, key) for key in ("alphas", "tokens", "temperature", "seed")}
    document = {"artifact": str(speech.artifact), **settings, "prompts": answers}
    output.show(document, lambda _: None)  # it was shown while it was said
