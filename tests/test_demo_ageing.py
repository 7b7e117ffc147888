"""Old, young and fresh errors: what tells them apart is their age and nothing else."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="ageing is simulated in torch")

from demo.accuracy_bundles import settings_of
from demo.ageing import AgedTurns, measure_ageing
from demo.held_out import held_out_scenes, stream_of
from framesink.calibration.agreement import replay_turn
from framesink.calibration.fake_cache import FakeCache, KeysPerChannel
from framesink.calibration.fake_quantization import FakeQuantization
from framesink.calibration.formats import INT8
from framesink.calibration.recorded_turns import StreamSettings, record_turns
from framesink.calibration.torch_executor import TorchExecutor
from framesink.runtime.errors import OptionError
from framesink.runtime.models.checkpoint import Checkpoint

MODEL = Path(__file__).parents[1] / "demo" / "model"
CHUNKS, OPENED = 6, 4
STRETCHES = (range(0, 2), range(3, 6))


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return Checkpoint.open(MODEL)


@pytest.fixture(scope="module")
def settings() -> StreamSettings:
    settings = settings_of(MODEL)
    limits = settings.limits.model_copy(update={"max_context": 2048})
    return dataclasses.replace(settings, limits=limits)


@pytest.fixture(scope="module")
def coarse(checkpoint: Checkpoint) -> FakeQuantization:
    """A cache that rounds far more than INT8 has to."""
    text = checkpoint.config.text
    keys = np.full(text.num_key_value_heads * text.head_dim, 0.2, np.float32)
    values = np.full(text.num_key_value_heads, 0.2, np.float32)
    layers = text.num_hidden_layers
    cache = FakeCache(INT8, (KeysPerChannel(keys),) * layers, (values,) * layers)
    return FakeQuantization({}, cache)


@pytest.fixture(scope="module")
def aged(
    checkpoint: Checkpoint, settings: StreamSettings, coarse: FakeQuantization
) -> dict[str, AgedTurns]:
    (scene,) = held_out_scenes(4000, 1, CHUNKS)
    schemes = {"coarse": coarse, "exact": FakeQuantization({})}
    return measure_ageing(checkpoint, schemes, settings, scene, stretches=STRETCHES, opened=OPENED)


def test_a_model_without_errors_has_none_at_any_age(aged: dict[str, AgedTurns]) -> None:
    exact = aged["exact"]
    for turns in (exact.old, exact.young, exact.fresh):
        assert turns
        assert max(kl for turn in turns for kl in turn.kl) < 1e-9


def test_errors_are_of_one_age_until_rows_are_taken_over(aged: dict[str, AgedTurns]) -> None:
    old = {turn.chunk: turn for turn in aged["coarse"].old}
    young = {turn.chunk: turn for turn in aged["coarse"].young}
    assert list(old) == list(range(CHUNKS))
    assert list(young) == [0, 1, 3, 4, 5]
    for chunk in STRETCHES[0]:
        assert max(old[chunk].kl) > 1e-9
        np.testing.assert_allclose(old[chunk].kl, young[chunk].kl, rtol=1e-3, atol=1e-9)
    assert old[3].kl != pytest.approx(young[3].kl, rel=1e-3)


def test_fresh_sessions_are_numbered_as_the_stream(aged: dict[str, AgedTurns]) -> None:
    fresh = aged["coarse"].fresh
    assert [turn.chunk for turn in fresh] == list(range(OPENED, CHUNKS))
    assert max(fresh[0].kl) > 1e-9


def test_rows_that_are_taken_over_stand_for_the_stream_they_came_from(
    checkpoint: Checkpoint, settings: StreamSettings
) -> None:
    """An executor that has seen nothing goes on as the one whose rows it holds."""
    pages = settings.num_pages(16)
    first, second = (TorchExecutor(checkpoint, num_pages=pages) for _ in range(2))
    (scene,) = held_out_scenes(4000, 1, 5)
    chunks, questions = stream_of(scene)
    for turn in record_turns(first, settings, chunks, questions=questions):
        if turn.chunk == 3:
            second.take_over(first)
        if turn.chunk >= 3:
            assert max(replay_turn(turn, second).kl) < 1e-9


def test_rows_of_another_number_of_pages_are_refused(checkpoint: Checkpoint) -> None:
    few, many = (TorchExecutor(checkpoint, num_pages=pages) for pages in (3, 4))
    with pytest.raises(OptionError, match="from 3 pages of 16 rows"):
        many.take_over(few)
