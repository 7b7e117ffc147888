"""Held-out scenes as streams, and what an executor scores on them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from demo.evaluate import narrate, scene_chunks
from demo.metrics import Score
from demo.scene import Scene
from demo.world import HELD_OUT_SEEDS, make_scene
from framesink.calibration.agreement import Agreement, TurnAgreement, compare_executors
from framesink.calibration.recorded_turns import StreamSettings
from framesink.runtime.engine import StreamingEngine
from framesink.runtime.executors.base import Executor
from framesink.runtime.session_plan import default_policy
from framesink.runtime.video.chunk import Chunk


@dataclass(frozen=True, slots=True)
class Result:
    """What is told of one way to run the model: scores between 0 and 1 of what was said freely, KL
    in nats and top-1 on forced tokens, bytes."""

    event_f1: float
    counts: float
    answers: float
    kl: float
    median_kl: float
    worst_kl: float
    top1: float
    tokens: int
    chunks: int
    size: int = 0

    @classmethod
    def of(cls, score: Score, turns: Sequence[TurnAgreement], *, size: int = 0) -> "Result":
        """Scores of what was said freely, agreement on forced tokens."""
        agreement = Agreement.of(turns)
        return cls(
            event_f1=score.f1,
            counts=score.count_accuracy,
            answers=score.answer_accuracy,
            kl=agreement.kl,
            median_kl=float(np.median([kl for turn in turns for kl in turn.kl])),
            worst_kl=agreement.worst_kl,
            top1=agreement.top1,
            tokens=agreement.tokens,
            chunks=len(turns),
            size=size,
        )

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def held_out_scenes(
    first_seed: int, count: int, seconds: int, event_rate: float | None = None
) -> list[Scene]:
    """Scenes the model was not trained on; `event_rate` as in `make_scene`.

    Raises ValueError for seeds it was trained on.
    """
    seeds = range(first_seed, first_seed + count)
    if seeds.stop > HELD_OUT_SEEDS.stop:
        raise ValueError(f"seeds from {HELD_OUT_SEEDS.stop} on were trained on")
    return [make_scene(seed, seconds, event_rate=event_rate) for seed in seeds]


def stream_of(scene: Scene) -> tuple[Iterator[Chunk], Mapping[int, str]]:
    """A scene's chunks, and its questions by the chunk they are asked in."""
    questions = {
        second: truth.question.text
        for second, truth in enumerate(scene.truth)
        if truth.question is not None
    }
    return scene_chunks(scene, through_video=False), questions


def narrate_scenes(engine: StreamingEngine, scenes: Sequence[Scene]) -> list[list[str]]:
    """What is said freely in each chunk of each scene, as many scenes at a time as the engine takes
    sessions."""
    policy = default_policy(engine.defaults)
    replies: list[list[str]] = []
    for start in range(0, len(scenes), engine.max_sessions):
        batch = scenes[start : start + engine.max_sessions]
        replies += narrate(engine, batch, policy, through_video=False)
    return replies


def score_replies(scenes: Sequence[Scene], replies: Sequence[list[str]]) -> Score:
    """Score what was said in each scene."""
    score = Score()
    for scene, said in zip(scenes, replies, strict=True):
        score.add(scene, said)
    return score


def compare_on_scenes(
    reference: Executor,
    candidates: Mapping[str, Executor],
    settings: StreamSettings,
    scenes: Sequence[Scene],
) -> dict[str, list[TurnAgreement]]:
    """Turns of all scenes, one after the other, for each candidate."""
    turns: dict[str, list[TurnAgreement]] = {name: [] for name in candidates}
    for scene in scenes:
        chunks, questions = stream_of(scene)
        found = compare_executors(reference, candidates, settings, chunks, questions=questions)
        for name, more in found.items():
            turns[name] += more
    return turns
