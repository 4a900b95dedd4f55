"""The curvature of one weight after another, streamed from a statistics file beside its rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from ortho_cli.errors import CalibrationError
from ortho_cli.formats.artifact import module_of
from ortho_cli.formats.statistics import GRAM, StatisticsReader
from ortho_cli.split.exact import widen
from ortho_cli.split.task import WORDS, Array, CurvatureTile, Room, Vector, as_bytes
from ortho_cli.storage.checkpoint import TensorInfo

# Rows that are held against their columns at a time: what is copied stays small.
GRAM_ROWS = 256


class Curvature:
    """The curvature of one weight; what has (in,) or (out,) numbers is held, the rest streamed."""

    def __init__(self, reader: StatisticsReader, name: str) -> None:
        """Read what is small, and check it.

        Raises:
            CalibrationError: it is negative, NaN or infinite somewhere, or damaged.
        """
        self._reader, self._name = reader, name
        self._digest = blake3()  # of what is streamed
        self._rows: Vector | None = None
        self._columns: Vector | None = None
        key = f"{module_of(name)}.retain_curvature"
        full = reader.infos.get(key)
        if full is None:
            self._rows = self._load(reader.infos[f"{key}_rows"])
            self._columns = self._load(reader.infos[f"{key}_columns"])
        elif len(full.shape) == 1:
            self._columns = self._load(full)
        self._streamed = full if full is not None and self._columns is None else None

    def read(self, row: int, count: int, room: Room) -> CurvatureTile:
        """Read the next rows of a pass; it begins with row 0."""
        found = self.peek([row], count, room)
        if found.words is not None:
            self._digest = self._digest if row else blake3()
            self._digest.update(as_bytes(found.words))
        return found

    def peek(self, starts: Sequence[int], count: int, room: Room) -> CurvatureTile:
        """Read `count` rows from each of `starts` on, outside of the pass."""
        if self._streamed is None:
            parts = ([v[at : at + count] for at in starts] for v in self._rows or ())
            rows = self._rows and Vector(*map(np.concatenate, parts))
            return CurvatureTile(None, rows, self._columns)
        columns, word = self._streamed.shape[1], WORDS[self._streamed.dtype]
        raw = room("curvature", (len(starts) * count, columns), word)
        for i, start in enumerate(starts):
            piece = as_bytes(raw[i * count : (i + 1) * count])
            self._reader.read_into(piece, self._streamed, start=start * columns * raw.itemsize)
        return CurvatureTile(words=raw)

    def whole(self) -> Array:
        """Read all of it, float32: (in,) where rows do not differ, or (out, in)."""
        if self._streamed is not None:
            words = np.empty(self._streamed.shape, WORDS[self._streamed.dtype])
            self._reader.read_into(as_bytes(words), self._streamed)
            self.check(words, 0)
            self._reader.compare(self._streamed, blake3(as_bytes(words)).hexdigest())
            return widen(words, self._streamed.dtype)
        columns = self._columns.values if self._columns else np.empty(0, np.float32)
        return columns if self._rows is None else self._rows.values[:, None] * columns

    def check(self, words: Array, row: int) -> None:
        """Raise if streamed rows from `row` on hold what is no curvature."""
        if self._streamed is not None:
            values = widen(words, self._streamed.dtype)
            self._check(self._streamed, values, row * self._streamed.shape[1])

    def finish(self, source: str) -> None:
        """Hold what was streamed against the file's digest, the weight against the one measured.

        Args:
            source: BLAKE3 of the weight that was read, in hex.
        """
        if self._streamed is not None:
            self._reader.compare(self._streamed, self._digest.hexdigest())
        self._reader.statistics.check_source(self._name, source)

    def _load(self, tensor: TensorInfo) -> Vector:
        values = np.empty(tensor.shape, np.float32)
        self._reader.read_into(as_bytes(values), tensor)
        self._check(tensor, values, 0)
        self._reader.compare(tensor, blake3(as_bytes(values)).hexdigest())
        return Vector(values, np.sqrt(values))

    def _check(self, tensor: TensorInfo, values: Array, start: int) -> None:
        wrong = ~(np.isfinite(values.reshape(-1)) & (values.reshape(-1) >= 0))
        if wrong.any():
            first = int(np.flatnonzero(wrong)[0])
            index = np.unravel_index(start + first, tensor.shape)
            value, place = float(values.reshape(-1)[first]), [int(i) for i in index]
            raise CalibrationError(
                f"tensor `{tensor.name}` of `{self._reader.statistics.path}` holds "
                f"{value} at {place}; curvature is finite and >= 0",
                hint="calibrate again",
            )


def gram_of(reader: StatisticsReader, name: str) -> npt.NDArray[np.float32]:
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
    values = np.empty(tensor.shape, np.float32)
    reader.read_into(as_bytes(values), tensor)
    if (wrong := _no_gram(values)) is not None:
        raise CalibrationError(f"tensor `{key}` of `{path}` holds {wrong}", hint="calibrate again")
    reader.compare(tensor, blake3(as_bytes(values)).hexdigest())
    return values


def _no_gram(values: npt.NDArray[np.float32]) -> str | None:
    """Say what no Gram matrix could hold, if anything is: the value and the first place."""
    starts = range(0, values.shape[0], GRAM_ROWS)
    for start in starts:
        finite = np.isfinite(rows := values[start : start + GRAM_ROWS])
        if not finite.all():
            row, column = map(int, np.argwhere(~finite)[0])
            return f"{float(rows[row, column])} at {[start + row, column]}; a Gram matrix is finite"
    for start in starts:
        rows = values[start : start + GRAM_ROWS]
        same, below = rows == values[:, start : start + GRAM_ROWS].T, rows.diagonal(start) < 0
        if not same.all():
            row, column = map(int, np.argwhere(~same)[0])
            return (
                f"{float(rows[row, column])} at {[start + row, column]} and "
                f"{float(values[column, start + row])} at {[column, start + row]}; "
                "a Gram matrix is symmetric"
            )
        if below.any():
            place = start + int(np.flatnonzero(below)[0])
            value = float(values[place, place])
            return f"{value} at {[place, place]}; a Gram matrix has a diagonal >= 0"
    return None
