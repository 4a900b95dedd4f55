"""Dtypes: the one table of names, sizes and bits, and what numpy and torch call each.

Names are those of safetensors. The module imports neither numpy nor torch before one is asked for.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    import torch


class Dtype(NamedTuple):
    """What is known of a dtype."""

    bits: int  # of an element
    numpy: str | None = None  # numpy's name, where numpy has the dtype
    torch: str | None = None  # torch's name, where ours reads it
    exponent: int | None = None  # mask of a float's exponent bits: all set means infinity or NaN


# Every dtype that safetensors 0.8 knows; an error about an unknown one lists them in this order.
DTYPES = {
    "F4": Dtype(4),
    "F6_E2M3": Dtype(6),
    "F6_E3M2": Dtype(6),
    "BOOL": Dtype(8, "bool", "bool"),
    "U8": Dtype(8, "uint8", "uint8"),
    "I8": Dtype(8, "int8", "int8"),
    "F8_E5M2": Dtype(8, None, "float8_e5m2"),
    "F8_E4M3": Dtype(8, None, "float8_e4m3fn"),
    "F8_E8M0": Dtype(8, None, "float8_e8m0fnu"),
    "F8_E4M3FNUZ": Dtype(8, None, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": Dtype(8, None, "float8_e5m2fnuz"),
    "I16": Dtype(16, "int16", "int16"),
    "U16": Dtype(16, "uint16", "uint16"),
    "F16": Dtype(16, "float16", "float16", 0x7C00),
    "BF16": Dtype(16, None, "bfloat16", 0x7F80),
    "I32": Dtype(32, "int32", "int32"),
    "U32": Dtype(32, "uint32", "uint32"),
    "F32": Dtype(32, "float32", "float32", 0x7F80_0000),
    "I64": Dtype(64, "int64", "int64"),
    "U64": Dtype(64, "uint64", "uint64"),
    "F64": Dtype(64, "float64", "float64", 0x7FF0_0000_0000_0000),
    "C64": Dtype(64, "complex64", "complex64"),
}
SPLIT = ("BF16", "F16", "F32")  # of weights that can be split, and so of base's scales
# The smallest scale worth storing; hardware keeps subnormals in float16, whose range is short.
SMALLEST_SCALE = {"BF16": 2.0**-126, "F16": 2.0**-24, "F32": 2.0**-126}
FLOATS = (*SPLIT, "F64")  # what a cast applies to
# As config.json and --dtype say.
BY_CONFIG = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@cache
def torch_dtypes() -> dict[str, torch.dtype]:
    """Name torch's dtypes; a torch too old to know F8_E8M0 has its bytes, as uint8."""
    import torch

    known = ((name, dtype.torch) for name, dtype in DTYPES.items())
    return {name: getattr(torch, its, torch.uint8) for name, its in known if its}


@cache
def names_of_torch() -> dict[torch.dtype, str]:
    """Turn `torch_dtypes` round; of two names for uint8, U8 is the one."""
    return {dtype: name for name, dtype in reversed(torch_dtypes().items())}


@cache
def words_of(name: str) -> np.dtype[np.unsignedinteger]:
    """Name numpy's unsigned integer of a dtype's size: what its bits are read as."""
    import numpy as np

    return np.dtype(f"uint{DTYPES[name].bits}")
