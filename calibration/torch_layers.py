"""What both model parts are made of, in torch: linear layers, norms, rotary, attention, MLP."""

import torch
from torch import Tensor
from torch.nn import functional

from framesink.calibration.taps import Numerics, Rotary, Taps
from framesink.calibration.torch_weights import TorchWeights


class TorchLayers:
    """Runs the operations that have weights, watched by `taps`, calculated by `numerics`."""

    def __init__(self, weights: TorchWeights, taps: Taps | None, numerics: Numerics) -> None:
        self.weights = weights
        self.taps = taps
        self.numerics = numerics

    def linear(self, name: str, inputs: Tensor, *, bias: bool = True) -> Tensor:
        """`inputs [n, in]` through the linear layer `name`. A kernel of more than two dimensions
        is one of a patch embedding: a linear layer over flattened patches."""
        if self.taps is not None:
            self.taps.linear_input(name, inputs)
        weight = self.weights.get(f"{name}.weight").flatten(1)
        constant = self.weights.get(f"{name}.bias") if bias else None
        return self.numerics.linear(name, inputs, weight, constant)

    def rms_norm(self, name: str, inputs: Tensor, epsilon: float) -> Tensor:
        """Root-mean-square norm over the last axis (arXiv 1910.07467), its mean in float32."""
        wide = inputs.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
        return self.weights.get(f"{name}.weight") * normed.to(inputs.dtype)

    def gated_mlp(self, name: str, inputs: Tensor, *, bias: bool) -> Tensor:
        """SwiGLU: `down(silu(gate(x)) · up(x))`."""
        gate = functional.silu(self.linear(f"{name}.gate_proj", inputs, bias=bias))
        up = self.linear(f"{name}.up_proj", inputs, bias=bias)
        return self.linear(f"{name}.down_proj", gate * up, bias=bias)


def rotate(inputs: Tensor, rotary: Rotary) -> Tensor:
    """Rotary embedding of `inputs [n, heads, D]` by per-token tables `[n, D/2]`."""
    cos, sin = (table[:, None] for table in rotary)
    first, second = inputs.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Causal attention of the last s of m tokens.

    `queries [s, heads, D]`, `keys` and `values` `[m, Hkv, D]`, the last s rows of which are the
    queries' own; Hkv divides heads. Returns `[s, heads, D]`.
    """
    new, total = len(queries), len(keys)
    mask = None
    if new > 1:
        mask = torch.ones(new, total, dtype=torch.bool, device=queries.device).tril(total - new)
    query, key, value = (rows.transpose(0, 1)[None] for rows in (queries, keys, values))
    mixed = functional.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
    return mixed[0].transpose(0, 1)


def attend_within(
    queries: Tensor, keys: Tensor, values: Tensor, index: Tensor, inverse: Tensor, mask: Tensor
) -> Tensor:
    """Attention of `[n, heads, D]` within segments: see `Segments` in
    `framesink.runtime.models.vision_segments` for `index`, `inverse` and `mask`."""
    query, key, value = (rows[index].transpose(1, 2) for rows in (queries, keys, values))
    mixed = functional.scaled_dot_product_attention(query, key, value, mask)
    return mixed.transpose(1, 2).flatten(0, 1)[inverse]
