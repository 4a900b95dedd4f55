"""Side files: which files of a model's folder are copied into an output beside the weights.

Decompose, convert and `Engine.save` share this one rule, since their output may be published:

1. Copied is what a model folder needs, by its name: generation config, tokenizer, chat templates,
   processors, licences, README.md as SOURCE_README.md (README.md will be the output's own), Python
   files that `auto_map` names with what they import, and of sentence-transformers modules.json with
   the folders that it names. config.json is written anew.
2. `copy` (`--copy GLOB`) takes more.
3. Never copied, whatever its name: a file that was given to the command as an argument, one that
   looks like a secret or like weights, and what is hidden.

Everything else is left out, and named. The names of 1 are those of transformers' own constants
(VOCAB_FILES_NAMES of its tokenizers, transformers.utils), and of mistral-common, tiktoken,
sentence-transformers and ModelScope. Pipelines of diffusers are not read, so their folders are not
copied either. Standard library only.
"""

from __future__ import annotations

import contextlib
import filecmp
import fnmatch
import gzip
import hashlib
import io
import json
import os
import re
import stat
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path, PurePosixPath

from ortho_cli.errors import CheckpointError, UsageError, blamed
from ortho_cli.storage import leaks
from ortho_cli.storage.leaks import LARGE, Kind
from ortho_cli.storage.untrusted import read_regular
from ortho_cli.storage.work_folder import PARTIAL

CONFIG_FILE = "config.json"
README = "SOURCE_README.md"
INDEX_SUFFIX = ".index.json"  # where weights lie that are not copied: of no use, so not listed
SHOWN = 6  # files that a note names

# Bytes of anything but a vocabulary: Whisper's preprocessor_config.json has 340 kB, the largest
# modeling files 300 kB.
LARGE_TEXT = 4 << 20

# What of private arguments no other file may quote: at least so many bytes, and of a secret so many
# blanks, since a vocabulary holds single words.
QUOTED, QUOTED_SPACES = 8, 2

VOCABULARIES = {
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "vocab.bpe",
    "encoder.json", "merges.txt", "bpe.codes", "dict.txt", "unigram.json", "byte_maps.json",
    "emoji.json", "normalizer.json", "entity_vocab.json", "word_shape.json",
    "word_pronunciation.json", "vocab-src.json", "vocab-tgt.json", "target_vocab.json",
    "prophetnet.tokenizer", "tekken.json", "tokenizer.vocab", "added_tokens.json",
    "special_tokens_map.json",
}  # fmt: skip
SETTINGS = {
    "generation_config.json", "chat_template.json", "modules.json", "configuration.json",
    "config_sentence_transformers.json",
}  # fmt: skip
_VERSION = re.compile(r"tokenizer\.\d[\w.]*\.json")  # for versions of transformers from this one on
_TIKTOKEN = re.compile(r"\w[\w.-]*\.tiktoken")
_PIECES = re.compile(
    r"(.*tokenizer|.*tiktoken|spiece|sentencepiece(\.bpe)?|spm(_\w+)?|sp|bpe|m|ice_text)\.model"
    r"|tokenizer\.model\.v\d\w*|\w[\w.-]*\.spm"
)
_SETTINGS = re.compile(
    r"(\w+_)?(tokenizer|processor|preprocessor|feature_extractor)_config\.json"
    r"|sentence_\w+_config\.json|\w[\w.-]*\.jinja2?|additional_chat_templates/\w[\w.-]*\.jinja2?"
)
_LEGAL = re.compile(
    r"([\w .-]*[ _.-])?(licen[cs]es?|notices?|copying|copyright|use[_-]policy)"
    r"([ _-][\w -]+(\.\d+)?)?(\.(txt|md|rst|html|pdf))?"
    r"|(source_)?readme([ _-][\w-]+|\.[a-z]{2}([_-]\w+)?(?=\.))?"
    r"(\.(txt|md|rst))?",
    re.IGNORECASE,
)

# What transformers looks for in a module (dynamic_module_utils), and `from . import x`.
_IMPORTS = re.compile(
    rb"^[ \t]*(?:from[ \t]+\.([\w.]+)[ \t]+import\b|import[ \t]+\.([\w.]+))", re.M
)
_SIBLINGS = re.compile(rb"^[ \t]*from[ \t]+\.[ \t]+import[ \t]+([\w, \t]+|\([\w,\s]+\))", re.M)
_NAMED_FILES = re.compile(rb"vocab_files_names\s*(?::[^=\n]*)?=\s*\{(.*?)\}", re.I | re.S)


class Why(StrEnum):
    """Why a file is left out."""

    ARGUMENT = "given to this command"
    SECRET = "looks like a secret"
    WEIGHTS = "weights, or looks like them"
    LARGE = "too large for what its name says"
    IRREGULAR = "no regular file"
    OURS = "its name is ours"
    UNKNOWN = "not what a model needs"
    HIDDEN = "hidden"


@dataclass(frozen=True, slots=True, kw_only=True)
class SideFile:
    """A file that is copied: its path in the source, its path in the output, its bytes."""

    source: str
    name: str
    size: int
    kind: Kind


@dataclass(frozen=True, slots=True, kw_only=True)
class SideFiles:
    """What is copied from `folder`, and what is left out, and why."""

    folder: Path
    copied: tuple[SideFile, ...] = ()
    left_out: tuple[tuple[str, Why], ...] = ()
    arguments: tuple[Path, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes that are copied."""
        return sum(file.size for file in self.copied)

    @property
    def notes(self) -> list[str]:
        """Name what is left out, in one sentence; hidden files apart, which every folder has."""
        order = list(Why)
        worth = sorted(
            (order.index(why), name.count("/"), name)
            for name, why in self.left_out
            if why is not Why.HIDDEN
        )
        if not worth:
            return []
        some = ", ".join(f"`{name}` ({order[rank]})" for rank, _, name in worth[:SHOWN])
        more = f" and {len(worth) - SHOWN} more" if len(worth) > SHOWN else ""
        verb = "file of the source is" if len(worth) == 1 else "files of the source are"
        return [f"{len(worth)} {verb} not copied: {some}{more}; --copy GLOB takes more"]

    def to_json(self) -> list[dict[str, str]]:
        """List what is left out."""
        return [{"name": name, "why": str(why)} for name, why in self.left_out]

    def check_unchanged(self) -> None:
        """Look again at what is about to be copied, maybe hours after it was chosen.

        Raises:
            CheckpointError: a file has become one that is never copied.
        """
        arguments = _Arguments(self.folder, self.arguments)
        for file in self.copied:
            path = self.folder / file.source
            # `WorkFolder.copy_file` refuses one that vanished.
            if path.is_file() and (why := _refuse(path, file.source, arguments, file.kind)):
                raise CheckpointError(
                    f"`{path}` changed while the model was read, and is not copied now: {why}",
                    hint="put it back and start again",
                )


def choose(
    folder: Path,
    *,
    skip: Iterable[str] = (),
    ours: Iterable[str] = (),
    copy: Sequence[str] = (),
    arguments: Iterable[Path] = (),
) -> SideFiles:
    """Choose what is copied from a model's folder.

    Args:
        folder: the model's.
        skip: paths in it that are read, or written anew: neither copied nor named as left out.
        ours: names at the top of the output that its own files take.
        copy: globs of paths in `folder`, or folders in it, to be taken beyond the list; `*` stays
            in one folder, `**` does not.
        arguments: files and folders that were given to the command: never copied, by whatever
            name, link or copy.
    Returns:
        What is copied and what is left out.
    Raises:
        UsageError: a glob matches nothing, leads out of the folder, or matches what is never
            copied.
        CheckpointError: a file or the folder cannot be read, or config.json holds a key or token.
    """
    globs = {pattern: _split_glob(pattern) for pattern in copy}
    with blamed(CheckpointError, path=folder, hint="give a model folder that you may read"):
        config = folder / CONFIG_FILE
        if config.is_file() and leaks.holds_secret(config):  # what it says is in the output's own
            raise CheckpointError(
                f"`{config}` holds what looks like a key or an access token, and its content is in "
                "what is written",
                hint="remove that entry from config.json, and revoke the token",
            )
        choice = _Choice(folder, set(skip), ours, _Arguments(folder, arguments))
        return choice.make(globs)


def choose_none(path: Path, copy: Sequence[str] = ()) -> SideFiles:
    """Copy nothing: the model is one file, and other files beside it need not belong to it.

    Raises:
        UsageError: something was to be copied nevertheless.
    """
    if copy:
        raise UsageError(
            f"`{path}` is a file, and --copy {copy[0]} takes what lies in a model's folder",
            hint="give the folder, or leave --copy out",
        )
    return SideFiles(folder=path.parent)


def list_files(folder: Path) -> Iterator[str]:
    """Yield the path of every file; hidden folders (.git, .cache) and links to folders stay out."""
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = Path(root).relative_to(folder)
        yield from ((inside / name).as_posix() for name in sorted(files))


class _Choice:
    """One choice, while it is made."""

    def __init__(
        self, folder: Path, skip: set[str], ours: Iterable[str], arguments: _Arguments
    ) -> None:
        self._folder, self._arguments = folder, arguments
        self._taken = {name.casefold() for name in ours}  # folders of some disks know no case
        self._listed = [
            name
            for name in list_files(folder)
            if name not in skip and not name.endswith(INDEX_SUFFIX)
        ]
        self._known = _kinds_by_name(folder, self._listed)
        self._readme = any(name.casefold() == README.casefold() for name in self._listed)

    def make(self, globs: Mapping[str, tuple[str, ...]]) -> SideFiles:
        """Go through every file."""
        copied: list[SideFile] = []
        left: list[tuple[str, Why]] = []
        matched: set[str] = set()
        for name in self._listed:
            mine = [glob for glob, parts in globs.items() if _matches(name, parts)]
            matched.update(mine)
            verdict = self._judge(name, asked=bool(mine))
            if isinstance(verdict, SideFile):
                copied.append(verdict)
            elif mine:
                raise UsageError(
                    f"--copy {mine[0]} matches `{name}`, which is never copied: {verdict}",
                    hint="name the files that you mean, or put this one into OUT by hand",
                )
            else:
                left.append((name, verdict))
        for glob in globs:
            if glob not in matched:
                raise UsageError(
                    f"--copy {glob} matches no file of `{self._folder}` beside those that are read",
                    hint="give paths inside the model's folder, such as --copy 'docs/*.md'; hidden "
                    "files are never copied",
                )
        return SideFiles(
            folder=self._folder,
            copied=tuple(copied),
            left_out=tuple(left),
            arguments=self._arguments.paths,
        )

    def _judge(self, name: str, *, asked: bool) -> SideFile | Why:
        """Say how a file is copied, or why not."""
        path, kind = self._folder / name, self._known.get(name, "any" if asked else None)
        if kind is None:
            return _explain(path, name, self._arguments)
        if not path.is_file():
            return Why.IRREGULAR
        target = README if name.casefold() == "readme.md" else name
        top = target.split("/")[0].casefold()
        taken = self._taken & {top, top.removesuffix(PARTIAL)}
        if taken or (target != name and self._readme):
            return Why.OURS
        size = path.stat().st_size
        if size > _largest(name) and not asked:
            return Why.LARGE
        why = _refuse(path, name, self._arguments, kind)
        if why is not None:
            return why
        if "/" not in target:
            self._taken.add(target.casefold())
        return SideFile(source=name, name=target, size=size, kind=kind)


class _Arguments:
    """Files that were given to a command, known again under other names."""

    def __init__(self, folder: Path, paths: Iterable[Path]) -> None:
        self.paths = tuple(paths)
        inside = folder.resolve()
        self._inodes: set[tuple[int, int]] = set()
        self._sizes: dict[int, list[Path]] = {}
        self._folders: list[Path] = []
        self._contents: set[bytes] = set()  # digests of texts, whatever their line ends
        self._needles: set[bytes] = set()  # what no other file may quote
        for path in self.paths:
            try:
                status, real = path.stat(), path.resolve()
            except (OSError, RuntimeError, ValueError):  # its reader reports it
                continue
            self._inodes.add((status.st_dev, status.st_ino))
            if stat.S_ISDIR(status.st_mode) and not inside.is_relative_to(real):
                self._folders.append(real)
            elif stat.S_ISREG(status.st_mode) and status.st_size:
                self._sizes.setdefault(status.st_size, []).append(path)
                if status.st_size <= LARGE_TEXT:
                    self._look_into(path)

    def hold(self, path: Path) -> bool:
        """Tell whether a file is one of them, a link to one, a copy, or quotes what is private."""
        status = path.stat()
        if (status.st_dev, status.st_ino) in self._inodes:
            return True
        # Not where a link leads: a model may link to the tokenizer of its reference.
        here = Path(os.path.abspath(path))  # noqa: PTH100 - resolve() follows the last link, too
        here = here.parent.resolve() / here.name
        if any(here.is_relative_to(at) for at in self._folders):
            return True
        same = self._sizes.get(status.st_size, ())
        if any(filecmp.cmp(path, other, shallow=False) for other in same):
            return True
        if not self._contents or status.st_size > LARGE_TEXT:
            return False
        text = _text_of(path)
        return _digest(text) in self._contents or any(needle in text for needle in self._needles)

    def _look_into(self, path: Path) -> None:
        text = _text_of(path)
        if not text.strip() or b"\0" in text:
            return
        self._contents.add(_digest(text))
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if len(lines) == 1:  # a passphrase
            self._quote(lines[0])
        for line in lines:
            row = _row_of(line)
            secret = row.get("secret", row.get("Secret"))
            if isinstance(secret, str):
                self._quote(line)
                if secret.strip().count(" ") >= QUOTED_SPACES:
                    self._quote(secret.strip().encode())

    def _quote(self, words: bytes) -> None:
        if len(words) >= QUOTED:
            self._needles |= {words, json.dumps(words.decode(errors="replace"))[1:-1].encode()}


def _text_of(path: Path) -> bytes:
    """Read a file that is no longer than LARGE_TEXT, unpacked where it is gzip."""
    raw = read_regular(path)
    if raw.startswith(b"\x1f\x8b"):
        packed = gzip.GzipFile(fileobj=io.BytesIO(raw))
        with contextlib.suppress(OSError, EOFError, zlib.error):
            return packed.read(LARGE_TEXT)
    return raw


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text.replace(b"\r\n", b"\n").strip()).digest()


def _row_of(line: bytes) -> dict[str, object]:
    """Read a line as a JSON object; an empty one where it is none."""
    with contextlib.suppress(ValueError, RecursionError):
        row = json.loads(line.strip(b"[], "))
        if isinstance(row, dict):
            return row
    return {}


def _explain(path: Path, name: str, arguments: _Arguments) -> Why:
    """Say why a file that is not on the list is left out, as far as can be told without reading."""
    last = PurePosixPath(name).name
    if last.startswith("."):
        return Why.HIDDEN
    if path.is_file() and arguments.hold(path):
        return Why.ARGUMENT
    if leaks.names_secret(last):
        return Why.SECRET
    return Why.WEIGHTS if leaks.names_weights(last) else Why.UNKNOWN


def _refuse(path: Path, name: str, arguments: _Arguments, kind: Kind) -> Why | None:
    """Say why a file that may be copied by its name is not; None for one that is."""
    parts = PurePosixPath(name).parts
    if arguments.hold(path):
        return Why.ARGUMENT
    doubtful = kind == "any" or _LEGAL.fullmatch(name) is not None
    if doubtful and any(map(leaks.names_secret, parts)):
        return Why.SECRET
    if leaks.leads_to_secret(path) or leaks.holds_secret(path):
        return Why.SECRET
    named = kind == "any" and leaks.names_weights(parts[-1])
    if named or leaks.holds_weights(path, path.stat().st_size, kind=kind):
        return Why.WEIGHTS
    return None


def _kinds_by_name(folder: Path, listed: list[str]) -> dict[str, Kind]:
    """Find what a model needs: by its name, or because another file names it."""
    kinds = {name: kind for name in listed if (kind := _kind(name))}
    there = set(listed)
    parts = _read_json(folder / "modules.json")
    modules = [part for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
    for name in listed:
        inside, _, last = name.rpartition("/")
        if inside and any(inside == str(part.get("path")) for part in modules):
            kind = "text" if last == CONFIG_FILE else _kind(last)
            if kind:
                kinds[name] = kind
    settings = _read_json(folder / "tokenizer_config.json")
    versions = settings.get("fast_tokenizer_files") if isinstance(settings, dict) else None
    for name in versions if isinstance(versions, list) else ():
        if isinstance(name, str) and name in there and _VERSION.fullmatch(name):
            kinds[name] = "text"
    named = [_module_of(str(part.get("type"))) for part in modules]
    for name in [CONFIG_FILE, *kinds]:
        if name == CONFIG_FILE or _SETTINGS.fullmatch(name):
            named += _named_code(_read_json(folder / name))
    for name in _follow(folder, [name for name in named if name in there], there):
        kinds.setdefault(name, "pieces" if name.endswith((".model", ".spm")) else "text")
    return kinds


def _kind(name: str) -> Kind | None:
    """Tell what belongs into a file with a name from the list; None for any other name."""
    if name.startswith("."):
        return None
    if _PIECES.fullmatch(name) and "/" not in name:
        return "pieces"
    if name in VOCABULARIES or name in SETTINGS:
        return "text"
    known = (pattern.fullmatch(name) for pattern in (_TIKTOKEN, _SETTINGS, _LEGAL))
    return "text" if any(known) else None


def _largest(name: str) -> int:
    last = PurePosixPath(name).name
    legal_or_set = last.endswith((".py", ".jinja", ".jinja2")) or _LEGAL.fullmatch(last)
    settings = last == CONFIG_FILE or last in SETTINGS or _SETTINGS.fullmatch(last)
    small = (legal_or_set or settings) and last not in VOCABULARIES
    return LARGE_TEXT if small else LARGE


def _read_json(path: Path) -> object:
    """Read what a JSON file says; nothing where that is impossible, which others complain of."""
    try:
        if path.stat().st_size > LARGE:
            return None
        return json.loads(read_regular(path))
    except (OSError, ValueError, RecursionError):
        return None


def _named_code(settings: object, *, named: bool = False) -> Iterator[str]:
    """Yield the Python files that `auto_map` and `custom_pipelines` name, anywhere in settings."""
    if isinstance(settings, str) and named:
        yield _module_of(settings)
    elif isinstance(settings, list):
        for value in settings:
            yield from _named_code(value, named=named)
    elif isinstance(settings, dict):
        for key, value in settings.items():
            yield from _named_code(value, named=named or key in ("auto_map", "impl"))


def _module_of(reference: str) -> str:
    """Name the file of `module.Class`; `other/repository--module.Class` is none of this folder."""
    module = reference.rpartition(".")[0]
    return "" if "--" in reference else module + ".py"


def _follow(folder: Path, code: list[str], there: set[str]) -> set[str]:
    """Add what Python files import from beside them, and the vocabularies that they name."""
    needed, waiting = set(code), list(code)
    while waiting:
        name = waiting.pop()
        path = folder / name
        if not path.is_file() or path.stat().st_size > LARGE_TEXT:
            continue
        text = read_regular(path)
        named = {match[1] or match[2] for match in _IMPORTS.finditer(text)}
        for match in _SIBLINGS.finditer(text):
            named.update(re.findall(rb"\w+", match[1]))
        inside = PurePosixPath(name).parent
        for module in named:
            stem = (inside / module.decode().strip(".").replace(".", "/")).as_posix()
            new = {f"{stem}.py", f"{stem}/__init__.py"} & there - needed
            needed |= new
            waiting += new
        for match in _NAMED_FILES.finditer(text):
            files = {word.decode() for word in re.findall(rb"[\"']([\w.-]+)[\"']", match[1])}
            safe = {f for f in files if not (leaks.names_weights(f) or leaks.names_secret(f))}
            needed |= safe & there
    return needed


def _split_glob(pattern: str) -> tuple[str, ...]:
    parts = PurePosixPath(pattern).parts
    if not parts or pattern.startswith("/") or ".." in parts:
        raise UsageError(
            f"--copy {pattern} is no path inside the model's folder",
            hint="give one relative to MODEL, such as --copy 'docs/*.md'",
        )
    return parts


def _matches(name: str, glob: tuple[str, ...]) -> bool:
    """Tell whether a path is one that a glob means: itself, or inside the folder that it names."""
    if PurePosixPath(name).name.startswith("."):
        return False
    return _match_parts(tuple(name.split("/")), glob)


def _match_parts(parts: tuple[str, ...], glob: tuple[str, ...]) -> bool:
    if not glob:
        return not parts
    if glob[0] == "**":
        rest = glob[1:] or ("*",)
        return any(_match_parts(parts[at:], rest) for at in range(len(parts)))
    if not parts or not fnmatch.fnmatchcase(parts[0], glob[0]):
        return False
    whole = len(glob) == 1 and len(parts) > 1 and not re.search(r"[*?\[]", glob[0])
    return whole or _match_parts(parts[1:], glob[1:])
