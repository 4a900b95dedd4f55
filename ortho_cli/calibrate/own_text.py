"""Curvature that `ortho decompose` measures by itself: inputs, on text that the model writes.

`obstacle` tells from files and headers what prevents it; no torch is imported for that. `measure`
lets the model write, in seconds, and gives statistics of kind gram. A model that is larger than
memory reads random tokens instead, block by block. Statistics are a file beside the output until
that is complete, so that a killed run resumes with the same ones.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from ortho_cli.calibrate import memory
from ortho_cli.decompose.settings import Recipe
from ortho_cli.errors import CalibrationError, CheckpointError, OrthoError
from ortho_cli.events import EventSink, null_sink
from ortho_cli.formats.statistics import Statistics, check_model, is_statistics, open_statistics
from ortho_cli.storage import strict_json
from ortho_cli.storage.checkpoint import Checkpoint
from ortho_cli.storage.job import Target
from ortho_cli.storage.work_folder import work_folder

CAUSAL = ("ForCausalLM", "LMHeadModel")  # ends of `architectures` of models that write text

# What transformers and torch raise of a model that they can build and not run.
_CANNOT_RUN = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def obstacle(checkpoint: Checkpoint) -> str | None:
    """Say why no text can be written with a checkpoint here; None where nothing is known to."""
    path, config = checkpoint.path, checkpoint.config
    if config is None or not path.is_dir():
        return f"`{path}` has no config.json" if path.is_dir() else f"`{path}` is a bare file"
    names = config.get("architectures")
    listed = [str(name) for name in names] if isinstance(names, list) else []
    if not any(name.endswith(CAUSAL) for name in listed):
        told = ", ".join(listed) or "no `architectures`"
        return f"config.json of `{path}` names {told}, no causal language model"
    if find_spec("transformers") is None:
        return "transformers is not installed (`pip install 'ortho-cli[hf]'`)"
    least, there = memory.least(checkpoint), memory.available_memory()
    if there is not None and least > there:
        return (
            f"`{path}` takes {least / 1e6:,.0f} MB of memory to be measured block by block and "
            f"{there / 1e6:,.0f} MB are available"
        )
    return None


def way(checkpoint: Checkpoint) -> str | None:
    """Say so where a model is measured block by block, since it is larger than memory."""
    if not memory.goes_by_block(checkpoint):
        return None
    needed, there = memory.needed(checkpoint), memory.available_memory() or 0
    return (
        f"`{checkpoint.path}` takes {needed / 1e6:,.0f} MB of memory to write text and "
        f"{there / 1e6:,.0f} MB are available: it is measured block by block, on random tokens"
    )


def measure(
    checkpoint: Checkpoint,
    recipe: Recipe,
    file: Path,
    *,
    device: str = "auto",
    on_event: EventSink = null_sink,
) -> Statistics:
    """Measure inputs on text that a model writes, as `recipe.calibrate` says.

    Args:
        checkpoint: a transformers folder.
        recipe: chooses the weights, and how they are measured.
        file: to make; where an earlier run has made it, nothing is measured.
        device: auto, cpu, cuda or cuda:N.
        on_event: told of progress.
    Raises:
        CheckpointError: transformers cannot load the model.
        CalibrationError: it can, and cannot run it, or a weight is no Linear of it.
        NumericalError: an input or a logit is NaN or infinite.
    """
    from ortho_cli.calibrate.job import calibrate, check_target
    from ortho_cli.calibrate.plan import make_plan, read_sets

    if _is_made(file, checkpoint, recipe):
        return open_statistics(file)
    checkpoint = replace(checkpoint, notes=())  # decompose tells them
    target = check_target(checkpoint, file, force=True)
    by_block = memory.goes_by_block(checkpoint, out=target.path)
    sets = read_sets(checkpoint.folder, [], [], recipe.calibrate, on_event, by_block=by_block)
    plan = make_plan(checkpoint, recipe, sets, by_block=by_block)
    try:
        calibrate(plan, checkpoint, target, device=device, on_event=on_event)
    except OrthoError:
        raise
    except _CANNOT_RUN as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise CalibrationError(
            f"transformers cannot run `{checkpoint.path}`: {first}",
            hint="give --stats FILE, or a recipe without curvature",
        ) from error
    return open_statistics(file)


def _is_made(file: Path, checkpoint: Checkpoint, recipe: Recipe) -> bool:
    """Whether a file has the statistics that would be made: of these settings and this model."""
    if not is_statistics(file):
        return False
    try:
        found = open_statistics(file)
        told = strict_json.parse(found.shard.metadata["recipe"].encode(), what="recipe", hint="")
        wanted = recipe.calibrate.canonical()
        # The file says of `autocast: auto` what that meant here.
        same = told | {"autocast": None} == wanted | {"autocast": None}
        measured = [tensor for tensor in checkpoint.tensors if tensor.name in found.tensors]
        check_model(found, checkpoint, measured)
    except (CalibrationError, CheckpointError, KeyError):
        return False
    return same


@contextmanager
def beside(target: Target) -> Iterator[Path]:
    """Name a file of statistics beside an output; it goes when no unfinished work needs it."""
    file = target.path.with_name(f".{target.path.name}.stats")
    try:
        yield file
    finally:
        if not work_folder(target.path).exists():
            file.unlink(missing_ok=True)


@contextmanager
def nowhere() -> Iterator[Path]:
    """Name a file of statistics in a folder that goes at the end."""
    with tempfile.TemporaryDirectory(prefix="ortho-") as folder:
        yield Path(folder) / "stats"
