"""Checks of an output path before anything is written: nothing may be lost, and the disk fits."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from ortho_cli.errors import OutputExistsError, ResourceError, UsageError, reason, remedy
from ortho_cli.storage.checkpoint import Checkpoint
from ortho_cli.storage.disk import check_name, check_writable, free_bytes
from ortho_cli.storage.work_folder import PARTIAL, recover, work_folder

SIDE_BYTES = 2_048  # bytes that index, report and side files take per tensor, about


def resolve_output(out: Path) -> Path:
    """Follow links once, so that work folder, checks and result are on one disk.

    Raises:
        OutputExistsError: OUT is a link that leads round in a circle.
    """
    try:
        return out.resolve()
    except (RuntimeError, OSError):
        raise OutputExistsError(
            f"output `{out}` is a link that leads nowhere", hint="choose another -o"
        ) from None


def files_of(checkpoint: Checkpoint, *more: Path) -> list[Path]:
    """Name what is read: the checkpoint's path as given, its shards, and `more`."""
    return [checkpoint.path, *(shard.path for shard in checkpoint.shards), *more]


def check_output(
    out: Path,
    sources: Iterable[Path],
    *,
    force: bool,
    is_ours: Callable[[Path], bool],
    kind: str = "artifact",
    is_file: bool = False,
) -> None:
    """Refuse an output that would lose something or mix with a source; nothing new is written.

    It first undoes what a run left that was killed at its end: an older output that it had moved,
    or its work folder.

    Args:
        out: where the result would go.
        sources: files and folders that are read.
        force: replace what is there, if `is_ours` says that we made it.
        is_ours: whether a path is a result of the same kind.
        kind: what is made, for messages.
        is_file: the result is a file, not a folder.
    Raises:
        OutputExistsError: OUT is there and `force` is not given, or is nothing of ours.
        UsageError: OUT is a source, or inside one, or a place that cannot be renamed onto.
    """
    target = resolve_output(out)
    place = next(parent for parent in target.parents if parent.exists())
    longest = max((work_folder(target).name, target.name + PARTIAL), key=len)
    check_name(target.name, place, longest=longest)
    for source in sources:
        _check_apart(out, target, source)
    _check_renamable(out, target)
    recover(target)
    if not target.exists():
        return
    if target.is_dir() == is_file:
        there, wanted = ("a folder", "file") if is_file else ("a file", "folder")
        raise OutputExistsError(
            f"output `{out}` is {there}", hint=f"choose another -o; the output is a {wanted}"
        )
    if not is_file and not any(target.iterdir()):
        return
    if not is_ours(target):
        raise OutputExistsError(
            f"output `{out}` exists and is no {kind}",
            hint=f"choose another -o; --force replaces {kind}s only",
        )
    if not force:
        raise OutputExistsError(
            f"output `{out}` exists", hint="choose another -o, or replace it with --force"
        )


def _check_renamable(out: Path, target: Path) -> None:
    """Refuse an output that no folder can be renamed onto."""
    if target == Path.cwd() or os.path.ismount(target):
        what = "the current folder" if target == Path.cwd() else "a mount point"
        raise UsageError(
            f"output `{out}` is {what}, which cannot be replaced as a whole",
            hint="choose a folder inside it",
        )
    blocked = next((p for p in target.parents if p.exists() and not p.is_dir()), None)
    if blocked is not None:
        raise UsageError(f"output `{out}` is under the file `{blocked}`", hint="choose another -o")


def _check_apart(out: Path, target: Path, source: Path) -> None:
    found = source.resolve()
    if target == found or (found.is_dir() and found in target.parents):
        raise UsageError(
            f"output `{out}` is the source `{source}` or inside it", hint="choose another -o"
        )
    if target in found.parents:
        raise UsageError(f"output `{out}` holds the source `{source}`", hint="choose another -o")


def check_space(needed: int, out: Path, *, kind: str = "artifact") -> None:
    """Refuse a disk that is too small; what an earlier run of the same work wrote counts.

    Raises:
        ResourceError: says how much is needed and how much is free.
    """
    target = resolve_output(out)
    place = next(parent for parent in target.parents if parent.exists())
    try:
        check_writable(place)
    except OSError as error:
        raise ResourceError(
            f"cannot write in `{place}`: {reason(error)}", hint=remedy(error)
        ) from None
    work = work_folder(target)
    written = [*(work / "artifact").rglob("*"), *(work / "private").glob("*" + PARTIAL)]
    held = sum(path.stat().st_blocks * 512 for path in written if path.is_file())
    free = free_bytes(place)
    if free is not None and needed - held > free:
        verb = "take" if kind.endswith("s") else "takes"
        raise ResourceError(
            f"`{place}` has {free / 1e6:,.1f} MB free and the {kind} "
            f"{verb} {(needed - held) / 1e6:,.1f} MB",
            hint="free space, or choose another -o",
        )
