"""The Triton kernels against the slow twin and the torch tiles: on a card, else interpreted."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ortho_cli.runtime import product as kernels
from ortho_cli.runtime.product import Base, Ortho
from tests.runtime.test_product import DTYPES, Made

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
TESTS = Path(__file__).parent.parent


@contextmanager
def interpreted() -> Iterator[None]:
    """Have Triton interpret where there is no card; other tests see nothing of it."""
    with pytest.MonkeyPatch.context() as patch:
        if not CUDA:
            patch.setenv("TRITON_INTERPRET", "1")
        yield


with interpreted():  # most of it is decided when triton is imported, and the rest when it runs
    from ortho_cli.runtime import triton_kernels


@pytest.fixture(autouse=True, scope="module")
def interpreter() -> Iterator[None]:
    with interpreted():
        yield


def there(base: Base) -> Base:
    return base._replace(
        weight_packed=base.weight_packed.to(DEVICE), weight_scale=base.weight_scale.to(DEVICE)
    )


def multiply(
    x: Tensor, base: Base, ortho: Ortho | None, bias: Tensor | None, alpha: float | Tensor
) -> Tensor:
    """The kernels' product, from the CPU and back."""
    on_device = x.as_strided(x.size(), x.stride()).to(DEVICE) if CUDA else x
    assert triton_kernels.takes(on_device, base)
    return triton_kernels.product(
        on_device,
        there(base),
        None if ortho is None else Ortho(*(part.to(DEVICE) for part in ortho)),
        None if bias is None else bias.to(DEVICE),
        alpha.to(DEVICE) if isinstance(alpha, Tensor) else alpha,
    ).cpu()


def near(y: Tensor, expected: Tensor, x: Tensor, ulps: float) -> None:
    assert y.dtype == x.dtype
    assert y.shape == expected.shape
    allowed = ulps * torch.finfo(x.dtype).eps * expected.double().abs()
    # Float32 sums err with the sum of magnitudes, and the result may cancel: weights are up to 12.
    allowed = allowed + 2e-7 * 12 * x.abs().double().sum(-1, keepdim=True) + 1e-6
    assert ((y.double() - expected.double()).abs() <= allowed).all()


def half_an_ulp(y: Tensor, expected: Tensor, x: Tensor) -> None:
    """Rounded once: but for float32's own sums, the nearest number of x's dtype."""
    near(y, expected, x, 0.502)


def keep(made: Made, mask: Tensor) -> None:
    """Make ortho hold the positions of a mask, and no others."""
    base = kernels.dequantize_rows(made.base, 0, made.base.shape[0]).float()
    source = torch.randn(mask.shape, generator=made.random).to(made.bias.dtype).float()
    crow = torch.cat((torch.zeros(1, dtype=torch.int32), mask.sum(1).cumsum(0).int()))
    where = mask.nonzero()
    made.ortho = Ortho(crow, where[:, 1].int(), (source - base)[mask])
    made.kept = {(int(r), int(c)): source[r, c].item() for r, c in where}


def random_x(made: Made, x_rows: int) -> Tensor:
    x = torch.randn(x_rows, made.base.shape[1], generator=made.random)
    return x.to(made.bias.dtype)


def test_the_kernels_are_interpreted_where_there_is_no_card() -> None:
    assert triton_kernels.INTERPRETED.value is not CUDA


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=6)
@given(
    x_rows=st.sampled_from([1, 2, 16, 17, 40]),
    rows=st.sampled_from([1, 5, 33, 70]),
    groups=st.integers(1, 3),
    size=st.sampled_from([8, 32, 64, 128, 192]),
    alpha=st.sampled_from([0.0, 0.5, 1.0, "rows"]),
    bias=st.booleans(),
)
def test_every_shape_equals_the_slow_twin_and_the_tiles(
    dtype: torch.dtype,
    x_rows: int,
    rows: int,
    groups: int,
    size: int,
    alpha: float | str,
    bias: bool,
) -> None:
    made = Made(rows, groups, size, dtype)
    x, b = random_x(made, x_rows), made.bias if bias else None
    alphas = torch.linspace(0, 1, x_rows) if alpha == "rows" else torch.full((x_rows,), alpha)
    one: Any = alphas if alpha == "rows" else alpha
    y = multiply(x, made.base, made.ortho, b, one)
    half_an_ulp(y, made.reference(x, b, alphas.tolist()), x)
    near(y, kernels.dual_linear(x, made.base, made.ortho, b, one), x, 1.01)


@pytest.mark.parametrize(("dtype", "x_dtype"), [*itertools.pairwise([*DTYPES, DTYPES[0]])])
def test_x_may_have_another_dtype_than_the_scales(dtype: torch.dtype, x_dtype: torch.dtype) -> None:
    made = Made(33, 2, 32, dtype)
    for x_rows in (1, 20):
        x = random_x(made, x_rows).to(x_dtype)
        y = multiply(x, made.base, made.ortho, made.bias, 0.5)
        half_an_ulp(y, made.reference(x, made.bias, [0.5] * x_rows), x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("x_rows", [1, 16, 64])
def test_base_is_bit_for_bit_what_its_readers_see(dtype: torch.dtype, x_rows: int) -> None:
    for groups, size in ((2, 128), (3, 24)):  # one group to a step of words, and several
        made = Made(40, groups, size, dtype)
        columns = made.base.shape[1]
        rows = torch.eye(columns)
        got = [
            multiply(rows[i : i + x_rows], made.base, None, None, 0.0)
            for i in range(0, columns, x_rows if x_rows > 1 else 13)
        ]
        weight = reference.dequantize(
            reference.unpack_codes(made.base.weight_packed, bits=4), made.base.weight_scale
        )
        expected = weight.T if x_rows > 1 else weight.T[::13]  # each place in a word of 8
        assert torch.equal(torch.cat(got), expected.float())


@pytest.mark.parametrize("x_rows", [1, 5, 20])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_ortho_may_be_empty_or_full(dtype: torch.dtype, x_rows: int) -> None:
    made = Made(37, 2, 64, dtype)
    mask = torch.zeros(37, 128, dtype=torch.bool)
    mask[3] = True
    mask[[9, 36], [127, 0]] = True
    keep(made, mask)
    x = random_x(made, x_rows)
    expected = made.reference(x, made.bias, [0.5] * x_rows)
    half_an_ulp(multiply(x, made.base, made.ortho, made.bias, 0.5), expected, x)
    wide = made.ortho._replace(crow_indices=made.ortho.crow_indices.long())
    half_an_ulp(multiply(x, made.base, wide, made.bias, 0.5), expected, x)


class Watched:
    """A kernel that counts its launches, and keeps the form of the last."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.launches, self.form = kernel, 0, None

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*values: Any, **named: Any) -> None:
            self.launches, self.form = self.launches + 1, named.get("form")
            self.kernel[grid](*values, **named)

        return launch


@pytest.mark.parametrize("x_rows", [1, 5, 20])
def test_alpha_0_and_nothing_kept_launch_nothing_for_ortho(
    x_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Made(20, 1, 64, torch.float32)
    multiplied, sparse = Watched(triton_kernels._multiply), Watched(triton_kernels._multiply_sparse)
    monkeypatch.setattr(triton_kernels, "_multiply", multiplied)
    monkeypatch.setattr(triton_kernels, "_multiply_sparse", sparse)
    x = random_x(made, x_rows).to(DEVICE)
    poison: Any = object()  # any use of it fails
    alone = triton_kernels.product(x, there(made.base), poison, None, 0.0)
    empty = Made(20, 1, 64, torch.float32, share=0.0)
    nothing = multiply(x.cpu(), made.base, empty.ortho, None, torch.ones(x_rows))
    assert torch.equal(nothing, alone.cpu())
    assert (multiplied.launches, multiplied.form, sparse.launches) == (2, triton_kernels.WITHOUT, 0)
    multiply(x.cpu(), made.base, made.ortho, None, 0.5)
    assert multiplied.form == (
        triton_kernels.GATHERED_HERE if x_rows <= 16 else triton_kernels.ADDED
    )
    assert sparse.launches == (x_rows > 16)


@pytest.mark.parametrize("x_rows", [1, 3, 20])
def test_strides_of_x_do_not_matter(x_rows: int) -> None:
    made = Made(20, 2, 32, torch.bfloat16)
    wide = torch.randn(64, 2 * x_rows, generator=made.random).bfloat16()
    for x in (wide.t()[::2], wide.t()[:1].expand(x_rows, -1)):
        y = multiply(x, made.base, made.ortho, made.bias, 0.5)
        assert torch.equal(y, multiply(x.contiguous(), made.base, made.ortho, made.bias, 0.5))


@pytest.mark.parametrize(
    ("x_rows", "shares"), [(1, 1), (1, 3), (1, 8), (5, 2), (17, 1), (17, 3), (17, 8)]
)
def test_shares_of_the_columns_add_up(
    x_rows: int, shares: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Made(33, 3, 192, torch.bfloat16)  # 72 words, 5 steps: the last of 8 shares are empty
    cut = triton_kernels.blocks(x_rows, 33, 72, wide=False)._replace(shares=shares)
    monkeypatch.setattr(triton_kernels, "blocks", lambda *_, **__: cut)
    x = random_x(made, x_rows)
    alpha = torch.linspace(0.2, 1, x_rows)
    y = multiply(x, made.base, made.ortho, made.bias, alpha)
    half_an_ulp(y, made.reference(x, made.bias, alpha.tolist()), x)
    assert torch.equal(y, multiply(x, made.base, made.ortho, made.bias, alpha))


def test_slabs_of_x_equal_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made(33, 2, 32, torch.float16)
    x, alpha = random_x(made, 41), torch.linspace(0, 1, 41)
    monkeypatch.setattr(triton_kernels, "SLAB_ROWS", 20)  # 20, 20, and 1
    y = multiply(x, made.base, made.ortho, made.bias, alpha)
    half_an_ulp(y, made.reference(x, made.bias, alpha.tolist()), x)


def test_what_is_not_taken_goes_to_the_tiles() -> None:
    def taken(made: Made, x_rows: int = 1, dtype: torch.dtype = torch.float32) -> bool:
        return triton_kernels.takes(torch.zeros(x_rows, made.base.shape[1], dtype=dtype), made.base)

    assert taken(Made(3, 1, 8, torch.bfloat16))
    assert not taken(Made(3, 1, 32, torch.bfloat16, bits=3))
    assert not taken(Made(3, 2, 12, torch.bfloat16))
    assert not taken(Made(3, 1, 8, torch.bfloat16), x_rows=0)
    assert not taken(Made(3, 1, 8, torch.bfloat16), dtype=torch.float64)
    assert not taken(Made(3, 1, 8, torch.float64))


def test_blocks_follow_from_the_shape_alone() -> None:
    for x_rows in (1, 2, 16, 17, 33, 64, 65, 5000):
        for words in (1, 8, 500, 1376):
            for wide in (False, True):
                cut = triton_kernels.blocks(x_rows, 4096, words, wide=wide)
                assert all(size & (size - 1) == 0 for size in (*cut[:3], cut.warps))
                assert cut.x_rows == 1 if x_rows == 1 else cut.x_rows >= 16
                assert 1 <= cut.shares <= triton_kernels.MAX_SHARES
    assert triton_kernels.blocks(1, 11008, 512, wide=False).shares == 1
    assert triton_kernels.blocks(1, 4096, 1376, wide=False).shares == 2


def test_dual_linear_takes_the_kernels_and_keeps_its_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[int, ...]] = []

    class Spy:
        takes = staticmethod(triton_kernels.takes)

        @staticmethod
        def product(x: Tensor, *rest: Any) -> Tensor:
            seen.append(tuple(x.shape))
            return triton_kernels.product(x, *rest)

    made = Made(12, 2, 32, torch.float32)
    x = torch.randn(3, 2, 64, generator=made.random).to(DEVICE)
    base, ortho = there(made.base), Ortho(*(part.to(DEVICE) for part in made.ortho))
    alpha = torch.tensor([0.0, 0.5, 1.0], device=DEVICE)
    bias = made.bias.to(DEVICE).requires_grad_()
    given_x = [x.clone().requires_grad_() for _ in range(2)]
    results = []
    for one, found in zip(given_x, (None, Spy), strict=True):
        monkeypatch.setattr(kernels, "_fused", lambda kind, found=found: found)
        y = kernels.dual_linear(one, base, ortho, bias, alpha)
        y.square().sum().backward()
        results.append(y.detach())
    assert seen == [(6, 64)]
    assert torch.allclose(*results, rtol=1e-5, atol=1e-5)
    assert torch.allclose(given_x[0].grad, given_x[1].grad, rtol=1e-4, atol=1e-3)  # type: ignore[arg-type]
    three = there(Made(12, 1, 32, torch.float32, bits=3).base)
    kernels.dual_linear(x[..., :32], three, None, None, 0.0)
    assert len(seen) == 1


def test_kernels_are_found_for_cuda_where_triton_is_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find = kernels._fused.__wrapped__
    assert find("cuda") is triton_kernels
    assert find("cpu") is None
    for version, found in (("3.2.1", None), ("3.3.0+git", triton_kernels), ("4.0", triton_kernels)):
        monkeypatch.setattr("triton.__version__", version)
        assert find("cuda") is found
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    assert find("cuda") is None


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(TESTS.parent), *filter(None, sys.path)])
    return subprocess.run(
        [sys.executable, *arguments],
        env={**inherited, "PYTHONPATH": path, **environment},
        cwd=TESTS,
        capture_output=True,
        text=True,
        check=False,
    )


def test_layers_need_no_triton() -> None:
    code = "import sys; sys.modules['triton'] = None; import ortho_cli.runtime.ortho_linear"
    done = run("-c", code)
    assert done.returncode == 0, done.stderr


def test_every_kernel_compiles_for_a_card(tmp_path: Path) -> None:
    done = run("compile_fused.py", "90", TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("_multiply", "_add_shares", "_multiply_sparse"):
        assert f"{name} " in done.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("x_rows", [1, 2, 16, 17, 200])
def test_a_card_equals_the_slow_twin_and_a_graph_replays_it(
    dtype: torch.dtype, x_rows: int
) -> None:
    made = Made(300, 4, 128, dtype, share=0.02)
    x = random_x(made, x_rows).cuda()
    base, bias = there(made.base), made.bias.cuda()
    ortho = Ortho(*(part.cuda() for part in made.ortho))
    for alpha in (0.0, 0.5, 1.0):
        y = kernels.dual_linear(x, base, ortho, bias, alpha)
        half_an_ulp(y.cpu(), made.reference(x.cpu(), made.bias, [alpha] * x_rows), x.cpu())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = kernels.dual_linear(x, base, ortho, bias, alpha)
        captured.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured, y)
