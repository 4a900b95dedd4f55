"""Checkpoints of others as sources: safetensors, what torch.save wrote, block-wise fp8.

What torch.save wrote is read in `torch_files.py`; here the kind of a source is found, wrappers'
prefixes go, and fp8 weights become what they stand for.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ortho_cli.checkpoint import Checkpoint, ShardReader, model_name, open_checkpoint
from ortho_cli.errors import CheckpointError, UsageError, unreadable
from ortho_cli.source import RowReader, Source, SourceTensor, has_safetensors, mark
from ortho_cli.torch_files import find_files, is_torch_file, open_torch
from ortho_cli.wrappers import strip_wrappers

FP8 = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
SCALE_SUFFIX = "_scale_inv"
DEFAULT_BLOCK = (128, 128)


def open_foreign(path: Path, *, key: str | None = None) -> Source:
    """Describe a checkpoint that `ortho` did not write; weights are not read yet.

    Args:
        path: a file of safetensors or of torch.save, or a folder with whole or sharded weights.
        key: where a file of torch.save keeps its weights; None looks for them.
    Raises:
        UsageError: a key that is not there, or for a source that has none.
        CheckpointError: nothing there, nothing readable, something that would run code, or parts
            that do not belong together.
    """
    try:
        source = _open(path, key)
    except OSError as error:
        hint = "give a model file or folder that you may read"
        raise unreadable(path, error, kind=CheckpointError, hint=hint) from error
    try:
        return dequantize_fp8(strip_wrappers(source))
    except BaseException:
        source.close()
        raise


def _open(path: Path, key: str | None) -> Source:
    if path.is_file() and is_torch_file(path):
        return open_torch(path, [path], None, key=key)
    if path.is_dir() and not has_safetensors(path) and (found := find_files(path)):
        return open_torch(path, *found, key=key)
    if key is not None:
        raise UsageError(
            f"--key {key} is for files of torch.save, and `{path}` is none", hint="leave --key out"
        )
    return _open_safetensors(open_checkpoint(path))


def _open_safetensors(checkpoint: Checkpoint) -> Source:
    path, names = checkpoint.path, {tensor.name for tensor in checkpoint.tensors}
    told = {k: v for shard in checkpoint.shards for k, v in shard.metadata.items()}
    own = frozenset(shard.name for shard in checkpoint.shards) if path.is_dir() else None
    reader = ShardReader(checkpoint)
    rows = RowReader(reader)
    try:
        tensors = tuple(rows.tensor(info, path=path) for info in checkpoint.tensors)
    except BaseException:
        reader.close()
        raise
    return Source(
        name=model_name(path),
        kind="safetensors",
        path=path,
        tensors=tensors,
        files=tuple(mark(shard.path) for shard in checkpoint.shards),
        config=checkpoint.config,
        own=own,
        notes=checkpoint.notes,
        aliases={k: v for k, v in told.items() if v in names and k not in names},
        close=reader.close,
    )


def dequantize_fp8(source: Source) -> Source:
    """Replace each fp8 weight and its block scales by the weight they stand for.

    w = q * scale of its block, in float32; `<p>.weight_scale_inv` is (ceil(out / b), ceil(in / b)).
    The convention of DeepSeek-V3 (arXiv:2412.19437, section 3.3).

    Raises:
        CheckpointError: an fp8 weight without scales, or scales of another shape.
    """
    weights = {tensor.name: tensor for tensor in source.tensors if tensor.dtype in FP8}
    if not weights:
        return source
    settings = (source.config or {}).get("quantization_config")
    asked = settings.get("weight_block_size") if isinstance(settings, dict) else None
    block = tuple(asked) if isinstance(asked, list) else DEFAULT_BLOCK
    if len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
        raise CheckpointError(
            f"config.json of `{source.path}` says weight_block_size {asked}, not two sizes",
            hint="restore the config.json that came with the model",
        )
    others = {tensor.name: tensor for tensor in source.tensors}
    scales = {name: others.get(name + SCALE_SUFFIX) for name in weights}
    used = {tensor.name for tensor in scales.values() if tensor is not None}
    tensors = tuple(
        _scaled(tensor, scales[tensor.name], block, source.path)
        if tensor.name in weights
        else tensor
        for tensor in source.tensors
        if tensor.name not in used
    )
    config = source.config
    if config is not None:
        config = {key: value for key, value in config.items() if key != "quantization_config"}
    note = f"{len(weights)} fp8 weights are dequantized by their {block[0]} x {block[1]} blocks"
    return replace(source, tensors=tensors, config=config, notes=(*source.notes, note))


def _scaled(
    weight: SourceTensor, scale: SourceTensor | None, block: tuple[int, ...], path: Path
) -> SourceTensor:
    if scale is None:
        raise CheckpointError(
            f"tensor `{weight.name}` of `{path}` is {weight.dtype} and has no "
            f"`{weight.name}{SCALE_SUFFIX}`",
            hint="only fp8 weights with block scales can be converted; restore the scales",
        )
    wanted = tuple(math.ceil(n / b) for n, b in zip(weight.shape, block, strict=False))
    if len(weight.shape) != 2 or scale.shape != wanted:
        raise CheckpointError(
            f"tensor `{scale.name}` of `{path}` is {list(scale.shape)} where "
            f"`{weight.name}` {list(weight.shape)} in blocks of {list(block)} takes {list(wanted)}",
            hint="restore config.json's weight_block_size, or the scales",
        )

    if scale.flat:
        raise CheckpointError(
            f"tensor `{scale.name}` of `{path}` has rows of {scale.shape[1]} scales",
            hint="fp8 weights as wide as that cannot be converted",
        )

    def read(start: int, rows: int) -> Tensor:
        first, last = start // block[0], math.ceil((start + rows) / block[0])
        blocks = scale.read(first, last - first).to(torch.float32, copy=True)
        mine = torch.arange(start, start + rows).div_(block[0], rounding_mode="floor") - first
        wide = blocks.repeat_interleave(block[1], dim=1)[:, : weight.columns]
        return weight.read(start, rows).float().mul_(wide[mine])

    return SourceTensor(name=weight.name, dtype="BF16", shape=weight.shape, read=read)
