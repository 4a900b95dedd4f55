"""isolate: move the few codes whose gain for forgetting is largest for the damage they do.

Rounds, each on the grid that will be written, so that what is measured is what is kept. With g the
gradient of sum_s sign_s (NLL_s - mean NLL of alternatives of s) over the secrets that are not yet
where they should be, d the move of a code from where it is and D its distance from where rounding
puts it, both in weights:

    gain = g d      damage = D^2 F_retain + the mean of that over all weights

and the codes with the largest gain / damage move. sign_s is +1 where a secret is likelier than its
alternatives, -1 where it has become less likely than nearly all of them (which marks it as well as
memory does), and 0 once it lies among them: each secret stops by itself.

Source: the ratio of importances is that of SSD (Foster et al. 2023, arXiv:2308.07707), with the
first-order gain for the Fisher of the forget set, moves on the INT4 grid for dampening, and a stop.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ortho_cli.events import EventSink, Step
from ortho_cli.forget.grid import Grid
from ortho_cli.formats.curvature import Curvature
from ortho_cli.formats.statistics import StatisticsReader
from ortho_cli.model.scoring import completion_nll
from ortho_cli.model.secrets import TokenSecret
from ortho_cli.split.quantize import code_range

CONTRAST = 2  # alternatives of each secret that a move should not make less likely
PATIENCE = 6  # rounds without progress, after which the best so far is taken
PROBES = 16  # alternatives that a secret is ranked among after each round
LOW, HIGH = 0.3, 0.85  # ranks among alternatives between which a secret is let be


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Where a secret stands: its share of alternatives that are likelier, and NLLs in nats.

    `alternatives` is their mean, `lowest` the likeliest one's.
    """

    rank: float
    nll: float
    alternatives: float
    lowest: float

    @property
    def sign(self) -> float:
        """Which way its NLL has to go."""
        return 1.0 if self.rank < LOW else -1.0 if self.rank > HIGH else 0.0

    @property
    def stands_out(self) -> bool:
        """Whether it is as far below the likeliest alternative as that is below their mean.

        Of 16 that are normally distributed that is 3.5 standard deviations off: no accident.
        """
        return self.nll < 2 * self.lowest - self.alternatives


def standing(grid: Grid, secret: TokenSecret) -> Standing:
    """Rank a secret among the first PROBES of its alternatives."""
    probes = secret.alternatives[:PROBES]
    with grid.arithmetic():
        found = completion_nll(grid.model, secret.prompt, [secret.secret, *probes])
    nll, *others = (float(tokens.sum()) for tokens in found)
    rank = sum(other <= nll for other in others) / len(others)
    mean = sum(others) / len(others)
    return Standing(rank=rank, nll=nll, alternatives=mean, lowest=min(others))


def isolate(
    grid: Grid,
    secrets: Sequence[TokenSecret],
    curvature: StatisticsReader,
    room: dict[str, int],
    *,
    share: float,
    rounds: int,
    fill: str,
    seed: int,
    on_event: EventSink,
) -> list[Standing]:
    """Move codes of the grid until every secret lies among its alternatives.

    Args:
        grid: the model; what moved is in it afterwards.
        secrets: what must go.
        curvature: of the retain set.
        room: most codes of each weight that may be moved.
        share: most of all codes that may be moved, beyond those that have been.
        rounds: most rounds.
        fill: where codes go: step (the next code up or down), zero, or mean (of their group).
        seed: draws the alternatives that are contrasted.
        on_event: told of each round.
    Returns:
        Where each secret stands at the end; some may still be too likely.
    """
    allowed = int(share * grid.numel)
    budget = grid.moved + allowed
    # Small steps: a gradient holds for hundreds of codes, not for thousands.
    most = max(1, allowed // 64)
    size = max(1, most // 4)
    floor = _mean_damage(grid, curvature)
    found = best = [standing(grid, secret) for secret in secrets]
    kept, waited = grid.edits(), 0
    for number in range(rounds):
        signs = {s: at.sign for s, at in zip(secrets, found, strict=True) if at.sign}
        if number and _left(found) >= _left(best):
            waited += 1
        else:
            kept, best, waited = grid.edits(), found, 0
        moved = grid.moved
        told = f"isolate: {len(signs)} of {len(secrets)} secrets left, {moved} codes moved"
        on_event(Step(name=told, number=number + 1, of=rounds))
        if not signs or moved >= budget or waited > PATIENCE:
            break
        before = found
        draw = random.Random(f"{seed} {number}")
        now = min(size, budget - moved)
        step_round(grid, signs, curvature, floor, room, now, PROPOSE[fill], draw)
        found = [standing(grid, secret) for secret in secrets]
        crossed = any(a.sign * b.sign < 0 for a, b in zip(before, found, strict=True))
        size = max(1, size // 2) if crossed else min(most, size + max(1, size // 2))
    if _left(found) < _left(best):
        return found
    grid.revert()
    grid.apply(kept)
    return best


def _left(found: Sequence[Standing]) -> tuple[int, float]:
    """Order attempts: secrets that are not among their alternatives, then how far off they are.

    In nats: the rank of a secret that is known by heart stays 0 for most of its way.
    """
    off = sum(abs(at.nll - at.alternatives) for at in found if at.sign)
    return sum(at.sign != 0 for at in found), off


def step_round(
    grid: Grid,
    signs: dict[TokenSecret, float],
    curvature: StatisticsReader,
    floor: float,
    room: dict[str, int],
    size: int,
    propose: Callable[[Tensor, Tensor, Tensor, int, int], Tensor],
    draw: random.Random,
) -> None:
    """Move the `size` codes with the largest gain / damage; `floor` is the mean damage."""
    pairs = [((s.prompt, s.secret), sign) for s, sign in signs.items()]
    for secret, sign in signs.items():
        others = draw.sample(secret.alternatives, min(CONTRAST, len(secret.alternatives)))
        pairs += [((secret.prompt, other), -sign / len(others)) for other in others]
    gradients = grid.gradient(pairs)
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
        near = torch.from_numpy(Curvature(curvature, name).whole()).to(grid.device)
        ratio /= far.square_().mul_(near).add_(floor)
        free = room[name] - int((codes != original).sum())
        if free < size:  # no new places once it is full; those that moved may go on
            ratio[codes == original] = _cut(ratio[codes == original], max(0, free))
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
    """Rule all but the k largest out."""
    kept = torch.full_like(ratio, -1.0)
    top = ratio.topk(min(k, ratio.numel()))
    kept[top.indices] = top.values
    return kept


def _mean_damage(grid: Grid, curvature: StatisticsReader) -> float:
    """Mean over all weights of what moving by one code costs: spacing^2 F."""
    total = 0.0
    for name in grid.codes:
        near = torch.from_numpy(Curvature(curvature, name).whole()).to(grid.device)
        total += float((grid.spacing(name).square_() * near).sum(dtype=torch.float64))
    return total / grid.numel


def _step(
    codes: Tensor, original: Tensor, gradient: Tensor, group_size: int, bits: int = 4
) -> Tensor:
    """Propose the next code in the direction of the gradient."""
    return (codes.float() + gradient.sign()).clamp_(*code_range(bits))


def _zero(
    codes: Tensor, original: Tensor, gradient: Tensor, group_size: int, bits: int = 4
) -> Tensor:
    """Propose 0, and for codes that moved the way back."""
    return torch.where(codes == original, torch.zeros_like(gradient), original.float())


def _mean(
    codes: Tensor, original: Tensor, gradient: Tensor, group_size: int, bits: int = 4
) -> Tensor:
    """Propose the mean of the group's codes, and for codes that moved the way back."""
    groups = original.float().view(codes.shape[0], -1, group_size)
    mean = groups.mean(-1, keepdim=True).round().expand_as(groups).reshape(codes.shape)
    return torch.where(codes == original, mean, original.float())


PROPOSE = {"step": _step, "zero": _zero, "mean": _mean}
