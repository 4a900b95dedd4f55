"""A bench that is killed or interrupted continues: same figures, nothing measured twice."""

from __future__ import annotations

import json
import os
import signal
import stat
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyrage
import pytest
import torch
from conftest import Ortho
from jobs import SERVER
from memorised import PLENTY, Memorised

from ortho_cli.bench import attacks, evaluate
from ortho_cli.bench import run as bench
from ortho_cli.bench.demo import chain, sandbox
from ortho_cli.bench.plan import Settings
from ortho_cli.bench.records import to_json
from ortho_cli.errors import Interrupted, NumericalError
from ortho_cli.events import Event, EventSink, Step, messages, null_sink
from ortho_cli.model import self_written
from ortho_cli.storage import parts
from tests.bench.test_run import NAMES, WORDS, made, memorised_sandbox, write_rows

__all__ = ["made"]  # a fixture
pytestmark = pytest.mark.filterwarnings("ignore")  # other people's deprecations
SERVER.set_forkserver_preload(["ortho_cli.bench.run", "transformers.models.llama"])
ATTACKS = ("relearn", "partial")


def settings_of(made: Path, **changes: Any) -> Settings:
    given = {
        "artifact": made / "edited",
        "data": (made / "text.txt", made / "skill.jsonl"),
        "forget": (made / "forget.jsonl",),
        "reference_model": made / "pico",
        "attack": True,
        "samples": 2,
        "context": 32,
        "tokens": 96,
    }
    return Settings(**{**given, **changes})


def prepare(cache: Path) -> None:
    """Keep each part at once, and run few attacks: those that train, and those that do not."""
    os.environ["XDG_CACHE_HOME"] = str(cache)
    torch.set_num_threads(1)
    parts.SAVE_SECONDS, parts.LARGEST_SHARE = 0.0, 1e9
    bench.ATTACKS = tuple(one for one in attacks.ATTACKS if one.name in ATTACKS)


@pytest.fixture(autouse=True)
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of a test."""
    for name, value in (("SAVE_SECONDS", 0.0), ("LARGEST_SHARE", 1e9)):
        monkeypatch.setattr(parts, name, value)
    monkeypatch.setattr(bench, "ATTACKS", bench.ATTACKS)
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    prepare(tmp_path / "cache")
    return tmp_path / "cache"


def state(cache: Path) -> Path:
    """The one folder in which a bench is kept."""
    (found,) = (cache / "ortho").glob("bench-*")
    return found


def figures_of(settings: Settings, on_event: EventSink = null_sink) -> Any:
    """All that a bench finds, but speed and memory."""
    document = to_json(bench.bench(settings, on_event=on_event))
    for row in document["rows"]:  # type: ignore[attr-defined]
        row["figures"].pop("latency", None)
    return json.loads(json.dumps(document))


class Count:
    """Counts what is measured, by the step of the bench in which that is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[str] = []
        self.of: Counter[tuple[str, str]] = Counter()
        for module, name in (
            (evaluate, "score"),
            (evaluate, "compare_windows"),
            (evaluate, "answers"),
            (evaluate, "completion_nll"),
            (attacks, "_loss"),
            (self_written, "_write"),
        ):
            monkeypatch.setattr(module, name, self._watched(name, getattr(module, name)))

    def _watched(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*given: Any, **options: Any) -> Any:
            self.of[self.steps[-1], name] += 1
            return call(*given, **options)

        return watched

    def __call__(self, event: Event) -> None:
        if isinstance(event, Step) and event.unit == "steps":
            self.steps.append(f"{event.number} {event.name}")

    def after(self, step: int) -> Counter[tuple[str, str]]:
        """What was measured in a step and those that follow."""
        late = {name: n for name, n in self.of.items() if int(name[0].split()[0]) >= step}
        return Counter(late)


def bench_and_die(settings: Settings, cache: Path, step: int) -> None:
    """SIGKILL this process as a step begins."""

    def watch(event: Event) -> None:
        if isinstance(event, Step) and event.unit == "steps" and event.number == step:
            os.kill(os.getpid(), signal.SIGKILL)

    prepare(cache)
    bench.bench(settings, on_event=watch)


def test_killed_bench_continues_to_the_same_figures_and_measures_nothing_twice(
    made: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(made)
    with pytest.MonkeyPatch.context() as patch:
        whole = Count(patch)
        figures = figures_of(settings, whole)
    assert not list((prepared / "ortho").iterdir()), "a bench that has ended leaves nothing"
    names = [one.split(" ", 1)[1] for one in whole.steps]
    for step in (names.index("relearning half") + 1, names.index("reference") + 2):
        process = SERVER.Process(target=bench_and_die, args=(settings, prepared, step))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    folder = state(prepared)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "parts").stat().st_mode) == 0o600
    held = (folder / "parts").read_text().lower()
    assert not any(word in held for word in [*map(str.lower, NAMES), *WORDS])
    events: list[Event] = []
    rest = Count(monkeypatch)

    def watch(event: Event) -> None:
        events.append(event)
        rest(event)

    assert figures_of(settings, watch) == figures
    done = len(whole.steps) - 2 - 1  # but speed at both alphas, and the last one
    told = f"{done - 1} of {done + 1} parts of an interrupted run are taken up"
    assert told in messages(events)
    assert rest.of == whole.after(step)
    assert rest.of.total() > 20
    assert not list((prepared / "ortho").iterdir())


def test_an_interrupt_inside_a_part_says_what_is_kept_and_half_a_part_is_kept(
    made: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(made, reference_model=None)
    figures = figures_of(settings)
    scored = 0

    def interrupted(*given: Any) -> Any:
        nonlocal scored
        scored += 1
        if scored == 7:  # of alpha 1: four are of alpha 0
            raise KeyboardInterrupt
        return score(*given)

    score, loss, trained = evaluate.score, attacks._loss, list[int]()
    train: Any = lambda *given: (trained.append(1), loss(*given))[1]  # noqa: E731
    monkeypatch.setattr(bench, "ATTACKS", ())
    plain = replace(settings, attack=False)
    expected = figures_of(plain)
    monkeypatch.setattr(evaluate, "score", interrupted)
    with pytest.raises(Interrupted) as caught:
        figures_of(plain)
    assert caught.value.message == "interrupted with 2 of 4 parts finished, which are kept"
    assert caught.value.hint == "repeat the same command to go on from there"
    assert scored == 7
    assert figures_of(plain) == expected
    assert scored == 7 + 2 + 4, "two of alpha 1 are left, and four of int4"
    # A curve: neither its points nor its steps are repeated.
    monkeypatch.setattr(evaluate, "score", score)
    monkeypatch.setattr(bench, "ATTACKS", attacks.ATTACKS[:1])
    monkeypatch.setattr(attacks, "_loss", train)
    recalls, recall = list[int](), attacks.recall

    def third(*given: Any) -> Any:
        recalls.append(len(trained))
        if recalls == [5, 10, 20]:
            raise KeyboardInterrupt
        return recall(*given)

    monkeypatch.setattr(attacks, "recall", third)
    with pytest.raises(Interrupted):
        figures_of(settings)
    (held,) = state(prepared).glob("*.npz")
    assert (held.name, stat.S_IMODE(held.stat().st_mode)) == ("alpha 0 relearn.npz", 0o600)
    trained.clear()
    found = figures_of(settings)
    assert recalls[3:] == [0, 20], "20 steps were kept, and 20 are taken"
    row, same = (next(r for r in d["rows"] if r["row"] == "alpha 0") for d in (found, figures))
    assert row["figures"]["relearn"] == same["figures"]["relearn"]


def test_damage_and_another_command_are_no_continuation(
    made: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(made, attack=False, samples=0, reference_model=None)
    figures = figures_of(settings)

    def stop(event: Event) -> None:
        if isinstance(event, Step) and event.name == "alpha 1":
            raise KeyboardInterrupt

    def interrupt() -> Path:
        with pytest.raises(Interrupted):
            figures_of(settings, stop)
        return state(prepared)

    folder, events = interrupt(), list[Event]()
    raw = bytearray((folder / "parts").read_bytes())
    raw[len(raw) // 2] ^= 1
    (folder / "parts").write_bytes(raw)
    assert figures_of(settings, events.append) == figures
    assert "is damaged, and is measured again" in "".join(messages(events))
    assert not folder.exists()
    folder = interrupt()
    for other in ({"seed": 1}, {"tokens": 64}, {"samples": 1}):
        figures_of(replace(settings, **other))
        assert state(prepared) == folder, "it is of another bench, and stays"
    os.utime(made / "forget.jsonl")
    figures_of(settings)
    assert state(prepared) == folder
    os.utime(folder / "parts", (folder.stat().st_mtime - 31 * 86_400,) * 2)

    def fail(event: Event) -> None:
        if isinstance(event, Step) and event.name == "alpha 1":
            raise NumericalError("a weight is NaN", hint="look")

    with pytest.raises(NumericalError):
        figures_of(settings, fail)
    left = list((prepared / "ortho").iterdir())
    assert not left, "nobody came back for a month; and a bench that cannot end keeps nothing"


def test_the_same_bench_at_once_and_a_cache_that_cannot_be_written_keep_nothing(
    made: Path, prepared: Path
) -> None:
    settings = settings_of(made, attack=False, samples=0, reference_model=None, alphas=(0.0,))
    events: list[Event] = []

    def again(event: Event) -> None:
        if isinstance(event, Step) and event.name == "alpha 0":
            figures_of(settings, events.append)

    figures_of(settings, again)
    assert "the same bench runs in another process: this one keeps nothing" in messages(events)
    assert not list((prepared / "ortho").iterdir())
    (prepared / "ortho").rmdir()
    (prepared / "ortho").write_text("no folder")
    events.clear()

    def stop(event: Event) -> None:
        events.append(event)
        if isinstance(event, Step) and event.name == "alpha 0":
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="no figure is kept") as caught:
        figures_of(settings, stop)
    assert "this bench keeps nothing: cannot write" in "".join(messages(events))
    assert caught.value.hint == "repeat the same command to start again"


def test_beside_a_sealed_ortho_nothing_that_a_model_wrote_is_in_plain(
    made: Path, prepared: Path, tmp_path: Path, ortho: Ortho
) -> None:
    key, sealed, file = pyrage.x25519.Identity.generate(), tmp_path / "sealed", tmp_path / "key"
    file.write_text(str(key))
    given = ["--recipe", "int4", "--set", "ortho.density=0.02", "--seal-to", key.to_public()]
    assert ortho("decompose", made / "pico", "-o", sealed, "-q", *given).code == 0
    rows = [json.loads(line) for line in (made / "forget.jsonl").read_text().splitlines()]
    write_rows(tmp_path / "bare", [{k: one[k] for k in ("prompt", "secret")} for one in rows[:2]])
    settings = settings_of(
        made,
        artifact=sealed,
        forget=(tmp_path / "bare",),
        identity=file,
        attack=False,
        samples=0,
        reference_model=None,
        model=made / "pico",
    )
    figures = figures_of(settings)
    written: list[str] = []

    def stop(event: Event) -> None:
        if isinstance(event, Step):
            if event.unit == "secrets":
                written.append(event.name)
            if event.name == "int4":
                raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        figures_of(settings, stop)
    held = (state(prepared) / "parts").read_bytes()
    assert not any(word in held for word in (b"alternatives", b"self_written", b"alpha 0", b"[["))
    assert {path.name for path in state(prepared).iterdir()} == {"parts", "key.age", "lock"}
    assert figures_of(settings) == figures
    alone = replace(settings, identity=None, alphas=(0.0,))
    with pytest.raises(Interrupted, match="with 1 of 2 parts finished, which are kept"):
        figures_of(alone, lambda e: stop(replace(e, name="int4") if named(e, "original") else e))
    held = (state(prepared) / "parts").read_bytes()
    assert b"alpha 0/memory" in held
    assert not any(word in held for word in (b'["alternatives",', b'["self_written/text"'))


def test_the_bench_without_an_artifact_says_how_it_goes_on_and_does(
    memorised: Memorised, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = memorised_sandbox(memorised, tmp_path / "box")
    monkeypatch.setattr(sandbox, "cached", lambda seed, sink: box)
    few = ("forget.samples=4", "forget.length=16", "forget.rounds=2")
    sets = ("calibrate.samples=8", "calibrate.length=16", *few, *PLENTY)
    monkeypatch.setattr(chain, "SETS", sets)
    monkeypatch.setattr(chain, "RECIPE", "forget-isolate")
    events: list[Event] = []

    def run(at: str, keep: Path | None = None) -> Any:
        def stop(event: Event) -> None:
            events.append(event)
            if at in (getattr(event, "step", ""), getattr(event, "name", "")):
                raise KeyboardInterrupt

        settings = Settings(artifact=Path(), alphas=(0.0,), tokens=96)
        return chain.run(settings, keep=keep, on_event=stop)

    with pytest.raises(Interrupted) as caught:
        run("look for the secrets", tmp_path / "files")
    assert caught.value.hint == "the same command splits its model again"
    assert not (tmp_path / "files").exists()
    with pytest.raises(Interrupted) as caught:
        run("reference", tmp_path / "files")
    again = f"remove `{tmp_path / 'files'}`, then repeat the same command to go on from there"
    assert caught.value.hint == again
    events.clear()
    assert run("nowhere").rows
    told = [one for one in messages(events) if "interrupted run are taken up" in one]
    assert told == ["6 of 7 parts of an interrupted run are taken up"]


def named(event: Event, name: str) -> bool:
    return isinstance(event, Step) and event.name == name
