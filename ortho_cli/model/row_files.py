"""Read files of rows: text, JSON, JSON lines, CSV, TSV and parquet, plain or in gzip or bzip2.

The suffix gives the kind of a file, unless its first bytes show another: `a.jsonl` may be gzip, and
a file without a suffix JSON lines. The error for any other file names its kind. Messages give the
place and the fault, and never the content of a row.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Literal, TypeGuard

from blake3 import blake3

from ortho_cli.errors import CalibrationError, reason, unreadable
from ortho_cli.model.rows import EXPECTED, KNOWN, is_row, names_of
from ortho_cli.storage import sniff
from ortho_cli.storage.hints import said, some
from ortho_cli.storage.untrusted import read_regular

MAX_UNPACKED = 1 << 30  # bytes of a file once it is unpacked: a kilobyte can claim a terabyte
MAX_LAYERS = 2  # of compression; a file can be made that unpacks to itself
FORMATS = "give files of text, JSON, JSON lines, CSV, TSV or parquet"
# Keys of an object that hold rows, in the order in which they are looked for; splits come last.
WRAPPERS = (
    *("data", "rows", "train", "examples", "instances", "items", "records", "samples"),
    *("test", "validation", "valid", "val", "dev", "eval"),
)

Kind = Literal["text", "lines", "json", "csv", "tsv", "parquet"]
Value = tuple[object, str]  # a row, parsed, and its place for errors

SUFFIXES: Mapping[str, Kind] = {
    **dict.fromkeys((".txt", ".text", ".md", ".markdown", ".rst"), "text"),
    **dict.fromkeys((".jsonl", ".ndjson", ".jsonlines", ".jl"), "lines"),
    ".json": "json",
    ".csv": "csv",
    **dict.fromkeys((".tsv", ".tab"), "tsv"),
    **dict.fromkeys((".parquet", ".pq"), "parquet"),
}
Opener = Callable[[IO[bytes]], gzip.GzipFile | bz2.BZ2File]
PACKED: Mapping[str | None, tuple[str, Opener, str]] = {  # with the command that unpacks
    sniff.GZIP: ("gzip", gzip.open, "gunzip -c"),
    sniff.BZIP2: ("bzip2", bz2.open, "bunzip2 -c"),
}
PACKED_SUFFIXES = (".gz", ".gzip", ".bz2")
# Kinds that may be rows: a text may begin like a document or an error message.
READ = (None, sniff.PARQUET, sniff.EMPTY, sniff.XML)
BOMS = (b"\xff\xfe\x00\x00", b"\x00\x00\xfe\xff", b"\xff\xfe", b"\xfe\xff")
ENCODINGS = ("utf-32", "utf-32", "utf-16", "utf-16")


def read_values(path: Path) -> tuple[Iterator[Value], bytes]:
    """Read one file row by row; a text file is one row with a `text`.

    Returns:
        Each row with its place, some parsed lazily; and the file's BLAKE3.
    Raises:
        CalibrationError: the file is missing, damaged or of an unknown kind; during iteration, a
            row cannot be parsed.
    """
    try:
        raw = read_regular(path)
    except IsADirectoryError:
        raise _wrong(path, "is a folder", f"give the files in it: {said(path)}/*") from None
    except OSError as error:
        raise unreadable(path, error, hint=FORMATS, kind=CalibrationError, what="data ") from None
    content = _unpacked(path, raw)
    _refuse_others(path, content)
    kind = _kind_of(path, content)
    if kind == "parquet":
        return _parquet(path, content), blake3(raw).digest()
    return _READERS[kind](path, _decode(path, content)), blake3(raw).digest()


def _wrong(path: Path, what: str, hint: str) -> CalibrationError:
    return CalibrationError(f"data `{path}` {what}", hint=hint)


def _unpacked(path: Path, raw: bytes) -> bytes:
    for _ in range(MAX_LAYERS):
        found = PACKED.get(sniff.kind_of(raw[: sniff.HEAD]))
        if found is None:
            break
        raw = _unpack(path, raw, *found[:2])
    if sniff.kind_of(raw[: sniff.HEAD]) in PACKED:
        what = f"is packed more than {MAX_LAYERS} times over"
        raise _wrong(path, what, "unpack it, and give what comes out")
    return raw


def _unpack(path: Path, raw: bytes, name: str, opener: Opener) -> bytes:
    try:
        with opener(io.BytesIO(raw)) as file:
            found = file.read(MAX_UNPACKED + 1)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        what = f"is damaged {name}: {reason(error)}"
        raise _wrong(path, what, "was it cut? copy it again, whole") from None
    if len(found) > MAX_UNPACKED:
        what = f"has {len(raw)} bytes of {name} that unpack to more than {MAX_UNPACKED}, the most"
        raise _wrong(path, f"{what} that are read", "unpack it and give a part")
    return found


def _refuse_others(path: Path, raw: bytes) -> None:
    """Refuse a file that has no rows, and name its kind."""
    kind, hint = sniff.kind_of(raw[: sniff.HEAD]), FORMATS
    if kind in READ or kind.startswith(sniff.REFUSAL):
        kind = "binary, no text" if b"\0" in raw and not raw.startswith((b"PAR1", *BOMS)) else None
    elif kind == sniff.PDF:
        hint = f"run `pdftotext {said(path)}`, and give what comes out"
    elif kind in sniff.ARCHIVES or kind in sniff.POINTERS:
        hint = sniff.remedy(kind, path)
    if kind is not None:
        raise _wrong(path, f"is {kind}", hint)


def _kind_of(path: Path, raw: bytes) -> Kind:
    """Give the kind of a file by its suffix, unless its first bytes show another."""
    if raw.startswith(b"PAR1"):
        return "parquet"
    named = SUFFIXES.get(_without_packing(path).suffix.lower())
    if named in ("text", "lines", "json"):
        return named
    head = raw.lstrip(b"\xef\xbb\xbf \t\r\n")
    if head[:1] in (b"{", b"[") and (_parses(head.split(b"\n", 1)[0]) or _parses(head)):
        return "json"
    if named == "parquet":
        raise _wrong(path, "is not parquet: it does not begin with PAR1", "is it cut?")
    return named or "text"


def _without_packing(path: Path) -> Path:
    """Give the name that a file has once it is unpacked."""
    name = Path(path.name)
    while name.suffix.lower() in PACKED_SUFFIXES:
        name = name.with_suffix("")
    return name


def _decode(path: Path, raw: bytes) -> str:
    encoding = next((e for bom, e in zip(BOMS, ENCODINGS, strict=True) if raw.startswith(bom)), "")
    try:
        return raw.decode(encoding or "utf-8-sig")
    except UnicodeDecodeError as error:
        cut = encoding or raw.startswith(b"\xef\xbb\xbf")
        raise _wrong(
            path,
            f"is not {encoding.upper() or 'UTF-8'}: {error.reason} at byte {error.start}",
            "is it cut? copy it again, whole" if cut else f"convert it: `{_conversion(path)}`",
        ) from None


def _conversion(path: Path) -> str:
    """Give the command that converts a file to UTF-8, under a name of the same suffix."""
    packed = PACKED.get(sniff.kind_of_file(path))
    name = _without_packing(path) if packed else path
    target = said(Path(f"{name.stem}.utf8{name.suffix}"))
    iconv = "iconv -f WINDOWS-1252 -t UTF-8"
    if packed:  # from standard input, which has no suffix to refuse
        return f"{packed[2]} < {said(path)} | {iconv} > {target}"
    return f"{iconv} {said(path)} > {target}"


def _texts(path: Path, text: str) -> Iterator[Value]:
    yield {"text": text}, f"`{path}`"


def _json(path: Path, text: str, *, by_line: bool) -> Iterator[Value]:
    """Read JSON lines or a document: files of either suffix hold the other, too."""
    # Not splitlines: U+2028 and the like are text, in JSON, too.
    lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if len(lines) > 1 and _parses(lines[0][1]):
        by_line = True
    elif by_line and len(lines) > 1 and _parses(text):
        by_line = False
    if lines and not by_line:
        yield from _document(path, text)
        return
    for number, line in lines:
        where = f"`{path}` line {number}"
        found = _parse(line, where)
        if len(lines) == 1 and isinstance(found, list) and found and isinstance(found[0], dict):
            yield from _rows_of(path, found)
        else:
            yield found, where


def _document(path: Path, text: str) -> Iterator[Value]:
    found = _parse(text, f"data `{path}`", hint="a list of rows, or a row a line")
    if isinstance(found, list):
        yield from _rows_of(path, found)
    elif not isinstance(found, dict):
        raise _wrong(path, "is JSON and holds no rows", EXPECTED)
    elif is_row(found) and not any(_is_rows(found.get(name)) for name in WRAPPERS):
        yield found, f"`{path}` row 1"
    else:
        yield from _rows_of(path, _inside(path, found))


def _inside(path: Path, found: Mapping[str, object]) -> list[object]:
    """Find the rows inside an object: under one key, or as columns."""
    held = [name for name in WRAPPERS if _is_rows(found.get(name))]
    if not held and not any(isinstance(found.get(name), list | dict) for name in KNOWN):
        held = [name for name in WRAPPERS if isinstance(found.get(name), list | dict)]
    if len(held) > 1:
        raise _wrong(
            path,
            f"is one JSON object with rows under {some(held)}, and one is read",
            "write each to a file of its own and give those that count: "
            f"`jq .{held[0]} {said(path)} > {held[0]}.json`",
        )
    key = next(iter(held), "")
    rows = found.get(key)
    if isinstance(rows, list):
        return rows
    columns = rows if isinstance(rows, dict) else found
    lists = {  # pandas writes a column as an object of its values, by row number
        name: list(column.values()) if isinstance(column, dict) else column
        for name, column in columns.items()
        if isinstance(column, dict | list)
    }
    if not lists.keys() & KNOWN:
        what = f"is one JSON object with {names_of(found)} and no rows"
        raise _wrong(path, what, f"a list of rows, or an object that has it as `data`; {EXPECTED}")
    lengths = {name: len(column) for name, column in lists.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"`{name}` {length}" for name, length in lengths.items())
        what = f"has columns of different lengths: {listed}"
        raise _wrong(path, what, "a column holds one value a row")
    return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]


def _is_rows(value: object) -> TypeGuard[list[object]]:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)


def _rows_of(path: Path, rows: Iterable[object]) -> Iterator[Value]:
    for number, row in enumerate(rows, 1):
        found: object = {"text": row} if isinstance(row, str) else row
        if isinstance(row, dict) and "row_idx" in row:  # of the Hub's dataset viewer
            found = row.get("row")
        yield found, f"`{path}` row {number}"


def _parses(text: str | bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _parse(text: str, where: str, *, hint: str = "one object a line") -> object:
    try:
        found: object = json.loads(text)
        if "\\u" in text:
            json.dumps(found, ensure_ascii=False).encode()  # no tokenizer takes a lone surrogate
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{where} is not JSON: {error}", hint=hint) from None
    return found


def _table(path: Path, text: str, delimiter: str) -> Iterator[Value]:
    if not text.strip():
        return
    names, rows = _known_columns(path, text.lstrip("\r\n"), delimiter)
    for number, row in enumerate(rows, 1):
        where = f"`{path}` row {number}"
        if not any(cell.strip() for cell in row):
            continue
        if len(row) > len(names):
            raise CalibrationError(
                f"{where} has {len(row)} fields where the first line names {len(names)}",
                hint='a field with a comma, a tab or a line break is written in "quotes"',
            )
        yield {name: cell or None for name, cell in zip(names, row, strict=False)}, where


def _known_columns(path: Path, text: str, delimiter: str) -> tuple[list[str], list[list[str]]]:
    """Split a table by the delimiter of known column names; some locales write semicolons."""
    line = io.StringIO(text, newline="").readline()  # up to CR, LF or both
    for mark in dict.fromkeys((delimiter, ";", "\t", ",")):
        first = next(iter(_parse_csv(path, line, mark)), [])
        known = [name for cell in first if (name := cell.strip().lower()) in KNOWN]
        if not known:
            continue
        if len(set(known)) < len(known):
            raise _wrong(path, f"names a column twice: {known}", EXPECTED)
        header, *rows = _split(path, text, mark)
        # Parsed again: a name in quotes may continue in the next line.
        plain = [(name, name.strip().lower()) for name in header]
        return [low if low in KNOWN else name for name, low in plain], rows
    raise _wrong(  # without names, the first line is a row: not to be shown
        path,
        "has a first line that names no column that is known",
        f"name them in the first line: text; or prompt,completion; {EXPECTED}",
    )


def _split(path: Path, text: str, delimiter: str) -> list[list[str]]:
    try:
        return _parse_csv(path, text, delimiter, strict=True)
    except CalibrationError:
        if delimiter != "\t":
            raise
        # In TSV, quotes are often text.
        return _parse_csv(path, text, delimiter, quoting=csv.QUOTE_NONE)


def _parse_csv(
    path: Path,
    text: str,
    delimiter: str,
    *,
    strict: bool = False,
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL,
) -> list[list[str]]:
    lines = io.StringIO(text, newline="")
    reader = csv.reader(lines, delimiter=delimiter, strict=strict, quoting=quoting)
    before = csv.field_size_limit(sys.maxsize)  # a field may be a document; Python's is 128 KiB
    try:
        return list(reader)
    except csv.Error as error:
        what = f"is not CSV: {error} in line {reader.line_num}"
        hint = 'a quote inside of a field is doubled: "she said ""hi"""'
        raise _wrong(path, what, hint) from None
    finally:
        csv.field_size_limit(before)


def _parquet(path: Path, raw: bytes) -> Iterator[Value]:
    try:
        import pyarrow  # type: ignore[import-not-found,unused-ignore]
        from pyarrow import parquet
    except ImportError:
        what = "is parquet and needs pyarrow, which is not installed"
        raise _wrong(path, what, "pip install pyarrow") from None
    try:
        file = parquet.ParquetFile(pyarrow.BufferReader(raw))
        groups = file.metadata
        size = sum(groups.row_group(i).total_byte_size for i in range(groups.num_row_groups))
        if size > MAX_UNPACKED:
            what = f"unpacks to {size} bytes, and {MAX_UNPACKED} are the most that are read"
            raise _wrong(path, what, "give a part of it")
        rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
        for number, row in enumerate(rows, 1):
            yield row, f"`{path}` row {number}"
    except (OSError, ValueError) as error:
        raise _wrong(path, f"is not parquet: {error}", "is it cut?") from None


_READERS: Mapping[Kind, Callable[[Path, str], Iterator[Value]]] = {  # of all kinds that are text
    "text": _texts,
    "lines": partial(_json, by_line=True),
    "json": partial(_json, by_line=False),
    "csv": partial(_table, delimiter=","),
    "tsv": partial(_table, delimiter="\t"),
}
