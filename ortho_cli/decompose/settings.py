"""Settings of a recipe: every key with its type, default and meaning, as strict pydantic models."""

from __future__ import annotations

import fnmatch
import re
import warnings
from collections.abc import Collection, Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from ortho_cli.split import roundings

GROUP_SIZES = (128, 64, 32)  # of `auto`, largest first: those that vLLM's kernels take


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


def _check_integer(value: object) -> object:
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
    """Base: the dense stream."""

    bits: Bits = Field(
        4,
        description="Per code. Every reader takes 4. 3 makes base a quarter smaller, for "
        "transformers with compressed-tensors >= 0.18: vLLM's Marlin takes 4 and 8 bits only.",
    )
    group_size: GroupSize = Field(
        "auto",
        description="Weights that share a scale; auto: the largest of 128, 64, 32 that "
        "divides every target.",
    )
    scale: Scale = Field(
        "absmax",
        description="absmax: max abs(w) / 7.5, or 3.5 for 3 bits. mse: searched per group for "
        "least squared error. curvature: the same, each error weighted by curvature.",
    )
    rounding: roundings.Name | Literal["tuned"] = Field(
        "nearest",
        description="gptq: each column's error is made up for by the rest; needs --gram full. "
        "tuned: from there codes and scales learn block by block, on --data.",
    )
    alone: bool = Field(
        False,
        description="Whether searched scales serve ortho's positions, too: better at alpha 0, "
        "worse at alpha 1. Not with gptq or tuned; what forgets is always alone.",
    )


class Ortho(_Strict):
    """Ortho: the sparse stream."""

    density: Density = Field(
        0.005, description="Share of each split tensor's weights kept in full precision."
    )
    structure: Literal["points", "columns"] = Field(
        "points",
        description="What is kept: single weights, or whole input columns, so that ortho at alpha "
        "1 is a LoRA; density then counts columns.",
    )
    max_rank: Annotated[int, Field(ge=1, le=1_000_000)] | None = Field(
        None, description="The most columns of a weight, as a server bounds the rank of a LoRA."
    )
    share: bool = Field(
        False,
        description="Whether weights that servers fuse (q, k, v; gate, up) keep the same columns, "
        "which halves the A of a LoRA; chosen by the saliency of all of them.",
    )
    budget: Literal["per-tensor", "global"] = Field(
        "per-tensor",
        description="global: one density for the model, spent where curvature says it is worth "
        "most; overrides keep theirs.",
    )
    layout: Literal["csr", "compact"] = Field(
        "csr",
        description="How ortho is stored. csr: row pointers, columns, values. compact: without "
        "most indices: whole columns, and gaps of one byte.",
    )
    values: Literal["source", "int8"] = Field(
        "source",
        description="source: the source's weights, bit for bit. int8: what base lacks of them, in "
        "255 steps; needs layout compact or structure columns, and a split that does not forget.",
    )
    split: Split = Field(
        "residual",
        description="residual: base is the INT4 of the model. isolate, unlearn: base forgets the "
        "secrets of --forget. reference: base is the INT4 of --reference.",
    )


class Saliency(_Strict):
    """The measure that selects weights for ortho."""

    kind: Literal["residual", "curvature"] | None = Field(
        None,
        description="residual: (W - dequantize(base))^2. curvature: that times curvature. Without "
        "it: curvature where statistics are given, residual where not.",
    )


class Calibrate(_Strict):
    """Measuring of curvature, by `ortho calibrate`."""

    curvature: Literal["fisher", "true-fisher", "gram"] = Field(
        "fisher",
        description="fisher: mean squared gradient of the data's NLL. true-fisher: of labels drawn "
        "from the model. gram: mean squared input, forward only.",
    )
    unit: Literal["sequence", "token"] = Field(
        "sequence",
        description="Gradients are squared per sequence, or per token, before they are summed.",
    )
    samples: Count = Field(128, description="Sequences of the retain set that are measured.")
    length: Count = Field(512, description="Tokens of a packed sequence, and most of any other.")
    batch: Count = Field(4, description="Sequences of one forward pass.")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        0, description="Of the choice of sequences, and of text that the model writes."
    )
    storage: Literal["full", "factored"] = Field(
        "full", description="full: every weight. factored: row and column means; a few MB."
    )
    dtype: Literal["bfloat16", "float32"] = Field(
        "bfloat16", description="Of stored statistics; sums are float32 throughout."
    )
    autocast: bool | Literal["auto"] = Field(
        False,
        description="Compute in bfloat16: two to three times as fast, half the memory. auto: where "
        "the device has instructions for it; others take 8 times as long as in float32.",
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
    experts: Literal["routed", "all"] = Field(
        "routed",
        description="Tokens that an expert is measured on. all: every one, also where the router "
        "sends it elsewhere; for curvature gram, and as slow as a dense model of all weights.",
    )
    min_tokens: Count = Field(
        1,
        description="Routed tokens below which an expert takes the mean of its layer's others.",
    )

    def canonical(self) -> dict[str, object]:
        """List the settings that statistics depend on.

        Those of the Gram matrix are left out where there is none, and those of experts where they
        are the defaults, so that such files have the same bytes as before these keys existed.
        """
        unused = {"gram", "weighting"} if self.gram == "none" else set()
        unused |= {"experts"} if self.experts == "routed" else set()
        unused |= {"min_tokens"} if self.min_tokens == 1 else set()
        return self.model_dump(mode="json", exclude=unused)


class Tune(_Strict):
    """Learning of codes and scales, with base.rounding tuned."""

    steps: Count = Field(100, description="Steps of sign descent that each block takes.")
    rate: Positive = Field(
        0.008,
        description="How far the first step moves each weight, in codes; the rate falls to 0.",
    )
    scale_rate: NotNegative = Field(
        0.002,
        description="Share by which the first step changes each scale; this rate falls to 0, too.",
    )
    batch: Count = Field(4, description="Sequences of one step.")
    samples: Count = Field(128, description="Sequences of the data, a multiple of `batch`.")
    length: Count = Field(512, description="Tokens of each of them.")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        0, description="Of the choice and order of sequences."
    )


class Forget(_Strict):
    """Moving of codes so that base forgets, with ortho.split isolate or unlearn."""

    support: Literal["points", "columns"] = Field(
        "points",
        description="Where codes may move: anywhere, or in chosen columns alone, as many of each "
        "weight as ortho keeps. Goes with the ortho.structure of the same name.",
    )
    share: Density = Field(
        0.001, description="isolate: the largest share of split weights whose codes move."
    )
    rounds: Count = Field(
        40, description="The largest number of rounds of isolate, which also ends unlearn."
    )
    fill: Literal["step", "zero", "mean"] = Field(
        "step",
        description="Where isolate moves a code: step, the next one up or down; zero, or mean, of "
        "its group, which both show in how often codes occur.",
    )
    mask: Density = Field(
        0.1,
        description="unlearn: share of split weights that may move; a few percent of it do. With "
        "support columns it is ortho.density.",
    )
    steps: Count = Field(60, description="Most steps of unlearn.")
    step_damage: Positive = Field(
        0.0003,
        description="unlearn: nats per sequence that one step may cost retained text, as its "
        "Fisher predicts.",
    )
    attack_steps: Annotated[int, Field(ge=0, le=127)] | None = Field(  # they are counted in int8
        None,
        description="unlearn: fine-tuning steps of the attacker inside the loop; 0: no attacker. "
        "Without it 10, and 0 where secrets are sentences that alternatives phrase otherwise.",
    )
    attack_rate: Positive = Field(5e-5, description="How far each of them moves every parameter.")
    retain_weight: Positive = Field(
        200.0, description="Nats of forgetting that one nat of divergence on text is worth."
    )
    divergence: Positive = Field(
        0.02,
        description="unlearn: nats per token on the worst kind of text, below which work ends "
        "where no secret is above its goal.",
    )
    samples: Count = Field(
        96, description="Sequences of text of each kind to hold on to; a quarter is for the check."
    )
    length: Count = Field(64, description="Tokens of each of them.")
    damage: Annotated[float, Field(ge=1, le=1e6)] = Field(
        1.05,
        description="Perplexity over that before forgetting, on text of the worst kind that was "
        "not held on to, above which work ends without an artifact.",
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        0, description="Of every draw: text, ranks, halves, alternatives of each round."
    )
    autocast: bool | Literal["auto"] = Field(
        "auto",
        description="Compute in bfloat16 meanwhile, two to four times as fast. auto: where the "
        "device has instructions for it.",
    )


class BaseOverride(_Strict):
    """Settings of base that may differ between tensors; readers take one group_size."""

    bits: Bits | None = Field(
        None,
        description="Tensors of 3 and of 4 bits make two config groups: llama.cpp's converter "
        "takes one only. q, k and v share one width, and so do gate and up.",
    )
    scale: Scale | None = None


class OrthoOverride(_Strict):
    """Settings of ortho that may differ between tensors."""

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
    on_unsupported: Literal["error", "keep", "split"] = Field(
        "error",
        description="What to do about weights that should be split and cannot be (fused "
        "experts, Conv1D, FP8). keep: carry them over. split: stop, too, but split stacked experts "
        "one by one also where vLLM alone loads them so, and not transformers.",
    )
    base: Base = Base()
    ortho: Ortho = Ortho()
    saliency: Saliency = Saliency()
    calibrate: Calibrate = Calibrate()
    tune: Tune = Tune()
    forget: Forget = Forget()
    overrides: list[Override] = []

    def canonical(self) -> dict[str, object]:
        """List every setting that a decomposition's bytes depend on, defaults included."""
        unused = {"calibrate"} if self.forgets else {"calibrate", "forget"}
        if self.base.rounding != "tuned":
            unused.add("tune")
        found = self.model_dump(mode="json", exclude=unused)
        for override in found["overrides"]:
            if override["base"]["bits"] is None:  # the bytes are those of before this key existed
                del override["base"]["bits"]
        if not unused & {"forget"} and self.forget.support == "points":
            del found["forget"]["support"]
        if not self.base.alone:
            del found["base"]["alone"]
        if self.ortho.layout == "csr":
            del found["ortho"]["layout"]  # likewise
        if self.ortho.structure == "points":
            del found["ortho"]["structure"]
        if self.ortho.max_rank is None:
            del found["ortho"]["max_rank"]
        if not self.ortho.share:
            del found["ortho"]["share"]
        return found

    @property
    def compensates(self) -> bool:
        """Whether each column's codes compensate the errors of those before it."""
        return self.base.rounding != "nearest"

    @property
    def weighs(self) -> bool:
        """Whether it uses curvature, but for rounding."""
        scales = [self.base.scale, *(override.base.scale for override in self.overrides)]
        return "curvature" in (self.saliency.kind, *scales)

    @property
    def can_measure(self) -> bool:
        """Whether `ortho decompose` measures what it uses where no statistics are given.

        Inputs alone are measured: that takes seconds.
        """
        plain = self.ortho.split == "residual" and not self.compensates
        return plain and self.weighs and self.calibrate.curvature == "gram"

    @property
    def keeps_columns(self) -> bool:
        """Whether ortho holds whole columns."""
        return self.ortho.structure == "columns"

    @property
    def forgets(self) -> bool:
        """Whether base forgets the secrets of a forget set."""
        return self.ortho.split in ("isolate", "unlearn")


def fold_names(names: Collection[str], others: Collection[str]) -> list[str]:
    """Fold names that differ in numbers into patterns that match them and none of the others.

    Args:
        names: what the patterns must match.
        others: what they must not match.
    Returns:
        A `re:` pattern for each kind of name; exact names where a pattern would match too much.
    """
    kinds: dict[str, list[str]] = {}
    for name in sorted(names):
        parts = re.split(r"(?<![A-Za-z0-9])(\d+)(?![A-Za-z0-9])", name)
        # `[.]` rather than a backslash, which shells, YAML and JSON each interpret.
        folded = "".join(
            "[0-9]+" if i % 2 else re.sub(r"[^\w/:-]", lambda found: f"[{found[0]}]", part)
            for i, part in enumerate(parts)
        )
        kinds.setdefault(f"re:{folded}$", []).append(name)
    found: list[str] = []
    for pattern, alike in kinds.items():
        odd = any(set(name) & set("^\\[]") for name in alike)  # no class of one character
        exact = odd or len(alike) == 1 or any(matches(pattern, other) for other in others)
        found += alike if exact else [pattern]
    return found


def matches(pattern: str, name: str) -> bool:
    """Tell whether a name matches an exact name, a glob, or `re:` (from the start of the name)."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return pattern == name or fnmatch.fnmatchcase(name, pattern)


class Patterns:
    """Patterns of a recipe, compiled once; exact names are looked up in a table.

    A recipe that a program wrote can name tens of thousands of tensors.
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        """Take patterns as `matches` does."""
        self._patterns = patterns
        self._exact: dict[str, list[int]] = {}
        self._open: list[tuple[int, re.Pattern[str]]] = []
        for number, pattern in enumerate(patterns):
            if not pattern.startswith("re:"):
                self._exact.setdefault(pattern, []).append(number)
                if not any(character in pattern for character in "*?["):
                    continue
                pattern = "re:" + fnmatch.translate(pattern)
            with warnings.catch_warnings(action="ignore", category=FutureWarning):
                self._open.append((number, re.compile(pattern[3:])))

    def numbers(self, name: str) -> list[int]:
        """List the numbers of the patterns that a name matches, from 0, in order."""
        found = set(self._exact.get(name, ()))
        found.update(number for number, pattern in self._open if pattern.match(name))
        return sorted(found)

    def matching(self, name: str) -> list[str]:
        """List the patterns that a name matches."""
        return [self._patterns[number] for number in self.numbers(name)]
