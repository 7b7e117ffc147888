"""A prompt that shows whether TensorRT-LLM makes of it what the bundle expects."""

import math
import secrets

import numpy as np

from framesink.runtime.bundle import Bundle
from framesink.runtime.kv.positions import text_span, vision_span
from framesink.runtime.kv.span import Span, SpanKind, SpanPart
from framesink.runtime.preprocess import frame_grid, resize_frames
from framesink.runtime.prompting.executor import ReplyRequest
from framesink.runtime.prompting.prompt import PromptWriter, Video
from framesink.runtime.protocol import ChatProtocol
from framesink.runtime.sampler import SamplingParams


def trial_request(bundle: Bundle, protocol: ChatProtocol) -> ReplyRequest:
    """One token about two videos, a dark and a light one, of the smallest size there is."""
    preprocess = bundle.manifest.preprocess
    side = math.isqrt(preprocess.min_pixels)
    shape = (preprocess.temporal_patch_size, side, side, 3)
    spans: list[Span] = []
    videos: dict[int, Video] = {}
    for turn, level in enumerate((32, 224)):
        frames = resize_frames(np.full(shape, level, dtype=np.uint8), preprocess)
        grid = frame_grid(frames, preprocess)
        tokens = grid.tokens(preprocess.merge_size)
        videos[turn] = Video(frames, preprocess.fps, tokens)
        spans += (
            text_span(SpanKind.USER, SpanPart.OPEN, turn, protocol.user_open),
            vision_span(
                turn,
                protocol.vision(tokens),
                grid,
                merge_size=preprocess.merge_size,
                time_step=1.0,
            ),
            text_span(SpanKind.USER, SpanPart.CLOSE, turn, protocol.turn_close),
        )
    spans.append(text_span(SpanKind.REPLY, SpanPart.OPEN, len(videos) - 1, protocol.reply_open))
    return ReplyRequest(
        session=secrets.token_hex(16),
        prompt=PromptWriter(protocol).write(spans, videos),
        sampling=SamplingParams(),
        max_new_tokens=1,
        stop_tokens=protocol.stop_tokens,
    )
