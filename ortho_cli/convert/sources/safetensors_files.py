"""Safetensors as a source: a file, or a folder with one file or a sharded index.

Header and index are read and checked by `storage/checkpoint.py`; here rows are read into one buffer
that is used again.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path

from torch import Tensor

from ortho_cli.convert.sources.base import Format, Opener, Source, SourceTensor, mark
from ortho_cli.errors import CheckpointError
from ortho_cli.split.dtypes import DTYPES, torch_dtypes
from ortho_cli.split.quantize import Scratch, as_bytes
from ortho_cli.storage import folders
from ortho_cli.storage.checkpoint import ShardReader, TensorInfo, open_checkpoint

WIDEST = 1 << 22  # elements of a row that is read whole; a wider row is read in pieces


class RowReader:
    """Reads rows of safetensors into a buffer that it reuses."""

    def __init__(self, reader: ShardReader) -> None:
        self._reader = reader
        self._scratch = Scratch()

    def rows(self, tensor: TensorInfo, start: int, rows: int, columns: int) -> Tensor:
        """Read `rows` rows of `columns` elements; valid until the next call."""
        self._scratch.reset()
        dtype = torch_dtypes()[tensor.dtype]
        found = self._scratch((rows, columns), dtype)
        if found.numel():
            offset = start * columns * dtype.itemsize
            self._reader.read_into(as_bytes(found), tensor, start=offset)
        return found

    def whole(self, tensor: TensorInfo) -> Tensor:
        """Read a small tensor whole, into memory of its own."""
        return self.rows(tensor, 0, 1, tensor.numel).clone().view(tensor.shape)

    def tensor(self, info: TensorInfo, *, path: Path) -> SourceTensor:
        """Describe a tensor whose dtype torch has."""
        if info.dtype not in torch_dtypes():
            raise CheckpointError(
                f"tensor `{info.name}` of `{path}` is {info.dtype} ({DTYPES[info.dtype].bits} bits "
                f"per element), which torch cannot hold",
                hint=f"what can be converted: {', '.join(torch_dtypes())}",
            )
        columns = info.shape[-1] if len(info.shape) > 1 else 1
        # Readers of fp8 need whole rows: their scales belong to blocks of a row.
        flat = columns > WIDEST and not info.dtype.startswith("F8")
        return SourceTensor(
            name=info.name,
            dtype=info.dtype,
            shape=info.shape,
            read=lambda start, rows: self.rows(info, start, rows, 1 if flat else columns),
            flat=flat,
        )


def has_safetensors(folder: Path) -> bool:
    """Tell whether transformers would read the safetensors of a folder."""
    ends = (folders.SUFFIX, folders.INDEX_SUFFIX)
    return not folders.is_bin_first(folder) and any(f.name.endswith(ends) for f in folder.iterdir())


def _open(given: Path) -> Source:
    checkpoint = open_checkpoint(given)
    path, names = checkpoint.path, {tensor.name for tensor in checkpoint.tensors}
    metadata = {k: v for shard in checkpoint.shards for k, v in shard.metadata.items()}
    with ExitStack() as opened:
        reader = ShardReader(checkpoint.shards)
        opened.callback(reader.close)
        rows = RowReader(reader)
        tensors = tuple(rows.tensor(info, path=path) for info in checkpoint.tensors)
        opened.pop_all()
    return Source(
        kind="safetensors",
        path=path,
        tensors=tensors,
        files=tuple(mark(shard.path) for shard in checkpoint.shards),
        config=checkpoint.config,
        own=frozenset(shard.name for shard in checkpoint.shards) if path.is_dir() else None,
        notes=checkpoint.notes,
        # safetensors.torch.save_model names a dropped copy in the metadata, with the one kept.
        aliases={k: v for k, v in metadata.items() if v in names and k not in names},
        close=reader.close,
    )


def _recognize(path: Path, key: str | None) -> Opener | None:
    """Take whatever no other format has taken: the error then says what is missing."""
    return partial(_open, path)


FORMAT = Format(label="safetensors", recognize=_recognize)
