"""A model whose split weights lie on base's integer grid: what forgetting changes and measures."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ortho_cli.decompose.edits import Edit, Edits
from ortho_cli.decompose.plan import Plan
from ortho_cli.decompose.workers import ShardRows, task_of
from ortho_cli.errors import NumericalError
from ortho_cli.formats.curvature import Curvature
from ortho_cli.formats.statistics import StatisticsReader
from ortho_cli.model import load as models
from ortho_cli.model.scoring import pad
from ortho_cli.split import quantize
from ortho_cli.split.dtypes import torch_dtypes
from ortho_cli.split.in_memory import Base
from ortho_cli.split.pipeline import Work, split_weight
from ortho_cli.split.task import Inputs
from ortho_cli.split.torch_kernel import TorchKernel, tensor_of
from ortho_cli.storage.checkpoint import Checkpoint, ShardReader

BATCH_TOKENS = 512  # of one forward and backward pass over secrets; 1024 take 1 GB more
PRODUCTS = 1 << 24  # of inputs and slopes of outputs held at once: 64 MiB

T = TypeVar("T")
Pair = tuple[Sequence[int], Sequence[int]]  # tokens that are given, and those that are measured
Term = tuple[Pair, Sequence[float]]  # with the weight of the NLL of each that is measured


class _MixedError(Exception):
    """A Linear sees some of the tokens of a pass, as an expert does: whose they are is unknown."""


class Grid:
    """The model of a plan at alpha = 0, and the codes that have left their nearest place.

    All but the split weights is as in the checkpoint. In memory: the model in float32, and for each
    split weight two bytes and its share of a scale.
    """

    def __init__(
        self,
        plan: Plan,
        checkpoint: Checkpoint,
        *,
        curvature: StatisticsReader,
        device: torch.device,
        autocast: bool = False,
    ) -> None:
        """Load the model and round its split weights exactly as `decompose` does.

        Args:
            plan: made from `checkpoint`.
            checkpoint: a transformers folder.
            curvature: for scales that are searched by it.
            device: where the model goes.
            autocast: compute in bfloat16 wherever a gradient is wanted.
        Raises:
            NumericalError: a weight is NaN or infinite.
        """
        self.group_size, self.device, self._autocast = plan.group_size, device, autocast
        self._checkpoint = checkpoint
        self._sources = {tensor.name: tensor.source for tensor in plan.split}
        self.model = models.load_model(checkpoint.folder, dtype=torch.float32, device=device)
        self.modules = models.find_linears(self.model, [tensor.name for tensor in plan.split])
        self.weights: dict[str, nn.Parameter] = {}
        self.original: dict[str, Tensor] = {}
        self.scales: dict[str, Tensor] = {}
        self.bits = {tensor.name: tensor.bits for tensor in plan.split}
        kernel = TorchKernel(plan.sizes)
        with contextlib.closing(ShardReader(checkpoint.shards)) as reader:
            for tensor in plan.split:
                task = replace(
                    task_of(plan, tensor), k=0, columns=None
                )  # base alone, as if there were no ortho
                near = Curvature(curvature, tensor.name) if task.scale == "curvature" else None
                inputs, base = Inputs(ShardRows(reader, tensor.source), near), Base(task)
                split_weight(Work(task, inputs, kernel, base.write))
                codes = quantize.unpack_codes(torch.from_numpy(base.packed), bits=tensor.bits)
                self.weights[tensor.name] = self.modules[tensor.name].get_parameter("weight")
                self.scales[tensor.name] = tensor_of(base.scales, task.dtype).to(device)
                self.original[tensor.name] = codes[:, : task.shape[1]].to(device)
        self.codes = {name: codes.clone() for name, codes in self.original.items()}
        self.restore()

    @property
    def numel(self) -> int:
        """Split weights."""
        return sum(codes.numel() for codes in self.codes.values())

    @property
    def moved(self) -> int:
        """Codes that are not where rounding puts them."""
        return sum(int((self.codes[n] != codes).sum()) for n, codes in self.original.items())

    def _read(self, name: str) -> Tensor:
        source = self._sources[name]
        raw = torch.empty(source.shape, dtype=torch_dtypes()[source.dtype])
        with contextlib.closing(ShardReader(self._checkpoint.shards)) as reader:
            reader.read_into(quantize.as_bytes(raw), source, start=0)
        return raw

    def exact(self, name: str, positions: Tensor) -> Tensor:
        """Give the checkpoint's weights at flat positions in units of codes, not rounded."""
        weights = self._read(name).view(-1)[positions.cpu()].float().to(self.device)
        return weights / self.spacing_at(name, positions)

    def spacing(self, name: str) -> Tensor:
        """Distance between neighbouring codes of each weight, (out, in) float32."""
        return self.scales[name].float().repeat_interleave(self.group_size, dim=1)

    def spacing_at(self, name: str, positions: Tensor) -> Tensor:
        """Distance between neighbouring codes at flat positions, float32."""
        # A group lies inside a row, so flat indices count groups, too.
        return self.scales[name].view(-1)[positions // self.group_size].float()

    def move(self, name: str, positions: Tensor, codes: Tensor) -> None:
        """Give codes to flat positions of a weight; the model follows."""
        self.codes[name].view(-1)[positions] = codes.to(torch.int8)
        product = codes.float() * self.spacing_at(name, positions)
        rounded = product.to(self.scales[name].dtype).float()
        self.weights[name].data.view(-1)[positions] = rounded

    def restore(self) -> None:
        """Give every split weight the value of its code."""
        for name, weight in self.weights.items():
            weight.data.copy_(quantize.dequantize(self.codes[name], self.scales[name]))

    def revert(self) -> None:
        """Put every code back where rounding puts it."""
        for name, codes in self.original.items():
            self.codes[name].copy_(codes)
        self.restore()

    def edits(self) -> dict[str, Edit]:
        """Give the codes that were moved."""
        found = {}
        for name, codes in self.codes.items():
            positions = (codes != self.original[name]).view(-1).nonzero().squeeze(1)
            if len(positions):
                found[name] = Edit(
                    positions=positions.cpu().numpy().astype(np.int64),
                    codes=codes.view(-1)[positions].cpu().numpy(),
                )
        return found

    def apply(self, edits: Edits) -> None:
        """Move codes as an earlier run did."""
        for name, edit in edits.items():
            positions = torch.from_numpy(edit.positions).to(self.device)
            self.move(name, positions, torch.from_numpy(edit.codes).to(self.device))

    def arithmetic(self) -> torch.autocast:
        """Compute in bfloat16 where autocast is asked for."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast)

    def logits(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Pass (n, length) tokens through; in bfloat16 where autocast is asked for."""
        options = {} if mask is None else {"attention_mask": mask.to(self.device)}
        with self.arithmetic():
            output = self.model(input_ids=tokens.to(self.device), use_cache=False, **options)
        found: Tensor = output.logits
        return found

    def pair_logits(self, pairs: Sequence[Pair]) -> Tensor:
        """Logits (n, longest, vocabulary) of rows that hold both parts of a pair."""
        tokens = pad([[*first, *second] for first, second in pairs])
        mask = pad([[1] * (len(first) + len(second)) for first, second in pairs])
        return self.logits(tokens, mask)

    def completion_logits(self, pairs: Sequence[Pair]) -> Tensor:
        """Logits at each token of the second parts, (tokens of all, vocabulary) float32."""
        logits = self.pair_logits(pairs)
        parts = [
            logits[row, len(first) - 1 : len(first) + len(second) - 1]
            for row, (first, second) in enumerate(pairs)
        ]
        return torch.cat(parts).float()

    def token_nlls(self, pairs: Sequence[Pair]) -> Tensor:
        """NLL of each token of each pair's second part; keeps the graph.

        Returns:
            (n, longest - 1) float32, nats; 0 wherever there is no such token.
        """
        labels = pad([[*(-100 for _ in first), *second] for first, second in pairs], -100)
        return nn.functional.cross_entropy(
            self.pair_logits(pairs)[:, :-1].transpose(1, 2).float(),
            labels[:, 1:].to(self.device),
            reduction="none",
            ignore_index=-100,
        )

    def nll(self, pairs: Sequence[Pair]) -> Tensor:
        """Sum the NLL of each pair's second part; keeps the graph.

        Returns:
            (n,) float32, nats.
        """
        return self.token_nlls(pairs).sum(1)

    def gradient(self, terms: Sequence[Term]) -> dict[str, Tensor]:
        """Differentiate sum weight NLL of tokens by every split weight, (out, in) float32 each."""
        with self.trainable():
            for batch in batches(terms, lambda item: item[0]):
                torch.autograd.backward([self._weighted(batch)])
            return self.take_gradients()

    def slopes(self, terms: Sequence[Term], places: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """Differentiate each term by itself, by some weights alone.

            slope = sum_t g_to x_ti   of weight (o, i), x the Linear's input, g its output's slope

        No gradient of a whole weight is formed, so many terms pass at once.

        Args:
            terms: as in `gradient`.
            places: flat positions in some of the weights.
        Yields:
            For some terms at a time, in their order: (terms, places of all weights) float32.
        Raises:
            NumericalError: one is NaN or infinite.
        """
        if not any(map(len, places.values())):
            yield torch.zeros(len(terms), 0, device=self.device)
            return
        for batch in batches(terms, lambda item: item[0]):
            try:
                yield self._slopes(batch, places)
            except _MixedError:
                yield from (self._slopes([one], places) for one in batch)

    def _slopes(self, terms: Sequence[Term], places: Mapping[str, Tensor]) -> Tensor:
        """Give the slopes of terms that pass at once.

        Raises:
            _MixedError: a Linear sees other than all tokens of all terms.
        """
        length = max(len(first) + len(second) for (first, second), _ in terms)
        found = {
            name: torch.zeros(len(terms), len(at), device=self.device)
            for name, at in places.items()
        }

        def add(name: str, x: Tensor, grad: Tensor) -> None:
            x, grad = (one.reshape(len(terms), -1, one.shape[-1]).float() for one in (x, grad))
            step = max(1, PRODUCTS // x[..., 0].numel())
            for start in range(0, len(places[name]), step):
                at = places[name][start : start + step]
                ours = grad[..., at // x.shape[-1]] * x[..., at % x.shape[-1]]
                found[name][:, start : start + step] += ours.sum(1)

        def watch(
            name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
        ) -> Tensor:
            x = inputs[0].detach()
            if len(terms) > 1 and x[..., 0].numel() != len(terms) * length:
                raise _MixedError
            if not output.requires_grad:  # the graph begins at the first Linear that is watched
                output = output.detach().requires_grad_(True)
            output.register_hook(partial(add, name, x))  # type: ignore[no-untyped-call]
            return output

        with contextlib.ExitStack() as hooks, torch.enable_grad():
            for name, at in places.items():
                if len(at):
                    hook = self.modules[name].register_forward_hook(partial(watch, name))
                    hooks.enter_context(hook)
            torch.autograd.backward([self._weighted(terms)])
        for name, slopes in found.items():
            _check_finite(name, slopes)
        return torch.cat(list(found.values()), dim=1)

    def _weighted(self, terms: Sequence[Term]) -> Tensor:
        """Sum weight NLL of all tokens of all terms; keeps the graph."""
        nlls = self.token_nlls([pair for pair, _ in terms])
        rows = [torch.tensor([0.0] * len(pair[0]) + list(own))[1:] for pair, own in terms]
        weights = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return (nlls * weights.to(self.device)).sum()

    def fisher(
        self,
        pairs: Sequence[Pair],
        *,
        begun: tuple[int, dict[str, Tensor]] = (0, {}),
        on_pair: Callable[[int, dict[str, Tensor]], None] = lambda done, sums: None,
    ) -> dict[str, Tensor]:
        """Mean over pairs of the squared gradient of their NLL, (out, in) float32 each.

        Args:
            pairs: tokens that are given, and those that are measured.
            begun: what `on_pair` got of an earlier run.
            on_pair: gets the number of pairs that are done before each pair, and sums over them.
        On the grid: at the checkpoint's own weights what is known by heart has no gradient left.
        """
        done, found = begun
        if not done:
            found = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}
        with self.trainable():
            for number in range(done, len(pairs)):
                on_pair(number, found)
                torch.autograd.backward([self.nll([pairs[number]]).sum()])
                for name, gradient in self.take_gradients().items():
                    found[name].addcmul_(gradient, gradient, value=1 / len(pairs))
        return found

    def take_gradients(self) -> dict[str, Tensor]:
        """Take the gradients of the split weights away from them.

        Raises:
            NumericalError: one is NaN or infinite.
        """
        found = {}
        for name, weight in self.weights.items():
            gradient, weight.grad = weight.grad, None
            found[name] = torch.zeros_like(weight) if gradient is None else gradient
            _check_finite(name, found[name])
        return found

    @contextlib.contextmanager
    def trainable(self) -> Iterator[None]:
        """Let gradients reach the split weights."""
        for weight in self.weights.values():
            weight.requires_grad_(True)
        try:
            yield
        finally:
            for weight in self.weights.values():
                weight.requires_grad_(False)
                weight.grad = None


def _check_finite(name: str, gradient: Tensor) -> None:
    if not bool(torch.isfinite(gradient.sum())):
        raise NumericalError(
            f"a gradient of `{name}` is NaN or infinite",
            hint="look for NaN with `ortho inspect`, or --set forget.autocast=false",
        )


def batches(items: Sequence[T], pair: Callable[[T], Pair]) -> Iterator[list[T]]:
    """Part items into passes of about BATCH_TOKENS tokens; `pair` gives the tokens of one."""
    batch: list[T] = []
    longest = 0
    for item in items:
        length = sum(map(len, pair(item)))
        if batch and max(longest, length) * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch, longest = [], 0
        batch.append(item)
        longest = max(longest, length)
    if batch:
        yield batch
