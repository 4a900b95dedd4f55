"""Hints lead somewhere: each command that one holds is run, and the trouble is gone after it."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Ortho
from safetensors.torch import save_file

from ortho_cli.cli import boundary
from ortho_cli.decompose import settings
from ortho_cli.errors import CheckpointError, ResourceError, unreadable, way_out
from ortho_cli.storage import hints
from ortho_cli.storage.work_folder import unwritable

Make = Callable[[Path], list[object]]


def commands(text: str) -> list[list[str]]:
    """Find the commands of a hint: in backticks, a program or an option first."""
    hint = text.partition("hint: ")[2]
    return [shlex.split(part) for part in re.findall(r"`([^`]+)`", hint) if " " in part]


def llama_like(folder: Path) -> dict[str, torch.Tensor]:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "made-up"}')
    return {"model.layers.0.mlp.up_proj.weight": torch.ones(64, 64, dtype=torch.bfloat16)}


def torch_folder(place: Path) -> list[object]:
    folder = place / "a model's"
    torch.save(llama_like(folder), folder / "pytorch_model.bin")
    return ["decompose", folder]


def torch_file_of_a_folder(place: Path) -> list[object]:
    return ["inspect", torch_folder(place)[1] / "pytorch_model.bin"]  # type: ignore[operator]


def torch_file_alone(place: Path) -> list[object]:
    torch.save(llama_like(place / "m"), place / "-x.pt")
    return ["decompose", place / "-x.pt"]


def torch_under_a_wrong_name(place: Path) -> list[object]:
    folder = place / "m"
    torch.save(llama_like(folder), folder / "model.safetensors")
    return ["decompose", folder]


def float64(place: Path) -> list[object]:
    tensors = llama_like(place / "m")
    save_file({k: t.double() for k, t in tensors.items()}, place / "m" / "model.safetensors")
    return ["decompose", place / "m"]


def bins_in_a_safetensors_index(place: Path) -> list[object]:
    folder = place / "m"
    tensors = llama_like(folder)
    torch.save(tensors, folder / "part-1.bin")
    index = {"weight_map": dict.fromkeys(tensors, "part-1.bin")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return ["decompose", folder]


def two_files(place: Path) -> list[object]:
    tensors = llama_like(place / "m")
    for name in ("x", "y"):
        save_file(tensors, place / "m" / f"{name}.safetensors")
    return ["decompose", place / "m"]


def safetensors_named_bin_index(place: Path) -> list[object]:
    folder = place / "m"
    save_file(llama_like(folder), folder / "model.fp16-1.safetensors")
    for name in ("model.fp16", "consolidated"):
        index = {"weight_map": {next(iter(llama_like(place / name))): "model.fp16-1.safetensors"}}
        (folder / f"{name}.safetensors.index.json").write_text(json.dumps(index))
    return ["decompose", folder]


SOURCES: dict[str, Make] = {
    "a folder of torch": torch_folder,
    "a torch file of a folder": torch_file_of_a_folder,
    "a torch file alone": torch_file_alone,
    "torch named .safetensors": torch_under_a_wrong_name,
    "float64": float64,
    ".bin in a safetensors index": bins_in_a_safetensors_index,
    "two files": two_files,
    "two indexes": safetensors_named_bin_index,
}


@pytest.mark.parametrize("name", SOURCES)
def test_hint_commands_make_a_source_that_can_be_split(
    tmp_path: Path, ortho: Ortho, name: str
) -> None:
    arguments = SOURCES[name](tmp_path)
    ran = ortho(*arguments)
    assert ran.code == 4
    found = commands(ran.err)
    assert found
    made = Path(str(arguments[1]))
    for program, *words in found:
        if program == "mv":
            shutil.move(*words)
            continue
        assert program == "ortho"
        done = ortho(*words)
        assert done.code == 0, done.err
        made = Path(re.search(r"^(.*?): \d", done.err + done.out, re.M)[1])  # type: ignore[index]
    assert ortho("inspect", made).code == 0


ODD: dict[str, tuple[dict[str, int], list[str]]] = {
    "one tower": ({"v.blocks.{}.mlp.fc2": 3420 // 9, "m.layers.{}.mlp.up": 128}, []),
    "all fit 16": ({"v.blocks.{}.mlp.fc2": 80, "m.layers.{}.mlp.up": 128}, []),
    "beside what is ignored": (
        {"v.blocks.{}.fc2": 380, "m.layers.{}.up": 128, "x.y.{}.z": 68},
        ['ignore=["re:x.*"]'],
    ),
    "a size that is asked for": ({"m.layers.{}.up": 64, "m.layers.{}.odd": 70}, [
        "base.group_size=64"
    ]),
    "one tensor": ({"m.layers.0.up": 128, "top.odd": 68}, []),
    "the same name in another width": ({"m.layers.{}.up": 128, "m.layers.7.up": 68}, []),
    "signs in names": ({"m+1(x).{}.odd": 68, "m.layers.{}.up": 128}, []),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_hint_on_odd_widths_counts_them_and_fits_all(
    tmp_path: Path, ortho: Ortho, name: str
) -> None:
    widths, sets = ODD[name]
    tensors = {
        f"{module.format(i)}.weight": torch.ones(8, width, dtype=torch.bfloat16)
        for module, width in widths.items()
        for i in range(3)
    }
    save_file(tensors, tmp_path / "m.safetensors")
    given = [word for one in sets for word in ("--set", one)]
    ran = ortho("inspect", tmp_path / "m.safetensors", *given)
    assert ran.code == 3
    odd = sum(t.shape[1] % 32 != 0 for t in tensors.values()) - ("x.y." in str(tensors)) * 3
    assert ("more tensors have" in ran.err) == (odd > 1)
    found = commands(ran.err)
    assert found
    for words in found:
        again = ortho("inspect", tmp_path / "m.safetensors", *given, *words)
        assert again.code == 0, (words, again.err)


def test_hint_on_widths_of_which_none_fits_offers_nothing_that_leaves_nothing(
    tmp_path: Path, ortho: Ortho
) -> None:
    save_file({"a.weight": torch.ones(8, 68)}, tmp_path / "m.safetensors")
    ran = ortho("inspect", tmp_path / "m.safetensors")
    assert ran.code == 3
    assert "ignore" not in ran.err


@pytest.mark.parametrize("others", [True, False])
def test_hint_keep_is_given_only_where_something_is_left_to_split(
    tmp_path: Path, ortho: Ortho, others: bool
) -> None:
    tensors = {"m.experts.weight": torch.ones(2, 64, 64, dtype=torch.bfloat16)}
    if others:
        tensors["m.up_proj.weight"] = torch.ones(64, 64, dtype=torch.bfloat16)
    save_file(tensors, tmp_path / "m.safetensors")
    ran = ortho("inspect", tmp_path / "m.safetensors")
    assert ran.code == 4
    assert ("on_unsupported=keep" in ran.err) == others
    if others:
        kept = ortho("inspect", tmp_path / "m.safetensors", *commands(ran.err)[0])
        assert kept.code == 0


def test_hint_on_fp8_without_scales_names_convert(tmp_path: Path, ortho: Ortho) -> None:
    save_file(
        {"a.up_proj.weight": torch.zeros(64, 64).to(torch.float8_e4m3fn)},
        tmp_path / "m.safetensors",
    )
    ran = ortho("decompose", tmp_path / "m.safetensors")
    assert ran.code == 4
    assert f"`ortho convert {tmp_path}/m.safetensors`" in ran.err
    assert "keep" not in ran.err


def test_hint_on_several_gguf_names_one_of_them(tmp_path: Path, ortho: Ortho) -> None:
    for name in ("a-Q8_0.gguf", "a-BF16.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    for command in ("decompose", "inspect"):
        assert f"`ortho convert {tmp_path}/a-BF16.gguf`" in ortho(command, tmp_path).err


@pytest.mark.parametrize(
    ("number", "hint"),
    [
        (errno.EMFILE, "ulimit -n"),
        (errno.ENAMETOOLONG, "shorter"),
        (errno.ENOSPC, "free space"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "another"),
        (errno.EISDIR, "give a file"),
        (errno.ENOTDIR, "check the path"),
        (errno.ELOOP, "link"),
        (errno.EIO, "disk"),
        (errno.ESTALE, "mount"),
    ],
)
def test_way_out_of_what_the_system_says_reaches_every_error(number: int, hint: str) -> None:
    error = OSError(number, os.strerror(number), "/x/y")
    assert hint in way_out(error, "nothing")
    assert hint in str(unreadable(Path("/x"), error, kind=CheckpointError, hint="no").hint)
    assert hint in str(unwritable(Path("/x"), error).hint)
    failure = boundary._as_ortho_error(error, (), {})
    assert isinstance(failure, ResourceError)
    assert hint in str(failure.hint)


def test_way_out_of_a_right_that_lacks_names_the_path() -> None:
    error = PermissionError(errno.EACCES, "Permission denied", "/x/my model")
    assert "`ls -ld '/x/my model'`" in way_out(error, "nothing")
    assert "your rights" in str(unwritable(Path("/x"), error).hint)
    assert way_out(OSError(errno.ENOENT, "no"), "what the caller knows") == "what the caller knows"


@pytest.mark.parametrize(
    ("path", "expected"),
    [("a b", "'a b'"), ("-x", "./-x"), ("it's", "'it'\"'\"'s'"), ("~", "./~"), ("/a/b", "/a/b")],
)
def test_said_path_comes_back_through_a_shell(path: str, expected: str) -> None:
    word = hints.said(Path(path))
    assert word.replace("'./", "./'") == expected or shlex.split(word) == shlex.split(expected)
    assert Path(shlex.split(word)[0]) == Path(path)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["a", "--out=~/x"], ["a", "--out=/users/me/x"]),
        (["-o", "~/x"], ["-o", "/users/me/x"]),
        (["-o~/x"], ["-o/users/me/x"]),
        (["~", "--data", "~/a", "~/b"], ["/users/me", "--data", "/users/me/a", "/users/me/b"]),
        (["./~/x", "a~b", "--out=./~"], ["./~/x", "a~b", "--out=./~"]),
        (["--set", "~a=1", "--prompt", "~/x"], ["--set", "~a=1", "--prompt", "~/x"]),
        (["--set=~b"], ["--set=~b"]),
        (["--out=~nobody-is-called-so/x"], ["--out=~nobody-is-called-so/x"]),
        (["--recipe=~/r.yaml"], ["--recipe=/users/me/r.yaml"]),
    ],
)  # fmt: skip
def test_expand_home_words_that_are_paths(
    monkeypatch: pytest.MonkeyPatch, given: list[str], expected: list[str]
) -> None:
    monkeypatch.setenv("HOME", "/users/me")
    assert boundary.expand_home(given) == expected


def test_expand_home_output_lands_in_it(
    pico: Path, tmp_path: Path, ortho: Ortho, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "~").mkdir()
    monkeypatch.chdir(tmp_path)
    assert ortho("decompose", pico, "--out=~/x", "-q").code == 0
    assert (tmp_path / "home" / "x" / "report.json").is_file()
    assert ortho("decompose", pico, "--out=./~/y", "-q").code == 0
    assert (tmp_path / "~" / "y" / "report.json").is_file()


def test_fold_names_patterns_match_theirs_and_no_others() -> None:
    names = [f"a.blocks.{i}.odd-{i}.weight" for i in range(12)] + ["b[0].1.x.weight", "c.2.w"]
    others = ["a.blocks.x.odd-1.weight", "a.blocks.12.odd-12.weights", "b.1.x.weight"]
    found = settings.fold_names(names, others)
    assert len(found) == 3
    assert all(any(settings.matches(p, name) for p in found) for name in names)
    assert not any(settings.matches(p, other) for p in found for other in others)
