"""One layer's product with both streams, beside torch's own Linear.

    python tests/bench_runtime.py                    on the CPU
    python tests/bench_runtime.py --device cuda      in CUDA graphs; has been run on no card

Rows of a table are batches; columns are medians of interleaved calls in microseconds. `bf16` and
`fp32` are F.linear with dense weights. Only ratios travel between machines: --accept keeps this
run's in bench_runtime.json, and without it the run fails where one is worse than what is kept
there by more than SLACK.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bench_speed import guard, processor
from torch import Tensor
from torch.nn import functional

from ortho_cli.runtime import product
from ortho_cli.runtime.operands import Base, Ortho
from ortho_cli.split import quantize

KEPT = Path(__file__).with_name("bench_runtime.json")
DENSITY = 0.005
GROUP_SIZE = 128
WARM = 3
# Seconds that the first of two rows takes, of those of the second, must not grow.
RATIOS = (("alpha 0", "bf16"), ("alpha 1", "alpha 0"))


def layer(rows: int, columns: int, device: str) -> tuple[Base, Ortho, Tensor]:
    """Make both streams of a random weight, and what a reader of base sees."""
    random = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (rows, columns), generator=random, dtype=torch.int8)
    scales = (torch.rand(rows, columns // GROUP_SIZE, generator=random) * 0.01).bfloat16()
    base = Base(quantize.pack_codes(codes, bits=4).to(device), scales.to(device))
    base = base._replace(prepared=product.prepare(base))
    k = round(rows * columns * DENSITY)
    flat = torch.randperm(rows * columns, generator=random)[:k].sort().values
    crow = torch.zeros(rows + 1, dtype=torch.int32)
    crow[1:] = torch.bincount(flat // columns, minlength=rows).cumsum(0)
    residual = torch.randn(k, generator=random) * 0.01
    parts = (crow, (flat % columns).int(), residual)
    ortho = Ortho(*(part.to(device) for part in parts))
    return base, ortho, quantize.dequantize(codes, scales).bfloat16().to(device)


def on_cpu(call: Callable[[], Tensor]) -> Callable[[], float]:
    """Time one call."""

    def seconds() -> float:
        began = time.perf_counter()
        call()
        return time.perf_counter() - began

    return seconds


def on_cuda(call: Callable[[], Tensor]) -> Callable[[], float]:
    """Time one replay of a call's graph, after the cache has been flushed."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(WARM):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    flush = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def seconds() -> float:
        flush.zero_()
        began.record()
        graph.replay()
        ended.record()
        torch.cuda.synchronize()
        return began.elapsed_time(ended) / 1e3

    return seconds


@torch.no_grad()
def measure(base: Base, ortho: Ortho, dense: Tensor, batch: int, runs: int) -> dict[str, float]:
    """Take the medians of all rows at one batch, in seconds."""
    kind = dense.device.type
    x = torch.randn(batch, dense.shape[1], dtype=torch.bfloat16, device=dense.device)
    wide = dense.float()
    calls: dict[str, Callable[[], Tensor]] = {
        "fp32": lambda: functional.linear(x.float(), wide),
        "bf16": lambda: functional.linear(x, dense),
        "alpha 0": lambda: product.dual_linear(x, base, None, None, 0.0),
        "alpha 1": lambda: product.dual_linear(x, base, ortho, None, 1.0),
    }
    timed = {name: (on_cuda if kind == "cuda" else on_cpu)(call) for name, call in calls.items()}
    spent: dict[str, list[float]] = {name: [] for name in timed}
    for turn in range(WARM + runs):
        for name, seconds in timed.items():
            one = seconds()
            if turn >= WARM:
                spent[name].append(one)
    return {name: statistics.median(many) for name, many in spent.items()}


def main() -> None:
    """Measure all batches and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--accept", action="store_true", help="keep the ratios of this run")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    base, ortho, dense = layer(chosen.rows, chosen.columns, chosen.device)
    cuda = chosen.device.startswith("cuda")
    where = torch.cuda.get_device_name(chosen.device) if cuda else processor()
    threads = "" if cuda else f", {chosen.threads} threads"
    print(f"{chosen.rows} x {chosen.columns}, density {DENSITY}, {where}{threads}, microseconds")
    names = ("fp32", "bf16", "alpha 0", "alpha 1")
    titles = (*names, *(f"{one} / {other}" for one, other in RATIOS), "GB/s of base")
    print("batch" + "".join(f"{title:>{len(title) + 4}}" for title in titles))
    ratios: dict[str, float] = {}
    streamed = base.weight_packed.nbytes + base.weight_scale.nbytes
    for batch in chosen.batches:
        found = measure(base, ortho, dense, batch, chosen.runs)
        mine = {f"{one} / {other}": found[one] / found[other] for one, other in RATIOS}
        ratios |= {f"{chosen.device}, batch {batch}, {name}": mine[name] for name in mine}
        cells = [f"{found[name] * 1e6:.0f}" for name in names]
        cells += [f"{ratio:.3f}" for ratio in mine.values()]
        cells.append(f"{streamed / found['alpha 0'] / 1e9:.1f}")
        columns = zip(cells, titles, strict=True)
        print(f"{batch:5}" + "".join(f"{cell:>{len(title) + 4}}" for cell, title in columns))
    guard(ratios, KEPT, accept=chosen.accept)


if __name__ == "__main__":
    main()
