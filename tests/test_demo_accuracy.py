"""The pieces of the demo's accuracy tables: the twin, the streams, the results."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="caches are simulated in torch")

from demo.accuracy_bundles import Scheme
from demo.accuracy_run import Run
from demo.cache_accuracy import cache_forms, compare_checkpoints
from demo.held_out import Result, held_out_scenes, score_replies, stream_of
from demo.metrics import Score
from demo.parallel import spread
from demo.scheme_accuracy import SchemeResult, accuracy_table
from demo.twin import write_twin
from framesink.calibration.agreement import TurnAgreement, divergence, entropy
from framesink.calibration.recorded_turns import StreamSettings
from framesink.calibration.statistics import CacheStatistics, ChannelRange, Statistics
from framesink.runtime.manifest import Limits, StreamingDefaults
from framesink.runtime.models.checkpoint import Checkpoint
from framesink.runtime.models.quantization import CacheScheme
from framesink.runtime.preprocess import PreprocessConfig
from framesink.runtime.protocol import ChatProtocol
from framesink.runtime.tokenizer import Tokenizer

MODEL = Path(__file__).parents[1] / "demo" / "model"


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("twin") / "checkpoint"
    write_twin(MODEL, output, size=100.0, pairs=2)
    return output


def test_the_twin_differs_in_the_bias_of_its_slowest_pairs_alone(twin: Path) -> None:
    before, after = Checkpoint.open(MODEL), Checkpoint.open(twin)
    assert before.config == after.config
    assert before.names() == after.names()
    half = before.config.text.head_dim // 2
    for name in before.names():
        was, is_now = np.asarray(before.read(name)), np.asarray(after.read(name))
        if not name.endswith("self_attn.k_proj.bias"):
            assert np.array_equal(was, is_now)
            continue
        change = (is_now.astype(np.float64) - was).reshape(-1, 2, half)
        np.testing.assert_allclose(change[:, 0, -2:], 100.0, atol=0.05)
        assert not change[:, 0, :-2].any()
        assert not change[:, 1].any()


def test_the_twin_says_what_the_model_says(twin: Path) -> None:
    """In full precision: a constant part of all keys hardly changes a softmax."""
    found = compare_checkpoints(MODEL, twin, _settings(), held_out_scenes(4000, 1, 6))
    assert found.chunks == 6
    assert found.top1 == 1.0
    assert 0 < found.kl < 1e-4


def test_every_form_of_cache_is_compared_in_both_formats(twin: Path) -> None:
    config = Checkpoint.open(twin).config.text
    channels = np.ones(config.num_key_value_heads * config.head_dim, np.float32)
    layer = CacheStatistics(
        keys=ChannelRange(-channels, channels),
        key_pair_amax=channels[: len(channels) // 2],
        rotated_key_amax=100.0,
        value_head_amax=np.ones(config.num_key_value_heads, np.float32),
        rows=1,
    )
    statistics = Statistics("", "", 1, {}, (layer,) * config.num_hidden_layers)
    forms = list(cache_forms(Checkpoint.open(twin), statistics))
    assert forms[0][1:] == (CacheScheme.UNQUANTIZED, None)
    assert [scheme for _, scheme, _ in forms[1:]] == [CacheScheme.INT8] * 4 + [CacheScheme.FP8] * 4


def test_a_stream_asks_what_its_scene_asks() -> None:
    (scene,) = held_out_scenes(4000, 1, 30)
    chunks, questions = stream_of(scene)
    assert len(list(chunks)) == 30
    assert questions
    for second, text in questions.items():
        question = scene.truth[second].question
        assert question is not None
        assert question.text == text


def test_training_seeds_are_refused() -> None:
    with pytest.raises(ValueError, match="trained on"):
        held_out_scenes(99_999, 2, 10)


def test_a_result_sums_up_scores_and_agreement() -> None:
    (scene,) = held_out_scenes(4000, 1, 30)
    score = Score()
    score.add(scene, [truth.reply for truth in scene.truth])
    turns = [
        TurnAgreement(0, (0.1, 0.3), (True, False), (0.0, 0.5)),
        TurnAgreement(1, (0.2,), (True,), (0.0,)),
    ]
    result = Result.of(score, turns, size=7)
    assert (result.event_f1, result.counts, result.answers) == (1.0, 1.0, 1.0)
    assert (result.kl, result.median_kl) == (pytest.approx(0.2), 0.2)
    assert result.worst_kl == 0.3
    assert result.top1 == pytest.approx(2 / 3)
    assert (result.tokens, result.chunks, result.size) == (3, 2, 7)
    assert Result(**result.to_json()) == result


def test_a_table_tells_what_each_scheme_scored_and_on_what() -> None:
    scenes = held_out_scenes(4000, 2, 30)
    score = score_replies(scenes, [[truth.reply for truth in scene.truth] for scene in scenes])
    turns = [TurnAgreement(0, (0.1, 0.3), (True, False), (0.0, 0.5))]
    schemes: list[Scheme] = [("fp16", "fp16"), ("fp8", "int8")]
    results = [
        SchemeResult(scheme, Result.of(score, turns, size=7), changed=0, narrated=60)
        for scheme in schemes
    ]
    run = Run(Path("work"), MODEL, scenes, scenes[:1], processes=1, twin_size=100.0)
    table = accuracy_table(run, results)
    assert [(row.precision, row.kv_precision) for row in table.rows] == schemes
    assert (table.rows[1].kl, table.rows[1].bundle_bytes) == (pytest.approx(0.2), 7)
    assert table.rows[1].scores == {"event F1": 1.0, "counts": 1.0, "answers": 1.0}
    events = sum(truth.event is not None for scene in scenes for truth in scene.truth)
    assert f"2 held-out demo scenes of 30 s (seeds 4000 to 4001) with {events} events" in str(
        table.notes
    )


def test_what_was_found_is_kept_and_not_looked_for_again(tmp_path: Path) -> None:
    asked: list[int] = []

    def square(number: int) -> list[int]:
        asked.append(number)
        return [number * number]

    first, second = tmp_path / "kept" / "2.json", tmp_path / "kept" / "3.json"
    assert spread(square, {first: 2}, processes=1) == {first: [4]}
    assert spread(square, {first: 2, second: 3}, processes=1) == {first: [4], second: [9]}
    assert asked == [2, 3]


def test_divergence_is_that_of_the_distributions() -> None:
    """By hand: p = (1/2, 1/2), q = (3/4, 1/4), whatever is added to the logits."""
    p, q = np.log(np.float32([0.5, 0.5])) + 7, np.log(np.float32([0.75, 0.25])) - 90
    expected = 0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25)
    assert divergence(p, q) == pytest.approx(expected, rel=1e-5)
    assert divergence(p, p) == 0.0
    assert entropy(p) == pytest.approx(np.log(2))


def _settings() -> StreamSettings:
    config = Checkpoint.open(MODEL).config
    return StreamSettings(
        model=config,
        protocol=ChatProtocol(Tokenizer.from_directory(MODEL), "You are a helpful assistant."),
        preprocess=PreprocessConfig(min_pixels=112 * 112, max_pixels=112 * 112),
        defaults=StreamingDefaults(
            sink_text=32, recent_text=32, vision_seconds=3.0, reply_turns=3, max_new_tokens=12
        ),
        limits=Limits(max_streams=1, max_context=2048, max_prefill=512, max_patches=256),
    )
