"""Casts between floating-point types of NumPy arrays, including bfloat16, for which NumPy has no type.

Without `ml_dtypes`, bfloat16 arrays have a structured dtype of one field (`array_adapters.numpy_dtype`).
"""

import numpy as np

from monoblock.checkpoint.array_adapters import DTYPE_NAMES, SAFETENSORS_DTYPES, Array, numpy_dtype
from monoblock.errors import CheckpointError

FLOATS = ("F64", "F32", "F16", "BF16")

# Largest rounding error of a cast: relative, and absolute (for subnormal numbers).
ROUNDING = {"F64": (0.0, 0.0), "F32": (2**-24, 2**-150), "F16": (2**-11, 2**-25), "BF16": (2**-8, 2**-134)}


def safetensors_dtype(name: str) -> str:
    """The safetensors name of a dtype that weights can be cast to; ValueError for any other."""
    found = SAFETENSORS_DTYPES.get(name.removeprefix("torch."), "")
    if found not in ("F32", "F16", "BF16"):
        raise ValueError(
            f"dtype={name!r}: expected 'float32', 'float16' or 'bfloat16', or None to keep the stored dtype"
        )
    return found


def dtype_of(array: Array) -> str:
    """The safetensors name of an array's dtype; "" if it has none."""
    kind = array.dtype
    return kind.names[0] if kind.names else SAFETENSORS_DTYPES.get(kind.name, "")


def widened(array: Array) -> Array:
    """The array as float32 (float64 is kept); exact for float16 and bfloat16."""
    kind = dtype_of(array)
    if kind not in FLOATS:
        raise CheckpointError(
            f"{DTYPE_NAMES.get(kind, kind)} weights cannot be cast: only float64, float32, float16 and bfloat16 can"
        )
    if kind != "BF16":
        return array if kind == "F64" else array.astype(np.float32, copy=False)
    bits = np.ascontiguousarray(array).view("<u2").astype("<u4")
    bits <<= 16
    return bits.view("<f4")


def cast(array: Array, dtype: str, name: str) -> Array:
    """The array cast to `dtype`, rounded to nearest, ties to even.

    `CheckpointError` names the tensor (`name`) if a finite value overflows.
    """
    if dtype_of(array) == dtype:
        return array
    wide = widened(array)
    if dtype_of(wide) == dtype:
        return wide
    with np.errstate(over="ignore"):
        new = _to_bfloat16(wide) if dtype == "BF16" else wide.astype(numpy_dtype(dtype))
    if np.isinf(widened(new)).sum() != np.isinf(wide).sum():
        raise CheckpointError(
            f"{name} holds values up to {np.abs(wide[np.isfinite(wide)]).max():.4g}, which {DTYPE_NAMES[dtype]} "
            "cannot hold: convert to bfloat16 or float32 instead"
        )
    return new


def _to_bfloat16(wide: Array) -> Array:
    bits = np.ascontiguousarray(wide.astype("<f4", copy=False)).view("<u4")
    # Add half an ulp, less one where the last kept bit is even (ties to even); a carry goes into the
    # exponent, which is correct.
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    nan = np.isnan(wide)
    rounded[nan] = (bits[nan] >> 16) | 0x40  # keep a NaN from rounding to infinity
    return rounded.astype("<u2").view(numpy_dtype("BF16"))
