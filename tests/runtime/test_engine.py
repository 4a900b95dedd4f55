"""Engine and load: whole models split, set, saved and loaded, and each way that must fail."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ortho_cli
from ortho_cli.errors import (
    ArtifactError,
    CalibrationError,
    NumericalError,
    OutputExistsError,
    RecipeError,
    UsageError,
)
from ortho_cli.formats.open_artifact import open_artifact
from ortho_cli.formats.verify import verify
from ortho_cli.runtime import pretrained
from ortho_cli.runtime.engine import Engine, at_alpha, set_alpha
from ortho_cli.runtime.ortho_linear import OrthoLinear
from ortho_cli.split import quantize

Ortho = Callable[..., Any]


class Odd(nn.Linear):
    """A Linear that does more than a Linear."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class Net(nn.Module):
    """One of everything that surgery meets."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(20, 64)
        self.first = nn.Linear(64, 96)
        self.blocks = nn.ModuleList([nn.Linear(96, 96, bias=False) for _ in range(2)])
        self.odd = Odd(96, 96)
        self.narrow = nn.Linear(32, 96)
        self.out = nn.Linear(96, 64)
        self.lm_head = nn.Linear(64, 20, bias=False)
        self.proj = nn.Linear(64, 20, bias=False)
        self.proj.weight = self.embed.weight
        self.alias = self.first  # one module in two places
        self.register_buffer("steps", torch.tensor(3))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.first(self.embed(tokens)) + self.alias(self.embed(tokens))
        for block in self.blocks:
            x = torch.tanh(block(x))
        x = self.out(self.odd(x) + self.narrow(x[..., :32]))
        y: Tensor = self.lm_head(x) + self.proj(x)
        return y


TOKENS = torch.arange(8).view(2, 4)


def made(alpha: Any = 1.0, **settings: Any) -> tuple[Net, Engine]:
    net = Net()
    engine = Engine(net)
    engine.convert()
    engine.decompose(**{"density": 0.02, **settings})
    engine.set_alpha(alpha)
    return net, engine


def test_convert_chooses_and_gives_reasons_for_the_rest() -> None:
    reasons = Engine(Net()).convert(ignore=["blocks.1.*"])
    assert reasons == {
        "first": None,
        "blocks.0": None,
        "blocks.1": "ignored by the recipe",
        "odd": "Odd has a forward of its own",
        "narrow": "in_features 32 < 64",
        "out": None,
        "lm_head": "output head",
        "proj": "tied",
    }
    chosen = Engine(Net()).convert(targets=["re:blocks", "narrow.weight", "lm_head.weight"])
    split = {name for name, reason in chosen.items() if reason is None}
    assert split == {"blocks.0", "blocks.1", "narrow", "lm_head"}


def test_convert_judges_modules_by_their_whole_path() -> None:
    def linear(rows: int) -> nn.Linear:
        return nn.Linear(64, rows)

    router = nn.ModuleDict({"layer": linear(8)})
    block = nn.ModuleDict({"router": router, "output": linear(64), "gate": linear(128)})
    module = nn.ModuleDict(
        {"blocks": nn.ModuleList([block]), "lm_heads": nn.ModuleList([linear(96)])}
    )
    assert Engine(module).convert() == {
        "blocks.0.router.layer": "router",
        "blocks.0.output": None,
        "blocks.0.gate": None,
        "lm_heads.0": "output head",
    }


def test_convert_refuses_a_choice_of_nothing() -> None:
    for targets in (["odd.weight"], ["proj.weight"]):
        with pytest.raises(UsageError, match="nothing to split"):
            Engine(Net()).convert(targets=targets)
    with pytest.raises(UsageError, match="`nowhere` matches no Linear"):
        Engine(Net()).convert(targets=["nowhere"])
    with pytest.raises(UsageError, match="nothing to split"):
        Engine(nn.Linear(64, 64)).convert()


def test_linears_with_weights_that_are_not_their_own_are_left() -> None:
    net = Net()
    nn.utils.parametrizations.weight_norm(net.first)
    net.blocks[0].register_forward_hook(lambda *_: None)
    net.blocks[1].weight = nn.Parameter(torch.randn(96, 96))
    net.out.weight = nn.Parameter(net.blocks[1].weight.detach().t()[:64])  # a view of it
    reasons = Engine(net).convert(targets=["*"])
    assert "no parameter" in str(reasons["first"]) or "own" in str(reasons["first"])
    assert reasons["blocks.0"] == "it has forward hooks"
    assert reasons["blocks.1"] == reasons["out"] == "tied"


def test_decompose_swaps_every_place_and_keeps_ties() -> None:
    net, _ = made()
    assert isinstance(net.first, OrthoLinear)
    assert net.alias is net.first
    assert net.proj.weight is net.embed.weight
    assert isinstance(net.odd, Odd)
    assert net.first.group_size == 32
    original = Net()
    for name in ("first", "blocks.0", "out"):
        split, source = net.get_submodule(name), original.get_submodule(name)
        base = quantize.dequantize(quantize.unpack_int4(split.weight_packed), split.weight_scale)
        same = split.weight == source.weight
        assert int(same.sum()) >= round(0.02 * source.weight.numel())
        assert torch.equal(split.weight[~same], base[~same])


def test_alpha_1_with_everything_kept_is_the_source() -> None:
    net, engine = made(density=1.0)
    assert torch.allclose(net(TOKENS), Net()(TOKENS), atol=1e-5)
    engine.set_alpha(0.0)
    assert not torch.allclose(net(TOKENS), Net()(TOKENS), atol=1e-2)


def test_decompose_twice_is_refused() -> None:
    net, engine = made()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    for again in (engine, Engine(net)):
        with pytest.raises(UsageError, match="decomposed already"):
            again.decompose()
        with pytest.raises(UsageError, match="decomposed already"):
            again.convert()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_decompose_that_fails_leaves_the_module_whole() -> None:
    net = Net()
    with torch.no_grad():
        net.out.weight[2, 3] = torch.nan
    with pytest.raises(NumericalError, match=r"`out\.weight`"):
        Engine(net).decompose()
    assert not any(isinstance(child, OrthoLinear) for child in net.modules())
    with pytest.raises(RecipeError, match=r"group_size 128 .* `first\.weight`"):
        Engine(Net()).decompose(group_size=128)
    with pytest.raises(RecipeError, match="density is 2"):
        Engine(Net()).decompose(density=2)
    with pytest.raises(RecipeError, match="scale"):
        Engine(Net()).decompose(scale="best")


def test_curvature_is_used_and_must_be_complete() -> None:
    engine = Engine(Net())
    chosen = [name for name, reason in engine.convert().items() if reason is None]
    full = {f"{n}.weight": torch.zeros(engine.module.get_submodule(n).in_features) for n in chosen}
    for values in full.values():
        values[7] = 1.0
    with pytest.raises(CalibrationError, match=r"`out\.weight`"):
        engine.decompose(curvature={n: v for n, v in full.items() if n != "out.weight"})
    engine.curvature.update(full)
    engine.decompose(density=0.005)
    columns = engine.module.get_submodule("first").col_indices
    assert set(columns.tolist()) == {7}


def test_set_alpha_is_all_or_none_and_at_alpha_restores() -> None:
    net, engine = made(alpha=0.25)
    for bad in (float("nan"), 7, float("inf"), -0.5):
        with pytest.raises(UsageError, match="alpha"):
            set_alpha(net, bad)
    with pytest.raises(UsageError, match="no OrthoLinear"):
        set_alpha(nn.Linear(2, 2), 1.0)
    layers = [child for child in net.modules() if isinstance(child, OrthoLinear)]
    layers[0].alpha = 0.75
    with at_alpha(net, 1.0):
        assert {layer.alpha for layer in layers} == {1.0}
    assert [layer.alpha for layer in layers] == [0.75, 0.25, 0.25, 0.25]
    with pytest.raises(UsageError, match="for 3 batch rows"), at_alpha(net, torch.ones(2)):
        net(torch.zeros(3, 4, dtype=torch.long))
    assert [layer.alpha for layer in layers] == [0.75, 0.25, 0.25, 0.25]
    layers[-1].values = layers[-1].crow_indices = layers[-1].col_indices = None
    with pytest.raises(ArtifactError, match="`out` has no ortho stream"):
        engine.set_alpha(1.0)
    assert layers[0].alpha == 0.75
    engine.set_alpha(0.0)


def test_one_alpha_a_batch_row_equals_each_alone() -> None:
    net, engine = made()
    alone = []
    for row, alpha in enumerate((0.0, 1.0)):
        engine.set_alpha(alpha)
        alone.append(net(TOKENS)[row])
    engine.set_alpha(torch.tensor([0.0, 1.0]))
    assert torch.allclose(net(TOKENS), torch.stack(alone), atol=1e-4)
    assert (alone[0] - alone[1]).abs().max() > 1e-3
    with pytest.raises(UsageError, match="2 values for 3"):
        net(torch.zeros(3, 4, dtype=torch.long))


def test_save_is_a_sound_artifact_and_loads_back(tmp_path: Path) -> None:
    net, engine = made(scale="mse")
    engine.save(tmp_path / "out")
    opened = open_artifact(tmp_path / "out")
    assert opened.split == ("blocks.0", "blocks.1", "first", "out")
    verify(opened)
    assert (tmp_path / "out" / "ortho.safetensors").stat().st_mode & 0o777 == 0o600
    base = load_file(tmp_path / "out" / "model.safetensors")
    assert ("embed.weight" in base) != ("proj.weight" in base)
    fresh = Net(seed=5)
    other = Engine(fresh)
    other.load(tmp_path / "out", alpha=1.0)
    assert torch.equal(fresh(TOKENS), net(TOKENS))
    assert fresh.alias is fresh.first
    other.save(tmp_path / "again")
    for name in ("model.safetensors", "ortho.safetensors", "model.safetensors.index.json"):
        first, second = (tmp_path / folder / name for folder in ("out", "again"))
        assert first.read_bytes() == second.read_bytes(), name
    with pytest.raises(UsageError, match="decomposed already"):
        other.load(tmp_path / "out", alpha=1.0)


def test_save_refuses_what_is_there_and_what_is_not_split(tmp_path: Path) -> None:
    _, engine = made()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(OutputExistsError, match="full"):
            engine.save(tmp_path / "full", force=force)
    engine.save(tmp_path / "out")
    with pytest.raises(OutputExistsError):
        engine.save(tmp_path / "out")
    engine.save(tmp_path / "out", force=True)
    with pytest.raises(UsageError, match="no OrthoLinear"):
        Engine(Net()).save(tmp_path / "none")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "out"]


def test_base_alone_loads_and_saves_without_ortho(tmp_path: Path) -> None:
    net, engine = made(alpha=0.0)
    engine.save(tmp_path / "out")
    (tmp_path / "out" / "ortho.safetensors").unlink()
    fresh = Net(seed=1)
    other = Engine(fresh)
    other.load(tmp_path / "out", alpha=0.0)
    assert torch.equal(fresh(TOKENS), net(TOKENS))
    with pytest.raises(ArtifactError, match="no ortho"):
        other.set_alpha(0.1)
    other.save(tmp_path / "again")
    assert not (tmp_path / "again" / "ortho.safetensors").exists()


def change(net: Net, how: str) -> Net:
    if how == "missing":
        net.extra = nn.Linear(4, 4)
    elif how == "unexpected":
        del net.steps
    elif how == "shape":
        net.lm_head = nn.Linear(64, 21, bias=False)
    elif how == "dtype":
        net.narrow.half()
    elif how == "untied":
        net.proj.weight = nn.Parameter(net.proj.weight.detach().clone())
    elif how == "split shape":
        net.out = nn.Linear(96, 32)
    elif how == "own forward":
        net.out = Odd(96, 64)
    elif how == "no linear":
        net.blocks[1] = nn.Identity()
    return net


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ("missing", "extra.weight"),
        ("unexpected", "steps"),
        ("shape", "lm_head.weight"),
        ("dtype", "narrow"),
        ("untied", "proj.weight"),
        ("split shape", "out"),
        ("own forward", "out"),
        ("no linear", "blocks.1"),
    ],
)
def test_load_fails_closed_and_names_the_key(tmp_path: Path, how: str, named: str) -> None:
    made()[1].save(tmp_path / "out")
    net = change(Net(seed=1), how)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(ArtifactError, match=f"`{named}"):
        Engine(net).load(tmp_path / "out", alpha=1.0)
    after = net.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())


def test_conv1d_models_are_split(tmp_path: Path) -> None:
    from transformers.pytorch_utils import Conv1D

    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(Conv1D(96, 64), nn.GELU(), Conv1D(64, 96))

    net = build(0)
    engine = Engine(net)
    assert engine.convert() == {"0": None, "2": None}
    engine.decompose(density=1.0)
    engine.set_alpha(1.0)
    x = torch.randn(3, 64)
    assert torch.allclose(net(x), build(0)(x), atol=1e-5)
    engine.save(tmp_path / "out")
    fresh = build(1)
    Engine(fresh).load(tmp_path / "out", alpha=1.0)
    assert torch.equal(fresh(x), net(x))


# transformers


def llama(folder: Path, *, tied: bool = True) -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    return model


@pytest.fixture
def artifact_of_llama(tmp_path: Path, ortho: Ortho) -> Path:
    llama(tmp_path / "m")
    assert ortho("decompose", tmp_path / "m", "-q", "--set", "ortho.density=0.05").code == 0
    return tmp_path / "m-ortho"


@pytest.mark.filterwarnings("ignore")  # other people's deprecations
@pytest.mark.parametrize("tied", [True, False])
def test_load_equals_transformers_at_0_and_patched_weights_at_1(
    tmp_path: Path, ortho: Ortho, tied: bool
) -> None:
    import transformers

    source = llama(tmp_path / "m", tied=tied)
    ortho("decompose", tmp_path / "m", "--recipe", "int4", "-q", "--set", "ortho.density=0.05")
    out = tmp_path / "m-ortho"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    ours = ortho_cli.load(out, alpha=0.0)
    tokens = torch.arange(16)[None]
    with torch.no_grad():
        expected, logits = theirs(tokens).logits.float(), ours(tokens).logits.float()
    size = expected.abs().max()
    assert (logits - expected).abs().max() <= 0.03 * size
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) is tied
    layers = {n: m for n, m in ours.named_modules() if isinstance(m, OrthoLinear)}
    assert len(layers) == 14
    set_alpha(ours, 1.0)
    with torch.no_grad():
        for name, layer in layers.items():
            base = quantize.dequantize(
                quantize.unpack_int4(layer.weight_packed), layer.weight_scale
            )
            dense, weight = layer.weight.float(), source.get_parameter(f"{name}.weight")
            kept = dense == weight.float()
            assert int(kept.sum()) >= round(0.05 * weight.numel())
            assert torch.equal(dense[~kept], base[~kept])
            weight.copy_(dense)
        expected, logits = source(tokens).logits.float(), ours(tokens).logits.float()
    assert (logits - expected).abs().max() <= 0.03 * expected.abs().max()
    with at_alpha(ours, 0.0), torch.no_grad():
        assert (ours(tokens).logits.float() - expected).abs().max() > 0.03 * size


def test_load_is_quiet_and_gives_an_ordinary_model(
    artifact_of_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ortho_cli.load(artifact_of_llama, alpha=1.0)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert not model.training
    config = model.config.quantization_config
    assert (config if isinstance(config, dict) else config.to_dict())["quant_method"] != "ortho"
    tokens = torch.arange(8)[None]
    with pytest.raises(ValueError, match="not serializable"):  # it would publish both streams
        model.save_pretrained(artifact_of_llama / "plain")
    assert torch.equal(copy.deepcopy(model)(tokens).logits, model(tokens).logits)
    model.float()
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    assert model.model.embed_tokens.weight.grad is not None
    again = ortho_cli.load(artifact_of_llama, alpha=1.0, dtype=torch.float32)
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_two_artifacts_load_side_by_side(tmp_path: Path, ortho: Ortho) -> None:
    for name, tied in (("a", True), ("b", False)):
        llama(tmp_path / name, tied=tied)
        ortho("decompose", tmp_path / name, "-q")
    loaded = [ortho_cli.load(tmp_path / f"{name}-ortho", alpha=1.0) for name in "aba"]
    tokens = torch.arange(8)[None]
    assert torch.equal(loaded[0](tokens).logits, loaded[2](tokens).logits)


def rewrite(path: Path, **changes: Tensor | None) -> None:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    for suffix, value in changes.items():
        key = next(name for name in sorted(tensors) if name.endswith(suffix))
        if value is None:
            del tensors[key]
        else:
            tensors[key] = value
    save_file(tensors, path, metadata=metadata)


@pytest.mark.parametrize("fault", ["pointer", "column", "cut", "shape"])
def test_load_of_damaged_files_fails_closed(artifact_of_llama: Path, fault: str) -> None:
    base, stream = (artifact_of_llama / f"{n}.safetensors" for n in ("model", "ortho"))
    tensors = load_file(stream)
    first = min(name for name in tensors if name.endswith("col_indices"))
    module = first.removesuffix(".col_indices")
    if fault == "pointer":
        crow = tensors[f"{module}.crow_indices"]
        crow[3] = 1 << 20
        rewrite(stream, crow_indices=crow)
    elif fault == "column":
        column = tensors[first]
        column[0] = 6000
        rewrite(stream, col_indices=column)
    elif fault == "cut":
        stream.write_bytes(stream.read_bytes()[:-8])
    else:
        rewrite(base, weight_shape=torch.tensor([1, 2]))
    with pytest.raises(ArtifactError):
        ortho_cli.load(artifact_of_llama, alpha=1.0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fault", ["missing", "unexpected", "bigger"])
def test_load_names_the_key_that_does_not_fit(artifact_of_llama: Path, fault: str) -> None:
    base = artifact_of_llama / "model.safetensors"
    index = artifact_of_llama / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    if fault == "missing":
        rewrite(base, **{"model.norm.weight": None})
        del listed["weight_map"]["model.norm.weight"]
        match = r"missing keys such as .*model\.norm\.weight"
    elif fault == "unexpected":
        tensors = load_file(base)
        rewrite(base, **{"model.norm.weight": tensors["model.norm.weight"]})
        config = json.loads((artifact_of_llama / "config.json").read_text())
        config["num_hidden_layers"] = 1
        (artifact_of_llama / "config.json").write_text(json.dumps(config))
        match = r"`model\.layers\.1\."
    else:
        rewrite(base, **{"model.norm.weight": torch.ones(63, dtype=torch.bfloat16)})
        match = r"mismatched keys such as .*model\.norm\.weight"
    index.write_text(json.dumps(listed))
    with pytest.raises(ArtifactError, match=match):
        ortho_cli.load(artifact_of_llama, alpha=0.0)


def test_load_refuses_what_it_cannot_do(artifact_of_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        ortho_cli.load(artifact_of_llama)  # type: ignore[call-arg]
    for bad in (float("nan"), 7):
        with pytest.raises(UsageError, match="alpha"):
            ortho_cli.load(artifact_of_llama, alpha=bad)
    with pytest.raises(ArtifactError, match="does not exist"):
        ortho_cli.load(tmp_path / "nowhere", alpha=0.0)
    lone = tmp_path / "lone"
    shutil.copytree(artifact_of_llama, lone)
    (lone / "ortho.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"no ortho\.safetensors, and alpha is not 0"):
        ortho_cli.load(lone, alpha=0.5)
    tokens = torch.arange(8)[None]
    alone, both = (ortho_cli.load(f, alpha=0.0) for f in (lone, artifact_of_llama))
    assert torch.equal(alone(tokens).logits, both(tokens).logits)
    (lone / "config.json").unlink()
    with pytest.raises(ArtifactError, match=r"no config\.json"):
        ortho_cli.load(lone, alpha=0.0)


def test_load_without_transformers_says_so(
    artifact_of_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError, match="transformers is not installed"):
        ortho_cli.load(artifact_of_llama, alpha=0.0)


@pytest.mark.filterwarnings("ignore")
def test_what_engine_saves_of_a_transformers_model_load_reads(tmp_path: Path) -> None:
    import transformers

    llama(tmp_path / "m")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    engine = Engine(model)
    engine.decompose(density=0.05)
    engine.set_alpha(1.0)
    engine.save(tmp_path / "out")
    loaded = ortho_cli.load(tmp_path / "out", alpha=1.0)
    tokens = torch.arange(8)[None]
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_modules_are_found_under_another_prefix() -> None:
    modules = dict(
        nn.ModuleDict(
            {"text": nn.ModuleDict({"layers": nn.Sequential(nn.Linear(2, 2))})}
        ).named_modules()
    )
    tails = pretrained._by_tail(modules)
    for name, found in (
        ("model.layers.0", "text.layers.0"),
        ("text.layers.0", "text.layers.0"),
        ("model.layers.7", "model.layers.7"),
    ):
        assert pretrained._find(name, modules, tails) == found


def test_names_of_the_library_are_there_and_others_are_not() -> None:
    assert {"load", "set_alpha", "at_alpha", "Engine", "OrthoLinear"} <= set(dir(ortho_cli))
    for name in ortho_cli.__all__:
        assert getattr(ortho_cli, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ortho_cli.nothing
    code = "import sys, ortho_cli; ortho_cli.OrthoLinear; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
