"""One tensor from its first tile to its last: read, quantize, select, write, digest."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from blake3 import blake3
from torch import Tensor

from ortho_cli.decompose.edits import Edits
from ortho_cli.decompose.plan import SplitTensor
from ortho_cli.decompose.tally import Tally, Tile, flat_of, measures_of
from ortho_cli.decompose.workers import (
    Check,
    Entry,
    Reference,
    Worker,
    not_finite,
    sample_rows,
    short_of,
)
from ortho_cli.errors import InternalError
from ortho_cli.events import Advanced, EventSink, null_sink
from ortho_cli.formats.curvature import Curvature, gram_of
from ortho_cli.formats.statistics import StatisticsReader
from ortho_cli.split import quantize
from ortho_cli.split.gptq import Factor, factorise, round_columns
from ortho_cli.split.in_memory import base_scales, kept_within
from ortho_cli.split.quantize import as_bytes
from ortho_cli.split.scale_search import chosen_alike, rounds, take_turns
from ortho_cli.split.scales import Kept
from ortho_cli.split.select import guess_bar
from ortho_cli.split.sizes import Part, Sizes
from ortho_cli.storage.checkpoint import ShardReader
from ortho_cli.storage.data_file import DataFile, TensorStream
from ortho_cli.storage.sealing import OrthoFile

TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

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
        if self.scales is None:
            raise InternalError("a pass was to begin with the scales of one that held none")
        return kept_within(self.kept, self.scales, self.columns, row, row + rows)


class Splitter(Worker):
    """Splits with torch, and whatever a recipe may ask for."""

    def __init__(
        self,
        reader: ShardReader,
        base: DataFile,
        ortho: OrthoFile,
        *,
        group_size: int,
        sizes: Sizes,
        curvature: StatisticsReader | None = None,
        by_curvature: bool = False,
        edits: Edits | None = None,
        moved_to_code: bool = False,
        alone: bool = False,
        compensate: bool = False,
        reference: Reference | None = None,
        check: Check | None = None,
        stop: threading.Event,
        on_event: EventSink,
    ) -> None:
        """Say where tensors come from and go to, what selects a weight, and what stops the work."""
        super().__init__(
            reader,
            base,
            ortho,
            sizes=sizes,
            reference=reference,
            check=check,
            stop=stop,
            on_event=on_event,
        )
        self._edits = edits or {}
        self._moved_to_code = moved_to_code
        self._alone = alone  # base has to serve without ortho
        self._compensate = compensate
        self._group_size = group_size
        self._curvature, self._by_curvature = curvature, by_curvature
        self._tile, self._held = quantize.Scratch(), quantize.Scratch()

    def split(self, tensor: SplitTensor) -> Entry:
        """Split one tensor: quantize each tile, keep the k weights that lose most."""
        found = self._split_above(tensor, self._guess_bar(tensor), on_event=self._on_event)
        # Fewer than k weights above a guess that was too high: once more, without one.
        found = found or self._split_whole(tensor, on_event=null_sink)
        found = take_turns(found, partial(self._split_again, tensor), self._rounds(tensor))
        if self._compensate:
            factor = factorise(gram_of(self._statistics, tensor.name), name=tensor.name)
            found = self._split_again(tensor, found, factor=factor)
        return found.entry

    def rewrite(self, tensor: SplitTensor, rounded: Rounded) -> Entry:
        """Write a tensor as it is given, where its work was done before; return its journal entry.

        Args:
            tensor: what the plan says of it.
            rounded: with the positions that ortho holds already.
        """
        codes, scales, kept = rounded
        positions, columns = np.flatnonzero(flat_of(kept)), tensor.source.shape[1]
        before = _Found(entry={}, kept=positions, scales=scales, columns=columns)
        return self._split_again(tensor, before, codes=codes).entry

    def _split_again(self, tensor: SplitTensor, before: _Found, **given: Any) -> _Found:
        return self._split_whole(tensor, before=before, on_event=null_sink, **given)

    def _split_whole(self, tensor: SplitTensor, **given: Any) -> _Found:
        """Split one tensor in a pass without a bar, which finds k weights whatever they are."""
        found = self._split_above(tensor, None, **given)
        if found is None:
            raise short_of(tensor)
        return found

    @property
    def _statistics(self) -> StatisticsReader:
        if self._curvature is None:
            raise InternalError(
                "columns are to make up for one another, and no statistics are open"
            )
        return self._curvature

    def _rounds(self, tensor: SplitTensor) -> int:
        """Say how often scales and positions may take turns; where base must serve alone, never."""
        if self._alone or self._reference:
            return 0
        numel = tensor.source.numel
        return rounds(str(tensor.scale), by_curvature=self._by_curvature, k=tensor.k, numel=numel)

    def _guess_bar(self, tensor: SplitTensor) -> float | None:
        """Guess from rows all over the tensor what saliency the k-th largest will exceed."""
        sample = None if self._reference else sample_rows(tensor, self._sizes.split // 2)
        if sample is None:
            return None
        starts, count = sample
        scratch = self._tile
        scratch.reset()
        shape = (count * len(starts), tensor.source.shape[1])
        raw = scratch(shape, TORCH_DTYPES[tensor.source.dtype])
        self._read_sample(tensor, as_bytes(raw), starts, count)
        curvature = self._open_curvature(tensor)
        sampled = curvature.sample(starts, count, empty=scratch) if curvature else None
        tile = self._quantize(tensor, raw, sampled, scratch)
        saliency = flat_of(measures_of(tile, by_curvature=self._by_curvature, scratch=scratch)[0])
        return guess_bar(saliency, tensor.k / tensor.source.numel)

    def _open_curvature(self, tensor: SplitTensor) -> Curvature | None:
        return Curvature(self._curvature, tensor.name) if self._curvature else None

    def _quantize(
        self,
        tensor: SplitTensor,
        raw: Tensor,
        curvature: tuple[Tensor, Tensor] | None,
        scratch: quantize.Scratch,
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
            codes = quantize.quantize(weight, scales, bits=bits, empty=scratch)
        if edit is not None:
            positions, changed = edit
            codes.view(-1).numpy()[positions] = changed
        residual = quantize.dequantize(codes, scales, empty=scratch).sub_(source)
        delta = None if grid is None else weight.sub_(source)
        return Tile(
            weight=source, scales=scales, codes=codes, residual=residual, root=root, delta=delta
        )

    def _read_grid(
        self, tensor: SplitTensor, raw: Tensor, row: int, scratch: quantize.Scratch
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
        tensor: SplitTensor,
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
        columns = tensor.source.shape[1]
        dtype = TORCH_DTYPES[tensor.source.dtype]
        curvature = self._open_curvature(tensor)
        edit = self._edits.get(tensor.name)
        alike = chosen_alike(str(tensor.scale), by_curvature=self._by_curvature)
        digest = blake3()
        packed, stored = base = [TensorStream(self._base, spec.key) for spec in tensor.base[:2]]
        again = self._rounds(tensor) or self._compensate
        scales = torch.empty(tensor.base[1].shape, dtype=dtype) if again else None
        part: Part = "gptq" if factor else "split"
        sums = Tally(
            tensor,
            bar,
            by_curvature=self._by_curvature,
            curvature=curvature is not None,
            reference=self._reference is not None,
            to_code=self._moved_to_code,
            stretch=self._sizes.rows(part, tensor.source.shape) * columns,
            empty=self._held.array,
        )
        for row, count in self._sizes.tiles(part, tensor.source.shape):
            scratch.reset()
            raw = scratch((count, columns), dtype)
            self._read(tensor, as_bytes(raw), digest, start=row * columns * dtype.itemsize)
            weights = curvature.tile(row, count, empty=scratch) if curvature else None
            known = before.within(row, count) if before else None
            changed = edit.within(row * columns, row * columns + raw.numel()) if edit else None
            grid = self._read_grid(tensor, raw, row, scratch)
            rounded = factor if codes is None else codes[row : row + count]
            tile = self._quantize(tensor, raw, weights, scratch, changed, grid, known, rounded)
            if not quantize.all_finite(tile.scales):
                raise not_finite(tensor, tile.weight.numpy(), row * columns)
            packed.write(as_bytes(quantize.pack_codes(tile.codes, bits=tensor.bits, empty=scratch)))
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
            curvature.finish(digest.hexdigest())
        kept, values, measured = sums.finish()
        entry = self._entry(tensor, digest, base, measured, kept, values)
        return _Found(entry=entry, kept=kept.copy(), scales=scales, columns=columns)
