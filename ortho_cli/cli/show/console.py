"""Console output on stderr: colours, escaped names, sizes, tables, errors; JSON goes to stdout."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Iterable, Sequence
from types import TracebackType

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ortho_cli.errors import OrthoError

WIDE = 140  # columns where there is no terminal to ask
ROWS = 1000  # of a table that rich lays out; it takes a millisecond and ten kilobytes for each
LONGEST = 4000  # characters of a line: a name can have as many as its file has bytes


def make_console(*, stderr: bool = True) -> Console:
    """Open stderr, or stdout; colours obey NO_COLOR and vanish off a terminal."""
    width = None if (sys.stderr if stderr else sys.stdout).isatty() else WIDE
    return Console(
        stderr=stderr,
        highlight=False,
        markup=False,
        emoji=False,
        width=width,
        soft_wrap=bool(width),
    )


def visible(text: object) -> str:
    """Escape the control characters of a name that comes from a file, and cut one without end."""
    shown = str(text)
    if len(shown) > LONGEST:
        shown = f"{shown[: LONGEST // 2]} ... {shown[-LONGEST // 2 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)


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


def print_json(document: object) -> None:
    """Print one JSON document on stdout."""
    sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=True) + "\n")
    sys.stdout.flush()


def print_lines(lines: Iterable[str]) -> None:
    """Print lines of text, which a terminal wraps."""
    console = make_console()
    for line in lines:
        console.print(visible(line), soft_wrap=True)


def print_error(error: OrthoError) -> None:
    """Print the sentence, and the hint on a line of its own."""
    console = make_console()
    console.print(Text.assemble(("error: ", "bold red"), visible(error.message)), soft_wrap=True)
    if error.hint:
        console.print(Text.assemble(("hint: ", "bold"), visible(error.hint)), soft_wrap=True)


def print_note(note: str) -> None:
    """Print a note: something to know that needs no action."""
    print_lines([f"note: {note}"])


def print_bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print a traceback as `visible` text, since its last line can hold a name from a file."""
    for entry in traceback.format_exception(kind, error, trace):
        for line in entry.rstrip("\n").split("\n"):
            sys.stderr.write(visible(line) + "\n")


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[tuple[str, ...]], note: str = ""
) -> None:
    """Print a table, a note on it and an empty line; the first column is at the left.

    Above ROWS rows the columns are aligned here: rich would take seconds.
    """
    console = make_console()
    (_print_long if len(rows) > ROWS else _print_short)(console, title, columns, rows)
    if note:
        console.print(note, style="dim")
    console.print()


def _print_short(
    console: Console, title: str, columns: Sequence[str], rows: Sequence[tuple[str, ...]]
) -> None:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        collapse_padding=True,
        header_style="dim",
    )
    table.add_column(columns[0], overflow="fold", min_width=28)
    for column in columns[1:]:
        table.add_column(column, justify="right", no_wrap=True)
    for name, *cells in rows:
        table.add_row(Text(visible(name)), *cells)
    console.print(table)


def _print_long(
    console: Console, title: str, columns: Sequence[str], rows: Sequence[tuple[str, ...]]
) -> None:
    rows = [(visible(name), *cells) for name, *cells in rows]
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return " ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)])

    console.print(Text(title, "bold"), soft_wrap=True)
    console.print(Text(line(columns), "dim"), soft_wrap=True)
    for start in range(0, len(rows), ROWS):
        piece = "\n".join(map(line, rows[start : start + ROWS]))
        console.print(Text(piece), soft_wrap=True)
