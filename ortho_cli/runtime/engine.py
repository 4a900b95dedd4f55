"""Engine and alpha: choose the Linears of any torch module, split them, set alpha, save, load."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ortho_cli.decompose.roles import is_embedding
from ortho_cli.decompose.selection import IGNORED, not_by_default
from ortho_cli.decompose.settings import GROUP_SIZES, Recipe, matches
from ortho_cli.errors import ArtifactError, CalibrationError, RecipeError, UsageError
from ortho_cli.events import EventSink, Noted, null_sink
from ortho_cli.formats.open_artifact import open_artifact
from ortho_cli.formats.provenance import recipe_of
from ortho_cli.model.hooks import Batch, Capture, Loss, frozen, measure_batch, symmetrize
from ortho_cli.model.linears import is_conv1d
from ortho_cli.runtime import module_files, product
from ortho_cli.runtime.module_files import key_of
from ortho_cli.runtime.operands import Alpha
from ortho_cli.runtime.ortho_linear import OrthoLinear, layers_of
from ortho_cli.split.sizes import DEFAULT_SIZES, Sizes
from ortho_cli.storage.sealing import read_keys

TWICE = "a base that is quantized again is another base; build the model anew"


def set_alpha(model: nn.Module, alpha: Alpha) -> None:
    """Set alpha of every OrthoLinear; all of them or, where one refuses, none.

    Args:
        model: any module that holds OrthoLinear.
        alpha: in [0, 1]: 0 is base alone, 1 all of ortho; or a tensor with one for each batch row.
    Raises:
        UsageError: alpha is no such number, or the model holds no OrthoLinear.
        ArtifactError: alpha is not 0 and a layer has no ortho stream.
    """
    layers = layers_of(model)
    alpha = product.check_alpha(alpha)
    zero = product.is_zero(alpha)
    for name, layer in layers.items():
        if not zero and layer.nnz is None:
            raise ArtifactError(
                f"alpha is not 0 and `{name}` has no ortho stream", hint=product.NO_ORTHO
            )
    for layer in layers.values():
        layer.alpha = alpha


@contextmanager
def at_alpha(model: nn.Module, alpha: Alpha) -> Iterator[None]:
    """Set alpha for a `with` block, then give every layer back what it had."""
    before = {name: layer.alpha for name, layer in layers_of(model).items()}
    set_alpha(model, alpha)
    try:
        yield
    finally:
        for name, layer in layers_of(model).items():
            layer.alpha = before.get(name)


def densify(model: nn.Module) -> dict[str, OrthoLinear]:
    """Put a plain Linear that holds W(alpha), in float32, in place of every OrthoLinear.

    It can be trained and edited like any other; the rest of the model keeps its dtype, so call
    `model.float()` where all of it should compute alike.

    Args:
        model: any module that holds OrthoLinear, all set to one alpha.
    Returns:
        The layers that were replaced, by name, still at their alpha: `write_dense` reads them.
    Raises:
        UsageError: alpha is not set, or is one for each batch row; nothing is replaced then.
    """
    layers = layers_of(model)
    made: dict[str, nn.Module] = {}
    for name, layer in layers.items():
        device = layer.weight_packed.device
        linear = nn.Linear(
            layer.in_features, layer.out_features, bias=False, device=device, dtype=torch.float32
        )
        with torch.no_grad():
            linear.weight.copy_(layer.dense(torch.float32))
        if layer.bias is not None:
            # A copy even of float32: what is trained must not change the layer that was replaced.
            linear.bias = nn.Parameter(layer.bias.detach().to(torch.float32, copy=True))
        made[name] = linear.train(layer.training)
    _swap(model, made)
    return layers


def write_dense(model: nn.Module, layers: Mapping[str, OrthoLinear], alpha: float) -> None:
    """Write W(alpha) of each layer that `densify` replaced into the Linear in its place."""
    for name, layer in layers.items():
        layer.alpha = alpha
        weight = model.get_submodule(name).get_parameter("weight")
        with torch.no_grad():
            weight.copy_(layer.dense(torch.float32))


def _check_weighting(weighting: str, *, kind: str, gram: str) -> None:
    if weighting != "none" and (kind == "gram" or gram == "none"):
        raise UsageError(
            f"weighting is {weighting!r} with kind {kind!r} and gram {gram!r}",
            hint="it weighs positions of gram='full' by gradients of kind='fisher'",
        )


def _check_curvature(names: Iterable[str], curvature: Mapping[str, Tensor] | None) -> None:
    for name in names:
        if curvature is not None and name not in curvature:
            raise CalibrationError(
                f"there is no curvature for `{name}`",
                hint="calibrate with data that reaches it, or leave it out with `ignore`",
            )


def _check_reached(samples: int, names: Iterable[str], sums: Mapping[str, Tensor]) -> None:
    if not samples:
        raise CalibrationError("the loader gave no batch", hint="give data to measure")
    for name in names:
        if name not in sums or not bool(sums[name].any()):
            raise CalibrationError(
                f"no sample reached `{name}`: its curvature is zero everywhere",
                hint="give more data, or leave it out with `ignore`",
            )


def _swap(model: nn.Module, made: Mapping[str, nn.Module]) -> None:
    """Replace every reference to the old modules: one module may have several parents."""
    by_id = {id(model.get_submodule(name)): new for name, new in made.items()}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if id(child) in by_id:
                parent._modules[name] = by_id[id(child)]


class Engine:
    """A module whose Linears become OrthoLinear in place.

        engine = Engine(model)
        engine.convert()
        engine.calibrate(loader)
        engine.decompose(density=0.005)
        engine.set_alpha(1.0)

    `curvature` maps the names of weights (`<module>.weight`) to what `calibrate` measured;
    `decompose` uses it unless it is empty. `gram` maps them to the full input Gram matrix, where
    that was measured.
    """

    def __init__(self, module: nn.Module, *, sizes: Sizes = DEFAULT_SIZES) -> None:
        """Take a module; nothing is changed yet.

        Args:
            module: holds the Linears.
            sizes: of the tiles that weights are split in; the result does not depend on them.
        """
        self.module, self._sizes = module, sizes
        self.curvature: dict[str, Tensor] = {}
        self.gram: dict[str, Tensor] = {}
        self._chosen: tuple[str, ...] = ()
        self._recipe: dict[str, object] = {}
        self._digest = ""
        self._arguments: tuple[Path, ...] = ()  # files that were given; never copied by `save`

    def convert(
        self, targets: Sequence[str] | None = None, ignore: Sequence[str] = ()
    ) -> dict[str, str | None]:
        """Choose the Linears to split; the module is not changed yet.

        Args:
            targets: exact names, globs or `re:` patterns over `<module>.weight`; None for every
                Linear with in_features >= 64 that is no head, embedding, norm or router by name.
            ignore: patterns never to split.
        Returns:
            Every Linear's name: None if chosen, else the reason why not.
        Raises:
            UsageError: nothing is chosen, or a target matches no Linear.
        A weight that another module holds too is never chosen: splitting it would untie the two.
        """
        self._refuse_split()
        reasons: dict[str, str | None] = {}
        owners = _owners(self.module)
        hit: set[str] = set()
        for name, child in self.module.named_modules():
            if not (isinstance(child, nn.Linear) or is_conv1d(child)):
                continue
            wanted = [p for p in targets or () if matches(p, f"{name}.weight")]
            hit.update(wanted)
            if any(matches(pattern, f"{name}.weight") for pattern in ignore):
                reasons[name] = IGNORED
                continue
            reason = _obstacle(name, child, owners)
            if reason is None and targets is None:
                reason = "embedding" if is_embedding(name) else not_by_default(name, _shape(child))
            elif reason is None and not wanted:
                reason = "no target matches"
            reasons[name] = reason
        for pattern in targets or ():
            if pattern not in hit:
                raise UsageError(
                    f"target `{pattern}` matches no Linear",
                    hint=f"they are named like `{next(iter(reasons), 'none here')}.weight`",
                )
        self._chosen = tuple(name for name, reason in reasons.items() if reason is None)
        if not self._chosen:
            listed = sorted({str(reason) for reason in reasons.values()})
            kind = type(self.module).__name__
            raise UsageError(
                f"nothing to split in {kind}: {', '.join(listed) or 'no Linear'}",
                hint="name Linears with `targets`",
            )
        return reasons

    def calibrate(
        self,
        loader: Iterable[Batch],
        *,
        kind: Literal["fisher", "gram"] = "fisher",
        unit: Literal["sequence", "token"] = "sequence",
        loss: Loss | None = None,
        gram: Literal["none", "full"] = "none",
        weighting: Literal["none", "gradient"] = "none",
    ) -> None:
        """Measure curvature of every chosen Linear over batches; in memory, float32.

        Args:
            loader: yields inputs, or (inputs, labels); inputs are a tensor, or a mapping of keyword
                arguments. The first dimension counts samples.
            kind: fisher squares each sample's gradient; gram is the mean squared input and needs
                neither labels nor a backward pass.
            unit: what fisher squares: a sample's gradient, or a position's.
            loss: of output and labels, summed over samples; None for the cross-entropy of logits
                and integer labels.
            gram: full measures the full input Gram matrix, too: (in, in) of every chosen Linear.
            weighting: of positions in it; gradient is the mean square of the output's, of fisher.
        Raises:
            CalibrationError: the loader is empty, or a chosen Linear took no part.
            NumericalError: a gradient is NaN or infinite.
            UsageError: fisher without labels, weighting with nothing to weigh or no gradient, or
                the module was decomposed before.
        `curvature` and `gram` get the result by `<module>.weight`, mean over samples: all positions
        of a sample are summed. Training mode and `requires_grad` are put back afterwards.
        """
        self._refuse_split()
        _check_weighting(weighting, kind=kind, gram=gram)
        if not self._chosen:
            self.convert()
        modules = {f"{name}.weight": self.module.get_submodule(name) for name in self._chosen}
        sums: dict[str, Tensor] = {}
        matrices: dict[str, Tensor] = {}

        def add(name: str, part: str, row: int, tile: Tensor) -> None:
            columns = tile.shape[1]
            totals, rows = (matrices, columns) if part == "gram" else (sums, 1)
            if name not in totals:
                if part != "gram" and kind != "gram":
                    rows = _shape(modules[name])[0]
                totals[name] = torch.zeros(rows, columns)
            totals[name][row : row + tile.shape[0]] += tile.cpu()

        samples = 0
        hooks = Capture(modules, add, kind=kind, unit=unit, gram=gram, weighting=weighting)
        with frozen(self.module), hooks as capture:
            for batch in loader:
                samples += measure_batch(self.module, batch, capture, loss)
        _check_reached(samples, modules, sums)
        self.curvature = {
            name: (total[0] if kind == "gram" else total) / samples for name, total in sums.items()
        }
        for matrix in matrices.values():
            symmetrize(matrix.div_(samples))
        self.gram = matrices

    # Longer than 60 lines: half of it says what each argument is.
    def decompose(
        self,
        *,
        density: float = 0.005,
        group_size: int | str = "auto",
        scale: str = "absmax",
        bits: int = 4,
        alone: bool = False,
        structure: str = "points",
        max_rank: int | None = None,
        curvature: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Replace every chosen Linear by an OrthoLinear; all of them or none.

        Args:
            density: share of each weight's entries that ortho has.
            group_size: weights that share a scale, or `auto`: the largest of 128, 64, 32 that
                divides every chosen in_features.
            scale: absmax, mse, or curvature.
            bits: of a code of base, 4, or 3 where 32 divides every chosen in_features.
            alone: searched scales serve ortho's positions, too, for a base that is used by itself.
            structure: points, or columns: ortho is whole input columns, and at alpha 1 a LoRA.
            max_rank: the most columns of a weight.
            curvature: by `<module>.weight`, (out, in) or (in,); None for `self.curvature`, and if
                that is empty, the residual alone decides.
        Raises:
            UsageError: the module was decomposed before.
            CalibrationError: a chosen Linear has no curvature.
            RecipeError: a setting does not fit; names the tensor.
            NumericalError: a weight is NaN or infinite; names the tensor.
        """
        self._refuse_split()
        if not self._chosen:
            self.convert()
        given = curvature if curvature is not None else self.curvature or None
        weights = {name: f"{name}.weight" for name in self._chosen}
        _check_curvature(weights.values(), given)
        size = self._group_size(group_size)
        digest = module_files.source_digest(self.module)
        made = {
            name: OrthoLinear.from_linear(
                self.module.get_submodule(name),
                group_size=size,
                density=density,
                scale=scale,
                bits=bits,
                alone=alone,
                structure=structure,
                max_rank=max_rank,
                curvature=None if given is None else given[weight],
                name=weight,
                sizes=self._sizes,
            )
            for name, weight in weights.items()
        }
        recipe = {
            "version": 1,
            "targets": list(weights.values()),
            "base": {"bits": bits, "group_size": size, "scale": scale, "alone": alone},
            "ortho": {
                "density": float(density),
                "structure": structure,
                "max_rank": max_rank,
            },
            "saliency": {"kind": "residual" if given is None else "curvature"},
        }
        self._recipe, self._digest = Recipe.model_validate(recipe).canonical(), digest
        _swap(self.module, made)

    def set_alpha(self, alpha: Alpha) -> None:
        """Set alpha of every layer; as `ortho_cli.set_alpha`."""
        set_alpha(self.module, alpha)

    def save(
        self,
        folder: str | Path,
        *,
        force: bool = False,
        source: str | Path | None = None,
        copy: Sequence[str] = (),
        on_event: EventSink = null_sink,
    ) -> None:
        """Write the module as an artifact; the folder appears whole or not at all.

        Args:
            folder: where to.
            force: replace an artifact that is there.
            source: the folder that the module was loaded from: its tokenizer and other files of a
                model folder are copied along, as `ortho decompose` does. None copies nothing.
            copy: globs of other files in it to copy.
            on_event: receives a note on each file that is left out.
        Raises:
            OutputExistsError: something is there, and it is no artifact or `force` is not given.
            UsageError: the module is not decomposed; `source` is no folder, or `copy` without it;
                a glob matches nothing, or a file that is never copied.
        """
        layers_of(self.module)
        if not self._digest:
            raise UsageError(
                "this engine neither decomposed nor loaded the module",
                hint="save with the engine that did",
            )
        if copy and source is None:
            raise UsageError(
                f"copy is {list(copy)}, and no source says from where",
                hint="give `source`, the model's folder",
            )
        side = None
        if source is not None:
            side = module_files.choose_side_files(Path(source), copy, self._arguments)
        out, recipe, digest = Path(folder), self._recipe, self._digest
        module_files.save_module(
            self.module, out, recipe=recipe, digest=digest, force=force, side=side
        )
        for note in side.notes if side else ():
            on_event(Noted(message=note))

    def load(self, folder: str | Path, *, alpha: Alpha, identity: str | Path | None = None) -> None:
        """Read an artifact onto the module, freshly built as it was before it was decomposed.

        Raises:
            ArtifactError: the artifact is damaged; a tensor is missing, unexpected or of another
                shape or dtype, and is named; alpha is not 0 and there is no ortho.
            UsageError: alpha is no number in [0, 1]; the module is decomposed already.
        """
        self._refuse_split()
        product.check_alpha(alpha)
        keys = read_keys(None if identity is None else Path(identity))
        self._arguments = () if identity is None else (Path(identity),)
        opened = open_artifact(Path(folder), keys)
        layers = module_files.load_module(self.module, opened)
        made = opened.ortho or opened.base
        recipe = recipe_of(made)
        for name, layer in layers.items():
            old = self.module.get_submodule(name)
            # torch takes a Parameter or None, and raises for anything else.
            setattr(layer, "bias", old.bias)  # noqa: B010 - typed as a Tensor or a module
            layer.train(old.training)
        if isinstance(ortho := recipe.get("ortho"), dict):
            ortho.pop("layout", None)  # layers hold CSR, and `save` writes it
        self._recipe = recipe
        # Base alone has no digest of its source.
        self._digest = made.metadata.get("source_digest", "0" * 64)
        _swap(self.module, layers)
        set_alpha(self.module, alpha)

    def _refuse_split(self) -> None:
        if any(isinstance(child, OrthoLinear) for child in self.module.modules()):
            raise UsageError("the module is decomposed already", hint=TWICE)

    def _group_size(self, asked: int | str) -> int:
        widths = {name: _shape(self.module.get_submodule(name))[1] for name in self._chosen}
        if isinstance(asked, int):
            return asked
        if asked != "auto":
            raise RecipeError(f"group_size is {asked!r}", hint="`auto` or a multiple of 8")
        for size in GROUP_SIZES:
            if all(width % size == 0 for width in widths.values()):
                return size
        worst = next(name for name, width in widths.items() if width % GROUP_SIZES[-1])
        raise RecipeError(
            f"none of the group sizes {', '.join(map(str, GROUP_SIZES))} divides in_features "
            f"{widths[worst]} of `{worst}.weight`",
            hint="give a group_size, or leave it out with `ignore`",
        )


def _shape(module: nn.Module) -> tuple[int, int]:
    """Shape of a Linear's weight as (out, in)."""
    rows, columns = getattr(module.weight, "shape")  # noqa: B009 - typed as a Tensor or a module
    return (columns, rows) if is_conv1d(module) else (rows, columns)


def _owners(module: nn.Module) -> Counter[tuple[object, ...]]:
    """Count the modules that hold each parameter; a transposed view is the same weights."""
    counts: Counter[tuple[object, ...]] = Counter()
    for child in module.modules():
        counts.update({key_of(p)[:2] for p in child._parameters.values() if p is not None})
    return counts


def _obstacle(name: str, child: nn.Module, owners: Mapping[tuple[object, ...], int]) -> str | None:
    """Give the reason why a Linear can never be split; None where it can."""
    weight = child._parameters.get("weight")
    if not name:
        return "the module itself"
    if weight is None:
        return "its weight is no parameter of its own"
    if isinstance(child, nn.Linear) and type(child).forward is not nn.Linear.forward:
        return f"{type(child).__name__} has a forward of its own"
    if child._forward_hooks or child._forward_pre_hooks:
        return "it has forward hooks"
    if weight.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"dtype {weight.dtype}"
    if owners[key_of(weight)[:2]] > 1:
        return "tied"
    return None
