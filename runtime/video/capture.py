"""Capture in a thread of its own: read, sample, cut; the model takes chunks when it is ready."""

import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

from framesink.runtime.video.chunk import Chunk
from framesink.runtime.video.cutter import ChunkCutter, Cut, SampledFrame
from framesink.runtime.video.dropping import BACKLOG_CHUNKS, Backlog, DropPolicy, MotionMeter
from framesink.runtime.video.source import VideoSource

_READ_AHEAD_CHUNKS = 2
_JOIN_SECONDS = 15.0


class ChunkStream:
    """Iterates the chunks of a source.

    A live source, or a file with `realtime=True`, runs at its own pace: chunks the model has no
    time for are thinned by `drop_policy` (see `Backlog`). A file with `realtime=False` is read as
    fast as chunks are taken and nothing is dropped. The thread starts with the first `next()` and
    owns the source from then on; `close()` ends both from any state and any thread. An error of
    the source is raised after the last chunk that came before it.
    """

    def __init__(
        self,
        source: VideoSource,
        fps: float = 2.0,
        chunk_seconds: float = 1.0,
        drop_policy: DropPolicy = "latest",
        realtime: bool = True,
        *,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """`fps` is the model's rate. Raises ValueError for rates or lengths not above 0."""
        self.source = source
        self.fps = fps
        self.chunk_seconds = chunk_seconds
        self._cutter = ChunkCutter(fps, chunk_seconds)
        self._paced = realtime and not source.live
        dropping = realtime or source.live
        self._backlog = Backlog(
            drop_policy if dropping else None,
            self._cutter.frames_per_chunk,
            BACKLOG_CHUNKS if dropping else _READ_AHEAD_CHUNKS,
        )
        self._meter = MotionMeter() if self._backlog.policy == "motion" else None
        self._now = now
        self._changed = threading.Condition()
        self._stopping = threading.Event()
        self._finished = False
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    @property
    def dropped_frames(self) -> int:
        """Sampled frames dropped so far because the model had no time for them."""
        with self._changed:
            return self._backlog.dropped_total

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        with self._changed:
            self._start()
            while True:
                if self._stopping.is_set():
                    raise StopIteration
                chunk = self._backlog.take()
                if chunk is not None:
                    self._changed.notify_all()
                    return chunk
                if self._finished:
                    error, self._error = self._error, None
                    raise StopIteration if error is None else error
                self._changed.wait()

    def close(self) -> None:
        """Stop capturing, release the source, and wait for the thread to end; idempotent."""
        with self._changed:
            self._stopping.set()
            self._changed.notify_all()
            thread, self._thread = self._thread, None
            never_started = thread is None and not self._finished
            self._finished = True
        self.source.interrupt()
        if thread is not None:
            thread.join(_JOIN_SECONDS)
        elif never_started:
            self.source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _start(self) -> None:
        if self._thread is None and not self._finished:
            # A daemon, so that a read stuck in a driver cannot keep the program from ending.
            self._thread = threading.Thread(
                target=self._run, name=f"capture {self.source.name}", daemon=True
            )
            self._thread.start()

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            try:
                self._read()
            finally:
                for cut in self._cutter.flush():
                    self._hand_over(cut)
        except BaseException as raised:  # handed to the reader, who can act on it
            error = raised
        finally:
            self.source.close()
            with self._changed:
                self._finished, self._error = True, error
                self._changed.notify_all()

    def _read(self) -> None:
        origin: float | None = None
        while not self._stopping.is_set():
            seconds = self.source.grab()
            if seconds is None:
                return
            if not self._cutter.wants(seconds):
                continue
            image = self.source.retrieve()
            if image is None:
                continue
            if self._paced:
                origin = self._now() - seconds if origin is None else origin
                self._stopping.wait(max(0.0, origin + seconds - self._now()))
            motion = self._meter.measure(image) if self._meter else 0.0
            for cut in self._cutter.add(SampledFrame(image, seconds, self._now(), motion)):
                self._hand_over(cut)

    def _hand_over(self, cut: Cut) -> None:
        with self._changed:
            while self._backlog.full and not self._stopping.is_set():
                self._changed.wait()
            if not self._stopping.is_set():
                self._backlog.add(cut)
                self._changed.notify_all()
