"""Reading the ortho stream of each weight, as columns where it is, and as CSR whatever its layout.

Only this module knows the layouts when weights are read. (`verify` checks CSR without it, and so
without torch.)
"""

from __future__ import annotations

import contextlib
from functools import partial

import torch
from torch import Tensor

from ortho_cli.errors import ArtifactError, blamed
from ortho_cli.formats import columns, compact, csr
from ortho_cli.formats.artifact import Artifact, Shape, damage_in
from ortho_cli.formats.csr import ORTHO_PARTS
from ortho_cli.split.dtypes import torch_dtypes
from ortho_cli.split.quantize import as_bytes
from ortho_cli.split.sizes import DEFAULT_SIZES, Sizes
from ortho_cli.storage.checkpoint import ShardReader, TensorInfo


class KeptReader(ShardReader):
    """An open ortho stream; it reads and checks one weight at a time."""

    def __init__(self, artifact: Artifact, *, sizes: Sizes = DEFAULT_SIZES) -> None:
        """Open both files, which must still be those whose headers were read.

        Args:
            artifact: with an ortho stream.
            sizes: of tiles.
        Raises:
            ArtifactError: a file changed, or there is no ortho.
        """
        if artifact.ortho is None:
            raise ArtifactError(
                f"`{artifact.folder}` has no ortho stream to read",
                hint="put ortho.safetensors back beside its base",
            )
        self._path, self._sizes = artifact.ortho.path, sizes
        self._kept, self._shapes = artifact.kept, artifact.shapes
        self._base = {tensor.name: tensor for tensor in artifact.base.tensors}
        super().__init__(artifact.files, blame=partial(blamed, ArtifactError))

    def __enter__(self) -> KeptReader:
        """Give itself."""
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """Close both files; if all went well so far, see that they are still what they were."""
        with contextlib.closing(self):
            if error is None:
                self.check_unchanged()

    def csr(self, module: str) -> dict[str, Tensor]:
        """Read the ortho of a module's weight.

        Args:
            module: one of the artifact's `split`.
        Returns:
            crow_indices, col_indices and values, as layout csr holds them: values in the source's
            dtype, whatever they are stored in.
        Raises:
            ArtifactError: what is stored is no such matrix, or a file was cut; names the tensor.
        """
        parts = self.parts(module)
        if columns.holds_columns(parts):
            return columns.to_csr(parts["col_indices"], parts["values"])
        return parts

    def parts(self, module: str) -> dict[str, Tensor]:
        """Read the ortho of a module's weight as `OrthoLinear` holds it.

        Args:
            module: one of the artifact's `split`.
        Returns:
            What `csr` gives; where whole columns are kept, their numbers col_indices (k,) and
            values (out, k) in the source's dtype.
        Raises:
            ArtifactError: as `csr`.
        """
        parts = {name: self._read(info) for name, info in self._kept[module].items()}
        shape = self._shapes[module]
        with damage_in(self._path):
            if columns.holds_columns(parts):
                columns.check_block(parts["col_indices"], parts["values"], shape, f"{module}.")
                return self._restored(module, parts, shape) if "value_scales" in parts else parts
            if "crow_indices" not in parts:
                return self._decode(module, parts, shape)
            crow, column, values = (parts[name] for name in ORTHO_PARTS)
            csr.check_tensors(crow, column, values, shape, f"{module}.")
            return {part: parts[part] for part in ORTHO_PARTS}

    def _decode(self, module: str, parts: dict[str, Tensor], shape: Shape) -> dict[str, Tensor]:
        found = compact.decode(parts, shape, f"{module}.")
        codes = found["values"]
        if codes.dtype == torch.int8:
            step = parts["value_step"]
            if not 0.0 < float(step) < float("inf"):
                raise csr.unsound(f"`{module}.value_step` is {float(step)}")
            if codes.numel() and int(codes.min()) < -compact.LARGEST:
                raise csr.unsound(f"`{module}.values` or column_values holds -128")
            crow, column = (found[p].to(torch.int64).numpy() for p in ORTHO_PARTS[:2])
            read = partial(self._base_rows, module)
            base, scales = compact.base_at(read, crow, column, shape, sizes=self._sizes)
            dtype = torch_dtypes()[self._base[f"{module}.weight_scale"].dtype]
            found["values"] = compact.restore_values(codes, step, base, scales, dtype)
        csr.check_finite(found["values"], f"{module}.column_values or ")
        return found

    def _restored(self, module: str, parts: dict[str, Tensor], shape: Shape) -> dict[str, Tensor]:
        """Restore the weights of whole columns from int8 values."""
        codes, scales = parts["values"], parts["value_scales"]
        if not bool(((scales > 0) & scales.isfinite()).all()):
            raise csr.unsound(f"`{module}.value_scales` are not all above 0 and finite")
        if codes.numel() and int(codes.min()) < -columns.LARGEST:
            raise csr.unsound(f"`{module}.values` holds -128")
        every = columns.to_csr(parts["col_indices"], codes)
        crow, column = (every[part].to(torch.int64).numpy() for part in ORTHO_PARTS[:2])
        read = partial(self._base_rows, module)
        base, _ = compact.base_at(read, crow, column, shape, sizes=self._sizes)
        values = columns.restore_values(codes, scales, base.view(codes.shape))
        csr.check_finite(values, f"{module}.")
        return {"col_indices": parts["col_indices"], "values": values}

    def _base_rows(self, module: str, start: int, count: int) -> tuple[Tensor, Tensor]:
        parts = [self._base[f"{module}.{part}"] for part in ("weight_packed", "weight_scale")]
        packed, scales = (self._read(part, start, count) for part in parts)
        return packed, scales

    def _read(self, info: TensorInfo, start: int = 0, count: int | None = None) -> Tensor:
        """Read a tensor, or some rows of it, into memory of its own."""
        shape = info.shape if count is None else (count, *info.shape[1:])
        found = torch.empty(shape, dtype=torch_dtypes()[info.dtype])
        if found.numel():
            offset = start * (info.nbytes // info.shape[0]) if start else 0
            self.read_into(as_bytes(found), info, start=offset)
        return found
