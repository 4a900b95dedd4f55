"""Exact selection: the k largest of a stream, and where they lie row by row."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Room = Callable[[int, npt.DTypeLike], npt.NDArray[Any]]


class TopK:
    """The k largest of a stream of saliencies, exactly k of them, in one pass.

    Whatever exceeds the k-th largest so far is kept beside its payload; past 2k candidates the list
    is cut back to k, which raises the bar. Ties keep the lower flat index: an entry that comes
    later and equals the bar has a higher index than the k already held, so `>` is the exact test.
    About k (1 + ln(n / k)) entries are ever kept of n.

    Saliencies are float32, >= 0 and finite; the caller rules NaN out.
    """

    def __init__(
        self,
        k: int,
        *,
        length: int,
        stretch: int,
        payloads: Sequence[npt.DTypeLike],
        bar: float | None = None,
        empty: Room = np.empty,
    ) -> None:
        """Make room for the candidates.

        Args:
            k: entries to select, 0 <= k <= length.
            length: entries of the whole stream.
            stretch: most entries of one `push`.
            payloads: dtypes of what is carried along with each entry.
            bar: a guess below the k-th largest, which saves room and time; if it was too high, the
                stream ends `short` and has to be pushed again without it.
            empty: where the buffers come from; they are in use until the result of `finish` is.
        """
        self._k = k
        self._count = 0
        self._guessed = bar is not None
        self._bar = np.float32(np.inf if not k else -1.0 if bar is None else bar)
        room = min(2 * k + stretch, length)
        self._indices = empty(room, np.int32 if length < 2**31 else np.int64)
        self._saliency = empty(room, np.float32)
        self._sorted = empty(room, np.float32)
        self._payloads = [empty(room, dtype) for dtype in payloads]
        self._above = empty(stretch, np.bool_)

    def push(
        self,
        saliency: npt.NDArray[np.float32],
        payloads: Sequence[npt.NDArray[np.generic]],
        *,
        start: int,
    ) -> None:
        """Take the next stretch of the stream.

        Args:
            saliency: (n,) float32.
            payloads: (n,) each, carried along.
            start: flat index of the first entry; stretches come in ascending order.
        """
        if not self._count and not self._guessed and 0 < self._k < saliency.size:
            # Of the first stretch only its own k largest can matter: put the bar just below them.
            self._bar = np.nextafter(self._kth_largest(saliency), np.float32(-1.0))
        found = np.flatnonzero(np.greater(saliency, self._bar, out=self._above[: saliency.size]))
        here = slice(self._count, self._count + found.size)
        np.add(found, start, out=self._indices[here], casting="same_kind")
        np.take(saliency, found, out=self._saliency[here], mode="clip")
        for held, payload in zip(self._payloads, payloads, strict=True):
            np.take(payload, found, out=held[here], mode="clip")
        self.took(found.size)

    @property
    def bar(self) -> np.float32:
        """What an entry has to exceed."""
        return self._bar

    def room(self) -> tuple[npt.NDArray[Any], npt.NDArray[Any], list[npt.NDArray[Any]]]:
        """Hand out what entries above `bar` go to: indices, saliency and payloads.

        Who computes saliency puts them there, at most a stretch of them, and tells `took`.
        """
        free = slice(self._count, None)
        payloads = [column[free] for column in self._payloads]
        return self._indices[free], self._saliency[free], payloads

    def took(self, count: int) -> None:
        """Count what was put into the room."""
        self._count += count
        if self._count > 2 * self._k:
            self._prune()

    def _kth_largest(self, saliency: npt.NDArray[np.float32]) -> Any:
        room = self._sorted[: saliency.size]
        room[:] = saliency
        room.partition(saliency.size - self._k)
        return room[saliency.size - self._k]

    def _prune(self) -> None:
        held = self._saliency[: self._count]
        self._bar = self._kth_largest(held)
        keep = np.flatnonzero(held >= self._bar)
        if keep.size > self._k:
            ties = np.flatnonzero(held[keep] == self._bar)
            keep = np.delete(keep, ties[self._k - keep.size :])
        for column in (self._indices, self._saliency, *self._payloads):
            column[: self._k] = column[keep]
        self._count = self._k

    @property
    def short(self) -> bool:
        """Whether fewer than k entries exceeded the bar that was guessed."""
        return self._count < self._k

    def finish(
        self,
    ) -> tuple[
        npt.NDArray[np.integer[Any]], npt.NDArray[np.float32], list[npt.NDArray[np.generic]]
    ]:
        """Close the stream.

        Returns:
            indices (k,) int32 or int64 ascending; saliency (k,) float32 and payloads (k,) in the
            order of the indices.
        """
        if self._count > self._k:
            self._prune()
        payloads = [column[: self._k] for column in self._payloads]
        return self._indices[: self._k], self._saliency[: self._k], payloads


def guess_bar(sample: npt.NDArray[np.float32], share: float) -> float | None:
    """Guess from some saliencies of a stream what the k-th largest of them all will exceed.

    Args:
        sample: (n,) float32, from all over the stream.
        share: k over the stream's length, > 0.
    Returns:
        The (1.5 m + 3 sqrt(m) + 1)-th largest of the sample, m = share * n: parts of a stream
        differ, so it aims low. None where the sample is too small to tell.
    """
    wanted = share * sample.size
    rank = math.ceil(1.5 * wanted + 3 * math.sqrt(wanted)) + 1
    if rank >= sample.size:
        return None
    return float(np.partition(sample, sample.size - rank)[sample.size - rank])


def crow_indices(
    indices: npt.NDArray[np.integer[Any]], shape: tuple[int, int]
) -> npt.NDArray[np.int64]:
    """Count the entries before each row: the `crow_indices` of a CSR matrix.

    Args:
        indices: (nnz,) integer flat indices, ascending.
        shape: (out, in).
    Returns:
        (out + 1,) int64, from 0 to nnz, never falling.
    """
    rows, columns = shape
    return np.searchsorted(indices, np.arange(rows + 1, dtype=np.int64) * columns).astype(np.int64)
