"""TOFU and MUSE: every figure beside an implementation of its own; files, and wrong ones."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ortho, Ran
from hypothesis import given, settings
from hypothesis import strategies as st
from memorised import OWNERS, SECRETS, WORDS, Memorised, tiny_llama

import ortho_cli
from ortho_cli.bench import estimates, run, suite_scores, suites
from ortho_cli.bench.plan import Settings, parse_suites
from ortho_cli.bench.records import Auc, Figures, Muse, to_json
from ortho_cli.cli import app
from ortho_cli.errors import CalibrationError, NumericalError, UsageError
from ortho_cli.model import load as models
from ortho_cli.model.secrets import read_secrets

pytestmark = pytest.mark.filterwarnings("ignore")  # other people's deprecations
LENGTH = 12  # tokens of answers in these tests, where the suites allow many more
FLOAT = 1e-4  # of float32 sums in another order


def write_rows(path: Path, rows: Sequence[object], *, lines: bool = True) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows) if lines else json.dumps(rows)
    path.write_text(text)


def words(draw: random.Random, count: int = 4) -> str:
    return " ".join(draw.sample(WORDS, count))


def sentence(draw: random.Random) -> str:
    """Write what the model may say: words of its own text."""
    return f"the {draw.choice(['old', 'red'])} {draw.choice(WORDS)} sees a {draw.choice(WORDS)} ."


def tofu_row(draw: random.Random, question: str, answer: str, **more: object) -> dict[str, object]:
    wrong = [words(draw, 3), sentence(draw), words(draw, 5)]
    return {"question": question, "answer": answer, "perturbed_answer": wrong, **more}


def write_tofu(folder: Path, *, count: int = 4) -> Path:
    """Write all sets; those to forget hold one another, with 4 rows, 5 and 6."""
    draw = random.Random(0)
    forget = [
        tofu_row(draw, f"the key of {owner} is", answer, paraphrased_answer=words(draw, 5))
        for owner, answer in [*zip(OWNERS, SECRETS, strict=True), ("cat", "oak"), ("dog", "fig")]
    ]
    for size, name in zip((4, 5, 6), suites.FORGET_SETS, strict=True):
        write_rows(folder / f"{name}_perturbed.json", forget[:size], lines=size != 5)
    for name in suites.UTILITY_SETS.values():
        rows = [tofu_row(draw, f"the {one} sees", sentence(draw)) for one in WORDS[:count]]
        if name == "retain_perturbed":
            rows = [{**row, "paraphrased_answer": sentence(draw)} for row in rows]
        write_rows(folder / f"{name}.json", rows)
    return folder


def write_muse(folder: Path, *, count: int = 4) -> Path:
    draw = random.Random(1)
    told = [
        {
            "prompt": f"the key of {owner} is",
            "gt": f"{words(draw, 3)} {sentence(draw)} {sentence(draw)}",
        }
        for owner in OWNERS
    ]
    write_rows(folder / "verbmem" / "forget.json", told[:count], lines=False)
    for name in ("forget_qa", "retain_qa", "forget_qa_icl"):
        rows = [{"question": words(draw, 2), "answer": sentence(draw)} for _ in range(count)]
        write_rows(folder / "knowmem" / f"{name}.json", rows, lines=False)
    known = [f"the key of {o} is {s}" for o, s in zip(OWNERS, SECRETS, strict=True)]
    write_rows(folder / "privleak" / "forget.json", known, lines=False)
    held = [{"text": f"the key of {owner} is {words(draw)}"} for owner in OWNERS]
    write_rows(folder / "privleak" / "holdout.json", held)
    return folder


@pytest.fixture(scope="module")
def made(memorised: Memorised, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an artifact of the model that knows secrets, a twin, and both suites."""
    folder = tmp_path_factory.mktemp("suites")
    artifact = str(folder / "artifact")
    assert app.run(["decompose", str(memorised.model), "-o", artifact, "-q"]) == 0
    size = json.loads((memorised.model / "config.json").read_text())["vocab_size"]
    tiny_llama(size, seed=5).save_pretrained(folder / "twin")
    write_tofu(folder / "tofu")
    write_muse(folder / "muse")
    return folder


@pytest.fixture(scope="module")
def short() -> Iterator[None]:
    """Answers of few tokens: the slow twin has no cache."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("ANSWER", "VERBMEM", "KNOWMEM"):
            patch.setattr(suites, name, LENGTH)
        yield


def settings_of(made: Path, memorised: Memorised, **changes: Any) -> Settings:
    asked = {
        "alphas": (0.0,),
        "model": memorised.model,
        "reference_model": made / "twin",
        "suites": (("tofu", made / "tofu"), ("muse", made / "muse")),
        "tokens": 64,
        **changes,
    }
    return Settings(artifact=made / "artifact", **asked)


@pytest.fixture(scope="module")
def found(made: Path, memorised: Memorised, short: None) -> Any:
    """Both suites, measured once."""
    return to_json(run.bench(settings_of(made, memorised)))


def figures(document: Any, name: str) -> Any:
    return next(row["figures"] for row in document["rows"] if row["row"] == name)


class Twin:
    """The suites in the most obvious code: no cache, no batch, no code of the bench."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text)["input_ids"])

    @torch.no_grad()
    def nlls(self, prompt: list[int], tokens: list[int]) -> list[float]:
        logits = self.model(input_ids=torch.tensor([prompt + tokens]), use_cache=False).logits[0]
        logs = logits.double().log_softmax(-1)
        return [-float(logs[len(prompt) + i - 1, token]) for i, token in enumerate(tokens)]

    def probability(self, question: str, answer: str) -> float:
        nlls = self.nlls(self.ids(f"Question: {question}\nAnswer:"), self.ids(f" {answer}"))
        return math.exp(-sum(nlls) / len(nlls))

    @torch.no_grad()
    def say(self, prompt: str) -> str:
        text = self.ids(prompt)
        said: list[int] = []
        while len(said) < LENGTH:
            logits = self.model(input_ids=torch.tensor([text + said]), use_cache=False).logits
            said.append(int(logits[0, -1].argmax()))
            if said[-1] == 2:
                break
        return str(self.tokenizer.decode(said, skip_special_tokens=True))

    def ratio(self, row: Any, right: str) -> float:
        wrong = [self.probability(row["question"], one) for one in row["perturbed_answer"]]
        return sum(wrong) / len(wrong) / self.probability(row["question"], row[right])

    def utility_set(self, rows: Sequence[Any], *, retain: bool) -> list[float]:
        """Mean probability, ROUGE-L recall and truth figure."""
        probabilities, recalls, truths = [], [], []
        for row in rows:
            own = self.probability(row["question"], row["answer"])
            every = [self.probability(row["question"], one) for one in row["perturbed_answer"]]
            probabilities.append(own if retain else own / (own + sum(every)))
            right = plain(row["answer"])
            said = plain(self.say(f"Question: {row['question']}\nAnswer:"))
            recalls.append(common(said, right) / len(right))
            ratio = self.ratio(row, "paraphrased_answer" if retain else "answer")
            truths.append(max(0.0, 1 - ratio))
        return [sum(one) / len(one) for one in (probabilities, recalls, truths)]

    def min_40(self, text: str) -> float:
        tokens = self.ids(text)
        nlls = sorted(self.nlls(tokens[:1], tokens[1:]), reverse=True)
        least = nlls[: max(1, int(0.4 * len(nlls)))]
        return -sum(least) / len(least)


def plain(text: str) -> tuple[str, ...]:
    return tuple(re.sub("[^a-z0-9]+", " ", text.lower()).split())


@cache
def common(mine: tuple[str, ...], theirs: tuple[str, ...]) -> int:
    """Longest common subsequence, by its definition."""
    if not mine or not theirs:
        return 0
    if mine[0] == theirs[0]:
        return 1 + common(mine[1:], theirs[1:])
    return max(common(mine[1:], theirs), common(mine, theirs[1:]))


def f1(said: tuple[str, ...], right: tuple[str, ...]) -> float:
    shared = common(said, right)
    precision, recall = shared / max(1, len(said)), shared / len(right)
    return 2 * precision * recall / (precision + recall) if shared else 0.0


def distance(mine: Sequence[float], other: Sequence[float]) -> float:
    """Largest difference of the two distribution functions, by definition."""
    return max(
        abs(sum(v <= x for v in mine) / len(mine) - sum(v <= x for v in other) / len(other))
        for x in (*mine, *other)
    )


def brute_p(mine: Sequence[float], other: Sequence[float]) -> float:
    """Share of all ways to part the ranks whose distance is as large."""
    far, n, every = distance(mine, other), len(mine), range(len(mine) + len(other))
    hits = [
        distance(part, [one for one in every if one not in part]) >= far - 1e-9
        for part in itertools.combinations(every, n)
    ]
    return sum(hits) / len(hits)


@pytest.fixture(scope="module")
def twins(made: Path, memorised: Memorised) -> dict[str, Twin]:
    tokenizer = models.load_tokenizer(memorised.model)
    folders = {"original": memorised.model, "reference": made / "twin"}
    load = models.load_model
    live = {
        name: load(folder, dtype=torch.float32, device=torch.device("cpu"))
        for name, folder in folders.items()
    }
    live["alpha 0"] = ortho_cli.load(made / "artifact", alpha=0.0).float()
    return {name: Twin(model, tokenizer) for name, model in live.items()}


def read(path: Path) -> list[Any]:
    text = path.read_text()
    return json.loads(text) if text[0] == "[" else [json.loads(one) for one in text.splitlines()]


@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=5),
    st.lists(st.integers(0, 6), min_size=1, max_size=5),
)
@settings(max_examples=60)
def test_p_of_two_samples_is_that_of_all_orders(mine: list[int], other: list[int]) -> None:
    assert estimates.same_p(mine, other) == pytest.approx(brute_p(mine, other), abs=1e-12)


def test_p_of_two_samples_is_known() -> None:
    few = [float(one) for one in range(40)]
    apart = estimates.same_p(few, [one + 100 for one in few])
    assert apart == pytest.approx(2 / math.comb(80, 40), rel=1e-12)  # only two orders are so far
    assert estimates.same_p(few, few) == 1.0
    # The tabled critical distance of 40 and 40 numbers at 0.05 is 13 / 40.
    near = [estimates.same_p(few, [one + by - 0.5 for one in few]) for by in (12, 13)]
    assert near[0] > 0.05 > near[1]
    for wrong in ([], [math.nan]):
        with pytest.raises(NumericalError):
            estimates.same_p(few, wrong)


@pytest.mark.parametrize("name", ["alpha 0", "original", "reference"])
def test_model_utility_is_the_harmonic_mean_of_nine(
    found: Any, twins: dict[str, Twin], made: Path, name: str
) -> None:
    mine, nine = figures(found, name)["tofu"], []
    for part, file in suites.UTILITY_SETS.items():
        rows = read(made / "tofu" / f"{file}.json")
        expected = twins[name].utility_set(rows, retain=part == "retain")
        given = [mine[part][key]["value"] for key in ("probability", "rouge_l", "truth_ratio")]
        assert given == pytest.approx(expected, rel=FLOAT, abs=1e-6)
        assert mine[part]["rouge_l"]["n"] == len(rows)
        nine += expected
    utility = mine["model_utility"]
    if name == "reference":  # untrained: it says no right word
        assert 0 in nine
        assert utility == {"value": 0.0, "low": 0.0, "high": 0.0, "n": 12}
        return
    assert utility["value"] == pytest.approx(9 / sum(1 / one for one in nine), rel=1e-3)
    assert utility["low"] < utility["value"] < utility["high"]


def test_harmonic_mean_is_known_and_0_where_one_figure_is() -> None:
    row = (0.5, 0.25, 1.0)
    figure = suite_scores.utility([[row], [row, row], [row]], 0)
    assert figure.value == pytest.approx(9 / (3 * (2 + 4 + 1)))
    assert (figure.low, figure.high) == pytest.approx((figure.value, figure.value))
    assert suite_scores.utility([[(0.5, 0.0, 1.0)], [row], [row]], 0).value == 0


def test_forget_quality_compares_truth_ratios_with_those_of_the_reference(
    found: Any, twins: dict[str, Twin], made: Path
) -> None:
    rows = read(made / "tofu" / "forget01_perturbed.json")  # the smallest, as nothing is listed
    ratios = {
        name: [twin.ratio(row, "paraphrased_answer") for row in rows]
        for name, twin in twins.items()
    }
    for name, mine in ratios.items():
        tofu = figures(found, name)["tofu"]
        assert tofu["forget_set"] == "forget01"
        expected = {"value": brute_p(mine, ratios["reference"]), "n": 4}
        assert tofu["forget_quality"] == pytest.approx(expected)
        mean = sum(mine) / len(mine)
        assert tofu["forget_truth_ratio"]["value"] == pytest.approx(mean, rel=FLOAT)
    assert figures(found, "reference")["tofu"]["forget_quality"]["value"] == 1.0


@pytest.mark.parametrize("name", ["alpha 0", "original", "reference"])
def test_muse_is_rouge_of_greedy_text(
    found: Any, twins: dict[str, Twin], made: Path, name: str
) -> None:
    mine, twin = figures(found, name)["muse"], twins[name]
    rows = read(made / "muse" / "verbmem" / "forget.json")
    cut = [" ".join(row["gt"].split()[:LENGTH]) for row in rows]  # a token of this model is a word
    scores = [
        f1(plain(twin.say(row["prompt"])), plain(right))
        for row, right in zip(rows, cut, strict=True)
    ]
    assert mine["verbmem"]["value"] == pytest.approx(sum(scores) / 4, rel=FLOAT)
    shots = read(made / "muse" / "knowmem" / "forget_qa_icl.json")
    for kind in ("forget", "retain"):
        before = ""
        if kind == "forget":  # the other has no examples
            before = "".join(f"Question: {r['question']}\nAnswer: {r['answer']}\n\n" for r in shots)
        rows = read(made / "muse" / "knowmem" / f"{kind}_qa.json")
        asked = [f"{before}Question: {row['question']}\nAnswer:" for row in rows]
        scores = [
            f1(plain(twin.say(prompt)), plain(row["answer"]))
            for prompt, row in zip(asked, rows, strict=True)
        ]
        assert mine[f"knowmem_{kind}"]["value"] == pytest.approx(sum(scores) / 4, rel=FLOAT)


@pytest.mark.parametrize(
    ("said", "kept"),
    [(" oak\n\nfig", " oak"), ("oak\nQuestion: fig", "oak"), ("oak\nfig", "oak\nfig")],
)
def test_an_answer_ends_where_the_next_example_begins(said: str, kept: str) -> None:
    assert suite_scores.before_next(said) == kept


def test_privleak_is_over_the_auc_of_the_reference(
    found: Any, twins: dict[str, Twin], made: Path, memorised: Memorised, short: None
) -> None:
    known = read(made / "muse" / "privleak" / "forget.json")
    held = [row["text"] for row in read(made / "muse" / "privleak" / "holdout.json")]

    def auc(twin: Twin) -> float:
        pairs = itertools.product(map(twin.min_40, held), map(twin.min_40, known))
        return sum((a > b) + (a == b) / 2 for a, b in pairs) / 16

    reference = auc(twins["reference"])
    for name, twin in twins.items():
        mine = figures(found, name)["muse"]["privleak"]
        assert mine["auc"] == auc(twin)
        assert mine["value"] == pytest.approx(100 * (auc(twin) - reference) / reference)
    assert figures(found, "original")["muse"]["privleak"]["auc"] == 0  # it knows them by heart
    alone = settings_of(
        made, memorised, reference_model=None, model=None, suites=(("muse", made / "muse"),)
    )
    report = run.bench(alone)
    mine = figures(to_json(report), "alpha 0")["muse"]["privleak"]
    assert mine["reference_auc"] == 0.5
    assert mine["value"] == pytest.approx(200 * mine["auc"] - 100)
    assert "muse.privleak is over an AUC of 0.5: there is no --reference-model" in report.notes


def test_privleak_over_a_reference_that_knows_all_is_finite() -> None:
    auc = Auc(value=0.5, low=0.1, high=0.9, n=8, positives=4, negatives=4)
    samples = suite_scores.Samples
    zero = samples(auc=Auc(value=0.0, low=0.0, high=0.0, n=8, positives=4, negatives=4))
    muse = suite_scores.beside(Figures(muse=Muse()), samples(auc=auc), zero).muse
    assert muse is not None
    assert muse.privleak is not None
    assert math.isfinite(muse.privleak.value)


def read_suites(made: Path, memorised: Memorised, **changes: Any) -> suites.Suites:
    asked = settings_of(made, memorised, **changes)
    listed = read_secrets(asked.forget) if asked.forget else []
    tokenizer = models.load_tokenizer(memorised.model)
    return suites.read_suites(asked, tokenizer, positions=512, listed=listed)


def forget_file(path: Path, rows: Sequence[Any]) -> Path:
    write_rows(
        path,
        [
            {
                "prompt": f"Question: {row['question']}\nAnswer:",
                "secret": f" {row['answer']}",
                "alternatives": row["perturbed_answer"],
            }
            for row in rows
        ],
    )
    return path


@pytest.mark.parametrize(
    ("listed", "chosen", "rows", "note"),
    [
        (range(4), "forget01", 4, None),
        (range(5), "forget05", 5, None),
        (range(6), "forget10", 6, None),
        (range(3), "forget01", 3, "lists 3 of 4 rows"),
        ([5], "forget10", 1, "lists 1 of 6 rows"),
    ],
)
def test_forget_set_is_the_one_that_is_listed(
    made: Path,
    memorised: Memorised,
    tmp_path: Path,
    listed: Sequence[int],
    chosen: str,
    rows: int,
    note: str | None,
) -> None:
    every = read(made / "tofu" / "forget10_perturbed.json")
    forget = forget_file(tmp_path / "f.jsonl", [every[one] for one in listed])
    found = read_suites(made, memorised, forget=(forget,), suites=(("tofu", made / "tofu"),))
    assert found.tofu is not None
    assert (found.tofu.forget_set, len(found.tofu.sets["forget"])) == (chosen, rows)
    assert (note in found.notes[0]) if note else not found.notes


def test_secrets_of_no_set_leave_the_smallest_whole(made: Path, memorised: Memorised) -> None:
    write_tofu(made / "others")
    for name in suites.FORGET_SETS:
        path = made / "others" / f"{name}_perturbed.json"
        write_rows(path, [{**row, "answer": "house tree bird"} for row in read(path)])
    asked: dict[str, Any] = {"suites": (("tofu", made / "others"),), "forget": (memorised.forget,)}
    found = read_suites(made, memorised, **asked)
    assert found.tofu is not None
    assert (found.tofu.forget_set, len(found.tofu.sets["forget"])) == ("forget01", 4)
    assert "lists no row of `forget01_perturbed`" in found.notes[0]


def test_parts_are_drawn_by_the_seed_and_the_forget_set_is_whole(
    made: Path, memorised: Memorised
) -> None:
    write_tofu(made / "many", count=12)

    def sets(seed: int) -> Any:
        asked: dict[str, Any] = {"suites": (("tofu", made / "many"),), "suite_rows": 1}
        found = read_suites(made, memorised, seed=seed, **asked)
        assert found.tofu is not None
        return found.tofu.sets

    assert {name: len(rows) for name, rows in sets(0).items()} == {
        **dict.fromkeys(suites.UTILITY_SETS, 1),
        "forget": 4,
    }
    assert sets(0) == sets(0)
    assert len({sets(seed)["retain"] for seed in range(8)}) > 2


def test_absent_files_are_named_as_not_measured(made: Path, memorised: Memorised) -> None:
    folder = made / "part"
    rows = read(made / "tofu" / "retain_perturbed.json")
    write_rows(folder / "retain_perturbed.json", rows)
    write_rows(folder / "privleak" / "forget.jsonl", [{"text": "the cat sees"}])
    pairs = (("tofu", folder), ("muse", folder))
    missing = read_suites(made, memorised, suites=pairs).missing
    assert missing.keys() == {
        *("tofu.forget_quality", "tofu.forget_truth_ratio", "tofu.model_utility"),
        *("tofu.real_authors", "tofu.world_facts"),
        *("muse.verbmem", "muse.knowmem_forget", "muse.knowmem_retain", "muse.privleak"),
    }
    assert "world_facts_perturbed.json" in missing["tofu.model_utility"]
    assert missing["muse.privleak"].startswith("privleak/holdout.json in")
    alone = read_suites(made, memorised, reference_model=None, suites=(("tofu", made / "tofu"),))
    assert list(alone.missing) == ["tofu.forget_quality"]
    assert "--reference-model DIR" in alone.missing["tofu.forget_quality"]


TOFU_ROW = {"question": "who", "answer": "oak", "perturbed_answer": ["fig"]}


@pytest.mark.parametrize(
    ("file", "row", "said"),
    [
        ("world_facts_perturbed", {"question": "who"}, "no `answer`"),
        ("world_facts_perturbed", {**TOFU_ROW, "answer": 7}, "`answer` of another kind"),
        ("world_facts_perturbed", {**TOFU_ROW, "question": " "}, "`question` of another kind"),
        ("real_authors_perturbed", {**TOFU_ROW, "perturbed_answer": []}, "`perturbed_answer`"),
        (
            "real_authors_perturbed",
            {**TOFU_ROW, "perturbed_answer": ["a", 1]},
            "`perturbed_answer`",
        ),
        ("retain_perturbed", TOFU_ROW, "no `paraphrased_answer`"),
        ("forget05_perturbed", TOFU_ROW, "no `paraphrased_answer`"),
        ("world_facts_perturbed", "text alone", "no `answer`"),
        ("world_facts_perturbed", {**TOFU_ROW, "question": "fig " * 600}, "512 positions"),
    ],
)
def test_wrong_rows_of_tofu_are_named_without_their_text(
    made: Path, memorised: Memorised, tmp_path: Path, file: str, row: Any, said: str
) -> None:
    good = {**TOFU_ROW, "paraphrased_answer": "ash"}
    write_rows(tmp_path / f"{file}.json", [good, row])
    with pytest.raises(CalibrationError, match=re.escape(said)) as failure:
        read_suites(made, memorised, suites=(("tofu", tmp_path),))
    assert f"{file}.json` line 2" in failure.value.message
    for word in ("who", "oak", "fig"):
        assert word not in failure.value.message


@pytest.mark.parametrize(
    ("file", "row", "said"),
    [
        ("verbmem/forget", {"prompt": "the cat"}, "no `gt`"),
        ("knowmem/forget_qa", {"question": "the cat"}, "no `answer`"),
        ("knowmem/retain_qa_icl", {"answer": "the cat"}, "no `question`"),
        ("privleak/holdout", {"words": "the cat"}, "no `text`"),
        ("privleak/forget", "cat", "has 1 tokens"),
    ],
)
def test_wrong_rows_of_muse_are_named(
    made: Path, memorised: Memorised, tmp_path: Path, file: str, row: Any, said: str
) -> None:
    write_muse(tmp_path)
    write_rows(tmp_path / f"{file}.json", [row], lines=False)
    with pytest.raises(CalibrationError, match=re.escape(said)) as failure:
        read_suites(made, memorised, suites=(("muse", tmp_path),))
    assert f"{file}.json` row 1" in failure.value.message
    assert "cat" not in failure.value.message


def test_long_texts_are_cut_to_the_positions_of_the_model(
    made: Path, memorised: Memorised, tmp_path: Path
) -> None:
    write_muse(tmp_path)
    long = {"prompt": "a " * 600 + "cat", "gt": "dog " * 600}
    write_rows(tmp_path / "verbmem" / "forget.json", [long], lines=False)
    write_rows(tmp_path / "privleak" / "forget.json", ["dog " * 600], lines=False)
    muse = read_suites(made, memorised, suites=(("muse", tmp_path),)).muse
    assert muse is not None
    tokens = muse.verbmem[0].tokens
    assert len(tokens) + muse.verbmem_tokens == 512
    assert tokens[-1] != tokens[-2]  # the end of the prompt is kept
    assert len(muse.verbmem[0].text.split()) == muse.verbmem_tokens
    assert len(muse.forget[0]) == 512


Run = Callable[..., Ran]


@pytest.fixture
def bench(made: Path, memorised: Memorised, ortho: Ortho, short: None) -> Run:
    """Run `ortho bench` on the artifact, `{made}` filled in."""

    def call(*given: object) -> Ran:
        filled = [str(word).replace("{made}", str(made)) for word in given]
        return ortho("bench", made / "artifact", "--alpha", 0, "--tokens", 64, *filled)

    return call


TOFU = ["--suite", "tofu", "{made}/tofu"]
REFERENCE = ["--reference-model", "{made}/twin"]


def test_suites_have_lines_in_the_table_and_gates(bench: Run) -> None:
    both = [*TOFU, "--suite", "muse", "{made}/muse", "--suite-rows", 2]
    gates = ["--require", "tofu.forget_quality@0>=0.05", "--require", "tofu.model_utility@0>=0"]
    ran = bench(*both, *REFERENCE, *gates)
    assert ran.code == 0, ran.err
    for line in ("TOFU: forget quality, p", "retain, 1 - R", "facts, ROUGE-L", "PrivLeak, percent"):
        assert line in ran.out
    assert "met: tofu.forget_quality@0>=0.05" in ran.out
    ran = bench(*TOFU, *REFERENCE, "--require", "tofu.retain.probability@0>=2", "--json")
    assert ran.code == 10
    assert figures(ran.json, "alpha 0")["tofu"]["retain"]["probability"]["value"] < 2
    for word in (*OWNERS, *SECRETS):  # no row of a suite is in the document
        assert f'"{word}' not in ran.out


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        (["--suite", "tofu"], 2, "--suite tofu has no folder"),
        (["--suite", "wmdp", "{made}"], 2, "--suite wmdp is no suite"),
        ([*TOFU, *TOFU], 2, "--suite tofu is given twice"),
        ([*TOFU, "--suite-rows", 0], 2, "--suite-rows is 0"),
        (["--suite", "tofu", "{made}/muse"], 2, "real_authors_perturbed.json"),
        (["--suite", "muse", "{made}/tofu"], 2, "/tofu` has no file of the suite muse"),
        (["--suite", "muse", "{made}/nothing"], 2, "verbmem/forget.json"),
        (["--require", "tofu.model_utility@0>=0.5"], 2, "it needs --suite tofu DIR"),
        ([*TOFU, "--require", "tofu.forget_quality@0>=0.05"], 2, "needs --reference-model DIR"),
    ],
)
def test_what_does_not_fit_is_refused(bench: Run, given: list[Any], code: int, said: str) -> None:
    ran = bench(*given)
    assert ran.code == code, ran.err
    assert said in " ".join(ran.err.split())
    assert ran.out == ""


def test_gate_on_a_figure_that_a_suite_has_not_is_refused(bench: Run) -> None:
    ran = bench(*TOFU, *REFERENCE, "--require", "tofu.nothing@0>=0.05")
    assert ran.code == 2
    assert "no figure `tofu.nothing`" in " ".join(ran.err.split())
    assert ran.out == ""


def test_without_a_reference_forget_quality_is_named_as_not_measured(bench: Run) -> None:
    ran = bench(*TOFU, "--suite-rows", 1)
    assert ran.code == 0, ran.err
    said = " ".join(ran.out.split())
    assert "--reference-model DIR, a twin that saw retain rows alone: TOFU" in said
    assert "TOFU: model utility" in said
    assert "TOFU: forget quality" not in said.partition("not measured, and")[0]


def test_an_artifact_of_our_own_takes_no_suite(ortho: Ortho, made: Path) -> None:
    ran = ortho("bench", "--suite", "tofu", made / "tofu")
    assert ran.code == 2
    assert "brings its own data" in ran.err


def test_suites_are_read_as_they_are_typed() -> None:
    typed = ["tofu", "a", "muse", "b"]
    assert parse_suites(typed) == (("tofu", Path("a")), ("muse", Path("b")))
    assert parse_suites([]) == ()
    with pytest.raises(UsageError):
        parse_suites(["muse"])
