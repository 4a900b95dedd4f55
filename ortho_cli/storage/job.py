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
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from ortho_cli.events import EventSink, Noted, Started, TensorDone, null_sink
from ortho_cli.storage.output import check_output, check_space, resolve_output
from ortho_cli.storage.side_files import SideFiles
from ortho_cli.storage.work_folder import Entry, WorkFolder, interruptible, unwritable

# Seconds from one sync of finished tensors to the next: a kill costs at most this much work.
COMMIT_SECONDS = 0.5


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
        """Refuse a disk with less than `needed` bytes free.

        Args:
            needed: bytes, with those that an earlier run wrote.
            of: what takes them, for the message; None is the kind.

        Raises:
            ResourceError: says how much is needed and how much is free.
        """
        check_space(needed, self.path, kind=of or self.kind.name)


def check_target(out: Path, kind: Kind, sources: Iterable[Path], *, force: bool) -> Target:
    """Refuse an output that would lose something or mix with a source; nothing new is written.

    Args:
        out: where the result goes.
        kind: what is made.
        sources: files and folders that are read.
        force: replace an output of the same kind.
    Raises:
        OutputExistsError: OUT exists and `force` is not given, or is of another kind.
        UsageError: OUT is a source, inside one or around one.
    """
    check_output(
        out, sources, force=force, is_ours=kind.is_ours, kind=kind.name, is_file=kind.is_file
    )
    return Target(path=resolve_output(out), kind=kind, force=force)


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
            identity=dict(identity),
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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
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
    try:
        side.check_unchanged()
        for file in side.copied:
            work.copy_file(side.folder / file.source, file.name)
    except OSError as error:
        raise unwritable(work.artifact, error) from error
    write_files(work, made)


def write_files(work: WorkFolder, made: Mapping[str, bytes]) -> None:
    """Write small files, each whole.

    Raises:
        ResourceError: the disk is full or closed to us.
    """
    try:
        for name, data in made.items():
            work.write_file(name, data)
    except OSError as error:
        raise unwritable(work.artifact, error) from error
