"""The vision encoder as one ONNX graph with a dynamic number of patches.

Model: Qwen2.5-VL, `transformers` `models/qwen2_5_vl/modeling_qwen2_5_vl.py`
(Qwen2_5_VisionTransformerPretrainedModel). There the patches are sorted by window; here they keep
their order, since attention does not depend on the order of its keys, and each block gathers the
segments (windows or whole frames) it attends within. Inputs and outputs are described in
docs/architecture.md, section Graphs.
"""

from dataclasses import dataclass

import onnx_ir as ir

from framesink.build.graphs.layers import Dimension, GraphAuthor, WeightMap
from framesink.runtime.manifest import ComputeType
from framesink.runtime.models.config import ModelConfig, VisionConfig
from framesink.runtime.models.quantization import Quantization
from framesink.runtime.models.vision_segments import window_patches
from framesink.runtime.models.weights import MERGER, PATCH_EMBED, block_name


@dataclass(frozen=True, slots=True)
class _Segments:
    """Groups of patches that attend to each other: `index [S,L]` of their patches, `inverse [n]` of
    each patch in the flattened segments, the mask `[S,1,L,L]` that hides padding where there is
    any, and the rotary tables `[S,L,D/2]`."""

    index: ir.Value
    inverse: ir.Value
    mask: ir.Value | None
    cos: ir.Value
    sin: ir.Value


def author_vision_encoder(
    config: ModelConfig,
    weights: WeightMap,
    *,
    compute_type: ComputeType,
    quantization: Quantization | None = None,
) -> ir.Model:
    """Author the vision encoder.

    `weights` holds the tensors named by `vision_encoder_weights`, in any float type, or as
    `quantization` says. `compute_type` is the type of patches, tables, masks and embeddings.
    """
    return _VisionEncoderAuthor(config.vision, weights, compute_type, quantization).author()


class _VisionEncoderAuthor(GraphAuthor):
    def __init__(
        self,
        config: VisionConfig,
        weights: WeightMap,
        compute_type: ComputeType,
        quantization: Quantization | None,
    ) -> None:
        super().__init__("vision_encoder", weights, compute_type, quantization)
        self.config = config

    def author(self) -> ir.Model:
        config = self.config
        patches = self.input("patches", ("patches", config.patch_dim))
        cos = self.input("cos", ("patches", config.head_dim // 2))
        sin = self.input("sin", ("patches", config.head_dim // 2))
        full_blocks = set(config.fullatt_block_indexes)
        kinds = ["frame" if index in full_blocks else "window" for index in range(config.depth)]
        # An input that no block reads is not declared: readers warn about it or drop it.
        segments = {kind: self._segments(kind, cos, sin) for kind in dict.fromkeys(kinds)}
        hidden = self._patch_embed(patches)
        for index, kind in enumerate(kinds):
            with self.scope(f"blocks.{index}"):
                hidden = self._block(hidden, index, segments[kind])
        embeds = self._merger(hidden)
        self.output(embeds, "embeds", ("tokens", config.out_hidden_size), self.compute_type)
        return self.finish()

    def _segments(self, kind: str, cos: ir.Value, sin: ir.Value) -> _Segments:
        """Windows are cut off at a frame's edges, so theirs are padded to the full size and have a
        mask; all frames of a call have one size, and full attention runs without."""
        length: Dimension = window_patches(self.config) if kind == "window" else "frame_patches"
        count = f"{kind}s"
        index = self.input(f"{kind}_index", (count, length), ir.DataType.INT32)
        inverse = self.input(f"{kind}_inverse", ("patches",), ir.DataType.INT32)
        mask = None
        if kind == "window":
            mask = self.input("window_mask", (count, 1, 1, length))
        with self.scope(f"{kind}s"):
            if mask is not None:
                # ONNX Runtime wants one row of the mask per query.
                mask = self.op.Expand(mask, [1, 1, length, 1])
            return _Segments(
                index=index,
                inverse=inverse,
                mask=mask,
                cos=self.op.Gather(cos, index, axis=0),
                sin=self.op.Gather(sin, index, axis=0),
            )

    def _patch_embed(self, patches: ir.Value) -> ir.Value:
        with self.scope("patch_embed"):
            # The convolution's stride is its kernel, so it is one matrix product per patch.
            kernel = self.op.Reshape(
                self.weight(PATCH_EMBED), [self.config.hidden_size, self.config.patch_dim]
            )
            return self.op.MatMul(patches, self.op.Transpose(kernel, perm=[1, 0]))

    def _block(self, hidden: ir.Value, index: int, segments: _Segments) -> ir.Value:
        name, epsilon = block_name(index), self.config.rms_norm_eps
        normed = self.rms_norm(hidden, f"{name}.norm1", epsilon)
        hidden = self.op.Add(hidden, self._self_attention(normed, f"{name}.attn", segments))
        normed = self.rms_norm(hidden, f"{name}.norm2", epsilon)
        return self.op.Add(hidden, self.gated_mlp(normed, f"{name}.mlp", bias=True))

    def _self_attention(self, hidden: ir.Value, name: str, segments: _Segments) -> ir.Value:
        config = self.config
        heads, head_dim, width = config.num_heads, config.head_dim, config.hidden_size
        with self.scope("attn"):
            projected = self.op.Gather(self.linear(hidden, f"{name}.qkv"), segments.index, axis=0)
            split = self.op.Reshape(projected, [0, 0, 3, heads, head_dim])
            stacked = self.op.Transpose(split, perm=[2, 0, 3, 1, 4])
            query, key, value = (self.op.Gather(stacked, part, axis=0) for part in range(3))
            attended = self.attention(
                self.rotate(query, segments.cos, segments.sin),
                self.rotate(key, segments.cos, segments.sin),
                value,
                segments.mask,
                head_dim,
            )
            rows = self.op.Reshape(self.merge_heads(attended, width), [-1, width])
            return self.linear(self.op.Gather(rows, segments.inverse, axis=0), f"{name}.proj")

    def _merger(self, hidden: ir.Value) -> ir.Value:
        config = self.config
        with self.scope("merger"):
            normed = self.rms_norm(hidden, f"{MERGER}.ln_q", config.rms_norm_eps)
            merged = self.op.Reshape(normed, [-1, config.hidden_size * config.merge_unit])
            inner = self.op.Gelu(self.linear(merged, f"{MERGER}.mlp.0"), approximate="none")
            return self.linear(inner, f"{MERGER}.mlp.2")
