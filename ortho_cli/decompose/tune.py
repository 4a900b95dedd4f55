"""Tuned rounding: the codes and scales of one block after another, learned on what it outputs.

GPTQ rounds each Linear for inputs of the unquantized model, and for that Linear's output. Here the
blocks of the model are taken in order. A block sees what the blocks before it, quantized already,
make of the data, and is to give what the source's block gives for what the source's blocks make of
it, where y is the output of the one, Y of the other:

    minimise  mean_tc u_t v_c (y_tc - Y_tc)^2

u_t and v_c are the mean squares of the gradient of the model's NLL at that output, by position and
by feature, each divided by its mean: what the model's word does not depend on may be wrong. Each
weight has a latent l, a real number of codes, and base has q = round(l). The gradient by q * scale
is passed straight through to l. Both learn by sign descent, with rates that fall to 0 in a line:

    l -= rate sign(dE/dw)        scale *= 1 - scale_rate sign(sum over its group of q dE/dw)

l begins at the source's weight, but inside what rounds to GPTQ's code, whose errors make up for
each other. Weights that ortho keeps are the source's throughout, and count as exact. A block that
ends worse than it began, over all of the data, begins again with a quarter of the rates, and if
that is no better keeps the codes and scales that it had.

Sources: sign descent on rounding, block by block, with inputs of quantized blocks: SignRound (Cheng
et al. 2023, arXiv:2309.05516), the method of AutoRound, which begins at the nearest code, weighs
all outputs alike, and learns a factor of a group's largest and smallest weight for its scale. The
weights: the diagonal of BRECQ's Fisher (Li et al. 2021, arXiv:2102.05426, eq. 10), factored.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ortho_cli.decompose.plan import Plan
from ortho_cli.decompose.settings import Tune
from ortho_cli.decompose.splitter import Rounded
from ortho_cli.errors import CalibrationError, InternalError, RecipeError
from ortho_cli.events import EventSink, Finishing, Noted, Step, null_sink
from ortho_cli.model import load as models
from ortho_cli.model.blocks import Blocks
from ortho_cli.model.rows import Pair
from ortho_cli.model.text import read_rows, retain_sequences, stamps
from ortho_cli.split import quantize
from ortho_cli.storage.checkpoint import Checkpoint

REACH = 0.48  # from a code to the latents that begin there: on the way to the next, not at its door
RATES = (1.0, 0.25)  # shares of them; the second where the first made a block worse
LIMIT = 0.499  # how far beyond the last code a latent may be


Start = Callable[[str], Rounded]


class Latent:
    """The latents and scales of one weight; see the module for what they are."""

    def __init__(self, weight: Tensor, start: Rounded, *, bits: int) -> None:
        """Begin at a rounded weight.

        Args:
            weight: (out, in), the source's.
            start: what it was rounded to.
            bits: of a code.
        """
        self._start, self._range = start, quantize.code_range(bits)
        self._source = weight.clone()
        # A copy even of float32: steps multiply it in place, and `start` must stay what it was.
        self._scales = start.scales.to(torch.float32, copy=True)
        codes = start.codes.float()
        latent = quantize.groups_of(weight.float(), start.scales.shape[1])
        latent = (latent / self._scales.unsqueeze(-1)).view(weight.shape)
        self._latent = latent.clamp_(codes - REACH, codes + REACH)

    def step(self, gradient: Tensor, *, rate: float, scale_rate: float) -> None:
        """Take one step of sign descent; `gradient` is that by the weight, (out, in)."""
        gradient = gradient.float().masked_fill(self._start.kept, 0.0)
        count = self._scales.shape[1]
        slope = quantize.groups_of(gradient * self._codes(), count).sum(-1)
        self._scales.mul_(1.0 - scale_rate * slope.sign())
        low, high = self._range
        self._latent.sub_(gradient.sign_(), alpha=rate).clamp_(low - LIMIT, high + LIMIT)

    def rounded(self) -> Rounded:
        """Give the codes and scales as they are stored."""
        scales = quantize.round_scales(self._scales, self._start.scales.dtype)
        return Rounded(self._codes().to(torch.int8), scales, self._start.kept)

    def value(self) -> Tensor:
        """Give the weight at alpha = 1, in the source's dtype."""
        return value_of(self.rounded(), self._source)

    def _codes(self) -> Tensor:
        return self._latent.round().clamp_(*self._range)


def value_of(rounded: Rounded, source: Tensor) -> Tensor:
    """Give a rounded weight at alpha = 1: the source's where ortho keeps it."""
    value = quantize.dequantize(rounded.codes, rounded.scales).to(source.dtype)
    return torch.where(rounded.kept, source, value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuner:
    """Tunes what a plan with base.rounding tuned has rounded; made by `open_tuner`."""

    plan: Plan
    checkpoint: Checkpoint
    sequences: tuple[tuple[int, ...], ...]
    files: tuple[Path, ...]
    device: torch.device

    @property
    def identity(self) -> object:
        """What the result depends on beside plan and source, as JSON."""
        return [*stamps(self.files), self.device.type]

    def tune(
        self, start: Start, tuned: Collection[str], *, on_event: EventSink = null_sink
    ) -> Iterator[dict[str, Rounded]]:
        """Tune one block after another.

        Args:
            start: gives a weight as base and ortho have it.
            tuned: weights that an earlier run has tuned; a block of them alone is gone past.
            on_event: told of each block.
        Yields:
            The weights of a block, by name.
        Raises:
            CalibrationError: the model's blocks cannot be called one by one, or data do not fit it.
            NumericalError: a gradient is not finite.
        """
        settings, plan = self.plan.recipe.tune, self.plan
        on_event(Finishing(step="load the model"))
        model = models.load_model(self.checkpoint.folder, dtype=torch.bfloat16, device=self.device)
        models.check_fits(
            model,
            length=settings.length,
            largest_token=max(map(max, self.sequences)),
            asked="tune.length",
        )
        linears = models.find_linears(model, [tensor.name for tensor in plan.split])
        tokens = torch.tensor(self.sequences, device=self.device)
        blocks = Blocks(model, linears, tokens[: settings.batch])
        left = set(linears).difference(*blocks.names)
        if left:
            on_event(Noted(message=f"{len(left)} split tensors are in no block, and not tuned"))
        weights = _Weights(blocks, tokens, settings, on_event)
        bits = {tensor.name: tensor.bits for tensor in plan.split}
        job = _Job(blocks, linears, bits, tokens, settings)
        for number, names in enumerate(blocks.names):
            on_event(Step(name=f"tune: {job.told}", number=number + 1, of=len(blocks)))
            known = {name: _on(self.device, start(name)) for name in names}
            done = all(name in tuned for name in names)
            found = job.tune(number, known, None if done else weights.of(number))
            if not done:
                yield {name: _on(torch.device("cpu"), rounded) for name, rounded in found.items()}


def _on(device: torch.device, rounded: Rounded) -> Rounded:
    return Rounded(*(part.to(device) for part in rounded))


class _Weights:
    """u and v of each block, each with a mean of 1."""

    def __init__(self, blocks: Blocks, tokens: Tensor, settings: Tune, on_event: EventSink) -> None:
        def told(done: int) -> None:
            on_event(Step(name="weigh outputs, in sequences", number=done, of=len(tokens)))

        found = blocks.gradients(tokens, seed=settings.seed, on_batch=told)
        self._token, self._channel = found

    def of(self, number: int) -> tuple[Tensor, Tensor]:
        """Give (n, length) and (hidden,) of a block; ones where every gradient is 0."""
        return _normalised(self._token[number]), _normalised(self._channel[number])


def _normalised(values: Tensor) -> Tensor:
    mean = values.mean()
    return values / mean if mean > 0 else torch.ones_like(values)


class _Job:
    """Hidden states on their way through both models, and the block that is worked on."""

    def __init__(
        self,
        blocks: Blocks,
        linears: dict[str, nn.Module],
        bits: dict[str, int],
        tokens: Tensor,
        settings: Tune,
    ) -> None:
        self._blocks, self._linears, self._bits = blocks, linears, bits
        self._settings, self._count = settings, len(tokens)
        starts = range(0, len(tokens), settings.batch)
        self._ideal = torch.cat([blocks.embed(tokens[i : i + settings.batch]) for i in starts])
        self._inputs = self._ideal
        self.told = "the first block"

    def tune(
        self,
        number: int,
        start: dict[str, Rounded],
        weights: tuple[Tensor, Tensor] | None,
    ) -> dict[str, Rounded]:
        """Tune a block, or take it as it is where there are no `weights`; go on behind it."""
        parameters = {name: self._parameter(name) for name in start}
        source = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        wanted, _ = self._forward(number, self._ideal, None, None)
        self._put({name: value_of(found, source[name]) for name, found in start.items()})
        outputs, before = self._forward(number, self._inputs, wanted, weights)
        found, error = start, before
        for share in RATES if weights is not None and start else ():
            latents = {
                name: Latent(source[name], start[name], bits=self._bits[name]) for name in start
            }
            self._learn(number, latents, wanted, weights, share)
            learned, after = self._forward(number, self._inputs, wanted, weights)
            if after < before:
                outputs, error = learned, after
                found = {name: latent.rounded() for name, latent in latents.items()}
                break
        if weights is not None:
            self.told = f"error of block {number + 1} was {before:.3g}, is {error:.3g}"
        self._ideal, self._inputs = wanted, outputs
        return found

    def _learn(
        self,
        number: int,
        latents: dict[str, Latent],
        wanted: Tensor,
        weights: tuple[Tensor, Tensor] | None,
        share: float,
    ) -> None:
        """Take all steps, with that share of the rates; the block holds what was learnt then."""
        if weights is None:
            raise InternalError(f"block {number} is to learn, and its errors have no weights")
        settings = self._settings
        parameters = [self._parameter(name) for name in latents]
        self._put({name: latent.value() for name, latent in latents.items()})
        for parameter in parameters:
            parameter.requires_grad_(True)
        generator = torch.Generator().manual_seed(settings.seed + number)
        order: list[int] = []
        for step in range(settings.steps):
            if len(order) < settings.batch:
                order = torch.randperm(self._count, generator=generator).tolist()
            chosen = [order.pop() for _ in range(settings.batch)]
            error = _error(self._blocks(number, self._inputs[chosen]), wanted, weights, chosen)
            torch.autograd.backward([error])
            falling = share * (1.0 - step / settings.steps)
            for name, latent in latents.items():
                parameter = self._parameter(name)
                if parameter.grad is not None:  # an expert that no token went to has none
                    latent.step(
                        parameter.grad,
                        rate=settings.rate * falling,
                        scale_rate=settings.scale_rate * falling,
                    )
                parameter.grad = None
            self._put({name: latent.value() for name, latent in latents.items()})
        for parameter in parameters:
            parameter.requires_grad_(False)

    @torch.no_grad()
    def _forward(
        self,
        number: int,
        inputs: Tensor,
        wanted: Tensor | None,
        weights: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, float]:
        """Pass all of the data through a block; give the outputs, and their mean error."""
        outputs, total = torch.empty_like(inputs), 0.0
        for first in range(0, self._count, self._settings.batch):
            chosen = list(range(first, first + self._settings.batch))
            outputs[chosen] = found = self._blocks(number, inputs[chosen])
            if wanted is not None and weights is not None:
                total += float(_error(found, wanted, weights, chosen)) * len(chosen) / self._count
        return outputs, total

    def _parameter(self, name: str) -> nn.Parameter:
        return self._linears[name].get_parameter("weight")

    def _put(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self._parameter(name).data.copy_(value)


def _error(
    found: Tensor, wanted: Tensor, weights: tuple[Tensor, Tensor], chosen: list[int]
) -> Tensor:
    """Weigh the squared difference of some sequences: mean of u_t v_c (y_tc - Y_tc)^2."""
    token, channel = weights
    squares = (found.float() - wanted[chosen].float()).square()
    return (squares * channel).mean(-1).mul(token[chosen]).mean()


def open_tuner(
    plan: Plan,
    checkpoint: Checkpoint,
    *,
    data: Sequence[Path],
    device: str,
    on_event: EventSink = null_sink,
) -> Tuner | None:
    """Read what tuned rounding needs, before anything is written; None for another rounding.

    Raises:
        RecipeError: such a recipe without data.
        UsageError: the device is not there.
        CalibrationError: the data are too short, or rows are pairs.
    """
    if plan.recipe.base.rounding != "tuned":
        return None
    settings = plan.recipe.tune
    if not data:
        raise RecipeError(
            "base.rounding is tuned, and no data are given to tune it on",
            hint="give --data FILE, as to `ortho calibrate`, or set base.rounding to gptq",
        )
    if settings.samples % settings.batch:
        raise RecipeError(
            f"tune.samples is {settings.samples}, and no multiple of tune.batch {settings.batch}",
            hint=f"--set tune.samples={-(-settings.samples // settings.batch) * settings.batch}",
        )
    tokenizer = models.load_tokenizer(checkpoint.folder)
    rows, _ = read_rows(data, on_event)
    texts = [row for row in rows if not isinstance(row, Pair)]
    if len(texts) < len(rows):
        raise CalibrationError(
            f"{len(rows) - len(texts)} rows of the data are prompts and completions, and rounding "
            "is tuned on running text",
            hint="give files of text, rows with `text`, or chats",
        )
    sequences = retain_sequences(
        texts,
        tokenizer,
        samples=settings.samples,
        length=settings.length,
        seed=settings.seed,
        asked="tune",
        multiple=settings.batch,
        running=True,
    )
    return Tuner(
        plan=plan,
        checkpoint=checkpoint,
        sequences=tuple(sequence.tokens for sequence in sequences),
        files=tuple(data),
        device=models.resolve_device(device),
    )
