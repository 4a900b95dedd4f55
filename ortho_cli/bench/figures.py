"""Figures by name: what was measured flattened, required of a run, or put into a table.

A document of `ortho bench` has `rows`, each with nested `figures`. A figure's name is its keys
joined by dots: `exposure.interval` or `relearn.20.exposure`; where a nested figure has a headline
(`value`), the name without it serves: `exposure` is `exposure.value`.
"""

from __future__ import annotations

import csv
import difflib
import io
import math
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ortho_cli.errors import GateError, OutputExistsError, UsageError

HEADLINE = "value"
OPERATORS = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
}
_GATE = re.compile(r"\s*([A-Za-z_][\w.]*)\s*(?:@([^<>=]*?))?\s*(<=|>=|==|<|>)(.*)")
_HINT = "such as `exposure@0<=2`: a figure, the alpha, one of <= >= == < >, a number"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """What is required of a figure: of one alpha's row, or of the whole document without alpha."""

    text: str
    name: str
    alpha: float | None
    comparison: str
    bound: float


def parse_gate(text: str) -> Gate:
    """Read `FIGURE@ALPHA<=NUMBER`.

    Raises:
        UsageError: it has another form, or a bound or alpha that is no number.
    """
    found = _GATE.fullmatch(text)
    if found is None:
        raise UsageError(f"--require `{text}` is no comparison of a figure", hint=_HINT)
    name, alpha, comparison, bound = found.groups()
    return Gate(
        text=text,
        name=name,
        alpha=None if alpha is None else _number(alpha, text),
        comparison=comparison,
        bound=_number(bound, text),
    )


def _number(word: str, text: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if math.isnan(value):
        raise UsageError(f"--require `{text}` has {word.strip()!r} for a number", hint=_HINT)
    return value


def flatten(figures: Mapping[str, Any]) -> dict[str, float]:
    """Name every number of nested figures; lists and texts are none.

    Returns:
        Dotted names to numbers, in the order of the figures; NaN where a figure is NaN.
    """
    found: dict[str, float] = {}
    for key, value in figures.items():
        if isinstance(value, Mapping):
            nested = flatten(value)
            if HEADLINE in nested:
                found[key] = nested.pop(HEADLINE)
            found.update({f"{key}.{name}": number for name, number in nested.items()})
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[key] = float(value)
    return found


def unknown(name: str, known: Iterable[str]) -> UsageError:
    """Say that there is no such figure, and which are near."""
    listed = list(known)
    near = difflib.get_close_matches(name, listed, n=3, cutoff=0.5) or listed[:8]
    return UsageError(
        f"there is no figure `{name}`", hint=f"near it: {', '.join(near)}" if near else None
    )


def row_at(document: Mapping[str, Any], alpha: float) -> Mapping[str, Any]:
    """Find the figures of one alpha.

    Raises:
        UsageError: that alpha was not measured.
    """
    rows = [row for row in document["rows"] if row["alpha"] is not None]
    for row in rows:
        if row["alpha"] == alpha:
            figures: Mapping[str, Any] = row["figures"]
            return figures
    raise not_measured(alpha, [row["alpha"] for row in rows])


def not_measured(alpha: float, alphas: Sequence[float]) -> UsageError:
    """Say that an alpha is not among those of the run."""
    return UsageError(
        f"alpha {alpha:g} is not measured, {', '.join(f'{a:g}' for a in alphas)} are",
        hint=f"--alpha {' '.join(f'{a:g}' for a in [*alphas, alpha])}",
    )


def judge(gates: Sequence[Gate], document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Hold a document to its gates; a figure that is NaN misses whatever is asked.

    Raises:
        UsageError: a figure is unknown, or its alpha was not measured.
    """
    found = []
    for gate in gates:
        source = document if gate.alpha is None else row_at(document, gate.alpha)
        held = flatten(source)
        if gate.name not in held:
            raise unknown(gate.name, held)
        value = held[gate.name]
        met = bool(OPERATORS[gate.comparison](value, gate.bound))  # never true of NaN
        found.append({"require": gate.text, "value": value, "met": met})
    return found


def enforce(document: Mapping[str, Any]) -> None:
    """Fail where a gate was missed, or where ortho makes the model worse.

    Raises:
        GateError: lists each missed gate with the figure's value.
    """
    judged = document.get("verdict", {})
    if judged.get("full") == "lost":
        said = next(s for s in judged["sentences"] if s.startswith("the full model"))
        raise GateError(
            said,
            hint="`ortho inspect ARTIFACT --verify --expect-source MODEL` finds damaged weights",
        )
    missed = [gate for gate in document.get("gates", ()) if not gate["met"]]
    if missed:
        told = "; ".join(f"`{gate['require']}` is {gate['value']:.4g}" for gate in missed)
        count = len(document["gates"])
        raise GateError(
            f"{len(missed)} of {count} {'gate' if count == 1 else 'gates'} missed: {told}",
            hint="look at the interval of a figure that missed by little",
        )


def check_csv(path: Path | None) -> None:
    """Refuse a place for a table that would lose something else.

    Raises:
        OutputExistsError: a file that is no such table, or a folder.
        UsageError: there is no such folder.
    """
    if path is None:
        return
    if not path.parent.is_dir():
        raise UsageError(f"--csv `{path}` has no folder to lie in", hint="make it first")
    if path.exists() and not (path.is_file() and path.read_bytes()[:6] in (b"", b"alpha,")):
        raise OutputExistsError(
            f"--csv `{path}` exists and is no table of a bench", hint="choose another file"
        )


def to_csv(document: Mapping[str, Any]) -> str:
    """Write one line for each alpha, one column for each figure that any alpha has."""
    rows = [
        {"alpha": row["alpha"], **flatten(row["figures"])}
        for row in document["rows"]
        if row["alpha"] is not None
    ]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
