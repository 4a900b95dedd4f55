"""Where ortho's weights are, coarsely: how many there are in each block of rows of a weight.

Counts come from row pointers, from counts of rows in layout compact, or from the number of whole
columns: no position is read. Numpy
only, as in `verify`.
"""

from __future__ import annotations

import contextlib

import numpy as np
import numpy.typing as npt

from ortho_cli.errors import ArtifactError, blamed
from ortho_cli.formats.artifact import Artifact, Parts
from ortho_cli.formats.csr import unsound
from ortho_cli.split.dtypes import DTYPES
from ortho_cli.storage.checkpoint import ShardReader, TensorInfo

BLOCKS = 16  # of rows: coarse enough that no count tells a position


def count_row_blocks(artifact: Artifact, *, blocks: int = BLOCKS) -> dict[str, list[float]]:
    """Tell which share of each block of rows ortho holds.

    Args:
        artifact: with an ortho that is open, or none.
        blocks: of each weight, as equal as its rows allow; a weight of fewer rows has fewer.
    Returns:
        The shares in [0, 1] by module; empty without ortho.
    Raises:
        ArtifactError: row pointers or counts do not fit the weight; names the tensor.
    """
    found = {}
    with blamed(ArtifactError), contextlib.closing(ShardReader(artifact.files)) as reader:
        for module, parts in artifact.kept.items():
            rows, width = artifact.shapes[module]
            counts = _counts(reader, parts, rows, width, f"{module}.")
            edges = np.linspace(0, rows, min(blocks, rows) + 1).astype(np.int64)
            sums = np.add.reduceat(counts, edges[:-1])
            found[module] = [float(share) for share in sums / (np.diff(edges) * width)]
    return found


def _counts(
    reader: ShardReader, parts: Parts, rows: int, width: int, prefix: str
) -> npt.NDArray[np.int64]:
    """Count the entries of each row."""
    if "crow_indices" in parts:
        crow, whole, name = _read(reader, parts["crow_indices"]), 0, "crow_indices"
        counts = np.diff(crow)
    elif "row_counts" not in parts:  # every row has the same columns
        counts, whole = np.zeros(rows, np.int64), parts["col_indices"].numel
        name = "col_indices"
    else:
        counts, name = _read(reader, parts["row_counts"]), "row_counts"
        whole = parts["columns"].numel
    if counts.size != rows or (counts < 0).any() or (counts + whole > width).any():
        raise unsound(f"`{prefix}{name}` tells of more entries than a row of {width} has")
    return counts + whole


def _read(reader: ShardReader, info: TensorInfo) -> npt.NDArray[np.int64]:
    found = np.empty(info.numel, DTYPES[info.dtype].numpy)
    if found.size:
        reader.read_into(found.data.cast("B"), info, start=0)
    return found.astype(np.int64)
