"""`--to gguf`: base as one GGUF file for llama.cpp, its codes bit for bit.

A block of Q4_0 is 32 weights: d (float16), then 16 bytes of which byte j has code j + 8 in its low
half and code j + 16 + 8 in its high half; a weight is d * q. So base's codes, of 3 or 4 bits, are
Q4_0's own wherever a group is a multiple of 32 columns, and d is the group's scale, rounded to
float16. Other groups are quantized again, to Q8_0. What is not split keeps its dtype, vectors are
float32.

    base   bfloat16(q * scale)      transformers rounds the product
    Q4_0   q * float16(scale)       llama.cpp does not

Source: block_q4_0 in ggml-common.h; docs/gguf.md.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ortho_cli.convert.job import round_once
from ortho_cli.convert.plan import parse_dtype
from ortho_cli.convert.sources.base import Source, SourceTensor, config_of, mark
from ortho_cli.convert.sources.gguf import Placed, read_places
from ortho_cli.convert.sources.gguf_rope import FREQS
from ortho_cli.convert.sources.safetensors_files import RowReader
from ortho_cli.convert.targets import gguf_keys, gguf_layout
from ortho_cli.convert.targets.gguf_keys import ModelKeys
from ortho_cli.convert.targets.gguf_layout import GgufSpec
from ortho_cli.convert.targets.gguf_tokenizer import tokenizer_keys
from ortho_cli.convert.targets.job import Error, Figures, Part, Put, TargetPlan
from ortho_cli.errors import CheckpointError, InternalError, NumericalError
from ortho_cli.formats.artifact import Artifact, damaged
from ortho_cli.formats.open_artifact import open_artifact
from ortho_cli.split import quantize
from ortho_cli.split.dtypes import BY_CONFIG, torch_dtypes
from ortho_cli.split.quantize import as_bytes
from ortho_cli.split.sizes import DEFAULT_SIZES, Sizes
from ortho_cli.storage.checkpoint import ShardReader, TensorInfo
from ortho_cli.storage.job import Kind

Order = npt.NDArray[np.int64]  # (out,): rows of the checkpoint in the order of the file

BLOCK = 32  # weights of a block of Q4_0 and of Q8_0
SUFFIX = ".gguf"
KIND = Kind(name="GGUF file", is_ours=gguf_layout.is_ours, is_file=True)
# What llama.cpp shows of a file: gguf.LlamaFileType by the type of most split weights.
FILE_TYPES = {"Q4_0": 2, "Q8_0": 7, "BF16": 32, "F16": 1, "F32": 0}
QUANTIZATION_VERSION = 2  # GGML_QUANT_VERSION
# Buffers that old checkpoints hold, and that llama.cpp computes itself.
_COMPUTED = re.compile(r".*\.rotary_emb\.inv_freq")
_LAYER = re.compile(r"blk\.(\d+)\.")
HEAD = "lm_head.weight"


def plan_base(path: Path, *, dtype: str | None = None, sizes: Sizes = DEFAULT_SIZES) -> TargetPlan:
    """Decide how base becomes a GGUF file; no weight is read.

    Args:
        path: the artifact's folder, or a file in it. Its ortho is not read, and need not be there.
        dtype: bfloat16, float16 or float32, for matrices that are not split; None keeps each one's.
        sizes: of tiles.
    Returns:
        The plan; its source holds base open, and the caller closes it.
    Raises:
        UsageError: a package is missing, or another dtype.
        ArtifactError: base is damaged.
        CheckpointError: an architecture, config or tokenizer that llama.cpp has none like.
    """
    artifact = open_artifact(path if path.is_dir() else path.parent)
    folder = artifact.folder
    config, model, weights, places = open_model(artifact, parse_dtype(dtype))
    tokens, notes = tokenizer_keys(folder, vocabulary=model.vocabulary)
    keys: dict[str, gguf_layout.Value] = {
        "general.type": "model",
        "general.file_type": _file_type(weights),
        "general.quantization_version": QUANTIZATION_VERSION,
        **model.keys,
        **tokens,
    }
    layout = gguf_layout.plan_gguf(model.architecture, keys, [one.spec for one in weights])
    with ExitStack() as opened:
        reader = ShardReader([artifact.base])
        opened.callback(reader.close)
        base = _Base(reader, RowReader(reader), artifact, sizes)
        parts = tuple(_part(base, one, places.get(one.spec.key), model) for one in weights)
        close = opened.pop_all().close
    source = Source(
        kind="artifact",
        path=folder,
        tensors=(),
        files=(mark(artifact.base.path),),
        config=config,
        close=close,
    )
    return TargetPlan(
        form="gguf",
        kind=KIND,
        source=source,
        file=None,
        layout=layout,
        parts=parts,
        settings={"to": "gguf"},
        notes=(*notes, *_notes(weights)),
    )


def open_model(
    artifact: Artifact, dtype: str | None
) -> tuple[dict[str, object], ModelKeys, list[Weight], dict[str, Placed]]:
    """Find what llama.cpp calls the model of an artifact and its tensors.

    Args:
        artifact: whose base it is.
        dtype: of matrices that are not split; None keeps each one's.
    Returns:
        config.json; its keys; each weight of base, in the order of the file; where each tensor of
        the file is read to, by its name there.
    Raises:
        UsageError: a package is missing.
        CheckpointError: no config.json, or a model that llama.cpp has none like.
    """
    gguf_layout.check_packages("GGUF")
    folder, config = artifact.folder, config_of(artifact.folder)
    if config is None:
        raise CheckpointError(
            f"`{folder}` has no config.json, which says what model its weights are of",
            hint="decompose the model's folder, not its file alone",
        )
    config = {key: value for key, value in config.items() if key != "quantization_config"}
    model = gguf_keys.model_keys(config, told=folder)
    weights = _weights(artifact, model, dtype)
    return config, model, weights, _read_back(config, model, weights, folder)


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """A weight of base, and the tensor that it becomes."""

    name: str
    spec: GgufSpec
    module: str | None = None  # of a split weight
    group: int = 0  # columns that share a scale
    info: TensorInfo | None = None  # of a weight that is not split

    @property
    def has_codes(self) -> bool:
        """Whether base's codes are written as they are."""
        return self.module is not None and self.spec.kind == "Q4_0"


def _weights(artifact: Artifact, model: ModelKeys, dtype: str | None) -> list[Weight]:
    """Name every tensor as llama.cpp does, and choose its type."""
    import gguf

    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == model.architecture)
    table = gguf.get_tensor_name_map(arch, model.layers)

    def named(name: str) -> str:
        stem, dot, suffix = name.rpartition(".")
        found = table.get_name(stem)
        if found is None or suffix not in ("weight", "bias"):
            raise CheckpointError(
                f"tensor `{name}` of `{artifact.base.path}` has no place in a {model.architecture} "
                "of llama.cpp",
                hint=gguf_keys.another_way(artifact.folder),
            )
        return f"{found}{dot}{suffix}"

    tensors = {tensor.name: tensor for tensor in artifact.base.tensors}
    found = []
    for module in artifact.split:
        parts = [tensors.pop(f"{module}.weight_{part}") for part in ("packed", "scale", "shape")]
        shape, scale = artifact.shapes[module], parts[1]
        group, name = shape[1] // scale.shape[1], f"{module}.weight"
        kind = "Q4_0" if group % BLOCK == 0 else "Q8_0" if shape[1] % BLOCK == 0 else scale.dtype
        spec = GgufSpec(key=named(name), kind=kind, shape=shape)
        found.append(Weight(name=name, spec=spec, module=module, group=group))
    for name, info in tensors.items():
        if _COMPUTED.fullmatch(name) or (name == HEAD and model.is_tied):
            continue  # llama.cpp computes it, or takes the embedding
        kind = "F32" if len(info.shape) < 2 else BY_CONFIG[dtype] if dtype else info.dtype
        if info.dtype not in BY_CONFIG.values():
            raise damaged(artifact.base.path, f"`{name}` is {info.dtype}, which is not written")
        spec = GgufSpec(key=named(name), kind=kind, shape=info.shape)
        found.append(Weight(name=name, spec=spec, info=info))
    if model.divisors is not None:
        spec = GgufSpec(key=FREQS, kind="F32", shape=model.divisors.shape)
        found.append(Weight(name=FREQS, spec=spec))
    return sorted(found, key=lambda one: _rank(one.spec.key))


def _rank(key: str) -> tuple[int, int, str]:
    """Order tensors as a model runs: the embedding, layer by layer, then the rest."""
    layer = _LAYER.match(key)
    return (1, int(layer[1]), key) if layer else (0 if key.startswith("token") else 2, 0, key)


def _file_type(weights: list[Weight]) -> int:
    kinds = [one.spec.kind for one in weights if one.module is not None]
    return FILE_TYPES[max(FILE_TYPES, key=kinds.count)]


def _notes(weights: list[Weight]) -> Iterator[str]:
    split = [one for one in weights if one.module is not None]
    codes = [one for one in split if one.has_codes]
    if codes:
        groups = sorted({one.group for one in codes})
        yield (
            f"{len(codes)} of {len(split)} split weights keep their codes as Q4_0 (groups of "
            f"{', '.join(map(str, groups))})"
        )
    again = [one for one in split if one.spec.kind == "Q8_0"]
    if again:
        yield (
            f"{len(again)} split weights are quantized again, to Q8_0: a group of {again[0].group} "
            f"columns is no multiple of {BLOCK} (first `{again[0].name}`)"
        )
    plain = [one for one in split if one.spec.kind not in ("Q4_0", "Q8_0")]
    if plain:
        yield (
            f"{len(plain)} split weights are dequantized: rows of {plain[0].spec.shape[1]} are no "
            f"multiple of {BLOCK} (first `{plain[0].name}`)"
        )


def _read_back(
    config: Mapping[str, object],
    model: ModelKeys,
    weights: list[Weight],
    folder: Path,
) -> dict[str, Placed]:
    """Read the file, without its weights, as `ortho convert` reads GGUF; refuse another model.

    It is read without its tokenizer, too: parsing 49,152 tokens takes `gguf` 15 seconds.
    """
    layout = gguf_layout.plan_gguf(model.architecture, model.keys, [one.spec for one in weights])
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "read-back.gguf"
        with path.open("wb") as file:
            file.write(layout.header)
            os.truncate(file.fileno(), layout.size)  # a hole: no weight is written
            if model.divisors is not None:
                file.seek(layout.regions[FREQS].offset)
                file.write(model.divisors.tobytes())
        try:
            read, places = read_places(path)
        except CheckpointError as error:
            told = error.message.replace(str(path), f"GGUF of {folder}")
            raise CheckpointError(told, hint=gguf_keys.another_way(folder)) from None
    gguf_keys.check_read_back(config, read, told=folder)
    for one in weights:
        if one.spec.key != FREQS and places[one.spec.key].name != one.name:
            raise CheckpointError(
                f"tensor `{one.name}` of `{folder}` would be read as `{places[one.spec.key].name}`",
                hint=gguf_keys.another_way(folder),
            )
    return places


@dataclass(frozen=True, slots=True)
class _Base:
    """Base, open."""

    reader: ShardReader
    rows: RowReader
    artifact: Artifact
    sizes: Sizes

    def read(self, name: str) -> Tensor:
        """Read a tensor whole, into memory of its own."""
        info = next(one for one in self.artifact.base.tensors if one.name == name)
        found = torch.empty(info.shape, dtype=torch_dtypes()[info.dtype])
        if found.numel():
            self.reader.read_into(as_bytes(found), info, start=0)
        return found


def order_of(place: Placed | None) -> Order | None:
    """Say which row of the checkpoint each row of the file is; None: the same."""
    return None if place is None or place.rows is None else np.argsort(place.rows)


def _part(base: _Base, one: Weight, place: Placed | None, model: ModelKeys) -> Part:
    order = order_of(place)
    if one.module is not None:
        make = partial(_make_split, base, one, order)
    elif one.info is not None:
        make = partial(
            _make_plain, base, base.rows.tensor(one.info, path=base.artifact.base.path), one, order
        )
    else:
        make = partial(_make_divisors, one, model)
    facts = {"type": one.spec.kind, "shape": list(one.spec.shape), "codes": one.has_codes}
    return Part(name=one.name, keys=(one.spec.key,), make=make, facts=facts)


def _make_divisors(one: Weight, model: ModelKeys, put: Put) -> Figures:
    if model.divisors is None:
        raise InternalError(f"`{one.name}` is planned, and the model has no divisors")
    put(one.spec.key, torch.from_numpy(model.divisors))
    return Error().figures()


def _make_split(base: _Base, one: Weight, order: Order | None, put: Put) -> Figures:
    packed, scales = (base.read(f"{one.module}.weight_{part}") for part in ("packed", "scale"))
    bits, error = base.artifact.bits[str(one.module)], Error()
    for start, count in base.sizes.tiles("convert", one.spec.shape):
        rows = slice(start, start + count) if order is None else order[start : start + count]
        codes, mine = quantize.unpack_codes(packed[rows], bits=bits), scales[rows]
        if one.has_codes:
            put(one.spec.key, _q4_0(one, codes, mine, error, base.artifact.folder))
        else:
            put(one.spec.key, _again(one, codes, mine, error))
    return error.figures()


def _q4_0(one: Weight, codes: Tensor, scales: Tensor, error: Error, folder: Path) -> Tensor:
    """Pack codes and scales as blocks of Q4_0.

    Args:
        one: the weight.
        codes: (rows, in) int8 in [-8, 7].
        scales: (rows, in / group), > 0.
        error: adds up what float16 scales lose.
        folder: of the artifact, for errors.
    Returns:
        (rows, in / 32 * 18) uint8.
    """
    halves = scales.to(torch.float16)
    if not bool(halves.isfinite().all()):
        raise NumericalError(
            f"`{one.name}` has a scale of {scales.max().item():g}, and float16, which Q4_0 has, "
            "ends at 65504",
            hint=gguf_keys.another_way(folder),
        )
    error.add_scales(codes, scales, halves)
    blocks = codes.shape[1] // BLOCK
    nibbles = (codes.numpy() + 8).astype(np.uint8).reshape(len(codes), blocks, 2, BLOCK // 2)
    packed = np.empty((len(codes), blocks, 2 + BLOCK // 2), np.uint8)
    repeated = halves.numpy().repeat(one.group // BLOCK, axis=1)
    packed[:, :, :2] = repeated.astype("<f2").view(np.uint8).reshape(len(codes), blocks, 2)
    np.left_shift(nibbles[:, :, 1], 4, out=packed[:, :, 2:])
    packed[:, :, 2:] |= nibbles[:, :, 0]
    return torch.from_numpy(packed)


def _again(one: Weight, codes: Tensor, scales: Tensor, error: Error) -> Tensor:
    """Quantize what base stands for to Q8_0, or leave it as it is where rows are too short."""
    import gguf

    weight = quantize.dequantize(codes, scales)
    if one.spec.kind != "Q8_0":
        return weight.to(scales.dtype)
    kind = gguf.GGMLQuantizationType.Q8_0
    made = gguf.quants.quantize(weight.numpy(), kind)
    error.add(torch.from_numpy(gguf.quants.dequantize(made, kind)), weight)
    return torch.from_numpy(made)


def _make_plain(
    base: _Base, source: SourceTensor, one: Weight, order: Order | None, put: Put
) -> Figures:
    error = Error()
    if order is not None:  # no tile of rows of the file is one of the checkpoint
        whole = base.read(one.name)
        source = replace(source, read=lambda start, rows: whole[order[start : start + rows]])
    for start, count in base.sizes.tiles("convert", (source.rows, source.columns)):
        read = source.read(start, count)
        made = round_once(
            read, one.spec.kind, name=one.name, shape=source.shape, start=start * source.columns
        )
        if made.dtype != read.dtype:
            error.add(made, read)
        put(one.spec.key, made)
    return error.figures()
