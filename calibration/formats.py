"""The one-byte and half-byte number formats: real value = code × scale.

Rounding and saturation are those of ONNX QuantizeLinear
(https://onnx.ai/onnx/operators/onnx__QuantizeLinear.html), so a code computed here is the code the
compiled graph computes. All formats are symmetric: there is no zero point.
"""

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from framesink.runtime.arrays import AnyArray, Float32Array, UInt8Array

# Whatever never exceeds float16's smallest normal number is dead: its scale would drown in float16.
SMALLEST_AMAX = 2.0**-14


@dataclass(frozen=True, slots=True)
class NumberFormat:
    """Codes of `dtype` between `lowest` and `highest`. An absolute maximum ("amax") is mapped onto
    `highest`; values beyond it saturate."""

    name: str
    dtype: np.dtype[Any]
    lowest: float
    highest: float

    @property
    def is_integer(self) -> bool:
        """Whether codes are whole numbers; else they are floating point themselves."""
        return self.dtype == np.int8


FP8 = NumberFormat("fp8", np.dtype(ml_dtypes.float8_e4m3fn), -448.0, 448.0)
INT8 = NumberFormat("int8", np.dtype(np.int8), -128.0, 127.0)
INT4 = NumberFormat("int4", np.dtype(np.int8), -8.0, 7.0)


def clamp_dead(amax: Float32Array, smallest: float = SMALLEST_AMAX) -> tuple[Float32Array, int]:
    """`amax` with everything below `smallest` raised to it, and how many entries were raised."""
    dead = int(np.count_nonzero(amax < smallest))
    return np.maximum(amax, np.float32(smallest)), dead


def scale_of(amax: Float32Array, number_format: NumberFormat) -> Float32Array:
    """The float32 scale that maps each `amax`, which is above 0, onto the highest code."""
    return np.asarray(amax.astype(np.float32) / np.float32(number_format.highest))


def quantize(
    values: Float32Array, scale: Float32Array | float, number_format: NumberFormat
) -> AnyArray:
    """Codes of `values` under `scale` (broadcast): nearest, ties to even, saturating.

    INT4 codes come as int8, one each; `pack_int4` halves them. Values must not be NaN.
    """
    scaled = np.clip(
        values / np.asarray(scale, dtype=np.float32), number_format.lowest, number_format.highest
    )
    if number_format.is_integer:
        scaled = np.rint(scaled)
    return scaled.astype(number_format.dtype)


def dequantize(codes: AnyArray, scale: Float32Array | float) -> Float32Array:
    """The real values of `codes` under `scale` (broadcast), float32."""
    values: Float32Array = codes.astype(np.float32) * np.asarray(scale, dtype=np.float32)
    return values


def clipping_error(
    values: Float32Array,
    amax: float,
    number_format: NumberFormat,
    counts: NDArray[Any] | None = None,
) -> float:
    """Mean squared error of `values` quantized with the range ±`amax`.

    `counts` says how often each value occurred, for the centres of a histogram's bins. A smaller
    `amax` rounds finer and saturates more; the best lies where this is least.
    """
    scale = scale_of(np.asarray(amax, dtype=np.float32), number_format)
    errors = np.square(values - dequantize(quantize(values, scale, number_format), scale))
    return float(np.average(errors.astype(np.float64), weights=counts))


def row_amax(weight: Float32Array) -> Float32Array:
    """Absolute maximum of each row (output channel) of `weight [out, in]`: float32 `[out]`."""
    amax: Float32Array = np.maximum(weight.max(axis=1), -weight.min(axis=1))
    return amax


def group_amax(weight: Float32Array, group: int) -> Float32Array:
    """Absolute maximum of each run of `group` inputs of each row: float32 `[out, ⌈in/group⌉]`.

    The last group may be shorter.
    """
    starts = np.arange(0, weight.shape[1], group)
    amax: Float32Array = np.maximum.reduceat(np.abs(weight), starts, axis=1)
    return amax


def expand_groups(scales: Float32Array, group: int, inputs: int) -> Float32Array:
    """Scales per group `[out, groups]` as scales per weight `[out, inputs]`."""
    return np.repeat(scales, group, axis=1)[:, :inputs]


def pack_int4(codes: NDArray[np.int8]) -> UInt8Array:
    """INT4 codes `[out, in]`, `in` even, as bytes `[out, in/2]`: two's complement, the first code
    in the low nibble, as ONNX stores INT4."""
    nibbles = codes.view(np.uint8) & np.uint8(0x0F)
    packed: UInt8Array = nibbles[:, 0::2] | (nibbles[:, 1::2] << np.uint8(4))
    return packed


def unpack_int4(packed: UInt8Array) -> NDArray[np.int8]:
    """The INT4 codes int8 `[out, in]` that `pack_int4` packed."""
    # The sign bit goes to the top and back: an arithmetic shift extends it.
    low = (packed << np.uint8(4)).view(np.int8) >> np.int8(4)
    high = packed.view(np.int8) >> np.int8(4)
    codes: NDArray[np.int8] = np.stack([low, high], axis=-1).reshape(len(packed), -1)
    return codes
