"""The CSR matrix that ortho holds of a weight: the names of its parts, and their one check."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from ortho_cli.errors import ArtifactError
from ortho_cli.split.task import EXPONENTS

BASE_PARTS = ("weight_packed", "weight_scale", "weight_shape")
ORTHO_PARTS = ("crow_indices", "col_indices", "values")

Array = npt.NDArray[Any]


def check_csr(
    crow: Array,
    columns: Iterable[Array],
    values: Iterable[Array],
    *,
    nnz: int,
    width: int,
    dtype: str,
    prefix: str,
) -> None:
    """Refuse a matrix that reads outside of its rows and columns, or holds what is no number.

    Args:
        crow: (out + 1,) integers; this part alone is held as a whole.
        columns: pieces of col_indices, in order.
        values: pieces of the words of values, in order.
        nnz: entries.
        width: columns of the weight.
        dtype: of values: BF16, F16 or F32.
        prefix: of the parts' names, for errors.
    Raises:
        ArtifactError: names the part, prefixed.
    """
    crow = crow.astype(np.int64)
    if crow[0] != 0 or crow[-1] != nnz or (np.diff(crow) < 0).any():
        raise _damaged(f"`{prefix}crow_indices` does not climb from 0 to {nnz}")
    at, last = 0, -1
    for piece in columns:
        column = piece.astype(np.int64)
        if not column.size:
            continue
        if column.min() < 0 or column.max() >= width:
            raise _damaged(f"`{prefix}col_indices` names column {int(column.max())} of {width}")
        climbs = np.diff(column, prepend=last) > 0
        first, beyond = np.searchsorted(crow, (at, at + column.size))
        climbs[crow[first:beyond] - at] = True  # rows that start here
        if not climbs.all():
            place = at + int(np.flatnonzero(~climbs)[0])
            row = int(np.searchsorted(crow, place, side="right")) - 1
            raise _damaged(f"`{prefix}col_indices` does not ascend in row {row}")
        at, last = at + column.size, int(column[-1])
    exponent = EXPONENTS[dtype]
    for words in values:
        if words.size and ((words & exponent) == exponent).any():
            raise _damaged(f"`{prefix}values` holds NaN or infinity")


def _damaged(what: str) -> ArtifactError:
    return ArtifactError(what, hint="the stream is damaged, or of another layer")
