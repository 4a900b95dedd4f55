"""Memory and cores that this process may have: the machine's, or what a container leaves of them.

    memory = min(MemAvailable, limit - used + page cache   of each control group it is in)
             + what it holds already, beside files that it maps
    cores  = min(cores it may run on, ceil(quota / period)   of each control group it is in)

The page cache is given back before a group is at its limit, whichever of its lists it is on.

A container sees memory and cores of its whole machine in /proc. It is killed at the memory limit of
its control group. At the limit of time all its threads stop until the next period.

Sources: proc(5), and the kernel's pages on control groups, version 1 and 2.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import NamedTuple

# Share of the cores that others keep busy, from which on threads that wait should sleep. OpenMP's
# spin for some milliseconds, on a core that others need. On two cores with one busy process
# `ortho bench` of a small model took 28 s and 15 s, `calibrate` of SmolLM2 40 s and 24 s; on a
# quiet machine sleeping costs 5 to 30 %.
BUSY = 0.25


class _Files(NamedTuple):
    """Names of the files of one version of control groups."""

    limit: str
    used: str
    cache: tuple[str, str]  # keys in memory.stat of the page cache


V1 = _Files(
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
)
V2 = _Files("memory.max", "memory.current", ("inactive_file", "active_file"))


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


def cores(root: Path = Path("/")) -> int:
    """Count the cores that this process may keep busy, 1 or more.

    Args:
        root: the folder that has proc and sys.
    """
    return max(1, min([_allowed(), *_cores_by_groups(root)]))


def settle_threads(environment: MutableMapping[str, str], root: Path = Path("/")) -> None:
    """Tell OpenMP how many cores there are, and to sleep while it waits where they are busy.

    It reads the environment when torch loads it, so this comes first. Settings of the user stay.

    Args:
        environment: of this process; changed.
        root: the folder that has proc and sys.
    """
    ours = cores(root)
    if ours < _allowed():
        environment.setdefault("OMP_NUM_THREADS", str(ours))
    if _running(root) - ((os.cpu_count() or 1) - ours) > BUSY * ours:
        environment.setdefault("OMP_WAIT_POLICY", "passive")


def _running(root: Path) -> float:
    """Count the threads beside ours that want a core: now, and as a mean of the last minute.

    It is the less of both: the mean counts what has ended, and a moment tells little.
    """
    told = "".join(_lines(root / "proc/loadavg")[:1]).split()  # 0.42 0.30 0.25 2/341 9876
    return min(float(told[0]), int(told[3].partition("/")[0]) - 1) if len(told) == 5 else 0.0


def _allowed() -> int:
    """Count the cores that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on every system
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _cores_by_groups(root: Path) -> Iterator[int]:
    """Yield the cores whose time each of our control groups and its parents may use."""
    for group, version in _groups(root, "cpu"):
        if version == 2:
            words = " ".join(_lines(group / "cpu.max")).split()
        else:
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            words = [word for name in names for word in _lines(group / name)]
        if len(words) == 2 and words[0] not in ("max", "-1"):
            yield -(-int(words[0]) // int(words[1]))


def _left_by_groups(root: Path) -> Iterator[int]:
    """Yield what each of our control groups and its parents may still take, if it has a limit."""
    for group, version in _groups(root, "memory"):
        yield from _left(group, V1 if version == 1 else V2)


def _groups(root: Path, controller: str) -> Iterator[tuple[Path, int]]:
    """Yield the folder of each of our control groups and its parents, and its version."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / (controller if controllers else "")
        inner = [part for part in path.split("/") if part]
        if ".." in inner:  # of a group above the folder that we see
            inner = []
        for depth in range(len(inner) + 1):
            yield top.joinpath(*inner[:depth]), 1 if controllers else 2


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
