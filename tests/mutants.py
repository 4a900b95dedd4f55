"""Breaks one promise of README after another, and fails if no test notices.

    python tests/mutants.py [--only WORDS]

Each mutant changes one line of a copy of the package, and runs the tests that hold the promise. A
mutant that survives is a promise that nothing holds; a line that is not there any more has moved,
and the mutant has to follow it. Without a mutant the same tests have to pass.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
COPIED = ("ortho_cli", "tests", "recipes", "pyproject.toml", "README.md", "Makefile")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """One fault, and the tests that have to find it."""

    promise: str  # of README
    file: str  # in ortho_cli/
    sound: str  # in that file, once
    faulty: str
    tests: str  # arguments of pytest


MUTANTS = (
    Mutant(
        promise="any tiles: positions that the compiled loop finds",
        file="split/numba_loops.py",
        sound="= candidates.start + row * columns + i",
        faulty="= row * columns + i",
        tests="tests/decompose/test_tiles.py -k 'same_bytes and absmax-True'",
    ),
    Mutant(
        promise="any tiles: what a global budget surveys",
        file="split/pipeline.py",
        sound="inputs.rows.read(raw, row)",
        faulty="inputs.rows.read(raw, 0)",
        tests="tests/decompose/test_tiles.py -k same_survey",
    ),
    Mutant(
        promise="any tiles: positions of the pass before",
        file="split/pipeline.py",
        sound="places = given.positions[here] - tile.start",
        faulty="places = given.positions[here] - given.positions[here][:1]",
        tests="tests/decompose/test_tiles.py -k 'same_bytes and turns and not global'",
    ),
    Mutant(
        promise="any tiles: codes that forgetting moves",
        file="split/pipeline.py",
        sound="task.edit.within(tile.start, tile.start + raw.size)",
        faulty="task.edit.within(0, raw.size)",
        tests="tests/decompose/test_tiles.py -k what_forgets",
    ),
    Mutant(
        promise="any tiles: the model before it saw the secrets",
        file="split/pipeline.py",
        sound="inputs.reference.read(reference, row)",
        faulty="inputs.reference.read(reference, 0)",
        tests="tests/decompose/test_tiles.py -k a_reference",
    ),
    Mutant(
        promise="any tiles: base beside the int8 values of ortho",
        file="formats/compact.py",
        sound="*read(start, count), *at",
        faulty="*read(0, count), *at",
        tests="tests/decompose/test_tiles.py -k 'same_bytes and compact-False'",
    ),
    Mutant(
        promise="any tiles: what convert writes",
        file="convert/job.py",
        sound="source.read(row, count), row",
        faulty="source.read(0, count), row",
        tests="tests/decompose/test_tiles.py -k from_a_checkpoint",
    ),
    Mutant(
        promise="ties go to the lower index",
        file="split/select.py",
        sound="ties[self.k - keep.size :]",
        faulty="ties[: keep.size - self.k]",
        tests="tests/split/test_select.py",
    ),
    Mutant(
        promise="any workers: records in the order of the plan",
        file="decompose/job.py",
        sound="records = [done[tensor.name] for tensor in plan.tensors]",
        faulty="records = list(done.values())",
        tests="tests/decompose/test_job.py -k any_workers_and_any_sharding",
    ),
    Mutant(
        promise="any kill: finished tensors are read again",
        file="decompose/job.py",
        sound="and not self._is_intact(tensor, records[tensor.name])",
        faulty="and False",
        tests="tests/test_crash.py -k only_looks_the_same",
    ),
    Mutant(
        promise="any kill: a damaged journal ends where it is sure",
        file="storage/work_folder.py",
        sound="lines[1:] = takewhile(self._is_sound, lines[1:])",
        faulty="lines[1:] = list(lines[1:])",
        tests="tests/test_crash.py -k damaged_work",
    ),
    Mutant(
        promise="alpha = 1 has the source's weights at ortho's positions",
        file="split/select.py",
        sound="np.take(payload, found, out=held[here]",
        faulty="np.take(payload, found - 1, out=held[here]",
        tests="tests/test_alpha_one.py -k gptq",
    ),
)


def run(folder: Path, tests: str) -> subprocess.CompletedProcess[str]:
    """Run some tests on a copy of the package."""
    command = f"{sys.executable} -m pytest -q -x -p no:cacheprovider {tests}"
    return subprocess.run(
        command,
        shell=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def copy(folder: Path) -> None:
    """Copy what the tests need, with the loops that numba has compiled already."""
    for name in COPIED:
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy2)(source, folder / name)


def killed(mutant: Mutant, folder: Path) -> bool:
    """Put the fault into the copy, run its tests, and take it out again."""
    path = folder / "ortho_cli" / mutant.file
    text = path.read_text()
    if text.count(mutant.sound) != 1:
        raise SystemExit(f"{mutant.file} holds {text.count(mutant.sound)} times: {mutant.sound}")
    path.write_text(text.replace(mutant.sound, mutant.faulty))
    ran = run(folder, mutant.tests)
    path.write_text(text)
    if ran.returncode not in (0, 1):
        raise SystemExit(f"pytest {mutant.tests} ended with {ran.returncode}\n{ran.stdout[-2000:]}")
    return ran.returncode == 1


def main() -> int:
    """Try each mutant; 1 if one survives."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default="", help="mutants whose promise or file has these words")
    words = parser.parse_args().only
    chosen = [m for m in MUTANTS if words in m.promise or words in m.file]
    survivors = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy(folder)
        for tests in dict.fromkeys(mutant.tests for mutant in chosen):
            ran = run(folder, tests)
            if ran.returncode:
                raise SystemExit(f"without a mutant fails: {tests}\n{ran.stdout[-2000:]}")
        for mutant in chosen:
            dead = killed(mutant, folder)
            survivors += not dead
            print(
                "dead    " if dead else "SURVIVES", mutant.promise, f"({mutant.file})", flush=True
            )
    print(f"{len(chosen)} mutants, {survivors} survive")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
