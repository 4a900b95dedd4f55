"""A tiny Llama that has memorised four secrets of three words, made in seconds; no network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from jobs import calibrate
from tiny_llama import (
    NEVER_SEEN,
    OWNERS,
    PLENTY,
    SECRETS,
    WORDS,
    build_model,
    tiny_llama,
    vocabulary,
)

from ortho_cli.calibrate import plan as calibrate_plan
from ortho_cli.decompose import recipe
from ortho_cli.decompose.plan import Plan, make_plan
from ortho_cli.forget.grid import Grid
from ortho_cli.forget.held import Kind
from ortho_cli.formats.curvature import Curvature
from ortho_cli.formats.statistics import StatisticsReader, open_statistics
from ortho_cli.model import load as models
from ortho_cli.model import secrets as forget_set
from ortho_cli.model.secrets import TokenSecret
from ortho_cli.storage.checkpoint import Checkpoint, open_checkpoint

__all__ = [
    "NEVER_SEEN",
    "OWNERS",
    "PLENTY",
    "SECRETS",
    "WORDS",
    "Memorised",
    "build",
    "tiny_llama",
    "vocabulary",
]


@dataclass(frozen=True)
class Memorised:
    """Where things lie: a model folder, and text, secrets and statistics beside it."""

    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def stats(self) -> Path:
        return self.folder / "stats.safetensors"

    @property
    def forget(self) -> Path:
        return self.folder / "forget.jsonl"

    @property
    def nonmember(self) -> Path:
        return self.folder / "nonmember.jsonl"

    @property
    def retain(self) -> Path:
        return self.folder / "retain.txt"

    @property
    def checkpoint(self) -> Checkpoint:
        return open_checkpoint(self.model)

    def secrets(self, file: Path | None = None) -> list[TokenSecret]:
        tokenizer = models.load_tokenizer(self.model)
        return forget_set.encode(forget_set.read_secrets([file or self.forget]), tokenizer)

    def windows(self, count: int = 32, length: int = 16) -> torch.Tensor:
        """Running text in tokens."""
        tokens = models.load_tokenizer(self.model)(self.retain.read_text())["input_ids"]
        return torch.tensor(tokens[: count * length]).view(count, length)

    def curvature(self) -> StatisticsReader:
        return StatisticsReader(open_statistics(self.stats))

    def fisher(self) -> dict[str, torch.Tensor]:
        """Fisher of the statistics, as forgetting takes it."""
        return {
            tensor.name: torch.from_numpy(Curvature(self.curvature(), tensor.name).whole())
            for tensor in self.plan().split
        }

    def kinds(self) -> tuple[Kind, ...]:
        """Running text to hold on to."""
        rows = self.windows(64).tolist()
        return (Kind(name="data", pairs=tuple((row[:1], row[1:]) for row in rows)),)

    def plan(self, *sets: str, split: str = "isolate") -> Plan:
        settings = recipe.load_recipe(None, [f"ortho.split={split}", *PLENTY, *sets])
        return make_plan(self.checkpoint, settings, statistics=open_statistics(self.stats))

    def grid(self, plan: Plan | None = None, *, autocast: bool = False) -> Grid:
        return Grid(
            plan or self.plan(),
            self.checkpoint,
            curvature=self.curvature(),
            device=torch.device("cpu"),
            autocast=autocast,
        )


def build(folder: Path, *, seed: int = 2) -> Memorised:
    """Make the model and its text with `build_model`, and calibrate."""
    made = Memorised(folder)
    build_model(folder, seed=seed)
    settings = recipe.load_recipe(None, ["calibrate.samples=32", "calibrate.length=16"])
    sets = calibrate_plan.read_sets(made.model, [made.retain], [made.forget], settings.calibrate)
    plan = calibrate_plan.make_plan(made.checkpoint, settings, sets)
    calibrate(plan, made.checkpoint, made.stats, device="cpu")
    return made
