"""One tensor from its first tile to its last: read, quantize, select, write, digest."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from blake3 import blake3
from torch import Tensor

from ortho_cli import ops
from ortho_cli.artifact import BASE_FILE, ORTHO_FILE, module_of
from ortho_cli.checkpoint import Checkpoint, ShardReader
from ortho_cli.curvature import Curvature, CurvatureReader
from ortho_cli.edits import Edits
from ortho_cli.errors import NumericalError
from ortho_cli.events import Advanced, EventSink, TensorDone, null_sink
from ortho_cli.ops import as_bytes
from ortho_cli.plan import TILE_ELEMENTS, TensorPlan, tile_rows
from ortho_cli.selection import IGNORED
from ortho_cli.streams import base_scales
from ortho_cli.writer import CHUNK, DataFile, TensorStream

TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
NUMPY_DTYPES = {"U16": np.uint16, "I32": np.int32, "I64": np.int64}

# Places of a tensor from which the selection's first bar is guessed.
SAMPLE_BLOCKS = 16

Entry = dict[str, Any]
Places = tuple[npt.NDArray[np.int64], npt.NDArray[np.int8]]  # of edits in a tile, and their codes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tile:
    """Some rows of a tensor, split: weight = dequantize(codes, scales) - residual."""

    weight: Tensor
    scales: Tensor
    codes: Tensor
    residual: Tensor
    root: Tensor | None  # of the curvature
    delta: Tensor | None  # reference - weight


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


class _Moved:
    """What forgetting moved of one tensor: all of it is kept, whatever its residual.

    Codes move most easily where the source lies near the edge between two. Its own weight is then
    half of the way to where they went, and a percent of those, exact among weights that are
    rounded, still forgets. So alpha = 1 can give such positions the source's own code instead, and
    its weight to those alone that saliency would have kept without forgetting.
    """

    def __init__(self, *, measures: int, to_code: bool) -> None:
        self.energy = [0.0] * measures  # squares of each measure that alpha = 1 takes away
        self.coded = 0  # positions where alpha = 1 is the source's code, not its weight
        self._to_code = to_code
        self._codes: list[npt.NDArray[np.generic]] = []
        self._lost: list[list[npt.NDArray[np.float32]]] = []

    def mark(self, places: Places, tile: _Tile, flat: Sequence[Any], *, by_curvature: bool) -> None:
        """Sum up what the moves of a tile cost, and let the selection take them."""
        at, _ = places
        if self._to_code:
            self._remember(torch.from_numpy(at), tile, by_curvature=by_curvature)
        for i, measure in enumerate(flat):
            self.energy[i] += _energy(measure[at])
            measure[at] = 0.0 if i else np.inf

    def _remember(self, at: Tensor, tile: _Tile, *, by_curvature: bool) -> None:
        """Keep the source's own codes, dequantized, and what they cost."""
        columns = tile.weight.shape[1]
        weight = tile.weight.view(-1)[at].unsqueeze(1)
        # A group lies inside a row, so flat indices count groups, too.
        scales = tile.scales.reshape(-1)[at // (columns // tile.scales.shape[1])].unsqueeze(1)
        code = ops.dequantize(ops.quantize(weight, scales), scales)
        bits = torch.int32 if tile.scales.dtype.itemsize == 4 else torch.int16
        self._codes.append(_flat(code.to(tile.scales.dtype).view(bits)))
        lost = [code.sub_(weight).abs_().squeeze(1)]
        if tile.root is not None:
            root = tile.root[at % columns] if tile.root.ndim == 1 else tile.root.view(-1)[at]
            lost.insert(0 if by_curvature else 1, lost[0] * root)
        self._lost.append([_flat(one) for one in lost])

    def give_back(self, saliency: Any, values: Any) -> None:
        """Put codes where the source's weight would not be kept; infinite saliency marks moves."""
        moved = np.isinf(saliency)
        if not self._codes or not moved.any():
            return
        lost = [np.concatenate(parts) for parts in zip(*self._lost, strict=True)]
        coded = lost[0] < (np.inf if moved.all() else saliency[~moved].min())
        self.coded = int(coded.sum())
        values[np.flatnonzero(moved)[coded]] = np.concatenate(self._codes)[coded]
        for i, measure in enumerate(lost):
            self.energy[i] -= _energy(measure[coded])


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
        reference: Reference | None = None,
        stop: threading.Event,
        on_event: EventSink,
    ) -> None:
        """Say where tensors come from and go to, what selects a weight, and what stops the work."""
        self._reader, self._base, self._ortho = reader, base, ortho
        self._edits = edits or {}
        self._moved_to_code = moved_to_code
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
        entry = self._split_above(tensor, self._guess_bar(tensor), on_event=self._on_event)
        # Fewer than k weights above a guess that was too high: once more, without one.
        return entry or self._split_above(tensor, None, on_event=null_sink) or {}

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
        saliency = _flat(self._measures(self._quantize(tensor, raw, sampled, scratch), scratch)[0])
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
    ) -> _Tile:
        """Round a tile, or stand the `grid` of the reference in for its own."""
        source = weight = scratch(tuple(raw.shape), torch.float32).copy_(raw)
        if grid is not None:
            raw, weight = grid, scratch(tuple(grid.shape), torch.float32).copy_(grid)
        near, root = curvature or (None, None)
        scales = base_scales(str(tensor.scale), raw, near, self._group_size, empty=scratch)
        codes = ops.quantize(weight, scales, empty=scratch)
        if edit is not None:
            positions, changed = edit
            codes.view(-1).numpy()[positions] = changed
        residual = ops.dequantize(codes, scales, empty=scratch).sub_(source)
        delta = None if grid is None else weight.sub_(source)
        return _Tile(
            weight=source, scales=scales, codes=codes, residual=residual, root=root, delta=delta
        )

    def _measures(self, tile: _Tile, scratch: ops.Scratch) -> list[Tensor]:
        """Measure what rounding costs, what selects first: |r|, and |r| sqrt(h) with statistics.

        They order like their squares and neither underflow nor round.
        """
        weighted = (
            [] if tile.root is None else [ops.saliency(tile.residual, tile.root, empty=scratch)]
        )
        plain = [tile.residual.abs_()]
        found = weighted + plain if self._by_curvature else plain + weighted
        if tile.delta is not None:
            found.append(tile.delta.abs_() if tile.root is None else tile.delta.mul_(tile.root))
        return found

    def _split_above(
        self, tensor: TensorPlan, bar: float | None, *, on_event: EventSink
    ) -> Entry | None:
        """Split one tensor in one pass; None if fewer than k residuals exceed `bar`."""
        scratch = self._tile  # valid for one tile
        held = self._held  # valid for one tensor
        held.reset()
        rows, columns = tensor.source.shape
        dtype = TORCH_DTYPES[tensor.source.dtype]
        module = module_of(tensor.name)
        base = {
            part: TensorStream(self._base, f"{module}.{part}")
            for part in ("weight_packed", "weight_scale", "weight_shape")
        }
        curvature = self._open_curvature(tensor)
        edit = self._edits.get(tensor.name)
        digest, signal = blake3(), 0.0
        noise = [0.0] * (1 + bool(curvature) + bool(self._reference))
        moved = _Moved(measures=len(noise), to_code=self._moved_to_code)
        step = tile_rows(tensor.source.shape)
        bits = torch.int32 if dtype.itemsize == 4 else torch.int16
        top = ops.TopK(
            tensor.k,
            length=rows * columns,
            stretch=step * columns,
            payloads=[bits, *(torch.float32 for _ in noise[1:])],
            bar=bar,
            empty=held,
        )
        for row in range(0, rows, step):
            scratch.reset()
            raw = scratch((min(step, rows - row), columns), dtype)
            self._read(tensor, as_bytes(raw), digest, start=row * columns * dtype.itemsize)
            weights = curvature.tile(row, raw.shape[0], empty=scratch) if curvature else None
            grid = None
            if self._reference:
                grid = scratch(tuple(raw.shape), dtype)
                start = row * columns * dtype.itemsize
                self._reference.read_into(as_bytes(grid), tensor.name, start=start)
            changed = edit.within(row * columns, row * columns + raw.numel()) if edit else None
            tile = self._quantize(tensor, raw, weights, scratch, changed, grid)
            if not ops.all_finite(tile.scales):
                raise _not_finite(tensor, tile.weight, row * columns)
            base["weight_packed"].write(as_bytes(ops.pack_int4(tile.codes, empty=scratch)))
            base["weight_scale"].write(as_bytes(tile.scales))
            signal += ops.squared_norm(tile.weight)
            measures = self._measures(tile, scratch)
            # Few weights hold most of the curvature: what is left without them needs float64.
            wide = scratch(tuple(raw.shape), torch.float64) if curvature else None
            noise = [
                total + ops.squared_norm(measure, wide=wide)
                for total, measure in zip(noise, measures, strict=True)
            ]
            if not all(map(math.isfinite, noise)):
                raise _overflow(tensor, measures, row * columns)
            saliency, *others = flat = [_flat(measure) for measure in measures]
            if changed is not None:
                moved.mark(changed, tile, flat, by_curvature=self._by_curvature)
            top.push(saliency, [_flat(raw.view(bits)), *others], start=row * columns)
            on_event(Advanced(nbytes=raw.nbytes))
        if top.short:
            return None
        if curvature:
            curvature.finish()
            curvature.check_source(digest.hexdigest())
        base["weight_shape"].write(as_bytes(torch.tensor([rows, columns], dtype=torch.int64)))
        indices, first, (values, *second) = top.finish()
        moved.give_back(first, values)
        ortho = self._write_csr(tensor, indices, values)
        # Everything kept is exact; a difference of sums would not come out as 0.
        first = first[np.isfinite(first)]
        whole = tensor.k == tensor.source.numel and not moved.coded
        kept = [
            total if whole else min(_energy(values) + back, total)
            for values, total, back in zip((first, *second), noise, moved.energy, strict=True)
        ]
        names = ["noise", "curvature_noise"][: 1 + bool(curvature)]
        if self._by_curvature:
            names.reverse()
        names += ["delta"] if self._reference else []
        return {
            "name": tensor.name,
            "source_blake3": digest.hexdigest(),
            "signal": signal,
            **dict(zip(names, noise, strict=False)),
            **{f"{name}_kept": part for name, part in zip(names, kept, strict=False)},
            "blake3": {BASE_FILE: _digests(base.values()), ORTHO_FILE: ortho},
        }

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


def _flat(tensor: Tensor) -> Any:
    return tensor.view(-1).numpy()


def _energy(values: Any) -> float:
    return float(np.square(values, dtype=np.float64).sum())


def _digests(streams: Iterable[TensorStream]) -> dict[str, str]:
    return {stream.key: stream.digest.hexdigest() for stream in streams}


def _not_finite(tensor: TensorPlan, values: Tensor, start: int) -> NumericalError:
    value, position = _first_bad(tensor, values, start)
    return NumericalError(
        f"tensor `{tensor.name}` of `{tensor.source.shard}` holds {value} at {position}",
        hint="repair the checkpoint, or carry the tensor over as it is by adding it to `ignore`",
    )


def _overflow(tensor: TensorPlan, measures: list[Tensor], start: int) -> NumericalError:
    worst = next(m for m in measures if not ops.all_finite(m))
    _, position = _first_bad(tensor, worst, start)
    if any(ops.all_finite(measure) for measure in measures):
        return NumericalError(
            f"residual times curvature of `{tensor.name}` overflows at {position}",
            hint="calibrate again, or add the tensor to `ignore`",
        )
    return NumericalError(
        f"tensor `{tensor.name}` of `{tensor.source.shard}` overflows {tensor.source.dtype} "
        f"when dequantized, at {position}",
        hint="add the tensor to `ignore`, or cast a float16 checkpoint to bfloat16",
    )


def _first_bad(tensor: TensorPlan, values: Tensor, start: int) -> tuple[float, list[int]]:
    """Find the first value that is not finite, and its index in the whole tensor."""
    flat = values.reshape(-1).float()
    first = int(torch.nonzero(~torch.isfinite(flat))[0])
    index = np.unravel_index(start + first, tensor.source.shape)
    return flat[first].item(), [int(i) for i in index]
