"""What a file is by its first bytes, where its name says something else.

Downloads fail in a few known ways: a Git LFS pointer, a web page or an error message lies where
weights should be. Told by name, each has a way out; "damaged" has none. Standard library only.
"""

from __future__ import annotations

import re
from pathlib import Path

from ortho_cli.files import open_regular
from ortho_cli.hints import fetch, said

HEAD = 1024  # bytes that are looked at; the mark of a tar archive ends at byte 262

LFS = "a Git LFS pointer"
ANNEX = "a git-annex pointer"
DVC = "a DVC pointer"
PAGE = "an HTML page"
XML = "an XML document"
EMPTY = "an empty file"
ZEROS = "a file of zeros"
TORCH = "a torch file"
PICKLE = "a pickle, as torch wrote before version 1.6"
GGUF = "a GGUF file"
SAFETENSORS = "a safetensors file"
ZIP = "a zip archive"
GZIP = "a gzip file"
TAR = "a tar archive"
SEALED = "a file that age encrypted"
REFUSAL = "an error message"  # what follows it is the message

_MAGIC = (
    (b"GGUF", GGUF),
    (b"FUGG", GGUF),
    (b"\x1f\x8b", GZIP),
    (b"BZh", "a bzip2 file"),
    (b"\xfd7zXZ", "an xz file"),
    (b"\x28\xb5\x2f\xfd", "a zstd file"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive"),
    (b"Rar!", "a RAR archive"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x93NUMPY", "a numpy file"),
    (b"PAR1", "a Parquet file"),
    (b"\x89PNG", "a PNG image"),
    (b"%PDF", "a PDF"),
    (b"\x7fELF", "a program"),
    (b"\x00\x05\x16\x07", "a macOS resource fork"),
    (b"age-encryption.org/", SEALED),
    (b"-----BEGIN AGE ENCRYPTED FILE", SEALED),
    (b"lmgg", "a GGML file of before GGUF"),
    (b"tjgg", "a GGML file of before GGUF"),
    (b"fmgg", "a GGML file of before GGUF"),
)
_POINTERS = (
    (rb"version https?://(git-lfs|hawser)\.github\.com/", LFS),
    (rb"(\.\./)*(/|\.git/)annex/objects/", ANNEX),
    (rb"outs:\s*\n- (md5|etag)", DVC),
    (rb"(?i)\s*<(!doctype html|html|head|body|title)\b", PAGE),
    (rb"(?i)\s*<(\?xml|error>)", XML),
)
# What the Hub, its mirrors and proxies answer in place of a file.
_REFUSED = re.compile(
    rb"(?i)\s*(entry not found|repository not found|revision not found|not found|404\b|403\b|401\b|"
    rb"429\b|invalid (username|credentials)|access to (model|dataset)|access denied|unauthorized|"
    rb"forbidden|bad gateway|too many requests|internal server error|rate limit|"
    rb"\{\s*\"(error|message|detail)\"\s*:\s*\")"
)


def kind_of(first: bytes) -> str | None:
    """Name what a file is by its first bytes, with its article; None if they tell nothing.

    Args:
        first: the first `HEAD` bytes, or all of a shorter file.
    """
    if not first:
        return EMPTY
    for pattern, kind in _POINTERS:
        if re.match(pattern, first):
            return kind
    if _REFUSED.match(first) and len(first) < HEAD:
        return f"{REFUSAL} ({first.decode(errors='replace').strip()[:60]!r})"
    for magic, kind in _MAGIC:
        if first.startswith(magic):
            return kind
    return _container_of(first)


def _container_of(first: bytes) -> str | None:
    if first.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        if len(first) < 64:  # cut before the first name, which tells the two apart
            return None
        is_torch = re.search(rb"(^|/)(data\.pkl|version|byteorder|\.format_version)", first[30:200])
        return TORCH if is_torch else ZIP
    if first[257:262] == b"ustar":
        return TAR
    length = int.from_bytes(first[:8], "little")  # of a safetensors header, if it is one
    if re.match(rb"\x80[\x02-\x05]", first) and length >> 32:
        return PICKLE
    if first[8:].lstrip()[:1] == b"{" and length < 1 << 32:
        return SAFETENSORS
    return ZEROS if len(first) >= 8 and not any(first) else None


def is_stand_in(kind: str) -> bool:
    """Tell what a download leaves in place of a file, whatever the file should have been."""
    return kind in (LFS, ANNEX, DVC, PAGE, XML, EMPTY, ZEROS) or kind.startswith(REFUSAL)


def kind_of_file(path: Path) -> str | None:
    """Name what a file is by its first bytes; None if they tell nothing, or cannot be read."""
    try:
        with open_regular(path) as file:
            return kind_of(file.read(HEAD))
    except OSError:
        return None


def remedy(kind: str, path: Path) -> str:
    """Say how to get the file that should be there, with the whole command.

    Args:
        kind: as `kind_of` names it.
        path: the file that is of that kind and should not be.
    """
    folder, name = said(path.parent), said(Path(path.name))
    renamed = {TORCH: ".bin", PICKLE: ".bin", GGUF: ".gguf"}.get(kind)
    if renamed and path.suffix != renamed:
        other = path.with_suffix(renamed)
        return f"`mv {said(path)} {said(other)}`, then `ortho convert {said(other)}`"
    if renamed:
        return f"`ortho convert {said(path)}` writes it as safetensors"
    found = {
        LFS: f"`git -C {folder} lfs pull --include {name}` fetches the file that it stands for",
        ANNEX: f"`git -C {folder} annex get {name}` fetches the file that it stands for",
        DVC: "`dvc pull` fetches the file that it stands for",
        ZIP: f"unpack it: `unzip {said(path)}`",
        TAR: f"unpack it: `tar -xf {said(path)}`",
        GZIP: f"unpack it: `gunzip -c {said(path)}`",
        SEALED: "give what it was made from, or the artifact's folder with --identity FILE",
        SAFETENSORS: f"`mv {said(path)} {said(path.with_suffix('.safetensors'))}`",
    }
    return found.get(kind) or fetch(path)
