"""What is split of whole checkpoints, what is refused, and where each refusal leads."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ortho
from safetensors.torch import load_file, save_file

from ortho_cli.decompose import plan, recipe
from ortho_cli.errors import CheckpointError, OrthoError, RecipeError
from ortho_cli.storage.checkpoint import open_checkpoint

Shapes = dict[str, tuple[int, ...]]
Q = "model.layers.0.self_attn.q_proj.weight"


def write(folder: Path, shapes: Shapes, dtype: torch.dtype = torch.bfloat16, **config: Any) -> Path:
    """Write a model folder of these tensors; without settings a bare file."""
    folder.mkdir(exist_ok=True)
    path = folder / "model.safetensors"
    tensors = {name: torch.ones(shape).to(dtype) for name, shape in shapes.items()}
    save_file(tensors, path, metadata={"format": "pt"})
    if not config:
        return path
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def reasons(source: Path, *sets: str) -> dict[str, str | None]:
    made = plan.make_plan(open_checkpoint(source), recipe.load_recipe(None, sets))
    return {tensor["name"]: tensor["reason"] for tensor in made.to_json()["tensors"]}


def refusal(source: Path, *sets: str) -> OrthoError:
    with pytest.raises(OrthoError) as caught:
        reasons(source, *sets)
    assert caught.value.hint
    return caught.value


def test_select_shape_counts_where_the_name_says_nothing(tmp_path: Path) -> None:
    shapes = {"net.table.weight": (320, 64), "net.proj.weight": (96, 64), Q: (64, 64)}
    source = write(tmp_path, shapes, vocab_size=320, hidden_size=64)
    assert reasons(source) == {
        "net.table.weight": "embedding or output head",
        "net.proj.weight": None,
        Q: None,
    }
    assert reasons(source, "targets=['*table*']")["net.table.weight"] is None


def test_select_list_of_embeddings_can_never_be_split(tmp_path: Path) -> None:
    source = write(tmp_path, {"decoder.embed_tokens.1.weight": (96, 64), Q: (64, 64)})
    assert reasons(source)["decoder.embed_tokens.1.weight"] == "embedding"
    error = refusal(source, "targets=['*embed_tokens*']")
    assert "cannot be split (embedding)" in error.message


def test_select_router_by_path_may_be_targeted_by_name(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.router.layer.weight"
    source = write(tmp_path, {name: (8, 64), Q: (64, 64)})
    assert reasons(source)[name] == "router"
    assert reasons(source, "targets=['*']")[name] is None


@pytest.mark.parametrize("packed", ["in_proj_weight", "q_proj_weight"])
def test_select_output_of_multihead_attention_stays_whole(tmp_path: Path, packed: str) -> None:
    shapes = {
        f"tower.blocks.0.attn.{packed}": (192, 64),
        "tower.blocks.0.attn.out_proj.weight": (64, 64),
        "tower.blocks.0.mlp.out_proj.weight": (64, 64),
    }
    told = reasons(write(tmp_path, shapes))
    assert told["tower.blocks.0.attn.out_proj.weight"] == "part of nn.MultiheadAttention"
    assert told["tower.blocks.0.mlp.out_proj.weight"] is None


@pytest.mark.parametrize(
    ("name", "shape", "config", "expected"),
    [
        ("model.layers.0.mlp.experts.gate_up_proj", (4, 64, 128), {}, "3-D, fused experts"),
        ("m.layers.0.moe.down_proj.weight", (4, 64, 128), {}, "3-D, fused experts"),
        (
            "m.layers.0.block_sparse_moe.input_linear.weight",
            (4, 128, 64),
            {"num_local_experts": 4},
            "3-D, fused experts",
        ),
        ("t.blocks.0.ffn.experts.mlp.w1", (256, 64), {}, "2-D, fused experts"),
        ("layers.0.mamba.x_proj_weight", (2, 72, 128), {}, "3-D, stacked matrices"),
    ],
)
def test_select_stacked_linears_are_refused_by_name_and_kept_on_request(
    tmp_path: Path, name: str, shape: tuple[int, ...], config: dict[str, Any], expected: str
) -> None:
    source = write(tmp_path, {name: shape, Q: (64, 64)}, **config)
    error = refusal(source)
    assert isinstance(error, CheckpointError)
    assert error.message.startswith(f"tensor `{name}` {list(shape)} cannot be split: {expected}")
    assert "--set on_unsupported=keep" in str(error.hint)
    assert reasons(source, "on_unsupported=keep")[name] == expected


@pytest.mark.parametrize(
    "name",
    [
        "vision_model.embeddings.position_embedding",
        "vit.embeddings.position_embeddings",
        "encoder.pos_embed",
        "quantizer.codevectors",
        "resampler.latents",
        "backbone.stem.conv.weight",
        "depth_decoder.codebooks_head.weight",
    ],
)
def test_select_learned_positions_and_kernels_are_no_stacked_experts(
    tmp_path: Path, name: str
) -> None:
    for first in (1, 3):
        source = write(tmp_path, {name: (first, 96, 64), Q: (64, 64)})
        assert reasons(source)[name] == "3-D"


@pytest.mark.parametrize("sets", [[], ["on_unsupported=keep"], ["ignore=['*experts*']"]])
@pytest.mark.parametrize("nested", [False, True])
def test_select_stacked_llama_4_is_refused_whatever_the_recipe(
    tmp_path: Path, sets: list[str], nested: bool
) -> None:
    experts = "model.layers.0.feed_forward.experts.gate_up_proj"
    config = {"model_type": "llama4_text"}
    told = {"model_type": "x", "text_config": config} if nested else config
    source = write(tmp_path, {experts: (4, 64, 128), Q: (64, 64)}, **told)
    error = refusal(source, *sets)
    assert error.exit_code == 4
    assert f"`{experts}` [4, 64, 128] stacks the experts of a Llama 4" in error.message
    assert "keep" not in str(error.hint)
    assert "`feed_forward.experts.N.gate_proj.weight`" in str(error.hint)


def test_select_llama_4_of_single_experts_is_split(tmp_path: Path) -> None:
    name = "model.layers.0.feed_forward.experts.0.gate_proj.weight"
    router = "model.layers.0.feed_forward.router.weight"
    source = write(tmp_path, {name: (64, 64), router: (4, 64)}, model_type="llama4_text")
    assert reasons(source) == {name: None, router: "router"}


def test_keep_is_not_proposed_where_it_leaves_nothing_to_do(tmp_path: Path) -> None:
    experts = {"model.layers.0.mlp.experts.down_proj": (4, 64, 64), "emb.weight": (96, 64)}
    error = refusal(write(tmp_path / "a", experts))
    assert "keep" not in str(error.hint)
    conv1d = {"h.0.attn.c_attn.weight": (64, 192), "wte.weight": (96, 64)}
    error = refusal(write(tmp_path / "b", conv1d, model_type="gpt2"))
    assert "keep" not in str(error.hint)
    assert "`ortho_cli.Engine`" in str(error.hint)


def test_dtype_that_cannot_be_split_is_cast_by_the_command_in_the_hint(
    tmp_path: Path, ortho: Ortho
) -> None:
    write(tmp_path / "m", {Q: (64, 64)}, torch.float64, model_type="llama")
    ran = ortho("decompose", tmp_path / "m")
    assert ran.code == 4
    command = ran.err.replace("\n", " ").partition("`ortho ")[2].partition("`")[0]
    arguments = shlex.split(" ".join(command.split()))
    assert ortho(*arguments).code == 0
    cast = tmp_path / "m-converted"
    assert load_file(cast / "model.safetensors")[Q].dtype == torch.float32
    assert ortho("decompose", cast).code == 0


@pytest.mark.parametrize(
    "siblings",
    [
        ("attention.self.query", "attention.self.key"),
        ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
        ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z"),
        ("linear_attn.in_proj_b", "linear_attn.in_proj_a"),
        ("feed_forward.w1", "feed_forward.w3"),
        ("attn.to_q", "attn.to_v"),
    ],
)
def test_siblings_that_vllm_fuses_are_split_together(
    tmp_path: Path, siblings: tuple[str, str]
) -> None:
    one, two = (f"model.layers.0.{leaf}.weight" for leaf in siblings)
    source = write(tmp_path, {one: (64, 64), two: (64, 64)})
    error = refusal(source, f"ignore=['{two}']")
    assert isinstance(error, RecipeError)
    assert f"`{one}` would be split and `{two}` not" in error.message
    assert "vLLM runs them as one matrix" in error.message


def test_experts_of_a_layer_have_the_same_bits(tmp_path: Path) -> None:
    experts = "model.layers.0.mlp.experts"
    names = [f"{experts}.{n}.{leaf}.weight" for n in (0, 1) for leaf in ("up_proj", "down_proj")]
    source = write(tmp_path, dict.fromkeys(names, (64, 64)))
    for match in ("*.1.*", "*down_proj*"):
        error = refusal(source, f"overrides=[{{match: '{match}', base: {{bits: 3}}}}]")
        assert isinstance(error, RecipeError)
        assert "vLLM runs their experts as one layer" in error.message
    assert reasons(source, "overrides=[{match: '*experts*', base: {bits: 3}}]")


def test_tied_head_by_default_of_the_type_can_never_be_split(tmp_path: Path) -> None:
    shapes = {"lm_head.weight": (96, 64), "model.embed_tokens.weight": (96, 64), Q: (64, 64)}
    tied = write(tmp_path / "a", shapes, model_type="gemma2", vocab_size=96)
    assert reasons(tied)["lm_head.weight"] == "tied to the embedding"
    free = write(tmp_path / "b", shapes, model_type="llama", vocab_size=96)
    assert reasons(free)["lm_head.weight"] == "output head"
    assert reasons(free, "targets=['*head*', '*q_proj*']")["lm_head.weight"] is None


def test_inspect_says_the_reason_of_each_tensor(tmp_path: Path, ortho: Ortho) -> None:
    shapes = {
        "model.layers.0.mlp.gate.wg.weight": (8, 64),
        "lm_heads.0.weight": (96, 64),
        "emb.weight": (96, 64),
        Q: (64, 64),
    }
    ran = ortho("inspect", write(tmp_path, shapes), "--json")
    assert {tensor["name"]: tensor["reason"] for tensor in ran.json["tensors"]} == {
        "model.layers.0.mlp.gate.wg.weight": "router",
        "lm_heads.0.weight": "output head",
        "emb.weight": "embedding",
        Q: None,
    }
