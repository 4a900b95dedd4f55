"""File systems that lack something: the same bytes and a note, or an error with what fits it."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import subprocess
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import checkpoints
import pytest
from conftest import PICO, Ortho

from ortho_cli.events import Event, Noted
from ortho_cli.storage import disk, work_folder
from ortho_cli.storage.side_files import list_files
from ortho_cli.storage.work_folder import WorkFolder

FEW = ["--set", "calibrate.length=16", "--set", "calibrate.samples=2", "--quiet"]


def failing(number: int, when: Callable[..., bool] = lambda *given: True) -> Callable[..., Any]:
    """Make a call that fails, in place of the one that is given first."""

    def make(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            if when(*given):
                raise OSError(number, os.strerror(number))
            return real(*given, **named)

        return call

    return make


def is_folder(fd: int) -> bool:
    return stat.S_ISDIR(os.fstat(fd).st_mode)


Usage = namedtuple("Usage", "total used free")
# What a file system lacks: module, name, and what is there in its place.
LACKS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "locks": (fcntl, "flock", failing(errno.ENOLCK)),
    "sync of folders": (os, "fsync", failing(errno.EINVAL, is_folder)),
    "sync of folders, as CIFS says": (os, "fsync", failing(errno.EBADF, is_folder)),
    "sync": (os, "fsync", failing(errno.ENOTSUP)),
    "sync of data": (os, "fdatasync", failing(errno.EINVAL)),
    "reserved space": (os, "posix_fallocate", failing(errno.EOPNOTSUPP)),
    "reserved space, as ZFS says": (os, "posix_fallocate", failing(errno.EINVAL)),
    "growing": (os, "ftruncate", failing(errno.EINVAL, lambda fd, size: size > 0)),
    "figures of its size": (shutil, "disk_usage", lambda real: lambda path: Usage(0, 0, 0)),
    "any figures": (shutil, "disk_usage", failing(errno.ENOSYS)),
    "true permission bits": (
        os,
        "access",
        lambda real: lambda path, mode, **named: not mode & os.W_OK and real(path, mode, **named),
    ),
}


def lack(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    for name in names:
        module, call, make = LACKS[name]
        monkeypatch.setattr(module, call, make(getattr(module, call)))


def contents(folder: Path) -> dict[str, bytes]:
    paths = [folder] if folder.is_file() else sorted(folder.rglob("*"))
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths if p.is_file()}


@pytest.mark.parametrize("command", ["decompose", "convert", "calibrate"])
def test_a_file_system_that_lacks_everything_gets_the_same_bytes(
    pico: Path, tmp_path: Path, ortho: Ortho, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    more = []
    if command == "calibrate":
        checkpoints.save_tokenizer(pico, vocab=PICO["vocab"])
        (tmp_path / "text.txt").write_text("A cat, and 2 more of them. " * 30)
        more = ["--data", tmp_path / "text.txt", *FEW]
    assert ortho(command, pico, "-o", tmp_path / "usual", *more).code == 0
    before = sorted(path.name for path in tmp_path.iterdir())
    lack(monkeypatch, *(name for name in LACKS if name != "growing"))
    ran = ortho(command, pico, "-o", tmp_path / "out", *more)
    assert ran.code == 0, ran.err
    assert contents(tmp_path / "out") == contents(tmp_path / "usual")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*before, "out"])
    if command != "calibrate":  # which was quiet
        for note in ("has no locks (flock)", "reserves no space", "does not say when all is on"):
            assert ran.err.count(note) == 1, ran.err


@pytest.mark.parametrize("name", LACKS)
def test_what_one_file_system_lacks_is_no_error(
    pico: Path, tmp_path: Path, ortho: Ortho, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    lack(monkeypatch, name)
    for more in ([], ["--force"]):
        ran = ortho("convert", pico, "-o", tmp_path / "out", *more)
        assert ran.code == 0, ran.err
        assert "error" not in ran.err


@pytest.mark.parametrize(
    ("call", "number", "hint"),
    [
        ("posix_fallocate", errno.ENOSPC, "free space there"),
        ("posix_fallocate", errno.EDQUOT, "quota"),
        ("ftruncate", errno.EFBIG, "no larger file"),
        ("pwrite", errno.EIO, "look at that disk"),
        ("pwrite", errno.EROFS, "takes no writes"),
        ("fsync", errno.EIO, "look at that disk"),
        ("fdatasync", errno.ENOSPC, "free space there"),
        ("mkdir", errno.EACCES, "your rights"),
        ("mkdir", errno.EROFS, "takes no writes"),
        ("mkdir", errno.ENAMETOOLONG, "a shorter -o"),
        ("rename", errno.EXDEV, "lower layer"),
    ],
)
def test_a_disk_that_fails_is_told_with_a_hint_that_fits(
    pico: Path,
    tmp_path: Path,
    ortho: Ortho,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    number: int,
    hint: str,
) -> None:
    monkeypatch.setattr(os, call, failing(number)(getattr(os, call)))
    ran = ortho("decompose", pico, "-o", tmp_path / "out", "--quiet")
    monkeypatch.undo()
    assert ran.code == 9, ran.err
    assert os.strerror(number).lower() in ran.err
    assert hint in ran.err.partition("hint: ")[2]
    assert "free space" not in ran.err or number in (errno.ENOSPC, errno.EDQUOT)
    late = call in ("fsync", "rename")  # when all is done: that is kept
    assert [path.name for path in tmp_path.glob("*")] == ["pico", *[".out.ortho"] * late]
    assert ortho("decompose", pico, "-o", tmp_path / "out", "--quiet").code == 0


def test_a_folder_that_takes_no_files_is_refused_before_the_work_as_what_it_is(
    pico: Path, tmp_path: Path, ortho: Ortho, monkeypatch: pytest.MonkeyPatch
) -> None:
    lack(monkeypatch, "true permission bits")
    monkeypatch.setattr("tempfile.mkdtemp", failing(errno.EROFS)(lambda: None))
    ran = ortho("decompose", pico, "-o", tmp_path / "out", "--dry-run")
    assert ran.code == 9
    assert "read-only file system" in ran.err


@pytest.mark.parametrize("command", ["decompose", "convert"])
def test_a_name_that_work_would_make_too_long_is_refused_before_it(
    pico: Path, tmp_path: Path, ortho: Ortho, command: str
) -> None:
    ran = ortho(command, pico, "-o", tmp_path / ("é" * 125))
    assert ran.code == 2
    assert "takes 258 bytes, and the file system takes 255" in ran.err
    assert "3 bytes shorter" in ran.err
    assert ortho(command, pico, "-o", tmp_path / ("é" * 123), "-q").code == 0


def test_permissions_that_are_not_kept_are_told(
    pico: Path, tmp_path: Path, ortho: Ortho, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FAT has none: the file that only its owner should read is everybody's."""
    real = os.open
    monkeypatch.setattr(
        os, "open", lambda path, flags, mode=0o777, **named: _as_fat(real, path, flags, **named)
    )
    ran = ortho("decompose", pico, "-o", tmp_path / "out")
    assert ran.code == 0, ran.err
    assert "keeps no permissions: others may be able to read `ortho.safetensors`" in ran.err


def _as_fat(real: Callable[..., int], path: Any, flags: int, **named: Any) -> int:
    fd = real(path, flags, 0o755, **named)
    if flags & os.O_CREAT and stat.S_ISREG(os.fstat(fd).st_mode):
        os.fchmod(fd, 0o755)
    return fd


def test_side_files_whose_names_are_one_to_the_file_system_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []

    def note(event: Event) -> None:
        notes.extend([event.message] if isinstance(event, Noted) else [])

    with WorkFolder(tmp_path / "out", identity={"files": {}}, force=False, on_event=note) as work:
        work.write_file("LICENSE", b"one")
        work.write_file("license", b"other")
        assert notes == []
        monkeypatch.setattr(Path, "exists", lambda path: True)  # whatever its case
        work.write_file("License", b"third")
        work.write_file("LICENSE", b"again")
    assert len(notes) == 1
    assert "`LICENSE` is not kept" in notes[0]


@pytest.mark.parametrize("size", [0, 10, 10_000])
def test_reserve_sets_the_size_where_a_file_cannot_be_grown_or_its_blocks_claimed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    lack(monkeypatch, "reserved space", "growing")
    with (tmp_path / "file").open("w+b") as file:
        assert disk.reserve(file.fileno(), size) == (size == 0)
        assert os.fstat(file.fileno()).st_size == size


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of two megabytes, where a test may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(place)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root mounts disks")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk_that_reserves_nothing_is_told_as_that(
    pico: Path, small_disk: Path, ortho: Ortho, monkeypatch: pytest.MonkeyPatch
) -> None:
    lack(monkeypatch, "reserved space", "any figures")
    with (small_disk / "hog").open("wb") as hog:
        hog.write(bytes((2 << 20) - (100 << 10)))
    ran = ortho("decompose", pico, "-o", small_disk / "out", "-q")
    assert ran.code == 9, ran.err
    assert "no space left on device" in ran.err
    assert "free space there" in ran.err
    (small_disk / "hog").unlink()
    assert ortho("decompose", pico, "-o", small_disk / "out", "-q").code == 0
    assert list(list_files(small_disk / "out"))
    assert not work_folder.work_folder(small_disk / "out").exists()
