"""Opening an artifact: both headers, held against each other and against the format."""

from __future__ import annotations

import contextlib
import struct
from dataclasses import replace
from pathlib import Path

from ortho_cli.errors import ArtifactError, CheckpointError, blamed
from ortho_cli.formats.artifact import (
    BASE_FILE,
    COUNT_DTYPES,
    FORMATS,
    ORTHO_FILE,
    REPORT_FILE,
    WIDTHS,
    Artifact,
    Parts,
    Shape,
    Specs,
    column_specs,
    compact_specs,
    damaged,
    find_base,
    ortho_specs,
)
from ortho_cli.split.dtypes import SPLIT
from ortho_cli.storage import checkpoint, strict_json
from ortho_cli.storage.checkpoint import Shard, ShardReader
from ortho_cli.storage.folders import SUFFIX
from ortho_cli.storage.hints import said
from ortho_cli.storage.sealing import SEALED_FILE, Keys, Opened, open_sealed


def open_artifact(folder: Path, keys: Keys | None = None) -> Artifact:
    """Read both headers and check that they describe one artifact; a file in it stands for it.

    A sealed ortho is opened in memory with `keys`; without them it counts as absent. Of other
    tensors only `weight_shape` is read: without it a row's words do not tell how many codes of
    which width they hold.

    Raises:
        ArtifactError: base is missing or damaged, a tensor has the wrong dtype or shape, or the two
            files do not belong together as far as their headers and report.json tell. `verify`
            reads the bytes.
    """
    folder = folder.parent if folder.is_file() else folder
    path, _ = find_base(folder) or (None, None)
    if path is None:
        raise _no_base(folder)
    report, report_path = None, folder / REPORT_FILE
    with blamed(ArtifactError):
        base = checkpoint.read_shard(path)
        ortho, sealed, opened = _open_ortho(folder, keys)
        if report_path.is_file():
            report = strict_json.read(report_path, tensors=len(base.tensors))
    form = base.metadata.get("ortho_format")
    if form not in FORMATS or base.metadata.get("role") != "base":
        raise ArtifactError(
            f"`{path}` says it is {form!r} {base.metadata.get('role')!r}, "
            f"not {' or '.join(map(repr, FORMATS))} 'base'",
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


def _no_base(folder: Path) -> ArtifactError:
    """Say what a folder without a base is."""
    lone = next((n for n in (ORTHO_FILE, SEALED_FILE) if (folder / n).is_file()), None)
    if lone is not None:
        return ArtifactError(
            f"`{folder}` has {lone} and no base ({BASE_FILE})",
            hint="ortho means nothing without the base that it was cut from",
        )
    if not folder.is_dir():
        what = "is no folder" if folder.exists() else "does not exist"
        return ArtifactError(f"`{folder}` {what}", hint="give what `ortho decompose` made")
    if any(path.suffix == SUFFIX for path in folder.iterdir()):
        return ArtifactError(
            f"`{folder}` is a checkpoint, and no artifact",
            hint=f"`ortho decompose {said(folder)}` makes one of it",
        )
    return ArtifactError(f"`{folder}` has no base ({BASE_FILE})", hint="is this the right folder?")


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
    try:
        shard = checkpoint.read_shard(opened.path)
    except CheckpointError as error:
        said = error.message.replace(f"`{opened.path}`", f"what `{sealed}` holds", 1)
        raise ArtifactError(said, hint="restore the file, or decompose the source again") from None
    tensors = tuple(replace(tensor, shard=ORTHO_FILE) for tensor in shard.tensors)
    return replace(shard, name=ORTHO_FILE, tensors=tensors), sealed, opened


def no_ortho(
    artifact: Artifact, because: str, *, without: str = ", or take alpha 0, which needs none"
) -> ArtifactError:
    """Say that ortho is needed and absent, or sealed; and what needs none."""
    if artifact.sealed is not None:
        return ArtifactError(
            f"`{artifact.sealed}` is sealed, and {because}", hint=f"give --identity FILE{without}"
        )
    return ArtifactError(
        f"`{artifact.folder}` has no {ORTHO_FILE}, and {because}",
        hint=f"put {ORTHO_FILE} back{without}",
    )


def _check_base(base: Shard) -> tuple[dict[str, Shape], dict[str, int]]:
    """Find shape and bits of every split module, by name."""
    path, suffix = base.path, ".weight_packed"
    tensors = {tensor.name: tensor for tensor in base.tensors}
    split = sorted(name.removesuffix(suffix) for name in tensors if name.endswith(suffix))
    buffer = memoryview(bytearray(16))
    shapes: dict[str, Shape] = {}
    bits: dict[str, int] = {}
    with blamed(ArtifactError), contextlib.closing(ShardReader([base])) as reader:
        for module in split:
            packed = tensors[module + suffix]
            scale, shape = (tensors.get(f"{module}.weight_{part}") for part in ("scale", "shape"))
            if scale is None or shape is None:
                raise damaged(path, f"`{module}` has packed codes and no scales or shape")
            sound = (
                packed.dtype == "I32"
                and scale.dtype in SPLIT
                and (shape.dtype, shape.shape) == ("I64", (2,))
                and len(packed.shape) == len(scale.shape) == 2
                and packed.shape[0] == scale.shape[0]
                and packed.numel > 0 < scale.numel
            )
            if not sound:
                raise damaged(
                    path,
                    f"`{module}` has codes {packed.dtype} {list(packed.shape)} beside scales "
                    f"{scale.dtype} {list(scale.shape)}",
                )
            reader.read_into(buffer, shape, start=0)
            rows, columns = shapes[module] = struct.unpack("<2q", buffer)
            words, groups = packed.shape[1], scale.shape[1]
            # No two widths fill the same words with one row.
            width = next((bits for bits in WIDTHS if columns * bits == words * 32), None)
            if rows != packed.shape[0] or width is None:
                raise damaged(
                    path,
                    f"`{module}.weight_shape` says {[rows, columns]}, and its codes "
                    f"{list(packed.shape)} are {packed.shape[0]} rows of {words * 8} codes of "
                    f"4 bits, or {words * 32 / 3:g} of 3",
                )
            if columns % groups:
                what = f"`{module}` has {columns} columns and {groups} scales a row"
                raise damaged(path, f"{what}, which do not fit")
            bits[module] = width
    return shapes, bits


def _check_pair(artifact: Artifact, ortho: Shard) -> None:
    mine, other = ortho.metadata, artifact.base.metadata
    if mine.get("format") != artifact.form or mine.get("role") != "ortho":
        raise ArtifactError(
            f"`{ortho.path}` says it is {mine.get('format')!r} {mine.get('role')!r}, not "
            f"{artifact.form!r} 'ortho'",
            hint="it was written by something else, or by a later version",
        )
    key = f"base_{artifact.digest}"
    told = (artifact.report or {}).get(key, mine.get(key))
    for what, left, right in (
        ("plan", mine.get("plan_sha256"), other.get("plan_sha256")),
        ("base", mine.get(key), told),
    ):
        if left != right:
            raise ArtifactError(
                f"`{ortho.path}` belongs to {what} {str(left)[:12]}, and what is beside it "
                f"is {what} {str(right)[:12]}",
                hint="put back the file that was written with this base",
            )
    kept, layout = artifact.kept, artifact.layout
    scales = {tensor.name: tensor.dtype for tensor in artifact.base.tensors}
    for module in artifact.split:
        parts, dtype = kept.pop(module, {}), scales[f"{module}.weight_scale"]
        specs = {
            spec.key.rpartition(".")[2]: spec
            for spec in _kept_specs(layout, module, parts, dtype, artifact.shapes[module])
        }
        for part in sorted(specs.keys() ^ parts.keys()):
            fault = "missing" if part in specs else "not of any split weight"
            raise damaged(ortho.path, f"tensor `{module}.{part}` is {fault}")
        for part, spec in specs.items():
            found = parts[part]
            if (found.dtype, found.shape) != (spec.dtype, spec.shape):
                raise damaged(
                    ortho.path,
                    f"tensor `{spec.key}` is {found.dtype} {list(found.shape)}, not "
                    f"{spec.dtype} {list(spec.shape)}",
                )
    for parts in kept.values():
        key = min(tensor.name for tensor in parts.values())
        raise damaged(ortho.path, f"tensor `{key}` is not of any split weight")


def _kept_specs(layout: str, module: str, parts: Parts, dtype: str, shape: Shape) -> Specs:
    """Say what parts there must be, as far as the header tells; one that is missing is empty."""
    sizes = {part: tensor.numel for part, tensor in parts.items()}
    dtypes = {part: tensor.dtype for part, tensor in parts.items()}
    name, others = f"{module}.weight", sizes.get("values", 0)
    if layout == "columns":
        return column_specs(
            name,
            dtype=dtype,
            shape=shape,
            columns=sizes.get("col_indices", 0),
            values="I8" if dtypes.get("values") == "I8" else None,
        )
    if layout == "csr":
        return ortho_specs(name, dtype=dtype, shape=shape, nnz=others)
    counts = dtypes.get("row_counts")
    return compact_specs(
        name,
        dtype="I8" if dtypes.get("values") == "I8" else dtype,
        shape=shape,
        columns=sizes.get("columns", 0),
        counts=counts if counts in COUNT_DTYPES else COUNT_DTYPES[0],
        gaps=sizes.get("col_gaps", 0),
        others=others,
    )
