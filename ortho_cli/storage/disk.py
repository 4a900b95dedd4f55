"""Calls that a file system may lack: sync, reserved space, permissions; and how to do without.

NFS, CIFS, 9p, FUSE, FAT and Lustre each leave out some calls. Where a result is as good without
one, its absence is no error: functions here return False then, and their caller notes it once.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from ortho_cli.errors import UsageError

# What a system says of a call that it does not know, or not for this kind of file.
LACKING = frozenset(
    {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY, errno.ENODEV}
)
NAME_BYTES = 255  # of a file's name, where the file system does not tell


def sync(fd: int) -> bool:
    """Make a file's bytes durable; False where its file system has no such call.

    Raises:
        OSError: the bytes may be lost.
    """
    # macOS has no fdatasync.
    return any(_works(call, fd) for call in (getattr(os, "fdatasync", os.fsync), os.fsync))


def _works(call: Callable[..., object], *args: object, lacking: frozenset[int] = LACKING) -> bool:
    """Make a call of the system; False where the file system has none such."""
    try:
        call(*args)
    except OSError as error:
        if error.errno not in lacking:
            raise
        return False
    return True


def sync_folder(path: Path) -> bool:
    """Make the names in a folder durable; False where its file system has no such call.

    Raises:
        OSError: the disk fails.
    """
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError as error:
        if error.errno not in LACKING | {errno.EACCES, errno.EISDIR}:
            raise
        return False
    try:
        return _works(os.fsync, fd, lacking=LACKING | {errno.EBADF})  # CIFS says so of folders
    finally:
        os.close(fd)


def reserve(fd: int, size: int) -> bool:
    """Set a file's size, and claim its blocks; False where they cannot be claimed before the work.

    Raises:
        OSError: the disk is too small, or holds no file of that size.
    """
    try:
        os.ftruncate(fd, size)
    except OSError as error:
        if error.errno not in LACKING or os.fstat(fd).st_size > size:
            raise
        if size > os.fstat(fd).st_size:
            os.pwrite(fd, b"\0", size - 1)
    # macOS has no posix_fallocate.
    return not size or (hasattr(os, "posix_fallocate") and _works(os.posix_fallocate, fd, 0, size))


def free_bytes(place: Path) -> int | None:
    """Ask how much of a disk is free; None where it does not say."""
    try:
        usage = shutil.disk_usage(place)
    except OSError:
        return None
    return usage.free if usage.total else None  # some of FUSE say 0 of everything


def check_writable(place: Path) -> None:
    """Raise if no file can be made in a folder.

    Raises:
        OSError: says why.
    """
    # It asks about permission bits, which servers and FUSE overrule either way; only trying tells.
    if not os.access(place, os.W_OK | os.X_OK):
        Path(tempfile.mkdtemp(prefix=".ortho-", dir=place)).rmdir()


def check_name(name: str, place: Path, *, longest: str) -> None:
    """Refuse a name that would be too long once work gives it a longer one.

    Args:
        name: of the output.
        place: an existing folder on its file system.
        longest: the longest name that work makes of it.
    Raises:
        UsageError: says how many bytes it takes, and how many there are.
    """
    try:
        most = os.pathconf(place, "PC_NAME_MAX")
    except (OSError, ValueError):
        most = NAME_BYTES
    needed = len(os.fsencode(longest))
    if needed > most > 0:
        raise UsageError(
            f"output `{name}` is too long a name: with what is added while it is made it takes "
            f"{needed} bytes, and the file system takes {most}",
            hint=f"choose an -o whose name is {needed - most} bytes shorter",
        )
