"""Every model that transformers knows, built on the meta device: names, shapes and classes only.

Default configs, no weights, no network; about two minutes for all of them.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import signal
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

SECONDS = 60  # a model may take; more hang in checks of their own
LAYERS = (
    "num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "decoder_layers",
    "num_encoder_layers", "num_decoder_layers",
)  # fmt: skip

Kind = Literal["Linear", "Embedding", "Conv1D", "router", "head", "other", "converted"]


@dataclass(frozen=True)
class Weight:
    """One matrix: where the file has it, where the model has it, and what it is there."""

    name: str
    shape: tuple[int, ...]
    memory: str | None  # the tensor's name in the model; None where loading makes it of others
    kind: Kind

    @property
    def module(self) -> str:
        return self.name.removesuffix(".weight")


@dataclass(frozen=True)
class Built:
    """One model class."""

    model_type: str
    name: str
    config: dict[str, Any]
    weights: list[Weight]
    tied: frozenset[str]
    model: Any


def build_all() -> Iterator[Built]:
    """Build every class of the auto mappings that can be built without other packages."""
    import transformers
    from transformers.models.auto import modeling_auto

    transformers.logging.set_verbosity_error()
    seen = set()
    mappings = [name for name in dir(modeling_auto) if name.endswith("_NAMES")]
    # The class that a hub file names most often comes first: it speaks for its model type.
    first = ("MODEL_FOR_CAUSAL_LM", "MODEL_FOR_IMAGE_TEXT_TO_TEXT", "MODEL_FOR_SEQ_TO_SEQ")
    mappings.sort(key=lambda name: (not name.startswith(first), name))
    for mapping in mappings:
        for model_type, names in getattr(modeling_auto, mapping).items():
            for name in [names] if isinstance(names, str) else names:
                if (model_type, name) not in seen and hasattr(transformers, name):
                    seen.add((model_type, name))
                    with quiet():
                        built = build(model_type, name)
                    if built is not None:
                        yield built


def build(model_type: str, name: str) -> Built | None:
    """Build one class, small if it lets itself be made small; None if it cannot be built."""
    for few in (True, False):
        with contextlib.suppress(Exception), time_limit():
            return _describe(model_type, name, *_make(model_type, name, few=few))
    return None


def _make(model_type: str, name: str, *, few: bool) -> tuple[Any, Any]:
    import torch
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    cls = getattr(transformers, name)
    kind = cls.config_class
    if model_type in CONFIG_MAPPING and (
        kind is None or issubclass(CONFIG_MAPPING[model_type], kind)
    ):
        kind = CONFIG_MAPPING[model_type]
    config = kind()
    if few:
        _shorten(config)
    with torch.device("meta"):
        return config, cls._from_config(config)


def _shorten(config: Any) -> None:
    for key in LAYERS:
        if isinstance(getattr(config, key, None), int) and getattr(config, key) > 4:
            with contextlib.suppress(Exception):
                setattr(config, key, 4)
    for key in getattr(config, "sub_configs", {}) or {}:
        if getattr(config, key, None) is not None:
            _shorten(getattr(config, key))


def _describe(model_type: str, name: str, config: Any, model: Any) -> Built:
    from transformers.core_model_loading import revert_weight_conversion

    kinds = _kinds(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names: dict[int, str] = {}
    for key, value in parameters.items():
        names.setdefault(id(value), key)
    stored = revert_weight_conversion(model, parameters)
    weights, seen = [], set()
    for key, value in stored.items():
        folded = re.sub(r"\.\d+(?=\.|$)", ".#", key), tuple(value.shape)
        if value.dim() in (2, 3) and folded not in seen:
            seen.add(folded)
            memory = key if key in parameters else names.get(id(value))
            kind = kinds[memory] if memory is not None else "converted"
            weights.append(Weight(key, tuple(value.shape), memory, kind))
    return Built(
        model_type=model_type,
        name=name,
        config=json.loads(json.dumps({**config.to_dict(), "architectures": [name]}, default=str)),
        weights=weights,
        tied=frozenset(getattr(model, "all_tied_weights_keys", None) or ()),
        model=model,
    )


def _kinds(model: Any) -> dict[str, Kind]:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    try:
        output = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        output = None
    heads = {id(value) for value in output.parameters()} if output is not None else set()
    modules = dict(model.named_modules())
    found: dict[str, Kind] = {}
    for path, module in modules.items():
        above = type(modules[path.rpartition(".")[0]]).__name__
        classes = f"{type(module).__name__} {above}"
        kind: Kind = "other"
        if re.search(r"Router|TopKGating|Top\dGate", classes):
            kind = "router"
        elif isinstance(module, nn.Embedding) or "Embedding" in type(module).__name__:
            kind = "Embedding"
        elif isinstance(module, nn.Linear):
            kind = "Linear"
        elif isinstance(module, Conv1D):
            kind = "Conv1D"
        for key, value in module._parameters.items():
            if value is not None:
                name = f"{path}.{key}".removeprefix(".")
                found[name] = "head" if id(value) in heads else kind
    return found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep other people's warnings to themselves."""
    with warnings.catch_warnings(action="ignore"):
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    """Stop what takes longer than SECONDS."""

    def stop(number: int, frame: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
