"""Reading safetensors checkpoints: an index of headers, and a reader of byte ranges.

The file format is safetensors' own: 8 bytes of header length, little-endian, a JSON header, then
the tensors back to back. Headers come from strangers: every claim in them is checked against the
file's size before it is used. Standard library only, since `ortho inspect` and `--dry-run` import
no torch.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from ortho_cli.errors import (
    CheckpointError,
    ResourceError,
    blamed,
    is_starved,
    reason,
    shown,
    unreadable,
)
from ortho_cli.events import Advanced, EventSink, null_sink
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
            raise folders.no_file(path)
        raise CheckpointError(
            f"`{path}` does not exist",
            hint=hub.advice(path) or "give a .safetensors file or a model folder",
        )
    if not path.is_file() and not path.is_dir():
        raise CheckpointError(
            f"`{path}` is neither a file nor a folder",
            hint="give a .safetensors file or a model folder",
        )
    config, notes = None, list[str]()
    if path.is_file():
        folder, choice = path.parent, folders.choose_file(path)
    else:
        folder, config_path = path, path / "config.json"
        if config_path.exists():
            config = strict_json.read(config_path, constants=True, notes=notes)
        choice = folders.choose(path, config)
    shards = tuple(read_shard(folder / name, name=name) for name in choice.files)
    notes += choice.notes
    tensors: dict[str, TensorInfo] = {}
    places = {shard.name: shard for shard in shards}
    for tensor in (tensor for shard in shards for tensor in shard.tensors):
        other = tensors.get(tensor.name)
        if other is not None:
            listed = (choice.weight_map or {}).get(tensor.name)
            notes.append(_settle(places, other, tensor, listed))
        tensors[tensor.name] = tensor  # as for transformers, the last one counts
    if not tensors:
        raise CheckpointError(f"`{path}` holds no tensors", hint="is this the right file?")
    if choice.weight_map is not None:
        where = {name: tensor.shard for name, tensor in tensors.items()}
        notes += check_index(path, where, choice.weight_map, config=config)
    return Checkpoint(
        path=path,
        shards=shards,
        tensors=tuple(tensors[name] for name in sorted(tensors)),
        config=config,
        notes=tuple(notes),
    )


def _settle(
    shards: Mapping[str, Shard], first: TensorInfo, last: TensorInfo, listed: str | None
) -> str:
    """Note which of two tensors of one name is read, or refuse where readers would differ."""
    both = f"tensor `{first.name}` is in both `{first.shard}` and `{last.shard}`"
    if listed != last.shard and not _is_same(shards, first, last):
        says = "no index says which counts"
        hint = "delete the stale shard, or the copy"
        if listed is not None:
            says = f"the index says `{listed}`"
            hint += ": readers differ on which of them counts"
        raise CheckpointError(f"{both}, with different values, and {says}", hint=hint)
    return f"{both}: that of `{last.shard}` is read"


def _is_same(shards: Mapping[str, Shard], one: TensorInfo, other: TensorInfo) -> bool:
    """Tell whether two tensors are alike to the last bit."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with closing(ShardReader([shards[one.shard], shards[other.shard]])) as reader:
        return reader.digest(one) == reader.digest(other)


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
    name, again = name or path.name, f"the file is cut or damaged: {hints.fetch(path)}"
    raw, status = _read_header(path, again)
    header = strict_json.parse(raw, what=f"the header of `{path}`", hint=again)
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or {type(value) for value in metadata.values()} - {str}:
        raise CheckpointError(f"`__metadata__` of `{path}` is not a map of strings", hint=again)
    data = range(8 + len(raw), status.st_size)
    tensors = [_parse_tensor(path, key, entry, name, data) for key, entry in header.items()]
    _check_coverage(path, tensors, data)
    return Shard(
        name=name,
        path=path,
        size=status.st_size,
        mtime_ns=status.st_mtime_ns,
        metadata=metadata,
        tensors=tuple(tensors),
    )


def _read_header(path: Path, again: str) -> tuple[bytes, os.stat_result]:
    """Read the bytes of a header, once its length and first byte are known to be sound."""

    def bad(what: str) -> CheckpointError:
        return CheckpointError(what, hint=again)

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
            raise bad(f"`{path}` has {status.st_size} bytes; a header alone takes 8")
        length = int.from_bytes(first[:8], "little")
        limit = min(MAX_HEADER, status.st_size - 8)
        if length > limit:
            raise bad(f"`{path}` claims a header of {length} bytes where {limit} fit")
        file.seek(8)
        raw = file.read(length)
    begin = raw.lstrip(b" \t\r\n")[:1]
    if begin != b"{":
        raise bad(f"the header of `{path}` starts with {begin!r}, not b'{{'")
    return raw, status


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _parse_tensor(path: Path, name: str, entry: object, shard: str, data: range) -> TensorInfo:
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
    if not begin <= end <= len(data):
        raise bad(f"claims bytes {begin} to {end} of {len(data)}")
    needed = math.prod(shape) * DTYPES[dtype].bits
    if needed != 8 * (end - begin):
        raise bad(f"has {end - begin} bytes where {dtype} {shown(shape)} takes {needed // 8}")
    return TensorInfo(
        name=name,
        dtype=dtype,
        shape=tuple(shape),
        shard=shard,
        offset=data.start + begin,
        nbytes=end - begin,
    )


def _check_coverage(path: Path, tensors: list[TensorInfo], data: range) -> None:
    position, previous = data.start, "the header"
    for tensor in sorted(tensors, key=lambda t: (t.offset, t.nbytes)):
        if tensor.offset != position:
            what = "overlaps" if tensor.offset < position else "leaves a hole after"
            raise CheckpointError(
                f"tensor `{tensor.name}` of `{path}` {what} {previous} (starts at byte "
                f"{tensor.offset}, not {position})",
                hint="the file is damaged or not safetensors",
            )
        position, previous = tensor.offset + tensor.nbytes, f"`{tensor.name}`"
    if position != data.stop:
        raise CheckpointError(
            f"the tensors of `{path}` end at byte {position} and the file at {data.stop}",
            hint="the file is cut or has something appended; download it again",
        )


Blame = Callable[[], AbstractContextManager[None]]


class ShardReader:
    """Reads byte ranges of shards into buffers of the caller; threads may share it."""

    def __init__(self, shards: Iterable[Shard], *, blame: Blame = nullcontext) -> None:
        """Open every shard and make sure each is still the file whose header was read.

        Where the system allows fewer open files, shards are opened when they are read, and those
        that were read longest ago are closed.

        Args:
            shards: the files.
            blame: turns errors of reading into those of another kind of file, as `blamed` does.
        """
        self._blame = blame
        self._shards = {shard.name: shard for shard in shards}
        self._fds: dict[str, int] = {}  # the one used last is last
        self._users: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._room = _open_files()
        try:
            self.check_unchanged()
        except BaseException:
            self.close()
            raise

    def read_into(self, buffer: memoryview, tensor: TensorInfo, *, start: int = 0) -> None:
        """Fill `buffer` with the tensor's bytes, from byte `start` of it on."""
        with self._opened(tensor.shard) as fd:
            fill(fd, buffer, tensor.offset + start, what=f"`{tensor.shard}`")

    @contextmanager
    def _opened(self, name: str) -> Iterator[int]:
        """Hold a shard open; where there is no room, close one that no thread reads."""
        with self._lock, self._blame():
            fd = self._fds.pop(name, None)
            if fd is None:
                idle = [other for other in self._fds if not self._users[other]]
                for other in idle[: max(0, len(self._fds) + 1 - self._room)]:
                    os.close(self._fds.pop(other))
                fd = _reopen(self._shards[name])
            self._fds[name] = fd
            self._users[name] += 1
        try:
            with self._blame():
                yield fd
        finally:
            with self._lock:
                self._users[name] -= 1

    def pieces(self, tensor: TensorInfo) -> Iterator[memoryview]:
        """Yield a tensor's bytes piece by piece, in one buffer."""
        with self._opened(tensor.shard) as fd:
            yield from pieces(fd, tensor.offset, tensor.nbytes, what=f"`{tensor.shard}`")

    def digest(self, tensor: TensorInfo, on_event: EventSink = null_sink) -> str:
        """Take the BLAKE3 of a tensor's bytes, and tell of progress."""
        from blake3 import blake3

        digest = blake3()
        for piece in self.pieces(tensor):
            digest.update(piece)
            on_event(Advanced(nbytes=len(piece)))
        return digest.hexdigest()

    def check_unchanged(self) -> None:
        """Raise if a shard was replaced, cut or written to since its header was read."""
        for name, shard in self._shards.items():
            with self._opened(name) as fd:
                _check_same(fd, shard)

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
        again = "repeat the same command"
        raise unreadable(shard.path, error, kind=CheckpointError, hint=again) from error
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
    except (CheckpointError, OSError) as error:
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


def pieces(fd: int, offset: int, nbytes: int, *, what: str) -> Iterator[memoryview]:
    """Read `nbytes` bytes from `offset` on piece by piece, in one buffer; see `fill`."""
    buffer = memoryview(bytearray(max(0, min(PIECE, nbytes))))
    for start in range(0, nbytes, PIECE):
        piece = buffer[: nbytes - start]
        fill(fd, piece, offset + start, what=what)
        yield piece


MODEL_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf")
_UNSHARDED = re.compile(r"-\d{5}-of-\d{5}$")


def model_name(path: Path) -> str:
    """Name a model by its file or folder: `SmolLM2/` and `SmolLM2.safetensors` are both SmolLM2."""
    path = Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would follow a link to its blob's name
    if path.suffix == ".tar" and Path(path.stem).suffix in MODEL_SUFFIXES:  # as in .pth.tar
        path = path.with_suffix("")
    return _UNSHARDED.sub("", path.stem) if path.suffix in MODEL_SUFFIXES else path.name


_HUB_FOLDER = re.compile(r"(?P<kind>models|datasets|spaces)--(?P<owner>.*--)?(?P<name>.+)")
_HUB_PARTS = ("snapshots", "blobs", "refs")


def hub_name(path: Path) -> str | None:
    """Name the repository of a path in the Hub's cache; None for a path elsewhere.

    The cache holds `models--org--name/snapshots/<revision>/`, whose files are links to `blobs/`.
    A folder inside the snapshot adds its name: `name-transformer`.
    """
    folder, inside = _hub_folder(path)
    more = inside[2:] if inside[:1] == ("snapshots",) else ()
    return folder and "-".join((folder["name"], *(more[:-1] if path.is_file() else more)))


def hub_id(path: Path) -> str | None:
    """Name the repository of a model in the Hub's cache as the Hub does: `org/name`."""
    folder, _ = _hub_folder(path)
    if folder is None or folder["kind"] != "models":
        return None
    return f"{folder['owner'] or ''}{folder['name']}".replace("--", "/")


def _hub_folder(path: Path) -> tuple[re.Match[str] | None, tuple[str, ...]]:
    """Find the Hub's folder of a repository that a path is in, and the parts below it."""
    places = [Path(os.path.abspath(path))]  # noqa: PTH100 - files are links out of the snapshot
    with suppress(OSError, RuntimeError):  # a link that leads round in a circle
        places.append(path.resolve())
    for parts in (place.parts for place in places):
        for at, part in enumerate(parts):
            found, inside = _HUB_FOLDER.fullmatch(part), parts[at + 1 :]
            if found and (not inside or inside[0] in _HUB_PARTS):
                return found, inside
    return None, ()


def file_digest(path: Path, algorithm: str = "blake3", *, on_event: EventSink = null_sink) -> str:
    """Digest a file's bytes: BLAKE3, or SHA-256 as the older formats have it."""
    digest = blake3() if algorithm == "blake3" else hashlib.sha256()
    buffer = memoryview(bytearray(PIECE))
    with path.open("rb", buffering=0) as file:
        while got := file.readinto(buffer):
            digest.update(buffer[:got])
            on_event(Advanced(nbytes=got))
    return digest.hexdigest()
