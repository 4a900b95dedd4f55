"""A public model beside base: positions that it tells, soups with it, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from torch import Tensor, nn

from ortho_cli.bench import attacks, baselines, public
from ortho_cli.bench.public import Public
from ortho_cli.errors import UsageError
from ortho_cli.runtime.engine import densify
from ortho_cli.split import quantize
from tests.bench.test_attacks import (
    absmax_scales,
    edit,
    layers,
    projections,
    secrets,
    split,
    state,
    target,
)
from tests.model.test_scoring import llama

pytestmark = pytest.mark.filterwarnings("ignore")  # other people's deprecations


def grid(bits: int = 4) -> tuple[Tensor, Public]:
    """A source's weight, and a public one near it on the source's grid."""
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(12, 64, generator=generator)
    scales = quantize.absmax_scales(source, group_size=32, dtype=torch.float32, bits=bits)
    moved = 1.4 * source + 0.05 * torch.randn(12, 64, generator=generator)
    return source, Public(moved, scales, bits)


@pytest.mark.parametrize("bits", [3, 4])
def test_clamped_weights_are_the_nearest_to_the_public_ones_with_the_same_codes(bits: int) -> None:
    source, beside = grid(bits)
    codes = quantize.quantize(source, beside.scales, bits=bits)
    found = public.clamp_to_codes(source, beside)
    width = beside.scales.repeat_interleave(32, 1)
    lowest, highest = quantize.code_range(bits)
    for code, place, was in zip(
        codes.flatten(), (found / width).flatten(), (beside.weight / width).flatten(), strict=True
    ):
        low = -1e9 if code == lowest else float(code) - 0.5
        high = 1e9 if code == highest else float(code) + 0.5
        assert float(place) == pytest.approx(min(max(float(was), low), high), abs=1e-5)
    assert (found != beside.weight).any()
    assert (found == beside.weight).any()
    on_grid = quantize.dequantize(codes, beside.scales)
    assert torch.equal(public.clamp_to_codes(on_grid, beside), found)


def naive(scores: list[int], moved: list[bool]) -> tuple[float, float, float, float]:
    """AUC, and precision and recall of every threshold, by counting pairs."""
    yes = [s for s, m in zip(scores, moved, strict=True) if m]
    no = [s for s, m in zip(scores, moved, strict=True) if not m]
    area = sum((a > b) + (a == b) / 2 for a in yes for b in no) / (len(yes) * len(no))
    curve = []
    for bar in set(scores):
        hits = sum(s >= bar for s in yes)
        curve.append((hits / sum(s >= bar for s in scores), hits / len(yes)))
    at = [max(p for p, r in curve if r >= least) for least in (0.5, 0.75)]
    return area, *at, max((r for p, r in curve if p >= 0.8), default=0.0)


@pytest.mark.parametrize("shift", [0, 4, 40])
def test_positions_are_those_of_counting_every_pair(shift: int) -> None:
    generator = torch.Generator().manual_seed(shift)
    kept = torch.randint(0, 60, (90,), generator=generator)
    gone = torch.randint(0, 60, (13,), generator=generator) + shift
    counts = torch.stack([torch.bincount(one, minlength=128) for one in (kept, gone)])
    found = public.tell_positions(counts)
    area, half, most, sure = naive([*kept.tolist(), *gone.tolist()], [False] * 90 + [True] * 13)
    assert found.value == pytest.approx(area)
    assert found.precision_at_recall_50 == pytest.approx(half)
    assert found.precision_at_recall_75 == pytest.approx(most)
    assert found.recall_at_precision_80 == pytest.approx(sure)
    assert (found.moved, found.weights) == (13, 103)


def test_differences_are_of_moved_codes_and_of_others_by_their_distance_in_spacings() -> None:
    model = split(torch.float32)
    name, layer = next(iter(layers(model).items()))
    edit(layer, count=7)
    codes, own = baselines.base_codes(layer), baselines.int4_codes(layer)
    beside = Public(reference.dequantize(own, layer.weight_scale), layer.weight_scale, layer.bits)
    counts = public.count_differences(layer, beside)
    assert counts.sum(1).tolist() == [codes.numel() - 7, 7]
    assert counts[0, 0] == codes.numel() - 7
    assert counts[1, public.BINS - 8 : public.BINS + 8].sum() == 7
    found = public.tell_positions(counts)
    assert found.value == found.precision_at_recall_75 == found.recall_at_precision_80 == 1.0
    assert name in layers(model)


def opened(folder: Path, model: nn.Module) -> Any:
    replaced = densify(model)
    return public.open_public(folder, model, replaced), replaced


def saved(folder: Path, **changes: int) -> Path:
    """Write a small Llama with other sizes."""
    from transformers import LlamaForCausalLM

    config = llama().config
    for name, value in changes.items():
        setattr(config, name, value)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def at_zero() -> Any:
    model = split()
    for layer in layers(model).values():
        layer.alpha = 0.0
    return model


def test_a_public_model_of_other_words_is_opened_and_one_of_other_shape_is_refused(
    tmp_path: Path,
) -> None:
    found, replaced = opened(saved(tmp_path / "more", vocab_size=128), at_zero())
    assert found.keys() == replaced.keys()
    wide = llama().config.intermediate_size + 64
    with pytest.raises(UsageError, match=r"`model.layers.0.mlp.\w+.weight` is \[.*\] in .*other"):
        opened(saved(tmp_path / "other", intermediate_size=wide), at_zero())
    deep = llama().config.num_hidden_layers + 1
    with pytest.raises(UsageError, match=r"`model.layers.\d.\S+weight` is in .*deep` and not in"):
        opened(saved(tmp_path / "deep", num_hidden_layers=deep), at_zero())


def test_soups_lie_between_both_models_and_restore(monkeypatch: pytest.MonkeyPatch) -> None:
    model, listed = llama(), secrets()
    names = projections(model)
    weights = {name: model.get_submodule(name).get_parameter("weight") for name in names}
    beside = {}
    for name, weight in weights.items():
        scales = absmax_scales(weight)
        beside[name] = Public(weight.detach() * 3, scales, 4)
    seen: list[Tensor] = []

    def look(*_: Any) -> Any:
        seen.append(weights[names[0]].detach().clone())
        return attacks.Recall(exposure=0.0, extraction=0.0, token_accuracy=0.0, secrets=1)

    monkeypatch.setattr(attacks, "recall", look)
    before = state(model)
    goal = target(model, listed, linears=names, public=beside)
    assert list(attacks.mix_public(goal)) == ["public_25", "public_50", "public_75", "clamped"]
    for share, mixed in zip((0.25, 0.5, 0.75), seen, strict=False):
        torch.testing.assert_close(mixed, before[f"{names[0]}.weight"] * (1 + 2 * share))
    clamped = public.clamp_to_codes(before[f"{names[0]}.weight"], beside[names[0]])
    assert torch.equal(seen[3], clamped)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert attacks.mix_public(dataclasses.replace(goal, public=None)) == {}
