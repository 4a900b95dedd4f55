"""Moves of codes: chosen as the slow twin chooses, and what they promise is what they do."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memorised import Memorised
from reference import choose_moves

from ortho_cli.forget import moves
from ortho_cli.forget.grid import Grid
from ortho_cli.forget.isolate import PROPOSE
from ortho_cli.forget.moves import Moves, Row

pytestmark = pytest.mark.filterwarnings("ignore")  # other people's deprecations


def moves_of(
    effects: torch.Tensor, misses: list[float], damages: torch.Tensor | None = None
) -> Moves:
    count = effects.shape[1]
    whole = torch.zeros(count, dtype=torch.long)
    return Moves(
        owners=whole,
        places=torch.arange(count),
        codes=whole,
        damages=torch.ones(count) if damages is None else damages,
        effects=effects,
        misses=torch.tensor(misses),
        free=torch.ones(count, dtype=torch.bool),
    )


def test_moves_that_are_made_are_not_chosen_again() -> None:
    found = moves_of(torch.tensor([[4.0, 1.0, 1.0]]), [5.0])
    assert moves.choose(found, 1)[0].tolist() == [0]
    found.free[0] = False
    assert moves.choose(found, 3)[0].tolist() == [1, 2]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    rows=st.integers(1, 5),
    count=st.integers(1, 200),
    size=st.integers(0, 300),
    far=st.sampled_from([0.0, 0.1, 3.0, 100.0]),
)
def test_moves_are_chosen_as_by_the_slow_twin(
    seed: int, rows: int, count: int, size: int, far: float
) -> None:
    draw = torch.Generator().manual_seed(seed)
    found = moves_of(
        torch.randn(rows, count, generator=draw),
        (far * torch.randn(rows, generator=draw)).tolist(),
        torch.rand(count, generator=draw) + 0.1,
    )
    chosen, fall = moves.choose(found, size)
    expected = choose_moves(
        found.effects.tolist(), found.misses.tolist(), found.damages.tolist(), size
    )
    assert chosen.tolist() == expected
    assert len(set(expected)) == len(expected) <= size
    left = found.misses.double() - found.effects.double()[:, chosen].sum(1)
    before = found.misses.double().square().sum()
    assert fall == pytest.approx(float(before - left.square().sum()), rel=1e-3, abs=1e-4)
    assert fall > 0 or not expected


def test_move_that_harms_a_row_that_is_there_is_left_out() -> None:
    effects = torch.tensor([[1.0, 0.9], [0.9, 0.0]])
    assert moves.choose(moves_of(effects, [1.0, 0.0]), 2)[0].tolist() == [1]


def test_dear_moves_come_after_cheap_ones_and_none_once_all_is_there() -> None:
    found = moves_of(torch.full((1, 3), 0.5), [1.0], torch.tensor([3.0, 1.0, 2.0]))
    assert moves.choose(found, 3)[0].tolist() == [1, 2]
    assert moves.choose(found, 1)[0].tolist() == [1]
    assert moves.choose(moves_of(torch.ones(2, 4), [0.0, 0.0]), 4) == (pytest.approx([]), 0.0)


def rows_of(memorised: Memorised) -> list[Row]:
    """The first two secrets have to become less likely, the third has to stay."""
    return [
        Row(terms=(((one.prompt, one.secret), [1.0] * len(one.secret)),), miss=miss, scale=2.0)
        for one, miss in zip(memorised.secrets(), (5.0, 9.0, 0.0), strict=False)
    ]


def find(memorised: Memorised, grid: Grid, room: dict[str, int] | None = None) -> Moves:
    room = room or {name: codes.numel() for name, codes in grid.codes.items()}
    rows = rows_of(memorised)
    return moves.find(grid, rows, memorised.fisher(), 1e-3, room, PROPOSE["step"])


def test_effects_are_gradients_times_steps(memorised: Memorised) -> None:
    grid = memorised.grid()
    found = find(memorised, grid)
    assert found.misses.tolist() == [2.5, 4.5, 0.0]
    for row, effects in zip(rows_of(memorised), found.effects, strict=True):
        gradients = grid.gradient(row.terms)
        for number, name in enumerate(grid.codes):
            mine = found.owners == number
            places = found.places[mine]
            codes = grid.codes[name].view(-1)[places]
            assert ((found.codes[mine] - codes).abs() == 1).all()
            steps = (found.codes[mine] - codes) * grid.spacing_at(name, places)
            expected = gradients[name].view(-1)[places] * steps / row.scale
            torch.testing.assert_close(effects[mine], expected, rtol=1e-3, atol=1e-7)


def test_damage_is_that_of_the_place_after_the_move(memorised: Memorised) -> None:
    grid, fisher = memorised.grid(), memorised.fisher()
    found = find(memorised, grid)
    for number, name in enumerate(grid.codes):
        mine = found.owners == number
        places = found.places[mine]
        far = found.codes[mine] - grid.original[name].view(-1)[places]
        expected = (far * grid.spacing_at(name, places)) ** 2 * fisher[name].view(-1)[places]
        torch.testing.assert_close(found.damages[mine], expected + 1e-3)


def test_any_choice_of_candidates_keeps_to_the_room(memorised: Memorised) -> None:
    grid = memorised.grid()
    room = {name: number % 3 for number, name in enumerate(grid.codes)}
    found = find(memorised, grid, room)
    counts = torch.bincount(found.owners, minlength=len(room)).tolist()
    assert counts == list(room.values())


def test_moves_are_undone(memorised: Memorised) -> None:
    grid = memorised.grid()
    found = find(memorised, grid)
    chosen, fall = moves.choose(found, 50)
    assert len(chosen) == 50
    assert fall > 0
    undo = moves.make(grid, found, chosen)
    assert grid.moved == 50
    for name, places, codes in undo:
        grid.move(name, places, codes)
    assert grid.moved == 0
