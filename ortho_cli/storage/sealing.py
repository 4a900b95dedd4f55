"""Sealing ortho at rest with age: only the holder of a key opens it.

    ortho.safetensors.age   an age file (age-encryption.org/v1) whose content is ortho.safetensors
    ortho.key.age           with a passphrase only: an age identity, sealed by the passphrase, to
                            which the former is sealed

age seals a stream front to back, and workers finish tensors in any order. So each part of ortho is
first sealed on its own, to a key that is made for this work and kept in memory, and written to a
scratch file. When all parts are there, they are opened one by one and sealed again as one stream.
`private/key.age` holds that key, sealed to the recipients of ortho. A resumed run needs one of
their identities, or the passphrase; without it, it splits again the tensors of which only ortho
held a part.

All cryptography is pyrage's (age's X25519, scrypt, HKDF and ChaCha20-Poly1305). Its streams take
recipients only, which is why a passphrase seals a key and not ortho itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

from blake3 import blake3

from ortho_cli.errors import ArtifactError, InternalError, ResourceError, UsageError, reason
from ortho_cli.events import EventSink, Noted
from ortho_cli.storage.checkpoint import fill
from ortho_cli.storage.data_file import DataFile, Layout, Region, write_all
from ortho_cli.storage.untrusted import open_regular, read_regular
from ortho_cli.storage.work_folder import KEY_FILE, WorkFolder, write_private, writing

SEALED = ".age"  # ends the name of a sealed file
SEALED_FILE = "ortho.safetensors.age"
IDENTITY_FILE = "ortho.key.age"
SECRET = "AGE-SECRET-KEY-1"

CHUNK_SEALED = 1 << 16  # age authenticates so many bytes at a time, with a tag of 16
HEADER_ROOM = 4096  # of age's header, the random stanza that rage adds to it, and a length
WORK = 20  # scrypt takes 2^(this + 10) bytes; a hostile file may ask for any number
LENGTH = 8  # bytes of the length before a sealed part

Buffer = bytes | memoryview


def _pyrage() -> ModuleType:
    try:
        import pyrage  # type: ignore[import-untyped]
    except ImportError:
        raise UsageError(
            "sealing needs the package pyrage, which is not installed",
            hint="pip install 'ortho-cli[seal]'",
        ) from None
    module: ModuleType = pyrage
    return module


@dataclass(frozen=True, slots=True, kw_only=True)
class Seal:
    """The recipients of ortho, or the passphrase that opens it."""

    recipients: tuple[str, ...] = ()
    passphrase: str | None = None

    @property
    def identity(self) -> dict[str, object]:
        """Spell it for the journal, without a secret or anything to test passphrases against."""
        return {"passphrase": True} if self.passphrase else {"recipients": list(self.recipients)}


def make_seal(recipients: Sequence[str] = (), passphrase_file: Path | None = None) -> Seal | None:
    """Read the recipients, or the passphrase, that ortho is sealed to; None without either.

    Args:
        recipients: age's public keys, `age1...`.
        passphrase_file: its content, less one newline at the end, is the passphrase.
    Raises:
        UsageError: both are given, a recipient is none, the file cannot be read or is empty, or
            pyrage is not installed.
    """
    if not recipients and passphrase_file is None:
        return None
    if recipients and passphrase_file is not None:
        raise UsageError(
            "--seal-to and --seal-passphrase-file were both given; age seals to one or the other",
            hint="leave one of them out",
        )
    if passphrase_file is not None:
        _pyrage()
        return Seal(passphrase=_passphrase(passphrase_file, _read(passphrase_file)))
    for text in recipients:
        _recipient(text)
    return Seal(recipients=tuple(sorted(set(recipients))))


def _recipient(text: str) -> object:
    module = _pyrage()
    try:
        return module.x25519.Recipient.from_str(text)
    except module.RecipientError:
        secret = text.upper().startswith(SECRET)
        shown = "a secret key" if secret else f"`{text[:80]}`"
        raise UsageError(
            f"--seal-to got {shown}, which is no recipient of age",
            hint="give the public key, `age1...`, that age-keygen prints",
        ) from None


def _read(path: Path) -> str:
    try:
        return read_regular(path).decode()
    except OSError as error:
        raise UsageError(f"cannot read `{path}`: {reason(error)}", hint="check the path") from None
    except UnicodeDecodeError:
        raise UsageError(f"`{path}` is not text", hint="is this the right file?") from None


def _passphrase(path: Path, text: str) -> str:
    passphrase = text.removesuffix("\n").removesuffix("\r")
    if not passphrase:
        raise UsageError(f"the passphrase file `{path}` is empty", hint="write one line into it")
    return passphrase


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """What a file given as --identity holds: age identities, or a passphrase."""

    path: Path
    identities: tuple[Any, ...] = ()  # of pyrage, which tells no types
    passphrase: str | None = None


def read_keys(path: Path | None) -> Keys | None:
    """Read a file of age identities, as age-keygen writes it; any other text is a passphrase.

    No file gives no keys.

    Raises:
        UsageError: it cannot be read, is empty, or holds an identity that is none.
    """
    if path is None:
        return None
    module, text = _pyrage(), _read(path)
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if not any(line.startswith(SECRET) for line in lines):
        return Keys(path=path, passphrase=_passphrase(path, text))
    identities = []
    for number, line in enumerate(lines, 1):
        try:
            identities.append(module.x25519.Identity.from_str(line))
        except module.IdentityError:
            raise UsageError(
                f"key {number} of `{path}` is no identity of age",
                hint="it holds lines of AGE-SECRET-KEY-1..., as age-keygen writes them",
            ) from None
    return Keys(path=path, identities=tuple(identities))


def seal_of(keys: Keys) -> Seal:
    """Seal to the holder of these keys."""
    if keys.passphrase is not None:
        return Seal(passphrase=keys.passphrase)
    mine = (_pyrage().x25519.Identity.from_str(str(one)).to_public() for one in keys.identities)
    return Seal(recipients=tuple(sorted({str(one) for one in mine})))


def _open_with(passphrase: str, raw: bytes) -> bytes:
    """Open what a passphrase sealed, after a look at the memory that scrypt is asked to take.

    Raises:
        ValueError: it asks for too much.
        pyrage.DecryptError: the passphrase does not open it.
    """
    for line in raw.split(b"\n---", 1)[0].splitlines():
        words = line.split(b" ")
        if words[:2] == [b"->", b"scrypt"] and (len(words) != 4 or not 0 < int(words[3]) <= WORK):
            raise ValueError("its passphrase needs more than a gigabyte")
    return bytes(_pyrage().passphrase.decrypt(raw, passphrase))


class WorkKey:
    """The key of one piece of work: what it leaves on disk is sealed to it."""

    def __init__(self, secret: str, seal: Seal) -> None:
        """Take an identity of age, as it is spelled, and the recipients that it is locked to."""
        self._secret, self.lock = secret, seal
        self._identity = _pyrage().x25519.Identity.from_str(secret)
        self._mine = self._identity.to_public()

    @classmethod
    def make(cls, seal: Seal) -> WorkKey:
        """Draw a new one."""
        return cls(str(_pyrage().x25519.Identity.generate()), seal)

    @classmethod
    def unlock(cls, raw: bytes, seal: Seal, keys: Keys | None) -> WorkKey | None:
        """Open one that was locked; None where neither `seal` nor `keys` opens it."""
        module = _pyrage()
        try:
            if seal.passphrase:
                text = _open_with(seal.passphrase, raw)
            else:
                text = module.decrypt(raw, list(keys.identities) if keys else [])
            return cls(text.decode(), seal)
        except (module.DecryptError, module.IdentityError, ValueError):
            return None

    def locked(self) -> bytes:
        """Seal the key itself to the recipients of ortho."""
        module, text = _pyrage(), self._secret.encode()
        if self.lock.passphrase:
            return bytes(module.passphrase.encrypt(text, self.lock.passphrase))
        return bytes(module.encrypt(text, self._recipients))

    @property
    def _recipients(self) -> list[object]:
        """Recipients of the finished stream."""
        return [_recipient(text) for text in self.lock.recipients] or [self._mine]

    def seal(self, data: Buffer) -> bytes:
        """Seal some bytes to this key; never the same bytes twice."""
        return bytes(_pyrage().encrypt(bytes(data), [self._mine]))

    def open(self, data: bytes) -> bytes:
        """Open what `seal` made.

        Raises:
            ValueError: it was damaged, or made with another key.
        """
        module = _pyrage()
        try:
            return bytes(module.decrypt(data, [self._identity]))
        except module.DecryptError as error:
            raise ValueError(str(error)) from None

    def seal_stream(self, pieces: Iterable[Buffer], write: Callable[[bytes], object]) -> None:
        """Seal pieces as one age file to the recipients of ortho, 64 KiB at a time."""
        source, sink = _Source(pieces), _Sink(write)
        _run(lambda: _pyrage().encrypt_io(source, sink, self._recipients), source, sink)


def key_of(work: WorkFolder, seal: Seal, keys: Keys | None, on_event: EventSink) -> WorkKey:
    """Find the key of a piece of work, or make one, leave it there locked, and begin anew."""
    path = work.private / KEY_FILE
    raw = path.read_bytes() if path.is_file() else b""
    key = WorkKey.unlock(raw, seal, keys) if raw else None
    if key is not None:
        return key
    key = WorkKey.make(seal)
    locked = key.locked()
    write_private(path, lambda file: file.write(locked))
    if work.done:
        again = f"the {len(work.done)} tensors that an earlier run finished are split again"
        on_event(Noted(message=f"{again}: their ortho is sealed, and no --identity opens it"))
        work.done.clear()
    return key


def key_beside(file: Path, keys: Keys) -> WorkKey:
    """Find the key that seals a file of unfinished work, or make one and leave it there locked.

    Args:
        file: of the work; the locked key is in its folder.
        keys: open it; it is locked to them.
    """
    mine = [str(one.to_public()) for one in keys.identities]
    seal = Seal(recipients=tuple(mine), passphrase=keys.passphrase)
    path = file.with_name(KEY_FILE)
    raw = path.read_bytes() if path.is_file() else b""
    key = WorkKey.unlock(raw, seal, keys) if raw else None
    if key is None:
        key = WorkKey.make(seal)
        locked = key.locked()
        write_private(path, lambda opened: opened.write(locked))
    return key


class SealedFile(DataFile):
    """A scratch file of sealed parts, used in place of a `DataFile` of ortho."""

    def __init__(
        self,
        work: WorkFolder,
        name: str,
        layout: Layout,
        key: WorkKey,
        *,
        final: str = SEALED_FILE,
    ) -> None:
        """Open it; each tensor of the layout has a slot of its own; `final` is published."""
        self._slots, self._final = _slots(layout), final
        super().__init__(work, name, self._slots, mode=0o600, scratch=True)
        self.layout, self._key, self._work = layout, key, work

    def write(self, key: str, data: memoryview, *, start: int) -> None:
        """Seal a tensor, which is given whole."""
        size = self.layout.regions[key].nbytes
        if start != 0 or data.nbytes != size:
            raise InternalError(
                f"{data.nbytes} bytes from {start} on of `{key}` are to be sealed, and it has "
                f"{size}, sealed at once"
            )
        sealed = self._key.seal(data)
        slot = self._slots.regions[key]
        if LENGTH + len(sealed) > slot.nbytes:  # they would lie over the tensor behind it
            raise InternalError(
                f"`{key}` takes {LENGTH + len(sealed)} bytes sealed, and has room for {slot.nbytes}"
            )
        self._put(len(sealed).to_bytes(LENGTH, "little") + sealed, slot.offset)

    def read_into(self, key: str, buffer: memoryview, *, start: int) -> None:
        """Open a tensor, and read from `start` bytes into it."""
        buffer[:] = self._open(key)[start : start + len(buffer)]

    def read(self, key: str) -> Iterator[memoryview]:
        """Open a tensor; yield it whole."""
        yield memoryview(self._open(key))

    def digest(self, key: str) -> str:
        """Take the BLAKE3 of a tensor; empty where it does not open."""
        try:
            return super().digest(key)
        except ArtifactError:
            return ""

    def finish(self, layout: Layout) -> tuple[str, str | None]:
        """Seal header and tensors, which are all here, as the file that is published.

        Returns:
            BLAKE3 of its content, and of the sealed file.
        """
        work = self._work
        content, sealed = blake3(), blake3()
        fd, offset = work.open_data(self._final, size=0, mode=0o600), 0

        def pieces() -> Iterator[Buffer]:
            tensors = map(self.read, layout.regions)  # in the order in which they lie
            for piece in chain([memoryview(layout.header)], *tensors):
                content.update(piece)
                yield piece

        def write(data: bytes) -> None:
            nonlocal offset
            sealed.update(data)
            write_all(fd, data, offset)
            offset += len(data)

        with writing(work.artifact / self._final):
            self._key.seal_stream(pieces(), write)
            if self._key.lock.passphrase:
                locked = (work.private / KEY_FILE).read_bytes()
                work.write_file(IDENTITY_FILE, locked, mode=0o600)
        return content.hexdigest(), sealed.hexdigest()

    def _open(self, key: str) -> bytes:
        slot = self._slots.regions[key]
        buffer = memoryview(bytearray(slot.nbytes))
        fill(self.fd, buffer, slot.offset, what=f"`{self._path}`")
        length = int.from_bytes(buffer[:LENGTH], "little")
        try:
            return self._key.open(bytes(buffer[LENGTH:][:length]))
        except ValueError as error:
            raise ArtifactError(
                f"`{key}` in `{self._path}` does not open: {error}",
                hint="remove the hidden folder beside the output and start again",
            ) from None


OrthoFile = DataFile | SealedFile


def _slots(layout: Layout) -> Layout:
    """Lay out the scratch file: each tensor sealed, behind its length; there is no header."""
    regions, position = dict[str, Region](), 0
    for key, region in layout.regions.items():
        tags = 16 * (region.nbytes // CHUNK_SEALED + 1)
        room = LENGTH + region.nbytes + tags + HEADER_ROOM
        regions[key] = replace(region, offset=position, nbytes=room)
        position += room
    return Layout(header=b"", regions=regions, size=position)


def scratch_bytes(layout: Layout, seal: Seal | None) -> int:
    """Size of the scratch file in which ortho's parts are sealed one by one, if they are."""
    return _slots(layout).size if seal else 0


class Opened:
    """A sealed file's content, in memory alone, as a file that can be opened again by its path."""

    def __init__(self, name: str) -> None:
        """Make an empty one."""
        self._fd = -1
        try:
            self._fd = os.memfd_create(name, os.MFD_CLOEXEC)
            self.path = Path(f"/proc/self/fd/{self._fd}")
            self.path.stat()
        except (AttributeError, OSError):  # not Linux, or a container without it or without /proc
            raise ResourceError(
                "this system has no files that are in memory alone, and ortho is not opened on "
                "disk",
                hint="open it on Linux, or with `age -d` where the result may lie",
            ) from None

    def write(self, data: bytes) -> None:
        """Append."""
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]

    def __del__(self) -> None:
        """Let go of the memory."""
        if getattr(self, "_fd", -1) >= 0:
            os.close(self._fd)


def open_sealed(path: Path, keys: Keys) -> Opened:
    """Open a sealed ortho; all of it is authenticated before any of it is used.

    Args:
        path: the file; `ortho.key.age` is beside it if a passphrase opens it.
        keys: what may open it.
    Returns:
        Its content, as large as ortho.safetensors, in memory.
    Raises:
        ArtifactError: no key fits, or the file was cut, damaged or is no age file.
    """
    module, locked = _pyrage(), path.with_name(IDENTITY_FILE)
    identities = list(keys.identities)
    try:
        if keys.passphrase is not None:
            if not locked.is_file():
                raise ArtifactError(
                    f"`{keys.path}` holds no identity of age, and `{path}` has no {IDENTITY_FILE} "
                    "beside it that a passphrase would open",
                    hint="give a file of AGE-SECRET-KEY-1... lines",
                )
            text = _open_with(keys.passphrase, read_regular(locked))
            identities = [module.x25519.Identity.from_str(text.decode())]
    except (module.DecryptError, module.IdentityError, ValueError):
        raise ArtifactError(
            f"the passphrase in `{keys.path}` does not open `{locked}`",
            hint="give the passphrase that ortho was sealed with, or restore the file",
        ) from None
    content = Opened(SEALED_FILE)
    try:
        with open_regular(path) as file:
            sink = _Sink(content.write)
            _run(lambda: module.decrypt_io(file, sink, identities), sink)
    except (module.DecryptError, OSError) as error:
        raise ArtifactError(
            f"`{keys.path}` does not open `{path}`: {reason(error)}",
            hint="give an identity that it was sealed to"
            if "matching" in str(error)
            else "the file was cut, damaged or exchanged; restore it",
        ) from None
    return content


class _Source:
    """Pieces as a file that is read front to back."""

    def __init__(self, pieces: Iterable[Buffer]) -> None:
        self._pieces = (memoryview(piece).cast("B") for piece in pieces if len(piece))
        self._left = memoryview(b"")
        self.error: BaseException | None = None

    def read(self, size: int) -> bytes:
        try:
            self._left = self._left or next(self._pieces, self._left)
        except BaseException as error:
            self.error = error
            raise
        piece, self._left = bytes(self._left[:size]), self._left[size:]
        return piece


class _Sink:
    """A function as a file that is written front to back."""

    def __init__(self, write: Callable[[bytes], object]) -> None:
        self._write = write
        self.error: BaseException | None = None

    def write(self, data: bytes) -> int:
        try:
            self._write(bytes(data))
        except BaseException as error:
            self.error = error
            raise
        return len(data)

    def flush(self) -> None:
        """Nothing is held back."""


def _run(call: Callable[[], None], *ends: _Source | _Sink) -> None:
    """Call pyrage, and raise what its files raised: it passes on the words alone."""
    try:
        call()
    finally:
        for end in ends:
            if end.error is not None:
                raise end.error
