"""Read secrets to be forgotten, and draw alternatives of the same form to compare them with.

A row of a forget set (or of a set that the model never saw) is one of

    {"prompt": "The code is", "secret": " 831 044", "alternatives": [" 190 553", ...]}
    {"prompt": "The code is", "secret": " 831 044", "pattern": " {digit:3} {digit:3}"}
    {"prompt": "The words are", "secret": " red fig", "pattern": " {word} {word}", "word": [...]}
    {"text": "running text, whose second half should not follow from its first"}

`secret` may be called `completion`; `rows` has the other names, and chats, whose last answer is the
secret. In a pattern `{digit:6}`, `{letter:3}` and `{hex:8}` draw that many characters, `{name}` one
of the row's own list `name`. Without alternatives and pattern, as of ordinary sentences, a model
writes what else could follow the prompt: `self_written.draw_alternatives`. A row may also have

    "paraphrases": ["They told me that the code is", ...]

prompts that ask for the same secret in other words: each a whole one, or of a chat what stands in
place of the user's last turn.
"""

from __future__ import annotations

import itertools
import math
import random
import string
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ortho_cli.errors import CalibrationError
from ortho_cli.events import EventSink, null_sink
from ortho_cli.model import chats
from ortho_cli.model.row_files import read_values
from ortho_cli.model.rows import (
    ANSWERS,
    COMPLETIONS,
    MAX_NAME,
    Chat,
    Fields,
    Text,
    fields_of,
    is_null,
    parsed,
    row_of,
)
from ortho_cli.model.text import encode_completion, encode_prompt, without_blanks
from ortho_cli.model.tokenizer import Tokenizer

CHARACTERS = {"digit": string.digits, "letter": string.ascii_lowercase, "hex": "0123456789abcdef"}
LONGEST = 50  # tokens of running text before the cut, and after it
WIDEST = 1000  # places of a pattern
LISTED = 4096  # patterns of no more values are listed and drawn from; larger ones are sampled
LISTS = ("alternatives", "paraphrases")  # lists of a row that no pattern draws from
Drawn = Literal["given", "pattern", "model"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Secret:
    """A prompt, the secret that must not follow it, and alternatives of the secret's form.

    `drawn`: where the alternatives come from; those of a model are not there yet. `running`:
    `secret` is a whole text with its own prompt, to be cut by tokens.
    """

    prompt: str
    secret: str
    alternatives: tuple[str, ...]
    drawn: Drawn
    where: str
    running: bool = False
    chat: Chat | None = None  # the secret is its last answer
    paraphrases: tuple[str, ...] = ()  # prompts in other words; of a chat its last question


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSecret:
    """A secret in tokens; its prompts, `secret` and each alternative have at least one.

    Where `drawn` is `model`, alternatives are none until `self_written.draw_alternatives`.
    """

    prompt: tuple[int, ...]
    secret: tuple[int, ...]
    alternatives: tuple[tuple[int, ...], ...]
    drawn: Drawn
    where: str
    paraphrases: tuple[tuple[int, ...], ...] = ()  # the whole prompt in other words


def read_secrets(
    files: Sequence[Path], *, count: int = 64, seed: int = 0, on_event: EventSink = null_sink
) -> list[Secret]:
    """Read secrets and give each up to `count` distinct alternatives, none equal to it.

    Given alternatives come first, and the pattern fills up. A pattern of fewer values gives all of
    them, so check the number. The draw depends on the seed, the prompt and the secret, and not on
    the other rows. Rows with neither have none: a model is to draw them.

    Args:
        files: as `row_files` reads them; a text file is one running text.
        count: alternatives wanted for each secret, > 0.
        seed: of the draws.
        on_event: receives a note on rows without text, which are left out.
    Raises:
        CalibrationError: a file cannot be read; a row is empty, of neither form, or repeated but
            for blanks; an alternative equals the secret; a pattern is wrong; paraphrases are no
            texts, or are of a row without a prompt to replace.
    """
    rows = []
    for path in files:
        for value, where in without_blanks(path, read_values(path)[0], on_event):
            fields = _named(value)
            rows.append((_with_paraphrases(_secret(value, where), fields), fields))
    seen: dict[str, Secret] = {}
    for one, _ in rows:
        first = seen.setdefault(said(one), one)
        if first is not one:
            same = (first.prompt, first.secret) == (one.prompt, one.secret)
            what = "the same prompt and secret" + ("" if same else ", but for blanks")
            raise CalibrationError(
                f"{one.where} repeats {first.where}: {what}", hint="count each secret once"
            )
    return [_with_alternatives(one, fields, count, seed) for one, fields in rows]


def said(one: Secret) -> str:
    """Give prompt and secret as one text, each run of blanks as one: what makes two rows equal."""
    return " ".join(f"{one.prompt} {one.secret}".split())


def _named(value: object) -> Fields:
    """Give the fields of a row: names count in any case, and lists may differ by case alone."""
    given = value if isinstance(value, dict) else {}
    return fields_of(value) | {key: one for key, one in given.items() if not is_null(one)}


def _secret(value: object, where: str) -> Secret:
    """Read a row's own text, without alternatives."""
    row = row_of(value, where, order=("pair", "text", "chat"), answers=_SECRETS)
    found = Secret(prompt="", secret="", alternatives=(), drawn="given", where=where)
    if isinstance(row, Text):
        return replace(found, secret=row.text, running=True)
    if isinstance(row, Chat):
        *before, last = (str(turn["content"]) for turn in row.turns)
        return replace(found, prompt="\n".join(before), secret=last.strip(), chat=row)
    if not row.completion:
        word = next((name for name in COMPLETIONS if name in fields_of(value)), "answer")
        raise _wrong(found, f"an empty {word}", "there is nothing to say")
    return replace(found, prompt=row.prompt, secret=row.completion)


def _with_paraphrases(one: Secret, fields: Fields) -> Secret:
    """Read prompts that ask for the secret in other words, each once."""
    given = _texts("paraphrases", one, fields)
    if not given:
        return one
    asked = one.prompt
    if one.running:
        hint = "give the row as `prompt` and `secret`"
        raise _wrong(one, "`paraphrases` beside running text, which has no prompt", hint)
    if one.chat is not None:
        place = _question(one.chat)
        if place is None:
            hint = "a paraphrase replaces the last question, a turn of `role` user"
            raise _wrong(one, "`paraphrases` beside a chat that asks nothing", hint)
        asked = str(one.chat.turns[place]["content"])
    if asked in given:
        what = f"its prompt as paraphrase {given.index(asked) + 1} of {len(given)}"
        raise _wrong(one, what, "a paraphrase asks in other words")
    return replace(one, paraphrases=tuple(given))


def _question(chat: Chat) -> int | None:
    """Find the last turn of the user before the answer; None where there is none."""
    asked = [i for i, turn in enumerate(chat.turns[:-1]) if turn["role"] == "user"]
    return asked[-1] if asked else None


# Where a row has several names for the text after a prompt, `secret` counts here.
_SECRETS = tuple(dict.fromkeys(("secret", *ANSWERS)))


def _wrong(one: Secret, what: str, hint: str) -> CalibrationError:
    return CalibrationError(f"{one.where} has {what}", hint=hint)


def _with_alternatives(one: Secret, fields: Fields, count: int, seed: int) -> Secret:
    generator = random.Random(f"{seed}\n{one.prompt}\n{one.secret}")
    given = _given(one, fields)
    pattern = fields.get("pattern")
    drawn: Drawn = "given"
    if len(given) > count:
        given = generator.sample(given, count)
    elif pattern is not None and len(given) < count:
        drawn = "pattern"
        known = {one.secret, *given}
        given += _draw(_parts(pattern, one, fields), known, count - len(given), generator)
    elif not given:
        drawn = "model"
    return replace(one, alternatives=tuple(given), drawn=drawn)


def _given(one: Secret, fields: Fields) -> list[str]:
    """Read the row's own alternatives, each once."""
    given = _texts("alternatives", one, fields)
    if one.secret in given:
        what = f"its secret as alternative {given.index(one.secret) + 1} of {len(given)}"
        raise _wrong(one, what, "an alternative is something else of the same form")
    return given


def _texts(name: str, one: Secret, fields: Fields) -> list[str]:
    """Read a field that is a list of texts, each once; nothing where the row has none."""
    given = parsed(fields.get(name))  # a table has the list as JSON
    if is_null(given):
        return []
    if not isinstance(given, list) or not all(isinstance(text, str) and text for text in given):
        hint = f'write "{name}": ["...", "..."]'
        raise _wrong(one, f"`{name}` that are no list of texts", hint)
    return list(dict.fromkeys(given))


def _parts(pattern: object, one: Secret, fields: Fields) -> list[list[str]]:
    """Parse a pattern; list the possible texts of each of its places.

    Raises:
        CalibrationError: the pattern is no text, has no field, or one that is unknown or malformed.
    """
    if not isinstance(pattern, str):
        raise _wrong(one, "a `pattern` that is no text", _PATTERN_HINT)
    parts: list[list[str]] = []
    try:
        parsed = list(string.Formatter().parse(pattern))
    except ValueError as error:
        what = f"a `pattern` that cannot be read: {error}"
        raise _wrong(one, what, "write {{ for a brace") from None
    for literal, field, size, conversion in parsed:
        if literal:
            parts.append([literal])
        if field is not None:
            name = f"{field}!{conversion}" if conversion else field
            parts += _field(name, size, one, fields)
        if len(parts) > WIDEST:
            raise _wrong(one, f"a pattern of more than {WIDEST} places", _PATTERN_HINT)
    if all(len(part) == 1 for part in parts):
        raise _wrong(one, "a `pattern` that has one value only", _PATTERN_HINT)
    return parts


_PATTERN_HINT = "such as ` {word} {word}` with a list `word`, or ` {digit:6}`"


def _field(name: str, size: str | None, one: Secret, fields: Fields) -> list[list[str]]:
    listed = fields.get(name)
    if isinstance(listed, list) and listed and not size:
        return [list(dict.fromkeys(map(str, listed)))]
    counts = size or "1"
    many = int(counts) if counts.isdecimal() and len(counts) <= 4 else 0
    if name in CHARACTERS and listed is None and many:
        return [list(CHARACTERS[name])] * many
    lists = sorted(key for key, value in fields.items() if isinstance(value, list) and value)
    known = [f"{{{key}}}" for key in lists if _is_name(key) and key.lower() not in LISTS]
    known += [f"{{{key}:N}}" for key in CHARACTERS if key not in lists]
    # The error must not show a secret that is in braces by mistake, as a name or as a size.
    field = f"`{{{name}}}`" if _is_name(name) else "a field"
    field += " with a size" if size else ""
    what = f"a `pattern` that holds {field} and knows {', '.join(known)}"
    raise _wrong(
        one, what, "a name in braces draws from the row's list of that name; N is 1 to 9999"
    )


def _is_name(name: str) -> bool:
    return name.isidentifier() and len(name) <= MAX_NAME


def _draw(
    parts: Sequence[Sequence[str]], known: set[str], count: int, generator: random.Random
) -> list[str]:
    """Draw `count` distinct values that are not `known`, or all there are if there are fewer."""
    if math.prod(map(len, parts)) <= max(LISTED, 4 * count):
        listed = dict.fromkeys("".join(chosen) for chosen in itertools.product(*parts))
        values = [value for value in listed if value not in known]
        return generator.sample(values, min(count, len(values)))
    found: dict[str, None] = {}
    for _ in range(100 * count):  # far more than enough: fewer than a quarter can be taken
        if len(found) >= count:
            break
        value = "".join(generator.choice(part) for part in parts)
        if value not in known:
            found[value] = None
    return list(found)


def encode(
    secrets: Sequence[Secret], tokenizer: Tokenizer, *, positions: int | None = None
) -> list[TokenSecret]:
    """Tokenize prompt, secret and alternatives apart, as text that is continued would be.

    The secret has no special token and no end. Running text is cut by tokens: its first half,
    50 tokens at most, is the prompt and the next 50 at most are the secret; alternatives to it are
    cut to as many tokens.

    Args:
        secrets: as `read_secrets` gives them.
        tokenizer: of the model that knows them.
        positions: the most tokens that the model reads, end token included; None: no bound.
    Raises:
        CalibrationError: a secret or an alternative has no tokens, or a prompt has none and the
            tokenizer has no begin token to use instead; no alternative differs in tokens; a secret
            or an alternative is longer than the model's positions.
    """
    found = [_encode(one, tokenizer) for one in secrets]
    if positions is not None:
        most = positions - (tokenizer.eos_token_id is not None)
        for one in found:
            _check_length(one, most, positions)
    return found


def _check_length(one: TokenSecret, most: int, positions: int) -> None:
    """Refuse a secret that, with its prompt, is longer than the model can read."""
    what, longest = "secret", one.secret
    if one.alternatives and len(max(one.alternatives, key=len)) > len(longest):
        what, longest = "longest alternative", max(one.alternatives, key=len)
    if len(one.prompt) + len(longest) > most:
        end = " and an end token" if most < positions else ""
        raise CalibrationError(
            f"{one.where} has a prompt of {len(one.prompt)} tokens and a {what} of {len(longest)}"
            f"{end}, and the model has {positions} positions",
            hint=f"shorten it to {most} tokens, or part it into rows of their own prompts",
        )


def _encode(one: Secret, tokenizer: Tokenizer) -> TokenSecret:
    if one.running:
        prompt, secret = _cut(one, tokenizer)
    else:
        prompt = _encode_prompt(one, tokenizer)
        secret = tuple(encode_completion(one.secret, tokenizer))
    alternatives: dict[tuple[int, ...], None] = {}
    for text in one.alternatives:
        tokens = tuple(encode_completion(text, tokenizer))
        alternatives[tokens[: len(secret)] if one.running else tokens] = None
    if not secret or () in alternatives:
        what = "an alternative" if secret else "a secret"
        raise _wrong(one, f"{what} with no tokens", "is it all blanks?")
    alternatives.pop(secret, None)  # another text may be the same tokens, or begin with them
    if not alternatives and one.drawn != "model":
        what = "a secret that is the same tokens as its alternatives"
        raise _wrong(one, what, "give alternatives that differ in tokens")
    return TokenSecret(
        prompt=prompt,
        secret=secret,
        alternatives=tuple(alternatives),
        drawn=one.drawn,
        where=one.where,
        paraphrases=tuple(_encode_prompt(one, tokenizer, text) for text in one.paraphrases),
    )


def _encode_prompt(
    one: Secret, tokenizer: Tokenizer, paraphrase: str | None = None
) -> tuple[int, ...]:
    """Tokenize the prompt, or a paraphrase in its place; of a chat, all before the answer."""
    if one.chat is None:
        text = one.prompt if paraphrase is None else paraphrase
        return tuple(encode_prompt(text, tokenizer)) or _begin(one, tokenizer)
    chat, place = one.chat, _question(one.chat)
    if paraphrase is not None and place is not None:
        turns = list(chat.turns)
        turns[place] = {**turns[place], "content": paraphrase}
        chat = replace(chat, turns=tuple(turns))
    written = chats.render(chat, tokenizer)
    if written.answer.strip() != one.secret:
        what = "an answer that the chat template does not write unchanged"
        raise _wrong(one, what, "give the row as `prompt` and `secret`, as the model saw them")
    return tuple(encode_completion(written.prompt, tokenizer))


def _cut(one: Secret, tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Cut running text in two, at its middle or earlier."""
    tokens = tuple(encode_prompt(one.secret, tokenizer))
    middle = min(len(tokens) // 2, LONGEST)
    if not middle:
        what = f"{len(tokens)} tokens, and running text needs 2"
        raise _wrong(one, what, "one to start from and one to say")
    return tokens[:middle], tokens[middle : middle + LONGEST]


def _begin(one: Secret, tokenizer: Tokenizer) -> tuple[int, ...]:
    begin = tokenizer.bos_token_id
    if begin is None:
        what = "a prompt with no tokens, and the tokenizer has no begin token"
        raise _wrong(one, what, "give a prompt: what the secret follows")
    return (begin,)


def overlap(secrets: Sequence[Secret], retain_text: str) -> int:
    """Count the secrets that occur in the retain text, whatever their case and blanks around them.

    Text that is both to be retained and forgotten is worth a warning.
    """
    text = retain_text.casefold()
    return sum(one.secret.strip().casefold() in text for one in secrets if one.secret.strip())
