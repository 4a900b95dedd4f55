"""Exact selection: the k largest weights, or columns, of a stream, and where they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ortho_cli.split.task import Array, Room

# Rows whose squares are in memory at a time, while columns are summed: 2 MB at 4,096 columns.
SUMMED_ROWS = 64

# Bins of a survey: the upper half of a float32, which holds its exponent and seven bits more.
BINS = 1 << 15


class Own(NamedTuple):
    """The source's own codes at marked positions, where ortho may hold them."""

    words: Array  # dequantized, as ortho stores them
    lost: list[Array]  # what they cost, by each measure


def fresh(name: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
    """Take fresh memory."""
    return np.empty(shape, dtype)


class TopK:
    """The k largest of a stream of saliencies, exactly k of them, in one pass.

    Whatever exceeds the k-th largest so far is kept beside its payload; past 2k candidates the list
    is cut back to k, which raises the bar. Ties keep the lower flat index: an entry that comes
    later and equals the bar has a higher index than the k already held, so `>` is the exact test.
    About k (1 + ln(n / k)) entries are ever kept of n.

    Saliencies are float32, >= 0 and finite; the caller rules NaN out. Marked entries are infinite,
    and so are kept whatever their saliency was.
    """

    def __init__(
        self,
        k: int,
        *,
        length: int,
        stretch: int,
        payloads: Sequence[npt.DTypeLike],
        bar: float | None = None,
        empty: Room = fresh,
    ) -> None:
        """Make room for the candidates.

        Args:
            k: entries to select, 0 <= k <= length.
            length: entries of the whole stream.
            stretch: most entries of one `push`.
            payloads: dtypes of what is carried along with each entry; of a split its word, then
                float32 of each further measure.
            bar: a guess below the k-th largest, which saves room and time; if it was too high, the
                stream ends `short` and has to be pushed again without it.
            empty: where the buffers come from; they are in use until the result of `finish` is.
        """
        self.k = k
        self._count = 0
        self._guessed = bar is not None
        self._bar = np.float32(np.inf if not k else -1.0 if bar is None else bar)
        room = (min(2 * k + stretch, length),)
        self._indices = empty("indices", room, np.int32 if length < 2**31 else np.int64)
        self._saliency = empty("saliency", room, np.float32)
        self._sorted = empty("sorted", room, np.float32)
        self._payloads = [empty(f"payload {i}", room, one) for i, one in enumerate(payloads)]
        self._above = empty("above", (stretch,), np.bool_)
        self._marked = [0.0] * max(1, len(payloads))  # squares of what was marked, by measure
        self._own: list[Own] = []
        self.exact = True  # every value is the source's weight

    def mark(self, at: Array, measures: Sequence[Array], own: Own | None = None) -> None:
        """Have some entries of the next stretch kept, whatever they lose.

        Codes move most easily where the source lies near the edge between two. Its own weight is
        then half of the way to where they went, and a percent of those, exact among weights that
        are rounded, still forgets. So where `own` is given, a marked position is given the source's
        own code, and its weight to those alone that saliency would have kept without any mark.

        Args:
            at: positions in the stretch.
            measures: of the stretch, first the saliency; changed in place.
            own: the source's own codes there.
        """
        if own is not None:
            self._own.append(own)
        for i, measure in enumerate(measures):
            self._marked[i] += _energy(measure[at])
            measure[at] = 0.0 if i else np.inf

    def push(self, saliency: Array, payloads: Sequence[Array], *, start: int) -> None:
        """Take the next stretch of the stream.

        Args:
            saliency: (n,) float32.
            payloads: (n,) each, carried along.
            start: flat index of the first entry; stretches come in ascending order.
        """
        if not self._count and not self._guessed and 0 < self.k < saliency.size:
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

    def room(self) -> tuple[Array, Array, list[Array]]:
        """Hand out what entries above `bar` go to: indices, saliency and payloads.

        Who computes saliency puts them there, at most a stretch of them, and tells `took`.
        """
        free = slice(self._count, None)
        payloads = [column[free] for column in self._payloads]
        return self._indices[free], self._saliency[free], payloads

    def took(self, count: int) -> None:
        """Count what was put into the room."""
        self._count += count
        if self._count > 2 * self.k:
            self._prune()

    def _kth_largest(self, saliency: Array) -> Any:
        room = self._sorted[: saliency.size]
        room[:] = saliency
        room.partition(saliency.size - self.k)
        return room[saliency.size - self.k]

    def _prune(self) -> None:
        held = self._saliency[: self._count]
        self._bar = self._kth_largest(held)
        keep = np.flatnonzero(held >= self._bar)
        if keep.size > self.k:
            ties = np.flatnonzero(held[keep] == self._bar)
            keep = np.delete(keep, ties[self.k - keep.size :])
        for column in (self._indices, self._saliency, *self._payloads):
            column[: self.k] = column[keep]
        self._count = self.k

    @property
    def short(self) -> bool:
        """Whether fewer than k entries exceeded the bar that was guessed."""
        return self._count < self.k

    def finish(self) -> tuple[Array, Array, list[Array]]:
        """Close the stream.

        Returns:
            indices (k,) int32 or int64 ascending; saliency (k,) float32 and payloads (k,) in the
            order of the indices.
        """
        if self._count > self.k:
            self._prune()
        payloads = [column[: self.k] for column in self._payloads]
        return self._indices[: self.k], self._saliency[: self.k], payloads

    def taken(self) -> tuple[Array, list[float], Array]:
        """Close the stream of a weight, whose first payload is its words.

        Returns:
            indices (k,) ascending; the sum of squares of each measure that was selected; words (k,)
            that ortho is to hold there.
        """
        indices, saliency, (words, *others) = self.finish()
        marked = np.isinf(saliency)
        energies = list(self._marked)
        if self._own and marked.any():
            lost = [
                np.concatenate(parts) for parts in zip(*(o.lost for o in self._own), strict=True)
            ]
            coded = lost[0] < (np.inf if marked.all() else saliency[~marked].min())
            self.exact = not coded.any()
            own = np.concatenate([own.words for own in self._own])
            words[np.flatnonzero(marked)[coded]] = own[coded]
            energies = [e - _energy(one[coded]) for e, one in zip(energies, lost, strict=True)]
        found = (saliency[~marked], *others)
        return indices, [_energy(f) + e for f, e in zip(found, energies, strict=True)], words


class Histogram(TopK):
    """Counts the saliencies of a stream, and selects none of them.

    Inside a bin they differ by less than 0.8 %.
    """

    def __init__(
        self, *, stretch: int, payloads: Sequence[npt.DTypeLike], empty: Room = fresh
    ) -> None:
        """Make room for one stretch, all of which is taken."""
        super().__init__(stretch, length=stretch, stretch=stretch, payloads=payloads, empty=empty)
        self.counts = np.zeros(BINS, np.int64)

    def push(self, saliency: Array, payloads: Sequence[Array], *, start: int) -> None:
        """Count a stretch."""
        self.counts += np.bincount(saliency.view(np.uint32) >> 16, minlength=BINS)

    def took(self, count: int) -> None:
        """Count what was put into the room, and let the next stretch have it."""
        self.push(self._saliency[:count], (), start=0)


class ColumnSums(TopK):
    """Sums the squares of each column of a weight, and finds the columns of the largest sums.

        s_j = sum over i of saliency_ij^2

    A float64 holds the square of a float32 exactly, and rows are added one after another. So every
    kernel and every tile gives the same bits. All columns of a weight cost the same, so the largest
    sums are the most saliency for a cost.
    """

    def __init__(
        self, width: int, *, stretch: int, payloads: Sequence[npt.DTypeLike], empty: Room = fresh
    ) -> None:
        """Make room for one stretch, all of which is taken.

        Args:
            width: columns of the weight.
            stretch: most entries of one `push`: whole rows.
            payloads: dtypes of what comes with each entry: its word, then each further measure.
            empty: where the buffers come from.
        """
        super().__init__(stretch, length=stretch, stretch=stretch, payloads=payloads, empty=empty)
        self.sums = np.zeros((max(1, len(payloads)), width))  # of saliency, then further measures
        self._has_marks = np.zeros(width, np.bool_)
        self._squares = empty("squares", (SUMMED_ROWS + 1, width), np.float64)

    def mark(self, at: Array, measures: Sequence[Array], own: Own | None = None) -> None:
        """Have the columns of some entries of the next stretch chosen before all others."""
        self._has_marks[at % self._has_marks.size] = True

    def push(self, saliency: Array, payloads: Sequence[Array], *, start: int) -> None:
        """Add the next stretch of the stream: whole rows."""
        for total, values in zip(self.sums, (saliency, *payloads[1:]), strict=True):
            rows = values.reshape(-1, total.size)
            for first in range(0, len(rows), SUMMED_ROWS):
                some = rows[first : first + SUMMED_ROWS]
                squares = self._squares[: len(some) + 1]
                squares[0] = total  # the rows before these are added first
                np.square(some, out=squares[1:], dtype=np.float64)
                np.add.reduce(squares, axis=0, out=total)

    def took(self, count: int) -> None:
        """Add what was put into the room, and let the next stretch have it."""
        self.push(self._saliency[:count], [one[:count] for one in self._payloads], start=0)

    def largest(self, count: int) -> Array:
        """Give the columns of the largest sums: (count,) int64 ascending; ties to the lower one."""
        return largest_columns(np.where(self._has_marks, np.inf, self.sums[0]), count)


def largest_columns(sums: Array, count: int) -> npt.NDArray[np.int64]:
    """Give the columns of the largest sums: (count,) ascending; ties go to the lower one."""
    return np.sort(np.argsort(-sums, kind="stable")[:count]).astype(np.int64)


def guess_bar(sample: Array, share: float) -> float | None:
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


def _energy(values: Array) -> float:
    return float(np.square(values, dtype=np.float64).sum())
