"""What a session says: text as it comes, silence, and what went wrong."""

from dataclasses import dataclass
from enum import StrEnum


class EventKind(StrEnum):
    """What an event is about."""

    COMMENTARY = "commentary"
    ANSWER = "answer"
    SILENCE = "silence"
    DEGRADED = "degraded"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class ReplyTiming:
    """How long one reply took, in seconds of wall time.

    `ttft` is from the chunk being handed to the session to its first token; `itl` are the gaps
    between the following tokens; `total` ends at the last token.
    """

    ttft: float
    itl: tuple[float, ...]
    total: float


@dataclass(frozen=True, slots=True)
class Event:
    """One piece of a session's output.

    A reply is a run of events of one `turn`, the last with `final=True`. `text` is the new piece
    only, never a broken UTF-8 character, without the closing ` ...`. `words` are the token ids it
    is made of: a detokenizer that is given those of a reply's events, in order, gives the same
    pieces. `t0` and `t1` are the span of video time (seconds) the reply is about, `lag` is now
    minus the end of the chunk being answered (seconds of wall time). `tokens` are all sampled token
    ids of the reply, its closing and stop token among them (final events only), `timing` likewise.
    A silent turn is one final event of kind `silence` with empty text. A `degraded` event says in
    `text` why less is seen or said than asked for, or that all is again; it comes before its turn's
    reply and is not final, unless a client of a server gets no whole reply to a chunk: then it
    takes its place. A final event of kind `error` carries its sentence in `text` and is the
    session's last.
    """

    kind: EventKind
    text: str
    t0: float
    t1: float
    turn: int
    lag: float
    final: bool
    question: str | None = None
    tokens: tuple[int, ...] = ()
    timing: ReplyTiming | None = None
    words: tuple[int, ...] = ()
