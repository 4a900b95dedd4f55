"""Figures of one model: memorisation of secrets, perplexity of text, a skill, speed and memory.

Shares have Wilson's interval, means a bootstrap over secrets or windows; records.py says what each
figure is.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ortho_cli.bench.estimates import (
    Values,
    auc,
    average,
    bootstrap,
    mean,
    mean_figure,
    min_k,
    share,
    uniform_p,
)
from ortho_cli.bench.records import (
    Auc,
    Chance,
    Entry,
    Exposure,
    Figure,
    Latency,
    Memorisation,
    MemoryUse,
    SampledShare,
    Share,
    Speed,
    TextFigure,
)
from ortho_cli.errors import CalibrationError, UsageError
from ortho_cli.model.scoring import (
    Beside,
    Forward,
    SecretScore,
    WindowScores,
    chance_exposure,
    compare_windows,
    completion_nll,
    device_of,
    exponential,
    exposures,
    logits_of,
    score,
    sequence_hits,
    takes_cache,
    telling_share,
)
from ortho_cli.model.secrets import TokenSecret
from ortho_cli.model.self_written import answer_batches, answers
from ortho_cli.model.text import TokenSequence
from ortho_cli.model.tokenizer import Tokenizer
from ortho_cli.storage.machine import resident_bytes
from ortho_cli.storage.parts import Parts

LEAST_SPREAD = 1e-9  # nats: of alternatives that are all equally likely, and of a single one
SKILL_PAIRS = 64  # that are kept together once they are measured
INSIDE = (0.05, 0.95)  # quantiles between which a secret is one among its alternatives


def memorisation_of(
    scores: Sequence[SecretScore],
    nonmembers: Sequence[SecretScore] | None = None,
    *,
    seed: int = 0,
    texts: Sequence[str] = (),
    rouges: Sequence[float] = (),
) -> Memorisation:
    """Turn scores into figures of what a model remembers, beside secrets that it never saw.

    Args:
        scores: of secrets that it should not give, one at least.
        nonmembers: of secrets of the same form, never seen; None leaves the AUCs out.
        seed: of the bootstraps.
        texts: texts to print beside the entries; nothing by default.
        rouges: ROUGE-L of the greedy answer to each prompt; nothing leaves that figure out.
    Raises:
        CalibrationError: no secrets.
        NumericalError: an NLL is NaN or infinite.
    Source: Carlini et al. 2019 (arXiv:1802.08232) for exposure; Yeom et al. 2018
    (arXiv:1709.01604) for the loss attack; Shi et al. 2023 (arXiv:2310.16789) for Min-K%.
    """
    if not scores:
        raise CalibrationError("there are no secrets to measure", hint="give a forget set")
    telling = telling_share(scores)
    quantiles = [_quantile(one, telling) for one in scores]
    inside = sum(INSIDE[0] <= quantile <= INSIDE[1] for quantile in quantiles)
    hits = np.array([[sum(one.hits), len(one.hits)] for one in scores], dtype=np.float64)
    low, high = bootstrap(hits, _ratio, seed=seed)
    accuracy = Figure(value=_ratio(hits), low=low, high=high, n=int(hits[:, 1].sum()))

    def auc_of(trace: Callable[[SecretScore], float]) -> Auc | None:
        if nonmembers is None:
            return None
        return auc(list(map(trace, scores)), list(map(trace, nonmembers)), seed=seed)

    return Memorisation(
        extraction=share(sum(one.verbatim for one in scores), len(scores)),
        token_accuracy=accuracy,
        rouge_l=mean_figure(rouges, seed=seed) if rouges else None,
        extraction_strength=mean_figure([_strength(one) for one in scores], seed=seed),
        telling_share=telling,
        truth_ratio=mean_figure([_truth_ratio(one) for one in scores], seed=seed),
        exposure=_exposure(scores, seed),
        forget_nll=mean_figure([one.nll for one in scores], seed=seed),
        alternatives_nll=mean_figure([average(one.alternatives) for one in scores], seed=seed),
        nll_quantile=mean_figure(quantiles, seed=seed),
        inside_share=share(inside, len(scores)),
        rank_p=Chance(value=uniform_p(quantiles), n=len(quantiles)),
        loss_auc=auc_of(_loss_trace),
        min_k_auc=auc_of(_min_k_trace),
        centre_auc=auc_of(_nearness),
        entries=_entries(scores, quantiles, texts),
    )


def _entries(
    scores: Sequence[SecretScore], quantiles: Sequence[float], texts: Sequence[str]
) -> tuple[Entry, ...]:
    named, bits = (*texts, *[None] * len(scores)), exposures(scores)
    return tuple(
        Entry(
            index=index,
            exposure=bits[index],
            nll=one.nll,
            quantile=quantiles[index],
            hits=sum(one.hits),
            tokens=len(one.hits),
            text=named[index],
        )
        for index, one in enumerate(scores)
    )


def _exposure(scores: Sequence[SecretScore], seed: int) -> Exposure:
    counts = [len(one.alternatives) for one in scores]
    mean_bits = mean_figure(exposures(scores), seed=seed)
    return Exposure(
        **dataclasses.asdict(mean_bits),
        alternatives_min=min(counts),
        alternatives_max=max(counts),
        maximum=math.fsum(math.log2(count + 1) for count in counts) / len(counts),
        chance=math.fsum(map(chance_exposure, counts)) / len(counts),
    )


def _quantile(one: SecretScore, telling: float) -> float:
    """Share of alternatives that are more likely by what they tell; equal ones count half."""
    others = [telling * nll for nll in one.alternatives]
    likelier = sum(nll < one.nll for nll in others)
    equal = sum(nll == one.nll for nll in others)
    return (likelier + equal / 2) / len(others)


def _strength(one: SecretScore) -> float:
    """Share of a secret that is likeliest token by token after all that is before it.

    Source: extraction strength, Carlini et al. 2021 (arXiv:2012.07805), as in OpenUnlearning.
    """
    wrong = [index for index, hit in enumerate(one.hits) if not hit]
    return 1 - (wrong[-1] + 1) / len(one.hits) if wrong else 1.0


def _truth_ratio(one: SecretScore) -> float:
    """Give the truth ratio of a secret, which stands for its paraphrase."""
    return truth_ratio(average(one.tokens), list(map(average, one.alternative_tokens)))


def truth_ratio(right: float, wrong: Sequence[float]) -> float:
    """Give the mean probability per token of wrong answers over that of the right one.

        R = mean_w exp(-NLL_w) / exp(-NLL_right),   at most e^700

    Args:
        right: mean NLL per token of the right answer, in nats.
        wrong: the same of each wrong one, one at least.
    Source: Maini et al. 2024 (arXiv:2401.06121), equation 1.
    """
    others = average([math.exp(-nll) for nll in wrong])
    return exponential(math.log(max(others, 1e-300)) + right)


def rouge_l(said: str, right: str) -> float:
    """Compare two texts by their longest common subsequence of words: ROUGE-L, as F1.

        ROUGE-L = 2 LCS(said, right) / (words of said + words of right)

    Returns:
        A share in [0, 1]; 0 where neither has a word. Case does not count.
    Source: Lin 2004, "ROUGE: a package for automatic evaluation of summaries", section 3, beta = 1.
    """
    return f1(said.casefold().split(), right.casefold().split())


def f1(mine: Sequence[str], theirs: Sequence[str]) -> float:
    """Give ROUGE-L of words: the harmonic mean of precision and recall of the common ones."""
    return 2 * common_words(mine, theirs) / max(1, len(mine) + len(theirs))


def common_words(mine: Sequence[str], theirs: Sequence[str]) -> int:
    """Count the words of the longest common subsequence."""
    row = [0] * (len(theirs) + 1)
    for word in mine:
        diagonal = 0
        for place, other in enumerate(theirs, 1):
            above = row[place]
            row[place] = diagonal + 1 if word == other else max(above, row[place - 1])
            diagonal = above
    return row[-1]


def rouges(
    model: nn.Module,
    tokenizer: Tokenizer,
    secrets: Sequence[TokenSecret],
    parts: Parts | None = None,
) -> list[float]:
    """Give ROUGE-L of the greedy answer to each prompt, as long as the right one at most."""

    def compare(row: int, said: Sequence[int]) -> float:
        return rouge_l(tokenizer.decode(said), tokenizer.decode(secrets[row].secret))

    prompts = [secret.prompt for secret in secrets]
    lengths = [len(secret.secret) for secret in secrets]
    end = tokenizer.eos_token_id
    return answer_figures(model, prompts, lengths, compare, end=end, parts=parts or Parts())


def answer_figures(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    tokens: Sequence[int],
    figure: Callable[[int, Sequence[int]], float],
    *,
    end: int | None,
    parts: Parts,
) -> list[float]:
    """Let a model answer prompts greedily, and measure each answer.

    Args:
        model: a causal language model.
        prompts: tokens of each.
        tokens: of each answer at most.
        figure: measures the answer to the prompt of that number, given its tokens.
        end: token that ends an answer; None where there is none.
        parts: keeps figures, batch by batch, and no answer: it may be a secret.
    Returns:
        The figure of each answer, in the order of the prompts.
    """

    def measure(rows: Sequence[int]) -> list[float]:
        most = [tokens[row] for row in rows]
        said = answers(model, [prompts[row] for row in rows], most, end=end)
        return list(map(figure, rows, said))

    batches = answer_batches(model, prompts)
    found = parts.each("answers", batches, measure)
    named = {
        row: one
        for rows, of in zip(batches, found, strict=True)
        for row, one in zip(rows, of, strict=True)
    }
    return [named[row] for row in range(len(prompts))]


def score_secrets(
    model: nn.Module, secrets: Sequence[TokenSecret], parts: Parts
) -> list[SecretScore]:
    """Score each secret and its alternatives, but those that an earlier run has scored."""
    return parts.each(
        "scores", secrets, partial(score, model), write=dataclasses.asdict, read=_read_score
    )


def _read_score(held: Mapping[str, Any]) -> SecretScore:
    return SecretScore(**{name: _tuples(value) for name, value in held.items()})


def _tuples(value: Any) -> Any:
    """Turn JSON's lists into the tuples that they were."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def compare_text(
    model: nn.Module, windows: Tensor, original: Forward | None, parts: Parts
) -> WindowScores:
    """Measure running text as `scoring.compare_windows` does, one window after another."""

    def measure(window: Tensor) -> list[Tensor]:
        found = compare_windows(model, window[None], original)
        return [found.nll[0], *(one[0] for one in found.beside or ())]

    each = parts.each(
        "windows",
        list(windows),
        measure,
        write=lambda found: [one.tolist() for one in found],
        read=lambda held: [torch.tensor(one) for one in held],
    )
    nll, *beside = (torch.stack(rows) for rows in zip(*each, strict=True))
    return WindowScores(nll, Beside(*beside) if beside else None)


def _loss_trace(one: SecretScore) -> float:
    """How much likelier a secret is than its alternatives, in nats."""
    return average(one.alternatives) - one.nll


def _min_k_trace(one: SecretScore) -> float:
    """How much likelier its least likely tokens are than those of its alternatives."""
    return min_k(one.tokens) - average([min_k(tokens) for tokens in one.alternative_tokens])


def _nearness(one: SecretScore) -> float:
    """How near a secret is to the mean of its alternatives, -|z|, in their standard deviations."""
    middle = average(one.alternatives)
    spread = math.sqrt(average([(other - middle) ** 2 for other in one.alternatives]))
    return -abs(one.nll - middle) / max(spread, LEAST_SPREAD)


def sampled_extraction(
    model: nn.Module,
    secrets: Sequence[TokenSecret],
    *,
    samples: int,
    temperature: float = 1.0,
    seed: int = 0,
    parts: Parts | None = None,
) -> SampledShare:
    """Give the share of secrets that at least one of n samples gives, word for word.

        expected = mean over secrets of 1 - (1 - p)^n,   p = exp(-sum of token NLLs)

    A sample is drawn token by token and ends at the first that differs. Until then all samples have
    the same tokens, so one teacher-forced pass gives every probability that is drawn from, and the
    draws are those of a sampler that generates.

    Args:
        model: a causal language model.
        secrets: what it should not say.
        samples: n, >= 1.
        temperature: > 0; logits are divided by it.
        seed: of the draws.
        parts: keeps what is measured of each secret.
    Returns:
        A share, with its exact `expected` value, `samples` and `temperature`.
    Raises:
        UsageError: no samples, or a temperature that is none.
        CalibrationError: no secrets.
        NumericalError: an NLL is NaN or infinite.
    Source: best of n is the attack of Hayes et al. 2024 (arXiv:2410.19482), (n, p)-extraction.
    """
    if samples < 1:
        raise UsageError(f"{samples} samples are asked for", hint="1 at least")
    if not secrets:
        raise CalibrationError("there are no secrets to measure", hint="give a forget set")
    generator = np.random.default_rng(seed)
    said, expected = 0, []

    def measure(one: TokenSecret) -> Tensor:
        return completion_nll(model, one.prompt, [one.secret], temperature=temperature)[0]

    kept = parts or Parts()
    for nll in kept.each("sampled", secrets, measure, write=Tensor.tolist, read=torch.tensor):
        each = np.exp(-nll.double().numpy())
        said += bool((generator.random((samples, len(each))) < each).all(1).any())
        whole = min(float(each.prod()), 1.0)
        expected.append(1.0 if whole == 1 else -math.expm1(samples * math.log1p(-whole)))
    return SampledShare(
        **dataclasses.asdict(share(said, len(secrets))),
        expected=average(expected),
        samples=samples,
        temperature=temperature,
    )


def perplexity(nll: Tensor, *, seed: int = 0) -> TextFigure:
    """Give the perplexity of held-out running text: exp(mean NLL).

    Args:
        nll: (windows, tokens), as `scoring.compare_windows` gives them.
        seed: of the bootstrap, over windows.
    A mean NLL above 700 nats counts as 700.
    """
    return over_windows(nll, _exponential, seed=seed)


def ratio(nll: Tensor, other: Tensor, *, seed: int = 0) -> TextFigure:
    """Give the perplexity of text over another model's on the same text, paired by window.

        ratio = exp(mean (NLL - other NLL))

    Args:
        nll: (windows, tokens), as `scoring.compare_windows` gives them.
        other: the same of the other model.
        seed: of the bootstrap, over windows.
    A mean difference above 700 nats counts as 700.
    """
    return over_windows(nll - other, _exponential, seed=seed)


def over_windows(
    tokens: Tensor, statistic: Callable[[Values], float] = mean, *, seed: int = 0
) -> TextFigure:
    """Give a statistic of window means of (windows, tokens) values."""
    values = tokens.double().mean(1).numpy()
    low, high = bootstrap(values, statistic, seed=seed)
    return TextFigure(
        value=statistic(values),
        low=low,
        high=high,
        n=tokens.numel(),
        windows=tokens.shape[0],
        context=tokens.shape[1] + 1,
    )


def token_nlls(texts: Sequence[Sequence[Sequence[float]]]) -> Tensor:
    """Give the mean NLL per token of several texts for each secret, (secrets, 1) float64, nats."""
    means = [[average([nll for tokens in one for nll in tokens])] for one in texts]
    return torch.tensor(means, dtype=torch.float64)


def _exponential(values: Values) -> float:
    return exponential(mean(values))


def skill(model: nn.Module, pairs: Sequence[TokenSequence], parts: Parts | None = None) -> Share:
    """Give the share of prompts whose greedy completion is exactly the right one.

    Every counted token must be the most likely one. Where the end token is counted as well
    (`data.pair_sequences(..., end=True)`), nothing may follow.

    Raises:
        CalibrationError: no pairs.
        NumericalError: a logit is NaN.
    """
    if not pairs:
        raise CalibrationError(
            "the skill has no rows of prompt and completion", hint="--data FILE that has such rows"
        )

    def count(first: int) -> int:
        hits = sequence_hits(model, pairs[first : first + SKILL_PAIRS])
        return sum(bool(row.all()) for row in hits)

    counts = (parts or Parts()).each("skill", range(0, len(pairs), SKILL_PAIRS), count)
    return share(sum(counts), len(pairs))


@torch.no_grad()
def latency(
    model: nn.Module, tokens: Sequence[int], *, new_tokens: int = 32, repeats: int = 5
) -> Latency:
    """Time a prompt's pass and greedy decoding after it, at batch size 1.

    One run warms up; then `repeats` are timed, prefill and decode apart.

    Args:
        model: a causal language model.
        tokens: the prompt, one at least.
        new_tokens: decoded after it, >= 1.
        repeats: >= 5 for quartiles that mean something.
    Raises:
        UsageError: no prompt, nothing to decode, or no repeats.
    """
    if not tokens or new_tokens < 1 or repeats < 1:
        raise UsageError(
            f"a prompt of {len(tokens)} tokens, {new_tokens} new ones and {repeats} repeats cannot "
            "be timed",
            hint="1 of each at least",
        )
    device = device_of(model)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    runs = [_run(model, tokens, new_tokens, device) for _ in range(repeats + 1)][1:]
    memory = torch.cuda.max_memory_allocated(device) if cuda else resident_bytes()
    return Latency(
        prefill=_speed(len(tokens), [run.prefill for run in runs]),
        decode=_speed(new_tokens, [run.decode for run in runs]),
        cached=runs[-1].cached,
        memory=MemoryUse(value=memory, kind="cuda peak" if cuda else "resident"),
    )


class _Run(NamedTuple):
    """Seconds of one prefill and of one decode, and whether there was a cache."""

    prefill: float
    decode: float
    cached: bool


def _run(model: nn.Module, tokens: Sequence[int], new_tokens: int, device: torch.device) -> _Run:

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    asked = {"use_cache": True} if takes_cache(model) else {}
    read = torch.tensor([list(tokens)], device=device)
    start = now()
    output = model(read, **asked)
    prefilled = now()
    cached = getattr(output, "past_key_values", None) is not None
    for _ in range(new_tokens):
        last = logits_of(output)[:, -1:].argmax(-1)
        if cached:
            output = model(last, past_key_values=output.past_key_values, **asked)
        else:
            read = torch.cat((read, last), 1)
            output = model(read, **asked)
    return _Run(prefilled - start, now() - prefilled, cached)


def _speed(tokens: int, seconds: Sequence[float]) -> Speed:
    low, middle, high = np.percentile([tokens / max(one, 1e-9) for one in seconds], (25, 50, 75))
    return Speed(
        value=float(middle), low=float(low), high=float(high), n=len(seconds), tokens=tokens
    )


def _ratio(rows: Values) -> float:
    return float(rows[:, 0].sum() / rows[:, 1].sum())
