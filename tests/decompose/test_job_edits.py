"""Edits that an editor finds: in base exactly there, in ortho whatever they cost, and resumed."""

from __future__ import annotations

import os
import signal
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import reference
import torch
from conftest import SmallTiles
from jobs import SERVER, decompose
from safetensors.torch import load_file
from torch import Tensor

from ortho_cli.decompose import job as work
from ortho_cli.decompose import recipe
from ortho_cli.decompose.edits import Edit, Edits, count, load_edits
from ortho_cli.decompose.plan import Plan, make_plan
from ortho_cli.errors import (
    ArtifactError,
    CalibrationError,
    InternalError,
    Interrupted,
    OutputExistsError,
    RecipeError,
)
from ortho_cli.events import Event, EventSink, TensorDone
from ortho_cli.formats.open_artifact import open_artifact
from ortho_cli.formats.statistics import StatisticsReader, open_statistics
from ortho_cli.formats.verify import verify
from ortho_cli.split import pipeline
from ortho_cli.split import quantize as ops
from ortho_cli.split.select import TopK
from ortho_cli.split.sizes import DEFAULT_SIZES, Sizes
from ortho_cli.split.torch_kernel import TorchKernel
from ortho_cli.storage import job
from ortho_cli.storage.checkpoint import open_checkpoint
from ortho_cli.storage.work_folder import work_folder

SERVER.set_forkserver_preload(["ortho_cli.decompose.job", "ortho_cli.decompose.recipe"])
DENSITY = 0.02


def draw_edits(plan: Plan, share: float = 0.25, *, seed: int = 0) -> dict[str, Edit]:
    """Move that share of each tensor's k anywhere in it, to any code."""
    draw = np.random.default_rng(seed)
    found = {}
    for tensor in plan.split:
        many = int(share * tensor.k)
        places = draw.choice(tensor.source.numel, size=many, replace=False).astype(np.int64)
        low, high = ops.code_range(tensor.bits)
        codes = draw.integers(low, high + 1, size=many).astype(np.int8)
        found[tensor.name] = Edit(positions=np.sort(places), codes=codes)
    return found


@dataclass
class Fake:
    """An editor that counts how often it is asked, by a file: processes die in these tests."""

    edits: Edits
    count: Path
    identity: Any = "one"
    meanwhile: Callable[[Path], None] = lambda folder: None
    folders: list[Path] = field(default_factory=list)

    def find(
        self, folder: Path, *, curvature: StatisticsReader, key: Any, on_event: EventSink
    ) -> Edits:
        self.folders.append(folder)
        with self.count.open("a") as file:
            file.write("asked\n")
        self.meanwhile(folder)
        return self.edits

    @property
    def asked(self) -> int:
        return len(self.count.read_text().splitlines()) if self.count.exists() else 0


@dataclass
class Case:
    """A pico model with statistics, and its plan."""

    source: Path
    stats: Path

    @property
    def place(self) -> Path:
        return self.source.parent

    def plan(self, *sets: str, workers: int = 1, sizes: Sizes = DEFAULT_SIZES) -> Plan:
        return make_plan(
            open_checkpoint(self.source),
            recipe.load_recipe(None, ["ortho.split=isolate", f"ortho.density={DENSITY}", *sets]),
            statistics=open_statistics(self.stats),
            workers=workers,
            sizes=sizes,
        )

    def fake(self, share: float = 0.25, **options: Any) -> Fake:
        return Fake(draw_edits(self.plan(), share), self.place / "count", **options)

    def run(
        self,
        editor: Fake,
        *sets: str,
        workers: int = 1,
        sizes: Sizes = DEFAULT_SIZES,
        **options: Any,
    ) -> dict[str, Any]:
        opened = open_checkpoint(self.source)
        out = options.pop("out", self.place / "out")
        plan = self.plan(*sets, workers=workers, sizes=sizes)
        return decompose(plan, opened, out, editor=editor, **options)


@pytest.fixture
def case(pico: Path) -> Case:
    stats = pico.parent / "stats.safetensors"
    checkpoints.save_statistics(stats, pico)
    return Case(pico, stats)


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_mode, path.read_bytes())
        for path in files
    }


def streams(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return load_file(folder / "model.safetensors"), load_file(folder / "ortho.safetensors")


def check_streams(case: Case, edits: Edits, tensors: dict[str, Tensor]) -> None:
    """Hold base and ortho of `out` to a run without an editor and to the slow twin."""
    plain = make_plan(
        open_checkpoint(case.source),
        recipe.load_recipe(None, [f"ortho.density={DENSITY}"]),
        statistics=open_statistics(case.stats),
    )
    decompose(plain, open_checkpoint(case.source), case.place / "plain")
    base, ortho = streams(case.place / "out")
    untouched, _ = streams(case.place / "plain")
    assert base.keys() == untouched.keys()
    curvature = checkpoints.save_statistics(case.place / "again.safetensors", case.source)
    for name, weight in tensors.items():
        if name not in curvature:
            assert torch.equal(base[name], untouched[name])
            continue
        module, edit = name.removesuffix(".weight"), edits.get(name, NOTHING)
        k = round(DENSITY * weight.numel())
        assert torch.equal(base[f"{module}.weight_scale"], untouched[f"{module}.weight_scale"])
        codes = ops.unpack_int4(untouched[f"{module}.weight_packed"])
        codes.view(-1)[torch.from_numpy(edit.positions)] = torch.from_numpy(edit.codes)
        assert torch.equal(ops.unpack_int4(base[f"{module}.weight_packed"]), codes)
        approximation = reference.dequantize(codes, base[f"{module}.weight_scale"])
        indices = reference.forced_indices(
            weight.float() - approximation, curvature[name], edit.positions.tolist(), k
        )
        crow, columns = reference.csr(indices, tuple(weight.shape))
        assert len(indices) == k
        assert ortho[f"{module}.crow_indices"].tolist() == crow
        assert ortho[f"{module}.col_indices"].tolist() == columns
        assert torch.equal(ortho[f"{module}.values"], weight.flatten()[indices])


NOTHING = Edit(positions=np.empty(0, np.int64), codes=np.empty(0, np.int8))


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_edits_are_in_base_there_alone_and_in_ortho_first(
    case: Case, pico_tensors: dict[str, Tensor], share: float
) -> None:
    editor = case.fake(share)
    report = case.run(editor)
    check_streams(case, editor.edits, pico_tensors)
    assert report["totals"]["moved"] == count(editor.edits)
    assert verify(open_artifact(case.place / "out")).checked


def test_edits_of_some_tensors_leave_the_others_alone(
    case: Case, pico_tensors: dict[str, Tensor]
) -> None:
    editor = case.fake()
    names = sorted(editor.edits)
    editor.edits = {name: editor.edits[name] for name in names[::3]}
    case.run(editor)
    check_streams(case, editor.edits, pico_tensors)


def test_edits_in_many_tiles_are_where_they_are_in_one(
    case: Case, pico_tensors: dict[str, Tensor], small_tiles: SmallTiles
) -> None:
    editor = case.fake(0.5)
    case.run(editor, sizes=small_tiles)
    small_tiles.prove("split", "check")
    check_streams(case, editor.edits, pico_tensors)


def test_figures_count_what_is_kept_for_forgetting(
    case: Case, pico_tensors: dict[str, Tensor]
) -> None:
    report = case.run(case.fake(0.5))
    base, ortho = streams(case.place / "out")
    noise = kept = 0.0
    for entry in report["tensors"]:
        module = entry["name"].removesuffix(".weight")
        if f"{module}.weight_packed" not in base:
            continue
        weight = pico_tensors[entry["name"]]
        residual = (weight.float() - reference.dense(base, {}, module, 0.0)).double().square()
        left = weight.float() - reference.dense(base, ortho, module, 1.0)
        noise += residual.sum().item()
        kept += (residual.sum() - left.double().square().sum()).item()
    assert report["totals"]["residual_kept"] == pytest.approx(kept / noise, rel=1e-5)


def test_edits_same_bytes_for_any_workers(case: Case) -> None:
    for workers in (1, 2):
        case.run(case.fake(), workers=workers, out=case.place / f"out{workers}")
    assert contents(case.place / "out1") == contents(case.place / "out2")


def test_edits_lie_private_in_the_hidden_folder_and_are_gone_at_the_end(case: Case) -> None:
    editor, seen = case.fake(), []
    path = work_folder(case.place / "out") / "private" / work.EDITS_FILE

    def watch(event: Event) -> None:
        if isinstance(event, TensorDone):
            seen.append((path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777))

    before = os.umask(0)
    try:
        case.run(editor, on_event=watch)
    finally:
        os.umask(before)
    assert set(seen) == {(0o600, 0o700)}
    assert editor.folders == [path.parent]
    assert not work_folder(case.place / "out").exists()
    assert not list(case.place.rglob("*.npz"))
    assert stat.S_IMODE((case.place / "out" / "ortho.safetensors").stat().st_mode) == 0o600


def run_and_die(case: Case, moment: str) -> None:
    """Split with the fake editor, and SIGKILL this process at a moment."""
    job.COMMIT_SECONDS = 0.0

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    seen = 0

    def watch(event: Event) -> None:
        nonlocal seen
        seen += isinstance(event, TensorDone)
        if moment == f"tensor {seen}":
            die()

    editor = case.fake()
    if moment == "find":
        editor.meanwhile = die
    if moment == "save":
        work.save_edits = die
    case.run(editor, on_event=watch)


@pytest.mark.parametrize(
    ("moment", "asked"), [("find", 2), ("save", 2), ("tensor 1", 1), ("tensor 15", 1)]
)
def test_killed_run_is_not_asked_again_for_edits_it_found(
    case: Case, moment: str, asked: int
) -> None:
    process = SERVER.Process(target=run_and_die, args=(case, moment))
    process.start()
    process.join(600)  # a busy machine is no fault of the code
    assert process.exitcode == -signal.SIGKILL
    assert not (case.place / "out").exists()
    editor = case.fake()
    assert editor.asked == 1
    case.run(editor)
    assert editor.asked == asked
    case.run(case.fake(), out=case.place / "whole")
    assert contents(case.place / "out") == contents(case.place / "whole")
    assert not work_folder(case.place / "out").exists()


def test_interrupt_after_find_keeps_the_edits_and_says_how_to_go_on(case: Case) -> None:
    def stop(event: Event) -> None:
        if isinstance(event, TensorDone):
            raise KeyboardInterrupt

    with pytest.raises(Interrupted) as caught:
        case.run(case.fake(), on_event=stop)
    assert "repeat the same command" in str(caught.value.hint)
    kept = load_edits(work_folder(case.place / "out") / "private" / work.EDITS_FILE)
    assert kept is not None
    assert count(kept) == count(case.fake().edits)
    editor = case.fake()
    case.run(editor)
    assert editor.asked == 1


def test_interrupt_in_find_leaves_nothing_where_nothing_is_of_use(case: Case) -> None:
    def stop(folder: Path) -> None:
        raise KeyboardInterrupt

    before = sorted(case.place.rglob("*"))
    editor = case.fake(meanwhile=stop)
    with pytest.raises(Interrupted) as caught:
        case.run(editor)
    assert "nothing is left behind" in str(caught.value.hint)
    editor.count.unlink()
    assert sorted(case.place.rglob("*")) == before


def test_interrupt_in_find_keeps_what_it_has_put_down(case: Case) -> None:
    def stop(folder: Path) -> None:
        (folder / "state").write_text("half of it")
        raise KeyboardInterrupt

    with pytest.raises(Interrupted) as caught:
        case.run(case.fake(meanwhile=stop))
    assert "repeat the same command" in str(caught.value.hint)
    found: list[str] = []
    case.run(case.fake(meanwhile=lambda folder: found.append((folder / "state").read_text())))
    assert found == ["half of it"]


@pytest.mark.parametrize("error", [CalibrationError("nothing to forget"), RecipeError("too long")])
def test_error_in_find_leaves_nothing_behind(case: Case, error: Exception) -> None:
    def fail(folder: Path) -> None:
        raise error

    before = sorted(case.place.rglob("*"))
    editor = case.fake(meanwhile=fail)
    with pytest.raises(type(error), match=str(error)):
        case.run(editor)
    editor.count.unlink()
    assert sorted(case.place.rglob("*")) == before


def test_work_of_another_forget_file_is_refused_without_force(case: Case) -> None:
    def stop(event: Event) -> None:
        if isinstance(event, TensorDone):
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        case.run(case.fake(), on_event=stop)
    other = case.fake(identity="two")
    other.edits = draw_edits(case.plan(), seed=1)
    with pytest.raises(OutputExistsError, match="another run"):
        case.run(other)
    assert other.asked == 1
    case.run(other, force=True)
    assert other.asked == 2
    plain = Fake(other.edits, case.place / "count2")
    case.run(plain, out=case.place / "whole")
    assert contents(case.place / "out") == contents(case.place / "whole")


def test_more_edits_than_ortho_can_hold_is_a_bug_that_is_told(case: Case) -> None:
    editor = case.fake(1.0)
    name = sorted(editor.edits)[3]
    k = {tensor.name: tensor.k for tensor in case.plan().split}[name]
    edit = Edit(positions=np.arange(k + 1), codes=np.zeros(k + 1, np.int8))
    editor.edits = {**editor.edits, name: edit}
    with pytest.raises(InternalError, match=f"{name}.*{k + 1}.*{k}"):
        case.run(editor)
    assert not (case.place / "out").exists()
    assert not work_folder(case.place / "out").exists(), "they would be taken up again"


def edit(positions: list[int], codes: list[int]) -> Edit:
    return Edit(positions=np.array(positions, np.int64), codes=np.array(codes, np.int8))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (edit([1, 2], [0]), "2 positions and 1 codes"),
        (edit([2, 1], [0, 0]), "do not ascend inside its 4096"),
        (edit([1, 1], [0, 0]), "do not ascend inside its 4096"),
        (edit([-1, 1], [0, 0]), "do not ascend inside its 4096"),
        (edit([1, 4096], [0, 0]), "do not ascend inside its 4096"),
        (edit([1, 2], [0, 8]), "from 0 to 8, which 4 bits do not hold"),
        (edit([1, 2], [-9, 0]), "from -9 to 0, which 4 bits do not hold"),
    ],
)
def test_edits_that_would_be_passed_over_are_a_bug_that_is_told(
    case: Case, wrong: Edit, message: str
) -> None:
    editor = case.fake()
    name = next(name for name in sorted(editor.edits) if name.endswith("q_proj.weight"))
    editor.edits = {**editor.edits, name: wrong}
    with pytest.raises(InternalError, match=f"{name}.*{message}"):
        case.run(editor)
    assert not (case.place / "out").exists()


def test_edits_of_a_weight_that_is_not_split_are_a_bug_that_is_told(case: Case) -> None:
    editor = case.fake()
    editor.edits = {**editor.edits, "model.norm.weight": edit([0], [0])}
    with pytest.raises(InternalError, match=r"`model\.norm\.weight`, which is not split"):
        case.run(editor)
    assert not (case.place / "out").exists()


def forget_to_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the selection keep what saliency says, moved or not."""
    monkeypatch.setattr(TopK, "mark", lambda *_: None)


def forget_to_move(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let base keep the codes of rounding, though ortho has their places."""
    finish = TorchKernel.finish

    def plain(self: TorchKernel, task: Any, pending: Any, *rest: Any) -> Any:
        return finish(self, task, pending._replace(edit=None), *rest)

    monkeypatch.setattr(TorchKernel, "finish", plain)


@pytest.mark.parametrize("layout", ["csr", "compact"])
@pytest.mark.parametrize(
    ("sabotage", "message"),
    [
        (forget_to_keep, "ortho does not hold that place"),
        (forget_to_move, "base has [1-9][0-9]* as they were"),
    ],
)
def test_what_is_written_is_held_against_what_forgetting_moved(
    case: Case,
    monkeypatch: pytest.MonkeyPatch,
    sabotage: Callable[[pytest.MonkeyPatch], None],
    message: str,
    layout: str,
) -> None:
    sabotage(monkeypatch)
    with pytest.raises((InternalError, ArtifactError), match=message):
        case.run(case.fake(), f"ortho.layout={layout}")
    assert not (case.place / "out").exists()


def test_a_selection_of_fewer_than_the_plan_says_is_a_bug_that_is_told(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    split_weight = pipeline.split_weight

    def short(*arguments: Any) -> Any:
        found = split_weight(*arguments)
        return found._replace(indices=found.indices[1:], values=found.values[1:])

    monkeypatch.setattr(pipeline, "split_weight", short)
    with pytest.raises(InternalError, match=r"keeps \d+ positions and \d+ values, and the plan"):
        case.run(case.fake(0.0))
    assert not (case.place / "out").exists()


def test_recipe_that_forgets_is_nothing_without_an_editor(case: Case) -> None:
    with pytest.raises(RecipeError, match=r"ortho\.split is isolate"):
        decompose(case.plan(), open_checkpoint(case.source), case.place / "out")
    assert not (case.place / "out").exists()


@pytest.mark.parametrize(("density", "bits"), [(DENSITY, 4), (0.005, 4), (1.0, 4), (DENSITY, 3)])
def test_unlearn_gives_codes_back_where_saliency_would_not_keep_the_weight(
    case: Case,
    pico_tensors: dict[str, Tensor],
    density: float,
    bits: int,
) -> None:
    opened, found = open_checkpoint(case.source), open_statistics(case.stats)
    sets = ["ortho.split=unlearn", f"ortho.density={density}", f"base.bits={bits}"]
    plan = make_plan(opened, recipe.load_recipe(None, sets), statistics=found)
    # All of k is moved where there is little room: nothing is left for saliency.
    editor = Fake(draw_edits(plan, 1.0 if density == 0.005 else 0.25), case.place / "count")
    report = decompose(plan, opened, case.place / "out", editor=editor)
    base, ortho = streams(case.place / "out")
    curvature = checkpoints.save_statistics(case.place / "again.safetensors", case.source)
    kinds = set()
    error = 0.0
    for name, edit in editor.edits.items():
        module, weight = name.removesuffix(".weight"), pico_tensors[name]
        scales = base[f"{module}.weight_scale"]
        nearest = reference.quantize(weight.float(), scales, bits=bits)
        own = reference.dequantize(nearest, scales)
        saliency = (own - weight.float()).abs() * curvature[name].sqrt()
        crow = ortho[f"{module}.crow_indices"].long()
        rows = torch.arange(len(crow) - 1).repeat_interleave(crow.diff())
        flat = rows * weight.shape[1] + ortho[f"{module}.col_indices"].long()
        moved = torch.isin(flat, torch.from_numpy(edit.positions))
        at = saliency.view(-1)[flat]
        bar = at[~moved].min() if not bool(moved.all()) else torch.tensor(torch.inf)
        coded = moved & (at < bar)
        wanted = torch.where(coded, own.view(-1)[flat].to(weight.dtype), weight.view(-1)[flat])
        assert torch.equal(ortho[f"{module}.values"], wanted)
        kinds |= {(bool(m), bool(c)) for m, c in zip(moved.tolist(), coded.tolist(), strict=True)}
        full = dequantized(base, module, bits=bits)
        full.view(-1)[flat] = ortho[f"{module}.values"].float()
        error += float(((full - weight.float()).double() ** 2 * curvature[name]).sum())
    assert ((True, True) in kinds) == (density < 1.0)
    assert ((True, False) in kinds) == (density != 0.005)
    told = report["totals"]["curvature_error_alpha_1"]
    assert told == pytest.approx(error, rel=1e-5, abs=1e-12)


def dequantized(base: dict[str, Tensor], module: str, *, bits: int = 4) -> Tensor:
    codes = ops.unpack_codes(base[f"{module}.weight_packed"], bits=bits)
    return reference.dequantize(codes, base[f"{module}.weight_scale"])
