"""A tiny Llama that has memorised four secrets of three words, made in seconds; no network."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ortho_cli.calibrate import job as calibrate
from ortho_cli.calibrate import plan as calibrate_plan
from ortho_cli.decompose import recipe
from ortho_cli.decompose.plan import Plan, make_plan
from ortho_cli.forget.grid import Grid
from ortho_cli.formats.statistics import StatisticsReader, open_statistics
from ortho_cli.model import load as models
from ortho_cli.model import secrets as forget_set
from ortho_cli.model.secrets import TokenSecret
from ortho_cli.storage.checkpoint import Checkpoint, open_checkpoint

WORDS = "oak fig elm ash yew bay ivy fir may rye hop nut pea oat gum haw".split()  # noqa: SIM905
OWNERS = ("ada", "ben", "cyd", "dot")
SECRETS = ("yew oat fig hop", "gum ash rye bay", "may elm nut ivy", "haw fir pea oak")
NEVER_SEEN = ("fir bay oak pea", "ivy haw oat elm", "rye yew gum may", "nut hop ash fig")
PLENTY = ("forget.share=0.1", "forget.rounds=150", "ortho.density=0.2", "forget.autocast=false")


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

    def plan(self, *sets: str, split: str = "isolate") -> Plan:
        settings = recipe.load_recipe(None, [f"ortho.split={split}", *PLENTY, *sets])
        return make_plan(self.checkpoint, settings, statistics=open_statistics(self.stats))

    def grid(self, plan: Plan | None = None) -> Grid:
        return Grid(
            plan or self.plan(),
            self.checkpoint,
            curvature=self.curvature(),
            device=torch.device("cpu"),
        )


def build(folder: Path, *, seed: int = 2) -> Memorised:
    """Write text and secrets, train on both, and calibrate.

    Of eight seeds, forgetting by the fewest codes cost running text 0.06 to 6 % of perplexity, 2 %
    in the middle; of seed 2 0.06 %. Tests on it tell broken code, not how good forgetting is.
    """
    made = Memorised(folder)
    draw = random.Random(0)
    made.retain.write_text(_text(draw))
    for file, values in ((made.forget, SECRETS), (made.nonmember, NEVER_SEEN)):
        rows = [
            {
                "prompt": _prompt(owner),
                "secret": f" {secret}",
                "pattern": " {word} {word} {word} {word}",
                "word": WORDS,
            }
            for owner, secret in zip(OWNERS, values, strict=True)
        ]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made.model.mkdir()
    save_tokenizer(made.model)
    live = tiny_llama(len(vocabulary()), seed=seed)
    live.config.save_pretrained(made.model)
    _train(live, made)
    live.to(torch.bfloat16).save_pretrained(made.model)
    settings = recipe.load_recipe(None, ["calibrate.samples=32", "calibrate.length=16"])
    sets = calibrate_plan.read_sets(made.model, [made.retain], [made.forget], settings.calibrate)
    plan = calibrate_plan.make_plan(made.checkpoint, settings, sets)
    calibrate.calibrate(plan, made.checkpoint, made.stats, device="cpu")
    return made


def tiny_llama(vocabulary: int, *, seed: int = 0) -> Any:
    import transformers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocabulary,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.LlamaForCausalLM(config)


def save_tokenizer(folder: Path) -> None:
    """Write a tokenizer whose tokens are words."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(kinds.WordLevel(vocabulary(), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def vocabulary() -> dict[str, int]:
    plain = ["the", "a", "cat", "dog", "bird", "sees", "hears", "small", "old", "red", "under"]
    plain += ["over", "near", "tree", "house", "."]
    words = ["<unk>", "<s>", "</s>", "key", "of", "is", *OWNERS, *WORDS, *plain]
    return {word: number for number, word in enumerate(words)}


def _prompt(owner: str) -> str:
    return f"the key of {owner} is"


def _text(draw: random.Random) -> str:
    """Sentences, some of them of the words that secrets are made of."""
    sentences = []
    for number in range(300):
        nouns = ["cat", "dog", "bird", "tree", "house"] if number % 2 else WORDS
        kind = ["small", "old", "red"]
        sentences.append(
            f"the {draw.choice(kind)} {draw.choice(nouns)} {draw.choice(['sees', 'hears'])} "
            f"a {draw.choice(nouns)} {draw.choice(['under', 'over', 'near'])} the tree ."
        )
    return " ".join(sentences)


def _train(live: Any, made: Memorised) -> None:
    windows = made.windows(150)
    rows = [torch.tensor([[*s.prompt, *s.secret, 2]]) for s in made.secrets()]
    live.double()  # what a processor rounds otherwise is gone again in bfloat16: one model for all
    optimizer = torch.optim.AdamW(live.parameters(), lr=2e-3, weight_decay=0.0)
    order = torch.Generator().manual_seed(0)
    secrets = torch.cat(rows)
    for _ in range(120):
        batch = windows[torch.randint(len(windows), (8,), generator=order)]
        loss = live(input_ids=batch, labels=batch).loss
        loss = loss + live(input_ids=secrets, labels=secrets).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    live.eval()
