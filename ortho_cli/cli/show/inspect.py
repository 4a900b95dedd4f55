"""Tables of `ortho inspect`: an artifact and a statistics file, tensor by tensor and in total."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from ortho_cli.cli.show.calibrate import gram_words, made_words
from ortho_cli.cli.show.console import decibels, number, print_lines, print_table, size
from ortho_cli.cli.show.decompose import rounding_lines
from ortho_cli.cli.show.document import Document
from ortho_cli.formats.artifact import ORTHO_FILE
from ortho_cli.storage.sealing import SEALED_FILE


def print_artifact(described: Mapping[str, object], *, folder: str) -> None:
    """Print an artifact; a figure that is unknown without ortho or report.json is `-`."""
    document = Document(described)
    has_ortho = document.part("files")[ORTHO_FILE] is not None
    weighted = document.get("statistics") is not None
    more = ("error at 0", "error at 1") if weighted else ()
    columns = ("module", "shape", "bits", "nnz", "dB at 0", "dB at 1", "kept", *more)
    rows = []
    for tensor in document.rows("tensors"):
        if tensor["action"] == "split":
            measured = "residual_kept" in tensor
            row = (
                tensor.text("name").removesuffix(".weight"),
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
    print_table("split", columns, rows, note)
    print_lines(_artifact_lines(document, folder))


def _curvature_errors(figures: Document, *, has_ortho: bool) -> tuple[str, str]:
    at_0, at_1 = (number(figures.get(f"curvature_error_alpha_{a}"), ".3g") for a in (0, 1))
    return at_0, at_1 if has_ortho else "-"


def _artifact_lines(document: Document, folder: str) -> Iterator[str]:
    files = document.part("files")
    base = next(name for name in ("model.safetensors", "base.safetensors") if name in files)
    actions = [tensor["action"] for tensor in document.rows("tensors")]
    yield (
        f"{folder}: {document['format']}, {actions.count('split')} of {len(actions)} tensors split"
    )
    yield f"base {size(files.number(base))}, {_ortho_words(files)}"
    yield from _total_lines(document)
    source = document["source_digest"]
    versions = (f"{name} {version}" for name, version in document.part("versions").items())
    yield (
        f"source {str(source)[:16] if source else 'unknown'}, "
        f"plan {document.text('plan_sha256')[:16]}, " + ", ".join(versions)
    )
    yield f"recipe {_settings(document.part('recipe'))}"
    yield from _checked_lines(document)


def _ortho_words(files: Document) -> str:
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
        f"SQNR {decibels(totals['sqnr_db_alpha_0'], exact=exact)} dB at alpha 0, "
        f"{decibels(totals['sqnr_db_alpha_1'], exact=exact)} dB at alpha 1; "
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


def print_statistics(described: Mapping[str, object], *, path: str) -> None:
    """Print what was measured, tensor by tensor, and of which data."""
    document = Document(described)
    entries = document.parts("tensors")
    overlap = any("overlap" in entry for entry in entries.values())
    rows = [
        (
            name.removesuffix(".weight"),
            entry.shape(),
            number(entry.get("mean"), ".3g"),
            *((number(entry.get("overlap"), ".3f"),) if overlap else ()),
        )
        for name, entry in sorted(entries.items())
    ]
    columns = ("module", "shape", "mean", *(("overlap",) if overlap else ()))
    print_table("measured", columns, rows)
    print_lines(_statistics_lines(document, path, len(entries)))


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
