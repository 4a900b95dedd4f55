"""Experts that transformers fuses in one parameter, taken apart: a Linear for each weight on disk.

    y_t = sum over experts e of token t   p_te  D_e (act(G_e x_t) * U_e x_t)

transformers 5 stacks the experts' matrices of a layer when it loads a checkpoint that has each of
them, and calls them in one product. Here each is a Linear again, under its name on disk, so that
hooks see its inputs and gradients. Weights are views of what was stacked: they take no memory.

A Linear of an expert sees the tokens that were routed to it, or every token (`see_all`).
`Experts.forward` says which, in attributes of the Linear: `routed`, numbers in the batch of the
tokens that it sees, and `chosen`, of those that were routed to it, (tokens,) int64 each;
`batch_tokens`, the number of all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

# Names on disk of the matrix that gates, of the one whose output it gates, and of the last.
GATE, UP, DOWN = ("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")
_NAME = re.compile(r"(?P<layer>.*?\.\d+\.)(?P<rest>.*\bexperts)\.(?P<expert>\d+)\.(?P<leaf>\w+)")
# How transformers' module lays its stacks out, where this module knows to take them apart.
_LAYOUT = {
    "has_gate": True,
    "has_bias": False,
    "is_transposed": False,
    "is_concatenated": True,
    "has_post_expert_norm": False,
}


def group_of(name: str) -> tuple[str, str] | None:
    """Give the experts of a layer and which of their weights a tensor is; None for another one."""
    found = _NAME.match(name)
    return None if found is None else (found["layer"] + found["rest"], found["leaf"])


class Experts(nn.Module):
    """The experts of a layer, called one by one."""

    def __init__(self, fused: nn.Module, leaves: tuple[str, str, str]) -> None:
        """Take a module of stacks apart, which loses its parameters.

        Args:
            fused: transformers' module: gate_up_proj (experts, 2 width, in), down_proj (experts,
                in, width).
            leaves: names on disk of an expert's three weights: gate, up, down.
        """
        super().__init__()
        both, down = fused.get_parameter("gate_up_proj"), fused.get_parameter("down_proj")
        width = both.shape[1] // 2
        for number in range(len(both)):
            expert = nn.Module()
            parts = (both[number, :width], both[number, width:], down[number])
            for leaf, part in zip(leaves, parts, strict=True):
                expert.add_module(leaf, _linear(part))
            self.add_module(str(number), expert)
        self._leaves, self._count = leaves, len(both)
        self.sees_all = False
        del fused.gate_up_proj, fused.down_proj
        self._apply_gate: Callable[[Tensor], Tensor] = cast(Any, fused)._apply_gate

    def forward(self, hidden: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        """Pass tokens through the experts that each was routed to.

        Args:
            hidden: (tokens, in).
            chosen: (tokens, k) int64, numbers of experts; `experts` where there is none.
            shares: (tokens, k).
        """
        gate, up, down = self._leaves
        total = torch.zeros_like(hidden)
        every = torch.arange(len(hidden), device=hidden.device) if self.sees_all else None
        called = range(self._count) if self.sees_all else torch.unique(chosen).tolist()
        for number in called:
            if number >= self._count:
                continue
            expert = self.get_submodule(str(number))
            tokens, place = torch.where(chosen == number)
            seen = tokens if every is None else every
            linears: Iterable[Any] = expert.children()
            for one in linears:
                one.routed, one.chosen, one.batch_tokens = seen, tokens, len(hidden)
            given = hidden[seen]
            gated = torch.cat(
                (expert.get_submodule(gate)(given), expert.get_submodule(up)(given)), -1
            )
            made = expert.get_submodule(down)(self._apply_gate(gated))
            made = made if every is None else made[tokens]  # others are seen, and count for nothing
            made = made * shares[tokens, place, None]
            total = total.index_add(0, tokens, made.to(total.dtype))
        return total


def see_all(model: nn.Module) -> None:
    """Let each expert of a model see every token; what the model computes stays the same."""
    for module in model.modules():
        if isinstance(module, Experts):
            module.sees_all = True


def _linear(weight: Tensor) -> nn.Linear:
    """Make a Linear without bias whose weight is a view."""
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    told: Any = linear
    told.routed = told.chosen = torch.zeros(0, dtype=torch.int64)
    told.batch_tokens = 0
    return linear


def separate(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """Take apart the fused experts of a model that a checkpoint holds one by one.

    Args:
        model: as transformers built it; modules of stacks are replaced, once.
        names: tensors of the checkpoint.
    Returns:
        the Linears of experts, by the name of their weight in the checkpoint. Experts of another
        layout (biases, transposed or interleaved stacks) stay as they are, and are not among them.
    """
    wanted: dict[str, dict[tuple[int, str], str]] = {}  # by layer: names of expert and leaf
    for name in names:
        found = _NAME.fullmatch(name.removesuffix(".weight"))
        if found:
            wanted.setdefault(found["layer"], {})[int(found["expert"]), found["leaf"]] = name
    linears: dict[str, nn.Module] = {}
    for path, module in list(model.named_modules()) if wanted else ():
        if not (isinstance(module, Experts) or _is_known(module)):
            continue
        layer = next((one for one in wanted if one in f"{path}."), None)
        if layer is None:
            continue
        if not isinstance(module, Experts):
            leaves = _leaves({leaf for _, leaf in wanted[layer]})
            if leaves is None:
                continue
            module = Experts(module, leaves)
            model.set_submodule(path, module)
        linears |= _named(module, wanted[layer])
    return linears


def _named(experts: Experts, wanted: Mapping[tuple[int, str], str]) -> dict[str, nn.Module]:
    here = dict(experts.named_modules())
    keys = {name: f"{number}.{leaf}" for (number, leaf), name in wanted.items()}
    return {name: here[key] for name, key in keys.items() if key in here}


def _leaves(told: set[str]) -> tuple[str, str, str] | None:
    """Give the names of gate, up and down that are among some; None where one is not known."""
    gate, up, down = (next((n for n in names if n in told), None) for names in (GATE, UP, DOWN))
    return (gate, up, down) if gate and up and down else None


def _is_known(module: nn.Module) -> bool:
    """Whether a module is a stack of experts of the layout that `Experts` takes apart."""
    told: Any = module
    return (
        all(getattr(told, key, None) is value for key, value in _LAYOUT.items())
        and dict(module.named_parameters(recurse=False)).keys() == {"gate_up_proj", "down_proj"}
        and hasattr(told, "_apply_gate")
    )
