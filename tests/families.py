"""Tiny random models of several families, with blocks and experts of their own kinds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SIZES = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 48}
MORE = {"intermediate_size": 128, "max_position_embeddings": 64}
KV = {"num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {**SIZES, **MORE, "num_key_value_heads": 2},
    "Qwen2": {**SIZES, **MORE, "num_key_value_heads": 2},
    "Qwen3": {**SIZES, **MORE, **KV},
    "Gemma2": {**SIZES, **MORE, **KV, "sliding_window": 4},
    "Gemma3Text": {**SIZES, **MORE, **KV, "sliding_window": 4},
    "Phi3": {**SIZES, **MORE, "num_key_value_heads": 2, "pad_token_id": 0},
    "GPTNeoX": {**SIZES, **MORE},
    "Bloom": {"hidden_size": 64, "n_layer": 3, "n_head": 4, "vocab_size": 48},
    "OPT": {**SIZES, "ffn_dim": 128, "word_embed_proj_dim": 64, "max_position_embeddings": 64},
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
ROUTED = {**EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}
MIXTURES: dict[str, dict[str, Any]] = {
    "Mixtral": {**SIZES, **MORE, **KV, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen2Moe": {**SIZES, **MORE, **KV, **EXPERTS, "shared_expert_intermediate_size": 64},
    "Qwen3Moe": {**SIZES, **MORE, **KV, **EXPERTS},
    "Olmoe": {**SIZES, **MORE, "num_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0},
    "Glm4Moe": {**SIZES, **MORE, **KV, **ROUTED, "first_k_dense_replace": 1},
    "Ernie4_5_Moe": {**SIZES, **MORE, **KV, **EXPERTS, "moe_num_experts": 4, "moe_k": 2},
    "DeepseekV3": {
        **SIZES,
        **MORE,
        **ROUTED,
        "num_key_value_heads": 4,
        "first_k_dense_replace": 1,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
    },
}
# Families whose checkpoints stack the experts of a layer.
STACKED: dict[str, dict[str, Any]] = {
    "GraniteMoe": {
        **SIZES,
        **MORE,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "pad_token_id": 0,
    },
    "Gemma4Text": {
        **SIZES,
        **MORE,
        **KV,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 64,
        "enable_moe_block": True,
        "hidden_size_per_layer_input": 0,
        "global_head_dim": 16,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
}


def saved(folder: Path, kind: str, **changes: Any) -> Any:
    """Save a tiny model of a family; give it back as transformers loads it."""
    import transformers

    torch.manual_seed(0)
    options = {**FAMILIES, **MIXTURES, **STACKED}[kind] | changes
    config = getattr(transformers, f"{kind}Config")(**options)
    kind = kind.removesuffix("Text")
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(folder)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return loaded.train(False).requires_grad_(False)
