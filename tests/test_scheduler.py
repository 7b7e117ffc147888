"""The scheduler alone: ids, counts and costs."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.live_machine import H200, W720, LiveStream, run_live

from framesink.runtime.load.capacity import StreamShape, predicted_load, streams_that_fit
from framesink.runtime.load.costs import LinearCost, WorkCosts
from framesink.runtime.scheduler import LEAST_PART, Encoding, Scheduler, Share, Work

works = st.lists(
    st.builds(
        Work,
        sequence=st.integers(0, 10_000),
        deadline=st.floats(0, 10),
        tokens=st.integers(1, 90),
        decoding=st.booleans(),
        reply_tokens=st.integers(0, 20),
        grace=st.floats(0, 2),
    ),
    max_size=30,
    unique_by=lambda work: work.sequence,
)


# A second is a lot: a token of a prompt takes a hundredth, a decode step a tenth.
SLOW = WorkCosts(
    vision=LinearCost(0.0, 0.01), prefill=LinearCost(0.02, 0.01), decode=LinearCost(0.1, 0.0)
)
# Prices can come out as nothing, and steps so dear that nobody is in time.
FREE_TOKENS = WorkCosts(LinearCost(3.0, 0.0), LinearCost(3.0, 0.0), LinearCost(0.0, 0.0))
NOTHING = WorkCosts(LinearCost(0.0, 0.0), LinearCost(0.0, 0.0), LinearCost(0.0, 0.0))
NOW = 5.0


def make_scheduler(
    *,
    prefill_budget: int = 40,
    max_part: int = 32,
    max_batch: int = 8,
    patch_budget: int = 100,
    costs: WorkCosts | None = None,
    most_stall: float = 0.25,
) -> Scheduler:
    return Scheduler(
        prefill_budget=prefill_budget,
        max_part=max_part,
        max_batch=max_batch,
        patch_budget=patch_budget,
        costs=lambda: costs,
        most_stall=most_stall,
        now=lambda: NOW,
    )


@given(work=works, costs=st.sampled_from([None, H200, SLOW, FREE_TOKENS, NOTHING]))
@settings(max_examples=200, deadline=None)
def test_a_step_stays_within_its_limits(work: list[Work], costs: WorkCosts | None) -> None:
    shares = make_scheduler(costs=costs).schedule(work)
    by_number = {item.sequence: item for item in work}
    assert len(shares) <= 8
    assert len({share.sequence for share in shares}) == len(shares)
    assert all(0 < share.tokens <= min(32, by_number[share.sequence].tokens) for share in shares)
    prompts = [share for share in shares if not by_number[share.sequence].decoding]
    assert sum(share.tokens for share in prompts) <= 40
    assert bool(shares) == bool(work)


@given(
    waiting=st.lists(
        st.builds(
            Encoding,
            sequence=st.integers(0, 10_000),
            deadline=st.floats(0, 10),
            patches=st.integers(1, 90),
            reply_tokens=st.integers(0, 20),
            grace=st.floats(0, 2),
        ),
        max_size=10,
        unique_by=lambda chunk: chunk.sequence,
    ),
    replies=works,
    costs=st.sampled_from([None, H200, SLOW, FREE_TOKENS, NOTHING]),
)
@settings(max_examples=200, deadline=None)
def test_a_chunk_is_encoded_unless_a_reply_needs_the_time(
    waiting: list[Encoding], replies: list[Work], costs: WorkCosts | None
) -> None:
    chosen = make_scheduler(costs=costs).schedule_encoding(waiting, replies)
    patches = {chunk.sequence: chunk.patches for chunk in waiting}
    assert len(chosen) <= 1 or sum(patches[number] for number in chosen) <= 100
    if costs is None or not any(reply.decoding for reply in replies):
        assert bool(chosen) == bool(waiting)


def test_replies_under_way_are_in_every_step() -> None:
    work = [Work(number, 100.0, 1, decoding=True) for number in range(7)]
    shares = make_scheduler().schedule([Work(99, 0.0, 500, decoding=False), *work])
    assert {share.sequence for share in shares} == {0, 1, 2, 3, 4, 5, 6, 99}


def test_prompts_go_by_deadline_and_share_what_is_left() -> None:
    work = [
        Work(1, 3.0, 30, decoding=False),
        Work(2, 1.0, 30, decoding=False),
        Work(3, 2.0, 30, decoding=False),
        Work(4, 9.0, 1, decoding=True),
    ]
    assert make_scheduler().schedule(work) == [Share(4, 1), Share(2, 30), Share(3, 10)]


def test_nobody_waits_for_ever() -> None:
    """A late prompt is served even while newer sessions keep coming with a prompt each step."""
    scheduler = make_scheduler(prefill_budget=10)
    waiting = {0: Work(0, 5.0, 25, decoding=False)}
    for step in range(1, 30):
        waiting[step] = Work(step, float(step), 10, decoding=False)
        for share in scheduler.schedule(waiting.values()):
            work = waiting.pop(share.sequence)
            if work.tokens > share.tokens:
                left = work.tokens - share.tokens
                waiting[work.sequence] = Work(work.sequence, work.deadline, left, False)
        if 0 not in waiting:
            return
    raise AssertionError("the prompt of session 0 was never finished")


def test_chunks_are_encoded_by_deadline_within_the_budget() -> None:
    scheduler = make_scheduler(patch_budget=100)
    waiting = [Encoding(1, 5.0, 40), Encoding(2, 1.0, 50), Encoding(3, 3.0, 50)]
    assert scheduler.schedule_encoding(waiting) == [2, 3]
    assert scheduler.schedule_encoding([]) == []


def test_a_chunk_larger_than_the_budget_is_encoded_alone() -> None:
    scheduler = make_scheduler(patch_budget=100)
    waiting = [Encoding(1, 1.0, 140), Encoding(2, 2.0, 10)]
    assert scheduler.schedule_encoding(waiting) == [1]


# With costs.


def h200_scheduler(now: Callable[[], float]) -> Scheduler:
    return Scheduler(
        prefill_budget=1024,
        max_part=1024,
        max_batch=64,
        patch_budget=2880,
        costs=lambda: H200,
        now=now,
    )


@given(work=works, most_stall=st.floats(0.01, 1.0))
@settings(max_examples=200, deadline=None)
def test_prompts_hold_replies_up_no_longer_than_allowed(
    work: list[Work], most_stall: float
) -> None:
    """Nor do they take what a reply that is due earlier needs, if that can still be in time."""
    shares = make_scheduler(costs=SLOW, most_stall=most_stall).schedule(work)
    by_number = {item.sequence: item for item in work}
    replies = [item for item in work if item.decoding]
    parts = [
        (by_number[s.sequence], s.tokens) for s in shares if not by_number[s.sequence].decoding
    ]
    spent = sum(SLOW.prefill.seconds(tokens) for _, tokens in parts)
    if replies:
        worth = SLOW.prefill.seconds(LEAST_PART) + SLOW.prefill.base
        assert spent <= max(most_stall, worth) + 1e-9
    for reply in replies:
        needed = reply.reply_tokens * SLOW.step(len(replies), 0)
        if NOW + needed > reply.deadline:
            continue
        later = [part for part, _ in parts if part.deadline > reply.deadline]
        if later:
            assert NOW + spent + needed <= reply.deadline + 1e-9


def test_a_prompt_waits_for_a_reply_that_is_due_first() -> None:
    prompt = Work(1, NOW + 9, 30, decoding=False, reply_tokens=3, grace=1)
    # Three steps are 0.3 s, the least part of the prompt 0.18 s.
    hurried = Work(2, NOW + 0.4, 1, decoding=True, reply_tokens=3, grace=1)
    relaxed = Work(2, NOW + 0.75, 1, decoding=True, reply_tokens=3, grace=1)
    lost = Work(2, NOW - 5.0, 1, decoding=True, reply_tokens=3, grace=1)
    scheduler = make_scheduler(costs=SLOW)
    assert scheduler.schedule([prompt, hurried]) == [Share(2, 1)]
    # Half of the 0.45 s that it can spare: 0.02 s and 20 tokens.
    assert scheduler.schedule([prompt, relaxed]) == [Share(2, 1), Share(1, 20)]
    assert scheduler.schedule([prompt, lost]) == [Share(2, 1), Share(1, 23)]


def test_a_prompt_that_a_later_step_has_room_for_is_not_cut() -> None:
    """Each of its parts would take the base of 0.02 s again; whole it takes 0.24 s."""
    prompt = Work(1, NOW + 9, 22, decoding=False, reply_tokens=3, grace=1)
    relaxed = Work(2, NOW + 0.75, 1, decoding=True, reply_tokens=3, grace=1)
    ending = Work(2, NOW + 0.75, 1, decoding=True, reply_tokens=1, grace=1)
    scheduler = make_scheduler(costs=SLOW)
    assert scheduler.schedule([prompt, relaxed]) == [Share(2, 1)]
    assert scheduler.schedule([prompt, ending]) == [Share(2, 1), Share(1, 22)]


def test_so_does_a_chunk() -> None:
    chunk = Encoding(1, NOW + 9, 30, reply_tokens=3, grace=1)
    hurried = Work(2, NOW + 0.4, 1, decoding=True, reply_tokens=3)
    relaxed = Work(2, NOW + 1.0, 1, decoding=True, reply_tokens=3)
    scheduler = make_scheduler(costs=SLOW)
    assert scheduler.schedule_encoding([chunk], [hurried]) == []
    assert scheduler.schedule_encoding([chunk], [relaxed]) == [1]
    assert scheduler.schedule_encoding([chunk], []) == [1]


def test_what_is_late_anyway_gives_way_but_not_for_ever() -> None:
    late = Work(1, NOW - 1.0, 20, decoding=False, reply_tokens=2, grace=2.0)
    timely = Work(2, NOW + 0.8, 20, decoding=False, reply_tokens=2, grace=2.0)
    later = Work(3, NOW + 1.5, 20, decoding=False, reply_tokens=2, grace=2.0)
    shares = make_scheduler(costs=SLOW).schedule([late, timely, later])
    assert shares == [Share(2, 20), Share(1, 20)]


@pytest.mark.parametrize("together", [False, True], ids=["spread", "at once"])
def test_as_many_streams_as_are_said_to_fit_are_in_time(together: bool) -> None:
    """Even if all their chunks come at the same moment."""
    count = streams_that_fit(W720, H200)
    streams = [LiveStream(W720, 0.0 if together else i / count) for i in range(count)]
    run = run_live(streams, 12.0, h200_scheduler)
    assert max(run.lags(0.0)) < 1.0
    assert count > 28
    # The longest part of a prompt, one chunk, and a step of everybody.
    assert run.longest_stall < 0.035


def test_a_load_above_one_falls_behind_and_none_below() -> None:
    """The load is what it says: streams spread over the second use all of the time."""
    most = max(n for n in range(1, 60) if predicted_load([W720] * n, H200) < 0.96)
    for count, late in ((most, False), (most + 4, True)):
        streams = [LiveStream(W720, i / count) for i in range(count)]
        run = run_live(streams, 20.0, h200_scheduler)
        assert (max(run.lags()) > 1.0) == late


def test_nobody_starves_where_there_is_too_much() -> None:
    """With a quarter too much for 15 seconds, everyone is answered, about equally late."""
    streams = [LiveStream(W720, i / 50) for i in range(50)]
    run_live(streams, 15.0, h200_scheduler)
    assert {len(stream.lags) for stream in streams} <= {14, 15}
    last = [stream.lags[-1] for stream in streams]
    assert min(last) > 1.0
    assert max(last) < min(last) + 2.0


def test_short_chunks_are_in_time_beside_a_long_one() -> None:
    """A stream of 8-second chunks has a prompt that takes longer than short chunks have time."""
    long = StreamShape(chunk_seconds=8.0, patches=0, prompt_tokens=20_000, new_tokens=100)
    short = StreamShape(chunk_seconds=0.25, patches=0, prompt_tokens=100, new_tokens=20)

    def shortest(costs: WorkCosts | None) -> float:
        streams = [LiveStream(long, 0.0), *(LiveStream(short, i / 12) for i in range(3))]
        run_live(
            streams,
            16.0,
            lambda now: Scheduler(
                prefill_budget=1024,
                max_part=1024,
                max_batch=64,
                patch_budget=2880,
                costs=lambda: costs,
                now=now,
            ),
        )
        assert max(streams[0].lags) < 8.0
        return max(lag for stream in streams[1:] for lag in stream.lags)

    assert shortest(H200) < 0.25 < shortest(None)
