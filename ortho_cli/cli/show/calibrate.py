"""Lines of `ortho calibrate`: the plan, and the result of a finished run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from ortho_cli.cli.show.console import print_lines, print_notes, size
from ortho_cli.cli.show.decompose import run_line, time_lines
from ortho_cli.cli.show.document import Document
from ortho_cli.storage.hints import said


def gram_words(settings: Document) -> str:
    """Name the input Gram matrices, where they are measured."""
    if settings.get("gram") != "full":
        return ""
    return f" with input Gram matrices (weighting {settings.get('weighting')})"


def print_calibration_plan(plan: Mapping[str, object], *, source: str) -> None:
    """Print what would be measured."""
    document = Document(plan)
    totals, settings = document.part("totals"), document.part("calibrate")
    print_lines(
        [
            f"{source}: {settings['curvature']}{gram_words(settings)} of {totals['tensors']} "
            f"tensors, {totals.number('weights'):,} weights",
            *_data_lines(document),
            f"writes {size(totals.number('bytes_written'))}, "
            + (
                "reading the model block by block"
                if document.get("by_block")
                else f"and {size(totals.number('bytes_scratch'))} of sums while it runs"
            ),
            *time_lines(document),
        ]
    )
    print_notes(*document.items_of("notes"))


def print_calibrated(statistics: Mapping[str, object], *, source: str) -> None:
    """Print what a finished calibration measured, and the command that takes it up."""
    document = Document(statistics)
    perplexity = document.part("perplexity")
    values = (f"{perplexity.number(name):,.2f} on {name}" for name in perplexity)
    lines = [
        f"{document.part('run')['output']}: {document['kind']}{gram_words(document)} of "
        f"{len(document.part('tensors'))} tensors, {size(document.number('output_bytes'))}",
        *_data_lines(document),
        *_expert_lines(document),
        *(["perplexity " + ", ".join(values)] if perplexity else []),
        run_line(document),
        f"next: `ortho decompose {said(Path(source))} --stats "
        f"{said(Path(document.part('run').text('output')))} --recipe {_recipe_for(document)}`",
    ]
    if "forget" in document.part("data"):
        lines.insert(1, "as sensitive as the forget set itself: readable by its owner only")
    print_lines(lines)


def _recipe_for(document: Document) -> str:
    """Name the recipe that makes the most of statistics."""
    if "forget" in document.part("data"):
        return "forget-unlearn --forget FILE"
    if document["kind"] == "gram":
        return "default"
    return "capability" if document.get("gram") == "full" else "curvature"


def made_words(data: Document) -> str:
    """Say of a set that is no user's where its text is from."""
    if "written_by" not in data:
        return ""
    wrote = "they are random" if data["written_by"] == "random" else "the model itself wrote them"
    return f"; {wrote}, seed {data['seed']}"


def _expert_lines(document: Document) -> Iterator[str]:
    """Say how many tokens reached the experts, where there are some."""
    entries = document.parts("tensors").values()
    tokens = sorted(entry.number("tokens") for entry in entries if "tokens" in entry)
    if tokens:
        lent = sum(bool(entry.get("lent")) for entry in entries)
        median, others = tokens[len(tokens) // 2], f"; {lent} weights have the mean of others"
        yield (
            f"tokens per expert: {tokens[0]:,} to {tokens[-1]:,}, median {median:,}"
            + others * bool(lent)
        )


def _data_lines(document: Document) -> Iterator[str]:
    for name, data in document.parts("data").items():
        yield (
            f"{name}: {data.number('sequences'):,} sequences, {data.number('tokens'):,} tokens, "
            f"of which {data.number('counted'):,} are predicted" + made_words(data)
        )
