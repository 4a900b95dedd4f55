"""Work in seconds: in proportion to the work, whatever the machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from ortho_cli.model import cost
from ortho_cli.model.cost import Part, Passes, Work
from ortho_cli.storage.checkpoint import TensorInfo
from ortho_cli.storage.speeds import Speeds, open_speeds

ONE = {(192, 64): 7}


def seconds(matrices: cost.Matrices = ONE, **work: object) -> float:
    return cost.seconds_of(Work(**work), matrices, open_speeds())  # type: ignore[arg-type]


def test_work_takes_time_in_proportion() -> None:
    once = seconds(passes=[Passes(1, 64)])
    assert seconds(passes=[Passes(10, 64)]) == pytest.approx(10 * once)
    assert seconds({(192, 64): 14}, passes=[Passes(1, 64)]) == pytest.approx(2 * once)
    assert seconds(passes=[Passes(1, 64), Passes(0, 64)]) == once
    assert seconds(passes=[Passes(1, 64)], calls=5) > once
    for what in ("draws", "elements", "file_bytes"):
        assert seconds(**{what: 3e9}) == pytest.approx(3.0)
    assert seconds() == 0


def test_longer_passes_than_are_timed_take_time_by_their_tokens() -> None:
    most = cost.MOST_ROWS["float32"]
    calls = seconds(calls=1)
    short, long = (seconds(passes=[Passes(1, tokens)]) for tokens in (most, 8 * most))
    assert long - calls == pytest.approx(8 * (short - calls))


def test_shapes_that_are_not_timed_count_by_their_weights() -> None:
    shapes = {(64 + 8 * i, 64): 1.0 for i in range(2 * cost.KINDS)}
    asked: list[str] = []

    class Watched(Speeds):
        def of(self, what: str, measure: object) -> float:
            asked.append(what)
            return 1e-6

    told = cost.seconds_of(Work(passes=[Passes(1, 64)]), shapes, Watched(Path(), {}))
    assert sum(" x 64, 64 tokens" in what for what in asked) == cost.KINDS
    weights = sorted((64 * out for out, _ in shapes), reverse=True)
    part = sum(weights) / sum(weights[: cost.KINDS]) * cost.KINDS * cost.BESIDE
    assert told == pytest.approx(1e-6 * (part + len(shapes) * cost.CALLS))


def test_dtype_direction_and_tokens_are_timed_apart(real_speeds: Path) -> None:
    known = open_speeds()
    small = {(8, 16): 1.0}
    for backward in (False, True):
        for half in (False, True):
            work = Work(passes=[Passes(1, 40, backward)])
            assert cost.seconds_of(work, small, known, half=half) > 0
    timed = set(known.seconds) - {"loop of Python"}
    assert timed == {
        f"{dtype}, 8 x 16, 32 tokens{back}"
        for dtype in ("float32", "bfloat16")
        for back in ("", ", and back")
    }
    rest = Work(draws=1, elements=1, file_bytes=1)
    assert 0 < cost.seconds_of(rest, small, known) < 1e-3
    again = open_speeds()
    assert again.seconds == known.seconds


def test_a_head_that_is_tied_to_the_embedding_multiplies_and_a_bare_embedding_does_not() -> None:
    def tensor(name: str, *shape: int) -> TensorInfo:
        return TensorInfo(name=name, dtype="F32", shape=shape, shard="x", offset=0, nbytes=0)

    embedding, head = tensor("model.embed_tokens.weight", 96, 8), tensor("lm_head.weight", 96, 8)
    others = [tensor("up.weight", 16, 8), tensor("norm.weight", 8), tensor("wpe.weight", 32, 8)]
    for listed in ([embedding, *others], [embedding, head, *others]):
        assert cost.matrices_of(listed) == {(96, 8): 1, (16, 8): 1}


def test_text_is_written_token_by_token_so_many_sequences_at_once() -> None:
    work = cost.writing(count=100, length=64, vocabulary=7)
    assert work.passes == (Passes(4 * 63, 25.0),)
    assert work.draws == 100 * 63 * 7


def test_parts_add_up() -> None:
    told = cost.to_json([Part("start", 2.0, 2.0), Part("forget", 5.0, 50.0)])
    assert told == {"seconds": 7.0, "at_most_seconds": 52.0, "parts": {"start": 2.0, "forget": 5.0}}


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "a second"),
        (89, "89 seconds"),
        (91, "2 minutes"),
        (4000, "67 minutes"),
        (9000, "2.5 hours"),
    ],
)
def test_time_is_told_in_words(seconds: float, words: str) -> None:
    assert cost.in_words(seconds) == words
