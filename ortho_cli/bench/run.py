"""What each alpha of an artifact gives: what it remembers, how well it works, how fast it is.

Speed and memory are those of the live model. All else is measured on a dense twin in float32,
whose weights are rewritten for each row: every alpha, INT4 with nothing forgotten, and edits of
the same size that know no secrets. Other models (the original, one that never saw the secrets) are
rows, too.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ortho_cli.bench import attacks, baselines, evaluate, figures, verdict
from ortho_cli.bench.data import Material, gather, unfit
from ortho_cli.bench.plan import Settings, check_gates, checked, not_measured
from ortho_cli.decompose.refusals import refuse_folder
from ortho_cli.decompose.settings import GROUP_SIZES
from ortho_cli.errors import UsageError
from ortho_cli.events import EventSink, Noted, Step, null_sink
from ortho_cli.formats.artifact import Artifact
from ortho_cli.formats.open_artifact import no_ortho, open_artifact
from ortho_cli.model import load as models
from ortho_cli.model import scoring
from ortho_cli.runtime.engine import at_alpha, densify, write_dense
from ortho_cli.runtime.ortho_linear import OrthoLinear
from ortho_cli.runtime.pretrained import load
from ortho_cli.storage.sealing import read_keys
from ortho_cli.version import __version__

FORMAT = "ortho-bench/1"
PROMPT = 128  # tokens of the pass that is timed


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measured state: an alpha, a control, or another model."""

    name: str
    alpha: float | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    nll: Tensor | None = None  # of each token of the windows, for paired ratios


def bench(settings: Settings, *, on_event: EventSink = null_sink) -> dict[str, Any]:
    """Measure an artifact.

    Args:
        settings: what, on what.
        on_event: told of each row that begins.
    Returns:
        The document that `ortho bench --json` prints: `rows` of figures, `verdict`, `moved`,
        `unsplit`, `not_measured`, `gates`. No secret's text or digest, unless `show_secrets`.
    Raises:
        UsageError: an alpha, gate or flag that does not fit; before any work where possible.
        ArtifactError: the artifact is damaged, or an alpha above 0 and no ortho.
        CalibrationError: data or secrets are unusable.
        NumericalError: a figure is NaN or infinite.
    Missed gates are in the document; `figures.enforce` turns them into an error.
    """
    gates = [figures.parse_gate(text) for text in settings.require]
    settings = checked(settings)
    opened = open_artifact(settings.artifact, read_keys(settings.identity))
    if opened.ortho is None and any(settings.alphas):
        raise no_ortho(opened, "alpha is not 0")
    for folder in (settings.model, settings.reference_model):
        if folder is not None:
            refuse_folder(folder)
            models.check_folder(folder)
    missing = not_measured(settings, ortho=opened.ortho is not None)
    check_gates(gates, settings, missing)
    material = gather(settings, opened)
    missing |= unfit(settings, material)
    check_gates(gates, settings, missing)
    for note in material.notes:
        on_event(Noted(message=note))
    rows, facts = _measure_all(settings, opened, material, on_event)
    document = {
        "format": FORMAT,
        "ortho": __version__,
        "artifact": _identify(opened),
        "settings": _settings(settings, material),
        "data": _sizes(material),
        **facts,
        "rows": [{"row": row.name, "alpha": row.alpha, "figures": row.figures} for row in rows],
        "not_measured": [{"figure": name, "needs": need} for name, need in missing.items()],
        "notes": list(material.notes),
    }
    document["verdict"] = verdict.judge(document)
    document["gates"] = figures.judge(gates, document)
    return document


def _measure_all(
    settings: Settings, opened: Artifact, material: Material, on_event: EventSink
) -> tuple[list[Row], dict[str, Any]]:
    """Measure the artifact, then the models beside it."""
    device = models.resolve_device(settings.device)
    model = load(opened.folder, alpha=settings.alphas[0], device=device, identity=settings.identity)
    models.check_fits(model, length=0, largest_token=_largest_token(material))
    facts: dict[str, Any] = {"unsplit": _unsplit(model)}
    vocabulary = _vocabulary(model)
    counts = _moved(model) if opened.ortho and _tells_moves(opened) else {}
    if counts:
        moved, split = sum(counts.values()), facts["unsplit"]["split_weights"]
        facts["moved"] = {"count": moved, "share": moved / split}
    edits = settings.controls and any(counts.values())
    steps = _Steps(settings, on_event, int4=bool(counts), edits=edits)
    speed = {}
    for alpha in settings.alphas:
        steps(f"speed at alpha {alpha:g}")
        with at_alpha(model, alpha):
            speed[alpha] = evaluate.latency(model, _prompt(model, material))
    model.float()
    layers = densify(model)
    original = _other(settings.model, device, vocabulary)
    # Without its cache: attacks change the weights that it would keep.
    with torch.autocast(
        device.type, torch.bfloat16, enabled=settings.autocast, cache_enabled=False
    ):
        rows = _measure_rows(settings, model, layers, counts, speed, original, material, steps)
    return rows, facts


def _measure_rows(
    settings: Settings,
    model: nn.Module,
    layers: dict[str, OrthoLinear],
    counts: Mapping[str, int],
    speed: Mapping[float, Any],
    original: nn.Module | None,
    material: Material,
    steps: _Steps,
) -> list[Row]:
    """Measure every row but its speed."""
    device, vocabulary = scoring.device_of(model), _vocabulary(model)
    rows = []
    for alpha in settings.alphas:
        steps(f"alpha {alpha:g}")
        write_dense(model, layers, alpha)
        row = measure(model, material, settings, original=original, name=f"alpha {alpha:g}")
        row.figures["latency"] = speed[alpha]
        if alpha == 0.0 and settings.attack:
            row.figures.update(_attack(model, material, settings, tuple(layers), steps))
        rows.append(replace(row, alpha=alpha))
    if counts:
        rows += _control_rows(model, layers, counts, material, settings, original, steps)
    names = tuple(layers)
    if original is not None:
        steps("original")
        rows.append(measure(original, material, settings, name="original"))
    reference = _other(settings.reference_model, device, vocabulary)
    if reference is not None:
        steps("reference")
        row = measure(reference, material, settings, original=original, name="reference")
        if settings.attack:
            row.figures.update(_attack(reference, material, settings, names, steps))
        rows.append(row)
    _add_ratios(rows, settings.seed)
    return rows


class _Steps:
    """Numbers what begins."""

    def __init__(self, settings: Settings, on_event: EventSink, *, int4: bool, edits: bool) -> None:
        attacked = 1 + (settings.reference_model is not None)
        self._of = 2 * len(settings.alphas) + int4 + 2 * edits
        self._of += (settings.model is not None) + (settings.reference_model is not None)
        self._of += 4 * attacked * settings.attack
        self._done = 0
        self._on_event = on_event

    def __call__(self, name: str) -> None:
        self._done += 1
        self._on_event(Step(name=name, number=self._done, of=self._of))


def _other(folder: Path | None, device: torch.device, vocabulary: int) -> nn.Module | None:
    """Load a model beside the artifact's, of the same tokens."""
    if folder is None:
        return None
    model = models.load_model(folder, dtype=torch.float32, device=device)
    if _vocabulary(model) != vocabulary:
        raise UsageError(
            f"`{folder}` knows {_vocabulary(model)} tokens and the artifact {vocabulary}",
            hint="only a model of the same tokenizer can be compared",
        )
    return model


def _vocabulary(model: nn.Module) -> int:
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    return int(embedding.weight.shape[0])


def _largest_token(material: Material) -> int:
    """Find the largest token of all that is read, 0 of nothing."""
    listed = (*material.secrets, *material.nonmembers, *material.unlisted)
    found = [max(*one.prompt, *one.secret, *map(max, one.alternatives)) for one in listed]
    found += [max(pair.tokens) for pair in material.pairs]
    if material.windows is not None:
        found.append(int(material.windows.max()))
    return max(found, default=0)


def _unsplit(model: nn.Module) -> dict[str, Any]:
    """Count what no split touches; what is tied counts once."""
    kept = sum(parameter.numel() for parameter in model.parameters())
    split = sum(
        layer.out_features * layer.in_features
        for layer in model.modules()
        if isinstance(layer, OrthoLinear)
    )
    return {"weights": kept, "split_weights": split, "share": kept / (kept + split)}


def _tells_moves(opened: Artifact) -> bool:
    """Tell whether base's codes are the nearest to ortho's values wherever nothing was moved."""
    try:
        recipe = json.loads(opened.base.metadata.get("recipe", ""))
        told = recipe["base"]["rounding"], recipe["ortho"]["values"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return True  # Engine writes what it was asked for: it rounds to nearest, and keeps sources
    return told == ("nearest", "source")


def _moved(model: nn.Module) -> dict[str, int]:
    """Count the codes of each layer that are not the source's own."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, OrthoLinear)}
    return {name: baselines.moved(layer) for name, layer in layers.items()}


def _prompt(model: nn.Module, material: Material) -> list[int]:
    if material.windows is not None:
        return [int(token) for token in material.windows[0, :PROMPT]]
    return [token % _vocabulary(model) for token in range(PROMPT // 2)]


def measure(
    model: nn.Module,
    material: Material,
    settings: Settings,
    *,
    name: str,
    original: nn.Module | None = None,
) -> Row:
    """Measure one state of a model; what there is no data for is left out."""
    found: dict[str, Any] = {}
    seed = settings.seed
    if material.secrets:
        found |= evaluate.memorisation(
            model, material.secrets, material.nonmembers or None, seed=seed, texts=material.texts
        )
    if material.secrets and settings.samples:
        found["sampled_extraction"] = evaluate.sampled_extraction(
            model, material.secrets, samples=settings.samples, seed=seed
        )
    if material.unlisted:
        found["unlisted"] = evaluate.memorisation(
            model,
            material.unlisted,
            material.nonmembers or None,
            seed=seed,
            texts=material.unlisted_texts,
        )
    nll = None
    if material.windows is not None:
        scores = scoring.compare_windows(model, material.windows, original)
        text = evaluate.quality_figures(scores, seed=seed)
        text.pop("original_perplexity", None)  # a row of its own
        if "perplexity_ratio" in text:
            text["perplexity_ratio_original"] = text.pop("perplexity_ratio")
        found |= text
        nll = scores.nll
    if material.pairs:
        found["skill"] = evaluate.skill(model, material.pairs)
    for memory in (found, found.get("unlisted", {})):
        memory.pop("drawn", None)  # the same for every row: `data` says it
    return Row(name=name, figures={k: v for k, v in found.items() if v is not None}, nll=nll)


def _control_rows(
    model: nn.Module,
    layers: Mapping[str, OrthoLinear],
    counts: Mapping[str, int],
    material: Material,
    settings: Settings,
    original: nn.Module | None,
    steps: Callable[[str], None],
) -> Iterator[Row]:
    """Measure INT4 with nothing forgotten, then edits of the same size."""
    steps("int4")
    _write(model, {name: baselines.int4_codes(layer) for name, layer in layers.items()}, layers)
    yield measure(model, material, settings, original=original, name="int4")
    if not (settings.controls and any(counts.values())):
        return
    for kind in baselines.KINDS:
        steps(f"{kind} edits")
        codes = {
            name: baselines.control_codes(
                baselines.int4_codes(layer),
                layer.weight_scale,
                count=counts[name],
                kind=kind,
                seed=_seed(settings.seed, name),
            )
            for name, layer in layers.items()
        }
        _write(model, codes, layers)
        yield measure(model, material, settings, name=kind)


def _seed(seed: int, name: str) -> int:
    """Give each tensor its own draws."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "big")


def _write(
    model: nn.Module, codes: Mapping[str, Tensor], layers: Mapping[str, OrthoLinear]
) -> None:
    for name, of in codes.items():
        weight = model.get_submodule(name).get_parameter("weight")
        with torch.no_grad():
            weight.copy_(baselines.dequantized(layers[name], of))


def _attack(
    model: nn.Module,
    material: Material,
    settings: Settings,
    names: Sequence[str],
    steps: Callable[[str], None],
) -> dict[str, Any]:
    """Try to bring secrets back; curves by their number of steps."""

    def curve(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {str(row["steps"]): {k: v for k, v in row.items() if k != "steps"} for row in rows}

    steps("relearning half")
    taught, others = attacks.halves(material.secrets, settings.seed)
    rate, eos = settings.learning_rate, material.tokenizer.eos_token_id
    found: dict[str, Any] = {
        "relearn": curve(attacks.relearn(model, taught, others, learning_rate=rate, eos=eos))
    }
    steps("fine-tuning on innocent text")
    if material.windows is not None:
        tuned = attacks.finetune(
            model, material.windows, material.secrets, learning_rate=rate, seed=settings.seed
        )
        found["finetune"] = curve(tuned)
    steps("other prompts")
    asked = attacks.reworded(material.secrets, material.tokenizer)
    found["reworded"] = {kind: attacks.recall(model, those) for kind, those in asked.items()}
    steps("another grid")
    widths = [model.get_submodule(name).in_features for name in names]
    found["requantized"] = {
        f"group_{size}": attacks.requantized(model, names, material.secrets, group_size=size)
        for size in GROUP_SIZES
        if all(isinstance(width, int) and width % size == 0 for width in widths)
    }
    return found


def _add_ratios(rows: Sequence[Row], seed: int) -> None:
    """Set each row's perplexity against INT4 without forgetting and against alpha 1, paired."""
    by_name = {row.name: row for row in rows}
    for name, base in (("perplexity_ratio", "int4"), ("perplexity_ratio_alpha1", "alpha 1")):
        other = by_name.get(base)
        for row in rows:
            if other is not None and other.nll is not None and row.nll is not None:
                row.figures[name] = evaluate.ratio(row.nll, other.nll, seed=seed)


def _identify(opened: Artifact) -> dict[str, Any]:
    metadata = (opened.ortho or opened.base).metadata
    return {
        "folder": str(opened.folder),
        "plan_sha256": opened.base.metadata.get("plan_sha256"),
        "source_digest": metadata.get("source_digest"),
        "base_bytes": opened.base.size,
        "ortho_bytes": opened.ortho.size if opened.ortho else None,
    }


def _settings(settings: Settings, material: Material) -> dict[str, Any]:
    return {
        "alphas": list(settings.alphas),
        "seed": settings.seed,
        "samples": settings.samples,
        "context": None if material.windows is None else material.windows.shape[1],
        "controls": settings.controls,
        "attack": settings.attack,
        "autocast": settings.autocast,
        "learning_rate": settings.learning_rate if settings.attack else None,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def _sizes(material: Material) -> dict[str, Any]:
    return {
        "tokens": 0 if material.windows is None else material.windows.numel(),
        "windows": 0 if material.windows is None else len(material.windows),
        "pairs": len(material.pairs),
        "secrets": len(material.secrets),
        "alternatives": dict(Counter(secret.drawn for secret in material.secrets)),
        "nonmembers": len(material.nonmembers),
        "unlisted": len(material.unlisted),
    }
