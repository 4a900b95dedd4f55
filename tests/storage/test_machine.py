"""Memory and cores: of the machine, and of the control groups that a process is in."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ortho_cli.storage.machine import available_memory, cores, resident_bytes, settle_threads


def system(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": "MemFree: 1 kB\nMemAvailable:  4000 kB\n", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 4000 << 10),
        ({"proc/self/cgroup": "0::/\n"}, 4000 << 10),
        (
            {
                "proc/self/cgroup": "0::/\n",
                "sys/fs/cgroup/memory.max": "1000000\n",
                "sys/fs/cgroup/memory.current": "700000\n",
                "sys/fs/cgroup/memory.stat": "anon 5\ninactive_file 200000\nactive_file 50000\n",
                "proc/self/status": "VmRSS: 90 kB\nRssAnon:\t  60 kB\nRssFile: 30 kB\n",
            },
            550_000 + (60 << 10),
        ),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/memory.max": "900000\n",
                "sys/fs/cgroup/a/memory.current": "100000\n",
                "sys/fs/cgroup/a/b/memory.max": "max\n",
                "sys/fs/cgroup/a/b/memory.current": "50000\n",
            },
            800_000,
        ),
        (
            {
                "proc/self/cgroup": "9:cpu,cpuacct:/x\n4:memory:/../..\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "600000\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "700000\n",
                "sys/fs/cgroup/memory/memory.stat": "active_file 9000\ntotal_active_file 70000\n",
            },
            0,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/x\n",
                "sys/fs/cgroup/memory/x/memory.limit_in_bytes": "900000\n",
                "sys/fs/cgroup/memory/x/memory.usage_in_bytes": "700000\n",
                "sys/fs/cgroup/memory/x/memory.stat": "active_file 9\ntotal_active_file 70000\n",
            },
            270_000,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/x\n",
                "sys/fs/cgroup/memory/x/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/x/memory.usage_in_bytes": "700000\n",
            },
            4000 << 10,
        ),
    ],
    ids=[
        *("no groups", "no limit", "container", "parent"),
        *("version 1, full", "version 1", "version 1, no limit"),
    ],
)
def test_the_least_that_the_machine_and_any_group_leave_is_available(
    files: dict[str, str], free: int, tmp_path: Path
) -> None:
    assert available_memory(system(tmp_path, files)) == free


def test_what_this_process_holds_is_told() -> None:
    before = resident_bytes()
    assert before is not None
    held = bytearray(64 << 20)
    after = resident_bytes()
    assert after is not None
    assert after - before > len(held) // 2


def test_a_system_that_does_not_say_is_asked_in_vain(tmp_path: Path) -> None:
    assert available_memory(tmp_path) is None


@pytest.mark.parametrize(
    ("files", "most"),
    [
        ({}, 1 << 20),
        ({"proc/self/cgroup": "0::/\n"}, 1 << 20),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 1 << 20),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "250000 100000\n"}, 3),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "1000 100000\n"}, 1),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/cpu.max": "200000 100000\n",
                "sys/fs/cgroup/a/b/cpu.max": "700000 100000\n",
            },
            2,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/x\n1:cpu,cpuacct:/x\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "500000\n",
                "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000\n",
            },
            5,
        ),
    ],
)
def test_cores_are_those_of_the_container(
    files: dict[str, str], most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert cores(system(tmp_path, files)) == min(64, most)


@pytest.mark.parametrize(
    ("load", "running", "quota", "set_before", "settled"),
    [
        (0.0, 1, "max", {}, {}),
        (20.0, 21, "max", {}, {"OMP_WAIT_POLICY": "passive"}),
        (20.0, 1, "max", {}, {}),
        (0.1, 21, "max", {}, {}),
        (60.0, 61, "200000", {}, {"OMP_NUM_THREADS": "2"}),
        (63.0, 64, "200000", {}, {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}),
        (
            63.0,
            64,
            "200000",
            {"OMP_NUM_THREADS": "7", "OMP_WAIT_POLICY": "active"},
            {"OMP_NUM_THREADS": "7", "OMP_WAIT_POLICY": "active"},
        ),
    ],
)
def test_threads_fit_the_container_and_sleep_where_cores_are_busy(
    load: float,
    running: int,
    quota: str,
    set_before: dict[str, str],
    settled: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    files = {
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/cpu.max": f"{quota} 100000\n",
        "proc/loadavg": f"{load} 0.30 0.25 {running}/341 9876\n",
    }
    environment = dict(set_before)
    settle_threads(environment, system(tmp_path, files))
    assert environment == settled
