"""unlearn: forget secrets so that fine-tuning on similar secrets does not bring them back.

`isolate` hides a secret, and a few fine-tuning steps on other secrets of its kind restore it. So
this optimisation has those steps inside its loop. It divides the secrets into random halves A and
B. An attacker fine-tunes on A by sign descent, in steps of `attack_rate` for every parameter. After
each step the codes move so that B is as unlikely for the attacker as for a model that never saw it:

    minimise   mean_B max(0, tau - NLL_B(theta + delta))
               + retain_weight KL(original || theta) on retain text
               + alternatives_weight KL(original || theta) on alternatives of the secrets

theta is the model on the grid. delta is the attacker's change so far; it starts from 0 every
`attack_steps` steps, so the loss also covers the model without an attack. tau is the NLL of
alternatives in the same model, at most `ceiling` times its first value: a model that never saw the
secrets does not know their form either, so it may forget the form, too, unless
`alternatives_weight` keeps it. The gradient at theta + delta serves as the one at theta, as in
first-order MAML. Only codes in a mask move: the share `mask` with the largest
F_forget / (F_retain + its median). Each has a real number that Adam moves; rounding turns it into a
code, and the gradient passes straight through. Scales stay.

`isolate` follows, and moves each secret to a rank among its alternatives.

Sources: straight-through rounding, Bengio et al. 2013 (arXiv:1308.3432); the attack inside the
loop, TAR (Tamirisa et al. 2024, arXiv:2408.00761), with sign descent as the inner optimiser and
codes as weights. The hinge on the NLL, in place of ascent, does not make secrets conspicuously
unlikely.
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

BETAS = (0.9, 0.99)  # of Adam
SAMPLE = 1 << 20  # weights from which a median or a threshold is estimated
SHORT = 0.02  # share of the alternatives' NLL that an attack may restore where work ends early
RETAIN_BATCH = 8  # sequences
WARM_UP = 10  # steps over which Adam's rate rises: its first moments are of few gradients
ALTERNATIVES = 4  # per secret, on which `alternatives_weight` keeps predictions
REACH = 0.499  # codes; from a code to the edge of the interval that rounds to it


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
    """Move codes of the grid; resume from `state` where a killed run has left it.

    Args:
        grid: the model; what moved is in it afterwards.
        secrets: what must go.
        retain: (n, length) int64 tokens of running text.
        curvature: of the retain set.
        room: the largest number of codes that may differ from the nearest, by weight.
        settings: the recipe's `forget`.
        end: tokens that end a text of the attacker's; may be none.
        state: file of unfinished work, for its owner alone.
        key: seals that file.
        on_event: gets each step.
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
    """A real number for each masked code, which it rounds to."""

    def __init__(self, grid: Grid, mask: dict[str, Tensor]) -> None:
        self._grid, self._mask = grid, mask
        self._values: dict[str, Tensor] = {}
        self._spacing: dict[str, Tensor] = {}
        self._moments: dict[str, tuple[Tensor, Tensor]] = {}
        for name, places in mask.items():
            spacing = grid.spacing_at(name, places)
            codes = grid.original[name].view(-1)[places].float()
            self._spacing[name] = spacing
            # Weights at the edge of their code's interval move first, and at the least cost.
            exact = grid.exact(name, places)
            self._values[name] = torch.clamp(exact, codes - REACH, codes + REACH)
            self._moments[name] = (torch.zeros_like(spacing), torch.zeros_like(spacing))

    def step(self, gradients: list[dict[str, Tensor]], step: int, rate: float) -> None:
        """Take one step of Adam, and move the codes to the rounded numbers."""
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
        """Revert the shortest moves of a weight that has moved more codes than its room."""
        for name, places in self._mask.items():
            original = self._grid.original[name].view(-1)[places].float()
            moved = (self._values[name].round() != original).nonzero().squeeze(1)
            if len(moved) > room[name]:
                far = (self._values[name] - original)[moved].abs()
                back = moved[far.sort(stable=True).indices[: len(moved) - room[name]]]
                self._values[name][back] = original[back]
                self._grid.move(name, places[back], original[back])

    def save(self, path: Path, step: int, key: Key | None) -> None:
        """Write everything that the next step needs."""
        arrays = {"step": np.asarray(step)}
        for name, values in self._values.items():
            parts = (values, *self._moments[name])
            for part, tensor in zip(("value", "mean", "square"), parts, strict=True):
                arrays[f"{name}/{part}"] = tensor.cpu().numpy()
        save_arrays(path, arrays, key)

    def load(self, path: Path, key: Key | None) -> int:
        """Load the state of an earlier run; return the step to continue with."""
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
    """An attacker: the secrets it trains on, those that are measured, and its steps so far."""

    train: list[TokenSecret]
    measured: list[TokenSecret]
    signs: dict[str, Tensor]  # int8: steps up less steps down


class _Job:
    """Gradients of the three terms of the loss, step by step."""

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
        """Tell whether the last attack restored no secret, and predictions on text are the same."""
        shorts = [short for short, _ in self._cycle]
        divergences = [divergence for _, divergence in self._cycle]
        self._cycle = []
        forgotten = max(shorts) < SHORT * self._tau
        return forgotten and math.fsum(divergences) / len(divergences) < self._settings.divergence

    @property
    def told(self) -> str:
        """Distance of the last step from its goals, in words."""
        if not self._cycle:
            return "a new attack"
        short, divergence = self._cycle[-1]
        return f"{short:.1f} nats short, divergence {divergence:.3f}"

    def gradients(self, step: int) -> list[dict[str, Tensor]]:
        """Return the gradients of both parts of the loss by every split weight."""
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
        """Return the gradient of the hinge, and by how many nats secrets miss it in the mean."""
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
        """Add the gradient of both divergences; return the one on text."""
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
        """Return log-probabilities at the tokens of each second part."""
        logits = self._grid.pair_logits(pairs)
        parts = [
            logits[row, len(first) - 1 : len(first) + len(second) - 1]
            for row, (first, second) in enumerate(pairs)
        ]
        return self._flat(torch.cat(parts)[None])

    def _flat(self, logits: Tensor) -> Tensor:
        found = nn.functional.log_softmax(logits.float(), dim=-1).flatten(0, 1)
        # bfloat16 for those that are kept all the time: a row of the vocabulary per token.
        return found if torch.is_grad_enabled() else found.bfloat16()


def _divergence(original: Tensor, mine: Tensor) -> Tensor:
    """Return KL(original || mine) in nats, the mean over positions."""
    p = original.float()
    return (p.exp() * (p - mine)).sum(-1).mean()


def _mask(
    grid: Grid, secrets: Sequence[TokenSecret], curvature: StatisticsReader, share: float
) -> dict[str, Tensor]:
    """Return flat positions of the weights with the largest F_forget / (F_retain + median).

    The median and the threshold of the share are estimated from every n-th weight; ties are in.
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
