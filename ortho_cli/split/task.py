"""What splitting one weight means: the task, its tiles, and the protocols between the parts.

    Rows, Curvature -> Tile -> TileKernel -> TileResult -> Sink
                                   |
                                 Select

`pipeline` walks from tile to tile. Nothing here knows of files, recipes or plans: the caller
hands in a task, its inputs and a sink. Arrays hold words: bfloat16 is uint16, float16 is int16
and float32 is uint32, which is how the compiled loops tell them apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from ortho_cli.errors import RecipeError
from ortho_cli.split.dtypes import DTYPES, SPLIT
from ortho_cli.split.sizes import DEFAULT_SIZES, Part, Sizes

if TYPE_CHECKING:
    from ortho_cli.split.select import TopK

WORDS: dict[str, type[np.generic]] = {"BF16": np.uint16, "F16": np.int16, "F32": np.uint32}

# Exponent bits of a word; all set means infinity or NaN.
EXPONENTS = {name: DTYPES[name].exponent or 0 for name in SPLIT}

# Sums that the squared errors of a group are added into, one after another.
LANES = 16

# Where each sum of squares is in `sums`; `Figures` says what they are.
SIGNAL, NOISE, CURVATURE_NOISE, DELTA = range(4)

Array = npt.NDArray[Any]
Room = Callable[[str, tuple[int, ...], npt.DTypeLike], Array]  # hands out the buffer of that name
Places = tuple[npt.NDArray[np.int64], npt.NDArray[np.int8]]  # positions, and codes of base there


def scale_factors(bits: int) -> tuple[float, ...]:
    """List what absmax's scale is multiplied by in a search, in the order of trial.

    For 4 bits 7.5/7 and 7.5/8 put the largest magnitude exactly on code 7 or -8, for 3 bits 3.5/3
    and 3.5/4 on 3 or -4. Fewer codes are worth more clipping: to 0.5, and with 3 bits to 0.3.
    """
    half, codes = (2**bits - 1) / 2, 2 ** (bits - 1)
    steps = range(25 if bits == 4 else 35)
    descent = (round(0.98 - 0.02 * step, 2) for step in steps)
    return (1.0, half / (codes - 1), half / codes, 1.04, 1.02, *descent)


class Edited(Protocol):
    """Codes of base that are to be others than the nearest; ortho keeps those positions."""

    def within(self, start: int, stop: int) -> Places:
        """Give those from one flat index to another, positions counted from the first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitTask:
    """What is to be done to one weight."""

    name: str  # for errors, as `file` is
    file: str | None = None
    shape: tuple[int, int]
    dtype: str  # BF16, F16 or F32
    bits: int  # of a code
    group_size: int
    scale: str  # absmax, mse or curvature
    k: int  # weights that ortho keeps
    columns: int | None = None  # that they fill whole: k = columns * rows; None: single weights
    fixed: Array | None = None  # those columns, where they are known before
    by_curvature: bool = False  # those of largest |r| sqrt(h), not |r|
    alone: bool = False  # base has to serve without ortho: its scales do not leave out what is kept
    figures: bool = True  # add up what rounding costs
    edit: Edited | None = None
    own_code: bool = False  # where a code was edited, ortho may hold the source's own code
    rounding: str = "nearest"  # a name of `roundings`
    # What that rounding prepares, where it compensates, given the columns that ortho holds whole.
    factor: Callable[[Array | None], Any] | None = None

    @property
    def numel(self) -> int:
        """Weights."""
        return self.shape[0] * self.shape[1]

    @property
    def word(self) -> type[np.generic]:
        """Dtype of a word."""
        return WORDS[self.dtype]

    @property
    def alike(self) -> bool:
        """Whether positions are chosen by the error that scales are searched to make small."""
        return self.by_curvature == (self.scale == "curvature")

    def measures(self, *, curvature: bool, reference: bool = False) -> list[int]:
        """List the sums that each weight adds to, first that by which positions are chosen."""
        found = [NOISE, CURVATURE_NOISE][: 1 + curvature]
        if self.by_curvature:
            found.reverse()
        return [*found, DELTA] if reference else found


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Sums of squares over a weight; `_kept` is the part that alpha = 1 takes away."""

    signal: float  # of the weights
    noise: float  # of the residual
    noise_kept: float
    curvature_noise: float | None = None  # of the residual times curvature
    curvature_noise_kept: float | None = None
    delta: float | None = None  # of reference - source, times curvature if there is any
    delta_kept: float | None = None


class Vector(NamedTuple):
    """Curvature of rows or of columns, float32."""

    values: Array
    roots: Array


class CurvatureTile(NamedTuple):
    """Curvature of some rows: words, or vectors whose product it is; without both, there is none.

    Without `rows`, every row has the curvature of `columns`.
    """

    words: Array | None = None
    rows: Vector | None = None
    columns: Vector | None = None

    @property
    def dtype(self) -> str:
        """Dtype of the words."""
        return "F32" if self.words is None or self.words.itemsize == 4 else "BF16"


class Tile(NamedTuple):
    """Some rows of a weight, and what is known of them before they are split."""

    row: int  # the first
    raw: Array  # (rows, in) words
    curvature: CurvatureTile = CurvatureTile()
    reference: Array | None = None  # (rows, in) words that base is made of instead
    edit: Places | None = None
    held: Array | None = None  # (rows, in) bool: positions of the pass before, and its scales
    scales: Array | None = None  # (rows, groups) words
    forced: Array | None = None  # flat positions in these rows that are kept whatever they lose
    codes: Array | None = None  # (rows, in) int8 that are known already
    factor: Any = None  # for rounding with compensation

    @property
    def start(self) -> int:
        """Flat index of the first weight."""
        return self.row * int(self.raw.shape[1])


class TileResult(NamedTuple):
    """What a kernel makes of a tile; valid until the next one is finished."""

    packed: Array  # rows of packed codes
    scales: Array  # (rows, groups) words
    sound: bool = True  # False: a number is NaN or infinite, and `faults` finds out which


class Rows(Protocol):
    """A weight that is read some rows at a time, in as many passes as it takes."""

    def read(self, buffer: Array, row: int) -> None:
        """Read the next rows of a pass; it begins with row 0."""

    def peek(self, buffer: Array, row: int) -> None:
        """Read any rows, outside of a pass."""


class Curvature(Protocol):
    """The curvature of a weight, beside its rows."""

    def read(self, row: int, count: int, room: Room) -> CurvatureTile:
        """Read the next rows of a pass; it begins with row 0."""

    def peek(self, starts: Sequence[int], count: int, room: Room) -> CurvatureTile:
        """Read `count` rows from each of `starts` on, outside of a pass."""

    def check(self, words: Array, row: int) -> None:
        """Raise if a value is negative, NaN or infinite."""


# Takes base, tile by tile, and the first row of each; a pass begins with row 0.
Sink = Callable[[TileResult, int], None]


class TileKernel(Protocol):
    """Splits one tile after another; a worker has one of its own."""

    depth: int  # tiles that are begun before the first of them is finished
    sizes: Sizes
    part: Part  # of the sizes
    held: Buffers  # of a whole weight

    def room(self) -> Room:
        """Give the buffers of the next tile; they are in use until it is finished."""

    def begin(self, task: SplitTask, tile: Tile) -> Any:
        """Begin to split a tile."""

    def finish(self, task: SplitTask, pending: Any, select: TopK, sums: Array) -> TileResult:
        """Finish it: add to `sums`, and hand what may be kept to `select`."""


class Inputs(NamedTuple):
    """What a weight is read from."""

    rows: Rows
    curvature: Curvature | None = None
    reference: Rows | None = None  # what base is made of instead


class Buffers:
    """Buffers of one worker, used again: fresh pages cost more than the arithmetic."""

    def __init__(self) -> None:
        """Start without one."""
        self._held: dict[str, Array] = {}

    def __call__(self, name: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """Hand out the buffer of this name, whatever is in it."""
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        if name not in self._held or self._held[name].size < nbytes:
            self._held[name] = self.allocate(nbytes)
        return self._held[name][:nbytes].view(dtype).reshape(shape)

    def allocate(self, nbytes: int) -> Array:
        """Take fresh memory."""
        return np.empty(nbytes, np.uint8)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(array.nbytes for array in self._held.values())


class HostKernel:
    """What the kernels of the CPU share: each takes one tile at a time, all of it in `finish`."""

    depth = 1

    def __init__(self, sizes: Sizes = DEFAULT_SIZES, *, part: Part = "split") -> None:
        """Say how large tiles are; start without buffers."""
        self.sizes, self.part, self.held = sizes, part, Buffers()

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return self.held.nbytes

    def room(self) -> Room:
        """Give the buffers of the next tile."""
        return self.held

    def begin(self, task: SplitTask, tile: Tile) -> Tile:
        """Leave it to `finish`."""
        return tile


def as_bytes(array: Array) -> memoryview:
    """Look at an array's bytes in place."""
    return array.reshape(-1).view(np.uint8).data


def check_group_size(in_features: int, group_size: int, name: str = "weight") -> None:
    """Refuse a group size that does not divide, and name those that do."""
    if group_size <= 0 or group_size % 8 or in_features % group_size:
        known = [size for size in (256, 128, 64, 32, 16, 8) if in_features % size == 0]
        raise RecipeError(
            f"group_size {group_size} does not divide in_features {in_features} of `{name}`",
            hint=f"sizes that do: {', '.join(map(str, known))}"
            if known
            else "no multiple of 8 divides it; leave the layer out with `ignore`",
        )


def columns_of(density: float, in_features: int, max_rank: int | None = None) -> int:
    """Say how many whole columns of a weight a density keeps: the nearest number, at most the rank.

    Args:
        density: share of the weights, in [0, 1].
        in_features: columns of the weight.
        max_rank: the most columns; None for as many as there are.
    """
    found = round(density * in_features)
    return found if max_rank is None else min(found, max_rank)


def check_structure(structure: str, max_rank: int | None) -> None:
    """Refuse a structure that there is not, and a rank that bounds nothing."""
    if structure not in ("points", "columns"):
        raise RecipeError(f"structure is {structure!r}", hint="points or columns")
    if max_rank is not None and (structure != "columns" or max_rank < 1):
        raise RecipeError(
            f"max_rank is {max_rank} and structure is {structure}",
            hint="at least 1, with structure columns",
        )


def check_bits(in_features: int, bits: int, name: str = "weight") -> None:
    """Refuse a width of codes that base cannot have, or that does not fill the words of a row."""
    if bits not in (3, 4):
        raise RecipeError(f"bits is {bits!r} for `{name}`", hint="3 or 4")
    if in_features * bits % 32:
        raise RecipeError(
            f"bits is {bits} for `{name}`, whose in_features {in_features} does not divide by 32 "
            "(as many codes of 3 bits fill three words)",
            hint="give it 4 bits, or leave the layer out with `ignore`",
        )
