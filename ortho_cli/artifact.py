r"""The artifact: two safetensors files that are one model; the formats `ortho/1` and `ortho/2`.

    OUT/
      base.safetensors              INT4 codes and scales of split tensors, others unchanged
      ortho.safetensors             sparse source weights of split tensors; delete it and
                                    alpha is 0 for good
      model.safetensors.index.json  every key of base -> base.safetensors, nothing of ortho
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
moved, and of the most salient ones beside them; in `ortho/1` (ortho.layout csr) as CSR:

    <p>.crow_indices  int32 (out + 1,)  int64 where nnz does not fit
    <p>.col_indices   uint16 (nnz,)     int32 where in - 1 does not fit; ascending in each row
    <p>.values        dtype (nnz,)      the source weights themselves, bit for bit; see below

The stream that runs is ortho = values - dequantize(base) at those positions, formed in float32 when
loaded, so that alpha = 1 is exact there whatever base became. nnz is round(density * out * in), so
every offset of both files follows from the source's headers (with ortho/2, of base alone). With
ortho.split unlearn, a moved position that saliency would not have kept holds scale * q of the
source's own nearest code q: alpha = 1 is there the source's own INT4.

In `ortho/2` (ortho.layout compact) ortho holds the same matrix without most of its indices:

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

    base   format "pt", ortho_format "ortho/1", role "base", ortho_version, plan_sha256,
           recipe (canonical JSON)
    ortho  format "ortho/1", role "ortho", ortho_version, plan_sha256, recipe, source_digest,
           base_sha256

and "ortho/2" in both places with compact. Base says format "pt" because transformers before 5
refuses any other word there. `base_sha256` is the SHA-256 of base.safetensors; `source_digest` is
BLAKE3 over the canonical JSON list of [name, dtype, shape, BLAKE3 of the bytes] of every source
tensor by name, whatever the sharding. A lone base is a valid artifact; a lone ortho is not.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ortho_cli import checkpoint
from ortho_cli.checkpoint import Shard, TensorInfo
from ortho_cli.errors import ArtifactError, CheckpointError
from ortho_cli.seal import SEALED_FILE, Keys, Opened, open_sealed
from ortho_cli.writer import TensorSpec

FORMAT = "ortho/1"
FORMATS = {"csr": FORMAT, "compact": "ortho/2"}  # of each ortho.layout
BASE_FILE = "base.safetensors"
ORTHO_FILE = "ortho.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
REPORT_FILE = "report.json"

SCALE_DTYPES = ("BF16", "F16", "F32")
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


def base_metadata(
    *, plan_sha256: str, recipe: str, version: str, form: str = FORMAT
) -> dict[str, str]:
    """Metadata of base.safetensors."""
    return {
        "format": "pt",
        "ortho_format": form,
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
    base_sha256: str,
    form: str = FORMAT,
) -> dict[str, str]:
    """Metadata of ortho.safetensors; a digest's length is known before the digest."""
    return {
        "format": form,
        "role": "ortho",
        "ortho_version": version,
        "plan_sha256": plan_sha256,
        "recipe": recipe,
        "source_digest": source_digest,
        "base_sha256": base_sha256,
    }


Parts = dict[str, TensorInfo]


def _by_module(ortho: Shard) -> dict[str, Parts]:
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
    report: dict[str, Any] | None
    sealed: Path | None  # the file that holds ortho, where that is sealed
    opened: Opened | None  # what it was opened into; has to live as long as that is read
    shapes: Mapping[str, tuple[int, int]]  # (out, in) of each split module, from weight_shape
    bits: Mapping[str, int]  # of a code of each of them

    @property
    def form(self) -> str:
        """The format that base says it is of."""
        return self.base.metadata.get("ortho_format", "")

    @property
    def kept(self) -> dict[str, Parts]:
        """What ortho holds of each module, part by part; empty without ortho."""
        return _by_module(self.ortho) if self.ortho else {}

    @property
    def split(self) -> tuple[str, ...]:
        """Modules that were split, by name."""
        return tuple(self.shapes)


def is_ours(metadata: dict[str, str]) -> bool:
    """Tell by a file's metadata whether it is base or ortho, in any format known."""
    return any(metadata.get(key) in FORMATS.values() for key in ("format", "ortho_format"))


def is_artifact(path: Path, *, damaged: bool = False) -> bool:
    """Tell whether a folder, or a file in it, was written by `ortho decompose`.

    Args:
        path: anything.
        damaged: count a file that has our name and cannot be read.
    """
    folder = path if path.is_dir() else path.parent
    names = (BASE_FILE, ORTHO_FILE) if path.is_dir() else (path.name,)
    if path.is_dir() and (folder / "model.safetensors").exists():
        return False
    for name in names:
        if (folder / name).is_file():
            try:
                metadata = checkpoint.read_shard(folder / name).metadata
            except CheckpointError:
                return damaged and name in (BASE_FILE, ORTHO_FILE)
            if is_ours(metadata):
                return True
    return False


def open_artifact(folder: Path, keys: Keys | None = None) -> Artifact:
    """Read both headers and check that they describe one artifact.

    A sealed ortho is opened in memory with `keys`; without them it counts as absent. Of other
    tensors only `weight_shape` is read: without it a row's words do not tell how many codes of
    which width they hold.

    Raises:
        ArtifactError: base is missing or damaged, a tensor has the wrong dtype or shape, or the two
            files do not belong together as far as their headers and report.json tell. `verify`
            reads the bytes.
    """
    if not (folder / BASE_FILE).is_file():
        lone = (folder / ORTHO_FILE).is_file() or (folder / SEALED_FILE).is_file()
        raise ArtifactError(
            f"`{folder}` has an ortho and no {BASE_FILE}"
            if lone
            else f"`{folder}` has no {BASE_FILE}",
            hint="ortho means nothing without the base that it was cut from"
            if lone
            else "is this the right folder?",
        )
    try:
        base = checkpoint.read_shard(folder / BASE_FILE)
        ortho, sealed, opened = _open_ortho(folder, keys)
        report_path = folder / REPORT_FILE
        report = checkpoint.read_json_object(report_path) if report_path.is_file() else None
    except CheckpointError as error:
        raise ArtifactError(error.message, hint=error.hint) from None
    form = base.metadata.get("ortho_format")
    if form not in FORMATS.values() or base.metadata.get("role") != "base":
        raise ArtifactError(
            f"`{folder / BASE_FILE}` says it is {base.metadata.get('ortho_format')!r} "
            f"{base.metadata.get('role')!r}, "
            f"not {' or '.join(map(repr, FORMATS.values()))} 'base'",
            hint="it was written by something else, or by a later version",
        )
    shapes, bits = _check_base(base)
    artifact = Artifact(
        folder=folder,
        base=base,
        ortho=ortho,
        report=report,
        sealed=sealed,
        opened=opened,
        shapes=shapes,
        bits=bits,
    )
    if ortho is not None:
        _check_pair(artifact, ortho)
    return artifact


def _open_ortho(folder: Path, keys: Keys | None) -> tuple[Shard | None, Path | None, Opened | None]:
    plain, sealed = folder / ORTHO_FILE, folder / SEALED_FILE
    if not sealed.is_file():
        return checkpoint.read_shard(plain) if plain.is_file() else None, None, None
    if plain.is_file():
        raise ArtifactError(
            f"`{folder}` has both {ORTHO_FILE} and {SEALED_FILE}",
            hint="remove the one that is not meant",
        )
    if keys is None:
        return None, sealed, None
    opened = open_sealed(sealed, keys)
    shard = checkpoint.read_shard(opened.path)
    tensors = tuple(replace(tensor, shard=ORTHO_FILE) for tensor in shard.tensors)
    return replace(shard, name=ORTHO_FILE, tensors=tensors), sealed, opened


def no_ortho(artifact: Artifact, because: str) -> ArtifactError:
    """Say that ortho is needed and absent, or sealed."""
    if artifact.sealed is not None:
        return ArtifactError(
            f"`{artifact.sealed}` is sealed, and {because}", hint="give --identity, or take alpha 0"
        )
    return ArtifactError(
        f"`{artifact.folder}` has no {ORTHO_FILE}, and {because}",
        hint="put ortho.safetensors back, or take alpha 0, which needs none",
    )


def damaged(path: Path, what: str) -> ArtifactError:
    """Say what is wrong with a file of an artifact."""
    return ArtifactError(f"`{path}`: {what}", hint="decompose the source again")


def _check_base(base: Shard) -> tuple[dict[str, tuple[int, int]], dict[str, int]]:
    """Find shape and bits of every split module, by name."""
    path, suffix = base.path, ".weight_packed"
    tensors = {tensor.name: tensor for tensor in base.tensors}
    for tensor in base.tensors:
        if not tensor.numel:
            raise damaged(path, f"tensor `{tensor.name}` has shape {list(tensor.shape)}")
    split = sorted(name.removesuffix(suffix) for name in tensors if name.endswith(suffix))
    for module in split:
        packed = tensors[f"{module}.weight_packed"]
        scale, shape = tensors.get(f"{module}.weight_scale"), tensors.get(f"{module}.weight_shape")
        if scale is None or shape is None:
            raise damaged(path, f"`{module}` has packed codes and no scales or shape")
        sound = (
            packed.dtype == "I32"
            and scale.dtype in SCALE_DTYPES
            and (shape.dtype, shape.shape) == ("I64", (2,))
            and len(packed.shape) == len(scale.shape) == 2
            and packed.shape[0] == scale.shape[0]
        )
        if not sound:
            raise damaged(
                path,
                f"`{module}` has codes {packed.dtype} {list(packed.shape)} beside scales "
                f"{scale.dtype} {list(scale.shape)}",
            )
    shapes = _read_shapes(base, split)
    return shapes, {module: _bits(path, module, tensors, shape) for module, shape in shapes.items()}


def _read_shapes(base: Shard, split: Iterable[str]) -> dict[str, tuple[int, int]]:
    tensors = {tensor.name: tensor for tensor in base.tensors}
    buffer = memoryview(bytearray(16))
    found: dict[str, tuple[int, int]] = {}
    fd = os.open(base.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for module in split:
            offset = tensors[f"{module}.weight_shape"].offset
            checkpoint.fill(fd, buffer, offset, what=f"`{base.path}`")
            rows, columns = (
                int.from_bytes(buffer[at : at + 8], "little", signed=True) for at in (0, 8)
            )
            found[module] = rows, columns
    except CheckpointError as error:
        raise ArtifactError(error.message, hint=error.hint) from None
    finally:
        os.close(fd)
    return found


def _bits(
    path: Path, module: str, tensors: Mapping[str, TensorInfo], shape: tuple[int, int]
) -> int:
    """Tell the width of a module's codes: no two widths fill the same words with one row."""
    packed, scale = (tensors[f"{module}.weight_{part}"].shape for part in ("packed", "scale"))
    rows, columns = shape
    bits = next((bits for bits in WIDTHS if columns * bits == packed[1] * 32), None)
    if rows != packed[0] or bits is None:
        raise damaged(
            path,
            f"`{module}.weight_shape` says {list(shape)}, and its codes {list(packed)} are "
            f"{packed[0]} rows of {packed[1] * 8} codes of 4 bits, or {packed[1] * 32 / 3:g} of 3",
        )
    if columns % scale[1]:
        raise damaged(
            path, f"`{module}` has {columns} columns and {scale[1]} scales a row, which do not fit"
        )
    return bits


def _check_pair(artifact: Artifact, ortho: Shard) -> None:
    mine, other = ortho.metadata, artifact.base.metadata
    if mine.get("format") != artifact.form or mine.get("role") != "ortho":
        raise ArtifactError(
            f"`{ortho.path}` says it is {mine.get('format')!r} {mine.get('role')!r}, not "
            f"{artifact.form!r} 'ortho'",
            hint="it was written by something else, or by a later version",
        )
    told = (artifact.report or {}).get("base_sha256", mine.get("base_sha256"))
    for what, left, right in (
        ("plan", mine.get("plan_sha256"), other.get("plan_sha256")),
        ("base", mine.get("base_sha256"), told),
    ):
        if left != right:
            raise ArtifactError(
                f"`{ortho.path}` belongs to {what} {str(left)[:12]}, and what lies beside it "
                f"is {what} {str(right)[:12]}",
                hint="put back the file that was written with this base",
            )
    kept, base = _by_module(ortho), {tensor.name: tensor for tensor in artifact.base.tensors}
    for module in artifact.split:
        scale, shape = base[f"{module}.weight_scale"], artifact.shapes[module]
        parts = kept.pop(module, {})
        wanted = _wanted(artifact.form, parts)
        for part in sorted(wanted ^ parts.keys()):
            said = "missing" if part in wanted else "not of any split weight"
            raise damaged(ortho.path, f"tensor `{module}.{part}` is {said}")
        for spec in _kept_specs(artifact.form, module, parts, dtype=scale.dtype, shape=shape):
            found = parts[spec.key.rpartition(".")[2]]
            if (found.dtype, found.shape) != (spec.dtype, spec.shape):
                raise damaged(
                    ortho.path,
                    f"tensor `{spec.key}` is {found.dtype} {list(found.shape)}, not "
                    f"{spec.dtype} {list(spec.shape)}",
                )
    for parts in kept.values():
        key = min(tensor.name for tensor in parts.values())
        raise damaged(ortho.path, f"tensor `{key}` is not of any split weight")


def _wanted(form: str, parts: Parts) -> set[str]:
    """Name the parts that a split weight has in ortho."""
    if form == FORMAT:
        return {"crow_indices", "col_indices", "values"}
    common = {"columns", "column_values", "row_counts", "col_gaps", "values"}
    rounded = "values" in parts and parts["values"].dtype == "I8"
    return common | ({"value_step"} if rounded else set())


def _kept_specs(
    form: str, module: str, parts: Parts, *, dtype: str, shape: tuple[int, int]
) -> tuple[TensorSpec, ...]:
    """Say what dtypes and shapes the parts must have, as far as the header tells."""
    name, others = f"{module}.weight", parts["values"].numel
    if form == FORMAT:
        return ortho_specs(name, dtype=dtype, shape=shape, nnz=others)
    counts = parts["row_counts"].dtype
    return compact_specs(
        name,
        dtype="I8" if parts["values"].dtype == "I8" else dtype,
        shape=shape,
        columns=parts["columns"].numel,
        counts=counts if counts in COUNT_DTYPES else COUNT_DTYPES[0],
        gaps=parts["col_gaps"].numel,
        others=others,
    )


def source_digest(tensors: Iterable[tuple[str, str, tuple[int, ...], str]]) -> str:
    """BLAKE3 over (name, dtype, shape, BLAKE3 of the bytes) of every source tensor, by name."""
    from blake3 import blake3

    listed = sorted([name, dtype, list(shape), digest] for name, dtype, shape, digest in tensors)
    return blake3(canonical_json(listed).encode()).hexdigest()
