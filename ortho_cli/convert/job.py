"""The job of `ortho convert`: write any source as a plain checkpoint that every tool reads.

Each tensor is read in tiles of rows, rounded once, written and digested. A killed run resumes after
its last finished tensor, and ends in the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ortho_cli.convert.plan import ROLE, ConvertPlan, ConvertTensor
from ortho_cli.convert.sources.base import Source
from ortho_cli.errors import NumericalError
from ortho_cli.events import Advanced, EventSink, Finishing, null_sink
from ortho_cli.split import quantize
from ortho_cli.split.dtypes import torch_dtypes
from ortho_cli.split.quantize import as_bytes
from ortho_cli.split.sizes import Sizes
from ortho_cli.storage import checkpoint, job
from ortho_cli.storage.data_file import DataFile, TensorStream
from ortho_cli.storage.job import Kind, Target
from ortho_cli.storage.work_folder import Entry, WorkFolder
from ortho_cli.version import __version__


def is_converted(folder: Path) -> bool:
    """Tell whether all weights of a folder were written by `ortho convert`."""
    found = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    roles = {(checkpoint.metadata_of(path) or {}).get("ortho_role") for path in found}
    return roles == {ROLE}


KIND = Kind(name="converted checkpoint", is_ours=is_converted)


def check_target(plan: ConvertPlan, source: Source, out: Path, *, force: bool) -> Target:
    """Refuse an output that would lose something, mix with the source or not fit on the disk.

    Raises:
        OutputExistsError: OUT is there and `force` is not given, or `convert` did not make it.
        UsageError: OUT is the source, inside it or around it.
        ResourceError: the disk is too small.
    """
    sources = [source.path, *(file.path for file in source.files)]
    target = job.check_target(out, KIND, sources, force=force)
    target.check_space(plan.bytes_on_disk)
    return target


def convert(
    plan: ConvertPlan, source: Source, target: Target, *, on_event: EventSink = null_sink
) -> dict[str, str]:
    """Carry a plan out.

    Args:
        plan: made from `source`.
        source: what is converted; stays open.
        target: the folder to make, as `check_target` passed it; appears only when complete.
        on_event: told of progress.
    Returns:
        The BLAKE3 of each tensor as it was written, by name.
    Raises:
        CheckpointError: the source changed while it was read.
        ArtifactError: the source is an artifact whose row pointers or columns make no sense.
        NumericalError: a finite value becomes infinite in the new dtype.
        OutputExistsError: half-done work of another plan is beside the output.
        ResourceError: the disk is full or closed to us.
        Interrupted: Ctrl-C; finished tensors are kept.
    """
    identity = {
        "plan": plan.sha256,
        "source": source.identity,
        "version": [__version__, torch.__version__],
        "files": {name: layout.size for name, layout in plan.files},
    }
    nbytes = {tensor.source.name: tensor.spec.nbytes for tensor in plan.tensors}

    def is_sound(line: Entry) -> bool:
        digest = line.get("blake3")
        return line["name"] in nbytes and isinstance(digest, str) and len(digest) == 64

    source.check_unchanged()
    with job.open_job(
        target, identity=identity, total=len(nbytes), is_sound=is_sound, on_event=on_event
    ) as work:
        mode = 0o600 if source.private else 0o644
        files = {name: DataFile(work, name, layout, mode=mode) for name, layout in plan.files}
        _forget_damaged(plan, work, files)
        job.report_start(work, nbytes, plan.notes, on_event)
        for name, layout in plan.files:
            files[name].write_header(layout.header)
        with job.Commits(work, on_event) as commits:
            for tensor in plan.tensors:
                if (name := tensor.source.name) not in work.done:
                    digest = _write(tensor, files[tensor.file], plan.sizes, on_event)
                    commits.add({"name": name, "blake3": digest})
        on_event(Finishing(step="sync"))
        source.check_unchanged()
        job.write_side_files(work, plan.side, dict(plan.made_files))
        return {name: str(line["blake3"]) for name, line in work.done.items()}


def _forget_damaged(plan: ConvertPlan, work: WorkFolder, files: Mapping[str, DataFile]) -> None:
    """Drop the journal lines of tensors whose bytes have changed since."""
    for tensor in plan.tensors:
        name = tensor.source.name
        if name in work.done and files[tensor.file].digest(name) != work.done[name]["blake3"]:
            del work.done[name]


def _write(tensor: ConvertTensor, file: DataFile, sizes: Sizes, on_event: EventSink) -> str:
    """Write one tensor tile by tile; return its BLAKE3."""
    source = tensor.source
    stream = TensorStream(file, source.name)
    for row, count in sizes.tiles("convert", (source.rows, source.columns)):
        cast = round_once(
            source.read(row, count),
            tensor.spec.dtype,
            name=source.name,
            shape=source.shape,
            start=row * source.columns,
        )
        stream.write(as_bytes(cast))
        on_event(Advanced(nbytes=cast.nbytes))
    return stream.finish()


def round_once(
    read: Tensor, dtype: str, *, name: str, shape: tuple[int, ...], start: int
) -> Tensor:
    """Round to the dtype that is written; refuse finite values that become infinite.

    Args:
        read: some values of a tensor.
        dtype: as safetensors names it.
        name: of the tensor.
        shape: of the tensor.
        start: flat index of the first of the values.
    Raises:
        NumericalError: names the tensor and the place.
    """
    target = torch_dtypes()[dtype]
    if read.dtype == target:
        return read
    cast = read.to(target)
    if target in quantize.EXPONENTS and cast.numel() and quantize.all_finite(cast):
        return cast
    lost = cast.isinf() & read.isfinite()
    if bool(lost.any()):
        first = int(lost.view(-1).nonzero()[0])
        position = [int(i) for i in np.unravel_index(start + first, shape)]
        raise NumericalError(
            f"tensor `{name}` holds {read.reshape(-1)[first].item():g} at "
            f"{position}, which is infinite in {dtype}",
            hint="choose --dtype bfloat16 or float32, whose range is wider",
        )
    return cast
