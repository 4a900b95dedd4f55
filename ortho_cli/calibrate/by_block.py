"""Calibration of a model that is larger than memory: block after block, each read from disk.

    gram     h_k = block_k(h_(k-1));  block k is measured on the way
    fisher   the same, and every h_k is kept;  then from the last block to the first
             dNLL/dh_(k-1) = (d block_k / d h_(k-1))^T dNLL/dh_k;  block k is measured there

All sequences pass through one block before the next one is read. Sums of a block stay in memory,
and what they give is written to its place in the file at once: bytes are written once. Sums are
added up in the order of `job`, so figures are the same. For kind gram each block is read once, for
the others twice: a block is computed again where its gradient is wanted.

A killed run resumes after its last finished block. Hidden states, or gradients, of the newest block
for which they were kept (see `model.hidden_states`) pass again through those in between,
unmeasured.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ortho_cli.calibrate import memory, stored
from ortho_cli.calibrate.batches import Batch, logit_gradients, padded
from ortho_cli.calibrate.plan import CalibrationPlan, Set
from ortho_cli.calibrate.stored import Calibration
from ortho_cli.decompose.plan import NO_DIGEST
from ortho_cli.errors import CalibrationError, InternalError, ResourceError
from ortho_cli.events import At, EventSink, Finishing, Noted, Step
from ortho_cli.formats.statistics import Measured
from ortho_cli.model import hooks
from ortho_cli.model import load as models
from ortho_cli.model.blocks import Options
from ortho_cli.model.experts import see_all
from ortho_cli.model.hidden_states import HiddenStates
from ortho_cli.model.on_disk import IN_MEMORY
from ortho_cli.model.self_written import random_tokens
from ortho_cli.model.sweep import Sweep
from ortho_cli.model.walk import Walk
from ortho_cli.split.quantize import as_bytes
from ortho_cli.storage import job
from ortho_cli.storage.checkpoint import Checkpoint, check_in_place
from ortho_cli.storage.data_file import DataFile, Layout, TensorStream
from ortho_cli.storage.job import Target
from ortho_cli.storage.work_folder import WorkFolder

log = logging.getLogger(__name__)

LOGITS = 1 << 23  # logits at once, of which there are three copies: 96 MiB in float32
ACTIVATIONS = 6  # tensors as wide as the widest Linear that a block holds at once, about
KEPT = 12  # the same where a backward pass needs them
INPUTS, GRADIENTS = "hidden", "gradients"  # names of files of hidden states, and of gradients


def open_walk(plan: CalibrationPlan, checkpoint: Checkpoint, device: torch.device) -> Walk:
    """Find the blocks of a model, and refuse one that cannot be walked, before anything is read.

    Raises:
        CheckpointError: transformers cannot build it, or tensors do not fit.
        CalibrationError: it has no blocks, or a weight is in none.
        RecipeError: sequences are longer than the model's positions.
    """
    dtype = None if plan.settings.autocast else torch.float32  # as in memory
    walk = Walk(checkpoint, [one.name for one in plan.tensors], dtype=dtype, device=device)
    if walk.left:
        raise CalibrationError(
            f"`{walk.left[0]}` is in no block of {type(walk.model).__name__}, and the model is "
            "measured block by block",
            hint=f"add it to `ignore`; or {IN_MEMORY}",
        )
    tokens = [one.tokens for data in plan.sets.values() for one in data.sequences]
    models.check_fits(walk.model, length=max(map(len, tokens)), largest_token=max(map(max, tokens)))
    if plan.settings.experts == "all":
        see_all(walk.model)
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
    hidden states of all sequences, which are in a file where they do not fit. Kind fisher has
    hidden states before each block, and logits of a sequence with the model's head.

    Args:
        plan: any.
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
        kind = _Forward if plan.settings.curvature == "gram" else _Backward
        one = kind(plan, checkpoint, target, walk, device, work, layout, digests, on_event)
        return one.run(source)


def _with_text(plan: CalibrationPlan, walk: Walk) -> CalibrationPlan:
    """Draw the random tokens of a plan without data."""
    retain = plan.sets["retain"]
    if not retain.is_unwritten:
        return plan
    count, length = len(retain.sequences), len(retain.sequences[0].tokens)
    tokens = random_tokens(walk.vocabulary, count=count, length=length, seed=retain.seed or 0)
    return dataclasses.replace(plan, sets={**plan.sets, "retain": retain.written(tokens)})


class _Passed(NamedTuple):
    """A batch of a set, and the number of its first sequence there."""

    of: Set
    first: int
    batch: Batch


class _Job:
    """What both ways share: batches, hidden states, sums of a block, and the file."""

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
        # Statistics of private data are for their owner alone.
        mode = 0o600 if "forget" in plan.sets else 0o644
        self._file = DataFile(work, work.out.name, layout, mode=mode)
        self._tensors = {tensor.name: tensor for tensor in plan.tensors}
        size = plan.settings.batch
        self._batches = [
            _Passed(name, start, padded(data.sequences[start : start + size]))
            for name, data in plan.sets.items()
            for start in range(0, len(data.sequences), size)
        ]
        self._arguments: list[list[Options]] = []
        self._limit = memory.available_memory() if plan.memory is None else plan.memory

    def run(self, source: str) -> Calibration:
        """Pass all batches through block after block, and write what each gives."""
        with torch.no_grad():
            nll = self._measure()
        self._on_event(Finishing(step="write"))
        return self._finish(source, nll)

    def _measure(self) -> Mapping[Set, float]:
        """Measure each block that no earlier run has; give the NLL of each set, if it is known."""
        raise NotImplementedError

    def _finished(self, order: Sequence[int]) -> int:
        """Count the blocks that an earlier run has finished, in the order in which they are."""
        blocks = (f"block {number}" in self._work.done for number in order)
        return sum(itertools.takewhile(bool, blocks))

    def _arithmetic(self) -> torch.autocast:
        enabled = bool(self._plan.settings.autocast)
        return torch.autocast(self._device.type, torch.bfloat16, enabled=enabled)

    def _embed_all(self) -> Iterator[tuple[int, Tensor]]:
        """Yield what each batch is before the first block; keep its arguments of all blocks."""
        self._walk.read_only(torch.cat([one.batch.tokens.reshape(-1) for one in self._batches]))
        self._on_event(Step(name="embeds", number=1, of=len(self._batches), unit="batches"))
        for number, (_, _, batch) in enumerate(self._batches):
            mask = None if bool(batch.there.all()) else batch.there.long().to(self._device)
            with self._arithmetic():
                hidden, arguments = self._walk.enter(batch.tokens.to(self._device), mask)
            self._arguments.append(arguments)
            yield number, hidden
        self._walk.release()

    def _call(self, number: int, index: int, hidden: Tensor) -> Tensor:
        """Pass a batch through a block that is held."""
        with self._arithmetic():
            return self._walk.call(number, hidden, self._arguments[index][number])

    def _fits(self, hidden: Tensor, *, states: int, active: int, tail: int = 0) -> bool:
        """Decide whether hidden states of all batches are in memory, not in files.

        Args:
            hidden: of one batch.
            states: how many of each batch there are.
            active: tensors as wide as the widest Linear that a block holds at once.
            tail: bytes that what follows the blocks takes.
        Raises:
            ResourceError: one block does not fit into memory.
        """
        walk, width = self._walk, hidden.shape[-1]
        tokens = sum(one.batch.tokens.numel() for one in self._batches)
        taken = states * tokens * width * hidden.element_size()
        sums = max(map(self._sum_bytes, range(len(walk))))
        widest = max(max(tensor.shape) for tensor in self._plan.tensors)
        live = 4 * active * widest * max(one.batch.tokens.numel() for one in self._batches)
        held = max(walk.block_bytes + sums + live, walk.entry_bytes, tail)
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
        return in_memory

    def _states(self, hidden: Tensor, name: str, *, in_memory: bool) -> HiddenStates:
        """Open states of all batches; `hidden` is one of a batch."""
        shapes = [torch.Size((*one.batch.tokens.shape, hidden.shape[-1])) for one in self._batches]
        folder = self._work.private
        return HiddenStates(folder, shapes, hidden.dtype, name=name, in_memory=in_memory)

    def _sum_bytes(self, number: int) -> int:
        """Count the bytes of the sums of a block, and of the largest of them as it is written."""
        shapes = [shape for _, shape in self._sum_shapes(self._walk.linears[number])]
        sizes = [rows * columns for rows, columns in shapes]
        return 4 * sum(sizes) + 2 * max(sizes, default=0)

    def _sum_shapes(
        self, names: Iterable[str]
    ) -> Iterator[tuple[tuple[str, Set, hooks.Part], tuple[int, int]]]:
        """Yield the key and the shape of each sum of some weights."""
        for name, of in itertools.product(names, self._plan.sets):
            for part in self._plan.parts(of):
                yield (name, of, part), self._plan.sum_shape(self._tensors[name], part)

    def _write(
        self,
        number: int,
        sums: Mapping[tuple[str, Set, hooks.Part], Tensor],
        routed: Mapping[str, int],
        **more: object,
    ) -> None:
        """Write means of a block to their places, and count the block as finished."""
        check_in_place(self._checkpoint)
        plan = self._plan
        lender = stored.Lender(
            self._walk.linears[number],
            routed,
            plan.least_tokens,
            lambda name, part: sums[name, "retain", part],
        )
        entries: dict[str, object] = {}
        content: dict[str, str] = {}
        for (_, of, part), total in sums.items():
            stored.to_mean(total, plan.summed_over(of, part), part)
        for (name, of, part), own in sums.items():
            tensor = self._tensors[name]
            mean = lender.settle(name, part, own) if of == "retain" else own
            if (of, part) == ("retain", "curvature"):
                told = stored.describe(
                    plan.settings,
                    tensor,
                    mean,
                    self._digests[name],
                    tokens=routed.get(name),
                    lent=name in lender.borrowed,
                )
                entries[name] = told.to_json()
            for key, values in stored.of_mean(plan.settings, tensor, of, part, mean):
                stream = TensorStream(self._file, key)
                stream.write(as_bytes(values))
                content[key] = stream.finish()
        line: dict[str, object] = {"name": f"block {number}", **more}
        line |= {"entries": entries, "content": content}
        self._work.commit([line])

    def _sums(
        self, number: int
    ) -> tuple[dict[tuple[str, Set, hooks.Part], Tensor], dict[Set, hooks.Capture]]:
        """Begin the sums of a block, and make the hooks that add to them."""
        linears = self._walk.linears[number]
        sums = {key: torch.zeros(shape) for key, shape in self._sum_shapes(linears)}

        def add(of: Set, weight: str, part: hooks.Part, row: int, tile: Tensor) -> None:
            self._on_event(At(name=weight))
            sums[weight, of, part][row : row + len(tile)].add_(tile.cpu())

        sets = self._plan.sets
        return sums, {of: self._plan.capture(of, linears, partial(add, of)) for of in sets}

    def _finish(self, source: str, nll: Mapping[Set, float]) -> Calibration:
        """Write the header, of what the journal tells of each block."""
        entries: dict[str, Measured] = {}
        content: dict[str, str] = {}
        for number in range(len(self._walk)):
            line = self._work.done[f"block {number}"]
            told, digests = line["entries"], line["content"]
            if isinstance(told, dict) and isinstance(digests, dict):
                entries |= {name: Measured.model_validate(one) for name, one in told.items()}
                content |= digests
        stored.note_lent(entries, self._plan.least_tokens, self._on_event)
        metadata = stored.metadata(self._plan, self._device, source, entries, content)
        layout = stored.lay_out(self._plan, metadata)
        self._file.write_header(layout.header)
        known = stored.perplexity(self._plan, nll)
        return Calibration(nbytes=layout.size, metadata=metadata, perplexity=known)


class _Forward(_Job):
    """Kind gram: inputs of each Linear, measured on the way through the blocks."""

    def _measure(self) -> Mapping[Set, float]:
        walk = self._walk
        finished = self._finished(range(len(walk)))
        states: HiddenStates | None = None
        begun = 0
        for number, hidden in self._embed_all():
            if states is None:
                in_memory = self._fits(hidden, states=1, active=ACTIVATIONS)
                states = self._states(hidden, INPUTS, in_memory=in_memory)
                begun = states.resume(finished)
            if not begun:
                states.put(number, hidden)
        if states is None:
            raise InternalError("a plan without text")
        with contextlib.closing(states):
            if not begun:
                states.finish(0)
            for number in range(begun, len(walk)):
                self._pass(number, states, measures=number >= finished)
            log.info("wrote %d bytes of hidden states", states.bytes_written)
            return self._nll(states)

    def _pass(self, number: int, states: HiddenStates, *, measures: bool) -> None:
        """Pass all batches through a block; where it `measures`, write what they give."""
        walk, name = self._walk, "measures" if measures else "passes again"
        self._on_event(Step(name=name, number=number + 1, of=len(walk), unit="blocks"))
        sums, captures = self._sums(number)
        capture = captures["retain"]
        with walk.held(number), capture if measures else contextlib.nullcontext():
            for index, (_, _, batch) in enumerate(self._batches):
                counted = batch.counted.to(self._device)
                capture.begin(len(batch.tokens), counted, counted)
                hidden = states.get(index).to(self._device)
                states.put(index, self._call(number, index, hidden))
        if measures:
            self._write(number, sums, capture.routed)
        states.finish(number + 1, is_last=number + 1 == len(walk))

    def _nll(self, states: HiddenStates) -> Mapping[Set, float]:
        """Sum the NLL of the data; nothing where they are random, or the head does not fit."""
        if self._plan.sets["retain"].written_by is not None:
            return {}
        needed = memory.WALK_BYTES + self._walk.tail_bytes + 12 * LOGITS + states.in_memory_bytes
        if self._limit is not None and needed > self._limit:
            told = f"the head and hidden states take {needed / 1e6:,.0f} MB of memory"
            self._on_event(Noted(message=f"perplexity is not measured: {told}"))
            return {}
        total, most = 0.0, max(1, LOGITS // self._walk.vocabulary)
        self._on_event(Finishing(step="score the data"))
        for index, (_, _, batch) in enumerate(self._batches):
            rows = states.get(index)[batch.counted].to(self._device)
            labels = batch.tokens.roll(-1, 1)[batch.counted].to(self._device)
            for start in range(0, len(rows), most):
                # As sequences of one token: what follows the blocks knows no other position.
                with self._arithmetic():
                    logits = self._walk.logits(rows[start : start + most].unsqueeze(1))[:, 0]
                scores = logits.float().log_softmax(-1)
                chosen = scores.gather(1, labels[start : start + most].unsqueeze(1))
                total -= float(chosen.double().sum())
        return {"retain": total}


class _Backward(_Job):
    """Kinds fisher and true-fisher: gradients, measured on the way back from the last block.

    There are states before each block, and after the last one; `passed` counts blocks from there.
    """

    def _measure(self) -> Mapping[Set, float]:
        count = len(self._walk)
        lost: dict[Set, float] = {}
        finished = self._finished(range(count)[::-1])
        if finished < count:
            with contextlib.ExitStack() as files:
                inputs, gradients, known = self._open(files)
                sweep = Sweep(
                    self._walk,
                    inputs,
                    gradients,
                    self._call,
                    batches=len(self._batches),
                    device=self._device,
                )
                done = sweep.up(known, finished, self._on_event)
                if not done:
                    lost = self._go_through_head(inputs[count], gradients)
                for passed in range(done, count):
                    measures = passed >= finished
                    more = {} if passed else {"nll": lost}
                    self._go_back(passed, sweep, gradients, measures, more)
                written = sum(one.bytes_written for one in (*inputs, gradients))
                log.info("wrote %d bytes of hidden states and gradients", written)
        nll = self._work.done[f"block {count - 1}"].get("nll")
        if not isinstance(nll, dict):
            raise InternalError("the journal has no NLL of the last block")
        return nll

    def _open(self, files: contextlib.ExitStack) -> tuple[list[HiddenStates], HiddenStates, int]:
        """Open the states before each block and after the last one, and the gradients.

        Returns:
            these, and how many of the states there are: at least those before the first block.
        """
        count, inputs, known = len(self._walk), list[HiddenStates](), 0
        for number, hidden in self._embed_all():
            if not inputs:
                longest = max(one.batch.tokens.shape[1] for one in self._batches)
                logits = max(LOGITS, longest * self._walk.vocabulary)
                tail = self._walk.tail_bytes + 12 * logits
                in_memory = self._fits(hidden, states=count + 2, active=KEPT, tail=tail)
                names = [*(f"{INPUTS}-{k}" for k in range(count + 1)), GRADIENTS]
                inputs = [self._states(hidden, name, in_memory=in_memory) for name in names]
                for one in inputs:
                    files.enter_context(contextlib.closing(one))
                known = sum(itertools.takewhile(bool, (one.resume(1) for one in inputs[:-1])))
            if not known:
                inputs[0].put(number, hidden)
        if not known:
            inputs[0].finish(1, is_last=True)
        return inputs[:-1], inputs[-1], max(known, 1)

    def _go_through_head(self, outputs: HiddenStates, gradients: HiddenStates) -> dict[Set, float]:
        """Give the gradient of the NLL by what the blocks give, and the NLL of each set."""
        self._on_event(Finishing(step="pass through the head"))
        nll: dict[Set, float] = dict.fromkeys(self._plan.sets, 0.0)
        for index, (of, first, batch) in enumerate(self._batches):
            count, hidden = len(batch.tokens), outputs.get(index)
            together = batch.tokens.numel() * self._walk.vocabulary <= LOGITS
            parts = []
            for start in range(0, count, count if together else 1):
                part = batch.part(start, start + count if together else start + 1)
                states = hidden[start : start + len(part.tokens)]
                found, lost = self._head(states, part.to(self._device), first + start)
                parts.append(found)
                nll[of] += lost
            gradients.put(index, torch.cat(parts))
        gradients.finish(0)
        return nll

    def _head(self, hidden: Tensor, batch: Batch, first: int) -> tuple[Tensor, float]:
        """Differentiate the NLL of some sequences by the last block's output."""
        hidden = hidden.to(self._device).detach().requires_grad_(True)
        with torch.enable_grad(), self._arithmetic():
            logits = self._walk.logits(hidden)
        found = logit_gradients(self._plan.settings, logits, batch, first)
        gradients, nlls = zip(*found, strict=True)
        torch.autograd.backward([logits], [torch.stack(gradients)])
        if hidden.grad is None:
            raise InternalError("no gradient reaches the output of the blocks")
        return hidden.grad, sum(nlls)

    def _go_back(
        self,
        passed: int,
        sweep: Sweep,
        gradients: HiddenStates,
        measures: bool,
        more: Mapping[str, object],
    ) -> None:
        """Pass gradients back through a block; where it `measures`, write what they give."""
        count = len(self._walk)
        number, name = count - 1 - passed, "measures" if measures else "passes again"
        self._on_event(Step(name=name, number=passed + 1, of=count, unit="blocks"))
        sums, captures = self._sums(number)
        with self._walk.held(number):
            for index, (of, _, batch) in enumerate(self._batches):
                capture = captures[of]
                with capture if measures else contextlib.nullcontext():
                    there, counted = (one.to(self._device) for one in batch[1:])
                    capture.begin(len(batch.tokens), there, counted)
                    sweep.down(number, index)
        if measures:
            self._write(number, sums, captures["retain"].routed, **more)
        if number:
            gradients.finish(passed + 1, is_last=False)
