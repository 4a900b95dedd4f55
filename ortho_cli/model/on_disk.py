"""A model whose weights stay on disk: built without them, and filled part by part.

transformers builds the model from config.json alone, with every parameter on torch's meta device.
`Weights` then knows the byte range of each parameter in the checkpoint: `fill` reads some of them,
in the dtype that the model computes in, and `release` gives their memory back.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ortho_cli.errors import CheckpointError
from ortho_cli.model import load as models
from ortho_cli.model.experts import Experts, separate
from ortho_cli.model.renames import rename_modules
from ortho_cli.split.dtypes import FLOATS, torch_dtypes
from ortho_cli.split.quantize import as_bytes
from ortho_cli.storage.checkpoint import Checkpoint, ShardReader, TensorInfo
from ortho_cli.storage.untrusted import is_trusted

PIECE = 1 << 22  # elements that are read and cast at once: 16 MiB in float32
IN_MEMORY = "`--max-memory 99TB` holds the model whole, in as much memory as it takes"


def build(
    checkpoint: Checkpoint, *, dtype: torch.dtype | None, way_out: str = IN_MEMORY
) -> nn.Module:
    """Build a causal language model without weights: parameters on meta, buffers as they are.

    Args:
        checkpoint: a transformers folder.
        dtype: of parameters; None is that of config.json, or of the first tensor.
        way_out: what to do about a model that cannot be built so.
    Raises:
        CheckpointError: transformers cannot build it, or keeps some of it in float32 in a way that
            is not known.
    """
    folder = checkpoint.folder
    models.check_folder(folder)
    models.check_claims(folder)
    what = f"transformers cannot build `{folder}` without its weights"
    with models.quiet_transformers() as transformers, models.explained(folder, what, hint=way_out):
        own = is_trusted()
        config = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=own
        )
        kind = dtype or getattr(config, "dtype", None) or _first_dtype(checkpoint)
        with _weightless():
            model: nn.Module = transformers.AutoModelForCausalLM.from_config(
                config, dtype=kind, trust_remote_code=own
            )
    if kind != torch.float32:
        _keep_float32(model, kind, way_out)
    separate(model, _renamed(model, checkpoint).values())
    return model.train(False).requires_grad_(False)


def _keep_float32(model: Any, kind: torch.dtype, way_out: str) -> None:
    """Put those parameters and buffers into float32 that transformers keeps there.

    It does so for whatever dtype is asked for: biases of routers, whose choice would change.
    """
    try:
        from transformers.core_model_loading import build_glob_alternation

        kept = list(model._get_dtype_plan(kind))
    except (AttributeError, ImportError):  # another transformers
        keys = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
        if any(getattr(model, key, None) for key in keys):
            raise CheckpointError(
                f"{type(model).__name__} keeps some modules in float32 beside {kind}, which is not "
                "known block by block with this transformers",
                hint=way_out,
            ) from None
        return
    if not kept:
        return
    is_kept = build_glob_alternation(kept)[0].search
    for path, module in model.named_modules():
        for leaf, one in module.named_parameters(recurse=False):
            if is_kept(f"{path}.{leaf}"):
                setattr(module, leaf, nn.Parameter(one.float(), requires_grad=False))
        for leaf, one in module.named_buffers(recurse=False):
            if is_kept(f"{path}.{leaf}"):
                setattr(module, leaf, one.float())


def _first_dtype(checkpoint: Checkpoint) -> torch.dtype:
    names = (tensor.dtype for tensor in checkpoint.tensors if tensor.dtype in FLOATS)
    return torch_dtypes()[next(names, "F32")]


@contextmanager
def _weightless() -> Iterator[None]:
    """Put each parameter on the meta device as its module gets it.

    `torch.device("meta")` would also take what no checkpoint holds: buffers of rotary embeddings.
    Memory of a parameter is never touched before, so it is not even mapped.
    """

    def blank(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if parameter.is_meta:
            return None
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=False)

    # torch's annotation says None, and its code takes what the hook returns.
    hook = register_module_parameter_registration_hook(blank)  # type: ignore[arg-type]
    try:
        yield
    finally:
        hook.remove()


class Weights:
    """Parameters of a model on meta, and where each of them is in a checkpoint."""

    def __init__(
        self,
        model: nn.Module,
        checkpoint: Checkpoint,
        device: torch.device,
        *,
        way_out: str = IN_MEMORY,
    ) -> None:
        """Find each parameter's tensor, and read the buffers that a checkpoint holds.

        Raises:
            CheckpointError: a tensor that the model needs is not there, is of another shape, or is
                one that transformers makes of others.
        """
        self._device, self._folder, self._way_out = device, checkpoint.folder, way_out
        self._reader = ShardReader(checkpoint.shards)
        self._blank: dict[int, nn.Parameter] = {}
        self._owners: dict[int, list[tuple[nn.Module, str]]] = {}
        self._spare: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}
        for module in model.modules():
            for leaf, parameter in module.named_parameters(recurse=False):
                self._blank[id(parameter)] = parameter
                self._owners.setdefault(id(parameter), []).append((module, leaf))
            for leaf, buffer in module.named_buffers(recurse=False):
                setattr(module, leaf, buffer.to(device))
        self._sources = self._find(model, checkpoint)

    def _find(self, model: nn.Module, checkpoint: Checkpoint) -> dict[int, TensorInfo]:
        state: Mapping[str, Tensor] = model.state_dict(keep_vars=True)
        prefix = str(getattr(model, "base_model_prefix", ""))
        renamed = _renamed(model, checkpoint)
        sources: dict[int, TensorInfo] = {}
        for tensor in checkpoint.tensors:
            name = renamed[tensor.name]
            candidates = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
            found = next((state[one] for one in candidates if one in state), None)
            if found is None:
                continue  # of a part that the model does not build, as for transformers
            if tuple(found.shape) != tensor.shape:
                raise CheckpointError(
                    f"tensor `{tensor.name}` is {list(tensor.shape)} and the model that "
                    f"transformers builds has {list(found.shape)} there",
                    hint="restore the config.json that came with the model",
                )
            if isinstance(found, nn.Parameter):
                self._check_tied(sources.get(id(found)), tensor)
                sources[id(found)] = tensor
            else:
                self._read(found, tensor)
        self._check(model, state, sources, renamed)
        return sources

    def _check_tied(self, one: TensorInfo | None, other: TensorInfo) -> None:
        """Refuse two tensors of one parameter that differ: transformers would not tie them."""
        if one is not None and self._reader.digest(one) != self._reader.digest(other):
            raise CheckpointError(
                f"config.json ties `{one.name}` and `{other.name}`, whose values differ",
                hint="set `tie_word_embeddings` to false there: so transformers reads them",
            )

    def _check(
        self,
        model: nn.Module,
        state: Mapping[str, Tensor],
        sources: Mapping[int, TensorInfo],
        renamed: Mapping[str, str],
    ) -> None:
        """Refuse what would be made up, or is not what the file holds."""
        kind = type(model).__name__
        lacking = [
            name
            for name, one in state.items()
            if isinstance(one, nn.Parameter) and id(one) not in sources
        ]
        if lacking:
            raise CheckpointError(
                f"`{lacking[0]}` of {kind} is no tensor of `{self._folder}`: it is missing, or "
                "transformers makes it of others, which is not known block by block",
                hint=f"restore the checkpoint; or {self._way_out}",
            )
        experts = (one for one in model.modules() if isinstance(one, Experts))
        apart = {id(p) for one in experts for p in one.parameters()}
        whole = [renamed[one.name] for number, one in sources.items() if number not in apart]
        for name in _converted(model, whole):
            raise CheckpointError(
                f"transformers changes `{name}` when it loads {kind}, which is not known block by "
                "block",
                hint=self._way_out,
            )

    def nbytes(self, parameters: Iterable[int]) -> int:
        """Count the bytes that parameters take once they are filled."""
        blank = (self._blank[one] for one in set(parameters))
        return sum(one.numel() * one.element_size() for one in blank)

    def is_shared(self, parameter: int) -> bool:
        """Whether several modules hold a parameter, as with a head that is tied."""
        return len(self._owners[parameter]) > 1

    def is_blank(self, parameter: int) -> bool:
        """Whether a parameter is on meta."""
        module, leaf = self._owners[parameter][0]
        return module.get_parameter(leaf).is_meta

    def fill(self, parameters: Iterable[int]) -> None:
        """Read parameters, given as `id` of what is on meta.

        Raises:
            CheckpointError: a shard has changed or ends too early.
        """
        for one in parameters:
            blank = self._blank[one]
            spare = self._spare.get((blank.shape, blank.dtype))
            value = (
                spare.pop()
                if spare
                else torch.empty(blank.shape, dtype=blank.dtype, device=self._device)
            )
            self._read(value, self._sources[one])
            self._set(one, nn.Parameter(value, requires_grad=False))

    def fill_rows(self, parameter: int, rows: Tensor) -> None:
        """Read some rows of a matrix; the others are zeros, which take no memory on a CPU.

        Args:
            parameter: `id` of what is on meta, (n, columns).
            rows: int64, ascending, each once.
        """
        blank, source = self._blank[parameter], self._sources[parameter]
        # numpy leaves zeros to the system, which maps memory where it is written to; torch.zeros
        # writes them.
        numel = blank.numel() * blank.element_size()
        value = torch.from_numpy(np.zeros(numel, dtype=np.uint8)).view(blank.dtype)
        value = value.view(blank.shape)
        row_bytes = source.nbytes // blank.shape[0]
        dtype = torch_dtypes()[source.dtype]
        held = torch.empty(blank.shape[1], dtype=dtype)
        for row in rows.tolist():
            self._reader.read_into(as_bytes(held), source, start=row * row_bytes)
            value[row].copy_(held)
        self._set(parameter, nn.Parameter(value.to(self._device), requires_grad=False))

    def release(self, parameters: Iterable[int], *, reuse: bool = False) -> None:
        """Put parameters back on meta.

        Args:
            parameters: `id` of what was on meta; any may be there already.
            reuse: keep their memory for the next ones of the same shapes, such as another block's:
                a page of memory that is new costs more than one that is read into again.
        """
        for one in parameters:
            if self.is_blank(one):
                continue
            if reuse:
                module, leaf = self._owners[one][0]
                held = module.get_parameter(leaf)
                self._spare.setdefault((held.shape, held.dtype), []).append(held.detach())
            self._set(one, self._blank[one])

    def drop_spares(self) -> None:
        """Give back the memory that was kept for others."""
        self._spare.clear()

    def close(self) -> None:
        """Close the shards."""
        self._reader.close()

    def _set(self, one: int, parameter: nn.Parameter) -> None:
        for module, leaf in self._owners[one]:
            setattr(module, leaf, parameter)

    def _read(self, value: Tensor, source: TensorInfo) -> None:
        """Read a tensor into one of its shape, and cast piece by piece."""
        flat, dtype = value.view(-1), torch_dtypes()[source.dtype]
        direct = dtype == value.dtype and value.device.type == "cpu"
        step = math.ceil(source.nbytes / source.numel) if source.numel else 1
        held = torch.empty(0 if direct else min(PIECE, source.numel), dtype=dtype)
        for start in range(0, source.numel, PIECE):
            part = flat[start : start + PIECE]
            buffer = part if direct else held[: len(part)]
            self._reader.read_into(as_bytes(buffer), source, start=start * step)
            if not direct:
                part.copy_(buffer)


def _renamed(model: Any, checkpoint: Checkpoint) -> dict[str, str]:
    """Rename tensors as transformers does when it loads the model; by our table where it cannot."""
    names = [tensor.name for tensor in checkpoint.tensors]
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, apply_renamings
    except ImportError:
        parts = {name: name.rpartition(".") for name in names}
        known = rename_modules(checkpoint.config or {}, {part[0] for part in parts.values()})
        return {name: known.get(a, a) + dot + b for name, (a, dot, b) in parts.items()}
    mapping = get_model_conversion_mapping(model)
    rules = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
    return {name: apply_renamings(name, rules) for name in names}


def _converted(model: Any, names: Iterable[str]) -> Iterator[str]:
    """Name the tensors that transformers does more to than to rename them."""
    with suppress(ImportError):  # a transformers that converts nothing, or elsewhere
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter

        rules = [
            rule
            for rule in get_model_conversion_mapping(model, add_legacy=False)
            if isinstance(rule, WeightConverter)
        ]
        for name in names:
            if any(rule.compiled_sources.search(name) for rule in rules):
                yield name
