"""Who may work in a folder, where the file system has no locks."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ortho_cli.errors import OutputExistsError
from ortho_cli.storage.locks import Lock


@pytest.fixture(params=["ENOLCK", "ENOTSUP", "EOPNOTSUPP", "EINVAL", "ENOSYS"])
def no_flock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    number = getattr(errno, request.param)

    def flock(fd: int, how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / ".out.ortho"


@pytest.fixture
def other() -> Iterator[subprocess.Popen[bytes]]:
    """Another process that runs."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.communicate(b"\n")


def lock(place: Path) -> Lock:
    return Lock(place, place.parent / "out")


def told(place: Path, number: int = 1) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((place / f"holder.{number}").read_text())
    return found


def leave(place: Path, **changed: object) -> None:
    """Leave what a process that was killed leaves, or another one."""
    first = lock(place)
    first.take()
    (place / "holder.1").write_text(json.dumps(told(place) | changed))
    first.release()  # writes: so that must be undone
    (place / "holder.1").write_text(json.dumps(MINE | changed))


def start_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


MINE = {
    "pid": os.getpid(),
    "host": os.uname().nodename,
    "start": start_of(os.getpid()) if Path("/proc/self/stat").exists() else None,
    "space": Path("/proc/self/ns/pid").stat().st_ino
    if Path("/proc/self/ns/pid").exists()
    else None,
}
DEAD = {"pid": 2**22 + 1}  # above what Linux gives


@pytest.mark.usefixtures("no_flock")
def test_a_folder_without_locks_is_held_by_one_at_a_time_and_left_clean(place: Path) -> None:
    first = lock(place)
    first.take()
    assert first.is_file
    assert told(place) == MINE
    with pytest.raises(OutputExistsError, match=f"process {os.getpid()} is writing"):
        lock(place).take()
    first.release()
    second = lock(place)
    second.take()
    second.remove_folder()
    second.release()
    assert not place.exists()


@pytest.mark.usefixtures("no_flock")
@pytest.mark.parametrize(
    "changed", [DEAD, {"start": 1}, {"pid": 10**30}], ids=["dead", "number given anew", "no number"]
)
def test_a_lock_of_a_process_that_has_ended_is_nobodys(
    place: Path, changed: dict[str, object]
) -> None:
    leave(place, **changed)
    again = lock(place)
    again.take()
    assert told(place, 2) == MINE


@pytest.mark.usefixtures("no_flock")
def test_a_lock_of_a_process_that_runs_is_respected(
    place: Path, other: subprocess.Popen[bytes]
) -> None:
    leave(place, pid=other.pid, start=start_of(other.pid))
    with pytest.raises(OutputExistsError, match=f"process {other.pid} is writing"):
        lock(place).take()


@pytest.mark.usefixtures("no_flock")
@pytest.mark.parametrize(
    "changed",
    [{**DEAD, "host": "elsewhere"}, {**DEAD, "space": 1}, {"pid": "x"}],
    ids=["another host", "another container", "damaged"],
)
def test_a_lock_that_may_be_of_a_running_process_is_respected_and_named(
    place: Path, changed: dict[str, object]
) -> None:
    leave(place, **changed)
    with pytest.raises(OutputExistsError) as caught:
        lock(place).take()
    assert f"remove `{place / 'holder.1'}`" in str(caught.value.hint)
    (place / "holder.1").unlink()
    lock(place).take()


@pytest.mark.usefixtures("no_flock")
def test_of_two_that_begin_at_once_at_most_one_works(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other makes its file after the first has looked, under a higher number."""
    place.mkdir()
    real = os.open

    def late(path: Any, *rest: Any, **named: Any) -> int:
        if str(path).endswith("holder.1"):
            (place / "holder.2").write_text(json.dumps(MINE))
        return real(path, *rest, **named)

    monkeypatch.setattr(os, "open", late)
    with pytest.raises(OutputExistsError):
        lock(place).take()
    assert not (place / "holder.1").exists()


def test_a_lock_of_the_system_is_not_replaced_by_a_file(place: Path) -> None:
    first = lock(place)
    first.take()
    assert not first.is_file
    with pytest.raises(OutputExistsError, match=f"process {os.getpid()} is writing"):
        lock(place).take()
    first.release()


def test_a_failing_disk_is_not_taken_for_one_without_locks(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(fd: int, how: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="Input/output"):
        lock(place).take()


def test_run_that_has_ended_does_not_release_the_lock_of_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_flock(fd: int, how: int) -> None:
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(fcntl, "flock", no_flock)
    first, second, third = (Lock(tmp_path / "work", tmp_path / "out") for _ in range(3))
    first.take()
    first.remove_folder()
    second.take()
    first.release()
    with pytest.raises(OutputExistsError, match="is writing"):
        third.take()
    second.release()
    third.take()


def test_folder_that_vanishes_while_it_is_made_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mkdir, raised = Path.mkdir, []

    def vanish(self: Path, *args: Any, **options: Any) -> None:
        if not raised:
            raised.append(self)
            raise FileExistsError(errno.EEXIST, "File exists", str(self))
        mkdir(self, *args, **options)

    monkeypatch.setattr(Path, "mkdir", vanish)
    Lock(tmp_path / "work", tmp_path / "out").take()
    assert raised
