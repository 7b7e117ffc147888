"""Executors compared over video as a live session of a bundle streams it."""

from collections.abc import Callable, Iterator, Mapping

from framesink.build.footage import Footage
from framesink.calibration.agreement import TurnAgreement, compare_executors
from framesink.calibration.recorded_turns import StreamSettings
from framesink.runtime.bundle import Bundle
from framesink.runtime.executors.base import Executor
from framesink.runtime.video.chunk import Chunk


def session_pages(bundle: Bundle) -> int:
    """Pages of an executor that is compared: for one session of the bundle's full length, the null
    page included."""
    return StreamSettings.from_bundle(bundle).num_pages(bundle.manifest.page_size)


def compare_over_footage(
    bundle: Bundle,
    footage: Footage,
    reference: Executor,
    candidates: Mapping[str, Executor],
    *,
    on_progress: Callable[[float], None] = lambda _: None,
) -> dict[str, list[TurnAgreement]]:
    """Stream the chunks of `footage` to judge on through `reference`, with the bundle's defaults,
    and the same steps with the same tokens through every candidate.

    Returns one entry per chunk for each candidate. `on_progress` is given the share that is done.
    Raises VideoError for video that cannot be read, and what `compare_executors` raises.
    """
    manifest = bundle.manifest
    settings = StreamSettings.from_bundle(bundle)
    turns: dict[str, list[TurnAgreement]] = {name: [] for name in candidates}
    done = 0

    def follow(stream: Iterator[Chunk]) -> Iterator[Chunk]:
        nonlocal done
        for chunk in stream:
            on_progress(done / sum(footage.judged))
            yield chunk
            done += 1

    for stream in footage.judged_streams(manifest.preprocess, manifest.streaming.chunk_seconds):
        found = compare_executors(reference, candidates, settings, follow(stream))
        for name, compared in found.items():
            turns[name] += compared
    return turns
