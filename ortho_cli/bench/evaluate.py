"""Figures of one model: what it remembers, how well it still works, how fast it is.

Figures are plain dicts as in estimates.py. Shares have Wilson's interval, means a bootstrap over
secrets or windows. No figure holds a secret's text or tokens unless it is asked for. Everything is
in nats, except exposure, which is in bits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ortho_cli.bench.estimates import (
    Figure,
    Values,
    auc,
    average,
    bootstrap,
    figure,
    mean,
    mean_figure,
    min_k,
    share,
)
from ortho_cli.errors import CalibrationError, UsageError
from ortho_cli.model.scoring import (
    SecretScore,
    WindowScores,
    chance_exposure,
    completion_nll,
    device_of,
    logits_of,
    score,
    sequence_hits,
    takes_cache,
)
from ortho_cli.model.secrets import TokenSecret
from ortho_cli.model.text import TokenSequence

INSIDE = (0.05, 0.95)  # quantiles between which a secret is one among its alternatives
LARGEST_EXPONENT = 700.0  # e^700 is a float still; JSON has no infinity


def memorisation(
    model: nn.Module,
    secrets: Sequence[TokenSecret],
    nonmembers: Sequence[TokenSecret] | None = None,
    *,
    seed: int = 0,
    texts: Sequence[str] = (),
) -> Figure:
    """Measure what a model remembers of secrets, beside secrets that it never saw.

    Args:
        model: a causal language model.
        secrets: what it should not say.
        nonmembers: the same form, never seen; None leaves the two AUCs out.
        seed: of the bootstraps.
        texts: what to print beside each entry; nothing by default.
    Returns:
        What `memorisation_figures` gives.
    Raises:
        NumericalError: an NLL is NaN or infinite.
    """
    scores = [score(model, secret) for secret in secrets]
    others = None if nonmembers is None else [score(model, one) for one in nonmembers]
    figures = memorisation_figures(scores, others, seed=seed)
    figures["drawn"] = _counts([secret.drawn for secret in secrets])
    for entry, text in zip(figures["entries"], texts, strict=False):
        entry["text"] = text
    return figures


def memorisation_figures(
    scores: Sequence[SecretScore], nonmembers: Sequence[SecretScore] | None = None, *, seed: int = 0
) -> Figure:
    """Turn scores into figures of memorisation.

    Returns:
        `extraction`: share of secrets of which each token is the most likely one: greedy decoding
            says them. `token_accuracy`: share of such tokens.
        `exposure`: mean in bits, with the fewest and most alternatives, the `maximum`
            log2(n + 1) and `chance`, what a secret that nothing sets apart has on average.
        `forget_nll`, `alternatives_nll`: mean per secret, of its sum over tokens in nats.
        `nll_quantile`: the secret's place among its own alternatives, ties in the middle: 0 is
            the most likely of all, 0.5 chance, 1 the least likely. `inside_share`: share of
            secrets between 0.05 and 0.95; 0.9 by chance.
        `loss_auc`, `min_k_auc`: chance that a secret is given more than a nonmember, or its least
            likely tokens are (Min-20 %); None without nonmembers. 0.5 is no trace; above is
            remembered, and below is a mark, too. From each text's value the mean of its own
            alternatives is taken first, so that prompts and lengths compare.
        `entries`: of each secret its index, exposure, nll, quantile, hits and tokens.
    Raises:
        CalibrationError: no secrets.
        NumericalError: an NLL is NaN or infinite.
    Source: Carlini et al. 2019 (arXiv:1802.08232) for exposure; Yeom et al. 2018
    (arXiv:1709.01604) for the loss attack; Shi et al. 2023 (arXiv:2310.16789) for Min-K%.
    """
    if not scores:
        raise CalibrationError("there are no secrets to measure", hint="give a forget set")
    exposures = [one.exposure for one in scores]
    places = [_quantile(one) for one in scores]
    counts = [len(one.alternatives) for one in scores]
    hits = np.array([[sum(one.hits), len(one.hits)] for one in scores], dtype=np.float64)
    figures: Figure = {
        "extraction": share(sum(one.verbatim for one in scores), len(scores)),
        "token_accuracy": figure(
            _ratio(hits), bootstrap(hits, _ratio, seed=seed), int(hits[:, 1].sum())
        ),
        "exposure": mean_figure(exposures, seed=seed)
        | {
            "alternatives_min": min(counts),
            "alternatives_max": max(counts),
            "maximum": math.fsum(math.log2(count + 1) for count in counts) / len(counts),
            "chance": math.fsum(map(chance_exposure, counts)) / len(counts),
        },
        "forget_nll": mean_figure([one.nll for one in scores], seed=seed),
        "alternatives_nll": mean_figure([average(one.alternatives) for one in scores], seed=seed),
        "nll_quantile": mean_figure(places, seed=seed),
        "inside_share": share(sum(INSIDE[0] <= at <= INSIDE[1] for at in places), len(places)),
        "loss_auc": None,
        "min_k_auc": None,
        "entries": [
            {
                "index": index,
                "exposure": exposures[index],
                "nll": one.nll,
                "quantile": places[index],
                "hits": sum(one.hits),
                "tokens": len(one.hits),
            }
            for index, one in enumerate(scores)
        ],
    }
    for name, of in (("loss_auc", _loss_trace), ("min_k_auc", _min_k_trace)):
        if nonmembers is not None:
            figures[name] = auc(list(map(of, scores)), list(map(of, nonmembers)), seed=seed)
    return figures


def _quantile(one: SecretScore) -> float:
    """Share of alternatives that are more likely; equal ones count half."""
    likelier = sum(nll < one.nll for nll in one.alternatives)
    equal = sum(nll == one.nll for nll in one.alternatives)
    return (likelier + equal / 2) / len(one.alternatives)


def _loss_trace(one: SecretScore) -> float:
    """How much likelier a secret is than its alternatives, in nats."""
    return average(one.alternatives) - one.nll


def _min_k_trace(one: SecretScore) -> float:
    """How much likelier its least likely tokens are than those of its alternatives."""
    return min_k(one.tokens) - average([min_k(tokens) for tokens in one.alternative_tokens])


def sampled_extraction(
    model: nn.Module,
    secrets: Sequence[TokenSecret],
    *,
    samples: int,
    temperature: float = 1.0,
    seed: int = 0,
) -> Figure:
    """Give the share of secrets that at least one of n samples says, word for word.

        expected = mean over secrets of 1 - (1 - p)^n,   p = exp(-sum of token NLLs)

    A sample is drawn token by token and is over at the first that differs: until then all samples
    stand after the same tokens, so one teacher-forced pass gives every probability that is drawn
    from, and the draws are those of a sampler that generates.

    Args:
        model: a causal language model.
        secrets: what it should not say.
        samples: n, >= 1.
        temperature: > 0; logits are divided by it.
        seed: of the draws.
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
    for one in secrets:
        (nll,) = completion_nll(model, one.prompt, [one.secret], temperature=temperature)
        each = np.exp(-nll.double().numpy())
        said += bool((generator.random((samples, len(each))) < each).all(1).any())
        whole = min(float(each.prod()), 1.0)
        expected.append(1.0 if whole == 1 else -math.expm1(samples * math.log1p(-whole)))
    return share(said, len(secrets)) | {
        "expected": average(expected),
        "samples": samples,
        "temperature": temperature,
    }


def quality_figures(found: WindowScores, *, seed: int = 0) -> Figure:
    """Turn scores of held-out running text into figures, with an original's also of the distance.

        perplexity = exp(mean NLL),   perplexity_ratio = exp(mean (NLL - original NLL))
        kl = mean over tokens of KL(original || model)

    Args:
        found: as `scoring.compare_windows` gives them.
        seed: of the bootstrap, over windows.
    Returns:
        `perplexity`; with an original also `original_perplexity`, `perplexity_ratio` (paired), `kl`
        in nats a token and `agreement`, the share of tokens for which both find the same one most
        likely. `n` counts predicted tokens, beside `windows` and `context`.
    A mean NLL above 700 nats counts as 700.
    """
    figures = {"perplexity": _over_windows(found.nll, _exponential, seed)}
    if found.original_nll is None or found.kl is None or found.agree is None:
        return figures
    return figures | {
        "original_perplexity": _over_windows(found.original_nll, _exponential, seed),
        "perplexity_ratio": ratio(found.nll, found.original_nll, seed=seed),
        "kl": _over_windows(found.kl, mean, seed),
        "agreement": _over_windows(found.agree, mean, seed),
    }


def ratio(nll: Tensor, other: Tensor, *, seed: int = 0) -> Figure:
    """Give the perplexity of text over another model's on the same text, paired by window.

        ratio = exp(mean (NLL - other NLL))

    Args:
        nll: (n, tokens), as `scoring.token_losses` gives them.
        other: the same of the other model.
        seed: of the bootstrap, over windows.
    A mean difference above 700 nats counts as 700.
    """
    return _over_windows(nll - other, _exponential, seed)


def _over_windows(tokens: Tensor, statistic: Callable[[Values], float], seed: int) -> Figure:
    """Give a statistic of window means: all windows are of one length."""
    values = tokens.double().mean(1).numpy()
    sizes = {"windows": tokens.shape[0], "context": tokens.shape[1] + 1}
    interval = bootstrap(values, statistic, seed=seed)
    return figure(statistic(values), interval, tokens.numel(), **sizes)


def _exponential(values: Values) -> float:
    return math.exp(min(mean(values), LARGEST_EXPONENT))


def skill(model: nn.Module, pairs: Sequence[TokenSequence]) -> Figure:
    """Give the share of prompts whose greedy completion is exactly the right one.

    Every counted token must be the most likely one. Where the end token is counted as well
    (`data.pair_sequences(..., end=True)`), nothing may follow.

    Raises:
        CalibrationError: no pairs.
        NumericalError: a logit is NaN.
    """
    if not pairs:
        raise CalibrationError(
            "there are no prompts to try a skill on", hint="rows of prompt and completion"
        )
    hits = sequence_hits(model, pairs)
    return share(sum(bool(row.all()) for row in hits), len(pairs))


@torch.no_grad()
def latency(
    model: nn.Module, tokens: Sequence[int], *, new_tokens: int = 32, repeats: int = 5
) -> Figure:
    """Time a prompt's pass and greedy decoding after it, at batch size 1.

    One run warms up; then `repeats` are timed, prefill and decode apart.

    Args:
        model: a causal language model.
        tokens: the prompt, one at least.
        new_tokens: decoded after it, >= 1.
        repeats: >= 5 for quartiles that mean something.
    Returns:
        `prefill` and `decode`: median tokens a second, `low` and `high` its quartiles, `n` runs;
        `cached`: whether decoding keeps a cache or passes everything again; `memory`: bytes, the
        device's peak on CUDA, and the process's present resident set on CPU (None where the system
        does not tell).
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
    return {
        "prefill": _rates(len(tokens), [prefill for prefill, _, _ in runs]),
        "decode": _rates(new_tokens, [decode for _, decode, _ in runs]),
        "cached": runs[-1][2],
        "memory": {"value": memory, "kind": "cuda peak" if cuda else "resident"},
    }


def _run(
    model: nn.Module, tokens: Sequence[int], new_tokens: int, device: torch.device
) -> tuple[float, float, bool]:
    """Seconds of one prefill and of one decode, and whether there was a cache."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    options: dict[str, Any] = {"use_cache": True} if takes_cache(model) else {}
    read = torch.tensor([list(tokens)], device=device)
    start = now()
    output = model(read, **options)
    prefilled = now()
    cached = getattr(output, "past_key_values", None) is not None
    for _ in range(new_tokens):
        last = logits_of(output)[:, -1:].argmax(-1)
        if cached:
            read, options["past_key_values"] = last, output.past_key_values
        else:
            read = torch.cat((read, last), 1)
        output = model(read, **options)
    return prefilled - start, now() - prefilled, cached


def _rates(tokens: int, seconds: Sequence[float]) -> Figure:
    low, middle, high = np.percentile([tokens / max(one, 1e-9) for one in seconds], (25, 50, 75))
    return figure(float(middle), (float(low), float(high)), len(seconds), tokens=tokens)


def resident_bytes() -> int | None:
    """Memory of this process that is resident now; None where there is no /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    sizes = [line.split()[1] for line in lines if line.startswith("VmRSS:")]
    return int(sizes[0]) * 1024 if sizes else None


def _ratio(rows: Values) -> float:
    return float(rows[:, 0].sum() / rows[:, 1].sum())


def _counts(words: Sequence[str]) -> dict[str, int]:
    return {word: words.count(word) for word in sorted(set(words))}
