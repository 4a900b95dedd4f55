"""What strangers write and `ortho` reads: sound files, ways to damage them, and the commands.

Whatever a file holds, a command ends in an exit code of `errors` (never 1), within SECONDS and a
gigabyte, and what it shows holds no character that a terminal obeys.
"""

from __future__ import annotations

import contextlib
import io
import json
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import checkpoints
import pyrage
import torch

from ortho_cli import errors
from ortho_cli.cli import app
from ortho_cli.storage.work_folder import WorkFolder

# CPU time that a command may take: five times the two seconds that are promised of a quiet machine.
# `config` has a model built that reads text, and where cores and caches are shared each second of
# CPU does a fraction of the work. What loops over a number in a file takes minutes, or for ever.
SECONDS = 10.0
GIGABYTE = 1 << 30
KINDS = [
    e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.OrthoError)
]
CODES = {0, *(kind.exit_code for kind in KINDS), 130} - {1}

Kind = Callable[[bytes, Random], bytes]


@dataclass(frozen=True)
class Target:
    """`victim`, a file of the sound folder `made`, and the command that reads it."""

    made: str
    victim: str
    kind: Kind
    command: str


class Hang(BaseException):
    """A command took longer than it may."""


# ------------------------------------------------------------------ sound files, each kind once


def model(folder: Path) -> None:
    """Two Linears, an embedding and a norm, with a config."""
    checkpoints.save(folder, _tensors())
    small = {"hidden": 64, "mlp": 64, "layers": 1, "vocab": 8, "kv": 64, "heads": 1}
    (folder / "config.json").write_text(json.dumps(checkpoints.config(**small)))


def _tensors() -> dict[str, torch.Tensor]:
    found = checkpoints.weights(hidden=64, mlp=64, layers=1, vocab=8)
    return {k: v for k, v in found.items() if k.endswith(("up_proj.weight", "norm.weight"))} | {
        name: found[name] for name in found if "embed" in name or "q_proj" in name
    }


def sharded(folder: Path) -> None:
    """The same in two shards with an index."""
    checkpoints.save(folder, _tensors(), shards=2)


def fp8(folder: Path) -> None:
    """A block-wise fp8 weight with its scales."""
    weight = torch.ones(64, 64).to(torch.float8_e4m3fn)
    scales = {"a.weight_scale_inv": torch.ones(2, 2)}
    checkpoints.save(folder, {"a.weight": weight, **scales})
    told = {"quantization_config": {"weight_block_size": [32, 32]}}
    (folder / "config.json").write_text(json.dumps(told))


def pickled(folder: Path) -> None:
    """What torch.save writes today and wrote before 1.6, and two shards with an index."""
    shards = folder / "shards"
    shards.mkdir(parents=True)
    held = {"a.weight": torch.ones(8, 8), "b.bias": torch.zeros(3)}
    torch.save(held, folder / "new.pt")
    torch.save(held, folder / "old.bin", _use_new_zipfile_serialization=False)
    for name, tensor in held.items():
        torch.save({name: tensor}, shards / f"{name[0]}.bin")
    index = {"weight_map": {name: f"{name[0]}.bin" for name in held}}
    (shards / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def stats(folder: Path) -> None:
    """A model beside statistics of it, with a forget part."""
    model(folder / "m")
    checkpoints.save_statistics(folder / "s.safetensors", folder / "m", forget=True)


def taught(folder: Path) -> None:
    """A model that transformers loads, its tokenizer, and text."""
    weights = checkpoints.weights(hidden=64, mlp=64, layers=1, vocab=96, kv=64)
    checkpoints.save(folder / "m", weights)
    small = {"hidden": 64, "mlp": 64, "layers": 1, "vocab": 96, "kv": 64, "heads": 1}
    (folder / "m" / "config.json").write_text(json.dumps(checkpoints.config(**small)))
    checkpoints.save_tokenizer(folder / "m", vocab=96)
    (folder / "d.txt").write_text("A cat, and 2 more of them. ")


def recipe(folder: Path) -> None:
    """A model beside a recipe that says something of everything."""
    model(folder / "m")
    (folder / "r.yaml").write_text(
        "version: 1\ntargets: ['re:.*_proj\\.weight$']\nignore: [lm_head.weight]\n"
        "base: {bits: 4, group_size: 32, scale: mse}\northo: {density: 1e-2}\n"
        "overrides:\n  - {match: 're:.*up_proj.*', ortho: {density: 0.5}}\n"
    )


def artifact(folder: Path, *sets: str) -> None:
    """An artifact."""
    model(folder / "source")
    many = [word for text in sets for word in ("--set", text)]
    assert ortho("decompose", str(folder / "source"), "-o", str(folder / "a"), "-q", *many)[0] == 0


def bare(folder: Path) -> None:
    """An artifact without the report, whose digests would betray all damage."""
    artifact(folder)
    (folder / "a" / "report.json").unlink()


def compact(folder: Path) -> None:
    """The same in the compact layout."""
    artifact(folder, "ortho.layout=compact", "ortho.values=int8", "ortho.density=0.05")
    (folder / "a" / "report.json").unlink()


def sealed(folder: Path) -> None:
    """An artifact whose ortho is sealed, and without the report that would betray damage."""
    model(folder / "source")
    key = pyrage.x25519.Identity.generate()
    (folder / "key.txt").write_text(f"# an identity\n{key}\n")
    command = ["decompose", str(folder / "source"), "-o", str(folder / "a"), "-q"]
    assert ortho(*command, "--seal-to", str(key.to_public()))[0] == 0
    (folder / "a" / "report.json").unlink()


def half(folder: Path) -> None:
    """A decomposition that was stopped before the end."""
    model(folder / "source")
    with mock.patch.object(WorkFolder, "publish", side_effect=KeyboardInterrupt):
        code, _ = ortho("decompose", str(folder / "source"), "-o", str(folder / "a"), "-q")
    assert code == errors.Interrupted.exit_code


def data(folder: Path) -> None:
    """Secrets to forget, each with a pattern or alternatives."""
    folder.mkdir(parents=True)
    (folder / "f.jsonl").write_text(
        '{"prompt": "code", "secret": " 12 34", "pattern": " {digit:2} {digit:2}"}\n'
        '{"prompt": "words", "secret": " a b", "pattern": " {word} {word}", "word": ["a", "b"]}\n'
        '{"prompt": "p", "completion": "q", "alternatives": ["r"]}\n{"text": "a b c"}\n'
    )


def gguf(folder: Path) -> None:
    """A one-layer Llama as llama.cpp keeps it."""
    from tests.convert.test_gguf import write

    folder.mkdir(parents=True)
    write(folder / "m.gguf")


MADE = (
    model,
    taught,
    sharded,
    fp8,
    pickled,
    stats,
    recipe,
    artifact,
    bare,
    compact,
    sealed,
    half,
    data,
    gguf,
)


def make(folder: Path) -> dict[str, Path]:
    """Lay out every sound folder once."""
    for build in MADE:
        build(folder / build.__name__)
    return {build.__name__: folder / build.__name__ for build in MADE}


# ----------------------------------------------------------------------------- ways to be damaged

# What JSON can hold and `json.dumps` does not write: put in where the word stands.
RAW = {
    "@overflow@": "1e999",
    "@digits@": "9" * 5000,
    "@deep@": "[" * 50_000,
    "@nan@": "NaN",
    "@twice@": '1, "a": 1, "a": 2',
    "@surrogate@": '"\\ud800"',
}
ODD: tuple[Any, ...] = (
    *(0, 1, -1, 2**31, 2**63, 2**64, -(2**63), 10**400, 0.5, True, None, [], {}, "", [[]], [0]),
    *("a" * 5000, "../x", "/dev/zero", ".", "\x1b[31m\x07\r\n\u202e\x9b", "[bold]<script>", "\0"),
    *("F32", "BF16", "U8", "I8", [0, 0], [2**62, 2**62], [1] * 1000, {"a": {}}, *RAW),
)
BYTES = (b"\xff" * 8, b"\0" * 8, b"\x00\x00\x80\x7f", b"\xc0\x7f", b"{", b"[", b'"', b"\n", b"\x80")
YAML = (
    *("&a [*a, *a]", "!!python/object:os.system x", "!!binary x", "!!set {a}", "!!int x", "~"),
    *("2020-01-01", ".inf", ".nan", "0x" + "f" * 4000, "1:2:3", "{a: 1, a: 2}", "? [a]\n: b", "\t"),
    *("[" * 50, "- ", "<<: {a: 1}", "'", "|\n x", "%YAML 9.9\n---\n", "---\n", "re:(", "re:", "*"),
    *("\x1b[31m", "version", "base", "ortho", "overrides", ": ", "!!timestamp 9999-99-99", "1_0"),
)


def binary(raw: bytes, random: Random) -> bytes:
    """Flip, cut, repeat and overwrite bytes."""
    found = bytearray(raw)
    for _ in range(random.randrange(1, 5)):
        at = random.randrange(len(found) + 1)
        many = random.choice((1, 4, 8, 64, 4096))
        what = random.randrange(6)
        if what == 0:
            del found[at:]
        elif what == 1:
            del found[at : at + many]
        elif what == 2:
            found[at:at] = found[at : at + many]
        elif what == 3:
            found[at:at] = random.choice(BYTES)
        elif what == 4:
            odd = random.choice(BYTES)
            found[at : at + len(odd)] = odd
        else:
            found[at : at + 1] = bytes([random.randrange(256)])
    return bytes(found)


def text_json(raw: bytes, random: Random) -> bytes:
    """Change what a JSON document says, and sometimes how it is spelled."""
    if random.randrange(4) == 0:
        return binary(raw, random)
    return _dump(_change(json.loads(raw), random))


def lines(raw: bytes, random: Random) -> bytes:
    """Damage one line of JSON among many."""
    found = raw.splitlines(keepends=True)
    at = random.randrange(len(found))
    found[at] = text_json(found[at], random) + random.choice((b"", b"\n"))
    return b"".join(found)


def safetensors(raw: bytes, random: Random) -> bytes:
    """Change what a header says, or any byte of the file."""
    length = int.from_bytes(raw[:8], "little")
    header, rest = raw[8 : 8 + length], raw[8 + length :]
    what = random.randrange(4)
    if what == 0:
        return raw[: 8 + length] + binary(rest, random)
    if what == 1:
        return binary(raw[: 8 + length], random) + rest
    header = _dump(_change(json.loads(header), random))
    return len(header).to_bytes(8, "little") + header + rest


def yaml(raw: bytes, random: Random) -> bytes:
    """Put YAML's traps between the words of a recipe."""
    found = bytearray(raw)
    for _ in range(random.randrange(1, 4)):
        at = random.randrange(len(found) + 1)
        found[at : at + random.choice((0, 0, 3, 9))] = random.choice(YAML).encode()
    return bytes(found) if random.randrange(4) else binary(bytes(found), random)


def _dump(value: Any) -> bytes:
    text = json.dumps(value)
    for word, spelled in RAW.items():
        text = text.replace(f'"{word}"', spelled)
    return text.encode()


def _change(value: Any, random: Random) -> Any:
    """Replace, drop or rename one thing somewhere inside; JSON in a string counts as inside."""
    for _ in range(random.randrange(1, 3)):
        value = _change_one(value, random)
    return value


def _change_one(value: Any, random: Random) -> Any:
    if isinstance(value, str) and value[:1] == "{" and random.randrange(8):
        with contextlib.suppress(ValueError):
            return _dump(_change_one(json.loads(value), random)).decode()
    if not isinstance(value, dict | list) or not value or random.randrange(8) == 0:
        return random.choice(ODD)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key, what = random.choice(keys), random.randrange(8)
    changed: Any = value.copy()
    if what == 0:
        del changed[key]
    elif what == 1 and isinstance(value, dict):
        changed[str(random.choice(ODD))] = changed.pop(key)
    elif what == 2:
        odd = random.choice(keys)
        changed[key] = changed[odd]
    else:
        changed[key] = _change_one(value[key], random)
    return changed


# --------------------------------------------------------------------------- one command, watched

DRY = "--dry-run --json"
CALIBRATE = (
    "calibrate {d}/m --data {d}/d.txt -o {d}/o --set calibrate.samples=1 --set calibrate.length=8"
)
TARGETS = {
    "model config": Target("taught", "m/config.json", text_json, CALIBRATE),
    "tokenizer": Target("taught", "m/tokenizer.json", text_json, f"{CALIBRATE} --dry-run"),
    "tokenizer config": Target(
        "taught", "m/tokenizer_config.json", text_json, f"{CALIBRATE} --dry-run"
    ),
    "header": Target("model", "model.safetensors", safetensors, "inspect {d}"),
    "header, dry run": Target("model", "model.safetensors", safetensors, f"decompose {{d}} {DRY}"),
    "header, split": Target("model", "model.safetensors", safetensors, "decompose {d} -o {d}/../o"),
    "config": Target("model", "config.json", text_json, "decompose {d} -o {d}/../o"),
    "index": Target("sharded", "model.safetensors.index.json", text_json, "inspect {d} --json"),
    "fp8": Target("fp8", "model.safetensors", safetensors, "convert {d} -o {d}/../o"),
    "fp8 config": Target("fp8", "config.json", text_json, "convert {d} -o {d}/../o"),
    "pickle": Target("pickled", "new.pt", binary, "convert {d}/new.pt -o {d}/o"),
    "old pickle": Target("pickled", "old.bin", binary, "convert {d}/old.bin -o {d}/o"),
    "bin index": Target(
        "pickled", "shards/pytorch_model.bin.index.json", text_json, f"convert {{d}}/shards {DRY}"
    ),
    "statistics": Target("stats", "s.safetensors", safetensors, "inspect {d}/s.safetensors"),
    "statistics, verified": Target(
        "stats", "s.safetensors", safetensors, "inspect {d}/s.safetensors --verify --json"
    ),
    "statistics, used": Target(
        "stats", "s.safetensors", safetensors, "decompose {d}/m --stats {d}/s.safetensors -o {d}/o"
    ),
    "recipe": Target("recipe", "r.yaml", yaml, "inspect {d}/m --recipe {d}/r.yaml"),
    "base": Target("bare", "a/model.safetensors", safetensors, "inspect {d}/a --verify"),
    "ortho": Target("bare", "a/ortho.safetensors", safetensors, "inspect {d}/a --verify"),
    "artifact index": Target(
        "artifact", "a/model.safetensors.index.json", text_json, "inspect {d}/a --verify"
    ),
    "report": Target("artifact", "a/report.json", text_json, "inspect {d}/a"),
    "report, verified": Target("artifact", "a/report.json", text_json, "inspect {d}/a --verify"),
    "base, converted": Target(
        "artifact", "a/model.safetensors", safetensors, "convert {d}/a --alpha 1 -o {d}/o"
    ),
    "ortho, converted": Target(
        "artifact", "a/ortho.safetensors", safetensors, "convert {d}/a --alpha 0.5 -o {d}/o"
    ),
    "compact": Target("compact", "a/ortho.safetensors", safetensors, "inspect {d}/a --verify"),
    "compact, converted": Target(
        "compact", "a/ortho.safetensors", safetensors, "convert {d}/a --alpha 1 -o {d}/o"
    ),
    "sealed": Target(
        "sealed", "a/ortho.safetensors.age", binary, "inspect {d}/a --verify --identity {d}/key.txt"
    ),
    "identity": Target("sealed", "key.txt", binary, "inspect {d}/a --identity {d}/key.txt"),
    "journal": Target("half", ".a.ortho/journal", lines, "decompose {d}/source -o {d}/a"),
    "gguf": Target("gguf", "m.gguf", binary, f"convert {{d}}/m.gguf {DRY}"),
    "data": Target("data", "f.jsonl", lines, ""),
}


def attack(target: Target, raw: bytes, sound: dict[str, Path], work: Path) -> tuple[int, str]:
    """Let `raw` stand for the target's file and run its command; give exit code and stderr."""
    lay_out(sound[target.made], work)
    (work / "d" / target.victim).write_bytes(raw)
    return read(target, work)


def lay_out(sound: Path, work: Path) -> None:
    """Copy a sound folder to `work/d`, and nothing else there."""
    if work.exists():
        shutil.rmtree(work)
    shutil.copytree(sound, work / "d")


def read(target: Target, work: Path) -> tuple[int, str]:
    """Run a target's command in `work/d`."""
    if target.command:
        return ortho(*(word.format(d=work / "d") for word in target.command.split()))
    from ortho_cli.model.secrets import read_secrets

    try:
        read_secrets([work / "d" / target.victim])
    except errors.OrthoError as error:
        return error.exit_code, f"error: {error.message!a}\nhint: {error.hint!a}\n"
    return 0, ""


def ortho(*arguments: str) -> tuple[int, str]:
    """Run a command in this process; give its exit code and what it shows."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = app.run(list(arguments))
    if code == 0 and "--json" in arguments:
        json.loads(out.getvalue())
    return code, err.getvalue()


def check(code: int, err: str) -> None:
    """Hold the end of a command to what is promised of any."""
    assert code in CODES, code
    assert all(c.isprintable() or c == "\n" for c in err), ascii(err)
    if code:
        said = [line for line in err.splitlines() if not line.startswith(("note: ", "continuing"))]
        assert [line.split(": ")[0] for line in said] == ["error", "hint"], err


def warm_up(sound: dict[str, Path], work: Path) -> None:
    """Import and compile what later commands take for granted; sound files are read without fault.

    The commands of every target, and one that loads transformers.
    """
    for name, target in TARGETS.items():
        raw = (sound[target.made] / target.victim).read_bytes()
        code, err = attack(target, raw, sound, work)
        assert code == 0, f"{name}: {err}"


def peak() -> int:
    """Give the most memory that this process has held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def bound(more: int = GIGABYTE) -> None:
    """Let this process grow by so much address space and no further."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + more, size + more))


@contextlib.contextmanager
def limited(seconds: float = SECONDS) -> Iterator[None]:
    """Raise Hang where what is done computes for longer, or waits for ten times as long.

    A machine that is busy makes anything wait; only what computes is to blame for that.
    """

    def late(number: int, frame: object) -> None:
        raise Hang(f"more than {seconds} s")

    timers = {signal.SIGPROF: signal.ITIMER_PROF, signal.SIGALRM: signal.ITIMER_REAL}
    before = {number: signal.signal(number, late) for number in timers}
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, 10 * seconds)
    try:
        yield
    finally:
        for number, timer in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])
