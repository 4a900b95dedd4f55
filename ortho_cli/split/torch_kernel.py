"""Splits a tile with torch, and whatever a recipe may ask for: every other kernel has its bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ortho_cli.split import quantize
from ortho_cli.split.dtypes import names_of_torch, torch_dtypes
from ortho_cli.split.roundings import rounding_of
from ortho_cli.split.scales import Kept, base_scales
from ortho_cli.split.select import Own, TopK
from ortho_cli.split.sizes import DEFAULT_SIZES, Part, Sizes
from ortho_cli.split.task import (
    SIGNAL,
    WORDS,
    Array,
    CurvatureTile,
    HostKernel,
    SplitTask,
    Tile,
    TileResult,
)


class TorchKernel(HostKernel):
    """Splits a tile with torch on the CPU."""

    def __init__(self, sizes: Sizes = DEFAULT_SIZES, *, part: Part = "split") -> None:
        """Say how large tiles are; start without buffers."""
        super().__init__(sizes, part=part)
        self._scratch = quantize.Scratch()  # of one tile

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return self.held.nbytes + self._scratch.nbytes

    def finish(self, task: SplitTask, pending: Tile, select: TopK, sums: Array) -> TileResult:
        """Round a tile, measure what that costs, and let `select` choose."""
        tile, scratch = pending, self._scratch
        scratch.reset()
        words = tile.curvature.words  # vectors were checked when they were loaded
        if words is not None and not quantize.is_curvature(tensor_of(words, tile.curvature.dtype)):
            return TileResult(tile.raw, tile.raw, sound=False)
        raw = tensor_of(tile.raw, task.dtype)
        curvature, root = curvature_of(tile.curvature, empty=scratch)
        weight = scratch(tuple(raw.shape), torch.float32).copy_(raw)
        stands, delta = weight, None
        if tile.reference is not None:
            raw = tensor_of(tile.reference, task.dtype)
            stands = scratch(tuple(raw.shape), torch.float32).copy_(raw)
        scales, codes = self._round(task, tile, raw, stands, curvature)
        if tile.edit is not None:
            positions, changed = tile.edit
            codes.view(-1).numpy()[positions] = changed
        residual = quantize.dequantize(codes, scales, empty=scratch).sub_(weight)
        if tile.reference is not None:
            delta = stands.sub_(weight)
        if not quantize.all_finite(scales):
            return TileResult(tile.raw, tile.raw, sound=False)
        packed = quantize.pack_codes(codes, bits=task.bits, empty=scratch)
        result = TileResult(packed.numpy(), words_of(scales))
        measures = _measure(task, residual, root, delta, scratch)
        if task.figures:
            names = task.measures(curvature=root is not None, reference=delta is not None)
            # Few weights hold most of the curvature, and searched scales leave most of the noise
            # to ortho: what is left without them needs float64.
            exact = root is not None or task.scale != "absmax"
            wide = scratch(tuple(raw.shape), torch.float64) if exact else None
            sums[SIGNAL] += quantize.squared_norm(weight)
            for name, measure in zip(names, measures, strict=True):
                sums[name] += quantize.squared_norm(measure, wide=wide)
        elif not quantize.all_finite(measures[0]):
            return result._replace(sound=False)
        saliency, *others = flat = [measure.view(-1).numpy() for measure in measures]
        if tile.forced is not None:
            select.mark(tile.forced, flat, _own_codes(task, tile.forced, weight, scales, root))
        select.push(saliency, [tile.raw.reshape(-1), *others], start=tile.start)
        return result

    def _round(
        self, task: SplitTask, tile: Tile, raw: Tensor, weight: Tensor, curvature: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Find scales, and codes as float32; some of them are given."""
        scratch, kept = self._scratch, None
        if tile.held is not None and tile.scales is not None:
            kept = Kept(torch.from_numpy(tile.held), tensor_of(tile.scales, task.dtype))
        if kept is not None and tile.codes is not None:
            codes = scratch(tuple(raw.shape), torch.float32).copy_(torch.from_numpy(tile.codes))
            return kept.scales, codes
        if kept is not None and tile.factor is not None:
            turn = rounding_of(task.rounding).round
            codes = turn(weight, kept.scales, tile.factor, kept=kept.mask, bits=task.bits)
            return kept.scales, codes
        scales = base_scales(
            task.scale, raw, curvature, task.group_size, bits=task.bits, kept=kept, empty=scratch
        )
        return scales, quantize.quantize(weight, scales, bits=task.bits, empty=scratch)


def tensor_of(words: Array, dtype: str) -> Tensor:
    """Look at words as the numbers that they are; torch knows signed words alone."""
    signed = words.view(np.int32 if words.itemsize == 4 else np.int16)
    return torch.from_numpy(signed).view(torch_dtypes()[dtype])


def words_of(values: Tensor) -> Array:
    """Look at numbers as their words."""
    signed: Array = values.view(torch.int16 if values.itemsize == 2 else torch.int32).numpy()
    return signed.view(WORDS[names_of_torch()[values.dtype]])


def curvature_of(
    tile: CurvatureTile, *, empty: quantize.Empty
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Give a tile's curvature and its root, float32: (in,) where rows do not differ, or whole.

    Roots are numpy's, each rounded as IEEE 754 says; torch's differ in the last bit.
    """
    if tile.words is not None:
        raw = tensor_of(tile.words, tile.dtype)
        shape = tuple(raw.shape)
        values = raw if raw.dtype == torch.float32 else empty(shape, torch.float32).copy_(raw)
        root = empty(shape, torch.float32)
        np.sqrt(values.numpy(), out=root.numpy())
        return values, root
    if tile.columns is None:
        return None, None
    columns = [torch.from_numpy(part) for part in tile.columns]
    if tile.rows is None:
        return columns[0], columns[1]
    rows = [torch.from_numpy(part)[:, None] for part in tile.rows]
    shape = (len(rows[0]), len(columns[0]))
    values, root = (
        torch.mul(row, column, out=empty(shape, torch.float32))
        for row, column in zip(rows, columns, strict=True)
    )
    return values, root


def _measure(
    task: SplitTask,
    residual: Tensor,
    root: Tensor | None,
    delta: Tensor | None,
    scratch: quantize.Scratch,
) -> list[Tensor]:
    """Measure what rounding costs, what selects first: |r|, and |r| sqrt(h) with curvature.

    They order like their squares and neither underflow nor round.
    """
    weighted = [] if root is None else [quantize.saliency(residual, root, empty=scratch)]
    plain = [residual.abs_()]
    found = weighted + plain if task.by_curvature else plain + weighted
    if delta is not None:
        found.append(delta.abs_() if root is None else delta.mul_(root))
    return found


def _own_codes(
    task: SplitTask, forced: Array, weight: Tensor, scales: Tensor, root: Tensor | None
) -> Own | None:
    """Dequantize the source's own codes at flat positions, where ortho may hold them."""
    if not (task.own_code and forced.size):
        return None
    at, columns = torch.from_numpy(forced), weight.shape[1]
    here = weight.view(-1)[at].unsqueeze(1)
    # A group lies inside a row, so flat indices count groups, too.
    mine = scales.reshape(-1)[at // task.group_size].unsqueeze(1)
    code = quantize.dequantize(quantize.quantize(here, mine, bits=task.bits), mine)
    words: Any = words_of(code.to(scales.dtype)).reshape(-1)
    # Not in place: where scales are float32, what was remembered above is `code` itself.
    lost = [(code - here).abs_().squeeze(1)]
    if root is not None:
        near = root[at % columns] if root.ndim == 1 else root.view(-1)[at]
        lost.insert(0 if task.by_curvature else 1, lost[0] * near)
    return Own(words, [one.numpy() for one in lost])
