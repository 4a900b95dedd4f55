"""What eyes see of results and errors, on stderr; only modules named report* import rich."""

from __future__ import annotations

import json
import math
import sys
import traceback
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ortho_cli.errors import OrthoError

WIDE = 140  # columns where there is no terminal to ask
ROWS = 1000  # of a table that rich lays out; it takes a millisecond and ten kilobytes for each


def make_console() -> Console:
    """Open stderr; colours obey NO_COLOR and vanish off a terminal."""
    width = None if sys.stderr.isatty() else WIDE
    return Console(
        stderr=True,
        highlight=False,
        markup=False,
        emoji=False,
        width=width,
        soft_wrap=not sys.stderr.isatty(),
    )


def print_json(document: object) -> None:
    """Print one JSON document on stdout."""
    sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=True) + "\n")
    sys.stdout.flush()


LONGEST = 4000  # characters of a line: a name can have as many as its file has bytes


def visible(text: object) -> str:
    """Show what a stranger named: control characters and terminal escapes spelled out."""
    shown = str(text)
    if len(shown) > LONGEST:
        shown = f"{shown[: LONGEST // 2]} ... {shown[-LONGEST // 2 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)


def size(nbytes: float) -> str:
    """Bytes in decimal units, as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"


def print_error(error: OrthoError) -> None:
    """Print the sentence, and the hint on a line of its own."""
    console = make_console()
    console.print(Text.assemble(("error: ", "bold red"), visible(error.message)), soft_wrap=True)
    if error.hint:
        console.print(Text.assemble(("hint: ", "bold"), visible(error.hint)), soft_wrap=True)


def print_note(note: str) -> None:
    """Print something that the user should know and need not act on."""
    make_console().print(visible(f"note: {note}"), soft_wrap=True)


def print_bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print a traceback, whose last line can say what a stranger named, as `visible` text."""
    for entry in traceback.format_exception(kind, error, trace):
        for line in entry.rstrip("\n").split("\n"):
            sys.stderr.write(visible(line) + "\n")


def _table(title: str, *columns: str) -> Table:
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
    return table


def _print_rows(
    console: Console, title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]
) -> None:
    """Print a table with a row for each tensor, however many there are."""
    if len(rows) <= ROWS:
        table = _table(title, *columns)
        for name, *cells in rows:
            table.add_row(Text(name), *cells)
        console.print(table)
        return
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]

    def line(cells: tuple[str, ...]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return " ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)])

    console.print(Text(title, "bold"), soft_wrap=True)
    console.print(Text(line(columns), "dim"), soft_wrap=True)
    for start in range(0, len(rows), ROWS):
        piece = "\n".join(map(line, rows[start : start + ROWS]))
        console.print(Text(piece), soft_wrap=True)


def _number(value: object, form: str = ".2f") -> str:
    return format(value, form) if isinstance(value, int | float) else "-"


def _decibels(value: object, *, exact: bool) -> str:
    return "exact" if value is None and exact else _number(value)


def _bytes_a_second(document: dict[str, Any]) -> float:
    """Guess a worker's speed from what was measured: a search reads and tries again and again."""
    rounding = document["recipe"]["base"]["rounding"]
    if rounding != "nearest":
        return 6e6 if rounding == "gptq" else 2e5
    searched = any(tensor["scale"] in ("mse", "curvature") for tensor in document["tensors"])
    return 4e7 if searched else 5e8


def print_plan(document: dict[str, Any], *, source: str) -> None:
    """Print the surgery plan: what is split, what is not and why, sizes, memory."""
    console, totals = make_console(), document["totals"]
    split = [t for t in document["tensors"] if t["action"] == "split"]
    kept = [t for t in document["tensors"] if t["action"] == "copy"]
    columns = ("shape", "dtype", "bits", "scale", "density")
    table = _table("split", "module", "count", *columns, "k each")
    for name, same in _grouped(split, *columns):
        one = same[0]
        table.add_row(
            Text(visible(name.removesuffix(".weight"))),
            str(len(same)),
            _shape(one["shape"]),
            one["dtype"],
            str(one["bits"]),
            one["scale"],
            f"{one['density']:.2%}",
            f"{one['k']:,}",
        )
    console.print(table)
    console.print()
    table = _table(
        "carried over unchanged", "tensor", "count", "shape", "dtype", "share", "because"
    )
    for name, same in _grouped(kept, "shape", "dtype", "reason"):
        share = sum(math.prod(t["shape"]) for t in same) / totals["weights"]
        one = same[0]
        table.add_row(
            Text(visible(name)),
            str(len(same)),
            _shape(one["shape"]),
            one["dtype"],
            f"{share:.2%}",
            one["reason"],
        )
    if kept:
        console.print(table)
        console.print()
    told = document["statistics"]
    kind = document["recipe"]["saliency"]["kind"]
    most = "at most " if totals.get("ortho_bytes_at_most") else ""
    rate = _bytes_a_second(document)
    seconds = max(1, round(totals["bytes_read"] / rate / totals["workers"]))
    for line in (
        f"{source}: {totals['split_tensors']} of {totals['tensors']} tensors split, "
        f"{totals['split_weights'] / totals['weights']:.1%} of {totals['weights']:,} weights, "
        f"group size {document['group_size']}",
        f"weights kept by {kind}"
        + (f"; curvature is {told['kind']}, {told['storage']} storage" if told else ""),
        f"base {size(totals['base_bytes'])} + ortho {most}{size(totals['ortho_bytes'])} "
        f"from {size(totals['bytes_read'])}: "
        f"{most}{totals['bits_per_weight']:.2f} bits a weight over the whole model",
        f"buffers {size(totals['peak_bytes'])} over torch for {totals['workers']} workers; "
        f"about {seconds} s at {size(rate)}/s a worker",
        *(f"note: {note}" for note in document["notes"]),
    ):
        console.print(visible(line), soft_wrap=True)


def _fold(name: str) -> str:
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def _grouped(tensors: list[dict[str, Any]], *alike: str) -> list[tuple[str, list[dict[str, Any]]]]:
    """Put tensors together whose names differ in numbers only and whose `alike` are equal."""
    groups: dict[str, list[dict[str, Any]]] = {}
    names: dict[str, str] = {}
    for tensor in tensors:
        name = _fold(tensor["name"])
        key = repr((name, [tensor[field] for field in alike]))
        names[key] = name
        groups.setdefault(key, []).append(tensor)
    return [(names[key], same) for key, same in groups.items()]


def _shape(shape: list[int]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def print_artifact(document: dict[str, Any], *, folder: str) -> None:
    """Print an artifact tensor by tensor, then in total; what a missing ortho would add is `-`."""
    console, totals = make_console(), document.get("totals", {})
    there = document["files"]["ortho.safetensors"] is not None
    weighted = document.get("statistics") is not None
    more = ("error at 0", "error at 1") if weighted else ()
    columns = ("module", "shape", "bits", "nnz", "dB at 0", "dB at 1", "kept", *more)
    rows = []
    for tensor in document["tensors"]:
        if tensor["action"] == "split":
            measured = "residual_kept" in tensor
            row = (
                visible(tensor["name"].removesuffix(".weight")),
                _shape(tensor["shape"]),
                _number(tensor["bits_per_weight"]),
                f"{tensor['nnz']:,}" if there else "-",
                _decibels(tensor.get("sqnr_db_alpha_0"), exact=measured),
                _decibels(tensor.get("sqnr_db_alpha_1"), exact=measured) if there else "-",
                _number(tensor.get("residual_kept"), ".1%") if there else "-",
                *(_curvature_errors(tensor, there=there) if weighted else ()),
            )
            rows.append(row)
    _print_rows(console, "split", columns, rows)
    console.print(
        "(bits a weight with ortho; SQNR at alpha 0 and 1; kept share of the squared residual"
        + ("; sum of squared residual times curvature at alpha 0 and 1)" if weighted else ")"),
        style="dim",
    )
    console.print()
    for line in _artifact_lines(document, totals, folder):
        console.print(visible(line), soft_wrap=True)


def _rounding_lines(document: dict[str, Any]) -> list[str]:
    """Say what decibels do not, where codes are not the nearest."""
    rounding = document["recipe"]["base"]["rounding"]
    if rounding == "nearest":
        return []
    return [f"rounding {rounding}: fewer dB of weights are its price for outputs that err less"]


def _curvature_errors(figures: dict[str, Any], *, there: bool) -> tuple[str, str]:
    at_1 = _number(figures.get("curvature_error_alpha_1"), ".3g")
    return _number(figures.get("curvature_error_alpha_0"), ".3g"), at_1 if there else "-"


def _artifact_lines(document: dict[str, Any], totals: dict[str, Any], folder: str) -> list[str]:
    files = document["files"]
    ortho = files["ortho.safetensors"]
    base = next(name for name in ("model.safetensors", "base.safetensors") if name in files)
    split = [t for t in document["tensors"] if t["action"] == "split"]
    lines = [
        f"{folder}: {document['format']}, {len(split)} of {len(document['tensors'])} tensors split",
        f"base {size(files[base])}, " + _ortho_words(files),
    ]
    if totals:
        exact = totals["residual_kept"] is None or totals["sqnr_db_alpha_1"] is None
        lines += [
            f"{totals['split_bits_per_weight']:.2f} bits a split weight with ortho, "
            f"{totals['split_bits_per_weight_base']:.2f} without; "
            f"{totals['bits_per_weight']:.2f} over the whole model",
            f"SQNR {_decibels(totals['sqnr_db_alpha_0'], exact=exact)} dB at alpha 0, "
            f"{_decibels(totals['sqnr_db_alpha_1'], exact=exact)} dB at alpha 1; "
            f"{totals['nnz']:,} weights kept hold {_number(totals['residual_kept'], '.1%')} of "
            f"the squared residual",
            *_rounding_lines(document),
            *_curvature_lines(document, totals, there=ortho is not None),
        ]
    else:
        lines.append("report.json is missing: decibels are not known")
    source = document["source_digest"]
    lines += [
        f"source {source[:16] if source else 'unknown'}, plan {document['plan_sha256'][:16]}, "
        + ", ".join(f"{name} {version}" for name, version in document["versions"].items()),
        f"recipe {_settings(document['recipe'])}",
    ]
    if checked := document.get("source_checked"):
        lines.append(f"made from {checked['source']}: {checked['tensors']} tensors, every byte")
    if values := document.get("values_checked"):
        lines.append(
            f"every one of {values['weights']:,} split weights is the source's or its own code; "
            f"{values['moved']:,} codes are not the source's nearest"
        )
    verified = document.get("verified")
    if verified:
        checked = "; ".join(f"{name} against {what}" for name, what in verified["checked"].items())
        lines.append(
            f"verified {verified['tensors']} tensors, {size(verified['bytes'])}: {checked}"
        )
    return lines


def _ortho_words(files: dict[str, Any]) -> str:
    ortho, sealed = files["ortho.safetensors"], files.get("ortho.safetensors.age")
    if sealed is not None:
        return f"ortho {size(sealed)}, sealed" + (", opened" if ortho else ": --identity opens it")
    return "ortho absent: alpha = 0 is all there is" if ortho is None else f"ortho {size(ortho)}"


def _settings(recipe: dict[str, Any]) -> str:
    """Name the settings that are not the defaults, as --set takes them."""
    from ortho_cli.decompose.recipe import DEFAULT

    usual = dict(_flat(DEFAULT.canonical()))
    found = [
        f"{key}={json.dumps(value)}" for key, value in _flat(recipe) if usual.get(key) != value
    ]
    return " ".join(found) or "of defaults"


def _flat(settings: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{path}{key}.")
        else:
            yield path + key, value


def _curvature_lines(
    document: dict[str, Any], totals: dict[str, Any], *, there: bool
) -> Iterator[str]:
    told = document.get("statistics")
    if told is not None:
        at_0, at_1 = _curvature_errors(totals, there=there)
        yield (
            f"error weighted by curvature ({told.get('kind')}, {told.get('storage')}): {at_0} at "
            f"alpha 0, {at_1} at alpha 1; "
            f"{_number(totals.get('saliency_kept'), '.1%')} of the saliency is kept"
        )


def print_statistics(document: dict[str, Any], *, path: str) -> None:
    """Print what a statistics file holds, tensor by tensor and in total."""
    console = make_console()
    entries = document["tensors"]
    overlap = any("overlap" in entry for entry in entries.values())
    columns = ("module", "shape", "mean", *(("overlap",) if overlap else ()))
    rows = []
    for name, entry in sorted(entries.items()):
        more = (_number(entry.get("overlap"), ".3f"),) if overlap else ()
        row = (
            visible(name.removesuffix(".weight")),
            _shape(entry["shape"]),
            _number(entry.get("mean"), ".3g"),
            *more,
        )
        rows.append(row)
    _print_rows(console, "measured", columns, rows)
    console.print()
    lines = [
        f"{path}: {document['kind']} curvature of {len(entries)} tensors, a {document['unit']} "
        f"squared at a time, {document['storage']} storage{_gram_words(document)}, "
        f"{size(document['file_bytes'])}"
    ]
    for name, told in document["data"].items():
        lines.append(f"{name} set: {told['sequences']:,} sequences, {told['tokens']:,} tokens")
    lines.append(f"source {document['source_digest'][:16]}, statistics {document['digest'][:16]}")
    if document["has_forget"]:
        lines.append(
            "warning: gradients of the forget set give its text back; keep this file as private "
            "as the data"
        )
    if verified := document.get("verified"):
        lines.append(f"verified {verified['tensors']} tensors, {size(verified['bytes'])}")
    for line in lines:
        console.print(visible(line), soft_wrap=True)


def print_done(document: dict[str, Any]) -> None:
    """Print what a finished decomposition gave."""
    console, totals, run = make_console(), document["totals"], document["run"]
    exact = totals["sqnr_db_alpha_1"] is None
    for line in (
        f"{run['output']}: {totals['split_tensors']} of {totals['tensors']} tensors split, "
        f"{totals['split_bits_per_weight']:.2f} bits a split weight, "
        f"{totals['bits_per_weight']:.2f} over the whole model",
        f"base {size(totals['base_bytes'])} + ortho {size(totals['ortho_bytes'])} from "
        f"{size(totals['source_bytes'])}; "
        f"SQNR {_decibels(totals['sqnr_db_alpha_0'], exact=exact)} dB at alpha 0, "
        f"{_decibels(totals['sqnr_db_alpha_1'], exact=exact)} dB at alpha 1",
        *_rounding_lines(document),
        *_split_lines(totals),
        f"{run['seconds']:.1f} s, peak memory {size(run['peak_rss_bytes'])}",
    ):
        console.print(visible(line), soft_wrap=True)


def _split_lines(totals: dict[str, Any]) -> list[str]:
    """Say what base forgets, or what it never saw."""
    lines = []
    if totals["moved"]:
        share = totals["moved"] / totals["split_weights"]
        lines.append(
            f"{totals['moved']:,} codes ({share:.4%}) were moved to forget; `ortho bench` says how "
            "well"
        )
    if totals.get("delta_kept") is not None:
        kept, others = totals["delta_kept"], totals["unsplit_of_reference"]
        lines.append(
            f"ortho holds {kept:.1%} of what the model is beyond its reference; alpha 1 lacks the "
            "rest"
        )
        if others:
            lines.append(
                f"{len(others)} tensors that are not split differ and are the reference's at every "
                f"alpha, such as `{others[0]}`"
            )
    return lines


def print_calibration_plan(document: dict[str, Any], *, source: str) -> None:
    """Print what would be measured."""
    console, totals = make_console(), document["totals"]
    for line in (
        f"{source}: {document['calibrate']['curvature']}{_gram_words(document['calibrate'])} of "
        f"{totals['tensors']} tensors, "
        f"{totals['weights']:,} weights",
        *_set_lines(document["data"]),
        f"writes {size(totals['bytes_written'])}, and {size(totals['bytes_scratch'])} of sums "
        "while it works",
        *(f"note: {note}" for note in document["notes"]),
    ):
        console.print(visible(line), soft_wrap=True)


def _gram_words(document: dict[str, Any]) -> str:
    if document.get("gram") != "full":
        return ""
    return f" with input Gram matrices (weighting {document.get('weighting')})"


def _set_lines(sets: dict[str, Any]) -> list[str]:
    return [
        f"{name}: {data['sequences']:,} sequences, {data['tokens']:,} tokens, of which "
        f"{data['counted']:,} are predicted"
        for name, data in sets.items()
    ]


def print_calibrated(document: dict[str, Any]) -> None:
    """Print what a finished calibration gave."""
    console, run, data = make_console(), document["run"], document["data"]
    lines = [
        f"{run['output']}: {document['kind']}{_gram_words(document)} of "
        f"{len(document['tensors'])} tensors, {size(document['output_bytes'])}",
        *_set_lines(data),
        "perplexity "
        + ", ".join(f"{value:,.2f} on {name}" for name, value in document["perplexity"].items()),
        f"{run['seconds']:.1f} s, peak memory {size(run['peak_rss_bytes'])}",
    ]
    if "forget" in data:
        lines.insert(1, "as sensitive as the forget set itself: readable by its owner only")
    for line in lines:
        console.print(visible(line), soft_wrap=True)


def print_convert_plan(document: dict[str, Any], *, source: str) -> None:
    """Print what would be written: tensors alike in one line, files, notes."""
    console, totals = make_console(), document["totals"]
    table = _table("tensors", "tensor", "count", "shape", "from", "to", "size each")
    for name, same in _grouped(document["tensors"], "shape", "source_dtype", "dtype"):
        one = same[0]
        table.add_row(
            Text(visible(name)),
            str(len(same)),
            _shape(one["shape"]),
            one["source_dtype"],
            one["dtype"],
            size(one["nbytes"]),
        )
    console.print(table)
    console.print()
    files = [file for file in document["files"] if "header" in file]
    lines = [f"note: {note}" for note in document["notes"]]
    lines += [f"{file['name']}: {size(file['size'])}" for file in files[:8]]
    lines += [f"and {len(files) - 8} more files"] if len(files) > 8 else []
    lines.append(
        f"{source}: {totals['tensors']} tensors, {totals['weights']:,} weights, "
        f"{totals['cast']} tensors cast; {size(totals['bytes_written'])} would be written"
    )
    for line in lines:
        console.print(visible(line), soft_wrap=True)


def print_converted(document: dict[str, Any]) -> None:
    """Print what a finished conversion gave."""
    console, totals, run = make_console(), document["totals"], document["run"]
    files = sum("header" in file for file in document["files"])
    for line in (
        f"{run['output']}: {totals['tensors']} tensors, {totals['weights']:,} weights in "
        f"{files} {'file' if files == 1 else 'files'}, {size(totals['bytes_written'])}; "
        f"{totals['cast']} tensors cast",
        f"{run['seconds']:.1f} s, peak memory {size(run['peak_rss_bytes'])}",
    ):
        console.print(visible(line), soft_wrap=True)
