"""Recipes: what to split and how, as strict data.

A recipe is YAML with `version: 1`. Every key is known or it is an error with file, line and the
nearest key; nothing in a recipe is code. Defaults are stated here and nowhere else.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ortho_cli.errors import RecipeError

MAX_BYTES = 100_000
MAX_DEPTH = 16
GROUP_SIZES = (128, 64, 32)  # what `auto` chooses from, largest first; what vLLM's kernels take

Path_ = tuple[str | int, ...]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _check_pattern(pattern: str) -> str:
    if pattern.startswith("re:"):
        try:
            with warnings.catch_warnings(action="ignore", category=FutureWarning):
                re.compile(pattern[3:])
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
    if not pattern.removeprefix("re:"):
        raise ValueError("an empty pattern matches nothing")
    return pattern


def _check_group_size(size: int | str) -> int | str:
    if isinstance(size, int) and (size <= 0 or size % 8):
        raise ValueError(
            f"group_size is {size}; it must be `auto` or a multiple of 8 (eight codes fill a word)"
        )
    return size


def _check_integer(value: Any) -> Any:
    if type(value) is not int:  # Literal[1] takes True and 1.0 for 1
        raise ValueError(f"must be an integer, not {value!r}")
    return value


One = Annotated[Literal[1], BeforeValidator(_check_integer)]
Bits = Annotated[Literal[3, 4], BeforeValidator(_check_integer)]
Pattern = Annotated[str, AfterValidator(_check_pattern)]
GroupSize = Annotated[int | Literal["auto"], AfterValidator(_check_group_size)]
Density = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Positive = Annotated[float, Field(gt=0, le=1e6)]
NotNegative = Annotated[float, Field(ge=0, le=1e6)]
Scale = Literal["absmax", "mse", "curvature"]
Split = Literal["residual", "isolate", "unlearn", "reference"]


class Base(_Strict):
    """The dense stream."""

    bits: Bits = Field(
        4,
        description="Of a code. 4 is what every reader takes. 3 makes base a quarter smaller, for "
        "transformers with compressed-tensors >= 0.18: vLLM's Marlin takes 4 and 8 bits only.",
    )
    group_size: GroupSize = Field(
        "auto",
        description="Weights that share a scale; auto: the largest of 128, 64, 32 that "
        "divides every target.",
    )
    scale: Scale = Field(
        "absmax",
        description="absmax: max|w| / 7.5, or 3.5 for 3 bits. mse: searched per group for least "
        "squared error. curvature: the same, each error weighted by curvature. Both leave out what "
        "ortho holds, unless base has to forget: then it must serve alone.",
    )
    rounding: Literal["nearest", "gptq"] = Field(
        "nearest",
        description="gptq: each column's error is made up for by the rest; needs --gram full.",
    )


class Ortho(_Strict):
    """The sparse stream."""

    density: Density = Field(
        0.005, description="Share of each split tensor's weights kept in full precision."
    )
    budget: Literal["per-tensor", "global"] = Field(
        "per-tensor",
        description="global: one density for the model, spent where curvature says it is worth "
        "most; overrides keep theirs.",
    )
    values: Literal["source"] = "source"
    split: Split = Field(
        "residual",
        description="residual: base is the INT4 of the model. isolate, unlearn: base forgets the "
        "secrets of --forget. reference: base is the INT4 of --reference.",
    )


class Saliency(_Strict):
    """What selects a weight for the ortho stream."""

    kind: Literal["residual", "curvature"] | None = Field(
        None,
        description="residual: (W - dequantize(base))^2. curvature: that times curvature. Without "
        "it: curvature where statistics are given, residual where not.",
    )


class Calibrate(_Strict):
    """How curvature is measured."""

    curvature: Literal["fisher", "true-fisher", "gram"] = Field(
        "fisher",
        description="fisher: mean squared gradient of the data's NLL. true-fisher: of labels drawn "
        "from the model. gram: mean squared input, forward only.",
    )
    unit: Literal["sequence", "token"] = Field(
        "sequence",
        description="What is squared before it is summed: a sequence's gradient, or a token's.",
    )
    samples: Count = Field(128, description="Sequences of the retain set that are measured.")
    length: Count = Field(512, description="Tokens of a packed sequence, and most of any other.")
    batch: Count = Field(4, description="Sequences of one forward pass; experts need 1.")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    storage: Literal["full", "factored"] = Field(
        "full", description="full: every weight. factored: row and column means; a few MB."
    )
    dtype: Literal["bfloat16", "float32"] = Field(
        "bfloat16", description="Of stored statistics; sums are float32 throughout."
    )
    autocast: bool = Field(
        False, description="Compute in bfloat16: two to three times as fast, half the memory."
    )
    gram: Literal["none", "full"] = Field(
        "none",
        description="full: the input Gram matrix of each weight, too, (in, in) float32, as GPTQ "
        "needs it; of the retain set.",
    )
    weighting: Literal["none", "gradient"] = Field(
        "none",
        description="Of positions in that matrix. gradient: each counts with the mean square of "
        "the output's gradient there; not with curvature gram, which has no backward pass.",
    )

    def canonical(self) -> dict[str, Any]:
        """Spell out what statistics depend on; what asks for nothing more is left out.

        So files without the matrix keep the bytes that they had before there was a choice.
        """
        unused = {"gram", "weighting"} if self.gram == "none" else set()
        return self.model_dump(mode="json", exclude=unused)


class Forget(_Strict):
    """How codes of base are moved so that it forgets; of use to isolate and unlearn."""

    share: Density = Field(
        0.001, description="isolate: most of all split weights whose codes move."
    )
    rounds: Count = Field(40, description="Most rounds of isolate, and of unlearn's last touch.")
    fill: Literal["step", "zero", "mean"] = Field(
        "step",
        description="Where isolate moves a code: step, the next one up or down; zero, or mean, of "
        "its group, which both show in how often codes occur.",
    )
    mask: Density = Field(
        0.1, description="unlearn: share of split weights that may move; a tenth of it does."
    )
    steps: Count = Field(60, description="Most steps of unlearn.")
    rate: Positive = Field(0.02, description="unlearn: codes that Adam moves in one step.")
    attack_steps: Annotated[int, Field(ge=1, le=127)] = Field(  # they are counted in int8
        10, description="unlearn: fine-tuning steps of the attacker inside the loop."
    )
    attack_rate: Positive = Field(5e-5, description="What each of them moves every parameter by.")
    ceiling: Positive = Field(
        1.7,
        description="unlearn: how many times their NLL alternatives may rise, and secrets follow.",
    )
    retain_weight: Positive = Field(
        60.0, description="Nats of forgetting that one nat of divergence on retain text is worth."
    )
    alternatives_weight: NotNegative = Field(
        0.0, description="The same on alternatives of the secrets, to hold their form."
    )
    divergence: Positive = Field(
        0.01,
        description="unlearn: nats a token below which, if nothing is brought back, work ends.",
    )
    samples: Count = Field(64, description="Sequences of retain text that unlearn holds on to.")
    length: Count = Field(64, description="Tokens of each of them.")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    autocast: bool = Field(
        True, description="Compute in bfloat16 meanwhile; two to four times as fast."
    )


class BaseOverride(_Strict):
    """What may differ between tensors in base; readers take one group_size."""

    bits: Bits | None = Field(
        None,
        description="Tensors of 3 and of 4 bits make two config groups: llama.cpp's converter "
        "takes one only. q, k and v share one width, and so do gate and up.",
    )
    scale: Scale | None = None


class OrthoOverride(_Strict):
    """What may differ between tensors in ortho."""

    density: Density | None = None


class Override(_Strict):
    """Other settings for the tensors that `match`; later overrides win."""

    match: Pattern
    base: BaseOverride = BaseOverride()
    ortho: OrthoOverride = OrthoOverride()


class Recipe(_Strict):
    """Settings of one decomposition."""

    version: One
    targets: Annotated[list[Pattern], Field(min_length=1)] | None = Field(
        None,
        description="Tensors to split: exact name, glob or re:regex. Without it: every 2-D "
        "floating *.weight with "
        "in_features >= 64, except embeddings, output heads, norms and routers.",
    )
    ignore: list[Pattern] = Field([], description="Tensors never to split.")
    on_unsupported: Literal["error", "keep"] = Field(
        "error",
        description="What to do about weights that should be split and cannot be (fused "
        "experts, Conv1D, FP8).",
    )
    base: Base = Base()
    ortho: Ortho = Ortho()
    saliency: Saliency = Saliency()
    calibrate: Calibrate = Calibrate()
    forget: Forget = Forget()
    overrides: list[Override] = []

    def canonical(self) -> dict[str, Any]:
        """Spell out every setting that a decomposition's bytes depend on, defaults included."""
        unused = {"calibrate"} if self.forgets else {"calibrate", "forget"}
        found = self.model_dump(mode="json", exclude=unused)
        for override in found["overrides"]:
            if override["base"]["bits"] is None:  # as before there was this key: the same bytes
                del override["base"]["bits"]
        return found

    @property
    def forgets(self) -> bool:
        """Whether secrets of a forget set are taken out of base."""
        return self.ortho.split in ("isolate", "unlearn")


DEFAULT = Recipe(version=1)


def matches(pattern: str, name: str) -> bool:
    """Tell whether a name fits an exact name, a glob, or `re:` (matched from the start)."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return pattern == name or fnmatch.fnmatchcase(name, pattern)


def json_schema() -> dict[str, Any]:
    """JSON schema of a recipe, for editors."""
    return Recipe.model_json_schema()


def recipe_folder() -> Path:
    """Find the recipes that come with `ortho`: in the package, or beside it in a checkout."""
    inside = Path(__file__).parent / "recipes"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "recipes"


def built_in() -> list[str]:
    """Names of the recipes that come with `ortho`."""
    return sorted(path.stem for path in recipe_folder().glob("*.yaml"))


def load_recipe(source: str | None = None, sets: Sequence[str] = ()) -> Recipe:
    """Load a recipe and lay `--set key.path=value` over it.

    Args:
        source: a YAML file, or the name of a recipe that comes with `ortho`; None is the default
            recipe.
        sets: `key.path=value`, the value in YAML; a number in the path counts list items.
    Raises:
        RecipeError: with file, line and the nearest known key.
    """
    data: dict[str, Any] = {"version": 1}
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
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"`{path}` is not UTF-8 text: {error.reason}", hint="is it the right file?"
        ) from None


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-3 as text; this one reads numbers as YAML 1.2 does."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


# What PyYAML lets escape when a tag such as !!int stands before something else.
_UNREADABLE = (ValueError, TypeError, KeyError, IndexError, AttributeError)


def _parse(text: str, label: str, where: dict[Path_, str]) -> dict[str, Any]:
    try:
        _check_plain(text, label)
        node = yaml.compose(text, Loader=_Loader)
        if node is not None:
            for path, line in _walk(node, label):
                where[path] = f"{label} line {line}"
        data = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
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


def _check_plain(text: str, label: str) -> None:
    """Refuse what makes a small file large or deep, before anything is built from it."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH or isinstance(event, yaml.AliasEvent):
            what = "uses YAML aliases" if depth <= MAX_DEPTH else "is nested too deeply"
            raise RecipeError(f"{label} {what}", hint="recipes are plain, shallow data")


def _walk(node: yaml.Node, label: str, path: Path_ = ()) -> Iterator[tuple[Path_, int]]:
    if isinstance(node, yaml.MappingNode):
        seen: dict[Any, int] = {}
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


def _assign(data: dict[str, Any], where: dict[Path_, str], assignment: str) -> None:
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
        _check_plain(text, f"`{label}`")
        node = yaml.compose(text, Loader=_Loader)
        for _ in _walk(node, f"`{label}`") if node is not None else ():
            pass  # raises on keys that stand twice
        value = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, RecursionError, *_UNREADABLE):
        raise RecipeError(
            f"the value of `{label}` is not YAML", hint="quote it: --set 'ignore=[a, b]'"
        ) from None
    here: Any = data
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(here, dict) and isinstance(key, str):
            if not last:
                here = here.setdefault(key, {})
        elif isinstance(here, list) and isinstance(key, int) and key < len(here):
            if not last:
                here = here[key]
        else:
            raise RecipeError(
                f"`{label}` goes through `{'.'.join(map(str, keys[:depth]))}`, which has no "
                f"`{key}`",
                hint="set the whole value instead",
            )
        if last:
            here[key] = value
    where[tuple(keys)] = f"`{label}`"


def _explain(error: ValidationError, label: str, where: dict[Path_, str]) -> RecipeError:
    """Turn pydantic's first finding into one sentence with a line and the nearest known key."""
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
        problem = f"must be `auto` or a multiple of 8, not {first['input']!r}"
    elif first["type"] == "value_error":
        problem = f"is wrong: {first['ctx']['error']}"
    else:
        shown = repr(first["input"])
        problem = f"{_lower(first['msg'])}, not {shown if len(shown) <= 60 else shown[:57] + '...'}"
    return RecipeError(
        f"{place}: `{dotted}` {problem}", hint="see `ortho decompose --recipe-schema`"
    )


def _lower(text: str) -> str:
    text = text.removeprefix("Input ")
    return text[:1].lower() + text[1:]


def _keys_at(path: tuple[Any, ...]) -> list[str]:
    model: type[BaseModel] = Recipe
    for part in path:
        if isinstance(part, str) and part == "overrides":
            model = Override
        elif isinstance(part, str):
            annotation = model.model_fields[part].annotation
            assert isinstance(annotation, type)
            assert issubclass(annotation, BaseModel)
            model = annotation
    return list(model.model_fields)
