"""Real SIGKILLs and SIGINTs, in processes of their own, at chosen moments."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import checkpoints
import faults
import pytest
from conftest import PICO, Ortho, save_pico
from jobs import SERVER, decompose
from safetensors.torch import load_file, save_file

from ortho_cli.decompose import recipe
from ortho_cli.decompose.plan import make_plan
from ortho_cli.errors import Interrupted, NumericalError, OutputExistsError, ResourceError
from ortho_cli.events import Event, Finishing, TensorDone
from ortho_cli.storage import job
from ortho_cli.storage import work_folder as work_folders
from ortho_cli.storage.checkpoint import open_checkpoint
from ortho_cli.storage.work_folder import WorkFolder, work_folder

# The server imports torch once; each process then starts in milliseconds.
SERVER.set_forkserver_preload([*faults.HEAVY, "ortho_cli.decompose.recipe"])


def split(source: Path, out: Path, *sets: str, workers: int = 2, **options: Any) -> dict[str, Any]:
    opened = open_checkpoint(source)
    made = make_plan(opened, recipe.load_recipe(None, sets), workers=workers)
    return decompose(made, opened, out, **options)


def split_and_die(source: Path, out: Path, moment: str, **options: Any) -> None:
    """Decompose, committing after every tensor, and SIGKILL this process at a moment."""
    job.COMMIT_SECONDS = 0.0
    kind, _, number = moment.partition(" ")
    seen = 0

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def watch(event: Event) -> None:
        nonlocal seen
        seen += isinstance(event, TensorDone)
        if kind == "tensor" and seen == int(number):
            die()
        time.sleep(0.02)  # let the committing thread write what is finished
        if kind == "finishing" and isinstance(event, Finishing) and event.step == number:
            die()

    if kind == "rename":
        original, left = Path.rename, int(number)

        def rename(self: Path, target: Any) -> Path:
            nonlocal left
            if left == 0:
                die()
            left -= 1
            return original(self, target)

        Path.rename = rename  # type: ignore[method-assign]
    split(source, out, workers=1, on_event=watch, **options)


def run_and_die(source: Path, out: Path, moment: str, **options: Any) -> None:
    process = SERVER.Process(target=split_and_die, args=(source, out, moment), kwargs=options)
    process.start()
    process.join(600)  # a busy machine is no fault of the code
    assert process.exitcode == -signal.SIGKILL


Contents = dict[str, tuple[int, bytes]]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Contents:
    """What a run on the pico model that nothing interrupts writes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    split(save_pico(folder / "pico", checkpoints.weights(**PICO, kv=32)), folder / "out")
    return contents(folder / "out")


def contents(folder: Path) -> Contents:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_mode, path.read_bytes())
        for path in files
    }


MOMENTS = [
    *(f"tensor {number}" for number in (1, 2, 7, 14, 19)),
    "finishing digests",
    "finishing sync",
    "rename 0",  # base
    "rename 1",  # ortho
    "rename 2",  # the folder
]


@pytest.mark.parametrize("moment", MOMENTS)
def test_kill_at_any_moment_leaves_no_output_and_the_rerun_gives_the_same_bytes(
    pico: Path, tmp_path: Path, moment: str, undisturbed: Contents
) -> None:
    out = tmp_path / "out"
    run_and_die(pico, out, moment)
    assert not out.exists()
    assert not list(tmp_path.glob("[!.]*/ortho.safetensors"))
    split(pico, out)
    assert contents(out) == undisturbed
    assert not work_folder(out).exists()


@pytest.mark.parametrize("moment", ["tensor 5", "rename 2", "rename 3"])
def test_kill_while_replacing_loses_nothing(pico: Path, artifact: Path, moment: str) -> None:
    before = contents(artifact)
    run_and_die(pico, artifact, moment, force=True)
    kept = artifact if artifact.exists() else work_folder(artifact) / "previous"
    assert contents(kept) == before
    split(pico, artifact, force=True)
    assert contents(artifact) == before
    assert not work_folder(artifact).exists()


def test_failed_rename_puts_the_old_output_back(
    pico: Path, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, original = contents(artifact), Path.rename

    def rename(self: Path, target: Any) -> Path:
        if self.name == "artifact":
            raise OSError(5, "Input/output error")
        return original(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="Input/output"):
        split(pico, artifact, force=True)
    assert contents(artifact) == before
    monkeypatch.undo()
    split(pico, artifact, force=True)
    assert contents(artifact) == before


@pytest.mark.parametrize("force", [False, True])
def test_output_that_appears_during_the_run_is_kept(
    pico: Path, tmp_path: Path, undisturbed: Contents, force: bool
) -> None:
    out = tmp_path / "out"

    def appear(event: Event) -> None:
        if isinstance(event, Finishing) and not out.exists():
            out.mkdir()
            (out / "thesis.tex").write_text("precious")

    with pytest.raises(OutputExistsError, match="has appeared"):
        split(pico, out, on_event=appear, force=force)
    assert (out / "thesis.tex").read_text() == "precious"
    (out / "thesis.tex").unlink()
    split(pico, out)
    assert contents(out) == undisturbed


def test_what_a_kill_left_of_the_old_output_outlives_a_source_that_is_no_good(
    pico: Path, artifact: Path
) -> None:
    before = contents(artifact)
    run_and_die(pico, artifact, "rename 3", force=True)
    previous = work_folder(artifact) / "previous"
    shutil.copytree(previous, artifact)  # somebody put it back by hand
    weights = load_file(pico / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, pico / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericalError):
        split(pico, artifact, force=True)
    assert contents(previous) == contents(artifact) == before


def test_resume_from_a_source_that_only_looks_the_same_mixes_nothing(
    pico: Path, tmp_path: Path
) -> None:
    """Files of an image or archive may all bear one time, and models of one shape one size."""
    source, out = pico / "model.safetensors", tmp_path / "out"
    run_and_die(pico, out, "tensor 9")
    before = source.stat()
    checkpoints.save(pico, checkpoints.weights(**PICO, kv=32, seed=1))
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert source.stat().st_size == before.st_size
    split(pico, out)
    split(pico, tmp_path / "reference")
    assert contents(out) == contents(tmp_path / "reference")


def test_read_error_names_the_file_and_keeps_the_work(
    pico: Path, tmp_path: Path, undisturbed: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "COMMIT_SECONDS", 0.0)
    real, out, seen = os.preadv, tmp_path / "out", 0

    def count(event: Event) -> None:
        nonlocal seen
        seen += isinstance(event, TensorDone)

    def preadv(fd: int, buffers: Any, offset: int) -> int:
        if seen == 7:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(ResourceError, match=r"cannot read .* at byte \d+: input/output error"):
        split(pico, out, workers=1, on_event=count)
    assert (work_folder(out) / "journal").read_text().count("\n") > 1
    monkeypatch.undo()
    split(pico, out)
    assert contents(out) == undisturbed


def test_faults_at_random_moments_lose_nothing(tmp_path: Path) -> None:
    """A few runs of the matrix that `make faults` runs whole."""
    kind = faults.prepare("decompose", tmp_path / "kind")
    for number, name in enumerate(("kill -9", "SIGTERM", "file size limit", "two at once")):
        scene = faults.Scene(kind, tmp_path / name, random.Random(number), forced=number % 2 == 1)
        _, wrong = faults.meet(faults.FAULTS[name], scene)
        assert wrong == []


def test_side_file_removed_between_kill_and_rerun_is_not_in_the_output(
    pico: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run_and_die(pico, out, "rename 0")
    (pico / "additional_chat_templates" / "tools.jinja").unlink()
    split(pico, out)
    assert not (out / "additional_chat_templates").exists()


def test_commit_syncs_data_before_the_line_that_speaks_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill cannot show this, a power cut would."""
    order: list[tuple[str, int]] = []
    with WorkFolder(tmp_path / "out", identity={"files": {"a": 8}}, force=False) as folder:
        journal = folder.folder / "journal"
        data = folder.open_data("a", size=8, mode=0o644)

        def sync(fd: int) -> bool:
            order.append(("data" if fd == data else "journal", journal.stat().st_size))
            return True

        monkeypatch.setattr(work_folders, "sync", sync)
        before = journal.stat().st_size
        folder.commit([{"name": "x"}])
        after = journal.stat().st_size
    assert order == [("data", before), ("journal", after)]
    assert after > before


def test_lock_of_a_folder_that_was_taken_away_is_no_lock(tmp_path: Path) -> None:
    identity = {"plan": "x", "files": {}}
    first = WorkFolder(tmp_path / "out", identity=identity, force=False)
    with first:
        shutil.rmtree(first.folder)
        with WorkFolder(tmp_path / "out", identity=identity, force=False) as second:
            assert second.folder.exists()


def test_kill_after_publishing_leaves_a_folder_that_the_next_run_clears(
    pico: Path, artifact: Path
) -> None:
    work_folder(artifact).mkdir()
    (work_folder(artifact) / "journal").write_text("stale")
    with pytest.raises(OutputExistsError, match="exists"):
        split(pico, artifact)
    assert not work_folder(artifact).exists()


def test_resume_repeats_no_finished_tensor(pico: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_and_die(pico, out, "tensor 7")
    again: list[str] = []
    split(pico, out, on_event=lambda e: again.append(e.name) if isinstance(e, TensorDone) else None)
    assert 0 < len(again) <= len(open_checkpoint(pico).tensors) - 5


def test_resume_of_another_recipe_or_source_is_refused_and_force_discards(
    pico: Path, tmp_path: Path, undisturbed: Contents
) -> None:
    out = tmp_path / "out"
    run_and_die(pico, out, "tensor 7")
    with pytest.raises(OutputExistsError, match="of another run: another plan") as caught:
        split(pico, out, "ortho.density=0.01")
    assert "--force" in str(caught.value.hint)
    (pico / "model.safetensors").touch()
    with pytest.raises(OutputExistsError, match="another source"):
        split(pico, out)
    split(pico, out, force=True)
    assert contents(out) == undisturbed


TAMPERED = {
    "unknown tensor": {"name": "nobody"},
    "no fields": {"name": "model.layers.1.mlp.up_proj.weight"},
    "a word for a number": {"signal": "a"},
    "not a number": {"signal": float("nan")},
    "no digests": {"blake3": {}},
    "a number for a digest": {"source_blake3": 5},
}


@pytest.mark.parametrize(
    "damage", ["garbage", "cut", "no data", "short data", "other data", *TAMPERED]
)
def test_resume_from_damaged_work_starts_where_it_is_sure(
    pico: Path, tmp_path: Path, undisturbed: Contents, damage: str
) -> None:
    out = tmp_path / "out"
    run_and_die(pico, out, "tensor 9")
    folder = work_folder(out)
    journal = folder / "journal"
    if damage == "garbage":
        journal.write_bytes(b"\x00\xff{]\n" * 9)
    elif damage == "cut":
        journal.write_bytes(journal.read_bytes()[:-7])
    elif damage == "no data":
        (folder / "artifact" / "model.safetensors.partial").unlink()
    elif damage == "short data":
        os.truncate(folder / "artifact" / "model.safetensors.partial", 100)
    elif damage == "other data":
        with (folder / "artifact" / "model.safetensors.partial").open("r+b") as file:
            file.seek(file.seek(0, os.SEEK_END) - 3000)
            file.write(b"x" * 3000)
    else:
        lines = journal.read_text().splitlines(keepends=True)
        last = json.loads(lines[-1])
        change = TAMPERED[damage]
        entry = change if "name" in change else {**last, **change}
        lines[-1] = json.dumps(entry, separators=(",", ":")) + "\n"
        journal.write_text("".join(lines))
    split(pico, out, force=damage == "garbage")
    assert contents(out) == undisturbed


def test_interrupt_keeps_what_is_finished_and_says_how_to_go_on(
    pico: Path, tmp_path: Path, undisturbed: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "COMMIT_SECONDS", 0.0)
    out, seen = tmp_path / "out", 0

    def interrupt(event: Event) -> None:
        nonlocal seen
        seen += isinstance(event, TensorDone)
        if seen == 6:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted) as caught:
        split(pico, out, workers=1, on_event=interrupt)
    assert caught.value.exit_code == 130
    assert "tensors finished" in caught.value.message
    assert "repeat the same command" in str(caught.value.hint)
    assert not out.exists()
    split(pico, out)
    assert contents(out) == undisturbed


def test_work_that_a_kill_left_behind_a_finished_output_is_cleared(
    pico: Path, tmp_path: Path, ortho: Ortho
) -> None:
    out = tmp_path / "out"
    assert ortho("decompose", pico, "-o", out, "-q").code == 0
    work_folder(out).mkdir()
    (work_folder(out) / "lock").write_text("1\n")
    before = contents(out)
    assert ortho("decompose", pico, "-o", out, "-q").code == 8
    assert not work_folder(out).exists()
    assert contents(out) == before


@pytest.mark.parametrize("command", ["decompose", "convert", "calibrate"])
@pytest.mark.parametrize("forced", [False, True])
def test_no_file_can_be_opened_says_so_and_blames_no_file(
    pico: Path,
    tmp_path: Path,
    ortho: Ortho,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    forced: bool,
) -> None:
    """An output that cannot be looked into is not somebody else's."""
    checkpoints.save_tokenizer(pico, vocab=PICO["vocab"])
    (tmp_path / "text.txt").write_text("A cat, and 2 more of them. " * 30)
    out = tmp_path / ("out.safetensors" if command == "calibrate" else "out")
    few = ["--set", "calibrate.length=16", "--set", "calibrate.samples=2"]
    more = ["--data", tmp_path / "text.txt", *few] if command == "calibrate" else []
    words = [command, pico, "-o", out, *more, "-q"]
    if forced:
        assert ortho(*words).code == 0
        words.append("--force")
    before = contents(tmp_path)
    real, held = os.open, out if forced else pico

    def starved(path: Any, *rest: Any, **named: Any) -> int:
        if str(path).startswith(str(held)):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real(path, *rest, **named)

    monkeypatch.setattr(os, "open", starved)
    ran = ortho(*words)
    monkeypatch.undo()
    assert ran.code == 9, ran.err
    assert "too many open files" in ran.err
    assert contents(tmp_path) == before
