"""README and recipes are held to the code."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
from pathlib import Path

import checkpoints
import make_recipe_keys
import pyrage
import pytest
from conftest import Ortho
from memorised import Memorised

from ortho_cli import errors
from ortho_cli.cli import app
from ortho_cli.decompose import recipe
from ortho_cli.decompose.plan import make_plan
from ortho_cli.formats.statistics import open_statistics
from ortho_cli.storage.checkpoint import open_checkpoint

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RECIPES = (ROOT / "recipes" / "README.md").read_text()
DEPTH = [path.read_text() for path in sorted((ROOT / "ortho_cli").rglob("README.md"))]
BLOCKS = [
    block
    for text in (README, RECIPES, *DEPTH)
    for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL)
]
PYTHON = [
    block
    for text in (README, (ROOT / "ortho_cli" / "runtime" / "README.md").read_text())
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)
]
COMMANDS = [
    line.removeprefix("$ ") for block in BLOCKS for line in block.splitlines() if line[:2] == "$ "
]
ORTHO_COMMANDS = [command for command in COMMANDS if command.startswith("ortho ")]


def test_readme_names_every_command_and_no_other() -> None:
    exist = {command.name or command.callback.__name__ for command in app.app.registered_commands}
    table = re.findall(r"^\| `ortho (\w+)", README, re.MULTILINE)
    assert set(table) == exist
    assert {shlex.split(command)[1] for command in ORTHO_COMMANDS} <= exist


def test_readme_exit_codes_are_the_classes() -> None:
    codes = README.partition("\nExit codes: ")[2].partition("\n\n")[0]
    listed = {int(code) for code in re.findall(r"`(\d+)`", codes)}
    classes = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, Exception)]
    assert listed == {0, *(error.exit_code for error in classes)}


def test_readmes_name_every_module() -> None:
    house = (ROOT / "ortho_cli" / "README.md").read_text()
    for path in (ROOT / "ortho_cli").glob("[a-z]*"):
        assert f"`{path.name}{'/' * path.is_dir()}`" in house, path.name
    for path in (ROOT / "ortho_cli").rglob("[a-z]*.py"):
        if path.parent.name != "ortho_cli":
            assert f"`{path.name}`" in (path.parent / "README.md").read_text(), path


def test_readme_is_short_and_its_links_lead_somewhere() -> None:
    assert len(README.splitlines()) <= 200
    found = re.findall(r"\]\(([^)]+)\)", README)
    assert len(found) > 10
    for link in found:
        file, _, heading = link.partition("#")
        assert (ROOT / file).exists(), link
        titles = re.findall(r"^#+ (.*)$", (ROOT / file).read_text(), re.MULTILINE)
        assert not heading or heading in {
            re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles
        }, link


@pytest.mark.filterwarnings("ignore")  # other people's deprecations
@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_python_of_the_readmes_runs(
    pico: Path, ortho: Ortho, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.chdir(pico.parent)
    (pico.parent / "SmolLM2").symlink_to(pico)
    checkpoints.save_tokenizer(pico, vocab=96)
    assert ortho("decompose", "SmolLM2", "-q").code == 0
    exec(compile(PYTHON[number], f"python {number}", "exec"), {})


def test_readme_of_the_tests_names_every_file_beside_the_rooms() -> None:
    listed = (ROOT / "tests" / "README.md").read_text()
    for path in (ROOT / "tests").glob("*.py"):
        assert path.name in listed, path.name


def names_of(path: Path) -> set[str]:
    """Functions and classes of a module, and `Class.method` of each."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = (n.name for n in node.body if isinstance(n, ast.FunctionDef))
            found |= {f"{node.name}.{method}" for method in methods}
    return found


def test_every_function_of_a_walk_exists() -> None:
    house = ROOT / "ortho_cli"
    text = (house / "README.md").read_text()
    for title in ("One weight", "One sample of text", "One secret"):
        walk = text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
        steps = re.findall(r"`([\w/]+\.py):([\w.]+)`", walk)
        assert len(steps) > 8, title
        for file, name in steps:
            assert name in names_of(house / file), f"{file}:{name}"


def test_every_test_that_a_room_relies_on_exists() -> None:
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    for readme in (ROOT / "ortho_cli").rglob("README.md"):
        text = readme.read_text()
        for name in re.findall(r"`(test_\w+)`", text):
            assert f"def {name}(" in tests, f"{readme}: {name}"
        for name in re.findall(r"`(tests/[\w/]+\.py)`", text):
            assert (ROOT / name).exists(), f"{readme}: {name}"
        for name in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (readme.parent / name).exists(), f"{readme}: {name}"


def test_readme_setup_is_two_make_targets_that_exist() -> None:
    targets = subprocess.run(
        ["make", "-C", str(ROOT), "help"], capture_output=True, text=True, check=True
    ).stdout
    for target in (
        "help",
        "install",
        "demo",
        "check",
        "test",
        "fuzz",
        "faults",
        "mutants",
        "bench",
        "capability",
        "forgetting",
        "clean",
    ):
        assert f"make {target}" in targets
    assert [command for command in COMMANDS if command.startswith("make")] == [
        "make demo",
        "make test",
    ]


def prepare_forgetting(memorised: Memorised) -> None:
    """Put a model that knows secrets where README's commands look for it."""
    Path("SmolLM2").symlink_to(memorised.model)
    Path("stats.safetensors").symlink_to(memorised.stats)
    Path("forget.jsonl").write_bytes(memorised.forget.read_bytes())
    text = memorised.retain.read_text()
    Path("train.txt").write_text("\n".join([text] * 25))
    Path("heldout.txt").write_text(text)


# README's numbers are for real models; behind a command, they say less of the same.
SMALLER = {
    "ortho calibrate": ("calibrate.samples=8", "calibrate.length=64"),
    "--recipe forget-": (
        *("forget.steps=6", "forget.attack_steps=3", "forget.rounds=4"),
        *("forget.samples=8", "forget.length=16"),
    ),
    "--recipe capability-tuned": ("tune.steps=4", "tune.samples=8", "tune.length=32"),
}


def smaller(command: str) -> list[str]:
    """Split a command's words, and add settings that make its work a matter of seconds."""
    sets = [one for part, found in SMALLER.items() if part in command for one in found]
    return [*shlex.split(command), *(word for one in sets for word in ("--set", one))]


@pytest.mark.parametrize("command", ORTHO_COMMANDS)
def test_readme_commands_run_on_the_pico_checkpoint(
    pico: Path,
    ortho: Ortho,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    command: str,
) -> None:
    monkeypatch.chdir(pico.parent)
    if "forget.jsonl" in command or "SmolLM2-split" in command:
        prepare_forgetting(request.getfixturevalue("memorised"))
        if command.startswith("ortho bench"):
            made = "decompose SmolLM2 -o SmolLM2-split --recipe forget-isolate -q"
            needs = "--stats stats.safetensors --forget forget.jsonl"
            assert ortho(*smaller(f"{made} {needs}")).code == 0
        ran = ortho(*smaller(command)[1:])
        assert ran.code == 0, ran.err
        return
    (pico.parent / "SmolLM2").symlink_to(pico)
    key = pyrage.x25519.Identity.generate()
    command = command.replace("age1...", str(key.to_public()))
    if "--identity" in command:
        Path("key.txt").write_text(str(key))
        assert ortho("decompose", "SmolLM2", "-q", "--seal-to", key.to_public()).code == 0
    if "--data" in command or command.startswith("ortho calibrate"):
        checkpoints.save_tokenizer(pico, vocab=96)
        Path("train.txt").write_text("A cat, and 2 more of them. " * 3000)
        Path("notes.jsonl").write_text('{"text": "one"}\n{"prompt": "two", "completion": "3"}\n')
    if "stats.safetensors" in command and not command.startswith("ortho calibrate"):
        checkpoints.save_statistics(Path("stats.safetensors"), pico, gram="gradient")
    elif (
        not command.startswith(("ortho calibrate", "ortho decompose SmolLM2"))
        and not Path("SmolLM2-ortho").exists()
    ):
        assert ortho("decompose", "SmolLM2", "-q").code == 0
    ran = ortho(*smaller(command)[1:])
    assert ran.code == 0, ran.err


def test_every_smaller_size_is_of_a_command() -> None:
    for part in SMALLER:
        assert any(part in command for command in ORTHO_COMMANDS), part


@pytest.mark.parametrize("name", recipe.built_in())
def test_every_recipe_plans_the_pico_checkpoint(
    pico: Path, request: pytest.FixtureRequest, name: str
) -> None:
    settings = recipe.load_recipe(name)
    found, before = None, None
    if settings.forgets:
        known: Memorised = request.getfixturevalue("memorised")
        pico, found = known.model, open_statistics(known.stats)
    if settings.ortho.split == "reference":
        before = open_checkpoint(pico)
    if "curvature" in (settings.base.scale, settings.saliency.kind):
        checkpoints.save_statistics(pico.parent / "stats.safetensors", pico, gram="gradient")
        found = open_statistics(pico.parent / "stats.safetensors")
    plan = make_plan(open_checkpoint(pico), settings, statistics=found, reference=before)
    assert plan.split


def test_example_of_a_recipe_loads(tmp_path: Path) -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", RECIPES, re.DOTALL)
    path = tmp_path / "example.yaml"
    path.write_text(example)
    recipe.load_recipe(str(path))


def test_readme_of_recipes_has_every_key_with_its_default() -> None:
    assert make_recipe_keys.with_keys(RECIPES) == RECIPES, "run python tests/make_recipe_keys.py"
    for name in recipe.built_in():
        assert f"| `{name}` |" in RECIPES


def test_repository_names_no_machine() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    for name in listed.stdout.split():
        content = (ROOT / name).read_bytes()
        for word in (b"/" + b"root/", b"/" + b"work/", b"/" + b"home/"):
            assert word not in content, name
