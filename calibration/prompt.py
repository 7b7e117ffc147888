"""A few silent turns of StreamingVLM's chat format, as one dense prompt."""

from collections.abc import Sequence

import numpy as np

from framesink.runtime.arrays import Float32Array, Int32Array
from framesink.runtime.models.checkpoint import Checkpoint
from framesink.runtime.models.config import ModelConfig
from framesink.runtime.models.weights import EMBEDDING
from framesink.runtime.preprocess import Grid, PreprocessConfig
from framesink.runtime.protocol import ChatProtocol


def build_prompt(
    protocol: ChatProtocol,
    config: ModelConfig,
    preprocess: PreprocessConfig,
    grids: Sequence[Grid],
    chunk_seconds: float,
) -> tuple[Int32Array, Int32Array]:
    """Token ids int32 `[n]` and M-RoPE positions int32 `[3, n]` of one turn per grid.

    All replies but the last are silent; the last is open, so the next token begins it.
    """
    ids = list(protocol.system)
    places = [_text_places(len(ids))]
    following = len(ids)
    for number, grid in enumerate(grids):
        start, end = number * chunk_seconds, (number + 1) * chunk_seconds
        opening = [*protocol.user_open, *protocol.time_text(start, end), protocol.vision_start]
        closing = [protocol.vision_end, *protocol.turn_close, *protocol.reply_open]
        if number + 1 < len(grids):
            closing += [*protocol.reply_closing, *protocol.turn_close]
        block = _vision_places(grid, config, preprocess)
        ids += [*opening, *[protocol.video_pad] * block.shape[1], *closing]
        places.append(following + _text_places(len(opening)))
        places.append(following + len(opening) + block)
        following = int(places[-1].max()) + 1
        places.append(following + _text_places(len(closing)))
        following += len(closing)
    return np.array(ids, dtype=np.int32), np.concatenate(places, axis=1)


def embed_prompt(
    checkpoint: Checkpoint, ids: Int32Array, vision: Sequence[Float32Array]
) -> Float32Array:
    """Input embeddings float32 `[n, hidden]`; `vision` takes the placeholders' places in order.

    Only the rows of the embedding that occur are read.
    """
    table = checkpoint.read(EMBEDDING)
    embeddings = np.stack([np.asarray(table[token]).astype(np.float32) for token in ids])
    embeddings[ids == checkpoint.config.video_token_id] = np.concatenate(vision)
    return embeddings


def _vision_places(grid: Grid, config: ModelConfig, preprocess: PreprocessConfig) -> Int32Array:
    """M-RoPE positions int32 `[3, tokens]` of a vision block that starts at 0."""
    merge = config.vision.spatial_merge_size
    t, h, w = np.mgrid[: grid.t, : grid.h // merge, : grid.w // merge].reshape(3, -1)
    step_seconds = preprocess.temporal_patch_size / preprocess.fps
    t = (t * step_seconds * config.vision.tokens_per_second).astype(np.int64)
    places: Int32Array = np.stack([t, h, w]).astype(np.int32)
    return places


def _text_places(count: int) -> Int32Array:
    return np.tile(np.arange(count, dtype=np.int32), (3, 1))
