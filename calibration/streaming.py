"""Watch a checkpoint stream: its scales are measured on what it will be served with."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch

from framesink.calibration.collector import StatisticsCollector
from framesink.calibration.fingerprint import checkpoint_fingerprint
from framesink.calibration.recorded_turns import StreamSettings
from framesink.calibration.statistics import Statistics
from framesink.calibration.torch_executor import DEFAULT_PAGE_SIZE, TorchExecutor
from framesink.calibration.videos import (
    DEFAULT_CHUNKS,
    DEFAULT_MINIMUM_CHUNKS,
    find_videos,
    open_streams,
)
from framesink.runtime.engine import StreamingEngine
from framesink.runtime.errors import CheckpointError, OptionError, VideoError
from framesink.runtime.events import EventKind
from framesink.runtime.models.checkpoint import Checkpoint
from framesink.runtime.sampler import SamplingParams
from framesink.runtime.video import Chunk


def observe_streaming(
    checkpoint: Checkpoint,
    settings: StreamSettings,
    videos: Sequence[Path] = (),
    *,
    chunks: int = DEFAULT_CHUNKS,
    minimum_chunks: int = DEFAULT_MINIMUM_CHUNKS,
    shares: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    on_progress: Callable[[float], None] = lambda _: None,
) -> Statistics:
    """Stream at most `chunks` chunks through the checkpoint and record every layer.

    Each video (files, or folders of them; none: a generated scene) is a live session of its own
    with the settings' defaults: chunks, evictions, and the model's own greedy replies. All have an
    equal share, and what one leaves of it goes to those after it; or `shares` says how many chunks
    of each are shown at most. `on_progress` is told the fraction that is done.

    Raises OptionError for fewer chunks than `minimum_chunks`, VideoError for a video that cannot
    be read and for videos that yield fewer, CheckpointError, naming the layer, at the first NaN or
    infinity, and CapacityError where the context does not fit.
    """
    if chunks < minimum_chunks:
        raise OptionError(
            f"{chunks} chunks are fewer than the {minimum_chunks} that calibration needs at least."
        )
    files = find_videos(videos)
    collector = StatisticsCollector()
    executor = TorchExecutor(
        checkpoint,
        num_pages=settings.num_pages(DEFAULT_PAGE_SIZE),
        dtype=dtype,
        device=device,
        taps=collector,
    )
    seconds = settings.defaults.chunk_seconds
    streams = open_streams(files, settings.preprocess, seconds)
    seen = 0
    with settings.engine(executor) as engine:
        for number, stream in enumerate(streams):
            equal = -(-(chunks - seen) // (len(streams) - number))
            share = equal if shares is None else shares[number]
            for _ in _answered(engine, islice(stream, share)):
                seen += 1
                on_progress(seen / chunks)
    if seen < minimum_chunks:
        raise VideoError(
            f"The calibration video yields {seen} chunks of {seconds:g} s, and at least "
            f"{minimum_chunks} are needed; give more or longer video."
        )
    return collector.statistics(
        checkpoint=checkpoint_fingerprint(checkpoint),
        source=", ".join(file.name for file in files) or "generated scene",
        chunks=seen,
    )


def _answered(engine: StreamingEngine, chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    """Each chunk when a session of its own has answered it."""
    with engine.open_session(sampling=SamplingParams()) as session:
        for chunk in chunks:
            session.push_chunk(chunk)
            for event in session:
                if event.kind is EventKind.ERROR:
                    raise CheckpointError(event.text)
            yield chunk
