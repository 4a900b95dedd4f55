"""What a file of statistics holds: means of sums, their summaries, and the header.

Whatever way sums are made, the same sums give the same bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from blake3 import blake3
from torch import Tensor

from ortho_cli.calibrate.plan import CalibrationPlan, Set
from ortho_cli.decompose.settings import Calibrate
from ortho_cli.errors import CalibrationError
from ortho_cli.events import EventSink, Noted
from ortho_cli.formats import statistics
from ortho_cli.formats.artifact import canonical_json, module_of
from ortho_cli.formats.statistics import Measured
from ortho_cli.model import hooks
from ortho_cli.model import load as models
from ortho_cli.model.experts import group_of
from ortho_cli.storage.checkpoint import TensorInfo
from ortho_cli.storage.data_file import Layout, plan_layout
from ortho_cli.version import __version__

# No mean of seven digits is spelled longer: from 1e16 on an exponent is.
WIDEST = 1234567000000000.0
COMPARED = 1 << 22  # weights that are summed at once, and whose top is compared: 32 MiB in float64
WIDEST_SHARE = 0.1234  # of four digits
MOST_TOKENS = 10**12 - 1  # routed to an expert, of twelve digits
_JSON_KEYS = ("data", "recipe", "versions", "tensors", "digests")


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """A finished calibration."""

    nbytes: int  # of the file
    metadata: Mapping[str, str]  # of the file; most are JSON
    perplexity: Mapping[Set, float]  # of the model on each set, but on one that it wrote meanwhile

    def to_json(self) -> dict[str, object]:
        """Give the document of `ortho calibrate --json`."""
        told = {k: json.loads(v) if k in _JSON_KEYS else v for k, v in self.metadata.items()}
        return {"output_bytes": self.nbytes, **told, "perplexity": dict(self.perplexity)}


def identity(
    plan: CalibrationPlan, device: torch.device, source: str, files: Mapping[str, int]
) -> dict[str, object]:
    """Tell what unfinished work is known by: plan, model, versions, and the bytes of its files."""
    return {
        "plan": blake3(canonical_json(plan.to_json()).encode()).hexdigest(),
        "source": source,
        "version": [__version__, torch.__version__, device.type],
        "files": dict(files),
    }


def perplexity(plan: CalibrationPlan, nll: Mapping[Set, float]) -> dict[Set, float]:
    """Turn the NLL of each set, in nats, into its perplexity."""
    return {
        name: round(math.exp(nats / max(1, plan.sets[name].counted)), 4)
        for name, nats in nll.items()
    }


def to_mean(sums: Tensor, count: int, part: hooks.Part) -> None:
    """Turn sums into means in place; a Gram matrix becomes exactly symmetric.

    Experts then borrow from symmetric matrices in memory and block by block, and bytes are equal.
    """
    sums /= count
    sums += 0.0  # a sum of nothing is 0 or -0, by where chunks end
    if part == "gram":
        hooks.symmetrize(sums)


class Lender:
    """Gives an expert that too few tokens reached the mean of its layer's other experts.

    Memory: such a mean of each weight of one layer's experts.
    """

    def __init__(
        self,
        names: Iterable[str],
        tokens: Mapping[str, int],
        least: int,
        mean_of: Callable[[str, hooks.Part], Tensor],
    ) -> None:
        """Choose which experts lend.

        Args:
            names: weights of whole layers.
            tokens: of the retain set that were routed to an expert's weight. Weights of experts
                that are called in another way are not among them: then figures tell.
            least: tokens of an expert that needs no other one.
            mean_of: gives the retain set's mean of a weight.
        """
        self._tokens, self._least, self._mean_of = tokens, least, mean_of
        self._groups: dict[tuple[str, str], list[str]] = {}
        for name in names:
            if group := group_of(name):
                self._groups.setdefault(group, []).append(name)
        self._layer = ""
        self._held: dict[tuple[str, hooks.Part], Tensor | None] = {}
        self.borrowed: set[str] = set()

    def settle(self, name: str, part: hooks.Part, own: Tensor) -> Tensor:
        """Give the mean that a weight goes by: its own, or that of others."""
        group = group_of(name)
        if group is None or self._is_enough(name, own):
            return own
        layer, leaf = group
        if layer != self._layer:
            self._layer, self._held = layer, {}
        if (leaf, part) not in self._held:
            self._held[leaf, part] = self._mean(group, part)
        others = self._held[leaf, part]
        if others is None:
            return own
        self.borrowed.add(name)
        return others.clone()

    def _is_enough(self, name: str, own: Tensor) -> bool:
        routed = self._tokens.get(name)
        return bool(own.any()) and (routed is None or routed >= self._least)

    def _mean(self, group: tuple[str, str], part: hooks.Part) -> Tensor | None:
        total: Tensor | None = None
        count = 0
        for name in self._groups[group]:
            if self._tokens.get(name, self._least) < self._least:
                continue  # without reading it
            mean = self._mean_of(name, part)
            if self._is_enough(name, mean):
                total, count = mean.clone() if total is None else total.add_(mean), count + 1
        return None if total is None else total.div_(count)


def note_lent(entries: Mapping[str, Measured], least: int, on_event: EventSink) -> None:
    """Say which experts' weights have the statistics of others, and which alone have too few."""
    lent = [name for name, one in entries.items() if one.lent]
    alone = [
        name
        for name, one in entries.items()
        if not one.lent and one.tokens is not None and one.tokens < least
    ]
    for names, ending in (
        (lent, "each has the mean of its layer's other experts"),
        (alone, "no other expert of the layer has more, so each keeps its own"),
    ):
        if names:
            reached = "no token" if least == 1 else f"fewer than {least} tokens"
            more = f" and {len(names) - 1} more weights of experts" if len(names) > 1 else ""
            on_event(
                Noted(
                    message=f"{reached} reached `{min(names)}`{more}: {ending}; more --samples "
                    "reach more, and `calibrate.experts=all` all"
                )
            )


def of_mean(
    settings: Calibrate, tensor: TensorInfo, name: Set, part: hooks.Part, mean: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """Yield what the file holds of a mean."""
    key = f"{module_of(tensor.name)}.{name}_{part}"
    if part == "gram":
        yield key, mean
    elif settings.curvature == "gram":
        yield key, mean.view(-1)
    elif settings.storage == "factored":
        rows, columns = hooks.factor(mean)
        yield f"{key}_rows", rows
        yield f"{key}_columns", columns
    else:
        yield key, mean.to(torch.float32 if settings.dtype == "float32" else torch.bfloat16)


def describe(
    settings: Calibrate,
    tensor: TensorInfo,
    mean: Tensor,
    digest: str,
    *,
    tokens: int | None,
    lent: bool,
) -> Measured:
    """Summarise the curvature of a weight.

    Args:
        settings: of the calibration.
        tensor: the weight.
        mean: its curvature, or that of others which it goes by.
        digest: of the weight.
        tokens: that were routed to it; None where it is no expert's.
        lent: whether the mean is that of others.
    Raises:
        CalibrationError: it is zero everywhere.
    """
    flat, starts = mean.view(-1), range(0, mean.numel(), COMPARED)
    pieces = (flat[start : start + COMPARED] for start in starts)  # else torch copies it whole
    total = math.fsum(float(piece.sum(dtype=torch.float64)) for piece in pieces) / mean.numel()
    if total == 0.0:
        raise CalibrationError(
            f"no token reached `{tensor.name}`: its curvature is zero everywhere",
            hint="give more data or samples, or add it to `ignore`",
        )
    overlap = None  # of the top weights by full and by factored curvature
    if settings.curvature != "gram":
        rows, columns = hooks.factor(mean)
        step = max(1, mean.numel() // COMPARED)  # of more weights, rows at even distances
        mine = rows[::step].unsqueeze(1) * columns
        overlap = round(hooks.top_overlap(mean[::step], mine), 4)
    shape, rounded = list(tensor.shape), float(f"{total:.6e}")
    return Measured(
        shape=shape,
        source_blake3=digest,
        mean=rounded,
        overlap=overlap,
        tokens=tokens,
        lent=lent or None,
    )


def metadata(
    plan: CalibrationPlan,
    device: torch.device,
    source: str,
    entries: Mapping[str, Measured],
    content: Mapping[str, str],
) -> dict[str, str]:
    """Make the metadata of the file's header.

    Args:
        plan: of the calibration.
        device: that it ran on.
        source: digest of the model.
        entries: a summary per weight.
        content: BLAKE3 per tensor of the file.
    """
    with models.quiet_transformers() as transformers:
        version = str(transformers.__version__)
    settings = plan.settings
    versions = {"ortho": __version__, "torch": torch.__version__, "transformers": version}
    gram = {"gram": settings.gram, "weighting": settings.weighting}
    return {
        "format": statistics.FORMAT,
        "kind": settings.curvature,
        "unit": "token" if settings.curvature == "gram" else settings.unit,
        "storage": settings.storage,
        **(gram if settings.gram == "full" else {}),
        "source_digest": source,
        "data": canonical_json({k: v.to_json() for k, v in plan.sets.items()}),
        "recipe": canonical_json(settings.canonical()),
        "versions": canonical_json({**versions, "device": device.type}),
        "tensors": canonical_json({name: one.to_json() for name, one in entries.items()}),
        "digests": canonical_json(dict(content)),
    }


def lay_out(plan: CalibrationPlan, told: Mapping[str, str]) -> Layout:
    """Lay the file out.

    Statistics can be written block by block, before any figure is known that the header tells. So
    it has room for the widest ones, and its length does not depend on them.

    Args:
        plan: of the calibration.
        told: as `metadata` makes it; figures of weights, and digests, may be any.
    """
    specs = [spec for tensor in plan.tensors for spec in plan.specs(tensor)]
    overlap = None if plan.settings.curvature == "gram" else WIDEST_SHARE
    figures = {"mean": WIDEST, "overlap": overlap}
    of_expert = {"tokens": MOST_TOKENS, "lent": True}
    widest = {
        name: one | figures | (of_expert if group_of(name) else {})
        for name, one in json.loads(told["tensors"]).items()
    }
    room = len(plan_layout(specs, {**told, "tensors": canonical_json(widest)}).header)
    return plan_layout(specs, dict(told), room=room)
