"""The job of `ortho calibrate`: pass text through a model, and write curvature statistics.

    curvature of a weight = mean over sequences of (dNLL/dw)^2        (kind fisher; see formats)

Sums are in files, not in memory: one float32 per weight and set, and a second file of the same size
(see `sums`). A killed run resumes after its last finished chunk of sequences, and ends in the same
bytes. Where no text is given, the model writes it first, once: a resumed run reads it from a file.
Inputs alone (kind gram) are measured while the model writes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from blake3 import blake3
from torch import Tensor, nn

from ortho_cli.calibrate import stored
from ortho_cli.calibrate.batches import logit_gradients, padded
from ortho_cli.calibrate.by_block import calibrate_by_block, open_walk
from ortho_cli.calibrate.plan import CalibrationPlan, DataSet, Set
from ortho_cli.calibrate.stored import Calibration
from ortho_cli.calibrate.sums import Sums
from ortho_cli.decompose.refusals import refuse_quantized
from ortho_cli.events import (
    At,
    EventSink,
    Finishing,
    Measuring,
    Noted,
    SequencesDone,
    null_sink,
)
from ortho_cli.formats import artifact, statistics
from ortho_cli.model import hooks
from ortho_cli.model import load as models
from ortho_cli.model.experts import see_all
from ortho_cli.model.self_written import keeps_cache, random_text, write_text
from ortho_cli.model.text import TokenSequence
from ortho_cli.split.quantize import as_bytes
from ortho_cli.storage import job
from ortho_cli.storage.checkpoint import Checkpoint, ShardReader, TensorInfo, check_in_place
from ortho_cli.storage.data_file import DataFile, TensorStream
from ortho_cli.storage.job import Kind, Target, files_of
from ortho_cli.storage.parts import Parts, open_parts
from ortho_cli.storage.work_folder import WorkFolder

log = logging.getLogger(__name__)

# Seconds from one sync of the sums to the next: a kill costs at most this and one pass. Sums are
# added up in the same order wherever a chunk of sequences ends, so the file does not depend on it.
CHUNK_SECONDS = 30.0
TEXT_FILE = "text.parts"  # in private/ of the work folder: the text that was made

KIND = Kind(name="statistics file", is_ours=statistics.is_statistics, is_file=True)


def check_target(
    checkpoint: Checkpoint, out: Path, *, force: bool = False, reads: Iterable[Path] = ()
) -> Target:
    """Refuse a quantized model, and an output that would lose something, before data are read.

    Args:
        checkpoint: the model.
        out: the file to make.
        force: replace statistics at `out`, and discard half-done work of another plan.
        reads: files that are read beside the model's.
    Raises:
        CheckpointError: the model is an artifact, an adapter or quantized.
        OutputExistsError: something is at `out`.
        UsageError: `out` is a file that is read, or in the model's folder.
    """
    refuse_quantized(checkpoint)
    return job.check_target(out, KIND, [*files_of(checkpoint), *reads], force=force)


def calibrate(
    plan: CalibrationPlan,
    checkpoint: Checkpoint,
    target: Target,
    *,
    device: str = "auto",
    on_event: EventSink = null_sink,
) -> Calibration:
    """Carry a plan out: load the model, pass the data through it, write the statistics.

    Memory: the model, the activations of one batch, and 16 MB tiles of one layer's sums; while the
    file is written, what it holds of one weight. For a plan that goes block by block, see
    `by_block`.

    Args:
        plan: made from `checkpoint`.
        checkpoint: a transformers folder.
        target: the file to make, as `check_target` passed it; appears only when complete.
        device: auto, cpu, cuda or cuda:N.
        on_event: told of progress.
    Returns:
        What was measured.
    Raises:
        CalibrationError: a weight that no token reached, or that is no Linear of the model.
        NumericalError: a gradient is NaN or infinite, or a logit of text that is written.
        OutputExistsError: half-done work of another plan is beside the output.
        Interrupted: Ctrl-C; finished chunks are kept.
    """
    chosen = models.resolve_device(device)
    plan = _settled(plan, chosen)
    # No digest of the plan: it depends on the forget set, and short secrets can be found by trial.
    log.info(
        "measures %d weights on %s: curvature %s, gram %s, storage %s, %d threads of torch",
        len(plan.tensors),
        chosen,
        plan.settings.curvature,
        plan.settings.gram,
        plan.settings.storage,
        torch.get_num_threads(),
    )
    for note in checkpoint.notes:
        on_event(Noted(message=note))
    walk = open_walk(plan, checkpoint, chosen) if plan.by_block else None
    source, digests = _digested(checkpoint, on_event)
    if walk is None:
        return _in_memory(plan, checkpoint, target, chosen, source, digests, on_event)
    return calibrate_by_block(
        plan,
        checkpoint,
        target,
        walk,
        device=chosen,
        source=source,
        digests=digests,
        on_event=on_event,
    )


def _digested(checkpoint: Checkpoint, on_event: EventSink) -> tuple[str, dict[str, str]]:
    """Take the digest of a model, and that of each tensor."""
    on_event(Finishing(step="digest the model"))
    with contextlib.closing(ShardReader(checkpoint.shards)) as reader:
        digests = {tensor.name: reader.digest(tensor) for tensor in checkpoint.tensors}
        reader.check_unchanged()
    return artifact.source_digest(
        (tensor.name, tensor.dtype, tensor.shape, digests[tensor.name])
        for tensor in checkpoint.tensors
    ), digests


def _in_memory(
    plan: CalibrationPlan,
    checkpoint: Checkpoint,
    target: Target,
    device: torch.device,
    source: str,
    digests: dict[str, str],
    on_event: EventSink,
) -> Calibration:
    sizes = {f"{name}.{i}": plan.sums(name).size for name in plan.sets for i in range(2)}
    identity = stored.identity(plan, device, source, sizes)
    total = sum(len(data.sequences) for data in plan.sets.values())
    with job.open_job(
        target, identity=identity, total=total, what="sequences", on_event=on_event
    ) as work:
        return _Job(plan, checkpoint, work, device, on_event).run(source, digests)


def _settled(plan: CalibrationPlan, device: torch.device) -> CalibrationPlan:
    """Decide about bfloat16, as the file shall say."""
    half = models.uses_bfloat16(plan.settings.autocast, device)
    return dataclasses.replace(plan, settings=plan.settings.model_copy(update={"autocast": half}))


class _Job:
    def __init__(
        self,
        plan: CalibrationPlan,
        checkpoint: Checkpoint,
        work: WorkFolder,
        device: torch.device,
        on_event: EventSink,
    ) -> None:
        self._plan, self._checkpoint, self._work = plan, checkpoint, work
        self._device, self._on_event = device, on_event
        self._model: nn.Module | None = None
        self._sums: dict[Set, Sums] = {}
        self._nll: dict[Set, float] = {}
        self._routed: Counter[str] = Counter()  # tokens to each expert, of the chunk that is made
        # Statistics of private data are for their owner alone.
        self._mode = 0o600 if "forget" in plan.sets else 0o644

    def run(self, source: str, digests: dict[str, str]) -> Calibration:
        """Measure what no earlier run has measured, and write the file."""
        work, resumed = self._work, 0
        for name in self._plan.sets:
            layout = self._plan.sums(name)
            files = [DataFile(work, f"{name}.{turn}", layout, mode=self._mode) for turn in range(2)]
            chunks = len(self._finished(name)[0])
            self._sums[name] = Sums((files[0], files[1]), layout, chunks=chunks)
        if self._plan.sets["retain"].is_unwritten:
            sets = dict(self._plan.sets)
            sets["retain"] = self._written(sets["retain"])
            self._plan = dataclasses.replace(self._plan, sets=sets)
        begun: dict[Set, int] = {}
        for name in self._plan.sets:
            nlls, begun[name] = self._finished(name)
            if None not in nlls:
                self._nll[name] = math.fsum(nll for nll in nlls if nll is not None)
            resumed += begun[name]
        if resumed < sum(len(data.sequences) for data in self._plan.sets.values()):
            self._measure(begun)
        self._on_event(Finishing(step="write"))
        return self._write(source, digests)

    def _finished(self, name: Set) -> tuple[list[float | None], int]:
        """Give the NLL of each finished chunk, and how many sequences they had in all.

        A chunk is named by its set and its first sequence; the next one begins where it ends. A
        chunk that was measured while the model wrote it has no NLL.
        """
        nlls: list[float | None] = []
        start = 0
        while line := self._work.done.get(f"{name} {start}"):
            nll, count = line.get("nll"), line.get("sequences")
            if not (isinstance(nll, float | None) and isinstance(count, int) and count > 0):
                break
            nlls.append(nll)
            start += count
        return nlls, start

    def _written(self, blank: DataSet) -> DataSet:
        """Make the text of a set, or take that of an earlier run.

        Inputs are measured meanwhile where nothing else is asked for and no token passes through
        the model twice. They go with a run that is killed, so that such text is then written from
        its beginning.
        """
        plan, done, file = self._plan, self._work.done, self._work.private / TEXT_FILE
        measures = plan.measures_while_writing and not done and keeps_cache(self._loaded())
        if measures:
            file.unlink(missing_ok=True)
        parts = open_parts(file, on_event=self._on_event)
        try:
            tokens = parts.once(
                "tokens",
                lambda: self._made(blank, None if measures else parts),
                write=Tensor.tolist,
                read=torch.tensor,
            )
        finally:
            parts.save()
        if measures:
            self._finish_chunk("retain", 0, len(tokens), None)
        return blank.written(tokens)

    def _made(self, blank: DataSet, parts: Parts | None) -> Tensor:
        """Let the model write; without `parts` to keep, inputs are measured meanwhile.

        The model never reads the last token of a sequence, and its position does not count, either.
        """
        model, count, length = self._loaded(), len(blank.sequences), len(blank.sequences[0].tokens)
        seed = blank.seed or 0
        if blank.written_by == "random":
            return random_text(model, count=count, length=length, seed=seed)
        tokenizer = models.load_tokenizer(self._checkpoint.folder)
        with contextlib.ExitStack() as hooked, self._arithmetic():
            if parts is None:
                hooked.enter_context(self._capture("retain", model))
            return write_text(
                model,
                tokenizer,
                count=count,
                length=length,
                seed=seed,
                parts=parts,
                on_event=self._on_event,
            )

    def _arithmetic(self) -> torch.autocast:
        enabled = bool(self._plan.settings.autocast)
        return torch.autocast(self._device.type, torch.bfloat16, enabled=enabled)

    def _loaded(self) -> nn.Module:
        """Load the model, once, and check that it can read the sequences."""
        if self._model is None:
            # Without autocast all is float32; with it, weights keep their dtype.
            dtype = None if self._plan.settings.autocast else torch.float32
            model = models.load_model(self._checkpoint.folder, dtype=dtype, device=self._device)
            everything = [s for data in self._plan.sets.values() for s in data.sequences]
            models.check_fits(
                model,
                length=max(len(sequence.tokens) for sequence in everything),
                largest_token=max(max(sequence.tokens) for sequence in everything),
            )
            if self._plan.settings.experts == "all":
                models.find_linears(model, [tensor.name for tensor in self._plan.tensors])
                see_all(model)
            self._model = model
        return self._model

    def _measure(self, begun: Mapping[Set, int]) -> None:
        """Measure each set from its first sequence on that no earlier run has measured."""
        model = self._loaded()
        total = sum(len(data.sequences) for data in self._plan.sets.values())
        self._on_event(Measuring(sequences=total, resumed=sum(begun.values())))
        for name, start in begun.items():
            with self._capture(name, model) as capture:
                while start < len(self._plan.sets[name].sequences):
                    start += self._measure_chunk(name, start, model, capture)

    def _capture(self, name: Set, model: nn.Module) -> hooks.Capture:
        """Make the hooks that add to the sums of a set."""
        linears = models.find_linears(model, [tensor.name for tensor in self._plan.tensors])
        capture = self._plan.capture(name, linears, self._adder(name))
        self._routed = capture.routed
        return capture

    def _adder(self, name: Set) -> hooks.AddSum:
        """Add to the sums of a set, and tell which weight they are of."""
        sums, last = self._sums[name], ""

        def add(weight: str, part: hooks.Part, row: int, tile: Tensor) -> None:
            nonlocal last
            if weight != last:
                last = weight
                self._on_event(At(name=weight))
            sums.add(weight, part, row, tile)

        return add

    def _measure_chunk(
        self, name: Set, start: int, model: nn.Module, capture: hooks.Capture
    ) -> int:
        """Measure sequences until it is time to sync their sums; return how many."""
        nll, sequences = 0.0, self._plan.sets[name].sequences
        began, next_one = time.monotonic(), start
        while next_one == start or (
            next_one < len(sequences) and time.monotonic() - began < CHUNK_SECONDS
        ):
            batch = sequences[next_one : next_one + self._plan.settings.batch]
            nll += self._pass(batch, next_one, model, capture)
            next_one += len(batch)
            tokens = sum(len(sequence.tokens) for sequence in batch)
            self._on_event(SequencesDone(sequences=len(batch), tokens=tokens))
        self._nll[name] += nll
        self._finish_chunk(name, start, next_one - start, nll)
        return next_one - start

    def _finish_chunk(self, name: Set, start: int, sequences: int, nll: float | None) -> None:
        # transformers reads the files by name, after they were digested: no gradient of a model of
        # other bytes may count.
        check_in_place(self._checkpoint)
        self._sums[name].finish_chunk()
        line: dict[str, object] = {"name": f"{name} {start}", "nll": nll, "sequences": sequences}
        if name == "retain" and self._routed:
            line["routed"] = dict(self._routed)
        self._routed.clear()
        self._work.commit([line])

    def _pass(
        self, batch: Sequence[TokenSequence], first: int, model: nn.Module, capture: hooks.Capture
    ) -> float:
        """Pass one batch through the model and back; return its NLL."""
        settings = self._plan.settings
        here = padded(batch).to(self._device)
        gram = settings.curvature == "gram"
        capture.begin(len(batch), here.counted if gram else here.there, here.counted)
        options = {} if bool(here.there.all()) else {"attention_mask": here.there.long()}
        with torch.set_grad_enabled(not gram), self._arithmetic():
            logits = model(input_ids=here.tokens, use_cache=False, **options).logits
        nll = 0.0
        gradient = torch.zeros(0) if gram else torch.empty_like(logits)
        for i, (found, lost) in enumerate(logit_gradients(settings, logits, here, first)):
            nll += lost
            if not gram:
                gradient[i] = found
        if not gram:
            logits.backward(gradient)
        return nll

    def _write(self, source: str, digests: dict[str, str]) -> Calibration:
        """Write the file; its header holds digests, so each weight is made twice."""
        plan, routed = self._plan, self._tokens_routed()
        lender = stored.Lender(
            (tensor.name for tensor in plan.tensors),
            routed,
            plan.least_tokens,
            lambda name, part: self._mean(by_name[name], "retain", part),
        )
        by_name = {tensor.name: tensor for tensor in plan.tensors}
        entries: dict[str, statistics.Measured] = {}
        content: dict[str, str] = {}
        for tensor, name, part, mean in self._means(lender):
            if (name, part) == ("retain", "curvature"):
                entries[tensor.name] = stored.describe(
                    plan.settings,
                    tensor,
                    mean,
                    digests[tensor.name],
                    tokens=routed.get(tensor.name),
                    lent=tensor.name in lender.borrowed,
                )
            for key, values in stored.of_mean(plan.settings, tensor, name, part, mean):
                content[key] = blake3(as_bytes(values)).hexdigest()
        stored.note_lent(entries, plan.least_tokens, self._on_event)
        metadata = stored.metadata(plan, self._device, source, entries, content)
        layout = stored.lay_out(plan, metadata)
        file = DataFile(self._work, self._work.out.name, layout, mode=self._mode)
        file.write_header(layout.header)
        for made in self._means(lender):
            for key, values in stored.of_mean(plan.settings, *made):
                stream = TensorStream(file, key)
                stream.write(as_bytes(values))
                stream.finish()
        perplexity = stored.perplexity(plan, self._nll)
        return Calibration(nbytes=layout.size, metadata=metadata, perplexity=perplexity)

    def _tokens_routed(self) -> Counter[str]:
        """Sum the tokens that were routed to each expert's weight over all chunks."""
        total: Counter[str] = Counter()
        for line in self._work.done.values():
            if isinstance(routed := line.get("routed"), dict):
                total.update(routed)
        return total

    def _means(self, lender: stored.Lender) -> Iterator[tuple[TensorInfo, Set, hooks.Part, Tensor]]:
        """Yield each sum over a set, divided by what it was summed over, in float32."""
        for tensor, name in itertools.product(self._plan.tensors, self._sums):
            for part in self._plan.parts(name):
                mean = self._mean(tensor, name, part)
                if name == "retain":
                    mean = lender.settle(tensor.name, part, mean)
                yield tensor, name, part, mean

    def _mean(self, tensor: TensorInfo, name: Set, part: hooks.Part) -> Tensor:
        mean = torch.empty(self._plan.sum_shape(tensor, part))
        key = f"{tensor.name}/{part}"
        self._sums[name].current.read_into(key, as_bytes(mean), start=0)
        stored.to_mean(mean, self._plan.summed_over(name, part), part)
        return mean
