"""Write ortho_cli/model/renames.json: how transformers renames the modules of a checkpoint.

python tests/make_renames.py

base names its Linears as the source's file does, and transformers looks up the scheme of a Linear
under the name that it has in memory. Where a Linear would not be found so, this keeps the
renamings of that class, as the installed transformers has them.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from architectures import Built, build_all

from ortho_cli.formats.quantization_config import quantization_config
from ortho_cli.model.renames import Rule, apply_rules

FILE = Path(__file__).parent.parent / "ortho_cli" / "model" / "renames.json"


def rules_of(built: Built) -> list[Rule]:
    """List the renamings of a model, those alone that touch a Linear."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import GroupWeightRename, PrefixChange, WeightRenaming

    found: list[Rule] = []
    modules = [w.module for w in built.weights if w.kind in ("Linear", "converted")]
    for one in get_model_conversion_mapping(built.model, add_legacy=False):
        if isinstance(one, WeightRenaming) and not isinstance(one, PrefixChange):
            sources = [source.replace("*.", r".*\.") for source in one.source_patterns]
            scoped = one.scope_prefix is not None
            scope = (one.scope_prefix, one.base_model_prefix) if scoped else ()
            rules = [Rule(tuple(sources), one.target_patterns[0], scope)]
            if isinstance(one, GroupWeightRename):  # fc0 -> fc1 and fc1 -> fc2: the last one first
                pairs = zip(sources, one.target_patterns, strict=True)
                rules = [Rule((source,), target, scope) for source, target in pairs][::-1]
            for rule in rules:
                renamed = [apply_rules(module, [rule]) for module in modules]
                if renamed != modules:
                    found.append(rule)
                modules = renamed
    return found


def is_found(built: Built) -> bool:
    """Tell whether the names of the file are enough."""
    linears = [weight for weight in built.weights if weight.kind == "Linear"]
    split = {weight.module: 4 for weight in linears}
    config = quantization_config(split=split, unsplit=[], group_size=64)
    targets = config["config_groups"]["group_0"]["targets"] if split else []
    return all(matches_any(targets, str(weight.memory)) for weight in linears)


def matches_any(targets: list[str], name: str) -> bool:
    """Match as readers of compressed-tensors do."""
    module = name.removesuffix(".weight")
    return any(
        re.match(target[3:], module) if target.startswith("re:") else target == module
        for target in targets
    )


def main() -> None:
    """Build every model, and write what is left of their renamings."""
    numbers: dict[str, int] = {}
    kept: list[str] = []
    for built in build_all():
        if is_found(built):
            continue
        rules = [[one.patterns, one.replacement, *one.scope] for one in rules_of(built)]
        spelled = json.dumps(rules)
        if spelled not in kept:
            kept.append(spelled)
        numbers[built.name] = kept.index(spelled)
        numbers.setdefault(built.model_type, kept.index(spelled))
    of = json.dumps(dict(sorted(numbers.items())))
    FILE.write_text('{"rules": [\n' + ",\n".join(kept) + f'\n], "of": {of}}}\n')


if __name__ == "__main__":
    main()
