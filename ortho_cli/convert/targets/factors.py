"""The two factors of a LoRA that is ortho: whole columns exactly, a scattered ortho approximately.

With D = values - base in float32, at the columns c_1 < ... < c_k that ortho holds:

    A (k, in)   a row for each column: 1 at c_j, 0 elsewhere
    B (out, k)  D[:, c_j]                                       B A = ortho

With a rank R below k, the R columns of most energy |D[:, c]|^2. A scattered ortho has no such
form; the nearest matrix of rank R, by the singular vectors u_i of D and its singular values s_i, is

    B = [u_i sqrt(s_i)]    A = [u_i^T D / sqrt(s_i)]            |D - B A|^2 is least

Both factors then share the size of s_i, which rounding to 16 bits favours. Source: Eckart and Young
(1936); vectors from the eigenvectors of D D^T or D^T D, whichever is smaller, in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ortho_cli.convert.job import round_once
from ortho_cli.convert.sources.base import Source, config_of, mark
from ortho_cli.convert.targets.job import Error
from ortho_cli.errors import ArtifactError, UsageError
from ortho_cli.formats import columns
from ortho_cli.formats.artifact import ORTHO_FILE, Artifact, Parts, Shape
from ortho_cli.formats.open_artifact import no_ortho, open_artifact
from ortho_cli.formats.ortho_reader import KeptReader
from ortho_cli.split import quantize
from ortho_cli.split.dtypes import torch_dtypes
from ortho_cli.split.quantize import as_bytes
from ortho_cli.split.sizes import DEFAULT_SIZES, Sizes
from ortho_cli.storage.sealing import Keys

TILE = 1 << 22  # elements of D that are float64 at a time: 32 MiB


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """A weight that has an adapter."""

    name: str  # of the module
    shape: Shape  # (out, in)
    rank: int  # rows of A that are written; 0 where ortho holds nothing
    held: int  # columns that ortho holds; 0 where it is scattered
    dtype: str  # of the source, as safetensors names it

    @property
    def weight(self) -> str:
        """Name its tensor."""
        return f"{self.name}.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ortho:
    """An artifact's ortho, open, and the rank of each weight's adapter."""

    artifact: Artifact
    source: Source
    reader: KeptReader
    split: tuple[Module, ...]  # every split weight
    sizes: Sizes

    @property
    def modules(self) -> tuple[Module, ...]:
        """Those that ortho holds something of."""
        return tuple(module for module in self.split if module.rank)

    @property
    def is_scattered(self) -> bool:
        """Whether some weight's ortho is no set of whole columns."""
        return not all(map(columns.holds_columns, self.artifact.kept.values()))

    @property
    def rank(self) -> int:
        """The largest rank: what a server is told."""
        return max(module.rank for module in self.modules)

    def factors(self, module: Module, dtype: str, error: Error) -> tuple[Tensor, Tensor]:
        """Make A (rank, in) and B (out, rank) in a dtype; add what they lose to `error`.

        Raises:
            ArtifactError: ortho is damaged.
            NumericalError: a value becomes infinite.
        """
        parts = self.reader.parts(module.name)
        if columns.holds_columns(parts):
            return self._columns(module, parts, dtype, error)
        return self._nearest(module, parts, dtype, error)

    def _columns(
        self, module: Module, parts: dict[str, Tensor], dtype: str, error: Error
    ) -> tuple[Tensor, Tensor]:
        held = parts["col_indices"].to(torch.int64)
        delta = parts["values"].float()  # a copy, or the reader's own: nobody else holds it
        delta = delta - self._base_at(module, held)
        kept = torch.arange(len(held))
        if len(held) > module.rank:
            energy = delta.double().square().sum(0)
            # Stable, so that of equal columns the lower one is kept.
            order = torch.sort(energy, descending=True, stable=True).indices
            kept = order[: module.rank].sort().values
        a = torch.zeros(module.rank, module.shape[1])
        a[torch.arange(len(kept)), held[kept]] = 1.0
        b = torch.zeros(module.shape[0], module.rank)
        b[:, : len(kept)] = delta[:, kept]
        made = _rounded(b, dtype, module)
        written = torch.zeros_like(delta)
        written[:, kept] = made[:, : len(kept)].float()
        error.add(written, delta)
        return _rounded(a, dtype, module), made

    def _nearest(
        self, module: Module, parts: dict[str, Tensor], dtype: str, error: Error
    ) -> tuple[Tensor, Tensor]:
        delta = self._dense(module, parts)
        rows = delta.any(1).nonzero().view(-1)
        across = delta.any(0).nonzero().view(-1)
        small = delta[rows][:, across]
        with _one_thread():  # sums in one order: the same bytes on every run
            left, right = nearest(small, rank=module.rank)
            a = torch.zeros(module.rank, module.shape[1])
            b = torch.zeros(module.shape[0], module.rank)
            count = left.shape[1]
            a[:count, across] = right
            b[rows, :count] = left
            a, b = _rounded(a, dtype, module), _rounded(b, dtype, module)
            step = max(1, TILE // module.shape[1])
            for start in range(0, module.shape[0], step):
                made = b[start : start + step].double() @ a.double()
                error.add(made, delta[start : start + step])
        return a, b

    def _dense(self, module: Module, parts: dict[str, Tensor]) -> Tensor:
        """Give D, (out, in) float32, of a CSR."""
        crow = parts["crow_indices"].to(torch.int64)
        column = parts["col_indices"].to(torch.int64)
        delta = torch.zeros(module.shape)
        for start, base in self._base(module):
            count = len(base)
            here = slice(int(crow[start]), int(crow[start + count]))
            row = torch.repeat_interleave(
                torch.arange(count), crow[start : start + count + 1].diff()
            )
            at = row, column[here]
            delta[start : start + count][at] = parts["values"][here].float() - base[at]
        return delta

    def _base_at(self, module: Module, held: Tensor) -> Tensor:
        """Give base at whole columns, (out, k) float32."""
        return torch.cat([base[:, held] for _, base in self._base(module)])

    def _base(self, module: Module) -> Iterator[tuple[int, Tensor]]:
        """Yield base tile by tile: its first row, and (rows, in) float32."""
        infos = {tensor.name: tensor for tensor in self.artifact.base.tensors}
        packed, scales = (infos[f"{module.name}.weight_{part}"] for part in ("packed", "scale"))
        bits = self.artifact.bits[module.name]
        for start, count in self.sizes.tiles("convert", module.shape):
            read = []
            for info in (packed, scales):
                found = torch.empty((count, info.shape[1]), dtype=torch_dtypes()[info.dtype])
                nbytes = info.nbytes // info.shape[0]
                self.reader.read_into(as_bytes(found), info, start=start * nbytes)
                read.append(found)
            yield start, quantize.dequantize(quantize.unpack_codes(read[0], bits=bits), read[1])


def _rounded(values: Tensor, dtype: str, module: Module) -> Tensor:
    return round_once(values, dtype, name=module.weight, shape=tuple(values.shape), start=0)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def nearest(delta: Tensor, *, rank: int) -> tuple[Tensor, Tensor]:
    """Find the matrix of a rank that is nearest to a matrix, as two factors of equal size.

    B A with B = U sqrt(S), A = S^(-1/2) U^T D, of the largest singular values.

    Args:
        delta: D, (out, in) float32, finite.
        rank: at most min(out, in) of it are used, and none whose singular value is 0.
    Returns:
        B (out, n) float32 and A (n, in) float32, n <= rank; the largest entry of each vector of the
        smaller side is positive.
    Source: Eckart and Young (1936).
    """
    if not delta.numel():
        return delta.new_zeros(delta.shape[0], 0), delta.new_zeros(0, delta.shape[1])
    wide = delta.shape[0] <= delta.shape[1]
    side = delta if wide else delta.T
    gram = torch.zeros(len(side), len(side), dtype=torch.float64)
    step = max(1, TILE // max(1, len(side)))
    for start in range(0, side.shape[1], step):
        tile = side[:, start : start + step].double()
        gram.addmm_(tile, tile.T)
    found = torch.linalg.eigh(gram)  # ascending
    squares = found.eigenvalues.flip(0)[:rank]
    # Below this share of the largest, an eigenvalue of float64 is rounding.
    squares = squares[squares > found.eigenvalues[-1:].clamp_min(0) * 1e-14]
    vectors = found.eigenvectors.flip(1)[:, : len(squares)]
    largest = vectors.abs().argmax(0, keepdim=True)
    vectors = vectors * vectors.gather(0, largest).sign()
    root = squares.sqrt().sqrt()
    other = (vectors.T @ side.double()) / root.unsqueeze(1)
    mine = vectors * root
    left, right = (mine, other) if wide else (other.T, mine.T)
    return left.float(), right.float()


def open_ortho(
    path: Path,
    *,
    keys: Keys | None = None,
    max_rank: int | None = None,
    approximate: int | None = None,
    sizes: Sizes = DEFAULT_SIZES,
) -> Ortho:
    """Open an artifact's ortho, and find the rank of each weight's adapter; no weight is read.

    Args:
        path: the artifact's folder, or a file in it.
        keys: open a sealed ortho.
        max_rank: the most columns of a weight; None keeps all.
        approximate: the rank of what stands for a scattered ortho.
        sizes: of tiles of base.
    Returns:
        What is open; the caller closes its source.
    Raises:
        ArtifactError: the artifact is damaged, has no ortho, or an empty one.
        UsageError: ortho is scattered and `approximate` is not given, or is given for whole
            columns.
    """
    artifact = open_artifact(path if path.is_dir() else path.parent, keys)
    if artifact.ortho is None:
        raise no_ortho(artifact, "an adapter is made of it", without="")
    _check_form(artifact, max_rank, approximate)
    modules = tuple(
        _module(artifact, name, parts, max_rank or approximate)
        for name, parts in sorted(artifact.kept.items())
    )
    if not any(module.rank for module in modules):
        raise ArtifactError(
            f"the ortho of `{artifact.folder}` holds no weight", hint="base alone is the model"
        )
    with ExitStack() as opened:
        reader = KeptReader(artifact, sizes=sizes)
        opened.callback(reader.close)
        close = opened.pop_all().close
    source = Source(
        kind="artifact",
        path=artifact.folder,
        tensors=(),
        files=tuple(
            map(mark, (artifact.base.path, artifact.sealed or artifact.folder / ORTHO_FILE))
        ),
        config=config_of(artifact.folder),
        private=True,
        close=close,
    )
    return Ortho(artifact=artifact, source=source, reader=reader, split=modules, sizes=sizes)


def _check_form(artifact: Artifact, max_rank: int | None, approximate: int | None) -> None:
    """Hold the options against what ortho holds."""
    scattered = [n for n, parts in artifact.kept.items() if not columns.holds_columns(parts)]
    instead = " instead of --max-rank" if max_rank else ""
    if scattered and approximate is None:
        raise UsageError(
            f"the ortho of `{artifact.folder}` holds scattered weights, as of `{scattered[0]}`, "
            "and an adapter is exact of whole columns alone",
            hint="decompose the model with `--set ortho.structure=columns`, or repeat the command "
            f"with --approximate {max_rank or 64}{instead}, which says what it loses",
        )
    if approximate is not None and not scattered:
        raise UsageError(
            f"the ortho of `{artifact.folder}` holds whole columns, and --approximate "
            f"{approximate} is for scattered weights",
            hint=f"leave it out, or take the best columns: --max-rank {approximate}",
        )


def _module(artifact: Artifact, name: str, parts: Parts, most: int | None) -> Module:
    shape = artifact.shapes[name]
    is_columns = columns.holds_columns(parts)
    stored = ("col_indices",) if is_columns else ("values", "column_values")
    held = sum(parts[part].numel for part in stored if part in parts)
    # All columns of a tall weight are more than its rows, and all of them are written.
    rank = held if is_columns else min(held, *shape)
    rank = rank if most is None else min(rank, most)
    scales = {tensor.name: tensor.dtype for tensor in artifact.base.tensors}
    return Module(
        name=name,
        shape=shape,
        rank=rank,
        held=held if is_columns else 0,
        dtype=scales[f"{name}.weight_scale"],
    )
