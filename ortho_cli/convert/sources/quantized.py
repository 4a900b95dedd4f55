"""Finds out whether a checkpoint is quantized, and which tensors make up each quantized weight.

The evidence is config.json (`quantization_config`, `compression_config` or MLX's `quantization`, at
any depth), a file beside it (`quantize_config.json`, `quant_config.json`, `hf_quant_config.json`),
and the tensors themselves, whatever the JSON says. `LAYOUTS` lists the ways to store a quantized
weight that are read; `dequantize.PLANS` has a reader for each. All other ways are recognised by
`UNSUPPORTED`, or by integers beside scales, and are refused.

Headers and JSON only; standard library only: `ortho inspect` and `--dry-run` import no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ortho_cli.errors import CheckpointError, shown
from ortho_cli.storage import hints, strict_json

if TYPE_CHECKING:  # importing the first would import torch
    from ortho_cli.convert.sources.base import SourceTensor
    from ortho_cli.storage.checkpoint import TensorInfo

    Header = SourceTensor | TensorInfo

FP8 = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
INTEGERS = ("U8", "I8", "U16", "I16", "U32", "I32")
NARROW = ("F8_E8M0", "F4", "F6_E2M3", "F6_E3M2")  # no model computes in these
CONFIG_KEYS = ("quantization_config", "compression_config")
MLX_KEY = "quantization"
MLX_EXPERTS = ("switch_mlp", "switch_glu")  # parts of names that MLX gives to joined experts
MLX_REWRITTEN = ("qwen3_next", "qwen3_5")  # model types of which MLX adds 1 to weights of norms
# Files that describe how a model was quantized, and keys of which one at least must have a value.
SIDE_FILES = {
    "quantize_config.json": ("bits", "quant_method", "checkpoint_format", "group_size"),
    "quant_config.json": ("w_bit", "bits", "q_group_size", "quant_method", "quant_algo"),
    "hf_quant_config.json": ("quant_algo",),
}
# Methods whose weights are plain, but mean something else without the entry of config.json: BitNet
# rounds them while it runs.
NEEDS_CONFIG = ("bitnet",)


@dataclass(frozen=True, slots=True)
class Layout:
    """One way to store a quantized weight as several tensors; their names share a stem."""

    label: str  # the writer, or the kind of codes
    codes: str  # the ending of the name of the tensor of codes
    dtypes: tuple[str, ...]  # of the codes
    parts: Mapping[str, tuple[str, ...]]  # role -> endings, of which one must be there
    extras: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # the same, optional
    weight: str = ".weight"  # the ending of the weight's own name


SCALE_NAMES = (
    ".weight_scale_inv", ".weight_scale", ".scale", ".scale_inv", ".scale_weight",
    ".qscale_weight",
)  # fmt: skip
FUSED_NAMES = ("_scale_inv", "_scale", ".scale")

# The first whose parts are all there is taken.
LAYOUTS: dict[str, Layout] = {
    "packed": Layout(
        "compressed-tensors' packed integers", ".weight_packed", ("I32",),
        {"scale": (".weight_scale",), "shape": (".weight_shape",)},
        extras={"zero": (".weight_zero_point",), "order": (".weight_g_idx",)},
    ),
    "fp4": Layout(
        "compressed-tensors' MXFP4 or NVFP4", ".weight_packed", ("U8",),
        {"scale": (".weight_scale",)}, extras={"divisor": (".weight_global_scale",)},
    ),
    "modelopt": Layout(
        "ModelOpt's NVFP4", ".weight", ("U8",),
        {"scale": (".weight_scale",), "factor": (".weight_scale_2",)},
    ),
    "nf4": Layout(
        "bitsandbytes' 4 bits", ".weight", ("U8",),
        {
            "scale": (".weight.absmax",),
            "values": (".weight.quant_map",),
            "state": tuple(f".weight.quant_state.bitsandbytes__{k}" for k in ("nf4", "fp4")),
        },
        extras={
            "outer": (".weight.nested_absmax",), "outer_values": (".weight.nested_quant_map",),
        },
    ),
    "llm.int8": Layout(
        "bitsandbytes' 8 bits", ".weight", ("I8",),
        {"scale": (".SCB",)}, extras={"form": (".weight_format",)},
    ),
    "int8": Layout(
        "integers of 8 bits", ".weight", ("I8",),
        {"scale": SCALE_NAMES}, extras={"zero": (".weight_zero_point",)},
    ),
    "int8 fused": Layout("integers of 8 bits", "", ("I8",), {"scale": FUSED_NAMES}, weight=""),
    "gpt-oss": Layout("gpt-oss' MXFP4", "_blocks", ("U8",), {"scale": ("_scales",)}, weight=""),
    "gptq": Layout(
        "GPTQ or AWQ", ".qweight", ("I32",),
        {"zero": (".qzeros",), "scale": (".scales",)}, extras={"order": (".g_idx",)},
    ),
    "mlx": Layout(
        "MLX", ".weight", ("U32",), {"scale": (".scales",), "bias": (".biases", ".qbiases")}
    ),
    "quanto": Layout("quanto", ".weight._data", ("I8", *FP8), {"scale": (".weight._scale",)}),
    "fp8": Layout("fp8", ".weight", FP8, {"scale": SCALE_NAMES}),
    "fp8 fused": Layout("fp8", "", FP8, {"scale": FUSED_NAMES}, weight=""),
}  # fmt: skip
CAST = "cast"  # fp8 without any scale in the whole checkpoint: codes are values

# Tensors that only quantized models have, in layouts that are not read: the ending of the name,
# dtypes (None: any), endings of tensors beside it, and the writer.
UNSUPPORTED: tuple[tuple[str, tuple[str, ...] | None, tuple[str, ...], str], ...] = (
    (".W_q", None, (), "HQQ or SINQ"),
    (".q_weight", INTEGERS, (), "EXL2"),
    (".trellis", INTEGERS, (), "EXL3"),
    (".codes", (*INTEGERS, "I64"), (".codebooks",), "AQLM"),
    (".indices", (*INTEGERS, "I64"), (".centroids.weight",), "VPTQ"),
    (".dense_weights", (*INTEGERS, "I64"), (), "SpQR"),
    (".Qidxs", (*INTEGERS, "I64"), (), "QuIP#"),
    (".dqweight", None, (), "FP-Quant"),
    (".qweight", None, (), "a layout like GPTQ's"),
    (".compressed", None, (".bitmask",), "sparse compressed-tensors"),
    (".B", ("I32",), (".s",), "Marlin"),
    (".blocks", ("U8",), (".scales",), "MXFP4 by the names of gpt-oss' own code"),
    (".embedding_quantized", INTEGERS, (".embedding_scale",), "Gemma's quantized embeddings"),
    (".weight_qdata", None, (), "torchao"),
    ("._weight_qdata", None, (), "torchao"),
    (".weight._data", None, (), "quanto"),
)
_ENDINGS = tuple(sign[0] for sign in UNSUPPORTED)  # one test for each of perhaps 200,000 names
# Last parts of names that only quantized weights have, of a known layout or another.
LEFT_OVER = frozenset({
    "weight_packed", "weight_scale", "weight_scale_inv", "weight_scale_2", "weight_scales",
    "weight_zero_point", "weight_global_scale", "weight_g_idx", "qzeros", "SCB", "absmax",
    "nested_absmax", "quant_map", "pre_quant_scale", "qscale_weight", "scale_weight",
})  # fmt: skip
# Scales of activations and of the cache: no weight depends on them.
ACTIVATIONS = frozenset({
    "input_scale", "input_scale_ub", "input_global_scale", "input_zero_point", "output_scale",
    "output_zero_point", "input_activation_scale", "output_activation_scale", "activation_scale",
    "act_scale", "scale_input", "scale_output", "qscale_act", "input_amax", "output_amax",
})  # fmt: skip
CACHE = frozenset({
    "k_scale", "v_scale", "q_scale", "kv_scale", "prob_scale", "k_cache_scale", "v_cache_scale",
    "k_zero_point", "v_zero_point",
})  # fmt: skip
_FUSED_ACTIVATIONS = tuple(f"_{part}" for part in sorted(ACTIVATIONS))
MARKERS = frozenset({"scaled_fp8", "comfy_quant", "qscale_act"})
# Endings of scales beside a tensor of integers, after its name or its module's.
BESIDE = ("_scale", "_scales", "._scale", ".absmax", "_scale_inv")
BESIDE_MODULE = (*SCALE_NAMES, ".weight_scales", ".scales", ".SCB", ".absmax", ".weight_scale_2")
SCALE_WORDS = ("scal", "amax")  # in the last part of a name: it may be a scale


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedWeight:
    """A weight that several tensors stand for."""

    layout: str  # a key of LAYOUTS, or CAST
    name: str  # of the weight
    parts: Mapping[str, str]  # role -> name of the tensor; the role `codes` is always there

    @property
    def label(self) -> str:
        """The label of its layout."""
        return "fp8" if self.layout == CAST else LAYOUTS[self.layout].label


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """All that is known of how a checkpoint is quantized; false where it is not."""

    weights: tuple[QuantizedWeight, ...]
    dropped: tuple[str, ...]  # names of scales of activations and of the cache
    unsupported: tuple[tuple[str, str], ...]  # tensors of layouts that are not read, and why
    declared: tuple[str, ...]  # the statements of JSON files, each as part of a sentence
    settings: Mapping[str, object]  # keys and values of these JSON files

    def __bool__(self) -> bool:
        """Tell whether the checkpoint is quantized, by its tensors or its JSON."""
        return bool(self.weights or self.unsupported or self.declared)

    @property
    def method(self) -> str | None:
        """The name of the method in the JSON."""
        return _method(self.settings)

    @property
    def needs_config(self) -> bool:
        """Whether plain weights mean something else without the entry of config.json."""
        return self.method in NEEDS_CONFIG

    @property
    def is_rotated(self) -> bool:
        """Whether the weights are rotated, as by the transforms of compressed-tensors."""
        said = self.settings.get("transform_config")
        return bool(said.get("config_groups") if isinstance(said, dict) else said)

    @property
    def can_convert(self) -> bool:
        """Whether `ortho convert` gives the plain model."""
        return not (self.unsupported or self.needs_config or self.is_rotated)

    @property
    def evidence(self) -> str:
        """The first statement or tensor that shows it."""
        if self.declared:
            return self.declared[0]
        if self.weights:
            weight = self.weights[0]
            return f"tensor `{weight.parts['codes']}` holds codes of {weight.label}"
        name, what = self.unsupported[0]
        return f"tensor `{name}` {what}"

    def refusal(self, path: Path) -> CheckpointError:
        """Make the error of a command that takes no quantized checkpoint."""
        hint = f"`ortho convert {hints.said(path)}` dequantizes it"
        if not self.can_convert:
            hint = "decompose the unquantized model"
        return CheckpointError(f"`{path}` is quantized already ({self.evidence})", hint=hint)


def examine(
    tensors: Iterable[Header], config: Mapping[str, object] | None, folder: Path | None
) -> Quantization:
    """Find the quantized weights of a checkpoint.

    Args:
        tensors: headers of all tensors.
        config: config.json, if there is one.
        folder: the folder in which SIDE_FILES are looked for; None for a file alone.
    """
    entries = list(_config_entries(config or {}))
    declared = [
        f"`{key}` says {shown(_method(value))}" if _method(value) else f"config.json has `{key}`"
        for key, value in entries
    ]
    settings: dict[str, object] = {}
    for name, said in _side_files(folder) if folder is not None else ():
        declared.append(f"`{name}` is beside the weights")
        settings |= said
    for _, value in reversed(entries):  # of several, the first and outermost counts
        settings |= value
    named = {tensor.name: tensor for tensor in tensors}
    found = _Examination(named, _cache_heads(config)).run(tuple(declared), settings)
    rewritten = _rewritten(found, named, config)
    return replace(found, unsupported=(*found.unsupported, rewritten)) if rewritten else found


def _rewritten(
    found: Quantization, tensors: Mapping[str, Header], config: Mapping[str, object] | None
) -> tuple[str, str] | None:
    """Find a tensor that MLX changed in ways that dequantizing does not undo; say why."""
    codes = next((w.parts["codes"] for w in found.weights if w.layout == "mlx"), None)
    if codes is None:
        return None
    for name, tensor in tensors.items():
        if any(part in name for part in MLX_EXPERTS):
            return name, "holds experts as MLX joins them, which the original model keeps apart"
        module = name.removesuffix(".weight").rpartition(".")[2]
        is_conv = name.endswith(".weight") and module.startswith("conv")
        if is_conv and len(tensor.shape) == 3 and tensor.shape[-1] == 1:
            return name, "has its axes in MLX's order, and not in the original model's"
    for part in strict_json.levels(config):
        if (kind := str(part.get("model_type"))).startswith(MLX_REWRITTEN):
            return codes, f"is of a {kind}, whose other weights MLX changes as well"
    return None


def _cache_heads(config: Mapping[str, object] | None) -> frozenset[int]:
    """Collect the numbers of heads of the cache, of config.json and of each part of it."""
    parts = list(strict_json.levels(config))
    found = [part.get("num_key_value_heads") or part.get("num_attention_heads") for part in parts]
    return frozenset(heads for heads in found if type(heads) is int)


def _config_entries(
    config: Mapping[str, object], where: str = ""
) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield each entry of config.json on quantization, with its dotted key."""
    for key, value in config.items():
        if is_config_entry(key, value):
            said = value if isinstance(value, dict) else {"quant_method": str(value)}
            yield f"{where}{key}", said
        elif isinstance(value, dict):
            yield from _config_entries(value, f"{where}{key}.")


def is_config_entry(key: str, value: object) -> bool:
    """Tell whether an entry of config.json, at any depth, describes a quantization."""
    if key in CONFIG_KEYS:
        return bool(value) and not _is_off(value)  # transformers takes any value
    if key != MLX_KEY or not isinstance(value, dict):
        return False
    if "quant_algo" in value:  # TensorRT-LLM writes the entry, with null, for plain models, too
        return bool(value["quant_algo"])
    return not {"bits", "group_size", "quant_method"}.isdisjoint(value)


def _is_off(value: object) -> bool:
    """Tell whether transformers ignores an entry: bitsandbytes with neither of its kinds."""
    if not isinstance(value, dict) or value.get("quant_method") != "bitsandbytes":
        return False
    return not (value.get("load_in_4bit") or value.get("load_in_8bit"))


def _method(value: Mapping[str, object]) -> str | None:
    found = value.get("quant_method") or value.get("format") or value.get("quant_algo")
    return found if isinstance(found, str) else None


def _side_files(folder: Path) -> Iterator[tuple[str, Mapping[str, object]]]:
    for name, keys in SIDE_FILES.items():
        if (folder / name).is_file():
            parts = strict_json.levels(strict_json.read(folder / name, constants=True))
            said = next((part for part in parts if any(part.get(key) for key in keys)), None)
            if said is not None:
                yield name, said


class _Examination:
    """Sorts all tensors: part of a quantized weight, droppable, unsupported, or plain."""

    def __init__(self, tensors: dict[str, Header], cache_heads: frozenset[int]) -> None:
        self._tensors, self._cache_heads = tensors, cache_heads
        self._weights: list[QuantizedWeight] = []
        self._claimed: set[str] = set()
        self._scales = _index_scales(tensors)

    def run(self, declared: tuple[str, ...], settings: Mapping[str, object]) -> Quantization:
        unscaled = []
        for tensor in self._tensors.values():
            if tensor.dtype in INTEGERS or tensor.dtype in FP8:
                self._match(tensor)
        dropped, unsupported = [], []
        modules = {weight.name.removesuffix(".weight") for weight in self._weights}
        is_quantized = bool(self._weights or declared)
        for name, tensor in self._tensors.items():
            if name in self._claimed:
                continue
            if is_quantized and _is_activation(tensor, modules, self._cache_heads):
                dropped.append(name)
            elif what := self._suspicion(tensor):
                unsupported.append((name, what))
            elif tensor.dtype in FP8 and (other := self._other_scale(name)):
                unsupported.append((name, f"is {tensor.dtype} and is beside `{other}`"))
            elif tensor.dtype in FP8:
                unscaled.append(tensor)
        if unscaled and (is_quantized or unsupported):
            unsupported += [(tensor.name, _lacks_scale(tensor)) for tensor in unscaled]
        else:
            self._weights += [
                QuantizedWeight(layout=CAST, name=tensor.name, parts={"codes": tensor.name})
                for tensor in unscaled
            ]
        return Quantization(
            weights=tuple(self._weights),
            dropped=tuple(dropped),
            unsupported=tuple(unsupported),
            declared=declared,
            settings=settings,
        )

    def _match(self, tensor: Header) -> None:
        for key, layout in LAYOUTS.items():
            if tensor.dtype not in layout.dtypes or not tensor.name.endswith(layout.codes):
                continue
            stem = tensor.name.removesuffix(layout.codes)
            parts = {role: self._first(stem, names) for role, names in layout.parts.items()}
            if not stem or None in parts.values():
                continue
            parts |= {role: self._first(stem, names) for role, names in layout.extras.items()}
            named = {"codes": tensor.name} | {k: v for k, v in parts.items() if v is not None}
            weight = QuantizedWeight(layout=key, name=stem + layout.weight, parts=named)
            self._weights.append(weight)
            self._claimed |= set(named.values())
            return

    def _first(self, stem: str, names: Sequence[str]) -> str | None:
        return next((stem + name for name in names if stem + name in self._tensors), None)

    def _other_scale(self, name: str) -> str | None:
        """Find a tensor that looks like the scale of a weight, though no layout names it so."""
        return self._scales.get(name) or self._scales.get(f"{name.removesuffix('.weight')}.")

    def _suspicion(self, tensor: Header) -> str | None:
        """Say why a tensor of no known layout must be part of a quantized weight, if it must."""
        name, dtype = tensor.name, tensor.dtype
        for ending, dtypes, beside, label in UNSUPPORTED if name.endswith(_ENDINGS) else ():
            if name.endswith(ending) and (dtypes is None or dtype in dtypes):
                stem = name.removesuffix(ending)
                if all(stem + other in self._tensors for other in beside):
                    return f"is part of a weight as {label} stores it"
        if name.rpartition(".")[2] in LEFT_OVER or ".quant_state." in name:
            return "is part of a quantized weight of which the rest is missing or unknown"
        if dtype in NARROW:
            return f"is {dtype}, in which no model computes"
        if dtype in INTEGERS and len(tensor.shape) > 1:
            module = name.removesuffix(".weight")
            others = [name + end for end in BESIDE] + [module + end for end in BESIDE_MODULE]
            other = next((o for o in others if o != name and o in self._tensors), None)
            if other is None and name.endswith(".weight"):
                other = self._other_scale(name)
            return f"is {dtype} and is beside `{other}`" if other else None
        return None


def _index_scales(tensors: Iterable[str]) -> dict[str, str]:
    """Map each module (with a dot at its end) and each parameter to a tensor named as a scale."""
    found: dict[str, str] = {}
    for name in tensors:
        module, _, last = name.rpartition(".")
        if module and any(word in last.lower() for word in SCALE_WORDS):
            found.setdefault(f"{module}.", name)
            found.setdefault(module, name)
            for place in (i for i, letter in enumerate(last) if letter == "_" and i):
                found.setdefault(f"{module}.{last[:place]}", name)
    return found


def _is_activation(tensor: Header, modules: set[str], cache_heads: frozenset[int]) -> bool:
    name = tensor.name
    module, _, last = name.rpartition(".")
    if last in CACHE:  # models learn scales of these names, too: one per element of a head
        return math.prod(tensor.shape) in {1, *cache_heads}
    if last in MARKERS:
        return True
    if last in ACTIVATIONS:
        return module in modules
    # A fused weight has no module of its own: `experts.down_proj_input_scale`.
    return name.endswith(_FUSED_ACTIVATIONS) and any(
        name.removesuffix(part) in modules for part in _FUSED_ACTIVATIONS
    )


def _lacks_scale(tensor: Header) -> str:
    names = SCALE_NAMES if tensor.name.endswith(".weight") else FUSED_NAMES
    stem = tensor.name.removesuffix(".weight") if names is SCALE_NAMES else tensor.name
    return f"is {tensor.dtype} and has no `{stem}{names[0]}` or other scale"
