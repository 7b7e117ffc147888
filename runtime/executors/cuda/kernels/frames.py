"""Frames as they came to the patches of the vision encoder: resized, normalised, sorted."""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from framesink.runtime.executors.cuda.kernels.overlap import await_inputs, overlapping
from framesink.runtime.preprocess import Grid, PreprocessConfig


@dataclass(frozen=True, slots=True, eq=False)
class DeviceFilter:
    """`framesink.runtime.executors.cuda.resampling.FrameFilter` on the GPU: indices int32 and
    weights float32, `[H', K]` of rows and `[W', K]` of columns."""

    row_index: Tensor
    row_weight: Tensor
    column_index: Tensor
    column_weight: Tensor
    tie: float
    fixed_point: bool


def frames_to_patches(
    frames: Tensor,
    resampling: DeviceFilter,
    levels: Tensor,
    grid: Grid,
    config: PreprocessConfig,
    out: Tensor,
) -> None:
    """Chunks of frames uint8 `[N, T, H, W, 3]` to patches `[N·t·h·w, patch_dim]`, in the order of
    `framesink.runtime.preprocess.patchify`, where `grid` is that of one chunk after resizing.

    `levels` float32 `[3, 256]` is what every level of a channel becomes. A frame that is missing at
    the end of a chunk is the last one again. A pixel is resized in float32 and rounded to a level,
    as on the host.
    """
    count, height, width = frames.shape[1:4]
    temporal, patch, merge = config.temporal_patch_size, config.patch_size, config.merge_size
    values = temporal * patch * patch
    _frames_to_patches[(len(out), 3)](
        frames,
        resampling.row_index,
        resampling.row_weight,
        resampling.column_index,
        resampling.column_weight,
        levels,
        out,
        resampling.tie,
        count,
        height,
        width,
        grid.t,
        grid.h // merge,
        grid.w // merge,
        resampling.row_index.shape[1],
        resampling.column_index.shape[1],
        TEMPORAL=temporal,
        PATCH=patch,
        MERGE=merge,
        BLOCK=triton.next_power_of_2(values),
        FIXED_POINT=resampling.fixed_point,
        num_warps=4,
        **overlapping(out.device),
    )


# Cameras have many sizes: none gets code of its own.
@triton.jit(
    do_not_specialize=(
        "count",
        "height",
        "width",
        "steps",
        "down",
        "across",
        "row_taps",
        "column_taps",
    )
)
def _frames_to_patches(
    frames,
    row_index,
    row_weight,
    column_index,
    column_weight,
    levels,
    out,
    tie,
    count,
    height,
    width,
    steps,
    down,
    across,
    row_taps,
    column_taps,
    TEMPORAL: tl.constexpr,
    PATCH: tl.constexpr,
    MERGE: tl.constexpr,
    BLOCK: tl.constexpr,
    FIXED_POINT: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    await_inputs(OVERLAP)
    patch = tl.program_id(0)
    channel = tl.program_id(1)
    corner = patch % (MERGE * MERGE)
    merged = patch // (MERGE * MERGE)
    step = merged // (down * across)
    top = (merged // across % down * MERGE + corner // MERGE) * PATCH
    left = (merged % across * MERGE + corner % MERGE) * PATCH

    value = tl.arange(0, BLOCK)
    exists = value < TEMPORAL * PATCH * PATCH
    row = top + value // PATCH % PATCH
    column = left + value % PATCH
    within = step % steps * TEMPORAL + value // (PATCH * PATCH)
    frame = step // steps * count + tl.minimum(within, count - 1)
    pixels = frames + frame.to(tl.int64) * height * width * 3 + channel
    total = tl.zeros((BLOCK,), tl.int32 if FIXED_POINT else tl.float32)
    for row_tap in range(row_taps):
        above = tl.load(row_index + row * row_taps + row_tap, mask=exists, other=0)
        weight = tl.load(row_weight + row * row_taps + row_tap, mask=exists, other=0.0)
        line = tl.zeros((BLOCK,), tl.float32)
        for tap in range(column_taps):
            beside = tl.load(column_index + column * column_taps + tap, mask=exists, other=0)
            share = tl.load(column_weight + column * column_taps + tap, mask=exists, other=0.0)
            level = tl.load(pixels + (above * width + beside) * 3, mask=exists, other=0)
            line += level.to(tl.float32) * share
        if FIXED_POINT:
            total += ((line.to(tl.int32) >> 4) * weight.to(tl.int32)) >> 16
        else:
            total += line * weight
    if FIXED_POINT:
        rounded = (total + 2) >> 2
    else:
        # Adding 1.5 · 2²³ leaves no bits for a fraction: the sum is rounded to a whole number.
        rounded = (total + tie + 12582912.0 - 12582912.0).to(tl.int32)
    level = tl.minimum(tl.maximum(rounded, 0), 255)
    result = tl.load(levels + channel * 256 + level, mask=exists, other=0.0)
    size = TEMPORAL * PATCH * PATCH
    place = (patch * 3 + channel).to(tl.int64) * size + value
    tl.store(out + place, result, mask=exists)
