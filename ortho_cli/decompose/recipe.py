"""Loading of recipes: YAML files and `--set` to validated settings.

A recipe starts with `version: 1`. A key that `settings` does not list is an error with file, line
and the nearest known key. A recipe is plain data: nothing in it is run.
"""

from __future__ import annotations

import codecs
import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from ortho_cli.decompose.settings import Override, Recipe
from ortho_cli.errors import RecipeError, shown
from ortho_cli.storage.hints import said
from ortho_cli.storage.untrusted import read_regular

MAX_BYTES = 100_000  # of a recipe: ours have 1,000
MAX_DEPTH = 16  # of nested YAML, before anything is built from it

Path_ = tuple[str | int, ...]

DEFAULT = Recipe(version=1)
MEASURED = "default"  # the recipe of `ortho decompose MODEL`, where the model can write text
WEIGHTED = "curvature"  # the recipe of `ortho decompose MODEL --stats FILE`


def recipe_folder() -> Path:
    """Find the recipes that come with `ortho`: in the package, or beside it in a checkout."""
    inside = Path(__file__).parent.parent / "recipes"
    return inside if inside.is_dir() else Path(__file__).parent.parent.parent / "recipes"


def built_in() -> list[str]:
    """List the recipes that come with `ortho`, by name."""
    return sorted(path.stem for path in recipe_folder().glob("*.yaml"))


def load_recipe(source: str | None = None, sets: Sequence[str] = ()) -> Recipe:
    """Load a recipe, and apply `--set key.path=value` to it.

    Args:
        source: a YAML file, or the name of a recipe that comes with `ortho`; None is the default
            recipe.
        sets: `key.path=value`, the value in YAML; a number in the path counts list items, and null
            takes back what the recipe says.
    Raises:
        RecipeError: with file, line and the nearest known key.
    """
    data: dict[str, object] = {"version": 1}
    where: dict[Path_, str] = {}
    label = "the default recipe"
    if source is not None:
        path = _find(source)
        label = f"`{path}`"
        data = _parse(_read(path), label, where)
    for assignment in sets:
        _assign(data, where, assignment)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise _explain(error, label, where) from None


def _find(source: str) -> Path:
    path = Path(source)
    if path.is_file():
        return path
    named = recipe_folder() / f"{source}.yaml"
    if source in built_in():
        return named
    near = difflib.get_close_matches(source, built_in(), n=1)
    raise RecipeError(
        f"recipe `{source}` is neither a file nor one of {', '.join(built_in())}",
        hint=f"did you mean `{near[0]}`?" if near else "give a path to a YAML file",
    )


def _read(path: Path) -> str:
    if (size := path.stat().st_size) > MAX_BYTES:
        raise RecipeError(
            f"`{path}` has {size} bytes; a recipe has at most {MAX_BYTES}",
            hint="is it the right file?",
        )
    raw = read_regular(path)
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        hint = "is it the right file?"
        if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            hint = f"`iconv -f UTF-16 -t UTF-8 {said(path)} > utf8.yaml`, then that one"
        raise RecipeError(f"`{path}` is not UTF-8 text: {error.reason}", hint=hint) from None


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-3 as text; this one reads numbers as YAML 1.2 does."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


# Exceptions of PyYAML at a tag such as !!int before a value of another kind.
_UNREADABLE = (ValueError, TypeError, KeyError, IndexError, AttributeError)


def _parse(text: str, label: str, where: dict[Path_, str]) -> dict[str, object]:
    try:
        data, lines = _load(text, label)
        where.update((path, f"{label} line {line}") for path, line in lines.items())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f" line {mark.line + 1}" if mark else ""
        raise RecipeError(
            f"{label}{at} is not YAML: {getattr(error, 'problem', None) or 'unreadable'}",
            hint="check the indentation and quotes",
        ) from None
    except (RecursionError, *_UNREADABLE) as error:
        raise RecipeError(
            f"{label} is not a recipe: {str(error)[:80]}", hint="recipes are plain, shallow data"
        ) from None
    if not isinstance(data, dict):
        found = "empty" if data is None else f"a {type(data).__name__}"
        raise RecipeError(
            f"{label} is {found}, not a mapping of settings", hint="start with `version: 1`"
        )
    return data


def _load(text: str, label: str) -> tuple[object, dict[Path_, int]]:
    """Parse plain YAML in which no key is set twice; tell the line of each path, too."""
    _check_plain(text, label)
    node = yaml.compose(text, Loader=_Loader)
    lines = dict(_walk(node, label)) if node is not None else {}
    return yaml.load(text, Loader=_Loader), lines  # noqa: S506 - a SafeLoader


def _check_plain(text: str, label: str) -> None:
    """Refuse aliases and deep nesting, which make a small file large, before it is parsed."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH or isinstance(event, yaml.AliasEvent):
            what = "uses YAML aliases" if depth <= MAX_DEPTH else "is nested too deeply"
            raise RecipeError(f"{label} {what}", hint="recipes are plain, shallow data")


def _walk(node: yaml.Node, label: str, path: Path_ = ()) -> Iterator[tuple[Path_, int]]:
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.tag != "tag:yaml.org,2002:str":
                raise RecipeError(
                    f"{label} line {line} has a key that is not plain text", hint="keys are names"
                )
            if key.value in seen:
                raise RecipeError(
                    f"{label} line {line} sets `{key.value}` again (first on line "
                    f"{seen[key.value]})",
                    hint="keep one",
                )
            seen[key.value] = line
            yield (*path, key.value), line
            yield from _walk(value, label, (*path, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for position, item in enumerate(node.value):
            yield (*path, position), item.start_mark.line + 1
            yield from _walk(item, label, (*path, position))


def _assign(data: dict[str, object], where: dict[Path_, str], assignment: str) -> None:
    dotted, equals, text = assignment.partition("=")
    keys: list[str | int] = [
        int(part) if part.isdecimal() else part for part in dotted.strip().split(".")
    ]
    label = f"--set {assignment}"
    if not equals or "" in keys:
        raise RecipeError(
            f"`{label}` is not key.path=value", hint="for example --set ortho.density=0.01"
        )
    try:
        value, _ = _load(text, f"`{label}`")
    except (yaml.YAMLError, RecursionError, *_UNREADABLE):
        raise RecipeError(
            f"the value of `{label}` is not YAML", hint="quote it: --set 'ignore=[a, b]'"
        ) from None
    here: Any = data
    for depth, key in enumerate(keys):
        if isinstance(here, dict) and isinstance(key, str):
            here.setdefault(key, {})
        elif not (isinstance(here, list) and isinstance(key, int) and key < len(here)):
            raise RecipeError(
                f"`{label}` goes through `{'.'.join(map(str, keys[:depth]))}`, which has no "
                f"`{key}`",
                hint="set the whole value instead",
            )
        if depth == len(keys) - 1:
            here[key] = value
            if value is None and text.strip() and key in _keys_at(tuple(keys[:-1])):
                del here[key]  # null: as if the recipe did not say it
                return
        here = here[key]
    where[tuple(keys)] = f"`{label}`"


def _explain(error: ValidationError, label: str, where: dict[Path_, str]) -> RecipeError:
    """Turn pydantic's first error into one sentence with the line and the nearest known key."""
    first = error.errors()[0]
    # A union reports each branch under a made-up location; keep what is a path in the recipe.
    path = tuple(
        part
        for part in first["loc"]
        if not (isinstance(part, str) and part in ("int", "literal['auto']"))
    )
    place = next((where[path[:n]] for n in range(len(path), 0, -1) if path[:n] in where), label)
    dotted = ".".join(map(str, path))
    if first["type"] == "extra_forbidden":
        known = _keys_at(path[:-1])
        near = difflib.get_close_matches(str(path[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean `{near[0]}`?" if near else f"known keys here: {', '.join(known)}"
        return RecipeError(f"{place}: unknown key `{dotted}`", hint=hint)
    if first["type"] == "missing":
        return RecipeError(
            f"{place}: `{dotted}` is missing",
            hint="every recipe says `version: 1`; every override, `match`",
        )
    if path == ("base", "group_size") and first["type"] != "value_error":
        problem = f"must be `auto` or a multiple of 8, not {shown(first['input'])}"
    elif first["type"] == "value_error":
        problem = f"is wrong: {first['ctx']['error']}"
    else:
        message = first["msg"].removeprefix("Input ")
        problem = f"{message[:1].lower()}{message[1:]}, not {shown(first['input'])}"
    return RecipeError(
        f"{place}: `{dotted}` {problem}", hint="see `ortho decompose --recipe-schema`"
    )


def _keys_at(path: Path_) -> list[str]:
    model: type[BaseModel] = Recipe
    for part in path:
        if isinstance(part, str) and part == "overrides":
            model = Override
        elif isinstance(part, str):
            annotation = model.model_fields[part].annotation
            if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
                return []  # a value has no keys
            model = annotation
    return list(model.model_fields)
