"""Which patches of a vision input attend to each other: windows, and whole frames.

Patches come in the order of `framesink.runtime.preprocess`: by temporal step, then by merge × merge
block in row-major order, then within the block. Several inputs may be laid one after another.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from framesink.runtime.arrays import AnyArray, Float32Array, Int32Array
from framesink.runtime.models.config import VisionConfig
from framesink.runtime.preprocess import Grid

# Added to the score of a key that must not be seen: far below any score, and finite in float16.
MASKED = -3e4


@dataclass(frozen=True, slots=True, eq=False)
class Segments:
    """S groups of at most L patches, padded. `index` int32 `[S, L]`: the patches of each segment
    (patch 0 as padding). `inverse` int32 `[n]`: where each patch is in the flattened `index`.
    `mask` float32 `[S, 1, 1, L]`: 0, or `MASKED` on padding."""

    index: Int32Array
    inverse: Int32Array
    mask: Float32Array


def window_patches(config: VisionConfig) -> int:
    """Patches of a full attention window."""
    return _window_side(config) ** 2 * config.merge_unit


def window_segments(grids: Sequence[Grid], config: VisionConfig) -> Segments:
    """The attention windows: squares of `window_size` pixels of one temporal step, cut off at the
    right and lower edges. L is `window_patches(config)`."""
    merge = config.spatial_merge_size
    side = _window_side(config)
    ids = []
    count = 0
    for grid in grids:
        rows, columns = grid.h // merge, grid.w // merge
        across = -(-columns // side)
        down = -(-rows // side)
        block = (np.arange(rows) // side)[:, None] * across + np.arange(columns) // side
        steps = np.arange(grid.t)[:, None] * (down * across) + block.reshape(1, -1)
        ids.append(np.repeat(steps.reshape(-1) + count, config.merge_unit))
        count += grid.t * down * across
    return _segments(np.concatenate(ids), count, window_patches(config))


def frame_segments(grids: Sequence[Grid]) -> Segments:
    """One segment per temporal step of each input; L is a frame's patch count.

    Raises ValueError if frames differ in patch count: full attention runs without a mask.
    """
    length = grids[0].h * grids[0].w
    if any(grid.h * grid.w != length for grid in grids):
        raise ValueError("the frames of one call must have the same number of patches")
    count = sum(grid.t for grid in grids)
    return _segments(np.repeat(np.arange(count), length), count, length)


def _window_side(config: VisionConfig) -> int:
    return config.window_size // config.spatial_merge_size // config.patch_size


def _segments(ids: AnyArray, count: int, length: int) -> Segments:
    """Segments from each patch's segment number; a segment keeps the order of its patches."""
    order = np.argsort(ids, kind="stable")
    sizes = np.bincount(ids, minlength=count)
    starts = np.cumsum(sizes) - sizes
    place = np.empty(len(ids), np.int32)
    place[order] = np.arange(len(ids)) - starts[ids[order]]
    inverse = (ids * length + place).astype(np.int32)
    index = np.zeros(count * length, np.int32)
    index[inverse] = np.arange(len(ids))
    mask = np.full(count * length, MASKED, np.float32)
    mask[inverse] = 0.0
    return Segments(index.reshape(count, length), inverse, mask.reshape(count, 1, 1, length))
