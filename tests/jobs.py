"""Jobs as tests run them: checks of the output and the work in one call, and processes to kill."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

from ortho_cli.calibrate import job as calibrate_job
from ortho_cli.calibrate.plan import CalibrationPlan
from ortho_cli.decompose import job as decompose_job
from ortho_cli.decompose.plan import Plan
from ortho_cli.storage.checkpoint import Checkpoint

# Starts the processes that tests kill. It imports once what each of them would import for seconds.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["ortho_cli.calibrate.job", "ortho_cli.decompose.job", "transformers.models.llama"]
)


def decompose(
    plan: Plan, source: Checkpoint, out: Path, *, force: bool = False, **options: Any
) -> dict[str, Any]:
    seal = options.get("seal")
    target = decompose_job.check_target(plan, source, out, force=force, seal=seal)
    return decompose_job.decompose(plan, source, target, **options)


def calibrate(plan: CalibrationPlan, source: Checkpoint, out: Path, **options: Any) -> None:
    calibrate_job.calibrate(plan, source, calibrate_job.check_target(source, out), **options)
