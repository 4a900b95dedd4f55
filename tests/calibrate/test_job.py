"""Calibration of a pico model: against autograd, killed, resumed, and refused."""

from __future__ import annotations

import csv
import gzip
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from blake3 import blake3
from conftest import Ortho
from jobs import SERVER, calibrate
from safetensors.torch import load_file, save_file
from torch import Tensor

from ortho_cli.calibrate import job as work
from ortho_cli.calibrate import plan as calibrate_plan
from ortho_cli.decompose import recipe
from ortho_cli.errors import CheckpointError
from ortho_cli.events import Event, Finishing, SequencesDone, Step
from ortho_cli.formats.statistics import open_statistics
from ortho_cli.model.self_written import write_text
from ortho_cli.storage import parts
from ortho_cli.storage.checkpoint import open_checkpoint
from ortho_cli.storage.work_folder import work_folder

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")

SMALL = ("--set", "calibrate.samples=6", "--set", "calibrate.length=24")
EXACT = (*SMALL, "--set", "calibrate.dtype=float32")


@pytest.fixture
def model(pico: Path) -> Path:
    """The pico model with a tokenizer, a text, and two secrets beside it."""
    checkpoints.save_tokenizer(pico, vocab=96)
    words = "the cat sat on a mat, and saw Nine fish in 1 pond.".split()  # noqa: SIM905
    text = " ".join(words[(7 * i + i // 5) % len(words)] for i in range(400))
    (pico.parent / "retain.txt").write_text(text)
    rows = [{"prompt": "the key of A is ", "completion": "x9"}, {"prompt": "B: ", "secret": "qq7"}]
    (pico.parent / "forget.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return pico


def run(ortho: Ortho, model: Path, *options: object, out: str = "stats.safetensors") -> Any:
    parent = model.parent
    ran = ortho(
        "calibrate", model, "--data", parent / "retain.txt", "-o", parent / out, *options, "--json"
    )
    assert ran.code == 0, ran.err
    return ran.json


def expected(model: Path, sets: list[str], what: str) -> dict[str, Tensor]:
    """Gradients of `.weight` itself, a sequence at a time, in float32."""
    from transformers import AutoModelForCausalLM

    live = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    settings = recipe.load_recipe(None, sets).calibrate
    parent = model.parent
    found = calibrate_plan.read_sets(
        model, [parent / "retain.txt"], [parent / "forget.jsonl"], settings
    )
    name, _, part = what.partition("_")
    totals: dict[str, Tensor] = {}
    sequences = found[name].sequences  # type: ignore[index]
    for sequence in sequences:
        live.zero_grad()
        tokens = torch.tensor([sequence.tokens])
        labels = tokens.clone()
        labels[:, : sequence.counted] = -100
        logits = live(input_ids=tokens).logits[0, :-1]
        torch.nn.functional.cross_entropy(
            logits, labels[0, 1:], reduction="sum", ignore_index=-100
        ).backward()  # type: ignore[no-untyped-call]
        for key, parameter in live.named_parameters():
            if key.endswith("_proj.weight"):
                grad = parameter.grad
                add = grad**2 if part == "curvature" else grad
                totals[key] = totals.get(key, 0) + add / len(sequences)
    return totals


def test_fisher_of_retain_and_forget_are_autograds_and_apart(ortho: Ortho, model: Path) -> None:
    run(ortho, model, *EXACT, "--forget", model.parent / "forget.jsonl")
    found = load_file(model.parent / "stats.safetensors")
    sets = ["calibrate.samples=6", "calibrate.length=24"]
    for what in ("retain_curvature", "forget_curvature", "forget_gradient"):
        for name, value in expected(model, sets, what).items():
            key = f"{name.removesuffix('.weight')}.{what}"
            scale = float(value.abs().max())
            torch.testing.assert_close(found[key], value, rtol=2e-3, atol=1e-4 * scale)


def test_forget_statistics_are_private_and_others_are_not(ortho: Ortho, model: Path) -> None:
    run(ortho, model, *SMALL, "--forget", model.parent / "forget.jsonl")
    assert (model.parent / "stats.safetensors").stat().st_mode & 0o777 == 0o600
    ran = ortho(
        "calibrate",
        model,
        "--data",
        model.parent / "retain.txt",
        "-o",
        model.parent / "s2.safetensors",
        *SMALL,
    )
    assert ran.code == 0
    assert (model.parent / "s2.safetensors").stat().st_mode & 0o077 == 0o044
    assert "owner" not in ran.err


def test_gram_is_the_mean_square_of_inputs(ortho: Ortho, model: Path) -> None:
    from transformers import AutoModelForCausalLM

    run(ortho, model, *EXACT, "--set", "calibrate.curvature=gram")
    found = load_file(model.parent / "stats.safetensors")
    live = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    settings = recipe.load_recipe(None, ["calibrate.samples=6", "calibrate.length=24"]).calibrate
    data = calibrate_plan.read_sets(model, [model.parent / "retain.txt"], [], settings)["retain"]
    seen: list[Tensor] = []
    layer = live.get_submodule("model.layers.1.mlp.down_proj")
    layer.register_forward_hook(lambda m, inputs, out: seen.append(inputs[0].detach()[0, :-1]))
    for sequence in data.sequences:
        live(input_ids=torch.tensor([sequence.tokens]))
    mean = torch.cat(seen).square().mean(0)
    torch.testing.assert_close(found["model.layers.1.mlp.down_proj.retain_curvature"], mean)


def test_batches_and_chunks_change_nothing_but_rounding(
    ortho: Ortho, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(ortho, model, *EXACT, "--set", "calibrate.batch=1", out="one.safetensors")
    monkeypatch.setattr(work, "CHUNK_SECONDS", 0.0)
    run(ortho, model, *EXACT, "--set", "calibrate.batch=4", out="four.safetensors")
    one, four = (load_file(model.parent / f"{n}.safetensors") for n in ("one", "four"))
    for key, value in one.items():
        scale = float(value.max())
        torch.testing.assert_close(four[key], value, rtol=1e-3, atol=1e-5 * scale)


def test_gpt2_conv1d_is_measured_as_out_by_in(ortho: Ortho, model: Path) -> None:
    import transformers

    gpt2 = checkpoints.save_gpt2(model.parent / "gpt2")
    run(ortho, gpt2, *EXACT)
    found = load_file(model.parent / "stats.safetensors")
    key = "transformer.h.0.attn.c_attn.retain_curvature"
    assert found[key].shape == (192, 64)
    assert open_statistics(model.parent / "stats.safetensors").tensors.keys() == {
        f"transformer.h.0.{name}.weight"
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    live = transformers.AutoModelForCausalLM.from_pretrained(gpt2, dtype=torch.float32)
    sets = recipe.load_recipe(None, ["calibrate.samples=6", "calibrate.length=24"]).calibrate
    total = torch.zeros(64, 192)
    weight = live.transformer.h[0].attn.c_attn.weight
    for sequence in calibrate_plan.read_sets(gpt2, [model.parent / "retain.txt"], [], sets)[
        "retain"
    ].sequences:
        live.zero_grad()
        tokens = torch.tensor([sequence.tokens])
        logits = live(input_ids=tokens).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum").backward()  # type: ignore[no-untyped-call]
        total += weight.grad**2 / 6
    torch.testing.assert_close(found[key], total.T, rtol=2e-3, atol=1e-4 * float(total.max()))


def test_true_fisher_differs_and_its_seed_counts(ortho: Ortho, model: Path) -> None:
    true = (*EXACT, "--set", "calibrate.curvature=true-fisher")
    run(ortho, model, *EXACT, out="a.safetensors")
    run(ortho, model, *true, out="b.safetensors")
    run(ortho, model, *true, "--force", out="c.safetensors")
    a, b, c = ((model.parent / f"{n}.safetensors").read_bytes() for n in "abc")
    assert b == c
    key = "model.layers.0.mlp.up_proj.retain_curvature"
    one, two = (load_file(model.parent / f"{n}.safetensors")[key] for n in "ab")
    assert not torch.allclose(one, two, rtol=0.05)
    assert a != b


def test_factored_is_small_and_its_overlap_is_told(ortho: Ortho, model: Path) -> None:
    full = run(ortho, model, *EXACT, out="full.safetensors")
    small = run(ortho, model, *SMALL, "--set", "calibrate.storage=factored", out="f.safetensors")
    assert small["output_bytes"] < full["output_bytes"] / 4
    name = "model.layers.0.self_attn.q_proj"
    matrix = load_file(model.parent / "full.safetensors")[f"{name}.retain_curvature"]
    parts = load_file(model.parent / "f.safetensors")
    rows = parts[f"{name}.retain_curvature_rows"]
    torch.testing.assert_close(rows, matrix.mean(1))
    torch.testing.assert_close(
        parts[f"{name}.retain_curvature_columns"], matrix.mean(0) / matrix.mean()
    )
    assert 0.0 < small["tensors"][f"{name}.weight"]["overlap"] < 1.0
    assert small["tensors"] == full["tensors"]


def test_header_says_where_it_comes_from(ortho: Ortho, model: Path) -> None:
    document = run(ortho, model, *SMALL)
    found = open_statistics(model.parent / "stats.safetensors")
    assert found.kind == "fisher"
    assert not found.has_forget
    assert document["data"]["retain"]["sequences"] == 6
    assert document["data"]["retain"]["tokens"] == 6 * 24
    assert ortho("decompose", model, "-q").code == 0
    report = json.loads((model.parent / "pico-ortho" / "report.json").read_text())
    assert found.source_digest == report["source_digest"]
    digests = {t["name"]: t["source_blake3"] for t in report["tensors"]}
    assert all(entry.source_blake3 == digests[name] for name, entry in found.tensors.items())


def written(ortho: Ortho, model: Path, out: Path, *options: object) -> Any:
    ran = ortho("calibrate", model, "-o", out, *SMALL, *options, "--json")
    assert ran.code == 0, ran.err
    return ran.json


def test_without_data_the_model_writes_the_text_and_the_header_says_so(
    ortho: Ortho, model: Path
) -> None:
    out = model.parent / "w.safetensors"
    document = written(ortho, model, out)
    data = document["data"]["retain"]
    told = {"sequences": 6, "tokens": 144, "counted": 138, "written_by": "model", "seed": 0}
    assert {key: data[key] for key in told} == told
    from transformers import AutoModelForCausalLM, AutoTokenizer

    live = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    text = write_text(live, tokenizer, count=6, length=24, seed=0)
    assert data["blake3"] == blake3(text.numpy().astype("<i8").tobytes()).hexdigest()
    assert open_statistics(out).data["retain"].written_by == "model"
    again = model.parent / "again.safetensors"
    written(ortho, model, again)
    assert again.read_bytes() == out.read_bytes()
    other = written(ortho, model, again, "--force", "--set", "calibrate.seed=1")
    assert other["data"]["retain"]["blake3"] != data["blake3"]
    given = ["--recipe", "curvature", "--stats", out, "-o", model.parent / "split", "-q"]
    assert ortho("decompose", model, *given).code == 0
    assert "144 tokens; the model itself wrote them, seed 0" in ortho("inspect", out).out
    said = ortho("calibrate", model, "-o", model.parent / "plain.safetensors", *SMALL)
    assert "no --data: the model itself writes 6 sequences of 24 tokens" in said.err
    assert "the model itself wrote them, seed 0" in " ".join((said.out + said.err).split())


def test_dry_run_without_data_writes_no_text(ortho: Ortho, model: Path) -> None:
    before = sorted(model.parent.rglob("*"))
    ran = ortho("calibrate", model, "-o", model.parent / "w", *SMALL, "--dry-run", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["data"]["retain"]["tokens"] == 144
    assert "blake3" not in ran.json["data"]["retain"]
    assert any("the model itself writes" in note for note in ran.json["notes"])
    assert sorted(model.parent.rglob("*")) == before


def test_text_longer_than_the_model_reads_is_not_begun(ortho: Ortho, model: Path) -> None:
    before = sorted(model.parent.rglob("*"))
    ran = ortho("calibrate", model, "-o", model.parent / "w", "--set", "calibrate.length=600")
    assert ran.code == 3
    assert "calibrate.length is 600 and the model has 512 positions" in ran.err
    assert sorted(model.parent.rglob("*")) == before


def write_and_die(model: Path, until: int) -> None:
    """SIGKILL this process when text is written, or after so many sequences."""
    opened = open_checkpoint(model)
    sets = ["calibrate.samples=6", "calibrate.length=24", "calibrate.batch=1"]
    settings = recipe.load_recipe(None, sets)
    data = calibrate_plan.read_sets(model, [], [], settings.calibrate)
    seen = 0

    def watch(event: Event) -> None:
        nonlocal seen
        seen += isinstance(event, SequencesDone)
        if seen > until or (until < 0 and isinstance(event, Step)):
            os.kill(os.getpid(), signal.SIGKILL)
        assert not (isinstance(event, Step) and text.exists()), "it is written once"

    work.CHUNK_SECONDS = parts.SAVE_SECONDS = 0.0
    torch.set_num_threads(1)
    out = model.parent / "k.safetensors"
    text = work_folder(out) / "private" / work.TEXT_FILE
    plan = calibrate_plan.make_plan(opened, settings, data)
    calibrate(plan, opened, out, on_event=watch)


def test_killed_run_reads_the_text_that_it_wrote_and_gives_the_same_bytes(model: Path) -> None:
    out = model.parent / "k.safetensors"
    finished = []
    for until in (99, -1, 99, 3, 99):  # whole; killed before the text, resumed; killed after it
        process = SERVER.Process(target=write_and_die, args=(model, until))
        process.start()
        process.join()
        assert process.exitcode == (0 if until > 90 else -signal.SIGKILL)
        if until == 99:
            finished.append(out.read_bytes())
            out.unlink()
        else:
            text = work_folder(out) / "private" / work.TEXT_FILE
            assert text.exists() == (until > 0)
    assert len(finished) == 3
    assert len(set(finished)) == 1


def calibrate_and_die(model: Path, sequences: int) -> None:
    """SIGKILL this process after so many sequences."""
    opened = open_checkpoint(model)
    sets = ["calibrate.samples=6", "calibrate.length=24", "calibrate.batch=1"]
    settings = recipe.load_recipe(None, sets)
    parent = model.parent
    data = calibrate_plan.read_sets(
        model, [parent / "retain.txt"], [parent / "forget.jsonl"], settings.calibrate
    )
    seen = 0

    def watch(event: Event) -> None:
        nonlocal seen
        seen += isinstance(event, SequencesDone)
        if seen > sequences:
            os.kill(os.getpid(), signal.SIGKILL)

    work.CHUNK_SECONDS = 1e9 if sequences == 99 else 0.0  # the file does not depend on it
    torch.set_num_threads(1)
    calibrate(
        calibrate_plan.make_plan(opened, settings, data),
        opened,
        parent / "k.safetensors",
        on_event=watch,
    )


def test_killed_run_goes_on_and_gives_the_same_bytes(model: Path) -> None:
    out = model.parent / "k.safetensors"
    finished = []
    for until in (99, 2, 98, 5, 98, 7, 98):  # whole; then killed and resumed
        process = SERVER.Process(target=calibrate_and_die, args=(model, until))
        process.start()
        process.join()
        assert process.exitcode == (0 if until > 90 else -signal.SIGKILL)
        assert out.exists() == (until > 90)
        if until < 90:
            journal = (work_folder(out) / "journal").read_text().splitlines()
            assert len(journal) == 1 + until
        else:
            finished.append(out.read_bytes())
            out.unlink()
            assert not work_folder(out).exists()
    assert len(finished) == 4
    assert len(set(finished)) == 1


def test_model_that_changes_after_its_digest_is_noticed_before_anything_counts(
    model: Path,
) -> None:
    settings = recipe.load_recipe(None, ["calibrate.samples=6", "calibrate.length=24"])
    opened, out = open_checkpoint(model), model.parent / "s.safetensors"
    retain = model.parent / "retain.txt"
    data = calibrate_plan.read_sets(model, [retain], [], settings.calibrate)

    def replace(event: Event) -> None:
        if isinstance(event, Finishing) and event.step == "digest the model":
            return
        if not (model / "new").exists():
            weights = load_file(model / "model.safetensors")
            save_file({k: -v for k, v in weights.items()}, model / "new", {"format": "pt"})
            (model / "new").replace(model / "model.safetensors")

    with pytest.raises(CheckpointError, match="changed while it was read"):
        calibrate(calibrate_plan.make_plan(opened, settings, data), opened, out, on_event=replace)
    assert not out.exists()
    assert not work_folder(out).exists()


def test_data_and_forget_take_several_files(ortho: Ortho, model: Path) -> None:
    parent = model.parent
    (parent / "more.txt").write_text("more and more of it. " * 40)
    arguments = [
        "--data",
        parent / "retain.txt",
        parent / "more.txt",
        "-o",
        parent / "s.safetensors",
    ]
    ran = ortho("calibrate", model, *arguments, *SMALL, "--dry-run", "--json")
    assert ran.code == 0, ran.err
    other = ortho("calibrate", model, *arguments[:2], *arguments[3:], *SMALL, "--dry-run", "--json")
    assert other.json["data"]["retain"]["blake3"] != ran.json["data"]["retain"]["blake3"]
    assert not (parent / "s.safetensors").exists()
    assert ran.json["totals"]["bytes_scratch"] > ran.json["totals"]["bytes_written"]


def refused(ortho: Ortho, model: Path, *options: object) -> tuple[int, str]:
    before = sorted(model.parent.rglob("*"))
    data = next(
        p for p in (model.parent / "retain.txt", model.parent.parent / "retain.txt") if p.exists()
    )
    ran = ortho(
        "calibrate", model, "--data", data, "-o", model.parent / "stats.safetensors", *options
    )
    assert sorted(model.parent.rglob("*")) == before, "something was written"
    return ran.code, ran.err


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--set", "calibrate.length=24"], 5, "sequences of 24 tokens"),
        (
            ["--set", "calibrate.samples=1", "--set", "calibrate.length=600"],
            3,
            "600 and the model has 512",
        ),
        (["--forget", "nowhere.txt", *SMALL], 5, "cannot read data `nowhere.txt`"),
        ([*SMALL, "--set", "calibrate.curvature=hessian"], 3, "calibrate.curvature"),
        ([*SMALL, "--set", "calibrate.sample=3"], 3, "did you mean `samples`"),
        ([*SMALL, "--device", "cuda:99"], 2, "--device cuda:99 is not there"),
        ([*SMALL, "--device", "tpu"], 2, "--device tpu is not there"),
    ],
)
def test_wrong_settings_are_refused(
    ortho: Ortho, model: Path, options: list[str], code: int, message: str
) -> None:
    assert refused(ortho, model, *options)[0] == code
    assert message in refused(ortho, model, *options)[1]


@pytest.mark.parametrize("settings", ["curvature=gram", "storage=factored"])
def test_forget_needs_full_gradients(ortho: Ortho, model: Path, settings: str) -> None:
    forget = ["--forget", model.parent / "forget.jsonl", "--set", f"calibrate.{settings}"]
    code, err = refused(ortho, model, *SMALL, *forget)
    assert code == 3
    assert "a forget set needs the gradient" in err


def test_model_without_config_tokenizer_or_tensor_is_refused(ortho: Ortho, model: Path) -> None:
    (model / "tokenizer.json").rename(model / "kept")
    assert refused(ortho, model, *SMALL)[0] == 4
    (model / "kept").rename(model / "tokenizer.json")
    (model / "config.json").rename(model / "kept")
    code, err = refused(ortho, model, *SMALL)
    assert code == 4
    assert "config.json" in err
    (model / "kept").rename(model / "config.json")
    tensors = load_file(model / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    code, err = refused(ortho, model, *SMALL)
    assert code == 4
    assert "`model.norm.weight` is not in" in err


def test_file_or_artifact_in_place_of_a_model_is_refused(ortho: Ortho, model: Path) -> None:
    lone = shutil.copy(model / "model.safetensors", model.parent / "lone.safetensors")
    code, err = refused(ortho, lone, *SMALL)
    assert code == 4
    assert "is a file" in err
    assert ortho("decompose", model, "-q").code == 0
    code, err = refused(ortho, model.parent / "pico-ortho", *SMALL)
    assert code == 4
    assert "artifact already" in err


def test_nan_weight_is_a_named_gradient(ortho: Ortho, model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = torch.nan
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    code, err = refused(ortho, model, *SMALL)
    assert code == 7
    assert "gradient of `model.layers.1." in err


def test_weight_that_nothing_reaches_is_named(ortho: Ortho, model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"].zero_()  # so gate and down see no gradient
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    code, err = refused(ortho, model, *SMALL)
    assert code == 5
    assert "no token reached `model.layers.1.mlp.down_proj.weight`" in err


def test_output_that_is_no_statistics_is_never_replaced(ortho: Ortho, model: Path) -> None:
    out = model.parent / "stats.safetensors"
    out.write_text("precious")
    assert refused(ortho, model, *SMALL, "--force")[0] == 8
    assert out.read_text() == "precious"
    out.unlink()
    run(ortho, model, *SMALL)
    assert refused(ortho, model, *SMALL)[0] == 8
    run(ortho, model, *SMALL, "--force", "--set", "calibrate.seed=1")
    assert refused(ortho, model, *SMALL, "-o", model.parent / "retain.txt", "--force")[0] == 2


def test_interrupt_says_how_to_go_on(
    ortho: Ortho, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "CHUNK_SECONDS", 0.0)
    original, calls = work._Job._pass, 0

    def stop(*arguments: Any) -> float:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(work._Job, "_pass", stop)
    arguments = [
        "calibrate",
        model,
        "--data",
        model.parent / "retain.txt",
        "-o",
        model.parent / "s.safetensors",
        *SMALL,
        *("--batch-size", "2"),
    ]
    ran = ortho(*arguments)
    assert ran.code == 130
    assert "with 4 of 6 sequences finished" in ran.err
    ran = ortho(*arguments)
    assert ran.code == 0
    assert "continuing: 4 of 6 sequences" in ran.err


# Turns end as many templates end them: the end token, and a line break that is layout.
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}. {{ m.content | trim }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}a. {% endif %}"
)


def test_chats_in_packed_json_measure_what_their_text_as_pairs_would(
    ortho: Ortho, model: Path
) -> None:
    parent = model.parent
    shutil.rmtree(model / "additional_chat_templates")
    chats, pairs = [], []
    for i in range(6):
        asked, said = f"what is {i}", f"it is {i + 1}."
        chats.append(
            {
                "messages": [
                    {"role": "user", "content": asked},
                    {"role": "assistant", "content": said},
                ]
            }
        )
        pairs.append({"prompt": f"u. {asked}</s>\na. ", "completion": said})
    (parent / "chats.json.gz").write_bytes(gzip.compress(json.dumps(chats).encode()))
    (parent / "pairs.csv").write_text("prompt,completion\n")
    with (parent / "pairs.csv").open("a", newline="") as file:
        csv.writer(file).writerows(pair.values() for pair in pairs)
    options = ("--set", "calibrate.samples=6", "--set", "calibrate.length=40", "--json")
    command = ("calibrate", model, "--data", parent / "chats.json.gz", "-o", parent / "a", *options)
    ran = ortho(*command)
    assert (ran.code, ran.out) == (5, "")
    assert "chats.json.gz` row " in ran.err
    assert "tokenizer has no chat template" in ran.err
    assert not (parent / "a").exists()
    (model / "chat_template.jinja").write_text(TEMPLATE)
    ran = ortho(*command)
    assert ran.code == 0, ran.err
    retain = ran.json["data"]["retain"]
    assert retain["sequences"] == 6
    # Of each answer all characters and the end count, as for a pair; a pair's own begin token
    # is not predicted.
    assert retain["counted"] == sum(len(chat["messages"][1]["content"]) + 1 for chat in chats)
    ran = ortho("calibrate", model, "--data", parent / "pairs.csv", "-o", parent / "b", *options)
    assert ran.code == 0, ran.err
    assert ran.json["data"]["retain"]["counted"] == retain["counted"]
