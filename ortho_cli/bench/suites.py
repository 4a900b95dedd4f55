"""Data of the field's own suites, TOFU and MUSE: the files that a folder has, their rows in tokens.

    tofu   forget01_perturbed, forget05_perturbed, forget10_perturbed: one of them is measured
           retain_perturbed, real_authors_perturbed, world_facts_perturbed
           rows: question, answer, perturbed_answer (a list); but for real authors and world facts
           paraphrased_answer
    muse   verbmem/forget: prompt, gt
           knowmem/forget_qa, retain_qa: question, answer; forget_qa_icl, retain_qa_icl: examples
           privleak/forget, holdout: texts

A file is called so and ends in `.json` or `.jsonl`, as the authors give it, or in
`-00000-of-00001.parquet`, as the Hub does. A figure whose file is not there is not measured.

Source: Maini et al. 2024 (arXiv:2401.06121), locuslab/tofu; Shi et al. 2024 (arXiv:2407.06460),
swj0419/muse_bench, muse-bench/MUSE-News.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from ortho_cli.bench.plan import Settings
from ortho_cli.errors import CalibrationError, UsageError
from ortho_cli.model.row_files import read_values
from ortho_cli.model.rows import fields_of, names_of
from ortho_cli.model.secrets import Secret
from ortho_cli.model.text import encode_completion, encode_prompt
from ortho_cli.model.tokenizer import Tokenizer

# How every question is asked. A chat template is not used where the tokenizer has one: it does not
# say that the model learned the answers under it, and figures compare under one form alone.
QUESTION = "Question: {}\nAnswer:"
ANSWER = 200
"""Tokens of a greedy answer to TOFU's questions at most, as in OpenUnlearning; the authors' own
code allows 200 with the question. Recall grows with length, so fewer would be another figure."""
VERBMEM = 128
"""Tokens of MUSE's verbatim continuation: `max_new_tokens` of the authors' code."""
KNOWMEM = 32
"""Tokens of an answer to MUSE's questions at most: `max_new_tokens` of the authors' code."""

FORGET_SETS = ("forget01", "forget05", "forget10")  # the smaller ones first
UTILITY_SETS = {
    "retain": "retain_perturbed",
    "real_authors": "real_authors_perturbed",
    "world_facts": "world_facts_perturbed",
}
PARAPHRASED = ("forget", "retain")  # sets whose right answer is worded anew for the truth ratio
KNOWMEM_FILES = {"knowmem_forget": "knowmem/forget_qa", "knowmem_retain": "knowmem/retain_qa"}
PRIVLEAK_FILES = ("privleak/forget", "privleak/holdout")
FILES: Mapping[str, Sequence[str]] = {
    "tofu": [*(f"{name}_perturbed" for name in FORGET_SETS), *UTILITY_SETS.values()],
    "muse": ["verbmem/forget", *KNOWMEM_FILES.values(), *PRIVLEAK_FILES],
}
SUFFIXES = (".json", ".jsonl", "-00000-of-00001.parquet")

Tokens = tuple[int, ...]
One = TypeVar("One")


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A question of TOFU: its answer, as text and tokens, a right one, and wrong ones beside it."""

    prompt: Tokens
    text: str
    answer: Tokens
    right: Tokens
    wrong: tuple[Tokens, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TofuData:
    """Sets of questions by name: `forget`, and those of UTILITY_SETS; absent ones are left out."""

    forget_set: str | None
    sets: Mapping[str, tuple[Question, ...]]
    longest: int  # tokens of a greedy answer at most


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A prompt, and the text that would follow it in the data."""

    tokens: Tokens
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MuseData:
    """Prompts of VerbMem and of KnowMem by figure, texts of PrivLeak; empty where not given."""

    verbmem: tuple[Prompt, ...]
    knowmem: Mapping[str, tuple[Prompt, ...]]
    forget: tuple[Tokens, ...]
    holdout: tuple[Tokens, ...]
    verbmem_tokens: int
    knowmem_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Suites:
    """Data of the suites asked for; `missing`: figures that they leave out, and their needs."""

    tofu: TofuData | None = None
    muse: MuseData | None = None
    missing: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def largest_token(self) -> int:
        """Give the largest token of all data, 0 of none."""
        found: list[Tokens] = []
        if self.tofu:
            for one in (one for rows in self.tofu.sets.values() for one in rows):
                found += [one.prompt, one.answer, one.right, *one.wrong]
        if self.muse:
            asked = [*self.muse.verbmem, *(p for rows in self.muse.knowmem.values() for p in rows)]
            found += [*(one.tokens for one in asked), *self.muse.forget, *self.muse.holdout]
        return max((max(tokens) for tokens in found), default=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reader:
    """What every file is read with."""

    settings: Settings
    tokenizer: Tokenizer
    positions: int | None  # of the model, where it has a limit

    def some(self, rows: Sequence[One], name: str) -> Sequence[One]:
        """Draw as many rows as are measured of a part, in their order."""
        most = self.settings.suite_rows
        if len(rows) <= most:
            return rows
        draw = random.Random(f"{self.settings.seed} {name}")
        return [rows[place] for place in sorted(draw.sample(range(len(rows)), most))]

    def cut(self, tokens: Sequence[int], room: int = 0) -> Tokens:
        """Keep the last tokens of a prompt that leave so much room for its answer."""
        kept = len(tokens) if self.positions is None else max(1, self.positions - room)
        return tuple(tokens[-kept:])


def read_suites(
    settings: Settings, tokenizer: Tokenizer, *, positions: int | None, listed: Sequence[Secret]
) -> Suites:
    """Read the files of each suite that the settings name.

    Args:
        settings: suites with their folders, rows of each part, seed, whether there is a twin.
        tokenizer: of the model.
        positions: that the model has; None where it has no limit.
        listed: secrets of --forget, which tell TOFU's forget set.
    Raises:
        UsageError: a folder has no file of its suite.
        CalibrationError: a file cannot be read, or a row of it has another form; names the row.
    """
    reader = _Reader(settings=settings, tokenizer=tokenizer, positions=positions)
    found = Suites()
    for name, folder in settings.suites:
        if not any(_find(folder, file) for file in FILES[name]):
            raise UsageError(
                f"`{folder}` has no file of the suite {name}: "
                f"{', '.join(f'{file}.json' for file in FILES[name])} were looked for",
                hint=f"--suite {name} DIR: a folder with at least one of them",
            )
        one = _read_tofu(reader, folder, listed) if name == "tofu" else _read_muse(reader, folder)
        found = Suites(
            tofu=one.tofu or found.tofu,
            muse=one.muse or found.muse,
            missing={**found.missing, **one.missing},
            notes=(*found.notes, *one.notes),
        )
    return found


def _find(folder: Path, name: str) -> Path | None:
    return next((path for end in SUFFIXES if (path := folder / f"{name}{end}").is_file()), None)


def _read_tofu(reader: _Reader, folder: Path, listed: Sequence[Secret]) -> Suites:
    missing: dict[str, str] = {}
    forget_set, rows, notes = _choose_forget_set(folder, listed)
    sets = {"forget": _questions(reader, rows, "forget")} if rows else {}
    if forget_set is None:
        files = " or ".join(f"{name}_perturbed.json" for name in FORGET_SETS)
        needs = f"{files} in the folder of --suite tofu"
        missing |= dict.fromkeys(("tofu.forget_quality", "tofu.forget_truth_ratio"), needs)
    elif reader.settings.reference_model is None:
        missing["tofu.forget_quality"] = "--reference-model DIR, a twin that saw retain rows alone"
    for name, file in UTILITY_SETS.items():
        path = _find(folder, file)
        if path is None:
            missing[f"tofu.{name}"] = f"{file}.json in the folder of --suite tofu"
        else:
            every = _tofu_rows(path, paraphrased=name in PARAPHRASED)
            sets[name] = _questions(reader, reader.some(every, name), name)
    absent = [need for name, need in missing.items() if name.removeprefix("tofu.") in UTILITY_SETS]
    if absent:
        missing["tofu.model_utility"] = " and ".join(absent)
    longest = max(len(one.prompt) for rows in sets.values() for one in rows)
    room = ANSWER if reader.positions is None else min(ANSWER, reader.positions - longest)
    data = TofuData(forget_set=forget_set, sets=sets, longest=room)
    return Suites(tofu=data, missing=missing, notes=notes)


@dataclass(frozen=True, slots=True, kw_only=True)
class _TofuRow:
    """A row of TOFU in text."""

    question: str
    answer: str
    right: str
    wrong: tuple[str, ...]
    where: str


def _choose_forget_set(
    folder: Path, listed: Sequence[Secret]
) -> tuple[str | None, Sequence[_TofuRow], tuple[str, ...]]:
    """Choose the set of which --forget lists most rows, and those rows; else all of the smallest.

    The sets hold one another, so that of two with as many the smaller one is meant.
    """
    secrets = {one.secret.strip() for one in listed}
    sets: dict[str, Sequence[_TofuRow]] = {}
    for name in FORGET_SETS:
        if path := _find(folder, f"{name}_perturbed"):
            sets[name] = _tofu_rows(path, paraphrased=True)
    if not sets:
        return None, (), ()
    told = {name: [r for r in rows if r.answer in secrets] for name, rows in sets.items()}
    chosen = max(sets, key=lambda name: len(told[name]))
    rows, every = told[chosen], sets[chosen]
    note = ""
    if listed and not rows:
        note = f"--forget lists no row of `{chosen}_perturbed`: tofu.forget_quality is of all of it"
    elif listed and len(rows) < len(every):
        note = (
            f"--forget lists {len(rows)} of {len(every)} rows of `{chosen}_perturbed`: "
            "tofu.forget_quality is of these"
        )
    return chosen, rows or every, (note,) if note else ()


def _tofu_rows(path: Path, *, paraphrased: bool) -> list[_TofuRow]:
    found = []
    for row, where in _rows(path):
        answer = _text(row, "answer", where).strip()
        wrong = row.get("perturbed_answer")
        wrong = [wrong] if isinstance(wrong, str) else wrong
        if not isinstance(wrong, list) or not wrong or not all(map(_is_text, wrong)):
            raise _lacks(row, "perturbed_answer", where, "a list of wrong answers")
        right = _text(row, "paraphrased_answer", where).strip() if paraphrased else answer
        found.append(
            _TofuRow(
                question=_text(row, "question", where).strip(),
                answer=answer,
                right=right,
                wrong=tuple(one.strip() for one in wrong),
                where=where,
            )
        )
    return found


def _questions(reader: _Reader, rows: Sequence[_TofuRow], name: str) -> tuple[Question, ...]:
    found = []
    for row in rows:
        prompt = encode_prompt(QUESTION.format(row.question), reader.tokenizer)
        answer, right, *wrong = (
            tuple(encode_completion(f" {one}", reader.tokenizer))
            for one in (row.answer, row.right, *row.wrong)
        )
        if not prompt or not all((answer, right, *wrong)):
            raise CalibrationError(
                f"{row.where} has a question or an answer of no tokens", hint="leave the row out"
            )
        length = len(prompt) + max(map(len, (answer, right, *wrong)))
        if reader.positions is not None and length > reader.positions:
            raise CalibrationError(
                f"{row.where} has {length} tokens and the model {reader.positions} positions",
                hint="leave the row out",
            )
        one = Question(
            prompt=tuple(prompt), text=row.answer, answer=answer, right=right, wrong=tuple(wrong)
        )
        found.append(one)
    return tuple(found)


def _read_muse(reader: _Reader, folder: Path) -> Suites:
    missing: dict[str, str] = {}
    notes: list[str] = []
    tokens = (VERBMEM, KNOWMEM)
    if reader.positions is not None:  # half of a short model's are for the prompt
        tokens = (min(VERBMEM, reader.positions // 2), min(KNOWMEM, reader.positions // 2))
    verbmem: tuple[Prompt, ...] = ()
    if path := _find(folder, "verbmem/forget"):
        verbmem = _verbmem(reader, path, tokens[0])
    else:
        missing["muse.verbmem"] = "verbmem/forget.json in the folder of --suite muse"
    knowmem = {}
    for name, file in KNOWMEM_FILES.items():
        if path := _find(folder, file):
            shots = _find(folder, f"{file}_icl")
            if shots is None:
                notes.append(f"`{file}_icl.json` is not there: muse.{name} is without its examples")
            knowmem[name] = _knowmem(reader, path, shots, tokens[1])
        else:
            missing[f"muse.{name}"] = f"{file}.json in the folder of --suite muse"
    texts: dict[str, tuple[Tokens, ...]] = dict.fromkeys(PRIVLEAK_FILES, ())
    paths = {file: path for file in PRIVLEAK_FILES if (path := _find(folder, file))}
    if absent := [f"{file}.json" for file in PRIVLEAK_FILES if file not in paths]:
        missing["muse.privleak"] = f"{' and '.join(absent)} in the folder of --suite muse"
    else:
        texts |= {file: _texts(reader, path) for file, path in paths.items()}
        if reader.settings.reference_model is None:
            notes.append("muse.privleak is over an AUC of 0.5: there is no --reference-model")
    data = MuseData(
        verbmem=verbmem,
        knowmem=knowmem,
        forget=texts[PRIVLEAK_FILES[0]],
        holdout=texts[PRIVLEAK_FILES[1]],
        verbmem_tokens=tokens[0],
        knowmem_tokens=tokens[1],
    )
    return Suites(muse=data, missing=missing, notes=tuple(notes))


def _verbmem(reader: _Reader, path: Path, length: int) -> tuple[Prompt, ...]:
    """Read prompts with their true continuation, of which so many tokens count."""
    rows = [
        (_text(row, "prompt", where), _text(row, "gt", where), where) for row, where in _rows(path)
    ]
    found = []
    for prompt, right, where in reader.some(rows, "verbmem"):
        tokens = encode_prompt(prompt, reader.tokenizer)
        follows = encode_completion(right, reader.tokenizer)[:length]
        if not tokens or not follows:
            raise CalibrationError(
                f"{where} has a prompt or a continuation of no tokens", hint="leave the row out"
            )
        text = reader.tokenizer.decode(follows, skip_special_tokens=True)
        found.append(Prompt(tokens=reader.cut(tokens, length), text=text))
    return tuple(found)


def _knowmem(reader: _Reader, path: Path, shots: Path | None, length: int) -> tuple[Prompt, ...]:
    """Read questions, each behind all examples and their answers."""

    def pairs(file: Path) -> list[tuple[str, str]]:
        every = _rows(file)
        return [
            (_text(row, "question", where).strip(), _text(row, "answer", where).strip())
            for row, where in every
        ]

    examples = "".join(
        f"{QUESTION.format(question)} {answer}\n\n"
        for question, answer in (pairs(shots) if shots else [])
    )
    found = []
    for question, answer in reader.some(pairs(path), path.stem):
        tokens = encode_prompt(examples + QUESTION.format(question), reader.tokenizer)
        found.append(Prompt(tokens=reader.cut(tokens, length), text=answer))
    return tuple(found)


def _texts(reader: _Reader, path: Path) -> tuple[Tokens, ...]:
    """Read texts, each cut to the model's positions."""
    rows = [(_text(row, "text", where), where) for row, where in _rows(path)]
    found = []
    for text, where in reader.some(rows, path.stem):
        tokens = tuple(encode_prompt(text, reader.tokenizer)[: reader.positions])
        if len(tokens) < 2:
            raise CalibrationError(
                f"{where} has {len(tokens)} tokens, and one follows from another",
                hint="leave the row out",
            )
        found.append(tokens)
    return tuple(found)


def _rows(path: Path) -> Iterator[tuple[Mapping[str, object], str]]:
    """Read the rows of a file with their places, one at least."""
    values, _ = read_values(path)
    empty = True
    for value, where in values:
        empty = False
        yield fields_of(value), where
    if empty:
        raise CalibrationError(f"data `{path}` holds no rows", hint="is it cut? copy it again")


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _text(row: Mapping[str, object], name: str, where: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise _lacks(row, name, where, "text")
    return value


def _lacks(row: Mapping[str, object], name: str, where: str, what: str) -> CalibrationError:
    given = f"`{name}` of another kind" if name in row else f"{names_of(row)} and no `{name}`"
    return CalibrationError(
        f"{where} has {given}", hint=f"`{name}` is {what}; give the suite's own files unchanged"
    )
