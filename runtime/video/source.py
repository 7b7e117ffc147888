"""Where frames come from: a file, a webcam, or a URL."""

import os
import re
import stat
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from framesink.runtime.arrays import UInt8Array
from framesink.runtime.errors import VideoError
from framesink.runtime.video.container import describe_unreadable
from framesink.runtime.video.opencv import (
    Capture,
    capture_camera,
    capture_file,
    capture_url,
    frame_count,
)
from framesink.runtime.video.sources import (
    LARGEST_FRAME_PIXELS,
    CameraSource,
    FileSource,
    LiveUrlSource,
)

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_CAMERA_DEVICE = re.compile(r"/dev/video(\d+)")
# Their segments arrive in bursts, so only the container knows when a frame was taken.
_SEGMENTED = (".m3u8", ".mpd")


class VideoSource(Protocol):
    """Frames in the order of their time. Used from one thread, `interrupt` from any."""

    name: str
    live: bool
    """Whether frames come at their own pace: what is not read in time is lost."""

    def grab(self) -> float | None:
        """Advance to the next frame; its strictly increasing seconds of video time.

        None at the end. Raises VideoError when the source ended early or stopped delivering.
        """
        ...

    def retrieve(self) -> UInt8Array | None:
        """The frame grabbed last, uint8 `[H, W, 3]` RGB, upright; None if it cannot be decoded.

        Raises VideoError for a frame larger than the limit.
        """
        ...

    def interrupt(self) -> None:
        """Make a waiting `grab` return soon, with None."""
        ...

    def close(self) -> None:
        """Release the device, file or connection."""
        ...


def open_source(
    spec: str | Path,
    *,
    max_frame_pixels: int = LARGEST_FRAME_PIXELS,
    timeout_seconds: float = 5.0,
) -> VideoSource:
    """Open a file path, a webcam index (`"0"`), or a URL (RTSP, HTTP, ...).

    `max_frame_pixels` bounds the area of a frame; `timeout_seconds` bounds the opening of a URL
    and every read from it. Raises VideoError, in one sentence, if no frames can come from it.
    """
    text = str(spec)
    camera = re.fullmatch(r"\d+", text) or _CAMERA_DEVICE.fullmatch(text)
    if camera:
        index = int(camera[camera.lastindex or 0])
        return CameraSource(index, lambda: capture_camera(index), max_frame_pixels)
    if text.startswith("file://"):
        return _open_file(Path(urlsplit(text).path), max_frame_pixels)
    if _URL.match(text):
        return _open_url(text, max_frame_pixels, timeout_seconds)
    return _open_file(Path(text), max_frame_pixels)


def _open_file(path: Path, max_frame_pixels: int) -> VideoSource:
    try:
        status = path.stat()
    except OSError as error:
        raise VideoError(f"The video {path} cannot be found; check the path.") from error
    if stat.S_ISDIR(status.st_mode):
        raise VideoError(f"{path} is a directory; give the path of one video file in it.")
    if not stat.S_ISREG(status.st_mode):
        raise VideoError(f"{path} is not a regular file; give a video file, a webcam or a URL.")
    if not os.access(path, os.R_OK):
        raise VideoError(f"The video {path} may not be read; change its permissions.")
    if status.st_size == 0:
        raise VideoError(f"The video {path} is empty (0 bytes); copy or record it again.")
    capture = capture_file(path)
    if not capture.isOpened():
        raise VideoError(describe_unreadable(path))
    return FileSource(str(path), capture, max_frame_pixels)


def _open_url(url: str, max_frame_pixels: int, timeout_seconds: float) -> VideoSource:
    name = without_credentials(url)

    def connect() -> Capture:
        return capture_url(url, timeout_seconds)

    capture = connect()
    if not capture.isOpened():
        raise VideoError(
            f"No video came from {name} within {timeout_seconds:g} s; "
            "check the address, the network, and that the stream is running."
        )
    if frame_count(capture) is not None:
        return FileSource(name, capture, max_frame_pixels)
    segmented = urlsplit(url).path.lower().endswith(_SEGMENTED)
    return LiveUrlSource(name, capture, connect, max_frame_pixels, paced=segmented)


def without_credentials(url: str) -> str:
    """The URL as it may be shown: without user name and password."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
