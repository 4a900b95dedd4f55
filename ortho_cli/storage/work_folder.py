"""The work folder: output that appears whole or not at all, and work that resumes after a kill.

Work for OUT goes to the hidden sibling `.OUT.ortho/`:

    lock       locked by the run that works here (see `locks`)
    journal    line 1: the identity of the work; then one line per finished tensor
    artifact/  the files being written; data files end in `.partial` until all is on disk
    private/   what a resumed run needs and the result does not hold, such as scratch files
    previous/  what `--force` replaces, between two renames

A tensor counts as finished once its line is in the journal. A line is written only after its
tensor's data were synced. `publish` renames the data files, then `artifact/` (or one file of it) to
OUT. This last rename is one step: before it OUT is absent, or the old one; after it OUT is
complete. `recover` repairs what a kill between two renames left.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import BinaryIO

from ortho_cli import errors
from ortho_cli.errors import (
    Interrupted,
    OutputExistsError,
    ResourceError,
    UsageError,
    reason,
    remedy,
)
from ortho_cli.events import EventSink, Noted, null_sink
from ortho_cli.storage.disk import reserve, sync, sync_folder
from ortho_cli.storage.hints import said
from ortho_cli.storage.locks import Lock, remove
from ortho_cli.storage.untrusted import open_regular

log = logging.getLogger(__name__)

PARTIAL = ".partial"
KEY_FILE = "key.age"  # in private/, where what work leaves is sealed
BAD_SOURCE = (
    errors.ArtifactError,
    errors.CalibrationError,
    errors.CheckpointError,
    errors.NumericalError,
)

Entry = dict[str, object]  # one line of the journal; a job parses it into its own record


def work_folder(out: Path) -> Path:
    """Name the hidden sibling in which OUT is made."""
    return out.parent / f".{out.name}.ortho"


def user_cache() -> Path:
    """Name our folder in the user's cache; a relative XDG_CACHE_HOME is ignored.

    In a container whose user has no home it is in `/`, where what cannot be written is not kept.
    """
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if named.is_absolute():
        return named / "ortho"
    home = os.path.expanduser("~")  # noqa: PTH111 - Path.home() raises where there is none
    return Path(os.sep, home.removeprefix("~"), ".cache", "ortho")


def identity_left(out: Path) -> Entry | None:
    """Read what unfinished work on OUT was of; None where there is none."""
    return next(_complete_lines(work_folder(out) / "journal"), None)


def recover(out: Path) -> None:
    """Undo or clear up after a run that was killed between renames; leave a running one alone."""
    folder = work_folder(out)
    if not folder.is_dir():
        return
    lock = Lock(folder, out)
    try:
        lock.take()
    except OutputExistsError:
        return
    try:
        if os.path.lexists(folder / "previous") and not os.path.lexists(out):
            (folder / "previous").rename(out)
        made = folder / "artifact"
        left = any(path.is_file() for path in made.rglob("*"))
        # Where OUT is one file, its empty folder stays; an older OUT beside says what was done.
        published = not left and os.path.lexists(folder / "previous")
        if published or not made.exists():
            lock.remove_folder()
    finally:
        lock.release()


class WorkFolder:
    """The work on one output, as a context manager; unfinished work stays for the next run."""

    def __init__(
        self,
        out: Path,
        *,
        identity: Mapping[str, object],
        force: bool,
        is_sound: Callable[[Entry], bool] = lambda entry: True,
        file: str | None = None,
        on_event: EventSink = null_sink,
    ) -> None:
        """Begin, or resume where a run of the same identity stopped.

        Args:
            out: where the finished folder goes.
            identity: everything the bytes depend on, and the size in bytes of each data file under
                `files`, of each scratch file under `scratch`. Only work of an equal identity is
                resumed.
            force: discard half-done work of another identity.
            is_sound: whether a line of the journal can be relied on. From the first other line on,
                work is done again.
            file: the one file of `artifact/` that becomes OUT; None for the whole folder.
            on_event: gets a note, once, for each thing that the file system lacks.
        """
        self.out = out
        self.folder = work_folder(out)
        self.artifact = self.folder / "artifact"
        # For a resumed run, and never part of the result.
        self.private = self.folder / "private"
        self.done: dict[str, Entry] = {}
        self.published = False
        self._is_new = False  # nothing of an earlier run is in the folder
        self._result = self.artifact / file if file else self.artifact
        self._identity = dict(identity)
        self._files, self._scratch = (_sizes(identity.get(key)) for key in ("files", "scratch"))
        self._force = force
        self._is_sound = is_sound
        self._lock = Lock(self.folder, out)
        self._journal = -1
        self._fds: dict[Path, int] = {}
        self._names: dict[str, str] = {}  # of side files, as they differ where case does not
        self._on_event, self._told = on_event, set[str]()
        self._made = [parent for parent in out.absolute().parents if not parent.exists()]

    @property
    def useful(self) -> bool:
        """Whether there is something that another run can resume from."""
        if self.done or not self.private.is_dir():
            return bool(self.done)
        names = (path.name.removesuffix(PARTIAL) for path in self.private.iterdir())
        return any(name not in self._scratch and name != KEY_FILE for name in names)

    def __enter__(self) -> WorkFolder:
        """Take the lock and read the journal."""
        try:
            self._lock.take()
            if self._lock.is_file:
                says = f"a file in `{self.folder.name}` says who works there"
                self._note(f"has no locks (flock): {says}")
            try:
                self._open_journal()
            except BaseException as error:
                if isinstance(error, OSError) and self._is_new:
                    self._lock.remove_folder()
                self._close()
                raise
        except OSError as error:
            with contextlib.suppress(OSError):
                for parent in self._made:
                    parent.rmdir()
            raise unwritable(self.out, error) from error
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """Close everything; keep the folder only if another run can resume in it."""
        # Once its source is repaired, the identity is another, and this work is of no use.
        useless = not self.useful or isinstance(error, BAD_SOURCE)
        replaced = os.path.lexists(self.folder / "previous")  # not ours alone to throw away
        if error is not None and useless and not (replaced or self.published):
            with contextlib.suppress(OSError):
                self._lock.remove_folder()
                for parent in self._made:
                    parent.rmdir()
        self._close()

    def _open_journal(self) -> None:
        path = self.folder / "journal"
        lines = list(_complete_lines(path))
        if lines and lines[0] != self._identity:
            if not self._force:
                raise OutputExistsError(
                    f"`{self.folder}` holds {len(lines) - 1} finished tensors of another run: "
                    f"{_difference(lines[0], self._identity)}",
                    hint="give that run's recipe and source to finish it, or --force to discard it",
                )
            lines = []
        if not lines:
            remove(self.private)
        lines[1:] = takewhile(self._is_sound, lines[1:])
        if not lines or not self._data_is_there():
            lines = []
            remove(self.artifact)
            path.unlink(missing_ok=True)
        self.artifact.mkdir(exist_ok=True)
        self.private.mkdir(mode=0o700, exist_ok=True)
        for file in self.artifact.iterdir():  # side files are made again
            if file.name.removesuffix(PARTIAL) not in self._files:
                remove(file)
        self._journal = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        # A last line without its newline was cut by a kill; append after the last whole one.
        os.ftruncate(self._journal, sum(len(_encode(line)) for line in lines))
        if not lines:
            self._is_new = not os.path.lexists(self.folder / "previous")
            self._append([self._identity])
        if lines[1:]:
            log.info("resumes: %d records of an earlier run are sound", len(lines) - 1)
        else:
            log.info("starts afresh: no earlier run left work of this plan and source")
        self.done = {str(line["name"]): line for line in lines[1:]}

    def _data_is_there(self) -> bool:
        """Give renamed data files their working names back; tell whether all are there in full."""
        sizes = {self.private / (name + PARTIAL): size for name, size in self._scratch.items()}
        for name, size in self._files.items():
            final, partial = self.artifact / name, self.artifact / (name + PARTIAL)
            if final.exists():
                final.rename(partial)
            sizes[partial] = size
        return all(path.exists() and path.stat().st_size == sizes[path] for path in sizes)

    def open_data(self, name: str, *, size: int, mode: int, scratch: bool = False) -> int:
        """Open a data file with its bytes reserved, so that a full disk shows before the work.

        Args:
            name: of the file.
            size: in bytes.
            mode: its permissions.
            scratch: only work goes through it; it is synced with the others, and not published.
        """
        path = (self.private if scratch else self.artifact) / (name + PARTIAL)
        with writing(path):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, mode)
            self._fds[path] = fd
            if os.fstat(fd).st_size != size and not reserve(fd, size):
                self._note("reserves no space: a full disk shows only when it is full")
            if mode & 0o077 == 0 and os.fstat(fd).st_mode & 0o077:
                self._note(f"keeps no permissions: others may be able to read `{name}`")
        return fd

    def _note(self, what: str, *, lead: str = "") -> None:
        """Tell once what the file system does, or does not do."""
        message = f"{lead}the file system of `{self.out.parent}` {what}"
        if message not in self._told:
            self._told.add(message)
            self._on_event(Noted(message=message))

    def _note_unless(self, synced: bool) -> None:
        if not synced:
            lost = "a power cut now could lose it"
            self._note(f"does not say when all is on disk (fsync): {lost}")

    def commit(self, entries: Sequence[Entry]) -> None:
        """Make tensors count as finished: data to disk first, then their lines."""
        if not entries:
            return
        with writing(self.folder):
            for fd in self._fds.values():
                self._note_unless(sync(fd))
            self._append(entries)
        self.done.update((str(entry["name"]), entry) for entry in entries)

    def _append(self, entries: Sequence[Entry]) -> None:
        data = memoryview(b"".join(map(_encode, entries)))
        while data:
            data = data[os.write(self._journal, data) :]
        self._note_unless(sync(self._journal))

    def write_file(self, name: str, data: bytes, *, mode: int | None = None) -> None:
        """Write a small file whole.

        Args:
            name: of the file.
            data: its bytes.
            mode: its permissions; None leaves them to the process.
        Raises:
            ResourceError: the disk is full or closed to us.
        """
        with writing(self.artifact), self._side_file(name).open("wb") as file:
            if mode is not None:
                os.fchmod(file.fileno(), mode)
            file.write(data)
            file.flush()
            self._note_unless(sync(file.fileno()))

    def copy_file(self, source: Path, name: str) -> None:
        """Copy a file of the source, its bytes only."""
        path = self._side_file(name)
        if not source.is_file():
            raise errors.CheckpointError(
                f"`{source}` vanished while the model was read", hint="put it back and start again"
            )
        shutil.copyfile(source, path)
        with path.open("rb") as file:
            self._note_unless(sync(file.fileno()))

    def _side_file(self, name: str) -> Path:
        """Make the folder of a side file; say so if its name is another's that is there."""
        path = self.artifact / name
        path.parent.mkdir(parents=True, exist_ok=True)
        other = self._names.setdefault(name.casefold(), name)
        if other != name and path.exists():
            self._note(f"takes its name for that of `{name}`", lead=f"`{other}` is not kept: ")
        return path

    def publish(self, *, may_replace: Callable[[Path], bool]) -> None:
        """Give data files their names, in the order they were opened, and the result its place.

        Args:
            may_replace: whether what is at OUT by now may be replaced.
        """
        for path, fd in self._fds.items():
            if path.parent != self.private:
                self._note_unless(sync(fd))
                path.rename(path.with_name(path.name.removesuffix(PARTIAL)))
        for folder, _, _ in os.walk(self.artifact):
            self._note_unless(sync_folder(Path(folder)))
        previous = self.folder / "previous"
        if os.path.lexists(self.out):
            self._make_way(previous, may_replace)
        try:
            self._result.rename(self.out)
        except BaseException:
            if previous.exists() and not os.path.lexists(self.out):
                previous.rename(self.out)
            raise
        self.published = True
        self._note_unless(sync_folder(self.out.parent))
        with contextlib.suppress(OSError):
            self._lock.remove_folder()

    def _make_way(self, previous: Path, may_replace: Callable[[Path], bool]) -> None:
        with contextlib.suppress(OSError):
            self.out.rmdir()  # an empty folder
            return
        if not may_replace(self.out):
            raise OutputExistsError(
                f"output `{self.out}` has appeared while its new content was made",
                hint="move it away and repeat the same command: the work is kept",
            )
        if previous.exists():
            raise OutputExistsError(
                f"`{previous}` holds an older artifact",
                hint="move it away, then repeat the command",
            )
        self.out.rename(previous)

    def _close(self) -> None:
        fds, self._fds, self._journal = [*self._fds.values(), self._journal], {}, -1
        for fd in fds:
            if fd >= 0:
                os.close(fd)
        self._lock.release()


@contextlib.contextmanager
def interruptible(
    work: WorkFolder, *, total: int, what: str = "tensors", done: str = "finished"
) -> Iterator[None]:
    """Turn Ctrl-C into an error that says how to resume.

    Args:
        work: what is interrupted.
        total: lines of its journal when all is done, or the sum of their `sequences`.
        what: what is counted, in the plural.
        done: `finished`, or the key that a line has once that much is done to it.
    """
    try:
        yield
    except KeyboardInterrupt:
        if work.published:
            raise Interrupted(
                f"interrupted when `{work.out}` was complete", hint="nothing is left to do"
            ) from None
        finished = [e for e in work.done.values() if done == "finished" or done in e]
        count = sum(n if isinstance(n := e.get("sequences", 1), int) else 1 for e in finished)
        raise Interrupted(
            f"interrupted with {count} of {total} {what} {done}",
            hint="repeat the same command to go on from there"
            if work.useful
            else "nothing was finished; nothing is left behind",
        ) from None


def write_private(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file whole or not at all, for its owner alone.

    Raises:
        ResourceError: the disk is full or closed to us.
    """
    write_whole(path, write, mode=0o600)


def write_whole(path: Path, write: Callable[[BinaryIO], object], *, mode: int = 0o666) -> None:
    """Write a file whole or not at all.

    Args:
        path: of the file; one that is there is replaced.
        write: writes its bytes.
        mode: who may read and write it, as far as the umask allows.
    Raises:
        ResourceError: the disk is full or closed to us.
    """
    partial = path.with_name(path.name + PARTIAL)
    with writing(path):
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
        try:
            with os.fdopen(fd, "wb") as file:
                write(file)
                file.flush()
                sync(file.fileno())
            partial.rename(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def check_place(path: Path, option: str) -> None:
    """Refuse a file that could not be written, before the work whose result it is to hold.

    Args:
        path: of the file.
        option: that named it, for the message.
    Raises:
        UsageError: there is no such folder.
        ResourceError: the folder is closed to us.
    """
    if not path.parent.is_dir():
        hint = f"`mkdir -p {said(path.parent)}`, then the same command"
        raise UsageError(f"{option} `{path}` has no folder to be in", hint=hint)
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ResourceError(
            f"{option} `{path}`: `{path.parent}` cannot be written", hint="choose another file"
        )


def _sizes(files: object) -> dict[str, int]:
    """Read the sizes of files, in bytes, by name, that an identity tells."""
    return {str(n): int(size) for n, size in files.items()} if isinstance(files, Mapping) else {}


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an error of the system into one that says why `path` could not be written.

    Raises:
        ResourceError: the disk is full or closed to us.
    """
    try:
        yield
    except OSError as error:
        raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError) -> ResourceError:
    """Say why a file could not be written."""
    return ResourceError(f"cannot write `{path}`: {reason(error)}", hint=remedy(error))


def _encode(line: Entry) -> bytes:
    return json.dumps(line, separators=(",", ":")).encode() + b"\n"


def _complete_lines(path: Path) -> Iterator[Entry]:
    """Read the lines that were written whole; a cut or unreadable tail is work to be done again."""
    if not path.exists():
        return
    with open_regular(path) as file:
        for number, raw in enumerate(file):
            try:
                line = json.loads(raw)
            except (ValueError, RecursionError):
                return
            sound = isinstance(line, dict) and (not number or isinstance(line.get("name"), str))
            if not sound or _encode(line) != raw:
                return
            yield line


def _difference(theirs: Entry, mine: Entry) -> str:
    sizes = ("files", "scratch")  # which follow from the rest
    both = {**theirs, **mine}
    keys = [key for key in both if key not in sizes and theirs.get(key) != mine.get(key)]
    return " and ".join(f"another {key}" for key in keys or ["version"])
