"""The plan of a conversion: dtype, file and offset of each tensor, before a weight is read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ortho_cli.convert.sources.base import Source, SourceTensor
from ortho_cli.errors import UsageError
from ortho_cli.formats.artifact import CONFIG_FILE, INDEX_FILE, canonical_json, pretty_json
from ortho_cli.split.dtypes import BY_CONFIG, FLOATS
from ortho_cli.split.sizes import DEFAULT_SIZES, Sizes
from ortho_cli.storage.data_file import Layout, TensorSpec, plan_layout
from ortho_cli.storage.job import SIDE_BYTES
from ortho_cli.storage.side_files import SideFiles, choose, choose_none
from ortho_cli.version import __version__

WEIGHTS_FILE = "model.safetensors"
SHORT_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
SHORT_DTYPES |= {"half": "float16", "float": "float32", "f16": "float16", "f32": "float32"}
ROLE = "dense"
Shard = list[tuple[SourceTensor, TensorSpec]]  # the tensors of a file, and how they are written


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertTensor:
    """One tensor: its source, how it is written, and the file that it is written to."""

    source: SourceTensor
    spec: TensorSpec  # of the same name and shape
    file: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertPlan:
    """Everything that is decided before the work begins."""

    kind: str
    tensors: tuple[ConvertTensor, ...]
    files: tuple[tuple[str, Layout], ...]
    made_files: tuple[tuple[str, bytes], ...]
    side: SideFiles
    notes: tuple[str, ...]
    sha256: str
    sizes: Sizes  # of tiles; no byte that is written depends on them

    @property
    def bytes_written(self) -> int:
        """Bytes of the output folder."""
        weights = sum(layout.size for _, layout in self.files)
        return weights + sum(len(data) for _, data in self.made_files) + self.side.nbytes

    @property
    def bytes_on_disk(self) -> int:
        """Bytes of the output, and of the work beside it while it is made."""
        return self.bytes_written + SIDE_BYTES * (1 + len(self.tensors))

    def to_json(self, digests: Mapping[str, str] | None = None) -> dict[str, object]:
        """Give the document of `ortho convert --json`, byte offsets included.

        Args:
            digests: BLAKE3 of each tensor, by name, once they are written.
        """
        layouts = dict(self.files)
        return {
            "plan_sha256": self.sha256,
            "kind": self.kind,
            "totals": {
                "tensors": len(self.tensors),
                "weights": sum(tensor.source.numel for tensor in self.tensors),
                "cast": sum(t.spec.dtype != t.source.dtype for t in self.tensors),
                "total_size": sum(tensor.spec.nbytes for tensor in self.tensors),
                "bytes_written": self.bytes_written,
            },
            "files": [
                *({"name": n, "size": x.size, "header": len(x.header)} for n, x in self.files),
                *({"name": name, "size": len(data)} for name, data in self.made_files),
                *({"name": file.name, "size": file.size} for file in self.side.copied),
            ],
            "tensors": [
                {
                    "name": tensor.source.name,
                    "shape": list(tensor.source.shape),
                    "source_dtype": tensor.source.dtype,
                    "dtype": tensor.spec.dtype,
                    "file": tensor.file,
                    "offset": layouts[tensor.file].regions[tensor.source.name].offset,
                    "nbytes": tensor.spec.nbytes,
                    **({"blake3": digests[tensor.source.name]} if digests else {}),
                }
                for tensor in self.tensors
            ],
            "left_out": self.side.to_json(),
            "notes": list(self.notes),
        }


def parse_dtype(text: str | None) -> str | None:
    """Read the name of a dtype, short (`bf16`) or as torch has it (`torch.bfloat16`)."""
    if text is None:
        return None
    name = text.lower().removeprefix("torch.")
    name = SHORT_DTYPES.get(name, name)
    if name not in BY_CONFIG:
        raise UsageError(
            f"--dtype {text} is none of {', '.join(BY_CONFIG)}",
            hint="bf16, fp16 and fp32 are short for them",
        )
    return name


def make_plan(
    source: Source,
    *,
    dtype: str | None = None,
    shard_size: int,
    copy: Sequence[str] = (),
    arguments: Sequence[Path] = (),
    sizes: Sizes = DEFAULT_SIZES,
) -> ConvertPlan:
    """Decide everything that headers and settings decide.

    Args:
        source: what is converted.
        dtype: bfloat16, float16 or float32, or short for it, for floating tensors; None keeps
            each one's own.
        shard_size: most bytes of tensors in a file; a larger tensor gets a file of its own.
        copy: globs of files to copy beside those that `side_files` names.
        arguments: files that were given to the command; never copied.
        sizes: of tiles.
    Raises:
        UsageError: another dtype, or any other than its own for a source of packed integers; or
            see `side_files.choose`.
        CheckpointError: a header would pass the format's limit.
    """
    dtype = parse_dtype(dtype)
    if dtype is not None:
        _check_dtype(dtype, source)
    shards = _fill_shards(source, dtype, shard_size)
    tensors = tuple(
        ConvertTensor(source=tensor, spec=spec, file=name)
        for name, shard in shards.items()
        for tensor, spec in shard
    )
    sha256 = _sha256(source, tensors)
    files = tuple((name, _layout(shard, source, sha256)) for name, shard in shards.items())
    made = tuple(_made_files(source, tensors, dtype))
    if source.own is None:
        side = choose_none(source.path, copy)
    else:
        ours = {*shards, *(name for name, _ in made), INDEX_FILE, CONFIG_FILE}
        skip = {*source.own, CONFIG_FILE}
        side = choose(source.folder, skip=skip, ours=ours, copy=copy, arguments=arguments)
    return ConvertPlan(
        kind=source.kind,
        tensors=tensors,
        files=files,
        made_files=made,
        side=side,
        notes=(*source.notes, *side.notes),
        sha256=sha256,
        sizes=sizes,
    )


def _check_dtype(dtype: str, source: Source) -> None:
    if source.own_dtype not in (None, BY_CONFIG[dtype]):
        raise UsageError(
            f"`{source.path}` holds packed integers, which are dequantized to {source.own_dtype} "
            f"as its config.json says, and --dtype {dtype} is another",
            hint="leave --dtype out; a second `ortho convert` with it casts the result",
        )


def _sha256(source: Source, tensors: tuple[ConvertTensor, ...]) -> str:
    content = {
        "version": __version__,
        "kind": source.kind,
        "settings": dict(source.settings),
        "aliases": dict(source.aliases),
        "tensors": [
            [t.source.name, t.source.dtype, t.spec.dtype, t.spec.shape, t.file] for t in tensors
        ],
    }
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()


def _fill_shards(source: Source, dtype: str | None, limit: int) -> dict[str, Shard]:
    """Put tensors into files in the order given; one above the limit has a file of its own."""
    shards: list[Shard] = [[]]
    held = 0
    for tensor in source.tensors:
        target = BY_CONFIG[dtype] if dtype and tensor.dtype in FLOATS else tensor.dtype
        spec = TensorSpec(key=tensor.name, dtype=target, shape=tensor.shape)
        if shards[-1] and held + spec.nbytes > limit:
            shards.append([])
            held = 0
        shards[-1].append((tensor, spec))
        held += spec.nbytes
    if len(shards) == 1:
        return {WEIGHTS_FILE: shards[0]}
    end = f"-of-{len(shards):05d}.safetensors"
    return {f"model-{number:05d}{end}": shard for number, shard in enumerate(shards, 1)}


def _layout(shard: Shard, source: Source, sha256: str) -> Layout:
    keys = {spec.key for _, spec in shard}
    # safetensors.torch.save_model's convention: a copy that was dropped names the one kept.
    aliases = {copy: kept for copy, kept in sorted(source.aliases.items()) if kept in keys}
    ours = {"format": "pt", "ortho_role": ROLE, "ortho_version": __version__}
    ours |= {key: str(value) for key, value in source.settings.items()}
    return plan_layout([spec for _, spec in shard], {**aliases, **ours, "plan_sha256": sha256})


def _made_files(
    source: Source, tensors: tuple[ConvertTensor, ...], dtype: str | None
) -> Iterator[tuple[str, bytes]]:
    if source.config is not None:
        config = source.config if dtype is None else _with_dtype(source.config, dtype)
        yield CONFIG_FILE, pretty_json(config)
    if len({tensor.file for tensor in tensors}) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.spec.nbytes for tensor in tensors)},
            "weight_map": {tensor.source.name: tensor.file for tensor in tensors},
        }
        yield INDEX_FILE, pretty_json(index)
    yield from source.made_files


def _with_dtype(config: Mapping[str, object], dtype: str, *, top: bool = True) -> dict[str, object]:
    """Replace the dtype wherever the config names one, in configs of parts, too."""
    keys = [key for key in ("dtype", "torch_dtype") if isinstance(config.get(key), str)]
    found = {
        key: _with_dtype(value, dtype, top=False) if isinstance(value, dict) else value
        for key, value in config.items()
    }
    return {**found, **dict.fromkeys(keys or (["dtype"] if top else []), dtype)}
