"""Splits a tile with compiled loops, without torch: rounding to nearest, 4 bits, any scales.

What it writes is what `torch_kernel` writes, byte for byte.
"""

from __future__ import annotations

import numpy as np

from ortho_cli.split import numba_loops as loops
from ortho_cli.split.dtypes import SMALLEST_SCALE
from ortho_cli.split.select import TopK
from ortho_cli.split.task import (
    EXPONENTS,
    LANES,
    Array,
    CurvatureTile,
    HostKernel,
    SplitTask,
    Tile,
    TileResult,
    scale_factors,
)


class NumbaKernel(HostKernel):
    """Splits a tile with compiled loops."""

    def finish(self, task: SplitTask, pending: Tile, select: TopK, sums: Array) -> TileResult:
        """Run the loops over a tile."""
        tile, room = pending, self.held
        rows, columns = tile.raw.shape
        size = task.group_size
        floor = np.float32(SMALLEST_SCALE[task.dtype])
        words = loops.Words(tile.raw, size, floor, EXPONENTS[task.dtype])
        packed = room("packed", (rows, columns // 2), np.uint8)
        scales = room("scales", (rows, columns // size), task.word)
        held = None if tile.held is None else tile.held.view(np.uint8)
        if tile.scales is not None:
            scales[...] = tile.scales
        near = tile.curvature
        if task.scale != "absmax":
            factors = np.array(scale_factors(task.bits), np.float32)
            values = near if task.scale == "curvature" else CurvatureTile()
            group = room("group", (2, -(-size // LANES) * LANES), np.float32)
            loops.call(
                loops.search_tile,
                words,
                factors,
                values.words,
                _vectors(values, rows, "values"),
                held,
                scales,
                group,
            )
        indices, saliency, (kept, *others) = select.room()
        found = loops.call(
            loops.split_tile,
            words,
            near.words,
            _vectors(near, rows, "roots"),
            held if tile.forced is not None else None,
            loops.Base(packed, scales, task.scale != "absmax"),
            loops.Candidates(select.bar, tile.start, indices, saliency, kept),
            others[0] if others else None,
            sums,
            loops.RowBuffers(
                room("row", (2, columns), np.float32), room("row of bytes", (2, columns), np.uint8)
            ),
        )
        if found >= 0:
            select.took(found)
        return TileResult(packed, scales, sound=found >= 0)


def _vectors(tile: CurvatureTile, rows: int, part: str) -> loops.Vectors | None:
    """Give the values or the roots of curvature that is a product."""
    if tile.columns is None:
        return None
    one = np.ones(rows, np.float32) if tile.rows is None else getattr(tile.rows, part)
    return loops.Vectors(one, getattr(tile.columns, part))
