"""Whether a model is calibrated in memory or block by block, by the memory that there is.

No torch: `ortho decompose --dry-run` asks, too.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from ortho_cli.storage.checkpoint import Checkpoint
from ortho_cli.storage.machine import available_memory as available_memory
from ortho_cli.storage.work_folder import identity_left

# Memory per weight of the model in float32 with its activations, and that of imports and logits.
WEIGHT_BYTES = 4.5
OTHER_BYTES = 800_000_000
# Block by block: torch and transformers, which took 590 MB with small batches; float32 per weight.
WALK_BYTES = 600_000_000
FLOAT_BYTES = 4

BY_BLOCK = "by_block"  # key of unfinished work's identity
_LAYER = re.compile(r"^(.*?\.\d+)\.")


def needed(checkpoint: Checkpoint) -> int:
    """Estimate the bytes of memory that a model takes when it is held whole."""
    return round(WEIGHT_BYTES * sum(tensor.numel for tensor in checkpoint.tensors)) + OTHER_BYTES


def least(checkpoint: Checkpoint) -> int:
    """Estimate the bytes that it takes block by block, without hidden states."""
    layers: Counter[str] = Counter()
    for tensor in checkpoint.tensors:
        found = _LAYER.match(tensor.name)
        if found:
            layers[found[1]] += tensor.numel
    return WALK_BYTES + FLOAT_BYTES * max(layers.values(), default=0)


def goes_by_block(
    checkpoint: Checkpoint, limit: int | None = None, out: Path | None = None
) -> bool:
    """Decide whether a model is read block by block.

    Without a limit, unfinished work goes on as it began, whatever memory is free by now.

    Args:
        checkpoint: the model.
        limit: bytes of memory that may be taken; None is what is available.
        out: the file that is made.
    """
    left = identity_left(out) if out is not None and limit is None else None
    if left is not None:
        return left.get(BY_BLOCK) is True
    most = available_memory() if limit is None else limit
    return most is not None and needed(checkpoint) > most
