"""The compact layout of one weight's ortho: whole columns, and distances of one byte.

CSR spends 16 bits on each column index and 32 on each row. Curvature selects few input columns,
some of them in every row, and other positions about 1 / density apart. So a whole column needs no
index, and a distance fits a byte. README.md specifies the parts. A matrix has one encoding:
`decode` refuses every other.

Positions are numpy's, since torch has few operations on uint16; pure, on the CPU, no IO.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ortho_cli.errors import ArtifactError
from ortho_cli.formats.artifact import Shape, count_dtype
from ortho_cli.formats.csr import unsound
from ortho_cli.split import quantize
from ortho_cli.split.dtypes import DTYPES
from ortho_cli.split.quantize import ortho_dtypes
from ortho_cli.split.sizes import Sizes

Integers = npt.NDArray[np.int64]
# Some rows of base: (start, count) -> packed codes, scales.
BaseRows = Callable[[int, int], tuple[Tensor, Tensor]]

GO_ON = 255  # this byte of a gap adds 255 columns, and another byte follows
LARGEST = 127  # of an int8 value; -128 is not used


class Positions(NamedTuple):
    """The positions of a CSR matrix, in the compact form."""

    columns: Integers  # (c,) whole columns, ascending
    whole: npt.NDArray[np.bool_]  # (nnz,) whether an entry of the CSR is in one of them
    counts: npt.NDArray[np.generic]  # (out,) of the other entries, in the smallest dtype
    gaps: npt.NDArray[np.uint8]  # (n,)


def encode_positions(crow: Integers, column: Integers, shape: Shape) -> Positions:
    """Find whole columns, and spell the distances between the other entries.

    distance = column - column of the entry before in its row - 1 (-1 before the first), as
    floor(distance / 255) bytes of 255 and one of distance mod 255.

    Args:
        crow: (out + 1,) int64, from 0 to nnz, never falling.
        column: (nnz,) int64 in [0, in), ascending in each row.
        shape: (out, in).
    Returns:
        Whole columns, which entries are in them, counts and bytes of the others. Where out is 1 no
        column is whole.
    """
    rows, width = shape
    columns = np.empty(0, np.int64)
    if rows > 1 and column.size >= rows:
        columns = np.flatnonzero(np.bincount(column, minlength=width) == rows)
    flags = np.zeros(width, np.bool_)
    flags[columns] = True
    whole = flags[column]
    counts = np.diff(crow) - columns.size
    place = column[~whole]
    distance = np.diff(place, prepend=-1) - 1
    starts = np.cumsum(counts) - counts
    first = starts[counts > 0]
    distance[first] = place[first]
    length = distance // GO_ON
    length += 1
    last = np.cumsum(length)
    gaps = np.full(int(last[-1]) if last.size else 0, GO_ON, np.uint8)
    gaps[last - 1] = distance % GO_ON
    return Positions(columns, whole, counts.astype(_count_dtype(counts)), gaps)


def encode(crow: Integers, column: Integers, values: Tensor, shape: Shape) -> dict[str, Tensor]:
    """Turn a CSR matrix into the parts of the compact layout.

    Args:
        crow: (out + 1,) int64, from 0 to nnz, never falling.
        column: (nnz,) int64 in [0, in), ascending in each row.
        values: (nnz,) of any dtype: the source's, or int8.
        shape: (out, in).
    Returns:
        columns, column_values, row_counts, col_gaps and values, by their names in the artifact;
        `decode` gives the matrix back bit for bit.
    """
    found = encode_positions(crow, column, shape)
    whole = torch.from_numpy(found.whole)
    return {
        "columns": torch.from_numpy(found.columns).to(ortho_dtypes(0, shape[1])[1]),
        "column_values": values[whole].view(shape[0], len(found.columns)),
        "row_counts": torch.from_numpy(found.counts),
        "col_gaps": torch.from_numpy(found.gaps),
        "values": values[~whole],
    }


def decode(parts: Mapping[str, Tensor], shape: Shape, prefix: str) -> dict[str, Tensor]:
    """Turn the parts of the compact layout into a CSR matrix.

    Args:
        parts: columns, column_values, row_counts, col_gaps and values; anything may be wrong with
            what they hold, and nothing is read or written outside of them.
        shape: (out, in).
        prefix: of the parts' names, for errors.
    Returns:
        crow_indices, col_indices and values, by their names in the artifact, in the dtypes of
        `in_memory.ortho_dtypes`; values in the dtype they are stored in.
    Raises:
        ArtifactError: the parts are no matrix of this shape, or not as `encode` would write it;
            names the part, prefixed.
    """
    (rows, width), bad = shape, partial(_bad, prefix)
    columns, counts = (parts[p].numpy().astype(np.int64) for p in ("columns", "row_counts"))
    values, block = parts["values"], parts["column_values"]
    _check_shapes(parts, shape, prefix)
    if columns.size and (rows == 1 or columns[0] < 0 or columns[-1] >= width):
        raise bad(f"columns` names column {int(columns[-1])} of {width}, {rows} rows whole")
    if (np.diff(columns) <= 0).any():
        raise bad("columns` does not ascend")
    total, dtype = int(counts.sum()), parts["row_counts"].dtype
    if (counts < 0).any() or total != values.numel():
        raise bad(f"row_counts` sums to {total} and there are {values.numel()} values")
    if parts["row_counts"].numpy().dtype != _count_dtype(counts):
        raise bad(f"row_counts` is {dtype} where its largest is {int(counts.max())}")
    place = _read_gaps(parts["col_gaps"].numpy(), counts, width, prefix)
    _check_apart(place, columns, shape, prefix)
    crow = np.concatenate(([0], np.cumsum(counts + columns.size)))
    nnz = int(crow[-1])
    # A row's entries in order: after those before it in the gaps come the whole columns below.
    row = np.repeat(np.arange(rows), counts)
    within = np.arange(place.size) - np.repeat(np.cumsum(counts) - counts, counts)
    spot = crow[row] + within + np.searchsorted(columns, place)
    rest = np.ones(nnz, np.bool_)
    rest[spot] = False
    column = np.empty(nnz, np.int64)
    column[spot] = place
    column[rest] = np.tile(columns, rows)
    merged = torch.empty(nnz, dtype=values.dtype)
    merged[torch.from_numpy(spot)] = values
    merged[torch.from_numpy(rest)] = block.reshape(-1)
    pointer, narrow = ortho_dtypes(nnz, width)
    return {
        "crow_indices": torch.from_numpy(crow).to(pointer),
        "col_indices": torch.from_numpy(column).to(narrow),
        "values": merged,
    }


def _read_gaps(gaps: npt.NDArray[np.uint8], counts: Integers, width: int, prefix: str) -> Integers:
    """Give the column of each entry, row by row."""
    last = np.flatnonzero(gaps != GO_ON)
    many = int(counts.sum())
    if last.size != many or (gaps.size and gaps[-1] == GO_ON):
        raise _bad(prefix, f"col_gaps` ends {last.size} distances where there are {many} values")
    # Bytes of one distance add up to it, so sums at its last byte are sums of whole distances.
    reached = np.cumsum(gaps, dtype=np.int64)[last] + np.arange(1, many + 1)
    before = np.concatenate(([0], reached))[np.cumsum(counts) - counts]
    place: Integers = reached - np.repeat(before, counts) - 1
    if many and int(place.max()) >= width:
        row = int(np.repeat(np.arange(counts.size), counts)[int(place.argmax())])
        raise _bad(prefix, f"col_gaps` leads to column {int(place.max())} of {width} in row {row}")
    return place


def _check_apart(place: Integers, columns: Integers, shape: Shape, prefix: str) -> None:
    """Refuse an entry of a whole column among the gaps, and a column that only gaps make whole."""
    rows, width = shape
    held = np.bincount(place, minlength=width) if place.size else np.zeros(1, np.int64)
    twice = columns[held[columns] > 0] if place.size else columns[:0]
    if twice.size:
        raise _bad(prefix, f"col_gaps` comes to column {int(twice[0])}, which `columns` holds")
    if rows > 1 and (held == rows).any():
        hidden = int(np.flatnonzero(held == rows)[0])
        raise _bad(prefix, f"columns` lacks column {hidden}, which is whole")


def _check_shapes(parts: Mapping[str, Tensor], shape: Shape, prefix: str) -> None:
    rows, width = shape
    sizes: dict[str, tuple[int, ...]] = {"row_counts": (rows,)}
    sizes["column_values"] = rows, parts["columns"].numel()
    sizes |= {name: (parts[name].numel(),) for name in ("columns", "col_gaps", "values")}
    for name, size in sizes.items():
        if tuple(parts[name].shape) != size:
            raise _bad(prefix, f"{name}` has shape {list(parts[name].shape)}, not {list(size)}")
    sparse, block = parts["values"].dtype, parts["column_values"].dtype
    if sparse != block:
        raise _bad(prefix, f"values` is {sparse} and column_values {block}")
    narrow = ortho_dtypes(0, width)[1]
    if parts["columns"].dtype != narrow:
        raise _bad(prefix, f"columns` is {parts['columns'].dtype}, not {narrow}")


def round_values(values: Tensor, base: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Round the difference between source and base at ortho's positions to int8.

    u = |w - b| / scale,  step = max(u) / 127^2,  v = sign(w - b) round(sqrt(u / step)), halves to
    even. The root makes steps fine where the difference is small. With even steps, the few largest
    differences would make the steps of all others coarse.

    Args:
        values: (nnz,) the source's weights w, any float dtype, finite.
        base: (nnz,) float32, dequantize(base) b at the same positions.
        scales: (nnz,) float32, > 0: base's scale of each weight's group.
    Returns:
        v (nnz,) int8 in [-127, 127]; step (1,) float32, > 0: 1 where there is nothing to tell.
        Where step * scale is too small for float32, v is 0.
    The group's scale is in base already; a scale per row would cost 16 bits per row.
    """
    lacks = values.float() - base
    largest = (lacks.abs() / scales).amax().reshape(1) if lacks.numel() else torch.zeros(1)
    step = largest / LARGEST**2
    if not float(step):
        step = torch.ones(1)
    unit = step * scales
    squares = torch.where(unit > 0, lacks.abs() / unit, torch.zeros(()))
    # numpy's roots are correctly rounded, torch's are not.
    codes = torch.from_numpy(np.sqrt(squares.numpy())).round_().clamp_(max=LARGEST)
    return codes.mul_(lacks.sign()).to(torch.int8), step


def restore_values(
    codes: Tensor, step: Tensor, base: Tensor, scales: Tensor, dtype: torch.dtype
) -> Tensor:
    """Restore the weights at alpha = 1 from int8 values.

    w = b + v |v| (step * scale), each operation in float32, rounded once to `dtype`.

    Args:
        codes: (nnz,) int8 v in [-127, 127].
        step: (1,) float32.
        base: (nnz,) float32, dequantize(base) b there.
        scales: (nnz,) float32, base's scale of each weight's group.
        dtype: the source's.
    Returns:
        (nnz,) of `dtype`; within (|v| + 1/4) step * scale of the source's weight, and one rounding.
    """
    wide = codes.float()
    return (base + wide * wide.abs() * (step * scales)).to(dtype)


def base_at(
    read: BaseRows, crow: Integers, column: Integers, shape: Shape, *, sizes: Sizes
) -> tuple[Tensor, Tensor]:
    """Dequantize base at ortho's positions, some rows at a time.

    Args:
        read: gives packed codes (count, words) and scales (count, groups) of rows.
        crow: (out + 1,) int64.
        column: (nnz,) int64.
        shape: (out, in).
        sizes: of tiles.
    Returns:
        (nnz,) float32 weights of base; (nnz,) float32 scales of their groups.
    """
    base, scales = torch.empty(column.size), torch.empty(column.size)
    for start, count in sizes.tiles("values", shape):
        stop = start + count
        here = slice(int(crow[start]), int(crow[stop]))
        if here.start == here.stop:
            continue
        row = np.repeat(np.arange(count), np.diff(crow[start : stop + 1]))
        at = torch.from_numpy(row), torch.from_numpy(column[here])
        base[here], scales[here] = quantize.dequantize_at(*read(start, count), *at, width=shape[1])
    return base, scales


def _count_dtype(counts: Integers) -> np.dtype[np.generic]:
    return np.dtype(DTYPES[count_dtype(int(counts.max(initial=0)))].numpy)


def _bad(prefix: str, what: str) -> ArtifactError:
    return unsound(f"`{prefix}{what}")
