"""Both streams of one weight, made in memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ortho_cli.errors import NumericalError, RecipeError, UsageError
from ortho_cli.split import pipeline, quantize
from ortho_cli.split.dtypes import names_of_torch
from ortho_cli.split.pipeline import Work
from ortho_cli.split.select import crow_indices
from ortho_cli.split.sizes import DEFAULT_SIZES, Sizes
from ortho_cli.split.task import (
    Array,
    CurvatureTile,
    Inputs,
    Room,
    SplitTask,
    TileResult,
    Vector,
    check_bits,
    check_group_size,
    check_structure,
    columns_of,
)
from ortho_cli.split.torch_kernel import TorchKernel, tensor_of, words_of

SCALES = ("absmax", "mse", "curvature")


# Longer than 60 lines: half of it says what each argument is.
def split_weight(
    weight: Tensor,
    *,
    group_size: int,
    density: float,
    scale: str = "absmax",
    bits: int = 4,
    alone: bool = False,
    structure: str = "points",
    max_rank: int | None = None,
    curvature: Tensor | None = None,
    name: str = "weight",
    sizes: Sizes = DEFAULT_SIZES,
) -> dict[str, Tensor]:
    """Split a weight in memory: the same bits that `ortho decompose` writes.

    saliency = |W - dequantize(base)| * sqrt(curvature), in float32.

    Args:
        weight: (out, in) bfloat16, float16 or float32 on the CPU, any strides.
        group_size: neighbours in a row that share a scale; divides in.
        density: share of weights kept, in [0, 1]; exactly round(density * numel) entries.
        scale: absmax, mse, or curvature, which needs `curvature`.
        bits: of a code, 4, or 3 where in divides by 32.
        alone: searched scales serve ortho's positions, too: no turns are taken.
        structure: points, or columns: round(density * in) whole columns, those of the largest sums
            of squared saliency.
        max_rank: the most columns.
        curvature: (out, in) or (in,) float32, >= 0, finite; None counts as ones.
        name: the tensor's name, for errors.
        sizes: of tiles.
    Returns:
        The parts of both streams, by their names in the artifact.
    Raises:
        NumericalError: a weight or curvature is NaN or infinite, or base overflows.
        RecipeError: group_size, density, scale, bits or structure does not fit.
        UsageError: curvature has another shape.
    Ties keep the lower flat index, or the lower column.
    """
    _check(weight.shape[1], group_size, bits, density, scale, curvature is not None, name)
    check_structure(structure, max_rank)
    rows, width = weight.shape
    whole = columns_of(density, width, max_rank) if structure == "columns" else None
    task = SplitTask(
        name=name,
        shape=(rows, width),
        dtype=names_of_torch()[weight.dtype],
        bits=bits,
        group_size=group_size,
        scale=scale,
        k=round(density * weight.numel()) if whole is None else whole * rows,
        columns=whole,
        by_curvature=curvature is not None,
        alone=alone,
        figures=False,
    )
    near = None if curvature is None else _Curvature(curvature, weight, name)
    base, kernel = Base(task), TorchKernel(sizes, part="in_memory")
    found = pipeline.split_weight(Work(task, Inputs(_Rows(weight), near), kernel, base.write))
    pointer, column = quantize.ortho_dtypes(task.k, width)
    values = tensor_of(found.values.copy(), task.dtype)
    parts = {
        "weight_packed": torch.from_numpy(base.packed),
        "weight_scale": tensor_of(base.scales, task.dtype),
        "weight_shape": torch.tensor(task.shape, dtype=torch.int64),
        "col_indices": torch.from_numpy(np.ascontiguousarray(found.indices % width)).to(column),
        "values": values if whole is None else values.view(rows, whole),
    }
    if whole is None:
        parts["crow_indices"] = torch.from_numpy(crow_indices(found.indices, task.shape)).to(
            pointer
        )
    return parts


def _check(
    columns: int, group_size: int, bits: int, density: float, scale: str, curved: bool, name: str
) -> None:
    """Refuse settings that do not fit the weight, or one another."""
    check_group_size(columns, group_size, name)
    check_bits(columns, bits, name)
    if not 0.0 <= density <= 1.0:
        raise RecipeError(f"density is {density}", hint="a share from 0 to 1; 0.005 keeps 0.5 %")
    if scale not in SCALES:
        raise RecipeError(f"scale is {scale!r}", hint=f"one of {', '.join(SCALES)}")
    if scale == "curvature" and not curved:
        raise RecipeError(
            f"scale is curvature and `{name}` has none", hint="calibrate first, or scale mse"
        )


class _Rows:
    """Rows of a weight that is in memory."""

    def __init__(self, weight: Tensor) -> None:
        self._words = words_of(weight)

    def read(self, buffer: Array, row: int) -> None:
        buffer[...] = self._words[row : row + len(buffer)]

    peek = read


class Base:
    """Base of a weight, in memory."""

    def __init__(self, task: SplitTask) -> None:
        """Make room for it."""
        rows, columns = task.shape
        self.packed = np.empty((rows, columns * task.bits // 32), np.int32)
        self.scales = np.empty((rows, columns // task.group_size), task.word)

    def write(self, result: TileResult, row: int) -> None:
        """Copy a tile."""
        here = slice(row, row + len(result.scales))
        self.packed[here], self.scales[here] = result.packed.view(np.int32), result.scales


class _Curvature:
    """Curvature that is in memory, in float32 on the CPU."""

    def __init__(self, curvature: Tensor, weight: Tensor, name: str) -> None:
        if tuple(curvature.shape) not in (tuple(weight.shape), (weight.shape[1],)):
            raise UsageError(
                f"curvature of `{name}` has shape {list(curvature.shape)} where the weight is "
                f"{list(weight.shape)}",
                hint="give (out, in) or (in,)",
            )
        wide = curvature.detach().cpu().float().contiguous()
        if not quantize.is_curvature(wide):
            raise NumericalError(
                f"curvature of `{name}` is negative, NaN or infinite somewhere",
                hint="calibrate again; squares of gradients are neither",
            )
        self._values: Array = wide.numpy()

    def read(self, row: int, count: int, room: Room) -> CurvatureTile:
        return self.peek([row], count, room)

    def peek(self, starts: Sequence[int], count: int, room: Room) -> CurvatureTile:
        if self._values.ndim == 1:
            return CurvatureTile(columns=Vector(self._values, np.sqrt(self._values)))
        rows = [self._values[start : start + count] for start in starts]
        return CurvatureTile(
            words=(rows[0] if len(rows) == 1 else np.concatenate(rows)).view(np.uint32)
        )

    def check(self, words: Array, row: int) -> None:
        """Have nothing to find: all of it was checked."""
