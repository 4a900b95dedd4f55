"""Digests and figures of everything that `ortho` writes for two small checkpoints, by recipe.

    python tests/recipe_digests.py --write FILE      run every case, and write what came out
    python tests/recipe_digests.py --compare FILE    run them again, and name each difference

Without either it prints the JSON document. A refactor runs `--write` before it begins and
`--compare` after each step, on one machine: products, gradients and training depend on how torch
was built. Cases marked `portable` do not: they round, multiply and compare single float32 numbers
that `numpy` made of whole numbers. tests/golden/recipes.json holds those alone
(`--portable --write tests/golden/recipes.json`), and test_recipe_digests.py compares them.

Each case is a command line, run in a process of its own. Of the package only `python -m ortho_cli`
and the public `ortho_cli.Engine` are used, so this file does not change when the package's inside
does.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from tiny_llama import PLENTY, build_model

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))

Array = npt.NDArray[Any]
Document = dict[str, Any]
Run = Callable[["Case", list[str]], None]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One command line and what is expected of it.

    Args:
        name: checkpoint and recipe, and what differs from it.
        arguments: of `ortho`, or of ENGINE; one that begins with @ is a path below the work folder.
        recipe: the shipped recipe that this case covers.
        stage: cases of a stage read what those of earlier stages wrote: 0 calibrate, 1 decompose,
            2 convert.
        engine: run ENGINE in place of `ortho`.
        numba: whether it can be imported.
        portable: the tensors do not depend on how torch was built, nor on the processor.
        same_as: the case that writes the same files.
    """

    name: str
    arguments: tuple[str, ...]
    recipe: str = ""
    stage: int = 1
    engine: bool = False
    numba: bool = True
    portable: bool = False
    same_as: str = ""

    @property
    def out(self) -> str:
        """Name of what it writes."""
        return self.name.replace(" ", "-").replace("/", "-")


# Run by `python -c`: split one Linear of a checkpoint in memory, and save it.
ENGINE = """
import sys
from pathlib import Path

import torch
from ortho_cli import Engine
from safetensors.torch import load_file

source, name, statistics, out, scale, bits = sys.argv[1:]
torch.set_num_threads(1)
tensors = {}
for shard in sorted(Path(source).glob("*.safetensors")):
    tensors.update(load_file(shard))
rows, columns = tensors[name].shape
linear = torch.nn.Linear(columns, rows, bias=False, dtype=tensors[name].dtype)
linear.weight = torch.nn.Parameter(tensors[name])
engine = Engine(torch.nn.Sequential(linear))
engine.convert()
key = name.removesuffix("weight") + "retain_curvature"
curvature = {"0.weight": load_file(statistics)[key].float()} if scale == "curvature" else None
engine.decompose(density=0.01, scale=scale, bits=int(bits), curvature=curvature)
engine.save(out)
"""

# Run by `python -c` in place of `python -m ortho_cli`.
WITHOUT_NUMBA = """
import runpy
import sys

sys.modules["numba"] = None
runpy.run_module("ortho_cli", run_name="__main__")
"""

WIDE = "model.layers.1.mlp.down_proj.weight"


# Made-up checkpoints. Every number is made of random bits by exact operations, so no library of
# mathematical functions has a say in it.


def draw_bits(shape: tuple[int, ...], seed: int) -> npt.NDArray[np.uint64]:
    """Draw 64 random bits per element; numpy promises this stream for all its versions."""
    found = np.random.PCG64(seed).random_raw(int(np.prod(shape, dtype=np.int64)))
    return np.asarray(found, np.uint64).reshape(shape)


def draw_weight(shape: tuple[int, ...], seed: int) -> npt.NDArray[np.float32]:
    """Draw about normally distributed weights of deviation 0.018, some 2 or 4 times as large."""
    bits = draw_bits(shape, seed)
    fields = [(bits >> np.uint64(shift)) & np.uint64(0x3FFF) for shift in (0, 14, 28, 42)]
    body = sum(field.astype(np.int64) for field in fields) - 2 * 0x3FFF
    tail = (bits >> np.uint64(56)).astype(np.int64)
    power = (tail % 16 == 0).astype(np.int64) + (tail % 64 == 0)
    return np.ldexp(body, power - 20).astype(np.float32)


def draw_curvature(shape: tuple[int, ...], seed: int) -> npt.NDArray[np.float32]:
    """Draw positive numbers around 1e-9, over six powers of two either way."""
    bits = draw_bits(shape, seed)
    power = sum(((bits >> np.uint64(shift)) & np.uint64(1)).astype(np.int64) for shift in range(12))
    mantissa = (1 << 16) + ((bits >> np.uint64(16)) & np.uint64(0xFFFF)).astype(np.int64)
    return np.ldexp(mantissa, power - 6 - 30 - 16).astype(np.float32)


def draw_odd_rows(columns: int, seed: int) -> npt.NDArray[np.float32]:
    """Draw rows that rounding finds hard: zeros, ties, equal, tiny, large and lone weights."""
    rows = draw_weight((16, columns), seed)
    rows[0] = 0.0
    rows[1] = -0.0
    rows[2] = np.where(np.arange(columns) % 2, 0.25, -0.25)
    rows[3] = (np.arange(columns) % 16 - 8) / 16  # codes and halves of codes
    rows[4] = (np.arange(columns) % 31 - 15) / 32
    rows[5] = 2.0**-130  # below the smallest normal float32
    rows[6] *= np.float32(2.0**-20)
    rows[7] *= np.float32(2.0**10)
    rows[8] = 0.0
    rows[8, columns // 2] = 1.0
    rows[9] = rows[10]
    return rows


def save_odd(folder: Path) -> None:
    """Write a checkpoint without a config: odd shapes, three dtypes and more, three shards.

    One weight is larger than four tiles, and than one tile of `rounding: gptq`.
    """
    shapes = {
        "model.embed_tokens.weight": ((61, 96), torch.bfloat16),
        "model.layers.0.self_attn.q_proj.weight": ((830, 96), torch.bfloat16),
        "model.layers.0.self_attn.k_proj.weight": ((545, 96), torch.float16),
        "model.layers.0.self_attn.v_proj.weight": ((545, 96), torch.float32),
        "model.layers.0.self_attn.o_proj.weight": ((7, 160), torch.float16),
        "model.layers.0.mlp.gate_proj.weight": ((1, 64), torch.bfloat16),
        "model.layers.0.mlp.up_proj.weight": ((333, 352), torch.float32),
        WIDE: ((2081, 1024), torch.bfloat16),
        "model.layers.0.mlp.router.weight": ((8, 96), torch.float32),
        "model.layers.0.conv.weight": ((6, 5, 3), torch.float16),
        "model.layers.0.self_attn.q_proj.bias": ((830,), torch.float16),
        "model.norm.weight": ((96,), torch.float32),
        "lm_head.weight": ((61, 96), torch.bfloat16),
    }
    tensors = {
        name: torch.from_numpy(draw_weight(shape, seed)).to(dtype)
        for seed, (name, (shape, dtype)) in enumerate(shapes.items())
    }
    for seed, dtype in enumerate((torch.bfloat16, torch.float16, torch.float32)):
        rows = torch.from_numpy(draw_odd_rows(128, 100 + seed)).to(dtype)
        tensors[f"model.layers.{seed}.hard.weight"] = rows
    tensors["model.positions"] = torch.arange(15).view(5, 3)
    tensors["model.mask"] = torch.tensor([True, False, True])
    tensors["model.scale"] = torch.tensor(0.5)
    checkpoints.save(folder, tensors, shards=3)


def load(folder: Path) -> dict[str, torch.Tensor]:
    """Read every tensor of a checkpoint."""
    found: dict[str, torch.Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        found.update(load_file(shard))
    return found


def save_before(source: Path, folder: Path) -> None:
    """Write a model as it was before it learned: each weight of projections a little different."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = load(source)
    for seed, name in enumerate(sorted(tensors)):
        weight = tensors[name]
        if name.endswith("_proj.weight"):
            step = (draw_bits(tuple(weight.shape), 200 + seed) % np.uint64(9)).astype(np.int64) - 4
            factor = np.ldexp(256 + step, -8).astype(np.float32)
            tensors[name] = (weight.float() * torch.from_numpy(factor)).to(weight.dtype)
    checkpoints.save(folder, tensors, shards=2)


def save_made_statistics(path: Path, source: Path, **options: Any) -> None:
    """Write statistics of kind and storage as `options` say, their curvature drawn here."""

    def redraw(stored: dict[str, torch.Tensor]) -> None:
        for seed, key in enumerate(sorted(stored)):
            if "retain_curvature" in key:
                drawn = torch.from_numpy(draw_curvature(tuple(stored[key].shape), 300 + seed))
                unit = 2.0**30 if key.endswith("_columns") else 1.0  # columns: shares of a mean
                stored[key] = (drawn * unit).to(stored[key].dtype)

    skip = tuple(name for name in load(source) if not name.endswith(".weight"))
    checkpoints.save_statistics(path, source, change=redraw, skip=skip, **options)


def save_inputs(folder: Path, *, llama: bool) -> None:
    """Write what the cases read: checkpoints, and what goes with them."""
    (folder / "plain.yaml").write_text("version: 1\n")
    odd = folder / "odd"
    save_odd(odd)
    save_before(odd, folder / "odd-before")
    save_made_statistics(folder / "odd-fisher", odd)
    save_made_statistics(folder / "odd-float32", odd, dtype=torch.float32)
    save_made_statistics(folder / "odd-factored", odd, storage="factored")
    save_made_statistics(folder / "odd-inputs", odd, kind="gram")
    save_made_statistics(folder / "odd-gram", odd, kind="true-fisher", gram="gradient")
    if llama:
        build_model(folder)
        save_before(folder / "model", folder / "model-before")


# The cases.


def sets(*changes: str) -> tuple[str, ...]:
    """Give each change of a recipe as `--set`."""
    return tuple(word for change in changes for word in ("--set", change))


SHORT = sets("calibrate.samples=32", "calibrate.length=16")
TUNED = ("--data", "@retain.txt", *sets("tune.samples=32", "tune.length=16", "tune.steps=20"))
ISOLATE = ("--stats", "@llama-fisher", "--forget", "@forget.jsonl", *sets(*PLENTY))
UNLEARN = (
    *("--stats", "@llama-fisher", "--forget", "@forget.jsonl", "--data", "@retain.txt"),
    *sets("forget.mask=0.3", "forget.attack_rate=0.001", "forget.steps=10"),
    *sets("forget.attack_steps=5", "forget.samples=16", "forget.length=16"),
)


def recipe(on: str, name: str, *more: str, portable: bool = False) -> Case:
    """Split with a shipped recipe."""
    source = "@odd" if on == "odd" else "@model"
    arguments = ("decompose", source, "--recipe", name, *more)
    return Case(name=f"{on} {name}", arguments=arguments, recipe=name, portable=portable)


def plain(more: tuple[str, ...]) -> tuple[str, ...]:
    """Name a recipe that leaves all as it is: with statistics alone it would be `curvature`."""
    return ("--recipe", "@plain.yaml") if "--stats" in more else ()


def odd(name: str, *more: str, portable: bool = True) -> Case:
    """Split the odd checkpoint with settings of our own."""
    arguments = ("decompose", "@odd", *plain(more), *more)
    return Case(name=f"odd {name}", arguments=arguments, portable=portable)


def llama(name: str, *more: str) -> Case:
    """Split the model with settings of our own."""
    return Case(name=f"llama {name}", arguments=("decompose", "@model", *plain(more), *more))


def calibrate(name: str, *more: str) -> Case:
    """Measure the model."""
    arguments = ("calibrate", "@model", "--data", "@retain.txt", *SHORT, *more)
    return Case(name=f"llama-{name}", arguments=arguments, stage=0)


def convert(name: str, source: str, *more: str, portable: bool = False) -> Case:
    """Write a source as a plain checkpoint."""
    return Case(
        name=f"{name} converted{''.join(f' {word}' for word in more)}",
        arguments=("convert", source, *more),
        stage=2,
        portable=portable,
    )


def engine(name: str, scale: str, bits: int) -> Case:
    """Split one Linear in memory."""
    arguments = ("@odd", WIDE, "@odd-fisher", scale, str(bits))
    return Case(name=f"engine {name}", arguments=arguments, engine=True)


FISHER, GRAM = ("--stats", "@odd-fisher"), ("--stats", "@odd-gram")
BASIC = (
    recipe("odd", "int4", portable=True),
    recipe("odd", "int4-mse", portable=True),
    recipe("odd", "curvature", *FISHER, portable=True),
)


def variants(case: Case) -> Iterator[Case]:
    """Give what must write the same files: other workers, and no numba."""
    for workers in ("1", "2"):
        arguments = (*case.arguments, "--workers", workers)
        name = f"{case.name} --workers {workers}"
        yield replace(case, name=name, arguments=arguments, recipe="", same_as=case.name)
    name = f"{case.name} without numba"
    yield replace(case, name=name, recipe="", numba=False, same_as=case.name)


ALPHAS = ("0", "0.5", "1")
CASES = (
    calibrate("fisher", "--forget", "@forget.jsonl"),
    calibrate("token", *sets("calibrate.unit=token", "calibrate.dtype=float32")),
    calibrate("factored", *sets("calibrate.storage=factored")),
    calibrate("inputs", *sets("calibrate.curvature=gram")),
    calibrate("gram", "--recipe", "capability"),
    *BASIC,
    *(variant for case in BASIC for variant in variants(case)),
    recipe("odd", "default", "--stats", "@odd-inputs"),
    recipe("odd", "attention", portable=True),
    recipe("odd", "forget-reference", "--reference", "@odd-before", portable=True),
    recipe("odd", "capability", *GRAM),
    odd("mse not alone", *sets("base.scale=mse"), portable=True),
    odd("curvature not alone", *FISHER, *sets("base.scale=curvature"), portable=True),
    odd("curvature float32", "--stats", "@odd-float32", *sets("base.scale=curvature")),
    odd("curvature factored", "--stats", "@odd-factored", *sets("base.scale=curvature")),
    odd("curvature inputs", "--stats", "@odd-inputs", *sets("base.scale=curvature")),
    odd("saliency residual", *FISHER, *sets("saliency.kind=residual", "base.scale=curvature")),
    odd("global", *FISHER, *sets("ortho.budget=global")),
    odd("global curvature", *FISHER, *sets("ortho.budget=global", "base.scale=curvature")),
    odd("compact", *sets("ortho.layout=compact", "ortho.density=0.02")),
    odd("compact int8", *sets("ortho.layout=compact", "ortho.values=int8")),
    odd("compact global", *FISHER, *sets("ortho.layout=compact", "ortho.budget=global")),
    odd("3 bits", *sets("base.bits=3")),
    odd("3 bits mse", *sets("base.bits=3", "base.scale=mse")),
    odd("3 bits of down", *sets("overrides=[{match: '*.down_proj.*', base: {bits: 3}}]")),
    odd("groups of 8", *sets("base.group_size=8", "base.scale=mse")),
    odd("density 0", *sets("ortho.density=0")),
    odd("density 1", *sets("ortho.density=1.0")),
    odd("density 0.3", *sets("ortho.density=0.3", "base.scale=mse")),
    odd("target bits", *FISHER, "--target-bits", "4.8", portable=False),
    odd("gptq", *GRAM, *sets("base.rounding=gptq"), portable=False),
    odd("gptq 3 bits", *GRAM, *sets("base.rounding=gptq", "base.bits=3"), portable=False),
    odd(
        "reference mse",
        *("--reference", "@odd-before"),
        *sets("ortho.split=reference", "base.scale=mse"),
    ),
    recipe("llama", "int4"),
    recipe("llama", "int4-mse"),
    recipe("llama", "attention"),
    recipe("llama", "curvature", "--stats", "@llama-fisher"),
    recipe("llama", "capability", "--stats", "@llama-gram"),
    recipe("llama", "capability-tuned", "--stats", "@llama-gram", *TUNED),
    recipe("llama", "forget-isolate", *ISOLATE),
    recipe("llama", "forget-unlearn", *UNLEARN),
    recipe("llama", "forget-reference", "--reference", "@model-before"),
    llama("curvature inputs", "--stats", "@llama-inputs", *sets("base.scale=curvature")),
    llama("curvature factored", "--stats", "@llama-factored", *sets("base.scale=curvature")),
    llama("curvature token", "--stats", "@llama-token", *sets("base.scale=curvature")),
    llama("gptq", "--stats", "@llama-gram", *sets("base.rounding=gptq")),
    llama("gptq 3 bits", "--stats", "@llama-gram", *sets("base.rounding=gptq", "base.bits=3")),
    llama("tuned", "--stats", "@llama-gram", *sets("base.rounding=tuned"), *TUNED),
    llama(
        "tuned 3 bits", "--stats", "@llama-gram", *sets("base={rounding: tuned, bits: 3}"), *TUNED
    ),
    llama("isolate zero", *ISOLATE, *sets("ortho.split=isolate", "forget.fill=zero")),
    llama("isolate mean", *ISOLATE, *sets("ortho.split=isolate", "forget.fill=mean")),
    engine("absmax", "absmax", 4),
    engine("mse", "mse", 4),
    engine("curvature", "curvature", 4),
    engine("absmax 3 bits", "absmax", 3),
    convert("odd", "@odd", "--dtype", "bfloat16", "--shard-size", "1MB", portable=True),
    *(convert("odd int4", "@odd-int4", "--alpha", alpha) for alpha in ALPHAS),
    *(convert("odd compact int8", "@odd-compact-int8", "--alpha", alpha) for alpha in ALPHAS),
    *(convert("odd 3 bits", "@odd-3-bits", "--alpha", alpha) for alpha in ALPHAS),
    *(convert("llama capability", "@llama-capability", "--alpha", alpha) for alpha in ALPHAS),
    *(convert("llama unlearn", "@llama-forget-unlearn", "--alpha", alpha) for alpha in ALPHAS),
)


# Running them.


def run_alone(case: Case, arguments: list[str]) -> None:
    """Run a case in a process of its own, with one thread in every library."""
    program = ["-m", "ortho_cli"] if case.numba else ["-c", WITHOUT_NUMBA]
    if case.engine:
        program = ["-c", ENGINE]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    environment = {**os.environ, **threads, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(
        [sys.executable, *program, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    if ran.returncode:
        raise RuntimeError(f"`{case.name}` ended with {ran.returncode}:\n{ran.stderr}")


def command(case: Case, folder: Path, workers: int | None) -> list[str]:
    """Spell out a case's arguments."""
    spelled = [str(folder / word[1:]) if word.startswith("@") else word for word in case.arguments]
    if case.engine:
        return [*spelled[:3], str(folder / case.out), *spelled[3:]]
    more = ["-q", "-o", str(folder / case.out)]
    if workers and spelled[0] == "decompose" and "--workers" not in spelled:
        more += ["--workers", str(workers)]
    if spelled[0] != "convert" and "@model" in case.arguments:
        more += ["--device", "cpu"]
    return [*spelled, *more]


def tensors_digest(path: Path) -> str:
    """Digest what a safetensors file holds without its metadata, which names versions."""
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    header.pop("__metadata__", None)
    digest = hashlib.sha256(json.dumps(header).encode())  # in the file's order
    digest.update(raw[end:])
    return digest.hexdigest()


def describe(out: Path) -> Document:
    """Digest every file that a case wrote; of report.json give what it says, but no version."""
    found: Document = {"sha256": {}, "tensors": {}}
    for path in sorted(out.rglob("*")) if out.is_dir() else [out]:
        if path.name == "report.json":
            found["report"] = json.loads(path.read_text())
            found["report"].pop("versions")
        elif path.is_file():
            name = str(path.relative_to(out)) if out.is_dir() else "file"
            found["sha256"][name] = hashlib.sha256(path.read_bytes()).hexdigest()
            if path.suffix == ".safetensors" or not out.is_dir():
                found["tensors"][name] = tensors_digest(path)
    return found


def record(
    cases: Iterable[Case],
    folder: Path,
    run: Run = run_alone,
    *,
    workers: int | None = None,
    on_done: Callable[[str, float], None] = lambda name, seconds: None,
) -> Document:
    """Run cases, in their order, and give what each wrote by its name."""
    found: Document = {}
    for case in cases:
        began = time.monotonic()
        run(case, command(case, folder, workers))
        on_done(case.name, time.monotonic() - began)
        found[case.name] = describe(folder / case.out)
    return found


def with_sources(chosen: Sequence[Case], every: Sequence[Case] = CASES) -> list[Case]:
    """Add the cases whose output others read, and order all by stage."""
    found = {case.name: case for case in chosen}
    waiting = list(chosen)
    while waiting:
        words = {word[1:] for word in waiting.pop().arguments if word.startswith("@")}
        for case in every:
            if case.out in words and case.name not in found:
                found[case.name] = case
                waiting.append(case)
    return sorted(found.values(), key=lambda case: case.stage)


# Comparing what they wrote.


def portable_digests(found: Document, cases: Sequence[Case] = CASES) -> Document:
    """Leave what depends on no version, processor or build of torch: digests of tensors."""
    return {
        case.name: {"tensors": found[case.name]["tensors"]}
        for case in cases
        if case.portable and case.name in found and not case.same_as
    }


def flatten(found: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Give every value with its place; entries of a list go by their `name` if they have one."""
    if isinstance(found, dict) and found:
        for key, value in found.items():
            yield from flatten(value, f"{place} > {key}" if place else str(key))
    elif isinstance(found, list) and any(isinstance(value, dict) for value in found):
        for number, value in enumerate(found):
            yield from flatten(value, f"{place} > {value.get('name', number)}")
    else:
        yield place, found


def differences(before: Document, now: Document) -> list[str]:
    """Name each difference: case, place, both values."""
    found = []
    for name in (*before, *(name for name in now if name not in before)):
        if name not in now or name not in before:
            found.append(f"`{name}`: {'not run' if name in before else 'not in the file'}")
            continue
        old, new = dict(flatten(before[name])), dict(flatten(now[name]))
        for place in (*old, *(place for place in new if place not in old)):
            one, other = old.get(place, "nothing"), new.get(place, "nothing")
            if one != other or type(one) is not type(other):
                told = f"`{name}`: {place}: {one!r} before, {other!r} now"
                found.append(told + relative(one, other))
    return found


def relative(one: Any, other: Any) -> str:
    """Say how far two numbers are from one another."""
    numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in (one, other))
    if not numbers or one == other:
        return ""
    return f" (relative difference {abs(one - other) / max(abs(one), abs(other)):.3g})"


def unlike(found: Document, cases: Sequence[Case] = CASES) -> list[str]:
    """Name each file that differs between two cases which should write the same."""
    return [
        f"`{case.same_as}` and `{case.name}` should write the same: {told}"
        for case in cases
        if case.name in found and case.same_as in found
        for told in differences(
            {case.same_as: found[case.same_as]["sha256"]},
            {case.same_as: found[case.name]["sha256"]},
        )
    ]


def uncovered() -> list[str]:
    """Name the shipped recipes that no case runs."""
    return sorted(set(RECIPES) - {case.recipe for case in CASES})


def choose(options: argparse.Namespace) -> list[Case]:
    """Choose and order the cases that are asked for."""
    chosen = [
        case
        for case in CASES
        if fnmatch.fnmatchcase(case.name, options.only) and (case.portable or not options.portable)
    ]
    if options.shuffle is not None:
        random.Random(options.shuffle).shuffle(chosen)
    return with_sources(chosen)


def tell(name: str, seconds: float) -> None:
    """Say on stderr that a case is done."""
    sys.stderr.write(f"{seconds:6.1f} s  {name}\n")


def main() -> int:
    """Run the cases; write, compare or print what they gave."""
    parser = argparse.ArgumentParser(description="Digests of what every recipe writes.")
    parser.add_argument("--write", type=Path, metavar="FILE")
    parser.add_argument("--compare", type=Path, metavar="FILE")
    parser.add_argument(
        "--only", default="*", metavar="GLOB", help="names of cases, as 'odd int4*'"
    )
    parser.add_argument("--portable", action="store_true", help="what any machine gives alike")
    parser.add_argument("--shuffle", type=int, metavar="SEED", help="run in another order")
    parser.add_argument("--workers", type=int, help="of each decompose that names none")
    options = parser.parse_args()
    if missing := uncovered():
        sys.stderr.write(f"no case runs these recipes: {', '.join(missing)}\n")
        return 1
    torch.set_num_threads(1)
    cases = choose(options)
    before = json.loads(options.compare.read_text()) if options.compare else {}
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="recipe-digests-") as place:
        llama_too = any("@model" in case.arguments for case in cases)
        save_inputs(Path(place), llama=llama_too)
        found = record(cases, Path(place), workers=options.workers, on_done=tell)
    faults = unlike(found)
    shown = portable_digests(found) if options.portable else found
    text = json.dumps(shown, indent=1, sort_keys=True) + "\n"
    if options.write:
        options.write.write_text(text)
    elif options.compare:
        names = {case.name for case in cases}
        asked = {n: v for n, v in before.items() if n in names or options.only == "*"}
        faults += differences(asked, shown)
    else:
        sys.stdout.write(text)
    for fault in faults:
        sys.stderr.write(f"{fault}\n")
    sys.stderr.write(
        f"{len(cases)} cases in {time.monotonic() - began:.0f} s, {len(faults)} differences\n"
    )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
