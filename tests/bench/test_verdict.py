"""What figures amount to, at the edges of every threshold."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from ortho_cli.bench import verdict
from ortho_cli.bench.figures import enforce
from ortho_cli.bench.records import (
    Auc,
    Chance,
    Exposure,
    Figure,
    Figures,
    KindFigures,
    Memorisation,
    Moved,
    Recall,
    Row,
    SampledShare,
    Share,
    TextFigure,
    Unsplit,
    Verdict,
    to_json,
)
from ortho_cli.errors import GateError

UNSPLIT = Unsplit(weights=1, split_weights=4, share=0.2)


def figure(value: float, *interval: float) -> Figure:
    low, high = interval or (value, value)
    return Figure(value=value, low=low, high=high, n=20)


def share(value: float) -> Share:
    return Share(value=value, low=value, high=value, n=20, hits=round(20 * (value or 0)))


def text(value: float, *interval: float) -> TextFigure:
    low, high = interval or (value, value)
    return TextFigure(value=value, low=low, high=high, n=99, windows=3, context=34)


def memory(**changes: Figure) -> Memorisation:
    """What a model remembers that knows nothing, but for the changes."""
    found = Memorisation(
        telling_share=1.0,
        extraction=share(0.0),
        token_accuracy=figure(0.0),
        extraction_strength=figure(0.0),
        truth_ratio=figure(1.0),
        exposure=exposure(1.4),
        forget_nll=figure(20.0),
        alternatives_nll=figure(20.0),
        nll_quantile=figure(0.5),
        inside_share=share(0.9),
        rank_p=Chance(value=0.5, n=20),
        loss_auc=auc(0.5),
        centre_auc=auc(0.5),
    )
    return replace(found, **changes)


def exposure(value: float) -> Exposure:
    return Exposure(
        **dict.fromkeys(("value", "low", "high"), value),
        **dict.fromkeys(("n", "alternatives_min", "alternatives_max"), 20),
        maximum=6.0,
        chance=1.4,
    )


def auc(value: float) -> Auc:
    return Auc(value=value, low=value, high=value, n=40, positives=20, negatives=20)


FORGOTTEN = Figures(memory=memory(), perplexity_ratio=text(1.01))


def figures(**changes: float) -> Figures:
    kinds = {
        "exposure": exposure,
        "centre_auc": auc,
        "loss_auc": auc,
        "nll_quantile": figure,
        "extraction": share,
    }
    found = FORGOTTEN
    for name, value in changes.items():
        if name == "perplexity_ratio":
            found = replace(found, perplexity_ratio=text(value))
        elif name == "sampled_extraction":
            sampled = SampledShare(
                **dict.fromkeys(("value", "low", "high", "expected"), value),
                **dict.fromkeys(("n", "hits", "samples"), 20),
                temperature=1.0,
            )
            found = replace(found, sampled_extraction=sampled)
        else:
            assert found.memory is not None
            found = replace(found, memory=replace(found.memory, **{name: kinds[name](value)}))
    return found


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
        ({"centre_auc": 0.34}, "marked"),
        ({"centre_auc": 0.66}, "marked"),
        ({"centre_auc": math.nan}, "marked"),
        ({"centre_auc": 0.65}, "forgotten"),
        ({"nll_quantile": 0.96}, "marked"),
        ({"nll_quantile": 0.95, "loss_auc": 0.35}, "forgotten"),
        ({"exposure": 6.0, "nll_quantile": 0.99}, "not forgotten"),
    ],
)
def test_memory_is_forgotten_marked_or_not(changes: dict[str, float], word: str) -> None:
    found = verdict.memory(figures(**changes))
    assert found is not None
    assert found.word == word
    assert verdict.memory(Figures()) is None


def kind(ratio: float) -> KindFigures:
    return KindFigures(perplexity=text(20.0), perplexity_ratio=text(ratio))


@pytest.mark.parametrize(
    ("data", "others", "word", "said"),
    [
        (1.0, {"code": 1.02}, "kept", "perplexity of code is 1.020 times"),
        (1.0, {"code": 1.021, "self_written": 1.0}, "lost", "perplexity of code is 1.021 times"),
        (1.01, {"code": 1.0, "neighbours": 0.9}, "kept", "perplexity of --data is 1.010 times"),
        (
            1.0,
            {"self_written": math.nan, "code": 3.0},
            "lost",
            "text that the source writes is nan",
        ),
        (1.0, {"neighbours": 2.0}, "lost", "text like the secrets' own is 2.000 times"),
    ],
)
def test_the_worst_kind_of_text_decides_about_utility(
    data: float, others: dict[str, float], word: str, said: str
) -> None:
    kinds = {name: kind(ratio) for name, ratio in others.items()}
    found = verdict.utility(replace(figures(perplexity_ratio=data), kinds=kinds))
    assert found is not None
    assert found.word == word
    assert said in found.reason
    assert "better: " in found.reason


def test_the_worst_kind_is_the_one_that_lost_most_or_is_nan() -> None:
    ratios = {"data": text(1.01), "own": text(1.2), "code": text(0.9)}
    assert verdict.worst_kind(ratios) == "own"
    assert verdict.worst_kind({**ratios, "code": text(math.nan)}) == "code"


def test_kinds_that_were_not_measured_are_named() -> None:
    base = replace(FORGOTTEN, kinds={"data": kind(1.0), "self_written": kind(1.0)})
    told = verdict.judge([Row(row="alpha 0", alpha=0.0, figures=base)], UNSPLIT, None).sentences
    assert (
        "utility was not measured on text like the secrets' own, alternatives of the secrets, "
        "the keep set"
    ) in told


def test_a_plain_split_is_compared_with_the_original_and_its_utility_is_not_called_kept() -> None:
    listed = [
        Row(
            row=f"alpha {alpha:g}",
            alpha=alpha,
            figures=replace(FORGOTTEN, perplexity_ratio_original=text(ratio)),
        )
        for alpha, ratio in ((0.0, 1.24), (1.0, 1.1))
    ]
    told = verdict.judge(listed, UNSPLIT, Moved(count=0, share=0.0)).sentences
    assert "perplexity over the original's: 1.240 times at alpha 0, 1.100 times at alpha 1" in told
    assert not any("utility" in sentence for sentence in told)
    told = verdict.judge(listed, UNSPLIT, Moved(count=3, share=0.1)).sentences
    assert any("utility is kept" in sentence for sentence in told)


def test_utility_is_kept_lost_or_unknown() -> None:
    assert verdict.utility(Figures()) is None
    for ratio, word in ((1.02, "kept"), (1.021, "lost"), (math.nan, "lost")):
        found = verdict.utility(figures(perplexity_ratio=ratio))
        assert found is not None
        assert found[0] == word


def test_full_model_is_kept_lost_or_unknown() -> None:
    assert verdict.full({"alpha 0": FORGOTTEN}) is None
    for ratio, word in ((1.0, "kept"), (1.02, "kept"), (1.03, "lost"), (math.nan, "lost")):
        rows = {"alpha 1": Figures(perplexity_ratio=text(ratio)), "int4": Figures()}
        found = verdict.full(rows)
        assert found is not None
        assert found.word == word
    straddles = {"alpha 1": Figures(perplexity_ratio=text(1.04, 0.99, 1.05)), "int4": Figures()}
    assert verdict.full(straddles) == ("kept", "no worse than INT4 alone")
    # Nothing was moved: alpha 0 is INT4 alone, and its ratio is over alpha 1.
    alone = {
        "alpha 1": Figures(),
        "alpha 0": Figures(perplexity_ratio_alpha1=text(0.9, 0.88, 0.92)),
    }
    assert verdict.full(alone) == ("lost", "perplexity is at least 1.087 times that of INT4 alone")
    secrets = {
        "alpha 1": Figures(
            perplexity_ratio=text(1.0), memory=memory(forget_nll=figure(20.0, 18.0, 22.0))
        ),
        "int4": Figures(memory=memory(forget_nll=figure(1.0, 0.5, 1.5))),
    }
    found = verdict.full(secrets)
    assert found is not None
    assert found.word == "lost"
    assert "at least 18.0 nats, and at most 1.5 with INT4 alone" in found.reason
    listed = [Row(row=name, figures=figures) for name, figures in secrets.items()]
    judged = verdict.judge(listed, UNSPLIT, None)
    assert judged.full == "lost"
    with pytest.raises(GateError, match=r"the full model is lost: at alpha 1 the NLL of secrets"):
        enforce([], judged)


def test_better_than_controls_needs_to_pass_alone() -> None:
    bad = figures(exposure=6.0)
    assert verdict.better_than_controls(FORGOTTEN, [bad, bad])
    assert not verdict.better_than_controls(FORGOTTEN, [bad, FORGOTTEN])
    assert not verdict.better_than_controls(bad, [bad])
    broken = figures(perplexity_ratio=1.5)
    assert verdict.better_than_controls(FORGOTTEN, [broken])


def judge(**rows: Figures) -> Verdict:
    base = rows.pop("base", FORGOTTEN)
    listed = [Row(row="alpha 0", alpha=0.0, figures=base)]
    listed += [Row(row=name, figures=row) for name, row in rows.items()]
    return verdict.judge(listed, UNSPLIT, Moved(count=3, share=0.1))


def test_sentences_say_what_was_found_and_always_what_is_not_split() -> None:
    bad = figures(exposure=6.0)
    found = judge(random=bad, magnitude=bad, int4=bad)
    assert (found.memory, found.utility) == ("forgotten", "kept")
    assert found.better_than_controls is True
    said = " ".join(found.sentences)
    for words in ("listed secrets are forgotten", "utility is kept", "better than", "20.0%"):
        assert words in said
    found = judge(random=bad, magnitude=FORGOTTEN, int4=bad)
    assert found.better_than_controls is False
    assert "knows no secrets passes as well" in " ".join(found.sentences)
    found = judge(base=bad, random=bad, magnitude=bad, int4=bad)
    assert "base itself does not forget, or loses utility" in " ".join(found.sentences)
    nothing = verdict.judge([], UNSPLIT, None)
    assert nothing.memory is None
    assert len(nothing.sentences) == 1


def test_nothing_to_forget_is_said() -> None:
    said = " ".join(judge(original=FORGOTTEN).sentences)
    assert "did not know these secrets before, either: exposure of original is 1.40 bits" in said


def test_relearning_is_set_against_the_reference() -> None:
    def relearned(exposure: float) -> Figures:
        left = Recall(exposure=exposure, extraction=0.0, token_accuracy=0.5, secrets=3)
        return replace(FORGOTTEN, attacks={"relearn": {"5": left}})

    (alone,) = judge(base=relearned(5.5)).relearning
    assert (alone.steps, alone.exposure, alone.token_accuracy) == (5, 5.5, 0.5)
    assert to_json(alone).keys() == {"steps", "exposure", "token_accuracy"}
    found = judge(base=relearned(5.5), reference=relearned(1.5))
    assert found.relearning[0].exposure_over == 4.0
    assert found.relearning[0].token_accuracy_over == 0.0
    assert "the other half is then 5.50 bits after 5 steps (+4.00)" in " ".join(found.sentences)


@pytest.mark.parametrize(
    ("p", "word"), [(0.01, "forgotten"), (0.0099, "marked"), (math.nan, "marked")]
)
def test_ranks_that_are_not_spread_are_a_mark(p: float, word: str) -> None:
    found = verdict.memory(
        replace(FORGOTTEN, memory=replace(memory(), rank_p=Chance(value=p, n=20)))
    )
    assert found is not None
    assert found.word == word
