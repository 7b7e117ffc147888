"""A session: one live video, one conversation. What a caller holds in hand."""

import math
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Protocol

import numpy as np

from framesink.runtime.arrays import Float32Array, UInt8Array
from framesink.runtime.errors import CapacityError, OptionError, VideoError
from framesink.runtime.event_stream import EventStream
from framesink.runtime.events import Event
from framesink.runtime.load.ladder_control import LadderControl, Treatment
from framesink.runtime.preprocess import (
    Grid,
    PreprocessConfig,
    patchify,
    resize_frames,
    resized_grid,
)
from framesink.runtime.protocol import ChatProtocol
from framesink.runtime.session_input import PreparedChunk, Question, SessionInput
from framesink.runtime.stats import SessionStats
from framesink.runtime.video.chunk import Chunk, stack_frames

# Bytes of a chunk whose frames an executor may be given to resize: two frames of 4K are 50 MB.
LARGEST_HELD = 64 << 20
NO_CONTENT: Float32Array = np.empty((0, 0), dtype=np.float32)


# Far beyond what vision encoders answer, and within the range of float16: rows that are not finite
# would be read, times 0, by whoever has their page next.
LARGEST_EMBEDDING = 16384.0


class Driver(Protocol):
    """What a session asks of its engine. `threaded` says whether the engine works by itself."""

    threaded: bool

    def run_until_idle(self) -> bool:
        """Work in the calling thread until there is nothing to do; whether there was anything."""
        ...

    def retire(self, number: int, *, wait: bool = True) -> None:
        """End a session and free its pages; with `wait` they are free when this returns."""
        ...


class Session:
    """Frames in, events out. Safe to use from any thread; iterate it from one.

    Iterating yields events as they come and ends when, after `finish`, everything is answered, or
    after an error event, or after `close`. On an engine without a thread, pushing and iterating do
    the engine's work, and iterating ends when there is nothing to do without further input.
    """

    def __init__(
        self,
        number: int,
        *,
        driver: Driver,
        source: SessionInput,
        events: EventStream,
        read_stats: Callable[[], SessionStats],
        protocol: ChatProtocol,
        preprocess: PreprocessConfig,
        hidden_size: int,
        chunk_seconds: float,
        max_patches: int,
        takes_frames: bool = False,
        hold_frames: Callable[[UInt8Array], UInt8Array] | None = None,
        takes_embeddings: bool = True,
        ladder: LadderControl | None = None,
    ) -> None:
        """Made by `StreamingEngine.open_session`. `takes_frames` says that the engine wants frames
        of the model's size in place of patches, `takes_embeddings` that it can do with a vision
        encoder's answer. `hold_frames`, if given, keeps frames of any size for it. `ladder` says
        what is left out of chunks when replies are late."""
        self.number = number
        self._driver = driver
        self._source = source
        self._events = events
        self._read_stats = read_stats
        self._protocol = protocol
        self._preprocess = preprocess
        self._hidden_size = hidden_size
        self._chunk_seconds = chunk_seconds
        self._max_patches = max_patches
        self._takes_frames = takes_frames
        self._hold_frames = hold_frames
        self._takes_embeddings = takes_embeddings
        self._ladder = ladder
        self._next_t0 = 0.0

    # In.

    def push(
        self,
        frames: UInt8Array | Sequence[UInt8Array],
        timestamps: Sequence[float] | None = None,
        *,
        t0: float | None = None,
        t1: float | None = None,
        block: bool = True,
        timeout: float | None = None,
    ) -> None:
        """Add one chunk of frames, uint8 RGB `[T, H, W, 3]` or T frames `[H, W, 3]`.

        `t0`, `t1` and `timestamps` are seconds of video time; left out, the chunk follows the one
        before it, lasts the session's chunk length, and its frames are evenly spaced. See
        `push_chunk` for the rest.
        """
        begin = self._next_t0 if t0 is None else t0
        end = begin + self._chunk_seconds if t1 is None else t1
        stacked = stack_frames(frames)
        if timestamps is None:
            timestamps = [begin + (end - begin) * i / len(stacked) for i in range(len(stacked))]
        chunk = Chunk(
            frames=stacked,
            t0=begin,
            t1=end,
            timestamps=tuple(timestamps),
            captured_at=time.monotonic(),
        )
        self.push_chunk(chunk, block=block, timeout=timeout)

    def push_chunk(
        self,
        chunk: Chunk,
        *,
        question: str | None = None,
        block: bool = True,
        timeout: float | None = None,
    ) -> None:
        """Add one chunk, and a question with it; frames become patches in the calling thread.

        A live session that stands on a rung of its ladder leaves frames out or makes them smaller.
        Waits while the session's queue is full, for `timeout` seconds at most. Raises BacklogError
        when there is no room, SessionClosedError when the session takes no more input, VideoError
        for frames or times that make no sense, CapacityError for a chunk larger than the engine
        was built for, and what `ask` raises; the session is then as it was before.
        """
        handed_at = time.monotonic()
        self._source.require_open()
        _require_length(chunk.t0, chunk.t1)
        stacked, preprocess = stack_frames(chunk.frames), self._preprocess
        treatment = None
        if self._ladder is not None:
            treatment = self._ladder.treat(stacked.shape, chunk.timestamps)
            preprocess = treatment.preprocess
            if len(treatment.frames) < len(stacked):
                stacked = stacked[list(treatment.frames)]
        grid = resized_grid(stacked, preprocess)
        self._require_patches(grid, len(stacked))
        content, pixels = NO_CONTENT, None
        if self._takes_frames:
            pixels = self._kept(stacked, preprocess)
        else:
            content, _ = patchify(resize_frames(stacked, preprocess), preprocess)
        prepared = PreparedChunk(
            content=content,
            encoded=False,
            grid=grid,
            t0=chunk.t0,
            t1=chunk.t1,
            frames=len(stacked),
            captured_at=chunk.captured_at,
            handed_at=handed_at,
            dropped=chunk.dropped,
            pixels=pixels,
        )
        self._put(prepared, treatment, question, block, timeout)

    def push_embeddings(
        self,
        embeddings: Float32Array,
        grid: Grid,
        *,
        t0: float,
        t1: float,
        frames: int,
        question: str | None = None,
        captured_at: float | None = None,
        block: bool = True,
        timeout: float | None = None,
    ) -> None:
        """Add one chunk that a vision encoder has been through: float32 `[v, hidden]` of `grid`.

        `t0` and `t1` are seconds of video time, `frames` how many frames the grid was made of,
        `captured_at` is `time.monotonic()` at the arrival of the last of them, by default now.
        Raises what `push_chunk` raises, VideoError also for embeddings that are not of this model
        and grid or not finite, OptionError on an engine whose executor takes frames alone.
        """
        handed_at = time.monotonic()
        if not self._takes_embeddings:
            raise OptionError(
                "This engine's executor runs the vision encoder itself and takes no embeddings; "
                "push frames."
            )
        self._source.require_open()
        _require_length(t0, t1)
        steps = -(-frames // self._preprocess.temporal_patch_size)
        merge = self._preprocess.merge_size
        if min(grid.t, grid.h, grid.w) < 1 or grid.t != steps or grid.h % merge or grid.w % merge:
            raise VideoError(
                f"A grid of {grid.t}×{grid.h}×{grid.w} patches cannot be made of {frames} frames; "
                "give the grid that preprocessing made."
            )
        self._require_patches(grid, frames)
        shape = (grid.tokens(merge), self._hidden_size)
        if embeddings.dtype != np.float32 or embeddings.shape != shape:
            raise VideoError(
                f"Embeddings of this grid must be float32 {list(shape)}, not {embeddings.dtype} "
                f"{list(embeddings.shape)}."
            )
        if not np.abs(embeddings).max() <= LARGEST_EMBEDDING:  # nor is NaN
            raise VideoError(
                f"The embeddings hold numbers that are not finite, or beyond {LARGEST_EMBEDDING:g},"
                " which no vision encoder makes."
            )
        prepared = PreparedChunk(
            content=embeddings,
            encoded=True,
            grid=grid,
            t0=t0,
            t1=t1,
            frames=frames,
            captured_at=handed_at if captured_at is None else captured_at,
            handed_at=handed_at,
            dropped=0,
        )
        treatment = None if self._ladder is None else self._ladder.treat_encoded(grid, frames)
        self._put(prepared, treatment, question, block, timeout)

    def ask(self, text: str) -> None:
        """Ask a question: it joins the next chunk, and that turn's events are of kind `answer`.

        Each turn takes one question. Raises CapacityError for one longer than the context has room
        for, BusyError while earlier ones leave it no room, SessionClosedError when the session
        takes no more input.
        """
        self._source.put_question(self._question(text))

    def finish(self) -> None:
        """Say that no more input comes. What waits is still answered, a question without a chunk in
        a turn without vision; then iteration ends and the session's pages are free."""
        self._source.finish()

    def close(self, *, wait: bool = True) -> None:
        """End at once: drop what waits and free the session's pages. May be called again.

        The pages are free when this returns or, without `wait`, when iteration ends.
        """
        self._driver.retire(self.number, wait=wait)

    # Out.

    def __iter__(self) -> Iterator[Event]:
        while True:
            event = self._events.poll()
            if event is not None:
                yield event
            elif self._events.ended:
                return
            elif self._driver.threaded:
                self._events.wait()
            elif not self._driver.run_until_idle():
                return

    async def __aiter__(self) -> AsyncIterator[Event]:
        while True:
            event = self._events.poll()
            if event is not None:
                yield event
            elif self._events.ended:
                return
            elif self._driver.threaded:
                await self._events.wait_async()
            elif not self._driver.run_until_idle():
                return

    def stats(self) -> SessionStats:
        """Figures as of the last turn."""
        return self._read_stats()

    # Details.

    def _question(self, text: str) -> Question:
        return Question(text, tuple(self._protocol.question(text)), time.monotonic())

    def _kept(self, frames: UInt8Array, preprocess: PreprocessConfig) -> UInt8Array:
        """A copy for the engine, as the caller may use the array again."""
        if self._hold_frames is None:
            return resize_frames(frames, preprocess).copy()
        if frames.nbytes > LARGEST_HELD:
            frames = resize_frames(frames, preprocess)
        return self._hold_frames(frames)

    def _require_patches(self, grid: Grid, frames: int) -> None:
        if grid.patches > self._max_patches:
            raise CapacityError(
                f"A chunk of {frames} frames makes {grid.patches} patches, but this "
                f"session takes at most {self._max_patches}; push fewer or smaller frames."
            )

    def _put(
        self,
        chunk: PreparedChunk,
        treatment: Treatment | None,
        question: str | None,
        block: bool,
        timeout: float | None,
    ) -> None:
        if treatment is not None:
            chunk = replace(chunk, reply_tokens=treatment.reply_tokens, notice=treatment.notice)
        asked = None if question is None else self._question(question)
        if not self._driver.threaded:
            block = False
            if self._source.full:
                self._driver.run_until_idle()
        self._source.put_chunk(chunk, asked, block=block, timeout=timeout)
        self._next_t0 = chunk.t1
        if self._ladder is not None and treatment is not None:
            self._ladder.handed_over(treatment)

    def __enter__(self) -> "Session":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _require_length(t0: float, t1: float) -> None:
    """Raise VideoError unless a chunk's times are finite and the second is the later one."""
    if not (math.isfinite(t0) and math.isfinite(t1)):
        raise VideoError(f"A chunk from {t0} s to {t1} s is not in time; give finite seconds.")
    if t1 <= t0:
        raise VideoError(f"A chunk from {t0:g} s to {t1:g} s has no length; t1 must be later.")
