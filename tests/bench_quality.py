"""Quality at the same bits: perplexity of what each saliency keeps (`make quality`).

    python tests/bench_quality.py MODEL TRAIN.txt HELDOUT.txt [--tokens 16384 --samples 128]

Calibrates MODEL on TRAIN with gram and fisher, decomposes it in each way below, turns every
artifact back into a dense checkpoint with `ortho convert --alpha`, and reads HELDOUT with
transformers in float32. Prints a Markdown table; statistics are kept in --work and used again.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

CONTEXT = 512
# saliency, scale, density, alpha; statistics come from the first word of those that need them
ROWS = [
    ("residual", "absmax", 0.0, 0),
    ("residual", "absmax", 0.005, 1),
    ("gram", "absmax", 0.005, 1),
    ("fisher", "absmax", 0.005, 1),
    ("residual", "absmax", 0.01, 1),
    ("gram", "absmax", 0.01, 1),
    ("fisher", "absmax", 0.01, 1),
    ("gram", "curvature", 0.0, 0),
    ("gram", "curvature", 0.005, 1),
    ("fisher", "curvature", 0.005, 1),
]


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


def losses(folder: Path, windows: torch.Tensor) -> torch.Tensor:
    """Mean NLL of each window in nats, in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = []
    with torch.inference_mode():
        for window in windows:
            logits = model(input_ids=window[None]).logits[0, :-1]
            found.append(torch.nn.functional.cross_entropy(logits, window[1:]))
    return torch.stack(found)


def statistics(model: Path, train: Path, kind: str, samples: int, work: Path) -> Path:
    out = work / f"{kind}.safetensors"
    if not out.exists():
        sets = [f"curvature={kind}", f"samples={samples}", "autocast=true"]
        options = [word for one in sets for word in ("--set", f"calibrate.{one}")]
        told = ortho("calibrate", model, "--data", train, "-o", out, *options)["run"]
        tokens = samples * CONTEXT
        print(
            f"calibrate {kind}: {tokens:,} tokens in {told['seconds']:.0f} s "
            f"({tokens / told['seconds']:.0f} tokens/s), "
            f"peak memory {told['peak_rss_bytes'] / 1e6:,.0f} MB, {out.stat().st_size / 1e6:.1f} MB"
        )
    return out


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("model", "train", "heldout"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--work", type=Path, default=Path("demo/quality"))
    chosen = parser.parse_args()
    chosen.work.mkdir(parents=True, exist_ok=True)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(chosen.model)
    ids = tokenizer(chosen.heldout.read_text(), verbose=False).input_ids[: chosen.tokens]
    windows = torch.tensor(ids[: len(ids) // CONTEXT * CONTEXT]).view(-1, CONTEXT)
    original = losses(chosen.model, windows)
    print(f"{windows.numel():,} held-out tokens, context {CONTEXT}")
    print("| saliency | scale | density | alpha | bits | perplexity | dNLL | s.e. |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    print(f"| source | | | | | {math.exp(original.mean()):.2f} | 0 | |", flush=True)
    for saliency, scale, density, alpha in ROWS:
        out, dense = chosen.work / "artifact", chosen.work / "dense"
        for folder in (out, dense):
            shutil.rmtree(folder, ignore_errors=True)
        options = ["--set", f"base.scale={scale}", "--set", f"ortho.density={density}"]
        if saliency != "residual":
            stats = statistics(chosen.model, chosen.train, saliency, chosen.samples, chosen.work)
            options += ["--stats", stats]
        bits = ortho("decompose", chosen.model, "-o", out, *options)["totals"]
        ortho("convert", out, "-o", dense, "--alpha", alpha)
        # At alpha = 0 ortho is not needed.
        used = bits["split_bits_per_weight" if alpha else "split_bits_per_weight_base"]
        gap = losses(dense, windows) - original
        print(
            f"| {saliency} | {scale} | {density} | {alpha} | {used:.2f} | "
            f"{math.exp(original.mean() + gap.mean()):.2f} | {gap.mean():.3f} | "
            f"{gap.std() / math.sqrt(len(gap)):.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
