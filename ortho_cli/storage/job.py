"""A job that makes one output: the checks before it, its commits, its side files, its publication.

The commands decompose, convert and calibrate share this frame:

    target = check_target(...)                    refuses what cannot or must not be written
    with open_job(target, ...) as work:           resumes an equal run; publishes at the end
        with Commits(work, on_event) as commits:  syncs finished tensors from time to time
            commits.add(line)
        write_side_files(work, side, made)
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ortho_cli.errors import OutputExistsError, ResourceError, UsageError, reason, remedy
from ortho_cli.events import EventSink, Noted, Started, TensorDone, null_sink
from ortho_cli.storage.checkpoint import Checkpoint
from ortho_cli.storage.disk import check_name, check_writable, free_bytes
from ortho_cli.storage.side_files import SideFiles
from ortho_cli.storage.work_folder import (
    PARTIAL,
    Entry,
    WorkFolder,
    interruptible,
    recover,
    work_folder,
    writing,
)

# Seconds from one sync of finished tensors to the next: a kill costs at most this much work.
COMMIT_SECONDS = 0.5
Refusal = OutputExistsError | UsageError
SIDE_BYTES = 2_048  # bytes that index, report and side files take per tensor, about


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What a command makes, and how an output of it is recognised."""

    name: str
    is_ours: Callable[[Path], bool]
    is_file: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """An output that `check_target` has passed; only such a one can be worked on."""

    path: Path  # without links
    kind: Kind
    force: bool  # replace an output of the same kind, and discard unfinished work of another plan

    def check_space(self, needed: int, *, of: str | None = None) -> None:
        """Refuse a disk that is too small; what an earlier run of the same work wrote counts.

        Args:
            needed: bytes, with those that an earlier run wrote.
            of: what takes them, for the message; None is the kind.
        Raises:
            ResourceError: says how much is needed and how much is free.
        """
        place = next(parent for parent in self.path.parents if parent.exists())
        try:
            check_writable(place)
        except OSError as error:
            raise ResourceError(
                f"cannot write in `{place}`: {reason(error)}", hint=remedy(error)
            ) from None
        work, what = work_folder(self.path), of or self.kind.name
        written = [*(work / "artifact").rglob("*"), *(work / "private").glob("*" + PARTIAL)]
        held = sum(path.stat().st_blocks * 512 for path in written if path.is_file())
        free = free_bytes(place)
        if free is not None and needed - held > free:
            verb = "take" if what.endswith("s") else "takes"
            raise ResourceError(
                f"`{place}` has {free / 1e6:,.1f} MB free and the {what} "
                f"{verb} {(needed - held) / 1e6:,.1f} MB",
                hint="free space, or choose another -o",
            )


def resolve_output(out: Path) -> Path:
    """Follow links once, so that work folder, checks and result are on one disk.

    Raises:
        OutputExistsError: OUT is a link that leads round in a circle.
    """
    try:
        return out.resolve()
    except (RuntimeError, OSError):
        raise _refusal(OutputExistsError, out, "is a link that leads nowhere") from None


def files_of(checkpoint: Checkpoint, *more: Path) -> list[Path]:
    """Name what is read: the checkpoint's path as given, its shards, and `more`."""
    return [checkpoint.path, *(shard.path for shard in checkpoint.shards), *more]


def check_target(out: Path, kind: Kind, sources: Iterable[Path], *, force: bool) -> Target:
    """Refuse an output that would lose something or mix with a source; nothing new is written.

    It first undoes what a run left that was killed at its end: an older output that it had moved,
    or its work folder.

    Args:
        out: where the result goes.
        kind: what is made.
        sources: files and folders that are read.
        force: replace an output of the same kind.
    Raises:
        OutputExistsError: OUT exists and `force` is not given, or is of another kind.
        UsageError: OUT is a source, inside or around one, or a place that cannot be renamed onto.
    """
    path = resolve_output(out)
    place = next(parent for parent in path.parents if parent.exists())
    check_name(path.name, place, longest=max(work_folder(path).name, path.name + PARTIAL, key=len))
    _check_place(out, path, sources)
    recover(path)
    if path.exists() and path.is_dir() == kind.is_file:
        there, wanted = ("a folder", "file") if kind.is_file else ("a file", "folder")
        hint = f"choose another -o; the output is a {wanted}"
        raise _refusal(OutputExistsError, out, f"is {there}", hint)
    if path.exists() and (kind.is_file or any(path.iterdir())):
        if not kind.is_ours(path):
            hint = f"choose another -o; --force replaces {kind.name}s only"
            raise _refusal(OutputExistsError, out, f"exists and is no {kind.name}", hint)
        if not force:
            hint = "choose another -o, or replace it with --force"
            raise _refusal(OutputExistsError, out, "exists", hint)
    return Target(path=path, kind=kind, force=force)


def _check_place(out: Path, path: Path, sources: Iterable[Path]) -> None:
    """Refuse an output at a source, or one that no folder can be renamed onto."""
    for source in sources:
        real = source.resolve()
        if path == real or (real.is_dir() and real in path.parents):
            raise _refusal(UsageError, out, f"is the source `{source}` or inside it")
        if path in real.parents:
            raise _refusal(UsageError, out, f"holds the source `{source}`")
    if path == Path.cwd() or os.path.ismount(path):
        what = "the current folder" if path == Path.cwd() else "a mount point"
        what = f"is {what}, which cannot be replaced as a whole"
        raise _refusal(UsageError, out, what, "choose a folder inside it")
    blocked = next((p for p in path.parents if p.exists() and not p.is_dir()), None)
    if blocked is not None:
        raise _refusal(UsageError, out, f"is under the file `{blocked}`")


def _refusal(kind: type[Refusal], out: Path, what: str, hint: str = "choose another -o") -> Refusal:
    return kind(f"output `{out}` {what}", hint=hint)


@contextlib.contextmanager
def open_job(
    target: Target,
    *,
    identity: Mapping[str, object],
    total: int,
    what: str = "tensors",
    is_sound: Callable[[Entry], bool] = lambda line: True,
    on_event: EventSink = null_sink,
) -> Iterator[WorkFolder]:
    """Open the work folder of an output, and publish it where the work ends without an error.

    Args:
        target: the output.
        identity: see `WorkFolder`.
        total: lines of the journal when all is done.
        what: each line stands for.
        is_sound: see `WorkFolder`.
        on_event: told what the file system lacks.
    """
    with (
        WorkFolder(
            target.path,
            identity=identity,
            force=target.force,
            is_sound=is_sound,
            file=target.path.name if target.kind.is_file else None,
            on_event=on_event,
        ) as work,
        interruptible(work, total=total, what=what),
    ):
        yield work
        work.publish(may_replace=lambda there: target.force and target.kind.is_ours(there))


def report_start(
    work: WorkFolder, nbytes: Mapping[str, int], notes: Iterable[str], on_event: EventSink
) -> None:
    """Tell how much there is to do, and how much of it an earlier run has done.

    Args:
        work: whose journal lists what is done.
        nbytes: of each tensor, by name.
        notes: what the user should know of the input.
        on_event: told.
    """
    on_event(
        Started(
            tensors=len(nbytes),
            resumed=len(work.done),
            bytes_total=sum(nbytes.values()),
            bytes_done=sum(nbytes[name] for name in work.done),
        )
    )
    for note in notes:
        on_event(Noted(message=note))


class Commits:
    """Makes finished tensors durable every COMMIT_SECONDS, and those that are left at the end."""

    def __init__(self, work: WorkFolder, on_event: EventSink) -> None:
        """Commit to `work`; tell `on_event` of each tensor."""
        self._work, self._on_event = work, on_event
        self._lines: list[Entry] = []
        self._committed = time.monotonic()

    def __enter__(self) -> Commits:
        return self

    def __exit__(self, *error: object) -> None:
        """Commit what is finished, whatever has happened to the rest."""
        self._work.commit(self._lines)

    def keep(self, line: Entry) -> None:
        """Commit this journal line with the next ones."""
        self._lines.append(line)

    def add(self, line: Entry) -> None:
        """Count the tensor of this journal line as finished."""
        self.keep(line)
        self._on_event(TensorDone(name=str(line["name"])))
        if time.monotonic() - self._committed >= COMMIT_SECONDS:
            self._work.commit(self._lines)
            self._lines, self._committed = [], time.monotonic()


def write_side_files(work: WorkFolder, side: SideFiles, made: Mapping[str, bytes]) -> None:
    """Copy the side files of the source, and write those that were made.

    Raises:
        CheckpointError: a file of the source has changed or vanished.
        ResourceError: the disk is full or closed to us.
    """
    with writing(work.artifact):
        side.check_unchanged()
        for file in side.copied:
            work.copy_file(side.folder / file.source, file.name)
    for name, data in made.items():
        work.write_file(name, data)
