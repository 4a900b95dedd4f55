"""The plan of a calibration: weights, text and the file's layout, before any pass of the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from blake3 import blake3
from torch import Tensor, nn

from ortho_cli.decompose.selection import conv1d_names, select
from ortho_cli.decompose.settings import Calibrate, Recipe
from ortho_cli.errors import CheckpointError, RecipeError
from ortho_cli.events import EventSink, Noted, null_sink
from ortho_cli.formats import statistics
from ortho_cli.model import load as models
from ortho_cli.model.hooks import AddSum, Capture, Part
from ortho_cli.model.text import TokenSequence, forget_sequences, read_rows, retain_sequences
from ortho_cli.split.dtypes import BY_CONFIG
from ortho_cli.storage.checkpoint import Checkpoint, TensorInfo
from ortho_cli.storage.data_file import Layout, TensorSpec, plan_layout

Set = Literal["retain", "forget"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSet:
    """The sequences of one set, and the BLAKE3 of its files, or of the tokens of made text.

    `written_by` and `seed`: of text that is made here: by the model itself, or of random tokens.
    Until the job has made it, there is no digest and every token is 0: sizes are known before, and
    tokens are not.
    """

    sequences: tuple[TokenSequence, ...]
    digest: str | None
    written_by: Literal["model", "random"] | None = None
    seed: int | None = None

    @property
    def is_unwritten(self) -> bool:
        """Whether the text is still to be made."""
        return self.digest is None

    def written(self, tokens: Tensor) -> DataSet:
        """Give the set with text that was made here, (sequences, length) int64."""
        return dataclasses.replace(
            self,
            sequences=tuple(TokenSequence(tokens=tuple(row)) for row in tokens.tolist()),
            digest=blake3(tokens.numpy().astype("<i8").tobytes()).hexdigest(),
        )

    @property
    def counted(self) -> int:
        """Number of tokens whose prediction counts."""
        return sum(sequence.labels for sequence in self.sequences)

    def to_json(self) -> dict[str, object]:
        """Give the sizes and the digest of the set."""
        return {
            "sequences": len(self.sequences),
            "tokens": sum(len(sequence.tokens) for sequence in self.sequences),
            "counted": self.counted,
            **({} if self.digest is None else {"blake3": self.digest}),
            **({"written_by": self.written_by, "seed": self.seed} if self.written_by else {}),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationPlan:
    """Everything that is decided before the model is loaded."""

    settings: Calibrate
    tensors: tuple[TensorInfo, ...]
    sets: dict[Set, DataSet]
    by_block: bool = False  # the model is read block by block, and never held whole
    memory: int | None = None  # bytes that may be taken then; None is what is available

    @property
    def measures_while_writing(self) -> bool:
        """Whether inputs are measured while the model writes: no token passes through it twice."""
        retain = self.sets["retain"]
        return retain.written_by == "model" and self.settings.curvature == "gram"

    @property
    def least_tokens(self) -> int:
        """Routed tokens below which an expert goes by others: none where it sees all tokens."""
        return 0 if self.settings.experts == "all" else self.settings.min_tokens

    def parts(self, name: Set) -> tuple[Part, ...]:
        """List the sums over a set; the forget set never gets a Gram matrix."""
        if name == "forget":
            return ("curvature", "gradient")
        return ("curvature", "gram") if self.settings.gram == "full" else ("curvature",)

    def summed_over(self, name: Set, part: Part) -> int:
        """Count what a sum over a set is divided by: tokens, or sequences."""
        data, of_tokens = self.sets[name], part == "gram" or self.settings.curvature == "gram"
        return data.counted if of_tokens else len(data.sequences)

    def capture(self, name: Set, linears: Mapping[str, nn.Module], add: AddSum) -> Capture:
        """Make the hooks that add to the sums of a set, by weight."""
        settings, is_forget = self.settings, name == "forget"
        return Capture(
            linears,
            add,
            kind="gram" if settings.curvature == "gram" else "fisher",
            unit=settings.unit,
            gradient=is_forget,
            gram="none" if is_forget else settings.gram,
            weighting="none" if is_forget else settings.weighting,
        )

    def sum_shape(self, tensor: TensorInfo, part: Part) -> tuple[int, int]:
        """Return the shape of the float32 sums of a weight."""
        rows, columns = tensor.shape
        if part == "gram":
            return columns, columns
        return (1 if self.settings.curvature == "gram" else rows), columns

    def specs(self, tensor: TensorInfo) -> tuple[TensorSpec, ...]:
        """List the tensors that the file holds of a weight."""
        return statistics.specs(
            tensor.name,
            (tensor.shape[0], tensor.shape[1]),
            kind=self.settings.curvature,
            storage=self.settings.storage,
            dtype=BY_CONFIG[self.settings.dtype],
            forget="forget" in self.sets,
            gram=self.settings.gram == "full",
        )

    def sums(self, name: Set) -> Layout:
        """Lay out the float32 sums of a set."""
        shapes = {
            f"{tensor.name}/{part}": self.sum_shape(tensor, part)
            for tensor in self.tensors
            for part in self.parts(name)
        }
        specs = (TensorSpec(key=key, dtype="F32", shape=shape) for key, shape in shapes.items())
        return plan_layout(specs, {})

    @property
    def bytes_written(self) -> int:
        """Bytes of the statistics, without the header."""
        return sum(spec.nbytes for tensor in self.tensors for spec in self.specs(tensor))

    @property
    def bytes_scratch(self) -> int:
        """Bytes of the sums while they are made; block by block they are in memory."""
        return 0 if self.by_block else sum(2 * self.sums(name).size for name in self.sets)

    @property
    def bytes_on_disk(self) -> int:
        """Bytes of the statistics and of the sums beside them."""
        return self.bytes_written + self.bytes_scratch

    def to_json(self) -> dict[str, object]:
        """Give the document of `ortho calibrate --dry-run --json`."""
        return {
            "calibrate": self.settings.canonical(),
            **({"by_block": True} if self.by_block else {}),
            "data": {name: data.to_json() for name, data in self.sets.items()},
            "totals": {
                "tensors": len(self.tensors),
                "weights": sum(tensor.numel for tensor in self.tensors),
                "bytes_written": self.bytes_written,
                "bytes_scratch": self.bytes_scratch,
            },
            "tensors": [{"name": one.name, "shape": list(one.shape)} for one in self.tensors],
        }


def read_sets(
    folder: Path,
    data: Sequence[Path],
    forget: Sequence[Path],
    settings: Calibrate,
    on_event: EventSink = null_sink,
    *,
    by_block: bool = False,
) -> dict[Set, DataSet]:
    """Read both sets and turn them into sequences with the model's own tokenizer.

    Args:
        folder: the model's.
        data: files of the retain set; without one the model is to write it, or where it has no
            tokenizer tokens are random.
        forget: files of the forget set.
        settings: the recipe's `calibrate`.
        on_event: gets notes of rows that are left out, and of text that is to be written.
        by_block: the model is never whole in memory, so it writes nothing: tokens are random.
    Raises:
        CheckpointError: data are given, and the folder has no tokenizer.
        CalibrationError: the data are unreadable or too short.
    """
    rows, digest = read_rows(data, on_event)
    private, private_digest = read_rows(forget, on_event)
    sets: dict[Set, DataSet] = {}
    if not data:
        sets["retain"] = _to_make(folder, settings, on_event, by_block=by_block)
    tokenizer = models.load_tokenizer(folder) if data or forget else None
    if data and tokenizer:
        retain = retain_sequences(
            rows,
            tokenizer,
            samples=settings.samples,
            length=settings.length,
            seed=settings.seed,
            on_event=on_event,
        )
        sets["retain"] = DataSet(sequences=tuple(retain), digest=digest)
    if forget and tokenizer:
        found = forget_sequences(private, tokenizer, length=settings.length)
        sets["forget"] = DataSet(sequences=tuple(found), digest=private_digest)
    return sets


def _to_make(folder: Path, settings: Calibrate, on_event: EventSink, *, by_block: bool) -> DataSet:
    """Plan text that is made here, since there are no files of it."""
    what = f"{settings.samples} sequences of {settings.length}"
    without = "the model does not fit into memory" if by_block else _without_tokenizer(folder)
    written_by: Literal["model", "random"] = "model" if without is None else "random"
    told = f"the model itself writes {what} tokens"
    if without is not None:
        told = f"{without}, so it reads {what} random tokens"
    on_event(Noted(message=f"no --data: {told}, seed {settings.seed}"))
    blank = TokenSequence(tokens=(0,) * settings.length)
    return DataSet(
        sequences=(blank,) * settings.samples,
        digest=None,
        written_by=written_by,
        seed=settings.seed,
    )


def _without_tokenizer(folder: Path) -> str | None:
    """Say why a model cannot write; None where it can."""
    try:
        models.load_tokenizer(folder)
    except CheckpointError as error:
        models.check_folder(folder)  # the folder of a model without a tokenizer
        return error.message.partition(": ")[0]  # transformers' own words tell a user nothing
    return None


def make_plan(
    checkpoint: Checkpoint,
    recipe: Recipe,
    sets: dict[Set, DataSet],
    *,
    by_block: bool = False,
    memory: int | None = None,
) -> CalibrationPlan:
    """Choose the weights to measure: those that `decompose` splits under the same recipe.

    Conv1D is measured, too, as (out, in), although `decompose` refuses it.

    Raises:
        RecipeError: settings that contradict a forget set or each other.
        CheckpointError: weights that should be split cannot be.
    """
    settings = recipe.calibrate
    if "forget" in sets and (settings.curvature == "gram" or settings.storage == "factored"):
        what = "curvature: gram" if settings.curvature == "gram" else "storage: factored"
        raise RecipeError(
            f"a forget set needs the gradient of each weight, and calibrate says {what}",
            hint="--set calibrate.curvature=fisher --set calibrate.storage=full",
        )
    _check_weighting(settings)
    if settings.experts == "all" and settings.curvature != "gram":
        raise RecipeError(
            f"calibrate.experts is all, and calibrate.curvature is {settings.curvature}: no "
            "gradient reaches an expert from a token that is routed elsewhere",
            hint="--set calibrate.curvature=gram, or leave calibrate.experts out",
        )
    reasons = select(checkpoint, recipe, conv1d=True)
    turned = conv1d_names(checkpoint)
    split = tuple(
        dataclasses.replace(tensor, shape=tensor.shape[::-1]) if tensor.name in turned else tensor
        for tensor in checkpoint.tensors
        if reasons[tensor.name] is None
    )
    return CalibrationPlan(
        settings=settings, tensors=split, sets=sets, by_block=by_block, memory=memory
    )


def _check_weighting(settings: Calibrate) -> None:
    if settings.gram == "none":
        other = "gram is none: there is no matrix whose positions it could weigh"
        way = "add --gram full"
    elif settings.curvature == "gram":
        other = "curvature is gram, which has no backward pass"
        way = "--set calibrate.curvature=fisher"
    else:
        return
    if settings.weighting != "none":
        raise RecipeError(
            f"calibrate.weighting is {settings.weighting}, and calibrate.{other}",
            hint=f"{way}, or leave calibrate.weighting out",
        )
