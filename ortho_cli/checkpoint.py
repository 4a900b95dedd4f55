"""Safetensors checkpoints: an index that reads no data, a reader by offset, a layout before data.

The file format is safetensors' own: 8 bytes little-endian header length, a JSON header, then the
tensors back to back. Headers come from strangers, so every claim in them is checked against the
file's size before it is believed. Standard library only: `ortho inspect` and `--dry-run` import no
torch.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ortho_cli import strict_json
from ortho_cli.errors import (
    CheckpointError,
    ResourceError,
    is_starved,
    reason,
    shown,
    unreadable,
)
from ortho_cli.files import open_regular

# Bits an element, for every dtype that safetensors 0.8 knows.
DTYPE_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
MAX_HEADER = 100_000_000  # safetensors' own limit
PIECE = 1 << 20
MAX_DIMENSIONS = 64  # torch's own limit; a product of thousands of large numbers would take hours

INDEX_SUFFIX = ".safetensors.index.json"
WEIGHT_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".npy", ".npz", ".gguf", ".ggml",
    ".onnx", ".onnx_data", ".h5", ".msgpack", ".tflite", ".ot", ".index.json",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """Where a tensor lies: `nbytes` bytes from `offset` of file `shard`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    offset: int
    nbytes: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One safetensors file, as it was when its header was read."""

    name: str
    path: Path
    size: int
    mtime_ns: int
    metadata: dict[str, str]
    tensors: tuple[TensorInfo, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """An index over all shards; no tensor data is held."""

    path: Path
    shards: tuple[Shard, ...]
    tensors: tuple[TensorInfo, ...]
    config: dict[str, Any] | None

    @property
    def folder(self) -> Path:
        """The folder that holds the shards."""
        return self.path if self.path.is_dir() else self.path.parent


def open_checkpoint(path: Path) -> Checkpoint:
    """Index a `.safetensors` file, a folder with one, or a sharded folder with its index.

    Args:
        path: file or folder. A bare file stands alone: what lies beside it is not read.
    Returns:
        The index; tensors sorted by name.
    Raises:
        CheckpointError: nothing there, nothing readable, or a header or index that does not hold
            together.
    """
    try:
        return _open(path)
    except OSError as error:
        hint = "give a .safetensors file or a model folder that you may read"
        raise unreadable(path, error, kind=CheckpointError, hint=hint) from error


def _open(path: Path) -> Checkpoint:
    if not path.exists():
        raise CheckpointError(
            f"`{path}` does not exist", hint="give a .safetensors file or a model folder"
        )
    if path.is_file():
        if path.suffix != ".safetensors":
            raise CheckpointError(
                f"`{path}` is a `{path.suffix or 'plain'}` file, not .safetensors",
                hint="save it with `save_pretrained(..., safe_serialization=True)` first",
            )
        return _checkpoint(path, (read_shard(path),), config=None)
    if not path.is_dir():
        raise CheckpointError(
            f"`{path}` is neither a file nor a folder",
            hint="give a .safetensors file or a model folder",
        )
    names, weight_map = _find_shards(path)
    shards = tuple(read_shard(path / name) for name in names)
    config_path = path / "config.json"
    config = strict_json.read(config_path, constants=True) if config_path.exists() else None
    found = _checkpoint(path, shards, config=config)
    if weight_map is not None:
        where = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
        check_index(path, where, weight_map)
    return found


def _checkpoint(
    path: Path,
    shards: tuple[Shard, ...],
    *,
    config: dict[str, Any] | None,
) -> Checkpoint:
    found: dict[str, TensorInfo] = {}
    for tensor in (tensor for shard in shards for tensor in shard.tensors):
        if not tensor.numel:
            raise CheckpointError(
                f"tensor `{tensor.name}` of `{path}` has shape {list(tensor.shape)}: no elements",
                hint="remove it from the checkpoint",
            )
        other = found.setdefault(tensor.name, tensor)
        if other is not tensor:
            raise CheckpointError(
                f"tensor `{tensor.name}` is in both `{other.shard}` and `{tensor.shard}`",
                hint="delete the stale shard, or the copy",
            )
    if not found:
        raise CheckpointError(f"`{path}` holds no tensors", hint="is this the right file?")
    return Checkpoint(
        path=path,
        shards=shards,
        tensors=tuple(found[name] for name in sorted(found)),
        config=config,
    )


def _find_shards(folder: Path) -> tuple[list[str], dict[str, str] | None]:
    """Name the files to read: one whole file before an index, as transformers does."""
    if (folder / "model.safetensors").is_file():
        return ["model.safetensors"], None
    indexes = sorted(p.name for p in folder.glob("*" + INDEX_SUFFIX))
    if len(indexes) == 1:
        weight_map = read_index(folder / indexes[0])
        return sorted(set(weight_map.values())), weight_map
    files = sorted(p.name for p in folder.glob("*.safetensors"))
    if not indexes and len(files) == 1:
        return files, None
    if indexes:
        raise CheckpointError(
            f"`{folder}` holds {len(indexes)} indexes: {', '.join(indexes)}", hint="keep one"
        )
    if files:
        raise CheckpointError(
            f"`{folder}` holds {len(files)} .safetensors files and no index: "
            f"{', '.join(files[:4])}",
            hint="give one of the files, or restore model.safetensors.index.json",
        )
    foreign = sorted(p.name for p in folder.iterdir() if p.suffix in WEIGHT_SUFFIXES)
    held = f"only {', '.join(foreign[:4])}" if foreign else "no weights"
    raise CheckpointError(
        f"`{folder}` holds no .safetensors file, {held}",
        hint="save the model with `save_pretrained(..., safe_serialization=True)` first",
    )


def read_index(path: Path, *, suffix: str = ".safetensors") -> dict[str, str]:
    """Read a weight_map; every file in it is a plain name inside the index's folder and exists."""
    weight_map = strict_json.read(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"`{path}` has no `weight_map`", hint="restore the index that came with the model"
        )
    for name, file in weight_map.items():
        if not isinstance(file, str) or file != Path(file).name or not file.endswith(suffix):
            raise CheckpointError(
                f"`{path}` sends tensor `{name}` to {shown(file)}, which is not a {suffix} name "
                f"in its folder",
                hint="shards must lie beside the index",
            )
    for file in sorted(set(weight_map.values())):
        if not (path.parent / file).is_file():
            raise CheckpointError(
                f"`{path}` names `{file}`, which is not there", hint="download the missing shard"
            )
    return weight_map


def check_index(folder: Path, where: dict[str, str], weight_map: dict[str, str]) -> None:
    """Refuse an index that does not say of every tensor where it is."""
    for name in sorted(weight_map.keys() - where.keys()):
        raise CheckpointError(
            f"tensor `{name}` is in the index of `{folder}` and not in `{weight_map[name]}`",
            hint="the shard is of another version; download it again",
        )
    for name in sorted(name for name in where if weight_map.get(name, where[name]) != where[name]):
        raise CheckpointError(
            f"tensor `{name}` is in `{where[name]}` and the index of `{folder}` says "
            f"`{weight_map[name]}`",
            hint="the index is of another version; download it again",
        )
    for name in sorted(where.keys() - weight_map.keys()):
        raise CheckpointError(
            f"tensor `{name}` is in `{where[name]}` and not in the index of `{folder}`",
            hint="the index is of another version; download it again",
        )


def read_shard(path: Path) -> Shard:
    """Read and check one safetensors header.

    Raises:
        CheckpointError: the header is cut, too long, not JSON, or names a dtype, shape or byte
            range that is impossible; tensors overlap, leave holes or do not end where the file
            ends.
    """
    again = "the file is cut or damaged; download it again"
    with open_regular(path) as file:
        status = os.fstat(file.fileno())
        if status.st_size < 8:
            raise CheckpointError(
                f"`{path}` has {status.st_size} bytes; a header alone takes 8", hint=again
            )
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER or length > status.st_size - 8:
            limit = min(MAX_HEADER, status.st_size - 8)
            raise CheckpointError(
                f"`{path}` claims a header of {length} bytes where {limit} fit", hint=again
            )
        raw = file.read(length)
    if not raw.startswith(b"{"):
        raise CheckpointError(
            f"the header of `{path}` starts with {raw[:1]!r}, not b'{{'", hint=again
        )
    header = strict_json.parse(raw, what=f"the header of `{path}`", hint=again)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise CheckpointError(f"`__metadata__` of `{path}` is not a map of strings", hint=again)
    tensors = [
        _parse_tensor(
            path, name, entry, data_start=8 + length, data_size=status.st_size - 8 - length
        )
        for name, entry in header.items()
    ]
    _check_coverage(path, tensors, data_start=8 + length, size=status.st_size)
    return Shard(
        name=path.name,
        path=path,
        size=status.st_size,
        mtime_ns=status.st_mtime_ns,
        metadata=metadata,
        tensors=tuple(tensors),
    )


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _parse_tensor(
    path: Path, name: str, entry: object, *, data_start: int, data_size: int
) -> TensorInfo:
    def bad(what: str) -> CheckpointError:
        return CheckpointError(
            f"tensor `{name}` of `{path}` {what}", hint="the file is damaged or not safetensors"
        )

    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise bad("is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise bad(f"has dtype {shown(dtype)}, which is none of {', '.join(DTYPE_BITS)}")
    if not isinstance(shape, list) or not all(map(_is_count, shape)):
        raise bad(f"has shape {shown(shape)}, which is not a list of counts")
    if len(shape) > MAX_DIMENSIONS:
        raise bad(f"has {len(shape)} dimensions, where {MAX_DIMENSIONS} are the most")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise bad(f"has data_offsets {shown(offsets)}, which are not two counts")
    begin, end = offsets
    if not begin <= end <= data_size:
        raise bad(f"claims bytes {begin} to {end} of {data_size}")
    needed = math.prod(shape) * DTYPE_BITS[dtype]
    if needed != 8 * (end - begin):
        raise bad(f"has {end - begin} bytes where {dtype} {shown(shape)} takes {needed // 8}")
    return TensorInfo(
        name=name,
        dtype=dtype,
        shape=tuple(shape),
        shard=path.name,
        offset=data_start + begin,
        nbytes=end - begin,
    )


def _check_coverage(path: Path, tensors: list[TensorInfo], *, data_start: int, size: int) -> None:
    position, previous = data_start, "the header"
    for tensor in sorted(tensors, key=lambda t: (t.offset, t.nbytes)):
        if tensor.offset != position:
            what = "overlaps" if tensor.offset < position else "leaves a hole after"
            raise CheckpointError(
                f"tensor `{tensor.name}` of `{path}` {what} {previous} (starts at byte "
                f"{tensor.offset}, not {position})",
                hint="the file is damaged or not safetensors",
            )
        position, previous = tensor.offset + tensor.nbytes, f"`{tensor.name}`"
    if position != size:
        raise CheckpointError(
            f"the tensors of `{path}` end at byte {position} and the file at {size}",
            hint="the file is cut or has something appended; download it again",
        )


class ShardReader:
    """Reads byte ranges of shards into buffers of the caller; threads may share it."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Open every shard and make sure each is still the file whose header was read."""
        self._shards = {shard.name: shard for shard in checkpoint.shards}
        self._fds: dict[str, int] = {}
        try:
            for shard in checkpoint.shards:
                self._fds[shard.name] = os.open(
                    shard.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)
                )
            self.check_unchanged()
        except BaseException:
            self.close()
            raise

    def read_into(self, buffer: memoryview, tensor: TensorInfo, *, start: int) -> None:
        """Fill `buffer` with the tensor's bytes from `start` on."""
        fill(self._fds[tensor.shard], buffer, tensor.offset + start, what=f"`{tensor.shard}`")

    def pieces(self, tensor: TensorInfo) -> Iterator[memoryview]:
        """Yield a tensor's bytes piece by piece, in one buffer."""
        buffer = memoryview(bytearray(min(PIECE, tensor.nbytes)))
        for start in range(0, tensor.nbytes, PIECE):
            piece = buffer[: tensor.nbytes - start]
            self.read_into(piece, tensor, start=start)
            yield piece

    def digest(self, tensor: TensorInfo) -> str:
        """Take the BLAKE3 of a tensor's bytes."""
        from blake3 import blake3

        digest = blake3()
        for piece in self.pieces(tensor):
            digest.update(piece)
        return digest.hexdigest()

    def check_unchanged(self) -> None:
        """Raise if a shard was replaced, cut or written to since its header was read."""
        for name, shard in self._shards.items():
            now = os.fstat(self._fds[name])
            if (now.st_size, now.st_mtime_ns) != (shard.size, shard.mtime_ns):
                raise CheckpointError(
                    f"`{shard.path}` changed while it was read ({shard.size} bytes before, "
                    f"{now.st_size} now)",
                    hint="let whatever writes it finish, then start again",
                )

    def close(self) -> None:
        """Close every shard."""
        while self._fds:
            os.close(self._fds.popitem()[1])


def metadata_of(path: Path) -> dict[str, str] | None:
    """Read the metadata of a safetensors file; None where it is none that can be read.

    Raises:
        OSError: the system lacks something, so that nothing can be told of any file.
    """
    try:
        return read_shard(path).metadata
    except CheckpointError:
        return None
    except OSError as error:
        if is_starved(error):
            raise
        return None


def check_in_place(checkpoint: Checkpoint) -> None:
    """Raise if what bears a shard's name is not the file, or not as, its header was read from."""
    ShardReader(checkpoint).close()


def fill(fd: int, buffer: memoryview, offset: int, *, what: str) -> None:
    """Read exactly `len(buffer)` bytes at `offset`.

    Raises:
        CheckpointError: the file ends before.
        ResourceError: the disk fails; work so far is as good as it was.
    """
    done = 0
    while done < len(buffer):
        try:
            got = os.preadv(fd, [buffer[done:]], offset + done)
        except OSError as error:
            raise ResourceError(
                f"cannot read {what} at byte {offset + done}: {reason(error)}",
                hint="look at the disk it lies on, then repeat the same command",
            ) from error
        if got == 0:
            raise CheckpointError(
                f"{what} ends at byte {offset + done} where {len(buffer) - done} more were "
                f"promised",
                hint="the file was cut while it was read",
            )
        done += got


MODEL_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf")
_UNSHARDED = re.compile(r"-\d{5}-of-\d{5}$")


def model_name(path: Path) -> str:
    """Name a model by its file or folder: `SmolLM2/` and `SmolLM2.safetensors` are both SmolLM2."""
    path = Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would follow a link to its blob's name
    if path.suffix == ".tar" and Path(path.stem).suffix in MODEL_SUFFIXES:  # as in .pth.tar
        path = path.with_suffix("")
    return _UNSHARDED.sub("", path.stem) if path.suffix in MODEL_SUFFIXES else path.name


_HUB_FOLDER = re.compile(r"(?:models|datasets|spaces)--(?:.*--)?(.+)")
_HUB_PARTS = ("snapshots", "blobs", "refs")


def hub_name(path: Path) -> str | None:
    """Name the repository of the Hub in whose cache a path lies; None for any other place.

    The cache holds `models--org--name/snapshots/<revision>/`, whose files are links to `blobs/`.
    A folder inside the snapshot adds its name: `name-transformer`.
    """
    places = [Path(os.path.abspath(path))]  # noqa: PTH100 - files are links out of the snapshot
    with contextlib.suppress(OSError, RuntimeError):  # a link that leads round in a circle
        places.append(path.resolve())
    for parts in (place.parts for place in places):
        for at, part in enumerate(parts):
            found, inside = _HUB_FOLDER.fullmatch(part), parts[at + 1 :]
            if found and (not inside or inside[0] in _HUB_PARTS):
                more = inside[2:] if inside[:1] == ("snapshots",) else ()
                return "-".join((found[1], *(more[:-1] if path.is_file() else more)))
    return None
