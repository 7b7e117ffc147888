"""Rotary tables by whole position, and rotation by a base."""

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
    2409.12191). Kernels look up positions, places and the magnitudes of bases; the host makes sure
    that none is beyond the table.
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
def turn(first, second, cosines, sines, position, pair, HALF: tl.constexpr):
    """Both halves of rows, rotated by `position` (broadcast; of any sign)."""
    angle = tl.abs(position) * HALF + pair
    cos = tl.load(cosines + angle)
    sin = tl.load(sines + angle)
    sin = tl.where(position < 0, -sin, sin)
    return first * cos - second * sin, second * cos + first * sin
