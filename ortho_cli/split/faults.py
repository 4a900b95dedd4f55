"""What is wrong with a tile that no kernel could split: found in numpy, for every kernel alike."""

from __future__ import annotations

import numpy as np

from ortho_cli.errors import InternalError, NumericalError, OrthoError
from ortho_cli.split import exact
from ortho_cli.split.task import Array, Curvature, SplitTask, Tile, TileResult


def fault_of(
    task: SplitTask, curvature: Curvature | None, tile: Tile, result: TileResult
) -> OrthoError:
    """Find the first number of a tile that is NaN or infinite, or no curvature.

    Args:
        task: names the weight.
        curvature: says what is wrong with its own words, by raising.
        tile: that a kernel called unsound.
        result: what it made of the tile.
    Returns:
        The error to raise.
    Raises:
        OrthoError: what `curvature.check` raises.
    """
    weight = exact.widen(tile.raw, task.dtype)
    if not np.isfinite(weight).all():
        return not_finite(task.name, task.file, task.shape, weight, tile.start)
    if curvature is not None and tile.curvature.words is not None:
        curvature.check(tile.curvature.words, tile.row)
    stands = weight if tile.reference is None else exact.widen(tile.reference, task.dtype)
    if not np.isfinite(stands).all():
        value, place = first_bad(task.shape, stands, tile.start)
        return NumericalError(
            f"tensor `{task.name}` of the reference holds {value} at {place}",
            hint="repair the reference, or carry the tensor over by adding it to `ignore`",
        )
    with np.errstate(over="ignore", invalid="ignore"):
        scales = np.repeat(exact.widen(result.scales, task.dtype), task.group_size, axis=1)
        codes = exact.unpack(result.packed.view(np.int32), task.bits, task.shape[1])
        base = exact.round_to(codes.astype(np.float32) * scales, task.dtype)
        residual = np.abs(base - weight)
        if np.isfinite(residual).all():
            return _overflow_by_curvature(task, tile, residual)
    _, place = first_bad(task.shape, residual, tile.start)
    file = f" of `{task.file}`" if task.file else ""
    return NumericalError(
        f"tensor `{task.name}`{file} overflows {task.dtype} when dequantized, at {place}",
        hint="add the tensor to `ignore`, or cast a float16 checkpoint to bfloat16",
    )


def not_finite(
    name: str, file: str | None, shape: tuple[int, ...], values: Array, start: int
) -> NumericalError:
    """Make the error for weights from flat index `start` on, one of which is not finite."""
    value, place = first_bad(shape, values, start)
    of, hint = "", "repair the model, or leave the layer out with `ignore`"
    if file is not None:
        of = f" of `{file}`"
        hint = "repair the checkpoint, or carry the tensor over as it is by adding it to `ignore`"
    return NumericalError(f"tensor `{name}`{of} holds {value} at {place}", hint=hint)


def first_bad(shape: tuple[int, ...], values: Array, start: int) -> tuple[float, list[int]]:
    """Find the first value that is not finite, and its index in the whole tensor."""
    flat = values.reshape(-1)
    first = int(np.flatnonzero(~np.isfinite(flat))[0])
    return float(flat[first]), [int(i) for i in np.unravel_index(start + first, shape)]


def _overflow_by_curvature(task: SplitTask, tile: Tile, residual: Array) -> OrthoError:
    near = tile.curvature
    root = np.ones((1, 1), np.float32)
    if near.words is not None:
        root = np.sqrt(exact.widen(near.words, near.dtype))
    elif near.columns is not None:
        rows = root if near.rows is None else near.rows.roots[:, None]
        root = rows * near.columns.roots
    weighted = residual * root
    if tile.reference is not None and np.isfinite(weighted).all():
        delta = exact.widen(tile.reference, task.dtype) - exact.widen(tile.raw, task.dtype)
        weighted = np.abs(delta) * root
    if np.isfinite(weighted).all():
        return InternalError(
            f"rows {tile.row} on of `{task.name}` were called unsound, and are not"
        )
    _, place = first_bad(task.shape, weighted, tile.start)
    return NumericalError(
        f"residual times curvature of `{task.name}` overflows at {place}",
        hint="calibrate again, or add the tensor to `ignore`",
    )
