"""Finished parts of long work, kept by time, so that the same work resumes after a kill.

    file   lines of `<BLAKE3> <block>`, for their owner alone; a block is JSON, `[[name, n, value],
           ...]`, or that sealed by age and in base64

`Parts.each` measures one item after another, and takes from the file those that an earlier run
measured. What is finished goes to the file every SAVE_SECONDS: a kill costs at most these and the
part that was at work. A line that was cut or damaged counts as work to be done again.

`Pace` says when state that is written whole is due: after as many seconds, and never so often that
writing takes more than a tenth of the time.
"""

from __future__ import annotations

import base64
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from blake3 import blake3

from ortho_cli.errors import InternalError, ResourceError
from ortho_cli.events import EventSink, Noted, null_sink
from ortho_cli.storage.disk import sync
from ortho_cli.storage.sealing import WorkKey
from ortho_cli.storage.untrusted import read_regular
from ortho_cli.storage.work_folder import writing

SAVE_SECONDS = 30.0  # from one save to the next: half of what a kill may cost
LARGEST_SHARE = 0.1  # of the time, that writing state may take

T = TypeVar("T")
V = TypeVar("V")


class Pace:
    """Tells when state is due to be saved."""

    def __init__(self) -> None:
        """Count from now on."""
        self._saved, self._took = time.monotonic(), 0.0

    def due(self) -> bool:
        """Whether the last save is long enough ago."""
        return time.monotonic() - self._saved >= max(SAVE_SECONDS, self._took / LARGEST_SHARE)

    def save(self, write: Callable[[], object]) -> None:
        """Write the state, and count from then on."""
        began = time.monotonic()
        write()
        self._saved = time.monotonic()
        self._took = self._saved - began


def unchanged(value: V) -> V:
    """Give a value that JSON holds as it is."""
    return value


class Parts:
    """Finished parts of a piece of work, by name and number; those of `open_parts` are in a file.

    Without a file nothing is kept.
    """

    def __init__(self, log: _Log | None = None, prefix: str = "") -> None:
        """Begin a stage whose names have this prefix."""
        self._log, self._prefix = log, prefix

    def at(self, name: str) -> Parts:
        """Give the parts of one stage, whose names are its own."""
        return Parts(self._log, f"{self._prefix}{name}/")

    def each(
        self,
        name: str,
        items: Sequence[T],
        measure: Callable[[T], V],
        *,
        write: Callable[[V], object] = unchanged,
        read: Callable[[Any], V] = unchanged,
    ) -> list[V]:
        """Measure each item, but those that an earlier run has measured.

        Args:
            name: of these items, once for each stage.
            items: as many and the same ones in each run.
            measure: gives the value of one; called in their order.
            write: turns a value into what JSON holds; floats stay the same to the bit.
            read: turns that back.
        Returns:
            The values in the order of the items.
        """
        log, whole = self._log, f"{self._prefix}{name}"
        if log is None:
            return [measure(item) for item in items]
        found: list[V] = []
        for held in log.take(whole)[: len(items)]:
            try:
                found.append(read(held))
            except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
                log.tell_damage()
                break
        for number in range(len(found), len(items)):
            value = measure(items[number])
            log.add(whole, number, write(value))
            found.append(value)
        return found

    def once(
        self,
        name: str,
        measure: Callable[[], V],
        *,
        write: Callable[[V], object] = unchanged,
        read: Callable[[Any], V] = unchanged,
    ) -> V:
        """Measure one value, unless an earlier run has; see `each`."""
        return self.each(name, [None], lambda _: measure(), write=write, read=read)[0]

    def save(self) -> None:
        """Write what is finished now."""
        if self._log is not None:
            self._log.save()

    @property
    def left(self) -> int:
        """How many names of this stage an earlier run kept, and this one has not asked for."""
        return 0 if self._log is None else self._log.count(self._prefix)

    @property
    def kept(self) -> bool:
        """Whether what is finished is in a file, which can be written."""
        return self._log is not None and self._log.writes


def open_parts(file: Path, key: WorkKey | None = None, on_event: EventSink = null_sink) -> Parts:
    """Open the file of a piece of work, and read what an earlier run has finished.

    Args:
        file: where parts are kept, in a folder that is there; of the very same work, or absent.
        key: seals them.
        on_event: told where parts are damaged, or where the file cannot be written any more.
    Raises:
        OSError: the file cannot be read.
    """
    return Parts(_Log(file, key, on_event))


class _Log:
    """The file of finished parts, and those that are not in it yet."""

    def __init__(self, file: Path, key: WorkKey | None, on_event: EventSink) -> None:
        self._file, self._key, self._on_event = file, key, on_event
        self._held: dict[str, dict[int, object]] = {}
        self._new: list[tuple[str, int, object]] = []
        self._taken: set[str] = set()
        self._pace = Pace()
        self._told = False
        self.writes = True
        if file.exists():
            self._read()

    def _read(self) -> None:
        lines = read_regular(self._file).split(b"\n")
        for line in filter(None, lines[:-1]):  # behind the last newline is what a kill cut
            try:
                digest, _, block = line.partition(b" ")
                if blake3(block).hexdigest().encode() != digest:
                    raise ValueError("it is damaged")
                if self._key is not None:
                    block = self._key.open(base64.b64decode(block))
                for name, number, value in json.loads(block):
                    self._held.setdefault(name, {})[number] = value
            except (ValueError, TypeError, RecursionError):
                self.tell_damage()

    def tell_damage(self) -> None:
        """Note, once, that not all that was kept can be used."""
        if not self._told:
            self._told = True
            message = f"some of what an earlier run kept in `{self._file}` is damaged"
            self._on_event(Noted(message=f"{message}, and is measured again"))

    def take(self, name: str) -> list[object]:
        """Give the values of a name from the first on, as far as there is no gap."""
        if name in self._taken:
            raise InternalError(f"two stages of the work keep their parts as `{name}`")
        self._taken.add(name)
        held: Mapping[int, object] = self._held.pop(name, {})
        found: list[object] = []
        while len(found) in held:
            found.append(held[len(found)])
        return found

    def count(self, prefix: str) -> int:
        """Count the names with a prefix that were kept and not taken."""
        return sum(name.startswith(prefix) for name in self._held)

    def add(self, name: str, number: int, value: object) -> None:
        """Count a part as finished."""
        if self.writes:
            self._new.append((name, number, value))
            if self._pace.due():
                self.save()

    def save(self) -> None:
        """Write what is not in the file yet; where that fails, go on without."""
        if not (self.writes and self._new):
            return
        try:
            self._pace.save(self._append)
        except ResourceError as error:
            self.writes = False
            self._on_event(Noted(message=f"{error}: what is finished from now on is not kept"))

    def _append(self) -> None:
        """Append a line; the newline before it ends one that an interrupt cut."""
        block = json.dumps(self._new, separators=(",", ":")).encode()
        if self._key is not None:
            block = base64.b64encode(self._key.seal(block))
        line = memoryview(b"\n%b %b\n" % (blake3(block).hexdigest().encode(), block))
        with writing(self._file):
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            fd = os.open(self._file, flags, 0o600)
            try:
                while line:
                    line = line[os.write(fd, line) :]
                sync(fd)
            finally:
                os.close(fd)
        self._new.clear()
