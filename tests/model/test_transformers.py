"""The artifact as others read it: transformers with compressed-tensors, and no line of ours."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from safetensors.torch import load_file

import ortho_cli
from ortho_cli.split import quantize

pytestmark = pytest.mark.filterwarnings("ignore")  # other people's deprecations

Loaded = tuple[Any, dict[str, Any]]
Ortho = Callable[..., Any]


def load(folder: Path) -> Loaded:
    from transformers import AutoModelForCausalLM

    loaded: Loaded = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    return loaded


def make(folder: Path, kind: str) -> Any:
    import transformers

    torch.manual_seed(0)
    size: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 96,
        "max_position_embeddings": 64,
    }
    if kind == "qwen2":
        model = transformers.Qwen2ForCausalLM(
            transformers.Qwen2Config(**size, tie_word_embeddings=False)
        )
    else:
        tied = kind == "llama-tied"
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**size, tie_word_embeddings=tied)
        )
    model.to(torch.bfloat16).save_pretrained(folder)
    return model


THREE = "base.bits=3"
SOME = "overrides=[{match: 're:.*1.mlp', base: {bits: 3}}, {match: '*o_proj*', base: {bits: 3}}]"


@pytest.mark.parametrize(
    ("kind", "chosen", "groups"),
    [
        ("llama-tied", "base.bits=4", [4]),
        ("llama-untied", "base.bits=4", [4]),
        ("qwen2", "base.bits=4", [4]),
        ("llama-tied", THREE, [3]),
        ("qwen2", THREE, [3]),
        ("llama-tied", SOME, [4, 3]),
        ("qwen2", SOME, [4, 3]),
    ],
)
def test_base_loads_whole_and_bit_exact(
    tmp_path: Path, ortho: Ortho, kind: str, chosen: str, groups: list[int]
) -> None:
    source = make(tmp_path / "m", kind)
    assert ortho("decompose", tmp_path / "m", "-q", "--set", chosen).code == 0
    out = tmp_path / "m-ortho"
    model, info = load(out)
    assert not any(info.values()), info
    base = load_file(out / "model.safetensors")
    weights = dict(model.named_modules())
    report = json.loads((out / "report.json").read_text())
    told = json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"]
    assert [group["weights"]["num_bits"] for group in told.values()] == groups
    assert {entry["bits"] for entry in report["tensors"] if "bits" in entry} == set(groups)
    tokens = torch.arange(8)[None]
    model(tokens)  # compressed-tensors unpacks on the first forward
    for entry in report["tensors"]:
        module = entry["name"].rpartition(".")[0]
        if entry["action"] == "split":
            codes = reference.unpack_codes(base[f"{module}.weight_packed"], bits=entry["bits"])
            expected = reference.dequantize(codes, base[f"{module}.weight_scale"])
            assert torch.equal(weights[module].weight.float(), expected), module
        else:
            original = source.get_parameter(entry["name"])
            assert torch.equal(model.get_parameter(entry["name"]), original), entry["name"]
    tied = model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert tied is (kind == "llama-tied")


def test_base_loads_the_same_when_ortho_is_deleted(tmp_path: Path, ortho: Ortho) -> None:
    make(tmp_path / "m", "llama-tied")
    ortho("decompose", tmp_path / "m", "-q")
    tokens = torch.arange(8)[None]
    with_ortho = load(tmp_path / "m-ortho")[0](tokens).logits
    (tmp_path / "m-ortho" / "ortho.safetensors").unlink()
    model, info = load(tmp_path / "m-ortho")
    assert not any(info.values())
    assert torch.equal(model(tokens).logits, with_ortho)
    assert ortho("inspect", tmp_path / "m-ortho", "--verify").code == 0


SMALL: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}
MOE = {**SMALL, "intermediate_size": 128, "moe_intermediate_size": 64}
MLA = {"q_lora_rank": 64, "kv_lora_rank": 64, "v_head_dim": 16}
NAMED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", "ForCausalLM", {**SMALL, "intermediate_size": 64}),
    "granite": (
        "GraniteMoe",
        "ForCausalLM",
        {**SMALL, "intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "jetmoe": (
        "JetMoe",
        "ForCausalLM",
        {
            "vocab_size": 320,
            "hidden_size": 64,
            "num_hidden_layers": 1,
            "num_key_value_heads": 4,
            "kv_channels": 64,
            "intermediate_size": 64,
            "num_local_experts": 4,
        },
    ),
    "gpt-oss": (
        "GptOss",
        "ForCausalLM",
        {**SMALL, "intermediate_size": 64, "num_local_experts": 4, "head_dim": 16},
    ),
    "dbrx": (
        "Dbrx",
        "ForCausalLM",
        {
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 1,
            "vocab_size": 320,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
            "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
        },
    ),
    "deepseek": (
        "DeepseekV2",
        "ForCausalLM",
        {**MOE, **MLA, "n_routed_experts": 4, "first_k_dense_replace": 1, "n_shared_experts": 1}
        | {"qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "n_group": 1, "topk_group": 1},
    ),
    "hunyuan 3": ("HYV3", "ForCausalLM", {**MOE, "num_experts": 4, "head_dim": 16}),
    "musicgen": (
        "MusicgenDecoder",
        "ForCausalLM",
        {"vocab_size": 64, "hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 1}
        | {"num_attention_heads": 4, "num_codebooks": 2, "max_position_embeddings": 64}
        | {"pad_token_id": 0, "bos_token_id": 0},
    ),
    "bert": ("Bert", "ForMaskedLM", {**SMALL, "intermediate_size": 128}),
    "gemma 2": ("Gemma2", "ForCausalLM", {**SMALL, "intermediate_size": 128, "head_dim": 16}),
    "vit": (
        "ViT",
        "ForImageClassification",
        {**SMALL, "intermediate_size": 128, "image_size": 32, "patch_size": 16},
    ),
}


@pytest.mark.parametrize("kind", NAMED)
def test_base_of_odd_names_loads_with_every_weight_where_it_belongs(
    tmp_path: Path, ortho: Ortho, kind: str
) -> None:
    """Routers, heads and experts by other names, in the file or in the model, are all found."""
    import transformers

    name, task, settings = NAMED[kind]
    config = getattr(transformers, f"{name}Config")(**settings)
    cls = getattr(transformers, f"{name.removesuffix('Decoder')}{task}")
    torch.manual_seed(0)
    cls(config).to(torch.bfloat16).save_pretrained(tmp_path / "m")
    source = cls.from_pretrained(tmp_path / "m")
    keep = ["--set", "on_unsupported=keep"]
    assert ortho("decompose", tmp_path / "m", "-q", *keep).code == 0
    model, info = cls.from_pretrained(tmp_path / "m-ortho", output_loading_info=True)
    assert not any(info.values()), info
    model.hf_quantizer.compressor.decompress_model(model)
    found = dict(model.named_parameters(remove_duplicate=False))
    rounded = 0
    for key, value in source.named_parameters(remove_duplicate=False):
        off = (found[key].float() - value.float()).norm() / value.float().norm().clamp(min=1e-9)
        assert off < 0.2, key
        rounded += bool(off > 0.01)
    assert rounded


def test_codes_equal_the_packing_of_compressed_tensors() -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    for columns in (64, 96, 576):
        codes = torch.randint(-8, 8, (5, columns), dtype=torch.int8)
        assert torch.equal(quantize.pack_int4(codes), pack_to_int32(codes, 4))
        narrow = codes.clamp(-4, 3)
        assert torch.equal(quantize.pack_int3(narrow), pack_to_int32(narrow, 3))


def test_scales_equal_those_of_compressed_tensors() -> None:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams

    groups = torch.randn(6, 3, 32)
    for bits in (3, 4):
        settings = QuantizationArgs(num_bits=bits, strategy="group", group_size=32)
        theirs, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), settings)
        mine = quantize.absmax_scales(
            groups.flatten(1), group_size=32, dtype=torch.float32, bits=bits
        )
        assert torch.equal(mine, theirs)


@pytest.mark.slow
def test_real_model_generates_from_base_alone(tmp_path: Path, ortho: Ortho) -> None:
    """ORTHO_MODEL names a transformers folder, such as SmolLM2-135M."""
    if "ORTHO_MODEL" not in os.environ:
        pytest.skip("ORTHO_MODEL is not set")
    from transformers import AutoTokenizer

    source = Path(os.environ["ORTHO_MODEL"])
    out = tmp_path / "out"
    ran = ortho("decompose", source, "-o", out, "--json")
    assert ran.code == 0
    assert ortho("inspect", out, "--verify", "-q").code == 0
    said = []
    for _ in range(2):
        model, info = load(out)
        assert not any(info.values())
        tokenizer = AutoTokenizer.from_pretrained(out)
        prompt = tokenizer("The capital of France is", return_tensors="pt")
        tokens = model.generate(prompt["input_ids"], max_new_tokens=12, do_sample=False)
        said.append(tokenizer.decode(tokens[0]))
        (out / "ortho.safetensors").unlink(missing_ok=True)
    assert said[0] == said[1]
    assert len(said[0]) > 30


@pytest.mark.slow
def test_real_model_live_equals_dense_at_1_and_base_at_0(tmp_path: Path, ortho: Ortho) -> None:
    """ORTHO_MODEL names a transformers folder, such as SmolLM2-135M."""
    if "ORTHO_MODEL" not in os.environ:
        pytest.skip("ORTHO_MODEL is not set")
    out, dense = tmp_path / "out", tmp_path / "dense"
    assert ortho("decompose", os.environ["ORTHO_MODEL"], "-o", out, "-q").code == 0
    assert ortho("convert", out, "-o", dense, "--alpha", 1, "-q").code == 0
    live = ortho_cli.load(out, alpha=1.0)
    tokens = torch.arange(1000, 1256)[None]
    with torch.inference_mode():
        for alpha, folder in ((1.0, dense), (0.0, out)):
            ortho_cli.set_alpha(live, alpha)
            mine, theirs = live(tokens).logits.float(), load(folder)[0](tokens).logits.float()
            assert (mine - theirs).norm() < 0.01 * theirs.norm(), alpha
