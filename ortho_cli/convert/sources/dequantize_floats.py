"""Dequantizes codes that are numbers: fp8, integers of eight bits, and fp4 (E2M1) in pairs.

    w = (code - zero) * scale

There is one scale per weight, per row, per block of rows and columns, or per group along a row;
`Grid` finds the scale of each element.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ortho_cli.convert.sources.quantized import FP8
from ortho_cli.convert.sources.quantized_parts import EXPONENTS, Parts, Plan, Settings
from ortho_cli.split.dtypes import FLOATS

DEFAULT_BLOCK = (128, 128)  # rows, columns: of DeepSeek's fp8, and of all others so far
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # values by the lower three bits; then the sign
ONE_127TH = 7.874015718698502e-3  # the digits in bitsandbytes' own code
MX_GROUP, NV_GROUP = 32, 16  # codes that share a scale

_CODES = torch.tensor([*E2M1, *(-value for value in E2M1)])
_PAIRS = torch.stack([_CODES.repeat(16), _CODES.repeat_interleave(16)], dim=1)  # low bits first


@dataclass(frozen=True, slots=True)
class Grid:
    """The place of each scale over a weight of several matrices, or of one."""

    rows: int  # of a matrix
    lead: int  # grids of scales: one for each matrix, or one for all
    lines: int  # of a grid
    columns: int  # of a grid
    block: tuple[int, int]  # rows and columns of a matrix that share a scale
    width: int  # columns of a matrix

    def spread(self, read: Callable[[int, int], Tensor], start: int, rows: int) -> Tensor:
        """Give the scale of each element of some rows, (rows, width), or of each row, (rows, 1)."""
        place = torch.arange(start, start + rows)
        line = (place % self.rows) // self.block[0]
        if self.lead > 1:
            line += place // self.rows * self.lines
        first, last = int(line.min()), int(line.max()) + 1
        table = read(first * self.columns, last * self.columns).view(-1, self.columns)
        found = table[line - first]
        if self.columns == 1 or self.block[1] == 1:
            return found
        return found.repeat_interleave(self.block[1], dim=1)[:, : self.width]


def fit(parts: Parts, shape: tuple[int, ...], settings: Settings) -> Grid:
    """Find the grid of the scales of a weight, by their shapes and the settings.

    Raises:
        CheckpointError: no known grid fits.
    """
    matrices, rows, width = _matrices(shape)
    scale, numel, group = parts["scale"].shape, parts["scale"].numel, settings.group
    if settings.is_fbgemm and matrices > 1 and numel == matrices * width:
        return Grid(rows, matrices, 1, width, (rows, 1), width)
    lead, lines, columns = _scale_lines(scale, matrices, rows)
    high, wide = settings.block or DEFAULT_BLOCK
    asked = math.ceil(rows / high), math.ceil(width / wide)
    block: tuple[int, int] | None
    if columns == 1 and lines in (1, rows) and lead in (1, matrices):
        block = (rows if lines == 1 else 1, width)
    elif group and width % group and (lines, columns) == (rows, math.ceil(width / group)):
        block = (1, group)  # the last group of a row is short
    elif (lines, columns) == asked:
        block = (high, wide)
    else:
        block = _block(rows, width, lines, columns, is_told=settings.block is not None)
    # One grid for several matrices must have the shape (1, lines, columns).
    is_unclear = lead == 1 and matrices > 1 and numel > 1 and len(scale) < len(shape)
    if block is None or is_unclear or lead not in (1, matrices):
        told = "" if settings.block else " (config.json does not say)"
        wanted = f"{[*shape[:-2], *asked]} in blocks of {[high, wide]}{told}"
        raise parts.misfit("scale", f"{wanted}, or one scale per row or in all")
    return Grid(rows, lead, lines, columns, block, width)


def _matrices(shape: tuple[int, ...]) -> tuple[int, int, int]:
    rows, width = shape[-2:] if len(shape) > 1 else (math.prod(shape), 1)
    return math.prod(shape[:-2]), rows, width


def _scale_lines(scale: tuple[int, ...], matrices: int, rows: int) -> tuple[int, int, int]:
    """Read the shape of scales as (grids, lines, columns); zeros where no reading fits."""
    if math.prod(scale) == 1:
        return 1, 1, 1
    if len(scale) == 1:
        if matrices > 1:
            return (matrices, 1, 1) if scale[0] == matrices else (0, 0, 0)
        return 1, scale[0], 1
    if len(scale) == 2 and matrices > 1 and scale in ((matrices, rows), (matrices, 1)):
        return matrices, scale[1], 1
    return math.prod(scale[:-2]), scale[-2], scale[-1]


def _block(
    rows: int, width: int, lines: int, columns: int, *, is_told: bool
) -> tuple[int, int] | None:
    """Find the block that divides a matrix evenly: groups along a row, a square, or columns."""
    if not lines or not columns or rows % lines or width % columns:
        return None
    high, wide = rows // lines, width // columns
    # Groups along a row, as in the microscaling formats, count whatever config.json says.
    return (high, wide) if high == 1 or (not is_told and wide in (1, high)) else None


def plan_scaled(parts: Parts, settings: Settings) -> Plan:
    """Plan codes that are numbers: w = (code - zero) * scale."""
    shape = parts["codes"].shape
    if _is_packed_fp4(parts, settings):
        return plan_fp4(parts, settings)
    allowed = (*FLOATS, "F8_E8M0", "U8") if parts["codes"].dtype in FP8 else FLOATS
    if parts["scale"].dtype not in allowed:
        raise parts.misfit("scale", f"scales of dtype {', '.join(allowed)}")
    grid = fit(parts, shape, settings)
    if "zero" in parts and parts["zero"].shape != parts["scale"].shape:
        raise parts.misfit("zero", f"as many zero points as scales, {list(parts['scale'].shape)}")

    def read(start: int, rows: int) -> Tensor:
        scale = grid.spread(lambda a, b: parts.scales("scale", a, b), start, rows)
        codes = parts["codes"].read(start, rows).float()
        if "zero" in parts:
            codes -= grid.spread(lambda a, b: parts.elements("zero", a, b).float(), start, rows)
        return parts.check_product(codes * scale, codes)

    return shape, read


def plan_cast(parts: Parts, settings: Settings) -> Plan:
    """Plan fp8 without scales: w = code."""
    return parts["codes"].shape, lambda start, rows: parts["codes"].read(start, rows).float()


def plan_llm_int8(parts: Parts, settings: Settings) -> Plan:
    """Plan eight bits of bitsandbytes: w = code * scale of its row / 127."""
    shape = parts["codes"].shape
    if len(shape) != 2 or parts["scale"].shape != shape[:1]:
        raise parts.misfit("scale", f"one scale per row, {list(shape[:1])}")
    if "form" in parts and int(parts.whole("form").view(-1)[0]) != 0:
        raise parts.misfit("form", "the format 0, plain rows; it is another one")

    def read(start: int, rows: int) -> Tensor:
        scale = parts.scales("scale", start, start + rows)[:, None]
        codes = parts["codes"].read(start, rows).float()
        return parts.check_product(codes.mul_(scale).mul_(ONE_127TH))

    return shape, read


def _is_packed_fp4(parts: Parts, settings: Settings) -> bool:
    """Tell whether signed bytes hold two codes each, as in DeepSeek-V4's experts."""
    codes, scale = parts["codes"].shape, parts["scale"].shape
    paired = scale[:-1] == codes[:-1] and scale[-1:] == (codes[-1] * 2 // MX_GROUP,)
    is_told = settings.is_fp4 or parts["scale"].dtype == "F8_E8M0"
    return parts["codes"].dtype == "I8" and len(codes) > 1 and paired and is_told


def plan_fp4(parts: Parts, settings: Settings) -> Plan:
    """Plan two codes per byte, the even column in the lower bits, with a scale per group."""
    codes, scale = parts["codes"].shape, parts["scale"].shape
    is_mx = parts["scale"].dtype in EXPONENTS or settings.is_fp4
    group = MX_GROUP if is_mx else NV_GROUP
    per_row = codes[-1] * 2 // group
    if len(codes) < 2 or codes[-1] * 2 % group or scale != (*codes[:-1], per_row):
        raise parts.misfit("scale", f"{[*codes[:-1], per_row]}, one scale for {group} codes")
    second = _second_scale(parts, needed=parts["scale"].dtype == "F8_E4M3")

    def read(start: int, rows: int) -> Tensor:
        scale = parts.scales("scale", start * per_row, (start + rows) * per_row)
        scale = second(scale.view(rows, per_row), torch.arange(start, start + rows) // codes[-2])
        raw = parts["codes"].read(start, rows).contiguous().view(torch.uint8)
        values = _PAIRS.index_select(0, raw.view(-1).int()).view(rows, per_row, group)
        return parts.check_product(values.mul_(scale[:, :, None]).view(rows, -1))

    return (*codes[:-1], codes[-1] * 2), read


def _second_scale(parts: Parts, *, needed: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """Make a function that applies the second scale: one per weight, or per matrix of it."""
    role = next((role for role in ("divisor", "factor") if role in parts), None)
    if role is None:
        if needed:
            raise parts.misfit("scale", "a global scale beside it, and there is none")
        return lambda scale, matrix: scale
    matrices = _matrices(parts["codes"].shape)[0]
    if parts[role].numel not in (1, matrices):
        raise parts.misfit(role, f"one value, or {matrices}")

    def apply(scale: Tensor, matrix: Tensor) -> Tensor:
        second = parts.scales(role, 0, parts[role].numel)
        mine = second if len(second) == 1 else second[matrix][:, None]
        return scale / mine if role == "divisor" else scale * mine

    return apply


def plan_gpt_oss(parts: Parts, settings: Settings) -> Plan:
    """Plan bytes (experts, out, groups, 16) to (experts, in, out), as in transformers."""
    codes = parts["codes"].shape
    if len(codes) != 4 or codes[-1] * 2 != MX_GROUP:
        raise parts.misfit("codes", "not blocks of 16 bytes: (experts, out, groups, 16)")
    if parts["scale"].shape != codes[:-1]:
        raise parts.misfit("scale", f"{list(codes[:-1])}, one scale per block")
    if parts["scale"].dtype not in EXPONENTS:
        raise parts.misfit("scale", "exponents of dtype U8")
    experts, out, groups, _ = codes
    width, blocks = groups * MX_GROUP, out * groups

    def expert(number: int) -> tuple[Tensor]:
        scale = parts.scales("scale", number * blocks, (number + 1) * blocks)
        size = blocks * MX_GROUP // 2
        raw = parts.elements("codes", number * size, (number + 1) * size)
        values = _PAIRS.index_select(0, raw.int()).view(blocks, MX_GROUP).mul_(scale[:, None])
        return (parts.check_product(values).view(out, width).T,)

    def read(start: int, rows: int) -> Tensor:
        found = []
        while rows:
            number, first = divmod(start, width)
            took = min(rows, width - first)
            (whole,) = parts.hold(number, partial(expert, number))
            found.append(whole[first : first + took])
            start, rows = start + took, rows - took
        return torch.cat(found)

    return (experts, width, out), read
