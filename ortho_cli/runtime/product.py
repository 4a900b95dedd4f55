"""Multiply by both streams, and choose the kernel that does it: y = x W(alpha)^T + bias.

    W(alpha) = dequantize(base) + alpha * ortho

There are three forms of one product. On the CPU the faster of two is chosen, as measured for
4096 x 4096 in bfloat16 on 2 cores:

* **packed** (CPU, bfloat16 throughout, few rows): torch's INT4 kernel reads the packed codes;
  eight times faster than tiles at one row, as fast near 32. It multiplies q * scale before
  that is rounded to the scales' dtype, and rounds its own result to x's, so it is within one more
  rounding of x's dtype of the exact form. In float16 and float32 it is slower than tiles. Codes of
  3 bits are given to it as codes of 4, which hold them, and take a third more memory there.
* **tiles** (all other cases): some rows at a time are dequantized exactly as readers of base do, in
  compiled loops where numba is installed; ortho is added in place, and a dense product follows: in
  x's dtype, or in float32 where the processor has no products of it (bfloat16 took four times as
  long at 128 rows without AVX-512).
* **fused** (CUDA, where Triton 3.3 or later is installed, for codes of 4 bits): nothing is unpacked
  to memory. Written against Triton's interpreter and not yet run on a card; nor are tiles.

The sparse product is a CSR matrix-vector product for one row, `embedding_bag` for more. Where ortho
is whole columns it is a dense product of few columns, alpha (x[:, columns] ortho^T), as a server
applies a LoRA.
"""

from __future__ import annotations

import math
import warnings
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Protocol, SupportsFloat

import torch
from torch import Tensor
from torch.nn import functional

from ortho_cli.errors import ArtifactError, InternalError, UsageError
from ortho_cli.runtime.operands import Alpha, Base, Columns, Ortho, Packed
from ortho_cli.split import quantize

PACKED_ROWS = 32  # above, unpacking tiles is as fast or faster, and exact
PACKED_GROUPS = (32, 64, 128, 256)  # group sizes torch's kernel takes
PACKED_MULTIPLE = 16  # of out_features, likewise
TILE_ELEMENTS = 1 << 21  # weights unpacked at a time: 4 MB in bfloat16; a call costs microseconds
TRITON = (3, 3)  # the first version that compiled the fused kernels

Sparse = Ortho | Columns

NO_ORTHO = "put ortho.safetensors back, or set alpha to 0"


def prepare(base: Base) -> Packed | None:
    """Convert base for torch's INT4 kernel; None where that kernel does not support it.

    Args:
        base: codes with (out, groups) scales.
    Returns:
        Codes of 4 bits each, and scales beside zeros; None off the CPU, for scales other
        than bfloat16 (slower than tiles there), out not a multiple of 16, group sizes other than 32
        to 256.
    """
    rows, columns = base.shape
    scale = base.weight_scale
    if (
        scale.device.type != "cpu"
        or scale.dtype != torch.bfloat16
        or rows % PACKED_MULTIPLE
        or columns // scale.shape[1] not in PACKED_GROUPS
        or not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu")
    ):
        return None
    nibbles = quantize.unpack_codes(base.weight_packed, bits=base.bits).add_(8)
    codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles.int(), 1)
    zeros = torch.zeros_like(scale)
    return Packed(codes, torch.stack((scale, zeros), dim=-1).transpose(0, 1).contiguous())


def check_alpha(alpha: Alpha | SupportsFloat | str) -> Alpha:
    """Make alpha a float in [0, 1] or a 1-D float32 tensor of such; refuse everything else.

    Raises:
        UsageError: NaN, infinite, below 0, above 1, not a number, or a tensor of 2 dimensions.
    """
    hint = "alpha is a number from 0 (base alone) to 1 (all of ortho), or one for each batch row"
    if isinstance(alpha, Tensor) and alpha.ndim:
        if alpha.ndim != 1 or alpha.dtype in (torch.bool, torch.complex64, torch.complex128):
            raise UsageError(
                f"alpha is a {alpha.dtype} tensor of shape {list(alpha.shape)}", hint=hint
            )
        values: Tensor = alpha.detach().float()
        bad = values[~((values >= 0) & (values <= 1))]
        if bad.numel():
            raise UsageError(f"alpha holds {bad[0].item()}, which is not in [0, 1]", hint=hint)
        return values
    try:
        value = float(alpha)
    except (TypeError, ValueError):
        raise UsageError(f"alpha is {alpha!r}, not a number", hint=hint) from None
    if not 0.0 <= value <= 1.0:
        raise UsageError(f"alpha is {value}, which is not in [0, 1]", hint=hint)
    return value


def is_zero(alpha: Alpha) -> bool:
    """Whether alpha is 0 for every batch row, so that ortho is not needed."""
    return not bool(alpha.any()) if isinstance(alpha, Tensor) else alpha == 0.0


def dual_linear(
    x: Tensor, base: Base, ortho: Sparse | None, bias: Tensor | None, alpha: Alpha
) -> Tensor:
    """Multiply by W(alpha) without ever holding all of it.

    y = x (dequantize(base) + alpha * ortho)^T + bias.

    Args:
        x: (..., in) bfloat16, float16 or float32; any leading dimensions, none or empty too, and
            any strides.
        base: codes and scales; with `prepared`, few rows of x in the scales' dtype take the packed
            form.
        ortho: the sparse stream, as CSR or whole columns; may be None where alpha is 0.
        bias: (out,) or None.
        alpha: a float in [0, 1], or a tensor (x.shape[0],) with one for each batch row. 0, or
            zeros only, touches nothing of ortho.
    Returns:
        (..., out) of x's dtype; accumulated in float32 and rounded once, but in the packed form.
        Under autocast, of autocast's dtype, as `nn.Linear` gives it.
    Raises:
        UsageError: alpha is no number in [0, 1], or not one for each row; x has other columns.
        ArtifactError: alpha is not 0 and there is no ortho.
    Differentiable in x and bias, once; not in the streams. One alpha for the whole batch can be
    captured in a CUDA graph; a tensor of them is checked here, which waits for the device.
    """
    alpha = check_alpha(alpha)
    columns = base.shape[1]
    if not x.ndim or x.shape[-1] != columns:
        raise UsageError(
            f"x has shape {list(x.shape)} where in_features is {columns}",
            hint="its last dimension must be in_features",
        )
    if isinstance(alpha, Tensor):
        alpha = _per_row(alpha, x)
    if isinstance(alpha, float) and alpha == 0.0:
        ortho = None
    elif ortho is None:
        raise ArtifactError("alpha is not 0 and there is no ortho stream", hint=NO_ORTHO)
    kind = x.device.type
    context: AbstractContextManager[object] = nullcontext()
    if torch.is_autocast_enabled(kind):
        x, context = x.to(torch.get_autocast_dtype(kind)), torch.autocast(kind, enabled=False)
    flat = x.reshape(-1, columns)
    needs = flat.requires_grad or (bias is not None and bias.requires_grad)
    with context:
        if needs and torch.is_grad_enabled():
            y: Tensor = _DualLinear.apply(flat, bias, base, ortho, alpha)  # type: ignore[no-untyped-call]
        else:
            y = _forward(flat, base, ortho, bias, alpha)
    return y.view(*x.shape[:-1], base.shape[0])


def _per_row(alpha: Tensor, x: Tensor) -> Alpha:
    """Spread one alpha a batch row over the rows of x flattened; 0.0 where all are."""
    batch = x.shape[0] if x.ndim > 1 else 1
    if alpha.numel() != batch:
        raise UsageError(
            f"alpha has {alpha.numel()} values for {batch} batch rows",
            hint="give one alpha, or one for each row of x's first dimension",
        )
    if not alpha.any():
        return 0.0
    return alpha.to(x.device).repeat_interleave(math.prod(x.shape[1:-1]))


class _Context(Protocol):
    base: Base
    ortho: Sparse | None
    alpha: Alpha
    bias_dtype: torch.dtype | None
    needs_input_grad: tuple[bool, ...]


class _DualLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context,
        x: Tensor,
        bias: Tensor | None,
        base: Base,
        ortho: Sparse | None,
        alpha: Alpha,
    ) -> Tensor:
        ctx.base, ctx.ortho, ctx.alpha = base, ortho, alpha
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _forward(x, base, ortho, bias, alpha)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad.device.type, enabled=False):
            x_grad = bias_grad = None
            if ctx.needs_input_grad[0]:
                x_grad = _times_weight(grad, ctx.base, ctx.ortho, ctx.alpha)
            if ctx.bias_dtype is not None and ctx.needs_input_grad[1]:
                bias_grad = grad.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return x_grad, bias_grad, None, None, None


def _forward(
    x: Tensor, base: Base, ortho: Sparse | None, bias: Tensor | None, alpha: Alpha
) -> Tensor:
    if not x.shape[0]:
        return x.new_zeros((0, base.shape[0]))
    fused = _fused(x.device.type)
    if fused is not None and fused.takes(x, base):
        if not isinstance(ortho, Columns):
            product: Tensor = fused.product(x, base, ortho, bias, alpha)
            return product
        y: Tensor = fused.product(x, base, None, None, 0.0).float()
        return _finish(y, x, ortho, bias, alpha)
    packed, few = base.prepared, x.shape[0] <= PACKED_ROWS
    if packed is not None and few and x.dtype == packed.scales_and_zeros.dtype:
        group_size = base.shape[1] // base.weight_scale.shape[1]
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.contiguous(), packed.codes, group_size, packed.scales_and_zeros
        )
        if ortho is None and bias is None:
            return y
        y = y.float()
    elif isinstance(alpha, Tensor):
        y = _tiled_product(x, base, None, 0.0, torch.float32)
    elif alpha in (0.0, 1.0) and x.dtype == base.weight_scale.dtype and _is_native(x):
        # At both ends of alpha every weight is exact in x's dtype.
        return _tiled_product(x, base, ortho, alpha, x.dtype, bias)
    else:
        y, ortho = _tiled_product(x, base, ortho, alpha, torch.float32), None
    return _finish(y, x, ortho, bias, alpha)


def _finish(
    y: Tensor, x: Tensor, ortho: Sparse | None, bias: Tensor | None, alpha: Alpha
) -> Tensor:
    """Add what base's product lacks, in float32, and round once."""
    if ortho is not None:
        _add_sparse(y, x, ortho, alpha)
    if bias is not None:
        y += bias
    return y.to(x.dtype)


@cache
def _fused(kind: str) -> ModuleType | None:
    """Import the kernels for a kind of device; None without a Triton that can compile them."""
    if kind != "cuda" or find_spec("triton") is None:
        return None
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < TRITON:
        return None
    from ortho_cli.runtime import triton_kernels as fused

    return fused


@cache
def _unpacking() -> ModuleType | None:
    """Import the compiled loops that unpack; None where numba is missing or cannot be loaded."""
    if find_spec("numba") is None:
        return None
    try:
        from ortho_cli.runtime import unpacking
    except ImportError as error:  # numba and numpy, or numba and Python do not fit
        warnings.warn(f"base is unpacked without numba, which is slower: {error}", stacklevel=2)
        return None
    return unpacking


def tiles(base: Base) -> list[tuple[int, int]]:
    """Cut the rows of base into ranges of about TILE_ELEMENTS weights."""
    rows, columns = base.shape
    step = max(1, TILE_ELEMENTS // columns)
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def dequantize_rows(base: Base, start: int, stop: int) -> Tensor:
    """Unpack some rows of base.

    w = q * scale, rounded once to the scales' dtype: `quantize.dequantize`, bit for bit.

    Returns:
        (stop - start, in) of the scales' dtype.
    """
    packed, scale = base.weight_packed[start:stop], base.weight_scale[start:stop]
    if base.bits == 3:
        weight = quantize.unpack_int3(packed).to(scale.dtype)
    else:
        unpacking = None if torch.compiler.is_compiling() else _unpacking()
        if unpacking is not None and unpacking.takes(packed, scale):
            unpacked: Tensor = unpacking.unpack(packed, scale)
            return unpacked
        pairs = packed.contiguous().view(torch.uint8)
        # A byte b times 4097 is b | b << 12, with its nibbles 16 bits apart. 0x4300 | n is 128 + n
        # in bfloat16, so each half is a number in place, and n is the code plus 8.
        both = pairs.int().mul_(4097).bitwise_and_(0x000F000F).bitwise_or_(0x43004300)
        weight = both.view(torch.bfloat16).sub_(136).to(scale.dtype)
    weight.view(*scale.shape, -1).mul_(scale.unsqueeze(-1))
    return weight


def weight_rows(
    base: Base, ortho: Sparse | None, alpha: float, rows: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """Form some rows of W(alpha), added in float32 and rounded once to `dtype`."""
    weight = dequantize_rows(base, *rows).to(dtype)
    if isinstance(ortho, Columns):
        at = ortho.col_indices
        more = alpha * ortho.residual[slice(*rows)]
        weight[:, at] = (weight[:, at].float() + more).to(dtype)
    elif ortho is not None:
        entries, flat = ortho_positions(ortho, rows, base.shape[1])
        values = weight.view(-1)
        values[flat] = (values[flat].float() + alpha * ortho.residual[entries]).to(dtype)
    return weight


def ortho_positions(ortho: Ortho, rows: tuple[int, int], columns: int) -> tuple[slice, Tensor]:
    """Find ortho's entries of some rows: their range in the stream, and their flat positions.

    Returns:
        A slice of `col_indices` and `residual`; (entries,) int64 flat indices from row `rows[0]`.
    """
    start, stop = rows
    crow = ortho.crow_indices[start : stop + 1].long()
    entries = slice(int(crow[0]), int(crow[-1]))
    row = torch.repeat_interleave(
        torch.arange(stop - start, device=crow.device) * columns, crow.diff()
    )
    return entries, row + ortho.col_indices[entries]


def _tiled_product(
    x: Tensor,
    base: Base,
    ortho: Sparse | None,
    alpha: float,
    dtype: torch.dtype,
    bias: Tensor | None = None,
) -> Tensor:
    x = x.to(dtype)
    y = torch.empty((x.shape[0], base.shape[0]), dtype=dtype, device=x.device)
    for start, stop in tiles(base):
        weight = weight_rows(base, ortho, alpha, (start, stop), dtype)
        part = None if bias is None else bias[start:stop].to(dtype)
        y[:, start:stop] = functional.linear(x, weight, part)
    return y


def _times_weight(grad: Tensor, base: Base, ortho: Sparse | None, alpha: Alpha) -> Tensor:
    """Multiply grad by W(alpha), summed in float32 over tiles."""
    wide = grad.float()
    total = torch.zeros((grad.shape[0], base.shape[1]), dtype=torch.float32, device=grad.device)
    for rows in tiles(base):
        here = wide[:, slice(*rows)]
        if isinstance(alpha, float):
            total.addmm_(here, weight_rows(base, ortho, alpha, rows, torch.float32))
            continue
        if ortho is None:
            raise InternalError("each row has an alpha of its own, and there is no ortho stream")
        total.addmm_(here, weight_rows(base, None, 0.0, rows, torch.float32))
        scaled = here * alpha.unsqueeze(-1)
        if isinstance(ortho, Columns):
            total[:, ortho.col_indices] += scaled @ ortho.residual[slice(*rows)]
            continue
        entries, flat = ortho_positions(ortho, rows, base.shape[1])
        sparse = torch.zeros(rows[1] - rows[0], base.shape[1], device=grad.device)
        sparse.view(-1)[flat] = ortho.residual[entries]
        total.addmm_(scaled, sparse)
    return total.to(grad.dtype)


def _is_native(x: Tensor) -> bool:
    """Whether the device multiplies x's dtype itself; where it does not, float32 is faster."""
    if x.device.type != "cpu" or x.dtype == torch.float32:
        return True
    asked = torch.ops.mkldnn
    if x.dtype == torch.bfloat16:
        return bool(asked._is_mkldnn_bf16_supported())
    return bool(asked._is_mkldnn_fp16_supported())


@cache
def _csr_is_quick() -> bool:
    """Whether torch has a CSR product here; asking once also takes its beta warning away."""
    with warnings.catch_warnings(action="ignore"):
        row = torch.zeros(2, dtype=torch.int32)
        torch.sparse_csr_tensor(row, row[:0], torch.zeros(0), (1, 1), check_invariants=False)
    return bool(torch.backends.mkl.is_available())  # type: ignore[no-untyped-call]


def _add_sparse(y: Tensor, x: Tensor, ortho: Sparse, alpha: Alpha) -> None:
    """Add alpha x ortho^T to y (n, out), both float32."""
    if isinstance(ortho, Columns):
        if ortho.col_indices.numel():
            share = alpha.unsqueeze(-1) if isinstance(alpha, Tensor) else alpha
            # Few numbers: alpha is cheapest here.
            y.addmm_(x[:, ortho.col_indices].float() * share, ortho.residual.t())
        return
    x = x.float()
    crow, columns = ortho.crow_indices, ortho.col_indices.to(ortho.crow_indices.dtype)
    if not columns.numel():
        return
    if x.shape[0] == 1 and x.device.type == "cpu" and _csr_is_quick():
        # One call for all: at one row, calls cost more than the arithmetic.
        shape = (y.shape[1], x.shape[1])
        matrix = torch.sparse_csr_tensor(
            crow, columns, ortho.residual, shape, check_invariants=False
        )
        y[0].addmv_(matrix, x[0], alpha=float(alpha))
        return
    sparse = functional.embedding_bag(
        columns, x.t().contiguous(), crow[:-1], mode="sum", per_sample_weights=ortho.residual
    ).t()
    y += sparse.mul_(alpha.unsqueeze(-1) if isinstance(alpha, Tensor) else alpha)
