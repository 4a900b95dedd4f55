"""What a worker does with any tensor, however it splits one: read, carry over, write, digest."""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from ortho_cli.decompose.plan import CopyTensor, SplitTensor, TensorPlan
from ortho_cli.decompose.selection import IGNORED
from ortho_cli.errors import InternalError, NumericalError
from ortho_cli.events import Advanced, EventSink
from ortho_cli.formats.artifact import BASE_FILE, ORTHO_FILE
from ortho_cli.split.exact import widen
from ortho_cli.split.select import crow_indices
from ortho_cli.split.sizes import Sizes
from ortho_cli.storage.checkpoint import Checkpoint, ShardReader
from ortho_cli.storage.data_file import DataFile, TensorStream
from ortho_cli.storage.sealing import OrthoFile

NUMPY_DTYPES = {"U16": np.uint16, "I32": np.int32, "I64": np.int64}
# Words of each float dtype and their exponent bits; all set means infinity or NaN.
EXPONENTS = {
    "BF16": (np.uint16, 0x7F80),
    "F16": (np.uint16, 0x7C00),
    "F32": (np.uint32, 0x7F800000),
}

# Places of a tensor from which the selection's first bar is guessed.
SAMPLE_BLOCKS = 16

Entry = dict[str, Any]
Results = SimpleQueue[Entry | BaseException]
Check = Callable[[SplitTensor, Entry], None]  # raises where what was written is wrong


class Reference:
    """The model that base is made from instead of the source; threads may share it."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Open it."""
        self._reader = ShardReader(checkpoint.shards)
        self._tensors = {tensor.name: tensor for tensor in checkpoint.tensors}

    def read_into(self, buffer: memoryview, name: str, *, start: int) -> None:
        """Fill `buffer` with the tensor's bytes from `start` on."""
        self._reader.read_into(buffer, self._tensors[name], start=start)

    def check_unchanged(self) -> None:
        """Raise if a file was written to since its header was read."""
        self._reader.check_unchanged()

    def close(self) -> None:
        """Close its files."""
        self._reader.close()


class Worker(ABC):
    """Works on one tensor after another, with buffers of its own."""

    def __init__(
        self,
        reader: ShardReader,
        base: DataFile,
        ortho: OrthoFile,
        *,
        sizes: Sizes,
        reference: Reference | None = None,
        check: Check | None = None,
        stop: threading.Event,
        on_event: EventSink,
    ) -> None:
        """Say where tensors come from and go to, what checks what was written, and what stops."""
        self._check = check
        self._reader, self._base, self._ortho = reader, base, ortho
        self._sizes, self._reference = sizes, reference
        self._stop, self._on_event = stop, on_event
        self._piece, self._bits = np.empty(0, np.uint8), np.empty(0, np.uint8)

    def work(self, tensor: TensorPlan) -> Entry:
        """Carry out what the plan says of one tensor; return its journal entry."""
        if isinstance(tensor, CopyTensor):
            entry = self._copy(tensor)
        else:
            entry = self.split(tensor)
            if self._check is not None:
                self._check(tensor, entry)
        return entry

    @abstractmethod
    def split(self, tensor: SplitTensor) -> Entry:
        """Split one tensor: quantize it, and keep the k weights that lose most."""

    def _read(self, tensor: TensorPlan, buffer: memoryview, digest: blake3, *, start: int) -> None:
        if self._stop.is_set():
            raise InterruptedError  # reaches nobody: the run is being stopped
        self._reader.read_into(buffer, tensor.source, start=start)
        digest.update(buffer)

    def _copy(self, tensor: CopyTensor) -> Entry:
        """Carry a tensor over unchanged, through one buffer."""
        size = self._sizes.copy_bytes
        if not self._piece.size:
            self._piece, self._bits = np.empty(size, np.uint8), np.empty(size, np.uint8)
        # A weight that is NaN ruins the model wherever it is; other buffers may mean it.
        checked = tensor.name.endswith("weight") and tensor.reason != IGNORED
        digest, written, nbytes = blake3(), blake3(), tensor.source.nbytes
        for start in range(0, nbytes, size):
            raw = self._piece[: nbytes - start]
            self._read(tensor, raw.data, digest, start=start)
            if self._reference:
                self._reference.read_into(raw.data, tensor.name, start=start)
                written.update(raw.data)
            if checked and tensor.source.dtype in EXPONENTS:
                self._check_finite(tensor, raw, start)
            self._base.write(tensor.name, raw.data, start=start)
            self._on_event(Advanced(nbytes=raw.size))
        hexdigest = digest.hexdigest()
        there = written.hexdigest() if self._reference else hexdigest
        return {
            "name": tensor.name,
            "source_blake3": hexdigest,
            "blake3": {BASE_FILE: {tensor.name: there}},
        }

    def _check_finite(self, tensor: TensorPlan, raw: npt.NDArray[np.uint8], start: int) -> None:
        word, exponent = EXPONENTS[tensor.source.dtype]
        bits = raw.view(word)
        masked = np.bitwise_and(bits, exponent, out=self._bits[: raw.size].view(word))
        if masked.max() >= exponent:
            values = widen(bits, tensor.source.dtype)
            raise not_finite(tensor, values, start // bits.itemsize)

    def _read_sample(
        self, tensor: TensorPlan, buffer: memoryview, starts: list[int], count: int
    ) -> None:
        """Fill `buffer` with `count` rows from each of `starts` on, outside of any digest."""
        nbytes = len(buffer) // len(starts)
        for i, start in enumerate(starts):
            piece = buffer[i * nbytes : (i + 1) * nbytes]
            self._reader.read_into(piece, tensor.source, start=start * nbytes // count)

    def _entry(
        self,
        tensor: SplitTensor,
        source: blake3,
        base: list[TensorStream],
        measured: dict[str, float],
        indices: Any,
        values: Any,
    ) -> Entry:
        """Write what ortho keeps of a tensor, and make its journal entry.

        Args:
            tensor: what the plan says of it.
            source: digest of all its weights.
            base: what was written of it; its shape is there since before any worker began.
            measured: goes into the entry.
            indices: flat, ascending.
            values: at them.
        """
        shape = {shape_key(tensor): blake3(shape_bytes(tensor)).hexdigest()}
        return {
            "name": tensor.name,
            "source_blake3": source.hexdigest(),
            **measured,
            "blake3": {
                BASE_FILE: _digests_of(base) | shape,
                ORTHO_FILE: self._write_csr(tensor, indices, values),
            },
        }

    def _write_csr(self, tensor: SplitTensor, indices: Any, values: Any) -> dict[str, str]:
        rows, columns = tensor.source.shape
        if len(indices) != tensor.k or len(values) != tensor.k:
            raise InternalError(
                f"`{tensor.name}` keeps {len(indices)} positions and {len(values)} values, and "
                f"the plan says {tensor.k}"
            )
        parts = (crow_indices(indices, (rows, columns)), indices % columns, values)
        streams = []
        for spec, part in zip(tensor.ortho, parts, strict=True):
            stream = TensorStream(self._ortho, spec.key)
            stream.write(np.ascontiguousarray(part, NUMPY_DTYPES.get(spec.dtype)).data)
            streams.append(stream)
        return _digests_of(streams)


@contextmanager
def at_work(
    make: Callable[[], Worker],
    pending: Iterable[TensorPlan],
    results: Results,
    *,
    workers: int,
    stop: threading.Event,
) -> Iterator[None]:
    """Run the workers; on the way out wait until none of them can touch a file any more.

    Plain threads and queues: Ctrl-C inside `concurrent.futures.wait` can leave its locks held.

    Args:
        make: makes a worker, in its thread.
        pending: what they take, one tensor at a time, in this order.
        results: gets an entry for each, or what one raised.
        workers: threads.
        stop: set on the way out; they look at it at each tile.
    """
    todo: SimpleQueue[TensorPlan] = SimpleQueue()
    for tensor in pending:
        todo.put(tensor)

    def work() -> None:
        try:
            worker = make()
            while not stop.is_set():
                results.put(worker.work(todo.get_nowait()))
        except Empty:
            return
        except BaseException as error:  # noqa: BLE001 - raised again by the calling thread
            results.put(error)

    threads: list[threading.Thread] = []
    try:
        for _ in range(workers):
            thread = threading.Thread(target=work)
            threads.append(thread)
            thread.start()
        yield
    finally:
        stop.set()  # where all went well there is nothing left to stop
        while any(thread.is_alive() for thread in threads):
            with suppress(KeyboardInterrupt):  # they stop at the next tile
                for thread in threads:
                    if thread.is_alive():
                        thread.join()


def is_sound(entry: Entry, tensor: TensorPlan, *, curvature: bool = False) -> bool:
    """Tell a journal entry that we could have written from one that was tampered with."""
    measured = ["signal", "noise", "noise_kept"]
    if curvature:
        measured += ["curvature_noise", "curvature_noise_kept"]
    keys = {BASE_FILE: {spec.key for spec in tensor.base}}
    if tensor.ortho:
        keys[ORTHO_FILE] = {spec.key for spec in tensor.ortho}
    digests = entry.get("blake3")
    if not isinstance(digests, dict) or not all(isinstance(d, dict) for d in digests.values()):
        return False
    texts = [entry.get("source_blake3"), *(text for d in digests.values() for text in d.values())]
    numbers = [entry.get(key) for key in measured if tensor.ortho]
    return (
        {name: set(d) for name, d in digests.items()} == keys
        and all(isinstance(text, str) and len(text) == 64 for text in texts)
        and all(isinstance(n, float) and math.isfinite(n) for n in numbers)
    )


def _digests_of(streams: Iterable[TensorStream]) -> dict[str, str]:
    return {stream.key: stream.finish() for stream in streams}


def sample_rows(tensor: SplitTensor, elements: int) -> tuple[list[int], int] | None:
    """Choose rows all over a tensor from which the selection's first bar can be guessed.

    A guess only saves the selection from holding what it would drop again; it is worth its reading
    where the tensor has many tiles.

    Args:
        tensor: what the plan says of it.
        elements: about so many weights in all.
    Returns:
        Where to begin to read, and how many rows from each; None where it is not worth it.
    """
    rows, columns = tensor.source.shape
    count = max(1, elements // (SAMPLE_BLOCKS * columns))
    if tensor.k == 0 or rows < 16 * SAMPLE_BLOCKS * count:
        return None
    return [i * rows // SAMPLE_BLOCKS for i in range(SAMPLE_BLOCKS)], count


def shape_key(tensor: SplitTensor) -> str:
    """Name the tensor of base that holds a packed weight's shape."""
    return tensor.base[2].key


def shape_bytes(tensor: SplitTensor) -> memoryview:
    """Write down the shape of a weight that is packed."""
    return np.array(tensor.source.shape, np.int64).data.cast("B")


def first_bad(
    tensor: TensorPlan, values: npt.NDArray[np.float32], start: int
) -> tuple[float, list[int]]:
    """Find the first value that is not finite, and its index in the whole tensor."""
    flat = values.reshape(-1)
    first = int(np.flatnonzero(~np.isfinite(flat))[0])
    index = np.unravel_index(start + first, tensor.source.shape)
    return float(flat[first]), [int(i) for i in index]


def short_of(tensor: SplitTensor) -> InternalError:
    """Make the error for a pass that leaves ortho with less than the plan says."""
    return InternalError(
        f"a pass over all of `{tensor.name}` found fewer weights to keep than {tensor.k}"
    )


def not_finite(tensor: TensorPlan, values: npt.NDArray[np.float32], start: int) -> NumericalError:
    """Make the error for values from flat index `start` on, one of which is not finite."""
    value, position = first_bad(tensor, values, start)
    return NumericalError(
        f"tensor `{tensor.name}` of `{tensor.source.shard}` holds {value} at {position}",
        hint="repair the checkpoint, or carry the tensor over as it is by adding it to `ignore`",
    )
