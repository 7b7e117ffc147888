"""Sessions over the stand-in of TensorRT-LLM: the demo model on the demo clip."""

import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers", reason="the stand-in runs on transformers")

import torch
from fake import tensorrt_llm as stand_in
from fake.tensorrt_llm_engine import (
    MODEL,
    QUERY,
    WINDOW,
    MakeEngine,
    demo_clip,
    open_session,
    text_of,
)
from fake.tensorrt_llm_model import load_runner
from fake.waiting import WAIT_SECONDS
from reference.dense_model import load_model
from reference.dense_policies import DenseSinkWindow
from reference.dense_streaming import TurnRecord
from reference.recomputed_window import RecomputedStream

from framesink.runtime.engine import StreamingEngine
from framesink.runtime.errors import SessionClosedError
from framesink.runtime.events import EventKind
from framesink.runtime.preprocess import resize_frames
from framesink.runtime.prompting import worker as prompt_worker
from framesink.runtime.tokenizer import Tokenizer


def placeholders_once(ids: list[int], pad: int) -> list[int]:
    """Token ids with one placeholder per video."""
    kept = [True, *(not (a == b == pad) for a, b in pairwise(ids))]
    return [token for token, keep in zip(ids, kept, strict=True) if keep]


@pytest.mark.parametrize("step", [1, 3])
def test_captions_are_those_of_the_window_recomputed_densely(
    make_tensorrt_llm_engine: MakeEngine,
    tensorrt_llm: stand_in.Behaviour,
    carrying_bundle: Path,
    step: int,
) -> None:
    """Every prompt and every greedy token, over several trims, with a question in between; and
    what is counted as reusable is what the stand-in finds among its blocks of 32 tokens."""
    engine = make_tensorrt_llm_engine(trim_turns=step)
    session = open_session(engine)
    tokenizer = Tokenizer.from_directory(carrying_bundle)
    reference = RecomputedStream(
        load_model(MODEL, torch.float32),
        tokenizer,
        DenseSinkWindow(WINDOW, WINDOW, 12, 20),
        query=QUERY,
        max_new_tokens=engine.defaults.max_new_tokens,
        step=step,
    )
    records: list[TurnRecord] = []
    for number, chunk in enumerate(demo_clip()[:10]):
        question = "How many shapes are there?" if number == 5 else None
        session.push_chunk(chunk, question=question)
        events = list(session)
        frames = resize_frames(chunk.frames, engine.preprocess)
        record = reference.chunk(frames, chunk.t0, chunk.t1, question=question)
        sent = load_runner(MODEL).tokenizer.encode(
            tensorrt_llm.prompts[-1], add_special_tokens=False
        )
        assert sent.ids == placeholders_once(record.prompt, reference.video_pad)
        assert list(events[-1].tokens) == record.tokens
        assert text_of(events) == tokenizer.decode(reference.words(record.tokens))
        stats = session.stats()
        assert stats.context_tokens == len(record.prompt)
        assert stats.reusable_tokens is not None
        assert tensorrt_llm.reused_tokens[-1] == stats.reusable_tokens // 32 * 32
        kinds = {event.kind for event in events}
        assert kinds <= {EventKind.ANSWER if question else EventKind.COMMENTARY, EventKind.SILENCE}
        records.append(record)
    assert len({tuple(record.tokens) for record in records}) > 4
    assert sum(tensorrt_llm.reused_tokens) > 0
    assert tensorrt_llm.wrongly_reused_blocks == 0


def test_eight_sessions_at_once_say_what_each_says_alone(
    make_tensorrt_llm_engine: MakeEngine, tensorrt_llm: stand_in.Behaviour
) -> None:
    begins = [0, 2, 5, 7, 9, 10, 14, 20]
    alone = []
    engine = make_tensorrt_llm_engine()
    for begin in begins:
        with open_session(engine, max_new_tokens=4) as session:
            said = []
            for chunk in demo_clip()[begin : begin + 2]:
                session.push_chunk(chunk)
                said += [event.tokens for event in session if event.final]
            alone.append(said)
    assert tensorrt_llm.most_at_once == 1

    together = threading.Barrier(len(begins), timeout=WAIT_SECONDS)

    def wait_for_all(_: str, count: int, __: Callable[[], bool]) -> None:
        if count == 0:
            together.wait()

    tensorrt_llm.before_token = wait_for_all
    engine = StreamingEngine(
        engine._executor,  # the same model, with a thread of the engine's own
        engine.model,
        engine.protocol,
        engine.preprocess,
        engine.defaults,
        engine.limits,
    )
    sessions = [open_session(engine, max_new_tokens=4) for _ in begins]
    for session, begin in zip(sessions, begins, strict=True):
        for chunk in demo_clip()[begin : begin + 2]:
            session.push_chunk(chunk)
        session.finish()
    said = [[event.tokens for event in session if event.final] for session in sessions]
    assert said == alone
    assert tensorrt_llm.most_at_once == len(begins)
    assert engine.stats().sessions == 0
    engine.close()


def test_a_cancelled_reply_is_aborted_and_drained(
    make_tensorrt_llm_engine: MakeEngine, tensorrt_llm: stand_in.Behaviour
) -> None:
    """Closing in mid-reply harms nobody else, and when it returns the request has ended."""
    speaking = threading.Event()
    held = threading.Event()

    def hold(prompt: str, count: int, aborted: Callable[[], bool]) -> None:
        if "hold" in prompt and count == 2:
            speaking.set()
            while not aborted():
                held.wait(0.01)

    tensorrt_llm.before_token = hold
    engine = make_tensorrt_llm_engine(threaded=True)
    other = open_session(engine)
    session = open_session(engine, "hold")
    session.push_chunk(demo_clip()[2])
    assert speaking.wait(WAIT_SECONDS)
    other.push_chunk(demo_clip()[2])
    other.finish()
    assert text_of(list(other)).strip()
    session.close()
    assert tensorrt_llm.aborted == 1
    assert tensorrt_llm.at_once == 0
    assert not any(event.final for event in session)
    with pytest.raises(SessionClosedError):
        session.push_chunk(demo_clip()[3])
    assert engine.stats().sessions == 0


@pytest.mark.parametrize("where", ["refuse", "fail"])
def test_a_failing_request_harms_no_other(
    make_tensorrt_llm_engine: MakeEngine, tensorrt_llm: stand_in.Behaviour, where: str
) -> None:
    error = ValueError("too\nlong") if where == "refuse" else stand_in.RequestError("no blocks")
    setattr(tensorrt_llm, where, lambda prompt: error if "bad" in prompt else None)
    engine = make_tensorrt_llm_engine(threaded=True)
    good, bad = open_session(engine), open_session(engine, "bad")
    for session in (bad, good):
        session.push_chunk(demo_clip()[2])
        session.finish()
    (failure,) = list(bad)
    assert (failure.kind, failure.final) == (EventKind.ERROR, True)
    assert failure.text == (
        f"TensorRT-LLM refused the request ({type(error).__name__}: "
        f"{'too long' if where == 'refuse' else 'no blocks'})."
    )
    events = list(good)
    assert events[-1].final
    assert all(event.kind is EventKind.COMMENTARY for event in events)
    assert engine.failure is None


def test_a_reply_that_does_not_come_is_ended_by_the_watchdog(
    make_tensorrt_llm_engine: MakeEngine,
    tensorrt_llm: stand_in.Behaviour,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The worker's clock jumps past the deadline; the next reply has its own."""
    asked, pause, jump = threading.Event(), threading.Event(), 0.0

    def hold(prompt: str, count: int, aborted: Callable[[], bool]) -> None:
        while "hold" in prompt and not aborted():
            asked.set()
            pause.wait(0.01)

    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + jump)
    monkeypatch.setattr(prompt_worker, "time", clock)
    engine = make_tensorrt_llm_engine(threaded=True, reply_seconds=1000.0)
    tensorrt_llm.before_token = hold
    session = open_session(engine, "hold")
    session.push_chunk(demo_clip()[0])
    assert asked.wait(WAIT_SECONDS)
    jump = 1001.0
    other = open_session(engine)
    (failure,) = list(session)
    assert "did not complete the reply within 1000 s" in failure.text
    assert tensorrt_llm.aborted == 1
    other.push_chunk(demo_clip()[2])
    other.finish()
    assert list(other)[-1].kind is EventKind.COMMENTARY


def test_an_executor_that_hangs_ends_the_engine(
    make_tensorrt_llm_engine: MakeEngine, tensorrt_llm: stand_in.Behaviour
) -> None:
    """A cancelled request that never ends: every session is told, nobody waits for ever."""
    release, asked = threading.Event(), threading.Event()
    engine = make_tensorrt_llm_engine(threaded=True, reply_seconds=0.2, drain_seconds=0.3)

    def hang(*_: object) -> None:
        asked.set()
        release.wait(WAIT_SECONDS)

    tensorrt_llm.before_token = hang
    idle, session = open_session(engine), open_session(engine)
    session.push_chunk(demo_clip()[0])
    assert asked.wait(WAIT_SECONDS)
    assert [event.kind for event in session] == [EventKind.ERROR]
    (told,) = list(idle)
    assert "did not end a cancelled request within 0.3 s" in told.text
    assert engine.failure == told.text
    engine.close()
    assert tensorrt_llm.llms[0].is_down
    release.set()
