"""Two artifacts, or an artifact and a checkpoint: which weights differ, and by how much.

    difference(alpha) = ||A(alpha) - R(alpha)|| / ||R(alpha)||, Frobenius norms

R is the checkpoint, if one of the two is, else the first artifact. A tensor that is not split has
the same value at each alpha. Tiles of rows are read of both at a time: memory does not grow with
the model, but for the ortho of one weight of each.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ortho_cli.errors import ArtifactError, CheckpointError, blamed
from ortho_cli.events import Advanced, EventSink, Started, null_sink
from ortho_cli.formats.artifact import Artifact, module_of
from ortho_cli.formats.csr import ORTHO_PARTS
from ortho_cli.formats.ortho_reader import KeptReader
from ortho_cli.formats.report import Row, read_report, rows_from_headers, rows_of
from ortho_cli.split import quantize
from ortho_cli.split.dtypes import FLOATS, torch_dtypes
from ortho_cli.split.sizes import DEFAULT_SIZES, Sizes
from ortho_cli.storage.checkpoint import Checkpoint, ShardReader, TensorInfo

FORMAT = "ortho-comparison/1"


class Tile(NamedTuple):
    """Some rows of a weight."""

    codes: Tensor | None  # int8; None where it is not split
    base: Tensor  # float32, at alpha 0
    full: Tensor | None  # float32, at alpha 1; None without ortho


@dataclass(slots=True)
class Sums:
    """What adds up over tiles: squared norms of R and of A - R, at alpha 0 and 1, and codes."""

    norms: list[float] = field(default_factory=lambda: [0.0, 0.0])
    errors: list[float] = field(default_factory=lambda: [0.0, 0.0])
    codes: int = 0  # of both
    other_codes: int = 0  # that differ
    full: bool = True  # alpha 1 is known of both

    def add(self, mine: Tile, reference: Tile) -> None:
        """Add the figures of a tile."""
        if mine.codes is not None and reference.codes is not None:
            self.codes += mine.codes.numel()
            self.other_codes += int((mine.codes != reference.codes).sum())
        self.full = self.full and mine.full is not None and reference.full is not None
        pairs = [(mine.base, reference.base)]
        if mine.full is not None and reference.full is not None:
            pairs.append((mine.full, reference.full))
        for alpha, (ours, theirs) in enumerate(pairs):
            self.norms[alpha] += quantize.squared_norm(theirs)
            self.errors[alpha] += quantize.squared_norm((ours - theirs).contiguous())

    def merge(self, other: Sums) -> None:
        """Add the sums of another weight."""
        for alpha in (0, 1):
            self.norms[alpha] += other.norms[alpha]
            self.errors[alpha] += other.errors[alpha]
        self.codes += other.codes
        self.other_codes += other.other_codes
        self.full = self.full and other.full

    def difference(self, alpha: int) -> float | None:
        """Give the relative difference; None where it is not known, or no number."""
        if alpha and not self.full:
            return None
        norm, error = self.norms[alpha], self.errors[alpha]
        if not error:
            return 0.0
        found = math.sqrt(error / norm) if norm else math.inf
        return found if math.isfinite(found) else None

    def to_json(self) -> dict[str, float | None]:
        """Give the figures."""
        return {
            "codes_differ": self.other_codes / self.codes if self.codes else None,
            "difference_alpha_0": self.difference(0),
            "difference_alpha_1": self.difference(1),
        }


def compare(
    first: Artifact | Checkpoint,
    second: Artifact | Checkpoint,
    *,
    sizes: Sizes = DEFAULT_SIZES,
    on_event: EventSink = null_sink,
) -> dict[str, object]:
    """Compare two artifacts, or an artifact and a checkpoint, tensor by tensor.

    Args:
        first: named first in the result.
        second: the other. One of both is an artifact.
        sizes: of tiles.
        on_event: gets progress.
    Returns:
        The document that `ortho inspect A B --json` prints: totals over what at least one splits;
        tensors that only one has or whose shapes differ; and for each other tensor what both tell
        of it (`first`, `second`), `same` (equal at both alphas, as far as that is known), the share
        of base's codes that differ (None where one is not split, or codes have another width), and
        relative differences at alpha 0 and 1 (None where one lacks ortho, a dtype has no arithmetic
        here, or a value is NaN).
    Raises:
        ArtifactError: a file is damaged, or changed while it was read.
        CheckpointError: the same, of a checkpoint.
    """
    with contextlib.ExitStack() as stack:
        sides = (_Side.open(first, sizes, stack), _Side.open(second, sizes, stack))
        shapes = [side.shapes for side in sides]
        common = sorted(shapes[0].keys() & shapes[1].keys())
        size = sum(side.nbytes(name) for side in sides for name in common)
        on_event(Started(tensors=len(common), resumed=0, bytes_total=size, bytes_done=0))
        totals, tensors, other = Sums(), [], []
        for name in common:
            if shapes[0][name] == shapes[1][name]:
                tensors.append(_compare_tensor(name, sides, sizes, totals))
            else:
                other.append({"name": name, "first": shapes[0][name], "second": shapes[1][name]})
            on_event(Advanced(nbytes=sum(side.nbytes(name) for side in sides)))
    differ = sum(not tensor["same"] for tensor in tensors)
    return {
        "format": FORMAT,
        "reference": ("first", "second")[_reference(sides)],
        "first": sides[0].summary(),
        "second": sides[1].summary(),
        "totals": {"tensors": len(tensors), "differ": differ, **totals.to_json()},
        "only_in_first": sorted(shapes[0].keys() - shapes[1].keys()),
        "only_in_second": sorted(shapes[1].keys() - shapes[0].keys()),
        "other_shapes": other,
        "tensors": tensors,
    }


def _reference(sides: tuple[_Side, _Side]) -> int:
    """Choose R: the second where it is a checkpoint, else the first."""
    return int(isinstance(sides[1].of, Checkpoint))


def _compare_tensor(
    name: str, sides: tuple[_Side, _Side], sizes: Sizes, totals: Sums
) -> dict[str, object]:
    """Give the row of a tensor, and add to the totals what at least one side splits."""
    reference = sides[_reference(sides)]
    mine = sides[1 - _reference(sides)]
    sums, same = _add_up(name, mine, reference, sizes)
    if sums is not None and (name in mine.split or name in reference.split):
        totals.merge(sums)
    known = sums is not None or same
    figures = (sums or Sums()).to_json()
    return {
        "name": name,
        "shape": list(mine.shapes[name]),
        "same": same,
        **(figures if known else dict.fromkeys(figures)),
        "first": sides[0].told(name),
        "second": sides[1].told(name),
    }


def _add_up(name: str, mine: _Side, reference: _Side, sizes: Sizes) -> tuple[Sums | None, bool]:
    """Add up the differences of a tensor; no sums where its dtype has no arithmetic here.

    Two tensors that are not split and have the same bytes are the same, NaN or not.
    """
    whole = [side for side in (mine, reference) if name not in side.split]
    if len(whole) == 2 and whole[0].is_same(whole[1], name):
        return None, True
    if any(side.infos[name].dtype not in FLOATS for side in whole):
        return None, False
    sums, shape = Sums(), mine.shapes[name]
    rows = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (math.prod(shape), 1)
    ours = name in mine.split and name in reference.split
    widths = {side.bits(name) for side in (mine, reference)} if ours else set()
    tiles = (side.tiles(name, rows, sizes) for side in (mine, reference))
    for left, right in zip(*tiles, strict=True):
        sums.add(left if len(widths) == 1 else left._replace(codes=None), right)
    same = sums.errors == [0.0, 0.0] and not sums.other_codes
    return sums, same


@dataclass(slots=True)
class _Side:
    """One of both, open: its tensors by their names in the source."""

    of: Artifact | Checkpoint
    reader: ShardReader
    infos: dict[str, TensorInfo]  # as they are stored
    split: dict[str, str]  # name -> module
    shapes: dict[str, tuple[int, ...]]
    rows: dict[str, Row]  # what report.json tells, or the headers
    kept: KeptReader | None

    @classmethod
    def open(cls, of: Artifact | Checkpoint, sizes: Sizes, stack: contextlib.ExitStack) -> _Side:
        files = of.shards if isinstance(of, Checkpoint) else (of.base,)
        kind = CheckpointError if isinstance(of, Checkpoint) else ArtifactError
        reader = ShardReader(files, blame=partial(blamed, kind))
        stack.callback(reader.close)
        stack.push(lambda error, *_: None if error else reader.check_unchanged())
        tensors = of.tensors if isinstance(of, Checkpoint) else of.base.tensors
        infos = {tensor.name: tensor for tensor in tensors}
        shapes: dict[str, tuple[int, ...]] = {name: info.shape for name, info in infos.items()}
        split: dict[str, str] = {}
        rows: dict[str, Row] = {}
        kept = None
        if isinstance(of, Artifact):
            split = {f"{module}.weight": module for module in of.split}
            for name, module in split.items():
                for part in ("packed", "scale", "shape"):
                    del shapes[f"{module}.weight_{part}"]
                shapes[name] = of.shapes[module]
            report = read_report(of)
            told = rows_from_headers(of) if report is None else rows_of(report, of.folder)
            rows = {row.name: row for row in told}
            if of.ortho is not None:
                kept = stack.enter_context(KeptReader(of, sizes=sizes))
        return cls(
            of=of, reader=reader, infos=infos, split=split, shapes=shapes, rows=rows, kept=kept
        )

    def summary(self) -> dict[str, object]:
        """Say what it is; `ortho` is whether alpha 1 is known of it."""
        if isinstance(self.of, Checkpoint):
            return {"kind": "checkpoint", "ortho": True, "tensors": len(self.shapes)}
        return {
            "kind": "artifact",
            "ortho": self.kept is not None,
            "sealed": self.of.sealed is not None,
            "tensors": len(self.shapes),
            "split_tensors": len(self.split),
            "plan_sha256": self.of.base.metadata.get("plan_sha256"),
        }

    def told(self, name: str) -> dict[str, object]:
        """Say what is known of a tensor without reading it."""
        if isinstance(self.of, Checkpoint):
            return {"dtype": self.infos[name].dtype}
        row = self.rows[name]
        found: dict[str, object] = {"action": row.action, "dtype": row.dtype}
        if name in self.split:
            found |= {
                "bits_per_weight": row.bits_per_weight,
                "nnz": row.nnz,
                "sqnr_db_alpha_0": row.sqnr_db_alpha_0,
                "sqnr_db_alpha_1": row.sqnr_db_alpha_1,
            }
        return found

    def nbytes(self, name: str) -> int:
        """Count the bytes that are read of a tensor, without ortho."""
        module = self.split.get(name)
        parts = [name] if module is None else [f"{module}.weight_{p}" for p in ("packed", "scale")]
        return sum(self.infos[part].nbytes for part in parts)

    def bits(self, name: str) -> int:
        """Tell the width of a split weight's codes."""
        return self.of.bits[self.split[name]] if isinstance(self.of, Artifact) else 0

    def is_same(self, other: _Side, name: str) -> bool:
        """Tell whether a tensor that neither splits is the same to the last bit."""
        if self.infos[name].dtype != other.infos[name].dtype:
            return False
        return self.reader.digest(self.infos[name]) == other.reader.digest(other.infos[name])

    def tiles(self, name: str, shape: tuple[int, int], sizes: Sizes) -> Iterator[Tile]:
        """Give a weight's values, rows by rows."""
        module = self.split.get(name)
        if module is None:
            for start, count in sizes.tiles("convert", shape):
                values = self._read(name, start, count, shape[1]).float()
                yield Tile(None, values, values)
            return
        csr = None if self.kept is None else self.kept.csr(module_of(name))
        for start, count in sizes.tiles("convert", shape):
            packed, scale = f"{module}.weight_packed", f"{module}.weight_scale"
            words = self._read(packed, start, count, self.infos[packed].shape[1])
            scales = self._read(scale, start, count, self.infos[scale].shape[1])
            codes = quantize.unpack_codes(words, bits=self.bits(name))
            base = quantize.dequantize(codes, scales)
            yield Tile(codes, base, None if csr is None else _full(base, csr, start))

    def _read(self, key: str, start: int, count: int, columns: int) -> Tensor:
        info = self.infos[key]
        found = torch.empty((count, columns), dtype=torch_dtypes()[info.dtype])
        if found.numel():
            at = start * columns * found.element_size()
            self.reader.read_into(quantize.as_bytes(found), info, start=at)
        return found


def _full(base: Tensor, csr: dict[str, Tensor], start: int) -> Tensor:
    """Put ortho's values over rows of base."""
    rows, columns = base.shape
    crow, column, values = (csr[part] for part in ORTHO_PARTS)
    bounds = crow[start : start + rows + 1].long()
    here = slice(int(bounds[0]), int(bounds[-1]))
    row = torch.repeat_interleave(torch.arange(rows), bounds.diff())
    full = base.clone()
    full.view(-1)[row * columns + column[here].to(torch.int64)] = values[here].float()
    return full
