"""Tensors whose shape travels with their values, in bytes: see `contract.Tensor.packed`.

Needs nothing but numpy, so that a client can use it.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from framesink.runtime.arrays import AnyArray, UInt8Array
from framesink.serving.contract import DataType, Tensor

# Python's bytes stand for BYTES; the rest is little-endian, whatever the machine is.
NUMPY_TYPES: Mapping[DataType, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BYTES": np.dtype(np.object_),
}
_DIMENSION = NUMPY_TYPES["INT64"]


def pack(tensor: Tensor, values: AnyArray) -> UInt8Array:
    """Shape and values of a packed tensor, uint8 `[n]`; of no values, none."""
    if values.size == 0:
        return np.empty(0, np.uint8)
    dimensions = np.array(values.shape, _DIMENSION).tobytes()
    content = np.ascontiguousarray(values, NUMPY_TYPES[tensor.data_type]).tobytes()
    return np.frombuffer(dimensions + content, np.uint8)


def unpack(tensor: Tensor, packed: UInt8Array) -> AnyArray:
    """The values in what `pack` made, in their shape; without content, an empty array.

    Raises ValueError, with a sentence, for content that does not fit its dimensions, and for
    dimensions that are not the tensor's.
    """
    dtype = NUMPY_TYPES[tensor.data_type]
    if packed.size == 0:
        return np.empty([size if isinstance(size, int) else 0 for size in tensor.shape], dtype)
    head = _DIMENSION.itemsize * len(tensor.shape)
    if packed.dtype != np.uint8 or packed.ndim != 1 or packed.size < head:
        raise ValueError(f"{tensor.name} is not packed as the table of tensors says.")
    content = np.ascontiguousarray(packed)
    shape = [int(size) for size in content[:head].view(_DIMENSION)]
    fixed = all(
        isinstance(meant, str) or meant == size
        for meant, size in zip(tensor.shape, shape, strict=True)
    )
    whole = min(shape) >= 0 and math.prod(shape) * dtype.itemsize == packed.size - head
    if not fixed or not whole:
        raise ValueError(
            f"{tensor.name} of the packed shape {shape} does not hold what that shape needs."
        )
    values: AnyArray = content[head:].view(dtype).reshape(shape)
    return values
