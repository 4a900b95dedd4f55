"""Tables of `ortho convert`: the plan, and the result of a finished run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from ortho_cli.cli.show.console import print_lines, print_notes, print_table, size
from ortho_cli.cli.show.decompose import group, run_line
from ortho_cli.cli.show.document import Document
from ortho_cli.storage.hints import said

FILES = 8  # files of a plan that are listed by name; a sharded model has hundreds


def print_convert_plan(plan: Mapping[str, object], *, source: str, out: str) -> None:
    """Print what would be written, and where: tensors alike in one line, files, notes."""
    document = Document(plan)
    rows = [
        (
            name,
            str(len(alike)),
            alike[0].shape(),
            alike[0].text("source_dtype"),
            alike[0].text("dtype"),
            size(alike[0].number("nbytes")),
        )
        for name, alike in group(document.rows("tensors"), "shape", "source_dtype", "dtype")
    ]
    columns = ("tensor", "count", "shape", "from", "to", "size each")
    print_table("tensors", columns, rows)
    print_lines(_plan_lines(document, source, out))
    print_notes(*document.items_of("notes"))


def _plan_lines(document: Document, source: str, out: str) -> Iterator[str]:
    totals, files = document.part("totals"), _weight_files(document)
    yield from (f"{file['name']}: {size(file.number('size'))}" for file in files[:FILES])
    if len(files) > FILES:
        yield f"and {len(files) - FILES} more files"
    yield (
        f"{source}: {totals['tensors']} tensors, {totals.number('weights'):,} weights, "
        f"{totals['cast']} tensors cast"
    )
    yield f"{size(totals.number('bytes_written'))} would be written to `{out}`"


def print_converted(result: Mapping[str, object]) -> None:
    """Print how much a finished conversion wrote."""
    document = Document(result)
    totals, files = document.part("totals"), len(_weight_files(document))
    command = "inspect" if document["kind"] == "artifact" else "decompose"
    print_lines(
        [
            f"{document.part('run')['output']}: {totals['tensors']} tensors, "
            f"{totals.number('weights'):,} weights in {files} {'file' if files == 1 else 'files'}, "
            f"{size(totals.number('bytes_written'))}; {totals['cast']} tensors cast",
            run_line(document),
            f"next: `ortho {command} {said(Path(document.part('run').text('output')))}`",
        ]
    )


def _weight_files(document: Document) -> list[Document]:
    """List the files of tensors: those that the plan gives a header."""
    return [file for file in document.rows("files") if "header" in file]
