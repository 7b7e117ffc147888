"""What the model parts are calculated with: the kernels, behind one border.

Every function writes into tensors it is given; the kernels' own docstrings say what they compute.
"""

from typing import Protocol

import torch
from torch import Tensor

from framesink.runtime.executors.cuda.kernels.formats import OutputFormat
from framesink.runtime.executors.cuda.kernels.frames import DeviceFilter
from framesink.runtime.executors.cuda.kernels.linear import Weights
from framesink.runtime.executors.cuda.kernels.pages import LayerPages
from framesink.runtime.executors.cuda.kernels.rotary import RotaryTable
from framesink.runtime.executors.cuda.kernels.step_tokens import Choosing, TileChanges
from framesink.runtime.executors.cuda.kernels.tiles import DeviceRows, DeviceTiles, NewRows
from framesink.runtime.preprocess import Grid, PreprocessConfig


class Operations(Protocol):
    """A module that has these functions will do."""

    def begin_step(
        self,
        tokens: Tensor,
        last_tokens: Tensor,
        embedding: Tensor,
        tiles: DeviceTiles,
        changes: TileChanges,
        hidden: Tensor,
        /,
    ) -> None:
        """Bring contexts up to date, and embed a decode step's tokens."""
        ...

    def choose_likeliest(
        self, logits: Tensor, rows: Tensor, choosing: Choosing, tokens: Tensor, /
    ) -> None:
        """The likeliest tokens that may be chosen."""
        ...

    def rotate_and_append(
        self,
        qkv: Tensor,
        rotary: RotaryTable,
        rows: NewRows,
        pages: LayerPages,
        /,
    ) -> None:
        """Rotate queries and keys in place by their positions, and write new rows into the pages,
        keys rotated by their places."""
        ...

    def paged_decode(
        self,
        qkv: Tensor,
        rotary: RotaryTable,
        rows: NewRows,
        tiles: DeviceTiles,
        pages: LayerPages,
        out: Tensor,
        output: OutputFormat,
        /,
    ) -> None:
        """Write a new row of each sequence into the pages, and attend from it to tiles that include
        it."""
        ...

    def paged_prefill(
        self,
        qkv: Tensor,
        rotary: RotaryTable,
        starts: Tensor,
        longest: int,
        rows: DeviceRows,
        pages: LayerPages,
        out: Tensor,
        output: OutputFormat,
        /,
    ) -> None:
        """Attention of several new tokens per sequence, to rows and causally to each other."""
        ...

    def rms_norm(
        self,
        hidden: Tensor,
        weight: Tensor,
        epsilon: float,
        out: Tensor,
        output: OutputFormat,
        delta: Tensor | None = None,
        /,
    ) -> None:
        """Root-mean-square norm of `hidden`, after `delta` was added to it in place."""
        ...

    def quantize(self, values: Tensor, out: Tensor, output: OutputFormat, /) -> None:
        """Values of the compute type as codes."""
        ...

    def rotate_heads(self, qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, /) -> None:
        """Rotate the queries and keys of the vision encoder, in place."""
        ...

    def window_attention(
        self,
        qkv: Tensor,
        starts: Tensor,
        longest: int,
        heads: int,
        out: Tensor,
        output: OutputFormat,
        /,
    ) -> None:
        """Attention within the windows of the vision encoder, queries and keys rotated before."""
        ...

    def frames_to_patches(
        self,
        frames: Tensor,
        resampling: DeviceFilter,
        levels: Tensor,
        grid: Grid,
        config: PreprocessConfig,
        out: Tensor,
        /,
    ) -> None:
        """Frames of several chunks, resized and normalised, as patches."""
        ...

    def linear(self, inputs: Tensor, weights: Weights, out: Tensor, /) -> None:
        """A linear layer."""
        ...

    def gated_linear(
        self,
        inputs: Tensor,
        weights: Weights,
        out: Tensor,
        output: OutputFormat,
        dtype: torch.dtype,
        /,
    ) -> None:
        """`silu(gate) · up` of a linear layer whose outputs are both, in the compute type."""
        ...
