"""`ortho inspect` for eyes: tables that lose no figure, CSV, the worst first, two side by side."""

from __future__ import annotations

import csv
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from fcntl import ioctl
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from conftest import Ortho, read_terminal
from safetensors.torch import save_file

from ortho_cli.cli.show.console import csv_text, shorten
from ortho_cli.formats.layers import Place, natural, place_of, short_layers

LAYERS = 11
FIGURE = re.compile(r"(?<![\w.])\d[\d,]*\.\d+%?|\d+ x \d+")


@pytest.fixture
def deep(tmp_path: Path, ortho: Ortho) -> Path:
    """An artifact of more than ten layers."""
    tensors = checkpoints.weights(hidden=64, mlp=64, layers=LAYERS, vocab=96, kv=32)
    checkpoints.save(tmp_path / "deep", tensors)
    assert ortho("decompose", tmp_path / "deep", "-q").code == 0
    return tmp_path / "deep-ortho"


def on_a_terminal(columns: int, *words: object) -> str:
    """Run a command whose stdout is a terminal of so many columns."""
    hers, mine = pty.openpty()
    ioctl(mine, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    own = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
    command = [sys.executable, "-m", "ortho_cli", *map(str, words)]
    options: dict[str, Any] = {
        "stdout": mine,
        "stderr": subprocess.DEVNULL,
        "env": {**own, "TERM": "xterm"},
    }
    said = read_terminal(hers, mine, command, **options)
    return re.sub(r"\x1b\[\d*m|\r", "", said.decode())


def table(text: str) -> list[str]:
    """The lines of rows: those that end in a figure and begin with a name."""
    return [line for line in text.splitlines() if re.search(r"_proj +\S", line)]


@pytest.mark.parametrize("columns", [80, 40])
def test_a_terminal_cuts_no_figure_and_keeps_names(deep: Path, ortho: Ortho, columns: int) -> None:
    whole = table(ortho("inspect", deep).out)
    said = on_a_terminal(columns, "inspect", deep)
    rows = table(said)
    assert max(map(len, rows)) <= columns
    assert len(rows) == len(whole) * (1 if columns == 80 else 2)
    assert sorted(FIGURE.findall("\n".join(rows))) == sorted(FIGURE.findall("\n".join(whole)))
    assert f"model.layers.{LAYERS - 1}\n  mlp.down_proj" in said


def test_layers_come_in_the_order_of_their_numbers_with_whole_names_off_a_terminal(
    deep: Path, ortho: Ortho
) -> None:
    ran = ortho("inspect", deep)
    assert ran.err == ""
    names = [line.split()[0] for line in table(ran.out)]
    layers = [int(name.split(".")[2]) for name in names]
    assert layers == sorted(layers)
    assert len(names) == 7 * LAYERS
    checkpoints.save_statistics(deep.parent / "s.safetensors", deep.parent / "deep")
    names = [line.split()[0] for line in table(ortho("inspect", deep.parent / "s.safetensors").out)]
    assert [int(name.split(".")[2]) for name in names] == layers


def test_top_shows_the_worst_first(deep: Path, ortho: Ortho) -> None:
    tensors = [t for t in ortho("inspect", deep, "--json").json["tensors"] if "nnz" in t]
    worst = sorted(tensors, key=lambda tensor: tensor["sqnr_db_alpha_1"])[:3]
    shown = table(ortho("inspect", deep, "--top", 3).out)
    assert [line.split()[0] + ".weight" for line in shown] == [t["name"] for t in worst]
    rows = list(csv.DictReader(io.StringIO(ortho("inspect", deep, "--top", 3, "--csv").out)))
    assert [row["name"] for row in rows] == [tensor["name"] for tensor in worst]


def test_csv_has_whole_names_and_all_digits(deep: Path, ortho: Ortho) -> None:
    ran = ortho("inspect", deep, "--csv")
    assert ran.err == ""
    rows = {row["name"]: row for row in csv.DictReader(io.StringIO(ran.out))}
    tensors = ortho("inspect", deep, "--json").json["tensors"]
    assert rows.keys() == {tensor["name"] for tensor in tensors}
    for tensor in tensors:
        row = rows[tensor["name"]]
        assert row["shape"] == "x".join(map(str, tensor["shape"]))
        for key in ("sqnr_db_alpha_0", "bits_per_weight", "residual_kept"):
            assert row[key] == str(tensor.get(key, ""))
    for path in (deep.parent / "deep", checkpoint_statistics(deep)):
        assert len(list(csv.reader(io.StringIO(ortho("inspect", path, "--csv").out)))) > 7 * LAYERS


def checkpoint_statistics(deep: Path) -> Path:
    path = deep.parent / "stats.safetensors"
    checkpoints.save_statistics(path, deep.parent / "deep")
    return path


@pytest.mark.parametrize("sign", ["=", "+", "-", "@", "\t", "\r"])
def test_csv_lets_no_name_be_a_formula_or_control_a_terminal(sign: str) -> None:
    text = csv_text([{"name": f'{sign}HYPERLINK("x")\x1b[5m', "value": -1.5}])
    (row,) = csv.DictReader(io.StringIO(text))
    assert row["name"].startswith("'")
    assert row["name"].endswith(r"\x1b[5m")
    assert row["value"] == "-1.5"  # a number is one


def test_a_weight_without_error_is_infinite_in_csv(tmp_path: Path, ortho: Ortho) -> None:
    save_file({"a.weight": torch.zeros(64, 64)}, tmp_path / "m.safetensors")
    assert ortho("decompose", tmp_path / "m.safetensors", "-q").code == 0
    (row,) = csv.DictReader(io.StringIO(ortho("inspect", tmp_path / "m-ortho", "--csv").out))
    assert row["sqnr_db_alpha_1"] == "inf"


def test_two_are_compared_for_eyes_and_machines(pico: Path, artifact: Path, ortho: Ortho) -> None:
    said = ortho("inspect", artifact, pico)
    assert said.code == 0, said.err
    assert "14 of 20 tensors differ" in said.out
    totals = ortho("inspect", artifact, "--json").json["totals"]
    assert f"({totals['sqnr_db_alpha_0']:.2f} dB) at alpha 0" in said.out
    assert ortho("inspect", pico, artifact, "--json").json["reference"] == "first"
    assert "all 20 tensors are the same" in ortho("inspect", artifact, artifact).out
    assert (
        ortho("decompose", pico, "-o", pico.parent / "b", "-q", "--set", "base.scale=mse").code == 0
    )
    said = ortho("inspect", artifact, pico.parent / "b", "--top", 2)
    assert len(table(said.out)) == 2
    assert "of base's codes differ" in said.out
    text = ortho("inspect", artifact, pico.parent / "b", "--csv").out
    rows: list[dict[str, Any]] = list(csv.DictReader(io.StringIO(text)))
    assert float(rows[-1]["first_bits_per_weight"] or 0) >= 0
    assert {row["same"] for row in rows} == {"True", "False"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{pico}", "{pico}"], "one of both has to be an artifact"),
        (["{artifact}", "{pico}", "--verify"], "are for one path"),
        (["{artifact}", "{pico}", "--html", "{new}"], "--html is for one artifact"),
        (["{artifact}", "--csv", "--json"], "both print on stdout"),
        (["{artifact}", "--top", "2", "--json"], "a JSON document has every tensor"),
        (["{artifact}", "--top", "0"], "invalid value"),
        (["{pico}", "--top", "2"], "--top ranks what was measured"),
        (["{pico}", "--html", "{new}"], "is a checkpoint"),
    ],
)
def test_what_does_not_go_together_is_refused(
    pico: Path, artifact: Path, ortho: Ortho, words: list[str], said: str
) -> None:
    places = {"pico": pico, "artifact": artifact, "new": pico.parent / "new.html"}
    ran = ortho("inspect", *(word.format(**places) for word in words))
    assert (ran.code, ran.out) == (2, "")
    assert said in ran.err.lower() or said in ran.err
    assert "\nhint: " in ran.err
    assert not (pico.parent / "new.html").exists()


def test_names_have_their_place_and_natural_order() -> None:
    assert place_of("model.layers.7.mlp.up_proj") == Place("model.layers.7", "mlp.up_proj")
    assert place_of("h.0.experts.12.w1") == Place("h.0", "experts.*.w1")
    assert place_of("lm_head") == Place("", "lm_head")
    names = ["a.10", "a.9", "a.1" + "0" * 5000, "a.01", "a.b"]
    assert sorted(names, key=natural) == ["a.01", "a.9", "a.10", "a.1" + "0" * 5000, "a.b"]
    assert short_layers(["v.0", "t.1"]) == {"v.0": "0", "t.1": "1"}
    assert short_layers(["v.0", "t.0"]) == {"v.0": "v.0", "t.0": "t.0"}


def test_a_name_is_cut_from_the_left_to_the_cells_it_has() -> None:
    assert shorten("layers.0.up_proj", 11) == "..0.up_proj"
    assert shorten("漢" * 20, 9) == ".." + "漢" * 3
    assert shorten("short", 5) == "short"


def test_what_is_exact_has_no_unit() -> None:
    from ortho_cli.cli.show.console import in_decibels

    assert in_decibels(None, exact=True) == "exact"
    assert in_decibels(20.014, exact=True) == "20.01 dB"
