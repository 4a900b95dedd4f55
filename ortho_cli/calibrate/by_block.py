"""Calibration of a model that is larger than memory: block after block, each read from disk once.

All sequences pass through one block before the next one is read. Sums of a block stay in memory,
and what they give is written to its place in the file at once: bytes are written once. Kind gram
alone: it needs no backward pass. Sums are added up in the order of `job`, so figures are the same.

A killed run resumes after its last finished block. Hidden states of the newest block for which they
were kept (see `model.hidden_states`) pass again through those in between, unmeasured.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from ortho_cli.calibrate import memory, stored
from ortho_cli.calibrate.batches import padded
from ortho_cli.calibrate.plan import CalibrationPlan
from ortho_cli.calibrate.stored import Calibration
from ortho_cli.decompose.plan import NO_DIGEST
from ortho_cli.errors import ResourceError
from ortho_cli.events import At, EventSink, Finishing, Noted, Step
from ortho_cli.formats.statistics import Measured
from ortho_cli.model import hooks
from ortho_cli.model import load as models
from ortho_cli.model.blocks import Options
from ortho_cli.model.hidden_states import HiddenStates
from ortho_cli.model.self_written import random_tokens
from ortho_cli.model.walk import Walk
from ortho_cli.split.quantize import as_bytes
from ortho_cli.storage import job
from ortho_cli.storage.checkpoint import Checkpoint, check_in_place
from ortho_cli.storage.data_file import DataFile, Layout, TensorStream
from ortho_cli.storage.job import Target
from ortho_cli.storage.work_folder import WorkFolder

log = logging.getLogger(__name__)

MODE = 0o644  # of the file: a forget set is never measured this way
LOGITS = 1 << 23  # logits at once, of which there are three copies: 96 MiB in float32
ACTIVATIONS = 6  # tensors as wide as the widest Linear that a block holds at once, about


def open_walk(plan: CalibrationPlan, checkpoint: Checkpoint, device: torch.device) -> Walk:
    """Find the blocks of a model, and refuse one that cannot be walked, before anything is read.

    Raises:
        CheckpointError: transformers cannot build it, or tensors do not fit.
        CalibrationError: it has no blocks, or a weight is in none.
        RecipeError: sequences are longer than the model's positions.
    """
    dtype = None if plan.settings.autocast else torch.float32  # as in memory
    walk = Walk(checkpoint, [one.name for one in plan.tensors], dtype=dtype, device=device)
    tokens = [sequence.tokens for sequence in plan.sets["retain"].sequences]
    models.check_fits(walk.model, length=max(map(len, tokens)), largest_token=max(map(max, tokens)))
    return walk


def calibrate_by_block(
    plan: CalibrationPlan,
    checkpoint: Checkpoint,
    target: Target,
    walk: Walk,
    *,
    device: torch.device,
    source: str,
    digests: Mapping[str, str],
    on_event: EventSink,
) -> Calibration:
    """Carry a plan out block by block.

    Memory: torch and transformers, one block in float32, its sums, activations of one batch, and
    hidden states of all sequences, which are in a file where they do not fit.

    Args:
        plan: of kind gram, without a forget set.
        checkpoint: the model.
        target: the file to make.
        walk: the model's blocks, by `open_walk`; it is closed here.
        device: where a block goes.
        source: digest of the model.
        digests: of its tensors.
        on_event: told of progress.
    Raises:
        ResourceError: one block does not fit into memory.
        NumericalError: an input is NaN or infinite.
        OutputExistsError: half-done work of another plan is beside the output.
        Interrupted: Ctrl-C; finished blocks are kept.
    """
    plan = _with_text(plan, walk)
    shapes = {
        tensor.name: Measured(
            shape=list(tensor.shape), source_blake3=digests[tensor.name], mean=stored.WIDEST
        )
        for tensor in plan.tensors
    }
    content = {spec.key: NO_DIGEST for tensor in plan.tensors for spec in plan.specs(tensor)}
    layout = stored.lay_out(plan, stored.metadata(plan, device, source, shapes, content))
    identity = stored.identity(plan, device, source, {target.path.name: layout.size})
    identity[memory.BY_BLOCK] = True
    with (
        contextlib.closing(walk),
        job.open_job(
            target, identity=identity, total=len(walk), what="blocks", on_event=on_event
        ) as work,
    ):
        one = _Job(plan, checkpoint, target, walk, device, work, layout, digests, on_event)
        return one.run(source)


def _with_text(plan: CalibrationPlan, walk: Walk) -> CalibrationPlan:
    """Draw the random tokens of a plan without data."""
    retain = plan.sets["retain"]
    if not retain.is_unwritten:
        return plan
    count, length = len(retain.sequences), len(retain.sequences[0].tokens)
    tokens = random_tokens(walk.vocabulary, count=count, length=length, seed=retain.seed or 0)
    return dataclasses.replace(plan, sets={**plan.sets, "retain": retain.written(tokens)})


class _Job:
    def __init__(
        self,
        plan: CalibrationPlan,
        checkpoint: Checkpoint,
        target: Target,
        walk: Walk,
        device: torch.device,
        work: WorkFolder,
        layout: Layout,
        digests: Mapping[str, str],
        on_event: EventSink,
    ) -> None:
        self._plan, self._checkpoint, self._target, self._walk = plan, checkpoint, target, walk
        self._device, self._work, self._digests, self._on_event = device, work, digests, on_event
        self._file = DataFile(work, work.out.name, layout, mode=MODE)
        self._tensors = {tensor.name: tensor for tensor in plan.tensors}
        size, sequences = plan.settings.batch, plan.sets["retain"].sequences
        starts = range(0, len(sequences), size)
        self._batches = [padded(sequences[start : start + size]) for start in starts]
        self._arguments: list[list[Options]] = []
        self._limit = memory.available_memory() if plan.memory is None else plan.memory

    def run(self, source: str) -> Calibration:
        """Pass all batches through block after block, and write what each gives."""
        walk, finished = self._walk, 0
        while f"block {finished}" in self._work.done:
            finished += 1
        with torch.no_grad(), self._arithmetic():
            states, begun = self._enter(finished)
            with contextlib.closing(states):
                for number in range(begun, len(walk)):
                    self._pass(number, states, measures=number >= finished)
                log.info("wrote %d bytes of hidden states", states.bytes_written)
                nll = self._nll(states)
        self._on_event(Finishing(step="write"))
        return self._finish(source, nll)

    def _arithmetic(self) -> torch.autocast:
        enabled = bool(self._plan.settings.autocast)
        return torch.autocast(self._device.type, torch.bfloat16, enabled=enabled)

    def _enter(self, finished: int) -> tuple[HiddenStates, int]:
        """Give the states before a block that is not finished, or before one further up."""
        self._walk.read_only(torch.cat([batch.tokens.reshape(-1) for batch in self._batches]))
        self._on_event(Step(name="embeds", number=1, of=len(self._batches), unit="batches"))
        states = self._open_states(self._embed(0))
        begun = states.resume(finished)
        for number in range(len(self._batches)):
            hidden = self._embed(number)
            if not begun:
                states.put(number, hidden)
        self._walk.release()
        if not begun:
            states.finish(0)
        return states, begun

    def _embed(self, number: int) -> Tensor:
        """Give what a batch is before the first block, and keep its arguments of all blocks."""
        batch = self._batches[number]
        mask = None if bool(batch.there.all()) else batch.there.long().to(self._device)
        hidden, arguments = self._walk.enter(batch.tokens.to(self._device), mask)
        self._arguments[number:] = [arguments]
        return hidden

    def _open_states(self, hidden: Tensor) -> HiddenStates:
        """Decide where hidden states of all batches go, and refuse where a block does not fit."""
        walk, width = self._walk, hidden.shape[-1]
        tokens = sum(batch.tokens.numel() for batch in self._batches)
        taken = tokens * width * hidden.element_size()
        sums = max(map(self._sum_bytes, range(len(walk))))
        widest = max(max(tensor.shape) for tensor in self._plan.tensors)
        active = 4 * ACTIVATIONS * widest * max(one.tokens.numel() for one in self._batches)
        held = max(walk.block_bytes + sums + active, walk.entry_bytes)
        needed, limit = memory.WALK_BYTES + held, self._limit
        if limit is not None and needed > limit:
            raise ResourceError(
                f"`{self._checkpoint.path}` takes {needed / 1e6:,.0f} MB of memory block by block, "
                f"and there are {limit / 1e6:,.0f} MB",
                hint="lower calibrate.batch, or give --max-memory more",
            )
        in_memory = limit is None or needed + taken <= limit
        if not in_memory:
            self._target.check_space(
                self._file.layout.size + 2 * taken, of="statistics with hidden states"
            )
        self._on_event(
            Noted(
                message=f"measured block by block from disk: the largest of {len(walk)} blocks "
                f"takes {walk.block_bytes / 1e6:,.0f} MB and its sums {sums / 1e6:,.0f} MB; hidden "
                f"states, {taken / 1e6:,.0f} MB, are in {'memory' if in_memory else 'a file'}"
            )
        )
        shapes = [torch.Size((*batch.tokens.shape, width)) for batch in self._batches]
        return HiddenStates(self._work.private, shapes, hidden.dtype, in_memory=in_memory)

    def _sum_bytes(self, number: int) -> int:
        shapes = [
            self._plan.sum_shape(self._tensors[name], part)
            for name in self._walk.linears[number]
            for part in self._plan.parts("retain")
        ]
        return sum(4 * rows * columns for rows, columns in shapes)

    def _pass(self, number: int, states: HiddenStates, *, measures: bool) -> None:
        """Pass all batches through a block; where it `measures`, write what they give."""
        walk, name = self._walk, "measures" if measures else "passes again"
        self._on_event(Step(name=name, number=number + 1, of=len(walk), unit="blocks"))
        sums: dict[tuple[str, hooks.Part], Tensor] = {}
        linears = walk.linears[number] if measures else {}
        capture = hooks.Capture(
            linears, self._adder(sums, linears), kind="gram", gram=self._plan.settings.gram
        )
        with walk.held(number), capture:
            for index, batch in enumerate(self._batches):
                counted = batch.counted.to(self._device)
                capture.begin(len(batch.tokens), counted, counted)
                hidden = states.get(index).to(self._device)
                states.put(index, walk.call(number, hidden, self._arguments[index][number]))
        if measures:
            self._write(number, sums)
        states.finish(number + 1, is_last=number + 1 == len(walk))

    def _adder(
        self, sums: dict[tuple[str, hooks.Part], Tensor], linears: Mapping[str, object]
    ) -> hooks.AddSum:
        """Add tiles to sums, which begin at 0."""
        for name in linears:
            for part in self._plan.parts("retain"):
                sums[name, part] = torch.zeros(self._plan.sum_shape(self._tensors[name], part))

        def add(weight: str, part: hooks.Part, row: int, tile: Tensor) -> None:
            self._on_event(At(name=weight))
            sums[weight, part][row : row + len(tile)].add_(tile.cpu())

        return add

    def _write(self, number: int, sums: dict[tuple[str, hooks.Part], Tensor]) -> None:
        """Write means of a block to their places, and count the block as finished."""
        check_in_place(self._checkpoint)
        plan, count = self._plan, self._plan.sets["retain"].counted
        entries: dict[str, object] = {}
        content: dict[str, str] = {}
        for (name, part), mean in sums.items():
            tensor = self._tensors[name]
            stored.divide(mean, count)
            if part == "curvature":
                told = stored.describe(plan.settings, tensor, mean, self._digests[name])
                entries[name] = told.model_dump()
            for key, values in stored.of_mean(plan.settings, tensor, "retain", part, mean):
                stream = TensorStream(self._file, key)
                stream.write(as_bytes(values))
                content[key] = stream.finish()
        line: dict[str, object] = {"name": f"block {number}"}
        line |= {"entries": entries, "content": content}
        self._work.commit([line])

    def _nll(self, states: HiddenStates) -> float | None:
        """Sum the NLL of the data; None where they are random, or the head does not fit."""
        if self._plan.sets["retain"].written_by is not None:
            return None
        needed = memory.WALK_BYTES + self._walk.tail_bytes + 12 * LOGITS + states.in_memory_bytes
        if self._limit is not None and needed > self._limit:
            told = f"the head and hidden states take {needed / 1e6:,.0f} MB of memory"
            self._on_event(Noted(message=f"perplexity is not measured: {told}"))
            return None
        total, most = 0.0, max(1, LOGITS // self._walk.vocabulary)
        self._on_event(Finishing(step="score the data"))
        for index, batch in enumerate(self._batches):
            rows = states.get(index)[batch.counted].to(self._device)
            labels = batch.tokens.roll(-1, 1)[batch.counted].to(self._device)
            for start in range(0, len(rows), most):
                # As sequences of one token: what follows the blocks knows no other position.
                logits = self._walk.logits(rows[start : start + most].unsqueeze(1))[:, 0]
                scores = logits.float().log_softmax(-1)
                chosen = scores.gather(1, labels[start : start + most].unsqueeze(1))
                total -= float(chosen.double().sum())
        return total

    def _finish(self, source: str, nll: float | None) -> Calibration:
        """Write the header, of what the journal tells of each block."""
        entries: dict[str, Measured] = {}
        content: dict[str, str] = {}
        for number in range(len(self._walk)):
            line = self._work.done[f"block {number}"]
            told, digests = line["entries"], line["content"]
            if isinstance(told, dict) and isinstance(digests, dict):
                entries |= {name: Measured.model_validate(one) for name, one in told.items()}
                content |= digests
        metadata = stored.metadata(self._plan, self._device, source, entries, content)
        layout = stored.lay_out(self._plan, metadata)
        self._file.write_header(layout.header)
        known = {} if nll is None else stored.perplexity(self._plan, {"retain": nll})
        return Calibration(nbytes=layout.size, metadata=metadata, perplexity=known)
