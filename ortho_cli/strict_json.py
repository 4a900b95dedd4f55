"""JSON that strangers wrote: one object, checked before it is believed, bounded in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ortho_cli import sniff
from ortho_cli.errors import CheckpointError
from ortho_cli.files import read_regular

MAX_FILE = 100_000_000  # index and config are read whole
MAX_PARSED = 900_000_000  # bytes that JSON may take in memory once it is parsed


def _doubled(pairs: list[tuple[str, Any]]) -> Iterator[str]:
    """Name the keys that stand twice with different values; the same value twice is no question."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if found.setdefault(key, value) != value:
            yield key


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        for key in _doubled(pairs):
            raise ValueError(f"key {key!r} stands twice, with different values")
    return found


def _no_constants(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def parse(
    raw: bytes,
    *,
    what: str,
    hint: str,
    constants: bool = False,
    notes: list[str] | None = None,
) -> dict[str, Any]:
    """Parse strict JSON: one object, no key of two values, valid UTF-8, a gigabyte once parsed.

    Args:
        raw: the text.
        what: its name in errors.
        hint: what to do if it is bad.
        constants: let NaN and Infinity pass, which Python writes and JSON does not know.
        notes: gets a word on each key of two values, whose last counts, as it does for
            transformers; without it that is an error.
    """

    def last_counts(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if notes is not None and len(found := dict(pairs)) != len(pairs):
            twice = _doubled(pairs)
            notes.extend(f"`{key}` stands twice in {what}: the last counts" for key in twice)
            return found
        return _no_duplicates(pairs)

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
            object_pairs_hook=last_counts,
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


def levels(config: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """List a config and the parts that it holds, as those of several models in one do."""
    config = config or {}
    return [config, *(part for part in config.values() if isinstance(part, Mapping))]


def read(path: Path, *, constants: bool = False, notes: list[str] | None = None) -> dict[str, Any]:
    """Read a JSON file that comes with a model; `constants` and `notes` as in `parse`.

    Raises:
        CheckpointError: it is no JSON object, or something else lies under its name.
    """
    if (size := path.stat().st_size) > MAX_FILE:
        raise CheckpointError(
            f"`{path}` has {size} bytes; at most {MAX_FILE} are read",
            hint="is it the right file?",
        )
    raw = read_regular(path)
    kind = sniff.kind_of(raw[: sniff.HEAD])
    if kind is not None:
        raise CheckpointError(f"`{path}` is {kind}, not JSON", hint=sniff.remedy(kind, path))
    return parse(
        raw,
        what=f"`{path}`",
        hint="restore the file that came with the model",
        constants=constants,
        notes=notes,
    )
