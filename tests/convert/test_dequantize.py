"""Quantized checkpoints to plain ones: every layout, bit for bit, and every way to be damaged."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from conftest import Ortho
from safetensors.torch import load_file, save_file
from torch import Tensor

from ortho_cli.convert.sources.base import Source, SourceTensor
from ortho_cli.convert.sources.dequantize import PLANS
from ortho_cli.convert.sources.dequantize_integers import unpack
from ortho_cli.convert.sources.open_source import open_source
from ortho_cli.convert.sources.quantized import CAST, LAYOUTS
from ortho_cli.errors import CheckpointError, NumericalError, OrthoError, UsageError
from ortho_cli.split.dtypes import torch_dtypes

Tensors = dict[str, Tensor]
E4M3, E5M2, E8M0 = torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu
NORM = {"norm.weight": torch.ones(3, dtype=torch.bfloat16)}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def integers(low: int, high: int, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, generator=generator)


def words(*shape: int, seed: int = 0) -> Tensor:
    return integers(-(2**31), 2**31, *shape, seed=seed).int()


def fp8(*shape: int, dtype: torch.dtype = E4M3) -> Tensor:
    return (40 * random(*shape)).to(dtype)


def positive(*shape: int, seed: int = 1) -> Tensor:
    return random(*shape, seed=seed).abs() + 0.01


def write(
    folder: Path, tensors: Tensors, config: dict[str, Any] | None = None, **files: dict[str, Any]
) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "x", **(config or {})}))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def read_rows(tensor: SourceTensor, step: int) -> Tensor:
    """Read a tensor as `convert` does, some rows at a time."""
    reads = [
        tensor.read(row, min(step, tensor.rows - row)).clone()
        for row in range(0, tensor.rows, step)
    ]
    return torch.cat(reads).reshape(tensor.shape)


def read(path: Path) -> tuple[Tensors, Source]:
    """Read every tensor whole and in pieces, and round it once to the dtype it is given."""
    source = open_source(path)
    try:
        found = {}
        for tensor in source.tensors:
            whole, pieces = read_rows(tensor, max(1, tensor.rows)), read_rows(tensor, 3)
            assert torch.equal(whole.float().nan_to_num(), pieces.float().nan_to_num())
            found[tensor.name] = pieces.to(torch_dtypes()[tensor.dtype])
        return found, source
    finally:
        source.close()


def converted(ortho: Ortho, source: Path, *options: object) -> tuple[Tensors, str]:
    out = source.parent / f"{source.name}-out"
    ran = ortho("convert", source, "-o", out, "--force", *options)
    assert ran.code == 0, ran.err
    return load_file(out / "model.safetensors"), ran.err


def refused(source: Path, kind: type[OrthoError]) -> str:
    with pytest.raises(kind) as raised:
        read(source)
    assert raised.value.hint
    return f"{raised.value.message} hint: {raised.value.hint}"


def check(
    tmp_path: Path,
    tensors: Tensors,
    wanted: Tensors,
    config: dict[str, Any] | None = None,
    **files: dict[str, Any],
) -> str:
    """See that each weight is what it should be, rounded once, and nothing else is left."""
    source = write(tmp_path / "m", tensors | NORM, config, **files)
    found, opened = read(source)
    assert found.keys() == wanted.keys() | NORM.keys()
    for name, weight in wanted.items():
        assert found[name].dtype == torch.bfloat16
        assert torch.equal(found[name], weight.bfloat16()), name
    assert opened.config is not None
    assert not {"quantization_config", "compression_config", "quantization"} & opened.config.keys()
    assert opened.own is not None
    assert {f"{name}.json" for name in files} <= opened.own  # none of them is copied along
    return "; ".join(opened.notes)


def test_every_layout_has_a_reader() -> None:
    assert PLANS.keys() == LAYOUTS.keys() | {CAST}


# --- fp8 -------------------------------------------------------------------------------------


def blocks(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    return tuple(math.ceil(n / b) for n, b in zip(shape, block, strict=True))


@pytest.mark.parametrize(
    ("shape", "block", "tell"),
    [((5, 7), (2, 3), True), ((130, 140), (128, 128), False), ((8, 8), (4, 4), True)],
)
def test_fp8_blocks_are_dequantized_like_the_slow_twin(
    tmp_path: Path, ortho: Ortho, shape: tuple[int, int], block: tuple[int, int], tell: bool
) -> None:
    tensors = {"p.weight": fp8(*shape), "p.weight_scale_inv": positive(*blocks(shape, block))}
    settings = {"quant_method": "fp8", **({"weight_block_size": list(block)} if tell else {})}
    config = {"dtype": "bfloat16", "quantization_config": settings}
    wanted = reference.fp8_weight(tensors["p.weight"], tensors["p.weight_scale_inv"], block)
    said = check(tmp_path, tensors, {"p.weight": wanted}, config)
    assert "1 fp8 weights are dequantized" in said
    found, said = converted(ortho, tmp_path / "m")
    assert torch.equal(found["p.weight"], wanted.bfloat16())
    assert "1 fp8 weights are dequantized" in said
    written = json.loads((tmp_path / "m-out" / "config.json").read_text())
    assert written == {"model_type": "x", "dtype": "bfloat16"}
    found, _ = converted(ortho, tmp_path / "m", "--dtype", "float32")
    assert torch.equal(found["p.weight"], wanted)  # rounded once, and here not at all


NAMES = ["weight_scale_inv", "weight_scale", "scale", "scale_inv", "scale_weight"]
SHAPES: list[tuple[tuple[int, ...], tuple[int, int]]] = [
    ((), (6, 8)),
    ((1,), (6, 8)),
    ((1, 1), (6, 8)),
    ((6,), (1, 8)),
    ((6, 1), (1, 8)),
    ((6, 2), (1, 4)),
    ((3, 4), (2, 2)),
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("shape", "block"), SHAPES)
def test_fp8_scales_of_every_name_and_shape_are_multiplied(
    tmp_path: Path, name: str, shape: tuple[int, ...], block: tuple[int, int]
) -> None:
    codes, scale = fp8(6, 8), positive(*shape)
    grid = scale.reshape(blocks((6, 8), block))
    wanted = {"p.weight": reference.fp8_weight(codes, grid, block)}
    check(tmp_path, {"p.weight": codes, f"p.{name}": scale}, wanted)


@pytest.mark.parametrize("dtype", [E4M3, E5M2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16, E8M0, torch.uint8])
def test_fp8_of_every_kind_with_scales_of_every_dtype_is_dequantized(
    tmp_path: Path, dtype: torch.dtype, kind: torch.dtype
) -> None:
    codes, scale = fp8(6, 64, dtype=dtype), positive(6, 2).to(kind)
    value = scale.float()
    if kind == torch.uint8:
        scale = integers(120, 134, 6, 2).to(torch.uint8)
        value = torch.tensor([[2.0 ** (e - 127) for e in row] for row in scale.tolist()])
    wanted = {"p.weight": reference.fp8_weight(codes, value, (1, 32))}
    check(tmp_path, {"p.weight": codes, "p.weight_scale": scale}, wanted)


@pytest.mark.parametrize(
    ("shape", "block"),
    [((2,), (6, 8)), ((2, 1, 1), (6, 8)), ((2, 6), (1, 8)), ((2, 6, 1), (1, 8)),
     ((2, 1, 8), (6, 1)), ((2, 3, 4), (2, 2)), ((1, 6, 1), (1, 8)), ((), (6, 8))],
)  # fmt: skip
def test_fused_fp8_experts_are_dequantized_expert_by_expert(
    tmp_path: Path, shape: tuple[int, ...], block: tuple[int, int]
) -> None:
    codes, scale = fp8(2, 6, 8), positive(*shape)
    lead = 2 if scale.numel() > 1 and shape[0] == 2 else 1
    grid = scale.reshape(lead, *blocks((6, 8), block)).expand(2, -1, -1)
    wanted = torch.stack([reference.fp8_weight(codes[e], grid[e], block) for e in range(2)])
    tensors = {"experts.up": codes, "experts.up_scale_inv": scale}
    check(tmp_path, tensors, {"experts.up": wanted})


def test_fbgemm_scales_of_square_experts_belong_to_columns(tmp_path: Path) -> None:
    codes, scale = fp8(2, 4, 4), positive(2, 4, 1)
    tensors = {"experts.down_proj": codes, "experts.down_proj_scale": scale}
    config = {"quantization_config": {"quant_method": "fbgemm_fp8"}}
    wanted = codes.float() * scale.view(2, 1, 4)
    check(tmp_path, tensors, {"experts.down_proj": wanted}, config)


def test_block_of_128_is_meant_where_config_is_silent(tmp_path: Path) -> None:
    codes, scale = fp8(130, 200), positive(2, 2)
    wanted = {"p.weight": reference.fp8_weight(codes, scale, (128, 128))}
    check(tmp_path, {"p.weight": codes, "p.scale": scale}, wanted)


def test_scales_of_activations_are_left_out_and_said(tmp_path: Path) -> None:
    scale = torch.tensor(0.5)
    tensors = {"a.p.weight": fp8(4, 4), "a.p.weight_scale": scale, "a.p.input_scale": scale}
    tensors |= {"a.k_scale": scale, "a.v_scale": scale, "a.p.activation_scale": scale}
    tensors |= {"e.up": fp8(2, 2, 2), "e.up_scale": scale, "e.up_input_scale": scale}
    wanted = {"a.p.weight": tensors["a.p.weight"].float() / 2, "e.up": tensors["e.up"].float() / 2}
    said = check(tmp_path, {k: v.clone() for k, v in tensors.items()}, wanted)
    assert "5 scales of activations are left out" in said


def test_parameter_that_is_merely_named_like_a_scale_is_kept(tmp_path: Path) -> None:
    mine = {"router.input_scale": torch.rand(4), "swin.logit_scale": torch.rand(2, 1, 1)}
    tensors = {"p.weight": fp8(4, 4), "p.weight_scale": torch.tensor(0.5)}
    write(tmp_path / "m", tensors | mine)
    found, _ = read(tmp_path / "m")
    assert all(torch.equal(found[name], value) for name, value in mine.items())


def test_fp8_without_any_scale_is_taken_as_it_is_and_said(tmp_path: Path) -> None:
    codes = {"p.weight": fp8(4, 6), "q": fp8(5, dtype=E5M2)}
    wanted = {name: value.float() for name, value in codes.items()}
    assert "2 fp8 weights have no scales" in check(tmp_path, codes, wanted)


@pytest.mark.parametrize("told", [False, True])
def test_fp8_weight_that_lacks_its_scale_is_refused_by_name(tmp_path: Path, told: bool) -> None:
    tensors = {"p.weight": fp8(4, 4), "q.weight": fp8(4, 4), "q.weight_scale": positive(1)}
    if told:  # a config that speaks of scales, and none anywhere
        del tensors["q.weight"], tensors["q.weight_scale"]
    config = {"quantization_config": {"quant_method": "fp8"}} if told else None
    said = refused(write(tmp_path / "m", tensors, config), CheckpointError)
    assert "`p.weight`" in said
    assert "`p.weight_scale_inv`" in said


def test_mixture_of_quantized_and_plain_tensors_keeps_the_plain_ones(tmp_path: Path) -> None:
    plain = {"head.weight": random(4, 4).half(), "head.bias": random(4), "p.bias": random(4)}
    tensors = {"p.weight": fp8(4, 4), "p.weight_scale": positive(4, 1)}
    write(tmp_path / "m", tensors | plain)
    found, _ = read(tmp_path / "m")
    assert all(torch.equal(found[name], value) for name, value in plain.items())


@pytest.mark.parametrize(
    ("config", "dtype"),
    [({"torch_dtype": "float16"}, torch.float16), ({"dtype": "float32"}, torch.float32),
     ({"text_config": {"dtype": "float16"}}, torch.float16), ({"dtype": "auto"}, torch.bfloat16),
     ({"torch_dtype": "float8_e4m3fn"}, torch.bfloat16)],
)  # fmt: skip
def test_weights_get_the_dtype_that_config_says(
    tmp_path: Path, config: dict[str, Any], dtype: torch.dtype
) -> None:
    codes, scale = fp8(4, 4), positive(4, 1)
    write(tmp_path / "m", {"p.weight": codes, "p.weight_scale": scale}, config)
    found, opened = read(tmp_path / "m")
    assert torch.equal(found["p.weight"], (codes.float() * scale).to(dtype))
    assert "float8" not in str(opened.config)


@pytest.mark.parametrize("shape", [(64,), (4,), (1,), (2,), (2, 2), (64, 1), (1, 64, 1)])
@pytest.mark.parametrize("dtype", [torch.int8, E4M3])
def test_scales_of_fused_matrices_are_one_or_for_each_of_them(
    tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    codes, scale = integers(-9, 9, 2, 64, 64).to(dtype), positive(*shape)
    tensors = {"e.up": codes, "e.up_scale": scale}
    if shape in ((1,), (2,), (1, 64, 1)):
        each = scale if len(shape) == 3 else scale.view(-1, 1, 1)
        check(tmp_path, tensors, {"e.up": codes.float() * each})
    else:
        said = refused(write(tmp_path / "m", tensors), CheckpointError)
        assert "`e.up_scale`" in said
        assert str(list(shape)) in said


# --- integers of eight bits ------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "block"), [*SHAPES[:6], ((6, 8), (1, 1))])
@pytest.mark.parametrize("zero", [False, True])
def test_int8_is_dequantized_with_its_zero_points(
    tmp_path: Path, shape: tuple[int, ...], block: tuple[int, int], zero: bool
) -> None:
    codes, scale = integers(-128, 128, 6, 8).to(torch.int8), positive(*shape).bfloat16()
    tensors = {"p.weight": codes, "p.weight_scale": scale}
    grid = blocks((6, 8), block)
    zeros = integers(-9, 9, *shape).to(torch.int8)
    tensors |= {"p.weight_zero_point": zeros} if zero else {}
    wide = zeros.reshape(grid).repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    minus = codes.float() - (wide.float() if zero else 0)
    wanted = reference.fp8_weight(minus, scale.reshape(grid).float(), block)
    check(tmp_path, tensors, {"p.weight": wanted})


def test_bitsandbytes_of_eight_bits_is_dequantized(tmp_path: Path) -> None:
    codes, scale = integers(-128, 128, 6, 8).to(torch.int8), positive(6)
    tensors = {"p.weight": codes, "p.SCB": scale}
    wanted = codes.float() * scale.view(-1, 1) * 7.874015718698502e-3
    form = {"p.weight_format": torch.tensor(0, dtype=torch.uint8)}
    check(tmp_path, tensors | form, {"p.weight": wanted})
    form = {"p.weight_format": torch.tensor(2, dtype=torch.uint8)}
    write(tmp_path / "tiled", tensors | form)
    assert "`p.weight_format`" in refused(tmp_path / "tiled", CheckpointError)


@pytest.mark.parametrize("dtype", [torch.int8, E4M3])
def test_quanto_is_dequantized(tmp_path: Path, dtype: torch.dtype) -> None:
    codes, scale = integers(-100, 100, 6, 8).to(dtype), positive(6, 1)
    tensors = {"p.weight._data": codes, "p.weight._scale": scale, "p.input_scale": torch.ones(())}
    tensors |= {"p.output_scale": torch.ones(())}
    check(tmp_path, tensors, {"p.weight": codes.float() * scale})


# --- floats of four bits -----------------------------------------------------------------------


def exponents(*shape: int) -> tuple[Tensor, Tensor]:
    """Exponents as bytes, the least and the greatest among them, and what they stand for."""
    raw = integers(110, 140, *shape).to(torch.uint8)
    raw.view(-1)[0] = 0
    return raw, torch.tensor([2.0 ** (int(e) - 127) for e in raw.view(-1)]).view(shape)


@pytest.mark.parametrize("kind", ["u8", "e8m0", "deepseek"])
def test_mxfp4_is_dequantized(tmp_path: Path, kind: str) -> None:
    codes = integers(0, 256, 5, 32).to(torch.uint8)
    raw, value = exponents(5, 2)
    wanted = {"p.weight": reference.fp4_weight(codes, value, group=32)}
    scale = raw if kind == "u8" else raw.view(E8M0)
    if kind == "deepseek":
        tensors = {"p.weight": codes.view(torch.int8), "p.scale": scale}
        check(tmp_path, tensors, wanted, {"expert_dtype": "fp4"})
    else:
        check(tmp_path, {"p.weight_packed": codes, "p.weight_scale": scale}, wanted)


@pytest.mark.parametrize("maker", ["compressed-tensors", "modelopt"])
def test_nvfp4_divides_by_one_global_scale_and_multiplies_by_the_other(
    tmp_path: Path, maker: str
) -> None:
    codes, scale = integers(0, 256, 5, 16).to(torch.uint8), positive(5, 2).to(E4M3)
    second = torch.tensor([3.7])
    if maker == "modelopt":
        tensors = {"p.weight": codes, "p.weight_scale": scale, "p.weight_scale_2": second[0]}
        whole = scale.float() * second
        files = {"hf_quant_config": {"quantization": {"quant_algo": "NVFP4"}}}
    else:
        tensors = {"p.weight_packed": codes, "p.weight_scale": scale}
        tensors |= {"p.weight_global_scale": second, "p.input_global_scale": second.clone()}
        whole, files = scale.float() / second, {}
    wanted = {"p.weight": reference.fp4_weight(codes, whole, group=16)}
    check(tmp_path, tensors, wanted, **files)


def test_gpt_oss_experts_are_what_transformers_makes_of_them(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    codes = integers(0, 256, 3, 6, 2, 16).to(torch.uint8)
    raw, value = exponents(3, 6, 2)
    tensors = {"e.up_blocks": codes, "e.up_scales": raw, "e.up_bias": random(3, 6).bfloat16()}
    each = [reference.fp4_weight(codes[e].view(6, 32), value[e], group=32).T for e in range(3)]
    wanted = {"e.up": torch.stack(each), "e.up_bias": tensors["e.up_bias"]}
    config = {"quantization_config": {"quant_method": "mxfp4"}}
    check(tmp_path, tensors, wanted, config)
    theirs = convert_moe_packed_tensors(codes, raw)
    assert torch.equal(read(tmp_path / "m")[0]["e.up"], theirs)


# --- packed integers -----------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [1, 31, 64, 70])
def test_codes_are_unpacked_like_the_slow_twin(bits: int, columns: int) -> None:
    packed = words(3, math.ceil(columns * bits / 32))
    found = unpack(packed, bits=bits, columns=columns)
    assert found.tolist() == [reference.unpack_bits(x, bits=bits, count=columns) for x in packed]


@pytest.mark.parametrize("rows", [1, 3])
def test_one_word_of_zero_points_for_each_group_is_unpacked(tmp_path: Path, rows: int) -> None:
    codes, zeros, scale = integers(0, 16, rows, 64), integers(0, 16, rows, 2), positive(rows, 2)
    tensors = {"p.weight_packed": pack_rows(codes, 4), "p.weight_scale": scale}
    tensors["p.weight_zero_point"] = pack_rows(zeros.T, 4).T.contiguous()
    tensors["p.weight_shape"] = torch.tensor([rows, 64])
    wanted = (codes - zeros.repeat_interleave(32, 1)).float() * scale.repeat_interleave(32, 1)
    check(tmp_path, tensors, {"p.weight": wanted})


def schemes() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for bits in (2, 3, 4, 8):
        for strategy in ("group", "channel"):
            for symmetric in (True, False):
                args = {"num_bits": bits, "type": "int", "strategy": strategy}
                args |= {"symmetric": symmetric}
                args |= {"group_size": 32} if strategy == "group" else {}
                yield "pack_quantized", f"{bits} {strategy} {symmetric}", args
    for strategy in ("tensor", "channel"):
        args = {"num_bits": 8, "type": "int", "strategy": strategy, "symmetric": True}
        yield "int_quantized", strategy, args
        yield "float_quantized", strategy, args | {"type": "float"}
    block = {"num_bits": 8, "type": "float", "strategy": "block", "symmetric": True}
    yield "float_quantized", "block", block | {"block_structure": [32, 32]}
    four = {"num_bits": 4, "type": "float", "symmetric": True}
    yield "nvfp4_pack_quantized", "", four | {"strategy": "tensor_group", "group_size": 16}
    yield "mxfp4_pack_quantized", "", four | {"strategy": "group", "group_size": 32}


@pytest.mark.parametrize(
    ("form", "name", "args"), [pytest.param(*s, id=" ".join(s[:2])) for s in schemes()]
)
def test_what_compressed_tensors_wrote_is_what_it_reads_itself(
    tmp_path: Path, form: str, name: str, args: dict[str, Any]
) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.config import CompressionFormat
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
    compressor = BaseCompressor.get_value_from_registry(CompressionFormat[form].value)
    rows, columns = 40, 96
    grid = {"tensor": (1,), "channel": (rows, 1), "block": (2, 3)}.get(
        args["strategy"], (rows, columns // args.get("group_size", 1))
    )
    state: Tensors = {"weight": random(rows, columns).bfloat16()}
    state["weight_scale"] = (positive(*grid) / 4).bfloat16()
    if form.startswith("mxfp4"):
        state["weight_scale"] = (2.0 ** integers(-4, 2, *grid)).bfloat16()
    if form.startswith("nvfp4"):
        state |= {"weight_global_scale": torch.tensor([3.7])}
    if not args["symmetric"]:
        high = 1 << (args["num_bits"] - 1)
        state["weight_zero_point"] = integers(-high, high, *grid).to(torch.int8)
    packed = compressor.compress(state, scheme)
    theirs = compressor.decompress(packed, scheme)["weight"].detach()
    tensors = {f"p.{k}": v.detach() for k, v in packed.items() if isinstance(v, Tensor)}
    settings = {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"weights": args}},
    }
    check(tmp_path, tensors, {"p.weight": theirs}, {"quantization_config": settings})


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Pack rows of codes into words of 32 bits, the lowest first."""
    numbers = [sum(int(c) << bits * i for i, c in enumerate(row)) for row in codes.tolist()]
    count = math.ceil(codes.shape[1] * bits / 32)
    cut = [[(n >> 32 * i) & 0xFFFFFFFF for i in range(count)] for n in numbers]
    return torch.tensor(cut, dtype=torch.int64).to(torch.int32)


@pytest.mark.parametrize("kind", ["packed", "int8", "fp8"])
@pytest.mark.parametrize("width", [96, 192, 200])
def test_last_group_of_a_row_may_be_short(tmp_path: Path, kind: str, width: int) -> None:
    codes, scale = integers(-8, 8, 4, width), positive(4, math.ceil(width / 128))
    tensors = {"p.weight_scale": scale}
    if kind == "packed":
        tensors |= {"p.weight_packed": pack_rows(codes + 8, 4)}
        tensors |= {"p.weight_shape": torch.tensor([4, width])}
    else:
        tensors |= {"p.weight": codes.to(torch.int8 if kind == "int8" else E4M3)}
    weights = {"num_bits": 4 if kind == "packed" else 8, "strategy": "group", "group_size": 128}
    said = {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": weights}}}
    wanted = codes.float() * scale.repeat_interleave(128, 1)[:, :width]
    check(tmp_path, tensors, {"p.weight": wanted}, {"quantization_config": said})


def test_columns_out_of_order_take_the_scale_of_their_group(tmp_path: Path) -> None:
    codes, scale = integers(0, 16, 4, 64), positive(4, 2).bfloat16()
    order = torch.tensor([0, 1] * 32, dtype=torch.int32)
    tensors = {"p.weight_packed": pack_rows(codes, 4), "p.weight_scale": scale}
    tensors |= {"p.weight_shape": torch.tensor([4, 64]), "p.weight_g_idx": order}
    wanted = (codes.float() - 8) * scale.float()[:, order]
    check(tmp_path, tensors, {"p.weight": wanted})
    tensors["p.weight_g_idx"] = torch.full((64,), -1, dtype=torch.int32)
    wanted = (codes.float() - 8) * scale.float().repeat_interleave(32, 1)
    check(tmp_path, tensors, {"p.weight": wanted})


def test_packed_integers_are_not_given_another_dtype_on_the_way(
    tmp_path: Path, ortho: Ortho
) -> None:
    tensors = {"p.weight_packed": words(4, 8), "p.weight_scale": positive(4, 1)}
    write(tmp_path / "m", tensors | {"p.weight_shape": torch.tensor([4, 64])})
    ran = ortho("convert", tmp_path / "m", "--dtype", "float16")
    assert ran.code == UsageError.exit_code
    assert "dequantized to BF16" in ran.err
    converted(ortho, tmp_path / "m", "--dtype", "bfloat16")


# --- GPTQ, AWQ, MLX, bitsandbytes ----------------------------------------------------------------


def gptq(bits: int, *, order: str = "sorted") -> Tensors:
    columns, out, groups = 64, 32, 2
    g_idx = torch.arange(columns) // (columns // groups)
    if order == "shuffled":
        g_idx = g_idx[torch.randperm(columns, generator=torch.Generator().manual_seed(3))]
    return {
        "qweight": words(columns * bits // 32, out),
        "qzeros": words(groups, out * bits // 32, seed=2),
        "scales": positive(groups, out).half(),
        "g_idx": g_idx.int(),
    }


def module(parts: Tensors) -> Tensors:
    return {f"p.{name}": value for name, value in parts.items()}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("order", ["sorted", "shuffled", "unsaid"])
@pytest.mark.parametrize(("form", "add"), [(None, 1), ("gptq", 1), ("gptq_v2", 0)])
def test_gptq_is_dequantized_and_turned(
    tmp_path: Path, bits: int, order: str, form: str | None, add: int
) -> None:
    parts = gptq(bits, order=order)
    wanted = reference.gptq_weight(parts, bits=bits, add=add)
    if order == "unsaid":
        del parts["g_idx"]
    bias = {"p.bias": random(32).bfloat16()}
    said = {"bits": bits, "group_size": 32, "quant_method": "gptq"}
    said |= {"checkpoint_format": form} if form else {}
    check(tmp_path, module(parts) | bias, {"p.weight": wanted} | bias, quantize_config=said)


def test_gptq_group_size_of_config_holds_where_the_last_group_is_short(tmp_path: Path) -> None:
    parts = gptq(4)
    parts["g_idx"] = (torch.arange(64) // 48).int()
    wanted = reference.gptq_weight(parts, bits=4, add=1)
    del parts["g_idx"]
    config = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 48}}
    check(tmp_path, module(parts), {"p.weight": wanted}, config)


@pytest.mark.parametrize("form", ["marlin", "gptq_marlin", "bitblas"])
def test_gptq_packed_for_a_kernel_is_refused(tmp_path: Path, form: str) -> None:
    config = {"quantization_config": {"quant_method": "gptq", "checkpoint_format": form}}
    write(tmp_path / "m", module(gptq(4)), config)
    assert repr(form) in refused(tmp_path / "m", CheckpointError)


def test_gptq_of_a_model_with_turned_weights_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "m", module(gptq(4)), {"model_type": "gpt2"})
    said = refused(tmp_path / "m", CheckpointError)
    assert "`p.qweight`" in said
    assert "gpt2" in said


@pytest.mark.parametrize("where", ["config", "file"])
def test_awq_is_dequantized_and_turned(tmp_path: Path, where: str) -> None:
    parts = {"qweight": words(32, 3), "qzeros": words(2, 3, seed=2)}
    parts |= {"scales": positive(2, 24).half()}
    wanted = {"p.weight": reference.awq_weight(parts, group=16)}
    said = {"zero_point": True, "q_group_size": 16, "w_bit": 4, "version": "GEMM"}
    if where == "file":
        check(tmp_path, module(parts), wanted, quant_config=said)
    else:
        config = {"quantization_config": {"quant_method": "awq", **said}}
        check(tmp_path, module(parts), wanted, config)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("bias", ["biases", "qbiases"])
def test_mlx_is_dequantized(tmp_path: Path, bits: int, bias: str) -> None:
    codes = words(4, 2 * bits)  # 64 columns
    scale, offset = positive(4, 2).half(), random(4, 2).half()
    wanted = reference.mlx_weight(codes, scale, offset, bits=bits, group=32)
    tensors = {"p.weight": codes.view(torch.uint32), "p.scales": scale, f"p.{bias}": offset}
    said = {"group_size": 64, "bits": 5, "p": {"group_size": 32, "bits": bits}}
    check(tmp_path, tensors, {"p.weight": wanted}, {"quantization": said})


def mlx(name: str = "p", *lead: int) -> Tensors:
    return {
        f"{name}.weight": words(*lead, 4, 8).view(torch.uint32),
        f"{name}.scales": positive(*lead, 4, 1).half(),
        f"{name}.biases": random(*lead, 4, 1).half(),
    }


@pytest.mark.parametrize(
    ("tensors", "config", "named"),
    [
        (mlx("m.switch_mlp.up", 2), {}, "m.switch_mlp.up.biases"),
        (mlx("m.switch_glu.up", 2), {}, "m.switch_glu.up.biases"),
        (mlx() | {"m.conv1d.weight": random(8, 4, 1)}, {}, "m.conv1d.weight"),
        (mlx(), {"model_type": "qwen3_next"}, "p.weight"),
        (mlx(), {"model_type": "qwen3_5_moe"}, "p.weight"),
        (mlx(), {"model_type": "v", "text_config": {"model_type": "qwen3_5_text"}}, "p.weight"),
    ],
)
def test_model_that_mlx_rewrote_is_refused_by_name(
    tmp_path: Path, ortho: Ortho, tensors: Tensors, config: dict[str, Any], named: str
) -> None:
    write(tmp_path / "m", tensors, {"quantization": {"group_size": 64, "bits": 4}} | config)
    assert f"`{named}`" in refused(tmp_path / "m", CheckpointError)
    ran = ortho("decompose", tmp_path / "m")
    assert ran.code == CheckpointError.exit_code
    assert "ortho convert" not in ran.err


def test_convolution_beside_weights_of_mlx_may_have_the_order_of_torch(tmp_path: Path) -> None:
    tensors = mlx() | {"m.conv1d.weight": random(8, 1, 4)}
    read(write(tmp_path / "m", tensors, {"quantization": {"group_size": 64, "bits": 4}}))


@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_of_four_bits_is_dequantized(tmp_path: Path, nested: bool) -> None:
    codes, values = integers(0, 256, 63, 1).to(torch.uint8), random(16)
    state = {"quant_type": "nf4", "blocksize": 4, "shape": [14, 9], "dtype": "bfloat16"}
    scale = positive(32)
    tensors = {"p.weight": codes, "p.weight.quant_map": values, "p.weight.absmax": scale}
    if nested:
        state |= {"nested_blocksize": 8, "nested_offset": 0.25, "nested_dtype": "float32"}
        raw, outer, second = integers(0, 256, 32).to(torch.uint8), random(256), positive(4)
        tensors["p.weight.absmax"] = raw
        tensors |= {"p.weight.nested_absmax": second, "p.weight.nested_quant_map": outer}
        scale = torch.stack([outer[raw[i].int()] * second[i // 8] + 0.25 for i in range(32)])
    encoded = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    tensors["p.weight.quant_state.bitsandbytes__nf4"] = encoded
    wanted = reference.nf4_weight(codes, values, scale, block=4).view(14, 9)
    check(tmp_path, tensors, {"p.weight": wanted})


# --- damaged and unknown -------------------------------------------------------------------------

Change = Callable[[Tensors], object]


def packed_four() -> Tensors:
    return {
        "weight_packed": words(8, 8),
        "weight_scale": positive(8, 2),
        "weight_shape": torch.tensor([8, 64]),
    }


SOUND: dict[str, Callable[[], Tensors]] = {
    "fp8": lambda: {"weight": fp8(256, 256), "weight_scale_inv": positive(2, 2)},
    "int8": lambda: {
        "weight": integers(-9, 9, 4, 4).to(torch.int8), "weight_scale": positive(4, 1)
    },
    "packed": packed_four,
    "fp4": lambda: {
        "weight_packed": integers(0, 256, 4, 16).to(torch.uint8),
        "weight_scale": positive(4, 2).to(E4M3),
        "weight_global_scale": torch.ones(1),
    },
    "gptq": lambda: gptq(4),
    "awq": lambda: {
        "qweight": words(32, 3), "qzeros": words(2, 3), "scales": positive(2, 24).half()
    },
}  # fmt: skip
BREAKS: list[tuple[str, str, Tensor, str, str]] = [
    ("fp8", "weight_scale_inv", positive(2, 1), "[2, 1]", "[2, 2]"),
    ("fp8", "weight_scale_inv", positive(3, 3), "[3, 3]", "[2, 2]"),
    ("fp8", "weight_scale_inv", positive(255), "[255]", "[256, 256]"),
    ("fp8", "weight_scale_inv", torch.ones(2, 2).int(), "I32", "F32"),
    ("int8", "weight_scale", positive(3, 1), "[3, 1]", "[4, 4]"),
    ("int8", "weight_zero_point", torch.ones(3, 1).to(torch.int8), "[3, 1]", "[4, 1]"),
    ("packed", "weight_shape", torch.tensor([9, 64]), "[9, 64]", "[8, 8]"),
    ("packed", "weight_shape", torch.tensor([8, 99]), "99", "[8, 8]"),
    ("packed", "weight_shape", torch.tensor([-8, 64]), "[-8, 64]", "[8, 8]"),
    ("packed", "weight_scale", positive(8, 3), "[8, 3]", "[8, 8]"),
    ("packed", "weight_g_idx", torch.full((64,), 2), "group 2", "has 2"),
    ("packed", "weight_g_idx", torch.zeros(63).int(), "[63]", "64 columns"),
    ("packed", "weight_zero_point", words(2, 2), "[2, 2]", "[1, 2]"),
    ("fp4", "weight_scale", positive(4, 1).to(E4M3), "[4, 1]", "[4, 2]"),
    ("fp4", "weight_global_scale", torch.ones(3), "[3]", "one value"),
    ("gptq", "g_idx", torch.full((64,), 2).int(), "group 2", "has 2"),
    ("gptq", "g_idx", torch.arange(63).int(), "[63]", "64 columns"),
    ("gptq", "scales", positive(3, 32).half(), "[3, 32]", "[2, 4]"),
    ("gptq", "scales", positive(2, 31).half(), "[2, 31]", "256"),
    ("gptq", "qzeros", words(2, 5), "[2, 5]", "32 zero points"),
    ("awq", "scales", positive(2, 23).half(), "[2, 23]", "24"),
    ("awq", "scales", positive(3, 24).half(), "[3, 24]", "[2, 3]"),
]


@pytest.mark.parametrize("at", range(len(BREAKS)))
def test_parts_that_do_not_fit_are_refused_with_both_values(tmp_path: Path, at: int) -> None:
    kind, part, value, first, second = BREAKS[at]
    read(write(tmp_path / "sound", module(SOUND[kind]())))
    said = refused(write(tmp_path / "m", module(SOUND[kind]() | {part: value})), CheckpointError)
    assert "`p." in said
    assert first in said
    assert second in said


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("kind", "part"),
    [("fp8", "weight_scale_inv"), ("int8", "weight_scale"), ("packed", "weight_scale"),
     ("fp4", "weight_global_scale"), ("gptq", "scales"), ("awq", "scales")],
)  # fmt: skip
def test_scale_that_is_not_finite_is_refused_by_name(
    tmp_path: Path, kind: str, part: str, value: float
) -> None:
    parts = SOUND[kind]()
    parts[part].view(-1)[-1] = value
    said = refused(write(tmp_path / "m", module(parts)), NumericalError)
    assert f"`p.{part}`" in said
    assert f"the scale {value}" in said


@pytest.mark.parametrize("kind", ["fp8", "gptq"])
def test_damaged_source_leaves_nothing_behind(tmp_path: Path, ortho: Ortho, kind: str) -> None:
    for name, value in (("bent", torch.ones(1, 7, 1)), ("nan", None)):
        parts = SOUND[kind]()
        part = "scales" if kind == "gptq" else "weight_scale_inv"
        parts[part].view(-1)[-1] = math.nan
        source = write(tmp_path / name, module(parts if value is None else {**parts, part: value}))
        ran = ortho("convert", source)
        failed = NumericalError if value is None else CheckpointError
        assert ran.code == failed.exit_code
        assert [path.name for path in tmp_path.iterdir()] == [name]
        assert "hint: " in ran.err
        shutil.rmtree(source)


def test_exponent_that_means_nan_is_refused_by_name(tmp_path: Path) -> None:
    raw, _ = exponents(5, 2)
    raw[4, 1] = 255
    tensors = {"p.weight": fp8(5, 64), "p.weight_scale": raw}
    said = refused(write(tmp_path / "m", tensors), NumericalError)
    assert "`p.weight_scale`" in said
    assert "element 9" in said


def test_product_beyond_float32_is_refused_by_name(tmp_path: Path) -> None:
    tensors = {"p.weight": fp8(4, 4), "p.weight_scale": torch.tensor(3e38)}
    assert "`p.weight`" in refused(write(tmp_path / "m", tensors), NumericalError)


def test_nan_code_of_fp8_stays_what_it_is(tmp_path: Path) -> None:
    codes = fp8(4, 4)
    codes[1, 2] = math.nan
    write(tmp_path / "m", {"p.weight": codes, "p.weight_scale": torch.tensor(0.5)})
    found, _ = read(tmp_path / "m")
    assert found["p.weight"].isnan().nonzero().tolist() == [[1, 2]]


@pytest.mark.parametrize("part", ["weight_scale", "weight_shape", "weight_packed"])
def test_part_that_is_missing_is_refused_by_name(tmp_path: Path, part: str) -> None:
    parts = packed_four()
    del parts[part]
    left = "weight_scale" if part == "weight_packed" else "weight_packed"
    said = refused(write(tmp_path / "m", module(parts) | NORM), CheckpointError)
    assert f"`p.{left}`" in said
    assert "unquantized" in said


@pytest.mark.parametrize("part", ["p.W_q", "p.q_weight", "p.trellis"])
def test_layout_that_is_not_read_is_refused_by_name(tmp_path: Path, part: str) -> None:
    said = refused(write(tmp_path / "m", {part: words(4, 4)} | NORM), CheckpointError)
    assert f"`{part}`" in said
    assert "unquantized" in said


def test_weight_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    twice = module(gptq(4)) | {"p.weight": random(32, 64)}
    assert "`p.weight` both" in refused(write(tmp_path / "m", twice), CheckpointError)


def test_block_size_may_be_spelled_as_compressed_tensors_takes_it(tmp_path: Path) -> None:
    codes, scale = fp8(5, 7), positive(3, 3)
    weights = {"num_bits": 8, "strategy": "block", "block_structure": "2x3"}
    config = {"quantization_config": {"config_groups": {"group_0": {"weights": weights}}}}
    wanted = {"p.weight": reference.fp8_weight(codes, scale, (2, 3))}
    check(tmp_path, {"p.weight": codes, "p.weight_scale": scale}, wanted, config)


def test_block_size_that_is_none_is_refused(tmp_path: Path) -> None:
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [0, 128]}}
    write(tmp_path / "m", module(SOUND["fp8"]()), config)
    assert "[0, 128]" in refused(tmp_path / "m", CheckpointError)


# --- what only config.json says ------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
def test_plain_weights_lose_the_word_that_they_are_quantized_and_it_is_said(
    pico: Path, ortho: Ortho, nested: bool
) -> None:
    config = json.loads((pico / "config.json").read_text())
    entry = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    said = {**config, "text_config": {"a": 1, **entry}} if nested else {**config, **entry}
    (pico / "config.json").write_text(json.dumps(said))
    (pico / "quantize_config.json").write_text('{"bits": 4}')
    found, err = converted(ortho, pico)
    assert found.keys() == load_file(pico / "model.safetensors").keys()
    assert "all its tensors are plain" in err
    out = pico.parent / "pico-out"
    written = json.loads((out / "config.json").read_text())
    assert written == ({**config, "text_config": {"a": 1}} if nested else config)
    assert not (out / "quantize_config.json").exists()
    assert ortho("decompose", out, "-q").code == 0


def test_model_that_rounds_while_it_runs_is_refused(pico: Path) -> None:
    config = json.loads((pico / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitnet", "quantization_mode": "online"}
    (pico / "config.json").write_text(json.dumps(config))
    assert "bitnet" in refused(pico, CheckpointError)


ROTATED = {"u": {"type": "hadamard", "apply": [{"targets": ["Linear"], "location": "output"}]}}


@pytest.mark.parametrize("plain", [False, True])
def test_rotated_weights_are_refused_by_name(tmp_path: Path, ortho: Ortho, plain: bool) -> None:
    said = {"quant_method": "compressed-tensors", "transform_config": {"config_groups": ROTATED}}
    tensors = {"p.weight": random(8, 64)} if plain else module(packed_four())
    write(tmp_path / "m", tensors, {"quantization_config": said})
    assert "`transform_config`" in refused(tmp_path / "m", CheckpointError)
    ran = ortho("decompose", tmp_path / "m")
    assert ran.code == CheckpointError.exit_code
    assert "ortho convert" not in ran.err


@pytest.mark.parametrize("said", [None, {}, {"config_groups": {}}])
def test_rotations_of_nothing_are_no_reason_to_refuse(tmp_path: Path, said: object) -> None:
    config = {"quantization_config": {"quant_method": "x", "transform_config": said}}
    read(write(tmp_path / "m", module(packed_four()), config))


def test_torch_files_are_dequantized_too(tmp_path: Path) -> None:
    codes, scale = fp8(6, 8), positive(6, 1)
    torch.save({"p.weight": codes, "p.weight_scale": scale}, tmp_path / "m.bin")
    found, _ = read(tmp_path / "m.bin")
    assert torch.equal(found["p.weight"], (codes.float() * scale).bfloat16())
