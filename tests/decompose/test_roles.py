"""What stays whole: a table of forty architectures by hand, and every one that transformers has."""

from __future__ import annotations

import os
import re
from typing import Any

import pytest
from architectures import Weight, build_all
from make_renames import matches_any

from ortho_cli.decompose.roles import Sizes, is_embedding, read_sizes, role_of
from ortho_cli.decompose.selection import MIN_IN_FEATURES, not_by_default
from ortho_cli.formats.quantization_config import quantization_config
from ortho_cli.model.renames import Rule, apply_rules, rename_modules
from ortho_cli.storage.checkpoint import TensorInfo

LAYER = "self_attn.q_proj 128x128, self_attn.o_proj 128x128, mlp.down_proj 128x256"
MOE = {"vocab_size": 1000, "num_experts": 8, "hidden_size": 128}
TEXT: dict[str, Any] = {"vocab_size": 1000, "hidden_size": 128}

# Model: config.json, what stays whole with its reason, what is split. Widths are made small.
TABLE: dict[str, tuple[dict[str, Any], str, str]] = {
    "llama": (
        TEXT,
        "model.embed_tokens 1000x128 embedding, lm_head 1000x128 output head",
        "model.layers.0.self_attn.q_proj 128x128, model.layers.0.mlp.gate_proj 256x128",
    ),
    "llama by Meta": (
        {},
        "tok_embeddings 1000x128 embedding, output 1000x128 output head",
        "layers.0.attention.wq 128x128, layers.0.feed_forward.w1 256x128",
    ),
    "llada": (
        {"vocab_size": 1264, "embedding_size": 1264, "pad_token_id": 1264, "d_model": 128},
        "model.transformer.wte 1264x128 embedding, "
        "model.transformer.ff_out 1264x128 embedding or output head",
        "model.transformer.blocks.0.ff_out 128x384, model.transformer.blocks.0.ff_proj 384x128",
    ),
    "experts with a gate of their own": (
        MOE,
        "model.layers.0.mlp.gate 8x128 router",
        "model.layers.0.mlp.experts.6.gate 64x128, model.layers.0.mlp.experts.6.up 64x128",
    ),
    "mixtral": (
        {"num_local_experts": 8},
        "model.layers.0.block_sparse_moe.gate 8x128 router",
        "model.layers.0.block_sparse_moe.experts.0.w1 256x128",
    ),
    "qwen2-moe": (
        MOE,
        "model.layers.0.mlp.gate 8x128 router, model.layers.0.mlp.shared_expert_gate 1x128 router",
        "model.layers.0.mlp.shared_expert.gate_proj 64x128, "
        "model.layers.0.mlp.experts.7.gate_proj 64x128",
    ),
    "granite-moe": (
        MOE,
        "model.layers.0.block_sparse_moe.router.layer 8x128 router",
        "model.layers.0.self_attn.k_proj 64x128",
    ),
    "jetmoe": (
        {},
        "model.layers.0.self_attention.experts.router.layer 8x128 router",
        "model.layers.0.self_attention.kv_proj 128x128",
    ),
    "dbrx": (
        {"vocab_size": 1000},
        "transformer.blocks.0.ffn.router.layer 8x128 router, transformer.wte 1000x128 embedding",
        "transformer.blocks.0.norm_attn_norm.attn.Wqkv 192x128, "
        "transformer.blocks.0.norm_attn_norm.attn.out_proj 128x128",
    ),
    "hunyuan": (
        MOE,
        "model.layers.0.mlp.gate.wg 8x128 router",
        "model.layers.0.mlp.up_proj 256x128",
    ),
    "gemma 4": (
        MOE,
        "model.layers.0.router.proj 8x128 router, model.per_layer_model_projection_norm 4x128 norm",
        "model.layers.0.self_attn.k_proj 8x128, model.layers.0.per_layer_projection 128x64",
    ),
    "gemma 3n": (
        {},
        "model.language_model.layers.0.altup.modality_router 4x128 router, "
        "model.language_model.embed_tokens_per_layer 1000x256 embedding",
        "model.language_model.layers.0.laurel.linear_left 64x128",
    ),
    "deepseek-v3": (
        {"n_routed_experts": 8},
        "model.layers.3.mlp.gate 8x128 router, model.layers.61.shared_head.head 1000x128 "
        "output head, model.layers.61.embed_tokens 1000x128 embedding",
        "model.layers.3.self_attn.kv_a_proj_with_mqa 96x128, model.layers.61.eh_proj 128x256, "
        "model.layers.0.mlp.gate_proj 256x128",
    ),
    "longcat": (
        {},
        "model.layers.0.mlp.router.classifier 12x128 router",
        "model.layers.0.mlps.0.gate_proj 256x128",
    ),
    "switch": (
        {},
        "encoder.block.1.layer.1.mlp.router.classifier 8x128 router, shared 1000x128 embedding",
        "encoder.block.1.layer.1.mlp.experts.expert_0.wi 256x128",
    ),
    "zaya": (
        {},
        "model.layers.1.mlp.gate.down_proj 64x128 router, "
        "model.layers.1.mlp.gate.router_mlp.fc1 64x64 router",
        "model.layers.0.self_attn.o_proj 128x128",
    ),
    "a gate by no known name": (
        {"num_local_experts": 8},
        "model.layers.0.moe.selector 8x128 router",
        "model.layers.0.moe.experts.7.w1 256x128, model.layers.0.moe.w_down_proj 8x128",
    ),
    "phi-1": (
        {"vocab_size": 1000},
        "layers.25.linear 1000x128 none, lm_head.linear 1000x128 output head, "
        "layers.0.wte 1000x128 embedding",
        "layers.1.mixer.Wqkv 384x128",
    ),
    "gpt-neox": (
        {},
        "gpt_neox.embed_in 1000x128 embedding, embed_out 1000x128 output head",
        "gpt_neox.layers.0.attention.query_key_value 384x128, "
        "gpt_neox.layers.0.mlp.dense_h_to_4h 512x128",
    ),
    "gpt-j": (
        {},
        "transformer.wte 1000x128 embedding, lm_head 1000x128 output head",
        "transformer.h.0.mlp.fc_in 512x128, transformer.h.0.attn.out_proj 128x128",
    ),
    "bloom": (
        {},
        "word_embeddings 1000x128 embedding",
        "h.0.self_attention.dense 128x128, h.0.self_attention.query_key_value 384x128",
    ),
    "chatglm": (
        {"padded_vocab_size": 1024},
        "transformer.embedding.word_embeddings 1024x128 embedding, "
        "transformer.output_layer 1024x128 output head",
        "transformer.encoder.layers.0.mlp.dense_h_to_4h 256x128, "
        "transformer.encoder.layers.0.self_attention.dense 128x128",
    ),
    "rwkv": (
        {},
        "emb 1000x128 embedding, head 1000x128 output head",
        "blocks.0.att.output 128x128, blocks.0.att.key 128x128, blocks.0.ffn.receptance 128x128",
    ),
    "mamba": (
        {"vocab_size": 1000},
        "backbone.embeddings 1000x128 embedding",
        "backbone.layers.0.mixer.in_proj 512x128, backbone.layers.0.mixer.x_proj 40x256, "
        "backbone.layers.0.mixer.out_proj 128x256",
    ),
    "jamba": (
        {"num_experts": 8},
        "model.layers.1.feed_forward.router 8x128 router",
        "model.layers.0.mamba.in_proj 512x128, model.layers.1.feed_forward.experts.7.up_proj "
        "256x128",
    ),
    "bert": (
        {"vocab_size": 1000, "type_vocab_size": 2},
        "bert.embeddings.word_embeddings 1000x128 embedding, cls.predictions.decoder 1000x128 "
        "output head, cls.predictions.transform.dense 128x128 output head, "
        "classifier 3x128 output head, bert.embeddings.token_type_embeddings 2x128 embedding",
        "bert.encoder.layer.0.attention.output.dense 128x128, "
        "bert.encoder.layer.0.output.dense 128x512, bert.pooler.dense 128x128",
    ),
    "roberta with a norm in its name": (
        {},
        "roberta_prelayernorm.embeddings.position_embeddings 512x128 embedding, "
        "lm_head.dense 128x128 output head",
        "roberta_prelayernorm.pooler.dense 128x128, "
        "roberta_prelayernorm.encoder.layer.0.output.dense 128x512",
    ),
    "distilbert": (
        {"vocab_size": 1000},
        "vocab_projector 1000x128 output head, qa_outputs 2x128 output head",
        "distilbert.transformer.layer.0.ffn.lin1 512x128",
    ),
    "modernbert": (
        {"vocab_size": 1000},
        "decoder 1000x128 output head, model.embeddings.tok_embeddings 1000x128 embedding",
        "model.layers.0.attn.Wqkv 384x128, model.layers.0.mlp.Wi 512x128",
    ),
    "t5": (
        {"vocab_size": 1000},
        "shared 1000x128 embedding, "
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias 32x64 embedding",
        "encoder.block.0.layer.1.DenseReluDense.wi_0 256x128, "
        "encoder.block.0.layer.1.DenseReluDense.wo 128x256",
    ),
    "bart": (
        {},
        "model.shared 1000x128 embedding, model.encoder.embed_positions 514x128 embedding, "
        "classification_head.out_proj 3x128 output head",
        "model.encoder.layers.0.self_attn.out_proj 128x128, model.decoder.layers.0.fc1 512x128",
    ),
    "whisper": (
        {"vocab_size": 1000},
        "proj_out 1000x128 output head, model.decoder.embed_positions 448x128 embedding",
        "model.decoder.layers.0.encoder_attn.k_proj 128x128",
    ),
    "biogpt": (
        {"vocab_size": 1000},
        "output_projection 1000x128 output head",
        "biogpt.layers.0.fc2 128x512",
    ),
    "fsmt": (
        {},
        "model.decoder.output_projection 1000x128 output head",
        "model.decoder.layers.0.self_attn.output_projection.o_proj 128x128",
    ),
    "musicgen": (
        {"vocab_size": 1000},
        "decoder.model.decoder.embed_tokens.3 1001x128 embedding, "
        "decoder.lm_heads.3 1000x128 output head",
        "decoder.model.decoder.layers.0.fc1 512x128",
    ),
    "qwen-omni talker": (
        {},
        "talker.codec_head 1000x128 output head, "
        "talker.code_predictor.lm_head.14 1000x128 output head",
        "talker.thinker_to_talker_proj 64x128",
    ),
    "medusa": (
        {},
        "medusa_head.0.0.linear 128x128 output head, medusa_head.0.1 1000x128 output head",
        "base_model.model.layers.0.mlp.up_proj 256x128",
    ),
    "a reward model": (
        {},
        "score 1x128 output head, v_head.summary 1x128 output head",
        "model.layers.0.mlp.up_proj 256x128",
    ),
    "ctrl": (
        {"vocab_size": 1000},
        "transformer.w 1000x128 embedding",
        "transformer.h.0.multi_head_attention.Wq 128x128, transformer.h.0.ffn.0 512x128",
    ),
    "funnel": (
        {},
        "funnel.embeddings.word_embeddings 1000x128 embedding",
        "funnel.encoder.blocks.0.0.attention.q_head 128x128",
    ),
    "llava": (
        {"text_config": TEXT},
        "vision_tower.vision_model.embeddings.position_embedding 577x128 embedding",
        "multi_modal_projector.linear_1 128x128, model.mm_projector.0 128x128, "
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1 512x128",
    ),
    "phi-4 multimodal": (
        {},
        "model.embed_tokens_extend.audio_embed.up_proj_for_speech 128x128 embedding",
        "model.embed_tokens_extend.audio_embed.encoder.encoders.0.self_attn.q_proj 128x128",
    ),
    "qwen2-vl": (
        {"vision_config": {"embed_dim": 128}, "vocab_size": 1000},
        "visual.patch_embed.proj 128x588 embedding",
        "visual.merger.mlp.0 512x512, visual.blocks.0.attn.qkv 384x128",
    ),
    "a dit": (
        {},
        "time_embed.0 128x256 embedding, time_text_embed.timestep_embedder.linear_1 128x256 "
        "embedding",
        "transformer_blocks.0.attn.to_q 128x128, transformer_blocks.0.ff.net.0.proj 512x128",
    ),
    "an mlp with a wide gate": (
        {},
        "norm.weights 2x128 norm",
        "model.layers.0.mlp.gate 256x128, model.layers.0.self_attn.gate 32x128",
    ),
    "padded": (
        {"vocab_size": 50257, "hidden_size": 128},
        "backbone.lookup 50304x128 embedding or output head, lm.final 50257x128 "
        "embedding or output head",
        "backbone.layers.0.lookup 50304x128, backbone.projection 128x128",
    ),
    "a width that is the number of tokens": (
        {"vocab_size": 128, "hidden_size": 128},
        "emb 128x128 embedding",
        "mm_projector 128x128, layers.0.att.output 128x128",
    ),
}


def cells(text: str) -> list[tuple[str, tuple[int, int], str]]:
    found = []
    for cell in text.split(", "):
        name, shape, *reason = cell.split(" ", 2)
        rows, columns = map(int, shape.split("x"))
        found.append((name, (rows, columns), reason[0] if reason else ""))
    return found


def info(name: str, shape: tuple[int, ...]) -> TensorInfo:
    return TensorInfo(name=name, dtype="BF16", shape=shape, shard="", offset=0, nbytes=0)


def test_the_table_has_forty_architectures() -> None:
    assert len(TABLE) >= 40


@pytest.mark.parametrize("model", TABLE)
def test_role_of_table_says_what_stays_whole_and_what_is_split(model: str) -> None:
    config, whole, split = TABLE[model]
    both = cells(whole) + cells(split)
    sizes = read_sizes(config, [info(f"{name}.weight", shape) for name, shape, _ in both])
    for name, shape, expected in both:
        role = role_of(name, shape, sizes)
        assert role == (None if expected in ("", "none") else expected), name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.embed_tokens", True),
        ("model.decoder.embed_tokens.0", True),
        ("emb", True),
        ("transformer.w", True),
        ("visual.patch_embed.proj", False),
        ("embed_out", False),
        ("model.layers.0.mlp.up_proj", False),
    ],
)
def test_is_embedding_takes_tables_and_not_what_stands_below_them(
    name: str, expected: bool
) -> None:
    assert is_embedding(name) is expected


def test_read_sizes_counts_tokens_and_experts_without_a_config() -> None:
    names = {f"model.layers.0.mlp.experts.{n}.up_proj.weight": (64, 128) for n in range(6)}
    stacked = {"model.layers.1.moe.experts.w13": (5, 64, 128)}
    tokens = {"model.embed_tokens.weight": (1000, 128), "x.shared_experts.0.up_proj.weight": (4, 4)}
    sizes = read_sizes(None, [info(n, s) for n, s in {**names, **stacked, **tokens}.items()])
    assert sizes.vocabularies == {1000}
    assert sizes.experts == {"model.layers.0.mlp": {6}, "model.layers.1.moe": {5}}


def test_read_sizes_takes_no_shared_or_chosen_experts_and_no_nonsense() -> None:
    config = {
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "num_experts": [8, 8],
        "x": {"y": []},
    }
    names = [info("mlp.experts.0.up_proj.weight", (64, 128))]
    assert read_sizes(config, names).experts == {"mlp": {1, 8}}
    assert read_sizes({"vocab_size": "many", "n_vocab": True}, []).vocabularies == frozenset()


def test_apply_rules_renames_in_turn_behind_its_scope() -> None:
    rules = [
        Rule((r"^head\.", r"head_long\."), "lm_head."),
        Rule(("attention.key",), "k_proj"),
        Rule((r"^(enc|dec)\.",), r"model.\1.", ("tower", "model")),
    ]
    assert apply_rules("layer.0.attention.attention.key", rules) == "layer.0.attention.k_proj"
    assert apply_rules("layer.0.attention.keys", rules) == "layer.0.attention.keys"
    assert apply_rules("tower.enc.fc", rules) == "tower.model.enc.fc"
    assert apply_rules("model.tower.dec.fc", rules) == "model.tower.model.dec.fc"
    assert apply_rules("enc.fc", rules) == "enc.fc"


def test_rename_modules_knows_a_class_and_else_its_type() -> None:
    module = "encoder.layer.3.attention.attention.key"
    for config in ({"architectures": ["ViTModel"]}, {"model_type": "vit"}):
        assert rename_modules(config, [module, "x.fc"])[module].endswith("attention.k_proj")
    assert rename_modules({"architectures": "ViTModel"}, [module]) == {}


# Where a Linear stays whole though its class is only nn.Linear: the words that say so.
HEADS = re.compile(
    r"head|embed|classif|score|qa_outputs|cls|predictions|logits|vocab_|lm_loss|pred_layer|softmax"
    r"|output_layer|output_projection|proj_out|(^|\.)output$|norm|router|gate|token|\bemb_|_emb"
    r"|^(encoder\.)?out(_mid)?$|predict_return|codebook"
)


@pytest.mark.slow
@pytest.mark.skipif("ORTHO_SLOW" not in os.environ, reason="takes minutes; set ORTHO_SLOW=1")
def test_rules_agree_with_the_classes_of_every_model_that_transformers_builds() -> None:
    """Embeddings, heads and routers stay whole; other Linears are split, and readers find them."""
    lost, kept, unseen, seen = [], [], [], set()
    for built in build_all():
        seen.add(built.model_type)
        tensors = [info(weight.name, weight.shape) for weight in built.weights]
        for config in (built.config, None):
            sizes = read_sizes(config, tensors)
            for weight in matrices(built.weights):
                role = role_of(weight.module, (weight.shape[0], weight.shape[1]), sizes)
                whole = weight.kind in ("Embedding", "router", "head") or weight.name in built.tied
                if whole and role is None and "shared_transf" not in weight.name:
                    lost.append((built.name, weight.name))
                elif (
                    config and weight.kind == "Linear" and role and not HEADS.search(weight.module)
                ):
                    kept.append((built.name, weight.name, role))
        unseen += [(built.name, name) for name in missed(built.config, built.weights)]
    assert not lost
    assert not kept
    assert not unseen, unseen
    assert len(seen) > 500


def matrices(weights: list[Weight]) -> list[Weight]:
    return [
        weight
        for weight in weights
        if len(weight.shape) == 2
        and weight.name.endswith(".weight")
        and weight.shape[1] >= MIN_IN_FEATURES
    ]


def missed(config: dict[str, Any], weights: list[Weight]) -> list[str]:
    """Name the Linears whose scheme transformers would not find, or find where there is none."""
    sizes = read_sizes(config, [info(weight.name, weight.shape) for weight in weights])
    split = {
        weight.module: 4
        for weight in matrices(weights)
        if not_by_default(weight.module, weight.shape, sizes) is None
    }
    linears = [w for w in matrices(weights) if w.kind == "Linear" and w.memory is not None]
    unsplit = {weight.module for weight in linears} - split.keys()
    for module, renamed in rename_modules(config, [*split, *unsplit]).items():
        (split.setdefault(renamed, 4) if module in split else unsplit.add(renamed))
    if not split:
        return []
    told = quantization_config(split=split, unsplit=sorted(unsplit), group_size=64)
    targets = told["config_groups"]["group_0"]["targets"]
    return [
        str(weight.memory)
        for weight in linears
        if matches_any(targets, str(weight.memory)) is not (weight.module in split)
    ]


def test_sizes_without_anything_know_nothing() -> None:
    assert read_sizes(None, []) == Sizes(experts={})
