"""A GGUF file as a source: names, config and tokenizer as transformers reads them.

transformers maps a GGUF to a model but loads it whole and then refuses to save it. Here its name
map and its un-permuting of weights are used, one tensor in memory at a time. Needs the `gguf` and
`transformers` packages, which `ortho` does not depend on.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ortho_cli.checkpoint import model_name
from ortho_cli.errors import CheckpointError, UsageError
from ortho_cli.models import check_parts, quiet_transformers
from ortho_cli.source import Source, SourceTensor, mark

# What transformers writes about the place a tokenizer came from.
PLACE_KEYS = ("is_local", "local_files_only", "name_or_path", "gguf_file")


def open_gguf(path: Path) -> Source:
    """Describe a GGUF file as the transformers checkpoint that it stands for, in float32.

    Raises:
        UsageError: a package that reads GGUF is not installed.
        CheckpointError: the file is damaged, its architecture is unknown, or tensors are missing
            or merged in ways that need the whole model.
    """
    try:
        import gguf
        import transformers  # noqa: F401 - to name it where it is missing
    except ImportError as error:
        raise UsageError(
            f"`{path}` is a GGUF file, and the package `{error.name}` that reads it is missing",
            hint="pip install gguf transformers",
        ) from None
    first = mark(path)
    try:
        with quiet_transformers():
            reader = gguf.GGUFReader(path)
            config, model, processor, names = _map(path, layers=len(reader.tensors))
            tokenizer, notes = _tokenizer(path)
    except CheckpointError:
        raise
    except Exception as error:  # noqa: BLE001 - on a damaged file both may raise anything
        told = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise CheckpointError(
            f"`{path}` cannot be read as GGUF: {told}",
            hint="is the file whole, and its architecture known to transformers?",
        ) from None
    parameters = model.state_dict(keep_vars=True)
    tensors: list[SourceTensor] = []
    left: list[str] = []
    taken: set[str] = set()
    for tensor in reader.tensors:
        target = names.get(tensor.name)
        if target is None or target not in parameters:
            left.append(tensor.name)
            continue
        if target in taken:
            raise CheckpointError(
                f"tensor `{target}` is made of several of `{path}`, `{tensor.name}` among them",
                hint="merged experts cannot be converted; start from the original checkpoint",
            )
        taken.add(target)
        weight = _Weight(path, tensor, processor, tuple(parameters[target].shape))
        tensors.append(SourceTensor(name=target, dtype="F32", shape=weight.shape, read=weight.read))
    aliases = _aliases(path, parameters, {tensor.name for tensor in tensors})
    if left:
        notes.append(f"tensors that the model does not have are left out: {', '.join(left[:4])}")
    notes.append("weights are dequantized to float32, which is exact; --dtype rounds them")
    return Source(
        name=model_name(path),
        kind="gguf",
        path=path,
        tensors=tuple(tensors),
        files=(first,),
        config={**config, "architectures": [type(model).__name__], "dtype": "float32"},
        made_files=tuple(tokenizer),
        notes=tuple(notes),
        aliases=aliases,
    )


def _map(path: Path, *, layers: int) -> tuple[dict[str, Any], Any, Any, dict[str, str]]:
    """Make config, a model without weights, what undoes llama.cpp's layouts, and names."""
    import transformers
    from transformers import modeling_gguf_pytorch_utils

    # Typed in some versions and not in others.
    auto: Any = transformers
    mapping: Any = modeling_gguf_pytorch_utils
    parsed = mapping.load_gguf_checkpoint(str(path), return_tensors=False)["config"]
    check_parts(parsed, layers=layers, told=path)
    config = auto.CONFIG_MAPPING[parsed["model_type"]].from_dict(dict(parsed))
    default = {"num_hidden_layers": config.get_text_config().num_hidden_layers}
    check_parts(default, layers=layers, told=path)  # the header may say nothing of them
    with torch.device("meta"):
        model = auto.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    model.tie_weights()
    made = mapping.TENSOR_PROCESSORS.get(parsed["model_type"], mapping.TensorProcessor)
    processor = made(config=parsed)
    names = mapping.get_gguf_hf_weights_map(model, processor)
    kept = {
        key: value
        for key, value in config.to_diff_dict().items()
        if key not in ("quantization_config", "_name_or_path", "_model_name_or_path")
    }
    return kept, model, processor, names


def _tokenizer(path: Path) -> tuple[list[tuple[str, bytes]], list[str]]:
    """Build the tokenizer, if transformers can; its files are small and held."""
    from transformers import AutoTokenizer

    try:
        built = AutoTokenizer.from_pretrained(
            path.parent, gguf_file=path.name, local_files_only=True, trust_remote_code=False
        )
        with tempfile.TemporaryDirectory() as folder:
            built.save_pretrained(folder)
            files = [(file.name, file.read_bytes()) for file in sorted(Path(folder).iterdir())]
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


def _aliases(path: Path, parameters: dict[str, Any], held: set[str]) -> dict[str, str]:
    """Name each parameter without a tensor with the one that it is tied to."""
    by_identity = {id(parameters[name]): name for name in held}
    aliases = {}
    for name in parameters:
        if name in held:
            continue
        kept = by_identity.get(id(parameters[name]))
        if kept is None:
            raise CheckpointError(
                f"`{path}` has no tensor for `{name}`",
                hint="merged experts cannot be converted; start from the original checkpoint",
            )
        aliases[name] = kept
    return aliases


class _Weight:
    """One tensor of a GGUF: dequantized whole when its first row is read, then dropped."""

    def __init__(self, path: Path, tensor: Any, processor: Any, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self._path, self._tensor, self._processor = path, tensor, processor
        self._held: Tensor | None = None

    def read(self, start: int, rows: int) -> Tensor:
        """Give rows in float32."""
        held = self._whole() if self._held is None else self._held
        self._held = held if start + rows < len(held) else None
        return held[start : start + rows]

    def _whole(self) -> Tensor:
        import gguf

        name = self._tensor.name
        weights = gguf.quants.dequantize(self._tensor.data, self._tensor.tensor_type)
        made = self._processor.process(
            weights=weights, name=name, tensor_key_mapping={}, parsed_parameters={"tensors": {}}
        )
        if made.name != name or tuple(made.weights.shape) != self.shape:
            raise CheckpointError(
                f"tensor `{name}` of `{self._path}` is {list(made.weights.shape)} where the model "
                f"takes {list(self.shape)}",
                hint="start from the original checkpoint",
            )
        whole = torch.from_numpy(made.weights.astype("float32", copy=True))
        return whole.reshape(-1, self.shape[-1] if len(self.shape) > 1 else 1)
