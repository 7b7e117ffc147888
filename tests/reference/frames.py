"""Seeded synthetic frames, of sizes that need no resizing."""

import numpy as np
from numpy.typing import NDArray


def moving_frames(
    chunk: int, *, height: int = 56, width: int = 84, count: int = 2, seed: int = 0
) -> NDArray[np.uint8]:
    """`count` frames uint8 `[count, height, width, 3]`: smooth colour waves that move with time,
    under noise; every chunk and every seed differs."""
    generator = np.random.default_rng((seed, chunk))
    phases = np.random.default_rng(seed).uniform(0, 2 * np.pi, 3)
    rows = np.arange(height)[:, None, None] / height
    columns = np.arange(width)[None, :, None] / width
    frames = []
    for step in range(count):
        time = chunk + step / count
        wave = np.sin(6 * rows + phases + 0.9 * time) * np.cos(5 * columns - 0.7 * time + phases)
        noise = generator.normal(0, 25, (height, width, 3))
        frames.append(np.clip(127 + 100 * wave + noise, 0, 255).astype(np.uint8))
    return np.stack(frames)
