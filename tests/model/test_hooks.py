"""Hooks against autograd's own weight gradients, sequence by sequence."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ortho_cli.errors import CalibrationError, NumericalError
from ortho_cli.model import hooks as capture
from ortho_cli.model.hooks import Capture


def network(*, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10, bias=bias), nn.Tanh(), nn.Linear(10, 4, bias=bias))


def measure(model: nn.Module, x: Tensor, **options: Any) -> dict[str, Tensor]:
    modules = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    sums: dict[str, Tensor] = {}

    def add(name: str, part: str, row: int, tile: Tensor) -> None:
        linear = modules[name]
        rows = 1 if options["kind"] == "gram" else linear.out_features
        rows = linear.in_features if part == "gram" else rows
        total = sums.setdefault(f"{name}/{part}", torch.zeros(rows, linear.in_features))
        total[row : row + tile.shape[0]] += tile

    mask, counted = options.pop("mask", None), options.pop("counted", None)
    with Capture(modules, add, **options) as capture:
        capture.begin(x.shape[0], mask, counted)
        out = model.requires_grad_(False)(x)
        if options["kind"] == "fisher":
            out.backward(2 * out.detach())
    return sums


@pytest.mark.parametrize("tile", [1 << 22, 24])
@pytest.mark.parametrize("unit", ["sequence", "token"])
def test_fisher_is_the_sum_of_squared_gradients(
    monkeypatch: pytest.MonkeyPatch, unit: str, tile: int
) -> None:
    monkeypatch.setattr(capture, "SUM_ELEMENTS", tile)
    model, x = network(), torch.randn(3, 5, 6)
    found = measure(model, x, kind="fisher", unit=unit, gradient=True)
    expected = reference.fisher(model, x, unit=unit)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6)


def test_fisher_is_not_the_square_of_the_batch_sum() -> None:
    model, x = network(), torch.randn(8, 5, 6)
    found = measure(model, x, kind="fisher", gradient=True)
    assert not torch.allclose(found["0/curvature"], found["0/gradient"].square(), rtol=0.5)


@settings(max_examples=20, deadline=None)
@given(batch=st.integers(1, 4), positions=st.integers(1, 5))
def test_gram_sums_squared_inputs_of_counted_positions(batch: int, positions: int) -> None:
    x = torch.randn(batch, positions, 6)
    mask = torch.rand(batch, positions) < 0.5
    found = measure(network(), x, kind="gram", mask=mask)
    torch.testing.assert_close(found["0/curvature"][0], x[mask].square().sum(0))


def test_fisher_needs_no_parameter_that_needs_a_gradient() -> None:
    model = network()
    assert measure(model, torch.randn(2, 3, 6), kind="fisher")["0/curvature"].sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


def test_fisher_flattened_batch_is_split_by_the_mask_or_refused() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.body(x.reshape(-1, 6)[: self.rows]).view(-1, 4)
            return out

        rows = 15

    model, x = Flat(), torch.randn(3, 5, 6)
    found = measure(model, x, kind="fisher", mask=torch.ones(3, 5, dtype=torch.bool))
    expected = reference.fisher(model.body, x, unit="sequence")
    torch.testing.assert_close(found["body.0/curvature"], expected["0/curvature"])
    model.rows = 7
    with pytest.raises(CalibrationError, match=r"`body.2` sees \[7, 10\] of a batch of 3"):
        measure(model, x, kind="fisher", mask=torch.ones(3, 5, dtype=torch.bool))


def test_fisher_module_called_twice_is_refused() -> None:
    model = nn.Sequential(linear := nn.Linear(6, 6), nn.Tanh(), linear)
    with pytest.raises(CalibrationError, match="`0` is called twice"):
        measure(model, torch.randn(2, 3, 6), kind="fisher")


@pytest.mark.parametrize("kind", ["gram", "fisher"])
def test_nan_names_the_linear(kind: str) -> None:
    x = torch.randn(2, 3, 6)
    x[1, 1, 1] = torch.nan
    with pytest.raises(NumericalError, match=r"of `[02]` is NaN or infinite"):
        measure(network(), x, kind=kind)


def watched(model: nn.Sequential, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Input and output gradient of each Linear, by autograd."""
    here, kept = x, {}
    for name, module in model.named_children():
        out = module(here)
        if isinstance(module, nn.Linear):
            out = out if out.requires_grad else out.detach().requires_grad_(True)
            out.retain_grad()
            kept[name] = (here.detach(), out)
        here = out
    (here**2).sum().backward()
    return {name: (a, y.grad) for name, (a, y) in kept.items()}  # type: ignore[misc]


FULL = [("gram", "none"), ("fisher", "none"), ("fisher", "gradient")]


@pytest.mark.parametrize("tile", [1 << 22, 24, 7, 1])
@pytest.mark.parametrize(("kind", "weighting"), FULL)
def test_full_gram_is_the_sum_of_outer_products(
    monkeypatch: pytest.MonkeyPatch, kind: str, weighting: str, tile: int
) -> None:
    monkeypatch.setattr(capture, "SUM_ELEMENTS", tile)
    model, x = network(), torch.randn(3, 5, 6)
    counted = torch.rand(3, 5) < 0.6
    x[0, 1], x[..., 4] = x[0, 0], 0.0
    masks = {"mask": torch.ones(3, 5, dtype=torch.bool), "counted": counted}
    if kind == "gram":
        masks = {"mask": counted}
    found = measure(model, x, kind=kind, gram="full", weighting=weighting, **masks)
    for name, (a, grad) in watched(network(), x).items():
        given = grad if weighting == "gradient" else None
        expected = reference.input_gram(a, given, counted).float()
        torch.testing.assert_close(found[f"{name}/gram"], expected, rtol=1e-5, atol=1e-6)
    assert not found["0/gram"][4].any()


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    positions=st.integers(1, 5),
    tile=st.integers(1, 60),
    kind=st.sampled_from(FULL),
    wide=st.sampled_from([0.0, 1e-6, 1.0, 1e6]),
)
def test_full_gram_has_the_diagonal_of_gram_and_of_fisher_token(
    batch: int, positions: int, tile: int, kind: tuple[str, str], wide: float
) -> None:
    x, counted = wide * torch.randn(batch, positions, 6), torch.rand(batch, positions) < 0.5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capture, "SUM_ELEMENTS", tile)
        full = {"kind": kind[0], "gram": "full", "weighting": kind[1]}
        found = measure(network(), x, **full, mask=counted, unit="token")
        plain = measure(network(), x, kind=kind[0], mask=counted, unit="token")
    gram = measure(network(), x, kind="gram", mask=counted)
    for name in ("0", "2"):
        assert torch.equal(found[f"{name}/curvature"], plain[f"{name}/curvature"])
        expected = gram[f"{name}/curvature"][0]
        if kind[1] == "gradient":
            expected = found[f"{name}/curvature"].mean(0)
        torch.testing.assert_close(found[f"{name}/gram"].diagonal(), expected, rtol=1e-4, atol=0.0)


@pytest.mark.parametrize(("kind", "weighting"), FULL)
def test_full_gram_is_float32_inside_autocast(kind: str, weighting: str) -> None:
    x = torch.randn(2, 50, 6)
    model = nn.Sequential(nn.Linear(6, 10))
    with torch.autocast("cpu", torch.bfloat16):
        modules, sums = {"0": model[0]}, {}
        with Capture(
            modules,
            lambda name, part, row, tile: sums.__setitem__(part, tile),
            kind=kind,  # type: ignore[arg-type]
            gram="full",
            weighting=weighting,  # type: ignore[arg-type]
        ) as hooks:
            hooks.begin(2)
            out = model.requires_grad_(False)(x)
            grad = torch.randn(2, 50, 10).bfloat16()
            if kind == "fisher":
                out.backward(grad)
    every = torch.ones(2, 50, dtype=torch.bool)
    expected = reference.input_gram(x, grad if weighting == "gradient" else None, every).float()
    torch.testing.assert_close(sums["gram"], expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("kind", "weighting"), FULL)
def test_full_gram_holds_no_more_than_a_tile(
    monkeypatch: pytest.MonkeyPatch, kind: str, weighting: str
) -> None:
    class Largest(TorchDispatchMode):
        made = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            # Views share what they look at.
            if isinstance(out, Tensor) and out._base is None:
                self.made = max(self.made, out.numel())
            return out

    monkeypatch.setattr(capture, "SUM_ELEMENTS", 2048)
    x, grad = torch.randn(700, 256).bfloat16(), torch.randn(700, 32).bfloat16()
    hooks = Capture({}, lambda *_: None, kind=kind, gram="full", weighting=weighting)  # type: ignore[arg-type]
    with Largest() as largest:
        weights = capture.mean_squares(grad) if weighting == "gradient" else None
        hooks._add_full_gram("a.weight", x, weights)
    assert 1024 < largest.made <= 2048


@pytest.mark.parametrize("weighting", ["none", "gradient"])
def test_full_gram_of_nan_names_the_linear(weighting: str) -> None:
    x = torch.randn(2, 3, 6)
    x[1, 1, 1] = torch.nan
    what = "an input" if weighting == "none" else "a gradient"
    with pytest.raises(NumericalError, match=f"{what} of `[02]` is NaN or infinite"):
        measure(network(), x, kind="fisher", gram="full", weighting=weighting)


@settings(max_examples=25)
@given(size=st.integers(1, 12), block=st.integers(1, 14))
def test_symmetrize_is_half_of_both(size: int, block: int) -> None:
    matrix = torch.randn(size, size)
    expected = [[(matrix[i, j] + matrix[j, i]) / 2 for j in range(size)] for i in range(size)]
    capture.symmetrize(matrix, block=block)
    assert matrix.tolist() == [[float(value) for value in row] for row in expected]
    assert torch.equal(matrix, matrix.T)


def test_hooks_are_gone_afterwards() -> None:
    model = network()
    measure(model, torch.randn(2, 3, 6), kind="fisher")
    assert not any(m._forward_hooks for m in model.modules())


def test_logit_gradient_is_autograds() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 9, requires_grad=True)
    tokens = torch.randint(0, 9, (6,))
    counted = torch.tensor([False, True, True, False, True, True])  # the last predicts nothing
    gradient, nll = capture.logit_gradient(logits.detach(), tokens, counted)
    chosen = counted[:-1].nonzero().squeeze(1)
    loss = nn.functional.cross_entropy(logits[chosen], tokens[chosen + 1], reduction="sum")
    loss.backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    torch.testing.assert_close(gradient, logits.grad)
    assert nll == pytest.approx(float(loss.detach()), rel=1e-6)


def test_logit_gradient_drawn_labels_come_from_the_model_and_the_seed() -> None:
    logits = torch.full((500, 3), -30.0)
    logits[:, 1] = 30.0  # the model is certain of 1, the data say 0
    tokens, counted = torch.zeros(500, dtype=torch.int64), torch.ones(500, dtype=torch.bool)

    def draw(values: Tensor, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return capture.logit_gradient(values, tokens, counted, generator=generator)[0]

    assert draw(logits, 0).abs().max() < 1e-6
    assert capture.logit_gradient(logits, tokens, counted)[0].abs().max() == pytest.approx(1.0)
    flat = torch.zeros(500, 3)
    assert torch.equal(draw(flat, 1), draw(flat, 1))
    assert not torch.equal(draw(flat, 1), draw(flat, 2))
    shares = (draw(flat, 1)[:-1] < 0).float().mean(0)
    assert ((shares - 1 / 3).abs() < 0.1).all()


def test_factor_is_exact_for_rank_one_and_keeps_sums() -> None:
    rows, columns = torch.rand(7) + 0.1, torch.rand(5) + 0.1
    exact = rows.unsqueeze(1) * columns
    a, b = capture.factor(exact)
    torch.testing.assert_close(a.unsqueeze(1) * b, exact)
    any_ = torch.rand(7, 5)
    a, b = capture.factor(any_)
    torch.testing.assert_close((a.unsqueeze(1) * b).sum(1), any_.sum(1))


def test_top_overlap_counts_shared_entries() -> None:
    one = torch.arange(200.0).view(10, 20)
    assert capture.top_overlap(one, one, share=0.1) == 1.0
    assert capture.top_overlap(one, -one, share=0.1) == 0.0
    assert capture.top_overlap(one, one.roll(10), share=0.1) == 0.5
