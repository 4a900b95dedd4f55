"""Curvature statistics, `ortho-stats/1`: the header, validated, and the tensors of each weight.

README.md is the specification.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from blake3 import blake3
from pydantic import Field, ValidationError

from ortho_cli.errors import CalibrationError, blamed
from ortho_cli.events import EventSink, Started, null_sink
from ortho_cli.formats.artifact import Shape, Specs, TypeAndShape, canonical_json, make_specs
from ortho_cli.formats.schema import Digest, Figure, Validated, fault
from ortho_cli.storage import checkpoint, strict_json
from ortho_cli.storage.checkpoint import Checkpoint, Shard, ShardReader, TensorInfo

FORMAT = "ortho-stats/1"
GRAM = ".retain_gram"


class Measured(Validated):
    """What the header tells of a weight that was measured."""

    shape: Annotated[list[int], Field(min_length=2, max_length=2)]
    source_blake3: Digest
    mean: Figure | None = None  # of the curvature
    overlap: Figure | None = None  # of the largest by full curvature with those by factored
    tokens: int | None = None  # of the retain set that were routed to it; None: no expert's
    lent: bool | None = None  # whether it has the mean of its layer's other experts

    def to_json(self) -> dict[str, object]:
        """Give what the header holds; of experts alone, tokens and whether it is lent."""
        unused = {key for key in ("tokens", "lent") if getattr(self, key) is None}
        return self.model_dump(exclude=unused)


class DataSet(Validated):
    """What the header tells of a set of texts."""

    sequences: int
    tokens: int
    written_by: Literal["model", "random"] | None = None  # None: files of the user
    seed: int | None = None  # of text that is no user's


class Statistics(Validated):
    """A statistics file: its metadata, with the JSON in it parsed; no tensor data is in memory."""

    path: Path
    shard: Shard
    kind: Literal["gram", "fisher", "true-fisher"]
    unit: str
    storage: Literal["full", "factored"]
    source_digest: str
    gram: str | None = None
    weighting: str | None = None
    data: dict[str, DataSet]
    tensors: dict[str, Measured]
    digests: dict[str, Digest]

    @property
    def infos(self) -> dict[str, TensorInfo]:
        """The place of each tensor in the file, by name."""
        return {tensor.name: tensor for tensor in self.shard.tensors}

    @property
    def digest(self) -> str:
        """BLAKE3 over the digests of all tensors: the fingerprint of the file's content."""
        return blake3(canonical_json(self.digests).encode()).hexdigest()

    @property
    def has_forget(self) -> bool:
        """Whether a forget set was measured."""
        return any(key.endswith(".forget_gradient") for key in self.digests)

    @property
    def has_gram(self) -> bool:
        """Whether the full input Gram matrix of each weight was measured."""
        return any(key.endswith(GRAM) for key in self.digests)

    def summary(self) -> dict[str, object]:
        """Say in a report which statistics were used, and of which text where it is no user's."""
        text = self.data.get("retain")
        return {
            "digest": self.digest,
            "kind": self.kind,
            "unit": self.unit,
            "storage": self.storage,
            **({"gram": "full", "weighting": self.weighting} if self.has_gram else {}),
            **({} if text is None or text.written_by is None else {"text": text.model_dump()}),
        }

    def check_source(self, name: str, digest: str) -> None:
        """Raise if a weight with this BLAKE3 is not the one that was measured."""
        told = self.tensors[name].source_blake3
        if digest != told:
            raise CalibrationError(
                f"`{self.path}` holds statistics of another model: `{name}` has BLAKE3 "
                f"{digest[:12]}, and {told[:12]} was measured",
                hint="calibrate this model, or give the statistics that were made from it",
            )


def specs(
    name: str, shape: Shape, *, kind: str, storage: str, dtype: str, forget: bool, gram: bool
) -> Specs:
    """List the tensors of one weight.

    Args:
        name: the weight, `<p>.weight`.
        shape: (out, in).
        kind: gram, fisher or true-fisher.
        storage: full or factored.
        dtype: BF16 or F32, of what has (out, in) elements.
        forget: a forget set is measured, too.
        gram: so is the full input Gram matrix.
    """
    rows, columns = shape
    part, parts = "retain_curvature", dict[str, TypeAndShape]()
    if kind == "gram":
        parts[part] = "F32", (columns,)
    elif storage == "factored":
        parts |= {f"{part}_rows": ("F32", (rows,)), f"{part}_columns": ("F32", (columns,))}
    else:
        full = (part, *(("forget_curvature", "forget_gradient") if forget else ()))
        parts |= dict.fromkeys(full, (dtype, shape))
    if gram:
        parts[GRAM.removeprefix(".")] = "F32", (columns, columns)
    return make_specs(name, parts)


def is_statistics(path: Path) -> bool:
    """Tell whether a file was written by `ortho calibrate`."""
    if not path.is_file():
        return False
    return (checkpoint.metadata_of(path) or {}).get("format") == FORMAT


def open_statistics(path: Path) -> Statistics:
    """Read and check the header of a statistics file.

    Raises:
        CalibrationError: not there, cut, not ours, or its parts do not fit together.
    """
    with blamed(CalibrationError, path=path, hint="calibrate again"):
        shard = checkpoint.read_shard(path)
    if shard.metadata.get("format") != FORMAT:
        raise CalibrationError(
            f"`{path}` says it is {shard.metadata.get('format')!r}, not {FORMAT!r}",
            hint="give a file that `ortho calibrate` wrote",
        )
    try:
        parsed = {
            key: _parse(path, key, text) if key in ("tensors", "digests", "data") else text
            for key, text in shard.metadata.items()
        }
        statistics = Statistics.model_validate({**parsed, "path": path, "shard": shard})
        _check(statistics)
    except ValueError as error:
        what = fault(error) if isinstance(error, ValidationError) else str(error)
        raise CalibrationError(
            f"the header of `{path}` is damaged: {what}", hint="calibrate again"
        ) from None
    return statistics


def _parse(path: Path, key: str, text: str) -> dict[str, object]:
    """Parse the JSON that a value of the metadata is."""
    what = f"`{key}` in the header of `{path}`"
    with blamed(CalibrationError):
        return strict_json.parse(text.encode(), what=what, hint="calibrate again")


def _check(found: Statistics) -> None:
    settings = {("full", "none"), ("full", "gradient")} if found.has_gram else {(None, None)}
    if found.kind == "gram":
        settings -= {("full", "gradient")}
    if (found.gram, found.weighting) not in settings:
        there = "with" if found.has_gram else "without"
        raise ValueError(
            f"gram {found.gram!r} and weighting {found.weighting!r} {there} Gram matrices, of kind "
            f"{found.kind!r}"
        )
    infos = found.infos
    if infos.keys() != found.digests.keys():
        raise ValueError(f"digests of {len(found.digests)} tensors where {len(infos)} are there")
    # The Gram matrix is F32 whatever the rest is.
    wide = (t for t in infos.values() if len(t.shape) == 2 and not t.name.endswith(GRAM))
    specs_of = partial(
        specs,
        kind=found.kind,
        storage=found.storage,
        dtype=next((t.dtype for t in wide), "F32"),
        forget=found.has_forget,
        gram=found.has_gram,
    )
    wanted = {
        spec.key: spec
        for name, entry in found.tensors.items()
        for spec in specs_of(name, (entry.shape[0], entry.shape[1]))
    }
    for key in sorted(wanted.keys() ^ infos.keys()):
        raise ValueError(f"tensor `{key}` is {'missing' if key in wanted else 'of no weight'}")
    for key, spec in wanted.items():
        if (infos[key].dtype, infos[key].shape) != (spec.dtype, spec.shape):
            raise ValueError(
                f"tensor `{key}` is {infos[key].dtype} {list(infos[key].shape)}, not "
                f"{spec.dtype} {list(spec.shape)}"
            )


def check_weights(found: Statistics, weights: Sequence[TensorInfo]) -> None:
    """Make sure from headers that every weight was measured, in its shape."""
    for weight in weights:
        entry = found.tensors.get(weight.name)
        if entry is None:
            raise CalibrationError(
                f"`{found.path}` holds no statistics of `{weight.name}`",
                hint="calibrate this model with the same targets, or add the tensor to `ignore`",
            )
        if entry.shape != list(weight.shape):
            raise CalibrationError(
                f"`{weight.name}` is {list(weight.shape)}, and `{found.path}` was measured where "
                f"it is {entry.shape}",
                hint="calibrate this model, or give the statistics that were made from it",
            )


def check_model(found: Statistics, source: Checkpoint, weights: Sequence[TensorInfo]) -> None:
    """Read the smallest weight and make sure that it is the one that was measured."""
    smallest = min(weights, key=lambda weight: (weight.nbytes, weight.name))
    with contextlib.closing(ShardReader(source.shards)) as reader:
        found.check_source(smallest.name, reader.digest(smallest))


def describe(found: Statistics) -> dict[str, object]:
    """Say what a statistics file holds: its metadata, parsed, as `ortho inspect --json` prints."""
    return {
        **{
            key: _parse(found.path, key, text) if text[:1] == "{" else text
            for key, text in found.shard.metadata.items()
        },
        "digest": found.digest,
        "has_forget": found.has_forget,
        "has_gram": found.has_gram,
        "file_bytes": found.shard.size,
    }


def verify(found: Statistics, *, on_event: EventSink = null_sink) -> dict[str, int]:
    """Read every tensor again and hold it against its digest.

    Raises:
        CalibrationError: names the first tensor that differs.
    """
    tensors = found.shard.tensors
    total = sum(tensor.nbytes for tensor in tensors)
    on_event(Started(tensors=len(tensors), resumed=0, bytes_total=total, bytes_done=0))
    with contextlib.closing(StatisticsReader(found)) as reader:
        for tensor in tensors:
            reader.compare(tensor, reader.digest(tensor, on_event))
    return {"tensors": len(tensors), "bytes": total}


class StatisticsReader(ShardReader):
    """Reads the tensors of a statistics file; threads may share it."""

    def __init__(self, statistics: Statistics) -> None:
        """Open the file, which must still be the one whose header was read."""
        self.statistics, self.infos = statistics, statistics.infos
        blame = partial(blamed, CalibrationError, path=statistics.path)
        super().__init__([statistics.shard], blame=blame)

    def compare(self, tensor: TensorInfo, digest: str) -> None:
        """Raise if a tensor's bytes do not have the digest that the file tells."""
        written = self.statistics.digests[tensor.name]
        if digest != written:
            raise CalibrationError(
                f"tensor `{tensor.name}` of `{self.statistics.path}` has BLAKE3 {digest[:12]} "
                f"where {written[:12]} was written",
                hint="the file is damaged; restore it, or calibrate again",
            )
