"""Calibration block by block: the bytes of the one in memory, and what it holds and writes."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from conftest import Ortho
from families import FAMILIES, saved
from jobs import SERVER, calibrate

from ortho_cli.calibrate import by_block, memory
from ortho_cli.calibrate import job as work
from ortho_cli.calibrate import plan as calibrate_plan
from ortho_cli.calibrate.batches import padded
from ortho_cli.calibrate.plan import CalibrationPlan, DataSet
from ortho_cli.decompose import recipe
from ortho_cli.errors import CalibrationError, Interrupted
from ortho_cli.events import Event, Noted, Step
from ortho_cli.formats.statistics import open_statistics
from ortho_cli.model import hidden_states
from ortho_cli.model.text import TokenSequence
from ortho_cli.storage import data_file
from ortho_cli.storage.checkpoint import open_checkpoint
from ortho_cli.storage.work_folder import work_folder

pytestmark = pytest.mark.filterwarnings("ignore")  # other people's deprecations

SETS = ["calibrate.samples=6", "calibrate.length=24", "calibrate.batch=4"]
GRAM = [*SETS, "calibrate.curvature=gram"]
WORDS = [word for text in GRAM for word in ("--set", text)]
FISHER = [word for text in SETS for word in ("--set", text)]


@pytest.fixture
def model(pico: Path) -> Path:
    """The pico model with a tokenizer, and rows of many lengths, of which some are prompts."""
    config = json.loads((pico / "config.json").read_text())
    (pico / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    checkpoints.save_tokenizer(pico, vocab=96)
    words = "the cat sat on a mat, and saw Nine fish in 1 pond.".split()  # noqa: SIM905
    rows: list[dict[str, str]] = [
        {"prompt": " ".join(words[i : i + 2]), "completion": " ".join(words[i : 2 * i + 1])}
        for i in range(1, 5)
    ]
    rows.append({"text": " ".join(words * 4)})
    (pico.parent / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return pico


def planned(
    model: Path, *sets: str, forget: Sequence[Path] = (), **changes: Any
) -> CalibrationPlan:
    settings = recipe.load_recipe(None, [*GRAM, *sets])
    rows = [model.parent / "rows.jsonl"]
    data = calibrate_plan.read_sets(model, rows, forget, settings.calibrate)
    plan = calibrate_plan.make_plan(open_checkpoint(model), settings, data)
    return dataclasses.replace(plan, **{"by_block": True, **changes})


def made(model: Path, plan: CalibrationPlan, out: str, events: list[Event] | None = None) -> bytes:
    sink = [] if events is None else events
    calibrate(plan, open_checkpoint(model), model.parent / out, on_event=sink.append)
    assert not list(model.parent.glob(".*"))  # work folder and hidden states are gone
    return (model.parent / out).read_bytes()


def needs(plan: CalibrationPlan, model: Path) -> int:
    """Bytes without room for hidden states: of a block, its sums and activations."""
    walk = by_block.open_walk(plan, open_checkpoint(model), torch.device("cpu"))
    names = walk.linears[0]
    shapes = [plan.sum_shape(t, part) for t in plan.tensors for part in plan.parts("retain")]
    sizes = [rows * columns for rows, columns in shapes]
    sums = 4 * sum(sizes) // len(walk) + 2 * max(sizes)
    assert len(names) == 7
    walk.close()
    sequences, size = plan.sets["retain"].sequences, plan.settings.batch
    starts = range(0, len(sequences), size)
    tokens = max(padded(sequences[start : start + size]).tokens.numel() for start in starts)
    if plan.settings.curvature != "gram":
        return memory.WALK_BYTES + walk.tail_bytes + 12 * by_block.LOGITS
    return memory.WALK_BYTES + walk.block_bytes + sums + 4 * by_block.ACTIVATIONS * 192 * tokens


@pytest.mark.parametrize("gram", ["none", "full"])
@pytest.mark.parametrize("where", ["memory", "a file"])
def test_bytes_are_those_of_the_model_in_memory(model: Path, gram: str, where: str) -> None:
    plan = planned(model, f"calibrate.gram={gram}")
    lengths = {len(one.tokens) for one in plan.sets["retain"].sequences}
    assert len(lengths) > 2, "nothing is padded: the test could not fail"
    whole = made(model, dataclasses.replace(plan, by_block=False), "whole")
    events: list[Event] = []
    limit = None if where == "memory" else needs(plan, model) + 100
    assert made(model, dataclasses.replace(plan, memory=limit), "blocks", events) == whole
    told = next(e.message for e in events if isinstance(e, Noted) and "block by block" in e.message)
    assert "the largest of 2 blocks" in told
    assert told.endswith(f"are in {where}")


FISHERS = {
    "fisher": ["calibrate.curvature=fisher"],
    "true-fisher": ["calibrate.curvature=true-fisher"],
    "token": ["calibrate.curvature=fisher", "calibrate.unit=token"],
    "factored": ["calibrate.curvature=fisher", "calibrate.storage=factored"],
    "gradients": [
        "calibrate.curvature=fisher",
        "calibrate.gram=full",
        "calibrate.weighting=gradient",
    ],
    "forget": ["calibrate.curvature=fisher", "calibrate.length=32"],
    "batch": ["calibrate.curvature=true-fisher", "calibrate.batch=1"],
}


@pytest.mark.parametrize("where", ["memory", "a file"])
@pytest.mark.parametrize("kind", FISHERS)
def test_bytes_of_gradients_are_those_of_the_model_in_memory(
    model: Path, kind: str, where: str
) -> None:
    forget = [model.parent / "rows.jsonl"] if kind == "forget" else []
    plan = planned(model, *FISHERS[kind], forget=forget)
    whole = made(model, dataclasses.replace(plan, by_block=False), "whole")
    events: list[Event] = []
    limit = None if where == "memory" else needs(plan, model) + 100
    assert made(model, dataclasses.replace(plan, memory=limit), "blocks", events) == whole
    told = next(e.message for e in events if isinstance(e, Noted) and "block by block" in e.message)
    assert told.endswith(f"are in {where}")
    assert (model.parent / "blocks").stat().st_mode & 0o777 == (0o600 if forget else 0o644)


@pytest.mark.parametrize(
    ("kind", "half"),
    # Of these two, transformers keeps biases of routers in float32.
    [
        *((kind, False) for kind in FAMILIES),
        ("Llama", True),
        ("Glm4Moe", True),
        ("DeepseekV3", True),
    ],
)
def test_gradients_of_every_family_are_those_of_the_model_in_memory(
    tmp_path: Path, kind: str, half: bool
) -> None:
    saved(tmp_path / "m", kind)
    sets = [*SETS, "calibrate.curvature=true-fisher", "calibrate.dtype=float32"]
    sets.append(f"calibrate.autocast={half}")
    draw = torch.Generator().manual_seed(1)
    rows = (torch.randint(1, 48, (length,), generator=draw) for length in (24, 20, 9, 24, 12, 24))
    sequences = tuple(TokenSequence(tokens=tuple(row.tolist())) for row in rows)
    text = DataSet(sequences=sequences, digest="of the draw")
    opened = open_checkpoint(tmp_path / "m")
    plan = calibrate_plan.make_plan(opened, recipe.load_recipe(None, sets), {"retain": text})
    assert len(plan.tensors) >= 12
    for way in (False, True):
        calibrate(dataclasses.replace(plan, by_block=way), opened, tmp_path / f"{way}")
    assert (tmp_path / "True").read_bytes() == (tmp_path / "False").read_bytes()


def test_a_weight_that_is_in_no_block_is_named_before_work_starts(tmp_path: Path) -> None:
    saved(tmp_path / "m", "Llama", tie_word_embeddings=False)
    text = DataSet(sequences=(TokenSequence(tokens=(1, 2, 3)),), digest="of the draw")
    opened = open_checkpoint(tmp_path / "m")
    settings = recipe.load_recipe(None, ['targets=["*_proj.weight", "lm_head.weight"]'])
    plan = calibrate_plan.make_plan(opened, settings, {"retain": text}, by_block=True)
    with pytest.raises(CalibrationError, match=r"`lm_head\.weight` is in no block") as caught:
        by_block.open_walk(plan, opened, torch.device("cpu"))
    assert "--max-memory" in caught.value.hint


@pytest.mark.parametrize("kind", ["gram", "true-fisher"])
def test_perplexity_is_that_of_the_model_in_memory(model: Path, tmp_path: Path, kind: str) -> None:
    found = []
    for blocks in (False, True):
        plan = planned(model, f"calibrate.curvature={kind}", by_block=blocks)
        opened = open_checkpoint(model)
        target = work.check_target(opened, tmp_path / f"{blocks}")
        found.append(work.calibrate(plan, opened, target).perplexity["retain"])
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert 10 < found[0] < 10_000


def test_statistics_are_written_once(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    put = data_file.write_all

    def counted(fd: int, data: memoryview, offset: int) -> None:
        written.append(memoryview(data).nbytes)
        put(fd, data, offset)

    for module in (data_file, hidden_states):
        monkeypatch.setattr(module, "write_all", counted)
    size = len(made(model, planned(model, "calibrate.gram=full"), "blocks"))
    assert size <= sum(written) <= 1.2 * size


@pytest.mark.parametrize("in_file", [True, False])
def test_interrupted_run_goes_on_after_its_last_block(model: Path, in_file: bool) -> None:
    plan = planned(model, "calibrate.gram=full")
    if in_file:
        plan = dataclasses.replace(plan, memory=needs(plan, model) + 100)
    whole, out = made(model, plan, "whole"), model.parent / "out"

    def interrupt(event: Event) -> None:
        if event == Step(name="measures", number=2, of=2, unit="blocks"):
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="interrupted with 1 of 2 blocks finished"):
        calibrate(plan, open_checkpoint(model), out, on_event=interrupt)
    events: list[Event] = []
    assert made(model, plan, "out", events) == whole
    told = [f"{e.name} {e.number}" for e in events if isinstance(e, Step) and e.unit == "blocks"]
    assert told == [*([] if in_file else ["passes again 1"]), "measures 2"]


@pytest.mark.parametrize("in_file", [True, False])
@pytest.mark.parametrize("at", ["passes 1", "passes 2", "measures 1", "measures 2"])
def test_interrupted_run_goes_back_from_its_last_block(model: Path, in_file: bool, at: str) -> None:
    plan = planned(model, "calibrate.curvature=true-fisher")
    if in_file:
        plan = dataclasses.replace(plan, memory=needs(plan, model) + 100)
    whole, out = made(model, plan, "whole"), model.parent / "out"

    def interrupt(event: Event) -> None:
        if isinstance(event, Step) and f"{event.name} {event.number}" == at:
            raise KeyboardInterrupt

    done = int(at == "measures 2")
    with pytest.raises(Interrupted, match=f"interrupted with {done} of 2 blocks finished"):
        calibrate(plan, open_checkpoint(model), out, on_event=interrupt)
    events: list[Event] = []
    assert made(model, plan, "out", events) == whole
    told = [f"{e.name} {e.number}" for e in events if isinstance(e, Step) and e.unit == "blocks"]
    forward = ["passes 1", "passes 2"]
    if in_file:
        forward = forward[forward.index(at) :] if at in forward else []
    again = [] if in_file or not done else ["passes again 1"]
    assert told == [*forward, *again, *["measures 1", "measures 2"][done:]]


def calibrate_and_die(model: Path, dies: bool) -> None:
    """SIGKILL this process in the second block, whose first weight is measured by then."""
    plan = planned(model, "calibrate.gram=full")
    second = False

    def watch(event: Event) -> None:
        nonlocal second
        if dies and second and not isinstance(event, Step):
            os.kill(os.getpid(), signal.SIGKILL)
        second = second or (isinstance(event, Step) and event.number == 2)

    torch.set_num_threads(1)
    calibrate(plan, open_checkpoint(model), model.parent / "k", on_event=watch)


def test_killed_run_ends_in_the_same_bytes(model: Path) -> None:
    out, found = model.parent / "k", []
    for dies in (False, True, False):
        process = SERVER.Process(target=calibrate_and_die, args=(model, dies))
        process.start()
        process.join()
        assert process.exitcode == (-signal.SIGKILL if dies else 0)
        if dies:
            assert work_folder(out).is_dir()
        else:
            found.append(out.read_bytes())
            out.unlink()
    assert found[0] == found[1]


def run(ortho: Ortho, model: Path, *options: object) -> Any:
    data, out = model.parent / "rows.jsonl", model.parent / "s"
    return ortho("calibrate", model, "--data", data, "-o", out, "--force", *options)


def test_option_chooses_the_way_and_says_so(ortho: Ortho, model: Path) -> None:
    much = run(ortho, model, *WORDS, "--max-memory", "2GB")
    assert much.code == 0, much.err
    assert "block by block" not in much.err
    whole = (model.parent / "s").read_bytes()
    some = f"{memory.needed(open_checkpoint(model)) - 1}"
    shown = run(ortho, model, *WORDS, "--max-memory", some, "--dry-run")
    assert "reading the model block by block" in " ".join(shown.out.split())
    ran = run(ortho, model, *WORDS, "--max-memory", some)
    assert ran.code == 0, ran.err
    assert "note: measured block by block from disk" in " ".join(ran.err.split())
    assert (model.parent / "s").read_bytes() == whole


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ((*WORDS, "--max-memory", "400MB"), 9, "of memory block by block, and there are 400 MB"),
        ((*FISHER, "--max-memory", "400MB"), 9, "of memory block by block, and there are 400 MB"),
        (("--max-memory", "lots"), 2, "--max-memory lots is no size"),
    ],
)
def test_what_does_not_fit_is_refused_before_work_starts(
    ortho: Ortho, model: Path, options: tuple[str, ...], code: int, message: str
) -> None:
    ran = run(ortho, model, *options)
    assert ran.code == code, ran.err
    assert message in " ".join(ran.err.split())
    assert "hint:" in ran.err
    assert not (model.parent / "s").exists()
    assert not list(model.parent.glob(".*"))


def test_unfinished_work_goes_on_as_it_began(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, out = open_checkpoint(model), model.parent / "out"
    assert not memory.goes_by_block(opened, None, out)

    def interrupt(event: Event) -> None:
        if isinstance(event, Step) and event.number == 2:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        calibrate(planned(model), opened, out, on_event=interrupt)
    assert memory.goes_by_block(opened, None, out)
    assert not memory.goes_by_block(opened, 10**12, out)
    monkeypatch.setattr(memory, "available_memory", lambda: 600_000_000)
    assert memory.goes_by_block(opened, None, model.parent / "other")


def test_default_of_a_model_larger_than_memory_is_measured_on_random_tokens(
    ortho: Ortho, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 700_000_000)
    ran = ortho("decompose", model, "-o", model.parent / "a")
    assert ran.code == 0, ran.err
    said = " ".join((ran.out + ran.err).split())
    assert "700 MB are available: it is measured block by block, on random tokens" in said
    assert "curvature is gram of 2,048 tokens, random ones, seed 0" in said
    report = json.loads((model.parent / "a" / "report.json").read_text())
    assert report["recipe"]["base"]["scale"] == "curvature"
    assert report["statistics"]["text"]["written_by"] == "random"
    stats = model.parent / "s"
    assert ortho("calibrate", model, "--recipe", "default", "-o", stats).code == 0
    assert open_statistics(stats).digest == report["statistics"]["digest"]
    assert not list(model.parent.glob(".*"))


def test_default_is_int4_where_activations_do_not_fit_beside_a_block(
    ortho: Ortho, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = memory.least(open_checkpoint(model)) + 1000
    monkeypatch.setattr(memory, "available_memory", lambda: there)
    ran = ortho("decompose", model, "-o", model.parent / "a")
    assert ran.code == 0, ran.err
    said = " ".join((ran.out + ran.err).split())
    assert "MB of memory block by block, and there are" in said
    assert "they are split as by `--recipe int4`" in said
    report = json.loads((model.parent / "a" / "report.json").read_text())
    assert report["statistics"] is None
