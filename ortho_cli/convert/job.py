"""`ortho convert`: any source, tile by tile, to a plain checkpoint that every tool reads.

The plan comes first and fixes every byte's place. Then each tensor goes through a tile of rows:
read, round once, write, digest. A killed run goes on after its last finished tensor and ends in the
same bytes.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ortho_cli.convert.plan import ROLE, ConvertPlan, ConvertTensor
from ortho_cli.convert.sources.base import TORCH_DTYPES, Source
from ortho_cli.errors import NumericalError
from ortho_cli.events import Advanced, EventSink, Finishing, Noted, Started, TensorDone, null_sink
from ortho_cli.split import quantize
from ortho_cli.split.quantize import as_bytes
from ortho_cli.storage import checkpoint
from ortho_cli.storage.data_file import DataFile, TensorStream
from ortho_cli.storage.output import check_output, check_space, resolve_output
from ortho_cli.storage.work_folder import WorkFolder, interruptible, unwritable
from ortho_cli.version import __version__

KIND = "converted checkpoint"

# How often finished tensors are made durable: a kill costs at most this much work.
COMMIT_SECONDS = 0.5

Entry = dict[str, Any]


def is_converted(folder: Path) -> bool:
    """Tell whether all weights of a folder were written by `ortho convert`."""
    found = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    roles = {(checkpoint.metadata_of(path) or {}).get("ortho_role") for path in found}
    return roles == {ROLE}


def check_target(plan: ConvertPlan, source: Source, out: Path, *, force: bool) -> None:
    """Refuse an output that would lose something, mix with the source or not fit on the disk.

    Raises:
        OutputExistsError: OUT is there and `force` is not given, or `convert` did not make it.
        UsageError: OUT is the source, inside it or around it.
        ResourceError: the disk is too small.
    """
    sources = [source.path, *(file.path for file in source.files)]
    check_output(out, sources, force=force, is_ours=is_converted, kind=KIND)
    check_space(plan.bytes_on_disk, out, kind=KIND)


def convert(
    plan: ConvertPlan,
    source: Source,
    out: Path,
    *,
    force: bool = False,
    on_event: EventSink = null_sink,
) -> Entry:
    """Carry a plan out.

    Args:
        plan: made from `source`.
        source: what is converted; stays open.
        out: the folder to make; appears only when complete.
        force: replace what `convert` made at `out`, and discard half-done work of another plan.
        on_event: told of progress.
    Returns:
        The plan as JSON, with the BLAKE3 of each tensor.
    Raises:
        CheckpointError: the source changed while it was read.
        ArtifactError: the source is an artifact whose row pointers or columns make no sense.
        NumericalError: a finite value becomes infinite in the new dtype.
        OutputExistsError: something is at `out`, or half-done work of another plan beside it.
        ResourceError: the disk is full or closed to us.
        Interrupted: Ctrl-C; finished tensors are kept.
    """
    out = resolve_output(out)
    check_target(plan, source, out, force=force)
    identity = {
        "plan": plan.sha256,
        "source": source.identity,
        "version": [__version__, torch.__version__],
        "files": {name: layout.size for name, layout in plan.files},
    }
    names = {tensor.source.name for tensor in plan.tensors}

    def is_known(entry: Entry) -> bool:
        told = entry.get("blake3")
        return entry["name"] in names and isinstance(told, str) and len(told) == 64

    source.check_unchanged()
    with (
        WorkFolder(
            out, identity=identity, force=force, is_sound=is_known, on_event=on_event
        ) as work,
        interruptible(work, total=len(plan.tensors)),
    ):
        document = _Job(plan, source, work, on_event).run()
        work.publish(may_replace=lambda there: force and is_converted(there))
        return document


class _Job:
    def __init__(
        self, plan: ConvertPlan, source: Source, work: WorkFolder, on_event: EventSink
    ) -> None:
        self._plan, self._source, self._work = plan, source, work
        self._emit = on_event
        mode = 0o600 if source.private else 0o644
        self._files = {name: DataFile(work, name, x, mode=mode) for name, x in plan.files}

    def run(self) -> Entry:
        plan, done = self._plan, self._work.done
        for tensor in plan.tensors:
            name = tensor.source.name
            if name in done and self._files[tensor.file].digest(name) != done[name]["blake3"]:
                del done[name]
        sizes = {tensor.source.name: tensor.spec.nbytes for tensor in plan.tensors}
        self._emit(
            Started(
                tensors=len(plan.tensors),
                resumed=len(done),
                bytes_total=plan.total_size,
                bytes_done=sum(sizes[name] for name in done),
            )
        )
        for note in plan.notes:
            self._emit(Noted(message=note))
        for name, layout in plan.files:
            self._files[name].write_header(layout.header)
        self._work_through([t for t in plan.tensors if t.source.name not in done])
        self._emit(Finishing(step="sync"))
        self._source.check_unchanged()
        self._write_side_files()
        document = plan.to_json()
        for told in document["tensors"]:
            told["blake3"] = done[told["name"]]["blake3"]
        return document

    def _work_through(self, pending: list[ConvertTensor]) -> None:
        finished: list[Entry] = []
        committed = time.monotonic()
        try:
            for tensor in pending:
                finished.append({"name": tensor.source.name, "blake3": self._write(tensor)})
                self._emit(TensorDone(name=tensor.source.name))
                if time.monotonic() - committed >= COMMIT_SECONDS:
                    self._work.commit(finished)
                    finished, committed = [], time.monotonic()
        finally:
            self._work.commit(finished)

    def _write(self, tensor: ConvertTensor) -> str:
        """Take one tensor from its first row to its last; return its digest."""
        source = tensor.source
        stream = TensorStream(self._files[tensor.file], source.name)
        for row, count in self._plan.sizes.tiles("convert", (source.rows, source.columns)):
            read = source.read(row, count)
            cast = _round(tensor, read, row * source.columns)
            stream.write(as_bytes(cast))
            self._emit(Advanced(nbytes=cast.nbytes))
        return stream.finish()

    def _write_side_files(self) -> None:
        work = self._work
        try:
            self._plan.side.check_unchanged()
            for file in self._plan.side.copied:
                work.copy_file(self._plan.side.folder / file.source, file.name)
            for name, data in self._plan.made_files:
                work.write_file(name, data)
        except OSError as error:
            raise unwritable(work.artifact, error) from error


def _round(tensor: ConvertTensor, read: Tensor, start: int) -> Tensor:
    """Round to the dtype that is written; nothing finite may become infinite."""
    dtype = TORCH_DTYPES[tensor.dtype]
    if read.dtype == dtype:
        return read
    cast = read.to(dtype)
    if dtype in quantize.EXPONENTS and cast.numel() and quantize.all_finite(cast):
        return cast
    lost = cast.isinf() & read.isfinite()
    if bool(lost.any()):
        first = int(lost.view(-1).nonzero()[0])
        position: list[int] = []
        left = start + first
        for size in reversed(tensor.source.shape):
            left, place = divmod(left, size)
            position.insert(0, place)
        raise NumericalError(
            f"tensor `{tensor.source.name}` holds {read.reshape(-1)[first].item():g} at "
            f"{position}, which is infinite in {tensor.dtype}",
            hint="choose --dtype bfloat16 or float32, whose range is wider",
        )
    return cast
