"""Hooks against autograd's own weight gradients, sequence by sequence."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ortho_cli import capture
from ortho_cli.capture import Capture
from ortho_cli.errors import CalibrationError, NumericalError


def network(*, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10, bias=bias), nn.Tanh(), nn.Linear(10, 4, bias=bias))


def measure(model: nn.Module, x: Tensor, **options: Any) -> dict[str, Tensor]:
    modules = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    sums: dict[str, Tensor] = {}

    def add(name: str, part: str, row: int, tile: Tensor) -> None:
        linear = modules[name]
        rows = 1 if options["kind"] == "gram" else linear.out_features
        total = sums.setdefault(f"{name}/{part}", torch.zeros(rows, linear.in_features))
        total[row : row + tile.shape[0]] += tile

    mask = options.pop("mask", None)
    with Capture(modules, add, **options) as capture:
        capture.begin(x.shape[0], mask)
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
