"""Experts that a checkpoint stacks in two tensors of a layer, as one tensor of each, and back.

    gate_up (experts, 2 width, in)  <->  gate (width, in) and up (width, in) of each
    down (experts, out, width)      <->  down (out, width) of each

Each is a range of the bytes that are there, so nothing is copied. Their names are those by which
vLLM loads the experts of a quantized model: `experts.N.gate_proj.weight`, or Mixtral's.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from ortho_cli.storage import strict_json
from ortho_cli.storage.checkpoint import Checkpoint, TensorInfo


class _Layout(NamedTuple):
    """How the two tensors of a layer end, and what the weights of an expert are called."""

    gate_up: str
    down: str
    gate: str
    up: str
    leaf: str  # of down


_QWEN = ("gate_proj", "up_proj", "down_proj")
_MIXTRAL = ("w1", "w3", "w2")
LAYOUTS = (
    _Layout("experts.gate_up_proj", "experts.down_proj", *_QWEN),  # Qwen3.5-MoE, Gemma 4
    _Layout("input_linear.weight", "output_linear.weight", *_MIXTRAL),  # Granite
)
# Model types of which transformers 5.23 loads a tensor of each expert.
_APART = """
afmoe axk1 axk2 bailing_hybrid beam cohere2_moe deepseek_ocr2 deepseek_v2 deepseek_v3 deepseek_v32
deepseek_v4 dots1 ernie4_5_moe ernie4_5_vl_moe exaone_moe flex_olmo flint glm4_moe glm4_moe_lite
glm4v_moe glm5_next glm5_next_text glm_moe_dsa hunyuan_v1_moe hy_v3 jamba kimi_k25 kimi_linear
kolibri1 laguna lfm2_moe longcat_flash mellum mimo_v2_flash minimax minimax_m2 minimax_m3_vl
mistral_large4_text mixtral olmoe phimoe qwen2_moe qwen3_5_moe_text qwen3_moe qwen3_next
qwen3_omni_moe qwen3_omni_moe_text qwen3_omni_moe_thinker qwen4_exp_text solar_open
"""
APART = frozenset(_APART.split())
_NAME = re.compile(r"(?P<prefix>(?:.*\.)?)experts\.(?P<expert>\d+)\.(?P<leaf>\w+)\.weight")


def needs_stacks(config: Mapping[str, object] | None) -> bool:
    """Whether transformers would look for the stacks of a model in vain, were each expert apart.

    It would leave the experts random. False where there is no config.json to build a model from.
    """
    levels = strict_json.levels(config)
    return config is not None and not any(level.get("model_type") in APART for level in levels)


def unstack(
    checkpoint: Checkpoint, stays: Callable[[str], bool] = lambda stack: False
) -> Checkpoint:
    """Give each expert tensors of its own, in place of those that stack them.

    Stacks of another form are left as they are: (experts, in, 2 width), as of Llama 4, in which an
    expert's weights are no range of bytes; those with biases, as of gpt-oss; and those whose gate
    and down do not fit together.

    Args:
        checkpoint: any.
        stays: says of a stack, by its name, that it stays one; the other of its layer does, too.
    """
    tensors = {tensor.name: tensor for tensor in checkpoint.tensors}
    parts: dict[str, list[TensorInfo]] = {}
    for prefix, layout, gate_up, down in _stacks(tensors):
        mine = {gate_up.name: list(_gates(gate_up, prefix, layout))}
        mine[down.name] = list(_downs(down, prefix, layout))
        if not any(map(stays, mine)):
            parts |= mine
    found = [one for name, own in tensors.items() for one in parts.get(name, [own])]
    if not parts or len({one.name for one in found}) < len(found):
        return checkpoint  # with such names of its own, too, readers differ on which of them count
    return dataclasses.replace(
        checkpoint, tensors=tuple(sorted(found, key=lambda tensor: tensor.name))
    )


def _stacks(
    tensors: Mapping[str, TensorInfo],
) -> Iterator[tuple[str, _Layout, TensorInfo, TensorInfo]]:
    """Yield the two stacks of each layer, with what their names begin with."""
    for name, gate_up in tensors.items():
        for layout in LAYOUTS:
            prefix = name.removesuffix(layout.gate_up)
            down = tensors.get(prefix + layout.down)
            if prefix == name or prefix[-1:] not in ("", ".") or down is None:
                continue
            if _fits(gate_up, down) and not _has_bias(tensors, name):
                yield prefix, layout, gate_up, down


class Stack(NamedTuple):
    """A tensor that stacks others: its name, and the names of these, in order."""

    name: str
    experts: int
    parts: tuple[str, ...]


def restacked(names: Iterable[str]) -> Iterator[Stack]:
    """Yield the stacks that `unstack` would make these tensors of."""
    groups: dict[str, dict[tuple[int, str], str]] = {}
    for name in names:
        if found := _NAME.fullmatch(name):
            groups.setdefault(found["prefix"], {})[int(found["expert"]), found["leaf"]] = name
    for prefix, named in groups.items():
        count = 1 + max(number for number, _ in named)
        for layout in LAYOUTS:
            for stack, leaves in (
                (layout.gate_up, (layout.gate, layout.up)),
                (layout.down, (layout.leaf,)),
            ):
                wanted = [(number, leaf) for number in range(count) for leaf in leaves]
                if all(key in named for key in wanted):
                    parts = tuple(named[key] for key in wanted)
                    yield Stack(f"{prefix}{stack}", count, parts)


def _fits(gate_up: TensorInfo, down: TensorInfo) -> bool:
    """Whether two tensors are the stacks of one layer, each expert's rows one after another."""
    if not (len(gate_up.shape) == len(down.shape) == 3 and gate_up.numel and down.numel):
        return False
    experts, rows, columns = gate_up.shape
    # Stacks (experts, in, 2 width) and (experts, width, in) never fit: `in` would be its double.
    return down.shape[0] == experts and (rows, columns) == (2 * down.shape[2], down.shape[1])


def _has_bias(tensors: Mapping[str, TensorInfo], name: str) -> bool:
    return f"{name}_bias" in tensors or f"{name.removesuffix('.weight')}.bias" in tensors


def _gates(stack: TensorInfo, prefix: str, layout: _Layout) -> Iterator[TensorInfo]:
    experts, rows, _ = stack.shape
    for number in range(experts):
        for half, leaf in enumerate((layout.gate, layout.up)):
            name = f"{prefix}experts.{number}.{leaf}.weight"
            yield _part(stack, name, 2 * number + half, rows // 2)


def _downs(stack: TensorInfo, prefix: str, layout: _Layout) -> Iterator[TensorInfo]:
    for number in range(stack.shape[0]):
        name = f"{prefix}experts.{number}.{layout.leaf}.weight"
        yield _part(stack, name, number, stack.shape[1])


def _part(stack: TensorInfo, name: str, number: int, rows: int) -> TensorInfo:
    """Give the matrix `number` of a stack of matrices of so many rows."""
    nbytes = stack.nbytes // (stack.shape[0] * stack.shape[1]) * rows
    return dataclasses.replace(
        stack,
        name=name,
        shape=(rows, stack.shape[2]),
        offset=stack.offset + number * nbytes,
        nbytes=nbytes,
    )
