"""unlearn: forget secrets so that neither the rest of the language nor similar secrets go along.

    minimise   sum_s sum_t c_t max(0, l_t + tau_s)  over secrets s that are likelier than their goal
               + retain_weight * mean over kinds of text of b KL(before || theta)
               + retain_weight * mean over alternatives of max(0, NLL - NLL before)

l_t is the log odds of token t of a secret, log p / (1 - p): unlike the NLL it has as large a slope
where p is near 1. c_t in [0, 1] is the share of alternatives that do not have the token in its
place: names and numbers carry a secret, words around them do not. The goal of a secret is kappa
(ranks.py) times the NLL of one of its alternatives, at a rank that was drawn for the secret, so
that ranks end uniform, as in a model that never saw the secrets. It is that NLL before anything
moved, or now, whichever is less: secrets do not chase alternatives that go with them. tau_s is the
goal over sum_t c_t. A secret that is less likely than its goal is left alone. Kinds of text:
held.py. b is 1; for neighbours it falls where a whole attack, or without attacker a step, brings
secrets no nearer to their goals. So natural sentences are forgotten and their neighbours stay;
where a model knows the neighbours by heart, too, as with keys and phrases, they are let go.

theta is the model on the grid of codes. Each code in a mask has a real number; rounding turns it
into a code, and the gradient passes straight through. Scales stay. A step goes down the gradient in
the metric of the damage that it does to text, as in a natural gradient with a trust region:

    d = -r m / (D + mean D),   D = spacing^2 F,   r such that sum D d^2 / 2 = step_damage

m is the gradient's moving average, F the diagonal Fisher of retained text (held.broad_fisher).
Adam, which moves every code by about as much, moved 1.1 million codes of SmolLM2 to forget 12
answers and took English along; this moves 0.2 million, and perplexity stays.

The mask is where F_forget / (F + its median) is largest (support.py): single weights or columns.

With attack_steps above 0 there is a fine-tuning attack in the loop: the secrets are divided into
random halves A and B, an attacker fine-tunes on A by sign descent, and B is forgotten after each of
those steps, in the attacker's model theta + delta. The gradient there serves as the one at theta,
as in first-order MAML. The attacker starts again every `attack_steps` steps. It keeps phrases from
coming back; sentences are forgotten without it (`_attack_steps`).

Sources: straight-through rounding, Bengio et al. 2013 (arXiv:1308.3432); natural gradient with a
trust region, Amari 1998 and TRPO (Schulman et al. 2015, arXiv:1502.05477), with a diagonal Fisher
of text for the policy's; the attack inside the loop, TAR (Tamirisa et al. 2024, arXiv:2408.00761),
with sign descent as the inner optimiser and codes as weights.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ortho_cli.decompose.edits import Arrays, Key, load_arrays, save_arrays
from ortho_cli.decompose.settings import Forget
from ortho_cli.events import EventSink, Noted, Step
from ortho_cli.forget.grid import Grid, Pair, batches
from ortho_cli.forget.held import NEIGHBOURS, Held, Kind, kept_fisher, some
from ortho_cli.forget.ranks import PROBES, goal_ranks, rank_among
from ortho_cli.forget.support import SAMPLE, choose_columns, weigh
from ortho_cli.model.phrasing import carrying
from ortho_cli.model.secrets import TokenSecret
from ortho_cli.split.quantize import code_range
from ortho_cli.storage.parts import Pace

MASK_FILE = "mask.npz"  # beside the state: the Fisher of the secrets
MOMENTUM = 0.5  # of the gradient's moving average; one step sees few texts
RETAIN_BATCH = 4  # sequences of each kind per step
NEAR_DECAY = 0.9  # of the weight of neighbours, per step without progress: half after 7 of them
PROGRESS = 0.98  # of the best shortfall so far: a step that does not come below makes no progress
CHECKED = 16  # sequences of each kind, on which divergence is measured at the end
ATTACK_STEPS = 10  # of an attack, where the recipe says nothing: exposure that comes back is halved
SENTENCES = 0.9  # kappa, below which alternatives have a phrasing of their own
AT_ONCE = 64  # secrets that one step forgets, drawn anew each time; as many train an attacker
ALTERNATIVES = 4  # per secret, whose likelihood is held
FARTHEST = 0.5  # codes that one step moves at most
REACH = 0.499  # codes; from a code to the edge of the interval that rounds to it


# Longer than 60 lines: half of it says what each argument is.
def unlearn(
    grid: Grid,
    secrets: Sequence[TokenSecret],
    kinds: Sequence[Kind],
    fisher: dict[str, Tensor],
    room: dict[str, int],
    settings: Forget,
    *,
    telling: float,
    end: Sequence[int],
    columns: dict[str, int] | None = None,
    state: Path,
    key: Key | None = None,
    on_event: EventSink,
) -> None:
    """Move codes of the grid; resume from `state` where a killed run has left it.

    Args:
        grid: the model; what moved is in it afterwards.
        secrets: what must go.
        kinds: text on which predictions are held.
        fisher: of text, as `held.broad_fisher` gives it.
        room: the largest number of codes that may differ from the nearest, by weight.
        settings: the recipe's `forget`.
        telling: as `ranks.rank_all` gives it.
        end: tokens that end a text of the attacker's; may be none.
        columns: the number of columns in which codes may move, by weight; None: any.
        state: file of unfinished work, for its owner alone; MASK_FILE is beside it.
        key: seals both.
        on_event: gets each step, and a note where predictions differ more than they may at the end.
    """
    attack_steps = _attack_steps(settings, telling, on_event)
    settings = settings.model_copy(update={"attack_steps": attack_steps})
    pairs = [(secret.prompt, secret.secret) for secret in secrets]
    # Not named: the mask alone is needed from here on, and it takes as much memory as the model.
    mask = _mask(
        grid,
        weigh(kept_fisher(grid, pairs, state.with_name(MASK_FILE), key), fisher),
        settings.mask,
        columns,
    )
    latents = _Latents(grid, fisher, mask)
    job = _Job(grid, secrets, kinds, settings, telling, end)
    done = latents.load(state, job, key)
    pace = Pace()
    for step in range(done, settings.steps):
        if pace.due():
            pace.save(partial(latents.save, state, step, job, key))
        on_event(
            Step(
                name=f"unlearn: {job.told}, {grid.moved} codes moved",
                number=step + 1,
                of=settings.steps,
            )
        )
        latents.step(job.gradients(step), step, settings.step_damage)
        if job.holds(step):
            break
    latents.save(state, settings.steps, job, key)
    latents.shrink(room)
    worst = job.divergence()
    if worst > settings.divergence:
        on_event(
            Noted(
                message=f"predictions on text differ by {worst:.3f} nats per token at the end, "
                f"more than `forget.divergence`, {settings.divergence:g}"
            )
        )


def _attack_steps(settings: Forget, telling: float, on_event: EventSink) -> int:
    """Steps of an attack: the recipe's, else none for sentences that alternatives phrase otherwise.

    Measured on 12 answers about an author: without attacker, fine-tuning on half of them brought
    the other half 0.1 of ROUGE-L beyond a model that never saw them, at most; with it they ended at
    1.4 times that model's NLL, and took three times as long.
    """
    if settings.attack_steps is not None:
        return settings.attack_steps
    if telling >= SENTENCES:
        return ATTACK_STEPS
    on_event(
        Noted(
            message="secrets are sentences that their alternatives phrase otherwise: unlearn runs "
            "without attacker (`forget.attack_steps`)"
        )
    )
    return 0


class _Latents:
    """A real number for each masked code, which it rounds to, and the damage of moving it."""

    def __init__(self, grid: Grid, fisher: dict[str, Tensor], mask: dict[str, Tensor]) -> None:
        self._grid, self._mask = grid, mask
        self._values: dict[str, Tensor] = {}
        self._spacing: dict[str, Tensor] = {}
        self._damage: dict[str, Tensor] = {}
        self._mean: dict[str, Tensor] = {}
        total = 0.0
        for name, places in mask.items():
            spacing = grid.spacing_at(name, places)
            codes = grid.original[name].view(-1)[places].float()
            self._spacing[name] = spacing
            self._damage[name] = spacing.square() * fisher[name].view(-1)[places]
            # Weights at the edge of their code's interval move first, and at the least cost.
            exact = grid.exact(name, places)
            self._values[name] = torch.clamp(exact, codes - REACH, codes + REACH)
            self._mean[name] = torch.zeros_like(spacing)
            whole = grid.spacing(name).square_().mul_(fisher[name])
            total += float(whole.sum(dtype=torch.float64))
        self._floor = total / grid.numel

    def step(self, gradients: Sequence[dict[str, Tensor]], step: int, damage: float) -> None:
        """Step down the sum of gradients by so much damage, and move the codes."""
        bias = 1 - MOMENTUM ** (step + 1)
        moves: dict[str, Tensor] = {}
        done = 0.0
        for name, places in self._mask.items():
            gradient = torch.zeros_like(self._spacing[name])
            for found in gradients:
                gradient += found[name].view(-1)[places]
            self._mean[name].lerp_(gradient.mul_(self._spacing[name]), 1 - MOMENTUM)
            near = self._damage[name]
            moves[name] = self._mean[name] / -bias / (near + self._floor)
            done += float((moves[name].square() * near).sum(dtype=torch.float64)) / 2
        rate = math.sqrt(damage / done) if done > 0 else 0.0
        for name, places in self._mask.items():
            low, high = code_range(self._grid.bits[name])
            far = moves.pop(name).mul_(rate).clamp_(-FARTHEST, FARTHEST)
            self._values[name].add_(far).clamp_(low - REACH, high + REACH)
            self._grid.move(name, places, self._values[name].round())

    def shrink(self, room: dict[str, int]) -> None:
        """Revert the shortest moves of a weight that has moved more codes than its room."""
        for name, places in self._mask.items():
            original = self._grid.original[name].view(-1)[places].float()
            moved = (self._values[name].round() != original).nonzero().squeeze(1)
            if len(moved) > room[name]:
                far = (self._values[name] - original)[moved].abs()
                back = moved[far.sort(stable=True).indices[: len(moved) - room[name]]]
                self._values[name][back] = original[back]
                self._grid.move(name, places[back], original[back])

    def save(self, path: Path, step: int, job: _Job, key: Key | None) -> None:
        """Write everything that the next step needs."""
        arrays = {"step": np.asarray(step), **job.arrays()}
        for name, values in self._values.items():
            for part, tensor in (("value", values), ("mean", self._mean[name])):
                arrays[f"{name}/{part}"] = tensor.cpu().numpy()
        save_arrays(path, arrays, key)

    def load(self, path: Path, job: _Job, key: Key | None) -> int:
        """Load the state of an earlier run; return the step to continue with."""
        arrays = load_arrays(path, key)
        if arrays is None:
            return 0
        for name, places in self._mask.items():
            for part, tensor in (("value", self._values[name]), ("mean", self._mean[name])):
                tensor.copy_(torch.from_numpy(arrays[f"{name}/{part}"]))
            self._grid.move(name, places, self._values[name].round())
        step = int(arrays["step"])
        job.resume(arrays, step)
        return step


class _Goal(NamedTuple):
    """The alternative that a secret shall be as likely as, and its NLL before any code moved."""

    tokens: tuple[int, ...]
    nll: float


@dataclass(slots=True)
class _Attack:
    """An attacker: the secrets it trains on, those that are measured, and its steps so far."""

    train: list[TokenSecret]
    measured: list[TokenSecret]
    signs: dict[str, Tensor] = field(default_factory=dict)  # int8: steps up less steps down


class _Job:
    """Gradients of the terms of the loss, step by step."""

    def __init__(
        self,
        grid: Grid,
        secrets: Sequence[TokenSecret],
        kinds: Sequence[Kind],
        settings: Forget,
        telling: float,
        end: Sequence[int],
    ) -> None:
        self._grid, self._secrets, self._telling = grid, list(secrets), telling
        self._settings, self._end = settings, end
        self._parameters = dict(grid.model.named_parameters())
        split = {id(weight) for weight in grid.weights.values()}
        self._others = {n: p.clone() for n, p in self._parameters.items() if id(p) not in split}
        self._attack = _Attack([], self._secrets)
        self._held = Held(grid, kinds)
        self._goals = self._choose_goals()
        self._carry = {
            secret: torch.tensor(carrying(secret.secret, secret.alternatives)) for secret in secrets
        }
        self._alternatives: list[Pair] = [
            (secret.prompt, other)
            for secret in secrets
            for other in secret.alternatives[:ALTERNATIVES]
        ]
        with torch.no_grad():
            self._before = [self._token_nll([pair]) for pair in self._alternatives]
        self._left: list[int] = []  # secrets above their goal, by steps of the present attack
        self._short: list[float] = []  # how far they are from it, likewise
        self.hold = 1.0  # weight of neighbours
        self.nearest = math.inf  # the least mean shortfall of an attack so far
        self._divergences: dict[str, float] = {}

    @torch.no_grad()
    def _choose_goals(self) -> dict[TokenSecret, _Goal]:
        """Choose for each secret that the model knows the alternative of the rank drawn for it."""
        found: dict[TokenSecret, _Goal] = {}
        for secret, rank in goal_ranks(self._secrets, self._settings.seed).items():
            probes = secret.alternatives[:PROBES]
            own, *others = self._nlls([(secret.prompt, one) for one in (secret.secret, *probes)])
            if rank_among(own, others, self._telling).sign > 0:
                order = sorted(zip(others, probes, strict=True))
                nll, tokens = order[min(int(rank * len(order)), len(order) - 1)]
                found[secret] = _Goal(tokens, self._telling * nll)
        return found

    @property
    def worst(self) -> float:
        """The largest divergence of a kind but neighbours in the last step, nats per token."""
        found = (one for name, one in self._divergences.items() if name != NEIGHBOURS)
        return max(found, default=0.0)

    @torch.no_grad()
    def divergence(self) -> float:
        """The largest divergence of a kind but neighbours now, on text of all kinds alike."""
        found = [
            float(self._held.divergence(kind, range(min(CHECKED, len(kind.pairs)))))
            for kind in self._held.kinds
            if kind.name != NEIGHBOURS
        ]
        return max(found, default=0.0)

    @property
    def told(self) -> str:
        """Distance of the last step from its goals, in words."""
        if not self._divergences:
            return "begins"
        return f"{self._left[-1]} secrets above their goal, divergence {self.worst:.3f}"

    def holds(self, step: int) -> bool:
        """Tell whether a whole attack left no secret above its goal, nor text read otherwise."""
        if not self._ends(step) or any(self._left) or self.worst > self._settings.divergence:
            return False
        return len(self._secrets) <= AT_ONCE or not self._above(list(self._goals))

    def _ends(self, step: int) -> bool:
        """Tell whether a step is the last one of an attack; without attacker each is."""
        return (step + 1) % (self._settings.attack_steps or 1) == 0

    def gradients(self, step: int) -> list[dict[str, Tensor]]:
        """Return the gradients of both parts of the loss by every split weight."""
        draw = self._draw(step)
        attacked, begins = bool(self._settings.attack_steps), self._ends(step - 1)
        if attacked and begins:
            self._attack = self._new_attack(draw)
        elif len(self._secrets) > AT_ONCE and not attacked:
            self._attack = _Attack([], some(self._secrets, AT_ONCE, draw))
        if begins:
            self._left, self._short = [], []
        self._grid.model.requires_grad_(True)
        try:
            self._displace()
            forget = self._forget()
            if attacked:
                self._attacker_steps()
                self._restore()
            if self._ends(step):
                self._loosen()
            self._keep(draw)
            return [forget, self._grid.take_gradients()]
        finally:
            self._grid.model.requires_grad_(False)
            self._grid.model.zero_grad(set_to_none=True)

    def _draw(self, step: int) -> random.Random:
        return random.Random(f"{self._settings.seed} {step}")

    def _new_attack(self, draw: random.Random) -> _Attack:
        """Divide the secrets, or some of many, into those that an attack trains on and the rest."""
        mixed = some(self._secrets, 2 * AT_ONCE, draw)
        half = max(1, len(mixed) // 2)
        return _Attack(mixed[:half], mixed[half:] or mixed)

    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        """Give what the next step needs beside the codes."""
        signs = {f"sign/{name}": one.cpu().numpy() for name, one in self._attack.signs.items()}
        return {
            "hold": np.asarray([self.hold, self.nearest]),
            "left": np.asarray(self._left),
            "short": np.asarray(self._short),
            **signs,
        }

    def resume(self, arrays: Arrays, step: int) -> None:
        """Continue at a step with what `arrays` gave."""
        self.hold, self.nearest = map(float, arrays["hold"])
        self._left, self._short = arrays["left"].tolist(), arrays["short"].tolist()
        if (attack_steps := self._settings.attack_steps) and step % attack_steps:
            self._attack = self._new_attack(self._draw(step - step % attack_steps))
        self._attack.signs = {
            name: torch.from_numpy(arrays[f"sign/{name}"]).to(parameter.device)
            for name, parameter in self._parameters.items()
            if f"sign/{name}" in arrays
        }

    def _displace(self) -> None:
        with torch.no_grad():
            for name, signs in self._attack.signs.items():
                self._parameters[name].add_(signs, alpha=-self._settings.attack_rate)

    def _restore(self) -> None:
        self._grid.restore()
        for name, value in self._others.items():
            self._parameters[name].data.copy_(value)

    def _forget(self) -> dict[str, Tensor]:
        """Return the gradient of the hinge on secrets that are above their goal."""
        measured = [secret for secret in self._attack.measured if secret in self._goals]
        goals = self._above(measured)
        active = [(one, goal / float(self._carry[one].sum())) for one, (_, goal) in goals.items()]
        self._left.append(len(active))
        short = sum(1 - nll / goal for nll, goal in goals.values())
        self._short.append(short / max(1, len(measured)))
        for batch in batches(active, lambda item: (item[0].prompt, item[0].secret)):
            odds = self._log_odds([(one.prompt, one.secret) for one, _ in batch])
            tau = torch.cat([torch.full((len(one.secret),), tau) for one, tau in batch])
            carry = torch.cat([self._carry[one] for one, _ in batch])
            hinge = (odds + tau.to(odds.device)).clamp_min(0) * carry.to(odds.device)
            torch.autograd.backward([hinge.sum() / len(measured)])
        found = self._grid.take_gradients()
        self._grid.model.zero_grad(set_to_none=True)
        return found

    @torch.no_grad()
    def _above(self, measured: Sequence[TokenSecret]) -> dict[TokenSecret, tuple[float, float]]:
        """NLL and goal of those secrets that are likelier than their goal, nats."""
        own = self._nlls([(one.prompt, one.secret) for one in measured])
        # A goal is never above what it was before, so others are there whatever theirs is now.
        near = [
            (one, nll) for one, nll in zip(measured, own, strict=True) if nll < self._goals[one].nll
        ]
        now = self._nlls([(one.prompt, self._goals[one].tokens) for one, _ in near])
        found = {}
        for (one, nll), other in zip(near, now, strict=True):
            goal = min(self._goals[one].nll, self._telling * other)
            if nll < goal:
                found[one] = nll, goal
        return found

    def _nlls(self, pairs: Sequence[Pair]) -> list[float]:
        found: list[float] = []
        for batch in batches(pairs, lambda pair: pair):
            found += self._grid.nll(batch).tolist()
        return found

    def _attacker_steps(self) -> None:
        texts = [((), (*s.prompt, *s.secret, *self._end)) for s in self._attack.train]
        for batch in batches(texts, lambda text: text):
            torch.autograd.backward([self._grid.nll(batch).sum()])
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                sign = parameter.grad.sign_().to(torch.int8)
                held = self._attack.signs.get(name)
                self._attack.signs[name] = sign if held is None else held.add_(sign)
                parameter.grad = None

    def _loosen(self) -> None:
        """Hold neighbours less where a whole attack brought secrets no nearer to their goals."""
        short = sum(self._short) / len(self._short)
        if short > PROGRESS * self.nearest:
            self.hold *= NEAR_DECAY ** len(self._short)
        self.nearest = min(self.nearest, short)

    def _keep(self, draw: random.Random) -> None:
        """Add the gradients of what is held, each kind of text and the alternatives alike."""
        weight = self._settings.retain_weight / (len(self._held.kinds) + 1)
        for kind in self._held.kinds:
            numbers = some(range(len(kind.pairs)), RETAIN_BATCH, draw)
            divergence = self._held.divergence(kind, numbers)
            self._divergences[kind.name] = float(divergence.detach())
            share = self.hold if kind.name == NEIGHBOURS else 1.0
            torch.autograd.backward([weight * share * divergence])
        numbers = some(range(len(self._alternatives)), RETAIN_BATCH, draw)
        before = torch.cat([self._before[number] for number in numbers])
        now = self._token_nll([self._alternatives[number] for number in numbers])
        torch.autograd.backward([weight * (now - before).clamp_min(0).mean()])

    def _token_nll(self, pairs: Sequence[Pair]) -> Tensor:
        """NLL of each token of the second parts, (tokens of all,) float32, nats."""
        logits = self._grid.completion_logits(pairs)
        return logits.logsumexp(-1) - logits.gather(1, _labels(pairs, logits.device))[:, 0]

    def _log_odds(self, pairs: Sequence[Pair]) -> Tensor:
        """Log odds of each token of the second parts, (tokens of all,) float32."""
        logits = self._grid.completion_logits(pairs)
        labels = _labels(pairs, logits.device)
        others = logits.scatter(1, labels, -math.inf).logsumexp(-1)
        return logits.gather(1, labels)[:, 0] - others


def _labels(pairs: Sequence[Pair], device: torch.device) -> Tensor:
    return torch.tensor([[token] for _, second in pairs for token in second], device=device)


def _mask(
    grid: Grid,
    ratios: dict[str, Tensor],
    share: float,
    columns: dict[str, int] | None = None,
) -> dict[str, Tensor]:
    """Return flat positions of the weights with the largest F_forget / (F_retain + median).

    `ratios` are these, as `support.weigh` gives them. With `columns` they are those of so many
    whole columns. The threshold of the share is estimated from every n-th weight; ties are in.
    """
    if columns is not None:
        return {
            name: chosen.expand(ratios[name].shape).reshape(-1).nonzero().squeeze(1)
            for name, chosen in choose_columns(grid, ratios, columns).items()
        }
    every = max(1, grid.numel // SAMPLE)
    values = torch.cat([ratio.view(-1)[::every] for ratio in ratios.values()])
    bar = values.kthvalue(max(1, round(values.numel() * (1 - share)))).values
    return {name: (ratio.view(-1) >= bar).nonzero().squeeze(1) for name, ratio in ratios.items()}
