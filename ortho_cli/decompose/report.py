"""What is said of a finished decomposition: config.json and report.json."""

from __future__ import annotations

import math
from collections.abc import Iterable
from importlib import metadata
from typing import Any

from ortho_cli.decompose.plan import Plan, TensorPlan
from ortho_cli.decompose.record import TensorRecord
from ortho_cli.decompose.roles import is_embedding
from ortho_cli.decompose.selection import stacked_experts
from ortho_cli.formats import artifact
from ortho_cli.formats.artifact import module_of
from ortho_cli.formats.quantization_config import quantization_config
from ortho_cli.model.renames import rename_modules
from ortho_cli.split.task import Figures
from ortho_cli.storage.data_file import Layout, TensorSpec
from ortho_cli.storage.tied import tied_head
from ortho_cli.version import __version__


def make_config(plan: Plan, config: dict[str, Any]) -> dict[str, Any]:
    """Add `quantization_config` to the source's config.json."""
    split = {module_of(tensor.name): tensor.bits for tensor in plan.split}
    unsplit: set[str] = set()
    others: set[str] = set()
    for tensor in plan.tensors:
        if tensor.reason is None:
            continue
        module = module_of(tensor.name)
        stacked = stacked_experts(tensor.source, tensor.reason)
        if stacked is not None:
            unsplit.add(f"{stacked}.0.gate_proj")  # what vLLM asks for, whatever lies there
        elif len(tensor.source.shape) == 2:
            (others if is_embedding(module) else unsplit).add(module)
    head = tied_head(config)
    if head is not None:
        unsplit.add(head)  # a Linear of the model that has no tensor of its own
    # transformers asks for some modules by other names than the file has.
    for module, renamed in rename_modules(config, [*split, *unsplit]).items():
        if module in split and renamed not in unsplit:
            split[renamed] = split[module]
        elif module in unsplit and renamed not in split:
            unsplit.add(renamed)
    settings = quantization_config(
        split=split,
        unsplit=sorted(unsplit),
        group_size=plan.group_size,
        others=sorted(others),
    )
    return {**config, "quantization_config": settings}


def make_report(
    plan: Plan,
    records: list[TensorRecord],
    *,
    ortho: Layout,
    moved: int,
    source_digest: str,
    base_blake3: str,
    ortho_blake3: str,
    sealed_blake3: str | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Say what was done; the same for the same input, so without times and paths.

    `sealed_blake3` is the exception, and there only where ortho is sealed: age draws fresh keys.

    Units: bytes; bits per weight; sqnr in dB, null where there is no error. `residual_kept` is the
        share of the squared
    residual at the kept positions: noise at alpha = 1 is (1 - residual_kept) of that at alpha = 0.
    `moved` counts codes that forgetting moved, over the whole model: where they are is not told.
    `saliency_kept` is the same share of what selects; curvature_error is the sum of residual^2
    times curvature, null without statistics. `columns` counts columns that a compact ortho holds
    whole. With int8 values what rounding them costs is part of every figure at alpha = 1.
    """
    tensors = [
        _report_tensor(plan, tensor, record, ortho)
        for tensor, record in zip(plan.tensors, records, strict=True)
    ]
    split = [record.figures for record in records if record.figures is not None]
    signal, noise, kept = (_sum(split, key) for key in ("signal", "noise", "noise_kept"))
    nnz = sum(tensor.k for tensor in plan.split)
    base_bits = 8 * sum(_nbytes(tensor.base) for tensor in plan.split)
    ortho_bits = 8 * sum(_kept_bytes(record, ortho) for record in records)
    bits = 8 * (plan.base.size + ortho.size) / plan.weights
    return {
        "format": artifact.FORMAT,
        "versions": {"ortho": __version__, "torch": metadata.version("torch"), "device": device},
        "plan_sha256": plan.sha256,
        "source_digest": source_digest,
        "base_blake3": base_blake3,
        "ortho_blake3": ortho_blake3,
        **({"sealed_blake3": sealed_blake3} if sealed_blake3 else {}),
        "recipe": plan.recipe.canonical(),
        "group_size": plan.group_size,
        "statistics": plan.statistics.summary() if plan.statistics else None,
        "totals": {
            "tensors": len(plan.tensors),
            "split_tensors": len(plan.split),
            "weights": plan.weights,
            "split_weights": plan.split_weights,
            "source_bytes": plan.bytes_read,
            "base_bytes": plan.base.size,
            "ortho_bytes": ortho.size,
            "bits_per_weight": round(bits, 4),
            "split_bits_per_weight_base": round(base_bits / plan.split_weights, 4),
            "split_bits_per_weight": round((base_bits + ortho_bits) / plan.split_weights, 4),
            "nnz": nnz,
            "moved": moved,
            "density": nnz / plan.split_weights,
            "sqnr_db_alpha_0": decibels(signal, noise),
            "sqnr_db_alpha_1": decibels(signal, noise - kept),
            "residual_kept": _share(kept, noise),
            **_saliency_figures(plan, split),
            **_reference_figures(plan, records),
        },
        "tensors": tensors,
    }


def _nbytes(specs: Iterable[TensorSpec]) -> int:
    return sum(spec.nbytes for spec in specs)


def _kept_bytes(record: TensorRecord, ortho: Layout) -> int:
    """Count the bytes that ortho holds of a tensor."""
    return sum(ortho.regions[key].nbytes for key in record.ortho)


def _sum(figures: Iterable[Figures], key: str) -> float:
    """Add up one figure of all weights; one that was not measured counts as 0."""
    return sum(getattr(one, key) or 0.0 for one in figures)


def _share(part: float, whole: float) -> float | None:
    return round(part / whole, 6) if whole > 0 else None


def _saliency_figures(plan: Plan, figures: list[Figures]) -> dict[str, Any]:
    """Sum up what the error costs by curvature, and what share of the saliency is kept."""
    measure = "curvature_noise" if plan.recipe.saliency.kind == "curvature" else "noise"
    at_0 = at_1 = None
    if plan.statistics is not None:
        at_0 = _sum(figures, "curvature_noise")
        at_1 = max(0.0, at_0 - _sum(figures, "curvature_noise_kept"))
    return {
        "curvature_error_alpha_0": at_0,
        "curvature_error_alpha_1": at_1,
        "saliency_kept": _share(_sum(figures, f"{measure}_kept"), _sum(figures, measure)),
    }


def _reference_figures(plan: Plan, records: list[TensorRecord]) -> dict[str, Any]:
    """Say what of source - reference ortho holds, and what it cannot hold: tensors not split."""
    if plan.reference is None:
        return {}
    split = [record.figures for record in records if record.figures is not None]
    other = [
        tensor
        for tensor, record in zip(plan.tensors, records, strict=True)
        if record.figures is None and record.base[tensor.name] != record.source_blake3
    ]
    delta, kept = (_sum(split, key) for key in ("delta", "delta_kept"))
    return {
        "delta_kept": _share(kept, delta),
        "unsplit_of_reference": [tensor.name for tensor in other],
        "unsplit_of_reference_weights": sum(tensor.source.numel for tensor in other),
    }


def _report_tensor(
    plan: Plan, tensor: TensorPlan, record: TensorRecord, ortho: Layout
) -> dict[str, Any]:
    numel, figures = tensor.source.numel, record.figures
    nbytes = _nbytes(tensor.base) + _kept_bytes(record, ortho)
    found: dict[str, Any] = {
        "name": tensor.name,
        "action": tensor.action,
        "reason": tensor.reason,
        "dtype": tensor.source.dtype,
        "shape": list(tensor.source.shape),
        "bits_per_weight": round(8 * nbytes / numel, 4) if numel else 0.0,
    }
    if figures is not None:
        found |= {
            "bits": tensor.bits,
            "scale": tensor.scale,
            "nnz": tensor.k,
            **({"columns": record.columns} if plan.is_compact else {}),
            "sqnr_db_alpha_0": decibels(figures.signal, figures.noise),
            "sqnr_db_alpha_1": decibels(figures.signal, figures.noise - figures.noise_kept),
            "residual_kept": _share(figures.noise_kept, figures.noise),
            **_saliency_figures(plan, [figures]),
        }
    return found | {"source_blake3": record.source_blake3, "blake3": record.digests}


def decibels(signal: float, noise: float) -> float | None:
    """10 log10(signal / noise), to 4 decimals; None where there is no noise."""
    if noise <= 0.0:
        return None
    return round(10.0 * math.log10(signal / noise), 4) if signal > 0.0 else 0.0
