"""Reading an artifact back: what it says it holds, and every byte against digests and rules."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from ortho_cli.errors import ArtifactError, CheckpointError
from ortho_cli.events import Advanced, EventSink, Started, null_sink
from ortho_cli.formats.artifact import (
    INDEX_FILE,
    OLD_BASE_FILE,
    OLD_LAYOUTS,
    ORTHO_FILE,
    REPORT_FILE,
    Artifact,
    Parts,
    count_kept,
    damaged,
    layout_of,
    spelled,
)
from ortho_cli.formats.provenance import provenance
from ortho_cli.storage import checkpoint, side_files, strict_json
from ortho_cli.storage.checkpoint import Shard, TensorInfo
from ortho_cli.storage.data_file import CHUNK
from ortho_cli.storage.sealing import SEALED_FILE


def describe(artifact: Artifact) -> dict[str, Any]:
    """Say what an artifact holds: report.json, and which files are there.

    Without report.json tensors and origin come from the headers, and what only decompose could
    measure is left out; `source_digest` is None if ortho is missing, too.
    """
    present = {
        artifact.base.name: artifact.base.size,
        ORTHO_FILE: artifact.ortho.size if artifact.ortho else None,
    }
    if artifact.sealed:
        present[SEALED_FILE] = artifact.sealed.stat().st_size
    origin = _origin(artifact)
    if artifact.report is not None:
        return {**artifact.report, "files": present}
    return {
        "format": artifact.form,
        **origin,
        "tensors": list(_tensors_from_headers(artifact)),
        "files": present,
    }


def _tensors_from_headers(artifact: Artifact) -> Iterator[dict[str, Any]]:
    base = {tensor.name: tensor for tensor in artifact.base.tensors}
    kept = artifact.kept
    split = set(artifact.split)
    for module in artifact.split:
        packed, scale = base[f"{module}.weight_packed"], base[f"{module}.weight_scale"]
        mine = kept.get(module, {})
        parts = [packed, scale, base[f"{module}.weight_shape"], *mine.values()]
        rows, columns = artifact.shapes[module]
        yield {
            "name": f"{module}.weight",
            "action": "split",
            "dtype": scale.dtype,
            "shape": [rows, columns],
            "bits": artifact.bits[module],
            "bits_per_weight": round(8 * sum(p.nbytes for p in parts) / (rows * columns), 4),
            "nnz": count_kept(mine) if mine else None,
            **({"columns": mine["columns"].numel} if "columns" in mine else {}),
        }
    for tensor in artifact.base.tensors:
        module, _, part = tensor.name.rpartition(".")
        if module not in split or part not in ("weight_packed", "weight_scale", "weight_shape"):
            bits = 8 * tensor.nbytes / tensor.numel if tensor.numel else 0.0
            yield {
                "name": tensor.name,
                "action": "copy",
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "bits_per_weight": bits,
            }


# What inspect reads of report.json, and of which type.
_NUMBER = int | float
_LARGEST = 1e300  # of a figure: an integer of a thousand digits is no float, and cannot be shown
_REPORT = {
    "format": str, "plan_sha256": str, "source_digest": str, "versions": dict, "recipe": dict,
    "totals": dict, "tensors": list,
}  # fmt: skip
_TOTALS = {
    "bits_per_weight": _NUMBER, "split_bits_per_weight": _NUMBER,
    "split_bits_per_weight_base": _NUMBER, "nnz": _NUMBER,
    "sqnr_db_alpha_0": _NUMBER | None, "sqnr_db_alpha_1": _NUMBER | None,
    "residual_kept": _NUMBER | None,
}  # fmt: skip
_MEASURED = ("sqnr_db_alpha_0", "sqnr_db_alpha_1", "residual_kept")
# What the first reports do not have.
_LATER = ("curvature_error_alpha_0", "curvature_error_alpha_1", "saliency_kept")


def _fits(value: object, kind: Any) -> bool:
    """Tell a value of a type that can be shown."""
    return isinstance(value, kind) and not (isinstance(value, _NUMBER) and abs(value) > _LARGEST)


def _origin(artifact: Artifact) -> dict[str, Any]:
    """Check what report.json says, if it is there, and tell where the artifact comes from."""
    if artifact.report is not None:
        _check_report(artifact, artifact.report)
    return provenance(artifact)


def _check_report(artifact: Artifact, report: dict[str, Any]) -> None:
    """Refuse a report that is not of this artifact, or not a report."""
    path = artifact.folder / REPORT_FILE
    totals, versions = report.get("totals"), report.get("versions")
    recipe = report["recipe"] if isinstance(report.get("recipe"), dict) else {}
    for name, section, types in (
        ("", report, _REPORT | {f"{file}_{artifact.digest}": str for file in ("base", "ortho")}),
        ("totals.", totals, _TOTALS),
        ("versions.", versions, {"ortho": str, "torch": str}),
        ("recipe.", recipe, {"base": dict}),
        ("recipe.base.", recipe.get("base"), {"rounding": str}),
    ):
        for key, kind in types.items():
            value = section.get(key, ...) if isinstance(section, dict) else ...
            if not _fits(value, kind):
                raise damaged(path, f"`{name}{key}` is missing or of the wrong type")
    if not all(_fits(report["totals"].get(key), _NUMBER | None) for key in _LATER):
        raise damaged(path, f"one of {', '.join(_LATER)} is not a number")
    for key in ("statistics", "side_files"):
        if not isinstance(report.get(key), dict | None):
            raise damaged(path, f"`{key}` is of the wrong type")
    if report["format"] != artifact.form:
        raise damaged(path, f"it is of format {report['format']!r}, not {artifact.form!r}")
    _check_reported_tensors(artifact, report, path)
    _check_totals(artifact, report["totals"], path)


def _check_totals(artifact: Artifact, totals: dict[str, Any], path: Path) -> None:
    """Hold the totals that headers tell, too, against them."""
    held = list(_tensors_from_headers(artifact))
    split = [entry for entry in held if entry["action"] == "split"]
    sizes = [math.prod(entry["shape"]) for entry in (*held, *split)]
    weights, split_weights = sum(sizes[: len(held)]), sum(sizes[len(held) :])
    told = {
        "tensors": len(held),
        "split_tensors": len(split),
        "weights": weights,
        "split_weights": split_weights,
        "base_bytes": artifact.base.size,
    }
    if artifact.ortho is not None:
        size = artifact.base.size + artifact.ortho.size
        nnz = sum(entry["nnz"] for entry in split)
        told |= {
            "ortho_bytes": artifact.ortho.size,
            "nnz": nnz,
            "density": nnz / split_weights,
            "bits_per_weight": round(8 * size / weights, 4),
        }
    for key, value in told.items():
        if totals.get(key, value) != value:  # the first reports lack some
            raise damaged(path, f"`totals.{key}` is {totals[key]!r}, and the files give {value!r}")


def _check_reported_tensors(artifact: Artifact, report: dict[str, Any], path: Path) -> None:
    entries = [entry for entry in report["tensors"] if isinstance(entry, dict)]
    told = {entry["name"]: entry for entry in entries if isinstance(entry.get("name"), str)}
    held = {entry["name"]: entry for entry in _tensors_from_headers(artifact)}
    if len(told) != len(report["tensors"]):
        raise damaged(path, "an entry of `tensors` has no name, or another's")
    for name in sorted(told.keys() ^ held.keys()):
        raise damaged(path, f"tensor `{name}` is not in both the report and {artifact.base.name}")
    for name, entry in held.items():
        # The first reports do not say `bits`: it was 4 throughout.
        said = ({"bits": 4} if entry["action"] == "split" else {}) | told[name]
        for key in (
            "action",
            "dtype",
            "shape",
            "bits",
            *(("nnz", "columns") if artifact.ortho else ()),
        ):
            if said.get(key) != entry.get(key):
                raise damaged(
                    path, f"`{key}` of `{name}` is {said.get(key)!r}, not {entry.get(key)!r}"
                )
        figures = [told[name].get("bits_per_weight", ""), *map(told[name].get, _MEASURED + _LATER)]
        if not all(_fits(figure, _NUMBER | None) for figure in figures):
            raise damaged(path, f"the figures of `{name}` are not numbers")


_SPELLED = {"blake3": "BLAKE3", "sha256": "SHA-256"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """What `verify` read and found sound."""

    digest: str  # the algorithm of those of whole files
    base: str
    ortho: str | None  # None where it is absent or sealed
    tensors: int
    bytes: int
    checked: dict[str, str]  # file -> what its bytes were held against


def verify(artifact: Artifact, *, on_event: EventSink = null_sink) -> Verified:
    """Read every byte of an artifact and check it against every digest and rule of the format.

    Without report.json only the pair's own digest is there to check against; `checked` says so.

    Raises:
        ArtifactError: names the file, and the tensor where report.json's digests tell which one is
            damaged.
    """
    files = [artifact.base, *([artifact.ortho] if artifact.ortho else [])]
    size = sum(file.size for file in files)
    on_event(
        Started(
            tensors=sum(len(file.tensors) for file in files),
            resumed=0,
            bytes_total=2 * size,
            bytes_done=0,
        )
    )
    told = artifact.report or {}
    _origin(artifact)
    for file in files:
        digests = _reported_digests(artifact, file) if artifact.report is not None else {}
        with _Pieces(file) as pieces:
            for tensor in file.tensors:
                _verify_tensor(file, tensor, digests.get(tensor.name), pieces, on_event)
    _verify_index(artifact)
    if artifact.ortho is not None:
        _verify_kept(artifact, artifact.ortho)
    algorithm = artifact.digest
    sums = {file.name: file_digest(file.path, algorithm, on_event=on_event) for file in files}
    checked = {file.name: _checked(artifact, file) for file in files}
    base = artifact.base.name
    claims = [(base, told.get(f"base_{algorithm}"))]
    if artifact.ortho is not None:
        claims += [
            (base, artifact.ortho.metadata.get(f"base_{algorithm}")),
            (ORTHO_FILE, told.get(f"ortho_{algorithm}")),
        ]
    if artifact.sealed is not None:
        sums[SEALED_FILE] = file_digest(artifact.sealed, algorithm)
        claims.append((SEALED_FILE, told.get(f"sealed_{algorithm}")))
        known = f"sealed_{algorithm}" in told
        checked[SEALED_FILE] = "its digest in report.json" if known else "nothing"
    side, there = told.get("side_files") or {}, side_files.list_files(artifact.folder)
    here = {spelled(name): name for name in there if (artifact.folder / name).is_file()}
    for name in sorted(side.keys() & here.keys()):  # some may be left out, others were added
        sums[here[name]] = file_digest(artifact.folder / here[name], algorithm)
        claims.append((here[name], side[name]))
    for name, claim in claims:
        if claim is not None and claim != sums[name]:
            raise ArtifactError(
                f"`{artifact.folder / name}` has {_SPELLED[algorithm]} {sums[name][:12]} where "
                f"{str(claim)[:12]} was written",
                hint="the file is damaged, was edited, or belongs to another artifact",
            )
    return Verified(
        digest=algorithm,
        base=sums[base],
        ortho=sums.get(ORTHO_FILE),
        tensors=sum(len(file.tensors) for file in files),
        bytes=size,
        checked=checked,
    )


def _checked(artifact: Artifact, file: Shard) -> str:
    if artifact.report is not None:
        return "every digest"
    if file is artifact.base and artifact.ortho is not None:
        return "its digest in ortho"
    return "its structure alone: without report.json no digest of it is known"


def _reported_digests(artifact: Artifact, file: Shard) -> dict[str, str]:
    listed = (artifact.report or {}).get("tensors")
    found: dict[str, str] = {}
    for entry in listed if isinstance(listed, list) else []:
        digests = entry.get("blake3") if isinstance(entry, dict) else None
        mine = digests.get(_written(artifact, file)) if isinstance(digests, dict) else None
        found.update(mine if isinstance(mine, dict) else {})
    for tensor in file.tensors:
        if not isinstance(found.get(tensor.name), str):
            raise damaged(
                artifact.folder / REPORT_FILE, f"no digest of tensor `{tensor.name}` of {file.name}"
            )
    return found


def _verify_tensor(
    file: Shard,
    tensor: TensorInfo,
    claim: str | None,
    pieces: _Pieces,
    on_event: EventSink,
) -> None:
    digest = blake3()
    for piece in pieces(tensor):
        digest.update(piece)
        on_event(Advanced(nbytes=len(piece)))
    if claim is not None and digest.hexdigest() != claim:
        raise ArtifactError(
            f"tensor `{tensor.name}` of `{file.path}` has BLAKE3 {digest.hexdigest()[:12]} "
            f"where {claim[:12]} was written",
            hint="the file is damaged; restore it, or decompose the source again",
        )


class _Pieces:
    """Gives the bytes of a file's tensors, through one buffer; opened once for all of them."""

    def __init__(self, file: Shard) -> None:
        self._path, self._buffer = file.path, memoryview(bytearray(CHUNK))

    def __enter__(self) -> _Pieces:
        self._fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._fd)

    def __call__(self, tensor: TensorInfo) -> Iterator[memoryview]:
        for start in range(0, tensor.nbytes, CHUNK):
            piece = self._buffer[: min(CHUNK, tensor.nbytes - start)]
            checkpoint.fill(self._fd, piece, tensor.offset + start, what=f"`{self._path}`")
            yield piece


def _written(artifact: Artifact, file: Shard) -> str:
    """Name a file as it was written: an older base may have been renamed for other readers."""
    renamed = file is artifact.base and artifact.form in OLD_LAYOUTS
    return OLD_BASE_FILE if renamed else file.name


def _verify_index(artifact: Artifact) -> None:
    path = artifact.folder / INDEX_FILE
    keys = {tensor.name for tensor in artifact.base.tensors}
    try:
        listed = strict_json.read(path).get("weight_map") if path.is_file() else None
    except CheckpointError as error:
        raise ArtifactError(error.message, hint=error.hint) from None
    name = _written(artifact, artifact.base)
    if listed != dict.fromkeys(keys, name):
        raise damaged(
            path, f"it does not send all {len(keys)} keys of base, and no other, to {name}"
        )


def _verify_kept(artifact: Artifact, ortho: Shard) -> None:
    """Hold what ortho keeps of every split weight against the rules of its layout."""
    kept = artifact.kept  # made anew each time that it is asked for
    if layout_of(artifact.form, kept) == "csr":
        with _Pieces(ortho) as pieces:
            for module in artifact.split:
                _verify_csr(artifact, ortho, module, kept[module], pieces)
    else:
        from ortho_cli.formats.ortho_reader import (
            KeptReader,  # int8 values need torch, a second to import
        )

        with KeptReader(artifact) as reader:
            for module in artifact.split:
                reader.csr(module)


def _verify_csr(
    artifact: Artifact, ortho: Shard, module: str, parts: Parts, pieces: _Pieces
) -> None:
    """Hold a weight's CSR against the rules, piece by piece."""
    import numpy as np

    from ortho_cli.formats.csr import ORTHO_PARTS, check_csr

    dtypes = {"I32": np.int32, "I64": np.int64, "U16": np.uint16, "F32": np.uint32}

    def numbers(tensor: TensorInfo) -> Iterator[Any]:
        for piece in pieces(tensor):
            yield np.frombuffer(piece, dtypes.get(tensor.dtype, np.uint16))

    crow, column, values = (parts[part] for part in ORTHO_PARTS)
    try:
        check_csr(
            # Only crow is held: rows + 1 numbers, and base has a row of words for each.
            np.concatenate(list(numbers(crow))),
            numbers(column),
            numbers(values),
            nnz=column.numel,
            width=artifact.shapes[module][1],
            dtype=values.dtype,
            prefix=f"{module}.",
        )
    except ArtifactError as error:
        raise damaged(ortho.path, error.message) from None


def file_digest(path: Path, algorithm: str = "blake3", *, on_event: EventSink = null_sink) -> str:
    """Digest a file's bytes: BLAKE3, or SHA-256 as the older formats have it."""
    digest = blake3() if algorithm == "blake3" else hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK))
    with path.open("rb", buffering=0) as file:
        while got := file.readinto(buffer):
            digest.update(buffer[:got])
            on_event(Advanced(nbytes=got))
    return digest.hexdigest()
