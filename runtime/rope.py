"""Rotary tables made on the host: M-RoPE of the language model, axial RoPE of the vision encoder.

Source: Qwen2-VL (arXiv 2409.12191, section 2.1); `transformers`
`models/qwen2_5_vl/modeling_qwen2_5_vl.py` (Qwen2_5_VLRotaryEmbedding,
Qwen2_5_VLVisionRotaryEmbedding).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import DTypeLike

from framesink.runtime.arrays import AnyArray, Int32Array
from framesink.runtime.models.config import VISION_ROPE_THETA, TextConfig, VisionConfig
from framesink.runtime.preprocess import Grid

INITIAL_POSITIONS = 4096


class MRopeTable:
    """Cosines and sines of every position, looked up by row.

    Rotary pair j turns by the t, h or w position of its token, as `mrope_section` says. The table
    doubles when a position beyond its end is asked for.
    """

    def __init__(self, config: TextConfig, dtype: DTypeLike) -> None:
        """`dtype` is that of the tables given out."""
        pairs = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
        self._frequencies = (1.0 / np.float32(config.rope_theta) ** pairs).astype(np.float32)
        ends = np.cumsum(config.mrope_section)
        self._sections = [
            slice(int(end) - size, int(end))
            for end, size in zip(ends, config.mrope_section, strict=True)
        ]
        self._dtype = np.dtype(dtype)
        self._fill(INITIAL_POSITIONS)

    def _fill(self, positions: int) -> None:
        angles = np.arange(positions, dtype=np.float32)[:, None] * self._frequencies
        tables = np.stack([np.cos(angles), np.sin(angles)]).astype(self._dtype)
        self._tables = [np.ascontiguousarray(tables[..., part]) for part in self._sections]

    def lookup(self, positions: Int32Array) -> AnyArray:
        """Tables `[2, ..., D/2]` (cosines, sines) of positions int32 `[3, ...]` (t, h, w ≥ 0)."""
        largest = int(positions.max(initial=0))
        if largest >= self._tables[0].shape[1]:
            self._fill(2 * largest)
        parts: list[AnyArray] = [
            table.take(axis_positions, axis=1)
            for table, axis_positions in zip(self._tables, positions, strict=True)
        ]
        tables: AnyArray = np.concatenate(parts, axis=-1)
        return tables


def vision_rotary(grids: Sequence[Grid], config: VisionConfig, dtype: DTypeLike) -> AnyArray:
    """Tables `[2, n, D/2]` (cosines, sines) of the patches of `grids`, one after another: the first
    half of the pairs turns by the patch's row, the second by its column."""
    quarter = np.arange(0, config.head_dim // 2, 2, dtype=np.float32)
    exponents = quarter / np.float32(config.head_dim // 2)
    frequencies = (1.0 / np.float32(VISION_ROPE_THETA) ** exponents).astype(np.float32)
    positions = np.concatenate([_patch_positions(grid, config) for grid in grids])
    angles = (positions[:, :, None].astype(np.float32) * frequencies).reshape(len(positions), -1)
    tables: AnyArray = np.stack([np.cos(angles), np.sin(angles)]).astype(dtype)
    return tables


def _patch_positions(grid: Grid, config: VisionConfig) -> Int32Array:
    """Row and column, int32 `[t·h·w, 2]`, of patches ordered by merge × merge block."""
    merge = config.spatial_merge_size
    place = np.indices((grid.h, grid.w), np.int32).transpose(1, 2, 0)
    blocks = place.reshape(grid.h // merge, merge, grid.w // merge, merge, 2)
    frame = blocks.transpose(0, 2, 1, 3, 4).reshape(-1, 2)
    return np.tile(frame, (grid.t, 1))
