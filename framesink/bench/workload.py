"""What a benchmark runs, in words."""

from framesink.runtime.policies import SinkWindow
from framesink.runtime.preprocess import Grid

# Frames of 1008×560, two of them a second: the one that live streams are compared with.
_W720 = (720, 1.0, 16.0, 512, 512, 20)


def describe_workload(
    policy: SinkWindow,
    *,
    model: str,
    frame_size: tuple[int, int],
    frames: int,
    grid: Grid,
    merge_size: int,
    chunk_seconds: float,
    max_new_tokens: int,
) -> str:
    """One line: a stream's chunks of `frames` frames (height, width), its windows, its replies, and
    the model, which has its name from the caller."""
    tokens = grid.tokens(merge_size)
    height, width = frame_size
    figures = (
        tokens,
        chunk_seconds,
        policy.vision_seconds,
        policy.sink_text,
        policy.recent_text,
        max_new_tokens,
    )
    return (
        f"{'W720: ' if figures == _W720 else ''}a stream is {frames} frames of {width}x{height} "
        f"every {chunk_seconds:g} s ({tokens} vision tokens), {policy.vision_seconds:g} s of "
        f"vision window, {policy.sink_text} + {policy.recent_text} tokens of text window, "
        f"{max_new_tokens} new tokens per chunk; {model}"
    )
