"""Whole columns of one weight: the largest sums, their weights, and GPTQ without them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ortho_cli.errors import NumericalError, RecipeError
from ortho_cli.split import quantize
from ortho_cli.split.gptq import DAMPING, factorise, round_columns
from ortho_cli.split.in_memory import split_weight
from ortho_cli.split.select import SUMMED_ROWS, ColumnSums
from ortho_cli.split.task import columns_of
from tests.split.test_gptq import layers, loss
from tests.split.test_quantize import curved

Case = tuple[Tensor, Tensor, int]


@st.composite
def streams(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Saliencies of a weight: ties, zeros, tiny and huge ones, and more rows than a block."""
    rows, width = draw(st.integers(1, 2 * SUMMED_ROWS + 3)), 8 * draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    values = torch.rand(rows, width, generator=generator)
    values *= 10.0 ** draw(st.integers(-30, 18))
    if draw(st.booleans()):
        values[:, width // 2 :] = values[:, : width // 2]  # every column has an equal
    if draw(st.booleans()):
        values[:, ::3] = 0.0
    return values, draw(st.integers(0, width))


@settings(max_examples=60, deadline=None)
@given(streams(), st.integers(1, 40), st.sets(st.integers(0, 7), max_size=2))
def test_column_sums_any_stretches_equal_sums_one_by_one(
    case: tuple[Tensor, int], step: int, forced: set[int]
) -> None:
    values, count = case
    count = max(count, len(forced))
    width = values.shape[1]
    select = ColumnSums(width, stretch=step * width, payloads=[np.uint16, np.float32])
    for start in range(0, len(values), step):
        some = values[start : start + step].numpy().reshape(-1)
        other = some[::-1].copy()
        if start == 0 and forced:
            select.mark(np.array(sorted(forced), np.int64), [some, other])
        select.push(some, [some.view(np.uint32), other], start=start * width)
    assert select.largest(count).tolist() == reference.column_indices(values, count, forced)
    sums = [0.0] * width
    for row in values.tolist():
        for j, value in enumerate(row):
            sums[j] += value * value
    assert select.sums[0].tolist() == sums  # to the last bit
    assert select.sums[1].sum() == pytest.approx(select.sums[0].sum())


@settings(max_examples=40, deadline=None)
@given(curved(), st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.booleans())
def test_columns_of_a_weight_equal_the_slow_twin(
    case: Case, density: float, by_curvature: bool
) -> None:
    weight, curvature, size = case
    given = curvature if by_curvature else None
    parts = split_weight(
        weight, group_size=size, density=density, curvature=given, structure="columns"
    )
    scales = reference.absmax_scales(weight.float(), size, weight.dtype)
    codes = reference.quantize(weight.float(), scales)
    lost = (reference.dequantize(codes, scales) - weight.float()).abs()
    root = torch.from_numpy(np.sqrt(curvature.float().numpy()))
    saliency = lost * root if by_curvature else lost
    expected = reference.column_indices(saliency, round(density * weight.shape[1]))
    assert parts["col_indices"].tolist() == expected
    assert torch.equal(parts["values"], weight[:, expected])
    assert torch.equal(parts["weight_scale"], scales)
    assert torch.equal(quantize.unpack_int4(parts["weight_packed"]), codes.to(torch.int8))
    assert "crow_indices" not in parts


def test_scales_that_know_the_columns_serve_the_others() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 128, generator=generator)
    weight[:, ::16] *= 6
    options = {"group_size": 64, "density": 1 / 16, "structure": "columns"}
    blind = split_weight(weight, **options)
    known = split_weight(weight, scale="mse", **options)
    assert known["col_indices"].tolist() == list(range(0, 128, 16))

    def left(parts: dict[str, Tensor]) -> float:
        codes = quantize.unpack_int4(parts["weight_packed"])
        error = (quantize.dequantize(codes, parts["weight_scale"]) - weight).square()
        error[:, parts["col_indices"].long()] = 0.0
        return float(error.sum())

    assert left(known) < 0.3 * left(blind)


def test_most_columns_bound_their_number_and_half_a_column_rounds_to_even() -> None:
    assert [columns_of(density, 64) for density in (0.0, 0.007, 0.008, 0.5, 1.0)] == [
        0,
        0,
        1,
        32,
        64,
    ]
    assert columns_of(0.5, 64, 7) == columns_of(7 / 64, 64, 9) == 7
    weight = torch.randn(5, 64)
    parts = split_weight(weight, group_size=32, density=0.5, structure="columns", max_rank=3)
    assert parts["values"].shape == (5, 3)
    for settings_ in (
        {"structure": "rows"},
        {"max_rank": 3},
        {"structure": "columns", "max_rank": 0},
    ):
        with pytest.raises(RecipeError):
            split_weight(weight, group_size=32, density=0.5, **settings_)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_named(bad: float) -> None:
    weight = torch.randn(6, 64)
    weight[4, 7] = bad
    with pytest.raises(NumericalError, match=r"`w` holds (nan|inf) at \[4, 7\]"):
        split_weight(weight, group_size=32, density=0.1, structure="columns", name="w")


@settings(max_examples=40, deadline=None)
@given(layers(), st.sampled_from([0.1, 0.5, 1.0]), st.integers(0, 2**16))
def test_columns_that_are_kept_leave_the_problem(
    case: tuple[Tensor, Tensor, Tensor, Tensor], share: float, seed: int
) -> None:
    weight, scales, gram, _ = case
    width = weight.shape[1]
    generator = torch.Generator().manual_seed(seed)
    flags = torch.rand(width, generator=generator) < share
    whole, rest = flags.nonzero()[:, 0], (~flags).nonzero()[:, 0]
    factor = factorise(gram, without=whole.numpy())
    assert sorted(factor.order.tolist()) == rest.tolist()
    found = round_columns(weight, scales, factor, kept=flags.expand(weight.shape))
    assert torch.equal(found[:, whole], reference.quantize(weight, scales)[:, whole])
    if not len(rest):
        return
    few = gram[rest][:, rest]
    steps = scales.repeat_interleave(width // scales.shape[1], 1)[:, rest]
    damping = DAMPING * float(few.diagonal().double().mean()) or 1.0
    none = torch.zeros(len(weight), len(rest), dtype=torch.bool)
    twin = reference.compensated_codes(weight[:, rest], steps, few, none, damping)
    expected = torch.tensor(twin)
    different = (found[:, rest] != expected).any(1)
    for row in different.nonzero()[:, 0].tolist():  # in float32 one code may fall the other way
        one = slice(row, row + 1)
        mine, other = (
            loss(weight[one][:, rest], codes[one].float(), steps[one], few, none[one])
            for codes in (found[:, rest], expected)
        )
        assert mine == pytest.approx(other, rel=0.3)
    assert different.float().mean() <= 0.5 or len(weight) < 3
