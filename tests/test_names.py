"""Names of tensors and files come from strangers: no terminal obeys them, whatever shows them."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import checkpoints
import pytest
import torch
from conftest import Ortho, Ran, read_terminal
from safetensors.torch import save_file

from ortho_cli.cli.show.console import LONGEST, visible

HOSTILE = "\x1b[5m\x07\r\n\u202e\x9b<script>[bold]"
SHOWN = r"\x1b[5m\x07\r\n\u202e\x9b<script>[bold]"


def plain(text: str) -> bool:
    return all(c.isprintable() or c == "\n" for c in text)


def shows(ran: Ran, code: int = 0) -> None:
    """The name is there, spelled out, and nothing else of it; errors leave stdout empty."""
    assert ran.code == code, ran.err
    said = ran.out + ran.err
    assert plain(said), ascii(said)
    assert SHOWN in said, said
    assert code == 0 or ran.out == ""


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A checkpoint whose folder, side file and tensors have such names."""
    folder = tmp_path / HOSTILE
    checkpoints.save(folder, {f"{HOSTILE}.weight": torch.randn(64, 64), HOSTILE: torch.ones(3)})
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / f"{HOSTILE}.txt").write_text("kept")
    return folder


def test_visible_spells_out_what_terminals_obey_and_cuts_what_has_no_end() -> None:
    assert visible(HOSTILE) == SHOWN
    assert visible("é ∑ 漢") == "é ∑ 漢"
    assert visible(os.fsdecode(b"\xff")) == r"\udcff"
    assert len(visible("n" * 10**6)) < LONGEST + 10


def test_a_plan_shows_names_escaped(hostile: Path, ortho: Ortho) -> None:
    shows(ortho("inspect", hostile))
    shows(ortho("decompose", hostile, "--dry-run"))
    shows(ortho("convert", hostile, "--dry-run"))


def test_work_and_its_result_show_names_escaped(hostile: Path, ortho: Ortho) -> None:
    shows(ortho("decompose", hostile, "-v", "--copy", "*.txt"))
    out = hostile.parent / f"{HOSTILE}-ortho"
    assert (out / f"{HOSTILE}.txt").read_text() == "kept"
    shows(ortho("decompose", hostile), 8)
    shows(ortho("inspect", out, "--verify"))
    shows(ortho("convert", out, "--alpha", "1", "-v"))
    shows(ortho("convert", hostile, "-v"))
    shows(ortho("convert", out), 2)
    (out / "ortho.safetensors").write_bytes(b"")
    shows(ortho("inspect", out), 6)


def test_statistics_show_names_escaped(hostile: Path, ortho: Ortho) -> None:
    stats = hostile.parent / f"{HOSTILE}.safetensors"
    checkpoints.save_statistics(stats, hostile)
    shows(ortho("inspect", stats, "--verify"))
    shows(ortho("decompose", hostile, "--stats", stats, "--dry-run"))
    save_file({f"{HOSTILE}.weight": torch.ones(64, 64)}, hostile / "model.safetensors")
    shows(ortho("decompose", hostile, "--stats", stats), 5)


def test_json_is_ascii(hostile: Path, ortho: Ortho) -> None:
    for command in ("inspect", "decompose", "convert"):
        ran = ortho(command, hostile, "--json")
        assert ran.code == 0, ran.err
        assert ran.out.isascii()
        assert plain(ran.out)
        assert f"{HOSTILE}.weight" in [tensor["name"] for tensor in ran.json["tensors"]]


@pytest.mark.parametrize("command", ["inspect", "decompose", "convert", "calibrate", "bench"])
def test_errors_of_every_command_show_names_escaped(
    tmp_path: Path, ortho: Ortho, command: str
) -> None:
    data = tmp_path / f"{HOSTILE}.txt"
    more = ["--data", data] if command in ("calibrate", "bench") else []
    missing = ortho(command, tmp_path / HOSTILE, *more)
    assert missing.code in (4, 6)
    shows(missing, missing.code)
    unknown = ortho(command, tmp_path / HOSTILE, f"--{HOSTILE}")
    assert unknown.code == 2
    assert plain(unknown.err)
    assert r"--\x1b[5m" in unknown.err


def test_recipes_show_names_escaped(hostile: Path, ortho: Ortho) -> None:
    shows(ortho("inspect", hostile, "--recipe", HOSTILE), 3)
    shows(ortho("inspect", hostile, "--set", f"{HOSTILE}=1"), 3)
    shows(ortho("inspect", hostile, "--set", "targets=[x]"), 3)


def test_calibrate_and_bench_show_names_escaped(tmp_path: Path, ortho: Ortho) -> None:
    model, data = tmp_path / HOSTILE, tmp_path / f"{HOSTILE}.txt"
    checkpoints.save(model, checkpoints.weights(hidden=64, mlp=64, layers=1, vocab=96))
    small = {"hidden": 64, "mlp": 64, "layers": 1, "vocab": 96, "kv": 64, "heads": 1}
    (model / "config.json").write_text(json.dumps(checkpoints.config(**small)))
    checkpoints.save_tokenizer(model, vocab=96)
    data.write_text("A cat, and 2 more of them. " * 99)
    out = tmp_path / f"{HOSTILE}.safetensors"
    few = ["--set", "calibrate.samples=1", "--set", "calibrate.length=8"]
    shows(ortho("calibrate", model, "--data", data, "-o", out, "--dry-run", *few))
    shows(ortho("calibrate", model, "--data", data, "-o", out, "-v", *few))
    assert ortho("decompose", model, "-q").code == 0
    split = tmp_path / f"{HOSTILE}-ortho"
    ran = ortho("bench", split, "--alpha", "0", "--data", data, "--context", "32", "-v")
    assert ran.code == 0, ran.err
    assert plain(ran.out + ran.err)
    shows(ortho("bench", split, "--data", data, "--forget", data.with_suffix(".csv")), 5)


def test_names_that_are_no_text_are_carried_over(hostile: Path, ortho: Ortho) -> None:
    odd = os.fsdecode(b"\xff\x1b[5m.txt")
    (hostile / odd).write_text("kept")
    for command, out in (("decompose", "a"), ("convert", "b")):
        ran = ortho(command, hostile, "-o", hostile.parent / out, "--json", "--copy", "*.txt")
        assert ran.code == 0, ran.err
        assert (hostile.parent / out / odd).read_text() == "kept"
    assert ortho("inspect", hostile.parent / "a", "--verify").code == 0
    (hostile.parent / "a" / odd).write_text("lost")
    assert ortho("inspect", hostile.parent / "a", "--verify").code == 6


def on_a_terminal(*command: str) -> bytes:
    """Run a command whose stdout and stderr are a terminal; give all that it prints."""
    hers, mine = pty.openpty()
    return read_terminal(hers, mine, [sys.executable, *command], stdout=mine, stderr=mine)


BAR = """
import sys
from ortho_cli.events import Step
from ortho_cli.cli.show.progress import ProgressSink
with ProgressSink("bench", quiet=False, verbose=False) as sink:
    sink(Step(name=sys.argv[1], number=1, of=2))
    sink._live.refresh()
"""


def test_bars_on_a_terminal_show_names_escaped(hostile: Path) -> None:
    for command in (["-m", "ortho_cli", "decompose", str(hostile), "-v"], ["-c", BAR, HOSTILE]):
        said = on_a_terminal(*command)
        assert b"\x1b[5m" not in said
        assert "\u202e".encode() not in said
        assert rb"\x1b[5m\x07\r\n\u202e\x9b<script>[bold]" in said


def test_traceback_of_a_bug_shows_names_escaped() -> None:
    code = (
        "import sys; from ortho_cli.cli import boundary\n"
        "def command(): raise RuntimeError(sys.argv[1])\n"
        "boundary.enter(command)"
    )
    ran = subprocess.run([sys.executable, "-c", code, HOSTILE], capture_output=True, text=True)
    assert ran.returncode == 1
    assert plain(ran.stderr)
    assert "RuntimeError: " + r"\x1b[5m\x07" in ran.stderr
