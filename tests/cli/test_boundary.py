"""A command as a process: streams that are closed, full or gone end no work and hide no result."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pty
import resource
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import Ortho

from ortho_cli.cli import boundary

COMMAND = [sys.executable, "-m", "ortho_cli"]
CLOSED = {"stdin": "<&-", "stdout": ">&-", "stderr": "2>&-", "all": "<&- >&- 2>&-"}


def shell(redirect: str, *words: object, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a command with its streams redirected as a shell does it."""
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {redirect}', "sh", *COMMAND, *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, **more},
        check=False,
    )


def header(path: Path) -> dict[str, object]:
    raw = path.read_bytes()
    found: dict[str, object] = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return found


@pytest.mark.parametrize("closed", CLOSED.values(), ids=CLOSED)
def test_a_closed_stream_changes_neither_the_work_nor_the_exit_code(
    pico: Path, tmp_path: Path, closed: str
) -> None:
    """With stdout closed a data file would be given its number, and hold what is printed."""
    out = tmp_path / "out"
    ran = shell(closed, "decompose", pico, "-o", out, "--recipe", "int4", "--json")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert json.loads(ran.stdout or "{}") or ">&-" in closed
    assert header(out / "model.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "pico"]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["inspect", "{pico}"], 0),
        (["inspect", "{pico}", "--json"], 0),
        (["inspect", "{pico}", "--csv"], 0),
        (["convert", "{pico}", "--dry-run"], 0),
        (["calibrate", "{pico}/no", "--data", "x"], 4),
        (["bench", "{pico}/no"], 6),
        (["bench", "--nonsense"], 2),
        (["--help"], 0),
    ],
)
def test_closed_streams_change_the_exit_code_of_no_command(
    pico: Path, words: list[str], code: int
) -> None:
    for closed in (CLOSED["stdout"], CLOSED["all"]):
        ran = shell(closed, *(word.format(pico=pico) for word in words))
        assert (ran.returncode, ran.stdout) == (code, "")
        assert "Traceback" not in ran.stderr


@pytest.mark.parametrize(
    ("redirect", "words", "code"),
    [
        (">/dev/full", ["inspect", "--json"], 9),
        (">/dev/full", ["--version"], 9),
        (">/dev/full", ["--help"], 9),
        (">/dev/full", ["inspect"], 9),
        (">/dev/full", ["inspect", "--csv"], 9),
        ("2>/dev/full", ["inspect", "--json"], 0),
        ("2>/dev/full >&-", ["inspect", "--nonsense"], 2),
        (">/dev/full 2>/dev/full", ["inspect", "--json"], 9),
    ],
)
def test_a_full_disk_behind_a_stream_is_told_by_the_exit_code_if_a_result_is_lost(
    pico: Path, redirect: str, words: list[str], code: int
) -> None:
    ran = shell(redirect, *words, *([pico] if words[0] == "inspect" else []))
    assert ran.returncode == code
    assert "Traceback" not in ran.stderr
    assert "Exception ignored" not in ran.stderr
    if code == 9 and "2>" not in redirect:
        assert "error: cannot write to stdout: no space left on device" in ran.stderr


def test_a_result_that_cannot_be_delivered_leaves_the_work_and_says_that_it_is_complete(
    pico: Path, tmp_path: Path
) -> None:
    ran = shell(">/dev/full", "decompose", pico, "-o", tmp_path / "out", "--json")
    assert ran.returncode == 9
    assert f"`{tmp_path / 'out'}` is complete" in ran.stderr
    assert header(tmp_path / "out" / "model.safetensors")


def test_a_reader_that_goes_away_ends_no_work(pico: Path, tmp_path: Path) -> None:
    """As `ortho decompose X -v 2>&1 | head -1`."""
    read, write = os.pipe()
    os.close(read)
    words = ["decompose", str(pico), "-o", str(tmp_path / "out"), "-v"]
    ran = subprocess.run([*COMMAND, *words], stdout=write, stderr=write, check=False)
    os.close(write)
    assert ran.returncode == 0
    assert header(tmp_path / "out" / "model.safetensors")


@pytest.mark.parametrize(
    ("words", "ignored", "code"), [([], True, 0), (["--json"], True, 9), ([], False, 129)]
)
def test_a_terminal_that_is_gone_is_a_hangup_and_no_bug(
    pico: Path, tmp_path: Path, words: list[str], ignored: bool, code: int
) -> None:
    begun, go = tmp_path / "begun", tmp_path / "go"
    code_of_child = (
        "import fcntl, os, pathlib, signal, termios, time\n"
        "os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
        f"signal.signal(signal.SIGHUP, signal.{'SIG_IGN' if ignored else 'SIG_DFL'})\n"
        "from ortho_cli.cli import app\nfrom ortho_cli.decompose import job\n"
        "real = job.decompose\n"
        "def late(*given, **named):\n"
        f"    pathlib.Path({str(begun)!r}).touch()\n"
        f"    while not pathlib.Path({str(go)!r}).exists(): time.sleep(0.01)\n"
        "    return real(*given, **named)\n"
        "job.decompose = late\n"
        "app.main()\n"
    )
    said = ["decompose", str(pico), "-o", str(tmp_path / "out"), "-v", *words]
    terminal, end = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", code_of_child, *said], stdin=end, stdout=end, stderr=end
    )
    os.close(end)
    deadline = time.monotonic() + 60
    while not begun.exists() and time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.01)[0]:
            os.read(terminal, 1 << 16)
    os.close(terminal)
    go.touch()
    assert child.wait(60) == code
    assert (tmp_path / "out").exists() == ignored


def test_names_that_the_locale_cannot_spell_are_read_and_shown_all_the_same(
    pico: Path, tmp_path: Path
) -> None:
    model = tmp_path / os.fsdecode("modèle".encode() + b"\xff")
    model.mkdir()
    (pico / "model.safetensors").rename(model / "poids-é.safetensors")
    keys = [key for key in header(model / "poids-é.safetensors") if key != "__metadata__"]
    index = {"weight_map": dict.fromkeys(keys, "poids-é.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for words in (["--json"], ["-o", tmp_path / "é"]):
        command = "inspect" if words == ["--json"] else "decompose"
        ran = shell("", command, model, *words, **plain, TERM="dumb", COLUMNS="40")
        assert ran.returncode == 0, ran.stderr
        assert (ran.stdout + ran.stderr).isascii()
    assert (tmp_path / "é" / "report.json").exists()


@pytest.mark.parametrize("least", [3, 1500])  # select() takes no descriptor above 1023
def test_a_stream_that_is_busy_is_waited_for(least: int) -> None:
    """Another program can make the pipe that we write to one that does not wait."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    read, low = os.pipe()
    write = fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, least)
    os.close(low)
    os.set_blocking(write, False)
    count = "import os\nn = 0\nwhile b := os.read(0, 999): n += len(b)\nprint(n)"
    with subprocess.Popen(
        [sys.executable, "-c", count], stdin=read, stdout=subprocess.PIPE
    ) as reader:
        os.close(read)
        try:
            stream = boundary._Stream(write, "utf-8", lambda error: pytest.fail(str(error)))
            assert stream.write("a" * (1 << 20)) == 1 << 20
        finally:
            os.close(write)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert reader.stdout is not None
        assert int(reader.stdout.read()) == 1 << 20


def test_a_stream_that_fails_tells_once_and_takes_the_rest() -> None:
    told: list[OSError] = []
    with Path("/dev/full").open("w") as full:
        stream = boundary._Stream(full.fileno(), "ascii", told.append)
        assert stream.write("é") == 1
        assert stream.write("more") == 4
    assert [error.errno for error in told] == [errno.ENOSPC]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["decompose", ""], "an argument"),
        (["decompose", "m", "-o", ""], "the value of -o"),
        (["bench", "a", "--data="], "the value of --data"),
        (["bench", "a", "--data", "x", ""], "an argument"),
    ],
)
def test_an_empty_word_is_not_the_current_folder(
    ortho: Ortho, words: list[str], named: str
) -> None:
    ran = ortho(*words)
    assert ran.code == 2
    assert f"error: {named} is empty" in ran.err


def test_an_empty_prompt_is_a_text(ortho: Ortho) -> None:
    assert "is empty" not in ortho("bench", "a", "--prompt", "").err
