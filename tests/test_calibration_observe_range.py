"""Ranges chosen from histograms, against the values themselves."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from framesink.calibration.formats import FP8, INT8, NumberFormat
from framesink.calibration.observers import PERCENTILE, Observer
from framesink.runtime.errors import CheckpointError

torch = pytest.importorskip("torch", reason="values are counted in torch")

from framesink.calibration.collector import StatisticsCollector  # noqa: E402
from framesink.calibration.statistics import Statistics  # noqa: E402

LAYER = "model.layers.0.mlp.down_proj"


def collect(parts: list[NDArray[np.float32]]) -> Statistics:
    collector = StatisticsCollector()
    for part in parts:
        collector.linear_input(LAYER, torch.from_numpy(part))
    return collector.statistics(checkpoint="", source="test", chunks=len(parts))


def make_parts(kind: str, seed: int, growth: float) -> list[NDArray[np.float32]]:
    """Three batches of 400 rows of 64 channels, each larger in magnitude than the one before."""
    random = np.random.default_rng(seed)
    draw = {
        "normal": lambda: random.standard_normal((400, 64)),
        "heavy-tailed": lambda: random.standard_t(3, (400, 64)),
        "after a gate": lambda: np.maximum(random.standard_normal((400, 64)), 0) ** 3,
    }[kind]
    return [(draw() * growth**number).astype(np.float32) for number in range(3)]


def int8_error(values: NDArray[np.float64], amax: float) -> float:
    scale = amax / 127
    codes = np.clip(np.round(values / scale), -128, 127)
    return float(np.square(values - codes * scale).mean())


def fp8_error(values: NDArray[np.float64], amax: float) -> float:
    scale = amax / 448
    codes = torch.from_numpy(np.clip(values / scale, -448, 448)).float()
    rounded = codes.to(torch.float8_e4m3fn).double().numpy() * scale
    return float(np.square(values - rounded).mean())


@given(
    kind=st.sampled_from(["normal", "heavy-tailed", "after a gate"]),
    seed=st.integers(0, 1000),
    growth=st.sampled_from([1e-3, 1.0, 3.0, 1e4]),
)
@settings(max_examples=12, deadline=None)
def test_percentile_is_that_of_the_values(kind: str, seed: int, growth: float) -> None:
    parts = make_parts(kind, seed, growth)
    magnitudes = np.abs(np.concatenate(parts))
    statistics = collect(parts)
    found = statistics.input_amax(LAYER, Observer.PERCENTILE, INT8)
    width = 2 * magnitudes.max() / len(statistics.linears[LAYER].histogram.counts)
    assert found >= np.percentile(magnitudes, PERCENTILE, method="lower") - width
    assert found <= np.percentile(magnitudes, PERCENTILE, method="higher") + width
    assert found <= magnitudes.max()


@pytest.mark.parametrize("kind", ["normal", "heavy-tailed", "after a gate"])
@pytest.mark.parametrize(
    ("number_format", "error"), [(INT8, int8_error), (FP8, fp8_error)], ids=["int8", "fp8"]
)
def test_mse_range_is_the_best_of_the_values(
    kind: str, number_format: NumberFormat, error: object
) -> None:
    assert callable(error)
    parts = make_parts(kind, 7, 2.0)
    values = np.concatenate(parts).astype(np.float64)
    found = collect(parts).input_amax(LAYER, Observer.MSE, number_format)
    amax = np.abs(values).max()
    best = min(error(values, fraction * amax) for fraction in np.linspace(0.05, 1.0, 300))
    assert error(values, found) <= 1.02 * best
    assert error(values, found) <= error(values, amax)
    if kind == "heavy-tailed" and number_format is INT8:
        assert found < 0.9 * amax


@given(parts=st.lists(st.integers(-20, 20), min_size=1, max_size=6), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_no_value_is_lost_when_the_range_grows(parts: list[int], seed: int) -> None:
    random = np.random.default_rng(seed)
    batches = [
        (random.standard_normal((random.integers(1, 9), 5)) * 2.0**power).astype(np.float32)
        for power in parts
    ]
    linear = collect(batches).linears[LAYER]
    values = np.abs(np.concatenate(batches))
    assert linear.histogram.counts.sum() == values.size
    assert linear.rows == len(values)
    assert linear.histogram.amax == values.max()
    assert values.max() <= linear.histogram.limit
    width = linear.histogram.limit / len(linear.histogram.counts)
    edges = np.arange(len(linear.histogram.counts) + 1) * width
    # Merged bins have the same edges, so each value is where it would be in one pass.
    expected = np.histogram(values, edges)[0]
    assert np.abs(np.cumsum(linear.histogram.counts - expected)).max() <= 1


def test_an_input_of_zeros_has_no_range() -> None:
    statistics = collect([np.zeros((4, 8), np.float32)] * 3)
    assert all(statistics.input_amax(LAYER, observer, FP8) == 0.0 for observer in Observer)
    assert statistics.dead_channels == 8
    assert statistics.constant_channels == 0


def test_channels_that_never_change_are_counted() -> None:
    values = np.random.default_rng(0).standard_normal((6, 5)).astype(np.float32)
    values[:, 1], values[:, 4] = 0.25, 0.0
    statistics = collect([values[:3], values[3:]])
    assert (statistics.dead_channels, statistics.constant_channels) == (1, 1)
    # One that was constant for a while only is not.
    values[5, 1] = 0.5
    assert collect([values[:3], values[3:]]).constant_channels == 0


def test_layers_with_one_input_share_their_statistics() -> None:
    collector = StatisticsCollector()
    for _ in range(2):
        shared, other = torch.ones(3, 4), torch.zeros(3, 4)
        for name, inputs in (("q", shared), ("k", shared), ("o", other)):
            collector.linear_input(name, inputs)
    statistics = collector.statistics(checkpoint="", source="", chunks=2)
    assert statistics.linears["k"] is statistics.linears["q"]
    assert statistics.linears["o"] is not statistics.linears["q"]
    assert [statistics.linears[name].rows for name in "qko"] == [6, 6, 6]
    assert (statistics.constant_channels, statistics.dead_channels) == (4, 4)


def test_a_layer_that_was_not_seen() -> None:
    statistics = collect([np.ones((1, 2), np.float32)])
    with pytest.raises(CheckpointError, match="lm_head"):
        statistics.input_amax("lm_head", Observer.ABSMAX, INT8)
