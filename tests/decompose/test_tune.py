"""Tuned rounding: each step against its slow twin, never worse, resumed bit for bit."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import reference
import torch
from families import saved
from hypothesis import given
from hypothesis import strategies as st
from jobs import SERVER, calibrate, decompose
from memorised import Memorised
from safetensors.torch import load_file
from torch import Tensor, nn

from ortho_cli.calibrate import plan as calibrate_plan
from ortho_cli.decompose import plan, recipe, tune
from ortho_cli.decompose.edits import load_arrays
from ortho_cli.decompose.tune import REACH, Latent, value_of
from ortho_cli.errors import CalibrationError, Interrupted, NumericalError, RecipeError
from ortho_cli.events import Event, Step
from ortho_cli.formats.statistics import open_statistics
from ortho_cli.model import load as models
from ortho_cli.model.walk import Walk
from ortho_cli.split import quantize
from ortho_cli.split.quantize import Rounded
from ortho_cli.storage import parts
from ortho_cli.storage.checkpoint import open_checkpoint
from ortho_cli.storage.work_folder import work_folder

pytestmark = pytest.mark.filterwarnings("ignore")  # other people's deprecations

SIZES = ("tune.samples=32", "tune.length=16", "tune.steps=25")
BASE = ("base.scale=curvature", "ortho.density=0.01", *SIZES)
TUNED = ("base.rounding=tuned", *BASE)


class Stopped(Exception):  # noqa: N818 - no error, an end
    """What kills a run here."""


@pytest.fixture(scope="module")
def memorised(memorised_by_seed: Callable[[int], Memorised]) -> Memorised:
    """A model whose blocks are both changed by tuning."""
    return memorised_by_seed(0)


def measured(memorised: Memorised, out: Path) -> Path:
    """Write statistics with Gram matrices."""
    settings = recipe.load_recipe(
        "capability", ["calibrate.samples=32", "calibrate.length=16", "calibrate.autocast=false"]
    )
    sets = calibrate_plan.read_sets(memorised.model, [memorised.retain], [], settings.calibrate)
    planned = calibrate_plan.make_plan(memorised.checkpoint, settings, sets)
    calibrate(planned, memorised.checkpoint, out, device="cpu")
    return out


@pytest.fixture(scope="module")
def stats(memorised: Memorised, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return measured(memorised, tmp_path_factory.mktemp("tune") / "stats.safetensors")


@dataclass(frozen=True)
class Done:
    """Runs of the same recipe with either rounding; only read."""

    tuned: Path
    gptq: Path
    report: dict[str, Any]
    events: list[Event]


@pytest.fixture(scope="module")
def done(memorised: Memorised, stats: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder, events = tmp_path_factory.mktemp("done"), []  # type: ignore[var-annotated]
    report = run(memorised, stats, folder / "tuned", *TUNED, events=events)
    run(memorised, stats, folder / "gptq", "base.rounding=gptq", *BASE)
    return Done(folder / "tuned", folder / "gptq", report, events)


def run(
    memorised: Memorised,
    stats: Path,
    out: Path,
    *sets: str,
    until: int | None = None,
    by: type[BaseException] = Stopped,
    events: list[Event] | None = None,
) -> dict[str, Any]:
    checkpoint = open_checkpoint(memorised.model)
    settings = recipe.load_recipe(None, list(sets))
    planned = plan.make_plan(checkpoint, settings, statistics=open_statistics(stats), workers=1)
    tuner = tune.open_tuner(planned, checkpoint, data=[memorised.retain], device="cpu")
    told: list[Event] = [] if events is None else events

    def watch(event: Event) -> None:
        told.append(event)
        if isinstance(event, Step) and event.name.startswith("tune") and event.number == until:
            raise by

    return decompose(planned, checkpoint, out, tuner=tuner, on_event=watch)


def rounded(weight: Tensor, *, bits: int = 4, kept: Tensor | None = None) -> Rounded:
    scales = quantize.absmax_scales(weight, group_size=8, dtype=torch.bfloat16, bits=bits)
    codes = quantize.quantize(weight, scales, bits=bits).to(torch.int8)
    return Rounded(
        codes, scales, torch.zeros_like(weight, dtype=torch.bool) if kept is None else kept
    )


@pytest.mark.parametrize("bits", [3, 4])
@given(seed=st.integers(0, 2**16), rate=st.sampled_from([0.01, 0.3, 5.0]))
def test_a_step_is_that_of_the_slow_twin(bits: int, seed: int, rate: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 16, generator=generator).bfloat16()
    kept = torch.rand(3, 16, generator=generator) < 0.2
    start = rounded(weight.float(), bits=bits, kept=kept)
    start.codes[0, 0] = -(2 ** (bits - 1))  # GPTQ may have moved it far from its weight
    gradient = torch.randn(3, 16, generator=generator).round()  # some of them 0
    latent = Latent(weight, start, bits=bits)
    before = latent._latent.clone(), latent._scales.clone()
    latent.step(gradient, rate=rate, scale_rate=0.01)
    expected = reference.tuning_step(*before, gradient, kept, bits=bits, rate=rate, scale_rate=0.01)
    assert torch.allclose(latent._latent, torch.tensor(expected[0]), atol=1e-5)
    assert torch.allclose(latent._scales, torch.tensor(expected[1]), rtol=1e-5)
    found = latent.rounded()
    assert int(found.codes.min()) >= -(2 ** (bits - 1))
    assert int(found.codes.max()) <= 2 ** (bits - 1) - 1
    assert torch.equal(found.kept, kept)


def test_it_begins_at_the_codes_and_nearest_to_the_weight_within_them() -> None:
    weight = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    start = rounded(weight)
    start.codes[0, 0] += 1
    latent = Latent(weight, start, bits=4)
    assert torch.equal(latent.rounded().codes, start.codes)
    assert torch.equal(latent.rounded().scales, start.scales)
    off = latent._latent - start.codes
    assert float(off.abs().max()) <= REACH + 1e-5
    assert float(off[0, 0]) == pytest.approx(-REACH, abs=1e-5)
    exact = weight / start.scales.float().repeat_interleave(8, 1)
    inside = (exact - start.codes).abs() < REACH
    assert int(inside.sum()) > 40
    assert torch.allclose(latent._latent[inside], exact[inside], atol=1e-5)


def test_kept_weights_are_the_sources_whatever_is_learnt() -> None:
    weight = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    kept = torch.zeros(4, 16, dtype=torch.bool)
    kept[1, 3] = kept[2] = True
    latent = Latent(weight, rounded(weight.float(), kept=kept), bits=4)
    for _ in range(3):
        latent.step(torch.ones(4, 16), rate=0.5, scale_rate=0.1)
    value = latent.value()
    assert value.dtype == torch.bfloat16
    assert torch.equal(value[kept], weight[kept])
    assert not torch.equal(value[0], weight[0])
    assert torch.equal(value, value_of(latent.rounded(), weight))


def test_whole_columns_stay_exact_and_are_those_of_gptq(
    memorised: Memorised, stats: Path, tmp_path: Path
) -> None:
    columns = "ortho={structure: columns, density: 0.05}"
    run(memorised, stats, tmp_path / "tuned", *TUNED, columns)
    run(memorised, stats, tmp_path / "gptq", "base.rounding=gptq", *BASE, columns)
    source = load_file(memorised.model / "model.safetensors")
    held, other = (load_file(tmp_path / n / "ortho.safetensors") for n in ("tuned", "gptq"))
    assert held.keys() == other.keys()
    assert all(torch.equal(held[key], other[key]) for key in held)
    for key, chosen in held.items():
        if key.endswith(".col_indices"):
            module = key.removesuffix(".col_indices")
            weight = source[f"{module}.weight"]
            assert torch.equal(held[f"{module}.values"], weight[:, chosen.long()])
    base, plain = (load_file(tmp_path / n / "model.safetensors") for n in ("tuned", "gptq"))
    assert any(not torch.equal(base[k], plain[k]) for k in base if k.endswith("packed"))


def divergence(memorised: Memorised, artifact: Path) -> float:
    """KL(source || artifact at alpha = 1) on text, in nats a token."""
    import ortho_cli

    source = models.load_model(memorised.model, dtype=torch.float32, device=torch.device("cpu"))
    split = ortho_cli.load(artifact, alpha=1.0)
    windows = memorised.windows(64)
    with torch.no_grad():
        p, q = (m(input_ids=windows).logits.float().log_softmax(-1) for m in (source, split))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_tuning_brings_most_models_nearer_to_their_sources(
    three_memorised: list[Memorised], tmp_path: Path
) -> None:
    """KL over that of GPTQ, of models so small that tuning may as well harm one.

    Of 6 models: 0.87, 0.80, 0.99, 1.37, 0.31 and 0.75, geometric mean 0.78. On another processor
    three were 0.83, 0.91 and 1.29.
    """
    ratios = []
    for number, memorised in enumerate(three_memorised):
        out = tmp_path / str(number)
        out.mkdir()
        stats = measured(memorised, out / "stats.safetensors")
        run(memorised, stats, out / "gptq", "base.rounding=gptq", *BASE)
        run(memorised, stats, out / "tuned", *TUNED, "tune.samples=128")
        tuned, gptq = (divergence(memorised, out / name) for name in ("tuned", "gptq"))
        ratios.append(tuned / gptq)
    assert median(ratios) < 0.95


def test_tuning_changes_codes_and_scales_alone(done: Done) -> None:
    mine, other = (load_file(out / "ortho.safetensors") for out in (done.tuned, done.gptq))
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[key], other[key]) for key in mine)  # positions, source's weights
    mine, other = (load_file(out / "model.safetensors") for out in (done.tuned, done.gptq))
    changed = {key for key in mine if not torch.equal(mine[key], other[key])}
    assert changed
    assert all(key.endswith(("weight_packed", "weight_scale")) for key in changed)
    assert {key.split(".")[2] for key in changed} == {"0", "1"}  # both blocks
    steps = [event for event in done.events if isinstance(event, Step)]
    assert [s.number for s in steps if s.name.startswith("tune")] == [1, 2]
    assert done.report["recipe"]["tune"]["samples"] == 32
    assert "tune" not in json.loads((done.gptq / "report.json").read_text())["recipe"]


def test_a_block_that_would_end_worse_stays_as_it_was(
    memorised: Memorised, stats: Path, done: Done, tmp_path: Path
) -> None:
    run(memorised, stats, tmp_path / "wild", *TUNED, "tune.rate=3.0", "tune.scale_rate=0.5")
    mine, other = (load_file(out / "model.safetensors") for out in (tmp_path / "wild", done.gptq))
    assert all(torch.equal(mine[key], other[key]) for key in mine)


def test_a_run_that_was_stopped_goes_on_with_the_same_bytes(
    memorised: Memorised, stats: Path, tmp_path: Path, ortho: Any
) -> None:
    sets = (*TUNED, "ortho.layout=compact", "ortho.values=int8")
    run(memorised, stats, tmp_path / "whole", *sets)
    out = tmp_path / "stopped"
    with pytest.raises(Stopped):
        run(memorised, stats, out, *sets, until=2)
    assert not out.exists()
    events: list[Event] = []
    run(memorised, stats, out, *sets, events=events)
    for name in ("model.safetensors", "ortho.safetensors", "report.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert ortho("inspect", out, "--verify", "-q").code == 0


def test_ctrl_c_says_how_much_is_tuned(memorised: Memorised, stats: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted) as caught:
        run(memorised, stats, tmp_path / "out", *TUNED, until=2, by=KeyboardInterrupt)
    assert caught.value.message == "interrupted with 7 of 14 tensors tuned"
    assert caught.value.hint == "repeat the same command to go on from there"


def test_half_of_a_block_that_a_kill_left_is_done_again(
    memorised: Memorised, stats: Path, done: Done, tmp_path: Path
) -> None:
    out = tmp_path / "torn"
    with pytest.raises(Stopped):
        run(memorised, stats, out, *TUNED, until=2)  # one block is tuned, and changed by it
    journal = next(tmp_path.glob(".torn.ortho*")) / "journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    assert all(b'"tuned":' in line for line in lines[-7:])
    journal.write_bytes(b"".join(lines[:-2]))  # two of its seven lines were not written any more
    run(memorised, stats, out, *TUNED)
    for name in ("model.safetensors", "report.json"):
        assert (out / name).read_bytes() == (done.tuned / name).read_bytes()


def test_hidden_states_in_files_give_the_same_bytes(
    memorised: Memorised, stats: Path, done: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files: list[str] = []
    original = torch.from_file

    def mapped(name: str, **options: Any) -> Tensor:
        files.append(name)
        return original(name, **options)

    monkeypatch.setattr(torch, "from_file", mapped)
    monkeypatch.setattr(plan, "TUNE_STATES", 0)
    run(memorised, stats, tmp_path / "out", *TUNED)
    assert 4 <= len(files) <= tune.MAPPED + 1
    assert not [name for name in files if Path(name).exists()]
    for name in ("model.safetensors", "ortho.safetensors", "report.json"):
        assert (tmp_path / "out" / name).read_bytes() == (done.tuned / name).read_bytes(), name


def test_outputs_are_weighed_by_gradients_of_labels_that_the_model_drew(tmp_path: Path) -> None:
    model, folder = saved(tmp_path / "m", "Llama"), tmp_path / "work"
    folder.mkdir()
    tokens = torch.randint(1, 48, (4, 12), generator=torch.Generator().manual_seed(3))
    checkpoint, cpu = open_checkpoint(tmp_path / "m"), torch.device("cpu")
    names = [tensor.name for tensor in checkpoint.tensors if "_proj" in tensor.name]
    with contextlib.closing(Walk(checkpoint, names, dtype=torch.float32, device=cpu)) as walk:
        data = tune._Data(walk, tokens, 2, cpu, folder)
        token, channel = tune._Weighing(data, folder, 5, None, lambda event: None).run()
    assert token.shape == (3, 4, 12)
    assert channel.shape == (3, 64)
    for number in range(3):
        squares = []
        for i, row in enumerate(tokens):
            at: list[Tensor] = []

            def keep(module: Any, args: Any, output: Any, at: list[Tensor] = at) -> Any:
                whole = isinstance(output, tuple)
                at.append((output[0] if whole else output).detach().requires_grad_(True))
                return (at[0], *output[1:]) if whole else at[0]

            hook = model.model.layers[number].register_forward_hook(keep)
            logits = model(input_ids=row[None], use_cache=False).logits[0, :-1]
            hook.remove()
            drawn = torch.Generator().manual_seed(5 + i)
            labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=drawn).squeeze(1)
            nll = nn.functional.cross_entropy(logits, labels, reduction="sum")
            (gradient,) = torch.autograd.grad(nll, at[0])
            squares.append(gradient[0].square())
        expected = torch.stack(squares)
        assert torch.allclose(token[number], expected.mean(-1), rtol=1e-3, atol=1e-9)
        assert torch.allclose(channel[number], expected.mean((0, 1)), rtol=1e-3, atol=1e-9)


def test_outputs_that_cannot_be_weighed_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path / "m", "Llama")
    checkpoint, cpu = open_checkpoint(tmp_path / "m"), torch.device("cpu")
    names = [tensor.name for tensor in checkpoint.tensors if "_proj" in tensor.name]
    tokens = torch.randint(1, 48, (4, 12), generator=torch.Generator().manual_seed(3))
    (tmp_path / "work").mkdir()

    def too_large(logits: Tensor, *_: Any, **__: Any) -> tuple[Tensor, float]:
        return torch.full_like(logits, 1e22), 0.0  # its square is beyond float32

    monkeypatch.setattr(tune, "logit_gradient", too_large)
    with contextlib.closing(Walk(checkpoint, names, dtype=torch.float32, device=cpu)) as walk:
        data = tune._Data(walk, tokens, 2, cpu, tmp_path / "work")
        with pytest.raises(NumericalError, match="output is NaN or infinite"):
            tune._Weighing(data, tmp_path / "work", 0, None, lambda event: None).run()


def tune_and_die(memorised: Memorised, stats: Path, out: Path, blocks: int, steps: int) -> None:
    """SIGKILL this process as it weighs the output of a block, or after steps of a block."""
    step, taken = tune._Job._put, 0

    def counted(self: Any, values: Any) -> None:
        nonlocal taken
        taken += 1
        if taken == steps:
            os.kill(os.getpid(), signal.SIGKILL)
        step(self, values)

    class Killer(list[Event]):
        def append(self, event: Event) -> None:
            if isinstance(event, Step) and event.number == blocks * event.name.startswith("weighs"):
                os.kill(os.getpid(), signal.SIGKILL)

    tune._Job._put = counted  # type: ignore[method-assign]
    parts.SAVE_SECONDS, parts.LARGEST_SHARE = 0.0, 1e9
    torch.set_num_threads(1)
    run(memorised, stats, out, *TUNED, events=Killer())


def test_a_kill_inside_a_block_costs_no_step_that_is_kept(
    memorised: Memorised, stats: Path, done: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    # After one of two blocks is weighed; then after 10 steps of a block, and after more of them.
    for blocks, steps in ((2, 99), (99, 12), (99, 25)):
        process = SERVER.Process(target=tune_and_die, args=(memorised, stats, out, blocks, steps))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        weights = work_folder(out) / "private" / tune.WEIGHTS_FILE
        assert weights.stat().st_mode & 0o077 == 0
        if blocks == 2:
            held = load_arrays(weights)
            assert held is not None
            assert int(held["done"]) == 1
    block = load_arrays(work_folder(out) / "private" / tune.BLOCK_FILE)
    assert block is not None
    _, turn, step = map(int, block["at"])
    assert step > 0
    events, rates = list[Event](), list[float]()
    original = Latent.step

    def watched(self: Latent, gradient: Tensor, **options: float) -> None:
        rates.append(options["rate"])
        original(self, gradient, **options)

    monkeypatch.setattr(Latent, "step", watched)
    run(memorised, stats, out, *TUNED, events=events)
    settings = recipe.load_recipe(None, list(TUNED)).tune
    assert rates[0] == settings.rate * tune.RATES[turn] * (1.0 - step / settings.steps)
    assert not [e for e in events if isinstance(e, Step) and e.name.startswith("weighs")]
    for name in ("model.safetensors", "ortho.safetensors", "report.json"):
        assert (out / name).read_bytes() == (done.tuned / name).read_bytes(), name


def test_without_data_or_a_tuner_it_is_refused(
    memorised: Memorised, stats: Path, tmp_path: Path, ortho: Any
) -> None:
    sets = [word for one in TUNED for word in ("--set", one)]
    told = ortho("decompose", memorised.model, "-o", tmp_path / "o", "--stats", stats, *sets)
    assert told.code == 3
    assert "base.rounding is tuned, and no data are given" in told.err
    checkpoint = open_checkpoint(memorised.model)
    settings = recipe.load_recipe(None, list(TUNED))
    planned = plan.make_plan(checkpoint, settings, statistics=open_statistics(stats))
    with pytest.raises(RecipeError, match="there is no tuner"):
        decompose(planned, checkpoint, tmp_path / "o")
    sets = ["--set", "base.rounding=tuned"]
    told = ortho("decompose", memorised.model, "--dry-run", *sets, "--data", memorised.retain)
    assert told.code == 3
    assert "base.rounding is tuned, which needs Gram matrices" in told.err


def test_data_that_do_not_fit_are_refused(
    memorised: Memorised, stats: Path, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(memorised.model)

    def refusal(kind: type[Exception], *sets: str, text: str | None = None) -> str:
        data = memorised.retain
        if text is not None:
            data = tmp_path / "data.jsonl"
            data.write_text(text)
        settings = recipe.load_recipe(None, [*TUNED, *sets])
        planned = plan.make_plan(checkpoint, settings, statistics=open_statistics(stats))
        with pytest.raises(kind) as caught:
            tune.open_tuner(planned, checkpoint, data=[data], device="cpu")
        return f"{caught.value} {caught.value.hint}"  # type: ignore[attr-defined]

    told = refusal(RecipeError, "tune.samples=30")
    assert "tune.samples is 30, and no multiple of tune.batch 4" in told
    assert "tune.samples=32" in told
    pair = '{"prompt": "a", "completion": "b"}\n'
    assert "1 rows of the data are prompts" in refusal(CalibrationError, text=pair)
    assert "tune.samples=" in refusal(CalibrationError, "tune.samples=4000")
    assert "tune.samples=4" in refusal(CalibrationError, "tune.length=400", "tune.samples=400")


def test_a_length_that_the_model_cannot_read_is_refused(
    memorised: Memorised, stats: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=r"tune.length is 600 and the model has 512"):
        run(memorised, stats, tmp_path / "o", *TUNED, "tune.samples=4", "tune.length=600")
    assert not (tmp_path / "o").exists()
