"""Served sessions over an executor of whole prompts: nothing changes for a client."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from fake.engine import make_protocol
from fake.host import HostDesk, RecordingSink, make_desk
from fake.prompt_executor import Reply, WrittenExecutor, make_prompt_engine

from framesink.runtime.events import EventKind
from framesink.runtime.prompting.executor import ReplyRequest
from framesink.serving.errors import StatusCode
from framesink.serving.metrics import ServingMetrics
from framesink.serving.options import ServeOptions

PROTOCOL = make_protocol()


@contextmanager
def desk(reply: Reply) -> Iterator[tuple[HostDesk, WrittenExecutor]]:
    sink = RecordingSink()
    metrics = ServingMetrics(sink)
    engine, executor = make_prompt_engine(reply, protocol=PROTOCOL, threaded=True, observer=metrics)
    made = make_desk(engine, metrics, sink, ServeOptions(threads=2, executor="tensorrt_llm"))
    try:
        yield made, executor
    finally:
        made.host.close()
    assert all(answer.done for answer in made.asked), "a request was never answered"
    assert executor.closed


def echo(request: ReplyRequest) -> list[int]:
    """Says how many videos it sees."""
    count = len(request.prompt.videos)
    return [*PROTOCOL.tokenizer.encode(f" {count} ..."), PROTOCOL.turn_end]


def test_sessions_are_answered_turn_by_turn() -> None:
    with desk(echo) as (at, _):
        for session in (1, 2, 3):
            at.open(session)
        for number in range(3):
            answers = [at.chunk(session, number) for session in (1, 2, 3)]
            for answer in answers:
                events = answer.wait().events
                assert "".join(event.text for event in events) == f" {number + 1}"
                assert events[-1].final
                assert events[-1].kind is EventKind.COMMENTARY
        asked = at.chunk(1, 3, question="Why?").wait()
        assert asked.events[-1].kind is EventKind.ANSWER
        for session in (1, 2, 3):
            assert at.end(session).code is None
        assert at.engine.stats().sessions == 0


def test_embeddings_from_elsewhere_are_refused_in_a_sentence() -> None:
    with desk(echo) as (at, _):
        at.open(1)
        inputs = {
            "EMBEDDINGS": np.zeros((2, at.engine.model.text.hidden_size), np.float32),
            "GRID": np.array([[1, 2, 4]], np.int32),
            "CHUNK": np.array([np.nan, np.nan, 2.0]),
        }
        answer = at.ask(1, inputs=inputs)
        assert answer.code is StatusCode.INVALID_ARGUMENT
        assert "takes no embeddings; push frames" in answer.sentence
        assert at.chunk(1, 0).code is None


def test_an_end_in_mid_reply_cancels_it() -> None:
    with desk(lambda request: ()) as (at, executor):
        at.open(1)
        hanging = at.chunk(1, 0)
        assert at.end(1).code is None
        assert hanging.code is StatusCode.CANCELLED
        assert all(reply.cancelled for reply in executor.replies)


def test_the_ensemble_is_not_served_with_tensorrt_llm() -> None:
    assert ServeOptions().serves_ensemble
    assert not ServeOptions(executor="tensorrt_llm").serves_ensemble
