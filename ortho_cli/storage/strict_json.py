"""Strict parsing of JSON that strangers wrote: one object, bounded in memory."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from ortho_cli.errors import CheckpointError
from ortho_cli.storage import sniff
from ortho_cli.storage.untrusted import read_regular

MAX_FILE = 100_000_000  # index and config are read whole
MAX_PARSED = 900_000_000  # bytes that JSON may take in memory once it is parsed
# What our own report.json takes for each tensor of base, at most: bytes of text, and parsed as
# `needed` counts them. A model of 70,000 experts has a report of more than MAX_FILE.
REPORT_FILE, REPORT_PARSED = 800, 5_000

# An entry of a safetensors header as every writer spells it. Its objects, measured and rounded up:
# the name's string, a dict of three, two lists and their numbers; the comma behind it not counted.
_ENTRY = re.compile(rb'"[^"\\]*":\{"dtype":"\w+","shape":\[[\d,]*\],"data_offsets":\[\d+,\d+\]\}')
_ENTRY_BYTES, _VALUE_BYTES = 650, 250
_ENTRY_VALUES = 6  # commas, brackets and braces in one, without those of its shape or name


def _no_constants(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


def _values(raw: bytes) -> int:
    return sum(map(raw.count, (b",", b"[", b"{")))


def needed(raw: bytes) -> int:
    """Bound the bytes that JSON takes in memory once it is parsed."""
    # At most 250 bytes a value with its key, and the text, its characters and theirs again.
    values = _values(raw)
    text = len(raw) * (3 if raw.isascii() else 9)
    bound = _VALUE_BYTES * values + text
    if bound <= MAX_PARSED:
        return bound
    # Entries of a header take a third of that: look more closely only where it matters.
    entries = commas = 0
    for found in _ENTRY.finditer(raw):
        entries += 1
        commas += found[0].count(b",") - 3  # of the shape, and of a name
    others = max(0, values - _ENTRY_VALUES * entries - commas)
    return text + _ENTRY_BYTES * entries + 60 * commas + _VALUE_BYTES * others


def parse(
    raw: bytes,
    *,
    what: str,
    hint: str,
    constants: bool = False,
    notes: list[str] | None = None,
    most: int = MAX_PARSED,
) -> dict[str, object]:
    """Parse strict JSON: one object, no key of two values, valid UTF-8, a gigabyte once parsed.

    Args:
        raw: the text.
        what: its name in errors.
        hint: what to do if it is bad.
        constants: let NaN and Infinity pass, which Python writes and JSON does not know.
        notes: gets a word on each key of two values, whose last counts, as it does for
            transformers; without it that is an error.
        most: bytes that it may take in memory.
    """

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        last, first = dict(pairs), dict[str, object]()
        for key, value in pairs if len(last) != len(pairs) else ():
            if first.setdefault(key, value) == value:
                continue
            if notes is None:
                raise ValueError(f"key {key!r} occurs twice, with different values")
            notes.append(f"`{key}` occurs twice in {what}: the last counts")
        return last

    if (size := needed(raw)) > most:
        values = _values(raw)
        raise CheckpointError(
            f"{what} has {len(raw)} bytes and {values} values; parsed it would take "
            f"{size // 10**6} MB, and {most // 10**6} are given to it",
            hint=hint,
        )
    try:
        found = json.loads(
            raw.decode(),
            object_pairs_hook=unique,
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


def levels(config: Mapping[str, object] | None) -> list[Mapping[str, object]]:
    """List a config and the parts that it holds, as those of several models in one do."""
    config = config or {}
    return [config, *(part for part in config.values() if isinstance(part, Mapping))]


def read(
    path: Path, *, constants: bool = False, notes: list[str] | None = None, tensors: int = 0
) -> dict[str, object]:
    """Read a JSON file that comes with a model.

    Args:
        path: of the file.
        constants: as in `parse`.
        notes: as in `parse`.
        tensors: of the base that a report.json speaks of; it may be larger the more there are.
    """
    most = MAX_FILE + REPORT_FILE * tensors
    if (size := path.stat().st_size) > most:
        raise CheckpointError(
            f"`{path}` has {size} bytes; at most {most} are read", hint="is it the right file?"
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
        most=MAX_PARSED + REPORT_PARSED * tensors,
    )
