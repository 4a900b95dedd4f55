"""Tables of `ortho convert --to`: the plan, and what a finished run wrote and lost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ortho_cli.cli.show.console import print_lines, print_notes, print_table, size
from ortho_cli.cli.show.decompose import group, run_line
from ortho_cli.cli.show.document import Document


def print_target_plan(plan: Mapping[str, object], *, source: str, out: str) -> None:
    """Print what would be written, and where: weights alike in one line."""
    document = Document(plan)
    rows = [
        (name, str(len(alike)), alike[0].shape(), alike[0].text("type"))
        for name, alike in group(document.rows("tensors"), "shape", "type")
    ]
    print_table("weights", ("weight", "count", "shape", "as"), rows)
    totals = document.part("totals")
    print_lines(
        [
            f"{source}: {totals['weights']} weights become {totals['tensors']} tensors",
            f"{size(totals.number('bytes_written'))} would be written to `{out}`",
        ]
    )
    print_notes(*document.items_of("notes"))


def print_target(result: Mapping[str, object]) -> None:
    """Print how much was written, and what it lost."""
    document = Document(result)
    print_lines([*_result_lines(document), run_line(document)])


def _result_lines(document: Document) -> Iterator[str]:
    totals, run, error = (document.part(key) for key in ("totals", "run", "error"))
    yield (
        f"{run['output']}: {totals['weights']} weights in {totals['tensors']} tensors, "
        f"{size(totals.number('bytes_written'))}"
        f"{', sealed' if document['sealed'] else ''}"
    )
    if error.number("inexact") == 0:
        yield "every value is exact"
        return
    of = "base" if document["to"] == "gguf" else "ortho"
    yield (
        f"{error['inexact']} weights are not exact: largest error {error.number('max_error'):.3g}, "
        f"relative error {error.number('relative_error'):.3g} "
        f"({error.number('share_lost'):.3%} of the energy of {of})"
    )
