"""`ortho convert`: plans, casts, shards, artifacts at an alpha, kills in the middle."""

from __future__ import annotations

import json
import os
import signal
import stat
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from conftest import Ortho, SmallTiles
from jobs import SERVER
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ortho_cli.cli.options import parse_size
from ortho_cli.convert import job as work
from ortho_cli.convert.plan import make_plan
from ortho_cli.convert.sources.open_source import open_source
from ortho_cli.errors import (
    ArtifactError,
    CheckpointError,
    Interrupted,
    NumericalError,
    OutputExistsError,
    UsageError,
)
from ortho_cli.events import Event, TensorDone
from ortho_cli.storage import job
from ortho_cli.storage.checkpoint import open_checkpoint
from ortho_cli.storage.work_folder import work_folder

SERVER.set_forkserver_preload(["ortho_cli.convert.job"])


def weights(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def contents(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def test_folder_is_copied_tensor_for_tensor_with_its_other_files(pico: Path, ortho: Ortho) -> None:
    ran = ortho("convert", pico, "--json")
    assert ran.code == 0
    assert ran.err == ""
    out = pico.parent / "pico-converted"
    assert ran.json["run"]["output"] == str(out)
    assert ran.json["totals"]["tensors"] == 20
    source, found = weights(pico), weights(out)
    assert source.keys() == found.keys()
    assert all(torch.equal(source[name], found[name]) for name in source)
    assert json.loads((out / "config.json").read_text()) == json.loads(
        (pico / "config.json").read_text()
    )
    assert sorted(contents(out)) == sorted(contents(pico))
    assert not work_folder(out).exists()
    open_checkpoint(out)


def test_default_output_is_named_after_the_file(pico: Path, ortho: Ortho) -> None:
    (pico.parent / "alone").mkdir()
    file = (pico / "model.safetensors").rename(pico.parent / "alone" / "file.safetensors")
    assert ortho("convert", file, "-q").code == 0
    assert sorted(contents(file.parent / "file-converted")) == ["model.safetensors"]


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
def test_cast_rounds_floating_tensors_once_and_config_says_so(
    tmp_path: Path, ortho: Ortho, name: str
) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    tensors = {
        "w.weight": torch.randn(9, 5),
        "half": torch.tensor([1.5, 2.0**-24], dtype=torch.float16),
        "double": torch.tensor([1 / 3, float("nan"), float("inf")], dtype=torch.float64),
        "counts": torch.arange(5),
        "mask": torch.tensor([True, False]),
    }
    save_file(tensors, folder / "model.safetensors")
    config = {"torch_dtype": "float64", "text_config": {"dtype": "float64", "n": 1}, "other": "x"}
    (folder / "config.json").write_text(json.dumps(config))
    assert ortho("convert", folder, "--dtype", name, "-q").code == 0
    found = weights(tmp_path / "m-converted")
    dtype = getattr(torch, name)
    for key, tensor in tensors.items():
        wanted = tensor.to(dtype) if tensor.is_floating_point() else tensor
        assert found[key].dtype == wanted.dtype
        assert torch.equal(bits(found[key]), bits(wanted)), key
    told = json.loads((tmp_path / "m-converted" / "config.json").read_text())
    assert told == {"torch_dtype": name, "text_config": {"dtype": name, "n": 1}, "other": "x"}


def test_finite_value_that_would_become_infinite_is_refused_by_place(
    tmp_path: Path, ortho: Ortho
) -> None:
    weight = torch.zeros(3, 4)
    weight[2, 1] = 70000.0
    weight[0, 0] = float("inf")  # may stay what it is
    save_file({"w.weight": weight}, tmp_path / "m.safetensors")
    ran = ortho("convert", tmp_path / "m.safetensors", "--dtype", "float16")
    assert ran.code == NumericalError.exit_code
    assert "`w.weight` holds 70000 at [2, 1], which is infinite in F16" in ran.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.safetensors"]
    ran = ortho("convert", tmp_path / "m.safetensors", "--dtype", "bfloat16")
    assert ran.code == 0


def test_shards_fill_up_in_order_and_the_index_names_them(pico: Path, ortho: Ortho) -> None:
    source = weights(pico)
    assert ortho("convert", pico, "--shard-size", "50KB", "-q").code == 0
    out = pico.parent / "pico-converted"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    count = len(files)
    assert count > 2
    assert files == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in source.values())
    sizes = [sum(t.nbytes for t in load_file(out / file).values()) for file in files]
    assert max(sizes) <= 50_000
    names = sorted(source)
    for i, file in enumerate(files[1:]):
        first = next(name for name in names if index["weight_map"][name] == file)
        assert sizes[i] + source[first].nbytes > 50_000  # it did not fit before
    found = weights(out)
    assert all(torch.equal(source[name], found[name]) for name in source)
    open_checkpoint(out)


def test_tensor_above_the_shard_size_stands_alone(pico: Path, ortho: Ortho) -> None:
    assert ortho("convert", pico, "--shard-size", "1B", "-q").code == 0
    assert len(list((pico.parent / "pico-converted").glob("*.safetensors"))) == 20


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("1.5 MB", 1_500_000),
        ("2gib", 2**31),
        ("7B", 7),
        ("7000000", 7_000_000),
        ("3kb", 3000),
    ],
)
def test_size_is_read_as_transformers_reads_it(text: str, size: int) -> None:
    assert parse_size(text, option="--shard-size") == size


@pytest.mark.parametrize("text", ["5", "0", "", "-5GB", "GB", "5XB", "nan", "0.1"])
def test_size_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"^--max-memory") as caught:
        parse_size(text, option="--max-memory")
    assert "--shard-size" not in str(caught.value.hint)


def test_dry_run_writes_nothing_and_its_sizes_come_true(pico: Path, ortho: Ortho) -> None:
    before = sorted(pico.parent.rglob("*"))
    planned = ortho("convert", pico, "--dry-run", "--json", "--dtype", "float32").json
    ran = ortho("convert", pico, "--dry-run")
    assert ran.err == ""
    assert "model.layers.*.mlp.down_proj.weight" in ran.out
    assert sorted(pico.parent.rglob("*")) == before
    done = ortho("convert", pico, "--json", "--dtype", "float32").json
    out = pico.parent / "pico-converted"
    sizes = {name: len(data) for name, data in contents(out).items()}
    assert {file["name"]: file["size"] for file in planned["files"]} == sizes
    for tensor in planned["tensors"]:
        data = (out / tensor["file"]).read_bytes()[tensor["offset"] :][: tensor["nbytes"]]
        assert data == weights(out)[tensor["name"]].numpy().tobytes()
    assert done["plan_sha256"] == planned["plan_sha256"]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("small", [False, True])
def test_artifact_at_alpha_is_the_slow_twins(
    pico: Path,
    artifact: Path,
    ortho: Ortho,
    alpha: float,
    small: bool,
) -> None:
    source = weights(pico)
    base = load_file(artifact / "model.safetensors")
    ortho_file = load_file(artifact / "ortho.safetensors")
    out = pico.parent / "out"
    sizes = SmallTiles()
    with sizes.in_commands() if small else nullcontext():
        assert ortho("convert", artifact, "--alpha", alpha, "-o", out, "-q").code == 0
    if small:
        sizes.prove("convert")
    found = weights(out)
    assert found.keys() == source.keys()
    for name, tensor in found.items():
        module = name.removesuffix(".weight")
        if f"{module}.values" not in ortho_file:
            assert torch.equal(tensor, source[name])
            continue
        if ".layers.0." in name and not small:
            continue  # the slow twin is slow
        wanted = reference.dense(base, ortho_file, module, alpha).to(tensor.dtype)
        assert torch.equal(bits(tensor), bits(wanted)), name
        if alpha == 1.0:
            counts = ortho_file[f"{module}.crow_indices"].diff()
            row = torch.repeat_interleave(torch.arange(len(counts)), counts)
            column = ortho_file[f"{module}.col_indices"].long()
            assert row.numel() > 0
            assert torch.equal(bits(tensor[row, column]), bits(source[name][row, column]))


def test_alpha_one_gives_sources_back_bit_for_bit_whatever_base_became(
    pico: Path, pico_tensors: dict[str, Tensor], ortho: Ortho
) -> None:
    """On an edited base, base + (w - base) would round: here to nothing of w."""
    source = {name: tensor.float() for name, tensor in pico_tensors.items()}
    save_file(source, pico / "model.safetensors", metadata={"format": "pt"})
    assert ortho("decompose", pico, "--set", "ortho.density=1.0", "-q").code == 0
    file = pico.parent / "pico-ortho" / "model.safetensors"
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    base = load_file(file)
    for name, tensor in base.items():
        if name.endswith("weight_scale"):
            tensor.mul_(1e6)
    save_file(base, file, metadata=metadata)
    assert ortho("convert", file.parent, "--alpha", "1", "-q").code == 0
    found = weights(pico.parent / "pico-ortho-alpha-1")
    assert all(torch.equal(bits(found[name]), bits(source[name])) for name in source)


def test_dense_result_is_a_folder_without_traces_of_int4(
    pico: Path, artifact: Path, ortho: Ortho
) -> None:
    assert ortho("convert", artifact, "--alpha", "1", "-q").code == 0
    out = pico.parent / "pico-ortho-alpha-1"
    assert sorted(contents(out)) == sorted(contents(pico))
    assert json.loads((out / "config.json").read_text()) == json.loads(
        (pico / "config.json").read_text()
    )
    assert stat.S_IMODE((out / "model.safetensors").stat().st_mode) == 0o600
    assert ortho("convert", artifact, "--alpha", "0", "--force", "-o", out, "-q").code == 0
    assert stat.S_IMODE((out / "model.safetensors").stat().st_mode) == 0o644


@pytest.mark.filterwarnings("ignore")  # other people's deprecations
@pytest.mark.parametrize("alpha", [0, 1])
def test_transformers_loads_the_dense_result_whole(
    pico: Path, artifact: Path, ortho: Ortho, alpha: int
) -> None:
    from transformers import AutoModelForCausalLM

    assert ortho("convert", artifact, "--alpha", alpha, "-q").code == 0
    out = pico.parent / f"pico-ortho-alpha-{alpha}"
    (out / "tokenizer.json").unlink()
    model, told = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    found = weights(out)["model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(model.model.layers[1].mlp.down_proj.weight, found)


def test_alpha_zero_needs_no_ortho_and_any_other_does(
    pico: Path, artifact: Path, ortho: Ortho
) -> None:
    assert ortho("convert", artifact, "--alpha", "0", "-o", pico.parent / "with", "-q").code == 0
    (artifact / "ortho.safetensors").unlink()
    assert ortho("convert", artifact, "--alpha", "0", "-o", pico.parent / "alone", "-q").code == 0
    assert contents(pico.parent / "alone") == contents(pico.parent / "with")
    ran = ortho("convert", artifact, "--alpha", "0.5", "-o", pico.parent / "no")
    assert ran.code == ArtifactError.exit_code
    assert "--alpha 0.5 needs it" in ran.err


@pytest.mark.parametrize("alpha", ["nan", "-0.1", "1.1", "inf"])
def test_alpha_outside_its_range_is_refused(artifact: Path, ortho: Ortho, alpha: str) -> None:
    ran = ortho("convert", artifact, f"--alpha={alpha}")
    assert ran.code == UsageError.exit_code
    assert "not in [0, 1]" in ran.err


def test_alpha_is_required_for_artifacts_and_refused_elsewhere(
    pico: Path, artifact: Path, ortho: Ortho
) -> None:
    ran = ortho("convert", artifact)
    assert (ran.code, "no --alpha" in ran.err) == (UsageError.exit_code, True)
    ran = ortho("convert", artifact / "model.safetensors")
    assert (ran.code, "no --alpha" in ran.err) == (UsageError.exit_code, True)
    ran = ortho("convert", pico, "--alpha", "1")
    assert (ran.code, "is no artifact" in ran.err) == (UsageError.exit_code, True)
    ran = ortho("convert", pico, "--dtype", "int8")
    assert (ran.code, "none of bfloat16" in ran.err) == (UsageError.exit_code, True)


@pytest.mark.parametrize("part", ["crow_indices", "col_indices", "far"])
def test_ortho_that_makes_no_sense_is_refused_before_it_is_used(
    pico: Path, artifact: Path, ortho: Ortho, part: str
) -> None:
    file = artifact / "ortho.safetensors"
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    name = "model.layers.0.mlp.down_proj."
    if part == "crow_indices":
        tensors[f"{name}crow_indices"][3] = 2**30
    elif part == "col_indices":
        turned = tensors[f"{name}col_indices"].numpy()[::-1].copy()
        tensors[f"{name}col_indices"] = torch.from_numpy(turned)
    else:
        columns = tensors[f"{name}col_indices"].numpy().copy()
        columns[-1] = np.uint16(192)
        tensors[f"{name}col_indices"] = torch.from_numpy(columns)
    save_file(tensors, file, metadata=metadata)
    ran = ortho("convert", artifact, "--alpha", "1")
    assert ran.code == ArtifactError.exit_code
    assert "model.layers.0.mlp.down_proj.weight` has" in ran.err
    assert not (pico.parent / "pico-ortho-alpha-1").exists()
    assert not work_folder(pico.parent / "pico-ortho-alpha-1").exists()


def test_force_replaces_only_what_convert_made(
    pico: Path, artifact: Path, ortho: Ortho, tmp_path: Path
) -> None:
    out = tmp_path / "pico-converted"
    assert ortho("convert", pico, "-q").code == 0
    ran = ortho("convert", pico)
    assert (ran.code, "exists" in ran.err) == (OutputExistsError.exit_code, True)
    assert ortho("convert", pico, "--force", "--dtype", "float32", "-q").code == 0
    assert weights(out)["model.norm.weight"].dtype == torch.float32
    before = contents(artifact)
    ran = ortho("convert", pico, "-o", artifact, "--force")
    assert (ran.code, "is no converted" in ran.err) == (OutputExistsError.exit_code, True)
    assert contents(artifact) == before
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("precious")
    assert ortho("convert", pico, "-o", other, "--force").code == OutputExistsError.exit_code


def test_source_and_output_stay_apart(pico: Path, ortho: Ortho) -> None:
    for out in (pico, pico / "inside", pico.parent):
        ran = ortho("convert", pico, "-o", out, "--force")
        assert ran.code == UsageError.exit_code, out
    ran = ortho("convert", pico / "model.safetensors", "-o", pico)
    assert ran.code == UsageError.exit_code


def test_missing_or_unknown_sources_are_refused(tmp_path: Path, ortho: Ortho) -> None:
    ran = ortho("convert", tmp_path / "nowhere")
    assert (ran.code, "does not exist" in ran.err) == (CheckpointError.exit_code, True)
    (tmp_path / "m.onnx").write_bytes(b"x")
    assert ortho("convert", tmp_path / "m.onnx").code == CheckpointError.exit_code


def converted(source: Path, out: Path, alpha: float | None = None, **options: Any) -> None:
    opened = open_source(source, alpha=alpha)
    try:
        plan = make_plan(opened, shard_size=50_000)
        target = work.check_target(plan, opened, out, force=options.pop("force", False))
        work.convert(plan, opened, target, **options)
    finally:
        opened.close()


def convert_and_die(source: Path, out: Path, alpha: float | None, moment: str) -> None:
    job.COMMIT_SECONDS = 0.0
    kind, number = moment.split()
    seen = 0

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def watch(event: Event) -> None:
        nonlocal seen
        seen += isinstance(event, TensorDone)
        if kind == "tensor" and seen == int(number):
            die()

    if kind == "rename":
        original, left = Path.rename, int(number)

        def rename(self: Path, target: Any) -> Path:
            nonlocal left
            if left == 0:
                die()
            left -= 1
            return original(self, target)

        Path.rename = rename  # type: ignore[method-assign]
    converted(source, out, alpha, on_event=watch)


def run_and_die(source: Path, out: Path, alpha: float | None, moment: str) -> None:
    process = SERVER.Process(target=convert_and_die, args=(source, out, alpha, moment))
    process.start()
    process.join(600)  # a busy machine is no fault of the code
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("moment", ["tensor 1", "tensor 8", "tensor 20", "rename 0", "rename 3"])
@pytest.mark.parametrize("kind", ["folder", "artifact"])
def test_kill_leaves_no_output_and_the_rerun_gives_the_same_bytes(
    pico: Path, artifact: Path, tmp_path: Path, kind: str, moment: str
) -> None:
    source, alpha = (artifact, 0.5) if kind == "artifact" else (pico, None)
    out = tmp_path / "out"
    run_and_die(source, out, alpha, moment)
    assert not out.exists()
    again: list[str] = []

    def watch(event: Event) -> None:
        if isinstance(event, TensorDone):
            again.append(event.name)

    converted(source, out, alpha, on_event=watch)
    finished = 20 if moment.startswith("rename") else int(moment.split()[1]) - 1
    assert len(again) == 20 - finished
    converted(source, tmp_path / "reference", alpha)
    assert contents(out) == contents(tmp_path / "reference")
    assert not work_folder(out).exists()


def test_resume_does_not_trust_bytes_that_changed(pico: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_and_die(pico, out, None, "tensor 9")
    (partial,) = (work_folder(out) / "artifact").glob("model-00001*.partial")
    with partial.open("r+b") as file:
        file.seek(file.seek(0, os.SEEK_END) - 100)
        file.write(b"x" * 100)
    converted(pico, out)
    converted(pico, tmp_path / "reference")
    assert contents(out) == contents(tmp_path / "reference")


def test_half_done_work_of_another_alpha_is_not_continued(
    pico: Path, artifact: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run_and_die(artifact, out, 0.5, "tensor 8")
    with pytest.raises(OutputExistsError, match="another plan"):
        converted(artifact, out, 1.0)
    converted(artifact, out, 1.0, force=True)
    converted(artifact, tmp_path / "reference", 1.0)
    assert contents(out) == contents(tmp_path / "reference")


def test_interrupt_keeps_what_is_finished_and_says_how_to_go_on(pico: Path, tmp_path: Path) -> None:
    out, seen = tmp_path / "out", 0

    def interrupt(event: Event) -> None:
        nonlocal seen
        seen += isinstance(event, TensorDone)
        if seen == 6:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="of 20 tensors finished") as caught:
        converted(pico, out, on_event=interrupt)
    assert "repeat the same command" in str(caught.value.hint)
    assert not out.exists()
    converted(pico, out)
    converted(pico, tmp_path / "reference")
    assert contents(out) == contents(tmp_path / "reference")
