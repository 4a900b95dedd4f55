"""What recipes write of made-up checkpoints: the same tensors on every machine, ever after."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import recipe_digests
from conftest import Ortho
from recipe_digests import CASES, Case

GOLDEN = Path(__file__).parent / "golden" / "recipes.json"
PORTABLE = [case for case in CASES if case.portable and not case.same_as]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    recipe_digests.save_inputs(folder, llama=False)
    return folder


def written(cases: list[Case], inputs: Path, ortho: Ortho) -> dict[str, object]:
    """Run cases in this process, and give the digests that golden/recipes.json holds."""

    def run(case: Case, arguments: list[str]) -> None:
        ran = ortho(*arguments, "--force")
        assert ran.code == 0, f"{case.name}: {ran.err}"

    return recipe_digests.portable_digests(recipe_digests.record(cases, inputs, run), cases)


def test_recipes_write_the_tensors_that_they_always_wrote(inputs: Path, ortho: Ortho) -> None:
    before = json.loads(GOLDEN.read_text())
    assert recipe_digests.differences(before, written(PORTABLE, inputs, ortho)) == []


def test_recipes_write_the_same_without_numba(
    inputs: Path, ortho: Ortho, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    cases = [case for case in PORTABLE if case.recipe]
    before = json.loads(GOLDEN.read_text())
    named = {case.name: before[case.name] for case in cases}
    assert recipe_digests.differences(named, written(cases, inputs, ortho)) == []


def test_every_shipped_recipe_has_a_case() -> None:
    assert recipe_digests.uncovered() == []


def test_no_two_cases_write_to_one_place() -> None:
    for names in ([case.name for case in CASES], [case.out for case in CASES]):
        assert len(set(names)) == len(names)


def test_differences_name_case_place_and_both_values() -> None:
    before = {
        "odd int4": {
            "report": {"totals": {"sqnr": 2.0, "nnz": 3}, "tensors": [{"name": "a.weight"}]}
        },
        "odd mse": {},
    }
    now = {
        "odd int4": {
            "report": {
                "totals": {"sqnr": 1.5, "nnz": 3.0},
                "tensors": [{"name": "a.weight", "k": 1}],
            }
        },
        "odd global": {},
    }
    assert recipe_digests.differences(before, now) == [
        "`odd int4`: report > totals > sqnr: 2.0 before, 1.5 now (relative difference 0.25)",
        "`odd int4`: report > totals > nnz: 3 before, 3.0 now",
        "`odd int4`: report > tensors > a.weight > k: 'nothing' before, 1 now",
        "`odd mse`: not run",
        "`odd global`: not in the file",
    ]
