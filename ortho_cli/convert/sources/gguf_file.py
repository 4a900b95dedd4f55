"""GGUF files as they lie on the disk: magic, parts of a split model, byte order, dequantizing.

What the `gguf` package reads is taken from it. It does not join the parts of a split model, and it
swaps the bytes of a big-endian file in the header and in plain numbers only: both are done here.
Source: docs/gguf.md of ggml; block layouts in ggml-common.h.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ortho_cli.errors import CheckpointError, unreadable
from ortho_cli.storage import hints, sniff
from ortho_cli.storage.untrusted import open_regular

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SUFFIX = ".gguf"
ASIDE = ("mmproj", "imatrix")  # in the names of files that lie beside a model and are none
_PART = re.compile(r"(?P<stem>.+)-(?P<no>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.gguf)", re.I)

# Where the 16-bit floats of a block begin. A big-endian machine writes these blocks as its own
# structs; everything else in them is single bytes, or bit operations within single bytes. Types
# that are not listed hold wider integers, of which no two tools agree how they are swapped.
SWAPPED = {
    "BF16": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "TQ1_0": (52,),
    "TQ2_0": (64,), "MXFP4": (), "NVFP4": (),
}  # fmt: skip
# What numpy says where bytes that were asked for are not there.
_SHORT = ("reshape", "larger than", "changing to a")
SAMPLED = 4096  # blocks of a tensor that show its byte order: some 8 KiB of scales
SCALES = (1e-5, 1e2)  # sizes of weights and scales; swapped bytes make sizes of every order


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensor:
    """One tensor of a GGUF file, mapped and not read; `shape` is in rows and columns."""

    name: str
    kind: Any  # gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    data: Any  # as gguf.GGUFReader maps it: plain numbers, or blocks as bytes
    path: Path
    swapped: bool = False  # its bytes are in the other order than this machine's

    def floats(self, index: int | None = None) -> Any:
        """Dequantize the tensor, or one entry of its first dimension, to a float32 array."""
        import gguf

        data = self.data if index is None else self.data[index]
        if self.swapped:
            data = _native(data, self.kind)
        with np.errstate(all="ignore"):  # a scale may be infinite, which is checked when written
            return gguf.quants.dequantize(data, self.kind)


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufModel:
    """A model in one GGUF file or in all of its parts; the first part tells of the model."""

    path: Path
    parts: tuple[Path, ...]
    metadata: dict[str, Any]  # of the first part, without the tokenizer
    tensors: tuple[GgufTensor, ...]
    swapped: bool

    @property
    def architecture(self) -> str:
        """What llama.cpp calls the kind of model."""
        return str(self.metadata["general.architecture"])


def is_gguf(path: Path) -> bool:
    """Tell whether a file is meant to be GGUF, by its name or its first bytes."""
    return path.suffix.lower() == SUFFIX or sniff.kind_of_file(path) == sniff.GGUF


def find_gguf(folder: Path) -> Path | None:
    """Find the one GGUF model of a folder: a file, or the first part of a split one.

    Returns:
        None where there is no GGUF file.
    Raises:
        CheckpointError: there are several models, or only files that lie beside one, or all are
            in folders of the folder.
    """
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() == SUFFIX and p.is_file())
    models: dict[str, Path] = {}
    for path in found:
        if not _is_aside(path):
            part = _PART.fullmatch(path.name)
            models.setdefault(f"{part['stem']}-of-{part['count']}" if part else path.name, path)
    if len(models) > 1:
        some = hints.some([path.name for path in models.values()])
        raise CheckpointError(
            f"`{folder}` holds {len(models)} GGUF models: {some}",
            hint=f"give one of them: `ortho convert {hints.said(next(iter(models.values())))}`",
        )
    if not found and (inside := sorted(folder.glob("*/*.gguf"))):
        raise CheckpointError(
            f"`{folder}` holds no weights, and GGUF files in folders of it",
            hint=f"give one of them: `ortho convert {hints.said(inside[0])}`",
        )
    if found and not models:
        raise CheckpointError(
            f"`{folder}` holds `{found[0].name}` and no GGUF file of a language model",
            hint="give the model's own GGUF file",
        )
    return next(iter(models.values()), None)


def files_beside(path: Path) -> list[str]:
    """Name the projectors and importance matrices that lie beside a model."""
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
    told = [_metadata(reader) for reader in readers]
    _check_parts(parts, told, [len(reader.tensors) for reader in readers])
    _check_kind(parts[0], told[0])
    tensors: dict[str, GgufTensor] = {}
    for part, reader in zip(parts, readers, strict=True):
        for found in reader.tensors:
            if found.name in tensors:
                raise CheckpointError(
                    f"tensor `{found.name}` is in `{tensors[found.name].path}` and in `{part}`",
                    hint="the parts are of different models; get all of them from one place",
                )
            tensors[found.name] = _tensor(part, reader, found)
    if not tensors:
        raise CheckpointError(
            f"`{parts[0]}` holds no tensors", hint="it is a vocabulary alone; get the whole model"
        )
    return GgufModel(
        path=parts[0],
        parts=tuple(parts),
        metadata=told[0],
        tensors=tuple(tensors.values()),
        swapped=any(tensor.swapped for tensor in tensors.values()),
    )


def find_parts(path: Path) -> list[Path]:
    """Name the files of the model that a file belongs to, in order.

    Raises:
        CheckpointError: one is missing.
    """
    part = _PART.fullmatch(path.name)
    if part is None:
        return [path]
    count = int(part["count"])
    found = []
    for no in range(1, count + 1):
        beside = path.with_name(f"{part['stem']}-{no:05d}-of-{count:05d}{part['suffix']}")
        if not beside.is_file():
            raise CheckpointError(
                f"`{path}` is one of {count} parts, and `{beside.name}` is missing beside it",
                hint="put all parts into one folder, under their own names",
            )
        found.append(beside)
    return found or [path]


def _read(path: Path) -> Any:
    """Open one file by the `gguf` package."""
    import gguf

    _check_magic(path)
    try:
        return gguf.GGUFReader(path)
    except Exception as error:  # noqa: BLE001 - on a damaged file it may raise anything
        told = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        if isinstance(error, IndexError) or any(word in told for word in _SHORT):
            told = "it ends before what its header promises"
        raise _refuse(path, told, hint="get the file anew, by a newer `gguf` if it is whole") from (
            None
        )


def _check_magic(path: Path) -> None:
    """Say what a file is that is not GGUF, or GGUF that cannot be read."""
    try:
        with open_regular(path) as opened:
            head = opened.read(24)
    except OSError as error:
        raise unreadable(path, error, kind=CheckpointError, hint="may you read it?") from error
    kind, again = sniff.kind_of_file(path), f"the file is cut or damaged: {hints.fetch(path)}"
    if kind not in (None, sniff.GGUF):
        raise _refuse(path, f"it is {kind}", hint=sniff.remedy(kind, path))
    if len(head) < 24:
        raise _refuse(path, f"it ends after {len(head)} bytes, in its header", hint=again)
    if head[:4] != MAGIC:
        raise _refuse(path, f"it begins with {head[:4]!r}", hint=again)
    version = int.from_bytes(head[4:8], "little")
    if version & 0xFFFF == 0:
        version = int.from_bytes(head[4:8], "big")
    if version not in VERSIONS:
        known = " and ".join(map(str, VERSIONS))
        raise _refuse(
            path, f"it is of version {version}, and {known} are known", hint="get a newer GGUF"
        )


def _refuse(path: Path, why: str, *, hint: str) -> CheckpointError:
    return CheckpointError(f"`{path}` cannot be read as GGUF: {why}", hint=hint)


def _metadata(reader: Any) -> dict[str, Any]:
    return {
        key: field.contents()
        for key, field in reader.fields.items()
        if not key.startswith(("tokenizer.", "GGUF."))
    }


def _check_parts(parts: list[Path], told: list[dict[str, Any]], held: list[int]) -> None:
    """Refuse parts that are fewer than they say, or not of one model."""
    count = int(told[0].get("split.count", 0))
    if len(parts) == 1 and count > 1:
        raise CheckpointError(
            f"`{parts[0]}` is part {told[0].get('split.no', 0) + 1} of {count}, and its name does "
            f"not lead to the others",
            hint=f"name the parts as they were: NAME-00001-of-{count:05d}.gguf",
        )
    if len(parts) == 1:
        return
    anew = "get all parts from one place, under their own names"
    for no, (part, mine) in enumerate(zip(parts, told, strict=True)):
        says = (mine.get("split.no"), mine.get("split.count"))
        if says != (no, len(parts)):
            raise CheckpointError(
                f"`{part}` says that it is part {says[0]} of {says[1]} (from 0), and its name says "
                f"{no} of {len(parts)}",
                hint=anew,
            )
        for key in mine.keys() & told[0].keys() - {"split.no"}:
            if mine[key] != told[0][key]:
                raise CheckpointError(
                    f"`{part}` says `{key}` is {mine[key]!s:.40}, and `{parts[0].name}` says "
                    f"{told[0][key]!s:.40}",
                    hint=f"the parts are of different models; {anew}",
                )
    promised = told[0].get("split.tensors.count", sum(held))
    if promised != sum(held):
        raise CheckpointError(
            f"the parts of `{parts[0]}` hold {sum(held)} tensors, and {promised} were promised",
            hint=f"the parts are of different models; {anew}",
        )


def _check_kind(path: Path, told: dict[str, Any]) -> None:
    """Refuse GGUF files that hold something else than a model."""
    kind, architecture = told.get("general.type", "model"), told.get("general.architecture")
    if architecture == "clip" or kind == "mmproj":
        raise CheckpointError(
            f"`{path}` is a projector for images or sound, not a language model",
            hint="give the model's own GGUF file",
        )
    if kind != "model" or "adapter.type" in told:
        raise CheckpointError(
            f"`{path}` holds no model: `general.type` is {kind}",
            hint="merge an adapter into its model first, by llama.cpp's llama-export-lora",
        )
    if not isinstance(architecture, str):
        raise CheckpointError(
            f"`{path}` does not say `general.architecture`",
            hint="give the model's GGUF file, or the first part of it",
        )


def _tensor(path: Path, reader: Any, found: Any) -> GgufTensor:
    tensor = GgufTensor(
        name=found.name,
        kind=found.tensor_type,
        shape=tuple(int(size) for size in reversed(found.shape)),
        data=found.data,
        path=path,
        swapped=reader.byte_order == "S",
    )
    if tensor.swapped:
        _check_order(tensor)
    return tensor


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

    _, nbytes = gguf.GGML_QUANT_SIZES[tensor.kind]
    try:
        gguf.quants.dequantize(np.zeros((1, nbytes), np.uint8), tensor.kind)
    except NotImplementedError:
        raise CheckpointError(
            f"tensor `{tensor.name}` of `{tensor.path}` is {tensor.kind.name}, which the package "
            f"`gguf` cannot dequantize",
            hint="get the model as GGUF in F16, BF16, Q8_0 or another common type",
        ) from None


def _check_order(tensor: GgufTensor) -> None:
    """Refuse big-endian blocks of which it is not certain how they were swapped."""
    name = tensor.kind.name
    plain = tensor.data.dtype != np.uint8
    if not plain and name not in SWAPPED:
        raise CheckpointError(
            f"tensor `{tensor.name}` of `{tensor.path}` is {name} in a big-endian file, and there "
            f"is no one way to swap its bytes",
            hint="get a little-endian file, or a big-endian one in F16 or F32",
        )
    if plain or not SWAPPED[name]:
        return
    import gguf

    _, nbytes = gguf.GGML_QUANT_SIZES[tensor.kind]
    blocks = tensor.data.reshape(-1, nbytes)[:SAMPLED]
    if _sound(blocks, name, "<") > _sound(blocks, name, ">"):
        raise CheckpointError(
            f"tensor `{tensor.name}` of `{tensor.path}` is {name} with little-endian blocks, "
            f"though the file is big-endian",
            hint="the tool that wrote it left the blocks as they were; get a little-endian file",
        )


def _sound(blocks: Any, name: str, order: str) -> float:
    """Say which share of the 16-bit floats of blocks has the size of a weight or scale."""
    words = np.concatenate([blocks[:, at : at + 2] for at in SWAPPED[name]]).copy()
    if name == "BF16":
        wide = words.view(f"{order}u2").astype(np.uint32) << np.uint32(16)
        sizes = np.abs(wide.view(np.float32))
    else:
        sizes = np.abs(words.view(f"{order}f2").astype(np.float32))
    low, high = SCALES
    return float(np.mean((sizes == 0) | ((sizes > low) & (sizes < high))))


def _native(data: Any, kind: Any) -> Any:
    """Copy data into this machine's byte order."""
    if data.dtype != np.uint8:
        return data.astype(data.dtype.newbyteorder("="))
    import gguf

    _, nbytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.array(data).reshape(-1, nbytes)
    for at in SWAPPED[kind.name]:
        blocks[:, [at, at + 1]] = blocks[:, [at + 1, at]]
    return blocks.reshape(data.shape)
