"""A reader of artifacts that shares no code with the package: bytes, JSON and numpy."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

DTYPES = {
    "BF16": "<u2", "F16": "<f2", "F32": "<f4", "I32": "<i4", "I64": "<i8", "U8": "u1", "U16": "<u2",
}  # fmt: skip


def read(path: Path) -> dict[str, tuple[str, np.ndarray[Any, Any]]]:
    """Name -> dtype and array, BF16 as its words."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    found = {}
    for name, told in header.items():
        begin, end = told["data_offsets"]
        data = raw[8 + length + begin : 8 + length + end]
        array = np.frombuffer(data, DTYPES[told["dtype"]]).reshape(told["shape"])
        found[name] = told["dtype"], array
    return found


def number(value: np.ndarray[Any, Any], dtype: str) -> np.ndarray[Any, Any]:
    """Values in float64, exactly."""
    if dtype == "BF16":
        return (value.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return value.astype(np.float64)


def round_once(value: np.ndarray[Any, Any], dtype: str) -> np.ndarray[Any, Any]:
    """The nearest value of a dtype; the products here are exact in float64."""
    single = value.astype(np.float32)
    if dtype == "F32":
        return single.astype(np.float64)
    if dtype == "F16":
        return single.astype(np.float16).astype(np.float64)
    low = (single.view(np.uint32) >> 16) << 16
    down = low.view(np.float32).astype(np.float64)
    up = (low + 0x10000).view(np.float32).astype(np.float64)
    exact = single.astype(np.float64)
    even = ((low >> 16) & 1) == 0
    nearer_up = np.abs(up - exact) < np.abs(exact - down)
    tie = np.abs(up - exact) == np.abs(exact - down)
    return np.where(nearer_up | (tie & ~even), up, down)


@dataclass
class Weight:
    """One split weight: what base stands for, and what ortho holds."""

    codes: np.ndarray[Any, Any]
    scales: np.ndarray[Any, Any]  # one for each weight, float64
    base: np.ndarray[Any, Any]
    kept: np.ndarray[Any, Any]  # bool
    full: np.ndarray[Any, Any]  # W(1)
    dtype: str

    def own_codes(self, source: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """The nearest code of each source weight, halves to even, divided in float32."""
        ratio = source.astype(np.float32) / self.scales.astype(np.float32)
        return np.clip(np.rint(ratio), -8, 7)


def weight(folder: Path, module: str) -> Weight:
    """Read one weight of an artifact of 4 bits."""
    base, ortho = read(folder / "model.safetensors"), read(folder / "ortho.safetensors")
    words = base[f"{module}.weight_packed"][1].view(np.uint32)
    rows, columns = (int(n) for n in base[f"{module}.weight_shape"][1])
    codes = np.zeros((rows, columns), np.int64)
    for column in range(columns):
        codes[:, column] = ((words[:, column // 8] >> (4 * (column % 8))) & 15).astype(np.int64) - 8
    dtype, stored = base[f"{module}.weight_scale"]
    scales = np.repeat(number(stored, dtype), columns // stored.shape[1], axis=1)
    dense = round_once(codes * scales, dtype)
    parts = {n.rpartition(".")[2]: v for n, v in ortho.items() if n.rpartition(".")[0] == module}
    if "crow_indices" in parts:
        places = _csr(parts)
    else:
        places = _compact(parts, rows) if "row_counts" in parts else _columns(parts, dense, dtype)
    kept, full = np.zeros((rows, columns), bool), dense.copy()
    for row, column, value in places:
        assert not kept[row, column]
        kept[row, column], full[row, column] = True, value
    return Weight(codes, scales, dense, kept, full, dtype)


def _csr(parts: dict[str, Any]) -> list[tuple[int, int, float]]:
    crow, column = parts["crow_indices"][1], parts["col_indices"][1]
    values = number(parts["values"][1], parts["values"][0])
    return [
        (row, int(column[at]), float(values[at]))
        for row in range(len(crow) - 1)
        for at in range(int(crow[row]), int(crow[row + 1]))
    ]


def _columns(
    parts: dict[str, Any], base: np.ndarray[Any, Any], dtype: str
) -> list[tuple[int, int, float]]:
    columns = [int(column) for column in parts["col_indices"][1]]
    kind, stored = parts["values"]
    values = number(stored, kind)
    if kind == "I8":
        scales = number(parts["value_scales"][1], parts["value_scales"][0]).astype(np.float32)
        lacks = stored.astype(np.float32) * scales
        values = round_once((base[:, columns].astype(np.float32) + lacks).astype(np.float64), dtype)
    return [
        (row, column, float(values[row, i]))
        for row in range(len(base))
        for i, column in enumerate(columns)
    ]


def _compact(parts: dict[str, Any], rows: int) -> list[tuple[int, int, float]]:
    dtype, block = parts["column_values"]
    block, values = number(block, dtype), number(parts["values"][1], dtype)
    whole = [int(c) for c in parts["columns"][1]]
    found = [(r, c, float(block[r, i])) for r in range(rows) for i, c in enumerate(whole)]
    gaps, at, entry = [int(g) for g in parts["col_gaps"][1]], 0, 0
    for row in range(rows):
        column = -1
        for _ in range(int(parts["row_counts"][1][row])):
            distance = 0
            while gaps[at] == 255:
                distance, at = distance + 255, at + 1
            column += distance + gaps[at] + 1
            at += 1
            found.append((row, column, float(values[entry])))
            entry += 1
    return found
