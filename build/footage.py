"""The video of a build: what is calibrated on, and what is held back to judge the result on."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from framesink.calibration.videos import (
    DEFAULT_MINIMUM_CHUNKS,
    VIDEO_SUFFIXES,
    find_videos,
    open_streams,
)
from framesink.runtime.errors import VideoError
from framesink.runtime.preprocess import PreprocessConfig
from framesink.runtime.video import Chunk

# Where a checkpoint brings video of its own kind.
CALIBRATION_FOLDER = "calibration"
# One part in so many of each video is held back at most.
HELD_BACK_PART = 3
MINIMUM_HELD_BACK = 8


@dataclass(frozen=True, slots=True)
class Footage:
    """Videos, and how many chunks of each are used for what.

    Without `videos` there is one, the generated scene. The first `calibrated` chunks of each are
    calibrated on; the `judged` ones after them are not, so that scales can be judged by them.
    """

    videos: tuple[Path, ...]
    calibrated: tuple[int, ...]
    judged: tuple[int, ...]

    @classmethod
    def whole(cls, videos: Sequence[Path], judge: int) -> "Footage":
        """About `judge` chunks from the beginning of the videos, to judge on alone."""
        count = max(1, len(videos))
        return cls(tuple(videos), (0,) * count, (-(-judge // count),) * count)

    @property
    def calibration_source(self) -> str:
        """In words, what is calibrated on."""
        return ", ".join(
            f"{name} up to chunk {count}"
            for name, count in zip(self._names, self.calibrated, strict=True)
            if count
        )

    @property
    def judged_source(self) -> str:
        """In words, what is judged on."""
        return ", ".join(
            f"{name} from chunk {start}" if start else name
            for name, start, count in zip(self._names, self.calibrated, self.judged, strict=True)
            if count
        )

    def judged_streams(
        self, preprocess: PreprocessConfig, chunk_seconds: float
    ) -> list[Iterator[Chunk]]:
        """The chunks to judge on, each video's as a live stream that begins with them.

        Reading them raises VideoError for a video that cannot be read.
        """
        streams = open_streams(self.videos, preprocess, chunk_seconds, starts=self.calibrated)
        return [
            _from_zero(islice(stream, count))
            for stream, count in zip(streams, self.judged, strict=True)
            if count
        ]

    @property
    def _names(self) -> list[str]:
        return [video.name for video in self.videos] or ["generated scene"]


def choose_videos(given: Sequence[Path], checkpoints: Sequence[Path]) -> tuple[Path, ...]:
    """The videos given (files, or folders of them), else those that the first of `checkpoints` to
    have any brings in its folder `calibration`, else none.

    Raises VideoError for a given folder without videos.
    """
    folders = (directory / CALIBRATION_FOLDER for directory in checkpoints)
    own = [folder for folder in folders if _holds_video(folder)]
    return tuple(find_videos(given or own[:1]))


def divide_footage(
    videos: Sequence[Path],
    preprocess: PreprocessConfig,
    chunk_seconds: float,
    *,
    calibrate: int,
    judge: int,
    on_progress: Callable[[float], None] = lambda _: None,
) -> Footage:
    """Share out the chunks of `videos`: `calibrate` of them, and then `judge` that are held back.

    All videos have equal shares, and what one leaves of its own goes to those after it; of a video
    too short for both a third is held back. Only as much is read as is shared out.

    Raises VideoError for a video that cannot be read, and for videos that leave less than
    calibration or judging need at least.
    """
    if not videos:
        return Footage((), (calibrate,), (judge,))  # the generated scene has no end
    streams = open_streams(videos, preprocess, chunk_seconds)
    calibrated, judged = share_out(streams, calibrate, judge, on_progress)
    needed = min(DEFAULT_MINIMUM_CHUNKS, calibrate)
    needed_back = min(MINIMUM_HELD_BACK, judge)
    if sum(calibrated) < needed or sum(judged) < needed_back:
        raise VideoError(
            f"The calibration video yields {sum(calibrated) + sum(judged)} chunks of "
            f"{chunk_seconds:g} s, {sum(calibrated)} to calibrate on and {sum(judged)} held back "
            f"to judge the result on, and at least {needed} and {needed_back} are needed; give "
            "more or longer video."
        )
    return Footage(tuple(videos), calibrated, judged)


def share_out(
    streams: Sequence[Iterator[object]],
    calibrate: int,
    judge: int,
    on_progress: Callable[[float], None] = lambda _: None,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """How many items of each stream are calibrated on, and how many after them held back."""
    calibrated: list[int] = []
    judged: list[int] = []
    for number, stream in enumerate(streams):
        on_progress(number / len(streams))
        left = len(streams) - number
        share = -(-(calibrate - sum(calibrated)) // left)
        share_back = -(-(judge - sum(judged)) // left)
        most = max(share + share_back, HELD_BACK_PART * share_back)
        length = sum(1 for _ in islice(stream, most))
        judged.append(min(share_back, length // HELD_BACK_PART))
        calibrated.append(min(share, length - judged[-1]))
    return tuple(calibrated), tuple(judged)


def _from_zero(chunks: Iterator[Chunk]) -> Iterator[Chunk]:
    """The same chunks with times that begin at 0, as those of a stream of its own."""
    begin: float | None = None
    for chunk in chunks:
        begin = chunk.t0 if begin is None else begin
        times = tuple(time - begin for time in chunk.timestamps)
        yield replace(chunk, t0=chunk.t0 - begin, t1=chunk.t1 - begin, timestamps=times)


def _holds_video(folder: Path) -> bool:
    return folder.is_dir() and any(
        file.suffix.lower() in VIDEO_SUFFIXES for file in folder.iterdir()
    )
