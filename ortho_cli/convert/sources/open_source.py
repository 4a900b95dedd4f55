"""Opens any checkpoint for `ortho convert`: finds its format, and makes names and weights plain.

`FORMATS` lists the formats of others; each is one file of this room. An artifact of ours is opened
by `artifact.py`. Then prefixes of training wrappers are stripped from names, and quantized weights
become plain.
"""

from __future__ import annotations

from pathlib import Path

from ortho_cli.convert.sources import gguf, safetensors_files, torch_files
from ortho_cli.convert.sources.adapters import refuse_adapter, refuse_adapter_names
from ortho_cli.convert.sources.artifact import open_dense
from ortho_cli.convert.sources.base import Format, Source
from ortho_cli.convert.sources.dequantize import dequantize
from ortho_cli.convert.sources.wrappers import strip_wrappers
from ortho_cli.errors import CheckpointError, InternalError, UsageError, blamed
from ortho_cli.formats.artifact import is_artifact
from ortho_cli.split.sizes import DEFAULT_SIZES, Sizes
from ortho_cli.storage.sealing import Keys

# The first that recognizes a path opens it. Safetensors are last, since they take any path.
FORMATS: tuple[Format, ...] = (gguf.FORMAT, torch_files.FORMAT, safetensors_files.FORMAT)


def open_source(
    path: Path,
    *,
    alpha: float | None = None,
    keys: Keys | None = None,
    key: str | None = None,
    sizes: Sizes = DEFAULT_SIZES,
) -> Source:
    """Describe any checkpoint, or an artifact at one alpha; weights are not read yet.

    Args:
        path: of the checkpoint or artifact: a file or a folder.
        alpha: in [0, 1], for an artifact, and required there.
        keys: open a sealed ortho.
        key: where a file of torch.save keeps its weights; None looks for them.
        sizes: of tiles of an artifact's base.
    Returns:
        The source, which the caller closes.
    Raises:
        UsageError: an artifact without alpha, or alpha for anything else; a key that is not there,
            or for anything but a file of torch.save.
        CheckpointError: nothing there, nothing readable, an adapter, something that would run code,
            or parts that do not belong together.
        ArtifactError: see `open_dense`.
    """
    if is_artifact(path, damaged=True):
        if key is not None:
            raise _refuse_key(path, key, "an artifact")
        if alpha is None:
            raise UsageError(
                f"`{path}` is an artifact, and no --alpha says which of its models is meant",
                hint="--alpha 1 is the full model, --alpha 0 is base alone",
            )
        return open_dense(path, alpha, keys, sizes=sizes)
    if alpha is not None and path.exists():
        raise UsageError(
            f"`{path}` is no artifact, and --alpha {alpha:g} is for artifacts",
            hint="leave --alpha out",
        )
    refuse_adapter(path)
    with blamed(CheckpointError, path=path, hint="give a model file or folder that you may read"):
        source, is_final = _open(path, key)
    return source if is_final else _make_plain(source)


def _open(path: Path, key: str | None) -> tuple[Source, bool]:
    """Open a path by the first format that recognizes it; say whether the source is final."""
    for form in FORMATS:
        opener = form.recognize(path, key if form.takes_key else None)
        if opener is not None and key is not None and not form.takes_key:
            raise _refuse_key(path, key, f"read as {form.label}")
        if opener is not None:
            return opener(), form.is_final
    raise InternalError(f"no format opens `{path}`, and the last takes any path")


def _make_plain(source: Source) -> Source:
    """Strip the prefixes of wrappers, and replace quantized weights by what they stand for."""
    try:
        names = [tensor.name for tensor in source.tensors]
        refuse_adapter_names(source.path, names, source.config, strips=True)
        return dequantize(strip_wrappers(source))
    except BaseException:
        source.close()
        raise


def _refuse_key(path: Path, key: str, what: str) -> UsageError:
    return UsageError(
        f"--key {key} is for files of torch.save, and `{path}` is {what}", hint="leave --key out"
    )
