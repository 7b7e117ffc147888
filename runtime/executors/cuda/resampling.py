"""The filters frames are resized with, as OpenCV's `resize` applies them on the host.

Source: OpenCV 4 `modules/imgproc/src/resize.cpp` (`computeResizeAreaTab`, `interpolateCubic`, and
the linear filter that INTER_AREA becomes where one side grows). Of cubic filters OpenCV has two:
one of whole weights, and with Intel's IPP, as in its wheels for x86-64, one of fractions. This is
the latter.
"""

from dataclasses import dataclass

import numpy as np

from framesink.runtime.arrays import AnyArray, Float32Array, Int32Array

# Weights of the linear filter are whole multiples of 1/2048.
FIXED_ONE = 2048
# What covers less of a source pixel than this is left out.
_LEAST_COVER = 1e-3
_CUBIC = -0.75


@dataclass(frozen=True, slots=True, eq=False)
class AxisFilter:
    """Every output along one axis is the sum of K inputs: `index` int32 `[n, K]` says which,
    `weight` float32 `[n, K]` how much of each."""

    index: Int32Array
    weight: Float32Array


@dataclass(frozen=True, slots=True, eq=False)
class FrameFilter:
    """Both axes, and how results are rounded.

    A result is rounded to the nearest after `tie` was added, which settles where halves go. If
    `fixed_point`, weights count in 1/2048, and rows are added as whole numbers:
    `(Σ (⌊row / 16⌋ · weight) / 2¹⁶ + 2) / 4`, every quotient rounded down.
    """

    rows: AxisFilter
    columns: AxisFilter
    tie: float
    fixed_point: bool


def frame_filter(source: tuple[int, int], target: tuple[int, int]) -> FrameFilter:
    """The filter that `framesink.runtime.preprocess.resize_frames` uses from size `source` to size
    `target`, both (height, width)."""
    sizes = list(zip(source, target, strict=True))
    if source == target:
        rows, columns = (_identity(after) for _, after in sizes)
        return FrameFilter(rows, columns, tie=0.0, fixed_point=False)
    if target[0] * target[1] >= source[0] * source[1]:
        rows, columns = (_cubic(before, after) for before, after in sizes)
        return FrameFilter(rows, columns, tie=0.0, fixed_point=False)
    if any(after > before for before, after in sizes):
        rows, columns = (_linear(before, after) for before, after in sizes)
        return FrameFilter(rows, columns, tie=0.0, fixed_point=True)
    rows, columns = (_area(before, after) for before, after in sizes)
    # Of four pixels the mean is taken in whole numbers, and its halves are rounded up.
    halved = all(before == 2 * after for before, after in sizes)
    return FrameFilter(rows, columns, tie=0.125 if halved else 0.0, fixed_point=False)


def _identity(size: int) -> AxisFilter:
    index = np.arange(size, dtype=np.int32)[:, None]
    return AxisFilter(index, np.ones((size, 1), np.float32))


def _area(before: int, after: int) -> AxisFilter:
    """The mean of what an output covers."""
    scale = 1.0 / (after / before)
    start = np.arange(after) * scale
    end = start + scale
    cell = np.minimum(scale, before - start)
    last = np.minimum(np.floor(end).astype(int), before - 1)
    first = np.minimum(np.ceil(start).astype(int), last)
    place = first[:, None] - 1 + np.arange((last - first).max() + 2)
    inside = (place >= first[:, None]) & (place < last[:, None])
    head, tail = first - start, np.minimum(np.minimum(end - last, 1.0), cell)
    weight = np.where(inside, 1.0, 0.0)
    weight += np.where(place < first[:, None], np.where(head > _LEAST_COVER, head, 0.0)[:, None], 0)
    is_last = place == last[:, None]
    weight += np.where(is_last, np.where(end - last > _LEAST_COVER, tail, 0.0)[:, None], 0)
    return _axis(place, weight / cell[:, None], before)


def _linear(before: int, after: int) -> AxisFilter:
    """Two neighbours, weighted as if the output were an area."""
    ratio = after / before
    output = np.arange(after)
    first = np.floor(output * (1.0 / ratio)).astype(int)
    part = ((output + 1) - (first + 1) * ratio).astype(np.float32)
    part = np.where(part <= 0, 0, part - np.floor(part))
    beyond = first >= before - 1
    first, part = np.where(beyond, before - 1, first), np.where(beyond, 0, part)
    weight = np.rint(np.stack([1 - part, part], axis=1) * FIXED_ONE)
    return _axis(first[:, None] + np.arange(2), weight, before)


def _cubic(before: int, after: int) -> AxisFilter:
    """Four neighbours (Keys, 1981)."""
    centre = (np.arange(after) + 0.5) * (1.0 / (after / before)) - 0.5
    first = np.floor(centre).astype(int)
    distance = np.abs(centre[:, None] - first[:, None] - np.arange(-1, 3))
    near = ((_CUBIC + 2) * distance - (_CUBIC + 3)) * distance**2 + 1
    far = ((_CUBIC * distance - 5 * _CUBIC) * distance + 8 * _CUBIC) * distance - 4 * _CUBIC
    weight = np.where(distance <= 1, near, far)
    return _axis(first[:, None] + np.arange(-1, 3), weight, before)


def _axis(place: AnyArray, weight: AnyArray, size: int) -> AxisFilter:
    """A filter whose inputs beyond an edge are those at the edge."""
    index = place.clip(0, size - 1).astype(np.int32)
    return AxisFilter(np.ascontiguousarray(index), np.ascontiguousarray(weight, np.float32))
