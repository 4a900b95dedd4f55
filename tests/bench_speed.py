"""Speed and memory of `ortho decompose` beside the naive code, the disk and its peers.

    make bench                                       builds 2.2 GB of weights in demo/bench
    python tests/bench_speed.py --source FOLDER      any checkpoint of yours

Every row is a whole command in a process of its own, start-up included; rows are interleaved and
medians reported. Only the limit, which reads and writes the same bytes and computes nothing, is
timed from where it begins to read. Only ratios travel between machines.

With --llama, a folder that holds llama.cpp's llama-quantize, two rows are its: the same Linears to
Q4_0, embeddings and head copied as ours are, and the whole model to Q4_0. With --peers, the python
of a virtual environment as tests/peers.txt describes, the peers of tests/peers_speed.py are rows,
too, --peer-runs times each. --accept keeps the ratios of this run in bench_speed.json, and without
it the run fails where one is worse than the ratio kept there by more than SLACK.
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
OURS = (
    *("ours", "ours, Fisher", "ours, 1 worker", "ours, torch"),
    "ours, no digests",
)
LLAMA = ("llama-quantize", "llama-quantize, all")
PEERS = ("torchao", "hqq", "llmcompressor", "autoround", "quanto")
# Ratios of seconds that must not grow: of the first row to the second.
RATIOS = (
    ("ours", "naive"),
    ("ours", "limit"),
    ("ours, Fisher", "ours"),
    ("ours, 1 worker", "ours"),
    ("ours", "ours, torch"),
    ("ours", "ours, no digests"),
    *(("ours", peer) for peer in (*LLAMA, *PEERS)),
)
RUN = "from ortho_cli.cli import main; main()"
# As where numba is not installed.
WITHOUT_NUMBA = "import ortho_cli.decompose.kernels as o; o.find_spec = lambda name: None\n"
# What digests cost: of every tensor that is read or written, and of base as a file.
WITHOUT_DIGESTS = """
import blake3
class Nothing:
    def __init__(self, *data): pass
    def update(self, data): pass
    def hexdigest(self): return "0" * 64
blake3.blake3 = Nothing
"""
CHANGED = {
    "ours, torch": WITHOUT_NUMBA + RUN,
    "ours, no digests": WITHOUT_DIGESTS + RUN,
}
NAIVE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import bench_speed
bench_speed.naive(Path(sys.argv[2]), Path(sys.argv[3]))
"""


def command_of(row: str, chosen: argparse.Namespace, source: Path, out: Path) -> list[Any]:
    """Give the command that a row is."""
    if row in PEERS:
        return [chosen.peers, HERE / "peers_speed.py", row, source, out]
    if row in LLAMA:
        kept = ("--token-embedding-type", "bf16", "--output-tensor-type", "bf16")
        options = ["--pure"] if row.endswith("all") else ["--pure", *kept]
        program = chosen.llama / "llama-quantize"
        return [program, *options, chosen.scratch / GGUF, out, "Q4_0", chosen.workers]
    if row == "naive":
        return [sys.executable, "-c", NAIVE, HERE, source, out]
    program = [sys.executable, "-c", CHANGED[row]] if row in CHANGED else [_ortho()]
    options = ["--workers", 1 if "1 worker" in row else chosen.workers]
    options += ["--stats", chosen.scratch / FISHER] if "Fisher" in row else []
    options += [f"--set={item}" for item in chosen.sets]
    if "Fisher" in row:
        options.append("--set=saliency.kind=curvature")
    return [*program, "decompose", source, "-o", out, "-q", *options]


def _ortho() -> Path:
    return Path(sys.executable).with_name("ortho")


def naive(source: Path, out: Path) -> None:
    """Whole tensors, eager torch, safetensors' own reader and writer."""
    import reference

    from ortho_cli.decompose.plan import make_plan
    from ortho_cli.decompose.recipe import DEFAULT
    from ortho_cli.storage.checkpoint import open_checkpoint

    made = make_plan(open_checkpoint(source), DEFAULT)
    split = {tensor.name for tensor in made.split}
    size = made.group_size
    reference.naive_decompose(source, out, group_size=size, density=0.005, split=split)


def limit(source: Path, out: Path) -> None:
    """Read what we read, write and sync what we write, compute nothing, and print the seconds."""
    from ortho_cli.decompose.plan import make_plan
    from ortho_cli.decompose.recipe import DEFAULT
    from ortho_cli.storage.checkpoint import open_checkpoint
    from ortho_cli.storage.disk import reserve

    opened = open_checkpoint(source)
    size = make_plan(opened, DEFAULT).bytes_written
    buffer = memoryview(bytearray(CHUNK))
    began, processor = time.perf_counter(), time.process_time()
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
    spent = {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - processor,
        "peak": _rss(),
    }
    print(json.dumps(spent))


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


def measure(row: str, chosen: argparse.Namespace, source: Path) -> dict[str, float]:
    """Run one row in a new process."""
    from peers_gguf import run

    out = chosen.scratch / "out"
    _clear(out)
    os.sync()  # what the row before left to be written is not this row's
    if row == "limit":
        command = [sys.executable, __file__, "--child", "--source", source]
        told = subprocess.run(
            list(map(str, [*command, "--scratch", chosen.scratch])), capture_output=True, check=True
        )
        found: dict[str, float] = json.loads(told.stdout)
    else:
        log = chosen.scratch / "row.log"
        spent = run(*command_of(row, chosen, source, out), log=log)
        found = {
            "seconds": spent.seconds,
            "cpu_seconds": spent.cpu_seconds,
            "peak": spent.peak_rss_bytes,
        }
    _clear(out)
    return found


def _clear(out: Path) -> None:
    if out.is_file():
        out.unlink()
    shutil.rmtree(out, ignore_errors=True)


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
    parser.add_argument("--peers", type=Path, help="python of the peers' virtual environment")
    parser.add_argument("--peer-runs", type=int, default=1)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    source = chosen.source or chosen.scratch / "llama-1b"
    if chosen.child:
        limit(source, chosen.scratch / "out")
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
    turns = dict.fromkeys(("limit", *OURS, *(LLAMA if chosen.llama else ())), chosen.runs)
    turns |= dict.fromkeys(PEERS if chosen.peers else (), chosen.peer_runs)
    turns["naive"] = chosen.naive_runs
    runs: dict[str, list[dict[str, float]]] = {row: [] for row in turns}
    for row in ("limit", "ours"):  # warm the page cache; compile
        measure(row, chosen, source)
    for turn in range(max(turns.values())):
        for row, many in turns.items():
            if turn < many:
                runs[row].append(measure(row, chosen, source))
    show(runs, source, chosen.workers)
    median = medians(runs)
    ratios = {
        f"{row} / {other}": median[row]["seconds"] / median[other]["seconds"]
        for row, other in RATIOS
        if row in median and other in median
    }
    guard(ratios, KEPT, accept=chosen.accept)


def guard(ratios: dict[str, float], kept: Path, *, accept: bool) -> None:
    """Keep the ratios of this run, or hold them against those that were kept."""
    before: dict[str, float] = json.loads(kept.read_text()) if kept.exists() else {}
    if accept:
        rounded = {name: round(ratio, 4) for name, ratio in ratios.items()}
        kept.write_text(json.dumps({**before, **rounded}, indent=2) + "\n")
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
    print(f"{'':20}{'seconds':>9}{'CPU-s':>8}{'GB/s':>7}{'peak MB':>9}"
          f"{'this / ours':>13}{'this / limit':>14}{'n':>4}")  # fmt: skip
    for row, m in median.items():
        print(
            f"{row:20}{m['seconds']:9.2f}{m['cpu_seconds']:8.2f}{nbytes / m['seconds'] / 1e9:7.2f}"
            f"{m['peak'] / 1e6:9.0f}{m['seconds'] / median['ours']['seconds']:13.2f}"
            f"{m['seconds'] / median['limit']['seconds']:14.2f}{len(runs[row]):4}"
        )


if __name__ == "__main__":
    main()
