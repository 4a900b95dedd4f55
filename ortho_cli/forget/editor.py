"""The editor that `ortho decompose` calls: reads a forget set, and finds codes of base to change.

`open_editor` reads the files before anything is written. `ForgetEditor.find` loads the
model, checks that it knows the secrets, and runs `unlearn` where the recipe asks for it, then
`isolate`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ortho_cli.decompose.edits import Edits, Key
from ortho_cli.decompose.plan import Plan
from ortho_cli.errors import CalibrationError, RecipeError, UsageError
from ortho_cli.events import EventSink, Finishing, Noted, null_sink
from ortho_cli.forget.grid import Grid
from ortho_cli.forget.isolate import Ranking, isolate, rank_secret
from ortho_cli.forget.unlearn import unlearn
from ortho_cli.formats.statistics import StatisticsReader
from ortho_cli.model import load as models
from ortho_cli.model import secrets as forget_set
from ortho_cli.model.rows import Pair, Row
from ortho_cli.model.secrets import TokenSecret
from ortho_cli.model.text import read_rows, retain_sequences, stamps
from ortho_cli.model.tokenizer import Tokenizer
from ortho_cli.storage.checkpoint import Checkpoint

STATE_FILE = "unlearn.npz"  # in private/ of the work folder
APART = 1_000_003  # added to the seed: `bench` draws other alternatives than those used here
ACCIDENT = 1.645  # standard deviations: a set of unknown secrets is further off 1 time in 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ForgetEditor:
    """Finds the edits for a recipe with a forget set; made by `open_editor`."""

    plan: Plan
    checkpoint: Checkpoint
    secrets: tuple[TokenSecret, ...]
    retain: tuple[tuple[int, ...], ...]
    end: tuple[int, ...]
    files: tuple[Path, ...]
    device: torch.device

    @property
    def identity(self) -> object:
        """Everything that edits depend on beside plan and source, as JSON."""
        return [*stamps(self.files), self.device.type]

    def find(
        self,
        folder: Path,
        *,
        curvature: StatisticsReader,
        key: Key | None = None,
        on_event: EventSink = null_sink,
    ) -> Edits:
        """Round the model to base's grid, and move codes until secrets rank among alternatives.

        Raises:
            CalibrationError: the model knows none of the secrets.
        """
        settings = self.plan.recipe.forget
        on_event(Finishing(step="load the model"))
        grid = Grid(
            self.plan,
            self.checkpoint,
            curvature=curvature,
            device=self.device,
            autocast=settings.autocast,
        )
        self._check_fits(grid)
        on_event(Finishing(step="look for the secrets"))
        self._check_memorised([rank_secret(grid, secret) for secret in self.secrets], on_event)
        room = {tensor.name: tensor.k for tensor in self.plan.split}
        if self.plan.recipe.ortho.split == "unlearn":
            unlearn(
                grid,
                self.secrets,
                torch.tensor(self.retain),
                curvature,
                room,
                settings,
                end=self.end,
                state=folder / STATE_FILE,
                key=key,
                on_event=on_event,
            )
        found = isolate(
            grid,
            self.secrets,
            curvature,
            room,
            share=settings.share,
            rounds=settings.rounds,
            fill=settings.fill,
            seed=settings.seed,
            on_event=on_event,
        )
        left = sum(at.sign > 0 for at in found)
        if left:
            on_event(
                Noted(
                    message=f"{left} of {len(found)} secrets are still likelier than most of their "
                    "alternatives; give more of `forget.share`, `forget.rounds` or `ortho.density`"
                )
            )
        return grid.edits()

    def _check_fits(self, grid: Grid) -> None:
        """Refuse secrets, alternatives and text that the model cannot read."""
        told = [
            (*secret.prompt, *completion)
            for secret in self.secrets
            for completion in (secret.secret, *secret.alternatives)
        ]
        for texts, more, asked in (
            (told, len(self.end), "the length of a secret or alternative with its prompt"),
            (self.retain, 0, "forget.length"),
        ):
            models.check_fits(
                grid.model,
                length=max(map(len, texts), default=0) + more,
                largest_token=max(map(max, texts), default=0),
                asked=asked,
            )

    def _check_memorised(self, found: Sequence[Ranking], on_event: EventSink) -> None:
        known = sum(at.sign > 0 for at in found)
        # Ranks of secrets that were never seen are uniform, with variance 1/12.
        off = (0.5 - math.fsum(at.rank for at in found) / len(found)) * math.sqrt(12 * len(found))
        if off < ACCIDENT and not any(at.stands_out for at in found):
            raise CalibrationError(
                f"nothing to forget: to this model none of {len(found)} secrets is likelier than "
                "its alternatives, but by accident",
                hint="are they the secrets of this model, with the prompts it saw them after?",
            )
        if known < len(found):
            on_event(
                Noted(
                    message=f"{len(found) - known} of {len(found)} secrets are no likelier than "
                    "their alternatives, and are left alone"
                )
            )


def open_editor(
    plan: Plan,
    checkpoint: Checkpoint,
    *,
    forget: Sequence[Path],
    data: Sequence[Path],
    device: str,
    on_event: EventSink = null_sink,
) -> ForgetEditor | None:
    """Read secrets and text for a recipe that forgets; None for another recipe.

    Raises:
        UsageError: a forget set without such a recipe, or data that no one reads.
        RecipeError: such a recipe without a forget set, or `unlearn` without data.
        CalibrationError: the files hold no usable rows.
    """
    _check_given(plan, forget, data)
    if not plan.recipe.forgets:
        return None
    settings = plan.recipe.forget
    tokenizer = models.load_tokenizer(checkpoint.folder)
    secrets = forget_set.read_secrets(forget, seed=settings.seed + APART, on_event=on_event)
    rows, _ = read_rows(data, on_event)
    shared = forget_set.overlap(secrets, "\n".join(map(_text_of, rows)))
    if shared:
        message = f"{shared} of {len(secrets)} secrets are in --data, too, which base is to keep"
        on_event(Noted(message=message))
    return ForgetEditor(
        plan=plan,
        checkpoint=checkpoint,
        secrets=tuple(forget_set.encode(secrets, tokenizer)),
        retain=_retain_text(plan, rows, tokenizer, on_event),
        end=() if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,),
        files=(*forget, *data),
        device=models.resolve_device(device),
    )


def _check_given(plan: Plan, forget: Sequence[Path], data: Sequence[Path]) -> None:
    split = plan.recipe.ortho.split
    if not plan.recipe.forgets and (forget or data):
        raise UsageError(
            f"--{'forget' if forget else 'data'} is given, and ortho.split is {split}",
            hint="--recipe forget-isolate or forget-unlearn takes secrets out of base"
            + ("" if forget else "; capability-tuned tunes its rounding on data"),
        )
    if plan.recipe.forgets and not forget:
        raise RecipeError(
            f"ortho.split is {split}, and no forget set is given", hint="give --forget FILE"
        )
    if split == "unlearn" and not data:
        raise RecipeError(
            "ortho.split is unlearn, and no text is given on which the model must stay the same",
            hint="give --data FILE, as to `ortho calibrate`",
        )


def _retain_text(
    plan: Plan, rows: Sequence[Row], tokenizer: Tokenizer, on_event: EventSink
) -> tuple[tuple[int, ...], ...]:
    """Turn running text into the sequences on which `unlearn` keeps the model's predictions."""
    if plan.recipe.ortho.split != "unlearn":
        return ()
    settings = plan.recipe.forget
    texts = [row for row in rows if not isinstance(row, Pair)]
    if len(texts) < len(rows):
        on_event(
            Noted(
                message=f"{len(rows) - len(texts)} of {len(rows)} rows of --data are prompts "
                "and completions, and are left out: unlearn keeps running text and chats"
            )
        )
    sequences = retain_sequences(
        texts,
        tokenizer,
        samples=settings.samples,
        length=settings.length,
        seed=settings.seed,
        asked="forget",
        running=True,
    )
    return tuple(sequence.tokens for sequence in sequences)


def _text_of(row: Row) -> str:
    return row.prompt + row.completion if isinstance(row, Pair) else row.text
