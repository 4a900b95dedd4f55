"""Locking a folder for one process: by flock, or by a file where the file system has no flock.

    lock       locked with flock; the kernel releases it when the process dies
    holder.N   where the file system has no flock (NFS, Lustre): the process that holds it, as JSON

A holder's file is made with O_EXCL, which is atomic on NFS, too, and the highest N counts. The file
of a dead process is stale: the next run makes N + 1 and removes nothing, so two runs cannot both
believe that they removed it. Nothing tells whether a process of another host or container still
runs: its file counts until somebody removes it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple

from ortho_cli.errors import OutputExistsError
from ortho_cli.storage.disk import LACKING

_NO_FLOCK = LACKING | {errno.ENOLCK}
HOLDER = "holder."
RELEASED = b"null\n"


class Lock:
    """The right to work in a folder."""

    def __init__(self, folder: Path, out: Path) -> None:
        """Name the folder, and the output that is made in it."""
        self._folder, self._out = folder, out
        self._path = folder / "lock"
        self._fd = -1
        self._holder: Path | None = None

    @property
    def is_file(self) -> bool:
        """Whether a holder's file takes the place of a lock of the system."""
        return self._holder is not None

    def take(self) -> None:
        """Make the folder and lock it.

        Raises:
            OutputExistsError: another process holds it, and is named.
        """
        while self._fd < 0:
            # A run that just finished may have removed the folder between two looks of mkdir.
            with contextlib.suppress(FileExistsError):
                self._folder.mkdir(parents=True, exist_ok=True)
            if os.path.lexists(self._folder) and not self._folder.is_dir():
                raise NotADirectoryError(
                    errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(self._folder)
                )
            try:
                fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except FileNotFoundError:
                continue
            try:
                if self._lock(fd):
                    self._fd = fd
            finally:
                if self._fd != fd:
                    os.close(fd)
        try:
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)
        except OSError:
            self._path.unlink(missing_ok=True)  # a folder that is empty then goes, too
            self.release()
            raise

    def _lock(self, fd: int) -> bool:
        """Lock the open file; False if it is to be tried again."""
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.pread(fd, 20, 0).decode(errors="replace").strip() or "unknown"
            raise _held(pid, self._out) from None
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                raise
            with contextlib.suppress(FileNotFoundError, FileExistsError):
                return self._take_file()
            return False
        with contextlib.suppress(FileNotFoundError):  # it may be unlinked since we opened it
            return os.path.samestat(os.fstat(fd), self._path.stat())
        return False

    def _take_file(self) -> bool:
        """Make a holder's file of our own, unless a process that may be alive has one."""
        known = self._holders()
        self._refuse(known)
        mine, pid = self._folder / f"{HOLDER}{max(known, default=0) + 1}", os.getpid()
        holder = _Holder(pid, os.uname().nodename, _start(pid), _space())
        fd = os.open(mine, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(json.dumps(holder._asdict()).encode() + b"\n")
            # One that was made meanwhile, under whatever number, counts as much as ours.
            self._refuse({n: path for n, path in self._holders().items() if path != mine})
        except (OutputExistsError, OSError):
            mine.unlink(missing_ok=True)
            raise
        self._holder = mine
        return True

    def _holders(self) -> dict[int, Path]:
        names = {path.name.removeprefix(HOLDER): path for path in self._folder.glob(f"{HOLDER}*")}
        return {int(number): path for number, path in names.items() if number.isdecimal()}

    def _refuse(self, holders: dict[int, Path]) -> None:
        for path in holders.values():
            try:
                raw = path.read_bytes()
            except FileNotFoundError:
                continue
            holder = _parse(raw)
            if raw == RELEASED or (holder is not None and _is_dead(holder)):
                continue
            if holder is not None and _is_here(holder):
                raise _held(str(holder.pid), self._out)
            who = f"process {holder.pid} of host `{holder.host}`" if holder else "some process"
            raise OutputExistsError(
                f"{who} is writing `{self._out}`, as `{path}` says",
                hint=f"wait for it; if it has ended, remove `{path}`",
            )

    def remove_folder(self) -> None:
        """Remove the folder while it is ours; the lock goes last."""
        for path in self._folder.iterdir():
            if path not in (self._path, self._holder):
                remove(path)
        for last in (self._path, self._holder):
            if last is not None:
                last.unlink(missing_ok=True)
        self._holder = None  # another run may have made a file of that name by now
        with contextlib.suppress(OSError):
            self._folder.rmdir()

    def release(self) -> None:
        """Let go."""
        fd, self._fd = self._fd, -1
        holder, self._holder = self._holder, None
        if holder is not None:
            with contextlib.suppress(OSError), holder.open("r+b") as file:
                file.write(RELEASED)
                file.truncate()
        if fd >= 0:
            os.close(fd)
            # NFS keeps an open file that was removed, under another name, until it is closed.
            with contextlib.suppress(OSError):
                self._folder.rmdir()


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class _Holder(NamedTuple):
    """A process that holds a lock, as its file says."""

    pid: int
    host: str
    start: object  # when it began, in ticks since boot; None where the system does not tell
    space: object  # the namespace of its number; None likewise


def _held(pid: str, out: Path) -> OutputExistsError:
    return OutputExistsError(
        f"process {pid} is writing `{out}` right now", hint="wait for it, or choose another -o"
    )


def _parse(raw: bytes) -> _Holder | None:
    """Read which process holds a lock; None while the file is written, or if it is damaged."""
    try:
        fields = json.loads(raw)
        holder = _Holder(fields["pid"], fields["host"], fields.get("start"), fields.get("space"))
    except (ValueError, RecursionError, LookupError, TypeError):
        return None
    sound = type(holder.pid) is int and holder.pid > 0 and isinstance(holder.host, str)
    return holder if sound else None


def _is_here(holder: _Holder) -> bool:
    """Tell whether a process is of this host, and of a namespace that we can see."""
    return holder.host == os.uname().nodename and holder.space == _space()


def _is_dead(holder: _Holder) -> bool:
    """Tell for certain that a process has ended; its number may be another's by now."""
    if not _is_here(holder):
        return False
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        pass
    return holder.start != _start(holder.pid)


def _start(pid: int) -> int | None:
    """Say when a process began, in ticks since boot; None where the system does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes()
        return int(fields.rpartition(b")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


def _space() -> int | None:
    """Name the namespace that numbers of processes are of; containers each have their own."""
    try:
        return Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        return None
