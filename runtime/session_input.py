"""A session's way in: chunks and questions from any thread to the engine's."""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from framesink.runtime.arrays import Float32Array, UInt8Array
from framesink.runtime.errors import BacklogError, BusyError, CapacityError, SessionClosedError
from framesink.runtime.preprocess import Grid


@dataclass(frozen=True, slots=True, eq=False)
class PreparedChunk:
    """A chunk ready for the vision encoder, or one that has been through it.

    `content` float32 are the patches `[n, patch_dim]` of `grid` or, if `encoded`, the embeddings
    `[n / merge², hidden]` made of them; an executor that takes frames gets `pixels` uint8
    `[T, H, W, 3]` instead, of the model's size unless it resizes them itself, and `content` is
    empty. They cover video time
    `[t0, t1)` seconds in `frames` frames. `captured_at` and `handed_at` are `time.monotonic()` when
    its last frame arrived and when it was pushed. `dropped` frames are missing from it. The reply
    to it has at most `reply_tokens` tokens, by default as many as the session's may have. `notice`
    is a sentence about how it was treated, if that is news.
    """

    content: Float32Array
    encoded: bool
    grid: Grid
    t0: float
    t1: float
    frames: int
    captured_at: float
    handed_at: float
    dropped: int
    pixels: UInt8Array | None = None
    reply_tokens: int | None = None
    notice: str | None = None


@dataclass(frozen=True, slots=True)
class Question:
    """A question as asked, its token ids, and `time.monotonic()` when it was asked."""

    text: str
    tokens: tuple[int, ...]
    asked_at: float


@dataclass(frozen=True, slots=True, eq=False)
class TurnInput:
    """What a turn is made of; one of both is there."""

    chunk: PreparedChunk | None
    question: Question | None


class SessionInput:
    """A bounded queue of chunks, the questions that wait, and whether more may come."""

    def __init__(
        self, max_chunks: int, max_question_tokens: int, *, wake: Callable[[], None]
    ) -> None:
        """`wake` is called after every change that gives the engine something to do."""
        self._max_chunks = max_chunks
        self._max_question_tokens = max_question_tokens
        self._wake = wake
        self._chunks: deque[PreparedChunk] = deque()
        self._questions: deque[Question] = deque()
        self._context_question_tokens = 0
        self._refusal: str | None = None
        self._closed = False
        self._changed = threading.Condition()

    @property
    def full(self) -> bool:
        """Whether the queue has no room for a chunk."""
        with self._changed:
            return len(self._chunks) >= self._max_chunks

    def require_open(self) -> None:
        """Raise SessionClosedError, saying why, if nothing more may be put in."""
        with self._changed:
            self._require_open()

    def put_chunk(
        self,
        chunk: PreparedChunk,
        question: Question | None = None,
        *,
        block: bool = True,
        timeout: float | None = None,
    ) -> None:
        """Queue a chunk, and a question with it; both or neither.

        Raises BacklogError if there is no room now (`block` False) or within `timeout` seconds,
        SessionClosedError if the session takes no more input, and what `put_question` raises.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            self._await_room(block, deadline)
            if question is not None:
                self._append_question(question)
            self._chunks.append(chunk)
        self._wake()

    def put_question(self, question: Question) -> None:
        """Queue a question for the next turn that has none.

        Raises CapacityError if it is longer than the context has room for, BusyError if it is so
        together with those waiting and those still in the context.
        """
        with self._changed:
            self._require_open()
            self._append_question(question)
        self._wake()

    def finish(self) -> None:
        """Nothing more will be put in."""
        with self._changed:
            if self._refusal is None:
                self._refusal = "The session was finished and takes no more input; open another."
            self._changed.notify_all()
        self._wake()

    def close(self, reason: str) -> None:
        """Drop what waits and refuse everything from now on, saying `reason`."""
        with self._changed:
            self._chunks.clear()
            self._questions.clear()
            if not self._closed:
                self._refusal = reason
            self._closed = True
            self._changed.notify_all()

    def take(self) -> TurnInput | None:
        """Input of the next turn: a chunk with at most one question, or, once no chunk can come any
        more, a question alone. None if there is nothing to do."""
        with self._changed:
            chunk = self._chunks.popleft() if self._chunks else None
            if chunk is None and self._refusal is None:
                return None
            question = self._questions.popleft() if self._questions else None
            if question is not None:
                self._context_question_tokens += len(question.tokens)
            self._changed.notify_all()
        return TurnInput(chunk, question) if chunk or question else None

    @property
    def ready(self) -> bool:
        """Whether `take` would return something."""
        with self._changed:
            return bool(self._chunks) or (self._refusal is not None and bool(self._questions))

    @property
    def exhausted(self) -> bool:
        """Whether nothing waits and nothing more may come."""
        with self._changed:
            return self._refusal is not None and not self._chunks and not self._questions

    def set_context_questions(self, tokens: int) -> None:
        """Tell how many tokens of questions the context holds."""
        with self._changed:
            self._context_question_tokens = tokens

    def _append_question(self, question: Question) -> None:
        count, most = len(question.tokens), self._max_question_tokens
        if count > most:
            raise CapacityError(
                f"The question has {count} tokens, but the context has room for {most}; "
                "ask it in fewer words."
            )
        live = self._context_question_tokens + sum(len(q.tokens) for q in self._questions)
        if live + count > most:
            raise BusyError(
                f"Earlier questions still take {live} of the {most} tokens the context has "
                f"for questions, and this one has {count}; ask again later."
            )
        self._questions.append(question)

    def _await_room(self, block: bool, deadline: float | None) -> None:
        self._require_open()
        while len(self._chunks) >= self._max_chunks:
            left = None if deadline is None else deadline - time.monotonic()
            if not block or (left is not None and left <= 0):
                raise BacklogError(
                    f"{len(self._chunks)} chunks of this session wait already, the most it "
                    "queues; push more slowly, or let the capture drop frames."
                )
            self._changed.wait(left)
            self._require_open()

    def _require_open(self) -> None:
        if self._refusal is not None:
            raise SessionClosedError(self._refusal)
