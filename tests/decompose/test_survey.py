"""What a global budget will keep is shown before the run, and surveyed once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from conftest import Ortho
from jobs import SERVER, decompose
from safetensors.torch import load_file, save_file

from ortho_cli.decompose import budget, recipe
from ortho_cli.decompose.plan import Plan, make_plan
from ortho_cli.decompose.survey import SURVEY_FILE, load_surveys
from ortho_cli.errors import CheckpointError, Interrupted
from ortho_cli.events import Advanced, Event, Started, TensorDone
from ortho_cli.formats.statistics import open_statistics
from ortho_cli.storage import job
from ortho_cli.storage.checkpoint import metadata_of, open_checkpoint, read_shard
from ortho_cli.storage.work_folder import work_folder
from tests.split.test_numba_kernel import files

SERVER.set_forkserver_preload(
    ["ortho_cli.decompose.job", "ortho_cli.decompose.budget", "ortho_cli.decompose.recipe"]
)
GLOBAL = ("ortho.budget=global", "ortho.density=0.02")


def words(*sets: str) -> list[str]:
    return [word for one in sets for word in ("--set", one)]


@pytest.fixture
def stats(pico: Path, tmp_path: Path) -> Path:
    """Statistics by which one layer counts for more than the other."""

    def differ(stored: dict[str, torch.Tensor]) -> None:
        for name, tensor in stored.items():
            if "layers.1." in name:
                tensor.mul_(30)

    checkpoints.save_statistics(tmp_path / "stats.safetensors", pico, change=differ)
    return tmp_path / "stats.safetensors"


def plan_of(source: Path, stats: Path | None, *sets: str) -> Plan:
    found = open_statistics(stats) if stats else None
    return make_plan(open_checkpoint(source), recipe.load_recipe(None, sets), statistics=found)


def run(source: Path, stats: Path | None, out: Path, target: float | None, **options: Any) -> None:
    """Decompose with a global budget, or for a size."""
    opened = open_checkpoint(source)
    if target is None:
        plan = plan_of(source, stats, *GLOBAL)
    else:
        told = {"on_event": options["on_event"]} if "on_event" in options else {}
        asked = plan_of(source, stats, "base.group_size=auto")
        plan = budget.meet(asked, opened, target, known=load_surveys(out), **told)
    decompose(plan, opened, out, **options)


def run_and_die(source: Path, stats: Path | None, out: Path, target: float | None, at: int) -> None:
    """Be killed when so many tensors are split; nothing of them is in the journal yet."""
    done = 0

    def watch(event: Event) -> None:
        nonlocal done
        left_survey = (work_folder(out) / "private" / SURVEY_FILE).exists()
        done += isinstance(event, TensorDone)
        time.sleep(0.02)  # what was finished before is in the journal by then
        if left_survey and isinstance(event, Started | TensorDone) and done >= at:
            os.kill(os.getpid(), signal.SIGKILL)

    job.COMMIT_SECONDS = 0.0
    run(source, stats, out, target, on_event=watch)


def kill(*arguments: Any) -> None:
    process = SERVER.Process(target=run_and_die, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize(
    "sets", [GLOBAL, (*GLOBAL, "ortho.layout=compact"), (*GLOBAL, "base.scale=curvature")]
)
def test_dry_run_and_inspect_show_the_plan_that_is_carried_out(
    pico: Path, stats: Path, ortho: Ortho, sets: tuple[str, ...]
) -> None:
    before = sorted(pico.parent.rglob("*"))
    more = ("--stats", stats, *words(*sets), "--json")
    dry = ortho("decompose", pico, "--dry-run", *more)
    seen = ortho("inspect", pico, *more)
    for told in (dry, seen):
        assert told.code == 0, told.err
        assert "every weight is read once" in told.err
        assert told.json["plan_sha256"] == dry.json["plan_sha256"]
        assert told.json["tensors"] == dry.json["tensors"]
    assert sorted(pico.parent.rglob("*")) == before
    out = pico.parent / "out"
    done = ortho("decompose", pico, "-o", out, *more)
    assert done.code == 0, done.err
    for file in ("model", "ortho"):
        metadata = metadata_of(out / f"{file}.safetensors")
        assert metadata["plan_sha256"] == dry.json["plan_sha256"]
    kept = {told["name"]: told["nnz"] for told in done.json["tensors"] if told["action"] == "split"}
    planned = {told["name"]: told for told in dry.json["tensors"] if told["action"] == "split"}
    assert {name: told["k"] for name, told in planned.items()} == kept
    assert len({told["density"] for told in planned.values()}) > 3
    for part in ("base", "ortho") if "compact" not in str(sets) else ("base",):
        file = out / ("model.safetensors" if part == "base" else "ortho.safetensors")
        written = {t.name: (t.offset, t.nbytes) for t in read_shard(file).tensors}
        for told in dry.json["tensors"]:
            for key, region in told[part].items():
                assert written[key] == (region["offset"], region["nbytes"]), key


def test_dry_run_is_quiet_where_it_is_told_to(pico: Path, stats: Path, ortho: Ortho) -> None:
    told = ortho("decompose", pico, "--dry-run", "--stats", stats, *words(*GLOBAL), "-q", "--json")
    assert told.err == ""
    assert told.json["plan_sha256"]


@pytest.mark.parametrize("target", [None, 5.6])
@pytest.mark.parametrize("at", [0, 5])
def test_resumed_run_does_not_survey_again(
    pico: Path, stats: Path, monkeypatch: pytest.MonkeyPatch, target: float | None, at: int
) -> None:
    out = pico.parent / "out"
    run(pico, stats, pico.parent / "whole", target)
    kill(pico, stats, out, target, at)
    monkeypatch.setattr(budget, "survey", refuse)
    events: list[Event] = []
    run(pico, stats, out, target, on_event=events.append)
    (started,) = [event for event in events if isinstance(event, Started)]
    read = sum(event.nbytes for event in events if isinstance(event, Advanced))
    assert read == started.bytes_total - started.bytes_done
    assert (started.resumed > 0) == (at > 0)
    assert files(out) == files(pico.parent / "whole")
    assert not work_folder(out).exists()


def refuse(*arguments: Any, **options: Any) -> Any:
    raise AssertionError("surveyed again")


def test_commands_take_up_the_survey_that_a_killed_run_left(
    pico: Path, stats: Path, ortho: Ortho, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, plain = pico.parent / "out", pico.parent / "plain.yaml"
    plain.write_text("version: 1\n")  # as the killed run: without a recipe it is curvature
    more = ("--recipe", plain, "--stats", stats, *words(*GLOBAL), "--json")
    fresh = ortho("decompose", pico, "--dry-run", "-o", out, *more).json
    kill(pico, stats, out, None, 3)
    monkeypatch.setattr(budget, "survey", refuse)
    dry = ortho("decompose", pico, "--dry-run", "-o", out, *more)
    assert dry.json == fresh | {"totals": dry.json["totals"]}
    assert "every weight is read once" not in dry.err
    ran = ortho("decompose", pico, "-o", out, *more)
    assert ran.code == 0, ran.err
    assert "tensors were finished before" in ran.err


def test_interrupted_run_keeps_its_survey_and_says_how_to_go_on(pico: Path, stats: Path) -> None:
    out = pico.parent / "out"

    def stop(event: Event) -> None:
        if isinstance(event, Started) and work_folder(out).exists():
            raise KeyboardInterrupt

    with pytest.raises(Interrupted) as caught:
        run(pico, stats, out, None, on_event=stop)
    assert "go on from there" in str(caught.value.hint)
    assert len(load_surveys(out)) == 1
    path = work_folder(out) / "private" / SURVEY_FILE
    assert path.stat().st_mode & 0o777 == 0o600


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def count_more(path: Path) -> None:
    """Move weights of the first tensor to another bin: sums stay what they were."""
    told = json.loads(path.read_bytes())
    first = next(iter(told[0]["tensors"].values()))
    first["bins"][-1] += 40
    path.write_text(json.dumps(told, separators=(",", ":")))


def be_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def be_foreign(path: Path) -> None:
    """Come from work on another model."""
    shutil.copyfile(path.parents[2] / "foreign.json", path)


CHANGES: list[Callable[[Path], Any]] = [
    cut,
    count_more,
    be_a_folder,
    be_foreign,
    Path.unlink,
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(b"[" * 100_000),
    lambda path: path.write_bytes(b"{}"),
]


@pytest.mark.parametrize("change", CHANGES)
def test_survey_that_is_not_this_works_own_is_made_again(
    pico: Path, stats: Path, change: Callable[[Path], Any]
) -> None:
    out, path = pico.parent / "out", pico.parent / ".out.ortho" / "private" / SURVEY_FILE
    if change is be_foreign:
        other = pico.parent / "other"
        checkpoints.save(other, checkpoints.weights(hidden=64, mlp=192, layers=2, vocab=96, seed=5))
        checkpoints.save_statistics(pico.parent / "s", other)
        kill(other, pico.parent / "s", out, None, 0)
        path.rename(pico.parent / "foreign.json")
        shutil.rmtree(work_folder(out))
    run(pico, stats, pico.parent / "whole", None)
    kill(pico, stats, out, None, 3)
    assert load_surveys(out)
    change(path)
    assert not load_surveys(out)
    if path.is_dir():
        path.rmdir()
    events: list[Event] = []
    run(pico, stats, out, None, on_event=events.append)
    surveyed, started = [event for event in events if isinstance(event, Started)]
    assert surveyed.resumed == 0
    assert started.resumed > 0
    assert files(out) == files(pico.parent / "whole")


def test_survey_of_a_source_that_only_looks_the_same_is_found_out(tmp_path: Path) -> None:
    """Times and sizes of files from an archive are all alike."""
    source, out = tmp_path / "m.safetensors", tmp_path / "out"
    generator = torch.Generator().manual_seed(0)
    first = {f"{n}.weight": torch.randn(64, 128, generator=generator) for n in "abc"}
    save_file(first, source)
    before = source.stat()
    kill(source, None, out, 5.6, 0)
    assert load_surveys(out)
    save_file({name: weight.exp() for name, weight in load_file(source).items()}, source)
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(CheckpointError, match="when weights were surveyed"):
        run(source, None, out, 5.6)
    assert not work_folder(out).exists()
    run(source, None, out, 5.6)
    run(source, None, tmp_path / "whole", 5.6)
    assert files(out) == files(tmp_path / "whole")
