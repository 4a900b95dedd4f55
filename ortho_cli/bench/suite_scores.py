"""Figures of TOFU and MUSE for one model, and those that compare it with a model that never saw.

    TOFU   R = mean_w P(wrong_w | q)^(1/|wrong_w|) / P(right | q)^(1/|right|)
           forget quality = p of two samples: R of the model, R of the reference, on the forget set
           model utility  = harmonic mean of probability, ROUGE-L recall and max(0, 1 - R) of the
                            retain set, real authors and world facts
    MUSE   VerbMem, KnowMem = mean ROUGE-L (F1) of greedy text
           PrivLeak = 100 (AUC - AUC of the reference) / AUC of the reference

R is equation 1 of TOFU's paper; its code takes the geometric mean over wrong answers, which is
smaller. Words are those of the package rouge_score, [a-z0-9]+ in lower case, but not stemmed, where
TOFU's code stems. End tokens do not count in probabilities.

Source: Maini et al. 2024 (arXiv:2401.06121), section 2.2; Shi et al. 2024 (arXiv:2407.06460),
section 3, and their code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import harmonic_mean

import numpy as np
import torch
from torch import nn

from ortho_cli.bench.estimates import ROUNDS, auc, average, mean_figure, min_k, same_p
from ortho_cli.bench.evaluate import answer_figures, common_words, f1, truth_ratio
from ortho_cli.bench.records import Auc, Chance, Figure, Figures, Muse, PrivLeak, Tofu, TofuSet
from ortho_cli.bench.suites import (
    KNOWMEM_FILES,
    UTILITY_SETS,
    MuseData,
    Prompt,
    Question,
    Suites,
    TofuData,
)
from ortho_cli.model.scoring import compare_windows, completion_nll, exponential
from ortho_cli.model.tokenizer import Tokenizer
from ortho_cli.storage.parts import Parts

MIN_K = 0.4
"""Share of the least likely tokens that PrivLeak looks at: `forget_holdout_Min-40%` is what the
authors' code takes, and OpenUnlearning."""
NO_REFERENCE = 0.5
"""AUC of a model that never saw either set, where none is given: as in the code of OpenUnlearning,
and within 0.04 of what the authors measured."""
SMALLEST = 1e-10  # an AUC of the reference at least: PrivLeak divides by it
STOPS = ("\n\n", "\nQuestion", "Question:")  # end an answer of KnowMem: the next example begins
Row = tuple[float, float, float]  # probability, ROUGE-L, truth figure of one question


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """What is compared with the reference: truth ratios of the forget set, and PrivLeak's AUC."""

    truth_ratios: tuple[float, ...] = ()
    auc: Auc | None = None


def measure_suites(
    model: nn.Module, suites: Suites, tokenizer: Tokenizer, *, seed: int, parts: Parts
) -> tuple[Figures, Samples]:
    """Measure one model; `beside` adds what needs the reference.

    Args:
        model: a causal language model.
        suites: the data.
        tokenizer: of the model.
        seed: of the bootstraps.
        parts: keeps the figures of each row, and of each batch of answers.
    Raises:
        NumericalError: an NLL is NaN or infinite.
    """
    figures, samples = Figures(), Samples()
    if suites.tofu is not None:
        tofu, ratios = _measure_tofu(model, suites.tofu, tokenizer, seed, parts.at("tofu"))
        figures, samples = replace(figures, tofu=tofu), replace(samples, truth_ratios=ratios)
    if suites.muse is not None:
        muse, found = _measure_muse(model, suites.muse, tokenizer, seed, parts.at("muse"))
        figures, samples = replace(figures, muse=muse), replace(samples, auc=found)
    return figures, samples


def beside(figures: Figures, mine: Samples, reference: Samples | None) -> Figures:
    """Add the figures that compare a row with the reference; PrivLeak is over 0.5 without one."""
    tofu, muse = figures.tofu, figures.muse
    if tofu and mine.truth_ratios and reference:
        chance = same_p(mine.truth_ratios, reference.truth_ratios)
        tofu = replace(tofu, forget_quality=Chance(value=chance, n=len(mine.truth_ratios)))
    if muse and mine.auc:
        other = reference.auc.value if reference and reference.auc else NO_REFERENCE
        muse = replace(muse, privleak=_privleak(mine.auc, other))
    return replace(figures, tofu=tofu, muse=muse)


def _privleak(found: Auc, reference: float) -> PrivLeak:
    def percent(value: float) -> float:
        return 100 * (value - reference) / max(reference, SMALLEST)

    return PrivLeak(
        value=percent(found.value),
        low=percent(found.low),
        high=percent(found.high),
        n=found.n,
        auc=found.value,
        reference_auc=reference,
    )


def _measure_tofu(
    model: nn.Module, data: TofuData, tokenizer: Tokenizer, seed: int, parts: Parts
) -> tuple[Tofu, tuple[float, ...]]:
    ratios = tuple(
        parts.each(
            "forget", data.sets.get("forget", ()), lambda one: _ratio(one, _means(model, one))
        )
    )
    rows = {
        name: _utility_rows(model, data, name, tokenizer, parts.at(name))
        for name in UTILITY_SETS
        if name in data.sets
    }
    found: dict[str, TofuSet] = {}
    for name, measured in rows.items():
        probability, rouge, truth = zip(*measured, strict=True)
        found[name] = TofuSet(
            probability=mean_figure(probability, seed=seed),
            rouge_l=mean_figure(rouge, seed=seed),
            truth_ratio=mean_figure(truth, seed=seed),
        )
    tofu = Tofu(
        forget_set=data.forget_set,
        forget_truth_ratio=mean_figure(ratios, seed=seed) if ratios else None,
        model_utility=utility(list(rows.values()), seed)
        if len(rows) == len(UTILITY_SETS)
        else None,
        retain=found.get("retain"),
        real_authors=found.get("real_authors"),
        world_facts=found.get("world_facts"),
    )
    return tofu, ratios


def _means(model: nn.Module, one: Question) -> Mapping[tuple[int, ...], float]:
    """Give the mean NLL per token of each answer to a question, in nats."""
    every = list(dict.fromkeys((one.answer, one.right, *one.wrong)))
    found = completion_nll(model, one.prompt, every)
    return {tokens: average(nll.tolist()) for tokens, nll in zip(every, found, strict=True)}


def _ratio(one: Question, means: Mapping[tuple[int, ...], float]) -> float:
    return truth_ratio(means[one.right], [means[wrong] for wrong in one.wrong])


def _utility_rows(
    model: nn.Module, data: TofuData, name: str, tokenizer: Tokenizer, parts: Parts
) -> list[Row]:
    """Measure each question of a set: probability, ROUGE-L recall, max(0, 1 - R)."""
    questions = data.sets[name]

    def recall(row: int, said: Sequence[int]) -> float:
        right = _words(questions[row].text)
        return common_words(_words(_decoded(tokenizer, said)), right) / max(1, len(right))

    recalls = answer_figures(
        model,
        [one.prompt for one in questions],
        [data.longest] * len(questions),
        recall,
        end=tokenizer.eos_token_id,
        parts=parts,
    )

    def measure(one: Question) -> tuple[float, float]:
        means = _means(model, one)
        probability = exponential(-means[one.answer])
        if name != "retain":  # of all options; as odds, since each may be near 0
            odds = [exponential(means[one.answer] - means[wrong]) for wrong in one.wrong]
            probability = 1 / (1 + sum(odds))
        return probability, max(0.0, 1 - _ratio(one, means))

    found = parts.each("questions", questions, measure)
    return [(p, one, truth) for (p, truth), one in zip(found, recalls, strict=True)]


def utility(sets: Sequence[Sequence[Row]], seed: int) -> Figure:
    """Give the harmonic mean of the means of all columns; the bootstrap draws each set anew."""
    values = [np.array(rows) for rows in sets]
    generator = np.random.default_rng(seed)

    def of(drawn: Sequence[np.ndarray]) -> float:
        return float(harmonic_mean([float(mean) for rows in drawn for mean in rows.mean(0)]))

    rounds = [
        of([rows[generator.integers(len(rows), size=len(rows))] for rows in values])
        for _ in range(ROUNDS)
    ]
    low, high = np.percentile(rounds, (2.5, 97.5))
    return Figure(value=of(values), low=float(low), high=float(high), n=sum(map(len, values)))


def _measure_muse(
    model: nn.Module, data: MuseData, tokenizer: Tokenizer, seed: int, parts: Parts
) -> tuple[Muse, Auc | None]:
    def rouge(
        name: str, prompts: Sequence[Prompt], length: int, stops: Sequence[str]
    ) -> Figure | None:
        def compare(row: int, said: Sequence[int]) -> float:
            text = before_next(_decoded(tokenizer, said), stops)
            return f1(_words(text), _words(prompts[row].text))

        found = answer_figures(
            model,
            [one.tokens for one in prompts],
            [length] * len(prompts),
            compare,
            end=tokenizer.eos_token_id,
            parts=parts.at(name),
        )
        return mean_figure(found, seed=seed) if found else None

    known = {
        name: rouge(name, data.knowmem.get(name, ()), data.knowmem_tokens, STOPS)
        for name in KNOWMEM_FILES
    }
    verbmem = rouge("verbmem", data.verbmem, data.verbmem_tokens, ())
    muse = Muse(
        verbmem=verbmem,
        knowmem_forget=known["knowmem_forget"],
        knowmem_retain=known["knowmem_retain"],
    )
    if not data.forget or not data.holdout:
        return muse, None
    held, seen = (
        parts.each(name, texts, partial(_least, model))
        for name, texts in (("holdout", data.holdout), ("forget", data.forget))
    )
    return muse, auc(held, seen, seed=seed)


def _least(model: nn.Module, text: Sequence[int]) -> float:
    """Give the mean log-probability of a text's least likely tokens: Min-40%."""
    return min_k(compare_windows(model, torch.tensor([text])).nll[0].tolist(), MIN_K)


def _decoded(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True)


def before_next(text: str, stops: Sequence[str] = STOPS) -> str:
    """Give the part of a text before the first of these words."""
    for stop in stops:
        text = text.split(stop)[0]
    return text


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())
