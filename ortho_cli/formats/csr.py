"""The one check of a CSR matrix, wherever it comes from: a file in pieces, or tensors in memory.

Sound is a matrix whose row pointers climb from 0 to nnz, whose columns are in range and ascend in
each row, and whose values are finite. Numpy only: `verify` imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ortho_cli.errors import ArtifactError
from ortho_cli.formats.artifact import Shape
from ortho_cli.split.dtypes import DTYPES, names_of_torch, words_of

if TYPE_CHECKING:
    from torch import Tensor

BASE_PARTS = ("weight_packed", "weight_scale", "weight_shape")
ORTHO_PARTS = ("crow_indices", "col_indices", "values")

Integers = npt.NDArray[np.integer]


def check_tensors(crow: Tensor, column: Tensor, values: Tensor, shape: Shape, prefix: str) -> None:
    """Refuse tensors that are no sound CSR matrix; of tensors on meta only shapes are checked.

    Args:
        crow: row pointers.
        column: column indices.
        values: of any dtype.
        shape: (out, in) of the matrix.
        prefix: of the parts' names, for errors.
    Raises:
        ArtifactError: names the part, prefixed.
    """
    rows, width = shape
    if tuple(crow.shape) != (rows + 1,) or column.shape != values.shape or values.ndim != 1:
        raise unsound(
            f"`{prefix}crow_indices` {list(crow.shape)}, col_indices {list(column.shape)} and "
            f"values {list(values.shape)} are no CSR matrix of {rows} rows"
        )
    if crow.is_meta or column.is_meta or values.is_meta:
        return
    pointers = crow.detach().cpu().numpy()
    check_positions(pointers, [column.detach().cpu().numpy()], values.numel(), width, prefix)
    check_finite(values, prefix)


def check_positions(
    crow: Integers, columns: Iterable[Integers], nnz: int, width: int, prefix: str
) -> None:
    """Refuse row pointers that do not climb, and columns out of range or out of order.

    Args:
        crow: (out + 1,) row pointers, out > 0.
        columns: the nnz column indices, in pieces of any length.
        nnz: entries of the matrix.
        width: its columns.
        prefix: of the parts' names, for errors.
    Raises:
        ArtifactError: names the part, prefixed.
    """
    crow = crow.astype(np.int64)
    if crow[0] != 0 or crow[-1] != nnz or (np.diff(crow) < 0).any():
        raise unsound(f"`{prefix}crow_indices` does not climb from 0 to {nnz}")
    at, last = 0, -1
    for piece in columns:
        if not piece.size:
            continue
        column = piece.astype(np.int64)
        low, high = int(column.min()), int(column.max())
        if low < 0 or high >= width:
            out = low if low < 0 else high
            raise unsound(f"`{prefix}col_indices` names column {out} of {width}")
        climbs = np.diff(column, prepend=last) > 0
        first, beyond = np.searchsorted(crow, (at, at + column.size))
        climbs[crow[first:beyond] - at] = True  # rows that start here
        if not climbs.all():
            place = at + int(np.flatnonzero(~climbs)[0])
            row = int(np.searchsorted(crow, place, side="right")) - 1
            raise unsound(f"`{prefix}col_indices` does not ascend in row {row}")
        at, last = at + column.size, int(column[-1])


def check_finite(values: Tensor, prefix: str) -> None:
    """Refuse a tensor of values, in memory, that holds NaN or infinity."""
    from ortho_cli.split.quantize import as_bytes

    name = names_of_torch().get(values.dtype, "")
    if values.numel():
        check_words([as_bytes(values.detach().cpu())], name, prefix)


def check_words(pieces: Iterable[memoryview], dtype: str, prefix: str) -> None:
    """Refuse values that hold NaN or infinity.

    Args:
        pieces: their bytes, in pieces of whole values.
        dtype: of the values; those of integers are all finite.
        prefix: of their name, for errors.
    Raises:
        ArtifactError: names the first entry that is not finite.
    """
    exponent = DTYPES[dtype].exponent if dtype in DTYPES else None
    if exponent is None:
        return
    start = 0
    for piece in pieces:
        words = np.frombuffer(piece, words_of(dtype))
        infinite = (words & exponent) == exponent
        if infinite.any():
            at = start + int(infinite.argmax())
            raise unsound(f"`{prefix}values` holds NaN or infinity at entry {at}")
        start += words.size


def unsound(what: str) -> ArtifactError:
    """Say why a stream of ortho is no matrix of its weight."""
    return ArtifactError(what, hint="the stream is damaged, or of another layer")
