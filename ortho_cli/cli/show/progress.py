"""Progress of a running command: one line that a terminal redraws; elsewhere a line now and then.

    calibrate ━━━━━━━━━━━━ 12/16 sequences, 1:12 left, 1.9 GB memory, layers.3

The time left follows from the mean speed since the stage began, so that it is there as soon as one
unit is done. Memory is what the process holds now. What does not fit the terminal is left out
whole, the least important part first: no number is ever cut.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from rich.console import Console, ConsoleOptions
from rich.live import Live
from rich.text import Text

from ortho_cli import events
from ortho_cli.cli.show.console import make_console, size, visible
from ortho_cli.storage.machine import resident_bytes

log = logging.getLogger(__name__)

LINE_SECONDS = 10.0  # between lines where there is no terminal
BYTES = "bytes"
BAR = 24  # columns of a bar at most
SHORTEST_BAR = 10  # on a terminal of ROOMY columns it comes before the less important parts
ROOMY = 60
STEPS = {  # how steps are named that follow the tensors
    "sync": "wait for the disk",
    "digests": "check the source",
    "compact": "pack ortho",
    "seal": "seal ortho",
    "write": "write statistics",
}
_LAYER = re.compile(r"(?:^|\.)((?:layers|layer|h|blocks|block)\.\d+)\.")


@dataclass
class Stage:
    """How far one stage of the work is."""

    name: str
    unit: str = BYTES
    total: int | None = None  # None where nothing is known yet
    done: int = 0
    before: int = 0  # done by an earlier run
    detail: str = ""
    tokens: int = 0
    began: float = field(default_factory=time.monotonic)
    seen: float = field(default_factory=time.monotonic)  # when `done` was counted last

    def reach(self, done: int) -> None:
        """Count so much as done."""
        if done != self.done:
            self.done, self.seen = done, time.monotonic()

    def parts(self) -> list[str]:
        """List what there is to say, the most important first."""
        seconds = time.monotonic() - self.began
        found = [self._count(), *self._left(seconds), f"{size(resident_bytes() or 0)} memory"]
        if self.detail:
            found.insert(2, visible(self.detail))
        if self.tokens and seconds > 0:
            found.append(f"{self.tokens / seconds:,.0f} tokens/s")
        elif self.unit == BYTES and self.done > self.before:
            found.append(f"{size((self.done - self.before) / max(seconds, 1e-9))}/s")
        return [part for part in found if part]

    def _count(self) -> str:
        if self.total is None:
            return ""
        if self.unit == BYTES:
            return f"{size(self.done)} of {size(self.total)}"
        return f"{self.done}/{self.total} {self.unit}"

    def _left(self, seconds: float) -> Iterator[str]:
        """Say how long it still takes, or how long it has taken where that is unknown."""
        new = self.done - self.before
        if self.total is not None and new > 0:
            each = (self.seen - self.began) / new
            since = seconds - (self.seen - self.began)  # of the unit that is worked on
            yield f"{clock(max(0.0, each * (self.total - self.done) - since))} left"
        else:
            yield clock(seconds)


def clock(seconds: float) -> str:
    """Spell a time as 1:12, or 2:01:12 from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def fit(parts: list[str], width: int) -> str:
    """Join as many parts as a line has room for, the first ones first."""
    line = ""
    for part in parts:
        longer = f"{line}, {part}" if line else part
        if len(longer) <= width:
            line = longer
    return line


class ProgressSink:
    """Shows events as one line and notes; with `verbose`, the name of each finished tensor."""

    def __init__(self, verb: str, *, quiet: bool, verbose: bool) -> None:
        """Start at `verb`, the command or stage that is named first."""
        self._console = make_console(stderr=True)
        self._verb = verb
        self._quiet, self._verbose = quiet, verbose
        self._stage = Stage(verb)
        self._said = self._began_step = time.monotonic()
        self._step_name = verb
        self._over = threading.Event()
        self._live: Live | None = None
        if self._console.is_terminal and not quiet:
            self._live = Live(self, console=self._console, transient=True, refresh_per_second=4)

    def __enter__(self) -> ProgressSink:
        """Show the line, or begin to print one now and then."""
        if self._live:
            self._live.start()
        elif not self._quiet:
            threading.Thread(target=self._keep_saying, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        """Take the line away."""
        self._over.set()
        if self._live:
            self._live.stop()
        self._log_step()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        """Draw the line: name, bar and what else fits."""
        stage, width = self._stage, options.max_width
        text = Text(visible(stage.name), no_wrap=True, overflow="crop")
        kept = 1 + SHORTEST_BAR if stage.total and width >= ROOMY else 0
        line = fit(stage.parts(), width - len(text) - 1 - kept)
        room = min(BAR, width - len(text) - len(line) - 2)
        if stage.total and room >= SHORTEST_BAR:
            full = min(room, room * stage.done // stage.total)
            mark = "#" if options.ascii_only else "━"
            text.append(" ").append(mark * full, "bar.complete")
            text.append(("-" if options.ascii_only else mark) * (room - full), "bar.back")
        yield text.append(" ").append(line)

    def __call__(self, event: events.Event) -> None:
        """Show one event, and log it; no note is logged, since it can name a file of secrets."""
        match event:
            case events.Started():
                self._start(event)
            case events.Measuring() | events.SequencesDone():
                self._count(event)
            case events.Training():
                self._train(event)
            case events.Step():
                self._step(event)
            case events.Finishing():
                self._finish(event)
            case events.Advanced():
                self._stage.reach(self._stage.done + event.nbytes)
            case events.At() | events.TensorDone():
                self._work_on(event)
            case events.Noted():
                self._say(f"note: {event.message}")

    def _start(self, event: events.Started) -> None:
        done, total, before = event.bytes_done, event.bytes_total, event.resumed
        log.info("%s: %d tensors, %d done before", self._verb, event.tensors, before)
        log.info("%s: %d of %d bytes done before", self._verb, done, total)
        self._stage = Stage(self._verb, total=total, done=done, before=done)
        if before:
            self._say(f"continuing: {before} of {event.tensors} tensors were finished before")

    def _work_on(self, event: events.At | events.TensorDone) -> None:
        self._stage.detail = layer_of(event.name)
        if isinstance(event, events.TensorDone):
            log.debug("%s: finished %s", self._verb, event.name)
            if self._verbose:
                self._say(event.name)

    def _finish(self, event: events.Finishing) -> None:
        self._log_step()
        self._step_name = event.step
        self._stage = Stage(f"{self._verb}: {STEPS.get(event.step, event.step)}")

    def _log_step(self) -> None:
        now = time.monotonic()
        log.info("%s: `%s` took %.3f s", self._verb, self._step_name, now - self._began_step)
        self._began_step = now

    def _count(self, event: events.Measuring | events.SequencesDone) -> None:
        """Count passes over data: sequences, and tokens per second."""
        if isinstance(event, events.Measuring):
            total, before = event.sequences, event.resumed
            log.info("%s: %d sequences, %d done before", self._verb, total, before)
            self._stage = Stage(self._verb, "sequences", total, before, before)
            if before:
                self._say(f"continuing: {before} of {total} sequences were measured before")
            return
        self._stage.reach(self._stage.done + event.sequences)
        self._stage.tokens += event.tokens
        if self._verbose and not self._live:
            self._say_stage()

    def _train(self, event: events.Training) -> None:
        loss, last = event.loss, event.step == event.steps
        if last:
            log.debug("%s: loss %.4g after %d steps", event.stage, loss, event.steps)
        fresh = self._go_on(event.stage, "steps", event.step, event.steps, f"loss {loss:.3f}")
        if (fresh or last) and not self._live:
            self._say_stage()

    def _step(self, event: events.Step) -> None:
        log.debug("%s: %d of %d: %s", self._verb, event.number, event.of, event.name)
        self._go_on(self._verb, event.unit, event.number - 1, event.of, event.name)
        if self._verbose and not self._live:
            self._say(f"{event.number} of {event.of}: {event.name}")

    def _go_on(self, name: str, unit: str, done: int, total: int, detail: str) -> bool:
        """Move the stage on, or begin another one; return whether it is new."""
        fresh = (self._stage.name, self._stage.unit) != (name, unit) or self._stage.total != total
        if fresh:
            self._stage = Stage(name, unit, total, done, done)
        self._stage.reach(done)
        self._stage.detail = detail
        return fresh

    def _keep_saying(self) -> None:
        """Print a line every LINE_SECONDS while nothing else is printed."""
        while not self._over.wait(max(0.1, self._said + LINE_SECONDS - time.monotonic())):
            if time.monotonic() - self._said >= LINE_SECONDS:
                self._say_stage()

    def _say_stage(self) -> None:
        self._said = time.monotonic()
        self._say(f"{self._stage.name}: {', '.join(self._stage.parts())}")

    def _say(self, line: str) -> None:
        if not self._quiet:
            self._console.print(visible(line), soft_wrap=True)


def layer_of(name: str) -> str:
    """Name the layer of a tensor, or the tensor where its name has none."""
    found = _LAYER.search(name)
    return found[1] if found else name
