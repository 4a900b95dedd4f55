"""Damage of forgetting: perplexity of text that it did not see, over that before.

    ratio of a kind = exp(mean over tokens (NLL now - NLL before))

Text that is held on to says little: any optimisation keeps what it looks at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ortho_cli.errors import GateError
from ortho_cli.events import EventSink, Noted
from ortho_cli.forget.grid import Grid, Pair, batches
from ortho_cli.forget.held import NEIGHBOURS, Kind
from ortho_cli.model.scoring import exponential, worst_of
from ortho_cli.storage.parts import Parts

UNSEEN = 4  # every fourth text is kept from the optimisation, to measure damage on
LIKE_SECRETS = (NEIGHBOURS, "alternatives")  # are told; keys and phrases may lose their form


@torch.no_grad()
def measure(grid: Grid, kinds: Sequence[Kind], parts: Parts | None = None) -> dict[str, float]:
    """Mean NLL per token of each kind of text, nats; `parts` keeps those of each batch."""
    found: dict[str, float] = {}

    def nll(batch: Sequence[Pair]) -> float:
        return float(grid.nll(batch).sum(dtype=torch.float64))

    for kind in kinds:
        passes = list(batches(kind.pairs, lambda pair: pair))
        total = sum((parts or Parts()).each(kind.name, passes, nll), 0.0)
        tokens = sum(len(second) for _, second in kind.pairs)
        if tokens:
            found[kind.name] = total / tokens
    return found


def ratios(before: Mapping[str, float], now: Mapping[str, float]) -> dict[str, float]:
    """Perplexity of each kind over that before; a NaN stays NaN."""
    return {kind: exponential(now[kind] - nll) for kind, nll in before.items()}


def judge(ratios: Mapping[str, float], most: float, *, accept: bool, on_event: EventSink) -> None:
    """Say what forgetting cost, and refuse to go on where text of any kind lost more than `most`.

    What is like the secrets is told alone: where their form is known by heart, it goes with them.

    Raises:
        GateError: a ratio is above `most`, or NaN, and damage is not accepted.
    """
    told = ", ".join(f"{kind} {ratio:.3f}" for kind, ratio in ratios.items())
    on_event(Noted(message=f"perplexity of text that was not held on to, over before: {told}"))
    bad = [kind for kind, ratio in ratios.items() if kind not in LIKE_SECRETS and not ratio <= most]
    if not bad:
        return
    worst = worst_of({kind: ratios[kind] for kind in bad})
    message = (
        f"forgetting raises perplexity of {worst} text {ratios[worst]:.3f} times, and "
        f"`forget.damage` is {most:g}"
    )
    if not accept:
        raise GateError(
            message,
            hint="fewer or shorter secrets, more kinds of --data, or the same command with "
            "--accept-damage",
        )
    on_event(Noted(message=f"{message}: accepted"))
