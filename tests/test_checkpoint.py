from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ortho_cli import checkpoint
from ortho_cli.errors import CheckpointError


def raw_file(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is an empty file"),
    "seven bytes": (b"\0" * 7, "has 7 bytes"),
    "header longer than the file": (raw_file(b"{}", length=99), "claims a header of 99 bytes"),
    "header of 2^62": (raw_file(b"{}", length=2**62), f"claims a header of {2**62} bytes"),
    "header of zero": (raw_file(b""), "is a file of zeros"),
    "not JSON": (raw_file(b"{nonsense"), "is not valid JSON"),
    "an array": (raw_file(b"[1]"), "starts with b'['"),
    "not UTF-8": (raw_file(b'{"\xff": 1}'), "is not valid JSON"),
    "a lone surrogate": (raw_file({"\ud800": entry()}, bytes(8)), "is not valid JSON"),
    "nested too deeply": (raw_file(b'{"a":' * 20_000), "is not valid JSON"),
    "NaN in JSON": (raw_file(b'{"a": NaN}'), "is not valid JSON"),
    "a key twice": (raw_file(b'{"a": 1, "a": 2}'), "stands twice, with different values"),
    "metadata of numbers": (raw_file({"__metadata__": {"a": 1}}), "not a map of strings"),
    "entry not an object": (raw_file({"w": 3}), "is not described by"),
    "entry without shape": (raw_file({"w": {"dtype": "F32", "data_offsets": [0, 0]}}), "described"),
    "unknown dtype": (raw_file({"w": entry("F33")}, bytes(8)), "has dtype 'F33'"),
    "dtype a list": (raw_file({"w": entry(["F32"])}, bytes(8)), "has dtype ['F32']"),
    "negative shape": (raw_file({"w": entry(shape=[-2])}, bytes(8)), "shape [-2]"),
    "shape of floats": (raw_file({"w": entry(shape=[2.0])}, bytes(8)), "shape [2.0]"),
    "shape of booleans": (raw_file({"w": entry(shape=[True])}, bytes(8)), "shape [True]"),
    "huge shape": (raw_file({"w": entry(shape=[2**62, 2**62])}, bytes(8)), "has 8 bytes where"),
    "negative offset": (raw_file({"w": entry(offsets=[-8, 0])}, bytes(8)), "not two counts"),
    "offset of 2^62": (raw_file({"w": entry(offsets=[0, 2**62])}, bytes(8)), "claims bytes 0 to"),
    "offsets reversed": (raw_file({"w": entry(offsets=[8, 0])}, bytes(8)), "claims bytes 8 to 0"),
    "bytes unlike shape": (raw_file({"w": entry(shape=[3])}, bytes(8)), "has 8 bytes where"),
    "overlap": (raw_file({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)), "overlaps `a`"),
    "hole": (raw_file({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20)), "leaves a hole"),
    "truncated data": (raw_file({"w": entry()}, bytes(7)), "claims bytes 0 to 8 of 7"),
    "something appended": (raw_file({"w": entry()}, bytes(9)), "end at byte"),
    "no tensors": (raw_file({}), "holds no tensors"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_open_checkpoint_bad_file_is_one_sentence(tmp_path: Path, name: str) -> None:
    content, expected = BAD_FILES[name]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.open_checkpoint(path)
    assert expected in caught.value.message
    assert str(path) in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 200), flips=st.lists(st.tuples(st.integers(0, 199), st.integers(0, 255))))
def test_open_checkpoint_mutated_file_opens_or_refuses(
    tmp_path: Path, cut: int, flips: list[tuple[int, int]]
) -> None:
    content = bytearray(raw_file({"a": entry(), "b": entry("BF16", (4,), (8, 16))}, bytes(16)))
    for position, value in flips:
        content[position % len(content)] = value
    path = tmp_path / "mutated.safetensors"
    path.write_bytes(content[: len(content) - cut] if cut < len(content) else b"")
    try:
        found = checkpoint.open_checkpoint(path)
    except CheckpointError:
        return
    assert all(t.offset + t.nbytes <= path.stat().st_size for t in found.tensors)


def test_open_checkpoint_official_writer_agrees(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(6, dtype=torch.int64).view(2, 3),
        "b": torch.ones(3, dtype=torch.bfloat16),
        "c": torch.tensor(2.0),
    }
    save_file(tensors, tmp_path / "m.safetensors", metadata={"format": "pt"})
    found = {t.name: t for t in checkpoint.open_checkpoint(tmp_path / "m.safetensors").tensors}
    assert {n: (t.dtype, t.shape) for n, t in found.items()} == {
        "a": ("I64", (2, 3)),
        "b": ("BF16", (3,)),
        "c": ("F32", ()),
    }


def sharded(folder: Path) -> Path:
    tensors = {name: torch.ones(4, 4) for name in ("a", "b", "c")}
    checkpoints.save(folder, tensors, shards=2)
    return folder / "model.safetensors.index.json"


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


BAD_INDEXES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "missing file": (
        lambda d: d["weight_map"].update(a="model-00009-of-00009.safetensors"),
        "which is not there",
    ),
    "absolute path": (
        lambda d: d["weight_map"].update(a="/etc/a.safetensors"),
        "not a .safetensors name",
    ),
    "parent folder": (
        lambda d: d["weight_map"].update(a="../a.safetensors"),
        "not a .safetensors name",
    ),
    "a number": (lambda d: d["weight_map"].update(a=3), "not a .safetensors name"),
    "no weight_map": (lambda d: d.pop("weight_map"), "has no `weight_map`"),
    "empty weight_map": (lambda d: d.update(weight_map={}), "has no `weight_map`"),
    "unknown tensor": (
        lambda d: d["weight_map"].update(z="model-00001-of-00002.safetensors"),
        "tensor `z` is in the index",
    ),
}


@pytest.mark.parametrize("name", BAD_INDEXES)
def test_open_checkpoint_bad_index_is_refused(tmp_path: Path, name: str) -> None:
    change, expected = BAD_INDEXES[name]
    rewrite(sharded(tmp_path), change)
    with pytest.raises(CheckpointError, match=expected):
        checkpoint.open_checkpoint(tmp_path)


def test_open_checkpoint_tensor_in_two_shards_names_both(tmp_path: Path) -> None:
    sharded(tmp_path)
    save_file(
        {"a": torch.zeros(4, 4), "b": torch.ones(4, 4)},
        tmp_path / "model-00002-of-00002.safetensors",
    )
    with pytest.raises(CheckpointError, match=r"in both `model-00001.*different values, and the"):
        checkpoint.open_checkpoint(tmp_path)


def test_open_checkpoint_folder_without_weights_says_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no weights"):
        checkpoint.open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"only pytorch_model\.bin"):
        checkpoint.open_checkpoint(tmp_path)


def test_open_checkpoint_several_files_without_index_is_refused(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_file({name: torch.ones(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=r"2 .safetensors files and no index"):
        checkpoint.open_checkpoint(tmp_path)


def test_open_checkpoint_missing_path_and_wrong_suffix_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        checkpoint.open_checkpoint(tmp_path / "nothing")
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"not \.safetensors"):
        checkpoint.open_checkpoint(tmp_path / "model.bin")


def test_open_checkpoint_unreadable_places_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"is a link to .*nowhere`, which is not there"):
        checkpoint.open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"cannot read .*: file name too long"):
        checkpoint.open_checkpoint(tmp_path / ("a" * 300))


def test_extra_files_weights_and_hidden_folders_are_left_out(pico: Path) -> None:
    (pico / ".git").mkdir()
    (pico / ".git" / "HEAD").write_text("x")
    (pico / ".gitattributes").write_text("x")
    (pico / "pytorch_model.bin").write_bytes(b"x")
    (pico / "link.txt").symlink_to(pico / "tokenizer.json")
    names = [name for name, _ in checkpoint.open_checkpoint(pico).extra_files]
    assert names == [
        ".gitattributes",
        "config.json",
        "link.txt",
        "tokenizer.json",
        "extra/notes.txt",
    ]


def test_shard_reader_replaced_file_is_noticed(pico: Path) -> None:
    found = checkpoint.open_checkpoint(pico)
    with (pico / "model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError, match="changed while it was read"):
        checkpoint.ShardReader(found)


def test_model_name_file_folder_and_shard_are_named_alike(tmp_path: Path) -> None:
    assert checkpoint.model_name(tmp_path / "SmolLM2") == "SmolLM2"
    assert checkpoint.model_name(tmp_path / "SmolLM2.safetensors") == "SmolLM2"
    assert checkpoint.model_name(tmp_path / "m-00001-of-00002.safetensors") == "m"
    assert checkpoint.model_name(tmp_path / "Qwen2.5") == "Qwen2.5"
