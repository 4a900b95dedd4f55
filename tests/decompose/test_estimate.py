"""Seconds of a split: in proportion to weights, steps and blocks; timed by what would do it."""

from __future__ import annotations

from pathlib import Path

import checkpoints
import pytest
from conftest import PICO, Ortho

from ortho_cli.cli.shared import computes_here
from ortho_cli.decompose import estimate
from ortho_cli.decompose.plan import make_plan
from ortho_cli.decompose.recipe import load_recipe
from ortho_cli.formats.statistics import open_statistics
from ortho_cli.storage.checkpoint import open_checkpoint
from ortho_cli.storage.speeds import open_speeds

TUNED = ("base.rounding=tuned", "saliency.kind=curvature", "base.scale=curvature")
SMALL_TUNE = ("tune.samples=8", "tune.batch=4", "tune.length=256")


def parts(
    folder: Path, *sets: str, stats: Path | None = None, workers: int = 1
) -> dict[str, tuple[float, float]]:
    checkpoint = open_checkpoint(folder)
    statistics = open_statistics(stats) if stats else None
    settings = load_recipe(None, list(sets))
    plan = make_plan(checkpoint, settings, statistics=statistics, workers=workers)
    found = estimate.of_plan(plan, checkpoint.tensors, open_speeds())
    return {part.name: (part.seconds, part.at_most) for part in found}


def grams(folder: Path) -> Path:
    path = folder.parent / f"{folder.name}.stats"
    checkpoints.save_statistics(path, folder, gram="none")
    return path


def test_a_split_takes_time_by_its_weights_and_workers_and_a_survey_as_much(pico: Path) -> None:
    checkpoints.save(pico.parent / "four", checkpoints.weights(**(PICO | {"layers": 4})))
    once, twice = (parts(folder)["split"][0] for folder in (pico, pico.parent / "four"))
    files = parts(pico, workers=1 << 30)["split"][0]  # all else is shared by the workers
    assert twice == pytest.approx(2 * once, rel=0.1)
    assert parts(pico, workers=2)["split"][0] - files == pytest.approx((once - files) / 2)
    checkpoints.save_statistics(pico.parent / "inputs", pico, kind="gram")
    sets = ("ortho.budget=global", "saliency.kind=curvature")
    surveyed = parts(pico, *sets, stats=pico.parent / "inputs")
    assert list(surveyed) == ["start", "survey", "split"]
    assert surveyed["survey"] == surveyed["split"]


def test_each_step_sequence_and_block_of_tuning_takes_its_time(pico: Path) -> None:
    four = pico.parent / "four"
    checkpoints.save(four, checkpoints.weights(**(PICO | {"layers": 4})))
    stats = {folder: grams(folder) for folder in (pico, four)}

    def tune(folder: Path, *sets: str) -> tuple[float, float]:
        found = parts(folder, *TUNED, *SMALL_TUNE, *sets, stats=stats[folder])
        assert list(found) == ["start", "tune", "split"]
        return found["tune"]

    none, ten, twenty = (tune(pico, f"tune.steps={count}")[0] for count in (1, 11, 21))
    assert twenty - none == pytest.approx(2 * (ten - none))
    assert ten > 1.5 * none
    usual, most = tune(pico, "tune.steps=100")
    assert usual < most < 2 * usual
    more = tune(four, "tune.steps=100")[0]
    assert more == pytest.approx(2 * usual, rel=0.1)
    assert tune(pico, "tune.steps=1", "tune.samples=80")[0] > 5 * none


@pytest.mark.parametrize(
    ("sets", "kind"),
    [
        ((), None),
        (("base.scale=mse", "base.alone=true"), None),
        (("base.bits=3",), None),
        (("base.scale=curvature", "saliency.kind=curvature"), "fisher"),
        (("base.scale=curvature", "saliency.kind=curvature"), "gram"),
        (("base.rounding=gptq", "saliency.kind=curvature", "ortho.budget=global"), "gptq"),
    ],
)
def test_what_would_split_is_timed_once(
    real_speeds: Path, pico: Path, sets: tuple[str, ...], kind: str | None
) -> None:
    stats = pico.parent / "stats"
    if kind == "gptq":
        checkpoints.save_statistics(stats, pico, gram="none")
    elif kind:
        checkpoints.save_statistics(stats, pico, kind=kind)
    first = parts(pico, *sets, stats=stats if kind else None)
    assert all(seconds > 0 for seconds, _ in first.values())
    files = {file: file.read_bytes() for file in real_speeds.iterdir()}
    assert parts(pico, *sets, stats=stats if kind else None) == first
    assert {file: file.read_bytes() for file in real_speeds.iterdir()} == files


def test_dry_run_has_the_figure_and_the_words_and_inspect_times_nothing(
    ortho: Ortho, pico: Path
) -> None:
    ran = ortho("decompose", pico, "--dry-run", "--json")
    assert list(ran.json["estimate"]["parts"]) == ["start", "split"]
    assert ran.json["estimate"]["seconds"] == ran.json["estimate"]["at_most_seconds"]
    assert "about a second on this machine: " in ortho("decompose", pico, "--dry-run").out
    assert "estimate" not in ortho("inspect", pico, "--json").json
    assert "on this machine" not in ortho("inspect", pico).out


@pytest.mark.parametrize(
    ("device", "build", "is_here"),
    [
        ("cpu", "2.13.0", True),
        ("cuda:1", "2.13.0+cpu", False),
        ("auto", "2.13.0+cpu", True),
        ("auto", "2.13.0", not Path("/dev/nvidiactl").exists()),
    ],
)
def test_nothing_is_said_of_a_gpu(
    device: str, build: str, is_here: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: build)
    assert computes_here(device) == is_here
