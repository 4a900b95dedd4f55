"""Forgetting in whole columns: codes move in few of them, and ortho keeps those."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Ortho
from hypothesis import given, settings
from hypothesis import strategies as st
from memorised import PLENTY, Memorised
from safetensors.torch import load_file

import ortho_cli
from ortho_cli.decompose.edits import Edit, check_edits
from ortho_cli.decompose.plan import Plan
from ortho_cli.errors import InternalError, RecipeError
from ortho_cli.forget import unlearn
from ortho_cli.forget.grid import Grid
from ortho_cli.forget.isolate import isolate
from ortho_cli.forget.support import choose_columns, weigh
from ortho_cli.formats.open_artifact import open_artifact
from ortho_cli.model import scoring
from ortho_cli.split import quantize

pytestmark = pytest.mark.filterwarnings("ignore")  # other people's deprecations

COLUMNS = ("ortho.structure=columns", "forget.support=columns", "ortho.density=0.25")


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**16), rows=st.integers(1, 5), width=st.integers(1, 9), ties=st.booleans()
)
def test_chosen_columns_equal_the_slow_twin(seed: int, rows: int, width: int, ties: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    ratio = torch.rand(rows, width, generator=generator) * 3
    ratio = ratio.round() if ties else ratio
    moved = torch.rand(rows, width, generator=generator) < 0.1
    used = {j for j in range(width) if any(moved[i, j] for i in range(rows))}
    count = min(width, len(used) + seed % 3)
    sums = [sum(float(ratio[i, j]) for i in range(rows)) for j in range(width)]
    order = sorted(range(width), key=lambda j: (j not in used, -sums[j], j))
    grid: Any = SimpleNamespace(codes={"w": moved.to(torch.int8)}, original={"w": torch.zeros(())})
    found = choose_columns(grid, {"w": ratio}, {"w": count})["w"]
    assert found.nonzero()[:, 0].tolist() == sorted(order[:count])


def columns_of(plan: Plan) -> dict[str, int]:
    return {tensor.name: tensor.columns or 0 for tensor in plan.split}


def used_by(grid: Grid) -> dict[str, int]:
    return {
        name: int((codes != grid.original[name]).any(0).sum()) for name, codes in grid.codes.items()
    }


def test_isolate_forgets_in_as_many_columns_as_ortho_keeps(memorised: Memorised) -> None:
    plan = memorised.plan(*COLUMNS)
    grid, columns = memorised.grid(plan), columns_of(plan)
    scores = [scoring.score(grid.model, one) for one in memorised.secrets()]
    before = scoring.exposures(scores)
    isolate(
        grid,
        memorised.secrets(),
        memorised.fisher(),
        {tensor.name: tensor.k for tensor in plan.split},
        telling=1.0,
        known=memorised.secrets(),
        share=plan.recipe.forget.share,
        rounds=60,
        fill="step",
        seed=0,
        on_event=lambda event: None,
        columns=columns,
    )
    used = used_by(grid)
    assert grid.moved > 0
    assert all(used[name] <= columns[name] for name in columns)
    assert any(used[name] == columns[name] for name in columns), "the bound was never reached"
    scores = [scoring.score(grid.model, one) for one in memorised.secrets()]
    assert sum(scoring.exposures(scores)) < 0.6 * sum(before)


def test_unlearn_moves_codes_in_the_columns_of_its_mask_alone(
    memorised: Memorised, tmp_path: Path
) -> None:
    plan = memorised.plan(*COLUMNS, "forget.steps=6", "forget.attack_steps=0", split="unlearn")
    grid, columns = memorised.grid(plan), columns_of(plan)
    secrets, fisher = memorised.secrets(), memorised.fisher()
    ratios = grid.fisher([(secret.prompt, secret.secret) for secret in secrets])
    weighed = weigh({name: ratio.clone() for name, ratio in ratios.items()}, fisher)
    mask = unlearn._mask(grid, weighed, 0.1, columns)
    median = torch.cat([part.flatten() for part in fisher.values()]).median()
    for name, places in mask.items():
        rows, width = grid.codes[name].shape
        whole = places.view(rows, columns[name]) % width
        assert (whole == whole[0]).all()
        sums = (ratios[name] / (fisher[name] + median)).double().sum(0)
        assert float(sums[whole[0]].min()) >= float(
            sums.sort(descending=True).values[columns[name] - 1]
        )
    unlearn.unlearn(
        grid,
        secrets,
        memorised.kinds(),
        fisher,
        {tensor.name: tensor.k for tensor in plan.split},
        plan.recipe.forget,
        telling=1.0,
        end=(2,),
        columns=columns,
        state=tmp_path / "state.npz",
        on_event=lambda event: None,
    )
    assert grid.moved > 0
    for name, places in mask.items():
        outside = torch.ones(grid.codes[name].numel(), dtype=torch.bool)
        outside[places] = False
        assert not (grid.codes[name] != grid.original[name]).view(-1)[outside].any()


@pytest.mark.parametrize("split", ["isolate", "unlearn"])
def test_command_keeps_the_columns_in_which_codes_moved(
    memorised: Memorised, tmp_path: Path, ortho: Ortho, split: str
) -> None:
    more = ("forget.steps=6", "forget.attack_steps=0") if split == "unlearn" else ()
    sets = [w for one in (*PLENTY, *COLUMNS, *more) for w in ("--set", one)]
    given: list[Any] = ["--recipe", f"forget-{split}", "--stats", memorised.stats, *sets]
    given += ["--forget", memorised.forget, "-q"]
    out = tmp_path / "out"
    ran = ortho("decompose", memorised.model, *given, "-o", out)
    assert ran.code == 0, ran.err
    again = ortho("decompose", memorised.model, *given, "-o", tmp_path / "again", "--workers", 2)
    assert again.code == 0, again.err
    for name in ("model.safetensors", "ortho.safetensors"):
        assert (out / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert ortho("inspect", out, "--verify", "--expect-source", memorised.model).code == 0
    source = load_file(memorised.model / "model.safetensors")
    base, held = (load_file(out / f"{name}.safetensors") for name in ("model", "ortho"))
    moved = 0
    for module in open_artifact(out).split:
        weight, scales = source[f"{module}.weight"], base[f"{module}.weight_scale"]
        own = quantize.quantize(weight.float(), scales)
        codes = quantize.unpack_int4(base[f"{module}.weight_packed"])
        columns = held[f"{module}.col_indices"].long()
        different = (codes != own).any(0).nonzero()[:, 0]
        assert set(different.tolist()) <= set(columns.tolist())
        assert torch.equal(held[f"{module}.values"], weight[:, columns])
        moved += int((codes != own).sum())
    assert moved > 0
    model = ortho_cli.load(out, alpha=1.0)
    assert all(scoring.score(model, one).verbatim for one in memorised.secrets())
    if split == "isolate":
        ortho_cli.set_alpha(model, 0.0)
        assert not any(scoring.score(model, one).verbatim for one in memorised.secrets())


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (("ortho.structure=columns",), "forget.support is points, and ortho.structure is columns"),
        (("forget.support=columns",), "forget.support is columns, and ortho.structure is points"),
        ((*COLUMNS, "forget.mask=0.3"), "forget.mask is 0.3, and forget.support is columns"),
        ((*COLUMNS, "ortho.share=true"), "ortho.share is true, and ortho.split is isolate"),
        ((*COLUMNS, "ortho.budget=global"), "ortho.budget is global, and ortho.split is isolate"),
        ((*COLUMNS, "ortho.values=int8"), "ortho.values is int8, and ortho.split is isolate"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_by_name(
    memorised: Memorised, sets: tuple[str, ...], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        memorised.plan(*sets)


def test_recipes_of_single_weights_are_spelled_as_before(memorised: Memorised) -> None:
    forget = memorised.plan().recipe.canonical()["forget"]
    assert isinstance(forget, dict)
    assert "support" not in forget
    told = memorised.plan(*COLUMNS).recipe.canonical()["forget"]
    assert isinstance(told, dict)
    assert told["support"] == "columns"


def test_codes_that_move_in_too_many_columns_are_a_bug_that_is_told(memorised: Memorised) -> None:
    plan = memorised.plan(*COLUMNS)
    tensor = plan.split[0]
    columns = tensor.columns or 0
    split = {tensor.name: tensor}
    for count in (columns, columns + 1):
        edit = Edit(positions=np.arange(count), codes=np.zeros(count, np.int8))
        if count == columns:
            check_edits({tensor.name: edit}, split)
            continue
        with pytest.raises(InternalError, match=f"in {count} columns, and ortho keeps {columns}"):
            check_edits({tensor.name: edit}, split)
