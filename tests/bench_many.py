"""CPU time and memory per tensor of each command, on checkpoints of very many tiny tensors.

python tests/bench_many.py [2000 20000 200000] [--shards 8] [--only decompose "inspect --verify"]

Time per tensor must not grow with their number. What a command takes on 20 tensors, most of it
imports, is taken off first.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

COMMANDS = {
    "inspect": "inspect {model} --json",
    "inspect, as a table": "inspect {model}",
    "decompose --dry-run": "decompose {model} -o {out} --dry-run --json",
    "decompose": "decompose {model} -o {out} -q",
    "inspect OUT": "inspect {out} --json",
    "inspect OUT, as a table": "inspect {out}",
    "inspect OUT --verify": "inspect {out} --verify -q",
    "decompose, compact": "decompose {model} -o {out2} -q --set ortho.layout=compact",
    "inspect OUT --verify, compact": "inspect {out2} --verify -q",
    "convert": "convert {model} -o {dense} -q",
    "convert OUT": "convert {out} --alpha 1 -o {dense2} -q",
}
FEW = 20  # tensors of the checkpoint that shows what a command costs before it sees any


def names(count: int) -> list[str]:
    """Name the weights of `count / 3` experts."""
    parts = ("gate_proj", "up_proj", "down_proj")
    return [
        f"model.layers.{i // 3072}.mlp.experts.{i // 3 % 1024}.{parts[i % 3]}.weight"
        for i in range(count)
    ]


def make(folder: Path, count: int, *, shards: int = 1) -> None:
    """Write a checkpoint of `count` weights of experts, (8, 64) in bfloat16, by hand."""
    folder.mkdir()
    draw = random.Random(0)
    # Words of bfloat16 with exponents near 1, so that nothing is infinite.
    words = [draw.randrange(0x3E00, 0x4000) | draw.choice((0, 0x8000)) for _ in range(8 * 64)]
    data = b"".join(word.to_bytes(2, "little") for word in words)
    weight_map = {}
    for shard in range(shards):
        mine = names(count)[shard::shards]
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        file = file if shards > 1 else "model.safetensors"
        header = {
            name: {"dtype": "BF16", "shape": [8, 64], "data_offsets": [1024 * i, 1024 * (i + 1)]}
            for i, name in enumerate(mine)
        }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for _ in mine:
                out.write(data)
        weight_map |= dict.fromkeys(mine, file)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    if shards > 1:
        index = {"metadata": {"total_size": 1024 * count}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def measure(words: list[str]) -> tuple[float, float]:
    """Run `ortho WORDS`; return CPU seconds and peak bytes."""
    command = [sys.executable, "-m", "ortho_cli", *words]
    with tempfile.TemporaryFile() as said:
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said) as process:
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode == 4:
            return math.nan, math.nan  # more than a header holds
        if process.returncode:
            said.seek(0)
            sys.exit(f"ortho {' '.join(words)}: {process.returncode}, {said.read().decode()}")
    return used.ru_utime + used.ru_stime, used.ru_maxrss * 1024.0


def main() -> None:
    """Print a table: microseconds and kilobytes per tensor for each command and number."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("counts", nargs="*", type=int, default=[2_000, 20_000, 200_000])
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    chosen = parser.parse_args()
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in chosen.only}
    counts = [FEW, *chosen.counts]
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as made:
        for count in counts:
            place = Path(made) / str(count)
            place.mkdir()
            make(place / "model", count, shards=min(count, chosen.shards))
            places = {n: str(place / n) for n in ("model", "out", "out2", "dense", "dense2")}
            if count == FEW:  # compiled loops are made on first use, and kept
                measure(COMMANDS["decompose"].format(**places).split())
                shutil.rmtree(place / "out")
            for name in chosen.only:
                found[name].append(measure(COMMANDS[name].format(**places).split()))
            shutil.rmtree(place)
    print("| us per tensor (kB) |", " | ".join(f"{count:,}" for count in counts[1:]), "|")
    print("|---|" + "---|" * len(chosen.counts))
    for name, ((cpu, peak), *rest) in found.items():
        cells = [
            f"{1e6 * (mine - cpu) / count:,.0f} ({(most - peak) / count / 1e3:,.1f})"
            for count, (mine, most) in zip(chosen.counts, rest, strict=True)
        ]
        print(f"| {name} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
