"""What a policy is, and the worst case it has to be told to say how much it can need."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from framesink.runtime.errors import OptionError
from framesink.runtime.kv.span import PREFIX_TURN, Span, SpanKind, SpanPart

MIN_TURNS = 2


@dataclass(frozen=True, slots=True)
class TurnProfile:
    """The largest turns a session may have.

    `chunk_seconds` is the video time of one chunk. Per turn: `vision_rows` of the vision block,
    `frame_rows` of what wraps the turn (headers, time, closing), `reply_rows` of words.
    `question_rows` is how many rows of questions may be in the context at once. `context_pages` is
    how many pages, beyond the shared prefix, the executor can read for one session; `page_size` is
    their rows.
    """

    chunk_seconds: float
    vision_rows: int
    frame_rows: int
    reply_rows: int
    question_rows: int
    context_pages: int
    page_size: int


class Policy(Protocol):
    """Which spans stay. Pure: it holds settings and no state."""

    def select(self, spans: Sequence[Span], turn: int, profile: TurnProfile) -> list[Span]:
        """The spans to keep, in order, when `turn` is about to begin.

        Spans kept as they are must be the same objects. Only a reply's words may move, and only
        text may be cut. Raises CapacityError if the policy cannot make room for the turn.
        """
        ...

    def max_rows(self, profile: TurnProfile) -> int:
        """Most rows a session of such turns holds beyond the shared prefix.

        Raises OptionError if the settings do not fit the length of a chunk.
        """
        ...

    def max_pages(self, profile: TurnProfile) -> int:
        """Most pages those rows can touch."""
        ...


def turns_in(seconds: float, profile: TurnProfile) -> int:
    """Whole chunks in a window of `seconds`."""
    return math.floor(seconds / profile.chunk_seconds + 1e-6)


def require_turns(turns: int, least: int, setting: str) -> int:
    """`turns`, if it is at least `least`. Raises OptionError naming the setting otherwise."""
    if turns < least:
        raise OptionError(
            f"{setting} keeps {turns} turns, but a session needs at least {least}; make it larger."
        )
    return turns


def is_prefix(span: Span) -> bool:
    """Whether a span precedes all turns and is not a word that left the window."""
    return span.turn == PREFIX_TURN and not is_previous_words(span)


def is_previous_words(span: Span) -> bool:
    """Whether a span is part of the body of `previous text`."""
    return span.kind is SpanKind.PREVIOUS_TEXT and span.part is SpanPart.BODY
