"""The vision encoder's plan."""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from framesink.runtime.arrays import Float32Array
from framesink.runtime.errors import CapacityError
from framesink.runtime.executors.tensorrt.plan import TORCH_TYPES, Plan
from framesink.runtime.executors.tensorrt.shapes import choose_profile
from framesink.runtime.executors.vision_layout import CACHED_GRIDS, vision_layout
from framesink.runtime.models.config import VisionConfig
from framesink.runtime.preprocess import Grid


class VisionEncoderPlan:
    """Encodes one chunk at a time, in as many runs as the plan's profile asks for."""

    def __init__(self, plan: Plan, config: VisionConfig) -> None:
        self._plan = plan
        self._config = config
        self._dtype = TORCH_TYPES[plan.spec.compute_type]
        self._inputs = {spec.name for spec in plan.spec.inputs} - {"patches"}
        self._layout = lru_cache(maxsize=CACHED_GRIDS)(self._make_layout)

    def encode(self, patches: Float32Array, grid: Grid) -> Tensor:
        """Patches float32 `[t·h·w, patch_dim]` to embeddings `[t·h·w / merge², hidden]` on the
        device, in the compute type. Attention stays within a temporal step, so a chunk larger than
        the profile is encoded step by step.

        Raises CapacityError for a frame that is larger than the profile.
        """
        rows = torch.from_numpy(patches).to(self._plan.device, self._dtype)
        frame = grid.h * grid.w
        parts: list[Tensor] = []
        done = 0
        while done < grid.t:
            steps = self._steps_that_fit(grid, grid.t - done)
            part = Grid(steps, grid.h, grid.w)
            first = done * frame
            parts.append(self._encode(rows[first : first + part.patches], part))
            done += steps
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def close(self) -> None:
        """Free the weights."""
        self._layout.cache_clear()
        self._plan.close()

    def _encode(self, patches: Tensor, grid: Grid) -> Tensor:
        inputs = {**self._layout(grid), "patches": patches.contiguous()}
        shape = (grid.patches // self._config.merge_unit, self._config.out_hidden_size)
        outputs = self._plan.allocate({"embeds": shape})
        context = self._plan.context(self._plan.profile_for(inputs))
        self._plan.bind(context, inputs, outputs)
        self._plan.launch(context)
        return outputs["embeds"]

    def _steps_that_fit(self, grid: Grid, left: int) -> int:
        """How many of the temporal steps that are left one run takes."""
        for steps in range(left, 0, -1):
            part = Grid(steps, grid.h, grid.w)
            shapes = {name: tuple(value.shape) for name, value in self._layout(part).items()}
            shapes["patches"] = (part.patches, self._config.patch_dim)
            if choose_profile(self._plan.spec.profiles, shapes) is not None:
                return steps
        raise CapacityError(
            f"A frame of {grid.h} x {grid.w} patches is more than {self._plan.spec.path} was built "
            "for; use smaller frames, or build with a larger --max-patches."
        )

    def _make_layout(self, grid: Grid) -> dict[str, Tensor]:
        layout = vision_layout(grid, self._config, np.float32)
        moved = {}
        for name in self._inputs:
            value = torch.from_numpy(layout[name]).to(self._plan.device)
            moved[name] = value.to(self._dtype) if value.is_floating_point() else value
        return moved
