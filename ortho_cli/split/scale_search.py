"""What a search of group scales tries, how it adds, and how scales and positions take turns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

# How often at most scales and positions take turns; a third turn was measured to gain 0.1 %.
ROUNDS = 2

# Sums that the squared errors of a group are added into, one after another.
LANES = 16


def scale_factors(bits: int) -> tuple[float, ...]:
    """List what absmax's scale is multiplied by in a search, in the order of trial.

    For 4 bits 7.5/7 and 7.5/8 put the largest magnitude exactly on code 7 or -8, for 3 bits 3.5/3
    and 3.5/4 on 3 or -4. Fewer codes are worth more clipping: to 0.5, and with 3 bits to 0.3.
    """
    half, codes = (2**bits - 1) / 2, 2 ** (bits - 1)
    steps = range(25 if bits == 4 else 35)
    descent = (round(0.98 - 0.02 * step, 2) for step in steps)
    return (1.0, half / (codes - 1), half / codes, 1.04, 1.02, *descent)


class Found(Protocol):
    """What one pass over a weight found; the next may begin with it."""

    @property
    def kept(self) -> npt.NDArray[np.integer[Any]]:
        """Flat indices of what ortho holds, ascending."""


F = TypeVar("F", bound=Found)


def take_turns(found: F, again: Callable[[F], F], rounds: int) -> F:
    """Let scales be searched, and positions chosen, with what is known of the others.

    Args:
        found: the first pass.
        again: makes a pass with what the one before found.
        rounds: how often at most; fewer where positions stay.
    Returns:
        The last pass.
    """
    for _ in range(rounds):
        before, found = found, again(found)
        if np.array_equal(found.kept, before.kept):
            break
    return found


def rounds(scale: str, *, by_curvature: bool, k: int, numel: int) -> int:
    """Say how often scales and positions may take turns.

    Searched scales need not serve what ortho holds. So a weight is split again, with scales for
    the others alone, which are never worse for those; and where positions are chosen by what
    scales are searched for, they are chosen anew, which is never worse either, until they stay.
    """
    if scale == "absmax" or not 0 < k < numel:
        return 0
    return ROUNDS if chosen_alike(scale, by_curvature=by_curvature) else 1


def chosen_alike(scale: str, *, by_curvature: bool) -> bool:
    """Tell whether positions are chosen by the error that scales are searched to make small."""
    return by_curvature == (scale == "curvature")
