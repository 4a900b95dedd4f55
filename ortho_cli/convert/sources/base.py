"""The contract between `ortho convert` and the formats that it reads.

A format of others is one file of this room. It describes a checkpoint as a `Source`: named tensors,
each with a function that reads rows of it. Its `FORMAT` says how its files are recognised;
`open_source.FORMATS` lists them. README.md has the steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from ortho_cli.errors import CheckpointError
from ortho_cli.storage import strict_json

Read = Callable[[int, int], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceTensor:
    """A tensor of a source as a matrix: a row is the last dimension, or one element if `flat`.

    `read(start, rows)` returns (rows, columns) in `dtype`, or float32 values that the job rounds
    once to `dtype`. The result is valid until the next read of the source. Rows are read in order,
    from the first row of a tensor to its last; a resumed job leaves whole tensors out.
    """

    name: str
    dtype: str  # as safetensors names it
    shape: tuple[int, ...]
    read: Read
    flat: bool = False  # a row is one element: for tensors whose last dimension is too wide

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
    """Size and time of a file when the source was opened."""

    path: Path
    size: int
    mtime_ns: int


def mark(path: Path) -> FileMark:
    """Record size and time of a file, so that a later change is noticed."""
    status = path.stat()
    return FileMark(path=path, size=status.st_size, mtime_ns=status.st_mtime_ns)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A checkpoint of any format, described: what a format returns when it opens files."""

    kind: str  # of the format: one word, recorded in the plan
    path: Path  # the file or folder that the user named
    tensors: tuple[SourceTensor, ...]  # in the order in which they are best read
    files: tuple[FileMark, ...]  # every file that weights are read from
    config: dict[str, object] | None = None  # config.json to write; None: none is known
    own: frozenset[str] | None = None  # files of a folder that are read; None for a file alone
    made_files: tuple[tuple[str, bytes], ...] = ()  # names and bytes of other files to write
    notes: tuple[str, ...] = ()  # sentences for the user
    aliases: Mapping[str, str] = field(default_factory=dict)  # a dropped copy -> the tensor kept
    settings: Mapping[str, object] = field(default_factory=dict)  # options that values depend on
    own_dtype: str | None = None  # the only dtype that weights may be written in, if not any
    private: bool = False  # the result should be readable by its owner only
    close: Callable[[], None] = lambda: None

    @property
    def folder(self) -> Path:
        """The folder that the source is, or that its file is in."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def identity(self) -> list[list[object]]:
        """Name, size and time of each file: a resumed run must find the same."""
        return [[file.path.name, file.size, file.mtime_ns] for file in self.files]

    def check_unchanged(self) -> None:
        """Raise if a file was replaced, cut or written to since the source was opened."""
        for file in self.files:
            try:
                now = mark(file.path)
            except FileNotFoundError:
                raise CheckpointError(
                    f"`{file.path}` vanished while it was read", hint="put it back and start again"
                ) from None
            if now != file:
                raise CheckpointError(
                    f"`{file.path}` changed while it was read ({file.size} bytes before, "
                    f"{now.size} now)",
                    hint="let whatever writes it finish, then start again",
                )


def config_of(folder: Path) -> dict[str, object] | None:
    """Read the config.json of a folder, where it has one."""
    path = folder / "config.json"
    return strict_json.read(path, constants=True) if path.exists() else None


Opener = Callable[[], Source]


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A format of others: what its file adds to `open_source.FORMATS`.

    `recognize(path, key)` returns a function that opens the checkpoint at a path, or None where the
    path is of another format. It may look at names and first bytes, and reads no weights. `key` is
    the option `--key`, and is None for all formats but those with `takes_key`.
    """

    label: str  # with its article, as messages name it
    recognize: Callable[[Path, str | None], Opener | None]
    takes_key: bool = False
    is_final: bool = False  # names and values are the model's: no wrappers, nothing quantized
