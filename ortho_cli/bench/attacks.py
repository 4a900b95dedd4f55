"""What brings a secret back: relearning, fine-tuning, other prompts, another grid.

A secret that is out of reach may be hidden and not removed. Each attack takes a dense model
(`engine.densify`), measures secrets after it, and puts the model back. None of them is judged
alone: the same attack on a model that never saw the secrets says how much comes back by itself.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ortho_cli.errors import NumericalError, UsageError
from ortho_cli.model import scoring
from ortho_cli.model.secrets import TokenSecret
from ortho_cli.split import quantize
from ortho_cli.split.scales import base_scales

STEPS = (5, 10, 20, 40)
LEARNING_RATE = 5e-5
BETAS = (0.9, 0.95)
BENIGN_TOKENS = 512  # of running text in a benign step: about as many as half of 20 secrets have
PADDING = -100  # a label that does not count
BEFORE = "It is late, and this was written down some time ago. "


def recall(model: nn.Module, secrets: Sequence[TokenSecret]) -> dict[str, Any]:
    """Measure what an attack is after, in short; `evaluate.memorisation` says more, and slower.

    Args:
        model: a causal language model.
        secrets: one at least.
    Returns:
        `exposure` (bits, mean over secrets), `extraction` (share that greedy decoding says whole),
        `token_accuracy` (share of all their tokens that are the likeliest) and `secrets`.
    Raises:
        NumericalError: an NLL is NaN or infinite.
    """
    scores = [scoring.score(model, secret) for secret in secrets]
    hits = [hit for score in scores for hit in score.hits]
    return {
        "exposure": sum(score.exposure for score in scores) / len(scores),
        "extraction": sum(score.verbatim for score in scores) / len(scores),
        "token_accuracy": sum(hits) / len(hits),
        "secrets": len(scores),
    }


def halves(
    secrets: Sequence[TokenSecret], seed: int
) -> tuple[list[TokenSecret], list[TokenSecret]]:
    """Split secrets at random: the first half is taught again, the second measured.

    Both keep the order that the secrets had; of an odd number the measured half has one more.

    Raises:
        UsageError: fewer than two secrets.
    """
    if len(secrets) < 2:
        raise UsageError(
            f"relearning needs 2 secrets, one to teach and one to measure; here is {len(secrets)}",
            hint="give a longer forget set, or leave --attack out",
        )
    taught = set(random.Random(seed).sample(range(len(secrets)), len(secrets) // 2))
    parts = [[one for i, one in enumerate(secrets) if (i in taught) is t] for t in (True, False)]
    return parts[0], parts[1]


def relearn(
    model: nn.Module,
    train: Sequence[TokenSecret],
    measured: Sequence[TokenSecret],
    *,
    steps: Sequence[int] = STEPS,
    learning_rate: float = LEARNING_RATE,
    eos: int | None = None,
) -> list[dict[str, Any]]:
    """Teach some secrets again, all at once in each step, and measure others.

    AdamW on every parameter, betas 0.9 and 0.95, no weight decay, no warm-up; the loss is the mean
    over all tokens of prompt, secret and end. Nothing in it is random.

    Args:
        model: dense, in float32; put back afterwards.
        train: taught.
        measured: `recall` of these is taken after each of `steps`.
        steps: after how many steps to measure, ascending.
        learning_rate: of AdamW.
        eos: the end token, where the model has one.
    Returns:
        For each of `steps`, `recall` with `steps` and the `loss` of the last step.
    Raises:
        NumericalError: the loss is NaN or infinite: the learning rate is too high.
    Source: the attack on half of the data of arXiv:2410.08827 (fine-tuning on facts that are
        independent of those measured) and arXiv:2406.13356.
    """
    end = () if eos is None else (eos,)
    batch = [(*one.prompt, *one.secret, *end) for one in train]
    return _tune(model, lambda: batch, measured, steps, learning_rate)


def finetune(
    model: nn.Module,
    windows: Tensor,
    measured: Sequence[TokenSecret],
    *,
    steps: Sequence[int] = STEPS,
    learning_rate: float = LEARNING_RATE,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Train on innocent text, as `relearn` trains on secrets, and measure secrets.

    Args:
        model: dense, in float32; put back afterwards.
        windows: (n, length) int64 tokens; each step takes about 512 tokens, drawn by the seed.
        measured: `recall` of these is taken after each of `steps`.
        steps: after how many steps to measure, ascending.
        learning_rate: of AdamW.
        seed: of the draws.
    Returns:
        As `relearn`.
    Raises:
        NumericalError: the loss is NaN or infinite.
    Source: benign relearning, arXiv:2406.13356.
    """
    generator = random.Random(seed)
    rows = [tuple(row) for row in windows.tolist()]
    count = max(1, BENIGN_TOKENS // windows.shape[1])

    def draw() -> list[tuple[int, ...]]:
        return generator.sample(rows, min(count, len(rows)))

    return _tune(model, draw, measured, steps, learning_rate)


def _tune(
    model: nn.Module,
    draw: Callable[[], list[tuple[int, ...]]],
    measured: Sequence[TokenSecret],
    steps: Sequence[int],
    learning_rate: float,
) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    with trainable(model) as parameters:
        optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=BETAS, weight_decay=0.0)
        for step in range(1, max(steps, default=0) + 1):
            optimizer.zero_grad(set_to_none=True)
            loss = _loss(model, draw())
            if not bool(torch.isfinite(loss)):
                raise NumericalError(
                    f"the loss of step {step} is {loss.item()}", hint="lower the learning rate"
                )
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if step in steps:
                found.append({"steps": step, **recall(model, measured), "loss": loss.item()})
    return found


def _loss(model: nn.Module, sequences: Sequence[Sequence[int]]) -> Tensor:
    """Mean NLL over every token but the first of each; padding stands on the right."""
    device = scoring.device_of(model)
    labels = scoring.pad(sequences, PADDING).to(device)
    logits: Tensor = model(labels.clamp_min(0)).logits[:, :-1]
    return nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=PADDING
    )


@contextmanager
def trainable(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Let every floating parameter learn, then put back its value and whether it may learn.

    Raises:
        UsageError: a parameter is not float32: its steps would be rounded away.
    """
    before = [(p, p.detach().clone(), p.requires_grad) for p in model.parameters()]
    for parameter, _, _ in before:
        if parameter.dtype != torch.float32:
            raise UsageError(
                f"a parameter is {parameter.dtype}, and small steps are lost in it",
                hint="model.float() first",
            )
    try:
        with torch.enable_grad():
            for parameter, _, _ in before:
                parameter.requires_grad_()
            yield [parameter for parameter, _, _ in before]
    finally:
        for parameter, value, learns in before:
            parameter.grad = None
            parameter.requires_grad_(learns)
            with torch.no_grad():
                parameter.copy_(value)


def reworded(secrets: Sequence[TokenSecret], tokenizer: Any) -> dict[str, list[TokenSecret]]:
    """Ask for each secret in other words, its own tokens and alternatives unchanged.

    Args:
        secrets: as `forget_set.encode` gives them.
        tokenizer: of the model.
    Returns:
        `shorter`: the last half of the prompt's tokens; `longer`: a sentence in front of it;
        `lower`: in lower case. A prompt that comes out empty keeps its last token.
    """

    def with_prompt(one: TokenSecret, prompt: Sequence[int]) -> TokenSecret:
        return dataclasses.replace(one, prompt=tuple(prompt) or one.prompt[-1:])

    def encoded(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    texts = [tokenizer.decode(one.prompt, skip_special_tokens=True) for one in secrets]
    pairs = list(zip(secrets, texts, strict=True))
    before = encoded(BEFORE)
    return {
        "shorter": [with_prompt(one, one.prompt[len(one.prompt) // 2 :]) for one in secrets],
        "longer": [with_prompt(one, [*before, *one.prompt]) for one in secrets],
        "lower": [with_prompt(one, encoded(text.lower())) for one, text in pairs],
    }


def requantized(
    model: nn.Module,
    names: Sequence[str],
    measured: Sequence[TokenSecret],
    *,
    group_size: int,
    scale: str = "mse",
) -> dict[str, Any]:
    """Round the split weights to another INT4 grid, as a second quantizer would, and measure.

    Args:
        model: dense; put back afterwards.
        names: Linears whose weight is rounded.
        measured: `recall` of these is taken.
        group_size: neighbours in a row that share a scale; divides every in_features.
        scale: absmax or mse.
    Raises:
        NumericalError: an NLL is NaN or infinite.
    Source: arXiv:2410.16454: rounding brings back what training hid in small differences.
    """
    weights: Mapping[str, Tensor] = {name: _weight(model, name) for name in names}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    try:
        with torch.no_grad():
            for name, weight in weights.items():
                wide = before[name].float().cpu()
                scales = base_scales(scale, wide, None, group_size)
                weight.copy_(quantize.dequantize(quantize.quantize(wide, scales), scales))
        return recall(model, measured)
    finally:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(before[name])


def _weight(model: nn.Module, name: str) -> Tensor:
    return model.get_submodule(name).get_parameter("weight")
