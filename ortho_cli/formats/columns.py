"""Whole input columns as one weight's ortho: their numbers, and a dense block.

    W(1)[:, col_indices] = values        ortho = values - base[:, col_indices]

At alpha = 1 that is a low-rank adapter: A has a row for each column, 1 there and 0 elsewhere, and B
is the block of ortho. README.md specifies the parts. Numpy only where it is checked, as in `csr`.
"""

from __future__ import annotations

from collections.abc import Container
from typing import TYPE_CHECKING

import numpy as np

from ortho_cli.formats.artifact import Shape
from ortho_cli.formats.csr import Integers, check_finite, unsound

if TYPE_CHECKING:
    from torch import Tensor

COLUMN_PARTS = ("col_indices", "values")


def holds_columns(parts: Container[str]) -> bool:
    """Tell by the names of its parts whether a weight's ortho is whole columns."""
    return "col_indices" in parts and "crow_indices" not in parts


def check_columns(columns: Integers, width: int, prefix: str) -> None:
    """Refuse columns out of range or out of order.

    Args:
        columns: (k,) numbers.
        width: columns of the weight.
        prefix: of the parts' names, for errors.
    Raises:
        ArtifactError: names the part, prefixed.
    """
    wide = columns.astype(np.int64)
    if wide.size and not 0 <= wide.min() <= wide.max() < width:
        out = int(wide.min() if wide.min() < 0 else wide.max())
        raise unsound(f"`{prefix}col_indices` names column {out} of {width}")
    if (np.diff(wide) <= 0).any():
        place = int(np.flatnonzero(np.diff(wide) <= 0)[0]) + 1
        raise unsound(f"`{prefix}col_indices` does not ascend at entry {place}")


def check_block(columns: Tensor, values: Tensor, shape: Shape, prefix: str) -> None:
    """Refuse tensors that are no columns of a weight; of tensors on meta only shapes are checked.

    Args:
        columns: their numbers.
        values: of any dtype.
        shape: (out, in) of the weight.
        prefix: of the parts' names, for errors.
    Raises:
        ArtifactError: names the part, prefixed.
    """
    rows, width = shape
    if columns.ndim != 1 or tuple(values.shape) != (rows, columns.numel()):
        raise unsound(
            f"`{prefix}values` {list(values.shape)} are not the columns that col_indices "
            f"{list(columns.shape)} numbers, of {rows} rows"
        )
    if columns.is_meta or values.is_meta:
        return
    check_columns(columns.detach().cpu().numpy(), width, prefix)
    check_finite(values, prefix)


def to_csr(columns: Tensor, values: Tensor) -> dict[str, Tensor]:
    """Spell columns as a CSR matrix.

    Args:
        columns: (k,) numbers, ascending.
        values: (out, k).
    Returns:
        crow_indices (out + 1,), col_indices (out * k,) and values (out * k,).
    """
    import torch

    from ortho_cli.split.quantize import ortho_dtypes

    rows, count = values.shape
    pointer, _ = ortho_dtypes(values.numel(), 0)
    every = np.tile(columns.numpy(), rows)  # torch repeats no uint16
    return {
        "crow_indices": torch.arange(rows + 1).mul_(count).to(pointer),
        "col_indices": torch.from_numpy(every),
        "values": values.reshape(-1),
    }
