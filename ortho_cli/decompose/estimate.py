"""Seconds that a plan takes on this machine, before it is carried out.

The split is timed on a weight of the plan's own shapes, by the kernel that would split it: scales,
turns and compensation included. What goes through files is counted in bytes, and tuning in passes:

    of each block   2 samples / batch forward, and steps forward and back, twice where it must
                    begin again with smaller rates; of the model, samples / batch forward and back

See `model/cost.py` for what each takes.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from ortho_cli.decompose.kernels import Kernels, one_thread_of_torch
from ortho_cli.decompose.plan import Plan, SplitTensor
from ortho_cli.decompose.workers import task_of
from ortho_cli.events import null_sink
from ortho_cli.model import cost
from ortho_cli.model.cost import Part, Passes, Work
from ortho_cli.split import pipeline
from ortho_cli.split.roundings import rounding_of
from ortho_cli.split.task import (
    Array,
    CurvatureTile,
    Inputs,
    Room,
    SplitTask,
    TileResult,
    Vector,
)
from ortho_cli.storage.checkpoint import TensorInfo
from ortho_cli.storage.speeds import Speeds

SAMPLE = 1 << 19  # weights of the one that is split to time it; a tenth of a second by GPTQ
COLUMNS = 1024  # of it at most; time to factorise a Gram matrix grows with their cube
SHAPES = 4  # of weights that are timed; others take as long per weight
# float32 that a step of tuning reads and writes per weight: latents, codes, scales, values.
STEP_ELEMENTS = 30
# Of a tensor's bytes: read and digested, read again for the check, written.
TOUCHED = 3


def of_plan(plan: Plan, source: Sequence[TensorInfo], speeds: Speeds) -> list[Part]:
    """Estimate the split of a plan, its survey and its tuning; not what forgets or measures.

    Args:
        plan: as it would be carried out.
        source: all tensors of the checkpoint.
        speeds: of this machine.
    """
    kernels = Kernels(plan, on_event=null_sink)
    start = cost.start_seconds(
        speeds,
        torch=not (kernels.compiled and is_plain(plan)),
        transformers=not is_plain(plan),
        numba=kernels.compiled,
    )
    parts = [Part("start", start, start)]
    split = _split_seconds(plan, kernels, speeds)
    if surveys := len(plan.surveys) or plan.is_open:
        plain = surveys * _split_seconds(_nearest(plan), kernels, speeds)
        parts.append(Part("survey", plain, plain))
    if plan.recipe.base.rounding == "tuned":
        least, most = _tune_seconds(plan, source, speeds)
        parts.append(Part("tune", least, most))
    parts.append(Part("split", split, split))
    return parts


def is_plain(plan: Plan) -> bool:
    """Tell whether no model is loaded: weights are split, and that is all."""
    return not (plan.recipe.forgets or plan.recipe.base.rounding == "tuned" or plan.measures)


def _nearest(plan: Plan) -> Plan:
    """Give the plan of the survey, which compensates nothing."""
    base = plan.recipe.base.model_copy(update={"rounding": "nearest"})
    return replace(plan, recipe=plan.recipe.model_copy(update={"base": base}))


def _split_seconds(plan: Plan, kernels: Kernels, speeds: Speeds) -> float:
    """Seconds to split all weights, and to carry all bytes over."""
    weights: Counter[tuple[str, int, str]] = Counter()
    largest: dict[tuple[str, int, str], SplitTensor] = {}
    for tensor in plan.split:
        like = tensor.scale, tensor.shape[1], tensor.source.dtype
        weights[like] += tensor.source.numel
        if like not in largest or tensor.shape[0] > largest[like].shape[0]:
            largest[like] = tensor
    total = covered = 0.0
    for kind, count in weights.most_common(SHAPES):
        total += count * _weight_seconds(plan, largest[kind], kernels, speeds)
        covered += count
    total *= plan.split_weights / max(1.0, covered)
    through_files = TOUCHED * plan.bytes_read + plan.bytes_written
    return total / plan.workers + cost.seconds_of(Work(file_bytes=through_files), {}, speeds)


def _weight_seconds(plan: Plan, tensor: SplitTensor, kernels: Kernels, speeds: Speeds) -> float:
    """Seconds per weight of tensors like this one, by one worker."""
    task = task_of(plan, tensor)
    whole = math.lcm(plan.group_size, 32)  # columns of 3 bits fill words, too
    columns = min(tensor.shape[1], max(1, COLUMNS // whole) * whole)
    rows = max(1, min(tensor.shape[0], SAMPLE // columns))
    kind = plan.statistics.kind if plan.statistics else "gram" if plan.measures else "none"
    compensates = plan.recipe.compensates
    task = replace(task, shape=(rows, columns), factor=None, rounding="nearest")
    density = float(f"{tensor.density:.0e}")  # one digit, so that the timing serves others, too
    task = replace(task, k=round(density * task.numel))
    kernel = "numba" if kernels.compiled else "torch"
    alone = ", alone" if task.alone else ""
    named = (
        f"{task.dtype} to {task.bits} bits by {kernel}, {task.scale}{alone}, {kind}, "
        f"{rows} x {columns}, {density:g} kept"
    )
    if not compensates:
        timed = speeds.of(f"split {named}", lambda: _time_split(task, kind, kernels))
        return timed / task.numel
    factor = speeds.of(f"factor of {columns}", lambda: _time_factor(columns))
    task = replace(task, rounding="gptq", factor=partial(_factor, columns))
    timed = speeds.of(f"gptq {named}", lambda: _time_split(task, kind, kernels))
    rounded = max(0.2 * timed, timed - factor) / task.numel  # the one that is timed factorises, too
    larger = (tensor.shape[1] / columns) ** 3
    return rounded + factor * larger / tensor.source.numel


def _time_split(task: SplitTask, kind: str, kernels: Kernels) -> float:
    """Split a weight of random numbers; once before, where that compiles and makes buffers."""
    draw = np.random.default_rng(0)
    rows = _Rows(_words(draw.standard_normal(task.shape, np.float32), task.dtype))
    near = None if kind == "none" else _Curvature(draw, task.shape, by_row=kind != "gram")
    work = pipeline.Work(task, Inputs(rows, near), kernels.make(), _sink)
    with nullcontext() if kernels.compiled else one_thread_of_torch():
        if task.factor is None:
            pipeline.split_weight(work)
        began = time.perf_counter()
        pipeline.split_weight(work)
        return time.perf_counter() - began


def _time_factor(columns: int) -> float:
    with one_thread_of_torch():
        began = time.perf_counter()
        _factor(columns)
        return time.perf_counter() - began


def _factor(columns: int, without: object = None) -> object:
    """Factorise a Gram matrix of random inputs; columns that are kept whole save little of it."""
    import torch

    inputs = torch.randn(columns + 64, columns, generator=torch.Generator().manual_seed(0))
    return rounding_of("gptq").prepare(inputs.T @ inputs)


def _sink(result: TileResult, row: int) -> None:
    """Drop a tile; what is written is counted in bytes."""


def _words(values: Array, dtype: str) -> Array:
    """Give numbers as the words of a dtype."""
    if dtype == "BF16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(np.float16).view(np.int16) if dtype == "F16" else values.view(np.uint32)


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of a weight that is in memory."""

    words: Array

    def read(self, buffer: Array, row: int) -> None:
        buffer[...] = self.words[row : row + len(buffer)]

    peek = read


class _Curvature:
    """Curvature in memory: of columns alone, or of every weight, as statistics hold them."""

    def __init__(self, draw: np.random.Generator, shape: tuple[int, int], *, by_row: bool) -> None:
        values = draw.chisquare(1, shape[1]).astype(np.float32)
        self._columns = Vector(values, np.sqrt(values))
        whole = np.repeat(values[None], shape[0], 0)
        self._whole = _words(whole, "BF16") if by_row else None

    def read(self, row: int, count: int, room: Room) -> CurvatureTile:
        return self.peek([row], count, room)

    def peek(self, starts: Sequence[int], count: int, room: Room) -> CurvatureTile:
        if self._whole is None:
            return CurvatureTile(columns=self._columns)
        return CurvatureTile(words=np.concatenate([self._whole[i : i + count] for i in starts]))

    def check(self, words: Array, row: int) -> None:
        """Have nothing to find: all of it is positive."""


def _tune_seconds(plan: Plan, source: Sequence[TensorInfo], speeds: Speeds) -> tuple[float, float]:
    """Seconds of tuning, and where every block begins again with smaller rates."""
    settings, everything = plan.recipe.tune, cost.matrices_of(source)
    blocks: Counter[tuple[int, int]] = Counter(tensor.shape for tensor in plan.split)
    batches = settings.samples / settings.batch
    tokens = settings.batch * settings.length
    weighs = Work(passes=[Passes(batches, tokens), Passes(batches, tokens, True)])
    learns = Work(
        passes=[Passes(settings.steps, tokens, True), Passes(batches, tokens)],
        elements=settings.steps * STEP_ELEMENTS * plan.split_weights,
    )
    twice = Work(passes=[Passes(2 * batches, tokens)])
    fixed = cost.seconds_of(weighs, everything, speeds, half=True)
    fixed += cost.seconds_of(twice, blocks, speeds, half=True)
    fixed += cost.load_seconds(speeds, plan.weights, plan.bytes_read)
    once = cost.seconds_of(learns, blocks, speeds, half=True)
    return fixed + once, fixed + 2 * once
