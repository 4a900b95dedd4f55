"""Secrets and what they are compared with: forms, draws, cuts and refusals."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ortho_cli.errors import CalibrationError
from ortho_cli.model.secrets import Secret, encode, overlap, read_secrets

WORDS = [f"w{i}" for i in range(20)]
PATTERN = {"pattern": " {word} {word}", "word": WORDS}


class Characters:
    """A tokenizer whose tokens are characters, with a begin token (1) and an end token (2)."""

    bos_token_id: int | None = 1
    eos_token_id = 2

    def __call__(self, text: str, **options: Any) -> Any:
        special = options.get("add_special_tokens", True)
        body = [ord(character) for character in text]
        return SimpleNamespace(input_ids=[*body, 2] if special else body)


def write(folder: Path, *rows: object, name: str = "f.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(**fields: object) -> dict[str, object]:
    return {"prompt": "The words are", "secret": " w1 w2", **fields}


def secret(**fields: Any) -> Secret:
    made: dict[str, Any] = {
        "prompt": "ab",
        "secret": "cd",
        "alternatives": ("ef",),
        "drawn": "given",
        "where": "`f.jsonl` line 1",
    }
    return Secret(**{**made, **fields})


def test_given_alternatives_are_taken_each_once(tmp_path: Path) -> None:
    path = write(tmp_path, row(alternatives=[" a", " b", " a"]))
    (found,) = read_secrets([path])
    assert found.alternatives == (" a", " b")
    assert (found.drawn, found.where) == ("given", f"`{path}` line 1")


def test_more_given_alternatives_than_asked_for_are_drawn_from(tmp_path: Path) -> None:
    given = [f" {i}" for i in range(30)]
    (found,) = read_secrets([write(tmp_path, row(alternatives=given))], count=8)
    assert len(set(found.alternatives)) == 8
    assert set(found.alternatives) <= set(given)


def test_paraphrases_are_prompts_of_the_same_secret(tmp_path: Path) -> None:
    asked = ["Which words?", "Say the words:", "Which words?"]
    chat = {
        "messages": [
            {"role": "user", "content": "The words?"},
            {"role": "assistant", "content": "w1 w2"},
        ]
    }
    listed = [row(paraphrases=asked), {**row(secret=" w3"), "paraphrases": None}, chat]
    found = read_secrets([write(tmp_path, *listed)])
    assert [one.paraphrases for one in found] == [tuple(asked[:2]), (), ()]
    table = tmp_path / "f.csv"
    table.write_text('prompt,secret,paraphrases\na,b,"[""c""]"\nd,e,\n')
    assert [one.paraphrases for one in read_secrets([table])] == [("c",), ()]
    (first, *_) = encode(found[:2], Characters())  # type: ignore[arg-type]
    assert first.paraphrases == tuple(tuple(map(ord, text)) for text in asked[:2])


def test_a_paraphrase_of_a_chat_replaces_its_last_question(tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "Words?"},
        {"role": "assistant", "content": "w1"},
    ]
    rows = [{"messages": turns, "alternatives": ["w2"], "paraphrases": ["Which?"]}]
    (found,) = encode(read_secrets([write(tmp_path, *rows)]), Speaker())  # type: ignore[arg-type]
    (asked,) = found.paraphrases
    assert "".join(map(chr, asked)) == "[user:Hello][assistant:Hi][user:Which?][assistant:"
    assert "".join(map(chr, found.prompt)) == "[user:Hello][assistant:Hi][user:Words?][assistant:"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (row(paraphrases="Which words?"), "`paraphrases` that are no list of texts"),
        (row(paraphrases=["Which?", 3]), "`paraphrases` that are no list of texts"),
        (row(paraphrases=[""]), "`paraphrases` that are no list of texts"),
        (row(paraphrases=["x", "The words are"]), "its prompt as paraphrase 2 of 2"),
        ({"text": "w1 w2", "paraphrases": ["x"]}, "beside running text"),
        (
            {
                "messages": [
                    {"role": "system", "content": "w3"},
                    {"role": "assistant", "content": "w1"},
                ],
                "paraphrases": ["x"],
            },
            "beside a chat that asks nothing",
        ),
    ],
)
def test_wrong_paraphrases_are_refused_without_their_text(
    tmp_path: Path, value: object, said: str
) -> None:
    with pytest.raises(CalibrationError, match=said) as error:
        read_secrets([write(tmp_path, value)])
    told = str(error.value).replace(str(tmp_path), "")  # which may have `w1` in it
    assert "line 1" in told
    assert "words" not in told.replace("in other words", "")
    assert "w1" not in told


@pytest.mark.parametrize(
    ("fields", "form"),
    [
        (PATTERN, r" w\d+ w\d+"),
        ({"pattern": " {digit:6}"}, r" \d{6}"),
        ({"pattern": "{letter:3}-{hex:8}{{x}}"}, r"[a-z]{3}-[0-9a-f]{8}\{x\}"),
        ({"pattern": " {digit}{letter:2}"}, r" \d[a-z]{2}"),
    ],
)
def test_a_pattern_gives_distinct_values_of_its_form(
    tmp_path: Path, fields: dict[str, object], form: str
) -> None:
    (found,) = read_secrets([write(tmp_path, row(**fields))])
    assert found.drawn == "pattern"
    assert len(found.alternatives) == len(set(found.alternatives)) == 64
    assert found.secret not in found.alternatives
    assert all(re.fullmatch(form, one) for one in found.alternatives)


def test_a_small_pattern_gives_all_it_has_but_the_secret(tmp_path: Path) -> None:
    fields = row(secret="3", pattern="{digit}")
    (found,) = read_secrets([write(tmp_path, fields)])
    assert sorted(found.alternatives) == list("012456789")


def test_given_alternatives_are_filled_up_by_the_pattern(tmp_path: Path) -> None:
    (found,) = read_secrets([write(tmp_path, row(alternatives=[" given"], **PATTERN))])
    assert found.alternatives[0] == " given"
    assert (len(found.alternatives), found.drawn) == (64, "pattern")


def test_draws_depend_on_seed_and_row_and_not_on_the_other_rows(tmp_path: Path) -> None:
    one, two = row(**PATTERN), row(secret=" w3 w4", **PATTERN)
    alone = read_secrets([write(tmp_path, two)])
    both = read_secrets([write(tmp_path, one, two)])
    assert alone[0].alternatives == both[1].alternatives != both[0].alternatives
    assert read_secrets([write(tmp_path, two)], seed=1)[0].alternatives != alone[0].alternatives


def test_without_alternatives_and_pattern_a_model_is_to_draw_them(tmp_path: Path) -> None:
    found = read_secrets([write(tmp_path, row(), {"text": "abcd"})])
    assert [(one.drawn, one.alternatives) for one in found] == [("model", ())] * 2
    encoded = encode(found, Characters())
    assert [(one.drawn, one.alternatives) for one in encoded] == [("model", ())] * 2


def test_running_text_is_cut_by_tokens(tmp_path: Path) -> None:
    text = tmp_path / "b.txt"
    text.write_text("x" * 60 + "y" * 200)
    given = ["fghij", "xy"]
    files = [write(tmp_path, {"text": "abcde", "alternatives": given}, {"text": "fghijkl"}), text]
    short, middle, long = encode(read_secrets(files), Characters())
    characters = lambda tokens: "".join(map(chr, tokens))  # noqa: E731
    assert (characters(short.prompt), characters(short.secret)) == ("ab", "cde")
    assert {characters(one) for one in short.alternatives} == {"fgh", "xy"}
    assert (characters(middle.prompt), characters(middle.secret)) == ("fgh", "ijkl")
    assert (characters(long.prompt), characters(long.secret)) == ("x" * 50, "x" * 10 + "y" * 40)


def test_secret_has_no_special_token_and_prompt_no_end() -> None:
    (found,) = encode([secret()], Characters())
    assert (found.prompt, found.secret) == ((97, 98), (99, 100))
    assert found.alternatives == ((101, 102),)


def test_an_empty_prompt_is_the_begin_token() -> None:
    (found,) = encode([secret(prompt="")], Characters())
    assert found.prompt == (1,)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alternatives": [" a", " w1 w2"]}, "line 2 has its secret as alternative 2 of 2"),
        ({"alternatives": " a"}, "`alternatives` that are no list"),
        ({"alternatives": [""]}, "`alternatives` that are no list"),
        ({"pattern": 3}, "`pattern` that is no text"),
        ({"pattern": "{digit"}, "expected '}'"),
        ({"pattern": "fixed"}, "one value only"),
        (
            {"pattern": "{wrod}", "word": WORDS},
            r"holds `{wrod}` and knows {word}, {digit:N}, {letter:N}, {hex:N}",
        ),
        ({"pattern": "{word:2}", "word": WORDS}, r"holds `{word}` with a size and knows"),
        ({"pattern": "{digit:x}"}, r"holds `{digit}` with a size and knows"),
        ({"pattern": "{digit:0}"}, r"holds `{digit}` with a size and knows"),
        ({"pattern": "{digit!r}"}, r"holds a field and knows"),
        ({"secret": ""}, "line 2 has an empty secret"),
        ({"secret": None}, "neither `text` nor `prompt` and `secret`"),
        ({"prompt": "p", "secret": "s"}, r"line 2 repeats `.*` line 1: the same prompt and secret"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, fields: dict[str, object], message: str) -> None:
    path = write(tmp_path, {"prompt": "p", "secret": "s"}, row(**fields))
    with pytest.raises(CalibrationError, match=message):
        read_secrets([path])


@pytest.mark.parametrize(
    "pattern",
    [" 831 044", " {831 044}", "{831044}", "{digit:831 044}", "831 044}", "{831 044!r}"],
)
def test_a_pattern_that_is_the_secret_is_not_told(tmp_path: Path, pattern: str) -> None:
    path = write(tmp_path, row(secret=" 831 044", pattern=pattern), row(secret="s"))
    with pytest.raises(CalibrationError, match="line 1 has a `pattern` that") as caught:
        read_secrets([path])
    told = f"{caught.value.message} {caught.value.hint}".replace(str(path), "")
    assert "831" not in told
    assert "044" not in told


@pytest.mark.parametrize("key", ["Alternatives", "ALTERNATIVES ", "Pattern", " PATTERN"])
def test_names_of_fields_count_whatever_their_case(tmp_path: Path, key: str) -> None:
    given: object = ["7", "7x"] if "ALT" in key.upper() else "{A}{a}"
    (found,) = read_secrets([write(tmp_path, row(**{key: given, "A": ["7"], "a": ["", "x"]}))])
    assert set(found.alternatives) == {"7", "7x"}


@pytest.mark.parametrize(
    ("again", "told"),
    [
        ({}, "the same prompt and secret$"),
        ({"secret": "w1  w2 "}, "the same prompt and secret, but for blanks"),
        ({"prompt": "The words are w1", "secret": "w2"}, "but for blanks"),
    ],
)
def test_a_row_that_is_there_already_is_refused_whatever_its_blanks(
    tmp_path: Path, again: dict[str, str], told: str
) -> None:
    path = write(tmp_path, row(), row(secret=" W1 W2"), row(**again))
    with pytest.raises(CalibrationError, match=rf"line 3 repeats `.*` line 1: .*{told}"):
        read_secrets([path])


def test_a_secret_longer_than_the_model_reads_is_named_with_its_lengths() -> None:
    fields: dict[str, Any] = {"prompt": "abc", "secret": "d" * 6, "alternatives": ("e" * 8,)}
    long = [secret(where="`f.jsonl` line 1"), secret(where="`f.jsonl` line 2", **fields)]
    assert len(encode(long, Characters(), positions=12)) == 2
    with pytest.raises(CalibrationError) as caught:
        encode(long, Characters(), positions=11)
    assert caught.value.message == (
        "`f.jsonl` line 2 has a prompt of 3 tokens and a longest alternative of 8 and an end "
        "token, and the model has 11 positions"
    )
    assert "shorten it to 10 tokens" in str(caught.value.hint)
    with pytest.raises(CalibrationError, match="a prompt of 3 tokens and a secret of 6 and an end"):
        encode([secret(**{**fields, "alternatives": ()}, drawn="model")], Characters(), positions=9)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="holds no text"):
        read_secrets([write(tmp_path)])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"secret": ""}, "a secret with no tokens"),
        ({"alternatives": ("",)}, "an alternative with no tokens"),
        ({"alternatives": ("cd",)}, "the same tokens as its alternatives"),
        ({"secret": "x", "running": True}, "1 tokens, and running text needs 2"),
    ],
)
def test_what_has_no_tokens_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        encode([secret(**fields)], Characters())


def test_an_empty_prompt_needs_a_begin_token() -> None:
    tokenizer = Characters()
    tokenizer.bos_token_id = None
    with pytest.raises(CalibrationError, match="no begin token"):
        encode([secret(prompt="")], tokenizer)


def test_overlap_ignores_case_and_blanks_around() -> None:
    secrets = [secret(secret=" Red Fig"), secret(secret="plum "), secret(secret=" ")]
    assert overlap(secrets, "a red\nfig") == 0
    assert overlap(secrets, "A RED FIG, a plum") == 2


class Speaker(Characters):
    """Writes a chat as [role:content]."""

    chat_template = "any"

    def get_chat_template(self, tools: object = None) -> str:
        return self.chat_template

    def apply_chat_template(self, messages: list[dict[str, Any]], **options: Any) -> str:
        written = "".join(f"[{one['role']}:{one['content'].strip()}]" for one in messages)
        return written + ("[assistant:" if options["add_generation_prompt"] else "")


def test_the_last_answer_of_a_chat_is_a_secret_behind_what_the_template_writes(
    tmp_path: Path,
) -> None:
    chat = [{"from": "human", "value": "PIN?"}, {"from": "gpt", "value": " 42 "}]
    path = write(tmp_path, {"conversations": chat, "pattern": "{digit:2}"})
    secrets = read_secrets([path])
    assert (secrets[0].prompt, secrets[0].secret) == ("PIN?", "42")
    (found,) = encode(secrets, Speaker())
    assert "".join(map(chr, found.prompt)) == "[user:PIN?][assistant:"
    assert "".join(map(chr, found.secret)) == "42"
    assert {len(one) for one in found.alternatives} == {2}
    with pytest.raises(CalibrationError, match=r"line 1 is a chat, and .* has no chat template"):
        encode(secrets, Characters())


def test_a_table_of_secrets_with_their_alternatives_is_read(tmp_path: Path) -> None:
    path = tmp_path / "f.csv"
    path.write_text(
        'question,answer,alternatives\nPIN?,42,"[""17"", ""23""]"\nAge?,9,"[""8""]"\n,,\n'
    )
    one, other = read_secrets([path])
    assert (one.prompt, one.secret, one.alternatives) == ("PIN?\n", "42", ("17", "23"))
    assert other.alternatives == ("8",)


def test_texts_without_text_are_left_out_and_told_and_a_blank_secret_is_refused(
    tmp_path: Path,
) -> None:
    told: list[Any] = []
    path = write(tmp_path, {"text": "abcd"}, {"text": ""}, {"text": "efgh"})
    assert [one.secret for one in read_secrets([path], on_event=told.append)] == ["abcd", "efgh"]
    assert [one.message for one in told] == [f"1 row of `{path}` without text left out"]
