"""Frames to ViT patches, as Qwen2.5-VL's image processor does it.

Source: `transformers` `models/qwen2_vl/image_processing_qwen2_vl.py` (`smart_resize`, patchify).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np

from framesink.runtime.arrays import Float32Array, UInt8Array
from framesink.runtime.errors import VideoError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_ASPECT_RATIO = 200


@dataclass(frozen=True, slots=True)
class PreprocessConfig:
    """How frames become patches. Pixel limits are per frame; `fps` is frames per second of video
    time that the model is given."""

    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    min_pixels: int = 100_352
    max_pixels: int = 602_112
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    fps: float = 2.0

    @property
    def patch_dim(self) -> int:
        """Length of one flattened patch: channels × temporal patch × patch²."""
        return 3 * self.temporal_patch_size * self.patch_size**2


@dataclass(frozen=True, slots=True)
class Grid:
    """Patch grid of one vision input: temporal, vertical and horizontal patch counts."""

    t: int
    h: int
    w: int

    @property
    def patches(self) -> int:
        """Number of ViT patches."""
        return self.t * self.h * self.w

    def tokens(self, merge_size: int) -> int:
        """Number of language-model tokens after the patch merger."""
        return self.patches // merge_size**2


def smart_resize(
    height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """The size a frame is resized to: both sides multiples of `factor`, area within the limits.

    Raises VideoError for an empty frame or an aspect ratio above 200.
    """
    if height < 1 or width < 1:
        raise VideoError(f"A frame of {width}×{height} pixels has no area; check the video source.")
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise VideoError(
            f"A frame of {width}×{height} pixels is more than {MAX_ASPECT_RATIO} times as long as "
            "it is wide, which the vision encoder cannot take; crop the video first."
        )
    new_height = max(factor, round(height / factor) * factor)
    new_width = max(factor, round(width / factor) * factor)
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


def resize_frames(
    frames: Sequence[UInt8Array] | UInt8Array, config: PreprocessConfig
) -> UInt8Array:
    """Frames uint8 `[H, W, 3]`, all of one size, to uint8 `[T, H', W', 3]` of the model's size."""
    height, width = frames[0].shape[:2]
    new_height, new_width = _model_size(height, width, config)
    if (new_height, new_width) == (height, width):
        return np.ascontiguousarray(frames)
    shrinking = new_height * new_width < height * width
    interpolation = cv2.INTER_AREA if shrinking else cv2.INTER_CUBIC
    size = (new_width, new_height)
    return np.stack([cv2.resize(frame, size, interpolation=interpolation) for frame in frames])


def resized_grid(frames: Sequence[UInt8Array] | UInt8Array, config: PreprocessConfig) -> Grid:
    """The grid that frames uint8 `[T, H, W, 3]` of any size have after `resize_frames`. Raises what
    `smart_resize` raises."""
    height, width = _model_size(frames[0].shape[0], frames[0].shape[1], config)
    steps = -(-len(frames) // config.temporal_patch_size)
    return Grid(steps, height // config.patch_size, width // config.patch_size)


def frame_grid(frames: UInt8Array, config: PreprocessConfig) -> Grid:
    """The grid of frames uint8 `[T, H, W, 3]` that are of the model's size."""
    count, height, width = frames.shape[:3]
    steps = -(-count // config.temporal_patch_size)
    return Grid(steps, height // config.patch_size, width // config.patch_size)


def patchify(frames: UInt8Array, config: PreprocessConfig) -> tuple[Float32Array, Grid]:
    """Normalised patches of frames already of the model's size.

    `frames` is uint8 `[T, H, W, 3]` with H and W multiples of patch × merge; an odd T is completed
    by repeating the last frame. Returns float32 `[t·h·w, 3·temporal·patch²]` in the order the patch
    merger expects (merge × merge blocks are consecutive), and the grid.
    """
    temporal, patch, merge = config.temporal_patch_size, config.patch_size, config.merge_size
    count = len(frames)
    grid = frame_grid(frames, config)
    down, across = grid.h // merge, grid.w // merge
    table = normalised_levels(config)
    patches = np.empty(
        (grid.t, down, across, merge, merge, 3, temporal, patch, patch), dtype=np.float32
    )
    for index in range(grid.t * temporal):
        step, place = divmod(index, temporal)
        for channel, plane in enumerate(cv2.split(frames[min(index, count - 1)])):
            blocks = cv2.LUT(plane, table[channel]).reshape(
                down, merge, patch, across, merge, patch
            )
            patches[step, :, :, :, :, channel, place] = blocks.transpose(0, 3, 1, 4, 2, 5)
    return patches.reshape(grid.patches, config.patch_dim), grid


@lru_cache(maxsize=8)
def normalised_levels(config: PreprocessConfig) -> Float32Array:
    """What each of the 256 levels of each channel becomes: float32 `[3, 256]`."""
    levels = np.arange(256) / 255.0
    mean, std = np.asarray(config.mean)[:, None], np.asarray(config.std)[:, None]
    table: Float32Array = ((levels - mean) / std).astype(np.float32)
    return table


def _model_size(height: int, width: int, config: PreprocessConfig) -> tuple[int, int]:
    """What frames of `height` × `width` pixels are resized to."""
    return smart_resize(
        height,
        width,
        factor=config.patch_size * config.merge_size,
        min_pixels=config.min_pixels,
        max_pixels=config.max_pixels,
    )


def frames_to_patches(
    frames: Sequence[UInt8Array] | UInt8Array, config: PreprocessConfig
) -> tuple[Float32Array, Grid]:
    """Resize and patchify the frames (uint8 `[H, W, 3]` RGB each) of one chunk."""
    return patchify(resize_frames(frames, config), config)
