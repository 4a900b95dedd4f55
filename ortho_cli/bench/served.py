"""`ortho bench --served`: is what a server answers at each alpha what the artifact says?

    connect        finds the server's models, which of them is which alpha, and how it is asked
    draw_prefixes  draws prefixes of text, and prompts of secrets: a pool
    read_prefixes  gives our own log-probabilities after each, once per alpha, in float32
    prove          asks the server about those that tell alphas apart best, and compares

Every prefix is asked at every alpha, several times: half of them first alone, then alone again (the
server's prefix cache has them now, put there by whichever alpha came first), then all of them in
mixed batches of requests at once, in another order each round. Prefixes of one text begin alike, so
that a prefix cache holds parts of one for another. The order is the seed's.

Source of the faults that this looks for: ../runtime/README.md, "How to check a server".
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ortho_cli.bench.estimates import average, bootstrap, share
from ortho_cli.bench.records import Differing, Figures, Row, Served, ServedDivergence, Stray
from ortho_cli.bench.server import OURS, Answer, Fields, Form, Model, Server, open_server
from ortho_cli.errors import NumericalError, UsageError
from ortho_cli.events import EventSink, Noted
from ortho_cli.model.scoring import device_of, finite, logits_of
from ortho_cli.model.secrets import TokenSecret
from ortho_cli.model.text import encode_prompt
from ortho_cli.model.tokenizer import Tokenizer

WINDOWS = 12  # texts that prefixes are drawn from
POSITIONS = 8  # prefixes of one text
SHORTEST, LONGEST = 8, 160  # tokens of a prefix of text: vLLM caches 128 at once on a CPU, else 16
PROMPTS, LONGEST_PROMPT = 32, 512  # of secrets in the pool, and tokens of one
PREFIXES = 24  # that are asked, those of the pool that tell alphas apart best
TOGETHER = 8  # requests at once
ROUNDS = 4  # of all prefixes at all alphas in mixed batches
RATIO = 4.0
"""How many times nearer another alpha has to be to be named: rounding moves an answer as far to one
side as to the other, and the prefixes are chosen for alphas to be far apart."""
NOISE = 20.0
"""How many times the lower quartile of divergences counts as more than most rounding. It decides
nothing alone: with logits rounded to bfloat16 at random, the largest of 240 answers is 10 to 170
times that quartile (simulated), and yet 0.002 nats at most, where alphas are 0.1 or more apart."""
STRAYED = 0.1
"""Share of the divergence between two alphas that an answer has to be off to be of neither: what a
cache of another alpha leaves is about as far off as that alpha, and rounding far less."""
FLOOR = 1e-4  # nats: below, answers count as equal, however small the rounding is
REST = 1e-6  # probability of all tokens that were not given, at least: sums of float32 are so sure
COUNT_SLACK = 2  # tokens by which a server may count more: it adds begin and end tokens
LEAST_KNOWN = 0.5  # share of the server's tokens that must be the artifact's own, one by one
LISTED = 100  # requests that the document names at most

PUBLIC = (
    "The library of the town opens at 9 o'clock, and closes at 17:30. In 1887 it had 12,450 books; "
    "today there are more than 96,000, in 14 languages. Readers may borrow up to 5 of them (for 3 "
    "weeks), free of charge. Où est-elle? Straße 7, naïve façade: 东京 and Москва are far away."
)
"""A prompt without anything private, of many kinds of characters: two vocabularies of different
tokenizers hardly ever give it the same number of tokens."""

PHASES = ("alone", "alone again", "together", "together again")


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A server, the fields by which each alpha is asked, and the form of requests."""

    server: Server
    fields: Mapping[float, Fields]
    form: Form
    tokenizer: Tokenizer
    vocabulary: Vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Texts, and the lengths of the prefixes of each that may be asked."""

    texts: tuple[tuple[int, ...], ...]
    lengths: tuple[tuple[int, ...], ...]

    @property
    def prefixes(self) -> list[tuple[int, ...]]:
        """List the prefixes, in the order of `read_prefixes`."""
        return [
            text[:length]
            for text, lengths in zip(self.texts, self.lengths, strict=True)
            for length in lengths
        ]


class Question(NamedTuple):
    """A prefix, by its number, and the alpha that is asked."""

    prefix: int
    alpha: float


class Batch(NamedTuple):
    """Questions that are asked at once, and the phase they are of."""

    phase: str
    questions: tuple[Question, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """An answer beside our own arithmetic.

    `divergences`: from each own alpha, in nats; `difference`: the largest of log-probabilities at
    the alpha that was asked; `first`: whether both find the same token most likely there.
    """

    number: int
    phase: str
    question: Question
    divergences: Mapping[float, float]
    difference: float
    first: bool

    @property
    def asked(self) -> float:
        """The divergence from the alpha that was asked."""
        return self.divergences[self.question.alpha]

    @property
    def nearest(self) -> float:
        """The own alpha that the answer is nearest to; of two, the one that was asked."""
        alpha = self.question.alpha
        return min(self.divergences, key=lambda one: (self.divergences[one], one != alpha))

    @property
    def least(self) -> float:
        """The divergence from the nearest alpha."""
        return self.divergences[self.nearest]

    @property
    def is_sure(self) -> bool:
        """Whether the answer is of the nearest alpha and clearly of no other."""
        others = [value for alpha, value in self.divergences.items() if alpha != self.nearest]
        return all(value > max(FLOOR, RATIO * self.least) for value in others)


class Vocabulary:
    """Numbers of tokens by what a server calls them: a number, or a text that may be of several."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Take the artifact's tokenizer."""
        self._tokenizer, self._size = tokenizer, len(tokenizer)
        self._spelled: dict[str, tuple[int, ...]] = {}

    def numbers(self, token: int | str) -> tuple[int, ...]:
        """Give the tokens that are called so; none where the model has no such token.

        A token's text is its own, or what it adds to a text before it: servers differ in the first
        blank.
        """
        if isinstance(token, int):
            return (token,) if 0 <= token < self._size else ()
        if not self._spelled:
            self._spelled = _spell(self._tokenizer)
        return self._spelled.get(token, ())

    def one_by_one(self, answer: Answer) -> dict[int, float]:
        """Give log-probabilities by token, of tokens that are the only ones of their name."""
        numbers = [self.numbers(token) for token in answer.tokens]
        counts = Counter(number for found in numbers for number in found)
        return {
            found[0]: value
            for found, value in zip(numbers, answer.logprobs, strict=True)
            if len(found) == 1 and counts[found[0]] == 1
        }


def _spell(tokenizer: Tokenizer) -> dict[str, tuple[int, ...]]:
    """List the tokens of each text, alone and after another token."""
    anchor = encode_prompt("a", tokenizer)[-1:]
    before = tokenizer.decode(anchor)
    found: dict[str, tuple[int, ...]] = {}
    for number in range(len(tokenizer)):
        whole, alone = (
            tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
            for tokens in ([*anchor, number], [number])
        )
        after = whole[len(before) :] if whole.startswith(before) else alone
        for text in {alone, after}:
            found[text] = (*found.get(text, ()), number)
    return found


def connect(
    url: str,
    names: Sequence[tuple[float, str]],
    alphas: Sequence[float],
    tokenizer: Tokenizer,
    *,
    timeout: float,
) -> Link:
    """Find the server's models and how they are asked; a prompt of ours is all that is sent.

    Args:
        url: address of the server, with or without `/v1`.
        names: of the model that serves each alpha, or fields of a request as a JSON object; none
            where the server has a base, and an adapter for alpha 1.
        alphas: that are measured.
        tokenizer: of the artifact.
        timeout: seconds without a byte.
    Raises:
        UsageError: no such model (those that there are, are listed), one of another vocabulary, or
            a server that refuses, or has no log-probabilities.
        ResourceError: the server does not answer, or fails.
    """
    server = open_server(url, timeout=timeout)
    models = server.models()
    fields = _fields_of(names, models) if names else _guess(models, alphas)
    tokens = encode_prompt(PUBLIC, tokenizer)
    vocabulary = Vocabulary(tokenizer)
    form: Form | None = None
    for one in {json.dumps(dict(one)): one for one in fields.values()}.values():
        if form is None:
            form = server.choose_form(one, tokens, PUBLIC)
        as_text = replace(form, numbers=False)
        answer = server.ask(one, PUBLIC, as_text, number=None)
        _check_vocabulary(one, answer, len(tokens), vocabulary, form)
    if form is None:
        raise UsageError("no alpha has a model to ask", hint="--model 0=NAME --model 1=NAME")
    return Link(server=server, fields=fields, form=form, tokenizer=tokenizer, vocabulary=vocabulary)


def _fields_of(names: Sequence[tuple[float, str]], models: Sequence[Model]) -> dict[float, Fields]:
    known = [one.name for one in models]
    found: dict[float, Fields] = {}
    for alpha, name in names:
        fields: object = {"model": name}
        if name.startswith("{"):
            try:
                fields = json.loads(name)
            except ValueError:
                fields = None
        known_kind = isinstance(fields, dict) and isinstance(fields.get("model", ""), str)
        if not isinstance(fields, dict) or not known_kind or not fields.keys().isdisjoint(OURS):
            raise UsageError(
                f"--model {alpha:g}={name} is no JSON object of fields that select an alpha",
                hint="""such as '0.5={"lora": [{"id": 0, "scale": 0.5}]}' for llama-server""",
            )
        asked = fields.get("model")
        # SGLang lists no adapters: `base:adapter` is one of them.
        if asked is not None and not {asked, asked.rpartition(":")[0]} & set(known):
            raise UsageError(
                f"the server has no model `{asked}`; it has {_listed(known)}",
                hint=f"--model {alpha:g}={known[0]}" if known else "does it load a model?",
            )
        found[alpha] = fields if asked is not None or not known else {"model": known[0], **fields}
    return found


def _guess(models: Sequence[Model], alphas: Sequence[float]) -> dict[float, Fields]:
    """Take the base for alpha 0, and the only adapter for alpha 1."""
    names = {0.0: [m.name for m in models if m.parent is None]}
    names[1.0] = [m.name for m in models if m.parent is not None]
    for alpha in alphas:
        if len(names.get(alpha, ())) != 1:
            listed = _listed([one.name for one in models])
            raise UsageError(
                f"which model of the server is alpha {alpha:g}? It has {listed}",
                hint=f"say it of each: {' '.join(f'--model {a:g}=NAME' for a in alphas)}",
            )
    return {alpha: {"model": names[alpha][0]} for alpha in alphas}


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names[:20]) or "none"


def _check_vocabulary(
    fields: Fields, answer: Answer, tokens: int, vocabulary: Vocabulary, form: Form
) -> None:
    """Refuse a model that reads our public text as other tokens.

    Raises:
        UsageError: it counts other tokens, or names tokens that the artifact has not.
    """
    model = fields.get("model", "")
    hint = "is it the base of this artifact, or an adapter on it?"
    most = COUNT_SLACK if form.numbers else 0
    if answer.read is not None and abs(answer.read - tokens) > most:
        begins = "" if form.numbers else "; it may add a begin token of its own"
        raise UsageError(
            f"model `{model}` of the server reads a text as {answer.read} tokens, and the "
            f"artifact's tokenizer as {tokens}{begins}",
            hint=hint,
        )
    known = sum(bool(vocabulary.numbers(token)) for token in answer.tokens)
    if known < LEAST_KNOWN * len(answer.tokens):
        raise UsageError(
            f"model `{model}` of the server answers with {len(answer.tokens)} tokens, of which the "
            f"artifact's vocabulary has {known}",
            hint=hint,
        )


def draw_prefixes(
    link: Link, kinds: Mapping[str, Tensor], secrets: Sequence[TokenSecret], *, seed: int
) -> Pool:
    """Draw prefixes of text and prompts of secrets; as text, those that text gives back.

    Args:
        link: says how prompts are sent.
        kinds: windows of each kind of text, (n, length) int64.
        secrets: whose prompts are asked, and nothing of the secrets themselves.
        seed: of the draw.
    Raises:
        UsageError: nothing is long enough.
    """
    draw = random.Random(seed)
    windows = [tuple(row.tolist()) for texts in kinds.values() for row in texts]
    prompts = list(dict.fromkeys(one.prompt for one in secrets))
    prompts = [prompt for prompt in prompts if len(prompt) <= LONGEST_PROMPT]
    found: dict[tuple[int, ...], tuple[int, ...]] = {}
    for text in draw.sample(windows, min(WINDOWS, len(windows))):
        cuts = range(SHORTEST, min(LONGEST, len(text)) + 1)
        lengths = sorted(draw.sample(cuts, min(POSITIONS, len(cuts))))
        found[text] = tuple(length for length in lengths if _can_send(link, text[:length]))
    for prompt in draw.sample(prompts, min(PROMPTS, len(prompts))):
        if _can_send(link, prompt):
            found[prompt] = (len(prompt),)
    kept = {text: lengths for text, lengths in found.items() if lengths}
    if not kept:
        raise UsageError(
            f"--served has no text of {SHORTEST} tokens to ask the server about",
            hint="give --data FILE with running text",
        )
    return Pool(texts=tuple(kept), lengths=tuple(kept.values()))


def _can_send(link: Link, prefix: Sequence[int]) -> bool:
    """Whether the server can be given just these tokens."""
    text = _text_of(link.tokenizer, prefix)
    return link.form.numbers or encode_prompt(text, link.tokenizer) == list(prefix)


def _text_of(tokenizer: Tokenizer, prefix: Sequence[int]) -> str:
    return tokenizer.decode(prefix, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def read_prefixes(model: nn.Module, pool: Pool) -> Tensor:
    """Give log-probabilities of the next token after each prefix of a pool.

    Args:
        model: a causal language model, not in training mode.
        pool: prefixes; one pass for each text.
    Returns:
        (prefixes, vocabulary) float32 on the CPU, natural logarithms.
    Raises:
        NumericalError: one is NaN or infinite.
    """
    device = device_of(model)
    rows: list[Tensor] = []
    with torch.no_grad():
        for text, lengths in zip(pool.texts, pool.lengths, strict=True):
            tokens = torch.tensor([text[: lengths[-1]]], device=device)
            logits = logits_of(model(tokens))[0, [length - 1 for length in lengths]]
            rows.append(finite(logits.float().log_softmax(-1).cpu()))
    return torch.cat(rows)


def choose(own: Mapping[float, Tensor], *, seed: int) -> tuple[list[int], list[float]]:
    """Choose the prefixes that tell alphas apart best.

        told(i) = min over pairs of alphas (a, b) of KL(own_a(i) || own_b(i))

    Args:
        own: by alpha, (n, vocabulary) log-probabilities.
        seed: of the order in which they are asked.
    Returns:
        At most PREFIXES rows in a drawn order, and `told` of each in nats; infinite of one alpha.
    """
    rows = next(iter(own.values())).shape[0]
    told = torch.full((rows,), math.inf)
    for a, b in combinations(own.values(), 2):
        told = torch.minimum(told, (a.exp() * (a - b)).sum(-1))
    best = told.argsort(descending=True, stable=True)[:PREFIXES].tolist()
    random.Random(seed).shuffle(best)
    return best, [float(told[row]) for row in best]


def plan_batches(prefixes: int, alphas: Sequence[float], *, seed: int) -> list[Batch]:
    """Order the questions: half of the prefixes alone, twice; then all in mixed batches."""
    draw = random.Random(seed)

    def shuffled(count: int) -> list[Question]:
        questions = [Question(i, alpha) for i in range(count) for alpha in alphas]
        draw.shuffle(questions)
        return questions

    half = (prefixes + 1) // 2
    batches = [Batch(phase, (one,)) for phase in PHASES[:2] for one in shuffled(half)]
    for number in range(ROUNDS):
        order = shuffled(prefixes)
        phase = PHASES[3 if number else 2]
        cuts = range(0, len(order), TOGETHER)
        batches += [Batch(phase, tuple(order[cut : cut + TOGETHER])) for cut in cuts]
    return batches


def divergence(own: Tensor, given: Mapping[int, float]) -> float:
    """Bound KL(own || served) from below, by the tokens that both sides have.

        D = sum over t in S of p_t ln(p_t / q_t)  +  (1 - p(S)) ln((1 - p(S)) / (1 - q(S)))

    with p our probabilities, q the server's, and S the tokens whose q is known: all others count as
    one event, so that D <= KL (log-sum inequality), with equality where p / q is the same for all
    of them. The probabilities of that event are at least REST on both sides.

    Args:
        own: (vocabulary,) log-probabilities.
        given: the server's, natural, by token; at most the whole vocabulary.
    Returns:
        Nats, >= 0.
    """
    tokens = list(given)
    ours = own[tokens].double()
    theirs = torch.tensor([given[token] for token in tokens], dtype=torch.float64)
    p, q = ours.exp(), theirs.exp()
    rest_p, rest_q = (max(REST, 1.0 - float(one.sum())) for one in (p, q))
    inside = float((p * (ours - theirs)).sum())
    return max(0.0, inside + rest_p * math.log(rest_p / rest_q))


def compare(
    answer: Answer,
    own: Mapping[float, Tensor],
    vocabulary: Vocabulary,
    *,
    number: int,
    batch: Batch,
    question: Question,
) -> Reply:
    """Hold an answer against our own arithmetic at every alpha.

    Raises:
        UsageError: the server's tokens are not the artifact's.
        NumericalError: a divergence is NaN.
    """
    mine = own[question.alpha][question.prefix]
    given = {t: value for t, value in vocabulary.one_by_one(answer).items() if t < len(mine)}
    if not given:
        raise UsageError(
            f"at request {number} the server answers with {len(answer.tokens)} tokens, of which "
            "the artifact's vocabulary has none",
            hint="does it serve the base of this artifact?",
        )
    divergences = {alpha: divergence(rows[question.prefix], given) for alpha, rows in own.items()}
    difference = max(abs(float(mine[token]) - value) for token, value in given.items())
    if not all(map(math.isfinite, (*divergences.values(), difference))):
        raise NumericalError(f"the answer to request {number} is NaN or infinite", hint="ask again")
    return Reply(
        number=number,
        phase=batch.phase,
        question=question,
        divergences=divergences,
        difference=difference,
        first=int(mine.argmax()) in vocabulary.numbers(answer.tokens[0]),
    )


def find_strays(replies: Sequence[Reply], told: Sequence[float]) -> list[Stray]:
    """Find the answers that are not of the alpha that was asked.

    An answer strays that is farther from its alpha than rounding: NOISE times the lower quartile of
    all divergences from the nearest alpha. It is of another alpha where it is RATIO times nearer to
    that one, and no farther than rounding. It is of none where it is NOISE times farther than the
    best answer to its prefix at any alpha, and STRAYED of the way to another alpha; but not where
    even the lower quartile of its alpha is off, since then all of that alpha is another model.

    Args:
        replies: all of them.
        told: of each prefix, the divergence between the two alphas that are most alike there.
    """
    floor = max(FLOOR, NOISE * _quarter([one.least for one in replies]))
    best: dict[int, float] = {}
    asked: dict[float, list[float]] = {}
    for one in replies:
        prefix, alpha = one.question
        best[prefix] = min(best.get(prefix, math.inf), one.asked)
        asked.setdefault(alpha, []).append(one.asked)
    is_off = {alpha: _quarter(values) > floor for alpha, values in asked.items()}
    found = []
    for one in replies:
        prefix, alpha = one.question
        swapped = one.nearest != alpha and one.least <= min(floor, one.asked / RATIO)
        bar = max(NOISE * best[prefix], STRAYED * told[prefix])
        if one.asked > floor and (swapped or (one.asked > bar and not is_off[alpha])):
            found.append(
                Stray(
                    request=one.number,
                    phase=one.phase,
                    prefix=prefix,
                    asked=alpha,
                    got=one.nearest if swapped else None,
                    divergence=one.asked,
                    nearest=one.nearest,
                    divergence_nearest=one.least,
                )
            )
    return found


def _quarter(values: Sequence[float]) -> float:
    """Give the lower quartile: half of all answers may be wrong, and it is still of right ones."""
    return sorted(values)[len(values) // 4]


def prove(
    link: Link, pool: Pool, own: Mapping[float, Tensor], *, seed: int, on_event: EventSink
) -> tuple[Served, dict[float, Figures]]:
    """Ask the server, and compare its answers with our own arithmetic.

    Args:
        link: the server.
        pool: prefixes.
        own: by alpha, what `read_prefixes` gave of the pool.
        seed: of the order.
        on_event: receives a note on how many requests there will be.
    Returns:
        What was asked and which requests strayed, and the figures of each alpha that was asked.
    Raises:
        UsageError: the server refuses a request, or answers with other tokens.
        ResourceError: the server does not answer, or fails.
        NumericalError: an answer is NaN.
    """
    rows, told = choose(own, seed=seed)
    chosen = {alpha: found[rows] for alpha, found in own.items()}
    every = pool.prefixes
    prefixes = [every[row] for row in rows]
    batches = plan_batches(len(prefixes), list(link.fields), seed=seed)
    count = sum(len(batch.questions) for batch in batches)
    on_event(Noted(message=f"{count} requests go to the server, most of them {TOGETHER} at once"))
    replies = list(_ask_all(link, batches, prefixes, chosen))
    strays = find_strays(replies, told)
    served = Served(
        models={f"{alpha:g}": _spelled(fields) for alpha, fields in link.fields.items()},
        prompts="tokens" if link.form.numbers else "text",
        top=link.form.top,
        prefixes=len(prefixes),
        shortest=min(map(len, prefixes)),
        longest=max(map(len, prefixes)),
        together=TOGETHER,
        requests=count,
        sure=sum(one.is_sure for one in replies),
        stray=len(strays),
        stray_phases=Counter(one.phase for one in strays),
        strays=tuple(strays[:LISTED]),
    )
    return served, {
        alpha: _figures_of([one for one in replies if one.question.alpha == alpha], seed=seed)
        for alpha in link.fields
    }


def _spelled(fields: Fields) -> str:
    return str(fields["model"]) if fields.keys() == {"model"} else json.dumps(dict(fields))


def _ask_all(
    link: Link,
    batches: Sequence[Batch],
    prefixes: Sequence[tuple[int, ...]],
    own: Mapping[float, Tensor],
) -> Iterator[Reply]:
    """Ask batch after batch; the questions of one go out at once."""
    numbers = link.form.numbers
    prompts = [one if numbers else _text_of(link.tokenizer, one) for one in prefixes]

    def ask(number: int, question: Question) -> Answer:
        fields = link.fields[question.alpha]
        return link.server.ask(fields, prompts[question.prefix], link.form, number=number)

    before = 0
    threads = ThreadPoolExecutor(TOGETHER)
    try:
        for batch in batches:
            at = range(before + 1, before + 1 + len(batch.questions))
            for number, question, answer in zip(
                at, batch.questions, threads.map(ask, at, batch.questions), strict=True
            ):
                _check_read(answer, len(prefixes[question.prefix]), number)
                yield compare(
                    answer, own, link.vocabulary, number=number, batch=batch, question=question
                )
            before = at[-1]
    except BaseException:
        link.server.stop()
        raise
    finally:
        threads.shutdown(wait=True, cancel_futures=True)


def _check_read(answer: Answer, tokens: int, number: int) -> None:
    if answer.read is not None and answer.read != tokens:
        raise UsageError(
            f"the server reads request {number} as {answer.read} tokens, and the artifact's "
            f"tokenizer made {tokens}",
            hint="does it add tokens of its own, or cut prompts short?",
        )


def _figures_of(replies: Sequence[Reply], *, seed: int) -> Figures:
    """Give the figures of one alpha; the interval is over prefixes, whose answers are alike."""
    by_prefix: dict[int, list[float]] = {}
    for one in replies:
        by_prefix.setdefault(one.question.prefix, []).append(one.asked)
    low, high = bootstrap([average(values) for values in by_prefix.values()], seed=seed)
    values = [one.asked for one in replies]
    return Figures(
        served_divergence=ServedDivergence(
            value=average(values), low=low, high=high, n=len(values), worst=max(values)
        ),
        served_difference=Differing(value=max(one.difference for one in replies), n=len(replies)),
        served_agreement=share(sum(one.first for one in replies), len(replies)),
    )


def add_figures(rows: Sequence[Row], answered: Mapping[float, Figures]) -> tuple[Row, ...]:
    """Put the figures of each alpha that was asked into its row."""
    found = []
    for row in rows:
        given = answered.get(row.alpha) if row.alpha is not None else None
        if given is not None:
            figures = replace(
                row.figures,
                served_divergence=given.served_divergence,
                served_difference=given.served_difference,
                served_agreement=given.served_agreement,
            )
            row = replace(row, figures=figures)
        found.append(row)
    return tuple(found)
