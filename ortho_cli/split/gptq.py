"""Error-compensated rounding: what one column's rounding breaks, the columns after it mend.

Pure functions on CPU tensors, as in `ops`, whose conventions they share.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ortho_cli.errors import NumericalError
from ortho_cli.split import quantize
from ortho_cli.split.task import Array

DAMPING = 0.01  # of the mean diagonal: GPTQ's own
ROWS = 256  # of a Gram matrix that are put in order at a time
COLUMNS = 64  # rounded before the columns behind them are told; a matrix product from there on


class Factor(NamedTuple):
    """What one weight's Gram matrix comes to, of the n columns that base alone stands for."""

    upper: Tensor  # (n, n) float32, U with U^T U = H^-1, rows and columns in `order`
    order: Tensor  # (n,) int64: the columns, those with the largest inputs first


def factorise(gram: Tensor, *, name: str = "weight", without: Array | None = None) -> Factor:
    """Invert a damped Gram matrix, as a Cholesky factor.

    H = G + 0.01 mean(diag G) I,  H^-1 = U^T U with U upper triangular, both in float64. Columns are
    taken in the order of diag G, largest first, ties to the lower column: what matters most is
    rounded while all the others can still make up for it. Codes are stored where they were.

    It holds 12 bytes per pair of columns: a matrix of float64 beside the Gram matrix, then beside
    the factor.

    Args:
        gram: (in, in) float32, symmetric, positive semidefinite.
        name: the tensor's name, for errors.
        without: columns that ortho holds whole. They have no error, so they leave the problem: H,
            its damping and the factor are those of the other columns.
    Returns:
        The factor; of a matrix of zeros, that of the identity: nothing is compensated.
    Raises:
        NumericalError: the matrix is not positive definite even when damped.
    Source: GPTQ (Frantar et al. 2022, arXiv:2210.17323, algorithm 1 and its act_order).
    """
    diagonal = gram.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True)
    if without is not None:
        order = order[~torch.isin(order, torch.from_numpy(without.astype(np.int64)))]
        diagonal = diagonal[order]
        if not order.numel():
            return Factor(torch.empty(0, 0), order)
    damping = DAMPING * float(diagonal.double().mean())
    n = order.numel()
    # All that follows is done in this one matrix, whose columns are together, as LAPACK has them.
    work = torch.empty((n, n), dtype=torch.float64).mT
    for start in range(0, n, ROWS):
        rows = slice(start, start + ROWS)
        work[rows] = gram[order[rows]][:, order]
    del diagonal, gram  # the caller's last reference, where it has none of its own
    work.diagonal().add_(damping if damping > 0 else 1.0)
    failed = torch.empty((), dtype=torch.int32)
    torch.linalg.cholesky_ex(work, out=(work, failed))
    if not failed:
        torch.cholesky_inverse(work, out=work)
        torch.linalg.cholesky_ex(work, upper=True, out=(work, failed))
    if failed:
        raise NumericalError(
            f"the Gram matrix of `{name}` is not positive definite, damped by {damping:.3g}",
            hint="calibrate with more samples, or round to nearest",
        )
    return Factor(work.float(), order)


def round_columns(
    weight: Tensor, scales: Tensor, factor: Factor, *, bits: int = 4, kept: Tensor | None = None
) -> Tensor:
    """Round one column after another, and let the rest make up for each one's error.

    For each column j in the factor's order, with w the weight as the columns before left it:

        q_j = quantize(w_j),  e = (w_j - v_j) / U_jj,  w_k -= e U_jk  for every k after j

    where v_j = dequantize(q_j), or the weight itself where ortho keeps it.

    Args:
        weight: (out, in) float32, finite; each row by itself.
        scales: (out, groups), > 0, of the dtype they are stored in; they stay what they are.
        factor: of the Gram matrix of this weight's inputs; columns that it lacks are rounded to
            nearest.
        bits: of a code, 3 or 4.
        kept: (out, in) bool: ortho holds the weight, so alpha = 1 has it without error.
    Returns:
        (out, in) float32 that hold the codes, as `ops.quantize` gives them.
    Source: GPTQ (arXiv:2210.17323, algorithm 1), with scales that are known before (its
        static_groups); kept weights as in SpQR (arXiv:2306.03078, algorithm 2), which stores what
        they have become by then, where here they stay the source's.
    """
    upper, order = factor
    columns, group_size = order.numel(), weight.shape[1] // scales.shape[1]
    left = weight[:, order]
    steps = scales.float().repeat_interleave(group_size, 1)[:, order]
    exact = None if kept is None else kept[:, order]
    source = None if kept is None else left.clone()
    codes = torch.empty_like(left)
    for start in range(0, columns, COLUMNS):
        stop = min(start + COLUMNS, columns)
        here, block = left[:, start:stop], upper[start:stop, start:stop]
        errors = torch.empty_like(here)
        for j in range(stop - start):
            w, step = here[:, j : j + 1], steps[:, start + j : start + j + 1].to(scales.dtype)
            code = quantize.quantize(w, step, bits=bits)
            value = quantize.dequantize(code, step)
            codes[:, start + j] = code[:, 0]
            if exact is not None and source is not None:
                column = slice(start + j, start + j + 1)
                value = torch.where(exact[:, column], source[:, column], value)
            error = (w - value) / block[j, j]
            errors[:, j : j + 1] = error
            here[:, j:] -= error * block[j, j:]
        left[:, stop:] -= errors @ upper[start:stop, stop:]
    whole = columns == weight.shape[1]
    every = torch.empty_like(codes) if whole else quantize.quantize(weight, scales, bits=bits)
    return every.index_copy_(1, order, codes)
