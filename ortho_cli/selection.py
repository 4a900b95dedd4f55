"""Selection: which tensors are split and how, and of the others why not. Headers only."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ortho_cli import artifact
from ortho_cli.artifact import module_of
from ortho_cli.checkpoint import Checkpoint, TensorInfo
from ortho_cli.errors import CheckpointError, OrthoError, RecipeError
from ortho_cli.settings import Override, Patterns, Recipe, Scale, matches

MIN_IN_FEATURES = 64
IGNORED = "ignored by the recipe"

# Modules that are no Linear of the decoder body, by the field's usual names for them.
_EMBEDDING = re.compile(r"embed|^wte$|^wpe$|^shared$|relative_attention_bias")
_HEAD = re.compile(r"^(lm_head|output|head|score|classifier|qa_outputs)$")
_NORM = re.compile(r"norm|^ln(_|\d|$)")
_ROUTER = re.compile(r"^(gate|router|shared_expert_gate)$")

# Model types whose projections are transformers' Conv1D, stored (in, out).
CONV1D_MODEL_TYPES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
_CONV1D = re.compile(r"(^|\.)(c_attn|q_attn|c_proj|c_fc)$")

# vLLM runs each of these as one matrix, so they share one scheme.
FUSED_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))


def select(
    checkpoint: Checkpoint, recipe: Recipe, *, conv1d: bool = False
) -> dict[str, str | None]:
    """Give every tensor the reason why it is not split; None means that it is.

    Args:
        checkpoint: the source's index.
        recipe: validated settings.
        conv1d: count Conv1D as Linears, for work that does not write base.
    Raises:
        RecipeError: a target matches nothing that can be split, or siblings would differ.
        CheckpointError: weights that should be split cannot be, or nothing is left to split.
    """
    stored_in_out = frozenset() if conv1d else conv1d_names(checkpoint)
    reasons: dict[str, str | None] = {}
    unsupported: list[tuple[TensorInfo, str]] = []
    hit: set[str] = set()
    targets, ignore = Patterns(recipe.targets or ()), Patterns(recipe.ignore)
    for tensor in checkpoint.tensors:
        wanted = targets.matching(tensor.name)
        ignored = bool(ignore.numbers(tensor.name))
        unfit = None if ignored else _unsupported(tensor, stored_in_out)
        if ignored:
            reason: str | None = IGNORED
        else:
            reason = unfit or _obstacle(tensor, checkpoint.config)
        if reason is None and recipe.targets is None:
            reason = _not_by_default(tensor)
        elif reason is None and not wanted:
            reason = "no target matches"
        if reason is None:
            hit.update(wanted)
        # Stacked experts are most of a model: never passed over in silence, whatever the targets.
        if unfit is not None and (recipe.targets is None or wanted or len(tensor.shape) == 3):
            unsupported.append((tensor, unfit))
        reasons[tensor.name] = reason
    if unsupported and recipe.on_unsupported == "error":
        raise _unsupported_error(checkpoint, unsupported)
    _check_targets(checkpoint, recipe, hit, reasons)
    if None not in reasons.values():
        raise CheckpointError(
            f"`{checkpoint.path}` has nothing to split: {_count(reasons)}",
            hint="only 2-D floating weights of Linear layers can be split",
        )
    _check_siblings(reasons)
    return reasons


def _check_targets(
    checkpoint: Checkpoint, recipe: Recipe, hit: set[str], reasons: dict[str, str | None]
) -> None:
    for pattern in recipe.targets or ():
        if pattern in hit:
            continue
        matched = [t.name for t in checkpoint.tensors if matches(pattern, t.name)]
        if matched:
            raise RecipeError(
                f"target `{pattern}` matches `{matched[0]}`, which cannot be split "
                f"({reasons[matched[0]]})",
                hint="leave it out; `ortho inspect` lists what can be split",
            )
        else:
            raise RecipeError(
                f"target `{pattern}` matches no tensor of `{checkpoint.path}`",
                hint=_near_names(pattern, checkpoint),
            )


def _near_names(pattern: str, checkpoint: Checkpoint) -> str:
    names = [tensor.name for tensor in checkpoint.tensors]
    near = difflib.get_close_matches(pattern.removeprefix("re:"), names, n=1, cutoff=0.3)
    return f"its tensors are named like `{(near or names)[0]}`; `ortho inspect` lists them"


def conv1d_names(checkpoint: Checkpoint) -> frozenset[str]:
    """Name the weights stored (in, out): by model type, or betrayed by a bias that long."""
    tensors = {tensor.name: tensor for tensor in checkpoint.tensors}
    typed = str((checkpoint.config or {}).get("model_type")) in CONV1D_MODEL_TYPES
    found, betrayed = set(), False
    for name, tensor in tensors.items():
        if len(tensor.shape) != 2 or not _CONV1D.search(module_of(name)):
            continue
        found.add(name)
        bias = tensors.get(f"{module_of(name)}.bias")
        if (
            bias is not None
            and tensor.shape[0] != tensor.shape[1]
            and bias.shape == tensor.shape[1:]
        ):
            betrayed = True
    return frozenset(found) if typed or betrayed else frozenset()


def _unsupported(tensor: TensorInfo, conv1d: frozenset[str]) -> str | None:
    """Say why a weight that a user would expect to be split cannot be."""
    module = module_of(tensor.name)
    if len(tensor.shape) == 3 and min(tensor.shape[1:]) >= MIN_IN_FEATURES and "conv" not in module:
        return "3-D, fused experts"
    if tensor.name in conv1d:
        return "Conv1D, stored (in, out)"
    exotic = tensor.dtype in ("F64", "C64") or tensor.dtype.startswith(("F8", "F6", "F4"))
    linear = (
        len(tensor.shape) == 2
        and tensor.name.endswith(".weight")
        and _not_by_default(tensor) is None
    )
    if exotic and linear and not _EMBEDDING.search(module.rsplit(".", 1)[-1]):
        return f"dtype {tensor.dtype}"
    return None


def _unsupported_error(
    checkpoint: Checkpoint, unsupported: list[tuple[TensorInfo, str]]
) -> OrthoError:
    total = sum(tensor.numel for tensor in checkpoint.tensors)
    share = sum(tensor.numel for tensor, _ in unsupported) / total
    first, reason = unsupported[0]
    others = f" and {len(unsupported) - 1} more" if len(unsupported) > 1 else ""
    readers = " (transformers loads no INT4 Conv1D)" if reason.startswith("Conv1D") else ""
    return CheckpointError(
        f"tensor `{first.name}` {list(first.shape)}{others} cannot be split: {reason}{readers}; "
        f"that is {share:.1%} of all weights",
        hint="carry such tensors over unchanged with --set on_unsupported=keep",
    )


def _obstacle(tensor: TensorInfo, config: dict[str, Any] | None) -> str | None:
    """Say why a tensor can never be split, whatever the recipe."""
    if len(tensor.shape) != 2:
        return f"{len(tensor.shape)}-D"
    if tensor.dtype not in artifact.SCALE_DTYPES:
        return f"dtype {tensor.dtype}"
    if not re.search(r"[^.]\.weight$", tensor.name):
        return "not named <module>.weight"
    leaf = module_of(tensor.name).rsplit(".", 1)[-1]
    if _EMBEDDING.search(leaf):
        return "embedding"
    if _HEAD.search(leaf) and is_tied(config):
        return "tied to the embedding"
    return None


def is_tied(config: dict[str, Any] | None) -> bool:
    """Tell whether the output head is the embedding; vision-language models nest the setting."""
    nested = (config or {}).get("text_config")
    levels = (config or {}, nested if isinstance(nested, dict) else {})
    return any(level.get("tie_word_embeddings") is True for level in levels)


def _not_by_default(tensor: TensorInfo) -> str | None:
    """Say why a tensor that could be split is not, where the recipe has no `targets`."""
    return not_by_default(module_of(tensor.name), tensor.shape[1])


def not_by_default(module: str, in_features: int) -> str | None:
    """Say why a Linear of this name and width is not split unless a target asks for it."""
    leaf = module.rsplit(".", 1)[-1]
    for pattern, reason in ((_HEAD, "output head"), (_NORM, "norm"), (_ROUTER, "router")):
        if pattern.search(leaf):
            return reason
    if in_features < MIN_IN_FEATURES:
        return f"in_features {in_features} < {MIN_IN_FEATURES}"
    return None


def is_embedding(module: str) -> bool:
    """Tell an embedding by its module's name."""
    return _EMBEDDING.search(module.rsplit(".", 1)[-1]) is not None


def _count(reasons: dict[str, str | None]) -> str:
    counts = Counter(reasons.values()).most_common(4)
    return ", ".join(f"{count} x {reason}" for reason, count in counts)


def _siblings(name: str) -> Iterator[str]:
    """Name the weights that vLLM fuses with this one, itself among them."""
    parent, _, leaf = module_of(name).rpartition(".")
    for other in (o for siblings in FUSED_SIBLINGS if leaf in siblings for o in siblings):
        yield f"{parent}.{other}.weight".removeprefix(".")


def _check_siblings(reasons: dict[str, str | None]) -> None:
    for name in (name for name, reason in reasons.items() if reason is None):
        for sibling in _siblings(name):
            if reasons.get(sibling) is not None:
                raise RecipeError(
                    f"`{name}` would be split and `{sibling}` not ({reasons[sibling]}); "
                    "vLLM runs them as one matrix",
                    hint="split both or neither",
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSettings:
    """How one tensor is split."""

    bits: int
    scale: Scale
    density: float
    own_density: bool  # an override says it


_compiled: tuple[list[Override], Patterns] = ([], Patterns(()))  # of the recipe asked for last


def _overrides(recipe: Recipe, name: str) -> list[Override]:
    """Name the overrides that a tensor's name fits, in the recipe's order."""
    global _compiled
    known, patterns = _compiled
    if known is not recipe.overrides:
        patterns = Patterns([override.match for override in recipe.overrides])
        _compiled = recipe.overrides, patterns
    return [recipe.overrides[number] for number in patterns.numbers(name)]


def tensor_settings(recipe: Recipe, name: str) -> TensorSettings:
    """Lay the overrides that match over what the recipe says of all tensors; later ones win."""
    bits, scale, density = recipe.base.bits, recipe.base.scale, recipe.ortho.density
    own = False
    for override in _overrides(recipe, name):
        bits = override.base.bits or bits
        scale = override.base.scale or scale
        if override.ortho.density is not None:
            density, own = override.ortho.density, True
    return TensorSettings(bits=bits, scale=scale, density=density, own_density=own)


def check_overrides(recipe: Recipe, split: Mapping[str, TensorInfo]) -> None:
    """Refuse overrides without an effect, and widths of codes that do not fit.

    Args:
        recipe: validated settings.
        split: the tensors that are split, by name.
    Raises:
        RecipeError: an override matches nothing; siblings would have different bits; 3 bits where
            in_features does not divide by 32.
    """
    used = {id(override) for name in split for override in _overrides(recipe, name)}
    for override in recipe.overrides:
        if id(override) not in used:
            raise RecipeError(
                f"override `{override.match}` matches no tensor that is split",
                hint="`ortho inspect` lists what is split",
            )
    bits = {name: tensor_settings(recipe, name).bits for name in split}
    for name, tensor in split.items():
        if bits[name] == 3 and tensor.shape[1] % 32:
            raise RecipeError(
                f"bits is 3 for `{name}`, whose in_features {tensor.shape[1]} does not divide by "
                "32 (as many codes of 3 bits fill three words)",
                hint="give it 4 bits by an override, or add it to `ignore`",
            )
        for sibling in _siblings(name):
            if bits.get(sibling, bits[name]) != bits[name]:
                raise RecipeError(
                    f"`{name}` would have {bits[name]} bits and `{sibling}` {bits[sibling]}; "
                    "vLLM runs them as one matrix",
                    hint="let the override match all of them or none",
                )
