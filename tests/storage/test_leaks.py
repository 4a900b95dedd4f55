"""Weights and secrets are known by their names and by their bytes."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from ortho_cli.storage import side_files
from ortho_cli.storage.leaks import holds_secret, holds_weights, names_secret, names_weights
from ortho_cli.storage.side_files import Why, choose
from tests.storage.test_side_files import AGE, PEM, PIECES, ROW, TOKEN

RAW = np.random.default_rng(0).standard_normal(50_000).astype("<f4").tobytes()


def made_by_torch(*, new: bool) -> bytes:
    file = io.BytesIO()
    torch.save({"w": torch.ones(9)}, file, _use_new_zipfile_serialization=new)
    return file.getvalue()


def made_by_numpy() -> bytes:
    file = io.BytesIO()
    np.save(file, np.ones(9))
    return file.getvalue()


def made_by_tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("w"))
    return file.getvalue()


WEIGHTS = {
    "safetensors": save({"w": torch.ones(9)}),
    "safetensors cut": save({"w": torch.ones(90)})[:90],
    "torch": made_by_torch(new=True),
    "torch before 1.6": made_by_torch(new=False),
    "pickle": pickle.dumps({"w": RAW}),
    "numpy": made_by_numpy(),
    "gguf": b"GGUF" + struct.pack("<IQQ", 3, 0, 0),
    "gguf, big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "ggml": b"lmgg" + RAW,
    "hdf5": b"\x89HDF\r\n\x1a\n" + RAW,
    "onnx": b"\x08\x0a\x12\x07pytorch" + b"\x3a\x10" + b"x" * 16,
    "tflite": b"\x1c\0\0\0TFL3" + RAW,
    "llamafile": b"MZqFpD='\n" + RAW,
    "gzip": gzip.compress(RAW),
    "bzip2": bz2.compress(RAW),
    "xz": lzma.compress(RAW),
    "zstd": b"\x28\xb5\x2f\xfd" + b"x" * 99,
    "tar": made_by_tar(),
    "raw": RAW,
    "raw behind text": b"[PAD]\n" * 99_999 + RAW,
}


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_weights_are_known_by_their_bytes_under_the_name_of_a_tokenizer(
    tmp_path: Path, kind: str, name: str
) -> None:
    (tmp_path / name).write_bytes(WEIGHTS[kind])
    assert choose(tmp_path).left_out == ((name, Why.WEIGHTS),)


TEXTS = {
    "json": '{"{": 0, "secret": 1, "prompt": 2, "\\u0000": 3}',
    "one line of rows": '[{"text": "a", "secret": "b"}]',
    "vocabulary": "[PAD]\n\u6f22\nsecret\nkey\n-----BEGIN\nPRIVATE\nPRIVATE KEY\nhf_\nAKIA\n",
    "example": "export HF_TOKEN=hf_xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx\nAGE-SECRET-KEY-...\n",
    "empty": "",
    "brace": "{",
}


@pytest.mark.parametrize("kind", TEXTS)
def test_text_is_neither_weights_nor_a_secret(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a").write_text(TEXTS[kind])
    size = (tmp_path / "a").stat().st_size
    for belongs in ("text", "pieces", "any"):
        assert not holds_weights(tmp_path / "a", size, kind=belongs)
    assert not holds_secret(tmp_path / "a")


def test_sentencepiece_models_of_any_size_and_licences_as_pdf_are_no_weights(
    tmp_path: Path,
) -> None:
    for content in (PIECES, PIECES[:400], b"\n\x08\n\x05piece\x12\x04spec", b"\n\x84\x01\n" + RAW):
        (tmp_path / "a").write_bytes(content)
        told = holds_weights(tmp_path / "a", len(content), kind="pieces")
        assert told == (content[-9:] == RAW[-9:])
    (tmp_path / "a").write_bytes(b"%PDF-1.7\n\0\0")
    assert not holds_weights(tmp_path / "a", 11, kind="text")


SECRETS = {
    "age": AGE, "age, lower case": AGE.lower(), "pem": PEM, "row": ROW, "token": TOKEN,
    "rows": json.dumps([json.loads(ROW)], indent=1), "row behind a mark": "\ufeff\n" + ROW,
    "sealed": "age-encryption.org/v1\n-> X25519 abc\n",
    "armoured": "-----BEGIN AGE ENCRYPTED FILE-----\nYWdl\n",
    "post-quantum": AGE.replace("KEY-1", "KEY-PQ-1"),
    "github": "token: ghp_aB3dE5fG7hI9jK1lM3nO5pQ7rS9tU1vW3xY5",
    "aws": "aws_access_key_id = AKIAZ2QW3ER4TY5UI6OP\n",
    "pgp": "-----BEGIN PGP PRIVATE KEY BLOCK-----\n\nlQ\n",
    "putty": "PuTTY-User-Key-File-3: ssh-ed25519\n",
    "far inside": "a" * ((1 << 20) - 8) + AGE,
}  # fmt: skip


TOKENS = (
    "hf_aBcDeFgHiJkLmNoPqRsTuVwXyZaBcDeFgH", "AKIA" + "ABCDEFGHIJKLMNOP",
    "github_pat_" + "11AbCdEfGh0IjKlMnOpQr_" * 4, "hf_oauth_" + "aBcDeFgHiJkLmNoPqRsTu",
    "sk-proj-" + "aB3dE5gH7jK9mN1pQ3sT", "glpat-" + "aB3dE5gH7jK9mN1pQ3sT",
)  # fmt: skip


@pytest.mark.parametrize("token", TOKENS)
@pytest.mark.parametrize(
    "around", ["{}", "\n{}\n", '{{"t": "\\n{}\\n"}}', "a?token%3D{}", "\\u000a{}"]
)
def test_access_tokens_are_known_behind_escapes_too(
    tmp_path: Path, token: str, around: str
) -> None:
    (tmp_path / "x.json").write_text(around.format(token))
    assert holds_secret(tmp_path / "x.json")


@pytest.mark.parametrize("kind", SECRETS)
def test_secrets_are_known_by_their_bytes(tmp_path: Path, kind: str) -> None:
    (tmp_path / "tokenizer.json").write_text(SECRETS[kind])
    assert holds_secret(tmp_path / "tokenizer.json")
    assert choose(tmp_path).left_out == (("tokenizer.json", Why.SECRET),)


NAMES_OF_WEIGHTS = """
    model.safetensors model.safetensors.bak model.safetensors.1 model.safetensors-old a.bin
    model.ckpt.data-00000-of-00001 model.onnx_data_1 __0_0.distcp m.nemo m.tar.gz w.mlmodel
    w.pth.tar m.llamafile MODEL.GGUF a.GGUF.part x.pt2 rng_state_0.pth flax_model.msgpack w.h5
    w.npz w.zip
"""
NAMES_OF_SECRETS = """
    .env .env.local prod.env id_rsa id_ed25519.pub server.pem tls.key key.txt keys.json API_KEY
    my-key.txt identity.txt age-identity pass.txt Passphrase passwords.csv secrets.yaml forget.jsonl
    my_forget_set.json canaries.jsonl nonmember.jsonl ortho.key.age a.gpg .netrc credentials token
    hf_token gcloud-service-account.json vault.kdbx
"""
NAMES_OF_NEITHER = """
    config.json README.md README.pt_BR.md LICENSE-2.0 tokens.md monkey.txt keyboard.txt
    tokenization_glm.py key_cache.py compass.md bypass.txt notes.txt train.txt
"""


@pytest.mark.parametrize(
    "name",
    NAMES_OF_WEIGHTS.split(),
)
def test_names_of_weights(name: str) -> None:
    assert names_weights(name)
    assert not names_secret(name)


@pytest.mark.parametrize(
    "name",
    NAMES_OF_SECRETS.split(),
)
def test_names_of_secrets(name: str) -> None:
    assert names_secret(name)


@pytest.mark.parametrize(
    "name",
    [*sorted(side_files.VOCABULARIES | side_files.SETTINGS), *NAMES_OF_NEITHER.split()],
)
def test_names_of_neither(name: str) -> None:
    assert not names_secret(name)
    if name != "README.pt_BR.md":  # a language, and an extension of torch: copied by its list
        assert not names_weights(name)
