"""Tiny random models of several families, with blocks of their own kinds."""

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


def saved(folder: Path, kind: str, **changes: Any) -> Any:
    """Save a tiny model of a family; give it back as transformers loads it."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**FAMILIES[kind], **changes)
    kind = kind.removesuffix("Text")
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(folder)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return loaded.train(False).requires_grad_(False)
