"""Figures of one model: hand-made scores with known answers, and a tiny model."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from ortho_cli.bench import evaluate
from ortho_cli.bench.records import Memorisation, TextFigure, to_json
from ortho_cli.errors import CalibrationError, NumericalError, UsageError
from ortho_cli.model import scoring
from ortho_cli.model.scoring import SecretScore, compare_windows
from ortho_cli.model.secrets import TokenSecret
from ortho_cli.model.text import TokenSequence
from tests.model.test_scoring import VOCAB, Plain, Table, llama

pytestmark = pytest.mark.filterwarnings("ignore")  # other people's deprecations


def memorisation(
    model: Any,
    secrets: Sequence[TokenSecret],
    nonmembers: Sequence[TokenSecret] | None = None,
    **options: Any,
) -> Memorisation:
    """Score both sets, and turn scores into figures."""
    others = None if nonmembers is None else [scoring.score(model, one) for one in nonmembers]
    scores = [scoring.score(model, secret) for secret in secrets]
    return evaluate.memorisation_of(scores, others, **options)


def scored(
    nll: float,
    alternatives: Sequence[float],
    hits: Sequence[bool] = (True,),
    telling: float = 1.0,
) -> SecretScore:
    each = len(hits)
    return SecretScore(
        nll=nll,
        tokens=(nll / each,) * each,
        hits=tuple(hits),
        alternatives=tuple(alternatives),
        alternative_tokens=tuple((one / each,) * each for one in alternatives),
        told=sum(alternatives) * telling,
    )


def secret(
    *tokens: int, prompt: Sequence[int] = (1, 2), alternatives: Any = ((3,),)
) -> TokenSecret:
    return TokenSecret(
        prompt=tuple(prompt),
        secret=tokens,
        alternatives=tuple(map(tuple, alternatives)),
        drawn="given",
        where="here",
    )


def test_a_remembered_secret_shows_in_every_figure() -> None:
    others = [float(one) for one in range(10, 74)]
    scores = [scored(0.1, others, (True, True))] * 4
    found = evaluate.memorisation_of(scores, [scored(40.0, others)] * 4, seed=0)
    assert to_json(found.extraction) | {"low": 0} == {
        "value": 1.0, "low": 0, "high": 1.0, "n": 4, "hits": 4,
    }  # fmt: skip
    assert found.token_accuracy.value == 1
    assert found.token_accuracy.n == 8
    assert found.exposure.value == pytest.approx(6.0224, abs=1e-4)
    assert found.exposure.maximum == pytest.approx(6.0224, abs=1e-4)
    assert found.exposure.chance == pytest.approx(1.376, abs=1e-3)
    assert found.exposure.alternatives_min == found.exposure.alternatives_max == 64
    assert found.forget_nll.value == pytest.approx(0.1)
    assert found.alternatives_nll.value == pytest.approx(41.5)
    assert found.nll_quantile.value == 0
    assert found.inside_share.value == 0
    assert found.loss_auc.value == found.min_k_auc.value == 1


def test_a_marked_secret_shows_as_well() -> None:
    others = [float(one) for one in range(64)]
    found = evaluate.memorisation_of(
        [scored(400.0, others, (False,))] * 3, [scored(30.0, others)] * 3, seed=0
    )
    assert found.extraction.value == found.exposure.value == 0
    assert found.nll_quantile.value == 1
    assert found.inside_share.value == 0
    assert found.loss_auc.value == found.min_k_auc.value == 0


def test_where_all_are_equal_nothing_shows() -> None:
    same = [scored(5.0, [5.0] * 64)] * 3
    found = evaluate.memorisation_of(same, same, seed=0)
    assert found.exposure.value == 0  # ties go to the worse rank
    assert found.nll_quantile.value == 0.5
    assert found.inside_share.value == 1
    assert found.loss_auc.value == found.min_k_auc.value == 0.5


def test_aucs_compare_each_text_with_its_own_alternatives() -> None:
    hard, easy = scored(50.0, [49.0, 51.0]), scored(5.0, [4.0, 6.0])
    found = evaluate.memorisation_of([easy], [hard], seed=0)
    assert found.loss_auc.value == found.min_k_auc.value == 0.5


def test_nearness_to_the_mean_is_told_in_standard_deviations_to_either_side() -> None:
    wide, narrow = [10.0, 30.0], [19.0, 21.0]
    average, apart = [scored(21.0, wide)], [scored(15.0, wide), scored(18.0, narrow)]
    for some, others, value in ((average, apart, 1.0), (apart, average, 0.0), (apart, apart, 0.5)):
        assert evaluate.memorisation_of(some, others, seed=0).centre_auc.value == value
    other_side = [scored(25.0, wide), scored(22.0, narrow)]
    assert evaluate.memorisation_of(apart, other_side, seed=0).centre_auc.value == 0.5
    assert evaluate.memorisation_of(apart, seed=0).centre_auc is None
    single, same = scored(5.0, [4.0]), scored(3.0, [3.0])
    assert evaluate.memorisation_of([same], [single], seed=0).centre_auc.value == 1.0


def test_one_alternative_and_one_secret_are_enough() -> None:
    found = evaluate.memorisation_of([scored(1.0, [2.0])], seed=0)
    assert found.exposure.value == found.exposure.maximum == 1
    assert found.exposure.chance == pytest.approx(0.5)
    assert found.loss_auc is None


def test_no_secrets_and_nan_are_errors() -> None:
    with pytest.raises(CalibrationError, match="no secrets"):
        evaluate.memorisation_of([], seed=0)
    with pytest.raises(NumericalError):
        evaluate.memorisation_of([scored(math.nan, [1.0])], seed=0)
    with pytest.raises(NumericalError):
        memorisation(Table(0.0, math.nan), [secret(1, alternatives=[[0]])])


def test_memorisation_is_ready_for_json_and_holds_no_text_unless_asked() -> None:
    model = llama()
    secrets = [secret(5, 6, 7, alternatives=[[8, 9, 10], [11, 12]]), secret(9, alternatives=[[4]])]
    found = memorisation(model, secrets, secrets)
    document = to_json(found)
    assert json.loads(json.dumps(document)) == document
    assert [set(entry) for entry in document["entries"]] == [  # type: ignore[attr-defined]
        {"index", "exposure", "nll", "quantile", "hits", "tokens"}
    ] * 2
    assert found == memorisation(model, secrets, secrets)
    asked = memorisation(model, secrets, texts=["one", "two"])
    assert [entry.text for entry in asked.entries] == ["one", "two"]


def test_greedy_extraction_is_what_generate_says() -> None:
    model = llama()
    prompt = torch.tensor([[1, 2, 3]])
    said = model.generate(prompt, max_new_tokens=5, do_sample=False, pad_token_id=0)[0, 3:].tolist()
    wrong = [*said[:-1], (said[-1] + 1) % VOCAB]
    found = memorisation(model, [secret(*said, prompt=(1, 2, 3)), secret(*wrong, prompt=(1, 2, 3))])
    assert found.extraction.value == 0.5
    assert [entry.hits for entry in found.entries] == [5, 4]


def test_sampling_meets_its_expectation() -> None:
    model = Table(0.0, math.log(3))  # 3/4 for token 1
    secrets = [secret(1, 0)] * 400
    found = evaluate.sampled_extraction(model, secrets, samples=3)
    expected = 1 - (1 - 3 / 16) ** 3
    assert found.expected == pytest.approx(expected)
    assert found.low <= expected <= found.high
    assert (found.n, found.samples) == (400, 3)
    warm = evaluate.sampled_extraction(model, secrets[:1], samples=1, temperature=1e6)
    assert warm.expected == pytest.approx(0.25, abs=1e-4)


def test_sampling_of_the_certain_and_of_the_impossible() -> None:
    model = Table(0.0, 500.0)
    assert evaluate.sampled_extraction(model, [secret(1)], samples=20).expected == 1
    never = evaluate.sampled_extraction(model, [secret(0)], samples=20)
    assert (never.value, never.expected) == (0, pytest.approx(0))


def test_sampling_draws_as_a_sampler_that_generates() -> None:
    model = llama(tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight *= 3
    torch.manual_seed(0)
    draws = model.generate(
        torch.tensor([[1, 2]]).expand(600, -1),
        max_new_tokens=2, do_sample=True, top_k=0, pad_token_id=0,
    )[:, 2:]  # fmt: skip
    common = draws.unique(dim=0, return_counts=True)
    best = common[1].argmax()
    share = common[1][best].item() / 600
    found = evaluate.sampled_extraction(model, [secret(*common[0][best].tolist())], samples=1)
    assert found.expected == pytest.approx(share, abs=0.07)


def test_bad_sampling_is_refused() -> None:
    with pytest.raises(UsageError, match="0 samples"):
        evaluate.sampled_extraction(Table(0.0, 0.0), [secret(1)], samples=0)
    with pytest.raises(CalibrationError, match="no secrets"):
        evaluate.sampled_extraction(Table(0.0, 0.0), [], samples=1)


def perplexity(model: Any, windows: torch.Tensor) -> TextFigure:
    return evaluate.perplexity(compare_windows(model, windows).nll)


class Quality(NamedTuple):
    """Figures of text beside an original."""

    perplexity_ratio: TextFigure
    kl: TextFigure
    agreement: TextFigure


def beside(model: Any, windows: torch.Tensor, original: Any) -> Quality:
    scores = compare_windows(model, windows, original)
    assert scores.beside is not None
    return Quality(
        evaluate.ratio(scores.nll, scores.beside.nll),
        evaluate.over_windows(scores.beside.kl),
        evaluate.over_windows(scores.beside.agree),
    )


def test_perplexity_counts_windows_and_tokens() -> None:
    found = perplexity(Table(0.0, 0.0), torch.zeros(3, 5, dtype=torch.long))
    assert (found.n, found.windows, found.context) == (12, 3, 5)
    for bound in (found.value, found.low, found.high):
        assert bound == pytest.approx(2)


def test_perplexity_of_a_ruined_model_is_still_a_number() -> None:
    found = perplexity(Table(0.0, 5000.0), torch.zeros(1, 3, dtype=torch.long))
    assert found.value == math.exp(700)


def test_quality_beside_the_original() -> None:
    model, original = llama(), llama(rms_norm_eps=0.1)
    windows = torch.randint(VOCAB, (6, 12), generator=torch.Generator().manual_seed(0))
    found = beside(model, windows, original)
    ratio = perplexity(model, windows).value / perplexity(original, windows).value
    assert found.perplexity_ratio.value == pytest.approx(ratio)
    p = original(windows).logits[:, :-1].log_softmax(-1)
    q = model(windows).logits[:, :-1].log_softmax(-1)
    kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean()
    assert found.kl.value == pytest.approx(kl.item(), rel=1e-3)
    agree = (p.argmax(-1) == q.argmax(-1)).float().mean()
    assert found.agreement.value == pytest.approx(agree.item())


def test_a_model_is_its_own_equal() -> None:
    model = llama()
    found = beside(model, torch.randint(VOCAB, (2, 8)), model)
    assert found.kl.value == 0
    assert found.agreement.value == found.perplexity_ratio.value == 1


def test_the_original_may_be_a_function_of_tokens() -> None:
    model = llama()
    windows = torch.randint(VOCAB, (2, 8))
    assert beside(model, windows, lambda tokens: model(tokens).logits).kl.value == 0


def test_a_skill_counts_whole_completions() -> None:
    model = Table(0.0, 1.0)
    pairs = [
        TokenSequence(tokens=(0, 1, 1), counted=1),
        TokenSequence(tokens=(0, 0, 1), counted=2),
        TokenSequence(tokens=(1, 1, 0), counted=1),
        TokenSequence(tokens=(1, 0), counted=1),
    ]
    found = evaluate.skill(model, pairs)
    assert (found.value, found.hits, found.n) == (0.5, 2, 4)
    assert 0 < found.low < 0.5 < found.high < 1
    with pytest.raises(CalibrationError, match="no rows of prompt and completion"):
        evaluate.skill(model, [])


@pytest.mark.parametrize("cached", [True, False])
def test_latency_gives_medians_between_quartiles(cached: bool) -> None:
    model = llama() if cached else Plain(llama())
    found = evaluate.latency(model, [1, 2, 3, 4], new_tokens=3, repeats=5)
    assert found.cached is cached
    for rate, tokens in ((found.prefill, 4), (found.decode, 3)):
        assert 0 < rate.low <= rate.value <= rate.high
        assert (rate.n, rate.tokens) == (5, tokens)
    assert found.memory.kind == "resident"
    assert found.memory.value is None or found.memory.value > 1 << 20
    assert json.dumps(to_json(found))


@pytest.mark.parametrize("change", [{"tokens": []}, {"new_tokens": 0}, {"repeats": 0}])
def test_nothing_to_time_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="cannot be timed"):
        evaluate.latency(Table(0.0), **{"tokens": [1], **change})


def test_chance_of_64_alternatives_is_met_by_random_scores() -> None:
    generator = np.random.default_rng(0)
    scores = [scored(one[0], one[1:].tolist()) for one in generator.normal(50, 5, (400, 65))]
    found = evaluate.memorisation_of(scores, seed=0).exposure
    assert found.low < found.chance < found.high
    assert found.chance == scoring.chance_exposure(64)


@pytest.mark.parametrize(
    ("said", "right", "share"),
    [
        ("a b c", "a b c", 1.0),
        ("A b", "a B c d", 2 * 2 / 6),
        ("c b a", "a b c", 2 * 1 / 6),
        ("x a y b z", "a b", 2 * 2 / 7),
        ("", "a", 0.0),
        ("", "", 0.0),
    ],
)
def test_rouge_l_is_the_longest_common_subsequence(said: str, right: str, share: float) -> None:
    assert evaluate.rouge_l(said, right) == pytest.approx(share)


@pytest.mark.parametrize(
    ("hits", "strength"),
    [((1, 1, 1, 1), 1.0), ((1, 0, 1, 1), 0.5), ((1, 1, 1, 0), 0.0), ((0, 1, 1, 1), 0.75)],
)
def test_extraction_strength_is_what_follows_greedily(
    hits: tuple[int, ...], strength: float
) -> None:
    one = SecretScore(
        nll=4.0,
        tokens=(1.0,) * 4,
        hits=tuple(map(bool, hits)),
        alternatives=(2.0, 8.0),
        alternative_tokens=((1.0, 1.0), (2.0, 2.0, 2.0, 2.0)),
        told=10.0,
    )
    found = evaluate.memorisation_of([one])
    assert found.extraction_strength.value == strength
    ratio = (math.exp(-1) + math.exp(-2)) / 2 / math.exp(-1)
    assert found.truth_ratio.value == pytest.approx(ratio)
    assert evaluate.token_nlls([one.alternative_tokens]).tolist() == [[10 / 6]]
    assert found.rouge_l is None
    assert evaluate.memorisation_of([one], rouges=[0.25]).rouge_l.value == 0.25  # type: ignore
