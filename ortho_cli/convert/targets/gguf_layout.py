"""The bytes of a GGUF file before its tensors: keys, and the place of each tensor.

The `gguf` package spells keys and tensor infos, and this module computes the offsets that they
imply, so that any tensor can be written at its place, and a killed run resumes.

    magic version counts | keys | name, shape, type and offset of each tensor | padding | tensors

Source: docs/gguf.md of ggml.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ortho_cli.errors import InternalError, UsageError
from ortho_cli.storage import sniff
from ortho_cli.storage.data_file import Layout, Region
from ortho_cli.storage.sealing import SEALED
from ortho_cli.storage.untrusted import open_regular
from ortho_cli.version import __version__

if TYPE_CHECKING:  # an optional package, imported where it is used
    import gguf

# Numbers are written as uint32 or float32, the types that llama.cpp reads its own keys as.
Value = bool | int | float | str | Sequence[int] | Sequence[float] | Sequence[str]
Keys = Mapping[str, Value]

ALIGNMENT = 32  # bytes; GGUF's default, to which each tensor begins
SEALED_SUFFIX = ".gguf" + SEALED  # of a sealed file's name
MARK = "ortho.made"  # the key by which --force knows a file of ours
HEAD = 1024  # bytes; the mark is the second key, so it is among the first


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufSpec:
    """A tensor that will be written."""

    key: str
    kind: str  # as gguf.GGMLQuantizationType names it
    shape: tuple[int, ...]  # rows before columns, as everywhere here; the file has them reversed

    @property
    def nbytes(self) -> int:
        """Bytes it takes: whole blocks in each row."""
        import gguf

        size, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.kind]]
        if self.shape[-1] % size:
            raise InternalError(f"`{self.key}` has rows of {self.shape[-1]}, no multiple of {size}")
        return math.prod(self.shape) // size * nbytes


def check_packages(what: str) -> None:
    """Refuse to write GGUF where a package for it is missing.

    Raises:
        UsageError: names the package.
    """
    try:
        import gguf  # noqa: F401 - both are imported to name the one that is missing
        import transformers  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"{what} needs the package `{error.name}`, which is not installed",
            hint="pip install gguf transformers",
        ) from None


def plan_gguf(architecture: str, keys: Keys, specs: Sequence[GgufSpec]) -> Layout:
    """Lay a GGUF file out before its data exist; the same arguments give the same bytes.

    Args:
        architecture: llama.cpp's name of it.
        keys: what `general.architecture` is not.
        specs: its tensors, in the order in which they are written.
    """
    import gguf

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "header.gguf"
        writer = gguf.GGUFWriter(path, architecture)
        writer.add_string(MARK, f"ortho {__version__}")
        for key, value in keys.items():
            _add(writer, key, value)
        for spec in specs:
            kind = gguf.GGMLQuantizationType[spec.kind]
            # The dtype says nothing: a type that is given goes before it.
            writer.add_tensor_info(spec.key, spec.shape, np.dtype("f4"), spec.nbytes, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        header = path.read_bytes()
    header += bytes(-len(header) % ALIGNMENT)
    regions: dict[str, Region] = {}
    offset = len(header)
    for spec in specs:
        regions[spec.key] = Region(
            dtype=spec.kind, shape=spec.shape, offset=offset, nbytes=spec.nbytes
        )
        offset += spec.nbytes + -spec.nbytes % ALIGNMENT
    return Layout(header=header, regions=regions, size=offset)


def _add(writer: gguf.GGUFWriter, key: str, value: Value) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def is_ours(path: Path) -> bool:
    """Tell whether `ortho convert` wrote a GGUF file.

    A sealed one says nothing without its key: it is an age file whose name ends in `.gguf.age`.
    """
    if not path.is_file():
        return False
    with open_regular(path) as file:
        head = file.read(HEAD)
    if path.name.endswith(SEALED_SUFFIX):
        return sniff.kind_of(head) == sniff.SEALED
    return head.startswith(b"GGUF") and MARK.encode() in head
