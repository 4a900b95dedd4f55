from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from conftest import Ortho
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ortho_cli.errors import CheckpointError
from ortho_cli.split import dtypes
from ortho_cli.storage import checkpoint


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
    "a key twice": (raw_file(b'{"a": 1, "a": 2}'), "occurs twice, with different values"),
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


def test_shard_reader_replaced_file_is_noticed(pico: Path) -> None:
    found = checkpoint.open_checkpoint(pico)
    with (pico / "model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError, match="changed while it was read"):
        checkpoint.ShardReader(found.shards)


def test_model_name_file_folder_and_shard_are_named_alike(tmp_path: Path) -> None:
    assert checkpoint.model_name(tmp_path / "SmolLM2") == "SmolLM2"
    assert checkpoint.model_name(tmp_path / "SmolLM2.safetensors") == "SmolLM2"
    assert checkpoint.model_name(tmp_path / "m-00001-of-00002.safetensors") == "m"
    assert checkpoint.model_name(tmp_path / "Qwen2.5") == "Qwen2.5"


EXTRA = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], "stride": [1]}
TWICE = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"w":{"dtype":"F32","shape":[2],'
HEADERS: dict[str, bytes] = {
    "no metadata": raw_file({"w": entry()}, bytes(8)),
    "metadata null": raw_file({"__metadata__": None, "w": entry()}, bytes(8)),
    "metadata empty": raw_file({"__metadata__": {}, "w": entry()}, bytes(8)),
    "metadata last": raw_file({"w": entry(), "__metadata__": {"a": "b"}}, bytes(8)),
    "metadata a list": raw_file({"__metadata__": [], "w": entry()}, bytes(8)),
    "metadata of null": raw_file({"__metadata__": {"a": None}, "w": entry()}, bytes(8)),
    "spaces behind": raw_file(json.dumps({"w": entry()}).encode() + b"  \n", bytes(8)),
    "zeros behind": raw_file(json.dumps({"w": entry()}).encode() + b"\0\0", bytes(8)),
    "spaces before": raw_file(b" \n" + json.dumps({"w": entry()}).encode(), bytes(8)),
    "a byte order mark": raw_file(b"\xef\xbb\xbf" + json.dumps({"w": entry()}).encode(), bytes(8)),
    "out of order": raw_file({"b": entry(offsets=(8, 16)), "a": entry()}, bytes(16)),
    "unaligned": raw_file({"a": entry("U8", (1,), (0, 1)), "b": entry(offsets=(1, 9))}, bytes(9)),
    "a key more": raw_file({"w": EXTRA}, bytes(8)),
    "a tensor twice, alike": raw_file(TWICE + b'"data_offsets":[0,8]}}', bytes(8)),
    "no elements": raw_file({"w": entry(shape=[0, 4], offsets=[0, 0])}),
    "no elements between": raw_file(
        {"a": entry(), "z": entry(shape=[0], offsets=[8, 8]), "b": entry(offsets=[8, 16])},
        bytes(16),
    ),
    "no elements inside": raw_file({"a": entry(), "z": entry(shape=[0], offsets=[4, 4])}, bytes(8)),
    "no elements of large sides": raw_file({"w": entry(shape=[0, 2**62, 2**62], offsets=[0, 0])}),
    "a scalar": raw_file({"w": entry(shape=[], offsets=[0, 4])}, bytes(4)),
    "no name": raw_file({"": entry()}, bytes(8)),
    "half a byte": raw_file({"w": entry("F4", (3,), (0, 2))}, bytes(2)),
    "shape of floats": raw_file({"w": entry(shape=[2.0])}, bytes(8)),
    "dtype in small letters": raw_file({"w": entry("f32")}, bytes(8)),
    "a dtype of no reader": raw_file({"w": entry("F8_E3M4", (8,), (0, 8))}, bytes(8)),
    **{
        f"dtype {name}": raw_file({"w": entry(name, (8,), (0, bits))}, bytes(bits))
        for name, (bits, *_) in dtypes.DTYPES.items()
    },
}


@pytest.mark.parametrize("name", HEADERS)
def test_read_shard_takes_what_the_official_reader_takes(tmp_path: Path, name: str) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(HEADERS[name])
    try:
        with safe_open(path, "pt") as file:
            official = sorted((key, file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    except SafetensorError:
        with pytest.raises(CheckpointError):
            checkpoint.read_shard(path)
        return
    found = checkpoint.read_shard(path).tensors
    assert sorted((tensor.name, list(tensor.shape)) for tensor in found) == official


def test_read_shard_one_name_for_two_tensors_is_refused(tmp_path: Path) -> None:
    """The official reader takes the last; others take the first, so no file should hang on it."""
    path = tmp_path / "m.safetensors"
    path.write_bytes(
        raw_file(TWICE.replace(b"[2]", b"[1]", 1) + b'"data_offsets":[0,8]}}', bytes(8))
    )
    with pytest.raises(CheckpointError, match="occurs twice, with different values"):
        checkpoint.read_shard(path)


def test_shard_reader_more_shards_than_files_may_be_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {f"t{i:02d}": torch.full((3,), float(i)) for i in range(40)}
    checkpoints.save(tmp_path, tensors, shards=40)
    monkeypatch.setattr(checkpoint, "_open_files", lambda: 5)
    found = checkpoint.open_checkpoint(tmp_path)
    before = len(list(Path("/proc/self/fd").iterdir()))
    reader = checkpoint.ShardReader(found.shards)

    def read(number: int) -> float:
        tensor = found.tensors[number % 40]
        buffer = bytearray(12)
        reader.read_into(memoryview(buffer), tensor, start=0)
        return float(torch.frombuffer(buffer, dtype=torch.float32)[2])

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(read, range(400))) == [float(i % 40) for i in range(400)]
    assert len(list(Path("/proc/self/fd").iterdir())) - before <= 5 + 3
    reader.check_unchanged()
    with found.shards[7].path.open("ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError, match="changed while it was read"):
        reader.check_unchanged()
    reader.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


EMPTY = {
    "model.flag": torch.zeros(0),
    "model.layers.0.zero_proj.weight": torch.zeros(0, 64, dtype=torch.bfloat16),
    "model.layers.0.wide_proj.weight": torch.zeros(64, 0, dtype=torch.bfloat16),
    "model.experts": torch.zeros(0, 128, 128, dtype=torch.bfloat16),
    "model.scalar": torch.tensor(3.0),
    "a.numbers": torch.zeros(2, 0, 3, dtype=torch.int64),
}


@pytest.mark.parametrize("layout", ["csr", "compact"])
def test_tensors_without_elements_go_all_the_way(
    pico: Path, pico_tensors: dict[str, torch.Tensor], ortho: Ortho, layout: str
) -> None:
    (pico / "model.safetensors").unlink()
    torch.save({**pico_tensors, **EMPTY}, pico / "pytorch_model.bin")
    place = pico.parent
    source, made, dense = place / "source", place / "made", place / "dense"
    for words in (
        ("convert", pico, "-o", source),
        ("inspect", source),
        ("decompose", source, "-o", made, "--set", f"ortho.layout={layout}"),
        ("inspect", made, "--verify"),
        ("inspect", made, "--expect-source", source),
        ("convert", made, "--alpha", "1", "-o", dense),
        ("convert", made, "--alpha", "0", "-o", place / "base"),
    ):
        ran = ortho(*words)
        assert ran.code == 0, (words, ran.err)
    with safe_open(dense / "model.safetensors", "pt") as file:
        for name, tensor in EMPTY.items():
            assert torch.equal(file.get_tensor(name), tensor)
    (made / "report.json").unlink()
    assert ortho("inspect", made).code == 0


def test_notes_are_shown_by_every_command_that_reads_a_model(pico: Path, ortho: Ortho) -> None:
    save_file({"x": torch.ones(2)}, pico / "consolidated.safetensors")
    note = "not read, since `model.safetensors` is: `consolidated.safetensors`"
    out = pico.parent / "out"
    for words in (
        ("inspect", pico),
        ("decompose", pico, "--dry-run"),
        ("decompose", pico, "-o", out),
        ("convert", pico, "--dry-run"),
        ("convert", pico, "-o", pico.parent / "c"),
    ):
        assert ortho(*words).err.count(f"note: {note}") == 1, words
    assert ortho("inspect", pico, "--json").json["notes"].count(note) == 1
    assert ortho("decompose", pico, "-o", out, "--force", "-q").err == ""
