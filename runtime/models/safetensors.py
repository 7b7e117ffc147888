"""Lazy reading of safetensors files, which are hostile until checked.

Layout (https://github.com/huggingface/safetensors#format): 8 bytes little-endian header length, a
JSON header that gives every tensor's dtype, shape and byte range, then the data.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import ml_dtypes
import numpy as np

from framesink.runtime.arrays import AnyArray
from framesink.runtime.errors import CheckpointError

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
MAX_NAME_LENGTH = 4096
MAX_RANK = 16

DTYPES: Mapping[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies. `dtype` is a numpy name (`float16`, `bfloat16`, …), `offset` is
    counted in bytes from the start of `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, by name.

    Raises CheckpointError if the file cannot be read, is truncated, or its header is malformed,
    reaches outside of the file, or lets tensors overlap.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(LENGTH_BYTES), "little")
            if size < LENGTH_BYTES or not 0 < length <= MAX_HEADER_BYTES:
                raise _damaged(path, "it does not begin with a valid header length")
            if LENGTH_BYTES + length > size:
                raise _damaged(path, f"it is truncated: {size} bytes do not hold its header")
            header = parse_json_object(file.read(length), path)
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error.strerror or error}.") from error
    start = LENGTH_BYTES + length
    tensors = {
        name: _parse_entry(path, name, entry, start, size)
        for name, entry in header.items()
        if name != "__metadata__"
    }
    _check_overlap(path, tensors)
    return tensors


def read_tensor(info: TensorInfo) -> AnyArray:
    """A read-only, memory-mapped view of one tensor; nothing is read before it is touched.

    Raises CheckpointError if the file is gone.
    """
    dtype = np.dtype(getattr(ml_dtypes, info.dtype, info.dtype))
    if info.nbytes == 0:
        return np.empty(info.shape, dtype)
    try:
        mapped = np.memmap(info.file, dtype, mode="r", offset=info.offset, shape=info.shape)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"Cannot read {info.name} from {info.file}: {error}.") from error
    # A plain view: indexing np.memmap is several times slower.
    return np.asarray(mapped)


def parse_json_object(data: bytes, path: Path) -> dict[str, Any]:
    """A JSON object of a checkpoint file; CheckpointError if it is anything else."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, "its JSON cannot be parsed") from error
    if not isinstance(value, dict):
        raise _damaged(path, "its JSON is not an object")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("duplicate key")
    return result


def _parse_entry(path: Path, name: str, entry: Any, start: int, size: int) -> TensorInfo:
    if len(name) > MAX_NAME_LENGTH or not isinstance(entry, dict):
        raise _damaged(path, f"the entry of tensor {name[:64]!r} is malformed")
    dtype = entry.get("dtype")
    shape: object = entry.get("shape")
    offsets: object = entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _damaged(path, f"tensor {name!r} has the unknown dtype {str(dtype)[:64]!r}")
    if not _are_naturals(shape) or not _are_naturals(offsets) or len(offsets) != 2:
        raise _damaged(path, f"tensor {name!r} has a malformed shape or byte range")
    begin, end = offsets
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != expected:
        raise _damaged(
            path, f"tensor {name!r} of {expected} bytes has a byte range of {end - begin}"
        )
    if start + end > size:
        raise _damaged(
            path,
            f"it is truncated: tensor {name!r} ends at byte {start + end}, the file at {size}",
        )
    return TensorInfo(name, DTYPES[dtype].name, tuple(shape), path, start + begin, expected)


def _are_naturals(value: object) -> TypeGuard[list[int]]:
    return (
        isinstance(value, list)
        and len(value) <= MAX_RANK
        and all(type(item) is int and item >= 0 for item in value)
    )


def _check_overlap(path: Path, tensors: Mapping[str, TensorInfo]) -> None:
    end = 0
    for info in sorted(tensors.values(), key=lambda info: (info.offset, info.nbytes)):
        if info.offset < end:
            raise _damaged(path, f"tensor {info.name!r} overlaps the one before it")
        end = info.offset + info.nbytes


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged: {reason}; download or copy it again.")
