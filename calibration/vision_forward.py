"""The vision encoder in numpy float32, one layer's weights at a time.

Source: `transformers` `models/qwen2_5_vl/modeling_qwen2_5_vl.py`
(`Qwen2_5_VisionTransformerPretrainedModel`). As in the authored graph, patches keep their order and
each block attends within segments of them.
"""

from collections.abc import Sequence

import numpy as np

from framesink.calibration.layers import attention, gelu, rotate, silu
from framesink.calibration.observer import ObservedLayer, RangeObserver
from framesink.runtime.arrays import Float32Array, Int32Array
from framesink.runtime.models.checkpoint import Checkpoint
from framesink.runtime.models.config import VisionConfig
from framesink.runtime.models.vision_segments import Segments, frame_segments, window_segments
from framesink.runtime.models.weights import MERGER, PATCH_EMBED, block_name
from framesink.runtime.preprocess import Grid
from framesink.runtime.rope import vision_rotary


def run_vision_encoder(
    checkpoint: Checkpoint, patches: Float32Array, grid: Grid, observer: RangeObserver
) -> Float32Array:
    """Embeddings float32 `[n / merge², out_hidden]` of `patches [n, patch_dim]`, observed."""
    config = checkpoint.config.vision
    cos, sin = vision_rotary([grid], config, np.float32)
    windows = _members(window_segments([grid], config))
    frames = _members(frame_segments([grid]))

    embed_name, _, weight_name = PATCH_EMBED.partition(".proj.")
    embed = ObservedLayer(checkpoint, embed_name, observer)
    kernel = embed.weight(f"proj.{weight_name}").reshape(config.hidden_size, -1)
    hidden: Float32Array = patches @ kernel.T
    embed.record("output", hidden)
    for index in range(config.depth):
        segments = frames if index in config.fullatt_block_indexes else windows
        block = ObservedLayer(checkpoint, block_name(index), observer)
        hidden = _block(block, config, hidden, (cos, sin), segments)
    return _merge(ObservedLayer(checkpoint, MERGER, observer), config, hidden)


def _members(segments: Segments) -> list[Int32Array]:
    """The patches of each segment, without its padding."""
    return [
        index[mask.reshape(-1) == 0.0]
        for index, mask in zip(segments.index, segments.mask, strict=True)
    ]


def _block(
    block: ObservedLayer,
    config: VisionConfig,
    hidden: Float32Array,
    rotary: tuple[Float32Array, Float32Array],
    segments: Sequence[Int32Array],
) -> Float32Array:
    inputs = block.rms_norm("norm1", hidden, config.rms_norm_eps)
    projected = block.linear("attn.qkv", inputs, bias=True)
    queries, keys, values = projected.reshape(-1, 3, config.num_heads, config.head_dim).swapaxes(
        0, 1
    )
    mixed, scores = attention(
        rotate(queries, *rotary), rotate(keys, *rotary), values, segments, causal=False
    )
    block.record("attn.scores", scores)
    hidden = hidden + block.linear("attn.proj", mixed.reshape(len(hidden), -1), bias=True)
    block.record("residual_after_attention", hidden)

    inputs = block.rms_norm("norm2", hidden, config.rms_norm_eps)
    gated = silu(block.linear("mlp.gate_proj", inputs, bias=True))
    gated *= block.linear("mlp.up_proj", inputs, bias=True)
    block.record("mlp.gated", gated)
    hidden = hidden + block.linear("mlp.down_proj", gated, bias=True)
    block.record("residual_after_mlp", hidden)
    return hidden


def _merge(merger: ObservedLayer, config: VisionConfig, hidden: Float32Array) -> Float32Array:
    inputs = merger.rms_norm("ln_q", hidden, config.rms_norm_eps)
    merged = inputs.reshape(-1, config.hidden_size * config.merge_unit)
    inner = merger.linear("mlp.0", merged, bias=True)
    return merger.linear("mlp.2", gelu(inner), bias=True)
