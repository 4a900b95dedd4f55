"""Sniffing: the kind of a file by its first bytes, whatever its name says.

Downloads fail in a few known ways: a Git LFS pointer, a web page or an error message is in
place of the weights. Each has a remedy once it is named; "damaged" has none. A kind is spelled as a
message names it. Standard library only.
"""

from __future__ import annotations

import re
import tarfile
import zipfile
from pathlib import Path

from ortho_cli.storage.hints import convert, fetch, python, said
from ortho_cli.storage.untrusted import open_regular

HEAD = 1024  # bytes that are looked at; the mark of a tar archive ends at byte 262
NAMED = 64  # bytes at least of a zip archive that holds the name of its first member
FIRST_MEMBERS = 8  # of a tar archive, which has no list of them; more would mean to read it all

LFS = "a Git LFS pointer"
ANNEX = "a git-annex pointer"
DVC = "a DVC pointer"
PAGE = "an HTML page"
XML = "an XML document"
JSON = "JSON text"
TEXT = "plain text"
EMPTY = "an empty file"
ZEROS = "a file of zeros"  # which an unfinished download leaves
REFUSAL = "an error message"  # what follows it is the message

SAFETENSORS = "a safetensors file"
TORCH = "a torch file"
OLD_TORCH = "a torch file of before version 1.6"
TORCH_TAR = "a tar archive of torch before version 0.1.10"
TORCHSCRIPT = "a TorchScript program"
EXPORT = "a program of torch.export"
PICKLE = "a pickle, which can run code when it is read"
NEMO = "a NeMo archive"
GGUF = "a GGUF file"
_OLD_GGUF = "of before GGUF"
HDF5 = "an HDF5 file"
NUMPY = "a NumPy array"
NPZ = "a NumPy archive"
FASTTEXT = "a fastText model"

ZIP = "a zip archive"
TAR = "a tar archive"
SEVEN_ZIP = "a 7z archive"
RAR = "a RAR archive"
GZIP = "a gzip file"
BZIP2 = "a bzip2 file"
XZ = "an xz file"
ZSTD = "a zstd file"
SEALED = "a file that age encrypted"

PARQUET = "a Parquet file"
PDF = "a PDF document"
PNG = "a PNG image"
FORK = "a macOS resource fork"

TORCHES = (TORCH, OLD_TORCH)
POINTERS = (LFS, ANNEX, DVC)
STAND_INS = (*POINTERS, PAGE, XML, EMPTY, ZEROS)

MAGIC = {
    b"GGUF": GGUF,
    b"FUGG": GGUF,
    b"lmgg": f"a GGML file {_OLD_GGUF}",  # the letters of a number, lowest byte first
    b"fmgg": f"a GGMF file {_OLD_GGUF}",
    b"tjgg": f"a GGJT file {_OLD_GGUF}",
    b"algg": f"a GGLA adapter {_OLD_GGUF}",
    b"\xba\x16\x4f\x2f": FASTTEXT,
    b"\x89HDF": HDF5,
    b"\x93NUMPY": NUMPY,
    b"\x1f\x8b": GZIP,
    b"BZh": BZIP2,
    b"\xfd7zXZ": XZ,
    b"\x28\xb5\x2f\xfd": ZSTD,
    b"PK\x03\x04": ZIP,
    b"PK\x05\x06": ZIP,
    b"7z\xbc\xaf\x27\x1c": SEVEN_ZIP,
    b"Rar!": RAR,
    b"\x7fELF": "a program",
    b"\x00\x05\x16\x07": FORK,
    b"age-encryption.org/": SEALED,
    b"-----BEGIN AGE ENCRYPTED FILE": SEALED,
    b"PAR1": PARQUET,
    b"ARROW1": "an Arrow file",
    b"SQLite format 3": "an SQLite database",
    b"Obj\x01": "an Avro file",
    b"%PDF-": PDF,
    b"\x89PNG": PNG,
}
# What begins in more than one way; (?s) lets a dot stand for any byte.
_PATTERNS = (
    (rb"version https?://(git-lfs|hawser)\.github\.com/", LFS),
    (rb"(\.\./)*(/|\.git/)annex/objects/", ANNEX),
    (rb"outs:\s*\n- (md5|etag)", DVC),
    (rb"(?i)(\xef\xbb\xbf)?\s*(<\?xml[^>]*>\s*)?<(!doctype html|html|head|body|title)\b", PAGE),
    (rb"(?i)(\xef\xbb\xbf)?\s*<(\?xml|error>)", XML),
    # The number that torch.save of before 1.6 begins with, behind the protocol and a frame's length
    (rb"(?s)\x80[\x02-\x05].{0,9}\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19\.", OLD_TORCH),
    (rb"(?s)PK\x03\x04.{26}(.{,170}/)?(data\.pkl|version|byteorder|\.format_version)", TORCH),
    (rb"(?s)\xff{4}...\0", "an Arrow stream"),
    (rb"(?s).{257}ustar", TAR),
    (rb"(?s)....\0{4}\s*\{", SAFETENSORS),  # a header of less than 2^32 bytes
    (rb"\x80[\x02-\x05]", PICKLE),
    (rb"\0{8,}\Z", ZEROS),
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
    for pattern, kind in _PATTERNS:
        if re.match(pattern, first):
            return kind
    if _REFUSED.match(first) and len(first) < HEAD:
        return f"{REFUSAL} ({first.decode(errors='replace').strip()[:60]!r})"
    return next((kind for magic, kind in MAGIC.items() if first.startswith(magic)), None)


def is_stand_in(kind: str) -> bool:
    """Tell what a download leaves in place of a file, whatever the file should have been."""
    return kind in STAND_INS or kind.startswith(REFUSAL)


def kind_of_file(path: Path) -> str | None:
    """Name what a file is; None if nothing tells, or it cannot be read.

    Beyond `kind_of` it looks at the members of zip and tar archives, and knows text and JSON.
    """
    try:
        with open_regular(path) as file:
            first = file.read(HEAD)
        kind = kind_of(first)
        if first.startswith(b"PK\x03\x04"):
            return _kind_of_zip(path, first)
        return _kind_of_tar(path) if kind == TAR else kind or _kind_of_text(first)
    except OSError:
        return None


def _kind_of_text(first: bytes) -> str | None:
    if any(byte < 32 and byte not in b"\t\r\n\f" for byte in first):
        return None
    try:
        first.decode()
    except UnicodeDecodeError as error:
        if error.start <= HEAD - 4:  # no character that HEAD cut in two
            return None
    return JSON if first.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{") else TEXT


def _kind_of_zip(path: Path, first: bytes) -> str:
    """Tell a torch file from other zip archives by its members."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError):
        # It is cut. Where its first name is not there, torch may say more than unzip does.
        return TORCH if len(first) < NAMED else str(kind_of(first))
    inner = {name.partition("/")[2] for name in names}
    if "models/model.json" in inner or "archive_format" in inner:
        return EXPORT
    if "data.pkl" in inner:
        return TORCHSCRIPT if "constants.pkl" in inner else TORCH
    return NPZ if names and all(name.endswith(".npy") for name in names) else ZIP


def _kind_of_tar(path: Path) -> str:
    names: set[str] = set()
    try:
        with tarfile.open(path) as archive:
            while len(names) < FIRST_MEMBERS and (member := archive.next()):
                names.add(member.name.removeprefix("./"))
    except (tarfile.TarError, EOFError, ValueError):
        return TAR
    if {"sys_info", "storages", "tensors", "pickle"} & names:
        return TORCH_TAR
    return NEMO if any(name.startswith("model_") for name in names) else TAR


_SUFFIXES = {TORCH: ".bin", OLD_TORCH: ".bin", GGUF: ".gguf", SAFETENSORS: ".safetensors"}
ARCHIVES = {
    ZIP: "unzip {}",
    TAR: "tar -xf {}",
    SEVEN_ZIP: "7z x {}",
    RAR: "unrar x {}",
    GZIP: "gunzip -c {} > {}",
    BZIP2: "bunzip2 -c {} > {}",
    XZ: "xz -dc {} > {}",
    ZSTD: "zstd -dc {} > {}",
}
_LOAD = {
    TORCHSCRIPT: "torch.jit.load(sys.argv[1], 'cpu').state_dict()",
    EXPORT: "torch.export.load(sys.argv[1]).state_dict",
    PICKLE: "pickle.load(open(sys.argv[1], 'rb'))",
    TORCH_TAR: "torch.load(sys.argv[1], weights_only=False)",
}


def remedy(kind: str, path: Path) -> str:
    """Say how to get the file that should be there, with the whole command.

    Args:
        kind: as `kind_of` or `kind_of_file` names it.
        path: the file that is of that kind and should not be.
    """
    if kind in (*TORCHES, GGUF) and path.suffix != _SUFFIXES[SAFETENSORS]:
        return convert(path)
    if (suffix := _SUFFIXES.get(kind)) is not None:
        other = path.with_suffix(suffix)
        other = path.with_name(path.name + suffix) if other.exists() else other
        return f"`mv {said(path)} {said(other)}`, then `ortho convert {said(other)}`"
    if kind in ARCHIVES:
        other = path.with_suffix("") if path.suffixes[1:] else path.with_name("unpacked")
        other = path.with_name(f"{path.name}.unpacked") if other.exists() else other
        command = ARCHIVES[kind].format(said(path), said(other))
        return f"unpack it: `{command}`, and give what comes out"
    if kind in _LOAD:
        trust = "" if kind == EXPORT else "if you trust where it comes from, "
        code = f"import pickle, sys, torch; torch.save({_LOAD[kind]}, 'weights.pt')"
        return f"{trust}save its weights: {python(code, path)}, then `ortho convert weights.pt`"
    if kind in (HDF5, NUMPY, NPZ, FASTTEXT):
        return f"convert it to safetensors with the library that wrote it; or {fetch(path)}"
    if kind.endswith(_OLD_GGUF):
        tool = "llama.cpp's convert_llama_ggml_to_gguf"
        return f"get the model as GGUF, or convert it by {tool}; or {fetch(path)}"
    folder, name = said(path.parent), said(Path(path.name))
    ways = {
        LFS: f"`git -C {folder} lfs pull --include {name}` fetches the file that it stands for",
        ANNEX: f"`git -C {folder} annex get {name}` fetches the file that it stands for",
        DVC: "`dvc pull` fetches the file that it stands for",
        NEMO: f"unpack it: `tar -xf {said(path)} --wildcards '*model_weights.ckpt'`, then "
        "`ortho convert model_weights.ckpt`",
        SEALED: "give what it was made from, or the artifact's folder with --identity FILE",
    }
    return ways.get(kind) or fetch(path)
