"""Turn files of calibration data into token sequences, the same ones for the same seed."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from blake3 import blake3

from ortho_cli.errors import CalibrationError
from ortho_cli.events import EventSink, Noted, null_sink
from ortho_cli.model import chats
from ortho_cli.model.row_files import Value, read_values
from ortho_cli.model.rows import Chat, Pair, Row, Text, is_blank, row_of
from ortho_cli.model.tokenizer import Tokenizer

CHARACTERS_PER_TOKEN = 5  # a long text is cut into pieces a little longer than a sequence
WINDOW_CHARACTERS = 1 << 16  # of running text, tokenized at once


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSequence:
    """Tokens of one forward pass; those from index `counted` on are predicted and count."""

    tokens: tuple[int, ...]
    counted: int = 1

    @property
    def labels(self) -> int:
        """Tokens that count."""
        return len(self.tokens) - self.counted


def read_rows(files: Iterable[Path], on_event: EventSink = null_sink) -> tuple[list[Row], str]:
    """Read whole files of text, JSON or tables; see `row_files` and `rows`.

    Args:
        files: in this order.
        on_event: receives a note on rows without text, which are left out.
    Returns:
        The rows in file order, and BLAKE3 over the files' digests.
    Raises:
        CalibrationError: a file is missing, empty, damaged or of an unknown kind, or a row has an
            unknown form.
    """
    rows: list[Row] = []
    digest = blake3()
    for path in files:
        values, one = read_values(path)
        digest.update(one)
        rows += [row_of(value, where) for value, where in without_blanks(path, values, on_event)]
    return rows, digest.hexdigest()


def without_blanks(path: Path, values: Iterable[Value], on_event: EventSink) -> Iterator[Value]:
    """Leave out rows without text, and note how many.

    Raises:
        CalibrationError: nothing else is there.
    """
    blank, other = 0, False
    for value, where in values:
        if is_blank(value):
            blank += 1
        else:
            other = True
            yield value, where
    if not other:
        raise CalibrationError(f"data `{path}` holds no text", hint="is it the right file?")
    if blank:
        rows = "row of" if blank == 1 else "rows of"
        on_event(Noted(message=f"{blank} {rows} `{path}` without text left out"))


def stamps(files: Iterable[Path]) -> list[list[str | int]]:
    """Identify files by name, size in bytes and mtime: a digest would give short secrets away."""
    stats = [(path.name, path.stat()) for path in files]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def retain_sequences(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    *,
    samples: int,
    length: int,
    seed: int,
    asked: str = "calibrate",
    multiple: int = 1,
    running: bool = False,
    on_event: EventSink = null_sink,
) -> list[TokenSequence]:
    """Draw `samples` sequences: texts packed to exactly `length` tokens, pairs one by one.

    Texts are cut into pieces of about a sequence, shuffled by the seed and joined, with the end
    token where a document ends, until enough are there: nothing else is tokenized. Chats are
    taken one by one, like pairs, and those longer than `length` are left out; with `running`
    they are text.

    `samples` is a multiple of `multiple`, and so is the number that an error proposes.

    Raises:
        CalibrationError: the data give fewer, or a pair is longer than `length`.
    """
    pieces = [piece for row in rows for piece in _pieces(row, length * CHARACTERS_PER_TOKEN)]
    random.Random(seed).shuffle(pieces)
    found: list[TokenSequence] = []
    stream: list[int] = []
    longer = 0
    for piece in pieces:
        if len(found) >= samples:
            break
        if isinstance(piece, Pair) or (isinstance(piece, Chat) and not running):
            sequence = _encode_pair(piece, tokenizer, length if isinstance(piece, Pair) else None)
            if len(sequence.tokens) <= length:
                found.append(sequence)
            else:
                longer += 1
            continue
        stream += _encode(piece, tokenizer)
        while len(stream) >= length and len(found) < samples:
            found.append(TokenSequence(tokens=tuple(stream[:length])))
            del stream[:length]
    if longer:
        word = "chat" if longer == 1 else "chats"
        what = f"{longer} {word} of more than {length} tokens left out"
        on_event(Noted(message=f"{what}; `{asked}.length` is how many one may have"))
    if len(found) < samples:
        tokens = sum(len(sequence.tokens) for sequence in found) + len(stream)
        enough = len(found) // multiple * multiple
        left = f", and {longer} chats are longer" if longer else ""
        flag = "--samples " if asked == "calibrate" else f"--set {asked}.samples="
        fewer = f"{flag}{enough}" if enough else f"a smaller {asked}.length"
        raise CalibrationError(
            f"the data give {len(found)} sequences of {length} tokens ({tokens} tokens) where "
            f"{samples} are asked for{left}",
            hint=f"give more data, or {fewer}",
        )
    return found


def forget_sequences(
    rows: Sequence[Row], tokenizer: Tokenizer, *, length: int
) -> list[TokenSequence]:
    """Encode all of the forget set, in order: pairs one by one, texts packed, the last cut short.

    Raises:
        CalibrationError: nothing counts, or a pair is longer than `length`.
    """
    found: list[TokenSequence] = []
    stream: list[int] = []
    for row in rows:
        if isinstance(row, Text):
            stream += _encode(row, tokenizer)
        else:
            found.append(_encode_pair(row, tokenizer, length))
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
    """Encode prompts and completions one by one, to measure a skill.

    Args:
        rows: pairs only.
        tokenizer: of the model that answers.
        end: whether the end token counts, too: a longer answer is then a wrong one.
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
        if not end and pair.tokens[-1] == tokenizer.eos_token_id:
            pair = replace(pair, tokens=pair.tokens[:-1])
        found.append(pair)
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
        if not isinstance(piece, Text):
            what = "a chat" if isinstance(piece, Chat) else "a prompt and its completion"
            raise CalibrationError(
                f"{piece.where} is {what} where running text is asked for",
                hint="give files of text, or rows with `text`",
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
    if not isinstance(row, Text) or len(row.text) <= size:
        yield row
        return
    start = 0
    while start < len(row.text):
        end = min(start + size, len(row.text))
        if end < len(row.text):  # between words, where there are any
            end = max(row.text.rfind(" ", start, end), row.text.rfind("\n", start, end)) + 1 or end
        yield Text(text=row.text[start:end], ends=end == len(row.text))
        start = end


def _encode(row: Text | Chat, tokenizer: Tokenizer) -> list[int]:
    """Encode running text, with the end token where a document ends."""
    if isinstance(row, Chat):  # its template writes special tokens
        tokens, ends = encode_completion("".join(chats.render(row, tokenizer)), tokenizer), True
    else:
        tokens, ends = list(tokenizer(row.text, verbose=False).input_ids), row.ends
    eos = tokenizer.eos_token_id
    if ends and eos is not None and tokens[-1:] != [eos]:
        tokens.append(eos)
    return tokens


def encode_prompt(text: str, tokenizer: Tokenizer) -> list[int]:
    """Encode a text that another follows: with the begin token, never with the end token."""
    tokens = list(tokenizer(text, verbose=False).input_ids)
    while tokens and tokens[-1] == tokenizer.eos_token_id:  # some tokenizers end every text
        tokens.pop()
    return tokens


def encode_completion(text: str, tokenizer: Tokenizer) -> list[int]:
    """Encode a text that follows a prompt, without special tokens."""
    return list(tokenizer(text, verbose=False, add_special_tokens=False).input_ids)


def _encode_pair(row: Pair | Chat, tokenizer: Tokenizer, length: int | None) -> TokenSequence:
    """Encode a pair with the end token, or a chat with the end that its template writes."""
    end: list[int] = []
    if isinstance(row, Chat):
        found = chats.render(row, tokenizer)
        prompt = encode_completion(found.prompt, tokenizer)
        # A line break after the template's end is layout.
        completion = encode_completion(found.answer + found.end.rstrip(), tokenizer)
    else:
        prompt = encode_prompt(row.prompt, tokenizer)
        completion = encode_completion(row.completion, tokenizer)
        if tokenizer.eos_token_id is not None:
            end = [tokenizer.eos_token_id]
    tokens = prompt + completion + end
    if not completion:
        raise CalibrationError(f"{row.where} has an empty completion", hint="nothing would count")
    if length is not None and len(tokens) > length:
        raise CalibrationError(
            f"{row.where} has {len(tokens)} tokens and calibrate.length is {length}",
            hint=f"--length {len(tokens)}, or shorten the row",
        )
    return TokenSequence(tokens=tuple(tokens), counted=max(1, len(prompt)))
