"""The vision encoder in torch.

Source: `transformers` `models/qwen2_5_vl/modeling_qwen2_5_vl.py`
(`Qwen2_5_VisionTransformerPretrainedModel`). As in the authored graph, patches keep their order and
each block attends within segments of them.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from framesink.calibration.taps import Rotary
from framesink.calibration.torch_layers import TorchLayers, attend_within, rotate
from framesink.runtime.models.config import VisionConfig
from framesink.runtime.models.vision_segments import Segments, frame_segments, window_segments
from framesink.runtime.models.weights import MERGER, PATCH_EMBED, block_name
from framesink.runtime.preprocess import Grid
from framesink.runtime.rope import vision_rotary

# A live session has one grid, and another after a change of resolution.
CACHED_GRIDS = 16


@dataclass(frozen=True, slots=True, eq=False)
class _Layout:
    """What depends on the grid alone: rotary tables, and the segments of either kind of block."""

    rotary: Rotary
    windows: tuple[Tensor, Tensor, Tensor]
    frames: tuple[Tensor, Tensor, Tensor]


class TorchVisionEncoder:
    """Patches to embeddings."""

    def __init__(
        self, config: VisionConfig, layers: TorchLayers, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._config = config
        self._layers = layers
        self._dtype = dtype
        self._device = device
        self._layout = lru_cache(maxsize=CACHED_GRIDS)(self._make_layout)

    def encode(self, patches: Tensor, grid: Grid) -> Tensor:
        """Patches `[t·h·w, patch_dim]` to embeddings `[t·h·w / merge², out_hidden]`."""
        layout = self._layout(grid)
        hidden = self._layers.linear(PATCH_EMBED.removesuffix(".weight"), patches, bias=False)
        for index in range(self._config.depth):
            full = index in self._config.fullatt_block_indexes
            segments = layout.frames if full else layout.windows
            hidden = self._block(block_name(index), hidden, layout.rotary, segments)
        return self._merge(hidden)

    def _block(
        self, name: str, hidden: Tensor, rotary: Rotary, segments: tuple[Tensor, Tensor, Tensor]
    ) -> Tensor:
        layers, config = self._layers, self._config
        inputs = layers.rms_norm(f"{name}.norm1", hidden, config.rms_norm_eps)
        projected = layers.linear(f"{name}.attn.qkv", inputs)
        queries, keys, values = projected.unflatten(
            1, (3, config.num_heads, config.head_dim)
        ).unbind(1)
        mixed = attend_within(rotate(queries, rotary), rotate(keys, rotary), values, *segments)
        hidden = hidden + layers.linear(f"{name}.attn.proj", mixed.flatten(1))
        inputs = layers.rms_norm(f"{name}.norm2", hidden, config.rms_norm_eps)
        return hidden + layers.gated_mlp(f"{name}.mlp", inputs, bias=True)

    def _merge(self, hidden: Tensor) -> Tensor:
        normed = self._layers.rms_norm(f"{MERGER}.ln_q", hidden, self._config.rms_norm_eps)
        merged = normed.reshape(-1, self._config.hidden_size * self._config.merge_unit)
        inner = functional.gelu(self._layers.linear(f"{MERGER}.mlp.0", merged))
        return self._layers.linear(f"{MERGER}.mlp.2", inner)

    def _make_layout(self, grid: Grid) -> _Layout:
        cos, sin = torch.from_numpy(vision_rotary([grid], self._config, "float32"))
        return _Layout(
            rotary=(self._to_device(cos), self._to_device(sin)),
            windows=self._segments(window_segments([grid], self._config)),
            frames=self._segments(frame_segments([grid])),
        )

    def _segments(self, segments: Segments) -> tuple[Tensor, Tensor, Tensor]:
        index, inverse = (
            torch.from_numpy(array).to(self._device, torch.int64)
            for array in (segments.index, segments.inverse)
        )
        return index, inverse, self._to_device(torch.from_numpy(segments.mask))

    def _to_device(self, values: Tensor) -> Tensor:
        return values.to(self._device, self._dtype)
