"""Words for hints: whole commands that can be pasted, with the user's own path in them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

_SNAPSHOT = re.compile(r"(?:^|/)models--([^/]+?)(?:--([^/]+))?(?:/|$)")


def said(path: Path) -> str:
    """Spell a path for a shell; one that begins like an option is not taken for one."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith(("-", "~")) else text)


def convert(path: Path) -> str:
    """Name the command that makes safetensors of a file or folder."""
    return f"`ortho convert {said(path)}` writes it as safetensors; give the folder that it makes"


def repository_of(path: Path) -> str | None:
    """Name the repository that a path in the Hub's cache belongs to."""
    found = _SNAPSHOT.search(path.absolute().as_posix())
    return "/".join(part for part in found.groups() if part) if found else None


def fetch(path: Path) -> str:
    """Name the command that downloads a file, or a folder, from the Hub once more."""
    known = repository_of(path)
    if known is not None:
        return f"`hf download {known}` fetches what is missing"
    if path.is_dir():
        return f"fetch it again, as `hf download ORG/NAME --local-dir {said(path)}` does"
    name, folder = said(Path(path.name)), said(path.parent)
    return f"fetch it again, as `hf download ORG/NAME {name} --local-dir {folder}` does"
