"""Which files of a folder are its checkpoint: what transformers reads, in the same order.

    1. what `transformers_weights` of config.json names
    2. model.safetensors
    3. model.safetensors.index.json, and the shards that it names
    4. the same of diffusers, index first: diffusion_pytorch_model.safetensors[.index.json]

What transformers would not find is read, too, where only one reading is possible: the only index,
the only file, the only whole set of shards. Other weights beside them are noted, and not read.
Source: transformers 5.23, modeling_utils._get_checkpoint_files; 4.57 has the same order.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ortho_cli.errors import CheckpointError, shown
from ortho_cli.storage import hints, sniff, strict_json, tied

SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
FIRST = ("model.safetensors", "model.safetensors.index.json")
BINS = ("pytorch_model.bin", "pytorch_model.bin.index.json")
DIFFUSERS = "diffusion_pytorch_model"
ORDER = (*FIRST, DIFFUSERS + INDEX_SUFFIX, DIFFUSERS + SUFFIX)
CONFIG = "config.json"
NAMED = "transformers_weights"  # the key of config.json

TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pt2", ".pth.tar", ".pkl")
GGUF_SUFFIXES = (".gguf", ".ggml")
OTHER_SUFFIXES = (".onnx", ".h5", ".keras", ".msgpack", ".tflite", ".ot", ".npz", ".npy", ".nemo")
# Of these several may lie beside a model that is one file.
_NO_MODEL = re.compile(r"adapter|lora|optim|sched|training_args|rng_state|scaler|imatrix")
_NUMBERED = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
# Buffers that transformers computes, whatever an older version stored of them.
_COMPUTED = re.compile(r"(^|[._])(inv_freq|position_ids|masked_bias)$|\.attn\.bias$")
_TIED = re.compile(
    r"(^|\.)(lm_head|embed_out|output|embed_tokens|shared|wte|word_embeddings|tok_embeddings)\.weight$"
    r"|(^|\.)predictions\.decoder\.(weight|bias)$"
)
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
READABLE = (*sniff.TORCHES, sniff.GGUF)
_READ = "safetensors, torch's .bin and GGUF are read: download the model in one of these"
_BEST_GGUF = re.compile(r"(?i)(^|[-._])(f32|bf16|f16)([-._]|$)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The files of a folder to read, what the index says of them, and what is unusual."""

    files: tuple[str, ...]
    weight_map: Mapping[str, str] | None = None
    notes: tuple[str, ...] = ()


def choose(folder: Path, config: Mapping[str, object] | None) -> Choice:
    """Choose the files of a folder to read.

    Args:
        folder: any folder.
        config: what its config.json says.
    Raises:
        CheckpointError: none that can be read, or several that could be meant.
    """
    named = (config or {}).get(NAMED)
    if isinstance(named, str):
        return _named(folder, named)
    for name in ORDER:
        if (folder / name).is_file():
            return _read(folder, name)
        if name in FIRST and os.path.lexists(folder / name):
            raise no_file(folder / name)
    indexes, files = _list(folder, INDEX_SUFFIX), _list(folder, SUFFIX)
    if is_bin_first(folder) and files:
        raise CheckpointError(
            f"`{folder}` holds the model as pytorch_model.bin, and beside it {hints.some(files)}, "
            "which transformers does not read",
            hint=hints.convert(folder),
        )
    if len(indexes) == 1:
        return _read(folder, indexes[0])
    if indexes:
        raise CheckpointError(
            f"`{folder}` holds {len(indexes)} indexes and no {FIRST[1]}: {', '.join(indexes)}",
            hint=f"`mv {hints.said(folder / indexes[0])} {hints.said(folder / FIRST[1])}` has that "
            "one read",
        )
    return _without_index(folder, files)


def choose_file(path: Path) -> Choice:
    """Choose a file that was given by itself.

    Raises:
        CheckpointError: it is no safetensors.
    """
    notes = []
    if path.suffix != SUFFIX:
        if sniff.kind_of_file(path) != sniff.SAFETENSORS:
            raise refuse_file(path)
        notes.append(f"`{path.name}` is read as safetensors, which it holds")
    if is_part(path) and "-of-00001" not in path.name:
        notes.append(f"`{path.name}` is one shard of several; its folder is the whole model")
    return Choice(files=(path.name,), notes=tuple(notes))


def folder_of(path: Path) -> tuple[Path, str | None]:
    """Give the folder of a file that is all of a model, else the file; and a note on the choice."""
    folder = path.parent
    if not (folder / CONFIG).is_file():
        return path, None
    try:
        files = choose(folder, strict_json.read(folder / CONFIG, constants=True)).files
    except (CheckpointError, OSError):  # a folder that cannot be read: the file still can
        return path, None
    if files == (path.name,):
        return folder, f"`{path.name}` is read with {CONFIG} and what else is in its folder"
    if path.name in files:
        what = f"`{path.name}` is one of {len(files)} shards"
        return path, f"{what}: it is read alone, without {CONFIG}"
    return path, f"`{path.name}` is read alone: the model of its folder is {hints.some(files)}"


def no_file(path: Path) -> CheckpointError:
    """Say what has the name of a file and is none."""
    if path.exists():
        what = "is a directory" if path.is_dir() else "is not a regular file"
    else:
        what = f"is a link to `{path.readlink()}`, which is not there"
    return CheckpointError(f"`{path}` {what}", hint=hints.fetch(path))


def is_bin_first(folder: Path) -> bool:
    """Tell a folder of which transformers reads pytorch_model.bin, whatever else it holds."""
    there = {name for name in (*BINS, *ORDER) if (folder / name).is_file()}
    return bool(there) and there <= set(BINS)


def _list(folder: Path, suffix: str) -> list[str]:
    """Name the files of a folder with a suffix; what macOS puts beside them (`._x`) is none."""
    return sorted(
        path.name
        for path in folder.iterdir()
        if path.name.endswith(suffix) and not path.name.startswith(".") and path.is_file()
    )


def _named(folder: Path, named: str) -> Choice:
    if not named.endswith((SUFFIX, INDEX_SUFFIX)) or not _is_inside(named):
        raise CheckpointError(
            f"config.json of `{folder}` says `{NAMED}` is {shown(named)}, which is no {SUFFIX} "
            "file or index in it",
            hint="restore the config.json that came with the model",
        )
    if not (folder / named).is_file():
        raise CheckpointError(
            f"config.json of `{folder}` says `{NAMED}` is `{named}`, which is not there",
            hint=hints.fetch(folder / named),
        )
    return _read(folder, named)


def _read(folder: Path, name: str) -> Choice:
    """Read one file, or the index of several."""
    if not name.endswith(INDEX_SUFFIX):
        return Choice(files=(name,), notes=_left(folder, (name,), name))
    notes: list[str] = []
    weight_map = read_index(folder / name, notes=notes)
    files = tuple(sorted(set(weight_map.values())))
    return Choice(files=files, weight_map=weight_map, notes=(*notes, *_left(folder, files, name)))


def _left(folder: Path, files: Iterable[str], because: str) -> tuple[str, ...]:
    left = sorted(set(_list(folder, SUFFIX)) - set(files))
    if because in FIRST[:1] and (folder / FIRST[1]).is_file():
        left.append(FIRST[1])
    return (f"not read, since `{because}` is: {hints.some(left)}",) if left else ()


def _without_index(folder: Path, files: list[str]) -> Choice:
    if not files:
        raise _nothing(folder)
    if len(files) == 1 and not _NUMBERED.fullmatch(files[0]):
        return Choice(files=(files[0],))
    sets: dict[tuple[str, int], list[int]] = {}
    for match in filter(None, map(_NUMBERED.fullmatch, files)):
        key = (match["stem"], int(match["count"]))
        sets.setdefault(key, []).append(int(match["number"]))
    if not sets:
        return _one_of(folder, files)
    wanted = [key for key in sets if key[0] == "model"] or list(sets)
    if len(wanted) > 1:
        names = hints.some([f"{stem}-?????-of-{count:05d}{SUFFIX}" for stem, count in wanted])
        raise CheckpointError(
            f"`{folder}` holds {len(wanted)} sets of shards and no index: {names}",
            hint="move all but one of them to another folder, or restore " + FIRST[1],
        )
    return _whole_set(folder, *wanted[0], sets[wanted[0]])


def _whole_set(folder: Path, stem: str, count: int, numbers: list[int]) -> Choice:
    begin = 0 if 0 in numbers else 1  # some count from 0
    lacking = sorted(set(range(begin, begin + count)) - set(numbers))
    if lacking:
        missing = folder / f"{stem}-{lacking[0]:05d}-of-{count:05d}{SUFFIX}"
        raise CheckpointError(
            f"`{folder}` lacks {len(lacking)} of {count} shards, such as `{missing.name}`",
            hint=hints.fetch(missing),
        )
    files = tuple(f"{stem}-{n:05d}-of-{count:05d}{SUFFIX}" for n in sorted(numbers))
    note = f"there is no index: all {count} shards `{stem}-*` are read"
    return Choice(files=files, notes=(note, *_left(folder, files, f"{stem}-*")))


def _one_of(folder: Path, files: list[str]) -> Choice:
    models = [name for name in files if not _NO_MODEL.search(name.lower())]
    if len(models) == 1:
        return Choice(files=(models[0],), notes=_left(folder, models, models[0]))
    raise CheckpointError(
        f"`{folder}` holds {len(files)} .safetensors files and no index: {', '.join(files[:4])}",
        hint=f"`mv {hints.said(folder / (models or files)[0])} {hints.said(folder / FIRST[0])}` "
        "has that one read; or give one of the files, which stands for itself",
    )


def _nothing(folder: Path) -> CheckpointError:
    """Say what a folder without safetensors holds, and what to do with it."""
    names = _list(folder, "")
    torch = [n for n in names if n.endswith(TORCH_SUFFIXES) and not _NO_MODEL.search(n.lower())]
    ggufs = [name for name in names if name.endswith(GGUF_SUFFIXES)]
    held = [*torch, *ggufs, *(name for name in names if name.endswith(OTHER_SUFFIXES))]
    if torch:
        whole = len(torch) == 1 or is_bin_first(folder)
        hint = hints.convert(folder if whole else folder / torch[0])
    elif ggufs:
        best = next((name for name in ggufs if _BEST_GGUF.search(name)), ggufs[0])
        hint = hints.convert(folder if len(ggufs) == 1 else folder / best)
    elif held:
        hint = _READ
    elif below := _folders_below(folder):
        hint = f"`{below[0]}` holds some: give that folder"
    else:
        hint = hints.fetch(folder)
    only = f"only {', '.join(held[:4])}" if held else "no weights"
    return CheckpointError(f"`{folder}` holds no .safetensors file, {only}", hint=hint)


def _folders_below(folder: Path) -> list[Path]:
    """Find folders that hold weights, as diffusers' parts and training's checkpoints do."""
    suffixes = (SUFFIX, *TORCH_SUFFIXES, *GGUF_SUFFIXES)
    return sorted(
        below
        for below in folder.iterdir()
        if below.is_dir()
        and not below.name.startswith(".")
        and any(path.name.endswith(suffixes) for path in below.iterdir())
    )


def read_index(
    path: Path, *, suffix: str = SUFFIX, notes: list[str] | None = None
) -> dict[str, str]:
    """Read a weight_map; every file in it exists, in the index's folder or below.

    Raises:
        CheckpointError: it is no index, or a file that it names is elsewhere or not there.
    """
    weight_map = strict_json.read(path, constants=True, notes=notes).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"`{path}` has no `weight_map`",
            hint=f"{hints.fetch(path)}; without an index a whole set of shards is read",
        )
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _is_inside(file):
            raise CheckpointError(
                f"`{path}` sends tensor `{name}` to {shown(file)}, which is not a {suffix} name "
                f"in its folder",
                hint="shards must lie beside the index",
            )
        if not file.endswith(suffix):
            hint = "restore the index that came with the model"
            if file.endswith(".bin"):
                other = path.with_name(BINS[1])
                hint = f"`mv {hints.said(path)} {hints.said(other)}`, then "
                hint += hints.convert(path.parent)
            raise CheckpointError(
                f"`{path}` sends tensor `{name}` to `{file}`, which is not a {suffix} name",
                hint=hint,
            )
    for file in sorted(set(weight_map.values())):
        below = path.parent / file
        if not below.is_file():
            raise CheckpointError(
                f"`{path}` names `{file}`, which is not there", hint=hints.fetch(below)
            )
    return weight_map


def _is_inside(file: str) -> bool:
    """Tell a name inside the folder; what leads out of it could be any file of the machine."""
    parts = PurePosixPath(file).parts
    return bool(parts) and ".." not in parts and not PurePosixPath(file).is_absolute()


def is_spare(name: str, there: Iterable[str], config: Mapping[str, object] | None) -> bool:
    """Tell a tensor that an index may list and no file hold: a model is whole without it.

    Args:
        name: of the tensor.
        there: the tensors that files hold.
        config: what config.json says.
    """
    if _COMPUTED.search(name):
        return True
    levels = strict_json.levels(config)
    layer = _LAYER.search(name)
    if layer is not None:  # layers past the last are for speculation, and never built
        counts = [level.get("num_hidden_layers") for level in levels]
        known = [count for count in counts if isinstance(count, int)]
        return bool(known) and int(layer[1]) >= max(known)
    if _TIED.search(name) is None or not any(_TIED.search(other) for other in there):
        return False
    ties = [level["tie_word_embeddings"] for level in levels if "tie_word_embeddings" in level]
    types = {level.get("model_type") for level in levels}
    return any(ties) if ties else not tied.HEADS.keys().isdisjoint(map(str, types))


def is_part(path: Path) -> bool:
    """Tell a file of weights that is only a part of what its folder holds: config, other shards."""
    shard = re.search(r"-\d{5}-of-\d{5}\.", path.name)
    whole = path.name in BINS and (path.parent / CONFIG).is_file()
    return whole or (shard is not None and path.suffix not in GGUF_SUFFIXES)


def refuse_file(path: Path) -> CheckpointError:
    """Say what a file that is no safetensors is, and what to do with it."""
    kind = sniff.kind_of_file(path)
    what = kind or f"a `{path.suffix or 'plain'}` file"
    if path.name.endswith((INDEX_SUFFIX, CONFIG)):
        hint = f"give its folder: `{hints.said(path.parent)}`"
    elif path.suffix in TORCH_SUFFIXES + GGUF_SUFFIXES and kind in (None, *READABLE):
        hint = hints.convert(path.parent if is_part(path) else path)
    elif kind not in (None, sniff.TEXT, sniff.JSON):
        hint = sniff.remedy(kind, path)
    else:
        hint = _READ
    return CheckpointError(f"`{path}` is {what}, not .safetensors", hint=hint)
