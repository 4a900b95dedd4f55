"""isolate: forget secrets by few codes, those with the largest gain per damage to retained text.

Each round measures the model on the grid of codes that is written, and moves codes (moves.py) so
that at once

* each secret that is off its rank gets nearer to it: NLL_s - kappa mean NLL of alternatives of s;
* each secret at its rank stays there;
* alternatives of a secret that is off take its place where one of them has a chance of its own:
  their NLL falls by -log(1 - p) from where the work began, p being the secret's probability there.
  Other alternatives stay as they were.

A rank is drawn for each secret that the model knew. The drawn ranks are uniform, as those of
secrets that a model never saw: secrets that were all in the middle of their alternatives would be
marked by that. A round that brings secrets no nearer is undone and tried with fewer moves.

With `forget.support: columns` codes move in chosen columns of each weight alone (support.py).

Source: that gain is set against damage to what is retained is SSD's idea (Foster et al. 2023,
arXiv:2308.07707). Here gains are those of a Gauss-Newton step per secret in place of the Fisher of
the forget set, moves on the INT4 grid are in place of dampening, and there is a stop.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ortho_cli.decompose.edits import Edit, Edits, Key, load_arrays, save_arrays
from ortho_cli.events import EventSink, Step
from ortho_cli.forget import moves
from ortho_cli.forget.grid import Grid, Term
from ortho_cli.forget.moves import Row
from ortho_cli.forget.ranks import Ranking, goal_ranks, rank_secret, towards
from ortho_cli.forget.support import choose_columns, weigh
from ortho_cli.model.phrasing import carrying
from ortho_cli.model.secrets import TokenSecret
from ortho_cli.split.quantize import code_range
from ortho_cli.storage.parts import Pace

CONTRAST = 2  # alternatives per secret and round whose likelihood a move should keep
HOLD = 1.0  # of what alternatives lack to take the place of the secret
STAY = 0.5  # of that, where they have only to stay as they were
CHANCE = 10.0  # nats: the likeliest alternative of a fact has less, a phrase of some words more
PUSH = 4.0  # weight of alternatives that take its place, beside that of a secret that is far
ROWS = 64  # groups of secrets that are off, and secrets at their rank, that one round looks at
LARGEST = 16  # share of the moves that are allowed, as one over it, that one round may make
ATTEMPTS = 3  # sizes that a round tries, each a quarter of the one before
TRUSTED, DOUBTED = 0.5, 0.2  # of the fall foretold: above it rounds grow, below it they shrink
FAR = 0.5  # of the NLL at its goal, below which a secret is measured by its log odds
LEAST_ODDS = 1e-4  # (1 - p) / p that is told from 0
LEAST_FREE = 1e-3  # probability that is left to alternatives of a secret that is known by heart
LEAST_SPREAD = 0.05  # of the mean NLL of alternatives
PATIENCE = 6  # rounds without progress, after which the best round so far is taken


# Longer than 60 lines: half of it says what each argument is.
def isolate(
    grid: Grid,
    secrets: Sequence[TokenSecret],
    fisher: dict[str, Tensor],
    room: dict[str, int],
    *,
    telling: float,
    known: Collection[TokenSecret],
    share: float,
    rounds: int,
    fill: str,
    seed: int,
    on_event: EventSink,
    hold: float = HOLD,
    columns: dict[str, int] | None = None,
    state: Path | None = None,
    key: Key | None = None,
) -> list[Ranking]:
    """Move codes of the grid until every secret ranks among its alternatives.

    A run that was killed resumes from `state`, and ends in the same codes.

    Args:
        grid: the model; its codes change in place.
        secrets: to be forgotten.
        fisher: of text, as `held.broad_fisher` gives it.
        room: the largest number of codes that may differ from the nearest, by weight.
        telling: as `ranks.rank_all` gives it.
        known: secrets that were off before anything moved; ranks are drawn for them.
        share: the largest share of all codes that may move, beyond those that have.
        rounds: the largest number of rounds.
        fill: new code: step (the next one up or down), zero, or mean (of the group).
        seed: draws ranks of secrets, and the alternatives of each round.
        on_event: gets each round.
        hold: share of what alternatives lack to take the place of the secret that a round asks for.
        columns: the number of columns in which codes may move, by weight; None: any.
        state: file of unfinished work, for its owner alone.
        key: seals that file.
    Returns:
        The rank of each secret at the end; some may still be too likely.
    """
    where = None if columns is None else _columns(grid, secrets, fisher, columns)
    allowed = int(share * grid.numel)
    budget, floor = grid.moved + allowed, _mean_damage(grid, fisher)
    most = max(1, allowed // LARGEST)
    size = max(1, most // 4)
    found = [rank_secret(grid, secret, telling) for secret in secrets]
    goals = _open_goals(secrets, known, seed)
    found = best = start = list(map(towards, found, map(goals.get, secrets), secrets))
    least = _off(secrets, found, start)
    kept: Edits = grid.edits()
    waited, first, pace = 0, 0, Pace()
    if state is not None and (held := _State.load(state, key)) is not None:
        first, size, waited, kept = held.round, held.size, held.waited, held.kept
        best = _rank_at(grid, held.kept, secrets, telling, goals)
        least = _off(secrets, best, start)
        found = _rank_at(grid, held.now, secrets, telling, goals)
    for number in range(first, rounds):
        if state is not None and pace.due():
            at = _State(round=number, size=size, waited=waited, kept=kept, now=grid.edits())
            pace.save(partial(at.save, state, key))
        off = _off(secrets, found, start)
        if number and _order(found, off) >= _order(best, least):
            waited += 1
        else:
            kept, best, least, waited = grid.edits(), found, off, 0
        left, moved = sum(at.sign != 0 for at in found), grid.moved
        told = f"isolate: {left} of {len(secrets)} secrets left, {moved} codes moved"
        on_event(Step(name=told, number=number + 1, of=rounds, unit="rounds"))
        if not left or moved >= budget or waited > PATIENCE:
            break
        draw = random.Random(f"{seed} {number}")
        rows = _rows(secrets, found, start, telling, hold, draw)
        candidates = moves.find(grid, rows, fisher, floor, room, PROPOSE[fill], where)
        found, size = _try(
            grid,
            candidates,
            found,
            min(size, budget - moved),
            most,
            lambda: [rank_secret(grid, one, telling, goals.get(one)) for one in secrets],
            lambda ranks: _off(secrets, ranks, start),
        )
    if _order(found, _off(secrets, found, start)) < _order(best, least):
        return found
    grid.revert()
    grid.apply(kept)
    return best


@dataclass(frozen=True, slots=True, kw_only=True)
class _State:
    """What the round `round` begins with: the best codes so far, and those of now."""

    round: int
    size: int
    waited: int
    kept: Edits
    now: Edits

    def save(self, path: Path, key: Key | None) -> None:
        """Write it whole, for its owner alone."""
        arrays = {"at": np.asarray([self.round, self.size, self.waited])}
        for which, edits in (("kept", self.kept), ("now", self.now)):
            for name, edit in edits.items():
                arrays[f"{which}/{name}/positions"] = edit.positions
                arrays[f"{which}/{name}/codes"] = edit.codes
        save_arrays(path, arrays, key)

    @classmethod
    def load(cls, path: Path, key: Key | None) -> _State | None:
        """Read what an earlier run saved; None where there is nothing whole."""
        arrays = load_arrays(path, key)
        if arrays is None:
            return None
        edits: dict[str, dict[str, Edit]] = {"kept": {}, "now": {}}
        for entry, positions in arrays.items():
            which, _, rest = entry.partition("/")
            name, _, part = rest.rpartition("/")
            if part == "positions":
                codes = arrays[f"{which}/{name}/codes"].astype(np.int8)
                edits[which][name] = Edit(positions=positions.astype(np.int64), codes=codes)
        number, size, waited = map(int, arrays["at"])
        return cls(round=number, size=size, waited=waited, **edits)


def _rank_at(
    grid: Grid,
    edits: Edits,
    secrets: Sequence[TokenSecret],
    telling: float,
    goals: dict[TokenSecret, float],
) -> list[Ranking]:
    """Move codes as an earlier run had them, and rank each secret there."""
    grid.revert()
    grid.apply(edits)
    return [rank_secret(grid, secret, telling, goals.get(secret)) for secret in secrets]


def _open_goals(
    secrets: Sequence[TokenSecret], known: Collection[TokenSecret], seed: int
) -> dict[TokenSecret, float]:
    """Give the ranks to reach; what ranked as if it had never been seen has none."""
    return {one: goal for one, goal in goal_ranks(secrets, seed).items() if one in known}


def _try(
    grid: Grid,
    candidates: moves.Moves,
    found: list[Ranking],
    size: int,
    most: int,
    rank: Callable[[], list[Ranking]],
    off: Callable[[list[Ranking]], float],
) -> tuple[list[Ranking], int]:
    """Move up to `size` codes, or fewer where that brings secrets no nearer; else none.

    Returns:
        the ranks then, and the size of the next round.
    """
    for _ in range(ATTEMPTS):
        chosen, promised = moves.choose(candidates, size)
        undo = moves.make(grid, candidates, chosen)
        now = rank()
        fell = off(found) - off(now)
        if fell > 0:
            return now, _next_size(size, most, fell / promised)
        for name, places, codes in undo:
            grid.move(name, places, codes)
        size = max(1, len(chosen) // 4)
    return found, size


def _columns(
    grid: Grid, secrets: Sequence[TokenSecret], fisher: dict[str, Tensor], columns: dict[str, int]
) -> dict[str, Tensor]:
    told = [(secret.prompt, secret.secret) for secret in secrets]
    return choose_columns(grid, weigh(grid.fisher(told), fisher), columns)


def _next_size(size: int, most: int, ratio: float) -> int:
    """Adapt the size of a round to how well the gradients foretold it, as a trust region does."""
    if ratio > TRUSTED:
        return min(most, 2 * size)
    return size if ratio > DOUBTED else max(1, size // 2)


def _order(found: Sequence[Ranking], off: float) -> tuple[int, float]:
    """Order rounds by secrets that are too likely or unlikely, then by how far off they are."""
    return sum(at.sign != 0 for at in found), off


def _target(at: Ranking) -> float:
    """NLL in the middle of the rank that a secret has to end at, in nats."""
    order, (low, high) = sorted(at.others), at.between
    goal = at.goal if at.goal is not None else low if at.rank < low else high
    below = min(max(1, round(goal * len(order))), len(order))  # alternatives likelier than it
    first = order[below - 1]
    second = order[below] if below < len(order) else first + _spread(at) / len(order)
    return (first + second) / 2


def _is_far(at: Ranking) -> bool:
    """Whether a secret is still so well known that its NLL hardly tells one move from another."""
    return at.sign > 0 and at.nll < FAR * _target(at)


def _own(secret: TokenSecret, at: Ranking) -> tuple[list[float], float]:
    """Weights of the NLL of each token of a secret in its row, and how much the row has to rise.

    Near its goal a secret is measured by its NLL. A secret that is far from it is measured by the
    log odds of those tokens that carry it, v = log((1 - p) / p), whose slope does not vanish where
    p is near 1: dv = dNLL / (1 - p).
    """
    if _is_far(at):
        odds = [max(math.expm1(nll), LEAST_ODDS) for nll in at.tokens]
        carry = carrying(secret.secret, secret.alternatives)
        value = math.fsum(c * math.log(one) for c, one in zip(carry, odds, strict=True))
        weights = [c * (1 + 1 / one) for c, one in zip(carry, odds, strict=True)]
        return weights, _target(at) - value
    miss = 0.0 if at.goal is None and not at.sign else _target(at) - at.nll
    return [1.0] * len(secret.secret), miss


def _off(
    secrets: Sequence[TokenSecret], found: Sequence[Ranking], start: Sequence[Ranking]
) -> float:
    """Sum the squares of what secrets miss, each over the spread of its alternatives."""
    return math.fsum(
        (_own(secret, now)[1] / _spread(before)) ** 2
        for secret, now, before in zip(secrets, found, start, strict=True)
    )


def _spread(at: Ranking) -> float:
    """Standard deviation of the alternatives' NLLs, in nats; at least LEAST_SPREAD."""
    mean = at.alternatives
    squares = math.fsum((other - mean) ** 2 for other in at.others)
    return max(math.sqrt(squares / len(at.others)), LEAST_SPREAD * mean)


def _rows(
    secrets: Sequence[TokenSecret],
    found: Sequence[Ranking],
    start: Sequence[Ranking],
    telling: float,
    hold: float,
    draw: random.Random,
) -> list[Row]:
    """Say what has to rise, and what to stay.

    A row per secret, of the secret over some of its alternatives; one of its alternatives where
    they are to take its place; and one of all others that were lost. Secrets that are off come
    first, in ROWS groups where they are more; of those at their rank up to ROWS are drawn.
    """
    off: list[Row] = []
    there: list[Row] = []
    takers: list[Row] = []
    held: list[Row] = []
    for secret, now, before in zip(secrets, found, start, strict=True):
        scale = _spread(before)
        weights, miss = _own(secret, now)
        own = ((secret.prompt, secret.secret), weights)
        numbers = range(len(now.others))
        drawn = draw.sample(numbers, min(CONTRAST, len(numbers)))
        freed = _freed(before, telling)
        rows, share, push = (takers, 1.0, PUSH) if freed else (held, STAY, 1.0)
        rose = math.fsum(max(0.0, now.others[n] - before.others[n] - freed) for n in drawn)
        if now.sign and hold * rose:
            fall = -share * hold * rose / telling / len(drawn)
            rows.append(Row(terms=_others(secret, drawn, 1.0), miss=fall, scale=scale))
        if not _is_far(now):  # its rank depends on the alternatives that are nearest to its place
            target, push = _target(now), 1.0
            drawn = sorted(numbers, key=lambda n: abs(now.others[n] - target))[:CONTRAST]
        over = _others(secret, drawn, -push * telling)
        (off if now.sign else there).append(Row(terms=(own, *over), miss=miss, scale=scale))
    draw.shuffle(off)
    drawn_there = draw.sample(there, min(ROWS, len(there)))
    return [*_grouped(off), *drawn_there, *_grouped(takers), *([_sum(held)] if held else [])]


def _freed(before: Ranking, telling: float) -> float:
    """Say by how much the NLL of alternatives should fall as they take a secret's place, in nats.

    -log(1 - p), p being the secret's probability before anything moved; 0 where no alternative has
    a chance of its own.
    """
    if before.lowest > telling * CHANCE:
        return 0.0
    return telling * math.log(max(-math.expm1(-before.nll), LEAST_FREE))


def _grouped(rows: Sequence[Row]) -> list[Row]:
    """Sum rows, so that they are ROWS at most."""
    return [_sum(rows[first::ROWS]) for first in range(min(ROWS, len(rows)))]


def _others(secret: TokenSecret, numbers: Sequence[int], weight: float) -> tuple[Term, ...]:
    """Weigh the mean NLL of some alternatives of a secret."""
    return tuple(
        ((secret.prompt, other), [weight / len(numbers)] * len(other))
        for other in (secret.alternatives[number] for number in numbers)
    )


def _sum(rows: Sequence[Row]) -> Row:
    """Make one row of several."""
    return Row(
        terms=tuple(term for row in rows for term in row.terms),
        miss=math.fsum(row.miss for row in rows),
        scale=math.sqrt(math.fsum(row.scale**2 for row in rows)),
    )


def _mean_damage(grid: Grid, fisher: dict[str, Tensor]) -> float:
    """Return the mean damage of moving by one code, spacing^2 F, over all weights."""
    total = 0.0
    for name in grid.codes:
        total += float((grid.spacing(name).square_() * fisher[name]).sum(dtype=torch.float64))
    return total / grid.numel


def _step(
    codes: Tensor, original: Tensor, gradient: Tensor, group_size: int, bits: int = 4
) -> Tensor:
    """Propose the next code in the direction of the gradient."""
    return (codes.float() + gradient.sign()).clamp_(*code_range(bits))


def _zero(
    codes: Tensor, original: Tensor, gradient: Tensor, group_size: int, bits: int = 4
) -> Tensor:
    """Propose 0, and the original code for codes that moved."""
    return torch.where(codes == original, torch.zeros_like(gradient), original.float())


def _mean(
    codes: Tensor, original: Tensor, gradient: Tensor, group_size: int, bits: int = 4
) -> Tensor:
    """Propose the mean of the group's codes, and the original code for codes that moved."""
    groups = original.float().view(codes.shape[0], -1, group_size)
    mean = groups.mean(-1, keepdim=True).round().expand_as(groups).reshape(codes.shape)
    return torch.where(codes == original, mean, original.float())


PROPOSE = {"step": _step, "zero": _zero, "mean": _mean}
