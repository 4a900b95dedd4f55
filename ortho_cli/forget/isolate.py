"""isolate: forget secrets by few codes, those with the largest gain per damage to retained text.

Each round measures the model on the grid of codes that is written. g is the gradient of
sum_s sign_s (NLL_s - mean NLL of alternatives of s) - HOLD (mean NLL of those alternatives that are
less likely than where the work began). d is the move of a code from its present
place, and D its distance from the nearest code of the source's weight, both in units of weights:

    gain = g d      damage = D^2 F + the mean of that over all weights

F is the Fisher of retained text of several kinds (held.py). The codes with the largest gain /
damage move. sign_s is +1 where a secret is likelier than the rank that was drawn for it among its
alternatives, -1 where it is less likely, and 0 where it is there: it no longer drives moves. The
drawn ranks are uniform, as those of secrets that a model never saw. Secrets that were all in the
middle of their alternatives would be marked by that.

With `forget.support: columns` codes move in chosen columns of each weight alone (support.py).

Source: the ratio of importances is that of SSD (Foster et al. 2023, arXiv:2308.07707), with the
first-order gain for the Fisher of the forget set, moves on the INT4 grid for dampening, and a stop.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ortho_cli.decompose.edits import Edit, Edits, Key, load_arrays, save_arrays
from ortho_cli.events import EventSink, Step
from ortho_cli.forget.grid import Grid, Pair
from ortho_cli.forget.ranks import Ranking, goal_ranks, rank_secret, towards
from ortho_cli.forget.support import choose_columns, weigh
from ortho_cli.model.secrets import TokenSecret
from ortho_cli.split.quantize import code_range
from ortho_cli.storage.parts import Pace

CONTRAST = 2  # alternatives per secret whose likelihood a move should keep
HOLD = 0.5  # of alternatives that are less likely than where the work began; 1 converges worse
PATIENCE = 6  # rounds without progress, after which the best round so far is taken


# Longer than 60 lines: half of it says what each argument is.
def isolate(
    grid: Grid,
    secrets: Sequence[TokenSecret],
    fisher: dict[str, Tensor],
    room: dict[str, int],
    *,
    telling: float,
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
        share: the largest share of all codes that may move, beyond those that have.
        rounds: the largest number of rounds.
        fill: new code: step (the next one up or down), zero, or mean (of the group).
        seed: draws ranks of secrets, and the alternatives of each round.
        on_event: gets each round.
        hold: weight of alternatives that are less likely than where the work began.
        columns: the number of columns in which codes may move, by weight; None: any.
        state: file of unfinished work, for its owner alone.
        key: seals that file.
    Returns:
        The rank of each secret at the end; some may still be too likely.
    """
    open_ = None
    if columns is not None:
        open_ = choose_columns(grid, weigh(grid.fisher(_pairs(secrets)), fisher), columns)
    allowed = int(share * grid.numel)
    budget, floor = grid.moved + allowed, _mean_damage(grid, fisher)
    # Small steps: a gradient predicts hundreds of moves, not thousands.
    most = max(1, allowed // 64)
    size = max(1, most // 4)
    found = [rank_secret(grid, secret, telling) for secret in secrets]
    goals, start = _open_goals(secrets, found, seed), found
    found = best = list(map(towards, found, map(goals.get, secrets), secrets))
    kept: Edits = grid.edits()
    waited, first, pace = 0, 0, Pace()
    if state is not None and (held := _State.load(state, key)) is not None:
        first, size, waited, kept = held.round, held.size, held.waited, held.kept
        best = _rank_at(grid, held.kept, secrets, telling, goals)
        found = _rank_at(grid, held.now, secrets, telling, goals)
    for number in range(first, rounds):
        if state is not None and pace.due():
            at = _State(round=number, size=size, waited=waited, kept=kept, now=grid.edits())
            pace.save(partial(at.save, state, key))
        signs = {s: at.sign for s, at in zip(secrets, found, strict=True) if at.sign}
        if number and _left(found) >= _left(best):
            waited += 1
        else:
            kept, best, waited = grid.edits(), found, 0
        moved = grid.moved
        told = f"isolate: {len(signs)} of {len(secrets)} secrets left, {moved} codes moved"
        on_event(Step(name=told, number=number + 1, of=rounds, unit="rounds"))
        if not signs or moved >= budget or waited > PATIENCE:
            break
        before, draw = found, random.Random(f"{seed} {number}")
        now = min(size, budget - moved)
        terms = [
            term
            for one in zip(secrets, found, start, strict=True)
            for term in _terms(*one, hold, draw)
        ]
        step_round(grid, terms, fisher, floor, room, now, PROPOSE[fill], open_)
        found = [rank_secret(grid, secret, telling, goals.get(secret)) for secret in secrets]
        crossed = any(a.sign * b.sign < 0 for a, b in zip(before, found, strict=True))
        size = max(1, size // 2) if crossed else min(most, size + max(1, size // 2))
    if _left(found) < _left(best):
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
    secrets: Sequence[TokenSecret], found: Sequence[Ranking], seed: int
) -> dict[TokenSecret, float]:
    """Give the ranks to reach; what ranks as if it had never been seen stays there."""
    known = {secret for secret, at in zip(secrets, found, strict=True) if at.sign}
    return {one: goal for one, goal in goal_ranks(secrets, seed).items() if one in known}


def _left(found: Sequence[Ranking]) -> tuple[int, float]:
    """Order rounds by secrets that are too likely or unlikely, then by how far off they are.

    The distance is in nats, since the rank of a well-known secret stays 0 for most of the way.
    """
    off = sum(abs(at.nll - at.alternatives) for at in found if at.sign)
    return sum(at.sign != 0 for at in found), off


def _terms(
    secret: TokenSecret, now: Ranking, start: Ranking, hold: float, draw: random.Random
) -> Iterator[tuple[Pair, float]]:
    """Give the NLLs whose sum is to rise, with their weights; none for a secret at its rank."""
    if not now.sign:
        return
    yield (secret.prompt, secret.secret), now.sign
    count = len(secret.alternatives)
    drawn = draw.sample(range(count), min(CONTRAST, count))
    for number in drawn:
        lost = number < len(now.others) and now.others[number] > start.others[number]
        weight = -(now.sign + hold * lost) / len(drawn)
        yield (secret.prompt, secret.alternatives[number]), weight


def step_round(
    grid: Grid,
    terms: Sequence[tuple[Pair, float]],
    fisher: dict[str, Tensor],
    floor: float,
    room: dict[str, int],
    size: int,
    propose: Callable[[Tensor, Tensor, Tensor, int, int], Tensor],
    columns: dict[str, Tensor] | None = None,
) -> None:
    """Move the `size` codes with the largest gain / damage; `floor` is the mean damage.

    With `columns`, (in,) bool of each weight, in those alone.
    """
    gradients = grid.gradient(terms)
    names = sorted(gradients)
    best: list[Tensor] = []
    places: list[Tensor] = []
    goals: list[Tensor] = []
    owners: list[Tensor] = []
    for number, name in enumerate(names):
        codes, original = grid.codes[name], grid.original[name]
        spacing = grid.spacing(name)
        gradient = gradients.pop(name)
        goal = propose(codes, original, gradient, grid.group_size, grid.bits[name])
        ratio = (goal - codes) * spacing * gradient
        far = (goal - original) * spacing
        ratio /= far.square_().mul_(fisher[name]).add_(floor)
        free = room[name] - int((codes != original).sum())
        if free < size:  # ortho has no room for new positions; codes that moved may move again
            ratio[codes == original] = _cut(ratio[codes == original], max(0, free))
        if columns is not None:
            ratio[:, ~columns[name]] = -1.0
        flat = ratio.view(-1)
        top = flat.topk(min(size, flat.numel()))
        best.append(top.values)
        places.append(top.indices)
        goals.append(goal.view(-1)[top.indices])
        owners.append(torch.full_like(top.indices, number))
    ratio, place, goal, owner = map(torch.cat, (best, places, goals, owners))
    chosen = ratio.sort(descending=True, stable=True).indices[:size]
    chosen = chosen[ratio[chosen] > 0]
    for number in torch.unique(owner[chosen]).tolist():
        mine = chosen[owner[chosen] == number]
        grid.move(names[number], place[mine], goal[mine])


def _cut(ratio: Tensor, k: int) -> Tensor:
    """Set all but the k largest to -1, so that they are not chosen."""
    kept = torch.full_like(ratio, -1.0)
    top = ratio.topk(min(k, ratio.numel()))
    kept[top.indices] = top.values
    return kept


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
