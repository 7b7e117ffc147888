"""Frames to ViT patches on the GPU, as `framesink.runtime.preprocess` makes them on the host."""

from functools import lru_cache

import torch
from torch import Tensor

from framesink.runtime.executors.cuda.kernels.frames import DeviceFilter
from framesink.runtime.executors.cuda.operations import Operations
from framesink.runtime.executors.cuda.resampling import frame_filter
from framesink.runtime.preprocess import Grid, PreprocessConfig, normalised_levels

# As many sizes of frames as cameras may have at once; each takes some kilobytes.
_CACHED_SIZES = 64


class Patchifier:
    """Resizes and normalises frames and sorts their pixels into patches."""

    def __init__(
        self, config: PreprocessConfig, operations: Operations, device: torch.device
    ) -> None:
        self._config = config
        self._operations = operations
        self._device = device
        self._levels = torch.from_numpy(normalised_levels(config)).to(device)
        self._filter = lru_cache(maxsize=_CACHED_SIZES)(self._make_filter)

    def fill(self, frames: Tensor, grid: Grid, out: Tensor) -> None:
        """Write the patches of N chunks into `out` `[N·t·h·w, patch_dim]`: frames uint8
        `[N, T, H, W, 3]` of any size, on the device; `grid` is that of one chunk of the model's
        size. An odd T is completed by repeating the last frame."""
        patch = self._config.patch_size
        source = (frames.shape[2], frames.shape[3])
        resampling = self._filter(source, (grid.h * patch, grid.w * patch))
        self._operations.frames_to_patches(
            frames, resampling, self._levels, grid, self._config, out
        )

    def _make_filter(self, source: tuple[int, int], target: tuple[int, int]) -> DeviceFilter:
        found = frame_filter(source, target)
        rows, columns = found.rows, found.columns
        return DeviceFilter(
            row_index=torch.from_numpy(rows.index).to(self._device),
            row_weight=torch.from_numpy(rows.weight).to(self._device),
            column_index=torch.from_numpy(columns.index).to(self._device),
            column_weight=torch.from_numpy(columns.weight).to(self._device),
            tie=found.tie,
            fixed_point=found.fixed_point,
        )
