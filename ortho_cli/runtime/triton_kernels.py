"""Triton kernels of y = x (dequantize(base) + alpha * ortho)^T + bias, for CUDA.

No weight is ever unpacked to memory. A word of `weight_packed` holds eight neighbouring columns, so
a tile of words is multiplied eight times: its i-th codes by columns i, i + 8, i + 16... of x.

* **One row of x**: products and sums in float32; each program reads its words once.
* **2 rows and more**: the same loop over `tl.dot`, in x's dtype where the scales have it too
  (a product of two such numbers is exact in float32, where it is summed), else in float32.
* **ortho**, up to 16 rows: gathered in the same program, row by row of the CSR, after its share of
  base. More rows: a kernel of its own first, on x transposed, whose result is then added.
* Where there are too few tiles to fill a card, `in` is cut into shares. A second kernel adds their
  sums in order: no atomics, so the same bytes every time.

Codes times scales are rounded to the scales' dtype first, as `product.dequantize_rows` does. Sums
are float32, rounded once, to x's dtype. Nothing waits for the device and all launches follow from
shapes, so calls can be captured in a CUDA graph; warm them up before, for Triton compiles a kernel
at its first call.

Triton's interpreter (TRITON_INTERPRET=1, set before triton is imported) runs the same kernels on
the CPU, except for two faults of its own: it truncates casts to bfloat16 (there `_round` rounds by
integers), and multiplies bfloat16's bit patterns in `tl.dot` (there float32 is used). The kernels
were run in the interpreter only, on no card.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ortho_cli.runtime.operands import Alpha, Base, Ortho
from ortho_cli.split.dtypes import SPLIT, torch_dtypes

FLOATS = tuple(torch_dtypes()[name] for name in SPLIT)
GATHER_ROWS = 16  # of x: up to here ortho is gathered beside base; above, by a kernel of its own
SLAB_ROWS = 2048  # of x at a time: bounds what is held besides x and y
PROGRAMS = 256  # about two for each multiprocessor of an H100; fixed, so that sums are the same
MAX_SHARES = 8
GATHERED = 8192  # elements of x that a program gathers at a time

INTERPRETED = tl.constexpr(not isinstance(tl.sum, triton.JITFunction))
WITHOUT, GATHERED_HERE, ADDED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


class Blocks(NamedTuple):
    """How one product is cut into programs."""

    x_rows: int  # of x in a program
    rows: int  # of the weight in a program
    words: int  # of `weight_packed` in a step of its loop
    shares: int  # programs that `in` is cut into
    warps: int
    stages: int = 3  # of loads under way in its loop


def takes(x: Tensor, base: Base) -> bool:
    """Whether these kernels support the operands; where not, `product` unpacks tiles.

    Args:
        x: (n, in).
        base: codes with (out, groups) scales.
    Returns:
        True for codes of 4 bits, groups of a multiple of 8 columns that divide `in`, at least one
        row of x and of the weight, and bfloat16, float16 or float32 x and scales. Codes of 3 bits
        straddle words, and have no kernel yet.
    """
    rows, columns = base.shape
    groups = base.weight_scale.shape[1]
    return (
        base.bits == 4
        and x.shape[0] > 0
        and rows > 0
        and groups > 0
        and columns % (groups * 8) == 0
        and x.dtype in FLOATS
        and base.weight_scale.dtype in FLOATS
    )


def blocks(x_rows: int, rows: int, words: int, *, wide: bool) -> Blocks:
    """Choose how a product is cut, by its shape alone: no timing, so reruns agree.

    Args:
        x_rows: of x.
        rows: of the weight.
        words: of `weight_packed` in a row.
        wide: whether `tl.dot` multiplies float32, which takes more of a program's memory.
    Returns:
        Sizes that are powers of two; for more than one row of x at least 16, as `tl.dot` wants.
    Chosen by reading the compiled code, and measured on no card: 16 words are in one group of 128
    columns, so a step reads one scale per row, and each thread four words of two rows.
    """
    if x_rows == 1:
        cut = Blocks(1, 32, 16, 1, 2)
    elif x_rows <= GATHER_ROWS:
        cut = Blocks(16, 32, 16, 1, 2)
    elif x_rows <= 64 or wide:
        cut = Blocks(min(64, triton.next_power_of_2(x_rows)), 64, 16, 1, 4)
    else:
        cut = Blocks(128, 128, 16, 1, 8, 2)  # a third stage is more than small cards hold
    programs = triton.cdiv(x_rows, cut.x_rows) * triton.cdiv(rows, cut.rows)
    wanted = triton.cdiv(PROGRAMS, programs)
    steps = triton.cdiv(words, cut.words)
    return cut._replace(shares=max(1, min(MAX_SHARES, wanted, steps // 4)))


def product(
    x: Tensor, base: Base, ortho: Ortho | None, bias: Tensor | None, alpha: Alpha
) -> Tensor:
    """Multiply by W(alpha), unpacked nowhere.

    y = x (dequantize(base) + alpha * ortho)^T + bias, summed in float32, rounded once.

    Args:
        x: (n, in), any strides; `takes(x, base)` is True.
        base: codes and scales.
        ortho: the sparse stream; None, or nothing kept, launches nothing for it.
        bias: (out,) or None.
        alpha: a float, or float32 (n,) with one for each row of x; 0.0 touches nothing of ortho.
    Returns:
        (n, out) of x's dtype, contiguous.
    """
    if (isinstance(alpha, float) and alpha == 0.0) or (ortho and not ortho.residual.numel()):
        ortho = None
    y = torch.empty((x.shape[0], base.shape[0]), dtype=x.dtype, device=x.device)
    # Triton launches on the current device, whatever x's is; -1 leaves it alone.
    with torch.cuda.device(x.get_device()):
        for start in range(0, x.shape[0], SLAB_ROWS):
            rows = slice(start, start + SLAB_ROWS)
            here = alpha[rows].contiguous() if isinstance(alpha, Tensor) else alpha
            _slab(y[rows], x[rows], base, ortho, bias, here)
    return y


def _slab(
    y: Tensor, x: Tensor, base: Base, ortho: Ortho | None, bias: Tensor | None, alpha: Alpha
) -> None:
    x_rows, columns = x.shape
    rows, words = base.weight_packed.shape
    scale = base.weight_scale.contiguous()
    narrow = x.dtype == scale.dtype and x.dtype != torch.float32
    cut = blocks(x_rows, rows, words, wide=not narrow)
    # Arguments that a kernel's form does not read still need a pointer: y serves.
    crow, column, residual, added = y, y, y, y
    form, chunk = WITHOUT, 2
    if ortho is not None and x_rows <= GATHER_ROWS:
        form = GATHERED_HERE
        crow, column, residual = (part.contiguous() for part in ortho)
        # As many as a row has on average in a share: more would be masked out, most of the time.
        mean = triton.next_power_of_2(residual.numel() // (rows * cut.shares) + 1)
        chunk = max(2, min(32, mean, GATHERED // (cut.x_rows * cut.rows)))
    elif ortho is not None:
        form, added = ADDED, _sparse_product(x, ortho, rows)
    # Column 8w + i of x at (row, i, w): the elements that one dot reads are contiguous.
    by_code = torch.unflatten(x, 1, (columns // 8, 8)).transpose(1, 2)
    if x_rows > GATHER_ROWS:
        by_code = by_code.contiguous()
    partial = y
    if cut.shares > 1:
        partial = torch.empty((cut.shares, x_rows, rows), dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(rows, cut.rows), triton.cdiv(x_rows, cut.x_rows), cut.shares)
    _multiply[grid](
        partial,
        *(by_code, base.weight_packed.contiguous(), scale),
        *(crow, column, residual, added),
        y if bias is None else bias,
        alpha,
        *(x_rows, rows, words, scale.shape[1]),
        *by_code.stride(),
        group_words=words // scale.shape[1],
        form=form,
        has_bias=bias is not None and cut.shares == 1,
        alpha_per_row=isinstance(alpha, Tensor),
        narrow=narrow and not (INTERPRETED and x.dtype == torch.bfloat16),
        shares=cut.shares,
        block_x=cut.x_rows,
        block_rows=cut.rows,
        block_words=cut.words,
        chunk=chunk,
        num_warps=cut.warps,
        num_stages=cut.stages,
    )
    if cut.shares > 1:
        _add_shares[(triton.cdiv(rows, 256), x_rows)](
            *(y, partial, y if bias is None else bias, x_rows, rows),
            has_bias=bias is not None,
            shares=cut.shares,
            block=256,
            num_warps=4,
        )


def _sparse_product(x: Tensor, ortho: Ortho, rows: int) -> Tensor:
    """Multiply by the sparse stream alone: float32 (out, n), so that neighbours share columns."""
    added = torch.empty((rows, x.shape[0]), dtype=torch.float32, device=x.device)
    block = min(128, triton.next_power_of_2(x.shape[0]))
    _multiply_sparse[(rows, triton.cdiv(x.shape[0], block))](
        added,
        x.t().contiguous(),
        *(part.contiguous() for part in ortho),
        x.shape[0],
        block_x=block,
        chunk=16,
        num_warps=4,
    )
    return added


@triton.jit
def _round(value, dtype: tl.constexpr):
    """Round float32 to a dtype, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:  # its cast truncates
        bits = value.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        value = tl.where(value == value, bits.to(tl.float32, bitcast=True), value)
    return value.to(dtype)


@triton.jit
def _gather(x, column, residual, first, last, at_x, in_x, stride_code, stride_word, chunk):
    """Multiply by the entries `first` to `last` of each row of the CSR."""
    total = tl.zeros((at_x.shape[0], first.shape[0]), dtype=tl.float32)
    for step in range(0, tl.max(last - first, axis=0), chunk):
        entry = first[None, :] + step + tl.arange(0, chunk)[:, None]
        live = entry < last[None, :]
        at = tl.load(column + entry, mask=live, other=0)
        kept = tl.load(residual + entry, mask=live, other=0.0)
        offset = (at // 8) * stride_word + (at % 8) * stride_code
        if at_x.shape[0] == 1:
            here = tl.load(x + offset, mask=live, other=0.0).to(tl.float32)
            total += tl.sum(kept * here, axis=0)[None, :]
        else:
            here = tl.load(
                x + at_x[None, :, None] + offset[:, None, :],
                mask=live[:, None, :] & in_x[None, :, None],
                other=0.0,
            ).to(tl.float32)
            total += tl.sum(kept[:, None, :] * here, axis=0)
    return total


# Longer than 60 lines: one loop over words with all forms of the product, so that each is one
# kernel launch. Triton inlines calls, and a split would pass every pointer and block on.
@triton.jit(do_not_specialize=["x_rows"])
def _multiply(
    y,
    x,
    packed,
    scale,
    crow,
    column,
    residual,
    added,
    bias,
    alpha,
    x_rows,
    rows,
    words,
    groups,
    stride_x,
    stride_code,
    stride_word,
    group_words: tl.constexpr,
    form: tl.constexpr,
    has_bias: tl.constexpr,
    alpha_per_row: tl.constexpr,
    narrow: tl.constexpr,
    shares: tl.constexpr,
    block_x: tl.constexpr,
    block_rows: tl.constexpr,
    block_words: tl.constexpr,
    chunk: tl.constexpr,
):
    """Multiply a block of x by a block of W(alpha)'s rows, or one share of the columns of both."""
    share = tl.program_id(2)
    row = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    x_row = tl.program_id(1) * block_x + tl.arange(0, block_x)
    in_rows, in_x = row < rows, x_row < x_rows
    at_x = x_row.to(tl.int64) * stride_x
    steps = tl.cdiv(tl.cdiv(words, block_words), shares)
    first = share * steps * block_words
    last = tl.minimum(first + steps * block_words, words)
    total = tl.zeros((block_x, block_rows), dtype=tl.float32)
    for start in range(first, last, block_words):
        word = start + tl.arange(0, block_words)
        live = (word < words)[:, None] & in_rows[None, :]
        codes = tl.load(
            packed + row.to(tl.int64)[None, :] * words + word[:, None], mask=live, other=0
        )
        at_scale = scale + row.to(tl.int64)[None, :] * groups
        if group_words % block_words == 0:  # one group for the whole step
            factor = tl.load(at_scale + start // group_words, mask=in_rows[None, :], other=0.0)
        else:
            factor = tl.load(at_scale + (word // group_words)[:, None], mask=live, other=0.0)
        factor = factor.to(tl.float32)
        for code in tl.static_range(8):
            weight = (((codes >> (4 * code)) & 15) - 8).to(tl.float32) * factor
            weight = _round(weight, scale.dtype.element_ty)
            at_word = code * stride_code + word * stride_word
            if block_x == 1:
                here = tl.load(x + at_word, mask=word < words, other=0.0).to(tl.float32)
                total += tl.sum(weight.to(tl.float32) * here[:, None], axis=0)[None, :]
            else:
                here = tl.load(
                    x + at_x[:, None] + at_word[None, :],
                    mask=in_x[:, None] & (word < words)[None, :],
                    other=0.0,
                )
                if narrow:
                    total = tl.dot(here, weight, total, input_precision="ieee")
                else:
                    total = tl.dot(
                        here.to(tl.float32), weight.to(tl.float32), total, input_precision="ieee"
                    )
    if form != WITHOUT:
        if form == GATHERED_HERE:
            # A share of entries, not of columns: what matters is that each is taken once.
            begin = tl.load(crow + row, mask=in_rows, other=0)
            count = tl.load(crow + row + 1, mask=in_rows, other=0) - begin
            entry, end = begin + count * share // shares, begin + count * (share + 1) // shares
            sparse = _gather(
                x, column, residual, entry, end, at_x, in_x, stride_code, stride_word, chunk
            )
        else:  # once, whatever the number of shares
            at = row.to(tl.int64)[None, :] * x_rows + x_row[:, None]
            mask = in_x[:, None] & in_rows[None, :] & (share == 0)
            sparse = tl.load(added + at, mask=mask, other=0.0)
        if alpha_per_row:
            total += sparse * tl.load(alpha + x_row, mask=in_x, other=0.0)[:, None]
        else:
            total += sparse * alpha
    if has_bias:
        total += tl.load(bias + row, mask=in_rows, other=0.0).to(tl.float32)[None, :]
    at = (share * x_rows + x_row[:, None]).to(tl.int64) * rows + row[None, :]
    mask = in_x[:, None] & in_rows[None, :]
    tl.store(y + at, _round(total, y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["x_rows"])
def _add_shares(
    y,
    partial,
    bias,
    x_rows,
    rows,
    has_bias: tl.constexpr,
    shares: tl.constexpr,
    block: tl.constexpr,
):
    """Add the shares of one row of x, first to last, then bias; round once."""
    row = tl.program_id(0) * block + tl.arange(0, block)
    x_row = tl.program_id(1).to(tl.int64)
    total = tl.zeros((block,), dtype=tl.float32)
    for share in tl.static_range(shares):
        at = (share * x_rows + x_row) * rows + row
        total += tl.load(partial + at, mask=row < rows, other=0.0)
    if has_bias:
        total += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)
    tl.store(y + x_row * rows + row, _round(total, y.dtype.element_ty), mask=row < rows)


@triton.jit(do_not_specialize=["x_rows"])
def _multiply_sparse(
    added, x, crow, column, residual, x_rows, block_x: tl.constexpr, chunk: tl.constexpr
):
    """Multiply one row of the CSR by a block of x, which is transposed: (in, n) to (out, n)."""
    row = tl.program_id(0)
    x_row = tl.program_id(1) * block_x + tl.arange(0, block_x)
    first, last = tl.load(crow + row), tl.load(crow + row + 1)
    total = tl.zeros((block_x,), dtype=tl.float32)
    for start in range(first, last, chunk):
        entry = start + tl.arange(0, chunk)
        live = entry < last
        at = tl.load(column + entry, mask=live, other=0).to(tl.int64)
        kept = tl.load(residual + entry, mask=live, other=0.0)
        here = tl.load(
            x + at[:, None] * x_rows + x_row[None, :],
            mask=live[:, None] & (x_row < x_rows)[None, :],
            other=0.0,
        )
        total += tl.sum(kept[:, None] * here.to(tl.float32), axis=0)
    tl.store(added + row.to(tl.int64) * x_rows + x_row, total, mask=x_row < x_rows)
