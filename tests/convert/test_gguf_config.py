"""Every key of a GGUF file that changes the model is in its config, or the file is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Ortho

from ortho_cli.convert.sources.gguf_config import complete
from ortho_cli.convert.sources.gguf_file import open_model
from ortho_cli.errors import CheckpointError

pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")
import ggufs  # noqa: E402 - it needs the two

pytestmark = pytest.mark.filterwarnings("ignore")  # other people's deprecations

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SHARED = {"expert_shared_feed_forward_length": 48}
GEMMA = {"query_pre_attn_scalar": ggufs.HEAD, "sliding_window": 8}
# kind of the model, llama.cpp's name of it, what its config says, further keys of its file.
MODELS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", "llama", {}, {}),
    "llama-tied": ("llama", "llama", {"tie_word_embeddings": True}, {}),
    "llama-biases": ("llama", "llama", {"attention_bias": True, "mlp_bias": True}, {}),
    "llama-one-head-each": (
        "llama",
        "llama",
        {"num_key_value_heads": ggufs.HEADS},
        {"attention.head_count_kv": None},
    ),
    "llama-eps": ("llama", "llama", {"rms_norm_eps": 1e-2}, {}),
    "mistral": ("mistral", "llama", {"sliding_window": None}, {}),
    "qwen2": ("qwen2", "qwen2", {}, {}),
    "qwen3": ("qwen3", "qwen3", {}, {}),
    "qwen3-biases": ("qwen3", "qwen3", {"attention_bias": True}, {}),
    "gemma2": ("gemma2", "gemma2", GEMMA, {}),
    "gemma2-caps": (
        "gemma2",
        "gemma2",
        {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.0},
        {},
    ),
    "gemma3": ("gemma3_text", "gemma3", {**GEMMA, "num_hidden_layers": 7}, {}),
    "gemma3-no-window": (
        "gemma3_text",
        "gemma3",
        {**GEMMA, "layer_types": ["full_attention"] * 2},
        {"attention.sliding_window": None},
    ),
    "gemma3-pattern": (
        "gemma3_text",
        "gemma3",
        {**GEMMA, "layer_types": ["full_attention", "sliding_attention"]},
        {"attention.sliding_window_pattern": [False, True]},
    ),
    "gemma3-every-second": (
        "gemma3_text",
        "gemma3",
        {**GEMMA, "layer_types": ["sliding_attention", "full_attention"]},
        {"attention.sliding_window_pattern": 2},
    ),
    "phi3": ("phi3", "phi3", {}, {}),
    "phi3-window": ("phi3", "phi3", {"sliding_window": 8}, {}),
    "stablelm": ("stablelm", "stablelm", {"layer_norm_eps": 1e-2}, {}),
    "stablelm-biases": ("stablelm", "stablelm", {"use_qkv_bias": True}, {}),
    "stablelm-parallel": ("stablelm", "stablelm", {"use_parallel_residual": True}, {}),
    "nemotron": ("nemotron", "nemotron", {"norm_eps": 1e-2}, {}),
    "starcoder2": ("starcoder2", "starcoder2", {"norm_epsilon": 1e-2}, {}),
    "qwen2_moe": (
        "qwen2_moe",
        "qwen2moe",
        {**EXPERTS, "shared_expert_intermediate_size": 48},
        SHARED,
    ),
    "qwen3_moe": ("qwen3_moe", "qwen3moe", {**EXPERTS, "norm_topk_prob": True}, {}),
}


@pytest.mark.parametrize("name", MODELS)
def test_gguf_becomes_the_model_that_it_was_made_of(
    tmp_path: Path, ortho: Ortho, name: str
) -> None:
    from transformers import AutoModelForCausalLM

    kind, arch, changes, keys = MODELS[name]
    model = ggufs.make(kind, **changes)
    ggufs.write(tmp_path / "m.gguf", model, arch, keys=keys, name=name)
    ran = ortho("convert", tmp_path / "m.gguf", "-o", tmp_path / "out")
    assert ran.code == 0, ran.err
    made, told = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert type(made) is type(model)
    found, wanted = made.state_dict(), model.state_dict()
    assert found.keys() == wanted.keys()
    for key, weight in wanted.items():
        # A norm of gemma is in the file with 1 added, which rounds it.
        shifted = arch in ("gemma2", "gemma3", "nemotron") and key.endswith("norm.weight")
        written = weight + 1 - 1 if shifted else weight
        assert torch.equal(found[key], written), key
    assert torch.allclose(ggufs.logits(made.eval()), ggufs.logits(model), atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "arch", "layers"), [("gemma2", "gemma2", 46), ("gemma3_text", "gemma3", 62)]
)
def test_largest_gemma_scales_attention_by_its_width(
    tmp_path: Path, kind: str, arch: str, layers: int
) -> None:
    ggufs.write(tmp_path / "m.gguf", ggufs.make(kind), arch)
    model = open_model(tmp_path / "m.gguf")
    parsed = {"model_type": kind, "hidden_size": 64, "num_attention_heads": 4, "head_dim": 32}
    for count, wanted in ((layers, 16), (layers - 1, 32)):
        done = complete(model, {**parsed, "num_hidden_layers": count}, ggufs.make(kind).config)
        assert done["query_pre_attn_scalar"] == wanted


# Keys that change what llama.cpp computes, and that the config of the architecture cannot say.
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "logit-scale": ("llama", {"logit_scale": 0.5}, "`llama.logit_scale` is 0.5"),
    "residual-scale": ("llama", {"residual_scale": 0.2}, "`llama.residual_scale`"),
    "embedding-scale": ("qwen2", {"embedding_scale": 12.0}, "`qwen2.embedding_scale` is 12.0"),
    "attention-scale": ("llama", {"attention.scale": 0.5}, "`llama.attention.scale` is 0.5"),
    "softcapping": ("llama", {"attn_logit_softcapping": 50.0}, "`llama.attn_logit_softcapping`"),
    "final-softcapping": ("qwen3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    "alibi": ("llama", {"attention.max_alibi_bias": 8.0}, "max_alibi_bias"),
    "clamp": ("llama", {"attention.clamp_kqv": 8.0}, "clamp_kqv"),
    "causal": ("qwen2", {"attention.causal": False}, "`qwen2.attention.causal` is False"),
    "window": ("qwen2", {"attention.sliding_window": 64}, "`qwen2.attention.sliding_window` is 64"),
    "value-length": ("llama", {"attention.value_length": 16}, "attention.value_length` is 16"),
    "experts": ("llama", {"expert_count": 8, "expert_used_count": 2}, "`llama.expert_count` is 8"),
    "layers-differ": ("llama", {"attention.head_count_kv": [2, 1]}, "head_count_kv` is [2, 1]"),
    "parallel": ("llama", {"use_parallel_residual": True}, "use_parallel_residual"),
    "unheard-of": ("llama", {"quantum.entanglement": 3}, "`llama.quantum.entanglement` is 3"),
    "another-arch": ("llama", {"!qwen2.rope.freq_base": 1e6}, "and has keys of qwen2"),
    "pattern": ("gemma3", {"attention.sliding_window_pattern": [True, False, True]}, "of 3 layers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_key_that_cannot_be_carried_is_refused_by_name(
    tmp_path: Path, ortho: Ortho, name: str
) -> None:
    arch, keys, told = REFUSED[name]
    model = ggufs.make("gemma3_text" if arch == "gemma3" else arch)
    ggufs.write(tmp_path / "m.gguf", model, arch, keys=keys)
    ran = ortho("convert", tmp_path / "m.gguf", "-o", tmp_path / "out")
    assert ran.code == CheckpointError.exit_code
    assert told in ran.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf"]


def test_keys_that_change_nothing_are_accepted(tmp_path: Path, ortho: Ortho) -> None:
    keys = {
        "!general.quantization_version": 2,
        "!general.file_type": 7,
        "!quantize.imatrix.file": "a.dat",
        "!imatrix.chunk_count": 3,
        "!mradermacher.quantized_by": "somebody",
        "attention.causal": True,
        "attention.scale": ggufs.HEAD**-0.5,
        "attention.sliding_window": 256,
        "expert_count": 0,
        "logit_scale": 1.0,
        "pooling_type": 1,
        "rope.scaling.finetuned": False,
        "tensor_data_layout": "Meta AI original pth",
        "feed_forward_length": [ggufs.MLP, ggufs.MLP],
    }
    extra = {"blk.0.attn_rot_embd.weight": np.zeros(ggufs.HEAD // 2, np.float32)}
    ggufs.write(tmp_path / "m.gguf", ggufs.make("llama"), "llama", keys=keys, extra=extra)
    ran = ortho("convert", tmp_path / "m.gguf", "-o", tmp_path / "out")
    assert ran.code == 0, ran.err
    assert "no reader of GGUF knows are left out: mradermacher.*" in ran.err


@pytest.mark.parametrize(
    "name",
    [
        "blk.0.attn_q.bias",  # without one for the output, which llama's config demands
        "blk.0.attn_q_norm.weight",
        "blk.0.attn_q.scale",  # of NVFP4 weights
        "blk.0.attn_sinks.weight",
        "cls.output.weight",
        "blk.2.nextn.eh_proj.weight",
        "output.bias",
    ],
)
def test_tensor_without_a_place_is_refused_and_not_left_out(
    tmp_path: Path, ortho: Ortho, name: str
) -> None:
    extra = {name: np.ones(ggufs.HEADS * ggufs.HEAD, np.float32)}
    ggufs.write(tmp_path / "m.gguf", ggufs.make("llama"), "llama", extra=extra)
    ran = ortho("convert", tmp_path / "m.gguf", "-o", tmp_path / "out")
    assert ran.code == CheckpointError.exit_code
    assert f"`{name}` that transformers' LlamaForCausalLM has no place for" in ran.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arch", "told"),
    [
        ("t5", "transformers has no causal language model of it"),
        ("deci", "transformers has no causal language model of it"),
        ("granite", "which transformers' reader of GGUF does not know"),
        ("gpt-oss", "whose experts transformers' reader of GGUF loses"),
        ("gemma4", "whose kinds of layers transformers' reader of GGUF loses"),
    ],
)
def test_architecture_that_transformers_does_not_read_whole_is_refused(
    tmp_path: Path, ortho: Ortho, arch: str, told: str
) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", arch)
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ran = ortho("convert", tmp_path / "m.gguf")
    assert ran.code == CheckpointError.exit_code
    assert f"is of architecture {arch}, " in ran.err
    assert told in ran.err
