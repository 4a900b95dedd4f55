"""The curvature of one tensor after another, streamed from a statistics file beside the weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

from ortho_cli.errors import CalibrationError
from ortho_cli.formats.artifact import module_of
from ortho_cli.formats.statistics import GRAM, CurvaturePass, StatisticsReader
from ortho_cli.split import quantize
from ortho_cli.split.quantize import Empty, as_bytes
from ortho_cli.storage.checkpoint import TensorInfo

# Rows that are held against their columns at a time: what is copied stays small.
GRAM_ROWS = 256


class Curvature(CurvaturePass[Tensor]):
    """One pass over the curvature of one weight, as torch's tensors."""

    def tile(self, row: int, count: int, *, empty: Empty) -> tuple[Tensor, Tensor]:
        """Read the next rows.

        Returns:
            Curvature and its square root, float32; (in,) where rows do not differ, or (count, in).
        """
        return self._read([row], count, empty, self._digest)

    def whole(self) -> Tensor:
        """Read all of it, float32: (in,) where rows do not differ, or (out, in)."""
        if self._columns is None:
            return self._load(self._streamed).float()
        return self._columns if self._rows is None else self._rows[:, None] * self._columns

    def sample(self, rows: Sequence[int], count: int, *, empty: Empty) -> tuple[Tensor, Tensor]:
        """Read `count` rows from each of `rows` on, outside of the pass."""
        return self._read(rows, count, empty, None)

    def _read(
        self, starts: Sequence[int], count: int, empty: Empty, digest: blake3 | None
    ) -> tuple[Tensor, Tensor]:
        if self._columns is not None:
            if self._rows is None:
                return self._columns, _root(self._columns, empty)
            rows = torch.cat([self._rows[start : start + count, None] for start in starts])
            shape = (len(rows), len(self._columns))
            values = torch.mul(rows, self._columns, out=empty(shape, torch.float32))
            roots = _root(rows, empty), _root(self._columns, empty)
            return values, torch.mul(*roots, out=empty(shape, torch.float32))
        full = self._streamed
        columns, dtype = full.shape[1], _dtype(full)
        shape = (len(starts) * count, columns)
        raw = empty(shape, dtype)
        for i, start in enumerate(starts):
            piece = raw[i * count : (i + 1) * count]
            begin = start * columns * dtype.itemsize
            self._reader.read(as_bytes(piece), full, start=begin)
            if not quantize.is_curvature(piece):
                raise self._no_curvature(full, piece, start * columns)
        if digest is not None:
            digest.update(as_bytes(raw))
        values = raw if dtype == torch.float32 else empty(shape, torch.float32).copy_(raw)
        return values, _root(values, empty)

    def _load(self, tensor: TensorInfo) -> Tensor:
        values = torch.empty(tensor.shape, dtype=_dtype(tensor))
        self._reader.read(as_bytes(values), tensor)
        if not quantize.is_curvature(values):
            raise self._no_curvature(tensor, values, 0)
        self._reader.compare(tensor, blake3(as_bytes(values)).hexdigest())
        return values

    def _no_curvature(self, tensor: TensorInfo, values: Tensor, start: int) -> CalibrationError:
        flat = values.reshape(-1).float()
        first = int(torch.nonzero(~((flat >= 0) & torch.isfinite(flat)))[0])
        index = np.unravel_index(start + first, tensor.shape)
        return CalibrationError(
            f"tensor `{tensor.name}` of `{self._reader.statistics.path}` holds "
            f"{flat[first].item()} at {[int(i) for i in index]}; curvature is finite and >= 0",
            hint="calibrate again",
        )


def gram_of(reader: StatisticsReader, name: str) -> Tensor:
    """Read the full input Gram matrix of the weight `name`, and check it.

    Returns:
        (in, in) float32, finite, exactly symmetric, with a diagonal >= 0; positive
        semidefinite up to rounding. A column that is 0 throughout is an input that never was
        anything else.
    Raises:
        CalibrationError: the file has none, or it is damaged; names the tensor and the place.
    """
    key, path = module_of(name) + GRAM, reader.statistics.path
    tensor = reader.infos.get(key)
    if tensor is None:
        raise CalibrationError(
            f"`{path}` holds no input Gram matrix of `{name}`",
            hint="ortho calibrate MODEL --data FILE --gram full",
        )
    values = torch.empty(tensor.shape, dtype=torch.float32)
    reader.read(as_bytes(values), tensor)
    if (wrong := _no_gram(values)) is not None:
        raise CalibrationError(f"tensor `{key}` of `{path}` holds {wrong}", hint="calibrate again")
    reader.compare(tensor, blake3(as_bytes(values)).hexdigest())
    return values


def _no_gram(values: Tensor) -> str | None:
    """Say what no Gram matrix could hold, if anything is: the value and the first place."""
    starts = range(0, values.shape[0], GRAM_ROWS)
    for start in starts:
        finite = torch.isfinite(rows := values[start : start + GRAM_ROWS])
        if not bool(finite.all()):
            row, column = torch.nonzero(~finite)[0].tolist()
            return f"{rows[row, column]} at {[start + row, column]}; a Gram matrix is finite"
    for start in starts:
        rows = values[start : start + GRAM_ROWS]
        same, below = rows == values[:, start : start + GRAM_ROWS].T, rows.diagonal(start) < 0
        if not bool(same.all()):
            row, column = torch.nonzero(~same)[0].tolist()
            return (
                f"{rows[row, column]} at {[start + row, column]} and "
                f"{values[column, start + row]} at {[column, start + row]}; a Gram matrix is "
                "symmetric"
            )
        if bool(below.any()):
            place = start + int(torch.nonzero(below)[0])
            return f"{values[place, place]} at {[place, place]}; a Gram matrix has a diagonal >= 0"
    return None


def _root(values: Tensor, empty: Empty) -> Tensor:
    """Take square roots, each rounded as IEEE 754 says; torch's differ in the last bit."""
    found = empty(tuple(values.shape), torch.float32)
    np.sqrt(values.numpy(), out=found.numpy())
    return found


def _dtype(tensor: TensorInfo) -> torch.dtype:
    return torch.bfloat16 if tensor.dtype == "BF16" else torch.float32
