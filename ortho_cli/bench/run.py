"""`ortho bench`: measure each alpha of an artifact, its baselines, attacks, and models beside it.

Speed and memory are those of the live model. All else is measured on a dense twin in float32,
whose weights are rewritten for each row: every alpha, INT4 with nothing forgotten, and edits of
the same size that know no secrets. Other models (the original, one that never saw the secrets) are
rows, too.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from pathlib import Path

import torch
from torch import Tensor, nn

from ortho_cli.bench import baselines, evaluate, figures, predictors, served, suite_scores, verdict
from ortho_cli.bench.attacks import ATTACKS, Attack, Target
from ortho_cli.bench.data import Material, context_of, gather, unfit
from ortho_cli.bench.figures import Gate
from ortho_cli.bench.layer_cost import by_layer, cost_by_layer, windows_of
from ortho_cli.bench.plan import (
    CODE_FIGURES,
    SERVED,
    Settings,
    check_gates,
    checked,
    not_measured,
)
from ortho_cli.bench.public import Public, count_differences, open_public, tell_positions
from ortho_cli.bench.records import (
    ArtifactFacts,
    Curve,
    DataSizes,
    Figures,
    KindFigures,
    Latency,
    Memorisation,
    Moved,
    NotMeasured,
    Report,
    Row,
    RunFacts,
    Served,
    TextFigure,
    Unsplit,
    to_json,
)
from ortho_cli.bench.resume import Kept, keep_parts
from ortho_cli.bench.suite_scores import Samples
from ortho_cli.decompose.refusals import refuse_folder
from ortho_cli.errors import UsageError
from ortho_cli.events import EventSink, Noted, Step, null_sink
from ortho_cli.formats.artifact import Artifact
from ortho_cli.formats.open_artifact import no_ortho, open_artifact
from ortho_cli.model import load as models
from ortho_cli.model import scoring
from ortho_cli.model.cost import BATCH, in_words
from ortho_cli.model.self_written import (
    FEWEST,
    common_opening,
    draw_alternatives,
    without_secrets,
    write_text,
)
from ortho_cli.runtime.engine import at_alpha, densify, write_dense
from ortho_cli.runtime.ortho_linear import OrthoLinear
from ortho_cli.runtime.pretrained import load
from ortho_cli.storage.parts import Parts
from ortho_cli.storage.sealing import read_keys
from ortho_cli.version import __version__

log = logging.getLogger(__name__)

PROMPT = 128  # tokens of the pass that is timed
WRITTEN_LENGTH = 128  # tokens of each text that the source writes: a paragraph
DRAWN = BATCH  # alternatives to a secret without any: what one pass of the source writes at once
WRITTEN_TOKENS = 4096  # of each kind: the ratio of two perplexities is then sure to about 1 %


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """The settings and data that every row is measured with.

    `kinds` are windows of text of each kind. `original` and `int4` are models beside which rows are
    measured: the source, and INT4 with nothing forgotten where something was.
    """

    settings: Settings
    material: Material
    begin: _Steps  # announces a step of the work
    parts: Parts  # keeps what is finished of the row
    texts: Parts  # keeps what the source writes
    folder: Path | None  # for what attacks train
    attacks: Sequence[Attack] = ()  # those that there is data for
    kinds: Mapping[str, Tensor] = field(default_factory=dict)
    original: nn.Module | None = None
    int4: nn.Module | None = None
    public: Mapping[str, Public] | None = None
    link: served.Link | None = None  # to a server that is asked, too
    pool: served.Pool | None = None  # of prefixes that it may be asked about
    own: dict[float, Tensor] = field(default_factory=dict)  # what we say after them, by alpha


@dataclass(frozen=True, slots=True, kw_only=True)
class _Measured:
    """A row, its NLL of each token of each kind of text, and samples of suites, to compare rows."""

    name: str
    figures: Figures
    alpha: float | None = None
    nll: Mapping[str, Tensor] = field(default_factory=dict)
    samples: Samples = field(default_factory=Samples)


def bench(settings: Settings, *, on_event: EventSink = null_sink) -> Report:
    """Measure an artifact.

    Args:
        settings: what to measure, with which files and models.
        on_event: receives each row that begins.
    Returns:
        Rows of figures, the verdict, gates, and what was not measured. No secret's text or digest,
        unless `show_secrets`. `records.to_json` makes the document of `ortho bench --json` of it.
    Raises:
        UsageError: an alpha, gate or flag that does not fit; before any work where possible.
        ArtifactError: the artifact is damaged, or an alpha above 0 and no ortho.
        CalibrationError: data or secrets are unusable.
        NumericalError: a figure is NaN or infinite.
        Interrupted: Ctrl-C; the same settings continue (see `resume`).
    A missed gate is in the report; `figures.enforce` turns it into an error.
    """
    gates = [figures.parse_gate(text) for text in settings.require]
    settings = checked(settings)
    keys = read_keys(settings.identity)
    opened = open_artifact(settings.artifact, keys)
    settings = replace(settings, artifact=opened.folder)
    if opened.ortho is None and any(settings.alphas):
        raise no_ortho(opened, "alpha is not 0")
    for folder in (settings.model, settings.reference_model, settings.public):
        if folder is not None:
            refuse_folder(folder)
            models.check_folder(folder)
    missing = not_measured(settings, ortho=opened.ortho is not None)
    check_gates(gates, settings, missing)
    material = gather(settings, opened)
    missing |= unfit(settings, material)
    if settings.attack and not codes_tell_moves(opened):
        words = "a base rounded to nearest, and the source's own values in ortho"
        missing |= dict.fromkeys(CODE_FIGURES, words)
    check_gates(gates, settings, missing)
    link = _connect(settings, material, opened, gates)
    for note in material.notes:
        on_event(Noted(message=note))
    attacks = [one for one in ATTACKS if settings.attack and one.name not in missing]
    with keep_parts(settings, opened, keys, on_event) as kept:
        found = _measure_all(settings, opened, material, attacks, link, kept, on_event)
    rows, unsplit, moved, kinds, proof = found
    if settings.attack and moved is not None and not moved.count:
        missing |= dict.fromkeys(CODE_FIGURES, "codes that forgetting moved")
    whole = to_json({"unsplit": unsplit, "moved": moved})
    return Report(
        ortho=__version__,
        artifact=_identify(opened),
        settings=_resolved(settings, material),
        data=_sizes(material, kinds),
        unsplit=unsplit,
        moved=moved,
        served=proof,
        rows=rows,
        not_measured=tuple(NotMeasured(figure=name, needs=need) for name, need in missing.items()),
        notes=material.notes,
        verdict=verdict.judge(rows, unsplit, moved, proof),
        gates=figures.judge(gates, rows, whole, missing=missing),
    )


def _measure_all(
    settings: Settings,
    opened: Artifact,
    material: Material,
    attacks: Sequence[Attack],
    link: served.Link | None,
    kept: Kept,
    on_event: EventSink,
) -> tuple[tuple[Row, ...], Unsplit, Moved | None, Mapping[str, Tensor], Served | None]:
    """Measure the artifact, then the models beside it; also give the text that was read."""
    device = models.resolve_device(settings.device)
    log.info(
        "alphas %s on %s, %d threads of torch", settings.alphas, device, torch.get_num_threads()
    )
    model = load(opened.folder, alpha=settings.alphas[0], device=device, identity=settings.identity)
    models.check_fits(model, length=0, largest_token=_largest_token(material))
    unsplit, moved = _count_unsplit(model), None
    counts = _count_moved(model) if opened.ortho and codes_tell_moves(opened) else {}
    if counts:
        total = sum(counts.values())
        moved = Moved(count=total, share=total / unsplit.split_weights)
    writes = material.tokenizer is not None and bool(opened.ortho or settings.model)
    writing = writes + _bare(material)
    begin = _Steps(settings, kept, on_event, counts, attacks=len(attacks), writes=writing)
    speed = {}
    for alpha in settings.alphas:
        begin(f"speed at alpha {alpha:g}", again=True)
        with at_alpha(model, alpha):
            speed[alpha] = evaluate.latency(model, _prompt(model, material))
    model.float()
    layers = densify(model)
    work = _Work(
        settings=settings,
        material=material,
        begin=begin,
        parts=kept.parts,
        texts=kept.texts,
        folder=kept.folder,
        attacks=attacks,
        link=link,
    )
    # Without its cache: attacks change the weights that it would hold.
    with torch.autocast(
        device.type, torch.bfloat16, enabled=settings.autocast, cache_enabled=False
    ):
        original = _load_other(settings.model, device, _vocabulary(model))
        if original is None:
            write_dense(model, layers, 1.0 if opened.ortho else 0.0)
        source = original or model
        work = replace(work, material=_with_alternatives(work, source), original=original)
        public = settings.public and open_public(settings.public, model, layers)
        work = replace(work, kinds=_texts(work, source, writes=writes), public=public or None)
        if link is not None:
            secrets = work.material.secrets
            pool = served.draw_prefixes(link, work.kinds, secrets, seed=settings.seed)
            work = replace(work, pool=pool)
        _tell_cost(work, speed[settings.alphas[0]], counts, on_event, linears=tuple(layers))
        measured = list(_measure_rows(work, model, layers, counts, speed))
    rows, proof = _ask_server(work, tuple(_with_ratios(measured, settings.seed)), on_event)
    return rows, unsplit, moved, work.kinds, proof


def _ask_server(
    work: _Work, rows: tuple[Row, ...], on_event: EventSink
) -> tuple[tuple[Row, ...], Served | None]:
    """Hold a server against the rows, where there is one, and add its figures."""
    if work.link is None or work.pool is None:
        return rows, None
    work.begin("what the server answers", again=True)
    proof, answered = served.prove(
        work.link, work.pool, work.own, seed=work.settings.seed, on_event=on_event
    )
    return served.add_figures(rows, answered), proof


def _connect(
    settings: Settings, material: Material, opened: Artifact, gates: Sequence[Gate]
) -> served.Link | None:
    """Reach the server, before any work; refuse gates on alphas that it is not asked for."""
    if settings.served is None or material.tokenizer is None:
        return None
    texts = (material.windows, *material.kinds.values(), *material.secrets)
    if not (any(text is not None for text in texts) or opened.ortho or settings.model):
        raise UsageError(
            "--served has nothing to ask the server about: base alone writes no text",
            hint="give --data FILE with running text",
        )
    link = served.connect(
        settings.served,
        settings.served_models,
        settings.alphas,
        material.tokenizer,
        timeout=settings.served_timeout,
    )
    for gate in gates:
        if gate.name.split(".")[0] in SERVED and gate.alpha not in link.fields:
            raise UsageError(
                f"`{gate.text}` is of an alpha that the server is not asked for",
                hint=f"--model {gate.alpha:g}=NAME",
            )
    return link


def _tell_cost(
    work: _Work,
    speed: Latency,
    counts: Mapping[str, int],
    on_event: EventSink,
    *,
    linears: Sequence[str],
) -> None:
    """Say how many tokens of text are read how often, and how long that takes here."""
    settings, tokens = work.settings, sum(windows.numel() for windows in work.kinds.values())
    others = [settings.model, settings.reference_model]
    rows = len(settings.alphas) + bool(counts) + sum(one is not None for one in others)
    rows += len(baselines.KINDS) * (settings.controls and any(counts.values()))
    beside = (work.original is not None) + any(counts.values())  # models that are read along
    if not tokens or speed.prefill.value <= 0:
        return
    read = tokens * rows * (1 + beside)
    message = f"{tokens:,} tokens of text are read for each of {rows} rows"
    windows = work.material.windows
    if settings.by_layer and windows is not None:
        layers, text = len(by_layer(linears)), windows_of(windows).numel()
        read += text * (layers + 1) * len(settings.alphas)
        message += f", and {text:,} for each of {layers} layers at each alpha"
    message += f": about {in_words(read / speed.prefill.value)} here"
    on_event(Noted(message=f"{message}; --tokens N reads less of files"))


SETS = ("secrets", "nonmembers", "unlisted", "keep")  # of `Material`


def _bare(material: Material) -> bool:
    """Whether a secret has no alternatives yet."""
    return not all(one.alternatives for name in SETS for one in getattr(material, name))


def _with_alternatives(work: _Work, source: nn.Module) -> Material:
    """Let the source write alternatives for secrets that have none.

    The source is the original where it is given, else alpha 1, or base without ortho.
    """
    material = work.material
    if material.tokenizer is None or not _bare(material):
        return material
    work.begin("alternatives that the source writes", again=not work.texts.kept)
    every = [one for name in SETS for one in getattr(material, name)]
    seed = work.settings.seed
    tokenizer, parts = material.tokenizer, work.texts
    written = draw_alternatives(source, tokenizer, every, count=DRAWN, seed=seed, parts=parts)
    drawn = iter(written)
    secrets, nonmembers, unlisted, keep = (
        tuple(itertools.islice(drawn, len(getattr(material, name)))) for name in SETS
    )
    return replace(material, secrets=secrets, nonmembers=nonmembers, unlisted=unlisted, keep=keep)


def _texts(work: _Work, source: nn.Module, *, writes: bool) -> dict[str, Tensor]:
    """Gather windows of each kind of text: those of files, and what the source itself writes."""
    material, settings = work.material, work.settings
    given = {} if material.windows is None else {"data": material.windows}
    found = {**given, **material.kinds}
    if material.tokenizer is None or not writes:
        return found
    work.begin("text that the source writes", again=not work.texts.kept)
    context = context_of(settings, settings.artifact)
    length = min(WRITTEN_LENGTH, context)
    count = max(1, min(WRITTEN_TOKENS, settings.tokens) // length)
    write = partial(
        write_text, source, material.tokenizer, count=count, length=length, seed=settings.seed
    )
    openings = {"self_written": (), "neighbours": common_opening(material.secrets)}
    for kind, opening in openings.items():
        if length <= len(opening) or (kind == "neighbours" and not opening):
            continue
        written = write(opening=opening, parts=work.texts.at(kind))
        text = without_secrets(written, material.secrets)
        if len(text) >= min(FEWEST, count):
            found[kind] = text
    return found


def _measure_rows(
    work: _Work,
    model: nn.Module,
    layers: Mapping[str, OrthoLinear],
    counts: Mapping[str, int],
    speed: Mapping[float, Latency],
) -> Iterator[_Measured]:
    """Measure each row but its ratios: alphas, baselines, other models."""
    settings, names = work.settings, tuple(layers)
    device, vocabulary, original = scoring.device_of(model), _vocabulary(model), work.original
    if any(counts.values()) and work.kinds:
        _write_int4(model, layers)
        work = replace(work, int4=copy.deepcopy(model))
    for alpha in settings.alphas:
        work.begin(f"alpha {alpha:g}")
        write_dense(model, layers, alpha)
        if work.pool is not None:
            work.own[alpha] = served.read_prefixes(model, work.pool)
        row = _measure(work, model, name=f"alpha {alpha:g}")
        found = replace(row.figures, latency=speed[alpha])
        windows = work.material.windows
        if settings.by_layer and original is not None and windows is not None:
            work.begin(f"each layer at alpha {alpha:g}")
            costs = cost_by_layer(model, original, names, windows, seed=settings.seed)
            found = replace(found, kl_by_layer=costs)
        if alpha == 0.0:
            found = replace(found, attacks=_attack(work, model, names, row.name))
            if settings.attack and any(counts.values()):
                found = _compare_codes(work, model, layers, found)
        yield replace(row, alpha=alpha, figures=found)
    if counts:
        yield from _measure_baselines(work, model, layers, counts)
    if original is not None:
        work.begin("original")
        yield _measure(replace(work, original=None), original, name="original")
    reference = _load_other(settings.reference_model, device, vocabulary)
    if reference is not None:
        work.begin("reference")
        row = _measure(work, reference, name="reference")
        attacks = _attack(work, reference, names, row.name)
        yield replace(row, figures=replace(row.figures, attacks=attacks))


class _Steps:
    """Numbers the steps of the work as they begin, and counts those that are finished."""

    def __init__(
        self,
        settings: Settings,
        kept: Kept,
        on_event: EventSink,
        counts: Mapping[str, int],
        *,
        attacks: int,
        writes: int,
    ) -> None:
        attacked = 1 + (settings.reference_model is not None)
        edited = settings.controls and any(counts.values())
        self._of = 2 * len(settings.alphas) + bool(counts) + len(baselines.KINDS) * edited + writes
        self._of += (settings.model is not None) + (settings.reference_model is not None)
        self._of += len(settings.alphas) * settings.by_layer + (settings.served is not None)
        self._of += attacks * attacked + (settings.attack and any(counts.values()))
        self._done = 0
        self._last = ""  # that has begun, where it is kept
        self._kept, self._on_event = kept, on_event
        again = len(settings.alphas) + (settings.served is not None)  # measured by each run
        kept.total = self._of - again - (0 if kept.texts.kept else writes)
        if kept.earlier:
            message = f"{kept.earlier} of {kept.total} parts of an interrupted run are taken up"
            on_event(Noted(message=message))

    def __call__(self, name: str, *, again: bool = False) -> None:
        """Begin a step; what it finds is not kept where each run does it `again`."""
        if self._last:
            self._kept.finish(self._last)
        self._done += 1
        self._last = "" if again else f"{self._done} {name}"
        self._on_event(Step(name=name, number=self._done, of=self._of))


def _load_other(folder: Path | None, device: torch.device, vocabulary: int) -> nn.Module | None:
    """Load a model beside the artifact's, of the same tokens."""
    if folder is None:
        return None
    model = models.load_model(folder, dtype=torch.float32, device=device)
    if _vocabulary(model) != vocabulary:
        raise UsageError(
            f"`{folder}` has a vocabulary of {_vocabulary(model)} tokens, and the artifact one of "
            f"{vocabulary}",
            hint="only a model of the same tokenizer can be compared",
        )
    return model


def _vocabulary(model: nn.Module) -> int:
    return int(models.input_embedding(model).shape[0])


def _largest_token(material: Material) -> int:
    """Find the largest token of all data, 0 of none."""
    listed = (*material.secrets, *material.nonmembers, *material.unlisted, *material.keep)
    largest = [
        max(*one.prompt, *one.secret, *map(max, (*one.alternatives, *one.paraphrases)))
        for one in listed
    ]
    largest += [max(pair.tokens) for pair in material.pairs]
    given = () if material.windows is None else (material.windows,)
    largest += [int(windows.max()) for windows in (*given, *material.kinds.values())]
    return max((*largest, material.suites.largest_token))


def _count_unsplit(model: nn.Module) -> Unsplit:
    """Count the weights that no split touches; what is tied counts once."""
    whole = sum(parameter.numel() for parameter in model.parameters())
    split = sum(
        layer.out_features * layer.in_features
        for layer in model.modules()
        if isinstance(layer, OrthoLinear)
    )
    return Unsplit(weights=whole, split_weights=split, share=whole / (whole + split))


def codes_tell_moves(opened: Artifact) -> bool:
    """Whether base's codes are the nearest to ortho's values wherever nothing was moved."""
    try:
        recipe = json.loads(opened.base.metadata.get("recipe", ""))
        chosen = recipe["base"]["rounding"], recipe["ortho"]["values"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return True  # Engine writes a recipe without them: it rounds to nearest, and keeps sources
    return chosen == ("nearest", "source")


def _count_moved(model: nn.Module) -> dict[str, int]:
    """Count the codes of each layer that are not the source's own."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, OrthoLinear)}
    return {name: baselines.count_moved(layer) for name, layer in layers.items()}


def _prompt(model: nn.Module, material: Material) -> list[int]:
    if material.windows is not None:
        return [int(token) for token in material.windows[0, :PROMPT]]
    return [token % _vocabulary(model) for token in range(PROMPT // 2)]


def _measure(work: _Work, model: nn.Module, *, name: str) -> _Measured:
    """Measure one state of a model, as far as there is data."""
    work = replace(work, parts=work.parts.at(name))
    found, nlls = _measure_memory(work, model)
    seed = work.settings.seed
    kinds = {
        kind: KindFigures(perplexity=evaluate.perplexity(nll, seed=seed))
        for kind, nll in nlls.items()
    }
    for kind, windows in work.kinds.items():
        parts = work.parts.at(f"text {kind}")
        kinds[kind], agreement, nlls[kind] = _measure_text(work, model, windows, parts)
        if kind == "data":
            found = replace(
                found,
                perplexity=kinds[kind].perplexity,
                kl=kinds[kind].kl,
                agreement=agreement,
                perplexity_ratio_original=kinds[kind].perplexity_ratio_original,
            )
    if work.material.pairs:
        found = replace(found, skill=evaluate.skill(model, work.material.pairs, work.parts))
    suites, samples = Figures(), Samples()
    if (tokenizer := work.material.tokenizer) is not None:
        suites, samples = suite_scores.measure_suites(
            model, work.material.suites, tokenizer, seed=seed, parts=work.parts
        )
    found = replace(found, kinds=kinds or None, tofu=suites.tofu, muse=suites.muse)
    return _Measured(name=name, figures=found, nll=nlls, samples=samples)


def _measure_memory(work: _Work, model: nn.Module) -> tuple[Figures, dict[str, Tensor]]:
    """Measure what is known of secrets, and NLLs of the kinds of text that come with them."""
    material, seed = work.material, work.settings.seed
    parts = work.parts
    unseen = (
        evaluate.score_secrets(model, material.nonmembers, parts.at("nonmembers"))
        if material.nonmembers
        else None
    )
    found: dict[str, Memorisation] = {}
    nlls: dict[str, Tensor] = {}
    for name, secrets, texts in (
        ("memory", material.secrets, material.texts),
        ("unlisted", material.unlisted, material.unlisted_texts),
        ("keep", material.keep, ()),
    ):
        if not secrets or material.tokenizer is None:
            continue
        scores = evaluate.score_secrets(model, secrets, parts.at(name))
        if name == "memory":
            nlls["alternatives"] = evaluate.token_nlls([one.alternative_tokens for one in scores])
        if name == "keep":
            nlls["keep"] = evaluate.token_nlls([[one.tokens] for one in scores])
        found[name] = evaluate.memorisation_of(
            scores,
            None if name == "keep" else unseen,
            seed=seed,
            texts=texts,
            rouges=evaluate.rouges(model, material.tokenizer, secrets, parts.at(name)),
        )
    figures = Figures(
        memory=found.get("memory"), unlisted=found.get("unlisted"), keep=found.get("keep")
    )
    if material.secrets and work.settings.samples:
        sampled = evaluate.sampled_extraction(
            model, material.secrets, samples=work.settings.samples, seed=seed, parts=parts
        )
        figures = replace(figures, sampled_extraction=sampled)
    return figures, nlls


def _measure_text(
    work: _Work, model: nn.Module, windows: Tensor, parts: Parts
) -> tuple[KindFigures, TextFigure | None, Tensor]:
    """Measure running text: its figures, agreement with the original, NLL of each token."""
    seed = work.settings.seed
    scores = evaluate.compare_text(model, windows, work.original, parts)
    found, agreement = KindFigures(perplexity=evaluate.perplexity(scores.nll, seed=seed)), None
    if (beside := scores.beside) is not None:
        agreement = evaluate.over_windows(beside.agree, seed=seed)
        found = replace(
            found,
            kl=evaluate.over_windows(beside.kl, seed=seed),
            perplexity_ratio_original=evaluate.ratio(scores.nll, beside.nll, seed=seed),
        )
    if work.int4 is not None:
        plain = evaluate.compare_text(model, windows, work.int4, parts.at("int4")).beside
        if plain is not None:
            found = replace(found, kl_int4=evaluate.over_windows(plain.kl, seed=seed))
    return found, agreement, scores.nll


def _measure_baselines(
    work: _Work,
    model: nn.Module,
    layers: Mapping[str, OrthoLinear],
    counts: Mapping[str, int],
) -> Iterator[_Measured]:
    """Measure INT4 with nothing forgotten, then edits of the same size."""
    work.begin("int4")
    _write_int4(model, layers)
    yield _measure(replace(work, int4=None), model, name="int4")
    if not (work.settings.controls and any(counts.values())):
        return
    for kind in baselines.KINDS:
        work.begin(f"{kind} edits")
        for name, layer in layers.items():
            codes = baselines.control_codes(
                baselines.int4_codes(layer),
                layer.weight_scale,
                count=counts[name],
                kind=kind,
                seed=_seed(work.settings.seed, name),
            )
            _write(model, name, layer, codes)
        yield _measure(replace(work, original=None, int4=None), model, name=kind)


def _seed(seed: int, name: str) -> int:
    """Give each tensor its own draws."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "big")


def _write_int4(model: nn.Module, layers: Mapping[str, OrthoLinear]) -> None:
    """Write the source's own codes, as if nothing had been forgotten."""
    for name, layer in layers.items():
        _write(model, name, layer, baselines.int4_codes(layer))


def _write(model: nn.Module, name: str, layer: OrthoLinear, codes: Tensor) -> None:
    """Write other codes on a layer's grid into the dense Linear in its place."""
    with torch.no_grad():
        weight = model.get_submodule(name).get_parameter("weight")
        weight.copy_(baselines.dequantized(layer, codes))


def _attack(work: _Work, model: nn.Module, linears: Sequence[str], row: str) -> dict[str, Curve]:
    """Run every attack that there is data for on the model of a row."""
    settings, material = work.settings, work.material
    if material.tokenizer is None:
        return {}
    target = Target(
        model=model,
        secrets=material.secrets,
        tokenizer=material.tokenizer,
        linears=linears,
        windows=material.windows,
        public=work.public,
        seed=settings.seed,
        learning_rate=settings.learning_rate,
    )
    curves: dict[str, Curve] = {}
    for attack in work.attacks:
        work.begin(attack.measures)
        parts = work.parts.at(row).at(attack.name)
        state = work.folder and work.folder / f"{row} {attack.name}.npz"
        curves[attack.name] = attack.run(replace(target, parts=parts, state=state))
    return curves


def _compare_codes(
    work: _Work, model: nn.Module, layers: Mapping[str, OrthoLinear], found: Figures
) -> Figures:
    """Add what base's codes show beside those of INT4 with nothing forgotten."""
    work.begin("distance from INT4")
    found = replace(found, distance=predictors.distance(layers))
    if work.material.windows is not None:
        line = predictors.connectivity(
            model, layers, work.material.windows, work.parts.at("connectivity")
        )
        found = replace(found, connectivity=line)
    if work.public is not None:
        each = (count_differences(layer, work.public[name]) for name, layer in layers.items())
        found = replace(found, positions=tell_positions(reduce(torch.add, each)))
    return found


def _with_ratios(rows: Sequence[_Measured], seed: int) -> Iterator[Row]:
    """Add each row's perplexity over INT4 without forgetting and over alpha 1, paired.

    Figures of suites that compare a row with the reference are added, too.
    """
    nlls = {row.name: row.nll for row in rows}
    int4, full = nlls.get("int4", {}), nlls.get("alpha 1", {})
    reference = next((row.samples for row in rows if row.name == "reference"), None)
    for row in rows:
        found = suite_scores.beside(row.figures, row.samples, reference)
        ratios = {
            kind: evaluate.ratio(nll, int4[kind], seed=seed)
            for kind, nll in row.nll.items()
            if kind in int4
        }
        if ratios:
            found = replace(
                found,
                perplexity_ratio=ratios.get("data"),
                worst_perplexity_ratio=ratios[verdict.worst_kind(ratios)],
                kinds={
                    kind: replace(one, perplexity_ratio=ratios.get(kind))
                    for kind, one in (found.kinds or {}).items()
                },
            )
        if "data" in row.nll and "data" in full:
            ratio = evaluate.ratio(row.nll["data"], full["data"], seed=seed)
            found = replace(found, perplexity_ratio_alpha1=ratio)
        yield Row(row=row.name, alpha=row.alpha, figures=found)


def _identify(opened: Artifact) -> ArtifactFacts:
    metadata = (opened.ortho or opened.base).metadata
    return ArtifactFacts(
        folder=str(opened.folder),
        plan_sha256=opened.base.metadata.get("plan_sha256"),
        source_digest=metadata.get("source_digest"),
        base_bytes=opened.base.size,
        ortho_bytes=opened.ortho.size if opened.ortho else None,
    )


def _resolved(settings: Settings, material: Material) -> RunFacts:
    return RunFacts(
        alphas=settings.alphas,
        seed=settings.seed,
        samples=settings.samples,
        context=None if material.windows is None else material.windows.shape[1],
        controls=settings.controls,
        attack=settings.attack,
        autocast=settings.autocast,
        learning_rate=settings.learning_rate if settings.attack else None,
        torch=torch.__version__,
        threads=torch.get_num_threads(),
    )


def _sizes(material: Material, kinds: Mapping[str, Tensor]) -> DataSizes:
    return DataSizes(
        tokens=0 if material.windows is None else material.windows.numel(),
        windows=0 if material.windows is None else len(material.windows),
        kinds={kind: windows.numel() for kind, windows in kinds.items() if kind != "data"},
        pairs=len(material.pairs),
        secrets=len(material.secrets),
        alternatives=Counter(secret.drawn for secret in material.secrets),
        nonmembers=len(material.nonmembers),
        unlisted=len(material.unlisted),
        keep=len(material.keep),
    )
