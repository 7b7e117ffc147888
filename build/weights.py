"""A bundle's weights: each tensor once, in its type, a block at a time.

A 7B checkpoint passes through a few megabytes.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from framesink.runtime.arrays import AnyArray
from framesink.runtime.errors import BuildError
from framesink.runtime.manifest import FileRecord
from framesink.runtime.models.checkpoint import Checkpoint
from framesink.runtime.models.safetensors_writer import SafetensorsWriter, numpy_type

_BLOCK_ELEMENTS = 1 << 22


def write_weights(
    checkpoint: Checkpoint,
    types: Mapping[str, str],
    path: Path,
    on_progress: Callable[[float], None],
) -> FileRecord:
    """Write the tensors named in `types` as one safetensors file.

    Each is converted to its type (a dtype's name), or goes through as it is where that is its type
    already. `on_progress` gets the share of bytes written. Raises BuildError if the file cannot be
    written, or if a weight is NaN, infinite, or out of range of its type.
    """
    total = sum(checkpoint.info(name).nbytes for name in types)
    done = 0
    layout = {name: (dtype, checkpoint.info(name).shape) for name, dtype in types.items()}
    try:
        with SafetensorsWriter(path, layout) as writer:
            for name, dtype in types.items():
                for block in _converted_blocks(checkpoint.read(name), dtype):
                    if not np.isfinite(block).all():
                        raise BuildError(
                            f"The weight {name} holds values that {dtype} cannot hold (NaN, "
                            "infinite or too large); the checkpoint is damaged."
                        )
                    writer.write(name, block)
                done += checkpoint.info(name).nbytes
                on_progress(done / total)
    except OSError as error:
        raise BuildError(f"{path} could not be written ({error.strerror or error}).") from error
    return FileRecord(size=writer.size, sha256=writer.sha256)


def _converted_blocks(tensor: AnyArray, dtype: str) -> Iterator[AnyArray]:
    flat = tensor.reshape(-1)
    with np.errstate(over="ignore"):  # overflow is told by the caller, with the weight's name
        for start in range(0, flat.size, _BLOCK_ELEMENTS):
            yield np.asarray(flat[start : start + _BLOCK_ELEMENTS]).astype(numpy_type(dtype))
