"""What must not be copied into a folder that may be published: weights and secrets.

Names and bytes decide. A wrong "yes" costs a file that is left out (and named), a wrong "no" is a
leak: so more counts as weights here than `sniff` has words for. Standard library
only.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Literal

from ortho_cli.storage import sniff
from ortho_cli.storage.untrusted import open_regular

# Bytes: every magic number is in the first few hundred, and most JSON lines end here.
HEAD = 1 << 16
PIECE = 1 << 20  # bytes read at a time
OVERLAP = 256  # bytes of a piece that are looked at with the next: longer than any pattern below
SMALL = 1 << 16  # bytes: a sentencepiece model of less is not looked into
# Bytes: twice the largest vocabularies in use (Gemma's tokenizer.json has 33 MB); the INT4 base of
# the smallest language models has more.
LARGE = 64 << 20
Kind = Literal["text", "pieces", "any"]

PIECES = 64  # entries of a sentencepiece model that are checked

# Extensions of weights, optimizer states and archives. A name counts when any part of it behind a
# dot begins with one of them: `model.safetensors.bak` and `model.onnx_data_1` do.
WEIGHT_PARTS = {
    "safetensors", "bin", "pt", "pth", "pt2", "pte", "ckpt", "pkl", "pickle", "joblib", "npy",
    "npz", "gguf", "ggml", "ggjt", "llamafile", "onnx", "ort", "h5", "hdf5", "keras", "msgpack",
    "tflite", "ot", "distcp", "nemo", "mlmodel", "mlpackage", "mlmodelc", "pdparams", "pdopt",
    "pdiparams", "params", "caffemodel", "engine", "plan", "trt", "rknn", "t7", "mar", "orbax",
    "zarr", "tensorstore", "tar", "tgz", "gz", "zip", "zst", "zstd", "xz", "lzma", "bz2", "lz4",
    "7z", "rar", "cpio", "part", "partial", "crdownload", "incomplete", "aria2",
}  # fmt: skip
# File names that hold secrets, in lower case. `*forget*`, `canar*` and `nonmember*` are what lists
# secrets for this program.
_SECRET_NAMES = (
    ".env*", "*.env", ".netrc", "_netrc", "netrc", ".pgpass", ".htpasswd", ".npmrc", ".pypirc",
    ".git-credentials", "*.pem", "*.key", "*.p8", "*.p12", "*.pfx", "*.jks", "*.keystore", "*.kdbx",
    "*.kdb", "*.ppk", "*.age", "*.gpg", "*.pgp", "*.asc", "*.ovpn", "*.tfstate", "id_rsa*",
    "id_dsa*", "id_ecdsa*", "id_ed25519*", "passwd*", "shadow", "token", "token.txt", "tokens.txt",
    "*_token", "*_token.txt", "*-token.txt", "*forget*", "*canar*", "*nonmember*", "*unlisted*",
    "*secret*", "*passphrase*", "*password*", "*credential*", "*service-account*",
    "*service_account*", "*wallet*", "stored_tokens", "*.jsonl.age",
)  # fmt: skip
_SECRET_WORD = re.compile(r"(^|[^a-z0-9])(keys?|apikeys?|identity|identities|pass|pw)([^a-z0-9]|$)")
_SECRET_FOLDERS = frozenset(
    (".ssh", ".aws", ".gnupg", ".gpg", ".kube", ".docker", ".azure", ".password-store", "gcloud",
     "secrets", ".secrets")
)  # fmt: skip
_VIRTUAL = ("proc", "sys", "dev")  # under /: not files on a disk, whatever their mode says

_NO_WEIGHTS = (sniff.PDF, sniff.PNG, sniff.FORK, sniff.SEALED)
_MAGICS = (
    *(magic for magic, kind in sniff.MAGIC.items() if kind not in _NO_WEIGHTS),
    *(b"\x04\x22\x4d\x18", b"]\x00\x00", b"MZqFpD", b"070701"),
)
_MAGICS_AT = ((257, b"ustar"), (4, b"TFL3"), (4, b"ORTM"))
# What is looked for first, since it is fast, and what then has to be there. Access tokens are those
# of the Hub, GitHub, GitLab, AWS, Google, Slack and of servers of models, by their own forms: no
# vocabulary holds a word like that. A token begins a word, or is behind an escape (`\\n`, `%20`).
_MARKS = (
    b"SECRET-KEY-", b"secret-key-", b"PRIVATE KEY", b"age-encryption.org/v1", b"AGE ENCRYPTED",
    b"PuTTY-User-Key", b"hf_", b"ghp_", b"gho_", b"ghu_", b"ghs_", b"ghr_", b"AKIA",
    b"github_pat_", b"glpat-", b"sk-", b"xox", b"AIza",
)  # fmt: skip
_SECRET = re.compile(
    rb"(?:AGE-SECRET-KEY-(?:[A-Z0-9]+-)?1[A-Z0-9]{20}|age-secret-key-(?:[a-z0-9]+-)?1[a-z0-9]{20})"
    rb"|-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----|age-encryption\.org/v1"
    rb"|-----BEGIN AGE ENCRYPTED FILE-----|PuTTY-User-Key-File-"
    rb"|(?:(?<![A-Za-z0-9])|(?<=\\[nrt])|(?<=\\u[0-9A-Fa-f]{4})|(?<=%[0-9A-Fa-f]{2}))"
    rb"(?P<token>hf_[A-Za-z0-9]{34}|hf_oauth_[A-Za-z0-9_]{20,}|gh[pousr]_[A-Za-z0-9]{36}"
    rb"|github_pat_[A-Za-z0-9_]{60,}|glpat-[\w-]{20}|AKIA[A-Z0-9]{16}|AIza[\w-]{35}"
    rb"|sk-(?:proj|ant|or|svcacct)-[\w-]{20,}|sk-[A-Za-z0-9]{48}|xox[abprs]-[\w-]{20,})"
    rb"(?![A-Za-z0-9])"
)
_ROW = (re.compile(rb'(?i)"secret"\s*:\s*"'), re.compile(rb'(?i)"prompt"\s*:'))
VARIED = 9  # different characters at least of a token that is no example such as hf_xxxx


def names_weights(name: str) -> bool:
    """Tell by its name whether a file holds weights, or an archive that could."""
    parts = re.findall(r"\.([a-z0-9]+)", name.lower())
    return not WEIGHT_PARTS.isdisjoint(parts)


def names_secret(name: str) -> bool:
    """Tell by its name whether a file holds keys, passwords, or a list of secrets."""
    lower = name.lower()
    if any(fnmatch.fnmatchcase(lower, pattern) for pattern in _SECRET_NAMES):
        return True
    is_code = lower.endswith((".py", ".jinja", ".jinja2"))  # of keys and values, as a rule
    return not is_code and _SECRET_WORD.search(lower) is not None


def leads_to_secret(path: Path) -> bool:
    """Tell whether a link, or one that it leads to, names a secret or a place of secrets.

    The folders of the link itself do not count: the whole model may be in `secrets/`.
    """
    own = {*Path(os.path.abspath(path)).parents, *path.parent.resolve().parents}  # noqa: PTH100
    for hop in _hops(path):
        folders = {folder.name.lower() for folder in hop.parents if folder not in own}
        if names_secret(hop.name) or not _SECRET_FOLDERS.isdisjoint(folders):
            return True
        if len(hop.parts) > 1 and hop.parts[1] in _VIRTUAL:
            return True
    return False


def _hops(path: Path) -> list[Path]:
    """Name what a link leads to, one step after another; nothing for what is no link."""
    hops: list[Path] = []
    while path.is_symlink() and len(hops) < 40:  # as many as the kernel follows
        path = Path(os.path.normpath(path.parent / path.readlink()))
        hops.append(path)
    return [*hops, path.resolve()] if hops else []


def holds_weights(path: Path, size: int, *, kind: Kind) -> bool:
    """Tell by its bytes whether a file holds weights.

    Args:
        path: the file.
        size: its bytes.
        kind: what belongs there. Other bytes than text, or than a sentencepiece model where that
            belongs, are taken for weights.
    """
    with open_regular(path) as file:
        head = file.read(HEAD)
        if _has_magic(head):
            return True
        if kind == "any":
            return size > LARGE and b"\0" in head
        if kind == "pieces" and (size <= SMALL or _is_sentencepiece(head)):
            return False
        if kind == "text" and head.startswith(b"%PDF-"):  # licences come as PDF, too
            return False
        pieces = iter(partial(file.read, PIECE), b"")
        return b"\0" in head or any(b"\0" in piece for piece in pieces)


def _has_magic(head: bytes) -> bool:
    if head.startswith(_MAGICS) or any(head[at:].startswith(word) for at, word in _MAGICS_AT):
        return True
    # safetensors: the length of a header, and its brace.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 40:
        return True
    # pickle of protocol 2 and later, as torch wrote before 1.6; ONNX and other protocol buffers
    # that start with a small version number.
    return (head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05") or (
        head[:1] == b"\x08" and head[2:3] in b"\x12\x1a\x22\x3a\x42\x10"
    )


def _is_sentencepiece(head: bytes) -> bool:
    """Tell a sentencepiece model: field 1 of a protocol buffer again and again, each a piece.

    A piece is its text (field 1), a score (field 2, float) and a type (field 3).
    """
    at = 0
    for _ in range(PIECES):
        entry = head[at : at + 4]
        if len(entry) < 4:
            break
        if at and entry[0] != 10:  # behind the last piece: how it was trained, and more
            return entry[0] in b"\x12\x1a\x22\x2a"
        wide = entry[1] >= 128  # a length of 128 and more takes two bytes
        length = entry[1] - 128 + (entry[2] << 7) if wide else entry[1]
        if entry[0] != 10 or entry[2 + wide] != 10:
            return False
        at += 2 + wide + length
    return at > 0


def holds_secret(path: Path) -> bool:
    """Tell by its bytes whether a file holds a key, an access token or a forget set."""
    with open_regular(path) as file:
        head = file.read(HEAD)
        if _is_forget_set(head):
            return True
        file.seek(0)
        kept = b""
        for piece in iter(partial(file.read, PIECE), b""):
            window = kept + piece
            if any(_is_secret(window, at) for mark in _MARKS for at in _find(window, mark)):
                return True
            kept = window[-OVERLAP:]
    return False


def _find(window: bytes, mark: bytes) -> Iterator[int]:
    at = window.find(mark)
    while at >= 0:
        yield at
        at = window.find(mark, at + 1)


def _is_secret(window: bytes, at: int) -> bool:
    """Tell whether a secret is around a mark: the pattern alone takes a second for 30 MB."""
    around = window[max(0, at - OVERLAP // 2) : at + OVERLAP]
    tokens = (found["token"] for found in _SECRET.finditer(around))
    return any(token is None or len(set(token)) >= VARIED for token in tokens)


def _is_forget_set(head: bytes) -> bool:
    """Tell rows of a forget set, as JSON in any nesting or as a table, whatever the file's name."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n[")
    first = start.partition(b"\n")[0].lower()
    columns = {field.strip(b' "\r') for field in re.split(rb"[,;\t]", first)}
    if columns >= {b"prompt", b"secret"} or all(pattern.search(head) for pattern in _ROW):
        return True
    if not start.startswith(b"{"):
        return False
    try:
        row, _ = json.JSONDecoder().raw_decode(start.decode(errors="ignore"))
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and isinstance(row.get("secret"), str) and "prompt" in row
