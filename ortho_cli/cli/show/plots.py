"""Plots for a page: SVG by matplotlib, in colours that the page's style sheet gives.

A plot is drawn once, and reads well in light, dark and print: its colours are marks that become
variables of CSS. Text stays text. The same figures give the same bytes: ids are salted, and there
is no date. matplotlib is imported when the first plot is drawn.

Why SVG: plotly.js takes 4.8 MB per page, Vega with its parser 0.8 MB, and both need scripts. A plot
here takes 10 to 200 kB, runs nothing, and prints. Altair writes SVG, too, but by a browser's engine
of 30 MB.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from ortho_cli.cli.show.console import visible
from ortho_cli.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

WIDTH = 1040.0  # of a plot, in pixels
STEPS = 16  # of the ramp of a heat map
SERIES = 6  # colours of lines
# Marks, by the variables of CSS that replace them.
INK, MUTED, RULE = "#010000", "#010001", "#010002"
LINES = tuple(f"#0200{i:02x}" for i in range(SERIES))
HEAT = tuple(f"#0300{i:02x}" for i in range(STEPS))
ON_LOW, ON_HIGH = "#040000", "#040001"  # text on cells
GOOD, BAD = "#050000", "#050001"
VARIABLES = {
    "#000000": "ink",  # what matplotlib takes where nothing is said
    INK: "ink",
    MUTED: "muted",
    RULE: "rule",
    ON_LOW: "on-low",
    ON_HIGH: "on-high",
    GOOD: "good",
    BAD: "bad",
    **{mark: f"s{i}" for i, mark in enumerate(LINES)},
    **{mark: f"h{i}" for i, mark in enumerate(HEAT)},
}
FONT = "DejaVu Sans"  # comes with matplotlib: text has the same size on every machine
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "ortho",
    "text.parse_math": False,  # names from files are no formulas
    "font.family": FONT,
    "font.size": 10.0,
    "text.color": INK,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 9.0,
    "ytick.labelsize": 9.0,
    "xtick.major.size": 0.0,
    "ytick.major.size": 0.0,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
}


def check_matplotlib() -> None:
    """Refuse to begin where plots cannot be drawn.

    Raises:
        UsageError: says what to install.
    """
    if find_spec("matplotlib") is None:
        raise UsageError(
            "--html needs matplotlib, which is not installed", hint="pip install 'ortho-cli[html]'"
        )


@contextmanager
def _style() -> Iterator[None]:
    """Draw in our style, whatever the user's matplotlibrc says."""
    import matplotlib as mpl

    with warnings.catch_warnings(), mpl.rc_context():
        warnings.simplefilter("ignore")  # a glyph that the font lacks, which the page has
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)
        yield


def _make_figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width / 72, height / 72), dpi=72)


def _svg(figure: Figure, label: str) -> str:
    """Write a figure as an element of HTML that scales to its place."""
    from xml.sax.saxutils import quoteattr

    from matplotlib.backends.backend_svg import FigureCanvasSVG

    raw = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    FigureCanvasSVG(figure).print_svg(raw, metadata=nothing)
    text = raw.getvalue()
    text = text[text.index("<svg") :]  # no prolog
    box = re.search(r'viewBox="[^"]*"', text)
    text = re.sub(r"<[^>]*>", _with_variables, text[text.index(">") + 1 :])
    head = f'<svg {box[0] if box else ""} role="img" aria-label={quoteattr(visible(label))}>'
    return head + re.sub(r">\s+<", "><", text.strip())


def _with_variables(tag: re.Match[str]) -> str:
    """Take out of one tag what the page does not need, and give it the page's colours and font."""
    if tag[0].startswith("<g "):  # other ids are referred to
        return re.sub(r' id="[^"]*"', "", tag[0])
    text = re.sub(r' transform="rotate\(-?0 [^"]*"', "", tag[0])
    text = text.replace(f"'{FONT}'", "var(--font)").replace("; stroke-linejoin: miter", "")
    return re.sub(r"#[0-9a-f]{6}\b", _variable, text)


def _variable(mark: re.Match[str]) -> str:
    return f"var(--{VARIABLES.get(mark[0], 'ink')})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Heat:
    """A heat map: rows down, columns across; a value that is not known is None."""

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Mapping[tuple[str, str], float | None]
    form: str  # of the numbers in cells
    falling: bool = False  # the lowest value has the strongest colour
    scale: tuple[float, float] | None = None  # ends of the ramp; None is those of the values
    blocks: int = 1  # cells of a row, one above the other; their values are `parts`
    parts: Mapping[tuple[str, str], Sequence[float]] | None = None

    def bounds(self) -> tuple[float, float] | None:
        """Find the smallest and the largest value; None where none is known."""
        parts = self.parts or {}
        listed = [value for cell in parts.values() for value in cell]
        listed += [value for value in self.values.values() if value is not None]
        known = [value for value in listed if math.isfinite(value)]
        return (min(known), max(known)) if known else None


LABEL = 6.2  # pixels of a character of a label
LONGEST_LABEL = 34  # characters


def label_of(name: str) -> str:
    """Make a name that comes from a file fit beside a plot; the left is cut."""
    shown = visible(name)
    return shown if len(shown) <= LONGEST_LABEL else f"..{shown[-LONGEST_LABEL + 2 :]}"


def draw_heat(heat: Heat) -> str:
    """Draw a heat map; cells hold their number where there is room."""
    labels = [label_of(row) for row in heat.rows]
    left = LABEL * max(map(len, labels)) + 14
    side = min(44.0, (WIDTH - left - 4) / len(heat.columns))
    tall, part = (24.0, 24.0) if heat.parts is None else (heat.blocks * 5.0, 5.0)
    gap = 0.0 if heat.parts is None else 8.0
    height = len(labels) * (tall + gap) + 22
    cells: dict[int, list[tuple[float, float, float, float]]] = {}
    with _style():
        figure = _make_figure(WIDTH, height)
        axes = _canvas(figure, height)
        for down, (row, label) in enumerate(zip(heat.rows, labels, strict=True)):
            top = 20 + down * (tall + gap)
            _text(axes, left - 8, top + tall / 2, label, MUTED, 9.5, "right")
            for across, column in enumerate(heat.columns):
                x = left + across * side
                values = _cell_values(heat, (row, column))
                for i, value in enumerate(values):
                    step = _step(heat, value)
                    room = 1.0 if side > 6 else 0.0
                    box = (x, top + i * part, side - room, part - (1.0 if len(values) == 1 else 0))
                    cells.setdefault(step, []).append(box)
                if heat.parts is None and values and side >= 27:
                    ink = ON_HIGH if _step(heat, values[0]) > 0.55 * STEPS else ON_LOW
                    shown = format(values[0], heat.form)
                    _text(axes, x + side / 2 - 0.5, top + tall / 2, shown, ink, 8.0, "center")
        every = max(1, math.ceil(max(22, LABEL * _longest(heat.columns)) / side))
        for across, column in enumerate(heat.columns[::every]):
            x = left + (across * every + 0.5) * side
            _text(axes, x, 9, label_of(column), MUTED, 9.0, "center")
        for step, boxes in sorted(cells.items()):
            _boxes(axes, boxes, HEAT[step])
        return _svg(figure, heat.title)


def _longest(names: Sequence[str]) -> int:
    return max(len(label_of(name)) for name in names)


def _cell_values(heat: Heat, place: tuple[str, str]) -> Sequence[float]:
    if heat.parts is not None:
        return heat.parts.get(place, ())
    value = heat.values.get(place)
    return () if value is None or not math.isfinite(value) else (value,)


def _step(heat: Heat, value: float) -> int:
    """Choose the colour of a value; of parts by the root of their place between both ends."""
    low, high = heat.scale or heat.bounds() or (0.0, 0.0)
    if high <= low:
        return STEPS // 3
    place = min(1.0, max(0.0, (value - low) / (high - low)))
    place = math.sqrt(place) if heat.parts is not None else place
    return min(STEPS - 1, int((1.0 - place if heat.falling else place) * STEPS))


def _canvas(figure: Figure, height: float) -> Axes:
    """Cover a figure with axes in pixels from the top left."""
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, WIDTH)
    axes.set_ylim(height, 0)
    axes.set_axis_off()
    return axes


def _text(axes: Axes, x: float, y: float, text: str, ink: str, size: float, align: str) -> None:
    axes.text(x, y, text, color=ink, fontsize=size, ha=align, va="center_baseline", zorder=3)


def _boxes(axes: Axes, boxes: Sequence[tuple[float, float, float, float]], ink: str) -> None:
    """Fill rectangles of one colour, as one path."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    corners = [((x, y), (x + w, y), (x + w, y + h), (x, y + h), (x, y)) for x, y, w, h in boxes]
    codes = (Path.MOVETO, *(Path.LINETO,) * 3, Path.CLOSEPOLY)
    path = Path([point for box in corners for point in box], list(codes) * len(corners))
    axes.add_patch(PathPatch(path, facecolor=ink, edgecolor="none", linewidth=0, zorder=2))


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A line of points (x, value, low, high); low and high are NaN where there is no interval."""

    name: str
    points: Sequence[tuple[float, float, float, float]]
    series: int = 0  # its colour
    dashed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One small plot: lines, and levels across it."""

    title: str
    lines: Sequence[Line]
    levels: Sequence[tuple[str, float]] = ()  # a word, a value
    form: str = ".3g"
    x_label: str = ""
    floor: float | None = None  # the axis begins there
    by_place: bool = False  # x is shown as evenly spaced places: steps 0, 5, 10, 20, 80


def draw_panels(panels: Sequence[Panel], *, across: int = 3, tall: float = 150.0) -> str:
    """Draw small plots side by side."""
    across = min(across, len(panels))
    down = math.ceil(len(panels) / across)
    wide, height = WIDTH / max(across, 2), down * (tall + 66)
    with _style():
        figure = _make_figure(WIDTH, height)
        for i, panel in enumerate(panels):
            x, y = (i % across) * wide + 46, (i // across) * (tall + 66) + 24
            box = (x / WIDTH, 1 - (y + tall) / height, (wide - 100) / WIDTH, tall / height)
            _draw_panel(figure.add_axes(box), panel)
        return _svg(figure, ", ".join(panel.title for panel in panels))


def _draw_panel(axes: Axes, panel: Panel) -> None:
    places = sorted({x for line in panel.lines for x, *_ in line.points})
    spot = {x: float(i) if panel.by_place else x for i, x in enumerate(places)}
    for line in panel.lines:
        ink, xs = LINES[line.series % SERIES], [spot[x] for x, *_ in line.points]
        if any(math.isfinite(low) for _, _, low, _ in line.points):
            lows, highs = ([point[i] for point in line.points] for i in (2, 3))
            axes.fill_between(xs, lows, highs, color=ink, alpha=0.16, linewidth=0)
        style = (0, (3, 2)) if line.dashed else "-"
        axes.plot(
            xs, [value for _, value, *_ in line.points], color=ink, marker="o", linestyle=style
        )
    axes.set_title(visible(panel.title), pad=8)
    axes.set_xlabel(panel.x_label, fontsize=9)
    axes.set_xticks([spot[x] for x in places], [f"{x:g}" for x in places])
    axes.locator_params(axis="y", nbins=5)
    axes.yaxis.set_major_formatter(_formatter(panel.form))
    axes.grid(visible=False, axis="x")
    low, high = axes.get_ylim()
    axes.set_ylim(low if panel.floor is None else panel.floor, high)
    _draw_levels(axes, panel.levels)


def _draw_levels(axes: Axes, levels: Sequence[tuple[str, float]]) -> None:
    """Draw lines across axes; names at the right, those of nearly the same level together."""
    for _, level in levels:
        axes.axhline(level, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    low, high = axes.get_ylim()
    near = (high - low) * 11 / max(1.0, axes.get_window_extent().height)
    groups: list[tuple[list[str], float]] = []
    for name, level in sorted(levels, key=lambda one: one[1]):
        if groups and level - groups[-1][1] < near:
            groups[-1][0].append(visible(name))
        else:
            groups.append(([visible(name)], level))
    for names, level in groups:
        _write_beside(axes, "\n".join(names), level, gap=5, size=8.0, ink=MUTED)


def _write_beside(
    axes: Axes, text: str, level: float, *, gap: float, size: float, ink: str
) -> None:
    """Write at the right of axes, so many points from them, at a level of their data."""
    axes.annotate(
        text,
        (1.0, level),
        xycoords=("axes fraction", "data"),
        xytext=(gap, 0),
        textcoords="offset points",
        va="center",
        fontsize=size,
        color=ink,
    )


def _formatter(form: str) -> FuncFormatter:
    from matplotlib.ticker import FuncFormatter

    if form.endswith("%"):  # 0.025 would be 2 % as well as 3 %
        return FuncFormatter(lambda value, _: f"{100 * value:.3g} %")
    return FuncFormatter(lambda value, _: f"{value:.4g}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Dots:
    """Dots beside names: one column of a dot plot; a threshold divides good from bad."""

    title: str
    values: Mapping[str, tuple[float, float, float]]  # value, low, high
    threshold: tuple[str, float] | None = None
    form: str = ".2f"
    floor: float | None = None
    ceiling: float | None = None  # larger values are arrows at the edge


def draw_dots(names: Sequence[str], columns: Sequence[Dots], *, strong: Sequence[str] = ()) -> str:
    """Draw dots with intervals, a row for each name; `strong` ones stand out."""
    labels = [label_of(name) for name in names]
    left = LABEL * max(map(len, labels)) + 16
    wide, height = (WIDTH - left) / max(2, len(columns)), len(names) * 22.0 + 60
    with _style():
        figure = _make_figure(WIDTH, height)
        for i, column in enumerate(columns):
            box = ((left + i * wide) / WIDTH, 22 / height, (wide - 76) / WIDTH, 1 - 60 / height)
            axes = figure.add_axes(box)
            _draw_dots(axes, names, column, strong)
            axes.set_yticks(range(len(names)), labels if i == 0 else [""] * len(labels))
            axes.tick_params(axis="y", labelcolor=INK, pad=8)
        return _svg(figure, ", ".join(column.title for column in columns))


def _draw_dots(axes: Axes, names: Sequence[str], column: Dots, strong: Sequence[str]) -> None:
    for down, name in enumerate(names):
        if name not in column.values:
            continue
        value, low, high = column.values[name]
        most = math.inf if column.ceiling is None else column.ceiling
        ink = LINES[0] if name in strong else MUTED
        if math.isfinite(low) and math.isfinite(high):
            ends = [min(low, most), min(high, most)]
            axes.plot(ends, [down, down], color=ink, linewidth=1.4, solid_capstyle="butt")
        marker = "o" if value <= most else ">"
        axes.plot([min(value, most)], [down], color=ink, marker=marker, markersize=6)
        text = format(value, column.form)
        _write_beside(axes, text, down, gap=8, size=9.0, ink=INK if name in strong else MUTED)
    if column.threshold is not None:
        word, at = column.threshold
        axes.axvline(at, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        axes.annotate(
            visible(word),
            (at, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 1),
            textcoords="offset points",
            ha="center",
            fontsize=8.0,
            color=MUTED,
        )
    axes.set_title(visible(column.title), pad=16)
    axes.set_ylim(len(names) - 0.4, -0.7)
    axes.locator_params(axis="x", nbins=6)
    low, high = axes.get_xlim()
    room = 0.03 * (high - low)  # a threshold at the edge keeps clear of the numbers
    axes.set_xlim(low if column.floor is None else column.floor - room, high + room)
    axes.xaxis.set_major_formatter(_formatter(column.form))
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bars:
    """Bars from 0, one for each name."""

    title: str
    values: Mapping[str, float]
    series: int = 0  # their colour


FEWEST_BARS = 16  # that fill a plot: of fewer each would be a block


def draw_bars(panels: Sequence[Bars], *, tall: float = 120.0) -> str:
    """Draw plots of bars, one above the other."""
    step = tall + 58
    height = len(panels) * step
    with _style():
        figure = _make_figure(WIDTH, height)
        for i, panel in enumerate(panels):
            y = i * step + 24
            box = (56 / WIDTH, 1 - (y + tall) / height, (WIDTH - 66) / WIDTH, tall / height)
            axes, labels = figure.add_axes(box), [label_of(name) for name in panel.values]
            axes.bar(range(len(labels)), list(panel.values.values()), color=LINES[panel.series])
            every = math.ceil((_longest(labels) + 2) * LABEL * len(labels) / WIDTH)
            axes.set_xticks(range(0, len(labels), every), labels[::every])
            axes.set_xlim(-0.8, max(len(labels), FEWEST_BARS) - 0.2)
            axes.set_xlabel("layer", fontsize=9)
            axes.set_title(visible(panel.title), pad=8)
            axes.locator_params(axis="y", nbins=5)
            axes.yaxis.set_major_formatter(_formatter(".3g"))
            axes.grid(visible=False, axis="x")
        return _svg(figure, ", ".join(panel.title for panel in panels))


def draw_pairs(
    before: Mapping[int, float], after: Mapping[int, float], levels: Sequence[tuple[str, float]]
) -> str:
    """Draw for each number a value before and after, joined by a line."""
    numbers = sorted(after)
    height = 230.0
    with _style():
        figure = _make_figure(WIDTH, height)
        axes = figure.add_axes(
            (46 / WIDTH, 40 / height, (WIDTH - 110) / WIDTH, (height - 60) / height)
        )
        spots = range(len(numbers))
        both = [(i, before[n], after[n]) for i, n in enumerate(numbers) if n in before]
        for i, was, now in both:
            axes.plot([i, i], [was, now], color=RULE, linewidth=2.2, zorder=1)
        size = 5.5 if len(numbers) <= 80 else 3.0
        if both:
            axes.plot(
                [i for i, *_ in both],
                [was for _, was, _ in both],
                color=LINES[1],
                marker="o",
                linestyle="none",
                markersize=size,
            )
        axes.plot(
            spots,
            [after[n] for n in numbers],
            color=LINES[0],
            marker="o",
            linestyle="none",
            markersize=size,
        )
        every = max(1, math.ceil(len(numbers) / 40))
        axes.set_xticks(list(spots)[::every], [str(n) for n in numbers][::every])
        axes.set_xlim(-0.8, len(numbers) - 0.2)
        highest = max([axes.get_ylim()[1], *(1.04 * level for _, level in levels)])
        axes.set_ylim(min(0.0, axes.get_ylim()[0]), highest)
        _draw_levels(axes, levels)
        axes.set_xlabel("number of the secret in its file", fontsize=9)
        axes.set_ylabel("exposure, bits", fontsize=9)
        axes.grid(visible=False, axis="x")
        return _svg(figure, "exposure of each secret, before and after")
