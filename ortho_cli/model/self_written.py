"""Text that a model writes itself: what it can do, in its own words, where the user has no text.

    x_1 ~ uniform over ordinary tokens;  x_2 .. x_4 = argmax p(. | x_<t);  x_t ~ p(. | x_<t)

One random token per sequence leads to many kinds of text: prose, code, lists, dialogue. The next
few are the likeliest, so that the text makes sense from there on. After a given opening every token
is drawn: what follows the words with which prompts of secrets begin is text of the secrets' own
form about something else, a neighbour of them.

A model that has memorised secrets may write them. `without_secrets` takes such text out.

Source: LLM-QAT (Liu et al. 2023, arXiv:2305.17888), section 3.1, "hybrid 2": a random first token,
greedy ones, then sampling.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ortho_cli.errors import UsageError
from ortho_cli.model.load import input_embedding
from ortho_cli.model.scoring import LOGITS, device_of, finite, logits_of, takes_cache
from ortho_cli.model.secrets import TokenSecret
from ortho_cli.model.tokenizer import Tokenizer

GREEDY = 3  # tokens after a random first one that are the likeliest
BATCH = 32  # sequences that are written at once
FEWEST = 8  # texts of a kind, below which they say nothing about it
SHARED = 6  # tokens in a row that text has in common with a secret where it tells it


@torch.no_grad()
def write_text(
    model: nn.Module,
    tokenizer: Tokenizer,
    *,
    count: int,
    length: int,
    seed: int,
    opening: Sequence[int] = (),
) -> Tensor:
    """Let a model write sequences of text, the same ones for the same seed.

    Args:
        model: a causal language model.
        tokenizer: of the model; tells which tokens are special.
        count: sequences, >= 1.
        length: tokens of each, more than the opening has.
        seed: of every draw.
        opening: tokens that every sequence begins with; without it each begins with a random one.
    Returns:
        (count, length) int64, on the CPU.
    Raises:
        UsageError: the opening leaves nothing to write.
        NumericalError: a logit is NaN or infinite.
    An end token ends no sequence: another document follows it, as in training.
    """
    if length <= len(opening) or length < 2 or count < 1:
        raise UsageError(
            f"{count} texts of {length} tokens with an opening of {len(opening)} cannot be written",
            hint="ask for longer ones",
        )
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    special = set(tokenizer.all_special_ids)
    known = min(len(tokenizer), input_embedding(model).shape[0])  # embeddings are often padded
    ordinary = [token for token in range(known) if token not in special]
    greedy = 0 if opening else GREEDY
    found = []
    for start in range(0, count, BATCH):
        rows = min(BATCH, count - start)
        begun = [list(opening) or [draw.choice(ordinary)] for _ in range(rows)]
        found.append(_write(model, torch.tensor(begun), length, greedy, generator))
    return torch.cat(found)


def _write(
    model: nn.Module,
    text: Tensor,
    length: int,
    greedy: int,
    generator: torch.Generator,
    given: Sequence[Sequence[int]] = (),
    end: int | None = None,
) -> Tensor:
    """Write until every row has so many tokens, or has had the end token.

    Where tokens that are `given` for a row are longer than `text`, they come first.
    """
    device = device_of(model)
    options: dict[str, object] = {"use_cache": True} if takes_cache(model) else {}
    fresh, first = text.to(device), text.shape[1]
    while True:
        output = model(fresh, **options)
        last = finite(logits_of(output)[:, -1].float().cpu())
        if text.shape[1] - first < greedy:
            token = last.argmax(-1, keepdim=True)
        else:
            token = torch.multinomial(last.softmax(-1), 1, generator=generator)
        for row, tokens in enumerate(given):
            if text.shape[1] < len(tokens):
                token[row] = tokens[text.shape[1]]
        text = torch.cat((text, token), 1)
        if text.shape[1] == length or _all_ended(text, [len(one) for one in given], end):
            return text
        cache = getattr(output, "past_key_values", None)
        if cache is None:
            fresh = text.to(device)
        else:
            options["past_key_values"], fresh = cache, token.to(device)


def _all_ended(text: Tensor, prompts: Sequence[int], end: int | None) -> bool:
    """Tell whether each row has the end token after its prompt of so many tokens."""
    if end is None:
        return False
    rows = zip(text.tolist(), prompts, strict=True)
    return all(end in row[prompt:] for row, prompt in rows)


@torch.no_grad()
def answers(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    tokens: int | Sequence[int],
    *,
    end: int | None = None,
) -> list[list[int]]:
    """Continue prompts greedily, each token the likeliest; ties go to the lower id.

    Args:
        model: a causal language model.
        prompts: tokens of each.
        tokens: of an answer at most, >= 1: of all, or of each.
        end: token that ends an answer and is not part of it; None where there is none.
    Returns:
        Tokens of each answer, in the order of the prompts.
    Raises:
        NumericalError: a logit is NaN or infinite.
    Prompts of all lengths share a batch without padding: it begins with as many tokens as the
    shortest has, and the rest of a longer one takes the place of what the model would say there.
    """
    most = [tokens] * len(prompts) if isinstance(tokens, int) else tokens
    found: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    longest = max(map(len, prompts), default=1)
    size = max(1, min(BATCH, LOGITS // (longest * input_embedding(model).shape[0])))
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        given = [prompts[row] for row in rows]
        begun = torch.tensor([list(one[: len(given[0])]) for one in given])
        length = max(len(prompts[row]) + most[row] for row in rows)
        whole = _write(model, begun, length, length, torch.Generator(), given, end)
        for row, text in zip(rows, whole.tolist(), strict=True):
            said = text[len(prompts[row]) :][: most[row]]
            found[row] = said[: said.index(end)] if end in said else said
    return found


def common_opening(secrets: Sequence[TokenSecret]) -> tuple[int, ...]:
    """Find the tokens that most prompts begin with; none where prompts have nothing in common.

    The longest beginning that more than half of the prompts share, and at most half of the shortest
    prompt: a longer one would ask for the secrets themselves.
    """
    shortest = min((len(secret.prompt) for secret in secrets), default=0)
    return _beginning(secrets)[: max(1, shortest // 2)]


def _beginning(secrets: Sequence[TokenSecret]) -> tuple[int, ...]:
    """Find the longest beginning that more than half of the prompts share."""
    prompts = [secret.prompt for secret in secrets]
    found: tuple[int, ...] = ()
    for length in range(1, max(map(len, prompts), default=0) + 1):
        beginnings = [prompt[:length] for prompt in prompts if len(prompt) >= length]
        likeliest = max(dict.fromkeys(beginnings), key=beginnings.count)
        if 2 * beginnings.count(likeliest) <= len(prompts):
            break
        found = likeliest
    return found


def without_secrets(texts: Tensor, secrets: Sequence[TokenSecret]) -> Tensor:
    """Leave out text about a secret: it has SHARED tokens in a row in common with one.

    Args:
        texts: (n, length) int64.
        secrets: runs of tokens of each prompt and its secret count, but those of words with which
            most prompts begin. A secret that is shorter than SHARED counts whole.
    Returns:
        (at most n, length) int64.
    Text that only asks for a secret is left out, too: whoever holds on to the model's predictions
    after a prompt holds on to the secret.
    """
    shared = len(_beginning(secrets))
    told = {run for one in secrets for run in _runs(one.secret, min(SHARED, len(one.secret)))}
    for one in secrets:
        alone = max(0, min(shared, len(one.prompt)) - SHARED + 1)  # a run from here on ends beyond
        told |= set(_runs((*one.prompt, *one.secret)[alone:], SHARED))
    sizes = {len(run) for run in told}
    rows = [[int(token) for token in row] for row in texts]
    kept = [not any(run in told for size in sizes for run in _runs(row, size)) for row in rows]
    return texts[torch.tensor(kept, dtype=torch.bool)]


def _runs(tokens: Sequence[int], size: int) -> Iterator[tuple[int, ...]]:
    return (tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1))
