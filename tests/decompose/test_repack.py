"""Ortho in the compact layout, from the recipe to every reader, beside CSR of the same weights."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import reference
import torch
from conftest import Ortho, SmallTiles
from jobs import SERVER, decompose
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ortho_cli
from ortho_cli.decompose import recipe
from ortho_cli.decompose.job import KIND
from ortho_cli.decompose.plan import Plan, make_plan
from ortho_cli.errors import (
    ArtifactError,
    CheckpointError,
    Interrupted,
    NumericalError,
    OutputExistsError,
    RecipeError,
    ResourceError,
)
from ortho_cli.events import Event, Finishing
from ortho_cli.formats import compact
from ortho_cli.formats.artifact import is_artifact
from ortho_cli.formats.open_artifact import open_artifact
from ortho_cli.formats.ortho_reader import KeptReader
from ortho_cli.formats.statistics import open_statistics
from ortho_cli.formats.verify import describe, verify
from ortho_cli.split import quantize
from ortho_cli.split.sizes import DEFAULT_SIZES, Sizes
from ortho_cli.storage import job
from ortho_cli.storage.checkpoint import open_checkpoint, read_shard
from ortho_cli.storage.work_folder import work_folder
from tests.decompose.test_job_edits import Case as EditCase
from tests.decompose.test_job_edits import case as edited
from tests.decompose.test_reference_split import Case as ReferenceCase

__all__ = ["edited"]

SERVER.set_forkserver_preload(["ortho_cli.decompose.job", "ortho_cli.decompose.recipe"])
COMPACT = "ortho.layout=compact"
INT8 = "ortho={layout: compact, values: int8, density: 0.02}"
UP = "model.layers.0.mlp.up_proj"


def plan(source: Path, *sets: str, stats: Path | None = None, **options: Any) -> Plan:
    return make_plan(
        open_checkpoint(source),
        recipe.load_recipe(None, sets),
        statistics=open_statistics(stats) if stats else None,
        **options,
    )


def split(
    source: Path,
    out: Path,
    *sets: str,
    stats: Path | None = None,
    workers: int = 1,
    sizes: Sizes = DEFAULT_SIZES,
    **options: Any,
) -> dict[str, Any]:
    made = plan(source, *sets, stats=stats, workers=workers, sizes=sizes)
    return decompose(made, open_checkpoint(source), out, **options)


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_mode, path.read_bytes())
        for path in files
    }


def streams(folder: Path) -> dict[str, dict[str, Tensor]]:
    """What ortho keeps of every module, as CSR."""
    opened = open_artifact(folder)
    with KeptReader(opened) as reader:
        return {module: reader.csr(module) for module in opened.split}


def same(one: dict[str, dict[str, Tensor]], two: dict[str, dict[str, Tensor]]) -> bool:
    return one.keys() == two.keys() and all(
        a.dtype == b.dtype and torch.equal(a, b)
        for module in one
        for a, b in zip(one[module].values(), two[module].values(), strict=True)
    )


def one_weight(folder: Path, weight: Tensor) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({"a.weight": weight}, folder / "m.safetensors")
    return folder / "m.safetensors"


def hot_columns(rows: int, width: int, *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A weight whose columns 3 and 40 lose most by rounding, all over."""
    weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(0))
    weight[:, [3, 40]] += 3.0
    return weight.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("density", [0.0, 0.02, 0.4, 1.0])
def test_compact_source_values_are_csr_bit_for_bit(
    tmp_path: Path, dtype: torch.dtype, density: float
) -> None:
    tensors = checkpoints.weights(hidden=64, mlp=96, layers=1, vocab=40, kv=16, dtype=dtype)
    tensors["model.layers.0.mlp.up_proj.weight"][:, 7] *= 9
    checkpoints.save(tmp_path / "m", tensors)
    sets = [f"ortho.density={density}"]
    csr = split(tmp_path / "m", tmp_path / "csr", *sets)
    told = split(tmp_path / "m", tmp_path / "out", *sets, COMPACT)
    assert same(streams(tmp_path / "out"), streams(tmp_path / "csr"))
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("csr", "out"))
    assert all(torch.equal(one[name], two[name]) for name in one.keys() | two.keys())
    assert verify(open_artifact(tmp_path / "out")).checked["ortho.safetensors"] == "every digest"
    for entry, other in zip(told["tensors"], csr["tensors"], strict=True):
        assert {k for k in other if entry[k] != other[k]} <= {"bits_per_weight", "blake3"}
        assert (entry.keys() - other.keys()) == (
            {"columns"} if entry["action"] == "split" else set()
        )
    modes = [(tmp_path / "out" / f"{f}.safetensors").stat().st_mode for f in ("model", "ortho")]
    assert list(map(stat.S_IMODE, modes)) == [0o644, 0o600]
    assert told["totals"]["ortho_bytes"] == (tmp_path / "out" / "ortho.safetensors").stat().st_size
    bound = plan(tmp_path / "m", *sets, COMPACT)
    assert told["totals"]["ortho_bytes"] <= bound.ortho_bytes
    assert bound.bytes_on_disk > bound.ortho.size + told["totals"]["ortho_bytes"]


def test_compact_parts_equal_the_slow_twin_and_say_which_columns_are_whole(tmp_path: Path) -> None:
    weight = hot_columns(24, 64)
    source = one_weight(tmp_path / "m", weight)
    stats = tmp_path / "stats.safetensors"
    checkpoints.save_statistics(stats, source, change=lambda t: favour(t, [3, 40]))
    report = split(source, tmp_path / "out", COMPACT, "ortho.density=0.05", stats=stats)
    split(source, tmp_path / "csr", "ortho.density=0.05", stats=stats)
    kept = load_file(tmp_path / "csr" / "ortho.safetensors")
    rows = torch.repeat_interleave(torch.arange(24), kept["a.crow_indices"].long().diff())
    indices = (rows * 64 + kept["a.col_indices"].long()).tolist()
    whole, block, counts, gaps, rest = reference.compact(indices, (24, 64))
    found = load_file(tmp_path / "out" / "ortho.safetensors")
    assert whole == [3, 40]
    assert report["tensors"][0]["columns"] == 2
    assert {
        name: found[f"a.{name}"].tolist() for name in ("columns", "row_counts", "col_gaps")
    } == {
        "columns": whole,
        "row_counts": counts,
        "col_gaps": gaps,
    }
    assert torch.equal(found["a.column_values"], kept["a.values"][block].view(24, 2))
    assert torch.equal(found["a.values"], kept["a.values"][rest])


def favour(tensors: dict[str, Tensor], columns: list[int]) -> None:
    """Make the curvature of some columns outweigh all else."""
    for value in tensors.values():
        value[:, columns] = 1e6


def int8_twin(weight: Tensor, base: Tensor, scales: Tensor, kept: dict[str, Tensor]) -> list[float]:
    """What alpha = 1 is at the kept positions, one weight at a time."""
    rows = torch.repeat_interleave(torch.arange(len(weight)), kept["crow_indices"].long().diff())
    at = rows, kept["col_indices"].long()
    group = weight.shape[1] // scales.shape[1]
    mine = scales[at[0], at[1] // group].tolist()
    return reference.int8_values(weight[at].tolist(), base[at].tolist(), mine)[2]


def curvature_of(kind: str, source: Path, path: Path) -> tuple[Path | None, Tensor | None]:
    if kind == "residual":
        return None, None
    options = {"kind": "gram"} if kind == "gram" else {"storage": kind}
    return path, checkpoints.save_statistics(path, source, **options)["a.weight"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["residual", "gram", "full", "factored"])
@pytest.mark.parametrize("small", [True, False])
def test_int8_values_and_figures_equal_the_slow_twins(
    tmp_path: Path, dtype: torch.dtype, kind: str, small: bool
) -> None:
    sizes = SmallTiles() if small else DEFAULT_SIZES
    weight = hot_columns(40, 96, dtype=dtype)
    source = one_weight(tmp_path / "m", weight)
    stats, curvature = curvature_of(kind, source, tmp_path / "stats.safetensors")
    report = split(source, tmp_path / "out", INT8, stats=stats, sizes=sizes)
    if isinstance(sizes, SmallTiles):
        sizes.prove("split", "values")
    split(source, tmp_path / "csr", "ortho.density=0.02", stats=stats)
    csr, found = streams(tmp_path / "csr")["a"], streams(tmp_path / "out")["a"]
    held = load_file(tmp_path / "out" / "model.safetensors")
    scales = held["a.weight_scale"].float()
    base = reference.dequantize(
        quantize.unpack_int4(held["a.weight_packed"]), held["a.weight_scale"]
    )
    wide = weight.float()
    expected = torch.tensor(int8_twin(wide, base, scales, csr)).to(dtype)
    assert torch.equal(found["crow_indices"], csr["crow_indices"])
    assert torch.equal(found["col_indices"], csr["col_indices"])
    assert torch.equal(found["values"], expected)
    if dtype != torch.bfloat16:  # whose own steps are wider here than those of int8
        assert not torch.equal(found["values"], csr["values"])
    rows = torch.repeat_interleave(torch.arange(40), csr["crow_indices"].long().diff())
    restored = base.clone()
    restored[rows, csr["col_indices"].long()] = expected.float()
    told = report["tensors"][0]
    for alpha, approximation in ((0, base), (1, restored)):
        decibels = reference.decibels(wide, approximation)
        assert told[f"sqnr_db_alpha_{alpha}"] == pytest.approx(decibels, abs=2e-3)
        if curvature is not None:
            error = (approximation - wide).double().square() * curvature.double()
            assert told[f"curvature_error_alpha_{alpha}"] == pytest.approx(
                float(error.sum()), rel=1e-4
            )


def test_int8_of_everything_leaves_an_error_and_says_which(tmp_path: Path) -> None:
    weight = hot_columns(40, 96)
    source = one_weight(tmp_path / "m", weight)
    report = split(source, tmp_path / "out", INT8, "ortho.density=1.0")
    told = report["tensors"][0]
    assert told["columns"] == 96
    values = streams(tmp_path / "out")["a"]["values"].float().view(40, 96)
    assert told["sqnr_db_alpha_1"] == pytest.approx(
        reference.decibels(weight.float(), values), abs=0.2
    )
    assert told["sqnr_db_alpha_1"] > 45 > 25 > told["sqnr_db_alpha_0"]
    assert 0.99 < told["residual_kept"] < 1.0


def test_int8_with_a_reference_counts_what_rounding_loses_of_the_delta(tmp_path: Path) -> None:
    case = ReferenceCase(tmp_path)
    exact = case.split(out="exact")
    rounded = case.split(COMPACT, "ortho.values=int8")
    delta, lost = 0.0, 0.0
    back, csr = streams(tmp_path / "out"), streams(tmp_path / "exact")
    for name, new in case.new.items():
        if name.endswith("_proj.weight"):
            delta += float((new.double() - case.old[name].double()).square().sum())
            module = name.removesuffix(".weight")
            one, two = (found[module]["values"].double() for found in (back, csr))
            lost += float((one - two).square().sum())
    assert lost > 0
    told = exact["totals"]["delta_kept"] - rounded["totals"]["delta_kept"]
    assert told == pytest.approx(lost / delta, abs=2e-6)


def test_int8_that_overflows_the_dtype_is_refused_by_name(tmp_path: Path) -> None:
    old = torch.full((4, 64), 1e-30)
    new = old.clone()
    new[1, 5] = 3e38
    for name, weight in (("before", old), ("after", new)):
        one_weight(tmp_path / name, weight)
    opened = open_checkpoint(tmp_path / "after" / "m.safetensors")
    made = make_plan(
        opened,
        recipe.load_recipe(None, [INT8, "ortho.split=reference"]),
        reference=open_checkpoint(tmp_path / "before" / "m.safetensors"),
    )
    with pytest.raises(NumericalError, match=r"int8 values of `a\.weight` overflow F32") as caught:
        decompose(made, opened, tmp_path / "out")
    assert "ortho.values" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()
    assert not work_folder(tmp_path / "out").exists()


def test_forgetting_positions_are_exact_in_compact(edited: EditCase) -> None:
    editor = edited.fake()
    for layout in ("csr", "compact"):
        edited.run(editor, f"ortho.layout={layout}", out=edited.place / layout)
    assert same(streams(edited.place / "compact"), streams(edited.place / "csr"))
    assert verify(open_artifact(edited.place / "compact")).checked
    assert not work_folder(edited.place / "compact").exists()


@pytest.mark.parametrize(
    "other", ["ortho.layout=csr", "ortho.split=isolate", "ortho.split=unlearn"]
)
def test_int8_without_a_layout_for_it_or_with_forgetting_is_refused(pico: Path, other: str) -> None:
    key, value = other.split("=")
    with pytest.raises(
        RecipeError, match=rf"ortho\.values is int8, and {key} is {value}"
    ) as caught:
        plan(pico, INT8, other)
    assert caught.value.hint


def test_same_bytes_for_any_workers_tiles_and_sharding(
    tmp_path: Path, pico_tensors: dict[str, Tensor], small_tiles: SmallTiles
) -> None:
    found = []
    for shards, workers in ((1, 1), (1, 3), (3, 2)):
        checkpoints.save(tmp_path / f"m{shards}", pico_tensors, shards=shards)
        split(tmp_path / f"m{shards}", tmp_path / f"out{workers}", INT8, workers=workers)
        found.append(contents(tmp_path / f"out{workers}"))
    assert all(each == found[0] for each in found[1:])
    split(tmp_path / "m1", tmp_path / "tiles", INT8, sizes=small_tiles)
    small_tiles.prove("split", "values")
    many = contents(tmp_path / "tiles")
    for each in (many, found[0]):
        del each["report.json"]  # whose sums may differ in their last digits
    assert many == found[0]


# --- killed and interrupted -----------------------------------------------------------------------


def split_and_die(source: Path, out: Path, moment: str) -> None:
    """Decompose and SIGKILL this process at a moment of the last steps."""
    job.COMMIT_SECONDS = 0.0
    kind, _, number = moment.partition(" ")

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def watch(event: Event) -> None:
        if kind == "finishing" and isinstance(event, Finishing) and event.step == number:
            die()

    left = [int(number)] if number.isdecimal() else [0]

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **options: Any) -> Any:
            if left[0] == 0:
                die()
            left[0] -= 1
            return original(*given, **options)

        return call

    if kind == "encode":
        compact.encode = counted(compact.encode)
    if kind == "rename":
        Path.rename = counted(Path.rename)  # type: ignore[method-assign]
    split(source, out, INT8, on_event=watch)


@pytest.mark.parametrize(
    "moment",
    [
        "finishing compact",
        "encode 0",
        "encode 5",
        "finishing sync",
        *(f"rename {n}" for n in range(3)),
    ],
)
def test_kill_in_the_last_steps_leaves_no_output_and_the_rerun_gives_the_same_bytes(
    pico: Path, tmp_path: Path, moment: str
) -> None:
    out = tmp_path / "out"
    process = SERVER.Process(target=split_and_die, args=(pico, out, moment))
    process.start()
    process.join(600)  # a busy machine is no fault of the code
    assert process.exitcode == -signal.SIGKILL
    assert not out.exists()
    assert (work_folder(out) / "private").stat().st_mode & 0o077 == 0
    split(pico, out, INT8)
    split(pico, tmp_path / "reference", INT8)
    assert contents(out) == contents(tmp_path / "reference")
    assert {p.name for p in out.iterdir()} == {
        *(
            "model.safetensors",
            "additional_chat_templates",
            "config.json",
            "model.safetensors.index.json",
        ),
        *("ortho.safetensors", "report.json", "tokenizer.json", "README.md"),
    }
    assert not work_folder(out).exists()


def test_interrupt_in_the_last_step_keeps_what_is_finished(pico: Path, tmp_path: Path) -> None:
    def interrupt(event: Event) -> None:
        if isinstance(event, Finishing) and event.step == "compact":
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(Interrupted, match="with 20 of 20 tensors finished"):
        split(pico, out, INT8, on_event=interrupt)
    again: list[Event] = []
    split(pico, out, INT8, on_event=again.append)
    assert getattr(again[0], "resumed", None) == 20
    split(pico, tmp_path / "reference", INT8)
    assert contents(out) == contents(tmp_path / "reference")


def test_failure_before_anything_is_finished_leaves_nothing(
    pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scratch file lies where edits do, and is no work that could be gone on with."""

    def fail(*given: Any, **options: Any) -> Any:
        raise RuntimeError("nothing goes")

    monkeypatch.setattr("ortho_cli.decompose.workers.Worker.work", fail)
    with pytest.raises(RuntimeError, match="nothing goes"):
        split(pico, tmp_path / "out", INT8)
    assert not work_folder(tmp_path / "out").exists()


def test_space_that_scratch_takes_already_is_not_asked_for_again(
    pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = plan(pico, INT8)

    free = made.bytes_on_disk - made.base.size - made.ortho.size

    def stop(event: Event) -> None:
        if isinstance(event, Finishing) and event.step == "compact":
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        split(pico, tmp_path / "out", INT8, on_event=stop)
    with monkeypatch.context() as patch:
        patch.setattr(job, "free_bytes", lambda place: free)
        target = job.Target(path=tmp_path / "out", kind=KIND, force=False)
        target.check_space(made.bytes_on_disk)
        with pytest.raises(ResourceError, match="MB free and the artifact takes"):
            dataclasses.replace(target, path=tmp_path / "elsewhere").check_space(made.bytes_on_disk)
    with pytest.raises(OutputExistsError, match=r"of another run: another plan$"):
        split(pico, tmp_path / "out", INT8, "ortho.density=0.03")


def test_scratch_of_another_size_is_work_done_again(pico: Path, tmp_path: Path) -> None:
    def stop(event: Event) -> None:
        if isinstance(event, Finishing) and event.step == "compact":
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        split(pico, out, INT8, on_event=stop)
    os.truncate(work_folder(out) / "private" / "ortho.safetensors.partial", 100)
    again: list[Event] = []
    split(pico, out, INT8, on_event=again.append)
    assert getattr(again[0], "resumed", None) == 0
    split(pico, tmp_path / "reference", INT8)
    assert contents(out) == contents(tmp_path / "reference")


# --- readers --------------------------------------------------------------------------------------


@pytest.fixture(params=["source", "int8"])
def made(pico: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """The pico model, compact."""
    split(pico, tmp_path / "made", INT8, f"ortho.values={request.param}")
    return tmp_path / "made"


def test_headers_say_the_format_and_every_reader_knows_it(made: Path, pico: Path) -> None:
    with safe_open(made / "model.safetensors", framework="pt") as file:
        base = file.metadata()
    with safe_open(made / "ortho.safetensors", framework="pt") as file:
        ortho = file.metadata()
    assert (base["format"], base["ortho_format"], base["role"]) == ("pt", "ortho/3", "base")
    assert (ortho["format"], ortho["role"]) == ("ortho/3", "ortho")
    assert json.loads((made / "report.json").read_text())["format"] == "ortho/3"
    assert is_artifact(made)
    with pytest.raises(CheckpointError, match="is the base file of an artifact already"):
        plan(made / "model.safetensors")
    full = {t["name"]: t for t in describe(open_artifact(made))["tensors"]}
    (made / "report.json").unlink()
    bare = describe(open_artifact(made))
    assert bare["format"] == "ortho/3"
    for tensor in bare["tensors"]:
        for key in ("action", "dtype", "shape", "bits_per_weight", "nnz", "columns"):
            assert tensor.get(key) == full[tensor["name"]].get(key), (tensor["name"], key)
    assert (
        verify(open_artifact(made)).checked["ortho.safetensors"].startswith("its structure alone")
    )


@pytest.mark.parametrize(("file", "key"), [("model", "ortho_format"), ("ortho", "format")])
@pytest.mark.parametrize("version", ["ortho/1", "ortho/4"])
def test_another_version_in_one_file_is_refused(
    made: Path, file: str, key: str, version: str
) -> None:
    path = made / f"{file}.safetensors"
    save_file(load_file(path), path, metadata=read_shard(path).metadata | {key: version})
    with pytest.raises(ArtifactError, match=r"says it is 'ortho/\d' '\w+', not"):
        open_artifact(made)


def test_inspect_says_at_most_before_and_the_truth_after(
    pico: Path, tmp_path: Path, ortho: Ortho
) -> None:
    sets = ("--set", "ortho.layout=compact", "--set", "ortho.values=int8")
    dry = ortho("decompose", pico, "--dry-run", *sets)
    assert "+ ortho at most " in dry.out
    assert ": at most " in dry.out
    told = ortho("decompose", pico, "--dry-run", "--json", *sets).json["totals"]
    assert told["ortho_bytes_at_most"] is True
    done = ortho("decompose", pico, "-o", tmp_path / "out", "--json", *sets)
    assert done.code == 0, done.err
    assert done.json["totals"]["ortho_bytes"] <= told["ortho_bytes"]
    ran = ortho("inspect", tmp_path / "out", "--verify")
    assert ran.code == 0, ran.err
    assert "at most" not in ran.out
    assert (
        "ortho_bytes_at_most" not in ortho("decompose", pico, "--dry-run", "--json").json["totals"]
    )


def test_convert_gives_the_same_weights_as_csr(
    pico: Path, tmp_path: Path, ortho: Ortho, small_tiles: SmallTiles
) -> None:
    for layout in ("csr", "compact"):
        split(pico, tmp_path / layout, "ortho.density=0.05", f"ortho.layout={layout}")
        for alpha in ("0", "0.5", "1"):
            out = tmp_path / f"{layout}-{alpha}"
            with small_tiles.in_commands():
                ran = ortho("convert", tmp_path / layout, "-o", out, "--alpha", alpha, "-q")
            assert ran.code == 0, ran.err
    small_tiles.prove("convert")
    for alpha in ("0", "0.5", "1"):
        one, two = (
            load_file(tmp_path / f"{layout}-{alpha}" / "model.safetensors")
            for layout in ("csr", "compact")
        )
        assert all(torch.equal(one[name], two[name]) for name in one.keys() | two.keys())


class Tiny(nn.Module):
    """Two Linears under the names of their checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(96, 40, bias=False)
        self.b = nn.Linear(64, 96, bias=False)


@pytest.fixture(params=["source", "int8"])
def tiny(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """An artifact of `Tiny` with a whole column; `dense` beside it holds W(1)."""
    tensors = {"a.weight": hot_columns(40, 96, dtype=torch.float32)}
    tensors["b.weight"] = hot_columns(96, 64, dtype=torch.float32)
    save_file(tensors, tmp_path / "m.safetensors")
    stats = tmp_path / "stats.safetensors"
    checkpoints.save_statistics(stats, tmp_path / "m.safetensors", change=lambda t: favour(t, [3]))
    sets = [COMPACT, "ortho.density=0.05", f"ortho.values={request.param}"]
    split(tmp_path / "m.safetensors", tmp_path / "out", *sets, stats=stats)
    return tmp_path / "out"


def test_engine_loads_compact_and_saves_csr_that_says_so(tiny: Path, tmp_path: Path) -> None:
    kept = streams(tiny)
    engine = ortho_cli.Engine(Tiny())
    engine.load(tiny, alpha=1.0)
    for module, stream in kept.items():
        layer = engine.module.get_submodule(module)
        for part, value in stream.items():
            assert torch.equal(getattr(layer, part), value)
    engine.save(tmp_path / "again")
    assert same(streams(tmp_path / "again"), kept)
    metadata = open_artifact(tmp_path / "again").base.metadata
    assert metadata["ortho_format"] == "ortho/3"
    assert "layout" not in json.loads(metadata["recipe"])["ortho"]


@pytest.mark.filterwarnings("ignore")
def test_load_gives_a_model_that_computes_like_csr(
    tmp_path: Path, pico_tensors: dict[str, Tensor], pico: Path
) -> None:
    logits = []
    for layout in ("csr", "compact"):
        split(pico, tmp_path / layout, f"ortho.layout={layout}", "ortho.density=0.02")
        model = ortho_cli.load(tmp_path / layout, alpha=1.0)
        logits.append(model(torch.arange(8)[None]).logits)
    assert torch.equal(*logits)
    split(pico, tmp_path / "int8", INT8)
    model = ortho_cli.load(tmp_path / "int8", alpha=1.0)
    assert torch.allclose(model(torch.arange(8)[None]).logits, logits[0], atol=0.05)


# --- damage ---------------------------------------------------------------------------------------

Parts = dict[str, Tensor]


def put(part: str, position: int, value: int) -> Callable[[Parts], Any]:
    def change(parts: Parts) -> None:
        parts[f"a.{part}"].view(-1)[position] = value

    return change


def replace(part: str, make: Callable[[Tensor], Tensor]) -> Callable[[Parts], Any]:
    def change(parts: Parts) -> None:
        parts[f"a.{part}"] = make(parts[f"a.{part}"]).contiguous()

    return change


DAMAGE: dict[str, tuple[Callable[[Parts], Any], str, str]] = {
    "column": (put("columns", 0, 96), "both", "`a.columns` names column 96 of 96"),
    "columns of int32": (replace("columns", lambda t: t.int()), "both", r"is I32 \[1\], not U16"),
    "block": (replace("column_values", lambda t: t[:-1]), "both", r"\[39, 1\], not .* \[40, 1\]"),
    "block of another dtype": (
        replace("column_values", lambda t: t.half()),
        "both",
        "`a.column_values` is F16",
    ),
    "counts": (put("row_counts", 0, 200), "both", "`a.row_counts` sums to"),
    "counts of int64": (replace("row_counts", lambda t: t.long()), "both", "is I64"),
    "counts too wide": (replace("row_counts", lambda t: t.int()), "both", "where its largest is"),
    "gaps": (put("col_gaps", 0, 254), "both", "`a.col_gaps` leads to column"),
    "gap without end": (put("col_gaps", -1, 255), "both", "`a.col_gaps` ends"),
    "gaps cut": (replace("col_gaps", lambda t: t[:-1]), "both", "`a.col_gaps` ends"),
    "values cut": (replace("values", lambda t: t[:-1]), "both", "and there are"),
    "gaps missing": (lambda p: p.pop("a.col_gaps"), "both", "`a.col_gaps` is missing"),
    "another part": (lambda p: p.update({"a.x": torch.ones(1)}), "both", "`a.x` is not of any"),
    "another module": (lambda p: p.update({"c.x": torch.ones(1)}), "both", "`c.x` is not of any"),
    "a step for source": (
        lambda p: p.update({"a.value_step": torch.ones(1)}),
        "source",
        "`a.value_step` is not of any",
    ),
    "NaN": (put("values", 1, float("nan")), "source", "holds NaN or infinity"),  # type: ignore[arg-type]
    "infinite": (
        put("column_values", 1, float("inf")),  # type: ignore[arg-type]
        "source",
        "holds NaN or infinity",
    ),
    "no step": (lambda p: p.pop("a.value_step"), "int8", "`a.value_step` is missing"),
    "step of 0": (put("value_step", 0, 0), "int8", "`a.value_step` is 0.0"),
    "step NaN": (put("value_step", 0, float("nan")), "int8", "`a.value_step` is nan"),  # type: ignore[arg-type]
    "step too large": (
        put("value_step", 0, 3e38),  # type: ignore[arg-type]
        "int8",
        "holds NaN or infinity",
    ),
    "-128": (put("values", 0, -128), "int8", "holds -128"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_of_any_part_is_refused_by_every_reader(tiny: Path, ortho: Ortho, name: str) -> None:
    change, where, expected = DAMAGE[name]
    path = tiny / "ortho.safetensors"
    if (
        where != "both"
        and where != json.loads((tiny / "report.json").read_text())["recipe"]["ortho"]["values"]
    ):
        pytest.skip("of the other values")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=read_shard(path).metadata)
    (tiny / "report.json").unlink()
    with pytest.raises(ArtifactError, match=expected) as caught:
        verify(open_artifact(tiny))
    assert caught.value.hint
    with pytest.raises(ArtifactError, match=expected):
        ortho_cli.Engine(Tiny()).load(tiny, alpha=1.0)
    ran = ortho("convert", tiny, "--alpha", "1")
    assert ran.code == ArtifactError.exit_code
    assert not (tiny.parent / "out-alpha-1").exists()


def test_any_flipped_byte_is_detected(tiny: Path) -> None:
    path = tiny / "ortho.safetensors"
    sound = path.read_bytes()
    draw = np.random.default_rng(0)
    for position in (0, 8, *draw.integers(0, len(sound), 60).tolist(), len(sound) - 1):
        damaged = bytearray(sound)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError):
            verify(open_artifact(tiny))


def test_report_with_other_columns_is_refused(tiny: Path) -> None:
    path = tiny / "report.json"
    report = json.loads(path.read_text())
    report["tensors"][0]["columns"] += 1
    path.write_text(json.dumps(report))
    with pytest.raises(ArtifactError, match=r"`columns` of `a\.weight` is 2, not 1"):
        describe(open_artifact(tiny))
