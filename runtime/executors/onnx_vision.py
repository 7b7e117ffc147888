"""The vision encoder alone, in ONNX Runtime on the CPU."""

from functools import lru_cache
from pathlib import Path
from typing import Self

import numpy as np

from framesink.runtime.arrays import AnyArray, Float32Array
from framesink.runtime.bundle import Bundle
from framesink.runtime.executors.onnx_graph import input_dtype, load_graph
from framesink.runtime.executors.vision_layout import CACHED_GRIDS, vision_layout
from framesink.runtime.models.config import ModelConfig
from framesink.runtime.preprocess import Grid


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
        layout = vision_layout(grid, self._config, self._dtype)
        return {name: array for name, array in layout.items() if name in self._inputs}

    def close(self) -> None:
        """Free the weights."""
        del self._graph
