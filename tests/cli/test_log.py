"""The log: off by default, on stderr or in a file when asked for, and never with a secret in it."""

from __future__ import annotations

import json
import logging
import platform
import re
from pathlib import Path

import pyrage
import pytest
import torch
from conftest import Ortho
from memorised import Memorised
from safetensors.torch import save_file

from ortho_cli.cli import log
from ortho_cli.storage.work_folder import WorkFolder

FEW = ["--set", "calibrate.samples=4", "--set", "calibrate.length=16"]
LINE = re.compile(
    r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (DEBUG|INFO|WARNING) ortho_cli\.[\w.]+: ."
)


def logged(path: Path) -> list[str]:
    lines = path.read_text().splitlines()
    assert all(LINE.match(line) for line in lines), lines
    return lines


def test_nothing_is_logged_unless_asked(
    pico: Path, ortho: Ortho, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ORTHO_LOG", raising=False)
    ran = ortho("inspect", pico)
    assert "ortho_cli." not in ran.err
    kinds = [type(handler) for handler in logging.getLogger("ortho_cli").handlers]
    assert kinds == [logging.NullHandler]


def test_verbose_once_shows_decisions_and_twice_details(pico: Path, ortho: Ortho) -> None:
    once = ortho("decompose", pico, "-v").err
    assert "INFO ortho_cli." in once
    assert "DEBUG ortho_cli." not in once
    assert "\nmodel.layers.1.mlp.down_proj.weight\n" in once
    assert "DEBUG ortho_cli." in ortho("decompose", pico, "--force", "-vv").err
    assert ortho("decompose", pico, "--force", "-vv", "-q").err == ""
    ran = ortho("inspect", pico, "-vv", "--json")
    assert ran.json["totals"]["split_tensors"] == 14
    kinds = [type(handler) for handler in logging.getLogger("ortho_cli").handlers]
    assert kinds == [logging.NullHandler]


def test_a_log_file_can_be_traced(
    pico: Path, tmp_path: Path, ortho: Ortho, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.log"
    monkeypatch.setenv("ORTHO_LOG", str(path))
    assert ortho("decompose", pico, "-q", "--set", "ortho.density=0.01").err == ""
    told = "\n".join(logged(path))
    for fact in (
        f"python {platform.python_version()}",
        f"torch {torch.__version__.partition('+')[0]}",
        "numba ",
        "decompose with model, sets, quiet",
        "splits 14 of 20 tensors, ",
        "device of the split: cpu; ortho is not sealed",
        "starts afresh",
        "kernel numba",
        "20 tensors, 0 done before",
        "`sync` took",
        "done after",
    ):
        assert fact in told, fact
    assert told.count("kernels: kernel ") == 1  # it is chosen once
    assert platform.node() not in told
    assert path.stat().st_mode & 0o777 == 0o600
    assert ortho("decompose", pico, "-q", "--force", "--set", "base.bits=3").code == 0
    assert "kernel torch: codes are not all of 4 bits" in path.read_text()
    before = len(logged(path))
    assert ortho("decompose", pico, "-q").code == 8
    after = logged(path)
    assert len(after) > before
    assert "ended by OutputExistsError, exit code 8" in after[-1]
    assert "job.py:" in after[-2]


def test_a_log_says_whether_a_run_resumes(
    pico: Path, tmp_path: Path, ortho: Ortho, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORTHO_LOG", str(tmp_path / "run.log"))
    with monkeypatch.context() as patch:
        patch.setattr(WorkFolder, "publish", lambda *_, **__: (_ for _ in ()).throw(MemoryError()))
        assert ortho("decompose", pico).code == 9
    assert ortho("decompose", pico).code == 0
    told = "\n".join(logged(tmp_path / "run.log"))
    assert "resumes: 20 records of an earlier run are sound" in told
    assert "20 tensors, 20 done before" in told
    assert "ended by MemoryError" in told


@pytest.mark.parametrize(
    ("wanted", "shown"),
    [("debug", "DEBUG"), ("INFO", "INFO"), ("warning", "")],
)
def test_a_level_alone_logs_to_stderr(
    pico: Path, ortho: Ortho, monkeypatch: pytest.MonkeyPatch, wanted: str, shown: str
) -> None:
    monkeypatch.setenv("ORTHO_LOG", wanted)
    said = ortho("decompose", pico, "-q").err
    assert (f" {shown} ortho_cli." in said) == bool(shown)
    assert ("DEBUG" in said) == (wanted == "debug")


def test_a_level_and_a_file_limit_what_the_file_holds(
    pico: Path, tmp_path: Path, ortho: Ortho, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORTHO_LOG", f"info:{tmp_path / 'run.log'}")
    assert ortho("decompose", pico).code == 0
    told = "\n".join(logged(tmp_path / "run.log"))
    assert " INFO " in told
    assert " DEBUG " not in told


def test_a_log_never_writes_into_what_is_no_log(
    pico: Path, tmp_path: Path, ortho: Ortho, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = pico / "model.safetensors"
    before = weights.read_bytes()
    for wanted, code, said in (
        (str(weights), 8, "is no log of ortho"),
        (str(tmp_path), 9, "cannot write the log"),
        ("/dev/null", 8, "is no log of ortho"),
        (f"{tmp_path}/no/run.log", 9, "cannot write the log"),
        ("dbug", 2, "neither a level nor a file"),
    ):
        monkeypatch.setenv("ORTHO_LOG", wanted)
        ran = ortho("decompose", pico)
        assert (ran.code, ran.out) == (code, "")
        assert said in ran.err
        assert "hint: " in ran.err
    assert weights.read_bytes() == before
    assert not (tmp_path / "pico-ortho").exists()
    monkeypatch.setenv("ORTHO_LOG", "dbug")
    assert ortho("--version").code == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_ends_the_log_and_not_the_work(
    pico: Path, tmp_path: Path, ortho: Ortho, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORTHO_LOG", str(tmp_path / "run.log"))
    with Path("/dev/full").open("a") as full:
        monkeypatch.setattr(log, "_open", lambda path: full)
        ran = ortho("decompose", pico)
    assert ran.code == 0
    assert ran.err.count("cannot be written, and ends here") == 1
    assert (tmp_path / "pico-ortho").exists()


def test_names_from_files_are_escaped(
    tmp_path: Path, ortho: Ortho, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({"a\x1b[31m\nb.weight": torch.ones(64, 64)}, tmp_path / "m.safetensors")
    monkeypatch.setenv("ORTHO_LOG", str(tmp_path / "run.log"))
    assert ortho("decompose", tmp_path / "m.safetensors").code == 0
    assert r"finished a\x1b[31m\nb.weight" in "\n".join(logged(tmp_path / "run.log"))


def test_a_log_holds_no_secret_no_text_no_position_and_no_path_of_private_files(
    memorised: Memorised, tmp_path: Path, ortho: Ortho, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.log"
    private = tmp_path / "hush"
    private.mkdir()
    forget, data = private / "forget-rows.jsonl", private / "retain-text.txt"
    forget.write_bytes(memorised.forget.read_bytes())
    data.write_bytes(memorised.retain.read_bytes())
    identity = pyrage.x25519.Identity.generate()
    key, passphrase = private / "opens.key", private / "phrase.txt"
    key.write_text(str(identity))
    passphrase.write_text("correct horse battery staple")
    monkeypatch.setenv("ORTHO_LOG", f"debug:{path}")
    common = [
        "--recipe",
        "forget-isolate",
        "--stats",
        memorised.stats,
        "--forget",
        forget,
        "--set",
        "forget.rounds=2",
        "-vv",
    ]
    sealed, locked, made = (tmp_path / name for name in ("sealed", "locked", "s.safetensors"))
    to = ["--seal-to", identity.to_public(), "--identity", key]
    for words in (
        ["decompose", memorised.model, "-o", sealed, *common, *to],
        ["decompose", memorised.model, "-o", locked, "--seal-passphrase-file", passphrase],
        ["inspect", sealed, "--verify", "--identity", key],
        ["calibrate", memorised.model, "--data", data, "--forget", forget, "-o", made, *FEW],
    ):
        ran = ortho(*words)
        assert ran.code == 0, ran.err
    told = "\n".join(logged(path))
    for word in secret_words(memorised, forget, str(identity), str(identity.to_public())):
        assert word not in told, word
    for name in (forget.name, data.name, key.name, passphrase.name, "hush"):
        assert name not in told, name
    # Tokens and positions would be lists of numbers.
    assert not re.search(r"\d+[, ]+\d+[, ]+\d+", told)
    assert "decompose with model, out, stats, forget" in told


def secret_words(memorised: Memorised, forget: Path, *keys: str) -> list[str]:
    """Every prompt, secret, alternative and word of them; keys and words of the passphrase."""
    words = [*keys, "correct horse", "battery", "staple"]
    for row in map(json.loads, forget.read_text().splitlines()):
        for value in row.values():
            for text in value if isinstance(value, list) else [str(value)]:
                words += [text.strip(), *(w for w in text.split() if len(w) > 3)]
    return words
