"""`ortho bench --prompt`: what each alpha says after the same words, and where they part.

Every alpha continues the prompt one token at a time, with a cache of its own, beside the others: up
to the first token in which they differ they have read the same text, so there the probabilities
that each gives to both tokens can be compared. Probabilities are the model's own, at temperature 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ortho_cli.errors import UsageError
from ortho_cli.formats.open_artifact import no_ortho, open_artifact
from ortho_cli.model import load as models
from ortho_cli.model import scoring
from ortho_cli.model.text import encode_prompt
from ortho_cli.model.tokenizer import Tokenizer
from ortho_cli.runtime.engine import at_alpha
from ortho_cli.runtime.pretrained import load
from ortho_cli.storage.sealing import read_keys

TOKENS = 32  # that follow a prompt at most, unless the user says
COLDEST = 1e-30  # a temperature at which any two logits that differ are as good as at 0
INCOMPLETE = "\ufffd"  # ends a text whose last character lacks bytes, which the next token brings


@dataclass(frozen=True, slots=True, kw_only=True)
class Speech:
    """What is continued, and how."""

    artifact: Path
    prompts: tuple[str, ...]
    alphas: tuple[float, ...] = (0.0, 1.0)
    tokens: int = TOKENS  # new ones at most
    temperature: float = 0.0  # 0 is greedy
    seed: int = 0
    identity: Path | None = None
    device: str = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """A token that was said; its text is empty while a character lacks bytes."""

    id: int
    text: str
    probability: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuation:
    """What one alpha says."""

    alpha: float
    text: str = ""
    tokens: tuple[Token, ...] = ()
    ended: bool = False  # by the end token, which is not among `tokens`


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A token that some alpha chose where they part, and its probability at every alpha."""

    id: int
    text: str  # of the end token, its name
    probabilities: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The first token that is not the same at every alpha, counted from 0."""

    token: int
    choices: tuple[Choice, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The continuations of one prompt, in the order of the alphas."""

    prompt: str
    continuations: tuple[Continuation, ...]
    first_difference: Difference | None = None


@dataclass(slots=True)
class _Voice:
    """One alpha while it speaks."""

    said: Continuation
    tokens: list[int]  # of prompt and continuation
    text: str  # of them, as far as characters are complete
    draw: torch.Generator
    read: int = 0  # tokens that the cache holds
    cache: object = None


def open_model(speech: Speech) -> tuple[nn.Module, Tokenizer, list[list[int]]]:
    """Load an artifact, and make tokens of the prompts.

    Returns:
        The model, its tokenizer, and the tokens of each prompt.
    Raises:
        UsageError: a number or a prompt that does not fit.
        ArtifactError: no artifact, or an alpha above 0 and no ortho.
        CheckpointError: the artifact has no tokenizer.
    """
    for name, number, least in (
        ("--max-new-tokens", speech.tokens, 1),
        ("--temperature", speech.temperature, 0),
    ):
        if not least <= number < float("inf"):
            raise UsageError(f"{name} is {number}", hint=f"{least} or more")
    opened = open_artifact(speech.artifact, read_keys(speech.identity))
    if opened.ortho is None and any(speech.alphas):
        raise no_ortho(opened, "alpha is not 0")
    tokenizer = models.load_tokenizer(opened.folder)
    positions = models.positions_of(opened.folder)
    encoded = []
    for prompt in speech.prompts:
        tokens = encode_prompt(prompt, tokenizer)
        if not tokens:
            raise UsageError("a --prompt has no tokens", hint="give the words to continue")
        if positions is not None and len(tokens) + speech.tokens > positions:
            raise UsageError(
                f"a --prompt has {len(tokens)} tokens, {speech.tokens} may follow, and the model "
                f"has {positions} positions",
                hint=f"--max-new-tokens {max(1, positions - len(tokens))}, or a shorter prompt",
            )
        encoded.append(tokens)
    device = models.resolve_device(speech.device)
    model = load(opened.folder, alpha=speech.alphas[0], device=device, identity=speech.identity)
    models.check_fits(model, length=0, largest_token=max(map(max, encoded)))
    return model, tokenizer, encoded


def continue_prompt(
    model: nn.Module, tokenizer: Tokenizer, prompt: str, tokens: Sequence[int], speech: Speech
) -> Iterator[Answer]:
    """Continue a prompt at every alpha.

    Args:
        model: holds OrthoLinear.
        tokenizer: of the model.
        prompt: the text.
        tokens: of the prompt, at least one.
        speech: alphas, number of tokens, temperature, seed.
    Yields:
        The answer as far as it is said, after each token; the last one is whole.
    Raises:
        NumericalError: a logit is NaN or infinite.
    Ties go to the lower token. With a temperature every alpha draws with the same random numbers,
    so that equal probabilities give equal tokens.
    """
    start = _decode(tokenizer, tokens)
    voices = [
        _Voice(
            said=Continuation(alpha=alpha),
            tokens=list(tokens),
            text=start,
            draw=torch.Generator().manual_seed(speech.seed),
        )
        for alpha in speech.alphas
    ]
    parted: Difference | None = None
    for number in range(speech.tokens):
        before = list(voices[0].tokens)  # at every alpha the same, until they part
        shares: list[Tensor] = []
        chosen: list[int] = []
        for voice in voices:
            if not voice.said.ended:
                logits = _read(model, voice)
                shares.append(logits.softmax(-1))
                chosen.append(_choose(logits, speech.temperature, voice.draw))
                _say(voice, chosen[-1], float(shares[-1][chosen[-1]]), tokenizer)
        if parted is None and len(set(chosen)) > 1:
            parted = Difference(token=number, choices=_choices(tokenizer, before, chosen, shares))
        yield Answer(
            prompt=prompt,
            continuations=tuple(voice.said for voice in voices),
            first_difference=parted,
        )
        if all(voice.said.ended for voice in voices):
            return


def _read(model: nn.Module, voice: _Voice) -> Tensor:
    """Read what the voice's alpha has not read yet; give the logits of the next token."""
    options: dict[str, object] = {"use_cache": True} if scoring.takes_cache(model) else {}
    if voice.cache is not None:
        options["past_key_values"] = voice.cache
    fresh = torch.tensor([voice.tokens[voice.read :]], device=scoring.device_of(model))
    with torch.no_grad(), at_alpha(model, voice.said.alpha):
        output = model(fresh, **options)
    voice.cache = getattr(output, "past_key_values", None)
    voice.read = 0 if voice.cache is None else len(voice.tokens)
    return scoring.finite(scoring.logits_of(output)[0, -1].float().cpu())


def _choose(logits: Tensor, temperature: float, draw: torch.Generator) -> int:
    if not temperature:
        return int(logits.argmax())
    # Less the largest, and by no less than COLDEST: no quotient leaves float32.
    colder = (logits - logits.max()) / max(temperature, COLDEST)
    return int(torch.multinomial(colder.softmax(-1), 1, generator=draw))


def _say(voice: _Voice, token: int, probability: float, tokenizer: Tokenizer) -> None:
    """Add a token to what was said, or end there."""
    if token == tokenizer.eos_token_id:
        voice.said = replace(voice.said, ended=True)
        return
    voice.tokens.append(token)
    whole = _decode(tokenizer, voice.tokens)
    text = ""
    if not whole.endswith(INCOMPLETE):
        text, voice.text = whole[len(voice.text) :], whole
    said = Token(id=token, text=text, probability=probability)
    voice.said = replace(voice.said, text=voice.said.text + text, tokens=(*voice.said.tokens, said))


def _choices(
    tokenizer: Tokenizer, before: list[int], chosen: Sequence[int], shares: Sequence[Tensor]
) -> tuple[Choice, ...]:
    """Compare the tokens that were chosen after the same text, in the order of the alphas."""
    known = len(_decode(tokenizer, before))
    return tuple(
        Choice(
            id=token,
            text=_decode(tokenizer, [*before, token])[known:] or tokenizer.decode([token]),
            probabilities=tuple(float(one[token]) for one in shares),
        )
        for token in dict.fromkeys(chosen)
    )


def _decode(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """Give the text of tokens: decoded together, since some tokenizers drop a first blank."""
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
