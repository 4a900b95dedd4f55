"""The boundary of the process: arguments to a call, errors to exit codes, streams, signals.

Standard streams that are closed or full never end a run, signals end it in good order, and the
limit of open files is raised.
"""

from __future__ import annotations

import contextlib
import gc
import io
import os
import re
import select
import shlex
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from types import FrameType, TracebackType
from typing import NoReturn

from ortho_cli.errors import Interrupted, OrthoError, ResourceError, UsageError, reason, way_out
from ortho_cli.storage.machine import settle_threads

# Allocations before garbage is collected; Python collects after hundreds, and an import makes
# thousands of objects that all stay.
GARBAGE = 200_000

SETTING = ("calibrate", "decompose", "inspect")  # commands with --set
TEXTS = ("--set", "--prompt", "--require")  # options whose value is text, not a path

# Beside Ctrl-C: what `kill`, schedulers and containers send, and a terminal that is closed (which
# nohup has us ignore).
STOPS = (signal.SIGTERM, signal.SIGHUP)

# Open files: one for each shard of source and output, of which a model can have a thousand. A
# higher limit would slow programs that close every descriptor up to it.
OPEN_FILES = 65_536


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
    """Replace `~` and `~user` by the home folder, which shells do not do after `--out=`.

    A file that is really named `~` is `./~`. Options in TEXTS keep their value.
    """
    found: list[str] = []
    for before, word in pairwise(["", *arguments]):
        # A value with its option before it: `--out=~`, `-o~`, or as a word of its own.
        parts = re.fullmatch(r"(--[^=]*=|-[A-Za-z]|)(~.*)", word, re.DOTALL)
        if parts and (parts[1].rstrip("=") or before) not in TEXTS:
            found.append(parts[1] + os.path.expanduser(parts[2]))  # noqa: PTH111 - a word, no path
        else:
            found.append(word)
    return found


def _refuse_empty(words: Sequence[str]) -> None:
    """Refuse an empty argument, which would be taken for the current folder.

    Raises:
        UsageError: one is empty, but for a text.
    """
    for before, word in pairwise(["", *words]):
        option = before if not word else word.removesuffix("=")
        ends = not word or re.fullmatch(r"--[a-z-]+=", word) is not None
        if ends and option not in TEXTS:
            of = f"the value of {option}" if option.startswith("-") else "an argument"
            raise UsageError(f"{of} is empty", hint="is a variable of the shell not set?")


def run(
    app: Callable[..., object], arguments: Sequence[str], *, many: Mapping[str, Sequence[str]]
) -> int:
    """Run one command of an application and return its exit code."""
    words = expand_home(arguments)
    try:
        _refuse_empty(words)
        code = app(args=spread(words, many), prog_name="ortho", standalone_mode=False)
        if code == Interrupted.exit_code:  # typer turns Ctrl-C outside of the work into this
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except ClosedPipe:  # the reader of stdout has closed it
        return 128 + signal.SIGPIPE
    except BaseException as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            sys.stderr.write(f"{error}\n")
            return UsageError.exit_code
        failure = _as_ortho_error(error, words, many)
        if failure is None:
            raise
        from ortho_cli.cli.show import console

        console.print_error(failure)
        return failure.exit_code


def _as_ortho_error(
    error: BaseException, words: Sequence[str], many: Mapping[str, Sequence[str]]
) -> OrthoError | None:
    """Turn an expected failure into a sentence; None for a bug, which shows its traceback."""
    if isinstance(error, OrthoError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return Interrupted(
            "interrupted", hint="nothing new was written; repeat the same command to start again"
        )
    starved = ("can't allocate memory", "can't start new thread")  # torch's and Python's words
    if isinstance(error, MemoryError) or any(text in str(error) for text in starved):
        return ResourceError("out of memory", hint="use fewer --workers or a lower density")
    if isinstance(error, OSError):
        why = reason(error)
        return ResourceError(
            f"`{error.filename}`: {why}" if error.filename else why,
            hint=way_out(error, "check the file and its rights"),
        )
    if hasattr(error, "format_message"):
        return _as_usage_error(error, words, many)
    return None


def _as_usage_error(
    error: BaseException, words: Sequence[str], many: Mapping[str, Sequence[str]]
) -> UsageError:
    """Turn an error of typer into a sentence, with the usage of that command as its hint."""
    shown, context = getattr(error, "format_message"), getattr(error, "ctx", None)  # noqa: B009
    message = re.sub(r", unable to parse string .*", "", str(shown()).rstrip("."))
    message = message[:1].lower() + message[1:].replace(": Input should", ": it should")
    if context is None:
        of = f"{words[0]} " if words and not words[0].startswith("-") else ""
        return UsageError(message, hint=f"see `ortho {of}--help`")
    from ortho_cli.cli.help import usage

    at = _last_of_many(words, many) if type(error).__name__ == "MissingParameter" else None
    if at is not None:
        option = next(word for word in reversed(words[:at]) if word.startswith("-"))
        better = shlex.join((words[0], words[at], *words[1:at], *words[at + 1 :]))
        return UsageError(
            f"{message}: {option} took `{words[at]}`", hint=f"it comes first: `ortho {better}`"
        )
    if settings := _settings_named(error, words):
        message = message.partition(" (")[0]  # without options that are spelled a little like it
        return UsageError(message, hint=f"it is a setting of recipes: {' or '.join(settings)}")
    says = f"`{context.command_path} --help` says more"
    return UsageError(message, hint=f"usage: {usage(context)}; {says}")


def _settings_named(error: BaseException, words: Sequence[str]) -> list[str]:
    """Find the settings of recipes that an option is named like, where the command takes --set."""
    option = getattr(error, "option_name", "")
    if type(error).__name__ != "NoSuchOption" or not words or words[0] not in SETTING:
        return []
    from ortho_cli.cli.options import complete_setting

    wanted = option.lstrip("-").replace("-", "_")
    keys = (key.rstrip("=") for key in complete_setting(""))
    return [f"--set {key}=VALUE" for key in keys if key.rpartition(".")[2] == wanted]


def _last_of_many(words: Sequence[str], many: Mapping[str, Sequence[str]]) -> int | None:
    """Find the last word that an option of many values took beside another one."""
    options = many.get(words[0], ()) if words else ()
    found, current, taken = None, "", 0
    for at, word in enumerate(words):
        if word.startswith("-"):
            current, taken = word, 0
        else:
            taken += 1
            if current in options and taken > 1:
                found = at
    return found


def _show_bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    from ortho_cli.cli.show import console

    console.print_bug(kind, error, trace)


class ClosedPipe(BaseException):
    """The reader of stdout is gone; not an OSError, which click would end with exit code 1."""


class _Stream(io.TextIOBase):
    """Stdout or stderr, unbuffered.

    Python's own objects are None where a stream was closed at start, raise in the middle of work
    where a terminal has gone, and raise once more when the interpreter ends.
    """

    errors = "backslashreplace"

    def __init__(self, fd: int, encoding: str, failed: Callable[[OSError], None]) -> None:
        self._fd, self._encoding, self._failed = fd, encoding, failed
        self._is_dead = False

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._encoding

    def fileno(self) -> int:
        return self._fd

    def isatty(self) -> bool:
        return os.isatty(self._fd)

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if not isinstance(text, str):
            raise TypeError(f"write() takes text, not {type(text).__name__}")
        data = memoryview(text.encode(self._encoding, self.errors))
        while data and not self._is_dead:
            try:
                data = data[os.write(self._fd, data) :]
            except BlockingIOError:  # another program made the pipe or terminal so
                ready = select.poll()  # select() takes no descriptor above 1023
                ready.register(self._fd, select.POLLOUT)
                ready.poll()
            except OSError as error:
                self._is_dead = True
                self._failed(error)
        return len(text)


def _lose_result(error: OSError) -> None:
    if isinstance(error, BrokenPipeError):
        raise ClosedPipe
    raise ResourceError(
        f"cannot write to stdout: {reason(error)}",
        hint="see where stdout goes: a full disk, or a terminal that is gone",
    )


def _lose_progress(error: OSError) -> None:
    """Ignore it: the work does not need stderr."""


def _take_streams() -> None:
    """Open closed ones of stdin, stdout and stderr on /dev/null, and let none end a run.

    Otherwise a data file would get the descriptor of a closed stream, and receive what is printed.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            with contextlib.suppress(OSError):
                # The lowest number that is free, which is this one.
                os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for name, fd, failed in (("stdout", 1, _lose_result), ("stderr", 2, _lose_progress)):
        encoding = getattr(getattr(sys, name), "encoding", None) or "utf-8"
        setattr(sys, name, _Stream(fd, encoding, failed))
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: SIM115, PTH123 - for as long as the process lives


def _take_names() -> None:
    """Restart Python in UTF-8 mode where the locale's encoding is another.

    Names in an index, a config and on disk are UTF-8; output keeps the encoding of the terminal.
    """
    if sys.getfilesystemencoding() == "utf-8" or not sys.executable:
        return
    spoken = getattr(sys.stdout or sys.stderr, "encoding", None) or "ascii"
    environment = {"PYTHONIOENCODING": f"{spoken}:backslashreplace", **os.environ}
    command = [sys.executable, "-X", "utf8", *sys.orig_argv[1:]]
    os.execve(sys.executable, command, environment)


def _take_files() -> None:
    """Raise the limit of open files of this process to OPEN_FILES, as far as the system allows."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    os._exit(128 + number)


def _unraisable(lost: sys.UnraisableHookArgs) -> None:
    if issubclass(lost.exc_type, KeyboardInterrupt):
        # A destructor or callback of a library swallowed the interrupt: send it again.
        signal.setitimer(signal.ITIMER_REAL, 0.01)
    else:
        sys.__unraisablehook__(lost)


def enter(command: Callable[[], int]) -> NoReturn:
    """Run a command as this process, and exit with its code.

    The first signal of STOPS or Ctrl-C ends the run in good order, a second one at once; finished
    tensors survive both.
    """
    _take_names()
    _take_streams()  # before anything is opened
    _take_files()
    settle_threads(os.environ)  # before torch is loaded
    asked = [s for s in (signal.SIGINT, *STOPS) if signal.getsignal(s) is not signal.SIG_IGN]
    by = signal.SIGINT

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal by
        by = signal.Signals(number)
        for other in asked:
            signal.signal(other, _leave)
        raise KeyboardInterrupt

    for number in asked:
        signal.signal(number, stop)
    signal.signal(signal.SIGALRM, signal.default_int_handler)  # sent again by `_unraisable`
    sys.unraisablehook = _unraisable
    # A reader that has gone must not end work in the middle: `ortho decompose X 2>&1 | head`.
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    sys.excepthook = _show_bug
    gc.set_threshold(GARBAGE)
    try:
        code = command()
        for number in asked:
            signal.signal(number, _leave)
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
    except KeyboardInterrupt:  # it came after the command had ended
        code = Interrupted.exit_code
    if code == 128 + signal.SIGPIPE:  # `ortho inspect X --json | head` ends like any filter
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGPIPE)
    if code == Interrupted.exit_code:
        # A library that was interrupted may have left a thread that waits for ever.
        os._exit(128 + by)
    gc.freeze()  # a process that ends need not collect garbage
    sys.exit(code)
