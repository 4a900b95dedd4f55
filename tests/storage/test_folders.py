"""Which files of a folder are read: what transformers reads, and what has one reading only."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ortho_cli.errors import CheckpointError
from ortho_cli.storage import checkpoint, folders

Names = dict[str, float]


def write(path: Path, tensors: Names | None = None) -> None:
    """Write a file of tensors, each of one value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = tensors or {"a": 1.0}
    save_file({name: torch.full((4,), float(value)) for name, value in values.items()}, path)


def shards(folder: Path, parts: dict[str, Names], *, index: str = "model", **more: Any) -> Path:
    """Write shards and an index of all that is in them."""
    weight_map = {}
    for file, tensors in parts.items():
        write(folder / file, tensors)
        weight_map.update(dict.fromkeys(tensors, file))
    weight_map.update(more)
    path = folder / f"{index}.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def value(folder: Path, name: str) -> float:
    """Read the first element of a tensor by where the index says that it is."""
    found = checkpoint.open_checkpoint(folder)
    tensor = next(t for t in found.tensors if t.name == name)
    raw = (folder / tensor.shard).read_bytes()[tensor.offset : tensor.offset + 4]
    return float(torch.frombuffer(bytearray(raw), dtype=torch.float32))


TWO = {"model-00001-of-00002.safetensors": {"a": 1.0}, "model-00002-of-00002.safetensors": {"b": 2}}


def two_indexes(folder: Path) -> None:
    shards(folder, TWO)
    shards(folder, {"consolidated-00001-of-00001.safetensors": {"x": 1}}, index="consolidated")


def whole_beside_index(folder: Path) -> None:
    shards(folder, TWO)
    write(folder / "model.safetensors", {"w": 3})


def with_copy(folder: Path) -> None:
    shards(folder, TWO)
    write(folder / "consolidated.safetensors", {"x": 1})
    write(folder / "optimizer.safetensors", {"y": 1})


def diffusers(folder: Path) -> None:
    shards(folder, {"diffusion_pytorch_model-1.safetensors": {"a": 1}}, index=folders.DIFFUSERS)
    write(folder / "diffusion_pytorch_model.fp16.safetensors", {"h": 1})


def no_index(folder: Path) -> None:
    for file, tensors in TWO.items():
        write(folder / file, tensors)


def counted_from_zero(folder: Path) -> None:
    for number in range(2):
        write(folder / f"part-{number:05d}-of-00002.safetensors", {f"t{number}": 1})


def adapter_beside(folder: Path) -> None:
    write(folder / "weights.safetensors", {"w": 1})
    write(folder / "adapter_model.safetensors", {"lora": 1})


def named_by_config(folder: Path) -> None:
    write(folder / "model.safetensors", {"w": 1})
    write(folder / "other" / "x.safetensors", {"named": 1})
    (folder / "config.json").write_text('{"transformers_weights": "other/x.safetensors"}')


def below(folder: Path) -> None:
    (folder / "weights").mkdir(parents=True)
    shards(folder, {"weights/m.safetensors": {"a": 1}})


def mac(folder: Path) -> None:
    write(folder / "weights.safetensors", {"w": 1})
    (folder / "._weights.safetensors").write_bytes(b"\0\5\26\7")


READ: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "a second index": (two_indexes, "a b", "consolidated-00001"),
    "model.safetensors and an index": (whole_beside_index, "w", "model.safetensors.index.json"),
    "copies beside": (with_copy, "a b", "`optimizer.safetensors`"),
    "diffusers": (diffusers, "a", "fp16"),
    "shards without index": (no_index, "a b", "no index: all 2 shards"),
    "shards from 0": (counted_from_zero, "t0 t1", "no index"),
    "an adapter beside": (adapter_beside, "w", "adapter_model"),
    "named by config.json": (named_by_config, "named", "`model.safetensors`"),
    "shards in a folder below": (below, "a", ""),
    "what macOS leaves": (mac, "w", ""),
}


@pytest.mark.parametrize("name", READ)
def test_choose_one_reading_is_taken_and_the_rest_noted(tmp_path: Path, name: str) -> None:
    make, tensors, note = READ[name]
    folder = tmp_path / "m"
    folder.mkdir()
    make(folder)
    found = checkpoint.open_checkpoint(folder)
    assert " ".join(tensor.name for tensor in found.tensors) == tensors
    assert note in " ".join(found.notes)
    assert bool(found.notes) == bool(note)


def lacking_shard(folder: Path) -> None:
    write(folder / "model-00001-of-00003.safetensors")


def two_sets(folder: Path) -> None:
    write(folder / "x-00001-of-00001.safetensors")
    write(folder / "y-00001-of-00001.safetensors")


def two_odd_indexes(folder: Path) -> None:
    shards(folder, {"c.safetensors": {"x": 1}}, index="consolidated")
    shards(folder, {"d.safetensors": {"x": 1}}, index="model.fp16")


def bin_first(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"PK\3\4")
    write(folder / "model.fp16.safetensors")


def escapes(folder: Path) -> None:
    shards(folder, TWO, c="../other.safetensors")


def bins_listed(folder: Path) -> None:
    (folder / "pytorch_model-1.bin").write_bytes(b"PK\3\4")
    text = '{"weight_map": {"a": "pytorch_model-1.bin"}}'
    (folder / "model.safetensors.index.json").write_text(text)


def only_below(folder: Path) -> None:
    write(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def outside(folder: Path) -> None:
    (folder / "config.json").write_text('{"transformers_weights": "../x.safetensors"}')


REFUSED: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "a shard lacks": (lacking_shard, "lacks 2 of 3 shards", "hf download ORG/NAME model-00002-of"),
    "two sets": (two_sets, "2 sets of shards", "another folder"),
    "two odd indexes": (two_odd_indexes, "2 indexes and no", "`mv "),
    "pytorch_model.bin first": (bin_first, "as pytorch_model.bin", "`ortho convert "),
    "out of the folder": (escapes, "not a .safetensors name", "beside the index"),
    ".bin in the index": (bins_listed, "not a .safetensors name", "pytorch_model.bin.index.json"),
    "weights in a folder below": (only_below, "no weights", "/transformer`"),
    "config names a file outside": (outside, "transformers_weights", "restore"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_choose_open_question_is_refused_with_a_way_out(tmp_path: Path, name: str) -> None:
    make, message, hint = REFUSED[name]
    folder = tmp_path / "m"
    folder.mkdir()
    make(folder)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.open_checkpoint(folder)
    assert message in caught.value.message
    assert caught.value.hint is not None
    assert hint in caught.value.hint


def test_index_tensor_that_it_does_not_list_is_read_and_noted(tmp_path: Path) -> None:
    index = shards(tmp_path, {"model-1.safetensors": {"a": 1, "b": 2}})
    text = json.loads(index.read_text())
    del text["weight_map"]["b"]
    index.write_text(json.dumps(text))
    assert value(tmp_path, "b") == 2
    assert "`b`" in " ".join(checkpoint.open_checkpoint(tmp_path).notes)


def test_index_that_names_another_shard_is_noted(tmp_path: Path) -> None:
    parts = {**TWO, "model-00001-of-00002.safetensors": {"a": 1.0, "c": 1.0}}
    shards(tmp_path, parts, a="model-00002-of-00002.safetensors")
    assert value(tmp_path, "a") == 1
    assert "in another file than the index says: `a`" in checkpoint.open_checkpoint(tmp_path).notes


@pytest.mark.parametrize(
    ("told", "first", "expected"),
    [("y", 1.0, 2.0), ("x", 2.0, 2.0), ("x", 1.0, None), (None, 2.0, 2.0), (None, 1.0, None)],
)
def test_tensor_in_two_shards_is_what_every_reader_takes(
    tmp_path: Path, told: str | None, first: float, expected: float | None
) -> None:
    parts: dict[str, Names] = {"x.safetensors": {"a": first, "b": 0}, "y.safetensors": {"a": 2.0}}
    index = shards(tmp_path, parts)
    text = json.loads(index.read_text())
    text["weight_map"] = {"b": "x.safetensors", "c": "y.safetensors"}
    if told:
        text["weight_map"]["a"] = f"{told}.safetensors"
    write(tmp_path / "y.safetensors", {"a": 2.0, "c": 0})
    index.write_text(json.dumps(text))
    if expected is None:
        with pytest.raises(CheckpointError, match="with different values"):
            checkpoint.open_checkpoint(tmp_path)
    else:
        assert value(tmp_path, "a") == expected
        assert "in both `x.safetensors`" in " ".join(checkpoint.open_checkpoint(tmp_path).notes)


SPARE: dict[str, tuple[str, dict[str, Any], bool]] = {
    "tied head": ("lm_head.weight", {"tie_word_embeddings": True}, True),
    "tied in text_config": ("lm_head.weight", {"text_config": {"tie_word_embeddings": True}}, True),
    "tied by its class": ("lm_head.weight", {"model_type": "gemma2"}, True),
    "untied head": ("lm_head.weight", {"tie_word_embeddings": False}, False),
    "untied by its class": ("lm_head.weight", {"model_type": "llama"}, False),
    "says untied, class ties": (
        "lm_head.weight",
        {"model_type": "gemma2", "tie_word_embeddings": False},
        False,
    ),
    "computed buffer": ("model.layers.0.self_attn.rotary_emb.inv_freq", {}, True),
    "layer past the last": ("model.layers.2.up.weight", {"num_hidden_layers": 2}, True),
    "layer that is built": ("model.layers.1.up.weight", {"num_hidden_layers": 2}, False),
    "a weight": ("model.norm.weight", {"tie_word_embeddings": True}, False),
}


@pytest.mark.parametrize("name", SPARE)
def test_index_lists_what_no_shard_has(tmp_path: Path, name: str) -> None:
    tensor, config, spare = SPARE[name]
    shards(
        tmp_path,
        {"x.safetensors": {"model.embed_tokens.weight": 1}},
        **{tensor: "x.safetensors"},
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    if spare:
        assert f"`{tensor}`" in " ".join(checkpoint.open_checkpoint(tmp_path).notes)
    else:
        with pytest.raises(CheckpointError, match=r"in the index of .* and not in `x\.safe"):
            checkpoint.open_checkpoint(tmp_path)


def test_keys_twice_in_index_and_config_are_noted_as_python_reads_them(tmp_path: Path) -> None:
    write(tmp_path / "x.safetensors", {"a": 1})
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"metadata": {"total_size": NaN}, "weight_map": {"a": "y.safetensors", "a": '
        '"x.safetensors"}}'
    )
    (tmp_path / "config.json").write_text('{"model_type": "a", "model_type": "b", "x": 1, "x": 1}')
    found = checkpoint.open_checkpoint(tmp_path)
    assert found.config == {"model_type": "b", "x": 1}
    assert [note.split(" occurs")[0] for note in found.notes] == ["`model_type`", "`a`"]


def test_file_of_safetensors_by_another_name_is_read(tmp_path: Path) -> None:
    write(tmp_path / "x.safetensors", {"a": 1})
    (tmp_path / "x.safetensors").rename(tmp_path / "x.bin")
    assert (
        "`x.bin` is read as safetensors" in checkpoint.open_checkpoint(tmp_path / "x.bin").notes[0]
    )


def test_lone_shard_is_noted_as_a_part(tmp_path: Path) -> None:
    write(tmp_path / "m-00001-of-00002.safetensors")
    notes = checkpoint.open_checkpoint(tmp_path / "m-00001-of-00002.safetensors").notes
    assert "one shard of several" in notes[0]
