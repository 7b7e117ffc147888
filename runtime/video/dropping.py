"""What becomes of frames the model has no time for: pure functions and the backlog they act on."""

from collections.abc import Sequence
from typing import Literal

import cv2
import numpy as np

from framesink.runtime.arrays import UInt8Array
from framesink.runtime.video.chunk import Chunk
from framesink.runtime.video.cutter import Cut, SampledFrame

DropPolicy = Literal["latest", "uniform", "motion"]
DROP_POLICIES: tuple[DropPolicy, ...] = ("latest", "uniform", "motion")

# The backlog of `uniform` and `motion` is thinned to half when it holds more chunks than this.
BACKLOG_CHUNKS = 8
_THUMBNAIL = (64, 36)


def spread_evenly(timestamps: Sequence[float], keep: int) -> list[int]:
    """Indices of at most `keep` frames nearest to even places over `timestamps` (ascending).

    The first and the last frame are among them; a single one is the last.
    """
    count = len(timestamps)
    if keep >= count:
        return list(range(count))
    if keep == 1:
        return [count - 1]
    chosen: list[int] = []
    for place, target in enumerate(np.linspace(timestamps[0], timestamps[-1], keep)):
        begin = chosen[-1] + 1 if chosen else 0
        end = count - (keep - place - 1)
        chosen.append(min(range(begin, end), key=lambda i: (abs(timestamps[i] - target), i)))
    return chosen


def most_moving(motions: Sequence[float], keep: int) -> list[int]:
    """Indices, ascending, of the at most `keep` frames that differ most from the one before.

    Among equals the newer wins.
    """
    order = sorted(range(len(motions)), key=lambda i: (motions[i], i), reverse=True)
    return sorted(order[:keep])


class MotionMeter:
    """Measures how much each frame differs from the one before, on small grey pictures."""

    def __init__(self) -> None:
        self._last: UInt8Array | None = None

    def measure(self, image: UInt8Array) -> float:
        """Mean grey level difference (0 to 255) to the image before; infinite for the first."""
        small = cv2.resize(image, _THUMBNAIL, interpolation=cv2.INTER_AREA)
        grey = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY)
        last, self._last = self._last, grey
        return float("inf") if last is None else float(cv2.absdiff(grey, last).mean())


def assemble(frames: Sequence[SampledFrame], t0: float, t1: float, dropped: int) -> Chunk:
    """A chunk of sampled frames; frames of another size take the size of the newest."""
    height, width = frames[-1].image.shape[:2]
    images = [
        frame.image
        if frame.image.shape[:2] == (height, width)
        else cv2.resize(frame.image, (width, height), interpolation=cv2.INTER_AREA)
        for frame in frames
    ]
    return Chunk(
        frames=np.stack(images),
        t0=t0,
        t1=t1,
        timestamps=tuple(frame.timestamp for frame in frames),
        captured_at=max(frame.captured_at for frame in frames),
        dropped=dropped,
    )


class Backlog:
    """Cuts that wait for the model, thinned by a drop policy so that they never pile up.

    `latest` keeps the newest cut alone. `uniform` and `motion` hand out all that waits as one
    chunk over its whole time, with no more frames than a usual chunk: spread evenly, or those that
    differ most from their predecessors. Without a policy nothing is dropped, and `full` tells the
    writer to wait.
    """

    def __init__(self, policy: DropPolicy | None, frames_per_chunk: int, capacity: int) -> None:
        """`capacity` is in chunks."""
        self.policy = policy
        self.frames_per_chunk = frames_per_chunk
        self.capacity = capacity
        self.dropped_total = 0
        self._cuts: list[Cut] = []
        self._dropped = 0

    def __len__(self) -> int:
        return len(self._cuts)

    @property
    def full(self) -> bool:
        """Whether the writer must wait: never so where a policy drops."""
        return self.policy is None and len(self._cuts) >= self.capacity

    @property
    def frames(self) -> int:
        """Frames that wait."""
        return sum(len(cut.frames) for cut in self._cuts)

    def add(self, cut: Cut) -> None:
        """Append a cut; the policy may drop frames that wait."""
        if self.policy == "latest":
            self._drop(self.frames)
            self._cuts = [cut]
            return
        self._cuts.append(cut)
        if self.policy is not None and self.frames > self.capacity * self.frames_per_chunk:
            self._cuts = [self._thinned(self.capacity * self.frames_per_chunk // 2)]

    def take(self) -> Chunk | None:
        """The next chunk, or None when nothing waits."""
        if not self._cuts:
            return None
        if self.policy in ("uniform", "motion"):
            self._cuts = [self._thinned(self.frames_per_chunk)]
        cut = self._cuts.pop(0)
        dropped, self._dropped = self._dropped, 0
        return assemble(cut.frames, cut.t0, cut.t1, dropped)

    def _thinned(self, keep: int) -> Cut:
        frames = [frame for cut in self._cuts for frame in cut.frames]
        if self.policy == "motion":
            kept = most_moving([frame.motion for frame in frames], keep)
        else:
            kept = spread_evenly([frame.timestamp for frame in frames], keep)
        self._drop(len(frames) - len(kept))
        return Cut(tuple(frames[i] for i in kept), self._cuts[0].t0, self._cuts[-1].t1)

    def _drop(self, count: int) -> None:
        self._dropped += count
        self.dropped_total += count
