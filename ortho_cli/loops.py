"""The split of a tile in one compiled loop: the codes, scales and saliency of `ops`, to the bit.

`ops` walks a tile a dozen times, once for each operation; here a group is read once and stays in
the innermost cache until it is packed. numba compiles a loop when it is first called with these
dtypes, for this processor, and keeps the machine code beside this file.

Weights and curvature come as the words they are stored in: uint16 is bfloat16, int16 is float16 and
uint32 is float32. All arithmetic is float32, no product is contracted with a sum, and only sums of
squares, in float64, may be taken in another order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

_FLOAT, _HALF, _I16, _I32 = ir.FloatType(), ir.HalfType(), ir.IntType(16), ir.IntType(32)


@intrinsic
def _widen(context, word):
    """Read a word as float32."""

    def generate(context, builder, signature, arguments):
        (given,) = arguments
        if signature.args[0] == types.uint16:
            wide = builder.shl(builder.zext(given, _I32), ir.Constant(_I32, 16))
            return builder.bitcast(wide, _FLOAT)
        if signature.args[0] == types.int16:
            return builder.fpext(builder.bitcast(given, _HALF), _FLOAT)
        return builder.bitcast(given, _FLOAT)

    return types.float32(word), generate


@intrinsic
def _narrow(context, value, like):
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
def _wide_squares(values):
    total = 0.0
    for i in range(values.size):
        wide = np.float64(values[i])
        total += wide * wide
    return total


@njit(fastmath={"reassoc"}, error_model="numpy")
def _squares(values):
    """Sum the squares of one group in float32, which is as exact as decibels need and faster."""
    total = np.float32(0.0)
    for i in range(values.size):
        total += values[i] * values[i]
    if np.float32(1e-30) < total < np.float32(np.inf):
        return np.float64(total)
    return _wide_squares(values)


def _kept(function):
    """Compile a loop that waits for no interpreter, and keep it on disk where that can be."""
    try:
        return njit(nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:  # neither this folder nor the user's cache can be written to
        return njit(nogil=True, error_model="numpy")(function)


def split(*arguments: Any) -> int:
    """Call `split_tile`."""
    try:
        return int(split_tile(*arguments))
    except OSError:  # it was compiled, and could not be kept: the disk is full
        return int(split_tile(*arguments))


@_kept
def split_tile(  # noqa: C901 - in parts, called from here, it runs at half the speed
    raw: Any,
    group_size: int,
    floor: np.float32,
    exponent: int,
    curvature: Any,
    row_roots: Any,
    column_roots: Any,
    bar: np.float32,
    start: int,
    packed: Any,
    scales: Any,
    sums: Any,
    indices: Any,
    saliency: Any,
    values: Any,
    others: Any,
    buffers: Any,
    bytes_: Any,
) -> int:
    """Split some rows, and append what is more salient than `bar`.

    scale = max|w| / 7.5, q = clamp(round(w / scale), -8, 7), r = q * scale - w, each rounded as in
    `ops`; saliency is |r|, or with curvature |r| sqrt(h).

    Args:
        raw: (rows, in) words of the weights.
        group_size: divides in; a multiple of 8.
        floor: the smallest scale.
        exponent: exponent bits of a word: from there on it is infinite or NaN.
        curvature: (rows, in) words of h, or None.
        row_roots: (rows,) float32, or None: sqrt(h) of row o and column i is
            row_roots[o] * column_roots[i].
        column_roots: (in,) float32, or None.
        bar: below the k-th largest saliency.
        start: flat index of the first weight.
        packed: (rows, in / 2) uint8, the low half of each byte first.
        scales: (rows, in / group_size) words.
        sums: (3,) float64: w^2, r^2 and r^2 h are added.
        indices: flat indices of what is appended; as long as any tile may need.
        saliency: float32, its saliency.
        values: words of its weights.
        others: float32, |r| where something else selects; None without curvature.
        buffers: (3, group_size) float32.
        bytes_: (2, group_size) uint8.
    Returns:
        How many were appended; -1 where a weight is not finite, -2 where h is negative or not
        finite. What was written then is of no use.
    """
    rows, columns = raw.shape
    weights, plain, weighted = buffers[0], buffers[1], buffers[2]
    codes, flags = bytes_[0], bytes_[1]
    pairs, eights = codes.view(np.uint16), flags.view(np.uint64)
    found = 0
    for row in range(rows):
        for group in range(columns // group_size):
            first = group * group_size
            largest = _magnitude(raw[row, first])
            for i in range(group_size):
                largest = max(largest, _magnitude(raw[row, first + i]))
            if largest >= exponent:
                return -1
            stored = _narrow(max(_widen(largest) / np.float32(7.5), floor), largest)
            scales[row, group] = stored
            scale = _widen(stored)
            for i in range(group_size):
                weight = _widen(raw[row, first + i])
                code = min(max(np.rint(weight / scale), np.float32(-8.0)), np.float32(7.0))
                weights[i] = weight
                plain[i] = abs(_widen(_narrow(code * scale, stored)) - weight)
                codes[i] = np.uint8(np.int32(code) + np.int32(8))
            for i in range(group_size // 2):
                packed[row, first // 2 + i] = np.uint8(pairs[i] | (pairs[i] >> np.uint16(4)))
            sums[0] += _squares(weights)
            sums[1] += _squares(plain)
            if curvature is not None:
                worst = curvature[row, first]
                for i in range(group_size):
                    worst = max(worst, curvature[row, first + i])
                if worst >= 0x7F800000 >> (32 - 8 * curvature.itemsize):
                    return -2  # the sign bit makes a word large, too
                for i in range(group_size):
                    weighted[i] = plain[i] * np.sqrt(_widen(curvature[row, first + i]))
            elif column_roots is not None:
                for i in range(group_size):
                    weighted[i] = plain[i] * (row_roots[row] * column_roots[first + i])
            leading = plain
            if others is not None:
                # Few weights hold most of the curvature: what is left without them needs float64.
                sums[2] += _wide_squares(weighted)
                leading = weighted
            for i in range(group_size):
                flags[i] = leading[i] > bar
            for eight in range(group_size // 8):  # of them at once
                if eights[eight] == 0:
                    continue
                for i in range(8 * eight, 8 * eight + 8):
                    if flags[i]:
                        indices[found] = start + row * columns + first + i
                        saliency[found] = leading[i]
                        values[found] = raw[row, first + i]
                        if others is not None:
                            others[found] = plain[i]
                        found += 1
    return found
