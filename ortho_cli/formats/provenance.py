"""Where an artifact comes from: its source, recipe, plan and the version that made it."""

from __future__ import annotations

import json
from typing import Any

from ortho_cli.errors import ArtifactError
from ortho_cli.events import Advanced, EventSink, Started, null_sink
from ortho_cli.formats.artifact import (
    ORTHO_FILE,
    REPORT_FILE,
    Artifact,
    canonical_json,
    damaged,
    source_digest,
)
from ortho_cli.storage.checkpoint import Checkpoint, ShardReader


def provenance(artifact: Artifact) -> dict[str, Any]:
    """Say what an artifact was made from, and by what.

    Returns:
        `plan_sha256`, `recipe`, `versions` and `source_digest`, as report.json has them; the last
        is None for a base that is alone, without report.json.
    Raises:
        ArtifactError: a header and report.json, or two headers, tell different origins.
    """
    base = artifact.base.metadata
    ortho = artifact.ortho.metadata if artifact.ortho else {}
    found: dict[str, Any] = {
        "plan_sha256": base.get("plan_sha256"),
        "recipe": _recipe(artifact, base.get("recipe")),
        "versions": {"ortho": base.get("ortho_version")},
        "source_digest": ortho.get("source_digest"),
    }
    told = [("plan_sha256", base), ("recipe", base), ("ortho_version", base)]
    if ortho:
        for key, header in told:
            if ortho.get(key) != header.get(key):
                raise _differs(key, ORTHO_FILE, ortho.get(key), artifact.base.name, header.get(key))
        told.append(("source_digest", ortho))
    if artifact.report is None:
        return found
    report = artifact.report
    said = {**report, "recipe": canonical_json(report["recipe"])}
    said["ortho_version"] = report["versions"]["ortho"]
    for key, header in told:
        if said[key] != header.get(key):
            file = ORTHO_FILE if header is ortho else artifact.base.name
            raise _differs(key, REPORT_FILE, said[key], file, header.get(key))
    return {key: report[key] for key in found}


def _recipe(artifact: Artifact, text: str | None) -> dict[str, Any]:
    try:
        found = json.loads(text or "")
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise damaged(artifact.base.path, "its header holds no recipe")
    return found


def _differs(key: str, file: str, value: Any, other: str, told: Any) -> ArtifactError:
    return ArtifactError(
        f"`{key}` is {str(value)[:64]} in {file} and {str(told)[:64]} in {other}",
        hint="put back the files that were written together",
    )


def check_source(
    told: dict[str, Any], source: Checkpoint, *, on_event: EventSink = null_sink
) -> int:
    """Hold every byte of a checkpoint against what an artifact was made from.

    Args:
        told: what `verify.describe` says of the artifact.
        source: the checkpoint; its sharding does not matter.
        on_event: told of progress.
    Returns:
        How many tensors were read.
    Raises:
        ArtifactError: the artifact knows nothing of its source, or `source` is another; names the
            first tensor that differs where report.json is there.
    """
    if told["source_digest"] is None:
        raise ArtifactError(
            f"a base without {REPORT_FILE} and {ORTHO_FILE} holds no digest of its source",
            hint="put one of them back",
        )
    where = f"`{source.path}`"
    known = {entry["name"]: entry for entry in told["tensors"] if "source_blake3" in entry}
    tensors = {tensor.name: tensor for tensor in source.tensors}
    for name in sorted(known.keys() ^ tensors.keys()) if known else ():
        has = "has no" if name in known else "has a"
        raise _other(f"{where} {has} tensor `{name}`, unlike the source of the artifact")
    total = sum(tensor.nbytes for tensor in source.tensors)
    on_event(Started(tensors=len(tensors), resumed=0, bytes_total=total, bytes_done=0))
    listed, reader = [], ShardReader(source)
    try:
        for name, tensor in tensors.items():
            mine = (tensor.dtype, list(tensor.shape), reader.digest(tensor))
            on_event(Advanced(nbytes=tensor.nbytes))
            entry = known.get(name, {})
            theirs = (entry.get("dtype"), entry.get("shape"), entry.get("source_blake3"))
            if known and mine != theirs:
                raise _other(
                    f"tensor `{name}` of {where} is {_words(*mine)}, and the artifact was made "
                    f"from {_words(*theirs)}"
                )
            listed.append((name, tensor.dtype, tensor.shape, mine[2]))
        reader.check_unchanged()
    finally:
        reader.close()
    digest = source_digest(listed)
    if digest != told["source_digest"]:
        raise _other(
            f"{where} has digest {digest[:12]}, and the artifact was made from "
            f"{told['source_digest'][:12]}"
        )
    return len(listed)


def _words(dtype: Any, shape: Any, digest: Any) -> str:
    return f"{dtype} {shape} {str(digest)[:12]}"


def _other(sentence: str) -> ArtifactError:
    return ArtifactError(sentence, hint="this artifact was made from another checkpoint")
