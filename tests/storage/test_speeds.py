"""Speeds of this machine: timed once, kept in the user's cache, and never in the way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ortho_cli.storage import speeds
from ortho_cli.storage.speeds import open_speeds


class Stopwatch:
    """Says that a piece of work took so long, and counts how often it was asked."""

    def __init__(self, seconds: float = 2.0) -> None:
        self.seconds, self.asked = seconds, 0

    def __call__(self) -> float:
        self.asked += 1
        return self.seconds


@pytest.fixture(autouse=True)
def idle(real_speeds: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let the machine be idle, whatever runs beside the tests."""
    monkeypatch.setattr(speeds, "_busy", lambda cores: 0)
    return real_speeds


def test_a_piece_of_work_is_timed_once_on_a_machine(idle: Path) -> None:
    watch = Stopwatch()
    for _ in range(2):
        assert open_speeds().of("a product", watch) == 2.0
    assert watch.asked == 1
    assert open_speeds().of("another", watch) == 2.0
    assert watch.asked == 2
    (file,) = idle.iterdir()
    assert json.loads(file.read_text())["seconds"] == {"a product": 2.0, "another": 2.0}


@pytest.mark.parametrize("what", ["processor", "threads", "torch", "busy"])
def test_another_machine_or_one_that_is_busier_is_timed_anew(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Stopwatch()
    open_speeds().of("a product", watch)
    match what:
        case "processor":
            monkeypatch.setattr(speeds, "_processor", lambda: "another")
        case "threads":
            monkeypatch.setenv("OMP_NUM_THREADS", "17")
        case "torch":
            monkeypatch.setattr(speeds.metadata, "version", lambda name: "9.9")
        case _:
            monkeypatch.setattr(speeds, "_busy", lambda cores: 4)
    open_speeds().of("a product", watch)
    assert watch.asked == 2


@pytest.mark.parametrize(
    "damage",
    ["", "{", "[]", "{}", "null", '{"machine": {}, "seconds": {"a product": 7}}', "[" * 100_000],
)
def test_a_damaged_file_is_timed_anew_and_replaced(idle: Path, damage: str) -> None:
    watch = Stopwatch()
    open_speeds().of("a product", watch)
    (file,) = idle.iterdir()
    whole = file.read_bytes()
    file.write_text(damage)
    assert open_speeds().of("a product", watch) == 2.0
    assert watch.asked == 2
    assert file.read_bytes() == whole


@pytest.mark.parametrize("value", ["-1", "0", "NaN", "Infinity", '"x"', "null", "[]"])
def test_a_time_that_nothing_takes_is_not_believed(idle: Path, value: str) -> None:
    watch = Stopwatch()
    open_speeds().of("a product", watch)
    (file,) = idle.iterdir()
    file.write_text(file.read_text().replace("2.0", value))
    assert open_speeds().of("a product", watch) == 2.0


def test_a_cache_that_cannot_be_written_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    watch = Stopwatch()
    known = open_speeds()
    assert [known.of("a product", watch) for _ in range(2)] == [2.0, 2.0]
    assert watch.asked == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("load", "busy"), [(0.0, 0), (2.9, 0), (4.0, 2), (7.0, 4), (8.0, 4), (900.0, 8)]
)
def test_how_busy_a_machine_is_counts_in_powers_of_two(
    load: float, busy: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    assert speeds._busy(2) == busy
