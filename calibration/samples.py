"""The video a model is observed on: chunks of given files, or of a generated scene."""

import itertools
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from framesink.runtime.arrays import UInt8Array
from framesink.runtime.preprocess import PreprocessConfig

GENERATED_SIZE = 448
_SEED = 20250612


def sample_chunks(
    videos: Sequence[Path], preprocess: PreprocessConfig, *, chunk_seconds: float, count: int
) -> list[UInt8Array]:
    """Frames uint8 `[T, H, W, 3]` of at most `count` chunks, from each video in turn.

    Without videos the chunks are generated. Raises VideoError for a video that cannot be read.
    """
    if not videos:
        frames = max(1, round(preprocess.fps * chunk_seconds))
        return list(islice(generate_chunks(frames), count))
    share = -(-count // len(videos))
    chunks: list[UInt8Array] = []
    for video in videos:
        wanted = min(share, count - len(chunks))
        if wanted > 0:
            chunks += _read_chunks(video, preprocess.fps, chunk_seconds, wanted)
    return chunks


def generate_chunks(
    frames: int, size: int = GENERATED_SIZE, *, start: int = 0
) -> Iterator[UInt8Array]:
    """An endless scene from its chunk `start` on, the same at every call: a shifting gradient, a
    moving disc and noise, with the contrast of real frames from black to white."""
    random = np.random.default_rng(_SEED)
    rows, columns = np.mgrid[:size, :size].astype(np.float32) / size
    place, speed = random.uniform(0.2, 0.8, size=2), random.uniform(-0.15, 0.15, size=2)
    for number in itertools.count(start):
        # Of its own for every chunk, so that none depends on those before it.
        noise = np.random.default_rng([_SEED, number])
        chunk = np.empty((frames, size, size, 3), dtype=np.uint8)
        for index, frame in enumerate(chunk):
            time = 0.5 * (number * frames + index)
            phase = np.array([0.0, 2.1, 4.2]) + time
            waves = np.sin(6.0 * (rows + columns)[..., None] + phase)
            center = 0.5 + 0.5 * np.sin(2.0 * np.pi * (place + speed * time))
            disc = np.hypot(rows - center[0], columns - center[1]) < 0.15
            scene = 127.5 + 100.0 * waves + noise.normal(0.0, 12.0, size=waves.shape)
            scene[disc] = 255.0 * (np.arange(3) == int(time) % 3)
            frame[:] = np.clip(scene, 0, 255)
        yield chunk


def _read_chunks(video: Path, fps: float, chunk_seconds: float, count: int) -> list[UInt8Array]:
    from framesink.runtime.video import ChunkStream, open_source

    with ChunkStream(
        open_source(str(video)),
        fps=fps,
        chunk_seconds=chunk_seconds,
        drop_policy="uniform",
        realtime=False,
    ) as stream:
        return [chunk.frames for chunk in islice(stream, count)]
