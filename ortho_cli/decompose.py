"""The main job: walk every tensor tile by tile, split it, and write the artifact.

A tensor belongs to one worker from its first tile to its last, so its bytes cannot depend on how
many workers there are. While workers compute, the calling thread makes finished tensors durable and
hashes base as far as it is complete.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

from ortho_cli import __version__, artifact, ops
from ortho_cli.artifact import (
    BASE_FILE,
    CONFIG_FILE,
    INDEX_FILE,
    ORTHO_FILE,
    REPORT_FILE,
    canonical_json,
    module_of,
)
from ortho_cli.checkpoint import Checkpoint, ShardReader
from ortho_cli.errors import Interrupted, NumericalError
from ortho_cli.events import Advanced, EventSink, Finishing, Noted, Started, TensorDone, null_sink
from ortho_cli.journal import WorkFolder, recover, unwritable
from ortho_cli.plan import (
    TILE_ELEMENTS,
    Plan,
    TensorPlan,
    check_output,
    check_space,
    resolve_output,
    tile_rows,
)
from ortho_cli.selection import IGNORED
from ortho_cli.summary import make_config, make_report
from ortho_cli.writer import CHUNK, DataFile, GrowingSha256, TensorStream, plan_layout

TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
NUMPY_DTYPES = {"U16": np.uint16, "I32": np.int32, "I64": np.int64}
SCALES: dict[str, ops.Scales] = {"absmax": ops.absmax_scales, "mse": ops.mse_scales}

# How often finished tensors are made durable: a kill costs at most this much work.
COMMIT_SECONDS = 0.5

# Places of a tensor from which the selection's first bar is guessed.
SAMPLE_BLOCKS = 16

Entry = dict[str, Any]
Results = SimpleQueue[Entry | BaseException]


def decompose(
    plan: Plan,
    checkpoint: Checkpoint,
    out: Path,
    *,
    force: bool = False,
    on_event: EventSink = null_sink,
) -> Entry:
    """Carry a plan out.

    Args:
        plan: made from `checkpoint`.
        checkpoint: the source.
        out: the folder to make; appears only when complete.
        force: replace an artifact at `out`, and discard half-done work of another plan.
        on_event: told of progress, from any thread, one call at a time.
    Returns:
        The report, as written to report.json.
    Raises:
        CheckpointError: the source changed or is shorter than its header says.
        NumericalError: a weight that is to be split is NaN or infinite.
        OutputExistsError: something is at `out`, or half-done work of another plan beside it.
        ResourceError: the disk is full or closed to us.
        Interrupted: Ctrl-C; finished tensors are kept.
    """
    out = resolve_output(out)
    recover(out)
    check_output(out, checkpoint, force=force)
    check_space(plan, out)
    identity = {
        "plan": plan.sha256,
        "source": [[shard.name, shard.size, shard.mtime_ns] for shard in checkpoint.shards],
        "version": [__version__, torch.__version__],
        "files": {BASE_FILE: plan.base.size, ORTHO_FILE: plan.ortho.size},
    }
    tensors = {tensor.name: tensor for tensor in plan.tensors}

    def is_sound(entry: Entry) -> bool:
        return entry["name"] in tensors and _is_sound(entry, tensors[entry["name"]])

    reader = ShardReader(checkpoint)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # parallel over tensors, not inside an operation
    try:
        with (
            WorkFolder(out, identity=identity, force=force, is_sound=is_sound) as work,
            _interruptible(plan, work),
        ):
            report = _Job(plan, checkpoint, reader, work, on_event).run()
            work.publish(may_replace=lambda there: force and artifact.is_artifact(there))
            return report
    finally:
        torch.set_num_threads(threads)
        reader.close()


@contextmanager
def _interruptible(plan: Plan, work: WorkFolder) -> Iterator[None]:
    """Turn Ctrl-C into an error that says how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        if work.published:
            raise Interrupted(f"interrupted when `{work.out}` was complete", hint="go on") from None
        done, total = len(work.done), len(plan.tensors)
        raise Interrupted(
            f"interrupted with {done} of {total} tensors finished",
            hint="repeat the same command to go on from there"
            if done
            else "nothing was finished; nothing is left behind",
        ) from None


class _Job:
    def __init__(
        self,
        plan: Plan,
        checkpoint: Checkpoint,
        reader: ShardReader,
        work: WorkFolder,
        on_event: EventSink,
    ) -> None:
        self._plan = plan
        self._checkpoint = checkpoint
        self._reader = reader
        self._work = work
        self._on_event = on_event
        self._event_lock = threading.Lock()
        self._stop = threading.Event()
        self._local = threading.local()
        self._base = DataFile(work, BASE_FILE, plan.base, mode=0o644)
        # What is withheld from others should not be readable by others.
        self._ortho = DataFile(work, ORTHO_FILE, plan.ortho, mode=0o600)

    def run(self) -> Entry:
        plan, done = self._plan, self._work.done
        for tensor in plan.tensors:
            if tensor.name in done and not self._is_intact(done[tensor.name]):
                del done[tensor.name]
        self._emit(
            Started(
                tensors=len(plan.tensors),
                resumed=len(done),
                bytes_total=plan.bytes_read,
                bytes_done=sum(t.source.nbytes for t in plan.tensors if t.name in done),
            )
        )
        self._base.write_header(plan.base.header)
        base_sha256 = self._work_through([t for t in plan.tensors if t.name not in done])
        self._emit(Finishing(step="digests"))
        self._reader.check_unchanged()
        entries = [done[tensor.name] for tensor in plan.tensors]
        digest = artifact.source_digest(
            (t.name, t.source.dtype, t.source.shape, done[t.name]["source_blake3"])
            for t in plan.tensors
        )
        self._ortho.write_header(self._ortho_header(source_digest=digest, base_sha256=base_sha256))
        ortho_sha256 = GrowingSha256(self._ortho.fd).up_to(plan.ortho.size)
        report = make_report(
            plan, entries, source_digest=digest, base_sha256=base_sha256, ortho_sha256=ortho_sha256
        )
        self._emit(Finishing(step="sync"))
        self._write_side_files(report)
        return report

    def _is_intact(self, entry: Entry) -> bool:
        """Tell whether the bytes of a tensor that an earlier run finished are still what it wrote."""
        for output in (self._base, self._ortho):
            for key, told in entry["blake3"].get(output.name, {}).items():
                digest = blake3()
                for piece in output.read(key):
                    digest.update(piece)
                if digest.hexdigest() != told:
                    return False
        return True

    def _ortho_header(self, **digests: str) -> bytes:
        metadata = artifact.ortho_metadata(
            plan_sha256=self._plan.sha256,
            recipe=canonical_json(self._plan.recipe.canonical()),
            version=__version__,
            **digests,
        )
        specs = (spec for tensor in self._plan.tensors for spec in tensor.ortho)
        header = plan_layout(specs, metadata).header
        assert len(header) == len(self._plan.ortho.header)
        return header

    def _work_through(self, pending: list[TensorPlan]) -> str:
        """Work on every pending tensor; return base's SHA-256."""
        frontier = _Frontier(self._plan)
        frontier.finish(self._work.done)
        digest = GrowingSha256(self._base.fd)
        finished: list[Entry] = []
        with self._workers(pending) as results:
            try:
                committed = time.monotonic()
                for _ in pending:
                    entry = self._next(results)
                    finished.append(entry)
                    frontier.finish([entry["name"]])
                    digest.up_to(frontier.offset)
                    if time.monotonic() - committed >= COMMIT_SECONDS:
                        self._commit(finished)
                        finished, committed = [], time.monotonic()
            except BaseException:
                self._stop.set()
                self._commit(finished)
                raise
        self._commit(finished)
        return digest.up_to(self._plan.base.size)

    @contextmanager
    def _workers(self, pending: list[TensorPlan]) -> Iterator[Results]:
        """Run the workers; on the way out wait until none of them can touch a file any more.

        Plain threads and queues: Ctrl-C inside `concurrent.futures.wait` can leave its locks held.
        """
        todo: SimpleQueue[TensorPlan] = SimpleQueue()
        results: Results = SimpleQueue()
        for tensor in pending:
            todo.put(tensor)

        def work() -> None:
            try:
                while not self._stop.is_set():
                    results.put(self._tensor(todo.get_nowait()))
            except Empty:
                return
            except BaseException as error:  # noqa: BLE001 - raised again by the calling thread
                results.put(error)

        threads: list[threading.Thread] = []
        try:
            for _ in range(self._plan.workers):
                thread = threading.Thread(target=work)
                threads.append(thread)
                thread.start()
            yield results
        finally:
            self._stop.set()  # where all went well there is nothing left to stop
            while any(thread.is_alive() for thread in threads):
                with suppress(KeyboardInterrupt):  # they stop at the next tile
                    for thread in threads:
                        if thread.is_alive():
                            thread.join()

    def _next(self, results: Results) -> Entry:
        result = results.get()
        if isinstance(result, BaseException):
            raise result
        return result

    def _commit(self, entries: list[Entry]) -> None:
        try:
            self._work.commit(entries)
        except OSError as error:
            raise unwritable(self._work.folder, error) from error

    def _emit(self, event: Any) -> None:
        with self._event_lock:
            self._on_event(event)

    def _tensor(self, tensor: TensorPlan) -> Entry:
        if not hasattr(self._local, "tile"):
            self._local.tile, self._local.tensor = ops.Scratch(), ops.Scratch()
        entry = self._copy(tensor) if tensor.reason is not None else self._split(tensor)
        self._emit(TensorDone(name=tensor.name))
        return entry

    def _read(self, tensor: TensorPlan, buffer: memoryview, digest: blake3, *, start: int) -> None:
        if self._stop.is_set():
            raise InterruptedError  # reaches nobody: the run is being stopped
        self._reader.read_into(buffer, tensor.source, start=start)
        digest.update(buffer)

    def _copy(self, tensor: TensorPlan) -> Entry:
        """Carry a tensor over unchanged, through one buffer."""
        scratch: ops.Scratch = self._local.tile
        dtype = TORCH_DTYPES.get(tensor.source.dtype)
        # A weight that is NaN ruins the model wherever it is; other buffers may mean it.
        if not tensor.name.endswith("weight") or tensor.reason == IGNORED:
            dtype = None
        digest, nbytes = blake3(), tensor.source.nbytes
        for start in range(0, nbytes, CHUNK):
            scratch.reset()
            raw = scratch((CHUNK,), torch.uint8)[: nbytes - start]
            piece = as_bytes(raw)
            self._read(tensor, piece, digest, start=start)
            if dtype is not None and not ops.all_finite(raw.view(dtype), empty=scratch):
                raise _not_finite(tensor, raw.view(dtype), start // dtype.itemsize)
            self._base.write(tensor.name, piece, start=start)
            self._emit(Advanced(nbytes=len(piece)))
        hexdigest = digest.hexdigest()
        return {
            "name": tensor.name,
            "source_blake3": hexdigest,
            "blake3": {BASE_FILE: {tensor.name: hexdigest}},
        }

    def _split(self, tensor: TensorPlan) -> Entry:
        """Split one tensor: quantize each tile, keep the k weights that lose most."""
        entry = self._split_above(tensor, self._guess_bar(tensor), on_event=self._emit)
        # Fewer than k weights above a guess that was too high: once more, without one.
        return entry or self._split_above(tensor, None, on_event=null_sink) or {}

    def _guess_bar(self, tensor: TensorPlan) -> float | None:
        """Guess from rows all over the tensor what residual the k-th largest will exceed.

        A guess only saves the selection from holding what it would drop again; it is worth its
        reading where the tensor has many tiles.
        """
        rows, columns = tensor.source.shape
        block = max(1, TILE_ELEMENTS // (2 * SAMPLE_BLOCKS * columns))
        if tensor.k == 0 or rows < 16 * SAMPLE_BLOCKS * block:
            return None
        scratch: ops.Scratch = self._local.tile
        scratch.reset()
        dtype = TORCH_DTYPES[tensor.source.dtype]
        raw = scratch((block * SAMPLE_BLOCKS, columns), dtype)
        for i in range(SAMPLE_BLOCKS):
            piece = as_bytes(raw[i * block : (i + 1) * block])
            start = i * rows // SAMPLE_BLOCKS * columns * dtype.itemsize
            self._reader.read_into(piece, tensor.source, start=start)
        residual = self._quantize(tensor, raw, scratch).residual.abs_().view(-1).numpy()
        wanted = tensor.k / tensor.source.numel * residual.size
        rank = math.ceil(1.5 * wanted + 3 * math.sqrt(wanted)) + 1  # rows differ: aim low
        if rank >= residual.size:
            return None
        return float(np.partition(residual, residual.size - rank)[residual.size - rank])

    def _quantize(self, tensor: TensorPlan, raw: Tensor, scratch: ops.Scratch) -> _Tile:
        weight = scratch(tuple(raw.shape), torch.float32).copy_(raw)
        scales = SCALES[str(tensor.scale)](
            weight, group_size=self._plan.group_size, dtype=raw.dtype, empty=scratch
        )
        codes = ops.quantize(weight, scales, empty=scratch)
        residual = ops.dequantize(codes, scales, empty=scratch).sub_(weight)
        return _Tile(weight=weight, scales=scales, codes=codes, residual=residual)

    def _split_above(
        self, tensor: TensorPlan, bar: float | None, *, on_event: EventSink
    ) -> Entry | None:
        """Split one tensor in one pass; None if fewer than k residuals exceed `bar`."""
        scratch: ops.Scratch = self._local.tile  # valid for one tile
        held: ops.Scratch = self._local.tensor  # valid for one tensor
        held.reset()
        rows, columns = tensor.source.shape
        dtype = TORCH_DTYPES[tensor.source.dtype]
        module = module_of(tensor.name)
        base = {
            part: TensorStream(self._base, f"{module}.{part}")
            for part in ("weight_packed", "weight_scale", "weight_shape")
        }
        digest, signal, noise = blake3(), 0.0, 0.0
        step = tile_rows(tensor.source.shape)
        bits = torch.int32 if dtype.itemsize == 4 else torch.int16
        top = ops.TopK(
            tensor.k,
            length=rows * columns,
            stretch=step * columns,
            payload=bits,
            bar=bar,
            empty=held,
        )
        for row in range(0, rows, step):
            scratch.reset()
            raw = scratch((min(step, rows - row), columns), dtype)
            self._read(tensor, as_bytes(raw), digest, start=row * columns * dtype.itemsize)
            tile = self._quantize(tensor, raw, scratch)
            if not ops.all_finite(tile.scales):
                raise _not_finite(tensor, tile.weight, row * columns)
            base["weight_packed"].write(as_bytes(ops.pack_int4(tile.codes, empty=scratch)))
            base["weight_scale"].write(as_bytes(tile.scales))
            signal += ops.squared_norm(tile.weight)
            noise += (tile_noise := ops.squared_norm(tile.residual))
            if not np.isfinite(tile_noise):
                raise _overflow(tensor, tile.residual, row * columns)
            # |r| orders like r^2 and neither underflows nor rounds.
            top.push(
                tile.residual.abs_().view(-1).numpy(),
                raw.view(bits).view(-1).numpy(),
                start=row * columns,
            )
            on_event(Advanced(nbytes=raw.nbytes))
        if top.short:
            return None
        base["weight_shape"].write(as_bytes(torch.tensor([rows, columns], dtype=torch.int64)))
        indices, kept, values = top.finish()
        ortho = self._write_csr(tensor, indices, values)
        kept_energy = float(np.square(kept, dtype=np.float64).sum())
        return {
            "name": tensor.name,
            "source_blake3": digest.hexdigest(),
            "signal": signal,
            "noise": noise,
            # Everything kept is exact; a difference of sums would not come out as 0.
            "noise_kept": noise if tensor.k == tensor.source.numel else min(kept_energy, noise),
            "blake3": {BASE_FILE: _digests(base.values()), ORTHO_FILE: ortho},
        }

    def _write_csr(self, tensor: TensorPlan, indices: Any, values: Any) -> dict[str, str]:
        rows, columns = tensor.source.shape
        parts = (ops.crow_indices(indices, (rows, columns)), indices % columns, values)
        streams = []
        for spec, part in zip(tensor.ortho, parts, strict=True):
            stream = TensorStream(self._ortho, spec.key)
            stream.write(np.ascontiguousarray(part, NUMPY_DTYPES.get(spec.dtype)).data)
            streams.append(stream)
        return _digests(streams)

    def _write_side_files(self, report: Entry) -> None:
        plan, checkpoint, work = self._plan, self._checkpoint, self._work
        try:
            for name, _ in plan.extra_files:
                work.copy_file(checkpoint.folder / name, name)
            if any(name == REPORT_FILE for name, _ in checkpoint.extra_files):
                self._emit(
                    Noted(
                        message=f"the source's own {REPORT_FILE} is not copied: the artifact "
                        f"has one"
                    )
                )
            if checkpoint.config is not None:
                work.write_file(CONFIG_FILE, _pretty(make_config(plan, checkpoint.config)))
            size = plan.base.size - len(plan.base.header)
            work.write_file(INDEX_FILE, _pretty(artifact.index(plan.base.regions, total_size=size)))
            work.write_file(REPORT_FILE, _pretty(report))
        except OSError as error:
            raise unwritable(work.artifact, error) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tile:
    """Some rows of a tensor, split: weight = dequantize(codes, scales) - residual."""

    weight: Tensor
    scales: Tensor
    codes: Tensor
    residual: Tensor


class _Frontier:
    """How far base is complete from its first byte on."""

    def __init__(self, plan: Plan) -> None:
        owners = {spec.key: tensor.name for tensor in plan.tensors for spec in tensor.base}
        self._ends = [
            (region.offset + region.nbytes, owners[key])
            for key, region in plan.base.regions.items()
        ]
        self._done: set[str] = set()
        self._next = 0
        self.offset = len(plan.base.header)

    def finish(self, names: Iterable[str]) -> None:
        self._done.update(names)
        while self._next < len(self._ends) and self._ends[self._next][1] in self._done:
            self.offset = self._ends[self._next][0]
            self._next += 1


def _is_sound(entry: Entry, tensor: TensorPlan) -> bool:
    """Tell a journal entry that we could have written from one that was tampered with."""
    keys = {BASE_FILE: {spec.key for spec in tensor.base}}
    if tensor.ortho:
        keys[ORTHO_FILE] = {spec.key for spec in tensor.ortho}
    digests = entry.get("blake3")
    if not isinstance(digests, dict) or not all(isinstance(d, dict) for d in digests.values()):
        return False
    texts = [entry.get("source_blake3"), *(text for d in digests.values() for text in d.values())]
    numbers = [entry.get(key) for key in ("signal", "noise", "noise_kept") if tensor.ortho]
    return (
        {name: set(d) for name, d in digests.items()} == keys
        and all(isinstance(text, str) and len(text) == 64 for text in texts)
        and all(isinstance(n, float) and math.isfinite(n) for n in numbers)
    )


def as_bytes(tensor: Tensor) -> memoryview:
    """Look at a tensor's bytes in place."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def _digests(streams: Iterable[TensorStream]) -> dict[str, str]:
    return {stream.key: stream.digest.hexdigest() for stream in streams}


def _pretty(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _not_finite(tensor: TensorPlan, values: Tensor, start: int) -> NumericalError:
    value, position = _first_bad(tensor, values, start)
    return NumericalError(
        f"tensor `{tensor.name}` of `{tensor.source.shard}` holds {value} at {position}",
        hint="repair the checkpoint, or carry the tensor over as it is by adding it to `ignore`",
    )


def _overflow(tensor: TensorPlan, residual: Tensor, start: int) -> NumericalError:
    _, position = _first_bad(tensor, residual, start)
    return NumericalError(
        f"tensor `{tensor.name}` of `{tensor.source.shard}` overflows {tensor.source.dtype} "
        f"when dequantized, at {position}",
        hint="add the tensor to `ignore`, or cast a float16 checkpoint to bfloat16",
    )


def _first_bad(tensor: TensorPlan, values: Tensor, start: int) -> tuple[float, list[int]]:
    """Find the first value that is not finite, and its index in the whole tensor."""
    flat = values.reshape(-1).float()
    first = int(torch.nonzero(~torch.isfinite(flat))[0])
    index = np.unravel_index(start + first, tensor.source.shape)
    return flat[first].item(), [int(i) for i in index]
