"""One weight from its first tile to its last: read, quantize, select, write.

`split_tensor` is the one loop over tiles. `split_weight` calls it as often as a task takes: with a
guessed bar and, where that was too high, without; with scales and positions that take turns; and
once more to round with compensation.
"""

from __future__ import annotations

import logging
from collections import deque
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ortho_cli.errors import InternalError
from ortho_cli.split.faults import fault_of
from ortho_cli.split.select import ColumnSums, Histogram, TopK, guess_bar
from ortho_cli.split.sizes import Part
from ortho_cli.split.task import (
    CURVATURE_NOISE,
    DELTA,
    NOISE,
    SIGNAL,
    Array,
    CurvatureTile,
    Figures,
    Inputs,
    Sink,
    SplitTask,
    Tile,
    TileKernel,
)

log = logging.getLogger(__name__)

# How often at most scales and positions take turns; a third turn was measured to gain 0.1 %.
ROUNDS = 2

# Places of a weight from which the selection's first bar is guessed.
SAMPLE_BLOCKS = 16


class Given(NamedTuple):
    """What is known before a pass begins."""

    positions: Array  # what ortho holds, ascending: flat indices, or whole columns
    scales: Array  # (out, groups) words; searched ones are to beat these
    stays: bool  # ortho keeps these positions in this pass
    factor: Any = None  # round with compensation, on these scales
    codes: Array | None = None  # (out, in) int8: take these codes, on these scales


class Outcome(NamedTuple):
    """What was made of a weight; arrays are valid until the next one is split."""

    indices: Array  # what ortho keeps, ascending: (k,) flat, or where columns are whole, those
    values: Array  # (k,) words in the order of flat indices
    figures: Figures
    scales: Array | None = None  # (out, groups) words, where they were to be kept


class Work(NamedTuple):
    """One weight, what splits it, and where base goes."""

    task: SplitTask
    inputs: Inputs
    kernel: TileKernel
    sink: Sink | None = None

    @property
    def measures(self) -> list[int]:
        """The sums that each weight adds to, first that by which positions are chosen."""
        _, curvature, reference = self.inputs
        return self.task.measures(curvature=curvature is not None, reference=reference is not None)

    @property
    def payloads(self) -> list[npt.DTypeLike]:
        """What the selection carries along: words, and what further measures there are."""
        return [self.task.word, *(np.float32 for _ in self.measures[1:])]


def split_tensor(
    work: Work, select: TopK, given: Given | None = None, scales: Array | None = None
) -> Array:
    """Walk over all tiles of a weight once.

    Args:
        work: whose inputs are read once, in order.
        select: gets the weights that may be kept.
        given: what an earlier pass found.
        scales: (out, groups) words: gets base's scales, where they are to be kept.
    Returns:
        (4,) float64: SIGNAL, NOISE, CURVATURE_NOISE and DELTA, added up.
    Raises:
        NumericalError: a weight is not finite, or a number overflows.
        OrthoError: what the curvature's `check` raises.
    """
    task, inputs, kernel, sink = work
    sums = np.zeros(4)
    waiting: deque[tuple[Tile, Any]] = deque()

    def finish() -> None:
        tile, pending = waiting.popleft()
        result = kernel.finish(task, pending, select, sums)
        if not (result.sound and np.isfinite(sums).all()):
            raise fault_of(task, inputs.curvature, tile, result)
        if scales is not None:
            scales[tile.row : tile.row + len(result.scales)] = result.scales
        if sink is not None:
            sink(result, tile.row)

    for row, count in kernel.sizes.tiles(_part(kernel, given), task.shape):
        tile = _read_tile(work, row, count, given)
        waiting.append((tile, kernel.begin(task, tile)))
        if len(waiting) == kernel.depth:
            finish()
    while waiting:
        finish()
    return sums


def _part(kernel: TileKernel, given: Given | None) -> Part:
    """Say which of the sizes a pass has; rounding with compensation has larger tiles."""
    return "gptq" if given is not None and given.factor is not None else kernel.part


def _read_tile(work: Work, row: int, count: int, given: Given | None) -> Tile:
    task, inputs, kernel, _ = work
    room, shape = kernel.room(), (count, task.shape[1])
    raw = room("raw", shape, task.word)
    inputs.rows.read(raw, row)
    tile = Tile(row, raw)
    if inputs.curvature is not None:
        tile = tile._replace(curvature=inputs.curvature.read(row, count, room))
    if inputs.reference is not None:
        reference = room("reference", shape, task.word)
        inputs.reference.read(reference, row)
        tile = tile._replace(reference=reference)
    if task.edit is not None:
        edit = task.edit.within(tile.start, tile.start + raw.size)
        tile = tile._replace(edit=edit, forced=edit[0])
    if given is not None:
        held, forced = room("held", shape, np.bool_), tile.forced
        held[...] = False
        if task.columns is not None:
            held[:, given.positions] = True
        else:
            here = slice(*np.searchsorted(given.positions, (tile.start, tile.start + raw.size)))
            places = given.positions[here] - tile.start
            held.reshape(-1)[places] = True
            forced = places if given.stays else forced
        tile = tile._replace(
            held=held,
            scales=given.scales[row : row + count],
            forced=forced,
            codes=None if given.codes is None else given.codes[row : row + count],
            factor=given.factor,
        )
    return tile


def split_weight(work: Work, given: Given | None = None) -> Outcome:
    """Split one weight: quantize it, and keep the k weights, or the columns, that lose most.

    Searched scales need not serve what ortho holds. So a weight is split again, with scales for
    the others alone, which are never worse for those; and where positions are chosen by what scales
    are searched for, they are chosen anew, which is never worse either, until they stay.

    Args:
        work: the weight.
        given: codes, scales and positions to write, instead of finding any.
    Raises:
        NumericalError: a weight is not finite, or a number overflows.
    """
    found = _turn(work) if given is None else _select(work, given)
    if work.task.columns is None:
        return found
    return found._replace(values=_read_columns(work, found.indices))


def _turn(work: Work) -> Outcome:
    """Let scales and positions take turns, and compensate last."""
    task = work.task
    found = _select(work, bar=_guess_bar(work))
    for _ in range(_turns(work)):
        given = _given(found, stays=not task.alike)
        found = _select(work, given)
        if np.array_equal(found.indices, given.positions):
            break
    if task.factor is not None:
        columns = None if task.columns is None else found.indices
        found = _select(work, _given(found, stays=True)._replace(factor=task.factor(columns)))
    return found


def survey(work: Work) -> Array:
    """Count a weight's saliencies by the upper half of their float32: (BINS,) int64."""
    task, _, kernel, _ = work
    select = Histogram(
        stretch=kernel.sizes.rows(kernel.part, task.shape) * task.shape[1],
        payloads=work.payloads,
        empty=kernel.held,
    )
    split_tensor(work, select)
    return select.counts


def survey_columns(work: Work) -> npt.NDArray[np.float64]:
    """Sum the squared saliency of each column of a weight: (in,)."""
    summed, _ = _sum_columns(work, None, None)
    found: npt.NDArray[np.float64] = summed.sums[0]
    return found


def rounds(task: SplitTask) -> int:
    """Say how often scales and positions may take turns; where base must serve alone, never."""
    if task.alone or task.scale == "absmax" or not 0 < task.k < task.numel:
        return 0
    return ROUNDS if task.alike else 1


def _turns(work: Work) -> int:
    return 0 if work.inputs.reference is not None else rounds(work.task)


def _given(found: Outcome, *, stays: bool) -> Given:
    if found.scales is None:
        raise InternalError("a pass was to begin with the scales of one that kept none")
    return Given(found.indices.copy(), found.scales, stays)


def _select(work: Work, given: Given | None = None, *, bar: float | None = None) -> Outcome:
    """Split in one pass; where fewer than k weights exceed `bar`, in another one without it."""
    task, kernel = work.task, work.kernel
    scales: Array | None = None
    if _turns(work) or task.factor is not None:  # another pass may begin with them
        scales = np.empty((task.shape[0], task.shape[1] // task.group_size), task.word)

    if task.columns is not None:
        summed, sums = _sum_columns(work, given, scales)
        stays = given is not None and given.stays
        columns = task.fixed
        if columns is None:
            columns = given.positions if given and stays else summed.largest(task.columns)
        kept = dict(zip(work.measures, summed.sums[:, columns].sum(axis=1).tolist(), strict=True))
        figures = _figures(task, sums, kept, exact=True)
        return Outcome(columns, np.empty(0, task.word), figures, scales)
    select = TopK(
        task.k,
        length=task.numel,
        stretch=kernel.sizes.rows(_part(kernel, given), task.shape) * task.shape[1],
        payloads=work.payloads,
        bar=bar,
        empty=kernel.held,
    )
    sums = split_tensor(work, select, given, scales)
    if select.short:
        if bar is None:
            raise InternalError(
                f"a pass over all of `{task.name}` found fewer weights to keep than {task.k}"
            )
        log.debug("%s: the guessed bar was too high, so its tiles are read again", task.name)
        return _select(work, given)
    indices, energies, values = select.taken()
    kept = dict(zip(work.measures, energies, strict=True))
    return Outcome(indices, values, _figures(task, sums, kept, select.exact), scales)


def _sum_columns(work: Work, given: Given | None, scales: Array | None) -> tuple[ColumnSums, Array]:
    """Split in one pass, and sum what each column loses by it."""
    task, kernel = work.task, work.kernel
    select = ColumnSums(
        task.shape[1],
        stretch=kernel.sizes.rows(_part(kernel, given), task.shape) * task.shape[1],
        payloads=work.payloads,
        empty=kernel.held,
    )
    return select, split_tensor(work, select, given, scales)


def _read_columns(work: Work, columns: Array) -> Array:
    """Read the weights of whole columns, row by row: (rows * columns,) words."""
    task, inputs, kernel, _ = work
    values = np.empty((task.shape[0], columns.size), task.word)
    if columns.size:
        for row, count in kernel.sizes.tiles(kernel.part, task.shape):
            raw = kernel.room()("raw", (count, task.shape[1]), task.word)
            inputs.rows.peek(raw, row)
            np.take(raw, columns, axis=1, out=values[row : row + count], mode="clip")
    return values.reshape(-1)


def _figures(task: SplitTask, sums: Array, kept: dict[int, float], exact: bool) -> Figures:
    """Say what rounding costs, and what of that ortho takes away."""
    # Everything kept is exact; a difference of sums would not come out as 0.
    whole = task.k == task.numel and exact
    total = {measure: float(sums[measure]) for measure in kept}
    part = {m: total[m] if whole else min(energy, total[m]) for m, energy in kept.items()}
    return Figures(
        signal=float(sums[SIGNAL]),
        noise=total[NOISE],
        noise_kept=part[NOISE],
        curvature_noise=total.get(CURVATURE_NOISE),
        curvature_noise_kept=part.get(CURVATURE_NOISE),
        delta=total.get(DELTA),
        delta_kept=part.get(DELTA),
    )


def _guess_bar(work: Work) -> float | None:
    """Guess from rows all over the weight what saliency the k-th largest will exceed.

    A guess only saves the selection from holding what it would drop again; it is worth its reading
    where the weight has many tiles.
    """
    task, inputs, kernel, _ = work
    rows, columns = task.shape
    count = max(1, kernel.sizes.bar_sample // (SAMPLE_BLOCKS * columns))
    few = rows < 16 * SAMPLE_BLOCKS * count
    if task.k == 0 or task.columns is not None or inputs.reference is not None or few:
        return None
    starts = [i * rows // SAMPLE_BLOCKS for i in range(SAMPLE_BLOCKS)]
    room = kernel.room()
    raw = room("raw", (SAMPLE_BLOCKS * count, columns), task.word)
    for i, start in enumerate(starts):
        inputs.rows.peek(raw[i * count : (i + 1) * count], start)
    curvature = CurvatureTile()
    if inputs.curvature is not None:
        curvature = inputs.curvature.peek(starts, count, room)
    every = TopK(
        raw.size, length=raw.size, stretch=raw.size, payloads=work.payloads, empty=kernel.held
    )
    pending = kernel.begin(task, Tile(0, raw, curvature))
    if not kernel.finish(task, pending, every, np.zeros(4)).sound:
        return None  # the pass over all of it says what is wrong, and where
    return guess_bar(every.finish()[1], task.k / task.numel)
