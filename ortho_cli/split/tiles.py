"""Tiles: a weight is read, split and written some rows at a time."""

from __future__ import annotations

TILE_ELEMENTS = (
    1 << 19
)  # measured: two threads run 2.8 GB/s at 256 Ki elements and half of that at 64 Ki
# One column of a tile is rounded at a time: more rows cost little more.
GPTQ_ELEMENTS = 4 * TILE_ELEMENTS


def tile_rows(shape: tuple[int, ...], elements: int = TILE_ELEMENTS) -> int:
    """Rows of a tile: about so many elements, at least one row."""
    return max(1, min(shape[0], elements // max(1, shape[1])))
