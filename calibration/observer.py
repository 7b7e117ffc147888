"""Absolute maxima of the tensors of a forward pass, layer by layer."""

from dataclasses import dataclass

import numpy as np

from framesink.calibration.dequantized import read_weight
from framesink.calibration.ranges import LayerRange, PartRanges
from framesink.runtime.arrays import Float32Array
from framesink.runtime.errors import CheckpointError
from framesink.runtime.models.checkpoint import Checkpoint


class RangeObserver:
    """Collects maxima over any number of forward passes of one part."""

    def __init__(self) -> None:
        self._maxima: dict[str, dict[str, float]] = {}

    def record(self, layer: str, tensor: str, values: Float32Array) -> None:
        """Note the largest magnitude of `values`.

        Raises CheckpointError, naming the layer, if a value is NaN or infinite.
        """
        largest = float(max(values.max(), -values.min())) if values.size else 0.0
        if not np.isfinite(largest):
            raise CheckpointError(
                f"{layer}.{tensor} holds NaN or infinite values even in float32; the checkpoint is "
                "damaged."
            )
        maxima = self._maxima.setdefault(layer, {})
        maxima[tensor] = max(maxima.get(tensor, 0.0), largest)

    def ranges(self) -> PartRanges:
        """What was seen so far, in the order the layers first ran."""
        layers = (LayerRange(layer=name, maxima=seen) for name, seen in self._maxima.items())
        return PartRanges(layers=tuple(layers))


@dataclass(frozen=True, slots=True)
class ObservedLayer:
    """Runs the operations of one layer that have weights, and records what goes through them.

    Each weight is read in float32 when it is needed and let go afterwards.
    """

    checkpoint: Checkpoint
    name: str
    observer: RangeObserver

    def record(self, tensor: str, values: Float32Array) -> None:
        """Note the largest magnitude of one of the layer's tensors."""
        self.observer.record(self.name, tensor, values)

    def weight(self, name: str) -> Float32Array:
        """One of the layer's weights in float32."""
        weight = read_weight(self.checkpoint, f"{self.name}.{name}")
        self.record(name, weight)
        return weight

    def linear(self, name: str, inputs: Float32Array, *, bias: bool) -> Float32Array:
        """`inputs [n, in]` through the linear layer `name` to `[n, out]`."""
        outputs: Float32Array = inputs @ self.weight(f"{name}.weight").T
        if bias:
            outputs += self.weight(f"{name}.bias")
        self.record(name, outputs)
        return outputs

    def rms_norm(self, name: str, inputs: Float32Array, epsilon: float) -> Float32Array:
        """Root-mean-square norm over the last axis (arXiv 1910.07467)."""
        mean_square = np.mean(np.square(inputs), axis=-1, keepdims=True)
        outputs: Float32Array = inputs / np.sqrt(mean_square + np.float32(epsilon))
        outputs *= self.weight(f"{name}.weight")
        self.record(name, outputs)
        return outputs
