from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from ortho_cli.storage.checkpoint import read_shard

Ortho = Callable[..., Any]
WEIGHT = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def source(pico: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pico, tmp_path / "source"))


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_origin_is_shown_of_any_artifact(artifact: Path, ortho: Ortho) -> None:
    whole = json.loads(ortho("inspect", artifact, "--json").out)
    origin = {key: whole[key] for key in ("plan_sha256", "recipe", "source_digest")}
    (artifact / "report.json").unlink()
    without = json.loads(ortho("inspect", artifact, "--json").out)
    assert {key: without[key] for key in origin} == origin
    assert without["versions"] == {"ortho": whole["versions"]["ortho"]}
    (artifact / "ortho.safetensors").unlink()
    alone = json.loads(ortho("inspect", artifact, "--json").out)
    assert {key: alone[key] for key in origin} == origin | {"source_digest": None}
    shown = ortho("inspect", artifact).out
    assert f"source unknown, plan {origin['plan_sha256'][:16]}, ortho " in shown
    assert 'recipe saliency.kind="residual"' in shown


def test_expected_source_is_found_whatever_its_shards(
    artifact: Path, source: Path, tmp_path: Path, ortho: Ortho
) -> None:
    one = {}
    for shard in source.glob("*.safetensors"):
        one |= load_file(shard)
    whole = tmp_path / "whole.safetensors"
    save_file(one, whole)
    for path in (source, whole):
        for report in (True, False):
            if not report:
                (artifact / "report.json").rename(tmp_path / "report.json")
            ran = ortho("inspect", artifact, "--expect-source", path)
            assert ran.code == 0, ran.err
            assert f"made from {path}: {len(one)} tensors, every byte" in ran.out
        (tmp_path / "report.json").rename(artifact / "report.json")


def test_another_source_is_told_by_its_first_tensor_that_differs(
    artifact: Path, source: Path, ortho: Ortho
) -> None:
    shard, tensor = next(
        (path, tensor)
        for path in source.glob("*.safetensors")
        for tensor in read_shard(path).tensors
        if tensor.name == WEIGHT
    )
    content = bytearray(shard.read_bytes())
    content[tensor.offset + tensor.nbytes - 1] ^= 1
    shard.write_bytes(content)
    ran = ortho("inspect", artifact, "--expect-source", source)
    assert (ran.code, ran.out) == (6, "")
    assert f"tensor `{WEIGHT}` of `{source}` is {tensor.dtype}" in ran.err
    assert "hint: this artifact was made from another checkpoint" in ran.err
    (artifact / "report.json").unlink()
    ran = ortho("inspect", artifact, "--expect-source", source)
    assert ran.code == 6
    assert f"`{source}` has digest" in ran.err


def test_source_with_other_tensors_is_told_before_it_is_read(
    artifact: Path, tmp_path: Path, ortho: Ortho
) -> None:
    import torch

    other = tmp_path / "other.safetensors"
    save_file({"alien.weight": torch.zeros(2, 2)}, other)
    ran = ortho("inspect", artifact, "--expect-source", other)
    assert ran.code == 6
    assert f"`{other}` has a tensor `alien.weight`, unlike the source" in ran.err


def test_base_alone_knows_no_source(artifact: Path, source: Path, ortho: Ortho) -> None:
    (artifact / "report.json").unlink()
    (artifact / "ortho.safetensors").unlink()
    ran = ortho("inspect", artifact, "--expect-source", source)
    assert ran.code == 6
    assert "holds no digest of its source" in ran.err


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("plan_sha256", lambda report: report.update(plan_sha256="0" * 64)),
        ("source_digest", lambda report: report.update(source_digest="0" * 64)),
        ("recipe", lambda report: report["recipe"]["ortho"].update(density=0.5)),
        ("ortho_version", lambda report: report["versions"].update(ortho="9.9.9")),
    ],
)
@pytest.mark.parametrize("options", [(), ("--verify",)])
def test_report_of_another_origin_is_refused(
    key: str, change: Callable[[dict[str, Any]], Any], options: tuple[str, ...],
    artifact: Path, ortho: Ortho,
) -> None:  # fmt: skip
    rewrite(artifact / "report.json", change)
    ran = ortho("inspect", artifact, *options)
    assert ran.code == 6
    assert f"`{key}` is" in ran.err
    assert "in report.json and" in ran.err


@pytest.mark.parametrize("what", ["source", "nothing"])
def test_only_artifacts_have_an_expected_source(what: str, source: Path, ortho: Ortho) -> None:
    ran = ortho("inspect", source.with_name(what), "--expect-source", source)
    code, said = {
        "source": (2, "is no artifact, and --expect-source"),
        "nothing": (4, "does not exist"),
    }[what]
    assert ran.code == code
    assert said in ran.err
