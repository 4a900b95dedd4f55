"""Hints of error messages: whole commands to paste, with the user's own path in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Sequence
from pathlib import Path

_SNAPSHOT = re.compile(r"(?:^|/)models--([^/]+?)(?:--([^/]+))?(?:/|$)")


def said(path: Path) -> str:
    """Spell a path for a shell; one that begins like an option is not taken for one."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith(("-", "~")) else text)


def some(names: Sequence[str], most: int = 4) -> str:
    """List the first names, and count the rest."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(f"`{name}`" for name in names[:most]) + more


def convert(path: Path) -> str:
    """Name the command that makes safetensors of a file or folder."""
    return f"`ortho convert {said(path)}` writes it as safetensors; give the folder that it makes"


def python(code: str, *paths: Path) -> str:
    """Name the command that runs a program, which has no double quotes, on paths as sys.argv."""
    return " ".join((f'`python -c "{code}"', *map(said, paths))) + "`"


def fetch(path: Path) -> str:
    """Name the command that downloads a file, or a folder, from the Hub once more."""
    if cached := _SNAPSHOT.search(path.absolute().as_posix()):
        return f"`hf download {'/'.join(filter(None, cached.groups()))}` fetches what is missing"
    if path.is_dir():
        return f"fetch it again, as `hf download ORG/NAME --local-dir {said(path)}` does"
    name, folder = said(Path(path.name)), said(path.parent)
    return f"fetch it again, as `hf download ORG/NAME {name} --local-dir {folder}` does"


def unsupported(path: Path, reason: str, *, left: bool, apart: bool = False) -> str:
    """Say what to do about weights that cannot be split.

    Args:
        path: the checkpoint.
        reason: why not, as selection words it.
        left: others are split, so that there is a point in keeping these as they are.
        apart: they are stacks of experts whose parts can be split.
    """
    ways = []
    if apart:
        ways.append(
            "`--set on_unsupported=split` splits each expert, for vLLM and `ortho_cli.load`: "
            "transformers loads their stacks alone"
        )
    if reason.startswith(("dtype F", "dtype B")):
        ways.append(_cast(path, reason.removeprefix("dtype ")))
    if left:
        ways.append("`--set on_unsupported=keep` carries such tensors over unchanged")
    if ways:
        return "; or ".join(ways)
    if reason.startswith("Conv1D"):
        return "nothing else is left to split; `ortho_cli.Engine` splits Conv1D in memory"
    return "nothing else is left to split: only Linears that have a 2-D tensor each can be"


def nothing_to_split(path: Path, dtypes: Collection[str]) -> str:
    """Say what to do about a checkpoint without a weight that can be split."""
    other = next((d for d in sorted(dtypes) if d.startswith(("F8", "F6", "F4", "F64"))), None)
    if other is not None:
        return _cast(path, other)
    return "only 2-D floating weights of Linear layers can be split"


def _cast(path: Path, dtype: str) -> str:
    if dtype == "F64":
        command = f"`ortho convert {said(path)} --dtype float32`"
        return f"{command} casts them; give the folder that it makes"
    return convert(path).replace("as safetensors", f"without {dtype}")
