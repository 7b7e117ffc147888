"""Other ways into a session: embeddings made elsewhere, a chunk and its question at once."""

import numpy as np
import pytest
from fake.engine import (
    FEW_MERGES,
    PREPROCESS,
    fake_vision,
    finals,
    make_engine,
    make_frames,
    make_protocol,
)
from fake.executor import HIDDEN

from framesink.runtime.detokenizer import Detokenizer
from framesink.runtime.errors import (
    BacklogError,
    BusyError,
    CapacityError,
    SessionClosedError,
    VideoError,
)
from framesink.runtime.policies import SinkWindow
from framesink.runtime.preprocess import Grid, frames_to_patches
from framesink.runtime.session import Session
from framesink.runtime.video.chunk import Chunk

LONG = "Why is that? " * 40


def chunk(number: int) -> Chunk:
    t0 = float(number)
    return Chunk(make_frames(number), t0, t0 + 1, (t0, t0 + 0.5), 0.0)


def push_encoded(session: Session, number: int, question: str | None = None) -> None:
    frames = make_frames(number)
    _, embeddings = fake_vision(frames)
    _, grid = frames_to_patches(frames, PREPROCESS)
    session.push_embeddings(
        embeddings, grid, t0=float(number), t1=number + 1.0, frames=2, question=question
    )


def test_embeddings_are_answered_like_the_frames_they_were_made_of() -> None:
    with make_engine() as engine:
        frames, embeddings = engine.open_session(), engine.open_session()
        for number in range(8):
            question = "How many?" if number == 3 else None
            frames.push_chunk(chunk(number), question=question)
            push_encoded(embeddings, number, question)
            said = list(frames)
            again = list(embeddings)
            assert finals(said) == finals(again)
            assert [(e.text, e.kind, e.t0, e.t1) for e in said] == [
                (e.text, e.kind, e.t0, e.t1) for e in again
            ]
        assert engine.stats().encoded_chunks == 8
        engine.check_integrity()


def test_embeddings_that_do_not_fit_are_refused() -> None:
    _, good = fake_vision(make_frames(0))
    grid = Grid(1, 2, 4)
    with make_engine() as engine:
        session = engine.open_session()

        def push(
            embeddings: object = good,
            grid: Grid = grid,
            frames: int = 2,
            t1: float = 1.0,
            to: Session = session,
        ) -> None:
            array = np.asarray(embeddings)
            to.push_embeddings(array, grid, t0=0.0, t1=t1, frames=frames)

        with pytest.raises(VideoError, match=r"float32 \[2, 4\], not float64 \[2, 4\]"):
            push(good.astype(np.float64))
        with pytest.raises(VideoError, match=rf"float32 \[2, {HIDDEN}\], not float32 \[1, 4\]"):
            push(good[:1])
        with pytest.raises(VideoError, match="not finite"):
            push(np.full_like(good, np.nan))
        for beyond in (np.inf, -np.inf, 20_000.0, -20_000.0):
            with pytest.raises(VideoError, match="beyond 16384"):
                push(
                    np.where(np.arange(good.size).reshape(good.shape) == 3, beyond, good).astype(
                        "f4"
                    )
                )
        for wrong in (Grid(0, 2, 4), Grid(1, 3, 4), Grid(1, 2, -4), Grid(2, 2, 4)):
            with pytest.raises(VideoError, match="cannot be made of 2 frames"):
                push(grid=wrong)
        with pytest.raises(VideoError, match="no length"):
            push(t1=0.0)
        with pytest.raises(VideoError, match="finite seconds"):
            push(t1=float("nan"))
        with pytest.raises(CapacityError, match=r"makes 8 patches, .* at most 4"):
            push(to=engine.open_session(max_patches=4))
        push()
        assert len(finals(list(session))) == 1


def test_a_refused_chunk_leaves_no_question_and_a_refused_question_no_chunk() -> None:
    with make_engine() as engine:
        session = engine.open_session(SinkWindow(8, 12, 2.0, 2), max_pending_chunks=1)
        session.ask(LONG)
        with pytest.raises(BusyError, match="Earlier questions still take"):
            session.push_chunk(chunk(0), question=LONG)
        assert list(session) == []
        session.push_chunk(chunk(0))
        assert [event.question for event in session if event.final] == [LONG]
        with pytest.raises(CapacityError, match="in fewer words"):
            session.push_chunk(chunk(1), question="Why? " * 400)
        assert list(session) == []
        with pytest.raises(VideoError, match="no length"):
            session.push_chunk(Chunk(make_frames(0), 1.0, 1.0, (1.0, 1.0), 0.0), question="Where?")
        session.push_chunk(chunk(1))
        assert [event.question for event in session if event.final] == [None]


def test_what_may_succeed_later_is_busy_and_the_rest_is_not() -> None:
    with make_engine(num_pages=60, max_sessions=2) as engine:
        policy = SinkWindow(4, 4, 2.0, 2)
        with pytest.raises(CapacityError, match="pool's 59") as never:
            engine.open_session(SinkWindow(400, 900, 2.0, 2))
        assert not isinstance(never.value, BusyError)
        first = engine.open_session(policy)
        pages = engine.stats().pages_reserved
        others = [engine.open_session(policy)] if pages < 30 else []
        with pytest.raises(BusyError):
            engine.open_session(policy)
        for session in (first, *others):
            session.close()
        engine.open_session(policy)
    assert issubclass(BacklogError, BusyError)


def test_closing_without_waiting_ends_iteration_when_the_pages_are_free() -> None:
    with make_engine(threaded=True) as engine:
        session = engine.open_session()
        for number in range(2):
            session.push_chunk(chunk(number))
        session.close(wait=False)
        list(session)
        assert engine.stats().pages_used == engine.stats().sessions == 0
        with pytest.raises(SessionClosedError, match="was closed"):
            session.push_chunk(chunk(2))


@pytest.mark.parametrize("new_tokens", [1, 7])
def test_the_words_of_events_are_what_their_text_is_made_of(new_tokens: int) -> None:
    """A detokenizer elsewhere that is given them makes the same pieces, broken characters held
    back as here."""
    protocol = make_protocol(FEW_MERGES)
    with make_engine(protocol=protocol) as engine:
        session = engine.open_session(max_new_tokens=new_tokens)
        pieces = 0
        for number in range(40):
            session.push_chunk(chunk(number))
            elsewhere = Detokenizer(protocol.tokenizer)
            events = list(session)
            for event in events:
                text = elsewhere.push(event.words)
                assert event.text == text + (elsewhere.finish() if event.final else "")
                pieces += bool(event.words)
            words = [token for event in events for token in event.words]
            sampled = list(events[-1].tokens)
            assert words == sampled[: len(words)]
            left = [t for t in sampled[len(words) :] if t not in protocol.stop_tokens]
            assert left in ([], protocol.reply_closing)
        assert pieces > 20
