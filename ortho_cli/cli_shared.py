"""What the commands have in common."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ortho_cli.errors import ResourceError

if TYPE_CHECKING:
    from ortho_cli.plan import Plan


def plan_of(
    model: Path,
    stats: Path | None,
    recipe: str | None,
    sets: list[str] | None,
    workers: int | None,
    reference: Path | None = None,
) -> tuple[Any, Plan]:
    """Open a checkpoint and decide what is done with it."""
    from ortho_cli.checkpoint import open_checkpoint
    from ortho_cli.plan import make_plan
    from ortho_cli.recipe import load_recipe
    from ortho_cli.statistics import check_model, open_statistics

    settings = load_recipe(recipe, sets or ())
    checkpoint = open_checkpoint(model)
    found = open_statistics(stats) if stats else None
    plan = make_plan(
        checkpoint,
        settings,
        statistics=found,
        reference=open_checkpoint(reference) if reference else None,
        workers=workers or _cores(),
    )
    if found is not None:
        check_model(found, checkpoint, [tensor.source for tensor in plan.split])
    return checkpoint, plan


def show_plan(plan: Plan, model: Path, *, as_json: bool, quiet: bool) -> None:
    """Print a plan that is not carried out."""
    from ortho_cli import report

    show(plan.to_json(), report.print_plan, as_json, quiet, source=str(model))


def show(
    document: dict[str, Any],
    printer: Callable[..., None],
    as_json: bool,
    quiet: bool,
    **names: str,
) -> None:
    """Give one document to scripts, or its gist to eyes."""
    from ortho_cli import report

    if as_json:
        try:
            report.print_json(document)
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


def default_out(model: Path, what: str = "ortho") -> Path:
    """Name the folder beside a model that its output goes to."""
    from ortho_cli.checkpoint import model_name

    whole = Path(os.path.abspath(model))  # noqa: PTH100 - resolve() would leave the user's folder
    beside = (
        whole if model.name in ("", "..") else model
    )  # as the user wrote it, where it names one
    return beside.parent / f"{model_name(whole)}-{what}"


def _cores() -> int:
    """Cores given to this process, at most eight: past that the disk is the limit."""
    given = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return min(8, given)
