"""Ortho as a LoRA adapter: exact of whole columns, the nearest of its rank otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pyrage
import pytest
import torch
from conftest import Ortho, SmallTiles
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from ortho_cli.convert.targets import factors, job, peft
from ortho_cli.convert.targets.factors import nearest
from ortho_cli.errors import ArtifactError, Interrupted, NumericalError, UsageError
from ortho_cli.events import Event, TensorDone
from ortho_cli.storage.job import check_target
from ortho_cli.storage.sealing import make_seal

SHAPE = {"hidden": 64, "mlp": 192, "layers": 2, "vocab": 96, "kv": 32}
COLUMNS = ("ortho.structure=columns", "ortho.density=0.05")


def split(
    ortho: Ortho, folder: Path, *sets: str, dtype: torch.dtype = torch.bfloat16, more: str = ""
) -> Path:
    """Decompose a pico model of grouped heads."""
    if not folder.exists():
        checkpoints.save(folder, checkpoints.weights(**SHAPE, dtype=dtype))
        config = checkpoints.config(**SHAPE, heads=4) | {"dtype": str(dtype).split(".")[1]}
        (folder / "config.json").write_text(json.dumps(config))
    out = folder.with_name(f"{folder.name}-split")
    words = [word for one in sets for word in ("--set", one)]
    ran = ortho("decompose", folder, "-o", out, "--recipe", "int4", "-q", *words, *more.split())
    assert ran.code == 0, ran.err
    return out


def dense(ortho: Ortho, out: Path, alpha: int) -> dict[str, torch.Tensor]:
    place = out.with_name(f"{out.name}-{alpha}")
    assert ortho("convert", out, "--alpha", alpha, "-o", place, "-q").code == 0
    return load_file(place / "model.safetensors")


def applied(folder: Path, base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Add an adapter to dense weights by its definition: W + alpha / rank * B A."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {name: weight.float() for name, weight in base.items()}
    for module in config["target_modules"]:
        rank = config["rank_pattern"].get(module, config["r"])
        alpha = config["alpha_pattern"].get(module, config["lora_alpha"])
        a, b = (tensors.pop(f"base_model.model.{module}.lora_{x}.weight").float() for x in "AB")
        assert a.shape[0] == b.shape[1] == rank
        found[f"{module}.weight"] = found[f"{module}.weight"] + alpha / rank * (b @ a)
    assert not tensors
    return found


@pytest.mark.parametrize("values", ["source", "int8"])
@pytest.mark.parametrize("pad", [False, True])
def test_base_with_the_adapter_is_the_full_model_bit_for_bit(
    tmp_path: Path, ortho: Ortho, small_tiles: SmallTiles, values: str, pad: bool
) -> None:
    out = split(ortho, tmp_path / "m", *COLUMNS, f"ortho.values={values}")
    words = ["--pad"] if pad else []
    with small_tiles.in_commands():
        ran = ortho("convert", out, "--to", "lora", "-o", tmp_path / "a", "--dtype", "f32", *words)
    small_tiles.prove("convert")
    assert ran.code == 0, ran.err
    assert "every value is exact" in ran.out
    base, wanted = dense(ortho, out, 0), dense(ortho, out, 1)
    found = applied(tmp_path / "a", base)
    assert all(torch.equal(found[name].bfloat16(), wanted[name]) for name in wanted)
    assert any(not torch.equal(wanted[name], base[name]) for name in wanted)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] == 10
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert bool(config["rank_pattern"]) is not pad


def test_rounding_of_the_adapter_is_reported_as_it_is(tmp_path: Path, ortho: Ortho) -> None:
    out = split(ortho, tmp_path / "m", *COLUMNS, dtype=torch.float32)
    exact = ortho("convert", out, "--to", "lora", "-o", tmp_path / "a", "--json")
    ran = ortho("convert", out, "--to", "lora", "-o", tmp_path / "b", "--dtype", "f16", "--json")
    assert exact.json["error"]["max_error"] == 0
    tensors = [load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab"]
    lost = [(tensors[1][name].double() - one.double()) for name, one in tensors[0].items()]
    norm = sum(float(one.double().square().sum()) for n, one in tensors[0].items() if "_B" in n)
    told = ran.json["error"]
    assert told["max_error"] == pytest.approx(max(float(one.abs().max()) for one in lost))
    squared = sum(float(one.square().sum()) for one in lost)
    assert told["relative_error"] == pytest.approx((squared / norm) ** 0.5)
    assert told["inexact"] == 14
    assert (
        "14 weights are not exact" in ortho("convert", out, "--to", "lora", "--dtype", "bf16").out
    )


def test_max_rank_keeps_the_columns_of_most_energy_and_reports_the_rest(
    tmp_path: Path, ortho: Ortho
) -> None:
    out = split(ortho, tmp_path / "m", *COLUMNS)
    base, full = dense(ortho, out, 0), dense(ortho, out, 1)
    ran = ortho(
        *("convert", out, "--to", "lora", "-o", tmp_path / "a", "--dtype", "f32"),
        *("--max-rank", 2, "--json"),
    )
    assert ran.code == 0, ran.err
    found = applied(tmp_path / "a", base)
    lost = norm = 0.0
    for told in ran.json["tensors"]:
        delta = (full[told["name"]].float() - base[told["name"]].float()).double()
        energy = delta.square().sum(0)
        best = energy.argsort(descending=True, stable=True)[:2]
        wanted = torch.zeros_like(delta)
        wanted[:, best] = delta[:, best]
        assert torch.equal(found[told["name"]].double() - base[told["name"]].double(), wanted)
        assert told["rank"] == 2
        lost += float(energy.sum() - energy[best].sum())
        norm += float(energy.sum())
    assert ran.json["error"]["share_lost"] == pytest.approx(lost / norm)
    assert "% of the energy of ortho" in ortho("convert", out, "--to", "lora", "--max-rank", 2).out


def test_scattered_ortho_is_refused_with_both_ways_out(tmp_path: Path, ortho: Ortho) -> None:
    out = split(ortho, tmp_path / "m")
    ran = ortho("convert", out, "--to", "lora")
    assert ran.code == UsageError.exit_code
    assert "holds scattered weights" in ran.err
    assert "--set ortho.structure=columns" in ran.err
    assert "--approximate 64" in ran.err
    assert not (tmp_path / "m-split-lora").exists()
    assert "--approximate 8" in ortho("convert", out, "--to", "lora", "--max-rank", 8).err
    columns = split(ortho, tmp_path / "n", *COLUMNS)
    ran = ortho("convert", columns, "--to", "lora", "--approximate", 8)
    assert ran.code == UsageError.exit_code
    assert "--max-rank 8" in ran.err


@pytest.mark.parametrize("layout", ["csr", "compact"])
def test_approximation_is_the_nearest_of_its_rank_and_says_what_it_loses(
    tmp_path: Path, ortho: Ortho, small_tiles: SmallTiles, layout: str
) -> None:
    out = split(ortho, tmp_path / "m", "ortho.density=0.02", f"ortho.layout={layout}")
    base, full = dense(ortho, out, 0), dense(ortho, out, 1)
    words = "--to", "lora", "--approximate", 8, "--dtype", "f32"
    with small_tiles.in_commands():
        ran = ortho("convert", out, *words, "-o", tmp_path / "a", "--json")
    small_tiles.prove("convert")
    assert ran.code == 0, ran.err
    found = applied(tmp_path / "a", base)
    lost = norm = 0.0
    for told in ran.json["tensors"]:
        name = told["name"]
        delta = (full[name].float() - base[name].float()).double()
        left, values, right = torch.linalg.svd(delta, full_matrices=False)
        wanted = left[:, :8] * values[:8] @ right[:8]
        assert torch.allclose(found[name].double() - base[name].double(), wanted, atol=2e-6)
        lost += float(values[8:].square().sum())
        norm += float(values.square().sum())
    assert ran.json["error"]["share_lost"] == pytest.approx(lost / norm, rel=1e-3)
    assert 0.01 < lost / norm < 0.9
    assert ortho("convert", out, *words, "-o", tmp_path / "b", "-q").code == 0
    first, second = (tmp_path / n / "adapter_model.safetensors" for n in "ab")
    assert first.read_bytes() == second.read_bytes()


@given(
    rows=st.integers(1, 12),
    across=st.integers(1, 12),
    held=st.integers(0, 12),
    rank=st.integers(1, 14),
    seed=st.integers(0, 99),
)
def test_nearest_is_the_truncated_svd_of_any_matrix(
    rows: int, across: int, held: int, rank: int, seed: int
) -> None:
    draw = np.random.default_rng(seed)
    inner = min(held, rows, across)
    delta = draw.normal(size=(rows, inner)) @ draw.normal(size=(inner, across))
    left, right = nearest(torch.from_numpy(delta).float(), rank=rank)
    assert left.shape[1] == right.shape[0] <= min(rank, rows, across)
    assert torch.allclose(left.norm(dim=0), right.norm(dim=1), rtol=1e-3)  # neither is tiny in fp16
    values = np.linalg.svd(delta, compute_uv=False)
    lost = np.linalg.norm(delta - (left.double() @ right.double()).numpy())
    best = np.sqrt((values[rank:] ** 2).sum())
    assert lost == pytest.approx(best, rel=1e-3, abs=2e-6 * (1 + values.max(initial=0)))


def test_adapter_is_private_holds_no_path_and_is_replaced_only_if_it_is_ours(
    tmp_path: Path, ortho: Ortho
) -> None:
    out = split(ortho, tmp_path / "m", *COLUMNS)
    ran = ortho("convert", out, "--to", "lora")
    assert ran.code == 0, ran.err
    assert "never upload it" in ran.err
    place = tmp_path / "m-split-lora"
    for path in place.iterdir():
        assert path.stat().st_mode & 0o777 == 0o600, path
        assert str(tmp_path).encode() not in path.read_bytes(), path
    assert (
        json.loads((place / "adapter_config.json").read_text())["base_model_name_or_path"]
        == "m-split"
    )
    assert "Do not upload it" in (place / "README.md").read_text()
    assert ortho("convert", out, "--to", "lora").code == 8
    assert ortho("convert", out, "--to", "lora", "--force").code == 0
    (place / "mine.txt").write_text("mine")
    assert ortho("convert", out, "--to", "lora", "--force").code == 8


def test_interrupted_run_resumes_with_the_same_bytes_and_figures(
    tmp_path: Path, ortho: Ortho
) -> None:
    out = split(ortho, tmp_path / "m", "ortho.density=0.02")

    def run(place: Path, stop: int = -1, seal: Any = None) -> Any:
        done: list[str] = []

        def watch(event: Event) -> None:
            if isinstance(event, TensorDone):
                done.append(event.name)
                if len(done) == stop:
                    raise KeyboardInterrupt

        plan = peft.plan_lora(factors.open_ortho(out, approximate=4), seal=seal)
        target = check_target(place, plan.kind, [out], force=False)
        try:
            return len(done), plan.to_json(job.write(plan, target, on_event=watch)), done
        finally:
            plan.source.close()

    _, wanted, _ = run(tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(tmp_path / "a", stop=5)
    assert not (tmp_path / "a").exists()
    _, told, done = run(tmp_path / "a")
    assert len(done) == 9
    assert told == wanted
    names = [path.name for path in (tmp_path / "whole").iterdir()]
    assert all(
        (tmp_path / "a" / n).read_bytes() == (tmp_path / "whole" / n).read_bytes() for n in names
    )


def test_sealed_ortho_gives_a_sealed_adapter_and_plaintext_only_where_it_is_asked_for(
    tmp_path: Path, ortho: Ortho
) -> None:
    mine, other = pyrage.x25519.Identity.generate(), pyrage.x25519.Identity.generate()
    key = tmp_path / "key.txt"
    key.write_text(f"{mine}\n")
    out = split(ortho, tmp_path / "m", *COLUMNS, more=f"--seal-to {mine.to_public()}")
    ran = ortho("convert", out, "--to", "lora")
    assert ran.code == ArtifactError.exit_code
    assert "is sealed, and an adapter is made of it" in ran.err
    assert ran.err.endswith("hint: give --identity FILE\n")
    assert ortho("convert", out, "--to", "lora", "--identity", key).code == 0
    place = tmp_path / "m-split-lora"
    names = {path.name for path in place.iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors.age", "README.md"}
    assert "the artifact that it was made from" in ortho("inspect", place).err
    assert (
        ortho(
            "convert", out, "--to", "lora", "--identity", key, "--plaintext", "-o", tmp_path / "p"
        ).code
        == 0
    )
    plain = (tmp_path / "p" / "adapter_model.safetensors").read_bytes()
    sealed = (place / "adapter_model.safetensors.age").read_bytes()
    assert pyrage.decrypt(sealed, [mine]) == plain
    again = ortho("convert", out, "--to", "lora", "--identity", key, "--force")
    assert again.code == 0, again.err
    words = "--identity", key, "--seal-to", other.to_public(), "-o", tmp_path / "o"
    assert ortho("convert", out, "--to", "lora", *words).code == 0
    sealed = (tmp_path / "o" / "adapter_model.safetensors.age").read_bytes()
    assert pyrage.decrypt(sealed, [other]) == plain
    with pytest.raises(pyrage.DecryptError):
        pyrage.decrypt(sealed, [mine])


def test_passphrase_of_ortho_opens_its_adapter_too(tmp_path: Path, ortho: Ortho) -> None:
    word = tmp_path / "word.txt"
    word.write_text("a long passphrase\n")
    out = split(ortho, tmp_path / "m", *COLUMNS, more=f"--seal-passphrase-file {word}")
    assert ortho("convert", out, "--to", "lora", "--identity", word).code == 0
    locked = (tmp_path / "m-split-lora" / "ortho.key.age").read_bytes()
    secret = pyrage.passphrase.decrypt(locked, "a long passphrase").decode()
    sealed = (tmp_path / "m-split-lora" / "adapter_model.safetensors.age").read_bytes()
    identity = pyrage.x25519.Identity.from_str(secret)
    assert b"lora_A" in pyrage.decrypt(sealed, [identity])[:4096]


def test_delta_beyond_float16_is_refused_by_name(tmp_path: Path, ortho: Ortho) -> None:
    weights = checkpoints.weights(**SHAPE)
    weights["model.layers.1.mlp.up_proj.weight"] *= 2.0**40
    checkpoints.save(tmp_path / "m", weights)
    out = split(ortho, tmp_path / "m", *COLUMNS)
    ran = ortho("convert", out, "--to", "lora", "--dtype", "f16")
    assert ran.code == NumericalError.exit_code
    assert "`model.layers.1.mlp.up_proj.weight` holds" in ran.err
    assert not (tmp_path / "m-split-lora").exists()


def test_weights_of_which_ortho_holds_nothing_get_no_adapter(tmp_path: Path, ortho: Ortho) -> None:
    override = 'overrides=[{match: "*.v_proj.weight", ortho: {density: 0}}]'
    out = split(ortho, tmp_path / "m", *COLUMNS, override)
    ran = ortho("convert", out, "--to", "lora")
    assert ran.code == 0, ran.err
    assert "2 split weights get none: ortho holds nothing of them" in ran.err
    config = json.loads((tmp_path / "m-split-lora" / "adapter_config.json").read_text())
    assert len(config["target_modules"]) == 12
    assert not any("v_proj" in name for name in config["target_modules"])
    ran = ortho("convert", out, "--to", "lora", "--pad", "--force")
    assert ran.code == 0, ran.err
    assert "scattered" not in ran.err
    tensors = load_file(tmp_path / "m-split-lora" / "adapter_model.safetensors")
    assert (
        len(tensors) == 28
    )  # all split weights of one rank, as servers that stack q, k, v need it
    assert {t.shape[0] for name, t in tensors.items() if "lora_A" in name} == {10}
    assert not any(tensors[name].any() for name in tensors if "v_proj" in name)
    empty = split(ortho, tmp_path / "e", "ortho.structure=columns", "ortho.density=0")
    ran = ortho("convert", empty, "--to", "lora")
    assert ran.code == ArtifactError.exit_code
    assert "holds no weight" in ran.err


@pytest.mark.filterwarnings("ignore")  # other people's deprecations
def test_llama_cpp_adapter_holds_the_same_factors_in_the_order_of_base(
    tmp_path: Path, ortho: Ortho
) -> None:
    gguf = pytest.importorskip("gguf")
    import ggufs

    out = split(ortho, tmp_path / "m", *COLUMNS)
    assert ortho("convert", out, "--to", "lora", "-o", tmp_path / "a").code == 0
    ran = ortho("convert", out, "--to", "gguf-lora", "-o", tmp_path / "a.gguf")
    assert ran.code == 0, ran.err
    assert (tmp_path / "a.gguf").stat().st_mode & 0o777 == 0o600
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.type"] == "adapter"
    assert fields["general.architecture"] == "llama"
    assert fields["adapter.type"] == "lora"
    assert fields["adapter.lora.alpha"] == 0  # llama.cpp: no division by a rank
    held = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "mlp.down_proj": "ffn_down",
    }
    for theirs, name in names.items():
        start = f"base_model.model.model.layers.1.{theirs}.lora_"
        a, b = (tensors[f"{start}{x}.weight"].float().numpy() for x in "AB")
        heads = {"attn_q": 4, "attn_k": 2}.get(name)
        b = ggufs.permute(b, heads) if heads else b
        assert np.array_equal(held[f"blk.1.{name}.weight.lora_a"], a)
        assert np.array_equal(held[f"blk.1.{name}.weight.lora_b"], b)
    assert len(held) == len(tensors)
    key = pyrage.x25519.Identity.generate()
    words = "--to", "gguf-lora", "--seal-to", key.to_public()
    assert "does not say so" in ortho("convert", out, *words, "-o", tmp_path / "s.gguf").err
    assert ortho("convert", out, *words, "-o", tmp_path / "s.gguf.age").code == 0
    sealed = (tmp_path / "s.gguf.age").read_bytes()
    assert pyrage.decrypt(sealed, [key]) == (tmp_path / "a.gguf").read_bytes()
    assert ortho("convert", out, *words, "-o", tmp_path / "s.gguf.age").code == 8
    again = ortho("convert", out, *words, "-o", tmp_path / "s.gguf.age", "--force", "--max-rank", 1)
    assert again.code == 0, again.err
    smaller = pyrage.decrypt((tmp_path / "s.gguf.age").read_bytes(), [key])
    assert smaller.startswith(b"GGUF")
    assert len(smaller) < (tmp_path / "a.gguf").stat().st_size
    (tmp_path / "notes.age").write_bytes(sealed)
    for name in ("notes.age", "notes"):
        ran = ortho("convert", out, *words, "-o", tmp_path / name, "--force")
        assert (ran.code, "notes.gguf.age" in ran.err) == (2, True), ran.err
    assert (tmp_path / "notes.age").read_bytes() == sealed
    ran = ortho("convert", out, *words[:2], "-o", tmp_path / "s.gguf.age", "--force")
    assert "would not be sealed, and says that it is" in ran.err
    assert make_seal([str(key.to_public())]) is not None


@pytest.mark.filterwarnings("ignore")  # other people's deprecations
def test_peft_loads_the_adapter_and_computes_the_full_model(tmp_path: Path, ortho: Ortho) -> None:
    peft_package = pytest.importorskip("peft")
    import transformers

    import ortho_cli

    out = split(ortho, tmp_path / "m", *COLUMNS, dtype=torch.float32)
    assert ortho("convert", out, "--to", "lora", "-o", tmp_path / "a", "-q").code == 0
    base = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    tokens = torch.randint(3, 90, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        alone = base(input_ids=tokens, use_cache=False).logits
        made = peft_package.PeftModel.from_pretrained(base, tmp_path / "a")
        adapted = {n for n, m in made.named_modules() if hasattr(m, "lora_A")}
        assert len(adapted) == 14
        assert {m.scaling["default"] for m in made.modules() if hasattr(m, "lora_A")} == {1.0}
        found = made(input_ids=tokens, use_cache=False).logits
        wanted = ortho_cli.load(out, alpha=1.0)(input_ids=tokens, use_cache=False).logits
    assert float((found - wanted).abs().max()) < 2e-6  # measured: 4e-7 of logits up to 1.5
    assert float((found - alone).abs().max()) > 1e-2
