"""Rotary embeddings of a GGUF file: read into a config, or refused; never lost."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Ortho

from ortho_cli.convert.sources.gguf_rope import recover_llama3
from ortho_cli.errors import CheckpointError

pytest.importorskip("transformers")
pytest.importorskip("gguf")
import ggufs

pytestmark = pytest.mark.filterwarnings("ignore")  # other people's deprecations


def divisors(
    dim: int, theta: float, factor: float, low: float, high: float, original: int
) -> np.ndarray:
    """Compute `rope_freqs.weight` in float32, branch by branch as llama.cpp's converter does."""
    made = []
    for frequency in 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)):
        wave = 2 * math.pi / frequency
        if wave < original / high:
            made.append(1.0)
        elif wave > original / low:
            made.append(factor)
        else:
            smooth = (original / wave - low) / (high - low)
            made.append(float(1 / ((1 - smooth) / factor + smooth)))
    return np.array(made, np.float32)


@pytest.mark.parametrize(
    ("dim", "theta", "factor", "original"),
    [(128, 5e5, 8.0, 8192), (64, 5e5, 32.0, 8192), (128, 5e5, 8.0, 10000), (64, 1e4, 4.0, 64)],
)
def test_llama3_parameters_are_those_of_the_original_config(
    dim: int, theta: float, factor: float, original: int
) -> None:
    values = divisors(dim, theta, factor, 1.0, 4.0, original)
    assert recover_llama3(values.astype(float), theta=theta) == {
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": original,
    }


@pytest.mark.parametrize("dim", [8, 16, 64, 128])
@pytest.mark.parametrize("theta", [1e4, 5e5])
@pytest.mark.parametrize(("low", "high"), [(1.0, 4.0), (1.0, 1.5), (2.0, 4.0), (0.5, 8.0)])
@pytest.mark.parametrize("original", [100, 8192])
def test_recovered_llama3_parameters_make_the_same_divisors(
    dim: int, theta: float, low: float, high: float, original: int
) -> None:
    values = divisors(dim, theta, 3.5, low, high, original)
    if np.all(values == values[0]):
        pytest.skip("no angle is scaled")
    found = recover_llama3(values.astype(float), theta=theta)
    assert found is not None
    made = divisors(
        dim,
        theta,
        found["factor"],
        found["low_freq_factor"],
        found["high_freq_factor"],
        found["original_max_position_embeddings"],
    )
    assert np.allclose(made, values, rtol=5e-5)


def test_values_of_no_llama3_scaling_are_not_explained() -> None:
    assert recover_llama3(1 + np.random.default_rng(0).random(32), theta=1e4) is None
    assert (
        recover_llama3(divisors(64, 1e4, 8.0, 1.0, 4.0, 64)[::-1].astype(float), theta=1e4) is None
    )


THETA = 20000.0
SHORT = [1.0 + 0.1 * i for i in range(ggufs.HEAD // 4)]
LONG = [2.0 + 0.5 * i for i in range(ggufs.HEAD // 4)]
FACTORS = {
    "rope_factors_long.weight": np.array(LONG, np.float32),
    "rope_factors_short.weight": np.array(SHORT, np.float32),
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
YARN_KEYS = {"type": "yarn", "factor": 4.0, "original_context_length": 64}


def longrope(**more: float) -> dict[str, Any]:
    return {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG, **more}


# What a model has, and how a file says it: kind, rope_parameters, keys of rope.scaling, tensors.
SCALED: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, np.ndarray]]] = {
    "base": ("llama", {"rope_type": "default"}, {}, {}),
    "none": ("llama", {"rope_type": "default"}, {"type": "none", "factor": 4.0}, {}),
    "linear": (
        "llama",
        {"rope_type": "linear", "factor": 4.0},
        {"type": "linear", "factor": 4.0},
        {},
    ),
    "untyped": ("qwen2", {"rope_type": "linear", "factor": 4.0}, {"factor": 4.0}, {}),
    "yarn": ("qwen3", YARN, YARN_KEYS, {}),
    "yarn-betas": (
        "llama",
        {**YARN, "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.3},
        {**YARN_KEYS, "yarn_beta_fast": 16.0, "yarn_beta_slow": 2.0, "yarn_attn_factor": 1.3},
        {},
    ),
    "yarn-attention": (
        "qwen2",
        {**YARN, "attention_factor": 1.5 * (0.1 * math.log(4.0) + 1)},
        {**YARN_KEYS, "attn_factor": 1.5},
        {},
    ),
    "llama3": (
        "llama",
        {"rope_type": "llama3", **LLAMA3, "original_max_position_embeddings": 64},
        {},
        {"rope_freqs.weight": divisors(ggufs.HEAD, THETA, 8.0, 1.0, 4.0, 64)},
    ),
    "divisors-of-one": (
        "llama",
        {"rope_type": "default"},
        {},
        {"rope_freqs.weight": np.ones(ggufs.HEAD // 2, np.float32)},
    ),
    "longrope": (
        "phi3",
        longrope(),
        {"attn_factor": math.sqrt(1 + math.log(4) / math.log(64)), "original_context_length": 64},
        FACTORS,
    ),
    "longrope-attention": (
        "phi3",
        longrope(attention_factor=1.25),
        {"attn_factor": 1.25, "original_context_length": 64},
        FACTORS,
    ),
    "partial": ("stablelm", {"rope_type": "default", "partial_rotary_factor": 0.5}, {}, {}),
    "partial-linear": (
        "nemotron",
        {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.25},
        {"type": "linear", "factor": 2.0},
        {},
    ),
    "freq-base": ("starcoder2", {"rope_type": "default"}, {}, {}),
}


@pytest.mark.parametrize("name", SCALED)
def test_rope_of_a_file_is_the_rope_of_the_model_it_was_made_of(
    tmp_path: Path, ortho: Ortho, name: str
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, rope, keys, tensors = SCALED[name]
    more = {"original_max_position_embeddings": 64} if kind == "phi3" else {}
    model = ggufs.make(kind, rope_parameters={"rope_theta": THETA, **rope}, **more)
    told = {f"rope.scaling.{key}": value for key, value in keys.items()}
    ggufs.write(tmp_path / "m.gguf", model, kind, keys=told, extra=tensors)
    ran = ortho("convert", tmp_path / "m.gguf", "-o", tmp_path / "out")
    assert ran.code == 0, ran.err
    found, wanted = AutoConfig.from_pretrained(tmp_path / "out").rope_parameters, {}
    wanted = {**model.config.rope_parameters}
    assert found.pop("attention_factor", None) == pytest.approx(
        wanted.pop("attention_factor", None)
    )
    for key in ("type", "partial_rotary_factor"):  # as old as new, and 1 where it is not said
        found.pop(key, None), wanted.pop(key, None)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key] == (pytest.approx(value) if not isinstance(value, str) else value)
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    for length in (40, 150):  # shorter and longer than what longrope was trained on
        assert torch.allclose(ggufs.logits(made, length), ggufs.logits(model, length), atol=1e-4)


def test_old_key_of_linear_scaling_is_read(tmp_path: Path, ortho: Ortho) -> None:
    ggufs.write(tmp_path / "m.gguf", ggufs.make("llama"), "llama", keys={"rope.scale_linear": 4.0})
    assert ortho("convert", tmp_path / "m.gguf", "-o", tmp_path / "out").code == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_parameters"]["rope_type"] == "linear"
    assert config["rope_parameters"]["factor"] == 4.0


def test_rope_is_said_in_the_words_of_transformers_4_too(tmp_path: Path, ortho: Ortho) -> None:
    keys = {f"rope.scaling.{key}": value for key, value in YARN_KEYS.items()}
    ggufs.write(tmp_path / "m.gguf", ggufs.make("llama"), "llama", keys=keys)
    assert ortho("convert", tmp_path / "m.gguf", "-o", tmp_path / "out").code == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_theta"] == 10000.0
    assert config["rope_scaling"] == YARN


def test_gemma3_scales_its_global_layers_only(tmp_path: Path, ortho: Ortho) -> None:
    from transformers import AutoModelForCausalLM

    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
    }
    model = ggufs.make(
        "gemma3_text",
        rope_parameters=rope,
        query_pre_attn_scalar=ggufs.HEAD,
        sliding_window=8,
        num_hidden_layers=7,
    )
    keys = {
        "rope.scaling.type": "linear",
        "rope.scaling.factor": 8.0,
        "rope.freq_base_swa": 5e3,
    }
    ggufs.write(tmp_path / "m.gguf", model, "gemma3", keys=keys)
    ran = ortho("convert", tmp_path / "m.gguf", "-o", tmp_path / "out")
    assert ran.code == 0, ran.err
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert made.config.rope_parameters == rope
    assert torch.allclose(ggufs.logits(made), ggufs.logits(model), atol=1e-4)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_local_base_freq"] == 5e3


HALF = ggufs.HEAD // 2
REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, np.ndarray], str]] = {
    "type": ("llama", {"scaling.type": "su"}, {}, "`rope.scaling.type` is 'su'"),
    "ext": ("llama", {"scaling.yarn_ext_factor": 0.5}, {}, "yarn_ext_factor` is 0.5"),
    "log": ("llama", {"scaling.yarn_log_multiplier": 0.1}, {}, "yarn_log_multiplier` is 0.1"),
    "alpha": ("llama", {"scaling.alpha": 1000.0}, {}, "`rope.scaling.alpha` is 1000.0"),
    "attention": ("llama", {"scaling.attn_factor": 1.5}, {}, "`rope.scaling.attn_factor` is 1.5"),
    "factor": ("llama", {"scaling.factor": -2.0}, {}, "`rope.scaling.factor` is -2.0"),
    "no-factors": (
        "phi3",
        {"scaling.type": "longrope"},
        {},
        "no tensor `rope_factors_long.weight`",
    ),
    "one-factor": (
        "phi3",
        {},
        {"rope_factors_short.weight": np.ones(8, np.float32)},
        "`rope_factors_long.weight` is missing",
    ),
    "short-factors": (
        "phi3",
        {},
        {name: values[:-1] for name, values in FACTORS.items()},
        "is of 7 values",
    ),
    "yarn-of-phi3": (
        "phi3",
        {"scaling.type": "yarn", "scaling.factor": 4.0},
        {},
        "is yarn, and transformers' phi3 has default and longrope only",
    ),
    "strange-divisors": (
        "llama",
        {},
        {"rope_freqs.weight": np.linspace(1, 9, HALF, dtype=np.float32)[::-1].copy()},
        "no llama3 scaling makes its values",
    ),
    "few-divisors": (
        "llama",
        {},
        {"rope_freqs.weight": np.ones(HALF - 1, np.float32)},
        f"`rope_freqs.weight` is of {HALF - 1} values",
    ),
    "both": (
        "llama",
        {"scaling.type": "linear", "scaling.factor": 2.0},
        {"rope_freqs.weight": divisors(ggufs.HEAD, 1e4, 8.0, 1.0, 4.0, 64)},
        "scales rotary embeddings by `rope_freqs.weight`",
    ),
    "partial": ("llama", {"dimension_count": HALF}, {}, f"rotates {HALF} dimensions"),
    "odd": ("llama", {"dimension_count": 7}, {}, "`rope.dimension_count` is 7"),
    "wide": ("llama", {"dimension_count": 1 << 31}, {}, "`rope.dimension_count` is 2147483648"),
    "base": ("llama", {"freq_base": 0.5}, {}, "`rope.freq_base` is 0.5"),
    "local": ("qwen2", {"freq_base_swa": 5e3}, {}, "`rope.freq_base_swa` is 5000"),
    "sections": ("qwen2", {"dimension_sections": [4, 2, 2, 0]}, {}, "dimension_sections"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_rope_that_cannot_be_carried_is_refused_by_name(
    tmp_path: Path, ortho: Ortho, name: str
) -> None:
    kind, keys, tensors, told = REFUSED[name]
    keys = {f"rope.{key}": value for key, value in keys.items()}
    ggufs.write(tmp_path / "m.gguf", ggufs.make(kind), kind, keys=keys, extra=tensors)
    ran = ortho("convert", tmp_path / "m.gguf", "-o", tmp_path / "out")
    assert ran.code == CheckpointError.exit_code
    assert told in ran.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf"]
