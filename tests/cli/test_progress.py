from __future__ import annotations

import time

import pytest
from rich.console import Console

from ortho_cli.cli.show import progress
from ortho_cli.cli.show.progress import ProgressSink, Stage, clock
from ortho_cli.events import (
    Advanced,
    At,
    Event,
    Finishing,
    Measuring,
    Noted,
    SequencesDone,
    Started,
    Step,
    Training,
)

LAYER = At(name="model.layers.12.mlp.down_proj.weight")


def shown(*said: Event, width: int = 80, verb: str = "calibrate") -> str:
    """What a terminal of some width shows after events."""
    with ProgressSink(verb, quiet=False, verbose=False) as sink:
        for event in said:
            sink(event)
        console = Console(width=width, color_system=None)
        with console.capture() as captured:
            console.print(sink, end="")
    (line,) = captured.get().splitlines()
    return line.rstrip()


def test_line_has_counter_unit_time_left_memory_and_layer() -> None:
    line = shown(
        Measuring(sequences=16, resumed=0), SequencesDone(sequences=4, tokens=9), LAYER, width=100
    )
    assert line.startswith("calibrate ━")
    for part in (" 4/16 sequences, ", " left, ", "layers.12, ", "B memory, ", " tokens/s"):
        assert part in line
    line = shown(
        Started(tensors=2, resumed=1, bytes_total=4000, bytes_done=1000),
        Advanced(nbytes=1000),
        verb="decompose",
        width=100,
    )
    assert "2.0 kB of 4.0 kB, " in line
    assert "B/s" in line


@pytest.mark.parametrize("width", [30, 40, 60, 80, 200])
def test_no_part_of_a_line_is_cut_whatever_the_width(width: int) -> None:
    whole = (Measuring(sequences=128, resumed=0), SequencesDone(sequences=12, tokens=9), LAYER)
    line = shown(*whole, width=width)
    assert len(line) <= width
    assert "12/128 sequences" in line
    assert "..." not in line
    assert "…" not in line
    parts = {part.strip() for part in line.partition("12/128")[2].split(", ")}
    assert not parts & {"layer", "layers"}
    if width >= 40:
        assert any(part.endswith("left") for part in parts)


def test_time_left_is_there_after_the_first_unit_and_counts_no_earlier_run() -> None:
    now = time.monotonic()
    stage = Stage("calibrate", "sequences", 20, done=11, before=10, began=now - 60, seen=now)
    assert "9:00 left" in stage.parts()
    stage = Stage("calibrate", "sequences", 2, done=1, began=now - 90, seen=now - 30)
    assert "0:30 left" in stage.parts(), "it counts down while a unit is worked on"
    stage = Stage("calibrate", "sequences", 20, done=10, before=10, began=now - 75)
    assert "1:15" in stage.parts()
    assert clock(3661) == "1:01:01"


def test_a_stage_takes_over_nothing_from_the_one_before() -> None:
    line = shown(
        Finishing(step="sync"), Step(name="alpha 0", number=3, of=9), verb="bench", width=100
    )
    assert "sync" not in line
    assert "2/9 steps" in line
    assert "alpha 0" in line
    assert "?" not in shown(verb="bench")


def test_a_line_is_printed_now_and_then_where_no_event_comes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.2)
    with ProgressSink("calibrate", quiet=False, verbose=False) as sink:
        sink(Measuring(sequences=4, resumed=0))
        for _ in range(50):  # events print no line of their own
            sink(SequencesDone(sequences=0, tokens=1))
        time.sleep(0.5)
    lines = capsys.readouterr().err.splitlines()
    assert 1 <= len(lines) <= 3
    assert all(line.startswith("calibrate: 0/4 sequences, ") for line in lines)
    with ProgressSink("calibrate", quiet=True, verbose=False) as sink:
        sink(Noted(message="said"))
        time.sleep(0.3)
    assert capsys.readouterr().err == ""


def test_training_tells_each_stage_as_it_begins_and_ends(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with ProgressSink("build", quiet=False, verbose=False) as sink:
        for step in (1, 2, 3):
            sink(Training(stage="twin", step=step, steps=3, loss=2.0))
    assert len(capsys.readouterr().err.splitlines()) == 2
