"""Workers: each takes one tensor after another, splits it or carries it over, and digests it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

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
from ortho_cli.split.task import EXPONENTS, Array, SplitTask, TileKernel, TileResult, as_bytes
from ortho_cli.split.task import Inputs as SplitInputs
from ortho_cli.storage.checkpoint import Checkpoint, ShardReader, TensorInfo
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
        columns=tensor.columns,
        fixed=(plan.shared or {}).get(tensor.name),
        by_curvature=recipe.saliency.kind == "curvature",
        alone=recipe.forgets or recipe.base.alone,
        edit=(edits or {}).get(tensor.name),
        own_code=recipe.ortho.split == "unlearn" and not recipe.keeps_columns,
        rounding=rounding,
        factor=partial(_factor, curvature, tensor.name, rounding) if recipe.compensates else None,
    )


def _factor(
    curvature: StatisticsReader | None, name: str, rounding: str, columns: Array | None
) -> Any:
    import torch

    if curvature is None:
        raise InternalError("columns are to make up for one another, and no statistics are open")
    # No name for the Gram matrix, which is let go as soon as it has been read.
    return rounding_of(rounding).prepare(
        torch.from_numpy(gram_of(curvature, name)), name=name, without=columns
    )


@dataclass
class ShardRows:
    """Rows of a weight in a shard."""

    reader: ShardReader
    source: TensorInfo

    def read(self, buffer: Array, row: int) -> None:
        """Read rows."""
        start = row * buffer.shape[1] * buffer.itemsize
        self.reader.read_into(as_bytes(buffer), self.source, start=start)

    peek = read


@dataclass
class DigestedRows(ShardRows):
    """Rows that are digested in each pass; the first one tells of their bytes."""

    stop: threading.Event | None = field(default=None, kw_only=True)  # stops the reading
    on_event: EventSink = field(kw_only=True)

    def __post_init__(self) -> None:
        self._passes, self._digest = 0, blake3()

    @property
    def digest(self) -> str:
        """BLAKE3 of what the last pass read."""
        return self._digest.hexdigest()

    def read(self, buffer: Array, row: int) -> None:
        """Read the next rows of a pass; it begins with row 0."""
        if self.stop is not None and self.stop.is_set():
            raise InterruptedError  # reaches nobody: the run is being stopped
        if row == 0:
            self._passes, self._digest = self._passes + 1, blake3()
        self.peek(buffer, row)
        self._digest.update(as_bytes(buffer))
        if self._passes == 1:
            self.on_event(Advanced(nbytes=buffer.nbytes))


class Inputs(NamedTuple):
    """The open files that a job reads."""

    source: ShardReader
    curvature: StatisticsReader | None
    reference: ShardReader | None

    def check_unchanged(self) -> None:
        """Raise if a file was written to since its header was read."""
        for opened in self:
            if opened:
                opened.check_unchanged()


@contextmanager
def open_inputs(plan: Plan, checkpoint: Checkpoint) -> Iterator[Inputs]:
    """Open what a plan reads: the source, and statistics and a reference where it has any."""
    with ExitStack() as stack:
        source = stack.enter_context(closing(ShardReader(checkpoint.shards)))
        curvature = reference = None
        if plan.statistics is not None:
            curvature = stack.enter_context(closing(StatisticsReader(plan.statistics)))
        if plan.reference is not None:
            reference = stack.enter_context(closing(ShardReader(plan.reference.shards)))
        yield Inputs(source, curvature, reference)


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


@dataclass(kw_only=True)
class Worker:
    """Works on one tensor after another, with buffers of its own."""

    plan: Plan  # of the whole model
    inputs: Inputs
    base: DataFile  # gets codes and scales, and what is carried over
    ortho: OrthoFile  # gets what is kept
    # Makes what splits tiles, when it is first needed: another worker may copy while this one loads
    # it.
    make_kernel: Callable[[], TileKernel]
    edits: Edits  # codes that forgetting moves
    check: Check  # looks at what was written of a weight
    stop: threading.Event  # stops the work at the next tile
    on_event: EventSink  # told of bytes and tensors
    _kernel: TileKernel | None = None

    def __post_init__(self) -> None:
        reference = self.plan.reference
        self._references = {t.name: t for t in reference.tensors} if reference else {}
        self._piece, self._bits = (np.empty(self.plan.sizes.copy_bytes, np.uint8) for _ in range(2))

    def work(self, tensor: TensorPlan) -> TensorRecord:
        """Carry out what the plan says of one tensor; return its record."""
        if isinstance(tensor, CopyTensor):
            return self._copy(tensor)
        record = self.split(tensor)
        self.check(tensor, record)
        return record

    def split(self, tensor: SplitTensor, given: Given | None = None) -> TensorRecord:
        """Split one weight, or write it again with codes and scales that are given."""
        self._kernel = kernel = self._kernel or self.make_kernel()
        name, (source, curvature, reference) = tensor.name, self.inputs
        rows = DigestedRows(source, tensor.source, stop=self.stop, on_event=self.on_event)
        near = Curvature(curvature, name) if curvature else None
        other = ShardRows(reference, self._references[name]) if reference else None
        base = _BaseFile(self.base, tensor)
        task = task_of(self.plan, tensor, edits=self.edits, curvature=curvature)
        work = Work(task, SplitInputs(rows, near, other), kernel, base.write)
        found = pipeline.split_weight(work, given)
        if near is not None:
            near.finish(rows.digest)
        shape = blake3(shape_bytes(tensor)).hexdigest()  # it is there before any worker begins
        return TensorRecord(
            name=name,
            source_blake3=rows.digest,
            base=_digests_of(base.streams) | {shape_key(tensor): shape},
            ortho=self._write_ortho(tensor, found.indices, found.values),
            figures=found.figures,
        )

    def _copy(self, tensor: CopyTensor) -> TensorRecord:
        """Carry a tensor over unchanged, through one buffer."""
        size = self.plan.sizes.copy_bytes
        # A weight that is NaN ruins the model wherever it is; other buffers may mean it.
        checked = tensor.name.endswith("weight") and tensor.reason != IGNORED
        digest, written, nbytes = blake3(), blake3(), tensor.source.nbytes
        reference = self.inputs.reference
        for start in range(0, nbytes, size):
            if self.stop.is_set():
                raise InterruptedError  # reaches nobody: the run is being stopped
            raw = self._piece[: nbytes - start]
            self.inputs.source.read_into(raw.data, tensor.source, start=start)
            digest.update(raw.data)
            if reference:
                reference.read_into(raw.data, self._references[tensor.name], start=start)
                written.update(raw.data)
            if checked and tensor.source.dtype in EXPONENTS:
                self._check_finite(tensor, raw, start)
            self.base.write(tensor.name, raw.data, start=start)
            self.on_event(Advanced(nbytes=raw.size))
        hexdigest = digest.hexdigest()
        there = written.hexdigest() if reference else hexdigest
        return TensorRecord(name=tensor.name, source_blake3=hexdigest, base={tensor.name: there})

    def _check_finite(self, tensor: CopyTensor, raw: npt.NDArray[np.uint8], start: int) -> None:
        source, exponent = tensor.source, EXPONENTS[tensor.source.dtype]
        bits = raw.view(np.uint32 if source.dtype == "F32" else np.uint16)
        masked = np.bitwise_and(bits, exponent, out=self._bits[: raw.size].view(bits.dtype))
        if masked.max() >= exponent:
            values, first = widen(bits, source.dtype), start // bits.itemsize
            raise not_finite(tensor.name, source.shard, source.shape, values, first)

    def _write_ortho(self, tensor: SplitTensor, indices: Array, values: Array) -> dict[str, str]:
        wanted = tensor.k if tensor.columns is None else tensor.columns
        if len(indices) != wanted or len(values) != tensor.k:
            what = "positions" if tensor.columns is None else "columns"
            raise InternalError(
                f"`{tensor.name}` keeps {len(indices)} {what} and {len(values)} values, and "
                f"the plan says {wanted} and {tensor.k}"
            )
        parts = [indices % tensor.shape[1], values]
        if tensor.columns is None:
            parts.insert(0, crow_indices(indices, tensor.shape))
        streams = []
        for spec, part in zip(tensor.ortho, parts, strict=True):
            stream = TensorStream(self.ortho, spec.key)
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
