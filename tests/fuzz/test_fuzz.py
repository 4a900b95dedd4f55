"""A short fuzz of every reader, and the corpus; `make fuzz` goes on for as long as is asked."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from random import Random

import corpus
import pytest
import targets
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every sound folder, read once."""
    place = tmp_path_factory.mktemp("fuzz")
    with warnings.catch_warnings(action="ignore"):
        folders = targets.make(place / "sound")
        targets.warm_up(folders, place / "work")
    return folders


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Let other people's libraries warn of what they are given."""
    with warnings.catch_warnings(action="ignore"):
        yield


@pytest.mark.parametrize("name", targets.TARGETS)
def test_any_damage_ends_in_an_exit_code(name: str, sound: dict[str, Path], tmp_path: Path) -> None:
    target = targets.TARGETS[name]
    raw = (sound[target.made] / target.victim).read_bytes()

    @settings(max_examples=12, suppress_health_check=list(HealthCheck))
    @given(st.randoms(use_true_random=False))
    def damage(random: Random) -> None:
        with targets.limited():
            targets.check(*targets.attack(target, target.kind(raw, random), sound, tmp_path / "w"))

    damage()


@pytest.mark.parametrize("name", corpus.CASES)
def test_malformed_file_has_its_exit_code_and_sentence(
    name: str, sound: dict[str, Path], tmp_path: Path
) -> None:
    case = corpus.CASES[name]
    with targets.limited():
        code, err = corpus.run(name, sound, tmp_path / "w")
    assert code == case.code, err
    assert case.said in err
    targets.check(code, err)


def test_claims_of_headers_take_no_memory() -> None:
    kinds = ("header", "folder", "index", "forget set")
    script = [sys.executable, str(HERE / "corpus.py"), *kinds]
    path = ":".join((str(HERE.parent), *sys.path))
    ran = subprocess.run(script, capture_output=True, text=True, env={"PYTHONPATH": path})
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_readme_counts_the_corpus() -> None:
    readme = (HERE.parent.parent / "ortho_cli" / "storage" / "README.md").read_text()
    assert f"has {len(corpus.CASES)} malformed files" in readme
