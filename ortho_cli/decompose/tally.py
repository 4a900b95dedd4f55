"""What one pass over a tensor adds up: what rounding costs, and the k weights that lose most."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ortho_cli.decompose.plan import SplitTensor
from ortho_cli.decompose.workers import first_bad
from ortho_cli.errors import NumericalError
from ortho_cli.split import quantize
from ortho_cli.split.select import Room, TopK


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """Some rows of a tensor, split: weight = dequantize(codes, scales) - residual."""

    weight: Tensor
    scales: Tensor
    codes: Tensor
    residual: Tensor
    root: Tensor | None  # of the curvature
    delta: Tensor | None  # reference - weight


class _Moved:
    """What forgetting moved of one tensor: all of it is kept, whatever its residual.

    Codes move most easily where the source lies near the edge between two. Its own weight is then
    half of the way to where they went, and a percent of those, exact among weights that are
    rounded, still forgets. So alpha = 1 can give such positions the source's own code instead, and
    its weight to those alone that saliency would have kept without forgetting.
    """

    def __init__(self, *, measures: int, to_code: bool, bits: int) -> None:
        self.energy = [0.0] * measures  # squares of each measure that alpha = 1 takes away
        self.coded = 0  # positions where alpha = 1 is the source's code, not its weight
        self._to_code, self._bits = to_code, bits
        self._codes: list[npt.NDArray[np.generic]] = []
        self._lost: list[list[npt.NDArray[np.float32]]] = []

    def mark(self, at: Any, tile: Tile, flat: Sequence[Any], *, by_curvature: bool) -> None:
        """Sum up what the moves of a tile cost, and let the selection take them."""
        if not len(at):  # torch cannot group none into groups
            return
        if self._to_code:
            self._remember(torch.from_numpy(at), tile, by_curvature=by_curvature)
        for i, measure in enumerate(flat):
            self.energy[i] += _energy(measure[at])
            measure[at] = 0.0 if i else np.inf

    def _remember(self, at: Tensor, tile: Tile, *, by_curvature: bool) -> None:
        """Keep the source's own codes, dequantized, and what they cost."""
        columns = tile.weight.shape[1]
        weight = tile.weight.view(-1)[at].unsqueeze(1)
        # A group lies inside a row, so flat indices count groups, too.
        scales = tile.scales.reshape(-1)[at // (columns // tile.scales.shape[1])].unsqueeze(1)
        code = quantize.dequantize(quantize.quantize(weight, scales, bits=self._bits), scales)
        bits = torch.int32 if tile.scales.dtype.itemsize == 4 else torch.int16
        self._codes.append(flat_of(code.to(tile.scales.dtype).view(bits)))
        # Not in place: where scales are float32, what was remembered above is `code` itself.
        lost = [(code - weight).abs_().squeeze(1)]
        if tile.root is not None:
            root = tile.root[at % columns] if tile.root.ndim == 1 else tile.root.view(-1)[at]
            lost.insert(0 if by_curvature else 1, lost[0] * root)
        self._lost.append([flat_of(one) for one in lost])

    def give_back(self, saliency: Any, values: Any) -> None:
        """Put codes where the source's weight would not be kept; infinite saliency marks moves."""
        moved = np.isinf(saliency)
        if not self._codes or not moved.any():
            return
        lost = [np.concatenate(parts) for parts in zip(*self._lost, strict=True)]
        coded = lost[0] < (np.inf if moved.all() else saliency[~moved].min())
        self.coded = int(coded.sum())
        values[np.flatnonzero(moved)[coded]] = np.concatenate(self._codes)[coded]
        for i, measure in enumerate(lost):
            self.energy[i] -= _energy(measure[coded])


class Tally:
    """What a pass over a tensor adds up: noise, and the k weights that lose most."""

    def __init__(
        self,
        tensor: SplitTensor,
        bar: float | None,
        *,
        by_curvature: bool,
        curvature: bool,
        reference: bool,
        to_code: bool,
        stretch: int,
        empty: Room,
    ) -> None:
        self._tensor, self._by_curvature = tensor, by_curvature
        # Few weights hold most of the curvature, and searched scales leave most of the noise to
        # ortho: what is left without them needs float64.
        self._wide = curvature or tensor.scale != "absmax"
        self._names = ["noise", "curvature_noise"][: 1 + curvature]
        if by_curvature:
            self._names.reverse()
        self._names += ["delta"] if reference else []
        self._noise = [0.0] * len(self._names)
        self._signal = 0.0
        self._moved = _Moved(measures=len(self._noise), to_code=to_code, bits=tensor.bits)
        self._bits = torch.int32 if tensor.source.dtype == "F32" else torch.int16
        words = np.int32 if tensor.source.dtype == "F32" else np.int16
        self._top = TopK(
            tensor.k,
            length=tensor.source.numel,
            stretch=stretch,
            payloads=[words, *(np.float32 for _ in self._noise[1:])],
            bar=bar,
            empty=empty,
        )

    @property
    def short(self) -> bool:
        """Whether the guessed bar was too high."""
        return self._top.short

    def take(
        self, tile: Tile, raw: Tensor, stay: Any | None, *, row: int, scratch: quantize.Scratch
    ) -> None:
        """Add a tile that begins at `row`; ortho keeps the positions `stay` whatever they lose."""
        start = row * raw.shape[1]
        self._signal += quantize.squared_norm(tile.weight)
        measures = measures_of(tile, by_curvature=self._by_curvature, scratch=scratch)
        wide = scratch(tuple(raw.shape), torch.float64) if self._wide else None
        self._noise = [
            total + quantize.squared_norm(measure, wide=wide)
            for total, measure in zip(self._noise, measures, strict=True)
        ]
        if not all(map(math.isfinite, self._noise)):
            raise _overflow(self._tensor, measures, start)
        saliency, *others = flat = [flat_of(measure) for measure in measures]
        if stay is not None:
            self._moved.mark(stay, tile, flat, by_curvature=self._by_curvature)
        self._top.push(saliency, [flat_of(raw.view(self._bits)), *others], start=start)

    def finish(self) -> tuple[Any, Any, dict[str, float]]:
        """Give flat indices and values of what is kept, and what was measured."""
        tensor, moved = self._tensor, self._moved
        indices, first, (values, *second) = self._top.finish()
        moved.give_back(first, values)
        # Everything kept is exact; a difference of sums would not come out as 0.
        first = first[np.isfinite(first)]
        whole = tensor.k == tensor.source.numel and not moved.coded
        kept = [
            total if whole else min(_energy(one) + back, total)
            for one, total, back in zip((first, *second), self._noise, moved.energy, strict=True)
        ]
        measured = {"signal": self._signal, **dict(zip(self._names, self._noise, strict=True))}
        measured |= {f"{name}_kept": part for name, part in zip(self._names, kept, strict=True)}
        return indices, values, measured


def measures_of(tile: Tile, *, by_curvature: bool, scratch: quantize.Scratch) -> list[Tensor]:
    """Measure what rounding costs, what selects first: |r|, and |r| sqrt(h) with statistics.

    They order like their squares and neither underflow nor round.
    """
    weighted = (
        [] if tile.root is None else [quantize.saliency(tile.residual, tile.root, empty=scratch)]
    )
    plain = [tile.residual.abs_()]
    found = weighted + plain if by_curvature else plain + weighted
    if tile.delta is not None:
        found.append(tile.delta.abs_() if tile.root is None else tile.delta.mul_(tile.root))
    return found


def flat_of(tensor: Tensor) -> Any:
    """Look at a tensor as one row, in numpy."""
    return tensor.view(-1).numpy()


def _energy(values: Any) -> float:
    return float(np.square(values, dtype=np.float64).sum())


def _overflow(tensor: SplitTensor, measures: list[Tensor], start: int) -> NumericalError:
    worst = next(m for m in measures if not quantize.all_finite(m))
    _, position = first_bad(tensor, worst.numpy(), start)
    if any(quantize.all_finite(measure) for measure in measures):
        return NumericalError(
            f"residual times curvature of `{tensor.name}` overflows at {position}",
            hint="calibrate again, or add the tensor to `ignore`",
        )
    return NumericalError(
        f"tensor `{tensor.name}` of `{tensor.source.shard}` overflows {tensor.source.dtype} "
        f"when dequantized, at {position}",
        hint="add the tensor to `ignore`, or cast a float16 checkpoint to bfloat16",
    )
