"""Figures by their dotted name: gates (`--require`) and the CSV table of `ortho bench`.

A figure's name is its keys in the JSON document, joined by dots: `exposure.low` or
`relearn.20.exposure`. `value` may be left out: `exposure` is `exposure.value`.
"""

from __future__ import annotations

import csv
import difflib
import io
import math
import operator
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import cast, get_args, get_origin, get_type_hints

from ortho_cli.bench.records import GateResult, Row, Verdict, to_json
from ortho_cli.errors import GateError, OutputExistsError, UsageError
from ortho_cli.storage.work_folder import check_place

HEADLINE = "value"
OPERATORS = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
}
TABLE = b"alpha,"  # begins a table
_GATE = re.compile(r"\s*([A-Za-z_][\w.]*)\s*(?:@([^<>=]*?))?\s*(<=|>=|==|<|>)(.*)")
_HINT = "such as `exposure@0<=2`: a figure, the alpha, one of <= >= == < >, a number"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """A bound on a figure: of one alpha's row, or without alpha of the whole document."""

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
        name=name.removesuffix(f".{HEADLINE}"),
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


def flatten(figures: Mapping[str, object]) -> dict[str, float]:
    """Name every number of nested figures; lists and texts are left out.

    Args:
        figures: as `to_json` writes them.
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


def names_of(kind: type) -> Iterator[str]:
    """Yield the names that `flatten` may give to numbers of a record.

    Args:
        kind: a dataclass of `records.py`.
    Returns:
        Dotted names; `*` in place of a key of a mapping, which may have dots of its own.
    """
    hints = get_type_hints(kind)
    for one in fields(kind):
        inline = one.metadata.get("json") == "inline"
        for inner in _names_inside(hints[one.name]):
            whole = inner if inline else f"{one.name}.{inner}".rstrip(".")
            yield whole.removesuffix(f".{HEADLINE}")


def _names_inside(kind: object) -> Iterator[str]:
    """Yield the names below a field of this type; an empty one where it is a number itself."""
    if is_dataclass(kind):
        yield from names_of(cast("type", kind))
    elif kind in (int, float):
        yield ""
    elif get_origin(kind) is Mapping:
        yield from (f"*.{inner}".rstrip(".") for inner in _names_inside(get_args(kind)[1]))
    else:  # A | None
        for other in get_args(kind) if isinstance(kind, UnionType) else ():
            yield from _names_inside(other)


def may_be(name: str, names: Iterable[str]) -> bool:
    """Return whether a figure can have this name, given those of `names_of`."""
    listed = list(names)
    root = name.split(".")[0]
    mine = [one for one in listed if one.split(".")[0] == root]
    # A mapping without a name of its own has attacks, whose names are no field's.
    allowed = mine or [one for one in listed if one.startswith("*")]
    return any(re.fullmatch(re.escape(one).replace(r"\*", ".+"), name) for one in allowed)


def unknown(name: str, known: Iterable[str]) -> UsageError:
    """Make the error for an unknown figure; it lists the most similar names."""
    listed = list(known)
    near = difflib.get_close_matches(name, listed, n=3, cutoff=0.5) or listed[:8]
    return UsageError(
        f"there is no figure `{name}`", hint=f"similar names: {', '.join(near)}" if near else None
    )


def not_measured(alpha: float, alphas: Sequence[float]) -> UsageError:
    """Make the error for an alpha that is not among those of the run."""
    return UsageError(
        f"alpha {alpha:g} is not measured, {', '.join(f'{a:g}' for a in alphas)} are",
        hint=f"--alpha {' '.join(f'{a:g}' for a in [*alphas, alpha])}",
    )


def judge(
    gates: Sequence[Gate],
    rows: Sequence[Row],
    whole: Mapping[str, object],
    *,
    missing: Mapping[str, str],
) -> tuple[GateResult, ...]:
    """Compare figures with gates; a figure that is NaN misses every gate.

    A figure that turns out not to be there is no error yet: all others were measured.

    Args:
        gates: bounds.
        rows: where the figures of each alpha are.
        whole: figures of the whole run as JSON, for gates without an alpha.
        missing: what was not measured, and what it needs.
    Raises:
        UsageError: the alpha of a gate was not measured.
    """
    at = {row.alpha: row for row in rows if row.alpha is not None}
    found = []
    for gate in gates:
        if gate.alpha is not None and gate.alpha not in at:
            raise not_measured(gate.alpha, list(at))
        named = flatten(whole if gate.alpha is None else to_json(at[gate.alpha].figures))
        if gate.name not in named:
            why = _why_unknown(gate.name, named, missing)
            found.append(GateResult(require=gate.text, unknown=why, met=False))
            continue
        value = named[gate.name]
        met = bool(OPERATORS[gate.comparison](value, gate.bound))  # never true of NaN
        found.append(GateResult(require=gate.text, value=value, met=met))
    return tuple(found)


def _why_unknown(name: str, known: Iterable[str], missing: Mapping[str, str]) -> str:
    for other, needs in missing.items():
        if f"{name}.".startswith(f"{other}."):
            return f"`{name}` is not measured: it needs {needs}"
    error = unknown(name, known)
    return error.message if error.hint is None else f"{error.message}; {error.hint}"


def enforce(gates: Sequence[GateResult], verdict: Verdict) -> None:
    """Fail where a gate was missed, ortho makes the model worse, or a server answers otherwise.

    Raises:
        UsageError: a gate is on a figure that is not there.
        GateError: lists each missed gate with the figure's value.
    """
    if verdict.full == "lost":
        raise GateError(
            next(one for one in verdict.sentences if one.startswith("the full model")),
            hint="`ortho inspect ARTIFACT --verify --expect-source MODEL` finds damaged weights",
        )
    for gate in gates:
        if gate.unknown is not None:
            hint = "figures have the names that --json and --csv give them"
            raise UsageError(f"--require `{gate.require}`: {gate.unknown}", hint=hint)
    if verdict.served in ("mixed up", "not as made"):
        raise GateError(
            next(one for one in verdict.sentences if one.startswith("the server: ")),
            hint="ortho_cli/runtime/README.md, `How to check a server`, has known faults",
        )
    missed = [gate for gate in gates if not gate.met]
    if missed:
        listed = "; ".join(f"`{gate.require}` is {gate.value:.4g}" for gate in missed)
        raise GateError(
            f"{len(missed)} of {len(gates)} {'gate' if len(gates) == 1 else 'gates'} missed: "
            f"{listed}",
            hint="a bound inside a figure's interval may be missed by chance: give more data",
        )


def check_csv(path: Path | None) -> None:
    """Refuse a path for a table where another file or folder is.

    Raises:
        OutputExistsError: a file that is no such table, or a folder.
        UsageError: there is no such folder.
        ResourceError: the folder cannot be written.
    """
    if path is None:
        return
    check_place(path, "--csv")
    if path.exists() and not _is_table(path):
        raise OutputExistsError(
            f"--csv `{path}` exists and is no table of a bench", hint="choose another file"
        )


def _is_table(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(TABLE)) in (b"", TABLE)


def to_csv(rows: Sequence[Row]) -> str:
    """Write one line for each alpha, one column for each figure that any alpha has."""
    listed = [
        {"alpha": row.alpha, **flatten(to_json(row.figures))}
        for row in rows
        if row.alpha is not None
    ]
    columns = list(dict.fromkeys(name for row in listed for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(listed)
    return text.getvalue()
