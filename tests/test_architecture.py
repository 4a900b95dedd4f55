"""The rules of the house, each held by reading the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ortho_cli"
# Rooms of one row do not import one another; a room imports only from rows above its own.
RANKS = [
    ["errors", "events", "version"],
    ["split"],
    ["storage"],
    ["formats"],
    ["model"],
    ["convert.sources"],
    ["convert"],
    ["convert.targets"],
    ["decompose"],
    ["calibrate", "forget", "runtime"],
    ["bench"],
    ["bench.demo"],
    ["cli.show"],
    ["cli"],
]
COMMANDS = ("decompose", "calibrate", "convert", "inspect", "bench")
# What may write to stdout and stderr.
SPEAKERS = ("cli.show.console", "cli.app", "cli.boundary", "cli.log", "__main__")
HEAVY = {"torch", "numpy", "transformers", "safetensors"}
MODULES = sorted(
    path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".")
    for path in PACKAGE.rglob("*.py")
)
ROOMS = {module.removesuffix(".__init__") for module in MODULES if module.endswith(".__init__")}


def tree(module: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text())


def imported(nodes: list[ast.stmt] | ast.Module) -> set[str]:
    """Absolute names of what is imported: packages, and modules of ours as `ortho_cli.room.x`."""
    found: set[str] = set()
    walk = ast.walk(nodes) if isinstance(nodes, ast.Module) else nodes
    for node in walk:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            ours = {name for name in names if name.removeprefix("ortho_cli.") in MODULES}
            found |= ours or {str(node.module)}
    return found


def room_of(module: str) -> str:
    """Name the room of a module; the few modules outside any room are rooms of their own."""
    return module.rpartition(".")[0] or module


def test_imports_between_rooms_point_only_downward() -> None:
    rank = {room: height for height, row in enumerate(RANKS) for room in row}
    for module in MODULES:
        if module in ("__init__", "__main__"):  # the face of the library, and of `python -m`
            continue
        for name in imported(tree(module)):
            below = room_of(name.removeprefix("ortho_cli."))
            if name.startswith("ortho_cli.") and below != room_of(module):
                assert rank[below] < rank[room_of(module)], f"{module} imports {name}"


def test_split_knows_no_file_no_recipe_and_no_plan() -> None:
    for module in MODULES:
        if room_of(module) == "split":
            ours = {name for name in imported(tree(module)) if name.startswith("ortho_cli.")}
            assert {n for n in ours if room_of(n) != "ortho_cli.split"} <= {"ortho_cli.errors"}


def test_the_package_is_rooms_and_at_most_six_modules() -> None:
    entries = [p for p in PACKAGE.iterdir() if p.name != "__pycache__"]
    assert {p.name for p in entries if p.is_dir()} == {r.split(".")[0] for r in ROOMS} - {
        "__init__"
    }
    files = [p.name for p in entries if p.is_file()]
    assert len([name for name in files if name.endswith(".py")]) <= 6
    others = {name for name in files if not name.endswith(".py")}
    assert others == {"README.md", "CHANGES.md", "picture.svg"}


def test_only_show_imports_rich_and_only_the_commands_import_typer() -> None:
    show = {m for m in MODULES if m.startswith("cli.show.")}
    commands = {f"cli.{name}" for name in ("app", "help", "options", *COMMANDS)}
    for package, owners in (("rich", show), ("typer", commands)):
        users = {m for m in MODULES if package in {n.split(".")[0] for n in imported(tree(m))}}
        assert users
        assert users <= owners


def test_commands_that_need_no_torch_import_none() -> None:
    """What runs before a kernel is chosen is light: help, plans, headers, files."""
    light = {m for m in MODULES if room_of(m) in ("errors", "events", "storage", "cli", "cli.show")}
    light |= {f"decompose.{name}" for name in ("recipe", "settings", "selection", "plan", "job")}
    light |= {f"formats.{name}" for name in ("artifact", "open_artifact", "statistics", "verify")}
    for module in light:
        assert not {n.split(".")[0] for n in imported(tree(module).body)} & {"torch"}, module
    for module in (
        "errors",
        "events",
        "decompose.recipe",
        "storage.checkpoint",
        "formats.artifact",
    ):
        assert not {n.split(".")[0] for n in imported(tree(module))} & HEAVY, module


def calls(module: str) -> list[ast.Call]:
    return [node for node in ast.walk(tree(module)) if isinstance(node, ast.Call)]


@pytest.mark.parametrize(
    "module",
    [m for m in MODULES if m not in SPEAKERS],
)
def test_core_is_silent(module: str) -> None:
    text = (PACKAGE / f"{module.replace('.', '/')}.py").read_text()
    names = {call.func.id for call in calls(module) if isinstance(call.func, ast.Name)}
    assert "print" not in names
    assert "sys.stdout" not in text
    assert "sys.stderr" not in text


@pytest.mark.parametrize("module", MODULES)
def test_package_raises_what_it_finds_and_asserts_nothing(module: str) -> None:
    """`python -O` removes assertions, and with them whatever they guard."""
    lines = [node.lineno for node in ast.walk(tree(module)) if isinstance(node, ast.Assert)]
    assert not lines, f"{module}.py asserts in lines {lines}; raise InternalError there"


def test_top_level_holds_only_what_was_agreed() -> None:
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout")
    top = {name.split("/")[0] for name in tracked}
    agreed = {"ortho_cli", "recipes", "tests", "pyproject.toml", "README.md", "Makefile"}
    assert {name for name in top if not name.startswith(".")} - agreed == {
        "LICENSE",
        "constraints.txt",
    }


def test_public_functions_have_docstrings_and_modules_stay_small() -> None:
    for module in MODULES:
        lines = (PACKAGE / f"{module.replace('.', '/')}.py").read_text().count("\n")
        assert lines <= 800, f"{module} has {lines} lines"
        assert ast.get_docstring(tree(module)), module


@pytest.mark.parametrize("module", MODULES)
def test_a_function_of_more_than_60_lines_says_why(module: str) -> None:
    lines = (PACKAGE / f"{module.replace('.', '/')}.py").read_text().splitlines()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= 60:
            first = min([node.lineno, *(one.lineno for one in node.decorator_list)])
            above = "".join(lines[max(0, first - 4) : first - 1])
            assert "# Longer than 60 lines: " in above, f"{module}.{node.name}"


def test_what_may_be_anything_is_rare() -> None:
    """`Any` switches type checks off: fewer than 7 in 1,000 lines."""
    named = lines = 0
    for module in MODULES:
        lines += (PACKAGE / f"{module.replace('.', '/')}.py").read_text().count("\n")
        named += sum(isinstance(n, ast.Name) and n.id == "Any" for n in ast.walk(tree(module)))
    assert named < 7 * lines / 1000


def test_library_import_is_light() -> None:
    code = "import sys, ortho_cli; sys.exit(bool({'torch', 'typer', 'rich'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# What gives its argument back, not a copy of it, where there is nothing to convert.
CONVERSIONS = {
    *("to", "float", "double", "half", "bfloat16", "type", "contiguous", "cpu", "numpy"),
    *("from_numpy", "asarray", "as_tensor", "ascontiguousarray"),
}
VIEWS = {"view", "reshape", "flatten", "squeeze", "unsqueeze", "t", "detach", "ravel"}
# Conversions of what nobody else holds.
OWN = {
    ("runtime.product", "_forward", "y"),  # the product that was computed a line before
}


def conversion(node: ast.expr) -> bool:
    """Whether a value is a conversion, or a view of one, of something that has a name."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        copies = any(keyword.arg == "copy" for keyword in node.keywords)
        if node.func.attr in CONVERSIONS and not copies:
            inner = node.args[0] if isinstance(node.func.value, ast.Name) and node.args else None
            inner = inner if node.func.attr in ("from_numpy", "asarray") else node.func.value
            while isinstance(inner, ast.Attribute | ast.Subscript):
                inner = inner.value
            return isinstance(inner, ast.Name) or conversion(node.func.value)
        return node.func.attr in VIEWS and conversion(node.func.value)
    return False


def name_of(node: ast.expr) -> str:
    """Name what an operation changes: `x` of `x.view(-1)[i]`."""
    while True:
        if isinstance(node, ast.Subscript):
            node = node.value
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in VIEWS
        ):
            node = node.func.value
        else:
            return ast.unparse(node)


def changed_in_place(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        method = node.func.attr
        return [name_of(node.func.value)] if method[-1] == "_" and method[0] != "_" else []
    if isinstance(node, ast.AugAssign):
        return [name_of(node.target)]
    if isinstance(node, ast.Assign):
        return [name_of(t) for t in node.targets if isinstance(t, ast.Subscript)]
    return []


def aliased(module: str, tree_: ast.Module) -> set[tuple[str, str, str]]:
    """Conversions that may be aliases and are then changed in place: in a function, or a class."""
    found = set()
    scopes = [n for n in ast.walk(tree_) if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    for scope in scopes:
        names = {
            ast.unparse(target)
            for node in ast.walk(scope)
            if isinstance(node, ast.Assign) and conversion(node.value)
            for target in node.targets
            if isinstance(scope, ast.FunctionDef) or isinstance(target, ast.Attribute)
        }
        changed = {name for node in ast.walk(scope) for name in changed_in_place(node)}
        found |= {(module, scope.name, name) for name in names & changed}
    return found


@pytest.mark.parametrize("module", MODULES)
def test_no_conversion_that_may_be_an_alias_is_changed_in_place(module: str) -> None:
    """`x.float()` of float32 is x: what is done to it in place is done to x."""
    assert aliased(module, tree(module)) <= OWN


def test_the_search_for_aliases_finds_those_that_there_were() -> None:
    code = """
class Latent:
    def __init__(self, start):
        self._scales = start.scales.float()

    def step(self):
        self._scales.mul_(2)

def remember(self, code, weight, dtype):
    kept = code.to(dtype).view(int)
    kept.view(-1)[3] = 0

def sound(self, code):
    kept = code.to(float, copy=True)
    kept.mul_(2)
"""
    assert {name for _, name, _ in aliased("m", ast.parse(code))} == {"Latent", "remember"}
