"""The vision encoder on the GPU.

Source: `transformers` `models/qwen2_5_vl/modeling_qwen2_5_vl.py`
(`Qwen2_5_VisionTransformerPretrainedModel`). As there, patches are sorted by attention window, so
that windows, and whole frames too, are runs of rows; nothing is padded. Frames do not see each
other, so chunks of one frame size are encoded together as one chunk of more temporal steps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from framesink.runtime.arrays import AnyArray
from framesink.runtime.executors.cuda.capture import capture
from framesink.runtime.executors.cuda.layers import Layers, Linear
from framesink.runtime.executors.cuda.weights import VisionBlock, VisionEncoderWeights
from framesink.runtime.models.config import VisionConfig
from framesink.runtime.models.vision_segments import window_segments
from framesink.runtime.preprocess import Grid
from framesink.runtime.rope import vision_rotary

# A live session has one grid, and another after a change of resolution; each number of chunks that
# are encoded together has its own.
CACHED_GRIDS = 16


@dataclass(frozen=True, slots=True, eq=False)
class _Layout:
    """What depends on the grid alone.

    `order` int64 `[n]`: the patch that stands at each row. `merged_order` int64 `[n/merge²]`: the
    row of each merged patch. `cos`, `sin` float32 `[n, D/2]`, by row. `starts` int32 `[W + 1]`:
    windows are rows from one to the next, `longest` at most. `frames` counts temporal steps.
    """

    order: Tensor
    merged_order: Tensor
    cos: Tensor
    sin: Tensor
    starts: Tensor
    longest: int
    frames: int


@dataclass(frozen=True, slots=True, eq=False)
class _Captured:
    """A CUDA graph of one grid, what it reads and what it writes."""

    graph: torch.cuda.CUDAGraph
    patches: Tensor
    embeddings: Tensor


class VisionEncoder:
    """Patches to embeddings. On a GPU the work of each grid is captured as a CUDA graph when it is
    first seen."""

    def __init__(
        self,
        config: VisionConfig,
        weights: VisionEncoderWeights,
        layers: Layers,
        device: torch.device,
    ) -> None:
        self._config = config
        self._weights = weights
        self._layers = layers
        self._device = device
        # One graph runs at a time and its result is copied: all share their activations' memory.
        self._memory = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self._layout = lru_cache(maxsize=CACHED_GRIDS)(self._make_layout)
        self._captured = lru_cache(maxsize=CACHED_GRIDS)(self._capture)

    def encode(self, fill: Callable[[Tensor], None], grid: Grid) -> Tensor:
        """Embeddings `[t·h·w / merge², out_hidden]` in the compute type, of the patches that `fill`
        writes into the tensor `[t·h·w, patch_dim]` it is given."""
        if self._device.type != "cuda":
            patches = self._empty_patches(grid)
            fill(patches)
            return self._forward(patches, self._layout(grid))
        captured = self._captured(grid)
        fill(captured.patches)
        captured.graph.replay()
        return captured.embeddings.clone()

    def _capture(self, grid: Grid) -> _Captured:
        layout, patches = self._layout(grid), self._empty_patches(grid).zero_()
        graph, embeddings = capture(
            lambda: self._forward(patches, layout), self._device, self._memory
        )
        return _Captured(graph, patches, embeddings)

    def _empty_patches(self, grid: Grid) -> Tensor:
        return torch.empty(
            grid.patches, self._config.patch_dim, dtype=self._layers.dtype, device=self._device
        )

    def _forward(self, patches: Tensor, layout: _Layout) -> Tensor:
        layers, weights = self._layers, self._weights
        embedding = weights.patch_embedding
        hidden = layers.linear(layers.encode(patches[layout.order], embedding), embedding)
        delta: Tensor | None = None
        for index, block in enumerate(weights.blocks):
            full = index in self._config.fullatt_block_indexes
            delta = self._block(block, hidden, delta, layout, full=full)
        merged = self._merge(hidden, delta)
        return merged[layout.merged_order]

    def _block(
        self,
        block: VisionBlock,
        hidden: Tensor,
        delta: Tensor | None,
        layout: _Layout,
        *,
        full: bool,
    ) -> Tensor:
        """One block; its last result is left to be added to `hidden`."""
        layers, epsilon = self._layers, self._config.rms_norm_eps
        inputs = layers.rms_norm(hidden, block.attention_norm, epsilon, block.qkv, delta)
        qkv = layers.linear(inputs, block.qkv)
        mixed = self._attend(qkv, block.output, layout, full=full)
        delta = layers.linear(mixed, block.output)
        inputs = layers.rms_norm(hidden, block.mlp_norm, epsilon, block.gate_up, delta)
        return layers.gated_mlp(inputs, block.gate_up, block.down)

    def _attend(self, qkv: Tensor, reader: Linear, layout: _Layout, *, full: bool) -> Tensor:
        """Attention within windows, or within frames: `[n, 3·hidden]` to `[n, hidden]` in the form
        `reader` wants."""
        layers, heads = self._layers, self._config.num_heads
        layers.operations.rotate_heads(qkv, layout.cos, layout.sin, heads)
        if full:
            return layers.encode(self._attend_frames(qkv, layout.frames), reader)
        mixed = layers.form((len(qkv), self._config.hidden_size), reader, qkv.device)
        layers.operations.window_attention(
            qkv, layout.starts, layout.longest, heads, mixed, reader.input
        )
        return mixed

    def _attend_frames(self, qkv: Tensor, frames: int) -> Tensor:
        config = self._config
        rows = qkv.view(frames, -1, 3, config.num_heads, config.head_dim)
        query, key, value = (rows[:, :, part].transpose(1, 2) for part in range(3))
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return mixed.transpose(1, 2).reshape(len(qkv), config.hidden_size)

    def _merge(self, hidden: Tensor, delta: Tensor | None) -> Tensor:
        layers, weights, config = self._layers, self._weights, self._config
        inner = weights.merger_inner
        # The norm is over patches and the layer's input over merged ones, so it is encoded after.
        normed = layers.plain_norm(hidden, weights.merger_norm, config.rms_norm_eps, delta)
        merged = normed.view(-1, config.hidden_size * config.merge_unit)
        activated = functional.gelu(layers.linear(layers.encode(merged, inner), inner))
        outer = weights.merger_outer
        return layers.linear(layers.encode(activated, outer), outer)

    def _make_layout(self, grid: Grid) -> _Layout:
        config = self._config
        segments = window_segments([grid], config)
        # Where a patch is among the windows, padding left out, is its row.
        order = np.argsort(segments.inverse, kind="stable")
        sizes = (segments.mask[:, 0, 0, :] == 0.0).sum(axis=1)
        row_of_patch = np.empty(grid.patches, np.int64)
        row_of_patch[order] = np.arange(grid.patches)
        cos, sin = vision_rotary([grid], config, "float32")
        return _Layout(
            order=self._to_device(order),
            merged_order=self._to_device(row_of_patch[:: config.merge_unit] // config.merge_unit),
            cos=self._to_device(cos[order]),
            sin=self._to_device(sin[order]),
            starts=self._to_device(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)),
            longest=int(sizes.max()),
            frames=grid.t,
        )

    def _to_device(self, values: AnyArray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self._device)
