"""Estimates with their 95 % intervals: shares, means, areas under ROC curves, Min-K%."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from ortho_cli.bench.records import Auc, Figure, Share
from ortho_cli.errors import NumericalError

Z = 1.959963984540054  # standard deviations: 95 % of a normal distribution are within +-Z
Interval = tuple[float, float]
ROUNDS = 1000  # resamples of a bootstrap: its interval's ends are sure to about a tenth of it

Values = NDArray[np.float64]


def wilson(hits: int, n: int) -> Interval:
    """Give Wilson's 95 % interval of a share.

        (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n),   p = hits / n

    Args:
        hits: 0 <= hits <= n.
        n: trials, >= 0.
    Returns:
        Bounds in [0, 1]; all of it where n is 0.
    Raises:
        NumericalError: hits are not between 0 and n.
    0 of n has a bound above 0, and n of n one below 1.
    Source: Wilson 1927, Journal of the American Statistical Association 22, 209-212.
    """
    if not 0 <= hits <= n:
        raise NumericalError(f"{hits} hits of {n}", hint="hits are between 0 and n")
    if n == 0:
        return 0.0, 1.0
    p, z2 = hits / n, Z * Z / n
    middle = (p + z2 / 2) / (1 + z2)
    reach = Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n)) / (1 + z2)
    low = 0.0 if hits == 0 else max(0.0, middle - reach)
    return low, 1.0 if hits == n else min(1.0, middle + reach)


def mean(values: Values) -> float:
    """Average of all values."""
    return float(values.mean())


def bootstrap(
    values: Sequence[float] | Values,
    statistic: Callable[[Values], float] = mean,
    *,
    seed: int = 0,
    rounds: int = ROUNDS,
) -> Interval:
    """Give the 95 % percentile interval of a statistic by resampling rows with replacement.

    Args:
        values: (n,) or (n, columns), n >= 1, finite.
        statistic: of such an array.
        seed: of the draws.
        rounds: resamples.
    Raises:
        NumericalError: no values, or one is NaN or infinite.
    One value, or n equal ones, give an interval of no width: that is no certainty.
    Source: Efron 1979, Annals of Statistics 7, 1-26.
    """
    rows = _array(values)
    generator = np.random.default_rng(seed)
    drawn = [statistic(rows[generator.integers(len(rows), size=len(rows))]) for _ in range(rounds)]
    return _interval(drawn)


def auc(
    positives: Sequence[float], negatives: Sequence[float], *, seed: int = 0, rounds: int = ROUNDS
) -> Auc:
    """Give the chance that a positive is above a negative: the area under the ROC curve.

        AUC = (#{p > n} + #{p = n} / 2) / (|P| |N|)

    Args:
        positives: scores, one at least, finite.
        negatives: the same.
        seed: of the bootstrap, which draws both sides anew.
        rounds: of the bootstrap.
    Returns:
        A figure in [0, 1]; 0.5 where all are equal.
    Raises:
        NumericalError: a side is empty, or a score is NaN or infinite.
    """
    above, below = _array(positives), _array(negatives)
    generator = np.random.default_rng(seed)

    def again(side: Values) -> Values:
        return side[generator.integers(len(side), size=len(side))]

    drawn = [_auc(again(above), again(below)) for _ in range(rounds)]
    low, high = _interval(drawn)
    return Auc(
        value=_auc(above, below),
        low=low,
        high=high,
        n=len(above) + len(below),
        positives=len(above),
        negatives=len(below),
    )


def _auc(positives: Values, negatives: Values) -> float:
    ordered = np.sort(negatives)
    wins = np.searchsorted(ordered, positives, "left")
    ties = np.searchsorted(ordered, positives, "right") - wins
    return float((wins + ties / 2).mean() / len(ordered))


def uniform_p(values: Sequence[float] | Values) -> float:
    """Give the chance that as many uniform numbers stray as far from uniform as these.

        D = sup |F_n(x) - x|,   p = 2 sum_k (-1)^(k-1) exp(-2 k^2 z^2),
        z = D (sqrt n + 0.12 + 0.11 / sqrt n)

    Args:
        values: n >= 1 numbers in [0, 1].
    Returns:
        p in [0, 1]; small where they bunch together or lie at an end. Ranks among few alternatives
        take few values, so p is then too large rather than too small.
    Raises:
        NumericalError: no values, or one is NaN or infinite.
    Source: Kolmogorov 1933; Stephens 1970, Journal of the Royal Statistical Society B 32, 115-122.
    """
    ordered = np.sort(_array(values))
    n = len(ordered)
    steps = np.arange(n + 1) / n
    far = float(max((steps[1:] - ordered).max(), (ordered - steps[:-1]).max()))
    z = far * (math.sqrt(n) + 0.12 + 0.11 / math.sqrt(n))
    if z < 0.2:  # the sum converges slowly there, to 1
        return 1.0
    terms = [math.exp(-2 * k * k * z * z) * (1 if k % 2 else -1) for k in range(1, 101)]
    return min(1.0, max(0.0, 2 * math.fsum(terms)))


def same_p(mine: Sequence[float] | Values, other: Sequence[float] | Values) -> float:
    """Give the chance that two samples of one distribution differ as much as these.

        D = sup |F_n(x) - G_m(x)|,   p = share of the (n + m)! / (n! m!) orders with D >= this one

    Args:
        mine: n >= 1 numbers.
        other: m >= 1 numbers.
    Returns:
        p in [0, 1], exact where no two numbers are equal: an order is a path of n + m steps on a
        grid, and integers count those that stay where D is smaller. n m steps: a tenth of a second
        for TOFU's 400 and 400.
    Raises:
        NumericalError: no values, or one is NaN or infinite.
    Source: the two-sample test of Smirnov 1939; paths as in Hodges 1958, Arkiv foer Matematik 3,
    469-486. scipy.stats.ks_2samp does the same for samples of this size.
    """
    first, second = np.sort(_array(mine)), np.sort(_array(other))
    n, m = len(first), len(second)
    every = np.concatenate((first, second))
    below = np.searchsorted(first, every, "right"), np.searchsorted(second, every, "right")
    far = int(np.abs(below[0] * m - below[1] * n).max())  # n m D, an integer
    if far == 0:
        return 1.0
    paths = [1] + [0] * m  # to each number of steps in `second`, none of them as far as D
    for i in range(n + 1):
        for j in range(m + 1):
            paths[j] = 0 if abs(i * m - j * n) >= far else paths[j] + (paths[j - 1] if j else 0)
    total = math.comb(n + m, n)
    return (total - paths[m]) / total


def min_k(token_nlls: Sequence[float], share: float = 0.2) -> float:
    """Average the log-probabilities of the least likely tokens: Min-K% Prob.

        min_k = -mean of the max(1, floor(share * n)) largest token NLLs

    Args:
        token_nlls: of one text, one at least, finite, in nats.
        share: of its tokens, in (0, 1].
    Returns:
        Nats, <= 0 for probabilities; higher in texts that were trained on.
    Raises:
        NumericalError: no tokens, or an NLL is NaN or infinite.
    Source: Shi et al. 2023 (arXiv:2310.16789), section 3.
    """
    values = np.sort(_array(token_nlls))
    count = max(1, math.floor(share * len(values) + 1e-9))  # 0.29 * 100 is 28.999...
    return -float(values[-count:].mean())


def share(hits: int, n: int) -> Share:
    """Give a share of n >= 1 trials, with Wilson's interval."""
    low, high = wilson(hits, n)
    return Share(value=hits / n, low=low, high=high, n=n, hits=hits)


def mean_figure(values: Sequence[float], *, seed: int) -> Figure:
    """Give a mean of n >= 1 values, with its bootstrap interval."""
    low, high = bootstrap(values, seed=seed)
    return Figure(value=average(values), low=low, high=high, n=len(values))


def average(values: Sequence[float]) -> float:
    """Mean of n >= 1 numbers, summed exactly."""
    return math.fsum(values) / len(values)


def _interval(drawn: Sequence[float]) -> Interval:
    low, high = np.percentile(drawn, (2.5, 97.5))
    return float(low), float(high)


def _array(values: Sequence[float] | Values) -> Values:
    """Take values in float64.

    Raises:
        NumericalError: there are none, or one is NaN or infinite.
    """
    found: Values = np.asarray(values, dtype=np.float64)
    if not len(found) or not np.isfinite(found).all():
        what = "NaN or infinite" if len(found) else "missing: there are none"
        raise NumericalError(f"values to measure are {what}", hint="are the weights finite?")
    return found
