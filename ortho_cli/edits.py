"""Edits: codes of base that forgetting changes, and the file that holds them while work goes on."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import numpy.typing as npt

from ortho_cli.journal import write_private


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    """What forgetting makes of some codes of one weight; ortho keeps the source's weight there."""

    positions: npt.NDArray[np.int64]  # flat, ascending
    codes: npt.NDArray[np.int8]  # of base's width: in [-8, 7], or in [-4, 3]

    def within(self, start: int, stop: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int8]]:
        """Give the edits in [start, stop), positions counted from `start`."""
        first, last = np.searchsorted(self.positions, (start, stop))
        return self.positions[first:last] - start, self.codes[first:last]


Edits = Mapping[str, Edit]
Arrays = Mapping[str, npt.NDArray[Any]]


class Key(Protocol):
    """What files of edits are sealed with, where ortho is."""

    def seal(self, data: bytes) -> bytes:
        """Make them unreadable."""

    def open(self, data: bytes) -> bytes:
        """Make them readable again, or raise ValueError."""


def save_arrays(path: Path, arrays: Arrays, key: Key | None = None) -> None:
    """Write arrays whole or not at all, for their owner alone: they tell what was private."""

    def write(file: BinaryIO) -> None:
        plain = file if key is None else io.BytesIO()
        np.savez(plain, **arrays)  # type: ignore[arg-type, unused-ignore]
        if key is not None:
            assert isinstance(plain, io.BytesIO)
            file.write(key.seal(plain.getvalue()))

    write_private(path, write)


def load_arrays(path: Path, key: Key | None = None) -> dict[str, npt.NDArray[Any]] | None:
    """Read what `save_arrays` wrote; None where there is nothing, or nothing whole."""
    try:
        # numpy leaves a file that it opened itself open when it is cut.
        with path.open("rb") as file, np.load(_unsealed(file, key)) as held:
            return {name: held[name] for name in held.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None


def _unsealed(file: BinaryIO, key: Key | None) -> BinaryIO:
    return file if key is None else io.BytesIO(key.open(file.read()))


def save_edits(path: Path, edits: Edits, key: Key | None = None) -> None:
    """Keep edits that are final, so that a killed run need not find them again."""
    arrays: dict[str, npt.NDArray[Any]] = {}
    for name, edit in edits.items():
        arrays[f"{name}/positions"], arrays[f"{name}/codes"] = edit.positions, edit.codes
    save_arrays(path, arrays, key)


def load_edits(path: Path, key: Key | None = None) -> dict[str, Edit] | None:
    """Read what `save_edits` wrote; None where there is nothing whole."""
    arrays = load_arrays(path, key)
    if arrays is None:
        return None
    names = sorted({key.rpartition("/")[0] for key in arrays})
    return {
        name: Edit(positions=arrays[f"{name}/positions"], codes=arrays[f"{name}/codes"])
        for name in names
    }


def count(edits: Edits) -> int:
    """Codes that are changed."""
    return sum(len(edit.positions) for edit in edits.values())
