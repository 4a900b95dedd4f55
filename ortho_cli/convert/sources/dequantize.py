"""Turns quantized checkpoints of others into plain ones, for `ortho convert`.

A quantized weight is several tensors: codes, scales and others that its layout needs. For each
layout of `quantized.LAYOUTS` there is one entry in `PLANS` here: a function that checks the shapes
and returns the weight's shape and a function that reads rows of it. Every value is computed in
float32 and rounded once, when it is written. Codes are read row by row; only where a row of the
weight is a column of codes (GPTQ, AWQ, gpt-oss) one weight's codes, or one expert's, are held.

Scales multiply unless said otherwise. Sources: DeepSeek-V3 (arXiv:2412.19437, section 3.3),
compressed-tensors 0.20 (whose global scale divides), ModelOpt (whose second scale multiplies),
the OCP microscaling formats (E2M1 codes, E8M0 scales), AutoGPTQ, AutoAWQ, MLX and bitsandbytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace

from ortho_cli.convert.sources import dequantize_floats as floats
from ortho_cli.convert.sources import dequantize_integers as integers
from ortho_cli.convert.sources import quantized
from ortho_cli.convert.sources.base import Source, SourceTensor
from ortho_cli.convert.sources.quantized import CAST, CONFIG_KEYS, Quantization
from ortho_cli.convert.sources.quantized_parts import UNQUANTIZED, Held, Parts, Plan, Settings
from ortho_cli.errors import CheckpointError
from ortho_cli.model.renames import CONV1D_MODEL_TYPES
from ortho_cli.split.dtypes import BY_CONFIG
from ortho_cli.storage import strict_json

# Layouts that always store (out, in), also where the model itself has (in, out).
TURNED = ("gptq", "nf4", "llm.int8")


def dequantize(source: Source) -> Source:
    """Replace the tensors of each quantized weight by the weight that they stand for.

    Reading a weight later raises NumericalError where a scale or a product is NaN or infinite.

    Raises:
        CheckpointError: weights are quantized or rotated in a way that is not read, a part is
            missing, or the parts of a weight do not fit each other.
    """
    folder = source.path if source.path.is_dir() else None
    found = quantized.examine(source.tensors, source.config, folder)
    if not found:
        return source
    _refuse_unsupported(source, found)
    by_name = {tensor.name: tensor for tensor in source.tensors}
    by_codes = {weight.parts["codes"]: weight for weight in found.weights}
    used = {name for weight in found.weights for name in weight.parts.values()}
    used |= set(found.dropped)
    settings, dtype, held = Settings(found, source), _dtype(source.config), Held()
    tensors = []
    for tensor in source.tensors:
        if tensor.name in by_codes:
            weight = by_codes[tensor.name]
            mine = {role: by_name[name] for role, name in weight.parts.items()}
            shape, read = PLANS[weight.layout](Parts(mine, source.path, held), settings)
            tensors.append(SourceTensor(name=weight.name, dtype=dtype, shape=shape, read=read))
        elif tensor.name not in used:
            tensors.append(tensor)
    twice = [name for name, n in Counter(tensor.name for tensor in tensors).items() if n > 1]
    if twice:
        raise CheckpointError(
            f"`{source.path}` holds `{twice[0]}` both quantized and plain",
            hint="remove one of them from the checkpoint",
        )
    return replace(
        source,
        tensors=tuple(tensors),
        config=None if source.config is None else _plain_config(source.config),
        own=None if source.own is None else source.own | frozenset(quantized.SIDE_FILES),
        notes=(*source.notes, *_notes(found)),
        own_dtype=dtype if any(w.layout == "packed" for w in found.weights) else None,
    )


def _refuse_unsupported(source: Source, found: Quantization) -> None:
    path, hint = source.path, UNQUANTIZED
    kind = (source.config or {}).get("model_type")
    turned = [weight for weight in found.weights if weight.layout in TURNED]
    if found.unsupported:
        (name, why), others = found.unsupported[0], len(found.unsupported) - 1
        more = f"; so are {others} others" if others else ""
        what = f"tensor `{name}` of `{path}` {why}{more}"
    elif found.is_rotated:
        what = (
            f"`{path}` has rotated weights (`transform_config` of its quantization has groups), "
            "which are not the model's without the rotations"
        )
    elif found.needs_config and not found.weights:
        what = (
            f"`{path}` is rounded while it runs ({found.evidence}), so its weights alone are not "
            "the model"
        )
        hint = "start from a model that computes with its own weights"
    elif turned and kind in CONV1D_MODEL_TYPES:
        what = (
            f"tensor `{turned[0].parts['codes']}` of `{path}` stands for a weight (out, in), and a "
            f"{kind} has its weights (in, out)"
        )
    else:
        return
    raise CheckpointError(what, hint=hint)


def _notes(found: Quantization) -> list[str]:
    counts = Counter(CAST if w.layout == CAST else w.label for w in found.weights)
    notes = [
        f"{count} fp8 weights have no scales anywhere, and their codes are their values"
        if label == CAST
        else f"{count} {label} weights are dequantized"
        for label, count in counts.items()
    ]
    if not found.weights:
        notes.append(
            f"the checkpoint says that it is quantized ({found.evidence}), and all its tensors are "
            "plain: that statement is left out"
        )
    if found.dropped:
        notes.append(
            f"{len(found.dropped)} scales of activations are left out, as `{found.dropped[0]}`"
        )
    return notes


def _plain_config(config: Mapping[str, object]) -> dict[str, object]:
    """Leave out the entries on quantization, at any depth; no model computes in fp8."""
    found: dict[str, object] = {}
    for key, value in config.items():
        if key in CONFIG_KEYS or quantized.is_config_entry(key, value):
            continue
        if key in ("dtype", "torch_dtype") and "float8" in str(value):
            found[key] = "bfloat16"
        else:
            found[key] = _plain_config(value) if isinstance(value, dict) else value
    return found


def _dtype(config: Mapping[str, object] | None) -> str:
    """Read the dtype of config.json, or of the first part of it that has one; else bfloat16."""
    for part in strict_json.levels(config):
        for key in ("dtype", "torch_dtype"):
            if (name := str(part.get(key)).removeprefix("torch.")) in BY_CONFIG:
                return BY_CONFIG[name]
    return "BF16"


PLANS: dict[str, Callable[[Parts, Settings], Plan]] = {
    **dict.fromkeys(("int8", "int8 fused", "quanto", "fp8", "fp8 fused"), floats.plan_scaled),
    **dict.fromkeys(("fp4", "modelopt"), floats.plan_fp4),
    "packed": integers.plan_packed,
    "nf4": integers.plan_nf4,
    "llm.int8": floats.plan_llm_int8,
    "gpt-oss": floats.plan_gpt_oss,
    "gptq": integers.plan_gptq,
    "mlx": integers.plan_mlx,
    CAST: floats.plan_cast,
}
