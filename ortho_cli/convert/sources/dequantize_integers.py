"""Dequantizes packed integers: compressed-tensors, GPTQ, AWQ, MLX and nf4 of bitsandbytes.

    w = (code - zero) * scale, of the group or block of the code

MLX adds a bias in place of the zero point; nf4 looks the code up in a map of values.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ortho_cli.convert.sources.dequantize_floats import Grid, fit
from ortho_cli.convert.sources.quantized_parts import AGAIN, Parts, Plan, Settings
from ortho_cli.errors import CheckpointError, shown
from ortho_cli.split.dtypes import FLOATS

AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # the place in a word of the code of each of 8 columns


def unpack(words: Tensor, *, bits: int, columns: int) -> Tensor:
    """Unpack rows of words, the lowest bits first, codes that straddle two words included.

    Args:
        words: (rows, words) int32 or uint32.
        bits: of a code, 1 to 8.
        columns: codes of a row.
    Returns:
        (rows, columns) int32, 0 <= code < 2^bits.
    """
    # torch calls one word per row, transposed, contiguous, though its last stride is not 1.
    own = words.clone(memory_format=torch.contiguous_format)
    raw = own.view(torch.uint8).view(len(words), -1)
    if bits == 8:
        return raw[:, :columns].int()
    if 8 % bits == 0:
        mask = (1 << bits) - 1
        split = [(raw >> shift) & mask for shift in range(0, 8, bits)]
        return torch.stack(split, dim=-1).view(len(words), -1)[:, :columns].int()
    place = torch.arange(columns) * bits
    raw = torch.cat([raw, raw.new_zeros(len(raw), 1)], dim=1).int()
    pair = raw[:, place // 8] | (raw[:, place // 8 + 1] << 8)
    return (pair >> (place % 8).int()) & ((1 << bits) - 1)


def plan_packed(parts: Parts, settings: Settings) -> Plan:
    """Plan compressed-tensors: codes plus half of their range; zero points packed downward."""
    shape = tuple(int(n) for n in parts.whole("shape").view(-1))
    codes = parts["codes"].shape
    if min((len(shape), *shape)) < 1 or len(codes) < 2 or codes[:-1] != shape[:-1]:
        raise parts.misfit("codes", f"and `{parts['shape'].name}` says {list(shape)}")
    fits = [b for b in range(1, 9) if math.ceil(shape[-1] * b / 32) == codes[-1]]
    bits = settings.bits if settings.bits in fits else next(iter(fits), None)
    if bits is None or (len(fits) > 1 and settings.bits not in fits):
        by = fits or "no number of"
        raise parts.misfit("codes", f"which packs {shape[-1]} codes per row by {by} bits")
    grid = fit(parts, shape, settings)
    order = _order(parts, shape[-1], grid.columns)
    half, columns = 1 << (bits - 1), shape[-1]
    zeros = _packed_zeros(parts, grid, bits) if "zero" in parts else None
    spread = grid if order is None else replace(grid, block=(grid.block[0], 1), width=columns)
    of_columns = slice(None) if order is None else order

    def read(start: int, rows: int) -> Tensor:
        codes = unpack(parts["codes"].read(start, rows), bits=bits, columns=columns) - half
        scale = spread.spread(lambda a, b: parts.scales("scale", a, b), start, rows)
        if zeros:
            codes = codes - spread.spread(zeros, start, rows)[:, of_columns]
        return parts.check_product(codes.float() * scale[:, of_columns])

    return shape, read


def _order(parts: Parts, columns: int, groups: int) -> Tensor | None:
    """Read the group of each column, where the columns are not in order.

    Raises:
        CheckpointError: not one number per column, or a group that is not there.
    """
    if "order" not in parts:
        return None
    order = parts.whole("order").long()
    if order.shape != (columns,):
        raise parts.misfit("order", f"one group for each of {columns} columns")
    if bool((order == -1).all()):  # compressed-tensors writes -1 for columns in order
        return None
    if int(order.min()) < 0 or int(order.max()) >= groups:
        bad = int(order.max()) if int(order.max()) >= groups else int(order.min())
        raise CheckpointError(
            f"tensor `{parts['order'].name}` of `{parts.path}` sends a column to group {bad}, and "
            f"`{parts['scale'].name}` has {groups}",
            hint=AGAIN,
        )
    return order


def _packed_zeros(parts: Parts, grid: Grid, bits: int) -> Callable[[int, int], Tensor]:
    """Make a function that reads zero points: packed downward, or integers of eight bits."""
    dtype, shape = parts["zero"].dtype, parts["zero"].shape
    packed = math.ceil(grid.lines * bits / 32), grid.columns
    is_packed = dtype == "I32" and shape == packed
    if not is_packed and (dtype != "I8" or shape != parts["scale"].shape):
        raise parts.misfit("zero", f"I32 {[*packed]}, zero points of {bits} bits packed downward")

    def make() -> tuple[Tensor]:
        whole = parts.whole("zero")
        if not is_packed:
            return (whole.int().view(-1),)
        zeros = unpack(whole.T, bits=bits, columns=grid.lines) - (1 << (bits - 1))
        return (zeros.T.reshape(-1),)

    return lambda start, stop: parts.hold("zero", make)[0][start:stop]


def plan_gptq(parts: Parts, settings: Settings) -> Plan:
    """Plan AutoGPTQ or AutoAWQ, by the shapes: both store the transposed weight."""
    codes, zero, scale = (parts[role].shape for role in ("codes", "zero", "scale"))
    if not len(codes) == len(zero) == len(scale) == 2 or zero[0] != scale[0]:
        raise parts.misfit("scale", f"a row of scales for each row of zero points, {list(zero)}")
    if parts["zero"].dtype != "I32" or parts["scale"].dtype not in FLOATS:
        raise parts.misfit("zero", "packed zero points of dtype I32, and floats as scales")
    out = scale[1]
    if codes[1] == out:
        return _plan_auto_gptq(parts, settings)
    if codes[1] * 8 == out and zero[1] == codes[1]:
        return _plan_auto_awq(parts, settings)
    raise parts.misfit(
        "scale",
        f"{codes[1]} columns if GPTQ packed it, or {codes[1] * 8} if AWQ did for GEMM; what "
        "is packed for other kernels is not read",
    )


def _plan_auto_gptq(parts: Parts, settings: Settings) -> Plan:
    words, out = parts["codes"].shape
    zero_words = parts["zero"].shape[1]
    bits = zero_words * 32 // out
    if bits not in (2, 3, 4, 8) or zero_words * 32 != bits * out or words * 32 % bits:
        raise parts.misfit("zero", f"{out} zero points of 2, 3, 4 or 8 bits in whole words")
    columns, offset = words * 32 // bits, settings.gptq_offset(parts)

    def zeros(packed: Tensor) -> Tensor:
        # A zero point of 0 was stored as -1, which is all ones in its bits.
        return (unpack(packed, bits=bits, columns=out) + offset) & ((1 << bits) - 1)

    def codes(packed: Tensor, start: int, stop: int) -> Tensor:
        return unpack(packed[:, start:stop].T, bits=bits, columns=columns)

    return _plan_transposed(parts, (out, columns), settings, zeros, codes)


def _plan_auto_awq(parts: Parts, settings: Settings) -> Plan:
    columns, words = parts["codes"].shape
    places = torch.tensor(AWQ_PLACES)

    def untangle(packed: Tensor) -> Tensor:
        found = unpack(packed, bits=4, columns=packed.shape[1] * 8)
        return found.view(len(packed), -1, 8)[:, :, places].view(len(packed), -1)

    def codes(packed: Tensor, start: int, stop: int) -> Tensor:
        first = start // 8
        found = untangle(packed[:, first : -(-stop // 8)])
        return found[:, start - first * 8 : stop - first * 8].T

    return _plan_transposed(parts, (words * 8, columns), settings, untangle, codes)


def _plan_transposed(
    parts: Parts,
    shape: tuple[int, int],
    settings: Settings,
    zeros: Callable[[Tensor], Tensor],
    codes: Callable[[Tensor, int, int], Tensor],
) -> Plan:
    """Plan a weight whose rows are columns of codes, of zero points and of scales."""
    scale = parts["scale"]
    order = _groups(parts, settings, shape[1], scale.shape[0])

    def hold() -> tuple[Tensor, Tensor, Tensor]:
        scales = parts.scales("scale", 0, scale.numel).view(scale.shape)
        return parts.whole("codes"), zeros(parts.whole("zero")).T, scales.T

    def read(start: int, rows: int) -> Tensor:
        packed, points, scales = parts.hold("all", hold)
        mine = slice(start, start + rows)
        found = codes(packed, start, start + rows) - points[mine][:, order]
        return parts.check_product(found.float().mul_(scales[mine][:, order]))

    return shape, read


def _groups(parts: Parts, settings: Settings, columns: int, groups: int) -> Tensor:
    """Give the group of each column: by `g_idx`, else by the size of groups."""
    order = _order(parts, columns, groups)
    if order is not None:
        return order
    size = settings.group
    if size is None or math.ceil(columns / size) != groups:
        if not groups or columns % groups:
            raise parts.misfit("scale", f"{columns} columns in groups of one size")
        size = columns // groups
    return torch.arange(columns) // size


def plan_mlx(parts: Parts, settings: Settings) -> Plan:
    """Plan MLX's affine layout: w = code * scale + bias of its group."""
    codes, scale = parts["codes"].shape, parts["scale"].shape
    said = settings.mlx(parts["codes"].name.removesuffix(".weight"))
    bits, group, mode = said.get("bits"), said.get("group_size"), said.get("mode", "affine")
    is_affine = bits in (2, 3, 4, 5, 6, 8) and mode == "affine"
    if not is_affine or type(bits) is not int or type(group) is not int or group < 1:
        raise parts.misfit(
            "codes",
            f"and config.json says bits {shown(bits)}, group_size {shown(group)}, mode "
            f"{shown(mode)}, which is no affine layout of 2 to 8 bits",
        )
    columns = codes[-1] * 32 // bits
    if len(codes) < 2 or list(scale) != [*codes[:-1], columns // group] or columns % group:
        raise parts.misfit("scale", f"{[*codes[:-1], columns // group]} by groups of {group}")
    if parts["bias"].shape != scale:
        raise parts.misfit("bias", f"as many as scales, {list(scale)}")
    per_row = columns // group

    def read(start: int, rows: int) -> Tensor:
        span = start * per_row, (start + rows) * per_row
        values = unpack(parts["codes"].read(start, rows), bits=bits, columns=columns).float()
        scale, bias = (parts.scales(r, *span).view(rows, per_row, 1) for r in ("scale", "bias"))
        values = values.view(rows, per_row, group).mul_(scale).add_(bias)
        return parts.check_product(values.view(rows, columns))

    return (*codes[:-1], columns), read


def plan_nf4(parts: Parts, settings: Settings) -> Plan:
    """Plan bitsandbytes: w = values[code] * scale of its block; the higher bits come first."""
    try:
        state = json.loads(bytes(parts.whole("state").view(-1).tolist()).decode())
        shape, block = tuple(state["shape"]), state["blocksize"]
        sound = all(type(n) is int and n > 0 for n in (*shape, block)) and block % 2 == 0
    except (ValueError, KeyError, TypeError):
        raise parts.misfit("state", "a JSON object with shape and blocksize") from None
    numel = math.prod(shape)
    if not sound or len(shape) < 2 or numel % 2 or parts["codes"].numel != numel // 2:
        raise parts.misfit("codes", f"and its state says {list(shape)} in blocks of {block}")
    blocks = math.ceil(numel / block)
    if parts["scale"].numel != blocks or parts["values"].numel != 16:
        raise parts.misfit("scale", f"{blocks} scales, and a map of 16 values")
    scales = _nf4_scales(parts, state, blocks)
    width = shape[-1]

    def read(start: int, rows: int) -> Tensor:
        first, last = start * width, (start + rows) * width
        low = first - first % 2
        raw = parts.elements("codes", low // 2, -(-last // 2)).int()
        values = parts.scales("values", 0, 16)
        found = torch.stack([values[raw >> 4], values[raw & 15]], dim=1).view(-1)
        found = found[first - low : last - low]
        begin, end = first // block, -(-last // block)
        mine = scales(begin, end)[torch.arange(first, last) // block - begin]
        return parts.check_product((found * mine).view(rows, width))

    return shape, read


def _nf4_scales(
    parts: Parts, state: Mapping[str, object], blocks: int
) -> Callable[[int, int], Tensor]:
    """Make a function that reads scales, which may be codes with a scale and an offset."""
    if "outer" not in parts:
        if parts["scale"].dtype not in FLOATS:
            raise parts.misfit("scale", "floats, or a second scale beside it")
        return lambda begin, end: parts.scales("scale", begin, end)
    size, offset = state.get("nested_blocksize"), state.get("nested_offset")
    if type(size) is not int or size < 1 or not isinstance(offset, int | float):
        raise parts.misfit("state", "nested_blocksize and nested_offset, as `nested_absmax` needs")
    fits = parts["outer"].numel == math.ceil(blocks / size) and "outer_values" in parts
    if not fits or parts["outer_values"].numel != 256 or parts["scale"].dtype != "U8":
        raise parts.misfit("outer", f"{math.ceil(blocks / size)} scales, and a map of 256 values")

    def read(begin: int, end: int) -> Tensor:
        codes = parts.elements("scale", begin, end).int()
        first = begin // size
        outer = parts.scales("outer", first, -(-end // size))
        mine = outer[torch.arange(begin, end) // size - first]
        return parts.scales("outer_values", 0, 256)[codes].mul_(mine).add_(offset)

    return read
