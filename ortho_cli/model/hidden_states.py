"""Hidden states of many batches between two blocks: in memory, or in a file where they are many.

A file `NAME-K` holds what K blocks gave, batch after batch, for its owner alone: it tells what
the text was. A resumed run begins with the newest one. States in memory are written from time to
time (`Pace`), those in a file after each block.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from ortho_cli.split.quantize import as_bytes
from ortho_cli.storage.checkpoint import fill
from ortho_cli.storage.data_file import write_all
from ortho_cli.storage.disk import sync
from ortho_cli.storage.parts import Pace
from ortho_cli.storage.work_folder import PARTIAL, writing


class HiddenStates:
    """A tensor per batch; `put` takes what the next block gives, and `finish` ends the block."""

    def __init__(
        self,
        folder: Path,
        shapes: Sequence[torch.Size],
        dtype: torch.dtype,
        *,
        in_memory: bool,
        name: str = "hidden",
    ) -> None:
        """Begin without any.

        Args:
            folder: where files go, and where an earlier run has left one.
            shapes: of each batch.
            dtype: of all.
            in_memory: hold them there; else in a file.
            name: of files, which begin with it; of no other states in the folder.
        """
        self._folder, self._shapes, self._dtype, self._name = folder, shapes, dtype, f"{name}-"
        self._held: list[Tensor | None] | None = [None] * len(shapes) if in_memory else None
        sizes = (math.prod(shape) * dtype.itemsize for shape in shapes)
        self._starts = list(accumulate(sizes, initial=0))
        self._read = self._written = -1  # descriptors of files
        self._pace = Pace()
        self.bytes_written = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all batches."""
        return self._starts[-1]

    @property
    def in_memory_bytes(self) -> int:
        """Bytes of those that are in memory."""
        return 0 if self._held is None else self.nbytes

    def resume(self, most: int) -> int:
        """Take the states that an earlier run kept; give the number of blocks that made them.

        Args:
            most: blocks that are finished; states of later ones are of no use.
        Returns:
            0 where there are none.
        """
        for number in sorted(self._files(), reverse=True):
            path = self._folder / f"{self._name}{number}"
            if not 0 < number <= most or path.stat().st_size != self.nbytes:
                path.unlink()
                continue
            self._read = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            if self._held is not None:
                self._held = [self._load(batch) for batch in range(len(self._shapes))]
            return number
        return 0

    def get(self, batch: int) -> Tensor:
        """Give the states of a batch, before the block at work has changed them."""
        held = None if self._held is None else self._held[batch]
        return self._load(batch) if held is None else held

    def put(self, batch: int, states: Tensor) -> None:
        """Take the states of a batch."""
        states = states.detach().contiguous().cpu()
        if self._held is not None:
            self._held[batch] = states
        else:
            self._write(batch, states)

    def finish(self, number: int, *, is_last: bool = False) -> None:
        """End a block: what was put is what the next one gets.

        Args:
            number: of blocks that are passed; 0 after the embedding.
            is_last: no block follows, so nothing needs to be kept for one.
        """
        if self._held is not None:
            if is_last or not number or not self._pace.due():
                return
            self._pace.save(self._write_all)
        partial, path = (
            self._folder / (self._name + PARTIAL),
            self._folder / f"{self._name}{number}",
        )
        with writing(path):
            sync(self._written)
            partial.rename(path)
        if self._read >= 0:
            os.close(self._read)
        self._read, self._written = self._written, -1
        for other in self._files():
            if other != number:
                (self._folder / f"{self._name}{other}").unlink()

    def close(self) -> None:
        """Close the files; they are kept for another run, which the end of the work removes."""
        for fd in (self._read, self._written):
            if fd >= 0:
                os.close(fd)
        self._read = self._written = -1

    def _files(self) -> list[int]:
        names = (path.name.removeprefix(self._name) for path in self._folder.glob(f"{self._name}*"))
        return [int(name) for name in names if name.isdecimal()]

    def _load(self, batch: int) -> Tensor:
        states = torch.empty(self._shapes[batch], dtype=self._dtype)
        fill(self._read, as_bytes(states), self._starts[batch], what="hidden states")
        return states

    def _write_all(self) -> None:
        for batch, states in enumerate(self._held or ()):
            if states is not None:
                self._write(batch, states)

    def _write(self, batch: int, states: Tensor) -> None:
        path = self._folder / (self._name + PARTIAL)
        with writing(path):
            if self._written < 0:
                flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
                self._written = os.open(path, flags, 0o600)
            write_all(self._written, as_bytes(states), self._starts[batch])
        self.bytes_written += states.nbytes
