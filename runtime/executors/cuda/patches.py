"""Frames to ViT patches on the GPU, as `framesink.runtime.preprocess.patchify` makes them."""

import torch
from torch import Tensor

from framesink.runtime.preprocess import Grid, PreprocessConfig


class Patchifier:
    """Normalises frames and sorts their pixels into patches."""

    def __init__(self, config: PreprocessConfig, dtype: torch.dtype, device: torch.device) -> None:
        """`dtype` is that of the patches."""
        self._config = config
        self._dtype = dtype
        mean = torch.tensor(config.mean, dtype=torch.float64)
        deviation = torch.tensor(config.std, dtype=torch.float64)
        self._factor = (1.0 / (255.0 * deviation)).to(device, torch.float32)
        self._offset = (-mean / deviation).to(device, torch.float32)

    def patches(self, frames: Tensor, grid: Grid) -> Tensor:
        """Frames uint8 `[T, H, W, 3]` of the model's size, on the device, to patches
        `[t·h·w, patch_dim]`; an odd T is completed by repeating the last frame."""
        config = self._config
        temporal, patch, merge = config.temporal_patch_size, config.patch_size, config.merge_size
        missing = grid.t * temporal - len(frames)
        if missing:
            frames = torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)])
        values = (frames * self._factor + self._offset).to(self._dtype)
        down, across = grid.h // merge, grid.w // merge
        blocks = values.view(grid.t, temporal, down, merge, patch, across, merge, patch, 3)
        ordered = blocks.permute(0, 2, 5, 3, 6, 8, 1, 4, 7)
        return ordered.reshape(grid.patches, config.patch_dim)
