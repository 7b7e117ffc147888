"""Optimization profiles: the range of shapes a plan serves, derived from the bundle's limits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from framesink.runtime.errors import BuildError
from framesink.runtime.manifest import Limits, OptimizationProfile, ProfileShape, TensorSpec
from framesink.runtime.models.config import ModelConfig


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
    prefill = DimensionRange(1, limits.max_prefill, limits.max_prefill)
    decode = DimensionRange(1, 1, 1)
    profiles = []
    for name, batch_optimum, new_tokens in (("prefill", 1, prefill), ("decode", streams, decode)):
        table = DimensionRange(1, pages, pages)
        ranges = {
            "batch": DimensionRange(1, batch_optimum, streams),
            "new_tokens": new_tokens,
            "pages": table,
            "context_tokens": _scaled(table, page_size),
            "total_tokens": _added(_scaled(table, page_size), new_tokens),
            "pool_pages": DimensionRange(1, streams * pages + 1, streams * pages + 1),
        }
        profiles.append(_profile(name, inputs, ranges))
    return profiles[0], profiles[1]


def vision_profiles(
    inputs: Sequence[TensorSpec], limits: Limits, config: ModelConfig
) -> tuple[OptimizationProfile]:
    """The vision encoder's profile: from one merged token to `max_patches` patches."""
    unit = config.vision.merge_unit
    merged = DimensionRange(1, limits.max_patches // unit, limits.max_patches // unit)
    ranges = {"patches": _scaled(merged, unit), "merged_patches": merged}
    return (_profile("vision", inputs, ranges),)


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
