"""OrthoLinear: the bits of the artifact, and a module that behaves under everything torch does."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ortho_cli.errors import ArtifactError, NumericalError, RecipeError, UsageError
from ortho_cli.formats.csr import BASE_PARTS, ORTHO_PARTS
from ortho_cli.runtime.ortho_linear import OrthoLinear
from ortho_cli.split.in_memory import split_weight

PARTS = (*BASE_PARTS, *ORTHO_PARTS)


def linear(dtype: torch.dtype = torch.bfloat16, *, seed: int = 0, bias: bool = True) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(64, 48, bias=bias, dtype=dtype)


def layer(source: nn.Module, alpha: Any = 1.0, **settings: Any) -> OrthoLinear:
    made = OrthoLinear.from_linear(source, **{"group_size": 32, "density": 0.1, **settings})
    made.alpha = alpha
    return made


def kept(made: OrthoLinear) -> Tensor:
    """Where ortho has entries, (out, in) bool."""
    assert made.crow_indices is not None
    assert made.col_indices is not None
    mask = torch.zeros(made.out_features, made.in_features, dtype=torch.bool)
    for row in range(made.out_features):
        mine = slice(int(made.crow_indices[row]), int(made.crow_indices[row + 1]))
        mask[row, made.col_indices[mine].long()] = True
    return mask


@pytest.mark.parametrize("scale", ["absmax", "mse"])
@pytest.mark.parametrize("density", [0.0, 0.013, 1.0])
def test_from_linear_gives_the_bits_that_decompose_writes(
    pico: Path, pico_tensors: dict[str, Tensor], ortho: Any, scale: str, density: float
) -> None:
    out = pico.parent / "out"
    sets = ("--set", f"base.scale={scale}", "--set", f"ortho.density={density}")
    assert ortho("decompose", pico, "-o", out, "-q", *sets).code == 0
    streams = load_file(out / "model.safetensors") | load_file(out / "ortho.safetensors")
    for name in ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.k_proj"):
        weight = pico_tensors[f"{name}.weight"]
        made = split_weight(weight, group_size=64, density=density, scale=scale)
        for part in PARTS:
            assert made[part].dtype == streams[f"{name}.{part}"].dtype
            assert torch.equal(made[part], streams[f"{name}.{part}"]), (name, part)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_kept_weights_are_the_sources_own_at_alpha_1(dtype: torch.dtype) -> None:
    source = linear(dtype)
    made = layer(source)
    mask = kept(made)
    assert int(mask.sum()) == round(0.1 * 64 * 48)
    assert torch.equal(made.weight[mask], source.weight[mask])
    full = made.weight
    made.alpha = 0.0
    assert torch.equal(made.weight[~mask], full[~mask])
    assert not torch.equal(made.weight[mask], full[mask])
    made.alpha = 0.5
    middle = (made.weight[mask].float() - source.weight[mask].float()).abs()
    assert 0 < middle.max() < 0.1


def test_reading_does_not_change_the_values() -> None:
    made = layer(linear(torch.float32))
    before = copy.deepcopy(made.state_dict())
    made(torch.randn(3, 64))
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())


def test_conv1d_and_strides_give_the_same_split() -> None:
    from transformers.pytorch_utils import Conv1D

    source = linear()
    conv = Conv1D(48, 64).to(torch.bfloat16)
    conv.weight.data.copy_(source.weight.t())
    conv.bias.data.copy_(source.bias)
    wide = linear()
    wide.weight = nn.Parameter(source.weight.detach().t().contiguous().t())
    assert not wide.weight.is_contiguous()
    x = torch.randn(2, 64).bfloat16()
    for other in (conv, wide):
        made = layer(other)
        assert all(torch.equal(getattr(made, p), getattr(layer(source), p)) for p in PARTS)
        assert torch.equal(made(x), layer(source)(x))


def test_curvature_moves_what_is_kept_as_the_slow_twin_says() -> None:
    source = linear(torch.float32)
    plain = layer(source, alpha=0.0)
    residual = (source.weight - plain.weight).detach().double()
    random = torch.Generator().manual_seed(1)
    full = torch.exp(4 * torch.randn(48, 64, generator=random)) * 1e-30
    for curvature in (full, full[0]):
        made = layer(source, curvature=curvature)
        saliency = residual.abs() * curvature.double().sqrt()
        expected = reference.top_k_indices(saliency, round(0.1 * 64 * 48))
        assert kept(made).flatten().nonzero().flatten().tolist() == expected
        assert not torch.equal(kept(made), kept(plain))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"group_size": 24}, RecipeError, r"24 does not divide in_features 64 of `a.weight`"),
        ({"group_size": 4}, RecipeError, "group_size 4"),
        ({"density": 1.5}, RecipeError, r"density is 1\.5"),
        ({"density": float("nan")}, RecipeError, "density is nan"),
        ({"scale": "best"}, RecipeError, "scale is 'best'"),
        ({"curvature": torch.ones(48)}, UsageError, r"`a.weight` has shape \[48\]"),
        ({"curvature": -torch.ones(64)}, NumericalError, r"curvature of `a\.weight`"),
        ({"curvature": torch.full((64,), torch.nan)}, NumericalError, r"curvature of `a\.weight`"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    change: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        layer(linear(), name="a.weight", **change)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_is_named(bad: float) -> None:
    source = linear()
    with torch.no_grad():
        source.weight[3, 4] = bad
    with pytest.raises(NumericalError, match=r"`a\.weight` holds (nan|inf) at \[3, 4\]"):
        layer(source, name="a.weight")


def test_alpha_has_no_default_and_bad_ones_are_refused() -> None:
    made = layer(linear(), alpha=None)
    with pytest.raises(UsageError, match="alpha is not set") as caught:
        made(torch.zeros(1, 64))
    assert "set_alpha" in str(caught.value.hint)
    with pytest.raises(UsageError, match="not set"):
        _ = made.weight
    for bad in (float("nan"), 7, -1):
        with pytest.raises(UsageError, match="alpha"):
            made.alpha = bad
    assert made.alpha is None


@pytest.mark.parametrize("cast", ["half", "float", "bfloat16", "double"])
def test_casts_leave_both_streams_alone(cast: str) -> None:
    source = linear()
    made = layer(source)
    before, full = made.state_dict(), made.weight
    holder = nn.Sequential(made)
    getattr(holder, cast)()
    holder.to(torch.float16)
    for name, value in made.state_dict().items():
        if name != "bias":
            assert value.dtype == before[name].dtype
            assert torch.equal(value, before[name])
    assert torch.equal(made.weight, full)
    assert made.bias is not None
    assert made.bias.dtype == torch.float16
    x = torch.randn(2, 64).half()
    assert made(x).dtype == torch.float16


def test_moving_to_meta_and_back_keeps_dtypes_and_makes_room() -> None:
    made, other = layer(linear()), layer(linear(seed=1))
    made(torch.randn(1, 64).bfloat16())
    dtypes = {name: value.dtype for name, value in made.state_dict().items()}
    made.to("meta")
    assert made.weight.is_meta
    made.to_empty(device="cpu")
    assert {name: value.dtype for name, value in made.state_dict().items()} == dtypes
    made.load_state_dict(other.state_dict())
    x = torch.randn(2, 64).bfloat16()
    assert torch.equal(made(x), other(x))


@pytest.mark.parametrize("assign", [False, True])
def test_no_cache_outlives_its_buffers(assign: bool) -> None:
    made, other = layer(linear()), layer(linear(seed=1))
    x = torch.randn(1, 64).bfloat16()
    assert not torch.equal(made(x), other(x))  # and fills the caches
    made.load_state_dict(other.state_dict(), assign=assign)
    assert torch.equal(made(x), other(x))
    third = layer(linear(seed=2))
    with torch.no_grad():
        for part in PARTS[:2]:
            getattr(made, part).copy_(getattr(third, part))
    for part in PARTS[3:]:
        setattr(made, part, getattr(third, part))
    made.bias = third.bias
    assert torch.equal(made(x), third(x))


def test_a_buffer_put_in_anothers_place_is_seen() -> None:
    made, other = layer(linear()), layer(linear())
    x = torch.randn(1, 64).bfloat16()
    made(x)
    assert other.values is not None
    other.values = torch.zeros_like(other.values)
    made.values = torch.zeros_like(other.values)
    assert torch.equal(made(x), other(x))
    for one in (made, other):
        one.weight_packed = torch.zeros_like(one.weight_packed)
    other._cache.clear()
    assert torch.equal(made(x), other(x))


@pytest.mark.parametrize("assign", [False, True])
def test_state_loads_into_other_nnz_and_into_none(assign: bool) -> None:
    made = layer(linear())
    x = torch.randn(2, 64).bfloat16()
    sizes: list[int | None] = [None, 0, 3, made.nnz]
    for nnz in sizes:
        fresh = OrthoLinear(64, 48, group_size=32, dtype=torch.bfloat16, nnz=nnz, bias=True)
        fresh.alpha = 1.0
        fresh.load_state_dict(made.state_dict(), assign=assign)
        assert torch.equal(fresh(x), made(x))


def test_base_alone_runs_at_alpha_0_and_says_so_at_1() -> None:
    made = layer(linear(), alpha=0.0)
    alone = OrthoLinear(64, 48, group_size=32, dtype=torch.bfloat16, bias=True)
    state = {n: v for n, v in made.state_dict().items() if n not in ORTHO_PARTS}
    alone.load_state_dict(state)
    alone.alpha = 0.0
    x = torch.randn(2, 64).bfloat16()
    assert torch.equal(alone(x), made(x))
    alone.alpha = 1.0
    with pytest.raises(ArtifactError, match="no ortho stream"):
        alone(x)
    with pytest.raises(ArtifactError, match="no ortho stream"):
        _ = alone.weight


def broken(part: str) -> dict[str, Tensor]:
    state = dict(copy.deepcopy(layer(linear()).state_dict()))
    if part == "column":
        state["col_indices"][3] = 64
    elif part == "order":
        first = slice(0, int(state["crow_indices"][1]))
        state["col_indices"][first] = state["col_indices"][first].int().flip(0).to(torch.uint16)
    elif part == "pointer":
        state["crow_indices"][5] += 100
    elif part == "end":
        state["values"] = state["values"][:-1]
    elif part == "missing":
        del state["values"]
    elif part == "shape":
        state["weight_shape"] = torch.tensor([64, 48])
    elif part == "dtype":
        state["values"] = state["values"].float()
    elif part == "scale":
        state["weight_scale"] = state["weight_scale"].float()
    return state


@pytest.mark.parametrize(
    "part", ["column", "order", "pointer", "end", "missing", "shape", "dtype", "scale"]
)
def test_state_that_does_not_hold_together_is_refused(part: str) -> None:
    made = layer(linear())
    with pytest.raises(ArtifactError):
        made.load_state_dict(broken(part))


def test_copies_and_pickles_are_whole_and_carry_no_cache() -> None:
    made = layer(linear())
    x = torch.randn(1, 64).bfloat16()
    y = made(x)
    assert made._cache
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    for twin in (
        copy.deepcopy(made),
        pickle.loads(pickle.dumps(made)),
        torch.load(file, weights_only=False),
    ):
        assert not twin._cache
        assert torch.equal(twin(x), y)
        assert twin.col_indices.dtype == torch.uint16
    assert set(made.state_dict()) == {*PARTS, "bias"}


def test_gradient_reaches_x_and_bias_only() -> None:
    made = layer(linear())
    x = torch.randn(2, 64, requires_grad=True)
    made(x).float().sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, made.weight.float().sum(0).expand(2, 64), atol=0.05)
    assert [name for name, _ in made.named_parameters()] == ["bias"]


def test_multihead_attention_and_encoder_layer_run_on_the_weight() -> None:
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, dropout=0.0)
    block.train(mode=False)
    block.self_attn.out_proj = layer(block.self_attn.out_proj)
    block.linear1, block.linear2 = layer(block.linear1), layer(block.linear2)
    plain = copy.deepcopy(block)
    for parent, name in ((plain.self_attn, "out_proj"), (plain, "linear1"), (plain, "linear2")):
        split = getattr(parent, name)
        dense = nn.Linear(split.in_features, split.out_features)
        dense.weight, dense.bias = nn.Parameter(split.weight), split.bias
        setattr(parent, name, dense)
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        fast, expected = block(x), plain(x)
    assert torch.allclose(fast, expected, atol=1e-5)
    assert torch.allclose(block(x), expected, atol=1e-5)


def test_repr_says_what_it_is() -> None:
    text = repr(layer(linear()))
    assert "in_features=64, out_features=48" in text
    assert "nnz=307" in text
    assert "alpha=1.0" in text
