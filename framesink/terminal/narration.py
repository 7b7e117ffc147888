"""One source narrated by one session: capture in, events out, questions in between."""

import queue
import re
import threading
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import islice

from framesink.runtime.captions.writer import CaptionWriter
from framesink.runtime.engine import StreamingEngine
from framesink.runtime.errors import FramesinkError, OptionError, SessionClosedError
from framesink.runtime.events import Event, EventKind
from framesink.runtime.session import Session
from framesink.runtime.video.capture import ChunkStream
from framesink.runtime.video.chunk import Chunk
from framesink.terminal.figures import Figures, Summary
from framesink.terminal.preview import PreviewWindow
from framesink.terminal.view import Status, View, printable

_TICK_SECONDS = 0.05
_THREAD_SECONDS = 15.0


@dataclass(frozen=True, slots=True)
class TimedQuestion:
    """A question to ask with the chunk that holds second `at` of the video."""

    at: float
    text: str

    @classmethod
    def parse(cls, value: str) -> "TimedQuestion":
        """From `SECONDS:TEXT`, as on the command line. Raises OptionError for anything else."""
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*:\s*(\S.*)", value, re.DOTALL)
        if match is None:
            raise OptionError(
                f"The question {value!r} has no time; write it as SECONDS:TEXT, "
                'such as "12.5:how many circles are there?".'
            )
        return cls(float(match[1]), match[2].strip())


class Narration:
    """Feeds a session from a stream of chunks and shows and writes what it says.

    One thread hands chunks over, one takes events; the thread that calls `run` does everything
    visible.
    """

    def __init__(
        self,
        engine: StreamingEngine,
        session: Session,
        chunks: ChunkStream,
        view: View,
        *,
        writers: Sequence[CaptionWriter] = (),
        questions: Sequence[TimedQuestion] = (),
        max_chunks: int | None = None,
        preview: PreviewWindow | None = None,
    ) -> None:
        """`questions` are asked when their time comes; `max_chunks` ends the stream early."""
        self._engine = engine
        self._session = session
        self._chunks = chunks
        self._view = view
        self._writers = writers
        self._questions = sorted(questions, key=lambda question: question.at)
        self._max_chunks = max_chunks
        self._preview = preview
        self._figures = Figures()
        self._inbox: queue.SimpleQueue[Chunk | Event | None] = queue.SimpleQueue()
        self._replied = threading.Condition()
        self._replies = 0
        self._ended = False
        self._failure: Exception | None = None

    @property
    def summary(self) -> Summary:
        """Figures of the run so far."""
        return self._figures.summary()

    def run(self) -> None:
        """Return when everything was narrated.

        Raises VideoError after the last reply if the source ended early or failed, and
        FramesinkError if the session failed. Whatever ends it, threads and session are closed.
        """
        feeder = threading.Thread(target=self._feed, name="feed", daemon=True)
        reader = threading.Thread(target=self._read, name="events", daemon=True)
        with ExitStack() as stack:
            stack.callback(feeder.join, _THREAD_SECONDS)
            stack.callback(reader.join, _THREAD_SECONDS)
            stack.callback(self._session.close)
            stack.callback(self._chunks.close)
            stack.callback(self._stop_waiting)
            self._figures.begin()
            feeder.start()
            reader.start()
            self._show_until_the_end()
        if self._failure is not None:
            raise self._failure

    def ask(self, text: str) -> None:
        """Ask with the next chunk; a refusal is shown, not raised. Callable from any thread."""
        try:
            self._session.ask(text)
        except FramesinkError as error:
            self._view.note(str(error))

    def _feed(self) -> None:
        try:
            for number, chunk in enumerate(islice(self._chunks, self._max_chunks)):
                self._ask_what_is_due(chunk, pushed=number)
                self._inbox.put(chunk)
                self._session.push_chunk(chunk)
            for question in self._questions:
                self._view.note(f"not asked, the video ended before: {printable(question.text)}")
        except SessionClosedError:
            pass  # its reason has come, or will come, as an event
        except Exception as error:  # raised by run(), once everything was said
            self._failure = error
        finally:
            self._session.finish()

    def _ask_what_is_due(self, chunk: Chunk, pushed: int) -> None:
        """A question goes with the next turn to begin, so earlier chunks are waited for."""
        while self._questions and self._questions[0].at < chunk.t1:
            with self._replied:
                self._replied.wait_for(lambda: self._replies >= pushed or self._ended)
            self.ask(self._questions.pop(0).text)

    def _read(self) -> None:
        try:
            for event in self._session:
                if event.final:
                    with self._replied:
                        self._replies += 1
                        self._replied.notify_all()
                self._inbox.put(event)
        finally:
            self._stop_waiting()
            self._inbox.put(None)

    def _stop_waiting(self) -> None:
        with self._replied:
            self._ended = True
            self._replied.notify_all()

    def _show_until_the_end(self) -> None:
        ended = False
        while not ended:
            with suppress(queue.Empty):
                ended = self._take(self._inbox.get(timeout=_TICK_SECONDS))
            self._view.status(self._status())
            if self._preview is not None:
                self._preview.tick()

    def _take(self, item: Chunk | Event | None) -> bool:
        """Show one item of the inbox; whether it was the end."""
        if isinstance(item, Chunk):
            self._take_chunk(item)
        elif isinstance(item, Event):
            self._take_event(item)
        return item is None

    def _take_chunk(self, chunk: Chunk) -> None:
        self._figures.pushed(len(chunk.frames), chunk.dropped)
        if self._preview is not None:
            self._preview.show(chunk.frames[-1])

    def _take_event(self, event: Event) -> None:
        for writer in self._writers:
            writer.write(event)
        self._view.event(event)
        if self._preview is not None and event.text:
            self._preview.caption(event.text)
        if event.final:
            self._figures.replied(event)
            if event.kind is EventKind.ERROR and self._failure is None:
                self._failure = FramesinkError(event.text)

    def _status(self) -> Status:
        session, engine = self._session.stats(), self._engine.stats()
        return Status(
            lag=session.lag,
            fps=self._figures.fps,
            ttft=session.last_ttft,
            itl=session.last_itl,
            pages_used=engine.pages_used,
            pages_total=engine.pages_total,
            context_tokens=session.context_tokens,
            dropped_frames=session.dropped_frames,
            rung=session.rung,
        )
