"""Writing safetensors: the layout before the data, then any tensor in any order at its place.

safetensors' own writer holds the whole model in memory and orders metadata at random.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise

from blake3 import blake3

from ortho_cli.errors import CheckpointError, InternalError
from ortho_cli.split.dtypes import DTYPES
from ortho_cli.storage.checkpoint import MAX_HEADER, fill, pieces
from ortho_cli.storage.strict_json import MAX_PARSED, needed
from ortho_cli.storage.work_folder import WorkFolder, writing


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """A tensor that will be written."""

    key: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""
        return math.prod(self.shape) * DTYPES[self.dtype].bits // 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """The place of a tensor in a file to be written, from byte 0 of the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A safetensors file before its data: the header's bytes, each tensor's place, the size."""

    header: bytes
    regions: dict[str, Region]
    size: int


def plan_layout(specs: Iterable[TensorSpec], metadata: dict[str, str], *, room: int = 0) -> Layout:
    """Lay tensors out before their data exist: widest dtype first, then by name.

    Args:
        specs: the tensors.
        metadata: of the header.
        room: bytes before the data at least, a multiple of 8: where a header is to be written after
            them, and its length is not known yet. Spaces fill it.
    All tensors stay aligned. The same specs and metadata give the same bytes on every run; metadata
    keeps the order given.
    """
    ordered = sorted(specs, key=lambda spec: (-DTYPES[spec.dtype].bits, spec.key))
    starts = list(accumulate((spec.nbytes for spec in ordered), initial=0))
    header: dict[str, object] = {"__metadata__": metadata}
    for spec, offsets in zip(ordered, pairwise(starts), strict=True):
        entry = {"dtype": spec.dtype, "shape": list(spec.shape)}
        header[spec.key] = entry | {"data_offsets": list(offsets)}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * max(-len(text) % 8, room - 8 - len(text))
    if len(text) > MAX_HEADER or needed(text) > MAX_PARSED:
        raise CheckpointError(
            f"the output's header of {len(ordered)} tensors takes {len(text)} bytes, and "
            f"{needed(text) // 10**6} MB once parsed; readers take {MAX_HEADER} and "
            f"{MAX_PARSED // 10**6} MB",
            hint="split fewer of the tensors: name some in `ignore`",
        )
    raw = len(text).to_bytes(8, "little") + text
    regions = {
        s.key: Region(dtype=s.dtype, shape=s.shape, offset=len(raw) + start, nbytes=s.nbytes)
        for s, start in zip(ordered, starts[:-1], strict=True)
    }
    return Layout(header=raw, regions=regions, size=len(raw) + starts[-1])


def write_all(fd: int, data: memoryview | bytes, offset: int) -> None:
    """Write all of `data` at `offset`."""
    view = memoryview(data).cast("B")
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset + done)


class DataFile:
    """A data file, or a scratch file: bytes go to the place the layout gives them."""

    def __init__(
        self, work: WorkFolder, name: str, layout: Layout, *, mode: int, scratch: bool = False
    ) -> None:
        self.name = name
        self.fd = work.open_data(name, size=layout.size, mode=mode, scratch=scratch)
        self._path = (work.private if scratch else work.artifact) / name
        self.layout = layout

    def write(self, key: str, data: memoryview, *, start: int) -> None:
        """Write part of a tensor, `start` bytes into it."""
        self._put(data, self._place(key, start, data.nbytes))

    def read_into(self, key: str, buffer: memoryview, *, start: int) -> None:
        """Read back what was written of a tensor, from `start` bytes into it."""
        fill(self.fd, buffer, self._place(key, start, buffer.nbytes), what=f"`{self._path}`")

    def read(self, key: str) -> Iterator[memoryview]:
        """Yield what is written of a tensor, piece by piece, in one buffer."""
        region = self.layout.regions[key]
        return pieces(self.fd, region.offset, region.nbytes, what=f"`{self._path}`")

    def digest(self, key: str) -> str:
        """Take the BLAKE3 of what is written of a tensor."""
        digest = blake3()
        for piece in self.read(key):
            digest.update(piece)
        return digest.hexdigest()

    def write_header(self, header: bytes) -> None:
        """Write the header."""
        self._put(header, 0)

    def finish(self, layout: Layout) -> tuple[str, str | None]:
        """Write the header before tensors that are all here.

        Returns:
            BLAKE3 of the file, and None: it is not sealed.
        """
        self.write_header(layout.header)
        return GrowingDigest(self.fd).up_to(layout.size), None

    def _place(self, key: str, start: int, nbytes: int) -> int:
        """Find bytes of a tensor in the file; those outside of it would be another tensor's."""
        region = self.layout.regions[key]
        if start < 0 or start + nbytes > region.nbytes:
            raise InternalError(
                f"bytes {start} to {start + nbytes} of `{key}` are asked for, which has "
                f"{region.nbytes}"
            )
        return region.offset + start

    def _put(self, data: memoryview | bytes, offset: int) -> None:
        with writing(self._path):
            write_all(self.fd, data, offset)


class TensorStream:
    """Writes one tensor front to back and digests it on the way."""

    def __init__(self, output: DataFile, key: str) -> None:
        self.key = key
        self.digest = blake3()
        self._output = output
        self._position = 0

    def write(self, data: memoryview) -> None:
        """Write the next bytes of the tensor."""
        data = data.cast("B") if data.nbytes else memoryview(b"")
        self.digest.update(data)
        self._output.write(self.key, data, start=self._position)
        self._position += len(data)

    def finish(self) -> str:
        """See that the tensor is whole, and give its BLAKE3; what is left out would be zeros."""
        nbytes = self._output.layout.regions[self.key].nbytes
        if self._position != nbytes:
            raise InternalError(f"`{self.key}` has {self._position} of its {nbytes} bytes")
        return self.digest.hexdigest()


class GrowingDigest:
    """BLAKE3 of a file that is still growing."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._digest = blake3()
        self._position = 0

    def up_to(self, offset: int) -> str:
        """Take in the bytes before `offset`; return the digest of all so far."""
        for piece in pieces(self._fd, self._position, offset - self._position, what="the output"):
            self._digest.update(piece)
            self._position += len(piece)
        return self._digest.hexdigest()


class Frontier:
    """How far a file is complete from its first byte on."""

    def __init__(self, layout: Layout, owners: Mapping[str, str], *, done: Iterable[str]) -> None:
        """Begin at the end of the header, which is written.

        Args:
            layout: of the file, whose header is written.
            owners: the source tensor that each of its tensors is made from.
            done: owners all of whose tensors are written.
        """
        self._ends = [(r.offset + r.nbytes, owners[key]) for key, r in layout.regions.items()]
        self._done = set(done)
        self._next = 0
        self.offset = len(layout.header)

    def finish(self, owners: Iterable[str]) -> None:
        """Count the tensors of these owners as written; `offset` moves to the first gap."""
        self._done.update(owners)
        while self._next < len(self._ends) and self._ends[self._next][1] in self._done:
            self.offset = self._ends[self._next][0]
            self._next += 1
