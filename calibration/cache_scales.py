"""The static scales of a quantized K/V cache, as tensors of a checkpoint."""

from collections.abc import Mapping, Sequence

import numpy as np

from framesink.calibration.formats import FP8, INT8, NumberFormat, clamp_dead, scale_of
from framesink.calibration.statistics import CacheStatistics
from framesink.runtime.arrays import Float32Array
from framesink.runtime.models.quantization import (
    CacheScheme,
    k_channel_scale,
    k_pair_scale,
    v_head_scale,
)
from framesink.runtime.models.weights import layer_name

CACHE_FORMATS: Mapping[CacheScheme, NumberFormat] = {CacheScheme.INT8: INT8, CacheScheme.FP8: FP8}
# How far beyond the largest magnitude that calibration saw numbers are still stored: hours of video
# hold keys that minutes did not, and one that saturates costs more than all rounding. FP8 rounds
# relative to the value, so a factor of two costs it nothing. Values gain nothing from headroom in
# INT8 (docs/accuracy.md).
KEY_HEADROOM: Mapping[CacheScheme, float] = {CacheScheme.INT8: 1.5, CacheScheme.FP8: 2.0}
VALUE_HEADROOM: Mapping[CacheScheme, float] = {CacheScheme.INT8: 1.0, CacheScheme.FP8: 2.0}


def cache_scales(
    layers: Sequence[CacheStatistics], scheme: CacheScheme
) -> tuple[dict[str, Float32Array], int]:
    """framesink's scales of every layer, and how many of K's channels and V's heads are dead.

    K before RoPE and without bias, per channel and per rotary pair; V per head.
    """
    tensors: dict[str, Float32Array] = {}
    dead = 0
    for index, layer in enumerate(layers):
        dead_channels = clamp_dead(layer.key_channel_amax)[1]
        dead_heads = clamp_dead(layer.value_head_amax)[1]
        tensors[k_channel_scale(index)] = key_scales(layer.key_channel_amax, scheme)
        tensors[k_pair_scale(index)] = key_scales(layer.key_pair_amax, scheme)
        tensors[v_head_scale(index)] = value_scales(layer.value_head_amax, scheme)
        dead += dead_channels + dead_heads
    return tensors, dead


def key_scales(amax: Float32Array, scheme: CacheScheme) -> Float32Array:
    """Scales of keys (of channels or of pairs) whose largest magnitudes are `amax`, with headroom;
    float32 of the same shape."""
    return _scales(amax, KEY_HEADROOM[scheme], scheme)


def value_scales(amax: Float32Array, scheme: CacheScheme) -> Float32Array:
    """Scales of values whose largest magnitudes are `amax`, with headroom; float32 of the same
    shape."""
    return _scales(amax, VALUE_HEADROOM[scheme], scheme)


def modelopt_cache_scales(
    layers: Sequence[CacheStatistics], scheme: CacheScheme
) -> dict[str, Float32Array]:
    """ModelOpt's scales of every layer: one for K after RoPE and with bias, one for V."""
    tensors: dict[str, Float32Array] = {}
    for index, layer in enumerate(layers):
        attention = f"{layer_name(index)}.self_attn"
        for name, amax in (
            (f"{attention}.k_proj.k_scale", layer.rotated_key_amax),
            (f"{attention}.v_proj.v_scale", layer.value_amax),
        ):
            tensors[name] = _scales(np.array(amax, dtype=np.float32), 1.0, scheme)
    return tensors


def _scales(amax: Float32Array, headroom: float, scheme: CacheScheme) -> Float32Array:
    clamped, _ = clamp_dead(amax)
    return scale_of(clamped * np.float32(headroom), CACHE_FORMATS[scheme])
