from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jobs import decompose
from safetensors.torch import load_file, save_file

from ortho_cli.cli import app
from ortho_cli.cli.show import console
from ortho_cli.decompose.plan import make_plan
from ortho_cli.errors import ArtifactError
from ortho_cli.formats.artifact import is_artifact
from ortho_cli.formats.open_artifact import open_artifact
from ortho_cli.formats.verify import describe, verify
from ortho_cli.storage.checkpoint import read_shard


def flip(path: Path, position: int, mask: int = 0x10) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= mask
    path.write_bytes(content)


LAYOUTS = {
    "csr": "{layout: csr, density: 0.1}",
    "compact": "{layout: compact, density: 0.1}",
    "int8": "{layout: compact, values: int8, density: 0.1}",
    "columns": "{structure: columns, density: 0.1}",
    "columns int8": "{structure: columns, values: int8, density: 0.1}",
}
GOLDEN = Path(__file__).parent.parent / "golden"
FILES = ("model.safetensors", "ortho.safetensors")
Run = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def run() -> Run:
    """Run `ortho ARGUMENTS` with an error's bare words: rich takes longer than all the rest."""

    def command(*arguments: object) -> tuple[int, str]:
        said: list[str] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(console, "print_error", lambda e: said.append(f"{e.message} {e.hint}"))
            code = app.run([str(argument) for argument in arguments])
        return code, "".join(said)

    return command


@pytest.fixture(scope="module", params=LAYOUTS)
def tiny(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, run: Run
) -> Path:
    """An artifact of three tensors, two of them split; whoever damages it puts it right again."""
    folder = tmp_path_factory.mktemp(request.param)
    tensors = {
        "model.layers.0.up_proj.weight": torch.randn(8, 64).bfloat16(),
        "model.layers.0.down_proj.weight": torch.randn(4, 128).bfloat16(),
        "model.norm.weight": torch.ones(4).bfloat16(),
    }
    checkpoints.save(folder / "m", tensors)
    (folder / "m" / "config.json").write_text("{}")
    (folder / "m" / "additional_chat_templates").mkdir()
    (folder / "m" / "additional_chat_templates" / "tools.jinja").write_text("kept\n")
    layout = LAYOUTS[request.param]
    words = ("decompose", folder / "m", "-q", "--set", f"ortho={layout}")
    assert run(*words) == (0, "")
    return folder / "m-ortho"


def check(run: Run, path: Path, content: bytes, name: str = "") -> None:
    """See that `inspect --verify` finds fault with a file of other content, and names a tensor."""
    sound = path.read_bytes()
    path.write_bytes(content)
    try:
        code, said = run("inspect", path.parent, "--verify", "-q")
    finally:
        path.write_bytes(sound)
    assert code == 6, said
    assert f"`{name}" in said


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    where=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255), file=st.sampled_from(FILES)
)
def test_verify_finds_any_changed_byte_and_names_the_tensor_it_lies_in(
    tiny: Path, run: Run, where: float, mask: int, file: str
) -> None:
    path = tiny / file
    content = bytearray(path.read_bytes())
    position = int(where * len(content))
    content[position] ^= mask
    inside = [
        tensor.name
        for tensor in read_shard(path).tensors
        if tensor.offset <= position < tensor.offset + tensor.nbytes
    ]
    check(run, path, content, *inside)


def flips(path: Path, positions: Iterable[int]) -> Iterator[int]:
    """Yield each position in a file, with a bit flipped there meanwhile."""
    sound = path.read_bytes()
    for position in positions:
        flip(path, position, 1 << position % 8)
        yield position
        path.write_bytes(sound)


@pytest.mark.parametrize(("file", "alone"), [*((file, False) for file in FILES), (FILES[0], True)])
def test_verify_finds_any_flipped_byte_of_a_header(tiny: Path, file: str, alone: bool) -> None:
    """Straight to what `inspect` calls: a command takes fifty times longer than that."""
    ortho = tiny / "ortho.safetensors"
    content = ortho.read_bytes()
    if alone:
        ortho.unlink()
    length = int.from_bytes((tiny / file).read_bytes()[:8], "little")
    for position in flips(tiny / file, range(8 + length)):
        assert is_artifact(tiny, damaged=True), position
        with pytest.raises(ArtifactError):
            verify(open_artifact(tiny))
    ortho.write_bytes(content)
    verify(open_artifact(tiny))


def test_verify_finds_a_flipped_byte_of_a_side_file(tiny: Path) -> None:
    for file in (
        "config.json",
        "additional_chat_templates/tools.jinja",
        "model.safetensors.index.json",
    ):
        for _ in flips(tiny / file, range(0, (tiny / file).stat().st_size, 11)):
            with pytest.raises(ArtifactError, match=file):
                verify(open_artifact(tiny))
    (tiny / "additional_chat_templates" / "tools.jinja").unlink()
    verify(open_artifact(tiny))  # whoever publishes may leave files out
    (tiny / "additional_chat_templates" / "tools.jinja").write_text("kept\n")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    share=st.floats(0, 1, exclude_max=True),
    more=st.binary(max_size=40),
    file=st.sampled_from(FILES),
)
def test_verify_finds_a_file_that_is_cut_or_longer(
    tiny: Path, run: Run, share: float, more: bytes, file: str
) -> None:
    content = (tiny / file).read_bytes()
    check(run, tiny / file, content + more if more else content[: int(share * len(content))])


def test_verify_damage_in_a_tensor_is_named(artifact: Path) -> None:
    for file, part in (("model", "weight_packed"), ("ortho", "values")):
        name = f"model.layers.1.mlp.up_proj.{part}"
        path = artifact / f"{file}.safetensors"
        tensor = next(t for t in read_shard(path).tensors if t.name == name)
        flip(path, tensor.offset + 1)
        with pytest.raises(ArtifactError, match=f"tensor `{name}` of .* has BLAKE3"):
            verify(open_artifact(artifact))
        flip(path, tensor.offset + 1)


def test_verify_without_report_still_holds_the_pair(artifact: Path) -> None:
    (artifact / "report.json").unlink()
    assert verify(open_artifact(artifact)).checked == {
        "model.safetensors": "its digest in ortho",
        "ortho.safetensors": "its structure alone: without report.json no digest of it is known",
    }
    flip(artifact / "model.safetensors", -1)
    with pytest.raises(ArtifactError, match="has BLAKE3"):
        verify(open_artifact(artifact))


def test_lone_base_is_valid_and_a_lone_ortho_is_not(artifact: Path) -> None:
    ortho = (artifact / "ortho.safetensors").read_bytes()
    (artifact / "ortho.safetensors").unlink()
    opened = open_artifact(artifact)
    assert verify(opened).ortho is None
    assert describe(opened)["files"]["ortho.safetensors"] is None
    (artifact / "model.safetensors").unlink()
    (artifact / "ortho.safetensors").write_bytes(ortho)
    assert is_artifact(artifact)
    with pytest.raises(ArtifactError, match=r"has ortho\.safetensors and no base \(model"):
        open_artifact(artifact)


def test_ortho_of_another_base_is_refused(
    pico: Path, artifact: Path, ortho: Callable[..., Any], tmp_path: Path
) -> None:
    weights = load_file(pico / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] *= 2
    other = tmp_path / "other"
    shutil.copytree(pico, other)
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    assert ortho("decompose", other, "-q").code == 0
    shutil.copy(tmp_path / "other-ortho" / "ortho.safetensors", artifact / "ortho.safetensors")
    with pytest.raises(ArtifactError, match=r"belongs to base .* beside it is base"):
        open_artifact(artifact)
    (artifact / "report.json").unlink()
    with pytest.raises(ArtifactError, match="has BLAKE3"):
        verify(open_artifact(artifact))


def rewrite_ortho(artifact: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Write a changed ortho with the sound header's metadata, and drop the report's digests."""
    path = artifact / "ortho.safetensors"
    metadata = read_shard(path).metadata
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=metadata)
    (artifact / "report.json").unlink()


MODULE = "model.layers.0.mlp.up_proj"


def put(part: str, position: int, value: int) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{MODULE}.{part}"][position] = value

    return change


def swap_columns(tensors: dict[str, torch.Tensor]) -> None:
    crow = tensors[f"{MODULE}.crow_indices"]
    row = int((crow.diff() >= 2).nonzero()[0])
    start = int(crow[row])
    columns = tensors[f"{MODULE}.col_indices"]
    first, second = columns[start : start + 2].tolist()
    columns[start], columns[start + 1] = second, first


BROKEN: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "first pointer": (put("crow_indices", 0, 1), "does not climb from 0"),
    "last pointer": (put("crow_indices", -1, 0), "does not climb from 0"),
    "falling pointers": (put("crow_indices", 5, 60), "does not climb"),
    "column too far": (put("col_indices", -1, 9999), "names column 9999 of 64"),
    "columns out of order": (swap_columns, "does not ascend in row"),
    "tensor missing": (lambda t: t.pop(f"{MODULE}.values"), "values` is missing"),
    "tensor too many": (lambda t: t.update(x=torch.ones(1)), "`x` is not of any split weight"),
    "values of another dtype": (
        lambda t: t.update({f"{MODULE}.values": t[f"{MODULE}.values"].float()}),
        "is F32",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_verify_broken_csr_is_refused_even_without_digests(
    pico: Path, tmp_path: Path, ortho: Callable[..., Any], name: str
) -> None:
    assert (
        ortho("decompose", pico, "-o", tmp_path / "a", "-q", "--set", "ortho.density=0.05").code
        == 0
    )
    change, expected = BROKEN[name]
    rewrite_ortho(tmp_path / "a", change)
    with pytest.raises(ArtifactError, match=expected):
        verify(open_artifact(tmp_path / "a"))


def test_verify_index_that_names_ortho_is_refused(artifact: Path) -> None:
    path = artifact / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][f"{MODULE}.values"] = "ortho.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(ArtifactError, match="does not send all"):
        verify(open_artifact(artifact))


def test_describe_without_report_knows_shapes_and_counts(artifact: Path) -> None:
    full = {t["name"]: t for t in describe(open_artifact(artifact))["tensors"]}
    (artifact / "report.json").unlink()
    bare = {t["name"]: t for t in describe(open_artifact(artifact))["tensors"]}
    assert bare.keys() == full.keys()
    for name, tensor in bare.items():
        for key in ("action", "dtype", "shape", "bits_per_weight", "nnz"):
            assert tensor.get(key) == full[name].get(key), (name, key)


def drop(*path: Any) -> Callable[[Any], Any]:
    def change(report: Any) -> None:
        for key in path[:-1]:
            report = report[key]
        del report[path[-1]]

    return change


def set_to(value: Any, *path: Any) -> Callable[[Any], Any]:
    def change(report: Any) -> None:
        for key in path[:-1]:
            report = report[key]
        report[path[-1]] = value

    return change


LYING: dict[str, Callable[[Any], Any]] = {
    "no versions": drop("versions"),
    "no plan": drop("plan_sha256"),
    "totals a list": set_to([], "totals"),
    "totals without nnz": drop("totals", "nnz"),
    "tensors of numbers": set_to([1, 2], "tensors"),
    "tensors of nothing": set_to([{}], "tensors"),
    "a tensor left out": lambda report: report["tensors"].pop(),
    "a tensor too many": lambda report: report["tensors"].append({"name": "ghost"}),
    "another nnz": set_to(1, "tensors", 2, "nnz"),
    "another shape": set_to([1, 2], "tensors", 2, "shape"),
    "another action": set_to("copy", "tensors", 2, "action"),
    "bits a word": set_to("4", "tensors", 2, "bits_per_weight"),
    "decibels a list": set_to([], "tensors", 2, "sqnr_db_alpha_0"),
    "an older format": set_to("ortho/2", "format"),
}


@pytest.mark.parametrize("name", LYING)
def test_report_that_lies_or_is_none_is_refused(
    artifact: Path, ortho: Callable[..., Any], name: str
) -> None:
    path = artifact / "report.json"
    report = json.loads(path.read_text())
    LYING[name](report)
    path.write_text(json.dumps(report))
    for extra in ([], ["--verify"], ["--json"]):
        ran = ortho("inspect", artifact, *extra)
        assert ran.code == 6
        assert "report.json`: " in ran.err


def test_lone_base_shows_no_figure_of_the_ortho_that_is_gone(
    artifact: Path, ortho: Callable[..., Any]
) -> None:
    (artifact / "ortho.safetensors").unlink()
    ran = ortho("inspect", artifact, "--verify")
    assert ran.code == 0
    assert "ortho absent: only alpha = 0 is possible" in ran.out
    row = next(line for line in ran.out.splitlines() if "1.mlp.up_proj" in line)
    assert row.split()[-3:].count("-") == 2


def test_golden_artifact_of_version_1_still_opens() -> None:
    opened = open_artifact(GOLDEN / "ortho1")
    assert verify(opened).digest == "sha256"
    assert verify(opened).tensors == 8
    assert describe(opened)["totals"]["nnz"] == 10


def data_of(folder: Path) -> dict[str, bytes]:
    """Bytes of every tensor of an artifact, without its headers, which name the version."""
    opened = open_artifact(folder)
    assert opened.ortho is not None
    return {
        tensor.name: shard.path.read_bytes()[tensor.offset : tensor.offset + tensor.nbytes]
        for shard in (opened.base, opened.ortho)
        for tensor in shard.tensors
    }


GOLDEN_SETTINGS = {
    "ortho1": [],
    "ortho2": ["ortho={layout: compact, values: int8, density: 0.05}"],
    "ortho3": [],
    "ortho3-compact": ["ortho={layout: compact, values: int8, density: 0.05}"],
    "ortho3-columns": ["ortho={structure: columns, values: int8, density: 0.05}"],
}


@pytest.mark.parametrize("name", GOLDEN_SETTINGS)
def test_golden_artifacts_open_and_their_tensors_are_what_today_would_write(
    tmp_path: Path, name: str
) -> None:
    from ortho_cli.decompose.recipe import load_recipe
    from ortho_cli.storage.checkpoint import open_checkpoint

    source = open_checkpoint(GOLDEN / "source" / "tiny.safetensors")
    settings = load_recipe(None, GOLDEN_SETTINGS[name])
    decompose(make_plan(source, settings), source, tmp_path / "out")
    opened = open_artifact(GOLDEN / name)
    assert describe(opened)["format"] == f"ortho/{name[5]}"
    assert set(verify(opened).checked.values()) == {"every digest"}
    assert data_of(tmp_path / "out") == data_of(GOLDEN / name)


def test_verify_csr_longer_than_one_piece_is_sound(
    tmp_path: Path, ortho: Callable[..., Any]
) -> None:
    """Columns of 1.3 MB: they are read in pieces through one buffer."""
    save_file({"a.weight": torch.randn(1024, 1024).bfloat16()}, tmp_path / "m.safetensors")
    out = tmp_path / "out"
    done = ortho(
        "decompose", tmp_path / "m.safetensors", "-o", out, "-q", "--set", "ortho.density=0.6"
    )
    assert done.code == 0
    ran = ortho("inspect", out, "--verify", "-q")
    assert ran.code == 0, ran.err


def plain(folder: Path, tensors: dict[str, torch.Tensor], name: str = "model.safetensors") -> None:
    save_file(tensors, folder / name, metadata={"format": "pt"})


@pytest.mark.parametrize("beside", ["another model", "shards of one", "notes and a .bin"])
def test_force_replaces_no_folder_that_only_keeps_an_ortho_stream(
    pico: Path, artifact: Path, ortho: Callable[..., Any], tmp_path: Path, beside: str
) -> None:
    vault = tmp_path / "vault"
    vault.mkdir()
    shutil.copy(artifact / "ortho.safetensors", vault)
    if beside == "another model":
        plain(vault, load_file(pico / "model.safetensors"))
    elif beside == "shards of one":
        plain(vault, {"a": torch.ones(2)}, "model-00001-of-00001.safetensors")
    else:
        (vault / "thesis.txt").write_text("all of it")
        (vault / "pytorch_model.bin").write_bytes(b"weights")
    before = sorted(path.name for path in vault.iterdir())
    ran = ortho("decompose", pico, "-o", vault, "--force", "-q")
    assert ran.code == 8
    assert "exists and is no artifact" in ran.err
    assert sorted(path.name for path in vault.iterdir()) == before


@pytest.mark.parametrize("left", ["report.json", "ortho.safetensors"])
def test_plain_model_beside_what_an_artifact_left_is_read_as_one(
    pico: Path, artifact: Path, ortho: Callable[..., Any], left: str
) -> None:
    shutil.copy(artifact / left, pico / left)
    assert ortho("inspect", pico).code == 0
    assert ortho("convert", pico, "--dry-run").code == 0


@pytest.mark.parametrize("name", ["ortho1", "ortho2"])
@pytest.mark.parametrize("how", ["link", "copy", "rename"])
def test_older_base_under_the_name_that_others_look_for_is_sound(
    tmp_path: Path, ortho: Callable[..., Any], name: str, how: str
) -> None:
    folder = tmp_path / "g"
    shutil.copytree(GOLDEN / name, folder)
    old, new = folder / "base.safetensors", folder / "model.safetensors"
    if how == "link":
        new.symlink_to("base.safetensors")
    else:
        shutil.copy(old, new)
    if how == "rename":
        old.unlink()
    ran = ortho("inspect", folder, "--verify")
    assert ran.code == 0, ran.err
    assert f"ortho/{name[5]}, " in ran.out
