"""JSON that strangers wrote: one object, checked before it is believed, bounded in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ortho_cli.errors import CheckpointError
from ortho_cli.files import read_regular

MAX_FILE = 100_000_000  # index and config are read whole
MAX_PARSED = 900_000_000  # bytes that JSON may take in memory once it is parsed


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {twice!r} stands twice")
    return found


def _no_constants(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def parse(raw: bytes, *, what: str, hint: str, constants: bool = False) -> dict[str, Any]:
    """Parse strict JSON: one object, no duplicate key, valid UTF-8, under a gigabyte once parsed.

    Args:
        raw: the text.
        what: its name in errors.
        hint: what to do if it is bad.
        constants: let NaN and Infinity pass, which Python writes and JSON does not know.
    """
    # At most 250 bytes a value with its key, and the text, its characters and theirs again.
    values = sum(map(raw.count, (b",", b"[", b"{")))
    needed = 250 * values + len(raw) * (3 if raw.isascii() else 9)
    if needed > MAX_PARSED:
        raise CheckpointError(
            f"{what} has {len(raw)} bytes and {values} values; parsed it would take "
            f"{needed // 10**6} MB, and {MAX_PARSED // 10**6} are given to it",
            hint=hint,
        )
    try:
        found = json.loads(
            raw.decode(),
            object_pairs_hook=_no_duplicates,
            parse_constant=float if constants else _no_constants,
        )
        if b"\\u" in raw:
            json.dumps(found, ensure_ascii=False).encode()  # lone surrogates cannot be written back
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{what} is not valid JSON: {str(error) or 'nested too deeply'}", hint=hint
        ) from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{what} is a JSON {type(found).__name__}, not an object", hint=hint)
    return found


def read(path: Path, *, constants: bool = False) -> dict[str, Any]:
    """Read a JSON file that comes with a model; `constants` as in `parse`."""
    if (size := path.stat().st_size) > MAX_FILE:
        raise CheckpointError(
            f"`{path}` has {size} bytes; at most {MAX_FILE} are read",
            hint="is it the right file?",
        )
    return parse(
        read_regular(path),
        what=f"`{path}`",
        hint="restore the file that came with the model",
        constants=constants,
    )
