"""Attacks that bring a secret back: training, other prompts, another INT4 grid.

A secret that cannot be extracted may be hidden and not removed. An attack is a function from a
`Target` to a curve of `Recall` records, and one line of `ATTACKS`: the plan, the run, the gates and
the table of `ortho bench` read that registry. Every attack leaves the model as it was. No attack is
judged alone: the same attack on a model that never saw the secrets says how much comes back by
itself.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ortho_cli.bench import evaluate
from ortho_cli.bench.estimates import average
from ortho_cli.bench.public import Public, clamp_to_codes
from ortho_cli.bench.records import Curve, Recall
from ortho_cli.decompose.edits import load_arrays, save_arrays
from ortho_cli.decompose.settings import GROUP_SIZES
from ortho_cli.errors import NumericalError, ResourceError, UsageError
from ortho_cli.model import scoring
from ortho_cli.model.hooks import frozen
from ortho_cli.model.linears import is_conv1d
from ortho_cli.model.secrets import TokenSecret
from ortho_cli.model.tokenizer import Tokenizer
from ortho_cli.split import quantize
from ortho_cli.split.scales import base_scales
from ortho_cli.storage.parts import Pace, Parts

STEPS = (5, 10, 20, 40)
LEARNING_RATE = 5e-5
BETAS = (0.9, 0.95)
BENIGN_TOKENS = 512  # of running text per benign step: about as many as half of 20 secrets have
# Of both below: 5 steps say little more than 10, and each point costs as much as two steps.
LATE = 3  # the last of the target's numbers of steps: 10, 20, 40
LORA_RANK = 8  # the paper's table 6 finds ranks of 4 to 8 as good as 64
LORA_RATE = 1e-3  # 20 times that of all weights: B begins at 0, and rank 8 has few parameters
MINIBATCH = 4  # secrets in a step, of 10: noise of small batches is the point
MINIBATCH_RATE = 2e-4  # 4 times that of a full batch: an attacker who does not mind damage
LEAST_TO_HALVE = 4  # tokens of a secret: of fewer, half is a token, which may be a space
SHARES = (0.25, 0.5, 0.75)  # of a public model in a soup; both ends are models of their own
PADDING = -100  # a label that does not count
# Tokens up to which a secret has no ROUGE-L in a curve: a greedy answer takes a pass per token, at
# every point, and of so few tokens the share that is likeliest (`token_accuracy`) says as much.
BRIEF = 8
BEFORE = "It is late, and this was written down some time ago. "


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The input of an attack.

    Args:
        model: dense (`engine.densify`), in float32; an attack puts it back.
        secrets: one at least; `recall` of these is measured.
        tokenizer: of the model.
        linears: names of the Linears that were split.
        windows: (n, length) int64 tokens of running text; None where there is none.
        public: weights of a public model by the names in `linears`; None where there is none.
        seed: of every draw.
        learning_rate: of AdamW, for attacks that train.
        steps: after how many steps of training to measure, ascending.
        parts: keeps the points of the curve.
        state: file that keeps what is trained; None keeps nothing, as beside a sealed ortho.
    """

    model: nn.Module
    secrets: Sequence[TokenSecret]
    tokenizer: Tokenizer
    linears: Sequence[str] = ()
    windows: Tensor | None = None
    public: Mapping[str, Public] | None = None
    seed: int = 0
    learning_rate: float = LEARNING_RATE
    steps: Sequence[int] = STEPS
    parts: Parts = dataclasses.field(default_factory=Parts)
    state: Path | None = None

    def curve(self, points: Mapping[str, Callable[[Parts], Recall]]) -> Curve:
        """Measure the points of a curve, but those that an earlier run has measured.

        Each is given the parts that keep what it measures.
        """

        def measure(name: str) -> Recall:
            return points[name](self.parts.at(name))

        found = self.parts.each(
            "points",
            list(points),
            measure,
            write=dataclasses.asdict,
            read=lambda held: Recall(**held),
        )
        return dict(zip(points, found, strict=True))

    def recall(self, secrets: Sequence[TokenSecret], parts: Parts) -> Recall:
        """Measure what is known of secrets now."""
        return recall(self.model, secrets, self.tokenizer, parts)


# Inputs that an attack may need beside --attack, in words.
INPUTS: Mapping[str, str] = {"data": "--data FILE with running text", "public": "--public DIR"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Attack:
    """An entry of the registry.

    Args:
        name: of its figure in the document and in gates: `relearn.20.exposure@0`.
        measures: what it does, for progress.
        label: of its lines in the table; `{}` is the key of a point of the curve.
        run: the attack.
        inputs: flags that it needs beside --attack, of `INPUTS`; it is left out without one.
        rows: what rows of the forget set it needs, in words; of all kinds unless given.
        suits: whether a secret is such a row; the attack is left out where none is.
    """

    name: str
    measures: str
    label: str
    run: Callable[[Target], Curve]
    inputs: AbstractSet[str] = frozenset()
    rows: str = ""
    suits: Callable[[TokenSecret], bool] = lambda one: True

    @property
    def needs(self) -> str:
        """The flags and rows that it needs."""
        given = [words for flag, words in INPUTS.items() if flag in self.inputs]
        return " and ".join(["--attack", *given, *filter(None, [self.rows])])


def recall(
    model: nn.Module,
    secrets: Sequence[TokenSecret],
    tokenizer: Tokenizer | None = None,
    parts: Parts | None = None,
) -> Recall:
    """Measure what an attack is after, in short; `evaluate.memorisation_of` says more, and slower.

    Args:
        model: a causal language model.
        secrets: one at least.
        tokenizer: of the model; None leaves `rouge_l` out.
        parts: keeps what is measured of each secret.
    Returns:
        `exposure` (bits, mean over secrets), `extraction` (share that greedy decoding says whole),
        `token_accuracy` (share of all their tokens that are the likeliest), `rouge_l` (mean of
        greedy answers to secrets of more than 8 tokens; None where there are none).
    Raises:
        NumericalError: an NLL is NaN or infinite.
    """
    parts = parts or Parts()
    scores = evaluate.score_secrets(model, secrets, parts)
    hits = [hit for score in scores for hit in score.hits]
    long = [secret for secret in secrets if len(secret.secret) > BRIEF]
    rouges = [] if tokenizer is None else evaluate.rouges(model, tokenizer, long, parts)
    return Recall(
        exposure=sum(scoring.exposures(scores)) / len(scores),
        extraction=sum(score.verbatim for score in scores) / len(scores),
        token_accuracy=sum(hits) / len(hits),
        secrets=len(scores),
        rouge_l=average(rouges) if rouges else None,
    )


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
            "relearning needs 2 secrets, one to teach and one to measure, and there is "
            f"{len(secrets)}",
            hint="give a longer forget set, or leave --attack out",
        )
    taught = set(random.Random(seed).sample(range(len(secrets)), len(secrets) // 2))
    parts = [[one for i, one in enumerate(secrets) if (i in taught) is t] for t in (True, False)]
    return parts[0], parts[1]


def relearn(target: Target) -> Curve:
    """Teach half of the secrets again, all at once in each step, and measure the other half.

    The loss is the mean over all tokens of prompt, secret and end. Nothing but the choice of halves
    is random.

    Returns:
        As `tune`.
    Raises:
        UsageError: fewer than two secrets.
        NumericalError: the loss is NaN or infinite: the learning rate is too high.
    Source: the attack on half of the data of arXiv:2410.08827 (fine-tuning on facts that are
        independent of those measured) and arXiv:2406.13356.
    """
    batch, others = _lesson(target)
    return tune(target, lambda: batch, others)


def _lesson(target: Target) -> tuple[list[tuple[int, ...]], list[TokenSecret]]:
    """Give the sequences of the half that is taught, with their end, and the half that is not."""
    taught, others = halves(target.secrets, target.seed)
    eos = target.tokenizer.eos_token_id
    end = () if eos is None else (eos,)
    return [(*one.prompt, *one.secret, *end) for one in taught], others


def _late(target: Target, rate: float) -> Target:
    """Take the last numbers of steps, and a rate that is no lower than the target's own."""
    return dataclasses.replace(
        target, steps=target.steps[-LATE:], learning_rate=max(rate, target.learning_rate)
    )


def relearn_minibatch(target: Target) -> Curve:
    """Relearn as `relearn` does, by 4 secrets in each step, drawn by the seed, at 2e-4.

    Returns:
        As `tune`, after 10, 20 and 40 steps.
    Raises:
        UsageError: fewer than two secrets.
        NumericalError: the loss is NaN or infinite: the learning rate is too high.
    Source: relearning on part of the forget set, arXiv:2406.13356.
    """
    lesson, others = _lesson(target)
    generator = random.Random(target.seed)
    count = min(MINIBATCH, len(lesson))
    return tune(_late(target, MINIBATCH_RATE), lambda: generator.sample(lesson, count), others)


def relearn_lora(target: Target) -> Curve:
    """Relearn as `relearn` does, by LoRA on every split Linear, all other weights frozen, at 1e-3.

        y = W x + B A x,   A (8, in) ~ N(0, 1 / in), B (out, 8) = 0

    Returns:
        As `tune`, after 10, 20 and 40 steps; nothing without split Linears.
    Raises:
        UsageError: fewer than two secrets.
        NumericalError: the loss is NaN or infinite: the learning rate is too high.
    Source: LoRA, arXiv:2106.09685, equation 3, with alpha = r.
    """
    lesson, others = _lesson(target)
    with frozen(target.model), adapted(target) as adapters:
        if not adapters:
            return {}
        return tune(_late(target, LORA_RATE), lambda: lesson, others, trained=adapters)


@contextmanager
def adapted(target: Target) -> Iterator[list[nn.Parameter]]:
    """Add a LoRA to every split Linear within the block, and give its matrices; B is 0 at first."""
    generator = torch.Generator().manual_seed(target.seed)
    matrices: list[nn.Parameter] = []
    with ExitStack() as stack:
        for name in target.linears:
            linear = target.model.get_submodule(name)
            weight = linear.get_parameter("weight")
            rows, columns = reversed(weight.shape) if is_conv1d(linear) else weight.shape
            first = torch.randn(LORA_RANK, columns, generator=generator) / columns**0.5
            a = nn.Parameter(first.to(weight.device))
            b = nn.Parameter(torch.zeros(rows, LORA_RANK, device=weight.device))
            matrices += [a, b]
            hook = linear.register_forward_hook(partial(_add_product, a, b))
            stack.callback(hook.remove)
        yield matrices


def _add_product(
    a: Tensor, b: Tensor, linear: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
) -> Tensor:
    """Add B A x to a Linear's output; a forward hook once both matrices are bound."""
    return output + nn.functional.linear(nn.functional.linear(inputs[0], a), b)


def finetune(target: Target) -> Curve:
    """Train on innocent text, as `relearn` trains on secrets, and measure all secrets.

    Each step takes about 512 tokens of running text, drawn by the seed.

    Returns:
        As `tune`; nothing without running text.
    Raises:
        NumericalError: the loss is NaN or infinite.
    Source: benign relearning, arXiv:2406.13356.
    """
    if target.windows is None:
        return {}
    generator = random.Random(target.seed)
    rows = [tuple(row) for row in target.windows.tolist()]
    count = min(max(1, BENIGN_TOKENS // target.windows.shape[1]), len(rows))
    return tune(target, lambda: generator.sample(rows, count), target.secrets)


def tune(
    target: Target,
    draw: Callable[[], Sequence[Sequence[int]]],
    measured: Sequence[TokenSecret],
    *,
    trained: Sequence[nn.Parameter] | None = None,
) -> Curve:
    """Train parameters with AdamW and measure secrets on the way; put the model back.

    Betas 0.9 and 0.95, no weight decay, no warm-up; the loss is the mean NLL over every token but
    the first of each sequence.

    Args:
        target: the model, learning rate and steps.
        draw: gives the sequences of a step.
        measured: `recall` of these is taken after each of the target's steps.
        trained: the parameters that learn; None is all of the model's.
    Returns:
        `recall`, and the loss of the last step, by the number of steps.
    Raises:
        NumericalError: the loss is NaN or infinite.
        UsageError: a parameter is not float32: its steps would be rounded away.
    """
    parameters = list(target.model.parameters() if trained is None else trained)
    for parameter in target.model.parameters():
        if parameter.dtype != torch.float32:
            raise UsageError(
                f"a parameter is {parameter.dtype}, and small steps are lost in it",
                hint="model.float() first",
            )
    with restored(parameters), torch.enable_grad():
        for parameter in parameters:
            parameter.requires_grad_()
        optimizer = torch.optim.AdamW(
            parameters, lr=target.learning_rate, betas=BETAS, weight_decay=0.0
        )
        training = _Training(target=target, draw=draw, parameters=parameters, optimizer=optimizer)

        def train(steps: int, parts: Parts) -> Recall:
            """Train up to that step, where a point is not known yet, and measure it."""
            loss = training.up_to(steps)
            return dataclasses.replace(target.recall(measured, parts), loss=loss)

        found = target.curve({str(steps): partial(train, steps) for steps in target.steps})
    if target.state is not None:
        target.state.unlink(missing_ok=True)
    return found


@dataclass(slots=True, kw_only=True)
class _Training:
    """Parameters in training, which the target's file keeps as time passes."""

    target: Target
    draw: Callable[[], Sequence[Sequence[int]]]
    parameters: Sequence[nn.Parameter]
    optimizer: torch.optim.Optimizer
    pace: Pace = dataclasses.field(default_factory=Pace)
    taken: int = 0
    loss: float = math.nan

    def up_to(self, steps: int) -> float:
        """Take steps until there are so many; give the loss of the last one."""
        if not self.taken:
            self._load(steps)
        for step in range(self.taken + 1, steps + 1):
            self.optimizer.zero_grad(set_to_none=True)
            loss = _loss(self.target.model, self.draw())
            if not bool(torch.isfinite(loss)):
                raise NumericalError(
                    f"the loss of step {step} is {loss.item()}", hint="lower the learning rate"
                )
            torch.autograd.backward([loss])
            self.optimizer.step()
            self.taken, self.loss = step, loss.item()
            if self.target.state is not None and self.pace.due():
                self.target.parts.save()  # points before this step are then known, too
                self.pace.save(partial(self._save, self.target.state))
        return self.loss

    def _save(self, file: Path) -> None:
        arrays: dict[str, npt.NDArray[np.generic]] = {"at": np.asarray([self.taken, self.loss])}
        for number, parameter in enumerate(self.parameters):
            arrays[f"{number}/value"] = parameter.detach().cpu().numpy()
            for name, value in self.optimizer.state.get(parameter, {}).items():
                arrays[f"{number}/{name}"] = value.cpu().numpy()
        try:
            save_arrays(file, arrays)
        except ResourceError:  # a full disk costs what a kill would lose, and not the bench
            file.unlink(missing_ok=True)

    def _load(self, most: int) -> None:
        """Continue where an earlier run was, unless it was beyond what is measured now."""
        arrays = None if self.target.state is None else load_arrays(self.target.state)
        if arrays is None or arrays["at"][0] > most:
            return
        self.taken, self.loss = int(arrays["at"][0]), float(arrays["at"][1])
        for number, parameter in enumerate(self.parameters):
            with torch.no_grad():
                parameter.copy_(torch.from_numpy(arrays[f"{number}/value"]))
            moments = {
                name: torch.from_numpy(arrays[f"{number}/{name}"])
                for name in ("step", "exp_avg", "exp_avg_sq")
                if f"{number}/{name}" in arrays
            }
            if moments:  # what got no gradient has none
                own = {name: value.to(parameter.device) for name, value in moments.items()}
                self.optimizer.state[parameter] = own | {"step": moments["step"]}
        for _ in range(self.taken):
            self.draw()


def _loss(model: nn.Module, sequences: Sequence[Sequence[int]]) -> Tensor:
    """Mean NLL over every token but the first of each; padding is on the right."""
    device = scoring.device_of(model)
    labels = scoring.pad(sequences, PADDING).to(device)
    logits: Tensor = model(labels.clamp_min(0)).logits[:, :-1]
    return nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=PADDING
    )


@contextmanager
def restored(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Put back the value of each parameter, and whether it needs a gradient, after the block."""
    before = [(p, p.detach().clone(), p.requires_grad) for p in parameters]
    try:
        yield
    finally:
        for parameter, value, learns in before:
            parameter.grad = None
            parameter.requires_grad_(learns)
            with torch.no_grad():
                parameter.copy_(value)


def rewordings(
    secrets: Sequence[TokenSecret], tokenizer: Tokenizer
) -> dict[str, list[TokenSecret]]:
    """Write each secret's prompt in other words, its own tokens and alternatives unchanged.

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


def reword(target: Target) -> Curve:
    """Ask for each secret in other words; see `rewordings`."""
    asked = rewordings(target.secrets, target.tokenizer)
    return target.curve({kind: partial(target.recall, rows) for kind, rows in asked.items()})


def paraphrase(target: Target) -> Curve:
    """Ask for each secret by each paraphrase of its prompt, and measure what follows.

    Returns:
        `all`: means over pairs of a paraphrase and its secret; nothing where no row has any.
    Raises:
        NumericalError: an NLL is NaN or infinite.
    Source: rephrased questions, arXiv:2402.16835.
    """
    pairs = [(one, prompt) for one in target.secrets for prompt in one.paraphrases]
    asked = [dataclasses.replace(one, prompt=prompt) for one, prompt in pairs]
    return target.curve({"all": partial(target.recall, asked)} if asked else {})


def second_half(one: TokenSecret) -> TokenSecret | None:
    """Give the first half of a secret away: it joins the prompt, and the rest is the secret.

        prompt + secret[: n // 2]  ->  secret[n // 2 :],   against alternative[m // 2 :]

    Every alternative of m tokens is cut at its own middle and follows the same prompt, so that what
    is compared has the same form and about the same length. Alternatives with the same second half
    count once.

    Returns:
        None for a secret of fewer than 4 tokens, of which half is next to nothing, and where no
        second half differs from the secret's.
    Where halves go together in any way (digits, words drawn apart) exposure is by chance as it is
    of whole secrets. In natural sentences an alternative's end fits the secret's beginning less
    well than its own, so exposure is above chance even of a model that never saw the secret: look
    at the curve of that model, and at ROUGE-L.
    """
    middle = len(one.secret) // 2
    rest = one.secret[middle:]
    others = dict.fromkeys(other[len(other) // 2 :] for other in one.alternatives)
    others.pop(rest, None)
    if len(one.secret) < LEAST_TO_HALVE or not others:
        return None
    prompt = (*one.prompt, *one.secret[:middle])
    return dataclasses.replace(one, prompt=prompt, secret=rest, alternatives=tuple(others))


def complete(target: Target) -> Curve:
    """Give half of each secret away, and measure the other half; see `second_half`.

    Returns:
        `half`: means over secrets of 4 tokens or more; nothing where there are none.
    Raises:
        NumericalError: an NLL is NaN or infinite.
    Source: a prefix that the attacker knows, Carlini et al. 2022 (arXiv:2202.07646), section 3.
    """
    halved = [rest for one in target.secrets if (rest := second_half(one)) is not None]
    return target.curve({"half": partial(target.recall, halved)} if halved else {})


def requantize(target: Target) -> Curve:
    """Round the split weights to other INT4 grids, as a second quantizer would, and measure.

    Scales have the least squared error. A group size is left out where it does not divide every
    in_features.

    Raises:
        NumericalError: an NLL is NaN or infinite.
    Source: arXiv:2410.16454: rounding brings back what training hid in small differences.
    """
    weights = [target.model.get_submodule(n).get_parameter("weight") for n in target.linears]

    def measure(group_size: int, parts: Parts) -> Recall:
        with restored(weights):
            for weight in weights:
                wide = weight.detach().float().cpu()
                scales = base_scales("mse", wide, None, group_size)
                with torch.no_grad():
                    weight.copy_(quantize.dequantize(quantize.quantize(wide, scales), scales))
            return target.recall(target.secrets, parts)

    fit = [size for size in GROUP_SIZES if not any(weight.shape[1] % size for weight in weights)]
    return target.curve({f"group_{size}": partial(measure, size) for size in fit})


def mix_public(target: Target) -> Curve:
    """Average the split weights with those of a public model, and measure.

        W = (1 - share) base + share public

    Returns:
        By percent of the public model, `public_25`, `public_50` and `public_75`, and `clamped`: the
        public weights, moved into the intervals that the model's codes on base's grid stand for.
        Nothing without a public model.
    Raises:
        NumericalError: an NLL is NaN or infinite.
    Source: model soups, arXiv:2203.05482.
    """
    if target.public is None:
        return {}
    weights = {
        target.model.get_submodule(name).get_parameter("weight"): public
        for name, public in target.public.items()
    }

    def measure(make: Callable[[Tensor, Public], Tensor], parts: Parts) -> Recall:
        with restored(weights), torch.no_grad():
            for weight, public in weights.items():
                weight.copy_(make(weight, public))
            return target.recall(target.secrets, parts)

    def mixed(share: float, weight: Tensor, public: Public) -> Tensor:
        return torch.lerp(weight, public.weight.to(weight), share)

    makes: dict[str, Callable[[Tensor, Public], Tensor]] = {
        f"public_{share:.0%}".rstrip("%"): partial(mixed, share) for share in SHARES
    }
    makes["clamped"] = clamp_to_codes
    return target.curve({name: partial(measure, make) for name, make in makes.items()})


# In the order in which they run. README.md of this folder says how to add one.
ATTACKS = (
    Attack(
        name="relearn",
        measures="relearning half",
        label="relearning half, {} steps",
        run=relearn,
    ),
    Attack(
        name="relearn_minibatch",
        measures="relearning half in small batches",
        label="half, by fours, {} steps",
        run=relearn_minibatch,
    ),
    Attack(
        name="relearn_lora",
        measures="relearning half by LoRA",
        label="half, by LoRA, {} steps",
        run=relearn_lora,
    ),
    Attack(
        name="finetune",
        measures="fine-tuning on innocent text",
        label="innocent text, {} steps",
        run=finetune,
        inputs={"data"},
    ),
    Attack(name="reworded", measures="other prompts", label="prompt: {}", run=reword),
    Attack(
        name="paraphrased",
        measures="paraphrased prompts",
        label="paraphrases, {}",
        run=paraphrase,
        rows="rows with `paraphrases`",
        suits=lambda one: bool(one.paraphrases),
    ),
    Attack(
        name="partial",
        measures="half of the answer given",
        label="given {} of the answer",
        run=complete,
        rows="secrets of 4 tokens or more",
        suits=lambda one: second_half(one) is not None,
    ),
    Attack(name="requantized", measures="another grid", label="other grid: {}", run=requantize),
    Attack(
        name="soup",
        measures="soups with the public model",
        label="soup: {}",
        run=mix_public,
        inputs={"public"},
    ),
)
