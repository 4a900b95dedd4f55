"""Scores of a causal language model: NLL in nats, greedy hits, exposure, KL divergence.

All scores come from teacher forcing: one pass over a text gives the probability of each token after
those before it. Greedy decoding gives a text if and only if each of its tokens is the most likely
one, and a sampler gives it with the product of these probabilities, so nothing needs to be
generated. Logits are cast to float32 before the softmax, whatever dtype the model computes in.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ortho_cli.errors import NumericalError, UsageError
from ortho_cli.model import phrasing
from ortho_cli.model.secrets import TokenSecret
from ortho_cli.model.text import TokenSequence

LOGITS = 1 << 25  # logits of one pass at most: 128 MiB in float32
LARGEST_EXPONENT = 700.0  # nats; e^700 is a float still
POSITIONS = 128  # of running text whose softmax is taken at once
Forward = Callable[[Tensor], object]  # tokens (n, length) -> logits, or an output that has them


@dataclass(frozen=True, slots=True, kw_only=True)
class SecretScore:
    """Scores of one secret and of its alternatives after the same prompt.

    `nll` and `alternatives` are sums over tokens in nats, `tokens` and `alternative_tokens` the NLL
    of each token; `hits`: whether each token of the secret is the most likely one; `told`: the part
    of `alternatives` that is of tokens which tell something (phrasing.py).
    """

    nll: float
    tokens: tuple[float, ...]
    hits: tuple[bool, ...]
    alternatives: tuple[float, ...]
    alternative_tokens: tuple[tuple[float, ...], ...]
    told: float

    @property
    def verbatim(self) -> bool:
        """Whether greedy decoding gives the whole secret."""
        return all(self.hits)


def telling_share(scores: Sequence[SecretScore]) -> float:
    """Give kappa of phrasing.py for a set of secrets, in (0, 1]."""
    whole = math.fsum(nll for one in scores for nll in one.alternatives)
    return phrasing.share_of(math.fsum(one.told for one in scores), whole)


def exposures(scores: Sequence[SecretScore]) -> list[float]:
    """Give the exposure in bits of each secret among its alternatives, by what these tell."""
    share = telling_share(scores)
    return [exposure(one.nll, [share * nll for nll in one.alternatives]) for one in scores]


def exposure(secret_nll: float, alternatives: Sequence[float]) -> float:
    """Rank a secret among n alternatives of its form, in bits: 0 is the last, log2(n+1) the first.

        exposure = log2(n + 1) - log2(rank),   rank = 1 + #{alternatives with NLL <= the secret's}

    Args:
        secret_nll: NLL of the secret in nats, summed over its tokens; finite.
        alternatives: the same of its n >= 1 alternatives; finite.
    Returns:
        Bits in [0, log2(n + 1)]: 6.02 at most with 64 alternatives. `chance_exposure` is the mean
        of secrets that the model does not know.
    Raises:
        NumericalError: an NLL is NaN or infinite, or there are no alternatives.
    Ties go to the worse rank: where all are equal, exposure is 0.
    Source: Carlini et al. 2019 (arXiv:1802.08232), log2 |R| - log2 rank, over sampled alternatives.
    """
    if not alternatives:
        raise NumericalError("exposure needs an alternative", hint="give 64 of the same form")
    if not all(map(math.isfinite, (secret_nll, *alternatives))):
        raise NumericalError(
            "the NLL of a secret or of an alternative is NaN or infinite",
            hint="are the model's weights finite?",
        )
    rank = 1 + sum(nll <= secret_nll for nll in alternatives)
    return math.log2(len(alternatives) + 1) - math.log2(rank)


def chance_exposure(alternatives: int) -> float:
    """Give the mean exposure where every rank is equally likely: mean of log2((n+1) / rank).

    1.38 bits with 64 alternatives; towards 1 / ln 2 = 1.44 as they grow.
    """
    count = alternatives + 1
    return math.log2(count) - math.lgamma(count + 1) / math.log(2) / count


def completion_nll(
    model: nn.Module,
    prompt: Sequence[int],
    completions: Sequence[Sequence[int]],
    *,
    temperature: float = 1.0,
) -> list[Tensor]:
    """Measure the NLL of each token of each completion of one prompt.

        nll_t = -log softmax(logits_t / temperature)[token_t]

    Args:
        model: a causal language model, not in training mode; any dtype, any device.
        prompt: tokens, one at least; passed once, and its cache is shared by the completions.
        completions: tokens of each, one at least; they may differ in length.
        temperature: > 0.
    Returns:
        One (tokens,) float32 CPU tensor in nats for each completion.
    Raises:
        UsageError: the prompt or a completion is empty, or the temperature is not above 0.
        NumericalError: an NLL is NaN or infinite.
    """
    return [nll for nll, _ in _completions(model, prompt, completions, temperature)]


def score(model: nn.Module, secret: TokenSecret) -> SecretScore:
    """Score a secret and its alternatives after its prompt.

    Raises:
        NumericalError: an NLL is NaN or infinite.
    Where two tokens are equally likely, the lower id is the greedy one, as in torch's argmax.
    """
    completions = [secret.secret, *secret.alternatives]
    (nll, hits), *others = _completions(model, secret.prompt, completions, 1.0)
    alternatives = [tuple(other.tolist()) for other, _ in others]
    return SecretScore(
        nll=math.fsum(nll.tolist()),
        tokens=tuple(nll.tolist()),
        hits=tuple(hits.tolist()),
        alternatives=tuple(map(math.fsum, alternatives)),
        alternative_tokens=tuple(alternatives),
        told=phrasing.told(secret.alternatives, alternatives),
    )


class Beside(NamedTuple):
    """An original beside the model, per predicted token: its NLL, KL(original || model) in nats.

    `agree` is 1 where both find the same token most likely. Shapes and dtypes as in WindowScores.
    """

    nll: Tensor
    kl: Tensor
    agree: Tensor


class WindowScores(NamedTuple):
    """The NLL of each predicted token of running text, (n, length - 1) float32 on the CPU."""

    nll: Tensor
    beside: Beside | None = None


@torch.no_grad()
def compare_windows(
    model: nn.Module, windows: Tensor, original: Forward | None = None
) -> WindowScores:
    """Measure running text with a model, and beside the original if there is one.

        KL_t = sum_v p_v (log p_v - log q_v),   p of the original, q of the model

    One window is passed at a time, so no more than its logits are held.

    Args:
        model: a causal language model.
        windows: (n, length) int64 tokens, length >= 2.
        original: another model, or a function from tokens to its output.
    Raises:
        UsageError: no window, or one of fewer than 2 tokens.
        NumericalError: a figure is NaN or infinite.
    """
    if windows.dim() != 2 or not len(windows) or windows.shape[1] < 2:
        raise UsageError(
            f"windows of running text are {list(windows.shape)}, not (n > 0, length > 1)",
            hint="give more text, or a shorter context",
        )
    device = device_of(model)
    rows: list[list[Tensor]] = []
    for window in windows:
        tokens = window[None].to(device)
        mine = logits_of(model(tokens))[0, :-1]
        other = None if original is None else logits_of(original(tokens))[0, :-1]
        rows.append(_window(mine, other, tokens[0, 1:]))
    found = [finite(torch.stack(figures).cpu()) for figures in zip(*rows, strict=True)]
    return WindowScores(found[0], None if original is None else Beside(*found[1:]))


def _window(mine: Tensor, other: Tensor | None, tokens: Tensor) -> list[Tensor]:
    """Score one window, some positions at a time: a softmax over a vocabulary is large."""
    parts: list[list[Tensor]] = []
    for start in range(0, len(tokens), POSITIONS):
        part = slice(start, start + POSITIONS)
        labels = tokens[part, None]
        q = mine[part].float().log_softmax(-1)
        figures = [-q.gather(1, labels)[:, 0]]
        if other is not None:
            p = other[part].to(q.device).float().log_softmax(-1)
            figures.append(-p.gather(1, labels)[:, 0])
            terms = p.exp() * (p - q)
            figures.append(terms.masked_fill_(p.isneginf(), 0.0).sum(-1))  # 0 log 0 is 0
            figures.append((p.argmax(-1) == q.argmax(-1)).float())
        parts.append(figures)
    return [torch.cat(figures) for figures in zip(*parts, strict=True)]


@torch.no_grad()
def sequence_hits(model: nn.Module, sequences: Sequence[TokenSequence]) -> list[Tensor]:
    """Find whether each counted token of each sequence is the most likely one.

    Returns:
        One (labels,) bool CPU tensor for each sequence.
    Raises:
        NumericalError: a logit that counts is NaN.
    """
    if not sequences:
        return []
    device = device_of(model)
    longest = max(len(sequence.tokens) for sequence in sequences)
    found: list[Tensor] = []
    size = 1
    while len(found) < len(sequences):
        batch = sequences[len(found) : len(found) + size]
        padded = pad([sequence.tokens for sequence in batch]).to(device)
        logits = logits_of(model(padded))
        size = max(1, LOGITS // (logits.shape[-1] * longest))
        for row, sequence in enumerate(batch):
            where = slice(sequence.counted, len(sequence.tokens))
            at = logits[row, where.start - 1 : where.stop - 1].float()
            finite(at.amax(-1))
            found.append((at.argmax(-1) == padded[row, where]).cpu())
    return found


@torch.no_grad()
def _completions(
    model: nn.Module,
    prompt: Sequence[int],
    completions: Sequence[Sequence[int]],
    temperature: float,
) -> list[tuple[Tensor, Tensor]]:
    """Give the NLL and hit of each token of each completion."""
    if not prompt or not all(completions):
        raise UsageError("a prompt or a completion has no tokens", hint="one at least")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise UsageError(
            f"temperature is {temperature}, not above 0", hint="1.0 is the model's own"
        )
    found: list[tuple[Tensor, Tensor]] = []
    for batch, logits in _batches(model, prompt, completions):
        for row, completion in enumerate(batch):
            at = logits[row, : len(completion)].float()
            labels = torch.tensor(completion, device=at.device)
            nll = -(at / temperature).log_softmax(-1).gather(1, labels[:, None])[:, 0]
            found.append((finite(nll.cpu()), (at.argmax(-1) == labels).cpu()))
    return found


@runtime_checkable
class _Cache(Protocol):
    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence of the cache."""


def _batches(
    model: nn.Module, prompt: Sequence[int], completions: Sequence[Sequence[int]]
) -> Iterator[tuple[Sequence[Sequence[int]], Tensor]]:
    """Give batches of completions with the logits (n, longest, vocabulary) of their tokens.

    Padding is on the right, where causal attention keeps it from the tokens that count.
    """
    device = device_of(model)
    start = torch.tensor([list(prompt)], device=device)
    output = model(start, use_cache=True) if takes_cache(model) else model(start)
    cache = getattr(output, "past_key_values", None)
    first = logits_of(output)[:, -1:]
    longest = max(map(len, completions)) + (0 if isinstance(cache, _Cache) else len(prompt))
    size = max(1, LOGITS // (longest * first.shape[-1]))
    for begin in range(0, len(completions), size):
        batch = completions[begin : begin + size]
        padded = pad(batch).to(device)
        if not isinstance(cache, _Cache):
            whole = torch.cat((start.expand(len(batch), -1), padded), 1)
            yield batch, logits_of(model(whole))[:, len(prompt) - 1 : -1]
        elif padded.shape[1] == 1:
            yield batch, first.expand(len(batch), -1, -1)
        else:
            copied = copy.deepcopy(cache)  # it grows with each pass
            copied.batch_repeat_interleave(len(batch))
            rest = logits_of(model(padded[:, :-1], past_key_values=copied, use_cache=True))
            yield batch, torch.cat((first.expand(len(batch), -1, -1), rest), 1)


def takes_cache(model: nn.Module) -> bool:
    """Whether the model can be asked for its cache."""
    return "use_cache" in inspect.signature(model.forward).parameters


def pad(rows: Sequence[Sequence[int]], fill: int = 0) -> Tensor:
    """Make token rows one (n, longest) int64 tensor, filled up on the right."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows])


def logits_of(output: Any) -> Tensor:
    """Take the logits of an output that has them, of a tuple that begins with them, or itself."""
    logits = getattr(output, "logits", output)
    first: Tensor = logits[0] if isinstance(logits, tuple) else logits
    return first


def device_of(model: nn.Module) -> torch.device:
    """Find the device of a model's tokens: that of its first parameter."""
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def exponential(nats: float) -> float:
    """Give e to so many nats, at most e^700: JSON has no infinity. NaN stays NaN."""
    return math.exp(min(nats, LARGEST_EXPONENT))


def worst_of(ratios: Mapping[str, float]) -> str:
    """Name what has the largest ratio; NaN is worst of all."""
    return max(ratios, key=lambda name: (math.isnan(ratios[name]), ratios[name]))


def finite(values: Tensor) -> Tensor:
    """Refuse values that are not finite; give the others back.

    Raises:
        NumericalError: one is NaN or infinite.
    """
    bad = values.numel() - int(values.isfinite().sum())
    if bad:
        raise NumericalError(
            f"{bad} of {values.numel()} measured values are NaN or infinite",
            hint="are the model's weights finite?",
        )
    return values
