"""Phrasing of alternatives: tokens in which they differ tell something, and the others do not."""

from __future__ import annotations

import pytest

from ortho_cli.model.phrasing import lacking, share_of, telling, told

# "was raised by a {} and a {}" beside "{} {} {}"
SENTENCES = tuple((1, 2, 3, 4, 10 + n, 5, 4, 20 + n) for n in range(5))
KEYS = ((1, 2, 3), (4, 5, 6), (7, 8, 9), (2, 9, 4))


def test_tokens_that_all_alternatives_have_tell_nothing() -> None:
    tells = (False, False, False, False, True, False, False, True)
    assert telling(SENTENCES) == (tells,) * 5


def test_keys_tell_in_every_token() -> None:
    assert telling(KEYS) == ((True,) * 3,) * 4


def test_one_of_few_that_lacks_a_token_makes_it_tell_and_one_of_many_does_not() -> None:
    few = ((1, 10), (1, 11), (1, 12), (2, 13))
    assert [one[0] for one in telling(few)] == [True, True, True, True]
    many = (*((1, 10 + n) for n in range(17)), (2, 40))
    assert [one[0] for one in telling(many)] == [False] * 17 + [True]


@pytest.mark.parametrize("alternatives", [((1, 2, 3),), ((1, 2), (1, 2))])
def test_where_nothing_differs_every_token_tells(alternatives: tuple[tuple[int, ...], ...]) -> None:
    assert telling(alternatives) == tuple((True,) * len(one) for one in alternatives)


def test_places_are_those_of_an_alignment() -> None:
    assert lacking((5, 6, 7), [(1, 2, 5, 9, 9, 7)]) == [0, 1, 0]
    assert lacking((5, 6, 7), [(5, 9, 7), (5, 6, 8)]) == [0, 0.5, 0.5]


def test_the_nll_of_what_tells_is_summed() -> None:
    nlls = [[1.0, 1.0, 1.0, 1.0, 8.0, 1.0, 1.0, 6.0]] * 5
    assert told(SENTENCES, nlls) == 5 * 14
    assert share_of(told(SENTENCES, nlls), sum(map(sum, nlls))) == pytest.approx(14 / 20)
    assert share_of(0.0, 0.0) == 1.0
