"""What alpha = 1 is, for every dtype, rounding, split and layout, read by `own_reader`."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import own_reader
import pytest
import torch
from jobs import decompose
from safetensors.torch import load_file, save_file
from torch import nn

from ortho_cli.decompose import recipe
from ortho_cli.decompose.plan import Plan, make_plan
from ortho_cli.decompose.recheck import check_values
from ortho_cli.decompose.tune import Latent
from ortho_cli.errors import ArtifactError
from ortho_cli.formats.open_artifact import open_artifact
from ortho_cli.formats.statistics import open_statistics
from ortho_cli.runtime.engine import Engine
from ortho_cli.split import quantize
from ortho_cli.split.quantize import Rounded
from ortho_cli.split.select import Own, TopK
from ortho_cli.storage.checkpoint import open_checkpoint, read_shard
from tests.decompose.test_job_edits import Fake, draw_edits

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SIZES = {"hidden": 64, "mlp": 64, "layers": 1, "vocab": 96}
METHODS = {
    "nearest": [],
    "gptq": ["base.rounding=gptq"],
    "tuned": ["base.rounding=tuned"],
    "isolate": ["ortho.split=isolate"],
    "unlearn": ["ortho.split=unlearn"],
    "searched": ["base.scale=mse"],
}


class Shift:
    """A tuner that moves every scale and half of the codes that ortho does not hold."""

    identity = "shift"

    def __init__(self, names: list[str]) -> None:
        self._names = names

    def tune(
        self, start: Callable[[str], Rounded], tuned: Collection[str], **options: Any
    ) -> Iterator[dict[str, Rounded]]:
        for name in self._names:
            codes, scales, kept = start(name)
            step = (torch.arange(codes.numel()).view(codes.shape) % 2).to(torch.int8)
            moved = torch.where(kept, codes, (codes + step).clamp(-8, 7))
            yield {name: Rounded(moved, (scales * 1.25).to(scales.dtype), kept)}


class Made:
    """A checkpoint, and artifacts made of it."""

    def __init__(self, folder: Path, dtype: str) -> None:
        self.source, self.dtype = folder / "model", dtype
        tensors = checkpoints.weights(**SIZES, kv=32)
        checkpoints.save(self.source, {n: t.to(DTYPES[dtype]) for n, t in tensors.items()})
        self.stats = folder / "stats.safetensors"
        checkpoints.save_statistics(self.stats, self.source, gram="gradient")

    def plan(self, method: str, *sets: str) -> Plan:
        settings = recipe.load_recipe(None, ["ortho.density=0.04", *METHODS[method], *sets])
        return make_plan(
            open_checkpoint(self.source), settings, statistics=open_statistics(self.stats)
        )

    def make(self, method: str, *sets: str, compiled: bool = True) -> Path:
        plan, out = self.plan(method, *sets), self.source.parent / "out"
        more: dict[str, Any] = {}
        if plan.recipe.forgets:
            more["editor"] = Fake(draw_edits(plan, 0.5), self.source.parent / "count")
        if method == "tuned":
            more["tuner"] = Shift([tensor.name for tensor in plan.split])
        decompose(plan, open_checkpoint(self.source), out, compiled=compiled, **more)
        return out


@pytest.fixture(params=DTYPES)
def made(tmp_path: Path, request: pytest.FixtureRequest) -> Made:
    return Made(tmp_path, request.param)


@pytest.mark.parametrize("layout", ["csr", "compact"])
@pytest.mark.parametrize("method", METHODS)
def test_alpha_one_is_the_source_or_its_own_code_where_ortho_holds_it(
    made: Made, method: str, layout: str
) -> None:
    out = made.make(method, f"ortho.layout={layout}")
    source = own_reader.read(made.source / "model.safetensors")
    coded = moved_at_all = 0
    for name in (tensor.name for tensor in made.plan(method).split):
        dtype, words = source[name]
        told, found = own_reader.number(words, dtype), own_reader.weight(out, name[:-7])
        own = found.own_codes(told)
        exact = found.full == told
        if method in ("nearest", "searched", "isolate", "unlearn"):
            moved = found.codes != own
            assert not (moved & ~found.kept).any()  # ortho holds every position that moved
            moved_at_all += int(moved.sum())
            if method == "unlearn":
                code = own_reader.round_once(own * found.scales, dtype)
                coded += int((moved & found.kept & ~exact).sum())
                exact |= found.full == code
        assert exact[found.kept].all()
        assert found.kept.sum() == round(0.04 * told.size)
    assert (coded > 50) == (method == "unlearn")
    assert (moved_at_all > 50) == (method in ("isolate", "unlearn"))
    recipe_of = made.plan(method, f"ortho.layout={layout}").recipe.canonical()
    checked = check_values(open_artifact(out), open_checkpoint(made.source), recipe_of)
    assert checked["tensors"] == 7


@pytest.mark.parametrize("alpha", ["0", "1"])
def test_convert_gives_what_the_files_say(made: Made, ortho: Any, alpha: str) -> None:
    out = made.make("unlearn")
    dense = out.parent / "dense"
    assert ortho("convert", out, "--alpha", alpha, "-o", dense, "-q").code == 0
    written = own_reader.read(dense / "model.safetensors")
    for name in (tensor.name for tensor in made.plan("unlearn").split):
        found, (dtype, words) = own_reader.weight(out, name[:-7]), written[name]
        wanted = found.full if alpha == "1" else found.base
        assert np.array_equal(own_reader.number(words, dtype), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tuning_leaves_what_it_began_from_as_it_was(dtype: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 64, generator=generator).to(DTYPES[dtype])
    scales = quantize.absmax_scales(weight, group_size=32, dtype=DTYPES[dtype])
    codes = quantize.quantize(weight.float(), scales).to(torch.int8)
    start = Rounded(codes, scales, torch.zeros(8, 64, dtype=torch.bool))
    before = [part.clone() for part in (weight, *start)]
    latent = Latent(weight, start, bits=4)
    for _ in range(3):
        latent.step(torch.randn(8, 64, generator=generator), rate=0.1, scale_rate=0.1)
        rounded = latent.rounded()
        kept = rounded.scales.clone()
    latent.step(torch.randn(8, 64, generator=generator), rate=0.1, scale_rate=0.1)
    for part, then in zip((weight, *start), before, strict=True):
        assert torch.equal(part, then)
    assert torch.equal(rounded.scales, kept)
    assert not torch.equal(rounded.scales, scales)


def test_run_finds_values_that_are_no_weights_of_the_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a fault once did: float32 values of moved codes came out as |source - own code|."""

    mark = TopK.mark

    def spoil(self: TopK, at: Any, measures: Any, own: Own | None = None) -> None:
        if own is not None:  # codes that cost nothing are all given back
            words = (0.5 * own.words.view(np.float32) + 1.0).view(np.uint32)
            own = Own(words, [np.zeros_like(lost) for lost in own.lost])
        mark(self, at, measures, own)

    monkeypatch.setattr(TopK, "mark", spoil)
    made = Made(tmp_path, "F32")
    with pytest.raises(ArtifactError, match=r"neither the source.s weight .* nor its own code"):
        made.make("unlearn")
    assert [path.name for path in tmp_path.glob("*out*")] == []


def test_run_finds_a_moved_code_that_ortho_does_not_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TopK, "mark", lambda *_: None)
    with pytest.raises(ArtifactError, match="and ortho does not hold that place"):
        Made(tmp_path, "BF16").make("isolate")


def test_run_finds_a_figure_that_is_not_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = TopK.taken

    def nothing(self: TopK) -> Any:
        indices, energies, words = taken(self)
        return indices, [0.0 for _ in energies], words

    monkeypatch.setattr(TopK, "taken", nothing)
    with pytest.raises(ArtifactError, match=r"has noise_kept .* by what was written, and 0"):
        Made(tmp_path, "BF16").make("nearest", compiled=False)


def test_inspect_names_a_weight_that_is_not_the_source(
    pico: Path, artifact: Path, ortho: Any
) -> None:
    assert ortho("inspect", artifact, "--verify", "--expect-source", pico).code == 0
    path = artifact / "ortho.safetensors"
    metadata, tensors = read_shard(path).metadata, load_file(path)
    tensors["model.layers.0.mlp.up_proj.values"][3] *= 1.5
    save_file(tensors, path, metadata=metadata)
    (artifact / "report.json").unlink()
    assert ortho("inspect", artifact, "--verify").code == 0
    ran = ortho("inspect", artifact, "--verify", "--expect-source", pico)
    assert ran.code == 6
    assert "of `model.layers.0.mlp.up_proj.weight` at [" in ran.err
    assert "which is not the source's weight" in ran.err


@pytest.mark.parametrize("alpha", [0, 1])
def test_inspect_names_a_figure_that_the_bytes_do_not_give(
    pico: Path, artifact: Path, ortho: Any, alpha: int
) -> None:
    path = artifact / "report.json"
    report = json.loads(path.read_text())
    told = next(entry for entry in report["tensors"] if entry["action"] == "split")
    told[f"sqnr_db_alpha_{alpha}"] += 0.5
    path.write_text(json.dumps(report))
    assert ortho("inspect", artifact, "--verify").code == 0
    ran = ortho("inspect", artifact, "--verify", "--expect-source", pico)
    assert ran.code == 6
    assert f"`{told['name']}` has sqnr_db_alpha_{alpha}" in ran.err


def test_inspect_names_a_weight_that_was_not_split_and_is_another(
    pico: Path, artifact: Path
) -> None:
    path = artifact / "model.safetensors"
    metadata, tensors = read_shard(path).metadata, load_file(path)
    tensors["model.norm.weight"] += 1
    save_file(tensors, path, metadata=metadata)
    (artifact / "ortho.safetensors").unlink()
    (artifact / "report.json").unlink()
    opened, source = open_artifact(artifact), open_checkpoint(pico)
    with pytest.raises(ArtifactError, match=r"`model\.norm\.weight` .* was not split, and is not"):
        check_values(opened, source, recipe.DEFAULT.canonical())


@pytest.mark.parametrize("key", ["sqnr_db_alpha_0", "sqnr_db_alpha_1", "residual_kept"])
def test_inspect_names_a_total_that_the_bytes_do_not_give(
    pico: Path, artifact: Path, ortho: Any, key: str
) -> None:
    path = artifact / "report.json"
    report = json.loads(path.read_text())
    report["totals"][key] = 3 * report["totals"][key] + 1
    path.write_text(json.dumps(report))
    ran = ortho("inspect", artifact, "--verify", "--expect-source", pico)
    assert ran.code == 6
    assert f"`totals` has {key}" in ran.err


@pytest.mark.parametrize(
    "key", ["nnz", "density", "weights", "split_weights", "base_bytes", "ortho_bytes",
            "bits_per_weight", "tensors", "split_tensors"]
)  # fmt: skip
def test_inspect_names_a_total_that_the_headers_do_not_give(
    artifact: Path, ortho: Any, key: str
) -> None:
    path = artifact / "report.json"
    report = json.loads(path.read_text())
    report["totals"][key] *= 2
    path.write_text(json.dumps(report))
    ran = ortho("inspect", artifact)
    assert ran.code == 6
    assert f"`totals.{key}` is" in ran.err


def checked(folder: Path, ortho: Any, tensors: dict[str, torch.Tensor], *sets: str) -> None:
    """Decompose some weights, and see that what is sound is called so."""
    save_file(tensors, folder / "m.safetensors")
    words = [word for one in sets for word in ("--set", one)]
    ran = ortho("decompose", folder / "m.safetensors", "-o", folder / "o", "-q", *words)
    assert ran.code == 0, ran.err
    source = folder / "m.safetensors"
    ran = ortho("inspect", folder / "o", "--verify", "--expect-source", source)
    assert ran.code == 0, ran.err


def test_sound_weights_of_odd_kinds_are_called_sound(tmp_path: Path, ortho: Any) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    lone = torch.zeros(48, 160)
    lone[3, 7] = 1.0
    sparse = torch.where(draw(128, 512) > 1.3, draw(128, 512) * 0.02, 0.0) + draw(128, 512) * 2e-7
    int8 = ("ortho={layout: compact, values: int8, density: 0.3}", "base.group_size=32")
    for number, (weight, sets) in enumerate((
        (lone, ("base.group_size=32",)),
        (sparse.bfloat16(), ("ortho.density=0.1",)),
        ((draw(48, 160) * 5e-6).half(), (*int8, "base.scale=mse")),
        ((draw(48, 160) * 5e-38).bfloat16(), int8),
    )):  # fmt: skip
        folder = tmp_path / str(number)
        folder.mkdir()
        checked(folder, ortho, {"a.proj.weight": weight, "a.proj": torch.ones(5)}, *sets)


def test_values_that_were_int8_and_are_saved_as_csr_are_called_sound(
    tmp_path: Path, ortho: Any
) -> None:
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    sets = ("ortho={layout: compact, values: int8, density: 0.2}", "base.group_size=32")
    checked(tmp_path, ortho, {"0.weight": weight}, *sets)
    engine = Engine(nn.Sequential(nn.Linear(64, 48, bias=False)))
    engine.load(tmp_path / "o", alpha=1.0)
    engine.save(tmp_path / "again")
    source = tmp_path / "m.safetensors"
    ran = ortho("inspect", tmp_path / "again", "--verify", "--expect-source", source)
    assert ran.code == 0, ran.err
