"""What both model parts are made of: norms and linear layers over the kernels."""

from dataclasses import dataclass

import torch
from torch import Tensor

from framesink.runtime.executors.cuda.kernels.formats import OutputFormat
from framesink.runtime.executors.cuda.kernels.linear import Weights
from framesink.runtime.executors.cuda.operations import Operations


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """A linear layer and the form its input must have."""

    weights: Weights
    input: OutputFormat


class Layers:
    """Runs layers, giving every result a tensor of its own.

    Inside of a CUDA graph and in a warm process those come from torch's pool.
    """

    def __init__(self, operations: Operations, dtype: torch.dtype) -> None:
        """`dtype` is the compute type."""
        self.operations = operations
        self.dtype = dtype

    def linear(self, inputs: Tensor, layer: Linear) -> Tensor:
        """`inputs` `[m, in]` in the form the layer wants, to the compute type `[m, out]`."""
        out = torch.empty(
            len(inputs), len(layer.weights.weight), dtype=self.dtype, device=inputs.device
        )
        self.operations.linear(inputs, layer.weights, out)
        return out

    def rms_norm(
        self,
        hidden: Tensor,
        weight: Tensor,
        epsilon: float,
        reader: Linear,
        delta: Tensor | None = None,
    ) -> Tensor:
        """The norm of `hidden` `[m, n]`, in the form `reader` wants. `delta` is added to `hidden`
        first, in place."""
        out = self.form(hidden.shape, reader, hidden.device)
        self.operations.rms_norm(hidden, weight, epsilon, out, reader.input, delta)
        return out

    def gated_mlp(self, inputs: Tensor, gate_up: Linear, down: Linear) -> Tensor:
        """SwiGLU: `down(silu(gate(x)) · up(x))`."""
        size = len(gate_up.weights.weight) // 2
        inner = self.form((len(inputs), size), down, inputs.device)
        self.operations.gated_linear(inputs, gate_up.weights, inner, down.input, self.dtype)
        return self.linear(inner, down)

    def plain_norm(
        self, hidden: Tensor, weight: Tensor, epsilon: float, delta: Tensor | None = None
    ) -> Tensor:
        """The norm in the compute type."""
        out = torch.empty_like(hidden)
        self.operations.rms_norm(hidden, weight, epsilon, out, OutputFormat(self.dtype), delta)
        return out

    def encode(self, values: Tensor, reader: Linear) -> Tensor:
        """`values` `[m, n]` of the compute type in the form `reader` wants."""
        if reader.input.dtype is self.dtype:
            return values
        out = self.form(values.shape, reader, values.device)
        self.operations.quantize(values, out, reader.input)
        return out

    def form(self, shape: tuple[int, ...], reader: Linear, device: torch.device) -> Tensor:
        """An empty tensor in the form `reader` wants."""
        return torch.empty(shape, dtype=reader.input.dtype, device=device)
