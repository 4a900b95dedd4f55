"""Edits and the file that holds them: whole or not there, and for their owner alone."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import numpy as np
import pytest

from ortho_cli.decompose.edits import Edit, count, load_arrays, load_edits, save_arrays, save_edits
from ortho_cli.errors import ResourceError

EDITS = {
    "a.b.weight": Edit(
        positions=np.array([0, 7, 8, 2**40], np.int64), codes=np.array([-8, 7, 0, 3], np.int8)
    ),
    "c/d.weight": Edit(positions=np.array([5], np.int64), codes=np.array([1], np.int8)),
}


def same(one: dict[str, Edit] | None, other: dict[str, Edit]) -> bool:
    return one is not None and {
        name: (edit.positions.tolist(), edit.codes.tolist()) for name, edit in one.items()
    } == {name: (edit.positions.tolist(), edit.codes.tolist()) for name, edit in other.items()}


def test_edits_saved_and_loaded_are_the_same(tmp_path: Path) -> None:
    save_edits(tmp_path / "e.npz", EDITS)
    found = load_edits(tmp_path / "e.npz")
    assert same(found, EDITS)
    assert found is not None
    assert found["a.b.weight"].positions.dtype == np.int64
    assert found["a.b.weight"].codes.dtype == np.int8
    assert count(EDITS) == count(found) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["e.npz"]


def test_no_edits_are_not_the_same_as_no_file(tmp_path: Path) -> None:
    assert load_edits(tmp_path / "e.npz") is None
    save_edits(tmp_path / "e.npz", {})
    assert load_edits(tmp_path / "e.npz") == {}


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_edits_file_is_for_its_owner_whatever_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        save_edits(tmp_path / "e.npz", EDITS)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "e.npz").stat().st_mode) == 0o600


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.3, 0.9, 0.999])
def test_edits_file_that_was_cut_counts_as_none(tmp_path: Path, kept: float) -> None:
    path = tmp_path / "e.npz"
    save_edits(path, EDITS)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    assert load_edits(path) is None


def test_edits_file_with_a_flipped_bit_counts_as_none(tmp_path: Path) -> None:
    path = tmp_path / "e.npz"
    save_edits(path, EDITS)
    whole = bytearray(path.read_bytes())
    whole[whole.index(np.int64(2**40).tobytes())] ^= 1
    path.write_bytes(bytes(whole))
    assert load_edits(path) is None


def test_save_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "e.npz"
    save_arrays(path, {"x": np.arange(3)})

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ortho_cli.storage.work_folder.sync", full)
    with pytest.raises(ResourceError, match=r"e\.npz`: no space left"):
        save_arrays(path, {"x": np.arange(9)})
    held = load_arrays(path)
    assert held is not None
    assert held["x"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("start", "stop", "positions", "codes"),
    [
        (0, 20, [3, 4, 9, 19], [1, 2, 3, 4]),
        (0, 3, [], []),
        (3, 4, [0], [1]),
        (4, 9, [0], [2]),
        (4, 10, [0, 5], [2, 3]),
        (20, 30, [], []),
    ],
)
def test_within_counts_from_the_start_and_leaves_the_stop_out(
    start: int, stop: int, positions: list[int], codes: list[int]
) -> None:
    edit = Edit(positions=np.array([3, 4, 9, 19], np.int64), codes=np.array([1, 2, 3, 4], np.int8))
    found = edit.within(start, stop)
    assert found[0].tolist() == positions
    assert found[1].tolist() == codes
