"""Nothing that is read can run: the package holds no call that would make code of data."""

from __future__ import annotations

import ast
import builtins
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "ortho_cli"
MODULES = sorted(PACKAGE.rglob("*.py"))

# Whose import alone is an offence.
MODULES_THAT_RUN = {
    *("pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"),
    *("subprocess", "runpy", "code", "codeop", "pty", "commands"),
}
NAMES_THAT_RUN = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "os.startfile"),
    *(f"os.{verb}{kind}" for verb in ("exec", "spawn") for kind in ("l", "le", "lp", "lpe")),
    *(f"os.{verb}{kind}" for verb in ("exec", "spawn") for kind in ("v", "ve", "vp", "vpe")),
    *("os.posix_spawn", "os.posix_spawnp", "torch.jit.load", "torch.hub.load"),
    *(f"yaml.{name}" for name in ("unsafe_load", "full_load", "unsafe_load_all", "full_load_all")),
    *("yaml.load_all", "yaml.Loader", "yaml.FullLoader", "yaml.UnsafeLoader", "yaml.CLoader"),
}
SAFE_LOADERS = {"yaml.SafeLoader", "yaml.CSafeLoader"}


def _constant(call: ast.Call, keyword: str) -> object:
    """Give what a keyword is set to: ... if it is absent, None if it is no constant."""
    for found in call.keywords:
        if found.arg in (keyword, None):  # ** could set anything
            return found.value.value if isinstance(found.value, ast.Constant) else None
    return ...


Check = Callable[[ast.Call, dict[str, str]], bool]


def _loads_weights(call: ast.Call, names: dict[str, str]) -> bool:
    return _constant(call, "weights_only") is True


def _loads_arrays(call: ast.Call, names: dict[str, str]) -> bool:
    return _constant(call, "allow_pickle") in (False, ...) and len(call.args) <= 2


def _loads_plain_yaml(call: ast.Call, names: dict[str, str]) -> bool:
    loaders = [*call.args[1:2], *(found.value for found in call.keywords if found.arg == "Loader")]
    return bool(loaders) and all(_dotted(one, names) in SAFE_LOADERS for one in loaders)


def _names_its_module(call: ast.Call, names: dict[str, str]) -> bool:
    return isinstance(call.args[0], ast.Constant) if call.args else False


# What may be called with the right arguments only, and never handed on.
CHECKED: dict[str, Check] = {
    "torch.load": _loads_weights,
    "torch.serialization.load": _loads_weights,
    "numpy.load": _loads_arrays,
    "yaml.load": _loads_plain_yaml,
    "importlib.import_module": _names_its_module,
}


def _names(tree: ast.Module) -> dict[str, str]:
    """Say what each imported name stands for, and which classes are safe loaders by descent."""
    found = {name: name for name in vars(builtins)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                whole = alias.name if alias.asname else alias.name.split(".")[0]
                found[alias.asname or whole] = whole
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                found[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.bases:
            bases = [_dotted(base, found) for base in node.bases]
            if all(base in SAFE_LOADERS for base in bases):
                found[node.name] = bases[0]
    return found


def _dotted(node: ast.AST, names: dict[str, str]) -> str:
    if isinstance(node, ast.Name):
        return names.get(node.id, "")
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value, names)}.{node.attr}"
    return ""


def _is_off_or_asked(value: ast.expr) -> bool:
    return not isinstance(value, ast.Constant) or value.value is False


def offences(source: str) -> Iterator[str]:
    """Name what could make code of data."""
    tree = ast.parse(source)
    names = _names(tree)
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        dotted = _dotted(node, names)
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            yield from (m for m in modules if m.split(".")[0] in MODULES_THAT_RUN)
        elif dotted in NAMES_THAT_RUN:
            yield dotted
        elif dotted in CHECKED:
            call = calls.get(id(node))
            if call is None or not CHECKED[dotted](call, names):
                yield dotted
        elif isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "shell"):
            yield from () if _is_off_or_asked(node.value) else (node.arg,)


# The command itself, begun again with its own words in another encoding of names.
AGAIN = {"boundary": ["os.execve"]}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_code_comes_from_data(path: Path) -> None:
    assert list(offences(path.read_text())) == AGAIN.get(path.stem, [])


def test_the_one_reader_of_pickles_is_looked_at() -> None:
    def careless(path: Path) -> str:
        return path.read_text().replace("weights_only=True", "weights_only=False")

    found = {path.stem for path in MODULES if list(offences(careless(path)))}
    assert found - AGAIN.keys() == {"torch_files"}


@pytest.mark.parametrize(
    "offender",
    [
        *("import pickle", "from pickle import loads", "import marshal as m", "import shelve"),
        *("import dill", "import joblib", "import subprocess", "import runpy"),
        "import torch\ntorch.load(f)",
        "import torch\ntorch.load(f, weights_only=False)",
        "import torch\ntorch.load(f, weights_only=flag)",
        "import torch\ntorch.load(f, **options)",
        "import torch as t\nt.load(f)",
        "from torch import load\nload(f)",
        "from torch import load as read\nread(f)",
        "from torch.serialization import load\nload(f)",
        "import torch\nread = torch.load",
        "import torch\nmap(torch.load, files)",
        "import torch\ntorch.hub.load(x)",
        "import numpy as np\nnp.load(f, allow_pickle=True)",
        "import numpy as np\nnp.load(f, None, True)",
        "import numpy\nnumpy.load(f, **options)",
        *("import yaml\nyaml.load(t)", "import yaml\nyaml.load(t, Loader=yaml.Loader)"),
        *("import yaml\nyaml.unsafe_load(t)", "from yaml import full_load\nfull_load(t)"),
        "import yaml\nclass L(yaml.FullLoader): pass\nyaml.load(t, L)",
        *("eval(text)", "exec(text)", "compile(text, '', 'exec')", "__import__(name)", "f = eval"),
        *("import os\nos.system(c)", "from os import popen\npopen(c)", "import os\nos.execv(p, a)"),
        "import importlib\nimportlib.import_module(name)",
        "from importlib import import_module\nimport_module(f'a.{name}')",
        "model.from_pretrained(f, trust_remote_code=True)",
        "run(command, shell=True)",
    ],
)
def test_a_planted_offender_is_caught(offender: str) -> None:
    assert list(offences("def here():\n" + textwrap.indent(offender, "    ")))


@pytest.mark.parametrize(
    "sound",
    [
        "import torch\ntorch.load(f, weights_only=True, mmap=True)",
        "import numpy as np\nnp.load(f)",
        "import numpy as np\nnp.load(f, allow_pickle=False)",
        "import yaml\nclass L(yaml.SafeLoader): pass\nyaml.load(t, Loader=L)",
        "import re\nre.compile(x)",
        "from importlib import import_module\nimport_module('torch')",
        "model.from_pretrained(f, trust_remote_code=trusted)",
        "from json import load\nload(f)",
    ],
)
def test_what_is_sound_is_let_through(sound: str) -> None:
    assert list(offences(sound)) == []
