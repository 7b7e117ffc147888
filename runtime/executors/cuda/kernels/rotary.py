"""Rotary tables by whole position, and the pieces of kernels that read them."""

from dataclasses import dataclass
from typing import Self

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class RotaryTable:
    """Cosines and sines, float32 `[positions, D/2]`, of every rotary pair at every position.

    `sections` counts the pairs that turn by the t, h and w position of a token (M-RoPE, arXiv
    2409.12191). Kernels look up a position minus a base and a place; the host makes sure that none
    is below 0 or beyond the table.
    """

    cos: Tensor
    sin: Tensor
    sections: tuple[int, int, int]

    @classmethod
    def make(
        cls,
        head_dim: int,
        theta: float,
        sections: tuple[int, int, int],
        positions: int,
        device: torch.device | str,
    ) -> Self:
        """Tables of positions `[0, positions)`, from the frequencies of
        `framesink.runtime.rope.MRopeTable`, their angles in float64."""
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        frequencies = 1.0 / torch.tensor(theta, dtype=torch.float32) ** exponents
        angles = torch.arange(positions, dtype=torch.float32)[:, None] * frequencies
        wide = angles.double()
        return cls(wide.cos().float().to(device), wide.sin().float().to(device), sections)

    @property
    def time_end(self) -> int:
        """The first pair that turns by the h position."""
        return self.sections[0]

    @property
    def height_end(self) -> int:
        """The first pair that turns by the w position."""
        return self.sections[0] + self.sections[1]


@triton.jit
def pair_positions(
    positions, stride, tokens, pair, TIME_END: tl.constexpr, HEIGHT_END: tl.constexpr
):
    """Position of each of `tokens` `[...]` on the axis that `pair` `[...]` turns by: the broadcast
    of both. `positions` int32 `[3, n]` has rows of `stride`."""
    axis = tl.where(pair < TIME_END, 0, tl.where(pair < HEIGHT_END, 1, 2))
    return tl.load(positions + axis * stride + tokens)
