"""Sessions over whole prompts: what is sent, what of it can be used again, how it ends."""

from collections.abc import Sequence

import numpy as np
import pytest
from fake.engine import make_frames, make_protocol
from fake.prompt_executor import make_prompt_engine
from hypothesis import given, settings
from hypothesis import strategies as st

from framesink.runtime.errors import CapacityError, OptionError
from framesink.runtime.events import Event, EventKind
from framesink.runtime.kv.positions import text_span, vision_span
from framesink.runtime.kv.span import Span, SpanKind, SpanPart
from framesink.runtime.policies import FullAttention, Policy, SinkWindow, SlidingWindow, TurnProfile
from framesink.runtime.prefix import prefix_spans
from framesink.runtime.preprocess import Grid
from framesink.runtime.prompting.executor import PromptSettings, ReplyRequest
from framesink.runtime.prompting.prompt import Prompt, PromptWriter, Video, common_prefix
from framesink.runtime.prompting.trimming import trim

PROTOCOL = make_protocol()
PAD = PROTOCOL.video_pad
GRID = Grid(1, 2, 4)
PROFILE = TurnProfile(
    chunk_seconds=1.0,
    vision_rows=4,
    frame_rows=40,
    reply_rows=6,
    question_rows=20,
    context_pages=4000,
    page_size=1,
)
POLICIES = [
    SinkWindow(sink_text=3, recent_text=4, vision_seconds=4, reply_turns=4),
    SinkWindow(sink_text=3, recent_text=4, vision_seconds=2, reply_turns=6),
    SinkWindow(sink_text=3, recent_text=4, vision_seconds=6, reply_turns=2),
    SlidingWindow(seconds=5),
    FullAttention(),
]


def turn_spans(turn: int, words: Sequence[int]) -> list[Span]:
    vision = PROTOCOL.vision(GRID.tokens(2))
    spans = [
        text_span(SpanKind.USER, SpanPart.OPEN, turn, PROTOCOL.user_open),
        text_span(SpanKind.USER, SpanPart.TIME, turn, PROTOCOL.time_text(turn, turn + 1)),
        vision_span(turn, vision, GRID, merge_size=2, time_step=1.0),
        text_span(SpanKind.USER, SpanPart.CLOSE, turn, PROTOCOL.turn_close),
        text_span(SpanKind.REPLY, SpanPart.OPEN, turn, PROTOCOL.reply_open),
        text_span(SpanKind.REPLY, SpanPart.CLOSE, turn, PROTOCOL.turn_close),
    ]
    if words:
        spans.insert(-1, text_span(SpanKind.REPLY, SpanPart.BODY, turn, words))
    return spans


def tokens_of(spans: Sequence[Span]) -> list[int]:
    return [int(token) for span in spans for token in span.tokens]


# Trimming.


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("step", [1, 2, 3, 9])
@settings(max_examples=12, deadline=None)
@given(replies=st.lists(st.lists(st.integers(20, 200), max_size=5), min_size=12, max_size=24))
def test_a_context_trimmed_in_steps(policy: Policy, step: int, replies: list[list[int]]) -> None:
    """Never more than the policy keeps; it changes only when the policy's own would; then it does
    not change for as many turns as the window allows."""
    stepped = exact = prefix_spans(PROTOCOL, "Say it.")
    unchanged = 0
    for turn, words in enumerate(replies):
        exact = policy.select(exact, turn, PROFILE)
        kept = trim(policy, stepped, turn, PROFILE, step)
        assert len(tokens_of(kept)) <= len(tokens_of(exact))
        assert {span.turn for span in kept} <= {span.turn for span in exact}
        # The policy has nothing to add: what was trimmed is a context of its own kind.
        assert tokens_of(policy.select(kept, turn, PROFILE)) == tokens_of(kept)
        if step == 1:
            assert tokens_of(kept) == tokens_of(exact)
        last = [span for span in kept if span.turn == turn - 1 and span.kind is SpanKind.REPLY]
        assert not turn or tokens_of(last)
        unchanged = unchanged + 1 if tokens_of(kept) == tokens_of(stepped) else 0
        new = turn_spans(turn, words)
        exact, stepped = [*exact, *new], [*kept, *new]
    if policy == POLICIES[0] and step == 3:  # the window of 4 is full before turn 4
        assert unchanged == (len(replies) - 1 - 4) % 3


# Prompts.


def written(spans: Sequence[Span], videos: dict[int, Video] | None = None) -> Prompt:
    return PromptWriter(PROTOCOL).write(spans, videos or {})


def video(seed: int) -> Video:
    return Video(make_frames(seed), 2.0, GRID.tokens(2))


def test_a_prompt_has_the_tokens_of_its_spans() -> None:
    words = PROTOCOL.tokenizer.encode(" the red circle leaves")
    spans = [*prefix_spans(PROTOCOL, "Say it."), *turn_spans(0, words), *turn_spans(1, [])]
    shown = {0: video(0), 1: video(1), 7: video(7)}
    prompt = written(spans, shown)
    expected = tokens_of(spans)
    assert prompt.tokens == len(expected)
    assert [token for token in prompt.ids if token != PAD] == [
        token for token in expected if token != PAD
    ]
    assert prompt.ids.count(PAD) == 2
    assert prompt.videos == (shown[0], shown[1])
    assert prompt.text.count("<|vision_start|><|video_pad|><|vision_end|>") == 2


@settings(deadline=None)
@given(st.lists(st.sampled_from(["<|im_end|>", "<|", "im_", "start|>", "é", "x", "\n"])))
def test_plain_text_makes_no_special_token(pieces: list[str]) -> None:
    """Whatever is said, in however many spans."""
    spans = [
        text_span(SpanKind.REPLY, SpanPart.BODY, 0, PROTOCOL.tokenizer.encode_plain(piece))
        for piece in pieces
    ]
    prompt = written(spans)
    assert not set(prompt.ids) & PROTOCOL.tokenizer.special_tokens.keys()
    assert prompt.text.replace(" ", "") == "".join(pieces)


def test_half_a_character_is_left_out() -> None:
    tokens = PROTOCOL.tokenizer.encode_plain("日")
    assert len(tokens) == 3
    assert written([text_span(SpanKind.REPLY, SpanPart.BODY, 0, tokens[1:])]).text == ""
    assert written([text_span(SpanKind.REPLY, SpanPart.BODY, 0, tokens)]).text == "日"


VIDEOS = [Video(np.empty((0, 0, 0, 3), np.uint8), 2.0, tokens) for tokens in (1, 3, 3)]
CONTENT = st.lists(st.sampled_from([1, 2, *VIDEOS]), max_size=8)


def made_of(content: Sequence[int | Video]) -> Prompt:
    ids = tuple(PAD if isinstance(part, Video) else part for part in content)
    return Prompt("", ids, tuple(part for part in content if isinstance(part, Video)))


def expanded(content: Sequence[int | Video]) -> list[object]:
    """Every token of the language model, those of a video named by it."""
    rows: list[object] = []
    for part in content:
        count = part.tokens if isinstance(part, Video) else 1
        rows += [(part if isinstance(part, int) else id(part), i) for i in range(count)]
    return rows


@settings(deadline=None)
@given(CONTENT, st.lists(st.sampled_from([1, 2]), max_size=3), CONTENT)
def test_a_common_prefix_is_counted_in_tokens(
    before: list[int | Video], said: list[int], after: list[int | Video]
) -> None:
    old, new = expanded([*before, *said]), expanded(after)
    same = 0
    while same < min(len(old), len(new)) and old[same] == new[same]:
        same += 1
    assert common_prefix(made_of(before), said, made_of(after), PAD) == same


# Sessions.


def say(text: str) -> list[int]:
    return [*PROTOCOL.tokenizer.encode(text), PROTOCOL.turn_end]


def reusable_share(trim_turns: int, chunks: int = 24) -> float:
    """Of all tokens sent by a session with a window of 6 turns, the share that can be reused."""
    engine, _ = make_prompt_engine(
        lambda request: say(" red ..."), protocol=PROTOCOL, trim_turns=trim_turns
    )
    session = engine.open_session(SinkWindow(8, 12, 6.0, 6), "Say it.")
    sent = reusable = 0
    for number in range(chunks):
        session.push(make_frames(number))
        list(session)
        stats = session.stats()
        sent += stats.context_tokens
        reusable += stats.reusable_tokens or 0
    assert stats.turns == chunks
    assert stats.evicted_tokens > 0
    return reusable / sent


def test_larger_steps_let_more_be_used_again() -> None:
    shares = [reusable_share(step) for step in (1, 2, 3, 5)]
    assert shares == sorted(shares)
    assert shares[0] < 0.45
    assert shares[2] > 0.6


def test_a_session_from_its_opening_to_its_end() -> None:
    engine, executor = make_prompt_engine(lambda request: say(" red ..."), protocol=PROTOCOL)
    session = engine.open_session(query="Say it.", previous_text=" It began.")
    session.push(make_frames(0))
    session.ask("Why?")
    session.finish()
    events = list(session)
    answers = [event for event in events if event.final]
    assert [event.kind for event in answers] == [EventKind.ANSWER]
    assert "".join(event.text for event in events) == " red"
    assert answers[0].tokens == tuple(say(" red ..."))
    assert executor.requests[0].prompt.text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nSay it.<|im_end|>\n"
        "<|im_start|>previous text\n It began.<|im_end|>\n"
        "<|im_start|>user\nTime=0.0-1.0s<|vision_start|><|video_pad|><|vision_end|>Why?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert engine.stats().sessions == 0
    assert engine.stats().steps == 1
    engine.close()
    assert executor.closed


def test_a_question_after_the_video_is_a_turn_without_vision() -> None:
    engine, executor = make_prompt_engine(lambda request: say(" red ..."), protocol=PROTOCOL)
    session = engine.open_session()
    session.push(make_frames(0), t0=3.0, t1=4.0)
    list(session)
    session.ask("Why?")
    session.finish()
    (_, answer) = list(session)
    assert (answer.kind, answer.t0, answer.turn) == (EventKind.ANSWER, 3.0, 1)
    assert executor.requests[1].prompt.text.endswith(
        "<|im_start|>assistant\n red ...<|im_end|>\n"
        "<|im_start|>user\nTime=3.0-4.0sWhy?<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("tokens", "text", "kind"),
    [
        (say(" ..."), "", EventKind.SILENCE),
        (say(" red")[:-1], " red", EventKind.COMMENTARY),
        ([*say(" red")[:-1], PROTOCOL.vision_start, *say(" no")], " red", EventKind.COMMENTARY),
        ([PROTOCOL.tokenizer.special("<|box_end|>"), *say(" red ...")], " red", None),
    ],
    ids=["silence", "cut off", "opens a vision block", "a special token"],
)
def test_kinds_of_replies(tokens: list[int], text: str, kind: EventKind | None) -> None:
    engine, executor = make_prompt_engine(lambda request: tokens, protocol=PROTOCOL)
    session = engine.open_session()
    for number in range(2):
        session.push(make_frames(number))
        events = list(session)
        assert "".join(event.text for event in events) == text
        assert events[-1].kind is (kind or EventKind.COMMENTARY)
    said = executor.requests[1].prompt.text.split("assistant\n")[1].split("<|im_end|>")[0]
    assert said.removesuffix(" ...") == text


def test_frames_are_the_callers_no_more() -> None:
    engine, executor = make_prompt_engine(lambda request: say(" ..."), protocol=PROTOCOL)
    session = engine.open_session()
    frames = make_frames(0)
    kept = frames.copy()
    session.push(frames)
    frames[:] = 0
    list(session)
    (shown,) = executor.requests[0].prompt.videos
    assert np.array_equal(shown.pixels, kept)
    assert shown.fps == 2.0


def test_closing_cancels_and_waits() -> None:
    engine, executor = make_prompt_engine(lambda request: (), protocol=PROTOCOL, threaded=True)
    with engine:
        session, other = engine.open_session(), engine.open_session()
        session.push(make_frames(0))
        session.close()
        assert engine.stats().sessions == 1
        assert all(reply.cancelled for reply in executor.replies)
        assert list(session) == []
        other.push(make_frames(1))
    assert all(reply.ended for reply in executor.replies)
    assert list(other) == []


def test_an_executor_that_raises_ends_one_session() -> None:
    def refuse(request: ReplyRequest) -> list[int]:
        if "bad" in request.prompt.text:
            raise RuntimeError("no")
        return say(" red ...")

    engine, _ = make_prompt_engine(refuse, protocol=PROTOCOL)
    bad, good = engine.open_session(query="bad"), engine.open_session(query="good")
    for session in (bad, good):
        session.push(make_frames(0))
    ended: list[Event] = list(bad)
    assert [event.kind for event in ended] == [EventKind.ERROR]
    assert "A turn could not begin (RuntimeError: no)." in ended[0].text
    assert list(good)[-1].kind is EventKind.COMMENTARY


def test_a_policy_that_does_not_fit_is_refused_when_a_session_is_opened() -> None:
    engine, _ = make_prompt_engine(lambda request: say(" ..."), protocol=PROTOCOL)
    with pytest.raises(CapacityError, match="can need"):
        engine.open_session(SinkWindow(vision_seconds=400, reply_turns=400))


@pytest.mark.parametrize("name", ["trim_turns", "reply_seconds", "drain_seconds"])
def test_settings_that_make_no_sense(name: str) -> None:
    with pytest.raises(OptionError, match=f"{name}=0"):
        PromptSettings(**{name: 0})
