"""Offline checkpoint decomposition: a dense INT4 base and a sparse high-precision ortho stream."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ortho_cli.version import __version__

if TYPE_CHECKING:
    from ortho_cli.runtime.engine import Engine, at_alpha, set_alpha
    from ortho_cli.runtime.ortho_linear import OrthoLinear
    from ortho_cli.runtime.pretrained import load

__all__ = ["Engine", "OrthoLinear", "__version__", "at_alpha", "load", "set_alpha"]


# Silent unless an application, or `ortho -v`, adds a handler of its own.
logging.getLogger(__name__).addHandler(logging.NullHandler())


def __getattr__(name: str) -> object:
    """Import a public name when it is first used: the command line needs no torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ortho_cli.runtime import engine, ortho_linear, pretrained

    homes = {"OrthoLinear": ortho_linear, "load": pretrained}
    return getattr(homes.get(name, engine), name)


def __dir__() -> list[str]:
    return sorted(__all__)
