"""Layers whose ortho is whole columns: the product against its slow twin, state, files, Engine."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ortho_cli
from ortho_cli.bench.baselines import base_codes, count_moved, int4_codes
from ortho_cli.errors import ArtifactError
from ortho_cli.formats.open_artifact import open_artifact
from ortho_cli.formats.verify import verify
from ortho_cli.runtime import product
from ortho_cli.runtime.engine import Engine
from ortho_cli.runtime.operands import Columns
from ortho_cli.runtime.ortho_linear import OrthoLinear
from ortho_cli.split import quantize
from tests.runtime.test_engine import TOKENS, Net
from tests.runtime.test_product import DTYPES, Made, close

BOTH = {"structure": "columns", "density": 0.1}


class MadeColumns(Made):
    """Streams of a layer that keeps whole columns."""

    def __init__(self, rows: int, groups: int, size: int, dtype: torch.dtype, **more: Any) -> None:
        super().__init__(rows, groups, size, dtype, **more)
        columns = groups * size
        whole = torch.randperm(columns, generator=self.random)[: max(1, columns // 10)].sort()[0]
        base = self.base
        codes = quantize.unpack_codes(base.weight_packed, bits=base.bits)
        held = quantize.dequantize(codes, base.weight_scale)
        source = torch.randn(rows, len(whole), generator=self.random).to(dtype).float()
        self.columns = Columns(whole, source - held[:, whole])
        self.kept = {
            (row, int(column)): source[row, i].item()
            for row in range(rows)
            for i, column in enumerate(whole)
        }


def linear(dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(64, 48).to(dtype)


def layer(source: nn.Linear, alpha: Any = 1.0, **settings: Any) -> OrthoLinear:
    made = OrthoLinear.from_linear(source, group_size=32, **{**BOTH, **settings})
    made.alpha = alpha
    return made


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
    made = MadeColumns(rows, groups, size, dtype, bits=bits if groups * size % 32 == 0 else 4)
    x = torch.randn(*lead, groups * size, generator=made.random).to(dtype)
    b = made.bias if bias else None
    flat = x.reshape(-1, groups * size)
    expected = made.reference(flat, b, [alpha] * flat.shape[0]).view(*lead, rows)
    for base in (made.base, made.prepared()):
        close(product.dual_linear(x, base, made.columns, b, alpha), expected, made, x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prepared", [False, True])
def test_each_batch_row_has_its_own_alpha(dtype: torch.dtype, prepared: bool) -> None:
    made = MadeColumns(16, 2, 32, dtype)
    base = made.prepared() if prepared else made.base
    x = torch.randn(3, 2, 64, generator=made.random).to(dtype)
    y = product.dual_linear(x, base, made.columns, made.bias, torch.tensor([0.0, 0.5, 1.0]))
    expected = made.reference(x, made.bias, [0.0, 0.5, 1.0])
    close(y, expected, made, x)
    assert (expected[0] - made.reference(x, made.bias, [1.0] * 3)[0]).abs().max() > 0.5


@pytest.mark.parametrize("alpha", [0.3, [0.0, 0.5, 1.0]])
def test_the_gradient_of_x_is_that_of_the_dense_weight(alpha: Any) -> None:
    made = MadeColumns(16, 2, 32, torch.float32)
    x = torch.randn(3, 64, generator=made.random, requires_grad=True)
    given = torch.tensor(alpha) if isinstance(alpha, list) else alpha
    product.dual_linear(x, made.base, made.columns, None, given).sum().backward()
    alphas = alpha if isinstance(alpha, list) else [alpha] * 3
    eye = torch.eye(64)
    for row, one in enumerate(alphas):
        weight = made.reference(eye, None, [one] * 64).T  # (out, in)
        assert x.grad is not None
        assert torch.allclose(x.grad[row].double(), weight.sum(0), atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_columns_are_the_sources_own_at_alpha_1(dtype: torch.dtype) -> None:
    source = linear(dtype)
    made = layer(source)
    assert made.col_indices is not None
    whole = made.col_indices.long()
    assert len(whole) == 6
    assert made.nnz == 6 * 48
    assert torch.equal(made.weight[:, whole], source.weight[:, whole])
    full = made.weight
    made.alpha = 0.0
    rest = torch.ones(64, dtype=torch.bool)
    rest[whole] = False
    assert torch.equal(made.weight[:, rest], full[:, rest])
    assert not torch.equal(made.weight[:, whole], full[:, whole])
    crow, column, values = made.csr()
    assert crow.tolist() == list(range(0, 6 * 48 + 1, 6))
    assert column.tolist() == whole.tolist() * 48
    assert torch.equal(values.view(48, 6), source.weight[:, whole])
    assert count_moved(made) == 0
    assert torch.equal(int4_codes(made), base_codes(made))


@pytest.mark.parametrize("assign", [False, True])
def test_state_loads_into_any_structure_and_no_cache_outlives_it(assign: bool) -> None:
    x = torch.randn(2, 64).bfloat16()
    points, columns = layer(linear(), structure="points"), layer(linear(seed=1))
    assert set(columns.state_dict()) == set(points.state_dict()) - {"crow_indices"}
    for nnz in (None, 0, 48 * 6):
        fresh = OrthoLinear(64, 48, group_size=32, dtype=torch.bfloat16, nnz=nnz, bias=True)
        fresh.alpha = 1.0
        for made in (columns, points, columns, layer(linear(seed=2), density=0.5), columns):
            fresh.load_state_dict(copy.deepcopy(made.state_dict()), assign=assign)
            assert torch.equal(fresh(x), made(x))
            assert fresh.holds_columns == made.holds_columns
    for twin in (copy.deepcopy(columns), pickle.loads(pickle.dumps(columns))):
        assert torch.equal(twin(x), columns(x))


@pytest.mark.parametrize("part", ["column", "order", "twice", "end", "missing", "dtype", "nan"])
def test_state_that_does_not_hold_together_is_refused(part: str) -> None:
    made = layer(linear())
    state = dict(copy.deepcopy(made.state_dict()))
    if part == "column":
        state["col_indices"][5] = 64
    elif part == "order":
        state["col_indices"] = state["col_indices"].int().flip(0).to(torch.uint16)
    elif part == "twice":
        state["col_indices"][1] = int(state["col_indices"][0])
    elif part == "end":
        state["values"] = state["values"][:, :-1]
    elif part == "missing":
        del state["col_indices"]
    elif part == "dtype":
        state["values"] = state["values"].float()
    else:
        state["values"][3, 2] = torch.nan
    with pytest.raises(ArtifactError):
        made.load_state_dict(state)


def test_engine_writes_and_reads_columns(tmp_path: Path) -> None:
    net = Net()
    engine = Engine(net)
    engine.convert()
    engine.decompose(density=0.05, structure="columns", max_rank=4)
    outputs = {}
    for alpha in (0.0, 0.5, 1.0):
        engine.set_alpha(alpha)
        outputs[alpha] = net(TOKENS)
    engine.save(tmp_path / "out")
    opened = open_artifact(tmp_path / "out")
    assert opened.layout == "columns"
    assert verify(opened).tensors
    stored = load_file(tmp_path / "out" / "ortho.safetensors")
    assert max(len(v) for k, v in stored.items() if k.endswith("col_indices")) == 4
    other = Net(seed=1)
    again = Engine(other)
    again.load(tmp_path / "out", alpha=1.0)
    for alpha, expected in outputs.items():
        again.set_alpha(alpha)
        assert torch.equal(other(TOKENS), expected)
    again.save(tmp_path / "again")
    for name in ("model", "ortho"):
        file = f"{name}.safetensors"
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "out" / file).read_bytes()


def test_in_memory_columns_are_those_that_decompose_writes(tmp_path: Path, ortho: Any) -> None:
    weight = linear().weight.detach()
    save_file({"a.weight": weight}, tmp_path / "m.safetensors")
    sets = ("ortho={structure: columns, density: 0.1}", "base={scale: mse, group_size: 32}")
    words = [word for one in sets for word in ("--set", one)]
    out = tmp_path / "out"
    assert ortho("decompose", tmp_path / "m.safetensors", "-o", out, "-q", *words).code == 0
    made = layer(linear(), scale="mse").state_dict()
    for name, file in (("weight_packed", "model"), ("col_indices", "ortho"), ("values", "ortho")):
        stored: Tensor = load_file(out / f"{file}.safetensors")[f"a.{name}"]
        assert stored.dtype == made[name].dtype
        assert torch.equal(stored, made[name])


def test_int8_columns_are_saved_again_as_the_weights_they_stand_for(
    tmp_path: Path, ortho: Any
) -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = linear()

    save_file(One().state_dict(), tmp_path / "m.safetensors")
    words = ("--set", "ortho={structure: columns, density: 0.1, values: int8}")
    out = tmp_path / "out"
    assert ortho("decompose", tmp_path / "m.safetensors", "-o", out, "-q", *words).code == 0
    engine = ortho_cli.Engine(One())
    engine.load(out, alpha=1.0)
    engine.save(tmp_path / "again")
    ran = ortho(
        "inspect", tmp_path / "again", "--verify", "--expect-source", tmp_path / "m.safetensors"
    )
    assert ran.code == 0, ran.err
    back = [tmp_path / "one", tmp_path / "two"]
    for folder, to in zip((out, tmp_path / "again"), back, strict=True):
        assert ortho("convert", folder, "--alpha", 1, "-o", to, "-q").code == 0
    one, two = (load_file(to / "model.safetensors")["a.weight"] for to in back)
    assert torch.equal(one, two)
