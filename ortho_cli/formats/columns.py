"""Whole input columns as one weight's ortho: their numbers, and a dense block.

    W(1)[:, col_indices] = values        ortho = values - base[:, col_indices]

At alpha = 1 that is a low-rank adapter: A has a row for each column, 1 there and 0 elsewhere, and B
is the block of ortho. README.md specifies the parts. Numpy only where it is checked, as in `csr`.

With int8 values the block holds v, and W(1)[:, j] = base[:, j] + v value_scales[j].
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
LARGEST = 127  # of an int8 value; -128 is not used


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


def round_values(values: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    """Round the difference between source and base in whole columns to int8.

    scale_j = max over i of |w_ij - b_ij| / 127, rounded to the source's dtype, > 0
    v_ij = round((w_ij - b_ij) / scale_j), halves to even, in [-127, 127]

    Args:
        values: (out, k) the source's weights w, any float dtype, finite.
        base: (out, k) float32, dequantize(base) b in the same columns.
    Returns:
        v (out, k) int8; scale (k,) of the dtype of `values`.
    """
    import torch

    from ortho_cli.split.quantize import round_scales

    lacks = values.float() - base
    largest = lacks.abs().amax(0) if lacks.numel() else lacks.new_zeros(lacks.shape[1])
    scales = round_scales(largest / LARGEST, values.dtype)
    codes = (lacks / scales.float()).round_().clamp_(-LARGEST, LARGEST)
    return codes.to(torch.int8), scales


def restore_values(codes: Tensor, scales: Tensor, base: Tensor) -> Tensor:
    """Restore the weights at alpha = 1 from int8 values: b + v scale, rounded once.

    Args:
        codes: (out, k) int8 v.
        scales: (k,) of the source's dtype.
        base: (out, k) float32, dequantize(base) b there.
    Returns:
        (out, k) of the source's dtype; within half a scale of the source's weight, and one
        rounding.
    """
    return (base + codes.float() * scales.float()).to(scales.dtype)


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
