"""Spans: runs of tokens that live and die together.

A session's context is an ordered list of spans. Evicting, moving and cutting make new spans out of
old ones; the K/V rows behind them (their slots) stay where they were written.
"""

from dataclasses import dataclass, field, replace
from enum import StrEnum

import numpy as np

from framesink.runtime.arrays import Int32Array

PREFIX_TURN = -1
NO_SLOTS: Int32Array = np.empty(0, dtype=np.int32)


class SpanKind(StrEnum):
    """What a span is to the conversation."""

    SYSTEM = "system"
    PINNED = "pinned"
    PREVIOUS_TEXT = "previous_text"
    USER = "user"
    VISION = "vision"
    QUESTION = "question"
    REPLY = "reply"


class SpanPart(StrEnum):
    """Which part of its kind a span is."""

    OPEN = "open"
    TIME = "time"
    BODY = "body"
    CLOSE = "close"


@dataclass(frozen=True, slots=True, eq=False)
class Span:
    """One immutable run of tokens.

    `tokens` int32 `[n]`. `places` int32 `[3, n]`: where each token stands on the M-RoPE axes
    (t, h, w), counted from anywhere; once its row is written a place never changes. `start_place`
    is that of the first token, `end_place` the one the next span's first token continues from.
    `slots` int32 `[m]`, m ≤ n: where the K/V rows of the first m tokens lie; the others are not
    written yet. `turn` is the turn the span belongs to, PREFIX_TURN (-1) for what precedes all
    turns. `t0` and `t1` are the seconds of video time it is about.
    """

    kind: SpanKind
    part: SpanPart
    turn: int
    tokens: Int32Array
    places: Int32Array
    slots: Int32Array
    end_place: int
    t0: float = 0.0
    t1: float = 0.0
    # Every turn asks every span of a context.
    start_place: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "start_place", int(self.places[0, 0]))

    def __len__(self) -> int:
        return self.tokens.size

    @property
    def advance(self) -> int:
        """How far the span moves the position of what follows it."""
        return self.end_place - self.start_place

    @property
    def unwritten(self) -> int:
        """Number of tokens at its end that have no K/V row yet."""
        return self.tokens.size - self.slots.size

    def moved_places(self, offset: int) -> "Span":
        """An unwritten span whose places are counted from `offset` places before."""
        if self.slots.size:
            raise ValueError("the places of written rows never change")
        return replace(
            self, places=self.places + np.int32(offset), end_place=self.end_place + offset
        )

    def with_slots(self, slots: Int32Array) -> "Span":
        """The same span with the next `len(slots)` tokens written."""
        return replace(self, slots=np.concatenate([self.slots, slots]))

    def with_tokens(self, tokens: Int32Array) -> "Span":
        """A text span with unwritten tokens added to its end."""
        self._require_text("extended")
        added = np.arange(self.end_place, self.end_place + tokens.size, dtype=np.int32)
        return replace(
            self,
            tokens=np.concatenate([self.tokens, tokens]),
            places=np.concatenate([self.places, np.tile(added, (3, 1))], axis=1),
            end_place=self.end_place + tokens.size,
        )

    def with_last_token(self, token: int) -> "Span":
        """A text span whose last token is known now."""
        self._require_text("renamed")
        tokens = self.tokens.copy()
        tokens[-1] = token
        return replace(self, tokens=tokens)

    def cut(self, start: int, stop: int) -> "Span":
        """Tokens `[start, stop)` of a text span, at the places and slots they have.

        Raises ValueError for an empty range and for a vision span, whose places do not count up.
        """
        self._require_text("cut")
        if not 0 <= start < stop <= len(self):
            raise ValueError(f"cannot cut [{start}, {stop}) out of a span of {len(self)} tokens")
        places = self.places[:, start:stop]
        return replace(
            self,
            tokens=self.tokens[start:stop],
            places=places,
            slots=self.slots[start:stop],
            end_place=int(places[0, -1]) + 1,
        )

    def moved(self, kind: SpanKind, part: SpanPart, turn: int) -> "Span":
        """The same rows in another role."""
        return replace(self, kind=kind, part=part, turn=turn)

    def _require_text(self, verb: str) -> None:
        if self.kind is SpanKind.VISION:
            raise ValueError(f"a vision span cannot be {verb}: it lives and dies whole")
