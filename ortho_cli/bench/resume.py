"""Finished parts of a bench, kept in the user's cache until the command ends.

    ~/.cache/ortho/bench-<hash>/   for its owner alone
        parts      figures by row and number; no text of a secret, no answer of a model
        *.npz      what an attack trains, until its curve is measured; not where ortho is sealed
        key.age    where ortho is sealed: the key of `parts`, locked to what opens ortho

The hash is of everything that decides a figure: the artifact's bytes, name, size and time of every
other file, settings, versions, device, threads. So the same command continues, and its figures are
those of a run that nobody stopped. Speed and memory are measured again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch
from blake3 import blake3

from ortho_cli.bench.plan import Settings
from ortho_cli.errors import Interrupted, OrthoError, OutputExistsError, ResourceError, reason
from ortho_cli.events import EventSink, Finishing, Noted
from ortho_cli.formats.artifact import Artifact, canonical_json
from ortho_cli.model import load as models
from ortho_cli.storage.checkpoint import file_digest
from ortho_cli.storage.locks import Lock
from ortho_cli.storage.parts import Parts, open_parts
from ortho_cli.storage.sealing import SEALED_FILE, Keys, key_beside
from ortho_cli.storage.work_folder import user_cache
from ortho_cli.version import __version__

PARTS_FILE = "parts"
KEEP_SECONDS = 30 * 86_400.0  # of a state that nobody came back for: a month
# Figures of a server are measured again.
SERVER = ("served", "served_models", "served_timeout")
# Settings that decide no figure: where the artifact is, what opens it, what is asked of figures.
NO_FIGURE = ("artifact", "identity", "require", "show_secrets", *SERVER)


@dataclass(slots=True, kw_only=True)
class Kept:
    """What is kept of a bench, and how many of its parts are finished.

    `texts` keeps what a model wrote: like `parts`, but in no file where that would be plain beside
    a sealed ortho. `folder` is for what attacks train, None beside a sealed ortho.
    """

    parts: Parts = field(default_factory=Parts)
    texts: Parts = field(default_factory=Parts)
    folder: Path | None = None
    finished: int = 0
    total: int = 0  # 0 until it is known

    def finish(self, name: str) -> None:
        """Count a part as finished, in this run or in an earlier one."""
        self.parts.at("finished").once(name, lambda: True)
        self.finished += 1

    @property
    def earlier(self) -> int:
        """Parts that an earlier run has finished and this one has not reached."""
        return self.parts.at("finished").left

    def interrupted(self) -> Interrupted:
        """Say what an interrupt left."""
        if not self.parts.kept:
            return Interrupted(
                "interrupted, and no figure is kept", hint="repeat the same command to start again"
            )
        count, of = self.finished + self.earlier, f" of {self.total}" if self.total else ""
        kept = ", which are kept" if count else ""
        return Interrupted(
            f"interrupted with {count}{of} parts finished{kept}",
            hint="repeat the same command to go on from there",
        )


@contextlib.contextmanager
def keep_parts(
    settings: Settings, opened: Artifact, keys: Keys | None, on_event: EventSink
) -> Iterator[Kept]:
    """Keep finished parts of a bench within the block, and remove them where it ends well.

    Args:
        settings: of the bench, whose files are known to be there.
        opened: the artifact.
        keys: what opened its ortho, where that is sealed.
        on_event: told where nothing can be kept, and of what an earlier run left.
    Raises:
        Interrupted: Ctrl-C; says what is kept.
    """
    on_event(Finishing(step="digest the artifact"))
    folder = user_cache() / f"bench-{_identify(settings, opened)}"
    lock, kept, is_ours = Lock(folder, opened.folder), Kept(), False
    try:
        lock.take()
        folder.chmod(0o700)
        _sweep(folder)
        kept, is_ours = _open(folder, opened, keys, on_event), True
    except OutputExistsError:
        on_event(Noted(message="the same bench runs in another process: this one keeps nothing"))
    except (OSError, ResourceError) as error:
        why = reason(error) if isinstance(error, OSError) else str(error)
        on_event(Noted(message=f"this bench keeps nothing: cannot write `{folder}`: {why}"))
    over = False  # whether nobody will come back for what is kept
    try:
        yield kept
        over = True
    except KeyboardInterrupt:
        kept.parts.save()
        raise kept.interrupted() from None
    except OrthoError as error:
        # Memory and disks may do better next time; once another input is repaired, it is another
        # bench.
        over = not isinstance(error, ResourceError | Interrupted)
        raise
    finally:
        kept.parts.save()
        if is_ours and (over or not (folder / PARTS_FILE).exists()):
            lock.remove_folder()
        lock.release()


def _open(folder: Path, opened: Artifact, keys: Keys | None, on_event: EventSink) -> Kept:
    file, sealed = folder / PARTS_FILE, (opened.folder / SEALED_FILE).exists()
    key = key_beside(file, keys) if sealed and keys is not None else None
    parts = open_parts(file, key, on_event)
    if not sealed:
        return Kept(parts=parts, texts=parts, folder=folder)
    return Kept(parts=parts, texts=Parts() if key is None else parts)


def _identify(settings: Settings, opened: Artifact) -> str:
    """Digest everything that decides a figure."""
    told = {
        one.name: _spelled(getattr(settings, one.name))
        for one in dataclasses.fields(settings)
        if one.name not in NO_FIGURE
    }
    here = [path for path in sorted(opened.folder.iterdir()) if path.is_file()]
    packages = [one for one in ("torch", "transformers", "numpy") if find_spec(one) is not None]
    identity = {
        "artifact": {path.name: file_digest(path) for path in here},
        "settings": told,
        "versions": [__version__, *map(metadata.version, packages)],
        "machine": [
            platform.machine(),
            str(models.resolve_device(settings.device)),
            torch.get_num_threads(),
        ],
    }
    return blake3(canonical_json(identity).encode()).hexdigest(16)


def _spelled(value: object) -> object:
    """Spell a setting for the identity: of files name, size and time, as `text.stamps` does.

    No digest of them: it would give short secrets away.
    """
    if isinstance(value, tuple):
        return [_spelled(one) for one in value]
    if not isinstance(value, Path):
        return value
    inside = [*value.glob("*"), *value.glob("*/*")] if value.is_dir() else [value]
    files = [path for path in sorted(inside) if not path.is_dir() and path.exists()]
    stats = [(path.relative_to(value.parent).as_posix(), path.stat()) for path in files]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def _sweep(mine: Path) -> None:
    """Remove what other benches left a month ago, and nobody came back for."""
    for folder in mine.parent.glob("bench-*"):
        file = folder / PARTS_FILE
        if folder == mine or not file.is_file():
            continue
        if time.time() - file.stat().st_mtime > KEEP_SECONDS:
            lock = Lock(folder, folder)
            with contextlib.suppress(OutputExistsError, OSError):
                lock.take()
                lock.remove_folder()
            lock.release()
