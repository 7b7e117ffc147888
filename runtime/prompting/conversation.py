"""The engine's side of a session over whole prompts: turn after turn, spans without K/V rows.

All of it runs in the engine's thread.
"""

import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace

from framesink.runtime.errors import CapacityError
from framesink.runtime.event_stream import EventStream
from framesink.runtime.events import EventKind
from framesink.runtime.kv.positions import text_span
from framesink.runtime.kv.span import PREFIX_TURN, Span, SpanKind, SpanPart
from framesink.runtime.manifest import Limits
from framesink.runtime.models.config import ModelConfig
from framesink.runtime.observer import EngineObserver
from framesink.runtime.prompting.executor import PromptSettings, ReplyRequest
from framesink.runtime.prompting.prompt import Prompt, PromptWriter, Video, common_prefix
from framesink.runtime.prompting.trimming import trim
from framesink.runtime.protocol import ChatProtocol
from framesink.runtime.sampler import SamplingParams
from framesink.runtime.session_input import PreparedChunk, SessionInput
from framesink.runtime.session_plan import SessionPlan
from framesink.runtime.stats import SessionStats
from framesink.runtime.turn import Turn
from framesink.runtime.turn_builder import TurnBuilder

_SEEDS = 2**31


class Conversation:
    """The state machine of one session: waiting for input; then a turn, from its prompt to the end
    of its reply."""

    def __init__(
        self,
        number: int,
        *,
        plan: SessionPlan,
        sampling: SamplingParams,
        settings: PromptSettings,
        model: ModelConfig,
        protocol: ChatProtocol,
        limits: Limits,
        writer: PromptWriter,
        source: SessionInput,
        events: EventStream,
        observer: EngineObserver,
    ) -> None:
        self.number = number
        self.stats = SessionStats()
        self.ended = False
        self._plan = plan
        # Without a seed of its own a session would draw the same numbers as every other.
        self._seed = secrets.randbelow(_SEEDS) if sampling.seed is None else sampling.seed
        self._sampling = sampling
        self._settings = settings
        self._protocol = protocol
        self._most_tokens = limits.max_context - plan.max_new_tokens
        self._writer = writer
        self._source = source
        self._events = events
        self._observer = observer
        self._session = secrets.token_hex(16)
        self._builder = TurnBuilder(
            model,
            protocol,
            chunk_seconds=plan.profile.chunk_seconds,
            first_query=plan.first_query,
        )
        self._spans = _first_spans(plan)
        self._videos: dict[int, Video] = {}
        self._turn: Turn | None = None
        self._prompt: Prompt | None = None
        self._said: tuple[int, ...] = ()

    # What the worker asks.

    @property
    def done(self) -> bool:
        """Whether everything that was put in has been answered and nothing more may come."""
        return self._turn is None and self._source.exhausted

    # A turn.

    def begin_turn(self) -> ReplyRequest | None:
        """What to generate next; None if there is no input for a turn.

        Raises CapacityError when the policy cannot make room, or the prompt is too long.
        """
        given = self._source.take()
        if given is None:
            return None
        turn = self._turn = self._builder.begin(given)
        notice = self._builder.notice(turn)
        if notice is not None:
            self._events.put(notice)
        before = _tokens(self._spans)
        plan = self._plan
        self._spans = trim(
            plan.policy, self._spans, turn.number, plan.profile, self._settings.trim_turns
        )
        evicted = before - _tokens(self._spans)
        self._spans += self._builder.spans(turn, given)
        self._keep_videos(turn.number, given.chunk)
        self._source.set_context_questions(
            _tokens(span for span in self._spans if span.kind is SpanKind.QUESTION)
        )
        prompt = self._write_prompt()
        dropped = given.chunk.dropped if given.chunk else 0
        self.stats = replace(
            self.stats,
            evicted_tokens=self.stats.evicted_tokens + evicted,
            dropped_frames=self.stats.dropped_frames + dropped,
        )
        self._observer.turn_began(self.number, evicted_tokens=evicted, dropped_frames=dropped)
        return ReplyRequest(
            session=self._session,
            prompt=prompt,
            sampling=replace(self._sampling, seed=(self._seed + turn.number) % _SEEDS),
            max_new_tokens=turn.reply_tokens or plan.max_new_tokens,
            # The others never sample a token that would open something; here it ends the reply.
            stop_tokens=self._protocol.stop_tokens | self._protocol.suppressed_tokens,
        )

    def take(self, tokens: Sequence[int]) -> None:
        """Tokens of the reply, as they come; what follows its stop token is not part of it."""
        turn, now = self._turn, time.monotonic()
        if turn is None:
            return
        ends = self._protocol.stop_tokens | self._protocol.suppressed_tokens
        for token in tokens:
            if turn.ending:
                return
            turn.token_times.append(now)
            turn.sampled.append(token)
            turn.ending = token in ends
            if not turn.ending:
                turn.reply.push(token)
        text = turn.new_text()
        if text:
            self._events.put(turn.words_event(turn.kind, text, now))

    def complete(self) -> None:
        """The reply has ended: settle its spans and send its final event."""
        turn, now = self._turn, time.monotonic()
        assert turn is not None
        if not turn.token_times:
            turn.token_times.append(now)  # a stop token that was not handed out
        reply = turn.reply
        reply.end()
        self._append_reply(turn)
        text = turn.new_text() + turn.detokenizer.finish()
        kind = turn.kind if reply.words else EventKind.SILENCE
        event = turn.words_event(kind, text, now, final=True)
        self._said = tuple(turn.sampled[:-1])  # the last one was never read
        self._turn = None
        timing = turn.timing()
        self.stats = replace(
            self.stats,
            turns=turn.number + 1,
            last_ttft=timing.ttft,
            last_itl=sum(timing.itl) / len(timing.itl) if timing.itl else None,
            lag=event.lag,
        )
        self._events.put(event)

    # The end.

    def fail(self, sentence: str) -> None:
        """End with an error event."""
        if self.ended:
            return
        self._events.put(self._builder.error(self._turn, sentence))
        self.end(f"The session ended with an error: {sentence}")

    def end(self, reason: str) -> None:
        """Let go of everything; input is refused with `reason` from now on."""
        if self.ended:
            return
        self.ended = True
        self._turn = None
        self._prompt = None
        self._source.close(reason)
        self._spans, self._videos = [], {}

    def hang_up(self) -> None:
        """No more events come: readers that wait return. The last thing done to a session."""
        self._events.end()

    # Details.

    def _keep_videos(self, turn: int, chunk: PreparedChunk | None) -> None:
        """Add a chunk's frames, and drop those whose vision span has left."""
        shown = {span.turn for span in self._spans if span.kind is SpanKind.VISION}
        self._videos = {number: self._videos[number] for number in shown & self._videos.keys()}
        if chunk is None:
            return
        assert chunk.pixels is not None
        (span,) = (s for s in self._spans if s.turn == turn and s.kind is SpanKind.VISION)
        fps = chunk.frames / (chunk.t1 - chunk.t0)
        pads = int((span.tokens == self._protocol.video_pad).sum())
        self._videos[turn] = Video(chunk.pixels, fps, pads)

    def _write_prompt(self) -> Prompt:
        prompt = self._writer.write(self._spans, self._videos)
        if prompt.tokens > self._most_tokens:
            raise CapacityError(
                f"The prompt has {prompt.tokens} tokens and the context room for "
                f"{self._most_tokens} beside the reply; use a smaller policy."
            )
        reusable = 0
        if self._prompt is not None:
            pad = self._protocol.video_pad
            reusable = common_prefix(self._prompt, self._said, prompt, pad)
        self._prompt = prompt
        self.stats = replace(self.stats, context_tokens=prompt.tokens, reusable_tokens=reusable)
        return prompt

    def _append_reply(self, turn: Turn) -> None:
        """The reply's words and its closing; special tokens are no words, and cannot be sent."""
        special = self._protocol.tokenizer.special_tokens
        reply = turn.reply
        words = [token for token in reply.tokens[: reply.words] if token not in special]
        if words:
            self._spans.append(text_span(SpanKind.REPLY, SpanPart.BODY, turn.number, words))
        close = [*reply.held, *self._protocol.turn_close]
        self._spans.append(text_span(SpanKind.REPLY, SpanPart.CLOSE, turn.number, close))


def _first_spans(plan: SessionPlan) -> list[Span]:
    """What precedes all turns, with the words said before the session was opened."""
    spans = list(plan.prefix)
    if plan.previous_words:
        words = plan.previous_words
        spans.insert(-1, text_span(SpanKind.PREVIOUS_TEXT, SpanPart.BODY, PREFIX_TURN, words))
    return spans


def _tokens(spans: Iterable[Span]) -> int:
    return sum(len(span) for span in spans)
