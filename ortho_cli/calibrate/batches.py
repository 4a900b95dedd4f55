"""Sequences of one pass as a padded batch, and the gradient of what a model says to them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ortho_cli.decompose.settings import Calibrate
from ortho_cli.model.hooks import logit_gradient
from ortho_cli.model.scoring import pad
from ortho_cli.model.text import TokenSequence


class Batch(NamedTuple):
    """Tokens (n, length) int64, and by position whether one is there, and whether it counts."""

    tokens: Tensor
    there: Tensor
    counted: Tensor

    def to(self, device: torch.device) -> Batch:
        """Copy it to a device."""
        return Batch(*(one.to(device) for one in self))

    def part(self, start: int, stop: int) -> Batch:
        """Take some of its sequences."""
        return Batch(*(one[start:stop] for one in self))


def padded(sequences: Sequence[TokenSequence]) -> Batch:
    """Make a batch; a position counts where the next token is predicted.

    Padding follows the text: in a causal model no token before it depends on it.
    """
    tokens = pad([sequence.tokens for sequence in sequences])
    there, counted = torch.zeros(2, *tokens.shape, dtype=torch.bool)
    for i, sequence in enumerate(sequences):
        there[i, : len(sequence.tokens)] = True
        counted[i, sequence.counted - 1 : len(sequence.tokens) - 1] = True
    return Batch(tokens, there, counted)


def logit_gradients(
    settings: Calibrate, logits: Tensor, batch: Batch, first: int
) -> Iterator[tuple[Tensor, float]]:
    """Differentiate the NLL of each sequence of a batch by its logits.

    Args:
        settings: curvature true-fisher draws the labels of each sequence with a seed of its own.
        logits: (n, length, vocabulary), on the device of the batch.
        batch: of the same sequences.
        first: number of the first sequence in its set.
    Yields:
        for each sequence the gradient, in the shape and dtype of its logits, and the NLL of the
        data in nats.
    """
    for i, row in enumerate(logits.detach()):
        drawn = None
        if settings.curvature == "true-fisher":
            drawn = torch.Generator().manual_seed(settings.seed + first + i)
        yield logit_gradient(row, batch.tokens[i], batch.counted[i], generator=drawn)
