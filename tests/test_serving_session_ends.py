"""How sessions of many clients end: told to, given up, drained, failed."""

import itertools
import threading

import pytest
from fake.engine import LIMITS
from fake.gated_host import GatedExecutor, alone, desk
from fake.host import Answer
from fake.waiting import WAIT_SECONDS, until

from framesink.runtime.events import Event, EventKind
from framesink.serving.errors import StatusCode


def test_ending_a_session_answers_whoever_waits_and_frees_its_pages() -> None:
    executor = GatedExecutor()
    with desk(executor) as at:
        at.open(3)
        executor.gate.clear()
        waiting = [at.chunk(3, number) for number in range(3)]
        until(lambda: at.engine.stats().pages_used > 0)
        ended = at.end(3)
        after = at.chunk(3, 9)
        # It is refused once the end was taken; before, the first chunk could be answered.
        assert after.code is StatusCode.NOT_FOUND
        executor.gate.set()
        assert ended.code is None
        assert at.engine.stats().pages_used == 0
        assert [answer.code for answer in waiting] == [StatusCode.CANCELLED] * 3
        assert "ended by its client" in waiting[0].sentence
        at.open(3)  # the number is free again


def test_a_cancelled_request_leaves_the_session_to_its_client() -> None:
    executor = GatedExecutor()
    with desk(executor, resume_seconds=60) as at:
        at.open(1)
        executor.gate.clear()
        gone = at.chunk(1, 0)
        until(lambda: at.engine.stats().pages_used > 0)
        gone.cancelled = True
        assert gone.code is StatusCode.CANCELLED
        executor.gate.set()
        again = at.chunk(1, 1)
        assert [again.tokens] == alone([0, 1])[1:]
        assert gone.events == []


class VanishingAnswer(Answer):
    """Its client is gone as soon as it has the first event."""

    def send(self, event: Event, *, last: bool) -> None:
        """See Responder."""
        super().send(event, last=last)
        self.cancelled = True


def test_a_client_that_goes_in_mid_reply_is_found_gone_with_the_last_event() -> None:
    """Even when nobody has looked for it in between."""
    with desk(resume_seconds=0.2) as at:
        at.open(1)
        answer = at.chunk(1, 0, answer=VanishingAnswer())
        assert answer.code is StatusCode.CANCELLED
        assert len(answer.events) >= 1
        until(lambda: at.engine.stats().sessions == 0)


@pytest.mark.parametrize("answered", [True, False])
def test_a_client_that_is_gone_gives_its_pages_back(answered: bool) -> None:
    """Gone in mid-reply: after `resume_seconds`. Gone between requests: after `idle_seconds`."""
    executor = GatedExecutor()
    with desk(executor, resume_seconds=0.3, idle_seconds=0.4 if answered else 60) as at:
        at.open(1)
        at.open(2)
        executor.gate.clear()
        answer = at.chunk(1, 0)
        until(lambda: at.engine.stats().pages_used > 0)
        answer.cancelled = not answered
        if not answered:
            assert answer.code is StatusCode.CANCELLED
        executor.gate.set()
        until(lambda: at.ask(2).code is None and at.engine.stats().sessions == 1)
        late = at.chunk(1, 1)
        assert late.code is StatusCode.NOT_FOUND
        assert ("without a request" if answered else "client had gone") in late.sentence
        assert [at.chunk(2, 5).tokens] == alone([5])
    reason = "idle" if answered else "abandoned"
    assert at.sink.values["framesink_sessions_ended_total", reason] >= 1


def test_draining_answers_what_waits_and_refuses_the_rest() -> None:
    executor = GatedExecutor()
    with desk(executor) as at:
        at.open(1)
        at.open(2)
        executor.gate.clear()
        waiting = [at.chunk(1, number) for number in range(2)]
        until(lambda: at.engine.stats().pages_used > 0)
        at.draining.set()
        numbers = itertools.count(3)
        until(lambda: at.ask(next(numbers), start=True).code is StatusCode.UNAVAILABLE)
        refused = at.chunk(1, 2)
        assert refused.code is StatusCode.UNAVAILABLE
        assert "shutting down" in refused.sentence
        assert not at.drained.is_set()
        executor.gate.set()
        assert at.drained.wait(WAIT_SECONDS)
        assert [answer.tokens for answer in waiting] == alone([0, 1])
        assert at.chunk(2, 0).code is StatusCode.UNAVAILABLE


def test_an_error_of_one_session_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A session whose context is full ends with an error event; another goes on."""
    monkeypatch.setattr("fake.engine.LIMITS", LIMITS)
    with desk() as at:
        at.open(1, policy="full", max_new_tokens=400)
        at.open(2)
        number = 0
        while (last := at.chunk(1, number)).wait().events[-1].kind is not EventKind.ERROR:
            number += 1
            assert number < 400
        assert "context is full" in last.events[-1].text
        assert last.events[-1].final
        after = at.chunk(1, number)
        assert after.code is StatusCode.NOT_FOUND
        assert "context is full" in after.sentence
        assert [at.chunk(2, 5).tokens] == alone([5])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_fails_answers_everybody_and_is_reported() -> None:
    executor = GatedExecutor()
    with desk(executor) as at:
        at.open(1)
        at.open(2)
        executor.dies = True
        answers = [at.chunk(session, 0) for session in (1, 2)]
        for answer in answers:
            answer.wait()
            failed = answer.code is not None or answer.events[-1].kind is EventKind.ERROR
            assert failed
        until(lambda: bool(at.broken))
        assert "The engine failed (SystemExit" in at.broken[0]
        late = at.ask(3, start=True)
        assert late.code is StatusCode.UNAVAILABLE
        assert "The engine failed" in late.sentence


def test_an_answer_that_cannot_be_sent_ends_its_session_alone() -> None:
    class BrokenAnswer(Answer):
        """Cannot be sent to, against what a responder promises."""

        def send(self, event: Event, *, last: bool) -> None:
            """See Responder."""
            raise RuntimeError("no way")

    with desk() as at:
        at.open(1)
        at.open(2)
        broken = at.chunk(1, 0, answer=BrokenAnswer())
        assert broken.code is StatusCode.INTERNAL
        assert "(RuntimeError)" in broken.sentence
        until(lambda: at.engine.stats().sessions == 1)
        assert [at.chunk(2, 5).tokens] == alone([5])


def test_closing_the_host_answers_everybody() -> None:
    executor = GatedExecutor()
    with desk(executor) as at:
        at.open(1)
        executor.gate.clear()
        waiting = at.chunk(1, 0)
        until(lambda: at.engine.stats().pages_used > 0)
        threading.Timer(0.2, executor.gate.set).start()
        at.host.close()
        at.host.close = lambda: None  # type: ignore[method-assign]
        assert waiting.done
