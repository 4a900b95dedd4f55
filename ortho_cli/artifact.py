r"""The artifact: two safetensors files that are one model; here is the format `ortho/1`.

    OUT/
      base.safetensors              INT4 codes and scales of split tensors, others unchanged
      ortho.safetensors             sparse source weights of split tensors; delete it and
                                    alpha is 0 for good
      model.safetensors.index.json  every key of base -> base.safetensors, nothing of ortho
      config.json, tokenizer*, ...  the source's files; config.json gains `quantization_config`
      report.json                   what was done, tensor by tensor, with digests

W(alpha) = dequantize(base) + alpha * ortho.

**Base** is compressed-tensors `pack-quantized`. A split `<p>.weight` of shape (out, in) becomes

    <p>.weight_packed  int32  (out, in / 8)           column 8w+i of a row in bits 4i..4i+3
                                                      of word w, as q + 8, q in [-8, 7]
    <p>.weight_scale   dtype  (out, in / group_size)  in the source tensor's dtype
    <p>.weight_shape   int64  (2,)                    out, in

and dequantizes to q * scale, rounded once to that dtype. q is the nearest code to the source's
weight, except where forgetting moved it (ortho.split isolate, unlearn); ortho holds every such
position. With ortho.split reference, codes, scales and every other tensor are those of the
reference. Otherwise every other tensor keeps its name, dtype, shape and bytes.

**Ortho** holds, for each split `<p>.weight`, a CSR matrix of the positions that forgetting moved,
and of the most salient ones beside them:

    <p>.crow_indices  int32 (out + 1,)  int64 where nnz does not fit
    <p>.col_indices   uint16 (nnz,)     int32 where in - 1 does not fit; ascending in each row
    <p>.values        dtype (nnz,)      the source weights themselves, bit for bit; see below

The stream that runs is ortho = values - dequantize(base) at those positions, formed in float32 when
loaded, so that alpha = 1 is exact there whatever base became. nnz is round(density * out * in), so
every offset of both files follows from the source's headers. With ortho.split unlearn, a moved
position that saliency would not have kept holds scale * q of the source's own nearest code q:
alpha = 1 is there the source's own INT4.

**Files**: safetensors; tensors by element size (widest first), then name. `__metadata__` in order:

    base   format "pt", ortho_format "ortho/1", role "base", ortho_version, plan_sha256,
           recipe (canonical JSON)
    ortho  format "ortho/1", role "ortho", ortho_version, plan_sha256, recipe, source_digest,
           base_sha256

Base says format "pt" because transformers before 5 refuses any other word there. `base_sha256` is
the SHA-256 of base.safetensors; `source_digest` is BLAKE3 over the canonical JSON list of [name,
dtype, shape, BLAKE3 of the bytes] of every source tensor by name, so it does not depend on
sharding. A lone base is a valid artifact; a lone ortho is not.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ortho_cli import checkpoint
from ortho_cli.checkpoint import Shard
from ortho_cli.errors import ArtifactError, CheckpointError
from ortho_cli.writer import TensorSpec

FORMAT = "ortho/1"
BASE_FILE = "base.safetensors"
ORTHO_FILE = "ortho.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
REPORT_FILE = "report.json"

SCALE_DTYPES = ("BF16", "F16", "F32")
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
    name: str, *, dtype: str, shape: tuple[int, int], group_size: int
) -> tuple[TensorSpec, ...]:
    """Name what base holds of a split tensor: packed codes, scales, shape."""
    rows, columns = shape
    module = module_of(name)
    return (
        TensorSpec(key=f"{module}.weight_packed", dtype="I32", shape=(rows, columns // 8)),
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


def base_metadata(*, plan_sha256: str, recipe: str, version: str) -> dict[str, str]:
    """Metadata of base.safetensors."""
    return {
        "format": "pt",
        "ortho_format": FORMAT,
        "role": "base",
        "ortho_version": version,
        "plan_sha256": plan_sha256,
        "recipe": recipe,
    }


def ortho_metadata(
    *, plan_sha256: str, recipe: str, version: str, source_digest: str, base_sha256: str
) -> dict[str, str]:
    """Metadata of ortho.safetensors; a digest's length is known before the digest."""
    return {
        "format": FORMAT,
        "role": "ortho",
        "ortho_version": version,
        "plan_sha256": plan_sha256,
        "recipe": recipe,
        "source_digest": source_digest,
        "base_sha256": base_sha256,
    }


def index(keys: Iterable[str], *, total_size: int) -> dict[str, Any]:
    """Make the index without which transformers does not find base."""
    return {
        "metadata": {"total_size": total_size},
        "weight_map": dict.fromkeys(sorted(keys), BASE_FILE),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """An artifact's headers; no tensor data is held."""

    folder: Path
    base: Shard
    ortho: Shard | None
    report: dict[str, Any] | None

    @property
    def split(self) -> tuple[str, ...]:
        """Modules that were split, by name."""
        suffix = ".weight_packed"
        return tuple(
            sorted(
                t.name.removesuffix(suffix) for t in self.base.tensors if t.name.endswith(suffix)
            )
        )


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
            if FORMAT in (metadata.get("format"), metadata.get("ortho_format")):
                return True
    return False


def open_artifact(folder: Path) -> Artifact:
    """Read both headers and check that they describe one artifact; no tensor is read.

    Raises:
        ArtifactError: base is missing or damaged, a tensor has the wrong dtype or shape, or the two
            files do not belong together as far as their headers and report.json tell. `verify`
            reads the bytes.
    """
    if not (folder / BASE_FILE).is_file():
        lone = (folder / ORTHO_FILE).is_file()
        raise ArtifactError(
            f"`{folder}` has {ORTHO_FILE} and no {BASE_FILE}"
            if lone
            else f"`{folder}` has no {BASE_FILE}",
            hint="ortho means nothing without the base that it was cut from"
            if lone
            else "is this the right folder?",
        )
    try:
        base = checkpoint.read_shard(folder / BASE_FILE)
        ortho_path = folder / ORTHO_FILE
        ortho = checkpoint.read_shard(ortho_path) if ortho_path.is_file() else None
        report_path = folder / REPORT_FILE
        report = checkpoint.read_json_object(report_path) if report_path.is_file() else None
    except CheckpointError as error:
        raise ArtifactError(error.message, hint=error.hint) from None
    artifact = Artifact(folder=folder, base=base, ortho=ortho, report=report)
    if base.metadata.get("ortho_format") != FORMAT or base.metadata.get("role") != "base":
        raise ArtifactError(
            f"`{folder / BASE_FILE}` says it is {base.metadata.get('ortho_format')!r} "
            f"{base.metadata.get('role')!r}, "
            f"not {FORMAT!r} 'base'",
            hint="it was written by something else, or by a later version",
        )
    _check_base(artifact)
    if ortho is not None:
        _check_pair(artifact, ortho)
    return artifact


def damaged(path: Path, what: str) -> ArtifactError:
    """Say what is wrong with a file of an artifact."""
    return ArtifactError(f"`{path}`: {what}", hint="decompose the source again")


def _check_base(artifact: Artifact) -> None:
    path = artifact.base.path
    tensors = {tensor.name: tensor for tensor in artifact.base.tensors}
    for tensor in artifact.base.tensors:
        if not tensor.numel:
            raise damaged(path, f"tensor `{tensor.name}` has shape {list(tensor.shape)}")
    for module in artifact.split:
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
            and packed.shape[1] * 8 % scale.shape[1] == 0
        )
        if not sound:
            raise damaged(
                path,
                f"`{module}` has codes {packed.dtype} {list(packed.shape)} beside scales "
                f"{scale.dtype} {list(scale.shape)}",
            )


def _check_pair(artifact: Artifact, ortho: Shard) -> None:
    mine, other = ortho.metadata, artifact.base.metadata
    if mine.get("format") != FORMAT or mine.get("role") != "ortho":
        raise ArtifactError(
            f"`{ortho.path}` says it is {mine.get('format')!r} {mine.get('role')!r}, not "
            f"{FORMAT!r} 'ortho'",
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
    tensors = {tensor.name: tensor for tensor in ortho.tensors}
    dtypes = {tensor.name: tensor for tensor in artifact.base.tensors}
    wanted = {
        f"{m}.{part}" for m in artifact.split for part in ("crow_indices", "col_indices", "values")
    }
    for key in sorted(wanted ^ tensors.keys()):
        raise damaged(
            ortho.path,
            f"tensor `{key}` is {'missing' if key in wanted else 'not of any split weight'}",
        )
    for module in artifact.split:
        packed = dtypes[f"{module}.weight_packed"]
        name, shape = f"{module}.weight", (packed.shape[0], packed.shape[1] * 8)
        nnz = tensors[f"{module}.values"].numel
        for spec in ortho_specs(
            name, dtype=dtypes[f"{module}.weight_scale"].dtype, shape=shape, nnz=nnz
        ):
            found = tensors[spec.key]
            if (found.dtype, found.shape) != (spec.dtype, spec.shape):
                raise damaged(
                    ortho.path,
                    f"tensor `{spec.key}` is {found.dtype} {list(found.shape)}, not "
                    f"{spec.dtype} {list(spec.shape)}",
                )


def source_digest(tensors: Iterable[tuple[str, str, tuple[int, ...], str]]) -> str:
    """BLAKE3 over (name, dtype, shape, BLAKE3 of the bytes) of every source tensor, by name."""
    from blake3 import blake3

    listed = sorted([name, dtype, list(shape), digest] for name, dtype, shape, digest in tensors)
    return blake3(canonical_json(listed).encode()).hexdigest()
