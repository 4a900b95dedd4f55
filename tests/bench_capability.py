"""Capability per bit: KL to the original at a size, beside others' (`make capability`).

    python tests/bench_capability.py MODEL TRAIN.txt HELDOUT.txt [--peers DIR] [--work DIR]

Calibrates MODEL on TRAIN, decomposes it in each way below with the real command, turns every
artifact into a dense checkpoint with `ortho convert --alpha`, and reads HELDOUT with transformers
in float32. DIR holds a folder for each run of `tests/bench_peers.py`, whose weights are put into
the same model. KL is KL(original || quantized) over the whole vocabulary, in nats a token. Bits
are those of the split weights, every byte of both files that stands for them counted. Without
arguments the small model of `ortho bench` is measured, which it builds.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

CONTEXT = 512  # or as many tokens as the model takes


RECIPE = ("--recipe", "capability")
WITHOUT_DATA = ("int4", "default")  # recipes that need no statistics
LEFT = ("base.alone=false",)
TUNED = "capability-tuned"
COLUMNS = ("ortho.structure=columns", "ortho.layout=null")
CSR = ("ortho.layout=csr", "ortho.values=source")


@dataclass(frozen=True)
class Way:
    """One way to decompose the model, and the alpha at which it is measured."""

    name: str
    sets: tuple[str, ...] = ()
    target_bits: float | None = None
    recipe: str = "capability"
    alpha: int = 1


OURS = (
    Way("int4, density 0", ("ortho.density=0",), recipe="int4", alpha=0),
    Way("int4, 0.45 % by size", ("ortho.density=0.0045",), recipe="int4"),
    Way("default, 0.45 % by what the model writes", recipe="default"),
    Way("default, base alone", recipe="default", alpha=0),
    Way("0.45 % by curvature, scales too", ("ortho.density=0.0045",), recipe="curvature"),
    Way("that, base alone", ("ortho.density=0.0045",), recipe="curvature", alpha=0),
    Way("0.45 %, not `base.alone`", (*LEFT, "ortho.density=0.0045"), recipe="curvature"),
    Way("that, base alone", (*LEFT, "ortho.density=0.0045"), recipe="curvature", alpha=0),
    Way("`capability`, density 0", ("ortho.density=0",), alpha=0),
    Way("`capability`, 0.1 %", ("ortho.density=0.001",)),
    Way("`capability`, 0.45 %", ("ortho.density=0.0045",)),
    Way("that, source values in CSR", ("ortho.density=0.0045", *CSR)),
    Way("that, base alone", ("ortho.density=0.0045",), alpha=0),
    Way("`capability`, 1 %", ("ortho.density=0.01",)),
    Way("tuned, density 0", ("ortho.density=0",), recipe=TUNED, alpha=0),
    Way("tuned, 0.1 %", ("ortho.density=0.001",), recipe=TUNED),
    Way("tuned, 0.45 %", ("ortho.density=0.0045",), recipe=TUNED),
    Way("tuned, 1 %", ("ortho.density=0.01",), recipe=TUNED),
    Way("tuned, `--target-bits 4.1`, groups of 192", ("base.group_size=192",), 4.1, TUNED),
    Way("tuned, `--target-bits 4.2`, groups of 192", ("base.group_size=192",), 4.2, TUNED),
    Way("tuned, `--target-bits 4.3`", (), 4.3, TUNED),
    Way("tuned, `--target-bits 5`", (), 5.0, TUNED),
    Way("`capability`, 3 bits, density 0", ("base.bits=3", "ortho.density=0"), alpha=0),
    Way("`capability`, 3 bits, 1 %", ("base.bits=3", "ortho.density=0.01")),
    Way("`--target-bits 4.1`, groups of 192", ("base.group_size=192",), 4.1),
    Way("`--target-bits 4.2`, groups of 192", ("base.group_size=192",), 4.2),
    Way("`--target-bits 4.3`", (), 4.3),
    Way("`--target-bits 5`", (), 5.0),
    Way("columns, `--target-bits 4.3`", COLUMNS, 4.3),
    Way("columns, source values, `--target-bits 4.3`", (*COLUMNS, "ortho.values=source"), 4.3),
    Way("columns, shared, `--target-bits 4.3`", (*COLUMNS, "ortho.share=true"), 4.3),
    Way("columns, tuned, `--target-bits 4.3`", COLUMNS, 4.3, TUNED),
)


class Judge:
    """Holds what the original says of each token, and any other weights against it."""

    def __init__(self, folder: Path, text: Path, *, tokens: int) -> None:
        """Read the text with the original."""
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = tokenizer(text.read_text()[: 8 * tokens], verbose=False).input_ids[:tokens]
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.context = min(CONTEXT, self.model.config.max_position_embeddings)
        self.windows = torch.tensor(ids[: len(ids) // self.context * self.context])
        self.windows = self.windows.view(-1, self.context)
        self._original = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self._told = [self._log_probabilities(window).half() for window in self.windows]
        self.nll = torch.stack(list(map(_nll, map(Tensor.float, self._told), self.windows)))

    @torch.inference_mode()
    def _log_probabilities(self, window: Tensor) -> Tensor:
        return self.model(input_ids=window[None]).logits[0].log_softmax(-1)

    def __call__(self, weights: Iterable[tuple[str, Tensor]]) -> tuple[Tensor, Tensor]:
        """Put weights in; return KL and NLL of each window, in nats a token."""
        self.model.load_state_dict(self._original)
        held = self.model.state_dict()
        for name, weight in weights:
            held[name].copy_(weight)
        divergence, nll = [], []
        for window, told in zip(self.windows, self._told, strict=True):
            found, p = self._log_probabilities(window), told.float()
            divergence.append((p.exp() * (p - found)).sum(-1).mean())
            nll.append(_nll(found, window))
        return torch.stack(divergence), torch.stack(nll)


def _nll(log_probabilities: Tensor, window: Tensor) -> Tensor:
    return -log_probabilities[:-1].gather(1, window[1:, None]).mean()


def weights_of(folder: Path) -> Iterable[tuple[str, Tensor]]:
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - no mapping
                yield name, opened.get_tensor(name)


def ortho(*arguments: object) -> Any:
    ran = subprocess.run(
        [sys.executable, "-m", "ortho_cli", *map(str, arguments), "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    if ran.returncode:
        raise SystemExit(ran.stderr)
    return json.loads(ran.stdout)


def peers(folder: Path) -> Iterator[tuple[dict[str, Any], Path]]:
    for told in sorted(folder.glob("*/peer.json")):
        if (told.parent / "weights.safetensors").exists():
            yield {**json.loads(told.read_text()), "name": told.parent.name}, told.parent


def calibrated(model: Path, train: Path, samples: int, length: int, work: Path) -> Path:
    """Measure statistics as the recipe says, or take those of an earlier run."""
    out = work / "stats.safetensors"
    if not out.exists():
        sets = [f"calibrate.samples={samples}", f"calibrate.length={length}"]
        options = [word for one in sets for word in ("--set", one)]
        told = ortho("calibrate", model, "--data", train, "-o", out, *RECIPE, *options)
        tokens, run = told["data"]["retain"]["tokens"], told["run"]
        print(
            f"calibrate: {tokens:,} tokens in {run['seconds']:.0f} s, "
            f"peak memory {run['peak_rss_bytes'] / 1e6:,.0f} MB"
        )
    return out


def own_model(work: Path) -> list[Path]:
    """Let `ortho bench` build its small model; return model, training text and held-out text."""
    folder = work / "own"
    if not folder.exists():
        ortho("bench", "--alpha", 0, "--keep-files", folder)
    return [folder / "sandbox" / name for name in ("model", "retain.txt", "heldout.txt")]


def make(
    way: Way, model: Path, train: Path, sequences: tuple[int, int], stats: Path, work: Path
) -> tuple[float, dict[str, Any], Path]:
    """Decompose, and make dense weights of the artifact; return bits and what the run took."""
    out, dense = work / "artifact", work / "dense"
    for folder in (out, dense):
        shutil.rmtree(folder, ignore_errors=True)
    options: list[object] = [word for one in way.sets for word in ("--set", one)]
    options += ["--recipe", way.recipe]
    if way.recipe not in WITHOUT_DATA:
        options += ["--stats", stats]
    if way.target_bits:
        options += ["--target-bits", way.target_bits]
    if way.recipe == TUNED:
        samples, length = sequences
        options += ["--data", train, "--set", f"tune.samples={samples}"]
        options += ["--set", f"tune.length={length}"]
    told = ortho("decompose", model, "-o", out, *options)
    ortho("convert", out, "-o", dense, "--alpha", way.alpha)
    key = "split_bits_per_weight" if way.alpha else "split_bits_per_weight_base"
    return told["totals"][key], told["run"], dense


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("inputs", type=Path, nargs="*", help="MODEL TRAIN.txt HELDOUT.txt")
    parser.add_argument("--peers", type=Path, help="folder of runs of tests/bench_peers.py")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--stats", type=Path, help="statistics that were measured before")
    parser.add_argument("--work", type=Path, default=Path("demo/capability"))
    parser.add_argument("--only", choices=("ortho", "peers"), help="half of the table")
    parser.add_argument("--ways", help="of ours, those whose names hold this text")
    chosen = parser.parse_args()
    chosen.work.mkdir(parents=True, exist_ok=True)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model, train, heldout = chosen.inputs or own_model(chosen.work)
    judge = Judge(model, heldout, tokens=chosen.tokens)
    print(f"{judge.windows.numel():,} held-out tokens, context {judge.context}")
    print("| | bits | KL | s.e. | perplexity | s | MB |")
    print("|---|---|---|---|---|---|---|")
    print(f"| original | 16 | 0 | | {math.exp(judge.nll.mean()):.2f} | | |", flush=True)

    def show(name: str, bits: float, seconds: float, rss: int, folder: Path) -> None:
        divergence, nll = judge(weights_of(folder))
        error = divergence.std() / math.sqrt(len(divergence))
        perplexity = math.exp((judge.nll + (nll - judge.nll)).mean())
        mean = float(divergence.mean())
        digits = 4 if mean >= 0.01 else 6
        print(
            f"| {name} | {bits:.3f} | {mean:.{digits}f} | {error:.{digits}f} | {perplexity:.2f} | "
            f"{seconds:.0f} | {rss / 1e6:,.0f} |",
            flush=True,
        )

    if chosen.peers and chosen.only != "ortho":
        for told, folder in peers(chosen.peers):
            show(told["name"], told["bits"], told["seconds"], told["peak_rss_bytes"], folder)
    if chosen.only == "peers":
        return
    ways = [way for way in OURS if not chosen.ways or chosen.ways in way.name]
    stats = chosen.stats or chosen.work / "stats.safetensors"
    if chosen.stats is None and any(way.recipe not in WITHOUT_DATA for way in ways):
        stats = calibrated(model, train, chosen.samples, judge.context, chosen.work)
    for way in ways:
        if "base.group_size=192" in way.sets and judge.model.config.hidden_size % 192:
            continue
        sequences = chosen.samples, judge.context
        bits, run, folder = make(way, model, train, sequences, stats, chosen.work)
        show(f"ortho: {way.name}", bits, run["seconds"], run["peak_rss_bytes"], folder)


if __name__ == "__main__":
    main()
