"""Distance from INT4 and the loss on the line to it."""

from __future__ import annotations

import math

import pytest
import torch

from ortho_cli.bench import baselines, predictors
from ortho_cli.model import scoring
from ortho_cli.runtime.engine import densify, write_dense
from tests.bench.test_attacks import edit, layers, split, state
from tests.model.test_scoring import VOCAB

pytestmark = pytest.mark.filterwarnings("ignore")  # other people's deprecations


def test_barrier_is_the_largest_rise_above_the_line_between_the_ends() -> None:
    assert predictors.barrier([1.0, 1.5, 3.0, 2.5, 3.0]) == 1.0
    assert predictors.barrier([1.0, 1.5, 2.0, 2.5, 3.0]) == 0.0
    assert predictors.barrier([3.0, 1.0, 1.0, 1.0, 1.0]) == 0.0
    assert predictors.barrier([0.0, 2.0, 1.0, 0.5, 4.0]) == 1.0


def test_distance_is_of_all_moved_codes_and_the_line_ends_at_both_models() -> None:
    model = split(torch.float32)
    for layer in layers(model).values():
        edit(layer, count=40)
        layer.alpha = 0.0
    replaced = densify(model)
    apart = whole = 0.0
    for layer in replaced.values():
        base, own = baselines.base_codes(layer), baselines.int4_codes(layer)
        for codes, other, row in zip(base, own, layer.weight_scale, strict=True):
            each = row.repeat_interleave(layer.group_size)
            apart += float(((codes.float() - other.float()) * each).square().sum())
            whole += float((other.float() * each).square().sum())
    found = predictors.distance(replaced).value
    assert found == pytest.approx(math.sqrt(apart / whole), rel=1e-5)
    assert found > 0
    windows = torch.randint(0, VOCAB, (3, 16), generator=torch.Generator().manual_seed(0))
    before = state(model)
    line = predictors.connectivity(model, replaced, windows)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    here = float(scoring.compare_windows(model, windows).nll.double().mean())
    assert line.nlls[-1] == here
    for name, layer in replaced.items():
        weight = model.get_submodule(name).get_parameter("weight")
        with torch.no_grad():
            weight.copy_(baselines.dequantized(layer, baselines.int4_codes(layer)))
    assert line.nlls[0] == float(scoring.compare_windows(model, windows).nll.double().mean())
    write_dense(model, replaced, 0.0)
    many = windows.repeat(300, 1)
    many[256:] = 0
    assert predictors.connectivity(model, replaced, many).nlls[-1] != pytest.approx(
        float(scoring.compare_windows(model, many).nll.double().mean())
    )
    assert len(line.nlls) == 5
    assert line.value == predictors.barrier(line.nlls)
