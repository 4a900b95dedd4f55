"""Text that a model writes itself: what it can do, in its own words, where the user has no text.

    x_1 ~ uniform over ordinary tokens;  x_2 .. x_4 = argmax p(. | x_<t);  x_t ~ p(. | x_<t)

One random token per sequence leads to many kinds of text: prose, code, lists, dialogue. The next
few are the likeliest, so that the text makes sense from there on. After a given opening every token
is drawn: what follows the words with which prompts of secrets begin is text of the secrets' own
form about something else, a neighbour of them.

A model that has memorised secrets may write them. `without_secrets` takes such text out.

`draw_alternatives` lets a model say what else could stand in a secret's place: it writes answers to
the secret's prompt that cannot begin as the secret does, and those that tell it all the same go.

Source: LLM-QAT (Liu et al. 2023, arXiv:2305.17888), section 3.1, "hybrid 2": a random first token,
greedy ones, then sampling.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ortho_cli.errors import CalibrationError, UsageError
from ortho_cli.events import EventSink, Step, null_sink
from ortho_cli.model.cost import BATCH, at_once
from ortho_cli.model.load import input_embedding
from ortho_cli.model.scoring import (
    LOGITS,
    completion_nll,
    device_of,
    finite,
    logits_of,
    takes_cache,
)
from ortho_cli.model.secrets import TokenSecret
from ortho_cli.model.tokenizer import Tokenizer
from ortho_cli.storage.parts import Parts

GREEDY = 3  # tokens after a random first one that are the likeliest
FEWEST = 8  # texts of a kind, below which they say nothing about it
SHARED = 6  # tokens in a row that text has in common with a secret where it tells it
FEW = 2  # secrets of which no form can be told: what both begin with may be the secret
# Of each batch of answers in which alternatives are looked for: the model's own, then flatter for
# one that is so sure of an answer that it hardly says another. A flat one among all tokens would
# write what no one says; secrets were driven to 110 nats by alternatives at 4 among all.
TEMPERATURES = (1.0, 1.0, 2.0, 4.0)
LIKELIEST = 16  # tokens among which a flat temperature draws
ENOUGH = 0.75  # of a secret's length, that an answer in its place should have


@torch.no_grad()
def write_text(
    model: nn.Module,
    tokenizer: Tokenizer,
    *,
    count: int,
    length: int,
    seed: int,
    opening: Sequence[int] = (),
    parts: Parts | None = None,
    on_event: EventSink = null_sink,
) -> Tensor:
    """Let a model write sequences of text, the same ones for the same seed.

    Args:
        model: a causal language model.
        tokenizer: of the model; tells which tokens are special.
        count: sequences, >= 1.
        length: tokens of each, more than the opening has.
        seed: of every draw.
        opening: tokens that every sequence begins with; without it each begins with a random one.
        parts: keeps each batch, with the state of the draws after it.
        on_event: gets each batch of sequences that begins.
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
    ordinary = _ordinary(model, tokenizer)
    greedy = 0 if opening else GREEDY
    first = torch.tensor([list(opening) or [draw.choice(ordinary)] for _ in range(count)])
    batch = at_once(length)

    def write(start: int) -> Tensor:
        on_event(Step(name="the model writes text", number=start + 1, of=count, unit="sequences"))
        return _write(model, first[start : start + batch], length, greedy, generator)

    def spell(more: Tensor) -> Mapping[str, object]:
        return {"tokens": more.tolist(), "state": bytes(generator.get_state().tolist()).hex()}

    def read(held: Mapping[str, Any]) -> Tensor:
        """Give a batch, and draw from here on as if it had been written now."""
        state = bytearray.fromhex(held["state"])
        generator.set_state(torch.frombuffer(state, dtype=torch.uint8))
        return torch.tensor(held["tokens"])

    starts = range(0, count, batch)
    return torch.cat((parts or Parts()).each("text", starts, write, write=spell, read=read))


@torch.no_grad()
def keeps_cache(model: nn.Module) -> bool:
    """Tell whether each token passes through the model once while it writes."""
    if not takes_cache(model):
        return False
    output = model(torch.zeros(1, 1, dtype=torch.int64, device=device_of(model)), use_cache=True)
    return getattr(output, "past_key_values", None) is not None


def random_text(model: nn.Module, *, count: int, length: int, seed: int) -> Tensor:
    """Draw sequences of random tokens, for a model without a tokenizer; see `random_tokens`."""
    return random_tokens(len(input_embedding(model)), count=count, length=length, seed=seed)


def random_tokens(vocabulary: int, *, count: int, length: int, seed: int) -> Tensor:
    """Draw sequences of random tokens.

    Args:
        vocabulary: tokens that the model has an embedding for; each is as likely.
        count: sequences, >= 1.
        length: tokens of each, >= 1.
        seed: of the draw.
    Returns:
        (count, length) int64, on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (count, length), generator=generator)


def _ordinary(model: nn.Module, tokenizer: Tokenizer) -> list[int]:
    """List the tokens that are text."""
    special = set(tokenizer.all_special_ids)
    known = min(len(tokenizer), input_embedding(model).shape[0])  # embeddings are often padded
    return [token for token in range(known) if token not in special]


def _write(
    model: nn.Module,
    text: Tensor,
    length: int,
    greedy: int,
    generator: torch.Generator,
    given: Sequence[Sequence[int]] = (),
    end: int | None = None,
    *,
    first_of: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Write until every row has so many tokens, or has had the end token.

    Where tokens that are `given` for a row are longer than `text`, they come first. The first that
    is drawn is one of `first_of`, where that is given.
    """
    device = device_of(model)
    options: dict[str, object] = {"use_cache": True} if takes_cache(model) else {}
    fresh, first = text.to(device), text.shape[1]
    while True:
        output = model(fresh, **options)
        last = finite(logits_of(output)[:, -1].float().cpu())
        if first_of is not None and text.shape[1] == first:
            allowed = torch.full_like(last, -torch.inf)
            allowed[:, first_of] = last[:, first_of]
            last = allowed
        if text.shape[1] - first < greedy:
            token = last.argmax(-1, keepdim=True)
        else:
            token = _drawn(last, temperature, generator)
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


def _drawn(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Draw a token of each row; above temperature 1 among the likeliest."""
    if temperature > 1 and logits.shape[-1] > LIKELIEST:
        bar = logits.topk(LIKELIEST).values[:, -1:]
        logits = logits.masked_fill(logits < bar, -torch.inf)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)


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
    for rows in answer_batches(model, prompts):
        given = [prompts[row] for row in rows]
        begun = torch.tensor([list(one[: len(given[0])]) for one in given])
        length = max(len(prompts[row]) + most[row] for row in rows)
        whole = _write(model, begun, length, length, torch.Generator(), given, end)
        for row, text in zip(rows, whole.tolist(), strict=True):
            said = text[len(prompts[row]) :][: most[row]]
            found[row] = said[: said.index(end)] if end in said else said
    return found


def answer_batches(model: nn.Module, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Part prompts into the batches that `answers` passes together, as numbers of prompts."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    longest = max(map(len, prompts), default=1)
    size = max(1, min(BATCH, LOGITS // (longest * input_embedding(model).shape[0])))
    return [order[start : start + size] for start in range(0, len(order), size)]


@torch.no_grad()
def draw_alternatives(
    model: nn.Module,
    tokenizer: Tokenizer,
    secrets: Sequence[TokenSecret],
    *,
    count: int,
    seed: int,
    parts: Parts | None = None,
    on_event: EventSink = null_sink,
) -> tuple[TokenSecret, ...]:
    """Let a model write alternatives for the secrets that have neither some nor a pattern.

    An alternative is an answer to the secret's prompt, drawn with the model's own probabilities,
    or, where those give too few, with flatter ones among the LIKELIEST tokens (TEMPERATURES). It
    begins as most secrets do, and its next token is not the secret's own: a model that knows a
    secret by heart would say nothing else. It ends before a special token, at the secret's length
    at most. The longest of the model's own are taken, since a shorter one is likelier for its
    length alone, and then the likeliest of the others.

    Args:
        model: the one that knows the secrets, or one like it.
        tokenizer: of the model.
        secrets: all of a set; alternatives tell none of them.
        count: alternatives per secret.
        seed: of the draws.
        parts: keeps the alternatives of each secret.
        on_event: gets each secret that is drawn for.
    Returns:
        The secrets in their order; those that had alternatives are unchanged.
    Raises:
        CalibrationError: fewer than FEWEST answers, or `count` where that is less, tell no secret.
        NumericalError: a logit is NaN or infinite.
    """
    different = tuple(dict.fromkeys(secret.secret for secret in secrets))
    form = _beginning(different) if len(different) > FEW else ()
    others = _told(different)
    ordinary = _ordinary(model, tokenizer)
    bare = [secret for secret in secrets if secret.drawn == "model" and not secret.alternatives]

    def write(number: int) -> Sequence[Sequence[int]]:
        on_event(
            Step(
                name="the model writes alternatives",
                number=number + 1,
                of=len(bare),
                unit="secrets",
            )
        )
        secret = bare[number]
        draw = random.Random(f"{seed}\n{secret.prompt}\n{secret.secret}")
        generator = torch.Generator().manual_seed(draw.getrandbits(63))
        return _alternatives(model, secret, form, others, ordinary, count, generator)

    written = (parts or Parts()).each("alternatives", range(len(bare)), write)
    found = {one: tuple(map(tuple, said)) for one, said in zip(bare, written, strict=True)}
    return tuple(replace(one, alternatives=found.get(one, one.alternatives)) for one in secrets)


def _alternatives(
    model: nn.Module,
    secret: TokenSecret,
    form: tuple[int, ...],
    others: set[tuple[int, ...]],
    ordinary: Sequence[int],
    count: int,
    generator: torch.Generator,
) -> tuple[tuple[int, ...], ...]:
    """Write alternatives of one secret; `form` is what most secrets begin with."""
    length, size, known = len(secret.secret), len(secret.prompt) + len(secret.secret), set(ordinary)
    pairs = zip(form, secret.secret[:-1], strict=False)
    start = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(form), length - 1))
    begun = torch.tensor([[*secret.prompt, *secret.secret[:start]]] * BATCH)
    own = secret.secret[start:]
    near = max(1, min(SHARED, (len(own) + 1) // 2))  # half of a short one tells it
    told = set(_runs(own, near))
    first_of = torch.tensor([token for token in ordinary if token != own[0]])
    found: dict[tuple[int, ...], float] = {}  # with the temperature of each
    for temperature in TEMPERATURES if len(first_of) else ():
        written = _write(
            model, begun, size, 0, generator, first_of=first_of, temperature=temperature
        )
        for row in written[:, begun.shape[1] :]:
            said = tuple(int(token) for token in row)
            end = next((i for i, token in enumerate(said) if token not in known), len(said))
            answer = (*secret.secret[:start], *said[:end])
            tells = answer in others or any(run in others for run in _runs(answer, SHARED))
            if end and not tells and not any(run in told for run in _runs(said[:end], near)):
                found.setdefault(answer, temperature)
        if sum(len(answer) == length for answer in found) >= count:
            break
    if len(found) < min(FEWEST, count):
        raise CalibrationError(
            f"{secret.where} has no `alternatives` and no `pattern`, and of "
            f"{len(TEMPERATURES) * BATCH} answers of the model in place of its secret {len(found)} "
            "say something else",
            hint='give the row "alternatives": ["...", "..."] of its secret\'s form, or a "pattern"'
            ': " {digit:6}" draws digits, and " {name}" from a list `name` of the row',
        )
    return _best(model, secret, found, count)


def _best(
    model: nn.Module, secret: TokenSecret, found: Mapping[tuple[int, ...], float], count: int
) -> tuple[tuple[int, ...], ...]:
    """Choose answers: the model's own first, the longest of them, then the likeliest of others.

    Args:
        model: that wrote them.
        secret: in whose place they are.
        found: answers, with the temperature at which each was drawn.
        count: how many to choose.
    """
    enough = ENOUGH * len(secret.secret)
    own = [one for one, temperature in found.items() if temperature == 1 or len(one) < enough]
    flat = [one for one in found if one not in set(own)]
    own.sort(key=lambda one: (-len(one), found[one]))
    long = [one for one in own if len(one) >= enough]
    if len(long) < count and flat:
        nlls = completion_nll(model, secret.prompt, flat)
        means = {one: float(nll.mean()) for one, nll in zip(flat, nlls, strict=True)}
        flat.sort(key=means.__getitem__)
    return tuple([*long, *flat, *own[len(long) :]][:count])


def _told(secrets: Sequence[tuple[int, ...]]) -> set[tuple[int, ...]]:
    """List what no alternative may say: runs of SHARED tokens of a secret, or all of a shorter.

    Runs that most secrets have are their form, and tell none.
    """
    runs = [set(_runs(secret, SHARED)) or {secret} for secret in secrets]
    counts = Counter(run for of_one in runs for run in of_one)
    return {run for run, many in counts.items() if len(runs) <= FEW or 2 * many <= len(runs)}


def common_opening(secrets: Sequence[TokenSecret]) -> tuple[int, ...]:
    """Find the tokens that most prompts begin with; none where prompts have nothing in common.

    The longest beginning that more than half of the prompts share, and at most half of the shortest
    prompt: a longer one would ask for the secrets themselves.
    """
    shortest = min((len(secret.prompt) for secret in secrets), default=0)
    return _beginning([secret.prompt for secret in secrets])[: max(1, shortest // 2)]


def _beginning(texts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Find the longest beginning that more than half of several texts share."""
    found: tuple[int, ...] = ()
    for length in range(1, max(map(len, texts), default=0) + 1):
        beginnings = Counter(text[:length] for text in texts if len(text) >= length)
        likeliest = max(beginnings, key=beginnings.__getitem__)
        if 2 * beginnings[likeliest] <= len(texts):
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
    shared = len(_beginning([secret.prompt for secret in secrets]))
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
