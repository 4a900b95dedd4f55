"""What readers of base are told: which Linears are INT4 or INT3, and where each tensor lies."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from ortho_cli.artifact import BASE_FILE

# vLLM runs the experts of a layer as one module, and looks up its scheme under these three names,
# whatever the file calls them.
_EXPERT = re.compile(r"(?P<expert>(?:.*\.)?experts\.(?:expert_)?\d+)\.(?P<leaf>.+)$")
_ASKED = ("gate_proj", "up_proj", "down_proj")
_ASKED_AS = {
    "gate_proj": ("w1", "gate", "linear_gate", "linear_1", "wi_0"),
    "up_proj": ("w3", "v1", "up", "linear_up", "linear", "wi_1", "wi", "fc1"),
    "down_proj": ("w2", "down", "linear_down", "linear_2", "wo", "fc2"),
}


def quantization_config(
    *,
    split: Mapping[str, int],
    unsplit: Sequence[str],
    group_size: int,
    others: Sequence[str] = (),
) -> dict[str, Any]:
    """Tell a reader of compressed-tensors which Linears are INT4, and which INT3.

    Args:
        split: bits of a code of each module that was split.
        unsplit: modules with a weight that was not, and heads that have no tensor of their own.
        group_size: weights that share a scale.
        others: modules that are no Linears, so that `ignore` need not list them; no target may
            match them all the same.
    One config group for each number of bits, the widest first: a reader takes the first group that
    matches, and no target of one group matches a module of another.
    """
    whole = dict.fromkeys(unsplit, 0)
    split = {**_asked_names(split, taken=whole), **split}
    unsplit = list({**_asked_names(whole, taken=split), **whole})
    widths = sorted(set(split.values()), reverse=True)
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{number}": {
                "targets": patterns(
                    [module for module in split if split[module] == bits],
                    against=[
                        *unsplit,
                        *others,
                        *(module for module in split if split[module] != bits),
                    ],
                ),
                "weights": {
                    "num_bits": bits,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "group",
                    "group_size": group_size,
                    "dynamic": False,
                },
            }
            for number, bits in enumerate(widths)
        },
        "ignore": patterns(unsplit, against=list(split)),
    }


def _asked_names(modules: Mapping[str, int], *, taken: Collection[str]) -> dict[str, int]:
    """Name the experts as vLLM asks for them: Mixtral's `w1` is asked for as `gate_proj`.

    An expert without a gate is asked for one all the same, and answers as the rest of it does.
    """
    experts: dict[str, dict[str, int]] = {}
    for module, bits in modules.items():
        found = _EXPERT.match(module)
        if found is not None:
            experts.setdefault(found["expert"], {})[found["leaf"]] = bits
    elsewhere = {found["expert"] for module in taken if (found := _EXPERT.match(module))}
    asked: dict[str, int] = {}
    for expert, leaves in experts.items():
        for name in _ASKED:
            known = next((leaves[leaf] for leaf in _ASKED_AS[name] if leaf in leaves), None)
            if known is None and expert not in elsewhere and len(set(leaves.values())) == 1:
                known = next(iter(leaves.values()))
            if known is not None and f"{expert}.{name}" not in taken and name not in leaves:
                asked[f"{expert}.{name}"] = known
    return asked


def patterns(modules: Sequence[str], *, against: Sequence[str]) -> list[str]:
    r"""Write patterns that match all `modules`, under other prefixes too, and none `against`.

    `model.layers.7.mlp.up_proj` becomes `re:(.*\.)?layers\.\d+\.mlp\.up_proj$`: layer numbers are
    folded, and what stands before `layers` is left open, since readers rename it (transformers
    prefixes vision-language models, vLLM its own). Where that would catch a module of the other
    side, a lookahead rules out the path parts that only the other side has (`vision_tower`); then
    numbers are spelled out; at last the name stands as it is.
    """
    others = frozenset(against)
    tried: dict[str, bool] = {}  # thousands of modules share a few folded patterns
    found: dict[str, None] = {}
    for module in modules:
        for pattern in _candidates(module, against):
            if pattern not in tried:
                tried[pattern] = _catches(pattern, others)
            if not tried[pattern]:
                found[pattern] = None
                break
    return sorted(found)


def _catches(pattern: str, modules: Collection[str]) -> bool:
    if not pattern.startswith("re:"):
        return pattern in modules
    matcher = re.compile(pattern.removeprefix("re:"))
    return any(matcher.match(module) for module in modules)


def _candidates(module: str, against: Sequence[str]) -> Iterator[str]:
    parts = module.split(".")
    if len(parts) == 1:
        yield module  # `lm_head` is what every reader expects to read
        return
    number = next((i for i, part in enumerate(parts) if part.isdecimal()), len(parts) - 1)
    tail = parts[max(number - 1, 0) :]
    for part_of in (_fold, _escape):
        body = r"\.".join(map(part_of, tail))
        yield f"re:(.*\\.)?{body}$"
        matcher = re.compile(rf"(.*\.)?{body}$")
        strangers = {p for other in against if matcher.match(other) for p in other.split(".")}
        for stranger in sorted(strangers - set(parts)):
            yield rf"re:(?!(.*\.)?{re.escape(stranger)}\.)(.*\.)?{body}$"
    yield module


@cache
def _fold(part: str) -> str:
    return r"\d+" if part.isdecimal() else _escape(part)


@cache
def _escape(part: str) -> str:
    return re.escape(part)


def index(keys: Iterable[str], *, total_size: int) -> dict[str, Any]:
    """Make the index without which transformers does not find base."""
    return {
        "metadata": {"total_size": total_size},
        "weight_map": dict.fromkeys(sorted(keys), BASE_FILE),
    }
