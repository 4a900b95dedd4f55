"""Seconds that a calibration takes on this machine, before any pass of the model.

    of each batch     one pass, with its backward pass but for curvature gram, and its sums, which
                      are read, added to and written
    of text to write  as many passes as a sequence has tokens; where inputs alone are measured,
                      these are all
    at the end        sums are read and statistics are made twice, since a header holds digests
    block by block    one pass more where there is a backward pass, and sums are in no file

It needs no torch where the speeds are known. See `model/cost.py` for what each takes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from ortho_cli.calibrate import memory
from ortho_cli.decompose.settings import Calibrate
from ortho_cli.model import cost
from ortho_cli.model.cost import Part, Passes, Work
from ortho_cli.storage.checkpoint import Checkpoint, TensorInfo
from ortho_cli.storage.speeds import Speeds

if TYPE_CHECKING:
    from ortho_cli.calibrate.plan import CalibrationPlan

SQUARED = 3  # float32 per weight and sequence: a gradient is made, squared and added
MEANS = 16  # float32 per weight at the end: means, casts and digests, twice
HOOKS = 2.0  # calls of hooks beside each Linear, which add to sums in files


class Text(NamedTuple):
    """How much text there is of a set."""

    sequences: int
    tokens: int
    is_unwritten: bool = False


def of_plan(plan: CalibrationPlan, checkpoint: Checkpoint, speeds: Speeds) -> list[Part]:
    """Estimate `ortho calibrate`."""
    start = cost.start_seconds(speeds)
    texts: dict[str, Text] = {
        name: Text(
            len(data.sequences),
            sum(len(sequence.tokens) for sequence in data.sequences),
            data.is_unwritten and data.written_by == "model",
        )
        for name, data in plan.sets.items()
    }
    blocks = plan.by_block
    parts = of_texts(plan.settings, plan.tensors, texts, checkpoint, speeds, by_block=blocks)
    return [Part("start", start, start), *parts]


def of_own_text(
    settings: Calibrate, tensors: Sequence[TensorInfo], checkpoint: Checkpoint, speeds: Speeds
) -> list[Part]:
    """Estimate what `own_text.measure` does."""
    by_block = memory.goes_by_block(checkpoint)  # it reads random tokens then
    text = Text(settings.samples, settings.samples * settings.length, not by_block)
    texts = {"retain": text}
    return of_texts(settings, tensors, texts, checkpoint, speeds, by_block=by_block)


def of_texts(
    settings: Calibrate,
    tensors: Sequence[TensorInfo],
    texts: Mapping[str, Text],
    checkpoint: Checkpoint,
    speeds: Speeds,
    *,
    by_block: bool,
) -> list[Part]:
    """Estimate what is done with text, from the model's digest to the written statistics."""
    everything, half = cost.matrices_of(checkpoint.tensors), _half(settings)
    nbytes = sum(tensor.nbytes for tensor in checkpoint.tensors)
    weights = sum(tensor.numel for tensor in checkpoint.tensors)
    reads_again = by_block and settings.curvature != "gram"
    seconds = {
        "load": cost.load_seconds(speeds, weights, (2 + reads_again) * nbytes),
        "write text": 0.0,
        "measure": 0.0,
        "write": _end(settings, tensors, len(texts), speeds),
    }
    for name, text in texts.items():
        # Inputs alone are measured while the model writes.
        while_writing = text.is_unwritten and settings.curvature == "gram"
        if text.is_unwritten:
            written = cost.writing(
                count=text.sequences,
                length=text.tokens // text.sequences,
                vocabulary=_vocabulary(checkpoint),
            )
            seconds["write text"] += cost.seconds_of(written, everything, speeds, half=half)
            if while_writing:
                hooks = Work(calls=HOOKS * sum(passes.times for passes in written.passes))
                seconds["measure"] += cost.seconds_of(hooks, everything, speeds)
        if not while_writing:
            measured = _measuring(settings, tensors, text, gradient=name == "forget")
            if by_block:
                measured = replace(measured, file_bytes=0)
            if reads_again:
                first = measured.passes[0]._replace(backward=False)
                measured = replace(measured, passes=[*measured.passes, first])
            if settings.curvature == "true-fisher":  # labels are drawn from the model
                measured = replace(measured, draws=text.tokens * _vocabulary(checkpoint))
            seconds["measure"] += cost.seconds_of(measured, everything, speeds, half=half)
            if settings.gram == "full" and name != "forget":
                grams, squares = _grams(settings, tensors, text)
                seconds["measure"] += cost.seconds_of(grams, squares, speeds)
    return [Part(name, one, one) for name, one in seconds.items() if one]


def _half(settings: Calibrate) -> bool:
    if settings.autocast != "auto":
        return settings.autocast
    from ortho_cli.model import load as models

    return models.uses_bfloat16("auto", models.resolve_device("auto"))


def _vocabulary(checkpoint: Checkpoint) -> int:
    told = (checkpoint.config or {}).get("vocab_size")
    return told if isinstance(told, int) else max(one.shape[0] for one in checkpoint.tensors)


def _measuring(
    settings: Calibrate, tensors: Sequence[TensorInfo], text: Text, *, gradient: bool
) -> Work:
    """Passes over a set, and its sums: of gradients squared, or of inputs squared."""
    batches = -(-text.sequences // settings.batch)
    backward = settings.curvature != "gram"
    sums = sum(one.numel if backward else one.shape[1] for one in tensors) * (1 + gradient)
    return Work(
        passes=[Passes(batches, text.tokens / batches, backward)],
        elements=(batches + SQUARED * text.sequences * backward) * sums,
        file_bytes=4 * batches * sums,
        calls=HOOKS * batches,
    )


def _grams(
    settings: Calibrate, tensors: Sequence[TensorInfo], text: Text
) -> tuple[Work, Counter[tuple[int, int]]]:
    """Give the products of inputs with themselves, and their shapes."""
    batches = -(-text.sequences // settings.batch)
    squares = Counter((one.shape[1], one.shape[1]) for one in tensors)
    sums = sum(one.shape[1] ** 2 for one in tensors)
    passes = [Passes(batches, text.tokens / batches)]
    return Work(passes=passes, elements=batches * sums, file_bytes=4 * batches * sums), squares


def _end(settings: Calibrate, tensors: Sequence[TensorInfo], sets: int, speeds: Speeds) -> float:
    sums = sum(one.shape[1] if settings.curvature == "gram" else one.numel for one in tensors)
    if settings.gram == "full":
        sums += sum(one.shape[1] ** 2 for one in tensors)
    sums *= sets
    return cost.seconds_of(Work(elements=MEANS * sums, file_bytes=8 * sums), {}, speeds)
