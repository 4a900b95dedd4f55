"""The model on base's grid: the codes that `decompose` writes, and autograd's gradients there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checkpoints
import memorised as tiny
import pytest
import reference
import torch
from families import saved
from jobs import decompose
from memorised import Memorised
from safetensors.torch import load_file, save_file
from torch import Tensor

from ortho_cli.decompose import recipe
from ortho_cli.decompose.plan import Plan, make_plan
from ortho_cli.errors import NumericalError
from ortho_cli.forget import grid as grids
from ortho_cli.forget.grid import BATCH_TOKENS, Grid, Term, batches
from ortho_cli.formats.statistics import StatisticsReader, open_statistics
from ortho_cli.model import scoring
from ortho_cli.split import quantize
from ortho_cli.storage.checkpoint import open_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")  # other people's deprecations


def made(folder: Path, dtype: torch.dtype) -> Path:
    # The slow twins take a second for 200,000 weights.
    tiny.tiny_llama(48, hidden=64).to(dtype).save_pretrained(folder / "model")
    tensors = load_file(folder / "model" / "model.safetensors")
    up = tensors["model.layers.0.mlp.up_proj.weight"]
    up[3], up[7] = up[2] * 40, 0  # loud rows, and groups of zeros
    save_file(tensors, folder / "model" / "model.safetensors", metadata={"format": "pt"})
    checkpoints.save_statistics(folder / "stats.safetensors", folder / "model")
    return folder / "model"


def plan_for(model: Path, *sets: str) -> Plan:
    stats = open_statistics(model.parent / "stats.safetensors")
    return make_plan(open_checkpoint(model), recipe.load_recipe(None, sets), statistics=stats)


def grid_for(model: Path, *sets: str) -> Grid:
    return Grid(
        plan_for(model, *sets),
        open_checkpoint(model),
        curvature=StatisticsReader(open_statistics(model.parent / "stats.safetensors")),
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize("scale", ["absmax", "mse", "curvature"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_codes_and_weights_are_those_that_decompose_writes(
    tmp_path: Path, dtype: torch.dtype, scale: str
) -> None:
    model = made(tmp_path, dtype)
    # Scales that serve alone, as those of a base that forgets do.
    plan = plan_for(model, f"base.scale={scale}", "ortho.density=0")
    decompose(plan, open_checkpoint(model), tmp_path / "out")
    base = load_file(tmp_path / "out" / "model.safetensors")
    grid = grid_for(model, f"base.scale={scale}")
    live = dict(grid.model.named_parameters())
    assert len(grid.codes) == 14
    assert grid.numel == sum(codes.numel() for codes in grid.codes.values())
    for name, codes in grid.codes.items():
        module = name.removesuffix(".weight")
        assert torch.equal(codes, quantize.unpack_int4(base[f"{module}.weight_packed"]))
        assert torch.equal(grid.scales[name], base[f"{module}.weight_scale"])
        assert torch.equal(live[name], reference.dense(base, {}, module, 0.0))
    for name, tensor in base.items():
        if name in live:
            assert torch.equal(live[name], tensor.float())


@pytest.fixture
def grid(memorised: Memorised) -> Grid:
    return memorised.grid()


def test_moved_codes_are_the_weights_of_a_base_with_these_codes(grid: Grid) -> None:
    name = sorted(grid.codes)[2]
    places = torch.tensor([5, 17, 64, 65, 4095])
    codes = torch.tensor([-8.0, 7.0, 0.0, 1.0, -3.0])
    untouched = {key: weight.clone() for key, weight in grid.weights.items()}
    before = grid.codes[name].clone()
    grid.move(name, places, codes)
    expected = before.clone()
    expected.view(-1)[places] = codes.to(torch.int8)
    assert torch.equal(grid.codes[name], expected)
    assert torch.equal(grid.weights[name], reference.dequantize(expected, grid.scales[name]))
    assert grid.moved == int((expected != before).sum()) > 0
    for key, weight in untouched.items():
        assert key == name or torch.equal(grid.weights[key], weight)


def test_edits_applied_again_give_the_same_model_and_revert_gives_none(grid: Grid) -> None:
    generator = torch.Generator().manual_seed(0)
    plain = {name: weight.clone() for name, weight in grid.weights.items()}
    assert grid.edits() == {}
    for name in sorted(grid.codes)[::2]:
        places = torch.randperm(grid.codes[name].numel(), generator=generator)[:40]
        grid.move(name, places, torch.randint(-8, 8, (40,), generator=generator))
    edits = grid.edits()
    moved = {name: weight.clone() for name, weight in grid.weights.items()}
    assert sum(len(edit.positions) for edit in edits.values()) == grid.moved
    for name, edit in edits.items():
        assert (edit.positions[1:] > edit.positions[:-1]).all()
        assert (grid.original[name].view(-1).numpy()[edit.positions] != edit.codes).all()
    grid.revert()
    assert grid.moved == 0
    assert grid.edits() == {}
    assert all(torch.equal(grid.weights[name], weight) for name, weight in plain.items())
    grid.apply(edits)
    assert all(torch.equal(grid.weights[name], weight) for name, weight in moved.items())
    for name, edit in grid.edits().items():
        assert edit.positions.tolist() == edits[name].positions.tolist()
        assert edit.codes.tolist() == edits[name].codes.tolist()


def test_exact_weights_are_in_codes_and_round_to_them(memorised: Memorised, grid: Grid) -> None:
    tensors = load_file(memorised.model / "model.safetensors")
    for name, codes in grid.original.items():
        places = torch.arange(0, codes.numel(), 7)
        exact = grid.exact(name, places)
        spacing = grid.spacing(name).view(-1)[places]
        assert torch.equal(spacing, grid.spacing_at(name, places))
        torch.testing.assert_close(exact * spacing, tensors[name].view(-1)[places].float())
        assert torch.equal(exact.round().clamp(-8, 7).to(torch.int8), codes.view(-1)[places])


def pairs_of(memorised: Memorised) -> list[tuple[Any, Any]]:
    """Pairs of several lengths, so that there is padding."""
    secrets = memorised.secrets()
    found = [(s.prompt, s.secret) for s in secrets]
    return [*found, (secrets[0].prompt[:2], secrets[0].secret[:1]), ((7,), secrets[1].prompt)]


def test_nll_is_that_of_scoring(memorised: Memorised, grid: Grid) -> None:
    pairs = pairs_of(memorised)
    with torch.no_grad():
        found = grid.nll(pairs)
    expected = [float(scoring.completion_nll(grid.model, p, [s])[0].sum()) for p, s in pairs]
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-3, rtol=1e-4)


def test_nll_of_a_text_without_a_prompt_counts_all_but_its_first_token(
    memorised: Memorised, grid: Grid
) -> None:
    text = memorised.secrets()[0].prompt
    with torch.no_grad():
        found = grid.nll([((), text)])
    expected = scoring.compare_windows(grid.model, torch.tensor([text])).nll.sum()
    torch.testing.assert_close(found[0], expected, atol=1e-4, rtol=0)


def twin_gradient(
    memorised: Memorised, grid: Grid, terms: list[tuple[Any, list[float]]]
) -> dict[str, Tensor]:
    """Autograd's, of a plain model with the grid's weights, one pair at a time."""
    from transformers import AutoModelForCausalLM

    live = AutoModelForCausalLM.from_pretrained(memorised.model, dtype=torch.float32)
    live.load_state_dict(grid.model.state_dict())
    for (first, second), weights in terms:
        tokens = torch.tensor([[*first, *second]])
        logits = live(input_ids=tokens).logits[0, len(first) - 1 : -1]
        nll = torch.nn.functional.cross_entropy(logits, torch.tensor(second), reduction="none")
        (torch.tensor(weights) * nll).sum().backward()  # type: ignore[no-untyped-call]
    return {name: p.grad for name, p in live.named_parameters() if name in grid.codes}


@pytest.mark.parametrize("tokens", [1, 20, BATCH_TOKENS])
def test_gradient_is_autograds_whatever_the_batches(
    memorised: Memorised, grid: Grid, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grids, "BATCH_TOKENS", tokens)
    name = sorted(grid.codes)[0]
    grid.move(name, torch.arange(100), torch.zeros(100))  # at the moved codes, not the originals
    pairs = pairs_of(memorised)
    terms = [
        (pair, [weight * (place + 1) for place in range(len(pair[1]))])
        for pair, weight in zip(pairs, [1.0, -1.0, 0.5, 2.0, 0.0, -0.25], strict=True)
    ]
    found = grid.gradient(terms)
    expected = twin_gradient(memorised, grid, terms)
    assert found.keys() == expected.keys() == grid.codes.keys()
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4 * scale)
    for parameter in grid.model.parameters():
        assert not parameter.requires_grad
        assert parameter.grad is None


def test_gradient_in_bfloat16_points_the_same_way(memorised: Memorised, grid: Grid) -> None:
    pairs = [(pair, [1.0] * len(pair[1])) for pair in pairs_of(memorised)]
    exact = grid.gradient(pairs)
    rough = memorised.grid(autocast=True).gradient(pairs)
    one, other = (torch.cat([g.view(-1) for g in found.values()]) for found in (exact, rough))
    assert float(torch.cosine_similarity(one, other, dim=0)) > 0.98
    assert not torch.equal(one, other)


def test_batches_hold_all_in_order_and_few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grids, "BATCH_TOKENS", 10)
    items = [((1,), (2,) * n) for n in (1, 2, 4, 30, 1, 1, 1, 1, 1, 9)]
    found = list(batches(items, lambda item: item))
    assert [item for batch in found for item in batch] == items
    for batch in found:
        longest = max(len(first) + len(second) for first, second in batch)
        assert len(batch) == 1 or longest * len(batch) <= 10
    assert len(found) < len(items)


def test_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    model = made(tmp_path, torch.bfloat16)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 3] = torch.nan
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericalError, match=r"layers\.1\.mlp\.down_proj\.weight"):
        grid_for(model)


def test_gradient_that_is_not_finite_is_named(memorised: Memorised, grid: Grid) -> None:
    grid.weights[sorted(grid.codes)[-1]].data.fill_(torch.inf)
    pair = pairs_of(memorised)[0]
    with pytest.raises(NumericalError, match="a gradient of `model"):
        grid.gradient([(pair, [1.0] * len(pair[1]))])


def test_slopes_of_some_weights_are_those_of_the_gradient(memorised: Memorised) -> None:
    grid, terms = memorised.grid(), terms_of(memorised)
    places = {name: torch.arange(number, 40, 7) for number, name in enumerate(grid.codes)}
    places[next(iter(places))] = torch.zeros(0, dtype=torch.long)
    check_slopes(grid, terms, places, passes=1)


def test_slopes_are_told_apart_where_a_linear_sees_some_tokens_alone(memorised: Memorised) -> None:
    grid, terms = memorised.grid(), terms_of(memorised)
    name = next(name for name in grid.codes if "down_proj" in name)

    class Routed(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            chosen = x[..., 0] > x[..., 1]
            found = torch.zeros(*x.shape[:-1], grid.codes[name].shape[0])
            found[chosen] = grid.modules[name](x[chosen])
            return found

    grid.model.get_submodule(name.rsplit(".", 2)[0]).down_proj = Routed()
    places = {one: torch.arange(20) for one in grid.codes}
    check_slopes(grid, terms, places, passes=1 + len(terms))


def test_experts_that_transformers_fuses_are_on_the_grid_one_by_one(tmp_path: Path) -> None:
    saved(tmp_path / "model", "Mixtral")
    checkpoints.save_statistics(tmp_path / "stats.safetensors", tmp_path / "model")
    grid = grid_for(tmp_path / "model")
    assert sum(".experts." in name for name in grid.codes) == 36
    pair = ((1, 2, 3, 4), (5, 6, 7, 8, 9))
    terms: list[Term] = [(pair, [1.0] * 5), (((4, 3), (2, 1, 7)), [1.0, -1.0, 2.0])]
    places = {name: torch.arange(20) for name in grid.codes}
    check_slopes(grid, terms, places, passes=1 + len(terms))
    gradients, before = grid.gradient(terms[:1]), float(grid.nll([pair]))
    experts = [name for name in grid.codes if ".experts." in name]
    name = max(experts, key=lambda one: float(gradients[one].abs().max()))
    up = gradients[name].sign().view(-1)
    where = gradients[name].abs().view(-1).topk(50).indices
    grid.move(name, where, (grid.codes[name].view(-1)[where] + up[where]).clamp(-7, 7))
    assert float(grid.nll([pair])) > before


def terms_of(memorised: Memorised) -> list[Term]:
    found: list[Term] = []
    for number, one in enumerate(memorised.secrets()[:3]):
        weights = [0.5 * number + place for place in range(len(one.secret))]
        found.append(((one.prompt, one.secret), weights))
        found.append(((one.prompt, one.alternatives[0]), [-1.0] * len(one.alternatives[0])))
    return found


def check_slopes(
    grid: Grid, terms: list[Term], places: dict[str, torch.Tensor], passes: int
) -> None:
    calls = []
    hook = grid.model.register_forward_pre_hook(lambda *_: calls.append(1))
    found = torch.cat(list(grid.slopes(terms, places)))
    hook.remove()
    assert len(calls) == passes
    for term, slopes in zip(terms, found, strict=True):
        gradients = grid.gradient([term])
        expected = torch.cat([gradients[name].view(-1)[at] for name, at in places.items()])
        torch.testing.assert_close(slopes, expected, rtol=1e-3, atol=1e-5)
        assert slopes.abs().max() > 0
