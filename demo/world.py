"""The demo world: lays out the scene of a seed.

Shapes of a small cast enter, leave, bounce and change colour; entries of one kind are often further
apart than the model's window is long, so that their count must be remembered as text.
"""

from typing import TypeAlias

import numpy as np

from demo import phrases
from demo.scene import (
    SIDE,
    STEPS_PER_CHUNK,
    ChunkTruth,
    EventName,
    QuestionName,
    Scene,
    SceneEvent,
    SceneQuestion,
    Sprite,
    place_of,
)
from framesink.runtime.arrays import Float32Array

MARGIN = 6.0  # a shape that does not touch a wall stays this far from it
OUTSIDE = 3.0  # a shape that is outside is this far from the wall
MAX_ON_SCREEN = 4
MIN_SPACING = 0.7  # centres of two shapes, in sums of their radii: partial overlap
PLACEMENT_TRIES = 300

HELD_OUT_SEEDS = range(0, 100_000)
TRAINING_SEEDS_START = 1_000_000


def make_scene(
    seed: int, seconds: int, *, event_rate: float | None = None, question_rate: float = 0.2
) -> Scene:
    """The scene of a seed. The same arguments always give the same scene.

    `event_rate` is the chance of an event in a chunk (None: drawn from 0.35 to 0.6 for the scene),
    `question_rate` the chance of a question in a chunk without an event.
    """
    for attempt in range(100):
        try:
            return _Builder(seed, attempt, seconds, event_rate, question_rate).build()
        except _NoRoomError:
            continue
    raise RuntimeError(f"No scene could be laid out for seed {seed}.")


_Placed: TypeAlias = tuple[Sprite, tuple[float, float]]


class _NoRoomError(Exception):
    """The shapes of a scene left no room for the next one."""


class _Builder:
    """Lays out one scene, chunk by chunk."""

    def __init__(
        self, seed: int, attempt: int, seconds: int, event_rate: float | None, question_rate: float
    ) -> None:
        self.seed, self.seconds = seed, seconds
        self.random = np.random.default_rng([seed, attempt])
        drawn_rate = float(self.random.uniform(0.35, 0.6))
        self.event_rate = drawn_rate if event_rate is None else event_rate
        self.question_rate = question_rate
        classes = [(colour, shape) for colour in phrases.COLOURS for shape in phrases.SHAPES]
        size = int(self.random.integers(2, 6))
        chosen = self.random.choice(len(classes), size=size, replace=False)
        self.cast = [classes[index] for index in chosen]
        self.cast_weights = self.random.dirichlet(np.full(size, 3.0))
        self.entered: dict[tuple[str, str], int] = {}
        self.last_entered: tuple[str, str] | None = None
        self.active: list[Sprite] = []
        self.finished: list[Sprite] = []
        self.velocity: dict[int, tuple[float, float]] = {}
        self.order: dict[int, float] = {}

    def build(self) -> Scene:
        """The scene. Raises _NoRoomError if its shapes stand in each other's way."""
        truth = [self._chunk(index) for index in range(self.seconds)]
        # A last step, so that a renderer can move shapes until the very end.
        self._drift(self.seconds * STEPS_PER_CHUNK)
        sprites = sorted(self.finished + self.active, key=lambda sprite: self.order[id(sprite)])
        return Scene(self.seed, self.seconds, tuple(sprites), tuple(truth))

    def _chunk(self, index: int) -> ChunkTruth:
        step = index * STEPS_PER_CHUNK
        if index:
            self._drift(step)
        event = self._event(step) if self.random.random() < self.event_rate else None
        if event is not None:
            return ChunkTruth(event=event)
        self._drift(step + 1)
        if self.random.random() < self.question_rate:
            return ChunkTruth(question=self._question(step + 1))
        return ChunkTruth()

    def _event(self, step: int) -> SceneEvent | None:
        """Draw an event and lay out step + 1; None, with nothing laid out, if it cannot happen."""
        crowd = len(self.active)
        weights = {
            EventName.ENTERS: 5.0 if crowd < MAX_ON_SCREEN else 0.0,
            EventName.LEAVES: (0.0, 1.5, 3.0, 5.0, 7.0)[crowd],
            EventName.TURNS: 1.5 if crowd else 0.0,
            EventName.BOUNCES: 2.0 if crowd else 0.0,
        }
        chances = np.array(list(weights.values()))
        name = list(weights)[int(self.random.choice(len(weights), p=chances / chances.sum()))]
        if name is EventName.ENTERS:
            return self._enter(step)
        sprite = self.active[int(self.random.integers(crowd))]
        colour, shape = sprite.colour(step), sprite.shape
        if name is EventName.LEAVES:
            self._move(
                sprite, self._beside_wall(sprite, *sprite.centre(step), gap=-OUTSIDE), colour
            )
            self.active.remove(sprite)
            self.finished.append(sprite)
            self._drift(step + 1)
            return SceneEvent(name, colour, shape)
        if name is EventName.TURNS:
            palette = [other for other in phrases.COLOURS if other != colour]
            new_colour = palette[int(self.random.integers(len(palette)))]
            self._drift(step + 1)
            sprite.colours[-1] = new_colour
            return SceneEvent(name, colour, shape, new_colour=new_colour)
        touching = self._beside_wall(sprite, *sprite.centre(step), gap=0.0)
        others = [(other, other.centre(step)) for other in self.active if other is not sprite]
        if not self._free(sprite, touching, others):
            return None
        self._move(sprite, touching, colour)
        self._drift(step + 1, placed=sprite)
        return SceneEvent(name, colour, shape)

    def _enter(self, step: int) -> SceneEvent | None:
        open_classes = [
            (cast, weight)
            for cast, weight in zip(self.cast, self.cast_weights, strict=True)
            if self.entered.get(cast, 0) < phrases.MAX_COUNT
        ]
        if not open_classes:
            return None
        weights = np.array([weight for _, weight in open_classes])
        pick = int(self.random.choice(len(open_classes), p=weights / weights.sum()))
        colour, shape = open_classes[pick][0]
        sprite = self._new_sprite(shape, step)
        self._drift(step + 1)
        others = [(other, other.centre(step + 1)) for other in self.active]
        inside = self._somewhere(sprite, others)
        sprite.centres = [self._beside_wall(sprite, *inside, gap=-OUTSIDE), inside]
        sprite.colours = [colour, colour]
        self.active.append(sprite)
        self.entered[colour, shape] = self.entered.get((colour, shape), 0) + 1
        self.last_entered = (colour, shape)
        return SceneEvent(EventName.ENTERS, colour, shape, ordinal=self.entered[colour, shape])

    def _new_sprite(self, shape: str, step: int) -> Sprite:
        radius = float(self.random.uniform(12.0, 16.0))
        sprite = Sprite(shape, radius, _outline(shape, radius, self.random.uniform(0, 360)), step)
        angle, speed = self.random.uniform(0, 2 * np.pi), self.random.uniform(3.0, 14.0)
        self.velocity[id(sprite)] = (float(speed * np.cos(angle)), float(speed * np.sin(angle)))
        self.order[id(sprite)] = float(self.random.random())
        return sprite

    def _drift(self, step: int, placed: Sprite | None = None) -> None:
        """Move every shape on to `step` that has no place there yet."""
        done = [(placed, placed.centre(step))] if placed is not None else []
        waiting = [sprite for sprite in self.active if sprite is not placed]
        for index, sprite in enumerate(waiting):
            ahead = [(other, other.centre(step - 1)) for other in waiting[index + 1 :]]
            self._move(sprite, self._next_centre(sprite, step, done, ahead), sprite.colours[-1])
            done.append((sprite, sprite.centre(step)))

    def _next_centre(
        self,
        sprite: Sprite,
        step: int,
        done: list[_Placed],
        ahead: list[_Placed],
    ) -> tuple[float, float]:
        x, y = sprite.centre(step - 1)
        vx, vy = self.velocity[id(sprite)]
        for attempt in range(PLACEMENT_TRIES):
            # The further the tries go, the freer the move.
            jitter = 0.5 + attempt * 0.2
            nx = x + vx / STEPS_PER_CHUNK + float(self.random.normal(0, jitter))
            ny = y + vy / STEPS_PER_CHUNK + float(self.random.normal(0, jitter))
            if not self._clear_of_walls(sprite, nx, ny):
                continue
            others = done + ahead if attempt < PLACEMENT_TRIES // 2 else done
            if self._free(sprite, (nx, ny), others):
                self._steer(sprite, (nx - x) * STEPS_PER_CHUNK, (ny - y) * STEPS_PER_CHUNK)
                return nx, ny
        raise _NoRoomError

    def _steer(self, sprite: Sprite, vx: float, vy: float) -> None:
        """Keep going the way of the last move, at a speed within bounds."""
        speed = max(1e-6, float(np.hypot(vx, vy)))
        scale = float(np.clip(speed, 3.0, 14.0)) / speed
        self.velocity[id(sprite)] = (vx * scale, vy * scale)

    def _somewhere(self, sprite: Sprite, others: list[_Placed]) -> tuple[float, float]:
        for _ in range(PLACEMENT_TRIES):
            x, y = (float(value) for value in self.random.uniform(MARGIN, SIDE - MARGIN, 2))
            if self._clear_of_walls(sprite, x, y) and self._free(sprite, (x, y), others):
                return x, y
        raise _NoRoomError

    def _question(self, step: int) -> SceneQuestion | None:
        """A question that the picture at `step` and the past answer beyond doubt."""
        shapes = [sprite.shape for sprite in self.active]
        classes = [(sprite.colour(step), sprite.shape) for sprite in self.active]
        kinds = [QuestionName.HOW_MANY]
        single_shapes = [s for s in self.active if shapes.count(s.shape) == 1]
        placed = [
            (s, place_of(*s.centre(step)))
            for s in self.active
            if classes.count((s.colour(step), s.shape)) == 1
        ]
        placed = [(sprite, place) for sprite, place in placed if place]
        if single_shapes:
            kinds.append(QuestionName.COLOUR)
        if placed:
            kinds.append(QuestionName.WHERE)
        if self.last_entered is not None:
            kinds += [QuestionName.LAST, QuestionName.ENTERED]
        name = kinds[int(self.random.integers(len(kinds)))]
        if name is QuestionName.HOW_MANY:
            texts, answer = phrases.ask_how_many(), phrases.answer_how_many(len(shapes))
        elif name is QuestionName.COLOUR:
            sprite = single_shapes[int(self.random.integers(len(single_shapes)))]
            texts = phrases.ask_colour(sprite.shape)
            answer = phrases.answer_colour(sprite.colour(step))
        elif name is QuestionName.WHERE:
            sprite, place = placed[int(self.random.integers(len(placed)))]
            texts = phrases.ask_where(sprite.colour(step), sprite.shape)
            answer = phrases.answer_where(place)
        elif name is QuestionName.LAST:
            assert self.last_entered is not None
            texts, answer = phrases.ask_last(), phrases.answer_last(*self.last_entered)
        else:
            colour, shape = self.cast[int(self.random.integers(len(self.cast)))]
            texts = phrases.ask_entered(colour, shape)
            answer = phrases.answer_entered(self.entered.get((colour, shape), 0))
        return SceneQuestion(name, texts[int(self.random.integers(len(texts)))], answer)

    @staticmethod
    def _move(sprite: Sprite, centre: tuple[float, float], colour: str) -> None:
        sprite.centres.append(centre)
        sprite.colours.append(colour)

    @staticmethod
    def _clear_of_walls(sprite: Sprite, x: float, y: float) -> bool:
        left, right, up, down = sprite.reach
        return (
            left + MARGIN <= x <= SIDE - right - MARGIN and up + MARGIN <= y <= SIDE - down - MARGIN
        )

    @staticmethod
    def _free(
        sprite: Sprite,
        centre: tuple[float, float],
        others: list[_Placed],
    ) -> bool:
        return all(
            np.hypot(centre[0] - x, centre[1] - y) >= MIN_SPACING * (sprite.spread + other.spread)
            for other, (x, y) in others
        )

    @staticmethod
    def _beside_wall(sprite: Sprite, x: float, y: float, *, gap: float) -> tuple[float, float]:
        """The spot at the wall nearest to (x, y), `gap` from it; a negative gap is outside."""
        left, right, up, down = sprite.reach
        if gap < 0:
            left, right, up, down = -right, -left, -down, -up
        distances = (x, SIDE - x, y, SIDE - y)
        wall = distances.index(min(distances))
        return (
            (left + gap, y),
            (SIDE - right - gap, y),
            (x, up + gap),
            (x, SIDE - down - gap),
        )[wall]


def _outline(shape: str, radius: float, degrees: float) -> Float32Array:
    """Corners of a turned shape, about as large as the circle of `radius`; none for a circle."""
    if shape == "circle":
        return np.zeros((0, 2), np.float32)
    if shape == "square":
        radii, count = [1.2 * radius], 4
    elif shape == "triangle":
        radii, count = [1.35 * radius], 3
    else:
        radii, count = [1.35 * radius, 0.6 * radius], 10
    angles = np.deg2rad(degrees) + np.arange(count) * (2 * np.pi / count)
    corner_radii = np.array([radii[index % len(radii)] for index in range(count)])
    corners = np.stack([np.cos(angles), np.sin(angles)], axis=1) * corner_radii[:, None]
    return np.asarray(corners, dtype=np.float32)
