"""The command `ortho calibrate`: measure curvature statistics of a model on data."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ortho_cli.cli.options import (
    DryRunOption,
    JsonOption,
    ModelDeviceOption,
    QuietOption,
    RecipeOption,
    SchemaOption,
    SetOption,
    TrustOption,
    VerboseOption,
)
from ortho_cli.cli.shared import Output, located, run_facts

if TYPE_CHECKING:
    from ortho_cli.events import Event

ModelArgument = Annotated[Path, typer.Argument(help="A transformers folder, with its tokenizer.")]
DataOption = Annotated[
    list[Path],
    typer.Option(
        "--data",
        metavar="FILE...",
        help="What must keep working: files of text, JSON, JSON lines, CSV or parquet, gzip or "
        "not (`text`; `prompt` and `completion`, which alone counts; or chats); read whole.",
    ),
]
ForgetOption = Annotated[
    list[Path] | None,
    typer.Option("--forget", metavar="FILE...", help="What must go; measured apart."),
]
OutOption = Annotated[
    Path, typer.Option("--out", "-o", help="The file to make.", show_default=True)
]
GramOption = Annotated[
    str | None,
    typer.Option(
        "--gram",
        metavar="none|full",
        help="full: the input Gram matrix of each weight, too; as --set calibrate.gram=full.",
    ),
]
ForceOption = Annotated[
    bool, typer.Option("--force", help="Replace statistics at OUT once the new are complete.")
]


def calibrate(
    model: ModelArgument,
    data: DataOption,
    forget: ForgetOption = None,
    out: OutOption = Path("stats.safetensors"),
    gram: GramOption = None,
    recipe: RecipeOption = None,
    sets: SetOption = None,
    force: ForceOption = False,
    dry_run: DryRunOption = False,
    device: ModelDeviceOption = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = 0,
    schema: SchemaOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Measure how much each weight of MODEL matters to the data; write curvature statistics.

    Holds the model in memory, and on disk two float32 per weight of each set while it runs, and
    with --gram full two for each pair of a weight's inputs. With --forget the file is as sensitive
    as the private data: only its owner may read it. A killed or interrupted run resumes when the
    same command is given again.
    """
    from ortho_cli.calibrate.job import calibrate as run
    from ortho_cli.calibrate.job import check_target
    from ortho_cli.calibrate.plan import make_plan, read_sets
    from ortho_cli.cli.show.calibrate import print_calibrated, print_calibration_plan
    from ortho_cli.convert.sources.adapters import refuse_adapter
    from ortho_cli.decompose.recipe import load_recipe
    from ortho_cli.storage.checkpoint import open_checkpoint

    output = Output(as_json=as_json, quiet=quiet, verbose=verbose)
    asked = () if gram is None else (f"calibrate.gram={gram}",)
    settings = load_recipe(recipe, [*(sets or ()), *asked])
    model = located(model, quiet=quiet)
    refuse_adapter(model)
    checkpoint = open_checkpoint(model)
    target = check_target(checkpoint, out, force=force, reads=[*data, *(forget or [])])
    notes: list[Event] = []
    rows = read_sets(model, data, forget or [], settings.calibrate, notes.append)
    plan = make_plan(checkpoint, settings, rows)
    target.check_space(plan.bytes_on_disk, of="statistics with their sums")
    if dry_run:
        document = plan.to_json() | {"notes": list(checkpoint.notes)}
        output.show(document, print_calibration_plan, source=str(model))
        return
    began = time.perf_counter()
    with output.progress("calibrate") as sink:
        for note in notes:
            sink(note)
        calibration = run(plan, checkpoint, target, device=device, on_event=sink)
    document = calibration.to_json() | {"run": run_facts(out, began)}
    output.show(document, print_calibrated)
