"""The protocol of a tokenizer: the part of a transformers tokenizer that this package calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

Turn = Mapping[str, object]  # of a chat: `role`, `content`, and other keys of its template


class Encoding(Protocol):
    """An encoded text."""

    @property
    def input_ids(self) -> Sequence[int]:
        """Give the tokens."""


class Tokenizer(Protocol):
    """A transformers tokenizer."""

    eos_token_id: int | None
    bos_token_id: int | None
    all_special_ids: Sequence[int]

    def __len__(self) -> int:
        """Count the tokens, special ones included."""

    def __call__(self, text: str, **options: bool) -> Encoding:
        """Encode a text."""

    def decode(self, tokens: Sequence[int], **options: bool) -> str:
        """Give the text of tokens."""

    def get_chat_template(self, *, tools: list[object] | None) -> object:
        """Give the chat template, a Jinja program."""

    def apply_chat_template(
        self,
        conversation: Sequence[Turn],
        *,
        tools: list[object] | None,
        chat_template: str,
        add_generation_prompt: bool,
        tokenize: bool,
    ) -> object:
        """Write a chat by its template: text, where `tokenize` is False."""
