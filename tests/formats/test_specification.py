"""formats/README.md, the specification, is held to golden artifacts and to a reader of its own."""

from __future__ import annotations

import json
import re
from pathlib import Path

import checkpoints
import numpy as np
import own_reader
import pytest

ROOT = Path(__file__).parent.parent.parent
TEXT = (ROOT / "ortho_cli" / "formats" / "README.md").read_text()
GOLDEN = ROOT / "tests" / "golden"
ARTIFACTS = ["ortho1", "ortho2", "ortho3", "ortho3-compact", "ortho3-columns"]
# part -> dtypes that it may have, over all tables of the page
PARTS: dict[str, set[str]] = {}
for part, dtypes in re.findall(r"^    <p>\.(\w+) +((?:[A-Z]+\d+ )+)", TEXT, re.MULTILINE):
    PARTS.setdefault(part, set()).update(dtypes.split())


def header(path: Path) -> dict[str, dict[str, str]]:
    raw = path.read_bytes()
    found: dict[str, dict[str, str]] = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return found


def keys_of(file: str) -> list[str]:
    line = re.search(rf"^    {file} +(format .*)$", TEXT, re.MULTILINE)
    assert line is not None
    return line[1].split()


def base_of(folder: Path) -> Path:
    old = folder / "base.safetensors"
    return old if old.exists() else folder / "model.safetensors"


@pytest.mark.parametrize("name", ARTIFACTS)
def test_headers_of_golden_artifacts_have_the_keys_in_order(name: str) -> None:
    old = name in ("ortho1", "ortho2")
    base, ortho = header(base_of(GOLDEN / name)), header(GOLDEN / name / "ortho.safetensors")
    assert list(base["__metadata__"]) == keys_of("base")
    wanted = [key.replace("_blake3", "_sha256") if old else key for key in keys_of("ortho")]
    assert list(ortho["__metadata__"]) == wanted
    report = json.loads((GOLDEN / name / "report.json").read_text())
    known = re.search(r"^    (format versions .*)$", TEXT, re.MULTILINE)
    assert known is not None
    told = [key.replace("_blake3", "_sha256") if old else key for key in known[1].split()]
    assert [key for key in told if key in report] == list(report)
    if not old:
        assert list(report) == told
    for row in report["tensors"]:
        for key in row:
            assert f"`{key}`" in TEXT or key.endswith(("alpha_0", "alpha_1", "_kept")), key


def test_every_tensor_of_golden_artifacts_is_specified_and_each_that_is_specified_occurs(
    tmp_path: Path, pico: Path
) -> None:
    seen: set[str] = set()
    statistics = {"full": {"forget": True}, "factored": {"storage": "factored"}}
    paths = [GOLDEN / name / "ortho.safetensors" for name in ARTIFACTS]
    paths += [base_of(GOLDEN / name) for name in ARTIFACTS]
    for name, settings in statistics.items():
        paths.append(tmp_path / f"{name}.safetensors")
        checkpoints.save_statistics(paths[-1], pico, gram="none", **settings)  # type: ignore[arg-type]
    for path in paths:
        found = header(path)
        metadata = found.pop("__metadata__")
        if metadata["format"] == "ortho-stats/1":
            assert metadata.keys() == set(keys_of("stats"))
        for key, told in found.items():
            part = key.rpartition(".")[2]
            if part in PARTS:
                assert told["dtype"] in PARTS[part], key
                seen.add(part)
            else:  # a tensor that was not split
                assert path.name in ("model.safetensors", "base.safetensors"), key
    assert seen == set(PARTS)


def test_worked_examples_are_what_the_other_reader_reads(tmp_path: Path) -> None:
    found = re.search(r"q = ([-\d ]+)->  (0x[0-9a-f]+)", TEXT)
    gaps = re.search(r"columns ([\d ]+)->  gaps ([\d ]+)", TEXT)
    assert found is not None
    assert gaps is not None
    word = np.array([[int(found[2], 16)]], np.uint32).view(np.int32)
    places, distances = ([int(n) for n in text.split()] for text in gaps.groups())
    base = {
        "m.weight_packed": ("I32", word),
        "m.weight_scale": ("F32", np.ones((1, 1), np.float32)),
        "m.weight_shape": ("I64", np.array([1, 8], np.int64)),
    }
    ortho = {
        "m.columns": ("U16", np.empty(0, np.uint16)),
        "m.column_values": ("F32", np.empty((1, 0), np.float32)),
        "m.row_counts": ("U8", np.array([0], np.uint8)),
        "m.col_gaps": ("U8", np.empty(0, np.uint8)),
        "m.values": ("F32", np.empty(0, np.float32)),
    }
    save(tmp_path / "model.safetensors", base)
    save(tmp_path / "ortho.safetensors", ortho)
    codes = [int(code) for code in found[1].split()]
    assert own_reader.weight(tmp_path, "m").codes.tolist() == [codes]
    parts = {
        "column_values": ("F32", np.empty((1, 0), np.float32)),
        "columns": ("U16", np.empty(0, np.uint16)),
        "row_counts": ("U8", np.array([len(places)], np.uint8)),
        "col_gaps": ("U8", np.array(distances, np.uint8)),
        "values": ("F32", np.arange(len(places), dtype=np.float32)),
    }
    read = own_reader._compact(parts, 1)
    assert [column for _, column, _ in read] == places


def save(path: Path, tensors: dict[str, tuple[str, np.ndarray]]) -> None:  # type: ignore[type-arg]
    """Write safetensors by the bytes."""
    entries, data = {}, b""
    for name, (dtype, array) in tensors.items():
        begin = len(data)
        data += array.tobytes()
        entries[name] = {
            "dtype": dtype, "shape": list(array.shape), "data_offsets": [begin, len(data)],
        }  # fmt: skip
    text = json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
