"""Where words become a call, and errors exit codes: the one boundary around every command."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from types import FrameType, TracebackType
from typing import Any, NoReturn

from ortho_cli.errors import Interrupted, OrthoError, ResourceError, UsageError, reason, way_out

# Objects between two looks for garbage: imports make many, and none of it is any.
GARBAGE = 200_000

OPEN_FILES = 65_536  # more than any model has shards; some systems say a billion, and mean less
TEXTS = (
    "--set",
    "--prompt",
    "--require",
)  # options whose value is no path, whatever it begins with

# Beside Ctrl-C: what `kill`, schedulers and containers send, and a terminal that is closed (which
# nohup has us ignore).
STOPS = (signal.SIGTERM, signal.SIGHUP)


def spread(arguments: Sequence[str], many: Mapping[str, Sequence[str]]) -> list[str]:
    """Repeat an option of many values before each value, which is how click reads them.

    Args:
        arguments: the words after `ortho`, the command first.
        many: options of each command that take every word up to the next option.
    """
    options = many.get(arguments[0], ()) if arguments else ()
    found: list[str] = []
    current, fresh = "", False
    for word in arguments:
        # A number below 0 is a value, if a wrong one; no option looks like it.
        if word.startswith("-") and not re.match(r"-\.?\d", word):
            current, fresh = (word if word in options else ""), True
        elif current and not fresh:
            found.append(current)
        else:
            fresh = False
        found.append(word)
    return found


def expand_home(arguments: Sequence[str]) -> list[str]:
    """Put the home folder in place of `~` and `~user`, which shells do not behind `--out=`.

    A file that is really named `~` is `./~`. What is text and no path stays as it is.
    """
    found: list[str] = []
    before = ""
    for word in arguments:
        option, equals, value = word.partition("=")
        given = word
        if word.startswith("--") and equals:
            if option not in TEXTS and value.startswith("~"):
                given = f"{option}={os.path.expanduser(value)}"  # noqa: PTH111 - a word, no path
        elif re.match(r"-[A-Za-z]~", word):
            given = word[:2] + os.path.expanduser(word[2:])  # noqa: PTH111
        elif word.startswith("~") and before not in TEXTS:
            given = os.path.expanduser(word)  # noqa: PTH111
        found.append(given)
        before = word
    return found


def allow_open_files() -> None:
    """Let the process open as many files as it may; a sharded model can have hundreds."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
        if soft != resource.RLIM_INFINITY and soft < most:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def run(
    app: Callable[..., Any], arguments: Sequence[str], *, many: Mapping[str, Sequence[str]]
) -> int:
    """Run one command of an application and return its exit code."""
    try:
        code = app(
            args=spread(expand_home(arguments), many), prog_name="ortho", standalone_mode=False
        )
        if code == Interrupted.exit_code:  # typer turns Ctrl-C outside of the work into this
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except BaseException as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            sys.stderr.write(f"{error}\n")
            return UsageError.exit_code
        failure = _as_ortho_error(error)
        if failure is None:
            raise
        from ortho_cli import report

        report.print_error(failure)
        return failure.exit_code


def _as_ortho_error(error: BaseException) -> OrthoError | None:
    """Give every expected failure its sentence; None is a bug of ours, and shows its traceback."""
    if isinstance(error, OrthoError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return Interrupted("interrupted", hint="repeat the same command: nothing is lost")
    starved = ("can't allocate memory", "can't start new thread")  # torch's and Python's words
    if isinstance(error, MemoryError) or any(text in str(error) for text in starved):
        return ResourceError("out of memory", hint="use fewer --workers or a lower density")
    if isinstance(error, OSError):
        why = reason(error)
        return ResourceError(
            f"`{error.filename}`: {why}" if error.filename else why,
            hint=way_out(error, "check the file and its rights"),
        )
    shown = getattr(error, "format_message", None)
    if shown is not None:
        message = str(shown()).rstrip(".")
        return UsageError(message[:1].lower() + message[1:], hint="see `ortho --help`")
    return None


def _show_bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    from ortho_cli import report

    report.print_bug(kind, error, trace)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    os._exit(128 + number)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _unraisable(lost: sys.UnraisableHookArgs) -> None:
    if issubclass(lost.exc_type, KeyboardInterrupt):
        # A destructor or callback of a library swallowed it, and the run goes on as if not asked.
        signal.setitimer(signal.ITIMER_REAL, 0.01)
    else:
        sys.__unraisablehook__(lost)


def enter(command: Callable[[], int]) -> NoReturn:
    """Run a command as a process of its own: signals as at a terminal, its code the process's.

    What asks a run to stop ends it in good order the first time, and at once the second: work
    survives both.
    """
    allow_open_files()
    asked = [signal.SIGINT, *(s for s in STOPS if signal.getsignal(s) is not signal.SIG_IGN)]
    by = signal.SIGINT

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal by
        by = signal.Signals(number)
        for other in asked:
            signal.signal(other, _leave)
        raise KeyboardInterrupt

    for number in asked:
        signal.signal(number, stop)
    signal.signal(signal.SIGALRM, _interrupt)  # asks once more
    sys.unraisablehook = _unraisable
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `ortho inspect X | head` ends like any filter
    sys.excepthook = _show_bug
    gc.set_threshold(GARBAGE)
    try:
        code = command()
        for number in asked:
            signal.signal(number, _leave)
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
    except KeyboardInterrupt:  # asked behind its last word
        code = Interrupted.exit_code
    sys.stdout.flush()
    if code == Interrupted.exit_code:
        # Asked while it was starting one, a library may have left a thread that waits for ever.
        os._exit(128 + by)
    gc.freeze()  # a process that ends need not look for garbage once more
    sys.exit(code)
