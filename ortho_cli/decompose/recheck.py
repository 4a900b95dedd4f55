"""Read back what was written of split weights, and compare it with the source.

`decompose` reads back some rows of each weight. It reads all rows of a small weight, and of a
weight that was forgotten, compensated or tuned: that work takes longer than the reading. `inspect
--verify --expect-source` reads every row. The rules that are checked are in `split/exact.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ortho_cli.decompose.plan import SplitTensor
from ortho_cli.decompose.record import TensorRecord
from ortho_cli.decompose.report import decibels
from ortho_cli.decompose.workers import NUMPY_DTYPES
from ortho_cli.errors import ArtifactError
from ortho_cli.events import Advanced, EventSink, Started, null_sink
from ortho_cli.formats.artifact import REPORT_FILE, Artifact, module_of
from ortho_cli.split import exact
from ortho_cli.split.dtypes import SPLIT, words_of
from ortho_cli.split.sizes import DEFAULT_SIZES, Sizes
from ortho_cli.split.task import Array
from ortho_cli.storage.checkpoint import Checkpoint, ShardReader, TensorInfo
from ortho_cli.storage.data_file import DataFile, TensorSpec
from ortho_cli.storage.sealing import OrthoFile

if TYPE_CHECKING:
    from ortho_cli.formats.report import Figures

SAMPLE_BLOCKS = 4  # blocks of rows that are read back of a large weight
SHARE = 2.5e-3  # of noise: 0.01 dB, by which sums in another order and precision may differ
Read = Callable[[memoryview, int], None]  # fills a buffer from a byte offset


@dataclass(frozen=True, slots=True, kw_only=True)
class Recheck:
    """Compares each weight that a running job has written with the source; threads may share it."""

    reader: ShardReader  # of the source
    base: DataFile  # codes and scales
    ortho: OrthoFile  # the CSR
    nearest: bool  # codes outside of ortho are the nearest to the source's weights
    own_code: bool  # where a code was moved, alpha = 1 may be the source's own code
    whole: bool  # read every row of every weight
    sizes: Sizes  # of tiles

    def check(self, tensor: SplitTensor, record: TensorRecord) -> None:
        """Check some rows of a weight, or all rows and its figures.

        Args:
            tensor: its plan.
            record: its record.
        Raises:
            ArtifactError: a value, a code or a figure breaks its rule.
        """
        rules = exact.Rules(
            name=tensor.name,
            dtype=tensor.source.dtype,
            bits=tensor.bits,
            nearest=self.nearest,
            own_code=self.own_code,
        )
        whole = self.whole or tensor.source.numel <= self.sizes.check_sample
        every = self.sizes.tiles("check", tensor.source.shape)
        sums = exact.Sums()
        for start, count in every if whole else _some_rows(tensor, self.sizes.check_sample):
            sums.add(exact.check_rows(rules, self._rows(tensor, start, count)))
        if whole and record.figures is not None:
            exact.check_figures(tensor.name, record.figures, sums)

    def _rows(self, tensor: SplitTensor, start: int, count: int) -> exact.Rows:
        columns, word = tensor.source.shape[1], words_of(tensor.source.dtype)
        packed, scales, _ = tensor.base
        *crow_spec, column_spec, value_spec = tensor.ortho

        def part(spec: TensorSpec) -> Read:
            output = self.ortho if spec in tensor.ortho else self.base
            return lambda buffer, at: output.read_into(spec.key, buffer, start=at)

        if tensor.columns is None:
            crow = _read(part(crow_spec[0]), NUMPY_DTYPES[crow_spec[0].dtype], start, count + 1)
            first, size = int(crow[0]), int(crow[-1] - crow[0])
            column = _read(part(column_spec), NUMPY_DTYPES[column_spec.dtype], first, size)
        else:
            crow = np.arange(start, start + count + 1) * tensor.columns
            first, size = int(crow[0]), int(crow[-1] - crow[0])
            every = _read(part(column_spec), NUMPY_DTYPES[column_spec.dtype], 0, tensor.columns)
            column = np.tile(every, count)
        row = np.repeat(np.arange(count), np.diff(crow))
        return exact.Rows(
            first=start,
            source=_rows_in(self.reader, tensor.source, word, start, count),
            packed=_matrix(part(packed), np.int32, start, count, packed.shape[1]),
            scales=_matrix(part(scales), word, start, count, scales.shape[1]),
            positions=row * columns + column.astype(np.int64),
            values=_read(part(value_spec), word, first, size),
        )


def _read(read: Read, dtype: npt.DTypeLike, start: int, size: int) -> Array:
    """Read `size` numbers from number `start` on."""
    found: Array = np.empty(size, dtype)
    if size:
        read(found.data.cast("B"), start * found.itemsize)
    return found


def _matrix(read: Read, dtype: npt.DTypeLike, start: int, count: int, columns: int) -> Array:
    return _read(read, dtype, start * columns, count * columns).reshape(count, columns)


def _rows_in(
    reader: ShardReader, info: TensorInfo, dtype: npt.DTypeLike, start: int, count: int
) -> Array:
    def read(buffer: memoryview, at: int) -> None:
        reader.read_into(buffer, info, start=at)

    return _matrix(read, dtype, start, count, info.shape[1])


def _some_rows(tensor: SplitTensor, elements: int) -> Iterator[tuple[int, int]]:
    """Yield blocks of rows, evenly spaced, with the first and the last row of the weight."""
    rows, columns = tensor.source.shape
    count = min(rows, max(1, elements // (SAMPLE_BLOCKS * columns)))
    starts = {i * (rows - count) // (SAMPLE_BLOCKS - 1) for i in range(SAMPLE_BLOCKS)}
    for start in sorted(starts):
        yield start, count


def check_values(
    artifact: Artifact,
    source: Checkpoint,
    recipe: Mapping[str, object],
    *,
    sizes: Sizes = DEFAULT_SIZES,
    on_event: EventSink = null_sink,
) -> dict[str, int | float | None]:
    """Compare every weight of an artifact with the checkpoint that it was made from.

    Args:
        artifact: without ortho, only figures at alpha 0 and unsplit tensors are checked.
        source: that checkpoint, which `provenance.check_source` has passed.
        recipe: the artifact's.
        sizes: of tiles.
        on_event: gets progress.
    Returns:
        `tensors` that were split, their `weights`, `moved` codes that are not the source's own, and
        SQNR by the bytes: None where there is no error, and at alpha 1 without ortho, too.
    Raises:
        ArtifactError: an unsplit tensor differs from the source, or a value, code or figure breaks
            its rule; names the tensor.
    """
    from ortho_cli.formats.report import read_report, rows_of  # slow: builds pydantic models

    split, there = _setting(recipe, "ortho", "split"), artifact.ortho is not None
    size = sum(tensor.nbytes for tensor in source.tensors)
    on_event(Started(tensors=len(source.tensors), resumed=0, bytes_total=size, bytes_done=0))
    report = read_report(artifact)
    rows = () if report is None else rows_of(report, artifact.folder / REPORT_FILE)
    told: dict[str, Figures] = {row.name: row for row in rows}
    with ExitStack() as stack:
        opened, total = _Opened(artifact, source, sizes, stack), exact.Sums()
        for tensor in source.tensors:
            module = module_of(tensor.name)
            if tensor.name == f"{module}.weight" and module in artifact.shapes:
                nearest = _setting(recipe, "base", "rounding") == "nearest" and split != "reference"
                sums = opened.check_split(
                    module,
                    tensor,
                    nearest=nearest and there,
                    own_code=split == "unlearn" and artifact.layout != "columns",
                    rounded=_setting(recipe, "ortho", "values") == "int8",
                )
                if report is not None:
                    _check_decibels(told[tensor.name], tensor.name, sums, there=there)
                total.add(sums)
            elif split != "reference":
                opened.check_copy(tensor)
            on_event(Advanced(nbytes=tensor.nbytes))
    if report is not None:
        _check_decibels(report.totals, "totals", total, there=there)
    at_1 = decibels(total.signal, total.noise - total.noise_kept) if there else None
    return {
        "tensors": len(artifact.split),
        "weights": total.weights,
        "moved": total.moved,
        "sqnr_db_alpha_0": decibels(total.signal, total.noise),
        "sqnr_db_alpha_1": at_1,
    }


def _setting(recipe: Mapping[str, object], section: str, key: str) -> object:
    found = recipe[section]
    return found.get(key) if isinstance(found, dict) else None


class _Opened:
    """An artifact and its source, open until `stack` is closed."""

    def __init__(
        self, artifact: Artifact, source: Checkpoint, sizes: Sizes, stack: ExitStack
    ) -> None:
        self._artifact, self._sizes = artifact, sizes
        self._base = {tensor.name: tensor for tensor in artifact.base.tensors}
        self._kept = None
        if artifact.ortho is not None:
            # It needs torch, which the jobs above do without.
            from ortho_cli.formats.ortho_reader import KeptReader

            self._kept = stack.enter_context(KeptReader(artifact, sizes=sizes))
        self._source = stack.enter_context(closing(ShardReader(source.shards)))
        self._written = stack.enter_context(closing(ShardReader(artifact.files)))

    def check_copy(self, tensor: TensorInfo) -> None:
        """Check that an unsplit tensor is the source's, byte for byte."""
        mine = self._base.get(tensor.name)
        same = mine is not None and (mine.dtype, mine.shape) == (tensor.dtype, tensor.shape)
        if mine is None or not same or self._written.digest(mine) != self._source.digest(tensor):
            raise ArtifactError(
                f"tensor `{tensor.name}` of `{self._artifact.base.path}` was not split, and is not "
                "the source's",
                hint=exact.HINT,
            )

    def check_split(
        self, module: str, tensor: TensorInfo, *, nearest: bool, own_code: bool, rounded: bool
    ) -> exact.Sums:
        """Check every row of a split weight."""
        rows, columns = self._artifact.shapes[module]
        if tensor.shape != (rows, columns) or tensor.dtype not in SPLIT:
            raise ArtifactError(
                f"`{tensor.name}` is {tensor.dtype} {list(tensor.shape)} in the source and "
                f"{[rows, columns]} in base: they cannot be compared",
                hint="leave --verify or --expect-source out",
            )
        rules = exact.Rules(
            name=tensor.name,
            dtype=tensor.dtype,
            bits=self._artifact.bits[module],
            nearest=nearest,
            own_code=own_code,
            step=self._step(module),
        )
        if rounded and self._artifact.layout == "columns":
            found = (exact.largest_steps(rules, tile) for tile in self._tiles(module, tensor))
            rules = replace(rules, column_steps=np.max(np.stack(list(found)), axis=0))
        elif rounded and rules.step is None:  # int8 values that were saved again as CSR
            steps = (exact.largest_step(rules, tile) for tile in self._tiles(module, tensor))
            rules = replace(rules, step=max(steps, default=0.0) or 1.0)
        sums = exact.Sums()
        for tile in self._tiles(module, tensor):
            sums.add(exact.check_rows(rules, tile))
        return sums

    def _tiles(self, module: str, tensor: TensorInfo) -> Iterator[exact.Rows]:
        rows, columns = shape = self._artifact.shapes[module]
        crow, column, values = self._csr(module, rows, tensor.dtype)
        word = words_of(tensor.dtype)
        for start, count in self._sizes.tiles("check", shape):
            here = slice(int(crow[start]), int(crow[start + count]))
            row = np.repeat(np.arange(count), np.diff(crow[start : start + count + 1]))
            yield exact.Rows(
                first=start,
                source=_rows_in(self._source, tensor, word, start, count),
                packed=self._part(module, "weight_packed", np.int32, start, count),
                scales=self._part(module, "weight_scale", word, start, count),
                positions=row * columns + column[here],
                values=values[here],
            )

    def _part(self, module: str, part: str, dtype: npt.DTypeLike, start: int, count: int) -> Array:
        return _rows_in(self._written, self._base[f"{module}.{part}"], dtype, start, count)

    def _step(self, module: str) -> float | None:
        info = self._artifact.kept.get(module, {}).get("value_step")
        if info is None:
            return None
        buffer = np.empty(1, np.float32)
        self._written.read_into(buffer.data.cast("B"), info, start=0)
        return float(buffer[0])

    def _csr(self, module: str, rows: int, dtype: str) -> tuple[Array, Array, Array]:
        if self._kept is None:
            nothing = np.zeros(0, np.int64)
            return np.zeros(rows + 1, np.int64), nothing, nothing.astype(words_of(dtype))
        from ortho_cli.split import torch_kernel

        found = self._kept.csr(module)
        words = torch_kernel.words_of(found["values"]).view(words_of(dtype))
        crow, column = (
            found[part].numpy().astype(np.int64) for part in ("crow_indices", "col_indices")
        )
        return crow, column, words


def _check_decibels(told: Figures, name: str, sums: exact.Sums, *, there: bool) -> None:
    """Compare what report.json tells of a weight, or of `totals`, with sums over the bytes."""
    noise = sums.noise / sums.signal if sums.signal else 0.0
    at_1 = max(0.0, sums.noise - sums.noise_kept) / sums.signal if sums.signal else 0.0
    mine = {"sqnr_db_alpha_0": noise} | ({"sqnr_db_alpha_1": at_1} if there else {})
    for key, energy in mine.items():
        decibel: float | None = getattr(told, key)
        other = _energy(decibel)
        # A report's sums are of float32, and noise at alpha 1 is a difference of two of them.
        if not abs(energy - other) <= SHARE * max(energy, other) + 1e-6 * noise + 1e-10:
            raise ArtifactError(
                f"`{name}` has {key} {_decibels(energy)} by its bytes, and {decibel} in "
                "report.json",
                hint=exact.HINT,
            )
    share, said = sums.noise_kept / sums.noise if sums.noise else 0.0, told.residual_kept
    if there and said is not None and not abs(share - said) <= 1e-3:
        raise ArtifactError(
            f"`{name}` has residual_kept {share:.6f} by its bytes, and {said} in report.json",
            hint=exact.HINT,
        )


def _energy(decibel: float | None) -> float:
    """Return noise over signal; None means no noise."""
    return 0.0 if decibel is None else 10.0 ** (-decibel / 10.0)


def _decibels(energy: float) -> str:
    return f"{-10.0 * math.log10(energy):.4f}" if energy > 0.0 else "none"
