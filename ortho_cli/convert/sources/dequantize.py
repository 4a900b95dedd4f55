"""Turns quantized checkpoints of others into plain ones, for `ortho convert`.

A quantized weight is several tensors: codes, scales and what else its layout needs. For each layout
of `quantized.LAYOUTS` there is one entry in `PLANS` here: a function that checks the shapes and
gives back the weight's shape and how to read rows of it. Every value is formed in float32 and
rounded once, when it is written. Codes are read row by row; only where they lie across the rows
(GPTQ, AWQ, gpt-oss) one weight's codes, or one expert's, are held.

Conventions, each multiplied unless said otherwise: DeepSeek-V3 (arXiv:2412.19437, section 3.3),
compressed-tensors 0.20 (whose global scale divides), ModelOpt (whose second scale multiplies),
the OCP microscaling formats (E2M1 codes, E8M0 scales), AutoGPTQ, AutoAWQ, MLX and bitsandbytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ortho_cli.convert.sources import dequantize_floats as floats
from ortho_cli.convert.sources import dequantize_integers as integers
from ortho_cli.convert.sources import quantized
from ortho_cli.convert.sources.base import Source, SourceTensor
from ortho_cli.convert.sources.quantized import CAST, CONFIG_KEYS, Quantization
from ortho_cli.convert.sources.quantized_parts import Held, Parts, Plan, Settings
from ortho_cli.errors import CheckpointError
from ortho_cli.model.renames import CONV1D_MODEL_TYPES
from ortho_cli.split.dtypes import BY_CONFIG
from ortho_cli.storage import strict_json

# Layouts whose weights are (out, in) also where the model itself has them (in, out).
TURNED = ("gptq", "nf4", "llm.int8")


def dequantize(source: Source) -> Source:
    """Replace the tensors of each quantized weight by the weight that they stand for.

    Raises:
        CheckpointError: something is quantized or rotated in a way that is not read, a part is
            missing, or the parts of a weight do not fit each other.
        NumericalError: while the weight is read: a scale is NaN or infinite, or a product is.
    """
    folder = source.path if source.path.is_dir() else None
    what = quantized.examine(source.tensors, source.config, folder)
    if not what:
        return source
    _refuse_unknown(source.path, what)
    _refuse_turned(source, what)
    others = {tensor.name: tensor for tensor in source.tensors}
    parts_of = {found.parts["codes"]: found for found in what.found}
    used = {name for found in what.found for name in found.parts.values()} | set(what.dropped)
    settings, dtype, held = Settings(what, source), _dtype(source.config), Held()
    tensors = []
    for tensor in source.tensors:
        if tensor.name in parts_of:
            found = parts_of[tensor.name]
            mine = {role: others[name] for role, name in found.parts.items()}
            shape, read = PLANS[found.layout](Parts(mine, source.path, held), settings)
            tensors.append(SourceTensor(name=found.name, dtype=dtype, shape=shape, read=read))
        elif tensor.name not in used:
            tensors.append(tensor)
    _check_names(source.path, tensors)
    return replace(
        source,
        tensors=tuple(tensors),
        config=None if source.config is None else _plain_config(source.config),
        own=None if source.own is None else source.own | frozenset(quantized.SIDE_FILES),
        notes=(*source.notes, *_notes(what)),
        own_dtype=dtype if any(found.layout == "packed" for found in what.found) else None,
    )


def _refuse_unknown(path: Path, what: Quantization) -> None:
    if what.unknown:
        name, why = what.unknown[0]
        more = f"; so are {len(what.unknown) - 1} others" if len(what.unknown) > 1 else ""
        raise CheckpointError(
            f"tensor `{name}` of `{path}` {why}{more}",
            hint="it cannot be dequantized; start from the unquantized model",
        )
    if what.is_rotated:
        raise CheckpointError(
            f"`{path}` has rotated weights (`transform_config` of its quantization has groups), "
            "which are not the model's without the rotations",
            hint="it cannot be dequantized; start from the unquantized model",
        )
    if what.needs_config and not what.found:
        raise CheckpointError(
            f"`{path}` is rounded while it runs ({what.sign}), so its weights alone are not the "
            "model",
            hint="start from a model that computes with its own weights",
        )


def _refuse_turned(source: Source, what: Quantization) -> None:
    kind = (source.config or {}).get("model_type")
    turned = [found for found in what.found if found.layout in TURNED]
    if turned and kind in CONV1D_MODEL_TYPES:
        raise CheckpointError(
            f"tensor `{turned[0].parts['codes']}` of `{source.path}` stands for a weight "
            f"(out, in), and a {kind} has its weights (in, out)",
            hint="it cannot be dequantized; start from the unquantized model",
        )


def _check_names(path: Path, tensors: Iterable[SourceTensor]) -> None:
    seen: set[str] = set()
    for tensor in tensors:
        if tensor.name in seen:
            raise CheckpointError(
                f"`{path}` holds `{tensor.name}` both quantized and plain",
                hint="remove one of them from the checkpoint",
            )
        seen.add(tensor.name)


def _notes(what: Quantization) -> list[str]:
    counts: dict[str, int] = {}
    for found in what.found:
        label = "cast" if found.layout == CAST else found.label
        counts[label] = counts.get(label, 0) + 1
    notes = [
        f"{count} fp8 weights have no scales anywhere, and are taken as they are"
        if label == "cast"
        else f"{count} {label} weights are dequantized"
        for label, count in counts.items()
    ]
    if not what.found:
        notes.append(
            f"the checkpoint says that it is quantized ({what.sign}), and all its tensors are "
            "plain: what says so is left out"
        )
    if what.dropped:
        notes.append(
            f"{len(what.dropped)} scales of activations are left out, as `{what.dropped[0]}`"
        )
    return notes


def _plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out, at any depth, what says that the model is quantized; fp8 is no dtype to run in."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if key in CONFIG_KEYS or quantized.is_config_entry(key, value):
            continue
        if key in ("dtype", "torch_dtype") and "float8" in str(value):
            found[key] = "bfloat16"
        else:
            found[key] = _plain_config(value) if isinstance(value, dict) else value
    return found


def _dtype(config: Mapping[str, Any] | None) -> str:
    """Name the dtype that config.json, or the first part of it, gives the model; else bfloat16."""
    for part in strict_json.levels(config):
        for key in ("dtype", "torch_dtype"):
            if (name := str(part.get(key)).removeprefix("torch.")) in BY_CONFIG:
                return BY_CONFIG[name]
    return "BF16"


PLANS: dict[str, Callable[[Parts, Settings], Plan]] = {
    "packed": integers.plan_packed,
    "fp4": floats.plan_fp4,
    "modelopt": floats.plan_fp4,
    "nf4": integers.plan_nf4,
    "llm.int8": floats.plan_llm_int8,
    "int8": floats.plan_scaled,
    "int8 fused": floats.plan_scaled,
    "gpt-oss": floats.plan_gpt_oss,
    "gptq": integers.plan_gptq,
    "mlx": integers.plan_mlx,
    "quanto": floats.plan_scaled,
    "fp8": floats.plan_scaled,
    "fp8 fused": floats.plan_scaled,
    CAST: floats.plan_cast,
}
