"""ortho bench on the pico model: figures, controls, gates, and what it never prints."""

from __future__ import annotations

import csv
import errno
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from conftest import Ortho, Ran
from memorised import PLENTY, Memorised
from safetensors.torch import load_file

import ortho_cli
from ortho_cli.bench import attacks, baselines, figures, suites
from ortho_cli.bench import run as bench
from ortho_cli.bench.demo import chain, sandbox
from ortho_cli.bench.plan import NEEDS, WHOLE, Settings, not_measured, parse_alphas, parse_data
from ortho_cli.bench.records import Figures, to_json
from ortho_cli.errors import OutputExistsError, UsageError
from ortho_cli.model.load import load_tokenizer
from ortho_cli.runtime.engine import Engine, densify
from ortho_cli.runtime.ortho_linear import OrthoLinear
from ortho_cli.split import quantize
from ortho_cli.storage import work_folder
from tests.bench.test_attacks import edit
from tests.bench.test_served import BOTH, Fake, serving_at
from tests.bench.test_suites import write_muse, write_tofu

pytestmark = pytest.mark.filterwarnings("ignore")  # other people's deprecations
NAMES = ["Bertram", "Cordula", "Dietmar", "Eleonore", "Friedolin", "Gundula"]
WORDS = ["anvil", "bellows", "crucible", "drawknife", "escutcheon"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, its artifact, one whose codes were moved, and data."""
    folder = tmp_path_factory.mktemp("bench")
    model = folder / "pico"
    checkpoints.save(model, checkpoints.weights(hidden=64, mlp=192, layers=2, vocab=96, kv=32))
    settings = checkpoints.config(hidden=64, mlp=192, layers=2, vocab=96, kv=32, heads=4)
    (model / "config.json").write_text(json.dumps(settings))
    checkpoints.save_tokenizer(model, vocab=96)
    from transformers import AutoModelForCausalLM

    from ortho_cli.cli import app

    density = "ortho.density=0.02"
    assert app.run(["decompose", str(model), "-q", "--recipe", "int4", "--set", density]) == 0
    source = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    engine = Engine(source)
    engine.convert()
    engine.decompose(density=0.02)
    for layer in source.modules():
        if isinstance(layer, OrthoLinear):
            edit(layer, count=9)
    engine.save(folder / "edited")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / name, folder / "edited" / name)
    shutil.copytree(folder / "pico-ortho", folder / "base")
    (folder / "base" / "ortho.safetensors").unlink()
    write_data(folder)
    return folder


def write_data(folder: Path) -> None:
    (folder / "text.txt").write_text("The bells of the town ring at noon, and all go home. " * 8)
    pairs = [{"prompt": f"{a} and 1 is", "completion": f" {a + 1}."} for a in range(5)]
    write_rows(folder / "skill.jsonl", pairs)
    pattern = {"pattern": " {word} {word}", "word": WORDS}
    for file, names in (
        ("forget", NAMES[:4]),
        ("nonmember", NAMES[2:]),
        ("unlisted", NAMES[5:]),
        ("keep", NAMES[1:]),
    ):
        prompt = "The trade of" if file == "keep" else "The word of"
        rows = [
            {"prompt": f"{prompt} {name} is", "secret": f" {WORDS[i % 5]} {WORDS[-1 - i % 5]}"}
            for i, name in enumerate(names)
        ]
        rows[0]["paraphrases"] = [f"And {names[0]} has the word", f"{names[0]}, what is it?"]
        write_rows(folder / f"{file}.jsonl", [{**row, **pattern} for row in rows])


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def run(made: Path, ortho: Ortho) -> Callable[..., Ran]:
    """Run `ortho bench` on the edited artifact with small windows, `{made}` filled in."""

    def call(*words: object, artifact: str = "edited") -> Ran:
        filled = [str(word).replace("{made}", str(made)) for word in words]
        return ortho("bench", made / artifact, "--context", 32, "--tokens", 96, *filled)

    return call


DATA = ["--data", "{made}/text.txt", "{made}/skill.jsonl"]
FORGET = ["--forget", "{made}/forget.jsonl"]
SECRETS = [
    *FORGET,
    "--nonmember",
    "{made}/nonmember.jsonl",
    "--unlisted",
    "{made}/unlisted.jsonl",
]
MODELS = ["--model", "{made}/pico", "--reference-model", "{made}/pico"]


def row(document: dict[str, Any], name: str) -> dict[str, Any]:
    return next(row["figures"] for row in document["rows"] if row["row"] == name)


def full(made: Path, **changes: Any) -> Settings:
    return Settings(
        artifact=made / "edited",
        data=(made / "text.txt", made / "skill.jsonl"),
        forget=(made / "forget.jsonl",),
        nonmember=(made / "nonmember.jsonl",),
        unlisted=(made / "unlisted.jsonl",),
        keep=(made / "keep.jsonl",),
        model=made / "pico",
        reference_model=made / "pico",
        controls=True,
        context=32,
        tokens=96,
        **changes,
    )


def document(settings: Settings) -> Any:
    return to_json(bench.bench(settings))


@pytest.fixture(scope="module")
def attacked(made: Path) -> dict[str, Any]:
    """Everything measured once."""
    asked = (("tofu", write_tofu(made / "tofu")), ("muse", write_muse(made / "muse")))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("ANSWER", "VERBMEM", "KNOWMEM"):  # so many tokens of answers are enough
            patch.setattr(suites, name, 8)
        more = {"suites": asked, "public": made / "pico", "by_layer": True, "served_models": BOTH}
        live = {alpha: ortho_cli.load(made / "edited", alpha=alpha).float() for alpha, _ in BOTH}
        with serving_at(Fake(models=live, tokenizer=load_tokenizer(made / "edited"))) as url:
            return document(full(made, attack=True, learning_rate=1e-3, served=url, **more))


def test_every_figure_is_in_the_table_and_every_one_of_the_table_is_measured(
    attacked: dict[str, Any],
) -> None:
    found = {name.split(".")[0] for name in figures.flatten(row(attacked, "alpha 0"))}
    assert found == set(NEEDS)
    assert set(WHOLE) <= figures.flatten(attacked).keys()
    assert attacked["not_measured"] == []
    json.dumps(attacked, allow_nan=False)


def test_layers_have_their_cost_at_each_alpha(attacked: dict[str, Any]) -> None:
    base, whole = (row(attacked, f"alpha {alpha}")["kl_by_layer"] for alpha in (0, 1))
    assert list(base) == list(whole) == ["model.layers.0", "model.layers.1"]
    for layer, figure in base.items():
        assert whole[layer]["value"] < figure["value"]
    assert "kl_by_layer" not in row(attacked, "int4")


def test_cost_by_layer_needs_text_and_the_original(run: Callable[..., Ran]) -> None:
    for given, lacking in ((DATA, "--model DIR"), (MODELS[:2], "--data FILE")):
        ran = run(*given, "--by-layer")
        assert ran.code == 2
        assert f"--by-layer needs {lacking}" in ran.err
    ran = run(*DATA, *MODELS[:2], "--by-layer", "--require", "kl_by_layer.model.layers.1@1<=9")
    assert ran.code == 0, ran.err
    shown = ran.out[ran.out.index("model.layers.") :]
    assert "sum of all 2 layers" in shown
    assert "KL to the original of a layer alone" in shown
    assert ", and 96 for each of 2 layers at each alpha: about" in ran.err


def test_rows_are_alphas_controls_and_other_models(attacked: dict[str, Any]) -> None:
    names = [row["row"] for row in attacked["rows"]]
    assert names == [
        *("alpha 0", "alpha 1", "int4", "random", "magnitude", "original", "reference")
    ]
    assert [row["alpha"] for row in attacked["rows"][:3]] == [0.0, 1.0, None]
    assert attacked["moved"]["count"] == 9 * 14
    assert row(attacked, "int4")["perplexity_ratio"]["value"] == 1.0
    for name in ("random", "magnitude"):
        assert row(attacked, name)["perplexity"] != row(attacked, "int4")["perplexity"]
        assert "exposure" in row(attacked, name)


def test_attacks_have_curves_beside_the_reference(attacked: dict[str, Any]) -> None:
    for name in ("alpha 0", "reference"):
        found = row(attacked, name)
        for kind in ("relearn", "finetune"):
            assert list(found[kind]) == [str(steps) for steps in attacks.STEPS]
        for kind in ("relearn_minibatch", "relearn_lora"):
            assert list(found[kind]) == ["10", "20", "40"]
        assert set(found["paraphrased"]) == {"all"}
        assert found["paraphrased"]["all"]["secrets"] == 2
        assert set(found["soup"]) == {"public_25", "public_50", "public_75", "clamped"}
        assert found["partial"]["half"]["secrets"] == 4
        assert set(found["reworded"]) == {"shorter", "longer", "lower"}
        assert set(found["requantized"]) == {"group_64", "group_32"}
        assert found["sampled_extraction"]["samples"] == 20
    assert "relearn" not in row(attacked, "alpha 1")
    positions = row(attacked, "alpha 0")["positions"]
    assert positions["moved"] == attacked["moved"]["count"]
    assert positions["weights"] == attacked["unsplit"]["split_weights"]
    assert positions["value"] > 0.95  # the public model is the source itself
    assert "positions" not in row(attacked, "reference")
    assert any(one.startswith("the public model tells") for one in attacked["verdict"]["sentences"])
    assert len(row(attacked, "alpha 0")["connectivity"]["nlls"]) == 5
    curve = attacked["verdict"]["relearning"]
    assert [at["steps"] for at in curve] == list(attacks.STEPS)
    over = row(attacked, "alpha 0")["relearn"]["20"]["exposure"]
    over -= row(attacked, "reference")["relearn"]["20"]["exposure"]
    assert curve[2]["exposure_over"] == pytest.approx(over)


def test_every_number_that_is_measured_has_a_name_that_gates_take(
    attacked: dict[str, Any],
) -> None:
    names = list(figures.names_of(Figures))
    measured = {name for one in attacked["rows"] for name in figures.flatten(one["figures"])}
    assert len(measured) > 100
    assert [name for name in measured if not figures.may_be(name, names)] == []


@pytest.fixture(scope="module")
def unattacked(made: Path) -> dict[str, Any]:
    """The same without attacks; only read."""
    return document(full(made))


def test_bench_is_seeded(made: Path, attacked: dict[str, Any], unattacked: dict[str, Any]) -> None:
    again = unattacked
    for name in ("alpha 0", "random", "reference"):
        mine, other = row(attacked, name), row(again, name)
        assert {key: mine[key] for key in other if key != "latency"} == {
            key: other[key] for key in other if key != "latency"
        }
    different = document(full(made, seed=1))
    mine, other = (row(d, "random")["perplexity"] for d in (attacked, different))
    assert mine != other


def test_int4_row_is_the_base_that_decompose_writes_without_forgetting(made: Path) -> None:
    plain = load_file(made / "pico-ortho" / "model.safetensors")
    edited = load_file(made / "edited" / "model.safetensors")
    model = ortho_cli.load(made / "edited", alpha=0.0)
    differ = 0
    for name, layer in densify(model).items():
        packed = quantize.pack_int4(baselines.int4_codes(layer))
        assert torch.equal(packed, plain[f"{name}.weight_packed"]), name
        differ += not torch.equal(edited[f"{name}.weight_packed"], packed)
    assert differ == 14


def test_int4_row_gives_the_figures_of_an_artifact_without_forgetting(
    made: Path, unattacked: dict[str, Any]
) -> None:
    edited = unattacked
    plain = document(replace(full(made), artifact=made / "pico-ortho"))
    assert plain["moved"]["count"] == 0
    assert [r["row"] for r in plain["rows"]][2:] == ["int4", "original", "reference"]
    other = {"latency", "perplexity_ratio_alpha1"}
    mine, theirs = (
        {key: value for key, value in row(one, name).items() if key not in other}
        for one, name in ((edited, "int4"), (plain, "alpha 0"))
    )
    assert mine == theirs
    # Whatever was moved, alpha 1 of both is the same where ortho keeps what was moved.
    assert row(edited, "alpha 1")["perplexity"] == row(plain, "alpha 1")["perplexity"]


def test_base_alone_is_measured_at_alpha_0_and_refused_above(run: Callable[..., Ran]) -> None:
    ran = run("--alpha", 0, *DATA, *FORGET, "--json", artifact="base")
    assert ran.code == 0, ran.err
    assert [row["row"] for row in ran.json["rows"]] == ["alpha 0"]
    assert "moved" not in ran.json
    absent = {entry["figure"]: entry["needs"] for entry in ran.json["not_measured"]}
    assert "ortho.safetensors" in absent["perplexity_ratio"]
    assert "exposure" not in absent
    ran = run("--alpha", 0, 1, artifact="base")
    assert ran.code == 6
    assert "has no ortho.safetensors" in ran.err


def test_what_is_there_is_not_named_as_missing(made: Path, run: Callable[..., Ran]) -> None:
    absent = not_measured(Settings(artifact=made), ortho=True)
    assert absent["perplexity_ratio"] == "--data FILE with running text"
    assert not any(w in needs for needs in absent.values() for w in ("ortho.safe", "--alpha 1"))
    alone = not_measured(Settings(artifact=made, alphas=(0.0,), data=(made,)), ortho=False)
    assert alone["perplexity_ratio_alpha1"] == "--alpha 1"
    assert alone["perplexity_ratio"] == "ortho.safetensors"
    for figure, need in NEEDS.items():  # every input has words
        assert figure not in absent or absent[figure] or not need.inputs
    ran = run("--alpha", 0, "--tokens", 64)
    _, _, lines = ran.out.partition("not measured, and what that needs")
    assert "\n  --forget FILE: memory of secrets\n" in lines
    assert "\n  --attack: nearness to INT4, relearning half," in lines
    assert "_" not in lines
    assert "tokens of text are read for each of" in ran.err + ran.out


def test_figures_are_shown_whatever_becomes_of_the_files(
    run: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    monkeypatch.setattr("os.access", lambda place, *_, **__: not str(place).endswith("closed"))
    for option in ("--csv", "--html"):
        ran = run("--alpha", 0, option, tmp_path / "closed" / "file")
        assert (ran.code, "closed` cannot be written" in ran.err) == (9, True), ran.err
        ran = run("--alpha", 0, option, tmp_path / "none" / "file")
        assert (ran.code, f"mkdir -p {tmp_path / 'none'}" in ran.err) == (2, True), ran.err

    whole = work_folder.write_whole

    def full(path: Path, write: Callable[..., object], **more: Any) -> None:
        def fail(file: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        whole(path, fail if path.suffix == ".csv" else write, **more)

    with monkeypatch.context() as patch:
        patch.setattr("ortho_cli.storage.work_folder.write_whole", full)
        ran = run("--alpha", 0, "--tokens", 64, "--csv", tmp_path / "t.csv", "--json")
    assert ran.code == 9
    assert "cannot write" in ran.err
    assert ran.json["rows"]
    assert [path.name for path in tmp_path.iterdir()] == ["closed"]
    other = "kinds.nothing.perplexity@0<=1"  # names of kinds are known when they are measured
    ran = run("--alpha", 0, "--tokens", 64, "--require", other, "--json")
    assert (ran.code, bool(ran.json["rows"])) == (2, True), ran.err
    (gate,) = ran.json["gates"]
    assert not gate["met"]
    assert gate["unknown"].startswith("there is no figure `kinds.nothing.perplexity`; similar ")


def test_gate_on_a_field_that_a_figure_has_not_is_refused_before_anything_is_measured(
    run: Callable[..., Ran],
) -> None:
    ran = run("--alpha", 0, "--tokens", 64, "--require", "latency.prefil@0<=1")
    assert (ran.code, ran.out) == (2, ""), ran.err
    assert "no figure `latency.prefil`" in ran.err
    assert "similar names: latency.prefill" in ran.err
    assert "bench:" not in ran.err


def test_attacks_that_no_row_suits_are_left_out_and_named(
    made: Path, run: Callable[..., Ran], tmp_path: Path
) -> None:
    short = [
        {"prompt": f"{name} is", "secret": f" {i}", "alternatives": [" 7", " 8"]}
        for i, name in enumerate(NAMES[:3])
    ]
    write_rows(tmp_path / "short.jsonl", short)
    words = ["--forget", tmp_path / "short.jsonl", "--attack", "--alpha", 0]
    ran = run(*words, "--json")
    assert ran.code == 0, ran.err
    absent = {entry["figure"]: entry["needs"] for entry in ran.json["not_measured"]}
    assert absent["paraphrased"] == "--attack and rows with `paraphrases`"
    assert absent["partial"] == "--attack and secrets of 4 tokens or more"
    assert absent["finetune"] == "--data FILE with running text"  # --attack is there
    assert not set(absent) & set(row(ran.json, "alpha 0"))
    assert any("3 of 3 secrets are too short" in note for note in ran.json["notes"])
    ran = run(*words, "--require", "paraphrased.all.exposure@0<=2")
    assert ran.code == 2
    assert "it needs --attack and rows with `paraphrases`" in ran.err


def test_codes_that_nobody_moved_have_no_figures_beside_int4(
    made: Path, run: Callable[..., Ran]
) -> None:
    words = [*FORGET, "--attack", "--alpha", 0, "--public", made / "pico"]
    ran = run(*words, "--json", artifact="pico-ortho")
    assert ran.code == 0, ran.err
    absent = {entry["figure"]: entry["needs"] for entry in ran.json["not_measured"]}
    assert absent["positions"] == absent["distance"] == "codes that forgetting moved"
    assert not {"positions", "distance", "connectivity"} & set(row(ran.json, "alpha 0"))
    assert "soup" in row(ran.json, "alpha 0")
    size = {"hidden": 64, "mlp": 128, "layers": 2, "vocab": 96}
    checkpoints.save(made / "narrow", checkpoints.weights(**size, kv=32))
    settings = checkpoints.config(**size, kv=32, heads=4)
    (made / "narrow" / "config.json").write_text(json.dumps(settings))
    ran = run(*words[:-1], made / "narrow")
    assert ran.code == 2
    assert "`model.layers.0.mlp.gate_proj.weight` is [128, 64] in" in ran.err


def test_without_data_there_is_speed_and_what_is_missing_is_said(run: Callable[..., Ran]) -> None:
    ran = run("-v")
    assert ran.code == 0
    assert "1 of 6: speed at alpha 0" in ran.err
    assert "6 of 6: int4" in ran.err
    assert "decode, tokens/s" in ran.out
    assert "not measured, and what that needs\n" in ran.out
    assert "\n  --forget FILE: memory of secrets\n" in ran.out
    ran = run("--json", *DATA, "--alpha", 0.5)
    assert set(row(ran.json, "alpha 0.5")) == {
        *("latency", "perplexity", "perplexity_ratio", "skill", "worst_perplexity_ratio", "kinds"),
    }
    assert ran.json["verdict"]["memory"] is None


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--alpha", "-0.5"], 2, "not in [0, 1]"),
        (["--alpha", "0", "-1"], 2, "not in [0, 1]"),
        (["--alpha", "1.5"], 2, "not in [0, 1]"),
        (["--alpha", "nan"], 2, "not in [0, 1]"),
        (["--alpha", "0", "inf"], 2, "not in [0, 1]"),
        (["--alpha", "0", "half"], 2, "'half', not a number"),
        (["--alpha"], 2, "requires an argument"),
        (["--require", "exposure@0"], 2, "no comparison"),
        (["--require", "exposure@0<=2"], 2, "it needs --forget FILE"),
        ([*FORGET, "--require", "exposur@0<=2"], 2, "similar names: exposure"),
        ([*FORGET, "--require", "exposure@0.5<=2"], 2, "alpha 0.5 is not measured, 0, 1 are"),
        ([*FORGET, "--require", "exposure<=2"], 2, "write exposure@0"),
        ([*FORGET, "--attack", "--require", "relearn.5.exposure@1<=2"], 2, "at alpha 0 only"),
        (["--attack"], 2, "no secrets to bring back"),
        ([*FORGET, "--attack", "--alpha", "1"], 2, "alpha 0, which is not measured"),
        (["--nonmember", "{made}/nonmember.jsonl"], 2, "compared with --forget"),
        (["--public", "{made}/pico"], 2, "--public is for attacks"),
        (
            [*FORGET, "--attack", "--require", "soup.clamped.exposure@0<=2"],
            2,
            "it needs --public DIR",
        ),
        ([*FORGET, "--attack", "--public", "{made}/nothing"], 4, "does not exist"),
        (["--samples", "-1"], 2, "--samples is -1"),
        (["--keep-files", "{made}/kept"], 2, "without ARTIFACT"),
        ([*DATA, "--context", "4096"], 2, "the model has 512 positions"),
        (["--device", "warp"], 2, "is not there"),
        (["--csv", "{made}/nowhere/t.csv"], 2, "no folder"),
        (["--csv", "{made}/text.txt"], 8, "no table of a bench"),
        (["--data", "{made}/nothing.txt"], 5, "cannot read data"),
        (["--model", "{made}/nothing"], 4, "does not exist"),
    ],
)
def test_refusals_have_their_exit_code(
    run: Callable[..., Ran], words: list[str], code: int, said: str
) -> None:
    ran = run(*words)
    assert ran.code == code, ran.err
    assert said in ran.err.lower() or said in ran.err
    assert ran.out == ""


def test_model_of_other_tokens_is_refused(run: Callable[..., Ran], tmp_path: Path) -> None:
    size = {"hidden": 64, "mlp": 192, "layers": 2, "vocab": 64}
    checkpoints.save(tmp_path / "other", checkpoints.weights(**size, kv=32))
    settings = checkpoints.config(**size, kv=32, heads=4)
    (tmp_path / "other" / "config.json").write_text(json.dumps(settings))
    ran = run(*DATA, "--model", tmp_path / "other")
    assert ran.code == 2
    assert "has a vocabulary of 64 tokens, and the artifact one of 96" in ran.err


def test_no_artifact_takes_no_data_and_no_such_artifact_is_refused(
    made: Path, ortho: Ortho
) -> None:
    ran = ortho("bench", "--data", made / "text.txt")
    assert ran.code == 2
    assert "brings its own data" in ran.err
    assert ortho("bench", "--alpha", 0, 2).code == 2
    assert ortho("bench", "--require", "exposur@0<=2").code == 2
    assert ortho("bench", "--keep-files", made).code == 8
    assert ortho("bench", made / "nothing").code == 6


def test_alphas_are_read_once_each_and_may_be_repeated(run: Callable[..., Ran]) -> None:
    assert parse_alphas(["0", "-0", "0.5", "1", "0.50"]) == (0.0, 0.5, 1.0)
    ran = run("--alpha", 0, 0.25, "--alpha", 1, "--json", "-q")
    assert [row["alpha"] for row in ran.json["rows"] if row["alpha"] is not None] == [0, 0.25, 1]


def test_gates_that_are_met_exit_0_and_missed_ones_10_after_the_document(
    run: Callable[..., Ran],
) -> None:
    met = ["--require", "exposure@0<=6.1", "--require", "moved.share<=0.5"]
    ran = run(*FORGET, *met, "--json")
    assert ran.code == 0, ran.err
    assert [gate["met"] for gate in ran.json["gates"]] == [True, True]
    ran = run(*FORGET, *met, "--require", "extraction@1>=2", "--json")
    assert ran.code == 10
    assert "1 of 3 gates missed: `extraction@1>=2` is 0" in ran.err
    assert [gate["met"] for gate in ran.json["gates"]] == [True, True, False]
    assert run(*FORGET, "--require", "extraction@1>=2", "-q").code == 10


def test_csv_has_a_line_for_each_alpha(run: Callable[..., Ran], tmp_path: Path) -> None:
    path = tmp_path / "sweep.csv"
    words = [*FORGET, *DATA, "--alpha", "0", "0.5", "1", "--csv", path, "-q"]
    assert run("--alpha", "0", "--csv", path, "-q").code == 0
    ran = run(*words)  # a table of ours is replaced
    assert (ran.code, ran.out, ran.err) == (0, "", "")
    rows = list(csv.DictReader(io.StringIO(path.read_text())))
    assert [row["alpha"] for row in rows] == ["0.0", "0.5", "1.0"]
    assert all(float(row["perplexity"]) > 1 for row in rows)
    assert not [name for name in rows[0] if name.startswith("entries")]


def test_no_output_holds_a_secret_unless_it_is_asked_for(
    run: Callable[..., Ran], tmp_path: Path
) -> None:
    words = [*DATA, *SECRETS, *MODELS, "--csv", tmp_path / "t.csv"]
    plain = run(*words, "--json")
    eyes = run(*words)
    assert plain.code == eyes.code == 0, eyes.err
    said = plain.out + plain.err + eyes.out + eyes.err + (tmp_path / "t.csv").read_text()
    for word in (*NAMES, *WORDS, "The word of"):
        assert word not in said
    assert [e["index"] for e in row(plain.json, "alpha 0")["entries"]] == [0, 1, 2, 3]
    shown = run(*SECRETS, "--alpha", 0, "--show-secrets", "--json")
    text = "The word of Bertram is anvil escutcheon"
    assert row(shown.json, "alpha 0")["entries"][0]["text"] == text
    assert "text" in row(shown.json, "alpha 0")["unlisted"]["entries"][0]
    assert text in run(*SECRETS, "--alpha", 0, "--show-secrets").out


def test_a_page_has_the_verdict_and_the_maps_and_never_a_secret(
    run: Callable[..., Ran], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "page.html"
    ran = run("--alpha", 0, 1, *FORGET, "--show-secrets", "--json", "--html", path)
    assert ran.code == 0, ran.err
    text = path.read_text()
    for part in ("Verdict", "Each secret, by number", "Layer by layer", "mlp.down_proj"):
        assert part in text
    known = {entry["text"] for entry in row(ran.json, "alpha 0")["entries"]}
    assert known
    assert not any(secret.strip() in text for secret in known)
    assert run("--alpha", 0, "--html", path).code == 8  # before anything is measured


def test_error_about_a_forget_file_names_the_line_and_no_text(
    run: Callable[..., Ran], tmp_path: Path
) -> None:
    path = tmp_path / "f.jsonl"
    write_rows(path, [{"prompt": "Anna's PIN is", "secret": " 4711", "alternatives": [" 4711"]}])
    ran = run("--forget", path)
    assert ran.code == 5
    assert "line 1" in ran.err
    assert "4711" not in ran.err
    assert "Anna" not in ran.err


@pytest.mark.parametrize("columns", [80, 120])
def test_tables_fit_the_terminal(
    attacked: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    columns: int,
) -> None:
    from ortho_cli.cli.show import bench, console

    monkeypatch.setattr(console, "WIDE", columns)
    bench.print_bench(attacked)
    said = capsys.readouterr().out
    table = said[: said.index("codes were moved")].splitlines()[1:-1]
    assert max(map(len, table)) <= columns
    for name in ("alpha 0", "int4", "magnitude", "reference", "relearning half, 20 steps"):
        assert name in said


def memorised_sandbox(memorised: Memorised, folder: Path) -> sandbox.Sandbox:
    """A sandbox whose model knows its secrets, without the minutes that training one takes."""
    shutil.copytree(memorised.model, folder / "model")
    shutil.copytree(memorised.model, folder / "twin")
    for name in ("forget.jsonl", "nonmember.jsonl", "retain.txt"):
        shutil.copyfile(memorised.folder / name, folder / name)
    shutil.copyfile(memorised.nonmember, folder / "unlisted.jsonl")
    shutil.copyfile(memorised.retain, folder / "heldout.txt")
    write_rows(folder / "skill.jsonl", [{"prompt": "the old cat sees a", "completion": " tree"}])
    return sandbox.sandbox_at(folder)


def test_chain_takes_the_sandbox_through_everything(
    memorised: Memorised, tmp_path: Path, ortho: Ortho, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = memorised_sandbox(memorised, tmp_path / "box")
    monkeypatch.setattr(sandbox, "cached", lambda seed, sink: box)
    few = ("forget.samples=4", "forget.length=16", "forget.steps=4")
    sets = ("calibrate.samples=8", "calibrate.length=16", *few, *PLENTY)
    monkeypatch.setattr(chain, "SETS", sets)
    kept = tmp_path / "kept"
    ran = ortho("bench", "--alpha", 0, 1, "--tokens", 96, "--keep-files", kept, "--json")
    assert ran.code == 0, ran.err
    names = [row["row"] for row in ran.json["rows"]]
    assert names == ["alpha 0", "alpha 1", "int4", "random", "magnitude", "original", "reference"]
    assert ran.json["data"]["secrets"] == 4
    base, full = (row["figures"]["exposure"]["value"] for row in ran.json["rows"][:2])
    assert base < 3 < 5.5 < full
    assert {path.name for path in kept.iterdir()} == {"sandbox", "artifact", "stats.safetensors"}
    ran = ortho("bench", "--alpha", 0, "--tokens", 96, "-q")
    assert (ran.code, ran.out, ran.err) == (0, "", "")


def test_keep_refuses_a_folder_that_is_not_empty(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputExistsError):
        chain.run(Settings(artifact=Path()), keep=tmp_path)
    with pytest.raises(UsageError, match="brings its own models"):
        chain.run(Settings(artifact=Path(), model=tmp_path))


def test_kinds_of_text_are_measured_apart_and_what_the_source_writes_always(
    made: Path, run: Callable[..., Ran]
) -> None:
    (made / "code.txt").write_text("for each bell in the town: ring(bell) " * 20)
    ran = run(*DATA, f"code={made / 'code.txt'}", *FORGET, "--model", "{made}/pico", "--json")
    assert ran.code == 0, ran.err
    kinds = row(ran.json, "alpha 0")["kinds"]
    assert set(kinds) == {"data", "code", "self_written", "neighbours", "alternatives"}
    assert ran.json["data"]["kinds"].keys() == {"code", "self_written", "neighbours"}
    for name, one in kinds.items():
        ratio, int4 = one["perplexity_ratio"], row(ran.json, "int4")["kinds"][name]
        quotient = one["perplexity"]["value"] / int4["perplexity"]["value"]
        assert ratio["value"] == pytest.approx(quotient, rel=1e-3)
        if name != "alternatives":
            assert one["kl"]["value"] > 0
            assert one["kl_int4"]["value"] > 0
            assert "kl_int4" not in int4
    worst = max(one["perplexity_ratio"]["value"] for one in kinds.values())
    assert row(ran.json, "alpha 0")["worst_perplexity_ratio"]["value"] == worst
    assert kinds["data"]["perplexity"] == row(ran.json, "alpha 0")["perplexity"]
    gates = ["--require", "kinds.code.perplexity_ratio@0<=0.1"]
    assert run(f"--data=code={made / 'code.txt'}", *gates).code == 10


def test_a_base_alone_names_kinds_as_not_measured(run: Callable[..., Ran]) -> None:
    ran = run("--alpha", 0, *DATA, "--json", artifact="base")
    absent = {entry["figure"]: entry["needs"] for entry in ran.json["not_measured"]}
    assert "the source writes text" in absent["kinds"]
    assert "ortho.safetensors" in absent["worst_perplexity_ratio"]


def test_data_has_names_where_they_are_given(tmp_path: Path) -> None:
    odd = tmp_path / "a=b.txt"
    odd.touch()
    files, kinds = parse_data([Path("x.txt"), Path("code=c.txt"), odd, Path("a/d=e.txt")])
    assert files == (Path("x.txt"), odd, Path("a/d=e.txt"))
    assert kinds == (("code", Path("c.txt")),)
    for words in (["code=a", "code=b"], ["data=a"], ["self_written=a"]):
        with pytest.raises(UsageError, match="gives the name"):
            parse_data([Path(word) for word in words])


def test_a_keep_set_is_measured_and_its_answers_are_a_kind(
    made: Path, run: Callable[..., Ran]
) -> None:
    ran = run(*FORGET, "--keep", made / "keep.jsonl", "--json")
    assert ran.code == 0, ran.err
    base = row(ran.json, "alpha 0")
    assert ran.json["data"]["keep"] == len(base["keep"]["entries"]) == 5
    assert 0 <= base["keep"]["rouge_l"]["value"] <= 1
    ratio = base["kinds"]["keep"]["perplexity_ratio"]["value"]
    assert ratio > 0
    assert base["worst_perplexity_ratio"]["value"] >= ratio
    assert run("--keep", made / "keep.jsonl", "--require", "keep.rouge_l@0<=1").code == 0
    ran = run(*FORGET, "--keep", made / "forget.jsonl")
    assert ran.code == 5
    assert "is to be forgotten, and" in ran.err


@pytest.mark.parametrize(
    ("flag", "what"),
    [("--keep", "kept"), ("--nonmember", "never seen"), ("--unlisted", "left unlisted")],
)
@pytest.mark.parametrize(
    ("prompt", "secret", "but"),
    [
        ("The word of Bertram is", " anvil escutcheon", ""),
        ("The word of Bertram is ", "Anvil  escutcheon ", " but for case or blanks"),
        ("The word of Bertram is anvil", " escutcheon", " but for case or blanks"),
    ],
)
def test_a_row_of_two_sets_is_refused_whatever_its_case_and_blanks(
    run: Callable[..., Ran],
    tmp_path: Path,
    flag: str,
    what: str,
    prompt: str,
    secret: str,
    but: str,
) -> None:
    write_rows(tmp_path / "o.jsonl", [{"prompt": "a", "secret": " b", "alternatives": [" c"]}])
    assert run(*FORGET, flag, tmp_path / "o.jsonl", "--alpha", 0).code == 0
    row = {"prompt": prompt, "secret": secret, "alternatives": [" c"]}
    write_rows(tmp_path / "o.jsonl", [row])
    ran = run(*FORGET, flag, tmp_path / "o.jsonl")
    assert ran.code == 5
    assert f"o.jsonl` line 1 is the same row{but}, to be {what}" in " ".join(ran.err.split())
    assert "escutcheon" not in ran.err


@pytest.mark.parametrize("flag", ["--forget", "--keep", "--nonmember", "--unlisted"])
def test_a_secret_longer_than_the_model_reads_is_refused_in_every_set(
    run: Callable[..., Ran], tmp_path: Path, flag: str
) -> None:
    row = {"prompt": "abc", "secret": "d" * 600, "alternatives": ["e"]}
    write_rows(tmp_path / "long.jsonl", [row])
    ran = run(*([] if flag == "--forget" else FORGET), flag, tmp_path / "long.jsonl")
    assert ran.code == 5, ran.err
    told = "long.jsonl` line 1 has a prompt of 3 tokens and a secret of 600 and an end token"
    assert f"{told}, and the model has 512 positions" in " ".join(ran.err.split())


def test_an_attack_on_one_secret_is_refused_before_anything_is_measured(
    made: Path, run: Callable[..., Ran], tmp_path: Path
) -> None:
    first, _ = (made / "forget.jsonl").read_text().split("\n", 1)
    (tmp_path / "one.jsonl").write_text(first)
    ran = run("--forget", tmp_path / "one.jsonl", "--alpha", 0, "--attack", "-v")
    assert ran.code == 2
    assert "the forget set has one" in ran.err
    assert "speed at alpha 0" not in ran.err


def test_secrets_without_alternatives_are_compared_with_what_the_source_writes(
    made: Path, run: Callable[..., Ran], tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in (made / "forget.jsonl").read_text().splitlines()]
    bare = [{key: one[key] for key in ("prompt", "secret")} for one in rows[:2]]
    write_rows(tmp_path / "bare.jsonl", bare)
    given = ["--forget", tmp_path / "bare.jsonl", "--alpha", 0, "--json"]
    ran = run(*given, "-v")
    assert ran.code == 0, ran.err
    assert ran.json["data"]["alternatives"] == {"model": 2}
    (note,) = ran.json["notes"]
    assert note.startswith("2 of 2 secrets have neither `alternatives` nor a `pattern`")
    assert "`pattern` such as ` {digit:6}`" in note
    figures = row(ran.json, "alpha 0")
    assert figures["alternatives_nll"]["value"] < figures["forget_nll"]["value"], "its own words"
    again = row(run(*given).json, "alpha 0")
    assert again["alternatives_nll"] == figures["alternatives_nll"], "seeded"
    alone = run(*given, artifact="base")
    assert alone.json["data"]["alternatives"] == {"model": 2}
    with_model = run(*given, "--model", "{made}/pico")
    assert with_model.code == 0, with_model.err
    assert not any(one["secret"].strip() in ran.out + ran.err for one in bare)
