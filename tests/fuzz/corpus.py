"""Malformed files, each with the command that reads it, its exit code and a piece of what it says.

    PYTHONPATH=.:tests python tests/fuzz/corpus.py [KIND ...]    runs them in a gigabyte of memory

All are made on the spot, alike on every run. What broke a promise when it was first tried:

    a FIFO or device as weights, config.json, index, statistics, journal, data or tokenizer: hung
    config.json linked to /dev/zero: all memory
    a header in UTF-16: taken for JSON, which safetensors does not
    a shape of 100,000 large numbers: hung over their product
    a header of four million values: seconds, and more than a gigabyte for a large one
    statistics whose `tensors`, `versions` are nested, or `data`, `unit` missing: uncaught
    statistics with a shape of infinity, text or blanks: uncaught, or shown as it stood
    a figure of 400 digits in statistics or report.json: uncaught
    report.json whose recipe has no base: uncaught
    0xffff... in a list of a recipe: uncaught, Python spells no more than 4300 digits
    a lone surrogate in a secret: uncaught
    {digit:999999999} in a pattern, or many {hex:999}: all memory, or hung
    num_hidden_layers of 2^31 in config.json: hung in transformers
    a tokenizer that fails on its first word only: uncaught
    auto_map in config.json: transformers asked at the terminal, and y ran the folder's code
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import checkpoints
import pyrage
import targets
import torch

Change = Callable[[Path], None]
INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@dataclass(frozen=True)
class Case:
    """Copy the sound folder `made`, change it, run `command`; it must say `said` and end so."""

    made: str
    change: Change
    command: str
    code: int
    said: str


def write(name: str, content: bytes | str) -> Change:
    """Put a file in the place of the sound one."""
    raw = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    return lambda folder: _fresh(folder / name).write_bytes(raw) and None


def edit(name: str, change: Callable[[Any], Any]) -> Change:
    """Change what a JSON file, or the header of a safetensors file, says."""

    def apply(folder: Path) -> None:
        path = folder / name
        raw = path.read_bytes()
        if path.suffix == ".json":
            path.write_text(json.dumps(_changed(json.loads(raw), change)))
            return
        length = int.from_bytes(raw[:8], "little")
        header = json.dumps(_changed(json.loads(raw[8 : 8 + length]), change))
        path.write_bytes(raw_file(header.encode(), raw[8 + length :]))

    return apply


def metadata(key: str, value: str) -> Change:
    """Set one value of a statistics file's metadata."""
    return edit("s.safetensors", lambda held: held["__metadata__"].update({key: value}))


def told(key: str, change: Callable[[Any], Any]) -> Change:
    """Change the JSON that a value of a statistics file's metadata holds."""

    def apply(held: Any) -> None:
        inner = json.loads(held["__metadata__"][key])
        held["__metadata__"][key] = json.dumps(_changed(inner, change))

    return edit("s.safetensors", apply)


def values(name: str, key: str, odd: bytes) -> Change:
    """Overwrite the first bytes of one tensor."""

    def apply(folder: Path) -> None:
        raw = bytearray((folder / name).read_bytes())
        length = int.from_bytes(raw[:8], "little")
        at = 8 + length + json.loads(raw[8 : 8 + length])[key]["data_offsets"][0]
        raw[at : at + len(odd)] = odd
        (folder / name).write_bytes(raw)

    return apply


def link(name: str, to: str) -> Change:
    """Put a symbolic link in the place of a file."""
    return lambda folder: _fresh(folder / name).symlink_to(to)


def fifo(name: str) -> Change:
    """Put a FIFO there, which nobody writes to."""
    return lambda folder: os.mkfifo(_fresh(folder / name))


def directory(name: str) -> Change:
    """Put a directory there."""
    return lambda folder: _fresh(folder / name).mkdir()


def sparse(name: str, start: bytes, size: int) -> Change:
    """Put a file of so many bytes there, of which the disk holds the first few."""

    def apply(folder: Path) -> None:
        _fresh(folder / name).write_bytes(start)
        os.truncate(folder / name, size)

    return apply


def both(*changes: Change) -> Change:
    """Do one after the other."""
    return lambda folder: [change(folder) for change in changes] and None


def _fresh(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    return path


def _changed(value: Any, change: Callable[[Any], Any]) -> Any:
    found = change(value)
    return value if found is None else found


def raw_file(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """Put a safetensors file together."""
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def one(entry: object, data: int = 8, name: str = "w") -> bytes:
    """Make a safetensors file of one tensor, described as is told."""
    return raw_file(json.dumps({name: entry}).encode(), bytes(data))


def tensor(shape: object = (2,), offsets: object = (0, 8), dtype: object = "F32") -> dict[str, Any]:
    """Describe a tensor."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def pair(first: object, second: object, data: int) -> bytes:
    """Make a safetensors file of tensors a and b."""
    return raw_file(json.dumps({"a": first, "b": second}).encode(), bytes(data))


class Runs:
    """What an attacker would pickle."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Have it call open."""
        return open, (os.devnull,)


# ---------------------------------------------------------------- one safetensors file, by itself

DEEP = b"[" * 100_000
HEADERS: dict[str, tuple[bytes, str]] = {
    "no bytes": (b"", "is an empty file, not safetensors"),
    "seven bytes": (bytes(7), "has 7 bytes"),
    "length 0": (raw_file(b""), "is a file of zeros, not safetensors"),
    "length beyond the file": (raw_file(b"{}", length=3), "claims a header of 3 bytes where 2 fit"),
    "length of 2^64 - 1": (raw_file(b"{}", length=2**64 - 1), "claims a header of 18446744"),
    "not JSON": (raw_file(b"{nonsense"), "is not valid JSON"),
    "not UTF-8": (raw_file(b'{"\xff": 1}'), "is not valid JSON"),
    "found: UTF-16": (raw_file('{"a": 1}'.encode("utf-16-le")), "is not valid JSON"),
    "a surrogate in bytes": (raw_file(b'{"\xed\xa0\x80": 1}'), "is not valid JSON"),
    "a surrogate by escape": (raw_file(b'{"\\ud800": 1}'), "surrogates not allowed"),
    "an array": (raw_file(b"[]"), "starts with b'['"),
    "nested 100,000 deep": (raw_file(b'{"a":' + DEEP), "is not valid JSON"),
    "NaN": (raw_file(b'{"a": NaN}'), "NaN is not JSON"),
    "-Infinity": (raw_file(b'{"a": -Infinity}'), "-Infinity is not JSON"),
    "a number of 5000 digits": (raw_file(b'{"a": ' + b"9" * 5000 + b"}"), "is not valid JSON"),
    "a key twice": (raw_file(b'{"a": 1, "a": 2}'), "'a' occurs twice"),
    "a dtype twice": (
        raw_file(b'{"w": {"dtype": "F32", "dtype": "I8", "shape": [], "data_offsets": [0, 4]}}'),
        "'dtype' occurs twice",
    ),
    "nothing": (raw_file(b"{}"), "holds no tensors"),
    "metadata only": (raw_file(b'{"__metadata__": {"a": "b"}}'), "holds no tensors"),
    "metadata a list": (raw_file(b'{"__metadata__": []}'), "is not a map of strings"),
    "metadata of numbers": (raw_file(b'{"__metadata__": {"a": 1}}'), "is not a map of strings"),
    "a tensor that is a number": (one(3), "is not described by"),
    "a tensor without offsets": (one({"dtype": "F32", "shape": [2]}), "is not described by"),
    "unknown dtype": (one(tensor(dtype="F33")), "has dtype 'F33'"),
    "dtype a list": (one(tensor(dtype=["F32"])), "has dtype ['F32']"),
    "dtype of 5000 characters": (one(tensor(dtype="F" * 5000)), "FFF..., which is none of"),
    "shape a number": (one(tensor(shape=2)), "which is not a list of counts"),
    "shape of a bool": (one(tensor(shape=[True, 2])), "which is not a list of counts"),
    "shape of a float": (one(tensor(shape=[2.0])), "which is not a list of counts"),
    "shape below 0": (one(tensor(shape=[-2])), "which is not a list of counts"),
    "shape of 2^64": (one(tensor(shape=[2**64])), "which is not a list of counts"),
    "shape whose product overflows": (one(tensor(shape=[2**32, 2**32])), "has 8 bytes where F32"),
    "shape with a zero": (one(tensor(shape=[0, 4], offsets=[0, 0]), 0), "no elements"),
    "found: shape of 100,000 numbers": (
        one(tensor(shape=[2**62] * 100_000, offsets=[0, 0]), 0),
        "has 100000 dimensions, where 64 are the most",
    ),
    "offsets of one": (one(tensor(offsets=[0])), "which are not two counts"),
    "offsets below 0": (one(tensor(offsets=[-8, 0])), "which are not two counts"),
    "offsets of 1e999": (
        raw_file(json.dumps({"w": tensor(offsets=["x", 8])}).replace('"x"', "1e999").encode()),
        "has data_offsets [inf, 8]",
    ),
    "offsets reversed": (one(tensor(offsets=[8, 0])), "claims bytes 8 to 0"),
    "offsets beyond the file": (one(tensor(offsets=[0, 2**40])), "claims bytes 0 to 1099511627776"),
    "half a byte": (one(tensor(shape=[3], offsets=[0, 1], dtype="F4"), 1), "has 1 bytes where F4"),
    "overlap": (pair(tensor(), tensor(offsets=[4, 12]), 12), "`b` of"),
    "one inside the other": (pair(tensor(), tensor([1], [2, 6]), 8), "overlaps `a`"),
    "a hole": (pair(tensor(), tensor(offsets=[16, 24]), 24), "leaves a hole after `a`"),
    "a hole at the start": (one(tensor(offsets=[8, 16]), 16), "leaves a hole after the header"),
    "something appended": (one(tensor(), 9), "end at byte"),
    "a name of a megabyte": (one(3, name="n" * 1_000_000), "is not described by"),
    "a name with escapes": (one(3, name="\x1b[31m\r\n\u202e\x9b\x07[bold]"), r"\x1b[31m\r\n\u202e"),
    "found: millions of values": (
        raw_file(b'{"a": [' + b"[]," * 4_000_000 + b"0]}"),
        "8000002 values; parsed it would take 2036 MB",
    ),
}

READ = "inspect {d}"
NOT_REGULAR = "not a regular file"
CASES: dict[str, Case] = {
    f"header: {name}": Case(
        "model", write("model.safetensors", raw), READ + "/model.safetensors", 4, said
    )
    for name, (raw, said) in HEADERS.items()
}


def add(kind: str, made: str, command: str, code: int, **named: tuple[Change, str]) -> None:
    """Enter cases that are read by one command."""
    for name, (change, said) in named.items():
        CASES[f"{kind}: {name.replace('_', ' ')}"] = Case(made, change, command, code, said)


# ------------------------------------------------------------------- folders, indexes, odd files


def sends(file: Any) -> Change:
    """Have the index send every tensor to one file."""
    return edit(INDEX, lambda held: {"weight_map": dict.fromkeys(held["weight_map"], file)})


add(
    "folder",
    "model",
    READ,
    4,
    weights_are_a_fifo=(fifo("model.safetensors"), NOT_REGULAR),
    weights_are_a_directory=(directory("model.safetensors"), "is a directory"),
    weights_link_to_a_device=(link("model.safetensors", "/dev/zero"), NOT_REGULAR),
    weights_link_in_a_circle=(link("model.safetensors", "model.safetensors"), "is a link to"),
    weights_link_to_nothing=(
        link("model.safetensors", "gone"),
        "is a link to `gone`, which is not",
    ),
    a_claim_of_100_MB=(
        sparse("model.safetensors", raw_file(b"{", length=10**8), 10**8 + 8),
        "is not valid JSON",
    ),
    a_claim_of_a_terabyte=(
        sparse("model.safetensors", one(tensor([2**40], [0, 2**40], "I8"), 0), 2**40),
        "claims bytes 0 to 1099511627776",
    ),
    config_is_a_list=(write("config.json", "[1]"), "is a JSON list, not an object"),
    config_is_a_fifo=(fifo("config.json"), NOT_REGULAR),
    config_links_to_a_device=(link("config.json", "/dev/zero"), NOT_REGULAR),
    config_is_a_directory=(directory("config.json"), "is a directory"),
    config_is_nested=(write("config.json", b'{"a":' + DEEP), "is not valid JSON"),
    config_is_large=(sparse("config.json", b"{}", 10**9), "has 1000000000 bytes; at most"),
    config_is_empty=(write("config.json", ""), "is an empty file, not JSON"),
    quantized_by_a_number=(write("config.json", '{"quantization_config": 4}'), "says '4')"),
)
add(
    "index",
    "sharded",
    READ,
    4,
    is_a_fifo=(fifo(INDEX), NOT_REGULAR),
    is_a_directory=(directory(INDEX), "is a directory"),
    links_to_itself=(link(INDEX, INDEX), "is a link to"),
    is_a_list=(write(INDEX, "[]"), "is a JSON list"),
    has_no_weight_map=(write(INDEX, "{}"), "has no `weight_map`"),
    has_a_weight_map_of_numbers=(sends(1), "to 1, which is not"),
    leads_out_of_the_folder=(sends("../x.safetensors"), "which is not a .safetensors name"),
    leads_to_an_absolute_path=(sends("/etc/x.safetensors"), "which is not a .safetensors name"),
    leads_to_itself=(sends(INDEX), "which is not a .safetensors name"),
    leads_to_a_NUL=(sends("\0.safetensors"), "which is not there"),
    leads_to_a_long_name=(sends("n" * 5000 + ".safetensors"), "file name too long"),
    leads_to_a_missing_shard=(sends("x.safetensors"), "which is not there"),
    leads_to_a_fifo=(both(sends("x.safetensors"), fifo("x.safetensors")), "which is not there"),
    leads_to_a_directory=(both(sends("x.safetensors"), directory("x.safetensors")), "not there"),
    names_the_wrong_shard=(sends(SHARDS[0]), "and not in `model-00001"),
    names_a_tensor_too_many=(
        edit(INDEX, lambda held: held["weight_map"].update({"x": SHARDS[0]})),
        "tensor `x` is in the index",
    ),
)
add(
    "pickle",
    "pickled",
    "convert {d}/new.pt -o {d}/o",
    4,
    would_run=(lambda d: torch.save(Runs(), d / "new.pt"), "nothing was run"),
    would_run_by_itself=(write("new.pt", pickle.dumps(Runs())), "is a pickle, which can run code"),
    is_cut=(lambda d: os.truncate(d / "new.pt", 300), "is no readable torch file"),
    is_empty=(write("new.pt", b""), "is an empty file, no torch file"),
    holds_a_number=(lambda d: torch.save(7, d / "new.pt"), "holds a int, not a map"),
    holds_no_tensor=(lambda d: torch.save({"a": 1}, d / "new.pt"), "holds no tensors"),
)
add(
    "pickle",
    "pickled",
    "convert {d}/new.pt -o {d}/o",
    9,
    claims_an_exabyte=(
        write(
            "new.pt",
            b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # as torch.save of before 1.6 begins
            b"\x80\x02cbuiltins\nbytearray\n\x8a\x08" + b"\x7f" * 8 + b"\x85R.",
        ),
        "out of memory",
    ),
)
add("pickle", "pickled", "convert {d}/x.pt", 4, is_a_fifo=(fifo("x.pt"), "neither a file nor a"))
add(
    "bin index",
    "pickled",
    "convert {d}/shards -o {d}/o",
    4,
    is_a_fifo=(
        both(fifo("shards/pytorch_model.bin.index.json")),
        "holds 2 files of weights and no index",
    ),
    leads_out=(
        write("shards/pytorch_model.bin.index.json", '{"weight_map": {"a": "../old.bin"}}'),
        "which is not a .bin name",
    ),
)
add(
    "fp8",
    "fp8",
    "convert {d} -o {d}/../o",
    4,
    blocks_of_nothing=(
        write("config.json", '{"quantization_config": {"weight_block_size": [0, -1]}}'),
        "not two sizes",
    ),
    blocks_that_do_not_fit=(
        write("config.json", '{"quantization_config": {"weight_block_size": [7, 7]}}'),
        "in blocks of [7, 7]",
    ),
)
add("gguf", "gguf", "convert {d}/m.gguf", 4, is_cut=(lambda d: os.truncate(d / "m.gguf", 99), "GG"))

# ------------------------------------------------------------------------------------- statistics

NAME = "model.layers.0.mlp.up_proj"
SHOW = "inspect {d}/s.safetensors --verify"
add(
    "statistics",
    "stats",
    SHOW,
    5,
    found_without_a_unit=(
        edit("s.safetensors", lambda h: h["__metadata__"].pop("unit") and None),
        "dam",
    ),
    found_nested_tensors=(metadata("tensors", DEEP.decode()), "is not valid JSON"),
    found_data_a_number=(metadata("data", "7"), "is a JSON int"),
    found_data_without_counts=(
        metadata("data", '{"retain": {}}'),
        "sequences` is missing",
    ),
    found_nested_versions=(metadata("versions", '{"a":' + DEEP.decode()), "is not valid JSON"),
    unknown_kind=(metadata("kind", "guess"), "`kind` is 'guess'"),
    digests_of_numbers=(told("digests", lambda h: dict.fromkeys(h, 7)), "`digests.model."),
    wrong_digest=(told("digests", lambda h: dict.fromkeys(h, "0" * 64)), "has BLAKE3"),
    shape_of_text=(
        told("tensors", lambda h: h[f"{NAME}.weight"].update(shape=["64", 64])),
        "shape",
    ),
    found_shape_of_infinity=(
        told("tensors", lambda h: h[f"{NAME}.weight"].update(shape=[float("inf"), 64])),
        "Infinity is not JSON",
    ),
    found_a_mean_of_400_digits=(
        told("tensors", lambda h: h[f"{NAME}.weight"].update(mean=10**400)),
        ".mean` is 1000",
    ),
    a_weight_too_many=(told("tensors", lambda h: h.update(x=h[f"{NAME}.weight"])), "is missing"),
)
USE = "decompose {d}/m --stats {d}/s.safetensors -o {d}/o"
add(
    "statistics used",
    "stats",
    USE,
    5,
    are_a_fifo=(fifo("s.safetensors"), NOT_REGULAR),
    are_a_directory=(directory("s.safetensors"), "is a directory"),
    are_a_model=(lambda d: (d / "m/model.safetensors").rename(_fresh(d / "s.safetensors")), "None"),
    negative_curvature=(values("s.safetensors", f"{NAME}.retain_curvature", b"\x80\xbf"), "-1"),
    NaN_curvature=(values("s.safetensors", f"{NAME}.retain_curvature", b"\xc0\x7f"), "nan"),
)
CASES["statistics used: are a model"] = Case(
    "stats", lambda d: None, "decompose {d}/m --stats {d}/m/model.safetensors", 5, "not 'ortho-st"
)
CASES["statistics used: infinite curvature"] = Case(
    "stats", values("s.safetensors", f"{NAME}.retain_curvature", b"\x80\x7f"), USE, 5, "inf"
)

# ----------------------------------------------------------------------------------------- sealed

SEALED = "a/ortho.safetensors.age"
OPEN = "inspect {d}/a --verify --identity {d}/key.txt"
WORK = (
    b"age-encryption.org/v1\n-> scrypt " + b"A" * 22 + b" %s\n" + b"A" * 43 + b"\n--- " + b"A" * 43
)


def locked(factor: bytes) -> Change:
    """Have a passphrase open a key that asks scrypt for so much work."""

    def change(folder: Path) -> None:
        (folder / "a" / "ortho.key.age").write_bytes(WORK % factor + b"\n" + b"A" * 200)
        (folder / "key.txt").write_text("a passphrase")

    return change


def sealed_again(content: bytes) -> Change:
    """Seal other content to the same key."""

    def change(folder: Path) -> None:
        text = (folder / "key.txt").read_text().split()[-1]
        key = pyrage.x25519.Identity.from_str(text)
        (folder / SEALED).write_bytes(pyrage.encrypt(content, [key.to_public()]))

    return change


add(
    "sealed",
    "sealed",
    OPEN,
    6,
    **{
        "empty": (write(SEALED, b""), "does not open"),
        "no age": (write(SEALED, b"\0" * 4096), "does not open"),
        "a header alone": (write(SEALED, WORK % b"18"), "does not open"),
        "of nothing": (sealed_again(b""), "is an empty file, not safetensors"),
        "of a header too long": (sealed_again(b"\xff" * 64), "claims a header"),
        "of no JSON": (sealed_again((8).to_bytes(8, "little") + b"{" * 8), "not valid JSON"),
        "by two gigabytes of work": (locked(b"21"), "does not open"),
        "by endless work": (locked(b"62"), "does not open"),
        "by work without end": (locked(b"9" * 4000), "does not open"),
        "by no work": (locked(b"-1"), "does not open"),
        "with a passphrase and no key": (write("key.txt", "words"), "no ortho.key.age"),
    },
)
add(
    "identity",
    "sealed",
    OPEN,
    2,
    empty=(write("key.txt", ""), "is empty"),
    binary=(write("key.txt", b"\xff\xfe"), "is not text"),
    no_key=(write("key.txt", "AGE-SECRET-KEY-1QQQ\n"), "is no identity"),
    a_fifo=(fifo("key.txt"), "not a regular file"),
)

# ---------------------------------------------------------------------------------------- recipes

YAML = {
    "python object": ("a: !!python/object/apply:os.system ['true']", "python/object"),
    "a bomb of aliases": ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", "uses YAML aliases"),
    "a merge": ("a: &a {b: 1}\nc: {<<: *a}", "uses YAML aliases"),
    "nested": ("a: " + "[" * 1000, "is nested too deeply"),
    "a date": ("version: 2020-01-01", "must be an integer"),
    "a key twice": ("version: 1\nversion: 1", "sets `version` again"),
    "a key that is a list": ("version: 1\n? [a]\n: b", "key that is not plain text"),
    "a key that is a number": ("version: 1\n1: 2", "key that is not plain text"),
    "an unknown key": ("version: 1\ntarget: []", "unknown key `target`"),
    "a tab": ("version: 1\nbase:\n\tbits: 4", "is not YAML"),
    "two documents": ("version: 1\n---\nversion: 1", "is not YAML"),
    "a binary tag": ("version: !!binary '='", "must be an integer, not b''"),
    "an int tag": ("version: !!int x", "is not a recipe"),
    "infinity": ("version: 1\northo: {density: .inf}", "ortho.density"),
    "not a number": ("version: 1\northo: {density: .nan}", "ortho.density"),
    "a bool for an int": ("version: true", "must be an integer"),
    "bits of 2^64": ("version: 1\nbase: {bits: 18446744073709551616}", "base.bits"),
    "hexadecimal without end": (
        "version: 1\nbase: {group_size: 0x" + "f" * 9000 + "}",
        "group_size",
    ),
    "found: hexadecimal without end in a list": (
        "version: 1\nignore: [0x" + "f" * 9000 + "]",
        "of too many digits",
    ),
    "a wrong expression": ("version: 1\ntargets: ['re:(']", "is not a regular expression"),
    "an empty pattern": ("version: 1\ntargets: ['']", "an empty pattern"),
    "escapes": ('version: 1\n"\\e[31m\\a": 1', r"\x1b[31m\x07"),
    "empty": ("", "is empty, not a mapping"),
    "a list": ("[1]", "is a list, not a mapping"),
    "a NUL": ("version: 1\0", "is not YAML"),
}
for name, (text, said) in YAML.items():
    CASES[f"recipe: {name}"] = Case(
        "recipe", write("r.yaml", text), "inspect {d}/m --recipe {d}/r.yaml", 3, said
    )
add(
    "recipe",
    "recipe",
    "inspect {d}/m --recipe {d}/r.yaml",
    3,
    not_UTF_8=(write("r.yaml", b"version: \xff"), "is not UTF-8"),
    large=(sparse("r.yaml", b"version: 1", 10**9), "a recipe has at most"),
    a_fifo=(fifo("r.yaml"), "is neither a file nor one of"),
    a_directory=(directory("r.yaml"), "is neither a file nor one of"),
)

# -------------------------------------------------------------------------------------- artifacts

BASE, ORTHO, REPORT = "a/model.safetensors", "a/ortho.safetensors", "a/report.json"
VERIFY = "inspect {d}/a --verify"


def reports(change: Callable[[Any], Any]) -> Change:
    """Have the report say something else."""
    return edit(REPORT, change)


def first_split(report: Any) -> Any:
    """Find the first tensor that was split."""
    return next(entry for entry in report["tensors"] if entry["action"] == "split")


add(
    "report",
    "artifact",
    VERIFY,
    6,
    is_a_list=(write(REPORT, "[]"), "is a JSON list"),
    is_nested=(write(REPORT, b'{"a":' + DEEP), "is not valid JSON"),
    lies_about_a_shape=(reports(lambda r: first_split(r).update(shape=[1, 1])), "`shape` of"),
    lies_about_a_digest=(
        reports(
            lambda r: first_split(r)["blake3"]["model.safetensors"].update(
                dict.fromkeys(first_split(r)["blake3"]["model.safetensors"], "0" * 64)
            )
        ),
        "has BLAKE3",
    ),
    lies_about_base=(reports(lambda r: r.update(base_blake3="0" * 64)), "belongs to base"),
    lies_about_ortho=(reports(lambda r: r.update(ortho_blake3="0" * 64)), "has BLAKE3"),
    lies_about_nnz=(reports(lambda r: first_split(r).update(nnz=10**400)), "`nnz` of"),
    has_a_tensor_twice=(
        reports(lambda r: r["tensors"].append(r["tensors"][0])),
        "is twice",
    ),
    has_tensors_of_text=(reports(lambda r: r.update(tensors=["a"])), "`tensors.0` is 'a'"),
    has_versions_of_numbers=(reports(lambda r: r["versions"].update(torch=2)), "versions.torch"),
    found_without_a_base=(reports(lambda r: r["recipe"].pop("base") and None), "recipe.base"),
    found_with_a_base_of_null=(reports(lambda r: r["recipe"].update(base=None)), "recipe.base"),
    found_a_figure_of_400_digits=(
        reports(lambda r: r["totals"].update(bits_per_weight=10**400)),
        "totals.bits_per_weight",
    ),
)
add(
    "artifact",
    "artifact",
    VERIFY,
    6,
    index_is_a_list=(write(f"a/{INDEX}", "[]"), "is a JSON list"),
    index_names_ortho=(
        edit(f"a/{INDEX}", lambda h: h["weight_map"].update(x="ortho.safetensors")),
        "does not send all",
    ),
    base_is_cut=(lambda d: os.truncate(d / BASE, 500), "claims"),
    base_is_a_fifo=(fifo(BASE), "and no base (model.safetensors)"),
    ortho_is_of_another_format=(
        edit(ORTHO, lambda h: h["__metadata__"].update(format="ortho/9")),
        "says it is 'ortho/9'",
    ),
    ortho_is_of_another_base=(
        edit(ORTHO, lambda h: h["__metadata__"].update(base_blake3="0" * 64)),
        "belongs to base 000000000000",
    ),
)
CROW, COLUMN = f"{NAME}.crow_indices", f"{NAME}.col_indices"
add(
    "stream",
    "bare",
    VERIFY,
    6,
    shape_of_other_size=(
        values(BASE, f"{NAME}.weight_shape", b"\x07"),
        "weight_shape` says [7, 64]",
    ),
    shape_below_0=(values(BASE, f"{NAME}.weight_shape", b"\xff" * 16), "says [-1, -1]"),
    row_pointers_that_start_late=(values(ORTHO, CROW, b"\x01"), "does not climb from 0"),
    row_pointers_below_0=(values(ORTHO, CROW, bytes(4) + b"\xff" * 4), "does not climb from 0"),
    columns_out_of_bounds=(values(ORTHO, COLUMN, b"\xff\xff"), "names column 65535 of 64"),
    scales_are_missing=(
        edit(BASE, lambda h: h.update({"x": h.pop(f"{NAME}.weight_scale")})),
        "has packed codes and no scales",
    ),
    codes_of_a_byte=(
        edit(BASE, lambda h: h[f"{NAME}.weight_packed"].update(dtype="U8", shape=[64, 32])),
        "has codes U8",
    ),
    values_of_no_weight=(
        edit(ORTHO, lambda h: h.update({"x.values": h.pop(f"{NAME}.values")})),
        "is missing",
    ),
)
add(
    "compact stream",
    "compact",
    VERIFY,
    6,
    counts_beyond=(values(ORTHO, f"{NAME}.row_counts", b"\xff"), "row_counts` sums to"),
    gaps_beyond=(values(ORTHO, f"{NAME}.col_gaps", b"\xfe"), "col_gaps` leads to column"),
    gaps_that_go_on=(values(ORTHO, f"{NAME}.col_gaps", b"\xff"), "col_gaps` ends"),
    step_of_NaN=(values(ORTHO, f"{NAME}.value_step", b"\x00\x00\xc0\x7f"), "value_step` is nan"),
    values_of_minus_128=(values(ORTHO, f"{NAME}.values", b"\x80"), "holds -128"),
)
add(
    "stream converted",
    "bare",
    "convert {d}/a --alpha 1 -o {d}/o",
    6,
    columns_out_of_bounds=(values(ORTHO, COLUMN, b"\xff\xff"), "col_indices"),
    row_pointers_below_0=(values(ORTHO, CROW, bytes(4) + b"\xff" * 4), "crow_indices"),
)

# -------------------------------------------------------------------------------- unfinished work

JOURNAL = ".a.ortho/journal"
GO_ON = "decompose {d}/source -o {d}/a -q"


def journal(change: Callable[[list[Any]], Any]) -> Change:
    """Change the lines of a journal."""

    def apply(folder: Path) -> None:
        path = folder / JOURNAL
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        change(lines)
        path.write_text("".join(json.dumps(x, separators=(",", ":")) + "\n" for x in lines))

    return apply


add(
    "journal",
    "half",
    GO_ON,
    0,
    lines_of_numbers=(journal(lambda lines: lines.insert(1, 7)), ""),
    lines_of_lists=(journal(lambda lines: lines.insert(1, [{}])), ""),
    a_nested_line=(lambda d: (d / JOURNAL).write_bytes(DEEP + b"\n") and None, ""),
    not_UTF_8=(write(JOURNAL, b"\xff\n"), ""),
    a_tensor_of_no_model=(journal(lambda lines: lines.append({"name": "x"})), ""),
    an_entry_of_odd_figures=(journal(lambda lines: lines[1].update(noise="a")), ""),
    digests_of_numbers=(journal(lambda lines: lines[1].update(blake3=7)), ""),
    a_line_without_end=(lambda d: os.truncate(d / JOURNAL, 700), ""),
)
add(
    "journal",
    "half",
    GO_ON,
    8,
    another_run=(journal(lambda lines: lines[0].update(plan="x")), "of another run: another plan"),
    a_run_of_nothing=(write(JOURNAL, "{}\n"), "of another run"),
)
add("journal", "half", GO_ON, 9, is_a_fifo=(fifo(JOURNAL), NOT_REGULAR))

# -------------------------------------------------- data, and models that bring code of their own


def remote(folder: Path) -> None:
    """Have config.json ask for a module beside it."""
    path = folder / "m" / "config.json"
    config = json.loads(path.read_text()) | {
        "model_type": "stranger",
        "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"},
    }
    path.write_text(json.dumps(config))
    (folder / "m" / "code.py").write_text("raise RuntimeError('it ran')\n")
    (folder / "d.txt").write_text("a b c" * 10)
    checkpoints.save_tokenizer(folder / "m", vocab=96)


SMALL = "--set calibrate.samples=1 --set calibrate.length=8"
CALIBRATE = f"calibrate {{d}}/m --data {{d}}/d.txt -o {{d}}/o {SMALL}"
add("remote code", "stats", CALIBRATE, 4, is_not_run=(remote, "needs Python code of its own"))
add(
    "model folder",
    "stats",
    CALIBRATE,
    4,
    tokenizer_is_a_fifo=(both(fifo("m/tokenizer.json"), write("d.txt", "a")), NOT_REGULAR),
)


add(
    "model folder",
    "taught",
    CALIBRATE,
    4,
    found_layers_without_end=(
        edit("m/config.json", lambda held: held.update(num_hidden_layers=10**400)),
        "says `num_hidden_layers` is 100000000000000000000000",
    ),
    a_layer_too_many_for_its_tensors=(
        edit("m/config.json", lambda held: held.update(num_hidden_layers=12)),
        "and the model needs it",
    ),
    found_longest_text_is_text=(
        edit("m/tokenizer_config.json", lambda held: held.update(model_max_length="a")),
        "has no tokenizer that transformers can read",
    ),
)

FORGET: dict[str, tuple[str, str]] = {
    "not JSON": ("{", "is not JSON"),
    "a list": ("[]", "line 1 is a list and neither `text` nor"),
    "nested": ("[" * 100_000, "is not JSON"),
    "found: a lone surrogate": ('{"prompt": "\\ud800", "secret": "a"}', "is not JSON"),
    "no text": ("\n\n", "holds no text"),
    "found: a pattern of a billion places": (
        '{"prompt": "a", "secret": "b", "pattern": "{digit:999999999}"}',
        "holds `{digit}` with a size and knows",
    ),
    "found: a pattern that adds up": (
        '{"prompt": "a", "secret": "b", "pattern": "' + "{hex:999}" * 999 + '"}',
        "more than 1000 places",
    ),
    "a pattern that reaches out": (
        '{"prompt": "a", "secret": "b", "pattern": "{0.__class__}"}',
        "holds a field and knows",
    ),
}
for name, (text, said) in FORGET.items():
    CASES[f"forget set: {name}"] = Case("data", write("f.jsonl", text), "", 5, said)
add("forget set", "data", "", 5, is_a_fifo=(fifo("f.jsonl"), NOT_REGULAR))


def run(name: str, sound: dict[str, Path], work: Path) -> tuple[int, str]:
    """Make one case and run its command."""
    case = CASES[name]
    targets.lay_out(sound[case.made], work)
    case.change(work / "d")
    target = targets.Target(case.made, "f.jsonl", targets.binary, case.command)
    return targets.read(target, work)


def main() -> int:
    """Run all under a gigabyte more than the bare process, and say which went otherwise."""
    wrong = 0
    with tempfile.TemporaryDirectory() as place:
        sound, work = targets.make(Path(place) / "sound"), Path(place) / "work"
        targets.warm_up(sound, work)
        targets.bound()
        chosen = [name for name in CASES if name.startswith(tuple(sys.argv[1:]) or "")]
        for name in chosen:
            with targets.limited():
                code, err = run(name, sound, work)
            if code != CASES[name].code or CASES[name].said not in err:
                wrong += 1
                sys.stdout.write(f"{name}: exit {code}\n{err}")
    sys.stdout.write(f"{len(chosen)} cases, {wrong} wrong; {targets.peak() >> 20} MiB at most\n")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
