"""GGUF files on the disk: magic, parts of a split model, byte order, dequantizing.

The `gguf` package reads header and blocks. It does not join the parts of a split model, and in a
big-endian file it swaps the bytes of the header and of plain numbers only: both are done here.
Source: docs/gguf.md of ggml; block layouts in ggml-common.h.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ortho_cli.errors import CheckpointError, blamed, shown
from ortho_cli.storage import hints, sniff
from ortho_cli.storage.checkpoint import MODEL_SUFFIXES
from ortho_cli.storage.untrusted import open_regular

if TYPE_CHECKING:  # an optional package, imported where it is used
    import gguf

Metadata = Mapping[str, object]  # keys of a GGUF file: numbers, strings, booleans, lists of these
Array = npt.NDArray[np.generic]  # plain numbers, or blocks of quantized ones as bytes

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SUFFIX = ".gguf"
ASIDE = ("mmproj", "imatrix")  # parts of the names of GGUF files that are no language model
_PART = re.compile(r"(?P<stem>.+)-(?P<no>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.gguf)", re.I)

# Byte offsets of the 16-bit floats in a block. A big-endian machine writes a block as its own
# struct; all else in it is single bytes, or bit operations within single bytes. Types that are not
# listed hold wider integers, and tools disagree on how these are swapped.
SWAPPED = {
    "BF16": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "TQ1_0": (52,),
    "TQ2_0": (64,), "MXFP4": (), "NVFP4": (),
}  # fmt: skip
# Parts of numpy's messages where a file ends too early.
_SHORT = ("reshape", "larger than", "changing to a")
SAMPLED = 4096  # blocks of a tensor that are looked at for its byte order: some 8 KiB of scales
SCALES = (1e-5, 1e2)  # usual sizes of weights and scales; swapped bytes give sizes of every order
ORIGINAL = "start from the original checkpoint"
ALONE = "give the model's own GGUF file"


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensor:
    """One tensor of a GGUF file, mapped and not read; `shape` is in rows and columns."""

    name: str
    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    data: Array  # mapped
    path: Path
    swapped: bool = False  # its bytes are in the other order than this machine's

    def floats(self, index: int | None = None) -> npt.NDArray[np.float32]:
        """Dequantize the tensor, or one entry of its first dimension, to a float32 array."""
        import gguf

        data: Array = self.data if index is None else self.data[index]
        if self.swapped:
            data = _native(data, self.kind)
        with np.errstate(all="ignore"):  # a scale may be infinite, which is checked when written
            return np.asarray(gguf.quants.dequantize(data, self.kind))

    def refusal(self, what: str, *, hint: str = ORIGINAL) -> CheckpointError:
        """Make the error of a tensor that cannot be converted."""
        return CheckpointError(f"tensor `{self.name}` of `{self.path}` {what}", hint=hint)


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufModel:
    """A model in one GGUF file or in all of its parts; the first part has the metadata."""

    path: Path
    metadata: Metadata  # without the tokenizer
    tensors: tuple[GgufTensor, ...]

    @property
    def architecture(self) -> str:
        """llama.cpp's name for the kind of model."""
        return str(self.metadata["general.architecture"])

    @property
    def own(self) -> dict[str, object]:
        """The keys of its architecture, without `ARCH.`; a list of equal values as one of them."""
        start = f"{self.architecture}."
        mine = {k.removeprefix(start): v for k, v in self.metadata.items() if k.startswith(start)}
        return {key: one_of_equals(value) for key, value in mine.items()}

    def number(self, key: str, default: float) -> float:
        """Read a number of its `own` keys; raises as `read_number` does."""
        return read_number(self.path, self.own, key, default)

    def refusal(self, what: str, *, hint: str = ORIGINAL) -> CheckpointError:
        """Make the error of a file that no config or checkpoint of transformers can express."""
        return CheckpointError(f"`{self.path}` {what}", hint=hint)


def one_of_equals(value: object) -> object:
    """Give the value that all entries of a list have; any other value as it is."""
    if isinstance(value, list) and value and all(entry == value[0] for entry in value):
        return value[0]
    return value


def read_number(path: Path, metadata: Metadata, key: str, default: float) -> float:
    """Read a number of a file's metadata.

    Raises:
        CheckpointError: the key has a value that is no number.
    """
    value = metadata.get(key, default)
    if not isinstance(value, int | float):
        raise CheckpointError(
            f"`{path}` says `{key}` is {shown(value)}, which is no number",
            hint="the file is damaged, or needs a newer version of ortho",
        )
    return float(value)


def find_gguf(path: Path) -> Path | None:
    """Find the GGUF file that a path means: itself, or the one model of a folder.

    Returns:
        The file, or the first part of a split model; None where there is no GGUF file, or the
        folder has weights of another format.
    Raises:
        CheckpointError: a folder has several models, or only projectors and importance matrices,
            or all models are in folders of it.
    """
    if path.is_file():
        is_gguf = path.suffix.lower() == SUFFIX or sniff.kind_of_file(path) == sniff.GGUF
        return path if is_gguf else None
    others = tuple(suffix for suffix in MODEL_SUFFIXES if suffix != SUFFIX)
    if not path.is_dir() or any(found.name.endswith(others) for found in path.iterdir()):
        return None
    return _find_in_folder(path)


def _find_in_folder(folder: Path) -> Path | None:
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() == SUFFIX and p.is_file())
    models: dict[str, Path] = {}
    for path in (path for path in found if not _is_aside(path)):
        part = _PART.fullmatch(path.name)
        models.setdefault(f"{part['stem']}-of-{part['count']}" if part else path.name, path)
    if len(models) > 1:
        what = f"holds {len(models)} GGUF models: {hints.some([p.name for p in models.values()])}"
        hint = f"give one of them: `ortho convert {hints.said(next(iter(models.values())))}`"
    elif not found and (inside := sorted(folder.glob("*/*.gguf"))):
        what = "holds no weights, and folders in it hold GGUF files"
        hint = f"give one of them: `ortho convert {hints.said(inside[0])}`"
    elif found and not models:
        what, hint = f"holds `{found[0].name}` and no GGUF file of a language model", ALONE
    else:
        return next(iter(models.values()), None)
    raise CheckpointError(f"`{folder}` {what}", hint=hint)


def files_beside(path: Path) -> list[str]:
    """Name the projectors and importance matrices in the folder of a model."""
    beside = (p for p in path.parent.iterdir() if p.suffix.lower() == SUFFIX and p != path)
    return sorted(p.name for p in beside if _is_aside(p))


def _is_aside(path: Path) -> bool:
    return any(word in path.name.lower() for word in ASIDE)


def open_model(path: Path) -> GgufModel:
    """Open a GGUF file, or all parts of the split model that it is one of.

    Raises:
        CheckpointError: it is no GGUF file, damaged, or its parts do not belong together.
        ResourceError: the disk fails.
    """
    parts = find_parts(path)
    readers = [_read(part) for part in parts]
    metadata = [_metadata(reader) for reader in readers]
    _check_parts(parts, metadata, [len(reader.tensors) for reader in readers])
    _check_kind(parts[0], metadata[0])
    tensors: dict[str, GgufTensor] = {}
    for part, reader in zip(parts, readers, strict=True):
        for found in reader.tensors:
            if found.name in tensors:
                raise CheckpointError(
                    f"tensor `{found.name}` is in `{tensors[found.name].path}` and in `{part}`",
                    hint="the parts are of different models; get all of them from one place",
                )
            tensor = tensors[found.name] = GgufTensor(
                name=found.name,
                kind=found.tensor_type,
                shape=tuple(int(size) for size in reversed(found.shape)),
                data=found.data,
                path=part,
                swapped=reader.byte_order == "S",
            )
            if tensor.swapped:
                _check_order(tensor)
    if not tensors:
        raise CheckpointError(
            f"`{parts[0]}` holds no tensors", hint="it is a vocabulary alone; get the whole model"
        )
    return GgufModel(path=parts[0], metadata=metadata[0], tensors=tuple(tensors.values()))


def find_parts(path: Path) -> list[Path]:
    """Name the files of the model that a file belongs to, in order.

    Raises:
        CheckpointError: one is missing.
    """
    part = _PART.fullmatch(path.name)
    if part is None:
        return [path]
    count, end = int(part["count"]), f"-of-{part['count']}{part['suffix']}"
    found = [path.with_name(f"{part['stem']}-{no:05d}{end}") for no in range(1, count + 1)]
    missing = next((beside for beside in found if not beside.is_file()), None)
    if missing is not None:
        raise CheckpointError(
            f"`{path}` is one of {count} parts, and `{missing.name}` is missing beside it",
            hint="put all parts into one folder, under their own names",
        )
    return found or [path]


def _read(path: Path) -> gguf.GGUFReader:
    import gguf

    _check_magic(path)
    try:
        return gguf.GGUFReader(path)
    except Exception as error:  # noqa: BLE001 - on a damaged file it may raise anything
        told, hint = first_line(error), "get the file anew, by a newer `gguf` if it is whole"
        if isinstance(error, IndexError) or any(word in told for word in _SHORT):
            told = "it ends before what its header promises"
        raise unread(path, told, hint=hint) from None


def _check_magic(path: Path) -> None:
    """Refuse a file that is not GGUF, or of an unknown version; say what it is."""
    with blamed(CheckpointError, path=path), open_regular(path) as opened:
        head = opened.read(24)
    kind, again = sniff.kind_of_file(path), f"the file is cut or damaged: {hints.fetch(path)}"
    if kind not in (None, sniff.GGUF):
        raise unread(path, f"it is {kind}", hint=sniff.remedy(kind, path))
    if len(head) < 24:
        raise unread(path, f"it ends after {len(head)} bytes, in its header", hint=again)
    if head[:4] != MAGIC:
        raise unread(path, f"it begins with {head[:4]!r}", hint=again)
    version = int.from_bytes(head[4:8], "little")
    if version & 0xFFFF == 0:
        version = int.from_bytes(head[4:8], "big")
    if version not in VERSIONS:
        known = " and ".join(map(str, VERSIONS))
        what = f"it is of version {version}, and {known} are known"
        raise unread(path, what, hint="get a newer GGUF")


def first_line(error: Exception) -> str:
    """Give the first line of another package's error, or its class where it says nothing."""
    return str(error).splitlines()[0][:120] if str(error) else type(error).__name__


def unread(path: Path, why: str, *, hint: str) -> CheckpointError:
    """Make the error of a file that cannot be read."""
    return CheckpointError(f"`{path}` cannot be read as GGUF: {why}", hint=hint)


def _metadata(reader: gguf.GGUFReader) -> dict[str, object]:
    return {
        key: field.contents()
        for key, field in reader.fields.items()
        if not key.startswith(("tokenizer.", "GGUF."))
    }


def _check_parts(parts: list[Path], metadata: list[dict[str, object]], counts: list[int]) -> None:
    """Refuse parts that are fewer than they say, or not of one model."""
    first = metadata[0]
    count, no = first.get("split.count"), first.get("split.no", 0)
    if len(parts) == 1 and isinstance(count, int) and count > 1:
        place = no + 1 if isinstance(no, int) else shown(no)
        raise CheckpointError(
            f"`{parts[0]}` is part {place} of {count}, and its name does not lead to the others",
            hint=f"name the parts as they were: NAME-00001-of-{count:05d}.gguf",
        )
    if len(parts) == 1:
        return
    anew = "get all parts from one place, under their own names"
    for no, (part, mine) in enumerate(zip(parts, metadata, strict=True)):
        says = (mine.get("split.no"), mine.get("split.count"))
        if says != (no, len(parts)):
            raise CheckpointError(
                f"`{part}` says that it is part {says[0]} of {says[1]} (from 0), and its name says "
                f"{no} of {len(parts)}",
                hint=anew,
            )
        for key in mine.keys() & first.keys() - {"split.no"}:
            if mine[key] != first[key]:
                raise CheckpointError(
                    f"`{part}` says `{key}` is {mine[key]!s:.40}, and `{parts[0].name}` says "
                    f"{first[key]!s:.40}",
                    hint=f"the parts are of different models; {anew}",
                )
    promised = first.get("split.tensors.count", sum(counts))
    if promised != sum(counts):
        raise CheckpointError(
            f"the parts of `{parts[0]}` hold {sum(counts)} tensors, and `split.tensors.count` is "
            f"{promised}",
            hint=f"the parts are of different models; {anew}",
        )


def _check_kind(path: Path, metadata: Metadata) -> None:
    """Refuse GGUF files that hold something else than a model."""
    kind = metadata.get("general.type", "model")
    architecture = metadata.get("general.architecture")
    if architecture == "clip" or kind == "mmproj":
        what, hint = "is a projector for images or sound, not a language model", ALONE
    elif kind != "model" or "adapter.type" in metadata:
        what = f"holds no model: `general.type` is {kind}"
        hint = "merge an adapter into its model first, by llama.cpp's llama-export-lora"
    elif not isinstance(architecture, str):
        what = "does not say `general.architecture`"
        hint = "give the model's GGUF file, or the first part of it"
    else:
        return
    raise CheckpointError(f"`{path}` {what}", hint=hint)


def write_header(model: GgufModel, path: Path) -> None:
    """Write a model's keys, tokenizer and all, as a little-endian GGUF file without tensors.

    transformers reads no tokenizer from a big-endian file.

    Args:
        model: whose keys they are.
        path: of the file to make.
    """
    import gguf

    writer = gguf.GGUFWriter(path, model.architecture)
    for key, field in gguf.GGUFReader(model.path).fields.items():
        value = field.contents()
        if key.startswith("GGUF.") or key == "general.architecture" or value in ([], ""):
            continue
        inner = field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(key, value, field.types[0], inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def check_type(tensor: GgufTensor) -> None:
    """Refuse a type that the `gguf` package cannot dequantize.

    Raises:
        CheckpointError: names tensor and type.
    """
    import gguf

    try:
        gguf.quants.dequantize(np.zeros((1, _block_bytes(tensor.kind)), np.uint8), tensor.kind)
    except NotImplementedError:
        raise tensor.refusal(
            f"is {tensor.kind.name}, which the package `gguf` cannot dequantize",
            hint="get the model as GGUF in F16, BF16, Q8_0 or another common type",
        ) from None


def _block_bytes(kind: gguf.GGMLQuantizationType) -> int:
    import gguf

    return gguf.GGML_QUANT_SIZES[kind][1]


def _check_order(tensor: GgufTensor) -> None:
    """Refuse big-endian blocks where tools disagree on the swap, or where none was made."""
    name = tensor.kind.name
    if tensor.data.dtype != np.uint8 or SWAPPED.get(name) == ():
        return
    if name not in SWAPPED:
        raise tensor.refusal(
            f"is {name} in a big-endian file, and tools disagree on how its bytes are swapped",
            hint="get a little-endian file, or a big-endian one in F16 or F32",
        )
    blocks = tensor.data.reshape(-1, _block_bytes(tensor.kind))[:SAMPLED]
    if _usual_share(blocks, name, "<") > _usual_share(blocks, name, ">"):
        raise tensor.refusal(
            f"is {name} with little-endian blocks, though the file is big-endian",
            hint="the tool that wrote it left the blocks as they were; get a little-endian file",
        )


def _usual_share(blocks: Array, name: str, order: str) -> float:
    """Compute the share of the 16-bit floats of blocks that have a usual size, see SCALES."""
    words = np.concatenate([blocks[:, at : at + 2] for at in SWAPPED[name]]).copy()
    if name == "BF16":
        wide = words.view(f"{order}u2").astype(np.uint32) << np.uint32(16)
        sizes = np.abs(wide.view(np.float32))
    else:
        sizes = np.abs(words.view(f"{order}f2").astype(np.float32))
    low, high = SCALES
    return float(np.mean((sizes == 0) | ((sizes > low) & (sizes < high))))


def _native(data: Array, kind: gguf.GGMLQuantizationType) -> Array:
    """Copy data into this machine's byte order."""
    if data.dtype != np.uint8:
        return data.astype(data.dtype.newbyteorder("="))
    blocks = np.array(data).reshape(-1, _block_bytes(kind))
    for at in SWAPPED[kind.name]:
        blocks[:, [at, at + 1]] = blocks[:, [at + 1, at]]
    return blocks.reshape(data.shape)
