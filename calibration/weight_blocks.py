"""Weights read a block of rows at a time, so that no large one lies in memory whole."""

from collections.abc import Iterable, Iterator

import numpy as np

from framesink.calibration.formats import SMALLEST_AMAX, row_amax
from framesink.runtime.arrays import AnyArray, Float32Array
from framesink.runtime.errors import CheckpointError
from framesink.runtime.models.checkpoint import Checkpoint

_BLOCK_ELEMENTS = 1 << 22


def row_blocks(
    checkpoint: Checkpoint, name: str, divisors: Float32Array | None = None
) -> Iterator[Float32Array]:
    """Blocks of rows of the weight `name` `[out, in]` in float32, each column divided by its
    divisor `[in]`.

    Raises CheckpointError if a value is NaN or infinite.
    """
    weight = checkpoint.read(name)
    for block in plain_blocks(weight):
        values = block.astype(np.float32)
        if not np.isfinite(values).all():
            raise CheckpointError(
                f"The weight {name} holds NaN or infinite values; the checkpoint is damaged."
            )
        yield values if divisors is None else values / divisors


def plain_blocks(tensor: AnyArray) -> Iterator[AnyArray]:
    """A tensor as it is, in blocks of whole rows (of its first axis)."""
    if tensor.ndim < 2:
        yield np.asarray(tensor)
        return
    rows = max(1, _BLOCK_ELEMENTS * len(tensor) // max(1, tensor.size))
    for start in range(0, len(tensor), rows):
        yield np.asarray(tensor[start : start + rows])


def column_amax(checkpoint: Checkpoint, names: Iterable[str]) -> Float32Array:
    """Largest magnitude of each column of all weights `names` `[out, in]`: float32 `[in]`."""
    blocks = (row_amax(block.T) for name in names for block in row_blocks(checkpoint, name))
    amax = next(blocks)
    for block in blocks:
        np.maximum(amax, block, out=amax)
    return amax


def tensor_amax(
    checkpoint: Checkpoint, name: str, divisors: Float32Array | None = None
) -> Float32Array:
    """Largest magnitude of a weight, never below the smallest that is not dead: float32 `[]`."""
    largest = max(float(np.abs(block).max()) for block in row_blocks(checkpoint, name, divisors))
    return np.array(max(largest, SMALLEST_AMAX), dtype=np.float32)
