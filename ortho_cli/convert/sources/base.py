"""What `ortho convert` reads: named tensors, row by row, whatever file they lie in."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ortho_cli.errors import CheckpointError
from ortho_cli.split import quantize
from ortho_cli.split.dtypes import DTYPES, torch_dtypes
from ortho_cli.split.quantize import as_bytes
from ortho_cli.storage import folders
from ortho_cli.storage.checkpoint import ShardReader, TensorInfo

WIDEST = 1 << 22  # elements of a row that is held

Read = Callable[[int, int], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceTensor:
    """A tensor of a source as a matrix: a row is the last dimension, or one element if `flat`.

    `read(start, rows)` gives (rows, columns) in `dtype`, or in float32 what is to be rounded once
    to `dtype`; the result is valid until the next read of the source.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Read
    flat: bool = False

    @property
    def columns(self) -> int:
        """Elements of a row."""
        return self.shape[-1] if len(self.shape) > 1 and not self.flat else 1

    @property
    def rows(self) -> int:
        """Rows of the matrix."""
        return self.numel if self.columns == 1 else math.prod(self.shape[:-1])

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileMark:
    """A file as it was when the source was opened."""

    path: Path
    size: int
    mtime_ns: int


def mark(path: Path) -> FileMark:
    """Remember a file, to know it again."""
    status = path.stat()
    return FileMark(path=path, size=status.st_size, mtime_ns=status.st_mtime_ns)


def _nothing() -> None:
    return


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A checkpoint of any kind, described; tensors in the order in which they are best read."""

    name: str
    kind: str
    path: Path
    tensors: tuple[SourceTensor, ...]
    files: tuple[FileMark, ...]
    config: dict[str, Any] | None = None
    own: frozenset[str] | None = None  # files of a folder that are read; None for a file alone
    made_files: tuple[tuple[str, bytes], ...] = ()  # what a folder would hold and a file tells
    notes: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)  # a dropped copy -> the one kept
    settings: Mapping[str, Any] = field(default_factory=dict)  # what the values depend on, too
    own_dtype: str | None = None  # the only one that weights may be written in, if not any
    private: bool = False  # the result should be readable by its owner only
    close: Callable[[], None] = _nothing

    @property
    def folder(self) -> Path:
        """The folder that the source is, or lies in."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def identity(self) -> list[list[Any]]:
        """What tells this source from another, or from what it was before."""
        return [[file.path.name, file.size, file.mtime_ns] for file in self.files]

    def check_unchanged(self) -> None:
        """Raise if a file was replaced, cut or written to since the source was opened."""
        for file in self.files:
            try:
                now = mark(file.path)
            except FileNotFoundError:
                raise CheckpointError(
                    f"`{file.path}` vanished while it was read",
                    hint="put it back and start again",
                ) from None
            if now != file:
                raise CheckpointError(
                    f"`{file.path}` changed while it was read ({file.size} bytes before, "
                    f"{now.size} now)",
                    hint="let whatever writes it finish, then start again",
                )


class RowReader:
    """Reads rows of safetensors into a buffer that it reuses."""

    def __init__(self, reader: ShardReader) -> None:
        self._reader = reader
        self._scratch = quantize.Scratch()

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
        """Describe a tensor that is carried over."""
        if info.dtype not in torch_dtypes():
            raise CheckpointError(
                f"tensor `{info.name}` of `{path}` is {info.dtype} ({DTYPES[info.dtype].bits} bits "
                f"an element), which torch cannot hold",
                hint=f"what can be converted: {', '.join(torch_dtypes())}",
            )
        columns = info.shape[-1] if len(info.shape) > 1 else 1
        # A row is held whole; blocks of fp8 scales need one.
        flat = columns > WIDEST and not info.dtype.startswith("F8")
        return SourceTensor(
            name=info.name,
            dtype=info.dtype,
            shape=info.shape,
            read=lambda start, rows: self.rows(info, start, rows, 1 if flat else columns),
            flat=flat,
        )


def has_safetensors(folder: Path) -> bool:
    """Tell whether a folder's safetensors are what transformers would read of it."""
    if folders.is_bin_first(folder):
        return False
    return any(p.name.endswith((folders.SUFFIX, folders.INDEX_SUFFIX)) for p in folder.iterdir())
