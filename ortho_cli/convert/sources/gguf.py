"""A GGUF file as a source: names, config and tokenizer as transformers reads them.

transformers maps a GGUF file to a model, but loads it whole and then refuses to save it. Here its
name map is used, and its processors that undo llama.cpp's layouts, with one tensor in memory at a
time. Needs the packages `gguf` and `transformers`, which `ortho` does not depend on.
"""

from __future__ import annotations

import contextlib
import copy
import json
import re
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ortho_cli.convert.sources import gguf_config, gguf_file, gguf_rope
from ortho_cli.convert.sources.base import Format, Opener, Source, SourceTensor, mark
from ortho_cli.convert.sources.gguf_file import ORIGINAL, GgufModel, GgufTensor
from ortho_cli.errors import CheckpointError, OrthoError, UsageError
from ortho_cli.formats.artifact import pretty_json
from ortho_cli.model.load import check_parts, quiet_transformers

if TYPE_CHECKING:  # an optional package, imported where it is used
    import transformers

Floats = npt.NDArray[np.float32]

# Keys by which transformers names the place that a tokenizer was read from.
PLACE_KEYS = ("is_local", "local_files_only", "name_or_path", "gguf_file")
# Tensors that llama.cpp itself ignores: angles, which older converters kept.
UNUSED = re.compile(r"(blk\.\d+\.)?(attn_rot_embd|rope_freqs)(\.weight|\.inv_freq)?")
# GGUF merges experts; checkpoints of these architectures name each one, which all tools read.
_EXPERTS = re.compile(r"blk\.(?P<layer>\d+)\.ffn_(?P<part>gate|up|down)_exps\.weight")
_EXPERT = "model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"
_FUSED = "model.layers.{layer}.mlp.experts.{part}_proj"
MERGED = ("qwen2_moe", "qwen3_moe")
MERGED_HINT = "merged experts cannot be converted; start from the original checkpoint"
# Architectures that transformers maps in part only.
LOST = {"gemma4": "kinds of layers"}
LOST |= dict.fromkeys(("gpt-oss", "gpt_oss", "minimax-m2"), "experts")
# Architectures of which GGUF holds some values in another form, and how it is undone.
_LESS_1 = "norm weights are those of the file less 1"
REMADE = {
    **dict.fromkeys(("gemma2", "gemma3", "nemotron"), _LESS_1),
    "mamba": "A_log is the logarithm of what the file holds, rounded to float32",
}
NOT_WRITTEN = ("quantization_config", "_name_or_path", "_model_name_or_path")  # to config.json
CLOSE = 1e-4  # relative, of angles: transformers computes them in float32

# A TensorProcessor of transformers, which has no types: it undoes llama.cpp's layouts.
Processor = Any


@dataclass(frozen=True, slots=True, kw_only=True)
class _Mapped:
    """A GGUF file as transformers maps it to a model."""

    config: gguf_config.Config
    model: torch.nn.Module  # on the meta device
    processor: Processor
    names: dict[str, str]  # of GGUF -> of the model


def open_gguf(path: Path) -> Source:
    """Describe a GGUF file as a checkpoint of transformers, in float32.

    Args:
        path: a file, or any part of a split model.
    Raises:
        UsageError: a package that reads GGUF is not installed.
        CheckpointError: the file is damaged, its architecture is unknown, parts or tensors are
            missing or merged in ways that need the whole model, or it says something of the model
            that its config cannot.
    """
    try:
        import gguf  # noqa: F401 - both are imported to name the one that is missing
        import transformers  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"`{path}` is a GGUF file, and the package `{error.name}` that reads it is missing",
            hint="pip install gguf transformers",
        ) from None
    files = tuple(mark(part) for part in gguf_file.find_parts(path))
    with quiet_transformers(), _one_sentence(path):
        model = gguf_file.open_model(path)
        notes = gguf_config.check_foreign(model)
        mapped = _map(model)
        tokenizer, said = _tokenizer(model)
        tensors = list(_describe(model, mapped))
        aliases = _aliases(model, mapped, {tensor.name for tensor in tensors})
    beside = gguf_file.files_beside(model.path)
    notes += [f"`{name}` beside it is no part of the model, and left out" for name in beside]
    notes += [*said, *filter(None, [REMADE.get(model.architecture)])]
    notes.append("weights are dequantized to float32, which is exact; --dtype rounds them")
    return Source(
        kind="gguf",
        path=path,
        tensors=tuple(tensors),
        files=files,
        config=mapped.config,
        made_files=tuple(tokenizer),
        notes=tuple(notes),
        aliases=aliases,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """Where a tensor of a GGUF file is in the checkpoint that is read from it."""

    name: str  # of the parameter
    rows: npt.NDArray[np.int64] | None  # (out,): the file's row for each of its rows; None: its own


def read_places(path: Path) -> tuple[dict[str, object], dict[str, Placed]]:
    """Read names, config and row orders of a GGUF file, and no weight.

    Args:
        path: of the file, whose weights need not be written yet.
    Returns:
        config.json, and for each tensor of the file, by its name there, where it goes.
    Raises:
        CheckpointError: what `open_gguf` raises; or a tensor is no parameter with its rows in
            another order.
    """
    with quiet_transformers(), _one_sentence(path):
        model = gguf_file.open_model(path)
        mapped = _map(model)
        described = {tensor.name for tensor in _describe(model, mapped)}
        _aliases(model, mapped, described)
        places = {
            tensor.name: _place(tensor, mapped)
            for tensor in model.tensors
            if tensor.name not in gguf_rope.TENSORS
        }
    return mapped.config, places


def _place(tensor: GgufTensor, mapped: _Mapped) -> Placed:
    """Find the order of rows by undoing llama.cpp's layout of their numbers."""
    target, count = mapped.names[tensor.name], tensor.shape[0]
    numbers = np.arange(count, dtype=np.float32).reshape(-1, *(1 for _ in tensor.shape[1:]))
    found = _process(tensor, mapped.processor, target, numbers).reshape(-1).astype(np.int64)
    if not np.array_equal(np.sort(found), np.arange(count)):
        raise tensor.refusal(f"holds other values than `{target}`, which are not written")
    return Placed(name=target, rows=None if np.all(np.diff(found) == 1) else found)


@contextlib.contextmanager
def _one_sentence(path: Path) -> Iterator[None]:
    """Turn any other exception that a damaged file causes into an error of one sentence."""
    try:
        yield
    except OrthoError:
        raise
    except Exception as error:  # noqa: BLE001 - the packages that read it may raise anything
        hint = "is the file whole, and its architecture known to transformers?"
        raise gguf_file.unread(path, gguf_file.first_line(error), hint=hint) from None


def _map(model: GgufModel) -> _Mapped:
    """Make config, a model without weights, its processor, and the map of names."""
    import transformers
    from transformers import modeling_gguf_pytorch_utils

    # Any: these are typed in some versions of transformers, and not in others.
    auto: Any = transformers
    mapping: Any = modeling_gguf_pytorch_utils
    _check_architecture(model, mapping.GGUF_SUPPORTED_ARCHITECTURES)
    loaded = mapping.load_gguf_checkpoint(str(model.path), return_tensors=False)
    parsed: gguf_config.Config = loaded["config"]
    layers = len(model.tensors)
    check_parts(parsed, layers=layers, told=model.path)
    kind = str(parsed["model_type"])
    causal = auto.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if kind not in auto.CONFIG_MAPPING or kind not in causal:
        raise model.refusal(
            f"is of architecture {model.architecture}, and transformers has no causal language "
            "model of it"
        )
    made = auto.CONFIG_MAPPING[kind]
    parsed = gguf_config.complete(model, parsed, made())
    check_parts(parsed, layers=layers, told=model.path)
    rope = None
    if hasattr(made(), "rope_parameters"):
        most = int(gguf_file.read_number(model.path, parsed, "max_position_embeddings", 0))
        width = gguf_config.head_width(parsed)
        rope = gguf_rope.read_rope(model, head_dim=width, context=most or 2048)
        gguf_config.carry_rope(model, rope, parsed)
    # The model is built of the config that is written, so that the checks are of that one.
    differing = made.from_dict(dict(parsed)).to_diff_dict().items()
    written = gguf_config.add_old_keys({k: v for k, v in differing if k not in NOT_WRITTEN})
    config = made.from_dict(copy.deepcopy(written))
    default = {"num_hidden_layers": config.get_text_config().num_hidden_layers}
    check_parts(default, layers=layers, told=model.path)  # the header may say nothing of them
    with torch.device("meta"):
        built = auto.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    built.tie_weights()
    _check_rope(model, built, config, rope)
    maker = mapping.TENSOR_PROCESSORS.get(model.architecture, mapping.TensorProcessor)
    processor: Processor = maker(config=parsed)
    return _Mapped(
        config=written | {"architectures": [type(built).__name__], "dtype": "float32"},
        model=built,
        processor=processor,
        names=_names(model, built, processor),
    )


def _check_architecture(model: GgufModel, known: Collection[str]) -> None:
    """Refuse an architecture that transformers cannot build, or builds without a part of it."""
    name = model.architecture
    if name in LOST:
        why = f"whose {LOST[name]} transformers' reader of GGUF loses"
    elif name not in known and name.replace("moe", "_moe") not in known:
        why = "which transformers' reader of GGUF does not know"
    else:
        return
    raise model.refusal(f"is of architecture {name}, {why}")


def _names(
    model: GgufModel, built: transformers.PreTrainedModel, processor: Processor
) -> dict[str, str]:
    """Map GGUF's names to the model's.

    transformers' `get_gguf_hf_weights_map` does the same, but makes its table again for every
    module of the model, which takes half a minute for 46 layers.
    """
    import gguf

    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == model.architecture)
    table = gguf.get_tensor_name_map(arch, built.config.num_hidden_layers)
    found: dict[str, str] = {}
    for inner in ("", f"{built.base_model_prefix}."):  # Bloom's names are those of the inner model
        mine: dict[str, str] = {}
        for full in built.state_dict():
            if not full.startswith(inner):
                continue
            name = processor.preprocess_name(full.removeprefix(inner))
            stem, dot, suffix = name.rpartition(".")
            if suffix not in ("weight", "bias"):
                stem, dot, suffix = name, "", ""
            target = table.get_name(stem)
            if target is None:
                processor.perform_fallback_tensor_mapping(mine, f"{dot}{suffix}", inner, name)
            else:
                mine[f"{target}{dot}{suffix}"] = full
        found = mine | found
    return found


def _check_rope(
    model: GgufModel,
    built: torch.nn.Module,
    config: transformers.PretrainedConfig,
    rope: gguf_rope.Rope | None,
) -> None:
    """Compare the angles that the model will compute with those that the file asks for."""
    factors = {tensor.name for tensor in model.tensors} & set(gguf_rope.TENSORS)
    for module in built.modules():
        keys = [key for key in module._buffers if key.endswith("inv_freq")]
        if rope is None or not keys or any("original" in key for key in keys[:1]):
            continue
        computed: torch.nn.Module = type(module)(config)
        for key in keys:
            if "original" not in key:
                _check_angles(model, computed, key, rope)
        return  # the others are made of the same config
    if factors or model.own.get("rope.scaling.type", "none") != "none":
        kind = config.model_type
        raise model.refusal(f"scales rotary embeddings, and transformers' {kind} has none")


def _check_angles(
    model: GgufModel, computed: torch.nn.Module, key: str, rope: gguf_rope.Rope
) -> None:
    layer = key.removesuffix("inv_freq")
    angles = getattr(computed, key).double().numpy()
    attention = float(getattr(computed, f"{layer}attention_scaling"))
    wanted, factor = rope.frequencies, rope.attention
    if layer.startswith("sliding"):
        theta = rope.local_theta or gguf_config.GEMMA3_LOCAL_BASE
        wanted = theta ** (-np.arange(len(wanted)) / len(wanted))
        factor = 1.0
    same = angles.shape == wanted.shape and np.allclose(angles, wanted, rtol=CLOSE, atol=1e-20)
    if not same or abs(attention - factor) > CLOSE * factor:
        raise model.refusal(
            f"rotates {2 * len(wanted)} dimensions by other angles than transformers' "
            f"{type(computed).__name__} of its config, which rotates {2 * len(angles)}"
        )


def _describe(model: GgufModel, mapped: _Mapped) -> Iterator[SourceTensor]:
    """Describe each tensor; none is left out that changes what the model computes."""
    parameters: dict[str, Tensor] = mapped.model.state_dict(keep_vars=True)
    merged = mapped.config["model_type"] in MERGED
    made: dict[str, str] = {}
    for tensor in model.tensors:
        if tensor.name in gguf_rope.TENSORS or UNUSED.fullmatch(tensor.name):
            continue
        gguf_file.check_type(tensor)
        if merged and (found := _EXPERTS.fullmatch(tensor.name)):
            yield from _experts(model, tensor, found, parameters)
            continue
        target = mapped.names.get(tensor.name)
        if target is None or target not in parameters:
            raise model.refusal(
                f"has a tensor `{tensor.name}` that transformers' {type(mapped.model).__name__} "
                "has no place for",
                hint=MERGED_HINT if "_exps" in tensor.name else ORIGINAL,
            )
        if target in made:
            raise CheckpointError(
                f"tensor `{target}` is made of both `{made[target]}` and `{tensor.name}` of "
                f"`{model.path}`",
                hint=MERGED_HINT,
            )
        made[target] = tensor.name
        shape = tuple(parameters[target].shape)
        process = partial(_process, tensor, mapped.processor, target)
        mine = process(np.broadcast_to(np.float32(-1), tensor.shape)).shape
        if mine != shape:  # refused before anything is written
            raise tensor.refusal(f"is {list(mine)} where the model takes {list(shape)}")
        yield SourceTensor(name=target, dtype="F32", shape=shape, read=_Weight(process).read)


def _experts(
    model: GgufModel, tensor: GgufTensor, found: re.Match[str], parameters: Mapping[str, Tensor]
) -> Iterator[SourceTensor]:
    """Describe each of merged experts, under the name that checkpoints of the model have."""
    layer, part = found["layer"], found["part"]
    fused = parameters.get(_FUSED.format(layer=layer, part="down" if part == "down" else "gate_up"))
    wanted = list(fused.shape) if fused is not None else []
    if part != "down" and wanted:
        wanted[1] //= 2
    if list(tensor.shape) != wanted:
        raise CheckpointError(
            f"tensor `{tensor.name}` of `{model.path}` is {list(tensor.shape)} where the model "
            f"takes {wanted}",
            hint=ORIGINAL,
        )
    for expert in range(tensor.shape[0]):
        read = _Weight(partial(tensor.floats, expert)).read
        name = _EXPERT.format(layer=layer, expert=expert, part=part)
        yield SourceTensor(name=name, dtype="F32", shape=tensor.shape[1:], read=read)


def _tokenizer(model: GgufModel) -> tuple[list[tuple[str, bytes]], list[str]]:
    """Build the tokenizer, if transformers can; return its files, which are small, and notes."""
    from transformers import AutoTokenizer

    try:
        with tempfile.TemporaryDirectory() as folder:
            path = model.path
            if any(tensor.swapped for tensor in model.tensors):
                path = Path(folder) / "header.gguf"
                gguf_file.write_header(model, path)
            built = AutoTokenizer.from_pretrained(
                path.parent, gguf_file=path.name, local_files_only=True, trust_remote_code=False
            )
            made = Path(folder) / "made"
            built.save_pretrained(made)
            files = {file.name: file.read_bytes() for file in sorted(made.iterdir())}
    except Exception as error:  # noqa: BLE001 - any; the weights are worth having without it
        return [], [f"no tokenizer is written, transformers cannot build it: {error!r:.120}"]
    name = "tokenizer_config.json"
    if name in files:
        kept = {k: v for k, v in json.loads(files[name]).items() if k not in PLACE_KEYS}
        files[name] = pretty_json(kept)
    return [*files.items()], [
        "the tokenizer is rebuilt from GGUF, which does not hold all of it: compare it with the "
        "original's where digits and spaces matter"
    ]


def _aliases(model: GgufModel, mapped: _Mapped, made: set[str]) -> dict[str, str]:
    """Map each parameter that has no tensor to the one that it is tied to."""
    parameters: dict[str, Tensor] = mapped.model.state_dict(keep_vars=True)
    by_identity = {id(parameters[name]): name for name in made & parameters.keys()}
    aliases = {}
    for name in parameters:
        if name in made or _has_experts(name, made):
            continue
        kept = by_identity.get(id(parameters[name]))
        if kept is None:
            hint = MERGED_HINT if "expert" in name else ORIGINAL
            raise model.refusal(f"has no tensor for `{name}`", hint=hint)
        aliases[name] = kept
    return aliases


def _has_experts(name: str, made: set[str]) -> bool:
    """Tell whether every part of merged experts has a tensor of its own."""
    start, _, fused = name.rpartition(".")
    parts = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}.get(fused, ())
    return bool(parts) and all(f"{start}.0.{part}_proj.weight" in made for part in parts)


@dataclass(slots=True)
class _Weight:
    """One tensor of a GGUF file: dequantized whole when its first row is read, then dropped."""

    _floats: Callable[[], Floats]
    _whole: Tensor | None = None

    def read(self, start: int, rows: int) -> Tensor:
        whole = self._whole
        if whole is None:
            made = torch.from_numpy(self._floats().astype(np.float32, copy=True))
            whole = made.reshape(-1, made.shape[-1] if made.dim() > 1 else 1)
        self._whole = whole if start + rows < len(whole) else None
        return whole[start : start + rows]


def _process(
    tensor: GgufTensor, processor: Processor, target: str, weights: Floats | None = None
) -> Floats:
    """Undo llama.cpp's layout of a tensor, or of other weights in its place."""
    aside: dict[str, dict[str, Tensor]] = {"tensors": {}}
    made = processor.process(
        weights=tensor.floats() if weights is None else weights,
        name=tensor.name,
        tensor_key_mapping={},
        parsed_parameters=aside,
    )
    if made.name is None and aside["tensors"].keys() == {target}:
        return np.asarray(aside["tensors"][target].numpy())
    if made.name != tensor.name:
        raise tensor.refusal("is taken apart by transformers")
    return np.asarray(made.weights)


def _recognize(path: Path, key: str | None) -> Opener | None:
    found = gguf_file.find_gguf(path)
    return None if found is None else partial(open_gguf, found)


FORMAT = Format(label="a GGUF model", recognize=_recognize, is_final=True)
