"""Sequences of one pass as a padded batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ortho_cli.model.scoring import pad
from ortho_cli.model.text import TokenSequence


class Batch(NamedTuple):
    """Tokens (n, length) int64, and by position whether one is there, and whether it counts."""

    tokens: Tensor
    there: Tensor
    counted: Tensor


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
