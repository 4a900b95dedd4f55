"""Selection of tensors: which are split, with which settings, and why the others are not.

It reads headers and config.json only. `roles` tells embeddings, heads, routers and norms.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ortho_cli.decompose import roles
from ortho_cli.decompose.settings import Override, Patterns, Recipe, Scale, matches
from ortho_cli.errors import CheckpointError, OrthoError, RecipeError
from ortho_cli.formats.artifact import module_of
from ortho_cli.model.renames import CONV1D_MODEL_TYPES
from ortho_cli.split.dtypes import SPLIT
from ortho_cli.storage import hints, strict_json
from ortho_cli.storage.checkpoint import Checkpoint, TensorInfo
from ortho_cli.storage.stacked import needs_stacks, unstack
from ortho_cli.storage.tied import tied_head

MIN_IN_FEATURES = 64
IGNORED = "ignored by the recipe"
FUSED_EXPERTS = "3-D, fused experts"

_EXPERTS = re.compile(r"experts?(\.|$)|(^|[._])moe\.", re.IGNORECASE)
_EXPERT = re.compile(r"(.*\bexperts)\.\d+\.")
# Kernels of convolutions, learned positions and queries, biases and scales: no stack of Linears.
_NO_STACK = re.compile(r"conv|pos(ition|_)|latent|codevector|query|(bias|scales?|blocks)$")
# Its forward reads the weight of its output projection itself, so no reader can replace that.
_MULTIHEAD = ("in_proj_weight", "q_proj_weight")

# Names of Conv1D projections in models of CONV1D_MODEL_TYPES.
_CONV1D = re.compile(r"(^|\.)(c_attn|q_attn|c_proj|c_fc)$")

# vLLM runs each of these as one matrix (its packed_modules_mapping), so they share one scheme.
FUSED_SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("to_q", "to_k", "to_v"),
    ("wq", "wk", "wv"),
    ("gate_proj", "up_proj"),
    ("gate", "up"),
    ("w1", "w3"),
    ("c_fc_0", "c_fc_1"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)
_SIBLINGS = {leaf: group for group in FUSED_SIBLINGS for leaf in group}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """Facts of the whole checkpoint that decide on one tensor."""

    names: frozenset[str]
    head: str | None  # the module of the output head, where it is tied to the embedding
    sizes: roles.Sizes
    stored_in_out: frozenset[str]


def apart(checkpoint: Checkpoint, recipe: Recipe) -> Checkpoint:
    """Give stacked experts as tensors of each, unless a recipe leaves the stack as it is.

    A stack stays where `ignore` names it, and with `on_unsupported: keep`. Where
    transformers loads the model from stacks alone, it stays but with `on_unsupported: split`.
    """
    way = recipe.on_unsupported
    if way == "keep" or (way == "error" and needs_stacks(checkpoint.config)):
        return checkpoint
    ignore = Patterns(recipe.ignore)
    return unstack(checkpoint, lambda stack: bool(ignore.numbers(stack)))


def select(
    checkpoint: Checkpoint, recipe: Recipe, *, conv1d: bool = False
) -> dict[str, str | None]:
    """Give the reason why each tensor is not split; None for those that are.

    Args:
        checkpoint: the source's index.
        recipe: validated settings.
        conv1d: take Conv1D for Linears, in work that does not write base.
    Raises:
        RecipeError: a target matches nothing that can be split, or one of fused weights is split.
        CheckpointError: weights that should be split cannot be, or there is nothing to split.
    """
    source = _Source(
        names=frozenset(tensor.name for tensor in checkpoint.tensors),
        head=tied_head(checkpoint.config),
        sizes=roles.read_sizes(checkpoint.config, checkpoint.tensors),
        stored_in_out=frozenset() if conv1d else conv1d_names(checkpoint),
    )
    reasons: dict[str, str | None] = {}
    unsupported: list[tuple[TensorInfo, str]] = []
    hit: set[str] = set()
    targets, ignore = Patterns(recipe.targets or ()), Patterns(recipe.ignore)
    for tensor in checkpoint.tensors:
        wanted = targets.matching(tensor.name)
        ignored = bool(ignore.numbers(tensor.name))
        unfit = None if ignored or not tensor.numel else _unsupported(tensor, source)
        reason = IGNORED if ignored else unfit or _obstacle(tensor, source)
        if reason is None and recipe.targets is None:
            reason = not_by_default(module_of(tensor.name), tensor.shape, source.sizes)
        elif reason is None and not wanted:
            reason = "no target matches"
        if reason is None:
            hit.update(wanted)
        # Stacked experts are most of a model, so they are never skipped in silence.
        if unfit is not None and (recipe.targets is None or wanted or "experts" in unfit):
            unsupported.append((tensor, unfit))
        reasons[tensor.name] = reason
    _refuse_swapped_experts(checkpoint, reasons)
    if unsupported and recipe.on_unsupported != "keep":
        raise _unsupported_error(checkpoint, unsupported, left=None in reasons.values())
    _check_targets(checkpoint, recipe, hit, reasons)
    if None not in reasons.values():
        counts = Counter(reasons.values()).most_common(4)
        most = ", ".join(f"{count} x {reason}" for reason, count in counts)
        raise CheckpointError(
            f"`{checkpoint.path}` has nothing to split: {most}",
            hint=hints.nothing_to_split(checkpoint.path, {t.dtype for t in checkpoint.tensors}),
        )
    _check_siblings(reasons)
    return reasons


def _check_targets(
    checkpoint: Checkpoint, recipe: Recipe, hit: set[str], reasons: dict[str, str | None]
) -> None:
    for pattern in recipe.targets or ():
        if pattern in hit:
            continue
        matched = [name for name in reasons if matches(pattern, name)]
        if matched:
            raise RecipeError(
                f"target `{pattern}` matches `{matched[0]}`, which cannot be split "
                f"({reasons[matched[0]]})",
                hint="leave it out; `ortho inspect` lists what can be split",
            )
        near = difflib.get_close_matches(pattern.removeprefix("re:"), reasons, n=1, cutoff=0.3)
        like = (near or list(reasons))[0]
        raise RecipeError(
            f"target `{pattern}` matches no tensor of `{checkpoint.path}`",
            hint=f"its tensors are named like `{like}`; `ortho inspect` lists them",
        )


def conv1d_names(checkpoint: Checkpoint) -> frozenset[str]:
    """Name the weights stored (in, out), by model type or by the length of a bias."""
    tensors = {tensor.name: tensor for tensor in checkpoint.tensors}
    typed = str((checkpoint.config or {}).get("model_type")) in CONV1D_MODEL_TYPES
    found = set()
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
            typed = True
    return frozenset(found) if typed else frozenset()


def _unsupported(tensor: TensorInfo, source: _Source) -> str | None:
    """Say why a weight cannot be split that a user would expect to be."""
    stacked = _stacked(tensor, source.sizes.counts)
    if stacked is not None:
        return stacked
    if tensor.name in source.stored_in_out:
        return "Conv1D, stored (in, out)"
    exotic = tensor.dtype in ("F64", "C64") or tensor.dtype.startswith(("F8", "F6", "F4"))
    linear = len(tensor.shape) == 2 and tensor.name.endswith(".weight")
    module = module_of(tensor.name)
    if not (exotic and linear) or roles.is_embedding(module):
        return None
    unsplit = not_by_default(module, tensor.shape, source.sizes)
    return f"dtype {tensor.dtype}" if unsplit is None else None


def _stacked(tensor: TensorInfo, counts: frozenset[int]) -> str | None:
    """Say how a tensor stacks Linears, which are most of a model; None for other odd shapes."""
    module, shape = module_of(tensor.name), tensor.shape
    if len(shape) not in (2, 3) or min(shape[-2:]) < MIN_IN_FEATURES:
        return None
    if roles.named_role(module) is not None or _NO_STACK.search(module):
        return None
    experts = _EXPERTS.search(module) is not None
    if len(shape) == 3 and shape[0] > 1:
        return FUSED_EXPERTS if experts or shape[0] in counts else "3-D, stacked matrices"
    if len(shape) == 2 and experts and tensor.dtype in SPLIT:
        # DBRX stacks its experts' rows: experts.mlp.w1 is (experts * out, in).
        return None if tensor.name.endswith(".weight") else "2-D, fused experts"
    return None


def stacked_experts(tensor: TensorInfo, reason: str) -> str | None:
    """Name the module of the experts stacked in a tensor; None if it stacks none.

    Args:
        tensor: one that is not split.
        reason: why it is not split.
    """
    module = module_of(tensor.name)
    experts = re.match(r"(.*\bexperts)\b", module)
    if experts is not None and len(tensor.shape) == 3:
        return experts[1]
    if not reason.endswith("fused experts"):
        return None
    return experts[1] if experts else f"{module.rpartition('.')[0]}.experts"


def _refuse_swapped_experts(checkpoint: Checkpoint, reasons: Mapping[str, str | None]) -> None:
    """Refuse the stacked experts of a Llama 4, which no reader of an INT4 folder looks for.

    transformers builds one Linear per expert of a quantized Llama 4, and would leave it random.
    """
    levels = strict_json.levels(checkpoint.config)
    if not any(str(level.get("model_type")).startswith("llama4") for level in levels):
        return
    stacked = [t for t in checkpoint.tensors if len(t.shape) == 3 and _EXPERTS.search(t.name)]
    if stacked:
        first = stacked[0]
        raise CheckpointError(
            f"tensor `{first.name}` {list(first.shape)}{_and_more(stacked)} stacks the experts of "
            "a Llama 4, and transformers looks for one tensor of each expert where a model is "
            "quantized: base would load with random experts",
            hint="unstack them first, as `feed_forward.experts.N.gate_proj.weight`, `up_proj` and "
            "`down_proj` of shape [out, in]: such experts are split, and load",
        )


def _and_more(tensors: Sequence[object]) -> str:
    return f" and {len(tensors) - 1} more" if len(tensors) > 1 else ""


def _unsupported_error(
    checkpoint: Checkpoint, unsupported: list[tuple[TensorInfo, str]], *, left: bool
) -> OrthoError:
    total = sum(tensor.numel for tensor in checkpoint.tensors)
    share = sum(tensor.numel for tensor, _ in unsupported) / total
    first, reason = unsupported[0]
    readers = " (transformers loads no INT4 Conv1D)" if reason.startswith("Conv1D") else ""
    return CheckpointError(
        f"tensor `{first.name}` {list(first.shape)}{_and_more(unsupported)} cannot be split: "
        f"{reason}{readers}; that is {share:.1%} of all weights",
        hint=hints.unsupported(
            checkpoint.path, reason, left=left, apart=unstack(checkpoint) is not checkpoint
        ),
    )


def _obstacle(tensor: TensorInfo, source: _Source) -> str | None:
    """Say why no recipe can split a tensor; None if one can."""
    if not tensor.numel:
        return "no elements"
    if len(tensor.shape) != 2:
        return f"{len(tensor.shape)}-D"
    if tensor.dtype not in SPLIT:
        return f"dtype {tensor.dtype}"
    if not re.search(r"[^.]\.weight$", tensor.name):
        return "not named <module>.weight"
    module = module_of(tensor.name)
    if roles.is_embedding(module):
        return "embedding"
    if _is_tied(module, tensor.shape, source):
        return "tied to the embedding"
    parent = module.rpartition(".")[0]
    if any(f"{parent}.{packed}" in source.names for packed in _MULTIHEAD):
        return "part of nn.MultiheadAttention"
    return None


def _is_tied(module: str, shape: tuple[int, ...], source: _Source) -> bool:
    head = source.head
    if head is None or roles.role_of(module, shape, source.sizes) != "output head":
        return False
    tokens = source.sizes.vocabularies
    return f".{module}".endswith(f".{head}") or not tokens or shape[0] in tokens


def not_by_default(
    module: str, shape: tuple[int, ...], sizes: roles.Sizes = roles.UNKNOWN
) -> str | None:
    """Say why a Linear is not split by default, but only by a target; None if it is.

    Args:
        module: path of the module.
        shape: (out_features, in_features).
        sizes: what is known of the model.
    """
    role = roles.role_of(module, shape, sizes)
    if role is not None:
        return role
    if shape[1] < MIN_IN_FEATURES:
        return f"in_features {shape[1]} < {MIN_IN_FEATURES}"
    return None


def _siblings(name: str) -> Iterator[str]:
    """Yield the names of the weights that vLLM fuses into one matrix, this one included."""
    parent, _, leaf = module_of(name).rpartition(".")
    for other in _SIBLINGS.get(leaf, ()):
        yield f"{parent}.{other}.weight".removeprefix(".")


def sibling_groups(names: Collection[str]) -> list[tuple[str, ...]]:
    """List the groups of weights that vLLM fuses into one matrix, two or more of `names` each."""
    found = {tuple(one for one in _siblings(name) if one in names) for name in names}
    return sorted(group for group in found if len(group) > 1)


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
    """Settings of one tensor, overrides included."""

    bits: int  # per code
    scale: Scale
    density: float
    own_density: bool  # set by an override


# Overrides of the last recipe that was asked for.
_compiled: tuple[list[Override], Patterns] = ([], Patterns(()))


def _overrides(recipe: Recipe, name: str) -> list[Override]:
    """List the overrides that match a tensor's name, in the recipe's order."""
    global _compiled
    known, patterns = _compiled
    if known is not recipe.overrides:
        patterns = Patterns([override.match for override in recipe.overrides])
        _compiled = recipe.overrides, patterns
    return [recipe.overrides[number] for number in patterns.numbers(name)]


def tensor_settings(recipe: Recipe, name: str) -> TensorSettings:
    """Merge the settings of all tensors with the overrides that match; later ones win."""
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
        RecipeError: an override matches nothing; fused weights would differ in bits; 3 bits where
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
    blocks: dict[str, str] = {}
    for name, tensor in split.items():
        if bits[name] == 3 and tensor.shape[1] % 32:
            raise RecipeError(
                f"bits is 3 for `{name}`, whose in_features {tensor.shape[1]} does not divide by "
                "32 (as many codes of 3 bits fill three words)",
                hint="give it 4 bits by an override, or add it to `ignore`",
            )
        experts = _EXPERT.match(name)
        first = blocks.setdefault(experts[1], name) if experts else name
        for sibling in (*_siblings(name), first):
            if bits.get(sibling, bits[name]) != bits[name]:
                one = "their experts as one layer" if sibling == first else "them as one matrix"
                raise RecipeError(
                    f"`{name}` would have {bits[name]} bits and `{sibling}` {bits[sibling]}; "
                    f"vLLM runs {one}",
                    hint="let the override match all of them or none",
                )
