"""Policies against StreamingVLM's rules on plain token lists, and the pages they promise."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
from fake.engine import FEW_MERGES, make_protocol
from fake.token_list import TokenList
from hypothesis import given, settings
from hypothesis import strategies as st

from framesink.runtime.errors import CapacityError, OptionError
from framesink.runtime.kv.page_pool import PagePool
from framesink.runtime.kv.positions import text_span, vision_span
from framesink.runtime.kv.sequence_cache import SequenceCache
from framesink.runtime.kv.span import Span, SpanKind, SpanPart
from framesink.runtime.policies import FullAttention, Policy, SinkWindow, SlidingWindow, TurnProfile
from framesink.runtime.prefix import prefix_spans
from framesink.runtime.preprocess import Grid
from framesink.runtime.protocol import ChatProtocol

PROTOCOL = make_protocol()
MAX_GRID = Grid(1, 4, 6)
MAX_WORDS = 7


@dataclass(frozen=True)
class FakeTurn:
    """What one turn holds. `words` of the reply, whether it is `closed` by its ending."""

    words: tuple[int, ...]
    closed: bool
    question: str | None
    grid: Grid | None


def turns(count: int) -> st.SearchStrategy[list[FakeTurn]]:
    """Random streams: silences, replies cut short, questions, changing resolutions."""
    turn = st.builds(
        FakeTurn,
        words=st.lists(st.integers(0, 200), max_size=MAX_WORDS).map(tuple),
        closed=st.booleans(),
        question=st.none() | st.sampled_from(["How many?", "Which colour is it, and where?"]),
        grid=st.sampled_from([Grid(1, 2, 2), Grid(1, 2, 4), MAX_GRID]),
    )
    return st.lists(turn, min_size=1, max_size=count)


class Stream:
    """Drives a policy over a real span list and page pool, as a session does, without a model."""

    def __init__(
        self,
        policy: Policy,
        profile: TurnProfile,
        protocol: ChatProtocol = PROTOCOL,
        query: str | None = None,
    ) -> None:
        self.policy = policy
        self.profile = profile
        self.protocol = protocol
        prefix = prefix_spans(protocol, query)
        own_pages = policy.max_pages(profile)
        shared_pages = -(-sum(map(len, prefix)) // profile.page_size)
        self.pool = PagePool(own_pages + shared_pages + 1, profile.page_size)
        shared = SequenceCache(self.pool, self.pool.reserve(shared_pages, "The prefix"))
        for span in prefix:
            shared.append(span)
        write(shared)
        self.shared = shared
        self.cache = SequenceCache(self.pool, self.pool.reserve(own_pages, "A session"))
        self.cache.adopt(shared.spans)
        self.turn = 0

    def run(self, fake: FakeTurn) -> tuple[tuple[Span, ...], list[Span]]:
        """One turn; returns the spans before and after eviction."""
        before = self.cache.spans
        kept = self.policy.select(before, self.turn, self.profile)
        self.cache.replace(kept)
        for span in self.turn_spans(fake):
            self.cache.append(span)
        write(self.cache)
        if fake.words:
            self.add(SpanKind.REPLY, SpanPart.BODY, fake.words)
            write(self.cache)
        if fake.closed:
            self.add(SpanKind.REPLY, SpanPart.CLOSE, self.protocol.reply_closing)
            write(self.cache)
            self.cache.extend_last(self.protocol.turn_close)
        else:
            self.add(SpanKind.REPLY, SpanPart.CLOSE, self.protocol.turn_close)
        self.turn += 1
        return before, kept

    def add(self, kind: SpanKind, part: SpanPart, tokens: tuple[int, ...] | list[int]) -> None:
        self.cache.append(text_span(kind, part, self.turn, tokens))

    def turn_spans(self, fake: FakeTurn) -> list[Span]:
        number, protocol = self.turn, self.protocol
        time = protocol.time_text(float(number), number + 1.0)
        spans = [
            text_span(SpanKind.USER, SpanPart.OPEN, number, protocol.user_open),
            text_span(SpanKind.USER, SpanPart.TIME, number, time),
        ]
        if fake.grid is not None:
            tokens = protocol.vision(fake.grid.tokens(2))
            spans.append(vision_span(number, tokens, fake.grid, merge_size=2, time_step=2.0))
        if fake.question is not None:
            question = protocol.question(fake.question)
            spans.append(text_span(SpanKind.QUESTION, SpanPart.BODY, number, question))
        spans.append(text_span(SpanKind.USER, SpanPart.CLOSE, number, protocol.turn_close))
        spans.append(text_span(SpanKind.REPLY, SpanPart.OPEN, number, protocol.reply_open))
        return spans

    def check(self) -> None:
        """Every page is accounted for, every slot used once, no more rows live than promised."""
        slots = np.concatenate([span.slots for span in self.cache.spans])
        assert np.unique(slots).size == slots.size
        self.pool.check_integrity(
            span.slots for cache in (self.shared, self.cache) for span in cache.spans
        )
        assert self.cache.tokens == sum(len(span) for span in self.cache.spans)
        own = self.cache.tokens - self.shared.tokens
        assert own <= self.policy.max_rows(self.profile)

    def tokens(self) -> list[int]:
        return [int(token) for span in self.cache.spans for token in span.tokens]


def write(cache: SequenceCache) -> None:
    """Give every token a row."""
    if cache.unwritten:
        cache.prepare(cache.unwritten)
        cache.commit()


def make_profile(
    *, chunk_seconds: float = 1.0, page_size: int = 4, protocol: ChatProtocol = PROTOCOL
) -> TurnProfile:
    """The largest turn `turns` makes; every turn in any window may hold the longest question."""
    frame = [*protocol.user_open, *protocol.time_text(10.0, 11.0), *protocol.turn_close]
    frame += [*protocol.reply_open, *protocol.reply_closing, *protocol.turn_close]
    return TurnProfile(
        chunk_seconds=chunk_seconds,
        vision_rows=MAX_GRID.tokens(2) + 2,
        frame_rows=len(frame) + 1,
        reply_rows=MAX_WORDS,
        question_rows=10 * len(protocol.question("Which colour is it, and where?")),
        context_pages=1000,
        page_size=page_size,
    )


@pytest.mark.parametrize("vocabulary", [FEW_MERGES, 460])
@given(
    stream=turns(30),
    vision_turns=st.integers(1, 6),
    reply_turns=st.integers(2, 6),
    sink_text=st.integers(0, 9),
    recent_text=st.integers(0, 9),
    chunk_seconds=st.sampled_from([0.5, 1.0, 1.5, 2.0]),
    query=st.none() | st.just("Say what happens."),
)
@settings(max_examples=60, deadline=None)
def test_sink_window_keeps_the_tokens_streamingvlm_keeps(
    vocabulary: int,
    stream: list[FakeTurn],
    vision_turns: int,
    reply_turns: int,
    sink_text: int,
    recent_text: int,
    chunk_seconds: float,
    query: str | None,
) -> None:
    protocol = make_protocol(vocabulary)
    policy = SinkWindow(sink_text, recent_text, vision_turns * chunk_seconds, reply_turns)
    profile = make_profile(chunk_seconds=chunk_seconds, protocol=protocol)
    ours = Stream(policy, profile, protocol, query)
    theirs = TokenList(protocol, vision_turns, reply_turns, sink_text, recent_text, query)
    for number, fake in enumerate(stream):
        assert fake.grid is not None
        ours.run(fake)
        ours.check()
        grid = (fake.grid.t, fake.grid.h, fake.grid.w)
        embeddings = np.zeros((fake.grid.tokens(2), 4), dtype=np.float32)
        theirs.begin_turn((float(number), number + 1.0), grid, embeddings, fake.question)
        ending = [*protocol.reply_closing, protocol.turn_end] if fake.closed else []
        theirs.end_reply([*fake.words, *ending])
        assert ours.tokens() == theirs.tokens


@given(stream=turns(40), window=st.integers(2, 6), page_size=st.sampled_from([1, 4, 16]))
@settings(max_examples=40, deadline=None)
def test_sliding_window_keeps_whole_recent_turns(
    stream: list[FakeTurn], window: int, page_size: int
) -> None:
    ours = Stream(SlidingWindow(float(window)), make_profile(page_size=page_size))
    for number, fake in enumerate(stream):
        before, kept = ours.run(fake)
        ours.check()
        assert kept == [s for s in before if s.turn < 0 or s.turn > number - window]
    assert all(
        span.kind is not SpanKind.PREVIOUS_TEXT or span.part is not SpanPart.BODY
        for span in ours.cache.spans
    )


@given(stream=turns(40), data=st.data(), page_size=st.sampled_from([1, 4, 16]))
@settings(max_examples=60, deadline=None)
def test_spans_keep_their_order_and_rows(
    stream: list[FakeTurn], data: st.DataObject, page_size: int
) -> None:
    """Spans outside of both windows' reach stay the same objects; the order of turns never changes;
    rows that stay are rows that were there."""
    vision_turns, reply_turns = data.draw(st.integers(1, 5)), data.draw(st.integers(2, 5))
    policy = SinkWindow(3, 5, float(vision_turns), reply_turns)
    ours = Stream(policy, make_profile(page_size=page_size))
    for number, fake in enumerate(stream):
        before, kept = ours.run(fake)
        ours.check()
        assert [s.turn for s in kept] == sorted(s.turn for s in kept)
        recent = number - min(vision_turns, reply_turns)
        assert [s for s in kept if s.turn > recent] == [s for s in before if s.turn > recent]
        rows = {slot for span in before for slot in span.slots.tolist()}
        assert rows >= {slot for span in kept for slot in span.slots.tolist()}


@pytest.mark.parametrize(
    "policy", [SinkWindow(8, 8, 3.0, 5), SinkWindow(0, 8, 6.0, 2), SlidingWindow(4.0)]
)
def test_the_promised_pages_are_enough_and_not_many_more(policy: Policy) -> None:
    """Streams of the largest turns fill most pages that were promised, and never more."""
    profile = replace(make_profile(page_size=4), question_rows=0)
    largest = FakeTurn(tuple(range(MAX_WORDS)), True, None, MAX_GRID)
    ours = Stream(policy, profile)
    used = []
    for _ in range(40):
        ours.run(largest)
        ours.check()
        used.append(ours.cache.reservation.used)
    assert policy.max_pages(profile) * 0.7 <= max(used) <= policy.max_pages(profile)


def test_full_attention_keeps_everything_and_refuses_when_full() -> None:
    profile = replace(make_profile(page_size=4), context_pages=40, question_rows=0)
    ours = Stream(FullAttention(), profile)
    largest = FakeTurn(tuple(range(MAX_WORDS)), True, None, MAX_GRID)
    fitting = 4
    for _ in range(fitting):
        before, kept = ours.run(largest)
        ours.check()
        assert kept == list(before)
    with pytest.raises(CapacityError, match=r"full after 4 turns: .* 40 pages of 4 tokens"):
        ours.run(largest)


def test_windows_too_small_for_a_turn_are_refused() -> None:
    with pytest.raises(OptionError, match=r"reply_turns=1 keeps 1 turns.*at least 2"):
        SinkWindow(reply_turns=1)
    with pytest.raises(OptionError, match="cannot be negative"):
        SinkWindow(sink_text=-1)
    with pytest.raises(OptionError, match="vision_seconds=1 with chunks of 2 s keeps 0 turns"):
        SinkWindow(vision_seconds=1.0).max_pages(make_profile(chunk_seconds=2.0))
    with pytest.raises(OptionError, match="seconds=3 with chunks of 2 s keeps 1 turns"):
        SlidingWindow(3.0).max_pages(make_profile(chunk_seconds=2.0))


def test_windows_in_seconds_are_counted_in_whole_chunks() -> None:
    profile = make_profile(chunk_seconds=1.5)
    assert SinkWindow(vision_seconds=16.0).vision_turns(profile) == 10
    assert SinkWindow(vision_seconds=0.3).vision_turns(replace(profile, chunk_seconds=0.1)) == 3
