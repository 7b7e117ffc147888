"""The K/V bookkeeping of one sequence: its spans, its lanes, and the context read from them."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from framesink.runtime.arrays import Int32Array
from framesink.runtime.executors.base import ContextView
from framesink.runtime.kv.context import Context
from framesink.runtime.kv.lane import Lane, LaneName, lane_of
from framesink.runtime.kv.page_pool import PagePool, Reservation
from framesink.runtime.kv.positions import span_bases
from framesink.runtime.kv.span import NO_SLOTS, Span


@dataclass(frozen=True, slots=True, eq=False)
class NewRows:
    """Tokens about to be written: ids int32 `[s]`, positions int32 `[3, s]`, bases and slots int32
    `[s]`, and the context before them."""

    token_ids: Int32Array
    positions: Int32Array
    bases: Int32Array
    slots: Int32Array
    context: ContextView


class SequenceCache:
    """An ordered list of spans over a page pool.

    Tokens without rows stand only at the end of the list. `prepare` gives the next of them slots,
    `commit` makes those rows part of the context once the executor is writing them. Used from the
    engine's thread alone.
    """

    def __init__(self, pool: PagePool, reservation: Reservation) -> None:
        self._pool = pool
        self._reservation = reservation
        self._lanes = {name: Lane(pool, reservation) for name in LaneName}
        self._context = Context(pool.page_size)
        self._spans: list[Span] = []
        self._bases: list[int] = []
        self._following = 0
        self._tokens = 0
        self._prepared: NewRows | None = None

    @property
    def spans(self) -> tuple[Span, ...]:
        """The spans, in logical order."""
        return tuple(self._spans)

    @property
    def tokens(self) -> int:
        """Number of tokens, written or not."""
        return self._tokens

    @property
    def unwritten(self) -> int:
        """Number of tokens without a K/V row."""
        return sum(span.unwritten for span in self._unwritten_spans())

    @property
    def reservation(self) -> Reservation:
        """The pages this sequence may take, and has taken; shared pages are not among them."""
        return self._reservation

    def adopt(self, spans: Sequence[Span]) -> None:
        """Add written spans of another sequence to the end; their rows are shared from now on."""
        if self.unwritten:
            raise RuntimeError("written spans cannot follow tokens that are not written")
        for span in spans:
            self._pool.retain(span.slots)
        self._set([*self._spans, *spans])

    def append(self, span: Span) -> None:
        """Add a span without rows to the end of the list.

        Its places become the positions it has now, so that the spans of a turn share one base until
        something before or between them leaves: attention reads rows of one base together.
        """
        span = span.moved_places(self._following - span.start_place)
        self._spans.append(span)
        self._bases.append(0)
        self._following += span.advance
        self._tokens += len(span)

    def extend_last(self, tokens: Sequence[int]) -> None:
        """Add unwritten tokens to the end of the last span, which must be text."""
        before = self._spans[-1]
        self._spans[-1] = before.with_tokens(np.asarray(tokens, dtype=np.int32))
        self._following += len(tokens)
        self._tokens += len(tokens)

    def take_back_last(self) -> Span:
        """Remove the last span; its rows, the newest of their lane, are given back."""
        span = self._spans.pop()
        self._bases.pop()
        self._following -= span.advance
        self._tokens -= len(span)
        self._context.forget(span.slots)
        self._lanes[lane_of(span)].take_back(span.slots)
        return span

    def take_back_token(self) -> None:
        """Remove the last token, of a text span; its row, the newest of its lane, is given back."""
        span = self._spans[-1]
        if len(span) == 1:
            self.take_back_last()
            return
        left = span.cut(0, len(span) - 1)
        gone = span.slots[left.slots.size :]
        self._spans[-1] = left
        self._following -= 1
        self._tokens -= 1
        self._context.forget(gone)
        self._lanes[lane_of(span)].take_back(gone)

    def name_last(self, token: int) -> None:
        """Say which token the last one is, that was appended before it was known."""
        self._spans[-1] = self._spans[-1].with_last_token(token)

    def replace(self, spans: Sequence[Span]) -> int:
        """Make `spans`, chosen from the present ones by a policy, the new list.

        Rows of spans that are gone are released. Returns how many tokens left.
        """
        before = self.tokens
        kept = {id(span) for span in spans}
        present = {id(span) for span in self._spans}
        # In one go each: a turn moves dozens of spans.
        self._pool.retain(_slots_of(span for span in spans if id(span) not in present))
        self._pool.release(_slots_of(span for span in self._spans if id(span) not in kept))
        self._set(spans)
        return before - self.tokens

    def prepare(self, count: int) -> NewRows:
        """Give slots to the next `count` unwritten tokens.

        Raises CapacityError when the reservation is spent; the sequence can then only be closed.
        """
        if self._prepared is not None:
            raise RuntimeError("the rows prepared before were not written")
        tokens, positions, bases, slots = [], [], [], []
        first = len(self._spans) - sum(1 for _ in self._unwritten_spans())
        left = count
        for index in range(first, len(self._spans)):
            span, base = self._spans[index], self._bases[index]
            begin = span.slots.size
            taken = min(left, span.unwritten)
            new_slots = self._lanes[lane_of(span)].take(taken)
            self._spans[index] = span.with_slots(new_slots)
            tokens.append(span.tokens[begin : begin + taken])
            positions.append(span.places[:, begin : begin + taken] + np.int32(base))
            bases.append(np.full(taken, base, dtype=np.int32))
            slots.append(new_slots)
            left -= taken
            if left == 0:
                break
        if left:
            raise RuntimeError(f"{count} tokens were asked for, {count - left} are unwritten")
        self._prepared = NewRows(
            token_ids=np.concatenate(tokens),
            positions=np.concatenate(positions, axis=1),
            bases=np.concatenate(bases),
            slots=np.concatenate(slots),
            context=self._context.view(),
        )
        return self._prepared

    def commit(self) -> None:
        """The rows last prepared are being written: tokens of later steps may read them."""
        if self._prepared is None:
            raise RuntimeError("nothing was prepared")
        rows, self._prepared = self._prepared, None
        self._context.append(rows.slots, rows.positions, rows.bases)

    def close(self) -> None:
        """Give every page back and end the reservation."""
        for lane in self._lanes.values():
            lane.close()
        for span in self._spans:
            self._pool.release(span.slots)
        self._set([])
        self._pool.cancel(self._reservation)

    def _unwritten_spans(self) -> Iterator[Span]:
        for span in reversed(self._spans):
            if not span.unwritten:
                return
            yield span

    def _set(self, spans: Sequence[Span]) -> None:
        self._spans = list(spans)
        bases, self._following = span_bases(self._spans)
        self._bases = bases.tolist()
        slots = [span.slots for span in self._spans]
        places = [span.places for span in self._spans]
        lengths = [rows.size for rows in slots]
        unwritten = list(self._unwritten_spans())
        for index, span in enumerate(reversed(unwritten), len(places) - len(unwritten)):
            places[index] = span.places[:, : span.slots.size]
        self._tokens = sum(lengths) + sum(span.unwritten for span in unwritten)
        row_bases = np.repeat(bases, lengths)
        positions = np.concatenate([np.empty((3, 0), dtype=np.int32), *places], axis=1)
        positions += row_bases
        self._context.rebuild(np.concatenate([NO_SLOTS, *slots]), positions, row_bases)


def _slots_of(spans: Iterable[Span]) -> Int32Array:
    return np.concatenate([NO_SLOTS, *(span.slots for span in spans)])
