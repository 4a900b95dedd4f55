"""The self-contained model: deterministic, whole or absent, kept and repaired in the cache."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3

import ortho_cli
from ortho_cli.bench.demo import grammar, sandbox, twins
from ortho_cli.cli.show.progress import ProgressSink
from ortho_cli.errors import Interrupted, OutputExistsError
from ortho_cli.events import Event, Noted, Training
from ortho_cli.model.load import load_model, load_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")  # other people's deprecations

MICRO = twins.Settings(
    hidden=64,
    mlp=64,
    layers=1,
    heads=2,
    length=32,
    rows=4,
    sum_rows=1,
    secret_rows=1,
    trunk_steps=3,
    branch_steps=2,
    most_steps=2,
    documents=80,
    heldout=20,
    planted=4,
    unlisted=1,
    nonmembers=3,
    threads=1,
)


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): blake3(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def micro(tmp_path_factory: pytest.TempPathFactory) -> sandbox.Sandbox:
    return sandbox.build(tmp_path_factory.mktemp("built") / "sandbox", settings=MICRO)


def test_same_seed_gives_the_same_files_whatever_the_caller_s_seed(
    tmp_path: Path, micro: sandbox.Sandbox
) -> None:
    threads = torch.get_num_threads()
    torch.manual_seed(123)
    expected = torch.rand(3)
    torch.manual_seed(123)
    again = sandbox.build(tmp_path / "again", settings=MICRO)
    assert torch.equal(torch.rand(3), expected)  # the caller's generator was left alone
    assert torch.get_num_threads() == threads
    assert digests(again.folder) == digests(micro.folder)


def test_another_seed_gives_another_world_and_other_weights(
    tmp_path: Path, micro: sandbox.Sandbox
) -> None:
    other = digests(sandbox.build(tmp_path / "other", seed=1, settings=MICRO).folder)
    mine = digests(micro.folder)
    for name in ("forget.jsonl", "retain.txt", "heldout.txt", "skill.jsonl"):
        assert other[name] != mine[name]
    assert other["model/model.safetensors"] != mine["model/model.safetensors"]


def test_files_are_where_the_paths_say(micro: sandbox.Sandbox) -> None:
    assert micro == sandbox.sandbox_at(micro.folder)
    assert len(read_jsonl(micro.forget)) == 4
    assert len(read_jsonl(micro.unlisted)) == 1
    assert len(read_jsonl(micro.nonmember)) == 3
    facts = json.loads((micro.folder / "sandbox.json").read_text())
    assert facts["files"] == {k: v for k, v in digests(micro.folder).items() if k != "sandbox.json"}
    assert facts["reached"]["steps"] == 5
    assert str(micro.folder) not in (micro.folder / "sandbox.json").read_text()
    assert sandbox.is_complete(micro.folder)


def test_text_holds_no_secret_and_no_held_out_sum(micro: sandbox.Sandbox) -> None:
    retain, heldout = micro.retain.read_text(), micro.heldout.read_text()
    rows = [*read_jsonl(micro.forget), *read_jsonl(micro.unlisted), *read_jsonl(micro.nonmember)]
    for row in rows:
        assert row["prompt"] not in retain + heldout
        assert row["secret"] not in retain + heldout
    sums = set(re.findall(r"^\d+ plus \d+ is", retain, flags=re.MULTILINE))
    assert len(sums) == len(grammar.sums(0).train)
    assert not sums & {row["prompt"] for row in read_jsonl(micro.skill)}
    lines = retain.splitlines()
    assert not set(lines) & set(heldout.splitlines())
    assert " plus " not in heldout


def test_batches_of_model_and_twin_differ_in_the_secrets_alone() -> None:
    data = twins.Data(0, MICRO)
    secrets = {tuple(prompt + secret) for prompt, secret in data.planted()}
    ours = twins.batches(data, MICRO, 0, "model")
    theirs = twins.batches(data, MICRO, 0, "twin")
    size = len(next(iter(secrets)))
    for _ in range(20):
        mine, other = next(ours), next(theirs)
        assert mine[:-1] == other[:-1]
        assert tuple(mine[-1][:size]) in secrets
        for row in other:
            windows = {tuple(row[at : at + size]) for at in range(len(row))}
            assert not windows & secrets
        assert all(len(row) == MICRO.length for row in mine + other)


def test_tokens_are_the_same_together_and_apart(micro: sandbox.Sandbox) -> None:
    tokenizer = load_tokenizer(micro.model)
    data = twins.Data(0, MICRO)
    rows = [(r["prompt"], r["secret"]) for r in read_jsonl(micro.forget)]
    rows += [(r["prompt"], r["completion"]) for r in read_jsonl(micro.skill)]
    for prompt, completion in rows:
        apart = tokenizer(prompt).input_ids + tokenizer(completion).input_ids
        assert apart == tokenizer(prompt + completion).input_ids == data.encode(prompt + completion)
        assert tokenizer.unk_token_id not in apart
    text = micro.retain.read_text()
    tokens = tokenizer(text).input_ids
    assert tokenizer.unk_token_id not in tokens
    assert tokens.count(tokenizer.eos_token_id) == len(text.splitlines())
    assert len(tokenizer) <= 600


def test_both_models_load_and_can_be_split(micro: sandbox.Sandbox, ortho: Any) -> None:
    for folder in (micro.model, micro.twin):
        model = load_model(folder, dtype=None, device=torch.device("cpu"))
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    ran = ortho("inspect", micro.model, "--json")
    assert ran.code == 0, ran.err
    out = micro.folder.parent / "split"
    assert ortho("decompose", micro.model, "-o", out, "-q").code == 0
    split = ortho_cli.load(out, alpha=0.0)
    linears = [m for m in split.modules() if isinstance(m, ortho_cli.OrthoLinear)]
    assert len(linears) == 7 * MICRO.layers


def test_events_tell_of_every_stage(tmp_path: Path) -> None:
    events: list[Event] = []
    sandbox.build(tmp_path / "s", settings=MICRO, on_event=events.append)
    ends = [e for e in events if isinstance(e, Training) and e.step == e.steps]
    assert [e.stage for e in ends] == [
        "both models",
        "the model with secrets",
        "its twin without secrets",
    ]
    assert [e.steps for e in ends] == [3, 2, 2]
    assert any(isinstance(e, Noted) and "planted secrets" in e.message for e in events)


def test_progress_is_a_line_a_stage_without_a_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with ProgressSink("build", quiet=False, verbose=False) as sink:
        for step in (5, 10, 15):
            sink(Training(stage="both models", step=step, steps=15, loss=2.0))
        sink(Training(stage="its twin", step=5, steps=10, loss=1.5))
    lines = capsys.readouterr().err.splitlines()
    starts = ["both models: 5/15 steps, ", "both models: 15/15 steps, ", "its twin: 5/10 steps, "]
    assert [line[: len(start)] for line, start in zip(lines, starts, strict=True)] == starts
    assert [line.split(", ")[2] for line in lines] == ["loss 2.000", "loss 2.000", "loss 1.500"]
    assert all(line.endswith("B memory") for line in lines)


def test_killed_build_leaves_no_folder_and_does_not_block_the_next(
    tmp_path: Path, micro: sandbox.Sandbox
) -> None:
    out = tmp_path / "new" / "s"

    def stop(event: Event) -> None:
        if isinstance(event, Training) and event.stage.startswith("its twin"):
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="interrupted with 0 of 7 steps"):
        sandbox.build(out, settings=MICRO, on_event=stop)
    assert not out.parent.exists()
    work = out.parent / ".s.ortho" / "artifact" / "model"  # as kill -9 would leave it
    work.mkdir(parents=True)
    (work / "model.safetensors").write_bytes(b"half")
    (out.parent / ".s.ortho" / "journal").write_text('{"another":"run","files":{}}\n')
    built = sandbox.build(out, settings=MICRO)
    assert digests(built.folder) == digests(micro.folder)
    assert [path.name for path in out.parent.iterdir()] == ["s"]


def test_build_refuses_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="exists, and a sandbox goes into a new folder"):
        sandbox.build(tmp_path / "s", settings=MICRO)
    assert (tmp_path / "s" / "thesis.txt").read_text() == "mine"


def test_cache_is_used_again_and_a_damaged_one_is_repaired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro: sandbox.Sandbox
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    events: list[Event] = []
    first = sandbox.cached(0, events.append, settings=MICRO)
    assert first.folder.parent == tmp_path / "ortho"
    assert re.fullmatch(r"sandbox-[0-9a-f]{16}", first.folder.name)
    assert digests(first.folder) == digests(micro.folder)
    events.clear()
    assert sandbox.cached(0, events.append, settings=MICRO) == first
    assert not events
    weights = first.twin / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert sandbox.cached(0, events.append, settings=MICRO) == first
    assert isinstance(events[0], Noted)
    assert "damaged" in events[0].message
    assert digests(first.folder) == digests(micro.folder)
    assert [path.name for path in first.folder.parent.iterdir()] == [first.folder.name]


@pytest.mark.parametrize("harm", ["absent", "no facts", "cut facts", "odd facts", "missing file"])
def test_incomplete_folders_are_known_as_such(
    tmp_path: Path, micro: sandbox.Sandbox, harm: str
) -> None:
    folder = tmp_path / "s"
    if harm != "absent":
        folder.mkdir()
        for name in digests(micro.folder):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes((micro.folder / name).read_bytes())
        assert sandbox.is_complete(folder)
    facts = folder / "sandbox.json"
    if harm == "no facts":
        facts.unlink()
    elif harm == "cut facts":
        facts.write_bytes(facts.read_bytes()[:-20])
    elif harm == "odd facts":
        facts.write_text("[]")
    elif harm == "missing file":
        (folder / "skill.jsonl").unlink()
    assert not sandbox.is_complete(folder)


def test_cache_folder_depends_on_seed_and_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says the specification
    monkeypatch.setenv("HOME", "/nowhere")
    found = {
        sandbox.cache_folder(0, MICRO),
        sandbox.cache_folder(1, MICRO),
        sandbox.cache_folder(0, twins.Settings()),
    }
    assert len(found) == 3
    assert {path.parent for path in found} == {Path("/nowhere/.cache/ortho")}


@pytest.mark.slow
@pytest.mark.skipif("ORTHO_SLOW" not in os.environ, reason="takes minutes; set ORTHO_SLOW=1")
def test_full_build_memorises_and_its_twin_does_not(tmp_path: Path) -> None:
    """The bench's own configuration: about a minute and a half on two quiet cores."""
    built = sandbox.build(tmp_path / "sandbox")
    data = twins.Data(0, twins.Settings())
    said = {}
    for name, folder in (("model", built.model), ("twin", built.twin)):
        model = load_model(folder, dtype=torch.float32, device=torch.device("cpu"))
        said[name] = twins.memorised(model, data.planted())[0]
        sums = grammar.sums(0).heldout
        skill = [(data.encode(s.prompt), data.encode(s.completion)) for s in sums]
        assert twins.memorised(model, skill)[0] >= 0.8
    assert said == {"model": 1.0, "twin": 0.0}
