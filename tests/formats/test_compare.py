"""Two artifacts, or an artifact and a checkpoint: what differs is what the values say."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import own_reader
import pytest
import torch
from conftest import Ortho, SmallTiles
from safetensors.torch import load_file, save_file

from ortho_cli.formats.compare import compare
from ortho_cli.formats.open_artifact import open_artifact
from ortho_cli.storage.checkpoint import open_checkpoint

DOWN = "model.layers.1.mlp.down_proj"


def decomposed(pico: Path, ortho: Ortho, name: str, *sets: str) -> Path:
    words = (word for one in sets for word in ("--set", one))
    assert ortho("decompose", pico, "-o", pico.parent / name, "-q", *words).code == 0
    return pico.parent / name


def rows(document: dict[str, Any]) -> dict[str, Any]:
    return {tensor["name"]: tensor for tensor in document["tensors"]}


def distance(one: Any, other: Any) -> float:
    """Take the relative difference in the most obvious way."""
    one, other = (torch.as_tensor(value).double() for value in (one, other))
    return float((one - other).norm() / other.norm())


def values(folder: Path, module: str) -> tuple[Any, Any, Any]:
    """Codes, and values at alpha 0 and 1, by a reader that shares no code with the package."""
    found = own_reader.weight(folder, module)
    return found.codes, found.base, found.full


@pytest.mark.parametrize("change", ["ortho.layout=compact", "base.scale=mse"])
def test_two_artifacts_differ_by_what_their_values_do(
    pico: Path, ortho: Ortho, small_tiles: SmallTiles, change: str
) -> None:
    first = decomposed(pico, ortho, "a", "ortho.density=0.05")
    second = decomposed(pico, ortho, "b", "ortho.density=0.02", change)
    document = compare(open_artifact(first), open_artifact(second), sizes=small_tiles)
    small_tiles.prove("convert")
    found = rows(document)
    for module in open_artifact(first).split:
        mine, theirs = values(first, module), values(second, module)
        told = found[f"{module}.weight"]
        assert told["difference_alpha_0"] == pytest.approx(distance(theirs[1], mine[1]), rel=1e-6)
        assert told["difference_alpha_1"] == pytest.approx(distance(theirs[2], mine[2]), rel=1e-5)
        assert told["codes_differ"] == pytest.approx(float((mine[0] != theirs[0]).mean()))
        assert told["same"] is False
    assert found["model.norm.weight"]["same"] is True
    assert document["totals"]["differ"] == 14


def test_codes_of_another_width_have_no_share_that_differs(pico: Path, ortho: Ortho) -> None:
    both = decomposed(pico, ortho, "a"), decomposed(pico, ortho, "b", "base.bits=3")
    document = compare(*map(open_artifact, both))
    split = [row for row in document["tensors"] if row["first"]["action"] == "split"]
    assert {row["codes_differ"] for row in split} == {None}
    assert all(0.1 < row["difference_alpha_0"] < 0.5 for row in split)


def test_an_artifact_differs_from_its_source_by_the_decibels_of_its_report(
    pico: Path, artifact: Path
) -> None:
    for order in (1, -1):
        pair: list[Any] = [open_artifact(artifact), open_checkpoint(pico)][::order]
        document = compare(*pair)
        assert document["reference"] == ("second" if order == 1 else "first")
        report: dict[str, Any] = {}
        for tensor in (open_artifact(artifact).report or {})["tensors"]:
            report[tensor["name"]] = tensor
        for name, tensor in rows(document).items():
            if report[name]["action"] == "copy":
                assert tensor["same"] is True
                continue
            for alpha in (0, 1):
                energy = 10 ** (-report[name][f"sqnr_db_alpha_{alpha}"] / 20)
                assert tensor[f"difference_alpha_{alpha}"] == pytest.approx(energy, rel=1e-3)


def test_the_same_artifact_is_the_same_and_one_moved_code_is_found(
    pico: Path, artifact: Path
) -> None:
    other = pico.parent / "other"
    shutil.copytree(artifact, other)
    assert compare(open_artifact(artifact), open_artifact(other))["totals"]["differ"] == 0
    path = other / "model.safetensors"
    raw = bytearray(path.read_bytes())
    info = next(t for t in open_artifact(other).base.tensors if t.name == f"{DOWN}.weight_packed")
    raw[info.offset] ^= 1
    path.write_bytes(raw)
    (other / "report.json").unlink()
    document = compare(open_artifact(artifact), open_artifact(other))
    assert [name for name, row in rows(document).items() if not row["same"]] == [f"{DOWN}.weight"]
    assert rows(document)[f"{DOWN}.weight"]["codes_differ"] == 1 / (64 * 192)
    assert document["totals"]["codes_differ"] > 0


def test_without_ortho_alpha_1_is_not_known(pico: Path, artifact: Path) -> None:
    (artifact / "ortho.safetensors").unlink()
    document = compare(open_artifact(artifact), open_checkpoint(pico))
    assert document["first"]["ortho"] is False
    assert {row["difference_alpha_1"] for row in document["tensors"] if not row["same"]} == {None}
    assert document["totals"]["difference_alpha_1"] is None
    assert document["totals"]["difference_alpha_0"] > 0.01


def test_other_tensors_and_shapes_are_named_and_what_has_no_arithmetic_is_told_by_bytes(
    pico: Path, artifact: Path
) -> None:
    weights = pico / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 3)
    tensors["new"] = torch.zeros(2)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)
    tensors["model.embed_tokens.weight"][0, 0] = torch.nan
    del tensors["model.layers.1.input_layernorm.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    document = compare(open_artifact(artifact), open_checkpoint(pico))
    assert document["only_in_first"] == ["model.layers.1.input_layernorm.weight"]
    assert document["only_in_second"] == ["new"]
    assert [other["name"] for other in document["other_shapes"]] == [
        "model.layers.0.mlp.up_proj.weight"
    ]
    for name in ("model.norm.weight", "model.embed_tokens.weight"):
        row = rows(document)[name]
        assert (row["same"], row["difference_alpha_0"]) == (False, None)
