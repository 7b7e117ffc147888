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


def cache_scales(
    layers: Sequence[CacheStatistics], scheme: CacheScheme
) -> tuple[dict[str, Float32Array], int]:
    """framesink's scales of every layer, and how many of K's channels and V's heads are dead.

    K before RoPE and without bias, per channel and per rotary pair; V per head.
    """
    number_format = CACHE_FORMATS[scheme]
    tensors: dict[str, Float32Array] = {}
    dead = 0
    for index, layer in enumerate(layers):
        channels, dead_channels = clamp_dead(layer.key_channel_amax)
        pairs, _ = clamp_dead(layer.key_pair_amax)
        heads, dead_heads = clamp_dead(layer.value_head_amax)
        tensors[k_channel_scale(index)] = scale_of(channels, number_format)
        tensors[k_pair_scale(index)] = scale_of(pairs, number_format)
        tensors[v_head_scale(index)] = scale_of(heads, number_format)
        dead += dead_channels + dead_heads
    return tensors, dead


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
            clamped, _ = clamp_dead(np.array(amax, dtype=np.float32))
            tensors[name] = scale_of(clamped, CACHE_FORMATS[scheme])
    return tensors
