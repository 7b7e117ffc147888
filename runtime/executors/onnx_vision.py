"""The vision encoder alone, in ONNX Runtime on the CPU."""

from functools import lru_cache
from pathlib import Path
from typing import Self

import numpy as np

from framesink.runtime.arrays import AnyArray, Float32Array
from framesink.runtime.bundle import Bundle
from framesink.runtime.executors.onnx_graph import input_dtype, load_graph
from framesink.runtime.models.config import ModelConfig
from framesink.runtime.models.vision_segments import frame_segments, window_segments
from framesink.runtime.preprocess import Grid
from framesink.runtime.rope import vision_rotary

# A live session has one grid, and another after a change of resolution.
CACHED_GRIDS = 16


class OnnxVisionEncoder:
    """Runs the vision encoder's graph. See `framesink.runtime.executors.base.VisionEncoder`."""

    def __init__(self, config: ModelConfig, graph: Path, *, threads: int | None = None) -> None:
        """Load an ONNX file; `threads` is how many threads an operator may use (None: one per
        physical core). Raises BundleError for a graph that does not load."""
        self._config = config.vision
        self._graph = load_graph(graph, threads)
        self._inputs = {value.name for value in self._graph.get_inputs()}
        self._dtype = input_dtype(self._graph, "patches")
        self._layout = lru_cache(maxsize=CACHED_GRIDS)(self._make_layout)

    @classmethod
    def from_bundle(cls, bundle: Bundle, *, threads: int | None = None) -> Self:
        """Load a bundle's executed graph. Raises BundleError as the constructor does."""
        manifest = bundle.manifest
        graph = bundle.path(manifest.vision_encoder.executed.path)
        return cls(manifest.model, graph, threads=threads)

    def encode_vision(self, patches: Float32Array, grid: Grid) -> Float32Array:
        """Patches float32 `[t·h·w, patch_dim]` to embeddings float32 `[t·h·w / merge², hidden]`."""
        feeds = {**self._layout(grid), "patches": patches.astype(self._dtype)}
        (embeddings,) = self._graph.run(None, feeds)
        return np.asarray(embeddings, np.float32)

    def _make_layout(self, grid: Grid) -> dict[str, AnyArray]:
        """The inputs of the vision encoder that depend on the grid alone."""
        config, dtype = self._config, self._dtype
        cos, sin = vision_rotary([grid], config, dtype)
        layout = {"cos": cos, "sin": sin}
        segments = {"window": window_segments([grid], config), "frame": frame_segments([grid])}
        for kind, segment in segments.items():
            layout[f"{kind}_index"] = segment.index
            layout[f"{kind}_inverse"] = segment.inverse
            layout[f"{kind}_mask"] = segment.mask.astype(dtype)
        return {name: array for name, array in layout.items() if name in self._inputs}

    def close(self) -> None:
        """Free the weights."""
        del self._graph
