"""The patterns in quantization_config, matched as vLLM and transformers match them."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ortho
from safetensors.torch import save_file

from ortho_cli.formats.quantization_config import quantization_config

PACKED = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
    "fused_qkv_a_proj": ["q_a_proj", "kv_a_proj_with_mqa"],
}


def hits(name: str, patterns: Iterable[str]) -> bool:
    """Match one name, as every reader does: `re:` from the start, or equal."""
    return any(
        re.match(p[3:], name) is not None if p.startswith("re:") else p == name for p in patterns
    )


def scheme(config: Mapping[str, Any], name: str) -> int | str | None:
    """Look up a module as vLLM does: ignored, bits of the group, or None where nothing matches."""
    leaf = name.rpartition(".")[2]
    parts = [name.removesuffix(leaf) + part for part in PACKED.get(leaf, [leaf])]
    ignored = {hits(part, config["ignore"]) for part in parts}
    assert len(ignored) == 1, f"{parts} have different schemes"
    if ignored == {True}:
        return "ignored"
    for group in config["config_groups"].values():
        if hits(name, group["targets"]) or all(hits(part, group["targets"]) for part in parts):
            return int(group["weights"]["num_bits"])
    return None


def experts_scheme(config: Mapping[str, Any], prefix: str) -> int | str | None:
    """Look up the experts of a layer as vLLM does: by three names of the first one."""
    names = ("gate_proj", "up_proj", "down_proj")
    found = {scheme(config, f"{prefix}.0.{name}") for name in names}
    assert len(found) == 1, found
    return found.pop()


@pytest.mark.parametrize(
    ("block", "leaves"),
    [
        ("model.layers.{}.block_sparse_moe", ["w1", "w2", "w3"]),
        ("model.layers.{}.mlp", ["gate_proj", "up_proj", "down_proj"]),
        ("model.language_model.layers.{}.mlp", ["gate_proj", "up_proj", "down_proj"]),
        ("model.layers.{}.feed_forward", ["w1", "w2", "w3"]),
        ("backbone.layers.{}.mixer", ["up_proj", "down_proj"]),
        ("model.layers.{}.ffn", ["fc1", "fc2"]),
        ("transformer.blocks.{}.ffn", ["w1", "v1", "w2"]),
    ],
)
def test_experts_are_found_under_the_names_that_vllm_asks_for(
    block: str, leaves: list[str]
) -> None:
    experts = [
        f"{block.format(n)}.experts.{e}.{x}" for n in range(3) for e in (0, 1) for x in leaves
    ]
    attention = ["model.layers.1.self_attn.q_proj"]
    routers = [f"{block.format(n)}.gate" for n in range(3)]
    config = quantization_config(
        split=dict.fromkeys(experts, 4), unsplit=routers + attention, group_size=64
    )
    for prefix in ("", "model.", "language_model."):
        for layer in (0, 2):
            moe = f"{prefix}{block.format(layer)}"
            assert experts_scheme(config, f"{moe}.experts") == 4
            assert scheme(config, f"{moe}.gate") == "ignored"
    assert scheme(config, "model.layers.1.self_attn.q_proj") == "ignored"
    assert all(hits(name, config["config_groups"]["group_0"]["targets"]) for name in experts)


@pytest.mark.parametrize("leaves", [["w1", "w2", "w3"], ["gate_proj", "up_proj", "down_proj"]])
def test_experts_that_are_carried_over_are_ignored_under_those_names(leaves: list[str]) -> None:
    experts = [f"model.layers.0.moe.experts.{e}.{leaf}" for e in range(2) for leaf in leaves]
    config = quantization_config(
        split={"model.layers.0.self_attn.o_proj": 4}, unsplit=experts, group_size=64
    )
    assert experts_scheme(config, "model.layers.0.moe.experts") == "ignored"
    assert scheme(config, "model.layers.0.self_attn.o_proj") == 4


def test_expert_that_is_split_in_part_is_asked_for_as_each_part_is() -> None:
    expert = "model.layers.0.moe.experts.0"
    config = quantization_config(
        split={f"{expert}.w1": 4, f"{expert}.w3": 3}, unsplit=[f"{expert}.w2"], group_size=64
    )
    asked = {leaf: scheme(config, f"{expert}.{leaf}") for leaf in ("gate_proj", "up_proj")}
    assert asked == {"gate_proj": 4, "up_proj": 3}
    assert scheme(config, f"{expert}.down_proj") == "ignored"


def test_shared_experts_and_dense_layers_are_no_experts() -> None:
    shared = "model.layers.1.mlp.shared_experts.gate_proj"
    config = quantization_config(
        split={"model.layers.1.mlp.experts.0.w1": 4}, unsplit=[shared], group_size=64
    )
    assert scheme(config, shared) == "ignored"
    assert scheme(config, "model.layers.0.mlp.gate_proj") is None


def test_fused_layers_have_one_scheme() -> None:
    attention = "model.layers.0.self_attn"
    split = [f"{attention}.{leaf}" for leaf in ("q_a_proj", "kv_a_proj_with_mqa", "q_b_proj")]
    config = quantization_config(
        split=dict.fromkeys(split, 4), unsplit=["model.layers.0.mlp.gate"], group_size=64
    )
    assert scheme(config, f"{attention}.fused_qkv_a_proj") == 4
    assert scheme(config, "model.layers.0.self_attn.qkv_proj") is None


def test_no_target_matches_a_module_that_ignore_leaves_out() -> None:
    config = quantization_config(
        split={"decoder.layers.0.fc1": 4},
        unsplit=[],
        others=["audio.layers.0.fc1"],
        group_size=64,
    )
    assert config["ignore"] == []
    assert scheme(config, "decoder.layers.0.fc1") == 4
    assert scheme(config, "audio.layers.0.fc1") is None


def test_module_outside_the_layers_is_found_behind_another_prefix() -> None:
    config = quantization_config(
        split={"thinker.audio_tower.proj": 4}, unsplit=["thinker.visual.proj"], group_size=64
    )
    for name in ("thinker.audio_tower.proj", "thinker.model.audio_tower.proj", "audio_tower.proj"):
        assert scheme(config, name) == 4
    assert scheme(config, "thinker.model.visual.proj") == "ignored"


def test_thousands_of_modules_take_seconds() -> None:
    split = {f"model.layers.{n}.mlp.experts.{e}.w1": 4 for n in range(20) for e in range(900)}
    unsplit = [f"model.layers.{n}.mlp.gate" for n in range(100)]
    began = time.perf_counter()
    config = quantization_config(split=split, unsplit=unsplit, group_size=64)
    assert time.perf_counter() - began < 20
    assert len(config["config_groups"]["group_0"]["targets"]) <= 4
    assert config["ignore"] == [r"re:(.*\.)?layers\.\d+\.mlp\.gate$"]


def decompose(folder: Path, ortho: Ortho, shapes: dict[str, tuple[int, ...]], **config: Any) -> Any:
    folder.mkdir()
    tensors = {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    ran = ortho("decompose", folder, "-q", "--set", "on_unsupported=keep")
    assert ran.code == 0, ran.err
    told = json.loads((folder.with_name(f"{folder.name}-ortho") / "config.json").read_text())
    return told["quantization_config"]


def test_stacked_experts_that_are_kept_are_ignored_where_vllm_looks(
    tmp_path: Path, ortho: Ortho
) -> None:
    shapes: dict[str, tuple[int, ...]] = {
        "model.layers.0.block_sparse_moe.input_linear.weight": (4, 128, 64),
        "model.layers.0.block_sparse_moe.router.layer.weight": (4, 64),
        "model.layers.1.mlp.experts.gate_up_proj": (4, 128, 64),
        "model.layers.0.self_attn.q_proj.weight": (64, 64),
    }
    config = decompose(tmp_path / "m", ortho, shapes, num_local_experts=4)
    assert experts_scheme(config, "model.layers.0.block_sparse_moe.experts") == "ignored"
    assert experts_scheme(config, "model.layers.1.mlp.experts") == "ignored"
    assert scheme(config, "model.layers.0.block_sparse_moe.router.layer") == "ignored"
    assert scheme(config, "model.layers.0.self_attn.q_proj") == 4


def test_modules_that_transformers_renames_are_found_under_both_names(
    tmp_path: Path, ortho: Ortho
) -> None:
    shapes: dict[str, tuple[int, ...]] = {
        "vit.encoder.layer.0.attention.attention.key.weight": (64, 64),
        "vit.encoder.layer.0.output.dense.weight": (64, 64),
    }
    config = decompose(tmp_path / "m", ortho, shapes, architectures=["ViTForImageClassification"])
    assert scheme(config, "vit.layers.0.attention.k_proj") == 4
    assert scheme(config, "vit.layers.0.mlp.fc2") == 4
    assert scheme(config, "vit.encoder.layer.0.attention.attention.key") == 4


@pytest.mark.parametrize(
    ("config", "head"),
    [
        ({"model_type": "gpt_neo"}, "lm_head"),
        ({"model_type": "whisper"}, "proj_out"),
        ({"model_type": "bert"}, "cls.predictions.decoder"),
        ({"model_type": "llama"}, None),
    ],
)
def test_tied_head_without_a_tensor_is_ignored_by_its_name(
    tmp_path: Path, ortho: Ortho, config: dict[str, Any], head: str | None
) -> None:
    shapes = {"decoder.layers.0.fc1.weight": (64, 64), "decoder.embed_tokens.weight": (96, 64)}
    told = decompose(tmp_path / "m", ortho, shapes, **config)
    assert bool(told["ignore"]) is (head is not None)
    if head is not None:
        assert scheme(told, head) == "ignored"
