"""What work costs, learned from steps whose costs are known, and how many streams fit by it."""

from dataclasses import replace

import numpy as np
import pytest
from fake.engine import make_engine
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.live_machine import H200, W720

from framesink.runtime.load.capacity import StreamShape, predicted_load, streams_that_fit
from framesink.runtime.load.costs import CostMeter, LinearCost, WorkCosts
from framesink.runtime.observer import StepReport

linear = st.builds(LinearCost, base=st.floats(1e-4, 0.05), each=st.floats(1e-6, 1e-3))
all_costs = st.builds(
    WorkCosts, vision=linear, prefill=linear, decode=linear, round=st.floats(0, 0.01)
)
shapes = st.builds(
    StreamShape,
    chunk_seconds=st.floats(0.5, 4.0),
    patches=st.integers(4, 4000),
    prompt_tokens=st.integers(20, 1000),
    new_tokens=st.integers(1, 40),
)


def show(
    meter: CostMeter, costs: WorkCosts, steps: int, *, seed: int = 0, noise: float = 0.1
) -> None:
    """Steps as many streams make them, each a little longer or shorter than it should be."""
    random = np.random.default_rng(seed)
    for _ in range(steps):
        decoding, prompts = int(random.integers(0, 30)), int(random.integers(0, 3))
        tokens = sum(int(random.integers(20, 800)) for _ in range(prompts))
        factor = float(np.exp(noise * random.standard_normal()))
        seconds = costs.step(decoding, tokens, prompts) - costs.round
        if decoding or tokens:
            meter.stepped(StepReport(decoding, prompts, decoding + tokens, factor * seconds))
        patches = int(random.integers(100, 3000))
        meter.encoded(patches, factor * costs.vision.seconds(patches))
        meter.round_done(factor * (seconds + costs.vision.seconds(patches)) + costs.round)


def learned(meter: CostMeter) -> WorkCosts:
    assert meter.costs is not None
    return meter.costs


@given(costs=all_costs, seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_costs_are_learned_through_noise(costs: WorkCosts, seed: int) -> None:
    meter = CostMeter()
    show(meter, costs, 400, seed=seed)
    found = learned(meter)
    for decoding, tokens in ((1, 0), (20, 0), (0, 700), (12, 300)):
        assert found.step(decoding, tokens) == pytest.approx(costs.step(decoding, tokens), rel=0.2)
    for patches in (200, 2880):
        assert found.vision.seconds(patches) == pytest.approx(
            costs.vision.seconds(patches), rel=0.2
        )


def test_a_step_that_was_held_up_hardly_counts() -> None:
    meter, undisturbed = CostMeter(), CostMeter()
    for each in (meter, undisturbed):
        show(each, H200, 300)
    for _ in range(3):
        meter.stepped(StepReport(8, 0, 8, 100 * H200.step(8, 0)))
    show(meter, H200, 32, seed=1)
    assert learned(meter).step(8, 0) == pytest.approx(learned(undisturbed).step(8, 0), rel=0.15)


def test_a_machine_that_becomes_slower_is_noticed() -> None:
    meter = CostMeter()
    show(meter, H200, 600)
    slow = WorkCosts(
        *(LinearCost(3 * c.base, 3 * c.each) for c in (H200.vision, H200.prefill, H200.decode))
    )
    show(meter, slow, 3000)
    assert learned(meter).step(16, 700) == pytest.approx(slow.step(16, 700), rel=0.25)


def test_nothing_is_known_before_there_was_a_prompt_and_a_reply() -> None:
    meter = CostMeter()
    meter.stepped(StepReport(0, 1, 100, 0.1))
    assert meter.costs is None
    meter.stepped(StepReport(1, 0, 1, 0.02))
    assert learned(meter).decode.seconds(1) == pytest.approx(0.02, rel=0.01)
    assert learned(meter).prefill.seconds(100) == pytest.approx(0.1, rel=0.01)
    meter.reset()
    assert meter.costs is None


@given(
    reports=st.lists(
        st.builds(
            StepReport,
            decoding=st.integers(0, 5),
            prefilling=st.integers(0, 2),
            tokens=st.integers(1, 500),
            seconds=st.floats(0, 10),
        ),
        max_size=80,
    )
)
@settings(max_examples=60, deadline=None)
def test_no_price_is_ever_below_nothing(reports: list[StepReport]) -> None:
    meter = CostMeter()
    for report in reports:
        meter.stepped(report)
        costs = meter.costs
        if costs is not None:
            for cost in (costs.decode, costs.prefill):
                assert cost.base >= 0
                assert cost.each >= 0
                assert np.isfinite(cost.base + cost.each)


@given(shape=shapes, costs=all_costs, utilisation=st.floats(0.3, 1.0))
@settings(max_examples=100, deadline=None)
def test_one_stream_more_than_fits_is_too_much(
    shape: StreamShape, costs: WorkCosts, utilisation: float
) -> None:
    fit = streams_that_fit(shape, costs, utilisation)
    assert predicted_load([shape] * (fit + 1), costs) > utilisation - 1e-6
    if fit:
        assert predicted_load([shape] * fit, costs) <= utilisation + 1e-6


def test_the_load_is_the_sum_that_the_brief_makes() -> None:
    """Forty W720 streams: 20 decode steps of everyone, forty prompts, forty chunks a second."""
    decode = 19 * (2.6e-3 + 40 * 0.175e-3)
    rest = 40 * (1e-3 + 13.5e-3 + 5e-3 + 0.3e-3)
    assert predicted_load([W720] * 40, H200) == pytest.approx(decode + rest)


def test_replies_that_ride_on_prompts_take_no_step_of_their_own() -> None:
    """Where a step of both takes no longer than the prompt, 40 prompts carry 19 decode steps."""
    costs = replace(H200, saved=2.6e-3)
    assert predicted_load([W720] * 40, H200) - predicted_load([W720] * 40, costs) == (
        pytest.approx(19 * 2.6e-3)
    )
    assert predicted_load([W720], H200) - predicted_load([W720], costs) == pytest.approx(2.6e-3)


def test_what_steps_save_by_being_shared_is_learned() -> None:
    costs = replace(H200, saved=2e-3)
    meter = CostMeter()
    show(meter, costs, 600)
    assert learned(meter).step(15, 700) == pytest.approx(costs.step(15, 700), rel=0.1)
    assert learned(meter).step(15, 0) == pytest.approx(costs.step(15, 0), rel=0.1)


def test_what_a_further_reply_costs_is_not_forgotten_in_quiet_hours() -> None:
    """After thousands of steps of one or two replies, thirty cost what they did."""
    meter = CostMeter()
    show(meter, H200, 300)
    random = np.random.default_rng(1)
    for _ in range(4000):
        decoding = int(random.integers(1, 3))
        seconds = H200.decode.seconds(decoding) * float(np.exp(0.1 * random.standard_normal()))
        meter.stepped(StepReport(decoding, 0, decoding, seconds))
    assert learned(meter).step(30, 0) == pytest.approx(H200.step(30, 0), rel=0.2)


def test_a_rehearsal_leaves_nothing_behind() -> None:
    told: list[StepReport] = []

    class Observer(CostMeter):
        def stepped(self, report: StepReport) -> None:
            told.append(report)

    for threaded in (False, True):
        with make_engine(threaded=threaded, observer=Observer()) as engine:
            assert engine.capacity().by_time is None
            engine.measure_costs(0.2)
            capacity = engine.capacity()
            assert capacity.by_time is not None
            assert f"{capacity.streams} live streams fit" in capacity.sentence()
            stats = engine.stats()
            assert (stats.sessions, stats.pages_reserved) == (0, 0)
            engine.check_integrity()
            assert not told
            steps = stats.steps
            engine.measure_costs(0.2)
            assert engine.stats().steps == steps


@pytest.mark.parametrize("seed", range(4))
def test_as_many_fit_after_the_rehearsal_as_in_quiet_and_in_busy_hours(seed: int) -> None:
    """Steps as an H200 has them: few replies in a step at first and while there is room, where
    prompts take most of the time, and many once it is full."""
    costs = WorkCosts(
        vision=LinearCost(0.3e-3, 0.0),
        prefill=LinearCost(14e-3, 11e-6),
        decode=LinearCost(2.6e-3, 0.15e-3),
        saved=2.2e-3,
    )
    fit = streams_that_fit(W720, costs)
    meter, random = CostMeter(), np.random.default_rng(seed)

    def steps(count: int, replies: tuple[int, int], beside: tuple[int, int], pure: int) -> None:
        """So many prompts, `beside` them as many replies, and after each `pure` decode steps."""
        for _ in range(count):
            sizes = [(int(random.integers(*beside)), int(random.integers(740, 760)))]
            sizes += [(int(random.integers(*replies)), 0) for _ in range(pure)]
            for decoding, prompt in sizes:
                seconds = costs.step(decoding, prompt) * np.exp(0.03 * random.standard_normal())
                report = StepReport(decoding, int(prompt > 0), decoding + prompt, float(seconds))
                meter.stepped(report)
            meter.encoded(W720.patches, costs.vision.seconds(W720.patches))

    for count, replies, beside, pure in (
        (9, (1, 4), (0, 3), 5),
        (200, (1, 3), (0, 3), 12),
        (600, (5, 24), (10, 24), 1),
    ):
        steps(count, replies, beside, pure)
        assert abs(streams_that_fit(W720, learned(meter)) - fit) <= 3
