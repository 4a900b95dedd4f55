"""Ranks of secrets among their alternatives, by what these tell beside their phrasing."""

from __future__ import annotations

import pytest
from memorised import Memorised

from ortho_cli.forget.grid import Grid
from ortho_cli.forget.ranks import rank_all, rank_secret
from ortho_cli.model.scoring import completion_nll
from ortho_cli.model.secrets import TokenSecret

pytestmark = pytest.mark.filterwarnings("ignore")  # other people's deprecations
FRAME = ((3, 4), (5,))  # tokens that all alternatives of a sentence have around what they tell


def sentence(prompt: tuple[int, ...]) -> TokenSecret:
    first, last = FRAME
    return TokenSecret(
        prompt=prompt,
        secret=(9, 10),
        alternatives=tuple((*first, 20 + n, *last, 30 + n) for n in range(6)),
        drawn="given",
        where="",
    )


@pytest.fixture
def grid(memorised: Memorised) -> Grid:
    return memorised.grid()


def test_keys_tell_in_every_token(memorised: Memorised, grid: Grid) -> None:
    share, ranked = rank_all(grid, memorised.secrets())
    assert share == 1.0
    assert ranked == [rank_secret(grid, one, share) for one in memorised.secrets()]


def test_the_share_of_sentences_is_that_of_the_tokens_in_which_they_differ(
    memorised: Memorised, grid: Grid
) -> None:
    secrets = [sentence(one.prompt) for one in memorised.secrets()[:2]]
    told = whole = 0.0
    for one in secrets:
        with grid.arithmetic():
            for nll in completion_nll(grid.model, one.prompt, one.alternatives):
                told += float(nll[2] + nll[4])
                whole += float(nll.sum())
    share, ranked = rank_all(grid, secrets)
    assert share == pytest.approx(told / whole, rel=1e-5)
    assert share < 0.9
    assert ranked == [rank_secret(grid, one, share) for one in secrets]


def test_a_secret_ranks_among_so_much_of_the_nll_of_its_alternatives(
    memorised: Memorised, grid: Grid
) -> None:
    secret = memorised.secrets(memorised.nonmember)[0]
    at = rank_secret(grid, secret, 1.0)
    less = rank_secret(grid, secret, 0.5)
    assert less.nll == at.nll
    assert less.alternatives == pytest.approx(at.alternatives / 2)
    assert less.lowest == pytest.approx(at.lowest / 2)
    assert less.rank > at.rank
    assert rank_secret(grid, secret, 1e-6).rank == 1.0
