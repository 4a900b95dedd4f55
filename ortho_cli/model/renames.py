"""Rename modules of a checkpoint as transformers does: it looks up quantization under the new name.

Most models keep the names of the file. For the others `renames.json` lists the rules of each class
and model type, as tests/make_renames.py reads them out of transformers:

    {"rules": [[[[pattern, ...], replacement, scope?, prefix?], ...], ...], "of": {name: number}}

Each rule replaces the first match of any of its patterns, after `prefix.scope.` where it has one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple


class Rule(NamedTuple):
    """One replacement; `scope` is empty, or an inner and an outer prefix."""

    patterns: tuple[str, ...]
    replacement: str
    scope: tuple[str, ...] = ()


# Model types whose projections are transformers' Conv1D, stored (in, out).
CONV1D_MODEL_TYPES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")

_FILE = Path(__file__).with_name("renames.json")


def rename_modules(config: Mapping[str, object], modules: Iterable[str]) -> dict[str, str]:
    """Give the modules that transformers renames, and their new names.

    Args:
        config: config.json.
        modules: as the checkpoint names them.
    """
    classes = config.get("architectures")
    names = [*(classes if isinstance(classes, list) else ()), config.get("model_type")]
    table = _table()
    rules = next((table[name] for name in map(str, names) if name in table), [])
    found = {module: apply_rules(module, rules) for module in modules}
    return {module: renamed for module, renamed in found.items() if renamed != module}


def apply_rules(module: str, rules: Iterable[Rule]) -> str:
    """Rename a module as transformers does: by every rule that matches, in turn.

    Args:
        module: as the checkpoint names it.
        rules: of its model.
    """
    name = f"{module}.weight"
    for rule in rules:
        name = _apply(name, rule)
    return name.removesuffix(".weight")


def _apply(name: str, rule: Rule) -> str:
    inner, outer = (f"{part}." if part else "" for part in rule.scope or ("", ""))
    front = next((front for front in (outer + inner, inner) if name.startswith(front)), None)
    rest = name.removeprefix(front or "")
    found = _compiled(rule.patterns).search(rest)
    if front is None or found is None:
        return name
    replacement = rule.replacement
    if r"\1" in replacement:
        inside = (group for group in found.groups() if group is not None)
        replacement = replacement.replace(r"\1", next(inside, ""))
    return front + rest.replace(found[0], replacement, 1)


@cache
def _compiled(patterns: tuple[str, ...]) -> re.Pattern[str]:
    """Join patterns, the longest first; each ends where a name ends."""
    ended = [
        pattern + (r"(?!\w)" if re.search(r"[a-zA-Z0-9]$", pattern) else "")
        for pattern in sorted(patterns, key=len, reverse=True)
    ]
    return re.compile("|".join(f"(?:{pattern})" for pattern in ended))


@cache
def _table() -> dict[str, list[Rule]]:
    """Read the rules of each class or model type."""
    read = json.loads(_FILE.read_text(encoding="utf-8"))
    rules = [
        [Rule(tuple(patterns), replacement, tuple(scope)) for patterns, replacement, *scope in each]
        for each in read["rules"]
    ]
    return {name: rules[number] for name, number in read["of"].items()}
