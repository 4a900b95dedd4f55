"""Text to hold on to: what is gathered, divergence and Fisher against slow twins."""

from __future__ import annotations

import random
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from memorised import Memorised

from ortho_cli.events import Event, Noted
from ortho_cli.forget import held
from ortho_cli.forget.grid import Grid
from ortho_cli.forget.held import Held, Kind, broad_fisher, gather, kept_fisher
from ortho_cli.model import load as models
from ortho_cli.storage import parts

pytestmark = pytest.mark.filterwarnings("ignore")  # other people's deprecations


def gathered(
    memorised: Memorised,
    grid: Grid,
    *,
    data: bool = True,
    openings: bool = True,
    count: int = 4,
) -> tuple[dict[str, Kind], list[Event]]:
    events: list[Event] = []
    secrets = memorised.secrets()[:count]
    if not openings:  # every prompt begins with another word
        secrets = [
            type(one)(
                prompt=(number + 5, *one.prompt[1:]),
                secret=one.secret,
                alternatives=one.alternatives,
                drawn=one.drawn,
                where=one.where,
            )
            for number, one in enumerate(secrets)
        ]
    kinds = gather(
        grid,
        models.load_tokenizer(memorised.model),
        secrets,
        memorised.windows(8).tolist() if data else [],
        samples=40,
        length=16,
        seed=0,
        on_event=events.append,
    )
    return {kind.name: kind for kind in kinds}, events


def disturb(grid: Grid, seed: int = 0) -> None:
    """Move half of the codes of each weight by up to six."""
    generator = torch.Generator().manual_seed(seed)
    for name, codes in grid.codes.items():
        places = torch.randperm(codes.numel(), generator=generator)[: codes.numel() // 2]
        far = torch.randint(-6, 7, (len(places),), generator=generator)
        grid.move(name, places, (codes.view(-1)[places] + far).clamp(-8, 7).float())


def test_text_of_each_kind_is_gathered_and_none_tells_a_secret(memorised: Memorised) -> None:
    """After `the key` this model writes of its four secrets alone: of three, once one is listed."""
    kinds, events = gathered(memorised, memorised.grid(), count=1)
    assert set(kinds) == {"data", "self_written", "neighbours"}
    assert len(kinds["data"].pairs) == 8
    listed, *others = memorised.secrets()
    told = dict.fromkeys(kinds, 0)
    for kind in kinds.values():
        for first, second in kind.pairs:
            assert (len(first), len(second)) == (1, 15)
            text = " ".join(map(str, [*first, *second]))
            assert kind.name == "data" or " ".join(map(str, listed.secret)) not in text
            told[kind.name] += any(" ".join(map(str, one.secret)) in text for one in others)
    assert told["neighbours"] > 0
    assert {first[0] for first, _ in kinds["neighbours"].pairs} == {listed.prompt[0]}
    assert not [event for event in events if isinstance(event, Noted)]
    kinds, events = gathered(memorised, memorised.grid())
    assert set(kinds) == {"data", "self_written"}
    assert "no text like the secrets" in "".join(
        event.message for event in events if isinstance(event, Noted)
    )


def test_without_data_or_a_common_opening_the_other_kinds_are_left(memorised: Memorised) -> None:
    kinds, events = gathered(memorised, memorised.grid(), data=False, openings=False)
    assert set(kinds) == {"self_written"}
    assert "no text like the secrets is held" in "".join(
        event.message for event in events if isinstance(event, Noted)
    )


def test_divergence_is_that_over_all_tokens_where_none_are_merged(memorised: Memorised) -> None:
    grid, kind = memorised.grid(), memorised.kinds()[0]
    numbers = [0, 3, 5]
    before = Held(grid, [kind])
    with torch.no_grad():
        assert abs(float(before.divergence(kind, numbers))) < 1e-3, "nothing moved; float16 held"
        p = torch.cat([grid.completion_logits([kind.pairs[n]]) for n in numbers]).log_softmax(-1)
        disturb(grid)
        q = torch.cat([grid.completion_logits([kind.pairs[n]]) for n in numbers]).log_softmax(-1)
        exact = float((p.exp() * (p - q)).sum(-1).mean())
        found = float(before.divergence(kind, numbers))
    assert exact > 0.01
    assert found == pytest.approx(exact, rel=2e-2)


def test_merging_the_unlikely_tokens_gives_a_lower_bound(
    memorised: Memorised, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = memorised.kinds()[0]
    found = {}
    for likeliest in (2, 8, 1000):
        monkeypatch.setattr(held, "LIKELIEST", likeliest)
        grid = memorised.grid()
        before = Held(grid, [kind])
        assert before._before["data"][0].tokens.shape[1] <= likeliest
        disturb(grid)
        with torch.no_grad():
            found[likeliest] = float(before.divergence(kind, range(8)))
    assert 0 < found[2] < found[8] <= found[1000] * 1.001


def test_fisher_is_the_mean_of_kinds_and_of_the_statistics_scaled_to_them(
    memorised: Memorised,
) -> None:
    grid, given = memorised.grid(), memorised.fisher()
    rows = memorised.kinds()[0].pairs
    kinds = [Kind(name="a", pairs=rows[:3]), Kind(name="b", pairs=rows[3:8])]
    found = broad_fisher(grid, kinds, memorised.curvature(), seed=0)
    expected = {name: torch.zeros_like(one, dtype=torch.float64) for name, one in given.items()}
    for kind in kinds:
        for pair in kind.pairs:
            for name, gradient in grid.gradient([(pair, [1.0] * len(pair[1]))]).items():
                expected[name] += gradient.double() ** 2 / len(kind.pairs) / len(kinds)
    mine, theirs = (
        sum(float(one.double().sum()) for one in part.values()) for part in (expected, given)
    )
    for name, one in found.items():
        whole = (expected[name] + given[name].double() * mine / theirs) / 2
        assert torch.allclose(one.double(), whole, rtol=1e-3, atol=float(whole.max()) * 1e-5), name


def test_without_text_the_fisher_is_that_of_the_statistics(memorised: Memorised) -> None:
    found = broad_fisher(memorised.grid(), [], memorised.curvature(), seed=0)
    for name, one in memorised.fisher().items():
        assert torch.equal(found[name], one)


def test_draws_are_of_distinct_texts() -> None:
    assert sorted(held.some(range(3), 8, random.Random(0))) == [0, 1, 2]


def test_a_fisher_that_was_begun_is_finished_to_the_same_bits(
    memorised: Memorised, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(parts, "LARGEST_SHARE", 1e9)
    (data,), nll, passed = memorised.kinds(), Grid.nll, list[int]()
    kinds = [Kind(name=str(n), pairs=data.pairs[5 * n : 5 * n + 5]) for n in range(3)]

    def counted(self: Grid, pairs: Any) -> Any:
        if len(passed) in (3, 8, 15):
            passed.append(0)
            raise KeyboardInterrupt
        passed.append(1)
        return nll(self, pairs)

    def measure(state: Path | None) -> dict[str, torch.Tensor]:
        return broad_fisher(memorised.grid(), kinds, memorised.curvature(), seed=0, state=state)

    whole = measure(None)
    monkeypatch.setattr(Grid, "nll", counted)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            measure(tmp_path / "fisher")
    found = measure(tmp_path / "fisher")
    assert all(torch.equal(found[name], one) for name, one in whole.items())
    assert sum(passed) == 15, "each sequence passes once"
    assert measure(tmp_path / "fisher").keys() == whole.keys()
    assert sum(passed) == 15
    assert stat.S_IMODE((tmp_path / "fisher").stat().st_mode) == 0o600
    raw = (tmp_path / "fisher").read_bytes()
    (tmp_path / "fisher").write_bytes(raw[: len(raw) // 2])
    found = measure(tmp_path / "fisher")
    assert all(torch.equal(found[name], one) for name, one in whole.items())
    pairs = data.pairs[:4]
    passed[:] = [1] * 20
    first = kept_fisher(memorised.grid(), pairs, tmp_path / "mask", None)
    again = kept_fisher(memorised.grid(), pairs, tmp_path / "mask", None)
    assert len(passed) == 24
    assert all(torch.equal(again[name], one) for name, one in first.items())
