"""Prefixes that training wrappers leave in names: what is stripped, what is kept and said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ortho
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ortho_cli.convert.sources import wrappers
from ortho_cli.errors import CheckpointError

NAMES = ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight")
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 9,
}


def tensors(*names: str) -> dict[str, Tensor]:
    return {name: torch.full((2, 2), float(i)) for i, name in enumerate(names)}


def convert(
    tmp_path: Path, ortho: Ortho, found: dict[str, Tensor], kind: str, config: Any = None
) -> tuple[dict[str, Tensor], str]:
    folder = tmp_path / "m"
    folder.mkdir()
    if kind == "torch":
        torch.save(found, folder / "pytorch_model.bin")
    else:
        save_file(found, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    ran = ortho("convert", folder)
    assert ran.code == 0, ran.err
    return load_file(tmp_path / "m-converted" / "model.safetensors"), ran.err


@pytest.mark.parametrize("kind", ["torch", "safetensors"])
@pytest.mark.parametrize(
    "wrapped",
    [
        "module.{}",
        "module.module.{}",
        "_orig_mod.{}",
        "_orig_mod.module.{}",
        "module._orig_mod.{}",
        "_forward_module.{}",
        "_fsdp_wrapped_module.{}",
        "_forward_module._orig_mod.{}",
        "base_model.model.{}",
        "module.base_model.model.{}",
    ],
)
def test_wrapper_before_every_name_is_stripped_and_noted(
    tmp_path: Path, ortho: Ortho, kind: str, wrapped: str
) -> None:
    found, said = convert(tmp_path, ortho, tensors(*map(wrapped.format, NAMES)), kind)
    assert found.keys() == set(NAMES)
    assert all(found[name].mean() == i for i, name in enumerate(NAMES))
    assert "of a wrapper is stripped from 3 of 3 names" in said


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0._orig_mod.mlp.up_proj.weight",
        "model.layers.0._checkpoint_wrapped_module.mlp.up_proj.weight",
        "model._fsdp_wrapped_module.layers.0._fsdp_wrapped_module.mlp.up_proj.weight",
        "_fsdp_wrapped_module.model.layers.0._checkpoint_wrapped_module._orig_mod.mlp.up_proj.weight",
        "module.model.layers.0._fpw_module.mlp.up_proj.weight",
    ],
)
def test_wrapper_inside_a_name_is_stripped_where_it_stands(
    tmp_path: Path, ortho: Ortho, name: str
) -> None:
    found, said = convert(tmp_path, ortho, tensors(NAMES[0], name), "torch")
    assert found.keys() == set(NAMES[:2])
    assert "of a wrapper is stripped from 1 of 2 names" in said


def test_names_without_wrappers_are_left_alone(tmp_path: Path, ortho: Ortho) -> None:
    names = (*NAMES, "submodule.weight", "my_orig_mod.weight", "a.modules.weight")
    found, said = convert(tmp_path, ortho, tensors(*names), "torch")
    assert found.keys() == set(names)
    assert "stripped" not in said


@pytest.mark.parametrize("kind", ["torch", "safetensors"])
def test_names_that_become_one_are_refused(tmp_path: Path, ortho: Ortho, kind: str) -> None:
    with pytest.raises(AssertionError, match=r"`a.weight` and `module.a.weight` of .* are both"):
        convert(tmp_path, ortho, tensors("a.weight", "module.a.weight"), kind)
    assert not (tmp_path / "m-converted").exists()


def test_flat_shard_of_fsdp_is_refused(tmp_path: Path, ortho: Ortho) -> None:
    with pytest.raises(AssertionError, match="flat shard of FSDP"):
        convert(tmp_path, ortho, tensors("_fsdp_wrapped_module._flat_param"), "torch")


def test_adapter_is_refused_whatever_prefix_its_names_have(tmp_path: Path, ortho: Ortho) -> None:
    names = ("base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight")
    with pytest.raises(AssertionError, match="is an adapter's"):
        convert(tmp_path, ortho, tensors(*names), "torch")


def test_prefix_of_a_merged_adapter_is_told_by_decompose_with_the_way_out(
    tmp_path: Path, ortho: Ortho
) -> None:
    source = tmp_path / "m.safetensors"
    save_file({"base_model.model.layers.0.q_proj.weight": torch.ones(64, 64)}, source)
    ran = ortho("decompose", source)
    assert ran.code == 4
    assert f"`ortho convert {source}`" in ran.err


def test_record_of_a_dropped_copy_is_stripped_too(tmp_path: Path, ortho: Ortho) -> None:
    found = tensors("module.lm_head.weight", "module.model.embed_tokens.weight")
    found["module.lm_head.weight"] = found["module.model.embed_tokens.weight"]
    convert(tmp_path, ortho, found, "torch", {"tie_word_embeddings": True})
    file = tmp_path / "m-converted" / "model.safetensors"
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata()["lm_head.weight"] == "model.embed_tokens.weight"


@pytest.mark.filterwarnings("ignore")  # other people's deprecations
@pytest.mark.parametrize("prefix", ["model.", "net.", "pl.model.", "model.model."])
def test_prefix_that_the_architecture_does_not_have_is_stripped(
    tmp_path: Path, ortho: Ortho, prefix: str
) -> None:
    wrapped = tensors(*(prefix + name for name in NAMES), f"{prefix}lm_head.weight")
    found, said = convert(tmp_path, ortho, wrapped, "torch", LLAMA)
    assert found.keys() == {*NAMES, "lm_head.weight"}
    assert f"`{prefix}model.embed_tokens.weight` becomes `model.embed_tokens.weight`" in said


@pytest.mark.filterwarnings("ignore")
def test_module_inside_a_name_is_stripped_where_the_architecture_has_none(
    tmp_path: Path, ortho: Ortho
) -> None:
    wrapped = tensors(NAMES[0], "model.layers.0.module.mlp.up_proj.weight")
    found, said = convert(tmp_path, ortho, wrapped, "torch", LLAMA)
    assert found.keys() == set(NAMES[:2])
    assert "1 of 2 names have a wrapper's prefix" in said


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({**LLAMA, "architectures": ["LlamaModel"]}, ("layers.0.mlp.up_proj.weight",)),
        ({**LLAMA, "architectures": ["LlamaModel"]}, NAMES),
        (LLAMA, ("layers.0.mlp.up_proj.weight", "norm.weight")),
    ],
)
def test_names_that_the_architecture_reads_are_kept(
    tmp_path: Path,
    ortho: Ortho,
    monkeypatch: pytest.MonkeyPatch,
    config: dict[str, Any],
    names: tuple[str, ...],
) -> None:
    monkeypatch.setattr(wrappers, "COMMON", frozenset())  # so that transformers is asked
    assert convert(tmp_path, ortho, tensors(*names), "torch", config)[0].keys() == set(names)


@pytest.mark.parametrize(
    "config",
    [
        None,
        {},
        {"architectures": ["NobodyKnows"], "model_type": "x"},
        {"architectures": "LlamaForCausalLM"},
        {"architectures": ["AutoConfig"], "model_type": "llama"},
        {"architectures": [{}], "model_type": ["llama"]},
        {**LLAMA, "num_hidden_layers": 10**9},
        {**LLAMA, "num_attention_heads": 0},
    ],
)
def test_doubtful_prefix_is_kept_and_noted_where_nothing_tells(
    tmp_path: Path, ortho: Ortho, config: dict[str, Any] | None
) -> None:
    wrapped = tuple(f"model.{name}" for name in NAMES)
    found, said = convert(tmp_path, ortho, tensors(*wrapped), "torch", config)
    assert found.keys() == set(wrapped)
    assert "names begin with `model.model.`, which may be a wrapper's, and is kept" in said


def test_module_inside_a_name_is_kept_and_noted_where_nothing_tells(
    tmp_path: Path, ortho: Ortho
) -> None:
    names = ("a.module.weight", "b.weight")
    found, said = convert(tmp_path, ortho, tensors(*names), "torch")
    assert found.keys() == set(names)
    assert "`.module.` in `a.module.weight` and others may be a wrapper's, and is kept" in said


def test_usual_names_ask_nobody(pico: Path, ortho: Ortho, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers takes seconds to import."""
    monkeypatch.setattr(wrappers, "parameter_names", None)
    assert ortho("convert", pico).code == 0


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("teacher.", "student."),
        ("student.", "teacher."),
        ("ema_model.", "model."),
        ("model.", "ema_model."),
        ("generator.", "a.b.averaged."),
    ],
)
@pytest.mark.parametrize("kind", ["torch", "safetensors"])
def test_two_models_side_by_side_are_refused_by_both_prefixes(
    tmp_path: Path, ortho: Ortho, kind: str, first: str, second: str
) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    found = tensors(*(prefix + name for prefix in (first, second) for name in NAMES))
    if kind == "torch":
        torch.save(found, folder / "pytorch_model.bin")
    else:
        save_file(found, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(LLAMA))
    ran = ortho("convert", folder)
    assert ran.code == CheckpointError.exit_code
    assert f"`{first}`" in ran.err
    assert f"`{second}`" in ran.err
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_head_beside_a_wrapped_model_is_no_second_model(tmp_path: Path, ortho: Ortho) -> None:
    wrapped = [f"net.{name}" for name in NAMES]
    found, _ = convert(tmp_path, ortho, tensors(*wrapped, "v_head.weight"), "torch", LLAMA)
    assert found.keys() == {*NAMES, "v_head.weight"}
