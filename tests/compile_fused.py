"""Compiles the CUDA kernels for a named card, with none at hand: each launch of some products.

    PYTHONPATH=. python tests/compile_fused.py 90

The interpreter runs Python, so it takes what Triton's compiler refuses. Prints one line a kernel.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ortho_cli.runtime import triton_kernels
from tests.runtime.test_product import Made

NAMES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
KERNELS = ("_multiply", "_add_shares", "_multiply_sparse")


class Recorder:
    """Stands in for a kernel, and keeps what it is launched with."""

    def __init__(self, kernel: Any, launches: list[Any]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *given, **named: self.launches.append((self.kernel, given, named))


def compile_launch(kernel: Any, given: tuple[Any, ...], named: dict[str, Any], card: int) -> Any:
    """Compile one launch as Triton would at its first call."""
    options = {name: named.pop(name) for name in ("num_warps", "num_stages") if name in named}
    values = dict(zip(kernel.arg_names, given, strict=False)) | named
    signature, constants, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        value = values[name]
        signature[name] = "constexpr"
        if isinstance(value, Tensor):
            signature[name] = NAMES[value.dtype]
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif name in named or (value == 1 and name != "x_rows"):
            constants[(place,)] = value
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0 and name != "x_rows":
                attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", card, 32), options=options)


def main(card: int) -> None:
    """Record the launches of a few products on the CPU, and compile them."""
    launches: list[Any] = []
    for name in KERNELS:
        setattr(triton_kernels, name, Recorder(getattr(triton_kernels, name), launches))
    wide = Made(64, 8, 128, torch.bfloat16)  # enough columns for two shares
    odd = Made(33, 2, 24, torch.float16)
    full = Made(16, 1, 64, torch.float32)
    least = Made(1, 1, 8, torch.float32)  # sizes of 1 are constants to Triton
    odd.ortho = odd.ortho._replace(crow_indices=odd.ortho.crow_indices.long())
    for made, x_rows, alpha in (
        (wide, 1, 0.0),
        (wide, 1, 0.5),
        (wide, 8, 0.5),
        (wide, 100, 0.5),
        (odd, 17, torch.ones(17)),
        (odd, 2, torch.ones(2)),
        (full, 3, 1.0),
        (least, 1, 1.0),
    ):
        x = torch.zeros(x_rows, made.base.shape[1], dtype=made.base.weight_scale.dtype)
        triton_kernels.product(x, made.base, made.ortho, made.bias, alpha)
    for kernel, given, named in launches:
        form = {name: named.get(name) for name in ("form", "shares", "block_x")}
        built = compile_launch(kernel, given, named, card)
        line = f"{kernel.fn.__name__} {form} shared memory {built.metadata.shared}\n"
        sys.stdout.write(line)


if __name__ == "__main__":
    main(int(sys.argv[1]))
