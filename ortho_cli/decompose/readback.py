"""Reads back what a job has written of a split tensor: for tuning, packing and checks."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ortho_cli.decompose.edits import Edit
from ortho_cli.decompose.plan import Plan, SplitTensor
from ortho_cli.decompose.workers import NUMPY_DTYPES
from ortho_cli.errors import InternalError
from ortho_cli.formats.compact import Integers
from ortho_cli.split import quantize
from ortho_cli.split.dtypes import torch_dtypes
from ortho_cli.split.pipeline import Given
from ortho_cli.split.quantize import Rounded, as_bytes
from ortho_cli.split.torch_kernel import words_of
from ortho_cli.storage.data_file import DataFile
from ortho_cli.storage.sealing import OrthoFile


class ReadBack:
    """Reads codes, scales and the CSR of any tensor from files that are being made."""

    def __init__(self, plan: Plan, base: DataFile, ortho: OrthoFile) -> None:
        """Take the files of base and of the CSR; a tensor can be read once it is split."""
        self._plan, self._base, self._ortho = plan, base, ortho

    def base_rows(self, tensor: SplitTensor, start: int, count: int) -> tuple[Tensor, Tensor]:
        """Read rows of base: packed codes int32 (count, words) and scales (count, groups)."""
        found = []
        for spec in tensor.base[:2]:
            dtype = torch.int32 if spec.dtype == "I32" else torch_dtypes()[spec.dtype]
            rows = torch.empty((count, spec.shape[1]), dtype=dtype)
            offset = start * spec.shape[1] * dtype.itemsize
            self._base.read_into(spec.key, as_bytes(rows), start=offset)
            found.append(rows)
        return found[0], found[1]

    def rounded(self, tensor: SplitTensor) -> Rounded:
        """Read a whole weight as base and ortho have it."""
        rows, columns = tensor.source.shape
        packed, scales = self.base_rows(tensor, 0, rows)
        crow, column = self.positions(tensor)
        kept = torch.zeros(rows, columns, dtype=torch.bool)
        kept.numpy()[np.repeat(np.arange(rows), np.diff(crow)), column] = True
        codes = quantize.unpack_codes(packed, bits=tensor.bits)[:, :columns]
        return Rounded(codes.to(torch.int8), scales, kept)

    def positions(self, tensor: SplitTensor) -> tuple[Integers, Integers]:
        """Read where a tensor's weights are kept: crow_indices and col_indices of CSR, int64."""
        if tensor.columns is not None:
            rows = tensor.shape[0]
            return np.arange(rows + 1) * tensor.columns, np.tile(self.columns(tensor), rows)
        crow, column = (
            self._part(spec.key).numpy().view(NUMPY_DTYPES[spec.dtype]).astype(np.int64)
            for spec in tensor.ortho[:2]
        )
        return crow, column

    def columns(self, tensor: SplitTensor) -> Integers:
        """Read which columns of a tensor are kept whole, int64."""
        spec = tensor.ortho[0]
        return self._part(spec.key).numpy().view(NUMPY_DTYPES[spec.dtype]).astype(np.int64)

    def values(self, tensor: SplitTensor) -> Tensor:
        """Read the weights that are kept, in the source's dtype, row by row."""
        return self._part(tensor.ortho[-1].key).view(torch_dtypes()[tensor.source.dtype])

    def check_moved(self, tensor: SplitTensor, edit: Edit) -> None:
        """See that base holds the codes that forgetting chose, and ortho those positions.

        Raises:
            InternalError: it does not; names the tensor and counts the positions.
        """
        columns = tensor.source.shape[1]
        crow, column = self.positions(tensor)
        kept = np.repeat(np.arange(len(crow) - 1), np.diff(crow)) * columns + column
        lost = len(edit.positions) - int(np.isin(edit.positions, kept, assume_unique=True).sum())
        other = 0
        for row, count in self._plan.sizes.tiles("split", tensor.source.shape):
            places, codes = edit.within(row * columns, (row + count) * columns)
            if len(places):
                packed, _ = self.base_rows(tensor, row, count)
                found = quantize.unpack_codes(packed, bits=tensor.bits)[:, :columns].numpy()
                other += int((found.reshape(-1)[places] != codes).sum())
        if lost or other:
            raise InternalError(
                f"of {len(edit.positions)} codes of `{tensor.name}` that forgetting moved, ortho "
                f"lacks {lost} and base has {other} as they were"
            )

    def _part(self, key: str) -> Tensor:
        found = torch.empty(self._plan.ortho.regions[key].nbytes, dtype=torch.uint8)
        if found.numel():
            self._ortho.read_into(key, as_bytes(found), start=0)
        return found


def given_of(tensor: SplitTensor, rounded: Rounded) -> Given:
    """Say that a weight is to be written as it was rounded, with the positions it has already."""
    codes, scales, kept = rounded
    positions = np.flatnonzero(kept[0] if tensor.columns is not None else kept)
    return Given(positions, words_of(scales), stays=True, codes=codes.numpy())
