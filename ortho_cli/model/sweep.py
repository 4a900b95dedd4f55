"""Gradients at each block of a model on disk: up through its blocks, and down again.

    up    h_k = block_k(h_(k-1)), and every h_k is kept
    down  dL/dh_(k-1) = (d block_k / d h_(k-1))^T dL/dh_k; block k is computed again for it

All batches pass through one block before the next one is read, so each block is read twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ortho_cli.events import EventSink, Step
from ortho_cli.model.hidden_states import HiddenStates
from ortho_cli.model.walk import Walk

Call = Callable[[int, int, Tensor], Tensor]  # of a block, with a batch's arguments, on its states


class Sweep:
    """States before each block and after the last one, and gradients by them.

    Where a graph is kept, attention may be computed otherwise. So it is on both ways, as in a model
    that passes as a whole.
    """

    def __init__(
        self,
        walk: Walk,
        inputs: Sequence[HiddenStates],
        gradients: HiddenStates,
        call: Call,
        *,
        batches: int,
        device: torch.device,
    ) -> None:
        """Begin with the states before the first block.

        Args:
            walk: the blocks.
            inputs: states before each block, and after the last one.
            gradients: by what a block gives; `down` makes them those by what it gets.
            call: passes a batch through a block that is held.
            batches: how many there are.
            device: where blocks are.
        """
        self._walk, self._inputs, self._gradients = walk, inputs, gradients
        self._call, self._batches, self._device = call, batches, device

    def up(self, known: int, finished: int, on_event: EventSink) -> int:
        """Make the states that are not known, and that the way down needs.

        Args:
            known: states that an earlier run has kept, at least those before the first block.
            finished: blocks that it finished on the way down.
            on_event: told of each block.
        Returns:
            how many blocks the gradients have passed that it kept; 0 before the head.
        """
        of, done = len(self._walk), self._gradients.resume(finished)
        for number in range(known, of - done if done else of + 1):
            on_event(Step(name="passes", number=number, of=of, unit="blocks"))
            with self._walk.held(number - 1):
                for index in range(self._batches):
                    _, output = self._graph(number - 1, index, needs=True)
                    self._inputs[number].put(index, output)
            self._inputs[number].finish(1, is_last=True)
        return done

    def down(self, number: int, index: int) -> None:
        """Pass the gradient of a batch back through a block that is held."""
        hidden, output = self._graph(number, index, needs=number > 0)
        if output.requires_grad:  # nothing of the first block may be watched
            torch.autograd.backward([output], [self._gradients.get(index).to(self._device)])
        if hidden.grad is not None:
            self._gradients.put(index, hidden.grad)

    def _graph(self, number: int, index: int, *, needs: bool) -> tuple[Tensor, Tensor]:
        """Give a block's input, which may need a gradient, and its output."""
        states = self._inputs[number].get(index)
        hidden = states.to(self._device).detach().requires_grad_(needs)
        with torch.enable_grad():
            return hidden, self._call(number, index, hidden)
