"""Progress of a running command: a bar on a terminal; elsewhere a line every few seconds."""

from __future__ import annotations

import logging
import time
from types import TracebackType

from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from ortho_cli.cli.show.console import make_console, visible
from ortho_cli.events import (
    Advanced,
    Event,
    Finishing,
    Measuring,
    Noted,
    SequencesDone,
    Started,
    Step,
    TensorDone,
    Training,
)

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
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._task = self._bar.add_task(verb, total=None)

    def __enter__(self) -> ProgressSink:
        """Start the bar."""
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take the bar away."""
        if self._bar:
            self._bar.stop()
        self._log_step()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        self._log(event)
        if isinstance(event, Measuring | SequencesDone):
            self._count(event)
        elif isinstance(event, Training):
            self._train(event)
        elif isinstance(event, Step):
            self._step(event)
        elif self._bar:
            self._move(self._bar, event)
        if isinstance(event, Started) and event.resumed:
            self._say(
                f"continuing: {event.resumed} of {event.tensors} tensors were finished before"
            )
        elif isinstance(event, Measuring) and event.resumed:
            self._say(
                f"continuing: {event.resumed} of {event.sequences} sequences were measured before"
            )
        elif isinstance(event, TensorDone) and self._verbose:
            self._say(event.name)
        elif isinstance(event, Noted):
            self._say(f"note: {event.message}")

    def _log(self, event: Event) -> None:
        """Log stages and their times; no note, since it can name a file of secrets."""
        if isinstance(event, Started):
            done, total = event.bytes_done, event.bytes_total
            log.info("%s: %d tensors, %d done before", self._verb, event.tensors, event.resumed)
            log.info("%s: %d of %d bytes done before", self._verb, done, total)
        elif isinstance(event, Measuring):
            before = event.resumed
            log.info("%s: %d sequences, %d done before", self._verb, event.sequences, before)
        elif isinstance(event, Finishing):
            self._log_step()
            self._step_name = event.step
        elif isinstance(event, Step):
            log.debug("%s: %d of %d: %s", self._verb, event.number, event.of, event.name)
        elif isinstance(event, Training) and event.step == event.steps:
            log.debug("%s: loss %.4g after %d steps", event.stage, event.loss, event.steps)
        elif isinstance(event, TensorDone):
            log.debug("%s: finished %s", self._verb, event.name)

    def _log_step(self) -> None:
        now = time.monotonic()
        log.info("%s: `%s` took %.3f s", self._verb, self._step_name, now - self._began_step)
        self._began_step = now

    def _count(self, event: Measuring | SequencesDone) -> None:
        """Show passes over data: sequences, tokens a second, time left."""
        if isinstance(event, Measuring):
            if self._bar:
                self._bar = self._counter(self._bar, self._verb, event.sequences)
                self._bar.update(self._task, completed=event.resumed, rest="sequences")
            self._began, self._tokens = time.monotonic(), 0
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
        bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rest]}", markup=False),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._task = bar.add_task(visible(description), total=total, rest="")
        bar.start()
        return bar

    def _train(self, event: Training) -> None:
        """Show a stage of training: steps, loss, time left; without a bar a line now and then."""
        fresh, self._stage = event.stage != self._stage, event.stage
        if self._bar:
            if fresh:
                self._bar = self._counter(self._bar, event.stage, event.steps)
            rest = f"steps, loss {event.loss:.3f}"
            self._bar.update(self._task, completed=event.step, rest=rest)
        elif fresh or event.step == event.steps or time.monotonic() - self._said > LINE_SECONDS:
            self._said = time.monotonic()
            self._say(f"{event.stage}: step {event.step} of {event.steps}, loss {event.loss:.3f}")

    def _step(self, event: Step) -> None:
        """Show which part of a run begins; without a bar a line now and then."""
        if self._bar:
            if self._stage != self._verb:
                self._bar = self._counter(self._bar, self._verb, event.of)
            self._bar.update(self._task, completed=event.number - 1, total=event.of)
            self._bar.update(self._task, rest=visible(event.name))
        elif self._verbose or time.monotonic() - self._said > LINE_SECONDS:
            self._said = time.monotonic()
            self._say(f"{event.number} of {event.of}: {event.name}")
        self._stage = self._verb

    def _move(self, bar: Progress, event: Event) -> None:
        if isinstance(event, Started):
            bar.update(self._task, total=event.bytes_total, completed=event.bytes_done)
        elif isinstance(event, Advanced):
            bar.advance(self._task, event.nbytes)
        elif isinstance(event, Finishing):
            bar.update(self._task, description=visible(event.step))

    def _say(self, line: str) -> None:
        if not self._quiet:
            self._console.print(visible(line), soft_wrap=True)
