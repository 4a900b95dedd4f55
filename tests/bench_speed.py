"""Speed and memory of `ortho decompose` beside the naive code and beside reading and writing alone.

    make bench                                       builds 2.2 GB of weights in demo/bench
    python tests/bench_speed.py --source FOLDER      any checkpoint of yours

Every row runs in a process of its own; rows are interleaved and medians reported. Seconds exclude
start-up (importing torch), which has a column of its own. Only ratios travel between machines.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CHUNK = 1 << 20


def child(row: str, source: Path, out: Path, workers: int, sets: list[str]) -> None:
    """Do one run in this process and print what it took."""
    began = time.perf_counter()
    if row == "limit":
        run, loaded = limit(source, out), _rss()
    else:
        import torch

        loaded = _rss()
        torch.set_num_threads(workers)
        run = naive(source, out) if row == "naive" else ours(source, out, workers, sets)
    start_up = time.perf_counter() - began
    began, processor = time.perf_counter(), time.process_time()
    run()
    print(
        json.dumps(
            {
                "seconds": time.perf_counter() - began,
                "cpu_seconds": time.process_time() - processor,
                "start_up": start_up,
                "peak": _rss(),
                "over_import": _rss() - loaded,
            }
        )
    )


def ours(source: Path, out: Path, workers: int, sets: list[str]) -> Any:
    """The real thing, plan included."""
    from ortho_cli.checkpoint import open_checkpoint
    from ortho_cli.decompose import decompose
    from ortho_cli.plan import make_plan
    from ortho_cli.recipe import load_recipe

    recipe = load_recipe(None, sets)

    def run() -> None:
        opened = open_checkpoint(source)
        decompose(make_plan(opened, recipe, workers=workers), opened, out)

    return run


def naive(source: Path, out: Path) -> Any:
    """Whole tensors, eager torch, safetensors' own reader and writer."""
    import reference

    from ortho_cli.checkpoint import open_checkpoint
    from ortho_cli.plan import make_plan
    from ortho_cli.recipe import DEFAULT

    made = make_plan(open_checkpoint(source), DEFAULT)
    split = {tensor.name for tensor in made.split}
    return lambda: reference.naive_decompose(
        source, out, group_size=made.group_size, density=0.005, split=split
    )


def limit(source: Path, out: Path) -> Any:
    """Read what we read, write and sync what we write, and compute nothing."""
    from ortho_cli.checkpoint import open_checkpoint
    from ortho_cli.journal import reserve
    from ortho_cli.plan import make_plan
    from ortho_cli.recipe import DEFAULT

    opened = open_checkpoint(source)
    size = make_plan(opened, DEFAULT).bytes_written
    buffer = memoryview(bytearray(CHUNK))

    def run() -> None:
        for shard in opened.shards:
            with shard.path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
        out.mkdir()
        with (out / "data").open("wb", buffering=0) as file:
            reserve(file.fileno(), size)
            for start in range(0, size, CHUNK):
                file.write(buffer[: min(CHUNK, size - start)])
            os.fsync(file.fileno())

    return run


def _rss() -> int:
    """Peak of this process alone; getrusage would count the parent's."""
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in status if line.startswith("VmHWM")).split()[1])


def measure(
    row: str, source: Path, scratch: Path, workers: int, sets: list[str]
) -> dict[str, float]:
    """Run one row in a new process."""
    out = scratch / "out"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, __file__, "--child", row, "--source", source, "--scratch", scratch]
    command += ["--workers", str(workers), *(f"--set={item}" for item in sets)]
    os.sync()  # what the row before left to be written is not this row's
    ran = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    shutil.rmtree(out, ignore_errors=True)
    if ran.returncode:
        sys.exit(ran.stderr)
    found: dict[str, float] = json.loads(ran.stdout)
    return found


def processor() -> str:
    """Name the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    """Measure all rows and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path)
    parser.add_argument("--scratch", type=Path, default=HERE.parent / "demo" / "bench")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--naive-runs", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], dest="sets")
    parser.add_argument("--child")
    chosen = parser.parse_args()
    source = chosen.source or chosen.scratch / "llama-1b"
    if chosen.child:
        child(chosen.child, source, chosen.scratch / "out", chosen.workers, chosen.sets)
        return
    chosen.scratch.mkdir(parents=True, exist_ok=True)
    if not source.exists():
        size = [
            "--hidden",
            "2048",
            "--layers",
            "16",
            "--mlp",
            "8192",
            "--vocab",
            "32000",
            "--shards",
            "2",
        ]
        subprocess.run([sys.executable, HERE / "checkpoints.py", source, *size], check=True)
    rows = ["limit", "ours", "ours, 1 worker", "naive"]
    runs: dict[str, list[dict[str, float]]] = {row: [] for row in rows}
    measure("limit", source, chosen.scratch, 1, [])  # warm the page cache
    for turn in range(chosen.runs):
        for row in rows:
            if row == "naive" and turn >= chosen.naive_runs:
                continue
            kind, one = row.split(",")[0], "1 worker" in row
            workers = 1 if one else chosen.workers
            runs[row].append(measure(kind, source, chosen.scratch, workers, chosen.sets))
    show(runs, source, chosen.workers)


def show(runs: dict[str, list[dict[str, float]]], source: Path, workers: int) -> None:
    """Print one line a row."""
    nbytes = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    median = {
        row: {key: statistics.median(run[key] for run in found) for key in found[0]}
        for row, found in runs.items()
    }
    print(f"{source.name}: {nbytes / 1e9:.2f} GB, {processor()}, {workers} workers, medians")
    print(f"{'':16}{'seconds':>9}{'CPU-s':>8}{'GB/s':>7}{'start-up':>10}{'peak MB':>9}"
          f"{'over import':>13}{'naive / this':>14}{'this / limit':>14}{'n':>4}")  # fmt: skip
    for row, m in median.items():
        print(
            f"{row:16}{m['seconds']:9.2f}{m['cpu_seconds']:8.2f}{nbytes / m['seconds'] / 1e9:7.2f}"
            f"{m['start_up']:10.2f}{m['peak'] / 1e6:9.0f}{m['over_import'] / 1e6:13.0f}"
            f"{median['naive']['seconds'] / m['seconds']:14.1f}"
            f"{m['seconds'] / median['limit']['seconds']:14.2f}{len(runs[row]):4}"
        )


if __name__ == "__main__":
    main()
