"""Read a row of calibration data or of a forget set as text, a prompt with its answer, or a chat.

    {"text": "..."}                                   running text; `content` is another name
    {"prompt": "...", "completion": "..."}            only the completion counts
    {"instruction": "...", "input": "...", "output": "..."}   and other names, see PROMPTS, ANSWERS
    {"messages": [{"role": "user", "content": "..."}, ...]}   a chat; `conversations` with `from`
                                                      and `value` as well; its last answer counts

A field that is null or NaN counts as absent. Errors name keys and types, and never values: they may
be secret.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeGuard

from ortho_cli.errors import CalibrationError
from ortho_cli.model.tokenizer import Turn

TEXTS = ("text", "content")
COMPLETIONS = ("completion", "secret")  # two usual names for the text after a prompt
# Names of a question in public data sets, and the names of parts that belong to it.
PROMPTS: Mapping[str, tuple[str, ...]] = {
    "prompt": ("input", "context"),
    "instruction": ("input", "context"),
    "question": ("context", "input"),
    "query": ("context", "input"),
    "problem": ("context",),
    "input": ("context",),
}
ANSWERS = (*COMPLETIONS, "response", "output", "answer", "solution")
LEADS = ("system_prompt", "system")  # come before a question, where a row has them
CHATS = ("messages", "conversations", "conversation")
# Roles of ShareGPT and other data sets; a role that is not here goes to the template unchanged.
ROLES = {
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bot", "bing", "bard", "ai"), "assistant"),
}
MAX_NAME = 32  # characters of a key that errors show: longer ones may be text
EXPECTED = "each row is text, a prompt and its completion, or a chat"
KNOWN = frozenset((*TEXTS, *PROMPTS, *ANSWERS, *CHATS, *LEADS)).union(*PROMPTS.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """Running text; every token counts. `ends`: whether the document ends with it."""

    text: str
    ends: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A prompt and its completion; only the completion's tokens count."""

    prompt: str
    completion: str
    where: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """Turns of a chat, the last one an answer, which alone counts; see `chats`."""

    turns: tuple[Turn, ...]
    tools: tuple[object, ...] | None
    where: str

    @property
    def text(self) -> str:
        """The content of all turns, one per line."""
        return "\n".join(str(turn["content"]) for turn in self.turns)


Row = Text | Pair | Chat
Fields = Mapping[str, object]
Kind = Literal["text", "pair", "chat"]


def row_of(
    value: object,
    where: str,
    *,
    order: Sequence[Kind] = ("text", "pair", "chat"),
    answers: Sequence[str] = ANSWERS,
) -> Row:
    """Read a row.

    Args:
        value: the row, parsed.
        where: its place, for errors.
        order: kinds that are tried first, for a row that could be several.
        answers: names of the text after a prompt; the first that a row has counts.
    Raises:
        CalibrationError: it is none of them; names its keys and what is wrong with them.
    """
    fields = fields_of(value)
    answer = next((fields[name] for name in answers if name in fields), None)
    # Names that only some data sets have come last.
    for reader in (*(_READERS[kind] for kind in order), _other_pair, _content):
        found = reader(fields, where, answer)
        if found is not None:
            return found
    raise _no_row(value, where, answers[0])


def is_blank(value: object) -> bool:
    """Whether a row has only fields for text, and all of them are empty."""
    if not isinstance(value, dict) or not {_plain(key) for key in value} & set(TEXTS):
        return False
    fields = fields_of(value)
    if set(fields) & {*PROMPTS, *ANSWERS, *CHATS}:
        return False
    texts = [fields[name] for name in TEXTS if name in fields]
    return all(isinstance(text, str) and not text.strip() for text in texts)


def is_row(value: Mapping[str, object]) -> bool:
    """Whether an object is one row, and not a container of rows or columns."""
    fields = fields_of(value)
    if any(isinstance(fields.get(name), str) for name in KNOWN):
        return True
    return any(_is_turns(fields.get(name)) for name in (*CHATS, "prompt"))


def names_of(keys: Iterable[object]) -> str:
    """List the keys of a row, except those that may be text."""
    every = list(map(str, keys))
    names = sorted(key for key in every if len(key) <= MAX_NAME and key.isidentifier())
    shown, more = names[:12], len(every) - len(names[:12])
    return f"keys {shown}" + (f" and {more} more" if more else "")


def fields_of(value: object) -> dict[str, object]:
    """Give the fields of a row by plain names (lower case, no blanks), without null ones."""
    if not isinstance(value, dict):
        return {}
    present = {key: one for key, one in value.items() if not is_null(one)}
    found = {_plain(key): one for key, one in present.items()}
    return found | {key: one for key, one in present.items() if key in KNOWN}


def is_null(value: object) -> bool:
    """Whether a value is null or NaN: a table writes either for an absent field."""
    return value is None or value != value


def _plain(key: object) -> str:
    return str(key).strip().lower()


def _text(fields: Fields, where: str, answer: object) -> Text | None:
    text = fields.get("text")
    return Text(text=text) if isinstance(text, str) and text.strip() else None


def _content(fields: Fields, where: str, answer: object) -> Text | None:
    """Read `content` as text, unless the row is a turn of a chat."""
    return None if "role" in fields else _text({"text": fields.get("content")}, where, answer)


def _pair(fields: Fields, where: str, answer: object) -> Row | None:
    """Read `prompt` and its answer, unchanged; both may be lists of turns.

    Parts that belong to a prompt are joined to it as to any question.
    """
    prompt = fields.get("prompt")
    if isinstance(prompt, str) and isinstance(answer, str):
        beside = [fields.get(name) for name in (*LEADS, *PROMPTS["prompt"])]
        if any(isinstance(part, str) and part.strip() for part in beside):
            return _other_pair(fields, where, answer)
        return Pair(prompt=prompt, completion=answer, where=where)
    if _is_turns(prompt) and _is_turns(answer):
        return _chat({**fields, "messages": [*prompt, *answer]}, where, answer)
    return None


def _other_pair(fields: Fields, where: str, answer: object) -> Pair | None:
    """Read a question under its names in public data: its parts, one per line, and the answer."""
    for name, beside in PROMPTS.items():
        parts = [fields[part] for part in (*LEADS, name, *beside) if part in fields]
        texts = [part for part in (*parts, answer) if isinstance(part, str)]
        if name in fields and len(texts) == len(parts) + 1:
            prompt = "".join(f"{text}\n" for text in texts[:-1] if text.strip())
            return Pair(prompt=prompt, completion=texts[-1], where=where)
    return None


def _chat(fields: Fields, where: str, answer: object) -> Chat | None:
    name = next((name for name in CHATS if name in fields), None)
    if name is None:
        return None
    given = parsed(fields[name])
    if not isinstance(given, list) or not given:
        raise CalibrationError(
            f"{where} has `{name}` that is {_kind(given)}, not a list of turns",
            hint='such as [{"role": "user", "content": "..."}, {"role": "assistant", ...}]',
        )
    turns = [_turn(turn, number, name, where) for number, turn in enumerate(given, 1)]
    lead = next((text for n in LEADS if isinstance(text := fields.get(n), str)), "")
    if lead.strip() and turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": lead})
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=-1)
    if last < 1:
        raise CalibrationError(
            f"{where} has {len(given)} turns in `{name}`, and "
            + ("none before the answer" if last == 0 else "none of the assistant"),
            hint="a chat is a question, `role` user, and its answer, `role` assistant",
        )
    if not str(turns[last]["content"]).strip():
        what = f"{where} has an empty answer in turn {last + 1} of `{name}`"
        raise CalibrationError(what, hint="nothing would count")
    tools = parsed(fields.get("tools"))
    return Chat(
        turns=tuple(turns[: last + 1]),
        tools=tuple(tools) if isinstance(tools, list) and tools else None,
        where=where,
    )


def _turn(turn: object, number: int, name: str, where: str) -> Turn:
    """Read one turn under either of its two pairs of names, with other keys a template may use."""
    fields: Fields = turn if isinstance(turn, dict) else {}
    role = next((r for key in ("role", "from") if isinstance(r := fields.get(key), str)), None)
    key = "content" if "content" in fields else "value"
    content = _joined(fields.get(key))
    if content is None and fields.get(key) is None and fields.get("tool_calls"):
        content = ""  # it only calls a tool
    if role is None or content is None:
        what = names_of(fields) if fields else _kind(turn)
        wrong = f", and `{key}` is {_kind(fields[key])}" if key in fields else ""
        raise CalibrationError(
            f"{where} has turn {number} of `{name}` with {what}{wrong}",
            hint="a turn is a `role` and its `content`, or `from` and `value`, both text",
        )
    more = {k: v for k, v in fields.items() if k not in ("from", "value") and v is not None}
    role = role.strip().lower()
    return more | {"role": ROLES.get(role, role), "content": content}


def _joined(content: object) -> str | None:
    """Join the parts of a turn's content; None where one is no text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        return None
    texts = [
        part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
        for part in content
    ]
    found = [text for text in texts if isinstance(text, str)]
    return "".join(found) if len(found) == len(texts) else None


def parsed(value: object) -> object:
    """Parse a list that a table has as JSON; give other values back."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value)
    return value


Reader = Callable[[Fields, str, object], Row | None]
_READERS: Mapping[Kind, Reader] = {"text": _text, "pair": _pair, "chat": _chat}


def _is_turns(value: object) -> TypeGuard[list[object]]:
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and ("role" in first or "from" in first)


def _no_row(value: object, where: str, answer: str) -> CalibrationError:
    expected = f"neither `text` nor `prompt` and `{answer}`, nor a chat"
    if not isinstance(value, dict):
        return CalibrationError(f"{where} is {_kind(value)} and {expected}", hint=EXPECTED)
    wrong = [
        f"`{name}` is {_kind(value[name])}"
        for name in sorted(KNOWN & set(value))
        if not isinstance(value[name], str)
    ]
    types = f" ({', '.join(wrong)})" if wrong else ""
    return CalibrationError(
        f"{where} has {names_of(value)}{types} and {expected}",
        hint=f"{EXPECTED}; a question may be called {', '.join(PROMPTS)}, its answer "
        f"{', '.join(ANSWERS)}",
    )


def _kind(value: object) -> str:
    """Name a type in JSON's words."""
    names: dict[type, str] = {bool: "true or false", int: "a number", float: "a number"}
    names |= {str: "text", list: "a list", tuple: "a list", dict: "an object"}
    return "null" if is_null(value) else names.get(type(value), f"of type {type(value).__name__}")
