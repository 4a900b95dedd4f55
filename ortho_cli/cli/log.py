"""The log of a command: `-v` and `-vv` on stderr, and what the variable ORTHO_LOG asks for.

    ORTHO_LOG=LEVEL          to stderr, from `debug`, `info` or `warning` on
    ORTHO_LOG=FILE           appends to a file, from `debug` on; a FILE has a `.` or `/` in its name
    ORTHO_LOG=LEVEL:FILE     appends to a file, from LEVEL on

A log is for reports of faults, and people send it to others. So no record holds a weight, a
position, a secret, a text, or a value of an option: of the command line it names the options, of an
error the class and the place in our code. The sentence of an error stays on stderr, since it can
name a file of secrets.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
import re
import stat
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from ortho_cli.errors import OutputExistsError, ResourceError, UsageError, reason, remedy
from ortho_cli.version import __version__

log = logging.getLogger(__name__)

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING}
LINE = re.compile(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z [A-Z]+ ortho_cli\b")
# Packages whose version can decide what a run does; none is imported to know it.
PACKAGES = (
    *("torch", "numpy", "numba", "triton", "transformers"),
    *("compressed-tensors", "gguf", "pyrage"),
)


def logged(command: Callable[..., None]) -> Callable[..., None]:
    """Keep a log while a command runs, where one is asked for."""

    @functools.wraps(command)
    def run(**arguments: object) -> None:
        verbose = arguments.get("verbose") if not arguments.get("quiet") else 0
        handlers = _handlers(verbose, os.environ.get("ORTHO_LOG", ""))
        if not handlers:
            return command(**arguments)
        usual = inspect.signature(command).parameters
        given = [name for name, value in arguments.items() if value != usual[name].default]
        given = [name for name in given if name != "invocation"]  # no option
        with _traced(handlers, command.__name__, given):
            return command(**arguments)

    # typer reads both three times, and would evaluate the text of each annotation each time.
    whole = inspect.signature(command, eval_str=True)
    run.__annotations__ = {one.name: one.annotation for one in whole.parameters.values()}
    vars(run)["__signature__"] = whole
    return run


def _handlers(verbose: object, wanted: str) -> dict[logging.Handler, int]:
    """Open what is asked for, each with the level from which it logs."""
    handlers: dict[logging.Handler, int] = {}
    if verbose:
        handlers[_Stderr()] = logging.INFO if verbose == 1 else logging.DEBUG
    if wanted:
        word, _, path = wanted.partition(":")
        level = LEVELS.get(word.lower())
        if level is None:
            level, path = logging.DEBUG, wanted
        place = os.path.expanduser(path)  # noqa: PTH111 - that of pathlib raises without a home
        handlers[_File(Path(place)) if path else _Stderr()] = level
    return handlers


@contextmanager
def _traced(
    handlers: Mapping[logging.Handler, int], name: str, given: Sequence[str]
) -> Iterator[None]:
    """Give the package's records to handlers, for as long as one command runs.

    Versions and the names of options come first, and last how the command ended.
    """
    import platform
    import traceback

    package = logging.getLogger("ortho_cli")
    before, began = package.level, time.perf_counter()
    package.setLevel(min(handlers.values()))
    form = _Line(
        "%(asctime)s.%(msecs)03dZ %(levelname)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S"
    )
    for handler, level in handlers.items():
        handler.setLevel(level)
        handler.setFormatter(form)
        package.addHandler(handler)
    try:
        system = (__version__, platform.python_version(), platform.platform())
        log.info("ortho %s, python %s, %s", *system)
        log.info("packages: %s; %s cores", ", ".join(map(_version, PACKAGES)), os.cpu_count())
        log.info("%s with %s", name, ", ".join(given) or "defaults")
        yield
        log.info("done after %.3f s", time.perf_counter() - began)
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        places = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames]
        log.debug("raised at %s", " > ".join(places))
        code = getattr(error, "exit_code", None)
        ended = time.perf_counter() - began
        log.warning("ended by %s, exit code %s, after %.3f s", type(error).__name__, code, ended)
        raise
    finally:
        package.setLevel(before)
        for handler in handlers:
            package.removeHandler(handler)
            handler.close()


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} absent"


class _Line(logging.Formatter):
    """One line per record, in UTC, with names from files escaped."""

    converter = staticmethod(time.gmtime)

    def format(self, record: logging.LogRecord) -> str:
        from ortho_cli.cli.show.console import visible

        return visible(super().format(record))


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to what stderr is at that moment: a progress bar puts its own stream there."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


class _File(logging.StreamHandler[TextIO]):
    """Appends to a file that only its owner may read; a full disk ends the log, never the work."""

    def __init__(self, path: Path) -> None:
        self._path = path
        super().__init__(_open(path))

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        from ortho_cli.cli.show.console import print_notes

        logging.getLogger("ortho_cli").removeHandler(self)
        print_notes(f"the log `{self._path}` cannot be written, and ends here")

    def close(self) -> None:
        with suppress(OSError):  # what a full disk left in the buffer
            self.stream.close()
        super().close()


def _open(path: Path) -> TextIO:
    """Open a log to append to it; what exists there and is no log of ours stays untouched."""
    if not re.search(r"[./]", str(path)):
        raise UsageError(
            f"ORTHO_LOG is `{path}`, which is neither a level nor a file",
            hint=f"give {', '.join(LEVELS)}, or a file as `./{path}`",
        )
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK, 0o600)
    except OSError as error:
        raise ResourceError(
            f"cannot write the log `{path}` of ORTHO_LOG: {reason(error)}", hint=remedy(error)
        ) from error
    is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
    start = os.pread(descriptor, 64, 0) if is_file else b""
    if not is_file or (start and not LINE.match(start)):
        os.close(descriptor)
        raise OutputExistsError(
            f"`{path}` of ORTHO_LOG exists and is no log of ortho",
            hint="give a new file; ORTHO_LOG=debug logs to stderr",
        )
    return os.fdopen(descriptor, "a", encoding="utf-8", errors="backslashreplace")
