"""A page of HTML in one file: its elements, its style sheet, and how it is written.

Text is escaped where it becomes part of an element: only `Html` is taken as it is. The page asks
for nothing: no script, font, picture or link, and a policy that forbids them.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ortho_cli.cli.show.console import visible
from ortho_cli.cli.show.plots import STEPS, check_matplotlib
from ortho_cli.errors import OutputExistsError
from ortho_cli.storage.work_folder import check_place, write_whole

START = b"<!doctype html>\n<!-- a page of ortho -->\n"
POLICY = "default-src 'none'; style-src 'unsafe-inline'; form-action 'none'; base-uri 'none'"


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def element(name: str, *children: object, **attributes: object) -> Html:
    """Make an element; children that are no `Html`, and attributes, are escaped.

    Args:
        name: of the tag.
        children: what it holds; None is left out.
        attributes: `kind` is the attribute `class`.
    """
    given = "".join(
        f' {"class" if key == "kind" else key}="{html.escape(visible(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    inner = "".join(map(_escaped, children))
    return Html(f"<{name}{given}>{inner}</{name}>")


def _escaped(child: object) -> str:
    if child is None:
        return ""
    return child if isinstance(child, Html) else html.escape(visible(child))


def join(parts: Iterable[Html]) -> Html:
    """Put elements one after another."""
    return Html("".join(parts))


def section(title: str, *children: object, about: str = "") -> Html:
    """Make a part of the page under a heading, with a sentence on how to read it."""
    lead = element("p", about, kind="about") if about else None
    return element("section", element("h2", title), lead, *children)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, kind: str = "") -> Html:
    """Make a table; the first column is at the left, figures at the right."""
    head = join(element("th", column, scope="col") for column in columns)
    body = join(
        element("tr", element("th", name, scope="row"), *(element("td", cell) for cell in cells))
        for name, *cells in rows
    )
    whole = element("table", element("thead", element("tr", head)), element("tbody", body))
    return element("div", whole, kind=f"table {kind}".strip())


def tiles(entries: Iterable[tuple[str, str, str, str]], *, kind: str = "tiles") -> Html:
    """Show figures in large type: a label, the figure, what it means, and `good`, `bad` or none."""
    return element(
        "div",
        *(
            element(
                "div",
                element("span", label, kind="label"),
                element("span", figure, kind="figure"),
                element("span", meaning, kind="meaning"),
                kind=f"tile {state}".strip(),
            )
            for label, figure, meaning, state in entries
        ),
        kind=kind,
    )


def sentences(lines: Iterable[str]) -> Html:
    """List sentences; what is between `backticks` is code."""
    return element("ul", *(element("li", *_prose(line)) for line in lines), kind="sentences")


def _prose(line: str) -> Iterator[object]:
    parts = line.split("`")
    if len(parts) % 2 == 0:  # a name has one, too
        yield line
        return
    for i, part in enumerate(parts):
        yield element("code", part) if i % 2 else part


def plot(svg: str) -> Html:
    """Place a plot that `plots` drew."""
    return element("figure", Html(svg))


def ramp(pale: str, strong: str) -> Html:
    """Explain the colours of a heat map: the figures at both ends."""
    steps = join(element("i", style=f"background:var(--h{i})") for i in range(0, STEPS, 2))
    ends = element("span", pale), element("b", steps), element("span", strong)
    return element("p", *ends, kind="ramp")


def legend(entries: Iterable[tuple[str, int]]) -> Html:
    """Explain the colours of lines: a name, and the number of its colour."""
    return element(
        "p",
        *(
            element("span", element("i", style=f"background:var(--s{series})"), name)
            for name, series in entries
        ),
        kind="legend",
    )


def fold(title: str, *children: object) -> Html:
    """Hide what few look for behind a line that opens it; it is open in print."""
    return element("details", element("summary", title), *children)


def whole_page(title: str, lead: str, *parts: Html) -> bytes:
    """Make the page."""
    head = join(
        [
            Html('<meta charset="utf-8">'),
            Html(f'<meta http-equiv="Content-Security-Policy" content="{html.escape(POLICY)}">'),
            Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
            Html('<meta name="color-scheme" content="light dark">'),
            Html('<meta name="robots" content="noindex">'),
            element("title", title),
            Html(f"<style>{_style_sheet()}</style>"),
        ]
    )
    body = element("main", element("header", element("h1", title), element("p", lead)), *parts)
    text = f'<html lang="en"><head>{head}</head><body>{body}</body></html>\n'
    return START + text.encode("utf-8", "backslashreplace")


def check_page(path: Path | None, *, force: bool) -> None:
    """Refuse a path for a page before any work.

    Raises:
        OutputExistsError: something is there that is no page, or a page without --force.
        UsageError: there is no such folder, or nothing to draw plots with.
        ResourceError: the folder cannot be written.
    """
    if path is None:
        return
    check_matplotlib()
    check_place(path, "--html")
    if not path.exists():
        return
    if not _is_page(path):
        raise OutputExistsError(
            f"--html `{path}` exists and is no page of ortho",
            hint="choose another file; --force replaces pages only",
        )
    if not force:
        raise OutputExistsError(
            f"--html `{path}` exists", hint="choose another file, or replace it with --force"
        )


def _is_page(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(START)) in (b"", START)


def write_page(path: Path, content: bytes) -> None:
    """Write a page whole or not at all."""
    write_whole(path, lambda file: file.write(content))


# Both ends and the middle of the ramp of heat maps: low, half, high.
_RAMP_LIGHT = ((238, 243, 249), (120, 168, 214), (20, 66, 122))
_RAMP_DARK = ((29, 38, 50), (50, 104, 158), (166, 213, 255))


def _style_sheet() -> str:
    light, dark = _ramp(_RAMP_LIGHT), _ramp(_RAMP_DARK)
    rules = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    return (
        f"{rules}:root{{{light}}}@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}"
    )


def _ramp(stops: Sequence[tuple[int, int, int]]) -> str:
    """Spell the colours of a ramp as variables, from low to high."""
    found = []
    for i in range(STEPS):
        at = i / (STEPS - 1) * (len(stops) - 1)
        low = min(int(at), len(stops) - 2)
        pairs = zip(stops[low], stops[low + 1], strict=True)
        rgb = (round(a + (b - a) * (at - low)) for a, b in pairs)
        found.append(f"--h{i}:#" + "".join(f"{channel:02x}" for channel in rgb))
    return ";".join(found)
