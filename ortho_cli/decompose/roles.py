"""Roles of weights, by path and shape: embedding, output head, router, norm, or none of these.

Every part of a path counts, not the last alone: `router.layer` is a router, `embed_tokens.0` an
embedding, `lm_head.decoder` a head. A word that other layers use too (`output`, `gate`) counts
only where the shape agrees: a head has one row for each token, a router one for each expert. Sizes
come from config.json and, where there is none, from the other tensors of the checkpoint.

tests/decompose/test_roles.py holds these rules against every class that transformers builds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from ortho_cli.formats.artifact import module_of
from ortho_cli.storage.checkpoint import TensorInfo

Role = Literal["embedding", "output head", "router", "norm", "embedding or output head"]

_ANY_CASE = re.IGNORECASE

# Parts of a path that tell the role at any depth.
_HEAD = re.compile(
    r"(?<![^_])heads?$|_embed_?out$|^embed_out$|unembed|(bbox|class)_embed$|classifi"
    r"|^(score|cls|qa_outputs|lm_loss|pred_layer|log_softmax)$|^logits|^vocab_|_predictions$"
    r"|^head_linear$",
    _ANY_CASE,
)
_ROUTER = re.compile(r"router|^routing$|expert_gate$|^(moe_)?gating$|^moe_gate$", _ANY_CASE)
_EMBEDDING = re.compile(
    r"embed|^(wte|wpe|shared)$|(^|_)embs?(_|$)|relative_attention_bias|^codebooks?$", _ANY_CASE
)
_NORM = re.compile(r"norm(?!al)|^ln(_|\d|$)", _ANY_CASE)
# Parts that tell it only at the end: nn.Embedding also holds learned tokens and queries.
_EMBEDDING_LEAF = re.compile(
    r"(^|_)tokens?$|^(reference_points|query_feat|queries_features)$", _ANY_CASE
)
# Whole paths, behind any prefix: CTRL and Inkling name their embeddings so.
_EMBEDDING_PATH = re.compile(r"(^|\.)(transformer\.w|audio(_tower)?\.encoder)$|^w$")
# Last parts that mean a head outside the layers, and something else inside.
_WEAK_HEAD = re.compile(
    r"^(output|proj_out|output_layer|output_projection|decoder|predictions)$", _ANY_CASE
)
_PROJECTION_HEAD = re.compile(r"^[qkv]_head$")
_ATTENTION = re.compile(r"attn|attention", _ANY_CASE)
_EXPERTS = re.compile(r"(?:^|\.)[a-z_]*experts?(?=[._])", _ANY_CASE)
_EXPERT_NUMBER = re.compile(r"[._](\d+)(?:\.|$)")
_PROJECTION = re.compile(r"proj|^w\d$|^(fc|linear|dense|wi|wo)(_?\d+)?$|^(q|k|v|o|qkv)$", _ANY_CASE)
_TOKEN_EMBEDDING = re.compile(
    r"(^|\.)(embed_tokens|wte|word_embeddings?|tok_embeddings|token_embd|shared|emb|embed_in)$"
)

_VOCABULARY_KEY = re.compile(r"vocab.*size|^n_vocab$|codebook_size|^vocab$")
_ONE_EXPERT = re.compile(r"experts?[._]\d+\.", _ANY_CASE)
# Keys of sizes that a matrix can be wide. `embedding_size` and numbers of tokens are none, even
# where they equal the vocabulary.
_WIDTH_KEY = re.compile(
    r"hidden|(^|_)dim|d_model|width|d_ff|intermediate|ffn|n_embd|inner|channels"
)
_EXPERTS_KEY = re.compile(r"(?<!shared_)experts$")
_FEW = 1000  # tokens; a smaller vocabulary is easily a width of the model, too
_DEEPEST = 4  # levels of config.json that are read; transformers nests three


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Sizes of a model that config.json and the other tensors tell."""

    vocabularies: frozenset[int] = frozenset()  # numbers of tokens that are no width of the model
    experts: Mapping[str, frozenset[int]]  # numbers of experts that each module may have
    counts: frozenset[int] = frozenset()  # numbers of experts that config.json names


UNKNOWN = Sizes(experts={})


def read_sizes(config: Mapping[str, object] | None, tensors: Iterable[TensorInfo]) -> Sizes:
    """Read how many tokens and experts a model has.

    Args:
        config: config.json, if there is one.
        tensors: all tensors of the checkpoint.
    """
    told = list(_numbers(config or {}))
    vocabularies = {size for key, size in told if _VOCABULARY_KEY.search(key)}
    counts = {size for key, size in told if _EXPERTS_KEY.search(key)}
    widths = {
        size for key, size in told if _WIDTH_KEY.search(key) and not _VOCABULARY_KEY.search(key)
    }
    highest: dict[str, int] = {}
    for tensor in tensors:
        module = module_of(tensor.name)
        if len(tensor.shape) == 2 and _TOKEN_EMBEDDING.search(".".join(_parts(module).names)):
            vocabularies.add(tensor.shape[0])
            widths.add(tensor.shape[1])
        experts = _EXPERTS.search(tensor.name)
        if experts is not None and "shared" not in experts[0]:
            block = tensor.name[: experts.start()]
            number = _EXPERT_NUMBER.match(tensor.name, experts.end())
            count = int(number[1]) + 1 if number else (tensor.shape or (0,))[0]
            if number or len(tensor.shape) == 3:
                highest[block] = max(highest.get(block, 0), count)
    return Sizes(
        vocabularies=frozenset(vocabularies - widths),
        experts={block: frozenset({count, *counts}) for block, count in highest.items()},
        counts=frozenset(counts),
    )


def role_of(module: str, shape: tuple[int, ...], sizes: Sizes = UNKNOWN) -> Role | None:
    """Give the role of a 2-D weight; None for a Linear of the model's body.

    Args:
        module: path of the module, such as `model.layers.0.mlp.gate`.
        shape: (out_features, in_features).
        sizes: what is known of the model.
    """
    parts = _parts(module)
    rows, columns = shape
    role = _role_by_name(parts)
    if role is not None:
        return role
    own = _ONE_EXPERT.search(module) is not None  # an expert's own gate is no router
    if (not own and _is_gate(parts, rows, columns)) or _routes(module, parts, rows, sizes):
        return "router"
    if parts.in_layer:
        return None
    known = sizes.vocabularies
    is_vocabulary = rows in known or columns in known or _is_padded(rows, of=known)
    if _WEAK_HEAD.search(parts.leaf) and (is_vocabulary or (not known and rows >= columns)):
        return "output head"
    return "embedding or output head" if is_vocabulary else None


def named_role(module: str) -> Role | None:
    """Give the role of a weight by its path alone.

    Args:
        module: path of the module.
    """
    return _role_by_name(_parts(module))


def is_embedding(module: str) -> bool:
    """Tell whether a module's own name is an embedding's, which no reader takes quantized."""
    parts = _parts(module)
    return _role_by_name(parts) == "embedding" and bool(
        _EMBEDDING.search(parts.leaf)
        or _EMBEDDING_LEAF.search(parts.leaf)
        or _EMBEDDING_PATH.search(".".join(parts.names))
    )


def _numbers(config: Mapping[str, object], depth: int = 0) -> Iterator[tuple[str, int]]:
    """Yield the integers of config.json with their keys, also those in lists."""
    for key, value in config.items():
        if isinstance(value, dict) and depth < _DEEPEST:
            yield from _numbers(value, depth + 1)
        for one in value if isinstance(value, list) else (value,):
            if isinstance(one, int) and not isinstance(one, bool) and one > 1:
                yield str(key), one


@dataclass(frozen=True, slots=True)
class _Parts:
    """A path in parts: names without numbers, and whether it is inside a numbered layer."""

    names: tuple[str, ...]
    depth: tuple[int, ...]  # of each name: the count of names after the first number behind it
    in_layer: bool

    @property
    def leaf(self) -> str:
        return self.names[-1] if self.names else ""


@lru_cache(maxsize=1 << 8)
def _parts(module: str) -> _Parts:
    pieces = module.split(".")
    names, depth = [], []
    for at, piece in enumerate(pieces):
        if piece.isdecimal():
            continue
        rest = pieces[at + 1 :]
        number = next((i for i, later in enumerate(rest) if later.isdecimal()), len(rest))
        names.append(piece)
        depth.append(sum(not later.isdecimal() for later in rest[number:]))
    first = next((i for i, piece in enumerate(pieces) if piece.isdecimal()), len(pieces))
    in_layer = any(not piece.isdecimal() for piece in pieces[first:])
    return _Parts(tuple(names), tuple(depth), in_layer)


@lru_cache(maxsize=1 << 14)  # layers share their parts
def _role_by_name(parts: _Parts) -> Role | None:
    """Give the role by words that mean the same everywhere.

    A word does not count before a stack of layers: `image_embed.encoder.layers.0.attn.q_proj` is no
    embedding.
    """
    words = [name for name, depth in zip(parts.names, parts.depth, strict=True) if depth < 2]
    if any(_ROUTER.search(name) for name in words):
        return "router"
    # A head may be an attention's projection, as Funnel's `attention.q_head` is.
    in_attention = any(_ATTENTION.search(name) for name in parts.names)
    projection = in_attention and _PROJECTION_HEAD.search(parts.leaf)
    if any(_HEAD.search(name) for name in words) and not projection:
        return "output head"
    if (
        any(_EMBEDDING.search(name) for name in words)
        or _EMBEDDING_LEAF.search(parts.leaf)
        or _EMBEDDING_PATH.search(".".join(parts.names))
    ):
        return "embedding"
    if any(_NORM.search(name) for name in parts.names[-2:]):
        return "norm"
    return None


def _is_gate(parts: _Parts, rows: int, columns: int) -> bool:
    """Tell whether a `gate` is a router: a gated MLP's gate has more rows than columns."""
    return (
        rows < columns
        and any(name.lower() == "gate" for name in parts.names[-3:])
        and not any(_ATTENTION.search(name) for name in parts.names)
    )


def _routes(module: str, parts: _Parts, rows: int, sizes: Sizes) -> bool:
    """Tell whether a weight is a router: it has one row for each expert beside it."""
    if _PROJECTION.search(parts.leaf) or _EXPERTS.search(f"{module}."):
        return False
    above = module.rpartition(".")[0]
    blocks = (above, above.rpartition(".")[0])
    return any(rows in sizes.experts.get(block, ()) for block in blocks if block)


def _is_padded(size: int, *, of: frozenset[int]) -> bool:
    """Tell whether a size is a vocabulary that was padded to a multiple of 64."""
    return size % 64 == 0 and any(
        0 < size - known < known // 64 + 64 for known in of if known > _FEW
    )
