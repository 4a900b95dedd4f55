"""Reading an artifact back, every byte of it, against every digest and rule of the format."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from ortho_cli import checkpoint
from ortho_cli.artifact import BASE_FILE, INDEX_FILE, ORTHO_FILE, REPORT_FILE, Artifact, damaged
from ortho_cli.checkpoint import Shard, TensorInfo
from ortho_cli.errors import ArtifactError, CheckpointError
from ortho_cli.events import Advanced, EventSink, Started, null_sink

CHUNK = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """What `verify` read and found sound."""

    base_sha256: str
    ortho_sha256: str | None
    tensors: int
    bytes: int
    against_report: bool


def verify(artifact: Artifact, *, on_event: EventSink = null_sink) -> Verified:
    """Read every byte of an artifact and check it against every digest and rule of the format.

    Without report.json only the pair's own digest is there to check against, and `against_report`
    says so.

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
    for file in files:
        digests = _reported_digests(artifact, file) if artifact.report is not None else {}
        for tensor in file.tensors:
            _verify_tensor(file, tensor, digests.get(tensor.name), on_event)
    _verify_index(artifact)
    if artifact.ortho is not None:
        for module in artifact.split:
            _verify_csr(artifact, artifact.ortho, module)
    sums = {file.name: file_sha256(file.path, on_event=on_event) for file in files}
    claims = [(BASE_FILE, told.get("base_sha256"))]
    if artifact.ortho is not None:
        claims += [
            (BASE_FILE, artifact.ortho.metadata.get("base_sha256")),
            (ORTHO_FILE, told.get("ortho_sha256")),
        ]
    for name, claim in claims:
        if claim is not None and claim != sums[name]:
            raise ArtifactError(
                f"`{artifact.folder / name}` has SHA-256 {sums[name][:12]} where "
                f"{str(claim)[:12]} was written",
                hint="the file is damaged or belongs to another artifact",
            )
    return Verified(
        base_sha256=sums[BASE_FILE],
        ortho_sha256=sums.get(ORTHO_FILE),
        tensors=sum(len(file.tensors) for file in files),
        bytes=size,
        against_report=artifact.report is not None,
    )


def _reported_digests(artifact: Artifact, file: Shard) -> dict[str, str]:
    listed = (artifact.report or {}).get("tensors")
    found: dict[str, str] = {}
    for entry in listed if isinstance(listed, list) else []:
        digests = entry.get("blake3") if isinstance(entry, dict) else None
        mine = digests.get(file.name) if isinstance(digests, dict) else None
        found.update(mine if isinstance(mine, dict) else {})
    for tensor in file.tensors:
        if not isinstance(found.get(tensor.name), str):
            raise damaged(
                artifact.folder / REPORT_FILE, f"no digest of tensor `{tensor.name}` of {file.name}"
            )
    return found


def _verify_tensor(file: Shard, tensor: TensorInfo, claim: str | None, on_event: EventSink) -> None:
    digest = blake3()
    for piece in _pieces(file, tensor):
        digest.update(piece)
        on_event(Advanced(nbytes=len(piece)))
    if claim is not None and digest.hexdigest() != claim:
        raise ArtifactError(
            f"tensor `{tensor.name}` of `{file.path}` has BLAKE3 {digest.hexdigest()[:12]} "
            f"where {claim[:12]} was written",
            hint="the file is damaged; restore it, or decompose the source again",
        )


def _pieces(file: Shard, tensor: TensorInfo) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(CHUNK))
    fd = os.open(file.path, os.O_RDONLY)
    try:
        for start in range(0, tensor.nbytes, CHUNK):
            piece = buffer[: min(CHUNK, tensor.nbytes - start)]
            checkpoint.fill(fd, piece, tensor.offset + start, what=f"`{file.path}`")
            yield piece
    finally:
        os.close(fd)


def _verify_index(artifact: Artifact) -> None:
    path = artifact.folder / INDEX_FILE
    keys = {tensor.name for tensor in artifact.base.tensors}
    try:
        listed = checkpoint.read_json_object(path).get("weight_map") if path.is_file() else None
    except CheckpointError as error:
        raise ArtifactError(error.message, hint=error.hint) from None
    if listed != dict.fromkeys(keys, BASE_FILE):
        raise damaged(
            path, f"it does not send all {len(keys)} keys of base, and no other, to {BASE_FILE}"
        )


def _verify_csr(artifact: Artifact, ortho: Shard, module: str) -> None:
    import numpy as np

    tensors = {t.name: t for t in (*artifact.base.tensors, *ortho.tensors)}
    packed = tensors[f"{module}.weight_packed"]
    rows, columns = packed.shape[0], packed.shape[1] * 8
    numpy_dtypes = {"I32": np.int32, "I64": np.int64, "U16": np.uint16}

    def load(part: str) -> Any:
        tensor = tensors[f"{module}.{part}"]
        return np.frombuffer(b"".join(_pieces(ortho, tensor)), numpy_dtypes[tensor.dtype]).astype(
            np.int64
        )

    crow, column = load("crow_indices"), load("col_indices")
    shape = tensors[f"{module}.weight_shape"]
    said = np.frombuffer(b"".join(_pieces(artifact.base, shape)), np.int64).tolist()
    if said != [rows, columns]:
        raise damaged(
            artifact.base.path,
            f"`{module}.weight_shape` says {said} and its codes {[rows, columns]}",
        )
    if crow[0] != 0 or crow[-1] != column.size or (np.diff(crow) < 0).any():
        raise damaged(ortho.path, f"`{module}.crow_indices` does not climb from 0 to {column.size}")
    if column.size and (column.min() < 0 or column.max() >= columns):
        raise damaged(
            ortho.path, f"`{module}.col_indices` names column {int(column.max())} of {columns}"
        )
    climbs = np.diff(column) > 0
    starts = crow[1:-1]
    climbs[starts[(starts > 0) & (starts < column.size)] - 1] = True
    if not climbs.all():
        row = int(np.searchsorted(crow, int(np.flatnonzero(~climbs)[0]), side="right")) - 1
        raise damaged(ortho.path, f"`{module}.col_indices` does not ascend in row {row}")


def file_sha256(path: Path, *, on_event: EventSink = null_sink) -> str:
    """SHA-256 of a file's bytes, as `sha256sum` prints it."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK))
    with path.open("rb", buffering=0) as file:
        while got := file.readinto(buffer):
            digest.update(buffer[:got])
            on_event(Advanced(nbytes=got))
    return digest.hexdigest()
