"""The device's way of splitting, on torch's CPU: what no card is needed for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from conftest import SmallTiles
from safetensors.torch import save_file
from torch import Tensor

from ortho_cli.errors import OrthoError
from ortho_cli.events import Advanced, Event, Noted
from ortho_cli.split.cuda_kernel import CudaKernel
from ortho_cli.split.sizes import Sizes
from tests.split.test_numba_kernel import DTYPES, error_of, files, names_given, odd_weights, split

HERE = "cpu:0"  # torch's name for the same device, and not ours for the usual way


def check_alike(source: Path, folder: Path, *sets: str, **options: Any) -> None:
    """Split on the device and by the general splitter: the same bytes."""
    with pytest.MonkeyPatch.context() as patch:
        passes = names_given(patch, CudaKernel, "finish")
        there = split(source, folder / "there", *sets, device=HERE, **options)
    assert passes
    here = split(source, folder / "here", *sets, compiled=False, **options)
    assert files(folder / "there") == files(folder / "here")
    assert there["totals"]["sqnr_db_alpha_0"] == pytest.approx(
        here["totals"]["sqnr_db_alpha_0"], abs=2e-4
    )
    assert there["totals"]["nnz"] == here["totals"]["nnz"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("density", [0.0, 0.005, 0.2, 1.0])
@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("tile", [1, 1000, 1 << 22])
def test_device_gives_the_bytes_of_the_general_splitter(
    tmp_path: Path, dtype: torch.dtype, density: float, bits: int, tile: int
) -> None:
    save_file({"a.weight": odd_weights(dtype)}, tmp_path / "m.safetensors")
    sets = (f"ortho.density={density}", f"base.bits={bits}")
    check_alike(tmp_path / "m.safetensors", tmp_path, *sets, sizes=Sizes(device=tile))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32, "gram", "factored"])
def test_device_with_curvature_gives_the_same_bytes(
    tmp_path: Path, small_tiles: SmallTiles, stored: Any
) -> None:
    source, stats = tmp_path / "m.safetensors", tmp_path / "stats.safetensors"
    weight = odd_weights(torch.bfloat16)
    weight[11:13] = 0
    save_file({"a.weight": weight, "b.weight": weight[:32].clone()}, source)

    def flatten(tensors: dict[str, Tensor]) -> None:
        for key, values in tensors.items():
            if values.dim() == 2 and key.startswith("a."):
                values[3], values[20:24], values[24] = values[2], 0, 1e-38

    kind = "gram" if stored == "gram" else "fisher"
    storage = "factored" if stored == "factored" else "full"
    kept = stored if isinstance(stored, torch.dtype) else torch.float32
    checkpoints.save_statistics(
        stats, source, kind=kind, storage=storage, dtype=kept, change=flatten
    )
    check_alike(source, tmp_path, "ortho.density=0.02", stats=stats, sizes=small_tiles)
    small_tiles.prove("device", "split")


def test_device_any_workers_and_shards_the_same_and_every_byte_is_told(tmp_path: Path) -> None:
    tensors = checkpoints.weights(hidden=64, mlp=96, layers=2, vocab=40, kv=16, bias=True)
    checkpoints.save(tmp_path / "m", tensors, shards=2)
    moved: list[Event] = []
    check_alike(tmp_path / "m", tmp_path, workers=3, on_event=moved.append)
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert sum(event.nbytes for event in moved if isinstance(event, Advanced)) == 2 * total


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_device_names_a_weight_that_is_not_finite(tmp_path: Path, bad: float) -> None:
    weight = odd_weights(torch.bfloat16)
    weight[90, 77] = bad
    save_file({"a.weight": weight}, tmp_path / "m.safetensors")
    there = error_of(tmp_path / "m.safetensors", tmp_path / "out", device=HERE)
    assert f"`a.weight` of `m.safetensors` holds {bad} at [90, 77]" in there.message


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1e-9])
@pytest.mark.parametrize("storage", ["full", "factored"])
def test_device_names_what_is_no_curvature(tmp_path: Path, bad: float, storage: str) -> None:
    source, stats = tmp_path / "m.safetensors", tmp_path / "stats.safetensors"
    save_file({"a.weight": odd_weights(torch.bfloat16)[:11].contiguous()}, source)

    def spoil(tensors: dict[str, Tensor]) -> None:
        key = "a.retain_curvature" + ("_rows" if storage == "factored" else "")
        tensors[key][(5, 17) if tensors[key].dim() == 2 else 5] = bad

    dtype = torch.float32
    checkpoints.save_statistics(stats, source, storage=storage, dtype=dtype, change=spoil)
    found = error_of(source, tmp_path / "out", stats=stats, device=HERE)
    assert "curvature is finite and >= 0" in found.message


def test_device_judges_an_overflow_as_the_general_splitter_does(tmp_path: Path) -> None:
    weight = torch.ones(64, 64)
    weight[1, 3] = -65472.0
    save_file({"a.weight": weight.half()}, tmp_path / "m.safetensors")
    said = []
    for options in ({"device": HERE}, {"compiled": False}):
        with pytest.raises(OrthoError) as caught:
            split(tmp_path / "m.safetensors", tmp_path / "out", **options)
        said.append((caught.value.message, caught.value.hint))
    assert said[0] == said[1]
    assert "overflows F16 when dequantized" in said[0][0]


def test_device_leaves_what_needs_more_than_one_pass_to_the_processor(pico: Path) -> None:
    told: list[Event] = []
    there = split(pico, pico.parent / "a", "base.scale=mse", device=HERE, on_event=told.append)
    (note,) = [event for event in told if isinstance(event, Noted)]
    assert "split on the CPU" in note.message
    assert there["versions"]["device"] == "cpu"
    split(pico, pico.parent / "b", "base.scale=mse")
    assert files(pico.parent / "a") == files(pico.parent / "b")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card")
@pytest.mark.parametrize("dtype", DTYPES)
def test_card_gives_the_bytes_of_the_processor(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = checkpoints.weights(hidden=256, mlp=704, layers=2, vocab=64, dtype=dtype)
    tensors["odd.weight"] = odd_weights(dtype)
    checkpoints.save(tmp_path / "m", tensors)
    stats = tmp_path / "stats.safetensors"
    checkpoints.save_statistics(stats, tmp_path / "m", skip=("odd.weight",))
    report = split(tmp_path / "m", tmp_path / "there", workers=3, device="cuda")
    assert report["versions"]["device"] == "cuda"
    split(tmp_path / "m", tmp_path / "here")
    assert files(tmp_path / "there") == files(tmp_path / "here")
    only = ("ignore=['*odd*']",)
    split(tmp_path / "m", tmp_path / "there-f", *only, stats=stats, device="cuda:0")
    split(tmp_path / "m", tmp_path / "here-f", *only, stats=stats)
    assert files(tmp_path / "there-f") == files(tmp_path / "here-f")
