"""The operations without weights that both model parts are made of, in numpy float32."""

import math
from collections.abc import Sequence

import numpy as np

from framesink.runtime.arrays import Float32Array, Int32Array


def silu(inputs: Float32Array) -> Float32Array:
    """x · sigmoid(x), without overflow for large negative x."""
    half = np.float32(0.5)
    result: Float32Array = inputs * (half * np.tanh(half * inputs) + half)
    return result


def gelu(inputs: Float32Array) -> Float32Array:
    """The exact GELU, x · Φ(x)."""
    erf = np.frompyfunc(math.erf, 1, 1)
    halves = 0.5 + 0.5 * erf(inputs / math.sqrt(2.0)).astype(np.float32)
    result: Float32Array = inputs * halves
    return result


def rotate(inputs: Float32Array, cos: Float32Array, sin: Float32Array) -> Float32Array:
    """Rotary embedding of `inputs [n, heads, D]` by angles given as `cos, sin [n, D/2]`."""
    first, second = np.split(inputs, 2, axis=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attention(
    queries: Float32Array,
    keys: Float32Array,
    values: Float32Array,
    segments: Sequence[Int32Array],
    *,
    causal: bool,
) -> tuple[Float32Array, Float32Array]:
    """Attention of `[n, heads, D]` within each segment of rows; key/value heads may be fewer.

    Returns `[n, heads, D]`, and per segment and head the largest magnitude of a scaled score.
    """
    count, heads, head_dim = queries.shape
    shared = heads // keys.shape[1]
    scale = np.float32(head_dim**-0.5)
    outputs = np.empty((count, heads, head_dim), dtype=np.float32)
    largest = np.empty((len(segments), heads), dtype=np.float32)
    for number, rows in enumerate(segments):
        future = np.triu(np.ones((len(rows), len(rows)), dtype=np.bool_), k=1)
        for head in range(heads):
            scores = queries[rows, head] @ keys[rows, head // shared].T * scale
            largest[number, head] = np.abs(scores).max()
            if causal:
                scores[future] = -np.inf
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
            outputs[rows, head] = weights @ values[rows, head // shared]
    return outputs, largest
