"""`quantization_config` of config.json, by which compressed-tensors reads base, and the index."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache

from ortho_cli.formats.artifact import BASE_FILE

# vLLM runs the experts of a layer as one module, and looks up its scheme by these three names,
# whatever their names in the file are.
_EXPERT = re.compile(r"(?P<expert>(?:.*\.)?experts\.(?:expert_)?\d+)\.(?P<leaf>.+)$")
_ASKED_AS = {
    "gate_proj": ("w1", "gate", "linear_gate", "linear_1", "wi_0"),
    "up_proj": ("w3", "v1", "up", "linear_up", "linear", "wi_1", "wi", "fc1"),
    "down_proj": ("w2", "down", "linear_down", "linear_2", "wo", "fc2"),
}


def quantization_config(
    *, split: Mapping[str, int], unsplit: Sequence[str], group_size: int, others: Sequence[str] = ()
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
        if found := _EXPERT.match(module):
            experts.setdefault(found["expert"], {})[found["leaf"]] = bits
    elsewhere = {found["expert"] for module in taken if (found := _EXPERT.match(module))}
    asked: dict[str, int] = {}
    for expert, leaves in experts.items():
        for name, spellings in _ASKED_AS.items():
            known = next((leaves[leaf] for leaf in spellings if leaf in leaves), None)
            if known is None and expert not in elsewhere and len(set(leaves.values())) == 1:
                known = next(iter(leaves.values()))
            if known is not None and f"{expert}.{name}" not in taken and name not in leaves:
                asked[f"{expert}.{name}"] = known
    return asked


NUMBER = "."  # stands for any number in a folded name, where no part can hold a point
Tail = tuple[str, ...]  # the last parts of a module's path


def patterns(modules: Sequence[str], *, against: Sequence[str]) -> list[str]:
    r"""Write patterns that match all `modules`, under other prefixes too, and none `against`.

    `model.layers.7.mlp.up_proj` becomes `re:(.*\.)?layers\.\d+\.mlp\.up_proj$`: layer numbers are
    folded, and the part before `layers` is left open, since readers rename it (transformers
    prefixes vision-language models, vLLM its own). Where that would catch a module of the other
    side, a lookahead rules out the path parts that only the other side has (`vision_tower`); then
    numbers are spelled out; as the last resort the pattern is the plain name.
    """

    # To look through all others for each module would take time with the square of their number,
    # and a model with experts has tens of thousands.
    @cache
    def strangers(length: int) -> dict[Tail, set[str]]:
        """Name parts that all others with the same last parts have before their last.

        A lookahead for one of them rules all these modules out.
        """
        common: dict[Tail, set[str]] = {}
        for module in against:
            parts = tuple(module.split("."))
            for tail in {parts[-length:], _folded(parts[-length:])}:
                common[tail] = common.get(tail, set(parts[:-1])).intersection(parts[:-1])
        return common

    return sorted({_pattern(module, strangers) for module in modules})


def _folded(parts: Sequence[str]) -> Tail:
    return tuple(NUMBER if part.isdecimal() else part for part in parts)


def _pattern(module: str, strangers_of: Callable[[int], dict[Tail, set[str]]]) -> str:
    """Choose the most open pattern for a module that matches none of the others."""
    parts = module.split(".")
    if len(parts) == 1:
        return module  # `lm_head` is what every reader expects to read
    number = next((i for i, part in enumerate(parts) if part.isdecimal()), len(parts) - 1)
    tail = tuple(parts[max(number - 1, 0) :])
    for end in (_folded(tail), tail):
        body = r"\.".join(r"\d+" if part == NUMBER else re.escape(part) for part in end)
        strangers = strangers_of(len(end)).get(end)
        if strangers is None:
            return f"re:(.*\\.)?{body}$"
        if only_theirs := sorted(strangers.difference(parts)):
            return rf"re:(?!(.*\.)?{re.escape(only_theirs[0])}\.)(.*\.)?{body}$"
    return module


def index(keys: Iterable[str], *, total_size: int) -> dict[str, object]:
    """Make the index without which transformers does not find base."""
    weight_map = dict.fromkeys(sorted(keys), BASE_FILE)
    return {"metadata": {"total_size": total_size}, "weight_map": weight_map}
