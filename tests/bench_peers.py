"""One peer quantizes a model, in a process of its own, as its own documentation says to.

    python tests/bench_peers.py PEER MODEL OUT --data TRAIN.txt [--group-size 64 --samples 128]

Needs the packages of tests/peers.txt, and `ortho` beside them without its dependencies: all peers
calibrate on the windows of text that `ortho calibrate` draws from the same file. PEER is a name in
PEERS below. Every `*_proj` of the decoder is quantized to 4 bits, and nothing else. Writes

    OUT/weights.safetensors   what the peer's runtime multiplies by, under the model's own names:
                              each quantized weight, and the norms of a peer that changes them
    OUT/peer.json             bits (what the peer stores for the weights that it quantizes), seconds
                              and peak memory of quantizing, version and settings
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peers_gguf import SOURCE, convert, dequantized, imatrix, llama_quantize
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ortho_cli.model.load import load_model, load_tokenizer
from ortho_cli.model.text import read_rows, retain_sequences

TARGETS = "re:.*_proj$"
BITS = 4
AUTOROUND_BATCH = 8
AUTOROUND_LIGHT = {"iters": 50, "lr": 5e-3}  # its command line's recipe of that name
# Its plain format packs asymmetric codes for AWQ, which fails in this version.
AUTOROUND_FORMATS = {True: "auto_round", False: "auto_round:gptqmodel"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a peer is asked to do."""

    model: Path
    out: Path
    data: Path
    samples: int
    length: int
    group: int
    seed: int
    dtype: torch.dtype
    light: bool
    llama: Path
    scratch: Path

    def windows(self) -> list[list[int]]:
        """Draw the very sequences that `ortho calibrate` draws under the same settings."""
        rows, _ = read_rows([self.data])
        drawn = retain_sequences(
            rows,
            load_tokenizer(self.model),
            samples=self.samples,
            length=self.length,
            seed=self.seed,
        )
        return [list(sequence.tokens) for sequence in drawn]

    def load(self) -> nn.Module:
        return load_model(self.model, dtype=self.dtype, device=torch.device("cpu"))

    @property
    def calibration(self) -> dict[str, Any]:
        return {"samples": self.samples, "length": self.length, "seed": self.seed}


@dataclass(slots=True, kw_only=True)
class Answer:
    """What a peer made of it."""

    version: str
    settings: dict[str, Any]
    seconds: float
    cpu_seconds: float
    peak_rss_bytes: int
    stored_bytes: int
    weights: dict[str, Tensor]
    norms: dict[str, Tensor] | None = None


class Clock:
    """Seconds, by the wall and of all cores, and this process's peak memory at their end."""

    def __enter__(self) -> Clock:
        self._start, self._cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._start
        self.cpu = time.process_time() - self._cpu
        status = Path("/proc/self/status").read_text().splitlines()
        self.peak = 1024 * int(next(s for s in status if s.startswith("VmHWM")).split()[1])


def projections(model: nn.Module) -> dict[str, Any]:
    """Every module that is to be quantized, whatever a peer made of it."""
    return {name: m for name, m in model.named_modules() if name.endswith("_proj")}


def package(name: str) -> str:
    return f"{name} {version(name)}"


def nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def read_saved(folder: Path) -> dict[str, Tensor]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def stored(saved: dict[str, Tensor]) -> int:
    """Bytes that a checkpoint spends on the quantized Linears."""
    return nbytes(tensor for name, tensor in saved.items() if "_proj." in name)


# --------------------------------------------------------------------- llm-compressor
def compressor_scheme(group: int, *, symmetric: bool) -> dict[str, Any]:
    from compressed_tensors.quantization import preset_name_to_scheme

    scheme = preset_name_to_scheme("W4A16" if symmetric else "W4A16_ASYM", [TARGETS])
    scheme.weights.group_size = group
    return {"config_groups": {"group_0": scheme}}


def oneshot(task: Task, recipe: list[Any], settings: dict[str, Any], *, data: bool) -> Answer:
    import datasets
    from llmcompressor import oneshot as compress
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    options: dict[str, Any] = {}
    if data:
        windows = task.windows()
        ones = [[1] * len(window) for window in windows]
        options = {
            "dataset": datasets.Dataset.from_dict({"input_ids": windows, "attention_mask": ones}),
            "num_calibration_samples": task.samples,
            "max_seq_length": task.length,
            "shuffle_calibration_samples": False,
        }
        settings |= task.calibration
    model = task.load()
    with Clock() as clock:
        compress(model=model, tokenizer=load_tokenizer(task.model), recipe=recipe, **options)
    folder = task.out / "saved"
    model.save_pretrained(folder, save_compressed=True)
    plain = AutoModelForCausalLM.from_pretrained(
        folder, dtype=task.dtype, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    return Answer(
        version=package("llmcompressor"),
        settings={"group_size": task.group, **settings},
        seconds=clock.seconds,
        cpu_seconds=clock.cpu,
        peak_rss_bytes=clock.peak,
        stored_bytes=stored(read_saved(folder)),
        weights={f"{name}.weight": m.weight.data for name, m in projections(plain).items()},
        norms={name: p.data for name, p in plain.named_parameters() if "norm" in name},
    )


def rtn_llmcompressor(task: Task) -> Answer:
    from llmcompressor.modifiers.quantization import QuantizationModifier

    recipe = [QuantizationModifier(**compressor_scheme(task.group, symmetric=True))]
    return oneshot(task, recipe, {"symmetric": True}, data=False)


def gptq_llmcompressor(task: Task, *, symmetric: bool = True) -> Answer:
    from llmcompressor.modifiers.gptq import GPTQModifier

    recipe = [GPTQModifier(**compressor_scheme(task.group, symmetric=symmetric))]
    return oneshot(task, recipe, {"symmetric": symmetric, "actorder": "static"}, data=True)


def awq_llmcompressor(task: Task) -> Answer:
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache

    if not torch.cuda.is_available():  # it pins memory for a device even where there is none
        IntermediatesCache.pin_memory = lambda *_: None
    scheme = compressor_scheme(task.group, symmetric=False)
    recipe = [AWQModifier(), QuantizationModifier(**scheme)]
    return oneshot(task, recipe, {"symmetric": False, "duo_scaling": True}, data=True)


# --------------------------------------------------------------------- AutoRound
def autoround(task: Task, *, symmetric: bool = True) -> Answer:
    from auto_round import AutoRound

    recipe = AUTOROUND_LIGHT if task.light else {"iters": 200}
    batches = torch.tensor(task.windows()).split(AUTOROUND_BATCH)
    rounder = AutoRound(
        task.load(),
        tokenizer=load_tokenizer(task.model),
        scheme="W4A16",
        group_size=task.group,
        sym=symmetric,
        dataset=list(batches),
        nsamples=task.samples,
        seqlen=task.length,
        batch_size=AUTOROUND_BATCH,
        seed=task.seed,
        device_map="cpu",
        **recipe,
    )
    with Clock() as clock:
        rounder.quantize()
    folder = task.out / "saved"
    rounder.save_quantized(str(folder), format=AUTOROUND_FORMATS[symmetric])
    saved = read_saved(folder)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    below = 1 if config["packing_format"].endswith("auto_gptq") else 0
    modules = sorted(name.removesuffix(".qweight") for name in saved if name.endswith(".qweight"))
    return Answer(
        version=package("auto-round"),
        settings={
            "group_size": task.group,
            "symmetric": symmetric,
            "batch_size": AUTOROUND_BATCH,
            "packing_format": config["packing_format"],
            **recipe,
            **task.calibration,
        },
        seconds=clock.seconds,
        cpu_seconds=clock.cpu,
        peak_rss_bytes=clock.peak,
        stored_bytes=stored(saved),
        weights={f"{name}.weight": autoround_weight(saved, name, below=below) for name in modules},
    )


def nibbles(words: Tensor, *, dim: int) -> Tensor:
    """Spread eight 4-bit codes of each int32 along `dim`, lowest bits first."""
    shifts = torch.arange(0, 32, BITS, dtype=torch.int32)
    codes = words.unsqueeze(dim + 1) >> shifts.view(-1, *[1] * (words.ndim - dim - 1))
    return (codes & 15).flatten(dim, dim + 1)


def autoround_weight(saved: dict[str, Tensor], module: str, *, below: int) -> Tensor:
    """Undo AutoRound's packing; `below` is how much less than itself a zero point is stored as."""
    codes = nibbles(saved[f"{module}.qweight"], dim=0)
    scales = saved[f"{module}.scales"].float()
    zeros = nibbles(saved[f"{module}.qzeros"], dim=1) + below
    group = len(codes) // len(scales)
    spread = [each.repeat_interleave(group, 0) for each in (zeros, scales)]
    return ((codes - spread[0]) * spread[1]).t()


# --------------------------------------------------------------------- without calibration
def hqq(task: Task) -> Answer:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    model = task.load()
    config = BaseQuantizeConfig(nbits=BITS, group_size=task.group, axis=1)
    with Clock() as clock:
        made = {
            name: HQQLinear(module, config, compute_dtype=torch.float16, device="cpu")
            for name, module in projections(model).items()
        }
    kept = [
        module.state_dict()[key] for module in made.values() for key in ("W_q", "scale", "zero")
    ]
    return Answer(
        version=package("hqq"),
        settings={"group_size": task.group, "axis": 1, "compute_dtype": "float16"},
        seconds=clock.seconds,
        cpu_seconds=clock.cpu,
        peak_rss_bytes=clock.peak,
        stored_bytes=nbytes(kept),
        weights={f"{name}.weight": m.dequantize().float() for name, m in made.items()},
    )


def torchao(task: Task) -> Answer:
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import quantize_

    model = task.load()
    with Clock() as clock:
        quantize_(
            model,
            PrototypeInt4WeightOnlyConfig(group_size=task.group),
            filter_fn=lambda _, name: name.endswith("_proj"),
        )
    made = projections(model)
    kept = [each for m in made.values() for each in (m.weight.qdata, m.weight.scale_and_zero)]
    return Answer(
        version=package("torchao"),
        settings={"group_size": task.group, "config": "PrototypeInt4WeightOnlyConfig"},
        seconds=clock.seconds,
        cpu_seconds=clock.cpu,
        peak_rss_bytes=clock.peak,
        stored_bytes=nbytes(kept),
        weights={
            # The packed layout has no way back but its own product.
            f"{name}.weight": module(torch.eye(module.weight.shape[1], dtype=task.dtype)).t()
            for name, module in made.items()
        },
    )


def quanto(task: Task) -> Answer:
    from optimum.quanto import freeze, qint4, quantize

    model = task.load()
    with Clock() as clock:
        quantize(model, weights=qint4, include="*_proj")
        for module in projections(model).values():
            module.weight_group_size = task.group  # where it would choose 96 or 128 by itself
        freeze(model)
    made = projections(model)
    kept = [
        tensor
        for module in made.values()
        for name, tensor in module.state_dict().items()
        if name.startswith("weight.")
    ]
    return Answer(
        version=package("optimum-quanto"),
        settings={"group_size": task.group, "weights": "qint4"},
        seconds=clock.seconds,
        cpu_seconds=clock.cpu,
        peak_rss_bytes=clock.peak,
        stored_bytes=nbytes(kept),
        weights={f"{name}.weight": m.weight.dequantize() for name, m in made.items()},
    )


# --------------------------------------------------------------------- llama.cpp
def gguf(task: Task, kind: str, *, weighted: bool = False) -> Answer:
    source = convert(task.model, task.scratch)
    settings: dict[str, Any] = {"dtype": "float32", "type": kind}
    ran = []
    importance = None
    if weighted:
        key = f"{source.stem}-{task.samples}-{task.length}-{task.seed}"
        made = imatrix(task.llama, source, task.windows(), task.model, task.scratch / key)
        importance, spent = made
        ran.append(spent)
        settings |= {**task.calibration, "imatrix_seconds": round(spent.seconds, 2)}
    quantized = task.out / "saved.gguf"
    ran.append(llama_quantize(task.llama, source, quantized, kind, importance))
    weights, types, kept = dequantized(quantized, task.model)
    return Answer(
        version=SOURCE,
        settings={**settings, "types": types},
        seconds=sum(each.seconds for each in ran),
        cpu_seconds=sum(each.cpu_seconds for each in ran),
        peak_rss_bytes=max(each.peak_rss_bytes for each in ran),
        stored_bytes=kept,
        weights=weights,
    )


PEERS: dict[str, Callable[[Task], Answer]] = {
    "rtn-llmcompressor": rtn_llmcompressor,
    "gptq-llmcompressor": gptq_llmcompressor,
    "gptq-asym-llmcompressor": lambda task: gptq_llmcompressor(task, symmetric=False),
    "awq-llmcompressor": awq_llmcompressor,
    "autoround": autoround,
    "autoround-asym": lambda task: autoround(task, symmetric=False),
    "hqq": hqq,
    "torchao": torchao,
    "quanto": quanto,
    "gguf-q4_0": lambda task: gguf(task, "q4_0"),
    "gguf-q4_k_m": lambda task: gguf(task, "q4_k_m"),
    "gguf-iq4_nl": lambda task: gguf(task, "iq4_nl"),
    "gguf-q4_0-imatrix": lambda task: gguf(task, "q4_0", weighted=True),
    "gguf-q4_k_m-imatrix": lambda task: gguf(task, "q4_k_m", weighted=True),
    "gguf-iq4_nl-imatrix": lambda task: gguf(task, "iq4_nl", weighted=True),
}


def changed(norms: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Keep the norms that are not the model's own, up to the peer's dtype."""
    original = read_saved(folder)
    return {
        name: norm
        for name, norm in norms.items()
        if not torch.equal(norm, original[name].to(norm.dtype))
    }


def parse() -> tuple[str, Task]:
    parser = argparse.ArgumentParser()
    parser.add_argument("peer", choices=PEERS)
    for name in ("model", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--group-size", type=int, default=64, dest="group")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="bfloat16", help="the model is loaded in (not for gguf)")
    parser.add_argument("--light", action="store_true", help="AutoRound's light recipe")
    parser.add_argument("--llama", type=Path, default=Path(), help="folder of llama-quantize")
    parser.add_argument("--scratch", type=Path, default=Path("demo/peers"), help="kept for reuse")
    chosen = vars(parser.parse_args())
    peer = chosen.pop("peer")
    return peer, Task(**{**chosen, "dtype": getattr(torch, chosen["dtype"])})


def main() -> None:
    start = time.perf_counter()
    peer, task = parse()
    logging.disable(logging.INFO)
    for folder in (task.out, task.scratch):
        folder.mkdir(parents=True, exist_ok=True)
    answer = PEERS[peer](task)
    weights = sum(weight.numel() for weight in answer.weights.values())
    tensors = answer.weights | changed(answer.norms or {}, task.model)
    save_file(
        {name: t.contiguous() for name, t in tensors.items()}, task.out / "weights.safetensors"
    )
    told = {
        "peer": peer,
        "version": answer.version,
        "settings": {"dtype": str(task.dtype).removeprefix("torch."), **answer.settings},
        "bits": round(8 * answer.stored_bytes / weights, 4),
        "weights": weights,
        "threads": torch.get_num_threads(),
        "seconds": round(answer.seconds, 2),
        "cpu_seconds": round(answer.cpu_seconds, 2),
        "total_seconds": round(time.perf_counter() - start, 2),
        "peak_rss_bytes": answer.peak_rss_bytes,
    }
    text = json.dumps(told, indent=2) + "\n"
    (task.out / "peer.json").write_text(text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
