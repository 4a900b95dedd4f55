"""The split of a tile in compiled loops: what `ops` and `scales` compute, to the bit.

They walk a tile a dozen times, once for each operation; here a row is read once and stays in
the inner caches until it is packed. numba compiles a loop when it is first called with these
dtypes, for this processor, and keeps the machine code beside this file.

Weights and curvature come as the words they are stored in: uint16 is bfloat16, int16 is float16 and
uint32 is float32. All arithmetic is float32, no product is contracted with a sum, and only sums of
squares, in float64, may be taken in another order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from ortho_cli.split.task import LANES

# Squares that are added in float32 before they go into a sum in float64.
STRETCH = 512


class Words(NamedTuple):
    """The weights of a tile."""

    raw: Any  # (rows, in) words
    group_size: int  # divides in; a multiple of 8
    floor: np.float32  # the smallest scale
    exponent: int  # exponent bits of a word: from there on it is infinite or NaN


class Vectors(NamedTuple):
    """Curvature, or its root, of row o and column i is rows[o] * columns[i]."""

    rows: Any  # (rows,) float32
    columns: Any  # (in,) float32


class Base(NamedTuple):
    """Where base of a tile goes."""

    packed: Any  # (rows, in / 2) uint8, the low half of each byte first
    scales: Any  # (rows, in / group_size) words
    given: bool  # scales are given, and not made here


class Candidates(NamedTuple):
    """Where what may be kept goes; as long as any tile may need."""

    bar: np.float32  # below the k-th largest saliency
    start: int  # flat index of the first weight
    indices: Any  # flat
    saliency: Any  # float32
    values: Any  # words


class RowBuffers(NamedTuple):
    """Room for one row."""

    floats: Any  # (2, in) float32
    bytes: Any  # (2, in) uint8


_FLOAT, _HALF, _I16, _I32 = ir.FloatType(), ir.HalfType(), ir.IntType(16), ir.IntType(32)


@intrinsic
def widen(context, word):
    """Read a word as float32, which itself is one."""

    def generate(context, builder, signature, arguments):
        (given,) = arguments
        if signature.args[0] == types.uint16:
            wide = builder.shl(builder.zext(given, _I32), ir.Constant(_I32, 16))
            return builder.bitcast(wide, _FLOAT)
        if signature.args[0] == types.float32:
            return given
        if signature.args[0] == types.int16:
            return builder.fpext(builder.bitcast(given, _HALF), _FLOAT)
        return builder.bitcast(given, _FLOAT)

    return types.float32(word), generate


@intrinsic
def narrow(context, value, like):
    """Round float32 to the kind of word that `like` is, to nearest, ties to even; no NaN."""

    def generate(context, builder, signature, arguments):
        given = arguments[0]
        if signature.args[1] == types.int16:
            return builder.bitcast(builder.fptrunc(given, _HALF), _I16)
        bits = builder.bitcast(given, _I32)
        if signature.args[1] == types.uint32:
            return bits
        odd = builder.and_(builder.lshr(bits, ir.Constant(_I32, 16)), ir.Constant(_I32, 1))
        up = builder.add(bits, builder.add(odd, ir.Constant(_I32, 0x7FFF)))
        return builder.trunc(builder.lshr(up, ir.Constant(_I32, 16)), _I16)

    return like(types.float32, like), generate


@intrinsic
def _magnitude(context, word):
    """Take the sign off: what is left orders like the number it stands for, NaN above infinity."""

    def generate(context, builder, signature, arguments):
        (given,) = arguments
        mask = 0x7FFFFFFF if signature.args[0] == types.uint32 else 0x7FFF
        return builder.and_(given, ir.Constant(given.type, mask))

    return word(word), generate


@njit(fastmath={"reassoc"}, error_model="numpy")
def _wide_squares(words):
    total = 0.0
    for i in range(words.size):
        wide = np.float64(widen(words[i]))
        total += wide * wide
    return total


@njit(fastmath={"reassoc"}, error_model="numpy")
def _squares(words):
    """Sum squares in float32, which over some hundreds is as exact as decibels need and faster."""
    total = 0.0
    for start in range(0, words.size, STRETCH):
        some = words[start : start + STRETCH]
        part = np.float32(0.0)
        for i in range(some.size):
            wide = widen(some[i])
            part += wide * wide
        if np.float32(1e-30) < part < np.float32(np.inf):
            total += np.float64(part)
        else:
            total += _wide_squares(some)
    return total


def kept(compiler: Callable[..., Any], **options: Any) -> Callable[[Any], Any]:
    """Make what compiles a loop, and keeps it on disk where that can be."""

    def compiled(function: Any) -> Any:
        try:
            return compiler(cache=True, error_model="numpy", **options)(function)
        except (RuntimeError, OSError):  # no folder for it can be written to, or the disk is full
            return compiler(error_model="numpy", **options)(function)

    return compiled


def call(loop: Any, *arguments: Any) -> Any:
    """Call a loop that `kept` made."""
    try:
        return loop(*arguments)
    except OSError:  # it was compiled, and could not be kept: the disk is full
        return loop(*arguments)


# Longer than 60 lines: in parts, called from here, it runs at half the speed.
@kept(njit, nogil=True)  # others may run meanwhile
def search_tile(  # noqa: C901 - see above
    tile: Any, factors: Any, curvature: Any, vectors: Any, held: Any, scales: Any, buffers: Any
) -> None:
    """Search each group's scale for the least squared error of what base has to stand for.

    What `scales.searched_scales` finds; a scale of weights that are not
    finite, or weighed by what is no curvature, is of no use.

    Args:
        tile: `Words`.
        factors: (n,) float32: absmax's scale times each of them is tried.
        curvature: (rows, in) words of h, or None.
        vectors: `Vectors` of h, or None; without either, errors count alike.
        held: (rows, in) uint8: 1 where ortho holds the weight, which counts for nothing; or None.
        scales: (rows, in / group_size) words; where `held` is given they are to be beaten, and
            groups of which ortho holds nothing keep them.
        buffers: (2, n) float32, n the next multiple of 16 from group_size on.
    """
    raw, group_size = tile.raw, tile.group_size
    weights, shares, lanes = buffers[0], buffers[1], np.empty(LANES, np.float32)
    weights[group_size:], shares[group_size:] = 0, 0
    size, bits, parts = weights.size, weights.view(np.uint32), shares.view(np.uint32)
    for row in range(raw.shape[0]):
        for group in range(scales.shape[1]):
            first = group * group_size
            for i in range(group_size):
                weights[i] = widen(raw[row, first + i])
            if held is not None:
                some = np.uint8(0)
                for i in range(group_size):
                    some |= held[row, first + i]
                    weights[i] *= np.float32(1) - np.float32(held[row, first + i])
                if some == 0:
                    continue
            largest = np.uint32(0)
            for i in range(group_size):
                largest = max(largest, _magnitude(bits[i]))
            if curvature is not None:
                for i in range(group_size):
                    shares[i] = widen(curvature[row, first + i])
            elif vectors is not None:
                for i in range(group_size):
                    shares[i] = vectors.rows[row] * vectors.columns[first + i]
            if curvature is not None or vectors is not None:
                most = np.uint32(0)
                for i in range(group_size):
                    most = max(most, _magnitude(parts[i]))
                if most > 0:
                    for i in range(group_size):
                        shares[i] /= widen(most)
            best, least = raw[row, first], np.float32(0)
            start = 0 if held is None else -1
            for trial in range(start, factors.size):
                if trial < 0:
                    stored = scales[row, group]
                else:
                    wide = widen(largest) / np.float32(7.5) * factors[trial]
                    stored = narrow(max(wide, tile.floor), raw[row, first])
                scale = widen(stored)
                lanes[:] = 0
                for block in range(0, size, LANES):
                    part, share = weights[block : block + LANES], shares[block : block + LANES]
                    for i in range(LANES):
                        code = min(max(np.rint(part[i] / scale), np.float32(-8)), np.float32(7))
                        error = widen(narrow(code * scale, stored)) - part[i]
                        if curvature is not None or vectors is not None:
                            lanes[i] += error * error * share[i]
                        else:
                            lanes[i] += error * error
                left = LANES // 2
                while left > 0:
                    for i in range(left):
                        lanes[i] += lanes[left + i]
                    left //= 2
                if trial == start or lanes[0] < least:
                    best, least = stored, lanes[0]
            scales[row, group] = best


# Longer than 60 lines: in parts, called from here, it runs at half the speed.
@kept(njit, nogil=True)
def split_tile(  # noqa: C901 - see above
    tile: Any,
    curvature: Any,
    vectors: Any,
    held: Any,
    base: Any,
    candidates: Any,
    others: Any,
    sums: Any,
    buffers: Any,
) -> int:
    """Split some rows, and append what is more salient than the bar, or what is held.

    scale = max|w| / 7.5 where none is given, q = clamp(round(w / scale), -8, 7),
    r = q * scale - w, each rounded as in `quantize`; saliency is |r|, with curvature |r| sqrt(h).

    Args:
        tile: `Words`.
        curvature: (rows, in) words of h, or None.
        vectors: `Vectors` of sqrt(h), or None.
        held: (rows, in) uint8: 1 at what is appended, whatever its saliency; or None.
        base: `Base`.
        candidates: `Candidates`.
        others: float32, |r| of what is appended where something else selects; or None.
        sums: float64: w^2, r^2 and r^2 h are added to the first three.
        buffers: `RowBuffers`.
    Returns:
        How many were appended; -1 where a weight is not finite, -2 where h is negative or not
        finite. What was written then is of no use.
    """
    raw, group_size, scales = tile.raw, tile.group_size, base.scales
    indices, saliency, values = candidates.indices, candidates.saliency, candidates.values
    plain, weighted = buffers.floats[0], buffers.floats[1]
    codes, flags = buffers.bytes[0], buffers.bytes[1]
    pairs, eights = codes.view(np.uint16), flags.view(np.uint64)
    rows, columns = raw.shape
    found = 0
    for row in range(rows):
        words, pack = raw[row], base.packed[row]
        for group in range(columns // group_size):
            here = slice(group * group_size, (group + 1) * group_size)
            some, residual, code_of = words[here], plain[here], codes[here]
            largest = _magnitude(some[0])
            for i in range(group_size):
                largest = max(largest, _magnitude(some[i]))
            if largest >= tile.exponent:
                return -1
            if base.given:
                stored = scales[row, group]
            else:
                stored = narrow(max(widen(largest) / np.float32(7.5), tile.floor), largest)
                scales[row, group] = stored
            scale = widen(stored)
            for i in range(group_size):
                weight = widen(some[i])
                code = min(max(np.rint(weight / scale), np.float32(-8.0)), np.float32(7.0))
                residual[i] = abs(widen(narrow(code * scale, stored)) - weight)
                code_of[i] = np.uint8(np.int32(code) + np.int32(8))
        # By rows: bytes that were just written one by one cannot be read as pairs for a while.
        for i in range(columns // 2):
            pack[i] = np.uint8(pairs[i] | (pairs[i] >> np.uint16(4)))
        sums[0] += _squares(words)
        # Searched scales do not serve what ortho holds: it has nearly all of the noise.
        sums[1] += _wide_squares(plain) if base.given else _squares(plain)
        if curvature is not None:
            near = curvature[row]
            worst = near[0]
            for i in range(columns):
                worst = max(worst, near[i])
            if worst >= 0x7F800000 >> (32 - 8 * curvature.itemsize):
                for i in range(columns):  # the sign bit makes a word large, too; -0.0 is no harm
                    if not np.float32(0) <= widen(near[i]) < np.float32(np.inf):
                        return -2
            for i in range(columns):
                weighted[i] = plain[i] * np.sqrt(widen(near[i]))
        elif vectors is not None:
            for i in range(columns):
                weighted[i] = plain[i] * (vectors.rows[row] * vectors.columns[i])
        leading = plain
        if others is not None:
            # Few weights hold most of the curvature: what is left without them needs float64.
            sums[2] += _wide_squares(weighted)
            leading = weighted
        for i in range(columns):
            if held is None:
                flags[i] = leading[i] > candidates.bar
            else:
                flags[i] = held[row, i]
        for eight in range(columns // 8):  # of them at once
            if eights[eight] == 0:
                continue
            for i in range(8 * eight, 8 * eight + 8):
                if flags[i]:
                    indices[found] = candidates.start + row * columns + i
                    saliency[found] = leading[i]
                    values[found] = words[i]
                    if others is not None:
                        others[found] = plain[i]
                    found += 1
    return found
