"""The frame of a job: what is committed, and what is published."""

from __future__ import annotations

from pathlib import Path

import pytest

from ortho_cli.errors import OutputExistsError
from ortho_cli.events import Event, TensorDone
from ortho_cli.storage import job
from ortho_cli.storage.job import Commits, Kind, Target, check_target, open_job
from ortho_cli.storage.work_folder import WorkFolder, work_folder

KIND = Kind(name="thing", is_ours=lambda folder: (folder / "thing").exists())
IDENTITY: dict[str, object] = {"plan": "p", "files": {}}


def target_of(out: Path, *, force: bool = False) -> Target:
    return check_target(out, KIND, [], force=force)


def finish(work: WorkFolder, *names: str, on_event: job.EventSink = job.null_sink) -> None:
    with Commits(work, on_event) as commits:
        for name in names:
            commits.add({"name": name})


def test_job_that_ends_well_is_published_whole(tmp_path: Path) -> None:
    with open_job(target_of(tmp_path / "out"), identity=IDENTITY, total=1) as work:
        finish(work, "a")
        work.write_file("thing", b"1")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "thing").read_bytes() == b"1"
    assert not work_folder(tmp_path / "out").exists()


def test_job_that_fails_publishes_nothing_and_keeps_what_was_finished(tmp_path: Path) -> None:
    target, told = target_of(tmp_path / "out"), list[Event]()

    def watch(event: Event) -> None:
        told.append(event)
        if event == TensorDone(name="b"):
            raise ZeroDivisionError

    with (
        pytest.raises(ZeroDivisionError),
        open_job(target, identity=IDENTITY, total=3) as work,
    ):
        finish(work, "a", "b", "c", on_event=watch)
    assert told == [TensorDone(name="a"), TensorDone(name="b")]
    assert not (tmp_path / "out").exists()
    with open_job(target, identity=IDENTITY, total=3) as work:
        assert list(work.done) == ["a", "b"]
        job.report_start(work, {"a": 1, "b": 2, "c": 4}, ["odd"], told.append)
        work.write_file("thing", b"")
    assert told[2:] == [
        job.Started(tensors=3, resumed=2, bytes_total=7, bytes_done=3),
        job.Noted(message="odd"),
    ]


def test_finished_tensors_are_committed_from_time_to_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "COMMIT_SECONDS", 0.0)
    with open_job(target_of(tmp_path / "out"), identity=IDENTITY, total=2) as work:
        with Commits(work, job.null_sink) as commits:
            commits.add({"name": "a"})
            assert list(work.done) == ["a"]
            monkeypatch.setattr(job, "COMMIT_SECONDS", 1e9)
            commits.add({"name": "b"})
            assert list(work.done) == ["a"]
        assert list(work.done) == ["a", "b"]


def test_only_force_replaces_and_only_what_is_ours(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for force in (False, True, True):
        with open_job(target_of(out, force=force), identity=IDENTITY, total=0) as work:
            work.write_file("thing", b"2")
    with pytest.raises(OutputExistsError, match="exists"):
        target_of(out)
    (out / "thing").rename(out / "other")
    with pytest.raises(OutputExistsError, match="is no thing"):
        target_of(out, force=True)
