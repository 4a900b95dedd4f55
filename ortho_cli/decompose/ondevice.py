"""One tensor in one pass on an accelerator, copies beside kernels.

What it writes is what `split.Splitter` writes, byte for byte: division, square root and rounding
are IEEE 754's on both, each operation is a kernel of its own, so that no product is contracted with
a sum, and of the divisions none is by a number that the host holds, which CUDA turns into a product
with the reciprocal. Only the sums of squares in report.json may differ, in their last digits.

It has been run on `torch.device("cpu")` only, and on no card.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from blake3 import blake3
from torch import Tensor

from ortho_cli.decompose.onepass import WORDS, CurvatureTile, Plain, Refused
from ortho_cli.decompose.plan import SplitTensor
from ortho_cli.decompose.splitter import TORCH_DTYPES
from ortho_cli.decompose.workers import Entry
from ortho_cli.events import Advanced
from ortho_cli.split import quantize
from ortho_cli.split.quantize import as_bytes
from ortho_cli.storage.data_file import TensorStream


class OnDevice(Plain):
    """Splits on a device; while it computes on a tile, the next is read and copied there."""

    def __init__(self, *places: Any, device: str, **rest: Any) -> None:
        """Take what `Plain` takes, and where to compute: cuda, cuda:N, or for tests cpu."""
        super().__init__(*places, **rest)
        self._device = torch.device(device)
        self._lanes = (_Lane(self._device), _Lane(self._device))

    def _split(self, tensor: SplitTensor) -> Entry:
        columns = tensor.source.shape[1]
        curvature = self._open(tensor)
        digest, sums = blake3(), np.zeros(3)
        packed, stored = base = [TensorStream(self._base, spec.key) for spec in tensor.base[:2]]
        top = TopK(tensor.k)
        before: _Begun | None = None

        def end(begun: _Begun) -> None:
            begun.lane.wait()
            if not bool(begun.sound):
                raise Refused
            packed.write(as_bytes(begun.packed))
            stored.write(as_bytes(begun.scales))
            sums[: len(begun.sums)] += begun.sums.numpy()
            with begun.lane.at_work():
                top.push(begun.saliency, begun.payloads, start=begun.start)
            begun.lane.wait()
            self._on_event(Advanced(nbytes=begun.nbytes))

        for i, (row, count) in enumerate(self._sizes.tiles("device", tensor.source.shape)):
            lane = self._lanes[i % 2]
            raw = lane.tile("raw", (count, columns), WORDS[tensor.source.dtype])
            data = raw.reshape(-1).view(np.uint8).data
            self._read(tensor, data, digest, start=row * columns * raw.itemsize)
            weight = curvature.tile(row, len(raw), lane) if curvature else CurvatureTile()
            with lane.at_work():
                begun = self._begin(tensor, lane, raw, weight, start=row * columns)
            if before:
                end(before)
            before = begun
        if before:
            end(before)
        return self._close(tensor, digest, base, curvature, sums, top.finish())

    def _begin(
        self,
        tensor: SplitTensor,
        lane: _Lane,
        raw: npt.NDArray[Any],
        curvature: CurvatureTile,
        *,
        start: int,
    ) -> _Begun:
        """Send a tile there, and ask for all that does not depend on other tiles."""
        dtype = TORCH_DTYPES[tensor.source.dtype]
        there = lane.send(raw).view(dtype)
        half = torch.full((), quantize.half_range(tensor.bits), device=self._device)
        count = raw.shape[1] // self._group_size
        scales = quantize.round_scales(quantize.absmax(there, count, self._empty).div_(half), dtype)
        weight = there.float()
        codes = quantize.quantize(weight, scales, bits=tensor.bits, empty=self._empty)
        residual = quantize.dequantize(codes, scales, empty=self._empty).sub_(weight)
        packed = quantize.pack_codes(codes, bits=tensor.bits, empty=self._empty)
        sound = torch.isfinite(scales).all()
        root, fine = self._root(lane, curvature)
        sound &= fine
        saliency = plain = residual.abs_()
        payloads = [there.view(torch.int32 if dtype.itemsize == 4 else torch.int16).view(-1)]
        squares = [_squares(weight), _squares(plain)]
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
            start=start,
            nbytes=raw.nbytes,
        )

    def _root(self, lane: _Lane, curvature: CurvatureTile) -> tuple[Tensor | None, Tensor]:
        """Take the root of a tile's curvature, and tell whether it is any."""
        words, rows, columns = curvature.roots
        true = torch.ones((), dtype=torch.bool, device=self._device)
        if words is not None:
            dtype = torch.bfloat16 if words.itemsize == 2 else torch.float32
            values = lane.send(words).view(dtype).float()
            return values.sqrt(), ((values >= 0) & (values < math.inf)).all()
        if rows is None or columns is None:
            return None, true
        return lane.send(rows)[:, None] * lane.send(columns), true

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
    nbytes: int


class _Lane:
    """What one tile in flight needs: pinned buffers, and on a card a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._cuda else None  # type: ignore[no-untyped-call]
        self._held: dict[str, Tensor] = {}

    def at_work(self) -> AbstractContextManager[Any]:
        """Ask for kernels and copies in this lane's order."""
        return torch.cuda.stream(self._stream) if self._stream else nullcontext()

    def wait(self) -> None:
        """Wait until all that was asked for is done."""
        if self._stream:
            self._stream.synchronize()

    def tile(self, name: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Hand out the pinned buffer of this name."""
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        return self._pinned(name, nbytes).numpy().view(dtype).reshape(shape)

    def send(self, array: npt.NDArray[Any]) -> Tensor:
        """Copy there; torch has no arithmetic, and needs none, on unsigned words."""
        signed = array.view(f"i{array.itemsize}") if array.dtype.kind == "u" else array
        return torch.from_numpy(signed).to(self._device, non_blocking=True)

    def fetch(self, name: str, values: Tensor) -> Tensor:
        """Copy back, into the pinned buffer of this name."""
        there = self._pinned(name, values.nbytes).view(values.dtype).view(values.shape)
        return there.copy_(values, non_blocking=True)

    def _pinned(self, name: str, nbytes: int) -> Tensor:
        if name not in self._held or self._held[name].numel() < nbytes:
            self._held[name] = torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._cuda)
        return self._held[name][:nbytes]


class TopK:
    """`topk.TopK` on a device: the k largest of a stream of saliencies, ties to the lower index.

    Saliencies are float32, >= 0 and finite; stretches come in ascending order.
    """

    def __init__(self, k: int) -> None:
        """Hold nothing yet; 0 <= k."""
        self._k = k
        self._bar = -1.0 if k else math.inf
        self._count = 0
        self._held: list[list[Tensor]] = []

    def push(self, saliency: Tensor, payloads: Sequence[Tensor], *, start: int) -> None:
        """Take the next stretch: (n,) saliency, and (n,) payloads of its entries."""
        found = torch.nonzero(saliency > self._bar).view(-1)
        if found.numel():
            columns = [found + start, saliency[found], *(one[found] for one in payloads)]
            self._held.append(columns)
            self._count += found.numel()
        if self._count > 2 * self._k:
            self._prune()

    def _prune(self) -> None:
        columns = [torch.cat(parts) for parts in zip(*self._held, strict=True)]
        saliency = columns[1]
        bar = saliency.topk(self._k, sorted=False).values.min()
        ties = torch.nonzero(saliency == bar).view(-1)
        keep = saliency > bar
        keep[ties[: self._k - int(keep.sum())]] = True
        self._held = [[column[keep] for column in columns]]
        self._count, self._bar = self._k, float(bar)

    def finish(self) -> tuple[Any, Any, list[Any]]:
        """Close the stream: indices (k,) ascending, saliency and payloads in their order."""
        if self._count > self._k:
            self._prune()
        if not self._held:
            return np.empty(0, np.int64), np.empty(0, np.float32), [np.empty(0, np.int16)]
        columns = [torch.cat(parts) for parts in zip(*self._held, strict=True)]
        indices, saliency, *payloads = (column.cpu().numpy() for column in columns)
        return indices, saliency, payloads


def _squares(values: Tensor) -> Tensor:
    wide = values.double().view(-1)
    return torch.dot(wide, wide)
