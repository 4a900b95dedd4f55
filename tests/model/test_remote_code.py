"""Code that lies beside weights runs when `--trust-remote-code` says so, and not before."""

from __future__ import annotations

import json
from pathlib import Path

import checkpoints
import pytest
from conftest import Ortho

import ortho_cli
from ortho_cli.errors import ArtifactError
from ortho_cli.storage.untrusted import is_trusted

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")  # other people's deprecations

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({marker!r}).write_text("ran")
class StrangeConfig(LlamaConfig):
    model_type = "stranger"
class StrangeModel(LlamaForCausalLM):
    config_class = StrangeConfig
"""
FEW = ["--set", "calibrate.samples=1", "--set", "calibrate.length=8"]
UNASKED = "needs Python code of its own, which is not run without being asked to"


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "marker"


@pytest.fixture
def strange(tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model that transformers can build only by code from its folder."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked at the terminal"))
    folder = tmp_path / "strange"
    checkpoints.save(folder, checkpoints.weights(hidden=64, mlp=64, layers=1, vocab=96))
    small = {"hidden": 64, "mlp": 64, "layers": 1, "vocab": 96, "kv": 64, "heads": 1}
    told = {"AutoConfig": "code_.StrangeConfig", "AutoModelForCausalLM": "code_.StrangeModel"}
    config = checkpoints.config(**small) | {"model_type": "stranger", "auto_map": told}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code_.py").write_text(CODE.format(marker=str(marker)))
    checkpoints.save_tokenizer(folder, vocab=96)
    (tmp_path / "d.txt").write_text("A cat, and 2 more of them. " * 99)
    return folder


def test_calibrate_runs_it_only_when_asked(strange: Path, marker: Path, ortho: Ortho) -> None:
    data, out = strange.parent / "d.txt", strange.parent / "s.safetensors"
    command = ["calibrate", strange, "--data", data, "-o", out, *FEW]
    refused = ortho(*command)
    assert refused.code == 4
    assert UNASKED in refused.err
    assert "hint: read its .py files; --trust-remote-code runs them" in refused.err
    assert not marker.exists()
    assert ortho(*command, "--trust-remote-code").code == 0
    assert marker.exists()
    assert not is_trusted()  # of the next command in this process


def test_decompose_runs_it_only_when_asked(strange: Path, marker: Path, ortho: Ortho) -> None:
    stats = strange.parent / "s.safetensors"
    checkpoints.save_statistics(stats, strange, gram="gradient")
    command = ["decompose", strange, "--stats", stats, "--data", strange.parent / "d.txt"]
    command += ["--recipe", "capability-tuned", "--set", "tune.samples=8", "--set", "tune.steps=1"]
    command += ["--set", "tune.length=8", "--set", "tune.batch=8", "-q"]
    refused = ortho(*command)
    assert (refused.code, UNASKED in refused.err) == (4, True), refused.err
    assert not marker.exists()
    ran = ortho(*command, "--trust-remote-code")
    assert ran.code == 0, ran.err
    assert marker.exists()


def test_bench_and_load_run_it_only_when_asked(strange: Path, marker: Path, ortho: Ortho) -> None:
    assert ortho("decompose", strange, "-q").code == 0
    split = strange.parent / "strange-ortho"
    refused = ortho("bench", split, "--alpha", "0")
    assert (refused.code, UNASKED in refused.err) == (6, True), refused.err
    with pytest.raises(ArtifactError, match="needs Python code of its own"):
        ortho_cli.load(split, alpha=0)
    assert not marker.exists()
    assert ortho_cli.load(split, alpha=0, trust_remote_code=True) is not None
    assert marker.exists()
    marker.unlink()
    ran = ortho("bench", split, "--alpha", "0", "--trust-remote-code", "-q")
    assert ran.code == 0, ran.err


def test_help_calls_it_dangerous(ortho: Ortho) -> None:
    for command in ("calibrate", "decompose", "bench"):
        said = ortho(command, "--help").out
        assert "--trust-remote-code" in said
        assert "Dangerous: run the Python code" in said
    for command in ("inspect", "convert"):  # which load no model
        assert "--trust-remote-code" not in ortho(command, "--help").out
