"""From work to seconds on this machine: the one place that estimates time.

    seconds = sum over passes of times * (Linears + calls) + draws + elements + bytes

Each factor is timed here, at the shapes, dtype and number of tokens that the work has, and kept
(`storage/speeds.py`): a product forward, or forward and backward; a call of Python; a token that
is drawn; a float32 that is read, changed and written; a byte through a file. What depends on text
or on weights has a typical number and a bound, and `Part` holds both.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from ortho_cli.storage.checkpoint import TensorInfo
from ortho_cli.storage.speeds import Speeds

BOTH = 3  # tokens of a pass with its backward pass, in tokens of forward passes
WINDOW = 0.04  # seconds that each piece is repeated; 30 pieces take a second or two
LARGEST = 1 << 22  # weights of a product that is timed; of a larger one, some rows
# Seconds of products before any is timed: on a busy machine torch's threads took ten times as long
# for the first quarter of a second as ever after.
WARM = 0.4
LONG = 5  # windows: of a piece that takes longer, one is timed
KINDS = 6  # shapes that are timed, the heaviest; others count by their weights
FEWEST_ROWS = 16  # tokens of a pass; fewer take as long
MOST_ROWS = {"float32": 512, "bfloat16": 128}  # from there on time grows with tokens
# Attention, norms and activations beside the Linears, in their time: SmolLM2-135M, 64 to 512
# tokens a sequence.
BESIDE = 1.3
# Python beside each Linear of a pass, in loops of LOOP: transformers' blocks call 30 functions.
CALLS = 0.03
BATCH = 32  # sequences that a model writes at once
BATCH_TOKENS = 2048  # more at once while they are short: so many tokens of them
LOOP = 100_000  # turns of the loop that tells how fast Python runs
TORCH = 200  # loops that importing torch takes
TRANSFORMERS = 350  # and transformers, with a tokenizer and the classes of a model
BARE = 80  # loops that any command takes to start
NUMBA = 120  # loops that loading numba and its kept machine code takes


class Passes(NamedTuple):
    """Passes through a model that are alike."""

    times: float
    tokens: float  # of each pass
    backward: bool = False

    @property
    def weighed(self) -> float:
        """Tokens of all, each backward pass as two forward ones."""
        return self.times * self.tokens * (BOTH if self.backward else 1)


class Part(NamedTuple):
    """A part of a command's work: what it does, its seconds here, and the most it may take."""

    name: str
    seconds: float
    at_most: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Work with a model in memory."""

    passes: Sequence[Passes] = ()
    draws: float = 0.0  # logits of which a token is drawn
    elements: float = 0.0  # float32 that are read, changed and written
    file_bytes: float = 0.0  # that are written and read again
    calls: float = 0.0  # of hooks and other Python, in Linears of a pass


Matrices = Mapping[tuple[int, int], float]  # Linears of a model: (out, in) -> how many


def matrices_of(tensors: Iterable[TensorInfo]) -> Matrices:
    """Count the Linears by which each token is multiplied, output head included.

    An embedding is one of them only where the head is tied to it. Experts count all: of a model
    that has them, the time is a bound.
    """
    wide = [one for one in tensors if len(one.shape) == 2 and min(one.shape) > 1]
    has_head = any("head" in one.name or one.name.startswith("output.") for one in wide)
    found: Counter[tuple[int, int]] = Counter()
    for one in wide:
        looked_up = any(word in one.name for word in ("embed", "wte")) and "head" not in one.name
        if not ("wpe" in one.name or (looked_up and has_head)):
            found[one.shape[0], one.shape[1]] += 1
    return found


def to_json(parts: Sequence[Part]) -> dict[str, object]:
    """Give `estimate` of `--dry-run --json`: seconds in all, the most, and of each part."""
    return {
        "seconds": round(sum(part.seconds for part in parts), 2),
        "at_most_seconds": round(sum(part.at_most for part in parts), 2),
        "parts": {part.name: round(part.seconds, 2) for part in parts},
    }


def in_words(seconds: float) -> str:
    """Say how long, to about a tenth."""
    if seconds < 90:
        return "a second" if seconds < 1.5 else f"{seconds:.0f} seconds"
    minutes = seconds / 60
    return f"{minutes:.0f} minutes" if minutes < 90 else f"{minutes / 60:.1f} hours"


def start_seconds(
    speeds: Speeds, *, torch: bool = True, transformers: bool = True, numba: bool = False
) -> float:
    """Seconds until a command begins to work: Python imports the libraries that it needs."""
    loops = BARE + TORCH * torch + TRANSFORMERS * transformers + NUMBA * numba
    return loops * _loop(speeds)


def load_seconds(speeds: Speeds, weights: int, nbytes: int) -> float:
    """Seconds to read a model into memory, in float32."""
    return 2 * weights * _element(speeds) + nbytes * _file_byte(speeds)


def seconds_of(work: Work, matrices: Matrices, speeds: Speeds, *, half: bool = False) -> float:
    """Turn work into seconds.

    Args:
        work: with the model of these Linears.
        matrices: as `matrices_of` counts them.
        speeds: of this machine.
        half: whether the model computes in bfloat16.
    """
    dtype = "bfloat16" if half else "float32"
    linears = sum(matrices.values())
    total = work.calls * linears * CALLS * _loop(speeds)
    for passes in work.passes:
        if passes.times:
            way = 2 if passes.backward else 1
            one = BESIDE * _products(speeds, matrices, passes, dtype)
            total += passes.times * (one + way * linears * CALLS * _loop(speeds))
    if work.draws:
        total += work.draws * speeds.of("logit", _time_draw)
    if work.elements:
        total += work.elements * _element(speeds)
    if work.file_bytes:
        total += work.file_bytes * _file_byte(speeds)
    return total


def at_once(length: int) -> int:
    """Say how many sequences of a length a model writes at once."""
    return max(BATCH, BATCH_TOKENS // length)


def writing(*, count: int, length: int, vocabulary: int) -> Work:
    """Work of a model that writes so many sequences; see `self_written.write_text`."""
    tokens = count * (length - 1)
    steps = -(-count // at_once(length)) * (length - 1)
    return Work(passes=(Passes(steps, tokens / steps),), draws=tokens * vocabulary)


def repeated(act: Callable[[], object], window: float = WINDOW) -> float:
    """Time an act: the mean of as many as fit into the window, at least two, after a first one.

    The mean, and not the best: a machine that others use is as slow as it is. Of an act that takes
    many windows the first one is enough: what it does once is a small part of it.
    """
    began = time.perf_counter()
    act()
    if (took := time.perf_counter() - began) > LONG * window:
        return took
    began, count = time.perf_counter(), 0
    while count < 2 or time.perf_counter() - began < window:
        act()
        count += 1
    return (time.perf_counter() - began) / count


def _products(speeds: Speeds, matrices: Matrices, passes: Passes, dtype: str) -> float:
    """Seconds of all Linears of one pass."""
    bound = min(max(passes.tokens, FEWEST_ROWS), MOST_ROWS[dtype])
    rows = 1 << round(math.log2(bound))
    widest = max((columns for _, columns in matrices), default=1)
    while rows > FEWEST_ROWS and rows * widest > LARGEST:
        rows //= 2
    weights = {shape: math.prod(shape) * count for shape, count in matrices.items()}
    heaviest = sorted(weights, key=lambda shape: (-weights[shape], shape))[:KINDS]
    total = 0.0
    for out, columns in heaviest:
        some = max(1, min(out, LARGEST // columns))
        backward = passes.backward
        timed = speeds.of(
            f"{dtype}, {some} x {columns}, {rows} tokens{', and back' * backward}",
            lambda: _time_product(some, columns, rows, dtype, backward=backward),  # noqa: B023
        )
        total += matrices[out, columns] * timed * out / some
    covered = sum(weights[shape] for shape in heaviest)
    longer = max(passes.tokens, FEWEST_ROWS) / rows
    return total * longer * sum(weights.values()) / max(1.0, covered)


@cache
def _warm_up() -> None:
    """Let torch's threads begin, once in a process."""
    import torch

    square, began = torch.ones(512, 512), time.perf_counter()
    while time.perf_counter() - began < WARM:
        torch.mm(square, square)


def _time_product(out: int, columns: int, rows: int, dtype: str, *, backward: bool) -> float:
    import torch

    _warm_up()
    kind = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    inputs = torch.randn(rows, columns).to(kind).requires_grad_(backward)
    weight = torch.randn(out, columns).to(kind).requires_grad_(backward)
    ones = torch.ones(rows, out, dtype=kind)

    def act() -> None:
        with torch.set_grad_enabled(backward):
            found = torch.nn.functional.linear(inputs, weight)
        if backward:
            torch.autograd.backward([found], [ones])
            inputs.grad = weight.grad = None

    return repeated(act)


def _loop(speeds: Speeds) -> float:
    return speeds.of("loop of Python", lambda: repeated(lambda: sum(i * i for i in range(LOOP))))


def _element(speeds: Speeds) -> float:
    return speeds.of("float32", _time_element)


def _time_element() -> float:
    import torch

    _warm_up()
    one, other = torch.ones(1 << 22), torch.zeros(1 << 22)
    return repeated(lambda: one.add_(other)) / one.numel()


def _time_draw() -> float:
    import torch

    _warm_up()
    logits = torch.randn(32, 1 << 14)
    return repeated(lambda: torch.multinomial(logits.softmax(-1), 1)) / logits.numel()


def _file_byte(speeds: Speeds) -> float:
    return speeds.of("byte of a file", _time_file)


def _time_file() -> float:
    content = bytearray(1 << 23)
    with tempfile.TemporaryFile() as file:

        def act() -> None:
            file.seek(0)
            file.write(content)
            file.seek(0)
            file.readinto(content)

        return repeated(act) / len(content)
