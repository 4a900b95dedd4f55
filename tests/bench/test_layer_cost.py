"""What each layer costs: KL to the original with that layer's weights alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from ortho_cli.bench.layer_cost import cost_by_layer
from ortho_cli.errors import UsageError
from ortho_cli.model import scoring
from tests.model.test_scoring import VOCAB, llama

pytestmark = pytest.mark.filterwarnings("ignore")  # other people's deprecations
WINDOWS = torch.randint(3, VOCAB, (3, 24), generator=torch.Generator().manual_seed(0))


def noisy(model: nn.Module, *, layers: tuple[int, ...]) -> tuple[nn.Module, list[str]]:
    """Copy a model with other weights in some layers; give the names of all its Linears, too."""
    made, generator = copy.deepcopy(model), torch.Generator().manual_seed(1)
    linears = [
        name
        for name, child in made.named_modules()
        if isinstance(child, nn.Linear) and name != "lm_head"
    ]
    with torch.no_grad():
        for name in linears:
            if any(f"layers.{layer}." in name for layer in layers):
                weight = made.get_submodule(name).get_parameter("weight")
                weight += 0.02 * torch.randn(weight.shape, generator=generator)
    return made, linears


def kl(model: nn.Module, original: nn.Module, windows: Tensor = WINDOWS) -> float:
    beside = scoring.compare_windows(model, windows, original).beside
    assert beside is not None
    return float(beside.kl.double().mean())


def test_each_layer_costs_what_the_original_loses_with_it_alone() -> None:
    original = llama()
    both, linears = noisy(original, layers=(0, 1))
    before = {name: id(child) for name, child in original.named_modules()}
    costs = cost_by_layer(both, original, linears, WINDOWS)
    assert list(costs) == ["model.layers.0", "model.layers.1"]
    for layer in (0, 1):
        alone = copy.deepcopy(original)
        alone.model.layers[layer] = copy.deepcopy(both.model.layers[layer])
        assert costs[f"model.layers.{layer}"].value == pytest.approx(kl(alone, original), rel=1e-5)
        assert costs[f"model.layers.{layer}"].n == WINDOWS.numel() - len(WINDOWS)
    assert {name: id(child) for name, child in original.named_modules()} == before
    untouched, _ = noisy(original, layers=(1,))
    costs = cost_by_layer(untouched, original, linears, WINDOWS)
    assert costs["model.layers.0"].value == 0.0
    assert costs["model.layers.1"].value > 0.0


def test_no_more_text_is_read_than_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = llama()
    model, linears = noisy(original, layers=(0, 1))
    monkeypatch.setattr("ortho_cli.bench.layer_cost.TOKENS", 50)
    few = cost_by_layer(model, original, linears, WINDOWS)
    assert few == cost_by_layer(model, original, linears, WINDOWS[:2])


def test_another_model_is_refused_by_name() -> None:
    original = llama()
    model, linears = noisy(original, layers=())
    with pytest.raises(UsageError, match=r"`model\.layers\.0\.mlp\.down_proj` is \[64, 128\]"):
        cost_by_layer(model, llama_of(hidden=96), linears, WINDOWS)
    del original.model.layers[1].mlp.gate_proj
    with pytest.raises(UsageError, match="and --model has no such weight"):
        cost_by_layer(model, original, linears, WINDOWS)


def llama_of(hidden: int) -> nn.Module:
    model = llama()
    for layer in model.model.layers:
        layer.mlp.down_proj = nn.Linear(hidden, 64, bias=False)
    return model  # type: ignore[no-any-return]
