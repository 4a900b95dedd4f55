"""OrthoLinear: a torch module with both streams of a Linear, named as in the artifact."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ortho_cli.errors import ArtifactError, UsageError
from ortho_cli.formats import csr
from ortho_cli.formats.columns import COLUMN_PARTS, check_block, to_csr
from ortho_cli.formats.csr import BASE_PARTS, ORTHO_PARTS
from ortho_cli.model.linears import dense_weight
from ortho_cli.runtime import product
from ortho_cli.runtime.operands import Alpha, Base, Columns, Ortho, Packed
from ortho_cli.split.in_memory import split_weight
from ortho_cli.split.quantize import ortho_dtypes
from ortho_cli.split.sizes import DEFAULT_SIZES, Sizes
from ortho_cli.split.task import check_bits, check_group_size

SET_ALPHA = "set_alpha(model, 1.0) for the full model, 0.0 for base alone"

Made = TypeVar("Made")


class _Derived(NamedTuple):
    """A value computed from buffers, and the buffers with their versions at that time."""

    sources: tuple[Tensor, ...]
    versions: tuple[int, ...]
    value: Any


class OrthoLinear(nn.Module):
    """A Linear whose weight is W(alpha) = dequantize(base) + alpha * ortho.

    Buffers, as in the artifact: `weight_packed` int32 (out, in bits / 32), `weight_scale` (out,
    groups), `weight_shape` int64 (2,); `crow_indices` (out + 1,), `col_indices` uint16 or int32
    (nnz,) and `values` (nnz,), the source's own weights; these three are None for base alone. Where
    ortho is whole columns, there is no `crow_indices`, `col_indices` (k,) are their numbers and
    `values` is (out, k).
    `alpha` is None until it is set: there is no default. Casting (`half()`, `to(dtype)`) moves bias
    alone: scales and values in another dtype would be another base.
    """

    weight_packed: Tensor
    weight_scale: Tensor
    weight_shape: Tensor
    crow_indices: Tensor | None
    col_indices: Tensor | None
    values: Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        group_size: int,
        dtype: torch.dtype,
        bits: int = 4,
        nnz: int | None = None,
        bias: bool = False,
        bias_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Allocate the buffers; `load_state_dict` or `from_linear` fills them.

        Args:
            in_features: columns; `group_size` divides it.
            out_features: rows.
            group_size: neighbours in a row that share a scale; a multiple of 8.
            dtype: dtype of the source's weights, hence of scales and values.
            bits: of a code, 4, or 3 where 32 divides in_features.
            nnz: entries of the ortho stream; None for base alone.
            bias: whether there is one.
            bias_dtype: its dtype; `dtype` if None.
            device: of the buffers.
        Raises:
            RecipeError: the group size, or the bits, do not fit.
        """
        super().__init__()
        check_group_size(in_features, group_size)
        check_bits(in_features, bits)
        self.in_features, self.out_features = in_features, out_features
        self._alpha: Alpha | None = None
        # Of an expert, which of a batch's tokens it is given, and how many there are in all.
        self.routed: Tensor | None = None
        self.batch_tokens = 0
        self._cache: dict[tuple[str, ...], _Derived] = {}
        words, groups = in_features * bits // 32, in_features // group_size

        def zeros(*shape: int, of: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=of, device=device)

        self.register_buffer("weight_packed", zeros(out_features, words, of=torch.int32))
        self.register_buffer("weight_scale", zeros(out_features, groups, of=dtype))
        shape = torch.tensor([out_features, in_features], dtype=torch.int64, device=device)
        self.register_buffer("weight_shape", shape)
        self._allocate_ortho(nnz, dtype, device)
        new_bias = nn.Parameter(zeros(out_features, of=bias_dtype or dtype)) if bias else None
        self.register_parameter("bias", new_bias)

    def _allocate_ortho(
        self, nnz: int | None, dtype: torch.dtype, device: torch.device | str | None
    ) -> None:
        """Give the ortho buffers their sizes: those of `artifact.ortho_specs`."""
        for name in ORTHO_PARTS:
            self.register_buffer(name, None)
        if nnz is not None:
            pointer, column = ortho_dtypes(nnz, self.in_features)
            rows = self.out_features + 1
            self.crow_indices = torch.zeros(rows, dtype=pointer, device=device)
            self.col_indices = torch.zeros(nnz, dtype=column, device=device)
            self.values = torch.zeros(nnz, dtype=dtype, device=device)

    def _allocate_columns(
        self, count: int, dtype: torch.dtype, device: torch.device | str | None
    ) -> None:
        """Give the ortho buffers the sizes of whole columns: those of `artifact.column_specs`."""
        _, column = ortho_dtypes(0, self.in_features)
        self.crow_indices = None
        self.col_indices = torch.zeros(count, dtype=column, device=device)
        self.values = torch.zeros(self.out_features, count, dtype=dtype, device=device)

    @property
    def alpha(self) -> Alpha | None:
        """How much of ortho is added: in [0, 1], one for each batch row, or None until set."""
        return self._alpha

    @alpha.setter
    def alpha(self, alpha: Alpha | None) -> None:
        self._alpha = None if alpha is None else product.check_alpha(alpha)

    @property
    def group_size(self) -> int:
        """Neighbours in a row that share a scale."""
        return self.in_features // self.weight_scale.shape[1]

    @property
    def bits(self) -> int:
        """Bits of a code, 3 or 4."""
        return self.weight_packed.shape[1] * 32 // self.in_features

    def _base(self) -> Base:
        return Base(self.weight_packed, self.weight_scale, bits=self.bits)

    @property
    def nnz(self) -> int | None:
        """Entries of the ortho stream; None without one."""
        return None if self.values is None else self.values.numel()

    # Longer than 60 lines: half of it says what each argument is.
    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        *,
        group_size: int,
        density: float,
        scale: str = "absmax",
        bits: int = 4,
        alone: bool = False,
        structure: str = "points",
        max_rank: int | None = None,
        curvature: Tensor | None = None,
        name: str = "weight",
        sizes: Sizes = DEFAULT_SIZES,
    ) -> OrthoLinear:
        """Split a Linear in memory: the same bits that `ortho decompose` writes.

        Saliency is |W - dequantize(base)|, times sqrt(curvature) where that is given, in float32.

        Args:
            linear: nn.Linear, or transformers' Conv1D, whose weight is stored (in, out); bfloat16,
                float16 or float32, any strides.
            group_size: neighbours in a row that share a scale.
            density: share of weights kept in the ortho stream, in [0, 1]; round(density * numel)
                entries, ties to the lower flat index.
            scale: absmax, mse, or curvature, which needs `curvature`.
            bits: of a code, 4, or 3 where in divides by 32.
            alone: searched scales serve ortho's positions, too.
            structure: points, or columns: round(density * in) whole columns, ties to the lower one.
            max_rank: the most columns.
            curvature: (out, in) or (in,) float32, >= 0, finite.
            name: the tensor's name, for errors.
            sizes: of tiles.
        Raises:
            NumericalError: a weight or curvature is NaN or infinite, or base overflows.
            RecipeError: group_size, density, scale, bits or structure does not fit.
            UsageError: the module has no 2-D floating weight, or curvature another shape.
        """
        weight = dense_weight(linear, name)
        parts = split_weight(
            weight,
            group_size=group_size,
            density=density,
            scale=scale,
            bits=bits,
            alone=alone,
            structure=structure,
            max_rank=max_rank,
            curvature=curvature,
            name=name,
            sizes=sizes,
        )
        rows, columns = weight.shape
        module = cls(
            columns, rows, group_size=group_size, dtype=weight.dtype, bits=bits, device="meta"
        )
        for part, tensor in parts.items():
            setattr(module, part, tensor.to(getattr(linear.weight, "device")))  # noqa: B009
        module.bias = getattr(linear, "bias", None)
        module.train(linear.training)
        return module

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by W(alpha); alpha is read once."""
        alpha = self._need_alpha()
        if self.routed is not None and isinstance(alpha, Tensor) and alpha.ndim:
            rows = self.routed // (self.batch_tokens // alpha.numel())
            alpha = alpha[rows.to(alpha.device)]
        base = self._base()
        if x.numel() <= product.PACKED_ROWS * self.in_features and (
            x.dtype == torch.bfloat16 or torch.is_autocast_enabled(x.device.type)
        ):
            base = base._replace(prepared=self._packed())
        ortho = None if product.is_zero(alpha) else self._ortho()
        return product.dual_linear(x, base, ortho, self.bias, alpha)

    def _need_alpha(self) -> Alpha:
        if self.alpha is None:
            raise UsageError("alpha is not set, and has no default", hint=SET_ALPHA)
        return self.alpha

    @property
    def weight(self) -> Tensor:
        """Dense W(alpha), (out, in) in the scales' dtype; at alpha 1 ortho's positions are exact.

        Computed on every read; empty on the meta device, where alpha may be unset.
        Raises UsageError where there is one alpha for each batch row.
        """
        return self.dense(self.weight_scale.dtype)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Form `weight` in another dtype: between the ends of alpha, float32 is not rounded."""
        if self.weight_packed.is_meta:
            return torch.empty((self.out_features, self.in_features), dtype=dtype, device="meta")
        alpha = self._need_alpha()
        if isinstance(alpha, Tensor):
            raise UsageError(
                f"there is no one weight where alpha holds {alpha.numel()} values",
                hint="set one alpha for the whole batch",
            )
        ortho, rows = self._ortho() if alpha else None, (0, self.out_features)
        weight = product.weight_rows(self._base(), ortho, alpha, rows, dtype)
        if ortho is not None and alpha == 1.0:  # a residual can be rounded, the values are not
            values = self._stored()[1].to(dtype)
            if isinstance(ortho, Columns):
                weight[:, ortho.col_indices] = values
            else:
                _, flat = product.ortho_positions(ortho, rows, self.in_features)
                weight.view(-1)[flat] = values
        return weight

    @property
    def holds_columns(self) -> bool:
        """Whether ortho is there, and is whole columns."""
        return self.values is not None and self.crow_indices is None

    def csr(self) -> tuple[Tensor, Tensor, Tensor]:
        """Give ortho as CSR: crow_indices, col_indices and values.

        Raises:
            ArtifactError: there is none.
        """
        column, values = self._stored()
        if self.crow_indices is not None:
            return self.crow_indices, column, values
        found = to_csr(column.cpu(), values.cpu())
        crow, column, values = (found[part].to(values.device) for part in ORTHO_PARTS)
        return crow, column, values

    def _ortho(self) -> Ortho | Columns:
        self._stored()
        if self.holds_columns:
            return self._derive((*BASE_PARTS[:2], *COLUMN_PARTS), self._make_columns)
        return self._derive((*BASE_PARTS[:2], *ORTHO_PARTS), self._make_ortho)

    def _stored(self) -> tuple[Tensor, Tensor]:
        if self.col_indices is None or self.values is None:
            raise ArtifactError(
                "alpha is not 0 and this layer has no ortho stream", hint=product.NO_ORTHO
            )
        return self.col_indices, self.values

    def _make_columns(self) -> Columns:
        column, values = self._stored()
        stream = Columns(column.to(torch.int64), values.to(torch.float32, copy=True))
        base = self._base()
        for start, stop in product.tiles(base):
            tile = product.dequantize_rows(base, start, stop)
            stream.residual[start:stop] -= tile[:, stream.col_indices].float()
        return stream

    def _make_ortho(self) -> Ortho:
        crow, column, values = self.csr()
        wide = column.to(torch.int32)  # torch has few operations on uint16
        residual = values.to(torch.float32, copy=True)
        stream = Ortho(crow, wide, residual)
        base = self._base()
        for rows in product.tiles(base):
            entries, flat = product.ortho_positions(stream, rows, self.in_features)
            tile = product.dequantize_rows(base, *rows).view(-1)
            residual[entries] -= tile[flat].float()
        return stream

    def _packed(self) -> Packed | None:
        return self._derive(BASE_PARTS[:2], lambda: product.prepare(self._base()))

    def _derive(self, names: tuple[str, ...], make: Callable[[], Made]) -> Made:
        """Give the cached value of these buffers, or make it anew where they changed."""
        sources: tuple[Any, ...] = tuple(self._buffers[name] for name in names)
        # Inference tensors count no versions, and can be written to in inference mode alone.
        versions = tuple(-1 if source.is_inference() else source._version for source in sources)
        cached = self._cache.get(names)
        if (
            cached is None
            or cached.versions != versions
            or any(a is not b for a, b in zip(cached.sources, sources, strict=True))
        ):
            with torch.no_grad():
                cached = self._cache[names] = _Derived(sources, versions, make())
        value: Made = cached.value
        return value

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OrthoLinear:
        """Move the buffers to another device, and never cast them."""
        self._cache.clear()
        streams = {name: self._buffers.pop(name) for name in (*BASE_PARTS, *ORTHO_PARTS)}
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            for name, buffer in streams.items():
                if buffer is not None:
                    moved = fn(buffer)
                    is_cast = moved.dtype != buffer.dtype
                    streams[name] = buffer.to(moved.device) if is_cast else moved
        finally:
            self._buffers.update(streams)
        return self

    def __getstate__(self) -> dict[str, object]:
        buffers = dict(self._buffers)
        column = buffers["col_indices"]
        if column is not None and column.dtype == torch.uint16:
            buffers["col_indices"] = column.view(torch.int16)  # torch restores no uint16
        return {**self.__dict__, "_buffers": buffers, "_cache": {}}

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        column = self.col_indices
        if column is not None and column.dtype == torch.int16:
            self.col_indices = column.view(torch.uint16)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, object], prefix: str, *rest: Any
    ) -> None:  # `rest` is torch's, and differs between its versions
        """Check the streams that come, and allocate as many ortho entries as they have."""
        self._cache.clear()
        parts = {name: state_dict.get(prefix + name) for name in (*BASE_PARTS, *ORTHO_PARTS)}
        here = [name for name in ORTHO_PARTS if parts[name] is not None]
        if here and here not in (list(ORTHO_PARTS), list(COLUMN_PARTS)):
            raise ArtifactError(
                f"`{prefix}{here[0]}` comes without the rest of its CSR matrix",
                hint=f"the three are {', '.join(ORTHO_PARTS)}; whole columns have the last two",
            )
        if here:
            values, device = self._check_ortho(parts, here, prefix), self.weight_packed.device
            if len(here) == len(COLUMN_PARTS):
                if not self.holds_columns or self.nnz != values.numel():
                    self._allocate_columns(values.shape[1], values.dtype, device)
            elif self.crow_indices is None or self.nnz != values.numel():
                self._allocate_ortho(values.numel(), values.dtype, device)
        shape = parts["weight_shape"]
        if isinstance(shape, Tensor) and not shape.is_meta:
            stated, mine = shape.tolist(), [self.out_features, self.in_features]
            if stated != mine:
                raise ArtifactError(
                    f"`{prefix}weight_shape` says {stated} where the layer is {mine}",
                    hint="is it the state of another model?",
                )
        self._check_dtype(parts["weight_scale"], f"{prefix}weight_scale")
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _check_ortho(self, parts: Mapping[str, object], names: list[str], prefix: str) -> Tensor:
        """Refuse a CSR matrix, or columns, damaged or of another layer; give the values."""
        tensors = []
        for name in names:
            part = parts[name]
            if not isinstance(part, Tensor):
                raise ArtifactError(
                    f"`{prefix}{name}` is a {type(part).__name__}, and no tensor",
                    hint="give the state dict as it was saved",
                )
            tensors.append(part)
        *crow, column, values = tensors
        shape = (self.out_features, self.in_features)
        if crow:
            csr.check_tensors(crow[0], column, values, shape, prefix)
        else:
            check_block(column, values, shape, prefix)
        self._check_dtype(values, f"{prefix}values")
        return values

    def _check_dtype(self, part: object, name: str) -> None:
        if isinstance(part, Tensor) and part.dtype != self.weight_scale.dtype:
            raise ArtifactError(
                f"`{name}` is {part.dtype} where the layer is {self.weight_scale.dtype}",
                hint="build the layer with the dtype of its source",
            )

    def extra_repr(self) -> str:
        """Give sizes, group size, nnz and alpha for `repr`."""
        alpha = f"{self.alpha.numel()} values" if isinstance(self.alpha, Tensor) else self.alpha
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, bits={self.bits}, group_size={self.group_size}, "
            f"nnz={self.nnz}, dtype={self.weight_scale.dtype}, alpha={alpha}"
        )


def layers_of(model: nn.Module) -> dict[str, OrthoLinear]:
    """Find the layers of a model that are split, by name.

    Raises:
        UsageError: there is none.
    """
    found = {n: m for n, m in model.named_modules() if isinstance(m, OrthoLinear)}
    if not found:
        raise UsageError(
            f"the {type(model).__name__} holds no OrthoLinear",
            hint="load an artifact, or decompose the model with Engine",
        )
    return found
