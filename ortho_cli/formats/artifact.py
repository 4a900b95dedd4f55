"""An artifact's parts: names, dtypes, shapes and headers of base and ortho, and finding both.

README.md is the specification of the formats `ortho/1` to `ortho/3`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ortho_cli.errors import ArtifactError
from ortho_cli.storage import checkpoint
from ortho_cli.storage.checkpoint import Shard, TensorInfo
from ortho_cli.storage.data_file import TensorSpec
from ortho_cli.storage.sealing import SEALED_FILE, Opened
from ortho_cli.storage.untrusted import open_regular

FORMAT = "ortho/3"  # what is written
FORMATS = ("ortho/1", "ortho/2", FORMAT)  # what is read
OLD_LAYOUTS = {"ortho/1": "csr", "ortho/2": "compact"}
BASE_FILE = "model.safetensors"
OLD_BASE_FILE = "base.safetensors"  # of ortho/1 and ortho/2
ORTHO_FILE = "ortho.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
REPORT_FILE = "report.json"

WIDTHS = (3, 4)  # bits of a code
COUNT_DTYPES = ("U8", "U16", "I32")  # of row_counts, smallest first
TypeAndShape = tuple[str, tuple[int, ...]]
Shape = tuple[int, int]  # (out, in)
Specs = tuple[TensorSpec, ...]


def canonical_json(value: object) -> str:
    """Spell a value in the one way that digests are taken over: sorted keys, no spaces."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def pretty_json(value: object) -> bytes:
    """Spell a JSON file that people read."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def spelled(name: str) -> str:
    """Spell a file's name for JSON, which holds text where a name can be any bytes."""
    return os.fsencode(name).decode(errors="backslashreplace")


def module_of(name: str) -> str:
    """Name the module whose `weight` this tensor is."""
    return name.removesuffix(".weight")


def make_specs(name: str, parts: Mapping[str, TypeAndShape]) -> Specs:
    """List tensors of the module that a weight belongs to, from dtype and shape of each part."""
    return tuple(
        TensorSpec(key=f"{module_of(name)}.{part}", dtype=dtype, shape=shape)
        for part, (dtype, shape) in parts.items()
    )


def base_specs(name: str, *, dtype: str, shape: Shape, group_size: int, bits: int = 4) -> Specs:
    """List the tensors of base for a split weight: packed codes, scales, shape."""
    rows, columns = shape
    parts: dict[str, TypeAndShape] = {
        "weight_packed": ("I32", (rows, columns * bits // 32)),
        "weight_scale": (dtype, (rows, columns // group_size)),
        "weight_shape": ("I64", (2,)),
    }
    return make_specs(name, parts)


def ortho_specs(name: str, *, dtype: str, shape: Shape, nnz: int) -> Specs:
    """List the tensors of ortho for a split weight in layout csr: row pointers, columns, values."""
    rows, columns = shape
    parts: dict[str, TypeAndShape] = {
        "crow_indices": ("I32" if nnz < 2**31 else "I64", (rows + 1,)),
        "col_indices": ("U16" if columns <= 2**16 else "I32", (nnz,)),
        "values": (dtype, (nnz,)),
    }
    return make_specs(name, parts)


def column_specs(
    name: str, *, dtype: str, shape: Shape, columns: int, values: str | None = None
) -> Specs:
    """List the tensors of ortho for a split weight of which whole columns are kept.

    Args:
        name: the tensor's name.
        dtype: of the source.
        shape: (out, in).
        columns: how many are kept.
        values: dtype of values, if it is not the source's; I8 brings a scale per column with it.
    """
    rows, width = shape
    parts: dict[str, TypeAndShape] = {
        "col_indices": ("U16" if width <= 2**16 else "I32", (columns,)),
        "values": (values or dtype, (rows, columns)),
        **({"value_scales": (dtype, (columns,))} if values == "I8" else {}),
    }
    return make_specs(name, parts)


def compact_specs(
    name: str, *, dtype: str, shape: Shape, columns: int, counts: str, gaps: int, others: int
) -> Specs:
    """List the tensors of ortho for a split weight in layout compact.

    Args:
        name: the tensor's name.
        dtype: of values; I8 brings a step with it.
        shape: (out, in).
        columns: columns that have an entry in every row.
        counts: dtype of row_counts.
        gaps: bytes of col_gaps.
        others: entries outside of those columns.
    """
    rows, width = shape
    parts: dict[str, TypeAndShape] = {
        "columns": ("U16" if width <= 2**16 else "I32", (columns,)),
        "column_values": (dtype, (rows, columns)),
        "row_counts": (counts, (rows,)),
        "col_gaps": ("U8", (gaps,)),
        "values": (dtype, (others,)),
        **({"value_step": ("F32", (1,))} if dtype == "I8" else {}),
    }
    return make_specs(name, parts)


def count_dtype(largest: int) -> str:
    """Name the smallest dtype of row_counts that holds the largest count."""
    return COUNT_DTYPES[(largest >= 2**8) + (largest >= 2**16)]


def compact_at_most(name: str, *, dtype: str, shape: Shape, nnz: int) -> int:
    """Bound the bytes of a split tensor in the compact layout, its share of the header included.

    Gaps of a row add up to less than its columns, so all its bytes of 255 are at most
    (in - 1) / 255 of them.
    """
    rows, width = shape
    specs = compact_specs(
        name,
        dtype=dtype,
        shape=shape,
        columns=nnz // rows,
        counts=count_dtype(min(nnz, width)),
        gaps=nnz + min(nnz, rows) * ((width - 1) // 255),
        others=nnz,
    )
    data = sum(spec.nbytes for spec in specs if not spec.key.endswith(".column_values"))
    # A line of the header: names, a dtype, a shape and two offsets below 10^18.
    return data + sum(len(json.dumps(spec.key)) + 120 for spec in specs)


def base_metadata(*, plan_sha256: str, recipe: str, version: str) -> dict[str, str]:
    """Metadata of base."""
    return {
        "format": "pt",
        "ortho_format": FORMAT,
        "role": "base",
        "ortho_version": version,
        "plan_sha256": plan_sha256,
        "recipe": recipe,
    }


def ortho_metadata(*, source_digest: str, base_blake3: str, **common: str) -> dict[str, str]:
    """Metadata of ortho.safetensors; a digest's length is known before the digest.

    Args:
        source_digest: of what was split.
        base_blake3: of the base beside it.
        common: what `base_metadata` takes.
    """
    metadata = base_metadata(**common) | {"format": FORMAT, "role": "ortho"}
    del metadata["ortho_format"]
    return metadata | {"source_digest": source_digest, "base_blake3": base_blake3}


Parts = dict[str, TensorInfo]


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """An artifact's headers; of tensor data only the shapes of split weights."""

    folder: Path
    base: Shard
    ortho: Shard | None
    report: dict[str, object] | None  # as it was parsed; `report.read_report` validates it
    sealed: Path | None  # the file that holds ortho, where that is sealed
    opened: Opened | None  # its content in memory, which lives as long as this reference
    shapes: Mapping[str, Shape]  # (out, in) of each split module, from weight_shape
    bits: Mapping[str, int]  # of a code of each of them

    @property
    def files(self) -> tuple[Shard, ...]:
        """Base, and ortho where it is there and open."""
        return (self.base, self.ortho) if self.ortho else (self.base,)

    @property
    def form(self) -> str:
        """The format that base names in its header."""
        return self.base.metadata.get("ortho_format", "")

    @property
    def digest(self) -> str:
        """Name the digest algorithm of whole files."""
        return "sha256" if self.form in OLD_LAYOUTS else "blake3"

    @property
    def kept(self) -> dict[str, Parts]:
        """The tensors of ortho by module and part; empty without ortho."""
        found: dict[str, Parts] = {}
        for tensor in self.ortho.tensors if self.ortho else ():
            module, _, part = tensor.name.rpartition(".")
            found.setdefault(module, {})[part] = tensor
        return found

    @property
    def layout(self) -> str:
        """The ortho.layout, or columns, by the format or by the names of ortho's tensors."""
        names = {part for parts in self.kept.values() for part in parts}
        found = "compact" if "row_counts" in names else "csr"
        if "col_indices" in names and "crow_indices" not in names:
            found = "columns"
        return OLD_LAYOUTS.get(self.form, found)

    @property
    def split(self) -> tuple[str, ...]:
        """Modules that were split, by name."""
        return tuple(self.shapes)


def is_ours(metadata: dict[str, str]) -> bool:
    """Tell by a file's metadata whether it is base or ortho, in any format known."""
    return any(metadata.get(key) in FORMATS for key in ("format", "ortho_format"))


# Keys of our metadata that no other writer uses: a damaged header may still have one of them.
_MARKS = frozenset({"ortho_format", "role", "recipe"})


def find_base(folder: Path) -> tuple[Path, dict[str, str] | None] | None:
    """Find base in a folder, by its header, and its metadata; None where there is none.

    A file that cannot be read, and so has no metadata, counts if a report or an ortho stream of
    ours is beside it.
    """
    new, old = folder / BASE_FILE, folder / OLD_BASE_FILE
    path = new if new.is_file() else old
    if not path.is_file():
        return None
    metadata = checkpoint.metadata_of(path)
    if metadata is None:
        known = path == old or (folder / SEALED_FILE).is_file() or _is_ortho(folder / ORTHO_FILE)
        return (path, None) if known or _is_report(folder / REPORT_FILE) else None
    if not is_ours(metadata) and _MARKS.isdisjoint(metadata):
        return None
    if path == new and metadata.get("ortho_format") in OLD_LAYOUTS and old.is_file():
        # An older base that was also given the name that other readers look for.
        return old, checkpoint.metadata_of(old)
    return path, metadata


def _is_ortho(path: Path) -> bool:
    return path.is_file() and is_ours(checkpoint.metadata_of(path) or {})


def _is_report(path: Path) -> bool:
    """Tell a report.json of ours: other tools use that name, too."""
    if not path.is_file():
        return False
    with open_regular(path) as file:
        return re.match(rb'\s*\{\s*"format"\s*:\s*"ortho/', file.read(64)) is not None


def is_artifact(path: Path, *, damaged: bool = False) -> bool:
    """Tell whether a folder, or a file in it, was written by `ortho decompose`.

    Args:
        path: anything.
        damaged: count a base or ortho with a damaged header, if a file beside it shows that the
            folder is an artifact.
    """
    folder = path if path.is_dir() else path.parent
    if path.is_dir() or path.name == SEALED_FILE:  # a sealed file has no header to read
        base = find_base(folder)
        if base is None:
            return _is_lone_ortho(folder, damaged=damaged)
        return damaged or is_ours(base[1] or {})
    metadata = checkpoint.metadata_of(path) if path.is_file() else {}
    if metadata is not None and is_ours(metadata):
        return True
    named = metadata is None and path.name in (OLD_BASE_FILE, ORTHO_FILE)
    return damaged and (named or path in (find_base(folder) or ()))


def _is_lone_ortho(folder: Path, *, damaged: bool) -> bool:
    """Tell an artifact that lost its base: ortho is there, and no other weights are."""
    files = (path for path in folder.glob("*.safetensors") if path.is_file())
    weights = {path.name for path in files} - {ORTHO_FILE}
    there = any((folder / name).is_file() for name in (ORTHO_FILE, SEALED_FILE))
    if weights or not there:
        return False
    return damaged or (_is_ortho(folder / ORTHO_FILE) and _is_report(folder / REPORT_FILE))


def damaged(path: Path, what: str) -> ArtifactError:
    """Say what is wrong with a file of an artifact."""
    return ArtifactError(f"`{path}`: {what}", hint="decompose the source again")


@contextlib.contextmanager
def damage_in(path: Path) -> Iterator[None]:
    """Add the file to the errors of checks that know only names of tensors."""
    try:
        yield
    except ArtifactError as error:
        raise damaged(path, error.message) from None


def source_digest(tensors: Iterable[tuple[str, str, tuple[int, ...], str]]) -> str:
    """BLAKE3 over (name, dtype, shape, BLAKE3 of the bytes) of every source tensor, by name."""
    from blake3 import blake3

    listed = sorted([name, dtype, list(shape), digest] for name, dtype, shape, digest in tensors)
    return blake3(canonical_json(listed).encode()).hexdigest()
