"""Baselines of a bench, made from the artifact: INT4 with nothing forgotten, and control edits.

A control edit moves as many codes as forgetting did, and knows no secrets. The artifact suffices
for both: forgetting moves base's codes only at positions of the ortho stream, and ortho's values
there, the source's weights or its own INT4, round to the source's codes.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ortho_cli.errors import ArtifactError
from ortho_cli.runtime.ortho_linear import OrthoLinear
from ortho_cli.runtime.product import NO_ORTHO
from ortho_cli.split import quantize
from ortho_cli.split.select import TopK

Kind = Literal["random", "magnitude"]
KINDS: tuple[Kind, ...] = ("random", "magnitude")


def base_codes(layer: OrthoLinear) -> Tensor:
    """Unpack the codes of base, (out, in) int8 in [-8, 7], or in [-4, 3] where they have 3 bits."""
    return quantize.unpack_codes(layer.weight_packed.cpu(), bits=layer.bits)


def int4_codes(layer: OrthoLinear) -> Tensor:
    """Find the codes that the source itself rounds to on the artifact's grid.

        q = clamp(round(w / scale), -8, 7) where ortho has w; base's code everywhere else

    Args:
        layer: with both streams; where base has codes of 3 bits, they end at -4 and 3.
    Returns:
        (out, in) int8; base's own codes where nothing was moved, bit for bit.
    Raises:
        ArtifactError: there is no ortho stream.
    Exact, since ortho has every position that forgetting moves. Halves round to even, as in
    `quantize.quantize`.
    """
    if layer.nnz is None:
        raise ArtifactError("INT4 without forgetting is not known from base alone", hint=NO_ORTHO)
    crow, column, values = layer.csr()
    codes = base_codes(layer)
    rows = torch.repeat_interleave(torch.arange(layer.out_features), crow.cpu().long().diff())
    columns = column.cpu().to(torch.int64)
    scales = layer.weight_scale.cpu()[rows, columns // layer.group_size]
    weights = values.cpu().float()[:, None]
    kept = quantize.quantize(weights, scales[:, None], bits=layer.bits)[:, 0]
    codes[rows, columns] = kept.to(torch.int8)
    return codes


def dequantized(layer: OrthoLinear, codes: Tensor) -> Tensor:
    """Dequantize codes on a layer's grid, (out, in) float32."""
    return quantize.dequantize(codes, layer.weight_scale.cpu())


def count_moved(layer: OrthoLinear) -> int:
    """Count the codes of base that are not the source's own."""
    return int((base_codes(layer) != int4_codes(layer)).sum())


def control_codes(codes: Tensor, scales: Tensor, *, count: int, kind: Kind, seed: int) -> Tensor:
    """Move `count` codes to 0, none of which is 0 already.

    Args:
        codes: (out, in) int8, of INT4 with nothing forgotten.
        scales: (out, groups).
        count: codes to move; where fewer are not 0, all of them.
        kind: random positions, or those of the largest |code * scale|, ties to the lower index.
        seed: of the random positions.
    Returns:
        (out, in) int8, new.
    """
    moved = codes.clone()
    flat = moved.view(-1)
    nonzero = flat.nonzero()[:, 0]
    count = min(count, len(nonzero))
    if kind == "random":
        generator = torch.Generator().manual_seed(seed)
        flat[nonzero[torch.randperm(len(nonzero), generator=generator)[:count]]] = 0
    elif count:
        size = quantize.dequantize(codes, scales.cpu()).abs_().view(-1)
        top = TopK(count, length=size.numel(), stretch=size.numel(), payloads=[])
        top.push(size.numpy(), [], start=0)
        flat[torch.from_numpy(top.finish()[0].copy()).long()] = 0
    return moved
