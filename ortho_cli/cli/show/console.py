"""Console output: results on stdout, notes and errors on stderr; names escaped, sizes, tables."""

from __future__ import annotations

import csv
import io
import json
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from ortho_cli.errors import OrthoError

WIDE = 140  # columns where there is no terminal to ask
NAME = 20  # columns that a name keeps; where fewer are left, figures go to a second table
ROWS = 1000  # of a table that are printed at once
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a cell begins with that spreadsheets compute
LONGEST = 4000  # characters of a line: a name can have as many as its file has bytes


def make_console(*, stderr: bool = False) -> Console:
    """Open stdout, or stderr; colours obey NO_COLOR and vanish off a terminal."""
    width = None if (sys.stderr if stderr else sys.stdout).isatty() else WIDE
    return Console(
        stderr=stderr,
        highlight=False,
        markup=False,
        emoji=False,
        width=width,
        soft_wrap=bool(width),
    )


def escaped(text: object) -> str:
    """Escape the control characters of a name that comes from a file."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def visible(text: object) -> str:
    """Escape the control characters of a name that comes from a file, and cut one without end."""
    shown = str(text)
    if len(shown) > LONGEST:
        shown = f"{shown[: LONGEST // 2]} ... {shown[-LONGEST // 2 :]}"
    return escaped(shown)


def size(nbytes: float) -> str:
    """Format bytes in decimal units, as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"


def number(value: object, form: str = ".2f") -> str:
    """Format a figure, and `-` where there is none."""
    return format(value, form) if isinstance(value, int | float) else "-"


def decibels(value: object, *, exact: bool) -> str:
    """Format a signal-to-noise ratio; None is infinite where it was measured (`exact`)."""
    return "exact" if value is None and exact else number(value)


def in_decibels(value: object, *, exact: bool) -> str:
    """Write a signal-to-noise with its unit, which what is exact has not."""
    words = decibels(value, exact=exact)
    return words if words == "exact" else f"{words} dB"


def print_json(document: object) -> None:
    """Print one JSON document on stdout."""
    print_text(json.dumps(document, indent=2, ensure_ascii=True) + "\n")


def print_text(text: str) -> None:
    """Print a text on stdout as it is."""
    sys.stdout.write(text)
    sys.stdout.flush()


def csv_text(rows: Sequence[Mapping[str, object]]) -> str:
    """Write rows as CSV with all digits; its columns are all keys, in the order of their coming.

    Names come from files of strangers. Where one begins with a sign by which a spreadsheet knows a
    formula, an apostrophe goes before it; control characters are escaped.
    Source: OWASP, CSV Injection.
    """
    text = io.StringIO()
    columns = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _csv_cell(value) for key, value in row.items()} for row in rows)
    return text.getvalue()


def _csv_cell(value: object) -> object:
    if not isinstance(value, str):
        return value
    return "'" * value.startswith(FORMULA) + escaped(value)


def print_lines(lines: Iterable[str], *, stderr: bool = False) -> None:
    """Print lines of a result, or of what goes to stderr; a terminal wraps them."""
    console = make_console(stderr=stderr)
    for line in lines:
        console.print(visible(line), soft_wrap=True)


def print_error(error: OrthoError) -> None:
    """Print the sentence, and the hint on a line of its own."""
    console = make_console(stderr=True)
    console.print(Text.assemble(("error: ", "bold red"), visible(error.message)), soft_wrap=True)
    if error.hint:
        console.print(Text.assemble(("hint: ", "bold"), visible(error.hint)), soft_wrap=True)


def print_notes(*notes: object) -> None:
    """Print notes on stderr: something to know that needs no action."""
    print_lines((f"note: {note}" for note in notes), stderr=True)


def print_bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print a traceback as `visible` text, since its last line can hold a name from a file."""
    for entry in traceback.format_exception(kind, error, trace):
        for line in entry.rstrip("\n").split("\n"):
            sys.stderr.write(visible(line) + "\n")


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[tuple[str, ...]],
    note: str = "",
    *,
    groups: Sequence[str] = (),
) -> None:
    """Print a table, a note on it and an empty line; the first column is at the left.

    On a terminal a name is shortened from the left, where names differ least; figures for which
    there is no room follow in a second table. No figure is cut.

    Args:
        title: above it.
        columns: their heads, that of the names first.
        rows: a name, and its cells.
        note: below it.
        groups: of each row the name of what it belongs to, printed once above rows of one group on
            a terminal; the row's own name is then what follows it. Elsewhere names stay whole, so
            that each line says all.
    """
    console = make_console()
    narrow = console.width if console.is_terminal else None
    names, cells = [visible(name) for name, *_ in rows], [row[1:] for row in rows]
    if groups and narrow:
        heads = [visible(group) for group in groups]
        names = [f"  {n[len(h) + 1 :]}" if h else n for n, h in zip(names, heads, strict=True)]
    else:
        heads = [""] * len(names)
    widths = [max(map(cell_len, column)) for column in zip(columns[1:], *cells, strict=True)]
    longest = max(map(cell_len, (columns[0], *names)))
    for part in _bands(widths, longest, narrow):
        room = sum(widths[part]) + len(widths[part])
        width = longest if narrow is None else min(longest, max(NAME, narrow - room))
        console.print(Text(title, "bold"), soft_wrap=True)
        head = _line(columns[0], columns[1:][part], width, widths[part])
        console.print(Text(head, "dim"), soft_wrap=True)
        _print_rows(
            console,
            [
                _line(name, row[part], width, widths[part])
                for name, row in zip(names, cells, strict=True)
            ],
            [shorten(head, narrow) if narrow else head for head in heads],
        )
    if note:
        console.print(note, style="dim", soft_wrap=not narrow)
    console.print()


def _bands(widths: Sequence[int], longest: int, narrow: int | None) -> Iterator[slice]:
    """Share columns out to as many tables as it takes for each to fit."""
    start, used = 0, min(longest, NAME)
    for at, width in enumerate(widths):
        if narrow is not None and at > start and used + 1 + width > narrow:
            yield slice(start, at)
            start, used = at, min(longest, NAME)
        used += 1 + width
    yield slice(start, len(widths))


def _line(name: str, cells: Sequence[str], width: int, widths: Sequence[int]) -> str:
    name = shorten(name, width)
    others = (" " * (w - cell_len(cell)) + cell for cell, w in zip(cells, widths, strict=True))
    return " ".join([name + " " * (width - cell_len(name)), *others])


def _print_rows(console: Console, lines: Sequence[str], heads: Sequence[str]) -> None:
    """Print lines in pieces, the name of a group above its first one."""
    before = ""
    for start in range(0, len(lines), ROWS):
        piece = Text()
        for line, head in zip(
            lines[start : start + ROWS], heads[start : start + ROWS], strict=True
        ):
            if head and head != before:
                piece.append(f"{head}\n", "dim")
            before = head
            piece.append(f"{line}\n")
        console.print(piece, soft_wrap=True, end="")


def shorten(name: str, width: int) -> str:
    """Cut a name from the left, so that it fits."""
    if cell_len(name) <= width:
        return name
    name = name[-width + 2 :]  # a character takes one cell or more, hardly ever none
    while cell_len(name) > width - 2:
        name = name[1:]
    return f"..{name}"
