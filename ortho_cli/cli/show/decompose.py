"""Tables of `ortho decompose`: the plan, and the result of a finished run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from ortho_cli.cli.show.console import in_decibels, print_lines, print_notes, print_table, size
from ortho_cli.cli.show.document import Document
from ortho_cli.model.cost import in_words
from ortho_cli.storage.hints import said
from ortho_cli.storage.sealing import SEALED_FILE

LEAST = 0.05  # share of the time, below which a part of the work is not named

# Of 4 bits, measured; of 3 bits nobody has.
PLAIN = {
    4: "plain INT4, no curvature: KL to the source is about three times that of the default recipe",
    3: "plain INT3, no curvature: the default recipe loses less",
}


def print_plan(plan: Mapping[str, object], *, source: str, then: str = "", out: str = "") -> None:
    """Print what would be split, what is copied and why, sizes, memory, and a guess of the time."""
    document = Document(plan)
    totals, tensors = document.part("totals"), document.rows("tensors")
    fields = ("shape", "dtype", "bits", "scale", "density")
    rows = [
        (
            name.removesuffix(".weight"),
            str(len(alike)),
            alike[0].shape(),
            *(alike[0].text(field) for field in ("dtype", "bits", "scale")),
            f"{alike[0].number('density'):.2%}",
            f"{alike[0].number('k'):,}",
        )
        for name, alike in group([t for t in tensors if t["action"] == "split"], *fields)
    ]
    print_table("split", ("module", "count", *fields, "k each"), rows)
    rows = [
        (
            name,
            str(len(alike)),
            alike[0].shape(),
            alike[0].text("dtype"),
            f"{sum(map(_weights, alike)) / totals.number('weights'):.2%}",
            alike[0].text("reason"),
        )
        for name, alike in group(
            [t for t in tensors if t["action"] == "copy"], "shape", "dtype", "reason"
        )
    ]
    if rows:
        columns = ("tensor", "count", "shape", "dtype", "share", "because")
        print_table("copied unchanged", columns, rows)
    print_lines(_plan_lines(document, totals, source))
    print_lines([f"would be written to `{out}`"] if out else [])
    print_lines([f"next: `{then}`"] if then else [])
    print_notes(*document.items_of("notes"))


def _plan_lines(document: Document, totals: Document, source: str) -> Iterator[str]:
    statistics = document.optional("statistics")
    kind = document.part("recipe").part("saliency").text("kind")
    most = "at most " if totals.get("ortho_bytes_at_most") else ""
    share = totals.number("split_weights") / totals.number("weights")
    yield (
        f"{source}: {totals['split_tensors']} of {totals['tensors']} tensors split, "
        f"{share:.1%} of {totals.number('weights'):,} weights, "
        f"group size {document['group_size']}"
    )
    if statistics:
        kind += f"; curvature is {statistics['kind']}, {statistics['storage']} storage"
        if "text_to_write" in statistics:
            tokens = statistics.part("text_to_write").number("tokens")
            kind += f", of {tokens:,} tokens that the model writes"
    yield f"weights kept by {kind}"
    yield from _plain_lines(document)
    yield (
        f"base {size(totals.number('base_bytes'))} + ortho "
        f"{most}{size(totals.number('ortho_bytes'))} from {size(totals.number('bytes_read'))}: "
        f"{most}{totals.number('bits_per_weight'):.2f} bits per weight of the whole model"
    )
    yield (
        f"buffers {size(totals.number('peak_bytes'))} over torch for {totals['workers']} workers"
    )
    yield from time_lines(document)


def time_lines(document: Document) -> Iterator[str]:
    """Say how long the work takes on this machine, at most, and what takes how much of it."""
    told = document.optional("estimate")
    if told is None:
        return
    seconds, most, parts = (
        told.number("seconds"),
        told.number("at_most_seconds"),
        told.part("parts"),
    )
    named = [
        f"{in_words(parts.number(name))} to {name}"
        for name in parts
        if parts.number(name) >= LEAST * seconds
    ]
    more = f", {in_words(most)} at most" if in_words(most) != in_words(seconds) else ""
    yield f"about {in_words(seconds)} on this machine{more}: {', '.join(named)}"


def _weights(tensor: Document) -> int:
    return math.prod(side for side in tensor.items_of("shape") if isinstance(side, int))


def group(tensors: list[Document], *fields: str) -> list[tuple[str, list[Document]]]:
    """Put tensors together whose names differ in numbers only and whose `fields` are equal."""
    groups: dict[tuple[str, str], list[Document]] = {}
    for tensor in tensors:
        parts = tensor.text("name").split(".")
        name = ".".join("*" if part.isdecimal() else part for part in parts)
        groups.setdefault((name, repr([tensor[key] for key in fields])), []).append(tensor)
    return [(name, alike) for (name, _), alike in groups.items()]


def rounding_lines(document: Document) -> Iterator[str]:
    """Explain decibels where codes are not the nearest ones."""
    rounding = document.part("recipe").part("base")["rounding"]
    if rounding != "nearest":
        yield f"rounding {rounding} makes the error of outputs smaller, and that of weights larger"


def print_done(report: Mapping[str, object]) -> None:
    """Print sizes and signal-to-noise ratios of a finished artifact."""
    document = Document(report)
    totals = document.part("totals")
    exact = totals["sqnr_db_alpha_1"] is None
    print_lines(
        [
            f"{document.part('run')['output']}: {totals['split_tensors']} of {totals['tensors']} "
            f"tensors split, {totals.number('split_bits_per_weight'):.2f} bits per split weight, "
            f"{totals.number('bits_per_weight'):.2f} per weight of the whole model",
            f"base {size(totals.number('base_bytes'))} + ortho "
            f"{size(totals.number('ortho_bytes'))} from {size(totals.number('source_bytes'))}; "
            f"SQNR {in_decibels(totals['sqnr_db_alpha_0'], exact=exact)} at alpha 0, "
            f"{in_decibels(totals['sqnr_db_alpha_1'], exact=exact)} at alpha 1",
            *rounding_lines(document),
            *_text_lines(document),
            *_plain_lines(document),
            *_forgetting_lines(totals),
            *_sealed_lines(document),
            run_line(document),
            _next_line(totals, said(Path(document.part("run").text("output")))),
        ]
    )


def _text_lines(document: Document) -> Iterator[str]:
    """Tell which text curvature was measured on, where it is no user's."""
    statistics = document.optional("statistics")
    if statistics and "text" in statistics:
        text = statistics.part("text")
        wrote = "random ones" if text["written_by"] == "random" else "written by the model itself"
        yield (
            f"curvature is {statistics['kind']} of {text.number('tokens'):,} tokens, {wrote}, seed "
            f"{text['seed']}"
        )


def _plain_lines(document: Document) -> Iterator[str]:
    """Say what it costs to round to the nearest with no regard to what a weight is for."""
    recipe = document.part("recipe")
    base, split = recipe.part("base"), recipe.part("ortho")["split"]
    plain = (base["scale"], base["rounding"], split) == ("absmax", "nearest", "residual")
    if plain and recipe.part("saliency")["kind"] == "residual":
        yield PLAIN[int(base.number("bits"))]


def _sealed_lines(document: Document) -> Iterator[str]:
    if document.get("sealed_blake3") is not None:
        yield f"ortho is sealed in {SEALED_FILE}: only `--identity FILE` opens it"


def _forgetting_lines(totals: Document) -> Iterator[str]:
    """Report codes that forgetting moved, or how much of the reference's delta ortho holds."""
    if moved := totals.number("moved"):
        yield (
            f"{moved:,} codes ({moved / totals.number('split_weights'):.4%}) were moved to forget"
        )
    if totals.get("delta_kept") is not None:
        yield (
            f"ortho holds {totals.number('delta_kept'):.1%} of the model's difference from its "
            "reference; alpha 1 lacks the rest"
        )
        if others := totals.items_of("unsplit_of_reference"):
            yield (
                f"{len(others)} tensors that are not split differ and are the reference's at every "
                f"alpha, such as `{others[0]}`"
            )


def _next_line(totals: Document, out: str) -> str:
    """Name the command that measures what was made."""
    if totals.number("moved"):
        return f"next: `ortho bench {out} --forget FILE --attack` measures how well base forgets"
    return f"next: `ortho bench {out}` measures what each alpha gives"


def run_line(document: Document) -> str:
    """Report time and peak memory of a finished run."""
    run = document.part("run")
    return f"{run.number('seconds'):.1f} s, peak memory {size(run.number('peak_rss_bytes'))}"
