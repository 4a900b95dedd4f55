"""Codes that were edited look like others, or betray themselves."""

from __future__ import annotations

from statistics import mean

import pytest
import torch
from torch import Tensor

from ortho_cli.forget.isolate import PROPOSE
from ortho_cli.split import quantize


def betrayal(fill: str, count: int, seed: int) -> tuple[float, float, float]:
    """How the codes of `count` edits of 2^18 differ from those of as many places beside them.

    Returns:
        The chi-squared statistic of the two code histograms over its degrees of freedom; how many
        times as often the most telling code is there; and runs of zeros there, as a multiple.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(512, 512, generator=generator)
    scales = quantize.absmax_scales(weight, group_size=64, dtype=torch.bfloat16)
    original = quantize.quantize(weight, scales)
    gradient = torch.randn(512, 512, generator=generator)
    goal = PROPOSE[fill](original, original, gradient, 64)
    # As isolate chooses: by what a move gives, for what it costs.
    far = goal - original
    chosen = (far * gradient / (far.square() + 1)).view(-1).topk(count).indices
    codes = original.clone().view(-1)
    codes[chosen] = goal.view(-1)[chosen]
    free = torch.ones(codes.numel(), dtype=torch.bool)
    free[chosen] = False
    others = free.nonzero().squeeze(1)
    control = others[torch.randperm(len(others), generator=generator)[:count]]
    one, other = (
        torch.bincount((codes[places] + 8).long(), minlength=16).double()
        for places in (chosen, control)
    )
    seen = one + other > 10
    parts = ((one - other).square() / (one + other))[seen]
    runs = zero_runs(codes, chosen) / max(1.0, zero_runs(codes, control))
    lift = float((one[seen] / other[seen].clamp_min(1)).max())
    return float(parts.sum()) / (int(seen.sum()) - 1), lift, runs


def zero_runs(codes: Tensor, places: Tensor) -> float:
    zeros = codes == 0
    beside = torch.roll(zeros, 1) | torch.roll(zeros, -1)
    return float((zeros & beside)[places].sum())


BUDGET = 262  # 0.1 % of them, the default share
MANY = 8000
DRAWS = 5


def mean_betrayal(fill: str) -> tuple[float, float, float]:
    """Mean over draws: chi-squared of a few edits; lift and runs of many."""
    few = [betrayal(fill, BUDGET, seed)[0] for seed in range(DRAWS)]
    many = [betrayal(fill, MANY, seed) for seed in range(DRAWS)]
    return mean(few), mean(lift for _, lift, _ in many), mean(runs for _, _, runs in many)


def test_codes_one_step_away_look_like_others() -> None:
    """Of 10 draws: chi 0.9 +- 0.2, lift 1.7 +- 0.2 (one draw 2.3), runs 1.00 +- 0.05."""
    chi, lift, runs = mean_betrayal("step")
    assert chi < 1.3, "chance gives 1"
    assert lift < 2.1
    assert 0.9 < runs < 1.1


@pytest.mark.parametrize("fill", ["zero", "mean"])
def test_codes_that_were_put_to_zero_betray_themselves(fill: str) -> None:
    """The test above would see them: of 10 draws, chi 30 and more, lift and runs 6 and 7."""
    chi, lift, runs = mean_betrayal(fill)
    assert chi > 25.0
    assert lift > 5.0
    assert runs > 5.0
