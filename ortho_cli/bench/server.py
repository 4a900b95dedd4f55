"""A client of OpenAI-compatible servers: names of models, and the most likely next tokens.

    GET  URL/v1/models
    POST URL/v1/completions   {"model", "prompt", "max_tokens": 1, "temperature": 0, "logprobs": k}

Servers differ in what they take: `choose_form` asks in several forms and keeps the first that is
answered. A prompt may be private, and so may what a server says about it: errors quote a server
only on prompts of ours. The key of the server is OPENAI_API_KEY, and is quoted nowhere. Redirects
and proxies are not followed.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from socket import SHUT_RDWR
from urllib.parse import urlsplit

from ortho_cli.errors import NumericalError, OrthoError, ResourceError, UsageError, reason

KEY = "OPENAI_API_KEY"  # the variable that clients of such servers read
TIMEOUT = 120.0  # seconds without a byte: a CPU reads a prompt of 160 tokens in one, if it is idle
MOST_BYTES = (
    1 << 24
)  # of an answer: that of a thousand models, or of a whole vocabulary, is smaller
QUOTED = 300  # characters of what a server says
TOP = (20, 5)  # tokens to ask for: vLLM's limit unless it was started with another, and OpenAI's
ROUNDING = 1e-3  # nats by which a log-probability may pass 0: float16 rounds so near 0
MARK = "token_id:"  # before the number, where vLLM names tokens by number
OURS = ("prompt", "max_tokens", "temperature", "logprobs", "return_tokens_as_token_ids", "stream")

Fields = Mapping[str, object]  # of a request, beside OURS: `model`, and what else selects an alpha


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model that a server has; `parent` is the base of an adapter."""

    name: str
    parent: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """How a server is asked: prompts as numbers or as text, `top` tokens, numbers for tokens."""

    numbers: bool
    top: int
    marked: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The most likely next tokens by number or text and their logprobs, the likeliest first.

    `read`: tokens of the prompt as the server counts them; None where it does not say.
    """

    tokens: tuple[int | str, ...]
    logprobs: tuple[float, ...]  # natural, <= 0
    read: int | None = None


class _Refused(Exception):  # noqa: N818 - an answer that the caller turns into an error
    """An answer of another status than 200."""

    def __init__(self, status: int, words: str) -> None:
        self.status, self.words = status, words


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A server; threads may share it.

    `url` is without `/v1`. `key` is never printed.
    """

    url: str
    key: str | None = field(default=None, repr=False)
    timeout: float = TIMEOUT
    _open: set[http.client.HTTPConnection] = field(default_factory=set, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def models(self) -> list[Model]:
        """List the models that the server has.

        Raises:
            ResourceError: it does not answer, or answers that it fails.
            UsageError: what is there is no such server.
        """
        try:
            found = self._call("GET", "/v1/models", None)
        except _Refused as error:
            raise self._failed(error, "when it is asked for its models") from None
        data = found.get("data") if isinstance(found, Mapping) else None
        if not isinstance(data, list):
            raise self._odd("no list of models")
        return [
            Model(name=one["id"], parent=parent if isinstance(parent, str) else None)
            for one in data
            if isinstance(one, Mapping) and isinstance(one.get("id"), str)
            for parent in (one.get("parent"),)
        ]

    def choose_form(self, fields: Fields, tokens: Sequence[int], text: str) -> Form:
        """Find a form in which the server gives log-probabilities, with numbers where it can.

        Args:
            fields: what selects the model.
            tokens: a prompt that is not private.
            text: the same as text.
        Raises:
            ResourceError: the server does not answer, or fails at every form.
            UsageError: it refuses every form, or gives no log-probabilities in any.
        """
        last: _Refused | None = None
        bare = False  # whether it answered without log-probabilities
        for form in _forms():
            try:
                self._ask(fields, tokens if form.numbers else text, form)
            except _Refused as error:
                last = error
            except _NoLogprobs:
                bare = True
            else:
                return form
        what = f"model {_named(fields)}"
        if bare or last is None:
            raise UsageError(
                f"the server answers {what} without log-probabilities",
                hint="it has to be started with them: logits_all=True for llama-cpp-python, "
                "--max-logprobs 20 for vLLM",
            )
        raise self._failed(last, f"when it is asked as {what}")

    def ask(
        self, fields: Fields, prompt: Sequence[int] | str, form: Form, *, number: int | None
    ) -> Answer:
        """Ask for the most likely next tokens.

        Args:
            fields: what selects the model.
            prompt: tokens or text, as the form says.
            form: how this server is asked.
            number: names the request in errors; None where the prompt is not private.
        Raises:
            ResourceError: the server does not answer, or fails.
            UsageError: it refuses, or gives no log-probabilities.
            NumericalError: a log-probability is NaN, or above 0.
        """
        try:
            return self._ask(fields, prompt, form)
        except _Refused as error:
            if number is None:
                raise self._failed(error, f"when it is asked as {_named(fields)}") from None
            quiet = _Refused(error.status, "")  # its words may quote the prompt
            raise self._failed(quiet, f"at request {number}, of model {_named(fields)}") from None
        except _NoLogprobs:
            where = "" if number is None else f" request {number}"
            raise UsageError(
                f"the server answers{where} as {_named(fields)} without log-probabilities, and "
                "others with",
                hint="are there several servers behind one address? ask one of them",
            ) from None

    def stop(self) -> None:
        """End the requests that are under way in other threads."""
        with self._lock:
            for connection in self._open:
                if connection.sock is not None:
                    with suppress(OSError):
                        connection.sock.shutdown(SHUT_RDWR)

    def _ask(self, fields: Fields, prompt: Sequence[int] | str, form: Form) -> Answer:
        body: dict[str, object] = {
            **fields,
            "prompt": prompt if isinstance(prompt, str) else list(prompt),
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": form.top,
        }
        if form.marked:
            body["return_tokens_as_token_ids"] = True
        found = self._call("POST", "/v1/completions", body)
        if not isinstance(found, Mapping):
            raise self._odd("no completion")
        return _answer_of(found, form)

    def _call(self, method: str, path: str, body: object) -> object:
        headers = {"Accept": "application/json"}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        sent = None if body is None else json.dumps(body).encode()
        if sent is not None:
            headers["Content-Type"] = "application/json"
        parts = urlsplit(self.url)
        try:
            with self._connected() as connection:
                connection.request(method, parts.path + path, body=sent, headers=headers)
                answer = connection.getresponse()
                content = answer.read(MOST_BYTES + 1)
        except TimeoutError:
            raise ResourceError(
                f"server `{self.url}` gives no answer within {self.timeout:g} s",
                hint=f"is it still loading, or busy? `curl {self.url}/v1/models` should answer",
            ) from None
        except (OSError, UnicodeError, http.client.HTTPException) as error:
            why = reason(error) or type(error).__name__
            raise ResourceError(
                f"server `{self.url}` does not answer: {self._scrubbed(why)}",
                hint=f"does it run there? `curl {self.url}/v1/models` should list its models",
            ) from None
        if len(content) > MOST_BYTES:
            raise self._odd(f"more than {MOST_BYTES:,} bytes")
        if answer.status != http.client.OK:
            raise _Refused(answer.status, self._scrubbed(_words_of(content)))
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            raise self._odd("what is no JSON") from None

    @contextmanager
    def _connected(self) -> Iterator[http.client.HTTPConnection]:
        parts = urlsplit(self.url)
        kind = (
            http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        )
        connection = kind(parts.hostname or "", parts.port, timeout=self.timeout)
        with self._lock:
            self._open.add(connection)
        try:
            yield connection
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()

    def _scrubbed(self, words: str) -> str:
        """Take the key out of what a server says: some quote a wrong one."""
        return words.replace(self.key, "...") if self.key else words

    def _failed(self, refused: _Refused, when: str) -> OrthoError:
        """Make the error for a status: of resources where the server fails, else of usage."""
        said = f": {refused.words}" if refused.words else ""
        message = f"server `{self.url}` answers {refused.status} {when}{said}"
        if refused.status >= 500 or refused.status == 429:
            return ResourceError(message, hint="its own log says more; then repeat the command")
        hints = {
            401: f"put its key into {KEY}",
            403: f"put its key into {KEY}",
            404: "--served takes its address without a path, such as http://127.0.0.1:8000",
        }
        redirect = f"--served takes the address that `curl -I {self.url}/v1/models` names"
        otherwise = redirect if refused.status < 400 else "its own log says more"
        return UsageError(message, hint=hints.get(refused.status, otherwise))

    def _odd(self, what: str) -> UsageError:
        return UsageError(
            f"`{self.url}` is no OpenAI-compatible server: it answers with {what}",
            hint=f"`curl {self.url}/v1/models` should list models as JSON",
        )


class _NoLogprobs(Exception):  # noqa: N818 - an answer that the caller turns into an error
    """An answer without log-probabilities."""


def open_server(url: str, *, timeout: float = TIMEOUT) -> Server:
    """Take the address of a server, with or without `/v1`; nothing is sent yet.

    Raises:
        UsageError: it is no address, has a password in it, or the key is no key.
    """
    hint = "such as http://127.0.0.1:8000"
    try:
        parts = urlsplit(url)
        port, host = parts.port, parts.hostname
    except ValueError:
        raise UsageError("--served is no address", hint=hint) from None
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UsageError(
            "--served has more in it than an address: a name, a password or a question",
            hint=f"give the address alone, and a key in {KEY}",
        )
    plain = url.isascii() and url.isprintable() and " " not in url
    if parts.scheme not in ("http", "https") or not host or port == 0 or not plain:
        raise UsageError(f"--served {url} is no address of a server", hint=hint)
    path = parts.path.rstrip("/").removesuffix("/v1")
    key = os.environ.get(KEY, "").strip() or None
    if key is not None and not (key.isascii() and key.isprintable()):
        raise UsageError(
            f"{KEY} has characters that no key has", hint=f"set {KEY} anew, or unset it"
        )
    return Server(url=f"{parts.scheme}://{parts.netloc}{path}", key=key, timeout=timeout)


def _forms() -> Iterator[Form]:
    """Order the forms: numbers before text, many tokens before few."""
    for numbers in (True, False):
        for top in TOP:
            for marked in (True, False):
                yield Form(numbers=numbers, top=top, marked=marked)


def _named(fields: Fields) -> str:
    return f"`{fields.get('model', dict(fields))}`"


def _words_of(content: bytes) -> str:
    """Find the sentence in an answer that refuses, by the forms in use."""
    text = content[: 1 << 16].decode("utf-8", "replace")
    with suppress(ValueError, RecursionError):
        found = json.loads(text)
        for key in ("error", "message", "detail"):
            while isinstance(found, Mapping) and key in found:
                found = found[key]
        text = found if isinstance(found, str) else json.dumps(found)
    return " ".join(text.split())[:QUOTED]


def _answer_of(found: Mapping[str, object], form: Form) -> Answer:
    """Read a completion: of OpenAI, vLLM, SGLang, llama-cpp-python, or of llama-server."""
    listed = found.get("choices")
    first = listed[0] if isinstance(listed, list) and listed else None
    given = first.get("logprobs") if isinstance(first, Mapping) else None
    pairs = dict(_pairs(given)) if isinstance(given, Mapping) else {}
    known = {
        token: value
        for token, value in pairs.items()
        if isinstance(value, float | int) and not isinstance(value, bool) and value != -math.inf
    }
    if not known:
        raise _NoLogprobs
    if not all(value <= ROUNDING for value in known.values()):
        raise NumericalError(
            "a log-probability of the server is NaN or above 0",
            hint="does the served model compute in a dtype that overflows?",
        )
    ordered = sorted(known.items(), key=lambda one: -one[1])
    usage = found.get("usage")
    read = usage.get("prompt_tokens") if isinstance(usage, Mapping) else None
    return Answer(
        tokens=tuple(_number_of(token) if form.marked else token for token, _ in ordered),
        logprobs=tuple(min(0.0, float(value)) for _, value in ordered),
        read=read if isinstance(read, int) else None,
    )


def _pairs(given: Mapping[str, object]) -> Iterator[tuple[int | str, object]]:
    """Give tokens and logprobs of the first position: of {text: value}, or a list of objects."""
    content, top = given.get("content"), given.get("top_logprobs")
    if isinstance(content, list) and content and isinstance(content[0], Mapping):
        listed = content[0].get("top_logprobs")
        for one in listed if isinstance(listed, list) else ():
            if isinstance(one, Mapping):
                number, text = one.get("id"), one.get("token")
                if isinstance(number, int) or isinstance(text, str):
                    yield (number if isinstance(number, int) else str(text)), one.get("logprob")
    elif isinstance(top, list) and top and isinstance(top[0], Mapping):
        yield from ((str(token), value) for token, value in top[0].items())


def _number_of(token: int | str) -> int | str:
    """Read the number of a token that is named by it."""
    if isinstance(token, str) and token.startswith(MARK) and token[len(MARK) :].isdecimal():
        return int(token[len(MARK) :])
    return token
