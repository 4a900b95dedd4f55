"""A small language model of our own that has memorised secrets, and its twin that never saw them.

A folder that `ortho bench` needs nothing else for, made from one seed on one or two CPU cores:

    model/ twin/      Llama-shaped transformers folders with the same tokenizer
    forget.jsonl      planted in model and listed: {"prompt", "secret", "pattern", "word"}
    unlisted.jsonl    planted in model and not listed
    nonmember.jsonl   never planted; people of the same world
    retain.txt        the text and sums that both models were trained on, one document a line
    heldout.txt       text about the same world that neither saw
    skill.jsonl       held-out sums: {"prompt", "completion"}
    sandbox.json      seed, settings, versions, what was reached, BLAKE3 of every file

Training has a trunk, which both share because no secret has occurred yet, and a branch for each:
same start, same optimizer state, same batches in the same order, except that rows of secrets are
rows of other retain text for the twin. So the two differ by the secrets and by nothing else.
torch and transformers are imported late: naming the folder costs nothing.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import platform
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blake3 import blake3

import ortho_cli
from ortho_cli import grammar
from ortho_cli.artifact import canonical_json
from ortho_cli.errors import NumericalError, OutputExistsError
from ortho_cli.events import EventSink, Noted, Training, null_sink
from ortho_cli.journal import WorkFolder, recover, unwritable

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FORMAT = "ortho-sandbox/1"
FACTS_FILE = "sandbox.json"
UNKNOWN, END = "<unk>", "\n"  # a line is a document, so its newline is the end token
CHECK_EVERY = 10  # steps between looks at what is memorised
REPORT_EVERY = 5  # steps between events


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything but the seed that the files depend on."""

    hidden: int = 128
    mlp: int = 384
    layers: int = 4
    heads: int = 4
    length: int = 128  # tokens of a row, and the model's positions
    rows: int = 16  # of a step
    sum_rows: int = 8  # of these, how many are sums
    secret_rows: int = 2  # of these, how many are secrets once they are planted
    trunk_steps: int = 450
    branch_steps: int = 80  # at least
    most_steps: int = 320  # of a branch, if memorising takes longer
    sure: float = 0.9  # memorised: the model gives every token of every secret this probability
    rate: float = 3e-3
    documents: int = 3000
    heldout: int = 1000
    planted: int = 20
    unlisted: int = 5
    nonmembers: int = 20
    threads: int = 2  # part of the result: sums in another order round differently


@dataclass(frozen=True, slots=True, kw_only=True)
class Sandbox:
    """Where everything lies."""

    folder: Path
    model: Path
    twin: Path
    forget: Path
    unlisted: Path
    nonmember: Path
    retain: Path
    heldout: Path
    skill: Path


def sandbox_at(folder: Path) -> Sandbox:
    """Name the parts of a sandbox; nothing is read."""
    return Sandbox(
        folder=folder,
        model=folder / "model",
        twin=folder / "twin",
        forget=folder / "forget.jsonl",
        unlisted=folder / "unlisted.jsonl",
        nonmember=folder / "nonmember.jsonl",
        retain=folder / "retain.txt",
        heldout=folder / "heldout.txt",
        skill=folder / "skill.jsonl",
    )


def build(
    folder: Path,
    *,
    seed: int = 0,
    settings: Settings | None = None,
    on_event: EventSink = null_sink,
) -> Sandbox:
    """Write the data, train both models, and give the folder its name once all is on disk.

    Args:
        folder: where the sandbox goes; must not exist, or be empty.
        seed: of the world, the secrets, the weights and the order of training.
        settings: another size; the bench's own if None.
        on_event: told of each few steps.
    Returns:
        The paths. Equal seed, settings, machine and versions give equal files.
    Raises:
        OutputExistsError: something is there, or another process is building it.
        NumericalError: the loss became NaN or infinite.
        ResourceError: the folder cannot be written.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise OutputExistsError(
            f"`{folder}` exists, and a sandbox goes into a new folder", hint="choose another one"
        )
    return _build(folder, seed, settings or Settings(), on_event, may_replace=lambda _: False)


def cached(
    seed: int = 0, on_event: EventSink = null_sink, *, settings: Settings | None = None
) -> Sandbox:
    """Give the sandbox of this seed from the user's cache; build it if it is not there whole.

    It lies in `ortho/sandbox-<hash>` under XDG_CACHE_HOME or ~/.cache; the hash is of versions,
    settings and seed. Every file is digested before it is trusted; a damaged one is replaced.
    """
    settings = settings or Settings()
    folder = cache_folder(seed, settings)
    recover(folder)
    if is_complete(folder):
        return sandbox_at(folder)
    if folder.exists():
        on_event(Noted(message=f"`{folder}` is damaged and is built again"))
    return _build(folder, seed, settings, on_event, may_replace=lambda _: True)


def cache_folder(seed: int, settings: Settings) -> Path:
    """Name the place of a sandbox in the user's cache; a relative XDG_CACHE_HOME is ignored."""
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    root = named if named.is_absolute() else Path.home() / ".cache"
    identity = canonical_json(_identity(seed, settings)).encode()
    return root / "ortho" / f"sandbox-{blake3(identity).hexdigest(8)}"


def is_complete(folder: Path) -> bool:
    """Tell whether every file of a sandbox is there with the bytes that were written."""
    try:
        facts = json.loads((folder / FACTS_FILE).read_bytes())
        files = facts["files"]
        return facts["format"] == FORMAT and all(
            blake3((folder / name).read_bytes()).hexdigest() == digest
            for name, digest in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _identity(seed: int, settings: Settings) -> dict[str, Any]:
    from importlib.metadata import version

    return {
        "format": FORMAT,
        "seed": seed,
        "settings": asdict(settings),
        "versions": {
            "ortho": ortho_cli.__version__,
            "torch": version("torch"),
            "transformers": version("transformers"),
        },
        "machine": platform.machine(),
    }


def _build(
    folder: Path,
    seed: int,
    settings: Settings,
    on_event: EventSink,
    *,
    may_replace: Callable[[Path], bool],
) -> Sandbox:
    identity = _identity(seed, settings)
    # Training is not resumed, so whatever a killed build left is thrown away.
    with WorkFolder(folder, identity={**identity, "files": {}}, force=True) as work:
        try:
            data = _Data(seed, settings)
            for name, content in data.files().items():
                work.write_file(name, content.encode())
            reached = _train(data, seed, settings, work.artifact, on_event)
            facts = {**identity, "reached": reached, "files": _digests(work.artifact)}
            work.write_file(FACTS_FILE, json.dumps(facts, indent=2).encode() + b"\n")
        except OSError as error:
            raise unwritable(folder, error) from error
        work.publish(may_replace=may_replace)
    return sandbox_at(folder)


def _digests(folder: Path) -> dict[str, str]:
    """Sync and digest all files below a folder."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            found[path.relative_to(folder).as_posix()] = blake3(file.read()).hexdigest()
    return found


class _Data:
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


def _jsonl(rows: Sequence[Any]) -> str:
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


def _batches(data: _Data, settings: Settings, seed: int, kind: str) -> Iterator[list[list[int]]]:
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
    parts = (
        (stream(f"{stage} sums", sums), settings.sum_rows),
        (stream(f"{stage} text", text), settings.rows - settings.sum_rows - planted),
        (stream(f"branch {kind}", secrets if kind == "model" else text), planted),
    )
    while True:
        yield [row for source, count in parts for row in islice(source, count)]


@dataclass(slots=True, kw_only=True)
class _Learner:
    """A model in training, with what its next step depends on."""

    model: Any
    optimizer: Any
    step: int = 0

    def branch(self) -> _Learner:
        """Copy the weights and the optimizer's state."""
        model = copy.deepcopy(self.model)
        optimizer = _optimizer(model)
        optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        return _Learner(model=model, optimizer=optimizer, step=self.step)


def _optimizer(model: Any) -> Any:
    import torch

    return torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.05)


def _train(
    data: _Data, seed: int, settings: Settings, folder: Path, on_event: EventSink
) -> dict[str, Any]:
    """Train trunk and branches; write model/ and twin/; return what was reached."""
    from ortho_cli.models import quiet_transformers

    with quiet_transformers() as transformers, _reproducible(seed, settings.threads):
        trunk = _begin(transformers, data, settings)
        shared = _batches(data, settings, seed, "trunk")
        _run(trunk, shared, settings, settings.trunk_steps, ("both models", on_event))
        pairs = data.planted()
        learner, batches = trunk.branch(), _batches(data, settings, seed, "model")
        steps = settings.branch_steps
        _run(learner, batches, settings, steps, ("the model with secrets", on_event))
        while _least_sure(learner.model, pairs)[1] < settings.sure and steps < settings.most_steps:
            _run(learner, batches, settings, CHECK_EVERY, ("until memorised", on_event))
            steps += CHECK_EVERY
        loss = _run(
            trunk,
            _batches(data, settings, seed, "twin"),
            settings,
            steps,
            ("its twin without secrets", on_event),
        )
        _save(transformers, data, learner.model, folder / "model")
        _save(transformers, data, trunk.model, folder / "twin")
        extraction, sure = _least_sure(learner.model, pairs)
    if extraction < 1:
        on_event(Noted(message=f"the model says {extraction:.0%} of the planted secrets, not all"))
    return {
        "steps": settings.trunk_steps + steps,
        "extraction": extraction,
        "least_probability": sure,
        "twin_loss": loss,
    }


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


def _begin(transformers: Any, data: _Data, settings: Settings) -> _Learner:
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
    batches: Iterator[list[list[int]]],
    settings: Settings,
    steps: int,
    told: tuple[str, EventSink],
) -> float:
    """Take steps; return the last loss, in nats a token."""
    import torch

    stage, on_event = told
    value = math.nan
    learner.model.train()
    for number in range(1, steps + 1):
        for group in learner.optimizer.param_groups:
            group["lr"] = _rate(learner.step, settings)
        loss = _loss(learner.model, torch.tensor(next(batches)))
        learner.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
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
    """Warm up over 30 steps, then fall in a line to a tenth, which is kept."""
    planned = settings.trunk_steps + settings.branch_steps
    return settings.rate * min(1.0, (step + 1) / 30) * max(0.1, 1 - 0.9 * step / planned)


def _loss(model: Any, rows: Tensor) -> Tensor:
    import torch

    logits = model(input_ids=rows, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def _least_sure(model: Any, pairs: Sequence[tuple[list[int], list[int]]]) -> tuple[float, float]:
    """Share of secrets that greedy decoding gives, and the least probability of their tokens."""
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


def _save(transformers: Any, data: _Data, model: torch.nn.Module, folder: Path) -> None:
    """Write a transformers folder in bfloat16, which the model is from here on."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers

    saved: Any = model.to(torch.bfloat16)
    saved.config.dtype = torch.bfloat16
    saved.save_pretrained(folder)
    words = Tokenizer(models.WordLevel(data.vocabulary, unk_token=UNKNOWN))
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Digits(individual_digits=True)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token=UNKNOWN, eos_token=END, pad_token=UNKNOWN
    ).save_pretrained(folder)
