"""Experts taken apart: the same model, and hooks that see whose tokens and gradients they are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ortho
from families import FAMILIES, MIXTURES, STACKED, saved
from torch import Tensor, nn

from ortho_cli.errors import CalibrationError
from ortho_cli.formats.statistics import open_statistics
from ortho_cli.model import hooks
from ortho_cli.model.experts import Experts, group_of, see_all, separate
from ortho_cli.model.load import find_linears
from ortho_cli.storage.checkpoint import open_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")  # other people's deprecations
EXPERT = re.compile(r"\.experts\.\d+\.")
TOKENS = torch.randint(1, 48, (3, 10), generator=torch.Generator().manual_seed(5))
THERE = torch.ones_like(TOKENS, dtype=torch.bool)
THERE[1, 7:] = False


def experts_of(folder: Path) -> list[str]:
    return [one.name for one in open_checkpoint(folder).tensors if EXPERT.search(one.name)]


def logits(model: nn.Module) -> Tensor:
    return model(input_ids=TOKENS, attention_mask=THERE.long(), use_cache=False).logits


@pytest.mark.parametrize("kind", MIXTURES)
def test_experts_one_by_one_are_the_model(tmp_path: Path, kind: str) -> None:
    model = saved(tmp_path, kind)
    names, before = experts_of(tmp_path), logits(model)
    assert len(names) >= 24
    linears = find_linears(model, names)
    assert list(linears) == names
    for tensor in open_checkpoint(tmp_path).tensors:
        if tensor.name in linears:
            assert tuple(linears[tensor.name].weight.shape) == tensor.shape
    assert torch.equal(logits(model)[THERE], before[THERE])
    first = linears[names[0]].weight
    first.data.zero_()
    assert not torch.equal(logits(model)[THERE], before[THERE])
    assert find_linears(model, names) == linears, "they are taken apart once"


def test_weights_of_experts_are_views(tmp_path: Path) -> None:
    model = saved(tmp_path, "Mixtral")
    stack = model.get_parameter("model.layers.0.mlp.experts.down_proj")
    linears = separate(model, experts_of(tmp_path))
    down = linears["model.layers.0.block_sparse_moe.experts.1.w2.weight"].weight
    assert down.data_ptr() == stack[1].data_ptr()
    assert not [name for name, _ in model.named_parameters() if name.endswith("experts.down_proj")]


def test_stacks_of_another_layout_stay_and_are_named(tmp_path: Path) -> None:
    import transformers

    config = transformers.GptOssConfig(
        **{**FAMILIES["Qwen3"], "num_local_experts": 2, "num_experts_per_tok": 1}
    )
    model = transformers.GptOssForCausalLM(config)
    name = "model.layers.0.mlp.experts.0.down_proj.weight"
    assert separate(model, [name]) == {}
    assert not any(isinstance(one, Experts) for one in model.modules())
    with pytest.raises(CalibrationError, match="is no module in the model"):
        find_linears(model, [name])


def test_a_group_is_the_same_weight_of_all_experts_of_a_layer() -> None:
    one = "model.layers.1.mlp.experts.3.up_proj.weight"
    assert group_of(one) == group_of(one.replace("3", "12")) is not None
    for other in (one.replace("layers.1", "layers.2"), one.replace("up_proj", "gate_proj")):
        assert group_of(other) not in (group_of(one), None)
    assert group_of("model.layers.1.mlp.up_proj.weight") is None


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe"])
def test_experts_that_see_all_tokens_compute_the_same(tmp_path: Path, kind: str) -> None:
    model = saved(tmp_path, kind)
    linears, before = find_linears(model, experts_of(tmp_path)), logits(model)
    own = routed(model, linears)
    see_all(model)
    seen = routed(model, linears)
    assert torch.allclose(logits(model)[THERE], before[THERE], atol=1e-5)
    assert {tuple(tokens.tolist()) for _, tokens in seen.values()} == {tuple(range(30))}
    assert seen.keys() == linears.keys()
    for name, (x, tokens) in own.items():
        if not re.search("down_proj|w2", name):
            assert torch.equal(seen[name][0][tokens], x)
        assert torch.equal(linears[name].chosen, tokens), "routed, not seen"


def routed(model: nn.Module, linears: dict[str, nn.Module]) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs of each Linear, and the tokens of the batch that they are of."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            found[name] = args[0].detach(), module.routed

        return hook

    handles = [one.register_forward_hook(keep(name)) for name, one in linears.items()]
    logits(model)
    for handle in handles:
        handle.remove()
    return found


def test_inputs_of_tokens_that_count_are_measured(tmp_path: Path) -> None:
    model = saved(tmp_path, "Qwen3Moe")
    linears = find_linears(model, experts_of(tmp_path))
    seen, sums = routed(model, linears), dict[tuple[str, str], Tensor]()
    counted = THERE.clone()
    counted[:, :4] = False

    def add(name: str, part: str, row: int, tile: Tensor) -> None:
        sums[name, part] = tile.clone()

    with hooks.Capture(linears, add, kind="gram", gram="full") as capture:
        capture.begin(3, counted, counted)
        logits(model)
    assert len(seen) > 20
    for name, (x, tokens) in seen.items():
        mine = x[counted.reshape(-1)[tokens]]
        assert torch.allclose(sums[name, "curvature"][0], mine.square().sum(0), atol=1e-6)
        assert torch.allclose(sums[name, "gram"], mine.T @ mine, atol=1e-6)
    assert any(len(x) != len(x[counted.reshape(-1)[t]]) for x, t in seen.values())


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe"])
def test_fisher_is_that_of_the_stacked_model_sequence_by_sequence(
    tmp_path: Path, kind: str
) -> None:
    stacked, names = saved(tmp_path, kind), experts_of(tmp_path)
    expected = dict.fromkeys(names, torch.zeros(()))
    stacked.requires_grad_(True)
    for row in range(3):
        length = int(THERE[row].sum())
        tokens = TOKENS[row : row + 1, :length]
        out = stacked(input_ids=tokens, use_cache=False).logits[0, :-1]
        stacked.zero_grad()
        nn.functional.cross_entropy(out, tokens[0, 1:], reduction="sum").backward()
        for name in names:
            layer, number, leaf = re.match(r".*\.(\d+)\..*\.(\d+)\.(\w+)\.weight", name).groups()
            experts = stacked.get_submodule(f"model.layers.{layer}.mlp.experts")
            both = experts.gate_up_proj.grad[int(number)]
            halves = dict(zip(("gate", "up"), both.chunk(2), strict=True))
            place = {"w1": "gate", "gate_proj": "gate", "w3": "up", "up_proj": "up"}.get(leaf)
            own = halves[place] if place else experts.down_proj.grad[int(number)]
            expected[name] = expected[name] + own.square()
    model = saved(tmp_path, kind)
    linears, sums = find_linears(model, names), dict[str, Tensor]()

    def add(name: str, part: str, row: int, tile: Tensor) -> None:
        sums[name] = tile.clone()

    with hooks.Capture(linears, add, kind="fisher") as capture:
        capture.begin(3, THERE)
        out = logits(model)
        kept = THERE[:, 1:] & THERE[:, :-1]
        labels = TOKENS[:, 1:].masked_fill(~kept, -100)
        nn.functional.cross_entropy(out[:, :-1].transpose(1, 2), labels, reduction="sum").backward()
    for name in names:
        found = sums.get(name, torch.zeros_like(expected[name]))
        assert torch.allclose(found, expected[name], rtol=1e-3, atol=1e-9), name


def test_an_expert_that_no_token_reaches_has_the_mean_of_the_others(
    tmp_path: Path, ortho: Ortho
) -> None:
    saved(tmp_path / "m", "Olmoe")
    few = ("--samples", 1, "--length", 3, "--batch-size", 1, "--set", "calibrate.dtype=float32")
    found = {}
    for way, limit in (("whole", "99GB"), ("blocks", "790MB")):
        ran = ortho("calibrate", tmp_path / "m", *few, "-o", tmp_path / way, "--max-memory", limit)
        assert ran.code == 0, ran.err
        said = " ".join(ran.err.split())
        name = re.search(r"no token reached `(.*?)` and \d+ more weights of experts", said)
        assert name, said
        assert ("block by block" in said) == (way == "blocks")
        found[way] = (tmp_path / way).read_bytes()
    assert found["whole"] == found["blocks"]
    told = open_statistics(tmp_path / "whole").tensors
    alike = [told[one] for one in told if group_of(one) == group_of(name[1])]
    reached = [one.mean for one in alike if one.tokens]
    assert told[name[1]].tokens == 0
    assert told[name[1]].lent
    assert not [one for one in alike if bool(one.tokens) == bool(one.lent)]
    assert told[name[1]].mean == pytest.approx(sum(reached) / len(reached), rel=1e-4)


@pytest.mark.parametrize("curvature", ["gram", "fisher"])
def test_an_expert_of_few_tokens_has_the_mean_of_those_with_more(
    tmp_path: Path, ortho: Ortho, curvature: str
) -> None:
    saved(tmp_path / "m", "Qwen3Moe")
    sets = [f"--set=calibrate.{one}" for one in ("dtype=float32", f"curvature={curvature}")]
    few = (tmp_path / "m", "--samples", 4, "--length", 16, "--gram", "full", *sets)
    assert ortho("calibrate", *few, "-o", tmp_path / "own", "--max-memory", "99GB").code == 0
    own = open_statistics(tmp_path / "own").tensors
    tokens = sorted(one.tokens for one in own.values() if one.tokens is not None)
    least = tokens[len(tokens) // 2]
    assert tokens[0] < least
    found = {}
    for way, limit in (("whole", "99GB"), ("blocks", "800MB")):
        more = ("--set", f"calibrate.min_tokens={least}", "--max-memory", limit)
        ran = ortho("calibrate", *few, *more, "-o", tmp_path / way)
        assert ran.code == 0, ran.err
        assert f"fewer than {least} tokens reached" in " ".join(ran.err.split())
        assert "weights have the mean of others" in " ".join(ran.out.split())
        found[way] = (tmp_path / way).read_bytes()
    assert found["whole"] == found["blocks"]
    told = open_statistics(tmp_path / "whole").tensors
    for name, one in told.items():
        assert one.tokens == own[name].tokens
        alike = [other for other in own if group_of(other) and group_of(other) == group_of(name)]
        lenders = [own[other].mean for other in alike if (own[other].tokens or 0) >= least]
        if one.lent:
            assert one.tokens is not None
            assert one.tokens < least
            assert one.mean == pytest.approx(sum(lenders) / len(lenders), rel=1e-4)
        else:
            assert one.mean == own[name].mean
            assert one.tokens is None or one.tokens >= least or not lenders


def test_tokens_of_an_expert_add_up_to_what_the_router_chose(tmp_path: Path, ortho: Ortho) -> None:
    model = saved(tmp_path / "m", "Qwen3Moe")
    args = (tmp_path / "m", "--samples", 3, "--length", 20, "--set", "calibrate.curvature=gram")
    every_token = ("--set", "calibrate.experts=all", "--set", "calibrate.min_tokens=1000")
    for out, more in (("own", ()), ("all", every_token)):
        ran = ortho("calibrate", *args, *more, "-o", tmp_path / out)
        assert ran.code == 0, ran.err
    own, every = (open_statistics(tmp_path / out) for out in ("own", "all"))
    counted = 3 * 19  # of each sequence the last token predicts nothing
    for layer in range(model.config.num_hidden_layers):
        gates = [n for n in own.tensors if f"layers.{layer}.mlp.experts" in n and "gate" in n]
        routed_to = sum(own.tensors[name].tokens or 0 for name in gates)
        assert routed_to == counted * model.config.num_experts_per_tok
        means = {every.tensors[name].mean for name in gates}
        assert len(means) == 1, "all see the same"
        assert not any(every.tensors[name].lent for name in gates)
    assert "lent" not in ortho("inspect", tmp_path / "all").out.split("(mean")[0]
    shown = ortho("inspect", tmp_path / "own")
    assert shown.code == 0
    assert "tokens" in shown.out


def test_no_gradient_comes_of_tokens_that_are_routed_elsewhere(
    tmp_path: Path, ortho: Ortho
) -> None:
    saved(tmp_path / "m", "Mixtral")
    sets = ("--set", "calibrate.experts=all", "--set", "calibrate.curvature=fisher")
    ran = ortho("calibrate", tmp_path / "m", *sets, "-o", tmp_path / "s")
    assert ran.code == 3
    assert "calibrate.experts is all, and calibrate.curvature is fisher" in " ".join(
        ran.err.split()
    )


@pytest.mark.parametrize("kind", STACKED)
def test_stacked_experts_are_split_one_by_one_and_stacked_again(
    tmp_path: Path, ortho: Ortho, kind: str
) -> None:
    import transformers

    import ortho_cli

    source, before = saved(tmp_path / "m", kind), open_checkpoint(tmp_path / "m").tensors
    ran = ortho("decompose", tmp_path / "m", "-o", tmp_path / "a")
    assert ran.code == 4
    assert "transformers loads their stacks alone" in " ".join(ran.err.split())
    apart = ("--set", "on_unsupported=split")
    few = ("--samples", 4, "--length", 12, "--gram", "full", *apart)
    for out, limit in (("s", "99GB"), ("b", "800MB")):
        ran = ortho("calibrate", tmp_path / "m", *few, "-o", tmp_path / out, "--max-memory", limit)
        if out == "b" and kind == "Gemma4Text":  # its blocks share a second argument
            assert ran.code == 5
            continue
        assert ran.code == 0, ran.err
        assert (tmp_path / out).read_bytes() == (tmp_path / "s").read_bytes()
    whole = ("--set", "ortho.density=1", "--stats", tmp_path / "s", *apart)
    ran = ortho("decompose", tmp_path / "m", "-o", tmp_path / "a", "--recipe", "curvature", *whole)
    assert ran.code == 0, ran.err
    assert "transformers loads their stacks alone" in " ".join(ran.err.split())
    assert "would leave them random" in (tmp_path / "a" / "README.md").read_text()
    full = ortho_cli.load(tmp_path / "a", alpha=1.0)
    assert torch.allclose(logits(full)[THERE], logits(source)[THERE], atol=1e-6)
    for alpha in (0, 1):
        dense = tmp_path / f"d{alpha}"
        ran = ortho("convert", tmp_path / "a", "--alpha", alpha, "-o", dense)
        assert ran.code == 0, ran.err
        assert [(t.name, t.shape) for t in open_checkpoint(dense).tensors] == [
            (t.name, t.shape) for t in before
        ]
        plain = transformers.AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
        ortho_cli.set_alpha(full, float(alpha))
        assert torch.allclose(logits(plain)[THERE], logits(full)[THERE], atol=1e-6)
    assert not torch.allclose(logits(full)[THERE], logits(plain)[THERE] + 1e-2, atol=1e-6)
    checked = ortho("inspect", tmp_path / "a", "--verify", "--expect-source", tmp_path / "m")
    assert checked.code == 0, checked.err
    assert ortho("inspect", tmp_path / "a", tmp_path / "m").code == 0


@pytest.mark.parametrize(
    "sets", [["on_unsupported=keep"], ['ignore=["*_linear*"]', "on_unsupported=split"]]
)
def test_stacks_stay_where_the_recipe_leaves_them(
    tmp_path: Path, ortho: Ortho, sets: list[str]
) -> None:
    import transformers

    saved(tmp_path / "m", "GraniteMoe")
    more = [f"--set={one}" for one in sets]
    ran = ortho("decompose", tmp_path / "m", "-o", tmp_path / "a", "--recipe", "int4", *more)
    assert ran.code == 0, ran.err
    assert "random" not in ran.err
    names = {tensor.name for tensor in open_checkpoint(tmp_path / "a").tensors}
    assert "model.layers.0.block_sparse_moe.input_linear.weight" in names
    checked = ortho("inspect", tmp_path / "a", "--expect-source", tmp_path / "m")
    assert checked.code == 0, checked.err
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
    full = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    stack = "model.layers.0.block_sparse_moe.experts.gate_up_proj"
    assert torch.equal(base.get_parameter(stack), full.get_parameter(stack))


@pytest.mark.parametrize("kind", ["Mixtral", "Glm4Moe"])
def test_default_of_a_mixture_is_measured(tmp_path: Path, ortho: Ortho, kind: str) -> None:
    saved(tmp_path / "m", kind)
    ran = ortho("decompose", tmp_path / "m", "-o", tmp_path / "a")
    assert ran.code == 0, ran.err
    assert "curvature is gram of 2,048 tokens" in " ".join(ran.out.split())
    stats, sets = tmp_path / "s", ("--set", "calibrate.curvature=true-fisher")
    few = ("--samples", 6, "--length", 12, "--gram", "full")
    for out, limit in (("s", "99GB"), ("b", "800MB")):
        ran = ortho(
            "calibrate", tmp_path / "m", *few, *sets, "-o", tmp_path / out, "--max-memory", limit
        )
        assert ran.code == 0, ran.err
    assert (tmp_path / "b").read_bytes() == stats.read_bytes()
    ran = ortho(
        "decompose",
        tmp_path / "m",
        "-o",
        tmp_path / "c",
        "--recipe",
        "capability",
        "--stats",
        stats,
    )
    assert ran.code == 0, ran.err
