from __future__ import annotations

import json
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import reference
import torch
from conftest import Pass, SmallTiles
from jobs import decompose
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ortho_cli.decompose import recipe
from ortho_cli.decompose.plan import make_plan
from ortho_cli.errors import CheckpointError, NumericalError, OutputExistsError, ResourceError
from ortho_cli.events import Advanced, Event, Finishing, Started, TensorDone
from ortho_cli.formats.artifact import is_artifact
from ortho_cli.formats.open_artifact import open_artifact
from ortho_cli.formats.verify import verify
from ortho_cli.split import quantize
from ortho_cli.split.sizes import DEFAULT_SIZES, Sizes
from ortho_cli.storage.checkpoint import open_checkpoint
from ortho_cli.storage.work_folder import WorkFolder, work_folder


def split(
    source: Path,
    out: Path,
    *sets: str,
    workers: int = 1,
    sizes: Sizes = DEFAULT_SIZES,
    **options: Any,
) -> dict[str, Any]:
    opened = open_checkpoint(source)
    made = make_plan(opened, recipe.load_recipe(None, sets), workers=workers, sizes=sizes)
    return decompose(made, opened, out, **options)


def contents(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def check_tensor(
    base: dict[str, torch.Tensor],
    ortho: dict[str, torch.Tensor],
    name: str,
    weight: torch.Tensor,
    *,
    group_size: int,
    density: float,
) -> None:
    """Hold one split tensor to the slow twins, bit for bit."""
    module = name.removesuffix(".weight")
    wide = weight.float()
    scales = reference.absmax_scales(wide, group_size, weight.dtype)
    codes = reference.quantize(wide, scales)
    assert torch.equal(base[f"{module}.weight_scale"], scales)
    assert torch.equal(base[f"{module}.weight_packed"], reference.pack_int4(codes))
    assert base[f"{module}.weight_shape"].tolist() == list(weight.shape)
    residual = (wide - reference.dequantize(codes, scales)).abs()
    indices = reference.top_k_indices(residual, round(density * weight.numel()))
    crow, columns = reference.csr(indices, tuple(weight.shape))
    assert ortho[f"{module}.crow_indices"].tolist() == crow
    assert ortho[f"{module}.col_indices"].tolist() == columns
    assert torch.equal(ortho[f"{module}.values"], weight.flatten()[indices])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("density", [0.0, 0.02, 1.0])
def test_decompose_every_byte_equals_the_slow_twins(
    tmp_path: Path, dtype: torch.dtype, density: float
) -> None:
    tensors = checkpoints.weights(
        hidden=64, mlp=96, layers=1, vocab=40, kv=16, dtype=dtype, bias=True
    )
    # Exact ties: two rows alike, and a row of zeros.
    up = tensors["model.layers.0.mlp.up_proj.weight"]
    up[3], up[7] = up[2], 0
    checkpoints.save(tmp_path / "m", tensors)
    split(tmp_path / "m", tmp_path / "out", f"ortho.density={density}")
    assert verify(open_artifact(tmp_path / "out")).tensors
    base, ortho = (load_file(tmp_path / "out" / f"{f}.safetensors") for f in ("model", "ortho"))
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            check_tensor(base, ortho, name, tensor, group_size=32, density=density)
        else:
            assert torch.equal(base[name], tensor)
            assert base[name].dtype == tensor.dtype
    assert len(base) == len(tensors) + 2 * 7
    assert len(ortho) == 3 * 7


def test_decompose_tensor_of_many_tiles_equals_one_tile(
    tmp_path: Path, small_tiles: SmallTiles
) -> None:
    weight = checkpoints.weights(hidden=128, mlp=300, layers=1, vocab=8)
    save_file({"a.weight": weight["model.layers.0.mlp.up_proj.weight"]}, tmp_path / "m.safetensors")
    split(tmp_path / "m.safetensors", tmp_path / "one")
    split(tmp_path / "m.safetensors", tmp_path / "many", sizes=small_tiles)
    small_tiles.prove("split")
    assert contents(tmp_path / "one") == contents(tmp_path / "many")


@pytest.mark.parametrize("hot", [False, True])
def test_decompose_guessed_bar_too_high_or_not_selects_the_same(
    tmp_path: Path, passes: list[Pass], small_tiles: SmallTiles, hot: bool
) -> None:
    """The rows that the guess samples are the loudest: a second pass must put it right."""
    weight = torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
    if hot:
        weight[::32] *= 100
    weight = weight.bfloat16()
    save_file({"a.weight": weight}, tmp_path / "m.safetensors")
    moved: list[Event] = []
    options: dict[str, Any] = {"compiled": False, "on_event": moved.append, "sizes": small_tiles}
    split(tmp_path / "m.safetensors", tmp_path / "out", "ortho.density=0.05", **options)
    small_tiles.prove("split")
    base, ortho = (load_file(tmp_path / "out" / f"{f}.safetensors") for f in ("model", "ortho"))
    check_tensor(base, ortho, "a.weight", weight, group_size=64, density=0.05)
    assert len(passes) == (2 if hot else 1)
    assert passes[0].bar > 0
    assert sum(e.nbytes for e in moved if isinstance(e, Advanced)) == weight.nbytes


def test_decompose_same_bytes_for_any_workers_and_any_sharding(
    tmp_path: Path, pico_tensors: dict[str, torch.Tensor]
) -> None:
    for shards in (1, 3):
        checkpoints.save(tmp_path / f"m{shards}", pico_tensors, shards=shards)
    first = None
    for shards, workers in ((1, 1), (1, 2), (1, 5), (3, 2)):
        out = tmp_path / f"out-{shards}-{workers}"
        split(tmp_path / f"m{shards}", out, workers=workers)
        first = first or contents(out)
        assert contents(out) == first


def test_decompose_folder_carries_everything_and_config_gains_one_key(
    pico: Path, artifact: Path
) -> None:
    assert sorted(contents(artifact)) == [
        "README.md",
        "additional_chat_templates/tools.jinja",
        "config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "ortho.safetensors",
        "report.json",
        "tokenizer.json",
    ]
    config = json.loads((artifact / "config.json").read_text())
    settings = config.pop("quantization_config")
    assert config == json.loads((pico / "config.json").read_text())
    group = settings["config_groups"]["group_0"]
    assert group["weights"]["group_size"] == 64
    assert settings["ignore"] == ["lm_head"]
    assert len(group["targets"]) == 7
    index = json.loads((artifact / "model.safetensors.index.json").read_text())
    with safe_open(artifact / "model.safetensors", "pt") as base:
        assert index["weight_map"] == dict.fromkeys(base.keys(), "model.safetensors")


def test_decompose_metadata_names_format_plan_recipe_and_digests(artifact: Path) -> None:
    report = json.loads((artifact / "report.json").read_text())
    with safe_open(artifact / "model.safetensors", "pt") as file:
        base = file.metadata()
    with safe_open(artifact / "ortho.safetensors", "pt") as file:
        ortho = file.metadata()
    assert (base["format"], base["ortho_format"], base["role"]) == ("pt", "ortho/3", "base")
    assert (ortho["format"], ortho["role"]) == ("ortho/3", "ortho")
    assert base["plan_sha256"] == ortho["plan_sha256"] == report["plan_sha256"]
    resolved = recipe.load_recipe(None, ["saliency.kind=residual"])
    assert json.loads(base["recipe"]) == resolved.canonical() == report["recipe"]
    assert ortho["base_blake3"] == report["base_blake3"]
    assert ortho["source_digest"] == report["source_digest"]
    assert verify(open_artifact(artifact)).checked


def test_decompose_ortho_is_for_its_owner_only(artifact: Path) -> None:
    assert stat.S_IMODE((artifact / "ortho.safetensors").stat().st_mode) == 0o600
    assert stat.S_IMODE((artifact / "model.safetensors").stat().st_mode) & 0o400


def test_decompose_output_holds_no_path_and_no_time(pico: Path, artifact: Path) -> None:
    for name, content in contents(artifact).items():
        for word in (str(pico.parent), "pytest", "2026-"):
            assert word.encode() not in content, name


def test_decompose_report_figures_equal_float64(
    artifact: Path, pico_tensors: dict[str, torch.Tensor]
) -> None:
    report = json.loads((artifact / "report.json").read_text())
    base, ortho = (load_file(artifact / f"{f}.safetensors") for f in ("model", "ortho"))
    for entry in report["tensors"]:
        if entry["action"] == "copy":
            continue
        module = entry["name"].removesuffix(".weight")
        weight = pico_tensors[entry["name"]].float()
        codes = quantize.unpack_int4(base[f"{module}.weight_packed"])
        approximation = reference.dequantize(codes, base[f"{module}.weight_scale"])
        at_0 = reference.decibels(weight, approximation)
        crow = ortho[f"{module}.crow_indices"].long()
        rows = torch.repeat_interleave(torch.arange(len(crow) - 1), crow.diff())
        columns = ortho[f"{module}.col_indices"].long()
        full = approximation.clone()
        full[rows, columns] = ortho[f"{module}.values"].float()
        assert torch.equal(full[rows, columns], weight[rows, columns])
        at_1 = reference.decibels(weight, full)
        assert entry["sqnr_db_alpha_0"] == pytest.approx(at_0, abs=1e-3)
        assert entry["sqnr_db_alpha_1"] == pytest.approx(at_1, abs=1e-3)
        kept = 1 - 10 ** ((at_0 - at_1) / 10)
        assert entry["residual_kept"] == pytest.approx(kept, abs=1e-4)
        assert entry["nnz"] == len(columns)
    totals = report["totals"]
    sizes = [(artifact / f"{f}.safetensors").stat().st_size for f in ("model", "ortho")]
    assert [totals["base_bytes"], totals["ortho_bytes"]] == sizes
    assert totals["bits_per_weight"] == round(8 * sum(sizes) / totals["weights"], 4)


def test_decompose_density_one_has_no_error_left(pico: Path, tmp_path: Path) -> None:
    report = split(pico, tmp_path / "out", "ortho.density=1")
    assert report["totals"]["sqnr_db_alpha_1"] is None
    assert report["totals"]["residual_kept"] == 1.0


def test_decompose_mse_scales_gain_decibels(pico: Path, tmp_path: Path) -> None:
    plain, searched = (
        split(pico, tmp_path / scale, f"base.scale={scale}")["totals"]["sqnr_db_alpha_1"]
        for scale in ("absmax", "mse")
    )
    assert searched > plain + 0.3


def test_decompose_base_that_serves_alone_has_the_scales_of_a_base_without_ortho(
    pico: Path, tmp_path: Path
) -> None:
    bases = {}
    for name, *sets in (("bare", "ortho.density=0"), ("alone", "base.alone=true"), ("both",)):
        report = split(pico, tmp_path / name, "base.scale=mse", *sets)
        bases[name] = load_file(tmp_path / name / "model.safetensors"), report["totals"]
    for tensor, value in bases["bare"][0].items():
        assert torch.equal(bases["alone"][0][tensor], value)
    assert bases["alone"][1]["sqnr_db_alpha_0"] > bases["both"][1]["sqnr_db_alpha_0"]
    assert bases["alone"][1]["sqnr_db_alpha_1"] < bases["both"][1]["sqnr_db_alpha_1"]


def test_decompose_events_account_for_every_byte_and_tensor(pico: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    split(pico, tmp_path / "out", workers=2, on_event=events.append)
    started = events[0]
    assert isinstance(started, Started)
    moved = sum(event.nbytes for event in events if isinstance(event, Advanced))
    assert moved == started.bytes_total
    assert sum(isinstance(event, TensorDone) for event in events) == started.tensors
    assert isinstance(events[-1], Finishing)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_decompose_bad_weight_is_named_and_nothing_stays(
    tmp_path: Path, pico_tensors: dict[str, torch.Tensor], bad: float
) -> None:
    pico_tensors["model.layers.1.mlp.down_proj.weight"][5, 17] = bad
    checkpoints.save(tmp_path / "m", pico_tensors)
    with pytest.raises(NumericalError) as caught:
        split(tmp_path / "m", tmp_path / "out", workers=2)
    assert "`model.layers.1.mlp.down_proj.weight`" in caught.value.message
    assert f"holds {bad} at [5, 17]" in caught.value.message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]


def test_decompose_bad_weight_in_a_copied_tensor_is_named_unless_ignored(
    tmp_path: Path, pico_tensors: dict[str, torch.Tensor]
) -> None:
    pico_tensors["model.norm.weight"][9] = np.inf
    pico_tensors["mask"] = torch.full((4,), -np.inf)  # no weight: it may mean it
    checkpoints.save(tmp_path / "m", pico_tensors)
    with pytest.raises(NumericalError, match=r"`model\.norm\.weight` .* holds inf at \[9\]"):
        split(tmp_path / "m", tmp_path / "out")
    split(tmp_path / "m", tmp_path / "out", "ignore=[model.norm.weight]")
    kept = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.isinf(kept["model.norm.weight"][9])
    assert torch.isinf(kept["mask"]).all()


def test_decompose_base_that_would_overflow_float16_is_refused(tmp_path: Path) -> None:
    weight = torch.zeros(2, 64, dtype=torch.float16)
    weight[1, 3] = -65000.0
    save_file({"a.weight": weight}, tmp_path / "m.safetensors")
    with pytest.raises(NumericalError, match=r"overflows F16 when dequantized, at .1, 3."):
        split(tmp_path / "m.safetensors", tmp_path / "out")


def test_decompose_source_cut_while_running_is_noticed(pico: Path, tmp_path: Path) -> None:
    def cut(event: Event) -> None:
        if isinstance(event, TensorDone):
            with (pico / "model.safetensors").open("r+b") as file:
                file.truncate(5000)

    with pytest.raises(CheckpointError, match=r"more were promised|changed while"):
        split(pico, tmp_path / "out", on_event=cut)
    assert not (tmp_path / "out").exists()


def test_decompose_source_touched_while_running_is_noticed(pico: Path, tmp_path: Path) -> None:
    def touch(event: Event) -> None:
        if isinstance(event, TensorDone):
            (pico / "model.safetensors").touch()

    with pytest.raises(CheckpointError, match="changed while it was read"):
        split(pico, tmp_path / "out", on_event=touch)
    assert not (tmp_path / "out").exists()
    assert not work_folder(tmp_path / "out").exists()


def test_decompose_full_disk_is_one_sentence_and_can_be_repeated(
    pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        with pytest.raises(ResourceError, match=r"cannot write `.*model\.safetensors.*`: file too"):
            split(pico, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "out").exists()
    split(pico, tmp_path / "out")
    assert verify(open_artifact(tmp_path / "out")).tensors > 0


def test_decompose_existing_output_is_kept_until_the_new_one_is_whole(
    pico: Path, artifact: Path
) -> None:
    before = contents(artifact)
    with pytest.raises(OutputExistsError):
        split(pico, artifact)

    def fail(event: Event) -> None:
        if isinstance(event, Finishing):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        split(pico, artifact, "ortho.density=0.1", force=True, on_event=fail)
    assert contents(artifact) == before
    split(pico, artifact, "ortho.density=0.1", force=True)
    assert contents(artifact) != before
    assert not work_folder(artifact).exists()


def test_decompose_second_run_into_the_same_output_says_who_holds_it(
    pico: Path, tmp_path: Path
) -> None:
    import os

    identity = {"plan": "x", "files": {}}
    with (
        WorkFolder(tmp_path / "out", identity=identity, force=False),
        pytest.raises(OutputExistsError, match=f"process {os.getpid()} is writing"),
    ):
        split(pico, tmp_path / "out", force=True)


def test_decompose_bare_file_gets_no_config(tmp_path: Path) -> None:
    save_file({"a.weight": torch.randn(8, 64)}, tmp_path / "m.safetensors")
    split(tmp_path / "m.safetensors", tmp_path / "out")
    assert sorted(contents(tmp_path / "out")) == [
        "README.md",
        "model.safetensors",
        "model.safetensors.index.json",
        "ortho.safetensors",
        "report.json",
    ]
    assert is_artifact(tmp_path / "out")


MEASURE = """
import sys
from importlib import import_module
from pathlib import Path
from ortho_cli.decompose import job, plan, recipe
from ortho_cli.storage import checkpoint

def peak():
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in status if line.startswith("VmHWM")).split()[1])

compiled = sys.argv[3] == "compiled"
import_module("ortho_cli.split.numba_loops" if compiled else "ortho_cli.split.torch_kernel")
settings = recipe.load_recipe(None, sys.argv[4:])
before = peak()
opened = checkpoint.open_checkpoint(Path(sys.argv[1]))
made = plan.make_plan(opened, settings, workers=2)
target = job.check_target(made, opened, Path(sys.argv[2]))
job.decompose(made, opened, target, compiled=compiled)
print(peak() - before, made.peak_bytes)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's VmHWM")
@pytest.mark.parametrize("compiled", ["compiled", "torch"])
def test_decompose_memory_is_a_few_tiles_whatever_the_size(tmp_path: Path, compiled: str) -> None:
    one = torch.randn(4096, 2048, generator=torch.Generator().manual_seed(0)).bfloat16()
    over = {}
    # From two of each kind on: fewer never keep both workers at the largest weights at one time.
    for times in (2, 8):
        tensors = {}
        for i in range(times):
            tensors[f"{i}.embed.weight"] = one.clone()
            tensors[f"{i}.a.weight"] = one.clone()
            tensors[f"{i}.b.weight"] = one.clone()
        checkpoints.save(tmp_path / f"m{times}", tensors)
        over[times] = 0
        # The more tensors, the surer that two workers peak together: a small model gets more tries.
        for go in range(8 // times):
            out = tmp_path / f"out{times}.{go}"
            command = [sys.executable, "-c", MEASURE, tmp_path / f"m{times}", out, compiled]
            ran = subprocess.run(
                list(map(str, command)), capture_output=True, text=True, check=True
            )
            peak, planned = map(int, ran.stdout.split())
            assert peak < 100e6
            assert peak < 2 * planned
            over[times] = max(over[times], peak)
    assert over[8] < 1.1 * over[2]
