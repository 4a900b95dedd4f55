"""Hidden states between blocks: in memory or in a file, and as another run finds them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ortho_cli.model import hidden_states
from ortho_cli.model.hidden_states import HiddenStates

SHAPES = [torch.Size((2, 5, 8)), torch.Size((1, 3, 8))]


def made(number: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(number)
    return [torch.randn(shape, generator=generator).bfloat16() for shape in SHAPES]


def opened(folder: Path, *, in_memory: bool) -> HiddenStates:
    return HiddenStates(folder, SHAPES, torch.bfloat16, in_memory=in_memory)


def put_all(states: HiddenStates, number: int, *, is_last: bool = False) -> None:
    for batch, values in enumerate(made(number)):
        states.put(batch, values)
    states.finish(number, is_last=is_last)


def holds(states: HiddenStates, number: int) -> bool:
    pairs = enumerate(made(number))
    return all(torch.equal(states.get(batch), values) for batch, values in pairs)


@pytest.mark.parametrize("in_memory", [True, False])
def test_states_are_those_of_the_last_block(tmp_path: Path, in_memory: bool) -> None:
    states = opened(tmp_path, in_memory=in_memory)
    assert states.resume(5) == 0
    put_all(states, 0)
    assert holds(states, 0)
    states.put(0, made(1)[0])
    assert torch.equal(states.get(1), made(0)[1])  # not yet changed
    states.put(1, made(1)[1])
    states.finish(1)
    assert holds(states, 1)
    put_all(states, 2, is_last=True)
    assert holds(states, 2)
    states.close()
    files = [path.name for path in tmp_path.iterdir()]
    assert files == ([] if in_memory else ["hidden-2"])
    assert states.bytes_written == (0 if in_memory else 3 * states.nbytes)
    assert states.in_memory_bytes == (states.nbytes if in_memory else 0)
    assert states.nbytes == 2 * (80 + 24)


@pytest.mark.parametrize("in_memory", [True, False])
def test_another_run_takes_the_newest_of_finished_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_memory: bool
) -> None:
    monkeypatch.setattr(hidden_states.Pace, "due", lambda self: True)
    first = opened(tmp_path, in_memory=in_memory)
    for number in range(3):
        put_all(first, number)
    first.put(0, made(7)[0])  # of a block that is not finished
    first.close()
    path = tmp_path / "hidden-2"
    assert path.stat().st_mode & 0o777 == 0o600
    second = opened(tmp_path, in_memory=in_memory)
    assert second.resume(2) == 2
    assert holds(second, 2)
    put_all(second, 3)
    assert holds(second, 3)
    second.close()
    assert [one.name for one in tmp_path.iterdir()] == ["hidden-3"]
    third = opened(tmp_path, in_memory=in_memory)
    assert third.resume(2) == 0  # of a block that the journal does not know
    third.close()
    assert not path.exists()


def test_states_of_another_size_are_not_taken(tmp_path: Path) -> None:
    (tmp_path / "hidden-1").write_bytes(b"x")
    states = opened(tmp_path, in_memory=False)
    assert states.resume(4) == 0
    assert not list(tmp_path.iterdir())
