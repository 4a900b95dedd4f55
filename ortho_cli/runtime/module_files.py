"""Save any module with OrthoLinear as an artifact, and load an artifact onto such a module."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from blake3 import blake3
from torch import Tensor, nn

from ortho_cli.decompose.plan import NO_DIGEST, OUR_FILES
from ortho_cli.errors import ArtifactError, CheckpointError, OutputExistsError, UsageError, blamed
from ortho_cli.formats import artifact
from ortho_cli.formats.artifact import BASE_FILE, CONFIG_FILE, ORTHO_FILE, Artifact
from ortho_cli.formats.card import CARD_FILE, Facts, make_card
from ortho_cli.formats.csr import BASE_PARTS, ORTHO_PARTS
from ortho_cli.formats.ortho_reader import KeptReader
from ortho_cli.formats.quantization_config import index, quantization_config
from ortho_cli.formats.report import Totals
from ortho_cli.model.linears import is_conv1d, is_plain_linear
from ortho_cli.runtime.ortho_linear import OrthoLinear, layers_of
from ortho_cli.split.dtypes import names_of_torch, torch_dtypes
from ortho_cli.split.quantize import as_bytes
from ortho_cli.storage.checkpoint import Shard, ShardReader, TensorInfo, open_checkpoint
from ortho_cli.storage.data_file import DataFile, GrowingDigest, Layout, TensorSpec, plan_layout
from ortho_cli.storage.job import resolve_output
from ortho_cli.storage.side_files import README as SOURCE_CARD
from ortho_cli.storage.side_files import SideFiles, choose
from ortho_cli.storage.work_folder import WorkFolder, recover
from ortho_cli.version import __version__

PLAIN = "build the module as it was when it was saved"


def distinct(module: nn.Module) -> dict[str, Tensor]:
    """Name every tensor of a module's state once, shared ones by the name that comes first."""
    found: dict[str, Tensor] = {}
    seen: set[tuple[object, ...]] = set()
    for name, value in module.state_dict().items():
        if not isinstance(value, Tensor):
            raise UsageError(
                f"state `{name}` is a {type(value).__name__}, and safetensors holds tensors only",
                hint="a module's extra state cannot be saved",
            )
        key = key_of(value)
        if key not in seen:
            found[name] = value
        if value.numel():
            seen.add(key)
    return found


def key_of(tensor: Tensor) -> tuple[object, ...]:
    """Give what is equal for two names of one tensor; its first two fields, for views of it too."""
    storage = id(tensor) if tensor.is_meta else tensor.untyped_storage().data_ptr()
    return storage, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def source_digest(module: nn.Module) -> str:
    """Digest a module's state as `artifact.source_digest` does a checkpoint's."""
    return artifact.source_digest(
        (name, names_of_torch()[t.dtype], tuple(t.shape), blake3(as_bytes(t.cpu())).hexdigest())
        for name, t in distinct(module).items()
    )


# Longer than 60 lines: half of it says what each argument is.
def save_module(
    module: nn.Module,
    folder: Path,
    *,
    recipe: Mapping[str, object],
    digest: str,
    force: bool = False,
    side: SideFiles | None = None,
) -> None:
    """Write an artifact; the folder appears whole or not at all.

    Args:
        module: holds at least one OrthoLinear; what it shares is written once.
        folder: where to.
        recipe: the settings of the split, as JSON.
        digest: the source's.
        force: replace an artifact that is there.
        side: files to copy along, as `choose_side_files` chose them.
    Raises:
        OutputExistsError: something is there already.
        UsageError: a tensor has no elements, or a dtype that safetensors does not know.
    The same module gives the same bytes.
    """
    out = _free_output(folder, force=force)
    base, ortho = _streams(module)
    specs = _specs(base), _specs(ortho)
    common = _common_metadata(recipe, [*specs[0], *specs[1]])
    base_layout = plan_layout(specs[0], artifact.base_metadata(**common))
    ortho_layout = plan_layout(
        specs[1], artifact.ortho_metadata(**common, source_digest=digest, base_blake3=NO_DIGEST)
    )
    files = {BASE_FILE: base_layout.size} | ({ORTHO_FILE: ortho_layout.size} if ortho else {})
    plan = common["plan_sha256"]
    identity = {"plan": plan, "source": digest, "version": [__version__], "files": files}
    with WorkFolder(out, identity=identity, force=force) as work:
        written = _write(work, BASE_FILE, base_layout, base, mode=0o644)
        written.write_header(base_layout.header)
        base_blake3 = GrowingDigest(written.fd).up_to(base_layout.size)
        if ortho:
            metadata = artifact.ortho_metadata(
                **common, source_digest=digest, base_blake3=base_blake3
            )
            # The stream that is withheld must not be readable by others.
            hidden = _write(work, ORTHO_FILE, ortho_layout, ortho, mode=0o600)
            hidden.write_header(plan_layout(specs[1], metadata).header)
        total = base_layout.size - len(base_layout.header)
        listed = index(base_layout.regions, total_size=total)
        work.write_file(artifact.INDEX_FILE, artifact.pretty_json(listed))
        settings = _config(module)
        if settings is not None:
            work.write_file(CONFIG_FILE, artifact.pretty_json(settings))
        copied = () if side is None else side.copied
        if side is not None:
            side.check_unchanged()
            for file in copied:
                work.copy_file(side.folder / file.source, file.name)
        theirs = any(file.name == SOURCE_CARD for file in copied)
        facts = Facts(
            plan_sha256=plan,
            source_digest=digest,
            recipe=recipe,
            totals=_totals(module, base_layout, ortho_layout if ortho else None),
            bits=sorted({layer.bits for layer in layers_of(module).values()}, reverse=True),
            group_sizes=sorted({layer.group_size for layer in layers_of(module).values()}),
            measured=False,
            ortho=ORTHO_FILE if ortho else None,
            config=settings,
            source_card=(work.artifact / SOURCE_CARD).read_bytes() if theirs else None,
        )
        work.write_file(CARD_FILE, make_card(facts))
        work.publish(may_replace=lambda there: force and artifact.is_artifact(there))


def _totals(module: nn.Module, base: Layout, ortho: Layout | None) -> Totals:
    """Add up sizes, as decompose does in its report; figures were not measured."""
    layers, regions = layers_of(module), base.regions
    packed = {f"{name}.{part}" for name in layers for part in BASE_PARTS}
    split = sum(layer.out_features * layer.in_features for layer in layers.values())
    copied = [region for key, region in regions.items() if key not in packed]
    weights = split + sum(math.prod(region.shape) for region in copied)
    base_bits = 8 * sum(regions[key].nbytes for key in packed)
    kept = 8 * sum(region.nbytes for region in ortho.regions.values()) if ortho else 0
    size = base.size + (ortho.size if ortho else 0)
    return Totals(
        sqnr_db_alpha_0=None,
        sqnr_db_alpha_1=None,
        residual_kept=None,
        bits_per_weight=round(8 * size / weights, 4),
        split_bits_per_weight_base=round(base_bits / split, 4),
        split_bits_per_weight=round((base_bits + kept) / split, 4),
        nnz=float(sum(layer.nnz or 0 for layer in layers.values())),
        tensors=len(copied) + len(layers),
        split_tensors=len(layers),
        weights=weights,
        split_weights=split,
        base_bytes=base.size,
        ortho_bytes=ortho.size if ortho else None,
    )


def _free_output(folder: Path, *, force: bool) -> Path:
    """Resolve an output folder, and refuse one that must not be replaced."""
    out = resolve_output(folder)
    recover(out)
    replaceable = not out.exists() or (force and artifact.is_artifact(out))
    if not replaceable and (not out.is_dir() or any(out.iterdir())):
        raise OutputExistsError(
            f"output `{folder}` exists", hint="choose another folder, or force=True"
        )
    return out


def _common_metadata(recipe: Mapping[str, object], specs: Iterable[TensorSpec]) -> dict[str, str]:
    """Make the metadata of both files."""
    tensors = [[spec.key, spec.dtype, list(spec.shape)] for spec in specs]
    plan = artifact.canonical_json({"version": __version__, "recipe": recipe, "tensors": tensors})
    return {
        "plan_sha256": hashlib.sha256(plan.encode()).hexdigest(),
        "recipe": artifact.canonical_json(recipe),
        "version": __version__,
    }


def choose_side_files(folder: Path, copy: Sequence[str], arguments: Iterable[Path]) -> SideFiles:
    """Choose what is copied from the folder that a module was loaded from; see `side_files`.

    Raises:
        UsageError: it is no folder; or see `side_files.choose`.
    """
    if not folder.is_dir():
        raise UsageError(f"`{folder}` is no folder", hint="give the folder of the source model")
    try:
        own = {shard.name for shard in open_checkpoint(folder).shards}
    except CheckpointError:  # weights of another kind: `choose` leaves them out and names them
        own = set()
    skip = {CONFIG_FILE, *own}
    return choose(folder, skip=skip, ours=OUR_FILES, copy=copy, arguments=arguments)


def _streams(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Sort a module's state into base and ortho."""
    layers = layers_of(module)
    held = {name for name, layer in layers.items() if layer.nnz is not None}
    if held and len(held) < len(layers):
        raise ArtifactError(
            f"`{min(layers.keys() - held)}` has no ortho stream where others have one",
            hint="save what was loaded from one artifact",
        )
    base: dict[str, Tensor] = {}
    ortho: dict[str, Tensor] = {}
    for name, value in distinct(module).items():
        owner, _, part = name.rpartition(".")
        if not value.numel() and not (owner in layers and part in ORTHO_PARTS):
            raise UsageError(f"tensor `{name}` has no elements", hint="remove it from the module")
        if value.dtype not in names_of_torch():
            raise UsageError(
                f"tensor `{name}` is {value.dtype}, which safetensors does not hold",
                hint="cast it first",
            )
        (ortho if owner in layers and part in ORTHO_PARTS else base)[name] = value
    return base, ortho


def _specs(stream: Mapping[str, Tensor]) -> list[TensorSpec]:
    return [
        TensorSpec(key=name, dtype=names_of_torch()[value.dtype], shape=tuple(value.shape))
        for name, value in stream.items()
    ]


def _write(
    work: WorkFolder, name: str, layout: Layout, stream: Mapping[str, Tensor], *, mode: int
) -> DataFile:
    file = DataFile(work, name, layout, mode=mode)
    for key, value in stream.items():
        if value.numel():
            file.write(key, as_bytes(value.detach().cpu()), start=0)
    return file


def _config(module: nn.Module) -> dict[str, object] | None:
    """Make the config.json of a transformers model; None for other modules."""
    config = getattr(module, "config", None)
    if config is None or not hasattr(config, "to_diff_dict"):
        return None
    layers = layers_of(module)
    unsplit = [
        name
        for name, child in module.named_modules()
        if isinstance(child, nn.Linear) or is_conv1d(child)
    ]
    size = min(layer.group_size for layer in layers.values())
    bits = {name: layers[name].bits for name in sorted(layers)}
    settings = quantization_config(split=bits, unsplit=sorted(unsplit), group_size=size)
    plain = json.loads(config.to_json_string(use_diff=True))
    plain["architectures"] = plain.get("architectures") or [type(module).__name__]
    return {**plain, "quantization_config": settings}


def read_tensors(shard: Shard, tensors: Iterator[TensorInfo]) -> Iterator[tuple[str, Tensor]]:
    """Read tensors of one file one by one, each into memory of its own.

    Raises:
        ArtifactError: the file is cut, or changes while it is read, or holds an unknown dtype.
    """
    with blamed(ArtifactError), contextlib.closing(ShardReader([shard])) as reader:
        for info in tensors:
            if info.dtype not in torch_dtypes():
                raise artifact.damaged(shard.path, f"`{info.name}` is of dtype {info.dtype}")
            value = torch.empty(info.shape, dtype=torch_dtypes()[info.dtype])
            if info.nbytes:
                reader.read_into(as_bytes(value), info, start=0)
            yield info.name, value
        reader.check_unchanged()


def empty_layers(opened: Artifact) -> Iterator[tuple[str, OrthoLinear]]:
    """Make layers of the sizes in an artifact's headers, on meta, without bias or ortho."""
    tensors = {tensor.name: tensor for tensor in opened.base.tensors}
    for name in opened.split:
        scale = tensors[f"{name}.weight_scale"]
        rows, columns = opened.shapes[name]
        size, dtype = columns // scale.shape[1], torch_dtypes()[scale.dtype]
        layer = OrthoLinear(
            columns, rows, group_size=size, dtype=dtype, bits=opened.bits[name], device="meta"
        )
        yield name, layer


def fill_ortho(opened: Artifact, layers: Mapping[str, OrthoLinear]) -> None:
    """Read and check the ortho stream of every layer; leave None where there is no such file.

    Raises:
        ArtifactError: names the tensor that is damaged.
    """
    if opened.ortho is None:
        return
    with KeptReader(opened) as reader:
        for name, layer in layers.items():
            for part, tensor in reader.parts(name).items():
                setattr(layer, part, tensor.to(layer.weight_packed.device))


def load_module(module: nn.Module, opened: Artifact) -> dict[str, OrthoLinear]:
    """Read all state of an artifact onto a freshly built module; return the layers to swap in.

    Nothing of the module is changed before all names, shapes and dtypes are found to agree.

    Raises:
        ArtifactError: names the tensor that is missing, unexpected, or of another shape or dtype.
    """
    state = module.state_dict(keep_vars=True)
    split = set(opened.split)
    layers = dict(empty_layers(opened))
    plain = {
        info.name: info
        for info in opened.base.tensors
        if not (info.name.rpartition(".")[0] in split and info.name.endswith(BASE_PARTS))
    }
    _check_state(module, state, layers, plain)
    packed = (info for info in opened.base.tensors if info.name not in plain)
    for key, value in read_tensors(opened.base, packed):
        name, _, part = key.rpartition(".")
        setattr(layers[name], part, value.to(state[f"{name}.weight"].device))
    fill_ortho(opened, layers)
    with torch.no_grad():
        for name, value in read_tensors(opened.base, iter(plain.values())):
            state[name].copy_(value)
    return layers


def _check_state(
    module: nn.Module,
    state: Mapping[str, Tensor],
    layers: Mapping[str, OrthoLinear],
    plain: Mapping[str, TensorInfo],
) -> None:
    """Refuse an artifact that does not fill the module, all of it and nothing else."""
    for name, layer in layers.items():
        _check_target(module, name, layer)
    for name, info in plain.items():
        if name not in state:
            raise ArtifactError(f"tensor `{name}` is not of this module", hint=PLAIN)
        mine, other = state[name], (torch_dtypes().get(info.dtype), info.shape)
        if (mine.dtype, tuple(mine.shape)) != other:
            raise ArtifactError(
                f"tensor `{name}` is {info.dtype} {list(info.shape)} where the module has "
                f"{mine.dtype} {list(mine.shape)}",
                hint=PLAIN,
            )
        if mine.is_meta:
            raise UsageError(f"tensor `{name}` is on the meta device", hint="call to_empty() first")
    filled = {key_of(state[name]) for name in plain}
    replaced = {id(module.get_submodule(name)) for name in layers}
    for name, value in state.items():
        if name in plain or key_of(value) in filled:
            continue
        owner, _, part = name.rpartition(".")
        if part != "weight" or id(module.get_submodule(owner)) not in replaced:
            raise ArtifactError(f"tensor `{name}` is not in the artifact", hint=PLAIN)


def _check_target(module: nn.Module, name: str, layer: OrthoLinear) -> None:
    """Refuse a layer that has no Linear of its size to replace."""
    try:
        target = module.get_submodule(name)
    except AttributeError:
        raise ArtifactError(f"the module has no `{name}`", hint=PLAIN) from None
    weight = getattr(target, "weight", None)
    if not is_plain_linear(target) or not isinstance(weight, Tensor):
        raise ArtifactError(f"`{name}` of the module is no plain Linear", hint=PLAIN)
    mine = [layer.out_features, layer.in_features]
    shape = list(weight.shape)[:: -1 if is_conv1d(target) else 1]
    if shape != mine:
        raise ArtifactError(f"`{name}.weight` is {mine} where the module has {shape}", hint=PLAIN)
