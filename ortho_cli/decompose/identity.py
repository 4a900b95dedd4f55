"""The identity of a run: only a run of equal identity resumes its unfinished work."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import metadata

from ortho_cli.decompose.plan import Plan
from ortho_cli.decompose.survey import KEY, digest_of
from ortho_cli.formats.artifact import BASE_FILE, ORTHO_FILE
from ortho_cli.storage.checkpoint import Checkpoint, Shard
from ortho_cli.storage.sealing import Seal, scratch_bytes
from ortho_cli.version import __version__


def identity_of(
    plan: Plan, checkpoint: Checkpoint, seal: Seal | None, **more: object
) -> dict[str, object]:
    """List everything that the bytes depend on, and the sizes of the files that hold them.

    Args:
        plan: made from `checkpoint`.
        checkpoint: the source.
        seal: recipients of ortho, if it is sealed.
        more: further dependencies, as JSON; None counts as absent.
    """
    found: dict[str, object] = {
        "plan": plan.sha256,
        "source": stamps(checkpoint.shards),
        "version": [__version__, metadata.version("torch")],
        **_sizes(plan, seal),
        **{name: value for name, value in more.items() if value is not None},
    }
    if seal is not None:
        found["seal"] = seal.identity
    if plan.statistics is not None:
        found["statistics"] = stamps([plan.statistics.shard])[0]
    if plan.reference is not None:
        found["reference"] = stamps(plan.reference.shards)
    if plan.surveys:
        found[KEY] = digest_of(plan.surveys)
    return found


def stamps(shards: Iterable[Shard]) -> list[list[str | int]]:
    """List name, size and time of files: a file of other stamps is another file."""
    return [[shard.name, shard.size, shard.mtime_ns] for shard in shards]


def _sizes(plan: Plan, seal: Seal | None) -> dict[str, dict[str, int]]:
    """List the sizes of the files that work writes; ortho is made from a scratch file."""
    base, ortho = {BASE_FILE: plan.base.size}, {ORTHO_FILE: plan.ortho.size}
    if seal is not None:
        return {"files": base, "scratch": {ORTHO_FILE: scratch_bytes(plan.ortho, seal)}}
    return {"files": base, "scratch": ortho} if plan.is_compact else {"files": base | ortho}
