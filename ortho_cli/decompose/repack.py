"""The last step where ortho is compact, or columns of int8: what work left is encoded.

How large compact parts are depends on weights, so work cannot write them at offsets known before.
It writes CSR into a scratch file instead, and when all of that is there this reads it twice, tensor
by tensor: once to lay the file out, once to fill it. One tensor's ortho is in memory at a time. A
kill loses nothing: the next run encodes again, and one matrix has one encoding. Columns of int8
have known sizes, but need base, which is complete here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ortho_cli.decompose.plan import Plan, SplitTensor
from ortho_cli.decompose.readback import ReadBack
from ortho_cli.decompose.record import TensorRecord
from ortho_cli.errors import InternalError, NumericalError
from ortho_cli.formats import artifact, columns, compact
from ortho_cli.formats.artifact import module_of
from ortho_cli.formats.compact import Integers
from ortho_cli.formats.curvature import Curvature
from ortho_cli.formats.statistics import StatisticsReader
from ortho_cli.split import quantize
from ortho_cli.split.dtypes import torch_dtypes
from ortho_cli.split.quantize import as_bytes
from ortho_cli.split.task import Buffers, Figures
from ortho_cli.split.torch_kernel import curvature_of
from ortho_cli.storage.data_file import Layout, TensorSpec, TensorStream, plan_layout
from ortho_cli.storage.sealing import OrthoFile


@dataclass(frozen=True, slots=True)
class Repacker:
    """Encodes what the scratch file holds; the same bytes on every run."""

    plan: Plan
    written: ReadBack  # base and CSR, complete
    curvature: StatisticsReader | None  # there if the plan has statistics

    def run(
        self,
        make: Callable[[Layout], OrthoFile],
        records: list[TensorRecord],
        metadata: dict[str, str],
    ) -> tuple[OrthoFile, Layout, list[TensorRecord]]:
        """Write the tensors of ortho.safetensors.

        Args:
            make: makes the file.
            records: one for each tensor of the plan.
            metadata: of the file.
        Returns:
            The file, its layout, and the records with what is true of it: digests, `columns`, and
            with int8 values what rounding them costs.
        Raises:
            NumericalError: an int8 value stands for a weight that the source's dtype cannot hold.
            ResourceError: the disk is full.
        """
        layout = plan_layout((s for t in self.plan.split for s in self._specs(t)), metadata)
        output = make(layout)
        told = [
            self._encode(tensor, record, output) if isinstance(tensor, SplitTensor) else record
            for tensor, record in zip(self.plan.tensors, records, strict=True)
        ]
        return output, layout, told

    def _specs(self, tensor: SplitTensor) -> tuple[TensorSpec, ...]:
        """Find out what a tensor's parts will measure."""
        if tensor.columns is not None:
            return tensor.stored
        crow, column = self.written.positions(tensor)
        found = compact.encode_positions(crow, column, tensor.shape)
        return artifact.compact_specs(
            tensor.name,
            dtype=tensor.values,
            shape=tensor.shape,
            columns=found.columns.size,
            counts=artifact.count_dtype(int(found.counts.max())),
            gaps=found.gaps.size,
            others=int(found.counts.sum(dtype=np.int64)),
        )

    def _encode(self, tensor: SplitTensor, record: TensorRecord, output: OrthoFile) -> TensorRecord:
        """Write a tensor's parts; return its record with what is true of them."""
        crow, column = self.written.positions(tensor)
        values, figures = self.written.values(tensor), record.figures
        more: dict[str, Tensor] = {}
        if tensor.values == "I8" and figures is not None:
            name = "value_step" if tensor.columns is None else "value_scales"
            values, more[name], lost = self._round(tensor, crow, column, values)
            figures = self._figures(tensor, figures, crow, column, lost)
        if tensor.columns is None:
            parts = compact.encode(crow, column, values, tensor.shape)
            whole = parts["columns"].numel()
        else:
            whole, numbers = tensor.columns, torch.from_numpy(self.written.columns(tensor))
            narrow = torch_dtypes()[tensor.stored[0].dtype]
            parts = {"col_indices": numbers.to(narrow), "values": values}
        parts |= more
        digests = {}
        for part, value in parts.items():
            key = f"{module_of(tensor.name)}.{part}"
            raw = as_bytes(value) if value.numel() else memoryview(b"")
            stream = TensorStream(output, key)
            stream.write(raw)
            digests[key] = stream.finish()
        return replace(record, figures=figures, columns=whole, ortho=digests)

    def _round(
        self, tensor: SplitTensor, crow: Integers, column: Integers, values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Round values to int8; give their step or scales, and what they lose by it, too."""
        base, scales = compact.base_at(
            lambda start, count: self.written.base_rows(tensor, start, count),
            crow,
            column,
            tensor.shape,
            sizes=self.plan.sizes,
        )
        if tensor.columns is None:
            codes, step = compact.round_values(values, base, scales)
            back = compact.restore_values(codes, step, base, scales, values.dtype)
        else:
            block, base = (part.view(tensor.shape[0], tensor.columns) for part in (values, base))
            codes, step = columns.round_values(block, base)
            back = columns.restore_values(codes, step, base).view(-1)
        if codes.numel() and not (bool(step.isfinite().all()) and quantize.all_finite(back)):
            raise NumericalError(
                f"int8 values of `{tensor.name}` overflow {tensor.source.dtype}: their step is "
                f"{float(step.amax()):.3g}",
                hint="set ortho.values to source, or add the tensor to `ignore`",
            )
        return codes, step, values.float() - back.float()

    def _figures(
        self, tensor: SplitTensor, figures: Figures, crow: Integers, column: Integers, lost: Tensor
    ) -> Figures:
        """Take what rounding cost from what was thought to be kept exactly."""
        plain = weighted = float(lost.double().square().sum())
        kept, delta = figures.curvature_noise_kept, figures.delta_kept
        if self.curvature is not None and kept is not None:
            weighted = self._weigh(self.curvature, tensor, crow, column, lost)
            kept -= weighted
        return replace(
            figures,
            noise_kept=figures.noise_kept - plain,
            curvature_noise_kept=kept,
            delta_kept=None if delta is None else delta - weighted,
        )

    def _weigh(
        self,
        reader: StatisticsReader,
        tensor: SplitTensor,
        crow: Integers,
        column: Integers,
        lost: Tensor,
    ) -> float:
        """Sum squares of what was lost times curvature, in float64, tile by tile."""
        curvature, total = Curvature(reader, tensor.name), 0.0
        room, scratch, places = Buffers(), quantize.Scratch(), torch.from_numpy(column)
        for start, count in self.plan.sizes.tiles("split", tensor.shape):
            here = slice(int(crow[start]), int(crow[start + count]))
            if here.start == here.stop:
                continue
            scratch.reset()
            _, root = curvature_of(curvature.peek([start], count, room), empty=scratch)
            if root is None:
                raise InternalError(
                    f"the curvature of `{tensor.name}` has neither words nor vectors"
                )
            row = np.repeat(np.arange(count), np.diff(crow[start : start + count + 1]))
            at = (places[here],) if root.ndim == 1 else (torch.from_numpy(row), places[here])
            total += float((root[at] * lost[here]).double().square().sum())
        return total
