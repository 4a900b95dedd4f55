"""The command `ortho convert`: write a checkpoint, or an artifact at one alpha, as safetensors."""

from __future__ import annotations

import contextlib
import logging
import time
from pathlib import Path
from typing import Annotated

import typer

from ortho_cli.cli import options
from ortho_cli.cli.convert_to import Wish, convert_to
from ortho_cli.cli.shared import Output, located, place_output, run_facts
from ortho_cli.errors import UsageError

log = logging.getLogger(__name__)

SHORT = "Write a checkpoint, or an artifact, as plain safetensors, GGUF or an adapter."
EXAMPLES = """
    ortho convert pytorch_model.bin --dtype bf16
    ortho convert SmolLM2-ortho --alpha 1
    ortho convert SmolLM2-ortho --to gguf
"""


# Longer than 60 lines: half of it is the signature, which says all of each option.
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SRC",
            help="A .safetensors or .gguf file, one of torch.save (.bin, .pt, .pth, .ckpt, "
            ".pth.tar), a model folder, or an artifact.",
        ),
    ],
    out: Annotated[
        Path | None,
        options.out(
            help="The folder to make, or the GGUF file.  [default: SRC-converted, of an artifact "
            "SRC-alpha-A, SRC-lora, SRC-base.gguf or SRC-lora.gguf, beside SRC; in the working "
            "directory for a model in the Hub's cache, or where that cannot be written]"
        ),
    ] = None,
    alpha: Annotated[
        str | None,
        typer.Option(metavar="A", help="For an artifact, and required there: 0 is base, 1 is all."),
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(
            metavar="FORM",
            help="What an artifact becomes instead: `gguf`, base for llama.cpp; `lora`, ortho as "
            "an adapter of PEFT, vLLM and SGLang; `gguf-lora`, that for llama.cpp.",
            autocompletion=options.completing("gguf", "lora", "gguf-lora"),
        ),
    ] = None,
    max_rank: Annotated[
        int | None,
        typer.Option(
            metavar="R", min=1, help="Keep the R columns of most energy in each weight's adapter."
        ),
    ] = None,
    approximate: Annotated[
        int | None,
        typer.Option(
            metavar="R",
            min=1,
            help="Write a scattered ortho as the nearest adapter of rank R; what it loses is "
            "measured.",
        ),
    ] = None,
    pad: Annotated[
        bool,
        typer.Option(
            "--pad", help="Give every weight the largest rank, by zeros, as SGLang needs it."
        ),
    ] = False,
    seal_to: options.SealTo = None,
    plaintext: Annotated[
        bool,
        typer.Option("--plaintext", help="Write the adapter of a sealed ortho without sealing it."),
    ] = False,
    identity: options.Identity = None,
    key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            help="Where a file of torch.save keeps its weights: `ema`, nested `model.ema`, `.` for "
            "all.  [default: the largest state dict, if no other is about as large]",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE",
            help="bfloat16, float16 or float32 (bf16, fp16, fp32), for floating tensors.  "
            "[default: each one's own]",
            autocompletion=options.complete_dtype,
        ),
    ] = None,
    shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Most bytes of tensors in a file.")
    ] = "5GB",
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Replace what convert made at OUT once the new one is complete; discard other "
            "half-done work.",
        ),
    ] = False,
    dry_run: options.DryRun = False,
    copy: options.Copy = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = 0,
) -> None:
    """Write any checkpoint, or an artifact at one alpha, as plain safetensors.

    Reads tile by tile and needs little memory; only a .bin of before torch 1.6 is held whole, and
    of a GGUF one tensor at a time. Nothing in a file of torch.save is ever run. Prefixes of
    wrappers, as DDP's `module.`, are stripped from names. A killed run resumes.

    With --to it writes what servers take: OUT.gguf, or an adapter, which is as private as ortho
    and must not be uploaded.
    """
    output = Output(as_json=as_json, quiet=quiet, verbose=verbose)
    wish = Wish(
        to=to,
        dtype=dtype,
        max_rank=max_rank,
        approximate=approximate,
        pad=pad,
        seal_to=tuple(seal_to or ()),
        plaintext=plaintext,
        identity=identity,
        force=force,
        dry_run=dry_run,
    )
    if to is not None:
        unfit = [("--alpha", alpha), ("--key", key), ("--copy", copy)]
        convert_to(source, out, wish, output, unfit=[name for name, one in unfit if one])
        return
    from ortho_cli.cli.show.convert import print_convert_plan, print_converted
    from ortho_cli.convert import job
    from ortho_cli.convert.plan import make_plan
    from ortho_cli.convert.sources.open_source import open_source
    from ortho_cli.events import Noted
    from ortho_cli.storage.sealing import read_keys

    for name in wish.of_adapters:
        raise UsageError(f"{name} is for adapters, and there is no --to", hint="add --to lora")
    size, share = options.parse_size(shard_size, option="--shard-size"), _share(alpha)
    source = located(source, quiet=quiet)
    keys = read_keys(identity)
    with contextlib.closing(open_source(source, alpha=share, keys=keys, key=key)) as opened:
        given = [identity] if identity else []
        plan = make_plan(opened, dtype=dtype, shard_size=size, copy=copy or (), arguments=given)
        log.info("plan %s of kind %s, %d tensors", plan.sha256, opened.kind, len(plan.tensors))
        folder = opened.folder if opened.kind == "artifact" else source
        suffix = "converted" if share is None else f"alpha-{share:g}"
        out, notes = place_output(out, folder, suffix)
        target = job.check_target(plan, opened, out, force=force)
        if dry_run:
            document = plan.to_json() | {"notes": [*plan.notes, *notes]}
            output.show(document, print_convert_plan, source=str(source), out=str(out))
            return
        began = time.perf_counter()
        with output.progress("convert") as sink:
            for note in notes:
                sink(Noted(message=note))
            digests = job.convert(plan, opened, target, on_event=sink)
    document = plan.to_json(digests) | {"run": run_facts(out, began)}
    output.show(document, print_converted)


def _share(alpha: str | None) -> float | None:
    """Read --alpha, one number: each alpha is a folder of its own."""
    try:
        return None if alpha is None else float(alpha)
    except ValueError:
        raise UsageError(
            f"--alpha is {alpha!r}, not a number",
            hint="convert writes one alpha at a time: --alpha 0, and --alpha 1 in a second run; "
            "only `ortho bench` takes --alpha 0 1",
        ) from None
