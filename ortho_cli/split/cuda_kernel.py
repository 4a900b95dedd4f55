"""Splits tiles on an accelerator, copies beside kernels: rounding to nearest, absmax scales.

What it writes is what `torch_kernel` writes, byte for byte: division, square root and rounding
are IEEE 754's on both, each operation is a kernel of its own, so that no product is contracted with
a sum, and of the divisions none is by a number that the host holds, which CUDA turns into a product
with the reciprocal. Only the sums of squares in report.json may differ, in their last digits.

It has been run on torch's CPU device only, and on no card.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ortho_cli.split import quantize
from ortho_cli.split.dtypes import torch_dtypes
from ortho_cli.split.select import TopK
from ortho_cli.split.sizes import DEFAULT_SIZES, Part, Sizes
from ortho_cli.split.task import Array, Buffers, CurvatureTile, Room, SplitTask, Tile, TileResult
from ortho_cli.split.torch_kernel import words_of


class CudaKernel:
    """Splits on a device; while it computes on a tile, the next is read and copied there."""

    depth = 2
    part: Part = "device"

    def __init__(self, device: str, sizes: Sizes = DEFAULT_SIZES) -> None:
        """Say where to compute (cuda, cuda:N, or for tests cpu), and how large tiles are."""
        self.sizes = sizes
        self.held = Buffers()
        self._device = torch.device(device)
        self._lanes = [_Lane(self._device) for _ in range(self.depth)]

    def room(self) -> Room:
        """Give the buffers of the next tile, which takes the other lane."""
        self._lanes.reverse()
        return self._lanes[0]

    def begin(self, task: SplitTask, tile: Tile) -> _Begun:
        """Send a tile there, and ask for all that does not depend on other tiles."""
        lane, dtype = self._lanes[0], torch_dtypes()[task.dtype]
        with lane.at_work():
            there = lane.send(tile.raw).view(dtype)
            half = torch.full((), quantize.half_range(task.bits), device=self._device)
            count = tile.raw.shape[1] // task.group_size
            scales = quantize.round_scales(
                quantize.absmax(there, count, self._empty).div_(half), dtype
            )
            weight = there.float()
            codes = quantize.quantize(weight, scales, bits=task.bits, empty=self._empty)
            residual = quantize.dequantize(codes, scales, empty=self._empty).sub_(weight)
            packed = quantize.pack_codes(codes, bits=task.bits, empty=self._empty)
            root, sound = self._root(lane, tile.curvature)
            sound = torch.isfinite(scales).all() & sound
            saliency = plain = residual.abs_()
            payloads = [there.view(torch.int32 if dtype.itemsize == 4 else torch.int16).view(-1)]
            squares = [_squares(weight), _squares(plain)]  # in the order of `sums`
            if root is not None:
                saliency = quantize.saliency(plain, root, empty=self._empty)
                payloads.append(plain.view(-1))
                squares.append(_squares(saliency))
            return _Begun(
                lane=lane,
                packed=lane.fetch("packed", packed),
                scales=lane.fetch("scales", scales),
                sums=lane.fetch("sums", torch.stack(squares)),
                sound=lane.fetch("sound", sound),
                saliency=saliency.view(-1),
                payloads=payloads,
                start=tile.start,
            )

    def finish(self, task: SplitTask, pending: _Begun, select: TopK, sums: Array) -> TileResult:
        """Wait for a tile, and fetch what may be kept."""
        lane = pending.lane
        lane.wait()
        result = TileResult(pending.packed.numpy(), words_of(pending.scales))
        if not bool(pending.sound):
            return result._replace(sound=False)
        added = pending.sums.numpy()
        sums[: len(added)] += added
        with lane.at_work():
            columns = _candidates(pending, select)
        indices, saliency, payloads = select.room()
        for room, column in zip((indices, saliency, *payloads), columns, strict=True):
            values = column.numpy()
            room[: len(values)] = values.view(room.dtype) if room.dtype.kind == "u" else values
        select.took(len(columns[0]))
        return result

    def _root(self, lane: _Lane, curvature: CurvatureTile) -> tuple[Tensor | None, Tensor]:
        """Take the root of a tile's curvature, and tell whether it is any."""
        true = torch.ones((), dtype=torch.bool, device=self._device)
        if curvature.words is not None:
            values = lane.send(curvature.words).view(torch_dtypes()[curvature.dtype]).float()
            return values.sqrt(), ((values >= 0) & (values < math.inf)).all()
        if curvature.columns is None:
            return None, true
        columns = lane.send(curvature.columns.roots)
        if curvature.rows is None:
            return columns, true
        return lane.send(curvature.rows.roots)[:, None] * columns, true

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self._device)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Begun:
    """A tile whose kernels and copies back were asked for; `lane.wait` makes them true."""

    lane: _Lane
    packed: Tensor
    scales: Tensor
    sums: Tensor
    sound: Tensor
    saliency: Tensor
    payloads: list[Tensor]
    start: int


class _Lane(Buffers):
    """What one tile in flight needs: pinned buffers, and on a card a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self._cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._cuda else None  # type: ignore[no-untyped-call]

    def at_work(self) -> AbstractContextManager[Any]:
        """Ask for kernels and copies in this lane's order."""
        return torch.cuda.stream(self._stream) if self._stream else nullcontext()

    def wait(self) -> None:
        """Wait until all that was asked for is done."""
        if self._stream:
            self._stream.synchronize()

    def allocate(self, nbytes: int) -> Array:
        """Take pinned memory."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._cuda).numpy()

    def send(self, array: Array) -> Tensor:
        """Copy there; torch has no arithmetic, and needs none, on unsigned words."""
        signed = array.view(f"i{array.itemsize}") if array.dtype.kind == "u" else array
        return torch.from_numpy(signed).to(self._device, non_blocking=True)

    def fetch(self, name: str, values: Tensor) -> Tensor:
        """Copy back, into the pinned buffer of this name."""
        there = torch.from_numpy(self(name, (values.nbytes,), np.uint8)).view(values.dtype)
        return there.view(values.shape).copy_(values, non_blocking=True)


def _candidates(begun: _Begun, select: TopK) -> list[Tensor]:
    """Bring indices, saliency and payloads above the bar to the host: at most k, and ties."""
    saliency = begun.saliency
    found = torch.nonzero(saliency > float(select.bar)).view(-1)
    if found.numel() > select.k:
        bar = saliency.topk(select.k, sorted=False).values.min()
        found = torch.nonzero(saliency >= bar).view(-1)
    return [(found + begun.start).cpu(), *(one[found].cpu() for one in (saliency, *begun.payloads))]


def _squares(values: Tensor) -> Tensor:
    wide = values.double().view(-1)
    return torch.dot(wide, wide)
