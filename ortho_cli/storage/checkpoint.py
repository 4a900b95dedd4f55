"""Reading safetensors checkpoints: an index of headers, and a reader of byte ranges.

The file format is safetensors' own: 8 bytes of header length, little-endian, a JSON header, then
the tensors back to back. Headers come from strangers: every claim in them is checked against the
file's size before it is used. Standard library only, since `ortho inspect` and `--dry-run` import
no torch.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ortho_cli.errors import (
    CheckpointError,
    ResourceError,
    blamed,
    is_starved,
    reason,
    shown,
    way_out,
)
from ortho_cli.split.dtypes import DTYPES
from ortho_cli.storage import folders, hints, hub, sniff, strict_json
from ortho_cli.storage.untrusted import open_regular

MAX_HEADER = 100_000_000  # safetensors' own limit
PIECE = 1 << 20
MAX_DIMENSIONS = 64  # torch's own limit; a product of thousands of large numbers would take hours


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """The place of a tensor: `nbytes` bytes from `offset` of file `shard`."""

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
    config: dict[str, object] | None
    notes: tuple[str, ...] = ()  # what is unusual, and read all the same

    @property
    def folder(self) -> Path:
        """The folder that holds the shards."""
        return self.path if self.path.is_dir() else self.path.parent


def open_checkpoint(path: Path) -> Checkpoint:
    """Index a `.safetensors` file, a folder with one, or a sharded folder with its index.

    Args:
        path: file or folder. Of a bare file, nothing beside it is read.
    Returns:
        The index; tensors sorted by name.
    Raises:
        CheckpointError: nothing there, nothing readable, or a header or index that does not hold
            together.
    """
    hint = "give a .safetensors file or a model folder that you may read"
    with blamed(CheckpointError, path=path, hint=hint):
        return _open(path)


def _open(path: Path) -> Checkpoint:
    if not path.exists():
        if path.is_symlink():
            raise CheckpointError(
                f"`{path}` is a link to `{path.readlink()}`, which is not there",
                hint=hints.fetch(path),
            )
        raise CheckpointError(
            f"`{path}` does not exist",
            hint=hub.advice(path) or "give a .safetensors file or a model folder",
        )
    if path.is_file():
        notes = []
        if path.suffix != folders.SUFFIX:
            if sniff.kind_of_file(path) != sniff.SAFETENSORS:
                raise folders.refuse_file(path)
            notes.append(f"`{path.name}` is read as safetensors, which it holds")
        if folders.is_part(path) and "-of-00001" not in path.name:
            notes.append(f"`{path.name}` is one shard of several; its folder is the whole model")
        return _checkpoint(path, (read_shard(path),), folders.Choice(files=(), notes=tuple(notes)))
    if not path.is_dir():
        raise CheckpointError(
            f"`{path}` is neither a file nor a folder",
            hint="give a .safetensors file or a model folder",
        )
    config_path, noted = path / "config.json", list[str]()
    config = None
    if config_path.exists():
        config = strict_json.read(config_path, constants=True, notes=noted)
    choice = folders.choose(path, config)
    shards = tuple(read_shard(path / name, name=name) for name in choice.files)
    return _checkpoint(path, shards, choice, config=config, noted=noted)


def _checkpoint(
    path: Path,
    shards: tuple[Shard, ...],
    choice: folders.Choice,
    *,
    config: dict[str, object] | None = None,
    noted: Iterable[str] = (),
) -> Checkpoint:
    notes = [*noted, *choice.notes]
    found: dict[str, TensorInfo] = {}
    places = {shard.name: shard for shard in shards}
    for tensor in (tensor for shard in shards for tensor in shard.tensors):
        other = found.get(tensor.name)
        if other is not None:
            told = (choice.weight_map or {}).get(tensor.name)
            notes.append(_settle(places[other.shard], other, places[tensor.shard], tensor, told))
        found[tensor.name] = tensor  # as for transformers, the last one counts
    if not found:
        raise CheckpointError(f"`{path}` holds no tensors", hint="is this the right file?")
    if choice.weight_map is not None:
        where = {name: tensor.shard for name, tensor in found.items()}
        notes += check_index(path, where, choice.weight_map, config=config)
    return Checkpoint(
        path=path,
        shards=shards,
        tensors=tuple(found[name] for name in sorted(found)),
        config=config,
        notes=tuple(notes),
    )


def _settle(first: Shard, one: TensorInfo, last: Shard, other: TensorInfo, told: str | None) -> str:
    """Note which of two tensors of one name is read, or refuse where readers would differ."""
    both = f"tensor `{one.name}` is in both `{first.name}` and `{last.name}`"
    if told is not None and told != last.name and not _is_same(first, one, last, other):
        raise CheckpointError(
            f"{both}, with different values, and the index says `{told}`",
            hint="delete the stale shard, or the copy: readers differ on which of them counts",
        )
    if told is None and not _is_same(first, one, last, other):
        raise CheckpointError(
            f"{both}, with different values, and no index says which counts",
            hint="delete the stale shard, or the copy",
        )
    return f"{both}: that of `{last.name}` is read"


def _is_same(first: Shard, one: TensorInfo, last: Shard, other: TensorInfo) -> bool:
    """Tell whether two tensors are alike to the last bit."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with open_regular(first.path) as left, open_regular(last.path) as right:
        left.seek(one.offset)
        right.seek(other.offset)
        sizes = (min(PIECE, one.nbytes - start) for start in range(0, one.nbytes, PIECE))
        return all(left.read(size) == right.read(size) for size in sizes)


def check_index(
    folder: Path,
    where: Mapping[str, str],
    weight_map: Mapping[str, str],
    *,
    config: Mapping[str, object] | None = None,
) -> list[str]:
    """Hold an index against the files; say what is unusual, and refuse what a model would lack.

    transformers reads every tensor of the files that the index names, whatever it says of each.

    Args:
        folder: where the index is, for errors.
        where: the file of each tensor found.
        weight_map: the file of each tensor, as the index has it.
        config: what config.json says; a head that it ties needs no tensor of its own.
    Returns:
        Notes.
    Raises:
        CheckpointError: a tensor that a model would need is in no file.
    """
    lacking = sorted(weight_map.keys() - where.keys())
    for name in lacking:
        if not folders.is_spare(name, where, config):
            raise CheckpointError(
                f"tensor `{name}` is in the index of `{folder}` and not in `{weight_map[name]}`",
                hint=f"{hints.fetch(folder / weight_map[name])}: the shard is of another version",
            )
    moved = sorted(name for name in where if weight_map.get(name, where[name]) != where[name])
    extra = sorted(where.keys() - weight_map.keys())
    return [
        f"{what}: {hints.some(names)}"
        for what, names in (
            ("in the index, in no file, and not needed", lacking),
            ("in another file than the index says", moved),
            ("read, though the index does not list them", extra),
        )
        if names
    ]


def read_shard(path: Path, *, name: str | None = None) -> Shard:
    """Read and check one safetensors header.

    Args:
        path: the file.
        name: what the shard is called; the file's own name where it is not given.
    Raises:
        CheckpointError: the header is cut, too long, not JSON, or names a dtype, shape or byte
            range that is impossible; tensors overlap, leave holes or do not end where the file
            ends; or the file is of another kind.
    """
    again = f"the file is cut or damaged: {hints.fetch(path)}"
    name = name or path.name
    raw, status = _read_header(path, again)
    header = strict_json.parse(raw, what=f"the header of `{path}`", hint=again)
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise CheckpointError(f"`__metadata__` of `{path}` is not a map of strings", hint=again)
    start = 8 + len(raw)
    tensors = [
        _parse_tensor(
            path, key, entry, shard=name, data_start=start, data_size=status.st_size - start
        )
        for key, entry in header.items()
    ]
    _check_coverage(path, tensors, data_start=start, size=status.st_size)
    return Shard(
        name=name,
        path=path,
        size=status.st_size,
        mtime_ns=status.st_mtime_ns,
        metadata=metadata,
        tensors=tuple(tensors),
    )


def _read_header(path: Path, again: str) -> tuple[bytes, os.stat_result]:
    """Read the bytes of a header, once its length and first byte are known to be sound.

    Args:
        path: the file.
        again: what to do about one that is damaged.
    """
    with open_regular(path) as file:
        status = os.fstat(file.fileno())
        first = file.read(sniff.HEAD)
        kind = sniff.kind_of(first)
        if kind not in (None, sniff.SAFETENSORS):
            kind = sniff.kind_of_file(path) or kind
            raise CheckpointError(
                f"`{path}` is {kind}, not safetensors", hint=sniff.remedy(kind, path)
            )
        if status.st_size < 8:
            raise CheckpointError(
                f"`{path}` has {status.st_size} bytes; a header alone takes 8", hint=again
            )
        length = int.from_bytes(first[:8], "little")
        if length > MAX_HEADER or length > status.st_size - 8:
            limit = min(MAX_HEADER, status.st_size - 8)
            raise CheckpointError(
                f"`{path}` claims a header of {length} bytes where {limit} fit", hint=again
            )
        file.seek(8)
        raw = file.read(length)
    begin = raw.lstrip(b" \t\r\n")[:1]
    if begin != b"{":
        raise CheckpointError(
            f"the header of `{path}` starts with {begin!r}, not b'{{'", hint=again
        )
    return raw, status


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _parse_tensor(
    path: Path, name: str, entry: object, *, shard: str, data_start: int, data_size: int
) -> TensorInfo:
    def bad(what: str) -> CheckpointError:
        return CheckpointError(
            f"tensor `{name}` of `{path}` {what}", hint="the file is damaged or not safetensors"
        )

    if not isinstance(entry, dict) or not entry.keys() >= {"dtype", "shape", "data_offsets"}:
        raise bad("is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise bad(f"has dtype {shown(dtype)}, which is none of {', '.join(DTYPES)}")
    if not isinstance(shape, list) or not all(map(_is_count, shape)):
        raise bad(f"has shape {shown(shape)}, which is not a list of counts")
    if len(shape) > MAX_DIMENSIONS:
        raise bad(f"has {len(shape)} dimensions, where {MAX_DIMENSIONS} are the most")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise bad(f"has data_offsets {shown(offsets)}, which are not two counts")
    begin, end = offsets
    if not begin <= end <= data_size:
        raise bad(f"claims bytes {begin} to {end} of {data_size}")
    needed = math.prod(shape) * DTYPES[dtype].bits
    if needed != 8 * (end - begin):
        raise bad(f"has {end - begin} bytes where {dtype} {shown(shape)} takes {needed // 8}")
    return TensorInfo(
        name=name,
        dtype=dtype,
        shape=tuple(shape),
        shard=shard,
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

    def __init__(self, shards: Iterable[Shard]) -> None:
        """Open every shard and make sure each is still the file whose header was read.

        Where the system allows fewer open files, shards are opened when they are read, and those
        that were read longest ago are closed.
        """
        self._shards = {shard.name: shard for shard in shards}
        self._fds: dict[str, int] = {}  # the one used last is last, where not all fit
        self._users: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._room = _open_files()
        self._fit = len(self._shards) <= self._room
        try:
            if self._fit:
                for name, shard in self._shards.items():
                    self._fds[name] = _reopen(shard)
            else:
                self.check_unchanged()
        except BaseException:
            self.close()
            raise

    def read_into(self, buffer: memoryview, tensor: TensorInfo, *, start: int) -> None:
        """Fill `buffer` with the tensor's bytes, from byte `start` of it on."""
        with self._opened(tensor.shard) as fd:
            fill(fd, buffer, tensor.offset + start, what=f"`{tensor.shard}`")

    @contextmanager
    def _opened(self, name: str) -> Iterator[int]:
        """Hold a shard open; where there is no room, close one that no thread reads."""
        if self._fit:
            yield self._fds[name]
            return
        with self._lock:
            fd = self._fds.pop(name, None)
            if fd is None:
                idle = [other for other in self._fds if not self._users[other]]
                for other in idle[: max(0, len(self._fds) + 1 - self._room)]:
                    os.close(self._fds.pop(other))
                fd = _reopen(self._shards[name])
            self._fds[name] = fd
            self._users[name] += 1
        try:
            yield fd
        finally:
            with self._lock:
                self._users[name] -= 1

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
            if name in self._fds:
                _check_same(self._fds[name], shard)
            else:
                os.close(_reopen(shard))

    def close(self) -> None:
        """Close every shard."""
        while self._fds:
            os.close(self._fds.popitem()[1])


def _open_files() -> int:
    """Count the shards that may be open at once: a quarter of what the system allows a process."""
    try:
        import resource
    except ImportError:  # no such limit there
        return sys.maxsize
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else max(4, soft // 4)


def _reopen(shard: Shard) -> int:
    """Open a shard, and make sure that it is the file whose header was read."""
    try:
        fd = os.open(shard.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except OSError as error:
        if not is_starved(error):
            raise
        raise ResourceError(
            f"cannot read `{shard.path}`: {reason(error)}",
            hint=way_out(error, "repeat the same command"),
        ) from error
    try:
        _check_same(fd, shard)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _check_same(fd: int, shard: Shard) -> None:
    now = os.fstat(fd)
    if (now.st_size, now.st_mtime_ns) != (shard.size, shard.mtime_ns):
        raise CheckpointError(
            f"`{shard.path}` changed while it was read ({shard.size} bytes before, "
            f"{now.st_size} now)",
            hint="let whatever writes it finish, then start again",
        )


def metadata_of(path: Path) -> dict[str, str] | None:
    """Read the metadata of a safetensors file; None where it is none that can be read.

    Raises:
        OSError: the system is out of something, so that any file would seem unreadable.
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
    """Raise if a shard's name leads to another file by now, or to one that was changed."""
    ShardReader(checkpoint.shards).close()


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
                hint="look at that disk, then repeat the same command",
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
    """Name the repository of a path in the Hub's cache; None for a path elsewhere.

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
