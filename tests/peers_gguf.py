"""llama.cpp as a peer: a transformers llama to GGUF and back, and its two programs between.

llama.cpp rotates neighbouring rows of q and k where transformers rotates the halves of a head, so
these two are permuted on the way there and back.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

from ortho_cli.model.load import load_model, load_tokenizer

SOURCE = "llama-cpp-python 0.3.36"  # its source package, that both programs are built from
BLOCKS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
# Runs a command in a process that is small itself: a child's peak begins at its parent's.
LAUNCH = """
import os, sys, time
start = time.perf_counter()
child = os.posix_spawn(sys.argv[2], sys.argv[2:], os.environ)
_, status, used = os.wait4(child, 0)
with open(sys.argv[1], "w") as file:
    cpu = used.ru_utime + used.ru_stime
    print(time.perf_counter() - start, cpu, 1024 * used.ru_maxrss, file=file)
sys.exit(os.waitstatus_to_exitcode(status))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """What running a program took."""

    seconds: float
    cpu_seconds: float
    peak_rss_bytes: int


def run(*command: object, log: Path) -> Spent:
    """Run a program; what it says goes into `log`."""
    told = log.with_suffix(".spent")
    line = [sys.executable, "-S", "-c", LAUNCH, *map(str, (told, *command))]
    with log.open("w") as file:
        ran = subprocess.run(line, stdout=file, stderr=subprocess.STDOUT, check=False)
    if ran.returncode:
        raise SystemExit(f"`{command[0]}` failed: {log.read_text()[-2000:]}")
    seconds, cpu, peak = told.read_text().split()
    told.unlink()
    return Spent(seconds=float(seconds), cpu_seconds=float(cpu), peak_rss_bytes=int(peak))


def gguf_name(name: str) -> str:
    """Name a tensor of a transformers llama as llama.cpp does."""
    if name in OUTER:
        return OUTER[name]
    _, _, layer, *block, kind = name.split(".")
    return f"blk.{layer}.{BLOCKS['.'.join(block)]}.{kind}"


def heads(name: str, config: Any) -> int | None:
    """How many heads the rows of a permuted tensor belong to."""
    if name.endswith("q_proj.weight"):
        return int(config.num_attention_heads)
    return int(config.num_key_value_heads) if name.endswith("k_proj.weight") else None


def permute(weight: Tensor, count: int) -> Tensor:
    halves = weight.view(count, 2, -1, weight.shape[1])
    return halves.transpose(1, 2).reshape(weight.shape)


def unpermute(weight: Tensor, count: int) -> Tensor:
    pairs = weight.view(count, -1, 2, weight.shape[1])
    return pairs.transpose(1, 2).reshape(weight.shape)


def convert(model: Path, scratch: Path) -> Path:
    """Write a llama and its byte-level BPE tokenizer as GGUF in float32, once for its weights."""
    import gguf

    digest = blake3()
    for shard in sorted(model.glob("*.safetensors")):
        digest.update_mmap(shard)
    path = scratch / f"{digest.hexdigest(8)}.gguf"
    if path.exists():
        return path
    loaded: Any = load_model(model, dtype=torch.float32, device=torch.device("cpu"))
    config = loaded.config
    writer = gguf.GGUFWriter(path.with_suffix(".part"), "llama")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    add_vocabulary(writer, model, config.vocab_size)
    for name, weight in loaded.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        count = heads(name, config)
        turned = weight if count is None else permute(weight, count)
        writer.add_tensor(gguf_name(name), turned.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.with_suffix(".part").rename(path)
    return path


def add_vocabulary(writer: Any, model: Path, size: int) -> None:
    import gguf

    tokenizer = load_tokenizer(model)
    words = {number: word for word, number in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    types = []
    for number in range(size):
        kind = gguf.TokenType.NORMAL if number in words else gguf.TokenType.UNUSED
        if number in added:
            special = added[number].special
            kind = gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED
        types.append(kind)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([words.get(number, f"[PAD{number}]") for number in range(size)])
    writer.add_token_types(types)
    gguf.SpecialVocab(model, load_merges=True).add_to_gguf(writer)
    writer.add_add_bos_token(False)


def imatrix(
    llama: Path, source: Path, windows: Sequence[Sequence[int]], model: Path, folder: Path
) -> tuple[Path, Spent]:
    """Let llama-imatrix read the windows as text, once."""
    path, told = folder / "imatrix.gguf", folder / "spent.json"
    if not told.exists():
        folder.mkdir(parents=True, exist_ok=True)
        text = folder / "windows.txt"
        stream = [token for window in windows for token in window]
        text.write_text(load_tokenizer(model).decode(stream))
        spent = run(
            llama / "llama-imatrix",
            *("-m", source, "-f", text, "-o", path, "--parse-special"),
            *("-c", len(windows[0]), "-t", torch.get_num_threads(), "--chunks", len(windows)),
            log=folder / "log",
        )
        told.write_text(json.dumps(asdict(spent)) + "\n")
    return path, Spent(**json.loads(told.read_text()))


def llama_quantize(
    llama: Path, source: Path, out: Path, kind: str, importance: Path | None
) -> Spent:
    """Quantize all matrices of the decoder, neither embeddings nor output."""
    options = ["--token-embedding-type", "f32", "--output-tensor-type", "f32"]
    if importance is not None:
        options += ["--imatrix", str(importance)]
    program = llama / "llama-quantize"
    threads = torch.get_num_threads()
    return run(program, *options, source, out, kind, threads, log=out.with_suffix(".log"))


def dequantized(path: Path, model: Path) -> tuple[dict[str, Tensor], dict[str, int], int]:
    """Read the decoder's matrices back: float32 under transformers' names, types, and bytes."""
    import gguf
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    weights: dict[str, Tensor] = {}
    types: Counter[str] = Counter()
    kept = 0
    matrices = [block for block in BLOCKS if block.endswith("_proj")]
    for layer in range(config.num_hidden_layers):
        for block in matrices:
            name = f"model.layers.{layer}.{block}.weight"
            tensor = tensors[gguf_name(name)]
            plain = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            weight = torch.from_numpy(np.array(plain, dtype=np.float32))
            count = heads(name, config)
            weights[name] = weight if count is None else unpermute(weight, count)
            types[tensor.tensor_type.name] += 1
            kept += int(tensor.n_bytes)
    return weights, dict(types), kept
