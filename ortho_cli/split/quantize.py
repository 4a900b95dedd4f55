"""The mathematics of a split: group scales, codes, packing, saliency.

Pure functions on CPU tensors, float32 inside, no IO. Weights are `(out_features, in_features)`; a
group is `group_size` neighbours inside one row and never crosses rows. Every function that needs
room asks `empty(shape, dtype)` for it: the default is `torch.empty`, and the hot loop passes a
`Scratch`, which hands out the same buffers tile after tile (fresh pages cost more than the
arithmetic).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ortho_cli.split.dtypes import DTYPES, SMALLEST_SCALE, SPLIT, names_of_torch, torch_dtypes

Empty = Callable[[tuple[int, ...], torch.dtype], Tensor]


class Rounded(NamedTuple):
    """One weight on base's grid."""

    codes: Tensor  # (out, in) int8
    scales: Tensor  # (out, groups), of the dtype they are stored in
    kept: Tensor  # (out, in) bool: ortho holds the source's weight


def torch_empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Take fresh room."""
    return torch.empty(shape, dtype=dtype)


def code_range(bits: int) -> tuple[int, int]:
    """Smallest and largest code of a width: -8 and 7 for 4 bits, -4 and 3 for 3."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def half_range(bits: int) -> float:
    """Half of the steps between both ends of the codes: 7.5 for 4 bits, 3.5 for 3."""
    low, high = code_range(bits)
    return (high - low) / 2


class Scratch:
    """Buffers for one worker: the n-th request since `reset` gets the n-th buffer."""

    def __init__(self) -> None:
        """Start without a buffer."""
        self._slots: list[Tensor] = []
        self._views: list[dict[tuple[tuple[int, ...], torch.dtype], Tensor]] = []
        self._next = 0

    def reset(self) -> None:
        """Forget what was handed out; the next tile reuses it."""
        self._next = 0

    def __call__(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Hand out an uninitialised tensor that is valid until `reset`."""
        slot = self._next
        self._next += 1
        if slot == len(self._slots):
            self._slots.append(torch.empty(0, dtype=torch.uint8))
            self._views.append({})
        key = (shape, dtype)
        view = self._views[slot].get(key)
        if view is None:
            nbytes = math.prod(shape) * dtype.itemsize
            if nbytes > self._slots[slot].numel():
                self._slots[slot] = torch.empty(nbytes, dtype=torch.uint8)
                self._views[slot].clear()
            view = self._slots[slot][:nbytes].view(dtype).view(shape)
            self._views[slot][key] = view
        return view

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(slot.numel() for slot in self._slots)


def groups_of(weight: Tensor, count: int) -> Tensor:
    """Look at a weight as (out, count, group_size)."""
    return weight.reshape(weight.shape[0], count, weight.shape[1] // count)


def absmax(weight: Tensor, count: int, empty: Empty) -> Tensor:
    """Largest magnitude of each group, float32; NaN where the group holds one."""
    groups = groups_of(weight, count)
    if weight.dtype == torch.float32:
        return torch.abs(groups, out=empty(tuple(groups.shape), torch.float32)).amax(-1)
    # Without the sign, halves order like the integers they are made of, NaN above infinity.
    bits = groups.view(torch.int16)
    magnitude = torch.bitwise_and(bits, 0x7FFF, out=empty(tuple(groups.shape), torch.int16))
    return magnitude.amax(-1).view(weight.dtype).float()


def round_scales(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Round scales to the dtype they are stored in, never to 0."""
    return scales.clamp_min(SMALLEST_SCALE[names_of_torch()[dtype]]).to(dtype)


def absmax_scales(
    weight: Tensor,
    *,
    group_size: int,
    dtype: torch.dtype,
    bits: int = 4,
    empty: Empty = torch_empty,
) -> Tensor:
    """Scale each group so that its largest magnitude lands half a step inside the codes' range.

    scale = max|w| / ((2^bits - 1) / 2), rounded to `dtype` (nearest, ties to even): max|w| / 7.5
    for 4 bits, max|w| / 3.5 for 3.

    Args:
        weight: (out, in) float32, bfloat16 or float16; `group_size` divides in.
        group_size: neighbours in a row that share a scale.
        dtype: dtype the scales are stored in; the model's own.
        bits: of a code, 3 or 4.
        empty: where temporaries come from.
    Returns:
        (out, in / group_size) of `dtype`, > 0. A group of zeros gets the smallest scale, never 0. A
        group that holds NaN or infinity gets a scale that is not finite: testing the scales tests
        the weights.
    Source: compressed-tensors `calculate_qparams` (symmetric); it differs for groups of zeros,
        which get an epsilon there.
    """
    count = weight.shape[1] // group_size
    return round_scales(absmax(weight, count, empty).div_(half_range(bits)), dtype)


def quantize(
    weight: Tensor, scales: Tensor, *, bits: int = 4, empty: Empty = torch_empty
) -> Tensor:
    """Round each weight to its group's grid.

    q = clamp(round(w / scale), -2^(bits-1), 2^(bits-1) - 1), halves to even.

    Args:
        weight: (out, in) float32, finite.
        scales: (out, groups), any float dtype, > 0; groups divides in.
        bits: of a code, 3 or 4.
        empty: where temporaries come from.
    Returns:
        (out, in) float32 that hold the integers -8 to 7, or -4 to 3: the next step multiplies them.
    Source: compressed-tensors `quantize`; it divides in the model's dtype, here the division is
        float32, so a weight is
    rounded once.
    """
    groups = groups_of(weight, scales.shape[1])
    ratio = empty(tuple(groups.shape), torch.float32)
    torch.div(groups, scales.float().unsqueeze(-1), out=ratio)
    return ratio.round_().clamp_(*code_range(bits)).view(weight.shape)


def dequantize(codes: Tensor, scales: Tensor, *, empty: Empty = torch_empty) -> Tensor:
    """Give back the weights that the base stands for, exactly as a reader of it sees them.

    w = q * scale, rounded once to the dtype of the scales.

    Args:
        codes: (out, in) integers, int8 or float32, of whatever width.
        scales: (out, groups), bfloat16, float16 or float32.
        empty: where temporaries come from.
    Returns:
        (out, in) float32 holding values of the scales' dtype.
    Source: compressed-tensors `dequantize`, bit for bit.
    """
    shape = tuple(codes.shape)
    product = empty(shape, torch.float32)
    groups = groups_of(product, scales.shape[1])
    torch.mul(groups_of(codes, scales.shape[1]), scales.float().unsqueeze(-1), out=groups)
    if scales.dtype == torch.float32:
        return product
    return product.copy_(empty(shape, scales.dtype).copy_(product))


def pack_int4(codes: Tensor, *, empty: Empty = torch_empty) -> Tensor:
    """Put eight codes into each int32: column 8w+i of a row in bits 4i..4i+3 of word w, as q + 8.

    Codes -8 -7 ... -1 pack to the word 0x76543210.

    Args:
        codes: (out, in) integers in [-8, 7], int8 or float32; in divides by 8.
        empty: where temporaries come from.
    Returns:
        (out, in / 8) int32.
    Source: compressed-tensors `pack_to_int32`, on a little-endian machine.
    """
    rows, columns = codes.shape
    nibbles = empty((rows, columns), torch.int8).copy_(codes).add_(8)
    pairs = nibbles.view(torch.int16)  # low byte: even column, high byte: odd column
    both = torch.bitwise_right_shift(pairs, 4, out=empty((rows, columns // 2), torch.int16))
    both.bitwise_or_(pairs)  # its low byte is now odd << 4 | even
    return empty((rows, columns // 2), torch.uint8).copy_(both).view(torch.int32)


def unpack_int4(packed: Tensor) -> Tensor:
    """Undo `pack_int4`.

    Args:
        packed: (out, in / 8) int32.
    Returns:
        (out, in) int8 in [-8, 7].
    """
    pairs = packed.contiguous().view(torch.uint8)
    nibbles = torch.stack((pairs & 15, pairs >> 4), dim=-1)
    return nibbles.flatten(-2).to(torch.int8).sub_(8)


def pack_int3(codes: Tensor, *, empty: Empty = torch_empty) -> Tensor:
    """Put 32 codes into each three int32: column i of a row in bits 3i..3i+2 of the row, as q + 4.

    Bits count on from word to word, lowest first, so that codes 10 and 21 of 32 lie in two words.
    Codes -4 -3 ... 3 four times over pack to 0x88FAC688, 0xC688FAC6 and 0xFAC688FA.

    Args:
        codes: (out, in) integers in [-4, 3], int8 or float32; in divides by 32.
        empty: where temporaries come from.
    Returns:
        (out, 3 in / 32) int32.
    Source: compressed-tensors `pack_to_int32` from 0.18 on, on a little-endian machine. Before that
        it put ten codes into a word and left two bits of it unused.
    """
    rows, columns = codes.shape
    lanes = empty((rows, columns), torch.int8).copy_(codes).add_(4)
    room = empty((rows, columns), torch.int8)
    # Neighbours move together, first two codes in 16 bits, then four in 32, then eight in 64.
    for dtype, gap, mask in (
        (torch.int16, 5, 0x3F),
        (torch.int32, 10, 0xFFF),
        (torch.int64, 20, 0xFFFFFF),
    ):
        wide = lanes.view(dtype)
        upper = torch.bitwise_right_shift(wide, gap, out=room.view(dtype))
        wide.bitwise_or_(upper).bitwise_and_(mask)
    eights = lanes.view(rows, columns // 8, 8)[..., :3].view(torch.uint8)
    packed = empty((rows, columns // 8, 3), torch.uint8).copy_(eights)
    return packed.view(rows, columns // 8 * 3).view(torch.int32)


def unpack_int3(packed: Tensor) -> Tensor:
    """Undo `pack_int3`.

    Args:
        packed: (out, 3 in / 32) int32.
    Returns:
        (out, in) int8 in [-4, 3].
    """
    rows, words = packed.shape
    eights = packed.contiguous().view(torch.uint8).view(rows, words * 4 // 3, 3)
    low, middle, high = eights.to(torch.int32).unbind(-1)
    word = low | middle << 8 | high << 16
    codes = torch.empty((*word.shape, 8), dtype=torch.int8, device=packed.device)
    for i in range(8):
        codes[..., i] = (word >> (3 * i)) & 7
    return codes.flatten(1).sub_(4)


def pack_codes(codes: Tensor, *, bits: int, empty: Empty = torch_empty) -> Tensor:
    """Pack codes of either width: `pack_int4` or `pack_int3`; (out, in bits / 32) int32."""
    return (pack_int3 if bits == 3 else pack_int4)(codes, empty=empty)


def unpack_codes(packed: Tensor, *, bits: int) -> Tensor:
    """Undo `pack_codes`; (out, in) int8."""
    return (unpack_int3 if bits == 3 else unpack_int4)(packed)


def dequantize_at(
    packed: Tensor, scales: Tensor, rows: Tensor, columns: Tensor, *, width: int
) -> tuple[Tensor, Tensor]:
    """Dequantize single positions: what `dequantize` of all codes, unpacked, holds there.

    Args:
        packed: (out, words) int32: codes of as many bits as the words tell, one after another from
            the lowest bit of a row's first word on; of 4 bits, as `pack_int4` writes them.
        scales: (out, groups), bfloat16, float16 or float32.
        rows: (n,) int64 in [0, out).
        columns: (n,) int64 in [0, in).
        width: in.
    Returns:
        (n,) float32 holding values of the scales' dtype; (n,) float32, the scale of each one's
        group.
    """
    words = packed.shape[1]
    bits = 32 * words // width
    word, shift = columns * bits // 32, columns * bits % 32
    both = packed[rows, word].long() & 0xFFFFFFFF
    both |= packed[rows, (word + 1).clamp_max(words - 1)].long() << 32  # a code may lie in two
    codes = (both >> shift & ((1 << bits) - 1)) - (1 << (bits - 1))
    mine = scales[rows, columns // (width // scales.shape[1])].unsqueeze(1)
    return dequantize(codes.float().unsqueeze(1), mine).squeeze(1), mine.float().squeeze(1)


def saliency(residual: Tensor, root_curvature: Tensor, *, empty: Empty = torch_empty) -> Tensor:
    """Say how much each weight's rounding costs: |r| sqrt(h), which orders like r^2 h.

    r^2 h itself leaves float32 where statistics live: r = 1e-4 and h = 1e-30 give 1e-38, the edge
    of the normal range, below which values merge and then are zero. Its root, formed from roots, is
    1e-19, and its own squares are summed in float64 where they must be (`squared_norm`).

    Args:
        residual: (out, in) float32, finite.
        root_curvature: sqrt(h), (in,) or (out, in) float32, >= 0, finite.
        empty: where the result comes from.
    Returns:
        (out, in) float32, >= 0.
    Source: OBS (Hassibi and Stork 1993) with a diagonal Hessian; SpQR (arXiv:2306.03078).
    """
    found = torch.abs(residual, out=empty(tuple(residual.shape), torch.float32))
    return found.mul_(root_curvature)


def ortho_dtypes(nnz: int, columns: int) -> tuple[torch.dtype, torch.dtype]:
    """Dtypes of crow_indices and col_indices: those of `artifact.ortho_specs`."""
    return (
        torch.int32 if nnz < 2**31 else torch.int64,
        torch.uint16 if columns <= 2**16 else torch.int32,
    )


# Exponent bits of each dtype; all set means infinity or NaN.
EXPONENTS = {
    torch_dtypes()[name]: (torch_dtypes()[f"I{DTYPES[name].bits}"], DTYPES[name].exponent or 0)
    for name in SPLIT
}


def all_finite(values: Tensor, *, empty: Empty = torch_empty) -> bool:
    """Tell whether no value is NaN or infinite, ten times faster than `torch.isfinite` does.

    Args:
        values: any shape, bfloat16, float16 or float32, contiguous, not empty.
        empty: where the temporary comes from.
    """
    integer, exponent = EXPONENTS[values.dtype]
    bits = values.view(integer)
    masked = torch.bitwise_and(bits, exponent, out=empty(tuple(bits.shape), integer))
    return int(masked.max()) < exponent


def is_curvature(values: Tensor) -> bool:
    """Tell whether every value is finite and >= 0, as a mean of squares is.

    Args:
        values: any shape, bfloat16, float16 or float32, contiguous, not empty.
    """
    integer, exponent = EXPONENTS[values.dtype]
    low, high = torch.aminmax(values.view(integer))  # the sign bit makes an integer negative, too
    if low >= 0 and high < exponent:
        return True
    return bool(((values >= 0) & torch.isfinite(values)).all())  # -0.0 is no harm


def as_bytes(tensor: Tensor) -> memoryview:
    """Look at a tensor's bytes in place."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


SUM = 256  # squares that float32 adds up before float64 does: off by 1e-9 of a tile's


def squared_norm(values: Tensor, *, wide: Tensor | None = None) -> float:
    """Sum of squares; exact enough for decibels also where float32 squares overflow or vanish.

    Args:
        values: any shape, float32, contiguous.
        wide: float64 room of the same shape, to sum in float64 throughout: where nearly all of a
            sum is taken from it again, what float32 rounds off is more than what is left.
    Returns:
        A finite float >= 0, NaN or infinity only if a value is.
    """
    if wide is not None:
        doubles = wide.copy_(values).view(-1)
        return float(torch.dot(doubles, doubles))
    flat = values.view(-1).numpy()
    whole = flat.size // SUM * SUM
    rows, rest = flat[:whole].reshape(-1, SUM), flat[whole:]
    with np.errstate(over="ignore", invalid="ignore"):
        total = float(np.vecdot(rows, rows).sum(dtype=np.float64)) + float(np.dot(rest, rest))
    if 1e-30 < total < math.inf:
        return total
    return float(np.square(flat, dtype=np.float64).sum())
