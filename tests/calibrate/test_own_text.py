"""The default of `ortho decompose`: curvature measured on text that the model itself writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from conftest import PICO, Ortho, save_pico
from safetensors.torch import load_file, save_file

from ortho_cli.calibrate import job as work
from ortho_cli.calibrate import memory, own_text
from ortho_cli.formats.statistics import open_statistics
from ortho_cli.model.self_written import random_text, write_text
from ortho_cli.storage.job import Commits

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")

SIZE = {"sequences": 64, "tokens": 2048}
FILES = ("model.safetensors", "ortho.safetensors", "report.json")


@pytest.fixture
def model(pico: Path) -> Path:
    """The pico model as one that transformers builds, with a tokenizer."""
    config = json.loads((pico / "config.json").read_text())
    names = {"architectures": ["LlamaForCausalLM"]}
    (pico / "config.json").write_text(json.dumps(config | names))
    checkpoints.save_tokenizer(pico, vocab=96)
    return pico


def split(ortho: Ortho, source: Path, out: Path, *options: object) -> tuple[str, Any]:
    ran = ortho("decompose", source, "-o", out, *options)
    assert ran.code == 0, ran.err
    return " ".join((ran.out + ran.err).split()), json.loads((out / "report.json").read_text())


def contents(out: Path) -> list[bytes]:
    return [(out / name).read_bytes() for name in FILES]


def test_default_splits_by_what_the_model_writes_and_says_so(ortho: Ortho, model: Path) -> None:
    said, report = split(ortho, model, model.parent / "a")
    assert "note: no --data: the model itself writes 64 sequences of 32 tokens, seed 0" in said
    assert "curvature is gram of 2,048 tokens, written by the model itself, seed 0" in said
    assert f"next: `ortho bench {model.parent / 'a'}`" in said
    assert "plain INT4" not in said
    told = report["statistics"]
    assert told["text"] == {"written_by": "model", "seed": 0, **SIZE}
    assert (report["recipe"]["base"]["scale"], told["kind"]) == ("curvature", "gram")
    split(ortho, model, model.parent / "b", "--workers", "2")
    assert contents(model.parent / "a") == contents(model.parent / "b")
    assert not list(model.parent.glob(".*"))
    # The same in two steps, by hand.
    stats = model.parent / "s"
    assert ortho("calibrate", model, "--recipe", "default", "-o", stats).code == 0
    split(ortho, model, model.parent / "c", "--recipe", "default", "--stats", stats)
    assert contents(model.parent / "a") == contents(model.parent / "c")
    split(ortho, model, model.parent / "d", "--set", "calibrate.seed=1")
    assert contents(model.parent / "a") != contents(model.parent / "d")


@pytest.mark.parametrize("tokenizer", [True, False])
@pytest.mark.parametrize("cache", [True, False])
def test_inputs_measured_are_those_of_the_text(
    ortho: Ortho, model: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: bool, cache: bool
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not cache:
        monkeypatch.setattr(work, "keeps_cache", lambda model: False)
    loaded = AutoTokenizer.from_pretrained(model) if tokenizer else None
    if not tokenizer:
        (model / "tokenizer.json").unlink()
        (model / "tokenizer_config.json").unlink()
    out = model.parent / "s"
    said = ortho("calibrate", model, "--recipe", "default", "-o", out)
    assert said.code == 0, said.err
    assert ("32 random tokens" in said.err) is not tokenizer
    assert open_statistics(out).data["retain"].written_by == ("model" if tokenizer else "random")
    live = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    size: Any = {"count": 64, "length": 32, "seed": 0}
    text = write_text(live, loaded, **size) if loaded else random_text(live, **size)
    found: list[torch.Tensor] = []
    down = live.model.layers[1].mlp.down_proj
    down.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0]))
    with torch.no_grad():
        live(input_ids=text, use_cache=False)
    measured = load_file(out)["model.layers.1.mlp.down_proj.retain_curvature"]
    expected = found[0][:, :-1].square().mean((0, 1))
    torch.testing.assert_close(measured, expected, rtol=1e-3, atol=1e-9)


def alone(model: Path) -> Path:
    shutil.copy(model / "model.safetensors", model.parent / "alone.safetensors")
    return model.parent / "alone.safetensors"


def masked(model: Path) -> Path:
    config = json.loads((model / "config.json").read_text())
    config["architectures"] = ["BertForMaskedLM"]
    (model / "config.json").write_text(json.dumps(config))
    return model


def unknown(model: Path) -> Path:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "nobody"}))
    return model


def with_another_weight(model: Path) -> Path:
    tensors = load_file(model / "model.safetensors")
    tensors["model.more.weight"] = torch.randn(64, 64)
    save_file(tensors, model / "model.safetensors")
    return model


OBSTACLES = {
    "a bare file": (alone, "is a bare file"),
    "no language model": (masked, "names BertForMaskedLM, no causal language model"),
    "nothing that transformers knows": (unknown, "transformers cannot load"),
    "a weight that is no Linear": (with_another_weight, "`model.more.weight` is no module"),
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_default_is_plain_int4_where_the_model_cannot_write_and_says_why(
    ortho: Ortho, model: Path, name: str
) -> None:
    change, why = OBSTACLES[name]
    source = change(model)
    said, report = split(ortho, source, model.parent / "a")
    assert why in said
    assert "they are split as by `--recipe int4`" in said
    assert "plain INT4, no curvature" in said
    assert report["statistics"] is None
    split(ortho, source, model.parent / "b", "--recipe", "int4")
    assert contents(model.parent / "a") == contents(model.parent / "b")
    assert not list(model.parent.glob(".*"))
    asked = ortho("decompose", source, "-o", model.parent / "c", "--recipe", "default")
    assert asked.code in (3, 4, 5)
    assert not (model.parent / "c").exists()


@pytest.mark.parametrize("lacks", ["transformers", "memory"])
def test_default_is_plain_int4_on_a_machine_that_lacks_something(
    ortho: Ortho, model: Path, monkeypatch: pytest.MonkeyPatch, lacks: str
) -> None:
    if lacks == "memory":
        monkeypatch.setattr(memory, "available_memory", lambda: 1_000_000)
    else:
        monkeypatch.setattr(own_text, "find_spec", lambda name: None)
    said, report = split(ortho, model, model.parent / "a", "--workers", "1")
    wanted = {"memory": "and 1 MB are available", "transformers": "pip install 'ortho-cli[hf]'"}
    assert wanted[lacks] in said
    assert report["statistics"] is None
    shown = ortho("inspect", model, "--json")
    assert any("split as by `--recipe int4`" in note for note in shown.json["notes"])


def test_dry_run_tells_what_it_would_measure_and_measures_nothing(
    ortho: Ortho, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_text, "measure", None)
    before = sorted(model.parent.rglob("*"))
    ran = ortho("decompose", model, "--dry-run", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["statistics"]["text_to_write"] == {**SIZE, "seed": 0}
    assert ran.json["plan_sha256"] is None
    shown = ortho("decompose", model, "--dry-run")
    assert "of 2,048 tokens that the model writes" in shown.out
    assert " to write text" in shown.out
    assert ortho("inspect", model, "--json").json["tensors"] == ran.json["tensors"]
    assert sorted(model.parent.rglob("*")) == before


def test_interrupted_default_resumes_without_measuring_again(
    ortho: Ortho, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split(ortho, model, model.parent / "whole")
    out, add = model.parent / "out", Commits.add

    def interrupted(self: Commits, line: dict[str, object]) -> None:
        add(self, line)
        if "layers.0.mlp" in str(line["name"]):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Commits, "add", interrupted)
        assert ortho("decompose", model, "-o", out).code == 130
    assert (model.parent / ".out.stats").exists()
    monkeypatch.setattr(work, "calibrate", None)
    split(ortho, model, out)
    assert contents(out) == contents(model.parent / "whole")
    assert not list(model.parent.glob(".*"))


def test_statistics_that_are_left_of_another_model_are_measured_again(
    ortho: Ortho, model: Path
) -> None:
    left, other = model.parent / ".out.stats", model.parent / "other"
    save_pico(other, checkpoints.weights(**PICO, kv=32, seed=1))
    shutil.copy(model / "config.json", other)
    assert ortho("calibrate", other, "--recipe", "default", "-o", left).code == 0
    split(ortho, model, model.parent / "out")
    split(ortho, model, model.parent / "again")
    assert contents(model.parent / "out") == contents(model.parent / "again")


def test_target_bits_picks_the_density_of_the_default_and_of_a_shipped_recipe(
    ortho: Ortho, model: Path
) -> None:
    options = ("--target-bits", "4.7", "--set", "base.group_size=64")
    before = sorted(model.parent.rglob("*"))
    assert ortho("decompose", model, *options, "--dry-run").code == 0
    assert sorted(model.parent.rglob("*")) == before
    for name, more in (("a", ()), ("b", ("--recipe", "int4"))):
        _, report = split(ortho, model, model.parent / name, *options, *more)
        assert 4.6 < report["totals"]["split_bits_per_weight"] <= 4.7
        assert (report["statistics"] is None) == bool(more)


def test_set_that_leaves_nothing_to_measure_is_a_change_of_int4(ortho: Ortho, model: Path) -> None:
    plain = ("--set", "base.scale=mse", "--set", "saliency.kind=residual")
    _, report = split(ortho, model, model.parent / "a", *plain)
    assert report["statistics"] is None
    assert report["recipe"]["ortho"]["density"] == 0.005
