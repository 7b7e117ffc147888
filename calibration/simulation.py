"""Simulated quantization with the scales that calibration measured."""

from collections.abc import Sequence

import numpy as np

from framesink.calibration.cache_scales import (
    CACHE_FORMATS,
    KEY_HEADROOM,
    key_scales,
    value_scales,
)
from framesink.calibration.fake_cache import (
    FakeCache,
    KeyForm,
    KeysPerChannel,
    KeysPerChannelWithBias,
    KeysPerPair,
    KeysPerTensorRotated,
)
from framesink.calibration.fake_quantization import FakeLinear
from framesink.calibration.formats import FP8, INT8, NumberFormat, clamp_dead, scale_of
from framesink.calibration.observers import Observer
from framesink.calibration.recipe import Alpha
from framesink.calibration.smoothing_plan import plan_smoothing
from framesink.calibration.statistics import Statistics
from framesink.runtime.arrays import AnyArray, Float32Array
from framesink.runtime.models.checkpoint import Checkpoint
from framesink.runtime.models.quantization import CacheScheme, LinearScheme, Quantization
from framesink.runtime.models.weights import layer_name

_W8A8_FORMATS = {LinearScheme.FP8: FP8, LinearScheme.INT8: INT8}


def simulate_linears(
    checkpoint: Checkpoint,
    statistics: Statistics,
    quantization: Quantization,
    *,
    observer: Observer = Observer.ABSMAX,
    alpha: Alpha = "search",
) -> dict[str, FakeLinear]:
    """The quantized linear layers of a description, their input ranges chosen by `observer`.

    INT8 W8A8 layers are smoothed with `alpha` (SmoothQuant), "search" picks it for each group that
    shares its input. Raises CheckpointError for a W8A8 layer that calibration did not see.
    """
    plan = plan_smoothing(checkpoint, statistics, quantization, alpha=alpha, fold=False)
    linears: dict[str, FakeLinear] = {}
    for name, scheme in quantization.linears.items():
        factors = plan.factors.get(name)
        scale: float | None = None
        if scheme in _W8A8_FORMATS:
            number_format = _W8A8_FORMATS[scheme]
            if factors is None:
                amax = statistics.input_amax(name, observer, number_format)
            else:
                amax = float((statistics.linears[name].amax * factors).max())
            scale = _scale(amax, number_format)
        if scheme is not LinearScheme.UNQUANTIZED:
            linears[name] = FakeLinear(scheme, scale, factors, quantization.int4_group)
    return linears


def simulate_cache(statistics: Statistics, scheme: CacheScheme) -> FakeCache | None:
    """framesink's cache: keys per channel before RoPE without bias, values per head."""
    if scheme is CacheScheme.UNQUANTIZED:
        return None
    forms = [
        KeysPerChannel(key_scales(layer.key_channel_amax, scheme)) for layer in statistics.layers
    ]
    return _with_head_values(statistics, scheme, forms)


def simulate_pair_cache(statistics: Statistics, scheme: CacheScheme) -> FakeCache:
    """The form for rotated keys: per rotary pair, without bias; values per head."""
    forms = [KeysPerPair(key_scales(layer.key_pair_amax, scheme)) for layer in statistics.layers]
    return _with_head_values(statistics, scheme, forms)


def simulate_rotated_cache(statistics: Statistics, scheme: CacheScheme) -> FakeCache:
    """The usual cache, for comparison: keys after RoPE with bias and values, one scale each."""
    number_format = CACHE_FORMATS[scheme]
    keys = [
        KeysPerTensorRotated(_scale(layer.rotated_key_amax, number_format))
        for layer in statistics.layers
    ]
    values = [_scales(np.array([layer.value_amax]), number_format) for layer in statistics.layers]
    return FakeCache(number_format, tuple(keys), tuple(values))


def simulate_biased_cache(
    statistics: Statistics, scheme: CacheScheme, checkpoint: Checkpoint
) -> FakeCache:
    """framesink's cache, but with K's bias in what is quantized, for comparison. Each channel's
    range is that of its keys, with the same headroom, and its bias together."""
    number_format, headroom = CACHE_FORMATS[scheme], KEY_HEADROOM[scheme]
    forms = []
    for index, layer in enumerate(statistics.layers):
        bias = np.asarray(checkpoint.read(f"{layer_name(index)}.self_attn.k_proj.bias"))
        low, high = layer.keys.minimum * headroom + bias, layer.keys.maximum * headroom + bias
        amax = np.maximum(np.abs(low), np.abs(high)).astype(np.float32)
        forms.append(KeysPerChannelWithBias(_scales(amax, number_format)))
    return _with_head_values(statistics, scheme, forms)


def _with_head_values(
    statistics: Statistics, scheme: CacheScheme, forms: Sequence[KeyForm]
) -> FakeCache:
    values = [value_scales(layer.value_head_amax, scheme) for layer in statistics.layers]
    return FakeCache(CACHE_FORMATS[scheme], tuple(forms), tuple(values))


def _scale(amax: float, number_format: NumberFormat) -> float:
    return float(_scales(np.array([amax]), number_format)[0])


def _scales(amax: AnyArray, number_format: NumberFormat) -> Float32Array:
    return scale_of(clamp_dead(amax.astype(np.float32))[0], number_format)
