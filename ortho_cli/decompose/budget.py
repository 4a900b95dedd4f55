"""Where ortho's weights are spent: one density for the whole model, and what a size can buy.

A scoring pass reads every weight once, before anything is written, and counts what it would cost
to lose it. Counts are kept in bins by the upper half of the float32 saliency, which holds its
exponent and seven bits more: inside a bin values differ by less than 0.8 %.

Whole columns are spent alike: each weight of a column counts as the root of the column's mean
square, so that the columns of the most saliency per weight come first, whatever their length.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import metadata

import numpy as np

from ortho_cli.decompose.kernels import Kernels
from ortho_cli.decompose.plan import Plan, SplitTensor, make_plan
from ortho_cli.decompose.selection import sibling_groups, tensor_settings
from ortho_cli.decompose.settings import GROUP_SIZES, Recipe
from ortho_cli.decompose.survey import Columns, Counts, Sums, Survey, stamps
from ortho_cli.decompose.workers import DigestedRows, open_inputs, task_of
from ortho_cli.errors import RecipeError
from ortho_cli.events import EventSink, Noted, Started, null_sink
from ortho_cli.formats.artifact import canonical_json
from ortho_cli.formats.curvature import Curvature
from ortho_cli.split import pipeline
from ortho_cli.split.dtypes import DTYPES
from ortho_cli.split.pipeline import Work
from ortho_cli.split.select import BINS, largest_columns
from ortho_cli.split.task import Inputs, columns_of
from ortho_cli.storage.checkpoint import Checkpoint
from ortho_cli.storage.hints import said
from ortho_cli.version import __version__

FINITE = 0x7F80  # bins from here on hold infinity and NaN
# The middle of each bin.
CENTRES = ((np.arange(FINITE, dtype=np.uint32) << 16) | 0x8000).view(np.float32).astype(np.float64)


def survey(plan: Plan, checkpoint: Checkpoint, *, on_event: EventSink = null_sink) -> Survey:
    """Count the saliency of every weight that is split, rounded to nearest without ortho.

    Args:
        plan: says which tensors, scales, bits and group size.
        checkpoint: the source.
        on_event: told of bytes.
    Raises:
        NumericalError: a weight is NaN or infinite.
    """
    counts: dict[str, Counts] = {}
    sums: dict[str, Sums] = {}
    digests, groups = {}, _groups(plan)
    size = sum(tensor.source.nbytes for tensor in plan.split)
    on_event(Started(tensors=len(plan.split), resumed=0, bytes_total=size, bytes_done=0))
    kernel = Kernels(plan, on_event=on_event).make()
    with open_inputs(plan, checkpoint) as inputs:
        for tensor in plan.split:
            rows = DigestedRows(inputs.source, tensor.source, on_event=on_event)
            near = Curvature(inputs.curvature, tensor.name) if inputs.curvature else None
            work = Work(task_of(plan, tensor), Inputs(rows, near), kernel)
            if tensor.columns is None:
                counts[tensor.name] = pipeline.survey(work)
            else:
                first = groups[tensor.name][0]
                more = pipeline.survey_columns(work)
                sums[first] = sums[first] + more if first in sums else more
            digests[tensor.name] = rows.digest
    rows_of = {tensor.name: tensor.shape[0] for tensor in plan.split}
    for name in rows_of if sums else ():
        group = groups[name]
        bins = bins_of(sums[group[0]], sum(map(rows_of.__getitem__, group)))
        counts[name] = bins * rows_of[name]
    shared = {one: total for one, total in sums.items() if len(groups[one]) > 1}
    return Survey(of=_subject(plan, checkpoint), counts=counts, digests=digests, sums=shared)


def _groups(plan: Plan) -> dict[str, tuple[str, ...]]:
    """Give the weights that share columns with each weight that is split, itself included."""
    found: dict[str, tuple[str, ...]] = {tensor.name: (tensor.name,) for tensor in plan.split}
    if plan.recipe.ortho.share:
        for group in sibling_groups(found):
            found |= dict.fromkeys(group, group)
    return found


def bins_of(sums: Sums, rows: int) -> Counts:
    """Count columns by the root of their mean square, in bins as those of single weights.

    Args:
        sums: (in,) float64 of squared saliency.
        rows: weights of each column.
    """
    means = np.sqrt(sums / rows).astype(np.float32)
    return np.bincount(means.view(np.uint32) >> 16, minlength=BINS).astype(np.int64)


def _known(plan: Plan, checkpoint: Checkpoint, known: Sequence[Survey]) -> Survey | None:
    """Find the survey that would be made for a plan among those of an earlier run."""
    if not known:
        return None
    of = _subject(plan, checkpoint)
    sizes = {tensor.name: tensor.source.numel for tensor in plan.split}
    for one in known:  # whose counts add up to each tensor's weights
        if one.of == of and sizes == {name: int(n.sum()) for name, n in one.counts.items()}:
            return one
    return None


def _subject(plan: Plan, checkpoint: Checkpoint) -> str:
    """Digest everything that counts depend on, as far as headers tell it."""
    statistics = plan.statistics
    content = {
        "version": [__version__, metadata.version("torch")],
        "source": stamps(checkpoint.shards),
        "statistics": statistics and [statistics.digest, *stamps([statistics.shard])],
        "saliency": plan.recipe.saliency.kind,
        "group_size": plan.group_size,
        "tensors": [
            [t.name, t.source.dtype, list(t.source.shape), t.scale, t.bits] for t in plan.split
        ],
    }
    if plan.recipe.keeps_columns:
        content["columns"] = {"share": plan.recipe.ortho.share}
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()


def spend(
    surveyed: Mapping[str, Counts], total: int, units: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Give each tensor as many of the `total` most salient weights as it holds.

    Those of the last bin that is reached are taken tensor by tensor, in the order given.

    Args:
        surveyed: counts of each tensor.
        total: weights to keep of all.
        units: weights of a column of each tensor, where columns are whole.
    Returns:
        How many weights each tensor keeps; they add up to `total`, or where columns are whole to
        less than a column below it, or to all that there are.
    """
    total = min(total, sum(int(counts.sum()) for counts in surveyed.values()))
    everything = sum(surveyed.values(), np.zeros(BINS, np.int64))
    above = np.cumsum(everything[::-1])[::-1]  # in this bin or higher
    last = int(np.searchsorted(-above, -total, side="right")) - 1 if total else BINS
    kept = {name: int(counts[last + 1 :].sum()) for name, counts in surveyed.items()}
    rest = total - sum(kept.values())
    for name, counts in surveyed.items():
        if last < BINS:
            unit = (units or {}).get(name, 1)
            more = min(rest, int(counts[last])) // unit * unit
            kept[name] += more
            rest -= more
    return kept


def left(surveyed: Mapping[str, Counts], kept: Mapping[str, int]) -> float:
    """Sum the squared saliency of what is not kept: what alpha = 1 would lose, within 2 %."""
    total = 0.0
    square = np.square(CENTRES)
    for name, counts in surveyed.items():
        higher = np.cumsum(counts[::-1])[::-1] - counts
        lost = counts - np.clip(kept[name] - higher, 0, counts)
        total += float(lost[:FINITE] @ square)
    return total


def expected_bits(plan: Plan) -> float:
    """Say how many bits both streams take for each split weight.

    With CSR that is exact. Compact gaps longer than a byte depend on where weights are kept: by
    chance a row of n columns, each kept with probability p, has p sum_j (n - 255 j) (1 - p)^(255 j)
    of them, over j >= 1 with 255 j < n, and at most (n - 1) / 255. Weights that matter lie closer
    together than by chance, so half way between is taken.
    """
    total = 0.0
    for tensor in plan.split:
        parts = tensor.base if plan.is_compact else (*tensor.base, *tensor.stored)
        total += sum(spec.nbytes for spec in parts)
        total += _compact_bytes(plan, tensor) if plan.is_compact else 0.0
    return 8 * total / plan.split_weights


def _compact_bytes(plan: Plan, tensor: SplitTensor) -> float:
    rows, columns = tensor.source.shape
    share = tensor.k / tensor.source.numel
    value = DTYPES[tensor.values].bits / 8
    longer = np.arange(255, columns, 255)
    chance = share * float(((columns - longer) * (1 - share) ** longer).sum())
    escapes = (rows * chance + min(rows, tensor.k) * longer.size) / 2
    average = share * columns
    fullest = 3 * average + 6 * math.sqrt(average) + 8
    return rows * (1 if fullest < 256 else 2) + escapes + tensor.k * (1 + value) + 4


def settle(
    plan: Plan,
    checkpoint: Checkpoint,
    *,
    known: Sequence[Survey] = (),
    on_event: EventSink = null_sink,
) -> Plan:
    """Fix how many weights each tensor keeps, where the budget is global and that is open.

    Args:
        plan: made from `checkpoint`.
        checkpoint: the source.
        known: surveys of an earlier run; where one fits, no weight is read.
        on_event: told of bytes.
    """
    if not plan.is_open:
        return plan
    found = _known(plan, checkpoint, known)
    if found is None:
        message = "ortho.budget is global: every weight is read once to find what each tensor keeps"
        if plan.recipe.ortho.budget != "global":
            message = "ortho.share is true: every weight is read once to choose shared columns"
        on_event(Noted(message=message))
        found = survey(plan, checkpoint, on_event=on_event)
    kept = _spent(plan, found.counts) if plan.recipe.ortho.budget == "global" else None
    return replace(_chosen(plan, checkpoint, found, kept), surveys=(found,))


def _chosen(
    plan: Plan, checkpoint: Checkpoint, found: Survey, kept: Mapping[str, int] | None
) -> Plan:
    """Make the plan again with what a survey chose: nnz, and the columns that siblings share."""
    settled = _again(plan, checkpoint, plan.recipe, kept)
    if not plan.recipe.ortho.share:
        return settled
    counts = {tensor.name: tensor.columns or 0 for tensor in settled.split}
    shared = {
        name: largest_columns(found.sums[group[0]], counts[name])
        for name, group in _groups(plan).items()
        if len(group) > 1
    }
    return _again(plan, checkpoint, plan.recipe, kept, shared)


def _spent(plan: Plan, surveyed: Mapping[str, Counts]) -> dict[str, int]:
    """Spend what the plan has, tensors with a density of their own apart.

    Siblings that share columns count as one weight. No weight has more columns than `max_rank`.
    """
    groups, most = _groups(plan), plan.recipe.ortho.max_rank
    own = {
        tensor.name: tensor.k
        for tensor in plan.split
        if tensor_settings(plan.recipe, tensor.name).own_density
    }
    total = _asked(plan) - sum(own.values())
    rows = {t.name: t.shape[0] if t.columns is not None else 1 for t in plan.split}
    units = {group[0]: sum(rows[one] for one in group) for group in groups.values()}
    merged: dict[str, Counts] = {}
    for name, counts in surveyed.items():
        if name not in own:
            first = groups[name][0]
            merged[first] = merged[first] + counts if first in merged else counts
    if most is not None:
        merged = {name: _highest(counts, most * units[name]) for name, counts in merged.items()}
    spent = spend(merged, total, units)
    kept = {
        n: spent[groups[n][0]] // units[groups[n][0]] * rows[n] for n in surveyed if n not in own
    }
    return own | kept


def _asked(plan: Plan) -> int:
    """Say how many weights a budget has: columns that `max_rank` takes from one go to others."""
    if plan.recipe.ortho.max_rank is None:
        return sum(tensor.k for tensor in plan.split)
    total = 0
    for tensor in plan.split:
        settings = tensor_settings(plan.recipe, tensor.name)
        asked = columns_of(settings.density, tensor.shape[1]) * tensor.shape[0]
        total += tensor.k if settings.own_density else asked
    return total


def _highest(counts: Counts, most: int) -> Counts:
    """Count the `most` most salient weights alone."""
    higher = np.cumsum(counts[::-1])[::-1] - counts
    found: Counts = np.clip(most - higher, 0, counts)
    return found


def _again(
    plan: Plan,
    checkpoint: Checkpoint,
    recipe: Recipe,
    kept: Mapping[str, int] | None = None,
    shared: Mapping[str, Columns] | None = None,
) -> Plan:
    return make_plan(
        checkpoint,
        recipe,
        statistics=plan.statistics,
        kept=kept,
        shared=shared,
        workers=plan.workers,
        side=plan.side,
        sizes=plan.sizes,
    )


def meet(
    plan: Plan,
    checkpoint: Checkpoint,
    target: float,
    *,
    known: Sequence[Survey] = (),
    on_event: EventSink = null_sink,
) -> Plan:
    """Pick the density, and the group size where it is auto, that lose least at a size.

    For each group size the highest density is taken with which base and ortho stay within
    `target`; a scoring pass tells what that would lose, by the saliency that selects.

    Args:
        plan: as it is without a target; its recipe leaves the density open.
        checkpoint: the source.
        target: bits for each split weight, both streams; of a compact ortho as `expected_bits`.
        known: surveys of an earlier run; where one fits, no weight is read.
        on_event: told of bytes, and of what was chosen.
    Raises:
        RecipeError: density is set, base must forget, or no group size stays within `target`.
    """
    recipe = plan.recipe
    _check_open(recipe, target)
    auto = recipe.base.group_size == "auto"
    sizes = GROUP_SIZES if auto else (int(recipe.base.group_size),)
    best: tuple[float, Plan] | None = None
    surveys: list[Survey] = []
    smallest = math.inf
    for size in sizes:
        tried = _with(recipe, size, 0.0)
        try:
            bare = _again(plan, checkpoint, tried)
        except RecipeError:
            if not auto:
                raise
            continue  # a size that does not divide
        smallest = min(smallest, expected_bits(bare))
        if not expected_bits(bare) <= target:
            continue
        filled = _fill(bare, checkpoint, target)
        found = _known(filled, checkpoint, known) or survey(filled, checkpoint, on_event=on_event)
        surveys.append(found)
        counts = found.counts
        kept = {tensor.name: tensor.k for tensor in filled.split}
        if recipe.ortho.budget == "global":
            kept = _spent(filled, counts)
            filled = _chosen(filled, checkpoint, found, kept)
        elif recipe.ortho.share:
            filled = _chosen(filled, checkpoint, found, None)
        loss = left(counts, kept)
        if best is None or loss < best[0]:
            best = loss, filled
    if best is None:
        raise RecipeError(
            f"--target-bits {target:g} is less than base alone takes, {smallest:.3f}",
            hint=_smaller(plan, checkpoint),
        )
    on_event(Noted(message=_describe(best[1], target)))
    return replace(best[1], surveys=tuple(surveys))


def _smaller(plan: Plan, checkpoint: Checkpoint) -> str:
    """Say what makes base smaller."""
    if any(tensor.source.dtype == "F32" for tensor in plan.split):
        cast = f"`ortho convert {said(checkpoint.path)} --dtype bf16`"
        return f"its scales are float32, as the source is: {cast} halves them; or set base.bits=3"
    return "a larger base.group_size or base.bits 3 takes less"


def _describe(chosen: Plan, target: float) -> str:
    density, about = chosen.recipe.ortho.density, "about " if chosen.is_compact else ""
    return (
        f"group size {chosen.group_size} and density {density:.3%} lose least of what "
        f"stays within {target:g} bits; they take {about}{expected_bits(chosen):.3f}"
    )


def _check_open(recipe: Recipe, target: float) -> None:
    """Refuse a recipe that leaves no density to pick."""
    if "density" in recipe.ortho.model_fields_set or recipe.ortho.split != "residual":
        key = "density" if recipe.ortho.split == "residual" else "split"
        raise RecipeError(
            f"ortho.{key} is {getattr(recipe.ortho, key)}, and --target-bits {target:g} picks the "
            "density",
            hint="leave one of them out",
        )


def _with(recipe: Recipe, group_size: int, density: float) -> Recipe:
    base = recipe.base.model_copy(update={"group_size": group_size})
    ortho = recipe.ortho.model_copy(update={"density": density})
    return recipe.model_copy(update={"base": base, "ortho": ortho})


def _fill(bare: Plan, checkpoint: Checkpoint, target: float) -> Plan:
    """Find the highest density within `target`, to a hundred-thousandth."""

    def filled(steps: int) -> Plan:
        settings = _with(bare.recipe, bare.group_size, steps / 100_000)
        return _again(bare, checkpoint, settings)

    steps = range(1, 100_001)
    return filled(bisect_right(steps, target, key=lambda step: expected_bits(filled(step))))
