"""A public model beside base: can codes that were moved be told by it, and undone?

A source is often fine-tuned from a model that everybody has. Its weights lie close to the source's,
so that they show where base's codes are not the source's own, and hold what forgetting took out of
them as far as it was there before the fine-tuning. Both need the same architecture.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ortho_cli.bench import baselines
from ortho_cli.bench.records import Positions
from ortho_cli.errors import UsageError
from ortho_cli.model import load as models
from ortho_cli.model.linears import dense_weight, is_plain_linear
from ortho_cli.runtime.ortho_linear import OrthoLinear
from ortho_cli.split import quantize

BINS = 1024  # of the score for each spacing of the grid: finer than what decides anything
WIDEST = 16  # spacings: codes of 4 bits span 15, and a score is no larger


class Public(NamedTuple):
    """A public weight, (out, in), on the CPU in its own dtype, and the grid of base beside it."""

    weight: Tensor
    scales: Tensor  # (out, groups)
    bits: int


def open_public(
    folder: Path, model: nn.Module, layers: Mapping[str, OrthoLinear]
) -> dict[str, Public]:
    """Load the weights of a public model that base has split; the rest of it is let go.

    Args:
        folder: a transformers folder.
        model: the artifact's, dense.
        layers: what its split Linears were, by name.
    Raises:
        CheckpointError: the folder holds no model that can be loaded.
        UsageError: it has other Linears than the artifact, or one of another shape.
    Embeddings may differ: fine-tuning often adds tokens.
    """
    public = models.load_model(folder, dtype=None, device=torch.device("cpu"))
    mine, theirs = _linears(model), _linears(public)
    hint = "--public is the model that the source was fine-tuned from: the same architecture"
    for name in sorted(mine.keys() ^ theirs.keys()):
        has, lacks = ("the artifact", folder) if name in mine else (folder, "the artifact")
        raise UsageError(f"tensor `{name}.weight` is in `{has}` and not in `{lacks}`", hint=hint)
    found = {}
    for name, layer in layers.items():
        weight = dense_weight(theirs[name], name)
        shape = (layer.out_features, layer.in_features)
        if tuple(weight.shape) != shape:
            raise UsageError(
                f"tensor `{name}.weight` is {list(weight.shape)} in `{folder}` and {list(shape)} "
                "in the artifact",
                hint=hint,
            )
        found[name] = Public(weight, layer.weight_scale.cpu(), layer.bits)
    return found


def _linears(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if is_plain_linear(module)}


def clamp_to_codes(weight: Tensor, public: Public) -> Tensor:
    """Move public weights into the intervals that a model's own codes stand for.

        q = clamp(round(w / scale)),   p' = clamp(p, (q - 1/2) scale, (q + 1/2) scale)

    Args:
        weight: (out, in) float32; base's own, whose codes are then exact, or any other model's.
        public: the public weight and base's grid.
    Returns:
        (out, in) float32 on the CPU. The intervals of the first and last code have no outer end.
    What base's codes leave open, the public model fills in: of all weights that round to base, it
    is the one nearest to the public model.
    """
    scales = public.scales.float()
    codes = quantize.quantize(weight.detach().float().cpu(), scales, bits=public.bits)
    low, high = (quantize.dequantize(codes + half, scales) for half in (-0.5, 0.5))
    least, most = quantize.code_range(public.bits)
    low.masked_fill_(codes == least, -torch.inf)
    high.masked_fill_(codes == most, torch.inf)
    return torch.minimum(torch.maximum(public.weight.float(), low), high)


def count_differences(layer: OrthoLinear, public: Public) -> Tensor:
    """Count weights by how far base's code is from the public model.

        score = |q - clamp(p / scale, q_min, q_max)|

    Args:
        layer: with both streams.
        public: its public weight.
    Returns:
        (2, BINS * WIDEST) int64: weights whose code is the source's own, and those that were moved,
        by their score in steps of 1 / BINS of a spacing.
    Raises:
        ArtifactError: there is no ortho stream.
    """
    codes = baselines.base_codes(layer)
    moved = (codes != baselines.int4_codes(layer)).flatten()
    groups = quantize.groups_of(public.weight.float(), public.scales.shape[1])
    place = (groups / public.scales.float().unsqueeze(-1)).view(codes.shape)
    place = place.clamp(*quantize.code_range(public.bits))
    bins = ((codes - place).abs() * BINS).long().flatten()
    size = BINS * WIDEST
    kept, gone = (torch.bincount(bins[of], minlength=size) for of in (~moved, moved))
    return torch.stack((kept, gone))


def tell_positions(counts: Tensor) -> Positions:
    """Say how well a score tells codes that were moved from all others.

    Args:
        counts: (2, n) int64, weights of either kind by ascending score; of each there are some.
    Returns:
        AUC, precision at two recalls and recall at one precision: the best over all thresholds
        that reach them. Weights of one bin count as ties.
    """
    kept, moved = counts.double()
    below = kept.cumsum(0) - kept
    area = float((moved * (below + kept / 2)).sum() / (moved.sum() * kept.sum()))
    hits, taken = moved.flip(0).cumsum(0), counts.double().sum(0).flip(0).cumsum(0)
    some = taken > 0
    precision, recall = hits[some] / taken[some], hits[some] / moved.sum()
    sure = recall[precision >= 0.8]
    return Positions(
        value=area,
        precision_at_recall_50=float(precision[recall >= 0.5].max()),
        precision_at_recall_75=float(precision[recall >= 0.75].max()),
        recall_at_precision_80=float(sure.max()) if len(sure) else 0.0,
        moved=int(moved.sum()),
        weights=int(counts.sum()),
    )
