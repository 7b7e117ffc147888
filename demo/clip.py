"""Writes the bundled clip, a held-out scene as a real video file, and what is true of it; and the
video that `build-engines` calibrates the model on, scenes it was trained on.

`python -m demo.clip` writes `demo/clip.mp4`, `demo/clip.json` and
`demo/model/calibration/scenes.mp4`.
"""

import json
from pathlib import Path
from typing import Any

from demo.render import write_scenes, write_video
from demo.scene import Scene
from demo.world import make_scene

DIRECTORY = Path(__file__).parent
SEED = 50_011
SECONDS = 72
SIZE = 336
FRAMES_PER_SECOND = 8
# One stream, long enough to cut old text in its middle, of several scenes: length and variety widen
# the ranges that calibration sees (docs/accuracy.md).
CALIBRATION_SEEDS = range(1_000_000, 1_000_004)
CALIBRATION_SECONDS = 80
CALIBRATION_SIZE = 224
CALIBRATION_FRAMES_PER_SECOND = 2


def clip_scene() -> Scene:
    """The scene of the bundled clip; its seed is held out."""
    return make_scene(SEED, SECONDS)


def ground_truth(scene: Scene) -> dict[str, Any]:
    """What is true of a scene, as JSON: events with their phrases, questions with their answers.

    A question may be asked in its chunk; left unasked, silence is right there.
    """
    events = [
        {"t0": float(second), "t1": second + 1.0, "text": truth.event.phrase.strip()}
        for second, truth in enumerate(scene.truth)
        if truth.event is not None
    ]
    questions = [
        {
            "t0": float(second),
            "t1": second + 1.0,
            "question": truth.question.text,
            "answer": truth.question.answer.strip(),
        }
        for second, truth in enumerate(scene.truth)
        if truth.question is not None
    ]
    return {
        "seed": scene.seed,
        "seconds": scene.seconds,
        "events": events,
        "questions": questions,
    }


def main() -> None:
    """Write all three files."""
    scene = clip_scene()
    write_video(scene, DIRECTORY / "clip.mp4", size=SIZE, fps=FRAMES_PER_SECOND)
    text = json.dumps(ground_truth(scene), indent=1)
    (DIRECTORY / "clip.json").write_text(text + "\n", encoding="utf-8")
    calibration = DIRECTORY / "model" / "calibration" / "scenes.mp4"
    calibration.parent.mkdir(exist_ok=True)
    write_scenes(
        [make_scene(seed, CALIBRATION_SECONDS) for seed in CALIBRATION_SEEDS],
        calibration,
        size=CALIBRATION_SIZE,
        fps=CALIBRATION_FRAMES_PER_SECOND,
    )


if __name__ == "__main__":
    main()
