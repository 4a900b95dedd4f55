"""GGUF as a source, beside what transformers itself loads from the file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Ortho, SmallTiles
from safetensors import safe_open
from safetensors.torch import load_file

from ortho_cli.convert.sources.gguf import open_gguf
from ortho_cli.errors import CheckpointError, UsageError

pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")
import ggufs  # noqa: E402 - it needs the two

pytestmark = pytest.mark.filterwarnings("ignore")  # other people's deprecations

HIDDEN, MLP, VOCAB, HEADS, KV_HEADS = 64, 96, 40, 4, 2


def write(
    path: Path,
    *,
    tied: bool = True,
    more: dict[str, Any] | None = None,
    less: str = "",
    layers: int = 1,
) -> None:
    """Write a one-layer Llama that claims `layers`: Q8_0 matrices, float32 norms."""
    generator = torch.Generator().manual_seed(0)
    kv = HIDDEN // HEADS * KV_HEADS
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (VOCAB, HIDDEN),
        "output_norm.weight": (HIDDEN,),
        "blk.0.attn_q.weight": (HIDDEN, HIDDEN),
        "blk.0.attn_k.weight": (kv, HIDDEN),
        "blk.0.attn_v.weight": (kv, HIDDEN),
        "blk.0.attn_output.weight": (HIDDEN, HIDDEN),
        "blk.0.ffn_gate.weight": (MLP, HIDDEN),
        "blk.0.ffn_up.weight": (MLP, HIDDEN),
        "blk.0.ffn_down.weight": (HIDDEN, MLP),
        "blk.0.attn_norm.weight": (HIDDEN,),
        "blk.0.ffn_norm.weight": (HIDDEN,),
        **({} if tied else {"output.weight": (VOCAB, HIDDEN)}),
        **(more or {}),
    }
    shapes.pop(less, None)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("pico")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCAB)
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator).numpy()
        kind = gguf.GGMLQuantizationType.Q8_0 if len(shape) > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("place", ["file", "folder"])
def test_gguf_becomes_the_checkpoint_that_transformers_loads_from_it(
    tmp_path: Path, ortho: Ortho, small_tiles: SmallTiles, tied: bool, place: str
) -> None:
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "m"
    folder.mkdir()
    write(folder / "pico.gguf", tied=tied)
    out = tmp_path / "out"
    source = folder / "pico.gguf" if place == "file" else folder
    with small_tiles.in_commands():
        ran = ortho("convert", source, "-o", out)
    small_tiles.prove("convert")
    assert ran.code == 0, ran.err
    assert "no tokenizer is written" in ran.err
    assert "float32" in ran.err
    wanted = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file="pico.gguf", dtype=torch.float32
    ).state_dict()
    model, told = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    found = model.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    with safe_open(out / "model.safetensors", framework="pt") as opened:
        metadata = opened.metadata()
    assert metadata.get("lm_head.weight") == ("model.embed_tokens.weight" if tied else None)
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "float32"


def test_gguf_can_be_cast(tmp_path: Path, ortho: Ortho) -> None:
    write(tmp_path / "pico.gguf")
    assert ortho("convert", tmp_path / "pico.gguf", "--dtype", "bfloat16", "-q").code == 0
    found = load_file(tmp_path / "pico-converted" / "model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "pico-converted" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"


def test_merged_experts_are_written_under_the_names_of_each(tmp_path: Path, ortho: Ortho) -> None:
    settings = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    model = ggufs.make("qwen3_moe", norm_topk_prob=True, **settings)
    ggufs.write(tmp_path / "m.gguf", model, "qwen3moe", kind=gguf.GGMLQuantizationType.Q8_0)
    assert ortho("convert", tmp_path / "m.gguf", "-o", tmp_path / "out").code == 0
    found = load_file(tmp_path / "out" / "model.safetensors")
    held = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    for part in ("gate", "up", "down"):
        merged = held[f"blk.1.ffn_{part}_exps.weight"]
        wanted = gguf.quants.dequantize(merged.data, merged.tensor_type)
        for expert in range(4):
            name = f"model.layers.1.mlp.experts.{expert}.{part}_proj.weight"
            assert np.array_equal(found[name].numpy(), wanted[expert])
    assert not any("gate_up" in name for name in found)


def test_experts_that_transformers_cannot_name_are_refused(tmp_path: Path, ortho: Ortho) -> None:
    write(tmp_path / "pico.gguf", more={"blk.0.ffn_gate_exps.weight": (4, MLP, HIDDEN)})
    ran = ortho("convert", tmp_path / "pico.gguf")
    assert ran.code == CheckpointError.exit_code
    assert "`blk.0.ffn_gate_exps.weight`" in ran.err
    assert "merged experts cannot be converted" in ran.err


def test_one_tensor_at_a_time_is_held(tmp_path: Path) -> None:
    write(tmp_path / "pico.gguf")
    for tensor in open_gguf(tmp_path / "pico.gguf").tensors:
        weight = tensor.read.__self__  # type: ignore[attr-defined]
        tensor.read(0, 1)
        assert tensor.rows == 1 or weight._whole is not None
        tensor.read(1, tensor.rows - 1)
        assert weight._whole is None


def test_gguf_that_lacks_a_tensor_is_refused(tmp_path: Path, ortho: Ortho) -> None:
    write(tmp_path / "pico.gguf", less="blk.0.ffn_up.weight")
    ran = ortho("convert", tmp_path / "pico.gguf")
    assert ran.code == CheckpointError.exit_code
    assert "no tensor for `model.layers.0.mlp.up_proj.weight`" in ran.err


def test_gguf_with_another_shape_is_refused(tmp_path: Path, ortho: Ortho) -> None:
    write(tmp_path / "pico.gguf", more={"blk.0.ffn_up.weight": (MLP, 2 * HIDDEN)})
    ran = ortho("convert", tmp_path / "pico.gguf")
    assert ran.code == CheckpointError.exit_code
    assert "`blk.0.ffn_up.weight`" in ran.err
    assert not (tmp_path / "pico-converted").exists()


def test_gguf_that_claims_more_layers_than_tensors_is_refused_before_they_are_built(
    tmp_path: Path, ortho: Ortho
) -> None:
    write(tmp_path / "pico.gguf", layers=2**31)
    ran = ortho("convert", tmp_path / "pico.gguf")
    assert ran.code == CheckpointError.exit_code
    assert "`num_hidden_layers` is 2147483648, and there can be 1024 at most" in ran.err


@pytest.mark.parametrize("kept", [0, 4, 40, -200])
def test_cut_gguf_is_refused(tmp_path: Path, ortho: Ortho, kept: int) -> None:
    write(tmp_path / "pico.gguf")
    (tmp_path / "pico.gguf").write_bytes((tmp_path / "pico.gguf").read_bytes()[:kept])
    ran = ortho("convert", tmp_path / "pico.gguf")
    assert ran.code == CheckpointError.exit_code
    assert "cannot be read as GGUF" in ran.err


def test_missing_package_is_a_usage_error(
    tmp_path: Path, ortho: Ortho, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "pico.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    ran = ortho("convert", tmp_path / "pico.gguf")
    assert ran.code == UsageError.exit_code
    assert "`gguf`" in ran.err
    assert "pip install" in ran.err
