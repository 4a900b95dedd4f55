"""Files of torch.save as sources: .bin, .pt, .pth, .ckpt, .pth.tar and others, whole or sharded.

They come from strangers and could run code when read, so only tensors and plain containers are ever
unpickled (torch's `weights_only`); a file with anything else is refused, and the error names it.
Zip archives are mapped and read on demand, one shard at a time. Files of before torch 1.6 cannot be
mapped, and are held in memory whole.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ortho_cli.convert.sources.architectures import is_tied
from ortho_cli.convert.sources.base import Format, Opener, Source, SourceTensor, config_of, mark
from ortho_cli.convert.sources.safetensors_files import has_safetensors
from ortho_cli.convert.sources.state_dicts import Weights, find_weights, place_of
from ortho_cli.errors import CheckpointError
from ortho_cli.split.dtypes import names_of_torch
from ortho_cli.storage import hints, sniff
from ortho_cli.storage.checkpoint import check_index
from ortho_cli.storage.folders import read_index
from ortho_cli.storage.untrusted import open_regular

SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pt.tar", ".pth.tar", ".ckpt.tar", ".bin.tar")
WHOLE_FILE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"
VARIANT_INDEX = "pytorch_model.bin.index.*.json"  # transformers writes the variant's name there
REMAP_BYTES = 1 << 28  # bytes read of a mapped file after which it is opened again, to free them

# Names of files that trainers write beside weights, under the same suffixes.
BESIDE = re.compile(
    r"^(training_args|optimizer|scheduler|scaler|rng_state|random_states|sampler|dl_state"
    r"|custom_checkpoint)|optim_states\.pt$|_optim(izer)?\."
)
# Model-parallel files, or folders of one such file: each has a slice of every tensor.
PIECE = re.compile(
    r"^(?P<name>consolidated\.|\w*zero_pp_rank_|mp_rank_)(?P<number>\d+)(?P<rest>.*)$"
)
SHOWN = 8  # notes on tensors that share memory
DEEPSPEED = re.compile(r"mp_rank_\d+_model_states\.pt$")
HEADS = re.compile(
    r"(^|\.)(lm_head|embed_out|output|output_layer|proj_out|decoder|generator|score|head)"
    r"(\.decoder)?\.weight$"
)
EMBEDDINGS = re.compile(r"(^|\.)(\w*embed\w*|wte|shared|emb|embeddings\.word)\.weight$")

Found = tuple[list[Path], dict[str, str] | None]  # files, and the file of each tensor by an index


def _is_torch_file(path: Path) -> bool:
    """Tell whether a file is one of torch.save, by its bytes; raises for other known kinds."""
    if path.suffix == ".safetensors":
        return False
    if path.suffix == ".distcp":
        raise _distributed(path.parent)
    open_regular(path).close()  # raises with the reason where it cannot be read
    kind = sniff.kind_of_file(path)
    if kind is None or kind in sniff.TORCHES:
        return kind is not None or path.name.endswith(SUFFIXES)
    raise _wrong_kind(path, kind)


def _wrong_kind(path: Path, kind: str) -> CheckpointError:
    return CheckpointError(f"`{path}` is {kind}, no torch file", hint=sniff.remedy(kind, path))


def _find_files(folder: Path) -> Found | None:
    """List the files of a folder to read, if it has any, and the file of each tensor by its index.

    One whole file comes before an index, as in transformers.

    Raises:
        CheckpointError: several files and no index, an index that does not fit, or pieces.
    """
    if (folder / WHOLE_FILE).is_file():
        return [folder / WHOLE_FILE], None
    indexes = [p for p in (folder / INDEX, *sorted(folder.glob(VARIANT_INDEX))) if p.is_file()]
    if indexes:
        if indexes[0].name != INDEX and len(indexes) > 1:
            raise _several(folder, indexes, "indexes and none without a variant's name")
        weight_map = read_index(indexes[0], suffix=".bin")
        return [folder / name for name in sorted(set(weight_map.values()))], weight_map
    named = sorted(p for p in folder.iterdir() if p.name.endswith(SUFFIXES) and p.is_file())
    files = [path for path in named if not BESIDE.search(path.name)]
    if (folder / "zero_to_fp32.py").is_file() and len(files) != 1:
        raise CheckpointError(
            f"`{folder}` holds a checkpoint of DeepSpeed in pieces",
            hint=f"join them: `python {hints.said(folder / 'zero_to_fp32.py')} "
            f"{hints.said(folder)} OUT`, then `ortho convert OUT`",
        )
    pieces = next((p for where in ("*.distcp", "*/*.distcp") for p in folder.glob(where)), None)
    if not files and pieces is not None:
        raise _distributed(pieces.parent)
    if len(files) > 1:
        _refuse_pieces(files[0])
        raise _several(folder, files, "files of weights and no index")
    return (files, None) if files else None


def _several(folder: Path, files: list[Path], what: str) -> CheckpointError:
    names = ", ".join(file.name for file in files[:4])
    return CheckpointError(
        f"`{folder}` holds {len(files)} {what}: {names}",
        hint=f"give one of the files, as in `ortho convert {hints.said(files[0])}`, or "
        f"restore {INDEX}",
    )


def _distributed(folder: Path) -> CheckpointError:
    return CheckpointError(
        f"`{folder}` is a distributed checkpoint: its .distcp files are pieces of tensors",
        hint="join them: `python -m torch.distributed.checkpoint.format_utils dcp_to_torch "
        f"{hints.said(folder)} model.pt`, then `ortho convert model.pt`",
    )


def _refuse_pieces(file: Path) -> None:
    """Refuse a file that has a sibling with another slice of the same tensors."""
    for one in (file, file.parent):
        own = PIECE.match(one.name)
        beside = [PIECE.match(path.name) for path in sorted(one.parent.iterdir())] if own else []
        others = [
            match.string
            for match in beside
            if match and own and match["name"] == own["name"] and match["number"] != own["number"]
        ]
        if others:
            raise CheckpointError(
                f"`{one}` is one of {len(others) + 1} model-parallel pieces, beside "
                f"`{others[0]}`: each holds a slice of every tensor",
                hint="join them with the tool that comes with the model, as "
                "convert_llama_weights_to_hf.py of transformers does for Llama",
            )


def _open(path: Path, found: Found, key: str | None) -> Source:
    """Describe the weights of files, which are under a key in each.

    Raises:
        UsageError: there is no such key.
        CheckpointError: something that is no plain tensor; one name in two files.
    """
    files, weight_map = found
    folder = path if path.is_dir() else None
    config = None if folder is None else config_of(folder)
    notes: list[str] = []
    for file in files:
        _refuse_pieces(file)
    marks, bins = tuple(mark(file) for file in files), _Files(path, key)
    tensors: list[SourceTensor] = []
    where: dict[str, str] = {}
    aliases: dict[str, str] = {}
    keys: set[str] = set()
    for file in files:
        weights = _load(file, path, key)
        keys.add(weights.key)
        dropped, said = _copies(weights.tensors, config)
        notes += [*weights.notes, *said]
        aliases |= dropped
        for name, tensor in weights.tensors.items():
            if name in where:
                raise CheckpointError(
                    f"tensor `{name}` is in both `{where[name]}` and `{file.name}`",
                    hint="delete the stale shard",
                )
            where[name] = file.name
            if name not in dropped:
                dtype, read = names_of_torch()[tensor.dtype], partial(bins.read, file, name)
                shape = tuple(tensor.shape)
                tensors.append(SourceTensor(name=name, dtype=dtype, shape=shape, read=read))
    if folder is not None and weight_map is not None:
        notes += check_index(folder, where, weight_map, config=config)
    return Source(
        kind="torch",
        path=path,
        tensors=tuple(tensors),
        files=marks,
        config=config,
        own=None if folder is None else frozenset(file.name for file in files),
        notes=tuple(notes),
        aliases=aliases,
        # Two keys of one file can hold the same names: a resumed run must not mix them.
        settings={"source_key": ",".join(sorted(keys))} if any(keys) else {},
        close=bins.close,
    )


class _Files:
    """One file of tensors at a time, loaded when a row of it is wanted."""

    def __init__(self, given: Path, key: str | None) -> None:
        self._given, self._key = given, key
        self._file: Path | None = None
        self._tensors: dict[str, Tensor] = {}
        self._flat: tuple[str, Tensor] | None = None
        self._touched = 0  # bytes of the mapping that were read, and so count as memory in use

    def read(self, file: Path, name: str, start: int, rows: int) -> Tensor:
        stale = start == 0 and self._touched > REMAP_BYTES and zipfile.is_zipfile(file)
        if self._file != file or stale:
            self.close()
            self._tensors = _load(file, self._given, self._key).tensors
            self._file = file
        if self._flat is None or self._flat[0] != name:
            tensor = self._tensors[name]
            # A tensor that cannot be viewed as rows is copied: once, and not for every tile.
            flat = tensor.flatten(0, -2) if tensor.dim() > 1 else tensor.reshape(-1, 1)
            self._flat = name, flat
        found = self._flat[1][start : start + rows]
        self._touched += found.nbytes
        return found.resolve_conj().resolve_neg().contiguous()

    def close(self) -> None:
        self._file, self._tensors, self._flat = None, {}, None
        self._touched = 0


def _load(path: Path, given: Path, key: str | None = None) -> Weights:
    weights = find_weights(_unpickle(path), file=path, given=given, key=key)
    tensors = {name: _plain(path, name, tensor) for name, tensor in weights.tensors.items()}
    if DEEPSPEED.search(path.name) and not any(tensor.numel() for tensor in tensors.values()):
        raise CheckpointError(
            f"`{path}` holds {len(tensors)} tensors and no elements: ZeRO-3 keeps those in pieces",
            hint="join them with the zero_to_fp32.py beside the checkpoint",
        )
    return replace(weights, tensors=tensors)


def _plain(path: Path, name: str, tensor: Tensor) -> Tensor:
    """Give the values of a tensor; refuse one that safetensors cannot hold."""
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        what = f"a {type(tensor).__name__}, a tensor of a kind of its own"
    elif tensor.is_nested:
        what = "a nested tensor"
    elif tensor.is_meta:
        what = "on the meta device, without values"
    elif tensor.is_quantized:
        what = f"quantized ({tensor.dtype})"
    elif tensor.layout is not torch.strided:
        what = f"sparse ({tensor.layout})"
    elif tensor.dtype not in names_of_torch():
        what = str(tensor.dtype)
    else:
        return tensor.detach()
    what = what.replace("torch.", "")
    raise CheckpointError(
        f"tensor `{name}` of `{path}` is {what}, which safetensors cannot hold",
        hint="save dense tensors of a plain dtype, with values",
    )


def _unpickle(path: Path) -> object:
    """Read a file of tensors and plain containers; no code in it is ever run."""
    kind = sniff.kind_of_file(path)
    if kind is None:
        with open_regular(path) as file:
            raise _unread(path, f"it begins with {file.read(8)!r}")
    if kind not in sniff.TORCHES:
        raise _wrong_kind(path, kind)
    try:
        with warnings.catch_warnings(action="ignore"):  # of torch's own internals, on old files
            mmap = zipfile.is_zipfile(path)
            return torch.load(path, weights_only=True, mmap=mmap, map_location="cpu")
    except (OSError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001 - a damaged file can make the reader raise anything
        told = str(error).strip() or type(error).__name__
    named = re.search(r"(?:GLOBAL|[Gg]lobal:?|function|class) `?([A-Za-z_][\w.]*\.\w+)", told)
    if named:
        raise _would_run(path, named[1])
    # Before this, torch advises to read the file with weights_only=False.
    lines = told.partition("WeightsUnpickler error:")[2].strip() or told
    raise _unread(path, lines.splitlines()[0][:120])


def _unread(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"`{path}` ({path.stat().st_size} bytes) is no readable torch file: {why}",
        hint="the file is cut or damaged, or of another kind; download it again",
    )


def _would_run(path: Path, name: str) -> CheckpointError:
    """Refuse a file that names a class or function, as a whole module or training settings do."""
    script = (
        "import sys, torch; m = torch.load(sys.argv[1], weights_only=False); "
        "f = lambda v: v.state_dict() if hasattr(v, 'state_dict') else v; torch.save({k: f(v) "
        "for k, v in f(m).items() if isinstance(f(v), (dict, torch.Tensor))}, 'weights.pt')"
    )
    return CheckpointError(
        f"`{path}` holds the global `{name}`, which is no tensor; nothing was run",
        hint="do not trust the file; if you made it, save its tensors alone, which runs its code: "
        f"{hints.python(script, path)}, then `ortho convert weights.pt`",
    )


def _copies(
    tensors: Mapping[str, Tensor], config: Mapping[str, object] | None
) -> tuple[dict[str, str], list[str]]:
    """Map each head that is dropped to the embedding it equals; note every tensor in shared memory.

    A copy that is written twice always loads right. A reader fills one that was dropped with random
    values, unless it ties it: so only a head is dropped, and only where the model ties it.
    """
    dropped: dict[str, str] = {}
    notes: list[str] = []
    for names in _shared(tensors):
        heads = [name for name in names if HEADS.search(name)]
        embedding = next((n for n in names if EMBEDDINGS.search(n) and n not in heads), None)
        kept = embedding or names[0]
        tied = is_tied(config) if heads and embedding else None
        for name in (name for name in names if name != kept):
            if name in heads and tied:
                dropped[name] = kept
                verb = "kept once, since the model ties them"
            else:
                known = name in heads and tied is not None
                why = "the model does not tie them" if known else "nothing says that they are tied"
                verb = f"written out as copies, since {why}"
            notes.append(f"`{name}` is the same memory as `{kept}`: {verb}")
    if len(notes) > SHOWN:
        notes[SHOWN:] = [f"{len(notes) - SHOWN} other tensors are the same memory as another, too"]
    return dropped, notes


def _shared(tensors: Mapping[str, Tensor]) -> Iterable[list[str]]:
    """Group the names of tensors that are the same elements of the same memory."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            groups.setdefault(place_of(tensor), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _recognize(path: Path, key: str | None) -> Opener | None:
    found: Found | None = None
    if path.is_file():
        found = ([path], None) if _is_torch_file(path) else None
    elif path.is_dir() and not has_safetensors(path):
        found = _find_files(path)
    return None if found is None else partial(_open, path, found, key)


FORMAT = Format(label="a file of torch.save", recognize=_recognize, takes_key=True)
