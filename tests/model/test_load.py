"""Models as transformers builds them: which claims are refused, and what a folder lacks."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Literal

import checkpoints
import pytest
import torch
from conftest import Ortho
from families import saved
from safetensors.torch import load_file, save_file

import ortho_cli
from ortho_cli.errors import CheckpointError
from ortho_cli.model import load as models

SOUND: dict[str, dict[str, Any]] = {
    "Qwen's window": {"num_hidden_layers": 2, "max_window_layers": 80},
    "any window": {"num_hidden_layers": 2, "max_window_layers": 10**9},
    "DeepSeek": {"num_hidden_layers": 61, "n_routed_experts": 512, "num_nextn_predict_layers": 1},
    "ALBERT shares its layers": {"num_hidden_layers": 48},
    "Swin": {"depths": [2, 2, 18, 2]},
    "places and switches": {"mlp_only_layers": [3, 900], "share_link_tower_layers": True},
    "nested": {"thinker_config": {"text_config": {"num_hidden_layers": 126}}},
    "one per so many layers": {"global_attn_every_n_layers": 10**6, "max_depth": 1e9},
    "experts that are rows of a tensor": {"num_hidden_layers": 32, "num_experts": 16384},
    "as many layers as tensors": {"num_hidden_layers": 1500},
}
UNSOUND: dict[str, tuple[dict[str, Any], str]] = {
    "layers": ({"num_hidden_layers": 10**6}, "`num_hidden_layers` is 1000000"),
    "by another name": ({"n_layer": 1e12}, "`n_layer` is 1000000000000.0"),
    "infinite": ({"num_layers": float("inf")}, "`num_layers` is inf"),
    "no number": ({"num_layers": float("nan")}, "`num_layers` is nan"),
    "in a list": ({"depths": [2, 10**7]}, "`depths` is 10000000"),
    "nested deep": ({"a": {"b": {"encoder_layers": 10**5}}}, "`encoder_layers` is 100000"),
    "experts": ({"num_local_experts": 5000}, "`num_local_experts` is 5000"),
    "layers of experts": ({"num_hidden_layers": 1000, "num_experts": 4000}, "1000 layers of 4000"),
}


@pytest.mark.parametrize("name", SOUND)
def test_check_parts_sound_config_passes(name: str) -> None:
    models.check_parts(SOUND[name], layers=1500, told=Path("config.json"), sizes={16384, 64})


@pytest.mark.parametrize("name", UNSOUND)
def test_check_parts_what_python_would_build_for_ever_is_refused(name: str) -> None:
    config, said = UNSOUND[name]
    began = time.monotonic()
    with pytest.raises(CheckpointError) as caught:
        models.check_parts(config, layers=20, told=Path("config.json"), sizes={10**6})
    assert said in caught.value.message
    assert time.monotonic() - began < 1


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("tokenizer.json", b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        ("tokenizer_config.json", b"<!doctype html>", "an HTML page"),
        ("tokenizer.json", b"Entry not found", "an error message ('Entry not found')"),
    ],
)
def test_load_tokenizer_that_is_none_is_called_what_it_is(
    pico: Path, name: str, content: bytes, expected: str
) -> None:
    checkpoints.save_tokenizer(pico, vocab=48)
    (pico / name).write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        models.load_tokenizer(pico)
    assert caught.value.message == f"`{pico / name}` is {expected}"


def test_load_tokenizer_pointer_beside_one_that_works_is_no_matter(pico: Path) -> None:
    checkpoints.save_tokenizer(pico, vocab=48)
    (pico / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert models.load_tokenizer(pico)


def test_check_folder_names_what_makes_a_folder_of_it(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    for path in (tmp_path, tmp_path / "x.gguf"):
        with pytest.raises(CheckpointError) as caught:
            models.check_folder(path)
        assert f"`ortho convert {tmp_path}/x.gguf`" in str(caught.value.hint)
    with pytest.raises(CheckpointError, match="does not exist") as caught:
        models.check_folder(Path("org/name"))
    assert "hf download org/name" in str(caught.value.hint)


def test_load_tensor_that_the_model_does_not_use_is_no_matter(pico: Path, ortho: Ortho) -> None:
    path = pico / "model.safetensors"
    more = {"model.flag": torch.zeros(0), "model.old.weight": torch.ones(3)}
    save_file(load_file(path) | more, path, metadata={"format": "pt"})
    config = json.loads((pico / "config.json").read_text())
    (pico / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert ortho("decompose", pico, "-q").code == 0
    assert ortho_cli.load(pico.parent / "pico-ortho", alpha=1.0)


@pytest.mark.parametrize(
    ("asked", "found", "expected"),
    [
        (True, {}, True),
        (False, {"amx_bf16": True}, False),
        ("auto", {"avx2": True, "avx512_bf16": False}, False),
        ("auto", {"avx512_bf16": True}, True),
        ("auto", {"bf16": True}, True),
    ],
)
def test_auto_computes_in_bfloat16_where_the_cpu_has_instructions_for_it(
    asked: bool | Literal["auto"],
    found: dict[str, bool],
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    assert models.uses_bfloat16(asked, torch.device("cpu")) is expected


def test_a_tokenizer_that_transformers_makes_without_words_is_none(tmp_path: Path) -> None:
    saved(tmp_path, "Qwen3Moe")
    import transformers

    made = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert len(made) <= len(set(made.all_special_ids))
    with pytest.raises(CheckpointError, match="has no tokenizer that transformers can read"):
        models.load_tokenizer(tmp_path)
