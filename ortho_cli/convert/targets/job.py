"""The job of `ortho convert --to`: a file of tensors, laid out before a weight is read.

A part is a tensor, or tensors that one weight becomes. It is made whole, written, digested and
measured; a killed run resumes after its last finished part, with the figures of those before.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ortho_cli.convert.sources.base import Source
from ortho_cli.events import Advanced, EventSink, Finishing, null_sink
from ortho_cli.formats.artifact import canonical_json
from ortho_cli.split.quantize import as_bytes
from ortho_cli.storage import job, sealing
from ortho_cli.storage.data_file import DataFile, Layout, TensorStream
from ortho_cli.storage.job import Kind, Target
from ortho_cli.storage.sealing import SEALED, Keys, OrthoFile, Seal
from ortho_cli.storage.work_folder import Entry, WorkFolder
from ortho_cli.version import __version__

Figures = dict[str, object]  # of one part, by name, as the journal and --json have them
Put = Callable[[str, Tensor], None]  # writes the next rows of a tensor, in the order of the file


@dataclass(slots=True)
class Error:
    """What is written less what it stands for, added up over the tiles of one weight."""

    largest: float = 0.0
    squared: float = 0.0
    norm: float = 0.0  # squared, of what it stands for
    scales: int = 0  # that are not what they were

    def add(self, made: Tensor, meant: Tensor) -> None:
        """Add values, of any floating dtype."""
        meant = meant.double()
        lost = made.double() - meant
        self.largest = max(self.largest, float(lost.abs().max()) if lost.numel() else 0.0)
        self.squared += float(lost.square().sum())
        self.norm += float(meant.square().sum())

    def add_scales(self, codes: Tensor, scales: Tensor, halves: Tensor) -> None:
        """Add codes * scales of which the scales were rounded; (rows, in) and (rows, groups)."""
        lost = halves.double() - scales.double()
        groups = codes.view(*scales.shape, -1).double()
        energy = groups.square().sum(-1)
        self.norm += float((energy * scales.double().square()).sum())
        if bool(lost.any()):
            self.scales += int(lost.count_nonzero())
            self.squared += float((energy * lost.square()).sum())
            self.largest = max(self.largest, float((groups.abs().amax(-1) * lost.abs()).max()))

    def figures(self) -> Figures:
        """Spell it for the journal and --json."""
        return {
            "max_error": self.largest,
            "squared_error": self.squared,
            "squared_norm": self.norm,
            "scales_rounded": self.scales,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One weight on its way: the tensors that it becomes, and what makes them."""

    name: str  # in the source
    keys: tuple[str, ...]  # in the output
    make: Callable[[Put], Figures]
    facts: Mapping[str, object] = field(default_factory=dict)  # known before it is made


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetPlan:
    """Everything that is decided before the work begins."""

    form: str  # as --to names it
    kind: Kind
    source: Source  # without tensors: parts read for themselves
    file: str | None  # the file of tensors; None where the output is one file
    layout: Layout
    parts: tuple[Part, ...]
    settings: Mapping[str, object]  # what values depend on
    made_files: tuple[tuple[str, bytes], ...] = ()
    notes: tuple[str, ...] = ()
    seal: Seal | None = None

    @property
    def is_private(self) -> bool:
        """Whether only its owner may read the result."""
        return self.source.private

    @property
    def sha256(self) -> str:
        """Digest of the plan: of the header, and of what values depend on."""
        header = hashlib.sha256(self.layout.header).hexdigest()
        content = {"version": __version__, "header": header, "settings": dict(self.settings)}
        return hashlib.sha256(canonical_json(content).encode()).hexdigest()

    @property
    def bytes_on_disk(self) -> int:
        """Bytes of the output, and of the work beside it while it is made."""
        made = sum(len(data) for _, data in self.made_files)
        scratch = sealing.scratch_bytes(self.layout, self.seal)
        return self.layout.size + made + scratch + job.SIDE_BYTES * (1 + len(self.parts))

    def to_json(self, done: Mapping[str, Entry] | None = None) -> dict[str, object]:
        """Give the document of `ortho convert --to --json`.

        Args:
            done: the journal line of each part, by name, once they are made.
        """
        regions = self.layout.regions
        end = SEALED if self.seal else ""
        written = self.layout.size + sum(len(data) for _, data in self.made_files)
        size, header = self.layout.size, len(self.layout.header)
        files = [{"name": self.file + end, "size": size, "header": header}] if self.file else []
        return {
            "to": self.form,
            "plan_sha256": self.sha256,
            "sealed": self.seal is not None,
            "totals": {
                "tensors": len(regions),
                "weights": len(self.parts),
                "bytes_written": written,
            },
            "files": [*files, *({"name": n, "size": len(d)} for n, d in self.made_files)],
            "tensors": [
                {
                    "name": part.name,
                    **part.facts,
                    "written": [
                        {
                            "name": key,
                            "dtype": regions[key].dtype,
                            "shape": list(regions[key].shape),
                            "offset": regions[key].offset,
                            "nbytes": regions[key].nbytes,
                        }
                        for key in part.keys
                    ],
                    **(_told(done[part.name]) if done else {}),
                }
                for part in self.parts
            ],
            **({"error": _sum(done.values())} if done else {}),
            "notes": list(self.notes),
        }


def _sum(lines: Iterable[Entry]) -> dict[str, object]:
    """Add up the errors of all parts."""
    found = list(lines)

    def numbers(key: str) -> list[float]:
        return [float(str(line[key])) for line in found]

    norm = math.fsum(numbers("squared_norm"))
    squared = math.fsum(numbers("squared_error"))
    return {
        "max_error": max(numbers("max_error"), default=0.0),
        "relative_error": math.sqrt(squared / norm) if norm else 0.0,
        "share_lost": squared / norm if norm else 0.0,
        "inexact": sum(number > 0 for number in numbers("squared_error")),
        "scales_rounded": int(sum(numbers("scales_rounded"))),
    }


def _told(line: Entry) -> dict[str, object]:
    return {key: value for key, value in line.items() if key != "name"}


def check_target(plan: TargetPlan, target: Target) -> None:
    """Refuse a disk that is too small.

    Raises:
        ResourceError: says how much is needed and how much is free.
    """
    target.check_space(plan.bytes_on_disk)


def write(
    plan: TargetPlan,
    target: Target,
    *,
    keys: Keys | None = None,
    on_event: EventSink = null_sink,
) -> dict[str, Entry]:
    """Carry a plan out.

    Args:
        plan: made from a source that stays open.
        target: the output; appears only when complete.
        keys: open what an unfinished, sealed run left.
        on_event: told of progress.
    Returns:
        For each part, by name: the BLAKE3 of each tensor by its key, and its figures.
    Raises:
        CheckpointError: the source changed while it was read.
        ArtifactError: the source is damaged.
        NumericalError: a finite value becomes infinite.
        OutputExistsError: half-done work of another plan is beside the output.
        ResourceError: the disk is full or closed to us.
        Interrupted: Ctrl-C; finished parts are kept.
    """
    regions = plan.layout.regions
    nbytes = {p.name: sum(regions[key].nbytes for key in p.keys) for p in plan.parts}
    name = plan.file or target.path.name.removesuffix(SEALED if plan.seal else "")
    identity: dict[str, object] = {
        "plan": plan.sha256,
        "source": plan.source.identity,
        "version": [__version__, torch.__version__],
        "files": {} if plan.seal else {name: plan.layout.size},
    }
    if plan.seal:
        identity["seal"] = plan.seal.identity
        identity["scratch"] = {name: sealing.scratch_bytes(plan.layout, plan.seal)}
    plan.source.check_unchanged()
    with job.open_job(
        target, identity=identity, total=len(nbytes), is_sound=_is_sound(plan), on_event=on_event
    ) as work:
        file = _open(plan, work, name, keys, on_event)
        _forget_damaged(plan, work, file)
        job.report_start(work, nbytes, plan.notes, on_event)
        if plan.seal is None:
            file.write_header(plan.layout.header)
        with job.Commits(work, on_event) as commits:
            for part in plan.parts:
                if part.name not in work.done:
                    digests, figures = _make(part, file)
                    on_event(Advanced(nbytes=nbytes[part.name]))
                    commits.add({"name": part.name, "blake3": digests, **figures})
        on_event(Finishing(step="seal" if plan.seal else "sync"))
        if plan.seal is not None:
            file.finish(plan.layout)
        plan.source.check_unchanged()
        mode = 0o600 if plan.is_private else None
        for made, data in plan.made_files:
            work.write_file(made, data, mode=mode)
        return {part.name: dict(work.done[part.name]) for part in plan.parts}


def _open(
    plan: TargetPlan, work: WorkFolder, name: str, keys: Keys | None, on_event: EventSink
) -> OrthoFile:
    """Open the file of tensors, or the scratch file of its sealed parts."""
    if plan.seal is None:
        return DataFile(work, name, plan.layout, mode=0o600 if plan.is_private else 0o644)
    key = sealing.key_of(work, plan.seal, keys, on_event)
    return sealing.SealedFile(work, name, plan.layout, key, final=name + SEALED)


def _is_sound(plan: TargetPlan) -> Callable[[Entry], bool]:
    known = {part.name: set(part.keys) for part in plan.parts}

    def is_sound(line: Entry) -> bool:
        digests = line.get("blake3")
        wanted = known.get(str(line.get("name")))
        return isinstance(digests, dict) and wanted is not None and digests.keys() == wanted

    return is_sound


def _forget_damaged(plan: TargetPlan, work: WorkFolder, file: OrthoFile) -> None:
    """Drop the journal lines of parts whose bytes have changed since."""
    for name, line in list(work.done.items()):
        digests = line["blake3"]
        if isinstance(digests, dict) and any(file.digest(k) != d for k, d in digests.items()):
            del work.done[name]


def _make(part: Part, file: OrthoFile) -> tuple[dict[str, str], Figures]:
    """Make one part; return the BLAKE3 of each of its tensors, and its figures."""
    streams = {key: TensorStream(file, key) for key in part.keys}
    figures = part.make(lambda key, tensor: streams[key].write(as_bytes(tensor)))
    return {key: stream.finish() for key, stream in streams.items()}, figures
