"""The data of a bench, tokenized: running text, prompts of a skill, secrets of three kinds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ortho_cli.bench.attacks import ATTACKS, second_half
from ortho_cli.bench.plan import CONTEXT, NEEDS, TEXT_FIGURES, Settings
from ortho_cli.bench.suites import Suites, read_suites
from ortho_cli.errors import CalibrationError, CheckpointError, UsageError
from ortho_cli.events import Event, Noted
from ortho_cli.formats import artifact
from ortho_cli.formats.artifact import Artifact
from ortho_cli.model import load as models
from ortho_cli.model.rows import Row, Text
from ortho_cli.model.secrets import Secret, TokenSecret, encode, overlap, read_secrets
from ortho_cli.model.text import TokenSequence, pair_sequences, read_rows, text_windows
from ortho_cli.model.tokenizer import Tokenizer
from ortho_cli.storage import strict_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """All data in tokens; `texts` are those of secrets, where they are to be shown.

    `windows` are of --data without a name, `kinds` of every named kind of text; (n, length) int64.
    """

    tokenizer: Tokenizer | None = None
    windows: Tensor | None = None
    kinds: Mapping[str, Tensor] = field(default_factory=dict)
    pairs: tuple[TokenSequence, ...] = ()
    secrets: tuple[TokenSecret, ...] = ()
    nonmembers: tuple[TokenSecret, ...] = ()
    unlisted: tuple[TokenSecret, ...] = ()
    keep: tuple[TokenSecret, ...] = ()
    suites: Suites = field(default_factory=Suites)
    texts: tuple[str, ...] = ()
    unlisted_texts: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def gather(settings: Settings, opened: Artifact) -> Material:
    """Read and tokenize all data with the artifact's own tokenizer.

    Raises:
        CalibrationError: a file is unreadable, empty or too short, or a row of a suite is wrong.
        UsageError: the context is longer than the model's positions, or a folder has no suite.
        CheckpointError: the folder has no tokenizer, and something is to be read.
    """
    texts = (settings.data, settings.forget, settings.nonmember, settings.unlisted, settings.keep)
    try:
        tokenizer = models.load_tokenizer(opened.folder)
    except CheckpointError:
        if any((*texts, settings.kinds, settings.suites)):
            raise
        return Material()  # `unfit` names what that leaves out
    events: list[Event] = []
    rows = read_rows(settings.data, events.append)[0] if settings.data else []
    running = [row for row in rows if isinstance(row, Text)]
    pairs = [row for row in rows if not isinstance(row, Text)]

    def windows_of(rows: Sequence[Row]) -> Tensor:
        context = context_of(settings, opened.folder)
        limit = max(1, settings.tokens // context)
        return torch.tensor(text_windows(rows, tokenizer, length=context, limit=limit))

    listed, others, unlisted, keep = (
        read_secrets(files, seed=settings.seed, on_event=events.append) if files else []
        for files in texts[1:]
    )
    _refuse_overlap(listed, keep)
    suites = read_suites(settings, tokenizer, positions=_positions(opened.folder), listed=listed)
    shown = settings.show_secrets
    secrets = tuple(encode(listed, tokenizer))
    return Material(
        tokenizer=tokenizer,
        windows=windows_of(running) if running else None,
        kinds={
            name: windows_of(read_rows([file], events.append)[0]) for name, file in settings.kinds
        },
        pairs=tuple(pair_sequences(pairs, tokenizer)) if pairs else (),
        secrets=secrets,
        nonmembers=tuple(encode(others, tokenizer)),
        unlisted=tuple(encode(unlisted, tokenizer)),
        keep=tuple(encode(keep, tokenizer)),
        suites=suites,
        texts=tuple(one.prompt + one.secret for one in listed) if shown else (),
        unlisted_texts=tuple(one.prompt + one.secret for one in unlisted) if shown else (),
        notes=(
            *(one.message for one in events if isinstance(one, Noted)),
            *_notes(listed, running),
            *(_notes_on_halves(secrets) if settings.attack else ()),
            *suites.notes,
        ),
    )


def _refuse_overlap(listed: Sequence[Secret], keep: Sequence[Secret]) -> None:
    """Refuse a row that is both to be forgotten and to be kept."""
    rows = {(one.prompt, one.secret): one for one in keep}
    for one in listed:
        if other := rows.get((one.prompt, one.secret)):
            raise CalibrationError(
                f"{one.where} is to be forgotten, and {other.where} is the same row, to be kept",
                hint="leave it out of one of the two files",
            )


def _notes(listed: Sequence[Secret], running: Sequence[Text]) -> Iterator[str]:
    count = overlap(listed, "\n".join(row.text for row in running)) if listed else 0
    if count:
        yield (
            f"{count} of {len(listed)} secrets occur in the held-out text: it rewards keeping them"
        )
    coarse = sum(one.drawn == "others" for one in listed)
    if coarse:
        few = min(len(one.alternatives) for one in listed)
        yield (
            f"{coarse} of {len(listed)} secrets have only other secrets for alternatives ({few}): "
            "exposure is coarse; give a `pattern`"
        )


def _notes_on_halves(secrets: Sequence[TokenSecret]) -> Iterator[str]:
    count = sum(second_half(one) is None for one in secrets)
    if count:
        yield (
            f"{count} of {len(secrets)} secrets are too short to give half of the answer away, and "
            "`partial` leaves them out"
        )


def context_of(settings: Settings, folder: Path) -> int:
    """Tokens of a window of running text."""
    positions = _positions(folder)
    most = positions or CONTEXT
    if settings.context is None:
        return min(CONTEXT, most)
    if positions and settings.context > positions:
        raise UsageError(
            f"--context is {settings.context} and the model has {positions} positions",
            hint=f"--context {positions}",
        )
    return settings.context


def _positions(folder: Path) -> int | None:
    """Positions of a model; None where its config names no limit."""
    positions = strict_json.read(folder / artifact.CONFIG_FILE).get("max_position_embeddings")
    return positions if type(positions) is int and positions > 0 else None


def unfit(settings: Settings, material: Material) -> dict[str, str]:
    """Name the figures that the data turned out not to allow, and what each would need."""
    found: dict[str, str] = {}
    if settings.data and material.windows is None:
        found |= dict.fromkeys(TEXT_FIGURES, NEEDS["perplexity"].words)
    if material.tokenizer is None:
        found |= dict.fromkeys(("kinds", "worst_perplexity_ratio"), "a tokenizer in the artifact")
    if settings.data and not material.pairs:
        found["skill"] = NEEDS["skill"].words
    for attack in ATTACKS if settings.attack else ():
        if not any(map(attack.suits, material.secrets)):
            found[attack.name] = attack.needs
    return {**found, **material.suites.missing}
