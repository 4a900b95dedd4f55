"""The keys of a GGUF file from a config.json: the reading direction's tables, turned round.

What is written is read back before a weight is written (`gguf_base.py`): where the config that
comes back is another one, the model is refused. So a key that is missing here is no silent loss.
Source: llama.cpp's conversion/; transformers/integrations/ggml.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ortho_cli.convert.sources import gguf_config, gguf_rope
from ortho_cli.convert.targets.gguf_layout import Value
from ortho_cli.errors import CheckpointError, shown
from ortho_cli.model.load import quiet_transformers
from ortho_cli.storage import hints

# model_type -> llama.cpp's architecture. Of these, tensors are those of the checkpoint with rows in
# another order at most. mistral without a sliding window computes what llama does.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
KNOWN = ", ".join(ARCHITECTURES)


def another_way(folder: Path) -> str:
    """Name the command that writes what llama.cpp's own converter reads."""
    command = f"`ortho convert {hints.said(folder)} --alpha 0`"
    return f"{command} writes safetensors, which llama.cpp's own converter may read"


# Keys of a config that change nothing of what the model computes for given tokens.
IGNORED = frozenset({
    "architectures", "model_type", "transformers_version", "dtype", "torch_dtype", "use_cache",
    "initializer_range", "pretraining_tp", "attention_dropout", "quantization_config",
    "bos_token_id", "eos_token_id", "pad_token_id", "_name_or_path", "name_or_path",
    "output_attentions", "output_hidden_states", "return_dict", "max_window_layers",
    "chunk_size_feed_forward", "id2label", "label2id", "problem_type", "is_encoder_decoder",
    "attn_implementation", "_attn_implementation", "tie_word_embeddings",
})  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelKeys:
    """What a config says, as llama.cpp reads it."""

    architecture: str
    keys: dict[str, Value]
    layers: int
    vocabulary: int
    is_tied: bool
    divisors: npt.NDArray[np.float32] | None  # (dim / 2,), of rope_freqs.weight


def model_keys(config: Mapping[str, object], *, told: Path) -> ModelKeys:
    """Write a config as keys of a GGUF file.

    Args:
        config: config.json.
        told: the folder that errors name.
    Raises:
        CheckpointError: an architecture that is not written, or rotary embeddings that llama.cpp
            scales otherwise.
    """
    kind = config.get("model_type")
    architecture = ARCHITECTURES.get(str(kind))
    if architecture is None:
        raise CheckpointError(
            f"`{told}` is a model of type {shown(kind)}, and GGUF is written of {KNOWN}",
            hint=another_way(told),
        )
    made = read_config(config)
    with quiet_transformers() as transformers:
        mapping: Any = vars(transformers.integrations.ggml)["GGUF_CONFIG_MAPPING"]
    table = {**mapping[architecture], **gguf_config.CARRIED.get(architecture, {})}
    found: dict[str, Value] = {}
    for key, attribute in table.items():
        value = None if attribute is None else getattr(made, attribute, None)
        if isinstance(value, bool | int | float):
            found[f"{architecture}.{key}"] = value
    width = gguf_config.head_width(made.to_dict())
    # llama.cpp takes hidden / heads for both where either is missing.
    lengths = dict.fromkeys(("attention.key_length", "attention.value_length"), width)
    found |= {f"{architecture}.{key}": value for key, value in lengths.items()}
    scaling, divisors = _rope_keys(made.rope_parameters or {}, width, told)
    found |= {f"{architecture}.{key}": value for key, value in scaling.items()}
    return ModelKeys(
        architecture=architecture,
        keys=found,
        layers=int(made.num_hidden_layers),
        vocabulary=int(made.vocab_size),
        is_tied=bool(made.tie_word_embeddings),
        divisors=divisors,
    )


def read_config(config: Mapping[str, object]) -> Any:
    """Make the config of transformers; Any: its classes are found by name."""
    with quiet_transformers() as transformers:
        return transformers.CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))


def _rope_keys(
    rope: Mapping[str, Any], width: int, told: Path
) -> tuple[dict[str, Value], npt.NDArray[np.float32] | None]:
    """Write `rope_parameters` as keys, and as divisors where llama.cpp has no key."""
    kind, theta = rope.get("rope_type", "default"), float(rope.get("rope_theta", gguf_rope.BASE))
    found: dict[str, Value] = {"rope.freq_base": theta, "rope.dimension_count": width}
    if kind == "linear":
        found |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    elif kind == "yarn":
        found |= {"rope.scaling.type": "yarn", "rope.scaling.factor": float(rope["factor"])}
        if (original := rope.get("original_max_position_embeddings")) is not None:
            found["rope.scaling.original_context_length"] = int(original)
        for key, name in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
            if rope.get(name) is not None:
                found[f"rope.scaling.{key}"] = float(rope[name])
    elif kind == "llama3":
        waves = 2 * math.pi * theta ** (np.arange(width // 2) / (width // 2))
        return found, gguf_rope.llama3_divisors(rope, waves).astype(np.float32)
    elif kind != "default":
        raise CheckpointError(
            f"`{told}` scales rotary embeddings as {shown(kind)}, and GGUF is written of default, "
            "linear, yarn and llama3",
            hint=another_way(told),
        )
    return found, None


def check_read_back(
    config: Mapping[str, object], read: Mapping[str, object], *, told: Path
) -> None:
    """Hold the config that comes back from a file against the one that it was written of.

    Raises:
        CheckpointError: names the first key that llama.cpp would not know of.
    """
    wanted, found = (read_config(one).to_dict() for one in (config, read))
    for one in (wanted, found):  # qwen2 has it where it is not hidden / heads alone
        one["head_dim"] = gguf_config.head_width(one)
    for key in sorted(wanted.keys() | found.keys()):
        mine, other = wanted.get(key), found.get(key)
        if key not in IGNORED and not _same(mine, other):
            raise CheckpointError(
                f"`{told}` says `{key}` is {shown(mine)}, and of its GGUF file a reader would make "
                f"{shown(other)}",
                hint=another_way(told),
            )


def _same(left: object, right: object) -> bool:
    """Compare values; floats as far as float32, which GGUF holds, tells them apart."""
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        keys = left.keys() | right.keys()
        return all(_same(left.get(key), right.get(key)) for key in keys)
    if isinstance(left, float) or isinstance(right, float):
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        return numbers and math.isclose(float(left), float(right), rel_tol=1e-6)  # type: ignore[arg-type]
    return left == right or (not left and not right)  # None and False, [] and None
