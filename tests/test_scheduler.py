"""The scheduler alone: ids and counts."""

from hypothesis import given, settings
from hypothesis import strategies as st

from framesink.runtime.scheduler import Encoding, Scheduler, Share, Work

works = st.lists(
    st.builds(
        Work,
        sequence=st.integers(0, 10_000),
        deadline=st.floats(0, 10),
        tokens=st.integers(1, 90),
        decoding=st.booleans(),
    ),
    max_size=30,
    unique_by=lambda work: work.sequence,
)


def make_scheduler(
    *, prefill_budget: int = 40, max_part: int = 32, max_batch: int = 8, patch_budget: int = 100
) -> Scheduler:
    return Scheduler(
        prefill_budget=prefill_budget,
        max_part=max_part,
        max_batch=max_batch,
        patch_budget=patch_budget,
    )


@given(work=works)
@settings(max_examples=200, deadline=None)
def test_a_step_stays_within_its_limits(work: list[Work]) -> None:
    shares = make_scheduler().schedule(work)
    by_number = {item.sequence: item for item in work}
    assert len(shares) <= 8
    assert len({share.sequence for share in shares}) == len(shares)
    assert all(0 < share.tokens <= min(32, by_number[share.sequence].tokens) for share in shares)
    prompts = [share for share in shares if not by_number[share.sequence].decoding]
    assert sum(share.tokens for share in prompts) <= 40
    assert bool(shares) == bool(work)


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
