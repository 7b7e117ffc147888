"""Which video is calibrated on, and which part of it is held back to judge the result on."""

from collections.abc import Iterator
from itertools import count
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from framesink.build.footage import Footage, choose_videos, divide_footage, share_out
from framesink.calibration.samples import sample_chunks
from framesink.runtime.errors import VideoError
from framesink.runtime.preprocess import PreprocessConfig
from framesink.runtime.video import ChunkStream, open_source

PREPROCESS = PreprocessConfig()
FPS = 4.0


def _write_video(path: Path, seconds: int) -> Path:
    """A video whose brightness tells the second."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), FPS, (64, 64))
    for second in range(seconds):
        for _ in range(int(FPS)):
            writer.write(np.full((64, 64, 3), 4 * second, dtype=np.uint8))
    writer.release()
    return path


def _seconds_shown(footage: Footage) -> list[list[int]]:
    streams = footage.judged_streams(PREPROCESS, 1.0)
    return [[round(float(chunk.frames.mean()) / 4) for chunk in stream] for stream in streams]


@given(
    lengths=st.lists(st.integers(0, 400), min_size=1, max_size=8),
    calibrate=st.integers(1, 300),
    judge=st.integers(1, 64),
)
def test_no_chunk_is_used_twice_or_beyond_what_was_asked(
    lengths: list[int], calibrate: int, judge: int
) -> None:
    calibrated, judged = share_out([iter(range(n)) for n in lengths], calibrate, judge)
    for length, first, then in zip(lengths, calibrated, judged, strict=True):
        assert first >= 0
        assert 0 <= then <= length / 3
        assert first + then <= length
    assert sum(calibrated) <= calibrate
    assert sum(judged) <= judge


@given(
    lengths=st.lists(st.integers(400, 500), min_size=1, max_size=8),
    calibrate=st.integers(1, 300),
    judge=st.integers(1, 64),
)
def test_long_videos_give_all_that_was_asked(
    lengths: list[int], calibrate: int, judge: int
) -> None:
    calibrated, judged = share_out([iter(range(n)) for n in lengths], calibrate, judge)
    assert (sum(calibrated), sum(judged)) == (calibrate, judge)
    assert max(calibrated) - min(calibrated) <= 1


@pytest.mark.parametrize(
    ("length", "calibrated", "judged"), [(24, 16, 8), (72, 48, 24), (96, 64, 32), (500, 64, 32)]
)
def test_a_third_of_a_short_video_is_held_back(length: int, calibrated: int, judged: int) -> None:
    assert share_out([iter(range(length))], 64, 32) == ((calibrated,), (judged,))


def test_what_a_short_video_leaves_goes_to_those_after_it() -> None:
    assert share_out([iter(range(3)), iter(range(500))], 64, 32) == ((2, 62), (1, 31))


def test_only_what_is_shared_out_is_read() -> None:
    taken: list[int] = []

    def endless() -> Iterator[int]:
        for number in count():
            taken.append(number)
            yield number

    assert share_out([endless()], 64, 32) == ((64,), (32,))
    assert len(taken) == 96


def test_the_judged_part_follows_the_calibrated_one(tmp_path: Path) -> None:
    short = _write_video(tmp_path / "a.avi", 9)
    long = _write_video(tmp_path / "b.avi", 40)
    footage = divide_footage([short, long], PREPROCESS, 1.0, calibrate=20, judge=12)
    assert footage.calibrated == (6, 14)
    assert footage.judged == (3, 9)
    assert _seconds_shown(footage) == [[6, 7, 8], list(range(14, 23))]
    assert footage.calibration_source == "a.avi up to chunk 6, b.avi up to chunk 14"
    assert footage.judged_source == "a.avi from chunk 6, b.avi from chunk 14"


def test_the_judged_part_is_a_stream_of_its_own(tmp_path: Path) -> None:
    """Its times begin at 0, as those of the same frames cut into a file would."""
    video = _write_video(tmp_path / "a.avi", 12)
    (stream,) = Footage((video,), (4,), (3,)).judged_streams(PREPROCESS, 1.0)
    with ChunkStream(open_source(str(video)), PREPROCESS.fps, 1.0, realtime=False) as whole:
        expected = [next(whole) for _ in range(3)]
    for found, first in zip(stream, expected, strict=True):
        assert (found.t0, found.t1) == pytest.approx((first.t0, first.t1))
        assert found.timestamps == pytest.approx(first.timestamps)


def test_the_whole_of_a_video_can_be_judged_on(tmp_path: Path) -> None:
    videos = [_write_video(tmp_path / name, 12) for name in ("a.avi", "b.avi")]
    footage = Footage.whole(videos, 6)
    assert _seconds_shown(footage) == [[0, 1, 2], [0, 1, 2]]
    assert footage.judged_source == "a.avi, b.avi"


def test_a_generated_scene_is_shared_out_too() -> None:
    footage = divide_footage([], PREPROCESS, 1.0, calibrate=16, judge=8)
    assert (footage.calibrated, footage.judged) == ((16,), (8,))
    assert footage.judged_source == "generated scene from chunk 16"
    (stream,) = footage.judged_streams(PREPROCESS, 1.0)
    (everything,) = Footage.whole((), 24).judged_streams(PREPROCESS, 1.0)
    frames = [chunk.frames for chunk in everything]
    for number, chunk in enumerate(stream):
        np.testing.assert_array_equal(chunk.frames, frames[16 + number])


def test_a_folder_of_many_videos_gives_no_more_frames_than_asked_for(tmp_path: Path) -> None:
    videos = [_write_video(tmp_path / f"{name}.avi", 4) for name in "abc"]
    chunks = sample_chunks(videos, PREPROCESS, chunk_seconds=1.0, count=2)
    assert [round(float(chunk.mean()) / 4) for chunk in chunks] == [0, 0]


def test_too_little_video_is_refused_with_the_figures(tmp_path: Path) -> None:
    video = _write_video(tmp_path / "a.avi", 20)
    with pytest.raises(VideoError, match=r"yields 20 chunks of 1 s, 14 .* and 6 held back"):
        divide_footage([video], PREPROCESS, 1.0, calibrate=64, judge=32)


def test_a_checkpoint_may_bring_its_own_video(tmp_path: Path) -> None:
    bare, other, own = (tmp_path / name for name in ("bare", "other", "own"))
    for directory in (bare, other / "calibration", own / "calibration"):
        directory.mkdir(parents=True)
    video = _write_video(own / "calibration" / "a.avi", 1)
    given_video = _write_video(tmp_path / "given.avi", 1)
    assert choose_videos([], [bare]) == ()
    assert choose_videos([], [bare, own]) == (video,)
    assert choose_videos([], [other, own]) == (video,)
    assert choose_videos([], [other]) == ()
    assert choose_videos([given_video], [own]) == (given_video,)
    with pytest.raises(VideoError, match="holds no video"):
        choose_videos([other], [own])
