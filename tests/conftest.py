"""Fixtures: a pico checkpoint, and the command line run in this process."""

from __future__ import annotations

import json
import signal
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from hypothesis import settings
from memorised import Memorised
from memorised import build as build_memorised

from ortho_cli.cli import app

# A busy machine is no fault of the code; speed has a bench of its own.
settings.register_profile("ortho", deadline=None)
settings.load_profile("ortho")

PICO = {"hidden": 64, "mlp": 192, "layers": 2, "vocab": 96}


@dataclass
class Ran:
    """What one command gave."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Ortho = Callable[..., Ran]


@pytest.fixture
def ortho(capsys: pytest.CaptureFixture[str]) -> Ortho:
    """Run `ortho ARGUMENTS` and return exit code, stdout and stderr."""

    def run(*arguments: object) -> Ran:
        capsys.readouterr()
        code = app.run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return run


@pytest.fixture(autouse=True)
def ctrl_c_counts() -> Iterator[None]:
    """Take SIGINT as at a terminal: shells start background jobs with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def pico_tensors() -> dict[str, torch.Tensor]:
    """Tensors of a two-layer Llama with tied embeddings."""
    return checkpoints.weights(**PICO, kv=32)


@pytest.fixture
def pico(tmp_path: Path, pico_tensors: dict[str, torch.Tensor]) -> Path:
    """A model folder: weights, config, tokenizer, a nested file."""
    folder = tmp_path / "pico"
    checkpoints.save(folder, pico_tensors)
    settings = checkpoints.config(**PICO, kv=32, heads=4)
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("kept\n")
    return folder


@pytest.fixture
def artifact(pico: Path, ortho: Ortho) -> Path:
    """The pico model, decomposed with the default recipe."""
    assert ortho("decompose", pico, "-q").code == 0
    return pico.parent / "pico-ortho"


@pytest.fixture(scope="session")
def memorised(tmp_path_factory: pytest.TempPathFactory) -> Memorised:
    """A tiny Llama that knows four secrets by heart; shared, so nothing may be written there."""
    with warnings.catch_warnings(action="ignore"):
        return build_memorised(tmp_path_factory.mktemp("memorised"))
