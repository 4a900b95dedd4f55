"""Models of very many tensors: work per tensor does not grow with their number, and is counted."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any

import bench_many
import checkpoints
import pytest
import torch
from conftest import Ortho
from hypothesis import given
from hypothesis import strategies as st

from ortho_cli.cli.show import console
from ortho_cli.decompose.settings import Patterns, matches
from ortho_cli.errors import CheckpointError
from ortho_cli.formats import quantization_config
from ortho_cli.formats.open_artifact import open_artifact
from ortho_cli.formats.statistics import open_statistics
from ortho_cli.runtime import module_files, pretrained
from ortho_cli.storage import strict_json
from ortho_cli.storage.data_file import TensorSpec, plan_layout

FEW, COUNTS = 6, (60, 120, 240)


def lines_run(work: Callable[[], object]) -> int:
    """Count the lines of the package that are run, each turn of a loop again; in all threads."""
    count = 0

    def local(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        count += event == "line"
        return local

    def enter(frame: FrameType, event: str, argument: object) -> Any:
        return local if "ortho_cli" in frame.f_code.co_filename else None

    before = sys.gettrace()
    threading.settrace(enter)
    sys.settrace(enter)
    try:
        work()
    finally:
        sys.settrace(before)
        threading.settrace(before)  # type: ignore[arg-type]
    return count


def growth(counts: Iterable[int]) -> float:
    """Say how much more the last tensors cost than those before: 2 each where all cost the same.

    What a command runs whatever it is given falls out.
    """
    one, two, four = counts
    return (four - two) / (two - one)


COMMANDS = {
    "inspect": "inspect {model} --json",
    "plan": "decompose {model} -o {new} --dry-run",
    "decompose": "decompose {model} -o {new} -q",
    "compact": "decompose {model} -o {new} -q --set ortho.layout=compact",
    "some kept": "decompose {model} -o {new} -q --recipe {some}",
    "some of 3 bits": "decompose {model} -o {new} -q --recipe {recipe}",
    "artifact": "inspect {out}",
    "verify": "inspect {out} --verify --json",
    "source": "inspect {out} --expect-source {model} -q",
    "named one by one": "decompose {model} -o {new} --dry-run -q --recipe {named}",
    "convert": "convert {model} -o {new} -q",
    "convert to many files": "convert {model} -o {new} -q --shard-size 4KB",
    "convert back": "convert {out} --alpha 1 -o {new} -q",
}


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Checkpoints of so many tensors, and what decompose makes of them."""
    from ortho_cli.cli import app

    made = {}
    for count in (FEW, *COUNTS):
        made[count] = tmp_path_factory.mktemp(f"many-{count}")
        bench_many.make(made[count] / "model", count, shards=2)
        words = ["decompose", str(made[count] / "model"), "-o", str(made[count] / "out"), "-q"]
        assert app.run(words) == 0
    return made


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_twice_the_tensors_take_twice_the_work(
    many: dict[int, Path], tmp_path: Path, ortho: Ortho, command: str
) -> None:
    recipe = tmp_path / "recipe.yaml"
    match = {"match": r"re:.*layers\.\d*[02468]\..*", "base": {"bits": 3}}
    recipe.write_text(json.dumps({"version": 1, "overrides": [match]}))
    some = tmp_path / "some.yaml"
    some.write_text(json.dumps({"version": 1, "ignore": ["re:.*[02468].down_proj.*"]}))

    def run(count: int) -> None:
        names = {"model": many[count] / "model", "out": many[count] / "out"}
        names["new"] = tmp_path / str(count)
        named = tmp_path / f"named-{count}.json"
        targets = bench_many.names(count)
        own = [{"match": name, "ortho": {"density": 0.01}} for name in targets[::2]]
        named.write_text(json.dumps({"version": 1, "targets": targets, "overrides": own}))
        ran = ortho(*command.format(recipe=recipe, some=some, named=named, **names).split())
        assert ran.code == 0, ran.err

    run(FEW)  # what is imported or compiled once
    assert growth([lines_run(lambda count=count: run(count)) for count in COUNTS]) < 2.3  # type: ignore[misc]


def test_statistics_of_twice_the_tensors_take_twice_the_work(
    many: dict[int, Path], tmp_path: Path
) -> None:
    found = []
    for count in COUNTS:
        path = tmp_path / f"{count}.safetensors"
        checkpoints.save_statistics(path, many[count] / "model")
        found.append(lines_run(lambda path=path: open_statistics(path)))  # type: ignore[misc]
    assert growth(found) < 2.3


def test_a_model_of_twice_the_layers_takes_twice_the_work_to_fill(many: dict[int, Path]) -> None:
    """Names that transformers gives other first parts are looked up, too."""
    found = []
    for count in COUNTS:
        opened = open_artifact(many[count] / "out")
        root = torch.nn.Module()
        for name in opened.split:
            parent = root
            for part in ("language", *name.split(".")[:-1]):
                if part not in parent._modules:
                    parent.add_module(part, torch.nn.Module())
                parent = parent.get_submodule(part)
            parent.add_module(name.rpartition(".")[2], torch.nn.Linear(64, 8, bias=False))
        found.append(
            lines_run(lambda root=root, opened=opened: pretrained.swap(root, opened))  # type: ignore[misc]
        )
        assert len(dict(module_files.empty_layers(opened))) == count
    assert growth(found) < 2.3


def test_patterns_of_twice_the_modules_take_twice_the_work() -> None:
    """Half of the experts split and half not, so that every name has to be spelled out."""
    found = []
    for count in COUNTS:
        names = [f"model.layers.{i % 7}.experts.{i}.up_proj" for i in range(count)]
        split, others = names[::2], names[1::2]
        found.append(
            lines_run(lambda a=split, b=others: quantization_config.patterns(a, against=b))  # type: ignore[misc]
        )
    assert growth(found) < 2.3


def entries(count: int) -> bytes:
    entry = '"{}":{{"dtype":"BF16","shape":[8,64],"data_offsets":[{},{}]}}'
    return ("{" + ",".join(entry.format(f"{i:048}", i, i + 1) for i in range(count)) + "}").encode()


def test_a_header_of_many_tensors_is_bounded_by_what_its_entries_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two hundred thousand split tensors are six hundred thousand of base."""
    raw = entries(3_000)
    loose = strict_json.needed(raw)
    monkeypatch.setattr(strict_json, "MAX_PARSED", loose - 1)
    assert strict_json.needed(raw) < 0.6 * loose
    assert 600_000 / 3_000 * strict_json.needed(raw) < 900_000_000
    hostile = b'{"a":[' + b"[]," * 3_000 + b"0]}"
    assert strict_json.needed(hostile) >= 250 * 6_000


def test_an_output_whose_header_no_reader_takes_is_refused_before_it_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    specs = [TensorSpec(key=f"{i:048}", dtype="BF16", shape=(8, 64)) for i in range(100)]
    plan_layout(specs, {})
    monkeypatch.setattr("ortho_cli.storage.data_file.MAX_PARSED", 100_000)
    with pytest.raises(CheckpointError, match="header of 100 tensors"):
        plan_layout(specs, {})


def test_a_compact_ortho_whose_header_no_reader_takes_is_refused_by_the_plan(
    many: dict[int, Path], tmp_path: Path, ortho: Ortho, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has five tensors where CSR has three."""
    monkeypatch.setattr("ortho_cli.storage.data_file.MAX_PARSED", 2_000_000)
    words = ["decompose", many[COUNTS[-1]] / "model", "-o", tmp_path / "out", "--dry-run"]
    assert ortho(*words).code == 0
    ran = ortho(*words, "--set", "ortho.layout=compact")
    assert ran.code == 4
    assert "header of 1200 tensors" in ran.err


def test_a_report_may_be_as_large_as_its_tensors_make_it(
    many: dict[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A report of 70,000 tensors has more bytes than any other JSON that is read."""
    folder = many[COUNTS[-1]] / "out"
    size = (folder / "report.json").stat().st_size
    monkeypatch.setattr(strict_json, "MAX_FILE", 2_000)
    monkeypatch.setattr(strict_json, "MAX_PARSED", 1_000_000)
    assert open_artifact(folder).report is not None
    with pytest.raises(CheckpointError, match=f"has {size} bytes; at most 2000 are read"):
        strict_json.read(folder / "report.json")


def test_a_table_of_many_rows_is_printed_in_pieces_and_whole(
    many: dict[int, Path], ortho: Ortho, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = many[COUNTS[0]] / "out"
    usual = ortho("inspect", folder).out
    monkeypatch.setattr(console, "ROWS", 7)
    found = ortho("inspect", folder).out
    assert [line.split() for line in found.splitlines()] == [
        line.split() for line in usual.splitlines()
    ]


@given(
    patterns=st.lists(st.text("ab.*?[]1", min_size=1, max_size=4), max_size=4),
    regular=st.sampled_from(["re:a.*b", "re:[ab]+$", "re:.*1"]),
    name=st.text("ab.*[]1", max_size=5),
)
def test_patterns_compiled_once_match_what_each_does(
    patterns: list[str], regular: str, name: str
) -> None:
    every = [*patterns, regular, *patterns]
    assert Patterns(every).matching(name) == [p for p in every if matches(p, name)]
