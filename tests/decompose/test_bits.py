"""Codes of 3 bits, for all of base or some of it: from the recipe to every reader of ours."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import pytest
import reference
import torch
from conftest import Ortho
from memorised import PLENTY, Memorised
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ortho_cli
from ortho_cli.bench import baselines
from ortho_cli.decompose import plan, recipe
from ortho_cli.errors import ArtifactError, RecipeError
from ortho_cli.forget.isolate import isolate
from ortho_cli.formats.open_artifact import open_artifact
from ortho_cli.formats.verify import describe, verify
from ortho_cli.model import scoring
from ortho_cli.runtime.engine import Engine
from ortho_cli.runtime.ortho_linear import OrthoLinear
from ortho_cli.split import quantize
from ortho_cli.split.in_memory import split_weight
from ortho_cli.storage.checkpoint import open_checkpoint, read_shard

DOWN = "model.layers.1.mlp.down_proj"
SOME = "overrides=[{match: 're:.*(down|up|gate)_proj', base: {bits: 3}}]"


def decomposed(source: Path, ortho: Ortho, *sets: str, name: str = "out") -> Path:
    out = source.parent / name
    given = [word for text in sets for word in ("--set", text)]
    ran = ortho("decompose", source, "-o", out, "-q", *given)
    assert ran.code == 0, ran.err
    return out


def streams(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    base, ortho = (load_file(folder / f"{name}.safetensors") for name in ("model", "ortho"))
    return base, ortho


@pytest.mark.parametrize("sets", [("base.bits=3",), (SOME,), ("base.bits=3", "base.scale=mse")])
def test_every_byte_equals_the_slow_twins_where_bits_are_3(
    pico: Path, pico_tensors: dict[str, Tensor], ortho: Ortho, sets: tuple[str, ...]
) -> None:
    out = decomposed(pico, ortho, *sets, "ortho.density=0.02")
    base, sparse = streams(out)
    report = json.loads((out / "report.json").read_text())
    entries = {entry["name"]: entry for entry in report["tensors"]}
    for name, weight in pico_tensors.items():
        if not name.endswith("_proj.weight"):
            assert torch.equal(base[name], weight)
            continue
        module = name.removesuffix(".weight")
        bits = 3 if sets[0] == "base.bits=3" or ".mlp." in name else 4
        assert entries[name]["bits"] == bits
        wide, scales = weight.float(), base[f"{module}.weight_scale"]
        if "base.scale=mse" not in sets:
            twin = reference.absmax_scales(wide, 64, weight.dtype, bits=bits)
            assert torch.equal(scales, twin)
        codes = reference.quantize(wide, scales, bits=bits)
        packed = base[f"{module}.weight_packed"]
        assert packed.shape == (weight.shape[0], weight.shape[1] * bits // 32)
        assert torch.equal(packed, reference.pack_codes(codes, bits=bits))
        assert base[f"{module}.weight_shape"].tolist() == list(weight.shape)
        residual = (wide - reference.dequantize(codes, scales)).abs()
        indices = reference.top_k_indices(residual, round(0.02 * weight.numel()))
        assert torch.equal(sparse[f"{module}.values"], weight.flatten()[indices])
        made = split_weight(
            weight, group_size=64, density=0.02, bits=bits, scale=entries[name]["scale"]
        )
        assert torch.equal(made["weight_packed"], packed)
        assert torch.equal(made["col_indices"], sparse[f"{module}.col_indices"])


def test_mixed_bits_are_the_same_bytes_for_any_workers(pico: Path, ortho: Ortho) -> None:
    files = ("model.safetensors", "ortho.safetensors", "report.json", "config.json")
    found = []
    for workers in (1, 3):
        out = pico.parent / f"out-{workers}"
        given = ("-o", out, "-q", "--set", SOME, "--workers", workers)
        assert ortho("decompose", pico, *given).code == 0
        found.append([(out / name).read_bytes() for name in files])
    assert found[0] == found[1]


def test_mixed_bits_are_counted_told_and_verified(pico: Path, ortho: Ortho) -> None:
    planned = plan.make_plan(open_checkpoint(pico), recipe.load_recipe(None, [SOME]))
    out = decomposed(pico, ortho, SOME)
    assert (out / "model.safetensors").stat().st_size == planned.base.size
    told = {tensor["name"]: tensor["bits"] for tensor in planned.to_json()["tensors"]}
    assert set(told.values()) == {3, 4, None}
    assert verify(open_artifact(out)).checked["model.safetensors"] == "every digest"
    full = {tensor["name"]: tensor for tensor in describe(open_artifact(out))["tensors"]}
    # Codes and scales of 64 columns: 3 + 16 / 64 bits, and 128 bits of the shape.
    spent = full[f"{DOWN}.weight"]["bits_per_weight"]
    ortho_bits = 8 * sum(
        tensor.nbytes
        for tensor in read_shard(out / "ortho.safetensors").tensors
        if tensor.name.startswith(DOWN)
    )
    assert spent == pytest.approx(3.25 + (128 + ortho_bits) / (64 * 192), abs=1e-4)
    (out / "report.json").unlink()
    bare = {tensor["name"]: tensor for tensor in describe(open_artifact(out))["tensors"]}
    for name, tensor in bare.items():
        for key in ("action", "dtype", "shape", "bits", "bits_per_weight", "nnz"):
            assert tensor.get(key) == full[name].get(key), (name, key)
    ran = ortho("inspect", pico, "--set", SOME)
    assert ran.code == 0
    rows = [line.split() for line in ran.out.splitlines() if "down_proj" in line]
    assert "3" in rows[0]


@pytest.mark.filterwarnings("ignore")  # other people's deprecations
@pytest.mark.parametrize("sets", [("base.bits=3",), (SOME,)])
def test_live_and_dense_are_the_slow_twins_at_either_end(
    pico: Path, pico_tensors: dict[str, Tensor], ortho: Ortho, sets: tuple[str, ...]
) -> None:
    out = decomposed(pico, ortho, *sets, "ortho.density=0.02")
    base, sparse = streams(out)
    live = ortho_cli.load(out, alpha=1.0)
    for alpha in (1.0, 0.0):
        dense = pico.parent / f"dense-{alpha:g}"
        assert ortho("convert", out, "-o", dense, "--alpha", alpha, "-q").code == 0
        found = load_file(dense / "model.safetensors")
        assert found.keys() == pico_tensors.keys()
        ortho_cli.set_alpha(live, alpha)
        for module in (DOWN, "model.layers.0.self_attn.k_proj"):
            expected = reference.dense(base, sparse, module, alpha).bfloat16()
            assert torch.equal(found[f"{module}.weight"], expected)
            assert torch.equal(live.get_submodule(module).weight, expected)
    assert live.get_submodule(DOWN).bits == 3
    x = torch.randn(2, 192, generator=torch.Generator().manual_seed(0)).bfloat16()
    y, weight = live.get_submodule(DOWN)(x).double(), found[f"{DOWN}.weight"].double()
    assert torch.allclose(y, x.double() @ weight.T, rtol=0.02, atol=0.02)


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    metadata, tensors = read_shard(path).metadata, load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=metadata)


def put(part: str, value: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{DOWN}.{part}"] = value(tensors[f"{DOWN}.{part}"]).contiguous()

    return change


def shape(*sizes: int) -> Callable[[Tensor], Tensor]:
    return lambda _: torch.tensor(sizes)


HOSTILE: dict[str, tuple[Callable[[dict[str, Tensor]], None], str]] = {
    "a word is missing": (put("weight_packed", lambda t: t[:, :-1]), r"are 64 rows of 136 codes"),
    "a word too many": (
        put("weight_packed", lambda t: torch.cat((t, t[:, :1]), 1)),
        r"are 64 rows of 152 codes of 4 bits, or 202\.667 of 3",
    ),
    "a row is missing": (
        put("weight_packed", lambda t: t[:-1]),
        "codes I32 .63, 18. beside scales",
    ),
    "columns of no width": (
        put("weight_shape", shape(64, 200)),
        r"says \[64, 200\], and its codes",
    ),
    "columns of 4 bits that scales do not divide": (
        put("weight_scale", lambda t: torch.cat((t, t[:, :2]), 1)),
        "192 columns and 5 scales a row",
    ),
    "rows that are not there": (put("weight_shape", shape(65, 192)), r"says \[65, 192\]"),
    "negative columns": (put("weight_shape", shape(64, -192)), r"says \[64, -192\]"),
    "columns beyond any memory": (put("weight_shape", shape(64, 2**62)), "says "),
    "a shape of three": (put("weight_shape", shape(64, 192, 1)), "packed codes and no scales|has"),
    "no columns": (put("weight_shape", shape(64, 0)), r"says \[64, 0\]"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_codes_that_no_width_explains_are_refused(pico: Path, ortho: Ortho, name: str) -> None:
    out = decomposed(pico, ortho, "base.bits=3")
    change, expected = HOSTILE[name]
    rewrite(out / "model.safetensors", change)
    (out / "report.json").unlink()
    with pytest.raises(ArtifactError, match=expected):
        open_artifact(out)
    for command in (("inspect", out), ("convert", out, "--alpha", 0)):
        ran = ortho(*command, "-q")
        assert ran.code == 6, ran.err
        assert DOWN in ran.err


def test_words_of_3_bits_that_claim_to_be_4_are_not_the_codes_that_were_written(
    pico: Path, ortho: Ortho
) -> None:
    """18 words hold 192 codes of 3 bits, or 144 of 4: what was promised tells which."""
    out = decomposed(pico, ortho, "base.bits=3")
    rewrite(out / "model.safetensors", put("weight_shape", shape(64, 144)))
    ran = ortho("inspect", out, "-q")
    assert ran.code == 6
    assert f"`shape` of `{DOWN}.weight` is [64, 192], not [64, 144]" in ran.err
    (out / "report.json").unlink()
    with pytest.raises(ArtifactError, match=f"`{DOWN}.col_indices` names column 187 of 144"):
        verify(open_artifact(out))
    with pytest.raises(ArtifactError, match=f"`{DOWN}` was split as a Linear of .64, 144."):
        ortho_cli.load(out, alpha=0.0)


def test_cut_file_is_refused(pico: Path, ortho: Ortho) -> None:
    file = decomposed(pico, ortho, "base.bits=3") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ArtifactError, match="cut"):
        open_artifact(file.parent)


class Net(nn.Module):
    """Two Linears, of which one is wide enough for words of 3 bits."""

    def __init__(self, columns: int = 96) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(columns, 64), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def test_engine_splits_saves_and_loads_3_bits(tmp_path: Path) -> None:
    net = Net()
    engine = Engine(net)
    engine.decompose(bits=3, density=0.02)
    assert {m.bits for m in net.modules() if isinstance(m, OrthoLinear)} == {3}
    assert "bits=3, group_size=32" in repr(net)
    engine.set_alpha(1.0)
    engine.save(tmp_path / "out")
    assert verify(open_artifact(tmp_path / "out")).tensors
    fresh = Net()
    again = Engine(fresh)
    again.load(tmp_path / "out", alpha=1.0)
    again.save(tmp_path / "again")
    base, other = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again")
    )
    assert base == other
    x = torch.randn(3, 96, requires_grad=True)
    y = fresh(x)
    assert torch.equal(y, net(x))
    y.sum().backward()
    assert x.grad is not None


def test_engine_refuses_bits_that_do_not_fit() -> None:
    for columns, bits, told in (
        (72, 3, "bits is 3 for `first.weight`, whose in_features 72 does not divide by 32"),
        (96, 5, "bits is 5"),
    ):
        net = Net(columns)
        with pytest.raises(RecipeError, match=told):
            Engine(net).decompose(bits=bits, group_size=8)
        assert not any(isinstance(module, OrthoLinear) for module in net.modules())


def test_a_weight_that_keeps_nothing_has_no_moved_codes() -> None:
    layer = OrthoLinear.from_linear(nn.Linear(64, 8), group_size=32, density=1e-6)
    assert layer.nnz == 0
    assert torch.equal(baselines.int4_codes(layer), baselines.base_codes(layer))
    assert baselines.count_moved(layer) == 0


def test_state_of_another_width_does_not_load() -> None:
    one, other = (
        OrthoLinear.from_linear(nn.Linear(64, 8), group_size=32, density=0.1, bits=bits)
        for bits in (3, 4)
    )
    with pytest.raises(RuntimeError, match="size mismatch for weight_packed"):
        one.load_state_dict(other.state_dict())


def test_codes_without_forgetting_are_found_on_3_bits(pico: Path, ortho: Ortho) -> None:
    layer = OrthoLinear.from_linear(
        nn.Linear(64, 48, dtype=torch.bfloat16), group_size=32, density=0.1, bits=3
    )
    before = baselines.base_codes(layer)
    assert (before.min(), before.max()) == (-4, 3)
    assert torch.equal(baselines.int4_codes(layer), before)
    assert baselines.count_moved(layer) == 0
    assert layer.crow_indices is not None
    assert layer.col_indices is not None
    rows = torch.repeat_interleave(torch.arange(48), layer.crow_indices.long().diff())
    at = (rows[:5], layer.col_indices.long()[:5])
    codes = before.clone()
    codes[at] = torch.where(codes[at] > 0, codes[at] - 1, codes[at] + 1)
    layer.weight_packed.copy_(quantize.pack_int3(codes))
    assert baselines.count_moved(layer) == 5
    assert torch.equal(baselines.int4_codes(layer), before)


@pytest.mark.filterwarnings("ignore")
def test_forgetting_moves_codes_inside_3_bits(three_memorised: list[Memorised]) -> None:
    """Of 8 models of 3 bits throughout, 0.19 +- 0.08 of the exposure was left."""
    left = []
    for memorised in three_memorised:
        made = memorised.plan("base.bits=3", "overrides=[{match: '*o_proj*', base: {bits: 4}}]")
        grid, secrets = memorised.grid(made), memorised.secrets()
        for name, codes in grid.codes.items():
            low, high = (-8, 7) if "o_proj" in name else (-4, 3)
            assert (int(codes.min()), int(codes.max())) == (low, high), name
        before = sum(scoring.exposures([scoring.score(grid.model, one) for one in secrets]))
        settings = made.recipe.forget
        isolate(
            grid,
            secrets,
            memorised.fisher(),
            {tensor.name: tensor.k for tensor in made.split},
            telling=1.0,
            known=secrets,
            share=settings.share,
            rounds=settings.rounds,
            fill="step",
            seed=0,
            on_event=lambda _: None,
        )
        after = sum(scoring.exposures([scoring.score(grid.model, one) for one in secrets]))
        left.append(after / before)
        assert grid.moved > 0
        for name, codes in grid.codes.items():
            low, high = (-8, 7) if "o_proj" in name else (-4, 3)
            assert low <= int(codes.min()) <= int(codes.max()) <= high
            far = (codes - grid.original[name]).abs()
            assert int(far.max()) <= 7
    assert mean(left) < 0.4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("split", ["isolate", "unlearn"])
def test_command_forgets_on_3_bits(
    memorised: Memorised, tmp_path: Path, ortho: Ortho, split: str
) -> None:
    quick = ["forget.steps=30", "forget.attack_steps=5", "forget.samples=16", "forget.length=16"]
    sets = ["base.bits=3", f"ortho.split={split}", *PLENTY, "forget.mask=0.3", *quick]
    text = ["--data", memorised.retain] if split == "unlearn" else []
    given = [word for one in sets for word in ("--set", one)]
    ran = ortho(
        *("decompose", memorised.model, "-o", tmp_path / "out", "--stats", memorised.stats),
        *("--forget", memorised.forget, *text, "-q", *given),
    )
    assert ran.code == 0, ran.err
    assert ortho("inspect", tmp_path / "out", "--verify", "-q").code == 0
    model = ortho_cli.load(tmp_path / "out", alpha=0.0)
    low = scoring.exposures([scoring.score(model, one) for one in memorised.secrets()])
    ortho_cli.set_alpha(model, 1.0)
    high = scoring.exposures([scoring.score(model, one) for one in memorised.secrets()])
    assert sum(low) < 0.6 * sum(high)  # that the command does it; how well is measured above
    moved = sum(
        baselines.count_moved(module)
        for module in model.modules()
        if isinstance(module, OrthoLinear)
    )
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert moved == report["totals"]["moved"] > 0
