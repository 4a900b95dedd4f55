"""What figures amount to, at the edges of every threshold."""

from __future__ import annotations

import math
from typing import Any

import pytest

from ortho_cli.bench import verdict
from ortho_cli.bench.figures import enforce
from ortho_cli.errors import GateError

FORGOTTEN: dict[str, Any] = {
    "extraction": {"value": 0.0},
    "exposure": {"value": 1.4},
    "nll_quantile": {"value": 0.5},
    "loss_auc": {"value": 0.5},
    "perplexity_ratio": {"value": 1.01},
}


def figures(**changes: float) -> dict[str, Any]:
    return {**FORGOTTEN, **{name: {"value": value} for name, value in changes.items()}}


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({}, "forgotten"),
        ({"exposure": 1.75}, "forgotten"),
        ({"exposure": 1.76}, "not forgotten"),
        ({"exposure": math.nan}, "not forgotten"),
        ({"extraction": 0.05}, "not forgotten"),
        ({"sampled_extraction": 0.05}, "not forgotten"),
        ({"loss_auc": 0.66}, "not forgotten"),
        ({"loss_auc": 0.34}, "marked"),
        ({"nll_quantile": 0.96}, "marked"),
        ({"nll_quantile": 0.95, "loss_auc": 0.35}, "forgotten"),
        ({"exposure": 6.0, "nll_quantile": 0.99}, "not forgotten"),
    ],
)
def test_memory_is_forgotten_marked_or_not(changes: dict[str, float], word: str) -> None:
    assert verdict.memory(figures(**changes))[0] == word


def test_utility_is_kept_lost_or_unknown() -> None:
    assert verdict.utility({}) is None
    for ratio, word in ((1.02, "kept"), (1.021, "lost"), (math.nan, "lost")):
        found = verdict.utility(figures(perplexity_ratio=ratio))
        assert found is not None
        assert found[0] == word


def test_full_model_is_kept_lost_or_unknown() -> None:
    def figure(value: float, *interval: float) -> dict[str, Any]:
        return {"value": value, **dict(zip(("low", "high"), interval, strict=False))}

    assert verdict.full({"alpha 0": FORGOTTEN}) is None
    for ratio, word in ((1.0, "kept"), (1.02, "kept"), (1.03, "lost"), (math.nan, "lost")):
        found = verdict.full({"alpha 1": {"perplexity_ratio": figure(ratio)}, "int4": {}})
        assert found is not None
        assert found[0] == word
    straddles = {"alpha 1": {"perplexity_ratio": figure(1.04, 0.99, 1.05)}, "int4": {}}
    assert verdict.full(straddles) == ("kept", "no worse than INT4 alone")
    # Nothing was moved: alpha 0 is INT4 alone, and its ratio is over alpha 1.
    alone = {"alpha 1": {}, "alpha 0": {"perplexity_ratio_alpha1": figure(0.9, 0.88, 0.92)}}
    assert verdict.full(alone) == ("lost", "perplexity is at least 1.087 times that of INT4 alone")
    text = {"perplexity_ratio": figure(1.0)}
    secrets = {
        "alpha 1": {**text, "forget_nll": figure(20.0, 18.0, 22.0)},
        "int4": {"forget_nll": figure(1.0, 0.5, 1.5)},
    }
    found = verdict.full(secrets)
    assert found is not None
    assert found[0] == "lost"
    assert "18.0 nats or more where INT4 alone gives 1.5 or less" in found[1]
    rows = [{"row": name, "alpha": None, "figures": figures} for name, figures in secrets.items()]
    judged = verdict.judge({"rows": rows, "unsplit": {"share": 0.2}})
    assert judged["full"] == "lost"
    with pytest.raises(GateError, match=r"the full model is lost: at alpha 1 secrets have"):
        enforce({"verdict": judged, "gates": []})


def test_better_than_controls_needs_to_pass_alone() -> None:
    bad = figures(exposure=6.0)
    assert verdict.better_than_controls(FORGOTTEN, {"random": bad, "magnitude": bad})
    assert not verdict.better_than_controls(FORGOTTEN, {"random": bad, "magnitude": FORGOTTEN})
    assert not verdict.better_than_controls(bad, {"random": bad})
    broken = figures(perplexity_ratio=1.5)
    assert verdict.better_than_controls(FORGOTTEN, {"random": broken})


def document(**rows: dict[str, Any]) -> dict[str, Any]:
    base = rows.pop("base", FORGOTTEN)
    listed = [{"row": "alpha 0", "alpha": 0.0, "figures": base}]
    listed += [{"row": name, "alpha": None, "figures": row} for name, row in rows.items()]
    return {"rows": listed, "unsplit": {"share": 0.2}, "moved": {"count": 3}}


def test_sentences_say_what_was_found_and_always_what_is_not_split() -> None:
    bad = figures(exposure=6.0)
    found = verdict.judge(document(random=bad, magnitude=bad, int4=bad))
    assert (found["memory"], found["utility"]) == ("forgotten", "kept")
    assert found["better_than_controls"] is True
    said = " ".join(found["sentences"])
    for words in ("listed secrets are forgotten", "utility is kept", "better than", "20.0%"):
        assert words in said
    found = verdict.judge(document(random=bad, magnitude=FORGOTTEN, int4=bad))
    assert found["better_than_controls"] is False
    assert "knows no secrets passes as well" in " ".join(found["sentences"])
    found = verdict.judge(document(base=bad, random=bad, magnitude=bad, int4=bad))
    assert "does not both forget" in " ".join(found["sentences"])
    nothing = verdict.judge({"rows": [], "unsplit": {"share": 0.2}})
    assert nothing["memory"] is None
    assert len(nothing["sentences"]) == 1


def test_nothing_to_forget_is_said() -> None:
    said = " ".join(verdict.judge(document(original=FORGOTTEN))["sentences"])
    assert "original has exposure 1.40 bits: there was nothing to forget" in said


def test_relearning_is_set_against_the_reference() -> None:
    def curve(exposure: float) -> dict[str, Any]:
        return {"5": {"exposure": exposure, "token_accuracy": 0.5}}

    base = {**FORGOTTEN, "relearn": curve(5.5)}
    alone = verdict.judge(document(base=base))["relearning"]
    assert alone == [{"steps": 5, "exposure": 5.5, "token_accuracy": 0.5}]
    beside = verdict.judge(document(base=base, reference={"relearn": curve(1.5)}))
    assert beside["relearning"][0]["exposure_over"] == 4.0
    assert beside["relearning"][0]["token_accuracy_over"] == 0.0
    assert "5.50 after 5 (+4.00) steps" in " ".join(beside["sentences"])
