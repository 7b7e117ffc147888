"""What a session asks of the machine before its first chunk is seen, and how many such sessions an
engine holds."""

import math
from dataclasses import dataclass

from framesink.runtime.load.capacity import StreamShape
from framesink.runtime.preprocess import PreprocessConfig
from framesink.runtime.session_plan import VISION_MARKS, SessionPlan


@dataclass(frozen=True, slots=True)
class EngineCapacity:
    """How many live sessions of the bundle's default kind an engine holds.

    `by_time` is what the measured costs allow and `load` the share of the time that one takes, both
    None while costs are unknown; `by_pages` what the page pool has room for, None where there is
    none; `by_limit` what the engine was opened for.
    """

    by_time: int | None
    load: float | None
    by_pages: int | None
    by_limit: int

    @property
    def streams(self) -> int:
        """The least of them."""
        bounds = (self.by_time, self.by_pages, self.by_limit)
        return min(bound for bound in bounds if bound is not None)

    def sentence(self) -> str:
        """The same for a person."""
        reasons: list[str] = []
        if self.by_time is not None and self.load is not None:
            reasons.append(f"{self.by_time} by time, of which one takes {self.load:.1%}")
        if self.by_pages is not None:
            reasons.append(f"{self.by_pages} by pages")
        reasons.append(f"{self.by_limit} by the limit on sessions")
        streams = "1 live stream fits" if self.streams == 1 else f"{self.streams} live streams fit"
        return f"{streams} ({', '.join(reasons)})"


def text_tokens(plan: SessionPlan) -> int:
    """Tokens of a turn's prompt that are no vision, a question's apart."""
    return plan.profile.frame_rows + VISION_MARKS


def declared_shape(plan: SessionPlan, preprocess: PreprocessConfig) -> StreamShape:
    """The shape of a session whose chunks are as large as `preprocess` and its plan let them be."""
    rows, columns, groups = largest_chunk(plan, preprocess)
    merged = groups * rows * columns
    return StreamShape(
        chunk_seconds=plan.profile.chunk_seconds,
        patches=merged * preprocess.merge_size**2,
        prompt_tokens=merged + text_tokens(plan),
        new_tokens=plan.max_new_tokens,
    )


def largest_chunk(plan: SessionPlan, preprocess: PreprocessConfig) -> tuple[int, int, int]:
    """The grid of the largest chunk there is: rows and columns of merged patches, and temporal
    steps; each at least 1."""
    frames = max(1, round(preprocess.fps * plan.profile.chunk_seconds))
    merge = preprocess.merge_size
    most = max(1, plan.max_patches // merge**2)
    groups = min(math.ceil(frames / preprocess.temporal_patch_size), most)
    area = min(preprocess.max_pixels // (preprocess.patch_size * merge) ** 2, most // groups)
    rows = max(1, math.isqrt(area))
    return rows, max(1, area // rows), groups
