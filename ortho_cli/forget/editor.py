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

import torch
from torch import Tensor

from ortho_cli.decompose.edits import Edits, Key
from ortho_cli.decompose.plan import Plan
from ortho_cli.errors import CalibrationError, RecipeError, UsageError
from ortho_cli.events import EventSink, Finishing, Noted, null_sink
from ortho_cli.forget import cost, damage
from ortho_cli.forget.damage import UNSEEN
from ortho_cli.forget.grid import Grid
from ortho_cli.forget.held import Kind, broad_fisher, gather
from ortho_cli.forget.isolate import HOLD, isolate
from ortho_cli.forget.ranks import WRITTEN, Ranking, rank_all
from ortho_cli.forget.unlearn import ALTERNATIVES, unlearn
from ortho_cli.formats.statistics import StatisticsReader
from ortho_cli.model import load as models
from ortho_cli.model import secrets as forget_set
from ortho_cli.model.cost import Part, in_words
from ortho_cli.model.rows import Pair, Row
from ortho_cli.model.secrets import TokenSecret
from ortho_cli.model.self_written import draw_alternatives
from ortho_cli.model.text import read_rows, retain_sequences, stamps
from ortho_cli.model.tokenizer import Tokenizer
from ortho_cli.storage.checkpoint import Checkpoint
from ortho_cli.storage.parts import Parts, open_parts
from ortho_cli.storage.speeds import Speeds, open_speeds

STATE_FILE = "unlearn.npz"  # in private/ of the work folder
ISOLATE_FILE = "isolate.npz"  # there, too
PARTS_FILE = "forget.parts"  # there, too: what the model wrote, and figures of text and secrets
FISHER_FILE = "fisher.npz"  # there, too: of text
APART = 1_000_003  # added to the seed: `bench` draws other alternatives and text than used here
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

    def estimate(self, speeds: Speeds) -> Part:
        """Estimate the seconds of `find` on this machine, and the most."""
        return cost.estimate(
            self.plan,
            self.secrets,
            self.checkpoint.tensors,
            speeds,
            given=bool(self.retain),
            half=self.autocast,
        )

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
        parts = open_parts(folder / PARTS_FILE, key, on_event)
        try:
            drawn = replace(self, secrets=self._drawn(grid, parts, on_event))
            return drawn._forget(grid, folder, parts, curvature, key, on_event)
        finally:
            parts.save()

    def _drawn(self, grid: Grid, parts: Parts, on_event: EventSink) -> tuple[TokenSecret, ...]:
        """Let the model write alternatives where a row gives none.

        A resumed run takes those of the earlier one: goals may not change meanwhile, and another
        number of threads may round one draw the other way.
        """
        bare = sum(not one.alternatives for one in self.secrets)
        if not bare:
            return self.secrets
        on_event(
            Noted(
                message=f"{bare} of {len(self.secrets)} secrets have neither `alternatives` "
                "nor a `pattern`: the model itself writes what they are compared with"
            )
        )
        with grid.arithmetic():
            return draw_alternatives(
                grid.model,
                self.tokenizer,
                self.secrets,
                count=WRITTEN,
                seed=self.plan.recipe.forget.seed + APART,
                parts=parts,
                on_event=on_event,
            )

    def _forget(
        self,
        grid: Grid,
        folder: Path,
        parts: Parts,
        curvature: StatisticsReader,
        key: Key | None,
        on_event: EventSink,
    ) -> Edits:
        """Move codes of the grid, and measure what that cost."""
        settings = self.plan.recipe.forget
        on_event(Finishing(step="look for the secrets"))
        telling, ranked = rank_all(grid, self.secrets, parts)
        self._check_memorised(ranked, on_event)
        held, unseen = self._texts(grid, parts, on_event)
        before = damage.measure(grid, unseen, parts.at("before"))
        parts.save()
        on_event(Finishing(step="measure what matters to the text"))
        fisher = broad_fisher(
            grid, held, curvature, seed=settings.seed, state=folder / FISHER_FILE, key=key
        )
        if self.plan.recipe.ortho.split == "unlearn":
            self._unlearn(grid, held, fisher, telling, folder / STATE_FILE, key, on_event)
        found = isolate(
            grid,
            self.secrets,
            fisher,
            self._room,
            telling=telling,
            known={s for s, at in zip(self.secrets, ranked, strict=True) if at.sign},
            share=settings.share,
            rounds=settings.rounds,
            fill=settings.fill,
            seed=settings.seed,
            on_event=on_event,
            # unlearn holds alternatives itself, and leaves a few secrets off their rank.
            hold=0.0 if self.plan.recipe.ortho.split == "unlearn" else HOLD,
            columns=self._columns,
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

    @property
    def _room(self) -> dict[str, int]:
        """The largest number of codes that may move, by weight."""
        return {tensor.name: tensor.k for tensor in self.plan.split}

    @property
    def _columns(self) -> dict[str, int] | None:
        """The largest number of columns in which they may, by weight; None: any."""
        if self.plan.recipe.forget.support != "columns":
            return None
        return {tensor.name: tensor.columns or 0 for tensor in self.plan.split}

    def _unlearn(
        self,
        grid: Grid,
        held: Sequence[Kind],
        fisher: dict[str, Tensor],
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
            self._room,
            self.plan.recipe.forget,
            telling=telling,
            end=() if end is None else (end,),
            columns=self._columns,
            state=state,
            key=key,
            on_event=on_event,
        )

    def _texts(
        self, grid: Grid, parts: Parts, on_event: EventSink
    ) -> tuple[tuple[Kind, ...], tuple[Kind, ...]]:
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
            parts=parts,
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
    editor = ForgetEditor(
        plan=plan,
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        secrets=tuple(encoded),
        retain=_retain_text(plan, rows, tokenizer, on_event),
        accept_damage=accept_damage,
        files=(*forget, *data),
        device=models.resolve_device(device),
    )
    _tell_cost(editor, on_event)
    return editor


def _tell_cost(editor: ForgetEditor, on_event: EventSink) -> None:
    """Say what the work takes, before the model is loaded."""
    plan, secrets = editor.plan, editor.secrets
    passed, memory = cost.tokens_passed(plan, secrets), cost.peak_bytes(plan, secrets)
    message = (
        f"to forget {len(secrets)} secrets, at most {passed / 1e6:,.2g} million tokens pass "
        f"through the model, in {memory / 1e9:,.1f} GB of memory"
    )
    if editor.device.type == "cpu":  # nothing is timed on a GPU
        part = editor.estimate(open_speeds())
        message += f": about {in_words(part.seconds)} on this machine, {in_words(part.at_most)} if "
        message += f"all {_most(plan)} are needed"
    on_event(Noted(message=message))
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


def _most(plan: Plan) -> str:
    """Name the rounds and steps that a recipe allows."""
    rounds = f"{plan.recipe.forget.rounds} rounds"
    if plan.recipe.ortho.split == "isolate":
        return rounds
    return f"{plan.recipe.forget.steps} steps and {rounds}"


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
