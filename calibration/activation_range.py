"""Find out how large a checkpoint's activations become, and so which compute type is safe.

A bf16 checkpoint may hold layers whose outputs leave fp16's range: compiled in fp16 it would answer
in NaN. The whole model is run in float32 on a few chunks of video, without torch.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from framesink.calibration.fingerprint import checkpoint_fingerprint
from framesink.calibration.observer import RangeObserver
from framesink.calibration.ranges import ActivationRanges
from framesink.calibration.text_forward import run_language_model
from framesink.calibration.vision_forward import run_vision_encoder
from framesink.runtime.arrays import Float32Array, Int32Array, UInt8Array
from framesink.runtime.models.checkpoint import Checkpoint
from framesink.runtime.models.config import ModelConfig
from framesink.runtime.models.weights import EMBEDDING
from framesink.runtime.preprocess import Grid, PreprocessConfig, frames_to_patches
from framesink.runtime.protocol import ChatProtocol

# Magnitudes hardly depend on the resolution, the time of this forward does.
MAX_PIXELS = 448 * 448
CHUNKS_PER_PASS = 2


def observe_activations(
    checkpoint: Checkpoint,
    protocol: ChatProtocol,
    preprocess: PreprocessConfig,
    chunks: Sequence[UInt8Array],
    *,
    chunk_seconds: float,
    source: str,
    on_progress: Callable[[float], None] = lambda _: None,
) -> ActivationRanges:
    """Run the checkpoint in float32 over `chunks` (frames uint8 `[T, H, W, 3]` each).

    `source` says in words where the chunks come from. Raises CheckpointError, naming the layer, at
    the first NaN or infinity.
    """
    smaller = dataclasses.replace(
        preprocess,
        max_pixels=min(preprocess.max_pixels, MAX_PIXELS),
        min_pixels=min(preprocess.min_pixels, MAX_PIXELS),
    )
    vision, text = RangeObserver(), RangeObserver()
    tokens = patch_count = 0
    embedded: list[tuple[Float32Array, Grid]] = []
    passes = [chunks[i : i + CHUNKS_PER_PASS] for i in range(0, len(chunks), CHUNKS_PER_PASS)]
    for number, group in enumerate(passes):
        embedded.clear()
        for frames in group:
            patches, grid = frames_to_patches(frames, smaller)
            patch_count += len(patches)
            embedded.append((run_vision_encoder(checkpoint, patches, grid, vision), grid))
        on_progress((number + 0.3) / len(passes))
        inputs, positions = build_prompt(checkpoint, protocol, smaller, embedded, chunk_seconds)
        tokens += len(inputs)
        run_language_model(checkpoint, inputs, positions, text)
        on_progress((number + 1) / len(passes))
    return ActivationRanges(
        checkpoint=checkpoint_fingerprint(checkpoint),
        source=source,
        chunks=len(chunks),
        tokens=tokens,
        patches=patch_count,
        vision_encoder=vision.ranges(),
        language_model=text.ranges(),
    )


def build_prompt(
    checkpoint: Checkpoint,
    protocol: ChatProtocol,
    preprocess: PreprocessConfig,
    chunks: Sequence[tuple[Float32Array, Grid]],
    chunk_seconds: float,
) -> tuple[Float32Array, Int32Array]:
    """Input embeddings `[n, hidden]` and M-RoPE positions int32 `[3, n]` of a few silent turns.

    `chunks` are vision embeddings and their grids.
    """
    config = checkpoint.config
    ids = list(protocol.system)
    places = [_text_places(len(ids))]
    following = len(ids)
    for number, (_, grid) in enumerate(chunks):
        start, end = number * chunk_seconds, (number + 1) * chunk_seconds
        opening = protocol.user_open + protocol.time_text(start, end) + [protocol.vision_start]
        closing = [protocol.vision_end, *protocol.turn_close, *protocol.reply_open]
        if number + 1 < len(chunks):
            closing += protocol.reply_closing + protocol.turn_close
        block = vision_places(grid, config, preprocess)
        ids += opening + [protocol.video_pad] * block.shape[1] + closing
        places.append(following + _text_places(len(opening)))
        places.append(following + len(opening) + block)
        following = int(places[-1].max()) + 1
        places.append(following + _text_places(len(closing)))
        following += len(closing)
    embeddings = _embed(checkpoint, ids)
    embeddings[np.array(ids) == protocol.video_pad] = np.concatenate([chunk[0] for chunk in chunks])
    return embeddings, np.concatenate(places, axis=1).astype(np.int32)


def vision_places(grid: Grid, config: ModelConfig, preprocess: PreprocessConfig) -> Int32Array:
    """M-RoPE positions int32 `[3, tokens]` of a vision block that starts at 0."""
    merge = config.vision.spatial_merge_size
    t, h, w = np.mgrid[: grid.t, : grid.h // merge, : grid.w // merge].reshape(3, -1)
    step_seconds = preprocess.temporal_patch_size / preprocess.fps
    t = (t * step_seconds * config.vision.tokens_per_second).astype(np.int64)
    places: Int32Array = np.stack([t, h, w]).astype(np.int32)
    return places


def _text_places(count: int) -> Int32Array:
    return np.tile(np.arange(count, dtype=np.int32), (3, 1))


def _embed(checkpoint: Checkpoint, ids: Sequence[int]) -> Float32Array:
    """Rows of the embedding in float32; the others are not read."""
    table = checkpoint.read(EMBEDDING)
    return np.stack([np.asarray(table[token]).astype(np.float32) for token in ids])
