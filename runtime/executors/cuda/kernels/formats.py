"""How a kernel writes what a linear layer reads next."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class OutputFormat:
    """The type of a kernel's output: that of the activations, or the codes of a quantized layer.

    A code stands for code · `scale`, the static scale of the layer's input. `smoothing` float32
    `[in]` multiplies values before they are quantized (SmoothQuant, arXiv 2211.10438).
    """

    dtype: torch.dtype
    scale: float = 1.0
    smoothing: Tensor | None = None


@triton.jit
def encode(values, scale, dtype: tl.constexpr):
    """Float32 `values` as codes of `dtype` under `scale`, to the nearest, ties to even, saturating;
    as they are, if `dtype` is a 16-bit type."""
    if dtype == tl.float8e4nv:
        codes = tl.clamp(values / scale, -448.0, 448.0).to(dtype)
    elif dtype == tl.int8:
        # Adding 1.5 · 2²³ leaves no bits for a fraction: the sum is rounded to a whole number.
        codes = (tl.clamp(values / scale, -128.0, 127.0) + 12582912.0 - 12582912.0).to(dtype)
    else:
        codes = values.to(dtype)
    return codes
