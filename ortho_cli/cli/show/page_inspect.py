"""The page of `ortho inspect ARTIFACT --html FILE`: what a split cost, layer by layer.

It shows no weight and no position of ortho: only which share of each block of rows ortho holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ortho_cli.cli.show import page, plots
from ortho_cli.cli.show.console import decibels, number, size
from ortho_cli.cli.show.document import Document
from ortho_cli.cli.show.inspect import (
    artifact_lines,
    base_name,
    ortho_words,
    split_tensors,
    worst_first,
)
from ortho_cli.cli.show.page import Html
from ortho_cli.formats.artifact import ORTHO_FILE, module_of
from ortho_cli.formats.layers import natural, place_of, short_layers

WORST = 10  # weights in the table of the worst
LISTED = 3000  # weights in the table of all; a page of more is slow to open
LAYERS = 200  # across a heat map
KINDS = 40  # down it
ALIKE = 0.02  # relative spread of figures that one sentence tells

Blocks = Mapping[str, Sequence[float]]


class Map(NamedTuple):
    """A figure that is drawn as a heat map, at one alpha or at both with the same colours."""

    title: str
    keys: Mapping[str, str]  # key of the figure -> what it is of
    form: str
    unit: str
    about: str
    falling: bool = False  # the lowest is the worst, and has the strongest colour


ALONE, BOTH = "base alone, alpha 0", "with ortho, alpha 1"
MAPS = (
    Map(
        "Signal to noise",
        {"sqnr_db_alpha_0": ALONE, "sqnr_db_alpha_1": BOTH},
        ".1f",
        " dB",
        "SQNR of each weight; the worst have the strongest colour.",
        falling=True,
    ),
    Map(
        "Error that matters",
        {"curvature_error_alpha_0": ALONE, "curvature_error_alpha_1": BOTH},
        ".0e",
        "",
        "Squared error times curvature, summed over each weight; the worst have the strongest "
        "colour.",
    ),
    Map(
        "What ortho gives back",
        {"residual_kept": "at alpha 1"},
        ".1%",
        "",
        "The share of the squared rounding error that ortho removes.",
    ),
    Map("Bits per weight", {"bits_per_weight": "both files"}, ".2f", "", "Scales included."),
)
NEED_ORTHO = ("sqnr_db_alpha_1", "curvature_error_alpha_1", "residual_kept")


def make_page(described: Mapping[str, object], blocks: Blocks, *, name: str) -> bytes:
    """Make the page of an artifact.

    Args:
        described: as `describe` gives it.
        blocks: the share that ortho holds of each block of rows, by module; empty without ortho.
        name: of the artifact, for the title.
    """
    document = Document(described)
    lead = f"An artifact of ortho ({document['format']}): what the split cost, layer by layer"
    return page.whole_page(name, lead, *artifact_parts(document, blocks, name))


def artifact_parts(document: Document, blocks: Blocks, name: str) -> Iterator[Html]:
    """Give the parts of the page, the verdict first."""
    tensors, has_ortho = split_tensors(document), _has_ortho(document)
    yield page.section(
        "Verdict",
        page.tiles(_tiles(document, tensors)),
        page.sentences(_verdict(document, tensors)),
    )
    yield from map_parts(document, blocks)
    if len(tensors) > WORST:
        worst, by = worst_first(tensors, has_ortho=has_ortho)
        table = page.table(*_table(document, worst[:WORST]))
        yield page.section(f"The {WORST} worst weights", table, about=f"By {by}.")
    yield page.section("All weights", *_all_weights(document, tensors))
    yield page.section("Origin", page.sentences(artifact_lines(document, name)))


def _has_ortho(document: Document) -> bool:
    return document.part("files")[ORTHO_FILE] is not None


def _tiles(document: Document, tensors: Sequence[Document]) -> Iterator[tuple[str, str, str, str]]:
    totals, files = document.optional("totals"), document.part("files")
    base = size(files.number(base_name(files)))
    if totals is None:
        yield "Split weights", f"{len(tensors):,}", "report.json is missing", ""
        yield "Base", base, ortho_words(files), ""
        return
    exact = totals["residual_kept"] is None or totals["sqnr_db_alpha_1"] is None
    bits = number(totals["split_bits_per_weight"])
    alone = number(totals["split_bits_per_weight_base"])
    yield "Bits per split weight", bits, f"{alone} of base alone", ""
    yield (
        "SQNR, base alone",
        f"{decibels(totals['sqnr_db_alpha_0'], exact=exact)} dB",
        "of weights, alpha 0",
        "",
    )
    yield (
        "SQNR, with ortho",
        f"{decibels(totals['sqnr_db_alpha_1'], exact=exact)} dB",
        "of weights, alpha 1",
        "",
    )
    yield (
        "Kept in ortho",
        f"{number(totals.get('density'), '.2%')}",
        f"{totals.number('nnz'):,} weights, {number(totals['residual_kept'], '.1%')} of the error",
        "",
    )
    yield "Whole model", number(totals["bits_per_weight"]), "bits per weight, unsplit included", ""
    yield "Base", base, ortho_words(files), ""


def _verdict(document: Document, tensors: Sequence[Document]) -> Iterator[str]:
    rows, totals = document.rows("tensors"), document.optional("totals")
    yield f"{len(tensors):,} of {len(rows):,} tensors are split; the rest is unchanged."
    if not _has_ortho(document):
        yield f"{ortho_words(document.part('files')).capitalize()}. No figure of ortho is read."
    if totals is not None and (moved := totals.get("moved")):
        share = f"{moved / totals.number('split_weights'):.4%}" if isinstance(moved, int) else "-"
        yield (
            f"{moved:,} codes of base ({share}) were moved to forget. Whether it forgets is "
            "measured by `ortho bench`, not here."
        )
    known = [
        (value, module_of(tensor.text("name")))
        for tensor in tensors
        if isinstance(value := tensor.get("sqnr_db_alpha_0"), int | float)
    ]
    if known:
        (low, worst), (high, best) = min(known), max(known)
        yield (
            f"Base alone keeps {worst} worst, at {low:.2f} dB, and {best} best, at {high:.2f} dB."
        )
    yield (
        "Signal to noise is of weights, not of answers: what the model lost is measured by "
        "`ortho bench` (perplexity, KL)."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Places of weights in a heat map: kinds of Linear down, layers across."""

    places: Mapping[str, tuple[str, str]]  # module -> row, column
    rows: Sequence[str]
    columns: Sequence[str]
    notes: Sequence[str]

    def means(self, values: Mapping[str, float]) -> dict[tuple[str, str], float | None]:
        """Give each cell the mean of its weights' values."""
        cells: dict[tuple[str, str], list[float]] = {}
        for module, value in values.items():
            if module in self.places:
                cells.setdefault(self.places[module], []).append(value)
        return {place: math.fsum(found) / len(found) for place, found in cells.items()}


def _make_grid(modules: Sequence[str]) -> Grid:
    found = {module: place_of(module) for module in modules}
    layers = short_layers(dict.fromkeys(p.layer for p in found.values() if p.layer))
    places = {m: (p.kind, layers[p.layer]) for m, p in found.items() if p.layer}
    if not places:  # no layers: each weight is a column
        places = {module: ("weights", module) for module in modules}
    rows = list(dict.fromkeys(row for row, _ in places.values()))
    columns = sorted(dict.fromkeys(column for _, column in places.values()), key=natural)
    notes = []
    if len(found) > len(places):
        count = len(found) - len(places)
        notes.append(f"{count} outside of layers: see the table of all weights.")
    if len(columns) > LAYERS:
        notes.append(f"Shown are the first {LAYERS} of {len(columns)} layers.")
    if len(rows) > KINDS:
        notes.append(f"Shown are the first {KINDS} of {len(rows)} kinds.")
    if len(places) > len(set(places.values())):
        notes.append("A cell of several weights, such as experts, shows their mean.")
    return Grid(places=places, rows=rows[:KINDS], columns=columns[:LAYERS], notes=notes)


def map_parts(document: Document, blocks: Blocks) -> Iterator[Html]:
    """Give the heat maps of an artifact, and where ortho's weights are."""
    tensors, has_ortho = split_tensors(document), _has_ortho(document)
    grid = _make_grid([module_of(tensor.text("name")) for tensor in tensors])
    drawn = [part for one in MAPS for part in _draw_map(one, grid, tensors, has_ortho=has_ortho)]
    if drawn:
        lead = " ".join(["Layers are across, kinds of Linear down.", *grid.notes])
        yield page.section("Layer by layer", *drawn, about=lead)
    yield page.section("Where ortho's weights are", *_where(document, grid, blocks))


def _draw_map(
    one: Map, grid: Grid, tensors: Sequence[Document], *, has_ortho: bool
) -> Iterator[Html]:
    """Draw one figure, or tell it in a sentence where it is nearly the same everywhere."""
    heats = {}
    for key, of in one.keys.items():
        values = {
            module_of(tensor.text("name")): float(value)
            for tensor in tensors
            if isinstance(value := tensor.get(key), int | float)
            and (has_ortho or key not in NEED_ORTHO)
        }
        heat = plots.Heat(
            title=f"{one.title}, {of}",
            rows=grid.rows,
            columns=grid.columns,
            values=grid.means(values),
            form=one.form,
            falling=one.falling,
        )
        if heat.bounds() is not None:
            heats[of] = heat
    bounds = [bound for heat in heats.values() for bound in heat.bounds() or ()]
    if not bounds:
        return
    low, high = min(bounds), max(bounds)
    ends = [f"{format(end, one.form)}{one.unit}" for end in (low, high)]
    yield page.element("h3", one.title)
    if high - low <= ALIKE * abs(high):
        said = ends[0] if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"
        yield page.element("p", f"{said} in every layer.", kind="about")
        return
    yield page.element("p", one.about, kind="about")
    yield page.ramp(*(reversed(ends) if one.falling else ends))
    for of, heat in heats.items():
        yield page.element("h4", of)
        yield page.plot(plots.draw_heat(replace(heat, scale=(low, high))))


def _where(document: Document, grid: Grid, blocks: Blocks) -> list[Html]:
    if not blocks:
        words = ortho_words(document.part("files"))
        return [page.element("p", f"Not known: {words}.", kind="about")]
    parts: dict[tuple[str, str], list[list[float]]] = {}
    for module, shares in blocks.items():
        if module in grid.places:
            parts.setdefault(grid.places[module], []).append(list(shares))
    means = {
        place: [math.fsum(column) / len(column) for column in zip(*found, strict=False)]
        for place, found in parts.items()
    }
    heat = plots.Heat(
        title="where ortho's weights are",
        rows=grid.rows,
        columns=grid.columns,
        values={},
        form=".2%",
        blocks=max(map(len, means.values()), default=1),
        parts=means,
    )
    low, high = heat.bounds() or (0.0, 0.0)
    about = (
        f"The share of weights that ortho holds, in {heat.blocks} blocks of rows of each weight, "
        "the first rows on top. Where a single weight is, the page does not tell."
    )
    return [
        page.element("p", about, kind="about"),
        page.ramp(f"{low:.2%}", f"{high:.2%}, on a scale of roots"),
        page.plot(plots.draw_heat(heat)),
    ]


def _all_weights(document: Document, tensors: Sequence[Document]) -> Iterator[Html]:
    shown = tensors
    if len(tensors) > LISTED:
        shown, by = worst_first(list(tensors), has_ortho=_has_ortho(document))
        shown = shown[:LISTED]
        about = f"{LISTED:,} of {len(tensors):,} weights, by {by}; `--csv` lists all."
        yield page.element("p", about, kind="about")
    yield page.fold(f"{len(shown):,} weights", page.table(*_table(document, shown)))


def _table(
    document: Document, tensors: Sequence[Document]
) -> tuple[list[str], list[tuple[str, ...]]]:
    has_ortho = _has_ortho(document)
    columns = ["module", "shape", "bits", "nnz", "dB at 0", "dB at 1", "error given back"]
    rows: list[tuple[str, ...]] = []
    for tensor in tensors:
        exact = "residual_kept" in tensor
        at_1 = decibels(tensor.get("sqnr_db_alpha_1"), exact=exact)
        rows.append(
            (
                module_of(tensor.text("name")),
                tensor.shape(),
                number(tensor["bits_per_weight"]),
                f"{tensor.number('nnz'):,}" if has_ortho else "-",
                decibels(tensor.get("sqnr_db_alpha_0"), exact=exact),
                at_1 if has_ortho else "-",
                number(tensor.get("residual_kept"), ".1%") if has_ortho else "-",
            )
        )
    return columns, rows
