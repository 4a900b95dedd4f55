"""Moves of codes that bring several likelihoods to where they should be, all at once.

A row is a weighted sum of NLLs that has to rise by m nats, or to stay (m = 0); s nats of it count
as one. J is the gradient of each row by the weights, d the move of a code in units of weights.
Moves are taken from those candidates that serve the rows most for what they cost:

    minimise sum_rows ((m - sum_moves J d) / s)^2
    candidates:  the largest  d sum_rows (m / s^2) J  /  damage
    taken first: the largest fall of the sum  /  damage
    damage = D^2 F + its mean over all weights

D is the distance of a code, after its move, from the nearest code of the source's weight, and F the
Fisher of retained text. Each move taken changes what the rows still miss, so a move that serves one
row and harms another is taken only where both together gain, and none is taken once the rows are
where they should be.

Sources: Gauss and Newton's method with a trust region (Levenberg 1944; the caller holds predicted
and actual falls against each other), moves on a grid taken greedily, as in orthogonal matching
pursuit (Pati et al. 1993), with the damage as the price of each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ortho_cli.forget.grid import Grid, Term

CANDIDATES = 1 << 14  # moves that a round chooses from; it takes hundreds
PORTIONS = 64  # in which moves are taken; what rows miss is counted again after each

Propose = Callable[[Tensor, Tensor, Tensor, int, int], Tensor]
Undo = list[tuple[str, Tensor, Tensor]]  # weight, flat positions, codes that were there


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A sum of weighted NLLs that has to rise by `miss` nats; `scale` nats of it count as one."""

    terms: tuple[Term, ...]
    miss: float
    scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Moves:
    """Candidates, and what each does.

    `owners`: numbers of their weights in the grid; `places`: flat positions there; `codes`: codes
    after the move; `damages`: float32; `free`: bool, whether it is not made yet; each (moves,).
    `effects`: rise of each row over its scale, (rows, moves) float32. `misses`: what each row
    misses, over its scale, (rows,) float32.
    """

    owners: Tensor
    places: Tensor
    codes: Tensor
    damages: Tensor
    effects: Tensor
    misses: Tensor
    free: Tensor


def find(
    grid: Grid,
    rows: Sequence[Row],
    fisher: dict[str, Tensor],
    floor: float,
    room: dict[str, int],
    propose: Propose,
    columns: dict[str, Tensor] | None = None,
) -> Moves:
    """Find the candidates and measure what each does to each row.

    Args:
        grid: the model on its codes; unchanged afterwards.
        rows: what has to rise, and what has to stay.
        fisher: of text, (out, in) float32 per weight.
        floor: the mean damage of a move by one code.
        room: the largest number of codes that may differ from the nearest, by weight. Whatever is
            chosen from the candidates keeps to it.
        propose: new codes from codes, original codes, gradient, group size and bits.
        columns: (in,) bool of each weight, the columns in which codes may move; None: any.
    Raises:
        NumericalError: a gradient is NaN or infinite.
    """
    terms, shares = _terms(rows)
    shares = shares.to(grid.device)
    weights = misses_of(rows, grid.device) @ shares
    pulls = [_times(term, weight) for term, weight in zip(terms, weights.tolist(), strict=True)]
    found = _candidates(grid, grid.gradient(pulls), fisher, floor, room, propose, columns)
    owners = found.owners
    mine = [(owners == number).nonzero().squeeze(1) for number in range(len(grid.codes))]
    places = {name: found.places[at] for name, at in zip(grid.codes, mine, strict=True)}
    effects = torch.zeros(len(rows), len(owners), device=grid.device)
    done = 0
    for slopes in grid.slopes(terms, places):
        effects += shares[:, done : done + len(slopes)] @ slopes
        done += len(slopes)
    effects = effects[:, torch.cat(mine).argsort()]
    return Moves(
        owners=owners,
        places=found.places,
        codes=found.codes,
        damages=found.damages,
        effects=effects.mul_(found.steps),
        misses=misses_of(rows, grid.device),
        free=torch.ones_like(owners, dtype=torch.bool),
    )


def misses_of(rows: Sequence[Row], device: torch.device) -> Tensor:
    """Give what each row misses, over its scale, (rows,) float32."""
    return torch.tensor([row.miss / row.scale for row in rows], device=device)


def _terms(rows: Sequence[Row]) -> tuple[list[Term], Tensor]:
    """Give the terms of all rows, each of them once, and how much each is of a row over its scale.

    Returns:
        the terms, whose first weight other than 0 is 1, and (rows, terms) float32.
    """
    terms: dict[Term, int] = {}
    shares: list[tuple[int, int, float]] = []
    for number, row in enumerate(rows):
        for (first, second), weights in row.terms:
            unit = next((weight for weight in weights if weight), 1.0)
            alike = (tuple(first), tuple(second)), tuple(weight / unit for weight in weights)
            shares.append((number, terms.setdefault(alike, len(terms)), unit / row.scale))
    found = torch.zeros(len(rows), len(terms))
    for number, term, share in shares:
        found[number, term] += share
    return list(terms), found


def _times(term: Term, factor: float) -> Term:
    pair, weights = term
    return pair, [factor * weight for weight in weights]


class _Candidates(NamedTuple):
    """As in `Moves`; `steps` are d, and `serves` how much a move serves the rows for its damage."""

    owners: Tensor
    places: Tensor
    codes: Tensor
    steps: Tensor
    damages: Tensor
    serves: Tensor


def _candidates(
    grid: Grid,
    gradients: dict[str, Tensor],
    fisher: dict[str, Tensor],
    floor: float,
    room: dict[str, int],
    propose: Propose,
    columns: dict[str, Tensor] | None,
) -> _Candidates:
    """Choose the moves that serve the rows most for their damage."""
    parts = []
    for number, (name, codes) in enumerate(grid.codes.items()):
        original, spacing = grid.original[name], grid.spacing(name)
        gradient = gradients.pop(name)
        after = propose(codes, original, gradient, grid.group_size, grid.bits[name])
        step = (after - codes) * spacing
        damage = ((after - original) * spacing).square_().mul_(fisher[name]).add_(floor)
        serves = step * gradient / damage
        free = room[name] - int((codes != original).sum())
        if columns is not None:
            serves[:, ~columns[name]] = -1.0
        # Ortho has no room for more new positions; codes that moved may move again.
        if free < CANDIDATES:
            serves[codes == original] = _cut(serves[codes == original], max(0, free))
        top = serves.view(-1).topk(min(CANDIDATES, serves.numel()))
        places = top.indices[top.values > 0]
        at = (whole.view(-1)[places] for whole in (after, step, damage, serves))
        parts.append(_Candidates(torch.full_like(places, number), places, *at))
    found = _Candidates(*map(torch.cat, zip(*parts, strict=True)))
    best = found.serves.sort(descending=True, stable=True).indices[:CANDIDATES]
    return _Candidates(*(part[best] for part in found))


def _cut(values: Tensor, k: int) -> Tensor:
    """Set all but the k largest to -1, so that they are not chosen."""
    kept = torch.full_like(values, -1.0)
    top = values.topk(min(k, values.numel()))
    kept[top.indices] = top.values
    return kept


def choose(moves: Moves, size: int) -> tuple[Tensor, float]:
    """Choose up to `size` free moves that bring all rows together nearest to where they should be.

    Returns:
        their numbers, in the order in which they were taken, and by how much the sum of squares of
        what rows miss should fall.
    """
    squares = moves.effects.square().sum(0)
    misses, free = moves.misses, moves.free.clone()
    taken: list[Tensor] = []
    left, portion = size, max(1, size // PORTIONS)
    while left and portion:
        falls = (2 * (misses @ moves.effects) - squares) / moves.damages
        top = falls.mul_(free).topk(min(portion, left, len(falls)))
        mine = top.indices[top.values > 0]
        after = misses - moves.effects[:, mine].sum(1)
        if not after.square().sum() < misses.square().sum():  # together they go too far
            portion //= 2
            continue
        misses, free[mine], left = after, False, left - len(mine)
        taken.append(mine)
    fall = float(moves.misses.square().sum() - misses.square().sum())
    return torch.cat([*taken, torch.zeros(0, dtype=torch.long, device=misses.device)]), fall


def make(grid: Grid, moves: Moves, chosen: Tensor) -> Undo:
    """Make the chosen moves; give back what undoes them."""
    undo: Undo = []
    names = tuple(grid.codes)
    for number in torch.unique(moves.owners[chosen]).tolist():
        mine = chosen[moves.owners[chosen] == number]
        name, places = names[number], moves.places[mine]
        undo.append((name, places, grid.codes[name].view(-1)[places].clone()))
        grid.move(name, places, moves.codes[mine])
    return undo
