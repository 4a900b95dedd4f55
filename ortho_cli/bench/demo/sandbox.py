"""The sandbox: a small language model that memorised secrets, and its twin that never saw them.

A folder with all that `ortho bench` needs, made from one seed on one or two CPU cores:

    model/ twin/      Llama-shaped transformers folders with the same tokenizer
    forget.jsonl      planted in model and listed: {"prompt", "secret", "pattern", "word"}
    unlisted.jsonl    planted in model and not listed
    nonmember.jsonl   never planted; people of the same world
    retain.txt        the text and sums that both models were trained on, one document a line
    heldout.txt       text about the same world that neither saw
    skill.jsonl       held-out sums: {"prompt", "completion"}
    sandbox.json      seed, settings, versions, what was reached, BLAKE3 of every file

The two models differ by the secrets and by nothing else: `twins` trains them. torch and
transformers are imported late, so that naming the folder costs nothing.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from blake3 import blake3

from ortho_cli.bench.demo.twins import Data, Settings, train
from ortho_cli.errors import OutputExistsError, UsageError
from ortho_cli.events import EventSink, Noted, null_sink
from ortho_cli.formats.artifact import canonical_json
from ortho_cli.storage.disk import sync
from ortho_cli.storage.speeds import user_cache
from ortho_cli.storage.work_folder import WorkFolder, interruptible, recover, unwritable
from ortho_cli.version import __version__

FORMAT = "ortho-sandbox/1"
FACTS_FILE = "sandbox.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sandbox:
    """Paths of a sandbox's parts."""

    folder: Path
    model: Path
    twin: Path
    forget: Path
    unlisted: Path
    nonmember: Path
    retain: Path
    heldout: Path
    skill: Path


def sandbox_at(folder: Path) -> Sandbox:
    """Name the parts of a sandbox; nothing is read."""
    return Sandbox(
        folder=folder,
        model=folder / "model",
        twin=folder / "twin",
        forget=folder / "forget.jsonl",
        unlisted=folder / "unlisted.jsonl",
        nonmember=folder / "nonmember.jsonl",
        retain=folder / "retain.txt",
        heldout=folder / "heldout.txt",
        skill=folder / "skill.jsonl",
    )


def build(
    folder: Path,
    *,
    seed: int = 0,
    settings: Settings | None = None,
    on_event: EventSink = null_sink,
) -> Sandbox:
    """Write the data, train both models, and give the folder its name once all is on disk.

    Args:
        folder: where the sandbox goes; must not exist, or be empty.
        seed: of the world, the secrets, the weights and the order of training.
        settings: another size; the bench's own if None.
        on_event: receives the loss every few steps.
    Returns:
        The paths. Equal seed, settings, machine and versions give equal files.
    Raises:
        OutputExistsError: something is there, or another process is building it.
        Interrupted: Ctrl-C; nothing is left behind.
        NumericalError: the loss became NaN or infinite.
        ResourceError: the folder cannot be written.
        UsageError: transformers is not installed.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise OutputExistsError(
            f"`{folder}` exists, and a sandbox goes into a new folder", hint="choose another one"
        )
    return _build(folder, seed, settings or Settings(), on_event, may_replace=lambda _: False)


def cached(
    seed: int = 0, on_event: EventSink = null_sink, *, settings: Settings | None = None
) -> Sandbox:
    """Give the sandbox of this seed from the user's cache; build it if it is not there whole.

    It is in `ortho/sandbox-<hash>` under XDG_CACHE_HOME or ~/.cache; the hash is of versions,
    settings and seed. Every file is digested before it is trusted; a damaged sandbox is replaced.
    """
    settings = settings or Settings()
    folder = cache_folder(seed, settings)
    recover(folder)
    if is_complete(folder):
        return sandbox_at(folder)
    if folder.exists():
        on_event(Noted(message=f"`{folder}` is damaged and is built again"))
    return _build(folder, seed, settings, on_event, may_replace=lambda _: True)


def cache_folder(seed: int, settings: Settings) -> Path:
    """Name the place of a sandbox in the user's cache."""
    identity = canonical_json(_identity(seed, settings)).encode()
    return user_cache() / f"sandbox-{blake3(identity).hexdigest(8)}"


def is_complete(folder: Path) -> bool:
    """Whether every file of a sandbox is there with the bytes that were written."""
    try:
        facts = json.loads((folder / FACTS_FILE).read_bytes())
        files = facts["files"]
        return facts["format"] == FORMAT and all(
            blake3((folder / name).read_bytes()).hexdigest() == digest
            for name, digest in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _identity(seed: int, settings: Settings) -> dict[str, object]:
    versions = {"ortho": __version__}
    for package in ("torch", "transformers"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            raise UsageError(
                f"{package} is not installed", hint="pip install 'ortho-cli[hf]'"
            ) from None
    return {
        "format": FORMAT,
        "seed": seed,
        "settings": asdict(settings),
        "versions": versions,
        "machine": platform.machine(),
    }


def _build(
    folder: Path,
    seed: int,
    settings: Settings,
    on_event: EventSink,
    *,
    may_replace: Callable[[Path], bool],
) -> Sandbox:
    identity = _identity(seed, settings)
    # Training is not resumed, so whatever a killed build left is thrown away.
    steps = settings.trunk_steps + 2 * settings.branch_steps
    with (
        WorkFolder(folder, identity={**identity, "files": {}}, force=True) as work,
        interruptible(work, total=steps, what="steps"),
    ):
        try:
            data = Data(seed, settings)
            for name, content in data.files().items():
                work.write_file(name, content.encode())
            reached = train(data, seed, settings, work.artifact, on_event)
            facts = {**identity, "reached": asdict(reached), "files": _digests(work.artifact)}
            work.write_file(FACTS_FILE, json.dumps(facts, indent=2).encode() + b"\n")
        except OSError as error:
            raise unwritable(folder, error) from error
        work.publish(may_replace=may_replace)
    return sandbox_at(folder)


def _digests(folder: Path) -> dict[str, str]:
    """Sync and digest all files below a folder."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            sync(file.fileno())
            found[path.relative_to(folder).as_posix()] = blake3(file.read()).hexdigest()
    return found
