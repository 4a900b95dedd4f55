"""Calibration data: what counts, what is packed, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ortho_cli import data
from ortho_cli.errors import CalibrationError

END = 0


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
    assert "calibrate.samples=2" in caught.value.hint


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
        ("a.csv", "a,b", "`.csv` file, none of"),
        ("a.parquet", "no", "pyarrow|not parquet"),
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
