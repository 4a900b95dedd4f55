"""Checkpoints of others as sources: what is read, what is refused, what is said of the rest."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ortho, SmallTiles
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ortho_cli.convert.sources import torch_files
from ortho_cli.convert.sources.open_source import FORMATS, open_source
from ortho_cli.convert.sources.safetensors_files import RowReader
from ortho_cli.errors import CheckpointError

Tensors = dict[str, Tensor]


def small() -> Tensors:
    generator = torch.Generator().manual_seed(0)
    return {
        "z.weight": torch.randn(5, 7, generator=generator),
        "a.bias": torch.randn(7, generator=generator).to(torch.float16),
        "experts": torch.randn(3, 4, 6, generator=generator).to(torch.bfloat16),
        "steps": torch.tensor(7),
        "mask": torch.tensor([True, False, True]),
    }


def same(left: Tensors, right: Tensors) -> bool:
    return left.keys() == right.keys() and all(
        left[k].dtype == right[k].dtype and torch.equal(left[k], right[k]) for k in left
    )


def converted(ortho: Ortho, source: Path, *options: object) -> tuple[Tensors, dict[str, str], str]:
    out = source.parent / f"{source.name}-out"
    ran = ortho("convert", source, "-o", out, *options)
    assert ran.code == 0, ran.err
    file = out / "model.safetensors"
    with safe_open(file, framework="pt") as opened:
        return load_file(file), opened.metadata(), ran.err


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth"])
@pytest.mark.parametrize("legacy", [False, True])
def test_torch_file_keeps_every_tensor(
    tmp_path: Path, ortho: Ortho, suffix: str, legacy: bool
) -> None:
    source = tmp_path / f"m{suffix}"
    torch.save(small(), source, _use_new_zipfile_serialization=not legacy)
    found, metadata, _ = converted(ortho, source)
    assert same(found, small())
    assert metadata["format"] == "pt"
    assert metadata["ortho_role"] == "dense"


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_nested_weights_are_taken_and_the_rest_is_named(
    tmp_path: Path, ortho: Ortho, key: str
) -> None:
    torch.save({key: {**small(), "kind": "x"}, "epoch": 3}, tmp_path / "m.pt")
    found, _, said = converted(ortho, tmp_path / "m.pt")
    assert same(found, small())
    assert f"under `{key}`" in said
    assert f"`epoch`, `{key}.kind`" in said


class Runs:
    """What an attacker would save."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("legacy", [False, True])
def test_file_that_would_run_code_is_refused_by_name_and_runs_nothing(
    tmp_path: Path, ortho: Ortho, legacy: bool
) -> None:
    ran_it = tmp_path / "owned"
    source = tmp_path / "m.bin"
    content = {**small(), "x": Runs(ran_it)}
    torch.save(content, source, _use_new_zipfile_serialization=not legacy)
    ran = ortho("convert", source)
    assert ran.code == CheckpointError.exit_code
    assert "`posix.system`" in ran.err
    assert "nothing was run" in ran.err
    assert not ran_it.exists()
    torch.load(source, weights_only=False)  # the trap is live: who reads it carelessly is caught
    assert ran_it.exists()
    assert not (tmp_path / "m-converted").exists()


@pytest.mark.parametrize("kept", [10, 700, -100])
def test_cut_torch_file_is_refused(tmp_path: Path, ortho: Ortho, kept: int) -> None:
    source = tmp_path / "m.bin"
    torch.save(small(), source)
    source.write_bytes(source.read_bytes()[:kept])
    ran = ortho("convert", source)
    assert ran.code == CheckpointError.exit_code
    assert ("no readable torch file" if kept else "is an empty file") in ran.err
    assert ran.err.count("\n") == 2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([1, 2], "holds a list"),
        ({"lr": 1.0}, "no tensors of a model among 1 entries: `lr`"),
        (torch.zeros(3), "holds a Tensor"),
        ({"w": torch.eye(3).to_sparse()}, "`w`"),
    ],
)
def test_torch_file_without_plain_tensors_is_refused(
    tmp_path: Path, ortho: Ortho, content: Any, said: str
) -> None:
    torch.save(content, tmp_path / "m.bin")
    ran = ortho("convert", tmp_path / "m.bin")
    assert ran.code == CheckpointError.exit_code
    assert said in ran.err


def tied_folder(folder: Path, config: dict[str, Any]) -> Tensors:
    folder.mkdir()
    tensors = small()
    tensors["model.embed_tokens.weight"] = tensors["lm_head.weight"] = tensors.pop("z.weight")
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


def test_tied_tensor_is_kept_once_and_recorded(tmp_path: Path, ortho: Ortho) -> None:
    tensors = tied_folder(tmp_path / "m", {"tie_word_embeddings": True})
    del tensors["lm_head.weight"]
    found, metadata, said = converted(ortho, tmp_path / "m")
    assert same(found, tensors)
    assert metadata["lm_head.weight"] == "model.embed_tokens.weight"
    assert "`lm_head.weight` is the same memory as `model.embed_tokens.weight`: kept once" in said
    again, metadata, _ = converted(ortho, tmp_path / "m-out")  # the record outlives a second one
    assert same(again, tensors)
    assert metadata["lm_head.weight"] == "model.embed_tokens.weight"


def test_untied_tensor_is_written_out(tmp_path: Path, ortho: Ortho) -> None:
    tensors = tied_folder(tmp_path / "m", {"tie_word_embeddings": False})
    found, metadata, said = converted(ortho, tmp_path / "m")
    assert same(found, tensors)
    assert "lm_head.weight" not in metadata
    assert "copies" in said


def test_views_and_transposed_tensors_are_written_as_values(tmp_path: Path, ortho: Ortho) -> None:
    whole = torch.arange(60.0)
    tensors = {
        "head": whole[:30],
        "overlap": whole[20:50].view(5, 6),
        "transposed": whole.view(6, 10).t(),
        "swapped": whole.view(3, 4, 5).transpose(0, 2),
        "expanded": whole[:4].expand(3, 4),
        "negative": torch.randn(4, dtype=torch.complex64).conj(),
    }
    torch.save(tensors, tmp_path / "m.bin")
    found, _, _ = converted(ortho, tmp_path / "m.bin")
    assert same(found, tensors)


def test_mapped_file_is_opened_anew_between_tensors_and_only_there(
    tmp_path: Path, ortho: Ortho, monkeypatch: pytest.MonkeyPatch, small_tiles: SmallTiles
) -> None:
    loads, load = [], torch_files._load

    def count(path: Path, *given: Any) -> Any:
        loads.append(path)
        return load(path, *given)

    monkeypatch.setattr(torch_files, "REMAP_BYTES", 0)
    monkeypatch.setattr(torch_files, "_load", count)
    torch.save(small(), tmp_path / "m.bin")
    sizes = replace(small_tiles, convert=7)
    with sizes.in_commands():
        found, _, _ = converted(ortho, tmp_path / "m.bin")
    sizes.prove("convert")
    assert same(found, small())
    assert len(loads) == 1 + len(small())
    loads.clear()
    torch.save(small(), tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    with sizes.in_commands():
        found, _, _ = converted(ortho, tmp_path / "old.bin")
    assert same(found, small())
    assert len(loads) == 2  # held whole: to read it again would free nothing


def shards(folder: Path) -> dict[str, str]:
    folder.mkdir()
    tensors = small()
    names = list(tensors)
    weight_map = {}
    for i in range(2):
        file = f"pytorch_model-{i + 1:05d}-of-00002.bin"
        torch.save({name: tensors[name] for name in names[i::2]}, folder / file)
        weight_map |= dict.fromkeys(names[i::2], file)
    return weight_map


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "pytorch_model.bin.index.json").write_text(text)


def test_sharded_bins_are_read_through_their_index(tmp_path: Path, ortho: Ortho) -> None:
    write_index(tmp_path / "m", shards(tmp_path / "m"))
    (tmp_path / "m" / "tokenizer.json").write_text("{}")
    found, _, _ = converted(ortho, tmp_path / "m")
    assert same(found, small())
    kept = sorted(p.name for p in (tmp_path / "m-out").iterdir())
    assert kept == ["model.safetensors", "tokenizer.json"]


@pytest.mark.parametrize(
    ("name", "file", "said"),
    [
        ("steps", "../outside.bin", "not a .bin name in its folder"),
        ("steps", "pytorch_model-00003-of-00003.bin", "is not there"),
        ("absent", "pytorch_model-00001-of-00002.bin", "`absent` is in the index"),
    ],
)
def test_index_that_does_not_fit_is_refused(
    tmp_path: Path, ortho: Ortho, name: str, file: str, said: str
) -> None:
    torch.save({"steps": torch.tensor(1)}, tmp_path / "outside.bin")
    write_index(tmp_path / "m", {**shards(tmp_path / "m"), name: file})
    ran = ortho("convert", tmp_path / "m")
    assert ran.code == CheckpointError.exit_code
    assert said in ran.err


def test_safetensors_come_before_bins_and_what_is_left_is_named(
    tmp_path: Path, ortho: Ortho
) -> None:
    tied_folder(tmp_path / "m", {})
    save_file(small(), tmp_path / "m" / "model.safetensors")
    torch.save({"other": torch.zeros(2)}, tmp_path / "m" / "pytorch_model.bin")
    found, _, said = converted(ortho, tmp_path / "m")
    assert same(found, small())
    assert "not copied: `pytorch_model.bin` (weights, or looks like them)" in said


def test_source_that_changes_is_noticed(tmp_path: Path) -> None:
    torch.save(small(), tmp_path / "m.bin")
    source = open_source(tmp_path / "m.bin")
    source.check_unchanged()
    torch.save({**small(), "more": torch.zeros(9)}, tmp_path / "m.bin")
    with pytest.raises(CheckpointError, match="changed while it was read"):
        source.check_unchanged()
    (tmp_path / "m.bin").unlink()
    with pytest.raises(CheckpointError, match="vanished"):
        source.check_unchanged()


@pytest.mark.parametrize("dtype", [(), ("--dtype", "bfloat16")])
def test_rows_too_wide_to_hold_are_converted_alike(
    tmp_path: Path,
    ortho: Ortho,
    monkeypatch: pytest.MonkeyPatch,
    small_tiles: SmallTiles,
    dtype: tuple[str, ...],
) -> None:
    save_file(small(), tmp_path / "m.safetensors")
    expected = converted(ortho, tmp_path / "m.safetensors", *dtype)[0]
    monkeypatch.setattr(
        "ortho_cli.convert.sources.safetensors_files.WIDEST", 5
    )  # of rows of 6 and 7
    sizes = replace(small_tiles, convert=4)
    reads = []
    monkeypatch.setattr(
        "ortho_cli.convert.sources.safetensors_files.RowReader.rows",
        lambda self, info, start, rows, columns, read=RowReader.rows: (
            reads.append(rows * columns) or read(self, info, start, rows, columns)
        ),
    )
    with sizes.in_commands():
        found = converted(ortho, tmp_path / "m.safetensors", "--force", *dtype)[0]
    sizes.prove("convert")
    assert same(found, expected)
    assert max(reads) == 4


def test_only_the_last_format_takes_any_path(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    for path in (tmp_path / "absent", tmp_path / "m"):
        taken = [form.recognize(path, None) is not None for form in FORMATS]
        assert taken == [False] * (len(FORMATS) - 1) + [True]
