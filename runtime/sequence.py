"""The engine's side of a session: one turn after the other, over spans and pages.

All of it runs in the engine's thread.
"""

import time
from collections import deque
from dataclasses import dataclass, replace

from framesink.runtime.arrays import Float32Array
from framesink.runtime.event_stream import EventStream
from framesink.runtime.events import EventKind
from framesink.runtime.executors.base import SequenceInput
from framesink.runtime.kv.positions import text_span
from framesink.runtime.kv.sequence_cache import SequenceCache
from framesink.runtime.kv.span import PREFIX_TURN, SpanKind, SpanPart
from framesink.runtime.models.config import ModelConfig
from framesink.runtime.observer import EngineObserver
from framesink.runtime.policies import Policy, TurnProfile
from framesink.runtime.prefix import Prefix
from framesink.runtime.protocol import ChatProtocol
from framesink.runtime.reply_writer import ReplyWriter
from framesink.runtime.sampler import Sampler, SeenTokens
from framesink.runtime.session_input import PreparedChunk, SessionInput, TurnInput
from framesink.runtime.stats import SessionStats
from framesink.runtime.turn import Turn
from framesink.runtime.turn_builder import TurnBuilder


@dataclass(frozen=True, slots=True)
class SequenceOptions:
    """What a session was opened with, as token ids: `first_query` is the query of
    `query_placement` "first_turn", `previous_words` were said before it was opened."""

    policy: Policy
    profile: TurnProfile
    max_new_tokens: int
    first_query: tuple[int, ...] = ()
    previous_words: tuple[int, ...] = ()
    leeway: float = 0.0


class Sequence:
    """The state machine of one session.

    Waiting for its prefix, then writing the words said before it was opened, if there are any; then
    waiting for input; then a turn: encode the chunk, prefill, decode, settle.

    A step has three calls: `next_input` before it, `launched` when it is under way, `step_done`
    with its answer, by when another step may have been launched. While a token is being chosen the
    sequence can take part in the next step with a guess, that it will be a word: a guess that was
    wrong is taken back, row and all, and the answer of its step is passed over.
    """

    def __init__(
        self,
        number: int,
        *,
        cache: SequenceCache,
        prefix: Prefix,
        options: SequenceOptions,
        sampler: Sampler,
        model: ModelConfig,
        protocol: ChatProtocol,
        source: SessionInput,
        events: EventStream,
        observer: EngineObserver,
    ) -> None:
        self.number = number
        self.prefix = prefix
        self.cache = cache
        self.stats = SessionStats()
        self.ended = False
        self._options = options
        self._sampler = sampler
        self._protocol = protocol
        self._source = source
        self._events = events
        self._observer = observer
        self._started = False
        self._restoring = False
        self._opened_at = time.monotonic()
        self._turn: Turn | None = None
        self._writer: ReplyWriter | None = None
        # For each answer still to come, the oldest first, whether it is a token of the reply.
        self._answers: deque[bool] = deque()
        self._begun: TurnInput | None = None
        self._wanted = False
        self._decoding = False
        self._vocabulary = model.text.vocab_size
        self._seen: SeenTokens | None = None
        self._builder = TurnBuilder(
            model,
            protocol,
            chunk_seconds=options.profile.chunk_seconds,
            first_query=options.first_query,
        )

    # What the engine asks.

    @property
    def waiting(self) -> bool:
        """Whether it is between turns and what precedes them is there."""
        return self._turn is None and self.prefix.ready and not self._restoring

    @property
    def done(self) -> bool:
        """Whether everything that was put in has been answered and nothing more may come."""
        return self._turn is None and self._source.exhausted

    @property
    def deadline(self) -> float:
        """`time.monotonic()` by which the turn's reply, or the words said before, are due."""
        leeway = self._options.leeway
        if self._turn is not None:
            return self._turn.deadline + leeway
        return self._opened_at + self._options.profile.chunk_seconds + leeway

    @property
    def chunk_seconds(self) -> float:
        """How long its chunks are, in seconds of video time."""
        return self._options.profile.chunk_seconds

    @property
    def reply_tokens(self) -> int:
        """The most tokens of the turn's reply that are still to come."""
        return 0 if self._turn is None else self._most_reply_tokens - len(self._turn.sampled)

    @property
    def _most_reply_tokens(self) -> int:
        return self._current.reply_tokens or self._options.max_new_tokens

    @property
    def chunk_to_encode(self) -> PreparedChunk | None:
        """The chunk the turn waits for."""
        return self._turn.chunk if self._turn else None

    @property
    def tokens_to_write(self) -> int:
        """How many tokens the next steps have to write; 0 while there is nothing to do."""
        if self._restoring:
            return self.cache.unwritten
        if self._turn is None or self._turn.chunk is not None:
            return 0
        if self._awaits_token:
            return 1 if self._may_go_ahead else 0
        return self.cache.unwritten - self._turn.unfed

    @property
    def decoding(self) -> bool:
        """Whether the prompt is written and the reply is under way."""
        return self._decoding

    @property
    def _awaits_token(self) -> bool:
        """Whether a step under way chooses the reply's next token."""
        return any(self._answers)

    @property
    def _may_go_ahead(self) -> bool:
        """Whether the token after the one that is being chosen can be begun with."""
        sampled = len(self._current.sampled) + 1
        return self._reply_writer.may_guess and sampled < self._most_reply_tokens

    # A turn.

    def begin_turn(self) -> bool:
        """Take the input of the next turn, if there is any; before the first turn append the words
        said before, if there are any. Whether there was anything to do."""
        if not self._started:
            self._started = True
            self._start()
            if self._restoring:
                return True
        given = self._source.take()
        if given is None:
            return False
        turn = self._turn = self._builder.begin(given)
        self._writer = ReplyWriter(self.cache, turn.reply, turn.number)
        notice = self._builder.notice(turn)
        if notice is not None:
            self._events.put(notice)
        self._begun = given
        if given.chunk is not None and given.chunk.encoded:
            self.encoded(given.chunk.content)
        return True

    def make_room(self) -> None:
        """Evict for the turn that has begun, and append its spans; nothing if that is done.

        It is apart from `begin_turn` so that a GPU can encode the chunk meanwhile. Raises
        CapacityError when the policy cannot make room.
        """
        given, self._begun = self._begun, None
        if given is None:
            return
        turn, options = self._current, self._options
        kept = options.policy.select(self.cache.spans, turn.number, options.profile)
        evicted = self.cache.replace(kept)
        for span in self._builder.spans(turn, given):
            self.cache.append(span)
        questions = (span for span in self.cache.spans if span.kind is SpanKind.QUESTION)
        self._source.set_context_questions(sum(len(span) for span in questions))
        dropped = given.chunk.dropped if given.chunk else 0
        self.stats = replace(
            self.stats,
            evicted_tokens=self.stats.evicted_tokens + evicted,
            dropped_frames=self.stats.dropped_frames + dropped,
        )
        self._observer.turn_began(self.number, evicted_tokens=evicted, dropped_frames=dropped)

    def encoded(self, embeddings: Float32Array) -> None:
        """The vision encoder's answer for `chunk_to_encode`: float32 `[v, hidden]`."""
        turn = self._current
        turn.embeddings, turn.chunk = embeddings, None

    def next_input(self, count: int) -> SequenceInput:
        """The next `count` tokens to write. Raises CapacityError if there are no pages for them."""
        turn = self._turn
        ahead = int(self._awaits_token)
        if ahead:
            self._reply_writer.guess()
        last = count == self.cache.unwritten
        rows = self.cache.prepare(count)
        placeholders = int((rows.token_ids == self._protocol.video_pad).sum())
        wanted = last and turn is not None and not turn.ending
        self._wanted = wanted
        return SequenceInput(
            token_ids=rows.token_ids,
            vision_embeddings=turn.take_embeddings(placeholders) if turn else None,
            positions=rows.positions,
            slots=rows.slots,
            context=rows.context,
            needs_logits=wanted,
            bases=rows.bases,
            choice=self._sampler.choice(self._seen_tokens(), ahead=ahead) if wanted else None,
        )

    def launched(self) -> None:
        """The step is under way: for every later one its tokens are written."""
        self.cache.commit()
        if self._wanted:
            self._answers.append(True)
            self._decoding = True
        elif self._restoring:
            self._end_restoring_if_written()
        elif self._current.ending:
            self._end_turn_if_written()

    def step_done(self, answer: Float32Array | int | None) -> None:
        """A step is over; `answer` is the reply's next token, or the logits float32 `[vocab]` that
        choose it."""
        if answer is None or not self._answers.popleft():
            return
        turn = self._current
        if isinstance(answer, int):
            token = answer
            self._sampler.accept()
        else:
            self._take_guess_back()
            seen = self._seen_tokens()
            token = self._sampler.sample(answer, seen.mask if seen else None)
        now = time.monotonic()
        turn.sampled.append(token)
        turn.token_times.append(now)
        if token in self._protocol.stop_tokens:
            self._take_guess_back()
            self._finish_reply(unfed=0)
            return
        if self._seen is not None:
            self._seen.add([token])
        if not self._reply_writer.push(token):
            self._pass_over_next_answer()
        if len(turn.sampled) == self._most_reply_tokens:
            self._finish_reply(unfed=1)
            return
        text = turn.new_text()
        if text:
            self._events.put(turn.words_event(turn.kind, text, now))

    # The end.

    def fail(self, sentence: str) -> None:
        """End with an error event."""
        if self.ended:
            return
        self._events.put(self._builder.error(self._turn, sentence))
        self.end(f"The session ended with an error: {sentence}")

    def end(self, reason: str) -> None:
        """Give every page back; input is refused with `reason` from now on."""
        if self.ended:
            return
        self.ended = True
        self._turn = None
        self._source.close(reason)
        self.cache.close()

    def hang_up(self) -> None:
        """No more events come: readers that wait return. The last thing done to a sequence."""
        self._events.end()

    # Details.

    @property
    def _current(self) -> Turn:
        if self._turn is None:
            raise RuntimeError("no turn is under way")
        return self._turn

    @property
    def _reply_writer(self) -> ReplyWriter:
        if self._writer is None:
            raise RuntimeError("no turn is under way")
        return self._writer

    def _take_guess_back(self) -> None:
        if self._reply_writer.take_guess_back():
            self._pass_over_next_answer()

    def _pass_over_next_answer(self) -> None:
        """The guess that the step under way began with was wrong."""
        self._answers[-1] = False

    def _start(self) -> None:
        """Share the prefix; words said before stand in its `previous text`, in rows of their own.

        The prefix's end is shared once they are written, so the context is that of a session which
        said them itself: its end was written before them, too.
        """
        words = self._options.previous_words
        spans = self.prefix.cache.spans
        self.cache.adopt(spans[:-1] if words else spans)
        if words:
            body = text_span(SpanKind.PREVIOUS_TEXT, SpanPart.BODY, PREFIX_TURN, words)
            self.cache.append(body)
            self._restoring = True

    def _end_restoring_if_written(self) -> None:
        if self.cache.unwritten == 0:
            self.cache.adopt(self.prefix.cache.spans[-1:])
            self._restoring = False

    def _seen_tokens(self) -> SeenTokens | None:
        """Which tokens the context holds, if the sampler asks for it."""
        if self._seen is None and self._sampler.needs_seen:
            self._seen = SeenTokens(self._vocabulary)
            for span in self.cache.spans:
                self._seen.add(span.tokens)
        return self._seen

    def _finish_reply(self, *, unfed: int) -> None:
        """Settle the reply's words; `unfed` of its tokens, 0 or the last one, were never fed."""
        turn = self._current
        self._reply_writer.end()
        turn.ending, turn.unfed = True, unfed
        self._end_turn_if_written()

    def _end_turn_if_written(self) -> None:
        """End the turn when rows that were taken back are written again: after the next eviction
        they would see another context."""
        if self.tokens_to_write == 0:
            self._end_turn()

    def _end_turn(self) -> None:
        """Close the reply's spans and send its final event."""
        turn, now = self._current, time.monotonic()
        reply = turn.reply
        self._reply_writer.close(self._protocol.turn_close)
        text = turn.new_text() + turn.detokenizer.finish()
        kind = turn.kind if reply.words else EventKind.SILENCE
        event = turn.words_event(kind, text, now, final=True)
        self._turn, self._decoding, self._seen = None, False, None
        timing = turn.timing()
        self.stats = replace(
            self.stats,
            turns=turn.number + 1,
            context_tokens=self.cache.tokens,
            pages=self.cache.reservation.used,
            last_ttft=timing.ttft,
            last_itl=sum(timing.itl) / len(timing.itl) if timing.itl else None,
            lag=event.lag,
        )
        self._events.put(event)
