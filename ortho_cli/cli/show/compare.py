"""Tables of `ortho inspect A B`: which weights differ, and by how much."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from ortho_cli.cli.show.console import csv_text, number, print_lines, print_table, print_text
from ortho_cli.cli.show.document import Document
from ortho_cli.formats.artifact import module_of
from ortho_cli.formats.layers import natural, place_of

SOME = 3  # names of tensors that only one has


def print_comparison(
    compared: Mapping[str, object], *, first: str, second: str, top: int | None = None
) -> None:
    """Print the tensors that differ, and what holds for all.

    Args:
        compared: as `compare` gives it.
        first: name of the first one.
        second: name of the other.
        top: print only so many tensors, the largest difference first.
    """
    document = Document(compared)
    tensors = [tensor for tensor in sorted_tensors(document, top) if not tensor["same"]][:top]
    sides = ("first", "second")
    artifacts = [side for side in sides if document.part(side)["kind"] == "artifact"]
    to_source = len(artifacts) == 1
    rows = [_row(tensor, artifacts, to_source=to_source) for tensor in tensors]
    names = dict(zip(sides, ("A", "B"), strict=True))
    columns = [
        "module",
        *(
            f"{what} {names[side]}"
            for what in ("bits", "nnz", "dB at 0", "dB at 1")
            for side in artifacts
        ),
        *(() if to_source else ("codes",)),
        *("differ at 0", "differ at 1"),
    ]
    groups = [place_of(module_of(tensor.text("name"))).layer for tensor in tensors]
    if tensors:
        note = (
            "(bits per weight, ortho included; SQNR in dB as each was made; "
            + ("" if to_source else "codes: share of base's codes that differ; ")
            + f"differ: {_formula(document, names)} at alpha 0 and 1)"
        )
        title = "differ" if top is None else "differ, most first"
        print_table(title, columns, rows, note, groups=groups if top is None else ())
    print_lines(_lines(document, names, (first, second)))


def _formula(document: Document, names: Mapping[str, str]) -> str:
    reference = names[document.text("reference")]
    other = "A" if reference == "B" else "B"
    return f"||{other} - {reference}|| / ||{reference}||"


def sorted_tensors(document: Document, top: int | None) -> list[Document]:
    """Sort tensors by name, layer 2 before layer 10; with `top` by their difference."""
    tensors = sorted(document.rows("tensors"), key=lambda tensor: natural(tensor.text("name")))
    return tensors if top is None else sorted(tensors, key=_difference, reverse=True)


def _difference(tensor: Document) -> float:
    """Rank by the difference at alpha 0, then 1; what has no figure and differs comes first."""
    at_0 = tensor["difference_alpha_0"]
    if not isinstance(at_0, int | float):
        return 0.0 if tensor["same"] else math.inf
    at_1 = tensor["difference_alpha_1"]
    return max(at_0, at_1) if isinstance(at_1, int | float) else at_0


def _row(tensor: Document, artifacts: list[str], *, to_source: bool) -> tuple[str, ...]:
    told = [tensor.part(side) for side in artifacts]
    return (
        module_of(tensor.text("name")),
        *(number(one.get("bits_per_weight")) for one in told),
        *(number(one.get("nnz"), ",d") for one in told),
        *(number(one.get("sqnr_db_alpha_0")) for one in told),
        *(number(one.get("sqnr_db_alpha_1")) for one in told),
        *(() if to_source else (number(tensor["codes_differ"], ".2%"),)),
        *(_percent(tensor[f"difference_alpha_{alpha}"]) for alpha in (0, 1)),
    )


def _percent(value: object) -> str:
    return f"{100 * value:.3g}%" if isinstance(value, int | float) else "-"


def _lines(document: Document, names: Mapping[str, str], given: tuple[str, str]) -> Iterator[str]:
    totals = document.part("totals")
    for (side, name), path in zip(names.items(), given, strict=True):
        about = document.part(side)
        words = f"{about['tensors']} tensors"
        if about["kind"] == "artifact":
            words += f", {about['split_tensors']} split"
            if not about["ortho"]:
                words += ", ortho sealed" if about["sealed"] else ", ortho absent"
                words += ": alpha 1 is not compared"
        yield f"{name}: {path}, {about['kind']}, {words}"
    for side, name in names.items():
        yield from _some(document.items_of(f"only_in_{side}"), f"only {name} has")
    for other in document.rows("other_shapes"):
        shapes = (" x ".join(map(str, other.items_of(side))) or "scalar" for side in names)
        yield f"other shapes: {other['name']} is {' in A and '.join(shapes)} in B"
    differ, count = totals["differ"], totals["tensors"]
    yield f"{differ} of {count} tensors differ" if differ else f"all {count} tensors are the same"
    if not differ:
        return
    figures = [
        f"{_percent(totals[f'difference_alpha_{alpha}'])}{_decibels(document, alpha)} at "
        f"alpha {alpha}"
        for alpha in (0, 1)
        if totals[f"difference_alpha_{alpha}"] is not None
    ]
    codes = totals["codes_differ"]
    share = "" if codes is None else f"; {number(codes, '.2%')} of base's codes differ"
    yield f"over split weights {_formula(document, names)} is {', '.join(figures)}{share}"


def _decibels(document: Document, alpha: int) -> str:
    """Spell the difference from a checkpoint in decibels, too."""
    kinds = {document.part(side)["kind"] for side in ("first", "second")}
    value = document.part("totals")[f"difference_alpha_{alpha}"]
    if kinds == {"artifact"} or not isinstance(value, int | float):
        return ""
    return f" ({-20 * math.log10(value):.2f} dB)" if value else " (exact)"


def _some(names: object, lead: str) -> Iterator[str]:
    listed = [str(name) for name in names] if isinstance(names, list | tuple) else []
    if listed:
        more = f" and {len(listed) - SOME} more" if len(listed) > SOME else ""
        yield f"{lead} {', '.join(listed[:SOME])}{more}"


def print_comparison_csv(compared: Mapping[str, object], *, top: int | None = None) -> None:
    """Print every tensor that both have as CSV."""
    rows = []
    for tensor in sorted_tensors(Document(compared), top)[:top]:
        sides = {
            f"{side}_{key}": value
            for side in ("first", "second")
            for key, value in tensor.part(side).items()
        }
        figures = {key: value for key, value in tensor.items() if not isinstance(value, dict)}
        rows.append({**figures, "shape": tensor.shape().replace(" ", ""), **sides})
    print_text(csv_text(rows))
