"""What lies under a wrong name is called what it is, with the command that gets the file itself."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import Ortho

from ortho_cli.storage import sniff


def torch_bytes(**options: bool) -> bytes:
    held = io.BytesIO()
    torch.save({"w": torch.zeros(2)}, held, **options)
    return held.getvalue()


def zipped() -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        archive.writestr("model/weights.txt", "x")
    return held.getvalue()


def tarred() -> bytes:
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("x"), io.BytesIO())
    return held.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
FILES = {
    "LFS": (LFS, sniff.LFS, "lfs pull --include model.safetensors"),
    "old LFS": (b"version https://hawser.github.com/spec/v1\n", sniff.LFS, "lfs pull"),
    "annex": (b"/annex/objects/SHA256E-s9--00.safetensors\n", sniff.ANNEX, "annex get"),
    "DVC": (b"outs:\n- md5: 00\n  size: 9\n", sniff.DVC, "dvc pull"),
    "page": (b"<!DOCTYPE html>\n<html>", sniff.PAGE, "hf download"),
    "page, indented": (b"\n  <html lang='en'>", sniff.PAGE, "hf download"),
    "XML": (b"<?xml version='1.0'?><Error><Code>AccessDenied", sniff.XML, "hf download"),
    "not found": (b"Entry not found", sniff.REFUSAL, "hf download"),
    "no password": (b"Invalid username or password.", sniff.REFUSAL, "hf download"),
    "JSON error": (b'{"error":"Repository not found"}', sniff.REFUSAL, "hf download"),
    "gated": (b"Access to model x/y is restricted.", sniff.REFUSAL, "hf download"),
    "empty": (b"", sniff.EMPTY, "hf download"),
    "zeros": (bytes(4096), sniff.ZEROS, "hf download"),
    "torch": (torch_bytes(), sniff.TORCH, "`ortho convert "),
    "old torch": (
        torch_bytes(_use_new_zipfile_serialization=False),
        sniff.OLD_TORCH,
        "`ortho conv",
    ),
    "GGUF": (b"GGUF\3\0\0\0" + bytes(64), sniff.GGUF, "model.gguf`, then `ortho convert"),
    "zip": (zipped(), sniff.ZIP, "`unzip "),
    "tar": (tarred(), sniff.TAR, "`tar -xf "),
    "gzip": (b"\x1f\x8b\x08\0", sniff.GZIP, "`gunzip -c "),
    "HDF5": (b"\x89HDF\r\n", "an HDF5 file", "hf download"),
    "age": (b"age-encryption.org/v1\n", sniff.SEALED, "--identity"),
}


@pytest.mark.parametrize("name", FILES)
def test_wrong_content_under_the_name_of_weights_is_called_what_it_is(
    tmp_path: Path, ortho: Ortho, name: str
) -> None:
    content, kind, hint = FILES[name]
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.safetensors").write_bytes(content)
    ran = ortho("decompose", tmp_path / "m")
    assert ran.code == 4
    assert kind in ran.err
    assert hint in ran.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("content", ["LFS", "page", "JSON error", "not found", "empty"])
def test_wrong_content_under_the_name_of_json_is_called_what_it_is(
    tmp_path: Path, ortho: Ortho, name: str, content: str
) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(FILES[content][0])
    ran = ortho("inspect", tmp_path)
    assert ran.code == 4
    assert f"{name}` is {FILES[content][1]}" in ran.err


@pytest.mark.parametrize("content", ["LFS", "page", "zip"])
def test_wrong_content_under_the_name_of_torch_is_called_what_it_is(
    tmp_path: Path, ortho: Ortho, content: str
) -> None:
    (tmp_path / "x.bin").write_bytes(FILES[content][0])
    ran = ortho("convert", tmp_path / "x.bin")
    assert ran.code == 4
    assert f"x.bin` is {FILES[content][1]}" in ran.err


@pytest.mark.parametrize("length", [2, 640, 0x7B80])
def test_kind_of_safetensors_whose_length_looks_like_another_mark(length: int) -> None:
    header = b"{" + b" " * (length - 2) + b"}"
    assert sniff.kind_of(length.to_bytes(8, "little") + header) == sniff.SAFETENSORS


@pytest.mark.parametrize("text", [b'{"model_type": "llama"}', b"plain words", b"\1\2\3"])
def test_kind_of_what_is_nothing_known_is_none(text: bytes) -> None:
    assert sniff.kind_of(text) is None


def test_unpacked_file_takes_the_place_of_no_other(tmp_path: Path) -> None:
    for name in ("m.safetensors", "m.bin"):
        (tmp_path / name).write_bytes(b"x")
    assert "> " + str(tmp_path / "m.safetensors.gz.unpacked") in sniff.remedy(
        sniff.GZIP, tmp_path / "m.safetensors.gz"
    )
    moved = sniff.remedy(sniff.TORCH, tmp_path / "m.safetensors")
    assert f"`mv {tmp_path}/m.safetensors {tmp_path}/m.safetensors.bin`" in moved


@pytest.mark.parametrize("before", [b"\xef\xbb\xbf\n", b'<?xml version="1.0"?>\n'])
def test_kind_of_page_behind_a_mark_or_a_prolog_is_a_page(before: bytes) -> None:
    assert sniff.kind_of(before + b"<!DOCTYPE html><html>") == sniff.PAGE
