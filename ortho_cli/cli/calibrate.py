"""The command `ortho calibrate`: measure curvature statistics of a model on data."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ortho_cli.cli import options
from ortho_cli.cli.shared import Output, computes_here, estimated, located, run_facts

if TYPE_CHECKING:
    from ortho_cli.events import Event

SHORT = "Measure how much each weight matters."
EXAMPLES = """
    ortho calibrate SmolLM2
    ortho calibrate SmolLM2 --data train.txt --samples 64 -o stats.safetensors
    ortho calibrate SmolLM2 --data train.txt --recipe capability
"""


# Longer than 60 lines: half of it is the signature, which says all of each option.
def calibrate(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL",
            help="A transformers folder with its tokenizer, or ORG/NAME in the Hub's local cache.",
        ),
    ],
    data: Annotated[
        list[Path] | None,
        options.files(
            help="What must keep working: files of text, JSON, JSON lines, CSV or parquet, gzip or "
            "not (`text`; `prompt` and `completion`, which alone counts; or chats); read whole.  "
            "[default: text that MODEL itself writes, seeded]"
        ),
    ] = None,
    forget: Annotated[
        list[Path] | None, options.files(help="What must go; measured apart.")
    ] = None,
    out: Annotated[Path, options.out(help="The file to make.")] = Path("stats.safetensors"),
    samples: Annotated[
        int | None, typer.Option(min=1, help="Sequences that are measured.  [default: 128]")
    ] = None,
    length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of each of them.  [default: 512]")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Sequences of one pass.  [default: 4]")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of every draw.  [default: 0]")] = None,
    gram: Annotated[
        str | None,
        typer.Option(
            metavar="none|full",
            help="full: the input Gram matrix of each weight, too.  [default: the recipe's]",
            autocompletion=options.completing("none", "full"),
        ),
    ] = None,
    max_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Most memory to take, such as 8GB. A model that takes more is measured block by "
            "block, read from disk, with curvature gram.  [default: what is available]",
        ),
    ] = None,
    recipe: options.Recipe = None,
    sets: options.Set = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace statistics at OUT once the new are complete.")
    ] = False,
    dry_run: options.DryRun = False,
    device: options.ModelDevice = "auto",
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = 0,
    schema: options.Schema = False,
    trust_remote_code: options.Trust = False,
) -> None:
    """Measure how much each weight of MODEL matters to the data; write curvature statistics.

    Holds the model in memory, and on disk two float32 per weight of each set while it runs, and
    with --gram full two for each pair of a weight's inputs. A model that does not fit is read block
    by block. With --forget the file is as sensitive as the private data: only its owner may read
    it. A killed or interrupted run resumes when the same command is given again, and loses half a
    minute and one pass at most, or a block.
    """
    from ortho_cli.calibrate.job import calibrate as run
    from ortho_cli.calibrate.job import check_target
    from ortho_cli.calibrate.memory import goes_by_block
    from ortho_cli.calibrate.plan import make_plan, read_sets
    from ortho_cli.cli.show.calibrate import print_calibrated, print_calibration_plan
    from ortho_cli.convert.sources.adapters import refuse_adapter
    from ortho_cli.decompose.recipe import load_recipe
    from ortho_cli.decompose.selection import apart
    from ortho_cli.events import messages
    from ortho_cli.storage.checkpoint import open_checkpoint

    limit = None if max_memory is None else options.parse_size(max_memory, option="--max-memory")
    output = Output(as_json=as_json, quiet=quiet, verbose=verbose)
    asked = {"samples": samples, "length": length, "batch": batch_size, "seed": seed, "gram": gram}
    flags = [f"calibrate.{key}={value}" for key, value in asked.items() if value is not None]
    unweighted = ["calibrate.weighting=none"] if gram == "none" else []  # it is of that matrix
    settings = load_recipe(recipe, [*unweighted, *(sets or ()), *flags])
    model = located(model, quiet=quiet)
    refuse_adapter(model)
    checkpoint = apart(open_checkpoint(model), settings)
    target = check_target(checkpoint, out, force=force, reads=[*(data or []), *(forget or [])])
    notes: list[Event] = []
    by_block = goes_by_block(checkpoint, limit, target.path)
    rows = read_sets(
        model, data or [], forget or [], settings.calibrate, notes.append, by_block=by_block
    )
    plan = make_plan(checkpoint, settings, rows, by_block=by_block, memory=limit)
    target.check_space(plan.bytes_on_disk, of="statistics with their sums")
    if dry_run:
        from ortho_cli.calibrate.estimate import of_plan
        from ortho_cli.storage.speeds import open_speeds

        parts = of_plan(plan, checkpoint, open_speeds()) if computes_here(device) else []
        document = plan.to_json() | {"notes": [*checkpoint.notes, *messages(notes)]}
        document |= estimated(parts)
        output.show(document, print_calibration_plan, source=str(model))
        return
    began = time.perf_counter()
    with output.progress("calibrate") as sink:
        for note in notes:
            sink(note)
        calibration = run(plan, checkpoint, target, device=device, on_event=sink)
    document = calibration.to_json() | {"run": run_facts(out, began)}
    output.show(document, print_calibrated, source=str(model))
