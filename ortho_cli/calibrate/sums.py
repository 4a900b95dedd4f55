"""Sums in files: one float32 per weight, added to tile by tile, in two files against a kill.

The file of the last finished chunk is only read; the other one gets those sums plus the current
chunk's. When a chunk ends, the files change roles.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ortho_cli.model.hooks import Part, rows_of_tile
from ortho_cli.split.quantize import as_bytes
from ortho_cli.storage.data_file import DataFile, Layout


class Sums:
    """Sums of one set: reads those of the last chunk, and writes those of the current one."""

    def __init__(self, files: tuple[DataFile, DataFile], layout: Layout, *, chunks: int) -> None:
        self._files, self._layout = files, layout
        self._chunks = chunks
        self._touched: set[tuple[str, int]] = set()
        self._buffer = torch.empty(0)

    @property
    def current(self) -> DataFile:
        """The file of the last finished chunk."""
        return self._files[self._chunks % 2]

    def add(self, name: str, part: Part, row: int, tile: Tensor) -> None:
        """Add a tile to the sums of this chunk."""
        self._add(f"{name}/{part}", row, tile)

    def _add(self, key: str, row: int, tile: Tensor) -> None:
        start = row * tile.shape[1] * 4
        tile, written = tile.cpu(), self._files[(self._chunks + 1) % 2]
        touched = (key, row) in self._touched
        if touched or self._chunks:
            held = self._room(tile.shape)
            (written if touched else self.current).read_into(key, as_bytes(held), start=start)
            tile = held.add_(tile)
        self._touched.add((key, row))
        written.write(key, as_bytes(tile), start=start)

    def _room(self, shape: Sequence[int]) -> Tensor:
        if self._buffer.numel() < math.prod(shape):
            self._buffer = torch.empty(math.prod(shape))
        return self._buffer[: math.prod(shape)].view(*shape)

    def finish_chunk(self) -> None:
        """Copy the sums of tiles that this chunk did not reach, and swap the files."""
        for key, region in self._layout.regions.items():
            rows, columns = region.shape
            step = rows_of_tile(columns)
            for row in range(0, rows, step):
                if (key, row) not in self._touched:
                    self._add(key, row, torch.zeros(min(step, rows - row), columns))
        self._touched.clear()
        self._chunks += 1
