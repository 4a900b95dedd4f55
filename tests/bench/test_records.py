"""Records as JSON: what is left out, what is null, what is written in its record's place."""

from __future__ import annotations

from dataclasses import replace

from ortho_cli.bench.records import Figures, MemoryUse, Recall, Row, Verdict, to_json
from tests.bench.test_verdict import memory


def test_to_json_leaves_out_figures_that_were_not_measured_and_keeps_other_nulls() -> None:
    assert to_json(Row(row="int4", figures=Figures())) == {
        "row": "int4", "alpha": None, "figures": {},
    }  # fmt: skip
    assert to_json(MemoryUse(value=None, kind="resident")) == {"value": None, "kind": "resident"}
    assert to_json(Verdict())["memory"] is None


def test_to_json_writes_memory_and_attacks_among_the_figures() -> None:
    known = replace(memory(), loss_auc=None)
    left = Recall(exposure=1.0, extraction=0.0, token_accuracy=0.5, secrets=2)
    found = to_json(Figures(memory=known, unlisted=known, attacks={"relearn": {"5": left}}))
    assert list(found)[:2] == ["extraction", "token_accuracy"]
    assert "loss_auc" not in found  # not measured for this row
    nested = found["unlisted"]
    assert isinstance(nested, dict)
    assert nested["loss_auc"] is None
    assert found["relearn"] == {
        "5": {"exposure": 1.0, "extraction": 0.0, "token_accuracy": 0.5, "secrets": 2}
    }


def test_to_json_turns_tuples_into_lists() -> None:
    assert to_json(Verdict(thresholds={"loss_auc": (0.35, 0.65)}))["thresholds"] == {
        "loss_auc": [0.35, 0.65]
    }
