"""One tensor in passes of compiled loops: rounding to nearest on any scales, without torch.

What it writes is what `split.Splitter` writes, byte for byte. What the loops refuse goes there: a
weight that is NaN, curvature that is none.
"""

from __future__ import annotations

import math
import threading
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from ortho_cli.decompose.plan import Plan, SplitTensor
from ortho_cli.decompose.workers import EXPONENTS, Entry, Worker, sample_rows, short_of
from ortho_cli.events import Advanced, EventSink, Noted, null_sink
from ortho_cli.formats.statistics import CurvaturePass, StatisticsReader
from ortho_cli.split.scale_search import LANES, chosen_alike, rounds, scale_factors, take_turns
from ortho_cli.split.select import TopK, guess_bar
from ortho_cli.storage.checkpoint import TensorInfo
from ortho_cli.storage.data_file import TensorStream

# Words that the loop tells apart, and the smallest scale of each dtype, as in `ops`.
WORDS = {"BF16": np.uint16, "F16": np.int16, "F32": np.uint32}
FLOORS = {"BF16": 2.0**-126, "F16": 2.0**-24, "F32": 2.0**-126}

Array = npt.NDArray[Any]


def is_plain(plan: Plan) -> bool:
    """Tell whether one pass is all: rounding to nearest, absmax scales, nothing forgotten."""
    return _rounds_alone(plan) and all(tensor.scale == "absmax" for tensor in plan.split)


def takes(plan: Plan) -> bool:
    """Tell whether numba is there, and its loops split every tensor of a plan as the plan says."""
    if find_spec("numba") is None or not _rounds_alone(plan):
        return False
    if plan.statistics is not None and plan.recipe.saliency.kind != "curvature":
        return False
    return plan.group_size % 8 == 0 and all(tensor.bits == 4 for tensor in plan.split)


def _rounds_alone(plan: Plan) -> bool:
    """Tell whether each weight goes to its nearest code."""
    return not (plan.reference or plan.recipe.forgets or plan.recipe.compensates)


class Loops:
    """The compiled loops, loaded when they are first asked for; threads may share it."""

    def __init__(self, on_event: EventSink) -> None:
        """Say who is told if they cannot be loaded."""
        self._on_event = on_event
        self._lock = threading.Lock()
        self._asked = False
        self._found: ModuleType | None = None

    def get(self) -> ModuleType | None:
        """Load them; None, and once a note, where numba is there and of no use."""
        with self._lock:
            if not self._asked:
                self._asked = True
                try:
                    from ortho_cli.split import numba_loops as loops

                    self._found = loops
                except ImportError as error:  # numba and numpy, or numba and Python do not fit
                    self._on_event(Noted(message=f"split without numba, which is slower: {error}"))
        return self._found


class Refused(Exception):  # noqa: N818 - no error: the other worker says what is wrong, if anything
    """One pass does not take this tensor."""


class Plain(Worker):
    """Splits in one pass; what that refuses, another worker splits, who says what is wrong."""

    def __init__(
        self,
        *places: Any,
        group_size: int,
        curvature: StatisticsReader | None,
        other: Callable[[], Worker],
        **rest: Any,
    ) -> None:
        """Say what selects a weight, and who splits what is refused.

        Args:
            places: where tensors come from and go to, as `Worker` takes them.
            group_size: weights that share a scale.
            curvature: of the weights; it selects.
            other: makes a worker that splits anything.
            rest: what else `Worker` takes.
        """
        super().__init__(*places, **rest)
        self._group_size, self._curvature = group_size, curvature
        self._other = other
        self._made: Worker | None = None

    def split(self, tensor: SplitTensor) -> Entry:
        """Split one tensor: quantize it, and keep the k weights that lose most."""
        with suppress(Refused):
            return self._split(tensor)
        self._made = self._made or self._other()
        return self._made.split(tensor)

    @abstractmethod
    def _split(self, tensor: SplitTensor) -> Entry:
        """Split one tensor, or raise `Refused`."""

    def _open(self, tensor: SplitTensor) -> CurvatureWords | None:
        return CurvatureWords(self._curvature, tensor.name) if self._curvature else None

    def _close(
        self,
        tensor: SplitTensor,
        source: blake3,
        base: list[TensorStream],
        curvature: CurvatureWords | None,
        sums: Array,
        kept: tuple[Any, Any, list[Any]],
    ) -> Entry:
        """End a pass; `kept` is what `TopK.finish` gives."""
        if not np.isfinite(sums).all():
            raise Refused
        if curvature:
            curvature.finish(source.hexdigest())
        indices, first, (values, *second) = kept
        measured = _measured(tensor, sums, [first, *second])
        return self._entry(tensor, source, base, measured, indices, values)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """What one pass over a tensor found; the next may begin with it."""

    entry: Entry
    kept: npt.NDArray[np.integer[Any]]  # flat indices, ascending
    scales: Array | None  # (out, groups) words

    def within(self, start: int, stop: int, mask: Array) -> None:
        """Mark what is kept from one flat index to another."""
        here = slice(*np.searchsorted(self.kept, (start, stop)))
        mask[...] = 0
        mask.reshape(-1)[self.kept[here] - start] = 1


class OnePass(Plain):
    """Splits with compiled loops."""

    def __init__(self, *places: Any, loops: Loops, alone: bool = False, **rest: Any) -> None:
        """Take what `Plain` takes, and the loops, which workers share.

        Args:
            places: where tensors come from and go to, as `Worker` takes them.
            loops: the compiled loops.
            alone: base has to serve without ortho.
            rest: what else `Plain` takes.
        """
        super().__init__(*places, **rest)
        self._loops, self._alone = loops, alone
        padded = -(-self._group_size // LANES) * LANES
        self._group = np.empty((2, padded), np.float32)
        self._room = _Room()

    def _split(self, tensor: SplitTensor) -> Entry:
        if not self._loops.get():  # not before: another worker may copy while this one loads them
            raise Refused
        found = self._split_above(tensor, self._guess_bar(tensor), self._on_event)
        # Fewer than k weights above a guess that was too high: once more, without one.
        found = found or self._split_again(tensor, None)
        return take_turns(found, partial(self._split_again, tensor), self._rounds(tensor)).entry

    def _split_again(self, tensor: SplitTensor, before: _Found | None) -> _Found:
        found = self._split_above(tensor, None, null_sink, before)
        if found is None:
            raise short_of(tensor)
        return found

    def _rounds(self, tensor: SplitTensor) -> int:
        if self._alone:
            return 0
        alike, numel = self._curvature is not None, tensor.source.numel
        return rounds(str(tensor.scale), by_curvature=alike, k=tensor.k, numel=numel)

    def _split_above(
        self,
        tensor: SplitTensor,
        bar: float | None,
        on_event: EventSink,
        before: _Found | None = None,
    ) -> _Found | None:
        """Split one tensor in one pass; None if fewer than k weights exceed `bar`."""
        shape, columns = tensor.source.shape, tensor.source.shape[1]
        word = WORDS[tensor.source.dtype]
        curvature = self._open(tensor)
        digest, sums = blake3(), np.zeros(3)
        self._room.reset()
        packed, stored = base = [TensorStream(self._base, spec.key) for spec in tensor.base[:2]]
        top = TopK(
            tensor.k,
            length=tensor.source.numel,
            stretch=self._sizes.rows("split", shape) * columns,
            payloads=self._payloads(tensor),
            bar=bar,
            empty=self._room,
        )
        every = np.empty(tensor.base[1].shape, word) if self._rounds(tensor) else None
        for row, count in self._sizes.tiles("split", shape):
            raw = self._room.tile("raw", (count, columns), word)
            self._read(tensor, _bytes(raw), digest, start=row * columns * raw.itemsize)
            weight = curvature.tile(row, len(raw), self._room) if curvature else CurvatureTile()
            codes, scales = self._loop(tensor, raw, weight, top, sums, row=row, before=before)
            packed.write(_bytes(codes))
            stored.write(_bytes(scales))
            if every is not None:
                every[row : row + len(raw)] = scales
            on_event(Advanced(nbytes=raw.nbytes))
        if top.short:
            return None
        kept = top.finish()
        entry = self._close(tensor, digest, base, curvature, sums, kept)
        return _Found(entry=entry, kept=kept[0].copy(), scales=every)

    def _loop(
        self,
        tensor: SplitTensor,
        raw: Array,
        weight: CurvatureTile,
        top: TopK,
        sums: Array,
        *,
        row: int,
        before: _Found | None = None,
    ) -> tuple[Array, Array]:
        """Run the loops over a tile; return packed codes and scales, valid until the next."""
        loops = self._loops.get()
        if loops is None:  # `_split` asked before
            raise Refused
        rows, columns = raw.shape
        dtype, start = tensor.source.dtype, row * columns
        size, floor = self._group_size, np.float32(FLOORS[dtype])
        scale, searched = str(tensor.scale), tensor.scale != "absmax"
        codes = self._room.tile("codes", (rows, columns // 2), np.uint8)
        scales = self._room.tile("scales", (rows, columns // size), raw.dtype)
        held = None
        if before is not None and before.scales is not None:
            held = self._room.tile("held", raw.shape, np.uint8)
            before.within(start, start + raw.size, held)
            scales[...] = before.scales[row : row + rows]
        if searched:
            near = weight.values if scale == "curvature" else (None, None, None)
            factors = np.array(scale_factors(tensor.bits), np.float32)
            loops.search(raw, size, floor, factors, *near, held, scales, self._group)
        alike = chosen_alike(scale, by_curvature=self._curvature is not None)
        indices, saliency, (values, *others) = top.room()
        found = loops.split(
            raw,
            size,
            floor,
            EXPONENTS[dtype][1],
            *weight.roots,
            top.bar,
            start,
            None if alike else held,
            codes,
            scales,
            searched,
            sums,
            indices,
            saliency,
            values,
            others[0] if others else None,
            self._room.tile("row", (2, columns), np.float32),
            self._room.tile("row of bytes", (2, columns), np.uint8),
        )
        if found < 0:
            raise Refused
        top.took(found)
        return codes, scales

    def _guess_bar(self, tensor: SplitTensor) -> float | None:
        """Guess from rows all over the tensor what saliency the k-th largest will exceed."""
        sample = sample_rows(tensor, self._sizes.bar_sample)
        if sample is None:
            return None
        starts, count = sample
        shape = (count * len(starts), tensor.source.shape[1])
        raw = self._room.tile("raw", shape, WORDS[tensor.source.dtype])
        self._read_sample(tensor, _bytes(raw), starts, count)
        curvature = self._open(tensor)
        weight = curvature.sample(starts, count, self._room) if curvature else CurvatureTile()
        self._room.reset()
        every = TopK(
            raw.size,
            length=raw.size,
            stretch=raw.size,
            payloads=self._payloads(tensor),
            empty=self._room,
        )
        _, saliency, _ = every.room()
        self._loop(tensor, raw, weight, every, np.zeros(3), row=0)
        return guess_bar(saliency, tensor.k / tensor.source.numel)

    def _payloads(self, tensor: SplitTensor) -> list[npt.DTypeLike]:
        """Say what is carried along: words, and with curvature the residual, too."""
        words: list[npt.DTypeLike] = [WORDS[tensor.source.dtype]]
        return [*words, np.float32] if self._curvature else words


def _measured(tensor: SplitTensor, sums: Array, kept: Sequence[Array]) -> dict[str, float]:
    """Say what rounding costs, and what of that ortho takes away."""
    signal, *noise = map(float, sums)
    entry = {"signal": signal}
    # With curvature the residual was carried along, behind what selects.
    for name, total, part in zip(("noise", "curvature_noise"), noise, reversed(kept), strict=False):
        entry[name] = total
        # Everything kept is exact; a difference of sums would not come out as 0.
        found = float(np.square(part, dtype=np.float64).sum())
        entry[f"{name}_kept"] = total if tensor.k == tensor.source.numel else min(found, total)
    return entry


class Tiles(Protocol):
    """Where buffers come from."""

    def tile(self, name: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """Hand out the buffer of this name."""


class Vector(NamedTuple):
    """Curvature of rows or of columns, float32."""

    values: Array
    roots: Array


class CurvatureTile(NamedTuple):
    """Curvature of some rows: words, or vectors whose product it is; none of them if it is one."""

    words: Array | None = None
    rows: Vector | None = None
    columns: Vector | None = None

    @property
    def values(self) -> tuple[Array | None, Array | None, Array | None]:
        """Words, or values of rows and columns."""
        one, other = self.rows, self.columns
        return self.words, one and one.values, other and other.values

    @property
    def roots(self) -> tuple[Array | None, Array | None, Array | None]:
        """Words, or roots of rows and columns."""
        one, other = self.rows, self.columns
        return self.words, one and one.roots, other and other.roots


class CurvatureWords(CurvaturePass[Vector]):
    """One pass over the curvature of one weight, as words, or as vectors that are held."""

    def _load(self, tensor: TensorInfo) -> Vector:
        values = np.empty(tensor.shape, np.float32)
        self._reader.read(_bytes(values), tensor)
        if not (np.isfinite(values) & (values >= 0)).all():
            raise Refused
        self._reader.compare(tensor, blake3(_bytes(values)).hexdigest())
        return Vector(values, np.sqrt(values))

    def tile(self, row: int, count: int, room: Tiles) -> CurvatureTile:
        """Read the next rows."""
        found = self.sample([row], count, room)
        if found.words is not None:
            self._digest.update(_bytes(found.words))
        return found

    def sample(self, starts: Sequence[int], count: int, room: Tiles) -> CurvatureTile:
        """Read `count` rows from each of `starts` on, outside of the pass."""
        if self._columns is not None:
            one = np.ones(len(starts) * count, np.float32)
            rows = Vector(one, one)
            if self._rows is not None:
                rows = Vector(*(_rows_of(values, starts, count) for values in self._rows))
            return CurvatureTile(None, rows, self._columns)
        full = self._streamed
        columns, word = full.shape[1], WORDS[full.dtype]
        raw = room.tile("curvature", (len(starts) * count, columns), word)
        for i, start in enumerate(starts):
            piece = raw[i * count : (i + 1) * count]
            self._reader.read(_bytes(piece), full, start=start * columns * raw.itemsize)
        return CurvatureTile(words=raw)


def _rows_of(values: Array, starts: Sequence[int], count: int) -> Array:
    return np.concatenate([values[start : start + count] for start in starts])


class _Room:
    """Buffers of one worker, used again: fresh pages cost more than the arithmetic."""

    def __init__(self) -> None:
        self._held: dict[str, Array] = {}
        self._next = 0

    def tile(self, name: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """Hand out the buffer of this name."""
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        if name not in self._held or self._held[name].size < nbytes:
            self._held[name] = np.empty(nbytes, np.uint8)
        return self._held[name][:nbytes].view(dtype).reshape(shape)

    def reset(self) -> None:
        """Let the next list of candidates have the buffers of the last."""
        self._next = 0

    def __call__(self, size: int, dtype: npt.DTypeLike) -> Array:
        """Hand out a buffer of a list of candidates."""
        self._next += 1
        return self.tile(f"candidates {self._next}", (size,), dtype)


def _bytes(array: Array) -> memoryview:
    return array.reshape(-1).view(np.uint8).data
