"""Shared prefixes: a system prompt and a pinned query are computed once for all who begin alike."""

import threading
from collections.abc import Sequence

from framesink.runtime.arrays import Float32Array
from framesink.runtime.executors.base import SequenceInput
from framesink.runtime.kv.page_pool import PagePool
from framesink.runtime.kv.positions import text_span
from framesink.runtime.kv.sequence_cache import SequenceCache
from framesink.runtime.kv.span import PREFIX_TURN, Span, SpanKind, SpanPart
from framesink.runtime.protocol import ChatProtocol


def prefix_spans(protocol: ChatProtocol, query: str | None) -> list[Span]:
    """What precedes all turns: the system turn, the pinned query, an empty `previous text`."""
    pieces = [(SpanKind.SYSTEM, SpanPart.BODY, protocol.system)]
    if query is not None:
        pieces.append((SpanKind.PINNED, SpanPart.BODY, protocol.pinned(query)))
    pieces.append((SpanKind.PREVIOUS_TEXT, SpanPart.OPEN, protocol.previous_text_open))
    pieces.append((SpanKind.PREVIOUS_TEXT, SpanPart.CLOSE, protocol.turn_close))
    return [text_span(kind, part, PREFIX_TURN, tokens) for kind, part, tokens in pieces]


class Prefix:
    """One shared prefix: written once, never appended to, freed when nobody uses it."""

    def __init__(self, number: int, key: tuple[int, ...], cache: SequenceCache) -> None:
        """`number` identifies it to the scheduler, `key` are its token ids."""
        self.number = number
        self.key = key
        self.cache = cache
        self.users = 0

    @property
    def ready(self) -> bool:
        """Whether all of it is written."""
        return self.cache.unwritten == 0

    @property
    def ended(self) -> bool:
        """Whether nobody uses it any more."""
        return self.users == 0

    def next_input(self, count: int) -> SequenceInput:
        """The next `count` tokens to write."""
        rows = self.cache.prepare(count)
        return SequenceInput(
            token_ids=rows.token_ids,
            vision_embeddings=None,
            positions=rows.positions,
            slots=rows.slots,
            context=rows.context,
            needs_logits=False,
            bases=rows.bases,
        )

    def launched(self) -> None:
        """The step is under way: for every later one its tokens are written."""
        self.cache.commit()

    def step_done(self, answer: Float32Array | int | None) -> None:
        """The step is over; no logits were asked for."""
        assert answer is None


class PrefixCache:
    """The prefixes in use, by their tokens. Safe from any thread."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._prefixes: dict[tuple[int, ...], Prefix] = {}
        self._numbers = 0
        self._lock = threading.Lock()

    def acquire(self, spans: Sequence[Span]) -> Prefix:
        """The prefix of these spans, made if there is none, with one more user.

        Raises CapacityError when the pool has no room for it.
        """
        key = tuple(int(token) for span in spans for token in span.tokens)
        with self._lock:
            prefix = self._prefixes.get(key)
            if prefix is None:
                pages = prefix_pages(spans, self._pool.page_size)
                reservation = self._pool.reserve(pages, "The shared prefix")
                cache = SequenceCache(self._pool, reservation)
                for span in spans:
                    cache.append(span)
                self._numbers -= 1
                prefix = self._prefixes[key] = Prefix(self._numbers, key, cache)
            prefix.users += 1
            return prefix

    def release(self, prefix: Prefix) -> None:
        """One user less; the last one frees the prefix's pages (engine's thread)."""
        with self._lock:
            prefix.users -= 1
            if prefix.users == 0:
                if self._prefixes.get(prefix.key) is prefix:
                    del self._prefixes[prefix.key]
                prefix.cache.close()

    def discard(self, prefix: Prefix) -> None:
        """Give the prefix to nobody new: writing it failed."""
        with self._lock:
            if self._prefixes.get(prefix.key) is prefix:
                del self._prefixes[prefix.key]


def prefix_pages(spans: Sequence[Span], page_size: int) -> int:
    """Pages a prefix takes; its last page is never shared with anything else."""
    return -(-sum(len(span) for span in spans) // page_size)
