"""Text of several kinds on which base must keep the predictions that it has before it forgets.

A retain set of one kind holds that kind alone: base that forgot natural sentences and held on to
speeches lost its English everywhere else. So `gather` puts three kinds together:

* `data`: the user's own text, where there is some;
* `self_written`: what base itself writes from random first words, which is text of many kinds;
* `neighbours`: what it writes after the words with which most prompts begin, without what tells a
  secret: text of the secrets' form about something else.

The divergence from the predictions before is measured over the likeliest tokens and the rest:

    KL = sum_{v in top} p_v (log p_v - log q_v) + p_rest (log p_rest - log q_rest)

p is of base before, q of base now. It is at most the divergence over all tokens, since the tokens
of the rest are merged, and it takes 1.5 KB per position in place of 100 KB (the logits of 49,152
tokens in bfloat16).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from ortho_cli.decompose.edits import Key, load_arrays, save_arrays
from ortho_cli.events import EventSink, Finishing, Noted
from ortho_cli.forget.grid import Grid, Pair
from ortho_cli.formats.curvature import Curvature
from ortho_cli.formats.statistics import StatisticsReader
from ortho_cli.model.secrets import TokenSecret
from ortho_cli.model.self_written import FEWEST, common_opening, without_secrets, write_text
from ortho_cli.model.tokenizer import Tokenizer
from ortho_cli.storage.parts import Pace, Parts

FISHER_SEQUENCES = 24  # of each kind: half a minute of a model of 135 M weights
LIKELIEST = 256  # tokens per position that are told apart; the rest is one more term
NEIGHBOURS = "neighbours"
SMALLEST = 1e-6  # probability of the rest, below which it counts as this

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """Text of one kind: pairs of tokens that are given, and tokens whose predictions are held."""

    name: str
    pairs: tuple[Pair, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictions:
    """Log-probabilities of the likeliest tokens, (positions, LIKELIEST), and of the rest."""

    tokens: Tensor
    values: Tensor
    rest: Tensor


def gather(
    grid: Grid,
    tokenizer: Tokenizer,
    secrets: Sequence[TokenSecret],
    data: Sequence[Sequence[int]],
    *,
    samples: int,
    length: int,
    seed: int,
    parts: Parts | None = None,
    on_event: EventSink,
) -> tuple[Kind, ...]:
    """Gather text of each kind; base writes what the user does not give.

    Args:
        grid: the model before anything is forgotten.
        tokenizer: of the model.
        secrets: what must go; no text tells them.
        data: sequences of the user's text; none leaves that kind out.
        samples: sequences of each kind that is written.
        length: tokens of each.
        seed: of the text.
        parts: keeps what is written.
        on_event: is told where nothing like the secrets could be written.
    """
    on_event(Finishing(step="write text to hold on to"))
    kinds = [Kind(name="data", pairs=_cut(data))] if data else []
    write = partial(write_text, grid.model, tokenizer, count=samples, length=length, seed=seed)
    parts = parts or Parts()
    with grid.arithmetic():
        written = write(parts=parts.at("self_written"), on_event=on_event)
        kinds.append(Kind(name="self_written", pairs=_cut(_clean(written, secrets))))
        opening = common_opening(secrets)[: length - 1]
        near: list[list[int]] = []
        if opening:
            text = write(opening=opening, parts=parts.at(NEIGHBOURS), on_event=on_event)
            near = _clean(text, secrets)
    if len(near) >= FEWEST:
        kinds.append(Kind(name=NEIGHBOURS, pairs=_cut(near)))
    else:
        on_event(
            Noted(
                message="no text like the secrets is held on to: their prompts begin with "
                "different words, or what follows is about a secret"
            )
        )
    return tuple(kind for kind in kinds if kind.pairs)


def _clean(text: Tensor, secrets: Sequence[TokenSecret]) -> list[list[int]]:
    return [[int(token) for token in row] for row in without_secrets(text, secrets)]


def _cut(rows: Sequence[Sequence[int]]) -> tuple[Pair, ...]:
    """Give the first token of each sequence, and hold the predictions of the others."""
    return tuple((tuple(row[:1]), tuple(row[1:])) for row in rows if len(row) > 1)


def some(items: Sequence[T], most: int, draw: random.Random) -> list[T]:
    """Draw up to `most` items, each once."""
    return draw.sample(items, min(most, len(items)))


class Held:
    """The kinds of text with the predictions that base had, and divergences from them."""

    def __init__(self, grid: Grid, kinds: Sequence[Kind]) -> None:
        """Take the predictions of the model as it is now."""
        self._grid, self.kinds = grid, tuple(kinds)
        self._before = {kind.name: [_predictions(grid, p) for p in kind.pairs] for kind in kinds}

    def divergence(self, kind: Kind, numbers: Sequence[int]) -> Tensor:
        """Mean divergence over the positions of some pairs, nats; keeps the graph."""
        pairs = [kind.pairs[number] for number in numbers]
        before = [self._before[kind.name][number] for number in numbers]
        tokens = torch.cat([one.tokens for one in before]).long()
        p, rest = (torch.cat([getattr(one, n) for one in before]) for n in ("values", "rest"))
        p, rest = p.float(), rest.float()
        q = self._grid.completion_logits(pairs).log_softmax(-1).gather(1, tokens)
        terms = (p.exp() * (p - q)).sum(-1) + rest.exp() * (rest - _rest(q))
        return terms.mean()


@torch.no_grad()
def _predictions(grid: Grid, pair: Pair) -> Predictions:
    found = grid.completion_logits([pair]).log_softmax(-1)
    top = found.topk(min(LIKELIEST, found.shape[-1]))
    return Predictions(
        tokens=top.indices.int(), values=top.values.half(), rest=_rest(top.values).half()
    )


def _rest(log_probabilities: Tensor) -> Tensor:
    """Log-probability of all tokens but those given, at least log SMALLEST."""
    return (1 - log_probabilities.exp().sum(-1)).clamp_min(SMALLEST).log()


def broad_fisher(
    grid: Grid,
    kinds: Sequence[Kind],
    statistics: StatisticsReader,
    *,
    seed: int,
    state: Path | None = None,
    key: Key | None = None,
) -> dict[str, Tensor]:
    """Mean Fisher of text of all kinds, and of the statistics, (out, in) float32 per weight.

        F = (mean over kinds of mean over sequences of (d NLL / d W)^2 + F_statistics) / 2

    On base's grid, where gradients of text that is known by heart are not zero. The statistics
    count as much as all kinds together, whatever the length of their sequences: they are scaled to
    the same mean. Without text they are all there is.

    Sums are kept in the file `state`, sealed with `key`, sequence by sequence as time passes, and
    whole once all kinds are measured; a resumed run ends in the same bits.
    """
    draw = random.Random(f"fisher {seed}")
    drawn = [some(kind.pairs, FISHER_SEQUENCES, draw) for kind in kinds]
    sums = _Sums.load(grid, state, key)
    begun, found = sums.kind, sums.total
    for number in range(begun, len(drawn)):
        sums.kind = number
        for name, one in sums.measure(drawn[number]).items():
            one /= len(kinds)
            found[name] = found[name].add_(one) if name in found else one
        sums.pair, sums.of_kind = 0, {}
    if begun < len(drawn):
        sums.kind = len(drawn)
        sums.save()
    given = {name: torch.from_numpy(Curvature(statistics, name).whole()) for name in grid.codes}
    if not found:
        return {name: one.to(grid.device) for name, one in given.items()}
    mine, theirs = (
        sum(float(one.sum(dtype=torch.float64)) for one in part.values()) for part in (found, given)
    )
    scale = mine / theirs if theirs > 0 else 0.0
    for name, one in found.items():
        one.add_(given.pop(name).to(one.device), alpha=scale).div_(2)
    return found


def kept_fisher(
    grid: Grid, pairs: Sequence[Pair], state: Path, key: Key | None
) -> dict[str, Tensor]:
    """Give `Grid.fisher`; the file `state` keeps its sums as time passes, and at the end."""
    sums = _Sums.load(grid, state, key)
    found = sums.measure(pairs)
    if sums.pair < len(pairs):
        sums.pair, sums.of_kind = len(pairs), found
        sums.save()
    return found


@dataclass(slots=True, kw_only=True)
class _Sums:
    """Sums of squared gradients: `total` of the kinds before `kind`, `of_kind` of its first pairs.

    By weight, (out, in) float32 each. They are kept in the file `state`, where there is one.
    """

    grid: Grid
    state: Path | None
    key: Key | None
    pace: Pace = field(default_factory=Pace)
    kind: int = 0
    pair: int = 0
    total: dict[str, Tensor] = field(default_factory=dict)
    of_kind: dict[str, Tensor] = field(default_factory=dict)

    def measure(self, pairs: Sequence[Pair]) -> dict[str, Tensor]:
        """Give the Fisher of the pairs of this kind, from those on that are not done."""

        def keep(pair: int, sums: dict[str, Tensor]) -> None:
            if self.pace.due():
                self.pair, self.of_kind = pair, sums
                self.pace.save(self.save)

        return self.grid.fisher(pairs, begun=(self.pair, self.of_kind), on_pair=keep)

    def save(self) -> None:
        """Write them whole, for their owner alone."""
        arrays = {"at": np.asarray([self.kind, self.pair])}
        for which, sums in (("total", self.total), ("kind", self.of_kind)):
            arrays |= {f"{which}/{name}": one.cpu().numpy() for name, one in sums.items()}
        if self.state is not None:
            save_arrays(self.state, arrays, self.key)

    @classmethod
    def load(cls, grid: Grid, state: Path | None, key: Key | None) -> _Sums:
        """Read what an earlier run saved; nothing where there is nothing whole."""
        found = cls(grid=grid, state=state, key=key)
        if state is not None and (arrays := load_arrays(state, key)) is not None:
            found.kind, found.pair = map(int, arrays["at"])
            for which, sums in (("total", found.total), ("kind", found.of_kind)):
                for name in grid.codes:
                    if f"{which}/{name}" in arrays:
                        sums[name] = torch.from_numpy(arrays[f"{which}/{name}"]).to(grid.device)
        return found
