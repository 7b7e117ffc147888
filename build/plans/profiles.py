"""Optimization profiles: the range of shapes a plan serves, derived from the bundle's limits."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from framesink.runtime.errors import BuildError
from framesink.runtime.manifest import Limits, OptimizationProfile, ProfileShape, TensorSpec
from framesink.runtime.models.config import VisionConfig
from framesink.runtime.models.vision_segments import window_patches
from framesink.runtime.preprocess import PreprocessConfig


@dataclass(frozen=True, slots=True)
class DimensionRange:
    """Smallest, best and largest value of one dynamic dimension."""

    minimum: int
    optimum: int
    maximum: int


def pages_per_stream(limits: Limits, page_size: int) -> int:
    """Pages that one stream's longest context fills."""
    return -(-limits.max_context // page_size)


def language_model_profiles(
    inputs: Sequence[TensorSpec], limits: Limits, page_size: int
) -> tuple[OptimizationProfile, OptimizationProfile]:
    """The prefill profile (up to `max_prefill` new tokens) and the decode profile (exactly one).

    Raises BuildError when a graph input has a dynamic dimension that no limit bounds.
    """
    streams, pages = limits.max_streams, pages_per_stream(limits, page_size)
    table = DimensionRange(1, pages, pages)
    context = _scaled(table, page_size)
    pool = DimensionRange(1, streams * pages + 1, streams * pages + 1)

    def profile(name: str, batch: DimensionRange, new: DimensionRange) -> OptimizationProfile:
        ranges = {
            "batch": batch,
            "new": new,
            "pages": table,
            "context": context,
            "keys": _added(context, new),
            "pool": pool,
        }
        return _profile(name, inputs, ranges)

    return (
        profile(
            "prefill",
            DimensionRange(1, 1, streams),
            DimensionRange(1, limits.max_prefill, limits.max_prefill),
        ),
        profile("decode", DimensionRange(1, streams, streams), DimensionRange(1, 1, 1)),
    )


def vision_profiles(
    inputs: Sequence[TensorSpec],
    limits: Limits,
    config: VisionConfig,
    preprocess: PreprocessConfig,
) -> tuple[OptimizationProfile]:
    """The vision encoder's profile: as many of the largest frames as `max_patches` holds.

    Attention stays within a temporal step, so a reader may encode longer inputs step by step.
    """
    unit = config.merge_unit
    frame = min(largest_frame(preprocess, config), limits.max_patches)
    frames = max(1, limits.max_patches // frame)
    # A window is cut off at the frame's edges, so thin frames fill theirs badly. Of a frame of
    # h x w merged patches and windows of side s there are ceil(h/s) ceil(w/s) <= ceil(h w / s).
    side = max(1, math.isqrt(window_patches(config) // unit))
    windows = frames * -(-(frame // unit) // side)
    ranges = {
        "patches": DimensionRange(unit, limits.max_patches, limits.max_patches),
        "frames": DimensionRange(1, frames, frames),
        "frame_patches": DimensionRange(unit, frame, frame),
        "windows": DimensionRange(1, max(1, frames * frame // window_patches(config)), windows),
    }
    return (_profile("vision", inputs, ranges),)


def largest_frame(preprocess: PreprocessConfig, config: VisionConfig) -> int:
    """Patches of the largest frame that preprocessing lets through."""
    merged = preprocess.max_pixels // (config.patch_size * config.spatial_merge_size) ** 2
    return max(1, merged) * config.merge_unit


def _scaled(values: DimensionRange, factor: int) -> DimensionRange:
    return DimensionRange(values.minimum * factor, values.optimum * factor, values.maximum * factor)


def _added(first: DimensionRange, second: DimensionRange) -> DimensionRange:
    return DimensionRange(
        first.minimum + second.minimum,
        first.optimum + second.optimum,
        first.maximum + second.maximum,
    )


def _profile(
    name: str, inputs: Sequence[TensorSpec], ranges: Mapping[str, DimensionRange]
) -> OptimizationProfile:
    shapes = {}
    for spec in inputs:
        dimensions = []
        for dimension in spec.shape:
            if isinstance(dimension, int):
                dimensions.append(DimensionRange(dimension, dimension, dimension))
            elif dimension in ranges:
                dimensions.append(ranges[dimension])
            else:
                raise BuildError(
                    f"Input {spec.name} of the graph has a dynamic dimension {dimension!r} that no "
                    f"limit bounds; the {name} profile knows {', '.join(ranges)}."
                )
        shapes[spec.name] = ProfileShape(
            minimum=tuple(dimension.minimum for dimension in dimensions),
            optimum=tuple(dimension.optimum for dimension in dimensions),
            maximum=tuple(dimension.maximum for dimension in dimensions),
        )
    return OptimizationProfile(name=name, inputs=shapes)
