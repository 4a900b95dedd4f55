"""Checkpoints of others as sources: safetensors, what torch.save wrote, quantized or not.

What torch.save wrote is read in `torch_files.py`; here the kind of a source is found, wrappers'
prefixes go, and quantized weights become what they stand for.
"""

from __future__ import annotations

from pathlib import Path

from ortho_cli.convert.sources.adapters import refuse_adapter_names
from ortho_cli.convert.sources.base import RowReader, Source, has_safetensors, mark
from ortho_cli.convert.sources.dequantize import dequantize
from ortho_cli.convert.sources.torch_files import find_files, is_torch_file, open_torch
from ortho_cli.convert.sources.wrappers import strip_wrappers
from ortho_cli.errors import CheckpointError, UsageError, unreadable
from ortho_cli.storage.checkpoint import Checkpoint, ShardReader, model_name, open_checkpoint


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
        names = [tensor.name for tensor in source.tensors]
        refuse_adapter_names(path, names, source.config, strips=True)
        return dequantize(strip_wrappers(source))
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
    reader = ShardReader(checkpoint.shards)
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
