"""Seconds that pieces of work take on this machine, each timed once and kept in the user's cache.

    ~/.cache/ortho/speeds-<hash>.json: {"machine": {...}, "seconds": {"what was timed": seconds}}

The hash is of the machine: processor, cores, threads, torch, and how busy it is, since a machine
that is shared is slower. A file that is damaged, or of another machine, is measured anew; a folder
that cannot be written costs the measuring again, and is no error.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from blake3 import blake3

from ortho_cli.storage.machine import cores
from ortho_cli.storage.work_folder import user_cache

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # of torch, where the user sets them
BUSIEST = 8  # waiting processes per core, beyond which one measurement serves all
MOST_BYTES = 1 << 20  # of a file that is ours; a longer one is not read


@dataclass(slots=True)
class Speeds:
    """What has been timed on this machine; made by `open_speeds`."""

    file: Path
    machine: dict[str, object]
    seconds: dict[str, float] = field(default_factory=dict)

    def of(self, what: str, measure: Callable[[], float]) -> float:
        """Give the seconds of a piece of work, timed now if that was never done here.

        Args:
            what: names the piece, with everything that its time depends on.
            measure: does it, and returns seconds, > 0.
        """
        if what not in self.seconds:
            self.seconds[what] = max(measure(), 1e-12)
            self._save()
        return self.seconds[what]

    def _save(self) -> None:
        """Write the file whole or not at all; another process may have written it meanwhile."""
        content = {"machine": self.machine, "seconds": self.seconds}
        with contextlib.suppress(OSError):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            handle, part = tempfile.mkstemp(dir=self.file.parent, prefix=f".{self.file.name}.")
            try:
                with os.fdopen(handle, "w") as out:
                    json.dump(content, out, indent=1)
                Path(part).replace(self.file)
            except OSError:
                Path(part).unlink(missing_ok=True)


def open_speeds() -> Speeds:
    """Open what is known of this machine; nothing is timed yet, and torch is not imported."""
    machine = _machine()
    name = blake3(json.dumps(machine, sort_keys=True).encode()).hexdigest(8)
    file = user_cache() / f"speeds-{name}.json"
    return Speeds(file, machine, _read(file, machine))


def _machine() -> dict[str, object]:
    """List what speeds depend on."""
    ours = cores()
    return {
        "processor": _processor(),
        "cores": ours,
        "threads": [os.environ.get(name, "") for name in THREADS],
        "torch": metadata.version("torch"),
        "busy": _busy(ours),
    }


def _busy(ours: int) -> int:
    """Count the processes per core that ran or waited in the last minute, as a power of two."""
    try:
        load = os.getloadavg()[0] / ours
    except OSError:
        return 0
    return 0 if load < 1.5 else 1 << round(math.log2(min(load, BUSIEST)))


def _processor() -> str:
    """Name the processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _read(file: Path, machine: dict[str, object]) -> dict[str, float]:
    """Read what was timed; nothing of a file that is damaged or tells of another machine."""
    try:
        if file.stat().st_size > MOST_BYTES:
            return {}
        content = json.loads(file.read_bytes())
        found = content["seconds"] if content["machine"] == machine else {}
        timed = {str(what): float(seconds) for what, seconds in found.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}
    return timed if all(0 < one < math.inf for one in timed.values()) else {}
