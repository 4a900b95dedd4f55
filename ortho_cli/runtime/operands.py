"""Operands of a layer's product, as `product` and `triton_kernels` take them: base and ortho."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

Alpha = float | Tensor


class Packed(NamedTuple):
    """Base in the layout of torch's INT4 kernel."""

    codes: Tensor  # uint8 (out, in / 2), permuted; 4 bits each, whatever base has
    scales_and_zeros: Tensor  # (groups, out, 2) of the scales' dtype


class Base(NamedTuple):
    """The dense stream of one layer."""

    weight_packed: Tensor  # int32 (out, in bits / 32)
    weight_scale: Tensor  # (out, groups)
    prepared: Packed | None = None
    bits: int = 4  # of a code, 3 or 4

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.weight_packed.shape[0], self.weight_packed.shape[1] * 32 // self.bits


class Ortho(NamedTuple):
    """The sparse stream of one layer as CSR: values - dequantize(base) at each position."""

    crow_indices: Tensor  # int32 or int64 (out + 1,)
    col_indices: Tensor  # int32 (nnz,)
    residual: Tensor  # float32 (nnz,)


class Columns(NamedTuple):
    """The sparse stream of one layer as whole columns: values - dequantize(base) in each."""

    col_indices: Tensor  # int64 (k,)
    residual: Tensor  # float32 (out, k)
