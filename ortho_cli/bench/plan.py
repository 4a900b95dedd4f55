"""The plan of a bench, made before any work: settings, figures that they leave out, gates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from pathlib import Path
from typing import NamedTuple

from ortho_cli.bench import attacks, figures
from ortho_cli.bench.attacks import ATTACKS, LEARNING_RATE
from ortho_cli.bench.figures import Gate
from ortho_cli.bench.records import Figures
from ortho_cli.bench.server import TIMEOUT
from ortho_cli.bench.verdict import KINDS_OF_TEXT
from ortho_cli.errors import UsageError
from ortho_cli.runtime import product

CONTEXT = 512
SUITES = ("tofu", "muse")
SUITE_ROWS = 100  # of each part of a suite: greedy answers take most of its time
SAMPLES_UNDER_ATTACK = 20
MEMORY = (
    "extraction", "token_accuracy", "rouge_l", "extraction_strength", "truth_ratio", "exposure",
    "telling_share", "forget_nll", "alternatives_nll", "nll_quantile", "inside_share", "rank_p",
)  # fmt: skip


SERVED = ("served_divergence", "served_difference", "served_agreement")


class Need(NamedTuple):
    """The needs of a figure: its flags and files in words, and the inputs that it is made of."""

    words: str
    inputs: AbstractSet[str] = frozenset()


# Words for each input of a figure that is made of several.
WORDS = {
    "attack": "--attack",
    "by_layer": "--by-layer",
    "alpha 1": "--alpha 1",
    "ortho": "ortho.safetensors",
    "model": "--model DIR",
    "forget": "--forget FILE",
    "samples": "--samples N",
    **attacks.INPUTS,
}
# Every figure of an alpha's row, by its first name.
NEEDS = {
    "latency": Need(""),
    **dict.fromkeys(MEMORY, Need("--forget FILE", {"forget"})),
    **dict.fromkeys(
        ("loss_auc", "min_k_auc", "centre_auc"), Need("--nonmember FILE", {"nonmember"})
    ),
    "distance": Need("--attack and ortho.safetensors", {"attack", "ortho"}),
    "connectivity": Need(
        "--attack, ortho.safetensors and --data FILE with running text", {"attack", "ortho", "data"}
    ),
    "positions": Need(
        "--attack, ortho.safetensors and --public DIR", {"attack", "ortho", "public"}
    ),
    "unlisted": Need("--unlisted FILE", {"unlisted"}),
    "keep": Need("--keep FILE", {"keep"}),
    "sampled_extraction": Need("--forget FILE and --samples N", {"forget", "samples"}),
    "perplexity": Need("--data FILE with running text", {"data"}),
    "skill": Need("--data FILE with prompts and completions", {"data"}),
    "perplexity_ratio": Need(
        "--data FILE with running text, and ortho.safetensors, which tells INT4 without forgetting",
        {"data", "ortho"},
    ),
    "worst_perplexity_ratio": Need(
        "ortho.safetensors, which tells INT4 without forgetting", {"ortho"}
    ),
    "kinds": Need("ortho.safetensors or --model DIR: the source writes text", {"source"}),
    **dict.fromkeys(SERVED, Need("--served URL", {"served"})),
    "kl_by_layer": Need("--by-layer, --model DIR and --data FILE", {"by_layer", "data", "model"}),
    **{name: Need(f"--suite {name} DIR", {name}) for name in SUITES},
    "perplexity_ratio_alpha1": Need(
        "--alpha 1 and --data FILE with running text", {"data", "alpha 1"}
    ),
    **dict.fromkeys(
        ("perplexity_ratio_original", "kl", "agreement"),
        Need("--model DIR and --data FILE", {"data", "model"}),
    ),
    **{
        one.name: Need(one.needs, {"attack", *one.inputs})
        for one in sorted(ATTACKS, key=lambda attack: len(attack.inputs))
    },
}
# Figures that need running text, which --data may turn out not to hold.
TEXT_FIGURES = [name for name, need in NEEDS.items() if "data" in need.inputs and name != "skill"]
# Figures of base's codes beside those of INT4 with nothing forgotten.
CODE_FIGURES = ("positions", "distance", "connectivity")
# Figures of the whole document, which a gate names without an alpha.
WHOLE = ("moved.count", "moved.share", "unsplit.share", "unsplit.weights")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The settings of a bench: figures to measure, files and models to measure with."""

    artifact: Path
    identity: Path | None = None  # opens a sealed ortho
    alphas: tuple[float, ...] = (0.0, 1.0)
    data: tuple[Path, ...] = ()
    kinds: tuple[tuple[str, Path], ...] = ()  # text of other kinds, by name
    forget: tuple[Path, ...] = ()
    nonmember: tuple[Path, ...] = ()
    unlisted: tuple[Path, ...] = ()
    keep: tuple[Path, ...] = ()
    suites: tuple[tuple[str, Path], ...] = ()  # folders of TOFU and MUSE, by name
    suite_rows: int = SUITE_ROWS  # of each part at most; all of the forget set
    model: Path | None = None
    reference_model: Path | None = None
    public: Path | None = None  # the model that the source was fine-tuned from
    controls: bool = False
    attack: bool = False
    by_layer: bool = False
    samples: int | None = None  # 20 under attack, else none
    tokens: int = 16384
    context: int | None = None  # 512, or what the model takes if that is less
    require: tuple[str, ...] = ()
    seed: int = 0
    learning_rate: float = LEARNING_RATE
    autocast: bool = False  # everything but speed is measured in bfloat16 arithmetic
    device: str = "auto"
    served: str | None = None  # address of a server
    served_models: tuple[tuple[float, str], ...] = ()  # what it is asked for, by alpha
    served_timeout: float = TIMEOUT  # seconds without a byte
    show_secrets: bool = False


def parse_alphas(words: Sequence[str]) -> tuple[float, ...]:
    """Read alphas as they are typed, each once: `0 1`, or `0,1`.

    Raises:
        UsageError: a word is no number in [0, 1].
    """
    found: dict[float, None] = {}
    for word in chain(*(text.strip(",").split(",") for text in words)):
        try:
            value = float(word)
        except ValueError:
            raise UsageError(
                f"--alpha is {word!r}, not a number",
                hint="the artifact comes first: ortho bench ARTIFACT --alpha 0 1",
            ) from None
        if not 0.0 <= value <= 1.0:
            raise UsageError(
                f"--alpha is {word}, which is not in [0, 1]",
                hint="0 is base alone, 1 is all of ortho",
            )
        found[value + 0.0] = None  # -0.0 is 0.0
    return tuple(found)


def parse_data(words: Sequence[Path]) -> tuple[tuple[Path, ...], tuple[tuple[str, Path], ...]]:
    """Part `FILE` from `NAME=FILE`, text of a kind that is measured apart.

    Returns:
        Files without a name, and names with their file.
    Raises:
        UsageError: a name is given twice, or is one that every bench measures itself.
    A file whose own name has `=` in it is taken as it is, where it exists.
    """
    files: list[Path] = []
    kinds: dict[str, Path] = {}
    for word in words:
        name, equals, rest = str(word).partition("=")
        if not equals or not name.isidentifier() or word.exists():
            files.append(word)
            continue
        if name in kinds or name in KINDS_OF_TEXT:
            raise UsageError(
                f"--data {word} gives the name `{name}` again",
                hint="each kind of text has a name and a file of its own, such as code=code.txt",
            )
        kinds[name] = Path(rest)
    return tuple(files), tuple(kinds.items())


def parse_models(words: Sequence[Path]) -> tuple[Path | None, tuple[tuple[float, str], ...]]:
    """Part the original's folder from `A=NAME`, the model of a server that serves alpha A.

    Returns:
        The folder or None, and alphas with their names.
    Raises:
        UsageError: two folders, an alpha twice, or an alpha that is not in [0, 1].
    A folder whose own name has such a form is `./0=NAME`.
    """
    folder: Path | None = None
    names: dict[float, str] = {}
    for word in words:
        left, equals, name = str(word).partition("=")
        try:
            alpha = float(left)
        except ValueError:
            equals = ""
        if not equals or not name:
            if folder is not None:
                raise UsageError(
                    f"--model names two folders, `{folder}` and `{word}`",
                    hint="the original is one; a server's models are --model 0=NAME --model 1=NAME",
                )
            folder = word
            continue
        (alpha,) = parse_alphas([left])
        if alpha in names:
            raise UsageError(f"--model names alpha {alpha:g} twice", hint="leave one of them out")
        names[alpha] = name
    return folder, tuple(names.items())


def parse_suites(words: Sequence[str]) -> tuple[tuple[str, Path], ...]:
    """Read `NAME DIR` as often as it is typed.

    Raises:
        UsageError: a name of no suite, or one that is given twice, or a name without a folder.
    """
    found: dict[str, Path] = {}
    for name, folder in zip_longest(words[::2], words[1::2]):
        if name not in SUITES or folder is None or name in found:
            what = "has no folder" if folder is None else "is given twice"
            raise UsageError(
                f"--suite {name} {what if name in SUITES else 'is no suite'}",
                hint=" or ".join(f"--suite {suite} DIR" for suite in SUITES),
            )
        found[name] = Path(folder)
    return tuple(found.items())


def checked(settings: Settings) -> Settings:
    """Refuse what does not fit together; fill in what follows from the rest."""
    alphas = dict.fromkeys(float(product.check_alpha(alpha)) for alpha in settings.alphas)
    if not alphas:
        raise UsageError("no alpha is given", hint="--alpha 0 1")
    if settings.attack and not settings.forget:
        raise UsageError("--attack has no secrets to bring back", hint="--forget FILE")
    if settings.attack and 0.0 not in alphas:
        raise UsageError("--attack is on alpha 0, which is not measured", hint="--alpha 0")
    if settings.public and not settings.attack:
        raise UsageError("--public is for attacks, and none is asked for", hint="--attack")
    if settings.by_layer and not (settings.model and settings.data):
        lacking = "--model DIR" if settings.data else "--data FILE"
        raise UsageError(f"--by-layer needs {lacking}", hint="it reads text beside the original")
    if settings.nonmember and not settings.forget:
        raise UsageError("--nonmember is compared with --forget", hint="--forget FILE")
    _check_served(settings, list(alphas))
    samples = settings.samples
    if samples is None:
        samples = SAMPLES_UNDER_ATTACK if settings.attack else 0
    for name, number, least in (
        ("--samples", samples, 0),
        ("--tokens", settings.tokens, 2),
        ("--suite-rows", settings.suite_rows, 1),
        ("--context", settings.context or CONTEXT, 2),
    ):
        if number < least:
            raise UsageError(f"{name} is {number}", hint=f"{least} or more")
    return replace(settings, alphas=tuple(alphas), samples=samples)


def _check_served(settings: Settings, alphas: Sequence[float]) -> None:
    if settings.served_models and settings.served is None:
        alpha, name = settings.served_models[0]
        raise UsageError(f"--model {alpha:g}={name} is of a server", hint="--served URL")
    for alpha, _ in settings.served_models:
        if alpha not in alphas:
            raise figures.not_measured(alpha, alphas)


def not_measured(settings: Settings, *, ortho: bool) -> dict[str, str]:
    """Name the figures that these settings leave out, and what each would need."""
    flags = (
        "forget",
        "nonmember",
        "unlisted",
        "keep",
        "samples",
        "data",
        "model",
        "attack",
        "by_layer",
        "served",
    )
    given = {flag for flag in (*flags, "public") if getattr(settings, flag)}
    given |= {name for name, has in (("ortho", ortho), ("alpha 1", 1.0 in settings.alphas)) if has}
    given |= {name for name, _ in settings.suites}
    given |= {"source"} if ortho or settings.model or settings.kinds else set()
    return {name: _lacking(need, given) for name, need in NEEDS.items() if not need.inputs <= given}


def _lacking(need: Need, given: AbstractSet[str]) -> str:
    """Say what is absent of what a figure needs, and nothing of what is there."""
    absent = [words for name, words in WORDS.items() if name in need.inputs - given]
    return need.words if need.inputs.isdisjoint(given) else " and ".join(absent)


def check_gates(gates: Sequence[Gate], settings: Settings, missing: Mapping[str, str]) -> None:
    """Refuse gates on what will not be measured."""
    names = list(figures.names_of(Figures)) if gates else []
    for gate in gates:
        root = gate.name.split(".")[0]
        if gate.alpha is None:
            if gate.name not in WHOLE:
                known = root in NEEDS
                raise UsageError(
                    f"`{gate.text}` names no alpha",
                    hint=f"write {gate.name}@0" if known else f"without one: {', '.join(WHOLE)}",
                )
            continue
        if root not in NEEDS:
            raise figures.unknown(gate.name, NEEDS)
        if not figures.may_be(gate.name, names):
            raise figures.unknown(gate.name, [one for one in names if one.startswith(root)])
        if gate.alpha not in settings.alphas:
            raise figures.not_measured(gate.alpha, settings.alphas)
        for name, needs in missing.items():
            if f"{gate.name}.".startswith(f"{name}."):
                raise UsageError(f"`{gate.name}` is not measured", hint=f"it needs {needs}")
        if "attack" in NEEDS[root].inputs and gate.alpha != 0.0:
            raise UsageError(f"`{gate.name}` is measured at alpha 0 only", hint=f"{gate.name}@0")
