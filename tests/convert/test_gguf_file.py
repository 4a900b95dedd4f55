"""GGUF files on the disk: what is no GGUF, parts of a split model, byte order, types."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Ortho
from safetensors.numpy import load_file

from ortho_cli.convert.sources.gguf_file import check_type, open_model
from ortho_cli.errors import CheckpointError

pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")
import ggufs  # noqa: E402 - it needs the two

Kind = gguf.GGMLQuantizationType
pytestmark = pytest.mark.filterwarnings("ignore")  # other people's deprecations


@pytest.fixture(scope="module")
def llama() -> Any:
    """A llama of random weights, which no test changes."""
    return ggufs.make("llama")


def weights(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "model.safetensors")


def readable() -> list[Any]:
    found = []
    for kind in Kind:
        _, nbytes = gguf.GGML_QUANT_SIZES[kind]
        try:
            gguf.quants.dequantize(np.zeros((1, nbytes), np.uint8), kind)
        except NotImplementedError:
            continue
        found.append(kind)
    return found


def blocks(shape: tuple[int, int], kind: Any) -> np.ndarray:
    """Make random blocks of a type whose 16-bit scales are of a usual size."""
    rng = np.random.default_rng(0)
    per, nbytes = gguf.GGML_QUANT_SIZES[kind]
    made = rng.integers(0, 256, (shape[0], shape[1] // per, nbytes), dtype=np.uint8)
    scales = rng.uniform(0.01, 0.02, (*made.shape[:2], nbytes // 2)).astype(np.float16)
    raw = scales.view(np.uint8).reshape(*made.shape[:2], -1)
    known = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "TQ1_0": (52,), "TQ2_0": (64,)}
    for at in known.get(kind.name, (0, 2)):
        made[..., at : at + 2] = raw[..., :2]
    return made.reshape(shape[0], -1)


def encode(values: np.ndarray, kind: Any) -> np.ndarray:
    if kind == Kind.F32:
        return values
    if kind == Kind.F16:
        return values.astype(np.float16)
    try:
        return gguf.quants.quantize(values, kind)
    except NotImplementedError:
        return blocks(values.shape, kind)


def finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_type(path: Path, kind: Any, *, big: bool = False) -> np.ndarray:
    """Write one matrix of a type; return what it is in float32."""
    order = gguf.GGUFEndian.BIG if big else gguf.GGUFEndian.LITTLE
    values = np.random.default_rng(1).standard_normal((6, 512)).astype(np.float32)
    data = encode(values, kind)
    writer = gguf.GGUFWriter(path, "llama", endianess=order)
    if data.dtype == np.uint8:
        wanted = gguf.quants.dequantize(np.array(data), kind)
        data = swap_blocks(data, kind) if big else data
        writer.add_tensor("output.weight", data, raw_dtype=kind)
    else:
        wanted = data.astype(np.float32)
        writer.add_tensor("output.weight", data)
    finish(writer)
    return wanted


# The structs of ggml-common.h: (format of the fields that are wider than a byte).
STRUCTS = {
    "BF16": "H", "Q4_0": "H16x", "Q4_1": "HH16x", "Q8_0": "H32x", "Q2_K": "16x64xHH",
    "Q3_K": "32x64x12xH", "Q4_K": "HH12x128x", "Q5_K": "HH12x32x128x",
    "Q6_K": "128x64x16xH", "IQ4_NL": "H16x", "TQ1_0": "48x4xH", "TQ2_0": "64xH",
    "MXFP4": "17x", "NVFP4": "36x",
}  # fmt: skip


KNOWN = [name for name in STRUCTS if name in Kind.__members__]  # older packages have fewer


def swap_blocks(data: np.ndarray, kind: Any) -> np.ndarray:
    """Write each block as a big-endian machine's struct, field by field."""
    form = STRUCTS[kind.name]
    size = struct.calcsize(f"<{form}")
    assert size == gguf.GGML_QUANT_SIZES[kind][1]
    out = bytearray(data.tobytes())
    for at in range(0, len(out), size):
        values = struct.unpack_from(f"<{form}", out, at)
        kept = bytes(out[at : at + size])
        packed = bytearray(struct.pack(f">{form}", *values))
        held = struct.pack(f">{form}", *[0xFFFF] * len(values))
        for i in range(size):  # padding is the bytes themselves
            out[at + i] = packed[i] if held[i] else kept[i]
    return np.frombuffer(bytes(out), np.uint8).reshape(data.shape)


@pytest.mark.parametrize("kind", readable(), ids=lambda kind: kind.name)
def test_every_type_that_the_package_dequantizes_is_read_bit_by_bit(
    tmp_path: Path, kind: Any
) -> None:
    wanted = write_type(tmp_path / "m.gguf", kind)
    (tensor,) = open_model(tmp_path / "m.gguf").tensors
    check_type(tensor)
    assert tensor.shape == wanted.shape
    assert tensor.floats().dtype == np.float32
    assert np.array_equal(tensor.floats(), wanted, equal_nan=True)
    assert np.array_equal(tensor.floats(2), wanted[2], equal_nan=True)


@pytest.mark.parametrize("kind", ["Q8_1", "F64", "I32"])
def test_type_that_the_package_cannot_dequantize_is_refused_by_name(
    tmp_path: Path, ortho: Ortho, llama: Any, kind: str
) -> None:
    number = Kind[kind]
    per, nbytes = gguf.GGML_QUANT_SIZES[number]
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for key, value in ggufs.keys_of(llama, "llama").items():
        ggufs.add_key(writer, f"llama.{key}", value)
    for name, values in ggufs.tensors_of(llama, "llama").items():
        if name == "blk.1.ffn_up.weight":
            raw = np.zeros((len(values), values.shape[1] // per * nbytes), np.uint8)
            writer.add_tensor(name, raw, raw_dtype=number)
        else:
            writer.add_tensor(name, values)
    finish(writer)
    ran = ortho("convert", tmp_path / "m.gguf", "-o", tmp_path / "out")
    assert ran.code == CheckpointError.exit_code
    assert f"`blk.1.ffn_up.weight` of `{tmp_path}/m.gguf` is {kind}" in ran.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["F32", "F16", *KNOWN])
def test_big_endian_file_is_read_as_big_endian(tmp_path: Path, name: str) -> None:
    wanted = write_type(tmp_path / "m.gguf", Kind[name], big=True)
    assert (tmp_path / "m.gguf").read_bytes()[4:8] == b"\0\0\0\3"
    (tensor,) = open_model(tmp_path / "m.gguf").tensors
    assert np.array_equal(tensor.floats(), wanted, equal_nan=True)


@pytest.mark.parametrize("name", ["F32", "F16"])
def test_big_endian_model_is_what_a_reading_by_hand_gives(
    tmp_path: Path, ortho: Ortho, llama: Any, name: str
) -> None:
    path = tmp_path / "m.gguf"
    ggufs.write(path, llama, "llama", kind=Kind[name], endian=gguf.GGUFEndian.BIG)
    found = {t.name: t for t in gguf.GGUFReader(path).tensors}
    ran = ortho("convert", path, "-o", tmp_path / "out")
    assert ran.code == 0, ran.err
    for ours, theirs, form in (
        ("lm_head.weight", "output.weight", {"F32": ">f4", "F16": ">f2"}[name]),
        ("model.norm.weight", "output_norm.weight", ">f4"),
    ):
        at, size = found[theirs].data_offset, found[theirs].n_bytes
        by_hand = np.frombuffer(path.read_bytes()[at : at + size], form).astype(np.float32)
        assert np.array_equal(weights(tmp_path / "out")[ours].reshape(-1), by_hand)


@pytest.mark.parametrize("name", ["Q5_0", "IQ2_XXS", "IQ4_XS"])
def test_big_endian_blocks_without_one_layout_are_refused(
    tmp_path: Path, ortho: Ortho, name: str
) -> None:
    path = tmp_path / "m.gguf"
    kind = Kind[name]
    writer = gguf.GGUFWriter(path, "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_tensor("output.weight", blocks((ggufs.VOCAB, 256), kind), raw_dtype=kind)
    finish(writer)
    ran = ortho("convert", path)
    assert ran.code == CheckpointError.exit_code
    assert f"`output.weight` of `{path}` is {name} in a big-endian file" in ran.err


@pytest.mark.parametrize("name", ["BF16", "Q8_0", "Q4_K"])
def test_little_endian_blocks_in_a_big_endian_file_are_refused(
    tmp_path: Path, ortho: Ortho, name: str
) -> None:
    path = tmp_path / "m.gguf"
    kind = Kind[name]
    rng = np.random.default_rng(0)
    values = rng.standard_normal((ggufs.VOCAB, 256)).astype(np.float32)
    writer = gguf.GGUFWriter(path, "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_tensor("output.weight", encode(values, kind), raw_dtype=kind)  # left as they are
    finish(writer)
    ran = ortho("convert", path)
    assert ran.code == CheckpointError.exit_code
    assert "with little-endian blocks" in ran.err


def test_big_endian_file_has_its_tokenizer_and_config(
    tmp_path: Path, ortho: Ortho, llama: Any
) -> None:
    told = []
    for name, order in (("l", gguf.GGUFEndian.LITTLE), ("b", gguf.GGUFEndian.BIG)):
        ggufs.write(tmp_path / f"{name}.gguf", llama, "llama", endian=order, vocabulary=True)
        assert ortho("convert", tmp_path / f"{name}.gguf", "-o", tmp_path / name).code == 0
        names = ("config.json", "tokenizer.json", "tokenizer_config.json")
        told.append([json.loads((tmp_path / name / file).read_text()) for file in names])
    assert told[0] == told[1]


HEADS = {
    "it is a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
    "it is an HTML page": b"\n<!DOCTYPE html><html><head><title>404</title></head></html>",
    "it is a GGML file": b"lmgg" + bytes(60),
    "it is a GGMF file": b"fmgg" + bytes(60),
    "it is a GGJT file": b"tjgg" + bytes(60),
    "of version 1": b"GGUF\1\0\0\0" + bytes(60),
    "of version 4": b"GGUF\4\0\0\0" + bytes(60),
    "of version 9": b"GGUF\0\0\0\x09" + bytes(60),
    "it is an empty file": b"",
    "after 12 bytes": b"GGUF\3\0\0\0\0\0\0\0",
    "it is a zip archive": b"PK\3\4" + bytes(60),
    "begins with b'\\x01\\x02": b"\1\2\3\4" + bytes(60),
    "promises": b"GGUF\3\0\0\0" + (9).to_bytes(8, "little") + (9).to_bytes(8, "little") + bytes(9),
}


@pytest.mark.parametrize("told", HEADS)
def test_file_that_is_no_gguf_is_called_what_it_is(tmp_path: Path, ortho: Ortho, told: str) -> None:
    (tmp_path / "m.gguf").write_bytes(HEADS[told])
    ran = ortho("convert", tmp_path / "m.gguf", "-o", tmp_path / "out")
    assert ran.code == CheckpointError.exit_code
    assert f"`{tmp_path}/m.gguf` cannot be read as GGUF: " in ran.err
    assert told in ran.err
    assert not (tmp_path / "out").exists()


def test_gguf_of_version_2_is_read(tmp_path: Path, ortho: Ortho, llama: Any) -> None:
    ggufs.write(tmp_path / "m.gguf", llama, "llama")
    raw = bytearray((tmp_path / "m.gguf").read_bytes())
    raw[4] = 2
    (tmp_path / "m.gguf").write_bytes(raw)
    assert ortho("convert", tmp_path / "m.gguf", "-o", tmp_path / "out").code == 0


def test_gguf_under_another_name_is_known_by_its_first_bytes(
    tmp_path: Path, ortho: Ortho, llama: Any
) -> None:
    ggufs.write(tmp_path / "m.gguf", llama, "llama")
    (tmp_path / "m.gguf").rename(tmp_path / "sha256-0123")
    ran = ortho("convert", tmp_path / "sha256-0123", "-o", tmp_path / "out")
    assert ran.code == 0, ran.err


def test_vocabulary_without_tensors_is_refused(tmp_path: Path, ortho: Ortho, llama: Any) -> None:
    every = tuple(ggufs.tensors_of(llama, "llama"))
    ggufs.write(tmp_path / "m.gguf", llama, "llama", drop=every)
    ran = ortho("convert", tmp_path / "m.gguf")
    assert ran.code == CheckpointError.exit_code
    assert "holds no tensors" in ran.err


@pytest.mark.parametrize(
    ("arch", "key", "value", "told"),
    [
        ("clip", "general.type", "mmproj", "is a projector"),
        ("llama", "general.type", "adapter", "`general.type` is adapter"),
        ("llama", "adapter.type", "lora", "holds no model"),
    ],
)
def test_gguf_that_holds_no_model_is_refused(
    tmp_path: Path, ortho: Ortho, arch: str, key: str, value: str, told: str
) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", arch)
    writer.add_string(key, value)
    writer.add_tensor("a", np.zeros(4, np.float32))
    finish(writer)
    ran = ortho("convert", tmp_path / "m.gguf")
    assert ran.code == CheckpointError.exit_code
    assert told in ran.err


@pytest.fixture
def parts(tmp_path: Path, llama: Any) -> list[Path]:
    """A llama in several files, in a folder of its own."""
    folder = tmp_path / "split"
    folder.mkdir()
    ggufs.write(folder / "tiny.gguf", llama, "llama", split=8, vocabulary=True)
    found = sorted(folder.iterdir())
    assert [path.name for path in found] == [f"tiny-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    return found


@pytest.mark.parametrize("given", [0, 1, 2, "folder"])
def test_split_model_is_joined_whichever_part_is_given(
    tmp_path: Path, ortho: Ortho, llama: Any, parts: list[Path], given: int | str
) -> None:
    source = parts[0].parent if given == "folder" else parts[int(given)]
    ran = ortho("convert", source, "-o", tmp_path / "out")
    assert ran.code == 0, ran.err
    found = weights(tmp_path / "out")
    wanted = llama.state_dict()
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name], wanted[name].numpy()) for name in wanted)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not config.get("tie_word_embeddings")
    assert (tmp_path / "out" / "tokenizer.json").exists()


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_missing_part_is_named(ortho: Ortho, parts: list[Path], lost: int) -> None:
    parts[lost].unlink()
    ran = ortho("convert", parts[(lost + 1) % 3])
    assert ran.code == CheckpointError.exit_code
    assert f"one of 3 parts, and `{parts[lost].name}` is missing" in ran.err
    assert ortho("convert", parts[0].parent).code == CheckpointError.exit_code


def test_parts_under_each_others_names_are_refused(ortho: Ortho, parts: list[Path]) -> None:
    aside = parts[1].with_suffix(".x")
    parts[1].rename(aside)
    parts[2].rename(parts[1])
    aside.rename(parts[2])
    ran = ortho("convert", parts[0])
    assert ran.code == CheckpointError.exit_code
    assert "says that it is part 2 of 3" in ran.err


def test_part_of_another_model_is_refused(
    tmp_path: Path, ortho: Ortho, llama: Any, parts: list[Path]
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    ggufs.write(other / "tiny.gguf", llama, "llama", split=8, extra={"a": np.zeros(4, np.float32)})
    (other / parts[1].name).replace(parts[1])
    ran = ortho("convert", parts[0])
    assert ran.code == CheckpointError.exit_code
    assert "`split.tensors.count` is 22" in ran.err


def test_part_twice_is_refused(ortho: Ortho, parts: list[Path]) -> None:
    raw = bytearray(parts[1].read_bytes())
    at = raw.index(b"split.no") + len("split.no") + 4
    raw[at] = 2
    parts[2].write_bytes(raw)
    ran = ortho("convert", parts[0])
    assert ran.code == CheckpointError.exit_code
    assert "parts" in ran.err


def test_part_under_a_name_of_its_own_is_refused(ortho: Ortho, parts: list[Path]) -> None:
    alone = parts[1].with_name("part.gguf")
    parts[1].rename(alone)
    ran = ortho("convert", alone)
    assert ran.code == CheckpointError.exit_code
    assert "is part 2 of 3" in ran.err


def test_cut_part_is_refused(ortho: Ortho, parts: list[Path]) -> None:
    parts[2].write_bytes(parts[2].read_bytes()[:-200])
    ran = ortho("convert", parts[0])
    assert ran.code == CheckpointError.exit_code
    assert f"`{parts[2]}` cannot be read as GGUF: it ends before" in ran.err


def test_folder_of_several_models_lists_them_with_a_command(
    tmp_path: Path, ortho: Ortho, llama: Any, parts: list[Path]
) -> None:
    folder = parts[0].parent
    ggufs.write(folder / "another.gguf", llama, "llama")
    ran = ortho("convert", folder, "-o", tmp_path / "out")
    assert ran.code == CheckpointError.exit_code
    assert "holds 2 GGUF models: `another.gguf`, `tiny-00001-of-00003.gguf`" in ran.err
    assert f"`ortho convert {folder / 'another.gguf'}`" in ran.err
    assert ortho("convert", folder / "another.gguf", "-o", tmp_path / "out").code == 0


def test_projector_beside_a_model_is_not_the_model(
    tmp_path: Path, ortho: Ortho, llama: Any
) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "mmproj-tiny-F16.gguf").write_bytes(b"GGUF")
    ran = ortho("convert", folder)
    assert ran.code == CheckpointError.exit_code
    assert "no GGUF file of a language model" in ran.err
    ggufs.write(folder / "tiny.gguf", llama, "llama")
    ran = ortho("convert", folder, "-o", tmp_path / "out")
    assert ran.code == 0, ran.err
    assert "`mmproj-tiny-F16.gguf` beside it is no part of the model" in ran.err


def test_model_in_a_folder_of_the_folder_is_named(ortho: Ortho, parts: list[Path]) -> None:
    ran = ortho("convert", parts[0].parent.parent)
    assert ran.code == CheckpointError.exit_code
    assert f"`ortho convert {parts[0]}`" in ran.err
