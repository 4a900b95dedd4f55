"""The rules of the house, each held by reading the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ortho_cli"
# From the ground up; a module may import only what stands below it.
LAYERS = [
    ["__init__"],
    ["errors", "events", "settings", "files"],
    ["strict_json", "recipe", "search", "ops", "topk", "data", "capture", "estimates", "disk"],
    ["figures", "grammar", "verdict", "locks"],
    ["checkpoint", "scales", "compensate", "forget_set"],
    ["operands"],
    ["fused"],
    ["loops"],
    ["unpacking"],
    ["kernels", "streams"],
    ["layers", "compact"],
    ["journal"],
    ["writer", "output", "edits"],
    ["seal"],
    ["artifact"],
    ["opening"],
    ["kept", "provenance"],
    ["verify", "selection", "quantization", "statistics"],
    ["curvature", "refusals"],
    ["plan"],
    ["summary", "identity", "worker", "models", "sums", "blocks"],
    ["tally"],
    ["onepass"],
    ["split", "scoring", "calibrate_plan"],
    ["ondevice"],
    ["readback", "budget"],
    ["repack"],
    ["decompose", "calibrate", "source", "grid"],
    ["foreign", "dense", "gguf_source", "convert_plan", "modelfile", "isolate", "unlearn", "tune"],
    ["convert", "engine", "forget"],
    ["pretrained", "evaluate", "twins"],
    ["attacks", "controls", "sandbox"],
    ["bench_plan"],
    ["bench_data"],
    ["bench"],
    ["chain"],
    ["report", "options"],
    ["report_progress", "report_bench"],
    ["boundary", "cli_bench", "cli_shared"],
    ["cli_inspect"],
    ["cli"],
    ["__main__"],
]
HEAVY = {"torch", "numpy", "transformers", "safetensors"}
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))


def tree(module: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{module}.py").read_text())


def imported(nodes: list[ast.stmt] | ast.Module) -> set[str]:
    """Absolute names of what is imported: packages, and `ortho_cli.x` as `ortho_cli.x`."""
    found: set[str] = set()
    walk = ast.walk(nodes) if isinstance(nodes, ast.Module) else nodes
    for node in walk:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            if node.module == "ortho_cli":
                found |= {
                    f"ortho_cli.{alias.name}" for alias in node.names if alias.name in MODULES
                }
            else:
                found.add(str(node.module))
    return found


def test_every_module_has_a_layer_and_imports_only_downward() -> None:
    level = {module: height for height, row in enumerate(LAYERS) for module in row}
    assert sorted(level) == MODULES
    for module in MODULES:
        if module == "__init__":  # its names are imported when they are first used
            continue
        for name in imported(tree(module)):
            if name.startswith("ortho_cli."):
                below = name.removeprefix("ortho_cli.")
                assert level[below] < level[module], f"{module} imports {below}"


def test_only_report_imports_rich_and_only_the_surface_imports_typer() -> None:
    for package, owners in (
        ("rich", {m for m in MODULES if m.startswith("report")}),
        ("typer", {"cli", "cli_bench", "cli_inspect", "options"}),
    ):
        users = {m for m in MODULES if package in {n.split(".")[0] for n in imported(tree(m))}}
        assert users == owners


def test_torch_is_imported_only_where_tensors_are_computed() -> None:
    users = {m for m in MODULES if "torch" in imported(tree(m).body)}
    assert users == {
        *(
            "ops",
            "scales",
            "compensate",
            "tally",
            "budget",
            "split",
            "ondevice",
            "curvature",
        ),
        *("capture", "models", "sums", "calibrate"),
        *("source", "foreign", "dense", "gguf_source", "convert"),
        *("scoring", "evaluate", "grid", "isolate", "unlearn", "forget", "blocks", "tune"),
        *("compact", "kept", "readback", "repack"),
        *("operands", "unpacking", "fused", "kernels", "streams", "layers"),
        *("modelfile", "engine", "pretrained"),
        *("attacks", "controls", "bench_data", "bench"),
    }
    for module in ("errors", "events", "recipe", "checkpoint", "journal", "writer", "artifact"):
        assert not {n.split(".")[0] for n in imported(tree(module))} & HEAVY, module


def calls(module: str) -> list[ast.Call]:
    return [node for node in ast.walk(tree(module)) if isinstance(node, ast.Call)]


@pytest.mark.parametrize(
    "module", [m for m in MODULES if m not in ("report", "cli", "boundary", "__main__")]
)
def test_core_is_silent(module: str) -> None:
    text = (PACKAGE / f"{module}.py").read_text()
    names = {call.func.id for call in calls(module) if isinstance(call.func, ast.Name)}
    assert "print" not in names
    assert "sys.stdout" not in text
    assert "sys.stderr" not in text


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
        lines = (PACKAGE / f"{module}.py").read_text().count("\n")
        assert lines <= 800, f"{module} has {lines} lines"
        assert ast.get_docstring(tree(module)), module


def test_library_import_is_light() -> None:
    code = "import sys, ortho_cli; sys.exit(bool({'torch', 'typer', 'rich'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
