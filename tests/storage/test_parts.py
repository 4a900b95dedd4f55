"""Finished parts of long work: kept by time, taken up, and not believed where they are damaged."""

from __future__ import annotations

import itertools
import stat
from pathlib import Path

import pyrage
import pytest

from ortho_cli.errors import InternalError
from ortho_cli.events import Event, messages
from ortho_cli.storage import parts
from ortho_cli.storage.parts import Parts, open_parts
from ortho_cli.storage.sealing import Keys, Seal, WorkKey, key_beside


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each part go to the file as soon as it is finished."""
    monkeypatch.setattr(parts, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(parts, "LARGEST_SHARE", 1e9)


class Killed(Exception):  # noqa: N818 - no error, an end
    """What ends a run here."""


def thirds(kept: Parts, *, until: int = 9, measured: list[int] | None = None) -> list[float]:
    """Take a third of eight numbers, part by part."""

    def measure(item: int) -> float:
        if item == until:
            raise Killed
        if measured is not None:
            measured.append(item)
        return item / 3

    return kept.at("stage").each("thirds", range(8), measure)


def test_finished_parts_are_taken_up_and_the_rest_is_measured(
    tmp_path: Path, at_once: None
) -> None:
    file, again = tmp_path / "parts", list[int]()
    with pytest.raises(Killed):
        thirds(open_parts(file), until=5)
    assert thirds(open_parts(file), measured=again) == thirds(Parts())
    assert again == [5, 6, 7]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert open_parts(file).at("stage").left == 1
    assert open_parts(file).at("other").left == 0


def test_parts_go_to_the_file_every_half_minute_and_when_they_are_asked_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(parts.time, "monotonic", lambda: now)
    kept, sizes = open_parts(tmp_path / "parts"), list[int]()

    def measure(item: int) -> int:
        nonlocal now
        now += 12
        sizes.append((tmp_path / "parts").stat().st_size if (tmp_path / "parts").exists() else 0)
        return item

    kept.each("slow", range(7), measure)
    assert [a < b for a, b in itertools.pairwise(sizes)] == [
        *(False, False, True),  # after 36 s, and after 72 s
        *(False, False, True),
    ]
    kept.save()
    assert open_parts(tmp_path / "parts").each("slow", range(7), lambda _: -1) == [*range(7)]


@pytest.mark.parametrize("where", ["tail", "middle", "first"])
def test_what_is_cut_or_damaged_is_measured_again_and_told(
    tmp_path: Path, at_once: None, where: str
) -> None:
    file, events, again = tmp_path / "parts", list[Event](), list[int]()
    whole = thirds(open_parts(file))
    raw = bytearray(file.read_bytes())
    if where == "tail":
        raw = raw[:-5]
    else:
        at = raw.index(b"0.3333" if where == "first" else b"1.3333")
        raw[at + 3] ^= 1  # another digit: JSON as before
    file.write_bytes(raw)
    assert thirds(open_parts(file, on_event=events.append), measured=again) == whole
    assert again == {"tail": [7], "middle": [4, 5, 6, 7], "first": [1, 2, 3, 4, 5, 6, 7]}[where]
    told = "" if where == "tail" else f"some of what an earlier run kept in `{file}` is damaged"
    assert "".join(messages(events)).startswith(told)
    assert bool(messages(events)) == bool(told), "what a kill cuts is no damage"
    assert thirds(open_parts(file), until=0) == whole, "all of it is there again"


def test_a_line_that_an_interrupt_cut_does_not_spoil_the_next_one(
    tmp_path: Path, at_once: None
) -> None:
    file = tmp_path / "parts"
    with pytest.raises(Killed):
        thirds(open_parts(file), until=3)
    with file.open("ab") as cut:
        cut.write(b"\n5c4f [[")
    with pytest.raises(Killed):
        thirds(open_parts(file), until=6)
    again: list[int] = []
    thirds(open_parts(file), measured=again)
    assert again == [6, 7]


def test_sealed_parts_are_read_with_their_key_alone(tmp_path: Path, at_once: None) -> None:
    file, events, again = tmp_path / "parts", list[Event](), list[int]()
    keys = Keys(path=tmp_path, identities=(pyrage.x25519.Identity.generate(),))
    with pytest.raises(Killed):
        thirds(open_parts(file, key_beside(file, keys)), until=5)
    assert b"stage" not in file.read_bytes()
    assert b"thirds" not in file.read_bytes()
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600}
    whole = thirds(open_parts(file, key_beside(file, keys)), measured=again)
    assert again == [5, 6, 7]
    assert whole == thirds(Parts())
    other = WorkKey.make(Seal())
    assert thirds(open_parts(file, other, events.append), measured=again) == whole
    assert len(again) == 3 + 8
    assert "is damaged, and is measured again" in "".join(messages(events))


def test_a_passphrase_locks_the_key_of_parts(tmp_path: Path) -> None:
    keys = Keys(path=tmp_path, passphrase="correct horse")
    first = key_beside(tmp_path / "parts", keys)
    assert key_beside(tmp_path / "parts", keys).open(first.seal(b"x")) == b"x"
    wrong = key_beside(tmp_path / "parts", Keys(path=tmp_path, passphrase="battery"))
    with pytest.raises(ValueError, match="No matching keys"):
        wrong.open(first.seal(b"x"))


def test_values_of_another_form_are_measured_again(tmp_path: Path, at_once: None) -> None:
    file, events = tmp_path / "parts", list[Event]()
    open_parts(file).each("a", range(3), lambda n: {"b": n})
    kept = open_parts(file, on_event=events.append)
    found = kept.each("a", range(3), lambda n: n, write=lambda n: {"c": n}, read=lambda v: v["c"])
    assert found == [0, 1, 2]
    assert len(events) == 1


def test_a_disk_that_is_full_ends_no_work(tmp_path: Path, at_once: None) -> None:
    events: list[Event] = []
    kept = open_parts(tmp_path / "gone" / "parts", on_event=events.append)
    assert kept.kept
    assert thirds(kept) == thirds(Parts())
    assert not kept.kept
    (told,) = messages(events)
    assert "cannot write" in told
    assert told.endswith("what is finished from now on is not kept")


def test_two_stages_of_one_name_are_a_bug(tmp_path: Path) -> None:
    kept = open_parts(tmp_path / "parts")
    thirds(kept)
    with pytest.raises(InternalError, match="stage/thirds"):
        thirds(kept)
