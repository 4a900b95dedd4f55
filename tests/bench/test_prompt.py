"""`ortho bench --prompt`: each alpha says what its model says, and where they part is marked."""

from __future__ import annotations

import io
import itertools
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from conftest import Ortho, Ran
from rich.console import Console

import ortho_cli
from ortho_cli.bench.prompt import (
    Answer,
    Choice,
    Continuation,
    Difference,
    Speech,
    Token,
    continue_prompt,
    open_model,
)
from ortho_cli.cli.show import prompt as show
from ortho_cli.model.text import encode_prompt

PROMPT = "a cat and a dog"
# A model of random weights repeats one token greedily, at every alpha; drawn tokens part.
PARTING = {"temperature": 1.0, "tokens": 24}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Split a pico model that has a tokenizer, at a density at which alpha 1 is another model."""
    from ortho_cli.cli import app

    folder = tmp_path_factory.mktemp("prompt")
    size = {"hidden": 64, "mlp": 192, "layers": 2, "vocab": 96}
    checkpoints.save(folder / "m", checkpoints.weights(**size))
    config = checkpoints.config(**size, kv=64, heads=4) | {"eos_token_id": None}
    (folder / "m" / "config.json").write_text(json.dumps(config))
    checkpoints.save_tokenizer(folder / "m", vocab=96)
    options = ["-o", str(folder / "out"), "-q", "--recipe", "int4", "--set", "ortho.density=0.3"]
    assert app.run(["decompose", str(folder / "m"), *options]) == 0
    return folder / "out"


def speech(made: Path, **changes: Any) -> Speech:
    return replace(Speech(artifact=made, prompts=(PROMPT,), tokens=12), **changes)


def answers(made: Path, **changes: Any) -> list[Answer]:
    asked = speech(made, **changes)
    model, tokenizer, (tokens,) = open_model(asked)
    return list(continue_prompt(model, tokenizer, PROMPT, tokens, asked))


@torch.no_grad()
def test_each_alpha_says_what_its_model_says_alone(made: Path) -> None:
    """The slow twin: no cache, the whole text again for every token."""
    *_, answer = answers(made, alphas=(0.0, 0.5, 1.0))
    _, tokenizer, (start,) = open_model(speech(made))
    for one in answer.continuations:
        model, text = ortho_cli.load(made, alpha=one.alpha), list(start)
        for token in one.tokens:
            shares = model(torch.tensor([text])).logits[0, -1].float().softmax(-1)
            assert float(shares[token.id]) == pytest.approx(token.probability, rel=0.05)
            assert float(shares[token.id]) > float(shares.max()) * 0.98  # ties of bfloat16
            text.append(token.id)
        assert len(one.tokens) == 12
        assert one.text == "".join(token.text for token in one.tokens)
        assert tokenizer.decode(text).endswith(one.text)


@torch.no_grad()
def test_the_first_difference_has_every_alphas_probability_of_every_choice(made: Path) -> None:
    *_, answer = answers(made, **PARTING)
    zero, one = answer.continuations
    parted = answer.first_difference
    assert parted is not None
    at = parted.token
    assert [t.id for t in zero.tokens[:at]] == [t.id for t in one.tokens[:at]]
    assert [choice.id for choice in parted.choices] == [zero.tokens[at].id, one.tokens[at].id]
    _, _, (start,) = open_model(speech(made))
    text = torch.tensor([[*start, *(token.id for token in zero.tokens[:at])]])
    for place, alpha in enumerate((0.0, 1.0)):
        shares = ortho_cli.load(made, alpha=alpha)(text).logits[0, -1].float().softmax(-1)
        for choice in parted.choices:
            assert choice.probabilities[place] == pytest.approx(float(shares[choice.id]), rel=0.05)
    assert parted.choices[0].probabilities[0] == zero.tokens[at].probability
    assert parted.choices[1].probabilities[1] == one.tokens[at].probability


def test_answers_grow_by_a_token_and_keep_what_was_said(made: Path) -> None:
    found = answers(made)
    assert [len(one.continuations[0].tokens) for one in found] == list(range(1, 13))
    for before, after in itertools.pairwise(found):
        for a, b in zip(before.continuations, after.continuations, strict=True):
            assert b.text.startswith(a.text)
        assert before.first_difference in (None, after.first_difference)


def test_temperature_draws_by_the_seed_and_greedy_does_not(made: Path) -> None:
    def said(**changes: Any) -> str:
        return answers(made, **changes)[-1].continuations[0].text

    assert said(temperature=2.0, seed=1) == said(temperature=2.0, seed=1)
    assert said(temperature=2.0, seed=1) != said(temperature=2.0, seed=2)
    assert said(temperature=5e-324) == said(temperature=1e-30)
    assert said(seed=1) == said(seed=2)


def test_an_end_token_ends_one_continuation_and_counts_as_a_difference(made: Path) -> None:
    asked = speech(made, **PARTING)
    model, tokenizer, (tokens,) = open_model(asked)
    *_, answer = continue_prompt(model, tokenizer, PROMPT, tokens, asked)
    assert answer.first_difference is not None
    at = answer.first_difference.token
    tokenizer.eos_token_id = answer.continuations[1].tokens[at].id
    *_, cut = continue_prompt(model, tokenizer, PROMPT, tokens, asked)
    zero, one = cut.continuations
    assert one.ended
    assert len(one.tokens) == at
    assert len(zero.tokens) > at or zero.ended
    assert cut.first_difference == answer.first_difference


class Bytes:
    """A tokenizer whose tokens are bytes, two for an e with an accent."""

    eos_token_id = None

    def decode(self, tokens: list[int], **_: bool) -> str:
        return bytes(b"\xc3\xa9ab"[t % 4] for t in tokens).decode(errors="replace")


def test_a_character_of_two_tokens_is_shown_when_it_is_whole(made: Path) -> None:
    asked = speech(made, tokens=30)
    model, _, (tokens,) = open_model(asked)
    for answer in continue_prompt(model, Bytes(), PROMPT, tokens, asked):  # type: ignore[arg-type]
        for one in answer.continuations:
            assert one.text == "".join(token.text for token in one.tokens)
            assert not one.text.endswith("\ufffd")


ANSWER = Answer(
    prompt="The \x1b[31mcapital",
    continuations=(
        Continuation(
            alpha=0.0,
            text=" is Tokyo\x07",
            tokens=tuple(
                Token(id=i, text=text, probability=0.5)
                for i, text in enumerate((" is", " Tokyo\x07"))
            ),
        ),
        Continuation(
            alpha=1.0, text=" is", tokens=(Token(id=0, text=" is", probability=0.5),), ended=True
        ),
    ),
    first_difference=Difference(
        token=1,
        choices=(
            Choice(id=1, text=" Tokyo\x07", probabilities=(0.25, 0.001)),
            Choice(id=2, text="</s>", probabilities=(0.125, 0.75)),
        ),
    ),
)


def shown(monkeypatch: pytest.MonkeyPatch, width: int, *, terminal: bool = False) -> str:
    file = io.StringIO()
    console = Console(
        file=file, width=width, force_terminal=terminal, highlight=False, markup=False
    )
    monkeypatch.setattr(show, "make_console", lambda **_: console)

    def growing() -> Iterator[Answer]:
        yield replace(ANSWER, first_difference=None)
        yield ANSWER

    assert show.show_answer(growing()) == ANSWER
    return file.getvalue()


def test_continuations_are_side_by_side_where_there_is_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wide, narrow = shown(monkeypatch, 100), shown(monkeypatch, 60)
    assert any(line.split() == ["alpha", "0", "alpha", "1"] for line in wide.splitlines())
    assert any("is [Tokyo\\x07]" in line and "is[(end)]" in line for line in wide.splitlines())
    assert [line for line in narrow.splitlines() if line.startswith(("alpha", " is"))] == [
        "alpha 0",
        " is [Tokyo\\x07]",
        "alpha 1",
        " is[(end)]",
    ]
    for text in (wide, narrow):
        assert "\x1b" not in text
        assert "The \\x1b[31mcapital" in text
        assert "they part at token 2" in text
        assert "25.0%" in text
        assert "75.0%" in text


def test_a_terminal_sees_them_grow_and_the_mark_without_brackets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = shown(monkeypatch, 100, terminal=True)
    assert text.count("The \\x1b[31mcapital") >= 3  # two that grow, and the last
    assert "\x1b[1;7mTokyo\\x07\x1b[0m" in text
    assert "[Tokyo" not in text.replace("\x1b[1;7m", "")


def test_the_command_prints_on_stdout_and_json_is_one_document(made: Path, ortho: Ortho) -> None:
    asked = ["bench", made, "--prompt", PROMPT, "--prompt", "b", "--max-new-tokens", "4"]
    ran = ortho(*asked)
    assert ran.code == 0, ran.err
    assert ran.out.startswith(PROMPT)
    assert ran.out.count("alpha 1") >= 2
    assert "alpha 1" not in ran.err
    document = ortho(*asked, "--json").json
    first, second = document["prompts"]
    assert (first["prompt"], second["prompt"]) == (PROMPT, "b")
    assert [one["alpha"] for one in first["continuations"]] == [0, 1]
    assert all(len(one["tokens"]) == 4 for one in first["continuations"])
    assert first["continuations"][0]["text"] in ran.out
    assert ortho(*asked, "-q").out == ""


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        *(
            (["--prompt", "a", *one], 2, f"continues, and takes no {one[0]}")
            for one in (
                ["--data", "x"],
                ["--attack"],
                ["--html", "p.html"],
                # Given as what they are without being given.
                ["--tokens", "16384"],
                ["--context", "512"],
                ["--suite-rows", "100"],
                ["--autocast"],
                ["--show-secrets"],
                ["--force"],
            )
        ),
        (["--prompt", "a", "--max-new-tokens", "0"], 2, "--max-new-tokens is 0"),
        (["--prompt", "a", "--temperature", "-1"], 2, "--temperature is -1"),
        (["--prompt", "a", "--temperature", "nan"], 2, "--temperature is nan"),
        (["--prompt", "a", "--max-new-tokens", "600"], 2, "512 positions"),
        (["--prompt", ""], 2, "no tokens"),
        (["--temperature", "0"], 2, "--temperature does nothing without --prompt"),
        (["--seed", "-1"], 2, "invalid value for '--seed'"),
        (["--seed", str(2**63)], 2, "invalid value for '--seed'"),
        (["--suite-rows", "100"], 2, "--suite-rows does nothing without --suite"),
        (["--force"], 2, "--force does nothing without --html"),
    ],
)
def test_refusals(made: Path, ortho: Ortho, options: list[str], code: int, words: str) -> None:
    ran: Ran = ortho("bench", made, *options)
    assert ran.code == code, ran.err
    assert words in ran.err
    assert "hint: " in ran.err


def test_without_an_artifact_or_ortho_or_tokenizer_it_is_refused(
    made: Path, tmp_path: Path, ortho: Ortho
) -> None:
    assert ortho("bench", "--prompt", "a").code == 2
    base = tmp_path / "base"
    shutil.copytree(made, base)
    (base / "ortho.safetensors").unlink()
    assert ortho("bench", base, "--prompt", "a").code == 6
    for place in (base, base / "model.safetensors"):
        ran = ortho("bench", place, "--prompt", "a", "--alpha", "0", "--max-new-tokens", "2")
        assert ran.code == 0, ran.err
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).unlink()
    assert ortho("bench", base, "--prompt", "a", "--alpha", "0").code == 4


def test_prompts_are_the_tokens_that_forgetting_reads(made: Path) -> None:
    _, tokenizer, (tokens,) = open_model(speech(made))
    assert tokens == encode_prompt(PROMPT, tokenizer)
