"""The arithmetic of the fake model: 64-bit hashes where a real one has keys, values and logits."""

import numpy as np
from numpy.typing import NDArray

from framesink.runtime.arrays import Float32Array, Int32Array

UInt64Array = NDArray[np.uint64]

_FACTORS = np.array(
    [0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93],
    dtype=np.uint64,
)


def mix(values: UInt64Array, positions: Int32Array) -> UInt64Array:
    """Hash of each value uint64 `[n]` at its position int32 `[3, n]`."""
    t, h, w = positions.astype(np.uint64)
    mixed = values * _FACTORS[0] ^ (t * _FACTORS[1] + h * _FACTORS[2] + w * _FACTORS[3])
    mixed ^= mixed >> np.uint64(29)
    mixed *= _FACTORS[2]
    return mixed ^ (mixed >> np.uint64(32))


def attend(values: UInt64Array, positions: Int32Array) -> int:
    """What attention is here: a digest of rows at positions, whatever order they are read in."""
    return int(mix(values, positions).sum(dtype=np.uint64))


def row_value(content: int, position: Int32Array, digest: int) -> int:
    """The row a token leaves behind: its content, its position, and all it attended to."""
    seed = np.array([content ^ digest], dtype=np.uint64)
    return int(mix(seed, position.reshape(3, 1))[0])


def embedding_content(embedding: Float32Array) -> int:
    """The content of a vision token, from its embedding float32 `[hidden]`."""
    return int(np.frombuffer(embedding.astype(np.float32).tobytes(), dtype=np.uint64).sum())


def logits_of(digest: int, vocabulary: int, likely: list[int]) -> Float32Array:
    """Logits float32 `[vocabulary]` that depend on every bit of the digest.

    Half of the time the likeliest token is one of `likely`.
    """
    random = np.random.default_rng(digest)
    logits = random.random(vocabulary, dtype=np.float32)
    if random.random() < 0.5:
        logits[likely[int(random.integers(len(likely)))]] += 1.0
    return logits
