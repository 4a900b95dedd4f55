"""Tiny models, and GGUF files of them, as llama.cpp's converter writes them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind

VOCAB, HIDDEN, MLP, LAYERS, HEADS, KV_HEADS, HEAD = 96, 64, 96, 2, 4, 2, 32


def make(kind: str, **changes: Any) -> Any:
    """Make a model of random weights; heads are wider than hidden / heads where they can be."""
    import transformers

    wide = (
        {}
        if kind in ("qwen2", "qwen2_moe", "phi3", "starcoder2", "stablelm")
        else {"head_dim": HEAD}
    )
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 256,
        "tie_word_embeddings": kind == "gemma2",
        "pad_token_id": None,
        **wide,
        **changes,
    }
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[kind](**settings)
    with warnings.catch_warnings(action="ignore"):
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # no norm of ones, no bias of zeros, no weak head
            if parameter.dim() == 1:
                parameter += torch.rand_like(parameter) / 2
            else:
                parameter *= 4
    return model


def keys_of(model: Any, arch: str) -> dict[str, Any]:
    """Give the keys that the converter writes of a config, without `ARCH.`."""
    config = model.config
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys = {
        "context_length": config.max_position_embeddings,
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "rope.freq_base": float(rope["rope_theta"]),
        "vocab_size": config.vocab_size,
    }
    for key, attributes in (
        ("attention.layer_norm_rms_epsilon", ("rms_norm_eps",)),
        ("attention.layer_norm_epsilon", ("layer_norm_eps", "norm_epsilon", "norm_eps")),
    ):
        for attribute in attributes:
            if hasattr(config, attribute):
                keys[key] = float(getattr(config, attribute))
    if arch in ("llama", "phi3", "stablelm", "nemotron"):
        keys["rope.dimension_count"] = int(width * rope.get("partial_rotary_factor", 1.0))
    if getattr(config, "head_dim", None):
        keys |= {"attention.key_length": width, "attention.value_length": width}
    return keys | _own_keys(config, arch)


def _own_keys(config: Any, arch: str) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    if arch in ("gemma2", "gemma3", "phi3"):
        keys["attention.sliding_window"] = config.sliding_window or 0
    if arch == "gemma2":
        keys["attn_logit_softcapping"] = config.attn_logit_softcapping
        keys["final_logit_softcapping"] = config.final_logit_softcapping
    if arch == "phi3":
        keys["rope.scaling.original_context_length"] = config.original_max_position_embeddings
    if arch == "stablelm":
        keys["use_parallel_residual"] = config.use_parallel_residual
    if arch.endswith("moe"):
        keys |= {
            "expert_count": config.num_experts,
            "expert_used_count": config.num_experts_per_tok,
            "expert_feed_forward_length": config.moe_intermediate_size,
        }
    return keys


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Put rotary halves beside each other, as llama.cpp wants them of a llama."""
    halves = weight.reshape(heads, 2, len(weight) // heads // 2, *weight.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def tensors_of(model: Any, arch: str) -> dict[str, np.ndarray]:
    """Give a model's weights under llama.cpp's names and in its layouts."""
    config = model.config
    arches = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(arches[arch], config.num_hidden_layers)
    found = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, dot, suffix = name.rpartition(".")
        if suffix not in ("weight", "bias"):
            stem, dot, suffix = name, ".", "weight"
        values = tensor.float().numpy()
        if stem.endswith("gate_up_proj") and values.ndim == 3:
            for part, half in zip(("gate", "up"), np.split(values, 2, axis=1), strict=True):
                layer = stem.split(".")[2]
                found[f"blk.{layer}.ffn_{part}_exps.weight"] = np.ascontiguousarray(half)
            continue
        if arch in ("gemma2", "gemma3", "nemotron") and name.endswith("norm.weight"):
            values = values + 1
        if arch == "llama" and ".q_proj." in name:
            values = permute(values, config.num_attention_heads)
        if arch == "llama" and ".k_proj." in name:
            values = permute(values, config.num_key_value_heads)
        if "shared_expert_gate" in name:
            values = values[0]
        found[f"{names.get_name(stem)}{dot}{suffix}"] = values
    return found


def add_key(writer: Any, key: str, value: Any) -> None:
    """Write a key of whatever type its value has."""
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)


def write(
    path: Path,
    model: Any,
    arch: str,
    *,
    keys: dict[str, Any] | None = None,
    extra: dict[str, np.ndarray] | None = None,
    drop: tuple[str, ...] = (),
    endian: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE,
    split: int = 0,
    kind: Kind = Kind.F32,
    vocabulary: bool = False,
    name: str = "tiny",
) -> None:
    """Write a model as GGUF; a key is without `ARCH.` or begins with `!`; None takes it away."""
    writer = gguf.GGUFWriter(path, arch, endianess=endian, split_max_tensors=split)
    writer.add_name(name)
    for key, value in {**keys_of(model, arch), **(keys or {})}.items():
        if value is not None:
            add_key(writer, key[1:] if key.startswith("!") else f"{arch}.{key}", value)
    if vocabulary:
        count = model.config.vocab_size
        writer.add_tokenizer_model("llama")
        writer.add_token_list(["<unk>", "<s>", "</s>", *(f"<{i}>" for i in range(3, count))])
        writer.add_token_scores([0.0] * count)
        writer.add_token_types([2, 3, 3] + [1] * (count - 3))
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
    for key, values in {**tensors_of(model, arch), **(extra or {})}.items():
        if key in drop:
            continue
        if values.ndim == 1 or kind == Kind.F32:
            writer.add_tensor(key, values)
        elif kind == Kind.F16:
            writer.add_tensor(key, values.astype(np.float16))
        else:
            writer.add_tensor(key, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def logits(model: Any, length: int = 40) -> torch.Tensor:
    """Compute what a model says after each of some tokens."""
    tokens = torch.randint(3, VOCAB, (1, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits
