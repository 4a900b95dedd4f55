"""The product of both streams against its slow twin, in every form and shape."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ortho_cli.errors import ArtifactError, UsageError
from ortho_cli.runtime import product
from ortho_cli.runtime.product import Base, Ortho
from ortho_cli.split import quantize

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Half an ulp of the result, and in the packed form one of the weights and one of a partial sum.
TOLERANCE = {torch.bfloat16: 2**-6, torch.float16: 2**-9, torch.float32: 1e-5}


class Made:
    """A layer's streams, and the kept source weights as the slow twin wants them."""

    def __init__(
        self,
        rows: int,
        groups: int,
        size: int,
        dtype: torch.dtype,
        *,
        share: float = 0.1,
        bits: int = 4,
    ) -> None:
        random = torch.Generator().manual_seed(rows + groups)
        columns = groups * size
        ends = (-(1 << (bits - 1)), 1 << (bits - 1))
        codes = torch.randint(*ends, (rows, columns), generator=random, dtype=torch.int8)
        scales = (torch.rand(rows, groups, generator=random) + 0.5).to(dtype)
        self.base = Base(quantize.pack_codes(codes, bits=bits), scales, bits=bits)
        keep = torch.rand(rows, columns, generator=random) < share
        source = torch.randn(rows, columns, generator=random).to(dtype).float()
        base = quantize.dequantize(codes, scales)
        crow = torch.cat((torch.zeros(1, dtype=torch.int32), keep.sum(1).cumsum(0).int()))
        where = keep.nonzero()
        self.ortho = Ortho(crow, where[:, 1].int(), (source - base)[keep])
        self.kept = {(int(r), int(c)): source[r, c].item() for r, c in where}
        self.bias = torch.randn(rows, generator=random).to(dtype)
        self.random = random

    def prepared(self) -> Base:
        return self.base._replace(prepared=product.prepare(self.base))

    def reference(self, x: Tensor, bias: Tensor | None, alphas: list[float]) -> Tensor:
        base = self.base
        return reference.dual_linear(
            x, base.weight_packed, base.weight_scale, self.kept, bias, alphas, bits=base.bits
        )


def close(y: Tensor, expected: Tensor, made: Made, x: Tensor) -> None:
    assert y.dtype == x.dtype
    assert y.shape == expected.shape
    # Error scales with the sum of magnitudes: the result itself may cancel.
    size = 8 * x.abs().double().sum(-1).max().item() if x.numel() else 1.0
    error = (y.double() - expected).abs().max().item() if y.numel() else 0.0
    assert error <= TOLERANCE[x.dtype] * size / math.sqrt(x.shape[-1]) + 1e-6


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
@settings(deadline=None, max_examples=12)
@given(
    rows=st.sampled_from([1, 3, 16, 48]),
    groups=st.integers(1, 3),
    size=st.sampled_from([8, 32, 64]),
    lead=st.lists(st.integers(0, 3), max_size=3),
    bias=st.booleans(),
    bits=st.sampled_from([3, 4]),
)
def test_every_form_equals_the_slow_twin(
    alpha: float,
    dtype: torch.dtype,
    rows: int,
    groups: int,
    size: int,
    lead: list[int],
    bias: bool,
    bits: int,
) -> None:
    bits = bits if groups * size % 32 == 0 else 4
    made = Made(rows, groups, size, dtype, bits=bits)
    x = torch.randn(*lead, groups * size, generator=made.random).to(dtype)
    b = made.bias if bias else None
    flat = x.reshape(-1, groups * size)
    expected = made.reference(flat, b, [alpha] * flat.shape[0]).view(*lead, rows)
    for base in (made.base, made.prepared()):
        close(product.dual_linear(x, base, made.ortho, b, alpha), expected, made, x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prepared", [False, True])
def test_each_batch_row_has_its_own_alpha(dtype: torch.dtype, prepared: bool) -> None:
    made = Made(16, 2, 32, dtype)
    base = made.prepared() if prepared else made.base
    x = torch.randn(3, 2, 64, generator=made.random).to(dtype)
    y = product.dual_linear(x, base, made.ortho, made.bias, torch.tensor([0.0, 0.5, 1.0]))
    expected = made.reference(x, made.bias, [0.0, 0.5, 1.0])
    close(y, expected, made, x)
    assert (expected[0] - made.reference(x, made.bias, [1.0] * 3)[0]).abs().max() > 0.5


def test_bfloat16_tiles_round_once() -> None:
    made = Made(32, 4, 32, torch.bfloat16)
    x = torch.randn(5, 128, generator=made.random).bfloat16()
    for alpha in (0.3, torch.tensor([0.1, 0.2, 0.3, 0.4, 1.0])):
        alphas = [alpha] * 5 if isinstance(alpha, float) else alpha.tolist()
        y = product.dual_linear(x, made.base, made.ortho, made.bias, alpha)
        expected = made.reference(x, made.bias, alphas)
        ulp = torch.finfo(torch.bfloat16).eps * expected.abs()
        assert ((y.double() - expected).abs() <= 0.502 * ulp + 1e-5).all()


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_are_as_exact_in_float32_as_in_the_dtype_of_x(
    dtype: torch.dtype, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(product, "_is_native", lambda _: native)
    made = Made(48, 3, 32, dtype)
    x = torch.randn(7, 96, generator=made.random).to(dtype)
    for alpha in (0.0, 1.0):
        y = product.dual_linear(x, made.base, made.ortho, made.bias, alpha)
        close(y, made.reference(x, made.bias, [alpha] * 7), made, x)


def test_dequantized_rows_are_those_that_readers_see() -> None:
    for dtype in DTYPES:
        for bits, size in ((4, 24), (3, 32)):
            made = Made(7, 3, size, dtype, bits=bits)
            codes = reference.unpack_codes(made.base.weight_packed, bits=bits)
            expected = reference.dequantize(codes, made.base.weight_scale)
            assert torch.equal(product.dequantize_rows(made.base, 2, 6).float(), expected[2:6])


def test_many_tiles_equal_one(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made(9, 2, 32, torch.float32)
    x = torch.randn(4, 64, generator=made.random)
    whole = product.dual_linear(x, made.base, made.ortho, made.bias, 0.7)
    monkeypatch.setattr(product, "TILE_ELEMENTS", 130)
    tiled = product.dual_linear(x, made.base, made.ortho, made.bias, 0.7)
    assert torch.allclose(tiled, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0, "rows"])
def test_gradient_is_that_of_the_dense_weight(
    alpha: float | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(product, "TILE_ELEMENTS", 200)
    made = Made(12, 2, 32, torch.float32)
    alphas = [0.0, 0.5, 1.0] if alpha == "rows" else [float(alpha)] * 3
    given_alpha: Any = torch.tensor(alphas) if alpha == "rows" else alpha
    x = torch.randn(3, 2, 64, generator=made.random, requires_grad=True)
    bias = made.bias.clone().requires_grad_()
    push = torch.randn(3, 2, 12, generator=made.random)
    product.dual_linear(x, made.base, made.ortho, bias, given_alpha).backward(push)
    base = made.base
    for row, one in enumerate(alphas):
        weight = reference.dual_weight(base.weight_packed, base.weight_scale, made.kept, one)
        assert x.grad is not None
        assert torch.allclose(x.grad[row].double(), push[row].double() @ weight, atol=1e-4)
    assert bias.grad is not None
    assert torch.allclose(bias.grad, push.sum((0, 1)), atol=1e-5)


@pytest.mark.parametrize("zero", [0, 0.0, -0.0, torch.zeros(2), torch.tensor(0.0)])
def test_alpha_0_touches_nothing_of_ortho(zero: Any) -> None:
    made = Made(16, 1, 32, torch.bfloat16)
    x = torch.randn(2, 32, generator=made.random).bfloat16()
    poison: Any = object()  # any use of it fails
    for base in (made.base, made.prepared()):
        alone = product.dual_linear(x, base, None, None, 0.0)
        assert torch.equal(product.dual_linear(x, base, poison, None, zero), alone)


@pytest.mark.parametrize(
    "alpha",
    [
        *(math.nan, math.inf, -0.1, 7, 1.0001, "half", None, torch.tensor([0.5, math.nan])),
        *(torch.tensor([[0.5]]), torch.tensor(7.0), torch.tensor([True, True])),
    ],
)
def test_alpha_outside_0_to_1_is_refused(alpha: Any) -> None:
    made = Made(2, 1, 32, torch.float32)
    with pytest.raises(UsageError, match="alpha"):
        product.dual_linear(torch.zeros(2, 32), made.base, made.ortho, None, alpha)


def test_alphas_of_another_count_are_refused_with_both_numbers() -> None:
    made = Made(2, 1, 32, torch.float32)
    with pytest.raises(UsageError, match="3 values for 2 batch rows"):
        product.dual_linear(torch.zeros(2, 5, 32), made.base, made.ortho, None, torch.ones(3))


def test_ortho_that_is_needed_and_absent_is_an_error() -> None:
    made = Made(2, 1, 32, torch.float32)
    with pytest.raises(ArtifactError, match="no ortho"):
        product.dual_linear(torch.zeros(2, 32), made.base, None, None, 0.5)


def test_x_of_another_width_is_refused() -> None:
    made = Made(2, 1, 32, torch.float32)
    with pytest.raises(UsageError, match=r"\[2, 31\].*32"):
        product.dual_linear(torch.zeros(2, 31), made.base, None, None, 0.0)


def test_strides_of_x_do_not_matter() -> None:
    made = Made(16, 2, 32, torch.bfloat16)
    x = torch.randn(64, 3, 2, generator=made.random).bfloat16().permute(2, 1, 0)
    assert not x.is_contiguous()
    for base in (made.base, made.prepared()):
        y = product.dual_linear(x, base, made.ortho, made.bias, 1.0)
        assert torch.equal(y, product.dual_linear(x.contiguous(), base, made.ortho, made.bias, 1.0))


def test_nothing_kept_and_everything_kept() -> None:
    for share in (0.0, 1.0):
        made = Made(16, 1, 32, torch.float32, share=share)
        for rows in (1, 3):
            x = torch.randn(rows, 32, generator=made.random)
            y = product.dual_linear(x, made.base, made.ortho, None, 1.0)
            close(y, made.reference(x, None, [1.0] * rows), made, x)


def test_autocast_gives_what_linear_would_give() -> None:
    made = Made(16, 1, 32, torch.float32)
    x = torch.randn(2, 32, generator=made.random, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = product.dual_linear(x, made.base, made.ortho, None, 1.0)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


def test_packed_form_is_taken_only_where_torch_has_it() -> None:
    for bits in (3, 4):
        assert product.prepare(Made(16, 1, 32, torch.bfloat16, bits=bits).base) is not None
    for rows, size, dtype in ((15, 32, "bfloat16"), (16, 24, "bfloat16"), (16, 32, "float16")):
        assert product.prepare(Made(rows, 1, size, getattr(torch, dtype)).base) is None


@pytest.mark.gpu
def test_cuda_equals_cpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    made = Made(48, 2, 32, torch.bfloat16)
    x = torch.randn(3, 5, 64, generator=made.random).bfloat16()
    for alpha in (0.0, 0.5, 1.0, torch.tensor([0.0, 0.5, 1.0])):
        here = product.dual_linear(x, made.base, made.ortho, made.bias, alpha)
        base = Base(made.base.weight_packed.cuda(), made.base.weight_scale.cuda())
        ortho = Ortho(*(part.cuda() for part in made.ortho))
        there = product.dual_linear(x.cuda(), base, ortho, made.bias.cuda(), alpha)
        assert torch.allclose(there.cpu().float(), here.float(), rtol=2e-2, atol=5e-2)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@settings(deadline=None, max_examples=15)
@given(
    rows=st.integers(1, 40),
    groups=st.integers(1, 5),
    size=st.sampled_from([8, 24, 32, 128]),
    exponent=st.sampled_from([-133, -20, 0, 125]),
)
def test_compiled_loops_unpack_what_torch_does(
    threads: int, dtype: torch.dtype, rows: int, groups: int, size: int, exponent: int
) -> None:
    unpacking = pytest.importorskip("ortho_cli.runtime.unpacking")
    made = Made(rows, groups, size, torch.float32)
    # Subnormal, or infinite in the end: products that are rounded as bits must be torch's, too.
    scales = (made.base.weight_scale * 2.0**exponent).to(dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert unpacking.takes(made.base.weight_packed, scales)
        found = unpacking.unpack(made.base.weight_packed, scales)
    finally:
        torch.set_num_threads(before)
    assert found.dtype == dtype
    codes = reference.unpack_codes(made.base.weight_packed, bits=4)
    expected = reference.dequantize(codes, scales).to(dtype)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("missing", ["numba", "team"])
def test_without_compiled_loops_the_product_is_the_same(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    unpacking = pytest.importorskip("ortho_cli.runtime.unpacking")
    made = Made(40, 3, 32, torch.bfloat16)
    x = torch.randn(60, 96, generator=made.random).bfloat16()
    expected = product.dual_linear(x, made.base, made.ortho, None, 1.0)
    calls: list[Any] = []
    monkeypatch.setattr(unpacking, "unpack", lambda *given: calls.append(given))
    if missing == "numba":
        monkeypatch.setattr(product, "_unpacking", lambda: None)
    else:
        monkeypatch.setattr(unpacking, "_team", lambda: None)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert torch.equal(product.dual_linear(x, made.base, made.ortho, None, 1.0), expected)
    assert not calls


def test_numba_that_cannot_be_loaded_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    monkeypatch.setitem(sys.modules, "ortho_cli.runtime.unpacking", None)
    monkeypatch.delattr("ortho_cli.runtime.unpacking", raising=False)
    find = product._unpacking.__wrapped__
    with pytest.warns(UserWarning, match="unpacked without numba, which is slower: "):
        assert find() is None


def test_nothing_is_read_while_torch_traces_shapes() -> None:
    made = Made(16, 2, 32, torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        x = mode.from_tensor(torch.zeros(5, 64))
        assert product.dual_linear(x, made.base, None, None, 0.0).shape == (5, 16)
