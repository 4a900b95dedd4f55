"""Verifying an artifact: every byte against digests and the rules of the format; describing it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from ortho_cli.errors import ArtifactError, blamed
from ortho_cli.events import EventSink, Started, null_sink
from ortho_cli.formats import columns, csr
from ortho_cli.formats.artifact import (
    INDEX_FILE,
    OLD_BASE_FILE,
    OLD_LAYOUTS,
    ORTHO_FILE,
    REPORT_FILE,
    Artifact,
    Parts,
    damage_in,
    damaged,
    spelled,
)
from ortho_cli.formats.provenance import provenance
from ortho_cli.formats.report import Report, read_report, rows_from_headers, rows_of
from ortho_cli.split.dtypes import DTYPES
from ortho_cli.storage import side_files, strict_json
from ortho_cli.storage.checkpoint import Shard, ShardReader, TensorInfo, file_digest
from ortho_cli.storage.sealing import SEALED_FILE


def describe(artifact: Artifact) -> dict[str, object]:
    """Say what an artifact holds, as the JSON that `ortho inspect --json` prints.

    It is report.json, and which files are there. Without report.json tensors and origin come from
    the headers, and what only decompose could measure is left out.

    Raises:
        ArtifactError: report.json is not this artifact's, or no report.
    """
    ortho = artifact.ortho.size if artifact.ortho else None
    present = {artifact.base.name: artifact.base.size, ORTHO_FILE: ortho}
    if artifact.sealed:
        present[SEALED_FILE] = artifact.sealed.stat().st_size
    origin = provenance(artifact, read_report(artifact))
    if artifact.report is not None:
        return {**artifact.report, "files": present}
    return {
        "format": artifact.form,
        **origin,
        "tensors": [row.model_dump(exclude_unset=True) for row in rows_from_headers(artifact)],
        "files": present,
    }


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
    size = sum(file.size for file in artifact.files)
    count = sum(len(file.tensors) for file in artifact.files)
    on_event(Started(tensors=count, resumed=0, bytes_total=2 * size, bytes_done=0))
    report = read_report(artifact)
    provenance(artifact, report)
    with blamed(ArtifactError), contextlib.closing(ShardReader(artifact.files)) as reader:
        for file in artifact.files:
            digests = _reported_digests(artifact, file, report) if report is not None else {}
            for tensor in file.tensors:
                digest = reader.digest(tensor, on_event)
                claim = digests.get(tensor.name, digest)
                if digest != claim:
                    raise ArtifactError(
                        f"tensor `{tensor.name}` of `{file.path}` has BLAKE3 {digest[:12]} "
                        f"where {claim[:12]} was written",
                        hint="the file is damaged; restore it, or decompose the source again",
                    )
        _verify_index(artifact)
        if artifact.ortho is not None:
            _verify_ortho(artifact, artifact.ortho, reader)
    sums = _verify_files(artifact, report, on_event)
    return Verified(
        digest=artifact.digest,
        base=sums[artifact.base.name],
        ortho=sums.get(ORTHO_FILE),
        tensors=count,
        bytes=size,
        checked=_checked(artifact, report),
    )


def _verify_files(artifact: Artifact, report: Report | None, on_event: EventSink) -> dict[str, str]:
    """Hold the digest of each whole file against every claim about it; give the digests."""
    algorithm, base = artifact.digest, artifact.base.name
    sums = {f.name: file_digest(f.path, algorithm, on_event=on_event) for f in artifact.files}
    claims: list[tuple[str, str | None]] = []
    if artifact.ortho is not None:
        claims.append((base, artifact.ortho.metadata.get(f"base_{algorithm}")))
    if artifact.sealed is not None:
        sums[SEALED_FILE] = file_digest(artifact.sealed, algorithm)
    if report is not None:
        names = {"base": base, "ortho": ORTHO_FILE, "sealed": SEALED_FILE}
        claims += [
            (name, report.digest_of(key, algorithm)) for key, name in names.items() if name in sums
        ]
        side, there = report.side_files or {}, side_files.list_files(artifact.folder)
        here = {spelled(name): name for name in there if (artifact.folder / name).is_file()}
        for name in sorted(side.keys() & here.keys()):  # some may be left out, others were added
            sums[here[name]] = file_digest(artifact.folder / here[name], algorithm)
            claims.append((here[name], side[name]))
    for name, claim in claims:
        if claim is not None and claim != sums[name]:
            raise ArtifactError(
                f"`{artifact.folder / name}` has {_SPELLED[algorithm]} {sums[name][:12]} where "
                f"{claim[:12]} was written",
                hint="the file is damaged, was edited, or belongs to another artifact",
            )
    return sums


def _checked(artifact: Artifact, report: Report | None) -> dict[str, str]:
    """Say what each file was held against."""
    found = {file.name: "every digest" for file in artifact.files}
    if report is None:
        alone = "its structure alone: without report.json no digest of it is known"
        found = dict.fromkeys(found, alone)
        if artifact.ortho is not None:
            found[artifact.base.name] = "its digest in ortho"
    if artifact.sealed is not None:
        known = report is not None and report.digest_of("sealed", artifact.digest) is not None
        found[SEALED_FILE] = "its digest in report.json" if known else "nothing"
    return found


def _reported_digests(artifact: Artifact, file: Shard, report: Report) -> dict[str, str]:
    path, written = artifact.folder / REPORT_FILE, _written(artifact, file)
    found: dict[str, str] = {}
    for row in rows_of(report, path):
        found.update((row.blake3 or {}).get(written, {}))
    for tensor in file.tensors:
        if tensor.name not in found:
            raise damaged(path, f"no digest of tensor `{tensor.name}` of {file.name}")
    return found


def _written(artifact: Artifact, file: Shard) -> str:
    """Name a file as it was written: an older base may have been renamed for other readers."""
    renamed = file is artifact.base and artifact.form in OLD_LAYOUTS
    return OLD_BASE_FILE if renamed else file.name


def _verify_index(artifact: Artifact) -> None:
    path = artifact.folder / INDEX_FILE
    keys = {tensor.name for tensor in artifact.base.tensors}
    listed = strict_json.read(path).get("weight_map") if path.is_file() else None
    name = _written(artifact, artifact.base)
    if listed != dict.fromkeys(keys, name):
        raise damaged(
            path, f"it does not send all {len(keys)} keys of base, and no other, to {name}"
        )


def _verify_ortho(artifact: Artifact, ortho: Shard, reader: ShardReader) -> None:
    """Hold the ortho stream of every split weight against the rules of its layout."""
    if not any({"row_counts", "value_scales"} & parts.keys() for parts in artifact.kept.values()):
        verify = _verify_columns if artifact.layout == "columns" else _verify_csr
        parts = artifact.kept  # made anew each time that it is asked for
        for module, (_, width) in artifact.shapes.items():
            with damage_in(ortho.path):
                verify(reader, parts[module], width, f"{module}.")
    else:
        # int8 values need torch, a second to import.
        from ortho_cli.formats.ortho_reader import KeptReader

        with KeptReader(artifact) as kept:
            for module in artifact.split:
                kept.csr(module)


def _verify_csr(reader: ShardReader, parts: Parts, width: int, prefix: str) -> None:
    """Check one weight's CSR piece by piece; only its row pointers are in memory whole."""
    column, values = parts["col_indices"], parts["values"]
    crow = _whole(reader, parts["crow_indices"])
    csr.check_positions(crow, _numbers(reader, column), column.numel, width, prefix)
    csr.check_words(reader.pieces(values), values.dtype, prefix)


def _verify_columns(reader: ShardReader, parts: Parts, width: int, prefix: str) -> None:
    """Check the whole columns of one weight; only their numbers are in memory whole."""
    values = parts["values"]
    columns.check_columns(_whole(reader, parts["col_indices"]), width, prefix)
    csr.check_words(reader.pieces(values), values.dtype, prefix)


def _numbers(reader: ShardReader, info: TensorInfo) -> Iterator[csr.Integers]:
    import numpy as np

    for piece in reader.pieces(info):
        yield np.frombuffer(piece, DTYPES[info.dtype].numpy)


def _whole(reader: ShardReader, info: TensorInfo) -> csr.Integers:
    import numpy as np

    empty = np.empty(0, DTYPES[info.dtype].numpy)
    return np.concatenate([empty, *(piece.copy() for piece in _numbers(reader, info))])
