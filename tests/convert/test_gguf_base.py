"""Base as a GGUF file: its codes bit for bit, read back by `gguf`, by transformers and by us."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch
from conftest import Ortho, SmallTiles
from safetensors.torch import load_file

from ortho_cli.convert.targets import gguf_base, job
from ortho_cli.errors import CheckpointError, Interrupted, NumericalError, UsageError
from ortho_cli.events import Event, TensorDone
from ortho_cli.storage.job import check_target

pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")
import ggufs  # noqa: E402 - it needs the two

pytestmark = pytest.mark.filterwarnings("ignore")  # other people's deprecations

SHAPE = {"hidden": 64, "mlp": 192, "vocab": 96, "kv": 32}
BLOCK = 32


def pico(folder: Path, **settings: Any) -> Path:
    """Write a Llama of grouped heads, without a tokenizer."""
    told = {"layers": 2, **SHAPE}
    dtype, seed = settings.pop("dtype", torch.bfloat16), settings.pop("seed", 0)
    checkpoints.save(folder, checkpoints.weights(**told, dtype=dtype, seed=seed))
    config = checkpoints.config(**told, heads=4) | settings
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def split(ortho: Ortho, source: Path, *sets: str) -> Path:
    """Decompose a model, plainly."""
    out = source.with_name(f"{source.name}-split")
    words = [word for one in sets for word in ("--set", one)]
    assert ortho("decompose", source, "-o", out, "--recipe", "int4", "-q", *words).code == 0
    return out


def codes_of_base(folder: Path, module: str, bits: int = 4) -> np.ndarray:
    """Unpack codes by the bits of the specification, one by one."""
    tensors = load_file(folder / "model.safetensors")
    words = tensors[f"{module}.weight_packed"].numpy().astype(np.uint32)
    spread = (words[:, :, None] >> np.arange(32, dtype=np.uint32)) & 1  # lowest bit first
    flat = spread.reshape(len(words), -1, bits)
    return (flat << np.arange(bits)).sum(-1).astype(int) - (1 << (bits - 1))


def blocks_of(path: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Read d and codes of Q4_0 from the bytes."""
    held = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}[name]
    assert held.tensor_type == gguf.GGMLQuantizationType.Q4_0
    raw = np.array(held.data).reshape(held.data.shape[0], -1, 18)
    low, high = raw[:, :, 2:] & 15, raw[:, :, 2:] >> 4
    codes = np.concatenate([low, high], axis=2).astype(int) - 8
    return raw[:, :, :2].copy().view(np.float16)[:, :, 0], codes.reshape(len(raw), -1)


@pytest.mark.parametrize(("group", "bits"), [(32, 4), (64, 4), (32, 3), (64, 3)])
def test_codes_and_scales_of_base_are_those_of_q4_0_bit_for_bit(
    tmp_path: Path, ortho: Ortho, small_tiles: SmallTiles, group: int, bits: int
) -> None:
    out = split(ortho, pico(tmp_path / "m"), f"base.group_size={group}", f"base.bits={bits}")
    with small_tiles.in_commands():
        ran = ortho("convert", out, "--to", "gguf", "-o", tmp_path / "m.gguf", "--json")
    small_tiles.prove("convert")
    assert ran.code == 0, ran.err
    assert ran.json["error"] == {
        "max_error": 0.0,
        "relative_error": 0.0,
        "share_lost": 0.0,
        "inexact": 0,
        "scales_rounded": 0,
    }
    base = load_file(out / "model.safetensors")
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    names |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    for part, theirs in names.items():
        room = "mlp" if theirs.startswith("ffn") else "self_attn"
        module = f"model.layers.1.{room}.{part}"
        codes, scales = codes_of_base(out, module, bits), base[f"{module}.weight_scale"].float()
        wanted = scales.numpy().repeat(group // BLOCK, axis=1)
        heads = {"q_proj": 4, "k_proj": 2}.get(part)
        if heads:  # llama.cpp turns neighbours where transformers turns halves
            codes, wanted = ggufs.permute(codes, heads), ggufs.permute(wanted, heads)
        d, found = blocks_of(tmp_path / "m.gguf", f"blk.1.{theirs}.weight")
        assert np.array_equal(found, codes)
        assert np.array_equal(d.astype(np.float32), wanted)


KINDS = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
    "llama-3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "llama-linear": {
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    },
    "llama-yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "llama-tied": {"tie_word_embeddings": True},
    "llama-biased": {"attention_bias": True},
}


@pytest.mark.parametrize("name", KINDS)
def test_file_reads_back_as_the_base_that_it_was_made_of(
    tmp_path: Path, ortho: Ortho, name: str
) -> None:
    model = ggufs.make(name.partition("-")[0], **KINDS[name]).bfloat16()
    model.save_pretrained(tmp_path / "m")
    out = split(ortho, tmp_path / "m", "base.group_size=32")
    ran = ortho("convert", out, "--to", "gguf", "-o", tmp_path / "m.gguf")
    assert ran.code == 0, ran.err
    assert "every value is exact" in ran.out
    assert (
        ortho("convert", tmp_path / "m.gguf", "-o", tmp_path / "back", "--dtype", "bf16").code == 0
    )
    assert ortho("convert", out, "-o", tmp_path / "dense", "--alpha", 0).code == 0
    found, wanted = (load_file(tmp_path / n / "model.safetensors") for n in ("back", "dense"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    import transformers

    twins = [
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / n) for n in ("back", "dense")
    ]
    assert torch.equal(*(ggufs.logits(twin.float()) for twin in twins))


def test_scales_that_float16_does_not_hold_are_rounded_and_the_error_is_reported(
    tmp_path: Path, ortho: Ortho
) -> None:
    out = split(ortho, pico(tmp_path / "m", dtype=torch.float32), "base.group_size=32")
    ran = ortho("convert", out, "--to", "gguf", "-o", tmp_path / "m.gguf", "--json")
    assert ran.code == 0, ran.err
    dense = tmp_path / "dense"
    assert ortho("convert", out, "-o", dense, "--alpha", 0).code == 0
    wanted = load_file(dense / "model.safetensors")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    held = tensors["blk.0.ffn_up.weight"]
    found = torch.from_numpy(gguf.quants.dequantize(held.data, held.tensor_type))
    meant = wanted["model.layers.0.mlp.up_proj.weight"].double()
    lost = found.double() - meant
    (told,) = (t for t in ran.json["tensors"] if t["name"] == "model.layers.0.mlp.up_proj.weight")
    assert told["codes"]
    assert told["scales_rounded"] > 0
    assert told["max_error"] == pytest.approx(float(lost.abs().max()), rel=1e-5)
    assert told["squared_error"] == pytest.approx(float(lost.square().sum()), rel=1e-5)
    assert told["squared_norm"] == pytest.approx(float(meant.square().sum()), rel=1e-5)
    assert 0 < ran.json["error"]["relative_error"] < 2**-11
    assert "weights are not exact" in ortho("convert", out, "--to", "gguf").out


@pytest.mark.parametrize(("hidden", "kind"), [(64, "Q8_0"), (72, "BF16")])
def test_groups_that_no_block_fits_are_quantized_again_and_said_so(
    tmp_path: Path, ortho: Ortho, hidden: int, kind: str
) -> None:
    told = {"hidden": hidden, "mlp": 144, "layers": 1, "vocab": 96, "kv": hidden // 2}
    checkpoints.save(tmp_path / "m", checkpoints.weights(**told))
    (tmp_path / "m" / "config.json").write_text(json.dumps(checkpoints.config(**told, heads=4)))
    out = split(ortho, tmp_path / "m", f"base.group_size={8 if hidden == 72 else 16}")
    ran = ortho("convert", out, "--to", "gguf", "-o", tmp_path / "m.gguf")
    assert ran.code == 0, ran.err
    words = "quantized again, to Q8_0" if kind == "Q8_0" else "split weights are dequantized"
    assert words in ran.err
    held = {t.name: t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}["blk.0.ffn_up.weight"]
    assert held.tensor_type.name == kind
    assert ortho("convert", out, "-o", tmp_path / "dense", "--alpha", 0).code == 0
    wanted = load_file(tmp_path / "dense" / "model.safetensors")
    meant = wanted["model.layers.0.mlp.up_proj.weight"].float()
    found = torch.from_numpy(gguf.quants.dequantize(held.data, held.tensor_type))
    largest = meant.view(len(meant), -1, 8).abs().amax()
    assert float((found - meant).abs().max()) <= (float(largest) / 250 if kind == "Q8_0" else 0)


def test_scale_beyond_float16_is_refused_by_name(tmp_path: Path, ortho: Ortho) -> None:
    folder = pico(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 2.0**40
    checkpoints.save(folder, tensors)
    ran = ortho("convert", split(ortho, folder), "--to", "gguf", "-o", tmp_path / "m.gguf")
    assert ran.code == NumericalError.exit_code
    assert "`model.layers.1.mlp.up_proj.weight` has a scale of" in ran.err
    assert not (tmp_path / "m.gguf").exists()


def test_dtype_casts_what_is_not_split_and_vectors_are_float32(
    tmp_path: Path, ortho: Ortho
) -> None:
    out = split(ortho, pico(tmp_path / "m"))
    for dtype, kind in (("fp16", "F16"), (None, "BF16")):
        words = () if dtype is None else ("--dtype", dtype)
        path = tmp_path / f"{kind}.gguf"
        assert ortho("convert", out, "--to", "gguf", "-o", path, *words).code == 0
        held = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
        assert held["token_embd.weight"] == kind
        assert held["output_norm.weight"] == held["blk.0.attn_norm.weight"] == "F32"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "gpt_neox"}, "is a model of type 'gpt_neox', and GGUF is written of llama"),
        (
            {"model_type": "mistral", "sliding_window": 64},
            "says `sliding_window` is 64, and of its GGUF file a reader would make None",
        ),
        ({"hidden_act": "gelu"}, "says `hidden_act` is 'gelu'"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "scales rotary embeddings as 'dynamic'",
        ),
        (
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 1e4,
                    "factor": 2.0,
                    "original_max_position_embeddings": 256,
                    "attention_factor": 3.0,
                }
            },
            "says `rope_parameters` is",
        ),
    ],
)
def test_model_that_llama_cpp_would_compute_otherwise_is_refused_before_anything_is_written(
    tmp_path: Path, ortho: Ortho, change: dict[str, object], said: str
) -> None:
    out = split(ortho, pico(tmp_path / "m"))
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | change))
    ran = ortho("convert", out, "--to", "gguf", "-o", tmp_path / "m.gguf")
    assert ran.code == CheckpointError.exit_code, ran.out
    assert said in ran.err
    assert not (tmp_path / "m.gguf").exists()


def test_base_without_a_config_is_refused(tmp_path: Path, ortho: Ortho) -> None:
    out = split(ortho, pico(tmp_path / "m"))
    (out / "config.json").unlink()
    ran = ortho("convert", out, "--to", "gguf")
    assert ran.code == CheckpointError.exit_code
    assert "has no config.json" in ran.err


def test_base_alone_is_enough_and_an_existing_file_is_replaced_only_if_it_is_ours(
    tmp_path: Path, ortho: Ortho
) -> None:
    out = split(ortho, pico(tmp_path / "m"))
    (out / "ortho.safetensors").unlink()
    place = tmp_path / "m-split-base.gguf"
    planned = ortho("convert", out, "--to", "gguf", "--dry-run", "--json")
    assert planned.code == 0, planned.err
    assert not place.exists()
    assert ortho("convert", out, "--to", "gguf").code == 0
    first = place.read_bytes()
    assert len(first) == planned.json["totals"]["bytes_written"]
    assert ortho("convert", out, "--to", "gguf").code == 8
    assert ortho("convert", out, "--to", "gguf", "--force").code == 0
    assert place.read_bytes() == first
    ggufs.write(place, ggufs.make("llama"), "llama")
    ran = ortho("convert", out, "--to", "gguf", "--force")
    assert ran.code == 8
    assert "exists and is no GGUF file" in ran.err


def test_interrupted_run_resumes_with_its_figures_and_the_same_bytes(
    tmp_path: Path, ortho: Ortho
) -> None:
    out = split(ortho, pico(tmp_path / "m", dtype=torch.float32))

    def run(place: Path, stop: int = -1) -> tuple[list[str], dict[str, Any]]:
        done: list[str] = []

        def watch(event: Event) -> None:
            if isinstance(event, TensorDone):
                done.append(event.name)
                if len(done) == stop:
                    raise KeyboardInterrupt

        plan = gguf_base.plan_base(out)
        target = check_target(place, plan.kind, [out], force=False)
        try:
            return done, plan.to_json(job.write(plan, target, on_event=watch))
        finally:
            plan.source.close()

    _, wanted = run(tmp_path / "whole.gguf")
    with pytest.raises(Interrupted):
        run(tmp_path / "m.gguf", stop=7)
    assert not (tmp_path / "m.gguf").exists()
    done, told = run(tmp_path / "m.gguf")
    assert len(done) == len(wanted["tensors"]) - 7
    assert told == wanted
    assert (tmp_path / "m.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--to pt", "--to pt is none of gguf, lora, gguf-lora"),
        ("--to gguff", "did you mean `--to gguf`?"),
        ("--to gguf --alpha 1", "--alpha and --to gguf exclude each other"),
        ("--to gguf --key ema", "--key has no meaning with --to gguf"),
        ("--to gguf --max-rank 8", "--max-rank is for adapters, and --to gguf writes base alone"),
        ("--to lora --max-rank 8 --approximate 8", "--max-rank takes columns as they are"),
        ("--to lora --seal-to age1 --plaintext", "--seal-to and --plaintext exclude each other"),
        ("--to gguf-lora --pad", "--pad has no meaning with --to gguf-lora"),
        ("--alpha 0 --pad", "--pad is for adapters, and there is no --to"),
    ],
)
def test_options_that_have_no_meaning_together_are_refused(
    tmp_path: Path, ortho: Ortho, words: str, said: str
) -> None:
    ran = ortho("convert", split(ortho, pico(tmp_path / "m")), *words.split())
    assert ran.code == UsageError.exit_code
    assert said in ran.err
    assert "hint: " in ran.err


def test_only_an_artifact_can_become_what_a_server_takes(tmp_path: Path, ortho: Ortho) -> None:
    ran = ortho("convert", pico(tmp_path / "m"), "--to", "gguf")
    assert ran.code == UsageError.exit_code
    assert "is no artifact, and --to gguf is for artifacts" in ran.err
