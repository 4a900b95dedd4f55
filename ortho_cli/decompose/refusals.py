"""Checks before a plan is made: quantized sources, other models, settings that do not fit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ortho_cli.convert.sources.adapters import refuse_adapter, refuse_adapter_names
from ortho_cli.convert.sources.quantized import examine
from ortho_cli.decompose.selection import sibling_groups
from ortho_cli.decompose.settings import Forget, Recipe
from ortho_cli.errors import CheckpointError, RecipeError
from ortho_cli.formats import artifact
from ortho_cli.formats.statistics import Statistics
from ortho_cli.storage.checkpoint import Checkpoint, open_checkpoint


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """Refuse a source that is an artifact, an adapter or quantized.

    Raises:
        CheckpointError: names the sign of it, and a way out.
    """
    for shard in checkpoint.shards:
        if artifact.is_ours(shard.metadata):
            raise CheckpointError(
                f"`{shard.path}` is the {shard.metadata.get('role')} file of an artifact already",
                hint="decompose the model it was made from",
            )
    names = [tensor.name for tensor in checkpoint.tensors]
    refuse_adapter_names(checkpoint.path, names, checkpoint.config, strips=False)
    folder = checkpoint.path if checkpoint.path.is_dir() else None
    if what := examine(checkpoint.tensors, checkpoint.config, folder):
        raise what.refusal(checkpoint.path)


def refuse_folder(folder: Path) -> None:
    """Refuse a folder that transformers is about to load, if it is an adapter or quantized.

    Raises:
        CheckpointError: names the sign of it, and a way out.
    """
    refuse_adapter(folder)
    if any(folder.glob("*.safetensors")):
        refuse_quantized(open_checkpoint(folder))


def check_reference(checkpoint: Checkpoint, reference: Checkpoint) -> None:
    """Refuse a reference that is another model, or quantized.

    Raises:
        CheckpointError: names the first tensor that differs in dtype or shape.
    """
    refuse_quantized(reference)
    mine = {t.name: (t.dtype, t.shape) for t in checkpoint.tensors}
    theirs = {t.name: (t.dtype, t.shape) for t in reference.tensors}
    for name in sorted(mine.keys() | theirs.keys()):
        if mine.get(name) == theirs.get(name):
            continue
        told = [
            f"{tensor[0]} {list(tensor[1])}" if tensor else "absent"
            for tensor in (mine.get(name), theirs.get(name))
        ]
        raise CheckpointError(
            f"tensor `{name}` is {told[0]} in `{checkpoint.path}` and {told[1]} in the reference "
            f"`{reference.path}`",
            hint="give the same model before it saw the data; `ortho convert --dtype` casts one",
        )


def check_compensation(recipe: Recipe, statistics: Statistics | None) -> None:
    """Refuse GPTQ without Gram matrices, or together with a split or setting it does not fit.

    Raises:
        RecipeError: says what is missing.
    """
    rounding = recipe.base.rounding
    if recipe.ortho.split != "residual":
        raise RecipeError(
            f"base.rounding is {rounding}, and ortho.split is {recipe.ortho.split}",
            hint="forgetting moves codes away from the nearest; use base.rounding nearest",
        )
    if recipe.base.alone:
        raise RecipeError(
            f"base.alone is true, and base.rounding is {rounding}: its codes compensate one "
            "another, and base is worse once ortho corrects some of them",
            hint="ortho.density 0 gives the best base by itself; else leave base.alone out",
        )
    if statistics is None or not statistics.has_gram:
        there = "no statistics are given" if statistics is None else f"`{statistics.path}` has none"
        raise RecipeError(
            f"base.rounding is {rounding}, which needs Gram matrices, and {there}",
            hint="ortho calibrate MODEL --data FILE --gram full, then --stats stats.safetensors",
        )


def check_shared(recipe: Recipe, split: Mapping[str, tuple[int, int]]) -> None:
    """Refuse siblings that are to share columns, and keep different numbers of them.

    Args:
        recipe: its settings.
        split: columns of each weight that is split, and how many of them are kept.
    Raises:
        RecipeError: names two of them.
    """
    for group in sibling_groups(split) if recipe.ortho.share else ():
        for one in group[1:]:
            if split[one] != split[group[0]]:
                (width, mine), (other_width, other) = split[group[0]], split[one]
                raise RecipeError(
                    f"ortho.share is true, and `{group[0]}` keeps {mine} of {width} columns where "
                    f"`{one}` keeps {other} of {other_width}",
                    hint="let overrides match all of q, k and v, and gate and up, or none",
                )


def check_structure(recipe: Recipe) -> None:
    """Refuse settings of whole columns beside single weights, and what columns do not fit.

    Raises:
        RecipeError: the layout is one of single weights, single weights are to have a rank or to
            be shared, codes move where ortho does not hold them.
    """
    split, layout = recipe.ortho.split, recipe.ortho.layout
    if recipe.keeps_columns and layout != "csr":
        raise RecipeError(
            f"ortho.structure is columns, and ortho.layout is {layout}",
            hint="columns need no indices: --set ortho.layout=null",
        )
    if recipe.ortho.max_rank is not None and not recipe.keeps_columns:
        raise RecipeError(
            f"ortho.max_rank is {recipe.ortho.max_rank}, and ortho.structure is points",
            hint="single weights have no rank: --set ortho.structure=columns",
        )
    if recipe.ortho.share and not recipe.keeps_columns:
        raise RecipeError(
            "ortho.share is true, and ortho.structure is points",
            hint="whole columns can be shared alone: --set ortho.structure=columns",
        )
    if recipe.ortho.share and split != "residual":
        raise RecipeError(
            f"ortho.share is true, and ortho.split is {split}",
            hint="this split chooses the columns of each weight by itself: --set ortho.share=false",
        )
    if recipe.forgets:
        _check_support(recipe)


def _check_support(recipe: Recipe) -> None:
    """Refuse codes that move where ortho does not hold them."""
    support = recipe.forget.support
    if support != recipe.ortho.structure:
        structure = recipe.ortho.structure
        raise RecipeError(
            f"forget.support is {support}, and ortho.structure is {structure}: ortho has to hold "
            "every code that moves",
            hint=f"--set forget.support={structure}, or --set ortho.structure={support}",
        )
    if support == "columns" and recipe.forget.mask != Forget().mask:
        raise RecipeError(
            f"forget.mask is {recipe.forget.mask:g}, and forget.support is columns: ortho.density "
            "says which share may move",
            hint="--set forget.mask=null",
        )


def check_settings(recipe: Recipe) -> None:
    """Refuse int8 values, or one budget for all tensors, beside settings that they do not fit.

    Raises:
        RecipeError: values are int8, and the layout is CSR or the recipe forgets; the budget is
            global, and saliencies of different tensors do not compare, since the recipe forgets,
            has a reference, or selects by the residual alone.
    """
    split, layout = recipe.ortho.split, recipe.ortho.layout
    if recipe.ortho.values == "int8" and layout != "compact" and not recipe.keeps_columns:
        raise RecipeError(
            f"ortho.values is int8, and ortho.layout is {layout}",
            hint="set ortho.layout to compact, or ortho.structure to columns",
        )
    if recipe.ortho.values == "int8" and recipe.forgets:
        raise RecipeError(
            f"ortho.values is int8, and ortho.split is {split}",
            hint="alpha 1 must restore what was forgotten exactly; use ortho.values source",
        )
    if recipe.ortho.budget == "global" and split != "residual":
        raise RecipeError(
            f"ortho.budget is global, and ortho.split is {split}",
            hint="this split needs room in every tensor; use ortho.budget per-tensor",
        )
    if recipe.ortho.budget == "global" and recipe.saliency.kind != "curvature":
        raise RecipeError(
            f"ortho.budget is global, and saliency.kind is {recipe.saliency.kind}",
            hint="only curvature compares weights of different layers: --stats FILE",
        )
