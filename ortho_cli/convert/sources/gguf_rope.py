"""Rotary embeddings of a GGUF file, as transformers' `rope_parameters`.

llama.cpp keeps scaling in `ARCH.rope.scaling.*`, and in tensors of divisors that it computed once:
`rope_freqs.weight` (llama3: the parameters are recovered here) and `rope_factors_long.weight` with
`rope_factors_short.weight` (longrope). `Rope.frequencies` are the angles that llama.cpp computes;
`gguf.py` compares those of the model with them:

    angle(position, i) = position * base ** (-2 i / dim) / (factor or divisor[i])

Source: llama-model.cpp, llama-context.cpp, ggml's rope_yarn; conversion/llama.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ortho_cli.convert.sources.gguf_file import GgufModel
from ortho_cli.errors import CheckpointError, shown

Array = npt.NDArray[np.float64]

FREQS = "rope_freqs.weight"
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
TENSORS = (FREQS, LONG, SHORT)
# Keys that `read_rope` reads, without `ARCH.` before them.
KEYS = frozenset({
    "rope.freq_base", "rope.freq_base_swa", "rope.dimension_count", "rope.scale_linear",
    *(f"rope.scaling.{key}" for key in (
        "type", "factor", "original_context_length", "attn_factor", "finetuned", "alpha",
        "yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow",
        "yarn_log_multiplier",
    )),
})  # fmt: skip
WIDEST = 1 << 16  # dimensions of a head: more is damage, and its angles would fill the memory
BASE = 10000.0  # llama.cpp's where a file names none
TOLERANCE = 2e-5  # relative: divisors were computed in float32, some units of the last place apart
# Llama 3.1 has 8, Llama 3.2 has 32; the others are further powers of two.
FACTORS = (8.0, 32.0, 16.0, 4.0, 2.0, 64.0, 128.0)
LENGTHS = (8192, *(1 << bits for bits in range(4, 22)))
RATIOS = (4.0, 2.0, 1.5, 1.1, 1.01)  # of high to low, down to one that fits between two angles
LOW, HIGH = 1.0, 4.0  # low_freq_factor and high_freq_factor of every Llama


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """The rotary embeddings of a file, and the angles that a model of it must have."""

    kind: str  # transformers' `rope_type`
    theta: float
    parameters: dict[str, object]  # as config.json takes them
    frequencies: Array  # (dim / 2,): of short contexts, if they differ
    attention: float  # the factor of cosines and sines
    local_theta: float | None  # of layers with a sliding window, if the file has it


@dataclass(frozen=True, slots=True, kw_only=True)
class _File:
    """The keys and tensors of a file that tell of rotary embeddings."""

    model: GgufModel
    tensors: Mapping[str, npt.NDArray[np.float32]]  # those of TENSORS that it has
    theta: float
    base: Array  # (dim / 2,) angles at position 1, without scaling
    head_dim: int
    context: int

    @property
    def original(self) -> int:
        """The context of training, 0 where the file does not say."""
        return int(self.model.number("rope.scaling.original_context_length", 0))

    def divisors(self, name: str) -> Array:
        found, angles = self.tensors.get(name), len(self.base)
        if found is None or len(found) != angles:
            size = "missing" if found is None else f"of {len(found)} values"
            what = f"has rotary embeddings of {angles} angles, and `{name}` is {size}"
            raise self.model.refusal(what)
        return found.astype(np.float64)

    def rope(
        self, kind: str, frequencies: Array, scaling: Mapping[str, object], attention: float = 1.0
    ) -> Rope:
        known = {"rope_type": kind, **scaling, "rope_theta": self.theta}
        if 2 * len(self.base) != self.head_dim:
            known["partial_rotary_factor"] = 2 * len(self.base) / self.head_dim
        local = "rope.freq_base_swa"
        return Rope(
            kind=kind,
            theta=self.theta,
            parameters=known,
            frequencies=frequencies,
            attention=attention,
            local_theta=self.model.number(local, 0) if local in self.model.own else None,
        )


def read_rope(model: GgufModel, *, head_dim: int, context: int) -> Rope:
    """Turn keys and tensors into `rope_parameters`.

    Args:
        model: the file.
        head_dim: width of a head; all of it is rotated where the file gives no other number.
        context: most positions; the model was trained on as many where the file gives no number.
    Raises:
        CheckpointError: scaling that transformers has no parameters for, or no number where one
            belongs.
    """
    theta = model.number("rope.freq_base", BASE)
    dim = int(model.number("rope.dimension_count", head_dim))
    if not 1 < theta < math.inf:
        raise _refused(model, "rope.freq_base", theta)
    if dim % 2 or not 0 < dim <= max(head_dim, dim) <= WIDEST:
        raise _refused(model, "rope.dimension_count", dim)
    file = _File(
        model=model,
        tensors={t.name: t.floats().reshape(-1) for t in model.tensors if t.name in TENSORS},
        theta=theta,
        base=theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim),
        head_dim=head_dim,
        context=context,
    )
    return _scaling(file)


def _refused(model: GgufModel, key: str, value: object) -> CheckpointError:
    return model.refusal(f"says `{key}` is {shown(value)}, which config.json cannot express")


def _scaling(file: _File) -> Rope:
    model = file.model
    for key, neutral in (  # transformers has none of these
        ("rope.scaling.alpha", (0, 1)),
        ("rope.scaling.yarn_log_multiplier", (0,)),
        ("rope.scaling.yarn_ext_factor", (1, -1)),  # -1: not set
    ):
        if (value := model.own.get(key, neutral[0])) not in neutral:
            raise _refused(model, key, value)
    kind, factor = _kind(model)
    if LONG in file.tensors or SHORT in file.tensors:
        return _longrope(file, kind=kind, factor=factor)
    if kind == "longrope" and FREQS not in file.tensors:
        raise model.refusal(f"says `rope.scaling.type` is longrope, and has no tensor `{LONG}`")
    if kind == "yarn" and FREQS not in file.tensors:
        return _yarn(file, factor)
    if FREQS in file.tensors:
        found = _divided(file, scaled=kind != "default")
    elif kind == "linear":
        found = file.rope("linear", file.base / factor, {"factor": factor})
    else:
        found = file.rope("default", file.base, {})
    for key in ("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor"):
        if not math.isclose(model.number(key, 1.0), 1.0, rel_tol=1e-6):
            raise _refused(model, key, model.own[key])
    return found


def _kind(model: GgufModel) -> tuple[str, float]:
    """Name the scaling and its factor; llama.cpp scales linearly if no type is given."""
    kind = str(model.own.get("rope.scaling.type", "linear")).lower()
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise _refused(model, "rope.scaling.type", kind)
    factor = model.number("rope.scaling.factor", model.number("rope.scale_linear", 0.0))
    if not 0 <= factor < math.inf:
        raise _refused(model, "rope.scaling.factor", factor)
    factor = factor or 1.0
    plain = kind == "none" or (kind == "linear" and factor == 1.0)
    return ("default", 1.0) if plain else (kind, factor)


def _yarn(file: _File, factor: float) -> Rope:
    original, base, number = file.original or file.context, file.base, file.model.number
    parameters: dict[str, object] = {"factor": factor, "original_max_position_embeddings": original}
    fast = number("rope.scaling.yarn_beta_fast", 32.0)
    slow = number("rope.scaling.yarn_beta_slow", 1.0)
    if (fast, slow) != (32.0, 1.0):
        parameters |= {"beta_fast": fast, "beta_slow": slow}
    usual = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    # llama.cpp multiplies by attn_factor; its converter writes yarn_attn_factor for what
    # config.json calls attention_factor.
    attention = number("rope.scaling.yarn_attn_factor", usual)
    attention *= number("rope.scaling.attn_factor", 1.0)
    if not math.isclose(attention, usual, rel_tol=1e-6):
        parameters["attention_factor"] = attention
    dim = 2 * len(base)

    def turns(count: float) -> float:
        return dim * math.log(original / (count * 2 * math.pi)) / (2 * math.log(file.theta))

    low, high = max(0, math.floor(turns(fast))), min(dim - 1, math.ceil(turns(slow)))
    ramp = np.clip((np.arange(dim // 2) - low) / max(0.001, high - low), 0, 1)
    return file.rope("yarn", base / factor * ramp + base * (1 - ramp), parameters, attention)


def _longrope(file: _File, *, kind: str, factor: float) -> Rope:
    long, short = file.divisors(LONG), file.divisors(SHORT)
    original = file.original or file.context
    ratio = file.context / original
    is_usual = factor == 1.0 or math.isclose(factor, ratio, rel_tol=1e-4)
    if kind not in ("default", "longrope") or not is_usual:
        raise _refused(file.model, "rope.scaling.factor", factor)
    parameters: dict[str, object] = {
        "long_factor": long.tolist(),
        "short_factor": short.tolist(),
        "original_max_position_embeddings": original,
    }
    usual = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
    attention = file.model.number("rope.scaling.attn_factor", usual)
    if not math.isclose(attention, usual, rel_tol=1e-6):
        parameters["attention_factor"] = attention
    return file.rope("longrope", file.base / short, parameters, attention)


def _divided(file: _File, *, scaled: bool) -> Rope:
    """Find the scaling that made the divisors of `rope_freqs.weight`."""
    values = file.divisors(FREQS)
    if np.all(values == 1.0) and not scaled:
        return file.rope("default", file.base, {})
    if not scaled and np.all(np.isfinite(values)) and values.min() >= 1.0:
        if np.all(values == values[0]):
            return file.rope("linear", file.base / values, {"factor": float(values[0])})
        found = recover_llama3(values, theta=file.theta, original=file.original)
        if found is not None:
            return file.rope("llama3", file.base / values, found)
    raise file.model.refusal(
        f"scales rotary embeddings by `{FREQS}`, and no llama3 scaling makes its values "
        f"({', '.join(f'{value:.5g}' for value in values[:3])} ... {values[-1]:.5g})"
    )


def recover_llama3(
    values: Array, *, theta: float, original: int = 0
) -> dict[str, float | int] | None:
    """Find llama3 parameters that make these divisors.

    Divisors determine only ratios (`low`, `high` and `original` can all be doubled), and few angles
    not even these. Of parameters that make the same values the usual ones are taken.

    Args:
        values: (dim / 2,) of `rope_freqs.weight`, >= 1.
        theta: base of the angles.
        original: original_max_position_embeddings, if it is known.
    Returns:
        None if there are none.
    """
    waves = 2 * math.pi * theta ** (np.arange(len(values)) / len(values))
    lengths = (original, *LENGTHS) if original > 0 else LENGTHS
    usual = [(factor, LOW, HIGH, n) for factor in _factors(values) for n in lengths]
    for factor, low, high, length in (*usual, *_fitted(values, waves)):
        made = {
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": length,
        }
        if np.allclose(llama3_divisors(made, waves), values, rtol=TOLERANCE, atol=0):
            return made
    return None


def llama3_divisors(parameters: Mapping[str, float], waves: Array) -> Array:
    """Compute the divisors of `rope_freqs.weight`, as llama.cpp's converter writes them.

    Args:
        parameters: `rope_parameters` of type llama3.
        waves: (dim / 2,) positions in which an angle turns once.
    Returns:
        (dim / 2,) float64, >= 1 where factor is.
    """
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    length = parameters["original_max_position_embeddings"]
    smooth = np.clip((length / waves - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / parameters["factor"] + smooth)


def _factors(values: Array) -> list[float]:
    """List factors to try: the largest divisor, or those above it if all angles are mixed."""
    most = float(values.max())
    whole = float(round(most))
    near = whole if math.isclose(most, whole, rel_tol=TOLERANCE) else most
    return [near, *(factor for factor in FACTORS if factor > most)]


def _fitted(values: Array, waves: Array) -> Iterator[tuple[float, float, float, int]]:
    """Solve for the parameters: between both ends, 1 / divisor is linear in 1 / wave length."""
    for factor in _factors(values):
        if factor < 1 + TOLERANCE:
            continue
        for slope, start in _lines(values, waves, factor):
            if not slope > 0 > start:
                continue
            length, high = float(-slope / start), float(1 - 1 / start)
            yield factor, LOW, round(high, 2), max(1, round(length))
            low = 8192 / length
            yield factor, low, low * high, 8192


def _lines(values: Array, waves: Array, factor: float) -> Iterator[tuple[float, float]]:
    """Fit lines to the angles between both ends: slope, and value at 0."""
    mixed = (values > 1 + TOLERANCE) & (values < factor * (1 - TOLERANCE))
    smooth = (1 / values[mixed] - 1 / factor) / (1 - 1 / factor)
    if mixed.sum() > 1:
        slope, start = np.polyfit(1 / waves[mixed], smooth, 1)
        yield float(slope), float(start)
    elif mixed.sum() == 1:  # one equation for two unknowns: the ratio of high to low is free
        for ratio in RATIOS:
            start = -1 / (ratio - 1)
            yield float((smooth[0] - start) * waves[mixed][0]), start
    elif (values < 1 + TOLERANCE).any():  # no angle between both ends: any line between them fits
        last, first = waves[values < 1 + TOLERANCE].max(), waves[values > 1 + TOLERANCE].min()
        short, long = last * (first / last) ** 0.25, last * (first / last) ** 0.75
        slope = short * long / (long - short)
        yield float(slope), float(-slope / long)
