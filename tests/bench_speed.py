"""Speed and memory of `ortho decompose` beside the naive code and beside reading and writing alone.

    make bench                                       builds 2.2 GB of weights in demo/bench
    python tests/bench_speed.py --source FOLDER      any checkpoint of yours

Every row runs in a process of its own; rows are interleaved and medians reported. Seconds exclude
start-up (importing torch), which has a column of its own. Only ratios travel between machines.

With --llama, a folder that holds llama.cpp's llama-quantize, that is a row, too: the same Linears
to Q4_0, and nothing else of the model; --accept keeps the ratios of this run in bench_speed.json,
and without it the run fails where one is worse than the ratio kept there by more than SLACK.
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
FISHER = "fisher.safetensors"  # made up: as many bytes as measured ones
GGUF = "source.gguf"
KEPT = HERE / "bench_speed.json"
SLACK = 1.25  # medians of a quiet machine differ by less
ROWS = ("limit", "ours", "ours, Fisher", "ours, 1 worker", "llama-quantize", "naive")
# Ratios of seconds that must not grow: of the first row to the second.
RATIOS = (
    ("ours", "naive"),
    ("ours", "limit"),
    ("ours, Fisher", "ours"),
    ("ours, 1 worker", "ours"),
    ("ours", "llama-quantize"),
)


def child(row: str, source: Path, scratch: Path, workers: int, sets: list[str]) -> None:
    """Do one run in this process and print what it took."""
    began, out = time.perf_counter(), scratch / "out"
    if row == "limit":
        run, loaded = limit(source, out), _rss()
    else:
        import torch

        loaded = _rss()
        torch.set_num_threads(workers)
        stats = scratch / FISHER if row == "ours, Fisher" else None
        run = naive(source, out) if row == "naive" else ours(source, out, workers, sets, stats)
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


def ours(source: Path, out: Path, workers: int, sets: list[str], stats: Path | None) -> Any:
    """The real thing, plan included; with statistics, weights are kept by curvature."""
    from ortho_cli.checkpoint import open_checkpoint
    from ortho_cli.decompose import decompose
    from ortho_cli.plan import make_plan
    from ortho_cli.recipe import load_recipe
    from ortho_cli.statistics import open_statistics

    recipe = load_recipe(None, sets)

    def run() -> None:
        opened = open_checkpoint(source)
        measured = open_statistics(stats) if stats else None
        decompose(make_plan(opened, recipe, workers=workers, statistics=measured), opened, out)

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


def llama(source: Path, scratch: Path, folder: Path, workers: int) -> dict[str, float]:
    """Let llama-quantize turn the Linears into Q4_0, in a process of its own."""
    from peers_gguf import run

    out = scratch / "out.gguf"
    keep = ("--token-embedding-type", "bf16", "--output-tensor-type", "bf16")
    command = (folder / "llama-quantize", "--pure", *keep, scratch / GGUF, out, "Q4_0", workers)
    spent = run(*command, log=scratch / "llama.log")
    with out.open("rb") as file:
        os.fsync(file.fileno())
    out.unlink()
    peak = float(spent.peak_rss_bytes)
    return {
        "seconds": spent.seconds,
        "cpu_seconds": spent.cpu_seconds,
        "start_up": 0.0,
        "peak": peak,
        "over_import": peak,
    }


def write_gguf(source: Path, path: Path) -> None:
    """Write a llama's weights as GGUF in bfloat16, with nothing that only running it needs."""
    import gguf
    import torch
    from peers_gguf import gguf_name
    from safetensors import safe_open

    told = json.loads((source / "config.json").read_text())
    writer = gguf.GGUFWriter(path.with_suffix(".part"), "llama", use_temp_file=True)
    writer.add_vocab_size(told["vocab_size"])
    writer.add_context_length(told["max_position_embeddings"])
    writer.add_embedding_length(told["hidden_size"])
    writer.add_block_count(told["num_hidden_layers"])
    writer.add_feed_forward_length(told["intermediate_size"])
    writer.add_head_count(told["num_attention_heads"])
    writer.add_head_count_kv(told["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(told["rms_norm_eps"])
    for shard in sorted(source.glob("*.safetensors")):
        with safe_open(shard, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - no mapping
                tensor = opened.get_tensor(name)
                if tensor.dim() == 1:  # as its own converter writes norms
                    writer.add_tensor(gguf_name(name), tensor.float().numpy())
                    continue
                raw = tensor.view(torch.uint8).numpy()
                kind = gguf.GGMLQuantizationType.BF16
                writer.add_tensor(gguf_name(name), raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.with_suffix(".part").rename(path)


def prepare(source: Path, scratch: Path, *, gguf: bool) -> None:
    """Make what rows need beside the checkpoint, once."""
    stats = scratch / FISHER
    if not stats.exists():
        program = (
            "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); "
            "from checkpoints import save_statistics; "
            "save_statistics(Path(sys.argv[2] + '.part'), Path(sys.argv[3]))"
        )
        subprocess.run([sys.executable, "-c", program, HERE, stats, source], check=True)
        stats.with_name(stats.name + ".part").rename(stats)
    if gguf and not (scratch / GGUF).exists():
        write_gguf(source, scratch / GGUF)


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
    parser.add_argument("--llama", type=Path, help="folder of llama-quantize")
    parser.add_argument("--accept", action="store_true", help="keep the ratios of this run")
    parser.add_argument("--child", choices=ROWS)
    chosen = parser.parse_args()
    source = chosen.source or chosen.scratch / "llama-1b"
    if chosen.child:
        child(chosen.child, source, chosen.scratch, chosen.workers, chosen.sets)
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
    prepare(source, chosen.scratch, gguf=chosen.llama is not None)
    rows = [row for row in ROWS if chosen.llama or row != "llama-quantize"]
    runs: dict[str, list[dict[str, float]]] = {row: [] for row in rows}
    measure("limit", source, chosen.scratch, 1, [])  # warm the page cache
    for turn in range(chosen.runs):
        for row in rows:
            if row == "naive" and turn >= chosen.naive_runs:
                continue
            if row == "llama-quantize":
                found = llama(source, chosen.scratch, chosen.llama, chosen.workers)
            else:
                workers = 1 if "1 worker" in row else chosen.workers
                found = measure(row, source, chosen.scratch, workers, chosen.sets)
            runs[row].append(found)
    show(runs, source, chosen.workers)
    guard(runs, accept=chosen.accept)


def guard(runs: dict[str, list[dict[str, float]]], *, accept: bool) -> None:
    """Keep the ratios of this run, or hold them against those that were kept."""
    median = medians(runs)

    def spent(row: str, *, whole: bool) -> float:
        return median[row]["seconds"] + whole * median[row]["start_up"]

    ratios = {}
    for row, other in RATIOS:
        if row in median and other in median:
            whole = other == "llama-quantize"  # which has no start-up that could be left out
            ratio = spent(row, whole=whole) / spent(other, whole=whole)
            ratios[f"{row} / {other}"] = round(ratio, 4)
    before: dict[str, float] = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    if accept:
        KEPT.write_text(json.dumps({**before, **ratios}, indent=2) + "\n")
        return
    worse = {
        name: ratio for name, ratio in ratios.items() if ratio > SLACK * before.get(name, ratio)
    }
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.3f}" + (f", kept {before[name]:.3f}" if name in before else ""))
    if worse:
        sys.exit(f"slower than what was kept: {', '.join(worse)}; --accept keeps these ratios")


def medians(runs: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Take the median of each figure of each row."""
    return {
        row: {key: statistics.median(run[key] for run in found) for key in found[0]}
        for row, found in runs.items()
    }


def show(runs: dict[str, list[dict[str, float]]], source: Path, workers: int) -> None:
    """Print one line a row."""
    nbytes = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    median = medians(runs)
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
