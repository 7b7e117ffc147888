"""Write a bundle's weights: each tensor once, in its compute type, a block at a time.

The safetensors library wants all tensors in memory at once; here a 7B checkpoint passes through a
few megabytes.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from framesink.runtime.arrays import AnyArray
from framesink.runtime.errors import BuildError
from framesink.runtime.manifest import ComputeType, FileRecord
from framesink.runtime.models.checkpoint import Checkpoint

_BLOCK_ELEMENTS = 1 << 22
_HEADER_ALIGNMENT = 64
_SAFETENSORS_NAMES: Mapping[ComputeType, str] = {
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
}


def write_weights(
    checkpoint: Checkpoint,
    types: Mapping[str, ComputeType],
    path: Path,
    on_progress: Callable[[float], None],
) -> FileRecord:
    """Write the tensors named in `types`, each converted to its type, as one safetensors file.

    `on_progress` gets the share of bytes written. Raises BuildError if the file cannot be written,
    or if a weight is NaN, infinite, or out of range of its type.
    """
    header = safetensors_header(
        {name: (types[name], checkpoint.info(name).shape) for name in types}
    )
    total = sum(checkpoint.info(name).nbytes for name in types)
    digest = hashlib.sha256(header)
    size = len(header)
    done = 0
    try:
        with path.open("wb") as file:
            file.write(header)
            for name, compute_type in types.items():
                for block in _converted_blocks(checkpoint.read(name), compute_type):
                    if not np.isfinite(block).all():
                        raise BuildError(
                            f"The weight {name} holds values that {compute_type} cannot hold (NaN, "
                            "infinite or too large); the checkpoint is damaged."
                        )
                    data = block.view(np.uint8).data
                    file.write(data)
                    digest.update(data)
                    size += len(data)
                done += checkpoint.info(name).nbytes
                on_progress(done / total)
    except OSError as error:
        raise BuildError(f"{path} could not be written ({error.strerror or error}).") from error
    return FileRecord(size=size, sha256=digest.hexdigest())


def safetensors_header(tensors: Mapping[str, tuple[ComputeType, tuple[int, ...]]]) -> bytes:
    """The start of a safetensors file that holds tensors of the given types and shapes, in order.

    Source: https://github.com/huggingface/safetensors#format.
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (compute_type, shape) in tensors.items():
        end = offset + int(np.prod(shape, dtype=np.int64)) * numpy_type(compute_type).itemsize
        entries[name] = {
            "dtype": _SAFETENSORS_NAMES[compute_type],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def numpy_type(compute_type: ComputeType) -> np.dtype[np.generic]:
    """The numpy type of a compute type's name."""
    return np.dtype(ml_dtypes.bfloat16 if compute_type == "bfloat16" else compute_type)


def _converted_blocks(tensor: AnyArray, compute_type: ComputeType) -> Iterator[AnyArray]:
    flat = tensor.reshape(-1)
    with np.errstate(over="ignore"):  # overflow is told by the caller, with the weight's name
        for start in range(0, flat.size, _BLOCK_ELEMENTS):
            block = np.asarray(flat[start : start + _BLOCK_ELEMENTS])
            yield np.ascontiguousarray(block.astype(numpy_type(compute_type)))
