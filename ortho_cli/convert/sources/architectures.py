"""Asks transformers about the architecture of a config.json: tied heads, names of parameters.

transformers is imported only when it is asked, and may be absent: then nothing is known. Models are
built on the meta device, without weights. Code in the folder of a model is never run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ortho_cli.model.load import check_parts, quiet_transformers
from ortho_cli.storage import strict_json

TIED = "tie_word_embeddings"
TOLD = Path("config.json")  # the file that errors name


def is_tied(config: Mapping[str, object] | None) -> bool | None:
    """Tell whether a model's head is its embedding, by config.json or the default of its class.

    Args:
        config: config.json.
    Returns:
        None where neither is known. False where parts of config.json disagree: a copy of the head
        does no harm.
    """
    if config is None:
        return None
    levels = strict_json.levels(config)
    said = [level[TIED] for level in levels if isinstance(level.get(TIED), bool)]
    if not all(said):
        return False
    if isinstance(config.get(TIED), bool):
        return True
    return _default(config.get("model_type"))


def _default(model_type: object) -> bool | None:
    try:
        with quiet_transformers() as transformers:
            if model_type not in transformers.CONFIG_MAPPING:
                return None
            said = getattr(transformers.CONFIG_MAPPING[model_type](), TIED, None)
    except Exception:  # noqa: BLE001 - absent, or a class that needs more than it is given
        return None
    return said if isinstance(said, bool) else None


def parameter_names(config: Mapping[str, object] | None, *, tensors: int) -> frozenset[str] | None:
    """List the names of the parameters and buffers of the architecture of config.json.

    Args:
        config: config.json.
        tensors: number of tensors of the checkpoint; a model of more layers is not built.
    Returns:
        Names that transformers loads, with and without its base model's prefix; None where it
        does not know the architecture.
    """
    if config is None:
        return None
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and named else None
    try:
        import torch

        with quiet_transformers() as transformers:
            # Any: classes of transformers are found by name.
            kind: Any = getattr(transformers, str(name), None)
            config_class: Any = getattr(kind, "config_class", None)
            if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
                return None
            check_parts(dict(config), layers=tensors, told=TOLD)
            settings = config_class.from_dict(dict(config))
            default = {"num_hidden_layers": settings.get_text_config().num_hidden_layers}
            check_parts(default, layers=tensors, told=TOLD)
            with torch.device("meta"):
                model = kind(settings)
    except Exception:  # noqa: BLE001 - a config that its own class cannot read says nothing
        return None
    found, prefix = set(model.state_dict()), str(model.base_model_prefix)
    if prefix and hasattr(model, prefix):
        found |= {name.removeprefix(f"{prefix}.") for name in found}
    elif prefix:
        found |= {f"{prefix}.{name}" for name in found}
    return frozenset(found)
