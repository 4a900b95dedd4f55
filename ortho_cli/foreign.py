"""Checkpoints of others as sources: safetensors, torch's .bin, .pt and .pth, quantized or not.

A .bin comes from strangers and could run code when read, so only tensors and plain containers are
ever unpickled (torch's `weights_only`), and what else a file holds is refused by name. Zip archives
are mapped and read on demand, one shard at a time; files of before torch 1.6 cannot be mapped
and are held in memory whole.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ortho_cli import strict_json
from ortho_cli.adapters import refuse_adapter_names
from ortho_cli.checkpoint import (
    Checkpoint,
    ShardReader,
    check_index,
    model_name,
    open_checkpoint,
    read_index,
)
from ortho_cli.dequantize import dequantize
from ortho_cli.errors import CheckpointError, unreadable
from ortho_cli.source import (
    DTYPE_NAMES,
    RowReader,
    Source,
    SourceTensor,
    has_safetensors,
    mark,
    side_files,
)

BIN_SUFFIXES = (".bin", ".pt", ".pth")
BIN_FILE = "pytorch_model.bin"
BIN_INDEX = "pytorch_model.bin.index.json"
NESTED = ("state_dict", "model")  # where training scripts put the weights
REMAP_BYTES = 1 << 28  # a mapped file is opened anew, at a tensor's start, after this much


def open_foreign(path: Path) -> Source:
    """Describe a checkpoint that `ortho` did not write; weights are not read yet.

    Args:
        path: a .safetensors, .bin, .pt or .pth file, or a folder with whole or sharded weights.
    Raises:
        CheckpointError: nothing there, nothing readable, something that would run code, or parts
            that do not belong together.
    """
    try:
        if path.is_file() and path.suffix in BIN_SUFFIXES:
            source = _open_bins(path, [path], None)
        elif path.is_dir() and not has_safetensors(path) and (found := _find_bins(path)):
            source = _open_bins(path, *found)
        else:
            source = _open_safetensors(open_checkpoint(path))
    except OSError as error:
        hint = "give a model file or folder that you may read"
        raise unreadable(path, error, kind=CheckpointError, hint=hint) from error
    try:
        refuse_adapter_names(path, (tensor.name for tensor in source.tensors))
        return dequantize(source)
    except BaseException:
        source.close()
        raise


def _open_safetensors(checkpoint: Checkpoint) -> Source:
    path, names = checkpoint.path, {tensor.name for tensor in checkpoint.tensors}
    told = {k: v for shard in checkpoint.shards for k, v in shard.metadata.items()}
    extra = checkpoint.extra_files
    notes: tuple[str, ...] = ()
    if path.is_dir():
        extra, notes = side_files(path, {shard.name for shard in checkpoint.shards})
    reader = ShardReader(checkpoint)
    rows = RowReader(reader)
    try:
        tensors = tuple(rows.tensor(info, path=path) for info in checkpoint.tensors)
    except BaseException:
        reader.close()
        raise
    return Source(
        name=model_name(path),
        kind="safetensors",
        path=path,
        tensors=tensors,
        files=tuple(mark(shard.path) for shard in checkpoint.shards),
        config=checkpoint.config,
        extra_files=extra,
        notes=notes,
        aliases={k: v for k, v in told.items() if v in names and k not in names},
        close=reader.close,
    )


def _find_bins(folder: Path) -> tuple[list[Path], dict[str, str] | None] | None:
    """Name the files of a folder to read; one whole file before an index, as transformers does."""
    if (folder / BIN_FILE).is_file():
        return [folder / BIN_FILE], None
    if (folder / BIN_INDEX).is_file():
        weight_map = read_index(folder / BIN_INDEX, suffix=".bin")
        return [folder / name for name in sorted(set(weight_map.values()))], weight_map
    others = sorted(p for p in folder.iterdir() if p.suffix in BIN_SUFFIXES and p.is_file())
    if len(others) > 1:
        raise CheckpointError(
            f"`{folder}` holds {len(others)} files of weights and no index: "
            f"{', '.join(p.name for p in others[:4])}",
            hint=f"give one of the files, or restore {BIN_INDEX}",
        )
    return (others, None) if others else None


def _open_bins(path: Path, files: list[Path], weight_map: dict[str, str] | None) -> Source:
    folder = path if path.is_dir() else None
    config = None
    extra: tuple[tuple[str, int], ...] = ()
    notes: list[str] = []
    if folder is not None:
        if (folder / "config.json").exists():
            config = strict_json.read(folder / "config.json", constants=True)
        extra, left = side_files(folder, {file.name for file in files})
        notes += left
    untied = config is not None and config.get("tie_word_embeddings") is False
    marks, bins = tuple(mark(file) for file in files), _Bins()
    tensors: list[SourceTensor] = []
    where: dict[str, str] = {}
    aliases: dict[str, str] = {}
    for file in files:
        found, said = _load(file)
        notes += said
        shared = _shared(found)
        for name, tensor in found.items():
            if name in where:
                raise CheckpointError(
                    f"tensor `{name}` is in both `{where[name]}` and `{file.name}`",
                    hint="delete the stale shard",
                )
            where[name] = file.name
            if name in shared and not untied:
                aliases[name] = shared[name]
                continue
            tensors.append(bins.tensor(file, name, tensor))
        verb = "written out as copies, since config.json unties them" if untied else "kept once"
        notes += [f"`{n}` is the same memory as `{kept}`: {verb}" for n, kept in shared.items()]
    if folder is not None and weight_map is not None:
        check_index(folder, where, weight_map)
    return Source(
        name=model_name(path),
        kind="torch",
        path=path,
        tensors=tuple(tensors),
        files=marks,
        config=config,
        extra_files=extra,
        notes=tuple(notes),
        aliases=aliases,
        close=bins.close,
    )


class _Bins:
    """One file of tensors at a time, loaded when a row of it is wanted."""

    def __init__(self) -> None:
        self._file: Path | None = None
        self._tensors: dict[str, Tensor] = {}
        self._flat: tuple[str, Tensor] | None = None
        self._touched = 0  # bytes of the mapping that were read, and so count as our memory

    def tensor(self, file: Path, name: str, tensor: Tensor) -> SourceTensor:
        shape = tuple(tensor.shape)
        return SourceTensor(
            name=name,
            dtype=DTYPE_NAMES[tensor.dtype],
            shape=shape,
            read=lambda start, rows: self._read(file, name, start, rows),
        )

    def _read(self, file: Path, name: str, start: int, rows: int) -> Tensor:
        stale = start == 0 and self._touched > REMAP_BYTES and zipfile.is_zipfile(file)
        if self._file != file or stale:
            self.close()
            self._tensors, _ = _load(file)
            self._file = file
        tensor = self._tensors[name]
        if tensor.dim() > 2:
            # What cannot be viewed as rows is copied, once and not for every tile.
            if self._flat is None or self._flat[0] != name:
                self._flat = (name, tensor.reshape(-1, tensor.shape[-1]))
            tensor = self._flat[1]
        elif tensor.dim() < 2:
            tensor = tensor.reshape(-1, 1)
        found = tensor[start : start + rows]
        self._touched += found.nbytes
        return found.resolve_conj().resolve_neg().contiguous()

    def close(self) -> None:
        self._file, self._tensors, self._flat = None, {}, None
        self._touched = 0


def _load(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Load the tensors of a file, and say what else it held."""
    found = _unpickle(path)
    notes = []
    if isinstance(found, dict) and not any(isinstance(v, Tensor) for v in found.values()):
        inner = next((key for key in NESTED if isinstance(found.get(key), dict)), None)
        if inner is not None:
            notes = _left_out(path, [key for key in found if key != inner])
            notes.insert(0, f"the weights of `{path.name}` are those under `{inner}`")
            found = found[inner]
    if not isinstance(found, dict):
        raise CheckpointError(
            f"`{path}` holds a {type(found).__name__}, not a map of names to tensors",
            hint="save the model's state_dict()",
        )
    tensors = {
        name: value.detach()
        for name, value in found.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }
    if not tensors:
        raise CheckpointError(
            f"`{path}` holds no tensors among {len(found)} entries",
            hint="save the model's state_dict()",
        )
    for name, tensor in tensors.items():
        _check_plain(path, name, tensor)
    return tensors, notes + _left_out(path, [key for key in found if key not in tensors])


def _left_out(path: Path, keys: list[Any]) -> list[str]:
    if not keys:
        return []
    some = ", ".join(f"`{key}`" for key in keys[:4])
    more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
    return [f"entries of `{path.name}` that are no tensors are left out: {some}{more}"]


def _check_plain(path: Path, name: str, tensor: Tensor) -> None:
    plain = tensor.layout is torch.strided and tensor.device.type == "cpu"
    if not plain or tensor.dtype not in DTYPE_NAMES:
        what = f"{tensor.layout}, {tensor.device.type}, {tensor.dtype}".replace("torch.", "")
        raise CheckpointError(
            f"tensor `{name}` of `{path}` is {what}, which safetensors cannot hold",
            hint="save dense tensors of a plain dtype",
        )


def _unpickle(path: Path) -> Any:
    """Read what a file holds, if it is tensors and plain containers; nothing in it is ever run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own internals, on old files
            return torch.load(
                path, weights_only=True, mmap=zipfile.is_zipfile(path), map_location="cpu"
            )
    except (OSError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001 - a damaged file can make the reader raise anything
        told = str(error)
        named = re.search(r"(?:GLOBAL|[Gg]lobal:?|function|class) `?([A-Za-z_][\w.]*\.\w+)", told)
        if named:
            raise CheckpointError(
                f"`{path}` holds the global `{named[1]}`, which is no tensor; nothing was run",
                hint="do not trust the file; else save the model's state_dict() as safetensors "
                "where it was made",
            ) from None
        first = told.strip().splitlines()[0][:120] if told.strip() else type(error).__name__
        raise CheckpointError(
            f"`{path}` ({path.stat().st_size} bytes) is no readable torch file: {first}",
            hint="the file is cut or damaged, or of another kind; download it again",
        ) from None


def _shared(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Name each tensor that is the whole of an earlier one, with that one."""
    seen: dict[tuple[Any, ...], str] = {}
    shared = {}
    for name, tensor in tensors.items():
        if not tensor.numel():
            continue
        place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset())
        first = seen.setdefault((*place, tensor.shape, tensor.stride(), tensor.dtype), name)
        if first != name:
            shared[name] = first
    return shared
