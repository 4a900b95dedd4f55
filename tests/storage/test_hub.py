"""Models by the Hub's name: read from its cache, or told how to get; the network is never asked."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from conftest import Ortho

from ortho_cli.errors import CheckpointError
from ortho_cli.storage import hub
from ortho_cli.storage.work_folder import user_cache


@pytest.fixture
def cached(pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with two snapshots of `org/tiny`, main at the first."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "hub" / "models--org--tiny"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc123")
    (folder / "refs" / "v2").write_text("def456")
    for commit in ("abc123", "def456"):
        shutil.copytree(pico, folder / "snapshots" / commit)
    return folder


@pytest.mark.parametrize(
    ("given", "commit"),
    [
        ("org/tiny", "abc123"),
        ("org/tiny/", "abc123"),
        ("org/tiny@v2", "def456"),
        ("org/tiny@def", "def456"),
        ("https://huggingface.co/org/tiny", "abc123"),
        ("https://huggingface.co/org/tiny/tree/v2", "def456"),
        ("hf://org/tiny", "abc123"),
        ("{cache}", "abc123"),
        ("{cache}/snapshots", "abc123"),
        ("{cache}/snapshots/def456", None),
    ],
)
def test_locate_name_of_a_cached_model_is_its_snapshot(
    cached: Path, given: str, commit: str | None
) -> None:
    path = Path(given.format(cache=cached))
    found, note = hub.locate(path)
    assert found == (cached / "snapshots" / commit if commit else path)
    assert (note is None) == (commit is None)
    assert commit is None or commit in str(note)


def test_locate_one_snapshot_without_main_is_taken_and_several_are_named(cached: Path) -> None:
    (cached / "refs" / "main").unlink()
    with pytest.raises(CheckpointError, match=r"2 snapshots, .*: abc123, def456") as caught:
        hub.locate(Path("org/tiny"))
    assert "snapshots/def456" in str(caught.value.hint)
    shutil.rmtree(cached / "snapshots" / "abc123")
    assert hub.locate(Path("org/tiny"))[0].name == "def456"
    with pytest.raises(CheckpointError, match="no snapshot fff"):
        hub.locate(Path("org/tiny@fff"))


def test_locate_folder_of_that_name_comes_before_the_cache(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    assert hub.locate(Path("org/tiny")) == (Path("org/tiny"), None)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"HF_HUB_CACHE": "/a"}, "/a"),
        ({"HF_HOME": "/h"}, "/h/hub"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub"),
        ({"HOME": "/me"}, "/me/.cache/huggingface/hub"),
    ],
)
def test_cache_is_where_huggingface_hub_has_it(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str
) -> None:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert hub.cache() == Path(expected)


@pytest.mark.parametrize("command", ["inspect", "decompose", "convert"])
def test_commands_read_a_cached_model_and_note_its_revision(
    cached: Path, tmp_path: Path, ortho: Ortho, command: str
) -> None:
    out = [] if command == "inspect" else ["-o", tmp_path / "out"]
    ran = ortho(command, "org/tiny", *out)
    assert ran.code == 0, ran.err
    assert "snapshots/abc123" in ran.err
    assert "snapshots/abc123" not in ortho("inspect", "org/tiny", "-q").err


@pytest.mark.parametrize(
    ("command", "given"),
    [
        ("inspect", ["meta/llama"]),
        ("decompose", ["meta/llama"]),
        ("convert", ["meta/llama"]),
        ("convert", ["meta/llama", "--alpha", "1"]),
        ("inspect", ["meta/llama", "--verify"]),
        ("calibrate", ["meta/llama", "--data", "x.txt"]),
        ("inspect", ["https://huggingface.co/meta/llama"]),
    ],
)
def test_commands_name_of_no_cached_model_says_how_to_get_it(
    ortho: Ortho, command: str, given: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    ran = ortho(command, *given)
    assert ran.code == 4
    assert "does not exist" in ran.err
    assert "`hf download meta/llama --local-dir llama`" in ran.err


@pytest.mark.parametrize("given", ["/a/b", "../x/y", "a/b/c", "x.safetensors", "a/b.gguf", "./a/b"])
def test_parse_path_is_no_name(given: str) -> None:
    named = hub.parse(Path(given))
    assert named is None or given == "./a/b"  # a Path does not keep its dot


def test_a_user_without_a_home_needs_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers run as numbers that no passwd file lists."""

    def unknown(user: object) -> None:
        raise KeyError(user)

    for name in ("HOME", "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    monkeypatch.chdir(tmp_path)
    assert user_cache() == Path("/.cache/ortho")
    assert not hub.cache().exists()
    assert hub.locate(Path("org/name")) == (Path("org/name"), None)
    monkeypatch.setenv("HF_HUB_CACHE", "~nobody-is-called-so/hub")
    assert hub.locate(Path("org/name")) == (Path("org/name"), None)
