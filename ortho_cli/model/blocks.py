"""The blocks of a language model: where they are, and what goes into and comes out of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ortho_cli.errors import CalibrationError

TOLERANCE = 1e-2  # of the largest hidden state, between a block alone and in its model: bfloat16

Options = dict[str, Any]  # of a block's forward: masks, positions; their types are the model's
Output = Tensor | tuple[Tensor, ...]  # of a block: hidden states, first of a tuple


class Stop(Exception):  # noqa: N818 - no error
    """Ends a forward pass where what follows is not wanted."""


def largest_list(model: nn.Module, linears: Mapping[str, nn.Module]) -> Sequence[nn.Module]:
    """Find the list of modules that holds most of the Linears, the outermost of equals.

    Raises:
        CalibrationError: no list holds one.
    """
    wanted = set(map(id, linears.values()))
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    counts = [len(wanted.intersection(map(id, held.modules()))) for held in lists]
    if not any(counts):
        raise _untunable(f"{type(model).__name__} has no blocks with a Linear that is split")
    return list(lists[counts.index(max(counts))])


def _untunable(what: str) -> CalibrationError:
    hint = "such a model cannot be tuned block by block; use base.rounding gptq"
    return CalibrationError(what, hint=hint)


def split_arguments(args: tuple[Tensor, ...], options: Options) -> tuple[Tensor, Options]:
    """Split the arguments of a block into hidden states and the rest, by name.

    Raises:
        CalibrationError: hidden states are not its only positional argument.
    """
    if len(args) == 1:
        return args[0], options
    if not args and isinstance(options.get("hidden_states"), Tensor):
        rest = {key: value for key, value in options.items() if key != "hidden_states"}
        return options["hidden_states"], rest
    raise _untunable(f"a block is called with {len(args)} positional arguments where 1 is known")


def hidden_of(output: Output) -> Tensor:
    """Take the hidden states of what a block returns."""
    return output[0] if isinstance(output, tuple) else output
