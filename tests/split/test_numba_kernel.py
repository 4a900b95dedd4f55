from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import reference
import torch
from conftest import Pass, SmallTiles
from jobs import decompose
from safetensors.torch import load_file, save_file
from torch import Tensor

from ortho_cli.decompose import recipe
from ortho_cli.decompose.kernels import Kernels
from ortho_cli.decompose.plan import Plan, _buffer_bytes, make_plan
from ortho_cli.errors import CalibrationError, NumericalError, OrthoError
from ortho_cli.events import Advanced, Event, Noted, TensorDone, null_sink
from ortho_cli.formats.statistics import open_statistics
from ortho_cli.split.numba_kernel import NumbaKernel
from ortho_cli.split.sizes import DEFAULT_SIZES, Sizes
from ortho_cli.split.torch_kernel import TorchKernel
from ortho_cli.storage.checkpoint import open_checkpoint

pytest.importorskip("numba")

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Sums of squares in another order.
FIGURES: dict[str, dict[str, float]] = {
    "sqnr_db_alpha_0": {"rel": 1e-4},
    "sqnr_db_alpha_1": {"rel": 1e-4, "abs": 1e-10},  # a difference of sums
    "residual_kept": {"abs": 2e-6},
    "saliency_kept": {"abs": 2e-6},
    "curvature_error_alpha_0": {"rel": 1e-6},
    "curvature_error_alpha_1": {"rel": 1e-6},
}


def plan_of(source: Path, *sets: str, stats: Path | None = None, **options: Any) -> Plan:
    found = open_statistics(stats) if stats else None
    settings = recipe.load_recipe(None, sets)
    return make_plan(open_checkpoint(source), settings, statistics=found, **options)


def split(
    source: Path,
    out: Path,
    *sets: str,
    stats: Path | None = None,
    workers: int = 1,
    sizes: Sizes = DEFAULT_SIZES,
    **options: Any,
) -> dict[str, Any]:
    plan = plan_of(source, *sets, stats=stats, workers=workers, sizes=sizes)
    return decompose(plan, open_checkpoint(source), out, **options)


def files(folder: Path) -> dict[str, bytes]:
    """Every file but the report, whose sums may differ in their last digits."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.name: path.read_bytes() for path in found if path.name != "report.json"}


def share(key: str, figure: float) -> float:
    """Turn decibels into noise over signal, whose error is that of the sums."""
    return 10 ** (-figure / 10) if "db" in key else figure


def names_given(patch: pytest.MonkeyPatch, worker: type, method: str) -> list[str]:
    """List the weights that a method is given first, from now on."""
    names: list[str] = []
    original = getattr(worker, method)

    def watched(self: Any, first: Any, *rest: Any) -> Any:
        names.append(first.name)
        return original(self, first, *rest)

    patch.setattr(worker, method, watched)
    return names


def check_alike(
    source: Path, folder: Path, *sets: str, stats: Path | None = None, **options: Any
) -> None:
    """Split with the loops and without: the same bytes, and figures that agree."""
    given: dict[str, Any] = {"stats": stats, **options}
    with pytest.MonkeyPatch.context() as patch:
        general = names_given(patch, TorchKernel, "finish")
        fast = split(source, folder / "fast", *sets, **given)
        assert not general, "the loops took none"
        slow = split(source, folder / "slow", *sets, compiled=False, **given)
        assert general
    assert files(folder / "fast") == files(folder / "slow")
    for one, other in zip(
        [fast["totals"], *fast["tensors"]], [slow["totals"], *slow["tensors"]], strict=True
    ):
        for key, margin in FIGURES.items():
            if other.get(key) is None:
                assert one.get(key) is None
            else:
                assert share(key, one[key]) == pytest.approx(share(key, other[key]), **margin)
    assert fast["base_blake3"] == slow["base_blake3"]


def odd_weights(dtype: torch.dtype) -> Tensor:
    """Make a weight with ties, zeros of both signs, subnormals, the largest values, lone spikes."""
    generator = torch.Generator().manual_seed(3)
    weight = 0.02 * torch.randn(96, 128, generator=generator)
    limits = torch.finfo(dtype)
    weight[3], weight[7], weight[8] = weight[2], 0.0, -0.0
    weight[9] = limits.smallest_normal / 4 * torch.randint(-4, 5, (128,), generator=generator)
    weight[10] = limits.tiny
    weight[11] = limits.max / 16
    weight[12, ::32] = limits.max / 32  # one spike in each group: all else rounds to 0
    weight[13] = torch.arange(128) - 64  # halves between two codes, to even
    weight[13, ::32] = 7.5 * 16
    return weight.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("density", [0.0, 0.005, 0.2, 1.0])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_loops_give_the_bytes_of_the_slow_twins(
    tmp_path: Path, dtype: torch.dtype, density: float, group_size: int
) -> None:
    weight = odd_weights(dtype)
    save_file({"a.weight": weight}, tmp_path / "m.safetensors")
    sets = (f"ortho.density={density}", f"base.group_size={group_size}")
    check_alike(tmp_path / "m.safetensors", tmp_path, *sets)
    base, ortho = (load_file(tmp_path / "fast" / f"{f}.safetensors") for f in ("model", "ortho"))
    wide = weight.float()
    scales = reference.absmax_scales(wide, group_size, dtype)
    codes = reference.quantize(wide, scales)
    assert torch.equal(base["a.weight_scale"], scales)
    assert torch.equal(base["a.weight_packed"], reference.pack_int4(codes))
    residual = (wide - reference.dequantize(codes, scales)).abs()
    indices = reference.top_k_indices(residual, round(density * weight.numel()))
    crow, columns = reference.csr(indices, (96, 128))
    assert ortho["a.crow_indices"].tolist() == crow
    assert ortho["a.col_indices"].tolist() == columns
    # Words, not numbers: the sign of a zero counts.
    word = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(ortho["a.values"].view(word), weight.flatten()[indices].view(word))


def save_odd_curvature(stats: Path, source: Path, stored: Any) -> None:
    """Save statistics with ties, zeros, and curvature far from the rest."""

    def flatten(tensors: dict[str, Tensor]) -> None:
        key = "a.retain_curvature"
        if key in tensors and tensors[key].dim() == 2:
            tensors[key][3] = tensors[key][2]
            tensors[key][20:24] = 0
            tensors[key][24] = 1e-38
            tensors[key][30, ::3] = 1e4
        elif key in tensors:
            tensors[key][40:44] = 0

    checkpoints.save_statistics(
        stats,
        source,
        kind="gram" if stored == "gram" else "fisher",
        storage="factored" if stored == "factored" else "full",
        dtype=stored if isinstance(stored, torch.dtype) else torch.float32,
        change=flatten,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32, "gram", "factored"])
def test_loops_with_curvature_give_the_same_bytes(
    tmp_path: Path, small_tiles: SmallTiles, dtype: torch.dtype, stored: Any
) -> None:
    source, stats = tmp_path / "m.safetensors", tmp_path / "stats.safetensors"
    weight = odd_weights(dtype)
    weight[11:13] = 0  # squares times curvature have to stay finite
    save_file({"a.weight": weight, "b.weight": weight[:32].clone()}, source)

    save_odd_curvature(stats, source, stored)
    check_alike(source, tmp_path, "ortho.density=0.02", stats=stats, sizes=small_tiles)
    small_tiles.prove("split")


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize(
    ("dtype", "scale", "stored"),
    [
        (torch.bfloat16, "mse", None),
        (torch.float16, "mse", None),
        (torch.float32, "mse", None),
        (torch.bfloat16, "mse", torch.float32),  # positions stay: something else chooses them
        (torch.bfloat16, "curvature", torch.bfloat16),
        (torch.bfloat16, "curvature", torch.float32),
        (torch.bfloat16, "curvature", "gram"),
        (torch.bfloat16, "curvature", "factored"),
        (torch.float16, "curvature", torch.float32),
        (torch.float32, "curvature", "gram"),
    ],
)
def test_loops_search_the_same_scales(
    tmp_path: Path,
    small_tiles: SmallTiles,
    dtype: torch.dtype,
    scale: str,
    stored: Any,
    alone: bool,
) -> None:
    source, stats = tmp_path / "m.safetensors", tmp_path / "stats.safetensors"
    weight = odd_weights(dtype)[:, :96].contiguous()
    if stored is not None:
        weight[11:13] = 0  # squares times curvature have to stay finite
    save_file({"a.weight": weight, "b.weight": weight[:32].clone()}, source)
    size = 24 if dtype == torch.bfloat16 else 32  # whole lanes, or not
    sets = [f"base.scale={scale}", f"base.alone={alone}", f"base.group_size={size}"]
    if stored is not None:
        save_odd_curvature(stats, source, stored)
    given = None if stored is None else stats
    check_alike(source, tmp_path, *sets, "ortho.density=0.03", stats=given, sizes=small_tiles)
    small_tiles.prove("split")


@pytest.mark.parametrize("tile", [128, 1000, 1 << 19])
@pytest.mark.parametrize("density", [0.005, 0.3])
def test_loops_select_the_same_from_any_tiles_and_workers(
    tmp_path: Path, small_tiles: SmallTiles, tile: int, density: float
) -> None:
    tensors = checkpoints.weights(hidden=64, mlp=96, layers=1, vocab=40, kv=16, bias=True)
    checkpoints.save(tmp_path / "m", tensors, shards=2)
    sizes = replace(small_tiles, split=tile)
    check_alike(tmp_path / "m", tmp_path, f"ortho.density={density}", workers=3, sizes=sizes)
    sizes.prove("split" if tile < 1 << 19 else "check")


@pytest.mark.parametrize("hot", [False, True])
def test_loops_guessed_bar_too_high_or_not_selects_the_same(
    tmp_path: Path, passes: list[Pass], small_tiles: SmallTiles, hot: bool
) -> None:
    """The rows that the guess samples are the loudest: a second pass must put it right."""
    weight = torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
    if hot:
        weight[::32] *= 100
    source = tmp_path / "m.safetensors"
    save_file({"a.weight": weight.bfloat16()}, source)
    moved: list[Event] = []
    options: dict[str, Any] = {"on_event": moved.append, "sizes": small_tiles}
    check_alike(source, tmp_path, "ortho.density=0.05", **options)
    small_tiles.prove("split")
    bars = [one.bar for one in passes if isinstance(one.kernel, NumbaKernel)]
    assert len(bars) == (2 if hot else 1)
    assert bars[0] > 0
    assert sum(e.nbytes for e in moved if isinstance(e, Advanced)) == 2 * 2 * weight.numel()


def error_of(*arguments: Any, **options: Any) -> OrthoError:
    with pytest.raises(OrthoError) as caught:
        split(*arguments, **options)
    return caught.value


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weight_that_is_not_finite_is_named_as_without_loops(
    tmp_path: Path, dtype: torch.dtype, bad: float
) -> None:
    weight = odd_weights(dtype)
    weight[90, 77] = bad
    source = tmp_path / "m.safetensors"
    save_file({"a.weight": weight}, source)
    fast = error_of(source, tmp_path / "fast")
    slow = error_of(source, tmp_path / "slow", compiled=False)
    assert isinstance(fast, NumericalError)
    assert f"`a.weight` of `m.safetensors` holds {bad} at [90, 77]" in fast.message
    assert (fast.message, fast.hint) == (slow.message, slow.hint)
    assert not (tmp_path / "fast").exists()


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32, "gram", "factored"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1e-9, -0.0])
def test_value_that_is_no_curvature_is_judged_as_without_loops(
    tmp_path: Path, stored: Any, bad: float
) -> None:
    source, stats = tmp_path / "m.safetensors", tmp_path / "stats.safetensors"
    save_file({"a.weight": odd_weights(torch.bfloat16)[:11].contiguous()}, source)

    def spoil(tensors: dict[str, Tensor]) -> None:
        key = "a.retain_curvature" + ("_rows" if stored == "factored" else "")
        tensors[key][(5, 17) if tensors[key].dim() == 2 else 5] = bad

    kind = "gram" if stored == "gram" else "fisher"
    storage = "factored" if stored == "factored" else "full"
    kept = stored if isinstance(stored, torch.dtype) else torch.float32
    checkpoints.save_statistics(stats, source, kind=kind, storage=storage, dtype=kept, change=spoil)
    if bad == 0:  # minus zero is zero
        split(source, tmp_path / "fast", stats=stats)
        split(source, tmp_path / "slow", stats=stats, compiled=False)
        assert files(tmp_path / "fast") == files(tmp_path / "slow")
        return
    fast = error_of(source, tmp_path / "fast", stats=stats)
    slow = error_of(source, tmp_path / "slow", stats=stats, compiled=False)
    assert isinstance(fast, CalibrationError)
    assert "curvature is finite and >= 0" in fast.message
    assert (fast.message, fast.hint) == (slow.message, slow.hint)


def test_group_that_overflows_is_judged_as_without_loops(tmp_path: Path) -> None:
    """The float16 scale is rounded down, and -8 of them are beyond float16."""
    weight = torch.ones(64, 64)
    weight[1, 3] = -65472.0
    source = tmp_path / "m.safetensors"
    save_file({"a.weight": weight.half()}, source)
    outcomes = []
    for compiled in (True, False):
        out = tmp_path / str(compiled)
        try:
            split(source, out, compiled=compiled)
            outcomes.append(files(out))
        except OrthoError as error:
            outcomes.append({error.message: b""})
    assert outcomes[0] == outcomes[1]


def test_curvature_beyond_float32_is_judged_as_without_loops(tmp_path: Path) -> None:
    source, stats = checkpoints.save_overflow(tmp_path)
    fast = error_of(source, tmp_path / "fast", stats=stats)
    slow = error_of(source, tmp_path / "slow", stats=stats, compiled=False)
    assert (fast.message, fast.hint) == (slow.message, slow.hint)


@pytest.mark.parametrize(
    ("sets", "taken"),
    [
        ((), True),
        (("ortho.density=1.0",), True),
        (("base.scale=mse",), True),
        (("base.bits=3",), False),
        (("overrides=[{match: '*.mlp.*', base: {bits: 3}}]",), False),
    ],
)
def test_loops_take_rounding_to_nearest_of_four_bits(
    pico: Path, sets: tuple[str, ...], taken: bool
) -> None:
    assert Kernels(plan_of(pico, *sets), on_event=null_sink).compiled is taken


def test_without_numba_nothing_else_changes(pico: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split(pico, pico.parent / "with")
    monkeypatch.setattr("ortho_cli.decompose.kernels.find_spec", lambda name: None)
    assert not Kernels(plan_of(pico), on_event=null_sink).compiled
    told: list[Event] = []
    split(pico, pico.parent / "without", on_event=told.append)
    assert not [event for event in told if isinstance(event, Noted)]  # nobody asked for it
    assert files(pico.parent / "with") == files(pico.parent / "without")


def test_numba_that_cannot_be_loaded_is_noted_once(
    pico: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split(pico, pico.parent / "with")
    for module in ("numba_kernel", "numba_loops"):
        monkeypatch.delitem(sys.modules, f"ortho_cli.split.{module}")
        monkeypatch.delattr(f"ortho_cli.split.{module}")
    monkeypatch.setitem(sys.modules, "llvmlite", None)
    told: list[Event] = []
    split(pico, pico.parent / "without", workers=2, on_event=told.append)
    (note,) = [event for event in told if isinstance(event, Noted)]
    assert "split without numba, which is slower: " in note.message
    assert files(pico.parent / "with") == files(pico.parent / "without")


@pytest.mark.parametrize("first", [True, False])
def test_run_that_was_cut_off_is_finished_with_or_without_loops(pico: Path, first: bool) -> None:
    whole, cut = pico.parent / "whole", pico.parent / "cut"
    split(pico, whole)
    done = 0

    def stop(event: Event) -> None:
        nonlocal done
        done += isinstance(event, TensorDone)
        if done == 8:
            raise RuntimeError("cut off")

    with pytest.raises(RuntimeError, match="cut off"):
        split(pico, cut, compiled=first, on_event=stop)
    split(pico, cut, compiled=not first)
    assert files(whole) == files(cut)


def test_command_without_a_model_on_disk_to_measure_imports_no_torch(pico: Path) -> None:
    code = (
        "import sys\n"
        "from ortho_cli.cli import app as cli\n"
        "code = cli.run(sys.argv[1:])\n"
        "print('torch' in sys.modules, code, file=sys.stderr)\n"
    )
    command = [sys.executable, "-c", code, "decompose", str(pico), "-q"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ran.stderr.split() == ["False", "0"]
    report = json.loads((pico.parent / "pico-ortho" / "report.json").read_text())
    assert report["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("storage", ["full", "factored"])
def test_plan_peak_bounds_what_the_loops_hold(
    tmp_path: Path, passes: list[Pass], storage: str
) -> None:
    source, stats = tmp_path / "m.safetensors", tmp_path / "s.safetensors"
    save_file({"a.weight": torch.randn(8192, 2048).bfloat16()}, source)
    checkpoints.save_statistics(stats, source, storage=storage)
    split(source, tmp_path / "out", stats=stats)
    held = [one.kernel.nbytes for one in passes]
    made = plan_of(source, stats=stats)
    assert 0 < max(held) <= _buffer_bytes(made.tensors[0], made.statistics, False, made.sizes)
