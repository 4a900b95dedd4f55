"""Memory that this process may have: what the system has, or what a container leaves of it.

    available = min(MemAvailable, limit - used + page cache   of each control group it is in)
                + what it holds already, beside files that it maps

The page cache is given back before a group is at its limit, whichever of its lists it is on.

A container sees the memory of its whole machine in /proc/meminfo, and is killed at the limit of its
control group.

Sources: proc(5), and the kernel's pages on control groups, version 1 and 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class _Files(NamedTuple):
    """Names of the files of one version of control groups, and where its groups are."""

    top: str
    limit: str
    used: str
    cache: tuple[str, str]  # keys in memory.stat of the page cache


V1 = _Files(
    "sys/fs/cgroup/memory",
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
)
V2 = _Files("sys/fs/cgroup", "memory.max", "memory.current", ("inactive_file", "active_file"))


def available_memory(root: Path = Path("/")) -> int | None:
    """Give the bytes of memory that we may have in all; None where the system does not say.

    Args:
        root: the folder that has proc and sys.
    """
    told = (line.split() for line in _lines(root / "proc/meminfo"))
    free = [int(words[1]) << 10 for words in told if words[0] == "MemAvailable:"]
    least = min([*free, *_left_by_groups(root)], default=None)
    return None if least is None else least + (_own(root, "RssAnon") or 0)


def resident_bytes() -> int | None:
    """Give the bytes of this process that are in memory now; None where the system does not say."""
    return _own(Path("/"), "VmRSS")


def _own(root: Path, what: str) -> int | None:
    told = (line.split() for line in _lines(root / "proc/self/status"))
    return next((int(words[1]) << 10 for words in told if words[0] == f"{what}:"), None)


def _left_by_groups(root: Path) -> Iterator[int]:
    """Yield what each of our control groups and its parents may still take, if it has a limit."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        files = V1 if controllers else V2
        top = root / files.top
        inner = [part for part in path.split("/") if part]
        if ".." in inner:  # of a group above the folder that we see
            inner = []
        for depth in range(len(inner) + 1):
            yield from _left(top.joinpath(*inner[:depth]), files)


def _left(group: Path, files: _Files) -> Iterator[int]:
    limit, used = (_lines(group / name) for name in (files.limit, files.used))
    if not limit or not used or limit[0] == "max":
        return
    told = (line.split() for line in _lines(group / "memory.stat"))
    cache = sum(int(words[1]) for words in told if words[0] in files.cache)
    yield max(0, int(limit[0]) - int(used[0]) + cache)


def _lines(file: Path) -> list[str]:
    """Read a file of the kernel; nothing where there is none, or it may not be read."""
    try:
        return file.read_text().splitlines()
    except OSError:
        return []
