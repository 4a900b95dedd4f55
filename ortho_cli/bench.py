"""What each alpha of an artifact gives: what it remembers, how well it works, how fast it is.

Speed and memory are those of the live model. All else is measured on a dense twin in float32,
whose weights are rewritten for each row: every alpha, INT4 with nothing forgotten, and edits of
the same size that know no secrets. Other models (the original, one that never saw the secrets) are
rows, too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ortho_cli import (
    __version__,
    artifact,
    attacks,
    controls,
    estimates,
    evaluate,
    figures,
    kernels,
    models,
    scoring,
    verdict,
)
from ortho_cli.artifact import Artifact
from ortho_cli.checkpoint import read_json_object
from ortho_cli.data import Pair, Text, TokenSequence, pair_sequences, read_rows, text_windows
from ortho_cli.engine import at_alpha, densify, write_dense
from ortho_cli.errors import ArtifactError, UsageError
from ortho_cli.events import EventSink, Noted, Step, null_sink
from ortho_cli.figures import Gate
from ortho_cli.forget_set import Secret, TokenSecret, encode, overlap, read_secrets
from ortho_cli.layers import OrthoLinear
from ortho_cli.pretrained import load
from ortho_cli.recipe import GROUP_SIZES

FORMAT = "ortho-bench/1"
CONTEXT = 512
SAMPLES_UNDER_ATTACK = 20
PROMPT = 128  # tokens of the pass that is timed
MEMORY = (
    "extraction", "token_accuracy", "exposure", "forget_nll", "alternatives_nll", "nll_quantile",
    "inside_share",
)  # fmt: skip
# Every figure of an alpha's row by its first name, and the flag that it needs.
NEEDS = {
    "latency": "",
    **dict.fromkeys(MEMORY, "--forget FILE"),
    **dict.fromkeys(("loss_auc", "min_k_auc"), "--nonmember FILE"),
    "unlisted": "--unlisted FILE",
    "sampled_extraction": "--samples N",
    "perplexity": "--data FILE with running text",
    "perplexity_ratio": "ortho.safetensors, which tells INT4 without forgetting",
    "perplexity_ratio_alpha1": "--alpha 1",
    **dict.fromkeys(("perplexity_ratio_original", "kl", "agreement"), "--model DIR"),
    "skill": "--data FILE with prompts and completions",
    **dict.fromkeys(("relearn", "reworded", "requantized"), "--attack"),
    "finetune": "--attack and --data FILE with running text",
}
# Figures of the whole document, which a gate names without an alpha.
WHOLE = ("moved.count", "moved.share", "unsplit.share", "unsplit.weights")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is measured, on what."""

    artifact: Path
    alphas: tuple[float, ...] = (0.0, 1.0)
    data: tuple[Path, ...] = ()
    forget: tuple[Path, ...] = ()
    nonmember: tuple[Path, ...] = ()
    unlisted: tuple[Path, ...] = ()
    model: Path | None = None
    reference_model: Path | None = None
    controls: bool = False
    attack: bool = False
    samples: int | None = None  # 20 under attack, else none
    tokens: int = 16384
    context: int | None = None  # 512, or what the model takes if that is less
    require: tuple[str, ...] = ()
    seed: int = 0
    learning_rate: float = attacks.LEARNING_RATE
    device: str = "auto"
    show_secrets: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """Everything that is read, in tokens."""

    tokenizer: Any
    windows: Tensor | None = None
    pairs: tuple[TokenSequence, ...] = ()
    secrets: tuple[TokenSecret, ...] = ()
    nonmembers: tuple[TokenSecret, ...] = ()
    unlisted: tuple[TokenSecret, ...] = ()
    texts: tuple[str, ...] = ()
    unlisted_texts: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


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
    settings = _checked(settings)
    opened = artifact.open_artifact(settings.artifact)
    if opened.ortho is None and any(settings.alphas):
        raise ArtifactError(
            f"`{settings.artifact}` has no {artifact.ORTHO_FILE} and alpha is not 0",
            hint=kernels.NO_ORTHO,
        )
    missing = not_measured(settings, ortho=opened.ortho is not None)
    _check_gates(gates, settings, missing)
    material = gather(settings, opened)
    missing |= _unfit(settings, material)
    _check_gates(gates, settings, missing)
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


def _checked(settings: Settings) -> Settings:
    """Refuse what does not fit together; fill in what follows from the rest."""
    alphas = dict.fromkeys(float(kernels.check_alpha(alpha)) for alpha in settings.alphas)
    if not alphas:
        raise UsageError("no alpha is given", hint="--alpha 0 1")
    if settings.attack and not settings.forget:
        raise UsageError("--attack has no secrets to bring back", hint="--forget FILE")
    if settings.attack and 0.0 not in alphas:
        raise UsageError("--attack is on alpha 0, which is not measured", hint="--alpha 0")
    if settings.nonmember and not settings.forget:
        raise UsageError("--nonmember is compared with --forget", hint="--forget FILE")
    samples = settings.samples
    if samples is None:
        samples = SAMPLES_UNDER_ATTACK if settings.attack else 0
    for name, number, least in (
        ("--samples", samples, 0),
        ("--tokens", settings.tokens, 2),
        ("--context", settings.context or CONTEXT, 2),
    ):
        if number < least:
            raise UsageError(f"{name} is {number}", hint=f"{least} or more")
    return replace(settings, alphas=tuple(alphas), samples=samples)


def not_measured(settings: Settings, *, ortho: bool) -> dict[str, str]:
    """Name the figures that these settings leave out, and what each would need."""
    absent: dict[str, bool] = {
        **dict.fromkeys(MEMORY, not settings.forget),
        **dict.fromkeys(("loss_auc", "min_k_auc"), not settings.nonmember),
        "unlisted": not settings.unlisted,
        "sampled_extraction": not (settings.samples and settings.forget),
        **dict.fromkeys(("perplexity", "skill"), not settings.data),
        "perplexity_ratio": not (settings.data and ortho),
        "perplexity_ratio_alpha1": not (settings.data and 1.0 in settings.alphas),
        **dict.fromkeys(
            ("perplexity_ratio_original", "kl", "agreement"),
            not (settings.data and settings.model),
        ),
        **dict.fromkeys(("relearn", "reworded", "requantized"), not settings.attack),
        "finetune": not (settings.attack and settings.data),
    }
    return {name: NEEDS[name] for name, is_absent in absent.items() if is_absent}


def _unfit(settings: Settings, material: Material) -> dict[str, str]:
    """Name what the data turned out not to hold."""
    found: dict[str, str] = {}
    if settings.data and material.windows is None:
        texts = [name for name in NEEDS if name.startswith(("perplexity", "kl", "agree", "finet"))]
        found |= {name: NEEDS["perplexity"] for name in texts}
    if settings.data and not material.pairs:
        found["skill"] = NEEDS["skill"]
    return found


def _check_gates(gates: Sequence[Gate], settings: Settings, missing: Mapping[str, str]) -> None:
    """Refuse gates on what will not be measured."""
    for gate in gates:
        root = gate.name.split(".")[0]
        if gate.alpha is None:
            if gate.name not in WHOLE:
                known = root in NEEDS
                raise UsageError(
                    f"`{gate.text}` names no alpha",
                    hint=f"write {gate.name}@0" if known else f"without one: {', '.join(WHOLE)}",
                )
            continue
        if root not in NEEDS:
            raise figures.unknown(gate.name, NEEDS)
        if gate.alpha not in settings.alphas:
            raise figures.not_measured(gate.alpha, settings.alphas)
        if root in missing:
            raise UsageError(f"`{gate.name}` is not measured", hint=f"it needs {missing[root]}")
        if NEEDS[root].startswith("--attack") and gate.alpha != 0.0:
            raise UsageError(f"`{gate.name}` is measured at alpha 0 only", hint=f"{gate.name}@0")


def gather(settings: Settings, opened: Artifact) -> Material:
    """Read and tokenize everything, with the artifact's own tokenizer.

    Raises:
        CalibrationError: a file is unreadable, empty or too short.
        UsageError: the context is longer than the model's positions.
        CheckpointError: the folder has no tokenizer, and something is to be read.
    """
    texts = (settings.data, settings.forget, settings.nonmember, settings.unlisted)
    if not any(texts):
        return Material(tokenizer=None)
    tokenizer = models.load_tokenizer(opened.folder)
    rows = read_rows(settings.data)[0] if settings.data else []
    running = [row for row in rows if isinstance(row, Text)]
    pairs = [row for row in rows if isinstance(row, Pair)]
    windows = None
    if running:
        context = _context(settings, opened.folder)
        limit = max(1, settings.tokens // context)
        windows = torch.tensor(text_windows(running, tokenizer, length=context, limit=limit))
    listed, others, unlisted = (
        read_secrets(files, seed=settings.seed) if files else [] for files in texts[1:]
    )
    shown = settings.show_secrets
    return Material(
        tokenizer=tokenizer,
        windows=windows,
        pairs=tuple(pair_sequences(pairs, tokenizer)) if pairs else (),
        secrets=tuple(encode(listed, tokenizer)),
        nonmembers=tuple(encode(others, tokenizer)),
        unlisted=tuple(encode(unlisted, tokenizer)),
        texts=tuple(one.prompt + one.secret for one in listed) if shown else (),
        unlisted_texts=tuple(one.prompt + one.secret for one in unlisted) if shown else (),
        notes=tuple(_notes(listed, running)),
    )


def _notes(listed: Sequence[Secret], running: Sequence[Text]) -> Iterator[str]:
    said = overlap(listed, "\n".join(row.text for row in running)) if listed else 0
    if said:
        yield f"{said} of {len(listed)} secrets occur in the held-out text: it rewards keeping them"
    coarse = sum(one.drawn == "others" for one in listed)
    if coarse:
        few = min(len(one.alternatives) for one in listed)
        yield (
            f"{coarse} of {len(listed)} secrets have only other secrets for alternatives ({few}): "
            "exposure is coarse; give a `pattern`"
        )


def _context(settings: Settings, folder: Path) -> int:
    positions = read_json_object(folder / artifact.CONFIG_FILE).get("max_position_embeddings")
    most = positions if isinstance(positions, int) else CONTEXT
    if settings.context is None:
        return min(CONTEXT, most)
    if settings.context > most and isinstance(positions, int):
        raise UsageError(
            f"--context is {settings.context} and the model has {positions} positions",
            hint=f"--context {positions}",
        )
    return settings.context


def _measure_all(
    settings: Settings, opened: Artifact, material: Material, on_event: EventSink
) -> tuple[list[Row], dict[str, Any]]:
    """Measure the artifact, then the models beside it."""
    device = models.resolve_device(settings.device)
    steps = _Steps(settings, on_event)
    model = load(opened.folder, alpha=settings.alphas[0], device=device)
    facts: dict[str, Any] = {"unsplit": _unsplit(model)}
    speed = {}
    for alpha in settings.alphas:
        steps(f"speed at alpha {alpha:g}")
        with at_alpha(model, alpha):
            speed[alpha] = evaluate.latency(model, _prompt(model, material))
    model.float()
    layers = densify(model)
    counts = {name: controls.moved(layer) for name, layer in layers.items()} if opened.ortho else {}
    if counts:
        split = sum(layer.out_features * layer.in_features for layer in layers.values())
        moved = sum(counts.values())
        facts["moved"] = {"count": moved, "share": moved / split, "split_weights": split}
    original = _other(settings.model, device)
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
    del model, layers
    if original is not None:
        steps("original")
        rows.append(measure(original, material, settings, name="original"))
    reference = _other(settings.reference_model, device)
    if reference is not None:
        steps("reference")
        row = measure(reference, material, settings, original=original, name="reference")
        if settings.attack:
            names = tuple(artifact.module_of(t) for t in _linears(reference, opened))
            row.figures.update(_attack(reference, material, settings, names, steps))
        rows.append(row)
    _add_ratios(rows, settings.seed)
    return rows, facts


class _Steps:
    """Numbers what begins."""

    def __init__(self, settings: Settings, on_event: EventSink) -> None:
        attacked = 1 + (settings.reference_model is not None)
        self._of = 2 * len(settings.alphas) + 1 + 2 * settings.controls
        self._of += (settings.model is not None) + (settings.reference_model is not None)
        self._of += 4 * attacked * settings.attack
        self._done = 0
        self._on_event = on_event

    def __call__(self, name: str) -> None:
        self._done += 1
        self._on_event(Step(name=name, number=self._done, of=max(self._of, self._done)))


def _other(folder: Path | None, device: torch.device) -> nn.Module | None:
    if folder is None:
        return None
    return models.load_model(folder, dtype=torch.float32, device=device)


def _linears(model: nn.Module, opened: Artifact) -> list[str]:
    return [f"{name}.weight" for name in opened.split if name in dict(model.named_modules())]


def _unsplit(model: nn.Module) -> dict[str, Any]:
    """Count what no split touches; what is tied counts once."""
    kept = sum(parameter.numel() for parameter in model.parameters())
    split = sum(
        layer.out_features * layer.in_features
        for layer in model.modules()
        if isinstance(layer, OrthoLinear)
    )
    return {"weights": kept, "share": kept / (kept + split)}


def _prompt(model: nn.Module, material: Material) -> list[int]:
    if material.windows is not None:
        return [int(token) for token in material.windows[0, :PROMPT]]
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    return [token % int(embedding.weight.shape[0]) for token in range(PROMPT // 2)]


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
    _write(model, {name: controls.int4_codes(layer) for name, layer in layers.items()}, layers)
    yield measure(model, material, settings, original=original, name="int4")
    if not (settings.controls and any(counts.values())):
        return
    for kind in controls.KINDS:
        steps(f"{kind} edits")
        codes = {
            name: controls.control_codes(
                controls.int4_codes(layer),
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
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        with torch.no_grad():
            weight.copy_(controls.dequantized(layers[name], of))


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
        "learning_rate": settings.learning_rate if settings.attack else None,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def _sizes(material: Material) -> dict[str, int]:
    return {
        "tokens": 0 if material.windows is None else material.windows.numel(),
        "windows": 0 if material.windows is None else len(material.windows),
        "pairs": len(material.pairs),
        "secrets": len(material.secrets),
        "nonmembers": len(material.nonmembers),
        "unlisted": len(material.unlisted),
    }
