"""The job of `ortho decompose`: split every tensor in worker threads, and write the artifact.

One worker handles all tiles of a tensor, so no byte depends on the number of workers. Meanwhile the
calling thread commits finished tensors to the journal, and hashes base up to its first gap.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Protocol

from ortho_cli.decompose.edits import Edits, Key, Room, check_edits, count, load_edits, save_edits
from ortho_cli.decompose.identity import identity_of
from ortho_cli.decompose.kernels import Kernels
from ortho_cli.decompose.plan import Plan, TensorPlan, check_memory, check_statistics
from ortho_cli.decompose.recheck import Recheck
from ortho_cli.decompose.record import TensorRecord
from ortho_cli.decompose.report import Report, make_config, make_report
from ortho_cli.decompose.survey import load_surveys, save_surveys
from ortho_cli.decompose.workers import Results, Worker, at_work, shape_bytes, shape_key
from ortho_cli.errors import CheckpointError, InternalError, RecipeError
from ortho_cli.events import Event, EventSink, Finishing, Noted, null_sink
from ortho_cli.formats import artifact
from ortho_cli.formats.artifact import (
    BASE_FILE,
    CONFIG_FILE,
    INDEX_FILE,
    ORTHO_FILE,
    REPORT_FILE,
    canonical_json,
    pretty_json,
)
from ortho_cli.formats.quantization_config import index
from ortho_cli.formats.statistics import StatisticsReader
from ortho_cli.formats.verify import file_digest
from ortho_cli.storage import job
from ortho_cli.storage.checkpoint import Checkpoint, ShardReader, check_in_place
from ortho_cli.storage.data_file import DataFile, Frontier, GrowingDigest, Layout, plan_layout
from ortho_cli.storage.job import Kind, Target, files_of
from ortho_cli.storage.sealing import (
    SEALED_FILE,
    Keys,
    OrthoFile,
    Seal,
    SealedFile,
    WorkKey,
    key_of,
    scratch_bytes,
)
from ortho_cli.storage.work_folder import Entry, WorkFolder, interruptible
from ortho_cli.version import __version__

if TYPE_CHECKING:  # to import torch takes longer than to decompose a billion weights
    from ortho_cli.split.quantize import Rounded

log = logging.getLogger(__name__)

SWITCH_SECONDS = 0.0002  # see `_many_small_operations`

EDITS_FILE = "edits.npz"
COMPACT_FILE = "compact"  # scratch: the compact ortho before it is sealed


class Editor(Protocol):
    """Finds the codes of base that must change so that base forgets; see `forget/`."""

    @property
    def identity(self) -> object:
        """Everything that its edits depend on beside plan and source, as JSON."""

    def find(
        self, folder: Path, *, curvature: StatisticsReader, key: Key | None, on_event: EventSink
    ) -> Edits:
        """Find the edits; unfinished work goes to `folder`, sealed with `key` if there is one."""


class Tuner(Protocol):
    """Finds better codes and scales for rounded weights; see `tune`."""

    @property
    def identity(self) -> object:
        """Everything that its result depends on beside plan and source, as JSON."""

    def tune(
        self, start: Callable[[str], Rounded], tuned: Collection[str], *, on_event: EventSink
    ) -> Iterator[dict[str, Rounded]]:
        """Yield tuned weights, a block at a time, by name.

        Args:
            start: gives a weight as base and ortho have it.
            tuned: weights that an earlier run has tuned; a block of these alone is not yielded.
            on_event: gets progress.
        """


KIND = Kind(name="artifact", is_ours=artifact.is_artifact)


def check_target(
    plan: Plan,
    checkpoint: Checkpoint,
    out: Path,
    *,
    force: bool = False,
    seal: Seal | None = None,
    reads: Iterable[Path] = (),
) -> Target:
    """Refuse an output that would lose something, and work that cannot be done as planned.

    Args:
        plan: made from `checkpoint`.
        checkpoint: the source.
        out: the folder to make.
        force: replace an artifact at `out`, and discard half-done work of another plan.
        seal: recipients of ortho, if it is sealed.
        reads: files that are read beside the plan's.
    Raises:
        OutputExistsError: something is at `out`.
        UsageError: `out` is a file that is read, or inside or around one.
        ResourceError: disk or memory is too small.
        CalibrationError: the statistics are of another model.
    """
    sources = [*files_of(checkpoint, *plan.inputs), *reads]
    target = job.check_target(out, KIND, sources, force=force)
    target.check_space(plan.bytes_on_disk + scratch_bytes(plan.ortho, seal))
    check_memory(plan)
    check_statistics(plan, checkpoint)
    return target


def decompose(
    plan: Plan,
    checkpoint: Checkpoint,
    target: Target,
    *,
    editor: Editor | None = None,
    tuner: Tuner | None = None,
    seal: Seal | None = None,
    keys: Keys | None = None,
    compiled: bool = True,
    device: str = "cpu",
    on_event: EventSink = null_sink,
) -> Report:
    """Carry a plan out.

    Args:
        plan: made from `checkpoint`.
        checkpoint: the source.
        target: the folder to make, as `check_target` passed it; appears only when complete.
        editor: finds the edits of a recipe that forgets.
        tuner: tunes the rounding of a recipe that asks for it.
        seal: recipients of ortho; if given, ortho is never on disk unsealed, not even meanwhile.
        keys: open the work of an earlier, unfinished run; so does the passphrase of `seal`.
        compiled: use numba's loops where they do what the plan asks for; the bytes are the same.
        device: cuda or cuda:N splits there what takes one pass, and notes what does not; the bytes
            are the same, again.
        on_event: gets progress, from any thread, one call at a time.
    Returns:
        What report.json says.
    Raises:
        CheckpointError: the source changed or is shorter than its header says.
        CalibrationError: the statistics are of another model, damaged, or no curvature.
        NumericalError: a weight that is to be split is NaN or infinite.
        RecipeError: the recipe forgets and there is no editor, or tunes and there is no tuner.
        OutputExistsError: half-done work of another plan is beside the output.
        ResourceError: the disk is full or closed to us.
        Interrupted: Ctrl-C; finished tensors are kept.
    """
    _check_has_what_it_needs(plan, editor, tuner)
    for note in plan.notes:
        on_event(Noted(message=note))
    plan = _settled(plan, checkpoint, target.path, on_event)
    more = {"forget": editor and editor.identity, "tune": tuner and tuner.identity}
    with (
        _open_inputs(plan, checkpoint) as inputs,
        job.open_job(
            target,
            identity=identity_of(plan, checkpoint, seal, **more),
            total=len(plan.tensors),
            is_sound=_fits(plan),
            on_event=on_event,
        ) as work,
    ):
        save_surveys(work.private, plan.surveys)  # from here on a kill does not cost them
        key = key_of(work, seal, keys, on_event) if seal else None
        edits = _find_edits(plan, editor, work, inputs.curvature, key, on_event)
        kernels = partial(Kernels, plan, compiled=compiled, device=device)
        return _Job(plan, checkpoint, inputs, edits, key, work, kernels, on_event).run(tuner)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Inputs:
    """The open files that a job reads."""

    source: ShardReader
    curvature: StatisticsReader | None
    reference: ShardReader | None

    def check_unchanged(self) -> None:
        """Raise if a file was written to since its header was read."""
        for opened in (self.source, self.curvature, self.reference):
            if opened:
                opened.check_unchanged()


@contextmanager
def _open_inputs(plan: Plan, checkpoint: Checkpoint) -> Iterator[_Inputs]:
    with ExitStack() as stack:
        source = stack.enter_context(closing(ShardReader(checkpoint.shards)))
        curvature = reference = None
        if plan.statistics is not None:
            curvature = stack.enter_context(closing(StatisticsReader(plan.statistics)))
        if plan.reference is not None:
            reference = stack.enter_context(closing(ShardReader(plan.reference.shards)))
        yield _Inputs(source=source, curvature=curvature, reference=reference)


def _fits(plan: Plan) -> Callable[[Entry], bool]:
    """Tell whether a journal line is one that this plan could have written."""
    tensors = {tensor.name: tensor for tensor in plan.tensors}

    def fits(line: Entry) -> bool:
        record, tensor = TensorRecord.from_json(line), tensors.get(str(line["name"]))
        measured = plan.statistics is not None
        return bool(record and tensor and record.fits(tensor, curvature=measured))

    return fits


def _settled(plan: Plan, checkpoint: Checkpoint, out: Path, on_event: EventSink) -> Plan:
    """Choose each tensor's nnz under a global budget; use an earlier run's survey if it fits."""
    if not plan.is_open:
        return plan
    from ortho_cli.decompose.budget import settle

    return settle(plan, checkpoint, known=load_surveys(out), on_event=on_event)


def _check_has_what_it_needs(plan: Plan, editor: Editor | None, tuner: Tuner | None) -> None:
    if plan.recipe.forgets and editor is None:
        raise RecipeError(
            f"ortho.split is {plan.recipe.ortho.split}, and there is no editor",
            hint="give `editor`, as `ortho_cli.forget.editor.open_editor` makes it",
        )
    if plan.recipe.base.rounding == "tuned" and tuner is None:
        raise RecipeError(
            "base.rounding is tuned, and there is no tuner",
            hint="give `tuner`, as `ortho_cli.decompose.tune.open_tuner` makes it",
        )


def _find_edits(
    plan: Plan,
    editor: Editor | None,
    work: WorkFolder,
    curvature: StatisticsReader | None,
    key: WorkKey | None,
    on_event: EventSink,
) -> Edits:
    """Find the edits, or load those that an earlier run found."""
    if editor is None or curvature is None:
        return {}
    path = work.private / EDITS_FILE
    room = {t.name: Room(t.k, t.source.numel, t.bits) for t in plan.split}
    known: Edits | None = load_edits(path, key)
    log.info("moves of codes are %s", "searched" if known is None else "those of an earlier run")
    if known is None:
        work.done.clear()  # a tensor that was split before cannot be relied on without its edits
        found = editor.find(work.private, curvature=curvature, key=key, on_event=on_event)
        check_edits(found, room)
        save_edits(path, found, key)
        return found
    check_edits(known, room)
    return known


@contextmanager
def _many_small_operations() -> Iterator[None]:
    """Let threads switch more often: tiles are many short operations."""
    interval = sys.getswitchinterval()
    # Workers hold the interpreter lock for microseconds; the default wait of 5 ms costs 5 %.
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


@contextmanager
def _one_thread_of_torch() -> Iterator[None]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # parallel over tensors, not inside an operation
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Job:
    def __init__(
        self,
        plan: Plan,
        checkpoint: Checkpoint,
        inputs: _Inputs,
        edits: Edits,
        key: WorkKey | None,
        work: WorkFolder,
        kernels: Callable[..., Kernels],
        on_event: EventSink,
    ) -> None:
        self._plan = plan
        self._key = key
        self._edits = edits
        self._checkpoint = checkpoint
        self._inputs, self._reader = inputs, inputs.source
        self._work = work
        self._on_event = on_event
        self._event_lock = threading.Lock()
        self._kernels = kernels(on_event=self._emit)
        self._stop = threading.Event()
        self._base = DataFile(work, BASE_FILE, plan.base, mode=0o644)
        self._ortho = self._ortho_file(ORTHO_FILE, plan.ortho, scratch=plan.is_compact)
        recipe = plan.recipe
        self._recheck = Recheck(
            inputs.source,
            self._base,
            self._ortho,
            nearest=not recipe.compensates and inputs.reference is None,
            own_code=recipe.ortho.split == "unlearn",
            # Beside what finds codes to move or to tune, reading them back takes no time.
            whole=recipe.forgets or recipe.compensates,
            sizes=plan.sizes,
        )

    def _ortho_file(self, name: str, layout: Layout, *, scratch: bool = False) -> OrthoFile:
        if self._key is not None:
            return SealedFile(self._work, name, layout, self._key)
        # Ortho holds what others must not read.
        return DataFile(self._work, name, layout, mode=0o600, scratch=scratch)

    def run(self, tuner: Tuner | None) -> Report:
        """Split, tune and finish."""
        torch_alone = nullcontext() if self._kernels.compiled else _one_thread_of_torch()
        with _many_small_operations(), torch_alone:
            base_blake3 = self.split()
        if tuner is not None:
            base_blake3 = self.tune(tuner)
        if self._plan.recipe.forgets or tuner is not None:
            check_in_place(self._checkpoint)  # transformers read the model by its files' names
        with _many_small_operations():
            return self.finish(base_blake3)

    def split(self) -> str:
        """Split every tensor that no earlier run has finished; return base's BLAKE3."""
        plan, done, records = self._plan, self._work.done, self._done()
        for tensor in plan.tensors:
            if tensor.name in done and not self._is_intact(tensor, records[tensor.name]):
                del done[tensor.name], records[tensor.name]
        for name in _torn(records):
            del done[name], records[name]
        self._check_surveyed(records.values())
        nbytes = {tensor.name: tensor.source.nbytes for tensor in plan.tensors}
        job.report_start(self._work, nbytes, plan.side.notes, self._emit)
        self._base.write_header(plan.base.header)
        # They are first in the file: hashing it need not wait for their weights.
        for tensor in plan.split:
            self._base.write(shape_key(tensor), shape_bytes(tensor), start=0)
        return self._work_through([t for t in plan.tensors if t.name not in done])

    def tune(self, tuner: Tuner) -> str:
        """Replace codes and scales by tuned ones; return base's BLAKE3.

        The journal lines of a block are written together, after its data, and each holds the size
        of the block. After a kill before them, the old lines do not fit the new bytes; after a kill
        among them, lines of the block are missing. In both cases the next run splits and tunes the
        tensors of that block again.
        """
        from ortho_cli.decompose.readback import ReadBack, given_of

        written = ReadBack(self._plan, self._base, self._ortho)
        tensors = {tensor.name: tensor for tensor in self._plan.split}
        tuned = [name for name, record in self._done().items() if record.tuned]
        self._stop.clear()  # the workers that it stopped have ended
        worker = self._worker()
        with interruptible(self._work, total=len(tensors), done="tuned"):
            for found in tuner.tune(
                lambda name: written.rounded(tensors[name]), tuned, on_event=self._emit
            ):
                block = (min(found), len(found))
                records = []
                for name, rounded in found.items():
                    record = worker.split(tensors[name], given_of(rounded))
                    self._recheck.check(tensors[name], record)
                    records.append(replace(record, tuned=block))
                self._work.commit([record.to_json() for record in records])
        return GrowingDigest(self._base.fd).up_to(self._plan.base.size)

    def _done(self) -> dict[str, TensorRecord]:
        """Give the records of finished tensors."""
        found = ((name, TensorRecord.from_json(line)) for name, line in self._work.done.items())
        return {name: record for name, record in found if record is not None}

    def finish(self, base_blake3: str) -> Report:
        """Check that no input has changed, and write ortho and the files beside it."""
        plan, done = self._plan, self._done()
        self._emit(Finishing(step="digests"))
        self._inputs.check_unchanged()
        records = [done[tensor.name] for tensor in plan.tensors]
        digest = artifact.source_digest(
            (t.name, t.source.dtype, t.source.shape, done[t.name].source_blake3)
            for t in plan.tensors
        )
        told = artifact.ortho_metadata(
            plan_sha256=plan.sha256,
            recipe=canonical_json(plan.recipe.canonical()),
            version=__version__,
            source_digest=digest,
            base_blake3=base_blake3,
        )
        self._check_forgotten()
        ortho, layout = self._ortho, plan.ortho
        if plan.is_compact:
            self._emit(Finishing(step="compact"))
            from ortho_cli.decompose.repack import Repacker

            repacker = Repacker(plan, self._base, self._ortho, self._inputs.curvature)
            # Where ortho is sealed, a scratch file of its name holds the CSR.
            make = partial(self._ortho_file, ORTHO_FILE if self._key is None else COMPACT_FILE)
            with _one_thread_of_torch():
                ortho, layout, records = repacker.run(make, records, told)
        else:
            layout = plan_layout((s for t in plan.tensors for s in t.ortho), told)
            if layout.regions != plan.ortho.regions:
                raise InternalError("ortho's tensors are at other offsets than the plan says")
        if self._key is not None:
            self._emit(Finishing(step="seal"))
        ortho_blake3, sealed_blake3 = ortho.finish(layout)
        self._check_sealed(sealed_blake3)
        self._emit(Finishing(step="sync"))
        report = make_report(
            plan,
            records,
            ortho=layout,
            moved=count(self._edits),
            source_digest=digest,
            base_blake3=base_blake3,
            ortho_blake3=ortho_blake3,
            sealed_blake3=sealed_blake3,
            device=self._kernels.device.partition(":")[0],
            side_files=self._write_side_files(),
        )
        self._work.write_file(REPORT_FILE, pretty_json(report.to_json()))
        return report

    def _check_forgotten(self) -> None:
        """Check that base has the codes of each edit, and ortho the weights at its positions.

        No figure would show a breach: base would still know the secret, or ortho would lack it.
        """
        if not self._edits:
            return
        from ortho_cli.decompose.readback import ReadBack

        written = ReadBack(self._plan, self._base, self._ortho)
        for tensor in self._plan.split:
            if tensor.name in self._edits:
                written.check_moved(tensor, self._edits[tensor.name])

    def _check_sealed(self, sealed_blake3: str | None) -> None:
        """Check that ortho is sealed where it should be, and that no plain ortho is published."""
        if self._key is None:
            return
        here = [path.name for path in self._work.artifact.glob(f"{ORTHO_FILE}*")]
        plain = [name for name in here if not name.startswith(SEALED_FILE)]
        if sealed_blake3 is None or plain:
            raise InternalError(f"ortho was to be sealed, and is not: {plain or here}")

    def _check_surveyed(self, records: Iterable[TensorRecord]) -> None:
        """Check that split weights were surveyed as they are: other files can have equal stamps."""
        for record in records:
            for survey in self._plan.surveys:
                told = survey.digests.get(record.name, record.source_blake3)
                if told != record.source_blake3:
                    raise CheckpointError(
                        f"`{record.name}` has BLAKE3 {record.source_blake3}, and had {told} "
                        "when weights were surveyed for the budget",
                        hint="the source has changed; repeat the command to start again",
                    )

    def _is_intact(self, tensor: TensorPlan, record: TensorRecord) -> bool:
        """Tell whether source and output of a finished tensor still have the journal's digests."""
        # All files of an archive or image have one time, so stamps cannot tell two models apart.
        if self._reader.digest(tensor.source) != record.source_blake3:
            return False
        parts = ((self._base, record.base), (self._ortho, record.ortho))
        return all(out.digest(key) == told for out, part in parts for key, told in part.items())

    def _work_through(self, pending: list[TensorPlan]) -> str:
        """Run the workers on every pending tensor; return base's BLAKE3."""
        owners = {spec.key: t.name for t in self._plan.tensors for spec in t.base}
        shapes = {shape_key(tensor): "" for tensor in self._plan.split}  # they are written
        frontier = Frontier(self._plan.base, owners | shapes, done=[""])
        frontier.finish(self._work.done)
        digest = GrowingDigest(self._base.fd)
        results: Results = SimpleQueue()
        with job.Commits(self._work, self._emit) as commits:
            try:
                if (
                    self._kernels.compiled and pending
                ):  # while copies, which come first, are written
                    threading.Thread(target=self._kernels.load).start()
                with at_work(
                    self._worker, pending, results, workers=self._plan.workers, stop=self._stop
                ):
                    for _ in pending:
                        record = results.get()
                        if isinstance(record, BaseException):
                            raise record
                        self._check_surveyed([record])
                        commits.add(record.to_json())
                        frontier.finish([record.name])
                        digest.up_to(frontier.offset)
            finally:
                while not results.empty():  # tensors that were finished when another one failed
                    result = results.get()
                    if not isinstance(result, BaseException):
                        commits.keep(result.to_json())
        return digest.up_to(self._plan.base.size)

    def _worker(self) -> Worker:
        return Worker(
            self._plan,
            self._reader,
            self._base,
            self._ortho,
            make_kernel=self._kernels.make,
            curvature=self._inputs.curvature,
            reference=self._inputs.reference,
            edits=self._edits,
            check=self._recheck.check,
            stop=self._stop,
            on_event=self._emit,
        )

    def _emit(self, event: Event) -> None:
        with self._event_lock:
            self._on_event(event)

    def _write_side_files(self) -> dict[str, str]:
        """Write config.json, the index and what is copied; return the BLAKE3 of each, by name."""
        plan, config = self._plan, self._checkpoint.config
        size = plan.base.size - len(plan.base.header)
        made = {INDEX_FILE: pretty_json(index(plan.base.regions, total_size=size))}
        if config is not None:
            made[CONFIG_FILE] = pretty_json(make_config(plan, config))
        job.write_side_files(self._work, plan.side, made)
        names = sorted([*made, *(file.name for file in plan.side.copied)])
        return {artifact.spelled(n): file_digest(self._work.artifact / n) for n in names}


def _torn(done: dict[str, TensorRecord]) -> list[str]:
    """Find the tensors of blocks of which some records say that they are tuned, and some do not."""
    blocks: dict[tuple[str, int], list[str]] = {}
    for name, record in done.items():
        if record.tuned is not None:
            blocks.setdefault(record.tuned, []).append(name)
    return [
        name
        for block, names in blocks.items()
        if block != (min(names), len(names))
        for name in names
    ]
