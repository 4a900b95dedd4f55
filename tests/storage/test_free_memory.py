"""Memory that is free: of the machine, and of the control groups that a process is in."""

from __future__ import annotations

from pathlib import Path

import pytest

from ortho_cli.storage.free_memory import available_memory, resident_bytes


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
