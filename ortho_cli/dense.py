"""An artifact as a source: the dense weights W(alpha) = dequantize(base) + alpha * ortho."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ortho_cli import ops
from ortho_cli.artifact import (
    CONFIG_FILE,
    ORTHO_FILE,
    REPORT_FILE,
    Artifact,
    damaged,
    open_artifact,
)
from ortho_cli.checkpoint import Checkpoint, ShardReader, TensorInfo, model_name, read_json_object
from ortho_cli.errors import ArtifactError, UsageError
from ortho_cli.source import RowReader, Source, SourceTensor, mark, side_files


def open_dense(path: Path, alpha: float) -> Source:
    """Describe the dense weights of an artifact at one alpha.

    Args:
        path: the artifact's folder, or a file in it.
        alpha: 0 gives dequantize(base) and needs no ortho; 1 gives the source weights, bit for
            bit, wherever ortho holds them.
    Raises:
        UsageError: alpha is not in [0, 1].
        ArtifactError: the artifact does not hold together, or alpha needs an ortho that is absent.
    """
    if not 0.0 <= alpha <= 1.0 or math.isnan(alpha):
        raise UsageError(
            f"--alpha {alpha} is not in [0, 1]", hint="0 is base alone, 1 is the full model"
        )
    artifact = open_artifact(path if path.is_dir() else path.parent)
    if alpha and artifact.ortho is None:
        raise ArtifactError(
            f"`{artifact.folder}` has no {ORTHO_FILE}, and --alpha {alpha:g} needs it",
            hint="--alpha 0 needs none",
        )
    folder = artifact.folder
    shards = (artifact.base, artifact.ortho) if alpha and artifact.ortho else (artifact.base,)
    config = None
    if (folder / CONFIG_FILE).exists():
        config = read_json_object(folder / CONFIG_FILE, constants=True)
        config = {key: value for key, value in config.items() if key != "quantization_config"}
    extra, notes = side_files(folder, {shard.name for shard in shards} | {ORTHO_FILE})
    reader = ShardReader(
        Checkpoint(path=folder, shards=shards, tensors=(), config=None, extra_files=())
    )
    try:
        tensors = _tensors(artifact, RowReader(reader), alpha)
    except BaseException:
        reader.close()
        raise
    return Source(
        name=model_name(folder),
        kind="artifact",
        path=folder,
        tensors=tensors,
        files=tuple(mark(shard.path) for shard in shards),
        config=config,
        extra_files=tuple((name, size) for name, size in extra if name != REPORT_FILE),
        notes=notes,
        settings={"alpha": alpha},
        private=alpha > 0,  # it then holds what ortho holds, which only its owner may read
        close=reader.close,
    )


def _tensors(artifact: Artifact, rows: RowReader, alpha: float) -> tuple[SourceTensor, ...]:
    base = {tensor.name: tensor for tensor in artifact.base.tensors}
    ortho = {tensor.name: tensor for tensor in artifact.ortho.tensors} if artifact.ortho else {}
    found = []
    for module in artifact.split:
        parts = {part: base.pop(f"{module}.weight_{part}") for part in ("packed", "scale", "shape")}
        csr = {
            p: ortho[f"{module}.{p}"] for p in ("crow_indices", "col_indices", "values") if alpha
        }
        split = _Split(artifact, module, rows, {**parts, **csr}, alpha)
        if split.name in base:
            raise damaged(artifact.base.path, f"`{split.name}` is there both split and whole")
        found.append(
            SourceTensor(
                name=split.name, dtype=parts["scale"].dtype, shape=split.shape, read=split.read
            )
        )
    found += [rows.tensor(info, path=artifact.base.path) for info in base.values()]
    return tuple(sorted(found, key=lambda tensor: tensor.name))


class _Split:
    """One split weight, put together again row by row."""

    def __init__(
        self,
        artifact: Artifact,
        module: str,
        rows: RowReader,
        parts: dict[str, TensorInfo],
        alpha: float,
    ) -> None:
        self.name = f"{module}.weight"
        self.shape = artifact.shapes[module]
        self._bits = artifact.bits[module]
        self._rows, self._parts, self._alpha = rows, parts, alpha
        self._artifact = artifact
        self._crow: npt.NDArray[np.int64] | None = None
        told = tuple(rows.whole(parts["shape"]).tolist())
        if told != self.shape:
            raise damaged(
                artifact.base.path,
                f"`{module}.weight_shape` says {list(told)}, and said {list(self.shape)} before",
            )

    def read(self, start: int, rows: int) -> Tensor:
        """Give rows in float32; all but what alpha blends are values of the source's dtype."""
        words, groups = self._parts["packed"].shape[1], self._parts["scale"].shape[1]
        packed = self._rows.rows(self._parts["packed"], start, rows, words)
        codes = ops.unpack_codes(packed, bits=self._bits)
        scales = self._rows.rows(self._parts["scale"], start, rows, groups)
        weight = ops.dequantize(codes, scales)
        if self._alpha:
            positions, values = self._kept(start, rows)
            flat = weight.view(-1)
            if self._alpha == 1.0:  # base + (values - base) would round
                flat[positions] = values
            else:
                held = flat[positions]
                flat[positions] = held + self._alpha * (values - held)
        return weight

    def _kept(self, start: int, rows: int) -> tuple[Tensor, Tensor]:
        """Give the flat positions inside these rows that ortho holds, and its values there."""
        if self._crow is None or start == 0:
            self._crow = self._read_crow()
        crow = self._crow[start : start + rows + 1]
        first, count = int(crow[0]), int(crow[-1] - crow[0])
        read = self._rows.rows(self._parts["col_indices"], first, count, 1)
        columns = read.view(-1).to(torch.int64)
        row = torch.from_numpy(np.repeat(np.arange(rows), np.diff(crow)))
        positions = row * self.shape[1] + columns
        if count and (int(columns.min()) < 0 or int(columns.max()) >= self.shape[1]):
            raise self._bad(f"a column outside of 0 to {self.shape[1] - 1}")
        if not bool((positions.diff() > 0).all()):
            raise self._bad("columns that do not ascend in their row")
        values = self._rows.rows(self._parts["values"], first, count, 1).view(-1)
        if start + rows == self.shape[0]:
            self._crow = None
        return positions, values.float()

    def _read_crow(self) -> npt.NDArray[np.int64]:
        crow = self._rows.whole(self._parts["crow_indices"]).to(torch.int64).numpy()
        nnz = self._parts["values"].numel
        if crow[0] != 0 or crow[-1] != nnz or (np.diff(crow) < 0).any():
            raise self._bad(f"row pointers that do not climb from 0 to {nnz}")
        return crow

    def _bad(self, what: str) -> ArtifactError:
        return damaged(self._artifact.folder / ORTHO_FILE, f"`{self.name}` has {what}")
