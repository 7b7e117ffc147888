"""A step's inputs on the device: rotary tables and masks are made there from small integers."""

import numpy as np
import torch
from torch import Tensor

from framesink.runtime.arrays import Int32Array
from framesink.runtime.executors.batching import PaddedGroup
from framesink.runtime.models.config import TextConfig
from framesink.runtime.models.vision_segments import MASKED
from framesink.runtime.rope import INITIAL_POSITIONS, MRopeTable


class StepInputs:
    """Makes the inputs of the language model that follow from a group's integers."""

    def __init__(self, config: TextConfig, dtype: torch.dtype, device: torch.device) -> None:
        """`dtype` is the compute type."""
        self._config = config
        self._dtype = dtype
        self._device = device
        ends = np.cumsum(config.mrope_section).tolist()
        self._sections = [
            slice(end - size, end) for end, size in zip(ends, config.mrope_section, strict=True)
        ]
        self._tables = self._make_tables(INITIAL_POSITIONS)

    def make(self, group: PaddedGroup) -> dict[str, Tensor]:
        """Rotary tables, mask, block table and last rows, by graph input."""
        cos_context, sin_context = self._lookup(group.context_positions)
        cos_new, sin_new = self._lookup(group.new_positions)
        return {
            "cos_new": cos_new,
            "sin_new": sin_new,
            "cos_ctx": cos_context,
            "sin_ctx": sin_context,
            "mask": self._mask(group),
            "block_table": torch.from_numpy(group.block_table).to(self._device),
            "last": torch.from_numpy(group.last).to(self._device),
        }

    def _lookup(self, positions: Int32Array) -> Tensor:
        """Cosines and sines `[2, ..., D/2]` of positions int32 `[3, ...]`: see `MRopeTable`."""
        largest = int(positions.max(initial=0))
        if largest >= self._tables.shape[1]:
            self._tables = self._make_tables(2 * largest)
        rows = torch.from_numpy(positions.reshape(3, -1)).to(self._device)
        parts = [
            self._tables[:, :, section].index_select(1, axis_rows)
            for section, axis_rows in zip(self._sections, rows, strict=True)
        ]
        return torch.cat(parts, dim=-1).view(2, *positions.shape[1:], -1)

    def _make_tables(self, count: int) -> Tensor:
        positions = np.tile(np.arange(count, dtype=np.int32), (3, 1))
        tables = MRopeTable(self._config, np.float32).lookup(positions)
        return torch.from_numpy(tables).to(self._device, self._dtype)

    def _mask(self, group: PaddedGroup) -> Tensor:
        """See `PaddedGroup.mask`."""
        (count, context), new = group.visible.shape, group.new_positions.shape[2]
        shape = (count, 1, new, context + new)
        mask = torch.full(shape, MASKED, dtype=self._dtype, device=self._device)
        visible = torch.from_numpy(group.visible).to(self._device)
        mask[..., :context].masked_fill_(visible[:, None, None], 0.0)
        mask[..., context:].triu_(1)
        return mask
