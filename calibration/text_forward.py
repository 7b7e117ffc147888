"""The language model in numpy float32, one layer's weights at a time.

Source: `transformers` `models/qwen2_5_vl/modeling_qwen2_5_vl.py` (`Qwen2_5_VLTextModel`).
"""

import numpy as np

from framesink.calibration.dequantized import read_weight
from framesink.calibration.layers import attention, rotate, silu
from framesink.calibration.observer import ObservedLayer, RangeObserver
from framesink.runtime.arrays import Float32Array, Int32Array
from framesink.runtime.models.checkpoint import Checkpoint
from framesink.runtime.models.config import TextConfig
from framesink.runtime.models.weights import layer_name, output_projection
from framesink.runtime.rope import MRopeTable

_VOCABULARY_BLOCK = 16_384


def run_language_model(
    checkpoint: Checkpoint,
    embeddings: Float32Array,
    positions: Int32Array,
    observer: RangeObserver,
) -> Float32Array:
    """Logits float32 `[vocab]` of the last token, every layer observed on the way.

    `embeddings` is float32 `[n, hidden]`, `positions` int32 `[3, n]` (t, h, w). Memory is bounded
    by one weight matrix in float32 and the activations of n tokens.
    """
    config = checkpoint.config.text
    cos, sin = MRopeTable(config, np.float32).lookup(positions)
    hidden = embeddings
    observer.record("model.embed_tokens", "output", hidden)
    for index in range(config.num_hidden_layers):
        layer = ObservedLayer(checkpoint, layer_name(index), observer)
        hidden = _decoder_layer(layer, config, hidden, (cos, sin))
    final = ObservedLayer(checkpoint, "model", observer).rms_norm(
        "norm", hidden, config.rms_norm_eps
    )
    return _project_to_vocabulary(checkpoint, final[-1], observer)


def _decoder_layer(
    layer: ObservedLayer,
    config: TextConfig,
    hidden: Float32Array,
    rotary: tuple[Float32Array, Float32Array],
) -> Float32Array:
    count, head_dim = len(hidden), config.head_dim
    inputs = layer.rms_norm("input_layernorm", hidden, config.rms_norm_eps)
    queries, keys, values = (
        layer.linear(f"self_attn.{name}", inputs, bias=True).reshape(count, -1, head_dim)
        for name in ("q_proj", "k_proj", "v_proj")
    )
    everything = [np.arange(count, dtype=np.int32)]
    mixed, scores = attention(
        rotate(queries, *rotary), rotate(keys, *rotary), values, everything, causal=True
    )
    layer.record("self_attn.scores", scores)
    hidden = hidden + layer.linear("self_attn.o_proj", mixed.reshape(count, -1), bias=False)
    layer.record("residual_after_attention", hidden)

    inputs = layer.rms_norm("post_attention_layernorm", hidden, config.rms_norm_eps)
    gated = silu(layer.linear("mlp.gate_proj", inputs, bias=False))
    gated *= layer.linear("mlp.up_proj", inputs, bias=False)
    layer.record("mlp.gated", gated)
    hidden = hidden + layer.linear("mlp.down_proj", gated, bias=False)
    layer.record("residual_after_mlp", hidden)
    return hidden


def _project_to_vocabulary(
    checkpoint: Checkpoint, final: Float32Array, observer: RangeObserver
) -> Float32Array:
    """Logits `[vocab]`, block by block: in float32 the matrix can take gigabytes."""
    name = output_projection(checkpoint.config.text)
    logits = []
    for start in range(0, checkpoint.config.text.vocab_size, _VOCABULARY_BLOCK):
        block = read_weight(checkpoint, name, slice(start, start + _VOCABULARY_BLOCK))
        observer.record("lm_head", "weight", block)
        logits.append(block @ final)
        observer.record("lm_head", "output", logits[-1])
    return np.concatenate(logits)
