"""Provenance of an artifact: its source, recipe, plan and the version that made it."""

from __future__ import annotations

import contextlib
from pathlib import Path

from ortho_cli.errors import ArtifactError, blamed
from ortho_cli.events import EventSink, Started, null_sink
from ortho_cli.formats.artifact import (
    ORTHO_FILE,
    REPORT_FILE,
    Artifact,
    canonical_json,
    source_digest,
)
from ortho_cli.formats.report import Report, read_report, rows_of
from ortho_cli.storage import strict_json
from ortho_cli.storage.checkpoint import Checkpoint, Shard, ShardReader, open_checkpoint
from ortho_cli.storage.stacked import unstack


def provenance(artifact: Artifact, report: Report | None) -> dict[str, object]:
    """Read from the headers where an artifact comes from; hold report.json against them.

    Args:
        artifact: with or without ortho.
        report: its validated report.json, where it has one.
    Returns:
        plan_sha256, recipe, versions and source_digest, which is None for a base that is alone,
        without report.json.
    Raises:
        ArtifactError: a header and report.json, or two headers, tell different origins.
    """
    base, ortho = artifact.base.metadata, artifact.ortho.metadata if artifact.ortho else None
    recipe, keys = recipe_of(artifact.base), ("plan_sha256", "recipe", "ortho_version")
    for key in keys:
        if ortho is not None and ortho.get(key) != base.get(key):
            raise _differs(key, ORTHO_FILE, ortho.get(key), artifact.base.name, base.get(key))
    source = ortho.get("source_digest") if ortho is not None else None
    if report is not None:
        values = (report.plan_sha256, canonical_json(report.recipe), report.versions.ortho)
        for key, value in zip(keys, values, strict=True):
            if value != base.get(key):
                raise _differs(key, REPORT_FILE, value, artifact.base.name, base.get(key))
        if ortho is not None and report.source_digest != source:
            raise _differs("source_digest", REPORT_FILE, report.source_digest, ORTHO_FILE, source)
        source = report.source_digest
    return {
        "plan_sha256": base.get("plan_sha256"),
        "recipe": recipe,
        "versions": {"ortho": base.get("ortho_version")},
        "source_digest": source,
    }


def recipe_of(file: Shard) -> dict[str, object]:
    """Parse the recipe in the header of base or ortho.

    Raises:
        ArtifactError: there is none, or it is no JSON object.
    """
    text = file.metadata.get("recipe", "")
    with blamed(ArtifactError):
        return strict_json.parse(
            text.encode(), what=f"the recipe in `{file.path}`", hint="decompose the source again"
        )


def _differs(key: str, file: str, value: object, other: str, told: object) -> ArtifactError:
    return ArtifactError(
        f"`{key}` is {str(value)[:64]} in {file} and {str(told)[:64]} in {other}",
        hint="put back the files that were written together",
    )


def open_source(artifact: Artifact, path: Path) -> Checkpoint:
    """Open a checkpoint; experts that it stacks are apart, unless the artifact has the stack."""
    kept = {tensor.name for tensor in artifact.base.tensors}
    return unstack(open_checkpoint(path), kept.__contains__)


def check_source(artifact: Artifact, source: Checkpoint, *, on_event: EventSink = null_sink) -> int:
    """Hold every byte of a checkpoint against what an artifact was made from.

    Args:
        artifact: with ortho or report.json.
        source: the checkpoint; its sharding does not matter.
        on_event: told of progress.
    Returns:
        How many tensors were read.
    Raises:
        ArtifactError: the artifact knows nothing of its source, or `source` is another; names the
            first tensor that differs where report.json is there.
    """
    report = read_report(artifact)
    expected = provenance(artifact, report)["source_digest"]
    if not isinstance(expected, str):
        raise ArtifactError(
            f"a base without {REPORT_FILE} and {ORTHO_FILE} holds no digest of its source",
            hint="put one of them back",
        )
    rows = rows_of(report, artifact.folder / REPORT_FILE) if report is not None else ()
    known = {row.name: (row.dtype, row.shape, row.source_blake3) for row in rows}
    where = f"`{source.path}`"
    tensors = {tensor.name: tensor for tensor in source.tensors}
    for name in sorted(known.keys() ^ tensors.keys()) if known else ():
        has = "has no" if name in known else "has a"
        raise _other(f"{where} {has} tensor `{name}`, unlike the source of the artifact")
    total = sum(tensor.nbytes for tensor in source.tensors)
    on_event(Started(tensors=len(tensors), resumed=0, bytes_total=total, bytes_done=0))
    listed = []
    with contextlib.closing(ShardReader(source.shards)) as reader:
        for name, tensor in tensors.items():
            mine = (tensor.dtype, list(tensor.shape), reader.digest(tensor, on_event))
            if known and mine != known[name]:
                raise _other(
                    f"tensor `{name}` of {where} is {_words(*mine)}, and the artifact was made "
                    f"from {_words(*known[name])}"
                )
            listed.append((name, tensor.dtype, tensor.shape, mine[2]))
        reader.check_unchanged()
    digest = source_digest(listed)
    if digest != expected:
        raise _other(
            f"{where} has digest {digest[:12]}, and the artifact was made from {expected[:12]}"
        )
    return len(listed)


def _words(dtype: str, shape: list[int], digest: str | None) -> str:
    return f"{dtype} {shape} {str(digest)[:12]}"


def _other(sentence: str) -> ArtifactError:
    return ArtifactError(sentence, hint="this artifact was made from another checkpoint")
