"""Events: what a job reports to its caller while it runs; the core prints nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """Work begins; `resumed` of `tensors` were finished by an earlier run."""

    tensors: int
    resumed: int
    bytes_total: int
    bytes_done: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Advanced:
    """`nbytes` more of the input were read and processed."""

    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorDone:
    """One tensor is written."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Finishing:
    """A step of the work other than tensors begins, such as `sync`."""

    step: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Measuring:
    """Passes over data begin; `resumed` of `sequences` were measured by an earlier run."""

    sequences: int
    resumed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SequencesDone:
    """That many more sequences, of that many tokens, were measured."""

    sequences: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """`step` of `steps` of a stage of training were taken; `loss` in nats per token."""

    stage: str
    step: int
    steps: int
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class At:
    """The weight that is worked on now."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Step `number` of `of` begins: `name`; `unit` says what is counted."""

    name: str
    number: int
    of: int
    unit: str = "steps"


@dataclass(frozen=True, slots=True, kw_only=True)
class Noted:
    """A note to the user that needs no action."""

    message: str


Event = (
    Started
    | Advanced
    | At
    | TensorDone
    | Finishing
    | Measuring
    | SequencesDone
    | Training
    | Step
    | Noted
)
EventSink = Callable[[Event], None]


def messages(events: Iterable[Event]) -> list[str]:
    """Give the notes among events, in their order."""
    return [event.message for event in events if isinstance(event, Noted)]


def null_sink(event: Event) -> None:
    """Ignore every event."""
