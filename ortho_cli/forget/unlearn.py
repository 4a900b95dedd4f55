"""unlearn: a short masked optimisation on base's grid that holds against learning again.

Moving a few codes hides a secret: a handful of fine-tuning steps on other secrets of its kind
brings it back. So those steps stand inside the loop. The secrets are parted into halves A and B at
random; an attacker fine-tunes a copy on A by sign descent, one step of `attack_rate` in every
parameter at a time, and after each of its steps the codes move so that B is as unlikely for it as
for a model that never saw it:

    minimise   mean_B max(0, tau - NLL_B(theta + delta))
               + retain_weight KL(original || theta) on retain text
               + alternatives_weight KL(original || theta) on alternatives of the secrets

with theta the model on the grid, delta what the attacker has moved so far (0 at the start of each
of its `attack_steps`, so what is static counts, too), and tau the NLL of alternatives in the same
model at that moment, up to `ceiling` times what it was: a model that never saw the secrets does not
know their form either, so their form goes with them unless `alternatives_weight` holds it. The
gradient at theta + delta is taken for that at theta, as first-order MAML does. Only codes in a mask
move: the share `mask` with the largest F_forget / (F_retain + its median). Each has a real number
that Adam moves and rounding turns into a code, its gradient passed straight through; scales stay.

The last rounds are `isolate`'s, which put each secret among its alternatives: neither likelier, nor
less likely than all of them.

Sources: straight-through rounding, Bengio et al. 2013 (arXiv:1308.3432); the attack inside the
loop, TAR (Tamirisa et al. 2024, arXiv:2408.00761), with sign descent for its inner optimiser and
codes for its weights; the hinge on the NLL instead of ascent keeps from marking what is forgotten.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ortho_cli.decompose.edits import Key, load_arrays, save_arrays
from ortho_cli.decompose.settings import Forget
from ortho_cli.events import EventSink, Step
from ortho_cli.forget.grid import Grid, batches
from ortho_cli.formats.curvature import Curvature
from ortho_cli.formats.statistics import StatisticsReader
from ortho_cli.model.secrets import TokenSecret
from ortho_cli.split.quantize import code_range

BETAS = (0.9, 0.99)
SAMPLE = 1 << 20  # weights from which a median or a bar is estimated
SHORT = 0.02  # of the alternatives' NLL: what an attack may bring back where work ends early
RETAIN_BATCH = 8
WARM_UP = 10  # steps over which Adam's rate rises: its first ones know one gradient only
ALTERNATIVES = 4  # of each secret, whose likelihood is held
REACH = 0.499  # from a code to the edge of what rounds to it


def unlearn(
    grid: Grid,
    secrets: Sequence[TokenSecret],
    retain: Tensor,
    curvature: StatisticsReader,
    room: dict[str, int],
    settings: Forget,
    *,
    end: Sequence[int],
    state: Path,
    key: Key | None = None,
    on_event: EventSink,
) -> None:
    """Move codes of the grid; goes on from `state` where a killed run has left one.

    Args:
        grid: the model; what moved is in it afterwards.
        secrets: what must go.
        retain: (n, length) int64 tokens of running text.
        curvature: of the retain set.
        room: most codes of each weight that may be moved.
        settings: the recipe's `forget`.
        end: tokens that end a text, as an attacker would train on them; may be none.
        state: where unfinished work is kept, for its owner alone.
        key: seals it.
        on_event: told of each step.
    """
    latents = _Latents(grid, _mask(grid, secrets, curvature, settings.mask))
    job = _Job(grid, secrets, retain, settings, end)
    done = latents.load(state, key)
    for step in range(done, settings.steps):
        if step % settings.attack_steps == 0 and step > done:
            if job.holds():
                break
            latents.save(state, step, key)
        told = f"unlearn: {job.told}, {grid.moved} codes moved"
        on_event(Step(name=told, number=step + 1, of=settings.steps))
        rate = settings.rate * min(1.0, (step + 1) / WARM_UP)
        latents.step(job.gradients(step), step, rate)
    latents.shrink(room)


class _Latents:
    """A real number for each masked code; what it rounds to is the code."""

    def __init__(self, grid: Grid, mask: dict[str, Tensor]) -> None:
        self._grid, self._mask = grid, mask
        self._values: dict[str, Tensor] = {}
        self._spacing: dict[str, Tensor] = {}
        self._moments: dict[str, tuple[Tensor, Tensor]] = {}
        for name, places in mask.items():
            spacing = grid.spacing_at(name, places)
            codes = grid.original[name].view(-1)[places].float()
            self._spacing[name] = spacing
            # Weights near the edge of their code move first, and cost least.
            exact = grid.exact(name, places)
            self._values[name] = torch.clamp(exact, codes - REACH, codes + REACH)
            self._moments[name] = (torch.zeros_like(spacing), torch.zeros_like(spacing))

    def step(self, gradients: list[dict[str, Tensor]], step: int, rate: float) -> None:
        """Take one step of Adam, and let the codes follow."""
        first, second = (1 - beta ** (step + 1) for beta in BETAS)
        for name, places in self._mask.items():
            gradient = torch.zeros_like(self._spacing[name])
            for found in gradients:
                gradient += found[name].view(-1)[places]
            gradient *= self._spacing[name]
            mean, square = self._moments[name]
            mean.lerp_(gradient, 1 - BETAS[0])
            square.lerp_(gradient.square_(), 1 - BETAS[1])
            step_by = (mean / first).div_((square / second).sqrt_().add_(1e-12))
            low, high = code_range(self._grid.bits[name])
            self._values[name].sub_(step_by, alpha=rate).clamp_(low - REACH, high + REACH)
            self._grid.move(name, places, self._values[name].round())

    def shrink(self, room: dict[str, int]) -> None:
        """Take back the moves that are least decided where a weight has no room for all."""
        for name, places in self._mask.items():
            original = self._grid.original[name].view(-1)[places].float()
            moved = (self._values[name].round() != original).nonzero().squeeze(1)
            if len(moved) > room[name]:
                far = (self._values[name] - original)[moved].abs()
                back = moved[far.sort(stable=True).indices[: len(moved) - room[name]]]
                self._values[name][back] = original[back]
                self._grid.move(name, places[back], original[back])

    def save(self, path: Path, step: int, key: Key | None) -> None:
        """Keep everything that the next step needs."""
        arrays = {"step": np.asarray(step)}
        for name, values in self._values.items():
            parts = (values, *self._moments[name])
            for part, tensor in zip(("value", "mean", "square"), parts, strict=True):
                arrays[f"{name}/{part}"] = tensor.cpu().numpy()
        save_arrays(path, arrays, key)

    def load(self, path: Path, key: Key | None) -> int:
        """Take up what was kept; return the step to go on with."""
        arrays = load_arrays(path, key)
        if arrays is None:
            return 0
        for name, places in self._mask.items():
            parts = (self._values[name], *self._moments[name])
            for part, tensor in zip(("value", "mean", "square"), parts, strict=True):
                tensor.copy_(torch.from_numpy(arrays[f"{name}/{part}"]))
            self._grid.move(name, places, self._values[name].round())
        return int(arrays["step"])


@dataclass(slots=True)
class _Attack:
    """Where an attacker stands: what he trains on, what is measured, how far each weight went."""

    train: list[TokenSecret]
    measured: list[TokenSecret]
    signs: dict[str, Tensor]  # int8: steps up less steps down


class _Job:
    """Gradients of the three terms, one step after another."""

    def __init__(
        self,
        grid: Grid,
        secrets: Sequence[TokenSecret],
        retain: Tensor,
        settings: Forget,
        end: Sequence[int],
    ) -> None:
        self._grid, self._secrets, self._retain = grid, list(secrets), retain
        self._settings, self._end = settings, end
        self._parameters = dict(grid.model.named_parameters())
        split = {id(weight) for weight in grid.weights.values()}
        self._held = {n: p.clone() for n, p in self._parameters.items() if id(p) not in split}
        self._attack = _Attack([], [], {})
        self._cycle: list[tuple[float, float]] = []  # hinge and divergence of the attack's steps
        alternatives = [
            (secret.prompt, other)
            for secret in secrets
            for other in secret.alternatives[:ALTERNATIVES]
        ]
        random.Random(settings.seed).shuffle(alternatives)
        self._alternatives = [alternatives[i : i + 5] for i in range(0, len(alternatives), 5)]
        with torch.no_grad():
            self._text = [self._log_probabilities(r) for r in torch.split(retain, RETAIN_BATCH)]
            held = self._alternatives if settings.alternatives_weight else []
            self._others = [self._completion_log_probabilities(batch) for batch in held]
            found = [grid.nll(batch) for batch in self._alternatives]
        self._tau = float(torch.cat(found).mean())

    def holds(self) -> bool:
        """Tell whether the last attack brought nothing back, and text reads as it did."""
        shorts = [short for short, _ in self._cycle]
        divergences = [divergence for _, divergence in self._cycle]
        self._cycle = []
        forgotten = max(shorts) < SHORT * self._tau
        return forgotten and math.fsum(divergences) / len(divergences) < self._settings.divergence

    @property
    def told(self) -> str:
        """How far the last step was from where it should be."""
        if not self._cycle:
            return "a new attack"
        short, divergence = self._cycle[-1]
        return f"{short:.1f} nats short, divergence {divergence:.3f}"

    def gradients(self, step: int) -> list[dict[str, Tensor]]:
        """Take both gradients of one step by every split weight."""
        draw = random.Random(f"{self._settings.seed} {step}")
        if step % self._settings.attack_steps == 0:
            mixed = draw.sample(self._secrets, len(self._secrets))
            half = max(1, len(mixed) // 2)
            self._attack = _Attack(mixed[:half], mixed[half:] or mixed, {})
        self._grid.model.requires_grad_(True)
        try:
            self._displace()
            forget, short = self._forget(draw)
            self._attacker_steps()
            self._restore()
            self._cycle.append((short, self._keep(draw)))
            return [forget, self._grid.take_gradients()]
        finally:
            self._grid.model.requires_grad_(False)
            self._grid.model.zero_grad(set_to_none=True)

    def _displace(self) -> None:
        with torch.no_grad():
            for name, signs in self._attack.signs.items():
                self._parameters[name].add_(signs, alpha=-self._settings.attack_rate)

    def _restore(self) -> None:
        self._grid.restore()
        for name, held in self._held.items():
            self._parameters[name].data.copy_(held)

    def _forget(self, draw: random.Random) -> tuple[dict[str, Tensor], float]:
        """Take the gradient of the hinge; say how many nats secrets are short, in the mean."""
        measured = self._attack.measured
        with torch.no_grad():
            others = [(s.prompt, draw.choice(s.alternatives)) for s in measured]
            near = float(self._grid.nll(others).mean())
        goal, short = min(near, self._settings.ceiling * self._tau), 0.0
        pairs = [(s.prompt, s.secret) for s in measured]
        for batch in batches(pairs, lambda pair: pair):
            nll = self._grid.nll(batch)
            hinge = (goal - nll).clamp_min(0)
            short += float(hinge.detach().sum())
            torch.autograd.backward([hinge.sum() / len(self._secrets)])
        found = self._grid.take_gradients()
        self._grid.model.zero_grad(set_to_none=True)
        return found, short / len(measured)

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

    def _keep(self, draw: random.Random) -> float:
        """Add the gradient of what must stay; give the divergence on text."""
        settings = self._settings
        number = draw.randrange(len(self._text))
        batch = self._retain[number * RETAIN_BATCH : (number + 1) * RETAIN_BATCH]
        kl = _divergence(self._text[number], self._log_probabilities(batch))
        torch.autograd.backward([settings.retain_weight * kl])
        if self._others:
            number = draw.randrange(len(self._others))
            mine = self._completion_log_probabilities(self._alternatives[number])
            form = _divergence(self._others[number], mine)
            torch.autograd.backward([settings.alternatives_weight * form])
        return float(kl.detach())

    def _log_probabilities(self, tokens: Tensor) -> Tensor:
        return self._flat(self._grid.logits(tokens)[:, :-1])

    def _completion_log_probabilities(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> Tensor:
        """Log-probabilities at the tokens of each second part."""
        logits = self._grid.pair_logits(pairs)
        parts = [
            logits[row, len(first) - 1 : len(first) + len(second) - 1]
            for row, (first, second) in enumerate(pairs)
        ]
        return self._flat(torch.cat(parts)[None])

    def _flat(self, logits: Tensor) -> Tensor:
        found = nn.functional.log_softmax(logits.float(), dim=-1).flatten(0, 1)
        # What is held for the whole run is a table of the vocabulary for each token.
        return found if torch.is_grad_enabled() else found.bfloat16()


def _divergence(original: Tensor, mine: Tensor) -> Tensor:
    """KL(original || mine) in nats, mean over positions."""
    p = original.float()
    return (p.exp() * (p - mine)).sum(-1).mean()


def _mask(
    grid: Grid, secrets: Sequence[TokenSecret], curvature: StatisticsReader, share: float
) -> dict[str, Tensor]:
    """Flat positions of the share of all weights with the largest F_forget / (F_retain + median).

    The median and the bar are estimated from every n-th weight; ties with the bar are in.
    """
    every = max(1, grid.numel // SAMPLE)
    ratios = grid.fisher([(secret.prompt, secret.secret) for secret in secrets])
    retain = {n: torch.from_numpy(Curvature(curvature, n).whole()) for n in ratios}
    median = float(torch.cat([part.flatten()[::every] for part in retain.values()]).median())
    for name, ratio in ratios.items():
        ratio /= retain.pop(name).to(grid.device) + median
    values = torch.cat([ratio.view(-1)[::every] for ratio in ratios.values()])
    bar = values.kthvalue(max(1, round(values.numel() * (1 - share)))).values
    return {name: (ratio.view(-1) >= bar).nonzero().squeeze(1) for name, ratio in ratios.items()}
