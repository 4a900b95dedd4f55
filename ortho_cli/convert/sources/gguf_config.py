"""The config of a GGUF file: every key that changes what the model computes, or a refusal.

transformers maps some keys of each architecture and ignores the others without a word. Here each
key is mapped by transformers, or carried by the tables below, or known to change nothing; any other
one is refused by name. Where the two differ, llama.cpp's computation counts.
Source: transformers/integrations/ggml.py; llama.cpp's conversion/ and src/models/.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from ortho_cli.convert.sources import gguf_rope
from ortho_cli.convert.sources.gguf_file import GgufModel, GgufTensor, one_of_equals, read_number
from ortho_cli.errors import shown

Config = dict[str, object]  # keywords of a config of transformers

# model_type -> ARCH.key -> attribute, where transformers' own map lacks the key, or maps it to an
# attribute that the config does not have.
_WIDTH = {"attention.key_length": "head_dim"}
_CAPS = {key: key for key in ("attn_logit_softcapping", "final_logit_softcapping")}
CARRIED: dict[str, dict[str, str]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _WIDTH),
    "qwen2_moe": {
        **_WIDTH,
        "expert_feed_forward_length": "moe_intermediate_size",
        "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    },
    "qwen3_moe": _WIDTH | {"expert_feed_forward_length": "moe_intermediate_size"},
    "phi3": {
        **_WIDTH,
        "attention.sliding_window": "sliding_window",
        "rope.scaling.original_context_length": "original_max_position_embeddings",
    },
    **dict.fromkeys(("gemma2", "gemma3_text"), _CAPS),
    "stablelm": {"use_parallel_residual": "use_parallel_residual"},
    "nemotron": _WIDTH | {"attention.layer_norm_epsilon": "norm_eps"},
    "falcon": {
        "attention.head_count_kv": "num_kv_heads",
        "attention.layer_norm_epsilon": "layer_norm_epsilon",
        "feed_forward_length": "ffn_hidden_size",
    },
    "gpt2": {"context_length": "n_positions", "feed_forward_length": "n_inner"},
    "lfm2": {"attention.layer_norm_rms_epsilon": "norm_eps"},
    "minimax_m2": {"expert_feed_forward_length": "intermediate_size"},
}
# Values with which a key changes nothing, whatever the model; None: any value.
NEUTRAL: dict[str, tuple[object, ...] | None] = {
    "pooling_type": None,  # of embeddings, not of next tokens
    "rope.scaling.finetuned": None,
    "vocab_size": None,  # the shape of the embedding is compared with the model's
    "attention.causal": (True,),
    "tensor_data_layout": ("Meta AI original pth",),
    **dict.fromkeys(("use_parallel_residual", "swin_norm"), (False,)),
    **dict.fromkeys((
        "attention.max_alibi_bias", "attention.clamp_kqv", "attention.scale",
        "attention.sliding_window", *_CAPS, "router_logit_softcapping", "expert_count",
        "expert_used_count", "expert_shared_count", "leading_dense_block_count",
        "nextn_predict_layers",
    ), (0,)),
    **dict.fromkeys((
        "attention.output_scale", "logit_scale", "residual_scale", "embedding_scale",
        "expert_group_count", "expert_group_used_count", "expert_weights_scale",
    ), (0, 1)),
}  # fmt: skip
# The same for one model_type, which counts before NEUTRAL.
OWN_NEUTRAL: dict[str, dict[str, tuple[object, ...] | None]] = {
    "bloom": {"context_length": None, "attention.max_alibi_bias": (0, 8)},  # its own alibi
    "falcon": {"tensor_data_layout": ("jploski",)},
    "mamba": {
        "context_length": None,  # it has no end
        "feed_forward_length": (0,),
        "attention.head_count": (0,),
        "attention.head_count_kv": (0,),
        "ssm.dt_b_c_rms": (False,),
        "ssm.group_count": (0, 1),
    },
    "qwen2_moe": {"expert_weights_norm": (False,), "expert_gating_func": (0, 1)},
    "qwen3_moe": {"expert_weights_norm": (True,), "expert_gating_func": (0, 1)},
}
# A switch of the config that is on where the file has such a tensor.
BIASES: dict[str, dict[str, str]] = {
    "*": {"attention_bias": "attn_output.bias", "mlp_bias": "ffn_down.bias"},
    "starcoder2": {"use_bias": "attn_output.bias"},
    "falcon": {"bias": "attn_qkv.bias"},
    "mamba": {"use_bias": "ssm_in.bias", "use_conv_bias": "ssm_conv1d.bias"},
    "lfm2": {"conv_bias": "shortconv.conv.bias"},
}
# Other keys than ARCH.*: of the file, its tokenizer, how it was made.
KNOWN_PREFIXES = ("general", "tokenizer", "quantize", "split", "imatrix", "ortho", "GGUF")
# Attributes of which GGUF can have one value for each layer, and a config has one for all.
PER_LAYER = ("intermediate_size", "num_attention_heads", "num_key_value_heads")
# llama.cpp knows the 27B models, which scale attention otherwise, by their number of layers.
BY_WIDTH = {"gemma2": 46, "gemma3_text": 62}
PATTERN = "attention.sliding_window_pattern"
GEMMA3_LOCAL = 6  # every sixth layer is a global one
GEMMA3_LOCAL_BASE = 10000.0
PHI3 = ("default", "longrope")  # the `rope_type`s of its config


def check_foreign(model: GgufModel) -> list[str]:
    """Check the keys that are not of the file's architecture.

    Returns:
        A note on keys that no reader knows, or nothing.
    Raises:
        CheckpointError: keys of another architecture.
    """
    import gguf

    prefixes = {key.split(".")[0] for key in model.metadata}
    strange = sorted(prefixes - {*KNOWN_PREFIXES, model.architecture})
    for prefix in strange:
        if prefix in gguf.MODEL_ARCH_NAMES.values():
            raise model.refusal(
                f"says it is of architecture {model.architecture}, and has keys of {prefix}"
            )
    note = f"keys that no reader of GGUF knows are left out: {', '.join(strange)}.*"
    return [note] if strange else []


def complete(model: GgufModel, parsed: Config, plain: object) -> Config:
    """Add the keys that transformers ignores to its reading of a config.

    Args:
        model: the file.
        parsed: the config of transformers' `load_gguf_checkpoint`.
        plain: a config of the class, made of defaults.
    Returns:
        The keywords of the config; `rope_parameters` are not among them.
    Raises:
        CheckpointError: a key changes the model and cannot be carried.
    """
    own, kind = model.own, str(parsed["model_type"])
    names = {tensor.name: tensor for tensor in model.tensors}
    done = {k: one_of_equals(value) if k in PER_LAYER else value for k, value in parsed.items()}
    done |= {name: own[key] for key, name in CARRIED.get(kind, {}).items() if key in own}
    # llama.cpp takes as many key and value heads as heads, if the file does not say. transformers
    # then leaves the weights of llama permuted, and takes a default of the class elsewhere.
    if hasattr(plain, "num_key_value_heads") and "num_attention_heads" in done:
        done.setdefault("num_key_value_heads", done["num_attention_heads"])
    for attribute, suffix in {**BIASES["*"], **BIASES.get(kind, {})}.items():
        if hasattr(plain, attribute):
            done[attribute] = any(name.endswith(f".{suffix}") for name in names)
    if hasattr(plain, "tie_word_embeddings"):
        done["tie_word_embeddings"] = "output.weight" not in names
    _add_vocabulary(names, plain, done)
    if kind == "stablelm":
        done["use_qkv_bias"] = any(name.endswith(".attn_q.bias") for name in names)
        done["use_parallel_residual"] = not any(".ffn_norm." in name for name in names)
    _add_windows(model, kind, done)
    _check_keys(model, kind, plain, done)
    return done


def _add_vocabulary(names: Mapping[str, GgufTensor], plain: object, done: Config) -> None:
    """Set the number of tokens, and drop default tokens that are beyond it."""
    if "token_embd.weight" in names:
        done.setdefault("vocab_size", names["token_embd.weight"].shape[0])
    vocabulary = done.get("vocab_size")
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        default = getattr(plain, key, None)
        if isinstance(default, int) and isinstance(vocabulary, int) and default >= vocabulary:
            done.setdefault(key, None)


def _count(model: GgufModel, done: Config, key: str, default: int) -> int:
    return int(read_number(model.path, done, key, default))


def _add_windows(model: GgufModel, kind: str, done: Config) -> None:
    """Set the sliding window, the layers that have one, and the scale of attention."""
    layers = _count(model, done, "num_hidden_layers", 0)
    window = model.own.get("attention.sliding_window", 0)
    if kind in ("mistral", "phi3"):  # not absent: the class has a default
        done["sliding_window"] = window or None
    if kind not in BY_WIDTH:
        return
    done |= {key: done[key] or None for key in _CAPS if key in done}
    if layers == BY_WIDTH[kind]:
        heads = _count(model, done, "num_attention_heads", 1)
        done["query_pre_attn_scalar"] = _count(model, done, "hidden_size", 0) // heads
    else:
        done["query_pre_attn_scalar"] = _count(model, done, "head_dim", 256)
    pattern = model.own.get(PATTERN)
    if isinstance(pattern, list):
        local = [bool(entry) for entry in pattern]
    elif isinstance(pattern, bool):  # the same for all layers
        local = [pattern] * layers
    else:
        every = int(model.number(PATTERN, 2 if kind == "gemma2" else GEMMA3_LOCAL))
        local = [every == 0 or (layer + 1) % every != 0 for layer in range(layers)]
    if kind == "gemma3_text" and not window:
        local = [False] * layers
        # No layer uses it, and one that did would see all positions.
        done["sliding_window"] = _count(model, done, "max_position_embeddings", 4096)
    if len(local) != layers:
        raise model.refusal(f"says `{PATTERN}` is of {len(local)} layers, and there are {layers}")
    done["layer_types"] = [f"{'sliding' if one else 'full'}_attention" for one in local]


def _check_keys(model: GgufModel, kind: str, plain: object, done: Config) -> None:
    """Refuse the first key that changes the model and is not in its config."""
    from transformers import integrations

    maps = vars(integrations.ggml)["GGUF_CONFIG_MAPPING"]  # vars: not typed in every version
    mapped = maps.get(kind.removesuffix("_text"), maps.get(model.architecture, {}))
    for key, value in model.own.items():
        attribute = mapped.get(key)
        known = key == PATTERN and kind in BY_WIDTH
        if not isinstance(value, list) or (kind == "lfm2" and key == "attention.head_count_kv"):
            known = (
                known
                or key in gguf_rope.KEYS
                or key in CARRIED.get(kind, {})
                or (attribute is not None and hasattr(plain, attribute))
                or _changes_nothing(model, key, value, kind, done)
            )
        if not known:
            raise model.refusal(
                f"says `{model.architecture}.{key}` is {shown(value)}, which transformers' {kind} "
                "has no setting for"
            )
    if kind == "falcon" and (done.get("num_kv_heads") or 1) != 1:
        raise model.refusal(
            f"is a Falcon of {done['num_kv_heads']} key and value heads, whose layout "
            "transformers does not undo"
        )


def _changes_nothing(model: GgufModel, key: str, value: object, kind: str, done: Config) -> bool:
    """Tell whether a key has a value with which the model computes the same as without it."""
    neutral = OWN_NEUTRAL.get(kind, {}).get(key, NEUTRAL.get(key, ()))
    if neutral is None or value in neutral:
        return True
    width = head_width(done)
    same: dict[str, float] = {"attention.key_length": width, "attention.value_length": width}
    if kind == "bloom":
        same["feed_forward_length"] = 4 * _count(model, done, "hidden_size", 0)
        same["attention.head_count_kv"] = _count(model, done, "n_head", 0)
    if key in same or not isinstance(value, int | float):
        return key in same and value == same[key]
    if key == "attention.scale":
        return math.isclose(value, 1 / math.sqrt(width), rel_tol=1e-5)
    # A window as long as the longest text hides nothing.
    longest = model.number("context_length", math.inf)
    return key == "attention.sliding_window" and value >= longest


def head_width(done: Config) -> int:
    """Compute the width of an attention head."""

    def first(*keys: str) -> int:
        found = (done.get(key) for key in keys)
        return next((size for size in found if isinstance(size, int) and size), 0)

    heads = first("num_attention_heads", "n_head", "num_heads") or 1
    return first("head_dim") or first("hidden_size", "n_embd", "d_model") // heads


def carry_rope(model: GgufModel, rope: gguf_rope.Rope, done: Config) -> None:
    """Put rotary embeddings into a config's keywords, as transformers 5 takes them.

    Raises:
        CheckpointError: layers have bases that the model cannot be given.
    """
    for key in ("rope_theta", "rope_scaling", "partial_rotary_factor"):
        done.pop(key, None)
    if done["model_type"] == "gemma3_text":
        # llama.cpp scales the global layers only.
        local = GEMMA3_LOCAL_BASE if rope.local_theta is None else rope.local_theta
        done["rope_parameters"] = {
            "full_attention": dict(rope.parameters),
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        }
        return
    if rope.local_theta not in (None, rope.theta):
        raise model.refusal(
            f"says `rope.freq_base_swa` is {rope.local_theta:g} and `rope.freq_base` "
            f"{rope.theta:g}; {done['model_type']} has one base for all layers"
        )
    if done["model_type"] == "phi3" and rope.kind not in PHI3:
        raise model.refusal(
            f"says `rope.scaling.type` is {rope.kind}, and transformers' phi3 has "
            f"{' and '.join(PHI3)} only"
        )
    done["rope_parameters"] = dict(rope.parameters)
    if done["model_type"] == "phi3" and rope.kind == "longrope":
        original = rope.parameters["original_max_position_embeddings"]
        done["original_max_position_embeddings"] = original  # phi3 reads it here first


def add_old_keys(config: Config) -> Config:
    """Add the keys that transformers 4 has for rotary embeddings and experts; 5 reads both."""
    parameters = config.get("rope_parameters")
    if not isinstance(parameters, dict):
        return config
    done = dict(config)
    if config.get("model_type") == "qwen3_moe" and "num_local_experts" in config:
        done["num_experts"] = config["num_local_experts"]
    if isinstance(parameters.get("full_attention"), dict):
        done["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
        parameters = parameters["full_attention"]
    old = dict(parameters)
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in old:
            done[key] = old.pop(key)
    if config.get("model_type") == "phi3" and old.get("rope_type") == "longrope":
        # Version 4 takes three keys and no other.
        old["type"] = old.pop("rope_type")
        done["original_max_position_embeddings"] = old.pop("original_max_position_embeddings")
    if old.get("rope_type") != "default":
        done["rope_scaling"] = old
    return done
