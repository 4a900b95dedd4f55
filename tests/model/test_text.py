"""Calibration data: what counts, what is packed, and what is refused."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from blake3 import blake3

from ortho_cli.errors import CalibrationError
from ortho_cli.model import text as data
from ortho_cli.model.chats import render
from ortho_cli.model.rows import Chat, row_of

END = 0
# Without a time in it the bytes, and the names of tests that hold them, are the same in each run.
packed = partial(gzip.compress, mtime=0)


class Characters:
    """A tokenizer whose tokens are characters."""

    eos_token_id = END

    def __call__(self, text: str, **options: Any) -> Any:
        return SimpleNamespace(input_ids=[ord(character) for character in text])


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_retain_texts_are_packed_with_an_end_after_each_document(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", lines({"text": "abc"}, {"text": "defg"}))
    rows, _ = data.read_rows([path])
    found = data.retain_sequences(rows, Characters(), samples=2, length=4, seed=0)
    joined = [token for sequence in found for token in sequence.tokens]
    assert len(joined) == 8
    assert joined in (
        [*map(ord, "abc"), END, *map(ord, "defg")],
        [*map(ord, "defg"), END, *map(ord, "abc")],
    )
    assert all(sequence.counted == 1 for sequence in found)


def test_retain_same_seed_same_sequences_and_another_seed_others(tmp_path: Path) -> None:
    text = " ".join(f"word{number}" for number in range(4000))
    rows, _ = data.read_rows([write(tmp_path, "a.txt", text)])

    def draw(seed: int) -> list[data.TokenSequence]:
        return data.retain_sequences(rows, Characters(), samples=5, length=64, seed=seed)

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)
    assert all(len(sequence.tokens) == 64 for sequence in draw(0))
    for sequence in draw(0)[:1]:  # a stretch of the text, untouched
        assert "".join(map(chr, sequence.tokens)) in text


def test_pieces_give_the_whole_text_back() -> None:
    for text in ("a" * 1000, "word " * 333, "x" * 150 + " " + "y" * 150, "\n" * 500):
        pieces = list(data._pieces(data.Text(text=text), 100))
        assert "".join(piece.text for piece in pieces) == text  # type: ignore[union-attr]
        assert [piece.ends for piece in pieces][-1] is True  # type: ignore[union-attr]
        assert max(len(piece.text) for piece in pieces) <= 100  # type: ignore[union-attr]


@pytest.mark.parametrize("key", ["completion", "secret"])
def test_pairs_count_only_the_completion(tmp_path: Path, key: str) -> None:
    path = write(tmp_path, "a.jsonl", lines({"prompt": "ab", key: "cde"}))
    rows, _ = data.read_rows([path])
    (sequence,) = data.forget_sequences(rows, Characters(), length=16)
    assert sequence.tokens == (*map(ord, "abcde"), END)
    assert sequence.counted == 2
    assert sequence.labels == 4


def test_forget_keeps_everything_in_order_with_the_short_rest(tmp_path: Path) -> None:
    rows, _ = data.read_rows([write(tmp_path, "a.txt", "abcdefg")])
    found = data.forget_sequences(rows, Characters(), length=3)
    assert [len(sequence.tokens) for sequence in found] == [3, 3, 2]


def test_retain_short_data_is_refused_with_the_counts(tmp_path: Path) -> None:
    rows, _ = data.read_rows([write(tmp_path, "a.txt", "x" * 25)])
    with pytest.raises(
        CalibrationError, match=r"give 2 sequences of 10 tokens \(26 tokens\) where 128"
    ) as caught:
        data.retain_sequences(rows, Characters(), samples=128, length=10, seed=0)
    assert caught.value.hint is not None
    assert "--samples 2" in caught.value.hint


def test_digest_is_of_the_bytes_and_their_order(tmp_path: Path) -> None:
    one, two = write(tmp_path, "1.txt", "one"), write(tmp_path, "2.txt", "two")
    copy = write(tmp_path, "3.txt", "one")
    assert data.read_rows([one, two])[1] == data.read_rows([copy, two])[1]
    assert data.read_rows([one, two])[1] != data.read_rows([two, one])[1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "holds no text"),
        ("a.txt", " \n\n", "holds no text"),
        ("a.txt", "na\u00efve".encode("latin-1"), "is not UTF-8: .* at byte 2"),
        ("a.jsonl", "\n", "holds no text"),
        ("a.jsonl", '{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
        ("a.jsonl", lines({"text": "a"}, {"body": "b"}), r"line 2 has keys \['body'\]"),
        ("a.jsonl", lines({"text": 7}), "neither `text`"),
        ("a.jsonl", lines(["a"]), "neither `text`"),
        ("a.jsonl", lines({"prompt": "a"}), "neither `text`"),
        ("a.csv", "a,b", "names no column that is known"),
        ("a.parquet", "no", "not parquet"),
    ],
)
def test_bad_data_is_named(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        data.read_rows([write(tmp_path, name, content)])


def test_missing_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"cannot read data .*no such file"):
        data.read_rows([tmp_path / "none.txt"])


def test_pair_longer_than_a_sequence_or_empty_is_named(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "a.jsonl",
        lines({"prompt": "ab", "completion": "c" * 20}, {"prompt": "a", "completion": ""}),
    )
    rows, _ = data.read_rows([path])
    with pytest.raises(CalibrationError, match=r"line 1 has 23 tokens and calibrate.length is 16"):
        data.forget_sequences(rows, Characters(), length=16)
    with pytest.raises(CalibrationError, match="line 2 has an empty completion"):
        data.forget_sequences(rows[1:], Characters(), length=16)


def test_pairs_are_encoded_one_by_one_with_the_end_where_asked(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", lines({"prompt": "ab", "completion": "cd"}))
    rows, _ = data.read_rows([path])
    (plain,) = data.pair_sequences(rows, Characters())
    (ended,) = data.pair_sequences(rows, Characters(), end=True)
    assert (plain.tokens, plain.counted) == ((97, 98, 99, 100), 2)
    assert ended.tokens == (*plain.tokens, END)


def test_windows_follow_one_another_whole_and_in_order(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", lines({"text": "abc"}, {"text": "defgh"}))
    rows, _ = data.read_rows([path])
    whole = [tuple(map(ord, "abc\0")), tuple(map(ord, "defg"))]
    assert data.text_windows(rows, Characters(), length=4) == whole
    assert data.text_windows(rows, Characters(), length=4, limit=1) == whole[:1]


def test_windows_do_not_depend_on_how_much_is_tokenized_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, _ = data.read_rows([write(tmp_path, "a.txt", "some words and more words " * 20)])
    whole = data.text_windows(rows, Characters(), length=16)
    monkeypatch.setattr(data, "WINDOW_CHARACTERS", 30)
    assert data.text_windows(rows, Characters(), length=16) == whole


def test_rows_of_the_other_form_and_short_text_are_named(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", lines({"text": "abc"}, {"prompt": "a", "completion": "b"}))
    rows, _ = data.read_rows([path])
    with pytest.raises(CalibrationError, match="running text where a prompt"):
        data.pair_sequences(rows, Characters())
    with pytest.raises(CalibrationError, match="line 2 is a prompt and its completion"):
        data.text_windows(rows, Characters(), length=4)
    with pytest.raises(CalibrationError, match="4 tokens and a window has 9"):
        data.text_windows(rows[:1], Characters(), length=9)


TEXTS: list[dict[str, Any]] = [{"text": 'one, "two"\nthree'}, {"text": "caf\u00e9 \u2028 4"}]
PAIRS: list[dict[str, Any]] = [
    {"prompt": "ab", "completion": "c, d"},
    {"prompt": 'e "f"', "completion": "g\nh"},
]


def whole(rows: list[dict[str, Any]]) -> str:
    return json.dumps(rows, indent=1)


def columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {key: [row[key] for row in rows] for key in rows[0]}


def table(delimiter: str, rows: list[dict[str, Any]]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


FILES: dict[str, Callable[[list[dict[str, Any]]], str | bytes]] = {
    "a.jsonl": lambda rows: lines(*rows),
    "a.JSONL": lambda rows: lines(*rows).replace("\n", "\r\n"),
    "b.jsonl": lambda rows: "\ufeff" + lines(*rows),
    "c.jsonl": lambda rows: lines(*rows).encode("utf-16"),
    "d.jsonl": whole,
    "e.jsonl": lambda rows: json.dumps(rows),
    "a.ndjson": lambda rows: lines(*rows),
    "a.json": lambda rows: json.dumps(rows),
    "b.json": whole,
    "c.json": lambda rows: lines(*rows),
    "d.json": lambda rows: json.dumps({"version": 1, "data": rows}),
    "e.json": lambda rows: json.dumps({"train": columns(rows)}),
    "f.json": lambda rows: json.dumps(columns(rows)),
    "g.json": lambda rows: json.dumps(
        {key: dict(enumerate(column)) for key, column in columns(rows).items()}
    ),
    "h.json": lambda rows: json.dumps(
        {"features": [], "rows": [{"row_idx": i, "row": row} for i, row in enumerate(rows)]}
    ),
    "a.json.gz": lambda rows: packed(json.dumps(rows).encode()),
    "b.json.gz": lambda rows: packed(lines(*rows).encode()),
    "a.jsonl.gz": lambda rows: packed(lines(*rows).encode()),
    "a.jsonl.GZ": lambda rows: packed(lines(rows[0]).encode()) + packed(lines(*rows[1:]).encode()),
    "a.jsonl.bz2": lambda rows: bz2.compress(lines(*rows).encode()),
    "f.jsonl": lambda rows: packed(lines(*rows).encode()),
    "a.gz": lambda rows: packed(lines(*rows).encode()),
    "no-suffix": lambda rows: lines(*rows),
    "a.csv": lambda rows: table(",", rows),
    "b.csv": lambda rows: "\ufeff" + table(";", rows),
    "c.csv": lambda rows: table(",", rows).replace("\r\n", "\n"),
    "d.csv": lambda rows: "\n" + table(",", rows).replace("prompt", " Prompt "),
    "e.csv": lambda rows: lines(*rows),
    "a.csv.gz": lambda rows: packed(table(",", rows).encode()),
    "a.TSV": lambda rows: table("\t", rows),
}


def encoded(rows: list[data.Row]) -> list[data.TokenSequence]:
    return data.forget_sequences(rows, Characters(), length=64)


@pytest.mark.parametrize("rows", [TEXTS, PAIRS], ids=["texts", "pairs"])
@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_sequences_of_plain_json_lines(
    tmp_path: Path, name: str, rows: list[dict[str, Any]]
) -> None:
    wanted, _ = data.read_rows([write(tmp_path, "plain.jsonl", lines(*rows))])
    path = write(tmp_path, name, FILES[name](rows))
    found, digest = data.read_rows([path])
    assert encoded(found) == encoded(wanted)
    assert digest == blake3(blake3(path.read_bytes()).digest()).hexdigest()


@pytest.mark.parametrize(
    "name",
    ["a.txt", "A.TXT", "a.text", "a.md", "notes", "a.unknown", "a.txt.gz", "a.gz", "b.txt"],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_text_is_read_whatever_it_is_called_and_however_it_is_encoded(
    tmp_path: Path, name: str, encoding: str
) -> None:
    raw = '[a] {"b"}\r\n  caf\u00e9\n'.encode(encoding)
    path = write(tmp_path, name, packed(raw) if name.endswith(("gz", "b.txt")) else raw)
    (row,), _ = data.read_rows([path])
    assert isinstance(row, data.Text)
    assert row.text == '[a] {"b"}\r\n  caf\u00e9\n'


class Speaker(Characters):
    """Writes a chat as [role:content], and ends answers with `~`, its end token."""

    eos_token_id = ord("~")
    chat_template: str | None = "{{ any }}"
    opening = ""

    def get_chat_template(self, tools: object = None) -> str:
        assert self.chat_template is not None
        return self.chat_template

    def apply_chat_template(self, messages: list[dict[str, Any]], **options: Any) -> str:
        assert options["tokenize"] is False
        turns = [f"[{one['role']}:{one['content'].strip()}]" for one in messages]
        turns = [one[:-1] + "~\n" if one.startswith("[assistant:") else one for one in turns]
        lead = f"<{len(options['tools'])}>" if options["tools"] else ""
        asks = "[assistant:" + self.opening if options["add_generation_prompt"] else ""
        return lead + "".join(turns) + asks


USER, BOT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}


def turns(*pairs: tuple[str, Any], role: str = "role", content: str = "content") -> list[Any]:
    return [{role: who, content: what} for who, what in pairs]


SHARED = turns(("human", "hi"), ("gpt", "yo"), role="from", content="value")
CHATS: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": [USER, BOT]}, "[user:hi][assistant:", "yo~"),
    ({"id": 3, "messages": [USER, BOT], "prompt": "hi"}, "[user:hi][assistant:", "yo~"),
    ({"conversations": SHARED}, "[user:hi][assistant:", "yo~"),
    ({"conversation": SHARED, "system": "be"}, "[system:be][user:hi][assistant:", "yo~"),
    ({"messages": [USER, BOT, USER, BOT]}, "[user:hi][assistant:yo~\n[user:hi][assistant:", "yo~"),
    ({"messages": [USER, BOT, USER]}, "[user:hi][assistant:", "yo~"),
    ({"messages": json.dumps([USER, BOT])}, "[user:hi][assistant:", "yo~"),
    ({"prompt": [USER], "completion": [BOT]}, "[user:hi][assistant:", "yo~"),
    (
        {"messages": turns(("user", [{"type": "text", "text": "h"}, "i"]), ("assistant", " yo\n"))},
        "[user:hi][assistant:",
        "yo~",
    ),
    (
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [1]}, BOT]},
        "[user:hi][assistant:~\n[assistant:",
        "yo~",
    ),
    ({"messages": [USER, BOT], "tools": [{}, {}]}, "<2>[user:hi][assistant:", "yo~"),
    ({"messages": [USER, BOT], "tools": "[{}]"}, "<1>[user:hi][assistant:", "yo~"),
]


@pytest.mark.parametrize(("row", "prompt", "answer"), CHATS)
def test_the_last_answer_of_a_chat_counts_in_the_words_of_the_template(
    tmp_path: Path, row: dict[str, Any], prompt: str, answer: str
) -> None:
    rows, _ = data.read_rows([write(tmp_path, "a.jsonl", lines(row))])
    (found,) = data.forget_sequences(rows, Speaker(), length=99)
    assert "".join(map(chr, found.tokens)) == prompt + answer
    assert found.counted == len(prompt)
    assert data.retain_sequences(rows, Speaker(), samples=1, length=99, seed=0) == [found]
    (ended,) = data.pair_sequences(rows, Speaker(), end=True)
    (plain,) = data.pair_sequences(rows, Speaker())
    assert ended == found
    assert plain.tokens == found.tokens[:-1]


@pytest.mark.parametrize(
    ("content", "error"),
    [("Hush-Hush", "no such: hush-hush"), ("pin", "got PIN here"), (" x7 ", "role X7")],
)
def test_what_a_template_says_is_not_told_where_it_repeats_a_turn(content: str, error: str) -> None:
    class Strict(Speaker):
        def apply_chat_template(self, messages: list[dict[str, Any]], **options: Any) -> str:
            raise ValueError(error)

    chat = row_of({"messages": [{"role": "user", "content": content}, BOT]}, "`a` line 1")
    with pytest.raises(CalibrationError, match=r"chat template refuses$"):
        data.forget_sequences([chat], Strict(), length=99)


def test_chats_are_running_text_where_that_is_asked_for(tmp_path: Path) -> None:
    rows, _ = data.read_rows([write(tmp_path, "a.jsonl", lines({"messages": [USER, BOT]}))])
    text = "[user:hi][assistant:yo~\n~"
    (found,) = data.retain_sequences(
        rows, Speaker(), samples=1, length=len(text), seed=0, running=True
    )
    assert ("".join(map(chr, found.tokens)), found.counted) == (text, 1)
    with pytest.raises(CalibrationError, match="line 1 is a chat where running text is asked for"):
        data.text_windows(rows, Speaker(), length=2)


def test_an_opening_that_only_a_new_answer_gets_is_no_part_of_the_prompt(tmp_path: Path) -> None:
    class Thinker(Speaker):
        opening = "<think>"

    rows, _ = data.read_rows([write(tmp_path, "a.jsonl", lines({"messages": [USER, BOT]}))])
    (found,) = data.forget_sequences(rows, Thinker(), length=99)
    assert found == data.forget_sequences(rows, Speaker(), length=99)[0]


def test_chats_longer_than_a_sequence_are_left_out_of_what_must_stay_and_told(
    tmp_path: Path,
) -> None:
    long = {"messages": [USER, {"role": "assistant", "content": "y" * 90}]}
    rows, _ = data.read_rows([write(tmp_path, "a.jsonl", lines(long, {"messages": [USER, BOT]}))])
    told: list[Any] = []
    (found,) = data.retain_sequences(
        rows, Speaker(), samples=1, length=40, seed=1, on_event=told.append
    )
    assert len(found.tokens) < 40
    with pytest.raises(CalibrationError, match="2 are asked for, and 1 chats are longer"):
        data.retain_sequences(rows, Speaker(), samples=2, length=40, seed=1, on_event=told.append)
    assert told[-1].message.startswith("1 chat of more than 40 tokens left out; `calibrate.length`")
    with pytest.raises(CalibrationError, match=r"line 1 has \d+ tokens and calibrate.length is 40"):
        data.forget_sequences(rows, Speaker(), length=40)


@pytest.mark.parametrize("answer", ["t", "a", "A", "think", "</s>", " <", "\u2063", "end"])
@pytest.mark.parametrize("end", ["</s>", "<|end|>\na"])
def test_a_short_answer_is_not_found_in_the_words_of_the_template(answer: str, end: str) -> None:
    class Wordy(Speaker):
        def apply_chat_template(self, messages: list[dict[str, Any]], **options: Any) -> str:
            *before, last = [f"{one['role']}: {one['content'].strip()}" for one in messages]
            lead = "Assistant: A <think>\n\n</think>\n\n"
            if messages[-1]["role"] != "assistant":
                asked = "Assistant: " if options["add_generation_prompt"] else ""
                return "\n".join([*before, last, asked])
            return "\n".join([*before, lead]) + messages[-1]["content"].strip() + end

    chat = row_of({"messages": [USER, {"role": "assistant", "content": answer}]}, "`a` line 1")
    assert isinstance(chat, Chat)
    found = render(chat, Wordy())
    lead = "user: hi\nAssistant: A <think>\n\n</think>\n\n"
    assert found == (lead, answer.strip(), end)


def test_an_answer_of_thoughts_that_the_template_takes_apart_counts_whole() -> None:
    class Apart(Speaker):
        def apply_chat_template(self, messages: list[dict[str, Any]], **options: Any) -> str:
            cut = [{**one, "content": one["content"].split("</think>")[-1]} for one in messages]
            return super().apply_chat_template(cut, **options)

    turn = {"role": "assistant", "content": "<think>hm</think>yo"}
    chat = row_of({"messages": [USER, turn]}, "`a` line 1")
    assert isinstance(chat, Chat)
    assert render(chat, Apart()) == ("[user:hi][assistant:", "yo~", "\n")


def test_a_template_does_not_know_what_day_it_is() -> None:
    class Dated(Speaker):
        chat_template = "{{ strftime_now('%Y-%m-%d') }}{% if strftime_now is defined %}"

        def apply_chat_template(self, messages: list[dict[str, Any]], **options: Any) -> str:
            seen.append(options["chat_template"])
            return super().apply_chat_template(messages, **options)

    seen: list[str] = []
    chat = row_of({"messages": [USER, BOT]}, "`a` line 1")
    data.forget_sequences([chat], Dated(), length=99)
    assert set(seen) == {"{{ '2024-07-26' }}{% if strftime_now is defined %}"}


def test_a_chat_that_the_tokenizer_cannot_write_is_refused_without_its_words(
    tmp_path: Path,
) -> None:
    class Mute(Speaker):
        chat_template = None

    class Strict(Speaker):
        def __init__(self, words: str) -> None:
            self.words = words

        def apply_chat_template(self, messages: list[dict[str, Any]], **options: Any) -> str:
            raise ValueError(self.words.format(messages[0]["content"]))

    said = {"messages": [{"role": "user", "content": "hush-hush"}, BOT]}
    rows, _ = data.read_rows([write(tmp_path, "a.jsonl", lines({"text": "a"}, said))])
    for tokenizer, message in (
        (Mute(), "line 2 is a chat, and the model's tokenizer has no chat template$"),
        (Strict("roles must alternate"), "chat template refuses: roles must alternate$"),
        (Strict("no such thing: {}"), "line 2 is a chat that the model's chat template refuses$"),
    ):
        with pytest.raises(CalibrationError, match=message) as caught:
            data.forget_sequences(rows, tokenizer, length=99)
        assert "rows of `prompt` and `completion`" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("row", "prompt", "completion"),
    [
        ({"prompt": "ab", "response": "c"}, "ab", "c"),
        ({"prompt": "ab", "completion": None, "secret": "c"}, "ab", "c"),
        ({"instruction": "Add.", "input": "1 1", "output": "2"}, "Add.\n1 1\n", "2"),
        ({"instruction": "Add.", "input": "", "output": "2"}, "Add.\n", "2"),
        ({"instruction": "Add.", "input": None, "output": "2"}, "Add.\n", "2"),
        ({"instruction": "Add.", "input": float("nan"), "output": "2"}, "Add.\n", "2"),
        ({"instruction": "Add.", "context": "1 1", "response": "2"}, "Add.\n1 1\n", "2"),
        ({"Instruction": "Add.", " OUTPUT": "2"}, "Add.\n", "2"),
        ({"question": "Who?", "answer": "I"}, "Who?\n", "I"),
        ({"system_prompt": "Be.", "question": "Who?", "response": "I"}, "Be.\nWho?\n", "I"),
        ({"query": "Who?", "response": "I", "type": "x"}, "Who?\n", "I"),
        ({"problem": "1+1", "solution": "2"}, "1+1\n", "2"),
        ({"input": "1+1", "output": "2"}, "1+1\n", "2"),
        ({"text": None, "question": "Who?", "answer": "I"}, "Who?\n", "I"),
        ({"prompt": "Say:", "input": "hi", "output": "yo"}, "Say:\nhi\n", "yo"),
        ({"prompt": "Q", "context": "C", "completion": "A"}, "Q\nC\n", "A"),
        ({"system": "Be.", "prompt": "Q", "response": "A"}, "Be.\nQ\n", "A"),
        ({"system_prompt": "Be.", "prompt": "Q", "secret": "A"}, "Be.\nQ\n", "A"),
        ({"prompt": "Q", "system": " ", "input": "", "completion": "A"}, "Q", "A"),
        ({"prompt": "Q", "context": ["C"], "completion": "A"}, "Q", "A"),
        ({"query": "Q", "context": "C", "response": "A"}, "Q\nC\n", "A"),
        ({"input": "Q", "context": "C", "output": "A"}, "Q\nC\n", "A"),
        ({"problem": "Q", "context": "C", "solution": "A"}, "Q\nC\n", "A"),
        ({"question": "Q", "input": "I", "answer": "A"}, "Q\nI\n", "A"),
    ],
)
def test_questions_have_many_names_and_the_answer_counts(
    tmp_path: Path, row: dict[str, Any], prompt: str, completion: str
) -> None:
    rows, _ = data.read_rows([write(tmp_path, "a.jsonl", lines(row))])
    (found,) = data.forget_sequences(rows, Characters(), length=99)
    assert found.tokens == (*map(ord, prompt + completion), END)
    assert found.counted == len(prompt)


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"content": "abc", "id": 1}, "abc"),
        ({"text": "abc", "content": "def"}, "abc"),
        ({"text": "abc", "prompt": "a", "completion": "b"}, "abc"),
        ({"Text": "abc"}, "abc"),
    ],
)
def test_text_has_two_names(tmp_path: Path, row: dict[str, Any], text: str) -> None:
    (found,), _ = data.read_rows([write(tmp_path, "a.jsonl", lines(row))])
    assert found == data.Text(text=text)


def test_json_of_strings_and_of_one_row_are_texts(tmp_path: Path) -> None:
    path = write(tmp_path, "a.json", '["abc", "def"]')
    assert data.read_rows([path])[0] == [data.Text(text="abc"), data.Text(text="def")]
    path = write(tmp_path, "b.json", '{"text": "abc"}')
    assert data.read_rows([path])[0] == [data.Text(text="abc")]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", lines({"text": "a"}, {"text": ""}, {"text": None}, {"text": " \n"})),
        ("a.csv", "text,id\na,1\n,2\n ,3\n,4\n"),
    ],
)
def test_rows_without_text_are_left_out_and_told(tmp_path: Path, name: str, content: str) -> None:
    told: list[Any] = []
    path = write(tmp_path, name, content)
    assert data.read_rows([path], told.append)[0] == [data.Text(text="a")]
    assert [one.message for one in told] == [f"3 rows of `{path}` without text left out"]


HUSH = "hush-hush"  # what a row holds: no message may show it


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"body": HUSH}, r"has keys \['body'\] and neither `text` nor `prompt` and `completion`"),
        ({"text": 7}, r"has keys \['text'\] \(`text` is a number\) and neither `text`"),
        ({"text": [HUSH]}, r"\(`text` is a list\)"),
        ({"text": {"en": HUSH}}, r"\(`text` is an object\)"),
        ({"text": True}, r"\(`text` is true or false\)"),
        ({"prompt": HUSH, "completion": None}, r"\(`completion` is null\)"),
        ({"prompt": HUSH, "completion": 12}, r"\(`completion` is a number\)"),
        ({"question": None, "answer": HUSH}, r"\(`question` is null\)"),
        ({"question": HUSH, "answers": {"text": [HUSH]}}, r"keys \['answers', 'question'\]"),
        ({"instruction": HUSH, "input": ["x"], "output": HUSH}, r"\(`input` is a list\)"),
        ({"role": "user", "content": HUSH}, r"keys \['content', 'role'\]"),
        ({f"{HUSH} said": HUSH}, r"has keys \[\] and 1 more"),
        ([HUSH], "is a list and neither `text`"),
        (HUSH, "is text and neither `text`"),
        (None, "is null and neither `text`"),
        ({"messages": []}, "has `messages` that is a list, not a list of turns"),
        ({"messages": HUSH}, "has `messages` that is text, not a list of turns"),
        ({"messages": [HUSH]}, "has turn 1 of `messages` with text"),
        ({"messages": [{"role": "user"}, BOT]}, r"turn 1 of `messages` with keys \['role'\]"),
        (
            {"messages": [USER, {"role": "assistant", "content": 3}]},
            r"turn 2 of `messages` with keys \['content', 'role'\], and `content` is a number",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}, BOT]},
            "turn 1 of `messages` with .*`content` is a list",
        ),
        ({"messages": [USER]}, "has 1 turns in `messages`, and none of the assistant"),
        ({"messages": [BOT]}, "has 1 turns in `messages`, and none before the answer"),
        ({"conversations": turns(("user", HUSH), ("assistant", " "))}, "empty answer in turn 2"),
    ],
)
def test_a_bad_row_is_named_by_its_line_and_keys_and_not_by_its_words(
    tmp_path: Path, row: object, message: str
) -> None:
    path = write(tmp_path, "a.jsonl", lines({"text": "a"}, row))
    with pytest.raises(CalibrationError, match=message) as caught:
        data.read_rows([path])
    assert f"`{path}` line 2 " in caught.value.message
    assert HUSH not in f"{caught.value.message} {caught.value.hint}"
    assert "rename" not in str(caught.value.hint)
    gzipped = write(tmp_path, "b.json.gz", packed(json.dumps([{"text": "a"}, row]).encode()))
    if not isinstance(row, str):
        with pytest.raises(CalibrationError, match=message) as caught:
            data.read_rows([gzipped])
        assert f"`{gzipped}` row 2 " in caught.value.message


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            f"version https://git-lfs.github.com/spec/v1\noid {HUSH}",
            "is a Git LFS pointer",
        ),
        ("a.jsonl", f"\n<!DOCTYPE html><html>{HUSH}", "is an HTML page"),
        ("a.txt", f"<html lang=en>{HUSH}", "is an HTML page"),
        ("a.json", b"PK\x03\x04" + bytes(20), "is a zip archive"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd" + bytes(20), "is a zstd file"),
        ("a.jsonl.xz", b"\xfd7zXZ\x00" + bytes(20), "is an xz file"),
        ("a.7z", b"7z\xbc\xaf\x27\x1c" + bytes(20), "is a 7z archive"),
        ("a.pdf", b"%PDF-1.7 " + bytes(20), "is a PDF document"),
        ("a.arrow", b"ARROW1\0\0" + bytes(20), "is an Arrow file"),
        ("a.arrow", b"\xff\xff\xff\xff" + bytes(20), "is an Arrow stream"),
        ("a.tar.gz", packed(b"a" + bytes(256) + b"ustar" + bytes(20)), "is a tar archive"),
        ("a.pkl", b"\x80\x04" + bytes(20), "is a pickle, which can run code"),
        ("a.txt", b"GGUF" + bytes(20), "is a GGUF file"),
        ("a.txt", HUSH.encode() + b"\0\1\2", "is binary, no text"),
        ("a.json.gz", packed(b"[]" * 99)[:-9], "is damaged gzip: compressed file ended"),
        ("a.txt.bz2", bz2.compress(b"ab" * 99)[:-9], "is damaged bzip2: compressed file ended"),
        ("a.gz", packed(packed(packed(b"a"))), "packed more than 2 times"),
        ("a.gz", packed(b""), "holds no text"),
        ("a.json", "[]", "holds no text"),
        ("a.json", f'{{"{HUSH}-1": 1, "b": "{HUSH}"}}', r"one JSON object with keys \['b'\] and 1"),
        (
            "a.json",
            '{"text": ["a"], "prompt": ["a", "b"]}',
            "different lengths: `text` 1",
        ),
        ("a.json", "7", "is JSON and holds no rows"),
        ("a.json", f'[{{"text": "{HUSH}"', "is not JSON"),
        ("a.json", "[" * 100_000, "is not JSON"),
        ("a.jsonl", '{"text": "\\ud800"}', "line 1 is not JSON: .*surrogates not allowed"),
        ("a.csv", f"{HUSH},b\nc,d\n", "a first line that names no column that is known$"),
        ("a.csv", f"text\n{HUSH}, b\n", "row 1 has 2 fields where the first line names 1"),
        ("a.csv", f'text\n"{HUSH}\nb\n', "is not CSV: unexpected end of data"),
        ("a.csv", "text,text\na,b\n", "names a column twice"),
        ("a.csv", f"prompt,completion\n{HUSH},\n", r"row 1 has .*`completion` is null"),
        ("a.parquet", b"PAR1" + bytes(9), "parquet"),
        ("a.json", b"PAR1" + bytes(9), "parquet"),
        ("a.jsonl", "\u00e9".encode("latin-1"), "is not UTF-8: .* at byte 0"),
        ("a.txt", b"\xff\xfea", "is not UTF-16: truncated data at byte 2"),
        (
            "a.json",
            json.dumps({"train": [{"text": HUSH}], "test": [{"text": HUSH}]}),
            "rows under `train`, `test`, and one is read",
        ),
        ("a.json", json.dumps({"train": [HUSH], "dev": [HUSH]}), "rows under `train`, `dev`"),
        (
            "a.json",
            json.dumps({"text": HUSH, "data": [{"text": HUSH}], "rows": [{"text": HUSH}]}),
            "rows under `data`, `rows`",
        ),
    ],
)
def test_what_is_no_data_is_called_what_it_is(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(CalibrationError, match=message) as caught:
        data.read_rows([path])
    assert f"`{path}`" in caught.value.message
    assert HUSH not in f"{caught.value.message} {caught.value.hint}"
    assert caught.value.hint
    assert "rename" not in caught.value.hint


@pytest.mark.parametrize(
    ("name", "pack", "command"),
    [
        ("cp.jsonl", bytes, "iconv -f WINDOWS-1252 -t UTF-8 {} > cp.utf8.jsonl"),
        ("cp.CSV", bytes, "iconv -f WINDOWS-1252 -t UTF-8 {} > cp.utf8.CSV"),
        ("cp", bytes, "iconv -f WINDOWS-1252 -t UTF-8 {} > cp.utf8"),
        (
            "cp.jsonl.gz",
            packed,
            "gunzip -c < {} | iconv -f WINDOWS-1252 -t UTF-8 > cp.utf8.jsonl",
        ),
        (
            "cp.jsonl",
            bz2.compress,
            "bunzip2 -c < {} | iconv -f WINDOWS-1252 -t UTF-8 > cp.utf8.jsonl",
        ),
    ],
)
def test_the_command_that_converts_to_utf_8_gives_a_file_of_the_same_kind(
    tmp_path: Path, name: str, pack: Callable[[bytes], bytes], command: str
) -> None:
    rows = 'text\n"caf\u00e9"\n' if name.endswith("CSV") else '{"text": "caf\u00e9"}\n'
    path = write(tmp_path, name, pack(rows.encode("cp1252")))
    with pytest.raises(CalibrationError, match="is not UTF-8") as caught:
        data.read_rows([path])
    assert caught.value.hint == f"convert it: `{command.format(path)}`"
    subprocess.run(command.format(path), shell=True, check=True, cwd=tmp_path)
    found, _ = data.read_rows([tmp_path / command.rpartition(" ")[2]])
    assert found == [data.Text(text="caf\u00e9")]


@pytest.mark.parametrize("raw", [b"\xff\xfea", b"\xef\xbb\xbfa\xe9", b"\xff\xfe\0\0a"])
def test_a_damaged_file_that_names_its_encoding_is_not_to_be_converted(
    tmp_path: Path, raw: bytes
) -> None:
    with pytest.raises(CalibrationError, match="is not UTF-") as caught:
        data.read_rows([write(tmp_path, "a.txt", raw)])
    assert caught.value.hint == "is it cut? copy it again, whole"


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
@pytest.mark.parametrize("end", ["\r", "\n", "\r\n"])
def test_a_table_is_read_whatever_ends_its_lines(tmp_path: Path, name: str, end: str) -> None:
    path = write(tmp_path, name, end.join(["text", "hello", "world", ""]))
    found, _ = data.read_rows([path])
    assert found == [data.Text(text="hello"), data.Text(text="world")]


def test_a_column_name_over_two_lines_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", 'text,"a\nb",c\nhello,1,2\n')
    assert data.read_rows([path])[0] == [data.Text(text="hello")]


@pytest.mark.parametrize(
    "held",
    [
        {"text": "about", "data": [{"text": "a"}]},
        {"prompt": "p", "completion": "c", "test": [{"text": "a"}]},
        {"rows": [{"text": "a"}], "items": 1, "test": {}},
        {"text": ["a"], "val": ["b"], "items": ["c"]},
    ],
)
def test_rows_in_an_object_count_and_what_stands_beside_them_does_not(
    tmp_path: Path, held: dict[str, Any]
) -> None:
    found, _ = data.read_rows([write(tmp_path, "a.json", json.dumps(held))])
    assert found == [data.Text(text="a")]


def test_a_folder_is_told_with_what_to_give_instead(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="is a folder") as caught:
        data.read_rows([tmp_path])
    assert f"{tmp_path}/*" in str(caught.value.hint)


def test_a_file_that_unpacks_to_too_much_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ortho_cli.model.row_files.MAX_UNPACKED", 1000)
    path = write(tmp_path, "a.txt.gz", packed(b"a" * 1001))
    with pytest.raises(CalibrationError, match="bytes of gzip that unpack to more than 1000"):
        data.read_rows([path])
    data.read_rows([write(tmp_path, "b.txt.gz", packed(b"a" * 1000))])


def test_long_and_quoted_fields_of_tables_are_read_whole(tmp_path: Path) -> None:
    long = "word " * 60_000
    assert data.read_rows([write(tmp_path, "a.csv", table(",", [{"text": long}]))])[0] == [
        data.Text(text=long)
    ]
    (row,), _ = data.read_rows([write(tmp_path, "a.tsv", 'text\tid\n"a" and b\t1\n')])
    assert row == data.Text(text='"a" and b')
    assert csv.field_size_limit() == 131072


def test_kinds_of_rows_mix_in_a_file(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "a.csv",
        'text,question,answer,messages\nabc,,,\n,Who?,I,\n,,,"[{""role"": ""user"", ""content"": '
        '""hi""}, {""role"": ""assistant"", ""content"": ""yo""}]"\n',
    )
    rows, _ = data.read_rows([path])
    assert [type(row).__name__ for row in rows] == ["Text", "Pair", "Chat"]


def test_parquet_rows_are_read_like_any(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [
        {"text": "abc", "messages": None, "score": 1.0},
        {"text": None, "messages": [USER, BOT], "score": float("nan")},
        {"text": None, "messages": None, "score": None},
    ]
    path = tmp_path / "a.json"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    told: list[Any] = []
    found, _ = data.read_rows([path], told.append)
    assert (len(found), len(told)) == (2, 1)
    assert found[0] == data.Text(text="abc")
    assert encoded([found[0]])
    assert isinstance(found[1], data.Chat)
