"""One density for the whole model, and a density for a size."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import reference
import torch
from checkpoints import save_statistics, weights
from conftest import PICO, save_pico
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ortho_cli.decompose import budget, recipe
from ortho_cli.decompose.budget import BINS, CENTRES, FINITE
from ortho_cli.decompose.plan import Plan, make_plan
from ortho_cli.errors import RecipeError
from ortho_cli.events import Event, Noted
from ortho_cli.formats.statistics import open_statistics
from ortho_cli.storage.checkpoint import open_checkpoint

GLOBAL = "ortho.budget=global"


def binned(saliency: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    return np.bincount(saliency.view(np.uint32) >> 16, minlength=BINS)


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, npt.NDArray[np.float32]]:
    """Saliencies of a few tensors: of very different size, tied, zero."""
    found = {}
    for name in "abcd"[: draw(st.integers(1, 4))]:
        generator = np.random.default_rng(draw(st.integers(0, 2**16)))
        values = generator.random(draw(st.integers(1, 60)), np.float32)
        values *= np.float32(10.0 ** draw(st.integers(-30, 5)))
        found[name] = np.round(values, 2) if draw(st.booleans()) else values
    return found


@settings(max_examples=200)
@given(tensors(), st.floats(0, 1))
def test_spend_keeps_the_largest_of_all(
    found: dict[str, npt.NDArray[np.float32]], share: float
) -> None:
    everything = np.sort(np.concatenate(list(found.values())))[::-1]
    total = round(share * everything.size)
    kept = budget.spend({name: binned(values) for name, values in found.items()}, total)
    assert sum(kept.values()) == total
    assert all(0 <= kept[name] <= values.size for name, values in found.items())
    # Every tensor keeps its own largest: nothing that is left beats what is kept by more than 1 %.
    least = [np.sort(values)[::-1][kept[n] - 1] for n, values in found.items() if kept[n]]
    most = [np.sort(values)[::-1][kept[n]] for n, values in found.items() if kept[n] < values.size]
    if least and most:
        assert max(most) <= 1.01 * min(least) + 1e-38


@settings(max_examples=100)
@given(tensors(), st.floats(0, 1))
def test_left_is_what_is_not_kept(found: dict[str, npt.NDArray[np.float32]], share: float) -> None:
    kept = {name: round(share * values.size) for name, values in found.items()}
    told = budget.left({name: binned(values) for name, values in found.items()}, kept)
    true = sum(
        float(np.square(np.sort(values)[::-1][kept[name] :], dtype=np.float64).sum())
        for name, values in found.items()
    )
    assert told == pytest.approx(true, rel=0.02, abs=1e-70)


def test_centres_lie_inside_their_bins() -> None:
    low = (np.arange(FINITE + 1, dtype=np.uint32) << 16).view(np.float32).astype(np.float64)
    assert (low[:-1] < CENTRES).all()
    assert (low[1:] > CENTRES).all()
    assert binned(CENTRES.astype(np.float32)).tolist() == [1] * FINITE + [0] * (BINS - FINITE)


@pytest.fixture
def measured(pico: Path, tmp_path: Path) -> Path:
    return measure(pico, tmp_path / "stats.safetensors")


def measure(source: Path, stats: Path, *, seed: int = 0) -> Path:
    """Write statistics in which the second layer matters 30 times as much as the first."""

    def differ(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if "layers.1." in name:
                tensor.mul_(30)

    save_statistics(stats, source, change=differ, seed=seed)
    return stats


def plan_of(source: Path, stats: Path, *sets: str) -> Plan:
    found = open_statistics(stats)
    return make_plan(open_checkpoint(source), recipe.load_recipe(None, sets), statistics=found)


def saliencies(plan: Plan, pico_tensors: dict[str, torch.Tensor], stats: Path) -> dict[str, Any]:
    curvature = load_file(stats)
    found = {}
    for tensor in plan.split:
        weight = pico_tensors[tensor.name]
        near = curvature[tensor.name.replace(".weight", ".retain_curvature")].float()
        scales = reference.absmax_scales(weight, plan.group_size, weight.dtype)
        back = reference.dequantize(reference.quantize(weight.float(), scales), scales)
        found[tensor.name] = ((back - weight.float()).double().square() * near.double()).flatten()
    return found


def test_settle_keeps_what_one_threshold_over_all_tensors_keeps(
    pico: Path, measured: Path, pico_tensors: dict[str, torch.Tensor]
) -> None:
    plan = plan_of(pico, measured, GLOBAL, "ortho.density=0.02")
    assert {tensor.density for tensor in plan.split} == {0.02}
    settled = budget.settle(plan, open_checkpoint(pico))
    total = sum(tensor.k for tensor in plan.split)
    assert sum(tensor.k for tensor in settled.split) == total
    assert settled.sha256 != plan.sha256
    assert budget.settle(settled, open_checkpoint(pico)) is settled
    found = saliencies(plan, pico_tensors, measured)
    bar = torch.cat(list(found.values())).topk(total).values[-1]
    for tensor in settled.split:
        assert tensor.k == pytest.approx(int((found[tensor.name] >= bar).sum()), abs=8)
    assert len({tensor.density for tensor in settled.split}) > 3


def test_global_budget_loses_less_than_one_density_for_each(tmp_path: Path, ortho: Any) -> None:
    """Of 8 models, 0.676 +- 0.012 of the error was left."""
    ratios = []
    for seed in range(3):
        source = save_pico(tmp_path / f"{seed}", weights(**PICO, kv=32, seed=seed))
        stats = measure(source, tmp_path / f"{seed}.safetensors", seed=seed)
        lost, nnz = {}, {}
        for kind in ("per-tensor", "global"):
            out = tmp_path / f"{seed}-{kind}"
            told = ortho(
                *("decompose", source, "-o", out, "--stats", stats, "--json"),
                *("--set", f"ortho.budget={kind}", "--set", "ortho.density=0.02"),
            ).json["totals"]
            lost[kind], nnz[kind] = told["curvature_error_alpha_1"], told["nnz"]
            assert ortho("inspect", out, "--verify", "-q").code == 0
        assert nnz["global"] == nnz["per-tensor"]
        ratios.append(lost["global"] / lost["per-tensor"])
    assert mean(ratios) < 0.72


def test_overrides_keep_their_density_under_a_global_budget(pico: Path, measured: Path) -> None:
    override = "overrides=[{match: '*.k_proj.weight', ortho: {density: 0.11}}]"
    plan = plan_of(pico, measured, GLOBAL, "ortho.density=0.02", override)
    settled = budget.settle(plan, open_checkpoint(pico))
    for tensor, before in zip(settled.split, plan.split, strict=True):
        if tensor.name.endswith("k_proj.weight"):
            assert tensor.k == before.k == round(0.11 * tensor.source.numel)
    assert sum(t.k for t in settled.split) == sum(t.k for t in plan.split)


def test_global_budget_gives_the_same_bytes_again_and_for_any_workers(
    pico: Path, measured: Path, ortho: Any
) -> None:
    written = []
    for workers in (1, 3):
        out = pico.parent / f"out{workers}"
        more = ("--stats", measured, "--set", GLOBAL, "--workers", workers, "-q")
        assert ortho("decompose", pico, "-o", out, *more).code == 0
        written.append((out / "ortho.safetensors").read_bytes())
    assert written[0] == written[1]


@pytest.mark.parametrize(
    ("sets", "wrong"),
    [
        ((), "saliency.kind is residual"),
        (("ortho.split=reference",), "ortho.split is reference"),
    ],
)
def test_global_budget_that_means_nothing_is_refused(
    pico: Path, ortho: Any, sets: tuple[str, ...], wrong: str
) -> None:
    more = [word for one in (GLOBAL, *sets) for word in ("--set", one)]
    told = ortho("decompose", pico, "--dry-run", *more)
    assert told.code == 3
    assert wrong in told.err


@pytest.mark.parametrize("kind", ["per-tensor", "global"])
@pytest.mark.parametrize("target", [4.8, 6.0])
def test_meet_picks_what_fits_and_loses_least(
    pico: Path, measured: Path, kind: str, target: float
) -> None:
    events: list[Event] = []
    opened = open_checkpoint(pico)
    asked = plan_of(pico, measured, f"ortho.budget={kind}")
    plan = budget.meet(asked, opened, target, on_event=events.append)
    taken = budget.expected_bits(plan)
    assert taken <= target < taken + 0.01
    said = [event.message for event in events if isinstance(event, Noted)]
    assert len(said) == 1
    assert f"group size {plan.group_size}" in said[0]
    lost = {}
    for size in (32, 64):
        alone = plan_of(pico, measured, f"ortho.budget={kind}", f"base.group_size={size}")
        try:
            other = budget.meet(alone, opened, target)
        except RecipeError:
            continue  # base alone takes more
        surveyed = budget.survey(other, opened).counts
        lost[size] = budget.left(surveyed, {tensor.name: tensor.k for tensor in other.split})
    assert plan.group_size == min(lost, key=lambda size: lost[size])


@pytest.mark.parametrize("values", ["source", "int8"])
@pytest.mark.parametrize("density", [0.001, 0.01, 0.1])
def test_expected_bits_of_compact_ortho_are_a_little_more_than_it_takes(
    tmp_path: Path, ortho: Any, values: str, density: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 1024, generator=generator).bfloat16()
    save_file({"a.weight": weight}, tmp_path / "model.safetensors")
    sets = (f"ortho.density={density}", "ortho.layout=compact", f"ortho.values={values}")
    more = [word for one in sets for word in ("--set", one)]
    told = ortho(
        "decompose", tmp_path / "model.safetensors", "-o", tmp_path / "out", "--json", *more
    )
    opened = open_checkpoint(tmp_path / "model.safetensors")
    expected = budget.expected_bits(make_plan(opened, recipe.load_recipe(None, sets)))
    assert expected - 0.03 < told.json["totals"]["split_bits_per_weight"] <= expected


def test_target_bits_from_the_command_line(pico: Path, measured: Path, ortho: Any) -> None:
    out = pico.parent / "out"
    told = ortho("decompose", pico, "-o", out, "--stats", measured, "--target-bits", 5.6, "--json")
    assert told.code == 0
    assert 5.58 < told.json["totals"]["split_bits_per_weight"] <= 5.6
    assert "stays within 5.6 bits" in told.err
    assert told.json["recipe"]["base"]["group_size"] in (32, 64, 128)
    for more, wrong in (
        (("--target-bits", 5.6, "--set", "ortho.density=0.1"), "ortho.density is 0.1"),
        (("--target-bits", 3.9), "less than base alone takes"),
        (("--target-bits", "nan"), "less than base alone takes"),
    ):
        told = ortho("decompose", pico, "--stats", measured, "--dry-run", *more)
        assert told.code == 3, told.err
        assert wrong in told.err
