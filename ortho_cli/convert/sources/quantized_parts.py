"""The tensors of one quantized weight, read by element, and the settings of its checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ortho_cli.convert.sources.base import Read, Source, SourceTensor
from ortho_cli.convert.sources.quantized import Quantization
from ortho_cli.errors import CheckpointError, NumericalError, shown
from ortho_cli.split import quantize

EXPONENTS = ("U8", "F8_E8M0")  # dtypes of scales that are powers of two
UNQUANTIZED = "it cannot be dequantized; start from the unquantized model"
AGAIN = "the file is damaged or of another version; download it again"

Plan = tuple[tuple[int, ...], Read]  # the weight's shape, and what reads rows of it

# E8M0: the value of each code of eight bits; the last is NaN.
_POWERS = torch.tensor([2.0 ** (code - 127) for code in range(255)] + [math.nan])


class Settings:
    """Settings of a checkpoint's quantization, where shapes alone do not determine a layout."""

    def __init__(self, found: Quantization, source: Source) -> None:
        self._said = found.settings
        config = source.config or {}
        self.is_fp4 = "fp4" in (config.get("expert_dtype"), found.settings.get("expert_dtype"))
        self.is_fbgemm = found.method == "fbgemm_fp8"
        self.block = self._block(source.path)
        self.group = self._number("group_size", "q_group_size")
        self.bits = self._number("bits", "w_bit", "num_bits")

    def _number(self, *keys: str) -> int | None:
        found = [self._said.get(key) for key in keys] + [self._weights().get(key) for key in keys]
        return next((n for n in found if type(n) is int and n > 0), None)

    def _weights(self) -> Mapping[str, object]:
        """Read the entry of compressed-tensors for the weights of its first group."""
        groups = self._said.get("config_groups")
        first = next(iter(groups.values()), None) if isinstance(groups, dict) else None
        weights = first.get("weights") if isinstance(first, dict) else None
        return weights if isinstance(weights, dict) else {}

    def _block(self, path: Path) -> tuple[int, int] | None:
        asked = self._said.get("weight_block_size") or self._weights().get("block_structure")
        if not asked:
            return None
        if isinstance(asked, str):  # compressed-tensors takes `128x128`, too
            asked = [int(size) if size.isdecimal() else size for size in asked.split("x")]
        sizes = asked if isinstance(asked, list) else []
        if len(sizes) != 2 or not all(type(size) is int and size > 0 for size in sizes):
            raise CheckpointError(
                f"config.json of `{path}` says weight_block_size {shown(asked)}, not two sizes",
                hint="restore the config.json that came with the model",
            )
        return sizes[0], sizes[1]

    def mlx(self, module: str) -> Mapping[str, object]:
        """Give MLX's settings of a module: its own where it has some, before those of all."""
        own = self._said.get(module)
        return {**self._said, **own} if isinstance(own, dict) else self._said

    def gptq_offset(self, parts: Parts) -> int:
        """Give the number to add to stored zero points: 1, but 0 in GPTQModel's second format."""
        form = self._said.get("checkpoint_format") or self._said.get("packing_format") or "gptq"
        if form == "gptq_v2":
            return 0
        if form == "gptq" or "auto_gptq" in str(form):
            return 1
        raise CheckpointError(
            f"`{parts.path}` says that its codes are packed as {shown(form)}, not gptq or gptq_v2",
            hint=UNQUANTIZED,
        )


Held = dict[object, tuple[Tensor, ...]]  # one entry at most, so that memory does not grow


class Parts(dict[str, SourceTensor]):
    """The tensors of one quantized weight, by role."""

    def __init__(self, tensors: Mapping[str, SourceTensor], path: Path, held: Held) -> None:
        super().__init__(tensors)
        self.path, self._held = path, held

    def elements(self, role: str, start: int, stop: int) -> Tensor:
        """Read elements, in row-major order, into memory of their own."""
        tensor = self[role]
        columns = tensor.columns
        first, last = start // columns, -(-stop // columns)
        flat = tensor.read(first, last - first).reshape(-1)
        return flat[start - first * columns : stop - first * columns].clone()

    def whole(self, role: str) -> Tensor:
        """Read a part whole, into memory of its own."""
        tensor = self[role]
        return self.elements(role, 0, tensor.numel).view(tensor.shape)

    def scales(self, role: str, start: int, stop: int) -> Tensor:
        """Read scales as float32; eight bits without a sign are a power of two (E8M0)."""
        found, tensor = self.elements(role, start, stop), self[role]
        if tensor.dtype in EXPONENTS:
            found = _POWERS[found.view(torch.uint8).int()]
        found = found.float()
        if not quantize.all_finite(found):
            place = int((~found.isfinite()).nonzero()[0])
            raise NumericalError(
                f"tensor `{tensor.name}` of `{self.path}` holds the scale {found[place].item()} at "
                f"element {start + place}, and a scale is finite",
                hint=AGAIN,
            )
        return found

    def hold(self, key: object, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Give the tensors of `make`, which is called again only after another key or weight."""
        place = (self["codes"].name, key)
        if place not in self._held:
            self._held.clear()  # freed before the next is made
            self._held[place] = make()
        return self._held[place]

    def misfit(self, role: str, wanted: str) -> CheckpointError:
        """Make the error of a part that does not fit the codes."""
        tensor, codes = self[role], self["codes"]
        beside = "," if role == "codes" else f" where `{codes.name}` {list(codes.shape)} takes"
        is_now = f"is {tensor.dtype} {list(tensor.shape)}{beside} {wanted}"
        return CheckpointError(f"tensor `{tensor.name}` of `{self.path}` {is_now}", hint=AGAIN)

    def check_product(self, weight: Tensor, codes: Tensor | None = None) -> Tensor:
        """Refuse a product that is not finite, of a code and a scale that are."""
        if quantize.all_finite(weight):
            return weight
        bad = ~weight.isfinite()
        if codes is not None:
            bad &= codes.isfinite()
        if bool(bad.any()):
            raise NumericalError(
                f"tensor `{self['codes'].name}` of `{self.path}` times its scale is "
                f"{weight[bad][0].item()} somewhere, beyond float32",
                hint=AGAIN,
            )
        return weight
