"""Scenes of the demo world: the same every time, and their labels are what the pixels show."""

import json
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest

from demo import phrases
from demo.clip import clip_scene, ground_truth
from demo.render import Renderer, render_chunks
from demo.scene import EventName, QuestionName, Scene
from demo.world import HELD_OUT_SEEDS, TRAINING_SEEDS_START, make_scene
from framesink.runtime.arrays import BoolArray, UInt8Array

DEMO = Path(__file__).parents[1] / "demo"
# Hues (OpenCV, 0 to 179) that only shapes of one colour have; red goes around the circle.
HUES = {
    "red": (173, 9),
    "green": (50, 70),
    "blue": (104, 124),
    "yellow": (20, 36),
    "purple": (136, 156),
    "cyan": (80, 100),
}
SMALLEST_SHAPE = 250  # pixels


def colour_mask(frame: UInt8Array, colour: str) -> BoolArray:
    """Pixels of a colour, found without knowing the scene."""
    hsv = cv2.cvtColor(cv2.GaussianBlur(frame, (3, 3), 0), cv2.COLOR_RGB2HSV)
    hue, saturation, value = hsv[..., 0], hsv[..., 1], hsv[..., 2]
    low, high = HUES[colour]
    within = (hue >= low) | (hue <= high) if low > high else (hue >= low) & (hue <= high)
    mask: BoolArray = within & (saturation > 120) & (value > 90)
    return mask


def areas(frame: UInt8Array) -> dict[str, int]:
    """Pixels of every colour."""
    return {colour: int(colour_mask(frame, colour).sum()) for colour in HUES}


def touches_wall(frame: UInt8Array) -> bool:
    """Whether anything coloured lies on the picture's rim."""
    mask = np.any([colour_mask(frame, colour) for colour in HUES], axis=0)
    rim = np.concatenate([mask[:2].ravel(), mask[-2:].ravel(), mask[:, :2].ravel()])
    return int(rim.sum()) + int(mask[:, -2:].sum()) > 3


@pytest.fixture(scope="module", params=[11, 12, 13, 14])
def scene(request: pytest.FixtureRequest) -> Scene:
    return make_scene(request.param, 60, event_rate=0.6)


@pytest.fixture(scope="module")
def frames(scene: Scene) -> UInt8Array:
    renderer = Renderer(scene)
    # Steady light and no noise, so that colours can be measured.
    renderer.noise[:] = 0
    renderer.flicker = 0.0
    steps = [[renderer.frame(chunk + step / 2) for step in (0, 1)] for chunk in range(60)]
    return np.array(steps)


def test_a_seed_always_gives_the_same_video() -> None:
    once, again = make_scene(42, 20), make_scene(42, 20)
    assert once.truth == again.truth
    assert np.array_equal(render_chunks(once), render_chunks(again))
    assert make_scene(43, 20).truth != once.truth


def test_a_longer_video_begins_like_a_shorter_one() -> None:
    assert make_scene(42, 30).truth[:20] == make_scene(42, 20).truth


def test_held_out_seeds_are_never_trained_on() -> None:
    assert max(HELD_OUT_SEEDS) < TRAINING_SEEDS_START
    assert clip_scene().seed in HELD_OUT_SEEDS


def test_events_are_what_the_two_frames_show(scene: Scene, frames: UInt8Array) -> None:
    checked: Counter[EventName] = Counter()
    for truth, (first, second) in zip(scene.truth, frames, strict=True):
        before, after = areas(first), areas(second)
        gain = {colour: after[colour] - before[colour] for colour in HUES}
        event = truth.event
        assert not touches_wall(first)
        assert touches_wall(second) == (event is not None and event.name is EventName.BOUNCES)
        if event is None or event.name is EventName.BOUNCES:
            # Shapes may cover each other a little more or less.
            assert max(abs(change) for change in gain.values()) < SMALLEST_SHAPE
        elif event.name is EventName.ENTERS:
            assert gain[event.colour] > SMALLEST_SHAPE
        elif event.name is EventName.LEAVES:
            assert gain[event.colour] < -SMALLEST_SHAPE
        else:
            assert gain[event.colour] < -SMALLEST_SHAPE
            assert gain[event.new_colour] > SMALLEST_SHAPE
        if event is not None:
            checked[event.name] += 1
    assert checked[EventName.ENTERS] >= 5
    assert checked[EventName.LEAVES] >= 3


def test_colours_on_screen_are_those_of_the_scene(scene: Scene, frames: UInt8Array) -> None:
    for chunk in range(scene.seconds):
        for step in (0, 1):
            at = 2 * chunk + step
            shown = {colour for colour, area in areas(frames[chunk, step]).items() if area > 60}
            assert shown == {sprite.colour(at) for sprite in scene.visible(at)}


def test_counts_and_answers_follow_from_the_events_before() -> None:
    asked: Counter[QuestionName] = Counter()
    for seed in range(60, 90):
        entered: Counter[tuple[str, str]] = Counter()
        last, on_screen = ("", ""), 0
        for truth in make_scene(seed, 80, question_rate=0.6).truth:
            event, question = truth.event, truth.question
            assert event is None or question is None
            if event is not None and event.name is EventName.ENTERS:
                last = (event.colour, event.shape)
                entered[last] += 1
                on_screen += 1
                assert event.ordinal == entered[last]
                assert event.phrase.split()[0] == phrases.ORDINALS[entered[last] - 1]
            elif event is not None and event.name is EventName.LEAVES:
                on_screen -= 1
            if question is None:
                continue
            asked[question.name] += 1
            answer = question.answer.strip(" .")
            if question.name is QuestionName.HOW_MANY:
                assert answer.split()[0] == phrases.NUMBERS[on_screen]
            elif question.name is QuestionName.LAST:
                assert answer == " ".join(last)
            elif question.name is QuestionName.ENTERED:
                colour, shape = question.text.split()[2:4]
                count = entered[colour, shape.removesuffix("s")]
                assert answer == (phrases.NUMBERS[count] if count else "none")
    assert set(asked) == set(QuestionName)


def test_places_and_colours_asked_for_can_be_seen() -> None:
    checked = 0
    for seed in range(60, 75):
        scene = make_scene(seed, 40, question_rate=0.8)
        renderer = Renderer(scene)
        renderer.noise[:] = 0
        renderer.flicker = 0.0
        for chunk, truth in enumerate(scene.truth):
            question = truth.question
            if question is None or question.name is not QuestionName.WHERE:
                continue
            frame = renderer.frame(chunk + 0.5)
            colour = question.text.split()[-2]
            sprites = [s for s in scene.visible(2 * chunk + 1) if s.colour(2 * chunk + 1) == colour]
            if len(sprites) != 1:
                continue
            rows, columns = np.nonzero(colour_mask(frame, colour))
            dx, dy = columns.mean() - 55.5, rows.mean() - 55.5
            if max(abs(dx), abs(dy)) < 13:
                seen = "centre"
            elif abs(dx) > abs(dy):
                seen = "left" if dx < 0 else "right"
            else:
                seen = "top" if dy < 0 else "bottom"
            assert question.answer.strip(" .") == seen
            checked += 1
    assert checked >= 10


def test_the_bundled_clip_is_its_scene() -> None:
    scene = clip_scene()
    stored = json.loads((DEMO / "clip.json").read_text(encoding="utf-8"))
    assert stored == ground_truth(scene)
    capture = cv2.VideoCapture(str(DEMO / "clip.mp4"))
    rate = capture.get(cv2.CAP_PROP_FPS)
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == scene.seconds * rate
    capture.set(cv2.CAP_PROP_POS_FRAMES, int(30.5 * rate))
    found, picture = capture.read()
    capture.release()
    assert found
    drawn = Renderer(scene, picture.shape[0]).frame(30.5).astype(float)
    assert np.abs(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB) - drawn).mean() < 8
