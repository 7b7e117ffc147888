"""One turn of a session: what it is about, how far it is, when its tokens came."""

from dataclasses import dataclass, field, replace
from itertools import pairwise

from framesink.runtime.arrays import Float32Array
from framesink.runtime.detokenizer import Detokenizer
from framesink.runtime.events import Event, EventKind, ReplyTiming
from framesink.runtime.reply import Reply
from framesink.runtime.session_input import PreparedChunk


@dataclass(slots=True)
class Turn:
    """A turn under way.

    `t0`, `t1` are seconds of video time, `captured_at`, `handed_at` and `deadline` are
    `time.monotonic()` values. `chunk` is there until it is encoded; `embeddings` float32
    `[v, hidden]` are those not yet handed to a step. `ending` is set when the last token has been
    sampled; `unfed` tokens of it are left to the next turn's prompt. `unsent` are the words whose
    text no event has carried yet. `reply_tokens` bounds the reply more than the session does.
    """

    number: int
    t0: float
    t1: float
    captured_at: float
    handed_at: float
    deadline: float
    question: str | None
    chunk: PreparedChunk | None
    reply: Reply
    detokenizer: Detokenizer
    embeddings: Float32Array | None = None
    sampled: list[int] = field(default_factory=list)
    token_times: list[float] = field(default_factory=list)
    spoken: int = 0
    unsent: list[int] = field(default_factory=list)
    ending: bool = False
    unfed: int = 0
    reply_tokens: int | None = None

    @property
    def kind(self) -> EventKind:
        """What its reply is, if it has words."""
        return EventKind.COMMENTARY if self.question is None else EventKind.ANSWER

    def take_embeddings(self, count: int) -> Float32Array | None:
        """The next `count` embeddings, None for none."""
        if count == 0 or self.embeddings is None:
            return None
        taken, self.embeddings = self.embeddings[:count], self.embeddings[count:]
        return taken

    def new_text(self) -> str:
        """Text of the words that have become certain since the last call."""
        words = self.reply.tokens[self.spoken : self.reply.words]
        self.spoken = self.reply.words
        self.unsent += words
        return self.detokenizer.push(words)

    def timing(self) -> ReplyTiming:
        """How long the reply took so far; it has at least one token."""
        times = self.token_times
        return ReplyTiming(
            ttft=times[0] - self.handed_at,
            itl=tuple(after - before for before, after in pairwise(times)),
            total=times[-1] - self.handed_at,
        )

    def words_event(self, kind: EventKind, text: str, now: float, *, final: bool = False) -> Event:
        """An event with the text of the words that are unsent."""
        words, self.unsent = tuple(self.unsent), []
        return replace(self.event(kind, text, now, final=final), words=words)

    def event(self, kind: EventKind, text: str, now: float, *, final: bool = False) -> Event:
        """An event about this turn; final events of a reply carry its tokens and timing."""
        ended = final and bool(self.token_times)
        return Event(
            kind=kind,
            text=text,
            t0=self.t0,
            t1=self.t1,
            turn=self.number,
            lag=now - self.captured_at,
            final=final,
            question=self.question,
            tokens=tuple(self.sampled) if ended else (),
            timing=self.timing() if ended else None,
        )
