"""Where a live stream stands on its ladder: replies in, treatment of the next chunks out."""

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from framesink.runtime.events import Event
from framesink.runtime.load.admission import LiveStreams
from framesink.runtime.load.capacity import StreamShape
from framesink.runtime.load.ladder import FULL, Ladder, Rung
from framesink.runtime.preprocess import Grid, PreprocessConfig, smart_resize
from framesink.runtime.video.dropping import spread_evenly

# Where the load is predicted to fit, a stream whose replies are late waits so many times longer
# before it steps down, and as long as they become less late: others may have stepped down already,
# and what waits has to be worked off.
_PREDICTED_TO_FIT = 2
# It steps up only to a load of at most this share of the utilisation.
_ROOM_ABOVE = 0.9
# A step up that does not last makes the next one wait twice as long, at most so many times.
_LONGEST_PATIENCE = 16


@dataclass(frozen=True, slots=True)
class Treatment:
    """What becomes of a chunk: which of its frames are kept, how they are resized, how long the
    reply may be, and what is said about it if that is news."""

    rung: int
    frames: tuple[int, ...]
    preprocess: PreprocessConfig
    reply_tokens: int
    notice: str | None


@dataclass(frozen=True, slots=True)
class _Footage:
    """A chunk as it is pushed: `count` frames of `height` × `width` pixels, or one of `grid` that
    has been encoded already."""

    count: int = 0
    height: int = 0
    width: int = 0
    grid: Grid | None = None


class LadderControl:
    """One stream's place on its ladder. Safe from any thread."""

    def __init__(
        self,
        number: int,
        ladder: Ladder,
        streams: LiveStreams,
        preprocess: PreprocessConfig,
        declared: StreamShape,
        *,
        text_tokens: int,
        now: Callable[[], float] | None = None,
    ) -> None:
        """`declared` is the stream in full quality, `text_tokens` those of its prompts that are no
        vision. `streams` is told how the stream runs. `now` is `time.monotonic` by default."""
        self._number = number
        self._ladder = ladder
        self._streams = streams
        self._preprocess = preprocess
        self._declared = declared
        self._text_tokens = text_tokens
        self._now = now or (lambda: time.monotonic())
        self._bound = ladder.late * declared.chunk_seconds
        self._lock = threading.Lock()
        self._footage = _Footage()
        self._rung = 0
        self._announced = 0
        self._lag = 0.0
        self._stuck = self._said_stuck = False
        self._changed_at = -math.inf
        self._late_since: float | None = None
        self._early_since: float | None = None
        self._stepped_up_at = -math.inf
        self._patience = 1

    @property
    def rung(self) -> int:
        """The rung it stands on; 0 is full quality."""
        with self._lock:
            return self._rung

    def treat(self, shape: Sequence[int], times: Sequence[float]) -> Treatment:
        """What becomes of a chunk of frames of `shape` `[T, H, W, 3]`, at `times`.

        Raises VideoError for frames that cannot be resized.
        """
        count, height, width = shape[:3]
        footage = _Footage(count, height, width)
        _resized(footage, self._preprocess)
        with self._lock:
            self._footage = footage
            self._tell()
            rung = self._ladder.rung(self._rung)
            kept = self._kept(footage, rung)
            places = times if len(times) == count else range(count)
            return Treatment(
                self._rung,
                tuple(spread_evenly(places, kept)),
                self._resizing(footage, rung),
                self._shape(rung).new_tokens,
                self._notice(rung),
            )

    def treat_encoded(self, grid: Grid, frames: int) -> Treatment:
        """What becomes of a chunk that a vision encoder has been through: its reply alone can be
        shortened."""
        with self._lock:
            self._footage = _Footage(grid=grid)
            self._tell()
            rung = self._ladder.rung(self._rung)
            return Treatment(
                self._rung,
                tuple(range(frames)),
                self._preprocess,
                self._shape(rung).new_tokens,
                self._notice(rung),
            )

    def handed_over(self, treatment: Treatment) -> None:
        """The chunk is on its way, and its notice with it."""
        if treatment.notice is not None:
            with self._lock:
                if self._announced != treatment.rung:
                    self._announced = treatment.rung
                else:
                    self._said_stuck = True

    def ended(self, event: Event) -> None:
        """A final event; those of replies say how late they are."""
        if event.timing is not None:
            self.replied(event.lag)

    def replied(self, lag: float) -> None:
        """A reply ended `lag` seconds after its chunk."""
        now = self._now()
        with self._lock:
            captured = now - lag
            if captured < self._changed_at:
                return  # it was on its way before the last step
            before, self._lag = self._lag, lag
            if lag > self._bound:
                self._early_since = None
                if self._late_since is None:
                    self._late_since = captured + self._bound
                if self._is_late_enough(now - self._late_since, improving=lag < before):
                    self._step_down(now)
                return
            self._late_since = None
            self._stuck = self._said_stuck = False
            if lag > self._ladder.early * self._declared.chunk_seconds:
                self._early_since = None
                return
            if self._early_since is None:
                self._early_since = now
            if now - self._early_since >= self._ladder.up_after * self._patience:
                self._step_up(now)

    def _is_late_enough(self, seconds: float, *, improving: bool) -> bool:
        """Whether replies that have been late for `seconds` are a reason to step down."""
        load = self._streams.load()
        if load is None or load > self._streams.utilisation:
            return seconds >= self._ladder.down_after
        return not improving and seconds >= _PREDICTED_TO_FIT * self._ladder.down_after

    def _step_down(self, now: float) -> None:
        present = self._shape(self._ladder.rung(self._rung))
        for number in range(self._rung + 1, len(self._ladder.rungs) + 1):
            if self._shape(self._ladder.rung(number)) != present:
                short_lived = now - self._stepped_up_at < 4 * self._ladder.up_after * self._patience
                self._patience = min(2 * self._patience, _LONGEST_PATIENCE) if short_lived else 1
                self._step_to(number, now)
                return
        self._stuck = True

    def _step_up(self, now: float) -> None:
        present = self._shape(self._ladder.rung(self._rung))
        for number in range(self._rung - 1, -1, -1):
            above = self._shape(self._ladder.rung(number))
            if above == present and number > 0:
                continue
            while number > 0 and self._shape(self._ladder.rung(number - 1)) == above:
                number -= 1
            load = self._streams.load_if(self._number, above)
            if load is None or load <= _ROOM_ABOVE * self._streams.utilisation:
                self._stepped_up_at = now
                self._step_to(number, now)
            return

    def _step_to(self, number: int, now: float) -> None:
        self._rung = number
        self._changed_at = now
        self._late_since = self._early_since = None
        self._stuck = self._said_stuck = False
        self._tell()

    def _tell(self) -> None:
        running = self._shape(self._ladder.rung(self._rung))
        self._streams.update(self._number, self._shape(FULL), running, self._rung)

    # What a rung makes of the last chunk.

    def _kept(self, footage: _Footage, rung: Rung) -> int:
        """Frames that are kept, as many as the vision encoder takes at a time or several times
        that: fewer would save nothing."""
        at_a_time = self._preprocess.temporal_patch_size
        groups = math.ceil(footage.count * rung.frames / at_a_time)
        return min(footage.count, groups * at_a_time)

    def _resizing(self, footage: _Footage, rung: Rung) -> PreprocessConfig:
        config = self._preprocess
        if rung.pixels == 1:
            return config
        height, width = _resized(footage, config)
        fewer = replace(config, max_pixels=max(1, math.floor(height * width * rung.pixels)))
        height, width = _resized(footage, fewer)
        return fewer if height * width >= config.min_pixels else config

    def _shape(self, rung: Rung) -> StreamShape:
        footage, config = self._footage, self._preprocess
        patches, vision_tokens = self._declared.patches, None
        if footage.grid is not None:
            patches, vision_tokens = 0, footage.grid.tokens(config.merge_size)
        elif footage.count:
            height, width = _resized(footage, self._resizing(footage, rung))
            groups = math.ceil(self._kept(footage, rung) / config.temporal_patch_size)
            patches = groups * (height // config.patch_size) * (width // config.patch_size)
        if vision_tokens is None:
            vision_tokens = patches // config.merge_size**2
        return StreamShape(
            self._declared.chunk_seconds,
            patches,
            self._text_tokens + vision_tokens,
            math.ceil(self._declared.new_tokens * rung.reply),
        )

    # What is said.

    def _notice(self, rung: Rung) -> str | None:
        if self._rung == self._announced:
            if not self._stuck or self._said_stuck:
                return None
            return (
                f"Replies still come {self._lag:.1f} s after their chunks, and the ladder has no "
                "lower rung: the machine is too slow for its streams."
            )
        where = f"(rung {self._rung} of {len(self._ladder.rungs)})"
        if self._rung > self._announced:
            why = (
                f"Replies come {self._lag:.1f} s after their chunks, later than the "
                f"{self._bound:g} s that are allowed"
            )
        else:
            why = "Replies are in time again"
        return f"{why}: from here on {self._description(rung)} {where}."

    def _description(self, rung: Rung) -> str:
        footage, config = self._footage, self._preprocess
        said: list[str] = []
        if footage.count:
            kept = self._kept(footage, rung)
            if kept < footage.count:
                said.append(f"{kept} of {footage.count} frames of a chunk are seen")
            height, width = _resized(footage, self._resizing(footage, rung))
            if (height, width) != _resized(footage, config):
                said.append(f"frames are made {width}×{height} pixels")
        tokens = self._shape(rung).new_tokens
        if tokens < self._declared.new_tokens:
            said.append(f"replies end after {tokens} tokens")
        return " and ".join(said) or "all is seen and said in full"


def _resized(footage: _Footage, config: PreprocessConfig) -> tuple[int, int]:
    """Height and width of frames that reach the model."""
    return smart_resize(
        footage.height,
        footage.width,
        factor=config.patch_size * config.merge_size,
        min_pixels=config.min_pixels,
        max_pixels=config.max_pixels,
    )
