"""`quantization_config` of config.json, by which compressed-tensors reads base, and the index."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from ortho_cli.formats.artifact import BASE_FILE

# vLLM runs the experts of a layer as one module, and looks up its scheme by these three names,
# whatever their names in the file are.
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
) -> dict[str, object]:
    """Make the `quantization_config` that names INT4 and INT3 Linears for compressed-tensors.

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
    form = {"type": "int", "symmetric": True, "strategy": "group"}
    groups: dict[str, object] = {}
    for number, bits in enumerate(sorted(set(split.values()), reverse=True)):
        mine = [module for module in split if split[module] == bits]
        rest = [module for module in split if split[module] != bits]
        groups[f"group_{number}"] = {
            "targets": patterns(mine, against=[*unsplit, *others, *rest]),
            "weights": {"num_bits": bits, **form, "group_size": group_size, "dynamic": False},
        }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
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
    folded, and the part before `layers` is left open, since readers rename it (transformers
    prefixes vision-language models, vLLM its own). Where that would catch a module of the other
    side, a lookahead rules out the path parts that only the other side has (`vision_tower`); then
    numbers are spelled out; as the last resort the pattern is the plain name.
    """
    others = _Names(against)
    found: dict[str, None] = {}
    for module in modules:
        found[_pattern(module, others)] = None
    return sorted(found)


NUMBER = "."  # stands for any number in a folded name, where no part can hold a point


class _Names:
    """The modules that no pattern may match, found by how their names end.

    Looking through all of them for each module would take time with the square of their number,
    and a model with experts has tens of thousands.
    """

    def __init__(self, modules: Sequence[str]) -> None:
        self._modules = modules
        self._tails: dict[int, dict[tuple[str, ...], list[str]]] = {}
        self._rules: dict[tuple[str, ...], list[str] | None] = {}

    def ending(self, tail: tuple[str, ...]) -> list[str]:
        """Name the modules that end with these parts, in which NUMBER is any number."""
        tails = self._tails.get(len(tail))
        if tails is None:  # few lengths are asked for
            tails = self._tails[len(tail)] = {}
            for module in self._modules:
                parts = tuple(module.split("."))[-len(tail) :]
                for key in {parts, _folded(parts)}:
                    tails.setdefault(key, []).append(module)
        return tails.get(tail, [])

    def strangers(self, tail: tuple[str, ...]) -> list[str] | None:
        """Name parts that each of the modules with this end has before its last; None: no module.

        A lookahead for one of them rules all these modules out.
        """
        if tail not in self._rules:
            caught = self.ending(tail)
            common = set.intersection(*(set(m.split(".")[:-1]) for m in caught)) if caught else ()
            self._rules[tail] = sorted(common) if caught else None
        return self._rules[tail]


def _folded(parts: Sequence[str]) -> tuple[str, ...]:
    return tuple(NUMBER if part.isdecimal() else part for part in parts)


def _pattern(module: str, others: _Names) -> str:
    """Choose the most open pattern for a module that matches none of the others."""
    parts = module.split(".")
    if len(parts) == 1:
        return module  # `lm_head` is what every reader expects to read
    number = next((i for i, part in enumerate(parts) if part.isdecimal()), len(parts) - 1)
    tail = tuple(parts[max(number - 1, 0) :])
    for end in (_folded(tail), tail):
        body = r"\.".join(r"\d+" if part == NUMBER else re.escape(part) for part in end)
        strangers = others.strangers(end)
        if strangers is None:
            return f"re:(.*\\.)?{body}$"
        for stranger in strangers:
            if stranger not in parts:
                return rf"re:(?!(.*\.)?{re.escape(stranger)}\.)(.*\.)?{body}$"
    return module


def index(keys: Iterable[str], *, total_size: int) -> dict[str, object]:
    """Make the index without which transformers does not find base."""
    weight_map = dict.fromkeys(sorted(keys), BASE_FILE)
    return {"metadata": {"total_size": total_size}, "weight_map": weight_map}
