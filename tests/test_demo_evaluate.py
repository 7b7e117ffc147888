"""The demo model through framesink's own runtime, on held-out scenes: why the policy exists."""

from pathlib import Path

import pytest

from demo.evaluate import narrate, score_policy
from demo.world import make_scene
from framesink.build.options import BuildOptions
from framesink.build.pipeline import build_bundle
from framesink.build.reporter import SilentReporter
from framesink.runtime.engine import StreamingEngine
from framesink.runtime.policies import SinkWindow, SlidingWindow

MODEL = Path(__file__).parents[1] / "demo" / "model"
SINK_WINDOW = SinkWindow(sink_text=128, recent_text=256, vision_seconds=8, reply_turns=8)
SCENES = [make_scene(seed, 45) for seed in range(7000, 7004)]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("demo") / "bundle"
    build_bundle(BuildOptions(MODEL, output, plans=False), SilentReporter())
    return output


def test_counts_hold_only_where_old_text_stays(bundle: Path) -> None:
    with StreamingEngine.load(bundle, max_sessions=4, threaded=False) as engine:
        scores = [
            score_policy(engine, SCENES, policy, together=4, through_video=False, title="streaming")
            for policy in (SINK_WINDOW, SlidingWindow(seconds=8))
        ]
    sink, sliding = scores
    assert min(sink.f1, sliding.f1) >= 0.95
    assert (
        sink.answer_accuracy >= 0.8
    )  # of only 19; demo/README.md has the figure for 10,000 chunks
    assert sink.later_count_accuracy >= 0.9
    assert sliding.later_count_accuracy <= 0.5


def test_a_real_video_file_is_narrated_alike(bundle: Path) -> None:
    """Written as MP4 and read back through capture, a scene is told as from its own frames."""
    scene = make_scene(7010, 16, event_rate=0.7)
    with StreamingEngine.load(bundle, max_sessions=1, threaded=False) as engine:
        (from_file,) = narrate(engine, [scene], SINK_WINDOW, through_video=True)
    assert [text.strip() for text in from_file] == [truth.reply.strip() for truth in scene.truth]
