"""How many weights are worked on at a time: the one place that every tile is cut from.

No byte of base, ortho or a converted file depends on these sizes; of report.json only the last
digits of sums do. Each loop over tiles takes a `Sizes`, so a test can cut a tiny tensor into many.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Part = Literal["split", "gptq", "device", "in_memory", "check", "values", "convert"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Most weights of a tile, for each part of the work; every tile has at least one row."""

    # The split, survey and reading back. Measured: two threads run 2.8 GB/s at 256 Ki elements and
    # half of that at 64 Ki.
    split: int = 1 << 19
    # The split with compensation rounds one column of a tile at a time: more rows cost little more.
    gptq: int = 4 << 19
    # The split on an accelerator: enough to keep it busy, and 40 bytes of its memory per weight.
    device: int = 1 << 22
    # The split of a weight that is in memory already.
    in_memory: int = 1 << 18
    # Checks of what was written. Measured: of larger arrays the allocator gives pages back and
    # takes them again, which doubles the time.
    check: int = 1 << 15
    # Base that is read to round or restore the int8 values of a compact ortho: 4 MB in float32.
    values: int = 1 << 20
    # Conversion: as for the split.
    convert: int = 1 << 19

    # Weights that are read back of a weight with more: 4 % of a plain run's time.
    check_sample: int = 1 << 15
    # Weights from all over a tensor from which the compiled selection's first bar is guessed.
    bar_sample: int = 1 << 16
    # Bytes of a tensor that is carried over unchanged, read at a time; whole weights of any dtype.
    copy_bytes: int = 1 << 20

    def rows(self, part: Part, shape: tuple[int, ...]) -> int:
        """Say how many rows a tile of an (out, in) tensor has; the last may have fewer."""
        elements: int = getattr(self, part)
        return max(1, min(shape[0], elements // max(1, shape[1])))

    def tiles(self, part: Part, shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
        """Cut an (out, in) tensor into tiles: yield the first row of each, and its rows."""
        step = self.rows(part, shape)
        for start in range(0, shape[0], step):
            yield start, min(step, shape[0] - start)


DEFAULT_SIZES = Sizes()
