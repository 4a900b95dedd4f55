"""One tensor from its first tile to its last: read, quantize, select, write, digest."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from blake3 import blake3
from torch import Tensor

from ortho_cli import ops
from ortho_cli.artifact import BASE_FILE, ORTHO_FILE
from ortho_cli.checkpoint import Checkpoint, ShardReader
from ortho_cli.compensate import Factor, factorise, round_columns
from ortho_cli.curvature import Curvature, CurvatureReader
from ortho_cli.edits import Edits
from ortho_cli.errors import NumericalError
from ortho_cli.events import Advanced, EventSink, TensorDone, null_sink
from ortho_cli.ops import as_bytes
from ortho_cli.plan import GPTQ_ELEMENTS, TILE_ELEMENTS, TensorPlan, tile_rows
from ortho_cli.scales import Kept
from ortho_cli.selection import IGNORED
from ortho_cli.streams import base_scales, chosen_alike, kept_within, rounds
from ortho_cli.tally import Tally, Tile, first_bad, flat_of, measures_of
from ortho_cli.writer import CHUNK, DataFile, TensorStream

TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
NUMPY_DTYPES = {"U16": np.uint16, "I32": np.int32, "I64": np.int64}

# Places of a tensor from which the selection's first bar is guessed.
SAMPLE_BLOCKS = 16

Entry = dict[str, Any]
Places = tuple[npt.NDArray[np.int64], npt.NDArray[np.int8]]  # of edits in a tile, and their codes


class Rounded(NamedTuple):
    """One weight on base's grid."""

    codes: Tensor  # (out, in) int8
    scales: Tensor  # (out, groups), of the dtype they are stored in
    kept: Tensor  # (out, in) bool: ortho holds the source's weight


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """What one pass over a tensor found; the next may begin with it."""

    entry: Entry
    kept: npt.NDArray[np.integer[Any]]  # flat indices, ascending
    scales: Tensor | None  # (out, groups)
    columns: int

    def within(self, row: int, rows: int) -> Kept:
        """Look at some rows."""
        assert self.scales is not None
        return kept_within(self.kept, self.scales, self.columns, row, row + rows)


class Reference:
    """The model that base is made from instead of the source; threads may share it."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Open it."""
        self._reader = ShardReader(checkpoint)
        self._tensors = {tensor.name: tensor for tensor in checkpoint.tensors}

    def read_into(self, buffer: memoryview, name: str, *, start: int) -> None:
        """Fill `buffer` with the tensor's bytes from `start` on."""
        self._reader.read_into(buffer, self._tensors[name], start=start)

    def check_unchanged(self) -> None:
        """Raise if a file was written to since its header was read."""
        self._reader.check_unchanged()

    def close(self) -> None:
        """Close its files."""
        self._reader.close()


class Splitter:
    """Works on one tensor after another; each worker has its own, with its own buffers."""

    def __init__(
        self,
        reader: ShardReader,
        base: DataFile,
        ortho: DataFile,
        *,
        group_size: int,
        curvature: CurvatureReader | None = None,
        by_curvature: bool = False,
        edits: Edits | None = None,
        moved_to_code: bool = False,
        alone: bool = False,
        compensate: bool = False,
        reference: Reference | None = None,
        stop: threading.Event,
        on_event: EventSink,
    ) -> None:
        """Say where tensors come from and go to, what selects a weight, and what stops the work."""
        self._reader, self._base, self._ortho = reader, base, ortho
        self._edits = edits or {}
        self._moved_to_code = moved_to_code
        self._alone = alone  # base has to serve without ortho
        self._compensate = compensate
        self._reference = reference
        self._group_size = group_size
        self._curvature, self._by_curvature = curvature, by_curvature
        self._stop = stop
        self._on_event = on_event
        self._tile, self._held = ops.Scratch(), ops.Scratch()

    def work(self, tensor: TensorPlan) -> Entry:
        """Carry out what the plan says of one tensor; return its journal entry."""
        entry = self._copy(tensor) if tensor.reason is not None else self._split(tensor)
        self._on_event(TensorDone(name=tensor.name))
        return entry

    def _read(self, tensor: TensorPlan, buffer: memoryview, digest: blake3, *, start: int) -> None:
        if self._stop.is_set():
            raise InterruptedError  # reaches nobody: the run is being stopped
        self._reader.read_into(buffer, tensor.source, start=start)
        digest.update(buffer)

    def _copy(self, tensor: TensorPlan) -> Entry:
        """Carry a tensor over unchanged, through one buffer."""
        scratch = self._tile
        dtype = TORCH_DTYPES.get(tensor.source.dtype)
        # A weight that is NaN ruins the model wherever it is; other buffers may mean it.
        if not tensor.name.endswith("weight") or tensor.reason == IGNORED:
            dtype = None
        digest, written, nbytes = blake3(), blake3(), tensor.source.nbytes
        for start in range(0, nbytes, CHUNK):
            scratch.reset()
            raw = scratch((CHUNK,), torch.uint8)[: nbytes - start]
            piece = as_bytes(raw)
            self._read(tensor, piece, digest, start=start)
            if self._reference:
                self._reference.read_into(piece, tensor.name, start=start)
                written.update(piece)
            if dtype is not None and not ops.all_finite(raw.view(dtype), empty=scratch):
                raise _not_finite(tensor, raw.view(dtype), start // dtype.itemsize)
            self._base.write(tensor.name, piece, start=start)
            self._on_event(Advanced(nbytes=len(piece)))
        hexdigest = digest.hexdigest()
        there = written.hexdigest() if self._reference else hexdigest
        return {
            "name": tensor.name,
            "source_blake3": hexdigest,
            "blake3": {BASE_FILE: {tensor.name: there}},
        }

    def _split(self, tensor: TensorPlan) -> Entry:
        """Split one tensor: quantize each tile, keep the k weights that lose most."""
        found = self._split_above(tensor, self._guess_bar(tensor), on_event=self._on_event)
        # Fewer than k weights above a guess that was too high: once more, without one.
        found = found or self._split_above(tensor, None, on_event=null_sink)
        assert found is not None
        for _ in range(self._rounds(tensor)):
            before = found
            found = self._split_above(tensor, None, before=before, on_event=null_sink)
            assert found is not None
            if np.array_equal(found.kept, before.kept):
                break
        if self._compensate:
            assert self._curvature is not None
            factor = factorise(self._curvature.gram(tensor.name), name=tensor.name)
            found = self._split_above(tensor, None, before=found, factor=factor, on_event=null_sink)
            assert found is not None
        return found.entry

    def rewrite(self, tensor: TensorPlan, rounded: Rounded) -> Entry:
        """Write a tensor as it is given, where its work was done before; return its journal entry.

        Args:
            tensor: what the plan says of it.
            rounded: with the positions that ortho holds already.
        """
        codes, scales, kept = rounded
        positions, columns = np.flatnonzero(flat_of(kept)), tensor.source.shape[1]
        before = _Found(entry={}, kept=positions, scales=scales, columns=columns)
        found = self._split_above(tensor, None, before=before, codes=codes, on_event=null_sink)
        assert found is not None
        return found.entry

    def _rounds(self, tensor: TensorPlan) -> int:
        """Say how often scales and positions may take turns; where base must serve alone, never."""
        if self._alone or self._reference:
            return 0
        numel = tensor.source.numel
        return rounds(str(tensor.scale), by_curvature=self._by_curvature, k=tensor.k, numel=numel)

    def _guess_bar(self, tensor: TensorPlan) -> float | None:
        """Guess from rows all over the tensor what saliency the k-th largest will exceed.

        A guess only saves the selection from holding what it would drop again; it is worth its
        reading where the tensor has many tiles.
        """
        rows, columns = tensor.source.shape
        block = max(1, TILE_ELEMENTS // (2 * SAMPLE_BLOCKS * columns))
        if tensor.k == 0 or rows < 16 * SAMPLE_BLOCKS * block or self._reference:
            return None
        scratch = self._tile
        scratch.reset()
        dtype = TORCH_DTYPES[tensor.source.dtype]
        raw = scratch((block * SAMPLE_BLOCKS, columns), dtype)
        starts = [i * rows // SAMPLE_BLOCKS for i in range(SAMPLE_BLOCKS)]
        for i, start in enumerate(starts):
            piece = as_bytes(raw[i * block : (i + 1) * block])
            self._reader.read_into(piece, tensor.source, start=start * columns * dtype.itemsize)
        curvature = self._open_curvature(tensor)
        sampled = curvature.sample(starts, block, empty=scratch) if curvature else None
        tile = self._quantize(tensor, raw, sampled, scratch)
        saliency = flat_of(measures_of(tile, by_curvature=self._by_curvature, scratch=scratch)[0])
        wanted = tensor.k / tensor.source.numel * saliency.size
        rank = math.ceil(1.5 * wanted + 3 * math.sqrt(wanted)) + 1  # rows differ: aim low
        if rank >= saliency.size:
            return None
        return float(np.partition(saliency, saliency.size - rank)[saliency.size - rank])

    def _open_curvature(self, tensor: TensorPlan) -> Curvature | None:
        return self._curvature.open(tensor.name) if self._curvature else None

    def _quantize(
        self,
        tensor: TensorPlan,
        raw: Tensor,
        curvature: tuple[Tensor, Tensor] | None,
        scratch: ops.Scratch,
        edit: Places | None = None,
        grid: Tensor | None = None,
        kept: Kept | None = None,
        rounded: Factor | Tensor | None = None,
    ) -> Tile:
        """Round a tile, or stand the `grid` of the reference in for its own."""
        source = weight = scratch(tuple(raw.shape), torch.float32).copy_(raw)
        if grid is not None:
            raw, weight = grid, scratch(tuple(grid.shape), torch.float32).copy_(grid)
        near, root = curvature or (None, None)
        bits = tensor.bits
        if rounded is not None and kept is not None:
            scales = kept.scales
            if isinstance(rounded, Tensor):
                codes = scratch(tuple(raw.shape), torch.float32).copy_(rounded)
            else:
                codes = round_columns(weight, scales, rounded, kept=kept.mask, bits=bits)
        else:
            scales = base_scales(
                str(tensor.scale), raw, near, self._group_size, bits=bits, kept=kept, empty=scratch
            )
            codes = ops.quantize(weight, scales, bits=bits, empty=scratch)
        if edit is not None:
            positions, changed = edit
            codes.view(-1).numpy()[positions] = changed
        residual = ops.dequantize(codes, scales, empty=scratch).sub_(source)
        delta = None if grid is None else weight.sub_(source)
        return Tile(
            weight=source, scales=scales, codes=codes, residual=residual, root=root, delta=delta
        )

    def _read_grid(
        self, tensor: TensorPlan, raw: Tensor, row: int, scratch: ops.Scratch
    ) -> Tensor | None:
        """Read the same rows of the reference."""
        if self._reference is None:
            return None
        grid = scratch(tuple(raw.shape), raw.dtype)
        start = row * raw.shape[1] * raw.dtype.itemsize
        self._reference.read_into(as_bytes(grid), tensor.name, start=start)
        return grid

    def _split_above(
        self,
        tensor: TensorPlan,
        bar: float | None,
        *,
        before: _Found | None = None,
        factor: Factor | None = None,
        codes: Tensor | None = None,
        on_event: EventSink,
    ) -> _Found | None:
        """Split one tensor in one pass; None if fewer than k residuals exceed `bar`.

        Args:
            tensor: what the plan says of it.
            bar: a guess below the k-th largest saliency.
            before: what the pass before found; its positions are left out of the scales.
            factor: round by compensation, with the scales and positions of `before`.
            codes: (out, in) that are known, with the scales and positions of `before`.
            on_event: told of bytes.
        """
        scratch = self._tile  # valid for one tile
        self._held.reset()  # valid for one tensor
        rows, columns = tensor.source.shape
        dtype = TORCH_DTYPES[tensor.source.dtype]
        curvature = self._open_curvature(tensor)
        edit = self._edits.get(tensor.name)
        alike = chosen_alike(str(tensor.scale), by_curvature=self._by_curvature)
        digest = blake3()
        base = [TensorStream(self._base, spec.key) for spec in tensor.base]
        packed, stored, shape = base
        again = self._rounds(tensor) or self._compensate
        scales = torch.empty(tensor.base[1].shape, dtype=dtype) if again else None
        step = tile_rows(tensor.source.shape, GPTQ_ELEMENTS if factor else TILE_ELEMENTS)
        sums = Tally(
            tensor,
            bar,
            by_curvature=self._by_curvature,
            curvature=curvature is not None,
            reference=self._reference is not None,
            to_code=self._moved_to_code,
            stretch=step * columns,
            empty=self._held,
        )
        for row in range(0, rows, step):
            scratch.reset()
            count = min(step, rows - row)
            raw = scratch((count, columns), dtype)
            self._read(tensor, as_bytes(raw), digest, start=row * columns * dtype.itemsize)
            weights = curvature.tile(row, count, empty=scratch) if curvature else None
            known = before.within(row, count) if before else None
            changed = edit.within(row * columns, row * columns + raw.numel()) if edit else None
            grid = self._read_grid(tensor, raw, row, scratch)
            rounded = factor if codes is None else codes[row : row + count]
            tile = self._quantize(tensor, raw, weights, scratch, changed, grid, known, rounded)
            if not ops.all_finite(tile.scales):
                raise _not_finite(tensor, tile.weight, row * columns)
            packed.write(as_bytes(ops.pack_codes(tile.codes, bits=tensor.bits, empty=scratch)))
            stored.write(as_bytes(tile.scales))
            if scales is not None:
                scales[row : row + count] = tile.scales
            stay = None if changed is None else changed[0]
            if known and (rounded is not None or not alike):
                stay = np.flatnonzero(flat_of(known.mask))
            sums.take(tile, raw, stay, row=row, scratch=scratch)
            on_event(Advanced(nbytes=raw.nbytes))
        if sums.short:
            return None
        if curvature:
            curvature.finish()
            curvature.check_source(digest.hexdigest())
        shape.write(as_bytes(torch.tensor([rows, columns], dtype=torch.int64)))
        kept, values, measured = sums.finish()
        entry = {
            "name": tensor.name,
            "source_blake3": digest.hexdigest(),
            **measured,
            "blake3": {
                BASE_FILE: _digests(base),
                ORTHO_FILE: self._write_csr(tensor, kept, values),
            },
        }
        return _Found(entry=entry, kept=kept.copy(), scales=scales, columns=columns)

    def _write_csr(self, tensor: TensorPlan, indices: Any, values: Any) -> dict[str, str]:
        rows, columns = tensor.source.shape
        parts = (ops.crow_indices(indices, (rows, columns)), indices % columns, values)
        streams = []
        for spec, part in zip(tensor.ortho, parts, strict=True):
            stream = TensorStream(self._ortho, spec.key)
            stream.write(np.ascontiguousarray(part, NUMPY_DTYPES.get(spec.dtype)).data)
            streams.append(stream)
        return _digests(streams)


def is_sound(entry: Entry, tensor: TensorPlan, *, curvature: bool = False) -> bool:
    """Tell a journal entry that we could have written from one that was tampered with."""
    measured = ["signal", "noise", "noise_kept"]
    if curvature:
        measured += ["curvature_noise", "curvature_noise_kept"]
    keys = {BASE_FILE: {spec.key for spec in tensor.base}}
    if tensor.ortho:
        keys[ORTHO_FILE] = {spec.key for spec in tensor.ortho}
    digests = entry.get("blake3")
    if not isinstance(digests, dict) or not all(isinstance(d, dict) for d in digests.values()):
        return False
    texts = [entry.get("source_blake3"), *(text for d in digests.values() for text in d.values())]
    numbers = [entry.get(key) for key in measured if tensor.ortho]
    return (
        {name: set(d) for name, d in digests.items()} == keys
        and all(isinstance(text, str) and len(text) == 64 for text in texts)
        and all(isinstance(n, float) and math.isfinite(n) for n in numbers)
    )


def _digests(streams: Iterable[TensorStream]) -> dict[str, str]:
    return {stream.key: stream.digest.hexdigest() for stream in streams}


def _not_finite(tensor: TensorPlan, values: Tensor, start: int) -> NumericalError:
    value, position = first_bad(tensor, values, start)
    return NumericalError(
        f"tensor `{tensor.name}` of `{tensor.source.shard}` holds {value} at {position}",
        hint="repair the checkpoint, or carry the tensor over as it is by adding it to `ignore`",
    )
