"""Models by the name that the Hugging Face Hub gives them, where they are in its local cache.

Nothing here asks the network. The cache is `models--ORG--NAME/snapshots/COMMIT`, with the commit
of each branch in `refs`; see huggingface_hub's guide "Understand caching".
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from ortho_cli.errors import CheckpointError
from ortho_cli.storage.hints import said

# `gpt2`, `org/name`, either with `@revision`, or a page of the Hub, whose `//` a Path has made `/`.
_ID = re.compile(
    r"(?P<url>https?:/{1,2}(?:www\.)?(?:huggingface\.co|hf\.co)/|hf:/{1,2})?"
    r"(?P<name>(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*)"
    r"(?:@(?P<revision>[\w./-]+)|/(?:tree|blob|resolve)/(?P<branch>[\w.-]+).*)?/?"
)
_FILE = re.compile(r"\.(safetensors|bin|pth?|ckpt|gguf|json|jsonl|txt|parquet|ya?ml|zip|gz)$")


def parse(path: Path) -> re.Match[str] | None:
    """Read a path as the url, name and revision or branch of a repository; None if it is none."""
    named = _ID.fullmatch(str(path))
    if named is None or _FILE.search(named["name"]) or ".." in named["name"]:
        return None
    return named


def cache() -> Path:
    """Find the Hub's cache, by the variables that huggingface_hub reads."""
    hub = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    other = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    found = hub or Path(os.environ.get("HF_HOME") or other) / "hub"
    return Path(os.path.expanduser(found))  # noqa: PTH111 - that of pathlib raises without a home


def locate(given: Path) -> tuple[Path, str | None]:
    """Find the folder that a path or the name of a repository means.

    Args:
        given: what the user wrote. A file or folder of that name comes before the cache.
    Returns:
        The path to read, and a note where it is not the one given.
    Raises:
        CheckpointError: the cache holds the repository, and which snapshot is meant is open.
    """
    folder, revision = given.parent if given.name == "snapshots" else given, None
    if not os.path.lexists(given):
        named = parse(given)
        if named is None:
            return given, None
        folder = cache() / ("models--" + named["name"].replace("/", "--"))
        revision = named["revision"] or named["branch"]
    if not folder.absolute().name.startswith("models--") or not (folder / "snapshots").is_dir():
        return given, None
    found = _snapshot(folder, revision)
    return found, f"`{given}` is read from the Hub's cache: snapshots/{found.name} of `{folder}`"


def _snapshot(folder: Path, revision: str | None) -> Path:
    """Choose a snapshot: the revision asked for, else that of main, else the only one."""
    reference = folder / "refs" / (revision or "main")
    commit = reference.read_text().strip() if reference.is_file() else revision
    there = sorted(path for path in (folder / "snapshots").iterdir() if path.is_dir())
    fitting = [path for path in there if path.name.startswith(commit or "")]
    if len(fitting) == 1:
        return fitting[0]
    names = ", ".join(path.name for path in (fitting or there)[:4]) or "none"
    repository = folder.name.removeprefix("models--").replace("--", "/")
    what = f"holds {len(fitting)} snapshots, and nothing says which is meant: {names}"
    if commit is not None and not fitting:
        what = f"has no snapshot {commit}; it holds {names}"
    one = f"give one, such as {said(there[-1])}" if there else None
    raise CheckpointError(
        f"`{folder}` {what}", hint=one or f"`hf download {repository}` fetches it"
    )


def advice(given: Path) -> str | None:
    """Say how to get the model that a path which does not exist may name; None if it names none."""
    named = parse(given)
    if named is None:
        return None
    name, revision = named["name"], named["revision"] or named["branch"]
    wanted, short = f" --revision {revision}" if revision else "", name.rpartition("/")[2]
    command = f"`hf download {name}{wanted} --local-dir {short}`"
    if not named["url"] and "/" not in name:  # a plain folder may be meant
        return f"give a .safetensors file or a model folder; {command} fetches a model of the Hub"
    return f"it looks like the name of a model on the Hub: {command}, then give `{short}`"
