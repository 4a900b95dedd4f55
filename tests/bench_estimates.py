"""What `--dry-run` says that a command takes, beside what it takes, within a factor of two.

python tests/bench_estimates.py [MODEL DATA] [--only ROW ...] [--clock wall|cpu] [--scratch FOLDER]

Without MODEL, on two models that are made here: a Llama of 30 million random weights, and a tiny
one that has memorised four secrets. A busy machine gives each process another share of its cores
from one second to the next, so there every row has one thread, and both figures are in seconds of
the processor; on a quiet one all threads work, and the clock counts. Speeds are timed anew for
each row.

A range (what is usual, and the most) holds what takes longer than is usual.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
LIMIT = 2.0  # factor
QUIET = 0.5  # processes per core in the last minute, below which the clock counts
# Times pieces of work by the processor, as the command itself is timed.
BY_PROCESSOR = (
    "import time; time.perf_counter = time.process_time; from ortho_cli.cli.app import main; main()"
)


@dataclass(frozen=True)
class Row:
    """A command, with names in braces for files of the scratch folder."""

    name: str
    words: str
    after: str | None = None  # a row whose output it reads


ROWS = (
    Row("int4", "decompose {model} --recipe int4 -o {out}"),
    Row("default", "decompose {model} -o {out}"),
    Row("calibrate", "calibrate {model} -o {stats} --samples 16 --length 64"),
    Row("calibrate on data", "calibrate {model} --data {data} -o {out} --samples 16 --length 64"),
    Row(
        "calibrate for capability",
        "calibrate {model} --data {data} --recipe capability -o {grams} --samples 8 --length 128",
    ),
    Row(
        "capability",
        "decompose {model} --recipe capability --stats {grams} -o {out}",
        "calibrate for capability",
    ),
    Row(
        "capability-tuned",
        "decompose {model} --recipe capability-tuned --stats {grams} --data {data} -o {out} "
        "--set tune.steps=10 --set tune.samples=16 --set tune.length=32",
        "calibrate for capability",
    ),
    Row(
        "forget-isolate",
        "decompose {knows} --recipe forget-isolate --stats {known} --forget {forget} -o {out} "
        "--accept-damage",
    ),
    # So little divergence is never reached: every step is taken.
    Row(
        "forget-unlearn",
        "decompose {knows} --recipe forget-unlearn --stats {known} --forget {forget} -o {out} "
        "--accept-damage --set forget.steps=20 --set forget.divergence=1e-9",
    ),
)


def prepare(scratch: Path) -> dict[str, Path]:
    """Make both models and their data; name every file."""
    import checkpoints
    import memorised
    import torch
    from tiny_llama import save_tokenizer

    torch.set_num_threads(1)  # so small a model is made faster by one, whatever else runs
    knows, model = scratch / "knows", scratch / "model"
    if not (knows / "stats.safetensors").exists():
        shutil.rmtree(knows, ignore_errors=True)
        knows.mkdir(parents=True)
        memorised.build(knows)
    if not (model / "tokenizer.json").exists():
        size = {"hidden": 512, "layers": 8, "mlp": 1408, "vocab": 8192, "kv": 128}
        checkpoints.save(model, checkpoints.weights(**size))
        told = checkpoints.config(**size, heads=8)
        (model / "config.json").write_text(json.dumps(told))
        save_tokenizer(model)
    return {
        "model": model,
        "data": knows / "retain.txt",
        "knows": knows / "model",
        "known": knows / "stats.safetensors",
        "forget": knows / "forget.jsonl",
    }


def estimated(words: list[str], cache: Path, *, processor: bool) -> tuple[float, float]:
    """Ask what a command takes, with speeds that are timed anew: the usual, and the most."""
    shutil.rmtree(cache, ignore_errors=True)
    start = ["-c", BY_PROCESSOR] if processor else ["-m", "ortho_cli"]
    ran = subprocess.run(
        [sys.executable, *start, *words, "--dry-run", "--json"],
        env=environment(cache, processor=processor),
        capture_output=True,
        text=True,
        check=False,
    )
    if ran.returncode:
        sys.exit(f"{' '.join(words)} --dry-run: {ran.stderr}")
    told = json.loads(ran.stdout)["estimate"]
    return told["seconds"], told["at_most_seconds"]


def taken(words: list[str], cache: Path, *, processor: bool) -> float:
    """Run a command; return its seconds by the clock, or of the processor."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    ran = subprocess.run(
        [sys.executable, "-m", "ortho_cli", *words, "--force", "-q"],
        env=environment(cache, processor=processor),
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if ran.returncode:
        sys.exit(f"{' '.join(words)}: {ran.stderr}")
    if not processor:
        return time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def environment(cache: Path, *, processor: bool) -> dict[str, str]:
    """Give a command a cache of its own, and one thread where the processor's time counts."""
    more = {"OMP_NUM_THREADS": "1"} if processor else {}
    return os.environ | {"XDG_CACHE_HOME": str(cache)} | more


def factor_of(seconds: float, most: float, took: float) -> float:
    """Say how far off an estimate is, >= 1: of the nearest number in its range."""
    nearest = min(max(took, seconds), most)
    return max(nearest / took, took / nearest)


def main() -> None:
    """Run all rows, and fail where an estimate is off by more than LIMIT."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--only", nargs="*", default=[row.name for row in ROWS])
    parser.add_argument("--clock", choices=("wall", "cpu"))
    parser.add_argument("--scratch", type=Path, default=HERE.parent / "demo" / "estimates")
    chosen = parser.parse_args()
    scratch = chosen.scratch.resolve()
    scratch.mkdir(parents=True, exist_ok=True)
    files = prepare(scratch)
    files |= {name: scratch / name for name in ("out", "stats", "grams")}
    if chosen.model:
        files |= {"model": chosen.model.resolve(), "data": chosen.data.resolve()}
    load = os.getloadavg()[0] / (os.cpu_count() or 1)
    processor = chosen.clock == "cpu" or (chosen.clock is None and load >= QUIET)
    print(f"{load:.1f} processes per core: {'CPU seconds of one thread' if processor else 'clock'}")
    print(f"{'':26}{'estimated':>10}{'at most':>10}{'taken':>10}{'ratio':>8}")
    wanted = {row.name for row in ROWS if row.name in chosen.only}
    wanted |= {row.after for row in ROWS if row.name in wanted and row.after}
    off = []
    for row in (row for row in ROWS if row.name in wanted):
        words = [str(files.get(word.strip("{}"), word)) for word in row.words.split()]
        if processor and words[0] == "decompose":
            words += ["--workers", "1"]
        for path in (files["out"],):  # of the row before
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(True)
        seconds, most = estimated(words, scratch / "cache", processor=processor)
        took = taken(words, scratch / "cache", processor=processor)
        print(
            f"{row.name:26}{seconds:10.1f}{most:10.1f}{took:10.1f}{seconds / took:8.2f}", flush=True
        )
        if factor_of(seconds, most, took) > LIMIT:
            off.append(row.name)
    shutil.rmtree(files["out"], ignore_errors=True)
    if off:
        sys.exit(f"more than {LIMIT:g} times off: {', '.join(off)}")


if __name__ == "__main__":
    main()
