"""What a file holds, told by its first bytes and not by its name.

Downloads leave Git LFS pointers, HTML pages and half files under the names of weights, and people
rename files. Only a few bytes are read, and for zip and tar archives the list of members.
"""

from __future__ import annotations

import shlex
import tarfile
import zipfile
from pathlib import Path

from ortho_cli.errors import CheckpointError
from ortho_cli.files import open_regular

HEAD = 1024  # bytes that tell the kind; a tar archive says so at byte 257
TORCH_MAGIC = (
    b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the number that torch.save of before 1.6 begins with
)
FIRST_MEMBERS = 8  # of a tar archive, which has no list of them; more would mean to read it all
PICKLE_START = 11  # bytes before the first object, at most: the protocol and a frame's length
MAX_HEADER = 100_000_000  # bytes; safetensors' own limit

# First bytes, and what begins with them.
MAGIC = (
    (b"GGUF", "gguf"),
    (b"version https://git-lfs", "lfs"),
    (b"lmgg", "ggml"),  # the letters of a number, lowest byte first
    (b"tjgg", "ggml"),
    (b"fmgg", "ggml"),
    (b"\xba\x16\x4f\x2f", "fasttext"),
    (b"\x1f\x8b", "gzip"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"(\xb5/\xfd", "zstd"),
    (b"7z\xbc\xaf\x27\x1c", "7z"),
    (b"\x89HDF", "hdf5"),
    (b"\x93NUMPY", "numpy"),
    (b"PAR1", "parquet"),
)
WORDS = {
    "safetensors": "safetensors",
    "gguf": "a GGUF model",
    "ggml": "a GGML model of before GGUF",
    "fasttext": "a fastText model",
    "lfs": "a Git LFS pointer, not the file that it points to",
    "html": "an HTML page, not weights",
    "xml": "an XML document, not weights",
    "json": "JSON text, not weights",
    "text": "plain text, not weights",
    "empty": "nothing: it has 0 bytes",
    "zeros": "zero bytes, which an unfinished download leaves",
    "gzip": "gzip-compressed data",
    "bzip2": "bzip2-compressed data",
    "xz": "xz-compressed data",
    "zstd": "zstd-compressed data",
    "7z": "a 7z archive",
    "zip": "a zip archive that torch.save did not write",
    "npz": "NumPy arrays (.npz)",
    "numpy": "a NumPy array",
    "hdf5": "HDF5, as Keras and TensorFlow write it",
    "parquet": "a Parquet table",
    "torchscript": "a TorchScript program",
    "export": "a program of torch.export",
    "nemo": "a NeMo archive",
    "tar": "a tar archive",
    "old-torch": "a tar archive of torch before 0.1.10",
    "pickle": "a plain pickle, which runs what it says when it is read",
}
AGAIN = "download it again: `hf download REPO FILE` fetches the weights themselves"


def kind_of(path: Path) -> str | None:
    """Tell what a file holds: `torch` for what torch.save wrote, a key of WORDS, or None.

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    with open_regular(path) as file:
        head = file.read(HEAD)
        size = file.seek(0, 2)
    if head[:4] == b"PK\x03\x04":
        return _kind_of_zip(path)
    found = next((kind for magic, kind in MAGIC if head.startswith(magic)), None)
    if found is not None:
        return found
    if head[257:262] == b"ustar":
        return _kind_of_tar(path)
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "torch" if TORCH_MAGIC in head[: PICKLE_START + len(TORCH_MAGIC)] else "pickle"
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and length <= min(MAX_HEADER, size - 8):
        return "safetensors"
    return _kind_of_text(head)


def _kind_of_text(head: bytes) -> str | None:
    if not head.strip(b"\0"):
        return "zeros" if head else "empty"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for start, kind in ((b"<!doctype", "html"), (b"<html", "html"), (b"<", "xml"), (b"{", "json")):
        if text.startswith(start):
            return "html" if kind == "xml" and b"<html" in text else kind
    if any(byte < 32 and byte not in b"\t\r\n\f" for byte in head):
        return None
    try:
        head.decode()
    except UnicodeDecodeError as error:
        return "text" if error.start > HEAD - 4 else None  # a character that HEAD cut in two
    return "text"


def _kind_of_zip(path: Path) -> str:
    """Tell a torch file from other zip archives by its members."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError):
        return "torch"  # it is cut, and torch says where
    inner = {name.partition("/")[2] for name in names}
    if "models/model.json" in inner or "archive_format" in inner:
        return "export"
    if "data.pkl" in inner:
        return "torchscript" if "constants.pkl" in inner else "torch"
    if names and all(name.endswith(".npy") for name in names):
        return "npz"
    return "zip"


def _kind_of_tar(path: Path) -> str:
    names: set[str] = set()
    try:
        with tarfile.open(path) as archive:
            while len(names) < FIRST_MEMBERS and (member := archive.next()):
                names.add(member.name.removeprefix("./"))
    except (tarfile.TarError, EOFError, ValueError):
        return "tar"
    if {"sys_info", "storages", "tensors", "pickle"} & names:
        return "old-torch"
    return "nemo" if any(name.startswith("model_") for name in names) else "tar"


def wrong_kind(path: Path, kind: str) -> CheckpointError:
    """Say what a file holds that was taken for weights of torch, and what to do with it."""
    return CheckpointError(f"`{path}` holds {WORDS[kind]}", hint=_way_out(path, kind))


def _way_out(path: Path, kind: str) -> str:
    name = shlex.quote(str(path))
    if kind in ("safetensors", "gguf"):
        other = shlex.quote(str(path.with_name(f"{path.name}.{kind}")))
        return f"give it the name of its kind: `mv {name} {other}`, then `ortho convert {other}`"
    if kind == "lfs":
        return "fetch the file itself: `git lfs pull` in its repository, or `hf download REPO`"
    if kind in ("html", "xml", "json", "text", "empty", "zeros"):
        return AGAIN
    if kind == "nemo":
        return (
            f"unpack it: `tar -xf {name} --wildcards '*model_weights.ckpt'`, then "
            "`ortho convert model_weights.ckpt`"
        )
    return _way_of_archives(name, kind)


def _way_of_archives(name: str, kind: str) -> str:
    if kind in ("gzip", "bzip2", "xz", "zstd", "7z", "zip", "tar"):
        return "unpack it, and give the file of weights that is in it"
    if kind == "torchscript":
        load = f"torch.jit.load({name!r}).state_dict()"
    elif kind == "export":
        load = f"torch.export.load({name!r}).state_dict"
    elif kind in ("pickle", "old-torch"):
        load = f"torch.load({name!r}, weights_only=False)"
    else:
        return "convert it to safetensors with the library that wrote it"
    trust = "" if kind == "export" else "if you trust where it comes from, "
    script = f"import torch; torch.save({load}, {'weights.pt'!r})".replace('"', "'")
    return f'{trust}save its weights: `python -c "{script}"`, then `ortho convert weights.pt`'
