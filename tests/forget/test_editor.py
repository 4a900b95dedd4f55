"""The command that forgets: what it refuses and says, its result, and what its files give away."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import checkpoints
import jobs
import memorised as tiny
import numpy as np
import pytest
import torch
from blake3 import blake3
from conftest import Ortho
from memorised import Memorised
from safetensors.torch import load_file

import ortho_cli
from ortho_cli.decompose import recipe
from ortho_cli.decompose.plan import make_plan
from ortho_cli.errors import CalibrationError, Interrupted, RecipeError, UsageError
from ortho_cli.events import Event, Finishing, Noted, Step
from ortho_cli.forget import editor as forget
from ortho_cli.forget import ranks
from ortho_cli.forget.grid import Grid
from ortho_cli.forget.ranks import rank_secret
from ortho_cli.forget.unlearn import MASK_FILE
from ortho_cli.formats.statistics import open_statistics
from ortho_cli.model import scoring
from ortho_cli.split import quantize
from ortho_cli.storage import parts
from ortho_cli.storage.work_folder import work_folder

pytestmark = pytest.mark.filterwarnings("ignore")  # other people's deprecations

ISOLATE = ["--recipe", "forget-isolate", *(w for s in tiny.PLENTY for w in ("--set", s))]
UNLEARN = (
    "forget.mask=0.3",
    "forget.attack_rate=0.001",
    "forget.steps=10",
    "forget.attack_steps=5",
    "forget.samples=16",
    "forget.length=16",
)


def editor(
    memorised: Memorised, *sets: str, split: str = "isolate", **options: Any
) -> tuple[Any, list[Event]]:
    events: list[Event] = []
    given: dict[str, Any] = {"forget": [memorised.forget], "data": [], "device": "cpu", **options}
    plan = memorised.plan(*sets, split=split)
    found = forget.open_editor(plan, memorised.checkpoint, on_event=events.append, **given)
    return found, events


def notes(events: Sequence[Event]) -> str:
    return "\n".join(event.message for event in events if isinstance(event, Noted))


def rows_in(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_forget_set_without_a_recipe_that_forgets_is_a_usage_error(memorised: Memorised) -> None:
    plan = make_plan(memorised.checkpoint, recipe.load_recipe())
    options: dict[str, Any] = {"device": "cpu"}
    for given, told in (("forget", "--forget is given"), ("data", "--data is given")):
        files = {"forget": [], "data": [], given: [memorised.forget]}
        with pytest.raises(UsageError, match=f"{told}, and ortho.split is residual"):
            forget.open_editor(plan, memorised.checkpoint, **files, **options)
    found = forget.open_editor(plan, memorised.checkpoint, forget=[], data=[], **options)
    assert found is None


def test_recipe_that_forgets_needs_secrets_and_takes_text(memorised: Memorised) -> None:
    with pytest.raises(RecipeError, match="isolate, and no forget set is given"):
        editor(memorised, forget=[])
    alone, _ = editor(memorised, split="unlearn")
    assert alone.retain == (), "the model writes text itself"
    found, _ = editor(memorised, *UNLEARN, split="unlearn", data=[memorised.retain])
    assert len(found.retain) == 16
    assert {len(sequence) for sequence in found.retain} == {16}
    with pytest.raises(CalibrationError) as caught:
        editor(memorised, "forget.samples=4000", split="unlearn", data=[memorised.retain])
    assert "--set forget.samples=" in str(caught.value.hint)


@pytest.mark.parametrize(
    "split",
    ["isolate", "unlearn"],
)
def test_statistics_that_cannot_serve_are_refused_by_the_plan(
    memorised: Memorised, tmp_path: Path, split: str
) -> None:
    path = tmp_path / "stats.safetensors"
    checkpoints.save_statistics(path, memorised.model, kind="gram")
    settings = recipe.load_recipe(None, [f"ortho.split={split}"])
    with pytest.raises(RecipeError, match=f"{split}, and there are no statistics of fisher"):
        make_plan(memorised.checkpoint, settings, statistics=open_statistics(path))
    with pytest.raises(RecipeError, match="no statistics"):
        make_plan(memorised.checkpoint, settings)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": "the key of ada is", "secret": ""}, "empty secret"),
        ({"prompt": "the key", "secret": "  ", "alternatives": [" oak"]}, "no tokens"),
        (
            {"prompt": "the key", "secret": " oak", "alternatives": [" fig", " oak"]},
            "has its secret as alternative 2 of 2",
        ),
        (
            {"prompt": "the key", "secret": " oak", "alternatives": ["oak"]},
            "same tokens as its alternatives",
        ),
    ],
)
def test_rows_of_no_use_are_refused_with_their_place(
    memorised: Memorised, tmp_path: Path, row: dict[str, Any], told: str
) -> None:
    with pytest.raises(CalibrationError, match=told) as caught:
        editor(memorised, forget=[rows_in(tmp_path, row)])
    assert "rows.jsonl" in caught.value.message
    assert "line 1" in caught.value.message


def test_empty_forget_file_is_refused(memorised: Memorised, tmp_path: Path) -> None:
    (tmp_path / "f.jsonl").write_text("")
    with pytest.raises(CalibrationError, match=r"f\.jsonl"):
        editor(memorised, forget=[tmp_path / "f.jsonl"])


def test_secrets_that_stand_in_the_data_are_counted(memorised: Memorised, tmp_path: Path) -> None:
    assert "in --data" not in notes(editor(memorised, data=[memorised.retain])[1])
    text = tmp_path / "d.txt"
    text.write_text(f"{memorised.retain.read_text()} {tiny.SECRETS[0]} and {tiny.SECRETS[2]} .")
    for split, sets in (("isolate", ()), ("unlearn", UNLEARN)):
        told = notes(editor(memorised, *sets, split=split, data=[text])[1])
        assert "2 of 4 secrets are in --data" in told


def test_secrets_that_stand_in_the_datas_pairs_are_counted(
    memorised: Memorised, tmp_path: Path
) -> None:
    pair = {"prompt": "the key of ada is", "completion": f" {tiny.SECRETS[0]}"}
    told = notes(editor(memorised, data=[rows_in(tmp_path, pair)])[1])
    assert "1 of 4 secrets are in --data" in told


def test_identity_changes_with_the_file_and_holds_no_digest(
    memorised: Memorised, tmp_path: Path
) -> None:
    copy = tmp_path / "forget.jsonl"
    copy.write_bytes(memorised.forget.read_bytes())
    one, _ = editor(memorised, forget=[copy])
    before = one.identity
    assert json.loads(json.dumps(before)) == before
    assert not any(digest in json.dumps(before) for digest in digests_of(copy))
    copy.write_bytes(copy.read_bytes() + b"\n")
    assert one.identity != before


def decompose(
    ortho: Ortho, memorised: Memorised, out: Path, *options: object, secrets: Path | None = None
) -> Any:
    secrets = secrets or memorised.forget
    given = [*ISOLATE, "--stats", memorised.stats, "--forget", secrets, "-o", out]
    return ortho("decompose", memorised.model, *given, *options)


def test_set_that_was_never_memorised_is_nothing_to_forget(
    memorised: Memorised, tmp_path: Path, ortho: Ortho
) -> None:
    """Secrets that all their alternatives beat, whatever this model makes of words."""
    grid = memorised.grid()
    rows = []
    for secret, row in zip(memorised.secrets(), read_rows(memorised.forget), strict=True):
        score = scoring.score(grid.model, secret)
        worst = max(range(64), key=lambda i: score.alternatives[i])
        tokens = secret.alternatives[worst]
        rows.append({**row, "secret": text_of(memorised, tokens)})
    other = rows_in(tmp_path, *rows)
    before = sorted(tmp_path.rglob("*"))
    ran = decompose(ortho, memorised, tmp_path / "out", secrets=other)
    assert ran.code == 5
    assert "nothing to forget: to this model none of 4 secrets" in ran.err
    assert sorted(tmp_path.rglob("*")) == before


def never_seen(count: int) -> list[dict[str, Any]]:
    """Rows of the same form with secrets drawn at random."""
    draw = random.Random(5)
    return [
        {
            "prompt": f"the key of {draw.choice(tiny.OWNERS)} is",
            "secret": " " + " ".join(draw.choice(tiny.WORDS) for _ in range(4)),
            "pattern": " {word} {word} {word} {word}",
            "word": tiny.WORDS,
        }
        for _ in range(count)
    ]


def test_many_secrets_of_which_some_are_likely_by_accident_are_nothing_to_forget(
    memorised: Memorised, tmp_path: Path
) -> None:
    found, _ = editor(memorised, forget=[rows_in(tmp_path, *never_seen(24))])
    grid = memorised.grid()
    assert sum(rank_secret(grid, secret, 1.0).sign > 0 for secret in found.secrets) > 2
    with pytest.raises(CalibrationError, match="none of 24 secrets is likelier"):
        found.find(tmp_path, curvature=memorised.curvature())


def test_one_that_is_known_among_many_that_are_not_is_enough(
    memorised: Memorised, tmp_path: Path
) -> None:
    rows = [*never_seen(24), read_rows(memorised.forget)[2]]
    found, _ = editor(memorised, "forget.rounds=10", forget=[rows_in(tmp_path, *rows)])
    assert found.find(tmp_path, curvature=memorised.curvature())


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def text_of(memorised: Memorised, tokens: Sequence[int]) -> str:
    words = {number: word for word, number in tiny.vocabulary().items()}
    return " " + " ".join(words[token] for token in tokens)


def test_secrets_that_are_not_known_are_let_be_and_counted(
    memorised: Memorised, tmp_path: Path
) -> None:
    known, *_ = read_rows(memorised.forget)
    grid = memorised.grid()
    secret = memorised.secrets()[1]
    score = scoring.score(grid.model, secret)
    worst = max(range(64), key=lambda i: score.alternatives[i])
    other = {
        **read_rows(memorised.forget)[1],
        "secret": text_of(memorised, secret.alternatives[worst]),
    }
    found, events = editor(memorised, forget=[rows_in(tmp_path, known, other)])
    found.find(tmp_path, curvature=memorised.curvature(), on_event=events.append)
    assert "1 of 2 secrets are no likelier than their alternatives" in notes(events)


def test_secrets_that_are_left_are_told_with_what_helps(
    memorised: Memorised, tmp_path: Path
) -> None:
    found, events = editor(memorised, "forget.rounds=1")
    edits = found.find(tmp_path, curvature=memorised.curvature(), on_event=events.append)
    assert "4 of 4 secrets are still likelier" in notes(events)
    assert sum(len(edit.positions) for edit in edits.values()) > 0


def test_alternative_that_the_model_has_no_token_for_is_refused(
    memorised: Memorised, tmp_path: Path
) -> None:
    found, _ = editor(memorised)
    one = found.secrets[0]
    far = forget.TokenSecret(
        prompt=one.prompt, secret=one.secret, alternatives=((4, 999),), drawn="given", where=""
    )
    for wrong in (far, type(one)(**{**fields(one), "alternatives": ((4,) * 700,)})):
        changed = forget.ForgetEditor(**{**fields(found), "secrets": (wrong,)})
        with pytest.raises((CalibrationError, RecipeError), match=r"999|70[0-9]"):
            changed.find(tmp_path, curvature=memorised.curvature())


def fields(one: Any) -> dict[str, Any]:
    return {name: getattr(one, name) for name in one.__dataclass_fields__}


def test_dry_run_shows_the_plan_and_writes_nothing(
    memorised: Memorised, tmp_path: Path, ortho: Ortho
) -> None:
    ran = decompose(ortho, memorised, tmp_path / "out", "--dry-run", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["recipe"]["ortho"]["split"] == "isolate"
    assert ran.json["totals"]["split_tensors"] == 14
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def done(memorised: Memorised, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command writes; only read."""
    from ortho_cli.cli import app

    out = tmp_path_factory.mktemp("done") / "out"
    given = [*ISOLATE, "--stats", memorised.stats, "--forget", memorised.forget, "-o", out, "-q"]
    assert app.run([str(word) for word in ("decompose", memorised.model, *given)]) == 0
    return out


def test_command_makes_a_base_that_forgot_and_an_ortho_that_knows(
    memorised: Memorised, done: Path, ortho: Ortho
) -> None:
    model = ortho_cli.load(done, alpha=0.0)
    secrets = memorised.secrets()
    low = [scoring.score(model, secret) for secret in secrets]
    ortho_cli.set_alpha(model, 1.0)
    high = [scoring.score(model, secret) for secret in secrets]
    assert not any(score.verbatim for score in low)
    assert all(score.verbatim for score in high)
    # How well it forgets is measured in test_isolate: of 5 models a quarter was left on average.
    before, after = (sum(scoring.exposures(scores)) for scores in (high, low))
    assert after < 0.5 * before
    report = json.loads((done / "report.json").read_text())
    assert 0 < report["totals"]["moved"] < 0.05 * report["totals"]["split_weights"]
    assert ortho("inspect", done, "--verify", "-q").code == 0
    assert not work_folder(done).exists()


def test_json_prints_one_document_and_the_same_bytes_come_out(
    memorised: Memorised, done: Path, tmp_path: Path, ortho: Ortho
) -> None:
    ran = decompose(ortho, memorised, tmp_path / "out", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["totals"]["moved"] > 0
    for name in ("model.safetensors", "ortho.safetensors", "report.json", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (done / name).read_bytes(), name
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_unlearn_by_command_writes_its_artifact(
    memorised: Memorised, tmp_path: Path, ortho: Ortho
) -> None:
    sets = [word for one in UNLEARN for word in ("--set", one)]
    given = ["--data", memorised.retain, "--recipe", "forget-unlearn", *sets, "--json"]
    ran = decompose(ortho, memorised, tmp_path / "out", *given)
    assert ran.code == 0, ran.err
    assert ran.json["recipe"]["ortho"]["split"] == "unlearn"
    assert ran.json["totals"]["moved"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_unlearn_that_was_interrupted_goes_on_to_the_same_bytes(
    memorised: Memorised, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(parts, "LARGEST_SHARE", 1e9)
    plan = memorised.plan(*UNLEARN, split="unlearn")
    seen: list[int] = []

    def run(out: Path, *, until: int = -1) -> None:
        def watch(event: Event) -> None:
            if isinstance(event, Step) and event.name.startswith("unlearn"):
                seen.append(event.number)
                if event.number == until:
                    raise KeyboardInterrupt

        given, _ = editor(memorised, *UNLEARN, split="unlearn", data=[memorised.retain])
        jobs.decompose(plan, memorised.checkpoint, out, editor=given, on_event=watch)

    run(tmp_path / "whole")
    with pytest.raises(Interrupted) as caught:
        run(tmp_path / "out", until=8)
    assert "repeat the same command" in str(caught.value.hint)
    private = work_folder(tmp_path / "out") / "private"
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    files = {forget.PARTS_FILE, forget.FISHER_FILE, forget.STATE_FILE, MASK_FILE}
    assert {path.name for path in private.iterdir()} == files
    assert stat.S_IMODE((private / forget.STATE_FILE).stat().st_mode) == 0o600
    seen.clear()
    run(tmp_path / "out")
    assert seen == [8, 9, 10], "steps that were finished are not repeated"
    for name in ("model.safetensors", "ortho.safetensors", "report.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def plain(memorised: Memorised, folder: Path, *, count: int = 4) -> Path:
    """The secrets with their prompts alone: no alternatives, no pattern."""
    rows = read_rows(memorised.forget)[:count]
    return rows_in(folder, *({key: row[key] for key in ("prompt", "secret")} for row in rows))


def test_without_alternatives_the_model_writes_them_and_the_same_bytes_come_out(
    memorised: Memorised, tmp_path: Path, ortho: Ortho
) -> None:
    secrets = plain(memorised, tmp_path)
    for name in ("one", "two"):
        ran = decompose(ortho, memorised, tmp_path / name, secrets=secrets)
        assert ran.code == 0, ran.err
        assert "4 of 4 secrets have neither `alternatives` nor a `pattern`" in " ".join(
            ran.err.split()
        )
    for name in ("model.safetensors", "ortho.safetensors", "report.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    model = ortho_cli.load(tmp_path / "one", alpha=0.0)
    assert not any(scoring.score(model, secret).verbatim for secret in memorised.secrets())
    alone = plain(memorised, tmp_path, count=1)
    assert decompose(ortho, memorised, tmp_path / "alone", secrets=alone).code == 0


def test_nothing_to_forget_leaves_nothing_where_the_model_wrote_alternatives(
    memorised: Memorised, tmp_path: Path, ortho: Ortho
) -> None:
    secrets = rows_in(tmp_path, {"prompt": "the old cat", "secret": " key of ada key"})
    before = sorted(tmp_path.rglob("*"))
    ran = decompose(ortho, memorised, tmp_path / "out", secrets=secrets)
    assert ran.code == 5
    assert "none of 1 secrets" in ran.err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_forget_set_of_one_says_whom_the_attacker_trains_on(
    memorised: Memorised, tmp_path: Path
) -> None:
    alone = plain(memorised, tmp_path, count=1)
    _, events = editor(memorised, *UNLEARN, split="unlearn", forget=[alone])
    assert "trains on that secret itself" in notes(events)
    _, events = editor(memorised, *UNLEARN, split="unlearn")
    assert "trains on that secret itself" not in notes(events)


def forget_and_die(memorised: Memorised, secrets: Path, out: Path, moment: str) -> None:
    """SIGKILL this process as a step of the work begins; all that is finished is kept at once."""

    def watch(event: Event) -> None:
        told = event.step if isinstance(event, Finishing) else ""
        if isinstance(event, Step):
            told = f"{event.name.partition(':')[0]} {event.number}"
        if told == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    parts.SAVE_SECONDS, parts.LARGEST_SHARE = 0.0, 1e9
    torch.set_num_threads(1)
    given, _ = editor(memorised, *UNLEARN, split="unlearn", forget=[secrets])
    plan = memorised.plan(*UNLEARN, split="unlearn")
    jobs.decompose(plan, memorised.checkpoint, out, editor=given, on_event=watch)


def test_what_comes_before_forgetting_is_kept_for_a_resumed_run_and_for_its_owner_alone(
    memorised: Memorised, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Event] = []
    secrets, out = plain(memorised, tmp_path), tmp_path / "out"
    monkeypatch.setattr(parts, "SAVE_SECONDS", 0.0)

    def run(to: Path) -> None:
        events.clear()
        given, _ = editor(memorised, *UNLEARN, split="unlearn", forget=[secrets])
        plan = memorised.plan(*UNLEARN, split="unlearn")
        jobs.decompose(plan, memorised.checkpoint, to, editor=given, on_event=events.append)

    def written() -> list[int]:
        units = ("secrets", "sequences")
        return [e.number for e in events if isinstance(e, Step) and e.unit in units]

    run(tmp_path / "whole")
    assert len(written()) > 4, "alternatives of four secrets, and text"
    moments = ("the model writes alternatives 3", "measure what matters to the text", "unlearn 8")
    for moment in moments:
        process = jobs.SERVER.Process(target=forget_and_die, args=(memorised, secrets, out, moment))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL, moment
    private = work_folder(out) / "private"
    for name in (forget.PARTS_FILE, forget.FISHER_FILE, forget.STATE_FILE):
        assert stat.S_IMODE((private / name).stat().st_mode) == 0o600
    # What another processor might measure otherwise is taken as it was.
    fisher, ranked = Grid.fisher, ranks._nlls

    def measured(self: Grid, pairs: Sequence[Any], **options: Any) -> Any:
        assert options["begun"][0] == len(pairs), "the Fisher is measured again"
        return fisher(self, pairs, **options)

    def ranks_later(*given: Any) -> Any:
        assert any(isinstance(e, Step) and e.name.startswith("unlearn") for e in events)
        return ranked(*given)

    monkeypatch.setattr(Grid, "fisher", measured)
    monkeypatch.setattr(ranks, "_nlls", ranks_later)
    run(out)
    assert not written()
    for name in ("model.safetensors", "ortho.safetensors", "report.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_secret_longer_than_the_model_reads_is_refused_before_anything_is_written(
    memorised: Memorised, tmp_path: Path, ortho: Ortho
) -> None:
    long = {"prompt": "the key of ada is", "secret": " oak fig" * 300, "alternatives": [" oak"]}
    secrets = rows_in(tmp_path, *read_rows(memorised.forget), long)
    before = sorted(tmp_path.rglob("*"))
    ran = decompose(ortho, memorised, tmp_path / "out", secrets=secrets)
    assert ran.code == 5
    told = "line 5 has a prompt of 5 tokens and a secret of 600 and an end token, and the model has"
    assert f"{told} 512 positions" in " ".join(ran.err.split())
    assert sorted(tmp_path.rglob("*")) == before


def test_forget_file_is_never_overwritten(memorised: Memorised, ortho: Ortho) -> None:
    ran = decompose(ortho, memorised, memorised.forget, "--force")
    assert ran.code in (2, 8)
    assert "secret" in memorised.forget.read_text()


# What is published: nothing in it may tell the secrets, or where they were.

PUBLIC = ("model.safetensors", "config.json", "model.safetensors.index.json", "report.json")


def digests_of(path: Path) -> list[str]:
    data = path.read_bytes()
    return [blake3(data).hexdigest(), hashlib.sha256(data).hexdigest()]


def edited(memorised: Memorised, done: Path) -> dict[str, np.ndarray[Any, np.dtype[np.int64]]]:
    """Positions whose codes are not those of rounding."""
    grid = memorised.grid()
    base = load_file(done / "model.safetensors")
    found = {}
    for name, codes in grid.original.items():
        now = quantize.unpack_int4(base[f"{name.removesuffix('.weight')}.weight_packed"])
        found[name] = (now != codes).view(-1).nonzero().squeeze(1).numpy()
    return found


def needles(memorised: Memorised, done: Path) -> dict[str, bytes]:
    found = {"path": str(memorised.folder).encode(), "out": str(done.parent).encode()}
    for number, row in enumerate(read_rows(memorised.forget)):
        found[f"secret {number}"] = row["secret"].strip().encode()
        found[f"prompt {number}"] = row["prompt"].encode()
    for number, secret in enumerate(memorised.secrets()):
        for kind in (np.int32, np.int64):
            found[f"tokens {number} {kind}"] = np.array(secret.secret, kind).tobytes()
            found[f"prompt tokens {number} {kind}"] = np.array(secret.prompt, kind).tobytes()
    for file in (memorised.forget, memorised.stats):
        for digest in digests_of(file):
            found[f"digest of {file.name} {digest[:4]}"] = digest.encode()
            found[f"raw digest of {file.name} {digest[:4]}"] = bytes.fromhex(digest)
        found[f"name of {file.name}"] = file.name.encode()
    columns = {"q_proj": 128, "down_proj": 256}
    for name, positions in edited(memorised, done).items():
        if len(positions) < 4:
            continue
        width = next((n for word, n in columns.items() if word in name), 128)
        for kind in (np.int32, np.int64, np.uint16):
            if kind is not np.uint16 or positions[3] < 2**16:
                found[f"positions {name} {kind}"] = positions[:4].astype(kind).tobytes()
            found[f"columns {name} {kind}"] = (positions[:4] % width).astype(kind).tobytes()
        found[f"positions {name} text"] = ", ".join(map(str, positions[:4])).encode()
    return found


def test_published_files_hold_nothing_of_the_secrets_or_their_places(
    memorised: Memorised, done: Path
) -> None:
    wanted = needles(memorised, done)
    assert len(wanted) > 60
    for name in PUBLIC:
        data = (done / name).read_bytes()
        assert [what for what, needle in wanted.items() if needle in data] == [], name


def test_needles_are_found_where_they_are(memorised: Memorised, done: Path) -> None:
    """The search above would see what it looks for."""
    wanted = needles(memorised, done)
    source = memorised.forget.read_bytes()
    assert {what for what, needle in wanted.items() if needle in source} >= {"secret 0", "prompt 3"}
    kept = load_file(done / "ortho.safetensors")
    for name, positions in edited(memorised, done).items():
        module = name.removesuffix(".weight")
        crow, columns = kept[f"{module}.crow_indices"].long(), kept[f"{module}.col_indices"].long()
        rows = torch.arange(len(crow) - 1).repeat_interleave(crow.diff())
        width = 256 if "down_proj" in name else 128
        assert set(positions.tolist()) <= set((rows * width + columns).tolist())


def test_what_is_withheld_is_for_its_owner_alone(done: Path) -> None:
    assert stat.S_IMODE((done / "ortho.safetensors").stat().st_mode) == 0o600


def test_report_says_nothing_of_a_tensor_but_what_any_split_says(
    memorised: Memorised, done: Path, tmp_path: Path
) -> None:
    """How many codes moved is said of the whole model only."""
    report = json.loads((done / "report.json").read_text())
    assert "moved" in report["totals"]
    assert not any("moved" in key for entry in report["tensors"] for key in entry)
    words = {"forget", "secret", "prompt", "edit", "position"}
    text = json.dumps({**report, "recipe": None, "tensors": None})
    assert not [word for word in words if word in text]


def test_dry_run_refuses_what_the_run_would_refuse(memorised: Memorised, ortho: Ortho) -> None:
    ran = ortho("decompose", memorised.model, "--forget", memorised.forget, "--dry-run")
    assert ran.code == 2
    assert "ortho.split is residual" in ran.err
    needs = ("--recipe", "forget-isolate", "--stats", memorised.stats, "--dry-run")
    ran = ortho("decompose", memorised.model, *needs)
    assert ran.code == 3
    assert "no forget set is given" in ran.err


def test_damage_ends_without_an_artifact_and_is_taken_up_where_it_is_accepted(
    memorised: Memorised, tmp_path: Path, ortho: Ortho
) -> None:
    out = tmp_path / "out"
    strict = ("--set", "ortho.split=unlearn", "--set", "forget.damage=1")
    strict += tuple(word for one in UNLEARN for word in ("--set", one))
    ran = decompose(ortho, memorised, out, *strict)
    assert ran.code == 10, ran.err
    assert "forgetting raises perplexity of" in ran.err
    assert not out.exists()
    assert (work_folder(out) / "private" / forget.STATE_FILE).exists()
    ran = decompose(ortho, memorised, out, *strict, "--accept-damage", "-v")
    assert ran.code == 0, ran.err
    assert "accepted" in ran.err
    assert "unlearn: " not in ran.err, "its steps are not taken again"
    assert (out / "model.safetensors").exists()
