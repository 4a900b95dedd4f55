"""The job of `ortho decompose`: split every tensor in worker threads, and write the artifact.

One worker handles all tiles of a tensor, so no byte depends on the number of workers. Meanwhile the
calling thread commits finished tensors to the journal, and hashes base up to its first gap.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Protocol

from ortho_cli.decompose import workers
from ortho_cli.decompose.edits import Edits, Key, check_edits, count, load_edits, save_edits
from ortho_cli.decompose.kernels import Kernels, one_thread_of_torch, set_to
from ortho_cli.decompose.plan import Plan, TensorPlan, check_memory, check_statistics
from ortho_cli.decompose.recheck import Recheck
from ortho_cli.decompose.record import TensorRecord
from ortho_cli.decompose.report import make_config, make_report
from ortho_cli.decompose.survey import KEY, digest_of, load_surveys, save_surveys, stamps
from ortho_cli.errors import CheckpointError, InternalError, RecipeError
from ortho_cli.events import Event, EventSink, Finishing, Noted, null_sink
from ortho_cli.formats import artifact
from ortho_cli.formats.card import CARD_FILE, Facts, make_card
from ortho_cli.formats.quantization_config import index
from ortho_cli.formats.report import Totals
from ortho_cli.formats.statistics import StatisticsReader
from ortho_cli.storage import job, sealing
from ortho_cli.storage.checkpoint import Checkpoint, check_in_place, file_digest, hub_id
from ortho_cli.storage.data_file import DataFile, Frontier, GrowingDigest, Layout, plan_layout
from ortho_cli.storage.job import Kind, Target, files_of
from ortho_cli.storage.side_files import README as SOURCE_CARD
from ortho_cli.storage.work_folder import Entry, WorkFolder, interruptible
from ortho_cli.version import __version__

if TYPE_CHECKING:  # to import torch takes longer than to decompose a billion weights
    from ortho_cli.decompose.readback import ReadBack
    from ortho_cli.decompose.tune import Tuner

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


KIND = Kind(name="artifact", is_ours=artifact.is_artifact)


def check_target(
    plan: Plan,
    checkpoint: Checkpoint,
    out: Path,
    *,
    force: bool = False,
    seal: sealing.Seal | None = None,
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
    target.check_space(plan.bytes_on_disk + sealing.scratch_bytes(plan.ortho, seal))
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
    seal: sealing.Seal | None = None,
    keys: sealing.Keys | None = None,
    compiled: bool = True,
    device: str = "cpu",
    on_event: EventSink = null_sink,
) -> dict[str, object]:
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
        workers.open_inputs(plan, checkpoint) as inputs,
        job.open_job(
            target,
            identity=_identity(plan, checkpoint, seal, **more),
            total=len(plan.tensors),
            is_sound=_fits(plan),
            on_event=on_event,
        ) as work,
    ):
        save_surveys(work.private, plan.surveys)  # from here on a kill does not cost them
        key = sealing.key_of(work, seal, keys, on_event) if seal else None
        edits = _find_edits(plan, editor, work, inputs.curvature, key, on_event)
        emit = _one_at_a_time(on_event)
        kernels = Kernels(plan, compiled=compiled, device=device, on_event=emit)
        return _Job(plan, checkpoint, inputs, edits, key, work, kernels, emit).run(tuner)


def _identity(
    plan: Plan, checkpoint: Checkpoint, seal: sealing.Seal | None, **more: object
) -> dict[str, object]:
    """List everything that the bytes depend on, and the sizes of the files that hold them.

    Only a run of equal identity resumes the unfinished work of another. Of `more`, None counts as
    absent.
    """
    base, ortho = {artifact.BASE_FILE: plan.base.size}, {artifact.ORTHO_FILE: plan.ortho.size}
    found: dict[str, object] = {
        "plan": plan.sha256,
        "source": stamps(checkpoint.shards),
        "version": [__version__, metadata.version("torch")],
        "files": base if seal is not None or plan.is_encoded else base | ortho,
        **{name: value for name, value in more.items() if value is not None},
    }
    # Ortho is made from a scratch file.
    if seal is not None:
        found["seal"] = seal.identity
        found["scratch"] = {artifact.ORTHO_FILE: sealing.scratch_bytes(plan.ortho, seal)}
    elif plan.is_encoded:
        found["scratch"] = ortho
    if plan.statistics is not None:
        found["statistics"] = stamps([plan.statistics.shard])[0]
    if plan.reference is not None:
        found["reference"] = stamps(plan.reference.shards)
    if plan.surveys:
        found[KEY] = digest_of(plan.surveys)
    return found


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
    if plan.measures:
        raise RecipeError(
            "the plan uses curvature that is not measured yet",
            hint="make it again with `statistics`, as `ortho_cli.calibrate.own_text.measure` does",
        )
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
    key: sealing.WorkKey | None,
    on_event: EventSink,
) -> Edits:
    """Find the edits, or load those that an earlier run found."""
    if editor is None or curvature is None:
        return {}
    path = work.private / EDITS_FILE
    edits: Edits | None = load_edits(path, key)
    found = edits is None
    log.info("moves of codes are %s", "searched" if found else "those of an earlier run")
    if edits is None:
        work.done.clear()  # a tensor that was split before cannot be relied on without its edits
        edits = editor.find(work.private, curvature=curvature, key=key, on_event=on_event)
    check_edits(edits, {tensor.name: tensor for tensor in plan.split})
    if found:
        save_edits(path, edits, key)
    return edits


def _one_at_a_time(on_event: EventSink) -> EventSink:
    lock = threading.Lock()

    def emit(event: Event) -> None:
        with lock:
            on_event(event)

    return emit


def _many_small_operations() -> AbstractContextManager[None]:
    """Let threads switch more often: tiles are many short operations.

    Workers hold the interpreter lock for microseconds; the default wait of 5 ms costs 5 %.
    """
    return set_to(SWITCH_SECONDS, sys.getswitchinterval, sys.setswitchinterval)


@dataclass
class _Job:
    plan: Plan
    checkpoint: Checkpoint
    inputs: workers.Inputs
    edits: Edits
    key: sealing.WorkKey | None
    work: WorkFolder
    kernels: Kernels
    on_event: EventSink

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._base = DataFile(self.work, artifact.BASE_FILE, self.plan.base, mode=0o644)
        self._ortho = self._ortho_file(
            artifact.ORTHO_FILE, self.plan.ortho, scratch=self.plan.is_encoded
        )
        recipe = self.plan.recipe
        self._recheck = Recheck(
            reader=self.inputs.source,
            base=self._base,
            ortho=self._ortho,
            nearest=not recipe.compensates and self.inputs.reference is None,
            own_code=recipe.ortho.split == "unlearn" and not recipe.keeps_columns,
            # Beside what finds codes to move or to tune, reading them back takes no time.
            whole=recipe.forgets or recipe.compensates,
            sizes=self.plan.sizes,
        )

    def _ortho_file(self, name: str, layout: Layout, *, scratch: bool = False) -> sealing.OrthoFile:
        if self.key is not None:
            return sealing.SealedFile(self.work, name, layout, self.key)
        # Ortho holds what others must not read.
        return DataFile(self.work, name, layout, mode=0o600, scratch=scratch)

    def run(self, tuner: Tuner | None) -> dict[str, object]:
        """Split, tune and finish."""
        torch_alone = nullcontext() if self.kernels.compiled else one_thread_of_torch()
        with _many_small_operations(), torch_alone:
            base_blake3 = self.split()
        if tuner is not None:
            base_blake3 = self.tune(tuner)
        if self.plan.recipe.forgets or tuner is not None:
            check_in_place(self.checkpoint)  # transformers read the model by its files' names
        with _many_small_operations():
            return self.finish(base_blake3)

    def split(self) -> str:
        """Split every tensor that no earlier run has finished; return base's BLAKE3."""
        plan, done, records = self.plan, self.work.done, self._done()
        for tensor in plan.tensors:
            if tensor.name in done and not self._is_intact(tensor, records[tensor.name]):
                del done[tensor.name], records[tensor.name]
        for name in _torn(records):
            del done[name], records[name]
        self._check_surveyed(records.values())
        nbytes = {tensor.name: tensor.source.nbytes for tensor in plan.tensors}
        job.report_start(self.work, nbytes, plan.side.notes, self.on_event)
        self._base.write_header(plan.base.header)
        # They are first in the file: hashing it need not wait for their weights.
        for tensor in plan.split:
            self._base.write(workers.shape_key(tensor), workers.shape_bytes(tensor), start=0)
        return self._work_through([t for t in plan.tensors if t.name not in done])

    def tune(self, tuner: Tuner) -> str:
        """Replace codes and scales by tuned ones; return base's BLAKE3.

        The journal lines of a block are written together, after its data, and each holds the size
        of the block. After a kill before them, the old lines do not fit the new bytes; after a kill
        among them, lines of the block are missing. In both cases the next run splits and tunes the
        tensors of that block again.
        """
        from ortho_cli.decompose.readback import given_of

        written = self._written()
        tensors = {tensor.name: tensor for tensor in self.plan.split}
        tuned = [name for name, record in self._done().items() if record.tuned]
        self._stop.clear()  # the workers that it stopped have ended
        worker = self._worker()
        with interruptible(self.work, total=len(tensors), done="tuned"):
            for found in tuner.tune(
                lambda name: written.rounded(tensors[name]),
                tuned,
                folder=self.work.private,
                key=self.key,
                on_event=self.on_event,
            ):
                block = (min(found), len(found))
                records = []
                for name, rounded in found.items():
                    record = worker.split(tensors[name], given_of(tensors[name], rounded))
                    self._recheck.check(tensors[name], record)
                    records.append(replace(record, tuned=block))
                self.work.commit([record.to_json() for record in records])
        return GrowingDigest(self._base.fd).up_to(self.plan.base.size)

    def _written(self) -> ReadBack:
        from ortho_cli.decompose.readback import ReadBack

        return ReadBack(self.plan, self._base, self._ortho)

    def _done(self) -> dict[str, TensorRecord]:
        """Give the records of finished tensors."""
        found = ((name, TensorRecord.from_json(line)) for name, line in self.work.done.items())
        return {name: record for name, record in found if record is not None}

    def finish(self, base_blake3: str) -> dict[str, object]:
        """Check that no input has changed, and write ortho and the files beside it."""
        plan, done = self.plan, self._done()
        self.on_event(Finishing(step="digests"))
        self.inputs.check_unchanged()
        records = [done[tensor.name] for tensor in plan.tensors]
        digest = artifact.source_digest(
            (t.name, t.source.dtype, t.source.shape, done[t.name].source_blake3)
            for t in plan.tensors
        )
        told = artifact.ortho_metadata(
            plan_sha256=plan.sha256,
            recipe=artifact.canonical_json(plan.recipe.canonical()),
            version=__version__,
            source_digest=digest,
            base_blake3=base_blake3,
        )
        self._check_forgotten()
        ortho, layout = self._ortho, plan.ortho
        if plan.is_encoded:
            self.on_event(Finishing(step="compact"))
            from ortho_cli.decompose.repack import Repacker

            repacker = Repacker(plan, self._written(), self.inputs.curvature)
            # Where ortho is sealed, a scratch file of its name holds the CSR.
            make = partial(
                self._ortho_file, artifact.ORTHO_FILE if self.key is None else COMPACT_FILE
            )
            with one_thread_of_torch():
                ortho, layout, records = repacker.run(make, records, told)
        else:
            layout = plan_layout((s for t in plan.tensors for s in t.ortho), told)
            if layout.regions != plan.ortho.regions:
                raise InternalError("ortho's tensors are at other offsets than the plan says")
        if self.key is not None:
            self.on_event(Finishing(step="seal"))
        ortho_blake3, sealed_blake3 = ortho.finish(layout)
        self._check_sealed(sealed_blake3)
        self.on_event(Finishing(step="sync"))
        report = make_report(
            plan,
            records,
            ortho=layout,
            moved=count(self.edits),
            source_digest=digest,
            base_blake3=base_blake3,
            ortho_blake3=ortho_blake3,
            sealed_blake3=sealed_blake3,
            device=self.kernels.device.partition(":")[0],
        )
        report["side_files"] = self._write_side_files(report)
        self.work.write_file(artifact.REPORT_FILE, artifact.pretty_json(report))
        return report

    def _check_forgotten(self) -> None:
        """Check that base has the codes of each edit, and ortho the weights at its positions.

        No figure would show a breach: base would still know the secret, or ortho would lack it.
        """
        for tensor in self.plan.split:
            if tensor.name in self.edits:
                self._written().check_moved(tensor, self.edits[tensor.name])

    def _check_sealed(self, sealed_blake3: str | None) -> None:
        """Check that ortho is sealed where it should be, and that no plain ortho is published."""
        if self.key is None:
            return
        here = [path.name for path in self.work.artifact.glob(f"{artifact.ORTHO_FILE}*")]
        plain = [name for name in here if not name.startswith(sealing.SEALED_FILE)]
        if sealed_blake3 is None or plain:
            raise InternalError(f"ortho was to be sealed, and is not: {plain or here}")

    def _check_surveyed(self, records: Iterable[TensorRecord]) -> None:
        """Check that split weights were surveyed as they are: other files can have equal stamps."""
        for record in records:
            for survey in self.plan.surveys:
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
        if self.inputs.source.digest(tensor.source) != record.source_blake3:
            return False
        parts = ((self._base, record.base), (self._ortho, record.ortho))
        return all(out.digest(key) == told for out, part in parts for key, told in part.items())

    def _work_through(self, pending: list[TensorPlan]) -> str:
        """Run the workers on every pending tensor; return base's BLAKE3."""
        owners = {spec.key: t.name for t in self.plan.tensors for spec in t.base}
        shapes = {workers.shape_key(tensor): "" for tensor in self.plan.split}  # they are written
        frontier = Frontier(self.plan.base, owners | shapes, done=[""])
        frontier.finish(self.work.done)
        digest = GrowingDigest(self._base.fd)
        results: workers.Results = SimpleQueue()
        with job.Commits(self.work, self.on_event) as commits:
            try:
                # While copies, which come first, are written.
                if self.kernels.compiled and pending:
                    threading.Thread(target=self.kernels.load).start()
                with workers.at_work(
                    self._worker, pending, results, workers=self.plan.workers, stop=self._stop
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
        return digest.up_to(self.plan.base.size)

    def _worker(self) -> workers.Worker:
        return workers.Worker(
            plan=self.plan,
            inputs=self.inputs,
            base=self._base,
            ortho=self._ortho,
            make_kernel=self.kernels.make,
            edits=self.edits,
            check=self._recheck.check,
            stop=self._stop,
            on_event=self.on_event,
        )

    def _write_side_files(self, report: Mapping[str, object]) -> dict[str, str]:
        """Write config.json, the index, the card and copies; return the BLAKE3 of each, by name."""
        plan, config = self.plan, self.checkpoint.config
        size = plan.base.size - len(plan.base.header)
        made = {
            artifact.INDEX_FILE: artifact.pretty_json(index(plan.base.regions, total_size=size))
        }
        if config is not None:
            made[artifact.CONFIG_FILE] = artifact.pretty_json(make_config(plan, config))
        job.write_side_files(self.work, plan.side, made)
        copied = [file.name for file in plan.side.copied]
        folder, locked = self.work.artifact, sealing.IDENTITY_FILE
        facts = Facts(
            plan_sha256=plan.sha256,
            source_digest=str(report["source_digest"]),
            recipe=plan.recipe.canonical(),
            totals=Totals.model_validate(report["totals"]),
            bits=sorted({tensor.bits for tensor in plan.split}, reverse=True),
            group_sizes=[plan.group_size],
            measured=True,
            ortho=artifact.ORTHO_FILE if self.key is None else sealing.SEALED_FILE,
            key=locked if (folder / locked).is_file() else None,
            config=config,
            source_card=(folder / SOURCE_CARD).read_bytes() if SOURCE_CARD in copied else None,
            repository=None if plan.recipe.forgets else hub_id(self.checkpoint.path),
            needs_stacks=plan.needs_stacks,
        )
        self.work.write_file(CARD_FILE, make_card(facts))
        names = sorted([*made, CARD_FILE, *copied])
        return {artifact.spelled(n): file_digest(self.work.artifact / n) for n in names}


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
