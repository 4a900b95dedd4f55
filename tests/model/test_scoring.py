"""Measuring a causal language model: the same figures with and without a cache, and known ones."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import ortho_cli
from ortho_cli.errors import NumericalError, UsageError
from ortho_cli.model import scoring
from ortho_cli.model.secrets import TokenSecret
from ortho_cli.model.text import TokenSequence

pytestmark = pytest.mark.filterwarnings("ignore")  # other people's deprecations
VOCAB = 96
PROMPT = [5, 9, 2, 40]
COMPLETIONS = [[3, 4, 5], [7], [1, 2, 3, 4, 5, 6], [3, 4, 5]]


def llama(dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        max_position_embeddings=64,
        initializer_range=0.3,
        **settings,
    )
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


class Plain(nn.Module):
    """The same model for those who know tokens and logits only."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens, use_cache=False).logits  # type: ignore[no-any-return]


class Table(nn.Module):
    """A model that gives the same logits everywhere."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.row = torch.tensor(logits)

    def forward(self, tokens: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.row.expand(*tokens.shape, -1))


@pytest.mark.parametrize("wrap", [lambda model: model, Plain], ids=["cache", "whole"])
def test_completions_equal_the_slow_twin(wrap: Any) -> None:
    model = llama()
    found = scoring.completion_nll(wrap(model), PROMPT, COMPLETIONS)
    for nll, completion in zip(found, COMPLETIONS, strict=True):
        assert nll.dtype == torch.float32
        expected = torch.tensor(reference.completion_nll(model, PROMPT, completion))
        torch.testing.assert_close(nll, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("budget", [1, 7 * VOCAB, 1 << 25])
@pytest.mark.parametrize("wrap", [lambda model: model, Plain], ids=["cache", "whole"])
def test_batches_do_not_change_figures(
    monkeypatch: pytest.MonkeyPatch, budget: int, wrap: Any
) -> None:
    model = wrap(llama())
    whole = scoring.completion_nll(model, PROMPT, COMPLETIONS)
    monkeypatch.setattr(scoring, "LOGITS", budget)
    for one, other in zip(whole, scoring.completion_nll(model, PROMPT, COMPLETIONS), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


def test_the_prompt_is_passed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    seen: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    scoring.completion_nll(model, PROMPT, COMPLETIONS)
    assert seen == [(1, 4), (4, 5)]


def test_sliding_attention_gives_the_same_with_and_without_a_cache() -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.MistralConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        sliding_window=3,
    )
    model = transformers.MistralForCausalLM(config).eval()
    one = scoring.completion_nll(model, PROMPT, COMPLETIONS)
    other = scoring.completion_nll(Plain(model), PROMPT, COMPLETIONS)
    torch.testing.assert_close(torch.cat(one), torch.cat(other), atol=1e-4, rtol=0)


def test_bfloat16_is_measured_in_float32() -> None:
    found = scoring.completion_nll(llama(torch.bfloat16), PROMPT, COMPLETIONS)
    expected = scoring.completion_nll(llama(), PROMPT, COMPLETIONS)
    assert {nll.dtype for nll in found} == {torch.float32}
    assert (torch.cat(found) - torch.cat(expected)).abs().max() < 0.3


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_live_artifact_gives_the_same_with_and_without_a_cache(
    artifact: Path, alpha: float
) -> None:
    model = ortho_cli.load(artifact, alpha=alpha, dtype=torch.float32)
    found = torch.cat(scoring.completion_nll(model, PROMPT, COMPLETIONS))
    whole = torch.cat(scoring.completion_nll(Plain(model), PROMPT, COMPLETIONS))
    torch.testing.assert_close(found, whole, atol=1e-3, rtol=0)
    ortho_cli.set_alpha(model, 1.0 - alpha)
    other = torch.cat(scoring.completion_nll(model, PROMPT, COMPLETIONS))
    assert not torch.equal(found, other)


@pytest.mark.gpu
def test_cuda_gives_the_figures_of_the_cpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    model = llama()
    expected = torch.cat(scoring.completion_nll(model, PROMPT, COMPLETIONS))
    found = torch.cat(scoring.completion_nll(model.cuda(), PROMPT, COMPLETIONS))
    assert found.device.type == "cpu"
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


def test_nothing_needs_a_gradient() -> None:
    model = llama()
    nll = scoring.completion_nll(model, PROMPT, COMPLETIONS)[0]
    assert not nll.requires_grad
    assert not scoring.compare_windows(model, torch.arange(8)[None]).nll.requires_grad


def test_a_temperature_divides_the_logits() -> None:
    model = Table(0.0, 2.0)
    (nll,) = scoring.completion_nll(model, [0], [[1]], temperature=2.0)
    assert nll.item() == pytest.approx(math.log(1 + math.exp(-1)))


def test_a_secret_is_scored_with_its_alternatives() -> None:
    secret = TokenSecret(
        prompt=(0,), secret=(1, 0), alternatives=((0, 0), (1,)), drawn="given", where="here"
    )
    found = scoring.score(Table(0.0, 2.0), secret)
    likely, unlikely = math.log(1 + math.exp(-2)), math.log(1 + math.exp(2))
    assert found.tokens == pytest.approx((likely, unlikely))
    assert found.nll == pytest.approx(likely + unlikely)
    assert found.alternatives == pytest.approx((2 * unlikely, likely))
    assert found.hits == (True, False)
    assert not found.verbatim
    assert found.told == pytest.approx(sum(found.alternatives))
    assert scoring.exposures([found]) == pytest.approx([math.log2(3 / 2)])


def test_exposure_is_among_what_alternatives_tell() -> None:
    """Half of the NLL of these alternatives is their phrasing."""

    def scored(nll: float) -> scoring.SecretScore:
        return scoring.SecretScore(
            nll=nll,
            tokens=(nll,),
            hits=(False,),
            alternatives=(8.0, 10.0, 12.0, 14.0),
            alternative_tokens=((2.0, 2.0, 4.0),),
            told=22.0,
        )

    assert scoring.telling_share([scored(5.5)]) == 0.5
    assert scoring.exposures([scored(5.5), scored(1.0), scored(9.0)]) == pytest.approx(
        [math.log2(5 / 3), math.log2(5), 0.0]
    )


def test_running_text_gives_a_loss_for_each_token_but_the_first() -> None:
    model = llama()
    windows = torch.randint(VOCAB, (3, 9))
    expected = model(windows, labels=windows).loss.item()
    found = scoring.compare_windows(model, windows).nll
    assert found.shape == (3, 8)
    assert found.mean().item() == pytest.approx(expected, abs=1e-4)


def test_long_windows_are_measured_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = llama(), llama(rms_norm_eps=0.1)
    windows = torch.randint(VOCAB, (2, 12))
    whole = scoring.compare_windows(model, windows, other)
    monkeypatch.setattr(scoring, "POSITIONS", 5)
    parts = scoring.compare_windows(model, windows, other)
    torch.testing.assert_close(whole, parts)


def test_divergence_from_the_original_is_known() -> None:
    windows = torch.zeros(1, 3, dtype=torch.long)
    found = scoring.compare_windows(Table(0.0, 0.0), windows, Table(0.0, math.log(3)))
    kl = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert found.beside is not None
    assert found.beside.kl.tolist() == [pytest.approx([kl, kl])]
    assert found.beside.nll.tolist() == [pytest.approx([math.log(4)] * 2)]
    assert found.beside.agree.tolist() == [[0.0, 0.0]]
    never = scoring.compare_windows(
        Table(0.0, 0.0, -math.inf), windows, Table(0.0, math.log(3), -math.inf)
    )
    assert never.beside is not None
    assert never.beside.kl.tolist() == [pytest.approx([kl, kl])]
    same = scoring.compare_windows(Table(0.0, 1.0), windows, Table(0.0, 1.0))
    assert same.beside is not None
    assert same.beside.kl.abs().max() == 0


def test_sequence_hits_count_from_where_they_should() -> None:
    model = llama()
    sequences = [
        TokenSequence(tokens=(1, 2, 3, 4, 5), counted=3),
        TokenSequence(tokens=(7, 8), counted=1),
        TokenSequence(tokens=(9, 8, 7, 6, 5, 4, 3), counted=6),
    ]
    found = scoring.sequence_hits(model, sequences)
    for hits, sequence in zip(found, sequences, strict=True):
        guessed = model(torch.tensor([sequence.tokens])).logits[0].argmax(-1)[:-1]
        expected = guessed == torch.tensor(sequence.tokens[1:])
        assert hits.tolist() == expected[sequence.counted - 1 :].tolist()
    assert scoring.sequence_hits(model, []) == []


@pytest.mark.parametrize(("prompt", "completions"), [([], [[1]]), ([1], [[1], []])])
def test_nothing_to_measure_is_refused(prompt: list[int], completions: list[list[int]]) -> None:
    with pytest.raises(UsageError, match="no tokens"):
        scoring.completion_nll(Table(0.0, 1.0), prompt, completions)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_a_temperature_that_is_none_is_refused(temperature: float) -> None:
    with pytest.raises(UsageError, match="temperature"):
        scoring.completion_nll(Table(0.0, 1.0), [0], [[1]], temperature=temperature)


@pytest.mark.parametrize("shape", [(0, 4), (2, 1), (4,)])
def test_windows_too_short_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="windows of running text"):
        scoring.compare_windows(Table(0.0, 1.0), torch.zeros(shape, dtype=torch.long))


def test_nan_is_an_error_everywhere() -> None:
    model = Table(0.0, math.nan)
    with pytest.raises(NumericalError, match="1 of 1 measured"):
        scoring.completion_nll(model, [0], [[0]])
    with pytest.raises(NumericalError):
        scoring.compare_windows(model, torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(NumericalError):
        scoring.sequence_hits(model, [TokenSequence(tokens=(0, 0))])


@given(st.integers(0, 4), st.lists(st.integers(0, 4), min_size=1, max_size=40))
def test_exposure_equals_the_slow_twin(secret: int, alternatives: list[int]) -> None:
    found = scoring.exposure(float(secret), [float(one) for one in alternatives])
    assert found == pytest.approx(reference.exposure(secret, [float(a) for a in alternatives]))


def test_exposure_is_known_at_its_ends_and_at_ties() -> None:
    others = [float(one) for one in range(1, 65)]
    assert scoring.exposure(0.0, others) == pytest.approx(6.0224, abs=1e-4)
    assert scoring.exposure(65.0, others) == 0
    assert scoring.exposure(3.0, [3.0] * 64) == 0
    assert scoring.exposure(0.0, [1.0]) == 1
    assert scoring.exposure(1.0, [1.0]) == 0


@pytest.mark.parametrize("nlls", [[math.nan, 1.0], [1.0, math.nan], [1.0, math.inf]])
def test_exposure_of_nan_is_an_error(nlls: list[float]) -> None:
    with pytest.raises(NumericalError, match="NaN or infinite"):
        scoring.exposure(nlls[0], nlls[1:])


def test_exposure_needs_an_alternative() -> None:
    with pytest.raises(NumericalError, match="needs an alternative"):
        scoring.exposure(1.0, [])


def test_chance_is_the_mean_over_ranks() -> None:
    others = [float(one) for one in range(64)]
    ranks = [scoring.exposure(place - 0.5, others) for place in range(65)]
    assert scoring.chance_exposure(64) == pytest.approx(sum(ranks) / 65)
    assert scoring.chance_exposure(10**6) == pytest.approx(1 / math.log(2), abs=1e-4)
