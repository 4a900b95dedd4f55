"""`--to gguf-lora`: ortho as an adapter for llama.cpp, beside base of `--to gguf`.

    <name of the weight>.lora_a   A (r, in)
    <name of the weight>.lora_b   B (out, r), rows in the order in which base's are

`adapter.lora.alpha` is 0, by which llama.cpp multiplies by the request's scale alone, whatever the
rank of a weight: that scale is ortho's alpha.
Source: llama.cpp's src/llama-adapter.cpp and llama-adapter.h.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from ortho_cli.convert.plan import parse_dtype
from ortho_cli.convert.targets import gguf_layout
from ortho_cli.convert.targets.factors import Module, Ortho
from ortho_cli.convert.targets.gguf_base import KIND, Order, open_model, order_of
from ortho_cli.convert.targets.gguf_layout import GgufSpec
from ortho_cli.convert.targets.job import Error, Figures, Part, Put, TargetPlan
from ortho_cli.convert.targets.peft import facts_of, notes_of, settings_of
from ortho_cli.split.dtypes import BY_CONFIG
from ortho_cli.storage.sealing import Seal

KEYS: gguf_layout.Keys = {
    "general.type": "adapter",
    "adapter.type": "lora",
    "adapter.lora.alpha": 0.0,
}


def plan_gguf_lora(
    ortho: Ortho, *, dtype: str | None = None, seal: Seal | None = None
) -> TargetPlan:
    """Decide how ortho becomes an adapter of llama.cpp.

    Args:
        ortho: open; the plan takes it over.
        dtype: bfloat16, float16 or float32, of both factors; None: the model's own.
        seal: recipients of the file, if it is sealed.
    Raises:
        UsageError: a package is missing, or another dtype.
        CheckpointError: a model that llama.cpp has none like.
    """
    kept = parse_dtype(dtype)
    _, model, weights, places = open_model(ortho.artifact, None)
    named = {one.name: one.spec.key for one in weights}
    parts, specs = [], []
    for module in ortho.modules:
        kind, base = BY_CONFIG[kept] if kept else module.dtype, named[module.weight]
        keys = (f"{base}.lora_a", f"{base}.lora_b")
        shapes = ((module.rank, module.shape[1]), (module.shape[0], module.rank))
        specs += [GgufSpec(key=k, kind=kind, shape=s) for k, s in zip(keys, shapes, strict=True)]
        make = partial(_make, ortho, module, kind, keys, order_of(places.get(base)))
        parts.append(Part(name=module.weight, keys=keys, make=make, facts=facts_of(module, kind)))
    return TargetPlan(
        form="gguf-lora",
        kind=KIND,
        source=ortho.source,
        file=None,
        layout=gguf_layout.plan_gguf(model.architecture, KEYS, specs),
        parts=tuple(parts),
        settings=settings_of(ortho, "gguf-lora"),
        notes=tuple(notes_of(ortho, ortho.modules)),
        seal=seal,
    )


def _make(
    ortho: Ortho,
    module: Module,
    kind: str,
    keys: tuple[str, str],
    order: Order | None,
    put: Put,
) -> Figures:
    error = Error()
    a, b = ortho.factors(module, kind, error)
    put(keys[0], a)
    put(keys[1], b if order is None else b[torch.from_numpy(np.ascontiguousarray(order))])
    return error.figures()
