"""Real files through OpenCV, and captures that fail in every way."""

import http.server
import itertools
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest

from framesink.runtime.errors import VideoError
from framesink.runtime.video import sources
from framesink.runtime.video.capture import ChunkStream
from framesink.runtime.video.opencv import to_rgb
from framesink.runtime.video.source import open_source, without_credentials
from framesink.runtime.video.sources import CameraSource, FileSource, LiveUrlSource

MORE_THAN_ANY = 10**9


def write_video(path: Path, size: tuple[int, int] = (64, 48), frames: int = 40, fps: int = 10):
    """Each frame is one grey, its number plus 40, with a bright top left corner."""
    codec = {".avi": "MJPG", ".mp4": "mp4v", ".mkv": "mp4v", ".ts": "mp4v"}[path.suffix]
    writer = cv2.VideoWriter(
        str(path), cv2.CAP_FFMPEG, cv2.VideoWriter_fourcc(*codec), float(fps), size
    )
    assert writer.isOpened()
    for number in range(frames):
        image = np.full((size[1], size[0], 3), 40 + number, np.uint8)
        image[: size[1] // 4, : size[0] // 4] = (255, 255, 255)
        writer.write(image)
    writer.release()
    return path


def read_all(path: Path) -> list[tuple[float, np.ndarray]]:
    source = open_source(path)
    frames = []
    while (seconds := source.grab()) is not None:
        frames.append((seconds, source.retrieve()))
    source.close()
    return frames


@pytest.mark.parametrize("suffix", [".avi", ".mp4", ".mkv"])
def test_frames_and_container_time(tmp_path: Path, suffix: str) -> None:
    frames = read_all(write_video(tmp_path / f"clip{suffix}"))
    assert [seconds for seconds, _ in frames] == pytest.approx([i / 10 for i in range(40)])
    for number, (_, image) in enumerate(frames):
        assert image.shape == (48, 64, 3)
        assert image.dtype == np.uint8
        assert image[40, 50].mean() == pytest.approx(40 + number, abs=4)


def test_channels_are_rgb(tmp_path: Path) -> None:
    path = tmp_path / "blue.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 5.0, (32, 32))
    for _ in range(5):
        writer.write(np.full((32, 32, 3), (250, 10, 30), np.uint8))  # OpenCV: blue first
    writer.release()
    red, green, blue = read_all(path)[2][1].reshape(-1, 3).mean(axis=0)
    assert (red, green, blue) == pytest.approx((30, 10, 250), abs=12)


def write_raw_jpegs(path: Path, size: tuple[int, int], frames: int = 30) -> Path:
    """JPEG pictures one after another: no container, no timestamps, any size."""
    pictures = [np.full((size[1], size[0], 3), 5 * number, np.uint8) for number in range(frames)]
    path.write_bytes(b"".join(cv2.imencode(".jpg", picture)[1].tobytes() for picture in pictures))
    return path


@pytest.mark.parametrize("size", [(63, 47), (17, 31), (641, 3)])
def test_odd_sizes(tmp_path: Path, size: tuple[int, int]) -> None:
    source = open_source(write_raw_jpegs(tmp_path / "odd.mjpg", size))
    chunks = list(ChunkStream(source, fps=5, realtime=False))
    assert [len(chunk.frames) for chunk in chunks] == [5, 1]
    assert chunks[0].frames.shape == (5, size[1], size[0], 3)
    assert chunks[0].frames[2].mean() == pytest.approx(50, abs=3)


def test_rotation_in_the_metadata_is_applied(tmp_path: Path) -> None:
    path = write_video(tmp_path / "phone.mp4")
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40  # version 0 of the track header, ISO/IEC 14496-12
    one, w = 1 << 16, 1 << 30
    data[matrix : matrix + 36] = struct.pack(">9i", 0, one, 0, -one, 0, 0, 0, 0, w)
    path.write_bytes(data)
    _, image = read_all(path)[0]
    assert image.shape == (64, 48, 3)
    bright = [image[:8, :8].mean(), image[:8, -8:].mean(), image[-8:, :8].mean()]
    assert bright[1] > 200 > max(bright[0], bright[2])  # turned clockwise: top left is top right


def test_a_stream_that_starts_again_goes_on_in_time(tmp_path: Path) -> None:
    """Two transport streams joined: the second one's timestamps begin at 0 again."""
    part = write_video(tmp_path / "part.ts").read_bytes()
    (tmp_path / "joined.ts").write_bytes(part + part)
    times = [seconds for seconds, _ in read_all(tmp_path / "joined.ts")]
    assert len(times) > 70
    assert all(a < b for a, b in itertools.pairwise(times))
    assert times[-1] == pytest.approx(len(times) / 10, abs=0.5)


def test_frames_without_timestamps_follow_the_frame_rate(tmp_path: Path) -> None:
    path = write_raw_jpegs(tmp_path / "raw.mjpg", (64, 48))
    times = [seconds for seconds, _ in read_all(path)]
    assert times == pytest.approx([i / 25 for i in range(30)])


def make_text(path: Path) -> None:
    path.write_text("not a video\n" * 50)


def make_noise(path: Path) -> None:
    path.write_bytes(np.random.default_rng(0).bytes(50_000))


def make_unfinished(path: Path) -> None:
    write_video(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("name", "make", "sentence"),
    [
        ("missing.mp4", lambda path: None, "cannot be found"),
        ("folder.mp4", Path.mkdir, "is a directory"),
        ("empty.mp4", Path.touch, "is empty"),
        ("text.mp4", make_text, "is not a video"),
        ("noise.mp4", make_noise, "is not a video"),
        ("noise.avi", make_noise, "is not a video"),
        ("cut.mp4", make_unfinished, "cut off before its index"),
        ("half.mp4", lambda path: path.write_bytes(b"\0\0\0\x18ftypisom"), "cut off before"),
    ],
)
def test_unusable_files(
    tmp_path: Path, name: str, make: Callable[[Path], object], sentence: str
) -> None:
    make(tmp_path / name)
    with pytest.raises(VideoError, match=sentence) as caught:
        open_source(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert str(caught.value).endswith(".")


def index_first(data: bytes) -> bytes:
    """An MP4 with its index moved to the front, as files made for the web have it."""
    boxes, offset = {}, 0
    while offset < len(data):
        size = int.from_bytes(data[offset : offset + 4], "big")
        boxes[data[offset + 4 : offset + 8]] = data[offset : offset + size]
        offset += size
    index = bytearray(boxes.pop(b"moov"))
    table = index.index(b"stco") + 8
    for entry in range(int.from_bytes(index[table : table + 4], "big")):
        place = slice(table + 4 + 4 * entry, table + 8 + 4 * entry)
        index[place] = (int.from_bytes(index[place], "big") + len(index)).to_bytes(4, "big")
    return boxes.pop(b"ftyp") + bytes(index) + b"".join(boxes.values())


@pytest.mark.parametrize("suffix", [".avi", ".mkv", ".mp4"])
def test_a_file_cut_in_the_middle_is_played_and_then_reported(tmp_path: Path, suffix: str) -> None:
    path = write_video(tmp_path / f"clip{suffix}", (160, 120))
    data = index_first(path.read_bytes()) if suffix == ".mp4" else path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])
    chunks = []
    with pytest.raises(VideoError, match=r"ended early, after [12]\.\d of 4\.0 s"):  # noqa: PT012
        for chunk in ChunkStream(open_source(path), realtime=False):
            chunks.append(chunk)
    assert [chunk.t0 for chunk in chunks] == [float(i) for i in range(len(chunks))]
    assert len(chunks) in (2, 3)


def test_frames_above_the_limit_are_refused(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.avi")
    with pytest.raises(VideoError, match="64×48 pixels, more than the limit of 3,000"):
        open_source(path, max_frame_pixels=3000)
    assert open_source(path, max_frame_pixels=3072).grab() == 0.0


def test_urls_that_answer_nothing() -> None:
    with pytest.raises(VideoError, match=r"No video came from rtsp://127\.0\.0\.1:9/x within 1 s"):
        open_source("rtsp://127.0.0.1:9/x", timeout_seconds=1)
    assert without_credentials("rtsp://me:secret@host:554/a?b=c") == "rtsp://host:554/a?b=c"


def test_a_webcam_that_is_not_there() -> None:
    with pytest.raises(VideoError, match="There is no webcam 97 that can be opened"):
        open_source("97")


class FakeCapture:
    """Plays a script: an image is a frame, None a frame that cannot be decoded; then it fails."""

    def __init__(self, script: list, *, opened: bool = True, count: float = -1.0) -> None:
        self.script, self.opened, self.count = list(script), opened, count
        self.released = False
        self.current = None

    def isOpened(self) -> bool:
        return self.opened

    def grab(self) -> bool:
        assert not self.released
        if not self.script:
            return False
        self.current = self.script.pop(0)
        return True

    def retrieve(self):
        return self.current is not None, self.current

    def get(self, prop: int) -> float:
        return {cv2.CAP_PROP_FPS: 10.0, cv2.CAP_PROP_FRAME_COUNT: self.count}.get(prop, 0.0)

    def release(self) -> None:
        self.released = True


def image(height: int = 4, width: int = 6) -> np.ndarray:
    return np.zeros((height, width, 3), np.uint8)


def ticking(step: float) -> Callable[[], float]:
    clock: Iterator[int] = iter(range(10**6))
    return lambda: next(clock) * step


def test_a_webcam_that_is_unplugged() -> None:
    capture = FakeCapture([image()] * 7)
    source = CameraSource(3, lambda: capture, MORE_THAN_ANY, ticking(0.25))
    chunks = []
    with pytest.raises(VideoError, match="webcam 3 stopped delivering"):  # noqa: PT012
        for chunk in ChunkStream(source, drop_policy="uniform"):
            chunks.append(chunk)
    assert chunks[0].t0 == 0.0
    assert chunks[-1].t1 == 2.0
    assert capture.released


def test_a_camera_that_is_reconfigured_mid_stream() -> None:
    script = [image(), image(8, 10), None, image(3, 3), image(3, 3)]
    source = CameraSource(0, lambda: FakeCapture(script), MORE_THAN_ANY, ticking(0.5))
    stream = ChunkStream(source, drop_policy="uniform", fps=1.0, chunk_seconds=10.0)
    with pytest.raises(VideoError, match="stopped"):  # noqa: PT012
        for chunk in stream:
            assert chunk.frames.shape[1:] in ((8, 10, 3), (3, 3, 3))


def test_a_frame_that_grows_beyond_the_limit() -> None:
    source = CameraSource(0, lambda: FakeCapture([image(), image(50, 50)]), 100)
    assert source.grab() is not None
    assert source.retrieve() is not None
    source.grab()
    with pytest.raises(VideoError, match="50×50"):
        source.retrieve()


def test_a_broken_stream_is_connected_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "RECONNECT_WAITS", (0.0, 0.0, 0.0))
    first = FakeCapture([image()] * 2)
    failed = FakeCapture([], opened=False)
    second = FakeCapture([image()] * 3)
    attempts = [failed, second, *(FakeCapture([], opened=False) for _ in range(3))]
    source = LiveUrlSource("rtsp://x", first, lambda: attempts.pop(0), 10**9, now=ticking(0.1))
    times = [source.grab() for _ in range(5)]
    assert times == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    with pytest.raises(VideoError, match="broke off and could not be reached again in 3 attempts"):
        source.grab()
    assert first.released
    assert failed.released
    assert second.released
    assert attempts == []


def test_a_stream_that_opens_and_never_delivers_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sources, "RECONNECT_WAITS", (0.0,) * 4)
    attempts = [FakeCapture([]) for _ in range(4)]
    source = LiveUrlSource("rtsp://x", FakeCapture([]), lambda: attempts.pop(0), MORE_THAN_ANY)
    with pytest.raises(VideoError, match="in 4 attempts"):
        source.grab()


def test_segments_that_come_in_bursts_are_paced_by_the_container() -> None:
    """Frames 0.1 s apart in the container arrive at once; none is handed out before it is due."""
    capture = FakeCapture([image()] * 4)
    positions = iter([5000.0, 5020.0, 5040.0, 5060.0])
    capture.get = lambda prop: next(positions) if prop == cv2.CAP_PROP_POS_MSEC else 0.0
    source = LiveUrlSource("http://x/a.m3u8", capture, lambda: capture, MORE_THAN_ANY, paced=True)
    started = time.monotonic()
    for expected in (5.0, 5.02, 5.04, 5.06):
        assert source.grab() == pytest.approx(expected)
        assert time.monotonic() - started >= expected - 5.0


class VideoServer(http.server.BaseHTTPRequestHandler):
    """`/file` is a whole video, `/live` a motion JPEG that breaks off after ten frames."""

    video = b""

    def do_GET(self) -> None:
        self.send_response(200)
        if self.path == "/file":
            self.send_header("Content-Length", str(len(self.video)))
            self.end_headers()
            self.wfile.write(self.video)
            return
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        self.end_headers()
        picture = cv2.imencode(".jpg", np.full((48, 64, 3), 77, np.uint8))[1].tobytes()
        head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(picture)}\r\n\r\n"
        for _ in range(10):
            self.wfile.write(head.encode() + picture + b"\r\n")

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    VideoServer.video = write_video(tmp_path / "clip.avi").read_bytes()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), VideoServer) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def test_a_file_over_http_is_a_file(server: str) -> None:
    source = open_source(f"{server}/file")
    assert not source.live
    chunks = list(ChunkStream(source, realtime=False))
    assert [(chunk.t0, len(chunk.frames)) for chunk in chunks] == [(float(i), 2) for i in range(4)]


def test_a_live_stream_over_http_is_connected_again(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "RECONNECT_WAITS", (0.0,))
    source = open_source(f"{server}/live")
    assert source.live
    times = [source.grab() for _ in range(25)]
    assert times == sorted(set(times))
    assert source.retrieve().mean() == pytest.approx(77, abs=2)
    source.close()


def test_waiting_for_a_reconnect_can_be_interrupted() -> None:
    source = LiveUrlSource("rtsp://x", FakeCapture([]), lambda: pytest.fail("tried"), 10**9)
    source.interrupt()
    assert source.grab() is None


@pytest.mark.parametrize(
    ("read", "announced", "early"),
    [(40, 40, False), (38, 40, False), (30, 40, True), (990, 1000, False), (900, 1000, True)],
)
def test_what_counts_as_ended_early(read: int, announced: int, early: bool) -> None:
    source = FileSource("clip", FakeCapture([image()] * read, count=announced), MORE_THAN_ANY)
    for _ in range(read):
        source.grab()
    if early:
        with pytest.raises(VideoError, match="ended early"):
            source.grab()
    else:
        assert source.grab() is None


def test_a_file_without_any_frame() -> None:
    with pytest.raises(VideoError, match="No frame of clip can be decoded"):
        FileSource("clip", FakeCapture([], count=40), MORE_THAN_ANY).grab()


@pytest.mark.parametrize(
    "decoded",
    [
        np.full((5, 7), 9, np.uint8),
        np.full((5, 7, 1), 9, np.uint8),
        np.full((5, 7, 4), 9, np.uint8),
        np.full((5, 7), 9 << 8, np.uint16),
    ],
)
def test_grey_alpha_and_deep_pictures_become_rgb(decoded: np.ndarray) -> None:
    rgb = to_rgb(decoded)
    assert rgb.shape == (5, 7, 3)
    assert rgb.dtype == np.uint8
    assert (rgb == 9).all()
