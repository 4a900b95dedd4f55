"""What transformers knows of an architecture that config.json names, without its weights or code.

transformers is imported only when something is asked, and may be absent: then nothing is known.
Models are built on the meta device. Code that lies beside the weights is never run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ortho_cli.errors import OrthoError
from ortho_cli.model.load import check_parts, quiet_transformers
from ortho_cli.storage import strict_json

TIED = "tie_word_embeddings"
TOLD = Path("config.json")


def is_tied(config: Mapping[str, Any] | None) -> bool | None:
    """Tell whether a model's head is its embedding: config.json says so, or its class does.

    Args:
        config: config.json.
    Returns:
        None where neither says anything. Where its parts disagree, False: a copy does no harm.
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
    """Ask the class of a model type for what it takes where config.json says nothing."""
    try:
        with quiet_transformers() as transformers:
            if model_type not in transformers.CONFIG_MAPPING:
                return None
            said = getattr(transformers.CONFIG_MAPPING[model_type](), TIED, None)
    except Exception:  # noqa: BLE001 - absent, or a class that needs more than it is given
        return None
    return said if isinstance(said, bool) else None


def parameter_names(config: Mapping[str, Any] | None, *, tensors: int) -> frozenset[str] | None:
    """Name the parameters and buffers that the architecture of config.json reads.

    Args:
        config: config.json.
        tensors: of the checkpoint; a model of more layers than that is not built.
    Returns:
        Names as transformers takes them, with and without its base model's prefix; None where it
        does not know the architecture.
    """
    if config is None:
        return None
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and named else None
    try:
        import torch

        with quiet_transformers() as transformers:
            kind: Any = getattr(transformers, str(name), None)
            settings_of: Any = getattr(kind, "config_class", None)
            if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
                return None
            check_parts(dict(config), layers=tensors, told=TOLD)
            settings = settings_of.from_dict(dict(config))
            default = {"num_hidden_layers": settings.get_text_config().num_hidden_layers}
            check_parts(default, layers=tensors, told=TOLD)
            with torch.device("meta"):
                model: Any = kind(settings)
            found = set(model.state_dict())
            prefix = str(model.base_model_prefix)
            has_base = bool(prefix) and hasattr(model, prefix)
    except OrthoError:
        return None
    except Exception:  # noqa: BLE001 - a config that its own class cannot read says nothing
        return None
    if has_base:
        found |= {name.removeprefix(f"{prefix}.") for name in found}
    elif prefix:
        found |= {f"{prefix}.{name}" for name in found}
    return frozenset(found)
