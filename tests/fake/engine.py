"""A streaming engine over the fake executor, and the frames it is fed with."""

from collections.abc import Sequence
from functools import cache

import numpy as np
from reference.positions import GridSize
from reference.tiny_tokenizer import train_tokenizer

from fake.executor import HIDDEN, FakeExecutor
from framesink.runtime.arrays import Float32Array, UInt8Array
from framesink.runtime.engine import StreamingEngine
from framesink.runtime.events import Event
from framesink.runtime.manifest import Limits, StreamingDefaults
from framesink.runtime.models.config import ModelConfig, TextConfig, VisionConfig
from framesink.runtime.observer import EngineObserver
from framesink.runtime.preprocess import PreprocessConfig, frames_to_patches
from framesink.runtime.protocol import ChatProtocol
from framesink.runtime.tokenizer import Tokenizer

PREPROCESS = PreprocessConfig(min_pixels=28 * 28, max_pixels=56 * 84)
LIMITS = Limits(max_streams=32, max_context=4096, max_prefill=64, max_patches=4 * 6 * 2)
FEW_MERGES = 272
MANY_MERGES = 460


@cache
def make_protocol(vocabulary: int = MANY_MERGES) -> ChatProtocol:
    """The chat format. With FEW_MERGES the closing ` ...` is several tokens, else it is one."""
    return ChatProtocol(Tokenizer(train_tokenizer(vocabulary)))


def make_model(protocol: ChatProtocol) -> ModelConfig:
    """A configuration of which only the vision geometry and the token ids are used."""
    text = TextConfig(
        vocab_size=protocol.tokenizer.vocabulary_size,
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=4,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        mrope_section=(1, 1, 0),
        max_position_embeddings=32768,
        tie_word_embeddings=False,
    )
    vision = VisionConfig(
        depth=1,
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN,
        num_heads=1,
        out_hidden_size=HIDDEN,
        patch_size=14,
        spatial_merge_size=2,
        temporal_patch_size=2,
        in_channels=3,
        window_size=112,
        fullatt_block_indexes=(0,),
        tokens_per_second=2.0,
    )
    return ModelConfig(
        model_type="qwen2_5_vl",
        text=text,
        vision=vision,
        video_token_id=protocol.video_pad,
        vision_start_token_id=protocol.vision_start,
        vision_end_token_id=protocol.vision_end,
    )


def make_engine(
    *,
    protocol: ChatProtocol | None = None,
    executor: FakeExecutor | None = None,
    num_pages: int = 2048,
    page_size: int = 16,
    limits: Limits = LIMITS,
    threaded: bool = False,
    max_sessions: int | None = None,
    observer: EngineObserver | None = None,
    preprocess: PreprocessConfig = PREPROCESS,
) -> StreamingEngine:
    """An engine over the fake executor; sessions have no query and 6 new tokens by default."""
    protocol = protocol or make_protocol()
    return StreamingEngine(
        executor or FakeExecutor(protocol, num_pages=num_pages, page_size=page_size),
        make_model(protocol),
        protocol,
        preprocess,
        StreamingDefaults(max_new_tokens=6, sink_text=8, recent_text=12, vision_seconds=3.0),
        limits,
        threaded=threaded,
        max_sessions=max_sessions,
        observer=observer,
    )


def make_frames(seed: int, *, height: int = 28, width: int = 56, count: int = 2) -> UInt8Array:
    """Random frames uint8 `[count, height, width, 3]`."""
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def fake_vision(frames: UInt8Array) -> tuple[GridSize, Float32Array]:
    """Grid and embeddings the fake executor makes of frames."""
    patches, grid = frames_to_patches(frames, PREPROCESS)
    groups = patches.reshape(grid.tokens(2), -1)
    return (grid.t, grid.h, grid.w), np.ascontiguousarray(groups[:, :HIDDEN])


def finals(events: Sequence[Event]) -> list[tuple[int, ...]]:
    """Sampled tokens of every reply."""
    return [event.tokens for event in events if event.final]
