"""Offline checkpoint decomposition: a dense INT4 base and a sparse high-precision ortho stream."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ortho_cli.engine import Engine, at_alpha, set_alpha
    from ortho_cli.layers import OrthoLinear
    from ortho_cli.pretrained import load

__version__ = "0.1.0"
__all__ = ["Engine", "OrthoLinear", "__version__", "at_alpha", "load", "set_alpha"]


def __getattr__(name: str) -> Any:
    """Import the library's names when they are first used: the command line needs no torch."""
    if name in ("Engine", "at_alpha", "set_alpha"):
        from ortho_cli import engine as module
    elif name == "OrthoLinear":
        from ortho_cli import layers as module  # type: ignore[no-redef]
    elif name == "load":
        from ortho_cli import pretrained as module  # type: ignore[no-redef]
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
