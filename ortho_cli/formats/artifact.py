r"""The artifact: two safetensors files that are one model; the formats `ortho/1` to `ortho/3`.

    OUT/
      model.safetensors             base: INT4 codes and scales of split tensors, others unchanged
      ortho.safetensors             sparse source weights of split tensors; delete it and
                                    alpha is 0 for good
      model.safetensors.index.json  every key of base -> model.safetensors, nothing of ortho
      config.json, tokenizer*, ...  the source's files; config.json gains `quantization_config`
      report.json                   what was done, tensor by tensor, with digests

Where ortho is sealed, ortho.safetensors.age (and ortho.key.age) stand in its place; see `seal`.

W(alpha) = dequantize(base) + alpha * ortho.

**Base** is compressed-tensors `pack-quantized`. A split `<p>.weight` of shape (out, in) becomes

    <p>.weight_packed  int32  (out, in bits / 32)     4 bits: column 8w+i of a row in bits 4i..4i+3
                                                      of word w, as q + 8, q in [-8, 7]
                                                      3 bits: column i in bits 3i..3i+2 of the
                                                      row's words end to end, as q + 4, q in
                                                      [-4, 3]; in divides by 32
    <p>.weight_scale   dtype  (out, in / group_size)  in the source tensor's dtype
    <p>.weight_shape   int64  (2,)                    out, in

A code has 4 bits unless the recipe says 3; which, a reader knows from words a row and in. It
dequantizes to q * scale, rounded once to that dtype. q is the nearest code to the source's weight,
or with base.rounding gptq or tuned to what makes up for others' errors, except where forgetting
moved it (ortho.split isolate, unlearn); ortho holds every such position. With ortho.split
reference, codes, scales and every other tensor are those of the reference. Otherwise every other
tensor keeps its name, dtype, shape and bytes.

**Ortho** holds, for each split `<p>.weight`, a sparse matrix of the positions that forgetting
moved, and of the most salient ones beside them; with ortho.layout csr as CSR:

    <p>.crow_indices  int32 (out + 1,)  int64 where nnz does not fit
    <p>.col_indices   uint16 (nnz,)     int32 where in - 1 does not fit; ascending in each row
    <p>.values        dtype (nnz,)      the source weights themselves, bit for bit; see below

The stream that runs is ortho = values - dequantize(base) at those positions, formed in float32 when
loaded, so that alpha = 1 is exact there whatever base became. nnz is round(density * out * in), so
every offset of both files follows from the source's headers (with layout compact, of base alone).
With ortho.split unlearn, a moved position that saliency would not have kept holds scale * q of the
source's own nearest code q: alpha = 1 is there the source's own INT4.

With ortho.layout compact ortho holds the same matrix without most of its indices:

    <p>.columns        uint16 (c,)      columns kept in every row, ascending; int32 where in - 1
                                        does not fit; none where out is 1
    <p>.column_values  (out, c)         their values
    <p>.row_counts     uint8 (out,)     other entries of each row; uint16 or int32 where the
                                        largest count does not fit
    <p>.col_gaps       uint8 (n,)       for each of those, row by row, the distance from the entry
                                        before it in its row, less 1 (from the row's start for the
                                        first): floor(d / 255) bytes of 255, then d mod 255.
                                        Whole columns count like any other on the way
    <p>.values         (nnz - out c,)   their values
    <p>.value_step     float32 (1,)     > 0; with int8 values only

Both hold values in one dtype: the source's (ortho.values source), and then they are what CSR's
are, bit for bit, or int8 (ortho.values int8) v in [-127, 127], which stand for

    dequantize(base) + v |v| * (step * scale), in float32, rounded once to the source's dtype

with base's scale of each weight's group; v is the nearest to the source's weight in the root, and
step the largest |w - dequantize(base)| / scale of the tensor's kept weights over 127^2 (1 if that
is 0). So alpha = 1 is there the source to (|v| + 1/4) * step * scale. (A step for each row would
cost 16 bits a row, as much as a kept weight; the group's scale is there already.) The matrix has
one encoding, and readers refuse another.

**Files**: safetensors; tensors by element size (widest first), then name. `__metadata__` in order:

    base   format "pt", ortho_format "ortho/3", role "base", ortho_version, plan_sha256,
           recipe (canonical JSON)
    ortho  format "ortho/3", role "ortho", ortho_version, plan_sha256, recipe, source_digest,
           base_blake3

Base says format "pt" because transformers before 5 refuses any other word there. `base_blake3` is
the BLAKE3 of model.safetensors. Whether ortho is CSR or compact, the names of its tensors tell; all
of a file have one layout.

**Older formats** are read as they are. `ortho/1` (layout csr) and `ortho/2` (layout compact) differ
from `ortho/3` in three things: base is named base.safetensors, the format tells the layout, and
digests of whole files are SHA-256 (`base_sha256` in ortho's header and in report.json, where
`ortho/3` has `base_blake3`).

`source_digest` is BLAKE3 over the canonical JSON list of [name, dtype, shape, BLAKE3 of the bytes]
of every source tensor by name, whatever the sharding. A lone base is a valid artifact; a lone ortho
is not.
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
CHUNK = 1 << 20


def canonical_json(value: object) -> str:
    """One spelling for one value: sorted keys, no spaces; digests are taken over it."""
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


def base_specs(
    name: str, *, dtype: str, shape: tuple[int, int], group_size: int, bits: int = 4
) -> tuple[TensorSpec, ...]:
    """Name what base holds of a split tensor: packed codes, scales, shape."""
    rows, columns = shape
    module = module_of(name)
    words = columns * bits // 32
    return (
        TensorSpec(key=f"{module}.weight_packed", dtype="I32", shape=(rows, words)),
        TensorSpec(key=f"{module}.weight_scale", dtype=dtype, shape=(rows, columns // group_size)),
        TensorSpec(key=f"{module}.weight_shape", dtype="I64", shape=(2,)),
    )


def ortho_specs(
    name: str, *, dtype: str, shape: tuple[int, int], nnz: int
) -> tuple[TensorSpec, ...]:
    """Name what ortho holds of a split tensor: CSR row pointers, columns, values."""
    rows, columns = shape
    module = module_of(name)
    return (
        TensorSpec(
            key=f"{module}.crow_indices", dtype="I32" if nnz < 2**31 else "I64", shape=(rows + 1,)
        ),
        TensorSpec(
            key=f"{module}.col_indices", dtype="U16" if columns <= 2**16 else "I32", shape=(nnz,)
        ),
        TensorSpec(key=f"{module}.values", dtype=dtype, shape=(nnz,)),
    )


def compact_specs(
    name: str,
    *,
    dtype: str,
    shape: tuple[int, int],
    columns: int,
    counts: str,
    gaps: int,
    others: int,
) -> tuple[TensorSpec, ...]:
    """Name what ortho holds of a split tensor in the compact layout.

    Args:
        name: the tensor's name.
        dtype: of values; I8 brings a step with it.
        shape: (out, in).
        columns: columns kept in every row.
        counts: dtype of row_counts.
        gaps: bytes of col_gaps.
        others: entries outside of those columns.
    """
    rows, width = shape
    narrow = "U16" if width <= 2**16 else "I32"
    parts = {
        "columns": (narrow, (columns,)),
        "column_values": (dtype, (rows, columns)),
        "row_counts": (counts, (rows,)),
        "col_gaps": ("U8", (gaps,)),
        "values": (dtype, (others,)),
        **({"value_step": ("F32", (1,))} if dtype == "I8" else {}),
    }
    return tuple(
        TensorSpec(key=f"{module_of(name)}.{part}", dtype=kind, shape=size)
        for part, (kind, size) in parts.items()
    )


def count_dtype(largest: int) -> str:
    """Name the smallest dtype of row_counts that holds the largest count."""
    return COUNT_DTYPES[(largest >= 2**8) + (largest >= 2**16)]


def compact_at_most(name: str, *, dtype: str, shape: tuple[int, int], nnz: int) -> int:
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


def ortho_metadata(
    *,
    plan_sha256: str,
    recipe: str,
    version: str,
    source_digest: str,
    base_blake3: str,
) -> dict[str, str]:
    """Metadata of ortho.safetensors; a digest's length is known before the digest."""
    return {
        "format": FORMAT,
        "role": "ortho",
        "ortho_version": version,
        "plan_sha256": plan_sha256,
        "recipe": recipe,
        "source_digest": source_digest,
        "base_blake3": base_blake3,
    }


Parts = dict[str, TensorInfo]


def by_module(ortho: Shard) -> dict[str, Parts]:
    """Sort ortho's tensors by the module that they belong to, and their part."""
    found: dict[str, Parts] = {}
    for tensor in ortho.tensors:
        module, _, part = tensor.name.rpartition(".")
        found.setdefault(module, {})[part] = tensor
    return found


def count_kept(parts: Parts) -> int:
    """Count the entries of a module's ortho stream, from its header."""
    block = parts.get("column_values")
    return parts["values"].numel + (block.numel if block else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """An artifact's headers, and no tensor data but the shapes of what was split."""

    folder: Path
    base: Shard
    ortho: Shard | None
    report: dict[str, object] | None  # as it was parsed; `report.read_report` validates it
    sealed: Path | None  # the file that holds ortho, where that is sealed
    opened: Opened | None  # what it was opened into; has to live as long as that is read
    shapes: Mapping[str, tuple[int, int]]  # (out, in) of each split module, from weight_shape
    bits: Mapping[str, int]  # of a code of each of them

    @property
    def files(self) -> tuple[Shard, ...]:
        """Base, and ortho where it is there and open."""
        return (self.base, self.ortho) if self.ortho else (self.base,)

    @property
    def form(self) -> str:
        """The format that base says it is of."""
        return self.base.metadata.get("ortho_format", "")

    @property
    def digest(self) -> str:
        """Name the digest that the format takes of whole files."""
        return digest_of(self.form)

    @property
    def kept(self) -> dict[str, Parts]:
        """What ortho holds of each module, part by part; empty without ortho."""
        return by_module(self.ortho) if self.ortho else {}

    @property
    def split(self) -> tuple[str, ...]:
        """Modules that were split, by name."""
        return tuple(self.shapes)


def digest_of(form: str) -> str:
    """Name the digest that a format takes of whole files."""
    return "sha256" if form in OLD_LAYOUTS else "blake3"


def layout_of(form: str, kept: Mapping[str, Parts]) -> str:
    """Tell an ortho.layout by the format, or by what ortho holds."""
    compact = any("row_counts" in parts for parts in kept.values())
    return OLD_LAYOUTS.get(form, "compact" if compact else "csr")


def is_ours(metadata: dict[str, str]) -> bool:
    """Tell by a file's metadata whether it is base or ortho, in any format known."""
    return any(metadata.get(key) in FORMATS for key in ("format", "ortho_format"))


# Words of our metadata that no other writer has: where one was damaged the others are left.
_MARKS = frozenset({"ortho_format", "role", "recipe"})


def base_file(folder: Path) -> Path | None:
    """Find base in a folder, by what it says of itself; None where there is none.

    A file that cannot be read counts where a report or an ortho stream of ours is beside it.
    """
    found = _find_base(folder)
    return None if found is None else found[0]


def _find_base(folder: Path) -> tuple[Path, dict[str, str] | None] | None:
    """Find base and its metadata, which is None where it cannot be read."""
    new, old = folder / BASE_FILE, folder / OLD_BASE_FILE
    path = new if new.is_file() else old
    if not path.is_file():
        return None
    metadata = checkpoint.metadata_of(path)
    if metadata is None:
        return (path, None) if path == old or _has_company(folder) else None
    if not is_ours(metadata) and _MARKS.isdisjoint(metadata):
        return None
    if path == new and metadata.get("ortho_format") in OLD_LAYOUTS and old.is_file():
        # An older base that was also given the name that other readers look for.
        return old, checkpoint.metadata_of(old)
    return path, metadata


def _has_company(folder: Path) -> bool:
    """Tell whether something beside base says that an artifact was here."""
    sealed = (folder / SEALED_FILE).is_file()
    return sealed or _is_ortho(folder / ORTHO_FILE) or _is_report(folder / REPORT_FILE)


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
        damaged: count a base or ortho that cannot be read, or does not say what it is, where what
            lies beside it does.
    """
    folder = path if path.is_dir() else path.parent
    if path.is_dir() or path.name == SEALED_FILE:  # a sealed file cannot speak for itself
        found = _find_base(folder)
        if found is None:
            return _is_lone_ortho(folder, damaged=damaged)
        return damaged or is_ours(found[1] or {})
    metadata = checkpoint.metadata_of(path) if path.is_file() else {}
    if metadata is not None and is_ours(metadata):
        return True
    named = metadata is None and path.name in (OLD_BASE_FILE, ORTHO_FILE)
    return damaged and (named or path == base_file(folder))


def _is_lone_ortho(folder: Path, *, damaged: bool) -> bool:
    """Tell an artifact without its base from a folder that keeps an ortho stream beside others."""
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
