"""What a finished decomposition says of itself: report.json, and config.json for other tools.

    sqnr_db_alpha_0 = 10 log10(signal / noise)                 base alone
    sqnr_db_alpha_1 = 10 log10(signal / (noise - noise_kept))  base and ortho
    residual_kept   = noise_kept / noise

signal is the sum of W^2, noise that of (W - base)^2, and noise_kept the part of noise at the
positions that ortho holds. The same ratio for what selects is saliency_kept; curvature_error is the
sum of (W - base)^2 times curvature. With int8 values, figures at alpha 1 include their rounding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib import metadata
from typing import Any

from ortho_cli.decompose.plan import CopyTensor, Plan, SplitTensor, TensorPlan
from ortho_cli.decompose.record import TensorRecord
from ortho_cli.decompose.roles import is_embedding
from ortho_cli.decompose.selection import stacked_experts
from ortho_cli.formats import artifact
from ortho_cli.formats.artifact import module_of
from ortho_cli.formats.quantization_config import quantization_config
from ortho_cli.model.renames import rename_modules
from ortho_cli.split.task import Figures
from ortho_cli.storage.data_file import Layout
from ortho_cli.storage.tied import tied_head
from ortho_cli.version import __version__

Written = list[tuple[TensorPlan, TensorRecord]]


def make_config(plan: Plan, config: Mapping[str, object]) -> dict[str, object]:
    """Add `quantization_config` to the source's config.json."""
    split = {module_of(tensor.name): tensor.bits for tensor in plan.split}
    unsplit: set[str] = set()
    others: set[str] = set()
    for tensor in plan.tensors:
        if isinstance(tensor, SplitTensor):
            continue
        module = module_of(tensor.name)
        stacked = stacked_experts(tensor.source, tensor.reason)
        if stacked is not None:
            # The name that vLLM looks up, whatever its own is.
            unsplit.add(f"{stacked}.0.gate_proj")
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
        split=split, unsplit=sorted(unsplit), group_size=plan.group_size, others=sorted(others)
    )
    return {**config, "quantization_config": settings}


def make_report(
    plan: Plan,
    records: Sequence[TensorRecord],
    *,
    ortho: Layout,
    moved: int,
    source_digest: str,
    base_blake3: str,
    ortho_blake3: str,
    sealed_blake3: str | None,
    device: str,
) -> dict[str, object]:
    """Make report.json but for `side_files`; the same for the same input, without times and paths.

    Only `sealed_blake3` is another in each run: age draws fresh keys.

    Args:
        plan: what was carried out.
        records: of its tensors, in its order.
        ortho: where ortho's tensors are, as they were written.
        moved: codes that forgetting moved: where they are is not told.
        source_digest: of the source's tensors.
        base_blake3: of base.
        ortho_blake3: of ortho, unsealed.
        sealed_blake3: of the sealed file, if there is one.
        device: cpu or cuda, which split.
    """
    written = list(zip(plan.tensors, records, strict=True))
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
        "totals": _totals(plan, written, ortho, moved),
        "tensors": [_tensor(plan, tensor, record, ortho) for tensor, record in written],
    }


def _totals(plan: Plan, written: Written, ortho: Layout, moved: int) -> dict[str, object]:
    """Tell sizes in bytes, and figures of the whole model."""
    nnz, weights = sum(tensor.k for tensor in plan.split), plan.split_weights
    base_bits = 8 * sum(spec.nbytes for tensor in plan.split for spec in tensor.base)
    ortho_bits = 8 * sum(_ortho_bytes(record, ortho) for _, record in written)
    figures = _add_up([record.figures for _, record in written if record.figures])
    return {
        "tensors": len(plan.tensors),
        "split_tensors": len(plan.split),
        "weights": plan.weights,
        "split_weights": weights,
        "source_bytes": plan.bytes_read,
        "base_bytes": plan.base.size,
        "ortho_bytes": ortho.size,
        "bits_per_weight": round(8 * (plan.base.size + ortho.size) / plan.weights, 4),
        # Of split tensors, without headers.
        "split_bits_per_weight_base": round(base_bits / weights, 4),
        "split_bits_per_weight": round((base_bits + ortho_bits) / weights, 4),
        "nnz": nnz,
        "moved": moved,
        "density": nnz / weights,
        **_quality(plan, figures),
        **(_of_reference(written, figures) if plan.reference else {}),
    }


def _tensor(
    plan: Plan, tensor: TensorPlan, record: TensorRecord, ortho: Layout
) -> dict[str, object]:
    """Tell what became of one source tensor."""
    numel, split = tensor.source.numel, isinstance(tensor, SplitTensor)
    nbytes = sum(spec.nbytes for spec in tensor.base) + _ortho_bytes(record, ortho)
    found: dict[str, object] = {
        "name": tensor.name,
        "action": "split" if split else "copy",
        "reason": tensor.reason if isinstance(tensor, CopyTensor) else None,
        "dtype": tensor.source.dtype,
        "shape": list(tensor.source.shape),
        "bits_per_weight": round(8 * nbytes / numel, 4) if numel else 0.0,  # without headers
    }
    if isinstance(tensor, SplitTensor) and record.figures is not None:
        found |= {"bits": tensor.bits, "scale": tensor.scale, "nnz": tensor.k}
        whole = tensor.columns if record.columns is None else record.columns
        found |= {} if whole is None else {"columns": whole}
        found |= _quality(plan, record.figures)
    return found | {"source_blake3": record.source_blake3, "blake3": record.digests}


def _ortho_bytes(record: TensorRecord, ortho: Layout) -> int:
    """Count the bytes that ortho holds of a tensor."""
    return sum(ortho.regions[key].nbytes for key in record.ortho)


def _add_up(figures: Sequence[Figures]) -> Figures:
    """Add the figures of weights; one that a weight lacks is absent from the sum."""

    def total(name: str) -> Any:
        values = [getattr(one, name) for one in figures]
        return None if None in values else sum(values)

    return Figures(**{one.name: total(one.name) for one in fields(Figures)})


def _quality(plan: Plan, of: Figures) -> dict[str, float | None]:
    error, kept = of.curvature_noise, of.curvature_noise_kept
    at_0 = at_1 = None
    if plan.statistics is not None and error is not None and kept is not None:
        at_0, at_1 = error, max(0.0, error - kept)
    by_curvature = plan.recipe.saliency.kind == "curvature"
    return {
        "sqnr_db_alpha_0": decibels(of.signal, of.noise),
        "sqnr_db_alpha_1": decibels(of.signal, of.noise - of.noise_kept),
        "residual_kept": _share(of.noise_kept, of.noise),
        "curvature_error_alpha_0": at_0,
        "curvature_error_alpha_1": at_1,
        "saliency_kept": _share(kept, error) if by_curvature else _share(of.noise_kept, of.noise),
    }


def _share(part: float | None, whole: float | None) -> float | None:
    return round(part / whole, 6) if part is not None and whole else None


def _of_reference(written: Written, figures: Figures) -> dict[str, object]:
    """Tell how much of source - reference ortho holds, and which tensors it cannot hold it of."""
    other = [
        tensor
        for tensor, record in written
        if isinstance(tensor, CopyTensor) and record.base[tensor.name] != record.source_blake3
    ]
    return {
        "delta_kept": _share(figures.delta_kept, figures.delta),
        "unsplit_of_reference": [tensor.name for tensor in other],
        "unsplit_of_reference_weights": sum(tensor.source.numel for tensor in other),
    }


def decibels(signal: float, noise: float) -> float | None:
    """10 log10(signal / noise), to 4 decimals; None where there is no noise."""
    if noise <= 0.0:
        return None
    return round(10.0 * math.log10(signal / noise), 4) if signal > 0.0 else 0.0
