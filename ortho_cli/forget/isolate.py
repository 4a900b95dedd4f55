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
marked by that. A round moves codes as long as what it measured of them foretells the ranks that
they lead to. A move that brings secrets no nearer is undone and tried with fewer codes.

With `forget.support: columns` codes move in chosen columns of each weight alone (support.py).

Source: that gain is set against damage to what is retained is SSD's idea (Foster et al. 2023,
arXiv:2308.07707). Here gains are those of a Gauss-Newton step per secret in place of the Fisher of
the forget set, moves on the INT4 grid are in place of dampening, and there is a stop.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
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
FEW = 16  # moves that brought secrets no nearer, below which they and not their number are to blame
USES = 5  # times that a round moves codes by what it measured once
TRUSTED, DOUBTED = 0.5, 0.2  # of the fall foretold: above it rounds grow, below it they shrink
WORTH = 0.1  # of it, below which a round ends that uses what it measured again
FAR = 0.5  # of the NLL at its goal, below which a secret is measured by its log odds
LEAST_ODDS = 1e-4  # (1 - p) / p that is told from 0
LEAST_FREE = 1e-3  # probability that is left to alternatives of a secret that is known by heart
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
        if not (left and size) or moved >= budget or waited > PATIENCE:
            break
        draw = random.Random(f"{seed} {number}")
        asked = _asked(secrets, found, start, telling, hold, draw)
        rows = [one.row(found) for one in asked]
        candidates = moves.find(grid, rows, fisher, floor, room, PROPOSE[fill], where)
        found, size = _use(
            grid,
            candidates,
            asked,
            found,
            size,
            min(most, budget - moved),
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


def _use(
    grid: Grid,
    candidates: moves.Moves,
    asked: Sequence[_Asked],
    found: list[Ranking],
    size: int,
    most: int,
    rank: Callable[[], list[Ranking]],
    off: Callable[[list[Ranking]], float],
) -> tuple[list[Ranking], int]:
    """Move codes as long as what was measured of the candidates foretells what moves do.

    To rank secrets takes a fifth of the time that it takes to measure candidates.

    Args:
        grid: the model; its codes change.
        candidates: moves, and what each does.
        asked: rows of the candidates.
        found: ranks now.
        size: the largest number of codes that move at once.
        most: the largest number that may move.
        rank: ranks all secrets.
        off: says how far they are off.
    Returns:
        the ranks then, and the size to begin the next round with; 0 where no single move helps.
    """
    for use in range(USES):
        now, ratio, chosen = _try(
            grid,
            candidates,
            found,
            min(size, most),
            rank,
            off,
            attempts=1 if use else ATTEMPTS,
            worth=WORTH if use else 0.0,
        )
        if now is None:
            least = 0 if size <= 1 else 1
            return found, size if use else max(least, len(chosen) // 4)
        found, most, size = now, most - len(chosen), _next_size(size, most, ratio)
        if ratio < DOUBTED or most <= 0 or not any(at.sign for at in found):
            break
        candidates.free[chosen] = False
        misses = moves.misses_of([one.row(found) for one in asked], grid.device)
        candidates = replace(candidates, misses=misses)
    return found, size


def _try(
    grid: Grid,
    candidates: moves.Moves,
    found: list[Ranking],
    size: int,
    rank: Callable[[], list[Ranking]],
    off: Callable[[list[Ranking]], float],
    *,
    attempts: int,
    worth: float,
) -> tuple[list[Ranking] | None, float, Tensor]:
    """Move up to `size` codes, or fewer where that brings secrets no nearer; else none.

    Moves count that do more than `worth` times what they promise.

    Returns:
        the ranks then, or None; the fall over the one that was foretold; and the last moves chosen.
    """
    for _ in range(attempts):
        chosen, promised = moves.choose(candidates, size)
        undo = moves.make(grid, candidates, chosen)
        now = rank()
        fell = off(found) - off(now)
        if fell > worth * promised:
            return now, fell / promised, chosen
        for name, places, codes in undo:
            grid.move(name, places, codes)
        if len(chosen) <= FEW:  # they are not what they seem; others are tried
            candidates.free[chosen] = False
        size = max(1, len(chosen) // 4)
    return None, 0.0, chosen


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


def _is_far(at: Ranking) -> bool:
    """Whether a secret is still so well known that its NLL hardly tells one move from another."""
    return at.sign > 0 and at.nll < FAR * at.target


def _weights(secret: TokenSecret, at: Ranking) -> list[float]:
    """Weigh the NLL of each token of a secret in its row.

    Near its goal a secret is measured by its NLL. A secret that is far from it is measured by the
    log odds of those tokens that carry it, v = log((1 - p) / p), whose slope does not vanish where
    p is near 1: dv = dNLL / (1 - p).
    """
    if not _is_far(at):
        return [1.0] * len(secret.secret)
    carry = carrying(secret.secret, secret.alternatives)
    return [c * (1 + 1 / one) for c, one in zip(carry, _odds(at), strict=True)]


def _miss(secret: TokenSecret, at: Ranking, *, by_odds: bool) -> float:
    """Say how much the row of a secret has to rise, by its log odds or by its NLL."""
    if not by_odds:
        return 0.0 if at.goal is None and not at.sign else at.target - at.nll
    carry = carrying(secret.secret, secret.alternatives)
    return at.target - math.fsum(c * math.log(o) for c, o in zip(carry, _odds(at), strict=True))


def _odds(at: Ranking) -> list[float]:
    """Give (1 - p) / p of each token of a secret."""
    return [max(math.expm1(nll), LEAST_ODDS) for nll in at.tokens]


def _off(
    secrets: Sequence[TokenSecret], found: Sequence[Ranking], start: Sequence[Ranking]
) -> float:
    """Sum the squares of what secrets miss, each over the spread of its alternatives."""
    return math.fsum(
        (_miss(secret, now, by_odds=_is_far(now)) / before.spread) ** 2
        for secret, now, before in zip(secrets, found, start, strict=True)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """A row, whose terms stay, and what it misses at any ranks of all secrets."""

    terms: tuple[Term, ...]
    scale: float
    miss: Callable[[Sequence[Ranking]], float]

    def row(self, ranks: Sequence[Ranking]) -> Row:
        """Give the row at these ranks."""
        return Row(terms=self.terms, miss=self.miss(ranks), scale=self.scale)


def _asked(
    secrets: Sequence[TokenSecret],
    found: Sequence[Ranking],
    start: Sequence[Ranking],
    telling: float,
    hold: float,
    draw: random.Random,
) -> list[_Asked]:
    """Say what has to rise, and what to stay.

    A row per secret, of the secret over some of its alternatives; one of its alternatives where
    they are to take its place; and one of all others that were lost. Secrets that are off come
    first, in ROWS groups where they are more; of those at their rank up to ROWS are drawn.
    """
    off: list[_Asked] = []
    there: list[_Asked] = []
    takers: list[_Asked] = []
    held: list[_Asked] = []
    for index, (secret, now, before) in enumerate(zip(secrets, found, start, strict=True)):
        scale, far = before.spread, _is_far(now)
        own = ((secret.prompt, secret.secret), _weights(secret, now))
        numbers = range(len(now.others))
        drawn = draw.sample(numbers, min(CONTRAST, len(numbers)))
        freed = _freed(before, telling)
        rows, share, push = (takers, 1.0, PUSH) if freed else (held, STAY, 1.0)
        lack = partial(_lack, index, before, tuple(drawn), freed, -share * hold / telling)
        if now.sign and lack(found):
            rows.append(_Asked(terms=_others(secret, drawn, 1.0), miss=lack, scale=scale))
        if not far:  # its rank depends on the alternatives that are nearest to its place
            target, push = now.target, 1.0
            drawn = sorted(numbers, key=lambda n: abs(now.others[n] - target))[:CONTRAST]
        over = _others(secret, drawn, -push * telling)
        miss = partial(_miss_of, secret, index, far)
        (off if now.sign else there).append(_Asked(terms=(own, *over), miss=miss, scale=scale))
    draw.shuffle(off)
    drawn_there = draw.sample(there, min(ROWS, len(there)))
    return [*_grouped(off), *drawn_there, *_grouped(takers), *([_sum(held)] if held else [])]


def _miss_of(secret: TokenSecret, index: int, by_odds: bool, ranks: Sequence[Ranking]) -> float:
    return _miss(secret, ranks[index], by_odds=by_odds)


def _lack(
    index: int,
    before: Ranking,
    numbers: Sequence[int],
    freed: float,
    share: float,
    ranks: Sequence[Ranking],
) -> float:
    """Say how much the mean NLL of some alternatives of a secret has to rise: never above 0."""
    others = ranks[index].others
    rose = math.fsum(max(0.0, others[n] - before.others[n] - freed) for n in numbers)
    return share * rose / len(numbers)


def _freed(before: Ranking, telling: float) -> float:
    """Say by how much the NLL of alternatives should fall as they take a secret's place, in nats.

    -log(1 - p), p being the secret's probability before anything moved; 0 where no alternative has
    a chance of its own.
    """
    if before.lowest > telling * CHANCE:
        return 0.0
    return telling * math.log(max(-math.expm1(-before.nll), LEAST_FREE))


def _grouped(rows: Sequence[_Asked]) -> list[_Asked]:
    """Sum rows, so that they are ROWS at most."""
    return [_sum(rows[first::ROWS]) for first in range(min(ROWS, len(rows)))]


def _others(secret: TokenSecret, numbers: Sequence[int], weight: float) -> tuple[Term, ...]:
    """Weigh the mean NLL of some alternatives of a secret."""
    return tuple(
        ((secret.prompt, other), [weight / len(numbers)] * len(other))
        for other in (secret.alternatives[number] for number in numbers)
    )


def _sum(rows: Sequence[_Asked]) -> _Asked:
    """Make one row of several."""
    return _Asked(
        terms=tuple(term for row in rows for term in row.terms),
        miss=lambda ranks: math.fsum(row.miss(ranks) for row in rows),
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
