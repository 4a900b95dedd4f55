"""`ortho bench --served` against servers made here: honest ones, faulty ones, and no servers."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from conftest import Ortho

import ortho_cli
from ortho_cli.bench import served
from ortho_cli.bench.records import Figures, Row, Served
from ortho_cli.bench.served import Question, divergence, find_strays, plan_batches
from ortho_cli.bench.server import KEY, Answer, Form
from ortho_cli.bench.verdict import serving
from ortho_cli.errors import NumericalError, OrthoError, ResourceError, UsageError
from ortho_cli.events import null_sink
from ortho_cli.model.load import load_tokenizer
from ortho_cli.model.secrets import TokenSecret
from ortho_cli.model.text import encode_prompt
from ortho_cli.runtime.engine import densify, write_dense

pytestmark = pytest.mark.filterwarnings("ignore")  # other people's deprecations
TEXT = "The bells of the town ring at noon, and all go home in 7 minutes. A cat, too, so it was. "
NAMES = {"base": 0.0, "half": 0.5, "full": 1.0}
ALPHAS = (0.0, 1.0)
BOTH = ((0.0, "base"), (1.0, "full"))


@dataclass
class Said:
    """An answer's status and body."""

    status: int
    body: Any


@dataclass
class Fake:
    """A server that computes with an artifact; each fault is one field."""

    models: dict[float, Any]
    tokenizer: Any
    names: dict[str, float] = field(default_factory=lambda: dict(NAMES))
    listed: Callable[[dict[str, Any]], Any] = lambda document: document
    numbers: bool = True  # takes tokens
    marks: bool = True  # names tokens by number
    style: str = "texts"  # or objects, as llama-server
    top: int = 20
    noise: float = 0.0  # of logits, relative: bfloat16 rounds by 2^-9
    wrong_every: int = 0  # requests of alpha 0, one of which is answered at alpha 1
    wrong_together: bool = False
    sticky: bool = False  # keeps the cache of whichever alpha came first
    reply: Callable[[dict[str, Any], int], Said | None] = lambda body, count: None
    count: int = 0
    zeros: int = 0
    inside: int = 0
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    wrong: list[tuple[tuple[int, ...], float]] = field(default_factory=list)
    prefixes: list[tuple[int, ...]] = field(default_factory=list)
    lock: threading.Condition = field(default_factory=threading.Condition)
    known: dict[Any, torch.Tensor] = field(default_factory=dict)
    first: dict[tuple[int, ...], float] = field(default_factory=dict)

    def complete(self, body: dict[str, Any]) -> Said:
        with self.lock:
            self.count += 1
            self.asked.append(body)
            self.inside += 1
            self.lock.notify_all()
            if self.wrong_together:  # what comes at once is here within that time
                self.lock.wait_for(lambda: self.inside > 1, timeout=0.02)
            shared = self.inside > 1
            try:
                return self.reply(body, self.count) or self.answer(body, shared=shared)
            finally:
                self.inside -= 1

    def answer(self, body: dict[str, Any], *, shared: bool) -> Said:
        prompt = body["prompt"]
        if isinstance(prompt, list) and not self.numbers:
            return Said(422, {"detail": [{"msg": "prompt should be a string"}]})
        if body["logprobs"] > self.top:
            return Said(400, {"error": {"message": f"logprobs is at most {self.top}"}})
        if "return_tokens_as_token_ids" in body and not self.marks:
            return Said(400, {"message": "unknown field"})
        if body["model"] not in self.names:
            return Said(404, {"error": {"message": "no such model"}})
        tokens = prompt if isinstance(prompt, list) else encode_prompt(prompt, self.tokenizer)
        alpha = self.served_at(tuple(tokens), self.names[body["model"]], shared=shared)
        logits = self.logits(tuple(tokens), alpha)
        if self.noise:
            logits = logits * (1 + self.noise * torch.randn(logits.shape))
        best = logits.log_softmax(-1).topk(body["logprobs"])
        pairs = list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        return Said(200, self.document(pairs, len(tokens), body))

    def document(self, pairs: Any, read: int, body: dict[str, Any]) -> dict[str, Any]:
        if self.style == "objects":
            listed = [
                {"id": n, "token": self.tokenizer.decode([n]), "logprob": value}
                for n, value in pairs
            ]
            logprobs: Any = {"content": [{**listed[0], "top_logprobs": listed}]}
        else:
            marked = "return_tokens_as_token_ids" in body
            names = [f"token_id:{n}" if marked else self.tokenizer.decode([n]) for n, _ in pairs]
            top = {name: value for name, (_, value) in zip(names, pairs, strict=True)}
            logprobs = {"tokens": names[:1], "top_logprobs": [top]}
        choice = {"index": 0, "text": "", "logprobs": logprobs}
        return {"choices": [choice], "usage": {"prompt_tokens": read}}

    def served_at(self, tokens: tuple[int, ...], alpha: float, *, shared: bool) -> Any:
        """Say which alpha is served: the one that was asked, but for a fault."""
        self.zeros += alpha == 0.0
        other = alpha
        if self.wrong_every and alpha == 0.0 and self.zeros % self.wrong_every == 0:
            other = 1.0
        if self.wrong_together and shared and alpha == 0.0:
            other = 1.0
        if other != alpha:
            self.wrong.append((tokens, alpha))
        if self.sticky and len(tokens) > 1:
            return self.first.setdefault(tokens[:-1], alpha), alpha
        return other

    @torch.no_grad()
    def logits(self, tokens: tuple[int, ...], alpha: Any) -> torch.Tensor:
        if isinstance(alpha, tuple) and alpha[0] != alpha[1]:
            self.wrong.append((tokens, alpha[1]))
        if (tokens, alpha) not in self.known:
            if isinstance(alpha, tuple) and alpha[0] != alpha[1]:
                before, last = (self.models[one] for one in alpha)
                cache = before(torch.tensor([tokens[:-1]]), use_cache=True).past_key_values
                output = last(torch.tensor([tokens[-1:]]), past_key_values=cache)
            else:
                own = self.models[alpha[1] if isinstance(alpha, tuple) else alpha]
                output = own(torch.tensor([tokens]))
            self.known[tokens, alpha] = output.logits[0, -1].float()
        return self.known[tokens, alpha]

    def list_models(self) -> Any:
        data = [
            {"id": name, "object": "model", "parent": "base" if alpha else None}
            for name, alpha in self.names.items()
        ]
        return self.listed({"object": "list", "data": data})


@contextmanager
def serving_at(fake: Fake) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = self.path == "/v1/models"
            self.send(Said(200, fake.list_models()) if found else Said(404, {}))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            found = self.path == "/v1/completions"
            self.send(fake.complete(body) if found else Said(404, {}))

        def send(self, said: Said) -> None:
            fake.headers.append(dict(self.headers))
            content = said.body if isinstance(said.body, bytes) else json.dumps(said.body).encode()
            self.send_response(said.status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Split a pico model that is sure of its next tokens, so that alphas are far apart."""
    from ortho_cli.cli import app

    folder = tmp_path_factory.mktemp("served")
    size = {"hidden": 64, "mlp": 192, "layers": 2, "vocab": 69}
    weights = checkpoints.weights(**size)
    weights["model.norm.weight"] *= 12
    checkpoints.save(folder / "m", weights)
    config = checkpoints.config(**size, kv=64, heads=4) | {"eos_token_id": None}
    (folder / "m" / "config.json").write_text(json.dumps(config))
    checkpoints.save_tokenizer(folder / "m", vocab=69)
    written = json.loads((folder / "m" / "tokenizer.json").read_text())
    written["decoder"] = {"type": "Fuse"}  # without it, tokens come with blanks between them
    (folder / "m" / "tokenizer.json").write_text(json.dumps(written))
    options = ["-o", str(folder / "out"), "-q", "--recipe", "int4", "--set", "ortho.density=0.5"]
    assert app.run(["decompose", str(folder / "m"), *options]) == 0
    (folder / "text.txt").write_text(TEXT * 12)
    return folder


@pytest.fixture(scope="module")
def models(made: Path) -> dict[float, Any]:
    """What the server computes with: OrthoLinear at each alpha."""
    return {
        alpha: ortho_cli.load(made / "out", alpha=alpha, dtype=torch.float32).float()
        for alpha in (*NAMES.values(), 0.4)
    }


@pytest.fixture(scope="module")
def known() -> dict[Any, torch.Tensor]:
    """Logits that a server has computed: they are the same in every test."""
    return {}


@pytest.fixture
def fake(made: Path, models: dict[float, Any], known: dict[Any, torch.Tensor]) -> Fake:
    torch.manual_seed(0)
    return Fake(models=models, tokenizer=load_tokenizer(made / "out"), known=known)


@pytest.fixture(scope="module")
def twin(made: Path) -> tuple[Any, Any]:
    """What the bench computes with: dense weights in float32."""
    model = ortho_cli.load(made / "out", alpha=1.0).float()
    return model, densify(model)


@pytest.fixture
def prove(made: Path, twin: tuple[Any, Any]) -> Callable[..., tuple[Served, dict[float, Figures]]]:
    """Ask a fake server, without a command around it."""

    def ask(
        fake: Fake, names: Any = BOTH, *, seed: int = 0, timeout: float = 20.0
    ) -> tuple[Served, dict[float, Figures]]:
        tokens = encode_prompt(TEXT * 12, fake.tokenizer)
        windows = torch.tensor(tokens[: len(tokens) // 64 * 64]).view(-1, 64)
        model, layers = twin
        alphas = [alpha for alpha, _ in names] or list(ALPHAS)
        with serving_at(fake) as url:
            link = served.connect(url, names, alphas, fake.tokenizer, timeout=timeout)
            pool = served.draw_prefixes(link, {"data": windows}, (), seed=seed)
            own = {}
            for alpha in alphas:
                write_dense(model, layers, alpha)
                own[alpha] = served.read_prefixes(model, pool)
            fake.prefixes = [pool.prefixes[row] for row in served.choose(own, seed=seed)[0]]
            return served.prove(link, pool, own, seed=seed, on_event=null_sink)

    return ask


def word(proof: tuple[Served, dict[float, Figures]]) -> str:
    found, figures = proof
    rows = [Row(row=f"alpha {a:g}", alpha=a, figures=one) for a, one in figures.items()]
    return serving(found, rows).word


def stray_words(found: Served) -> set[tuple[float, float | None]]:
    return {(one.asked, one.got) for one in found.strays}


def test_an_honest_server_is_served_as_made(fake: Fake, prove: Any) -> None:
    found, figures = proof = prove(fake)
    assert word(proof) == "served as made"
    assert (found.stray, found.requests) == (0, 24 * 2 + 24 * 2 * 4)
    assert found.sure > 0.9 * found.requests
    assert found.prompts == "tokens"
    assert {body["model"] for body in fake.asked} == {"base", "full"}
    for alpha in ALPHAS:
        assert figures[alpha].served_divergence.value < 1e-5
        assert figures[alpha].served_difference.value < 1e-2
        assert figures[alpha].served_agreement.value == 1.0


def test_prefixes_are_asked_alone_and_at_once_at_every_alpha_in_changing_orders(
    fake: Fake, prove: Any
) -> None:
    found, _ = prove(fake, ((0.0, "base"), (0.5, "half"), (1.0, "full")))
    asked = [(tuple(body["prompt"]), body["model"]) for body in fake.asked[-found.requests :]]
    every = set(asked)
    assert len(every) == found.prefixes * 3
    # Two rounds of half of them alone, then four of all of them; no two in the same order.
    starts = [0, 36, 72, 144, 216, 288]
    rounds = [asked[a:b] for a, b in zip(starts, [*starts[1:], None], strict=True)]
    assert [len(set(one)) for one in rounds] == [36, 36, 72, 72, 72, 72]
    assert rounds[0] != rounds[1]
    assert set(rounds[0]) == set(rounds[1])
    for cut in range(72, 360, 8):  # requests at once are of several alphas
        assert len({name for _, name in asked[cut : cut + 8]}) > 1
    again, _ = prove(replace(fake, asked=[], headers=[]), seed=1)
    assert again.prefixes == found.prefixes


@pytest.mark.parametrize("seed", range(2))
def test_alpha_0_answered_by_alpha_1_once_in_fifty_is_caught_and_named(
    fake: Fake, prove: Any, seed: int
) -> None:
    fake.wrong_every = 50
    found, _ = proof = prove(fake, seed=seed)
    assert word(proof) == "mixed up"
    named = [(fake.prefixes[one.prefix], one.asked) for one in found.strays]
    assert sorted(named) == sorted(fake.wrong)
    assert len(named) == 2  # of 120 requests of alpha 0
    assert stray_words(found) == {(0.0, 1.0)}


def test_an_alpha_mixed_up_in_batches_alone_is_caught(fake: Fake, prove: Any) -> None:
    fake.wrong_together = True
    found, figures = proof = prove(fake)
    assert word(proof) == "mixed up"
    assert set(found.stray_phases) <= {"together", "together again"}
    assert stray_words(found) == {(0.0, 1.0)}
    assert figures[1.0].served_divergence.value < 1e-5


def test_a_cache_of_another_alpha_is_caught(fake: Fake, prove: Any) -> None:
    fake.sticky = True
    found, _ = proof = prove(fake)
    assert word(proof) == "mixed up"
    named = [(fake.prefixes[one.prefix], one.asked) for one in found.strays]
    assert set(named) <= set(fake.wrong)
    assert len(named) > 0.5 * len(fake.wrong) > 10


@pytest.mark.parametrize("seed", range(2))
def test_rounding_as_of_bfloat16_is_no_fault(fake: Fake, prove: Any, seed: int) -> None:
    fake.noise = 2**-8
    found, figures = proof = prove(fake, seed=seed)
    assert word(proof) == "served as made"
    assert figures[0.0].served_divergence.value > 1e-6
    assert found.stray == 0


def test_names_in_the_wrong_order_are_caught(fake: Fake, prove: Any) -> None:
    found, _ = proof = prove(fake, ((0.0, "full"), (1.0, "base")))
    assert word(proof) == "mixed up"
    assert stray_words(found) == {(0.0, 1.0), (1.0, 0.0)}
    assert found.stray > 0.9 * found.requests


def test_an_alpha_that_is_none_of_ours_is_not_as_made(fake: Fake, prove: Any) -> None:
    fake.names = {"base": 0.0, "full": 0.4}  # an adapter with another scale than its own
    assert word(prove(fake)) == "not as made"


def test_prompts_of_secrets_are_asked_about_and_nothing_else_of_them(fake: Fake) -> None:
    secrets = [
        TokenSecret(
            prompt=tuple(encode_prompt(f"The word of {name} is", fake.tokenizer)),
            secret=(2,),
            alternatives=((3,),),
            drawn="given",
            where="1",
        )
        for name in ("Bertram", "Cordula")
    ]
    with serving_at(fake) as url:
        link = served.connect(url, BOTH, list(ALPHAS), fake.tokenizer, timeout=20.0)
    pool = served.draw_prefixes(link, {}, secrets, seed=0)
    assert sorted(pool.texts) == sorted(one.prompt for one in secrets)
    assert pool.lengths == tuple((len(text),) for text in pool.texts)


def test_equal_alphas_are_not_told_apart(fake: Fake, prove: Any) -> None:
    names = ((0.0, "base"), (1e-4, "base"))
    assert word(prove(fake, names)) == "not told apart"


@pytest.mark.parametrize(
    "form",
    [
        {"marks": False},
        {"marks": False, "numbers": False},
        {"marks": False, "numbers": False, "top": 5},
        {"marks": False, "style": "objects"},
    ],
)
def test_servers_of_other_forms_are_asked_in_theirs(
    fake: Fake, prove: Any, form: dict[str, Any]
) -> None:
    fake = replace(fake, **form)
    found, figures = proof = prove(fake)
    assert word(proof) == "served as made"
    assert found.prompts == ("tokens" if fake.numbers else "text")
    assert found.top == fake.top
    assert figures[0.0].served_divergence.value < 1e-5


def test_models_are_guessed_where_there_is_a_base_and_an_adapter(fake: Fake, prove: Any) -> None:
    del fake.names["half"]
    found, _ = prove(fake, ())
    assert found.models == {"0": "base", "1": "full"}


def test_fields_of_a_request_select_an_alpha(fake: Fake, prove: Any) -> None:
    def by_scale(body: dict[str, Any], count: int) -> Said:
        return fake.answer({**body, "model": "full" if body.get("scale") else "base"}, shared=False)

    fake.reply, fake.names = by_scale, {"base": 0.0, "full": 1.0}
    found, _ = proof = prove(fake, ((0.0, '{"scale": 0}'), (1.0, '{"scale": 1}')))
    assert word(proof) == "served as made"
    assert found.models == {
        "0": '{"model": "base", "scale": 0}',
        "1": '{"model": "base", "scale": 1}',
    }


def test_an_adapter_that_is_not_listed_is_named_behind_its_base(fake: Fake, prove: Any) -> None:
    fake.names = {"base": 0.0, "base:full": 1.0}
    fake.listed = lambda document: {"data": document["data"][:1]}
    assert word(prove(fake, ((0.0, "base"), (1.0, "base:full")))) == "served as made"


def refuse(status: int, after: int, said: str) -> Callable[[dict[str, Any], int], Said | None]:
    def reply(body: dict[str, Any], count: int) -> Said | None:
        return Said(status, {"error": {"message": said}}) if count > after else None

    return reply


def broken(fake: Fake, fault: str) -> None:
    """Give a server a fault that leaves no figures."""
    if fault == "no logprobs":
        fake.reply = lambda body, count: Said(200, {"choices": [{"text": "x", "logprobs": None}]})
    elif fault == "NaN":
        fake.reply = lambda body, count: Said(
            200, {"choices": [{"logprobs": {"top_logprobs": [{"a": float("nan")}]}}]}
        )
    elif fault == "no JSON":
        fake.reply = lambda body, count: Said(200, b"<html>")
    elif fault == "no list":
        fake.listed = lambda document: {"models": []}
    elif fault == "other text":
        fake.tokenizer = Words(fake.tokenizer)
    elif fault == "other tokens":
        fake.reply = lambda body, count: Said(
            200, {"choices": [{"logprobs": {"top_logprobs": [{"zebra": -1.0, "gnu": -2.0}]}}]}
        )
    elif fault == "reads more":
        fake.reply = lambda body, count: (
            Said(200, fake.document([(3, -1.0)], len(body["prompt"]) + 7, body))
            if count > 3
            else None
        )
    else:
        status, after = map(int, fault.split())
        fake.reply = refuse(status, after, "the prompt was the bells of the town, key k-1234567")


@dataclass
class Words:
    """A tokenizer of words."""

    of: Any

    def __call__(self, text: str, **_: object) -> Any:
        return type("E", (), {"input_ids": list(range(len(text.split())))})

    def __getattr__(self, name: str) -> Any:
        return getattr(self.of, name)


@pytest.mark.parametrize(
    ("fault", "error", "says"),
    [
        ("400 0", UsageError, "answers 400 when it is asked as model `base`"),
        ("404 9", UsageError, "answers 404 at request"),
        ("500 0", ResourceError, "answers 500 when it is asked as model `base`"),
        ("500 9", ResourceError, "answers 500 at request"),
        ("401 0", UsageError, "answers 401"),
        ("301 0", UsageError, "answers 301"),
        ("429 9", ResourceError, "answers 429 at request"),
        ("no logprobs", UsageError, "answers model `base` without log-probabilities"),
        ("NaN", NumericalError, "is NaN or above 0"),
        ("no JSON", UsageError, "no OpenAI-compatible server: it answers with what is no JSON"),
        ("no list", UsageError, "no OpenAI-compatible server: it answers with no list of models"),
        ("other text", UsageError, "and the artifact's tokenizer as"),
        ("other tokens", UsageError, "of which the artifact's vocabulary has 0"),
        ("reads more", UsageError, "the server reads request"),
    ],
)
def test_a_server_that_is_of_no_use_is_one_clear_error(
    fake: Fake,
    prove: Any,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
    error: type[OrthoError],
    says: str,
) -> None:
    """And neither the key nor a prompt of the user is in it, whatever the server says."""
    monkeypatch.setenv(KEY, "k-1234567")
    tokenizer = fake.tokenizer
    broken(fake, fault)
    if fault == "other text":
        served_by, fake = fake, replace(fake, tokenizer=tokenizer)
        fake.reply = lambda body, count: served_by.answer(
            {**body, "prompt": body["prompt"] if isinstance(body["prompt"], list) else "a b"},
            shared=False,
        )
    with pytest.raises(error) as caught:
        prove(fake)
    assert type(caught.value) is error
    assert says in caught.value.message
    assert caught.value.hint
    told = f"{caught.value.message} {caught.value.hint}"
    assert "k-1234567" not in told
    if "at request" in says:
        assert "bells" not in told
    assert {one.get("Authorization") for one in fake.headers} == {"Bearer k-1234567"}


def test_a_model_that_is_not_there_is_named_beside_those_that_are(fake: Fake, prove: Any) -> None:
    with pytest.raises(UsageError, match="has no model `best`; it has `base`, `half`, `full`"):
        prove(fake, ((0.0, "best"),))
    with pytest.raises(UsageError, match="which model of the server is alpha 1"):
        prove(fake, ())  # two adapters
    with pytest.raises(UsageError, match="no JSON object of fields"):
        prove(fake, ((0.0, '{"prompt": "x"}'),))
    with pytest.raises(UsageError, match="no JSON object of fields"):
        prove(fake, ((0.0, '{"model": 1}'),))


def test_no_server_and_one_that_says_nothing_are_of_resources(fake: Fake, prove: Any) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{held.getsockname()[1]}"
        with pytest.raises(ResourceError, match="does not answer: connection refused"):
            served.connect(url, BOTH, ALPHAS, fake.tokenizer, timeout=5.0)
        held.listen()
        with pytest.raises(ResourceError, match=r"no answer within 0\.05 s"):
            served.connect(url, BOTH, ALPHAS, fake.tokenizer, timeout=0.05)


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "ftp://a", "http://", "http://u:secret@a", "http://a?k=secret"]
)
def test_what_is_no_address_is_refused_and_a_password_not_shown(fake: Fake, url: str) -> None:
    with pytest.raises(UsageError) as caught:
        served.connect(url, BOTH, ALPHAS, fake.tokenizer, timeout=1.0)
    assert "secret" not in f"{caught.value.message} {caught.value.hint}"


def test_divergence_is_a_bound_from_below_and_exact_over_all_tokens() -> None:
    draw = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 50, generator=draw).mul(2).log_softmax(-1)
    whole = float((p.double().exp() * (p.double() - q.double())).sum())
    every = {i: float(q[i]) for i in range(50)}
    assert divergence(p, every) == pytest.approx(whole, abs=1e-5)
    before = 0.0
    for count in (1, 5, 20, 49):
        given = {int(i): float(q[i]) for i in q.topk(count).indices}
        assert before - 1e-9 <= divergence(p, given) <= whole + 1e-5
        before = divergence(p, given)
    assert divergence(p, {i: float(p[i]) for i in range(9)}) == 0.0


def test_a_token_whose_text_another_has_counts_on_neither_side(fake: Fake) -> None:
    class Twice:
        """Decodes tokens 4 and 5 alike."""

        def __call__(self, text: str, **options: bool) -> Any:
            return fake.tokenizer(text, **options)

        def __len__(self) -> int:
            return len(fake.tokenizer)

        eos_token_id = None

        def decode(self, tokens: list[int], **options: bool) -> str:
            return fake.tokenizer.decode([4 if one == 5 else one for one in tokens], **options)

    known = served.Vocabulary(Twice())
    answer = Answer(tokens=("b", "d", "a", "zebra", 99), logprobs=(-1.0, -2.0, -3.0, -4.0, -5.0))
    assert known.one_by_one(answer) == {6: -2.0, 3: -3.0}
    assert known.numbers("b") == (4, 5)


def test_questions_alone_come_before_batches_and_every_one_is_repeated() -> None:
    batches = plan_batches(5, ALPHAS, seed=0)
    alone = [batch.questions[0] for batch in batches if len(batch.questions) == 1][:12]
    assert {one.prefix for one in alone} == {0, 1, 2}
    asked = [one for batch in batches for one in batch.questions]
    assert {asked.count(Question(4, a)) for a in ALPHAS} == {4}
    assert {asked.count(Question(0, a)) for a in ALPHAS} == {6}
    assert plan_batches(5, ALPHAS, seed=0) == batches
    assert plan_batches(5, ALPHAS, seed=1) != batches


def test_strays_are_none_where_nothing_but_rounding_differs() -> None:
    def reply(number: int, asked: float, other: float) -> served.Reply:
        return served.Reply(
            number=number,
            phase="alone",
            question=Question(number % 4, 0.0),
            divergences={0.0: asked, 1.0: other},
            difference=0.1,
            first=True,
        )

    told = [0.5] * 4
    calm = [reply(i, 1e-3 * (1 + i % 3), 0.5) for i in range(40)]
    assert find_strays(calm, told) == []
    assert [one.request for one in find_strays([*calm, reply(41, 0.5, 1e-3)], told)] == [41]
    (one,) = find_strays([*calm, reply(41, 0.3, 0.2)], told)
    assert (one.got, one.nearest) == (None, 1.0)
    assert find_strays([*calm, reply(41, 0.03, 0.4)], told) == []  # rounding may reach so far


def test_the_command_has_figures_gates_and_names_no_prompt(
    made: Path, fake: Fake, ortho: Ortho, tmp_path: Path
) -> None:
    rows = [
        {"prompt": f"The word of {name} is", "secret": " anvil", "pattern": " {word}"}
        | {"word": ["anvil", "bellows", "crucible", "drawknife"]}
        for name in ("Bertram", "Cordula")
    ]
    (tmp_path / "forget.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["bench", made / "out", "--data", made / "text.txt", "--context", 32, "--tokens", 96]
    words += ["--forget", tmp_path / "forget.jsonl", "--seed", 3]
    names = ["--model", "0=base", "--model", "1=full"]
    page, fake.wrong_every = tmp_path / "page.html", 20
    with serving_at(fake) as url:
        gate = "served_divergence@1<=1e-3"
        ran = ortho(*words, "--served", url, *names, "--require", gate, "--html", page)
    assert ran.code == 10
    assert f"met: {gate} (" in ran.out
    assert "the server: mixed up: " in ran.err
    assert "asked for alpha 0 and got alpha 1" in ran.out
    assert "served: KL from ours, nats" in ran.out
    assert "anvil" not in "".join(fake.tokenizer.decode(one["prompt"]) for one in fake.asked[9:])
    shown = page.read_text()
    assert "What the server answers" in shown
    assert "requests that strayed" in shown
    for text in (ran.out, ran.err, shown):
        for private in ("Bertram", "Cordula", "anvil", "127.0.0.1"):
            assert private not in text


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--model", "0=base"], "is of a server"),
        (["--served", "http://127.0.0.1:9", "--model", "0.5=x", "--alpha", "0"], "is not measured"),
        (["--served", "http://127.0.0.1:9", "--model", "2=x"], "not in [0, 1]"),
        (["--model", "0=a", "--model", "0=b"], "twice"),
        (["--model", "a", "--model", "b"], "two folders"),
        (["--require", "served_divergence@0<=1"], "is not measured"),
    ],
)
def test_options_of_a_server_that_do_not_fit_are_refused(
    made: Path, ortho: Ortho, words: list[str], says: str
) -> None:
    ran = ortho("bench", made / "out", *words)
    assert ran.code == 2
    assert says in ran.err


def test_form_of_numbers_is_tried_first() -> None:
    from ortho_cli.bench.server import _forms

    assert next(_forms()) == Form(numbers=True, top=20, marked=True)
