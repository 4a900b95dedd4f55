"""Estimates and intervals: known answers, ties, one value, none."""

from __future__ import annotations

import math

import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st

from ortho_cli.bench import estimates
from ortho_cli.errors import NumericalError

SCORES = st.lists(st.integers(0, 5).map(float), min_size=1, max_size=20)


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(0, 20, 0, 0.1611), (20, 20, 0.8389, 1), (1, 20, 0.0089, 0.2361), (5, 10, 0.2366, 0.7634)],
)
def test_wilson_is_known(hits: int, n: int, low: float, high: float) -> None:
    assert estimates.wilson(hits, n) == pytest.approx((low, high), abs=1e-4)


def test_wilson_of_nothing_is_everything() -> None:
    assert estimates.wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(NumericalError, match="3 hits of 2"):
        estimates.wilson(3, 2)


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_share(case: tuple[int, int]) -> None:
    low, high = estimates.wilson(*case)
    assert 0 <= low <= case[0] / case[1] <= high <= 1


def test_bootstrap_of_a_mean_is_about_two_standard_errors() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    low, high = estimates.bootstrap(values)
    error = values.std() / 20
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.03)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.03)


def test_bootstrap_is_seeded_and_takes_rows() -> None:
    rows = np.array([[1.0, 2.0], [3.0, 4.0], [0.0, 4.0]])
    ratio = lambda drawn: float(drawn[:, 0].sum() / drawn[:, 1].sum())  # noqa: E731
    assert estimates.bootstrap(rows, ratio) == estimates.bootstrap(rows, ratio)
    values = [math.sqrt(one) for one in range(20)]
    assert estimates.bootstrap(values) != estimates.bootstrap(values, seed=1)


def test_bootstrap_of_one_value_has_no_width() -> None:
    assert estimates.bootstrap([2.5]) == (2.5, 2.5)
    assert estimates.bootstrap([2.5] * 9) == (2.5, 2.5)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_what_is_no_number_is_an_error(values: list[float]) -> None:
    for estimate in (estimates.bootstrap, estimates.min_k):
        with pytest.raises(NumericalError):
            estimate(values)
    with pytest.raises(NumericalError):
        estimates.auc(values, [1.0])
    with pytest.raises(NumericalError):
        estimates.auc([1.0], values)


@given(SCORES, SCORES)
def test_auc_equals_the_slow_twin(positives: list[float], negatives: list[float]) -> None:
    found = estimates.auc(positives, negatives, rounds=2)
    assert found.value == pytest.approx(reference.auc(positives, negatives))


def test_auc_is_known_at_its_ends_and_at_ties() -> None:
    assert estimates.auc([3.0, 4.0], [1.0, 2.0]).value == 1
    assert estimates.auc([1.0], [2.0]).value == 0
    equal = estimates.auc([7.0] * 5, [7.0] * 3)
    assert (equal.value, equal.low, equal.high) == (0.5, 0.5, 0.5)
    assert (equal.n, equal.positives, equal.negatives) == (8, 5, 3)


def test_auc_interval_covers_and_narrows() -> None:
    generator = np.random.default_rng(0)
    few, many = (
        estimates.auc(generator.normal(0.5, 1, n).tolist(), generator.normal(0, 1, n).tolist())
        for n in (20, 500)
    )
    for found in (few, many):
        assert found.low < found.value < found.high
    assert many.high - many.low < few.high - few.low


@pytest.mark.parametrize(
    ("nlls", "share", "expected"),
    [
        ([1.0, 5.0, 2.0, 4.0, 3.0], 0.2, -5.0),
        ([1.0, 5.0, 2.0, 4.0, 3.0], 0.4, -4.5),
        ([1.0, 3.0], 0.2, -3.0),
        ([1.0, 3.0], 1.0, -2.0),
        ([0.0] * 71 + [1.0] * 29, 0.29, -1.0),
        ([2.0], 0.2, -2.0),
    ],
)
def test_min_k_averages_the_least_likely(nlls: list[float], share: float, expected: float) -> None:
    assert estimates.min_k(nlls, share) == pytest.approx(expected)


def test_uniform_p_of_uniform_numbers_is_uniform() -> None:
    """Of 2,000 draws a share of about p has a p below p."""
    generator = np.random.default_rng(0)
    found = np.array([estimates.uniform_p(generator.random(20)) for _ in range(2000)])
    for p in (0.05, 0.2, 0.5):
        assert (found < p).mean() == pytest.approx(p, abs=0.03)


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [
        ([0.5] * 20, 0.0, 1e-3),  # all in the middle
        ([0.99] * 20, 0.0, 1e-6),
        (list(np.linspace(0.3, 0.8, 20)), 0.0, 0.06),
        (list((np.arange(20) + 0.5) / 20), 0.99, 1.0),
        ([0.5], 0.8, 1.0),
    ],
)
def test_uniform_p_is_small_where_numbers_bunch(
    values: list[float], low: float, high: float
) -> None:
    assert low <= estimates.uniform_p(values) <= high
