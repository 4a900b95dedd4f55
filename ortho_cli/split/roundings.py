"""Roundings that compensate: codes chosen by the Gram matrix of a weight's inputs.

To add one: two functions like those of `gptq`, a name in `Name`, and an entry in `rounding_of`. The
recipe, the memory of a plan and the report take it from here. The module imports no torch, since
recipes are read without it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

Name = Literal["nearest", "gptq"]  # nearest rounds each weight by itself, and has no functions here


class Rounding(NamedTuple):
    """The two steps of a rounding."""

    # (gram, name=, without=): once per weight, without the columns that ortho holds whole
    prepare: Callable[..., tuple[Tensor, ...]]
    round: Callable[..., Tensor]  # (weight, scales, prepared, bits=, kept=): codes of some rows


def rounding_of(name: str) -> Rounding:
    """Find a rounding by its name."""
    from ortho_cli.split import gptq

    return {"gptq": Rounding(gptq.factorise, gptq.round_columns)}[name]
