"""Which optimization profile runs which shapes, and to which sizes a step is filled up.

Shapes that come again can be captured as CUDA graphs and need no new kernels. A step's batch and
block table are filled up to a few sizes for that.
"""

from collections.abc import Mapping, Sequence

from framesink.runtime.manifest import OptimizationProfile, ProfileShape

Shapes = Mapping[str, tuple[int, ...]]
# Lengths of block table that a step is filled up to.
PAGE_STEPS = 16


def fits(profile: OptimizationProfile, shapes: Shapes) -> bool:
    """Whether a profile has every input of `shapes`, and its shape within its bounds."""
    return all(
        name in profile.inputs and _within(profile.inputs[name], shape)
        for name, shape in shapes.items()
    )


def choose_profile(profiles: Sequence[OptimizationProfile], shapes: Shapes) -> int | None:
    """The number of the tightest profile that `shapes` fit, None if there is none: kernels are
    chosen for a profile's own sizes."""
    fitting = [number for number, profile in enumerate(profiles) if fits(profile, shapes)]
    return min(fitting, key=lambda number: _extent(profiles[number]), default=None)


def filled_pages(pages: int, largest: int) -> int:
    """The length that a block table of `pages` is filled up to."""
    unit = -(-largest // PAGE_STEPS)
    return min(largest, -(-pages // unit) * unit) if pages <= largest else pages


def filled_batch(count: int, largest: int) -> int:
    """The number of sequences that a decode step of `count` is filled up to: a power of two up to
    8, then a multiple of 8."""
    size = 1 << (count - 1).bit_length() if count <= 8 else -(-count // 8) * 8
    return max(count, min(size, largest))


def _within(bounds: ProfileShape, shape: tuple[int, ...]) -> bool:
    return len(shape) == len(bounds.minimum) and all(
        low <= size <= high
        for low, size, high in zip(bounds.minimum, shape, bounds.maximum, strict=True)
    )


def _extent(profile: OptimizationProfile) -> int:
    return sum(sum(bounds.maximum) for bounds in profile.inputs.values())
