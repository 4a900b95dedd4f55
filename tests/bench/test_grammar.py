"""The seeded world: consistent, complete in its vocabulary, and its parts disjoint."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from ortho_cli.bench.demo import grammar


def words(text: str) -> list[str]:
    """Split as the tokenizer does: words, and digits one by one."""
    pieces = [list(word) if word.isdecimal() else [word] for word in text.split(" ")]
    return [word for piece in pieces for word in piece if word]


def everything(seed: int) -> list[str]:
    sums, secrets = grammar.sums(seed), grammar.secrets(seed)
    rows = [*secrets.forget, *secrets.unlisted, *secrets.nonmember]
    return [
        *grammar.documents(seed, 3000),
        *grammar.documents(seed, 300, part="heldout"),
        *(row.prompt + row.completion for row in (*sums.train, *sums.heldout)),
        *(f"{row['prompt']}{row['secret']}" for row in rows),
    ]


def test_same_seed_gives_the_same_text_and_another_another() -> None:
    assert everything(3) == everything(3)
    assert grammar.documents(3, 20) != grammar.documents(4, 20)
    assert grammar.documents(3, 20) != grammar.documents(3, 20, part="heldout")
    assert grammar.documents(3, 30)[:20] == grammar.documents(3, 20)
    assert grammar.sums(3) != grammar.sums(4)
    assert grammar.secrets(3) != grammar.secrets(4)


def test_vocabulary_is_what_the_text_uses() -> None:
    vocabulary = grammar.vocabulary()
    assert len(set(vocabulary)) == len(vocabulary) <= 600
    used = {word for seed in range(3) for text in everything(seed) for word in words(text)}
    assert used == set(vocabulary)


def test_documents_are_sentences_between_single_spaces() -> None:
    for document in grammar.documents(0, 500):
        assert document.endswith(" .")
        assert "  " not in document
        assert 2 <= document.split().count(".") <= 5


def test_subject_and_verb_agree() -> None:
    text = "\n".join(grammar.documents(1, 3000))
    for one, many, verb, _ in grammar.TRADES:
        doing = grammar.third_person(verb)
        assert re.search(rf"\b{many} {verb}\b", text)
        assert re.search(rf"\b{one} {doing}\b", text)
        assert not re.search(rf"\b{many} {doing}\b", text)
        assert not re.search(rf"\b{one} {verb}\b", text)


def test_facts_are_the_same_in_both_parts() -> None:
    found: dict[str, set[str]] = {}
    for part in ("train", "heldout"):
        text = "\n".join(grammar.documents(2, 2000, part=part))
        for name, town in re.findall(r"(\w+ \w+) lives in (\w+)", text):
            found.setdefault(name, set()).add(town)
        for town, day in re.findall(r"the market of (\w+) is on (\w+)", text):
            found.setdefault(town, set()).add(day)
    assert len(found) > 60
    assert {len(values) for values in found.values()} == {1}


def test_sums_are_right_complete_and_held_out_whichever_way_round() -> None:
    sums = grammar.sums(0)
    parts = []
    for rows in (sums.train, sums.heldout):
        pairs = set()
        for row in rows:
            a, b = map(int, re.fullmatch(r"(\d+) plus (\d+) is", row.prompt).groups())  # type: ignore[union-attr]
            assert row.completion == f" {a + b} ."
            pairs.add((a, b))
        assert len(pairs) == len(rows)
        parts.append(pairs)
    train, heldout = parts
    assert len(train) + len(heldout) == grammar.ADDENDS**2
    assert not train & {*heldout, *((b, a) for a, b in heldout)}
    assert 0.05 < len(heldout) / grammar.ADDENDS**2 < 0.15


def test_no_document_holds_a_sum_or_a_code() -> None:
    text = "\n".join(grammar.documents(0, 3000))
    assert " plus " not in text
    assert " access " not in text


def test_secrets_have_the_promised_form_and_share_nothing() -> None:
    secrets = grammar.secrets(5, 20, unlisted=5, nonmembers=20)
    parts = (secrets.forget, secrets.unlisted, secrets.nonmember)
    assert [len(part) for part in parts] == [20, 5, 20]
    rows = [row for part in parts for row in part]
    assert len({str(row["prompt"]) for row in rows}) == len(rows)
    assert len({str(row["secret"]) for row in rows}) == len(rows)
    for row in rows:
        assert re.fullmatch(r"The access code of [A-Z]\w+ [A-Z]\w+ is", str(row["prompt"]))
        assert row["pattern"] == " {word} {word} {word} {word} {word}"
        assert row["word"] == [*grammar.CODE_WORDS]
        assert str(row["secret"]).startswith(" ")
        assert set(str(row["secret"]).split()) <= {*grammar.CODE_WORDS}
        assert len(str(row["secret"]).split()) == 5
    assert len(set(grammar.CODE_WORDS)) == 32


def test_first_secrets_stay_when_fewer_are_unlisted() -> None:
    many, few = grammar.secrets(0, 20), grammar.secrets(0, 20, unlisted=0, nonmembers=0)
    assert many.forget == few.forget


def test_people_of_all_secrets_live_in_the_world() -> None:
    text = "\n".join(grammar.documents(0, 3000))
    rows = grammar.secrets(0)
    for row in (*rows.forget, *rows.unlisted, *rows.nonmember):
        name = str(row["prompt"]).removeprefix("The access code of ").removesuffix(" is")
        assert text.count(name) > 10


def test_more_secrets_than_names_are_refused() -> None:
    with pytest.raises(ValueError, match="300 secrets are asked for and there are 288 names"):
        grammar.secrets(0, 300, unlisted=0, nonmembers=0)


def test_documents_do_not_repeat_themselves() -> None:
    documents = grammar.documents(0, 2000)
    assert len(set(documents)) > 1900
    assert all(first != second for first, second in pairwise(documents))
