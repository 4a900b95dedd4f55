"""Cost of forgetting, told before it begins: tokens that pass through the model, and seconds.

    tokens = sum over passes of tokens * (3 where there is a backward pass, else 1)

A backward pass costs two forward ones. The sum is an upper bound: work ends sooner where every
secret is at its goal. Seconds are those of the passes, by their length, and of what is done to each
weight beside them; `model/cost.py` knows what both take on this machine. They are told for as many
rounds and steps as forgetting usually takes, and for all that the recipe allows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from ortho_cli.decompose.plan import LOGITS_BYTES, Plan
from ortho_cli.forget.damage import UNSEEN
from ortho_cli.forget.grid import BATCH_TOKENS
from ortho_cli.forget.held import FISHER_SEQUENCES
from ortho_cli.forget.isolate import ATTEMPTS, CONTRAST, USES
from ortho_cli.forget.ranks import PROBES, WRITTEN
from ortho_cli.forget.unlearn import ALTERNATIVES, AT_ONCE, RETAIN_BATCH
from ortho_cli.model import cost
from ortho_cli.model.cost import BATCH, Part, Passes, Work
from ortho_cli.model.secrets import TokenSecret
from ortho_cli.model.self_written import common_opening
from ortho_cli.storage.checkpoint import TensorInfo
from ortho_cli.storage.speeds import Speeds

# What forgetting usually takes of the rounds and steps that a recipe allows. Three facts, 8 e-mail
# addresses and 12 sentences of SmolLM2-135M took isolate 5 to 9 rounds. unlearn took 20 to 60
# steps: the middle is no more than twice off, either way.
ROUNDS = 8
TRIES = 2  # times that a round of isolate ranks all secrets
STEPS = 35
# float32 that are read and written per split weight: when weights go to the grid, for the Fisher of
# a sequence, in a round of isolate, in a step of unlearn. README has what was estimated with them,
# and what it took.
GRID = 40
FISHER = 4
ROUND = 40
STEP = 40
OPERATIONS = 4  # of Python for each weight in each of these, in Linears of a pass


def passes_of(
    plan: Plan,
    secrets: Sequence[TokenSecret],
    *,
    rounds: float,
    steps: float,
    attempts: float = ATTEMPTS + USES - 1,
    written: int = 2,
    given: int = 1,
) -> list[Passes]:
    """List the passes through the model, alike ones together.

    Args:
        plan: of a recipe that forgets.
        secrets: to be forgotten; those without alternatives get some of their own length.
        rounds: of isolate.
        steps: of unlearn; none count where the recipe has isolate alone.
        attempts: of a round, each of which ranks all secrets.
        written: kinds of text that the model writes.
        given: kinds of text that the user gives.
    """
    settings, many = plan.recipe.forget, max(1, len(secrets))
    own = sum(len(one.prompt) + len(one.secret) for one in secrets)
    one_each = sum(len(one.prompt) + _mean_length(one) for one in secrets)
    ranking = own + sum(
        min(PROBES, len(one.alternatives) or WRITTEN) * _mean_length(one) for one in secrets
    )
    writes: float = sum(
        BATCH * (len(one.prompt) + len(one.secret)) for one in secrets if not one.alternatives
    )
    kinds = written + given
    text = settings.samples * settings.length * kinds
    ranks = Passes(len(secrets) * (2 + attempts * rounds), ranking / many)
    found = [
        # Written token by token; some of it is measured before and afterwards.
        *[
            one._replace(times=written * one.times)
            for one in cost.writing(
                count=settings.samples, length=settings.length, vocabulary=0
            ).passes
        ],
        _in_batches(text / UNSEEN + ALTERNATIVES * one_each, 2),
        Passes(writes / BATCH, BATCH),
        Passes(FISHER_SEQUENCES * kinds, settings.length, True),
        ranks,
        # All that has to move together, then each secret and alternative by itself.
        _in_batches(own + CONTRAST * one_each, 2 * rounds, backward=True),
    ]
    if plan.recipe.ortho.split == "unlearn":
        found += _of_unlearn(plan, kinds, own=own, one_each=one_each, many=many, steps=steps)
        found += [_in_batches(text), _in_batches(own, backward=True)]  # before; the mask
        found.append(_in_batches(ranking + PROBES * one_each))  # the goals
    return found


def _of_unlearn(
    plan: Plan, kinds: int, *, own: float, one_each: float, many: int, steps: float
) -> Iterator[Passes]:
    """Yield the passes of the steps of unlearn: secrets, the attacker, text of each kind."""
    settings = plan.recipe.forget
    attacked = settings.attack_steps != 0
    measured = 0.5 if attacked else 1.0
    # Of many secrets a step takes some; their lengths are taken to be alike.
    share = min(1.0, AT_ONCE / (measured * many)) * measured
    yield _in_batches(share * (own + one_each), steps)
    yield _in_batches(share * own, steps, backward=True)
    if attacked:
        yield _in_batches(share * own, steps, backward=True)
    yield Passes(kinds * steps, RETAIN_BATCH * settings.length, True)
    yield Passes(steps, RETAIN_BATCH * one_each / many, True)


def _in_batches(tokens: float, times: float = 1, *, backward: bool = False) -> Passes:
    """Give the passes of so many tokens, as often as `times`."""
    batches = max(1, math.ceil(tokens / BATCH_TOKENS))
    return Passes(times * batches, tokens / batches, backward)


def tokens_passed(plan: Plan, secrets: Sequence[TokenSecret]) -> int:
    """Bound the tokens that pass through the model, each backward pass as two forward ones."""
    settings = plan.recipe.forget
    most = passes_of(plan, secrets, rounds=settings.rounds, steps=settings.steps)
    return round(sum(passes.weighed for passes in most))


def estimate(
    plan: Plan,
    secrets: Sequence[TokenSecret],
    source: Sequence[TensorInfo],
    speeds: Speeds,
    *,
    given: int = 1,
    half: bool = False,
) -> Part:
    """Estimate the seconds of forgetting on this machine, and where every round and step is needed.

    Args:
        plan: of a recipe that forgets.
        secrets: to be forgotten.
        source: all tensors of the checkpoint.
        speeds: of this machine.
        given: kinds of text that the user gives.
        half: whether passes compute in bfloat16.
    """
    settings, matrices = plan.recipe.forget, cost.matrices_of(source)
    written = 1 + bool(common_opening(secrets))  # of its own, and neighbours of the secrets
    fixed = cost.load_seconds(speeds, plan.weights, plan.bytes_read)

    def seconds(rounds: float, steps: float, attempts: float) -> float:
        unlearns = plan.recipe.ortho.split == "unlearn"
        per_weight = GRID + FISHER * FISHER_SEQUENCES * (written + given) + ROUND * rounds
        per_weight += STEP * steps if unlearns else 0.0
        work = Work(
            passes=passes_of(
                plan,
                secrets,
                rounds=rounds,
                steps=steps,
                attempts=attempts,
                written=written,
                given=given,
            ),
            draws=written * settings.samples * settings.length * max(s[0] for s in matrices),
            elements=per_weight * plan.split_weights,
            calls=OPERATIONS * (rounds + steps * unlearns + FISHER_SEQUENCES * (written + given)),
        )
        return cost.seconds_of(work, matrices, speeds, half=half)

    usual = seconds(min(settings.rounds, ROUNDS), min(settings.steps, STEPS), TRIES)
    most = seconds(settings.rounds, settings.steps, ATTEMPTS + USES - 1)
    return Part("forget", fixed + usual, fixed + most)


def _mean_length(secret: TokenSecret) -> float:
    """Mean tokens of the alternatives."""
    lengths = [len(other) for other in secret.alternatives] or [len(secret.secret)]
    return sum(lengths) / len(lengths)


def peak_bytes(plan: Plan, secrets: Sequence[TokenSecret]) -> int:
    """Bound peak memory: the plan's, and the logits of a secret longer than one pass has tokens."""
    texts = [(one.prompt, other) for one in secrets for other in (one.secret, *one.alternatives)]
    longest = max((len(first) + len(second) for first, second in texts), default=0)
    return plan.peak_bytes + LOGITS_BYTES * max(0, longest - BATCH_TOKENS) // BATCH_TOKENS
