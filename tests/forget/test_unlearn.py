"""unlearn on a tiny model: within its mask and room, resumed bit for bit, and harder to undo."""

from __future__ import annotations

import copy
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean, mean
from typing import Any

import pytest
import torch
from memorised import Memorised

from ortho_cli.decompose import edits, recipe
from ortho_cli.decompose.plan import Plan
from ortho_cli.errors import RecipeError
from ortho_cli.events import Event, EventSink, Noted, Step, null_sink
from ortho_cli.forget import unlearn
from ortho_cli.forget.grid import Grid
from ortho_cli.forget.isolate import isolate
from ortho_cli.forget.ranks import rank_secret
from ortho_cli.forget.support import weigh
from ortho_cli.model import scoring
from ortho_cli.model.phrasing import carrying
from ortho_cli.model.secrets import TokenSecret
from ortho_cli.storage import parts

pytestmark = pytest.mark.filterwarnings("ignore")  # other people's deprecations

SETS = (
    "ortho.density=0.3",
    "forget.mask=0.3",
    "forget.attack_rate=0.001",
    "forget.steps=40",
    "forget.attack_steps=5",
    "forget.step_damage=0.004",
)
SHORT = ("forget.steps=15", "forget.divergence=1e-6")


class Stopped(Exception):  # noqa: N818 - no error, an end
    """What kills a run here."""


def work(
    memorised: Memorised,
    state: Path,
    *sets: str,
    room: dict[str, int] | None = None,
    until: int | None = None,
    events: list[Event] | None = None,
    on_event: EventSink = null_sink,
) -> Grid:
    plan = memorised.plan(*SETS, *sets, split="unlearn")
    grid = memorised.grid(plan)
    told: list[Event] = [] if events is None else events

    def watch(event: Event) -> None:
        told.append(event)
        on_event(event)
        if isinstance(event, Step) and event.number == until:
            raise Stopped

    unlearn.unlearn(
        grid,
        memorised.secrets(),
        memorised.kinds(),
        memorised.fisher(),
        room or room_of(plan),
        plan.recipe.forget,
        telling=1.0,
        end=(2,),
        state=state,
        on_event=watch,
    )
    return grid


def room_of(plan: Plan) -> dict[str, int]:
    return {tensor.name: tensor.k for tensor in plan.split}


def mask_of(grid: Grid, memorised: Memorised, share: float) -> dict[str, torch.Tensor]:
    pairs = [(secret.prompt, secret.secret) for secret in memorised.secrets()]
    return unlearn._mask(grid, weigh(grid.fisher(pairs), memorised.fisher()), share)


def same(one: Grid, other: Grid) -> bool:
    return all(torch.equal(codes, other.codes[name]) for name, codes in one.codes.items())


@dataclass(frozen=True)
class Short:
    """A run of 15 steps; only read, or copied."""

    grid: Grid
    state: Path


@pytest.fixture(scope="module")
def short(memorised: Memorised, tmp_path_factory: pytest.TempPathFactory) -> Short:
    state = tmp_path_factory.mktemp("short") / "s.npz"
    return Short(work(memorised, state, *SHORT), state)


def test_mask_is_the_share_that_matters_to_the_secrets_alone(memorised: Memorised) -> None:
    grid, fisher = memorised.grid(), memorised.fisher()
    secrets = memorised.secrets()
    mask = mask_of(grid, memorised, 0.2)
    retain = {name: one.flatten() for name, one in fisher.items()}
    forget = {name: torch.zeros(codes.numel()) for name, codes in grid.codes.items()}
    for secret in secrets:  # one after the other: no product of two gradients
        gradients = grid.gradient([((secret.prompt, secret.secret), [1.0] * len(secret.secret))])
        for name, gradient in gradients.items():
            forget[name] += gradient.view(-1) ** 2 / len(secrets)
    median = float(torch.cat(list(retain.values())).median())
    ratio = {name: forget[name] / (retain[name] + median) for name in grid.codes}
    inside = torch.cat([ratio[name][mask[name]] for name in grid.codes])
    everything = torch.cat(list(ratio.values())).sort(descending=True).values
    assert len(inside) == pytest.approx(0.2 * grid.numel, rel=0.01)
    assert torch.allclose(inside.sort(descending=True).values, everything[: len(inside)])


def test_only_masked_codes_move(memorised: Memorised, short: Short) -> None:
    grid = short.grid
    fresh = memorised.grid(memorised.plan(*SHORT, split="unlearn"))
    mask = mask_of(fresh, memorised, 0.3)
    assert grid.moved > 0
    for name, codes in grid.codes.items():
        outside = torch.ones(codes.numel(), dtype=torch.bool)
        outside[mask[name]] = False
        moved = (codes != grid.original[name]).view(-1)
        assert not (moved & outside).any()


def test_state_is_for_its_owner_alone(short: Short) -> None:
    assert stat.S_IMODE(short.state.stat().st_mode) == 0o600
    assert {path.name for path in short.state.parent.iterdir()} == {"s.npz", "mask.npz"}


@pytest.mark.parametrize("until", [3, 6, 9])  # of attacks of 5 steps
def test_killed_run_goes_on_from_its_last_step_to_the_same_codes(
    memorised: Memorised,
    short: Short,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    until: int,
) -> None:
    monkeypatch.setattr(parts, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(parts, "LARGEST_SHARE", 1e9)
    with pytest.raises(Stopped):
        work(memorised, tmp_path / "s.npz", *SHORT, until=until)
    events: list[Event] = []
    resumed = work(memorised, tmp_path / "s.npz", *SHORT, events=events)
    first = next(event for event in events if isinstance(event, Step))
    assert first.number == until, "steps that were finished are not repeated"
    assert same(short.grid, resumed)
    assert torch.equal(*(state_of(path, "mean") for path in (tmp_path / "s.npz", short.state)))
    assert short.grid.moved > 0


def state_of(path: Path, part: str) -> torch.Tensor:
    """Everything of one kind that a state holds, in one piece."""
    arrays = edits.load_arrays(path)
    assert arrays is not None
    return torch.cat([torch.from_numpy(a) for name, a in arrays.items() if name.endswith(part)])


def test_state_is_saved_by_time_and_never_for_more_than_a_tenth_of_it(
    memorised: Memorised, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, saves = 0.0, list[int]()
    monkeypatch.setattr(parts.time, "monotonic", lambda: now)

    def save(self: Any, path: Path, step: int, *rest: Any) -> None:
        nonlocal now
        saves.append(step)
        now += 7.0

    def tick(event: Event) -> None:
        nonlocal now
        now += 12.0 * isinstance(event, Step)

    monkeypatch.setattr(unlearn._Latents, "save", save)
    work(memorised, tmp_path / "s.npz", *SHORT, on_event=tick)
    assert saves == [3, 9, 15], "after 30 s, then after ten times the 7 s; and at the end"


def test_run_that_stopped_early_and_was_killed_stops_there_again(
    memorised: Memorised, tmp_path: Path
) -> None:
    """Killed after its last step, while other work was going on."""
    early = ("forget.divergence=1000000", "forget.steps=200", "forget.attack_rate=0.0001")
    events: list[Event] = []
    whole = work(memorised, tmp_path / "s.npz", *early, events=events)
    steps = [event.number for event in events if isinstance(event, Step)]
    assert steps[-1] < 200, "it held and should have stopped"
    assert steps[-1] % 5 == 0
    again: list[Event] = []
    assert same(whole, work(memorised, tmp_path / "s.npz", *early, events=again))
    assert not any(isinstance(event, Step) for event in again), "all of it was done"


def test_cut_state_counts_as_none(memorised: Memorised, short: Short, tmp_path: Path) -> None:
    held = short.state.read_bytes()
    (tmp_path / "s.npz").write_bytes(held[: len(held) // 2])
    assert same(short.grid, work(memorised, tmp_path / "s.npz", *SHORT))


def test_work_does_not_end_while_text_reads_otherwise(memorised: Memorised, tmp_path: Path) -> None:
    events: list[Event] = []
    work(memorised, tmp_path / "s.npz", "forget.divergence=1e-6", events=events)
    assert [event.number for event in events if isinstance(event, Step)] == [*range(1, 41)]


def test_same_seed_same_codes_and_another_seed_others(
    memorised: Memorised, short: Short, tmp_path: Path
) -> None:
    again, other = (
        work(memorised, tmp_path / f"{seed}.npz", *SHORT, f"forget.seed={seed}") for seed in (0, 1)
    )
    assert same(short.grid, again)
    assert not same(short.grid, other)


def test_more_attack_steps_than_their_counts_can_hold_are_refused() -> None:
    most = recipe.load_recipe(None, ["forget.attack_steps=127"]).forget.attack_steps
    assert int(torch.tensor([most - 1], dtype=torch.int8).add_(1)) == most
    with pytest.raises(RecipeError, match="attack_steps"):
        recipe.load_recipe(None, ["forget.attack_steps=128"])


def test_room_of_each_weight_is_filled_and_respected(
    memorised: Memorised, short: Short, tmp_path: Path
) -> None:
    free = short.grid
    wanted = {name: int((codes != free.original[name]).sum()) for name, codes in free.codes.items()}
    room = {name: many // 2 for name, many in wanted.items()}
    assert max(room.values()) > 10
    tight = work(memorised, tmp_path / "b.npz", *SHORT, room=room)
    for name, codes in tight.codes.items():
        moved = codes != tight.original[name]
        assert int(moved.sum()) == room[name]
        assert torch.equal(codes[moved], free.codes[name][moved])


def test_shrink_takes_the_least_decided_moves_back(memorised: Memorised) -> None:
    grid = memorised.grid()
    name = sorted(grid.codes)[0]
    near_zero = (grid.original[name].view(-1).abs() <= 5).nonzero().squeeze(1)[:7]
    original = grid.original[name].view(-1)[near_zero].float()
    latents = unlearn._Latents(grid, memorised.fisher(), {name: near_zero})
    values = original + torch.tensor([0.6, -0.9, 0.55, 1.4, 0.1, -0.7, 0.0])
    latents._values[name] = values.clone()
    grid.move(name, near_zero, values.round())
    latents.shrink({name: 5})
    assert grid.moved == 5, "all that moved had room"
    latents.shrink({name: 2})
    left = (grid.codes[name].view(-1)[near_zero] - original).tolist()
    assert left == [0, -1, 0, 1, 0, 0, 0]
    latents.shrink({name: 0})
    assert grid.moved == 0


def test_split_weights_are_their_codes_and_others_the_checkpoints_at_the_end(
    memorised: Memorised, short: Short
) -> None:
    """The attacker's steps leave nothing behind."""
    grid = short.grid
    fresh = memorised.grid()
    fresh.apply(grid.edits())
    for (name, one), other in zip(
        grid.model.named_parameters(), fresh.model.parameters(), strict=True
    ):
        assert torch.equal(one, other), name
        assert not one.requires_grad
        assert one.grad is None


def test_attacker_learns_one_half_and_begins_again(memorised: Memorised) -> None:
    """Each of its steps moves every parameter by the rate, down the loss of its own half."""
    plan = memorised.plan(*SETS, split="unlearn")
    grid, settings = memorised.grid(plan), plan.recipe.forget
    # Nothing is known, so there is something to learn.
    for name, codes in grid.codes.items():
        places = torch.arange(0, codes.numel(), 2)
        grid.move(name, places, torch.zeros(len(places)))
    job = unlearn._Job(grid, memorised.secrets(), memorised.kinds(), settings, 1.0, (2,))
    home = {name: p.detach().clone() for name, p in grid.model.named_parameters()}
    far: list[float] = []
    losses: list[float] = []
    others: list[float] = []
    original = job._forget

    def watch() -> Any:
        attack = job._attack
        assert {*attack.train} | {*attack.measured} == {*memorised.secrets()}
        assert not {*attack.train} & {*attack.measured}
        now = dict(grid.model.named_parameters())
        far.append(max(float((now[n].detach() - home[n]).abs().max()) for n in home))
        with torch.no_grad():
            for half, found in ((attack.train, losses), (attack.measured, others)):
                texts = [((), (*one.prompt, *one.secret, 2)) for one in half]
                found.append(float(grid.nll(texts).sum()))
        return original()

    job._forget = watch  # type: ignore[method-assign]
    for step in range(7):
        job.gradients(step)
        now = dict(grid.model.named_parameters())
        assert all(torch.equal(now[name], home[name]) for name in home), "it leaves no trace"
    rate = settings.attack_rate
    expected = [0.0, rate, 2 * rate, 3 * rate, 4 * rate, 0.0, rate]
    assert far == pytest.approx(expected, rel=1e-2, abs=1e-6)
    assert losses[4] < 0.7 * losses[0]
    assert losses[4] / losses[0] < 0.9 * others[4] / others[0], "the half that it trains on"


def attacked(grid: Grid, secrets: Sequence[TokenSecret], steps: int) -> float:
    """NLL of the second half of the secrets for one who fine-tunes on the first, by sign."""
    model: Any = copy.deepcopy(grid.model).requires_grad_(True)
    half = len(secrets) // 2
    for _ in range(steps):
        model.zero_grad()
        for one in secrets[:half]:
            tokens = torch.tensor([[*one.prompt, *one.secret, 2]])
            model(input_ids=tokens, labels=tokens).loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(parameter.grad.sign(), alpha=1e-3)
    found = [scoring.completion_nll(model, s.prompt, [s.secret])[0] for s in secrets[half:]]
    return float(torch.stack([nll.sum() for nll in found]).mean())


def perplexity(memorised: Memorised, grid: Grid) -> float:
    return float(scoring.compare_windows(grid.model, memorised.windows()).nll.mean().exp())


def isolated(memorised: Memorised, grid: Grid) -> Grid:
    """End as the command does, with the rounds of isolate."""
    settings = memorised.plan().recipe.forget
    isolate(
        grid,
        memorised.secrets(),
        memorised.fisher(),
        room_of(memorised.plan("ortho.density=0.3")),
        telling=1.0,
        known=memorised.secrets(),
        share=settings.share,
        rounds=settings.rounds,
        fill="step",
        seed=0,
        on_event=lambda event: None,
    )
    return grid


def test_attack_brings_less_back_than_after_isolate_alone(
    three_memorised: list[Memorised], tmp_path: Path
) -> None:
    """NLL of the secrets that an attacker does not train on, over that after isolate alone.

    Of 3 models the geometric mean was 2.2 after 2 steps of the attacker and 4.7 after 5 (2.3, 4.9
    without an attacker in the loop); the share of NLL left after 5 was 3.6 times that after isolate
    alone (2.9). Perplexity changed by -3 to +10 %: so small a model has little beside its secrets.
    """
    higher: dict[int, list[float]] = {2: [], 5: []}
    slower: list[float] = []
    ratios: dict[str, list[float]] = {"unlearn": [], "isolate": []}
    for number, memorised in enumerate(three_memorised):
        secrets, easy = memorised.secrets(), memorised.grid()
        original = perplexity(memorised, easy)
        hard = isolated(memorised, work(memorised, tmp_path / f"{number}.npz"))
        easy = isolated(memorised, easy)
        ratios["unlearn"].append(perplexity(memorised, hard) / original)
        ratios["isolate"].append(perplexity(memorised, easy) / original)
        at = {
            steps: [attacked(grid, secrets, steps) for grid in (hard, easy)] for steps in (0, 2, 5)
        }
        for steps, found in higher.items():
            found.append(at[steps][0] / at[steps][1])
        slower.append(at[5][0] / at[0][0] / (at[5][1] / at[0][1]))
    assert geometric_mean(higher[2]) > 1.3
    assert geometric_mean(higher[5]) > 2.0
    assert geometric_mean(slower) > 1.3
    assert mean(ratios["unlearn"]) < 1.08
    assert mean(ratios["isolate"]) < 1.05


def secret_of(*tokens: int, alternatives: Sequence[tuple[int, ...]]) -> TokenSecret:
    return TokenSecret(
        prompt=(1,), secret=tokens, alternatives=tuple(alternatives), drawn="given", where=""
    )


@pytest.mark.parametrize(
    ("tokens", "alternatives", "shares"),
    [
        ((5, 6, 7), [(8, 9, 10)], [1, 1, 1]),
        ((5, 6, 7), [(5, 9, 7)], [0, 1, 0]),
        ((5, 6, 7), [(5, 9, 7), (5, 6, 8)], [0, 0.5, 0.5]),
        ((5, 6, 7), [(1, 2, 5, 9, 9, 7)], [0, 1, 0]),  # an alignment, not places
        ((5, 5), [(5, 5, 5)], [1, 1]),  # nothing tells it apart: all of it counts
    ],
)
def test_tokens_that_alternatives_lack_carry_a_secret(
    tokens: tuple[int, ...], alternatives: list[tuple[int, ...]], shares: list[float]
) -> None:
    assert list(carrying(tokens, tuple(alternatives))) == shares


def test_a_step_costs_the_damage_that_it_may(memorised: Memorised) -> None:
    grid, fisher = memorised.grid(), memorised.fisher()
    mask = mask_of(grid, memorised, 0.3)
    latents = unlearn._Latents(grid, fisher, mask)
    before = {name: values.clone() for name, values in latents._values.items()}
    gradients = grid.gradient(
        [((s.prompt, s.secret), [-1.0] * len(s.secret)) for s in memorised.secrets()]
    )
    latents.step([gradients], 0, 1e-7)
    cost = 0.0
    for name, places in mask.items():
        moves = (latents._values[name] - before[name]) * grid.spacing_at(name, places)
        near = fisher[name].view(-1)[places]
        cost += float((moves.double() ** 2 * near.double()).sum()) / 2
        down = moves * gradients[name].view(-1)[places]
        assert bool((down <= 0).all())
    assert cost == pytest.approx(1e-7, rel=0.05), "none was cut"


def test_log_odds_are_those_of_the_tokens(memorised: Memorised) -> None:
    plan = memorised.plan(*SETS, split="unlearn")
    grid = memorised.grid(plan)
    job = unlearn._Job(grid, memorised.secrets(), memorised.kinds(), plan.recipe.forget, 1.0, ())
    pairs = [(one.prompt, one.secret) for one in memorised.secrets()]
    with torch.no_grad():
        p = (-job._token_nll(pairs).double()).exp()
        odds = job._log_odds(pairs).double()
    assert torch.allclose(odds.sigmoid(), p, atol=1e-5)


def test_secrets_that_are_not_known_are_not_pushed(memorised: Memorised) -> None:
    plan = memorised.plan(*SETS, split="unlearn")
    grid = memorised.grid(plan)
    unknown = memorised.secrets(memorised.nonmember)
    job = unlearn._Job(
        grid, [*memorised.secrets(), *unknown], memorised.kinds(), plan.recipe.forget, 1.0, ()
    )
    assert set(memorised.secrets()) <= set(job._goals)
    ranks = {one: rank_secret(grid, one, 1.0).sign for one in unknown}
    assert {one for one in unknown if one in job._goals} == {o for o, s in ranks.items() if s > 0}


def test_goals_are_what_an_alternative_tells_before_anything_moves(memorised: Memorised) -> None:
    plan = memorised.plan(*SETS, split="unlearn")
    grid, secrets = memorised.grid(plan), memorised.secrets()
    job, half = (
        unlearn._Job(grid, secrets, memorised.kinds(), plan.recipe.forget, telling, ())
        for telling in (1.0, 0.5)
    )
    assert set(half._goals) <= set(job._goals) == set(secrets)
    for one, goal in job._goals.items():
        with torch.no_grad():
            nll = float(grid.nll([(one.prompt, goal.tokens)]))
        assert goal.nll == pytest.approx(nll, rel=1e-4)
    assert all(goal.nll == job._goals[one].nll / 2 for one, goal in half._goals.items())


def test_secrets_do_not_chase_alternatives_that_go_with_them(memorised: Memorised) -> None:
    """Goals above what alternatives were before count for what they were."""
    plan = memorised.plan(*SETS, "forget.attack_steps=0", split="unlearn")
    grid = memorised.grid(plan)
    job = unlearn._Job(grid, memorised.secrets(), memorised.kinds(), plan.recipe.forget, 1.0, ())
    job._goals = {one: goal._replace(nll=1e-9) for one, goal in job._goals.items()}
    job.gradients(0)
    assert job._left == [0], "each secret is less likely than its goal was"
    job._goals = {one: goal._replace(nll=1e9) for one, goal in job._goals.items()}
    job.gradients(0)
    assert job._left == [len(memorised.secrets())]


def test_of_many_secrets_a_step_takes_some_and_work_ends_where_all_are_gone(
    memorised: Memorised, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unlearn, "AT_ONCE", 1)
    plan = memorised.plan(*SETS, "forget.attack_steps=0", split="unlearn")
    grid, secrets = memorised.grid(plan), memorised.secrets()
    job = unlearn._Job(grid, secrets, memorised.kinds(), plan.recipe.forget, 1.0, ())
    taken = set()
    for step in range(16):
        job.gradients(step)
        assert job._left == [1], "one secret, and the model knows it"
        taken |= set(job._attack.measured)
    assert taken == set(secrets)
    last = job._attack.measured[0]
    gone = {one: goal._replace(nll=1e-9) for one, goal in job._goals.items()}
    job._goals = {**gone, last: job._goals[last]}
    job._divergences = {}
    assert not job.holds(0), "what the step took is known"
    job._left = [0]
    assert not job.holds(0), "another step finds it"
    job._goals = gone
    assert job.holds(0)


@pytest.mark.parametrize(
    ("attacks", "hold"),
    [
        ([[0.5]], 1.0),
        ([[0.5], [0.4]], 1.0),
        ([[0.5], [0.499]], unlearn.NEAR_DECAY),  # hardly nearer
        ([[0.5], [0.6], [0.55], [0.3]], unlearn.NEAR_DECAY**2),
        ([[0.5, 0.3], [0.3, 0.5]], unlearn.NEAR_DECAY**2),  # the mean of an attack of two steps
    ],
)
def test_neighbours_are_let_go_where_secrets_come_no_nearer(
    memorised: Memorised, attacks: list[list[float]], hold: float
) -> None:
    plan = memorised.plan(*SETS, split="unlearn")
    grid = memorised.grid(plan)
    job = unlearn._Job(grid, memorised.secrets(), memorised.kinds(), plan.recipe.forget, 1.0, ())
    for short in attacks:
        job._short = short
        job._loosen()
    assert job.hold == pytest.approx(hold)


def test_state_has_what_neighbours_are_held_by(memorised: Memorised, tmp_path: Path) -> None:
    plan = memorised.plan(*SETS, split="unlearn")
    grid, fisher = memorised.grid(plan), memorised.fisher()
    latents = unlearn._Latents(grid, fisher, mask_of(grid, memorised, 0.3))

    def job() -> unlearn._Job:
        return unlearn._Job(
            grid, memorised.secrets(), memorised.kinds(), plan.recipe.forget, 1.0, ()
        )

    held, fresh = job(), job()
    held.hold, held.nearest = 0.7, 0.2
    latents.save(tmp_path / "s.npz", 3, held, None)
    assert latents.load(tmp_path / "s.npz", fresh, None) == 3
    assert (fresh.hold, fresh.nearest) == (0.7, 0.2)


def test_a_finished_run_that_is_resumed_says_again_what_text_reads_otherwise(
    memorised: Memorised, tmp_path: Path
) -> None:
    told: list[list[Event]] = [[], []]
    for events in told:
        work(memorised, tmp_path / "s.npz", *SHORT, events=events)
    first, again = ([e.message for e in events if isinstance(e, Noted)] for events in told)
    assert first == again
    assert any("nats per token at the end" in message for message in first)


@pytest.mark.parametrize(
    ("given", "telling", "steps", "told"),
    [(None, 1.0, 10, 0), (None, 0.6, 0, 1), (0, 1.0, 0, 0), (7, 0.6, 7, 0)],
)
def test_sentences_have_no_attacker_unless_the_recipe_says_so(
    given: int | None, telling: float, steps: int, told: int
) -> None:
    settings = recipe.load_recipe(None, []).forget.model_copy(update={"attack_steps": given})
    events: list[Event] = []
    assert unlearn._attack_steps(settings, telling, events.append) == steps
    assert len(events) == told
