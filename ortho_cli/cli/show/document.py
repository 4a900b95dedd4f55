"""Typed reads of the JSON documents that commands print: each read names the type it expects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ortho_cli.errors import InternalError


class Document(dict[str, object]):
    """One JSON object; a value of another type than asked for is a bug of ours."""

    def __init__(self, fields: object) -> None:
        if not isinstance(fields, Mapping):
            raise InternalError(f"a document to print is a {type(fields).__name__}, no object")
        super().__init__(fields)

    def text(self, key: str) -> str:
        """Read a string; what is none is spelled as one."""
        return str(self[key])

    def number(self, key: str) -> float:
        """Read a number; integers stay integers."""
        value = self[key]
        if not isinstance(value, int | float):
            raise InternalError(f"`{key}` of a document to print is {value!r}, no number")
        return value

    def part(self, key: str) -> Document:
        """Read an object inside this one."""
        return Document(self[key])

    def optional(self, key: str) -> Document | None:
        """Read an object inside this one; None where it is null or absent."""
        value = self.get(key)
        return None if value is None else Document(value)

    def parts(self, key: str) -> dict[str, Document]:
        """Read an object of objects."""
        return {name: Document(value) for name, value in self.part(key).items()}

    def items_of(self, key: str) -> Sequence[object]:
        """Read a list; an absent one is empty."""
        value = self.get(key, ())
        if not isinstance(value, list | tuple):
            raise InternalError(f"`{key}` of a document to print is {value!r}, no list")
        return value

    def rows(self, key: str) -> list[Document]:
        """Read a list of objects."""
        return [Document(value) for value in self.items_of(key)]

    def shape(self) -> str:
        """Spell the `shape` of a tensor."""
        return " x ".join(map(str, self.items_of("shape"))) or "scalar"
