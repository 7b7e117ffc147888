"""Endless chunks to measure with: generated frames, or a clip over and over."""

import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path

import cv2
import numpy as np

from framesink.runtime.arrays import UInt8Array
from framesink.runtime.video.capture import ChunkStream
from framesink.runtime.video.chunk import Chunk
from framesink.runtime.video.cutter import frames_per_chunk
from framesink.runtime.video.source import open_source

_TEXTURE_MARGIN = 64
# Of a video that is repeated.
_CHUNKS_KEPT = 4


def generated_chunks(
    height: int, width: int, fps: float, chunk_seconds: float, seed: int = 0
) -> Iterator[Chunk]:
    """Chunks of a drifting texture with a moving disc; every frame differs, the seed decides all.

    Frames are uint8 `[height, width, 3]`.
    """
    random = np.random.default_rng(seed)
    texture = _texture(random, height + _TEXTURE_MARGIN, width + _TEXTURE_MARGIN)
    count = frames_per_chunk(fps, chunk_seconds)
    number = 0
    while True:
        t0 = number * chunk_seconds
        frames = np.stack([_frame(texture, random, height, width) for _ in range(count)])
        yield Chunk(
            frames=frames,
            t0=t0,
            t1=t0 + chunk_seconds,
            timestamps=tuple(t0 + i * chunk_seconds / count for i in range(count)),
            captured_at=time.monotonic(),
        )
        number += 1


def clip_chunks(path: Path, fps: float, chunk_seconds: float) -> Iterator[Chunk]:
    """Chunks of a clip over and over, in one endless video time. Raises VideoError as its source
    does."""
    offset = 0.0
    while True:
        end = offset
        with ChunkStream(open_source(path), fps, chunk_seconds, realtime=False) as chunks:
            for chunk in chunks:
                end = offset + chunk.t1
                yield replace(
                    chunk,
                    t0=offset + chunk.t0,
                    t1=end,
                    timestamps=tuple(offset + seconds for seconds in chunk.timestamps),
                    captured_at=time.monotonic(),
                )
        offset = end


def repeated(chunks: Iterator[Chunk]) -> Iterator[Chunk]:
    """The first few chunks of a video again and again, which take no time to make."""
    return cycle(list(islice(chunks, _CHUNKS_KEPT)))


def _texture(random: np.random.Generator, height: int, width: int) -> UInt8Array:
    coarse = random.integers(0, 256, (max(2, height // 16), max(2, width // 16), 3), dtype=np.uint8)
    texture: UInt8Array = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return texture


def _frame(texture: UInt8Array, random: np.random.Generator, height: int, width: int) -> UInt8Array:
    down, across = (int(value) for value in random.integers(0, _TEXTURE_MARGIN, 2))
    frame = texture[down : down + height, across : across + width].copy()
    centre = (int(random.integers(width)), int(random.integers(height)))
    colour = tuple(int(value) for value in random.integers(0, 256, 3))
    cv2.circle(frame, centre, max(2, min(height, width) // 8), colour, cv2.FILLED)
    return frame
