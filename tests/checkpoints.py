"""Checkpoints made on the spot: a pico one for tests, a small one for the demo.

python tests/checkpoints.py FOLDER [--hidden 512 --layers 4 --mlp 1408 --vocab 4096 --shards 1]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor


def weights(
    *,
    hidden: int,
    mlp: int,
    layers: int,
    vocab: int,
    kv: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    bias: bool = False,
) -> dict[str, Tensor]:
    """Make the tensors of a Llama with tied embeddings: heavy tails, and loud input channels."""
    generator = torch.Generator().manual_seed(seed)
    kv = kv or hidden

    def matrix(rows: int, columns: int) -> Tensor:
        body = torch.randn(rows, columns, generator=generator)
        tails = torch.randn(rows, columns, generator=generator).square_().add_(0.25).rsqrt_()
        loud = torch.exp(0.3 * torch.randn(columns, generator=generator))
        return (0.02 * body * tails.clamp_(max=8.0) * loud).to(dtype)

    def norm() -> Tensor:
        return (1 + 0.1 * torch.randn(hidden, generator=generator)).to(dtype)

    found = {"model.embed_tokens.weight": matrix(vocab, hidden), "model.norm.weight": norm()}
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (mlp, hidden),
        "mlp.up_proj": (mlp, hidden),
        "mlp.down_proj": (hidden, mlp),
    }
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name, shape in shapes.items():
            found[f"{prefix}{name}.weight"] = matrix(*shape)
            if bias and name.endswith(("q_proj", "k_proj", "v_proj")):
                found[f"{prefix}{name}.bias"] = matrix(1, shape[0])[0]
        found[f"{prefix}input_layernorm.weight"] = norm()
        found[f"{prefix}post_attention_layernorm.weight"] = norm()
    return found


def config(
    *, hidden: int, mlp: int, layers: int, vocab: int, kv: int, heads: int
) -> dict[str, object]:
    """Make the config.json that goes with `weights`."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv * heads // hidden,
        "vocab_size": vocab,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def save(folder: Path, tensors: dict[str, Tensor], *, shards: int = 1) -> None:
    """Write a folder as transformers does: one file, or shards with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(tensors)
    weight_map = {}
    for shard in range(shards):
        mine = names[shard::shards]
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensors[name] for name in mine}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(mine, file))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def save_tokenizer(folder: Path, *, vocab: int) -> None:
    """Write a tokenizer whose tokens are characters: 0 unknown, 1 begin, 2 end, 3 is a."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = {"<unk>": 0, "<s>": 1, "</s>": 2}
    characters = "abcdefghijklmnopqrstuvwxyz .,\nABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
    for character in characters[: vocab - 3]:
        known[character] = len(known)
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(?m)."), "isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    )
    fast.save_pretrained(folder)


def main() -> None:
    """Write the demo's checkpoint."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    for name, default in (
        ("hidden", 512),
        ("layers", 4),
        ("mlp", 1408),
        ("vocab", 4096),
        ("shards", 1),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    chosen = parser.parse_args()
    size = {name: getattr(chosen, name) for name in ("hidden", "layers", "mlp", "vocab")}
    kv = chosen.hidden // 4
    save(chosen.folder, weights(**size, kv=kv), shards=chosen.shards)
    settings = config(**size, kv=kv, heads=chosen.hidden // 64)
    (chosen.folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")


if __name__ == "__main__":
    main()
