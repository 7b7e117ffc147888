"""Files, webcams and live URLs as video sources, on top of OpenCV's captures."""

import math
import threading
import time
from collections.abc import Callable
from pathlib import Path

import cv2

from framesink.runtime.arrays import UInt8Array
from framesink.runtime.errors import VideoError
from framesink.runtime.video.opencv import Capture, frame_count, to_rgb
from framesink.runtime.video.timeline import Timeline

LARGEST_FRAME_PIXELS = 40_000_000  # 8K is 33 million
RECONNECT_WAITS = (0.5, 1.0, 2.0, 4.0, 8.0)
# A file has ended early if it misses more frames, and more time, than both of these.
_MISSING_FRAMES = 2
_MISSING_SHARE = 0.02


class _OpenCvSource:
    """What all sources share: size limit, decoding, release."""

    live: bool

    def __init__(self, name: str, capture: Capture, max_frame_pixels: int) -> None:
        self.name = name
        self._capture = capture
        self._max_frame_pixels = max_frame_pixels
        self._interrupted = threading.Event()
        self._timeline = Timeline(capture.get(cv2.CAP_PROP_FPS))
        width = capture.get(cv2.CAP_PROP_FRAME_WIDTH)
        height = capture.get(cv2.CAP_PROP_FRAME_HEIGHT)
        try:
            self._check_size(int(height), int(width))
        except VideoError:
            capture.release()
            raise

    def retrieve(self) -> UInt8Array | None:
        """See VideoSource."""
        decoded, image = self._capture.retrieve()
        if not decoded or image is None or image.size == 0:
            return None
        self._check_size(*image.shape[:2])
        return to_rgb(image)

    def interrupt(self) -> None:
        """See VideoSource."""
        self._interrupted.set()

    def close(self) -> None:
        """See VideoSource."""
        self._interrupted.set()
        self._capture.release()

    def _check_size(self, height: int, width: int) -> None:
        if height * width > self._max_frame_pixels:
            raise VideoError(
                f"{self.name} has frames of {width}×{height} pixels, more than the limit of "
                f"{self._max_frame_pixels:,}; scale it down or raise the limit."
            )

    def _container_seconds(self) -> float:
        return float(self._capture.get(cv2.CAP_PROP_POS_MSEC)) / 1000.0


class FileSource(_OpenCvSource):
    """A video with an end; time is the container's."""

    live = False

    def __init__(self, name: str, capture: Capture, max_frame_pixels: int) -> None:
        """Takes over an open capture. Raises VideoError if its frames are too large."""
        super().__init__(name, capture, max_frame_pixels)
        self._announced = frame_count(capture)
        self._read = 0
        self._last = 0.0

    def grab(self) -> float | None:
        """See VideoSource; raises VideoError at the end if that came early."""
        if self._interrupted.is_set():
            return None
        if not self._capture.grab():
            self._check_end()
            return None
        self._read += 1
        self._last = self._timeline.place(self._container_seconds())
        return self._last

    def _check_end(self) -> None:
        if self._read == 0:
            raise VideoError(
                f"No frame of {self.name} can be decoded; it is damaged or of an unknown codec."
            )
        if self._announced is None:
            return
        frame_seconds = self._timeline.frame_seconds
        missing = self._announced - self._read
        duration = self._announced * frame_seconds
        # Containers that only estimate the count are judged by time, which must be short as well.
        missing_seconds = duration - self._last - frame_seconds
        tolerated = max(_MISSING_FRAMES, _MISSING_SHARE * self._announced)
        if missing > tolerated and missing_seconds > tolerated * frame_seconds:
            raise VideoError(
                f"{self.name} ended early, after {self._last + frame_seconds:.1f} of "
                f"{duration:.1f} s: the file was cut off or is damaged there."
            )


class _ArrivalClock:
    """Seconds since the first frame arrived."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._origin: float | None = None

    def elapsed(self) -> float:
        now = self._now()
        if self._origin is None:
            self._origin = now
        return now - self._origin


class CameraSource(_OpenCvSource):
    """A webcam; time is that of arrival."""

    live = True

    def __init__(
        self,
        index: int,
        open_capture: Callable[[], Capture],
        max_frame_pixels: int,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises VideoError if there is no such webcam or it delivers no frame."""
        capture = open_capture()
        if not capture.isOpened():
            capture.release()
            raise VideoError(f"There is no webcam {index} that can be opened; {_cameras()}.")
        super().__init__(f"webcam {index}", capture, max_frame_pixels)
        self._clock = _ArrivalClock(now)

    def grab(self) -> float | None:
        """See VideoSource; raises VideoError when the webcam stops delivering."""
        if self._interrupted.is_set():
            return None
        if not self._capture.grab():
            raise VideoError(
                f"The {self.name} stopped delivering frames; check that it is still connected."
            )
        return self._timeline.place(self._clock.elapsed())


def _cameras() -> str:
    devices = sorted(str(path) for path in Path("/dev").glob("video[0-9]*"))
    if not devices:
        return "no camera device is on this machine"
    return f"check that it is connected and not in use (this machine has {', '.join(devices)})"


class LiveUrlSource(_OpenCvSource):
    """A stream without an end; reconnects when it breaks off.

    Time is that of arrival, or, where `paced`, the container's: then frames that come in bursts
    are handed out when they are due.
    """

    live = True

    def __init__(
        self,
        name: str,
        capture: Capture,
        connect: Callable[[], Capture],
        max_frame_pixels: int,
        *,
        paced: bool = False,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """Takes over an open capture. Raises VideoError if its frames are too large."""
        super().__init__(name, capture, max_frame_pixels)
        self._connect = connect
        self._paced = paced
        self._clock = _ArrivalClock(now)
        self._lead = -math.inf
        self._attempts = 0

    def grab(self) -> float | None:
        """See VideoSource; raises VideoError when the stream cannot be reached again."""
        while not self._interrupted.is_set():
            if self._capture.grab():
                self._attempts = 0
                return self._paced_seconds() if self._paced else self._arrival_seconds()
            self._reconnect()
        return None

    def _arrival_seconds(self) -> float:
        return self._timeline.place(self._clock.elapsed())

    def _paced_seconds(self) -> float:
        seconds = self._timeline.place(self._container_seconds())
        elapsed = self._clock.elapsed()
        if self._lead == -math.inf:
            self._lead = seconds - elapsed
        self._interrupted.wait(max(0.0, seconds - elapsed - self._lead))
        return seconds

    def _reconnect(self) -> None:
        """One more attempt, after a growing wait; only a frame makes the waits short again."""
        self._capture.release()
        if self._attempts == len(RECONNECT_WAITS):
            raise VideoError(
                f"{self.name} broke off and could not be reached again in {self._attempts} "
                "attempts; check the network and that the stream is running."
            )
        wait = RECONNECT_WAITS[self._attempts]
        self._attempts += 1
        if not self._interrupted.wait(wait):
            self._capture = self._connect()
            self._lead = -math.inf
