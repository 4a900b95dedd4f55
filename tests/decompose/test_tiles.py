"""Bytes do not depend on tiles: every way to write them, in tiles of a few rows and in one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from conftest import Ortho, SmallTiles
from jobs import decompose
from safetensors.torch import load_file

from ortho_cli.decompose import budget, recipe
from ortho_cli.decompose.kernels import Kernels
from ortho_cli.decompose.plan import Plan, make_plan
from ortho_cli.decompose.recheck import check_values
from ortho_cli.decompose.survey import digest_of
from ortho_cli.events import Advanced, Event, null_sink
from ortho_cli.formats.open_artifact import open_artifact
from ortho_cli.formats.statistics import open_statistics
from ortho_cli.runtime.engine import Engine
from ortho_cli.split.sizes import DEFAULT_SIZES, Part, Sizes
from ortho_cli.storage.checkpoint import open_checkpoint
from tests.decompose.test_job_edits import Fake, draw_edits
from tests.decompose.test_reference_split import Case as ReferenceCase
from tests.runtime.test_engine import Net
from tests.split.test_cuda_kernel import HERE
from tests.split.test_numba_kernel import files

COMPACT = "ortho={layout: compact, values: int8, density: 0.02}"
COLUMNS = "ortho={structure: columns, density: 0.05}"
SCALES = {
    "absmax": ("base.scale=absmax",),
    "mse": ("base.scale=mse", "ortho.density=0.03"),
    "mse alone": ("base.scale=mse", "base.alone=true", "ortho.density=0.03"),
    "compact": (COMPACT,),
    "all of it": ("ortho.density=1",),
    "none of it": ("ortho.density=0",),
    "columns": (COLUMNS,),
    "columns mse": (COLUMNS, "base.scale=mse"),
    "columns int8": (COLUMNS, "ortho.values=int8"),
    "columns shared": (COLUMNS, "ortho.share=true"),
}
CURVED = {
    "curvature": ("ortho.density=0.02",),
    "turns": ("base.scale=curvature", "ortho.density=0.03"),
    "turns alone": ("base.scale=curvature", "base.alone=true", "ortho.density=0.03"),
    "compact curvature": (COMPACT, "base.scale=curvature"),
    "global": ("ortho.budget=global", "ortho.density=0.02"),
    "columns turns": (COLUMNS, "base.scale=curvature"),
    "columns global": (COLUMNS, "ortho.budget=global", "ortho.max_rank=6"),
    "global turns": ("ortho.budget=global", "ortho.density=0.02", "base.scale=curvature"),
}
# Of these the loops and the device take none.
GENERAL = {
    "3 bits": ("base.bits=3",),
    "scales of curvature alone": ("saliency.kind=residual", "base.scale=curvature"),
    "gptq": ("base.rounding=gptq", "ortho.density=0.02"),
    "columns gptq": (COLUMNS, "base.rounding=gptq"),
    "gptq mse": ("base.rounding=gptq", "base.scale=mse", "ortho.density=0.02"),
}


@dataclass
class Case:
    """A checkpoint and its statistics; `differ` makes one layer count for more than the other."""

    source: Path
    stats: Path
    place: Path

    def plan(self, *sets: str, curved: bool, sizes: Sizes, **options: Any) -> Plan:
        return make_plan(
            open_checkpoint(self.source),
            recipe.load_recipe(None, sets),
            statistics=open_statistics(self.stats) if curved else None,
            sizes=sizes,
            **options,
        )

    def alike(
        self, sizes: SmallTiles, *sets: str, curved: bool, prove: tuple[Part, ...], **options: Any
    ) -> None:
        """Write with tiles as they are by default and with small ones: the same bytes."""
        opened, told = open_checkpoint(self.source), {}
        for name, given in (("one", DEFAULT_SIZES), ("many", sizes)):
            plan = self.plan(*sets, curved=curved, sizes=given)
            told[name] = decompose(plan, opened, self.place / name, **options)
        sizes.prove(*prove)
        assert files(self.place / "many") == files(self.place / "one")
        for key in ("sqnr_db_alpha_0", "sqnr_db_alpha_1", "residual_kept", "saliency_kept"):
            one, many = (told[name]["totals"][key] or 0.0 for name in ("one", "many"))
            assert many == pytest.approx(one, rel=1e-4), key


@pytest.fixture
def case(pico: Path, tmp_path: Path) -> Case:
    def differ(stored: dict[str, torch.Tensor]) -> None:
        for name, tensor in stored.items():
            if "layers.1." in name and not name.endswith("gram"):
                tensor.mul_(30)

    checkpoints.save_statistics(tmp_path / "stats.safetensors", pico, change=differ, gram="none")
    return Case(pico, tmp_path / "stats.safetensors", tmp_path)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", [*SCALES, *CURVED])
def test_any_tiles_same_bytes(
    case: Case, small_tiles: SmallTiles, name: str, compiled: bool
) -> None:
    sets, curved = (SCALES | CURVED)[name], name in CURVED
    if compiled:
        pytest.importorskip("numba")
        plan = case.plan(*sets, curved=curved, sizes=DEFAULT_SIZES)
        assert Kernels(plan, on_event=null_sink).compiled
    encoded = "compact" in name or "int8" in name
    more: tuple[Part, ...] = ("values",) if encoded else ()
    case.alike(
        small_tiles, *sets, curved=curved, prove=("split", "check", *more), compiled=compiled
    )


@pytest.mark.parametrize("name", GENERAL)
def test_any_tiles_same_bytes_of_what_torch_alone_does(
    case: Case, small_tiles: SmallTiles, name: str
) -> None:
    more: tuple[Part, ...] = ("gptq",) if "gptq" in name else ()
    curved = name != "3 bits"
    case.alike(small_tiles, *GENERAL[name], curved=curved, prove=("split", "check", *more))


@pytest.mark.parametrize("name", ["absmax", "compact", "all of it", "curvature", "global"])
def test_any_tiles_same_bytes_of_a_device(case: Case, small_tiles: SmallTiles, name: str) -> None:
    sets, curved = (SCALES | CURVED)[name], name in CURVED
    case.alike(small_tiles, *sets, curved=curved, prove=("device",), device=HERE)


@pytest.mark.parametrize("split", ["isolate", "unlearn"])
def test_any_tiles_same_bytes_of_what_forgets(
    case: Case, small_tiles: SmallTiles, split: str
) -> None:
    sets = (f"ortho.split={split}", "ortho.density=0.02")
    edits = draw_edits(case.plan(*sets, curved=True, sizes=DEFAULT_SIZES))
    editor = Fake(edits, case.place / "count")
    case.alike(small_tiles, *sets, curved=True, prove=("split", "check"), editor=editor)


@pytest.mark.parametrize("sets", [(), ("ortho.layout=compact", "ortho.values=int8")])
def test_any_tiles_same_bytes_of_a_reference(
    tmp_path: Path, small_tiles: SmallTiles, sets: tuple[str, ...]
) -> None:
    case = ReferenceCase(tmp_path)
    case.split(*sets, out="one")
    case.split(*sets, out="many", sizes=small_tiles)
    small_tiles.prove("split", "check")
    assert files(tmp_path / "many") == files(tmp_path / "one")


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("curved", [False, True])
def test_any_tiles_same_survey(
    case: Case, small_tiles: SmallTiles, curved: bool, whole: bool
) -> None:
    opened = open_checkpoint(case.source)
    sets = ("base.scale=curvature",) if curved else ()
    sets += (COLUMNS, "ortho.share=true") if whole else ()
    events: list[Event] = []
    one, many = (
        budget.survey(case.plan(*sets, curved=curved, sizes=sizes), opened, on_event=events.append)
        for sizes in (DEFAULT_SIZES, small_tiles)
    )
    small_tiles.prove("split")
    assert digest_of([many]) == digest_of([one])
    assert sum(isinstance(event, Advanced) for event in events) > 3 * len(one.counts)


@pytest.mark.parametrize("alpha", ["0", "0.3", "1"])
@pytest.mark.parametrize("sets", [(), (COMPACT,), (COLUMNS, "ortho.values=int8")])
def test_any_tiles_same_bytes_of_convert(
    case: Case, small_tiles: SmallTiles, ortho: Ortho, alpha: str, sets: tuple[str, ...]
) -> None:
    made, out = case.place / "made", case.place
    decompose(
        case.plan(*sets, curved=False, sizes=DEFAULT_SIZES), open_checkpoint(case.source), made
    )
    run = partial(ortho, "convert", made, "--alpha", alpha, "-q", "-o")
    assert run(out / "one").code == 0
    with small_tiles.in_commands():
        assert run(out / "many").code == 0
    small_tiles.prove("convert", *(["values"] if sets and alpha != "0" else []))
    assert files(out / "many") == files(out / "one")


def test_any_tiles_same_bytes_of_convert_from_a_checkpoint(
    pico: Path, tmp_path: Path, small_tiles: SmallTiles, ortho: Ortho
) -> None:
    for more in ((), ("--dtype", "float32")):
        run = partial(ortho, "convert", pico, "-q", "--force", *more, "-o")
        assert run(tmp_path / "one").code == 0
        with small_tiles.in_commands():
            assert run(tmp_path / "many").code == 0
        small_tiles.prove("convert")
        assert files(tmp_path / "many") == files(tmp_path / "one")


@pytest.mark.parametrize(
    "sets",
    [(), (COMPACT,), ("base.scale=mse", "base.bits=3"), (COLUMNS,), (COLUMNS, "ortho.values=int8")],
)
def test_any_tiles_same_findings_of_inspect(
    case: Case, small_tiles: SmallTiles, sets: tuple[str, ...]
) -> None:
    source, out = open_checkpoint(case.source), case.place / "out"
    plan = case.plan(*sets, curved=False, sizes=DEFAULT_SIZES)
    decompose(plan, source, out)
    one, many = (
        check_values(open_artifact(out), source, plan.recipe.canonical(), sizes=sizes)
        for sizes in (DEFAULT_SIZES, small_tiles)
    )
    small_tiles.prove("check", *(["values"] if {COMPACT, "ortho.values=int8"} & set(sets) else []))
    assert many == pytest.approx(one)


@pytest.mark.parametrize("scale", ["absmax", "mse", "curvature"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_tiles_same_bytes_of_a_module_saved(
    tmp_path: Path, small_tiles: SmallTiles, scale: str, dtype: torch.dtype
) -> None:
    for name, sizes in (("one", DEFAULT_SIZES), ("many", small_tiles)):
        engine = Engine(Net().to(dtype), sizes=sizes)
        reasons = engine.convert()
        generator = torch.Generator().manual_seed(1)
        curvature = None
        if scale == "curvature":
            shapes = {n: engine.module.get_submodule(n).weight.shape for n in reasons}
            curvature = {
                f"{n}.weight": torch.rand(shapes[n], generator=generator) for n in sorted(shapes)
            }
        engine.decompose(density=0.03, scale=scale, curvature=curvature)
        engine.save(tmp_path / name)
    small_tiles.prove("in_memory")
    assert files(tmp_path / "many") == files(tmp_path / "one")
    assert load_file(tmp_path / "many" / "ortho.safetensors")
