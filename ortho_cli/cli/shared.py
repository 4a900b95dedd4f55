"""What the commands have in common."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ortho_cli.errors import ResourceError, UsageError

if TYPE_CHECKING:
    from ortho_cli.decompose.plan import Plan


def located(given: Path, *, quiet: bool) -> Path:
    """Find the folder that a path, or the name of a model in the Hub's cache, means."""
    from ortho_cli.storage.hub import locate

    found, note = locate(given)
    if note and not quiet:
        from ortho_cli.cli.show import tables

        tables.print_note(note)
    return found


def plan_of(
    model: Path,
    stats: Path | None,
    recipe: str | None,
    sets: list[str] | None,
    workers: int | None,
    reference: Path | None = None,
    copy: list[str] | None = None,
    arguments: Iterable[Path | None] = (),
) -> tuple[Any, Plan]:
    """Open a checkpoint and decide what is done with it; no file of `arguments` is copied."""
    """Open a checkpoint and decide what is done with it."""
    from ortho_cli.convert.sources.adapters import refuse_adapter
    from ortho_cli.decompose.plan import choose_side_files, make_plan
    from ortho_cli.decompose.recipe import load_recipe
    from ortho_cli.formats.statistics import check_model, open_statistics
    from ortho_cli.storage.checkpoint import open_checkpoint

    settings = load_recipe(recipe, sets or ())
    for path in (model, reference):
        if path is not None:
            refuse_adapter(path)
    checkpoint = open_checkpoint(model)
    found = open_statistics(stats) if stats else None
    before = open_checkpoint(reference) if reference else None
    given = [path for path in (*arguments, Path(recipe) if recipe else None) if path is not None]
    plan = make_plan(
        checkpoint,
        settings,
        statistics=found,
        reference=before,
        workers=workers or _cores(),
        side=choose_side_files(checkpoint, found, before, copy=copy or (), arguments=given),
    )
    if found is not None:
        check_model(found, checkpoint, [tensor.source for tensor in plan.split])
    return checkpoint, plan


def settled(
    plan: Plan, checkpoint: Any, out: Path | None = None, *, quiet: bool, verbose: bool
) -> Plan:
    """Make a plan that is only shown the one that would be carried out.

    Where the budget is global, that takes what the run does first: to read every weight once.

    Args:
        plan: made from `checkpoint`.
        checkpoint: the source.
        out: where the run would go, whose unfinished work may hold a survey.
        quiet: say nothing.
        verbose: say more.
    """
    if not plan.is_open:
        return plan
    from ortho_cli.cli.show.progress import ProgressSink
    from ortho_cli.decompose.budget import settle
    from ortho_cli.decompose.survey import load_surveys
    from ortho_cli.storage.output import resolve_output

    known = () if out is None else load_surveys(resolve_output(out))
    with ProgressSink("survey", quiet=quiet, verbose=verbose) as sink:
        return settle(plan, checkpoint, known=known, on_event=sink)


def show_plan(
    plan: Plan, model: Path, *, as_json: bool, quiet: bool, notes: Iterable[str] = ()
) -> None:
    """Print a plan that is not carried out, with what else is to be said."""
    from ortho_cli.cli.show import tables

    document = plan.to_json()
    document["notes"] += notes
    show(document, tables.print_plan, as_json, quiet, source=str(model))


def show(
    document: dict[str, Any],
    printer: Callable[..., None],
    as_json: bool,
    quiet: bool,
    **names: str,
) -> None:
    """Give one document to scripts, or its gist to eyes."""
    from ortho_cli.cli.show import tables

    if as_json:
        try:
            tables.print_json(document)
        except ResourceError as error:
            done = document.get("run", {}).get("output")
            if done is None:
                raise
            raise ResourceError(
                f"{error.message}; the work is done, and `{done}` is complete",
                hint=f"`ortho inspect {done}` says what it holds",
            ) from error
    elif not quiet:
        printer(document, **names)


def run_facts(target: Path, began: float) -> dict[str, Any]:
    """Say what is true of this run alone."""
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


def place_output(out: Path | None, model: Path, what: str = "ortho") -> tuple[Path, list[str]]:
    """Say where the output goes, and what is unusual about that.

    Args:
        out: as it was given, or None.
        model: the source, as it was given.
        what: ends the name of an output that was not given.
    Raises:
        UsageError: there is no place to choose: MODEL is in the Hub's cache, and so are we.
    """
    from ortho_cli.storage.checkpoint import hub_name

    if out is None:
        return default_out(model, what)
    if hub_name(out) is None:
        return out, []
    return out, [
        f"output `{out}` lies in the Hub's cache: it is no revision there, and `hf cache prune` "
        "deletes it"
    ]


def default_out(model: Path, what: str = "ortho") -> tuple[Path, list[str]]:
    """Name the folder that a model's output goes to, and say why where it is not beside the model.

    It is beside it unless that is the Hub's cache, where `hf cache prune` would delete it, or a
    folder that cannot be written: then it is in the working directory.

    Raises:
        UsageError: MODEL is in the Hub's cache, and the working directory, too.
    """
    from ortho_cli.storage.checkpoint import hub_name, model_name

    whole = Path(os.path.abspath(model))  # noqa: PTH100 - resolve() would leave the user's folder
    repository = hub_name(model)
    if repository is not None:
        here = Path(f"{repository}-{what}")
        if hub_name(Path.cwd()) is not None:
            raise UsageError(
                f"`{model}` and the working directory lie in the Hub's cache, where `hf cache "
                "prune` would delete the output",
                hint=f"say where it should go: -o ~/{here}",
            )
        return here, [f"output goes to `{here}` here, not to the Hub's cache, where MODEL lies"]
    # As the user wrote it, where it names a folder.
    beside = whole if model.name in ("", "..") else model
    name = f"{model_name(whole)}-{what}"
    if can_write(beside.parent):
        return beside.parent / name, []
    return Path(name), [f"output goes to `{name}` here: `{beside.parent}` cannot be written"]


def can_write(folder: Path) -> bool:
    """Tell whether files can be made in a folder."""
    return os.access(folder, os.W_OK | os.X_OK)


def _cores() -> int:
    """Cores given to this process, at most eight: past that the disk is the limit."""
    given = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return min(8, given)
