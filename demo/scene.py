"""A scene of the demo world: its shapes, what happens in it, and what is true of every chunk.

A scene is laid out in half-second steps, because the model is shown two frames a second: chunk `i`
is steps `2i` and `2i + 1`. At most one reported event falls into a chunk, and it always lies
between the two steps of its chunk, so that the two frames alone show it. Lengths are pixels of a
112 × 112 picture; a renderer scales them.
"""

from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np

from demo import phrases
from framesink.runtime.arrays import Float32Array

SIDE = 112
STEPS_PER_CHUNK = 2


class EventName(StrEnum):
    """What can happen."""

    ENTERS = "enters"
    LEAVES = "leaves"
    TURNS = "turns"
    BOUNCES = "bounces"


class QuestionName(StrEnum):
    """What can be asked."""

    HOW_MANY = "how_many"
    COLOUR = "colour"
    WHERE = "where"
    LAST = "last"
    ENTERED = "entered"


@dataclass(frozen=True, slots=True)
class SceneEvent:
    """One event. `ordinal` counts entries of this colour and shape in the whole video, from 1, and
    is 0 for other events; `new_colour` is set for a change of colour."""

    name: EventName
    colour: str
    shape: str
    ordinal: int = 0
    new_colour: str = ""

    @property
    def phrase(self) -> str:
        """What a narrator says."""
        if self.name is EventName.ENTERS:
            return phrases.enters(self.ordinal, self.colour, self.shape)
        if self.name is EventName.LEAVES:
            return phrases.leaves(self.colour, self.shape)
        if self.name is EventName.TURNS:
            return phrases.turns(self.colour, self.shape, self.new_colour)
        return phrases.bounces(self.colour, self.shape)


@dataclass(frozen=True, slots=True)
class SceneQuestion:
    """A question asked during a chunk, and its answer."""

    name: QuestionName
    text: str
    answer: str


@dataclass(frozen=True, slots=True)
class ChunkTruth:
    """What is true of one chunk: at most one event or one question, never both."""

    event: SceneEvent | None = None
    question: SceneQuestion | None = None

    @property
    def reply(self) -> str:
        """The words of the right reply; empty for silence."""
        if self.question is not None:
            return self.question.answer
        return self.event.phrase if self.event is not None else ""


@dataclass(slots=True)
class Sprite:
    """One shape, from the step before it enters to the step after it has left.

    `outline` float32 `[n, 2]` is relative to the centre; empty for a circle of `radius`. `centres`
    and `colours` have one entry per step, from `first_step` on.
    """

    shape: str
    radius: float
    outline: Float32Array
    first_step: int
    centres: list[tuple[float, float]] = field(default_factory=list)
    colours: list[str] = field(default_factory=list)

    @property
    def reach(self) -> tuple[float, float, float, float]:
        """How far the shape reaches left, right, up and down from its centre."""
        if not len(self.outline):
            return (self.radius,) * 4
        low, high = self.outline.min(axis=0), self.outline.max(axis=0)
        return float(-low[0]), float(high[0]), float(-low[1]), float(high[1])

    @property
    def spread(self) -> float:
        """Radius of the circle around the shape."""
        if not len(self.outline):
            return self.radius
        return float(np.hypot(self.outline[:, 0], self.outline[:, 1]).max())

    @property
    def last_step(self) -> int:
        """The last step this shape has a place at."""
        return self.first_step + len(self.centres) - 1

    def centre(self, step: int) -> tuple[float, float]:
        """Centre (x, y) at a step."""
        return self.centres[step - self.first_step]

    def colour(self, step: int) -> str:
        """Colour at a step."""
        return self.colours[step - self.first_step]


@dataclass(frozen=True, slots=True)
class Scene:
    """A whole video: its shapes, bottom first, and the truth of every chunk."""

    seed: int
    seconds: int
    sprites: tuple[Sprite, ...]
    truth: tuple[ChunkTruth, ...]

    def visible(self, step: int) -> list[Sprite]:
        """Shapes inside the picture at a step."""
        return [s for s in self.sprites if s.first_step < step <= s.last_step and _inside(s, step)]


def _inside(sprite: Sprite, step: int) -> bool:
    x, y = sprite.centre(step)
    return 0 < x < SIDE and 0 < y < SIDE


def place_of(x: float, y: float) -> str:
    """The part of the picture a centre lies in, or "" where a person could argue."""
    dx, dy = x - SIDE / 2, y - SIDE / 2
    if max(abs(dx), abs(dy)) <= 9:
        return "centre"
    if abs(dx) >= max(18.0, abs(dy) + 9):
        return "left" if dx < 0 else "right"
    if abs(dy) >= max(18.0, abs(dx) + 9):
        return "top" if dy < 0 else "bottom"
    return ""
