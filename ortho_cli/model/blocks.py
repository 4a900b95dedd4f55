"""Call the blocks of a language model one at a time, with the arguments the model gives them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from ortho_cli.errors import CalibrationError, InternalError, NumericalError
from ortho_cli.model.hooks import logit_gradient

TOLERANCE = 1e-2  # of the largest hidden state, between a block alone and in its model: bfloat16

Options = dict[str, Any]  # of a block's forward: masks, positions; their types are the model's
Output = Tensor | tuple[Tensor, ...]  # of a block: hidden states, first of a tuple


class Stop(Exception):  # noqa: N818 - no error
    """Ends a forward pass where what follows is not wanted."""


class Blocks:
    """A model's blocks and the arguments that each is called with, beside hidden states."""

    def __init__(self, model: nn.Module, linears: Mapping[str, nn.Module], tokens: Tensor) -> None:
        """Find the blocks, and watch one forward pass.

        Args:
            model: a causal language model in eval mode.
            linears: weight name -> Linear of the model.
            tokens: (batch, length) int64; every later call has as many.
        Raises:
            CalibrationError: no list of modules holds a Linear, or its modules do not simply follow
                one another.
        """
        self.model, self.batch = model, tokens.shape[0]
        self._list = largest_list(model, linears)
        inside = [set(map(id, block.modules())) for block in self._list]
        self.names = [[name for name in linears if id(linears[name]) in ids] for ids in inside]
        self._options: list[Options] = []
        self._check(tokens)

    def __len__(self) -> int:
        return len(self._list)

    def __call__(self, number: int, hidden: Tensor) -> Tensor:
        """Pass (batch, length, hidden) through one block."""
        return hidden_of(self._list[number](hidden, **self._options[number]))

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> Tensor:
        """Give the hidden states of (batch, length) tokens that reach the first block."""
        found: list[Tensor] = []

        def stop(module: nn.Module, args: tuple[Tensor, ...], options: Options) -> None:
            found.append(split_arguments(args, options)[0])
            raise Stop

        with self._list[0].register_forward_pre_hook(stop, with_kwargs=True), suppress(Stop):
            self.model(input_ids=tokens, use_cache=False)
        return found[0].detach()

    def gradients(
        self,
        sequences: Tensor,
        *,
        seed: int,
        on_batch: Callable[[int, Tensor, Tensor], None],
        begun: tuple[int, Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Measure how much the NLL depends on each position and feature of each block's output.

        With y the output of a block and NLL that of labels drawn from the model, summed over a
        sequence,

            u_t = mean_c (dNLL/dy_tc)^2,  v_c = mean_t (dNLL/dy_tc)^2

        Args:
            sequences: (n, length) int64; n divides by the batch.
            seed: of the labels.
            on_batch: called after each pass, with the number of measured sequences and both results
                so far.
            begun: what `on_batch` got of an earlier run.
        Returns:
            (blocks, n, length) and (blocks, hidden) float32, >= 0, on the model's device.
        Raises:
            NumericalError: a gradient is NaN or infinite.
        """
        (count, length), blocks = sequences.shape, len(self)
        done, token, channel = begun or (0, torch.zeros(blocks, count, length), torch.empty(0))
        token, channel = token.to(sequences.device), channel.to(sequences.device)
        for start in range(done, count, self.batch):
            tokens = sequences[start : start + self.batch]
            counted = torch.ones(length, dtype=torch.bool, device=tokens.device)
            counted[-1] = False
            with self._watched() as outputs:
                logits = self.model(input_ids=tokens, use_cache=False).logits
                gradient = torch.empty_like(logits)
                for i, row in enumerate(tokens):
                    drawn = torch.Generator().manual_seed(seed + start + i)
                    found = logit_gradient(logits[i].detach(), row, counted, generator=drawn)
                    gradient[i] = found[0]
                logits.backward(gradient)
            for k, output in enumerate(outputs):
                if output.grad is None:
                    raise InternalError(f"no gradient reaches the output of block {k + 1}")
                squares = output.grad.float().square()
                token[k, start : start + self.batch] = squares.mean(-1)
                if not channel.numel():
                    channel = torch.zeros(blocks, squares.shape[-1], device=squares.device)
                channel[k] += squares.sum((0, 1)) / (count * length)
            on_batch(start + self.batch, token, channel)
        if not all(bool(values.isfinite().all()) for values in (token, channel)):
            what = "a gradient of a block's output is NaN or infinite"
            raise NumericalError(what, hint="look for NaN weights with `ortho inspect`")
        return token, channel

    @contextmanager
    def _watched(self) -> Iterator[list[Tensor]]:
        """Collect the outputs of blocks, and the gradients that reach them."""
        outputs: list[Tensor] = []

        def keep(module: nn.Module, args: tuple[Tensor, ...], output: Output) -> Output:
            hidden = hidden_of(output)
            if not outputs:  # no parameter needs a gradient: the graph begins here
                hidden = hidden.detach().requires_grad_(True)
            hidden.retain_grad()
            outputs.append(hidden)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        with ExitStack() as hooks:
            for block in self._list:
                hooks.enter_context(block.register_forward_hook(keep))
            yield outputs

    @torch.no_grad()
    def _check(self, tokens: Tensor) -> None:
        """Record the arguments of blocks; check that the model just calls them in turn."""
        inputs: list[Tensor] = []
        outputs: list[Tensor] = []

        def before(module: nn.Module, args: tuple[Tensor, ...], options: Options) -> None:
            hidden, rest = split_arguments(args, options)
            inputs.append(hidden)
            self._options.append(rest)

        def after(module: nn.Module, args: tuple[Tensor, ...], output: Output) -> None:
            outputs.append(hidden_of(output))

        with ExitStack() as hooks:
            for block in self._list:
                hooks.enter_context(block.register_forward_pre_hook(before, with_kwargs=True))
                hooks.enter_context(block.register_forward_hook(after))
            self.model(input_ids=tokens, use_cache=False)
        alone = len(inputs) == len(self._list)
        for number, hidden in enumerate(inputs if alone else []):
            last = outputs[number - 1] if number else hidden
            there = self(number, hidden)
            for one, other in ((hidden, last), (there, outputs[number])):
                alone = alone and one.shape == other.shape
                alone = alone and bool((one - other).abs().max() <= TOLERANCE * other.abs().max())
        if not alone:
            name = type(self.model).__name__
            raise _untunable(f"the blocks of {name} do not simply follow one another")


def largest_list(model: nn.Module, linears: Mapping[str, nn.Module]) -> Sequence[nn.Module]:
    """Find the list of modules that holds most of the Linears, the outermost of equals.

    Raises:
        CalibrationError: no list holds one.
    """
    wanted = set(map(id, linears.values()))
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    counts = [len(wanted.intersection(map(id, held.modules()))) for held in lists]
    if not any(counts):
        raise _untunable(f"{type(model).__name__} has no blocks with a Linear that is split")
    return list(lists[counts.index(max(counts))])


def _untunable(what: str) -> CalibrationError:
    hint = "such a model cannot be tuned block by block; use base.rounding gptq"
    return CalibrationError(what, hint=hint)


def split_arguments(args: tuple[Tensor, ...], options: Options) -> tuple[Tensor, Options]:
    """Split the arguments of a block into hidden states and the rest, by name.

    Raises:
        CalibrationError: hidden states are not its only positional argument.
    """
    if len(args) == 1:
        return args[0], options
    if not args and isinstance(options.get("hidden_states"), Tensor):
        rest = {key: value for key, value in options.items() if key != "hidden_states"}
        return options["hidden_states"], rest
    raise _untunable(f"a block is called with {len(args)} positional arguments where 1 is known")


def hidden_of(output: Output) -> Tensor:
    """Take the hidden states of what a block returns."""
    return output[0] if isinstance(output, tuple) else output
