"""Old, young and fresh errors: what tells them apart is their age and nothing else."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="bundles are calibrated in torch")

from demo.accuracy_bundles import Scheme, build_bundles, settings_of
from demo.accuracy_run import executor
from demo.ageing import AgedTurns, measure_ageing, page_scales, take_over
from demo.held_out import held_out_scenes, stream_of
from framesink.calibration.agreement import replay_turn
from framesink.calibration.recorded_turns import record_turns
from framesink.calibration.statistics_files import save_statistics
from framesink.calibration.streaming import observe_streaming
from framesink.runtime.models.checkpoint import Checkpoint

MODEL = Path(__file__).parents[1] / "demo" / "model"
PLAIN, INT8, FP8 = ("fp16", "fp16"), ("fp16", "int8"), ("fp16", "fp8")
CHUNKS, OPENED = 6, 4
STRETCHES = (range(0, 2), range(3, 6))


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[Scheme, Path]:
    folder = tmp_path_factory.mktemp("ageing")
    statistics = observe_streaming(Checkpoint.open(MODEL), settings_of(MODEL), chunks=16)
    save_statistics(statistics, folder)
    return build_bundles(MODEL, folder, [PLAIN, INT8, FP8], folder / "bundles", processes=1)


@pytest.fixture(scope="module")
def aged(bundles: dict[Scheme, Path]) -> dict[str, AgedTurns]:
    (scene,) = held_out_scenes(4000, 1, CHUNKS)
    candidates = {"same": bundles[PLAIN], "int8": bundles[INT8]}
    return measure_ageing(bundles[PLAIN], candidates, scene, stretches=STRETCHES, opened=OPENED)


def test_a_model_without_errors_has_none_at_any_age(aged: dict[str, AgedTurns]) -> None:
    same = aged["same"]
    for turns in (same.old, same.young, same.fresh):
        assert turns
        assert max(kl for turn in turns for kl in turn.kl) == 0.0


def test_errors_are_of_one_age_until_rows_are_taken_over(aged: dict[str, AgedTurns]) -> None:
    old = {turn.chunk: turn for turn in aged["int8"].old}
    young = {turn.chunk: turn for turn in aged["int8"].young}
    assert list(old) == list(range(CHUNKS))
    assert list(young) == [0, 1, 3, 4, 5]
    for chunk in STRETCHES[0]:
        assert max(old[chunk].kl) > 0.0
        assert old[chunk].kl == young[chunk].kl
    assert old[3].kl != young[3].kl


def test_fresh_sessions_are_numbered_as_the_stream(aged: dict[str, AgedTurns]) -> None:
    fresh = aged["int8"].fresh
    assert [turn.chunk for turn in fresh] == list(range(OPENED, CHUNKS))
    assert max(fresh[0].kl) > 0.0


@pytest.mark.parametrize("scheme", [INT8, FP8])
def test_rows_are_stored_as_the_bundle_stores_them(
    bundles: dict[Scheme, Path], scheme: Scheme
) -> None:
    """What a graph writes, of rows that nothing quantized went into: the first layer's."""
    (scene,) = held_out_scenes(4000, 1, 1)
    reference, settings = executor(bundles[PLAIN])
    candidate, _ = executor(bundles[scheme])
    chunks, questions = stream_of(scene)
    for turn in record_turns(reference, settings, chunks, questions=questions):
        replay_turn(turn, candidate)
    scales = page_scales(bundles[scheme])
    for name in ("k_pages.0", "v_pages.0"):
        stored = scales.stored(name, reference.pages[name])
        assert np.count_nonzero(stored) > 1000
        np.testing.assert_array_equal(stored, candidate.pages[name])


def test_rows_that_are_taken_over_stand_for_the_stream_they_came_from(
    bundles: dict[Scheme, Path],
) -> None:
    """An executor that has seen nothing goes on as the one whose rows it holds."""
    (first, settings), (second, _) = executor(bundles[PLAIN]), executor(bundles[PLAIN])
    (scene,) = held_out_scenes(4000, 1, 5)
    chunks, questions = stream_of(scene)
    for turn in record_turns(first, settings, chunks, questions=questions):
        if turn.chunk == 3:
            take_over(second, first, page_scales(bundles[PLAIN]))
        if turn.chunk >= 3:
            assert max(replay_turn(turn, second).kl) == 0.0
