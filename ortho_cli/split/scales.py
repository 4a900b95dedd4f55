"""Searched group scales: the least squared error of what will be stored, plain or by curvature.

Pure functions on CPU tensors, as in `ops`, whose conventions they share.
"""

from __future__ import annotations

from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ortho_cli.errors import InternalError
from ortho_cli.split import quantize
from ortho_cli.split.task import LANES, scale_factors


class Kept(NamedTuple):
    """What is known of a tile once ortho's positions are."""

    mask: Tensor  # (out, in) bool: ortho holds this weight
    scales: Tensor  # (out, groups): base's scales before its positions were known


def base_scales(
    scale: str,
    raw: Tensor,
    curvature: Tensor | None,
    group_size: int,
    *,
    bits: int = 4,
    kept: Kept | None = None,
    empty: quantize.Empty = quantize.torch_empty,
) -> Tensor:
    """Find base's scales of a weight, (out, groups) in its dtype; each row by itself."""
    if scale == "absmax":
        return quantize.absmax_scales(
            raw, group_size=group_size, dtype=raw.dtype, bits=bits, empty=empty
        )
    if scale == "mse":
        curvature = None
    elif curvature is None:  # scales would be those of mse, under another name
        raise InternalError("scales are to be searched by curvature, and none is given")
    return searched_scales(
        raw, curvature, group_size=group_size, dtype=raw.dtype, bits=bits, kept=kept, empty=empty
    )


def searched_scales(
    weight: Tensor,
    curvature: Tensor | None = None,
    *,
    group_size: int,
    dtype: torch.dtype,
    bits: int = 4,
    kept: Kept | None = None,
    empty: quantize.Empty = quantize.torch_empty,
) -> Tensor:
    """Search each group's scale for the smallest squared error of what will be stored.

    scale = argmin over f in scale_factors(bits) of sum h (w - dequantize(quantize(w, s_f)))^2,
    s_f = f * max|w| / ((2^bits - 1) / 2), both over the weights that base has to stand for, with
    h = 1 where no curvature is given. In a group h counts relative to the group's largest, which
    changes no argmin and keeps a curvature of 1e-38 from vanishing in the product.

    Args:
        weight: (out, in) float32, bfloat16 or float16; `group_size` divides in.
        curvature: h, (in,) or (out, in) float32, >= 0, finite.
        group_size: neighbours in a row that share a scale.
        dtype: dtype the scales are stored in; candidates are rounded to it before they are judged.
        bits: of a code, 3 or 4.
        kept: weights that ortho holds, which count for nothing here, and the scales to beat.
        empty: where temporaries come from.
    Returns:
        (out, in / group_size) of `dtype`, > 0; the first of equals wins, so the error is never
        above absmax's, nor above that of `kept.scales`. A group whose curvature is zero throughout
        keeps the scale that stood first (absmax's, or that of `kept`), and so do groups with NaN or
        infinity, whose scale is not finite.
    Source: the clipping search of AWQ (arXiv:2306.00978, section 3.2), with squared error per
        group, plain or by the second-order loss of OBS (Hassibi and Stork 1993), diagonal.
    """
    count = weight.shape[1] // group_size
    importance = None
    if curvature is not None:
        groups = quantize.groups_of(curvature.view(-1, weight.shape[1]), count)
        peak = groups.amax(-1, keepdim=True)
        peak = torch.where(peak > 0, peak, torch.ones_like(peak))
        importance = torch.div(groups, peak, out=empty(tuple(groups.shape), torch.float32))
    if kept is None:
        return _least_error(weight, importance, count, None, dtype, bits, empty)
    # Where ortho holds nothing, the scale that is known is the best already.
    mask = quantize.groups_of(kept.mask, count)
    held = mask.any(-1)
    groups = quantize.groups_of(weight, count)[held]
    # Zero is a code of every grid: it widens none, and rounds without error.
    groups = torch.where(mask[held], torch.zeros_like(groups), groups)
    if importance is not None:
        importance = importance.expand(mask.shape)[held].unsqueeze(1)
    scales = kept.scales.clone()
    if len(groups):
        known = scales[held].unsqueeze(1)
        scales[held] = _least_error(groups, importance, 1, known, dtype, bits, empty).squeeze(1)
    return scales


def _least_error(
    weight: Tensor,
    importance: Tensor | None,
    count: int,
    known: Tensor | None,
    dtype: torch.dtype,
    bits: int,
    empty: quantize.Empty,
) -> Tensor:
    """Try `known`, then absmax's scale times each factor; give the first of the best."""
    largest = quantize.absmax(weight, count, empty).div_(quantize.half_range(bits))
    weight = weight.float()
    candidates = (quantize.round_scales(largest * factor, dtype) for factor in scale_factors(bits))
    best, best_error = largest, largest  # of no candidate yet
    buffers = quantize.Scratch()
    every = candidates if known is None else chain([known], candidates)
    for number, candidate in enumerate(every):
        buffers.reset()
        codes = quantize.quantize(weight, candidate, bits=bits, empty=buffers)
        error = quantize.dequantize(codes, candidate, empty=buffers).sub_(weight).square_()
        error = quantize.groups_of(error, count)
        error = sum_lanes(error if importance is None else error.mul_(importance))
        if not number:
            best, best_error = candidate, error
            continue
        better = error < best_error
        best = torch.where(better, candidate, best)
        best_error = torch.where(better, error, best_error)
    return best


def sum_lanes(values: Tensor) -> Tensor:
    """Add each group's values in an order that every processor, and a compiled loop, can follow.

    Value i is added to lane i mod 16, in the order of i; then the upper half of the lanes is added
    to the lower, until one is left. torch's own order depends on the width of the processor's
    vectors, and equal errors must tie everywhere.

    Args:
        values: (..., group_size) float32; may be overwritten.
    Returns:
        (...) float32, in memory of their own.
    """
    if values.shape[-1] % LANES:
        values = pad(values, (0, -values.shape[-1] % LANES))
    first, *others = values.view(*values.shape[:-1], -1, LANES).unbind(-2)
    for other in others:
        first.add_(other)
    while (left := first.shape[-1] // 2) > 0:
        first = first[..., :left] + first[..., left:]
    return first.squeeze(-1)
