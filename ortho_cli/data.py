"""Calibration data: files of text become sequences of tokens, the same ones for the same seed."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

from blake3 import blake3

from ortho_cli.errors import CalibrationError, unreadable
from ortho_cli.files import read_regular

CHARACTERS_PER_TOKEN = 5  # a long text is cut into pieces that hold a sequence and a bit
WINDOW_CHARACTERS = 1 << 16  # of running text, tokenized at once
COMPLETIONS = ("completion", "secret")  # the field's two words for what follows a prompt
SUFFIXES = (".txt", ".jsonl", ".parquet")


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """Running text; every token counts. `ends` where the document does."""

    text: str
    ends: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A prompt and what follows it; only the completion's tokens count."""

    prompt: str
    completion: str
    where: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSequence:
    """Tokens of one forward pass; those from `counted` on are predicted and count."""

    tokens: tuple[int, ...]
    counted: int = 1

    @property
    def labels(self) -> int:
        """Tokens that count."""
        return len(self.tokens) - self.counted


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    eos_token_id: int | None

    def __call__(self, text: str, **options: Any) -> Any:
        """Encode."""


Row = Text | Pair


def read_rows(files: Iterable[Path]) -> tuple[list[Row], str]:
    """Read .txt, .jsonl (`text`, or `prompt` and `completion`) and .parquet files, whole.

    Returns:
        The rows in file order, and BLAKE3 over the files' digests.
    Raises:
        CalibrationError: a file is missing, empty, not UTF-8, or a row has neither form.
    """
    rows: list[Row] = []
    digest = blake3()
    for path in files:
        values, one = read_values(path)
        digest.update(one)
        rows += [_row(value, where) for value, where in values]
    return rows, digest.hexdigest()


def stamps(files: Iterable[Path]) -> list[list[Any]]:
    """Tell files from others by name, size in bytes and time: a digest gives short secrets away."""
    told = [(path.name, path.stat()) for path in files]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in told]


def read_values(path: Path) -> tuple[Iterator[tuple[Any, str]], bytes]:
    """Read one file row by row, whatever its rows hold; a .txt is one row with a `text`.

    Returns:
        Each row with the words that name its place, parsed when it is taken; and the file's BLAKE3.
    Raises:
        CalibrationError: the file is missing, empty, not UTF-8 or not of a known kind; while rows
            are taken, one is not JSON.
    """
    try:
        raw = read_regular(path)
    except OSError as error:
        hint = "give .txt, .jsonl or .parquet files"
        raise unreadable(path, error, hint=hint, kind=CalibrationError, what="data ") from None
    values = _values_of(path, raw)
    first = next(values, None)
    if first is None:
        raise CalibrationError(f"data `{path}` holds no text", hint="is it the right file?")
    return chain([first], values), blake3(raw).digest()


def _values_of(path: Path, raw: bytes) -> Iterator[tuple[Any, str]]:
    if path.suffix == ".parquet":
        yield from _parquet_values(path)
    elif path.suffix == ".jsonl":
        # Not splitlines: U+2028 and the like are text, in JSON, too.
        for number, line in enumerate(_decode(path, raw).split("\n"), 1):
            if line.strip():
                where = f"`{path}` line {number}"
                yield _parse(line, where), where
    elif path.suffix == ".txt":
        text = _decode(path, raw)
        if text.strip():
            yield {"text": text}, f"`{path}`"
    else:
        raise CalibrationError(
            f"data `{path}` is a `{path.suffix or 'plain'}` file, none of {', '.join(SUFFIXES)}",
            hint="rename a text file to .txt",
        )


def _decode(path: Path, raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"data `{path}` is not UTF-8: {error.reason} at byte {error.start}",
            hint=f"convert it: iconv -f ENCODING -t UTF-8 {path.name}",
        ) from None


def _parse(line: str, where: str) -> Any:
    try:
        found = json.loads(line)
        if "\\u" in line:
            json.dumps(found, ensure_ascii=False).encode()  # no tokenizer takes a lone surrogate
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{where} is not JSON: {error}", hint="one object a line") from None
    return found


def _row(value: Any, where: str) -> Row:
    fields = value if isinstance(value, dict) else {}
    completion = next((key for key in COMPLETIONS if key in fields), "completion")
    if isinstance(fields.get("text"), str):
        return Text(text=fields["text"])
    if isinstance(fields.get("prompt"), str) and isinstance(fields.get(completion), str):
        return Pair(prompt=fields["prompt"], completion=fields[completion], where=where)
    raise CalibrationError(
        f"{where} has keys {sorted(fields)} and neither `text` nor `prompt` and `completion`",
        hint="each row is text, or a prompt and its completion",
    )


def _parquet_values(path: Path) -> Iterator[tuple[Any, str]]:
    try:
        from pyarrow import parquet  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise CalibrationError(
            f"data `{path}` needs pyarrow, which is not installed", hint="pip install pyarrow"
        ) from None
    try:
        table = parquet.read_table(path)
    except (OSError, ValueError) as error:
        raise CalibrationError(
            f"data `{path}` is not parquet: {error}", hint="is it cut?"
        ) from None
    for number, row in enumerate(table.to_pylist(), 1):
        yield row, f"`{path}` row {number}"


def retain_sequences(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    *,
    samples: int,
    length: int,
    seed: int,
    asked: str = "calibrate",
    multiple: int = 1,
) -> list[TokenSequence]:
    """Draw `samples` sequences: texts packed to exactly `length` tokens, pairs one by one.

    Texts are cut into pieces of about a sequence, shuffled by the seed and joined, with the end
    token where a document ends, until enough are there: nothing else is tokenized.

    `samples` is a multiple of `multiple`, and so is the number that an error proposes.

    Raises:
        CalibrationError: the data give fewer, or a pair is longer than `length`.
    """
    pieces = [piece for row in rows for piece in _pieces(row, length * CHARACTERS_PER_TOKEN)]
    random.Random(seed).shuffle(pieces)
    found: list[TokenSequence] = []
    stream: list[int] = []
    tokens = 0
    for piece in pieces:
        if len(found) >= samples:
            break
        if isinstance(piece, Pair):
            found.append(_encode_pair(piece, tokenizer, length))
            continue
        stream += _encode(piece, tokenizer)
        while len(stream) >= length and len(found) < samples:
            found.append(TokenSequence(tokens=tuple(stream[:length])))
            del stream[:length]
    if len(found) < samples:
        tokens = sum(len(sequence.tokens) for sequence in found) + len(stream)
        enough = len(found) // multiple * multiple
        raise CalibrationError(
            f"the data give {len(found)} sequences of {length} tokens ({tokens} tokens) where "
            f"{samples} are asked for",
            hint=f"give more data, or --set {asked}.samples={enough}"
            if enough
            else f"give more data, or a smaller {asked}.length",
        )
    return found


def forget_sequences(
    rows: Sequence[Row], tokenizer: Tokenizer, *, length: int
) -> list[TokenSequence]:
    """Take all of the forget set, in order: pairs one by one, texts packed, the rest as it is.

    Raises:
        CalibrationError: nothing counts, or a pair is longer than `length`.
    """
    found: list[TokenSequence] = []
    stream: list[int] = []
    for row in rows:
        if isinstance(row, Pair):
            found.append(_encode_pair(row, tokenizer, length))
        else:
            stream += _encode(row, tokenizer)
    cuts = range(0, len(stream), length)
    packed = [TokenSequence(tokens=tuple(stream[start : start + length])) for start in cuts]
    found += [sequence for sequence in packed if len(sequence.tokens) > 1]
    if not found:
        raise CalibrationError(
            f"the forget set gives {len(stream)} tokens and nothing to predict",
            hint="give text, or a prompt and its completion",
        )
    return found


def pair_sequences(
    rows: Sequence[Row], tokenizer: Tokenizer, *, end: bool = False
) -> list[TokenSequence]:
    """Encode prompts and completions one by one, as a skill is asked for.

    Args:
        rows: pairs only.
        tokenizer: of the model that answers.
        end: the end token counts, too: a longer answer is then a wrong one.
    Raises:
        CalibrationError: a row is running text, or a completion has no tokens.
    """
    found: list[TokenSequence] = []
    for row in rows:
        if isinstance(row, Text):
            raise CalibrationError(
                "a row is running text where a prompt and its completion are asked for",
                hint='each row is {"prompt": "...", "completion": "..."}',
            )
        pair = _encode_pair(row, tokenizer, None)
        ended = tokenizer.eos_token_id is not None and not end
        tokens = pair.tokens[:-1] if ended else pair.tokens
        found.append(TokenSequence(tokens=tokens, counted=pair.counted))
    return found


def text_windows(
    rows: Sequence[Row], tokenizer: Tokenizer, *, length: int, limit: int | None = None
) -> list[tuple[int, ...]]:
    """Cut running text into whole windows of `length` tokens, in order, the first `limit` if given.

    Documents follow one another with the end token between; what is left over is not measured.

    Raises:
        CalibrationError: a row is a pair, or the text is shorter than one window.
    """
    found: list[tuple[int, ...]] = []
    stream: list[int] = []
    fresh = True
    for piece in (piece for row in rows for piece in _pieces(row, WINDOW_CHARACTERS)):
        if isinstance(piece, Pair):
            raise CalibrationError(
                f"{piece.where} is a prompt and its completion where running text is asked for",
                hint="give .txt files, or rows with `text`",
            )
        encode = encode_prompt if fresh else encode_completion  # one begin token a document
        stream += encode(piece.text, tokenizer)
        if piece.ends and tokenizer.eos_token_id is not None:
            stream.append(tokenizer.eos_token_id)
        fresh = piece.ends
        while len(stream) >= length and (limit is None or len(found) < limit):
            found.append(tuple(stream[:length]))
            del stream[:length]
        if len(found) == limit:
            return found
    if not found:
        raise CalibrationError(
            f"the text has {len(stream)} tokens and a window has {length}",
            hint="give more text, or a shorter context",
        )
    return found


def _pieces(row: Row, size: int) -> Iterator[Row]:
    if isinstance(row, Pair) or len(row.text) <= size:
        yield row
        return
    start = 0
    while start < len(row.text):
        end = min(start + size, len(row.text))
        if end < len(row.text):  # between words, where there are any
            end = max(row.text.rfind(" ", start, end), row.text.rfind("\n", start, end)) + 1 or end
            end = end if end > start else start + size
        yield Text(text=row.text[start:end], ends=end == len(row.text))
        start = end


def _encode(row: Text, tokenizer: Tokenizer) -> list[int]:
    tokens: list[int] = list(tokenizer(row.text, verbose=False).input_ids)
    eos = tokenizer.eos_token_id
    if row.ends and eos is not None and tokens[-1:] != [eos]:
        tokens.append(eos)
    return tokens


def encode_prompt(text: str, tokenizer: Tokenizer) -> list[int]:
    """Tokens of a text that something follows: with the begin token, never with the end's."""
    tokens = list(tokenizer(text, verbose=False).input_ids)
    while tokens and tokens[-1] == tokenizer.eos_token_id:  # some tokenizers end every text
        tokens.pop()
    return tokens


def encode_completion(text: str, tokenizer: Tokenizer) -> list[int]:
    """Tokens of a text that follows a prompt, and no special ones."""
    return list(tokenizer(text, verbose=False, add_special_tokens=False).input_ids)


def _encode_pair(row: Pair, tokenizer: Tokenizer, length: int | None) -> TokenSequence:
    prompt = encode_prompt(row.prompt, tokenizer)
    completion = encode_completion(row.completion, tokenizer)
    eos = tokenizer.eos_token_id
    tokens = prompt + completion + ([] if eos is None else [eos])
    if not completion:
        raise CalibrationError(f"{row.where} has an empty completion", hint="nothing would count")
    if length is not None and len(tokens) > length:
        raise CalibrationError(
            f"{row.where} has {len(tokens)} tokens and calibrate.length is {length}",
            hint=f"--set calibrate.length={len(tokens)}, or shorten the row",
        )
    return TokenSequence(tokens=tuple(tokens), counted=max(1, len(prompt)))
