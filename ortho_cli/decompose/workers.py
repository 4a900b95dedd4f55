"""Workers: each takes one tensor after another, splits it or carries it over, and digests it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from ortho_cli.decompose.edits import Edits
from ortho_cli.decompose.plan import CopyTensor, Plan, SplitTensor, TensorPlan
from ortho_cli.decompose.record import TensorRecord
from ortho_cli.decompose.selection import IGNORED
from ortho_cli.errors import InternalError
from ortho_cli.events import Advanced, EventSink
from ortho_cli.formats.curvature import Curvature, gram_of
from ortho_cli.formats.statistics import StatisticsReader
from ortho_cli.split import pipeline
from ortho_cli.split.exact import widen
from ortho_cli.split.faults import not_finite
from ortho_cli.split.pipeline import Given, Work
from ortho_cli.split.roundings import rounding_of
from ortho_cli.split.select import crow_indices
from ortho_cli.split.task import (
    EXPONENTS,
    Array,
    Inputs,
    SplitTask,
    TileKernel,
    TileResult,
    as_bytes,
)
from ortho_cli.storage.checkpoint import ShardReader, TensorInfo
from ortho_cli.storage.data_file import DataFile, TensorStream
from ortho_cli.storage.sealing import OrthoFile

NUMPY_DTYPES = {"U16": np.uint16, "I32": np.int32, "I64": np.int64}

Results = SimpleQueue[TensorRecord | BaseException]
Check = Callable[[SplitTensor, TensorRecord], None]  # raises where what was written is wrong


def task_of(
    plan: Plan,
    tensor: SplitTensor,
    *,
    edits: Edits | None = None,
    curvature: StatisticsReader | None = None,
) -> SplitTask:
    """Say what a plan wants done to a weight.

    Args:
        plan: of the whole model.
        tensor: of it.
        edits: codes that forgetting moves.
        curvature: holds the Gram matrices, where rounding compensates.
    """
    recipe = plan.recipe
    # Tuning begins with the codes of GPTQ.
    rounding = "gptq" if recipe.base.rounding == "tuned" else recipe.base.rounding
    return SplitTask(
        name=tensor.name,
        file=tensor.source.shard,
        shape=tensor.shape,
        dtype=tensor.source.dtype,
        bits=tensor.bits,
        group_size=plan.group_size,
        scale=tensor.scale,
        k=tensor.k,
        by_curvature=recipe.saliency.kind == "curvature",
        alone=recipe.forgets or recipe.base.alone,
        edit=(edits or {}).get(tensor.name),
        own_code=recipe.ortho.split == "unlearn",
        rounding=rounding,
        factor=partial(_factor, curvature, tensor.name, rounding) if recipe.compensates else None,
    )


def _factor(curvature: StatisticsReader | None, name: str, rounding: str) -> Any:
    import torch

    if curvature is None:
        raise InternalError("columns are to make up for one another, and no statistics are open")
    return rounding_of(rounding).prepare(torch.from_numpy(gram_of(curvature, name)), name=name)


class ShardRows:
    """Rows of a weight in a shard."""

    def __init__(self, reader: ShardReader, source: TensorInfo) -> None:
        """Say where they are."""
        self._reader, self._source = reader, source

    def read(self, buffer: Array, row: int) -> None:
        """Read rows."""
        start = row * buffer.shape[1] * buffer.itemsize
        self._reader.read_into(as_bytes(buffer), self._source, start=start)

    peek = read


class DigestedRows(ShardRows):
    """Rows that are digested in each pass; the first one tells of their bytes."""

    def __init__(
        self,
        reader: ShardReader,
        source: TensorInfo,
        *,
        stop: threading.Event | None = None,
        on_event: EventSink,
    ) -> None:
        """Say where they are, what stops the reading, and who is told of bytes."""
        super().__init__(reader, source)
        self._stop, self._on_event = stop, on_event
        self._passes, self._digest = 0, blake3()

    @property
    def digest(self) -> str:
        """BLAKE3 of what the last pass read."""
        return self._digest.hexdigest()

    def read(self, buffer: Array, row: int) -> None:
        """Read the next rows of a pass; it begins with row 0."""
        if self._stop is not None and self._stop.is_set():
            raise InterruptedError  # reaches nobody: the run is being stopped
        if row == 0:
            self._passes, self._digest = self._passes + 1, blake3()
        self.peek(buffer, row)
        self._digest.update(as_bytes(buffer))
        if self._passes == 1:
            self._on_event(Advanced(nbytes=buffer.nbytes))


class _BaseFile:
    """Codes and scales of a weight, on their way into base."""

    def __init__(self, base: DataFile, tensor: SplitTensor) -> None:
        self._base, self._specs = base, tensor.base[:2]
        self.streams: list[TensorStream] = []

    def write(self, result: TileResult, row: int) -> None:
        """Write the next rows of a pass; it begins with row 0."""
        if row == 0:
            self.streams = [TensorStream(self._base, spec.key) for spec in self._specs]
        for stream, part in zip(self.streams, (result.packed, result.scales), strict=True):
            stream.write(as_bytes(part))


class Worker:
    """Works on one tensor after another, with buffers of its own."""

    def __init__(
        self,
        plan: Plan,
        reader: ShardReader,
        base: DataFile,
        ortho: OrthoFile,
        *,
        make_kernel: Callable[[], TileKernel],
        curvature: StatisticsReader | None = None,
        reference: ShardReader | None = None,
        edits: Edits | None = None,
        check: Check | None = None,
        stop: threading.Event,
        on_event: EventSink,
    ) -> None:
        """Say where tensors come from and go to, and what is done to them.

        Args:
            plan: of the whole model.
            reader: of the source.
            base: gets codes and scales, and what is carried over.
            ortho: gets what is kept.
            make_kernel: makes what splits tiles, when it is first needed: another worker may copy
                while this one loads it.
            curvature: of the weights.
            reference: what base is made of instead of the source.
            edits: codes that forgetting moves.
            check: looks at what was written of a weight.
            stop: stops the work at the next tile.
            on_event: told of bytes and tensors.
        """
        self._plan, self._reader, self._base, self._ortho = plan, reader, base, ortho
        self._make_kernel = make_kernel
        self._kernel: TileKernel | None = None
        self._curvature, self._reference, self._edits = curvature, reference, edits
        self._references = {t.name: t for t in plan.reference.tensors} if plan.reference else {}
        self._check, self._stop, self._on_event = check, stop, on_event
        self._piece, self._bits = (np.empty(plan.sizes.copy_bytes, np.uint8) for _ in range(2))

    def work(self, tensor: TensorPlan) -> TensorRecord:
        """Carry out what the plan says of one tensor; return its record."""
        if isinstance(tensor, CopyTensor):
            return self._copy(tensor)
        record = self.split(tensor)
        if self._check is not None:
            self._check(tensor, record)
        return record

    def split(self, tensor: SplitTensor, given: Given | None = None) -> TensorRecord:
        """Split one weight, or write it again with codes and scales that are given."""
        self._kernel = kernel = self._kernel or self._make_kernel()
        source, name = tensor.source, tensor.name
        rows = DigestedRows(self._reader, source, stop=self._stop, on_event=self._on_event)
        near = Curvature(self._curvature, name) if self._curvature else None
        other = None
        if self._reference is not None:
            other = ShardRows(self._reference, self._references[name])
        base = _BaseFile(self._base, tensor)
        task = task_of(self._plan, tensor, edits=self._edits, curvature=self._curvature)
        work = Work(task, Inputs(rows, near, other), kernel, base.write)
        found = pipeline.split_weight(work, given)
        if near is not None:
            near.finish(rows.digest)
        shape = {shape_key(tensor): blake3(shape_bytes(tensor)).hexdigest()}  # written before
        return TensorRecord(
            name=name,
            source_blake3=rows.digest,
            base=_digests_of(base.streams) | shape,
            ortho=self._write_csr(tensor, found.indices, found.values),
            figures=found.figures,
        )

    def _copy(self, tensor: CopyTensor) -> TensorRecord:
        """Carry a tensor over unchanged, through one buffer."""
        size = self._plan.sizes.copy_bytes
        # A weight that is NaN ruins the model wherever it is; other buffers may mean it.
        checked = tensor.name.endswith("weight") and tensor.reason != IGNORED
        digest, written, nbytes = blake3(), blake3(), tensor.source.nbytes
        for start in range(0, nbytes, size):
            if self._stop.is_set():
                raise InterruptedError  # reaches nobody: the run is being stopped
            raw = self._piece[: nbytes - start]
            self._reader.read_into(raw.data, tensor.source, start=start)
            digest.update(raw.data)
            if self._reference:
                self._reference.read_into(raw.data, self._references[tensor.name], start=start)
                written.update(raw.data)
            if checked and tensor.source.dtype in EXPONENTS:
                self._check_finite(tensor, raw, start)
            self._base.write(tensor.name, raw.data, start=start)
            self._on_event(Advanced(nbytes=raw.size))
        hexdigest = digest.hexdigest()
        there = written.hexdigest() if self._reference else hexdigest
        return TensorRecord(name=tensor.name, source_blake3=hexdigest, base={tensor.name: there})

    def _check_finite(self, tensor: CopyTensor, raw: npt.NDArray[np.uint8], start: int) -> None:
        source, exponent = tensor.source, EXPONENTS[tensor.source.dtype]
        bits = raw.view(np.uint32 if source.dtype == "F32" else np.uint16)
        masked = np.bitwise_and(bits, exponent, out=self._bits[: raw.size].view(bits.dtype))
        if masked.max() >= exponent:
            values, first = widen(bits, source.dtype), start // bits.itemsize
            raise not_finite(tensor.name, source.shard, source.shape, values, first)

    def _write_csr(self, tensor: SplitTensor, indices: Array, values: Array) -> dict[str, str]:
        if len(indices) != tensor.k or len(values) != tensor.k:
            raise InternalError(
                f"`{tensor.name}` keeps {len(indices)} positions and {len(values)} values, and "
                f"the plan says {tensor.k}"
            )
        parts = (crow_indices(indices, tensor.shape), indices % tensor.shape[1], values)
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
        results: gets a record for each, or what one raised.
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


def _digests_of(streams: Iterable[TensorStream]) -> dict[str, str]:
    return {stream.key: stream.finish() for stream in streams}


def shape_key(tensor: SplitTensor) -> str:
    """Name the tensor of base that holds a packed weight's shape."""
    return tensor.base[2].key


def shape_bytes(tensor: SplitTensor) -> memoryview:
    """Write down the shape of a weight that is packed."""
    return np.array(tensor.source.shape, np.int64).data.cast("B")
