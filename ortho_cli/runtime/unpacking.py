"""Base unpacked in compiled loops, by the threads that torch multiplies with.

What `ops.dequantize` gives, to the bit, in one walk where torch takes eight. The rows are shared
out among torch's own OpenMP threads: others would have to wait for a core, since those spin for
milliseconds after each product.
"""

from __future__ import annotations

import ctypes
from functools import cache, partial
from typing import Any

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
    """Count up by one, whoever else does; return the count before."""

    def generate(context, builder, signature, arguments):
        return builder.atomic_rmw("add", arguments[0], ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(counter), generate


@intrinsic
def _pointer(context, address):
    """Read a number as an address."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(address), generate


@njit
def _arrays(places, shapes, word):
    return carray(places[0], shapes[0], word), carray(places[1], shapes[1], word)


@njit(error_model="numpy")
def _unpack(here, packed, scales, weights):
    """Make words of weights in some rows, of (rows, in / 2) bytes and words of scales."""
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
def _share(told):
    """Unpack some rows after others until none is left; each thread of a team runs this."""
    _, rows, columns, groups, kind, packed, scales, weights = carray(told, 8)
    codes = carray(_pointer(packed), (rows, columns // 2), np.uint8)
    places, shapes = (_pointer(scales), _pointer(weights)), ((rows, groups), (rows, columns))
    first = _take(told) * ROWS
    while first < rows:
        here = (first, min(first + ROWS, rows))
        if kind == 0:
            _unpack(here, codes, *_arrays(places, shapes, np.uint16))
        elif kind == 1:
            _unpack(here, codes, *_arrays(places, shapes, np.int16))
        else:
            _unpack(here, codes, *_arrays(places, shapes, np.uint32))
        first = _take(told) * ROWS


@cache
def _team() -> Any:
    """Find what starts torch's OpenMP threads; None where torch has others."""
    start = getattr(ctypes.CDLL(torch._C.__file__), "GOMP_parallel", None)
    if start is not None:
        start.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        start.restype = None
    return start


def takes(packed: Tensor, scales: Tensor) -> bool:
    """Tell whether there is memory to read, and threads to do it as quickly as torch."""
    # Fake tensors, which torch traces with, have none; nor has what is made while it does.
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
    told = np.array([0, rows, columns, scales.shape[1], KINDS[scales.dtype], *places], np.int64)
    # All of them or one: OpenMP ends those that are left out, and the next product starts others.
    threads = torch.get_num_threads()
    if threads == 1 or rows <= ROWS:
        _share.ctypes(told.ctypes.data_as(ctypes.POINTER(ctypes.c_int64)))
    else:
        _team()(_share.address, told.ctypes.data, threads, 0)
    return weights
