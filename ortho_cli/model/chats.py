"""Write chats by the model's chat template, and find the last answer in the text."""

from __future__ import annotations

import dataclasses
import datetime
import re
from typing import NamedTuple

from ortho_cli.errors import CalibrationError
from ortho_cli.model.rows import Chat
from ortho_cli.model.tokenizer import Tokenizer

# The date for templates that write today's: tokens must not change from day to day. Templates of
# Llama 3 write this one where they have no clock.
TODAY = datetime.date(2024, 7, 26)
_CLOCK = re.compile(r"strftime_now\(\s*(['\"])([^'\"\\]*)\1\s*\)")

# Replaces an answer to find where it is written: no template writes this, and none strips it.
MARK = "\u2063ortho\u2063"

_INSTEAD = "or give rows of `prompt` and `completion`"


class Rendered(NamedTuple):
    """A chat as text with its special tokens."""

    prompt: str  # all text before the last answer
    answer: str
    end: str  # text of the template after it


def render(chat: Chat, tokenizer: Tokenizer) -> Rendered:
    """Write a chat, and find its last answer.

    Raises:
        CalibrationError: the tokenizer has no chat template, or the template refuses the chat, or
            writes the turns before the last one differently with and without it; names the row.
    """
    turns = len(chat.turns)
    whole = _apply(chat, tokenizer, turns, asks=False)
    start = _apply(chat, tokenizer, turns - 1, asks=False)
    asked = _apply(chat, tokenizer, turns - 1, asks=True)
    if not whole.startswith(start):
        raise CalibrationError(
            f"{chat.where} has turns that the chat template writes otherwise once there is an "
            "answer, so where that begins is unknown",
            hint=f"leave the row out, {_INSTEAD}",
        )
    said = str(chat.turns[-1]["content"])
    found = _marked(chat, tokenizer, whole, said)
    if found is not None:
        return found
    # Some templates begin an answer (`<think>`) where one is asked for: the common part is the
    # prompt.
    pairs = enumerate(zip(whole, asked, strict=False))
    common = next((i for i, (a, b) in pairs if a != b), min(len(whole), len(asked)))
    for begin in (common, len(start)):
        for words in (said, said.strip()):
            place = whole.rfind(words, begin)  # the template's own words come before an answer
            if place >= 0:
                return Rendered(whole[:place], words, whole[place + len(words) :])
    # The template splits an answer into thoughts and speech.
    rest = whole[common:]
    answer = rest.rstrip()
    return Rendered(whole[:common], answer, rest[len(answer) :])


def _marked(chat: Chat, tokenizer: Tokenizer, whole: str, said: str) -> Rendered | None:
    """Find the answer by writing a mark in its place.

    A short answer may be part of the template's own text, so that a search for its words misleads.
    """
    turns = (*chat.turns[:-1], {**chat.turns[-1], "content": MARK})
    try:
        probe = _apply(dataclasses.replace(chat, turns=turns), tokenizer, len(turns), asks=False)
    except CalibrationError:  # it checks answers, and accepted only the real one
        return None
    head, mark, tail = probe.partition(MARK)
    if not mark:
        return None
    fits = [words for words in (said, said.strip()) if whole.startswith(head + words)]
    # What comes after the answer may depend on it.
    fits.sort(key=lambda words: whole != head + words + tail)
    return Rendered(head, fits[0], whole[len(head + fits[0]) :]) if fits else None


def _apply(chat: Chat, tokenizer: Tokenizer, turns: int, *, asks: bool) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise CalibrationError(
            f"{chat.where} is a chat, and the model's tokenizer has no chat template",
            hint=f"put the chat_template.jinja of a chat model beside tokenizer.json, {_INSTEAD}",
        )
    tools = list(chat.tools) if chat.tools else None
    try:
        template = str(tokenizer.get_chat_template(tools=tools))
        written = tokenizer.apply_chat_template(
            [dict(turn) for turn in chat.turns[:turns]],
            tools=tools,
            chat_template=_CLOCK.sub(lambda call: repr(TODAY.strftime(call[2])), template),
            add_generation_prompt=asks,
            tokenize=False,
        )
    except ImportError:
        raise CalibrationError(
            f"{chat.where} is a chat, and chat templates need jinja2, which is not installed",
            hint=f"pip install jinja2, {_INSTEAD}",
        ) from None
    except Exception as error:  # noqa: BLE001 - a template is untrusted code
        raise CalibrationError(
            f"{chat.where} is a chat that the model's chat template refuses{_reason(error, chat)}",
            hint=f"write its turns as the template wants them, {_INSTEAD}",
        ) from None
    return str(written)


def _reason(error: Exception, chat: Chat) -> str:
    """Give the template's message, unless it contains words of the chat."""
    words = " ".join(str(error).split())
    every = [" ".join(str(turn["content"]).casefold().split()) for turn in chat.turns]
    said = " ".join(every).split()
    parts = [part for part in said if len(part) > 3 or any(map(str.isdigit, part))]
    parts += filter(None, every)  # a whole turn, however short
    if not words or len(words) > 200 or any(part in words.casefold() for part in parts):
        return ""
    return f": {words}"
