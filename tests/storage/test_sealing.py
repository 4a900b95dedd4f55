"""Sealed ortho: what age protects, who opens it, and what a killed run leaves."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyrage
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import ortho_cli
from ortho_cli.decompose.edits import load_arrays, save_arrays
from ortho_cli.errors import ArtifactError, InternalError, ResourceError, UsageError
from ortho_cli.events import Event, Noted, Started, TensorDone
from ortho_cli.formats.open_artifact import open_artifact
from ortho_cli.formats.verify import verify
from ortho_cli.storage import sealing
from ortho_cli.storage.data_file import DataFile, TensorSpec, plan_layout
from ortho_cli.storage.work_folder import WorkFolder, work_folder
from tests.test_crash import run_and_die, split

Ortho = Callable[..., Any]
SEALED = "ortho.safetensors.age"
MARK = torch.tensor([31.25, -29.5, 30.125, -27.75, 28.625, -26.5, 25.875, -24.25]).bfloat16()


class Key:
    """An identity of age in a file, and its recipient."""

    def __init__(self, path: Path) -> None:
        identity = pyrage.x25519.Identity.generate()
        self.path, self.identity, self.recipient = path, identity, str(identity.to_public())
        path.write_text(f"# public key: {self.recipient}\n{identity}\n")


@pytest.fixture
def key(tmp_path: Path) -> Key:
    return Key(tmp_path / "key.txt")


@pytest.fixture
def passphrase(tmp_path: Path) -> Path:
    path = tmp_path / "passphrase"
    path.write_text("correct horse\n")
    return path


@pytest.fixture
def sealed(pico: Path, key: Key, ortho: Ortho) -> Path:
    out = pico.parent / "sealed"
    assert ortho("decompose", pico, "-o", out, "-q", "--seal-to", key.recipient).code == 0
    return out


@pytest.mark.parametrize("sets", [(), ("ortho.layout=compact",), ("ortho.density=0",)])
def test_content_is_that_of_an_unsealed_run(
    sets: tuple[str, ...], pico: Path, key: Key, tmp_path: Path
) -> None:
    other = Key(tmp_path / "other.txt")
    told = sealing.make_seal([key.recipient, other.recipient])
    split(pico, tmp_path / "plain", *sets)
    report = split(pico, tmp_path / "sealed", *sets, seal=told)
    names = {path.name for path in (tmp_path / "sealed").iterdir()}
    assert SEALED in names
    assert "ortho.safetensors" not in names
    for name in ("model.safetensors", "config.json", "model.safetensors.index.json"):
        same = (tmp_path / "plain" / name).read_bytes()
        assert (tmp_path / "sealed" / name).read_bytes() == same
    content = (tmp_path / "plain" / "ortho.safetensors").read_bytes()
    raw = (tmp_path / "sealed" / SEALED).read_bytes()
    assert raw.startswith(b"age-encryption.org/v1\n-> X25519 ")
    for one in (key, other):
        assert pyrage.decrypt(raw, [one.identity]) == content
    before = json.loads((tmp_path / "plain" / "report.json").read_text())
    assert report.pop("sealed_blake3")
    for one in (report, before):  # the card says what to keep private, by name
        assert one["side_files"].pop("README.md")
    assert report == before
    assert (tmp_path / "sealed" / SEALED).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("layout", ["csr", "compact"])
def test_ortho_that_would_be_published_plain_is_a_bug_that_is_told(
    pico: Path, key: Key, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    def plain(work: Any, name: str, layout: Any, key: Any) -> DataFile:
        return DataFile(work, name, layout, mode=0o600)

    monkeypatch.setattr("ortho_cli.storage.sealing.SealedFile", plain)
    told = sealing.make_seal([key.recipient])
    with pytest.raises(InternalError, match="ortho was to be sealed, and is not"):
        split(pico, tmp_path / "out", f"ortho.layout={layout}", seal=told)
    assert not (tmp_path / "out").exists()


def test_sealed_file_takes_tensors_whole_and_where_they_have_room(
    tmp_path: Path, key: Key, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = plan_layout((TensorSpec(key=name, dtype="U8", shape=(8,)) for name in "ab"), {})
    told = sealing.make_seal([key.recipient])
    sizes = {"scratch": {"ortho": sealing.scratch_bytes(layout, told)}}
    with WorkFolder(tmp_path / "out", identity=sizes, force=False) as work:
        file = sealing.SealedFile(work, "ortho", layout, sealing.WorkKey.make(told))
        for data, start in ((b"1234", 0), (b"1234", 4), (b"12345678", 1), (b"123456789", 0)):
            with pytest.raises(InternalError, match="of `a` are to be sealed, and it has 8"):
                file.write("a", memoryview(data), start=start)
        monkeypatch.setattr(sealing.WorkKey, "seal", lambda self, data: bytes(5000))
        with pytest.raises(InternalError, match=r"`a` takes 50.. bytes sealed, and has room for"):
            file.write("a", memoryview(b"12345678"), start=0)


def test_passphrase_opens_a_key_that_opens_ortho(
    pico: Path, artifact: Path, passphrase: Path, ortho: Ortho, tmp_path: Path
) -> None:
    out = tmp_path / "sealed"
    ran = ortho("decompose", pico, "-o", out, "--seal-passphrase-file", passphrase)
    assert ran.code == 0, ran.err
    assert f"ortho is sealed in {SEALED}" in ran.err + ran.out
    text = pyrage.passphrase.decrypt((out / "ortho.key.age").read_bytes(), "correct horse")
    identity = pyrage.x25519.Identity.from_str(text.decode())
    content = (artifact / "ortho.safetensors").read_bytes()
    assert pyrage.decrypt((out / SEALED).read_bytes(), [identity]) == content
    assert ortho("inspect", out, "--verify", "--identity", passphrase).code == 0
    passphrase.write_text("correct\n")
    ran = ortho("inspect", out, "--identity", passphrase)
    assert (ran.code, ran.out) == (6, "")
    assert f"the passphrase in `{passphrase}` does not open `{out / 'ortho.key.age'}`" in ran.err


@pytest.mark.skipif(shutil.which("age") is None, reason="no age command")
def test_age_itself_opens_it(sealed: Path, artifact: Path, key: Key) -> None:
    command = ["age", "-d", "-i", str(key.path), str(sealed / SEALED)]
    content = subprocess.run(command, capture_output=True, check=True).stdout
    assert content == (artifact / "ortho.safetensors").read_bytes()


def test_every_reader_opens_it_and_none_without_a_key(
    sealed: Path, artifact: Path, key: Key, ortho: Ortho, tmp_path: Path
) -> None:
    ran = ortho("inspect", sealed)
    assert ran.code == 0
    assert "sealed: --identity opens it" in ran.out
    checked = ortho("inspect", sealed, "--verify", "--json").json["verified"]["checked"]
    assert checked == {
        "model.safetensors": "every digest",
        SEALED: "its digest in report.json",
    }
    checked = ortho("inspect", sealed, "--verify", "--json", "--identity", key.path).json
    assert checked["verified"]["checked"]["ortho.safetensors"] == "every digest"
    assert checked["files"]["ortho.safetensors"] == (artifact / "ortho.safetensors").stat().st_size
    ran = ortho("convert", sealed, "--alpha", "1", "-o", tmp_path / "dense")
    assert ran.code == 6
    assert f"`{sealed / SEALED}` is sealed, and --alpha 1 needs it" in ran.err
    assert "hint: give --identity" in ran.err
    for source, options in ((sealed, ["--identity", key.path]), (artifact, [])):
        out = tmp_path / f"{source.name}-dense"
        ran = ortho("convert", source, "--alpha", "1", "-o", out, "-q", *options)
        assert ran.code == 0, ran.err
        assert not list(out.glob("ortho.*"))
    one, other = (tmp_path / f"{p.name}-dense" / "model.safetensors" for p in (sealed, artifact))
    assert one.read_bytes() == other.read_bytes()
    assert ortho("convert", sealed, "--alpha", "0", "-o", tmp_path / "zero", "-q").code == 0


def test_sealed_file_stands_for_its_artifact(sealed: Path, key: Key, ortho: Ortho) -> None:
    ran = ortho("inspect", sealed / SEALED, "--json", "--identity", key.path)
    assert ran.code == 0
    assert ran.json["files"][SEALED] == (sealed / SEALED).stat().st_size
    (sealed / "model.safetensors").unlink()
    ran = ortho("inspect", sealed, "--identity", key.path)
    assert ran.code == 6
    assert f"has {SEALED} and no base (model.safetensors)" in ran.err


def test_load_opens_it(sealed: Path, artifact: Path, key: Key) -> None:
    with pytest.raises(ArtifactError, match="is sealed, and alpha is not 0"):
        ortho_cli.load(sealed, alpha=1.0)
    tokens = torch.arange(12).unsqueeze(0)
    model = ortho_cli.load(sealed, alpha=1.0, identity=key.path)
    same = ortho_cli.load(artifact, alpha=1.0)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, same(tokens).logits)


def test_bench_opens_it(sealed: Path, key: Key, ortho: Ortho, tmp_path: Path) -> None:
    ran = ortho("bench", sealed, "--alpha", "1")
    assert ran.code == 6
    assert "is sealed, and alpha is not 0" in ran.err
    ran = ortho("bench", sealed, "--alpha", "1", "--identity", key.path)
    assert "sealed" not in ran.err  # it goes on to what it lacks else, a tokenizer that works


@pytest.mark.parametrize("what", ["cut", "flipped", "empty", "no age", "appended"])
@settings(max_examples=12, deadline=None)
@given(where=st.floats(0, 1, exclude_max=True))
def test_damage_is_told_and_nothing_of_it_used(what: str, where: float, made: Path) -> None:
    raw = bytearray(made.read_bytes())
    position = int(where * len(raw))
    if what == "flipped":
        raw[position] ^= 1
    elif what == "appended":
        raw += b"x" * (1 + position % 7)
    else:
        raw = {"cut": raw[:position], "empty": bytearray(), "no age": bytearray(b"PK" + raw)}[what]
    path = made.with_name("damaged.age")
    path.write_bytes(raw)
    keys = sealing.read_keys(made.with_name("key.txt"))
    with pytest.raises(ArtifactError, match=r"does not open") as caught:
        sealing.open_sealed(path, keys)
    assert caught.value.hint


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sealed file of three chunks."""
    folder = tmp_path_factory.mktemp("sealed")
    key = Key(folder / "key.txt")
    content = np.random.default_rng(0).bytes(150_000)
    (folder / "made.age").write_bytes(pyrage.encrypt(content, [key.identity.to_public()]))
    return folder / "made.age"


def test_another_key_and_another_artifact_are_refused(
    sealed: Path, pico: Path, key: Key, ortho: Ortho, tmp_path: Path
) -> None:
    stranger = Key(tmp_path / "stranger.txt")
    ran = ortho("inspect", sealed, "--identity", stranger.path)
    assert (ran.code, ran.out) == (6, "")
    assert f"`{stranger.path}` does not open `{sealed / SEALED}`" in ran.err
    assert "hint: give an identity that it was sealed to" in ran.err
    swapped = tmp_path / "swapped"
    options = ("-q", "--seal-to", key.recipient, "--set", "ortho.density=0.1")
    assert ortho("decompose", pico, "-o", swapped, *options).code == 0
    shutil.copy(swapped / SEALED, sealed / SEALED)
    ran = ortho("inspect", sealed, "--identity", key.path)
    assert ran.code == 6
    assert "belongs to plan" in ran.err
    ran = ortho("inspect", sealed, "--verify")
    assert ran.code == 6
    assert f"`{sealed / SEALED}` has BLAKE3" in ran.err


def test_two_orthos_beside_one_base_are_refused(sealed: Path, artifact: Path, ortho: Ortho) -> None:
    shutil.copy(artifact / "ortho.safetensors", sealed)
    ran = ortho("inspect", sealed)
    assert ran.code == 6
    assert "has both ortho.safetensors and ortho.safetensors.age" in ran.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seal-to", "age1xyz"], "`age1xyz`, which is no recipient"),
        (["--seal-to", "{secret}"], "--seal-to got a secret key"),
        (["--seal-to", "{public}", "--seal-passphrase-file", "{file}"], "were both given"),
        (["--seal-passphrase-file", "{empty}"], "is empty"),
        (["--seal-passphrase-file", "{absent}"], "cannot read"),
        (["--seal-to", "{public}", "--identity", "{broken}"], "key 1 of `"),
        (["--identity", "{key}"], "there is no --seal-to"),
    ],
)
def test_wrong_keys_are_refused_before_anything_is_written(
    options: list[str], message: str, pico: Path, key: Key, ortho: Ortho, tmp_path: Path
) -> None:
    names = {"empty": "\n", "file": "words", "broken": "AGE-SECRET-KEY-1OOO\n"}
    for name, text in names.items():
        (tmp_path / name).write_text(text)
    texts = {name: tmp_path / name for name in (*names, "absent")}
    texts |= {"secret": key.identity, "public": key.recipient, "key": key.path}
    before = set(tmp_path.iterdir())
    ran = ortho("decompose", pico, *(option.format(**texts) for option in options))
    assert (ran.code, ran.out) == (2, "")
    assert message in ran.err
    assert str(key.identity) not in ran.err
    assert set(tmp_path.iterdir()) == before


def test_sealing_says_what_to_install(pico: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyrage", None)
    with pytest.raises(UsageError, match="needs the package pyrage") as caught:
        sealing.make_seal(["age1xyz"])
    assert "ortho-cli[seal]" in caught.value.hint


def mark(source: Path) -> None:
    """Plant weights that ortho keeps side by side, so that their bytes can be looked for."""
    path = next(source.glob("*.safetensors"))
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight"][3, :8] = MARK
    save_file(tensors, path, metadata={"format": "pt"})


def holding(folder: Path, text: bytes) -> list[str]:
    found = [path for path in folder.rglob("*") if path.is_file() and text in path.read_bytes()]
    return sorted(path.name for path in found)


def killed(source: Path, out: Path, *recipients: str) -> Path:
    """SIGKILL a split in the middle; give the folder in which it worked."""
    run_and_die(source, out, "tensor 14", seal=sealing.make_seal(recipients))
    return work_folder(out)


def test_nothing_of_ortho_is_on_disk_in_plain(pico: Path, key: Key, tmp_path: Path) -> None:
    mark(pico)
    kept = MARK.view(torch.uint8).numpy().tobytes()
    folder = killed(pico, tmp_path / "plain")
    assert holding(folder, kept) == ["ortho.safetensors.partial"]  # it would be found
    folder = killed(pico, tmp_path / "sealed", key.recipient)
    assert json.loads((folder / "journal").read_text().splitlines()[-1])["name"]
    assert holding(folder, kept) == holding(folder, b'col_indices":{"dtype') == []
    assert holding(folder, str(key.identity).encode()) == []
    assert holding(folder, b"AGE-SECRET-KEY") == []
    split(pico, tmp_path / "sealed", seal=sealing.make_seal([key.recipient]))
    assert holding(tmp_path / "sealed", kept) == []
    assert kept in pyrage.decrypt((tmp_path / "sealed" / SEALED).read_bytes(), [key.identity])


@pytest.mark.parametrize("opens", [True, False])
def test_killed_run_goes_on_with_a_key_and_begins_anew_without(
    opens: bool, pico: Path, artifact: Path, key: Key, tmp_path: Path
) -> None:
    out = tmp_path / "sealed"
    folder = killed(pico, out, key.recipient)
    finished = len((folder / "journal").read_text().splitlines()) - 1
    assert finished > 5
    events: list[Event] = []
    split(
        pico,
        out,
        seal=sealing.make_seal([key.recipient]),
        keys=sealing.read_keys(key.path) if opens else None,
        on_event=events.append,
    )
    resumed = next(event.resumed for event in events if isinstance(event, Started))
    notes = [event.message for event in events if isinstance(event, Noted)]
    assert resumed == (finished if opens else 0)
    assert any("split again" in note for note in notes) != opens
    content = pyrage.decrypt((out / SEALED).read_bytes(), [key.identity])
    assert content == (artifact / "ortho.safetensors").read_bytes()
    base = (out / "model.safetensors").read_bytes()
    assert base == (artifact / "model.safetensors").read_bytes()
    verify(open_artifact(out, sealing.read_keys(key.path)))


def test_unfinished_work_is_for_its_recipients(
    pico: Path, key: Key, ortho: Ortho, tmp_path: Path
) -> None:
    out, other = tmp_path / "sealed", Key(tmp_path / "other.txt")
    killed(pico, out, key.recipient)
    for options in ([], ["--seal-to", other.recipient]):
        ran = ortho("decompose", pico, "-o", out, "-q", *options)
        assert ran.code == 8
        assert "another seal" in ran.err
    ran = ortho("decompose", pico, "-o", out, "-q", "--seal-to", other.recipient, "--force")
    assert ran.code == 0
    assert pyrage.decrypt((out / SEALED).read_bytes(), [other.identity])


def test_passphrase_of_unfinished_work_goes_on_with_it(pico: Path, passphrase: Path) -> None:
    out, told = pico.parent / "sealed", sealing.make_seal((), passphrase)

    def stop(event: Event) -> None:
        if isinstance(event, TensorDone) and event.name.endswith("1.mlp.up_proj.weight"):
            raise KeyboardInterrupt

    with pytest.raises(Exception, match="interrupted"):
        split(pico, out, seal=told, on_event=stop)
    events: list[Event] = []
    split(pico, out, seal=told, on_event=events.append)
    assert next(event.resumed for event in events if isinstance(event, Started)) > 0


def test_full_disk_while_sealing_leaves_nothing_that_looks_finished(
    pico: Path, key: Key, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, written = tmp_path / "sealed", sealing.write_all

    def full(fd: int, data: Any, offset: int) -> None:
        if SEALED in str(Path(f"/proc/self/fd/{fd}").readlink()) and offset > 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written(fd, data, offset)

    told = sealing.make_seal([key.recipient])
    monkeypatch.setattr(sealing, "write_all", full)
    with pytest.raises(ResourceError, match="no space left"):
        split(pico, out, seal=told)
    assert not out.exists()
    monkeypatch.setattr(sealing, "write_all", written)
    split(pico, out, seal=told, keys=sealing.read_keys(key.path))
    verify(open_artifact(out, sealing.read_keys(key.path)))


def test_edits_of_a_sealed_run_are_sealed(key: Key, tmp_path: Path) -> None:
    told = sealing.make_seal([key.recipient])
    assert told is not None
    one, other = sealing.WorkKey.make(told), sealing.WorkKey.make(told)
    arrays = {"w/positions": np.arange(1000, 1064), "w/codes": np.full(64, 5, np.int8)}
    path = tmp_path / "edits.npz"
    save_arrays(path, arrays, one)
    raw = path.read_bytes()
    assert arrays["w/positions"].tobytes() not in raw
    assert b"positions" not in raw
    found = load_arrays(path, one)
    assert found is not None
    assert all(np.array_equal(found[name], values) for name, values in arrays.items())
    assert load_arrays(path, other) is None
    save_arrays(path, arrays)
    assert b"positions" in path.read_bytes()
