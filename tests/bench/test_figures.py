"""Figures by name, gates and tables."""

from __future__ import annotations

import csv
import io
import math
from typing import Any

import pytest

from ortho_cli.bench import figures
from ortho_cli.bench.records import (
    Chance,
    Entry,
    Exposure,
    Figures,
    GateResult,
    Memorisation,
    Moved,
    Recall,
    Row,
    Share,
    TextFigure,
    Verdict,
    to_json,
)
from ortho_cli.errors import GateError, UsageError


def exposure(value: float) -> Memorisation:
    figure = Share(value=value, low=1.0, high=2.0, n=4, hits=1)
    known = Exposure(
        value=value, low=1.0, high=2.0, n=4,
        alternatives_min=64, alternatives_max=64, maximum=6.0, chance=1.4,
    )  # fmt: skip
    return Memorisation(
        extraction=figure, token_accuracy=figure, extraction_strength=figure,
        telling_share=1.0, truth_ratio=figure, exposure=known, forget_nll=figure,
        alternatives_nll=figure, nll_quantile=figure, inside_share=figure,
        rank_p=Chance(value=0.5, n=4),
        entries=(Entry(index=0, exposure=1.0, nll=1.0, quantile=0.5, hits=1, tokens=2),),
    )  # fmt: skip


def row(name: str, alpha: float | None, bits: float, **figures: Any) -> Row:
    return Row(row=name, alpha=alpha, figures=Figures(memory=exposure(bits), **figures))


LEFT = Recall(exposure=2.5, extraction=0.0, token_accuracy=0.5, secrets=2)
NO_NUMBER = TextFigure(value=math.nan, low=1.0, high=2.0, n=9, windows=3, context=4)
WHOLE = {"moved": Moved(count=12, share=0.001)}
ROWS = [
    row("alpha 0", 0.0, 1.5, perplexity=NO_NUMBER, attacks={"relearn": {"20": LEFT}}),
    row("alpha 1", 1.0, 6.0),
    row("int4", None, 6.0),
]


MISSING = {"distance": "codes that forgetting moved"}


def judged(*texts: str) -> tuple[GateResult, ...]:
    return figures.judge(
        [figures.parse_gate(text) for text in texts], ROWS, to_json(WHOLE), missing=MISSING
    )


def test_flatten_names_numbers_and_lets_headlines_stand_for_their_figure() -> None:
    nested = {
        "exposure": {"value": 1.5, "interval": [1.0, 2.0], "alternatives": 64},
        "perplexity": math.nan,
        "relearn": {"20": {"exposure": 2.5, "note": "text", "flag": True}},
    }
    assert figures.flatten(nested).keys() == {
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
        ("exposure.alternatives_min@0>=64", True),
        ("moved.share<=0.001", True),
        ("moved.count==11", False),
    ],
)
def test_gate_compares_the_figure_it_names(text: str, met: bool) -> None:
    assert judged(text)[0].met is met


@pytest.mark.parametrize("comparison", figures.OPERATORS)
def test_nan_misses_every_gate(comparison: str) -> None:
    assert judged(f"perplexity@0{comparison}1")[0].met is False


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


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("exposure", True),
        ("exposure.low", True),
        ("exposure.lo", False),
        ("exposure.low.low", False),
        ("keep.rouge_l.high", True),
        ("keep", False),
        ("relearn.20.exposure", True),
        ("relearn.exposure", False),
        ("relearn.20.nothing", False),
        ("kinds.my_text.kl", True),
        ("kinds.my_text.nothing", False),
        ("kl_by_layer.model.layers.0.low", True),
        ("latency.memory", True),
        ("tofu.retain.rouge_l", True),
    ],
)
def test_names_of_figures_are_those_of_their_records(name: str, known: bool) -> None:
    assert figures.may_be(name, figures.names_of(Figures)) is known


def test_headline_may_be_named() -> None:
    (gate,) = judged("exposure.value@0<=2")
    assert (gate.value, gate.met) == (1.5, True)


def test_unknown_figure_and_alpha_are_refused_with_what_is_near() -> None:
    (unknown,) = judged("exposure.lo@0<=2")
    assert not unknown.met
    assert "no figure `exposure.lo`; similar names: exposure.low" in str(unknown.unknown)
    with pytest.raises(UsageError, match=r"`exposure\.lo@0<=2`: there is no figure"):
        figures.enforce([*judged("exposure@0<=2"), unknown], Verdict())
    with pytest.raises(UsageError, match="not measured: it needs codes that forgetting moved"):
        figures.enforce(judged("distance.near@0<=2"), Verdict())
    with pytest.raises(UsageError, match=r"alpha 0\.5 is not measured, 0, 1 are"):
        judged("exposure@0.5<=2")


def test_missed_gates_are_listed_with_their_value() -> None:
    gates = judged("exposure@0<=1", "exposure@0<=2", "perplexity@0<=2")
    with pytest.raises(GateError, match=r"2 of 3 gates missed: `exposure@0<=1` is 1\.5; .* is nan"):
        figures.enforce(gates, Verdict())
    figures.enforce(judged("exposure@0<=2"), Verdict())
    figures.enforce([], Verdict())


def test_csv_has_a_line_for_each_alpha_and_no_other() -> None:
    rows = list(csv.DictReader(io.StringIO(figures.to_csv(ROWS))))
    assert [row["alpha"] for row in rows] == ["0.0", "1.0"]
    assert [row["exposure"] for row in rows] == ["1.5", "6.0"]
    assert rows[1]["relearn.20.exposure"] == ""
    assert not [name for name in rows[0] if name.startswith("entries")]
