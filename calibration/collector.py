"""Taps that turn activations into statistics: a few numbers per channel are kept, never values."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from framesink.calibration.observers import Histogram
from framesink.calibration.statistics import (
    CacheStatistics,
    ChannelRange,
    LinearStatistics,
    Statistics,
)
from framesink.runtime.arrays import AnyArray
from framesink.runtime.errors import CheckpointError
from framesink.runtime.models.weights import layer_name

BINS = 2048
_SMALLEST_LIMIT = 2.0**-24
# histc counts in float32, which is exact up to 2²⁴.
_HISTC_ELEMENTS = 1 << 23


class StatisticsCollector:
    """Taps of a `TorchExecutor`; `statistics` gives what they saw.

    Memory is that of the statistics. Raises CheckpointError, naming the layer, at the first NaN or
    infinity.
    """

    def __init__(self) -> None:
        self._linears: dict[str, _Linear] = {}
        self._layers: dict[int, _Cache] = {}
        self._latest: tuple[Tensor, _Linear] | None = None

    def linear_input(self, name: str, inputs: Tensor) -> None:
        """See `Taps`. Layers that are given the same tensor share one record."""
        if self._latest is not None and self._latest[0] is inputs:
            self._linears[name] = self._latest[1]
            return
        linear = self._linears.setdefault(name, _Linear())
        linear.add(inputs.float(), f"The input of {name}")
        self._latest = inputs, linear

    def keys(self, layer: int, keys: Tensor, rotated: Tensor) -> None:
        """See `Taps`."""
        self._cache(layer).add_keys(
            keys.float(), rotated.float(), f"{layer_name(layer)}.self_attn.k_proj"
        )

    def values(self, layer: int, values: Tensor) -> None:
        """See `Taps`."""
        self._cache(layer).add_values(values.float(), f"{layer_name(layer)}.self_attn.v_proj")

    def statistics(self, *, checkpoint: str, source: str, chunks: int) -> Statistics:
        """All that was seen so far; the arguments are described there."""
        finished = {id(linear): linear.finish() for linear in self._linears.values()}
        return Statistics(
            checkpoint=checkpoint,
            source=source,
            chunks=chunks,
            linears={name: finished[id(linear)] for name, linear in self._linears.items()},
            layers=tuple(cache.finish() for _, cache in sorted(self._layers.items())),
        )

    def _cache(self, layer: int) -> "_Cache":
        return self._layers.setdefault(layer, _Cache())


class _Range:
    """The smallest and the largest value of each channel."""

    def __init__(self) -> None:
        self._minimum: Tensor | None = None
        self._maximum: Tensor | None = None

    def add(self, values: Tensor, what: str) -> float:
        """Take in `values [n, channels]`; returns their largest magnitude."""
        minimum, maximum = torch.aminmax(values, dim=0)  # NaN stays NaN
        amax = float(torch.maximum(-minimum, maximum).max())
        _require_finite(amax, what)
        if self._minimum is not None and self._maximum is not None:
            minimum = torch.minimum(self._minimum, minimum)
            maximum = torch.maximum(self._maximum, maximum)
        self._minimum, self._maximum = minimum, maximum
        return amax

    def finish(self) -> ChannelRange:
        assert self._minimum is not None
        assert self._maximum is not None
        return ChannelRange(_to_host(self._minimum), _to_host(self._maximum))


class _Histogram:
    """Counts of magnitudes in equal bins; the range doubles when a value lies beyond it."""

    def __init__(self) -> None:
        self._limit = _SMALLEST_LIMIT
        self._counts: Tensor | None = None
        self._amax = 0.0

    def add(self, values: Tensor, amax: float) -> None:
        """Take in values of any shape, `amax` being their largest magnitude."""
        if self._counts is None:
            self._counts = torch.zeros(BINS, dtype=torch.int64, device=values.device)
        self._amax = max(self._amax, amax)
        doublings = max(0, math.ceil(math.log2(amax / self._limit))) if amax > 0.0 else 0
        for _ in range(min(doublings, BINS.bit_length())):
            merged = self._counts.view(-1, 2).sum(1)
            self._counts = torch.cat([merged, torch.zeros_like(merged)])
        self._limit *= 2.0**doublings
        for part in values.abs().flatten().split(_HISTC_ELEMENTS):
            counts = torch.histc(part, BINS, min=0.0, max=self._limit)
            self._counts += counts.to(torch.int64)

    def finish(self) -> Histogram:
        assert self._counts is not None
        return Histogram(self._counts.cpu().numpy(), self._limit, self._amax)


@dataclass(slots=True, eq=False)
class _Linear:
    channels: _Range = field(default_factory=_Range)
    histogram: _Histogram = field(default_factory=_Histogram)
    square_sum: Tensor | None = None
    rows: int = 0

    def add(self, inputs: Tensor, what: str) -> None:
        amax = self.channels.add(inputs, what)
        self.histogram.add(inputs, amax)
        squares = inputs.square().sum(0, dtype=torch.float64)
        self.square_sum = squares if self.square_sum is None else self.square_sum + squares
        self.rows += len(inputs)

    def finish(self) -> LinearStatistics:
        assert self.square_sum is not None
        return LinearStatistics(
            channels=self.channels.finish(),
            mean_square=_to_host((self.square_sum / self.rows).float()),
            histogram=self.histogram.finish(),
            rows=self.rows,
        )


@dataclass(slots=True, eq=False)
class _Cache:
    channels: _Range = field(default_factory=_Range)
    pair_amax: Tensor | None = None
    value_amax: Tensor | None = None
    rotated_amax: float = 0.0
    rows: int = 0

    def add_keys(self, keys: Tensor, rotated: Tensor, what: str) -> None:
        self.channels.add(keys.flatten(1), f"The output of {what}")
        largest = float(rotated.abs().max())
        _require_finite(largest, f"The rotated output of {what}")
        self.rotated_amax = max(self.rotated_amax, largest)
        first, second = keys.chunk(2, dim=-1)
        pairs = torch.hypot(first, second).flatten(1).amax(0)
        self.pair_amax = _largest(self.pair_amax, pairs)
        self.rows += len(keys)

    def add_values(self, values: Tensor, what: str) -> None:
        amax = values.abs().amax(dim=(0, 2))
        _require_finite(float(amax.max()), f"The output of {what}")
        self.value_amax = _largest(self.value_amax, amax)

    def finish(self) -> CacheStatistics:
        assert self.pair_amax is not None
        assert self.value_amax is not None
        return CacheStatistics(
            keys=self.channels.finish(),
            key_pair_amax=_to_host(self.pair_amax),
            rotated_key_amax=self.rotated_amax,
            value_head_amax=_to_host(self.value_amax),
            rows=self.rows,
        )


def _largest(before: Tensor | None, now: Tensor) -> Tensor:
    return now if before is None else torch.maximum(before, now)


def _require_finite(amax: float, what: str) -> None:
    if not math.isfinite(amax):
        raise CheckpointError(
            f"{what} holds NaN or infinite values; the checkpoint is damaged, or its activations "
            "leave the range of the type it was observed in."
        )


def _to_host(values: Tensor) -> AnyArray:
    array: AnyArray = values.cpu().numpy()
    return array
