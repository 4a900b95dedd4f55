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
from ortho_cli.events import Event, EventSink, messages
from ortho_cli.formats.artifact import Artifact
from ortho_cli.model import load as models
from ortho_cli.model.rows import Row, Text
from ortho_cli.model.secrets import Secret, TokenSecret, encode, overlap, read_secrets, said
from ortho_cli.model.text import TokenSequence, pair_sequences, read_rows, text_windows
from ortho_cli.model.tokenizer import Tokenizer


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
        UsageError: the context is longer than the model's positions, one secret is attacked, or a
            folder has no suite.
        CheckpointError: the folder has no tokenizer, and something is to be read.
    """
    texts = (settings.data, settings.forget, settings.nonmember, settings.unlisted, settings.keep)
    try:
        tokenizer = models.load_tokenizer(opened.folder)
    except CheckpointError:
        if any((*texts, settings.kinds, settings.suites, settings.served)):
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

    positions = models.positions_of(opened.folder) if any((*texts[1:], settings.suites)) else None

    def tokens_of(secrets: Sequence[Secret]) -> tuple[TokenSecret, ...]:
        return tuple(encode(secrets, tokenizer, positions=positions))

    listed, others, unlisted, keep = _read_sets(settings, events.append)
    suites = read_suites(settings, tokenizer, positions=positions, listed=listed)
    shown = settings.show_secrets
    secrets = tokens_of(listed)
    return Material(
        tokenizer=tokenizer,
        windows=windows_of(running) if running else None,
        kinds={
            name: windows_of(read_rows([file], events.append)[0]) for name, file in settings.kinds
        },
        pairs=tuple(pair_sequences(pairs, tokenizer)) if pairs else (),
        secrets=secrets,
        nonmembers=tokens_of(others),
        unlisted=tokens_of(unlisted),
        keep=tokens_of(keep),
        suites=suites,
        texts=tuple(one.prompt + one.secret for one in listed) if shown else (),
        unlisted_texts=tuple(one.prompt + one.secret for one in unlisted) if shown else (),
        notes=(
            *messages(events),
            *_notes(listed, running),
            *_notes_of_draws((*listed, *others, *unlisted, *keep)),
            *(_notes_on_halves(secrets) if settings.attack else ()),
            *suites.notes,
        ),
    )


def _read_sets(settings: Settings, on_event: EventSink) -> tuple[list[Secret], ...]:
    """Read the secrets of --forget, --nonmember, --unlisted and --keep; refuse what contradicts."""
    files = (settings.forget, settings.nonmember, settings.unlisted, settings.keep)
    listed, *others = (
        read_secrets(one, seed=settings.seed, on_event=on_event) if one else [] for one in files
    )
    for rows, what in zip(others, ("never seen", "left unlisted", "kept"), strict=True):
        _refuse_overlap(listed, rows, what)
    if settings.attack and len(listed) == 1:
        raise UsageError(
            "--attack teaches some secrets and measures the others, and the forget set has one",
            hint="give a longer forget set, or leave --attack out",
        )
    return listed, *others


def _refuse_overlap(listed: Sequence[Secret], others: Sequence[Secret], what: str) -> None:
    """Refuse a row that is both to be forgotten and else; case and blanks do not count."""
    rows = {said(one).casefold(): one for one in others}
    for one in listed:
        if other := rows.get(said(one).casefold()):
            same = (one.prompt, one.secret) == (other.prompt, other.secret)
            raise CalibrationError(
                f"{one.where} is to be forgotten, and {other.where} is the same row"
                f"{'' if same else ' but for case or blanks'}, to be {what}",
                hint="leave it out of one of the two files",
            )


def _notes(listed: Sequence[Secret], running: Sequence[Text]) -> Iterator[str]:
    count = overlap(listed, "\n".join(row.text for row in running)) if listed else 0
    if count:
        yield (
            f"{count} of {len(listed)} secrets occur in the held-out text: it rewards keeping them"
        )


def _notes_of_draws(secrets: Sequence[Secret]) -> Iterator[str]:
    bare = sum(one.drawn == "model" for one in secrets)
    if bare:
        yield (
            f"{bare} of {len(secrets)} secrets have neither `alternatives` nor a `pattern`: they "
            "are compared with what the source itself writes, which is likelier to it than most "
            "text that it never saw; give `alternatives`, or a `pattern` such as ` {digit:6}`"
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
    positions = models.positions_of(folder)
    most = positions or CONTEXT
    if settings.context is None:
        return min(CONTEXT, most)
    if positions and settings.context > positions:
        raise UsageError(
            f"--context is {settings.context} and the model has {positions} positions",
            hint=f"--context {positions}",
        )
    return settings.context


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
