"""Shared by the commands: find the model, plan its split, place the output, print the result."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ortho_cli.cli.boundary import ClosedPipe
from ortho_cli.errors import RecipeError, ResourceError, UsageError
from ortho_cli.storage.machine import cores

if TYPE_CHECKING:
    from ortho_cli.cli.show.progress import ProgressSink
    from ortho_cli.decompose.plan import Plan
    from ortho_cli.decompose.settings import Recipe
    from ortho_cli.model.cost import Part
    from ortho_cli.storage.checkpoint import Checkpoint

log = logging.getLogger(__name__)

WORKERS = 8  # threads by default at most; with more the disk is the limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """How a command prints: what --json, --csv, --quiet and --verbose ask for."""

    as_json: bool
    quiet: bool
    verbose: int
    as_csv: bool = False

    def progress(self, stage: str) -> ProgressSink:
        """Open the progress of one stage of the work, a sink of events."""
        from ortho_cli.cli.show.progress import ProgressSink

        return ProgressSink(stage, quiet=self.quiet, verbose=self.verbose > 0)

    def show(
        self, document: Mapping[str, object], printer: Callable[..., None], **names: str
    ) -> None:
        """Print a document on stdout, as JSON or its gist.

        A gist that stdout does not take is no error where the output itself is complete.
        """
        run = document.get("run")
        done = run.get("output") if isinstance(run, Mapping) else None
        if not self.as_json:
            lost = (ResourceError, ClosedPipe) if done is not None else ()
            with contextlib.suppress(*lost):
                if not self.quiet:
                    printer(document, **names)
            return
        from ortho_cli.cli.show.console import print_json

        try:
            print_json(document)
        except ResourceError as error:
            if done is None:
                raise
            raise ResourceError(
                f"{error.message}; the work is done, and `{done}` is complete",
                hint=f"`ortho inspect {done}` says what it holds",
            ) from error

    def show_plan(
        self,
        plan: Plan,
        model: Path,
        *,
        notes: Iterable[str] = (),
        then: str = "",
        out: Path | None = None,
        estimate: Sequence[Part] = (),
    ) -> None:
        """Print a plan that is not carried out, its time, notes, its folder and what comes next."""
        from ortho_cli.cli.show.decompose import print_plan

        document = plan.to_json() | {"notes": [*plan.notes, *plan.side.notes, *notes]}
        document |= estimated(estimate)
        self.show(
            document,
            print_plan,
            source=str(model),
            then=then,
            out=str(out or ""),
        )

    def write_page(self, path: Path, content: bytes) -> None:
        """Write a page of HTML, and say so."""
        from ortho_cli.cli.show.console import print_notes, size
        from ortho_cli.cli.show.page import write_page

        write_page(path, content)
        if not self.quiet and not self.as_json:
            print_notes(f"the page is `{path}`, {size(len(content))}")


def estimated(parts: Sequence[Part]) -> dict[str, object]:
    """Give the entry `estimate` of a plan's document; none where nothing was estimated."""
    if not parts:
        return {}
    from ortho_cli.model.cost import to_json

    return {"estimate": to_json(parts)}


def computes_here(device: str) -> bool:
    """Tell whether a model would be on the CPU, whose speed is known; torch is not imported."""
    if device != "auto":
        return device == "cpu"
    from importlib.metadata import version

    return version("torch").endswith("+cpu") or not Path("/dev/nvidiactl").exists()


def located(given: Path, *, quiet: bool) -> Path:
    """Find the folder that a path means: a name in the Hub's cache, or the file that is its model.

    Of a file that is all of its folder's model the folder is read, with config and tokenizer; any
    other file, and one of an artifact, stays what is meant.
    """
    from ortho_cli.formats.artifact import is_artifact
    from ortho_cli.storage.folders import folder_of
    from ortho_cli.storage.hub import locate

    found, note = locate(given)
    notes = [note]
    is_file = found.suffix == ".safetensors" and found.is_file()
    if is_file and not is_artifact(found, damaged=True):
        found, note = folder_of(found)
        notes.append(note)
    if not quiet:
        from ortho_cli.cli.show.console import print_notes

        print_notes(*filter(None, notes))
    return found


# Longer than 60 lines: half of it says what each argument is.
def plan_of(
    model: Path,
    stats: Path | None,
    recipe: str | None,
    sets: list[str] | None,
    workers: int | None,
    reference: Path | None = None,
    copy: list[str] | None = None,
    arguments: Iterable[Path | None] = (),
    *,
    has_rows: bool = False,
) -> tuple[Checkpoint, Plan]:
    """Open a checkpoint and plan its split.

    Args:
        model: the checkpoint.
        stats: statistics, if there are some.
        recipe: as it was given.
        sets: changes of it.
        workers: threads; None for the cores.
        reference: the model before.
        copy: globs of more side files.
        arguments: files that are never copied beside base.
        has_rows: rows of data or of a forget set are given: without --recipe, nothing is measured.
    Without a recipe, statistics mean `curvature`, and no input at all means `default`.
    """
    from ortho_cli.convert.sources.adapters import refuse_adapter
    from ortho_cli.decompose.plan import choose_side_files, make_plan
    from ortho_cli.decompose.recipe import load_recipe
    from ortho_cli.decompose.selection import apart
    from ortho_cli.formats.statistics import open_statistics
    from ortho_cli.storage.checkpoint import open_checkpoint

    # What is wrong with it is told before the model is opened.
    given_recipe = load_recipe(recipe, sets or ())
    for path in (model, reference):
        if path is not None:
            refuse_adapter(path)
    checkpoint = apart(open_checkpoint(model), given_recipe)
    statistics = open_statistics(stats) if stats else None
    before = apart(open_checkpoint(reference), given_recipe) if reference else None
    settings, measures, note = _recipe_for(
        checkpoint,
        recipe,
        sets or [],
        has_stats=stats is not None,
        has_others=bool(reference or has_rows),
    )
    given = [path for path in (*arguments, Path(recipe) if recipe else None) if path is not None]
    plan = make_plan(
        checkpoint,
        settings,
        statistics=statistics,
        reference=before,
        workers=workers or min(WORKERS, cores()),
        side=choose_side_files(checkpoint, statistics, before, copy=copy or (), arguments=given),
        measures=measures,
    )
    if note:
        plan = replace(plan, notes=(*plan.notes, note))
    split, tensors = len(plan.split), len(plan.tensors)
    log.info(
        "plan %s splits %d of %d tensors, %d workers", plan.sha256, split, tensors, plan.workers
    )
    return checkpoint, plan


def _recipe_for(
    checkpoint: Checkpoint,
    recipe: str | None,
    sets: list[str],
    *,
    has_stats: bool,
    has_others: bool,
) -> tuple[Recipe, bool, str | None]:
    """Load the recipe; tell whether its curvature is measured, and a note on a choice of ours."""
    from ortho_cli.calibrate.own_text import obstacle, way
    from ortho_cli.decompose.recipe import MEASURED, WEIGHTED, load_recipe

    if has_stats or has_others:
        settings = load_recipe(recipe, sets)
        # With absmax scales statistics would help ortho alone, and base not at all.
        if recipe or has_others or settings.forgets or settings.compensates:
            return settings, False, None
        chosen = f"--stats without --recipe: the recipe is `{WEIGHTED}`"
        return load_recipe(WEIGHTED, sets), False, chosen
    settings = load_recipe(recipe or MEASURED, sets)
    why = obstacle(checkpoint) if settings.can_measure else None
    if why is None and (recipe or settings.can_measure):
        told = way(checkpoint) if settings.can_measure else None
        return settings, settings.can_measure, told
    if recipe is None:  # an obstacle, or --set leaves nothing to measure
        note = None if why is None else without_curvature(why)
        return load_recipe(None, sets), False, note
    raise RecipeError(
        f"recipe `{recipe}` uses curvature, no statistics are given, and {why}",
        hint="give --stats FILE, as `ortho calibrate` writes it, or --recipe int4",
    )


def without_curvature(why: str) -> str:
    """Word the note that the default recipe is plain INT4, and why."""
    return f"{why}: nothing tells which weights matter, so they are split as by `--recipe int4`"


def settled(plan: Plan, checkpoint: Checkpoint, out: Path | None = None, *, output: Output) -> Plan:
    """Complete a plan that is only shown to the one that would be carried out.

    With a global budget this reads every weight once, as the run does first.

    Args:
        plan: made from `checkpoint`.
        checkpoint: the source.
        out: where the run would go; its unfinished work may hold a survey.
        output: shows the progress.
    """
    if not plan.is_open:
        return plan
    from ortho_cli.decompose.budget import settle
    from ortho_cli.decompose.survey import load_surveys

    known = () if out is None else load_surveys(out)
    with output.progress("survey") as sink:
        return settle(plan, checkpoint, known=known, on_event=sink)


def run_facts(target: Path, began: float) -> dict[str, object]:
    """Report what holds for this run alone: output, seconds since `began`, peak memory."""
    return {
        "output": str(target),
        "seconds": round(time.perf_counter() - began, 3),
        "peak_rss_bytes": _peak_rss(),
    }


def _peak_rss() -> int:
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the parent held before exec
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def place_output(out: Path | None, model: Path, suffix: str = "ortho") -> tuple[Path, list[str]]:
    """Choose the folder of the output, with a note where it is an unusual one.

    Without `out` that is a folder beside the model, or one in the working directory where the
    model is in a folder that cannot be written, or in the Hub's cache, in which `hf cache prune`
    would delete it.

    Args:
        out: as it was given, or None.
        model: the source, as it was given.
        suffix: ends the name of an output that was not given.
    Raises:
        UsageError: MODEL and the working directory are both in the Hub's cache.
    """
    from ortho_cli.storage.checkpoint import hub_name, model_name

    pruned = "is in the Hub's cache, and no revision there: `hf cache prune` deletes it"
    if out is not None:
        return out, [] if hub_name(out) is None else [f"output `{out}` {pruned}"]
    repository = hub_name(model)
    if repository is not None:
        here = Path(f"{repository}-{suffix}")
        if hub_name(Path.cwd()) is not None:
            raise UsageError(
                f"`{model}` and the working directory are in the Hub's cache, where `hf cache "
                "prune` would delete the output",
                hint=f"say where it should go: -o ~/{here}",
            )
        return here, [f"output goes to `{here}` here, not to the Hub's cache, where MODEL is"]
    whole = Path(os.path.abspath(model))  # noqa: PTH100 - resolve() would leave the user's folder
    # As the user wrote it, where it names a folder.
    folder = (whole if model.name in ("", "..") else model).parent
    name = f"{model_name(whole)}-{suffix}"
    if can_write(folder):
        return folder / name, []
    return Path(name), [f"output goes to `{name}` here: `{folder}` cannot be written"]


def can_write(folder: Path) -> bool:
    """Return whether files can be made in a folder."""
    return os.access(folder, os.W_OK | os.X_OK)
