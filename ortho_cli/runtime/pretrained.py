"""Load an artifact as a transformers model whose split Linears are OrthoLinear.

transformers builds the model on meta, maps names, ties weights and fills base, as for any quantized
checkpoint; our quantizer only puts OrthoLinear in place before that. The ortho stream is read
afterwards, by our own reader. transformers is imported late.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ortho_cli.errors import ArtifactError, blamed
from ortho_cli.formats.artifact import CONFIG_FILE, Artifact
from ortho_cli.formats.open_artifact import no_ortho, open_artifact
from ortho_cli.model.experts import separate
from ortho_cli.model.linears import is_conv1d, is_plain_linear
from ortho_cli.model.load import check_claims, check_folder, explained, quiet_transformers
from ortho_cli.runtime import product
from ortho_cli.runtime.engine import set_alpha
from ortho_cli.runtime.module_files import empty_layers, fill_ortho
from ortho_cli.runtime.operands import Alpha
from ortho_cli.runtime.ortho_linear import OrthoLinear
from ortho_cli.storage.sealing import read_keys
from ortho_cli.storage.untrusted import is_trusted, trusting

METHOD = "ortho"
KEYS = ("missing_keys", "unexpected_keys", "mismatched_keys", "conversion_errors")


def load(
    folder: str | Path,
    *,
    alpha: Alpha,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    identity: str | Path | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Load an artifact as a transformers causal language model.

    Args:
        folder: what `ortho decompose` wrote from a transformers model.
        alpha: in [0, 1]: 0 is base alone, 1 the full model; or one for each batch row. No default.
        device: where the model goes; the CPU if None.
        dtype: of all that is not split; the checkpoint's own if None. The streams keep theirs.
        identity: file of age identities, or of a passphrase, that opens a sealed ortho.
        trust_remote_code: dangerous: run the Python code that the folder brings, if it does.
    Returns:
        The model in eval mode; about the artifact's size is in memory meanwhile.
    Raises:
        UsageError: alpha is no number in [0, 1], or transformers is not installed.
        ArtifactError: no config.json, a damaged file, a key that is missing or unexpected (named),
            or alpha is not 0 and there is no ortho, or no identity opens it.
    """
    alpha = product.check_alpha(alpha)
    keys = read_keys(None if identity is None else Path(identity))
    opened = open_artifact(Path(folder), keys)
    if not (opened.folder / CONFIG_FILE).is_file():
        raise ArtifactError(
            f"`{folder}` has no {CONFIG_FILE}, so transformers cannot build its model",
            hint="build the module yourself and use Engine(module).load(folder, alpha=...)",
        )
    if opened.ortho is None and not product.is_zero(alpha):
        raise no_ortho(opened, "alpha is not 0")
    with blamed(ArtifactError):
        check_folder(opened.folder)
        check_claims(opened.folder)
    with quiet_transformers() as transformers, trusting(trust_remote_code or is_trusted()):
        model, layers = _build(transformers, opened, dtype)
    fill_ortho(opened, layers)
    if device is not None:
        model.to(device)
    set_alpha(model, alpha)
    model.train(mode=False)
    return model


def _build(
    transformers: ModuleType, opened: Artifact, dtype: torch.dtype | None
) -> tuple[nn.Module, dict[str, OrthoLinear]]:
    """Let transformers build the model and fill base; return it with its layers by our names."""
    what = f"transformers cannot load `{opened.folder}`"
    hint = "does this version of transformers know the source model?"
    with explained(opened.folder, what, hint=hint, kind=ArtifactError):
        trusted = is_trusted()
        config = transformers.AutoConfig.from_pretrained(
            opened.folder, local_files_only=True, trust_remote_code=trusted
        )
        original = getattr(config, "quantization_config", None)
        swapped: dict[str, OrthoLinear] = {}
        with _quantizer(opened, swapped) as settings:
            config.quantization_config = settings
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                opened.folder,
                config=config,
                dtype="auto" if dtype is None else dtype,
                local_files_only=True,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                trust_remote_code=trusted,
            )
    for kind in KEYS:
        found = [key for key in info.get(kind) or () if not _is_unused(kind, key, swapped)]
        if found:
            first = sorted(map(str, found))[0]
            raise ArtifactError(
                f"`{opened.folder}` and its model do not agree: {kind.replace('_', ' ')} "
                f"such as `{first}` ({len(found)} in all)",
                hint="decompose the source again, or use the version of transformers it came from",
            )
    # The model may be cast and trained like any other. Saving it as one is still refused: that
    # would publish both streams in one file.
    model.config.quantization_config = original
    model.is_quantized = False
    return model, swapped


def _is_unused(kind: str, key: object, swapped: Mapping[str, OrthoLinear]) -> bool:
    """Whether a key is a tensor that was carried over and that the model does not use."""
    module = str(key).rpartition(".")[0]
    return kind == "unexpected_keys" and not any(
        module == name or module.endswith("." + name) for name in swapped
    )


@contextmanager
def _quantizer(opened: Artifact, swapped: dict[str, OrthoLinear]) -> Iterator[dict[str, str]]:
    """Register the quantizer with transformers for the block; give the settings that select it."""
    from transformers.quantizers import auto
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class Settings(QuantizationConfigMixin):  # type: ignore[misc, unused-ignore]
        """Settings without content: the quantizer has the artifact."""

        def __init__(self, quant_method: str = METHOD, **_: object) -> None:
            self.quant_method = quant_method  # type: ignore[assignment, unused-ignore]

    class Quantizer(HfQuantizer):  # type: ignore[misc, unused-ignore]
        """Puts OrthoLinear on meta where the artifact split a Linear."""

        requires_calibration = True

        def _process_model_before_weight_loading(self, model: nn.Module, **_: object) -> None:
            swapped.update(swap(model, opened))

        def is_serializable(self) -> bool:
            return False

        @property
        def is_trainable(self) -> bool:
            return True

    # Each load registers its own classes, since they hold their artifact.
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = Settings
    auto.AUTO_QUANTIZER_MAPPING[METHOD] = Quantizer
    try:
        yield {"quant_method": METHOD}
    finally:
        del auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD], auto.AUTO_QUANTIZER_MAPPING[METHOD]


def swap(model: nn.Module, opened: Artifact) -> dict[str, OrthoLinear]:
    """Replace the Linears that were split, on meta; return the new layers by the artifact's names.

    Experts that transformers stacks are taken apart before.

    Raises:
        ArtifactError: the model has no Linear of that name and size.
    """
    layers = dict(empty_layers(opened))
    experts = separate(model, (f"{name}.weight" for name in layers))
    modules = dict(model.named_modules())
    places = {id(module): path for path, module in modules.items()}
    made: dict[str, OrthoLinear] = {}
    tails = _by_tail(modules)
    for name, layer in layers.items():
        expert = experts.get(f"{name}.weight")
        path = _find(name, modules, tails) if expert is None else places[id(expert)]
        old = modules.get(path)
        weight = getattr(old, "weight", None)
        shape = [layer.out_features, layer.in_features]
        found = list(weight.shape) if isinstance(weight, torch.Tensor) else None
        if old is None or not is_plain_linear(old) or found != shape:
            raise ArtifactError(
                f"`{name}` was split as a Linear of {shape}, and the model has no such Linear",
                hint="does this version of transformers know the source model?",
            )
        bias = getattr(old, "bias", None)
        layer.bias = bias if isinstance(bias, nn.Parameter) else None
        parent, _, leaf = path.rpartition(".")
        setattr(modules[parent], leaf, layer)
        made[name] = layer
    return made


def _by_tail(modules: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """Index names of modules by each of their ends: `mlp.up_proj`, `up_proj`."""
    found: dict[str, list[str]] = {}
    for name in modules:
        tail = name
        while tail:
            found.setdefault(tail, []).append(name)
            tail = tail.partition(".")[2]
    return found


def _find(name: str, modules: Mapping[str, nn.Module], tails: Mapping[str, list[str]]) -> str:
    """Find a module by its name in the checkpoint, whose first parts transformers may rename."""
    if name in modules:
        return name
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdecimal()), len(parts))
    for start in range(1, max(number, 1)):
        found = [
            other
            for other in tails.get(".".join(parts[start:]), ())
            if isinstance(modules[other], nn.Linear) or is_conv1d(modules[other])
        ]
        if len(found) == 1:
            return found[0]
    found = tails.get(name, [])
    return found[0] if len(found) == 1 else name
