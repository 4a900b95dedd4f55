"""What alpha = 1 promises of a weight, checked on the words that base and ortho hold of it.

    kept position:   value = the source's weight, bit for bit
                     or, with ortho.split unlearn, scale * q of the source's own nearest code q
                     or, with ortho.values int8, the source's weight to within one step of the value
    other position:  q = the source's own nearest code, where codes are rounded to nearest

The second rule is also the promise of forgetting: a code that is not the source's own is at a
position that ortho holds. Numpy only, and no function of what made the words: a mistake there is
not repeated here.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from ortho_cli.errors import ArtifactError
from ortho_cli.split.task import Array, Figures

Float = npt.NDArray[np.float32]

SMALLEST = {"BF16": 2.0**-133, "F16": 2.0**-24, "F32": 2.0**-149}  # last place of subnormals
# Figures are sums in float32 and float64, in another order than here.
TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What must hold of one weight."""

    name: str
    dtype: str  # of the source: BF16, F16 or F32
    bits: int
    nearest: bool  # codes outside of ortho are the source's own
    own_code: bool = False  # where a code was moved, alpha = 1 may be the source's own code
    step: float | None = None  # of int8 values
    column_steps: Array | None = None  # (in,) float64: of those of whole columns


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Whole rows of one weight, as they are in the source and as they were written."""

    first: int  # number of the first row
    source: Array  # (rows, in) words of the source's dtype
    packed: npt.NDArray[np.int32]  # (rows, in * bits / 32)
    scales: Array  # (rows, groups) words of the source's dtype
    positions: npt.NDArray[np.int64]  # flat in these rows, ascending: what ortho holds
    values: Array  # words at them, decoded where ortho is compact


@dataclass(slots=True)
class Sums:
    """Squares added up in float64 over rows that were checked."""

    signal: float = 0.0
    noise: float = 0.0  # at alpha 0
    noise_kept: float = 0.0  # of it, what alpha 1 takes away
    weights: int = 0
    moved: int = 0  # codes that are not the source's own

    def add(self, other: Sums) -> None:
        """Add what other rows gave."""
        for one in fields(self):
            setattr(self, one.name, getattr(self, one.name) + getattr(other, one.name))


def widen(words: Array, dtype: str) -> Float:
    """Read words of BF16, F16 or F32 as float32."""
    if dtype == "BF16":
        return (words.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return words.view(np.float16 if dtype == "F16" else np.float32).astype(np.float32)


def round_to(values: Float, dtype: str) -> Float:
    """Round float32 to the nearest value of BF16 or F16, ties to even; F32 stays."""
    if dtype == "F32":
        return values
    if dtype == "F16":
        return values.astype(np.float16).astype(np.float32)
    words = values.view(np.uint32)
    # Half of the last place that stays, less one where that place is even: ties go to even.
    rounded = (words + np.uint32(0x7FFF) + ((words >> np.uint32(16)) & np.uint32(1))) >> 16
    return (rounded << np.uint32(16)).view(np.float32)


def unpack(packed: npt.NDArray[np.int32], bits: int, columns: int) -> npt.NDArray[np.int8]:
    """Read codes from packed words: code i of a row is in bits `bits * i` on, plus 2^(bits - 1)."""
    stream = np.unpackbits(np.ascontiguousarray(packed).view(np.uint8), axis=1, bitorder="little")[
        :, : bits * columns
    ].reshape(packed.shape[0], columns, bits)
    weights = (1 << np.arange(bits)).astype(np.uint8)
    return (stream @ weights).astype(np.int8) - np.int8(1 << (bits - 1))


def check_rows(rules: Rules, rows: Rows) -> Sums:
    """Hold what was written of some rows against the source.

    Returns:
        What they add to the figures of the weight.
    Raises:
        ArtifactError: a value or code is neither of those that the rules allow; names the weight,
            the place and both values.
    """
    source = widen(rows.source, rules.dtype)
    wide, codes, base = _base_of(rules, rows)
    with np.errstate(over="ignore", invalid="ignore"):
        half = 1 << (rules.bits - 1)
        nearest = np.clip(np.rint(source / wide), -half, half - 1)
        own = round_to(nearest * wide, rules.dtype)
    moved = codes != nearest
    flat, at = source.reshape(-1), rows.positions
    values = widen(rows.values, rules.dtype)
    sound = rows.values == rows.source.reshape(-1)[at]
    if rules.own_code:
        sound |= values == own.reshape(-1)[at]
    if rules.step is not None or rules.column_steps is not None:
        sound |= _within_a_step(rules, values, flat[at], base.reshape(-1)[at], wide, at)
    if not sound.all():
        bad = int(np.flatnonzero(~sound)[0])
        neither, allowed = "not", "as it is"
        if rules.own_code or rules.step or rules.column_steps is not None:
            neither, allowed = "neither", "nor its own code" if rules.own_code else "nor near it"
        why = f", which is {neither} the source's weight {flat[at[bad]]:g} {allowed}"
        raise _wrong(rules, rows, int(at[bad]), f"ortho holds {values[bad]:g}", why)
    if rules.nearest:
        loose = moved.reshape(-1).copy()
        loose[at] = False
        if loose.any():
            bad = int(np.flatnonzero(loose)[0])
            own_code = f"where the source's own is {int(nearest.flat[bad])}"
            why = f" {own_code}, and ortho does not hold that place"
            raise _wrong(rules, rows, bad, f"base holds code {codes.flat[bad]}", why)
    lost = np.square(base - source, dtype=np.float64)
    kept = np.square(values - flat[at], dtype=np.float64)
    return Sums(
        signal=float(np.square(source, dtype=np.float64).sum()),
        noise=float(lost.sum()),
        noise_kept=float(lost.reshape(-1)[at].sum() - kept.sum()),
        weights=source.size,
        moved=int(moved.sum()),
    )


def _base_of(rules: Rules, rows: Rows) -> tuple[Float, npt.NDArray[np.int8], Float]:
    """Read scale, code and value of each weight of base, (rows, in)."""
    columns = rows.source.shape[1]
    scales = widen(rows.scales, rules.dtype)
    wide = np.repeat(scales, columns // scales.shape[1], axis=1)
    codes = unpack(rows.packed, rules.bits, columns)
    with np.errstate(over="ignore", invalid="ignore"):
        return wide, codes, round_to(codes.astype(np.float32) * wide, rules.dtype)


def _within_a_step(
    rules: Rules, values: Float, source: Float, base: Float, wide: Float, at: Array
) -> npt.NDArray[np.bool_]:
    """Tell where an int8 value v is no further off than the next one: 2 (|v| + 1) steps / 2.

    Of whole columns steps are even: half a step, and what rounding the scale itself may cost.
    """
    last = np.abs(source) * 2.0**-7 + SMALLEST[rules.dtype]  # places of a BF16, and of subnormals
    if rules.column_steps is not None:
        close: npt.NDArray[np.bool_] = (
            np.abs(values.astype(np.float64) - source)
            <= rules.column_steps[at % wide.shape[1]] * (0.5 + 2.0**-6) + last
        )
        return close
    unit = (rules.step or 0.0) * wide.reshape(-1)[at].astype(np.float64)
    number = np.sqrt(np.abs(values.astype(np.float64) - base) / unit)
    room = (number + 1.0) * unit + last
    found: npt.NDArray[np.bool_] = np.abs(values - source) <= room
    return found


def largest_step(rules: Rules, rows: Rows) -> float:
    """Find the step of int8 values by the largest of them, which is 127: |value - base| / 127^2."""
    wide, _, base = _base_of(rules, rows)
    far = np.abs(widen(rows.values, rules.dtype).astype(np.float64) - base.flat[rows.positions])
    return float((far / wide.flat[rows.positions]).max(initial=0.0)) / 127**2


def largest_steps(rules: Rules, rows: Rows) -> Array:
    """Find the scale of each whole column of int8 values: the largest is 127 of them; (in,)."""
    found = np.zeros(rows.source.shape[1])
    _, _, base = _base_of(rules, rows)
    far = np.abs(widen(rows.values, rules.dtype).astype(np.float64) - base.flat[rows.positions])
    np.maximum.at(found, rows.positions % found.size, far / 127)
    return found


def check_figures(name: str, told: Figures, sums: Sums) -> None:
    """Hold the figures of a weight against what all of its rows add up to.

    Args:
        name: of the weight.
        told: signal, noise and noise_kept.
        sums: over every row of it.
    Raises:
        ArtifactError: names the weight and both values.
    """
    for key in ("signal", "noise", "noise_kept"):
        mine, other = getattr(sums, key), getattr(told, key)
        whole = sums.signal if key == "signal" else sums.noise
        if not abs(mine - other) <= TOLERANCE * whole + 1e-9 * sums.signal:
            raise ArtifactError(
                f"`{name}` has {key} {mine:.6g} by what was written, and {other:.6g} in the report",
                hint=HINT,
            )


HINT = "do not use this artifact: decompose again, and report it if that happens twice"


def _wrong(rules: Rules, rows: Rows, flat: int, what: str, why: str) -> ArtifactError:
    columns = rows.source.shape[1]
    place = [rows.first + flat // columns, flat % columns]
    return ArtifactError(f"{what} of `{rules.name}` at {place}{why}", hint=HINT)
