"""Which modules are plain Linears, and the weight of one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ortho_cli.errors import UsageError


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
