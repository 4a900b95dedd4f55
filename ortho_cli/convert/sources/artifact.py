"""An artifact as a source: the dense weights W(alpha) = dequantize(base) + alpha * ortho."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ortho_cli.convert.sources.base import Source, SourceTensor, config_of, mark
from ortho_cli.convert.sources.safetensors_files import RowReader
from ortho_cli.errors import ArtifactError, UsageError
from ortho_cli.formats.artifact import (
    BASE_FILE,
    OLD_BASE_FILE,
    ORTHO_FILE,
    REPORT_FILE,
    Artifact,
    damaged,
)
from ortho_cli.formats.card import CARD_FILE
from ortho_cli.formats.csr import ORTHO_PARTS
from ortho_cli.formats.open_artifact import no_ortho, open_artifact
from ortho_cli.formats.ortho_reader import KeptReader
from ortho_cli.formats.provenance import recipe_of
from ortho_cli.split import quantize
from ortho_cli.split.sizes import DEFAULT_SIZES, Sizes
from ortho_cli.storage.checkpoint import ShardReader, TensorInfo
from ortho_cli.storage.sealing import IDENTITY_FILE, SEALED_FILE, Keys
from ortho_cli.storage.stacked import needs_stacks, restacked

# Files of an artifact that are not copied to a dense model.
OURS = (REPORT_FILE, SEALED_FILE, IDENTITY_FILE)


def open_dense(
    path: Path, alpha: float, keys: Keys | None = None, *, sizes: Sizes = DEFAULT_SIZES
) -> Source:
    """Describe the dense weights of an artifact at one alpha.

    Args:
        path: the artifact's folder, or a file in it.
        alpha: in [0, 1]. 0 gives dequantize(base) and needs no ortho; 1 gives the source weights,
            bit for bit, at the positions of ortho.
        keys: open a sealed ortho.
        sizes: of tiles of base.
    Raises:
        UsageError: alpha is not in [0, 1].
        ArtifactError: the artifact is damaged, or alpha needs an ortho that is absent.
    """
    if not 0.0 <= alpha <= 1.0 or math.isnan(alpha):
        raise UsageError(
            f"--alpha {alpha} is not in [0, 1]", hint="0 is base alone, 1 is the full model"
        )
    artifact = open_artifact(path if path.is_dir() else path.parent, keys if alpha else None)
    if alpha and artifact.ortho is None:
        raise no_ortho(artifact, f"--alpha {alpha:g} needs it")
    folder, config = artifact.folder, config_of(artifact.folder)
    if config is not None:
        config.pop("quantization_config", None)
    read = [artifact.base.path]
    if alpha:
        read.append(artifact.sealed or folder / ORTHO_FILE)
    with ExitStack() as opened:
        reader = ShardReader([artifact.base])
        opened.callback(reader.close)
        kept = KeptReader(artifact, sizes=sizes) if alpha else None
        if kept:
            opened.callback(kept.close)
        tensors = _tensors(artifact, RowReader(reader), kept, alpha)
        if recipe_of(artifact.base).get("on_unsupported") == "split" and needs_stacks(config):
            tensors = _stacked(tensors)
        close = opened.pop_all().close
    return Source(
        kind="artifact",
        path=folder,
        tensors=tensors,
        files=tuple(map(mark, read)),
        config=config,
        own=frozenset((BASE_FILE, OLD_BASE_FILE, ORTHO_FILE, *OURS, *_card(artifact))),
        settings={"alpha": alpha},
        private=alpha > 0,  # values of ortho, which only its owner may read, are in the result
        close=close,
    )


def _card(artifact: Artifact) -> set[str]:
    """Name our model card; in an older artifact a file of its name is somebody else's."""
    written = (artifact.report or {}).get("side_files")
    return {CARD_FILE} & set(written) if isinstance(written, dict) else set()


def _tensors(
    artifact: Artifact, rows: RowReader, kept: KeptReader | None, alpha: float
) -> tuple[SourceTensor, ...]:
    base = {tensor.name: tensor for tensor in artifact.base.tensors}
    found = []
    for module in artifact.split:
        parts = {part: base.pop(f"{module}.weight_{part}") for part in ("packed", "scale", "shape")}
        split = _Split(artifact, module, rows, parts, kept, alpha)
        name, dtype = f"{module}.weight", parts["scale"].dtype
        if name in base:
            raise damaged(artifact.base.path, f"`{name}` is there both split and whole")
        found.append(SourceTensor(name=name, dtype=dtype, shape=split.shape, read=split.read))
    found += [rows.tensor(info, path=artifact.base.path) for info in base.values()]
    return tuple(sorted(found, key=lambda tensor: tensor.name))


def _stacked(tensors: tuple[SourceTensor, ...]) -> tuple[SourceTensor, ...]:
    """Stack experts again."""
    found = {tensor.name: tensor for tensor in tensors}
    for stack in list(restacked(found)):
        parts = [found[name] for name in stack.parts]
        if stack.name in found or len({(part.dtype, part.shape) for part in parts}) > 1:
            continue
        first, rows = parts[0], sum(part.rows for part in parts)
        for part in parts:
            del found[part.name]
        found[stack.name] = SourceTensor(
            name=stack.name,
            dtype=first.dtype,
            shape=(stack.experts, rows // stack.experts, first.columns),
            read=partial(_read_parts, parts),
        )
    return tuple(sorted(found.values(), key=lambda tensor: tensor.name))


def _read_parts(parts: list[SourceTensor], start: int, rows: int) -> Tensor:
    """Read rows of matrices of one shape that follow one another."""
    each, found = parts[0].rows, []
    while rows:
        number, first = divmod(start, each)
        here = min(rows, each - first)
        found.append(parts[number].read(first, here).clone())  # valid until the next read alone
        start, rows = start + here, rows - here
    return torch.cat(found)


@dataclass(slots=True)
class _Split:
    """One split weight, merged again row by row."""

    artifact: Artifact
    module: str
    rows: RowReader
    parts: dict[str, TensorInfo]
    kept: KeptReader | None
    alpha: float
    csr: tuple[Tensor, Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        shape = tuple(self.rows.whole(self.parts["shape"]).tolist())
        if shape != self.shape:
            what = f"says {list(shape)}, and said {list(self.shape)} before"
            raise damaged(self.artifact.base.path, f"`{self.module}.weight_shape` {what}")

    @property
    def shape(self) -> tuple[int, int]:
        return self.artifact.shapes[self.module]

    def read(self, start: int, rows: int) -> Tensor:
        """Give rows in float32; values that alpha blends are not rounded to the source's dtype."""
        packed, scale = self.parts["packed"], self.parts["scale"]
        words = self.rows.rows(packed, start, rows, packed.shape[1])
        codes = quantize.unpack_codes(words, bits=self.artifact.bits[self.module])
        scales = self.rows.rows(scale, start, rows, scale.shape[1])
        weight = quantize.dequantize(codes, scales)
        if self.kept is not None:  # as it is where alpha is not 0
            positions, values = self._stored(self.kept, start, rows)
            flat = weight.view(-1)
            if self.alpha < 1.0:  # at 1, base + (values - base) would round
                base = flat[positions]
                values = base + self.alpha * (values - base)
            flat[positions] = values
        return weight

    def _stored(self, kept: KeptReader, start: int, rows: int) -> tuple[Tensor, Tensor]:
        """Give ortho's flat positions within these rows, and its values there."""
        if self.csr is None or start == 0:
            try:
                found = kept.csr(self.module)
            except ArtifactError as error:
                what = f"`{self.module}.weight` has no sound ortho stream"
                raise ArtifactError(f"{what}: {error.message}", hint=error.hint) from None
            crow, column, values = (found[part] for part in ORTHO_PARTS)
            self.csr = crow.long(), column.to(torch.int64), values
        crow, column, values = self.csr
        here = slice(int(crow[start]), int(crow[start + rows]))
        row = torch.repeat_interleave(torch.arange(rows), crow[start : start + rows + 1].diff())
        if start + rows == self.shape[0]:
            self.csr = None
        return row * self.shape[1] + column[here], values[here].float()
