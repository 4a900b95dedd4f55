"""Checkpoints made on the spot: a pico one for tests, a small one for the demo.

python tests/checkpoints.py FOLDER [--hidden 512 --layers 4 --mlp 1408 --vocab 4096 --shards 1]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from blake3 import blake3
from safetensors.torch import load_file, save_file
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


def save_gpt2(folder: Path) -> Path:
    """Write a GPT-2 of one layer, whose projections are Conv1D, with a tokenizer."""
    import transformers

    torch.manual_seed(0)
    settings = transformers.GPT2Config(
        n_embd=64, n_layer=1, n_head=2, vocab_size=96, n_positions=64
    )
    transformers.GPT2LMHeadModel(settings).save_pretrained(folder)
    save_tokenizer(folder, vocab=96)
    return folder


def save_statistics(
    path: Path,
    source: Path,
    *,
    kind: str = "fisher",
    storage: str = "full",
    dtype: torch.dtype = torch.bfloat16,
    forget: bool = False,
    seed: int = 0,
    change: Callable[[dict[str, Tensor]], None] = lambda tensors: None,
    skip: tuple[str, ...] = (),
    gram: str | None = None,
) -> dict[str, Tensor]:
    """Write made-up statistics of every Linear of a checkpoint, with the official writer.

    Args:
        path: the file to write.
        source: the checkpoint; digests are of its own bytes.
        kind: gram, fisher or true-fisher.
        storage: full or factored.
        dtype: of what is stored in full.
        forget: make up a forget set, too.
        seed: of the numbers.
        change: edits the tensors before they are digested.
        skip: weights that were not measured.
        gram: weighting of the full input Gram matrix, none or gradient; None leaves it out.
    Returns:
        The curvature of each weight, float32, (in,) or (out, in).
    """
    generator = torch.Generator().manual_seed(seed)
    weights_: dict[str, Tensor] = {}
    for shard in [source] if source.is_file() else sorted(source.glob("*.safetensors")):
        weights_.update(load_file(shard))
    stored: dict[str, Tensor] = {}
    told: dict[str, dict[str, object]] = {}
    for name, weight in sorted(weights_.items()):
        if weight.dim() == 2 and "embed" not in name and name not in skip:
            stored.update(_measure(name, weight, generator, kind, storage, dtype, forget))
            if gram:
                inputs = torch.randn(2 * weight.shape[1], weight.shape[1], generator=generator)
                matrix = inputs.T @ inputs / len(inputs)
                stored[name.removesuffix("weight") + "retain_gram"] = (matrix + matrix.T) / 2
            told[name] = {
                "shape": list(weight.shape),
                "source_blake3": blake3(_raw(weight)).hexdigest(),
                "mean": 1e-9,
                **({"overlap": 0.25} if forget else {}),
            }
    change(stored)
    curvature: dict[str, Tensor] = {}
    for name in told:
        key = name.removesuffix("weight") + "retain_curvature"
        if f"{key}_rows" in stored:
            curvature[name] = stored[f"{key}_rows"][:, None] * stored[f"{key}_columns"]
        elif key in stored:
            curvature[name] = stored[key].float()
    sets = {"retain": {"sequences": 8, "tokens": 4096, "blake3": ["0" * 64]}}
    if forget:
        sets["forget"] = {"sequences": 2, "tokens": 64, "blake3": ["1" * 64]}
    metadata = {
        "format": "ortho-stats/1",
        "kind": kind,
        "unit": "sequence",
        "storage": storage,
        **({"gram": "full", "weighting": gram} if gram else {}),
        "source_digest": "0" * 64,
        "data": json.dumps(sets),
        "recipe": "{}",
        "versions": json.dumps({"ortho": "0", "torch": torch.__version__}),
        "tensors": json.dumps(told),
        "digests": json.dumps({k: blake3(_raw(t)).hexdigest() for k, t in stored.items()}),
    }
    save_file(stored, path, metadata=metadata)
    return curvature


def save_overflow(folder: Path) -> tuple[Path, Path]:
    """Write a weight whose rounding times its curvature leaves float32, and that curvature."""
    weight = torch.full((2, 64), 1e38)
    weight[0, :32] = 1e35
    source, stats = folder / "m.safetensors", folder / "s.safetensors"
    save_file({"a.weight": weight}, source)

    def loud(stored: dict[str, Tensor]) -> None:
        stored["a.retain_curvature"][:] = 3e38

    save_statistics(stats, source, change=loud)
    return source, stats


def _measure(
    name: str,
    weight: Tensor,
    generator: torch.Generator,
    kind: str,
    storage: str,
    dtype: torch.dtype,
    forget: bool,
) -> dict[str, Tensor]:
    """Make up what the file holds of one weight: heavy tails around 1e-9."""

    def heavy(*shape: int) -> Tensor:
        return torch.exp(3 * torch.randn(*shape, generator=generator)) * 1e-9

    key = name.removesuffix("weight") + "retain_curvature"
    rows, columns = weight.shape
    if kind == "gram":
        return {key: heavy(columns)}
    if storage == "factored":
        return {f"{key}_rows": heavy(rows), f"{key}_columns": heavy(columns) * 1e9}
    found = {key: heavy(rows, columns).to(dtype)}
    if forget:
        found[key.replace("retain", "forget")] = heavy(rows, columns).to(dtype)
        gradient = torch.randn(rows, columns, generator=generator).to(dtype)
        found[key.replace("retain_curvature", "forget_gradient")] = gradient
    return found


def _raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


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
