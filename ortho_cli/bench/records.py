"""Records of `ortho bench`: figures with their intervals, rows, verdict, report; and their JSON.

Every figure that a bench measures is a frozen dataclass here. `to_json` alone turns records into
the document that `ortho bench --json` prints: an object for each record, its fields in their order.
Figures are in nats, except exposure, which is in bits. No record holds a secret's text unless the
caller asks for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Literal, NamedTuple

FORMAT = "ortho-bench/1"

# How `to_json` writes a field: not at all where it is None, or its own fields in its place.
OPTIONAL, INLINE = {"json": "optional"}, {"json": "inline"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """An estimate: its value, its 95 % interval, and the number of samples behind it."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Share(Figure):
    """A share of `n` trials, with Wilson's interval."""

    hits: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledShare(Share):
    """The share of secrets that one of `samples` samples gives, beside its exact expectation."""

    expected: float
    samples: int
    temperature: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Exposure(Figure):
    """Mean exposure in bits: `maximum` is log2(n + 1), `chance` that of an ordinary secret."""

    alternatives_min: int
    alternatives_max: int
    maximum: float
    chance: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Auc(Figure):
    """The chance that a positive scores above a negative; `n` counts both."""

    positives: int
    negatives: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TextFigure(Figure):
    """A figure of running text: `n` predicted tokens, in `windows` of `context` tokens."""

    windows: int
    context: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KindFigures:
    """Figures of one kind of text; `kl` is KL(original || model), `kl_int4` KL(INT4 || model).

    Of alternatives, perplexity is e to the mean NLL per token after their prompts, and windows are
    secrets.
    """

    perplexity: TextFigure
    perplexity_ratio: TextFigure | None = field(default=None, metadata=OPTIONAL)
    perplexity_ratio_original: TextFigure | None = field(default=None, metadata=OPTIONAL)
    kl: TextFigure | None = field(default=None, metadata=OPTIONAL)
    kl_int4: TextFigure | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chance:
    """A p-value: how often chance alone is as far off, by `n` samples."""

    value: float
    n: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Positions:
    """How well codes that were moved can be told from all others by a public model.

    `value`: AUC of the distance between base's code and the public weight. Precision and recall are
    of weights that are called moved, and `moved / weights` is the precision of a guess.
    """

    value: float
    precision_at_recall_50: float
    precision_at_recall_75: float
    recall_at_precision_80: float
    moved: int
    weights: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Distance:
    """Relative Euclidean distance of base from INT4 with nothing forgotten."""

    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Connectivity:
    """The barrier between INT4 with nothing forgotten and base, in nats per token of text.

    `nlls`: mean NLL at evenly spaced points of the straight line between them.
    """

    value: float
    nlls: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed(Figure):
    """Median tokens per second of `n` runs over `tokens` tokens; low and high are quartiles."""

    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """Bytes: the peak on CUDA, the resident set on the CPU; None where the system has no figure."""

    value: int | None
    kind: Literal["cuda peak", "resident"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Speed and memory of one model; `cached`: whether decoding keeps a cache."""

    prefill: Speed
    decode: Speed
    cached: bool
    memory: MemoryUse


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One secret: exposure in bits, NLL in nats, quantile in [0, 1], `hits` of its `tokens`."""

    index: int
    exposure: float
    nll: float
    quantile: float
    hits: int
    tokens: int
    text: str | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Memorisation:
    """Memory of secrets.

    `extraction`: share of secrets of which each token is the most likely one, so that greedy
        decoding gives them. `token_accuracy`: share of such tokens.
    `forget_nll`, `alternatives_nll`: mean per secret, of its sum over tokens.
    `nll_quantile`: the secret's place among its own alternatives, ties in the middle: 0 is the most
        likely of all, 0.5 chance, 1 the least likely. `inside_share`: share of secrets between 0.05
        and 0.95; 0.9 by chance.
    `rank_p`: chance that ranks which are uniform, as those of unseen secrets, stray from it so far.
        Near 0 secrets are known, or marked: all unlikely, or all in the middle.
    `loss_auc`, `min_k_auc`: chance that a secret is more likely than a nonmember, or that its least
        likely tokens are (Min-20 %); None without nonmembers. 0.5 is no trace; above is remembered,
        and below is a mark, too. From each text's value the mean of its own alternatives is taken
        first, so that prompts and lengths compare.
    `centre_auc`: chance that a secret is nearer to the mean NLL of its alternatives, in their
        standard deviations, than a nonmember is to that of its own; None without nonmembers. 0.5 is
        no mark; above, secrets were made average, and below they stick out to either side.
    `rouge_l`: mean ROUGE-L of greedy answers; of natural sentences, which few models give word for
        word. `extraction_strength`: mean share of a secret that follows greedily once the rest of
        it is given. `truth_ratio`: mean of (mean probability per token of alternatives) / (that of
        the secret): 0 is known by heart, about 1 is not known.
    `telling_share`: of the NLL of alternatives, the part that is of tokens in which they differ
        (model.phrasing). Exposure, quantiles and ranks are taken among so many times their NLLs:
        1 for keys and numbers, less where alternatives have a phrasing that the secret has not.
    """

    extraction: Share
    token_accuracy: Figure
    rouge_l: Figure | None = field(default=None, metadata=OPTIONAL)
    extraction_strength: Figure
    telling_share: float
    truth_ratio: Figure
    exposure: Exposure
    forget_nll: Figure
    alternatives_nll: Figure
    nll_quantile: Figure
    inside_share: Share
    rank_p: Chance
    loss_auc: Auc | None = None
    min_k_auc: Auc | None = None
    centre_auc: Auc | None = None
    entries: tuple[Entry, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Recall:
    """Memory of secrets after an attack: means over `secrets`; `loss` of its last step.

    `rouge_l`: of greedy answers to those of more than 8 tokens; None where there are none.
    """

    exposure: float
    extraction: float
    token_accuracy: float
    secrets: int
    rouge_l: float | None = field(default=None, metadata=OPTIONAL)
    loss: float | None = field(default=None, metadata=OPTIONAL)


Curve = Mapping[str, Recall]  # by steps taken, or by the variant of an attack


@dataclass(frozen=True, slots=True, kw_only=True)
class TofuSet:
    """Figures of one set of TOFU's questions, each in [0, 1]; model utility takes all three.

    `probability`: of the right answer, per token; of real authors and world facts its share in the
        probabilities of all options. `rouge_l`: recall of the right answer in the greedy one.
    `truth_ratio`: mean of max(0, 1 - R), R = (mean probability per token of wrong answers) / (that
        of a right one).
    """

    probability: Figure
    rouge_l: Figure
    truth_ratio: Figure


@dataclass(frozen=True, slots=True, kw_only=True)
class Tofu:
    """The figures of TOFU; a field is None where its file or model was not given.

    `forget_quality`: p-value of two samples, truth ratios R of this model and of the reference
        model on the forget set: below 0.05 they differ, so that forgetting, or memory, is seen.
    `forget_truth_ratio`: mean R there. `model_utility`: harmonic mean of the nine figures of the
        other three sets.
    """

    forget_set: str | None = field(default=None, metadata=OPTIONAL)
    forget_quality: Chance | None = field(default=None, metadata=OPTIONAL)
    forget_truth_ratio: Figure | None = field(default=None, metadata=OPTIONAL)
    model_utility: Figure | None = field(default=None, metadata=OPTIONAL)
    retain: TofuSet | None = field(default=None, metadata=OPTIONAL)
    real_authors: TofuSet | None = field(default=None, metadata=OPTIONAL)
    world_facts: TofuSet | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivLeak(Figure):
    """100 (auc - reference_auc) / reference_auc, in percent.

    `auc`: chance that a held-out text is likelier than one to be forgotten, by Min-40%: 0 is full
    memory. `reference_auc`: that of the reference model, or 0.5 without one. The interval is that
    of `auc`.
    """

    auc: float
    reference_auc: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Muse:
    """The figures of MUSE; a field is None where its file was not given.

    `verbmem`, `knowmem_forget`, `knowmem_retain`: mean ROUGE-L (F1) of greedy text, in [0, 1]; the
    paper prints them in percent. Negative `privleak` is memory, positive a mark.
    """

    verbmem: Figure | None = field(default=None, metadata=OPTIONAL)
    knowmem_forget: Figure | None = field(default=None, metadata=OPTIONAL)
    knowmem_retain: Figure | None = field(default=None, metadata=OPTIONAL)
    privleak: PrivLeak | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedDivergence(Figure):
    """Mean over `n` requests of a bound of KL(ours || served), in nats (`served.divergence`).

    The interval is over prefixes. `worst`: of one request.
    """

    worst: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Differing:
    """The largest absolute difference of log-probabilities, in nats, over `n` requests.

    It is over all tokens that the server gives, down to the twentieth, where a small probability
    differs more than a large one.
    """

    value: float
    n: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """All figures of one row; None, and left out of JSON, where there was no data for one."""

    memory: Memorisation | None = field(default=None, metadata=INLINE)
    sampled_extraction: SampledShare | None = field(default=None, metadata=OPTIONAL)
    unlisted: Memorisation | None = field(default=None, metadata=OPTIONAL)
    keep: Memorisation | None = field(default=None, metadata=OPTIONAL)
    perplexity: TextFigure | None = field(default=None, metadata=OPTIONAL)
    kl: TextFigure | None = field(default=None, metadata=OPTIONAL)
    agreement: TextFigure | None = field(default=None, metadata=OPTIONAL)
    perplexity_ratio_original: TextFigure | None = field(default=None, metadata=OPTIONAL)
    skill: Share | None = field(default=None, metadata=OPTIONAL)
    latency: Latency | None = field(default=None, metadata=OPTIONAL)
    attacks: Mapping[str, Curve] = field(default_factory=dict, metadata=INLINE)
    positions: Positions | None = field(default=None, metadata=OPTIONAL)
    distance: Distance | None = field(default=None, metadata=OPTIONAL)
    connectivity: Connectivity | None = field(default=None, metadata=OPTIONAL)
    perplexity_ratio: TextFigure | None = field(default=None, metadata=OPTIONAL)
    perplexity_ratio_alpha1: TextFigure | None = field(default=None, metadata=OPTIONAL)
    worst_perplexity_ratio: TextFigure | None = field(default=None, metadata=OPTIONAL)
    kinds: Mapping[str, KindFigures] | None = field(default=None, metadata=OPTIONAL)
    kl_by_layer: Mapping[str, TextFigure] | None = field(default=None, metadata=OPTIONAL)
    tofu: Tofu | None = field(default=None, metadata=OPTIONAL)
    muse: Muse | None = field(default=None, metadata=OPTIONAL)
    served_divergence: ServedDivergence | None = field(default=None, metadata=OPTIONAL)
    served_difference: Differing | None = field(default=None, metadata=OPTIONAL)
    served_agreement: Share | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measured state, by its name: an alpha, a control, or another model."""

    row: str
    alpha: float | None = None
    figures: Figures


class Judgement(NamedTuple):
    """A word that can be held to a threshold, and what decided it."""

    word: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Relearned:
    """Memory after relearning for `steps`; `_over`: above a model that never saw the secrets."""

    steps: int
    exposure: float
    token_accuracy: float
    exposure_over: float | None = field(default=None, metadata=OPTIONAL)
    token_accuracy_over: float | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The judgement of the figures; None where one was not measured.

    `memory` and `utility` are of alpha 0, `full` of alpha 1, `served` of what a server answers.
    """

    memory: str | None = None
    utility: str | None = None
    full: str | None = None
    served: str | None = field(default=None, metadata=OPTIONAL)
    better_than_controls: bool | None = None
    relearning: tuple[Relearned, ...] = ()
    thresholds: Mapping[str, float | tuple[float, float]] = field(default_factory=dict)
    sentences: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GateResult:
    """A gate as it was written, the value of its figure, and whether it was met.

    `unknown` says why there is no such figure, in place of a value; no such gate is met.
    """

    require: str
    value: float | None = field(default=None, metadata=OPTIONAL)
    unknown: str | None = field(default=None, metadata=OPTIONAL)
    met: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Unsplit:
    """Weights that no split touches, those that it does, and the share of the former in all."""

    weights: int
    split_weights: int
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """Codes of base that are not the source's own, and their share in the split weights."""

    count: int
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactFacts:
    """Which artifact was measured; the folder is None where it was temporary."""

    folder: str | None
    plan_sha256: str | None
    source_digest: str | None
    base_bytes: int
    ortho_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """The settings that figures depend on, as they were resolved."""

    alphas: tuple[float, ...]
    seed: int
    samples: int | None
    context: int | None
    controls: bool
    attack: bool
    autocast: bool
    learning_rate: float | None
    torch: str
    threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSizes:
    """How much there was to measure on; `alternatives` counts secrets by where theirs are from."""

    tokens: int
    windows: int
    kinds: Mapping[str, int]  # tokens of each kind of text beside --data
    pairs: int
    secrets: int
    alternatives: Mapping[str, int]
    nonmembers: int
    unlisted: int
    keep: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Stray:
    """A request whose answer is not of the alpha that was asked.

    `got`: the alpha that answered, None where it is of none. `nearest`: the alpha whose own
    arithmetic is nearest; divergences in nats, from `asked` and from `nearest`. Requests count from
    1, prefixes from 0.
    """

    request: int
    phase: str
    prefix: int
    asked: float
    got: float | None
    divergence: float
    nearest: float
    divergence_nearest: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """How a server was asked, and which requests strayed.

    `models`: by alpha, the model's name, or the fields of a request. `top`: tokens that were asked
    for. `shortest`, `longest`: tokens of a prefix. `together`: requests at once. `sure`: answers
    that are of one alpha and clearly of no other. `stray_phases` counts all that strayed, `strays`
    lists the first ones.
    """

    models: Mapping[str, str]
    prompts: Literal["tokens", "text"]
    top: int
    prefixes: int
    shortest: int
    longest: int
    together: int
    requests: int
    sure: int
    stray: int
    stray_phases: Mapping[str, int]
    strays: tuple[Stray, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class NotMeasured:
    """A figure that was left out, and the flags or files that it needs."""

    figure: str
    needs: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All that a bench found."""

    format: str = FORMAT
    ortho: str  # the version
    artifact: ArtifactFacts
    settings: RunFacts
    data: DataSizes
    unsplit: Unsplit
    moved: Moved | None = field(default=None, metadata=OPTIONAL)
    served: Served | None = field(default=None, metadata=OPTIONAL)
    rows: tuple[Row, ...] = ()
    not_measured: tuple[NotMeasured, ...] = ()
    notes: tuple[str, ...] = ()
    verdict: Verdict
    gates: tuple[GateResult, ...] = ()


def to_json(record: object) -> dict[str, object]:
    """Write a record, or a mapping of records, as a JSON object."""
    if isinstance(record, Mapping):
        return {str(key): _value(one) for key, one in record.items()}
    found: dict[str, object] = {}
    for one in fields(record) if is_dataclass(record) else ():
        value, form = getattr(record, one.name), one.metadata.get("json")
        if form == "inline" and value is not None:
            found |= {key: inner for key, inner in to_json(value).items() if inner is not None}
        elif form is None or (form == "optional" and value is not None):
            found[one.name] = _value(value)
    return found


def _value(value: object) -> object:
    if isinstance(value, tuple):
        return [_value(one) for one in value]
    return to_json(value) if isinstance(value, Mapping) or is_dataclass(value) else value
