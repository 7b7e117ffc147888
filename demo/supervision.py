"""What each part of the picture shows: dense targets that teach the vision encoder to see.

Words alone are a thin signal for eyes: they name one shape in every second chunk. In training, a
linear head on each of the 16 vision embeddings also tells which shape of which colour has its
centre there, in either frame, where in the picture that is, and which part of the picture the
embedding stands for. The head is thrown away afterwards.
"""

import numpy as np
import torch
from torch.nn import functional

from demo import phrases
from demo.forward import GRID, VISION_TOKENS
from demo.scene import SIDE, STEPS_PER_CHUNK, Scene, place_of
from framesink.runtime.arrays import AnyArray

IGNORED = -1
_SHAPES, _COLOURS, _PLACES = len(phrases.SHAPES), len(phrases.COLOURS), len(phrases.PLACES)
# Outputs of the head: shape and colour (0 is none) in the first and in the second frame, the place
# of the shape in the second frame, row and column.
_SPLITS = [_SHAPES + 1, _COLOURS + 1, _SHAPES + 1, _COLOURS + 1, _PLACES, GRID, GRID]
_WEIGHTS = (1.0, 1.0, 1.0, 1.0, 0.5, 0.1, 0.1)
_EMPTY_WEIGHT = 0.1  # of an embedding that shows nothing: most do
HEAD_OUTPUTS = sum(_SPLITS)
TARGETS = 5


def cell_targets(scene: Scene) -> AnyArray:
    """Targets int8 `[chunks, 16, TARGETS]`: shape, colour, shape, colour, place."""
    targets = np.zeros((scene.seconds, VISION_TOKENS, TARGETS), np.int8)
    targets[:, :, 4] = IGNORED
    for chunk in range(scene.seconds):
        for step in range(STEPS_PER_CHUNK):
            at = chunk * STEPS_PER_CHUNK + step
            for sprite in scene.visible(at):
                x, y = sprite.centre(at)
                cell = int(y * GRID / SIDE) * GRID + int(x * GRID / SIDE)
                targets[chunk, cell, 2 * step] = phrases.SHAPES.index(sprite.shape) + 1
                targets[chunk, cell, 2 * step + 1] = phrases.COLOURS.index(sprite.colour(at)) + 1
                place = place_of(x, y) if step else ""
                if place:
                    targets[chunk, cell, 4] = phrases.PLACES.index(place)
    return targets


def cell_loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Loss of head outputs `[N, 16, HEAD_OUTPUTS]` against targets `[N, 16, TARGETS]`."""
    cells = torch.arange(VISION_TOKENS, device=outputs.device).expand(len(outputs), -1)
    wanted = [*targets.long().unbind(2), cells // GRID, cells % GRID]
    total = torch.zeros((), device=outputs.device)
    parts = outputs.float().split(_SPLITS, dim=2)
    for index, (part, target, weight) in enumerate(zip(parts, wanted, _WEIGHTS, strict=True)):
        losses = functional.cross_entropy(
            part.flatten(0, 1), target.flatten(), ignore_index=IGNORED, reduction="none"
        )
        counted = (target.flatten() != IGNORED).float()
        if index < 4:
            counted = torch.where(target.flatten() == 0, _EMPTY_WEIGHT, counted)
        total = total + weight * (losses * counted).sum() / counted.sum().clamp(min=1)
    return total
