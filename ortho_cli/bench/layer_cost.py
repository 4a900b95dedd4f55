"""What each decoder layer costs: KL to the original when only its weights are those of an alpha.

    D_l(alpha) = mean over tokens of KL(original || original with layer l's split weights W(alpha))

The original around it keeps errors of other layers out, so that D_l is that layer's own and layers
compare on the same tokens. Errors meet and grow on their way through a model: the sum of all D_l is
an estimate of the whole KL where errors are small, and no bound.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ortho_cli.bench import evaluate
from ortho_cli.bench.records import TextFigure
from ortho_cli.errors import UsageError
from ortho_cli.formats.layers import natural, place_of
from ortho_cli.model import scoring

# Of text for each layer: all layers read the same, so that their order is surer than each figure.
TOKENS = 1024


def by_layer(linears: Sequence[str]) -> dict[str, list[str]]:
    """Group Linears by their layer, in the order of the model; outside of layers each is one."""
    layers: dict[str, list[str]] = {}
    for name in sorted(linears, key=natural):
        layers.setdefault(place_of(name).layer or name, []).append(name)
    return layers


def windows_of(windows: Tensor) -> Tensor:
    """Give the windows that are read for each layer: the first TOKENS tokens, one at least."""
    return windows[: max(1, TOKENS // windows.shape[1])]


@torch.no_grad()
def cost_by_layer(
    model: nn.Module, original: nn.Module, linears: Sequence[str], windows: Tensor, *, seed: int = 0
) -> dict[str, TextFigure]:
    """Measure D_l of each layer, in nats per token.

    Args:
        model: dense, at the alpha that is measured.
        original: the source; it is left as it was.
        linears: the split Linears of `model`, which `original` has by the same names.
        windows: (n, length) int64 tokens of text; the first 1,024 count, one window at least.
        seed: of the bootstrap, over windows.
    Returns:
        A figure for each layer, in the order of the model; a weight outside of layers is one.
    Raises:
        UsageError: the original has no such Linear, or one of another size.
        NumericalError: a KL is NaN or infinite.
    It takes one pass for each layer and one more over these tokens, and the original's logits of
    one window beside the model's.
    """
    layers = by_layer(linears)
    for names in layers.values():
        for name in names:
            _check(model, original, name)
    found: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    for window in windows_of(windows):
        read = window[None]
        logits = scoring.logits_of(original(read.to(scoring.device_of(original))))
        for layer, names in layers.items():
            with _exchanged(original, model, names):
                beside = scoring.compare_windows(original, read, _always(logits)).beside
            found[layer] += [] if beside is None else [beside.kl]
    return {layer: evaluate.over_windows(torch.cat(kls), seed=seed) for layer, kls in found.items()}


def _always(logits: Tensor) -> scoring.Forward:
    """Stand for the original, whose logits of this window are known."""
    return lambda tokens: logits


def _check(model: nn.Module, original: nn.Module, name: str) -> None:
    """Refuse an original that lacks a Linear of the artifact."""
    try:
        weight = original.get_submodule(name).get_parameter("weight")
    except AttributeError:
        weight = None
    wanted = model.get_submodule(name).get_parameter("weight")
    if weight is None or weight.numel() != wanted.numel():  # Conv1D has the shape turned round
        told = "no such weight" if weight is None else f"shape {list(weight.shape)}"
        raise UsageError(
            f"`{name}` is {list(wanted.shape)} in the artifact, and --model has {told}",
            hint="--by-layer needs the model that the artifact was made from",
        )


@contextmanager
def _exchanged(original: nn.Module, model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Put Linears of a model in the place of the original's while it lasts; nothing is copied."""
    own: Mapping[str, nn.Module] = {name: original.get_submodule(name) for name in names}
    try:
        for name in names:
            original.set_submodule(name, model.get_submodule(name))
        yield
    finally:
        for name, module in own.items():
            original.set_submodule(name, module)
