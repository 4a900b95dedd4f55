"""Tuned rounding: learns the codes and scales of one block after another, on the block's output.

GPTQ rounds each Linear for inputs of the unquantized model, and for that Linear's output. Tuning
takes the blocks of the model in order. The input of a block is the output of the quantized blocks
before it, and its target Y is the output of the source's block after the source's blocks. With y
the output of the quantized block:

    minimise  mean_tc u_t v_c (y_tc - Y_tc)^2

u_t and v_c are mean squares of the gradient of the model's NLL at that output, by position t and by
feature c, each divided by its mean: an error counts as far as the NLL depends on it. Each weight
has a latent l, a real number in units of codes, and base has q = round(l). The gradient by
q * scale passes straight through to l. Both learn by sign descent, with rates that fall to 0
linearly:

    l -= rate sign(dE/dw)        scale *= 1 - scale_rate sign(sum over its group of q dE/dw)

l starts at the source's weight, clamped to what rounds to GPTQ's code. Weights that ortho keeps
stay the source's, and count as exact. A block whose error over all data is no lower at the end
starts again with a quarter of the rates; if that does not help, it keeps its codes and scales.

Sources: sign descent on rounding, block by block, with inputs of quantized blocks: SignRound (Cheng
et al. 2023, arXiv:2309.05516), the method of AutoRound, which starts at the nearest code, weights
all outputs alike, and learns a factor of a group's largest and smallest weight for its scale.
u_t v_c: the diagonal of BRECQ's Fisher (Li et al. 2021, arXiv:2102.05426, eq. 10), factored.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ortho_cli.decompose import plan as plans
from ortho_cli.decompose.edits import Arrays, Key, load_arrays, save_arrays
from ortho_cli.decompose.plan import Plan
from ortho_cli.decompose.settings import Tune
from ortho_cli.errors import CalibrationError, InternalError, NumericalError, RecipeError
from ortho_cli.events import EventSink, Noted, Step, null_sink
from ortho_cli.model import load as models
from ortho_cli.model.hidden_states import HiddenStates
from ortho_cli.model.hooks import logit_gradient
from ortho_cli.model.rows import Pair
from ortho_cli.model.sweep import Sweep
from ortho_cli.model.text import read_rows, retain_sequences, stamps
from ortho_cli.model.walk import Walk
from ortho_cli.split import quantize
from ortho_cli.split.quantize import Rounded
from ortho_cli.storage.checkpoint import Checkpoint
from ortho_cli.storage.parts import Pace
from ortho_cli.storage.work_folder import writing

REACH = 0.48  # codes; how far from GPTQ's code a latent starts at most: short of the next at 0.5
RATES = (1.0, 0.25)  # factors of the rates; the second where the first made a block worse
WEIGHTS_FILE = "tune-weights.npz"  # in private/ of the work folder: u and v of outputs
BLOCK_FILE = "tune-block.npz"  # there, too: the block that is tuned
INPUTS, GRADIENTS = "tune-hidden", "tune-gradients"  # names of files of states, there, too
MAPPED = 4  # states of all sequences that a block needs: both inputs, and both outputs
WAY_OUT = "such a model cannot be tuned block by block; use base.rounding gptq"
LIMIT = 0.499  # codes; how far beyond the last code a latent may go


class Latent:
    """The latents and scales of one weight; see the module."""

    def __init__(self, weight: Tensor, start: Rounded, *, bits: int) -> None:
        """Start at a rounded weight.

        Args:
            weight: (out, in), of the source; it must stay as it is.
            start: its codes and scales by GPTQ.
            bits: per code.
        """
        self._start, self._range = start, quantize.code_range(bits)
        self._source = weight
        # A copy even of float32: steps multiply it in place, and `start` must stay what it was.
        self._scales = start.scales.to(torch.float32, copy=True)
        codes = start.codes.float()
        latent = quantize.groups_of(weight.float(), start.scales.shape[1])
        latent = (latent / self._scales.unsqueeze(-1)).view(weight.shape)
        self._latent = latent.clamp_(codes - REACH, codes + REACH)

    def step(self, gradient: Tensor, *, rate: float, scale_rate: float) -> None:
        """Take one step of sign descent, given the gradient by the weight, (out, in)."""
        gradient = gradient.float().masked_fill(self._start.kept, 0.0)
        count = self._scales.shape[1]
        slope = quantize.groups_of(gradient * self._codes(), count).sum(-1)
        self._scales.mul_(1.0 - scale_rate * slope.sign())
        low, high = self._range
        self._latent.sub_(gradient.sign_(), alpha=rate).clamp_(low - LIMIT, high + LIMIT)

    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        """Give what steps have changed."""
        return {"latent": self._latent.cpu().numpy(), "scales": self._scales.cpu().numpy()}

    def resume(self, arrays: Arrays) -> None:
        """Continue from what `arrays` gave."""
        self._latent.copy_(torch.from_numpy(arrays["latent"]))
        self._scales.copy_(torch.from_numpy(arrays["scales"]))

    def rounded(self) -> Rounded:
        """Return the codes and scales as base stores them."""
        scales = quantize.round_scales(self._scales, self._start.scales.dtype)
        return Rounded(self._codes().to(torch.int8), scales, self._start.kept)

    def value(self) -> Tensor:
        """Return the weight at alpha = 1, in the source's dtype."""
        return value_of(self.rounded(), self._source)

    def _codes(self) -> Tensor:
        return self._latent.round().clamp_(*self._range)


def value_of(rounded: Rounded, source: Tensor) -> Tensor:
    """Return a rounded weight at alpha = 1: the source's at ortho's positions."""
    value = quantize.dequantize(rounded.codes, rounded.scales).to(source.dtype)
    return torch.where(rounded.kept, source, value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuner:
    """Tunes the rounded weights of a plan with base.rounding tuned; made by `open_tuner`."""

    plan: Plan
    checkpoint: Checkpoint
    sequences: tuple[tuple[int, ...], ...]
    files: tuple[Path, ...]
    device: torch.device

    @property
    def identity(self) -> object:
        """Everything that the result depends on beside plan and source, as JSON."""
        return [*stamps(self.files), self.device.type]

    def tune(
        self,
        start: Callable[[str], Rounded],
        tuned: Collection[str],
        *,
        folder: Path,
        key: Key | None = None,
        on_event: EventSink = null_sink,
    ) -> Iterator[dict[str, Rounded]]:
        """Tune one block after another.

        Args:
            start: gives a weight as base and ortho have it.
            tuned: weights that an earlier run has tuned; a block of these alone is not tuned again.
            folder: of unfinished work: gets what is known inside a block.
            key: seals that: a latent tells the source's weight.
            on_event: gets each block.
        Yields:
            The weights of a block, by name.
        Raises:
            CalibrationError: blocks cannot be called one by one, or data do not fit the model.
            NumericalError: a gradient is not finite.
        """
        settings, plan = self.plan.recipe.tune, self.plan
        names = [tensor.name for tensor in plan.split]
        walk = Walk(
            self.checkpoint, names, dtype=torch.bfloat16, device=self.device, way_out=WAY_OUT
        )
        models.check_fits(
            walk.model,
            length=settings.length,
            largest_token=max(map(max, self.sequences)),
            asked="tune.length",
        )
        if walk.left:
            on_event(
                Noted(message=f"{len(walk.left)} split tensors are in no block, and not tuned")
            )
        with contextlib.closing(walk):
            tokens = torch.tensor(self.sequences)
            data = _Data(walk, tokens, settings.batch, self.device, folder)
            # u (n, length) and v (hidden,) of each block.
            token, channel = _Weighing(data, folder, settings.seed, key, on_event).run()
            bits = {tensor.name: tensor.bits for tensor in plan.split}
            job = _Job(data, bits, settings, folder / BLOCK_FILE, key)
            of = 1 + max(number for number, inside in enumerate(walk.linears) if inside)
            for number, inside in enumerate(walk.linears[:of]):  # nothing is tuned after them
                on_event(Step(name=f"tune: {job.told}", number=number + 1, of=of, unit="blocks"))
                known = {name: _on(self.device, start(name)) for name in inside}
                done = all(name in tuned for name in inside)
                weights = _normalised(token[number]), _normalised(channel[number])
                found = job.tune(number, known, None if done else weights)
                if not done:
                    yield {n: _on(torch.device("cpu"), rounded) for n, rounded in found.items()}


class _Data:
    """All sequences, as they reach the first block, and how a block is called.

    `states`: (n, length, hidden) bfloat16.
    """

    def __init__(
        self, walk: Walk, tokens: Tensor, batch: int, device: torch.device, folder: Path
    ) -> None:
        self.walk, self.tokens, self.device, self._folder = walk, tokens, device, folder
        self.parts = [slice(first, first + batch) for first in range(0, len(tokens), batch)]
        walk.read_only(tokens)
        for number, part in enumerate(self.parts):
            hidden, options = walk.enter(tokens[part].to(device), None)
            if not number:
                self._options = options  # of each block; all batches are alike
                self._one = hidden[0]  # of a sequence, for its shape and dtype
                self.states = self.room()
            self.states[part] = hidden
        walk.release()

    @property
    def nbytes(self) -> int:
        """Bytes of the states."""
        return len(self.tokens) * self._one.nbytes

    def room(self) -> Tensor:
        """Give room for states: in memory, or in a file where they are many.

        A file is mapped, so that its pages are memory only as long as nothing else needs them.
        """
        shape = (len(self.tokens), *self._one.shape)
        if MAPPED * self.nbytes <= plans.TUNE_STATES:
            return torch.empty(shape, dtype=self._one.dtype, device=self.device)
        with writing(self._folder), tempfile.NamedTemporaryFile(dir=self._folder) as file:
            os.posix_fallocate(file.fileno(), 0, self.nbytes)  # a full disk would kill us later
            numel = math.prod(shape)
            mapped = torch.from_file(file.name, shared=True, size=numel, dtype=self._one.dtype)
        return mapped.view(shape)

    def call(self, number: int, hidden: Tensor) -> Tensor:
        """Pass a batch through a block that is held."""
        return self.walk.call(number, hidden.to(self.device), self._options[number])


class _Weighing:
    """How much the NLL depends on each position and feature of each block's output.

    With y the output of a block, and NLL that of labels drawn from the model, summed over a
    sequence,

        u_t = mean_c (dNLL/dy_tc)^2,  v_c = mean_t (dNLL/dy_tc)^2

    What is known is kept in a file, block by block.
    """

    def __init__(
        self, data: _Data, folder: Path, seed: int, key: Key | None, on_event: EventSink
    ) -> None:
        self._data, self._folder, self._seed = data, folder, seed
        self._key, self._on_event = key, on_event
        self._file = folder / WEIGHTS_FILE

    def run(self) -> tuple[Tensor, Tensor]:
        """Weigh what an earlier run has not.

        Returns:
            u (blocks, n, length) and v (blocks, hidden) float32, >= 0, on the device.
        Raises:
            NumericalError: a gradient is NaN or infinite.
        """
        data, walk = self._data, self._data.walk
        (count, length), width = data.tokens.shape, data.states.shape[-1]
        known = self._load() or (0, torch.zeros(len(walk), count, length), torch.empty(0))
        finished, token, channel = known
        if not finished:
            channel = torch.zeros(len(walk), width)
        if finished < len(walk):
            self._sweep(finished, token, channel)
        if not all(bool(values.isfinite().all()) for values in (token, channel)):
            what = "a gradient of a block's output is NaN or infinite"
            raise NumericalError(what, hint="look for NaN weights with `ortho inspect`")
        return token.to(data.device), channel.to(data.device)

    def _sweep(self, finished: int, token: Tensor, channel: Tensor) -> None:
        data, walk = self._data, self._data.walk
        blocks, shapes = len(walk), [data.states[part].shape for part in data.parts]
        in_memory = (blocks + 2) * data.nbytes <= plans.TUNE_STATES
        with contextlib.ExitStack() as files:
            states = [
                HiddenStates(
                    self._folder, shapes, data.states.dtype, name=name, in_memory=in_memory
                )
                for name in (*(f"{INPUTS}-{k}" for k in range(blocks + 1)), GRADIENTS)
            ]
            for one in states:
                files.enter_context(contextlib.closing(one))
            inputs, gradients = states[:-1], states[-1]
            known = sum(itertools.takewhile(bool, (one.resume(1) for one in inputs)))
            if not known:
                for index, part in enumerate(data.parts):
                    inputs[0].put(index, data.states[part])
                inputs[0].finish(1)
            sweep = Sweep(
                walk,
                inputs,
                gradients,
                lambda number, index, hidden: data.call(number, hidden),
                batches=len(shapes),
                device=data.device,
            )
            done = sweep.up(max(known, 1), finished, self._on_event)
            if not done:
                self._head(inputs[blocks], gradients)
            for passed in range(done, blocks):
                number = blocks - 1 - passed
                self._on_event(
                    Step(name="weighs outputs", number=passed + 1, of=blocks, unit="blocks")
                )
                with walk.held(number):
                    for index, part in enumerate(data.parts):
                        if passed >= finished:
                            squares = gradients.get(index).float().square()
                            token[number, part] = squares.mean(-1)
                            channel[number] += squares.sum((0, 1)) / data.tokens.numel()
                        sweep.down(number, index)
                if passed >= finished:
                    self._save(passed + 1, token, channel)
                if number:
                    gradients.finish(passed + 1)

    def _head(self, outputs: HiddenStates, gradients: HiddenStates) -> None:
        """Differentiate the NLL of labels that the model draws by the last block's output."""
        data = self._data
        for index, part in enumerate(data.parts):
            hidden = outputs.get(index).to(data.device).detach().requires_grad_(True)
            with torch.enable_grad():
                logits = data.walk.logits(hidden)
            gradient = torch.empty_like(logits)
            for i, row in enumerate(data.tokens[part].to(data.device)):
                counted = torch.ones(len(row), dtype=torch.bool, device=data.device)
                counted[-1] = False
                drawn = torch.Generator().manual_seed(self._seed + part.start + i)
                gradient[i] = logit_gradient(logits[i].detach(), row, counted, generator=drawn)[0]
            torch.autograd.backward([logits], [gradient])
            if hidden.grad is None:
                raise InternalError("no gradient reaches the output of the blocks")
            gradients.put(index, hidden.grad)
        gradients.finish(0)

    def _save(self, done: int, token: Tensor, channel: Tensor) -> None:
        arrays = {"done": np.asarray(done), "token": token.numpy(), "channel": channel.numpy()}
        save_arrays(self._file, arrays, self._key)

    def _load(self) -> tuple[int, Tensor, Tensor] | None:
        """Read what an earlier run has kept; None where there is nothing whole."""
        arrays = load_arrays(self._file, self._key)
        if arrays is None:
            return None
        token, channel = (torch.from_numpy(arrays[name]) for name in ("token", "channel"))
        return int(arrays["done"]), token, channel


def _on(device: torch.device, rounded: Rounded) -> Rounded:
    return Rounded(*(part.to(device) for part in rounded))


def _normalised(values: Tensor) -> Tensor:
    """Divide by the mean; ones where all are 0."""
    mean = values.mean()
    return values / mean if mean > 0 else torch.ones_like(values)


@dataclass
class _Job:
    """Hidden states of the source and of the quantized model, between two blocks."""

    data: _Data
    bits: dict[str, int]
    settings: Tune
    state: Path
    key: Key | None
    told: str = "the first block"
    pace: Pace = field(default_factory=Pace)

    def __post_init__(self) -> None:
        self._count = len(self.data.tokens)
        self._linears = {n: one for part in self.data.walk.linears for n, one in part.items()}
        self._free: list[Tensor] = []  # states that no block needs any more
        self._inputs = self._ideal = self.data.states

    def _room(self) -> Tensor:
        return self._free.pop() if self._free else self.data.room()

    def tune(
        self, number: int, start: dict[str, Rounded], weights: tuple[Tensor, Tensor] | None
    ) -> dict[str, Rounded]:
        """Tune a block, or keep it where there are no `weights`; advance both hidden states."""
        with self.data.walk.held(number):
            return self._tune(number, start, weights)

    def _tune(
        self, number: int, start: dict[str, Rounded], weights: tuple[Tensor, Tensor] | None
    ) -> dict[str, Rounded]:
        parameters = {name: self._parameter(name) for name in start}
        source = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        wanted, _ = self._forward(number, self._ideal, None, None)
        self._put({name: value_of(found, source[name]) for name, found in start.items()})
        outputs, before = self._forward(number, self._inputs, wanted, weights)
        found, error = start, before
        for turn in range(len(RATES)):
            if weights is None or not start:
                break
            latents = {
                name: Latent(source[name], start[name], bits=self.bits[name]) for name in start
            }
            self._learn(number, turn, latents, wanted, weights)
            learned, after = self._forward(number, self._inputs, wanted, weights)
            if after < before:
                self._free.append(outputs)
                outputs, error = learned, after
                found = {name: latent.rounded() for name, latent in latents.items()}
                break
            self._free.append(learned)
        if weights is not None:
            self.told = f"error of block {number + 1} was {before:.3g}, is {error:.3g}"
        passed = [self._ideal] if self._ideal is self._inputs else [self._ideal, self._inputs]
        self._free += passed
        self._ideal, self._inputs = wanted, outputs
        return found

    def _learn(
        self,
        number: int,
        turn: int,
        latents: dict[str, Latent],
        wanted: Tensor,
        weights: tuple[Tensor, Tensor],
    ) -> None:
        """Take all steps at the rates of a turn; the block then holds the learned weights."""
        settings = self.settings
        generator = torch.Generator().manual_seed(settings.seed + number)
        first, order = self._resume(number, turn, latents, generator)
        parameters = [self._parameter(name) for name in latents]
        self._put({name: latent.value() for name, latent in latents.items()})
        for parameter in parameters:
            parameter.requires_grad_(True)
        for step in range(first, settings.steps):
            if self.pace.due():
                at = np.asarray([number, turn, step])
                self.pace.save(partial(self._save, at, order, generator, latents))
            if len(order) < settings.batch:
                order = torch.randperm(self._count, generator=generator).tolist()
            chosen = [order.pop() for _ in range(settings.batch)]
            error = _error(self._call(number, chosen), wanted, weights, chosen)
            torch.autograd.backward([error])
            falling = RATES[turn] * (1.0 - step / settings.steps)
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

    def _save(
        self,
        at: npt.NDArray[np.int64],
        order: list[int],
        generator: torch.Generator,
        latents: dict[str, Latent],
    ) -> None:
        """Keep what the next step begins with."""
        arrays: dict[str, npt.NDArray[np.generic]] = {
            "at": at,
            "order": np.asarray(order, dtype=np.int64),
            "draws": generator.get_state().numpy(),
        }
        for name, latent in latents.items():
            arrays |= {f"{name}/{part}": array for part, array in latent.arrays().items()}
        save_arrays(self.state, arrays, self.key)

    def _resume(
        self, number: int, turn: int, latents: dict[str, Latent], generator: torch.Generator
    ) -> tuple[int, list[int]]:
        """Take what an earlier run kept of this block; give the next step, and the order left.

        A turn before that one did not help, and is not repeated.
        """
        held = load_arrays(self.state, self.key)
        if held is None or int(held["at"][0]) != number or int(held["at"][1]) < turn:
            return 0, []
        if int(held["at"][1]) > turn:
            return self.settings.steps, []
        generator.set_state(torch.from_numpy(held["draws"]))
        for name, latent in latents.items():
            latent.resume({part: held[f"{name}/{part}"] for part in ("latent", "scales")})
        return int(held["at"][2]), held["order"].tolist()

    @torch.no_grad()
    def _forward(
        self,
        number: int,
        inputs: Tensor,
        wanted: Tensor | None,
        weights: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, float]:
        """Pass all data through a block; return the outputs and their mean error."""
        outputs, total = self._room(), 0.0
        for first in range(0, self._count, self.settings.batch):
            chosen = list(range(first, first + self.settings.batch))
            outputs[chosen] = found = self.data.call(number, inputs[chosen])
            if wanted is not None and weights is not None:
                total += float(_error(found, wanted, weights, chosen)) * len(chosen) / self._count
        return outputs, total

    def _call(self, number: int, chosen: list[int]) -> Tensor:
        with torch.enable_grad():
            return self.data.call(number, self._inputs[chosen])

    def _parameter(self, name: str) -> nn.Parameter:
        return self._linears[name].get_parameter("weight")

    def _put(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self._parameter(name).data.copy_(value)


def _error(
    found: Tensor, wanted: Tensor, weights: tuple[Tensor, Tensor], chosen: list[int]
) -> Tensor:
    """Return the mean of u_t v_c (y_tc - Y_tc)^2 over some sequences."""
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
    """Read data for tuned rounding, before anything is written; None for another rounding.

    Raises:
        RecipeError: no data are given, or tune.samples is no multiple of tune.batch.
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
