"""Cost of forgetting, told before it begins: tokens that pass through the model, and seconds.

    tokens = sum over passes of tokens * (3 where there is a backward pass, else 1)

A backward pass costs two forward ones. The sum is an upper bound: work ends sooner where every
secret is at its goal. Seconds are tokens times those of one token in a pass that is measured.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from ortho_cli.decompose.plan import LOGITS_BYTES, Plan
from ortho_cli.forget.grid import BATCH_TOKENS, Grid, batches
from ortho_cli.forget.held import FISHER_SEQUENCES
from ortho_cli.forget.isolate import CONTRAST
from ortho_cli.forget.ranks import PROBES
from ortho_cli.forget.unlearn import AT_ONCE, RETAIN_BATCH
from ortho_cli.model.secrets import TokenSecret
from ortho_cli.model.self_written import BATCH

BOTH = 3  # a pass with its backward pass, in forward passes
KINDS = 3  # of text, at most: data, what the model writes, neighbours


def tokens_passed(plan: Plan, secrets: Sequence[TokenSecret]) -> int:
    """Bound the tokens that pass through the model, each backward pass as two forward ones.

    Args:
        plan: of a recipe that forgets.
        secrets: to be forgotten; those without alternatives get some of their own length.
    """
    settings = plan.recipe.forget
    own = sum(len(one.prompt) + len(one.secret) for one in secrets)
    one_each = sum(len(one.prompt) + _mean_length(one) for one in secrets)
    ranking = own + sum(PROBES * _mean_length(one) for one in secrets)
    writes: float = sum(
        BATCH * (len(one.prompt) + len(one.secret)) for one in secrets if not one.alternatives
    )
    text = settings.samples * settings.length * KINDS
    total: float = writes + 3 * text  # written, then measured before and afterwards
    total += BOTH * FISHER_SEQUENCES * settings.length * KINDS
    round_of_isolate = ranking + BOTH * (own + CONTRAST * one_each)
    total += 2 * ranking + settings.rounds * round_of_isolate
    if plan.recipe.ortho.split == "unlearn":
        attacked = settings.attack_steps != 0
        measured = 0.5 if attacked else 1.0
        # Of many secrets a step takes some; their lengths are taken to be alike.
        some = min(1.0, AT_ONCE / (measured * max(1, len(secrets))))
        step = some * measured * ((1 + BOTH) * own + one_each + BOTH * own * attacked)
        step += BOTH * RETAIN_BATCH * (KINDS * settings.length + one_each / max(1, len(secrets)))
        total += round(settings.steps * step) + text  # predictions before
        total += BOTH * own + ranking + round(PROBES * one_each)  # the mask and the goals
    return round(total)


def _mean_length(secret: TokenSecret) -> float:
    """Mean tokens of the alternatives."""
    lengths = [len(other) for other in secret.alternatives] or [len(secret.secret)]
    return sum(lengths) / len(lengths)


def peak_bytes(plan: Plan, secrets: Sequence[TokenSecret]) -> int:
    """Bound peak memory: the plan's, and the logits of a secret longer than one pass has tokens."""
    texts = [(one.prompt, other) for one in secrets for other in (one.secret, *one.alternatives)]
    longest = max((len(first) + len(second) for first, second in texts), default=0)
    return plan.peak_bytes + LOGITS_BYTES * max(0, longest - BATCH_TOKENS) // BATCH_TOKENS


@torch.no_grad()
def seconds_per_token(grid: Grid, secrets: Sequence[TokenSecret]) -> float:
    """Measure a forward pass over a secret, as often as one pass holds it; the second of two."""
    longest = max(secrets, key=lambda one: len(one.prompt) + len(one.secret))
    pair = (longest.prompt, longest.secret)
    batch = next(batches([pair] * PROBES, lambda one: one))
    for _ in range(2):  # the first pass also prepares what later ones use
        began = time.perf_counter()
        grid.nll(batch).tolist()
        took = time.perf_counter() - began
    return took / (len(batch) * sum(map(len, pair)))


def in_words(seconds: float) -> str:
    """Say how long, to about a tenth."""
    if seconds < 90:
        return "a second" if seconds < 1.5 else f"{seconds:.0f} seconds"
    minutes = seconds / 60
    return f"{minutes:.0f} minutes" if minutes < 90 else f"{minutes / 60:.1f} hours"
