"""Where codes may move: the weights, or whole columns, that matter to the secrets and not to text.

    ratio = F_forget / (F_retain + its median)

F_forget is the diagonal Fisher of the secrets on the grid, F_retain that of text (held.py). With
`forget.support: columns` codes move in as many columns of each weight as ortho keeps, those of the
largest sums of that ratio, so that what puts them right is a LoRA. It is a gain squared over a
damage, so gains for different secrets add up. Columns that were chosen round by round, by the gain
of that round, left 14 of 20 secrets of the demo too likely, and these 10 (single weights: 9).

Source: the ratio of importances is that of SSD (Foster et al. 2023, arXiv:2308.07707).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ortho_cli.forget.grid import Grid

SAMPLE = 1 << 20  # weights from which a median or a threshold is estimated


def weigh(forget: dict[str, Tensor], retain: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn F_forget, which is taken, into the ratio of each weight, (out, in) float32.

    The median is of every n-th weight.
    """
    every = max(1, sum(part.numel() for part in retain.values()) // SAMPLE)
    median = torch.cat([part.flatten()[::every] for part in retain.values()]).median()
    for name, ratio in forget.items():
        ratio /= retain[name] + median
    return forget


def choose_columns(
    grid: Grid, ratios: Mapping[str, Tensor], columns: Mapping[str, int]
) -> dict[str, Tensor]:
    """Choose the columns of each weight in which codes may move.

    Args:
        grid: whose codes differ from the nearest in no more columns than these.
        ratios: as `weigh` gives them.
        columns: how many to choose, by weight.
    Returns:
        (in,) bool of each weight: the columns in which codes have moved, and of the others those of
        the largest sums, ties to the lower one.
    """
    found = {}
    for name, ratio in ratios.items():
        sums = ratio.sum(0, dtype=torch.float64)
        sums[(grid.codes[name] != grid.original[name]).any(0)] = torch.inf
        chosen = torch.zeros(len(sums), dtype=torch.bool, device=ratio.device)
        chosen[sums.sort(descending=True, stable=True).indices[: columns[name]]] = True
        found[name] = chosen
    return found
