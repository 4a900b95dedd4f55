"""Text that a model writes: against greedy and sampled decoding without a cache."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import memorised as tiny
import pytest
import torch
from memorised import Memorised
from torch import Tensor

from ortho_cli.errors import CalibrationError, UsageError
from ortho_cli.events import Event, Step
from ortho_cli.model import load as models
from ortho_cli.model import self_written
from ortho_cli.model.secrets import TokenSecret
from ortho_cli.model.self_written import (
    BATCH,
    GREEDY,
    SHARED,
    answers,
    common_opening,
    draw_alternatives,
    without_secrets,
    write_text,
)
from ortho_cli.storage.parts import open_parts

pytestmark = pytest.mark.filterwarnings("ignore")  # other people's deprecations


@pytest.fixture(scope="module")
def model(memorised: Memorised) -> torch.nn.Module:
    return models.load_model(memorised.model, dtype=torch.float32, device=torch.device("cpu"))


def write(memorised: Memorised, model: torch.nn.Module, **options: object) -> Tensor:
    tokenizer = models.load_tokenizer(memorised.model)
    asked = {"count": 5, "length": 12, "seed": 0, **options}
    return write_text(model, tokenizer, **asked)  # type: ignore[arg-type]


@torch.no_grad()
def logits(model: torch.nn.Module, text: Tensor) -> Tensor:
    found: Tensor = model(input_ids=text, use_cache=False).logits
    return found


def secret(prompt: list[int], *tokens: int) -> TokenSecret:
    return TokenSecret(
        prompt=tuple(prompt), secret=tokens, alternatives=((1,),), drawn="given", where="here"
    )


def test_text_depends_on_the_seed_alone(memorised: Memorised, model: torch.nn.Module) -> None:
    first = write(memorised, model)
    assert first.shape == (5, 12)
    assert torch.equal(first, write(memorised, model))
    assert not torch.equal(first, write(memorised, model, seed=1))


@pytest.mark.parametrize("opening", [(), (5, 6)])
def test_text_that_was_begun_is_finished_to_the_same_tokens(
    memorised: Memorised,
    model: torch.nn.Module,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    opening: tuple[int, ...],
) -> None:
    monkeypatch.setattr(self_written, "at_once", lambda length: 2)
    whole, begun = write(memorised, model, opening=opening), list[int]()

    def stop(event: Event) -> None:
        if isinstance(event, Step):
            begun.append(event.number)
            if len(begun) in (2, 4):
                raise KeyboardInterrupt

    for number in range(3):
        kept = open_parts(tmp_path / "parts")
        if number == 2:
            found = write(memorised, model, opening=opening, parts=kept, on_event=stop)
        else:
            with pytest.raises(KeyboardInterrupt):
                write(memorised, model, opening=opening, parts=kept, on_event=stop)
            kept.save()
    assert torch.equal(found, whole)
    assert begun == [1, 3, 3, 5, 5], "no batch is written twice"


def test_first_tokens_are_ordinary_and_the_next_ones_the_likeliest(
    memorised: Memorised, model: torch.nn.Module
) -> None:
    text = write(memorised, model, count=BATCH + 3)
    special = set(models.load_tokenizer(memorised.model).all_special_ids)
    assert not special & set(text[:, 0].tolist())
    assert len(set(text[:, 0].tolist())) > 5
    likeliest = logits(model, text).argmax(-1)
    assert torch.equal(text[:, 1 : GREEDY + 1], likeliest[:, :GREEDY])
    assert not torch.equal(text[:, GREEDY + 1 :], likeliest[:, GREEDY:-1])


def test_drawn_tokens_have_the_models_own_probabilities(
    memorised: Memorised, model: torch.nn.Module
) -> None:
    """Shares of the first drawn token among 4,000 texts of one opening, without a cache beside."""
    opening = (5, 6)
    text = write(memorised, model, count=4000, length=3, opening=opening)
    assert (text[:, :2] == torch.tensor(opening)).all()
    expected = logits(model, torch.tensor([opening]))[0, -1].softmax(-1)
    shares = torch.bincount(text[:, 2], minlength=len(expected)) / 4000
    assert (shares - expected).abs().max() < 5 * (0.25 / 4000) ** 0.5  # standard errors


def test_answers_end_with_the_end_token_after_the_prompt(
    memorised: Memorised, model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [[3, 4, 5], [6, 7], [3, 4, 6], [8, 9, 10], [7, 7], [11]]
    whole = answers(model, prompts, 9)
    end = whole[0][3]  # some answers have it, and others do not
    cut = [said[: said.index(end)] if end in said else said for said in whole]
    assert {len(said) for said in cut} >= {whole[0].index(end), 9}
    assert answers(model, prompts, 9, end=end) == cut
    assert answers(model, [[end, *prompts[0]]], 1, end=end) == answers(model, [[end, 3, 4, 5]], 1)
    calls: list[int] = []
    original = self_written.logits_of
    monkeypatch.setattr(self_written, "logits_of", lambda out: calls.append(1) or original(out))
    answers(model, [prompts[0]], 9, end=end)
    assert len(calls) == whole[0].index(end) + 1


@pytest.mark.parametrize("logits_at_once", [1 << 25, 1])
def test_answers_to_prompts_of_all_lengths_are_greedy(
    memorised: Memorised,
    model: torch.nn.Module,
    monkeypatch: pytest.MonkeyPatch,
    logits_at_once: int,
) -> None:
    monkeypatch.setattr(self_written, "LOGITS", logits_at_once)
    prompts = [one.prompt[-length:] for one in memorised.secrets() for length in (3, 1, 2, 5)]
    counts = [1 + index % 4 for index in range(len(prompts))]
    found = answers(model, prompts, counts)
    for prompt, count, said in zip(prompts, counts, found, strict=True):
        text = list(prompt)
        for _ in range(count):
            text.append(int(logits(model, torch.tensor([text]))[0, -1].argmax()))
        assert said == text[len(prompt) :]
    assert answers(model, [], []) == []


@pytest.mark.parametrize("options", [{"count": 0}, {"length": 1}, {"opening": (1,) * 12}])
def test_nothing_to_write_is_refused(
    memorised: Memorised, model: torch.nn.Module, options: dict[str, object]
) -> None:
    with pytest.raises(UsageError, match="cannot be written"):
        write(memorised, model, **options)


def test_the_opening_is_what_most_prompts_begin_with() -> None:
    prompts = [[1, 2, 3, 4, 5, 6], [1, 2, 3, 9, 9, 9], [1, 2, 8, 8, 8, 8], [7, 7, 7, 7, 7, 7]]
    listed = [secret(prompt, 1) for prompt in prompts]
    assert common_opening(listed) == (1, 2)
    assert common_opening(listed[:2]) == (1, 2, 3)  # half of the shortest prompt
    assert common_opening(listed[2:]) == ()
    assert common_opening([]) == ()


def test_text_about_a_secret_is_left_out_and_text_of_its_form_is_not() -> None:
    form, long = [1, 2, 3, 4, 5, 6, 7], list(range(10, 20))
    secrets = [
        secret([*form, 50, 51], *long),
        secret([*form, 60, 61], 30, 31),
        secret([*form, 70], *range(80, 90)),
    ]
    texts = {
        "tells": [0, *long[2 : 2 + SHARED], 0, 0],
        "tells a short one": [0, 0, 30, 31, 0, 0, 0, 0, 0],
        "asks": [0, 0, *form[-4:], 50, 51, 0],
    }
    kept = {
        "tells less": [0, *long[: SHARED - 1], 0, 0, 0],
        "has the form": [*form, 52, 51],
        "asks less": [0, 0, 0, *form[-3:], 50, 51, 0],
    }
    for text in texts.values():
        assert without_secrets(torch.tensor([text]), secrets).shape == (0, 9), text
    both = torch.tensor([*texts.values(), *kept.values()])
    assert without_secrets(both, secrets).tolist() == list(kept.values())


def bare(memorised: Memorised) -> list[TokenSecret]:
    return [replace(one, alternatives=(), drawn="model") for one in memorised.secrets()]


def draw(
    memorised: Memorised, model: torch.nn.Module, secrets: list[TokenSecret], **options: Any
) -> tuple[TokenSecret, ...]:
    tokenizer = models.load_tokenizer(memorised.model)
    return draw_alternatives(model, tokenizer, secrets, **{"count": 16, "seed": 0, **options})


def test_a_model_that_knows_a_secret_by_heart_writes_alternatives_that_do_not_tell_it(
    memorised: Memorised, model: torch.nn.Module
) -> None:
    secrets = bare(memorised)
    special = set(models.load_tokenizer(memorised.model).all_special_ids)
    said = answers(model, [one.prompt for one in secrets], 4)
    assert said == [list(one.secret) for one in secrets]
    for one in draw(memorised, model, secrets):
        assert one.drawn == "model"
        assert len(set(one.alternatives)) == len(one.alternatives) == 16
        pairs = set(itertools.pairwise(one.secret))
        for other in one.alternatives:
            assert 0 < len(other) <= len(one.secret)
            assert other[0] != one.secret[0]
            assert not special & set(other)
            assert not pairs & set(itertools.pairwise(other)), "half of it"
            assert other not in {secret.secret for secret in secrets}


def test_alternatives_depend_on_seed_and_row_and_given_ones_stay(
    memorised: Memorised, model: torch.nn.Module
) -> None:
    secrets, given = bare(memorised), memorised.secrets()
    first = draw(memorised, model, secrets)
    assert draw(memorised, model, secrets) == first
    assert draw(memorised, model, secrets, seed=1) != first
    assert draw(memorised, model, given) == tuple(given)
    mixed = draw(memorised, model, [*given[:3], secrets[3]])
    assert mixed == (*given[:3], first[3])


def test_drawn_alternatives_begin_as_most_secrets_do(
    memorised: Memorised, model: torch.nn.Module
) -> None:
    """`the red` is the form of these, and no alternative of one that begins otherwise has it."""
    words = {word: n for n, word in enumerate(tiny.vocabulary())}
    form = (words["the"], words["red"])
    tails = ([5, 6, 7], [8, 9, 10], [11, 12, 13])
    secrets = [
        replace(bare(memorised)[0], secret=(*form, *tail), where=str(tail)) for tail in tails
    ]
    odd = replace(secrets[0], secret=(words["the"], 20, 21), where="odd")
    *alike, other = draw(memorised, model, [*secrets, odd])
    for one in alike:
        assert {alternative[:2] for alternative in one.alternatives} == {form}
        assert all(alternative[2] != one.secret[2] for alternative in one.alternatives)
    assert {alternative[0] for alternative in other.alternatives} == {words["the"]}
    assert all(alternative[1] != 20 for alternative in other.alternatives)
    # Of two secrets nobody can tell what is form and what is the secret.
    pair = draw(memorised, model, secrets[:2])
    assert all(alternative[0] != form[0] for one in pair for alternative in one.alternatives)


def test_a_model_that_has_nothing_else_to_say_asks_for_alternatives(
    memorised: Memorised, model: torch.nn.Module
) -> None:
    """Of a secret that ends in all that it could say."""
    everything = tuple(range(3, len(tiny.vocabulary())))
    secret = replace(bare(memorised)[0], secret=everything[:1])
    parrot = Parrot(model, token=4)
    with pytest.raises(CalibrationError, match="has no `alternatives` and no `pattern`") as caught:
        draw(memorised, parrot, [secret])
    assert "128 answers of the model in place of its secret 1 say something else" in str(
        caught.value.message
    )
    assert "alternatives" in str(caught.value.hint)
    assert "{digit:6}" in str(caught.value.hint)


class Parrot(torch.nn.Module):
    """Says one token for ever."""

    def __init__(self, model: torch.nn.Module, *, token: int) -> None:
        super().__init__()
        self.model, self.token = model, token

    def get_input_embeddings(self) -> Any:
        return self.model.get_input_embeddings()

    def forward(self, tokens: Tensor) -> Tensor:
        size = self.get_input_embeddings().weight.shape[0]
        found = torch.full((*tokens.shape, size), -1e9)
        found[..., self.token] = 0.0
        return found
