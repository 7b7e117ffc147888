"""The inputs of the vision encoder's graph that depend on the grid of patches alone."""

from numpy.typing import DTypeLike

from framesink.runtime.arrays import AnyArray
from framesink.runtime.models.config import VisionConfig
from framesink.runtime.models.vision_segments import frame_segments, window_segments
from framesink.runtime.preprocess import Grid
from framesink.runtime.rope import vision_rotary

# A live session has one grid, and another after a change of resolution.
CACHED_GRIDS = 16


def vision_layout(grid: Grid, config: VisionConfig, dtype: DTypeLike) -> dict[str, AnyArray]:
    """By graph input, in the shapes of docs/architecture.md: rotary tables, and the index, inverse
    and mask of windows and frames. A graph has those of the kinds of attention its model has."""
    cos, sin = vision_rotary([grid], config, dtype)
    layout = {"cos": cos, "sin": sin}
    segments = {"window": window_segments([grid], config), "frame": frame_segments([grid])}
    for kind, segment in segments.items():
        layout[f"{kind}_index"] = segment.index
        layout[f"{kind}_inverse"] = segment.inverse
        layout[f"{kind}_mask"] = segment.mask.astype(dtype)
    return layout
