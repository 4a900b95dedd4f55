"""Figures by name, gates and tables."""

from __future__ import annotations

import csv
import io
import math
from typing import Any

import pytest

from ortho_cli.bench import figures
from ortho_cli.errors import GateError, UsageError

DOCUMENT: dict[str, Any] = {
    "moved": {"count": 12, "share": 0.001},
    "rows": [
        {
            "row": "alpha 0",
            "alpha": 0.0,
            "figures": {
                "exposure": {"value": 1.5, "interval": [1.0, 2.0], "alternatives": 64},
                "perplexity": math.nan,
                "relearn": {"20": {"exposure": 2.5, "note": "text", "flag": True}},
            },
        },
        {"row": "alpha 1", "alpha": 1.0, "figures": {"exposure": {"value": 6.0}}},
        {"row": "int4", "alpha": None, "figures": {"exposure": {"value": 6.0}}},
    ],
}


def judged(*texts: str) -> list[dict[str, Any]]:
    return figures.judge([figures.parse_gate(text) for text in texts], DOCUMENT)


def test_flatten_names_numbers_and_lets_headlines_stand_for_their_figure() -> None:
    assert figures.flatten(DOCUMENT["rows"][0]["figures"]).keys() == {
        "exposure",
        "exposure.alternatives",
        "perplexity",
        "relearn.20.exposure",
    }


@pytest.mark.parametrize(
    ("text", "met"),
    [
        ("exposure@0<=1.5", True),
        ("exposure@0<1.5", False),
        ("exposure @ 0.0 >= 1", True),
        ("exposure@1>5.5", True),
        ("exposure@1==6", True),
        ("relearn.20.exposure@0<=3", True),
        ("exposure.alternatives@0>=64", True),
        ("moved.share<=0.001", True),
        ("moved.count==11", False),
    ],
)
def test_gate_compares_the_figure_it_names(text: str, met: bool) -> None:
    assert judged(text)[0]["met"] is met


@pytest.mark.parametrize("comparison", figures.OPERATORS)
def test_nan_misses_every_gate(comparison: str) -> None:
    assert judged(f"perplexity@0{comparison}1")[0]["met"] is False


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("exposure@0", "no comparison"),
        ("exposure@0=2", "no comparison"),
        ("@0<=2", "no comparison"),
        ("exposure@0<=two", "'two' for a number"),
        ("exposure@zero<=2", "'zero' for a number"),
        ("exposure@0<=nan", "'nan' for a number"),
        ("exposure@0<=", "'' for a number"),
    ],
)
def test_gate_of_another_form_is_refused(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        figures.parse_gate(text)


def test_unknown_figure_and_alpha_are_refused_with_what_is_near() -> None:
    with pytest.raises(UsageError, match="no figure `exposur`") as caught:
        judged("exposur@0<=2")
    assert "exposure" in str(caught.value.hint)
    with pytest.raises(UsageError, match=r"alpha 0\.5 is not measured, 0, 1 are"):
        judged("exposure@0.5<=2")


def test_missed_gates_are_listed_with_their_value() -> None:
    gates = judged("exposure@0<=1", "exposure@0<=2", "perplexity@0<=2")
    with pytest.raises(GateError, match=r"2 of 3 gates missed: `exposure@0<=1` is 1\.5; .* is nan"):
        figures.enforce({"gates": gates})
    figures.enforce({"gates": judged("exposure@0<=2")})
    figures.enforce({})


def test_csv_has_a_line_for_each_alpha_and_no_other() -> None:
    rows = list(csv.DictReader(io.StringIO(figures.to_csv(DOCUMENT))))
    assert [row["alpha"] for row in rows] == ["0.0", "1.0"]
    assert [row["exposure"] for row in rows] == ["1.5", "6.0"]
    assert rows[1]["relearn.20.exposure"] == ""
