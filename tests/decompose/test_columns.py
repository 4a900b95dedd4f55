"""Whole columns: what a run writes, under a budget, shared, rounded to int8, killed and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import reference
import torch
from conftest import Ortho
from jobs import decompose
from safetensors.torch import load_file, save_file
from torch import Tensor

from ortho_cli.decompose import budget, recipe
from ortho_cli.decompose.plan import Plan, make_plan
from ortho_cli.decompose.survey import load_surveys
from ortho_cli.errors import Interrupted, OrthoError, RecipeError
from ortho_cli.events import Event, Noted, TensorDone
from ortho_cli.formats.open_artifact import open_artifact
from ortho_cli.formats.row_blocks import count_row_blocks
from ortho_cli.formats.statistics import open_statistics
from ortho_cli.formats.verify import verify
from ortho_cli.split import quantize
from ortho_cli.storage import job
from ortho_cli.storage.checkpoint import open_checkpoint
from tests.split.test_numba_kernel import check_alike, files, odd_weights

COLUMNS = "ortho={structure: columns, density: 0.05}"
SHARED = (COLUMNS, "ortho.share=true")
GLOBAL = (COLUMNS, "ortho.budget=global")
BOTH = (*GLOBAL, "ortho.share=true")
INT8 = (COLUMNS, "ortho.values=int8")
SIBLINGS = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")


@pytest.fixture
def stats(pico: Path, tmp_path: Path) -> Path:
    """Curvature by which some columns, and one layer, count for more than others."""

    def differ(stored: dict[str, Tensor]) -> None:
        for number, (name, tensor) in enumerate(sorted(stored.items())):
            if not name.endswith("gram"):
                tensor[..., number % 7 :: 11] *= 20
                tensor.mul_(30 if "layers.1." in name else 1)

    path = tmp_path / "stats.safetensors"
    checkpoints.save_statistics(path, pico, change=differ, gram="none")
    return path


def plan_of(source: Path, stats: Path | None, *sets: str, **options: Any) -> Plan:
    found = open_statistics(stats) if stats else None
    settings = recipe.load_recipe(None, sets)
    return make_plan(open_checkpoint(source), settings, statistics=found, **options)


def run(source: Path, out: Path, *sets: str, stats: Path | None = None, **options: Any) -> Plan:
    """Decompose, by way of a survey where one is needed; give the plan that was carried out."""
    opened = open_checkpoint(source)
    plan = budget.settle(plan_of(source, stats, *sets), opened)
    decompose(plan, opened, out, **options)
    return plan


def saliencies(source: Path, out: Path, stats: Path | None) -> dict[str, Tensor]:
    """|r| sqrt(h) of each split weight by the codes and scales that were written."""
    weights, base = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    curvature = load_file(stats) if stats else {}
    found = {}
    for key, packed in base.items():
        if not key.endswith(".weight_packed"):
            continue
        module = key.removesuffix(".weight_packed")
        codes = reference.unpack_codes(packed, bits=4)
        held = reference.dequantize(codes, base[f"{module}.weight_scale"])
        lost = (held - weights[f"{module}.weight"].float()).abs()
        if stats:
            near = curvature[f"{module}.retain_curvature"].float()
            lost = lost * torch.from_numpy(np.sqrt(near.numpy()))
        found[module] = lost
    return found


def columns(out: Path) -> dict[str, list[int]]:
    """The columns that ortho holds, by module."""
    ortho = load_file(out / "ortho.safetensors")
    suffix = ".col_indices"
    return {k.removesuffix(suffix): v.tolist() for k, v in ortho.items() if k.endswith(suffix)}


def check_exact(source: Path, out: Path) -> None:
    """Ortho holds the source's weights of its columns, bit for bit."""
    weights, ortho = load_file(source / "model.safetensors"), load_file(out / "ortho.safetensors")
    for module, chosen in columns(out).items():
        assert torch.equal(ortho[f"{module}.values"], weights[f"{module}.weight"][:, chosen])


@pytest.mark.parametrize("curved", [False, True])
def test_what_is_written_equals_the_slow_twin(
    pico: Path, stats: Path, tmp_path: Path, curved: bool
) -> None:
    out, given = tmp_path / "out", stats if curved else None
    run(pico, out, COLUMNS, stats=given)
    check_exact(pico, out)
    for module, saliency in saliencies(pico, out, given).items():
        count = round(0.05 * saliency.shape[1])
        assert columns(out)[module] == reference.column_indices(saliency, count)
    assert set(verify(open_artifact(out)).checked.values()) == {"every digest"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("density", [0.0, 0.03, 1.0])
@pytest.mark.parametrize("scale", ["absmax", "mse"])
def test_loops_give_the_bytes_that_torch_gives(
    tmp_path: Path, dtype: torch.dtype, density: float, scale: str
) -> None:
    pytest.importorskip("numba")
    save_file({"a.weight": odd_weights(dtype)}, tmp_path / "m.safetensors")
    sets = (f"ortho={{structure: columns, density: {density}}}", f"base.scale={scale}")
    check_alike(tmp_path / "m.safetensors", tmp_path, *sets)


@pytest.mark.parametrize(
    "sets", [(COLUMNS,), SHARED, INT8, (*GLOBAL, "base.scale=curvature"), BOTH]
)
def test_any_workers_and_a_killed_run_give_the_same_bytes(
    pico: Path, stats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sets: tuple[str, ...]
) -> None:
    monkeypatch.setattr(job, "COMMIT_SECONDS", 0.0)
    source, done = open_checkpoint(pico), 0

    def stop(event: Event) -> None:
        nonlocal done
        done += isinstance(event, TensorDone)
        if done == 9:
            raise KeyboardInterrupt

    for name, workers in (("one", 1), ("two", 2)):
        plan = budget.settle(plan_of(pico, stats, *sets, workers=workers), source)
        decompose(plan, source, tmp_path / name)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    plan = budget.settle(plan_of(pico, stats, *sets), source)
    with pytest.raises(Interrupted):
        decompose(plan, source, tmp_path / "cut", on_event=stop)
    known, said = load_surveys(tmp_path / "cut"), []
    assert bool(known) == bool(plan.surveys)
    again = budget.settle(plan_of(pico, stats, *sets), source, known=known, on_event=said.append)
    assert not any(isinstance(event, Noted) for event in said), "it surveyed again"
    decompose(again, source, tmp_path / "cut")
    assert files(tmp_path / "cut") == files(tmp_path / "one")


def test_a_global_budget_keeps_the_columns_of_the_most_saliency_per_weight(
    pico: Path, stats: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    plan = run(pico, out, *GLOBAL, stats=stats)
    asked = plan_of(pico, stats, COLUMNS)
    total = sum(tensor.k for tensor in asked.split)
    kept = sum(tensor.k for tensor in plan.split)
    assert total - max(tensor.shape[0] for tensor in plan.split) < kept <= total
    worth, least, best = {}, [], []
    for module, saliency in saliencies(pico, out, stats).items():
        worth[module] = saliency.double().square().mean(0).sqrt()
        chosen = columns(out)[module]
        assert chosen == reference.column_indices(saliency, len(chosen))
        left = torch.ones(len(worth[module]), dtype=torch.bool)
        left[chosen] = False
        least += [float(worth[module][chosen].min())] if chosen else []
        best.append(float(worth[module][left].max()))
    assert max(best) <= min(least) * 1.01  # a bin of the survey is 0.8 % wide
    counts = {len(chosen) / len(worth[module]) for module, chosen in columns(out).items()}
    assert len(counts) > 2, "the budget spends as if it were one per tensor"


def test_no_weight_has_more_columns_than_the_rank_and_others_get_them(
    pico: Path, stats: Path, tmp_path: Path
) -> None:
    free = run(pico, tmp_path / "free", *GLOBAL, stats=stats)
    bound = run(pico, tmp_path / "bound", *GLOBAL, "ortho.max_rank=5", stats=stats)
    assert max(tensor.columns or 0 for tensor in free.split) > 5
    assert max(tensor.columns or 0 for tensor in bound.split) == 5
    asked = sum(tensor.k for tensor in plan_of(pico, None, COLUMNS).split)
    for plan in (free, bound):
        assert 0.95 * asked < sum(tensor.k for tensor in plan.split) <= asked
    few = plan_of(pico, None, "ortho={structure: columns, density: 0.5, max_rank: 2}")
    assert {tensor.columns for tensor in few.split} == {2}


@pytest.mark.parametrize("sets", [SHARED, BOTH, (*BOTH, "ortho.max_rank=4")])
def test_siblings_share_the_columns_of_the_most_saliency_of_all_of_them(
    pico: Path, stats: Path, tmp_path: Path, sets: tuple[str, ...]
) -> None:
    out, alone = tmp_path / "out", tmp_path / "alone"
    run(pico, out, *sets, stats=stats)
    run(pico, alone, COLUMNS, stats=stats)
    check_exact(pico, out)
    found, lost, differ = columns(out), saliencies(pico, out, stats), 0
    for layer in (0, 1):
        for group in SIBLINGS:
            block = "mlp" if "up_proj" in group else "self_attn"
            names = [f"model.layers.{layer}.{block}.{leaf}" for leaf in group]
            together = torch.cat([lost[name] for name in names])
            expected = reference.column_indices(together, len(found[names[0]]))
            assert [found[name] for name in names] == [expected] * len(names)
            differ += any(columns(alone)[name] != expected for name in names)
    assert differ, "they would have had the same columns anyway"


def test_siblings_of_different_densities_share_nothing(pico: Path) -> None:
    more = "overrides=[{match: '*.q_proj.weight', ortho: {density: 0.2}}]"
    with pytest.raises(RecipeError, match=r"of 64 columns where `.*_proj\.weight` keeps"):
        plan_of(pico, None, *SHARED, more)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_int8_values_and_figures_equal_the_slow_twin(tmp_path: Path, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = 0.02 * torch.randn(40, 64, generator=generator)
    weight[:, 5::9] *= 8
    weight[:, 5] = 0.0
    checkpoints.save(tmp_path / "m", {"a.weight": weight.to(dtype)})
    sets = ("ortho={structure: columns, density: 0.2, values: int8}", "base.group_size=32")
    plan = plan_of(tmp_path / "m", None, *sets)
    report = decompose(plan, open_checkpoint(tmp_path / "m"), tmp_path / "out")
    base, ortho = (load_file(tmp_path / "out" / f"{f}.safetensors") for f in ("model", "ortho"))
    chosen = ortho["a.col_indices"].tolist()
    held = quantize.dequantize(
        quantize.unpack_int4(base["a.weight_packed"]), base["a.weight_scale"]
    )
    source = weight.to(dtype).float()
    codes, scales, back = reference.int8_columns(
        source[:, chosen].tolist(), held[:, chosen].tolist(), dtype
    )
    assert ortho["a.values"].tolist() == codes
    assert ortho["a.value_scales"].dtype == dtype
    assert ortho["a.value_scales"].float().tolist() == scales
    restored = held.clone()
    restored[:, chosen] = torch.tensor(back)
    assert torch.equal(reference.dense(base, ortho, "a", 1.0), restored)
    told = report["tensors"][0]
    for alpha, weights in ((0, held), (1, restored)):
        expected = reference.decibels(source, weights)
        assert told[f"sqnr_db_alpha_{alpha}"] == pytest.approx(expected, abs=2e-3)
    assert report["totals"]["ortho_bytes"] == plan.ortho_bytes


@pytest.mark.parametrize("sets", [(COLUMNS,), INT8, ("ortho={structure: columns, density: 0}",)])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_dense_weights_at_each_alpha_equal_the_slow_twin(
    pico: Path, tmp_path: Path, ortho: Ortho, sets: tuple[str, ...], alpha: float
) -> None:
    out, back = tmp_path / "out", tmp_path / "back"
    run(pico, out, *sets)
    assert ortho("convert", out, "--alpha", alpha, "-o", back, "-q").code == 0
    dense = load_file(back / "model.safetensors")
    base, held = (load_file(out / f"{name}.safetensors") for name in ("model", "ortho"))
    for module in columns(out):
        expected = reference.dense(base, held, module, alpha)
        assert torch.equal(dense[f"{module}.weight"], expected.bfloat16())


@pytest.mark.parametrize("sets", [(COLUMNS,), INT8])
def test_the_plan_knows_every_byte_before_a_weight_is_read(
    pico: Path, tmp_path: Path, ortho: Ortho, sets: tuple[str, ...]
) -> None:
    words = [word for one in sets for word in ("--set", one)]
    dry = ortho("decompose", pico, "--dry-run", "--json", *words).json
    assert ortho("decompose", pico, "-o", tmp_path / "out", "-q", *words).code == 0
    written = open_artifact(tmp_path / "out").ortho
    assert written is not None
    sizes = {file["name"]: file["size"] for file in dry["files"]}
    assert sizes["ortho.safetensors"] == written.size
    planned = {
        key: (region["offset"], region["nbytes"])
        for tensor in dry["tensors"]
        for key, region in tensor["ortho"].items()
    }
    assert planned == {one.name: (one.offset, one.nbytes) for one in written.tensors}


def test_inspect_and_the_source_agree_on_columns(pico: Path, tmp_path: Path, ortho: Ortho) -> None:
    for sets in ((COLUMNS,), INT8):
        out = tmp_path / f"out{len(sets)}"
        run(pico, out, *sets)
        ran = ortho("inspect", out, "--verify", "--expect-source", pico)
        assert ran.code == 0, ran.err
        rows = ortho("inspect", out, "--json").json["tensors"]
        split = {row["name"]: row for row in rows if row["action"] == "split"}
        for module, chosen in columns(out).items():
            row = split[f"{module}.weight"]
            assert (row["columns"], row["nnz"]) == (len(chosen), len(chosen) * row["shape"][0])
        assert ortho("inspect", out, "--html", out.with_suffix(".html")).code == 0
        for module, shares in count_row_blocks(open_artifact(out)).items():
            width = split[f"{module}.weight"]["shape"][1]
            assert shares == pytest.approx([len(columns(out)[module]) / width] * len(shares))
        assert "whole input columns: a LoRA" in (out / "README.md").read_text()
        (out / "report.json").unlink()
        bare = ortho("inspect", out, "--json").json["tensors"]
        assert {row["name"]: row.get("columns") for row in bare if row["action"] == "split"} == {
            name: row["columns"] for name, row in split.items()
        }


def test_a_weight_that_is_not_the_sources_is_found(
    pico: Path, tmp_path: Path, ortho: Ortho, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check that a run makes of what it wrote reads columns, too."""
    from ortho_cli.split import pipeline

    read = pipeline._read_columns

    def wrong(*arguments: Any) -> Any:
        values = read(*arguments).copy()
        values[:1] ^= 64
        return values

    monkeypatch.setattr(pipeline, "_read_columns", wrong)
    with pytest.raises(OrthoError, match="which is not the source's weight"):
        run(pico, tmp_path / "out", COLUMNS)


@pytest.mark.parametrize(
    ("sets", "message", "hint"),
    [
        ("ortho.max_rank=3", "ortho.max_rank is 3, and ortho.structure is points", "=columns"),
        ("ortho.share=true", "ortho.share is true, and ortho.structure is points", "=columns"),
        (
            "ortho={structure: columns, layout: compact}",
            "ortho.structure is columns, and ortho.layout is compact",
            "--set ortho.layout=null",
        ),
        ("ortho.values=int8", "ortho.values is int8, and ortho.layout is csr", "to columns"),
        (
            "ortho={structure: columns, budget: global}",
            "ortho.budget is global, and saliency.kind is residual",
            "--stats FILE",
        ),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together_are_refused_by_name(
    pico: Path, ortho: Ortho, sets: str, message: str, hint: str
) -> None:
    ran = ortho("decompose", pico, "--dry-run", "--set", sets)
    assert ran.code == 3
    said = " ".join(ran.err.split())
    assert message in said
    assert hint in said


def test_recipes_of_columns_take_settings_of_others_back(pico: Path, stats: Path) -> None:
    settings = recipe.load_recipe(
        "capability", ["ortho.structure=columns", "ortho.layout=null", "base.rounding=nearest"]
    )
    plan = make_plan(open_checkpoint(pico), settings, statistics=open_statistics(stats))
    assert plan.split[0].values == "I8"
    assert "layout" not in plan.recipe.canonical()["ortho"]  # type: ignore[operator]


def test_target_bits_are_met_with_columns(pico: Path, stats: Path, tmp_path: Path) -> None:
    for more in ((), ("ortho.values=int8",), ("ortho.budget=global", "ortho.share=true")):
        plan = plan_of(pico, stats, "ortho.structure=columns", *more)
        met = budget.meet(plan, open_checkpoint(pico), 5.4)
        out = tmp_path / f"out{len(more)}{'int8' in str(more)}"
        report = decompose(met, open_checkpoint(pico), out)
        bits = report["totals"]["split_bits_per_weight"]
        assert bits == pytest.approx(budget.expected_bits(met), abs=1e-4)
        assert 5.0 < bits <= 5.4
