"""Forgetting on a real model: both splits beside their floor (`make forgetting`).

    python tests/bench_forgetting.py PLANTED [--twin DIR] [--splits isolate unlearn] [--seed 0]
        [--text NAME=FILE ...] [--set KEY=VALUE ...]

PLANTED holds `model/` (a transformers folder that has memorised secrets), `forget.jsonl`,
`retain.txt` and `heldout.txt`, and may hold `nonmember.jsonl` (the same form, never seen),
`unlisted.jsonl` (memorised, too, and not in forget.jsonl) and `keep.jsonl` (memorised, to stay).
--text names text of other kinds, on which perplexity is measured apart. --twin is the same model
fine-tuned in the same way on the same text without secrets. Casts the model to bfloat16, calibrates
it, decomposes it in each way and runs `ortho bench` with controls and attacks; prints a Markdown
table, and leaves everything in --work, where what is finished is used again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROWS = [
    ("codes moved, share of split weights", "moved", "{:.4%}"),
    ("ortho, bits per model weight", "bits", "{:.2f}"),
    ("extraction, greedy", "extraction", "{:.0%}"),
    ("extraction, best of 20", "sampled_extraction", "{:.0%}"),
    ("token accuracy", "token_accuracy", "{:.2f}"),
    ("ROUGE-L of greedy answers", "rouge_l", "{:.2f}"),
    ("truth ratio", "truth_ratio", "{:.2f}"),
    ("exposure, bits", "exposure", "{:.2f}"),
    ("p of uniform ranks", "rank_p", "{:.2f}"),
    ("NLL of secrets, nats", "forget_nll", "{:.1f}"),
    ("NLL of alternatives, nats", "alternatives_nll", "{:.1f}"),
    ("inside 5 to 95 % of alternatives", "inside_share", "{:.0%}"),
    ("AUC of loss against nonmembers", "loss_auc", "{:.2f}"),
    ("perplexity", "perplexity", "{:.2f}"),
    ("perplexity over INT4", "perplexity_ratio", "{:.3f}"),
    ("worst kind of text", "worst_perplexity_ratio", "{:.3f}"),
    ("secrets not listed, exposure", "unlisted.exposure", "{:.2f}"),
    ("to keep, ROUGE-L", "keep.rouge_l", "{:.2f}"),
]
CALIBRATE = ("samples=96", "length=64", "autocast=true")


def ortho(*arguments: object, to: Path | None = None) -> Any:
    ran = subprocess.run(
        [sys.executable, "-m", "ortho_cli", *map(str, arguments), "--json"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    if to is not None:
        to.write_text(ran.stdout)
    return json.loads(ran.stdout)


def figure(row: dict[str, Any], name: str, form: str) -> str:
    found = row["figures"]
    for part in name.split("."):
        found = (found or {}).get(part)
    if found is None:
        return ""
    value = form.format(found["value"])
    if found.get("low") is None:
        return value
    return f"{value} ({form.format(found['low'])} to {form.format(found['high'])})"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("planted", type=Path)
    parser.add_argument("--twin", type=Path)
    parser.add_argument("--splits", nargs="+", default=["isolate", "unlearn"])
    parser.add_argument("--alpha", nargs="+", default=["0", "1"])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", nargs="*", default=[], metavar="NAME=FILE")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", dest="sets")
    parser.add_argument("--quick", action="store_true", help="no controls and no attacks")
    parser.add_argument("--work", type=Path, default=Path("demo/forgetting"))
    chosen = parser.parse_args()
    planted, work = chosen.planted, chosen.work
    work.mkdir(parents=True, exist_ok=True)
    model, stats, forget = work / "model", work / "stats.safetensors", planted / "forget.jsonl"
    retain = planted / "retain.txt"
    if not model.exists():
        ortho("convert", planted / "model", "-o", model, "--dtype", "bfloat16")
    if not stats.exists():
        sets = [word for one in CALIBRATE for word in ("--set", f"calibrate.{one}")]
        ortho("calibrate", model, "--data", retain, "-o", stats, *sets)
    for split in chosen.splits:
        out, told = work / split, work / f"{split}.json"
        if not out.exists():
            options = ["--recipe", f"forget-{split}", "--stats", stats, "--forget", forget]
            options += ["--data", retain, "--accept-damage"]
            for one in (f"forget.seed={chosen.seed}", *chosen.sets):
                options += ["--set", one]
            ran = ortho("decompose", model, "-o", out, *options)
            print(f"{split}: decomposed in {ran['run']['seconds']:.0f} s", flush=True)
        if not told.exists():
            options = ["--data", planted / "heldout.txt", *chosen.text, "--forget", forget]
            options += ["--autocast", "--tokens", chosen.tokens]
            for name in ("nonmember", "unlisted", "keep"):
                if (planted / f"{name}.jsonl").exists():
                    options += [f"--{name}", planted / f"{name}.jsonl"]
            if not chosen.quick:
                options += ["--model", model, "--controls", "--attack"]
                options += ["--reference-model", chosen.twin] if chosen.twin else []
            options += ["--samples", 20, "--seed", chosen.seed]
            ortho("bench", out, "--alpha", *chosen.alpha, *options, to=told)
        show(split, json.loads(told.read_text()))


def show(split: str, told: dict[str, Any]) -> None:
    rows = told["rows"]
    weights = told["unsplit"]["weights"] + told["unsplit"]["split_weights"]
    bits = 8 * told["artifact"]["ortho_bytes"] / weights
    whole = {"moved": told["moved"]["share"], "bits": bits}
    print(f"\n| {split} | " + " | ".join(row["row"] for row in rows) + " |")
    print("|---" * (len(rows) + 1) + "|")
    for label, name, form in ROWS:
        cells = [form.format(whole[name]), *[""] * (len(rows) - 1)] if name in whole else None
        cells = cells or [figure(row, name, form) for row in rows]
        if any(cells):
            print(f"| {label} | " + " | ".join(cells) + " |")
    print("\n| relearning half: the other half's exposure (token accuracy) | 5 | 10 | 20 | 40 |")
    print("|---|---|---|---|---|")
    for row in rows:
        curve = row["figures"].get("relearn", {}).values()
        cells = [f"{at['exposure']:.2f} ({at['token_accuracy']:.2f})" for at in curve]
        if cells:
            print(f"| {row['row']} | " + " | ".join(cells) + " |")
    kinds = dict.fromkeys(kind for row in rows for kind in row["figures"].get("kinds", ()))
    print("\n| perplexity over INT4 | " + " | ".join(row["row"] for row in rows) + " |")
    print("|---" * (len(rows) + 1) + "|")
    for kind in kinds:
        cells = [figure(row, f"kinds.{kind}.perplexity_ratio", "{:.3f}") for row in rows]
        print(f"| {kind} | " + " | ".join(cells) + " |")
    print("\n" + "\n".join(f"* {line}" for line in told["verdict"]["sentences"]), flush=True)


if __name__ == "__main__":
    main()
