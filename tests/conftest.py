"""Fixtures: a pico checkpoint, and the command line run in this process."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import checkpoints
import pytest
import torch
from hypothesis import settings
from memorised import Memorised
from memorised import build as build_memorised

from ortho_cli.cli import app
from ortho_cli.convert import plan as convert_plan
from ortho_cli.convert.sources import open_source
from ortho_cli.convert.targets import factors, gguf_base
from ortho_cli.decompose import plan, recheck
from ortho_cli.split import pipeline
from ortho_cli.split.sizes import Part, Sizes
from ortho_cli.storage import speeds
from ortho_cli.storage.speeds import Speeds

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


timed_by = Speeds.of
EVEN = dict.fromkeys(("float32", "logit", "byte of a file"), 1e-9)  # seconds


@pytest.fixture(autouse=True)
def even_speeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each piece of work take as long as others of its size: tests time nothing."""
    monkeypatch.setattr(Speeds, "of", lambda self, what, measure: EVEN.get(what, 1e-3))


@pytest.fixture
def real_speeds(even_speeds: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Time what is asked for, and keep it in a cache of the test's own, which is returned."""
    monkeypatch.setattr(Speeds, "of", timed_by)
    monkeypatch.setattr(
        speeds, "_busy", lambda cores: 1
    )  # else times are taken again as it changes
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ortho"


class Pass(NamedTuple):
    """One pass over a weight."""

    kernel: Any
    bar: float  # that it began with; -1 where none was guessed


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[Pass]:
    """List the passes over weights, whatever splits them, from now on."""
    found: list[Pass] = []
    original = pipeline.split_tensor

    def watched(work: Any, select: Any, *rest: Any) -> Any:
        found.append(Pass(work.kernel, float(select.bar)))
        return original(work, select, *rest)

    monkeypatch.setattr(pipeline, "split_tensor", watched)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class SmallTiles(Sizes):
    """Sizes that cut even a pico tensor into many tiles, and count the tiles that were made."""

    split: int = 1000
    gptq: int = 1100
    device: int = 900
    in_memory: int = 1000
    check: int = 800
    values: int = 300
    convert: int = 700
    bar_sample: int = 1024
    copy_bytes: int = 1 << 8
    made: list[tuple[Part, int, int]] = field(default_factory=list)  # part, weights, tiles
    proven: list[Part] = field(default_factory=list)

    def tiles(self, part: Part, shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
        """Cut a tensor, and count its tiles when the last one was taken."""
        count = 0
        for tile in Sizes.tiles(self, part, shape):
            count += 1
            yield tile
        self.made.append((part, shape[0] * shape[1], count))

    def prove(self, *parts: Part) -> None:
        """See that each part of the work cut tensors, those larger than a tile into several."""
        for part in parts:
            size = getattr(self, part)
            counts = [tiles for one, weights, tiles in self.made if one == part and weights > size]
            assert counts, f"nothing larger than a tile was cut for `{part}`"
            assert min(counts) > 1, f"a tensor was one tile for `{part}`: {counts}"
        self.made.clear()
        self.proven.extend(parts)

    @contextmanager
    def in_commands(self) -> Iterator[None]:
        """Give these sizes to what the commands call."""
        with pytest.MonkeyPatch.context() as patch:
            for module, name in (
                (plan, "make_plan"),
                (convert_plan, "make_plan"),
                (open_source, "open_source"),
                (recheck, "check_values"),
                (gguf_base, "plan_base"),
                (factors, "open_ortho"),
            ):
                patch.setattr(module, name, partial(getattr(module, name), sizes=self))
            yield


@pytest.fixture
def small_tiles() -> Iterator[SmallTiles]:
    """Sizes that make many tiles of a tensor; the test has to prove that they did."""
    sizes = SmallTiles()
    yield sizes
    assert sizes.proven, "nothing proves that there was more than one tile: call `prove`"


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
    return save_pico(tmp_path / "pico", pico_tensors)


def read_terminal(hers: int, mine: int, command: Sequence[str], **options: Any) -> bytes:
    """Run a command on a terminal (both ends of it are closed here); give all that it shows."""
    said = b""
    with subprocess.Popen(command, **options) as process:
        os.close(mine)
        try:
            while piece := os.read(hers, 4096):
                said += piece
        except OSError:  # the end, on Linux
            pass
    os.close(hers)
    assert process.returncode == 0, said
    return said


def save_pico(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """Write what the fixture `pico` gives."""
    checkpoints.save(folder, tensors)
    settings = checkpoints.config(**PICO, kv=32, heads=4)
    del settings["architectures"]  # so the default recipe is int4: nothing here can write text
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


Once = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """Fill a folder once in a run, whatever the processes; shared, so nothing may be written there.

    Source: "Making session-scoped fixtures execute only once" in the how-to of pytest-xdist.
    """
    place = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # else the folder above holds other runs
        place = place.parent

    def make(name: str, fill: Callable[[Path], object]) -> Path:
        folder, unfinished = place / f"once-{name}", place / f"once-{name}.unfinished"
        with (place / f"once-{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                shutil.rmtree(unfinished, ignore_errors=True)  # of a process that failed here
                unfinished.mkdir()
                with warnings.catch_warnings(action="ignore"):  # other people's deprecations
                    fill(unfinished)
                unfinished.rename(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def memorised_by_seed(once: Once) -> Callable[[int], Memorised]:
    """A tiny Llama that knows four secrets by heart, trained from a seed."""

    def build(seed: int) -> Memorised:
        return Memorised(once(f"memorised-{seed}", partial(build_memorised, seed=seed)))

    return build


@pytest.fixture(scope="session")
def memorised(memorised_by_seed: Callable[[int], Memorised]) -> Memorised:
    """The model of one seed, for what does not depend on how well the method works."""
    return memorised_by_seed(2)


@pytest.fixture(scope="session")
def three_memorised(memorised_by_seed: Callable[[int], Memorised]) -> list[Memorised]:
    """The models of the first three seeds, for means of what the method achieves."""
    return [memorised_by_seed(seed) for seed in range(3)]
