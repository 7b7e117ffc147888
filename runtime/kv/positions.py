"""Places of tokens and the bases of spans: contiguous M-RoPE without rewriting anything.

A token's position is its span's base plus its own place. Source of the rule: Qwen2-VL
(arXiv 2409.12191) `get_rope_index`, as StreamingVLM (arXiv 2510.09608) applies it to the retained
tokens: text counts up on all three axes, a video grid starts where the text before it ends, and the
text after it continues at the largest position + 1.
"""

from collections.abc import Sequence

import numpy as np

from framesink.runtime.arrays import Int32Array
from framesink.runtime.kv.span import NO_SLOTS, Span, SpanKind, SpanPart
from framesink.runtime.preprocess import Grid


def text_places(count: int) -> Int32Array:
    """Places of `count` text tokens: int32 `[3, count]`, counting up from 0 on all axes."""
    return np.tile(np.arange(count, dtype=np.int32), (3, 1))


def vision_places(grid: Grid, *, merge_size: int, time_step: float) -> Int32Array:
    """Places of one vision block: start token, the merged grid in (t, h, w) order, end token.

    `grid` counts ViT patches; `time_step` is how far t advances from one temporal grid step to the
    next (seconds per grid step × the model's tokens per second), whole numbers being taken of the
    product, in float32 as transformers does. Returns int32 `[3, 2 + tokens]`.
    """
    height, width = grid.h // merge_size, grid.w // merge_size
    times = (np.arange(grid.t, dtype=np.float32) * np.float32(time_step)).astype(np.int32)
    block = np.empty((3, grid.t, height, width), dtype=np.int32)
    block[0] = times[:, None, None]
    block[1] = np.arange(height)[None, :, None]
    block[2] = np.arange(width)[None, None, :]
    inner = block.reshape(3, -1) + 1
    start = np.zeros((3, 1), dtype=np.int32)
    end = np.full((3, 1), inner.max() + 1, dtype=np.int32)
    return np.concatenate([start, inner, end], axis=1)


def text_span(
    kind: SpanKind,
    part: SpanPart,
    turn: int,
    tokens: Sequence[int],
    *,
    t0: float = 0.0,
    t1: float = 0.0,
) -> Span:
    """An unwritten span of text."""
    return Span(
        kind=kind,
        part=part,
        turn=turn,
        tokens=np.asarray(tokens, dtype=np.int32),
        places=text_places(len(tokens)),
        slots=NO_SLOTS,
        end_place=len(tokens),
        t0=t0,
        t1=t1,
    )


def vision_span(
    turn: int,
    tokens: Sequence[int],
    grid: Grid,
    *,
    merge_size: int,
    time_step: float,
    t0: float = 0.0,
    t1: float = 0.0,
) -> Span:
    """An unwritten vision span; `tokens` are the start token, the placeholders, the end token.

    Raises ValueError if the number of placeholders is not what the grid merges to.
    """
    places = vision_places(grid, merge_size=merge_size, time_step=time_step)
    if places.shape[1] != len(tokens):
        raise ValueError(f"a grid of {places.shape[1]} places cannot hold {len(tokens)} tokens")
    return Span(
        kind=SpanKind.VISION,
        part=SpanPart.BODY,
        turn=turn,
        tokens=np.asarray(tokens, dtype=np.int32),
        places=places,
        slots=NO_SLOTS,
        end_place=int(places[0, -1]) + 1,
        t0=t0,
        t1=t1,
    )


def span_bases(spans: Sequence[Span], start: int = 0) -> tuple[Int32Array, int]:
    """The base of every span, and the position that follows the last one.

    The first token of a span stands where the span before it ended, so a span's base is that
    position minus the place of its first token (0 unless the span was cut at its front).
    Returns int32 `[len(spans)]` and the next position.
    """
    starts = np.array([span.start_place for span in spans], dtype=np.int32)
    advances = np.array([span.end_place for span in spans], dtype=np.int32) - starts
    ends = start + np.cumsum(advances, dtype=np.int32)
    following = int(ends[-1]) if len(spans) else start
    return ends - advances - starts, following
