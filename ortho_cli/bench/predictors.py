"""Predictors of relearning: how far base is from INT4 that forgot nothing, and what lies between.

What relearning brings back lies in a basin that the model never left: where base is close to what
it was, and no ridge of loss is between the two, little training leads back.

Source: Siddiqui et al. 2025 (arXiv:2505.22310); linear mode connectivity, Frankle et al. 2020
(arXiv:1912.05671).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ortho_cli.bench import baselines
from ortho_cli.bench.records import Connectivity, Distance
from ortho_cli.model import scoring
from ortho_cli.runtime.ortho_linear import OrthoLinear
from ortho_cli.storage.parts import Parts

POINTS = 5  # of the line, ends included: each costs a pass over text
# Of text at each point. All points read the same, so that their differences are surer than a
# perplexity is, which so many tokens give to about 1 %.
TOKENS = 4096


def distance(layers: Mapping[str, OrthoLinear]) -> Distance:
    """Give the relative distance of base from INT4 with nothing forgotten, over all split weights.

        |base - int4| / |int4|,   Euclidean

    Raises:
        ArtifactError: there is no ortho stream.
    """
    apart = whole = 0.0
    for layer in layers.values():
        own, base = _ends(layer)
        apart += float((base - own).double().square().sum())
        whole += float(own.double().square().sum())
    return Distance(value=math.sqrt(apart / whole) if whole else 0.0)


def _ends(layer: OrthoLinear) -> tuple[Tensor, Tensor]:
    """Give a weight of INT4 with nothing forgotten, and base's."""
    own = baselines.dequantized(layer, baselines.int4_codes(layer))
    return own, baselines.dequantized(layer, baselines.base_codes(layer))


def connectivity(
    model: nn.Module,
    layers: Mapping[str, OrthoLinear],
    windows: Tensor,
    parts: Parts | None = None,
) -> Connectivity:
    """Measure the loss of text on the straight line from INT4 with nothing forgotten to base.

        W(t) = (1 - t) int4 + t base,   barrier = max over t of NLL(t) - ((1 - t) NLL(0) + t NLL(1))

    Args:
        model: dense, at the line's end, which is alpha 0 to the bit; it is left there.
        layers: what its split Linears were, by name, with both streams.
        windows: (n, length) int64 tokens of text that is to be kept; the first 4,096 count.
        parts: keeps the loss at each point.
    Raises:
        ArtifactError: there is no ortho stream.
        NumericalError: an NLL is NaN or infinite.
    Weights are made anew for each point: no second model is held.
    """
    read = windows[: max(1, TOKENS // windows.shape[1])]

    def measure(point: int) -> float:
        for name, layer in layers.items():
            own, base = _ends(layer)
            with torch.no_grad():
                weight = model.get_submodule(name).get_parameter("weight")
                weight.copy_(torch.lerp(own, base, point / (POINTS - 1)))
        return float(scoring.compare_windows(model, read).nll.double().mean())

    nlls = (parts or Parts()).each("points", range(POINTS), measure)
    return Connectivity(value=barrier(nlls), nlls=tuple(nlls))


def barrier(nlls: Sequence[float]) -> float:
    """Give the largest rise above the straight line between both ends; 0 where there is none."""
    steps = len(nlls) - 1
    ends = nlls[0], nlls[-1]
    straight = [((steps - i) * ends[0] + i * ends[1]) / steps for i in range(steps + 1)]
    rises = [nll - line for nll, line in zip(nlls, straight, strict=True)]
    return max(0.0, *rises[1:-1])
