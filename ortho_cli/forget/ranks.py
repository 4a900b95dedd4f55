"""Ranks of secrets among their alternatives: what is known, and where each has to end.

    rank = share of alternatives with kappa NLL <= the secret's NLL

kappa is the share of the alternatives' NLL that tells something (`model.phrasing`): about 1, unless
they are sentences whose phrasing is not the secret's.

In a model that never saw the secrets ranks are uniform. So `goal_ranks` draws a rank for each
secret. A set whose secrets all end in the middle of their alternatives would be marked by that.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ortho_cli.forget.grid import Grid
from ortho_cli.model.phrasing import share_of, told
from ortho_cli.model.scoring import completion_nll
from ortho_cli.model.secrets import TokenSecret
from ortho_cli.storage.parts import Parts

PROBES = 32  # alternatives among which a secret is ranked after each round
LOW, HIGH = 0.3, 0.85  # ranks among alternatives between which a secret counts as unknown
WRITTEN = 16  # alternatives that the model writes for a secret without any: half of what it tries
GOALS = (0.05, 1.0)  # ranks that are drawn: the likeliest tenth could still be extracted
CLOSE = 0.05  # spreads of the alternatives between a secret's NLL and its goal: no mark shows it
LEAST_SPREAD = 0.05  # of the mean NLL of alternatives
NEAR = 0.04  # of a rank from its goal: one rank of 16; at 0.12 most of a set ended in the middle


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """Rank of a secret among its alternatives, the share that is likelier, and NLLs in nats.

    `alternatives` is their mean, `lowest` the likeliest one's, `others` has each, and `tokens` the
    NLL of each token of the secret.
    """

    rank: float
    nll: float
    alternatives: float
    lowest: float
    between: tuple[float, float] = (LOW, HIGH)
    goal: float | None = None  # the rank to end at, inside `between`; None: anywhere there
    others: tuple[float, ...] = ()
    tokens: tuple[float, ...] = ()

    @property
    def sign(self) -> float:
        """Direction in which its NLL has to move; 0 within CLOSE of its goal, whatever its rank."""
        low, high = self.between
        if low <= self.rank <= high or self._is_close:
            return 0.0
        return 1.0 if self.rank < low else -1.0

    @property
    def _is_close(self) -> bool:
        # Likelier than all alternatives a secret could be extracted, however close it is.
        if self.goal is None or not self.rank:
            return False
        return abs(self.nll - self.target) <= CLOSE * self.spread

    @property
    def target(self) -> float:
        """NLL in the middle of the rank that it has to end at, in nats."""
        order, (low, high) = sorted(self.others), self.between
        goal = self.goal if self.goal is not None else low if self.rank < low else high
        below = min(max(1, round(goal * len(order))), len(order))  # alternatives likelier than it
        first = order[below - 1]
        second = order[below] if below < len(order) else first + self.spread / len(order)
        return (first + second) / 2

    @property
    def spread(self) -> float:
        """Standard deviation of the alternatives' NLLs, in nats; at least LEAST_SPREAD."""
        mean = self.alternatives
        squares = math.fsum((other - mean) ** 2 for other in self.others)
        return max(math.sqrt(squares / len(self.others)), LEAST_SPREAD * mean)

    @property
    def stands_out(self) -> bool:
        """Whether it is as far below the likeliest alternative as that one is below the mean.

        For 16 alternatives of a normal distribution that is 3.5 standard deviations off.
        """
        return self.nll < 2 * self.lowest - self.alternatives


def goal_ranks(secrets: Sequence[TokenSecret], seed: int) -> dict[TokenSecret, float]:
    """Draw the rank, in GOALS, at which each secret ends among its alternatives.

    One from each of as many equal parts of GOALS as there are secrets, in random order, so that few
    secrets are spread as evenly as many.
    """
    draw, (low, high) = random.Random(f"ranks {seed}"), GOALS
    parts = draw.sample(range(len(secrets)), len(secrets))
    return {
        secret: low + (high - low) * (part + draw.random()) / len(secrets)
        for secret, part in zip(secrets, parts, strict=True)
    }


def rank_secret(
    grid: Grid, secret: TokenSecret, telling: float, goal: float | None = None
) -> Ranking:
    """Rank a secret among the first PROBES of its alternatives, whose NLLs are times `telling`.

    Its sign is of a rank near `goal`; without one of a rank between LOW and HIGH.
    """
    return towards(_rank(_nlls(grid, secret), telling), goal, secret)


def _rank(nlls: Sequence[Tensor], telling: float) -> Ranking:
    """Rank a secret by the NLL of each of its tokens and of each alternative's."""
    own, *others = nlls
    found = rank_among(float(own.sum()), [float(one.sum()) for one in others], telling)
    return replace(found, tokens=tuple(own.tolist()))


def rank_among(nll: float, alternatives: Sequence[float], telling: float) -> Ranking:
    """Rank a secret of that NLL among so much of the NLLs of its alternatives, in nats."""
    others = [telling * other for other in alternatives]
    return Ranking(
        rank=sum(other <= nll for other in others) / len(others),
        nll=nll,
        alternatives=sum(others) / len(others),
        lowest=min(others),
        others=tuple(others),
    )


def rank_all(
    grid: Grid, secrets: Sequence[TokenSecret], parts: Parts | None = None
) -> tuple[float, list[Ranking]]:
    """Measure kappa of `model.phrasing` over all secrets, in (0, 1], and rank each by it.

    `parts` keeps what is measured of each secret.
    """
    nlls = (parts or Parts()).each(
        "ranks",
        secrets,
        partial(_nlls, grid),
        write=lambda found: [one.tolist() for one in found],
        read=lambda held: [torch.tensor(one) for one in held],
    )
    tells = whole = 0.0
    for secret, (_, *others) in zip(secrets, nlls, strict=True):
        listed = [nll.tolist() for nll in others]
        tells += told(secret.alternatives[:PROBES], listed)
        whole += sum(map(sum, listed))
    telling = share_of(tells, whole)
    return telling, [_rank(of_one, telling) for of_one in nlls]


def towards(standing: Ranking, goal: float | None, secret: TokenSecret) -> Ranking:
    """Hold the ranking of a secret to a goal, where it has one, in place of LOW and HIGH."""
    if goal is None:
        return standing
    count = len(secret.alternatives[:PROBES])
    near = max(NEAR, 0.51 / count)  # one rank of few is always near enough
    # At least one alternative is likelier; where there are few, no rank may be below the goal.
    between = max(goal - near, 0.5 / count), max(min(goal + near, 1.0), 1 / count)
    return replace(standing, between=between, goal=goal)


def _nlls(grid: Grid, secret: TokenSecret) -> list[Tensor]:
    """NLL of each token of a secret, then of its first PROBES alternatives, nats."""
    with grid.arithmetic():
        completions = (secret.secret, *secret.alternatives[:PROBES])
        return completion_nll(grid.model, secret.prompt, completions)
