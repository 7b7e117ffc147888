"""What a session's input becomes: turns with their numbers and times, and the spans they are."""

import time

from framesink.runtime.detokenizer import Detokenizer
from framesink.runtime.events import Event, EventKind
from framesink.runtime.kv.positions import text_span, vision_span
from framesink.runtime.kv.span import Span, SpanKind, SpanPart
from framesink.runtime.models.config import ModelConfig
from framesink.runtime.protocol import ChatProtocol
from framesink.runtime.reply import Reply
from framesink.runtime.session_input import PreparedChunk, TurnInput
from framesink.runtime.turn import Turn


class TurnBuilder:
    """Makes the turns of one session, one after the other."""

    def __init__(
        self,
        model: ModelConfig,
        protocol: ChatProtocol,
        *,
        chunk_seconds: float,
        first_query: tuple[int, ...] = (),
    ) -> None:
        """`first_query` are the tokens of a query that stands in the first turn."""
        self._model = model
        self._protocol = protocol
        self._chunk_seconds = chunk_seconds
        self._first_query = first_query
        self._turns = 0
        self._last_times = (0.0, 0.0)
        self._dropping = False

    def begin(self, given: TurnInput) -> Turn:
        """The next turn; one without a chunk is about the time of the last chunk."""
        chunk, question = given.chunk, given.question
        if chunk is not None:
            self._last_times = (chunk.t0, chunk.t1)
            captured_at, handed_at = chunk.captured_at, chunk.handed_at
        else:
            captured_at = handed_at = question.asked_at if question else time.monotonic()
        number, self._turns = self._turns, self._turns + 1
        return Turn(
            number=number,
            t0=self._last_times[0],
            t1=self._last_times[1],
            captured_at=captured_at,
            handed_at=handed_at,
            deadline=captured_at + self._chunk_seconds,
            question=question.text if question else None,
            chunk=chunk,
            reply=Reply(self._protocol.reply_closing),
            detokenizer=Detokenizer(self._protocol.tokenizer),
            reply_tokens=chunk.reply_tokens if chunk else None,
        )

    def spans(self, turn: Turn, given: TurnInput) -> list[Span]:
        """The spans of a turn that `begin` made of `given`, up to where the reply begins."""
        protocol, number = self._protocol, turn.number
        spans = [
            text_span(SpanKind.USER, SpanPart.OPEN, number, protocol.user_open),
            text_span(SpanKind.USER, SpanPart.TIME, number, protocol.time_text(turn.t0, turn.t1)),
        ]
        if given.chunk is not None:
            spans.append(self._vision_span(turn, given.chunk))
        question = given.question.tokens if given.question else ()
        for tokens in (self._first_query if number == 0 else (), question):
            if tokens:
                spans.append(text_span(SpanKind.QUESTION, SpanPart.BODY, number, tokens))
        spans.append(text_span(SpanKind.USER, SpanPart.CLOSE, number, protocol.turn_close))
        spans.append(text_span(SpanKind.REPLY, SpanPart.OPEN, number, protocol.reply_open))
        return spans

    def notice(self, turn: Turn) -> Event | None:
        """An event that says so when frames begin to be dropped, or the stream's rung changes."""
        chunk = turn.chunk
        if chunk is None:
            return None
        began = chunk.dropped > 0 and not self._dropping
        self._dropping = chunk.dropped > 0
        sentences: list[str] = []
        if began:
            sentences.append(
                f"{chunk.dropped} frames between {chunk.t0:.1f} s and {chunk.t1:.1f} s of video "
                "were dropped because inference is late."
            )
        if chunk.notice is not None:
            sentences.append(chunk.notice)
        if not sentences:
            return None
        return turn.event(EventKind.DEGRADED, " ".join(sentences), time.monotonic())

    def error(self, turn: Turn | None, sentence: str) -> Event:
        """The final event of a session that fails during a turn, or between two."""
        if turn is not None:
            return turn.event(EventKind.ERROR, sentence, time.monotonic(), final=True)
        t0, t1 = self._last_times
        return Event(EventKind.ERROR, sentence, t0, t1, self._turns, 0.0, final=True)

    def _vision_span(self, turn: Turn, chunk: PreparedChunk) -> Span:
        vision = self._model.vision
        seconds_per_step = vision.temporal_patch_size * (chunk.t1 - chunk.t0) / chunk.frames
        return vision_span(
            turn.number,
            self._protocol.vision(chunk.grid.tokens(vision.spatial_merge_size)),
            chunk.grid,
            merge_size=vision.spatial_merge_size,
            time_step=seconds_per_step * vision.tokens_per_second,
        )
