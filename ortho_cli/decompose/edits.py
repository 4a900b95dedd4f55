"""Edits: codes of base that forgetting changes, and the file that keeps them for a resumed run."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from ortho_cli.decompose.plan import SplitTensor
from ortho_cli.errors import InternalError
from ortho_cli.storage.sealing import WorkKey
from ortho_cli.storage.work_folder import write_private


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    """New codes at some positions of one weight; ortho keeps the source's weight at each."""

    positions: npt.NDArray[np.int64]  # flat, ascending
    codes: npt.NDArray[np.int8]  # of base's width: in [-8, 7], or in [-4, 3]

    def within(self, start: int, stop: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int8]]:
        """Give the edits in [start, stop), positions counted from `start`."""
        first, last = np.searchsorted(self.positions, (start, stop))
        return self.positions[first:last] - start, self.codes[first:last]


Edits = Mapping[str, Edit]
Arrays = Mapping[str, npt.NDArray[np.generic]]
Key = WorkKey  # seals the files of edits, where ortho is sealed


def save_arrays(path: Path, arrays: Arrays, key: Key | None = None) -> None:
    """Write arrays whole or not at all, readable by their owner alone: they reveal private data."""

    def write(file: BinaryIO) -> None:
        plain = io.BytesIO()
        # What np.savez writes, without its pickles.
        with zipfile.ZipFile(file if key is None else plain, "w") as archive:
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)
        if key is not None:
            file.write(key.seal(plain.getvalue()))

    write_private(path, write)


def load_arrays(path: Path, key: Key | None = None) -> dict[str, npt.NDArray[np.generic]] | None:
    """Read what `save_arrays` wrote; None where there is nothing, or nothing whole."""
    try:
        # numpy leaves a file that it opened itself open when it is cut.
        with (
            path.open("rb") as file,
            np.load(file if key is None else io.BytesIO(key.open(file.read()))) as held,
        ):
            return {name: held[name] for name in held.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None


def save_edits(path: Path, edits: Edits, key: Key | None = None) -> None:
    """Write final edits, so that a resumed run need not find them again."""
    arrays: dict[str, npt.NDArray[np.generic]] = {}
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
        name: Edit(
            positions=arrays[f"{name}/positions"].astype(np.int64, copy=False),
            codes=arrays[f"{name}/codes"].astype(np.int8, copy=False),
        )
        for name in names
    }


def check_edits(edits: Edits, split: Mapping[str, SplitTensor]) -> None:
    """Check that ortho has room for each position that moves, and that `within` finds each.

    Args:
        edits: by name of the weight.
        split: the weights that are split, by name.
    Raises:
        InternalError: a weight is not split; more positions than ortho keeps; positions that are
            not ascending inside the weight, or codes that base cannot hold: `Edit.within` would
            skip them, and base would still know the secret.
    """
    for name, edit in edits.items():
        if name not in split:
            raise InternalError(f"forgetting moves codes of `{name}`, which is not split")
        if wrong := _misfit(edit, split[name]):
            raise InternalError(f"forgetting moves codes of `{name}`: {wrong}")


def _misfit(edit: Edit, tensor: SplitTensor) -> str | None:
    """Describe what is wrong with the edits of one weight; None if nothing is."""
    places, codes = edit.positions, edit.codes
    if len(places) != len(codes):
        return f"{len(places)} positions and {len(codes)} codes"
    if len(places) > tensor.k:
        return f"{len(places)} of them, and ortho keeps {tensor.k}"
    if tensor.columns is not None:
        count = len(np.unique(places % tensor.shape[1]))
        if count > tensor.columns:
            return f"in {count} columns, and ortho keeps {tensor.columns}"
    if not len(places):
        return None
    if not (np.diff(places) > 0).all() or places[0] < 0 or places[-1] >= tensor.source.numel:
        return f"their positions do not ascend inside its {tensor.source.numel} weights"
    half = 1 << (tensor.bits - 1)
    if codes.min() < -half or codes.max() >= half:
        return f"from {codes.min()} to {codes.max()}, which {tensor.bits} bits do not hold"
    return None


def count(edits: Edits) -> int:
    """Count the codes that change."""
    return sum(len(edit.positions) for edit in edits.values())
