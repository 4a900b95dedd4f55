"""What is told from a plain model, by what, and what is not: headers and JSON only."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ortho
from safetensors.torch import load_file, save_file

from ortho_cli.convert.sources.quantized import examine
from ortho_cli.errors import CheckpointError


@dataclass(frozen=True)
class Header:
    name: str
    dtype: str
    shape: tuple[int, ...] = (64, 64)


def headers(*texts: str) -> list[Header]:
    """`name DTYPE` or `name DTYPE 4x8`, and a norm beside them."""
    found = [Header("norm.weight", "BF16", (64,)), Header("head.weight", "BF16")]
    for text in texts:
        name, dtype, *shape = text.split()
        sizes = tuple(int(n) for n in shape[0].split("x")) if shape else (64, 64)
        found.append(Header(name, dtype, sizes))
    return found


# Tensors, and whether `convert` can make a plain model of them.
QUANTIZED: dict[str, tuple[tuple[str, ...], bool]] = {
    "compressed-tensors int4": (
        ("p.weight_packed I32", "p.weight_scale BF16", "p.weight_shape I64 2"),
        True,
    ),
    "compressed-tensors int8": (("p.weight I8", "p.weight_scale BF16 64x1"), True),
    "compressed-tensors mxfp4": (("p.weight_packed U8", "p.weight_scale U8 64x4"), True),
    "compressed-tensors nvfp4": (
        ("p.weight_packed U8", "p.weight_scale F8_E4M3", "p.weight_global_scale F32 1"),
        True,
    ),
    "fp8 block": (("p.weight F8_E4M3", "p.weight_scale_inv F32 1x1"), True),
    "fp8 tensor": (("p.weight F8_E5M2", "p.weight_scale F32 1", "p.input_scale F32 1"), True),
    "fp8 .scale": (("p.weight F8_E4M3", "p.scale F8_E8M0 1x1"), True),
    "fp8 fused": (("e.up F8_E4M3 2x8x8", "e.up_scale F32 2x1x8"), True),
    "fp8 without scales": (("p.weight F8_E4M3", "q.weight F8_E4M3FNUZ"), True),
    "fp8 of which one lacks its scale": (
        ("p.weight F8_E4M3", "p.weight_scale F32 1", "q.weight F8_E4M3"),
        False,
    ),
    "ModelOpt": (("p.weight U8", "p.weight_scale F8_E4M3", "p.weight_scale_2 F32 1"), True),
    "ModelOpt AWQ": (
        ("p.weight F8_E4M3", "p.weight_scale F32 1", "p.pre_quant_scale BF16 64"),
        False,
    ),
    "gpt-oss": (("e.up_blocks U8 2x8x1x16", "e.up_scales U8 2x8x1"), True),
    "gpt-oss' own names": (("e.up.blocks U8 2x8x1x16", "e.up.scales U8 2x8x1"), False),
    "GPTQ": (("p.qweight I32 8x64", "p.qzeros I32 1x8", "p.scales F16 1x64"), True),
    "a codebook": (("p.qweight I32 8x64", "p.lookup F16 16"), False),
    "MLX": (("p.weight U32", "p.scales BF16", "p.biases BF16"), True),
    "MLX mxfp4": (("p.weight U32", "p.scales U8"), False),
    "bitsandbytes int8": (("p.weight I8", "p.SCB F32 64"), True),
    "bitsandbytes nf4": (
        ("p.weight U8 2048x1", "p.weight.absmax F32 64", "p.weight.quant_map F32 16",
         "p.weight.quant_state.bitsandbytes__nf4 U8 90"),
        True,
    ),
    "bitsandbytes of unknown state": (("p.weight U8 2048x1", "p.weight.absmax F32 64"), False),
    "quanto": (("p.weight._data I8", "p.weight._scale BF16 64x1"), True),
    "quanto of four bits": (("p.weight._data U8", "p.weight._shift BF16 64x1"), False),
    "HQQ": (("p.W_q U8", "p.scale F16", "p.zero F16"), False),
    "EXL2": (("p.q_weight I32", "p.q_scale I32"), False),
    "EXL3": (("p.trellis I16 4x4x64", "p.suh F16 64", "p.svh F16 64"), False),
    "AQLM": (("p.codes I8 64x8x1", "p.codebooks F16 1x256x1x8", "p.scales F16 64x1"), False),
    "VPTQ": (("p.indices I32 1x8x64", "p.centroids.weight F16 1x2048"), False),
    "SpQR": (("p.dense_weights I64 64x64", "p.row_offsets I32 65"), False),
    "EETQ": (("p.weight I8", "p.weight_scales F16 64"), False),
    "BitNet": (("p.weight U8 16x64", "p.weight_scale BF16 1"), False),
    "Gemma": (("e.embedding_quantized U8", "e.embedding_scale F32 64x1"), False),
    "Marlin": (("p.B I32", "p.s F16"), False),
    "sparse": (("p.compressed BF16", "p.bitmask U8", "p.shape I64 2"), False),
    "torchao": (("p._weight_qdata I8", "p._weight_scale F32 64"), False),
    **{
        f"fp8 beside {scale}": (("p.weight F8_E4M3", f"p.{scale} F32 1"), False)
        for scale in (
            "weights_scaling_factor", "activation_scaling_factor", "weight.scales", "fp8_scale",
            "weight._scale", "weight_scale_reciprocal", "weight_amax", "Scaling", "input_scale",
        )
    },
    "fp8 fused beside scales": (("e.up F8_E4M3 2x8x8", "e.up_row_scales F32 2x8"), False),
    "fp8 fused above scales": (("e.up F8_E4M3 2x8x8", "e.up.scales F32 2x8"), False),
    "TensorRT-LLM int8": (("p.weight I8", "p.per_channel_scale F16 64"), False),
    "a scale without its weight": (("p.weight_scale_inv F32 1x1",), False),
    "a float weight beside a scale": (("p.weight BF16", "p.weight_scale BF16 64x1"), False),
    "floats of four bits": (("p.weight F4",), False),
}  # fmt: skip
PLAIN: dict[str, tuple[str, ...]] = {
    "nothing": (),
    "layer scales": ("b.layer_scale BF16 64", "b.ls1.gamma BF16 64", "b.layer_scale1 F32 64"),
    "Swin": ("a.logit_scale F32 4x1x1", "a.relative_position_index I64 64x64"),
    "CLIP": ("logit_scale F32 1", "position_ids I64 1x77", "logit_bias F32 1"),
    "Gemma": ("a.per_dim_scale BF16 64", "n.scale BF16 64", "vision.std_scale BF16 64"),
    "a norm of scale and bias": ("n.scale F32 64", "n.bias F32 64", "p.weight F32"),
    "masks": ("a.bias BOOL 1x1x64x64", "a.mask U8 64x64", "a.masked_bias F32 1"),
    "tables": ("hash.table I32 64x2", "expert.map I64 64", "vocab.bytes U8 300"),
    "codebooks": ("q.codebooks F32 4x64x8", "q.embed F32 64x8", "q.cluster_size F32 64"),
    "scales of activations alone": ("a.input_scale F32 1", "a.k_scale F32 1", "r.scale F32 64"),
    "learned scales beside integers": ("p.weight F32", "p.layer_scale F32 64", "p.map I32 64x2"),
    "batch norm": ("n.running_var F32 64", "n.num_batches_tracked I64 1"),
    "experts": ("e.up BF16 2x8x8", "e.up_bias BF16 2x8", "e.per_expert_scale BF16 8"),
    "indices": ("f.indices I64 64x64", "f.weight BF16", "f.scales F32 64"),
}


@pytest.mark.parametrize("name", QUANTIZED)
def test_tensors_tell_a_quantized_model_whatever_the_json_says(name: str) -> None:
    tensors, can_convert = QUANTIZED[name]
    found = examine(headers(*tensors), {}, None)
    assert found
    assert found.can_convert == can_convert
    assert "`p." in found.evidence or "`e." in found.evidence or "`q." in found.evidence
    assert ("ortho convert" in str(found.refusal(Path("m")).hint)) == can_convert


@pytest.mark.parametrize("scale", ["logit_scale", "p.q_scale", "p.layer_scale.gamma", "p.ls.gamma"])
def test_scales_of_something_else_leave_fp8_without_scales_what_it_is(scale: str) -> None:
    found = examine(headers("p.q.weight F8_E4M3", "embed F8_E4M3", f"{scale} F32 64"), {}, None)
    assert found.can_convert
    assert {weight.name for weight in found.weights} == {"p.q.weight", "embed"}
    assert not found.dropped


@pytest.mark.parametrize("name", ["q_scale", "k_scale", "v_scale"])
@pytest.mark.parametrize(
    ("shape", "heads", "dropped"),
    [("1", 8, True), ("8x1x1", 8, True), ("64", 8, False), ("64", None, False), ("8", None, False)],
)
def test_scale_of_the_cache_is_told_from_one_that_the_model_learned(
    name: str, shape: str, heads: int | None, dropped: bool
) -> None:
    tensors = headers("p.weight F8_E4M3", "p.weight_scale F32 1", f"p.{name} F32 {shape}")
    config = {"text_config": {"num_attention_heads": 16, "num_key_value_heads": heads}}
    found = examine(tensors, config if heads else {}, None)
    assert found.can_convert
    assert found.dropped == ((f"p.{name}",) if dropped else ())


@pytest.mark.parametrize("name", PLAIN)
def test_plain_model_is_not_taken_for_a_quantized_one(name: str) -> None:
    assert not examine(headers(*PLAIN[name]), {"model_type": "x"}, None)


GPTQ = {"quant_method": "gptq", "bits": 4}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"quantization_config": GPTQ}, "`quantization_config` says 'gptq'"),
        ({"compression_config": {"format": "pack-quantized"}}, "`compression_config` says"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "config.json has `quantization`"),
        ({"quantization": {"quant_algo": "FP8"}}, "`quantization` says 'FP8'"),
        ({"quantization_config": {"load_in_4bit": True}}, "config.json has `quantization_config`"),
        *(
            ({key: {"quantization_config": GPTQ}}, f"`{key}.quantization_config` says 'gptq'")
            for key in ("text_config", "llm_config", "language_config")
        ),
        (
            {"thinker_config": {"text_config": {"quantization_config": GPTQ}}},
            "`thinker_config.text_config.quantization_config` says 'gptq'",
        ),
    ],
)
def test_config_tells_a_quantized_model_at_any_depth(config: dict[str, Any], said: str) -> None:
    found = examine(headers(), config, None)
    assert said in found.evidence
    assert found.can_convert  # what says so is left out


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": None},
        {"quantization_config": {}},
        {"compression_config": None, "text_config": {"quantization_config": None}},
        {"quantization": False},
        {"quantization": {"codebook_size": 1024}},
        {"quantization": {"quant_algo": None, "group_size": 128}},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": False}},
    ],
)
def test_config_that_says_nothing_is_not_believed(config: dict[str, Any]) -> None:
    assert not examine(headers(), config, None)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("quantize_config.json", {"bits": 4, "group_size": 128}, True),
        ("quant_config.json", {"w_bit": 4, "q_group_size": 128}, True),
        ("hf_quant_config.json", {"quantization": {"quant_algo": "NVFP4"}}, True),
        ("hf_quant_config.json", {"quantization": {"quant_algo": None}}, False),
        ("quant_config.json", {"sheet": "prices"}, False),
        ("quantize_config.json", {}, False),
    ],
)
def test_file_beside_the_weights_tells_a_quantized_model(
    tmp_path: Path, name: str, content: dict[str, Any], told: bool
) -> None:
    (tmp_path / name).write_text(json.dumps(content))
    found = examine(headers(), {}, tmp_path)
    assert bool(found) == told
    assert not told or f"`{name}`" in found.evidence
    assert not examine(headers(), {}, None)  # a bare file stands alone


def fp8_pico(pico: Path, name: str) -> Path:
    """Make the projections of the pico model fp8, in a folder whose name a shell must quote."""
    tensors = load_file(pico / "model.safetensors")
    for key in [key for key in tensors if "proj" in key]:
        tensors[key.replace("weight", "weight_scale")] = torch.tensor(0.01)
        tensors[key] = (tensors[key].float() / 0.01).to(torch.float8_e4m3fn)
    save_file(tensors, pico / "model.safetensors")
    return pico.rename(pico.parent / name)


def test_every_command_that_opens_a_model_refuses_and_the_hint_is_a_way_out(
    pico: Path, ortho: Ortho
) -> None:
    copy = pico.parent / "plain.safetensors"
    copy.write_bytes((pico / "model.safetensors").read_bytes())
    assert ortho("decompose", pico, "-q").code == 0
    source = fp8_pico(pico, "it's fp8")
    (pico.parent / "text.txt").write_text("a b c\n")
    stats = pico.parent / "stats.safetensors"
    for command in (
        ("decompose", source),
        ("decompose", source, "--dry-run"),
        ("inspect", source),
        ("decompose", copy, "--reference", source, "--set", "ortho.split=reference"),
        ("bench", f"{pico}-ortho", "--model", source, "--data", pico.parent / "text.txt"),
        ("calibrate", source, "--data", pico.parent / "text.txt", "-o", stats),
    ):
        ran = ortho(*command)
        assert ran.code == CheckpointError.exit_code, command
        assert "is quantized already (tensor `model.layers.0.mlp.down_proj.weight`" in ran.err
        assert not stats.exists()
    hint = ran.err.partition("hint: `")[2].partition("` ")[0]
    program, *arguments = shlex.split(hint)
    assert (program, arguments) == ("ortho", ["convert", str(source)])
    assert ortho(*arguments, "-q").code == 0
    assert ortho("decompose", f"{source}-converted", "-q").code == 0


def test_layout_that_is_not_read_gets_no_hint_that_leads_nowhere(
    tmp_path: Path, ortho: Ortho
) -> None:
    tensors = {"p.W_q": torch.ones(4, 4).byte(), "q.weight": torch.ones(64, 64)}
    save_file(tensors, tmp_path / "m.safetensors")
    for command in ("decompose", "inspect", "convert"):
        ran = ortho(command, tmp_path / "m.safetensors")
        assert ran.code == CheckpointError.exit_code
        assert "`p.W_q`" in ran.err
        assert "the unquantized model" in ran.err
        assert "ortho convert" not in ran.err
