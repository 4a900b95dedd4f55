"""Errors of `ortho`, one class per exit code.

    OrthoError                 1   unexpected
    ├── InternalError          1   unexpected: a bug of ours
    ├── UsageError             2   a flag or argument is wrong
    ├── RecipeError            3   the recipe is wrong, or does not fit the checkpoint
    ├── CheckpointError        4   the source cannot be read or cannot be split
    ├── CalibrationError       5   calibration data or statistics are unusable
    ├── ArtifactError          6   an artifact is damaged or its files do not belong together
    ├── NumericalError         7   NaN or infinity
    ├── OutputExistsError      8   something is already where the output should go
    ├── ResourceError          9   disk, memory, permission, or a server that does not answer
    ├── GateError             10   a figure missed what was required of it
    └── Interrupted          130   Ctrl-C (143 SIGTERM, 129 SIGHUP: 128 + the signal)

A message is one sentence in lower case that names the tensor or file and both values; `hint` says
what to do.
"""

from __future__ import annotations

import errno
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_STARVED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO})


def reason(error: Exception) -> str:
    """Give the reason why a file could not be read or written, as the end of a sentence."""
    text = str(getattr(error, "strerror", None) or error)
    return text[:1].lower() + text[1:]


def is_starved(error: BaseException) -> bool:
    """Return whether the system lacks something or a disk fails, so that no file is to blame."""
    return isinstance(error, OSError) and error.errno in _STARVED


# What to do about an error of the system.
_ELSEWHERE = "choose another -o"
_WAYS_OUT = {
    errno.EMFILE: "allow more of them with `ulimit -n 4096`, then repeat the same command",
    errno.ENFILE: "close other programs, or raise fs.file-max, then repeat the same command",
    errno.ENOMEM: "use fewer --workers or a lower density, or close other programs",
    errno.EIO: "look at that disk or its connection (`dmesg` says more), then repeat the same "
    "command",
    errno.ENAMETOOLONG: "give a shorter name, or a shorter -o: most systems allow 255 bytes a name",
    errno.ENOSPC: f"free space there, or {_ELSEWHERE} on another disk",
    errno.EDQUOT: f"your quota there is used up: free space, or {_ELSEWHERE} on another disk",
    errno.EROFS: f"that file system takes no writes: {_ELSEWHERE}",
    errno.EFBIG: f"the file system, or `ulimit -f`, takes no larger file: {_ELSEWHERE} on another "
    "disk",
    errno.EILSEQ: f"the file system does not take such a name: {_ELSEWHERE}",
    errno.EXDEV: f"it is on a lower layer of a container's image; move it away, or {_ELSEWHERE}",
    errno.ELOOP: "a link there leads round in a circle: give the path that it should lead to",
    errno.EISDIR: "it is a folder: give a file",
    errno.ENOTDIR: "a file is where a folder should be: check the path",
    errno.ESTALE: "the network disk lost it: mount it again, then repeat the same command",
    errno.ENOTCONN: "the network disk is gone: mount it again, then repeat the same command",
    errno.ETIMEDOUT: "the network disk does not answer: repeat the same command when it does",
    errno.E2BIG: "give fewer files, or a folder",
}


def way_out(error: OSError, otherwise: str, *, path: object = None) -> str:
    """Say what to do about an error of the system.

    Args:
        error: the error of the system.
        otherwise: what to do where its number tells nothing.
        path: the file that it happened to, where the error does not name it.
    """
    where = error.filename or path
    if error.errno in (errno.EACCES, errno.EPERM) and where:
        return f"`ls -ld {shlex.quote(str(where))}` shows who may read and write it"
    return _WAYS_OUT.get(error.errno or 0, otherwise)


def remedy(error: OSError) -> str:
    """Say what to do about a file that could not be written."""
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"look at your rights there, or {_ELSEWHERE}"
    return way_out(error, f"look at that file system, then repeat the command, or {_ELSEWHERE}")


def shown(value: object) -> str:
    """Spell a stranger's value for a sentence, however long it is."""
    try:
        text = repr(value)
    except ValueError:  # hexadecimal has no end, and Python spells no more than 4300 digits
        return f"a {type(value).__name__} of too many digits"
    return text if len(text) <= 60 else text[:57] + "..."


class OrthoError(Exception):
    """Base of all errors of `ortho`."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        """Keep the sentence and what to do about it."""
        super().__init__(message)
        self.message = message
        self.hint = hint


class InternalError(OrthoError):
    """A bug of ours: the result is not what it must be.

    An error and no assertion, since `python -O` removes assertions.
    """

    def __init__(self, message: str) -> None:
        """Keep the sentence; the hint is always the same."""
        super().__init__(message, hint="this is a bug of ours: please report it with the command")


class UsageError(OrthoError):
    """A flag or argument is wrong."""

    exit_code = 2


class RecipeError(OrthoError):
    """The recipe is wrong, or does not fit the checkpoint."""

    exit_code = 3


class CheckpointError(OrthoError):
    """The source cannot be read or cannot be split."""

    exit_code = 4


class CalibrationError(OrthoError):
    """Calibration data or statistics are unusable."""

    exit_code = 5


class ArtifactError(OrthoError):
    """An artifact is damaged or its files do not belong together."""

    exit_code = 6


class NumericalError(OrthoError):
    """A weight is NaN or infinite."""

    exit_code = 7


class OutputExistsError(OrthoError):
    """Something is already where the output should go."""

    exit_code = 8


class ResourceError(OrthoError):
    """Disk, memory or permission is missing, or a server does not answer."""

    exit_code = 9


class GateError(OrthoError):
    """A measured figure missed what was required of it."""

    exit_code = 10


class Interrupted(OrthoError):  # noqa: N818 - the field's word for Ctrl-C, not an error in the input
    """The user stopped the run; what is finished is kept."""

    exit_code = 130


def unreadable(
    path: Path, error: OSError, *, kind: type[OrthoError], hint: str, what: str = ""
) -> OrthoError:
    """Make the error of a file that could not be read: of class `kind`, or a ResourceError.

    Args:
        path: the file.
        error: the error of the system.
        kind: class of the error, where this file is to blame.
        hint: what to do then.
        what: a word on what the file is, and a space.
    """
    message = f"cannot read {what}`{error.filename or path}`: {reason(error)}"
    hint = way_out(error, hint, path=path)
    return ResourceError(message, hint=hint) if is_starved(error) else kind(message, hint=hint)


@contextmanager
def blamed(
    kind: type[OrthoError], *, path: Path | None = None, hint: str | None = None
) -> Iterator[None]:
    """Turn an error of the readers in storage into one of the kind of file that is read.

    Args:
        kind: class of the error that a CheckpointError becomes.
        path: the file; with it, an OSError becomes an error of that kind, too: see `unreadable`.
        hint: what to do about a file of that kind; the reader's own hint where none is given.
    """
    try:
        yield
    except CheckpointError as error:
        if kind is CheckpointError:
            raise
        raise kind(error.message, hint=hint or error.hint) from None
    except OSError as error:
        if path is None:
            raise
        raise unreadable(path, error, kind=kind, hint=hint or "may you read it?") from error
