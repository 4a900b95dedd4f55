"""The editor that `ortho decompose` calls: reads a forget set, and finds codes of base to change.

`open_editor` reads the files before anything is written. `ForgetEditor.find` loads the model, lets
it write alternatives for secrets that have none, checks that it knows the secrets, gathers text to
hold on to, runs `unlearn` where the recipe asks for it, then `isolate`, and measures the damage on
text that neither saw.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ortho_cli.decompose.edits import Edits, Key, load_arrays, save_arrays
from ortho_cli.decompose.plan import Plan
from ortho_cli.errors import CalibrationError, RecipeError, UsageError
from ortho_cli.events import EventSink, Finishing, Noted, null_sink
from ortho_cli.forget import cost, damage
from ortho_cli.forget.grid import Grid
from ortho_cli.forget.held import Kind, broad_fisher, gather
from ortho_cli.forget.isolate import HOLD, isolate
from ortho_cli.forget.ranks import PROBES, Ranking, rank_all
from ortho_cli.forget.unlearn import ALTERNATIVES, unlearn
from ortho_cli.formats.statistics import StatisticsReader
from ortho_cli.model import load as models
from ortho_cli.model import secrets as forget_set
from ortho_cli.model.rows import Pair, Row
from ortho_cli.model.scoring import pad
from ortho_cli.model.secrets import TokenSecret
from ortho_cli.model.self_written import draw_alternatives
from ortho_cli.model.text import read_rows, retain_sequences, stamps
from ortho_cli.model.tokenizer import Tokenizer
from ortho_cli.storage.checkpoint import Checkpoint

STATE_FILE = "unlearn.npz"  # in private/ of the work folder
ISOLATE_FILE = "isolate.npz"  # there, too
ALTERNATIVES_FILE = "alternatives.npz"  # there, too: what the model wrote for secrets without any
NO_TOKEN = -1  # behind an alternative that is shorter than others, in that file
APART = 1_000_003  # added to the seed: `bench` draws other alternatives and text than used here
UNSEEN = 4  # every fourth text is kept from the optimisation, to measure damage on
ACCIDENT = 1.645  # standard deviations: a set of unknown secrets is further off 1 time in 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ForgetEditor:
    """Finds the edits for a recipe with a forget set; made by `open_editor`."""

    plan: Plan
    checkpoint: Checkpoint
    tokenizer: Tokenizer
    secrets: tuple[TokenSecret, ...]
    retain: tuple[tuple[int, ...], ...]
    files: tuple[Path, ...]
    device: torch.device
    accept_damage: bool = False

    @property
    def identity(self) -> object:
        """Everything that edits depend on beside plan and source, as JSON."""
        return [*stamps(self.files), self.device.type, self.autocast]

    @property
    def autocast(self) -> bool:
        """Whether the model computes in bfloat16 meanwhile."""
        return models.uses_bfloat16(self.plan.recipe.forget.autocast, self.device)

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
            CalibrationError: the model knows none of the secrets, or writes no alternatives to one.
            GateError: perplexity of text that was not held on to rises by more than
                `forget.damage`; `folder` keeps the work of `unlearn`.
        """
        on_event(Finishing(step="load the model"))
        grid = Grid(
            self.plan,
            self.checkpoint,
            curvature=curvature,
            device=self.device,
            autocast=self.autocast,
        )
        self._check_fits(grid)
        self._tell_time(grid, on_event)
        drawn = self._drawn(grid, folder / ALTERNATIVES_FILE, key, on_event)
        return replace(self, secrets=drawn)._forget(grid, folder, curvature, key, on_event)

    def _tell_time(self, grid: Grid, on_event: EventSink) -> None:
        """Say how long the work takes on this machine."""
        passed = cost.tokens_passed(self.plan, self.secrets)
        seconds = passed * cost.seconds_per_token(grid, self.secrets)
        on_event(Noted(message=f"to forget takes about {cost.in_words(seconds)} here, or less"))

    def _drawn(
        self, grid: Grid, file: Path, key: Key | None, on_event: EventSink
    ) -> tuple[TokenSecret, ...]:
        """Let the model write alternatives where a row gives none; take those of an earlier run.

        They are read from its file: goals may not change while a run is resumed, and another
        number of threads may round one draw the other way.
        """
        bare = [n for n, one in enumerate(self.secrets) if not one.alternatives]
        if not bare:
            return self.secrets
        on_event(
            Noted(
                message=f"{len(bare)} of {len(self.secrets)} secrets have neither `alternatives` "
                "nor a `pattern`: the model itself writes what they are compared with"
            )
        )
        held = load_arrays(file, key)
        if held is not None:
            return tuple(
                replace(one, alternatives=_unpadded(held[str(n)])) if n in bare else one
                for n, one in enumerate(self.secrets)
            )
        with grid.arithmetic():
            return draw_alternatives(
                grid.model,
                self.tokenizer,
                self.secrets,
                count=PROBES,
                seed=self.plan.recipe.forget.seed + APART,
                on_event=on_event,
            )

    def _keep_drawn(self, file: Path, key: Key | None) -> None:
        """Write what the model wrote, once it is known that there is something to forget."""
        drawn = {n: one for n, one in enumerate(self.secrets) if one.drawn == "model"}
        if drawn:
            rows = {str(n): pad(one.alternatives, NO_TOKEN).numpy() for n, one in drawn.items()}
            save_arrays(file, rows, key)

    def _forget(
        self,
        grid: Grid,
        folder: Path,
        curvature: StatisticsReader,
        key: Key | None,
        on_event: EventSink,
    ) -> Edits:
        """Move codes of the grid, and measure what that cost."""
        settings = self.plan.recipe.forget
        on_event(Finishing(step="look for the secrets"))
        telling, ranked = rank_all(grid, self.secrets)
        self._check_memorised(ranked, on_event)
        self._keep_drawn(folder / ALTERNATIVES_FILE, key)
        held, unseen = self._texts(grid, on_event)
        before = damage.measure(grid, unseen)
        on_event(Finishing(step="measure what matters to the text"))
        fisher = broad_fisher(grid, held, curvature, seed=settings.seed)
        room = {tensor.name: tensor.k for tensor in self.plan.split}
        if self.plan.recipe.ortho.split == "unlearn":
            self._unlearn(grid, held, fisher, room, telling, folder / STATE_FILE, key, on_event)
        found = isolate(
            grid,
            self.secrets,
            fisher,
            room,
            telling=telling,
            known={s for s, at in zip(self.secrets, ranked, strict=True) if at.sign},
            share=settings.share,
            rounds=settings.rounds,
            fill=settings.fill,
            seed=settings.seed,
            on_event=on_event,
            # unlearn holds alternatives itself, and leaves a few secrets off their rank.
            hold=0.0 if self.plan.recipe.ortho.split == "unlearn" else HOLD,
            state=folder / ISOLATE_FILE,
            key=key,
        )
        left, known = (sum(at.sign > 0 for at in ranks) for ranks in (found, ranked))
        now = f"of {len(found)} secrets, {known} were likelier than most of their alternatives"
        on_event(Noted(message=f"{now}, and {left} are now"))
        if left:
            on_event(
                Noted(
                    message=f"{left} of {len(found)} secrets are still likelier than most of their "
                    "alternatives; give more of `forget.share`, `forget.rounds` or `ortho.density`"
                )
            )
        ratios = damage.ratios(before, damage.measure(grid, unseen))
        damage.judge(ratios, settings.damage, accept=self.accept_damage, on_event=on_event)
        return grid.edits()

    def _unlearn(
        self,
        grid: Grid,
        held: Sequence[Kind],
        fisher: dict[str, Tensor],
        room: dict[str, int],
        telling: float,
        state: Path,
        key: Key | None,
        on_event: EventSink,
    ) -> None:
        end = self.tokenizer.eos_token_id
        unlearn(
            grid,
            self.secrets,
            held,
            fisher,
            room,
            self.plan.recipe.forget,
            telling=telling,
            end=() if end is None else (end,),
            state=state,
            key=key,
            on_event=on_event,
        )

    def _texts(self, grid: Grid, on_event: EventSink) -> tuple[tuple[Kind, ...], tuple[Kind, ...]]:
        """Gather text of each kind: to hold on to, and not to be seen before the end."""
        settings = self.plan.recipe.forget
        kinds = gather(
            grid,
            self.tokenizer,
            self.secrets,
            self.retain,
            samples=settings.samples,
            length=settings.length,
            seed=settings.seed + APART,
            on_event=on_event,
        )
        unseen = [replace(kind, pairs=kind.pairs[::UNSEEN]) for kind in kinds]
        held = [
            replace(kind, pairs=tuple(p for i, p in enumerate(kind.pairs) if i % UNSEEN))
            for kind in kinds
        ]
        pairs = [
            (secret.prompt, other)
            for secret in self.secrets
            for other in secret.alternatives[-ALTERNATIVES:]
        ]
        alternatives = Kind(name="alternatives", pairs=tuple(pairs))
        return tuple(kind for kind in held if kind.pairs), (*unseen, alternatives)

    def _check_fits(self, grid: Grid) -> None:
        """Refuse secrets, alternatives and text that the model cannot read."""
        told = [
            (*secret.prompt, *completion)
            for secret in self.secrets
            for completion in (secret.secret, *secret.alternatives)
        ]
        end = self.tokenizer.eos_token_id is not None
        for texts, more, asked in (
            (told, end, "the length of a secret or alternative with its prompt"),
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


def _unpadded(rows: npt.NDArray[np.generic]) -> tuple[tuple[int, ...], ...]:
    """Give the alternatives of a secret from their array in ALTERNATIVES_FILE."""
    return tuple(tuple(int(token) for token in row[row != NO_TOKEN]) for row in rows)


def open_editor(
    plan: Plan,
    checkpoint: Checkpoint,
    *,
    forget: Sequence[Path],
    data: Sequence[Path],
    device: str,
    accept_damage: bool = False,
    on_event: EventSink = null_sink,
) -> ForgetEditor | None:
    """Read secrets and text for a recipe that forgets; None for another recipe.

    Args:
        plan: made from `checkpoint`.
        checkpoint: a transformers folder.
        forget: files of secrets.
        data: files of text that base must go on predicting as it does; none is needed.
        device: where the model goes: auto, cpu, cuda or cuda:N.
        accept_damage: whether damage above `forget.damage` is a note, and no error.
        on_event: gets notes on the data.
    Raises:
        UsageError: a forget set without such a recipe, or data that no one reads.
        RecipeError: such a recipe without a forget set.
        CalibrationError: the files hold no usable rows.
    """
    _check_given(plan, forget, data)
    if not plan.recipe.forgets:
        return None
    settings = plan.recipe.forget
    tokenizer = models.load_tokenizer(checkpoint.folder)
    secrets = forget_set.read_secrets(forget, seed=settings.seed + APART, on_event=on_event)
    positions = models.positions_of(checkpoint.folder)
    rows, _ = read_rows(data, on_event)
    shared = forget_set.overlap(secrets, "\n".join(map(_text_of, rows)))
    if shared:
        message = f"{shared} of {len(secrets)} secrets are in --data, too, which base is to keep"
        on_event(Noted(message=message))
    encoded = forget_set.encode(secrets, tokenizer, positions=positions)
    _tell_cost(plan, encoded, on_event)
    return ForgetEditor(
        plan=plan,
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        secrets=tuple(encoded),
        retain=_retain_text(plan, rows, tokenizer, on_event),
        accept_damage=accept_damage,
        files=(*forget, *data),
        device=models.resolve_device(device),
    )


def _tell_cost(plan: Plan, secrets: Sequence[TokenSecret], on_event: EventSink) -> None:
    """Say what the work takes, as far as it is known before the model is loaded."""
    passed, memory = cost.tokens_passed(plan, secrets), cost.peak_bytes(plan, secrets)
    on_event(
        Noted(
            message=f"to forget {len(secrets)} secrets, at most {passed / 1e6:,.2g} million tokens "
            f"pass through the model, in {memory / 1e9:,.1f} GB of memory"
        )
    )
    if (
        len(secrets) == 1
        and plan.recipe.ortho.split == "unlearn"
        and plan.recipe.forget.attack_steps != 0
    ):
        on_event(
            Noted(
                message="the forget set has one secret, so the attacker that unlearn holds out "
                "against trains on that secret itself"
            )
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


def _retain_text(
    plan: Plan, rows: Sequence[Row], tokenizer: Tokenizer, on_event: EventSink
) -> tuple[tuple[int, ...], ...]:
    """Turn running text into sequences on which the model's predictions are held."""
    if not rows:
        return ()
    settings = plan.recipe.forget
    texts = [row for row in rows if not isinstance(row, Pair)]
    if len(texts) < len(rows):
        on_event(
            Noted(
                message=f"{len(rows) - len(texts)} of {len(rows)} rows of --data are prompts "
                "and completions, and are left out: forgetting holds on to running text and chats"
            )
        )
    if not texts:
        return ()
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
