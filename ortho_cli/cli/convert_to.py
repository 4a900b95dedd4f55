"""`ortho convert --to FORM`: an artifact as what servers take."""

from __future__ import annotations

import contextlib
import difflib
import logging
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ortho_cli.cli.shared import Output, located, place_output, run_facts
from ortho_cli.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from ortho_cli.convert.targets.job import TargetPlan
    from ortho_cli.storage.sealing import Keys, Seal

log = logging.getLogger(__name__)

FORMS = ("gguf", "lora", "gguf-lora")
# The default name of an output, after that of the artifact.
SUFFIXES = {"gguf": "base.gguf", "lora": "lora", "gguf-lora": "lora.gguf"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What the options ask for."""

    to: str | None
    dtype: str | None
    max_rank: int | None
    approximate: int | None
    pad: bool
    seal_to: tuple[str, ...]
    plaintext: bool
    identity: Path | None
    force: bool
    dry_run: bool

    @property
    def of_adapters(self) -> list[str]:
        """Name the options that were given and mean something for an adapter alone."""
        given = {
            "--max-rank": self.max_rank,
            "--approximate": self.approximate,
            "--pad": self.pad,
            "--seal-to": self.seal_to,
            "--plaintext": self.plaintext,
        }
        return [name for name, one in given.items() if one]


def convert_to(
    source: Path, out: Path | None, wish: Wish, output: Output, *, unfit: list[str]
) -> None:
    """Plan, check, write and show.

    Args:
        source: the artifact, as it was given.
        out: as it was given.
        wish: what the options ask for.
        output: how to print.
        unfit: options that were given and are for other conversions.
    """
    from ortho_cli.cli.show.convert_to import print_target, print_target_plan
    from ortho_cli.convert.targets import job
    from ortho_cli.events import Noted
    from ortho_cli.formats.artifact import is_artifact
    from ortho_cli.storage.job import check_target
    from ortho_cli.storage.sealing import read_keys

    to = _check(wish, unfit)
    source = located(source, quiet=output.quiet)
    if not source.exists():
        raise CheckpointError(f"`{source}` does not exist", hint="check the path")
    if not is_artifact(source, damaged=True):
        raise UsageError(
            f"`{source}` is no artifact, and --to {to} is for artifacts",
            hint=f"`ortho decompose {source}` makes one",
        )
    keys = read_keys(wish.identity)
    plan = _plan(source, wish, keys)
    with contextlib.closing(plan.source):
        log.info("plan %s to %s, %d weights", plan.sha256, to, len(plan.parts))
        suffix = SUFFIXES[to] + (".age" if plan.seal and plan.kind.is_file else "")
        place, notes = place_output(out, plan.source.folder, suffix)
        if plan.kind.is_file:
            _check_name(place, sealed=plan.seal is not None)
        read = [plan.source.path, *(file.path for file in plan.source.files)]
        target = check_target(place, plan.kind, read, force=wish.force)
        job.check_target(plan, target)
        if wish.dry_run:
            document = plan.to_json()
            document["notes"] = [*plan.notes, *notes]
            output.show(document, print_target_plan, source=str(source), out=str(place))
            return
        began = time.perf_counter()
        with output.progress("convert") as sink:
            for note in notes:
                sink(Noted(message=note))
            done = job.write(plan, target, keys=keys, on_event=sink)
    document = plan.to_json(done) | {"run": run_facts(place, began)}
    output.show(document, print_target)


def _check_name(place: Path, *, sealed: bool) -> None:
    """Refuse a name that says another thing of the file than it is: sealed, or not."""
    from ortho_cli.convert.targets.gguf_layout import SEALED_SUFFIX
    from ortho_cli.storage.sealing import SEALED

    plain = str(place).removesuffix(SEALED).removesuffix(".gguf")
    if sealed and not place.name.endswith(SEALED_SUFFIX):
        hint = f"-o {shlex.quote(plain + SEALED_SUFFIX)}"
        raise UsageError(f"`{place}` would be sealed, and does not say so", hint=hint)
    if not sealed and place.name.endswith(SEALED):
        hint = f"-o {shlex.quote(plain + '.gguf')}"
        raise UsageError(f"`{place}` would not be sealed, and says that it is", hint=hint)


def _check(wish: Wish, unfit: list[str]) -> str:
    """Refuse options that have no meaning together; give the form."""
    if wish.to is None or wish.to not in FORMS:
        near = difflib.get_close_matches(str(wish.to), FORMS, n=1)
        hint = f"did you mean `--to {near[0]}`?" if near else "--to lora"
        raise UsageError(f"--to {wish.to} is none of {', '.join(FORMS)}", hint=hint)
    if "--alpha" in unfit:
        hint = "leave --alpha out: gguf is base, and a server dials an adapter"
        raise UsageError(f"--alpha and --to {wish.to} exclude each other", hint=hint)
    for name in unfit:
        raise UsageError(f"{name} has no meaning with --to {wish.to}", hint=f"leave {name} out")
    if wish.to == "gguf":
        for name in wish.of_adapters:
            raise UsageError(
                f"{name} is for adapters, and --to gguf writes base alone",
                hint="--to gguf-lora writes the adapter beside it",
            )
    if wish.max_rank and wish.approximate:
        raise UsageError(
            "--max-rank takes columns as they are, and --approximate makes new ones",
            hint="give one of them",
        )
    if wish.pad and wish.to == "gguf-lora":
        raise UsageError("--pad has no meaning with --to gguf-lora", hint="leave --pad out")
    if wish.seal_to and wish.plaintext:
        raise UsageError("--seal-to and --plaintext exclude each other", hint="give one of them")
    return wish.to


def _plan(source: Path, wish: Wish, keys: Keys | None) -> TargetPlan:
    if wish.to == "gguf":
        from ortho_cli.convert.targets.gguf_base import plan_base

        return plan_base(source, dtype=wish.dtype)
    from ortho_cli.convert.targets.factors import open_ortho
    from ortho_cli.convert.targets.gguf_lora import plan_gguf_lora
    from ortho_cli.convert.targets.peft import plan_lora

    ortho = open_ortho(source, keys=keys, max_rank=wish.max_rank, approximate=wish.approximate)
    try:
        seal = _seal(wish, keys, is_sealed=ortho.artifact.sealed is not None)
        if wish.to == "gguf-lora":
            return plan_gguf_lora(ortho, dtype=wish.dtype, seal=seal)
        return plan_lora(ortho, dtype=wish.dtype, pad=wish.pad, seal=seal)
    except BaseException:
        ortho.source.close()
        raise


def _seal(wish: Wish, keys: Keys | None, *, is_sealed: bool) -> Seal | None:
    """Choose who opens an adapter: who is named, or else who opens ortho."""
    from ortho_cli.storage.sealing import make_seal, seal_of

    if wish.seal_to:
        return make_seal(wish.seal_to)
    if not is_sealed or wish.plaintext or keys is None:
        return None
    if keys.passphrase is not None and wish.to == "gguf-lora":
        raise UsageError(
            "ortho is sealed by a passphrase, which takes a second file, and --to gguf-lora writes "
            "one",
            hint="--seal-to age1..., or --plaintext",
        )
    return seal_of(keys)
