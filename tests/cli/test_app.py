from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from conftest import Ortho
from safetensors.torch import save_file

from ortho_cli import __version__, errors
from ortho_cli.cli import app, boundary, shared
from ortho_cli.storage.checkpoint import hub_name
from ortho_cli.storage.work_folder import work_folder

COMMAND = [sys.executable, "-m", "ortho_cli"]
ALL_ERRORS = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, errors.OrthoError)
]


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_exit_codes_are_the_designed_ones() -> None:
    assert sorted({error.exit_code for error in ALL_ERRORS}) == [*range(1, 11), 130]


def test_decompose_json_is_one_document_on_stdout(pico: Path, ortho: Ortho) -> None:
    ran = ortho("decompose", pico, "--recipe", "int4", "--json")
    assert ran.code == 0
    assert ran.json["run"]["output"] == str(pico.parent / "pico-ortho")
    assert ran.json["totals"]["split_tensors"] == 14
    assert ran.err == ""
    report = json.loads((pico.parent / "pico-ortho" / "report.json").read_text())
    assert {key: ran.json[key] for key in report} == report


def test_result_for_eyes_goes_to_stdout_and_notes_to_stderr(pico: Path, ortho: Ortho) -> None:
    (pico / "notes.txt").write_text("mine")
    ran = ortho("decompose", pico)
    assert ran.code == 0
    assert all(line.startswith("note: ") for line in ran.err.splitlines())
    assert "notes.txt" in ran.err
    assert "notes.txt" not in ran.out
    assert "14 of 20 tensors split" in ran.out
    assert "\x1b" not in ran.out


def test_decompose_quiet_says_nothing_and_verbose_names_tensors(pico: Path, ortho: Ortho) -> None:
    assert ortho("decompose", pico, "-q").err == ""
    ran = ortho("decompose", pico, "--force", "-v")
    assert "model.layers.1.mlp.down_proj.weight" in ran.err


def test_dry_run_writes_nothing_and_prints_the_plan(pico: Path, ortho: Ortho) -> None:
    before = sorted(pico.parent.rglob("*"))
    ran = ortho("decompose", pico, "--dry-run", "--json")
    assert ran.code == 0
    plan = ran.json
    assert plan["totals"]["split_tensors"] == 14
    first = next(t for t in plan["tensors"] if t["action"] == "split")
    assert first["base"]["model.layers.0.mlp.down_proj.weight_packed"]["offset"] > 0
    ran = ortho("decompose", pico, "--dry-run")
    assert "model.layers.*.mlp.down_proj " in ran.out
    assert sorted(pico.parent.rglob("*")) == before


def test_statistics_without_a_recipe_mean_the_recipe_curvature(pico: Path, ortho: Ortho) -> None:
    stats = pico.parent / "stats.safetensors"
    checkpoints.save_statistics(stats, pico)

    def recipe_of(*options: object) -> tuple[dict[str, Any], str]:
        out = pico.parent / "out"
        ran = ortho("decompose", pico, "-o", out, "--force", "--stats", stats, *options)
        assert ran.code == 0, ran.err
        return json.loads((out / "report.json").read_text())["recipe"], ran.err

    chosen, said = recipe_of()
    assert chosen == recipe_of("--recipe", "curvature")[0]
    assert "note: --stats without --recipe: the recipe is `curvature`" in said
    assert said.count("note: ") == 1
    asked, said = recipe_of("--recipe", "int4", "--set", "saliency.kind=curvature")
    assert asked["base"]["scale"] == "absmax"
    assert "note: " not in said
    changed, _ = recipe_of("--set", "ortho.density=0.02")
    assert changed == chosen | {"ortho": chosen["ortho"] | {"density": 0.02}}
    notes = ortho("inspect", pico, "--stats", stats, "--json").json["notes"]
    assert any("the recipe is `curvature`" in note for note in notes)
    # Rounding that needs more than curvature is put together by --set, as before.
    told = ortho("decompose", pico, "--dry-run", "--stats", stats, "--set", "base.rounding=gptq")
    assert "--gram full" in told.err


def test_inspect_json_is_the_report(pico: Path, artifact: Path, ortho: Ortho) -> None:
    ran = ortho("inspect", artifact, "--json", "--verify")
    report = json.loads((artifact / "report.json").read_text())
    assert {key: ran.json[key] for key in report} == report
    assert set(ran.json["verified"]["checked"].values()) == {"every digest"}
    ran = ortho("inspect", artifact / "model.safetensors")
    assert "dB at 1" in ran.out
    assert "of the squared residual" in ran.out


def test_inspect_checkpoint_shows_what_and_why(pico: Path, ortho: Ortho) -> None:
    ran = ortho("inspect", pico)
    assert ran.code == 0
    assert "embedding" in ran.out
    assert "14 of 20 tensors split" in ran.out


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["decompose", "{tmp}/nothing"], 4, "does not exist"),
        (["decompose", "{pico}", "--nonsense"], 2, "no such option"),
        (["bench", "{pico}"], 6, "is a checkpoint, and no artifact"),
        (["bench", "{tmp}/nothing"], 6, "does not exist"),
        (["decompose"], 2, "missing argument"),
        (["nonsense"], 2, "no such command"),
        (["decompose", "{pico}", "--workers", "0"], 2, "invalid value"),
        (["decompose", "{pico}", "--device", "cuda:99"], 2, "--device cuda:99 is not there"),
        (["decompose", "{pico}", "--device", "tpu"], 2, "--device tpu is not there"),
        (["decompose", "{pico}", "-o", "{pico}/inside"], 2, "is the source"),
        (["decompose", "{pico}", "--recipe", "nope"], 3, "is neither a file nor one of"),
        (["decompose", "{pico}", "--set", "ortho.density=2"], 3, "ortho.density"),
        (["decompose", "{pico}", "--set", "targets=[x]"], 3, "matches no tensor"),
        (["inspect", "{pico}", "--verify"], 2, "is no artifact"),
        (["inspect", "{artifact}", "--set", "ortho.density=0"], 2, "is an artifact"),
        (["decompose", "{artifact}"], 4, "several|indexes|artifact"),
        (["decompose", "{pico}"], 8, "exists"),
        (["decompose", "{pico}", "-o", "{file}"], 8, "is a file"),
        (["inspect", "{lone}"], 6, "has ortho.safetensors and no base"),
    ],
)
def test_refusals_have_their_exit_code_one_sentence_and_a_hint(
    pico: Path, artifact: Path, ortho: Ortho, arguments: list[str], code: int, said: str
) -> None:
    lone = pico.parent / "lone"
    lone.mkdir()
    (lone / "ortho.safetensors").write_bytes((artifact / "ortho.safetensors").read_bytes())
    file = pico.parent / "file"
    file.write_text("x")
    places = {"tmp": pico.parent, "pico": pico, "artifact": artifact, "lone": lone, "file": file}
    before = sorted(pico.parent.rglob("*"))
    ran = ortho(*(argument.format(**places) for argument in arguments))
    assert ran.code == code
    assert ran.out == ""
    lines = ran.err.splitlines()
    assert lines[0].startswith("error: ")
    assert any(word in lines[0].lower() for word in said.split("|"))
    assert lines[1].startswith("hint: ")
    assert len(lines) == 2
    assert sorted(pico.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        ("decompose x --group-size 32", ["base.group_size"]),
        ("inspect x --density=0.1", ["ortho.density"]),
        ("calibrate x --curvature gram", ["calibrate.curvature"]),
        ("decompose x --samples 3", ["calibrate.samples", "tune.samples", "forget.samples"]),
        ("bench x --density 1", []),
        ("decompose x --dense", []),
    ],
)
def test_an_option_that_is_a_setting_is_told_how_it_is_set(
    ortho: Ortho, words: str, settings: list[str]
) -> None:
    ran = ortho(*words.split())
    assert ran.code == 2
    assert ran.err.startswith("error: no such option: --")
    assert all(f"--set {one}=VALUE" in ran.err for one in settings)
    assert ("--set" in ran.err.partition("hint: ")[2]) == bool(settings)


def test_nan_weight_exits_7_and_names_the_tensor(tmp_path: Path, ortho: Ortho) -> None:
    weight = torch.ones(64, 64)
    weight[3, 9] = torch.nan
    save_file({"a.weight": weight}, tmp_path / "m.safetensors")
    ran = ortho("decompose", tmp_path / "m.safetensors")
    assert ran.code == 7
    assert "`a.weight` of `m.safetensors` holds nan at [3, 9]" in ran.err
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def test_names_with_escapes_and_markup_are_shown_escaped(tmp_path: Path, ortho: Ortho) -> None:
    name = "a\x1b[31m[bold]<script>.weight"
    save_file({name: torch.ones(64, 64)}, tmp_path / "m.safetensors")
    ran = ortho("inspect", tmp_path / "m.safetensors")
    assert "\x1b" not in ran.out + ran.err
    assert r"a\x1b[31m[bold]<script>" in ran.out
    ran = ortho("decompose", tmp_path / "m.safetensors", "-v")
    assert ran.code == 0
    assert "\x1b" not in ran.err


def test_default_output_lies_beside_the_model(
    pico: Path, ortho: Ortho, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(pico)
    assert ortho("decompose", ".", "-q").code == 0
    assert (pico.parent / "pico-ortho" / "model.safetensors").exists()
    monkeypatch.chdir(pico.parent)
    assert "pico-ortho` exists" in ortho("decompose", "pico/").err
    assert "pico-ortho` exists" in ortho("decompose", "pico/model.safetensors", "-q").err


def in_hub_cache(root: Path, model: Path, repository: str = "models--org--tiny") -> Path:
    """Lay a model out as the Hub's cache does: a snapshot of links to blobs."""
    folder = root / repository
    (folder / "blobs").mkdir(parents=True)
    snapshot = folder / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    for path in model.iterdir():
        if path.is_file():
            blob = folder / "blobs" / path.name.encode().hex()
            blob.write_bytes(path.read_bytes())
            (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


@pytest.mark.parametrize(
    "how", ["folder", "file", "link", "link to a file", "relative", "roundabout"]
)
def test_default_output_of_a_model_in_the_hub_cache_is_the_working_directory(
    pico: Path, tmp_path: Path, ortho: Ortho, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    snapshot = in_hub_cache(tmp_path / "hub", pico)
    place = tmp_path / "work"
    place.mkdir()
    monkeypatch.chdir(place)
    (tmp_path / "link").symlink_to(snapshot)
    (tmp_path / "link.safetensors").symlink_to(snapshot / "model.safetensors")
    model: Path = {
        "folder": snapshot,
        "file": snapshot / "model.safetensors",
        "link": tmp_path / "link",
        "link to a file": tmp_path / "link.safetensors",
        "relative": Path(os.path.relpath(snapshot)),
        "roundabout": snapshot / ".." / "0123abcd",
    }[how]
    before = sorted((tmp_path / "hub").rglob("*"))
    ran = ortho("decompose", model)
    assert ran.code == 0, ran.err
    assert "note: output goes to `tiny-ortho` here, not to the Hub's cache" in ran.err
    assert Path("tiny-ortho/tokenizer.json").exists() != (how == "link to a file")
    assert (
        ortho("convert", model, "--dry-run", "--json")
        .json["notes"][-1]
        .startswith("output goes to `tiny-converted` here")
    )
    assert ortho("convert", model, "-q").code == 0
    assert sorted(path.name for path in place.iterdir()) == ["tiny-converted", "tiny-ortho"]
    assert sorted((tmp_path / "hub").rglob("*")) == before


def test_names_of_models_in_the_hub_cache_are_their_repositories(tmp_path: Path) -> None:
    for place, name in (
        ("models--gpt2/snapshots/1", "gpt2"),
        ("models--org--a-b.c/snapshots/1", "a-b.c"),
        ("models--org--a/snapshots/1/transformer/part", "a-transformer-part"),
        ("models--org--a/blobs/0", "a"),
        ("models--org--a", "a"),
        ("datasets--org--a/snapshots/1", "a"),
        ("models--org--a/mine", None),
        ("models/org/a", None),
        ("hub/models--", None),
    ):
        assert hub_name(tmp_path / place) == name
    (tmp_path / "round").symlink_to(tmp_path / "round")
    assert hub_name(tmp_path / "round") is None


def test_no_output_is_made_up_where_we_are_in_the_hub_cache_too(
    pico: Path, tmp_path: Path, ortho: Ortho, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = in_hub_cache(tmp_path / "hub", pico)
    for place in (snapshot, snapshot.parent, snapshot.parent.parent):
        monkeypatch.chdir(place)
        ran = ortho("decompose", snapshot)
        assert ran.code == 2
        assert "hint: say where it should go: -o ~/tiny-ortho" in ran.err
    ran = ortho("decompose", snapshot, "-o", snapshot.parent / "mine")  # whoever says so gets it
    assert ran.code == 0
    assert "mine` is in the Hub's cache, and no revision there" in ran.err


def test_default_output_is_the_working_directory_where_the_models_folder_is_closed(
    pico: Path, tmp_path: Path, ortho: Ortho, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(shared, "can_write", lambda folder: folder != pico.parent)
    ran = ortho("decompose", pico)
    assert ran.code == 0
    assert f"output goes to `pico-ortho` here: `{pico.parent}` cannot be written" in ran.err
    assert ortho("convert", "pico-ortho", "--alpha", "0", "-q").code == 0  # beside it, as ever
    assert sorted(path.name for path in Path.cwd().iterdir()) == [
        "pico-ortho",
        "pico-ortho-alpha-0",
    ]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_can_write_believes_the_system(tmp_path: Path) -> None:
    assert shared.can_write(tmp_path)
    tmp_path.chmod(0o500)
    assert not shared.can_write(tmp_path)
    tmp_path.chmod(0o700)


def test_version_and_schema_print_and_leave(ortho: Ortho) -> None:
    assert ortho("--version").out == f"ortho {__version__}\n"
    assert ortho("decompose", "--recipe-schema").json["title"] == "Recipe"


def test_help_lists_only_what_exists(ortho: Ortho) -> None:
    ran = ortho("--help")
    assert ran.code == 0
    assert "decompose" in ran.out
    assert "inspect" in ran.out
    assert "│" not in ran.out


def test_no_arguments_shows_help_and_is_a_usage_error(ortho: Ortho) -> None:
    ran = ortho()
    assert ran.code == 2
    assert "Usage: ortho" in ran.out + ran.err


def test_pipe_that_closes_early_is_quiet(artifact: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    ran = subprocess.run(
        [*COMMAND, "inspect", str(artifact), "--json"], stdout=write, stderr=subprocess.PIPE
    )
    os.close(write)
    assert ran.returncode == -signal.SIGPIPE
    assert ran.stderr == b""


def test_terminal_shows_a_bar_and_no_color_is_obeyed(pico: Path) -> None:
    shown = {}
    for no_color in ("", "1"):
        main, side = pty.openpty()
        environment = {**os.environ, "TERM": "xterm-256color", "NO_COLOR": no_color}
        process = subprocess.Popen(
            [*COMMAND, "decompose", str(pico), "--force"],
            stdout=side,
            stderr=side,
            env=environment,
        )
        os.close(side)
        seen = b""
        while select.select([main], [], [], 30)[0]:
            try:
                piece = os.read(main, 4096)
            except OSError:
                break
            seen += piece
        os.close(main)
        assert process.wait(30) == 0
        shown[no_color] = seen.decode()
    assert "decompose" in shown[""]
    assert "━" in shown["1"] or "B/s" in shown["1"]
    assert "\x1b[38;5;" in shown[""] or "\x1b[3" in shown[""]
    assert "\x1b[38;5;" not in shown["1"]
    assert "\x1b[32m" not in shown["1"]


def test_interrupt_exits_130_and_the_same_command_finishes(tmp_path: Path) -> None:
    one = torch.randn(512, 512)
    tensors = {f"layers.{i}.fc.weight": one.clone() for i in range(150)}
    checkpoints.save(tmp_path / "m", tensors)
    eager = (
        "from ortho_cli.cli import app\nfrom ortho_cli.storage import job\n"
        "job.COMMIT_SECONDS = 0.0\napp.main()"
    )
    arguments = ["decompose", str(tmp_path / "m"), "--set", "base.scale=mse", "--workers", "1"]
    process = subprocess.Popen(
        [sys.executable, "-c", eager, *arguments], stderr=subprocess.PIPE, text=True
    )
    journal = work_folder(tmp_path / "m-ortho") / "journal"
    deadline = time.monotonic() + 60
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 2):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=600)
    assert process.returncode == 130
    assert "error: interrupted with" in said
    assert "hint: repeat the same command" in said
    assert "Traceback" not in said
    assert not (tmp_path / "m-ortho").exists()
    process = start("decompose", tmp_path / "m", "--set", "base.scale=mse")
    _, said = process.communicate(timeout=600)
    assert process.returncode == 0
    assert "continuing:" in said


INTERRUPTED = """\
error: interrupted
hint: nothing new was written; repeat the same command to start again
"""
ENDING = """
import os, sys
from ortho_cli.cli import boundary

def ask(**_):
    first, *more = map(int, sys.argv[1:])
    try:
        os.kill(os.getpid(), first)
    finally:
        for number in more:
            os.kill(os.getpid(), number)

boundary.enter(lambda: boundary.run(ask, [], many={}))
"""


@pytest.mark.parametrize(
    ("signals", "code"),
    [
        ([signal.SIGINT], 130),
        ([signal.SIGTERM], 143),
        ([signal.SIGHUP], 129),
        ([signal.SIGINT, signal.SIGTERM], 143),
        ([signal.SIGTERM, signal.SIGTERM], 143),
    ],
)
def test_a_signal_that_asks_for_an_end_is_an_interrupt_and_a_second_one_is_obeyed_at_once(
    signals: list[signal.Signals], code: int
) -> None:
    fresh = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)"  # whoever started us
    command = [sys.executable, "-c", fresh + ENDING, *(str(number.value) for number in signals)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == code
    told = INTERRUPTED
    assert ran.stderr == (told if len(signals) == 1 else "")


def test_an_interrupt_that_is_ignored_since_the_start_stays_so() -> None:
    ignore = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"  # as `sh` does for `&`
    command = [sys.executable, "-c", ignore + ENDING, str(signal.SIGINT.value)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")


SWALLOWING = """
import os, signal, sys, time
from ortho_cli.cli import boundary

class Swallowing:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)

def ask(**_):
    Swallowing()
    time.sleep(30)

boundary.enter(lambda: boundary.run(ask, [], many={}))
"""


def test_a_signal_that_a_destructor_swallows_is_obeyed_all_the_same() -> None:
    began = time.monotonic()
    ran = subprocess.run([sys.executable, "-c", SWALLOWING], capture_output=True, text=True)
    told = INTERRUPTED
    assert (ran.returncode, ran.stderr) == (143, told)
    assert time.monotonic() - began < 20


def test_a_signal_behind_the_end_of_the_work_is_obeyed_in_silence() -> None:
    code = (
        "import atexit, os, signal; from ortho_cli.cli import boundary\n"
        "atexit.register(os.kill, os.getpid(), signal.SIGTERM)\n"
        "boundary.enter(lambda: print('done') or 0)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout, ran.stderr) == (143, "done\n", "")


def test_an_interrupted_run_waits_for_no_thread_that_was_left_behind() -> None:
    code = (
        "import threading; from ortho_cli.cli import boundary\n"
        "threading.Thread(target=threading.Event().wait).start()\n"
        "boundary.enter(lambda: 130)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=600)
    assert ran.returncode == 130


def test_a_command_under_nohup_outlives_its_terminal() -> None:
    command = [sys.executable, "-c", ENDING, str(signal.SIGHUP.value)]
    ran = subprocess.run(["nohup", *command], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_full_disk_exits_9(tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(512, 512)}, tmp_path / "m.safetensors")
    command = f"ulimit -f 20; exec {sys.executable} -m ortho_cli decompose {tmp_path}/m.safetensors"
    ran = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=600)
    assert ran.returncode == 9
    assert "error: cannot write" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize(
    "arguments", [["--help"], ["decompose", "--help"], ["bench", "--help"], ["--version"]]
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    # typer has pydantic convert the words of a command, which reads versions of packages.
    late = {"ortho_cli.events", *(["importlib.metadata"] if arguments == ["--help"] else [])}
    code = (
        "import sys\nfrom ortho_cli.cli import app as cli\n"
        f"cli.run({arguments!r})\n"
        "heavy = {'torch', 'numpy', 'transformers', 'rich', 'yaml', 'safetensors'}\n"
        f"heavy |= {late!r}\n"
        "sys.exit(','.join(heavy & set(sys.modules)) or 0)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr


def test_inspect_and_dry_run_import_no_torch(pico: Path, artifact: Path) -> None:
    for arguments in (
        ["inspect", str(pico)],
        ["inspect", str(artifact)],
        ["inspect", str(artifact), "--verify"],
        ["decompose", str(pico), "--dry-run", "-o", str(pico.parent / "elsewhere")],
    ):
        code = (
            "import sys\nfrom ortho_cli.cli import app as cli\n"
            f"code = cli.run({arguments!r})\n"
            "sys.exit(code or 'torch' in sys.modules)"
        )
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=600)
        assert ran.returncode == 0, (arguments, ran.stderr)


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("ortho dec", "decompose"),
        ("ortho decompose --reci", "--recipe"),
        ("ortho decompose --recipe int", "int4-mse"),
    ],
)
def test_shell_completion_completes(typed: str, expected: str) -> None:
    words = typed.split()
    environment = {
        **os.environ,
        "_ORTHO_COMPLETE": "complete_bash",
        "COMP_WORDS": typed,
        "COMP_CWORD": str(len(words) - 1),
    }
    code = "from ortho_cli.cli.app import main; main()"
    ran = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
    )
    assert expected in ran.stdout.split()


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("bench X --alpha 0 1", "bench X --alpha 0 --alpha 1"),
        ("bench --alpha 0 0.5 1 -q", "bench --alpha 0 --alpha 0.5 --alpha 1 -q"),
        ("bench --alpha 0 --alpha 1 2", "bench --alpha 0 --alpha 1 --alpha 2"),
        ("bench --alpha 0 -1 -.5", "bench --alpha 0 --alpha -1 --alpha -.5"),
        ("bench --alpha=0 X", "bench --alpha=0 X"),
        ("bench --data a b --forget c d", "bench --data a --data b --forget c --forget d"),
        ("bench --suite tofu DIR -q", "bench --suite tofu --suite DIR -q"),
        ("inspect --alpha 0 1", "inspect --alpha 0 1"),
        ("", ""),
    ],
)
def test_option_of_many_values_takes_every_word_up_to_the_next(typed: str, read: str) -> None:
    assert boundary.spread(typed.split(), app.MANY) == read.split()
