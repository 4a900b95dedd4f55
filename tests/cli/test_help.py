"""Commands as people type them: help, usage, completion, short names, hints."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from conftest import Ortho
from typer.main import get_command

from ortho_cli.cli import app, options
from ortho_cli.cli.help import GROUPS, Command, Root
from ortho_cli.decompose.settings import Recipe

ROOT = get_command(app.app)
assert isinstance(ROOT, Root)
COMMANDS = ROOT.commands


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_usage_groups_and_examples_that_name_what_exists(name: str, ortho: Ortho) -> None:
    told = ortho(name, "--help").out
    assert re.search(rf"^Usage: ortho {name} \[?[A-Z]+\]? \[OPTIONS\]$", told, re.MULTILINE)
    titles = re.findall(r"^(\w[\w ]*):$", told, re.MULTILINE)
    assert titles[0] == "Arguments"
    assert titles[-1] == "Examples"
    assert set(titles[1:-1]) <= set(GROUPS)
    assert len(titles) > 5
    command = COMMANDS[name]
    assert isinstance(command, Command)
    assert command.epilog is not None
    lines = [shlex.split(line) for line in command.epilog.split("\n") if line.strip()]
    assert 2 <= len(lines) <= 3
    known = {spelling for one in command.params for spelling in one.opts}
    for _, called, *words in lines:
        assert called == name
        assert {word for word in words if word.startswith("-")} <= known


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_in_one_group_and_its_value_in_capitals(name: str, ortho: Ortho) -> None:
    told = ortho(name, "--help").out
    for one in COMMANDS[name].params:
        if one.param_type_name == "option" and not one.hidden:
            assert len(re.findall(rf"^  .*{one.opts[0]}\b(?!-)", told, re.MULTILINE)) >= 1, one.name
    assert not re.search(r"<\w+>", told)


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_help_fits_the_terminal_and_cuts_nothing(
    ortho: Ortho, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for name in ("", *COMMANDS):
        told = ortho(*name.split(), "--help").out
        text, _, examples = told.partition("\nExamples:\n")
        assert max(map(len, text.splitlines())) <= columns
        assert not re.search(r"[a-z]\.\.\.$", text, re.MULTILINE)
        assert f"ortho {name}" in examples


def test_words_of_other_tools_are_understood(ortho: Ortho) -> None:
    version = ortho("--version").out
    assert ortho("-V").out == version
    assert ortho("version").out == version
    assert ortho("help").out == ortho("--help").out
    assert ortho("help", "bench").out == ortho("bench", "--help").out


@pytest.mark.parametrize(
    ("typed", "error", "hint"),
    [
        ("decompose", "missing argument 'MODEL'", "usage: ortho decompose MODEL [OPTIONS]; "),
        ("nonsense", "no such command 'nonsense'", "usage: ortho [OPTIONS] COMMAND [ARGS]...; "),
        ("convert x --alpha", "requires an argument", "see `ortho convert --help`"),
        ("calibrate x --samples a", "it should be a valid integer", "usage: ortho calibrate MODEL"),
        ("convert x --alpha 0,1", "--alpha is '0,1', not a number", "--alpha 0 1"),
        ("convert {pico} --shard-size 5", "is 5 bytes", "--shard-size 5GB"),
        ("convert {pico} --dtype int3", "none of bfloat16", "bf16"),
        (
            "calibrate --data a.txt b.txt",
            "missing argument 'MODEL': --data took `b.txt`",
            "it comes first: `ortho calibrate b.txt --data a.txt`",
        ),
        (
            "calibrate --data a 'b c' --forget d e -q",
            "missing argument 'MODEL': --forget took `e`",
            "`ortho calibrate e --data a 'b c' --forget d -q`",
        ),
    ],
)
def test_usage_errors_show_how_that_command_is_called(
    ortho: Ortho, pico: Path, typed: str, error: str, hint: str
) -> None:
    ran = ortho(*shlex.split(typed.format(pico=pico)))
    assert (ran.code, ran.out) == (2, "")
    first, second = ran.err.splitlines()
    assert error in first
    assert "nable to parse" not in first
    assert hint in second


def test_short_dtypes_and_output_are_what_they_are_short_for(ortho: Ortho, pico: Path) -> None:
    for short, whole in (("bf16", "BF16"), ("fp16", "F16"), ("torch.float32", "F32")):
        ran = ortho("convert", pico, "--output", "x", "--dtype", short, "--dry-run", "--json")
        assert {tensor["dtype"] for tensor in ran.json["tensors"]} == {whole}


def test_flags_win_over_recipes(ortho: Ortho, pico: Path) -> None:
    ran = ortho("decompose", pico, "--recipe", "int4", "--target-bits", "5", "--dry-run", "--json")
    assert ran.code == 0, ran.err
    note = "--target-bits 5 picks the density, not the recipe's 0.005"
    assert note in ran.json["notes"]
    assert ran.json["recipe"]["ortho"]["density"] != 0.005
    for sets in (["--set", "ortho.density=null"], []):
        ran = ortho("decompose", pico, "--recipe", "attention", *sets, "--dry-run", "--json")
        density = 0.005 if sets else 0.004
        assert ran.json["recipe"]["ortho"]["density"] == density
    both = ["--target-bits", "5", "--set", "ortho.density=0.01"]
    assert ortho("decompose", pico, "--recipe", "int4", *both, "--dry-run").code == 3
    assert ortho("decompose", pico, "--set", "ortho.densty=null", "--dry-run").code == 3


def test_file_that_is_all_of_its_folders_model_is_read_with_what_is_beside_it(
    ortho: Ortho, pico: Path
) -> None:
    assert ortho("decompose", pico, "-q").code == 0
    made = pico.parent / "pico-ortho"
    whole = {path.name: path.read_bytes() for path in made.iterdir() if path.is_file()}
    ran = ortho("decompose", pico / "model.safetensors", "--force")
    assert ran.code == 0
    assert "note: `model.safetensors` is read with config.json" in ran.err
    assert {"config.json", "tokenizer.json"} <= whole.keys()
    assert whole == {path.name: path.read_bytes() for path in made.iterdir() if path.is_file()}


def test_one_shard_is_read_alone_and_says_so(ortho: Ortho, pico: Path) -> None:
    assert ortho("convert", pico, "--shard-size", "50KB", "-q").code == 0
    shards = sorted((pico.parent / "pico-converted").glob("model-*.safetensors"))
    ran = ortho("decompose", shards[0], "--dry-run")
    assert f"`{shards[0].name}` is one of {len(shards)} shards: it is read alone" in ran.err
    assert ortho("decompose", shards[0], "--dry-run", "-q").err == ""


def test_settings_complete_by_the_keys_of_the_recipe() -> None:
    def keys(model: type, before: str = "") -> list[str]:
        found = []
        for name, value in model.model_fields.items():  # type: ignore[attr-defined]
            nested = hasattr(value.annotation, "model_fields")
            found += keys(value.annotation, f"{before}{name}.") if nested else [f"{before}{name}="]
        return found

    assert list(options.complete_setting("")) == keys(Recipe)
    assert list(options.complete_setting("ortho.d")) == ["ortho.density="]
    assert options.complete_dtype("fp") == ["fp16", "fp32"]


def test_convert_names_its_output_by_alpha(ortho: Ortho, artifact: Path) -> None:
    for alpha in ("0", "1", "0.50"):
        assert ortho("convert", artifact, "--alpha", alpha, "-q").code == 0
    made = {path.name for path in artifact.parent.glob("pico-ortho-alpha-*")}
    assert made == {f"pico-ortho-alpha-{alpha}" for alpha in ("0", "1", "0.5")}
