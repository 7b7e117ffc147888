"""Calibration video in the streaming format: chunks of files, folders, or a generated scene."""

import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from framesink.calibration.samples import generate_chunks
from framesink.runtime.errors import VideoError
from framesink.runtime.preprocess import PreprocessConfig
from framesink.runtime.video import Chunk, ChunkStream, open_source

# How many chunks calibration watches, and the least it is satisfied with. Old text is cut in its
# middle after a few minutes only, and ranges keep growing until then (docs/accuracy.md).
DEFAULT_CHUNKS = 256
DEFAULT_MINIMUM_CHUNKS = 16
VIDEO_SUFFIXES = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".ts", ".webm"})


def find_videos(paths: Iterable[Path]) -> list[Path]:
    """The given files, and the videos (by their suffix, sorted by name) of the given folders.

    Raises VideoError for a folder without videos.
    """
    videos: list[Path] = []
    for path in paths:
        if not path.is_dir():
            videos.append(path)
            continue
        found = sorted(file for file in path.iterdir() if file.suffix.lower() in VIDEO_SUFFIXES)
        if not found:
            suffixes = ", ".join(sorted(VIDEO_SUFFIXES))
            raise VideoError(f"The folder {path} holds no video ({suffixes}).")
        videos += found
    return videos


def open_streams(
    videos: Sequence[Path],
    preprocess: PreprocessConfig,
    chunk_seconds: float,
    *,
    starts: Sequence[int] | None = None,
) -> list[Iterator[Chunk]]:
    """The chunks of each video; without videos, those of one generated scene without end. Each
    begins with the chunk of the number in `starts` (None: with the first).

    Nothing is opened before its first chunk is taken, which raises VideoError for a video that
    cannot be read.
    """
    first = starts or [0] * max(1, len(videos))
    if not videos:
        frames = max(1, round(preprocess.fps * chunk_seconds))
        return [_generate(frames, chunk_seconds, first[0])]
    streams = (_read(video, preprocess.fps, chunk_seconds) for video in videos)
    return [islice(stream, start, None) for stream, start in zip(streams, first, strict=True)]


def _read(video: Path, fps: float, chunk_seconds: float) -> Iterator[Chunk]:
    source = open_source(str(video))
    with ChunkStream(source, fps, chunk_seconds, realtime=False) as stream:
        yield from stream


def _generate(frames: int, chunk_seconds: float, start: int) -> Iterator[Chunk]:
    for number, pictures in enumerate(generate_chunks(frames, start=start), start):
        begin, end = number * chunk_seconds, (number + 1) * chunk_seconds
        times = np.linspace(begin, end, frames, endpoint=False)
        yield Chunk(pictures, begin, end, tuple(times.tolist()), time.monotonic())
