from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from ortho_cli.decompose import recipe, settings
from ortho_cli.errors import RecipeError

BAD_RECIPES = {
    "unknown key": (
        "version: 1\northo: {densty: 0.1}",
        "line 2: unknown key `ortho.densty`",
        "did you mean `density`?",
    ),
    "unknown section": (
        "version: 1\nbass: {}",
        "line 2: unknown key `bass`",
        "did you mean `base`?",
    ),
    "unknown in override": (
        "version: 1\noverrides:\n  - {match: a}\n  - {match: b, ortho: {dens: 1}}",
        "line 4: unknown key `overrides.1.ortho.dens`",
        "did you mean `density`?",
    ),
    "wrong type": ("version: 1\northo:\n  density: lots", "line 3: `ortho.density`", "not 'lots'"),
    "a boolean": ("version: 1\northo: {density: true}", "line 2: `ortho.density`", "not True"),
    "density above 1": ("version: 1\northo: {density: 1.5}", "line 2: `ortho.density`", "not 1.5"),
    "density below 0": (
        "version: 1\northo: {density: -0.1}",
        "line 2: `ortho.density`",
        "not -0.1",
    ),
    "density NaN": ("version: 1\northo: {density: .nan}", "line 2: `ortho.density`", "not nan"),
    "no version": ("ortho: {density: 0.1}", "`version` is missing", "version: 1"),
    "version 2": ("version: 2", "line 1: `version`", "not 2"),
    "bits 5": ("version: 1\nbase: {bits: 5}", "line 2: `base.bits`", "3 or 4, not 5"),
    "bits 2 of some": (
        "version: 1\noverrides: [{match: a, base: {bits: 2}}]",
        "line 2: `overrides.0.base.bits`",
        "3 or 4, not 2",
    ),
    "bits 3.0 of some": (
        "version: 1\noverrides: [{match: a, base: {bits: 3.0}}]",
        "line 2: `overrides.0.base.bits`",
        "must be an integer, not 3.0",
    ),
    "group_size 12": (
        "version: 1\nbase: {group_size: 12}",
        "line 2: `base.group_size`",
        "multiple of 8",
    ),
    "group_size text": (
        "version: 1\nbase: {group_size: big}",
        "line 2: `base.group_size`",
        "not 'big'",
    ),
    "scale": ("version: 1\nbase: {scale: best}", "line 2: `base.scale`", "not 'best'"),
    "layout": ("version: 1\northo: {layout: dense}", "line 2: `ortho.layout`", "not 'dense'"),
    "regex": ("version: 1\ntargets: ['re:(']", "line 2: `targets.0`", "not a regular expression"),
    "override without match": ("version: 1\noverrides: [{}]", "`overrides.0.match` is missing", ""),
    "key twice": (
        "version: 1\nbase: {}\nbase: {}",
        "line 3 sets `base` again (first on line 2)",
        "",
    ),
    "alias": ("version: 1\nignore: &a [x]\ntargets: *a", "uses YAML aliases", ""),
    "syntax": ("version: 1\nbase: [", "is not YAML", ""),
    "tag": ("version: 1\nbase: !!python/object/apply:os.system [ls]", "is not YAML", ""),
    "version true": ("version: true", "must be an integer, not True", ""),
    "bits 4.0": ("version: 1\nbase: {bits: 4.0}", "must be an integer, not 4.0", ""),
    "no targets": ("version: 1\ntargets: []", "line 2: `targets`", "at least 1"),
    "huge regex": ("version: 1\nignore: ['re:a{99999999999}']", "not a regular expression", ""),
    "deep regex": (f"version: 1\nignore: ['re:{'(' * 5000}']", "not a regular expression", ""),
    "complex key": ("? [a, b]\n: 1", "line 1 has a key that is not plain text", ""),
    "merge key": ("version: 1\n<<: {base: {}}", "line 2 has a key that is not plain", ""),
    "odd int": ("version: 1\nbase: {bits: !!int ''}", "is not a recipe", ""),
    "odd bool": ("version: 1\nbase: {bits: !!bool abc}", "is not a recipe", ""),
    "odd time": ("version: 1\nbase: {bits: !!timestamp abc}", "is not a recipe", ""),
    "a list": ("- 1", "is a list", "version: 1"),
    "empty": ("", "is empty", "version: 1"),
    "too deep": ("version: 1\nbase: " + "[" * 5000, "is nested too deeply", ""),
}


@pytest.mark.parametrize("name", BAD_RECIPES)
def test_load_recipe_bad_file_names_file_line_and_near_key(tmp_path: Path, name: str) -> None:
    text, expected, also = BAD_RECIPES[name]
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        recipe.load_recipe(str(path))
    told = f"{caught.value.message} {caught.value.hint}"
    assert str(path) in caught.value.message
    assert expected in told
    assert also in told
    assert "\n" not in caught.value.message


def test_load_recipe_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(b"version: 1\n\xff\xfe")
    with pytest.raises(RecipeError, match="not UTF-8"):
        recipe.load_recipe(str(path))
    path.write_text("version: 1\n", encoding="utf-16")
    with pytest.raises(RecipeError) as caught:
        recipe.load_recipe(str(path))
    assert "iconv -f UTF-16 -t UTF-8" in str(caught.value.hint)


def test_load_recipe_number_without_a_point_is_a_number(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("version: 1\northo: {density: 1e-3}\n")
    assert recipe.load_recipe(str(path)).ortho.density == 0.001


def test_load_recipe_sets_lie_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("version: 1\noverrides: [{match: a, ortho: {density: 0.1}}]\n")
    sets = [
        "ortho.density=2e-2",
        "base.scale=mse",
        "overrides.0.ortho.density=0.3",
        "ignore=[x, y]",
    ]
    loaded = recipe.load_recipe(str(path), sets)
    assert loaded.ortho.density == 0.02
    assert loaded.base.scale == "mse"
    assert loaded.overrides[0].ortho.density == 0.3
    assert loaded.ignore == ["x", "y"]


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("ortho.density", "is not key.path=value"),
        ("=3", "is not key.path=value"),
        ("ortho..density=1", "is not key.path=value"),
        ("ortho.density=[", "is not YAML"),
        ("ortho.density=2", "not 2"),
        ("ortho.densty=0.1", "unknown key `ortho.densty`"),
        ("version.x=1", "goes through `version`"),
        ("overrides.0.match=a", "has no `0`"),
    ],
)
def test_load_recipe_bad_set_shows_the_assignment(assignment: str, expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe.load_recipe(None, [assignment])
    assert expected in caught.value.message
    assert f"--set {assignment}" in caught.value.message


def test_load_recipe_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(RecipeError) as caught:
        recipe.load_recipe("int4-mes")
    assert "int4-mse" in caught.value.message
    assert caught.value.hint == "did you mean `int4-mse`?"


@pytest.mark.parametrize("name", recipe.built_in())
def test_built_in_recipe_loads_and_its_header_is_its_command(name: str) -> None:
    loaded = recipe.load_recipe(name)
    split = loaded.ortho.split
    needs = loaded.forgets or "curvature" in (loaded.base.scale, loaded.saliency.kind)
    lines = (recipe.recipe_folder() / f"{name}.yaml").read_text().splitlines()
    told = f"#   ortho decompose MODEL --recipe {name}"
    told += " --stats stats.safetensors" if needs and not loaded.can_measure else ""
    told += " --forget forget.jsonl" if loaded.forgets else ""
    reads = split == "unlearn" or loaded.base.rounding == "tuned"
    told += " --data train.txt" if reads else ""
    told += " --reference BEFORE" if split == "reference" else ""
    if loaded.forgets:
        assert lines.pop(1) == "#   ortho calibrate MODEL --data train.txt"
    assert lines[1] == told
    assert len(lines) <= 40


def test_int4_recipe_spells_out_the_defaults() -> None:
    # Where no statistics are given: with them, the default would select by curvature.
    assert recipe.load_recipe("int4") == recipe.load_recipe(None, ["saliency.kind=residual"])
    assert recipe.load_recipe() == recipe.DEFAULT


def test_canonical_recipe_loads_as_itself(tmp_path: Path) -> None:
    loaded = recipe.load_recipe("attention")
    path = tmp_path / "again.yaml"
    path.write_text(yaml.safe_dump(loaded.canonical()))
    assert recipe.load_recipe(str(path)) == loaded


def test_canonical_recipe_tells_the_layout_only_where_it_is_not_that_of_ortho_1() -> None:
    assert "layout" not in recipe.DEFAULT.canonical()["ortho"]
    chosen = recipe.load_recipe(None, ["ortho={layout: compact, values: int8}"])
    assert chosen.canonical()["ortho"]["layout"] == "compact"


def test_json_schema_names_every_setting() -> None:
    text = json.dumps(settings.Recipe.model_json_schema())
    for key in ("targets", "on_unsupported", "group_size", "density", "overrides", "match"):
        assert f'"{key}"' in text


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("a.weight", "a.weight", True),
        ("*.weight", "x.y.weight", True),
        ("a.[qk].weight", "a.q.weight", True),
        ("A.weight", "a.weight", False),
        ("re:.*q_proj", "model.q_proj.weight", True),
        ("re:q_proj", "model.q_proj.weight", False),
        ("model.layers[0].weight", "model.layers[0].weight", True),
    ],
)
def test_matches_exact_glob_and_regex(pattern: str, name: str, expected: bool) -> None:
    assert settings.matches(pattern, name) is expected


def test_canonical_override_without_bits_is_spelled_as_before_there_were_any() -> None:
    sets = ["overrides=[{match: a, ortho: {density: 0.1}}, {match: b, base: {bits: 3}}]"]
    first, second = recipe.load_recipe(None, sets).canonical()["overrides"]
    assert first == {"match": "a", "base": {"scale": None}, "ortho": {"density": 0.1}}
    assert second["base"] == {"bits": 3, "scale": None}
