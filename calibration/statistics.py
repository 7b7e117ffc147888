"""What calibration saw of every layer: a few numbers per channel, however long the video was."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from framesink.calibration.formats import NumberFormat
from framesink.calibration.observers import Histogram, Observer
from framesink.runtime.arrays import Float32Array
from framesink.runtime.errors import CheckpointError


@dataclass(frozen=True, slots=True, eq=False)
class ChannelRange:
    """The smallest and the largest value of each channel, float32 `[n]`."""

    minimum: Float32Array
    maximum: Float32Array

    @property
    def amax(self) -> Float32Array:
        """The largest magnitude of each channel, float32 `[n]`."""
        return np.maximum(np.abs(self.minimum), np.abs(self.maximum))

    @property
    def dead(self) -> int:
        """Channels that were always 0."""
        return int(np.count_nonzero(self.amax == 0.0))

    @property
    def constant(self) -> int:
        """Channels that always had one value, which is not 0."""
        return int(np.count_nonzero((self.minimum == self.maximum) & (self.amax != 0.0)))


@dataclass(frozen=True, slots=True, eq=False)
class LinearStatistics:
    """The inputs `[rows, in]` of a linear layer: the range and the mean square (float32 `[in]`) of
    each channel, and the magnitudes of all values."""

    channels: ChannelRange
    mean_square: Float32Array
    histogram: Histogram
    rows: int

    @property
    def amax(self) -> Float32Array:
        """The largest magnitude of each input channel, float32 `[in]`."""
        return self.channels.amax


@dataclass(frozen=True, slots=True, eq=False)
class CacheStatistics:
    """The keys and values of a decoder layer, `rows` tokens of them.

    Keys before RoPE and without bias: `keys` the range of each channel (`[Hkv·D]`), `key_pair_amax`
    float32 `[Hkv·D/2]` the largest norm of each rotary pair (channels j and j + D/2 of a head),
    which bounds it under any rotation. `rotated_key_amax` is the largest magnitude after RoPE and
    with bias. `value_head_amax` float32 `[Hkv]` is the largest magnitude of each head of V.
    """

    keys: ChannelRange
    key_pair_amax: Float32Array
    rotated_key_amax: float
    value_head_amax: Float32Array
    rows: int

    @property
    def key_channel_amax(self) -> Float32Array:
        """The largest magnitude of each key channel, float32 `[Hkv·D]`."""
        return self.keys.amax

    @property
    def value_amax(self) -> float:
        """The largest magnitude of V."""
        return float(self.value_head_amax.max())


@dataclass(frozen=True, slots=True, eq=False)
class Statistics:
    """All that was seen of a checkpoint.

    `checkpoint` is its fingerprint, `source` says in words which video was shown, in how many
    `chunks`. `linears` goes by canonical names without `.weight`; `layers` are the decoder layers.
    """

    checkpoint: str
    source: str
    chunks: int
    linears: Mapping[str, LinearStatistics]
    layers: tuple[CacheStatistics, ...]

    def input_amax(self, linear: str, observer: Observer, number_format: NumberFormat) -> float:
        """The largest input of a linear layer that is to be represented; 0 for a dead input.

        Raises CheckpointError for a layer that was not seen.
        """
        if linear not in self.linears:
            raise CheckpointError(f"Calibration saw no input of {linear}; calibrate again.")
        return self.linears[linear].histogram.range(observer, number_format)

    @property
    def dead_channels(self) -> int:
        """Channels of inputs and keys that were always 0."""
        return sum(channels.dead for channels in self._all_channels())

    @property
    def constant_channels(self) -> int:
        """Channels of inputs and keys that never changed, and are not 0."""
        return sum(channels.constant for channels in self._all_channels())

    def _all_channels(self) -> Iterable[ChannelRange]:
        # Layers that read the same input have the same statistics.
        linears = {id(linear): linear.channels for linear in self.linears.values()}
        return [*linears.values(), *(layer.keys for layer in self.layers)]
