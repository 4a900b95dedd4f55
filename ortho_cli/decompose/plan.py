"""The plan of a decomposition: what becomes of each tensor, and the offset of every byte.

It is made from headers and the recipe alone, so every error that needs no weight is raised here,
before anything is read or written. The plan also bounds disk space and peak memory.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ortho_cli.decompose import refusals
from ortho_cli.decompose.selection import check_overrides, select, tensor_settings
from ortho_cli.decompose.settings import GROUP_SIZES, Recipe, Saliency, Scale, fold_names
from ortho_cli.decompose.survey import Columns, Survey
from ortho_cli.errors import CheckpointError, RecipeError, ResourceError
from ortho_cli.formats import artifact
from ortho_cli.formats.artifact import canonical_json, module_of
from ortho_cli.formats.card import CARD_FILE
from ortho_cli.formats.layers import place_of
from ortho_cli.formats.statistics import Statistics, check_model, check_weights
from ortho_cli.split.select import SUMMED_ROWS
from ortho_cli.split.sizes import DEFAULT_SIZES, Sizes
from ortho_cli.split.task import columns_of
from ortho_cli.storage.checkpoint import Checkpoint, TensorInfo
from ortho_cli.storage.data_file import Layout, TensorSpec, plan_layout
from ortho_cli.storage.job import SIDE_BYTES
from ortho_cli.storage.machine import available_memory
from ortho_cli.storage.sealing import IDENTITY_FILE, SEALED_FILE
from ortho_cli.storage.side_files import SideFiles, choose, choose_none
from ortho_cli.storage.stacked import needs_stacks, restacked
from ortho_cli.version import __version__

MODULES_BYTES = 24 << 20  # all imports but torch, measured
TENSOR_BYTES = 15_000  # plan, journal and report of one tensor, measured by tests/bench_many.py
NO_DIGEST = "0" * 64  # in a header whose digest is not known yet: of the same length
# Bytes of memory per weight of the model while base is made to forget: in float32 the model, its
# gradients, the Fisher of text, for unlearn also the attacker's steps. LOGITS_BYTES was measured.
FORGET_BYTES = {"isolate": 16, "unlearn": 20}
LOGITS_BYTES = 1_600_000_000
# Tuning, per weight of a block: twice the source and a latent in float32, gradients, codes.
TUNE_BYTES = 16
TUNE_STATES = 1 << 30  # of hidden states in memory at most; where they are more, they are in files
REPACK_BYTES = 80  # per entry of ortho in one tensor, while compact is encoded; measured


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyTensor:
    """A source tensor that base holds unchanged."""

    source: TensorInfo
    reason: str  # why it is not split

    @property
    def name(self) -> str:
        """The tensor's name."""
        return self.source.name

    @property
    def base(self) -> tuple[TensorSpec, ...]:
        """The tensor that base holds of it."""
        source = self.source
        return (TensorSpec(key=source.name, dtype=source.dtype, shape=source.shape),)

    @property
    def ortho(self) -> tuple[TensorSpec, ...]:
        """The tensors that ortho holds of it: none."""
        return ()

    stored = ortho


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitTensor:
    """A weight that is split: base holds its codes and scales, ortho `k` of its entries."""

    source: TensorInfo
    bits: int  # per code
    scale: Scale
    density: float  # k as a share of its weights
    k: int
    base: tuple[TensorSpec, ...]  # weight_packed, weight_scale, weight_shape
    columns: int | None  # that ortho holds whole; None: single weights
    ortho: tuple[TensorSpec, ...]  # crow_indices unless columns are whole, col_indices, values
    values: str  # dtype of what ortho holds in the end: the source's, or I8
    stored: tuple[TensorSpec, ...]  # what ortho holds in the end; of a compact one, `ortho`

    @property
    def name(self) -> str:
        """The tensor's name."""
        return self.source.name

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        rows, columns = self.source.shape
        return rows, columns


TensorPlan = SplitTensor | CopyTensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything that is decided before the work begins."""

    recipe: Recipe
    group_size: int
    tensors: tuple[TensorPlan, ...]
    base: Layout
    ortho: Layout  # as work writes it
    stored: Layout  # as it is in the end; of a compact one weights decide, and this is `ortho`
    side: SideFiles
    sha256: str
    peak_bytes: int
    workers: int
    statistics: Statistics | None
    sizes: Sizes = DEFAULT_SIZES  # of tiles; no byte that is written depends on them
    reference: Checkpoint | None = None
    kept: Mapping[str, int] | None = None  # nnz by tensor, where a survey chose them
    shared: Mapping[str, Columns] | None = None  # columns by tensor, where siblings share them
    surveys: tuple[Survey, ...] = ()  # that the density, `kept` or `shared` was chosen by
    measures: bool = False  # inputs, on text that the model writes, before anything is split
    notes: tuple[str, ...] = ()  # about unusual sources that are read all the same
    needs_stacks: bool = False  # transformers would look for stacks of the experts that are split

    @property
    def split(self) -> tuple[SplitTensor, ...]:
        """The tensors that are split."""
        return tuple(tensor for tensor in self.tensors if isinstance(tensor, SplitTensor))

    @property
    def inputs(self) -> tuple[Path, ...]:
        """Files that are read beside the checkpoint: statistics, reference."""
        shards = self.reference.shards if self.reference else ()
        return (
            *((self.statistics.path,) if self.statistics else ()),
            *(shard.path for shard in shards),
        )

    @property
    def weights(self) -> int:
        """Elements of all tensors."""
        return sum(tensor.source.numel for tensor in self.tensors)

    @property
    def split_weights(self) -> int:
        """Elements of the split tensors."""
        return sum(tensor.source.numel for tensor in self.split)

    @property
    def bytes_read(self) -> int:
        """Bytes of tensor data that are read."""
        return sum(tensor.source.nbytes for tensor in self.tensors)

    @property
    def is_open(self) -> bool:
        """Whether a survey of all weights still has to choose each tensor's nnz, or columns.

        Before statistics are measured there is nothing to survey by.
        """
        ortho = self.recipe.ortho
        spends, shares = ortho.budget == "global", ortho.share
        is_open = (spends and self.kept is None) or (shares and self.shared is None)
        return is_open and not self.measures

    @property
    def is_compact(self) -> bool:
        """Whether ortho is compact: its size depends on weights."""
        return self.recipe.ortho.layout == "compact"

    @property
    def is_encoded(self) -> bool:
        """Whether work writes ortho to a scratch file, which is encoded in the end."""
        return self.is_compact or self.recipe.ortho.values == "int8"

    @property
    def ortho_bytes(self) -> int:
        """Bytes of ortho; an upper bound where it is compact, since its size depends on weights."""
        if not self.is_compact:
            return self.stored.size
        return len(self.ortho.header) + sum(
            artifact.compact_at_most(t.name, dtype=t.values, shape=t.shape, nnz=t.k)
            for t in self.split
        )

    @property
    def bytes_written(self) -> int:
        """Bytes of the artifact, without index, config and report."""
        return self.base.size + self.ortho_bytes + self.side.nbytes

    @property
    def bytes_on_disk(self) -> int:
        """Bytes of the artifact, and of the work beside it while it is made."""
        scratch = self.ortho.size if self.is_encoded else 0
        return self.bytes_written + scratch + SIDE_BYTES * (4 + len(self.tensors))

    @property
    def bits_per_weight(self) -> float:
        """Bits of both files with their headers, per weight of the model."""
        return 8 * (self.base.size + self.ortho_bytes) / self.weights

    def to_json(self) -> dict[str, object]:
        """Give the document of `--dry-run --json`, with every byte offset that is known."""
        return {
            "plan_sha256": None if self.measures else self.sha256,  # it depends on statistics
            "recipe": self.recipe.canonical(),
            "group_size": self.group_size,
            "statistics": self._statistics_json(),
            "totals": {
                "tensors": len(self.tensors),
                "split_tensors": len(self.split),
                "weights": self.weights,
                "split_weights": self.split_weights,
                "base_bytes": self.base.size,
                "ortho_bytes": self.ortho_bytes,
                **({"ortho_bytes_at_most": True} if self.is_compact else {}),
                "bits_per_weight": round(self.bits_per_weight, 4),
                "bytes_read": self.bytes_read,
                "bytes_written": self.bytes_written,
                "peak_bytes": self.peak_bytes,
                "workers": self.workers,
            },
            "files": [
                {
                    "name": artifact.BASE_FILE,
                    "size": self.base.size,
                    "header": len(self.base.header),
                },
                {
                    "name": artifact.ORTHO_FILE,
                    "size": self.ortho_bytes,
                    **({} if self.is_compact else {"header": len(self.stored.header)}),
                },
                *({"name": file.name, "size": file.size} for file in self.side.copied),
            ],
            "left_out": self.side.to_json(),
            "notes": [*self.notes, *self.side.notes],
            "tensors": [self._tensor_json(tensor) for tensor in self.tensors],
        }

    def _statistics_json(self) -> dict[str, object] | None:
        if not self.measures:
            return self.statistics.summary() if self.statistics else None
        settings = self.recipe.calibrate
        text = {
            "sequences": settings.samples,
            "tokens": settings.samples * settings.length,
            "seed": settings.seed,
        }
        return {"kind": "gram", "unit": "token", "storage": "full", "text_to_write": text}

    def _tensor_json(self, tensor: TensorPlan) -> dict[str, object]:
        source, split = tensor.source, tensor if isinstance(tensor, SplitTensor) else None
        return {
            "name": tensor.name,
            "action": "split" if split else "copy",
            "reason": None if isinstance(tensor, SplitTensor) else tensor.reason,
            "dtype": source.dtype,
            "shape": list(source.shape),
            "shard": source.shard,
            "offset": source.offset,
            "nbytes": source.nbytes,
            "bits": split and split.bits,
            "scale": split and split.scale,
            "density": split and split.density,
            "k": split.k if split else 0,
            "base": _regions(tensor.base, self.base),
            "ortho": {} if self.is_compact else _regions(tensor.stored, self.stored),
        }


def _regions(specs: Iterable[TensorSpec], layout: Layout) -> dict[str, dict[str, object]]:
    found = ((spec.key, layout.regions[spec.key]) for spec in specs)
    return {  # not asdict, which copies deeply: a third of what a large plan's JSON takes
        key: {"dtype": x.dtype, "shape": x.shape, "offset": x.offset, "nbytes": x.nbytes}
        for key, x in found
    }


# Longer than 60 lines: half of it says what each argument is, and what is refused.
def make_plan(
    checkpoint: Checkpoint,
    recipe: Recipe,
    *,
    statistics: Statistics | None = None,
    reference: Checkpoint | None = None,
    kept: Mapping[str, int] | None = None,
    shared: Mapping[str, Columns] | None = None,
    workers: int = 1,
    side: SideFiles | None = None,
    sizes: Sizes = DEFAULT_SIZES,
    measures: bool = False,
) -> Plan:
    """Decide everything that headers and the recipe decide.

    Args:
        checkpoint: the source's index.
        recipe: validated settings; the plan's recipe has a `saliency.kind`.
        statistics: curvature of the source, for a recipe that uses it.
        reference: the model before it saw what base must not know, for ortho.split reference.
        kept: nnz by tensor, where `budget` chose them.
        shared: columns by tensor, where `budget` chose those that siblings share.
        workers: threads that will work; changes only the peak memory.
        side: from `choose_side_files`; None copies the files on its list.
        sizes: of tiles; they, too, change only the peak memory.
        measures: statistics will be measured first, and the plan made again with them; this one is
            only shown.
    Raises:
        RecipeError: a target or override matches nothing; group_size or 3 bits do not fit; weights
            that vLLM fuses would differ; curvature lacks statistics, or statistics a use.
        CalibrationError: statistics lack a tensor that is split, or were measured in another shape.
        CheckpointError: the source is quantized, or has weights that should be split and cannot.
    """
    refusals.refuse_quantized(checkpoint)
    kind = recipe.saliency.kind or ("residual" if statistics is None else "curvature")
    recipe = recipe.model_copy(update={"saliency": Saliency(kind=kind)})
    reasons = select(checkpoint, recipe)
    weights = [tensor for tensor in checkpoint.tensors if reasons[tensor.name] is None]
    group_size = _group_size(weights, recipe)
    check_overrides(recipe, {tensor.name: tensor for tensor in weights})
    tensors = tuple(
        _plan_tensor(tensor, reasons[tensor.name], recipe, group_size, kept or {})
        for tensor in checkpoint.tensors
    )
    split = tuple(tensor for tensor in tensors if isinstance(tensor, SplitTensor))
    _check_inputs(recipe, checkpoint, split, statistics, reference, measures=measures)
    refusals.check_shared(recipe, {t.name: (t.shape[1], t.columns or 0) for t in split})
    sha256 = _sha256(tensors, recipe, group_size, statistics)
    base, ortho, stored = _layouts(checkpoint, tensors, recipe, sha256)
    theirs = reference.notes if reference else ()
    alone = _needs_stacks(checkpoint, recipe)
    return Plan(
        recipe=recipe,
        group_size=group_size,
        tensors=tensors,
        base=base,
        ortho=ortho,
        stored=stored,
        side=choose_side_files(checkpoint, statistics, reference) if side is None else side,
        sha256=sha256,
        peak_bytes=_peak_bytes(tensors, workers, statistics, recipe, sizes),
        workers=workers,
        statistics=statistics,
        sizes=sizes,
        reference=reference,
        kept=kept,
        shared=shared,
        measures=measures,
        notes=(*checkpoint.notes, *(f"of the reference: {note}" for note in theirs), *alone),
        needs_stacks=bool(alone),
    )


def _needs_stacks(checkpoint: Checkpoint, recipe: Recipe) -> tuple[str, ...]:
    """Note where transformers does not look for experts that are taken apart."""
    if recipe.on_unsupported != "split" or not needs_stacks(checkpoint.config):
        return ()
    if not any(restacked(tensor.name for tensor in checkpoint.tensors)):
        return ()
    return (
        "experts are split one by one, under the names that vLLM loads; transformers loads their "
        "stacks alone, and would leave them random: `ortho_cli.load` and `ortho convert` take them",
    )


def _check_inputs(
    recipe: Recipe,
    checkpoint: Checkpoint,
    split: tuple[SplitTensor, ...],
    statistics: Statistics | None,
    reference: Checkpoint | None,
    *,
    measures: bool,
) -> None:
    """Refuse a recipe without what it needs, and what it has no use for, or of another model."""
    uses = ["`saliency.kind`"] if recipe.saliency.kind == "curvature" else []
    uses += [f"the scale of `{tensor.name}`" for tensor in split if tensor.scale == "curvature"]
    if uses and statistics is None and not measures:
        raise RecipeError(
            f"{uses[0]} is curvature, and no statistics are given",
            hint="give --stats FILE, as `ortho calibrate` writes it",
        )
    if recipe.compensates:
        refusals.check_compensation(recipe, statistics)
    elif statistics is not None and not uses:
        raise RecipeError(
            f"`{statistics.path}` is given, and `saliency.kind` is residual and no scale curvature",
            hint="leave --stats out, or set saliency.kind or base.scale to curvature",
        )
    refusals.check_structure(recipe)
    refusals.check_settings(recipe)
    kind = recipe.ortho.split
    if recipe.forgets and (
        statistics is None or statistics.kind == "gram" or recipe.saliency.kind == "residual"
    ):
        raise RecipeError(
            f"ortho.split is {kind}, and there are no statistics of fisher that it may use",
            hint="ortho calibrate MODEL --data FILE, then --stats stats.safetensors",
        )
    if (kind == "reference") != (reference is not None):
        raise RecipeError(
            f"ortho.split is {kind}, and {'no' if reference is None else 'a'} reference is given",
            hint="--reference CHECKPOINT goes with --set ortho.split=reference",
        )
    if reference is not None:
        refusals.check_reference(checkpoint, reference)
    if statistics is not None:
        check_weights(statistics, [tensor.source for tensor in split])


OUR_FILES = (
    artifact.BASE_FILE,
    artifact.OLD_BASE_FILE,
    artifact.ORTHO_FILE,
    SEALED_FILE,
    IDENTITY_FILE,
    artifact.INDEX_FILE,
    artifact.CONFIG_FILE,
    artifact.REPORT_FILE,
    CARD_FILE,
)


def choose_side_files(
    checkpoint: Checkpoint,
    statistics: Statistics | None = None,
    reference: Checkpoint | None = None,
    *,
    copy: Sequence[str] = (),
    arguments: Iterable[Path] = (),
) -> SideFiles:
    """Choose what is copied beside base and ortho; see `side_files`.

    Args:
        checkpoint: the source's index.
        statistics: used for it; their file is never copied.
        reference: used for it; its files are never copied.
        copy: globs of files to copy beside those on the list.
        arguments: further files that were given to the command; never copied.
    Raises:
        UsageError: see `side_files.choose`.
    """
    if not checkpoint.path.is_dir():
        return choose_none(checkpoint.path, copy)
    given = [*arguments, *((statistics.path,) if statistics else ())]
    if reference is not None:
        given += [reference.path, *(shard.path for shard in reference.shards)]
    return choose(
        checkpoint.folder,
        skip={*(shard.name for shard in checkpoint.shards), artifact.CONFIG_FILE},
        ours=OUR_FILES,
        copy=copy,
        arguments=given,
    )


def _group_size(split: list[TensorInfo], recipe: Recipe) -> int:
    sizes = GROUP_SIZES if recipe.base.group_size == "auto" else (int(recipe.base.group_size),)
    for size in sizes:
        if all(tensor.shape[1] % size == 0 for tensor in split):
            return size
    unfit = [tensor for tensor in split if tensor.shape[1] % sizes[-1]]
    worst, others = unfit[0], len(unfit) - 1
    told = f"none of the group sizes {', '.join(map(str, sizes))} divides"
    if len(sizes) == 1:
        told = f"group_size {sizes[0]} does not divide"
    known = (256, *GROUP_SIZES, 16, 8)
    common = [size for size in known if all(tensor.shape[1] % size == 0 for tensor in split)]
    ways = []
    if common:
        also = f" (so do {', '.join(map(str, common[1:]))})" if common[1:] else ""
        ways.append(f"`--set base.group_size={common[0]}` fits every target{also}")
    if len(unfit) < len(split):
        ways.append(_ignore(unfit, split, recipe))
    raise RecipeError(
        f"{told} in_features {worst.shape[1]} of `{worst.name}`"
        + (f", nor what {others} more tensors have" if others else ""),
        hint="; or ".join(ways) or "no multiple of 8 divides any target: there is nothing to split",
    )


def _ignore(unfit: list[TensorInfo], split: list[TensorInfo], recipe: Recipe) -> str:
    """Word the setting that ignores the tensors that do not fit, and those already ignored."""
    names = {tensor.name for tensor in unfit}
    # Weights that are fused with one of them have its width, so they are in `unfit`, too.
    patterns = fold_names(names, {tensor.name for tensor in split} - names)
    value = json.dumps([*recipe.ignore, *patterns], ensure_ascii=False)
    word = shlex.quote(f"ignore={value}")
    return f"`--set {word}` carries {'these' if len(unfit) > 1 else 'it'} over unchanged"


def _plan_tensor(
    tensor: TensorInfo, reason: str | None, recipe: Recipe, group_size: int, kept: Mapping[str, int]
) -> TensorPlan:
    if reason is not None:
        return CopyTensor(source=tensor, reason=reason)
    settings, name, dtype = tensor_settings(recipe, tensor.name), tensor.name, tensor.dtype
    shape, bits = (tensor.shape[0], tensor.shape[1]), settings.bits
    values = "I8" if recipe.ortho.values == "int8" else dtype
    k, whole = kept.get(name, round(settings.density * tensor.numel)), None
    if recipe.keeps_columns:
        most = recipe.ortho.max_rank
        asked = columns_of(settings.density, shape[1], most)
        whole = kept[name] // shape[0] if name in kept else asked
        k = whole * shape[0]
        ortho = artifact.column_specs(name, dtype=dtype, shape=shape, columns=whole)
        stored = artifact.column_specs(name, dtype=dtype, shape=shape, columns=whole, values=values)
    else:
        ortho = stored = artifact.ortho_specs(name, dtype=dtype, shape=shape, nnz=k)
    return SplitTensor(
        source=tensor,
        bits=bits,
        scale=settings.scale,
        density=k / tensor.numel if name in kept or whole is not None else settings.density,
        k=k,
        columns=whole,
        base=artifact.base_specs(name, dtype=dtype, shape=shape, group_size=group_size, bits=bits),
        ortho=ortho,
        values=values,
        stored=stored,
    )


def _layouts(
    checkpoint: Checkpoint, tensors: tuple[TensorPlan, ...], recipe: Recipe, sha256: str
) -> tuple[Layout, Layout, Layout]:
    """Lay out base and ortho; digests that are not known yet are zeros of the same length."""
    if recipe.ortho.layout == "compact":
        _check_compact_header(tensors)
    canonical = canonical_json(recipe.canonical())
    common = {"plan_sha256": sha256, "recipe": canonical, "version": __version__}
    base = (spec for tensor in tensors for spec in tensor.base)
    told = artifact.ortho_metadata(**common, source_digest=NO_DIGEST, base_blake3=NO_DIGEST)
    ortho, stored = (
        plan_layout(_unique(checkpoint, specs), told)
        for specs in (
            (spec for tensor in tensors for spec in tensor.ortho),
            (spec for tensor in tensors for spec in tensor.stored),
        )
    )
    return (
        plan_layout(_unique(checkpoint, base), artifact.base_metadata(**common)),
        ortho,
        stored,
    )


def _unique(checkpoint: Checkpoint, specs: Iterable[TensorSpec]) -> Iterator[TensorSpec]:
    seen: set[str] = set()
    for spec in specs:
        if spec.key in seen:
            raise CheckpointError(
                f"`{checkpoint.path}` holds a tensor named `{spec.key}`, which splitting would "
                "write too",
                hint="is it quantized already? else add its weight to `ignore`",
            )
        seen.add(spec.key)
        yield spec


def _check_compact_header(tensors: tuple[TensorPlan, ...]) -> None:
    """Refuse a compact ortho whose header would pass the format's limit.

    Sizes of its parts depend on weights; their number, and so the header's length, does not.
    """
    specs = (
        spec
        for tensor in tensors
        if isinstance(tensor, SplitTensor)
        for spec in artifact.compact_specs(
            tensor.name,
            dtype=tensor.values,
            shape=tensor.shape,
            columns=0,
            counts=artifact.COUNT_DTYPES[0],
            gaps=tensor.k,
            others=tensor.k,
        )
    )
    plan_layout(specs, {})


def _sha256(
    tensors: tuple[TensorPlan, ...], recipe: Recipe, group_size: int, statistics: Statistics | None
) -> str:
    split = {t.name: (t.scale, t.density, t.k) for t in tensors if isinstance(t, SplitTensor)}
    content = {
        "format": artifact.FORMAT,
        "version": __version__,
        "recipe": recipe.canonical(),
        "group_size": group_size,
        "tensors": [
            [t.name, t.source.dtype, t.source.shape, *split.get(t.name, (None, None, 0))]
            for t in tensors
        ],
    }
    if statistics is not None:
        content["statistics"] = statistics.digest
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()


def _peak_bytes(
    tensors: tuple[TensorPlan, ...],
    workers: int,
    statistics: Statistics | None,
    recipe: Recipe,
    sizes: Sizes,
) -> int:
    """Bound peak memory: the largest buffers at one time, and a whole model where one is loaded."""
    needs = sorted(
        (_buffer_bytes(t, statistics, recipe.compensates, sizes) for t in tensors), reverse=True
    )
    entries = len(tensors) + (0 if statistics is None else len(statistics.digests))
    held = tuned = 0
    weights = sum(tensor.source.numel for tensor in tensors)
    if recipe.forgets:
        held = LOGITS_BYTES + FORGET_BYTES[recipe.ortho.split] * weights
    if recipe.base.rounding == "tuned":
        # A block with its latents, a backward pass through it in bfloat16 (1.5 times the
        # activations), hidden states, and the head with its logits.
        tokens = recipe.tune.batch * recipe.tune.length
        blocks: Counter[str] = Counter()
        features: Counter[str] = Counter()
        for tensor in (t for t in tensors if isinstance(t, SplitTensor)):
            layer = place_of(module_of(tensor.name)).layer
            blocks[layer] += tensor.source.numel
            features[layer] += sum(tensor.source.shape)
        tuned = TUNE_BYTES * max(blocks.values()) + 3 * tokens * max(features.values())
        tuned += TUNE_STATES + LOGITS_BYTES // 2
    work = sum(needs[:workers])
    if recipe.ortho.layout == "compact" or recipe.ortho.values == "int8":
        # It is encoded after the workers have ended.
        most = max(t.k for t in tensors if isinstance(t, SplitTensor))
        work = max(work, REPACK_BYTES * most + 24 * sizes.split)
    # Tuning begins when the workers have ended.
    return MODULES_BYTES + TENSOR_BYTES * entries + held + max(work, tuned)


def _buffer_bytes(
    tensor: TensorPlan, statistics: Statistics | None, compensates: bool, sizes: Sizes
) -> int:
    if isinstance(tensor, CopyTensor):
        return 2 * sizes.copy_bytes
    numel = tensor.source.numel
    elements = sizes.rows("split", tensor.source.shape) * tensor.source.shape[1]
    tile = elements * {"mse": 48, "curvature": 52}.get(tensor.scale, 24)
    more = 0
    if statistics is not None:
        # Curvature as read and in float32, its root, saliency, squares; row and column vectors.
        tile += elements * (12 if statistics.kind == "gram" else 24) + 16 * sum(tensor.source.shape)
        more = 4  # bytes per candidate: its residual beside its saliency
    # Each candidate has index, two saliencies and value; cutting back to k takes three copies of k.
    value = tensor.source.nbytes // numel
    candidates = elements if tensor.columns is not None else min(2 * tensor.k + elements, numel)
    candidates *= 8 + (4 if numel < 2**31 else 8) + value + more
    if tensor.columns is not None:
        candidates += 8 * (SUMMED_ROWS + 4) * tensor.source.shape[1]
    # Searched scales and positions are kept from one pass to the next.
    passes = (tensor.scale != "absmax") + compensates
    held = passes * (2 * tensor.base[1].nbytes + 8 * tensor.k)
    if compensates:
        columns = tensor.source.shape[1]
        # The Gram matrix or its factor, and what it is factorised in; copies of a larger tile.
        held += 12 * columns**2 + 88 * sizes.rows("gptq", tensor.source.shape) * columns
    return tile + candidates + held + ((20 if tensor.k < numel else 8) + 2 * more) * tensor.k


def check_statistics(plan: Plan, checkpoint: Checkpoint) -> None:
    """Refuse statistics of another model, by a weight that is read for it.

    Raises:
        CalibrationError: they are.
    """
    if plan.statistics is not None and plan.split:
        check_model(plan.statistics, checkpoint, [tensor.source for tensor in plan.split])


def check_memory(plan: Plan) -> None:
    """Refuse a plan whose buffers do not fit into memory, where the system says how much is free.

    Raises:
        ResourceError: says how much is needed and how much is available.
    """
    available = available_memory()
    if available is not None and plan.peak_bytes > available:
        raise ResourceError(
            f"{plan.workers} workers take {plan.peak_bytes / 1e6:,.0f} MB of memory and "
            f"{available / 1e6:,.0f} MB are available",
            hint="use fewer --workers, or a lower density",
        )
