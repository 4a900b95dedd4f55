"""A GGUF file as a source: names, config and tokenizer as transformers reads them.

transformers maps a GGUF to a model but loads it whole and then refuses to save it. Here its name
map and its un-permuting of weights are used, one tensor in memory at a time. Needs the `gguf` and
`transformers` packages, which `ortho` does not depend on.
"""

from __future__ import annotations

import contextlib
import copy
import json
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ortho_cli.convert.sources import gguf_config, gguf_rope
from ortho_cli.convert.sources.base import Source, SourceTensor, mark
from ortho_cli.convert.sources.gguf_file import (
    GgufModel,
    GgufTensor,
    check_type,
    files_beside,
    find_parts,
    open_model,
    write_header,
)
from ortho_cli.errors import CheckpointError, OrthoError, UsageError
from ortho_cli.model.load import check_parts, quiet_transformers
from ortho_cli.storage.checkpoint import model_name

# What transformers writes about the place a tokenizer came from.
PLACE_KEYS = ("is_local", "local_files_only", "name_or_path", "gguf_file")
# Tensors that llama.cpp itself passes over: angles that older converters kept.
UNUSED = re.compile(r"(blk\.\d+\.)?(attn_rot_embd|rope_freqs)(\.weight|\.inv_freq)?")
# Experts lie merged in GGUF; checkpoints of these architectures name each, which all tools read.
_EXPERTS = re.compile(r"blk\.(?P<layer>\d+)\.ffn_(?P<part>gate|up|down)_exps\.weight")
_EXPERT = "model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"
_FUSED = "model.layers.{layer}.mlp.experts.{part}_proj"
MERGED = ("qwen2_moe", "qwen3_moe")
MERGED_HINT = "merged experts cannot be converted; start from the original checkpoint"
# Architectures that transformers maps in part only.
LOST = {
    "gpt-oss": "experts",
    "gpt_oss": "experts",
    "minimax-m2": "experts",
    "gemma4": "kinds of layers",
}
# Values that the file holds in another form, and what undoing it does to the last bit.
REMADE = {
    "gemma2": "norm weights are those of the file less 1",
    "gemma3": "norm weights are those of the file less 1",
    "nemotron": "norm weights are those of the file less 1",
    "mamba": "A_log is the logarithm of what the file holds, rounded to float32",
}
CLOSE = 1e-4  # of angles: transformers computes them in float32


@dataclass(frozen=True, slots=True, kw_only=True)
class _Mapped:
    """A GGUF file as transformers understands it."""

    config: dict[str, Any]
    model: Any  # without weights
    processor: Any  # undoes llama.cpp's layouts
    names: dict[str, str]  # of GGUF -> of the model


def open_gguf(path: Path) -> Source:
    """Describe a GGUF file as the transformers checkpoint that it stands for, in float32.

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
    files = tuple(mark(part) for part in find_parts(path))
    with quiet_transformers(), _explained(path):
        model = open_model(path)
        notes = gguf_config.check_foreign(model)
        mapped = _map(model)
        tokenizer, told = _tokenizer(model)
        tensors = list(_describe(model, mapped))
        aliases = _aliases(model, mapped, {tensor.name for tensor in tensors})
    notes += [f"`{name}` beside it is not the model, and left" for name in files_beside(model.path)]
    notes += told
    if model.architecture in REMADE:
        notes.append(REMADE[model.architecture])
    notes.append("weights are dequantized to float32, which is exact; --dtype rounds them")
    return Source(
        name=model_name(path),
        kind="gguf",
        path=path,
        tensors=tuple(tensors),
        files=files,
        config=mapped.config,
        made_files=tuple(tokenizer),
        notes=tuple(notes),
        aliases=aliases,
    )


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn whatever else is raised on a damaged file into an error of one sentence."""
    try:
        yield
    except OrthoError:
        raise
    except Exception as error:  # noqa: BLE001 - the packages that read it may raise anything
        told = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise CheckpointError(
            f"`{path}` cannot be read as GGUF: {told}",
            hint="is the file whole, and its architecture known to transformers?",
        ) from None


def _map(model: GgufModel) -> _Mapped:
    """Make config, a model without weights, what undoes llama.cpp's layouts, and names."""
    import transformers
    from transformers import modeling_gguf_pytorch_utils

    # Typed in some versions and not in others.
    auto: Any = transformers
    mapping: Any = modeling_gguf_pytorch_utils
    _check_architecture(model, mapping.GGUF_SUPPORTED_ARCHITECTURES)
    parsed = mapping.load_gguf_checkpoint(str(model.path), return_tensors=False)["config"]
    layers = len(model.tensors)
    check_parts(parsed, layers=layers, told=model.path)
    kind = parsed["model_type"]
    causal: Any = auto.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if kind not in auto.CONFIG_MAPPING or kind not in causal:
        raise CheckpointError(
            f"`{model.path}` is of architecture {model.architecture}, and transformers has no "
            f"causal language model of it",
            hint="start from the original checkpoint",
        )
    made = auto.CONFIG_MAPPING[kind]
    parsed = gguf_config.complete(model, parsed, made())
    check_parts(parsed, layers=layers, told=model.path)
    rotary = hasattr(made(), "rope_parameters")
    rope = gguf_config.read_rope(model, parsed) if rotary else None
    if rope is not None:
        gguf_config.carry_rope(model, rope, parsed)
    # What is written is what the model is built of, and so what is checked.
    written = _write(made.from_dict(dict(parsed)))
    config = made.from_dict(copy.deepcopy(written))
    default = {"num_hidden_layers": config.get_text_config().num_hidden_layers}
    check_parts(default, layers=layers, told=model.path)  # the header may say nothing of them
    with torch.device("meta"):
        built = auto.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    built.tie_weights()
    _check_rope(model, built, config, rope)
    processors: Any = mapping.TENSOR_PROCESSORS
    processor = processors.get(model.architecture, mapping.TensorProcessor)(config=parsed)
    names = _names(model, built, processor)
    written |= {"architectures": [type(built).__name__], "dtype": "float32"}
    return _Mapped(config=written, model=built, processor=processor, names=names)


def _check_architecture(model: GgufModel, known: list[str]) -> None:
    """Refuse an architecture of which transformers makes no model, or another one."""
    name = model.architecture
    if name in LOST:
        why = f"whose {LOST[name]} transformers' reader of GGUF loses"
    elif name not in known and name.replace("moe", "_moe") not in known:
        why = "which transformers' reader of GGUF does not know"
    else:
        return
    raise CheckpointError(
        f"`{model.path}` is of architecture {name}, {why}",
        hint="start from the original checkpoint",
    )


def _names(model: GgufModel, built: Any, processor: Any) -> dict[str, str]:
    """Map GGUF's names to the model's.

    As transformers' `get_gguf_hf_weights_map` does, which makes its table anew for every module of
    the model: half a minute for 46 layers.
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


def _write(config: Any) -> dict[str, Any]:
    """Give a config as it is written."""
    told = {
        key: value
        for key, value in config.to_diff_dict().items()
        if key not in ("quantization_config", "_name_or_path", "_model_name_or_path")
    }
    return gguf_config.add_old_words(told)


def _check_rope(model: GgufModel, built: Any, config: Any, rope: gguf_rope.Rope | None) -> None:
    """Compare the angles that the model will compute with those that the file asks for."""
    held = {tensor.name for tensor in model.tensors} & set(gguf_rope.TENSORS)
    found = False
    for module in built.modules():
        keys = [key for key in module._buffers if key.endswith("inv_freq")]
        if rope is None or not keys or any("original" in key for key in keys[:1]):
            continue
        found = True
        computed = type(module)(config)
        for key in keys:
            if "original" not in key:
                _check_angles(model, computed, key, rope)
        break  # the others are made of the same config
    if not found and (held or _scales(model)):
        raise CheckpointError(
            f"`{model.path}` scales rotary embeddings, and transformers' {config.model_type} has "
            f"none",
            hint="start from the original checkpoint",
        )


def _scales(model: GgufModel) -> bool:
    told = gguf_config.told_of(model)
    return bool(told.get("rope.scaling.type", "none") != "none")


def _check_angles(model: GgufModel, computed: Any, key: str, rope: gguf_rope.Rope) -> None:
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
        raise CheckpointError(
            f"`{model.path}` rotates {2 * len(wanted)} dimensions by other angles than "
            f"transformers' {type(computed).__name__} of its config, which rotates "
            f"{2 * len(angles)}",
            hint="start from the original checkpoint",
        )


def _describe(model: GgufModel, mapped: _Mapped) -> Iterator[SourceTensor]:
    """Say what becomes of each tensor; none is left out that changes what the model computes."""
    parameters = mapped.model.state_dict(keep_vars=True)
    merged = mapped.model.config.model_type in MERGED
    made: dict[str, str] = {}
    for tensor in model.tensors:
        if tensor.name in gguf_rope.TENSORS or UNUSED.fullmatch(tensor.name):
            continue
        check_type(tensor)
        if merged and (found := _EXPERTS.fullmatch(tensor.name)):
            yield from _experts(model, tensor, found, parameters)
            continue
        target = mapped.names.get(tensor.name)
        if target is None or target not in parameters:
            known = _EXPERTS.fullmatch(tensor.name) is None and "_exps" not in tensor.name
            raise CheckpointError(
                f"`{model.path}` has a tensor `{tensor.name}` that transformers' "
                f"{type(mapped.model).__name__} has no place for",
                hint="start from the original checkpoint" if known else MERGED_HINT,
            )
        if target in made:
            raise CheckpointError(
                f"tensor `{target}` is made of both `{made[target]}` and `{tensor.name}` of "
                f"`{model.path}`",
                hint=MERGED_HINT,
            )
        made[target] = tensor.name
        shape = tuple(parameters[target].shape)
        weight = _Weight(tensor, mapped.processor, target, shape)
        yield SourceTensor(name=target, dtype="F32", shape=shape, read=weight.read)


def _experts(
    model: GgufModel, tensor: GgufTensor, found: re.Match[str], parameters: dict[str, Any]
) -> Iterator[SourceTensor]:
    """Take merged experts apart, into the names that checkpoints of the model have."""
    layer, part = found["layer"], found["part"]
    fused = parameters.get(_FUSED.format(layer=layer, part="down" if part == "down" else "gate_up"))
    wanted = list(fused.shape) if fused is not None else []
    if part != "down" and wanted:
        wanted[1] //= 2
    if list(tensor.shape) != wanted:
        raise CheckpointError(
            f"tensor `{tensor.name}` of `{model.path}` is {list(tensor.shape)} where the model "
            f"takes {wanted}",
            hint="start from the original checkpoint",
        )
    for expert in range(tensor.shape[0]):
        weight = _Expert(tensor, expert)
        name = _EXPERT.format(layer=layer, expert=expert, part=part)
        yield SourceTensor(name=name, dtype="F32", shape=tensor.shape[1:], read=weight.read)


def _tokenizer(model: GgufModel) -> tuple[list[tuple[str, bytes]], list[str]]:
    """Build the tokenizer, if transformers can; its files are small and held."""
    from transformers import AutoTokenizer

    try:
        with tempfile.TemporaryDirectory() as folder:
            path = model.path
            if model.swapped:
                path = Path(folder) / "header.gguf"
                write_header(model, path)
            built = AutoTokenizer.from_pretrained(
                path.parent, gguf_file=path.name, local_files_only=True, trust_remote_code=False
            )
            made = Path(folder) / "made"
            built.save_pretrained(made)
            files = [(file.name, file.read_bytes()) for file in sorted(made.iterdir())]
    except Exception as error:  # noqa: BLE001 - whatever it is, the weights are worth having without
        return [], [f"no tokenizer is written, transformers cannot build it: {error!r:.120}"]
    cleaned = []
    for name, data in files:
        if name == "tokenizer_config.json":
            told = json.loads(data)
            told = {key: value for key, value in told.items() if key not in PLACE_KEYS}
            data = (json.dumps(told, indent=2, ensure_ascii=False) + "\n").encode()
        cleaned.append((name, data))
    return cleaned, [
        "the tokenizer is rebuilt from GGUF, which does not hold all of it: compare it with the "
        "original's where digits and spaces matter"
    ]


def _aliases(model: GgufModel, mapped: _Mapped, held: set[str]) -> dict[str, str]:
    """Name each parameter without a tensor with the one that it is tied to."""
    parameters = mapped.model.state_dict(keep_vars=True)
    by_identity = {id(parameters[name]): name for name in held & parameters.keys()}
    aliases = {}
    for name in parameters:
        if name in held or _has_experts(name, held):
            continue
        kept = by_identity.get(id(parameters[name]))
        if kept is None:
            raise CheckpointError(
                f"`{model.path}` has no tensor for `{name}`",
                hint=MERGED_HINT if "expert" in name else "start from the original checkpoint",
            )
        aliases[name] = kept
    return aliases


def _has_experts(name: str, held: set[str]) -> bool:
    """Tell whether every part of merged experts is held under names of its own."""
    start, _, fused = name.rpartition(".")
    parts = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}.get(fused, ())
    return bool(parts) and all(f"{start}.0.{part}_proj.weight" in held for part in parts)


class _Weight:
    """One tensor of a GGUF: dequantized whole when its first row is read, then dropped."""

    def __init__(
        self, tensor: GgufTensor, processor: Any, target: str, shape: tuple[int, ...]
    ) -> None:
        self._tensor, self._processor = tensor, processor
        self._target, self._shape = target, shape
        self._held: Tensor | None = None
        if processor is not None:
            self._check()

    def read(self, start: int, rows: int) -> Tensor:
        """Give rows in float32."""
        held = self._whole() if self._held is None else self._held
        self._held = held if start + rows < len(held) else None
        return held[start : start + rows]

    def _check(self) -> None:
        """Refuse another shape than the model's before anything is written."""
        shape = self._process(np.broadcast_to(np.float32(-1), self._tensor.shape)).shape
        if tuple(shape) != self._shape:
            raise CheckpointError(
                f"tensor `{self._tensor.name}` of `{self._tensor.path}` is {list(shape)} where the "
                f"model takes {list(self._shape)}",
                hint="start from the original checkpoint",
            )

    def _process(self, weights: Any) -> Any:
        name = self._tensor.name
        aside: dict[str, Any] = {"tensors": {}}
        made = self._processor.process(
            weights=weights, name=name, tensor_key_mapping={}, parsed_parameters=aside
        )
        if made.name is None and aside["tensors"].keys() == {self._target}:
            return aside["tensors"][self._target].numpy()
        if made.name != name:
            raise CheckpointError(
                f"tensor `{name}` of `{self._tensor.path}` is taken apart by transformers",
                hint="start from the original checkpoint",
            )
        return made.weights

    def _whole(self) -> Tensor:
        made = self._process(self._tensor.floats())
        whole = torch.from_numpy(np.asarray(made).astype("float32", copy=True))
        return whole.reshape(-1, self._shape[-1] if len(self._shape) > 1 else 1)


class _Expert(_Weight):
    """One expert of a tensor of all of them."""

    def __init__(self, tensor: GgufTensor, expert: int) -> None:
        super().__init__(tensor, None, "", tensor.shape[1:])
        self._expert = expert

    def _whole(self) -> Tensor:
        made = self._tensor.floats(self._expert)
        return torch.from_numpy(made.astype("float32", copy=True))
