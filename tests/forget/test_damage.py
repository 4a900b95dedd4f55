"""Damage of forgetting: measured on text, judged by the worst kind."""

from __future__ import annotations

import math

import pytest
from memorised import Memorised

from ortho_cli.errors import GateError
from ortho_cli.events import Event, Noted
from ortho_cli.forget import damage
from ortho_cli.forget.held import Kind
from tests.forget.test_held import disturb

pytestmark = pytest.mark.filterwarnings("ignore")  # other people's deprecations


def test_damage_is_perplexity_over_that_before(memorised: Memorised) -> None:
    grid, rows = memorised.grid(), memorised.kinds()[0].pairs
    kinds = [Kind(name="a", pairs=rows[:3]), Kind(name="none", pairs=())]
    before = damage.measure(grid, kinds)
    tokens = sum(len(second) for _, second in rows[:3])
    assert before == {"a": pytest.approx(float(grid.nll(rows[:3]).sum()) / tokens, rel=1e-5)}
    disturb(grid)
    now = damage.measure(grid, kinds)
    assert damage.ratios(before, now) == {"a": pytest.approx(math.exp(now["a"] - before["a"]))}
    assert damage.ratios(before, before) == {"a": 1.0}


def test_the_kind_that_lost_most_is_named() -> None:
    for ratios in ({"data": 1.04, "self_written": 1.06}, {"data": 2.0, "self_written": math.nan}):
        with pytest.raises(GateError, match="perplexity of self_written text"):
            damage.judge(ratios, 1.03, accept=False, on_event=lambda event: None)


@pytest.mark.parametrize(
    ("worst", "refused"), [(1.0, False), (1.03, False), (1.031, True), (math.nan, True)]
)
def test_the_worst_kind_is_refused_above_the_bound(worst: float, refused: bool) -> None:
    events: list[Event] = []
    ratios = {"data": 0.99, "self_written": worst, "neighbours": 9.0, "alternatives": 9.0}
    if refused:
        with pytest.raises(GateError, match="perplexity of self_written text") as caught:
            damage.judge(ratios, 1.03, accept=False, on_event=events.append)
        assert "--accept-damage" in str(caught.value.hint)
        assert caught.value.exit_code == 10
    damage.judge(ratios, 1.03, accept=True, on_event=events.append)
    told = [event.message for event in events if isinstance(event, Noted)]
    assert "data 0.990, self_written" in told[0]
    assert ("accepted" in told[-1]) == refused
