"""Unpack base on the CPU: a numba loop on the OpenMP threads of torch.

    w = (q - 8) * scale, rounded once to the scales' dtype: `quantize.dequantize`, bit for bit

One pass over memory, where torch needs eight. The rows are shared out among torch's own threads:
others would wait for a core, since torch's spin for milliseconds after each product.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache, partial

import numpy as np
import torch
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic
from torch import Tensor

from ortho_cli.split.numba_loops import kept, narrow, widen

ROWS = 8  # that a thread takes at a time
KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}  # as the compiled loop knows them


@intrinsic
def _take(context, counter):
    """Count up by one, atomically; return the count before."""

    def generate(context, builder, signature, arguments):
        return builder.atomic_rmw("add", arguments[0], ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(counter), generate


@intrinsic
def _pointer(context, address):
    """Turn a number into an address."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(address), generate


@njit
def _arrays(places, shapes, word):
    return carray(places[0], shapes[0], word), carray(places[1], shapes[1], word)


@njit(error_model="numpy")
def _unpack(here, packed, scales, weights):
    """Make words of weights from (rows, in / 2) bytes of codes and words of scales."""
    half = packed.shape[1] // scales.shape[1]
    for row in range(*here):
        for group in range(scales.shape[1]):
            stored = scales[row, group]
            scale = widen(stored)
            pairs = packed[row, group * half : (group + 1) * half]
            some = weights[row, 2 * group * half : 2 * (group + 1) * half]
            for i in range(half):
                pair = np.int32(pairs[i])
                low, high = np.float32(pair & 15), np.float32(pair >> 4)
                some[2 * i] = narrow((low - np.float32(8)) * scale, stored)
                some[2 * i + 1] = narrow((high - np.float32(8)) * scale, stored)


@kept(partial(cfunc, types.void(types.CPointer(types.int64))))
def _share(call):
    """Unpack a few rows at a time until none is left; each thread of a team runs this."""
    _, rows, columns, groups, kind, packed, scales, weights = carray(call, 8)
    codes = carray(_pointer(packed), (rows, columns // 2), np.uint8)
    places, shapes = (_pointer(scales), _pointer(weights)), ((rows, groups), (rows, columns))
    first = _take(call) * ROWS
    while first < rows:
        here = (first, min(first + ROWS, rows))
        if kind == 0:
            _unpack(here, codes, *_arrays(places, shapes, np.uint16))
        elif kind == 1:
            _unpack(here, codes, *_arrays(places, shapes, np.int16))
        else:
            _unpack(here, codes, *_arrays(places, shapes, np.uint32))
        first = _take(call) * ROWS


@cache
def _team() -> Callable[[int | None, int, int, int], None] | None:
    """Find the function that starts torch's OpenMP threads; None where torch has others."""
    start = getattr(ctypes.CDLL(torch._C.__file__), "GOMP_parallel", None)
    if start is not None:
        start.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        start.restype = None
    return start


def takes(packed: Tensor, scales: Tensor) -> bool:
    """Whether the tensors have memory to read, and torch has threads to share the rows."""
    # Fake tensors, which torch traces with, have none; nor have tensors made during a trace.
    real = type(packed) is type(torch.empty(0)) is Tensor and packed.device.type == "cpu"
    return real and scales.dtype in KINDS and (torch.get_num_threads() == 1 or _team() is not None)


def unpack(packed: Tensor, scales: Tensor) -> Tensor:
    """Unpack codes of 4 bits: w = q * scale, rounded once to the scales' dtype.

    Args:
        packed: (rows, in / 8) int32, on the CPU.
        scales: (rows, groups).
    Returns:
        (rows, in) of the scales' dtype.
    """
    rows, columns = packed.shape[0], packed.shape[1] * 8
    packed, scales = packed.contiguous(), scales.contiguous()
    weights = torch.empty((rows, columns), dtype=scales.dtype)
    places = (packed.data_ptr(), scales.data_ptr(), weights.data_ptr())
    call = np.array([0, rows, columns, scales.shape[1], KINDS[scales.dtype], *places], np.int64)
    # All threads or one: OpenMP ends unused threads, and the next product starts others.
    threads, start = torch.get_num_threads(), _team()
    if start is None or threads == 1 or rows <= ROWS:
        _share.ctypes(call.ctypes.data_as(ctypes.POINTER(ctypes.c_int64)))
    else:
        start(_share.address, call.ctypes.data, threads, 0)
    return weights
