"""The main job: walk every tensor tile by tile, split it, and write the artifact.

A tensor belongs to one worker from its first tile to its last, so its bytes cannot depend on how
many workers there are. While workers compute, the calling thread makes finished tensors durable and
hashes base as far as it is complete.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Protocol

from ortho_cli.decompose.edits import Edits, Key, Room, check_edits, count, load_edits, save_edits
from ortho_cli.decompose.identity import identity_of
from ortho_cli.decompose.kernels import Kernels
from ortho_cli.decompose.plan import Plan, TensorPlan
from ortho_cli.decompose.recheck import Recheck
from ortho_cli.decompose.record import TensorRecord
from ortho_cli.decompose.report import make_config, make_report
from ortho_cli.decompose.survey import load_surveys, save_surveys
from ortho_cli.decompose.workers import Reference, Results, Worker, at_work, shape_bytes, shape_key
from ortho_cli.errors import CheckpointError, InternalError, RecipeError
from ortho_cli.events import EventSink, Finishing, Noted, Started, null_sink
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
from ortho_cli.formats.statistics import StatisticsReader, check_model
from ortho_cli.formats.verify import file_digest
from ortho_cli.storage.checkpoint import Checkpoint, ShardReader, check_in_place
from ortho_cli.storage.data_file import DataFile, Frontier, GrowingDigest, Layout, plan_layout
from ortho_cli.storage.output import check_output, check_space, files_of, resolve_output
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
from ortho_cli.storage.work_folder import WorkFolder, interruptible, unwritable
from ortho_cli.version import __version__

if TYPE_CHECKING:  # to import torch takes longer than to decompose a billion weights
    from ortho_cli.split.quantize import Rounded

# How often finished tensors are made durable: a kill costs at most this much work.
COMMIT_SECONDS = 0.5

SWITCH_SECONDS = 0.0002

EDITS_FILE = "edits.npz"
COMPACT_FILE = "compact"  # ortho in that layout, on its way to being sealed


class Editor(Protocol):
    """Finds the codes of base that have to move so that it forgets."""

    @property
    def identity(self) -> Any:
        """What its edits depend on beside plan and source, as JSON."""

    def find(
        self, folder: Path, *, curvature: StatisticsReader, key: Key | None, on_event: EventSink
    ) -> Edits:
        """Find the edits; unfinished work may be kept in `folder`, sealed with `key` if any."""


class Tuner(Protocol):
    """Finds better codes and scales for what was rounded."""

    @property
    def identity(self) -> Any:
        """What it finds depends on beside plan and source, as JSON."""

    def tune(
        self, start: Callable[[str], Rounded], tuned: Collection[str], *, on_event: EventSink
    ) -> Iterator[dict[str, Rounded]]:
        """Yield weights, some at a time, as they are to be, beginning from what `start` gives.

        What of `tuned` need not be found again is not yielded.
        """


def decompose(
    plan: Plan,
    checkpoint: Checkpoint,
    out: Path,
    *,
    editor: Editor | None = None,
    tuner: Tuner | None = None,
    seal: Seal | None = None,
    keys: Keys | None = None,
    force: bool = False,
    compiled: bool = True,
    device: str = "cpu",
    on_event: EventSink = null_sink,
) -> dict[str, Any]:
    """Carry a plan out.

    Args:
        plan: made from `checkpoint`.
        checkpoint: the source.
        out: the folder to make; appears only when complete.
        editor: for a recipe that forgets.
        tuner: for a recipe that tunes its rounding.
        seal: who ortho is sealed to; nothing of it is on disk otherwise, while it is made or after.
        keys: open what an earlier, unfinished run sealed; the passphrase of `seal` does, too.
        force: replace an artifact at `out`, and discard half-done work of another plan.
        compiled: use numba's loops where it is installed and they do what the plan asks for; the
            bytes of base and ortho are the same without.
        device: cuda or cuda:N splits there what takes one pass, and notes what does not; the bytes
            of base and ortho are the same, again.
        on_event: told of progress, from any thread, one call at a time.
    Returns:
        The report, as written to report.json.
    Raises:
        CheckpointError: the source changed or is shorter than its header says.
        CalibrationError: the statistics are of another model, damaged, or no curvature.
        NumericalError: a weight that is to be split is NaN or infinite.
        RecipeError: the recipe forgets and there is no editor, or tunes and there is no tuner.
        OutputExistsError: something is at `out`, or half-done work of another plan beside it.
        ResourceError: the disk is full or closed to us.
        Interrupted: Ctrl-C; finished tensors are kept.
    """
    _check_has_what_it_needs(plan, editor, tuner)
    out = resolve_output(out)
    sources = files_of(checkpoint, *plan.inputs)
    check_output(out, sources, force=force, is_ours=artifact.is_artifact)
    check_space(plan.bytes_on_disk + scratch_bytes(plan.ortho, seal), out)
    for note in plan.notes:
        on_event(Noted(message=note))
    plan = _settled(plan, checkpoint, out, on_event)
    if plan.statistics is not None:
        check_model(plan.statistics, checkpoint, [tensor.source for tensor in plan.split])
    more = {"forget": editor and editor.identity, "tune": tuner and tuner.identity}
    identity = identity_of(plan, checkpoint, seal, **more)
    tensors = {tensor.name: tensor for tensor in plan.tensors}

    def is_known(line: dict[str, Any]) -> bool:
        record, tensor = TensorRecord.from_json(line), tensors.get(line["name"])
        measured = plan.statistics is not None
        return bool(record and tensor and record.fits(tensor, curvature=measured))

    curvature: StatisticsReader | None = None
    reference: Reference | None = None
    reader = ShardReader(checkpoint)
    try:
        curvature = StatisticsReader(plan.statistics) if plan.statistics else None
        reference = Reference(plan.reference) if plan.reference else None
        with (
            WorkFolder(
                out, identity=identity, force=force, is_sound=is_known, on_event=on_event
            ) as work,
            interruptible(work, total=len(plan.tensors)),
        ):
            save_surveys(work.private, plan.surveys)  # from here on a kill does not cost them
            key = key_of(work, seal, keys, on_event) if seal else None
            edits: Edits = {}
            if editor is not None and curvature is not None:
                edits = _find_edits(plan, editor, work, curvature, key, on_event)
            job = _Job(plan, checkpoint, reader, curvature, reference, edits, key, work, on_event)
            job.kernels = Kernels(plan, compiled=compiled, device=device, on_event=job.emit)
            torch_alone = nullcontext() if job.kernels.compiled else _one_thread_of_torch()
            with _many_small_operations(), torch_alone:
                base_blake3 = job.split()
            if tuner is not None:
                base_blake3 = job.tune(tuner)
            if editor is not None or tuner is not None:
                check_in_place(checkpoint)  # their model was read by its files' names
            with _many_small_operations():
                report = job.finish(base_blake3)
            work.publish(may_replace=lambda there: force and artifact.is_artifact(there))
            return report
    finally:
        for opened in (reader, curvature, reference):
            if opened:
                opened.close()


def _settled(plan: Plan, checkpoint: Checkpoint, out: Path, on_event: EventSink) -> Plan:
    """Fix what a global budget leaves open, by the survey of an earlier run if there is one."""
    if not plan.is_open:
        return plan
    from ortho_cli.decompose.budget import settle

    return settle(plan, checkpoint, known=load_surveys(out), on_event=on_event)


def _check_has_what_it_needs(plan: Plan, editor: Editor | None, tuner: Tuner | None) -> None:
    if plan.recipe.forgets and editor is None:
        raise RecipeError(
            f"ortho.split is {plan.recipe.ortho.split}, and nothing finds what base must not know",
            hint="give `editor`, as `ortho_cli.forget.open_editor` makes it",
        )
    if plan.recipe.base.rounding == "tuned" and tuner is None:
        raise RecipeError(
            "base.rounding is tuned, and nothing tunes it",
            hint="give `tuner`, as `ortho_cli.tune.open_tuner` makes it",
        )


def _find_edits(
    plan: Plan,
    editor: Editor,
    work: WorkFolder,
    curvature: StatisticsReader,
    key: WorkKey | None,
    on_event: EventSink,
) -> Edits:
    """Find the edits, or take up those that an earlier run found."""
    kept = work.private / EDITS_FILE
    room = {t.name: Room(t.k, t.source.numel, t.bits) for t in plan.split}
    edits: Edits | None = load_edits(kept, key)
    if edits is None:
        work.done.clear()  # nothing that was split before can be relied on without its edits
        edits = editor.find(work.private, curvature=curvature, key=key, on_event=on_event)
        check_edits(edits, room)
        save_edits(kept, edits, key)
        return edits
    check_edits(edits, room)
    return edits


@contextmanager
def _many_small_operations() -> Iterator[None]:
    """Set the interpreter up for workers on tiles, and back."""
    interval = sys.getswitchinterval()
    # Workers hold the interpreter for microseconds; waiting the usual 5 ms for it costs 5 %.
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
        reader: ShardReader,
        curvature: StatisticsReader | None,
        reference: Reference | None,
        edits: Edits,
        key: WorkKey | None,
        work: WorkFolder,
        on_event: EventSink,
    ) -> None:
        self._plan = plan
        self._key = key
        self.kernels = Kernels(plan, on_event=on_event)
        self._edits = edits
        self._checkpoint = checkpoint
        self._reader, self._curvature, self._reference = reader, curvature, reference
        self._work = work
        self._on_event = on_event
        self._event_lock = threading.Lock()
        self._stop = threading.Event()
        self._base = DataFile(work, BASE_FILE, plan.base, mode=0o644)
        self._ortho = self._ortho_file(ORTHO_FILE, plan.ortho, scratch=plan.is_compact)
        recipe = plan.recipe
        self._recheck = Recheck(
            reader,
            self._base,
            self._ortho,
            nearest=not recipe.compensates and reference is None,
            own_code=recipe.ortho.split == "unlearn",
            # Beside what finds codes to move or to tune, reading them back takes no time.
            whole=recipe.forgets or recipe.compensates,
            sizes=plan.sizes,
        )

    def _ortho_file(self, name: str, layout: Layout, *, scratch: bool = False) -> OrthoFile:
        if self._key is not None:
            return SealedFile(self._work, name, layout, self._key)
        # What is withheld from others should not be readable by others.
        return DataFile(self._work, name, layout, mode=0o600, scratch=scratch)

    def split(self) -> str:
        """Split every tensor that no earlier run has split; return base's BLAKE3."""
        plan, done = self._plan, self._work.done
        records = self._done()
        for tensor in plan.tensors:
            if tensor.name in done and not self._is_intact(tensor, records[tensor.name]):
                del done[tensor.name]
        for name in _torn(self._done()):
            del done[name]
        self._check_surveyed(self._done().values())
        self.emit(
            Started(
                tensors=len(plan.tensors),
                resumed=len(done),
                bytes_total=plan.bytes_read,
                bytes_done=sum(t.source.nbytes for t in plan.tensors if t.name in done),
            )
        )
        for note in plan.side.notes:
            self.emit(Noted(message=note))
        self._base.write_header(plan.base.header)
        for tensor in plan.split:  # they lie first: who hashes base need not wait for the last one
            self._base.write(shape_key(tensor), shape_bytes(tensor), start=0)
        return self._work_through([t for t in plan.tensors if t.name not in done])

    def tune(self, tuner: Tuner) -> str:
        """Put codes and scales in place of those that splitting found; return base's BLAKE3.

        A block's journal lines are written together, behind its data, and each says how many there
        are. A kill before leaves bytes that the old lines do not fit, one between them lines of a
        part of the block: either way the next run splits those tensors again, and tunes them.
        """
        from ortho_cli.decompose.readback import ReadBack, given_of

        written = ReadBack(self._plan, self._base, self._ortho)
        tensors = {tensor.name: tensor for tensor in self._plan.split}
        tuned = [name for name, record in self._done().items() if record.tuned]
        self._stop.clear()  # no worker is left that it was for
        worker = self._worker()
        with interruptible(self._work, total=len(tensors), done="tuned"):
            for found in tuner.tune(
                lambda name: written.rounded(tensors[name]), tuned, on_event=self.emit
            ):
                block = (min(found), len(found))
                records = []
                for name, rounded in found.items():
                    record = worker.split(tensors[name], given_of(rounded))
                    records.append(replace(record, tuned=block))
                    self._recheck.check(tensors[name], record)
                self._work.commit([record.to_json() for record in records])
        return GrowingDigest(self._base.fd).up_to(self._plan.base.size)

    def _done(self) -> dict[str, TensorRecord]:
        """Give the records of finished tensors."""
        found = ((name, TensorRecord.from_json(line)) for name, line in self._work.done.items())
        return {name: record for name, record in found if record is not None}

    def finish(self, base_blake3: str) -> dict[str, Any]:
        """See that nothing changed meanwhile, and write all but the split tensors."""
        plan, done = self._plan, self._done()
        self.emit(Finishing(step="digests"))
        self._reader.check_unchanged()
        for opened in (self._curvature, self._reference):
            if opened:
                opened.check_unchanged()
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
            self.emit(Finishing(step="compact"))
            from ortho_cli.decompose.repack import Repacker

            repacker = Repacker(plan, self._base, self._ortho, self._curvature)
            # Where it is sealed, the CSR that it is made of is in a scratch file of ortho's name.
            make = partial(self._ortho_file, ORTHO_FILE if self._key is None else COMPACT_FILE)
            with _one_thread_of_torch():
                ortho, layout, records = repacker.run(make, records, told)
        else:
            layout = plan_layout((s for t in plan.tensors for s in t.ortho), told)
            if layout.regions != plan.ortho.regions:  # what was written lies elsewhere
                raise InternalError("ortho's tensors do not lie where the plan says")
        if self._key is not None:
            self.emit(Finishing(step="seal"))
        ortho_blake3, sealed_blake3 = ortho.finish(layout)
        self._check_sealed(sealed_blake3)
        report = make_report(
            plan,
            records,
            ortho=layout,
            moved=count(self._edits),
            source_digest=digest,
            base_blake3=base_blake3,
            ortho_blake3=ortho_blake3,
            sealed_blake3=sealed_blake3,
            device=self.kernels.device.partition(":")[0],
        )
        self.emit(Finishing(step="sync"))
        self._write_side_files(report)
        return report

    def _check_forgotten(self) -> None:
        """Hold what is written against what forgetting moved: base has the codes, ortho the rest.

        Of all promises this is the one whose breach nobody would see: base would still know what
        it was to forget, or ortho would lack what base no longer knows.
        """
        if not self._edits:
            return
        from ortho_cli.decompose.readback import ReadBack

        written = ReadBack(self._plan, self._base, self._ortho)
        for tensor in self._plan.split:
            if tensor.name in self._edits:
                written.check_moved(tensor, self._edits[tensor.name])

    def _check_sealed(self, sealed_blake3: str | None) -> None:
        """See that what was to be sealed is, and that none of it is about to be published plain."""
        if self._key is None:
            return
        here = [path.name for path in self._work.artifact.glob(f"{ORTHO_FILE}*")]
        plain = [name for name in here if not name.startswith(SEALED_FILE)]
        if sealed_blake3 is None or plain:
            raise InternalError(f"ortho was to be sealed, and is not: {plain or here}")

    def _check_surveyed(self, records: Iterable[TensorRecord]) -> None:
        """See that what was split is what was surveyed: times and sizes of files can be alike."""
        for record in records:
            for survey in self._plan.surveys:
                told = survey.digests.get(record.name, record.source_blake3)
                if told != record.source_blake3:
                    raise CheckpointError(
                        f"`{record.name}` has BLAKE3 {record.source_blake3}, and had {told} "
                        "when weights were surveyed for the budget",
                        hint="the source has changed; repeat the command to begin anew",
                    )

    def _is_intact(self, tensor: TensorPlan, record: TensorRecord) -> bool:
        """Tell whether a tensor that an earlier run finished has the bytes it read and wrote."""
        # Files of an archive or image all have one time: another model can look like this one.
        if self._reader.digest(tensor.source) != record.source_blake3:
            return False
        parts = ((self._base, record.base), (self._ortho, record.ortho))
        return all(out.digest(key) == told for out, part in parts for key, told in part.items())

    def _work_through(self, pending: list[TensorPlan]) -> str:
        """Work on every pending tensor; return base's BLAKE3."""
        owners = {spec.key: t.name for t in self._plan.tensors for spec in t.base}
        shapes = {shape_key(tensor): "" for tensor in self._plan.split}  # they are written
        frontier = Frontier(self._plan.base, owners | shapes, done=[""])
        frontier.finish(self._work.done)
        digest = GrowingDigest(self._base.fd)
        finished: list[dict[str, Any]] = []
        results: Results = SimpleQueue()
        options: dict[str, Any] = {"workers": self._plan.workers, "stop": self._stop}
        try:
            if self.kernels.compiled and pending:  # beside the copies, which come first
                threading.Thread(target=self.kernels.load).start()
            with at_work(self._worker, pending, results, **options):
                committed = time.monotonic()
                for _ in pending:
                    record = results.get()
                    if isinstance(record, BaseException):
                        raise record
                    self._check_surveyed([record])
                    finished.append(record.to_json())
                    frontier.finish([record.name])
                    digest.up_to(frontier.offset)
                    if time.monotonic() - committed >= COMMIT_SECONDS:
                        self._work.commit(finished)
                        finished, committed = [], time.monotonic()
        except BaseException:
            while not results.empty():  # what workers finished and nobody has taken yet
                result = results.get()
                finished += [] if isinstance(result, BaseException) else [result.to_json()]
            self._work.commit(finished)
            raise
        self._work.commit(finished)
        return digest.up_to(self._plan.base.size)

    def _worker(self) -> Worker:
        return Worker(
            self._plan,
            self._reader,
            self._base,
            self._ortho,
            make_kernel=self.kernels.make,
            curvature=self._curvature,
            reference=self._reference,
            edits=self._edits,
            check=self._recheck.check,
            stop=self._stop,
            on_event=self.emit,
        )

    def emit(self, event: Any) -> None:
        with self._event_lock:
            self._on_event(event)

    def _write_side_files(self, report: dict[str, Any]) -> None:
        plan, checkpoint, work = self._plan, self._checkpoint, self._work
        try:
            names = [file.name for file in plan.side.copied] + [INDEX_FILE]
            plan.side.check_unchanged()
            for file in plan.side.copied:
                work.copy_file(plan.side.folder / file.source, file.name)
            if checkpoint.config is not None:
                names.append(CONFIG_FILE)
                work.write_file(CONFIG_FILE, pretty_json(make_config(plan, checkpoint.config)))
            size = plan.base.size - len(plan.base.header)
            work.write_file(INDEX_FILE, pretty_json(index(plan.base.regions, total_size=size)))
            report["side_files"] = {
                artifact.spelled(n): file_digest(work.artifact / n) for n in sorted(names)
            }
            work.write_file(REPORT_FILE, pretty_json(report))
        except OSError as error:
            raise unwritable(work.artifact, error) from error


def _torn(done: dict[str, TensorRecord]) -> list[str]:
    """Find tuned tensors of blocks that are not tuned as a whole."""
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
