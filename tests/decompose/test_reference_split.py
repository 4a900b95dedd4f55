"""Base from the model before it saw the data, ortho from what it learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checkpoints
import pytest
import reference
import torch
from conftest import PICO, Ortho, SmallTiles
from jobs import decompose
from safetensors.torch import load_file
from torch import Tensor

from ortho_cli.decompose import recipe
from ortho_cli.decompose.plan import make_plan
from ortho_cli.errors import CheckpointError, Interrupted, OutputExistsError, RecipeError
from ortho_cli.events import TensorDone
from ortho_cli.formats.open_artifact import open_artifact
from ortho_cli.formats.statistics import open_statistics
from ortho_cli.formats.verify import verify
from ortho_cli.split.sizes import DEFAULT_SIZES
from ortho_cli.storage.checkpoint import open_checkpoint

DENSITY = 0.05
CHANGED = ("model.embed_tokens.weight", "model.layers.1.input_layernorm.weight")


def before(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    return checkpoints.weights(**PICO, kv=32, dtype=dtype, bias=True)


def after(old: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a little training makes of it: every split weight, and two others."""
    generator = torch.Generator().manual_seed(7)
    found = {}
    for name, weight in old.items():
        step = 0.01 * torch.randn(weight.shape, generator=generator)
        learned = name.endswith("_proj.weight") or name in CHANGED
        found[name] = (weight.float() + step).to(weight.dtype) if learned else weight.clone()
    return found


class Case:
    """Two checkpoints, of before and after."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
        self.folder = folder
        self.old = before(dtype)
        self.new = after(self.old)
        checkpoints.save(folder / "before", self.old, shards=2)  # sharded otherwise: no matter
        checkpoints.save(folder / "after", self.new)

    def split(self, *sets: str, out: str = "out", stats: Path | None = None, **options: Any) -> Any:
        opened = open_checkpoint(self.folder / "after")
        plan = make_plan(
            opened,
            recipe.load_recipe(None, ["ortho.split=reference", f"ortho.density={DENSITY}", *sets]),
            reference=open_checkpoint(self.folder / "before"),
            statistics=open_statistics(stats) if stats else None,
            workers=options.pop("workers", 1),
            sizes=options.pop("sizes", DEFAULT_SIZES),
        )
        return decompose(plan, opened, self.folder / out, **options)

    def plain(self, *sets: str) -> dict[str, Tensor]:
        """Base of the model before, split by itself."""
        opened = open_checkpoint(self.folder / "before")
        decompose(make_plan(opened, recipe.load_recipe(None, sets)), opened, self.folder / "plain")
        return load_file(self.folder / "plain" / "model.safetensors")

    def base(self, out: str = "out") -> dict[str, Tensor]:
        return load_file(self.folder / out / "model.safetensors")

    def ortho(self, out: str = "out") -> dict[str, Tensor]:
        return load_file(self.folder / out / "ortho.safetensors")


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", ["absmax", "mse"])
def test_base_is_that_of_the_reference_byte_for_byte(
    tmp_path: Path, dtype: torch.dtype, scale: str
) -> None:
    case = Case(tmp_path, dtype)
    case.split(f"base.scale={scale}")
    # Without ortho's positions, which a base that serves alone knows nothing of.
    base, plain = case.base(), case.plain(f"base.scale={scale}", "ortho.density=0")
    assert base.keys() == plain.keys()
    assert [key for key in base if raw(base[key]) != raw(plain[key])] == []
    assert base["model.embed_tokens.weight"].dtype == dtype
    assert verify(open_artifact(tmp_path / "out")).checked


def check_selection(case: Case, curvature: dict[str, Tensor] | None) -> tuple[float, float]:
    """Hold every CSR to the slow twin; return what it keeps of source - reference, and all."""
    base, ortho = case.base(), case.ortho()
    kept = total = 0.0
    for name in [name for name in case.new if name.endswith("_proj.weight")]:
        module, weight = name.removesuffix(".weight"), case.new[name]
        near = torch.ones(weight.shape) if curvature is None else curvature[name]
        residual = weight.float() - reference.dense(base, {}, module, 0.0)
        indices = reference.forced_indices(residual, near, [], round(DENSITY * weight.numel()))
        crow, columns = reference.csr(indices, tuple(weight.shape))
        assert ortho[f"{module}.crow_indices"].tolist() == crow
        assert ortho[f"{module}.col_indices"].tolist() == columns
        assert raw(ortho[f"{module}.values"]) == raw(weight.flatten()[indices])
        delta = (weight.double() - case.old[name].double()).square() * near
        total += delta.sum().item()
        kept += delta.flatten()[indices].sum().item()
    return kept, total


def test_ortho_holds_the_source_where_base_is_farthest_from_it(case: Case) -> None:
    report = case.split()
    kept, total = check_selection(case, None)
    assert report["totals"]["delta_kept"] == pytest.approx(kept / total, rel=1e-5)
    assert 0.02 < kept / total < 0.98


def test_with_statistics_curvature_weighs_both_choice_and_delta(case: Case) -> None:
    stats = case.folder / "stats.safetensors"
    curvature = checkpoints.save_statistics(stats, case.folder / "after")
    report = case.split(stats=stats)
    kept, total = check_selection(case, curvature)
    assert report["totals"]["delta_kept"] == pytest.approx(kept / total, rel=1e-4)


@pytest.mark.parametrize("by_curvature", [False, True])
def test_statistics_for_the_scale_alone_leave_the_choice_to_the_residual(
    case: Case, by_curvature: bool
) -> None:
    stats = case.folder / "stats.safetensors"
    curvature = checkpoints.save_statistics(stats, case.folder / "after")
    kind = "curvature" if by_curvature else "residual"
    case.split("base.scale=curvature", f"saliency.kind={kind}", stats=stats)
    check_selection(case, curvature if by_curvature else None)


def test_everything_kept_is_the_source_and_all_of_the_delta(case: Case) -> None:
    report = case.split("ortho.density=1.0")
    base, ortho = case.base(), case.ortho()
    for name in [name for name in case.new if name.endswith("_proj.weight")]:
        module = name.removesuffix(".weight")
        assert torch.equal(reference.dense(base, ortho, module, 1.0), case.new[name].float())
    assert report["totals"]["delta_kept"] == 1.0


def test_unsplit_tensors_that_differ_are_named_and_are_the_references(case: Case) -> None:
    report = case.split()
    assert sorted(report["totals"]["unsplit_of_reference"]) == sorted(CHANGED)
    many = sum(case.new[name].numel() for name in CHANGED)
    assert report["totals"]["unsplit_of_reference_weights"] == many
    assert raw(case.base()[CHANGED[0]]) == raw(case.old[CHANGED[0]])


def test_a_model_that_learned_nothing_has_no_delta(tmp_path: Path) -> None:
    case = Case(tmp_path)
    case.new = case.old
    checkpoints.save(tmp_path / "after", case.old)
    report = case.split()
    assert report["totals"]["delta_kept"] is None  # a share of nothing
    assert report["totals"]["unsplit_of_reference"] == []
    check_selection(case, None)


def test_same_bytes_for_any_workers_and_tiles(case: Case, small_tiles: SmallTiles) -> None:
    case.split(out="one")
    case.split(out="two", workers=2)
    case.split(out="many", sizes=small_tiles)
    small_tiles.prove("split")
    for name in ("model", "ortho"):
        held = {(case.folder / o / f"{name}.safetensors").read_bytes() for o in ("one", "two")}
        assert held == {(case.folder / "many" / f"{name}.safetensors").read_bytes()}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.pop("model.norm.weight"), "`model.norm.weight` is BF16 [64] in"),
        (lambda t: t.update(extra=torch.zeros(3)), "`extra` is absent in"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(65).bfloat16()}),
            "and BF16 [65] in the reference",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(64)}),
            "and F32 [64] in the reference",
        ),
    ],
    ids=["missing", "extra", "shape", "dtype"],
)
def test_reference_of_another_model_is_refused_by_name(
    tmp_path: Path, change: Any, told: str
) -> None:
    case = Case(tmp_path)
    for file in (tmp_path / "before").iterdir():
        file.unlink()
    other = dict(case.old)
    change(other)
    checkpoints.save(tmp_path / "before", other)
    with pytest.raises(CheckpointError) as caught:
        case.split()
    assert told in caught.value.message
    assert not (tmp_path / "out").exists()


def test_artifact_as_reference_is_refused(case: Case) -> None:
    case.plain()
    (case.folder / "before").rename(case.folder / "kept")
    (case.folder / "plain").rename(case.folder / "before")
    with pytest.raises(CheckpointError, match="file of an artifact already"):
        case.split()


def test_reference_that_changes_meanwhile_is_refused(case: Case) -> None:
    shard = sorted((case.folder / "before").glob("*.safetensors"))[0]

    def touch(event: object) -> None:
        shard.touch()

    with pytest.raises(CheckpointError, match=shard.name):
        case.split(on_event=touch)
    assert not (case.folder / "out").exists()


def test_half_done_work_of_another_reference_is_refused(case: Case) -> None:
    finished = 0

    def stop(event: object) -> None:
        nonlocal finished
        finished += isinstance(event, TensorDone)
        if finished == 9:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        case.split(on_event=stop)
    for shard in (case.folder / "before").glob("*.safetensors"):
        shard.touch()
    with pytest.raises(OutputExistsError, match="another run"):
        case.split()
    case.split(force=True)


def test_reference_and_recipe_go_together(case: Case, ortho: Ortho) -> None:
    source = open_checkpoint(case.folder / "after")
    with pytest.raises(RecipeError, match=r"ortho\.split is reference, and no reference"):
        make_plan(source, recipe.load_recipe(None, ["ortho.split=reference"]))
    with pytest.raises(RecipeError, match=r"ortho\.split is residual, and a reference"):
        make_plan(source, recipe.load_recipe(), reference=source)
    ran = ortho("decompose", case.folder / "after", "--recipe", "forget-reference")
    assert ran.code == 3
    assert "--reference CHECKPOINT" in ran.err
    ran = ortho("decompose", case.folder / "after", "--reference", case.folder / "before")
    assert ran.code == 3
    assert sorted(p.name for p in case.folder.iterdir()) == ["after", "before"]


def test_command_writes_it_and_a_reference_is_never_overwritten(case: Case, ortho: Ortho) -> None:
    options = ["--recipe", "forget-reference", "--reference", case.folder / "before"]
    ran = ortho("decompose", case.folder / "after", *options, "--json")
    assert ran.code == 0, ran.err
    assert sorted(ran.json["totals"]["unsplit_of_reference"]) == sorted(CHANGED)
    assert ran.json["recipe"]["ortho"]["split"] == "reference"
    text = ortho("inspect", case.folder / "after-ortho", "--verify", "--json")
    assert text.code == 0, text.err
    ran = ortho(
        "decompose", case.folder / "after", *options, "--force", "-o", case.folder / "before"
    )
    assert ran.code in (2, 8), ran.err
    assert len(list((case.folder / "before").iterdir())) == 3
