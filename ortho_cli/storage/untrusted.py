"""Files of strangers: only regular ones are opened, and their code runs only when it is trusted."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import BinaryIO

_TRUSTED = ContextVar("trusted", default=False)


@contextmanager
def trusting(code: bool) -> Iterator[None]:
    """Set whether models that are loaded within may run the Python in their folders."""
    before = _TRUSTED.set(code)
    try:
        yield
    finally:
        _TRUSTED.reset(before)


def is_trusted() -> bool:
    """Tell whether code beside weights may run; transformers asks where it is not told."""
    return _TRUSTED.get()


def open_regular(path: Path) -> BinaryIO:
    """Open a file to read its bytes; a FIFO or device under its name would keep us waiting.

    Raises:
        OSError: it cannot be read, or is no regular file; says which file and why.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # opens a FIFO without a writer
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(fd, "rb")


def read_regular(path: Path) -> bytes:
    """Read a file whole; see `open_regular`."""
    with open_regular(path) as file:
        return file.read()
