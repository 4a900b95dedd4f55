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
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ortho_cli.convert.sources.gguf_file import Metadata, not_expressible, read_number
from ortho_cli.errors import CheckpointError, shown

Array = npt.NDArray[np.float64]

FREQS = "rope_freqs.weight"
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
TENSORS = (FREQS, LONG, SHORT)
# Keys that `read_rope` reads, without `ARCH.` before them.
KEYS = frozenset(
    ("rope.freq_base", "rope.freq_base_swa", "rope.dimension_count", "rope.scale_linear")
) | {
    f"rope.scaling.{key}"
    for key in ("type", "factor", "original_context_length", "attn_factor", "finetuned", "alpha")
}
KEYS |= {
    f"rope.scaling.yarn_{key}"
    for key in ("ext_factor", "attn_factor", "beta_fast", "beta_slow", "log_multiplier")
}
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

    path: Path
    metadata: Metadata
    tensors: Mapping[str, npt.NDArray[np.float32]]
    theta: float
    base: Array  # (dim / 2,) angles at position 1, without scaling
    context: int

    def number(self, key: str, default: float) -> float:
        return read_number(self.path, self.metadata, key, default)

    @property
    def original(self) -> int:
        """The context of training, 0 where the file does not say."""
        return int(self.number("rope.scaling.original_context_length", 0))


class _Scaling(NamedTuple):
    kind: str
    parameters: dict[str, object]
    frequencies: Array
    attention: float = 1.0


def read_rope(
    path: Path,
    metadata: Metadata,
    tensors: Mapping[str, npt.NDArray[np.float32]],
    *,
    head_dim: int,
    context: int,
) -> Rope:
    """Turn keys and tensors into `rope_parameters`.

    Args:
        path: of the file, for errors.
        metadata: the keys of its architecture, without `ARCH.`.
        tensors: those of `TENSORS` that the file has, each of one dimension.
        head_dim: width of a head; all of it is rotated where the file gives no other number.
        context: most positions; the model was trained on as many where the file gives no number.
    Raises:
        CheckpointError: scaling that transformers has no parameters for, or no number where one
            belongs.
    """
    theta = read_number(path, metadata, "rope.freq_base", BASE)
    dim = int(read_number(path, metadata, "rope.dimension_count", head_dim))
    if not 1 < theta < math.inf:
        raise _refused(path, "rope.freq_base", theta)
    if dim % 2 or not 0 < dim <= max(head_dim, dim) <= WIDEST:
        raise _refused(path, "rope.dimension_count", dim)
    base = theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    file = _File(
        path=path, metadata=metadata, tensors=tensors, theta=theta, base=base, context=context
    )
    found = _scaling(file)
    parameters = {"rope_type": found.kind, **found.parameters, "rope_theta": theta}
    if dim != head_dim:
        parameters["partial_rotary_factor"] = dim / head_dim
    has_local = "rope.freq_base_swa" in metadata
    return Rope(
        kind=found.kind,
        theta=theta,
        parameters=parameters,
        frequencies=found.frequencies,
        attention=found.attention,
        local_theta=file.number("rope.freq_base_swa", theta) if has_local else None,
    )


def _refused(path: Path, key: str, value: object) -> CheckpointError:
    return not_expressible(
        f"`{path}` says `{key}` is {shown(value)}, which config.json cannot express"
    )


def _scaling(file: _File) -> _Scaling:
    for key, neutral in (  # transformers has none of these
        ("rope.scaling.alpha", (0, 1)),
        ("rope.scaling.yarn_log_multiplier", (0,)),
        ("rope.scaling.yarn_ext_factor", (1, -1)),  # -1: not set
    ):
        if (value := file.metadata.get(key, neutral[0])) not in neutral:
            raise _refused(file.path, key, value)
    kind, factor = _kind(file)
    if LONG in file.tensors or SHORT in file.tensors:
        return _longrope(file, kind=kind, factor=factor)
    if kind == "longrope" and FREQS not in file.tensors:
        raise not_expressible(
            f"`{file.path}` says `rope.scaling.type` is longrope, and has no tensor `{LONG}`"
        )
    if kind == "yarn" and FREQS not in file.tensors:
        return _yarn(file, factor)
    if FREQS in file.tensors:
        found = _divided(file, scaled=kind != "default")
    elif kind == "linear":
        found = _Scaling("linear", {"factor": factor}, file.base / factor)
    else:
        found = _Scaling("default", {}, file.base)
    for key in ("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor"):
        if not math.isclose(file.number(key, 1.0), 1.0, rel_tol=1e-6):
            raise _refused(file.path, key, file.metadata[key])
    return found


def _kind(file: _File) -> tuple[str, float]:
    """Name the scaling and its factor; llama.cpp scales linearly if no type is given."""
    kind = str(file.metadata.get("rope.scaling.type", "linear")).lower()
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise _refused(file.path, "rope.scaling.type", kind)
    factor = file.number("rope.scaling.factor", file.number("rope.scale_linear", 0.0))
    if not 0 <= factor < math.inf:
        raise _refused(file.path, "rope.scaling.factor", factor)
    factor = factor or 1.0
    plain = kind == "none" or (kind == "linear" and factor == 1.0)
    return ("default", 1.0) if plain else (kind, factor)


def _yarn(file: _File, factor: float) -> _Scaling:
    original, base = file.original or file.context, file.base
    parameters: dict[str, object] = {"factor": factor, "original_max_position_embeddings": original}
    fast = file.number("rope.scaling.yarn_beta_fast", 32.0)
    slow = file.number("rope.scaling.yarn_beta_slow", 1.0)
    if (fast, slow) != (32.0, 1.0):
        parameters |= {"beta_fast": fast, "beta_slow": slow}
    usual = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    # llama.cpp multiplies by attn_factor; its converter writes yarn_attn_factor for what
    # config.json calls attention_factor.
    attention = file.number("rope.scaling.yarn_attn_factor", usual)
    attention *= file.number("rope.scaling.attn_factor", 1.0)
    if not math.isclose(attention, usual, rel_tol=1e-6):
        parameters["attention_factor"] = attention
    dim = 2 * len(base)

    def turns(count: float) -> float:
        return dim * math.log(original / (count * 2 * math.pi)) / (2 * math.log(file.theta))

    low, high = max(0, math.floor(turns(fast))), min(dim - 1, math.ceil(turns(slow)))
    ramp = np.clip((np.arange(dim // 2) - low) / max(0.001, high - low), 0, 1)
    return _Scaling("yarn", parameters, base / factor * ramp + base * (1 - ramp), attention)


def _longrope(file: _File, *, kind: str, factor: float) -> _Scaling:
    both = [file.tensors.get(name) for name in (LONG, SHORT)]
    for name, found in zip((LONG, SHORT), both, strict=True):
        if found is None or len(found) != len(file.base):
            size = "missing" if found is None else f"of {len(found)} values"
            raise not_expressible(
                f"`{file.path}` has rotary embeddings of {len(file.base)} angles, and `{name}` is "
                f"{size}"
            )
    long, short = ([float(value) for value in found] for found in both if found is not None)
    original = file.original or file.context
    ratio = file.context / original
    is_usual = factor == 1.0 or math.isclose(factor, ratio, rel_tol=1e-4)
    if kind not in ("default", "longrope") or not is_usual:
        raise _refused(file.path, "rope.scaling.factor", factor)
    parameters: dict[str, object] = {
        "long_factor": long,
        "short_factor": short,
        "original_max_position_embeddings": original,
    }
    usual = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
    attention = file.number("rope.scaling.attn_factor", usual)
    if not math.isclose(attention, usual, rel_tol=1e-6):
        parameters["attention_factor"] = attention
    return _Scaling("longrope", parameters, file.base / np.asarray(short), attention)


def _divided(file: _File, *, scaled: bool) -> _Scaling:
    """Find the scaling that made the divisors of `rope_freqs.weight`."""
    values = file.tensors[FREQS].astype(np.float64)
    if len(values) != len(file.base):
        raise not_expressible(
            f"`{file.path}` has rotary embeddings of {len(file.base)} angles, and `{FREQS}` is of "
            f"{len(values)} values"
        )
    if np.all(values == 1.0) and not scaled:
        return _Scaling("default", {}, file.base)
    if not scaled and np.all(np.isfinite(values)) and values.min() >= 1.0:
        if np.all(values == values[0]):
            return _Scaling("linear", {"factor": float(values[0])}, file.base / values)
        found = recover_llama3(values, theta=file.theta, original=file.original)
        if found is not None:
            return _Scaling("llama3", {**found}, file.base / values)
    raise not_expressible(
        f"`{file.path}` scales rotary embeddings by `{FREQS}`, and no llama3 scaling makes its "
        f"values ({', '.join(f'{value:.5g}' for value in values[:3])} ... {values[-1]:.5g})"
    )


def divide_llama3(
    *, theta: float, dim: int, factor: float, low: float, high: float, original: float
) -> Array:
    """Compute the divisors that llama.cpp's converter writes for llama3 scaling.

    Args:
        theta: base of the angles.
        dim: width that is rotated.
        factor: of the lowest frequencies.
        low: low_freq_factor.
        high: high_freq_factor.
        original: original_max_position_embeddings.
    Returns:
        (dim / 2,) float64.
    """
    waves = 2 * math.pi * theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
    smooth = np.clip((original / waves - low) / (high - low), 0, 1)
    divisors: Array = 1 / ((1 - smooth) / factor + smooth)
    return divisors


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
    dim = 2 * len(values)
    tried = _usual(values, original)
    for factor, low, high, length in (*tried, *_fitted(values, theta)):
        made = divide_llama3(
            theta=theta, dim=dim, factor=factor, low=low, high=high, original=length
        )
        if np.allclose(made, values, rtol=TOLERANCE, atol=0):
            return {
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": length,
            }
    return None


Llama3 = tuple[float, float, float, int]


def _factors(values: Array) -> list[float]:
    """List factors to try: the largest divisor, or those above it if all angles are mixed."""
    most = float(values.max())
    whole = float(round(most))
    near = whole if math.isclose(most, whole, rel_tol=TOLERANCE) else most
    return [near, *(factor for factor in FACTORS if factor > most)]


def _usual(values: Array, original: int) -> Iterator[Llama3]:
    for factor in _factors(values):
        for length in (original, *LENGTHS) if original > 0 else LENGTHS:
            yield factor, LOW, HIGH, length


def _fitted(values: Array, theta: float) -> Iterator[Llama3]:
    """Solve for the parameters: between both ends, 1 / divisor is linear in 1 / wave length."""
    waves = 2 * math.pi * theta ** (np.arange(len(values)) / len(values))
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
    elif (
        values < 1 + TOLERANCE
    ).any():  # no angle is between both ends: any line that separates them fits
        last, first = waves[values < 1 + TOLERANCE].max(), waves[values > 1 + TOLERANCE].min()
        short, long = last * (first / last) ** 0.25, last * (first / last) ** 0.75
        slope = short * long / (long - short)
        yield float(slope), float(-slope / long)
