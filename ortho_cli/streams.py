"""Both streams of one weight, in memory: how they are made, and what is sound."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ortho_cli import ops
from ortho_cli.errors import ArtifactError, InternalError, NumericalError, RecipeError, UsageError
from ortho_cli.scales import Kept, curvature_scales, mse_scales
from ortho_cli.search import chosen_alike, rounds, take_turns
from ortho_cli.sizes import DEFAULT_SIZES, Sizes
from ortho_cli.topk import TopK, crow_indices

BASE_PARTS = ("weight_packed", "weight_scale", "weight_shape")
ORTHO_PARTS = ("crow_indices", "col_indices", "values")
SCALES = ("absmax", "mse", "curvature")


def ortho_dtypes(nnz: int, columns: int) -> tuple[torch.dtype, torch.dtype]:
    """Dtypes of crow_indices and col_indices: those of `artifact.ortho_specs`."""
    return (
        torch.int32 if nnz < 2**31 else torch.int64,
        torch.uint16 if columns <= 2**16 else torch.int32,
    )


def split_weight(
    weight: Tensor,
    *,
    group_size: int,
    density: float,
    scale: str = "absmax",
    bits: int = 4,
    alone: bool = False,
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
        curvature: (out, in) or (in,) float32, >= 0, finite; None counts as ones.
        name: the tensor's name, for errors.
        sizes: of tiles.
    Returns:
        The six parts of both streams, by their names in the artifact.
    Raises:
        NumericalError: a weight or curvature is NaN or infinite, or base overflows.
        RecipeError: group_size, density, scale or bits does not fit.
        UsageError: curvature has another shape.
    Ties keep the lower flat index.
    """
    check_group_size(weight.shape[1], group_size, name)
    check_bits(weight.shape[1], bits, name)
    if not 0.0 <= density <= 1.0:
        raise RecipeError(f"density is {density}", hint="a share from 0 to 1; 0.005 keeps 0.5 %")
    if scale not in SCALES:
        raise RecipeError(f"scale is {scale!r}", hint=f"one of {', '.join(SCALES)}")
    if scale == "curvature" and curvature is None:
        raise RecipeError(
            f"scale is curvature and `{name}` has none", hint="calibrate first, or scale mse"
        )
    root: Tensor | None = None
    if curvature is not None:
        curvature = _check_curvature(curvature, weight, name)
        # numpy's roots are correctly rounded, torch's are not: the same bits as from a file.
        root = torch.from_numpy(np.sqrt(curvature.numpy()))
    settings: dict[str, Any] = {
        "group_size": group_size,
        "scale": scale,
        "bits": bits,
        "name": name,
        "sizes": sizes,
    }
    k = round(density * weight.numel())

    def split(before: _Split | None) -> _Split:
        return _split_once(weight, k, curvature, root, before, **settings)

    turns = rounds(scale, by_curvature=curvature is not None, k=k, numel=weight.numel())
    return take_turns(split(None), split, 0 if alone else turns).parts


class _Split(NamedTuple):
    """What one pass makes of a weight."""

    parts: dict[str, Tensor]
    kept: npt.NDArray[np.integer[Any]]  # flat indices, ascending


def kept_within(
    kept: npt.NDArray[np.integer[Any]], scales: Tensor, columns: int, start: int, stop: int
) -> Kept:
    """Look at rows `start` to `stop` of what a pass found.

    Args:
        kept: (nnz,) flat indices of the whole weight, ascending.
        scales: (out, groups) of the whole weight.
        columns: of the weight.
        start: first row.
        stop: behind the last row.
    """
    first, last = start * columns, stop * columns
    here = slice(*np.searchsorted(kept, (first, last)))
    mask = torch.zeros(last - first, dtype=torch.bool)
    mask.numpy()[kept[here] - first] = True
    return Kept(mask=mask.view(stop - start, columns), scales=scales[start:stop])


def _split_once(
    weight: Tensor,
    k: int,
    curvature: Tensor | None,
    root: Tensor | None,
    before: _Split | None,
    *,
    group_size: int,
    scale: str,
    bits: int,
    name: str,
    sizes: Sizes,
) -> _Split:
    """Split in one pass; what the one before kept is left out of the scales."""
    rows, columns = weight.shape
    packed = torch.empty((rows, columns * bits // 32), dtype=torch.int32)
    scales = torch.empty((rows, columns // group_size), dtype=weight.dtype)
    raw_bits = torch.int32 if weight.dtype.itemsize == 4 else torch.int16
    payload = np.int32 if weight.dtype.itemsize == 4 else np.int16
    stretch = sizes.rows("in_memory", (rows, columns)) * columns
    stays = before is not None and not chosen_alike(scale, by_curvature=root is not None)
    top = TopK(k, length=weight.numel(), stretch=stretch, payloads=[payload])
    for row, count in sizes.tiles("in_memory", (rows, columns)):
        here = slice(row, row + count)
        raw = weight[here].contiguous()
        near = curvature if curvature is None or curvature.ndim == 1 else curvature[here]
        found = None
        if before is not None:
            known = before.parts["weight_scale"]
            found = kept_within(before.kept, known, columns, row, here.stop)
        scales[here] = base_scales(scale, raw, near, group_size, bits=bits, kept=found)
        if not ops.all_finite(scales[here]):
            raise NumericalError(
                f"tensor `{name}` holds NaN or infinity in rows {row} to {here.stop - 1}",
                hint="repair the model, or leave the layer out with `ignore`",
            )
        wide = raw.float()
        codes = ops.quantize(wide, scales[here], bits=bits)
        saliency = ops.dequantize(codes, scales[here]).sub_(wide).abs_()
        if root is not None:
            saliency.mul_(root if root.ndim == 1 else root[here])
        if not ops.all_finite(saliency):
            raise NumericalError(
                f"tensor `{name}` overflows {raw.dtype} when dequantized",
                hint="leave the layer out with `ignore`, or cast the model to bfloat16",
            )
        if found is not None and stays:
            saliency[found.mask] = torch.inf
        packed[here] = ops.pack_codes(codes, bits=bits)
        values = raw.view(raw_bits).view(-1).numpy()
        top.push(saliency.view(-1).numpy(), [values], start=row * columns)
    indices, _, (values,) = top.finish()
    pointer, column = ortho_dtypes(k, columns)
    parts = {
        "weight_packed": packed,
        "weight_scale": scales,
        "weight_shape": torch.tensor([rows, columns], dtype=torch.int64),
        "crow_indices": torch.from_numpy(crow_indices(indices, (rows, columns))).to(pointer),
        "col_indices": torch.from_numpy(np.ascontiguousarray(indices % columns)).to(column),
        "values": torch.from_numpy(values.copy()).view(weight.dtype),
    }
    return _Split(parts, indices.copy())


def base_scales(
    scale: str,
    raw: Tensor,
    curvature: Tensor | None,
    group_size: int,
    *,
    bits: int = 4,
    kept: Kept | None = None,
    empty: ops.Empty = ops.torch_empty,
) -> Tensor:
    """Find base's scales of a weight, (out, groups) in its dtype; each row by itself."""
    settings: dict[str, Any] = {
        "group_size": group_size,
        "dtype": raw.dtype,
        "bits": bits,
        "empty": empty,
    }
    if scale == "absmax":
        return ops.absmax_scales(raw, **settings)
    settings["kept"] = kept
    if scale == "curvature":
        if curvature is None:  # scales would be those of mse, under another name
            raise InternalError("scales are to be searched by curvature, and none is given")
        return curvature_scales(raw, curvature, **settings)
    return mse_scales(raw, **settings)


def check_csr(
    crow: Tensor, column: Tensor, values: Tensor, shape: tuple[int, int], prefix: str
) -> None:
    """Refuse a CSR matrix that would read outside its rows and columns.

    Raises:
        ArtifactError: names the part, prefixed.
    """
    rows, columns = shape
    if tuple(crow.shape) != (rows + 1,) or column.shape != values.shape or values.ndim != 1:
        raise ArtifactError(
            f"`{prefix}crow_indices` {list(crow.shape)}, col_indices {list(column.shape)} and "
            f"values {list(values.shape)} are no CSR matrix of {rows} rows",
            hint="the stream is damaged, or of another layer",
        )
    if crow.is_meta or column.is_meta:
        return
    wide, nnz = crow.long(), values.numel()
    if int(wide[0]) != 0 or int(wide[-1]) != nnz or bool((wide.diff() < 0).any()):
        raise ArtifactError(
            f"`{prefix}crow_indices` does not climb from 0 to {nnz}",
            hint="the stream is damaged, or of another layer",
        )
    place = column.to(torch.int64)
    if nnz and not 0 <= int(place.min()) <= int(place.max()) < columns:
        raise ArtifactError(
            f"`{prefix}col_indices` names column {int(place.max())} of {columns}",
            hint="the stream is damaged, or of another layer",
        )
    starts = wide[1:-1]
    climbs = place.diff() > 0
    climbs[starts[(starts > 0) & (starts < nnz)] - 1] = True
    if not bool(climbs.all()):
        row = int(torch.searchsorted(wide, int(climbs.logical_not().nonzero()[0]), right=True)) - 1
        raise ArtifactError(
            f"`{prefix}col_indices` does not ascend in row {row}",
            hint="the stream is damaged, or of another layer",
        )


def dense_weight(linear: nn.Module, name: str) -> Tensor:
    """Find the (out, in) weight of a Linear or Conv1D, on the CPU."""
    weight = getattr(linear, "weight", None)
    known = (torch.bfloat16, torch.float16, torch.float32)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or weight.dtype not in known:
        raise UsageError(
            f"`{name}` of {type(linear).__name__} is no 2-D floating weight",
            hint="only Linear layers in bfloat16, float16 or float32 can be split",
        )
    if weight.is_meta:
        raise UsageError(
            f"`{name}` is on the meta device: it holds no weights", hint="load the model first"
        )
    weight = weight.detach()
    return (weight.t() if is_conv1d(linear) else weight).cpu()


def is_conv1d(module: nn.Module) -> bool:
    """Tell transformers' Conv1D, stored (in, out), without importing transformers."""
    return any(
        (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D")
        for kind in type(module).__mro__
    )


def is_plain_linear(module: nn.Module | None) -> bool:
    """Tell a module that computes x W^T + bias and, by its own forward, no more."""
    if isinstance(module, nn.Linear):
        return type(module).forward is nn.Linear.forward
    return module is not None and is_conv1d(module)


def check_group_size(in_features: int, group_size: int, name: str = "weight") -> None:
    """Refuse a group size that does not divide, and name those that do."""
    if group_size <= 0 or group_size % 8 or in_features % group_size:
        known = [size for size in (256, 128, 64, 32, 16, 8) if in_features % size == 0]
        raise RecipeError(
            f"group_size {group_size} does not divide in_features {in_features} of `{name}`",
            hint=f"sizes that do: {', '.join(map(str, known))}"
            if known
            else "no multiple of 8 divides it; leave the layer out with `ignore`",
        )


def check_bits(in_features: int, bits: int, name: str = "weight") -> None:
    """Refuse a width of codes that base cannot have, or that does not fill the words of a row."""
    if bits not in (3, 4):
        raise RecipeError(f"bits is {bits!r} for `{name}`", hint="3 or 4")
    if in_features * bits % 32:
        raise RecipeError(
            f"bits is {bits} for `{name}`, whose in_features {in_features} does not divide by 32 "
            "(as many codes of 3 bits fill three words)",
            hint="give it 4 bits, or leave the layer out with `ignore`",
        )


def _check_curvature(curvature: Tensor, weight: Tensor, name: str) -> Tensor:
    """Bring curvature to the CPU in float32, refusing what is no mean of squares."""
    if tuple(curvature.shape) not in (tuple(weight.shape), (weight.shape[1],)):
        raise UsageError(
            f"curvature of `{name}` has shape {list(curvature.shape)} where the weight is "
            f"{list(weight.shape)}",
            hint="give (out, in) or (in,)",
        )
    wide = curvature.detach().cpu().float().contiguous()
    if not ops.is_curvature(wide):
        raise NumericalError(
            f"curvature of `{name}` is negative, NaN or infinite somewhere",
            hint="calibrate again; squares of gradients are neither",
        )
    return wide
