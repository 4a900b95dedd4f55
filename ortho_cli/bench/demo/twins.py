"""Train the sandbox's model and its twin: same data and order, but for the secrets.

Training has a trunk, which both share because no secret has occurred yet, and a branch for each:
same start, same optimizer state, same batches in the same order, except that rows of secrets are
rows of other retain text for the twin. So the two differ by the secrets and by nothing else.
torch and transformers are imported late, so that settings and data do not pay for them.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from ortho_cli.bench.demo import grammar
from ortho_cli.errors import NumericalError
from ortho_cli.events import EventSink, Noted, Training

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

UNKNOWN, END = "<unk>", "\n"  # a document is one line, so its newline is the end token
CHECK_EVERY = 10  # steps between checks of what is memorised
REPORT_EVERY = 5  # steps between events


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All that the files depend on, beside the seed."""

    hidden: int = 128
    mlp: int = 384
    layers: int = 4
    heads: int = 4
    length: int = 128  # tokens of a row, and the model's positions
    rows: int = 16  # of a step
    sum_rows: int = 8  # of these, how many are sums
    secret_rows: int = 6  # of a step of the branch, where half of them come on top of `rows`
    trunk_steps: int = 420
    branch_steps: int = 90  # at least
    most_steps: int = 200  # of a branch, if memorising takes longer
    sure: float = 0.5  # memorised: the model gives every token of every secret this probability
    rate: float = 3e-3
    documents: int = 3000
    heldout: int = 1000
    planted: int = 20
    unlisted: int = 5
    nonmembers: int = 20
    threads: int = 1  # part of the result; two gain little, and on a busy machine lose much


@dataclass(frozen=True, slots=True, kw_only=True)
class Reached:
    """How training ended: steps taken, and how well the secrets are known."""

    steps: int
    extraction: float
    least_probability: float
    twin_loss: float  # in nats per token


class Data:
    """All text of one sandbox, and its tokens."""

    def __init__(self, seed: int, settings: Settings) -> None:
        self.sums = grammar.sums(seed)
        self.secrets = grammar.secrets(
            seed,
            settings.planted,
            unlisted=settings.unlisted,
            nonmembers=settings.nonmembers,
        )
        self.train = grammar.documents(seed, settings.documents)
        known = frozenset(self.train)
        fresh = grammar.documents(seed, settings.heldout, part="heldout")
        self.heldout = tuple(document for document in fresh if document not in known)
        self.vocabulary = {
            word: number for number, word in enumerate((UNKNOWN, END, *grammar.vocabulary()))
        }
        self.sum_lines = tuple(row.prompt + row.completion for row in self.sums.train)

    def files(self) -> dict[str, str]:
        """Spell out the data files."""
        mixed = [*self.train, *self.sum_lines]
        random.Random("retain").shuffle(mixed)
        skill = [{"prompt": s.prompt, "completion": s.completion} for s in self.sums.heldout]
        return {
            "forget.jsonl": _jsonl(self.secrets.forget),
            "unlisted.jsonl": _jsonl(self.secrets.unlisted),
            "nonmember.jsonl": _jsonl(self.secrets.nonmember),
            "retain.txt": "".join(line + "\n" for line in mixed),
            "heldout.txt": "".join(line + "\n" for line in self.heldout),
            "skill.jsonl": _jsonl(skill),
        }

    def encode(self, line: str) -> list[int]:
        """Turn a line into tokens as the tokenizer does: words, and digits one by one."""
        pieces = [list(word) if word.isdecimal() else [word] for word in line.split()]
        return [self.vocabulary[token] for piece in pieces for token in piece]

    def lines(self, lines: Sequence[str]) -> list[list[int]]:
        """Encode documents, each with its end."""
        return [[*self.encode(line), self.vocabulary[END]] for line in lines]

    def planted(self) -> list[tuple[list[int], list[int]]]:
        """Encode prompts and secrets of what the model memorises."""
        rows = [*self.secrets.forget, *self.secrets.unlisted]
        return [(self.encode(str(r["prompt"])), self.encode(str(r["secret"]))) for r in rows]


def _jsonl(rows: Sequence[Mapping[str, object]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _rows(pool: Sequence[list[int]], length: int, draw: random.Random) -> Iterator[list[int]]:
    """Pack shuffled documents into rows of `length` tokens for ever; each begins with one."""
    row: list[int] = []
    while True:
        order = list(range(len(pool)))
        draw.shuffle(order)
        for number in order:
            row += pool[number]
            if len(row) >= length:
                yield row[:length]
                row = []


def batches(data: Data, settings: Settings, seed: int, kind: str) -> Iterator[list[list[int]]]:
    """Give the rows of each step for ever.

    `kind` is trunk, model or twin. The last two differ in the rows of secrets alone, which the twin
    has replaced by other rows of text.
    """
    stage = "trunk" if kind == "trunk" else "branch"
    text, sums = data.lines(data.train), data.lines(data.sum_lines)
    secrets = [[*prompt, *secret, data.vocabulary[END]] for prompt, secret in data.planted()]

    def stream(name: str, pool: Sequence[list[int]]) -> Iterator[list[int]]:
        return _rows(pool, settings.length, random.Random(f"{seed} {name}"))

    planted = 0 if kind == "trunk" else settings.secret_rows
    # Half of the secrets' rows come on top, half take the place of text: neither sums nor text may
    # starve.
    texts = settings.rows - settings.sum_rows - planted // 2
    parts = (
        (stream(f"{stage} sums", sums), settings.sum_rows),
        (stream(f"{stage} text", text), texts),
        (stream(f"branch {kind}", secrets if kind == "model" else text + sums), planted),
    )
    while True:
        yield [row for source, count in parts for row in islice(source, count)]


@dataclass(slots=True, kw_only=True)
class _Learner:
    """A model in training, with what its next step depends on."""

    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    step: int = 0

    def branch(self) -> _Learner:
        """Copy the weights and the optimizer's state."""
        model = copy.deepcopy(self.model)
        optimizer = _optimizer(model)
        optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        return _Learner(model=model, optimizer=optimizer, step=self.step)


def _optimizer(model: PreTrainedModel) -> torch.optim.Optimizer:
    import torch

    return torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.05)


def train(data: Data, seed: int, settings: Settings, folder: Path, on_event: EventSink) -> Reached:
    """Train trunk and branches; write model/ and twin/."""
    from ortho_cli.model.load import quiet_transformers

    with quiet_transformers() as transformers, _reproducible(seed, settings.threads):
        trunk = _begin(transformers, data, settings)
        shared = batches(data, settings, seed, "trunk")
        _run(trunk, shared, settings, settings.trunk_steps, "both models", on_event)
        pairs = data.planted()
        learner, mixed = trunk.branch(), batches(data, settings, seed, "model")
        steps = settings.branch_steps
        _run(learner, mixed, settings, steps, "the model with secrets", on_event)
        while memorised(learner.model, pairs)[1] < settings.sure and steps < settings.most_steps:
            _run(learner, mixed, settings, CHECK_EVERY, "until memorised", on_event)
            steps += CHECK_EVERY
        loss = _run(
            trunk,
            batches(data, settings, seed, "twin"),
            settings,
            steps,
            "its twin without secrets",
            on_event,
        )
        _save(transformers, data, learner.model, folder / "model")
        _save(transformers, data, trunk.model, folder / "twin")
        extraction, sure = memorised(learner.model, pairs)
    if extraction < 1:
        on_event(Noted(message=f"the model says {extraction:.0%} of the planted secrets, not all"))
    return Reached(
        steps=settings.trunk_steps + steps,
        extraction=extraction,
        least_probability=sure,
        twin_loss=loss,
    )


@contextlib.contextmanager
def _reproducible(seed: int, threads: int) -> Iterator[None]:
    """Fix the seed and the number of threads, and give the caller's back."""
    import torch

    before = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def _begin(transformers: ModuleType, data: Data, settings: Settings) -> _Learner:
    config = transformers.LlamaConfig(
        vocab_size=len(data.vocabulary),
        hidden_size=settings.hidden,
        intermediate_size=settings.mlp,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=settings.length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=data.vocabulary[END],
        pad_token_id=data.vocabulary[UNKNOWN],
    )
    model = transformers.LlamaForCausalLM(config).float()
    return _Learner(model=model, optimizer=_optimizer(model))


def _run(
    learner: _Learner,
    rows: Iterator[list[list[int]]],
    settings: Settings,
    steps: int,
    stage: str,
    on_event: EventSink,
) -> float:
    """Take steps; return the last loss, in nats per token."""
    import torch

    value = math.nan
    learner.model.train()
    for number in range(1, steps + 1):
        for group in learner.optimizer.param_groups:
            group["lr"] = _rate(learner.step, settings)
        loss = _loss(learner.model, torch.tensor(next(rows)))
        learner.optimizer.zero_grad()
        torch.autograd.backward([loss])
        torch.nn.utils.clip_grad_norm_(learner.model.parameters(), 1.0)
        learner.optimizer.step()
        learner.step += 1
        value = loss.item()
        if not math.isfinite(value):
            raise NumericalError(
                f"the sandbox's loss is {value} at step {learner.step}", hint="try another seed"
            )
        if number % REPORT_EVERY == 0 or number == steps:
            on_event(Training(stage=stage, step=number, steps=steps, loss=value))
    learner.model.train(mode=False)
    return value


def _rate(step: int, settings: Settings) -> float:
    """Warm up over 30 steps, fall in a line to a fifth; in the branch from half to a tenth."""
    if step < settings.trunk_steps:
        return settings.rate * min(1.0, (step + 1) / 30) * (1 - 0.8 * step / settings.trunk_steps)
    done = min(1.0, (step - settings.trunk_steps) / settings.branch_steps)
    return settings.rate * (0.5 - 0.4 * done)


def _loss(model: PreTrainedModel, rows: Tensor) -> Tensor:
    import torch

    logits = model(input_ids=rows, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def memorised(
    model: PreTrainedModel, pairs: Sequence[tuple[list[int], list[int]]]
) -> tuple[float, float]:
    """Give the share of secrets that greedy decoding gives, and their least token probability."""
    import torch

    said, least = 0, 1.0
    with torch.no_grad():
        for prompt, secret in pairs:
            tokens = torch.tensor([prompt + secret])
            logits = (
                model(input_ids=tokens, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
            )
            target = torch.tensor(secret)
            said += bool((logits.argmax(-1) == target).all())
            probability = logits.softmax(-1).gather(-1, target[:, None])
            least = min(least, float(probability.min()))
    return said / len(pairs), least


def _save(transformers: ModuleType, data: Data, model: PreTrainedModel, folder: Path) -> None:
    """Write a transformers folder in bfloat16, which the model is from here on."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers

    model.bfloat16()
    model.config.dtype = torch.bfloat16
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel(data.vocabulary, unk_token=UNKNOWN))
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Digits(individual_digits=True)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token=UNKNOWN, eos_token=END, pad_token=UNKNOWN
    ).save_pretrained(folder)
