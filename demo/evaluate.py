"""Scores an engine bundle of the demo model on held-out scenes, by window policy.

    build-engines demo/model -o bundles/demo
    python -m demo.evaluate bundles/demo

Scenes are drawn larger than the model sees them and pushed through framesink's own runtime, a few
sessions at a time. With `--video` every scene is first written to a video file and read back.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from demo.metrics import Score
from demo.render import render_chunks, write_video
from demo.scene import QuestionName, Scene
from demo.world import HELD_OUT_SEEDS, make_scene
from framesink.runtime.engine import StreamingEngine
from framesink.runtime.events import EventKind
from framesink.runtime.policies import Policy, SinkWindow, SlidingWindow
from framesink.runtime.session import Session
from framesink.runtime.video import Chunk, ChunkStream, open_source

FRAME_SIZE = 336
FRAMES_PER_SECOND = 8


def scene_chunks(scene: Scene, *, through_video: bool) -> Iterator[Chunk]:
    """The chunks of a scene, drawn at `FRAME_SIZE` or read back from a video file."""
    if through_video:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "scene.mp4"
            write_video(scene, path, size=FRAME_SIZE, fps=FRAMES_PER_SECOND)
            with ChunkStream(open_source(str(path)), realtime=False) as chunks:
                yield from chunks
        return
    for index, frames in enumerate(render_chunks(scene, drawn_at=FRAME_SIZE, shown_at=FRAME_SIZE)):
        second = float(index)
        yield Chunk(frames, second, second + 1, (second, second + 0.5), captured_at=0.0)


def narrate(
    engine: StreamingEngine, scenes: Sequence[Scene], policy: Policy, *, through_video: bool
) -> list[list[str]]:
    """Stream scenes of one length together; the words said in each chunk of each scene."""
    sessions = [engine.open_session(policy) for _ in scenes]
    streams = [scene_chunks(scene, through_video=through_video) for scene in scenes]
    replies: list[list[str]] = [[] for _ in scenes]
    for second, chunks in enumerate(zip(*streams, strict=True)):
        for scene, session, chunk in zip(scenes, sessions, chunks, strict=True):
            question = scene.truth[second].question
            if question is not None:
                session.ask(question.text)
            session.push_chunk(chunk)
        for session, texts in zip(sessions, replies, strict=True):
            texts.append(_reply(session))
    for session in sessions:
        session.close()
    return replies


def _reply(session: Session) -> str:
    """The words of the turn that was pushed last."""
    text = ""
    for event in session:
        if event.kind is EventKind.ERROR:
            raise SystemExit(f"The session failed: {event.text}")
        text += event.text
    return text


def score_policy(
    engine: StreamingEngine,
    scenes: Sequence[Scene],
    policy: Policy,
    *,
    together: int,
    through_video: bool,
    title: str,
) -> Score:
    """Score all scenes under a policy, `together` sessions at a time."""
    score = Score()
    starts = range(0, len(scenes), together)
    for start in track(starts, description=title, console=Console(stderr=True)):
        batch = scenes[start : start + together]
        replies = narrate(engine, batch, policy, through_video=through_video)
        for scene, texts in zip(batch, replies, strict=True):
            score.add(scene, texts)
    return score


def results_table(scores: dict[str, Score], caption: str) -> Table:
    """The scores, one policy a row."""
    table = Table(caption=caption, title="Held-out scenes, by window policy")
    for heading in (
        *("policy", "event precision", "event recall", "event F1"),
        *("counts", "counts after the first", "answers"),
        *(name.value.replace("_", " ") for name in QuestionName),
    ):
        table.add_column(heading, justify="left" if heading == "policy" else "right")
    for name, score in scores.items():
        kinds = [score.answers[kind.value].accuracy for kind in QuestionName]
        figures = (
            *(score.precision, score.recall, score.f1, score.count_accuracy),
            *(score.later_count_accuracy, score.answer_accuracy, *kinds),
        )
        table.add_row(name, *(f"{figure:.3f}" for figure in figures))
    return table


def main() -> None:
    """Evaluate and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--scenes", type=int, default=40)
    parser.add_argument("--seconds", type=int, default=100, help="length of every scene")
    parser.add_argument("--first-seed", type=int, default=1000)
    parser.add_argument("--together", type=int, default=8, help="sessions at a time")
    parser.add_argument("--executor", default="auto")
    parser.add_argument("--video", action="store_true", help="through video files")
    options = parser.parse_args()
    seeds = range(options.first_seed, options.first_seed + options.scenes)
    if seeds.stop > HELD_OUT_SEEDS.stop:
        raise SystemExit(f"Seeds from {HELD_OUT_SEEDS.stop} on were trained on; take smaller ones.")
    scenes = [make_scene(seed, options.seconds) for seed in seeds]
    with StreamingEngine.load(
        options.bundle, options.executor, max_sessions=options.together, threaded=False
    ) as engine:
        defaults = engine.defaults
        policies: dict[str, Policy] = {
            "sink window": SinkWindow(
                sink_text=defaults.sink_text,
                recent_text=defaults.recent_text,
                vision_seconds=defaults.vision_seconds,
                reply_turns=defaults.reply_turns,
            ),
            "sliding window": SlidingWindow(seconds=defaults.vision_seconds),
        }
        scores = {
            name: score_policy(
                engine,
                scenes,
                policy,
                together=options.together,
                through_video=options.video,
                title=name,
            )
            for name, policy in policies.items()
        }
    caption = f"seeds {seeds.start} to {seeds.stop - 1}, {options.seconds} s each"
    Console(width=160).print(results_table(scores, caption))


if __name__ == "__main__":
    main()
