"""Tables of `ortho inspect`: an artifact and a statistics file, tensor by tensor and in total."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping

from ortho_cli.cli.show.calibrate import gram_words, made_words
from ortho_cli.cli.show.console import (
    csv_text,
    decibels,
    in_decibels,
    number,
    print_lines,
    print_table,
    print_text,
    size,
)
from ortho_cli.cli.show.decompose import rounding_lines
from ortho_cli.cli.show.document import Document
from ortho_cli.formats.artifact import BASE_FILE, OLD_BASE_FILE, ORTHO_FILE, module_of
from ortho_cli.formats.layers import natural, place_of
from ortho_cli.storage.sealing import SEALED_FILE


def print_artifact(described: Mapping[str, object], *, folder: str, top: int | None = None) -> None:
    """Print an artifact; a figure that is unknown without ortho or report.json is `-`.

    Args:
        described: as `describe` gives it.
        folder: its name.
        top: print only so many weights, the worst first.
    """
    document = Document(described)
    has_ortho = document.part("files")[ORTHO_FILE] is not None
    weighted = document.get("statistics") is not None
    more = ("error at 0", "error at 1") if weighted else ()
    columns = ("module", "shape", "bits", "nnz", "dB at 0", "dB at 1", "kept", *more)
    tensors = split_tensors(document)
    title, groups = "split", [place_of(_module(tensor)).layer for tensor in tensors]
    if top is not None:
        tensors, by = worst_first(tensors, has_ortho=has_ortho)
        title, groups = f"the worst of {len(tensors)} split weights, by {by}", []
    rows = []
    for tensor in tensors[:top]:
        measured = "residual_kept" in tensor
        row = (
            _module(tensor),
            tensor.shape(),
            number(tensor["bits_per_weight"]),
            f"{tensor.number('nnz'):,}" if has_ortho else "-",
            decibels(tensor.get("sqnr_db_alpha_0"), exact=measured),
            decibels(tensor.get("sqnr_db_alpha_1"), exact=measured) if has_ortho else "-",
            number(tensor.get("residual_kept"), ".1%") if has_ortho else "-",
            *(_curvature_errors(tensor, has_ortho=has_ortho) if weighted else ()),
        )
        rows.append(row)
    note = (
        "(bits per weight, ortho included; SQNR at alpha 0 and 1; kept share of the squared "
        "residual"
    )
    note += "; sum of squared residual times curvature at alpha 0 and 1)" if weighted else ")"
    print_table(title, columns, rows, note, groups=groups)
    print_lines(artifact_lines(document, folder))


def _module(tensor: Document) -> str:
    return module_of(tensor.text("name"))


def split_tensors(document: Document) -> list[Document]:
    """List the weights that were split, layer 2 before layer 10."""
    split = [tensor for tensor in document.rows("tensors") if tensor["action"] == "split"]
    return sorted(split, key=lambda tensor: natural(tensor.text("name")))


def worst_first(tensors: list[Document], *, has_ortho: bool) -> tuple[list[Document], str]:
    """Put the lowest signal-to-noise ratios first, at alpha 1 where ortho is there.

    Returns:
        All tensors, and what they were sorted by; by bits where no ratio is known.
    """
    alpha = int(has_ortho)
    key = f"sqnr_db_alpha_{alpha}"
    known = any(tensor.get(key) is not None for tensor in tensors)

    def rank(tensor: Document) -> float:
        value = tensor.get(key)
        if not known:
            return -tensor.number("bits_per_weight")
        return float(value) if isinstance(value, int | float) else math.inf  # no error at all

    by = f"SQNR at alpha {alpha}, lowest first" if known else "bits per weight, most first"
    return sorted(tensors, key=rank), by


def print_artifact_csv(described: Mapping[str, object], *, top: int | None = None) -> None:
    """Print every tensor of an artifact as CSV; a ratio without any error is `inf`."""
    document = Document(described)
    tensors = sorted(document.rows("tensors"), key=lambda tensor: natural(tensor.text("name")))
    if top is not None:
        has_ortho = document.part("files")[ORTHO_FILE] is not None
        tensors = worst_first(split_tensors(document), has_ortho=has_ortho)[0][:top]
    print_text(csv_text([_csv_row(tensor) for tensor in tensors]))


def _csv_row(tensor: Document) -> dict[str, object]:
    """Leave digests out: they are long, and in report.json."""
    found = {key: value for key, value in tensor.items() if "blake3" not in key}
    if "residual_kept" in tensor:  # it was measured, and None means that there is no error
        for key in ("sqnr_db_alpha_0", "sqnr_db_alpha_1"):
            found[key] = math.inf if found.get(key) is None else found[key]
    return found | {"shape": tensor.shape().replace(" ", "")}


def _curvature_errors(figures: Document, *, has_ortho: bool) -> tuple[str, str]:
    at_0, at_1 = (number(figures.get(f"curvature_error_alpha_{a}"), ".3g") for a in (0, 1))
    return at_0, at_1 if has_ortho else "-"


def artifact_lines(document: Document, folder: str) -> Iterator[str]:
    """Say in sentences what an artifact is and where it comes from."""
    files = document.part("files")
    base = base_name(files)
    actions = [tensor["action"] for tensor in document.rows("tensors")]
    yield (
        f"{folder}: {document['format']}, {actions.count('split')} of {len(actions)} tensors split"
    )
    yield f"base {size(files.number(base))}, {ortho_words(files)}"
    yield from _total_lines(document)
    source = document["source_digest"]
    versions = (f"{name} {version}" for name, version in document.part("versions").items())
    yield (
        f"source {str(source)[:16] if source else 'unknown'}, "
        f"plan {document.text('plan_sha256')[:16]}, " + ", ".join(versions)
    )
    yield f"recipe {_settings(document.part('recipe'))}"
    yield from _checked_lines(document)


def base_name(files: Document) -> str:
    """Name the file of base among those of an artifact."""
    return next(name for name in (BASE_FILE, OLD_BASE_FILE) if name in files)


def ortho_words(files: Document) -> str:
    """Say whether ortho is there, sealed or absent."""
    has_ortho = files[ORTHO_FILE] is not None
    if files.get(SEALED_FILE) is not None:
        state = ", opened" if has_ortho else ": --identity opens it"
        return f"ortho {size(files.number(SEALED_FILE))}, sealed{state}"
    if not has_ortho:
        return "ortho absent: only alpha = 0 is possible"
    return f"ortho {size(files.number(ORTHO_FILE))}"


def _total_lines(document: Document) -> Iterator[str]:
    totals = document.optional("totals")
    if not totals:
        yield "report.json is missing: decibels are not known"
        return
    exact = totals["residual_kept"] is None or totals["sqnr_db_alpha_1"] is None
    yield (
        f"{totals.number('split_bits_per_weight'):.2f} bits per split weight with ortho, "
        f"{totals.number('split_bits_per_weight_base'):.2f} without; "
        f"{totals.number('bits_per_weight'):.2f} per weight of the whole model"
    )
    yield (
        f"SQNR {in_decibels(totals['sqnr_db_alpha_0'], exact=exact)} at alpha 0, "
        f"{in_decibels(totals['sqnr_db_alpha_1'], exact=exact)} at alpha 1; "
        f"{totals.number('nnz'):,} weights kept hold {number(totals['residual_kept'], '.1%')} of "
        "the squared residual"
    )
    yield from rounding_lines(document)
    if statistics := document.optional("statistics"):
        has_ortho = document.part("files")[ORTHO_FILE] is not None
        at_0, at_1 = _curvature_errors(totals, has_ortho=has_ortho)
        yield (
            f"error weighted by curvature ({statistics.get('kind')}, {statistics.get('storage')}): "
            f"{at_0} at alpha 0, {at_1} at alpha 1; "
            f"{number(totals.get('saliency_kept'), '.1%')} of the saliency is kept"
        )


def _checked_lines(document: Document) -> Iterator[str]:
    if source := document.optional("source_checked"):
        yield f"made from {source['source']}: {source['tensors']} tensors, every byte"
    if values := document.optional("values_checked"):
        yield (
            f"every one of {values.number('weights'):,} split weights is the source's or its own "
            f"code; {values.number('moved'):,} codes are not the source's nearest"
        )
    if verified := document.optional("verified"):
        against = "; ".join(
            f"{name} against {what}" for name, what in verified.part("checked").items()
        )
        yield f"{_verified_words(verified)}: {against}"


def _verified_words(verified: Document) -> str:
    return f"verified {verified['tensors']} tensors, {size(verified.number('bytes'))}"


def _settings(recipe: Document) -> str:
    """Spell the settings that are not the defaults, as --set takes them."""
    from ortho_cli.decompose.recipe import DEFAULT

    usual = dict(_flat(DEFAULT.canonical()))
    changed = [
        f"{key}={json.dumps(value)}" for key, value in _flat(recipe) if usual.get(key) != value
    ]
    return " ".join(changed) or "of defaults"


def _flat(settings: Mapping[str, object], path: str = "") -> Iterator[tuple[str, object]]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{path}{key}.")
        else:
            yield path + key, value


def print_statistics(described: Mapping[str, object], *, path: str, top: int | None = None) -> None:
    """Print what was measured, tensor by tensor, and of which data.

    Args:
        described: as `describe` gives it.
        path: its name.
        top: print only so many weights, the largest mean first.
    """
    document = Document(described)
    entries = document.parts("tensors")
    overlap = any("overlap" in entry for entry in entries.values())
    routed = any("tokens" in entry for entry in entries.values())
    names = _measured_names(entries, top)
    rows = [
        (
            module_of(name),
            entry.shape(),
            number(entry.get("mean"), ".3g"),
            *((number(entry.get("overlap"), ".3f"),) if overlap else ()),
            *((_tokens_words(entry),) if routed else ()),
        )
        for name, entry in ((name, entries[name]) for name in names)
    ]
    columns = (
        "module",
        "shape",
        "mean",
        *(("overlap",) if overlap else ()),
        *(("tokens",) if routed else ()),
    )
    title, groups = "measured", [place_of(module_of(name)).layer for name in names]
    if top is not None:
        title, groups = f"the largest of {len(entries)} by mean", []
    note = "mean: of a weight's curvature"
    note += "; overlap: share of the top 1 % that factored storage would find, too" * overlap
    note += "; tokens: routed to the expert, lent: it has the mean of its layer's others" * routed
    print_table(title, columns, rows, f"({note})", groups=groups)
    print_lines(_statistics_lines(document, path, len(entries)))


def _tokens_words(entry: Document) -> str:
    """Say how many tokens reached an expert, and whether others lend it their mean."""
    if "tokens" not in entry:
        return ""
    return f"{entry.number('tokens'):,}{', lent' * bool(entry.get('lent'))}"


def _measured_names(entries: Mapping[str, Document], top: int | None) -> list[str]:
    if top is None:
        return sorted(entries, key=natural)

    def mean(name: str) -> float:
        value = entries[name].get("mean")
        return float(value) if isinstance(value, int | float) else -math.inf

    return sorted(entries, key=mean, reverse=True)[:top]


def print_statistics_csv(described: Mapping[str, object], *, top: int | None = None) -> None:
    """Print every weight of a statistics file as CSV."""
    entries = Document(described).parts("tensors")
    rows = (Document({"name": name, **entries[name]}) for name in _measured_names(entries, top))
    print_text(csv_text([_csv_row(row) for row in rows]))


def print_plan_csv(plan: Mapping[str, object]) -> None:
    """Print every tensor of a plan as CSV, without its offsets."""
    tensors = sorted(
        Document(plan).rows("tensors"), key=lambda tensor: natural(tensor.text("name"))
    )
    rows = (
        Document({key: value for key, value in tensor.items() if not isinstance(value, dict)})
        for tensor in tensors
    )
    print_text(csv_text([_csv_row(row) for row in rows]))


def _statistics_lines(document: Document, path: str, count: int) -> Iterator[str]:
    yield (
        f"{path}: {document['kind']} curvature of {count} tensors, squared per "
        f"{document['unit']}, {document['storage']} storage{gram_words(document)}, "
        f"{size(document.number('file_bytes'))}"
    )
    for name, data in document.parts("data").items():
        yield (
            f"{name} set: {data.number('sequences'):,} sequences, {data.number('tokens'):,} tokens"
            + made_words(data)
        )
    yield (
        f"source {document.text('source_digest')[:16]}, statistics {document.text('digest')[:16]}"
    )
    if document["has_forget"]:
        yield (
            "warning: gradients of the forget set give its text back; keep this file as private "
            "as the data"
        )
    if verified := document.optional("verified"):
        yield _verified_words(verified)
