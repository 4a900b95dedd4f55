"""Progress of a running command: a bar on a terminal; elsewhere a line every few seconds."""

from __future__ import annotations

import logging
import time

from rich import progress
from rich.progress import Progress, TextColumn

from ortho_cli import events
from ortho_cli.cli.show.console import make_console, visible

log = logging.getLogger(__name__)

LINE_SECONDS = 10.0  # between lines about training or steps, where there is no bar


class ProgressSink:
    """Shows events as a bar and notes; with `verbose`, the name of each finished tensor."""

    def __init__(self, verb: str, *, quiet: bool, verbose: bool) -> None:
        """Start at `verb`, the command or stage that the bar names."""
        self._console = make_console()
        self._verb = verb
        self._quiet, self._verbose = quiet, verbose
        self._bar: Progress | None = None
        self._stage = ""
        self._said = self._began_step = time.monotonic()
        self._step_name = verb
        if self._console.is_terminal and not quiet:
            self._bar = self._make_bar(progress.DownloadColumn(), progress.TransferSpeedColumn())
            self._task = self._bar.add_task(verb, total=None)

    def _make_bar(self, *columns: progress.ProgressColumn) -> Progress:
        name = TextColumn("{task.description}", markup=False)
        shown = (name, progress.BarColumn(), *columns, progress.TimeRemainingColumn())
        return Progress(*shown, console=self._console, transient=True)

    def __enter__(self) -> ProgressSink:
        """Start the bar."""
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Take the bar away."""
        if self._bar:
            self._bar.stop()
        self._log_step()

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
            case events.Advanced() if self._bar:
                self._bar.advance(self._task, event.nbytes)
            case events.TensorDone():
                log.debug("%s: finished %s", self._verb, event.name)
                if self._verbose:
                    self._say(event.name)
            case events.Noted():
                self._say(f"note: {event.message}")

    def _start(self, event: events.Started) -> None:
        done, total, before = event.bytes_done, event.bytes_total, event.resumed
        log.info("%s: %d tensors, %d done before", self._verb, event.tensors, before)
        log.info("%s: %d of %d bytes done before", self._verb, done, total)
        if self._bar:
            self._bar.update(self._task, total=total, completed=done)
        if before:
            self._say(f"continuing: {before} of {event.tensors} tensors were finished before")

    def _finish(self, event: events.Finishing) -> None:
        self._log_step()
        self._step_name = event.step
        if self._bar:
            self._bar.update(self._task, description=visible(event.step))

    def _log_step(self) -> None:
        now = time.monotonic()
        log.info("%s: `%s` took %.3f s", self._verb, self._step_name, now - self._began_step)
        self._began_step = now

    def _count(self, event: events.Measuring | events.SequencesDone) -> None:
        """Show passes over data: sequences, tokens a second, time left."""
        if isinstance(event, events.Measuring):
            total, before = event.sequences, event.resumed
            log.info("%s: %d sequences, %d done before", self._verb, total, before)
            if self._bar:
                self._bar = self._counter(self._bar, self._verb, total)
                self._bar.update(self._task, completed=before, rest="sequences")
            self._began, self._tokens = time.monotonic(), 0
            if before:
                self._say(f"continuing: {before} of {total} sequences were measured before")
            return
        self._tokens += event.tokens
        speed = f"{self._tokens / max(1e-9, time.monotonic() - self._began):,.0f}"
        if self._bar:
            rest = f"sequences, {speed} tokens/s"
            self._bar.update(self._task, advance=event.sequences, rest=rest)
        elif self._verbose:
            self._say(f"{event.sequences} more sequences, {speed} tokens/s")

    def _counter(self, bar: Progress, description: str, total: int) -> Progress:
        """Put a bar that counts in the place of the one before."""
        bar.stop()
        rest = TextColumn("{task.fields[rest]}", markup=False)
        bar = self._make_bar(progress.MofNCompleteColumn(), rest)
        self._task = bar.add_task(visible(description), total=total, rest="")
        bar.start()
        return bar

    def _train(self, event: events.Training) -> None:
        loss, fresh, last = event.loss, event.stage != self._stage, event.step == event.steps
        if last:
            log.debug("%s: loss %.4g after %d steps", event.stage, loss, event.steps)
        line = f"{event.stage}: step {event.step} of {event.steps}, loss {loss:.3f}"
        rest = f"steps, loss {loss:.3f}"
        self._go_on(event.stage, event.step, event.steps, rest, line, now=fresh or last)

    def _step(self, event: events.Step) -> None:
        log.debug("%s: %d of %d: %s", self._verb, event.number, event.of, event.name)
        done, rest = event.number - 1, visible(event.name)
        line = f"{event.number} of {event.of}: {event.name}"
        self._go_on(self._verb, done, event.of, rest, line, now=self._verbose)

    def _go_on(self, stage: str, done: int, total: int, rest: str, line: str, *, now: bool) -> None:
        """Show how far a stage is; without a bar by a line, at once or now and then."""
        if self._bar:
            if stage != self._stage:
                self._bar = self._counter(self._bar, stage, total)
            self._bar.update(self._task, completed=done, total=total, rest=rest)
        elif now or time.monotonic() - self._said > LINE_SECONDS:
            self._said = time.monotonic()
            self._say(line)
        self._stage = stage

    def _say(self, line: str) -> None:
        if not self._quiet:
            self._console.print(visible(line), soft_wrap=True)
