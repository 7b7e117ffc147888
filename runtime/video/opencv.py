"""OpenCV's video captures, as the sources use them."""

import os
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np

from framesink.runtime.arrays import AnyArray, UInt8Array

_LARGEST_COUNT = 1e9


class Capture(Protocol):
    """The part of `cv2.VideoCapture` that is used."""

    def isOpened(self) -> bool: ...
    def grab(self) -> bool: ...
    def retrieve(self) -> tuple[bool, AnyArray | None]: ...
    def get(self, propId: int) -> float: ...
    def release(self) -> None: ...


def _quieten() -> None:
    """Keep the libraries' own messages off the terminal, unless the user asked for them.

    FFmpeg's level is read from the environment when OpenCV first opens a video.
    """
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    if "OPENCV_LOG_LEVEL" not in os.environ:
        cv2.setLogLevel(0)


def capture_file(path: Path) -> Capture:
    """A capture of a file, turned upright as its metadata says; may not be opened."""
    _quieten()
    # An absolute path cannot be taken for one of FFmpeg's protocols.
    return _upright(cv2.VideoCapture(str(path.absolute()), cv2.CAP_FFMPEG))


def capture_url(url: str, timeout_seconds: float) -> Capture:
    """A capture of a URL; opening it and every read take at most `timeout_seconds` each."""
    _quieten()
    milliseconds = max(1, round(timeout_seconds * 1000))
    options = [
        cv2.CAP_PROP_OPEN_TIMEOUT_MSEC,
        milliseconds,
        cv2.CAP_PROP_READ_TIMEOUT_MSEC,
        milliseconds,
    ]
    return _upright(cv2.VideoCapture(url, cv2.CAP_FFMPEG, options))


def capture_camera(index: int) -> Capture:
    """A capture of a webcam; may not be opened."""
    _quieten()
    capture: Capture = cv2.VideoCapture(index)
    return capture


def _upright(capture: cv2.VideoCapture) -> Capture:
    capture.set(cv2.CAP_PROP_ORIENTATION_AUTO, 1)
    upright: Capture = capture
    return upright


def frame_count(capture: Capture) -> int | None:
    """Frames the container announces (some only estimate it from the duration), or None."""
    count = capture.get(cv2.CAP_PROP_FRAME_COUNT)
    return int(count) if 0 < count < _LARGEST_COUNT else None


def to_rgb(image: AnyArray) -> UInt8Array:
    """A decoded picture (grey, BGR or BGRA, 8 or 16 bits) as uint8 `[H, W, 3]` RGB."""
    if image.dtype == np.uint16:
        image = (image >> 8).astype(np.uint8)
    if image.ndim == 2 or image.shape[2] == 1:
        conversion = cv2.COLOR_GRAY2RGB
    elif image.shape[2] == 4:
        conversion = cv2.COLOR_BGRA2RGB
    else:
        conversion = cv2.COLOR_BGR2RGB
    rgb: UInt8Array = cv2.cvtColor(image, conversion)
    return rgb
