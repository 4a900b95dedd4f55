"""Names of tensors in an order that people expect, and their place in a model: layer and kind."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

_NUMBER = re.compile(r"([0-9]+)")
_LAYER = re.compile(r"(?:.*?\.)??([0-9]+)\.")


class Place(NamedTuple):
    """Where a module is; `model.layers.7.mlp.up_proj` is an `mlp.up_proj` of `model.layers.7`."""

    layer: str  # empty outside of layers
    kind: str  # further numbers, such as those of experts, are `*`


def natural(name: str) -> list[tuple[int, str]]:
    """Make the key that sorts layer 2 before layer 10."""
    parts = _NUMBER.split(name)  # text and numbers take turns
    # By length, then by digits: a name from a file can have more digits than int() reads.
    numbers = [part.lstrip("0") if i % 2 else part for i, part in enumerate(parts)]
    return [(len(part) if i % 2 else 0, part) for i, part in enumerate(numbers)]


def place_of(module: str) -> Place:
    """Find the layer of a module, by the first number in its name, and its kind."""
    found = _LAYER.match(module)
    if found is None:
        return Place("", module)
    kind = module[found.end() :]
    parts = ("*" if part.isdecimal() else part for part in kind.split("."))
    return Place(module[: found.end() - 1], ".".join(parts))


def short_layers(layers: Iterable[str]) -> dict[str, str]:
    """Name layers by their numbers where these alone tell them apart."""
    listed = list(layers)
    numbers = [layer.rpartition(".")[2] for layer in listed]
    return dict(zip(listed, numbers if len(set(numbers)) == len(listed) else listed, strict=True))
